# The walkthrough of TRL's implementation: annotated_trainers/ppo.md
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl==1.12.0",
#     "transformers>=5.10.1,<5.24",
#     "datasets>=4.7,<5.3",
#     "peft>=0.20,<0.22",
#     "accelerate>=1.12,<1.16",
#     "torch>=2.11,<2.14",
#     "requests>=2.33,<3",
# ]
# ///
"""Proximal Policy Optimization (PPO): sample answers, let a reward model score them, make the better ones more likely.

The loss of one sampled token (Schulman et al. 2017, arXiv 1707.06347, eq. 7), and what its advantage is made of: a score
at the end of the answer and, at each token, a price for leaving the reference (Ziegler et al. 2019, arXiv 1909.08593, eq. 2):

    loss   = -min(ratio * advantage, clip(ratio, 1 - cliprange, 1 + cliprange) * advantage),  ratio = p / p_when_sampled
    reward = score (at the end only) - kl_coef * (logp - ref_logp)

The advantage says how much better things went on from this token than a second trained model, the value model, had expected
of the text before it (GAE: Schulman et al. 2015, arXiv 1506.02438).

One row of data, which has no answer, since the policy writes its own:

    {"prompt": [{"role": "user", "content": "7+9+3"}]}

Run it:

    python ppo.py                                               # the toy world, no network, no GPU needed
    python ppo.py --model_name_or_path Qwen/Qwen3-0.6B --reward_model_path Skywork/Skywork-Reward-V2-Qwen3-0.6B
    python ppo.py --model_name_or_path SFT_FOLDER --reward_model_path REWARD_FOLDER     # after sft.py and reward.py
    accelerate launch ppo.py --model_name_or_path ... --reward_model_path ... --use_peft --dtype bfloat16

What to look at: objective/scores rises, objective/kl does not grow without end, and the held-out answers get better.
"""

import json
import re
import shutil
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from packaging.version import Version
from peft import inject_adapter_in_model
from torch.random import fork_rng
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import is_torch_tf32_available
from transformers.utils.peft_utils import find_adapter_config_file


def stop(message: str) -> None:
    """Ends the run with a message for the user. Nothing has been trained or overwritten yet."""
    raise SystemExit(f"{Path(__file__).name}: {message}")


if Version(version("trl")) < Version("1.12.0"):
    stop(f"this script needs trl 1.12.0 or newer, and trl {version('trl')} is installed: pip install 'trl==1.12.0'")
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
    is_conversational,
    maybe_extract_prompt,
)
from trl.models.utils import unwrap_model_for_generation

try:
    from trl.experimental.ppo import PPOConfig, PPOTrainer
except ImportError:
    stop(
        f"PPOTrainer was removed in TRL 1.13.0, and trl {version('trl')} is installed. Run `uv run {Path(__file__).name}`, "
        "which takes the release that this script names, or pip install 'trl==1.12.0'. Its successors in TRL are RLOO and "
        "GRPO, whose reward_funcs take a reward model too: rloo.py and grpo.py"
    )

# ---------------------------------------------------------------------------------------------------------- settings
# TRL's defaults hold unless a line below changes them; a flag or a line of the YAML file behind --config overrides both.


@dataclass
class Arguments(ScriptArguments):
    pad_token: str | None = field(
        default=None,
        metadata={"help": "token that fills up short rows; must differ from the end token"},
    )
    max_prompt_length: int = field(
        default=512,
        metadata={"help": "prompts with more tokens are left out; a batch is as wide as its longest prompt"},
    )


SCRIPT = "ppo"
FLAGS = (Arguments, PPOConfig, ModelConfig, DatasetMixtureConfig)  # each of their fields is a flag
COLUMNS = ({"prompt"},)  # a row needs one of these sets; more columns do no harm
RESUMES = False  # PPOTrainer.train() takes no checkpoint to go on from
WORLD = Path(__file__).resolve().parent / "toy"

