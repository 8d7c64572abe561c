# The walkthrough of TRL's implementation: annotated_trainers/nash_md.md
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
"""Nash Mirror Descent (Nash-MD): let each sampled answer compete with a more cautious one, make it more likely if it wins.

The rival samples every token from a mixture of policy and reference: mixture_coef times the logits of the reference, plus the
rest of the policy's. A reward model says how likely the policy's answer is the better one. The loss of one answer (Munos et
al. 2023, arXiv 2312.00886, the algorithm Nash-MD-PG), with the factors in brackets taken as numbers, without gradient:

    P    = sigmoid(score(answer) - score(rival's answer))
    loss = -[P - 1/2] * logp(answer) + beta * sum over its tokens of [logp(token) - ref_logp(token)] * logp(token)

The judge is a reward model that reads the policy's tokens, and nothing else can be: for functions there is online_dpo.py.

One row of data, which has no answer, since the models write their own:

    {"prompt": [{"role": "user", "content": "7+9+3"}]}

Run it:

    python nash_md.py                                               # the toy world, no network, no GPU needed
    python nash_md.py --reward_model_path outputs/reward-toy        # a reward model that reward.py has written
    python nash_md.py --model_name_or_path Qwen/Qwen3-0.6B --reward_model_path Skywork/Skywork-Reward-V2-Qwen3-0.6B
    python nash_md.py ... --dataset_name ...                        # your data
    accelerate launch nash_md.py ... --use_peft --load_in_4bit --learning_rate 5e-6

What to look at: rewards/chosen rises, the mean score of the policy's answers; rewards/rejected is that of the rival's, and
rewards/probabilities (P) stays around 1/2, since the rival learns too. Two names mislead: logps/rejected is the reference's
log-probability of the policy's answer, and rewards/margins is made of log-probabilities.
"""

import json
import re
import shutil
import sys
import tempfile
import time
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
from torch.random import fork_rng
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import is_torch_bf16_gpu_available
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
    maybe_apply_chat_template,
)
from trl.experimental.online_dpo import OnlineDPOTrainer
from trl.models.utils import unwrap_model_for_generation

try:
    from trl.experimental.nash_md import NashMDConfig, NashMDTrainer
except ImportError:
    stop(
        f"NashMDTrainer was removed in TRL 1.14, and trl {version('trl')} is installed. Run `uv run {Path(__file__).name}`, "
        "which takes the release that this script names, or pip install 'trl==1.12.0'. It has no successor in TRL; the "
        "nearest method there is Online DPO: online_dpo.py"
    )

# ---------------------------------------------------------------------------------------------------------- settings
# TRL's defaults hold unless a line below changes them; a flag or a line of the YAML file behind --config overrides both.


@dataclass
class Arguments(ScriptArguments):
    pad_token: str | None = field(
        default=None, metadata={"help": "token that fills up short rows; must differ from the end token"}
    )


SCRIPT = "nash_md"
FLAGS = (Arguments, NashMDConfig, ModelConfig, DatasetMixtureConfig)  # each of their fields is a flag
COLUMNS = ({"prompt"},)  # a row needs one of these sets; more columns do no harm
RESUMES = True  # an interrupted run can go on from its last checkpoint
WORLD = Path(__file__).resolve().parent / "toy"

TOY = {
    "model_name_or_path": str(WORLD / "policy"),  # 0.9M parameters: adds well, slips often (toy/README.md)
    "reward_model_path": str(WORLD / "reward_model"),  # gives a right answer about 6 and a wrong one about -8
    "dataset_name": str(WORLD / "data" / "prompt_only"),  # sums that it has never seen
    "output_dir": "outputs/nash_md-toy",
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 32,  # prompts; a policy's answer and a rival's to each
    "max_steps": 24,
    "logging_steps": 2,
    "temperature": 1.0,  # learns what the held-out answers are sampled with; below it the slips are rare
    "max_new_tokens": 36,  # the longest right answer has 35; without a cache, each token costs all earlier ones again
    "max_length": 64,  # tokens of prompt and answer
    "gradient_checkpointing": False,  # would save memory that the toy does not need
    "bf16": False,  # float32 on every device, so that the figures can be compared
    "save_strategy": "no",  # the run is short; the model is saved at its end
}

