# The walkthrough of TRL's implementation: annotated_trainers/orpo.md
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
"""Odds Ratio Preference Optimization (ORPO): supervised fine-tuning on the better of two answers and a push away from the
worse one, in one loss and with one model.

The loss of one pair (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7; beta is the paper's lambda). mean logp is the mean of
the log-probabilities of an answer's tokens, and log odds is mean logp - log(1 - exp(mean logp)). There is no reference
model. TRL takes the first term over the tokens of the prompt as well:

    loss = -mean logp(prompt, chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected))

One row of data (prompt may be left out if chosen and rejected both begin with it):

    {"prompt":   [{"role": "user", "content": "7+9+3"}],
     "chosen":   [{"role": "assistant", "content": "7+9=16 16+3=19 #19"}],
     "rejected": [{"role": "assistant", "content": "7+9=16 16+3=20 #20"}]}

Run it:

    python orpo.py                                               # the toy world, no network, no GPU needed
    python orpo.py --model_name_or_path Qwen/Qwen3-0.6B          # a real model on a GPU
    python orpo.py --model_name_or_path ... --dataset_name ...   # your model, your data
    accelerate launch orpo.py --model_name_or_path ... --use_peft --load_in_4bit --learning_rate 5e-5

What to look at: log_odds_chosen rises: the better answer gains on the worse one. The loss says little about that. Most of it
is nll_loss, the first term, and on the toy world most of that is spent on the prompts.
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
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from packaging.version import Version
from torch.random import fork_rng
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
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
    maybe_extract_prompt,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.models.utils import unwrap_model_for_generation

# ---------------------------------------------------------------------------------------------------------- settings
# TRL's defaults hold unless a line below changes them; a flag or a line of the YAML file behind --config overrides both.


@dataclass
class Arguments(ScriptArguments):
    pad_token: str | None = field(
        default=None, metadata={"help": "token that fills up short rows; must differ from the end token"}
    )


SCRIPT = "orpo"
FLAGS = (Arguments, ORPOConfig, ModelConfig, DatasetMixtureConfig)  # each of their fields is a flag
COLUMNS = ({"chosen", "rejected"},)  # a row needs one of these sets; more columns do no harm
RESUMES = True  # an interrupted run can go on from its last checkpoint
WORLD = Path(__file__).resolve().parent / "toy"

TOY = {
    "model_name_or_path": str(WORLD / "policy"),  # 0.9M parameters: adds well, slips often (toy/README.md)
    "dataset_name": str(WORLD / "data" / "preference"),  # pairs sampled from this very policy
    "output_dir": "outputs/orpo-toy",
    "beta": 10.0,  # the policy has never had to write a problem, so at 0.1 the prompts in the first term give nearly all of
    # the gradient, and 0.87 of the answers end right (README.md, on validation rows)
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 16,
    "max_steps": 60,
    "logging_steps": 5,
    "max_length": 96,  # tokens of prompt and answer; the longest pair has fewer
    "gradient_checkpointing": False,  # would save memory that the toy does not need
    "bf16": False,  # float32 on every device, so that the figures can be compared
    "save_strategy": "no",  # the run is short; the model is saved at its end
}

# For Qwen3-0.6B on one GPU with 80 GB; for one with 24 GB there is recipes/full_24gb.yaml
REAL = {
    "dataset_name": "trl-lib/ultrafeedback_binarized",
    "learning_rate": 5e-6,  # for full fine-tuning; more than DPO takes, as supervised training is a part of this loss; the
    # examples of TRL take ten times more with --use_peft
    "per_device_train_batch_size": 4,  # eight answers at once: with a large vocabulary the logits take much of the memory
    "gradient_accumulation_steps": 8,  # 32 pairs for each step of the optimizer
    "gradient_checkpointing": False,  # with it, TRL's default, every layer is computed twice to save memory
    "per_device_eval_batch_size": 4,
    "num_train_epochs": 1,  # take more only while the held-out loss still falls
    "warmup_steps": 0.1,  # a share of all steps
    "lr_scheduler_type": "cosine",
    "eval_strategy": "steps",
    "eval_steps": 200,
    "bf16": is_torch_bf16_gpu_available(),  # TRL turns bf16 on by itself, which stops on a machine without such a GPU
}


# ---------------------------------------------------------------------------------------------------- model and trainer


class FiniteORPOTrainer(ORPOTrainer):
    """ORPOTrainer that survives an answer of which the policy is certain, as it may be of a "yes".

    Where the mean log-probability of an answer is nearer to 0 than 3e-8, TRL's gradient of the odds is nan, and one such
    answer fills the model with it. Here it has no gradient from the odds.
    """

    def odds_ratio_loss(self, policy_chosen_logps, policy_rejected_logps):
        return super().odds_ratio_loss(policy_chosen_logps.clamp(max=-1e-6), policy_rejected_logps.clamp(max=-1e-6))


def only_pairs(dataset):
    """What TRL reads of a row. It stumbles over a label beside messages, and over numbers in a column like chosen_logps."""
    read = {"prompt", "chosen", "rejected", "chat_template_kwargs"}
    return dataset.select_columns([name for name in next(iter(dataset)) if name in read])


def build(script_args, training_args, model_args, train_dataset, eval_dataset, tokenizer):
    """The policy, which is the only model that is held, and the trainer. There is no reference."""
    if not isinstance(train_dataset, Dataset):
        stop("ORPOTrainer tokenizes all rows before it starts and cannot stream them: leave out --dataset_streaming")
    train_dataset = only_pairs(train_dataset)
    eval_dataset = None if eval_dataset is None else only_pairs(eval_dataset)
    if training_args.max_completion_length is not None:
        stop("ORPOTrainer reads max_completion_length for encoder-decoder models only: use --max_length here")
    loading = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        "trust_remote_code": training_args.trust_remote_code,
    } | (training_args.model_init_kwargs or {})
    # By name, the trainer would load it with device_map="auto", which does not go with several processes.
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **loading)
    training_args.model_init_kwargs = None  # the trainer refuses them beside a model
    training_args.remove_unused_columns = False  # the trainer sets it too, with a warning
    set_seed(training_args.seed)  # an adapter starts from random numbers
    trainer = FiniteORPOTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train_dataset = whole_pairs(trainer, trainer.train_dataset)
    if eval_dataset is not None:
        trainer.eval_dataset = whole_pairs(trainer, trainer.eval_dataset)
    return trainer


def whole_pairs(trainer, rows):
    """The pairs that fit into max_length. TRL 1.12 cuts the others in the wrong place, some down to no answer at all.

    It cuts each answer to max_length minus the length of the longer answer, where the prompt's length is meant. Where the mean
    over an answer counts (ORPO, simpo, ipo), an empty one is 0/0, and one such row fills the model with nan; where the sum
    does, it counts as certain (huggingface/trl#6548).
    """
    end, limit = trainer.processing_class.eos_token_id, trainer.max_length

    def fits(row) -> bool:  # an answer that was cut has lost its end; a prompt is never cut
        both = row["chosen_labels"], row["rejected_labels"]
        return all(labels[-1] == end and len(labels) <= limit for labels in both)

    whole = rows.filter(fits)
    if not len(whole):
        stop(f"every pair is longer than max_length={limit} tokens: give a larger --max_length")
    if len(whole) < len(rows):
        trainer.accelerator.print(
            f"{len(rows) - len(whole)} of {len(rows)} pairs are longer than max_length={limit} tokens and are left out.\n"
        )
    return whole


def show_row(trainer) -> None:
    """Prints one row as the model sees it, after a check that there is something to prefer.

    TRL adds the end token to an answer that does not end with it. Where the chat template writes a newline behind it, as
    Qwen's does, an answer has two of them.
    """
    say, tokenizer = trainer.accelerator.print, trainer.processing_class
    rows = list(islice(trainer.train_dataset, 1000))
    if all(row["chosen_labels"] == row["rejected_labels"] for row in rows):
        stop(f"chosen and rejected are the same in each of the first {len(rows)} pairs: there is nothing to prefer")
    say(f"{'chosen_input_ids':18}{tokenizer.decode(rows[0]['chosen_input_ids'])}")  # all of it in the first term
    for part in ("chosen_labels", "rejected_labels"):  # only these in the odds: over the prompt stands -100
        say(f"{part:18}{tokenizer.decode([token for token in rows[0][part] if token != -100])}")


# ----------------------------------------------------------------------------------------------------------- held out

FIGURES = ("loss", "nll_loss", "rewards/accuracies")  # what the evaluation logs that is worth a line here


def prompt_ids(row: dict, tokenizer) -> list[int]:
    """The tokens of a row up to the point where the answer begins."""
    row = {"prompt": row["messages"][:-1]} if "messages" in row else maybe_extract_prompt(row)
    if is_conversational(row):
        return tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokenizer(row["prompt"])["input_ids"]


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