TOY = {
    "model_name_or_path": str(WORLD / "policy"),  # 0.9M parameters: adds well, slips often (toy/README.md)
    "reward_model_path": str(WORLD / "reward_model"),  # gives a right answer about 6 and a wrong one about -8
    "sft_model_path": None,  # PPOTrainer never reads it: the policy is model_name_or_path, as in all these scripts
    "dataset_name": str(WORLD / "data" / "prompt_only"),  # sums that it has never seen
    "output_dir": "outputs/ppo-toy",
    "learning_rate": 1e-4,  # 30 times TRL's default: a model of 0.9M parameters moves little at once
    "per_device_train_batch_size": 64,  # answers that are sampled and scored, and then learned from
    "max_steps": 20,  # rounds of that; build() tells PPOTrainer, which counts answers
    "num_ppo_epochs": 2,  # passes over the answers of a round; after the first step the policy is not the one that sampled them
    "num_mini_batches": 4,  # steps of the optimizer in each pass, 16 answers each
    "kl_coef": 1.0,  # score lost for each nat that an answer is more likely than under the reference; the scores lie 13 apart.
    # In these few rounds TRL's 0.05 ends no worse (README.md). What the reward model overlooks would show as scores and KL
    # that rise while right answers fall
    "cliprange_value": 100.0,  # no limit; 0.2 is small for a value model on the scale of these scores
    "temperature": 1.0,  # learns what the held-out answers are sampled with; at 0.7 the slips are rare
    "response_length": 40,  # tokens; the longest right answer has 35
    "stop_token": "eos",  # without it each answer goes on to response_length, and so does the model that is saved
    "num_sample_generations": 0,  # tables of answers while it trains; the held-out samples show the same
    "gradient_checkpointing": False,  # would save memory that the toy does not need
    "bf16": False,  # float32 on every device, so that the figures can be compared
    "save_strategy": "no",  # the run is short; the model is saved at its end
}

# For Qwen3-0.6B on one GPU with 80 GB
REAL = {
    "reward_model_path": None,  # must be given; PPOConfig's own default is a language model of another family
    "sft_model_path": None,
    "dataset_name": "trl-lib/ultrafeedback-prompt",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,  # 32 answers in each round. Their logits wait in memory until all are sampled: 32
    # answers * 256 tokens * 152k words of Qwen3 * 4 bytes = 5 GB, twice that while they are put together, three times from the second round on
    "local_rollout_forward_batch_size": 32,  # answers that are sampled at once, and scored by reference and reward model: all
    # of a round, so a new token of each takes one pass through the model
    "gradient_checkpointing": False,  # with it, TRL's default, every layer is computed twice to save memory
    "num_train_epochs": 1,  # so that every prompt is new
    "response_length": 256,  # tokens; longer answers are cut
    "stop_token": "eos",  # as above; it is not the default
    "num_sample_generations": 0,  # a table from a test split of one batch would switch accumulation off
    "missing_eos_penalty": 1.0,  # taken from the score of an answer that is cut: the reward model has seen whole ones only
    "temperature": 1.0,  # TRL's 0.7 would train a sharper policy than the one that is sampled at 1 later
    "warmup_steps": 0.05,  # a share of all rounds
    "lr_scheduler_type": "cosine",
    "eval_strategy": "steps",  # PPOTrainer does not evaluate; this loads the prompts for the samples before and after
    "save_only_model": True,  # it cannot resume either, so a checkpoint is a model and no more
    "bf16": False,  # PPOTrainer ignores it and computes in --dtype: float32 by default, bfloat16 is for --use_peft
    "tf32": is_torch_tf32_available(),  # float32 matrix products on tensor cores
}


# ---------------------------------------------------------------------------------------------------- model and trainer


def check_flags(script_args, training_args, model_args) -> None:
    """Stops at flags that PPOTrainer takes without a word and then ignores, or does something else with."""
    if training_args.reward_model_path is None:
        stop(
            "PPO needs a reward model that reads the policy's tokens: give --reward_model_path, for example "
            "Skywork/Skywork-Reward-V2-Qwen3-0.6B for a Qwen3, or a folder that reward.py has written"
        )
    if training_args.sft_model_path not in (None, model_args.model_name_or_path):
        stop(
            "the policy and its reference are --model_name_or_path: leave --sft_model_path out, PPOTrainer never reads it"
        )
    if training_args.bf16 or training_args.fp16:
        stop("PPOTrainer ignores --bf16 and --fp16: it computes in the type of the weights, for which there is --dtype")
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        stop("quantized weights cannot learn: give --use_peft too")
    refuse_adapter(training_args.reward_model_path)
    if script_args.dataset_streaming:
        stop("PPOTrainer has to know the number of prompts: load them without --dataset_streaming")
    if training_args.num_mini_batches > 1 and training_args.gradient_accumulation_steps > 1:
        stop(
            "with --gradient_accumulation_steps above 1, PPOTrainer takes fewer steps of the optimizer than --num_mini_batches "
            "says, and divides its metrics by a wrong number: give 1 for one of the two"
        )