# For Qwen3-0.6B on one GPU with 80 GB; for one with 24 GB there is recipes/full_24gb.yaml
REAL = {
    "reward_model_path": None,  # must be given
    "dataset_name": "trl-lib/ultrafeedback-prompt",
    "learning_rate": 5e-7,  # TRL's default, for full fine-tuning; ten times more with --use_peft
    "per_device_train_batch_size": 8,  # prompts. The memory goes into the logits of prompts and answers: 8 answers * 768
    # tokens * 152k words of Qwen3 * 4 bytes = 3.7 GB, several times over. Each batch is sampled by itself: 4
    # batches of 8 prompts take a quarter of the passes of 16 batches of 2
    "gradient_accumulation_steps": 4,  # 32 prompts for each step of the optimizer
    "gradient_checkpointing": False,  # with it, TRL's default, every layer is computed twice to save memory
    "max_new_tokens": 256,  # at TRL's 64 nearly every answer is cut, and the reward model compares beginnings. Look at
    # val/model_contain_eos_token, the share of the policy's answers that came to their end
    "max_length": 768,  # tokens of prompt and answer: 512 for the prompt; rows with longer ones are left out
    "num_train_epochs": 1,  # so that every prompt is new
    "warmup_steps": 0.1,  # a share of all steps
    "lr_scheduler_type": "cosine",
    "eval_strategy": "steps",  # NashMDTrainer cannot evaluate; this loads the prompts for the samples before and after
    "bf16": is_torch_bf16_gpu_available(),  # TRL turns bf16 on by itself, which stops on a machine without such a GPU
}


# ---------------------------------------------------------------------------------------------------- model and trainer


def check_flags(training_args, model_args) -> None:
    """Stops at flags with which NashMDTrainer would break off later, or train something else than was meant."""
    if training_args.reward_model_path is None:
        stop(
            "nothing says which of two answers is the better one: give --reward_model_path, for example "
            "Skywork/Skywork-Reward-V2-Qwen3-0.6B for a Qwen3, or a folder that reward.py has written"
        )
    for name in ("beta", "mixture_coef"):
        if isinstance(getattr(training_args, name), list):
            stop(
                f"TRL breaks off at a list, one number an epoch (it takes element 0.03 of it): give one number to --{name}"
            )
    if training_args.loss_type != "sigmoid":
        stop("NashMDTrainer has one loss of its own and does not read --loss_type: leave it out")
    if training_args.use_vllm:
        stop("NashMDTrainer samples with transformers and breaks off with --use_vllm: leave it out")
    if training_args.max_length <= training_args.max_new_tokens:
        stop(
            f"max_length={training_args.max_length} counts prompt and answer, and max_new_tokens="
            f"{training_args.max_new_tokens} leaves nothing of it for the prompt: give a larger --max_length"
        )
    if training_args.reward_model_path:
        refuse_adapter(training_args.reward_model_path)


def short_prompts(dataset, tokenizer, training_args):
    """The rows whose prompt leaves room for an answer. TRL samples from longer prompts whole, whatever max_length says."""
    limit = training_args.max_length - training_args.max_new_tokens
    with PartialState().main_process_first():
        short = dataset.filter(lambda row: len(prompt_ids(row, tokenizer)) <= limit)
    if next(iter(short), None) is None:
        stop(
            f"no prompt has at most {limit} tokens, which is what --max_length leaves beside --max_new_tokens: give a "
            "larger --max_length"
        )
    if hasattr(dataset, "__len__") and len(short) < len(dataset):
        PartialState().print(
            f"{len(dataset) - len(short)} of {len(dataset)} prompts have more than {limit} tokens and are left out.\n"
        )
    return short


def load_policy(training_args, model_args):
    """The policy. Given a name, TRL would load it with device_map="auto", which does not go with several processes."""
    quantization = get_quantization_config(model_args)
    loading = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": quantization,
        "device_map": {"": PartialState().local_process_index} if quantization else None,
        "trust_remote_code": training_args.trust_remote_code,
    } | (training_args.model_init_kwargs or {})
    return AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **loading)


