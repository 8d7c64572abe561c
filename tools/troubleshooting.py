"""Reproduce what goes wrong with TRL's trainers, on the toy world: first the symptom, then the same with the remedy.

    python tools/troubleshooting.py --list                     # the names
    python tools/troubleshooting.py pad_is_eos                 # one of them, a few seconds, or up to a minute
    python tools/troubleshooting.py all
    python tools/troubleshooting.py chosen_falls --steps 5     # shorter, where something is trained
    python tools/troubleshooting.py --write                    # all: expected/troubleshooting.json, .txt, and a folder of curves
    python tools/troubleshooting.py --write kto_batch_of_one   # only this one; the others keep their numbers
    python tools/troubleshooting.py --picture                  # only draws the curves again

Each function below is one entry of reference_guides/troubleshooting.md and returns the same kind of answer:

met, cure      what was done, and what was done instead
wrong, right   what came of it: label -> number or word; `error` is the message that ended it
curves         where a curve is the symptom: label -> steps and the values of both runs

The settings are TRL's defaults but for what makes a run small. What an entry is about is set where the trainer is made.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import formats
from drift import slug
from expected import EXPECTED, PACKAGES, machine
from formats import NAMES, TOY, assistant
from tables import TRAINERS, made_with

ROOT = Path(__file__).resolve().parents[1]
RESULT = EXPECTED / "troubleshooting.json"
PICTURES = EXPECTED / "troubleshooting"  # NAME.svg for each entry with curves
TRL = "https://github.com/huggingface/trl/issues/"


@dataclass
class Entry:
    symptom: str  # the heading of the page, in the words that people type
    trainers: tuple[str, ...]  # whose users meet it, most of all
    threads: tuple[int, ...]  # issues and pull requests of huggingface/trl
    run: Callable[..., dict]


ENTRIES: dict[str, Entry] = {}
EVERY = tuple(TRAINERS)
PAIRS = ("dpo", "orpo", "cpo")
SAMPLE = ("grpo", "rloo", "online_dpo", "nash_md", "xpo")


def symptom(heading: str, trainers=EVERY, threads=()):
    """Registers a function as the entry of this heading."""

    def register(function):
        ENTRIES[function.__name__] = Entry(heading, tuple(trainers), tuple(threads), function)
        return function

    return register


# ------------------------------------------------------------------------------ what the entries share


def compared(met: str, cure: str, wrong: dict, right: dict, **more) -> dict:
    return {"met": met, "cure": cure, "wrong": wrong, "right": right, **more}


@functools.cache
def scratch() -> tempfile.TemporaryDirectory:
    """A folder for what trainers write, gone when Python ends."""
    return tempfile.TemporaryDirectory(prefix="troubleshooting-")


def rows(name: str, count: int, split: str = "train") -> list[dict]:
    """The first rows of a data set of the toy world."""
    lines = (TOY / "data" / name / f"{split}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def toy(folder: str = "policy", kind: str = "AutoModelForCausalLM", **more):
    return formats.policy(kind, folder, **more)


def config(name: str, **settings):
    """TRL's config with its defaults, but on the CPU, in float32, without files and without checkpointing."""
    made, _ = formats.classes(name)
    small = {
        **{"output_dir": scratch().name, "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"},
        **{"disable_tqdm": True, "logging_steps": 1, "seed": 1, "max_steps": 1, "per_device_train_batch_size": 4},
        **{"lr_scheduler_type": "constant", "gradient_accumulation_steps": 1},
    }
    for checkpointing in ("activation_checkpointing", "gradient_checkpointing"):  # its two names in transformers
        if checkpointing in made.__dataclass_fields__:
            small[checkpointing] = False
            break
    if name == "ppo":
        small |= {"num_sample_generations": 0, "num_ppo_epochs": 1, "num_mini_batches": 1}
        del small["max_steps"]
    return made(**small | settings)


def trainer(name: str, data: list[dict], model=None, tokenizer=None, given: dict | None = None, **settings):
    """TRL's trainer; `given` are its own arguments, `settings` those of its config."""
    from datasets import Dataset
    from transformers import set_seed

    set_seed(1)
    made = formats.classes(name)[1]
    arguments = {"processing_class": tokenizer or formats.toy_tokenizer(), "model": model or toy()}
    arguments |= {"args": config(name, **settings), "train_dataset": Dataset.from_list(data)}
    return made(**arguments | (given or {}))


def trained(made) -> list[dict]:
    """Trains and returns the log, one line for each step."""
    from transformers import set_seed

    set_seed(1)
    made.train()
    return [line for line in made.state.log_history if "train_runtime" not in line]


def fails(function) -> str:
    """The class and the first paragraph of the error that a function ends with; empty if it ends well."""
    try:
        function()
    except Exception as error:
        text = " ".join(str(error).strip().split("\n\n")[0].split())
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return ""


def key(log: list[dict], name: str) -> list[float]:
    return [line[name] for line in log if name in line]


def curve(label, wrong: list[float], right: list[float], every=1, names=None, of="step", first=None) -> dict:
    """Two lines of one panel: a value at each `every`-th step (or whatever `of` says) of both runs, from `first` on."""
    first = every if first is None else first
    steps = [first + every * n for n in range(len(wrong))]
    names = names or ("as met", "remedy")
    return {label: {"of": of, "step": steps, "wrong": wrong, "right": right, "names": list(names)}}


def prompts(count: int, split: str = "test") -> list[list[int]]:
    tokenizer = formats.toy_tokenizer()
    found = [row["prompt"] for row in rows("prompt_only", count, split)]
    return [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in found]


def answers(model, count: int = 64, tokens: int = 48, sample: bool = True) -> list[list[int]]:
    """What a model answers to held-out problems, as token ids up to the end token or the limit."""
    import torch

    tokenizer = formats.toy_tokenizer()
    batch = tokenizer.pad({"input_ids": prompts(count)}, return_tensors="pt")
    torch.manual_seed(0)
    was, _ = model.training, model.eval()
    with torch.no_grad():
        found = model.generate(
            **batch, max_new_tokens=tokens, do_sample=sample, top_k=0, use_cache=True, pad_token_id=0, eos_token_id=1
        )
    model.train(was)
    return found[:, batch["input_ids"].shape[1] :].tolist()


def ended(found: list[list[int]]) -> float:
    return sum(1 in answer for answer in found) / len(found)


def right_ones(model, count: int = 64) -> float:
    """The share of held-out problems that a sampled answer solves."""
    tokenizer = formats.toy_tokenizer()
    texts = tokenizer.batch_decode(answers(model, count), skip_special_tokens=True)
    truth = [row["answer"] for row in rows("prompt_only", count, "test")]
    return sum(text.endswith(f"#{result}") for text, result in zip(texts, truth, strict=True)) / count


def exact(completions, answer, **_) -> list[float]:
    """The reward of the toy world: 1 for the right sum."""
    return [float(c[0]["content"].endswith(f"#{a}")) for c, a in zip(completions, answer, strict=True)]


def group(**more) -> dict:
    """The settings of a small GRPO run: 8 answers to each of 2 prompts."""
    return {"per_device_train_batch_size": 16, "num_generations": 8, "max_completion_length": 48, **more}


# ------------------------------------------------------------------------------ installing, old code, new code


