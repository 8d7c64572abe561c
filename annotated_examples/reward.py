# The walkthrough of TRL's implementation: annotated_trainers/reward.md
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
"""Reward model: give every answer a score, so that the better answer of a pair scores higher than the worse one.

The loss of one pair (Ouyang et al. 2022, arXiv 2203.02155, eq. 1): the chance, after Bradley and Terry (1952), that the chosen
answer wins is sigmoid of the difference of the two scores, so only differences mean anything:

    loss = -log sigmoid(score(chosen) - score(rejected))

One row of data (prompt may be left out if chosen and rejected both begin with it; a number in a column `margin` says by how
much the scores shall differ and is taken off the difference: Touvron et al. 2023, arXiv 2307.09288, eq. 2):

    {"prompt":   [{"role": "user", "content": "7+9+3"}],
     "chosen":   [{"role": "assistant", "content": "7+9=16 16+3=19 #19"}],
     "rejected": [{"role": "assistant", "content": "7+9=16 16+3=20 #20"}]}

Run it:

    python reward.py                                               # the toy world, no network, no GPU needed
    python reward.py --model_name_or_path Qwen/Qwen3-0.6B          # a real model on a GPU
    python reward.py --model_name_or_path ... --dataset_name ...   # your model, your data
    accelerate launch reward.py --model_name_or_path ... --use_peft --load_in_4bit --learning_rate 1e-4

What to look at: accuracy, the share of pairs in the right order, rises from about 0.5 while the loss falls from about
log 2 = 0.69. The folder that it writes is a reward model for ppo.py, online_dpo.py, nash_md.py, xpo.py, grpo.py and rloo.py;
that of --use_peft holds an adapter, to be merged first.
"""

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
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from packaging.version import Version
from transformers import AutoConfig, AutoTokenizer
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
    RewardConfig,
    RewardTrainer,
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
    new_layers: int = field(
        default=0,
        metadata={"help": "layers on top of those that the model has; they start from random numbers"},
    )
    new_learning_rate: float | None = field(
        default=None,
        metadata={"help": "learning rate of the weights that start from random numbers, if it is another one"},
    )
    system_message: str | None = field(
        default=None,
        metadata={"help": "put before every second pair; the model learns to score with it and without it"},
    )


SCRIPT = "reward"
FLAGS = (Arguments, RewardConfig, ModelConfig, DatasetMixtureConfig)  # each of their fields is a flag
COLUMNS = ({"chosen", "rejected"},)  # a row needs one of these sets; more columns do no harm
RESUMES = True  # an interrupted run can go on from its last checkpoint
WORLD = Path(__file__).resolve().parent / "toy"

TOY = {
    "model_name_or_path": str(WORLD / "policy"),  # 0.9M parameters: adds well, slips often (toy/README.md)
    "dataset_name": str(WORLD / "data" / "preference"),  # pairs sampled from this very policy
    "output_dir": "outputs/reward-toy",
    # This policy adds, and checks nothing. Without the next three settings as many steps put 0.60 of the pairs in order
    # (README.md, on validation rows); without the first alone, 0.97.
    "system_message": "mark",  # behind it the policy has read marked homework, so there it looks for wrong steps
    "new_layers": 1,  # (0 to go on with a model of this script) it sees them in the last of its four layers, which leaves none to collect them at the answer's end
    "new_learning_rate": 2e-3,  # for `score` and that layer, which start from random numbers and have a long way to go
    "learning_rate": 2e-4,  # for the others: with 1e-3 for all, they forget what they know before the new ones can read
    # it (0.58)
    "per_device_train_batch_size": 8,
    "max_steps": 360,
    "warmup_steps": 0.1,  # a share of all steps
    "adam_beta2": 0.98,  # a shorter memory of the gradients' size, as in the policy's pretraining: the run has few steps
    "logging_steps": 20,
    "max_length": 96,  # tokens of prompt and answer; the longest pair has fewer
    "gradient_checkpointing": False,  # would save memory that the toy does not need
    "bf16": False,  # float32 on every device, so that the figures can be compared
    "save_strategy": "no",  # the run is short; the model is saved at its end
}

# For Qwen3-0.6B on one GPU with 80 GB; for one with 24 GB there is recipes/full_24gb.yaml
REAL = {
    "dataset_name": "trl-lib/ultrafeedback_binarized",
    "learning_rate": 1e-5,  # for full fine-tuning; TRL's default of 1e-4 is one for --use_peft
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 16,  # 64 pairs for each step of the optimizer
    "gradient_checkpointing": False,  # with it, TRL's default, every layer is computed twice to save memory
    "num_train_epochs": 1,  # reward models overfit in the second (Ouyang et al. 2022, appendix C.2)
    "warmup_steps": 0.1,  # a share of all steps
    "lr_scheduler_type": "cosine",
    "max_length": 2048,  # TRL drops longer pairs, and its default is 1024
    "center_rewards_coefficient": 0.01,  # adds 0.01 * (score(chosen) + score(rejected))^2 to the loss, so that the scores
    # stay around 0, which the loss itself does not ask for (Eisenstein et al. 2023, arXiv 2312.09244, eq. 2)
    "eval_strategy": "steps",
    "eval_steps": 200,
    "bf16": is_torch_bf16_gpu_available(),  # TRL turns bf16 on by itself, which stops on a machine without such a GPU
}


# ---------------------------------------------------------------------------------------------------- model and trainer