def tokenize(dataset, tokenizer, max_length: int):
    """Prompts as token ids, without those of more than max_length: PPOTrainer applies no chat template and cuts nothing."""
    with PartialState().main_process_first():
        ids = dataset.map(lambda row: {"input_ids": prompt_ids(row, tokenizer)}, remove_columns=dataset.column_names)
        short = ids.filter(lambda row: len(row["input_ids"]) <= max_length)
    if len(short) < len(ids):
        PartialState().print(
            f"{len(ids) - len(short)} of {len(ids)} prompts have more than {max_length} tokens and are left out."
        )
    return short


def load_reward_model(training_args, model_args, tokenizer):
    """The reward model, if it is one and can read what the policy writes: PPOTrainer gives it the policy's token ids."""
    name = training_args.reward_model_path
    try:
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=model_args.dtype, attn_implementation=model_args.attn_implementation, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        stop(f"cannot load the reward model {name!r}, from a folder or from the hub: {str(error).splitlines()[0]}")
    if report["missing_keys"] or model.config.num_labels != 1:
        stop(
            f"{name!r} is not a reward model: it has to give one number for an answer, and "
            + ("has no weights for that, so they would be random" if report["missing_keys"] else "gives several")
            + ". reward.py trains one"
        )
    for token, number in tokenizer.get_vocab().items():
        if vocabulary.get(token) != number:
            stop(
                f"the reward model {name!r} has another vocabulary than the policy: {token!r} is token {number} for the "
                f"policy and {vocabulary.get(token)} for the reward model, which would score other words than were "
                "written. Take one that was trained from the same family of models, or train it with reward.py"
            )
    return model


def build(script_args, training_args, model_args, train_dataset, eval_dataset, tokenizer):
    """Four models: policy and value model learn, the reference and the reward model stay as they are.

    The value model begins as a copy of the reward model, as in InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, section
    3.5): it is to foresee the score. Without ref_model the trainer copies the policy; with an adapter (--use_peft) the
    reference is the policy with the adapter switched off.
    """
    check_flags(script_args, training_args, model_args)
    if training_args.stop_token_id is not None:
        training_args.stop_token = None  # PPOTrainer takes one of the two
        # It looks for eos_token when it takes the missing_eos_penalty, whichever token ends an answer
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(training_args.stop_token_id)
    set_seed(training_args.seed)  # PPOTrainer seeds torch, and not numpy, which shuffles its mini batches

    # Data
    tokenizer.padding_side = "left"  # so that an answer follows its prompt; PPOTrainer leaves this to its caller
    if "enable_thinking" in (tokenizer.chat_template or ""):  # Qwen3 thinks for longer than response_length
        tokenizer.chat_template = "{% set enable_thinking = false %}" + tokenizer.chat_template
    train_dataset = tokenize(train_dataset, tokenizer, script_args.max_prompt_length)
    if eval_dataset is not None:
        eval_dataset = tokenize(eval_dataset, tokenizer, script_args.max_prompt_length)
    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    batch *= PartialState().num_processes
    if len(train_dataset) < batch:
        stop(
            f"a round takes {batch} prompts, and there are {len(train_dataset)} of at most "
            f"{script_args.max_prompt_length} tokens, so PPOTrainer would wait for more for ever: lower "
            "--per_device_train_batch_size or --gradient_accumulation_steps, or raise --max_prompt_length"
        )
    if training_args.total_episodes is None and training_args.max_steps > 0:  # PPOTrainer does not read max_steps
        training_args.total_episodes = training_args.max_steps * batch

    # Models
    quantization = get_quantization_config(model_args)
    policy = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=quantization,
        device_map={"": PartialState().local_process_index} if quantization else None,
    )
    reward_model = load_reward_model(training_args, model_args, tokenizer)
    value_model = deepcopy(reward_model)
    if model_args.use_peft:  # TRL gives the policy an adapter, and would train all weights of the value model
        inject_adapter_in_model(get_peft_config(model_args), value_model)
        for weight in value_model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()  # bfloat16 would round small steps away
    if training_args.gradient_checkpointing:  # PPOTrainer leaves this to its caller
        for model in (policy, value_model):
            model.gradient_checkpointing_enable(training_args.gradient_checkpointing_kwargs)

    trainer = PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
    )
    # PPOTrainer builds itself without Trainer's __init__, and several processes miss some of what that sets
    trainer.is_distributed_loading_by_transformers = False
    if not hasattr(trainer.model, "policy"):
        inner = trainer.accelerator.unwrap_model(trainer.model)
        trainer.model.policy, trainer.model.config = inner.policy, inner.config
    return trainer