@symptom("ModuleNotFoundError: No module named 'requests'", SAMPLE)
def no_requests() -> dict:
    """TRL imports `requests` without asking for it. Its module is loaded here with and without the package."""
    from importlib.metadata import requires

    spec = importlib.util.find_spec("trl.generation.vllm_client")

    class Missing:
        def find_spec(self, name, *_):
            if name.split(".")[0] == "requests":
                raise ModuleNotFoundError("No module named 'requests'")

    def load(finders: list):
        names = [name for name in sys.modules if finders and name.split(".")[0] == "requests"]
        kept = {name: sys.modules.pop(name) for name in names}
        sys.meta_path[:0] = finders
        copied = importlib.util.spec_from_file_location("trl.generation.vllm_client_again", spec.origin)
        try:
            copied.loader.exec_module(importlib.util.module_from_spec(copied))
        finally:
            del sys.meta_path[: len(finders)]
            sys.modules.update(kept)

    asked = [entry for entry in requires("trl") if entry.startswith("requests") and "extra" not in entry]
    wrong = {"error": fails(lambda: load([Missing()])), "TRL asks pip for it": bool(asked), "imported": False}
    return compared("pip install trl", "pip install trl requests", wrong, {"imported": not fails(lambda: load([]))})


@symptom("ImportError: cannot import name 'PPOTrainer' from 'trl'", EVERY, (2518, 3059))
def import_gone() -> dict:
    """Nine of the fifteen have moved, and the address of old tutorials is gone."""
    import trl

    def old():
        exec("from trl import PPOTrainer", {})

    wrong = {"error": fails(old).split(" (")[0]}
    wrong["of the fifteen, importable"] = sum(hasattr(trl, f"{NAMES[name]}Trainer") for name in TRAINERS)
    right = {"of the fifteen, importable": sum(bool(formats.classes(name)) for name in TRAINERS)}
    return compared("from trl import PPOTrainer", "from trl.experimental.ppo import PPOTrainer", wrong, right)


@symptom("TypeError: SFTTrainer.__init__() got an unexpected keyword argument 'tokenizer'", EVERY, (6168, 2226))
def renamed_argument() -> dict:
    """`tokenizer` and `max_seq_length` have other names today."""
    data = rows("language_modeling", 4)
    made = formats.classes("sft")[1]
    wrong = {
        "error": fails(lambda: made(model=toy(), tokenizer=formats.toy_tokenizer(), args=config("sft"))),
        "and then": fails(lambda: config("sft", max_seq_length=64)),
    }
    right = {"steps trained": len(trained(trainer("sft", data, max_length=64)))}
    return compared(
        "SFTTrainer(tokenizer=...), SFTConfig(max_seq_length=...)",
        "SFTTrainer(processing_class=...), SFTConfig(max_length=...)",
        wrong,
        right,
    )


@symptom("TypeError: DPOTrainer.__init__() got an unexpected keyword argument 'beta'", EVERY, (3059, 106))
def old_snippet() -> dict:
    """Snippets of old pages give a trainer what belongs into its config today."""
    import releases

    data, made = rows("preference", 4), formats.classes("dpo")[1]
    old = {"beta": 0.1, "max_length": 64, "max_prompt_length": 32}
    wrong = {"error": fails(lambda: made(model=toy(), args=config("dpo"), **old))}
    gone = {argument for _, argument, _ in releases.gone("DPOTrainer")}
    wrong["arguments that DPOTrainer once took"] = len(gone - set(inspect.signature(made.__init__).parameters))
    right = {"steps trained": len(trained(trainer("dpo", data, beta=0.1, max_length=64)))}
    return compared("DPOTrainer(beta=0.1, max_length=64)", "DPOConfig(beta=0.1, max_length=64)", wrong, right)


@symptom("ValueError: Your setup doesn't support bf16/gpu. You need to assign use_cpu", EVERY)
def bf16_without_gpu() -> dict:
    """TRL's configs switch bfloat16 on by themselves, and then they ask for a GPU."""
    from trl import SFTConfig

    made = functools.partial(SFTConfig, output_dir=scratch().name, report_to=[])
    wrong, right = {"error": fails(made)}, {"error": fails(lambda: made(bf16=False, use_cpu=True))}
    right["bf16"] = made(bf16=False, use_cpu=True).bf16
    return compared("SFTConfig()", "SFTConfig(bf16=False, use_cpu=True)", wrong, right)


# ------------------------------------------------------------------------------ the data


@symptom("KeyError: 'chosen'", ("reward", *PAIRS), (2164, 4110))
def wrong_format() -> dict:
    """DPO wants pairs. Rows with a label, or with right answers only, are for other trainers."""
    labelled = rows("unpaired_preference", 8)
    wrong = {"error": fails(lambda: trainer("dpo", labelled))}
    right = {"steps trained": len(trained(trainer("kto", labelled)))}
    return compared("DPOTrainer, rows with prompt, completion, label", "KTOTrainer, the same rows", wrong, right)


@symptom("Which trainer takes my data set?", EVERY, (1106, 1539))
def which_trainer() -> dict:
    """What each of the fifteen made of pairs, as measured by tools/formats.py; and one of them again."""
    cells = formats.measured()["cells"]

    def takers(form):
        found = {name: formats.state(name, cells[name][form]) for name in TRAINERS}
        return [NAMES[name] for name in TRAINERS if found[name] == "yes"]

    pairs = formats.FORMATS["preference messages"][2]()
    wrong = {"error": fails(lambda: trainer("sft", pairs))}
    right = {"take pairs": ", ".join(takers("preference messages"))}
    right["take labels"] = ", ".join(takers("unpaired messages"))
    right["take prompts"] = ", ".join(takers("prompt messages"))
    right["take right answers"] = ", ".join(takers("completion messages"))
    right["steps trained"] = len(trained(trainer("dpo", pairs)))
    return compared("SFTTrainer, rows with prompt, chosen, rejected", "the trainer for such rows", wrong, right)


@symptom("The prompt is in my chosen and rejected columns too", ("reward", *PAIRS, "kto", "bco"), (1886,))
def repeated_prompt() -> dict:
    """A prompt in a column and in both answers is rendered twice, and its second copy is learned as answer."""
    twice = formats.FORMATS["repeated messages"][2]()
    once = [{name: value for name, value in row.items() if name != "prompt"} for row in twice]

    def seen(data):
        row = trainer("dpo", data).train_dataset[0]
        text = formats.toy_tokenizer().decode(row["prompt_ids"] + row["chosen_ids"])
        return {"times the question is in a row": text.count("7+9+3"), "tokens of the answer": len(row["chosen_ids"])}

    return compared("prompt, chosen, rejected", "chosen, rejected", seen(twice), seen(once))


@symptom("Implicit prompt: half of my answer is not learned", (*PAIRS, "kto", "bco"), (2164,))
def implicit_prompt() -> dict:
    """Without a prompt column the prompt is what both answers share. In text that is more than the question."""
    text, explicit = (formats.FORMATS[form][2]()[1:2] for form in ("implicit", "preference"))

    def seen(data):
        row = trainer("dpo", data).train_dataset[0]
        decode = formats.toy_tokenizer().decode
        return {"taken for the prompt": decode(row["prompt_ids"]), "tokens of the answer": len(row["chosen_ids"])}

    return compared("text, prompt inside both answers", "text, prompt in a column", seen(text), seen(explicit))