def load_reward_model(training_args, model_args, tokenizer):
    """The reward model, if it is one and can read what the policy writes: NashMDTrainer gives it the policy's token ids."""
    name, trust = training_args.reward_model_path, training_args.trust_remote_code
    try:
        vocabulary = AutoTokenizer.from_pretrained(name, trust_remote_code=trust).get_vocab()
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=trust,
            output_loading_info=True,
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
    """The policy that is trained, the reference that its rival is mixed with, and the reward model that compares the two.

    Without ref_model the trainer copies the policy. With an adapter (--use_peft) it would mix the policy with itself,
    the adapter being on in both, so it gets a reference of its own.
    """
    check_flags(training_args, model_args)

    # Data
    # TRL renders the whole row, and stops at columns like messages
    train_dataset = train_dataset.select_columns(["prompt"])
    if "enable_thinking" in (tokenizer.chat_template or ""):  # Qwen3 thinks for longer than max_new_tokens
        tokenizer.chat_template = "{% set enable_thinking = false %}" + tokenizer.chat_template
    train_dataset = short_prompts(train_dataset, tokenizer, training_args)
    training_args.eval_strategy = "no"  # the trainer's evaluation stops with an error; main() has its prompts already
    # With a stream, accelerate would send each process its batches, and can send tensors only
    training_args.accelerator_config.dispatch_batches = False
    ended = (tokenizer.eos_token_id in prompt_ids(row, tokenizer) for row in islice(train_dataset, 1000))
    if training_args.missing_eos_penalty and any(ended):
        stop(
            "no answer would pay --missing_eos_penalty: TRL looks for the end token in prompt and answer together, and the "
            "prompts hold it already. Leave it out, or look at online_dpo.py"
        )

    # Models
    reward_model = load_reward_model(training_args, model_args, tokenizer)
    policy = load_policy(training_args, model_args)
    reference = load_policy(training_args, model_args) if model_args.use_peft else None
    training_args.model_init_kwargs = None  # the trainer refuses them beside a model
    # With a cache, both models of the mixture write into the same one, and the rival says nothing but noise
    training_args.generation_kwargs = (training_args.generation_kwargs or {}) | {"use_cache": False}
    set_seed(training_args.seed)  # an adapter starts from random numbers
    trainer = NashMDTrainer(
        model=policy,
        ref_model=reference,
        reward_funcs=reward_model,
        args=training_args,
        train_dataset=train_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    # TRL divides the logged loss by this number, and not the gradient: without it, --max_grad_norm would clip sums
    trainer.accelerator.gradient_accumulation_steps = training_args.gradient_accumulation_steps
    return trainer


def sample_pairs(trainer, rows: list[dict]) -> tuple[list[list[int]], list[list[int]]]:
    """First answers and second answers to these rows, as token ids, with training's temperature, top_p and top_k."""
    args, tokenizer = trainer.args, trainer.processing_class
    prompts = 2 * [prompt_ids(row, tokenizer) for row in rows]
    gpus = [args.device] if args.device.type == "cuda" else []
    with (
        fork_rng(gpus),
        torch.no_grad(),
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
    ):
        torch.manual_seed(args.seed)
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        drawing = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
        output = model.eval().generate(**batch, **drawing, max_new_tokens=args.max_new_tokens)
    answers, cut = output[:, batch["input_ids"].shape[1] :].tolist(), 0
    for index, answer in enumerate(answers):
        if tokenizer.eos_token_id in answer:
            answers[index] = answer[: answer.index(tokenizer.eos_token_id) + 1]
        else:
            cut += 1
    if cut == len(answers):
        stop(
            f"none of {cut} answers has {tokenizer.eos_token!r} within max_new_tokens={args.max_new_tokens} tokens, and TRL knows "
            "no other end: give a larger --max_new_tokens, or a model whose tokenizer has the end of a turn as its eos_token"
        )
    if cut:
        trainer.accelerator.print(
            f"{cut} of {len(answers)} sampled answers were cut at {args.max_new_tokens} tokens.\n"
        )
    return answers[: len(rows)], answers[len(rows) :]


def show_row(trainer) -> None:
    """Prints one answer with its rival as training will see them: of the first eight, the two whose scores lie furthest apart.

    The rival is a mixture of the policy and the reference, which are still the same model here.
    """
    say, tokenizer = trainer.accelerator.print, trainer.processing_class
    rows = list(islice(trainer.train_dataset, 8))
    pairs = []
    for row, answer, rival in zip(rows, *sample_pairs(trainer, rows), strict=True):
        pairs.append((row, answer, rival, score(trainer, row, answer), score(trainer, row, rival)))
    row, answer, rival, points, others = max(pairs, key=lambda pair: abs(pair[3] - pair[4]))
    say(f"{'prompt_ids':12}{tokenizer.decode(prompt_ids(row, tokenizer))}")
    say(f"{'answer':12}{tokenizer.decode(answer)}")  # only its tokens carry loss
    say(f"{'':12}score {points:.2f}")
    say(f"{'rival':12}{tokenizer.decode(rival)}")
    say(f"{'':12}score {others:.2f}")
    say(f"{'P':12}{torch.tensor(points - others).sigmoid():.3f}")


@torch.no_grad()
def score(trainer, row: dict, answer: list[int]) -> float:
    """What the reward model gives to an answer. It reads the tokens that the policy has written."""
    ids = prompt_ids(row, trainer.processing_class) + answer
    return trainer.reward_funcs(torch.tensor([ids], device=trainer.args.device)).logits.item()


# ----------------------------------------------------------------------------------------------------------- held out

FIGURES = ()  # NashMDTrainer cannot evaluate


def prompt_ids(row: dict, tokenizer) -> list[int]:
    """The tokens of a row up to the point where the answer begins, as in training: a BOS is always there, if there is one."""
    text = maybe_apply_chat_template({"prompt": row["prompt"]}, tokenizer)
    return OnlineDPOTrainer.tokenize_row(text, False, tokenizer)["prompt_input_ids"]


@torch.no_grad()
def sample(trainer, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """One answer for each prompt (token ids), sampled at temperature 1. Training draws as if nobody had looked."""
    tokenizer, gpus = trainer.processing_class, [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with fork_rng(gpus), unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        torch.manual_seed(trainer.args.seed)
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        drawing = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        output = model.eval().generate(**batch, **drawing, max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


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