@torch.no_grad()
def show_row(trainer) -> None:
    """Prints a prompt, an answer to it and its score, and how many of 16 answers are cut at response_length."""
    say, tokenizer, limit = trainer.accelerator.print, trainer.processing_class, trainer.args.response_length
    prompts = trainer.train_dataset[:16]["input_ids"]
    answers = sample(trainer, prompts, limit, skip_special_tokens=False)
    end = tokenizer.decode(tokenizer.eos_token_id if trainer.stop_token_id is None else trainer.stop_token_id)
    cut = sum(end not in answer for answer in answers)
    if cut == len(answers):
        stop(
            f"none of {cut} answers ends with {end!r} within response_length={limit} tokens, so the reward model would see "
            "beginnings only: give a larger --response_length, or the token that ends a turn with --stop_token_id"
        )
    if cut:
        say(f"{cut} of {len(answers)} answers are longer than response_length={limit} tokens and lose their end.\n")
    answer = answers[0].replace(tokenizer.pad_token, "")
    row = prompts[0] + tokenizer(answer, add_special_tokens=False)["input_ids"]
    score = trainer.reward_model(torch.tensor([row], device=trainer.accelerator.device)).logits.item()
    say(f"prompt_ids   {tokenizer.decode(prompts[0])}")
    say(f"answer       {answer}")  # its tokens carry loss
    say(f"score        {score:.2f}")


# ----------------------------------------------------------------------------------------------------------- held out

FIGURES = ()  # PPOTrainer does not evaluate


def prompt_ids(row: dict, tokenizer) -> list[int]:
    """The tokens of a row up to the point where the answer begins."""
    row = {"prompt": row["messages"][:-1]} if "messages" in row else maybe_extract_prompt(row)
    if is_conversational(row):
        return tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokenizer(row["prompt"])["input_ids"]


