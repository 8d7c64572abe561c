# The walkthrough of TRL's implementation: annotated_trainers/grpo.md
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
"""Group Relative Policy Optimization (GRPO): sample a group of answers to each prompt, make the better ones more likely.

The loss of one token; all tokens of an answer share its advantage (Shao et al. 2024, arXiv 2402.03300, eq. 3). TRL takes the
mean over all tokens of a batch (Yu et al. 2025, arXiv 2503.14476, section 3.3):

    advantage = (reward - mean of the group's rewards) / standard deviation of the group's rewards
    ratio     = p(token) / p(token) at the time of sampling
    loss      = -min(ratio * advantage, clip(ratio, 1 - 0.2, 1 + 0.2) * advantage)

One row of data (only the prompt is needed; every other column reaches the reward functions under its name):

    {"prompt": [{"role": "user", "content": "7+9+3"}], "answer": "19"}

Run it:

    python grpo.py                                               # the toy world, no network, no GPU needed
    python grpo.py --model_name_or_path Qwen/Qwen3-0.6B          # a real model on a GPU; with --use_vllm it samples faster
    python grpo.py --model_name_or_path ... --dataset_name ...   # your model, your data
    python grpo.py ... --reward_funcs exact_answer brevity --reward_weights 1 0.1
    python grpo.py ... --reward_funcs my_module.my_function      # yours, from a file my_module.py beside you
    python grpo.py ... --reward_model_name_or_path ...           # a sequence classifier with one output, as reward.py makes it
    accelerate launch grpo.py --model_name_or_path ... --use_peft --load_in_4bit --learning_rate 1e-5

What to look at: reward rises, and frac_reward_zero_std with it: the share of prompts whose answers all earn the same, from
which nothing is learned. The loss says nothing. It starts at about 0 and stays there, since every ratio is 1 while a round
feeds one step, and the advantages of a group add up to 0. Only its gradient is not 0.
"""

import asyncio
import importlib
import inspect
import json
import math
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
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from packaging.version import Version
from torch.random import fork_rng
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import is_torch_bf16_gpu_available
from transformers.utils.peft_utils import find_adapter_config_file


def stop(message: str) -> None:
    """Ends the run with a message for the user. Nothing has been trained or overwritten yet."""
    raise SystemExit(f"{Path(__file__).name}: {message}")


if Version(version("trl")) < Version("1.12.0"):
    stop(f"this script needs trl 1.12.0 or newer, and trl {version('trl')} is installed: pip install 'trl==1.12.0'")
from trl import (
    DatasetMixtureConfig,
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
    is_conversational,
)
from trl.models.utils import unwrap_model_for_generation

# ---------------------------------------------------------------------------------------------------------- settings
# TRL's defaults hold unless a line below changes them; a flag or a line of the YAML file behind --config overrides both.


@dataclass
class Arguments(ScriptArguments):
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "exact_answer (default), answer_format, brevity, or dotted paths like my_module.my_function"},
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "sequence classifier with one output that scores answers"}
    )
    eval_rows: int = field(default=128, metadata={"help": "held-out rows that an evaluation samples answers to"})
    pad_token: str | None = field(
        default=None, metadata={"help": "token that fills up short rows; must differ from the end token"}
    )

    def __post_init__(self):
        if self.dataset_name == "openai/gsm8k" and self.dataset_config is None:
            self.dataset_config = "main"  # it has two, and load_dataset wants to be told which


SCRIPT = "grpo"
FLAGS = (Arguments, GRPOConfig, ModelConfig, DatasetMixtureConfig)  # each of their fields is a flag
COLUMNS = ({"prompt"}, {"question", "answer"})  # a row needs one of these sets; more columns do no harm
RESUMES = True  # an interrupted run can go on from its last checkpoint
WORLD = Path(__file__).resolve().parent / "toy"

TOY = {
    "model_name_or_path": str(WORLD / "policy"),  # 0.9M parameters: adds well, slips often (toy/README.md)
    "dataset_name": str(WORLD / "data" / "prompt_only"),  # sums that it has never seen, with their results
    "output_dir": "outputs/grpo-toy",
    "learning_rate": 3e-4,  # at 1e-3 it ends lower (README.md)
    "per_device_train_batch_size": 64,  # answers, not prompts: 8 prompts for each step
    "num_generations": 8,  # answers for each prompt
    "max_steps": 40,
    "logging_steps": 4,
    "max_completion_length": 48,  # tokens; the longest answer has fewer
    "disable_dropout": True,  # matters with an adapter, see below
    "gradient_checkpointing": False,  # would save memory that the toy does not need
    "bf16": False,  # float32 on every device, so that the figures can be compared
    "save_strategy": "no",  # the run is short; the model is saved at its end
}