def check_rows(dataset, split: str) -> None:
    """Stops at rows that TRL cannot put together: it adds prompt and answer, and takes a number in margin off the scores."""
    first = next(iter(dataset))
    for column in sorted({"prompt", "chosen", "rejected"} & set(first)):
        if not isinstance(first[column], str | list):
            stop(f"{column} must be a text or a list of messages, and in the split {split!r} it is {first[column]!r}")
    if "margin" in first:
        margins = dataset["margin"] if isinstance(dataset, Dataset) else [first["margin"]]
        wrong = [margin for margin in margins if not isinstance(margin, int | float) or not math.isfinite(margin)]
        if wrong:
            stop(
                f"margin must be a number, and in the split {split!r} there is {wrong[0]!r}: map the column to numbers, "
                "or remove it"
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


def with_system_message(row: dict, index: int, message: str) -> dict:
    """Every second pair asks for it, so the model knows what is meant and yet learns to do without."""
    if index % 2:
        return row
    first = [{"role": "system", "content": message}] if is_conversational(row) else message
    columns = ("prompt",) if "prompt" in row else ("chosen", "rejected")
    return {column: first + row[column] for column in columns}


def build(script_args, training_args, model_args, train_dataset, eval_dataset, tokenizer):
    """A language model whose last layer gives one number instead of a word, and the trainer that holds it.

    The weights of that number, `score`, start from random ones. The number is read at the last token of the text.
    """
    check_rows(train_dataset, script_args.dataset_train_split)
    if eval_dataset is not None:
        check_rows(eval_dataset, script_args.dataset_test_split)
    if script_args.system_message:
        train_dataset = train_dataset.map(
            with_system_message, with_indices=True, fn_kwargs={"message": script_args.system_message}
        )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **deeper(model_args, script_args.new_layers),
    } | (training_args.model_init_kwargs or {})
    model_args.lora_task_type = "SEQ_CLS"  # trains and saves `score` too; TRL's default is for models that write
    trainer = RewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    for split, before, after in (
        (script_args.dataset_train_split, train_dataset, trainer.train_dataset),
        (script_args.dataset_test_split, eval_dataset, trainer.eval_dataset),
    ):
        say_what_is_left(trainer, split, before, after)
    if script_args.new_learning_rate:
        two_speeds(trainer, script_args.new_layers, script_args.new_learning_rate)
    return trainer


def say_what_is_left(trainer, split: str, before, after) -> None:
    """TRL drops pairs that are longer than max_length without a word, all of them if it comes to that."""
    if after is None:
        return
    limit = f"max_length={trainer.args.max_length} tokens"
    if next(iter(after), None) is None:
        stop(
            f"every pair of the split {split!r} has an answer that is, with its prompt, longer than {limit}: give a larger "
            "--max_length"
        )
    if isinstance(before, Dataset) and len(after) < len(before):
        trainer.accelerator.print(
            f"{len(before) - len(after)} of {len(before)} pairs of the split {split!r} are longer than {limit} and are left "
            "out.\n"
        )


def show_row(trainer) -> None:
    """Prints one pair as the model sees it, and how many of the first thousand are two answers that are the same."""
    say, tokenizer = trainer.accelerator.print, trainer.processing_class
    rows = list(islice(trainer.train_dataset, 1000))
    same = sum(row["chosen_ids"] == row["rejected_ids"] for row in rows)
    if same == len(rows):
        stop(f"chosen and rejected are the same in each of the first {len(rows)} pairs: there is nothing to learn")
    if same:
        say(f"chosen and rejected are the same in {same} of the first {len(rows)} pairs, which teach nothing.\n")
    for part in ("chosen_ids", "rejected_ids"):
        say(f"{part:13}{tokenizer.decode(rows[0][part])}")
    say(f"{'score at':13}{tokenizer.decode(rows[0]['chosen_ids'][-1:])!r}, the last token of each")


# ----------------------------------------------------------------------------------------------------------- held out

FIGURES = (
    "accuracy",
    "loss",
    "margin",
)  # what the evaluation logs that is worth a line here; margin: the chosen's lead


@torch.no_grad()
def scores(trainer, pairs: list[dict]) -> list[tuple[float, float]]:
    """The score of the chosen and that of the rejected answer of each pair."""
    batch = trainer.data_collator(pairs)  # the chosen ones first, then the rejected ones
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        chosen, rejected = model.eval()(**inputs).logits.view(2, -1).tolist()
    return list(zip(chosen, rejected, strict=True))


def held_out(trainer, rows: list[dict], toy: bool) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """How well the scores order pairs that the model never trains on: figures, and a few samples as (pair, scores)."""
    metrics = trainer.evaluate() if FIGURES and trainer.eval_dataset is not None else {}
    figures = {name: metrics[f"eval_{name}"] for name in FIGURES if metrics.get(f"eval_{name}") is not None}
    pairs = list(islice(trainer.eval_dataset or (), 3))
    if not pairs:
        return figures, []
    decode = trainer.processing_class.decode
    ends = [(decode(pair["chosen_ids"][-60:]), decode(pair["rejected_ids"][-60:])) for pair in pairs]
    texts = [f"chosen:   {chosen}\n  rejected: {rejected}" for chosen, rejected in ends]
    answers = [f"{chosen:.2f} and {rejected:.2f}" for chosen, rejected in scores(trainer, pairs)]
    return figures, list(zip(texts, answers, strict=True))


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