@torch.no_grad()
def sample(trainer, prompts: list[list[int]], max_new_tokens: int, skip_special_tokens: bool = True) -> list[str]:
    """One answer for each prompt (token ids), sampled at temperature 1. Training draws as if nobody had looked."""
    tokenizer, gpus = trainer.processing_class, [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with fork_rng(gpus), unwrap_model_for_generation(trainer.model, trainer.accelerator) as model:
        torch.manual_seed(trainer.args.seed)
        policy = model.policy.eval()  # the value model stands beside it
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(policy.device)
        drawing = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        output = policy.generate(**batch, **drawing, max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=skip_special_tokens)


def held_out(trainer, rows: list[dict], toy: bool) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """How good the policy is on data that it never trains on: figures, and a few samples as (prompt, answer)."""
    metrics = trainer.evaluate() if FIGURES and trainer.eval_dataset is not None else {}
    figures = {name: metrics[f"eval_{name}"] for name in FIGURES if metrics.get(f"eval_{name}") is not None}
    if toy:
        rows = list(load_dataset(str(WORLD / "data" / "prompt_only"), split="test"))
    rows = [row for row in rows if {"messages", "prompt"} & set(row)]  # plain text has no prompt
    if not rows:
        return figures, []
    prompts = [prompt_ids(row, trainer.processing_class) for row in rows]
    answers = sample(trainer, prompts, max_new_tokens=64 if toy else 256)
    if toy:  # the toy world knows the truth: the number behind the last # is the sum, or it is not
        right = [answer.endswith(f"#{row['answer']}") for answer, row in zip(answers, rows, strict=True)]
        figures = {"right answers": sum(right) / len(right)} | figures
    texts = trainer.processing_class.batch_decode(prompts[:3], skip_special_tokens=True)
    return figures, list(zip(texts, answers[:3], strict=True))


# ------------------------------------------------------------------------------------------------------------ the run
# From here on the fifteen scripts are the same to the letter.


def parse(command_line: list[str]):
    """Toy settings for the toy policy and for what was trained from it, real ones else; the YAML file; the flags."""
    # TrlParser knows --config FILE, and not --config=FILE
    command_line = [part for word in command_line for part in re.split("(?<=^--config)=", word)]
    flags = {}
    for word, following in zip(command_line, [*command_line, ""][1:], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name.replace("-", "_")] = value if equals else following  # both spellings are flags
    given = (read_config(flags["config"]) if "config" in flags else {}) | flags
    model = given.get("model_name_or_path")
    toy = model is None or is_toy_run(Path(model))
    if model is None and {"dataset_name", "datasets"} & set(given):
        stop("the toy policy knows nothing but sums: with --dataset_name, give your model with --model_name_or_path")
    if toy and not WORLD.is_dir() and not {"-h", "--help"} & set(command_line):
        stop(f"there is no toy world in {WORLD}: run this script inside its repository, or give --model_name_or_path")
    parser = TrlParser(FLAGS, allow_abbrev=False)  # half of a name would pass by the choice of settings above
    parser.set_defaults(**(TOY if toy else REAL))
    return toy, *parser.parse_args_and_config(command_line)


TAKERS = {  # columns -> the scripts for such rows
    ("prompt", "completions", "labels"): "prm.py",
    ("prompt", "completion", "label"): "kto.py and bco.py",
    ("chosen", "rejected"): "dpo.py, cpo.py, orpo.py and reward.py",
    ("prompt", "completion"): "sft.py and gkd.py",
    ("messages",): "sft.py and gkd.py",
    ("text",): "sft.py",
    ("prompt",): "grpo.py, rloo.py, ppo.py, online_dpo.py, nash_md.py and xpo.py",
}


def read_config(name: str) -> dict:
    """The flags of a YAML file. TrlParser reads it again, and does not say what is wrong with it."""
    try:
        found = yaml.safe_load(Path(name).read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        stop(f"cannot read --config {name}: {error}")
    if not isinstance(found, dict):
        stop(f"--config {name} is not a list of flags: it needs lines like `learning_rate: 1.0e-6`")
    if found.get("eval_strategy") is False:
        stop(f'--config {name}: YAML reads no as false, so write eval_strategy: "no"')
    return found


def is_toy_run(folder: Path) -> bool:
    """Whether a run of one of these scripts on the toy world has written this folder."""
    return (folder / "run.json").is_file() and json.loads((folder / "run.json").read_text())["toy"]


def says_empty(error: Exception) -> bool:
    """Whether an error means a file without rows: the reader of each format has its own words for that."""
    words = ("no data", "first 0 values", "No columns to parse")
    return isinstance(error, StopIteration) or any(part in str(error.__cause__ or error) for part in words)


def load_data(script_args, mixture_args):
    """All splits, from the hub, from a folder with train.jsonl (.csv, .parquet) and test.jsonl, or as a mixture."""
    if mixture_args.datasets and mixture_args.streaming and mixture_args.test_split_size:
        stop("a stream has no known end to cut a test split from: leave out streaming or test_split_size")
    name = script_args.dataset_name
    if Path(name).is_file():
        stop(f"{name!r} is a file: give its folder, in which the files of the splits are called train and test")
    try:
        if mixture_args.datasets:
            name = "the mixture"
            return get_dataset(mixture_args)
        return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    except (StopIteration, OSError, ValueError, DatasetGenerationError) as error:
        if says_empty(error):
            stop(f"a split of the data set {name!r} is empty")
        lines = str(error.__cause__ or error).splitlines() or [""]
        reason = " ... ".join(dict.fromkeys((lines[0], lines[-1])))
        stop(f"cannot load {name!r}, neither as a folder of data files nor from the hub: {reason}")


def load_split(dataset, split: str):
    """One split, after a look at its first row."""
    if split not in dataset:
        stop(
            f"there is no split {split!r}, only {sorted(dataset)}: choose with --dataset_train_split and "
            "--dataset_test_split (a mixture makes one with test_split_size), or do without the held-out comparison with "
            "--eval_strategy no"
        )
    try:
        first = next(iter(dataset[split]), None)
    except ValueError as error:  # a stream opens its file only here
        if not says_empty(error):
            raise
        first = None
    if first is None:
        stop(f"the split {split!r} is empty")
    columns = next((columns for columns in COLUMNS if columns <= set(first)), None)
    if columns is None:
        taker = next((scripts for columns, scripts in TAKERS.items() if set(columns) <= set(first)), None)
        stop(
            f"a row needs the columns {' or '.join(' + '.join(sorted(columns)) for columns in COLUMNS)}, and the split "
            f"{split!r} has {sorted(first)}: {f'such rows are for {taker}' if taker else 'rename or map your columns'}"
        )
    for name in sorted({"prompt", *columns} & set(first)):
        value, table = first[name], getattr(dataset[split], "data", None)  # a stream has no table
        if value is None or (table and table.column(name).null_count):
            row = table.column(name).is_null().index(True).as_py() if table else 0
            stop(f"row {row} of the split {split!r} has None in the column {name!r}: leave such rows out, or fill them")
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            stop(f"the column {name!r} holds messages as one text: read them with json.loads, save them as JSON Lines")
        keys = set(value[0]) if isinstance(value, list) and value and isinstance(value[0], dict) else None
        if keys is not None and not {"role", "content"} <= keys:
            stop(f"a message needs role and content, and those of {name!r} have {sorted(keys)}: rename them")
    if "chosen" in columns and "prompt" not in first and SCRIPT != "reward":  # RewardTrainer can do without a prompt
        answer = (
            first["chosen"] if isinstance(first["chosen"], str) else " ".join(str(part) for part in first["chosen"])
        )
        asked = [
            name for name in ("question", "instruction", "query", "input") if str(first.get(name, answer)) not in answer
        ]
        if asked or first["chosen"][:1] != first["rejected"][:1]:
            remedy = f"is yours in {asked}? Then rename that" if asked else "these have none, so add one"
            stop(f"without a column prompt, what chosen and rejected begin with alike is the prompt: {remedy}")
    if "chosen" in columns and isinstance(first["chosen"], list):
        # HuggingFaceH4/ultrafeedback_binarized has the prompt also as a text, and the chosen conversation also as messages;
        # TRL looks at any one column to learn whether rows are conversations
        twice = {"messages", "completion"} | ({"prompt"} if isinstance(first.get("prompt"), str) else set())
        if "prompt" in twice and not any(message["role"] == "user" for message in first["chosen"]):
            stop("the prompt is a text, and the answers are messages without it: make the prompt a list of messages")
        return dataset[split].remove_columns(sorted(twice & set(first)))
    return dataset[split]


def refuse_adapter(name: str) -> None:
    """Stops if a folder or a repository is an adapter: transformers would freeze it with its base, or not know it."""
    try:
        found = find_adapter_config_file(name)
    except OSError:  # one that is not there is none; the loading says so
        return
    if found:
        kind, more = {
            "SEQ_CLS": ("SequenceClassification", ", num_labels=1"),
            "TOKEN_CLS": ("TokenClassification", ", num_labels=2"),
        }.get(json.loads(Path(found).read_text()).get("task_type"), ("CausalLM", ""))
        stop(
            f"{name!r} holds an adapter and not a whole model. Merge it into its base: peft.AutoPeftModelFor{kind}"
            f".from_pretrained({name!r}{more}).merge_and_unload(), then save_pretrained(FOLDER) of that and of the adapter's "
            "tokenizer (its pad_token_id belongs into the model's config too), and give FOLDER"
        )


def load_tokenizer(script_args, training_args, model_args, first_row):
    """The model's tokenizer, if it can render these rows and tell padding from the end of an answer."""
    name = model_args.model_name_or_path
    refuse_adapter(name)
    if (Path(name) / "config.json").is_file() and not any(Path(name).glob("*token*")):
        stop(
            f"there is a model in {name} and no tokenizer: save it there too, with tokenizer.save_pretrained({name!r})"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=model_args.model_revision,
            trust_remote_code=getattr(training_args, "trust_remote_code", False),
        )
    except (OSError, ValueError) as error:
        stop(f"cannot load {name!r}, which is neither a model folder here nor on the hub: {str(error).splitlines()[0]}")
    vocabulary, pad_token = tokenizer.get_vocab(), (vars(script_args) | vars(training_args)).get("pad_token")
    if pad_token is not None and pad_token not in vocabulary:
        stop(f"--pad_token {pad_token!r} is not a token of {name!r}")
    tokenizer.eos_token = getattr(training_args, "eos_token", None) or tokenizer.eos_token
    tokenizer.pad_token = pad_token or tokenizer.pad_token
    if tokenizer.eos_token_id is None:
        stop(f"the tokenizer of {name!r} has no token that ends an answer (eos_token): set one and save it again")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        spare = [token for token in vocabulary if re.match(r"[<\[].*(pad|reserved|unused|unk)", token)][:3]
        stop(
            f"the tokenizer of {name!r} pads with {tokenizer.pad_token!r} and ends answers with {tokenizer.eos_token!r}: "
            "many trainers mask the end with the padding, and such a model never learns to stop. Give a token that no "
            "text holds with --pad_token" + (f", for example one of {spare}" if spare else "")
        )
    columns = {name: value for name, value in first_row.items() if not isinstance(value, str)}  # a text beside messages
    template = getattr(training_args, "chat_template_path", None)  # a file, or a model whose template the trainer takes
    if template and Path(template).is_file():
        tokenizer.chat_template = Path(template).read_text("utf-8")
    if is_conversational(columns) and tokenizer.chat_template is None and template is None:
        stop(f"the rows are conversations, and the tokenizer of {name!r} has no chat template: take an instruct model")
    parts = [columns.get(part) or [] for part in ("messages", "prompt", "chosen", "completion")]
    if tokenizer.chat_template and is_conversational(columns) and all(isinstance(part, list) for part in parts):
        try:
            tokenizer.apply_chat_template(
                parts[0] or [message for part in parts[1:] for message in part], tokenize=False
            )
        except Exception as error:  # a template stops in its own words
            stop(f"the chat template of {name!r} cannot render the first row: {error}")
    return tokenizer


def check_folder(toy: bool, training_args, model_args) -> Path | None:
    """Makes sure that output_dir can be written and holds nobody else's run; the checkpoint to go on from, if asked for."""
    if training_args.output_dir == "trainer_output":  # transformers' default
        training_args.output_dir = f"outputs/{SCRIPT}-{Path(model_args.model_name_or_path).name}"
    output_dir, resume = Path(training_args.output_dir), training_args.resume_from_checkpoint
    if resume and not RESUMES:
        stop("this trainer cannot resume a run: start again without --resume_from_checkpoint, in a new --output_dir")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        stop(f"cannot write to {output_dir}: {error.strerror}")
    owner, files = {"script": SCRIPT, "toy": toy}, {path.name for path in output_dir.iterdir()}
    if resume and str(resume).lower() not in ("false", "0", "no"):
        newest = str(resume).lower() in ("true", "1", "yes")
        found = output_dir.glob("checkpoint-*") if newest else [Path(resume)]
        whole = [folder for folder in found if (folder / "trainer_state.json").is_file()]  # the file written last
        if not whole:
            stop(f"there is no whole checkpoint in {output_dir if newest else resume} to go on from")
        checkpoint = max(whole, key=lambda folder: int(folder.name.split("-")[-1])) if newest else whole[0]
        if (marker := checkpoint.parent / "run.json").is_file() and json.loads(marker.read_text()) != owner:
            stop(f"{checkpoint} belongs to another run, of {json.loads(marker.read_text())['script']}.py")
        if files and checkpoint.resolve().parent != output_dir.resolve():
            stop(f"{output_dir} holds another run, which this one would replace: give a new --output_dir")
        return checkpoint
    if Path(model_args.model_name_or_path).resolve() == output_dir.resolve():
        stop(f"{output_dir} holds the model to begin with, and this run would replace it: give a new --output_dir")
    marker = output_dir / "run.json"
    mine = marker.is_file() and json.loads(marker.read_text()) == owner
    if files and not (mine and (toy or files <= {"run.json", "runs"})):  # a toy run may replace its predecessor
        go_on = RESUMES and any(name.startswith("checkpoint-") for name in files)
        stop(
            f"{output_dir} holds another run. Give a new --output_dir"
            + (", or go on with that run: --resume_from_checkpoint true" if go_on else "")
        )
    return None


def start(output_dir: Path, toy: bool, resume: Path | None) -> None:
    """Clears away an earlier toy run, and says whose folder this is from now on."""
    if toy and not resume:
        shutil.rmtree(output_dir)
        output_dir.mkdir()
    (output_dir / "run.json").write_text(json.dumps({"script": SCRIPT, "toy": toy}))


def save(trainer, output_dir: Path) -> None:
    """Writes the model beside its place and moves it there when it is whole: a full disk leaves no half of a model."""
    unfinished, main_process = output_dir / "unfinished", trainer.accelerator.is_main_process
    push, trainer.args.push_to_hub = trainer.args.push_to_hub, False  # or save_model uploads the unfinished folder
    try:
        trainer.save_model(str(unfinished))  # in every process: each may hold a part of the weights
        for path in unfinished.iterdir() if main_process else ():
            path.replace(output_dir / path.name)
    finally:
        trainer.args.push_to_hub = push
        if main_process:
            shutil.rmtree(unfinished, ignore_errors=True)


def main() -> None:
    toy, script_args, training_args, model_args, mixture_args = parse(sys.argv[1:])
    resume = check_folder(toy, training_args, model_args)
    output_dir = Path(training_args.output_dir)

    # Data
    dataset = load_data(script_args, mixture_args)
    train_dataset = load_split(dataset, script_args.dataset_train_split)
    eval_dataset = None
    if toy or training_args.eval_strategy != "no":
        eval_dataset = load_split(dataset, script_args.dataset_test_split)
    rows = list(islice(eval_dataset or (), 2))
    tokenizer = load_tokenizer(script_args, training_args, model_args, next(iter(train_dataset)))

    # Model and trainer
    trainer = build(script_args, training_args, model_args, train_dataset, eval_dataset, tokenizer)
    say = trainer.accelerator.print
    show_row(trainer)

    # Train, with a look at the held-out data before and after
    before, samples_before = held_out(trainer, rows, toy)
    if trainer.accelerator.is_main_process:
        start(output_dir, toy, resume)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.num_processes > 1:
        # evaluate() marks the model as prepared; train() would not wrap it, and each process train a model of its own
        trainer.model._is_accelerate_prepared = False
    started = time.perf_counter()
    trainer.train(**({"resume_from_checkpoint": str(resume)} if resume else {}))
    seconds = time.perf_counter() - started
    save(trainer, output_dir)  # before the second look: whatever that meets, the model is safe
    after, samples_after = held_out(trainer, rows, toy)

    # Report
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        result = {"seconds": seconds, "before": before, "after": after}
        (output_dir / "held_out.json").write_text(json.dumps(result, indent=2))
    say(f"\n{seconds:.0f} s of training. Held out:")
    for name in [name for name in before if name in after]:
        say(f"  {name:20}{before[name]:.3f} -> {after[name]:.3f}")
    for (prompt, old), (_, new) in zip(samples_before, samples_after, strict=True):
        say(f"\n  {prompt}\n    before: {old}\n    after:  {new}")
    if training_args.push_to_hub:  # the model card names data sets of the hub: it refuses the path of a folder
        on_hub = not mixture_args.datasets and not Path(script_args.dataset_name).exists()
        trainer.push_to_hub(dataset_name=script_args.dataset_name if on_hub else None)
    say(f"\nThe model is in {output_dir}.")


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"{error}\n{Path(__file__).name}: the memory of the GPU is full. What helps: --gradient_checkpointing true; a "
            "smaller --per_device_train_batch_size, with as much more --gradient_accumulation_steps; shorter rows; "
            "--use_peft. All of it together: annotated_examples/recipes, for cards with 24 GB"
        ) from error