# For Qwen3-0.6B on one GPU with 80 GB; for one with 24 GB there is recipes/full_24gb.yaml
REAL = {
    "dataset_name": "openai/gsm8k",  # 7473 word problems whose results are numbers, which exact_answer can check. Those of
    # trl-lib/DeepMath-103K are formulas (--reward_funcs trl.rewards.accuracy_reward checks them, with math-verify
    # installed), and hard: where all answers of a group are wrong, nothing is learned
    # Qwen3 would think first, for longer than max_completion_length; templates without this switch ignore it
    "chat_template_kwargs": {"enable_thinking": False},
    "learning_rate": 1e-6,  # TRL's default, for full fine-tuning; ten times more with --use_peft
    "max_completion_length": 512,  # TRL's default: enough to work out a problem of GSM8K without thinking. Look at
    # completions/clipped_ratio: an answer that is cut has no result, and earns nothing however good it was
    "mask_truncated_completions": True,  # so their tokens carry no loss; their 0 still counts in the mean
    "num_generations": 8,  # answers for each prompt, TRL's default; with fewer, more groups are all right or all wrong
    "per_device_train_batch_size": 8,  # answers at once; the memory goes into logits: answers * tokens * vocabulary
    "gradient_accumulation_steps": 8,  # 64 answers, 8 prompts for each step. All 64 are sampled at once and used once:
    # steps_per_generation follows this number. A larger one would take several steps on the same answers, and only then the
    # ratio leaves 1 and the clipping has something to do
    "gradient_checkpointing": False,  # with it, TRL's default, every layer is computed twice to save memory
    "loss_type": "dapo",  # TRL's default: each token counts the same. "grpo" divides by the length of each answer, so that
    # a long wrong answer costs less per token than a short one; "dr_grpo" divides by max_completion_length
    "scale_rewards": "group",  # TRL's default: divides by the group's standard deviation, so that the rare success on a
    # hard problem weighs more. "none" leaves that out, "batch" divides by one number for all
    "disable_dropout": True,  # an adapter has dropout (0.05 with --use_peft), and TRL samples and scores with it on
    "num_train_epochs": 1,  # so every reward in the log is measured on problems that it has not been trained on
    "warmup_steps": 0.05,  # a share of all steps
    "lr_scheduler_type": "constant_with_warmup",
    "eval_strategy": "steps",
    "eval_steps": 100,
    "num_generations_eval": 1,  # eval_rows problems with one answer measure more than a few problems with many
    "per_device_eval_batch_size": 16,  # answers at once, with the logits of all of them
    "save_steps": 100,
    "bf16": is_torch_bf16_gpu_available(),  # TRL turns bf16 on by itself, which stops on a machine without such a GPU
}


# ---------------------------------------------------------------------------------------------------- model and trainer


def text_of(completion) -> str:
    """A completion is text where the prompt is, and a list with one message where the prompt is a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def number_in(text: str) -> float | None:
    """The number behind the last #: 19.0 for "7+9=16 16+3=19 #19", 1234.0 for "#### 1,234"."""
    found = re.findall(r"#\s*\$?(-?[\d,]*\.?\d+)(?![.,]?\d|[/^\\])", text)
    return float(found[-1].replace(",", "")) if found else None


# A reward function gets everything by name: prompts, completions, completion_ids, and each further column of the data
# set, all as lists with one entry for each answer. It returns such a list. None means: not for me to judge.


def exact_answer(completions, answer, **others) -> list[float | None]:
    """1 where the number behind the last # is that of the column `answer`, else 0; None where the column holds no number."""
    truths = [number_in(f"#{truth}") for truth in answer]
    return [
        None if truth is None else float(number_in(text_of(completion)) == truth)
        for completion, truth in zip(completions, truths, strict=True)
    ]


def answer_format(completions, **others) -> list[float]:
    """1 where the answer ends with # and a number, right or wrong."""
    return [float(bool(re.search(r"#\s*\$?-?[\d,]*\.?\d+\s*$", text_of(completion)))) for completion in completions]


def brevity(completion_ids, **others) -> list[float]:
    """Minus one for each thousand tokens: of two answers that are equally right or wrong, the shorter one is better."""
    return [-len(ids) / 1000 for ids in completion_ids]


REWARDS = {function.__name__: function for function in (exact_answer, answer_format, brevity)}