@symptom("Mismatch between tokenized prompt and the start of tokenized prompt+completion", ("sft", "dpo"), (4147,))
def prompt_boundary() -> dict:
    """A token that reaches over the border between prompt and answer is counted as prompt and not learned."""
    tokenizer, model = formats.toy_tokenizer(), toy()
    tokenizer.add_tokens(["=1"])  # as a large vocabulary has them
    model.resize_token_embeddings(len(tokenizer))

    def seen(prompt, completion):
        data = [{"prompt": prompt, "completion": completion}]
        with told() as words:
            row = trainer("sft", data, copy.deepcopy(model), tokenizer).train_dataset[0]
        learned = [i for i, mark in zip(row["input_ids"], row["labels"], strict=True) if mark != -100]
        return {"warned": any("Mismatch" in word for word in words), "learned": tokenizer.decode(learned)}

    wrong, right = seen("7+9=", "16 #16"), seen("7+9", "=16 #16")
    return compared("prompt '7+9=', completion '16 #16'", "prompt '7+9', completion '=16 #16'", wrong, right)


@symptom("Two BOS tokens at the beginning", ("sft", "prm", "reward"), (1400,))
def double_bos() -> dict:
    """A template writes a BOS; text that was rendered with it gets a second one from the tokenizer."""
    tokenizer = formats.toy_tokenizer("bos template")
    messages = rows("language_modeling", 1)
    rendered = [{"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)} for row in messages]

    def seen(data):
        ids = trainer("sft", data, tokenizer=tokenizer).train_dataset[0]["input_ids"]
        return {"BOS tokens": ids.count(tokenizer.bos_token_id), "end tokens behind the answer": ids[-2:].count(1)}

    return compared("rendered with the template, as text", "messages", seen(rendered), seen(messages))


@symptom("ValueError: The chat template is not training-compatible (assistant_only_loss=True)", ("sft",), (4879,))
def no_generation_tags() -> dict:
    """`assistant_only_loss` reads marks in the chat template. Most templates have none."""
    marked, bare = formats.toy_tokenizer(), formats.toy_tokenizer()
    for mark in ("{% generation %}", "{% endgeneration %}"):
        bare.chat_template = bare.chat_template.replace(mark, "")
    data = rows("language_modeling", 2)

    def seen(tokenizer):
        row = trainer("sft", data, tokenizer=tokenizer, assistant_only_loss=True).train_dataset[0]
        learned = [i for i, mark in zip(row["input_ids"], row["labels"], strict=True) if mark != -100]
        return {"learned": tokenizer.decode(learned)}

    wrong = {"error": fails(lambda: seen(bare))}
    return compared("a template without {% generation %}", "the same with it", wrong, seen(marked))


@symptom("completion_only_loss=True has no effect", ("sft",), (4110,))
def completion_only() -> dict:
    """The setting is about the column `completion`. Messages have none, and nothing says so."""
    messages, columns = rows("language_modeling", 4), rows("prompt_completion", 4)

    def seen(data):
        made = trainer("sft", data, completion_only_loss=True)
        batch = next(iter(made.get_train_dataloader()))
        learned, header = batch["labels"] != -100, batch["input_ids"] == 3  # the beginning of the answer
        question = header | (header.cumsum(dim=1) == 0)
        return {"tokens learned": int(learned.sum()), "of them question": int((learned & question).sum())}

    wrong, right = seen(messages), seen(columns)
    return compared("rows with messages", "rows with prompt and completion", wrong, right)


@symptom("ValueError: num_samples should be a positive integer value, but got num_samples=0", ("sft", "reward", "dpo"))
def all_too_long() -> dict:
    """Rows whose prompt alone fills max_length are dropped, and nothing says how many. Here it is all of them."""
    data = rows("preference", 8)

    def left(**settings):
        made = trainer("dpo", data, **settings)
        return {"rows left": len(made.train_dataset)}, made

    found, made = left(max_length=8)
    wrong = {"error": fails(lambda: trained(made)), **found}
    found, made = left(max_length=64)
    return compared("max_length=8", "max_length=64", wrong, found | {"steps trained": len(trained(made))})


@symptom("Loss stays at 0.6931 and grad_norm at 0: every pair is cut", ("dpo",))
def cut_before_the_difference(steps: int = 16) -> dict:
    """A pair that differs only behind max_length is two equal answers, and teaches nothing."""
    data = [row for row in rows("preference", 64) if same_beginning(row) > 12][:12]

    def seen(**settings):
        log = trained(trainer("dpo", data, max_steps=steps, learning_rate=1e-4, **settings))
        found = {"loss, last step": log[-1]["loss"], "grad_norm, last step": log[-1]["grad_norm"]}
        return found, key(log, "loss")

    (wrong, w), (right, r) = seen(max_length=24), seen(max_length=64)
    return compared("max_length=24", "max_length=64", wrong, right, curves=curve("loss", w, r))


def same_beginning(row: dict) -> int:
    """How many characters both answers of a pair share at their beginning."""
    pair = zip(row["chosen"][0]["content"], row["rejected"][0]["content"], strict=False)
    return next((place for place, (a, b) in enumerate(pair) if a != b), 0)


@contextlib.contextmanager
def told():
    """The warnings that TRL logs meanwhile."""
    words, handler = [], logging.Handler()
    handler.emit = lambda record: words.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("trl", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer")]
    before = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    for one in loggers:
        one.addHandler(handler)
    try:
        yield words
    finally:
        for one in loggers:
            one.removeHandler(handler)
        logging.disable(before)


# ------------------------------------------------------------------------------ what is learned, and how


@symptom("The model never stops: generation goes on after the answer", EVERY, (1623, 931, 3091))
def pad_is_eos(steps: int = 16) -> dict:
    """A collator that masks padding by its token masks the end token too, if both are the same."""
    import torch
    from transformers import DataCollatorForLanguageModeling, TrainerCallback

    data, every = rows("language_modeling", 320), max(1, steps // 4)

    def seen(tokenizer):
        def collator(examples):  # what this class does is found in many scripts
            return DataCollatorForLanguageModeling(tokenizer, mlm=False)(
                [{"input_ids": e["input_ids"]} for e in examples]
            )

        model, stops = toy(), []
        with torch.no_grad():
            model.lm_head.weight[1] *= -1  # a base model, which has not learned to end

        class Look(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step % every == 0:
                    stops.append(ended(answers(model, 32)))

        settings = {"max_steps": steps, "learning_rate": 3e-3, "per_device_train_batch_size": 16}
        made = trainer("sft", data, model, tokenizer, {"data_collator": collator, "callbacks": [Look()]}, **settings)
        labels = next(iter(made.get_train_dataloader()))["labels"]
        found = {
            "end tokens learned in a batch": int((labels == 1).sum()),
            "answers that end, before": ended(answers(model, 32)),
        }
        trained(made)
        return found | {"answers that end, after": stops[-1]}, stops

    (wrong, w), (right, r) = seen(formats.toy_tokenizer("pad eos")), seen(formats.toy_tokenizer())
    own = trainer("sft", data[:16], tokenizer=formats.toy_tokenizer("pad eos"), per_device_train_batch_size=16)
    by_trl = int((next(iter(own.get_train_dataloader()))["labels"] == 1).sum())
    wrong["the same with TRL's own collator"] = right["the same with TRL's own collator"] = by_trl
    return compared(
        "pad_token = eos_token, DataCollatorForLanguageModeling",
        "a pad token of its own",
        wrong,
        right,
        curves=curve("answers that end", w, r, every),
    )


@symptom("The loss explodes, the model writes nonsense: learning rate too high", EVERY)
def learning_rate(steps: int = 20) -> dict:
    """A rate that suits one method or one size of model destroys another."""
    data = rows("prompt_completion", 640)

    def seen(rate):
        model = toy()
        settings = {"max_steps": steps, "learning_rate": rate, "per_device_train_batch_size": 16}
        losses = key(trained(trainer("sft", data, model, **settings)), "loss")
        return {
            "loss, first step": losses[0],
            "loss, last step": losses[-1],
            "right answers": right_ones(model),
        }, losses

    (wrong, w), (right, r) = seen(3e-2), seen(3e-4)
    before = {"right answers, before": right_ones(toy())}
    return compared(
        "learning_rate=3e-2", "learning_rate=3e-4", before | wrong, before | right, curves=curve("loss", w, r)
    )


@symptom("The loss does not move: bfloat16 weights and a small learning rate", ("cpo", "orpo", "bco"))
def weights_do_not_move(steps: int = 40) -> dict:
    """An optimizer step smaller than half the distance of two bfloat16 numbers is rounded away."""
    import torch
    from transformers import TrainerCallback

    data, every = rows("preference", 16), max(1, steps // 10)
    scale = trainer("cpo", data, toy(), per_device_train_batch_size=16)
    batch = next(iter(scale.get_train_dataloader()))

    def weighed(model) -> float:
        """The loss of a model's weights, computed in float32 whatever they are stored in."""
        scale.model.load_state_dict(model.state_dict())
        with torch.no_grad():
            return float(scale.get_batch_loss_metrics(scale.model, batch)[0])

    def seen(dtype):
        model, moved, losses = toy().to(dtype), [], []
        before = [weight.detach().clone() for weight in model.parameters()]
        start = weighed(model)

        class Look(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step == 1:
                    pairs = zip(before, model.parameters(), strict=True)
                    moved.append(sum(int((a != b).sum()) for a, b in pairs) / sum(w.numel() for w in before))
                if state.global_step % every == 0:
                    losses.append(weighed(model) - start)

        settings = {"max_steps": steps, "learning_rate": 1e-6, "per_device_train_batch_size": 16}
        trained(trainer("cpo", data, model, given={"callbacks": [Look()]}, **settings))
        return {"weights that a step changes": moved[0], "loss, change over the run": losses[-1]}, losses

    (wrong, w), (right, r) = seen(torch.bfloat16), seen(torch.float32)
    curves = curve("loss, change since the start", w, r, every)
    return compared("a bfloat16 model, learning_rate=1e-6", "the same in float32", wrong, right, curves=curves)


ACCUMULATED = ("sft", "reward", "dpo", "kto", "orpo", "cpo", "bco", "gkd", "prm")


@symptom("Gradient accumulation changes the loss", EVERY, (2604, 2175))
def gradient_accumulation(names: tuple[str, ...] = ACCUMULATED, steps: int = 16) -> dict:
    """Eight rows at once, and the same eight as four micro-batches of two: is it the same gradient?"""
    import torch
    from transformers import TrainerCallback

    def gradient(name, batch, count):
        kept = []

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model, **_):
                kept.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]))

        data = uneven(name)
        given, settings = {"callbacks": [Keep()]}, {"max_grad_norm": 0.0}
        if name == "gkd":
            given["teacher_model"], settings["lmbda"] = toy("teacher"), 0.0
        kinds = {"reward": ("AutoModelForSequenceClassification", {"num_labels": 1})}
        kinds["prm"] = ("AutoModelForTokenClassification", {"num_labels": 2})
        kind, more = kinds.get(name, ("AutoModelForCausalLM", {}))
        model = toy(kind=kind, **more)
        if name in ("dpo", "kto", "bco"):  # against the policy itself all rewards would be 0 at the first step
            given["ref_model"] = toy("teacher")
        made = trainer(
            name,
            data,
            model,
            None,
            given,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=count,
            **settings,
        )
        log = trained(made)
        return kept[0], log[0]["loss"]

    wrong, right = {}, {}
    for name in names:
        (whole, loss), (parts, summed) = gradient(name, 8, 1), gradient(name, 2, 4)
        wrong[f"{NAMES[name]}: loss"], right[f"{NAMES[name]}: loss"] = summed, loss
        apart = float((whole - parts).norm() / whole.norm())
        wrong[f"{NAMES[name]}: gradient is off by"] = 0.0 if apart < 1e-3 else apart
        right[f"{NAMES[name]}: gradient is off by"] = 0.0
    done = "4 micro-batches of 2 rows", "1 batch of 8 rows"
    curves = {**losses("prm", steps), **losses("dpo", steps)}
    return compared(*done, wrong, right, heads=["4 x 2", "1 x 8"], curves=curves)


def losses(name: str, steps: int) -> dict:
    """The logged loss of one trainer over the same rows in micro-batches of two and in batches of eight."""
    kind, more = {"prm": ("AutoModelForTokenClassification", {"num_labels": 2})}.get(name, ("AutoModelForCausalLM", {}))
    data = rows({"prm": "stepwise_supervision"}.get(name, "preference"), 8 * steps)

    def seen(batch, count):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": count}
        made = trainer(name, data, toy(kind=kind, **more), max_steps=steps, learning_rate=1e-4, **settings)
        return key(trained(made), "loss")

    return curve(f"loss of {NAMES[name]}", seen(2, 4), seen(8, 1), names=("4 x 2", "1 x 8"))


def uneven(name: str) -> list[dict]:
    """Eight rows of a trainer's own kind, whose answers differ in length."""
    sets = {"sft": "prompt_completion", "gkd": "language_modeling", "prm": "stepwise_supervision"}
    sets |= dict.fromkeys(("kto", "bco"), "unpaired_preference")
    data = rows(sets.get(name, "preference"), 8)
    for n, row in enumerate(data):
        for column in ("completion", "chosen", "messages"):
            if column in row and n % 2:
                row[column][-1]["content"] = row[column][-1]["content"][: 6 + 2 * n]
    return data


@symptom("CUDA out of memory: which tensor is it?", EVERY, (2813, 2972))
def out_of_memory() -> dict:
    """With a large vocabulary the logits are larger than everything else that a step keeps."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words, tokenizer = 32768, formats.toy_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    data = rows("language_modeling", 16)

    def seen(loss_type):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=words, num_key_value_heads=2, head_dim=16, **small))
        made = trainer("sft", data, model, tokenizer, loss_type=loss_type, per_device_train_batch_size=16)
        sizes = []

        def keep(tensor):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trained(made)
        return {"largest tensor kept, MB": max(sizes) / 1e6}

    wrong, right = seen("nll"), seen("chunked_nll")
    tokens = max(len(row["input_ids"]) for row in trainer("sft", data).train_dataset)
    wrong["16 rows * tokens * vocabulary * 4, MB"] = 16 * tokens * words * 4 / 1e6
    for name, count in (("SFT, 8 rows", 8), ("DPO, 8 pairs", 16)):  # of Qwen3-0.6B, 1024 tokens, float32
        wrong[f"{name} of 1024 tokens, Qwen3, GB"] = count * 1024 * 151936 * 4 / 1e9
    return compared('loss_type="nll"', 'loss_type="chunked_nll", the default', wrong, right)


@symptom(
    "ValueError: The student model has vocab_size 261 but the teacher model has vocab_size 300", ("gkd",), (2215, 3028)
)
def gkd_vocabulary() -> dict:
    """GKD compares the probabilities of each token of the vocabulary, so both models need as many."""
    data = rows("language_modeling", 8)

    def seen(tokens):
        teacher = toy("teacher")
        teacher.resize_token_embeddings(300)
        teacher.resize_token_embeddings(tokens)
        return {"steps trained": len(trained(trainer("gkd", data, given={"teacher_model": teacher}, lmbda=0.0)))}

    wrong = {"error": fails(lambda: seen(300))}
    return compared("a teacher with 300 tokens, a student with 261", "the teacher cut to 261", wrong, seen(261))


# ------------------------------------------------------------------------------ GRPO and RLOO


@symptom("GRPO: loss is 0.0 from the first step", ("grpo", "rloo"), (2703, 3452))
def grpo_loss_zero(steps: int = 24) -> dict:
    """The advantages of a group add up to 0 and every ratio is 1. Only the gradient is not 0."""
    model = toy()
    settings = group(max_steps=steps, learning_rate=3e-4, loss_type="grpo", per_device_train_batch_size=32)
    log = trained(trainer("grpo", rows("prompt_only", 4 * steps), model, None, {"reward_funcs": exact}, **settings))
    part = max(1, len(log) // 4)
    found = []
    for lines in (log[:part], log[-part:]):
        mean = {name: sum(line[name] for line in lines) / part for name in ("grad_norm", "reward")}
        found.append({"largest |loss|": max(abs(line["loss"]) for line in lines), **mean})
    curves = curve("one run", key(log, "loss"), key(log, "reward"), names=("loss", "reward"))
    done = 'the loss, loss_type="grpo"', "grad_norm and reward"
    return compared(*done, *found, heads=["first steps", "last steps"], curves=curves)


@symptom("GRPO: clip_ratio is always 0", ("grpo", "rloo"), (3120,))
def clip_ratio_zero(steps: int = 12) -> dict:
    """With answers that are used once there is nothing to clip. With several steps for each round there is."""

    def seen(**more):
        settings = group(max_steps=steps, learning_rate=1e-3, **more)
        log = trained(trainer("grpo", rows("prompt_only", 64), None, None, {"reward_funcs": exact}, **settings))
        found = key(log, "clip_ratio/region_mean")
        return {"largest clip_ratio/region_mean": max(found)}, found

    (wrong, w), (right, r) = seen(), seen(num_iterations=2)
    curves = curve("clip_ratio/region_mean", w, r)
    return compared("num_iterations=1, the default", "num_iterations=2", wrong, right, curves=curves)


@symptom("GRPO: the loss rises", ("grpo",), (2703,))
def grpo_loss_rises(steps: int = 16) -> dict:
    """With beta the loss is beta times the distance to the reference, which starts at 0 and can only grow."""

    def seen(beta):
        settings = group(max_steps=steps, learning_rate=1e-3, loss_type="grpo", beta=beta)
        log = trained(trainer("grpo", rows("prompt_only", 4 * steps), None, None, {"reward_funcs": exact}, **settings))
        found = {"loss, first step": log[0]["loss"], "loss, last step": log[-1]["loss"]}
        if beta:
            found["beta * kl, last step"] = beta * log[-1]["kl"]
        return found, key(log, "loss")

    (wrong, w), (right, r) = seen(0.1), seen(0.0)
    return compared("beta=0.1", "beta=0, the default", wrong, right, curves=curve("loss", w, r))


@symptom("GRPO: frac_reward_zero_std is 1 and nothing is learned", SAMPLE[:2], (5697, 6263))
def no_variance(steps: int = 16) -> dict:
    """Where all answers of a group earn the same, no answer is better than another, and there is no gradient."""

    def form(completions, **_):
        return [float("#" in c[0]["content"]) for c in completions]  # which all of them have

    def seen(reward):
        model, settings = toy(), group(max_steps=steps, learning_rate=3e-4, per_device_train_batch_size=32)
        log = trained(
            trainer("grpo", rows("prompt_only", 4 * steps), model, None, {"reward_funcs": reward}, **settings)
        )
        found = {f"{name}, mean": sum(key(log, name)) / len(log) for name in ("reward", "frac_reward_zero_std")}
        found["largest grad_norm"] = max(key(log, "grad_norm"))
        found |= {"right answers, before": right_ones(toy(), 128), "right answers, after": right_ones(model, 128)}
        return found, key(log, "grad_norm")

    (wrong, w), (right, r) = seen(form), seen(exact)
    done = "a reward that all answers earn"
    return compared(done, "a reward that some earn", wrong, right, curves=curve("grad_norm", w, r))


@symptom("GRPO: completions/clipped_ratio is 1.0, all answers are cut", ("grpo", "rloo"), (6263, 5697))
def answers_cut(steps: int = 16) -> dict:
    """An answer that is cut before its result earns nothing, however good it was."""

    def seen(tokens):
        settings = group(max_completion_length=tokens, max_steps=steps, learning_rate=3e-4)
        settings["per_device_train_batch_size"] = 32
        log = trained(trainer("grpo", rows("prompt_only", 4 * steps), None, None, {"reward_funcs": exact}, **settings))
        names = ("completions/clipped_ratio", "completions/mean_length", "reward", "frac_reward_zero_std")
        return {f"{name}, mean": sum(key(log, name)) / len(log) for name in names}, key(log, "reward")

    (wrong, w), (right, r) = seen(16), seen(48)
    done = "max_completion_length="
    return compared(f"{done}16", f"{done}48", wrong, right, curves=curve("reward", w, r))


@symptom("GRPO: all answers are cut at any max_completion_length", SAMPLE)
def wrong_end_token() -> dict:
    """Only the tokenizer's end token ends an answer. Chat models often end their turn with another one."""

    def seen(end):
        tokenizer = formats.toy_tokenizer()
        tokenizer.eos_token = end
        made = trainer("grpo", rows("prompt_only", 8), None, tokenizer, {"reward_funcs": exact}, **group())
        (line,) = trained(made)
        return {name: line[name] for name in ("completions/clipped_ratio", "completions/mean_length")}

    wrong, right = seen("<|system|>"), seen("<|end|>")
    return compared('tokenizer.eos_token = "<|system|>"', 'tokenizer.eos_token = "<|end|>"', wrong, right)


@symptom("ValueError: generation_batch_size must be divisible by num_generations", ("grpo", "rloo"), (3061,))
def generation_batch_size() -> dict:
    """A round is sampled at once and must hold whole groups. A single micro-batch need not."""
    wrong = {"error": fails(lambda: config("grpo", per_device_train_batch_size=4))}
    made = config("grpo", per_device_train_batch_size=4, gradient_accumulation_steps=4)
    right = {"generation_batch_size": made.generation_batch_size, "num_generations": made.num_generations}
    done = "per_device_train_batch_size=4"
    return compared(done, f"{done}, gradient_accumulation_steps=4", wrong, right)


@symptom("Training ends at step 0: there seems not to be a single sample in your epoch_iterator", ("grpo", "rloo"))
def fewer_prompts_than_a_round() -> dict:
    """Prompts that fill no round are dropped. Here that is all of them."""

    def seen(count):
        made = trainer("grpo", rows("prompt_only", count), None, None, {"reward_funcs": exact}, **group())
        log = trained(made)
        return {"prompts that a round takes": 2, "steps trained": len([line for line in log if "reward" in line])}

    return compared("1 prompt", "2 prompts", seen(1), seen(2))


@symptom("TypeError: my reward function is missing 1 required positional argument", ("grpo", "rloo", "online_dpo"))
def truth_taken_away() -> dict:
    """A column reaches the reward function under its name, unless it has been removed as unused."""

    def seen(**more):
        settings = group(**more)
        return len(trained(trainer("grpo", rows("prompt_only", 8), None, None, {"reward_funcs": exact}, **settings)))

    wrong = {"error": fails(lambda: seen(remove_unused_columns=True))}
    done = "remove_unused_columns="
    return compared(f"{done}True", f"{done}False, the default", wrong, {"steps trained": seen()})


@symptom("GRPO: all rewards are equal and grad_norm is not 0", ("grpo",))
def equal_rewards() -> dict:
    """The mean of equal float32 numbers need not be that number. What is left is divided by almost nothing."""

    def seen(value):
        def reward(completions, **_):
            return [value] * len(completions)

        (line,) = trained(trainer("grpo", rows("prompt_only", 8), None, None, {"reward_funcs": reward}, **group()))
        return {
            "reward": line["reward"],
            "grad_norm": line["grad_norm"],
            "frac_reward_zero_std": line["frac_reward_zero_std"],
        }

    return compared("1000.1 for every answer", "0.5 for every answer", seen(1000.1), seen(0.5))


# ------------------------------------------------------------------------------ preferences


@symptom("DPO: loss 0.6931 and rewards/accuracies 0.0 at the first step", ("dpo",), (2371,))
def dpo_first_step(steps: int = 10) -> dict:
    """Policy and reference are equal at first, so both rewards are 0, and 0 is not larger than 0."""
    settings = {"max_steps": steps, "learning_rate": 3e-5, "per_device_train_batch_size": 16}
    log = trained(trainer("dpo", rows("preference", 16 * steps), **settings))
    names = ("loss", "rewards/accuracies", "rewards/chosen", "rewards/margins")
    first, last = ({name: line[name] for name in names} for line in (log[0], log[-1]))
    curves = curve("one run", key(log, "loss"), key(log, "rewards/accuracies"), names=("loss", "rewards/accuracies"))
    done = "the first step", f"step {steps} of the same run"
    return compared(*done, first, last, heads=["first", "last"], curves=curves)


@symptom("DPO: rewards/accuracies is only ever 0 or 1", PAIRS, (2371,))
def accuracy_zero_or_one(steps: int = 20) -> dict:
    """An accuracy over one pair cannot be anything else."""

    def seen(batch):
        settings = {"max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": 3e-5}
        found = key(trained(trainer("dpo", rows("preference", 16 * steps), **settings)), "rewards/accuracies")
        between = sum(value not in (0, 1) for value in found)
        return {"pairs of a log line": batch, "lines": len(found), "of them between 0 and 1": between}, found

    (wrong, w), (right, r) = seen(1), seen(16)
    done = "per_device_train_batch_size="
    return compared(f"{done}1, logging_steps=1", f"{done}16", wrong, right, curves=curve("rewards/accuracies", w, r))


@symptom("DPO: rewards/chosen is negative, the chosen log-probability falls", PAIRS, (1236,))
def chosen_falls(steps: int = 20) -> dict:
    """The loss looks at the difference of both answers alone. Both may become less likely."""
    data = rows("preference", 8 * steps)

    def seen(**more):
        settings = {"max_steps": steps, "learning_rate": 3e-4, "per_device_train_batch_size": 8, **more}
        log = trained(trainer("dpo", data, **settings))
        last, part = {"logps/chosen, first step": log[0]["logps/chosen"]}, max(1, steps // 4)
        for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            last[name] = sum(key(log, name)[-part:]) / part
        return last, key(log, "rewards/chosen")

    (wrong, w), (right, r) = seen(), seen(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 10.0])
    both = 'loss_type=["sigmoid", "sft"], loss_weights=[1.0, 10.0]'
    return compared('loss_type="sigmoid"', both, wrong, right, curves=curve("rewards/chosen", w, r))


@symptom("DPO: loss 0.0 and rewards/accuracies 1.0 after a few steps", ("dpo",), (1236,))
def dpo_loss_zero(steps: int = 12) -> dict:
    """Pairs that anybody can tell apart are learned at once, and teach nothing about answers."""
    real = rows("preference", 8 * steps)
    easy = [row | {"rejected": assistant("I cannot help with that.")} for row in real]

    def seen(data):
        model = toy()
        settings = {"max_steps": steps, "learning_rate": 2e-4, "per_device_train_batch_size": 8}
        log = trained(trainer("dpo", data, model, **settings))
        found = {name: log[-1][name] for name in ("loss", "rewards/accuracies", "rewards/margins")}
        found |= {"right answers, before": right_ones(toy(), 128), "right answers, after": right_ones(model, 128)}
        return found, key(log, "loss")

    (wrong, w), (right, r) = seen(easy), seen(real)
    done = "rejected: the same phrase in every pair", "rejected: wrong sums of the model itself"
    return compared(*done, wrong, right, curves=curve("loss", w, r))


@symptom("DPO: the loss is not 0.6931 at the first step", ("dpo",))
def stale_reference() -> dict:
    """With ref_model=None the reference is loaded from the policy's path, not copied from memory."""
    import torch

    data = rows("preference", 8)

    def seen(with_reference):
        model = toy()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.02)  # what was done to it in memory: a merged adapter, new embeddings
        given = {"ref_model": copy.deepcopy(model)} if with_reference else {}
        (line,) = trained(trainer("dpo", data, model, None, given))
        return {"loss": line["loss"], "rewards/chosen": line["rewards/chosen"]}

    wrong, right = seen(False), seen(True)
    return compared("a model changed in memory, ref_model=None", "ref_model=copy.deepcopy(model)", wrong, right)


@symptom("You passed both a ref_model and a peft_config: which reference with LoRA?", ("dpo", "kto"), (1365, 640))
def reference_with_peft() -> dict:
    """With an adapter the reference is the model with the adapter off. A second copy is not needed."""
    from peft import LoraConfig

    data = rows("preference", 8)

    def seen(reference):
        given = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"]), "ref_model": reference}
        made = trainer("dpo", data, given=given, learning_rate=1e-2, max_steps=2)
        log = trained(made)
        models = [made.model, *([made.ref_model] if made.ref_model is not None else [])]
        held = sum(weight.numel() for model in models for weight in model.parameters())
        found = {"parameters in memory": held}
        found["trained"] = sum(weight.numel() for weight in made.model.parameters() if weight.requires_grad)
        return found | {"loss, first step": log[0]["loss"]}

    error = fails(lambda: seen(toy()))
    wrong = {"error": error} if error else seen(toy())
    return compared("ref_model=a second copy, peft_config=...", "ref_model=None, peft_config=...", wrong, seen(None))


@symptom(
    "ValueError: Actual (not effective) batch size must be > 1. KTO will not work properly",
    ("kto",),
    (2554, 1911, 1387),
)
def kto_batch_of_one() -> dict:
    """The level that KTO compares with comes from the answers to other prompts of the batch."""
    data = rows("unpaired_preference", 8)

    def seen(batch):
        return {"steps trained": len(trained(trainer("kto", data, per_device_train_batch_size=batch)))}

    wrong = {"error": fails(lambda: seen(1))}
    return compared("per_device_train_batch_size=1", "per_device_train_batch_size=4", wrong, seen(4))


@symptom(
    "Long answers win or lose by their length: is the loss a sum or a mean?",
    (*PAIRS, "grpo"),
    (1677, 789, 1868, 3187, 5889),
)
def sum_or_mean() -> dict:
    """A model that knows nothing, a long chosen answer and a short rejected one: only the length is different."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    data = [
        row | {"rejected": assistant("#" + row["chosen"][0]["content"].split("#")[1])} for row in rows("preference", 8)
    ]

    def seen(**more):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TOY / "policy"))
        (line,) = trained(trainer("cpo", data, model, cpo_alpha=0.0, **more))
        return {
            name: line[name] for name in ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
        }

    wrong, right = seen(loss_type="sigmoid"), seen(loss_type="simpo", simpo_gamma=0.0)
    return compared('CPO, loss_type="sigmoid": sums', 'loss_type="simpo": means', wrong, right)


@symptom("BCO: the loss is 0 and nothing is learned", ("bco", "kto"))
def labels_not_boolean() -> dict:
    """BCO asks whether a label is True or False. A 1 is neither, so such rows are left out."""
    data = rows("unpaired_preference", 8)
    numbers = [row | {"label": int(row["label"])} for row in data]

    def seen(some):
        (line,) = trained(trainer("bco", some))
        return {"loss": line["loss"], "grad_norm": line["grad_norm"]}

    return compared("labels 1 and 0", "labels true and false", seen(numbers), seen(data))


# ------------------------------------------------------------------------------ reward models and PPO


@symptom("The reward model scores at random after loading its adapter", ("reward", "prm"))
def lora_without_task_type() -> dict:
    """Without its task type an adapter neither trains nor saves the new head."""
    from peft import LoraConfig

    data = rows("preference", 4)

    def seen(**more):
        given = {"peft_config": LoraConfig(target_modules=["q_proj"], **more)}
        model = toy(kind="AutoModelForSequenceClassification", num_labels=1)
        made = trainer("reward", data, model, given=given)
        return {"the head is trained": any(w.requires_grad for n, w in made.model.named_parameters() if "score" in n)}

    return compared("LoraConfig()", 'LoraConfig(task_type="SEQ_CLS")', seen(), seen(task_type="SEQ_CLS"))


def judge():
    return toy("reward_model", "AutoModelForSequenceClassification")


def ppo(given: dict, **settings):
    """A small PPO run: 16 answers a round."""
    import numpy

    numpy.random.seed(0)  # PPO shuffles with numpy, which its seed does not reach
    models = {"reward_model": judge(), "value_model": judge(), "ref_model": None}
    small = {"total_episodes": 16, "response_length": 40, "stop_token": "eos", "per_device_train_batch_size": 16}
    data = [{"input_ids": ids} for ids in prompts(32, "train")]
    return trainer("ppo", data, toy(), None, models | given, **small | settings)


@symptom(
    "AttributeError: 'function' object has no attribute 'modules' (PPO with a reward function)",
    ("ppo",),
    (3093, 2363, 2357),
)
def ppo_reward_function() -> dict:
    """PPO's reward and value model are modules with a head called `score`. A function is neither."""

    def reward(texts):
        return [1.0 for _ in texts]

    wrong = {"error": fails(lambda: trained(ppo({"reward_model": reward})))}
    wrong["and then"] = fails(lambda: trained(ppo({"value_model": None})))
    right = {"rounds trained": len(trained(ppo({})))}
    return compared("reward_model=a function; value_model=None", "two sequence classifiers", wrong, right)


@symptom("PPO: objective/kl is not 0 in the first round", ("ppo",), (615,))
def ppo_first_kl() -> dict:
    """The policy's probabilities come from sampling, with its generation config; the reference's do not."""

    def seen(**generation):
        model = toy()
        for name, value in generation.items():
            setattr(model.generation_config, name, value)
        log = trained(ppo({"model": model}, learning_rate=0.0))
        return {"objective/kl, first round": log[0]["objective/kl"]}

    wrong, right = seen(repetition_penalty=1.3), seen()
    return compared("generation_config.repetition_penalty=1.3", "the same without it", wrong, right)


@symptom("PPO: objective/kl is negative", ("ppo",), (615, 1098))
def ppo_negative_kl(steps: int = 12) -> dict:
    """The logged KL is an estimate from a few answers. Near the reference its noise is larger than it is itself."""

    def seen(answers):
        settings = {"per_device_train_batch_size": answers, "total_episodes": answers * steps, "learning_rate": 1e-4}
        log = trained(ppo({}, **settings))
        found = key(log, "objective/kl")[1:]  # in the first round policy and reference are the same
        return {"rounds": len(found), "below 0": sum(kl < 0 for kl in found), "smallest": min(found)}, found

    (wrong, w), (right, r) = seen(8), seen(32)
    done = "8 answers a round", "32 answers a round"
    curves = curve("objective/kl", w, r, of="round after the first")
    return compared(*done, wrong, right, curves=curves)


@symptom(
    "PPO does not learn: is it the policy, the reward model, or PPO?", ("ppo", "online_dpo", "nash_md", "xpo"), (2015,)
)
def ppo_random_reward(steps: int = 12) -> dict:
    """A language model loaded as a classifier gets a random head. Its order of good and bad answers shows it."""
    import torch
    from transformers import TrainerCallback

    tokenizer, pairs = formats.toy_tokenizer(), rows("preference", 64, "test")
    every = max(1, steps // 6)

    def seen(model):
        better = 0
        for pair in pairs:
            scores = []
            for side in ("chosen", "rejected"):
                ids = tokenizer.apply_chat_template(pair["prompt"] + pair[side], return_dict=False)
                with torch.no_grad():
                    scores.append(float(model(input_ids=torch.tensor([ids])).logits))
            better += scores[0] > scores[1]
        policy, solved = toy(), [right_ones(toy(), 128)]

        class Look(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step % every == 0:
                    solved.append(right_ones(policy, 128))

        settings = {"per_device_train_batch_size": 32, "total_episodes": 32 * steps, "learning_rate": 1e-4}
        settings |= {"num_ppo_epochs": 2, "num_mini_batches": 2, "kl_coef": 1.0}
        given = {"model": policy, "reward_model": model, "value_model": copy.deepcopy(model), "callbacks": [Look()]}
        trained(ppo(given, **settings))
        found = {"pairs in the right order": better / len(pairs)}
        return found | {"right answers, before PPO": solved[0], "after": solved[-1]}, solved

    wrong, w = seen(toy(kind="AutoModelForSequenceClassification", num_labels=1).eval())
    right, r = seen(judge().eval())
    curves = curve("right answers", w, r, every, of="round", first=0)
    return compared("a language model as reward model", "a trained reward model", wrong, right, curves=curves)


# ------------------------------------------------------------------------------ the run and its output


def report(name: str, found: dict) -> str:
    """What the command prints: what was done, the errors, and the numbers side by side."""
    lines = [f"$ python tools/troubleshooting.py {name}"]
    for title, done, side in (("as met", "met", "wrong"), ("remedy", "cure", "right")):
        lines.append(f"{title}:  {found[done]}")
        for label in ("error", "and then"):
            if text := found[side].get(label):
                lines += wrapped(text, "         ")
    labels = [label for label in {**found["wrong"], **found["right"]} if label not in ("error", "and then")]
    if labels:
        width = max(map(len, labels)) + 2
        words = {label: [shown(found[side].get(label, "-")) for side in ("wrong", "right")] for label in labels}
        column = max(11, *(len(pair[0]) for pair in words.values())) + 2
        heads = found.get("heads", ["as met", "remedy"])
        lines += ["", f"{'':{width}}{heads[0]:{column}}{heads[1]}"]
        lines += [f"{label:{width}}{wrong:{column}}{right}" for label, (wrong, right) in words.items()]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def wrapped(text: str, indent: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def shown(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value + 0.0:.4f}" if abs(value) >= 5e-5 or value == 0 else f"{value:.0e}"
    return str(value)


def result(name: str, steps: int | None = None) -> dict:
    """Runs one entry quietly; `steps` shortens it, where it trains."""
    entry = ENTRIES[name]
    takes = "steps" in inspect.signature(entry.run).parameters
    with formats.quiet():
        return entry.run(**{"steps": steps} if steps and takes else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="an entry, or all")
    parser.add_argument("--list", action="store_true", help="print the names and the symptoms")
    parser.add_argument("--steps", type=int, help="train only so many steps")
    parser.add_argument("--write", action="store_true", help="write the committed measurement; with names, only theirs")
    parser.add_argument("--picture", action="store_true", help="only draw the curves again")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in (*ENTRIES, "all")]
    if unknown:
        parser.error(f"there is no entry {unknown[0]!r}: python tools/troubleshooting.py --list")
    if arguments.list:
        for name, entry in ENTRIES.items():
            print(f"{name:28}{entry.symptom}")
        return
    if not (arguments.names or arguments.write or arguments.picture):
        parser.error("give the name of an entry, or --list")
    names = [*ENTRIES] if "all" in arguments.names or not arguments.names else arguments.names
    if not arguments.picture:
        import torch

        torch.set_num_threads(1)  # the order of float sums depends on it
        found = {}
        for name in names:
            found[name] = result(name, arguments.steps)
            print(report(name, found[name]), flush=True)
        if arguments.write:
            write(found)
    if arguments.write or arguments.picture:
        draw()


def measured() -> dict:
    return json.loads(RESULT.read_text())["entries"]


def write(found: dict) -> None:
    entries = (measured() if RESULT.is_file() else {}) | found
    entries = {name: entries[name] for name in ENTRIES if name in entries}
    whole = {
        "command": "python tools/troubleshooting.py --write",
        "versions": {package: version(package) for package in PACKAGES},
        "machine": machine(),
        "seeds": [1],
        "entries": entries,
    }
    RESULT.write_text(json.dumps(whole, indent=1) + "\n")
    RESULT.with_suffix(".txt").write_text("\n".join(report(name, entry) for name, entry in entries.items()))


# -------------------------------------------------------------------- the tables of reference_guides/troubleshooting.md


def names_of(trainers: tuple[str, ...]) -> str:
    return "all" if set(trainers) == set(EVERY) else ", ".join(NAMES[name] for name in EVERY if name in trainers)


def index() -> None:
    """Every symptom with its entry, and who meets it."""
    print("\n| symptom | trainers |\n| --- | --- |")
    for entry in ENTRIES.values():
        heading = entry.symptom.replace("__", r"\_\_")  # which would make the word bold
        print(f"| [{heading}](#{slug(entry.symptom)}) | {names_of(entry.trainers)} |")
    print()


def by_trainer() -> None:
    """The same by trainer, without what may happen with any of them."""
    print("\n| trainer | entries |\n| --- | --- |")
    for name in (*EVERY, "all"):
        whose = (
            entry.trainers == EVERY if name == "all" else name in entry.trainers != EVERY for entry in ENTRIES.values()
        )
        links = [f"[`{n}`](#{slug(e.symptom)})" for (n, e), his in zip(ENTRIES.items(), whose, strict=True) if his]
        print(f"| {formats.link(name) if name in NAMES else 'any of them'} | {', '.join(links)} |")
    print()


def shown_on_page(name: str) -> None:
    """What the command of an entry prints, from the committed measurement, its curves, and where people met it."""
    path, entry = RESULT.with_suffix(".txt").relative_to(ROOT).as_posix(), measured()[name]
    print(f"\n<!-- output: {path} -->\n```text\n{report(name, entry)}```\n")
    if curves := entry.get("curves"):
        print(f"![{told_in_words(curves)}](../{picture(name).relative_to(ROOT).as_posix()})\n")
    if links := ", ".join(f"[#{number}]({TRL}{number})" for number in ENTRIES[name].threads):
        print(f"Met in {links}.\n")


def made_on() -> None:
    whole = json.loads(RESULT.read_text())
    print(f"\n`{whole['command']}`; {made_with(whole)}.\n")


def picture(name: str) -> Path:
    return PICTURES / f"{name}.svg"


def told_in_words(curves: dict) -> str:
    """What the curves show, for those who cannot see them: where each line begins and ends."""
    said = []
    for label, values in curves.items():
        ends = [
            f"{who} from {shown(float(values[side][0]))} to {shown(float(values[side][-1]))}"
            for who, side in zip(values["names"], ("wrong", "right"), strict=True)
        ]
        said.append(f"{label} by {values['of']}: {', '.join(ends)}")
    return "; ".join(said)


def drawn_from(entry: dict) -> str:
    """What ties a picture to the curves that it shows."""
    return hashlib.sha256(json.dumps(entry["curves"]).encode()).hexdigest()[:16]


def draw() -> None:
    """The curves of each entry that has some, as SVG: the symptom in red, the remedy in blue."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "troubleshooting", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    import matplotlib.pyplot as plt

    PICTURES.mkdir(exist_ok=True)
    for name, entry in measured().items():
        curves = entry.get("curves", {})
        if not curves:
            continue
        figure, axes = plt.subplots(
            1, len(curves), figsize=(3.4 * len(curves), 2.4), layout="constrained", squeeze=False
        )
        for (label, values), axis in zip(curves.items(), axes.flat, strict=True):
            names = values["names"]
            axis.plot(values["step"], values["wrong"], color="#b5432a", linewidth=1.4, label=names[0])
            axis.plot(values["step"], values["right"], color="#2a5d8f", linewidth=1.4, linestyle="--", label=names[1])
            axis.set_title(label, fontsize=9)
            axis.set_xlabel(values["of"])
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.3))
        metadata = {"Date": None, "Creator": None, "Source": drawn_from(entry)}
        figure.savefig(picture(name), metadata=metadata, facecolor="white")
        plt.close(figure)
        print(picture(name).relative_to(ROOT))


if __name__ == "__main__":
    main()
