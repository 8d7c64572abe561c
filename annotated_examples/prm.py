# The walkthrough of TRL's implementation: annotated_trainers/prm.md
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
"""Process reward model (PRM): say after each step of an answer whether the step is right.

The loss of one step; that of a batch is the mean over all its steps (Wang et al. 2024, arXiv 2312.08935, eq. 2, has a sum;
the idea: Uesato et al. 2022, arXiv 2211.14275); p is the softmax of the two numbers that the model gives after the step:

    loss = -log p(label of the step)

One row of data (all is text: TRL applies no chat template, and puts nothing between the prompt and the first step; completions
are the steps, and labels says for each of them whether it is right):

    {"prompt":      "<|user|>7+9+3<|end|><|assistant|>",
     "completions": ["7+9=16", "16+3=20", "#20"],
     "labels":      [true, false, false]}

Run it (TRL 1.14 removed this trainer: beside a newer TRL, `uv run prm.py` runs with the release named above):

    python prm.py                                               # the toy world, no network, no GPU needed
    python prm.py --model_name_or_path Qwen/Qwen3-0.6B          # a real model on a GPU
    python prm.py --model_name_or_path ... --dataset_name ...   # your model, your data
    accelerate launch prm.py --model_name_or_path ... --use_peft --load_in_4bit --learning_rate 1e-4

What to look at: the loss falls, and "first error found" rises: the share of answers in which the model finds the first wrong
step, or finds that there is none. On the held-out answers of the toy world, saying "right" everywhere already gives 0.78 of
the steps and 0.70 of the answers.
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
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from packaging.version import Version
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, set_seed
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
)

try:
    from trl.experimental.prm import PRMConfig, PRMTrainer
except ImportError:
    stop(
        f"PRMTrainer was removed in TRL 1.14, and trl {version('trl')} is installed. Run `uv run {Path(__file__).name}`, "
        "which takes the release that this script names, or pip install 'trl==1.12.0'. TRL has no successor for it"
    )

# ---------------------------------------------------------------------------------------------------------- settings
# TRL's defaults hold unless a line below changes them; a flag or a line of the YAML file behind --config overrides both.


@dataclass
class Arguments(ScriptArguments):
    pad_token: str | None = field(
        default=None,
        metadata={"help": "token that fills up short rows; must differ from the end token"},
    )
    new_layers: int = field(
        default=0,
        metadata={
            "help": "layers on top of those that the model has, from random numbers; 0 to go on with a model of this script"
        },
    )
    new_learning_rate: float | None = field(
        default=None,
        metadata={"help": "learning rate of the weights that start from random numbers, if it is another one"},
    )
    prompt_prefix: str | None = field(
        default=None,
        metadata={"help": "text before every second prompt; the model learns to judge with it and without it"},
    )


SCRIPT = "prm"
FLAGS = (Arguments, PRMConfig, ModelConfig, DatasetMixtureConfig)  # each of their fields is a flag
COLUMNS = ({"prompt", "completions", "labels"},)  # a row needs one of these sets; more columns do no harm
RESUMES = True  # an interrupted run can go on from its last checkpoint
WORLD = Path(__file__).resolve().parent / "toy"

TOY = {
    "model_name_or_path": str(WORLD / "policy"),  # 0.9M parameters: adds well, slips often (toy/README.md)
    "dataset_name": str(WORLD / "data" / "stepwise_supervision"),  # answers of this very policy, and the truth
    "output_dir": "outputs/prm-toy",
    "step_separator": " ",  # what stands between the steps in everything that the policy has read
    # This policy adds, and checks nothing. Without the next three settings a run of this length judges 0.84 of the steps
    # rightly, and "first error found" is 0.82 (README.md, on validation rows); to say "right" everywhere gives 0.74
    # and 0.65.
    "prompt_prefix": "<|system|>mark<|end|>",  # behind it the policy has read marked homework, and looks for wrong steps
    "new_layers": 1,  # a wrong step is seen in the last of its four layers; that later steps hear of it takes one more
    "new_learning_rate": 2e-3,  # for `score` and that layer, which start from random numbers and have a long way to go
    "learning_rate": 4e-4,  # for the others, which know something already
    "per_device_train_batch_size": 16,
    "max_steps": 400,
    "warmup_steps": 0.1,  # a share of all steps
    "adam_beta2": 0.98,  # a shorter memory of the gradients' size, as in the policy's pretraining: the run has few steps
    "logging_steps": 20,
    "max_length": 96,  # tokens of prompt and steps; the longest row has fewer
    "gradient_checkpointing": False,  # would save memory that the toy does not need
    "bf16": False,  # float32 on every device, so that the figures can be compared
    "save_strategy": "no",  # the run is short; the model is saved at its end
}

# For Qwen3-0.6B on one GPU with 80 GB; for one with 24 GB there is recipes/full_24gb.yaml
REAL = {
    "dataset_name": "trl-lib/math_shepherd",  # 420 000 answers; step_separator stays TRL's default, the end of a line
    "learning_rate": 1e-5,  # TRL's default, for full fine-tuning; take about ten times more with --use_peft
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "gradient_accumulation_steps": 4,  # 64 answers for each step of the optimizer
    "gradient_checkpointing": False,  # with it, TRL's default, every layer is computed twice to save memory
    "num_train_epochs": 1,
    "warmup_steps": 0.05,  # a share of all steps
    "lr_scheduler_type": "cosine",
    "eval_strategy": "steps",
    "eval_steps": 2000,  # seldom, as 22 000 answers are held out
    "bf16": is_torch_bf16_gpu_available(),  # TRL turns bf16 on by itself, which stops on a machine without such a GPU
}


# ---------------------------------------------------------------------------------------------------- model and trainer


def check_rows(dataset, split: str, training: bool = True) -> None:
    """Every step is text and needs a label. TRL's own errors do not say which row is to blame.

    A label of -100 takes its step out of the loss. Those of the training split must differ somewhere.
    """
    seen, index = set(), 0
    for part in dataset.select_columns(["prompt", "completions", "labels"]).iter(1000):
        for prompt, steps, labels in zip(part["prompt"], part["completions"], part["labels"], strict=True):
            if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels):
                stop(
                    f"each step needs a label, and row {index} of the split {split!r} has the completions {steps!r} and the "
                    f"labels {labels!r}"
                )
            if not all(isinstance(text, str) for text in (prompt, *steps)):
                other = next(text for text in (prompt, *steps) if not isinstance(text, str))
                stop(
                    f"prompt and steps are text, and row {index} of the split {split!r} has {other!r}: messages have to be "
                    "rendered with your chat template first"
                )
            wrong = [label for label in labels if label not in (True, False, -100)]
            if wrong:
                stop(f"a label is true or false, and row {index} of the split {split!r} has {wrong[0]!r}: map yours")
            seen.update(bool(label) for label in labels if label != -100)
            index += 1
    if len(seen) == 1 and training:
        stop(f"every label in the split {split!r} is {str(seen.pop()).lower()}, so there is nothing to tell apart")


def check_separator(tokenizer, separator: str) -> None:
    """The label of a step stands at the last token of the separator behind it."""
    if "\\" in separator:
        stop(
            f"the separator has a backslash in it: a shell writes the end of a line as --step_separator $'{separator}'"
        )
    ids = tokenizer(separator, add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.unk_token_id in ids:
        stop(
            f"to this tokenizer, step_separator={separator!r} is {'unknown' if ids else 'nothing at all'}, so the end of a "
            "step cannot be seen: give another one with --step_separator"
        )


def deeper(model_args, new_layers: int) -> dict:
    """What the model has to be told so that it gets new layers on top of its own."""
    if not new_layers:
        return {}
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    layers, kinds = config.num_hidden_layers, getattr(config, "layer_types", None)
    # An adapter leaves the weights as they are, which random ones must not be. Who loads it says how many layers there are.
    if model_args.use_peft:
        names = [f"layers.{layer}" for layer in range(layers, layers + new_layers)]
        model_args.lora_modules_to_save = [*(model_args.lora_modules_to_save or []), *names]
    size = {"num_hidden_layers": layers + new_layers}
    return size | ({"layer_types": [*kinds, *kinds[-1:] * new_layers]} if kinds else {})


def two_speeds(trainer, new_layers: int, rate: float) -> None:
    """Gives the weights that start from random numbers, `score` and the new layers, a learning rate of their own.

    Unlike Trainer's, this optimizer lets weight_decay (0 by default) work on norms and biases too.
    """
    layers = trainer.model.config.num_hidden_layers
    new = ("score.", *(f"layers.{layer}." for layer in range(layers - new_layers, layers)))
    fast, slow = [], []
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            (fast if any(part in name for part in new) else slow).append(weight)
    if not fast or (new_layers and not any("layers." in name for name, _ in trainer.model.named_parameters())):
        stop(
            "--new_learning_rate and --new_layers look for score and layers.N, and this model calls its parts otherwise"
        )
    optimizer, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    groups = [{"params": slow}, {"params": fast, "lr": rate}]
    trainer.optimizer = optimizer(groups, weight_decay=trainer.args.weight_decay, **settings)


def with_prefix(row: dict, index: int, prefix: str) -> dict:
    """Every second prompt begins with it, so the model knows what is meant and yet learns to do without."""
    return row if index % 2 else {"prompt": prefix + row["prompt"]}


def build(script_args, training_args, model_args, train_dataset, eval_dataset, tokenizer):
    """A language model whose last layer gives two numbers at each token instead of a word, and the trainer that holds it.

    The weights of these numbers, `score`, start from random ones.
    """
    if not isinstance(train_dataset, Dataset):
        stop("PRMTrainer tokenizes all rows before it starts and cannot stream them: leave out --dataset_streaming")
    check_rows(train_dataset, script_args.dataset_train_split)
    if eval_dataset is not None:
        check_rows(eval_dataset, script_args.dataset_test_split, training=False)
    check_separator(tokenizer, training_args.step_separator)
    if training_args.train_on_last_step_only:  # TRL stumbles over a row without a last step
        train_dataset = train_dataset.filter(lambda row: row["labels"])
        eval_dataset = eval_dataset and eval_dataset.filter(lambda row: row["labels"])
    if script_args.prompt_prefix:
        train_dataset = train_dataset.map(
            with_prefix, with_indices=True, fn_kwargs={"prefix": script_args.prompt_prefix}
        )
    set_seed(training_args.seed)  # `score` starts from random numbers
    quantization = get_quantization_config(model_args)
    model = AutoModelForTokenClassification.from_pretrained(
        model_args.model_name_or_path,
        id2label={0: "wrong", 1: "right"},
        label2id={"wrong": 0, "right": 1},
        ignore_mismatched_sizes=True,  # `score` of a model with another number of labels, a reward model, is replaced
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
        quantization_config=quantization,
        device_map={"": PartialState().local_process_index} if quantization else None,
        **deeper(model_args, script_args.new_layers),
    )
    model_args.lora_task_type = "TOKEN_CLS"  # trains and saves `score` too; TRL's default is for models that write
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        # `score` is trained whole; --lora_target_modules all-linear would wrap it a second time
        peft_config.exclude_modules = ["score"]
    trainer = PRMTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    # The model takes num_items_in_batch and does not use it: its loss is the mean of one small batch. Trainer believes it to
    # be a share of the whole step's mean, and would add up those of gradient_accumulation_steps and multiply them by the
    # number of processes.
    trainer.model_accepts_loss_kwargs = False
    trainer.train_dataset = with_labels(trainer, trainer.train_dataset)
    if eval_dataset is not None:
        trainer.eval_dataset = with_labels(trainer, trainer.eval_dataset)
    if script_args.new_learning_rate:
        two_speeds(trainer, script_args.new_layers, script_args.new_learning_rate)
    return trainer


def with_labels(trainer, rows):
    """The rows that keep a label within max_length. A batch of others has the mean of nothing, nan, for its loss.

    Such a step teaches nothing, Trainer's log shows 0 for it, and with an older transformers (5.10) one such batch turns the
    held-out loss into nan. Where only the last steps of a row are cut, the others are worth as much as before.
    """
    args = trainer.args
    limits = f"max_length={args.max_length} and max_completion_length={args.max_completion_length} tokens"
    kept = rows.filter(lambda row: any(label != -100 for label in row["labels"]))
    if not len(kept):
        stop(f"no row has a whole step within {limits}: give larger ones, or rows with steps")
    if len(kept) < len(rows):
        trainer.accelerator.print(
            f"{len(rows) - len(kept)} of {len(rows)} rows have no whole step within {limits} and are left out.\n"
        )
    return kept


def show_row(trainer) -> None:
    """Prints one row as the model sees it, and how many of the first thousand are cut within a step."""
    say, tokenizer = trainer.accelerator.print, trainer.processing_class
    rows = list(islice(trainer.train_dataset, 1000))
    if cut := sum(row["labels"][-1] == -100 for row in rows):
        args = trainer.args
        say(
            f"{cut} of the first {len(rows)} rows lose their last steps to max_length={args.max_length} or "
            f"max_completion_length={args.max_completion_length}, or have -100 there.\n"
        )
    ids = rows[0]["input_ids"]
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        say(f"The prompts begin with {tokenizer.bos_token}, and TRL adds another one: take it out of your prompts.\n")
    if tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] != ids:
        say(
            "TRL tokenizes step by step. Tokenized at once, this row has other tokens: score answers step by step too.\n"
        )
    say(f"{'input_ids':13}{tokenizer.decode(ids)}")
    say(f"{'labels':13}{' | '.join(f'{step} [{label}]' for step, label in steps_of(rows[0], tokenizer))}")


def steps_of(row: dict, tokenizer) -> list[tuple[str, int]]:
    """Each step (the first one with its prompt) and its label, 1 for right and 0 for wrong.

    The label stands at the step's last token. At all others stands -100, which carries no loss.
    """
    steps, start = [], 0
    for place, label in enumerate(row["labels"]):
        if label != -100:
            steps.append((tokenizer.decode(row["input_ids"][start : place + 1]).strip(), label))
            start = place + 1
    return steps


# ----------------------------------------------------------------------------------------------------------- held out

FIGURES = ("loss",)  # what the evaluation logs that is worth a line here


def first_error(labels) -> int:
    """The place of the first wrong step; behind the last one if all are right."""
    return next((place for place, label in enumerate(labels) if label == 0), len(labels))


def held_out(trainer, rows: list[dict], toy: bool) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """How well the model judges answers that it never trains on: figures, and a few samples as (answer, judgements)."""
    if trainer.eval_dataset is None:
        return {}, []
    output = trainer.predict(trainer.eval_dataset)  # predictions are (rows, tokens, 2), label_ids are (rows, tokens)
    answers, right, found = [], [], []
    for logits, labels in zip(output.predictions, output.label_ids, strict=True):
        logits, labels = logits[labels != -100], labels[labels != -100]  # one for each step
        guesses = logits.argmax(-1)
        answers.append((logits, labels))
        right += (guesses == labels).tolist()
        found.append(first_error(guesses) == first_error(labels))
    figures = {"step accuracy": sum(right) / len(right), "first error found": sum(found) / len(found)}
    figures |= {name: output.metrics[f"test_{name}"] for name in FIGURES if f"test_{name}" in output.metrics}
    samples = []
    with_errors_first = sorted(range(len(answers)), key=lambda place: 0 not in answers[place][1])
    for place in with_errors_first[:3]:
        steps = steps_of(trainer.eval_dataset[place], trainer.processing_class)
        chances = torch.from_numpy(answers[place][0]).softmax(-1)[:, 1].tolist()  # that the step is right
        text = " | ".join(f"{step} [{label}]" for step, label in steps)
        samples.append((text, " | ".join(f"{chance:.2f}" for chance in chances)))
    return figures, samples


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