def reward_functions(script_args, columns: set[str]) -> list:
    """The functions behind --reward_funcs, if they can be called with the columns of this data set."""
    names = script_args.reward_funcs
    if names is None:
        names = [] if script_args.reward_model_name_or_path else ["exact_answer"]
    given = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    given |= columns - {"prompt", "completion"}
    if taken := columns & {"prompts", "completions"}:
        stop(f"TRL passes {' and '.join(sorted(taken))} itself: rename or remove such columns of the data set")
    functions = []
    sys.path.insert(0, str(Path.cwd()))  # where my_module.py is
    for name in names:
        module, _, attribute = name.rpartition(".")
        if module:
            try:
                function = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                stop(f"cannot import the reward function {name!r}: {error}")
        elif name in REWARDS:
            function = REWARDS[name]
        else:
            stop(
                f"--reward_funcs {name!r} is neither one of {sorted(REWARDS)} nor a dotted path: my_module.my_function"
            )
        try:
            inspect.signature(function).bind(**dict.fromkeys(given))
        except TypeError as error:
            stop(
                f"the reward function {name!r} gets {sorted(given)}: {error}. Rename your columns, choose others with "
                "--reward_funcs or a model with --reward_model_name_or_path; let a function take the rest as **others"
            )
        functions.append(function)
    return functions


def reward_model(script_args, training_args, model_args):
    """A sequence classifier with one output. TRL would load it too, but with the policy's --model_revision."""
    name = script_args.reward_model_name_or_path
    refuse_adapter(name)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=model_args.dtype,
            trust_remote_code=training_args.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        stop(f"cannot load the reward model {name!r}: {str(error).splitlines()[0]}")
    if model.config.num_labels != 1 or report["missing_keys"]:
        stop(
            f"{name!r} is no reward model, which has one trained output and can be made with reward.py: this one has "
            f"{model.config.num_labels}, and the weights that it lacks are {sorted(report['missing_keys'])}"
        )
    return model


def as_prompt(row: dict) -> dict:
    """The prompt for a row of GSM8K. Its answers end with "#### 72", so that is what the model is asked for."""
    request = "Think step by step. Write the result as a number in the last line, behind ####, like this: #### 42"
    return {"prompt": [{"role": "user", "content": f"{row['question']}\n\n{request}"}]}


def build(script_args, training_args, model_args, train_dataset, eval_dataset, tokenizer):
    """The policy that is trained, and what rewards its answers. There is no reference model, since beta is 0.0.

    A reward that can be checked needs nothing that holds the policy back; with a reward model, which can be fooled, give
    --beta 0.04, and the trainer loads the same weights again; with --use_peft it switches the adapter off instead.
    """
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    if eval_dataset is not None:
        most = script_args.eval_rows  # a stream does not know how many rows it has, and an older datasets takes no more
        eval_dataset = eval_dataset.take(min(most, getattr(eval_dataset, "num_rows", most)))
    if "prompt" not in next(iter(train_dataset)):
        train_dataset = train_dataset.map(as_prompt, remove_columns="question")
        eval_dataset = eval_dataset and eval_dataset.map(as_prompt, remove_columns="question")
    first_row = next(iter(train_dataset))
    if is_conversational({"prompt": first_row["prompt"]}) and tokenizer.chat_template is None:
        stop("the prompts are conversations, and the tokenizer has no chat template: take an instruct model")
    prompts = training_args.generation_batch_size // training_args.num_generations
    if hasattr(train_dataset, "__len__") and len(train_dataset) < prompts:
        stop(
            f"each step takes {prompts} prompts, and the data set has {len(train_dataset)}. TRL drops what fills no step, "
            "which is all of it: give a smaller --per_device_train_batch_size or --gradient_accumulation_steps"
        )
    functions = reward_functions(script_args, set(first_row))
    if script_args.reward_model_name_or_path:
        functions.append(reward_model(script_args, training_args, model_args))
        reader = AutoTokenizer.from_pretrained(script_args.reward_model_name_or_path)
        if is_conversational({"prompt": first_row["prompt"]}) and reader.chat_template is None:
            stop(
                "the prompts are conversations, and the reward model's tokenizer has no chat template: take another one"
            )
    set_seed(training_args.seed)  # an adapter starts from random numbers
    return GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=functions,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def show_row(trainer) -> None:
    """Prints one row, an answer to it and what its group earns, after a look at the answers to the first four prompts.

    That costs about as much as sampling for one step, and shows what would otherwise show after hours: answers that are all
    cut before their end, and reward functions that score nothing.
    """
    say, args, tokenizer = trainer.accelerator.print, trainer.args, trainer.processing_class
    rows = [row for row in islice(trainer.train_dataset, 4) for _ in range(args.num_generations)]
    prompts = [prompt_ids(row, trainer) for row in rows]
    gpus = [args.device] if args.device.type == "cuda" else []
    with (
        fork_rng(gpus),
        torch.no_grad(),
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
    ):
        torch.manual_seed(args.seed)
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        drawing = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
        output = model.eval().generate(**batch, **drawing, max_new_tokens=args.max_completion_length)
    answers, cut = output[:, batch["input_ids"].shape[1] :].tolist(), 0
    for index, answer in enumerate(answers):
        if tokenizer.eos_token_id in answer:
            answers[index] = answer[: answer.index(tokenizer.eos_token_id) + 1]
        else:
            cut += 1
    if cut == len(answers):
        stop(
            f"none of {cut} answers has {tokenizer.eos_token!r} within max_completion_length={args.max_completion_length} "
            "tokens, and TRL knows no other end: give a larger --max_completion_length, or a tokenizer whose eos_token ends a "
            "turn"
        )
    if cut:
        say(f"{cut} of {len(answers)} sampled answers were cut at {args.max_completion_length} tokens.\n")
    rewards = look_at_rewards(trainer, rows, answers)
    say(f"{'prompt_ids':16}{tokenizer.decode(prompts[0])}")
    for column in sorted(set(rows[0]) - {"prompt"}):  # for the reward functions; the model does not see it
        say(f"{column:16}{rows[0][column]}")
    say(f"{'completion_ids':16}{tokenizer.decode(answers[0])}")  # only these tokens carry loss
    for name, values in rewards.items():  # the first one is that of the printed answer
        say(f"{name:16}{' '.join(str(value) for value in values[: args.num_generations])}")


def look_at_rewards(trainer, rows: list[dict], answers: list[list[int]]) -> dict[str, list[float | None]]:
    """What each reward function gives to these answers, called as the trainer calls it."""
    texts = trainer.processing_class.batch_decode(answers, skip_special_tokens=True)
    chat = is_conversational({"prompt": rows[0]["prompt"]})
    columns = {
        name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion", "completion_ids")
    }
    columns |= {"trainer_state": trainer.state, "log_extra": lambda *_, **__: None, "log_metric": lambda *_, **__: None}
    rewards = {}
    for name, function in zip(trainer.reward_func_names, trainer.reward_funcs, strict=True):
        if isinstance(function, torch.nn.Module):
            continue
        values = function(
            prompts=[row["prompt"] for row in rows],
            completions=[[{"role": "assistant", "content": text}] if chat else text for text in texts],
            completion_ids=answers,
            **columns,
        )
        try:
            values = asyncio.run(values) if inspect.iscoroutine(values) else values
            rewards[name] = values = [None if value is None else float(value) for value in values]
        except (TypeError, ValueError) as error:
            stop(f"the reward function {name!r} has to return a list with a number or None for each answer: {error}")
        if len(values) != len(rows):
            stop(
                f"the reward function {name!r} returned {len(values)} values for {len(rows)} answers: one is due for each"
            )
        if any(value is not None and not math.isfinite(value) for value in values):
            stop(
                f"the reward function {name!r} returned NaN or an infinite number. TRL would take NaN for None, which means "
                "that this function does not judge the answer, and learn nothing from a group with an infinite one: return "
                "a number, or None where you mean it"
            )
    if len(rewards) == len(trainer.reward_funcs) and all(set(values) == {None} for values in rewards.values()):
        stop(
            f"no reward function scored any of {len(rows)} sampled answers, all returned None. None is for answers that "
            "another function scores; for exact_answer, the column answer must hold numbers"
        )
    return rewards


# ----------------------------------------------------------------------------------------------------------- held out

FIGURES = ("reward",)  # what the evaluation logs that is worth a line here


def prompt_ids(row: dict, trainer) -> list[int]:
    """The tokens of a row up to the point where the answer begins, as in training."""
    prompt = (row if "prompt" in row else as_prompt(row))["prompt"]
    if isinstance(prompt, str):
        return trainer.processing_class(prompt)["input_ids"]
    return trainer.processing_class.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True, **(trainer.args.chat_template_kwargs or {})
    )["input_ids"]


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
    metrics = trainer.evaluate() if FIGURES and trainer.eval_dataset is not None and not toy else {}
    figures = {name: metrics[f"eval_{name}"] for name in FIGURES if metrics.get(f"eval_{name}") is not None}
    if toy:
        rows = list(load_dataset(str(WORLD / "data" / "prompt_only"), split="test"))
    if not rows:
        return figures, []
    prompts = [prompt_ids(row, trainer) for row in rows]
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
