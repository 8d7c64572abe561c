"""Give every format of data set to every trainer, and write down what happens.

    python tools/formats.py             # all cells: annotated_examples/expected/formats.json
    python tools/formats.py dpo kto     # only these trainers; the others keep their cells

A cell is one trainer and one format. TRL's own trainer is built with the models of the toy world and four rows in that
format, and trains one step of two rows on the CPU. Everything else is TRL's default. A cell holds

result      trains, constructor (it stopped while it was built) or step (it stopped in the first step)
error       the class of the error, and the first line of its message
rows        what the trained model read in that step: each row as pieces [text, carries loss]; padding is left out
answers     for formats with answers: whether the weights after the step depend on them (the step again, with the same
            seed and a 0 behind every answer)
labels      for formats that say which answer is good: whether the weights depend on it (again, with chosen and rejected
            exchanged, and labels turned round)
silent      what happened without an error and may not be what was meant: answers not read, labels not read, question
            twice, question missing, answer learned in part, answer taken for the prompt, header of the answer lost (messages, and
            not both headers of the chat template), nothing learned

A second part looks closer at the format that each trainer was made for: how often BOS stands at the beginning with a
tokenizer that puts one in front of text, and with a template that writes one; whether EOS stands at the end, and whether
it carries loss where the pad token is the same; and what max_length leaves of the row.

"Carries loss" is measured, and means the same for all fifteen: the gradient of the step in the hidden states of the last
layer is not zero there. A language model predicts with the hidden state of a token the token behind it, so that one is
marked; a model that scores (Reward, PRM) is marked at the token that it reads the score from.
"""

import argparse
import contextlib
import copy
import importlib
import io
import json
import os
import re
import signal
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

from tables import NAMES, TRAINERS, made_with

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "annotated_examples" / "toy"
RESULT = ROOT / "annotated_examples" / "expected" / "formats.json"
PACKAGES = ("trl", "transformers", "datasets", "torch")
STABLE = ("sft", "reward", "dpo", "kto", "grpo", "rloo")
SAMPLING = ("ppo", "grpo", "rloo", "online_dpo", "nash_md", "xpo")  # the answers are the model's own

# Four problems; the right answer and a wrong one, each as its steps
PROBLEMS = [
    ("7+9+3", ["7+9=16", "16+3=19", "#19"], ["7+9=17", "17+3=20", "#20"]),
    ("2+5+8", ["2+5=7", "7+8=15", "#15"], ["2+5=7", "7+8=25", "#25"]),
    ("4+4+6", ["4+4=8", "8+6=14", "#14"], ["4+4=9", "9+6=15", "#15"]),
    ("1+9+5", ["1+9=10", "10+5=15", "#15"], ["1+9=11", "11+5=16", "#16"]),
]
BOS = "<|system|>"  # a special token that no row here uses
END = "<|end|>"
PATIENCE = 30  # seconds for a cell; the slowest one that ends takes a few
MARKUP = ("<|user|>", "<|assistant|>")


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def answers():
    """(question, right answer, wrong answer) of each problem, as text."""
    return [(question, " ".join(right), " ".join(wrong)) for question, right, wrong in PROBLEMS]


def labelled():
    """(question, answer, label): the right and the wrong answer in turn."""
    return [(q, right, True) if n % 2 == 0 else (q, wrong, False) for n, (q, right, wrong) in enumerate(answers())]


def tokenized():
    tokenizer = toy_tokenizer()
    for question, right, _ in answers():
        prompt = tokenizer.apply_chat_template(user(question), add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(user(question) + assistant(right), return_dict=False)
        yield prompt, whole


FORMATS = {  # key -> (data set type, format, rows)
    "text": ("language modeling", "text", lambda: [{"text": f"{q} {y}"} for q, y, _ in answers()]),
    "messages": (
        "language modeling",
        "messages",
        lambda: [{"messages": user(q) + assistant(y)} for q, y, _ in answers()],
    ),
    "prompt": ("prompt-only", "text", lambda: [{"prompt": q} for q, _, _ in answers()]),
    "prompt messages": ("prompt-only", "messages", lambda: [{"prompt": user(q)} for q, _, _ in answers()]),
    "completion": (
        "prompt-completion",
        "text",
        lambda: [{"prompt": q, "completion": " " + y} for q, y, _ in answers()],
    ),
    "completion messages": (
        "prompt-completion",
        "messages",
        lambda: [{"prompt": user(q), "completion": assistant(y)} for q, y, _ in answers()],
    ),
    "preference": (
        "preference",
        "text, explicit prompt",
        lambda: [{"prompt": q, "chosen": " " + y, "rejected": " " + n} for q, y, n in answers()],
    ),
    "preference messages": (
        "preference",
        "messages, explicit prompt",
        lambda: [{"prompt": user(q), "chosen": assistant(y), "rejected": assistant(n)} for q, y, n in answers()],
    ),
    "implicit": (
        "preference",
        "text, implicit prompt",
        lambda: [{"chosen": f"{q} {y}", "rejected": f"{q} {n}"} for q, y, n in answers()],
    ),
    "implicit messages": (
        "preference",
        "messages, implicit prompt",
        lambda: [{"chosen": user(q) + assistant(y), "rejected": user(q) + assistant(n)} for q, y, n in answers()],
    ),
    "unpaired": (
        "unpaired preference",
        "text",
        lambda: [{"prompt": q, "completion": " " + y, "label": label} for q, y, label in labelled()],
    ),
    "unpaired messages": (
        "unpaired preference",
        "messages",
        lambda: [{"prompt": user(q), "completion": assistant(y), "label": label} for q, y, label in labelled()],
    ),
    "steps": (
        "stepwise supervision",
        "text",
        lambda: [
            {"prompt": q, "completions": wrong, "labels": [a == b for a, b in zip(right, wrong, strict=True)]}
            for q, right, wrong in PROBLEMS
        ],
    ),
    "steps messages": (
        "stepwise supervision",
        "messages",
        lambda: [
            {
                "prompt": user(q),
                "completions": [assistant(step)[0] for step in wrong],
                "labels": [a == b for a, b in zip(right, wrong, strict=True)],
            }
            for q, right, wrong in PROBLEMS
        ],
    ),
    "tokenized": (
        "tokenized",
        "`input_ids`: the conversation",
        lambda: [{"input_ids": whole} for _, whole in tokenized()],
    ),
    "tokenized prompt": (
        "tokenized",
        "`input_ids`: the prompt",
        lambda: [{"input_ids": prompt} for prompt, _ in tokenized()],
    ),
    "repeated": (
        "repeated prompt",
        "text, in a column and in both answers",
        lambda: [{"prompt": q, "chosen": f"{q} {y}", "rejected": f"{q} {n}"} for q, y, n in answers()],
    ),
    "repeated messages": (
        "repeated prompt",
        "messages, in a column and in both answers",
        lambda: [
            {"prompt": user(q), "chosen": user(q) + assistant(y), "rejected": user(q) + assistant(n)}
            for q, y, n in answers()
        ],
    ),
}
ANSWERED = ("language modeling", "prompt-completion", "preference", "unpaired preference", "stepwise supervision")
ANSWERED += ("repeated prompt",)
JUDGED = (
    "preference",
    "unpaired preference",
    "stepwise supervision",
    "repeated prompt",
)  # they say which answer is good


def turned_round(row: dict) -> dict:
    """The same row, with the opposite judgement."""
    row = copy.deepcopy(row)
    if "chosen" in row:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    if "label" in row:
        row["label"] = not row["label"]
    if "labels" in row:
        row["labels"] = [not label for label in row["labels"]]
    return row


def other_answers(value, answer: bool = False):
    """The same row, with a 0 behind every answer."""
    if isinstance(value, dict) and "role" in value:
        return value | {"content": value["content"] + "0"} if value["role"] == "assistant" else value
    if isinstance(value, dict):
        columns = ("text", "completion", "completions", "chosen", "rejected")
        return {key: other_answers(inner, key in columns) for key, inner in value.items()}
    if isinstance(value, list):
        return [other_answers(inner, answer) for inner in value]
    return value + "0" if answer and isinstance(value, str) else value


# --- the trainers -------------------------------------------------------------------------------------------------------


def toy_tokenizer(way: str = ""):
    """The toy tokenizer, which has no BOS; or one that puts BOS in front of text; or one whose pad token is its EOS."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOY / "policy", padding_side="left")
    if way.startswith("bos"):
        tokenizer.bos_token = BOS
        special = [(BOS, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=special)
    if way == "bos template":
        tokenizer.chat_template = BOS + tokenizer.chat_template
    if way == "pad eos":
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def policy(kind="AutoModelForCausalLM", folder="policy", **more):
    import torch
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, kind).from_pretrained(TOY / folder, dtype=torch.float32, **more)


def some_reward(completions, **columns):
    """Different for every answer of a group, so that no advantage is zero."""
    return [float(n) for n in range(len(completions))]


def classes(name: str):
    module = importlib.import_module("trl" if name in STABLE else f"trl.experimental.{name}")
    return getattr(module, f"{NAMES[name]}Config"), getattr(module, f"{NAMES[name]}Trainer")


def build(name: str, rows: list[dict], folder: str, way: str = "", **more):
    """TRL's trainer on these rows, with TRL's defaults but for the size and the length of the run."""
    from datasets import Dataset

    config, trainer = classes(name)
    fields = config.__dataclass_fields__
    settings = {
        **{"output_dir": folder, "per_device_train_batch_size": 2, "max_steps": 1, "seed": 1, "learning_rate": 1e-3},
        **{"report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True},
        **{"use_cpu": True, "bf16": False, "gradient_accumulation_steps": 1},
    }
    for checkpointing in ("activation_checkpointing", "gradient_checkpointing"):  # its two names in transformers
        if checkpointing in fields:
            settings[checkpointing] = False
            break
    arguments = {"processing_class": toy_tokenizer(way)}
    if name in ("grpo", "rloo"):
        settings |= {"num_generations": 2, "max_completion_length": 24}
        arguments["reward_funcs"] = some_reward
    if name in ("online_dpo", "nash_md", "xpo", "gkd"):
        settings["max_new_tokens"] = 24
    if name == "online_dpo":
        arguments["reward_funcs"] = some_reward
    if name in ("nash_md", "xpo"):
        arguments["reward_funcs"] = policy("AutoModelForSequenceClassification", "reward_model")
        settings["generation_kwargs"] = {"use_cache": False}
    if name == "gkd":
        arguments["teacher_model"] = policy(folder="teacher")
        settings["lmbda"] = 0.0  # the answers of the data, in every batch
    if name == "ppo":
        settings |= {"total_episodes": 2, "response_length": 24, "num_ppo_epochs": 1, "num_mini_batches": 1}
        settings |= {"num_sample_generations": 0, "stop_token": "eos"}
        del settings["max_steps"]
        judge = policy("AutoModelForSequenceClassification", "reward_model")
        arguments |= {"reward_model": judge, "value_model": copy.deepcopy(judge), "ref_model": None}
    model = {
        "reward": lambda: policy("AutoModelForSequenceClassification", num_labels=1),
        "prm": lambda: policy("AutoModelForTokenClassification", num_labels=2),
    }.get(name, policy)()
    model.model.watched = True
    args = config(**(settings | more))
    return trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), **arguments)


# --- what the model read -------------------------------------------------------------------------------------------------


class Reader:
    """Notes what a watched model reads in its forward passes with gradient, and where the gradient comes back."""

    def __init__(self):
        self.passes = []

    def __enter__(self):
        from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

        self.model, self.forward = Qwen3Model, Qwen3Model.forward

        def forward(body, *arguments, **named):
            output = self.forward(body, *arguments, **named)
            hidden = output[0]
            if getattr(body, "watched", False) and hidden.requires_grad:
                ids = named.get("input_ids", arguments[0] if arguments else None)
                seen = {"ids": ids, "mask": named.get("attention_mask"), "learned": ids.new_zeros(ids.shape)}
                self.passes.append(seen)

                def note(gradient, learned=seen["learned"]):
                    learned += (gradient != 0).any(-1)

                hidden.register_hook(note)
            return output

        self.model.forward = forward
        return self

    def __exit__(self, *_):
        self.model.forward = self.forward

    def rows(self, tokenizer, at_the_token: bool) -> list[list]:
        """Each row as pieces [text, carries loss]."""
        found = []
        for seen in self.passes:
            learned = seen["learned"].bool()
            if not at_the_token:  # the hidden state of a token predicts the next one
                learned = learned.roll(1, dims=1)
                learned[:, 0] = False
            for n, ids in enumerate(seen["ids"].tolist()):
                mask = seen["mask"]
                here = mask[n].tolist() if mask is not None and mask.ndim == 2 else [i != 0 for i in ids]
                pieces = []
                for token, marked, there in zip(ids, learned[n].tolist(), here, strict=True):
                    if not there and not marked:
                        continue
                    if pieces and pieces[-1][1] == marked:
                        pieces[-1][0].append(token)
                    else:
                        pieces.append([[token], marked])
                found.append([[tokenizer.decode(tokens), marked] for tokens, marked in pieces])
        return found


@contextlib.contextmanager
def quiet():
    import logging

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def too_long(*_):
    raise TimeoutError(f"no end after {PATIENCE} seconds")


def one_step(name: str, rows: list[dict], way: str = "", **more) -> tuple[dict, list]:
    """What happened, and the trained weights."""
    import torch
    from transformers import set_seed

    stage = "constructor"
    with tempfile.TemporaryDirectory() as folder, quiet(), Reader() as reader:
        try:
            signal.signal(signal.SIGALRM, too_long)
            signal.alarm(PATIENCE)
            set_seed(1)
            trainer = build(name, rows, folder, way, **more)
            stage = "step"
            set_seed(1)
            trainer.train()
        except Exception as error:
            line = (str(error).replace("__main__.", "").strip().splitlines() or [""])[0]
            return {"result": stage, "error": type(error).__name__, "message": line[:200]}, []
        finally:
            signal.alarm(0)
        model = trainer.model.policy if name == "ppo" else trainer.model
        weights = [weight.detach().clone() for weight in model.parameters()]
        if not all(torch.isfinite(weight).all() for weight in weights):
            return {"result": "step", "error": "nan", "message": "the weights are not numbers any more"}, []
        return {"result": "trains", "rows": reader.rows(toy_tokenizer(way), name in ("reward", "prm"))}, weights


def cell(name: str, key: str) -> dict:
    import torch

    kind, form, make = FORMATS[key]
    rows = make()
    found, weights = one_step(name, rows)
    if found["result"] != "trains":
        return found

    def changes(other_rows):
        _, other = one_step(name, other_rows)
        return not all(torch.equal(a, b) for a, b in zip(weights, other, strict=True))

    if kind in ANSWERED:
        found["answers"] = changes([other_answers(row) for row in rows])
    if kind in JUDGED:
        found["labels"] = changes([turned_round(row) for row in rows])
    found["silent"] = silent(name, form, found)
    return found


def silent(name: str, form: str, found: dict) -> list[str]:
    """What happened in a step that ran, and may not be what was meant."""
    whole = ["".join(text for text, _ in row) for row in found["rows"]]
    learned = ["".join(text for text, marked in row if marked) for row in found["rows"]]
    asked = [max(text.count(question) for question, _, _ in PROBLEMS) for text in whole]
    said = [text for _, right, wrong in answers() for text in (right, wrong)]
    parts = [y for text, part in zip(whole, learned, strict=True) for y in said if part and y in text and y not in part]
    checks = {
        "answers not read": found.get("answers") is False,
        "labels not read": found.get("labels") is False,
        "question twice": max(asked) > 1,
        "question missing": min(asked) == 0,
        "answer learned in part": name not in ("reward", "prm", *SAMPLING) and bool(parts),
        "header of the answer lost": form.startswith("messages")
        and not all(mark in text for text in whole for mark in MARKUP),
        "answer taken for the prompt": name in SAMPLING and bool(parts),
        "nothing learned": not any(learned),
    }
    return [what for what, happened in checks.items() if happened]


# --- one format of each trainer, looked at more closely ---------------------------------------------------------------

ITS_OWN = {  # the format that a trainer was made for, as messages and as text
    **{"sft": ("completion messages", "completion"), "gkd": ("messages", None), "prm": (None, "steps")},
    **dict.fromkeys(("reward", "dpo", "orpo", "cpo"), ("preference messages", "preference")),
    **dict.fromkeys(("kto", "bco"), ("unpaired messages", "unpaired")),
    **dict.fromkeys(("grpo", "rloo", "online_dpo", "nash_md", "xpo"), ("prompt messages", "prompt")),
    "ppo": (None, "tokenized prompt"),
}
LIMIT = 20  # tokens; the rows have 22 to 27, and as messages 3 more


def closer(name: str) -> dict:
    """How often BOS stands at the beginning, EOS at the end, and what a limit of LIMIT tokens leaves."""
    found = {}
    for form, key in zip(("messages", "text"), ITS_OWN[name], strict=True):
        if key is None or name == "ppo":
            continue
        rows = FORMATS[key][2]()
        for way in ("bos", "bos template"):
            if way == "bos template" and form == "text":
                continue
            step, _ = one_step(name, rows, way)
            whole = ["".join(text for text, _ in row) for row in step.get("rows", [])]
            found[f"{form}, {way}"] = sorted({text.count(BOS) for text in whole})
        if name in SAMPLING:
            continue
        step, _ = one_step(name, rows)
        whole = ["".join(text for text, _ in row) for row in step["rows"]]
        found[f"{form}, eos"] = sorted({text.endswith(END) for text in whole})
        step, _ = one_step(name, rows, "pad eos")
        found[f"{form}, pad eos"] = (
            step["result"]
            if step["result"] != "trains"
            else sorted({row[-1][1] and row[-1][0].endswith(END) for row in step["rows"]})
        )
        step, _ = one_step(name, rows, max_length=LIMIT)
        found[f"{form}, cut"] = step
    return found


# --- the tables of reference_guides/datasets.md -------------------------------------------------------------------------


LEARNED_AT = {  # the section of each walkthrough that shows the lines
    **{"sft": "which-tokens-are-learned", "reward": "which-token-is-scored", "dpo": "the-collator"},
    **{"kto": "the-collator", "orpo": "the-sft-term-over-prompt-and-answer"},
    **{"cpo": "from-a-text-to-tokens-where-the-answer-begins", "bco": "preparing-the-data-set-tokens"},
    **{"ppo": "the-rewards-what-is-masked", "grpo": "masks", "rloo": "masks", "online_dpo": "where-an-answer-ends"},
    **{"nash_md": "the-log-probabilities", "gkd": "the-collator-which-tokens-are-compared"},
    **{"xpo": "the-log-probabilities", "prm": "tokenizing-a-row-prompt-steps-and-labels"},
}
CUT_AT = {
    **{"sft": "truncation", "reward": "the-data", "dpo": "the-collator", "kto": "preparing-the-data-set-tokens"},
    **{"orpo": "from-a-text-to-tokens", "cpo": "from-a-text-to-tokens-one-row"},
    **{"bco": "preparing-the-data-set-tokens", "gkd": "the-data", "prm": "tokenizing-a-row-what-is-cut"},
}


def measured() -> dict:
    return json.loads(RESULT.read_text())


def state(name: str, one: dict) -> str:
    """yes; prompt: only the prompt is used; !: something is not as it looks; no: an error."""
    if one["result"] != "trains":
        return "no"
    if not one["silent"]:
        return "yes"
    return "prompt" if name in SAMPLING and set(one["silent"]) <= {"answers not read", "labels not read"} else "!"


def link(name: str, section: str = "") -> str:
    return f"[{NAMES[name]}](../annotated_trainers/{name}.md{section and '#' + section})"


def marked(row: list) -> str:
    """The pieces of a row, those that carry loss in bold."""
    return " ".join(f"**`{readable(text)}`**" if loss else f"`{readable(text)}`" for text, loss in row)


def readable(text: str) -> str:
    """Special tokens without bars, which would end a cell of a table, and line breaks that can be seen."""
    for token in ("user", "assistant", "system", "end", "pad"):
        text = text.replace(f"<|{token}|>", f"<{token}>")
    return text.replace("\n", "↵").replace("|", "¦").replace("`", "'")


def table(head: list[str], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def kinds() -> None:
    """Every type and format with its first row."""
    shown = [
        [kind, form, f"`{readable(json.dumps(make()[0], ensure_ascii=False))}`"]
        for kind, form, make in FORMATS.values()
    ]
    table(["type", "format", "a row"], shown)


def matrix() -> None:
    """Formats down, trainers across."""
    cells = measured()["cells"]
    rows = [
        [f"{kind}: {form}", *(state(name, cells[name][key]) for name in TRAINERS)]
        for key, (kind, form, _) in FORMATS.items()
    ]
    table(["", *map(link, TRAINERS)], rows)
    counts = [state(name, cells[name][key]) for name in TRAINERS for key in FORMATS]
    words = {
        "yes": "train as meant",
        "prompt": "train on the prompt alone",
        "!": "train on something else",
        "no": "stop",
    }
    print(f"Of {len(counts)} cells, " + ", ".join(f"{counts.count(k)} {word}" for k, word in words.items()) + ".\n")


def grouped(key_of) -> list[list[str]]:
    """Cells with the same key in one row: the trainers, and the formats that all of them share."""
    cells, by_trainer = measured()["cells"], {}
    for name in TRAINERS:
        for key, one in cells[name].items():
            if what := key_of(name, one):
                by_trainer.setdefault((what, name), []).append(key)
    merged: dict[tuple, list[str]] = {}
    for (what, name), keys in by_trainer.items():
        merged.setdefault((what, tuple(keys)), []).append(NAMES[name])
    rows = []
    for (what, keys), names in merged.items():
        refused = [key for key, one in cells[next(n for n in NAMES if NAMES[n] == names[0])].items() if "error" in one]
        all_of_them = len(keys) > 4 and list(keys) == refused
        rows.append([", ".join(names), "all that it refuses" if all_of_them else "; ".join(map(named, keys)), what])
    return rows


def named(key: str) -> str:
    kind, form, _ = FORMATS[key]
    return form if kind == "tokenized" else f"{kind} ({form})"


def silences() -> None:
    """What happens in the cells that are marked `!`."""

    def surprising(name, one):
        """Those that sample read neither answers nor labels of any row: that is no surprise."""
        known = {"answers not read", "labels not read"} if name in SAMPLING else set()
        return ", ".join(what for what in one["silent"] if what not in known) if state(name, one) == "!" else None

    table(["trainer", "format", "what happens"], grouped(surprising))


def errors() -> None:
    """The errors, and when they come."""
    stages = {"constructor": "while it is built", "step": "in the first step"}

    def error(name, one):
        # Of the long name of a method, the class and the method
        message = re.sub(r"(?:\w+\.){3,}(?=\w+\.\w)", "", readable(one.get("message", "")))
        message = message if len(message) <= 70 else message[:67] + "..."
        return f"`{one['error']}: {message}`, {stages[one['result']]}" if one["result"] != "trains" else None

    table(["trainer", "format", "error"], grouped(error))


def learned() -> None:
    """One row of each trainer's own format as it is read; the tokens that carry loss are bold."""
    cells, rows = measured()["cells"], []
    for name in TRAINERS:
        keys = ("messages", "text", *ITS_OWN[name]) if name == "sft" else ITS_OWN[name]
        for key in filter(None, keys):
            rows.append([link(name, LEARNED_AT[name]), named(key), marked(cells[name][key]["rows"][0])])
    table(["trainer", "format", "the row"], rows)


def cuts() -> None:
    """What `max_length` leaves of a row of each trainer that learns from answers in the data."""
    found, rows = measured()["closer"], []
    for name in TRAINERS:
        for form in ("messages", "text"):
            if one := found[name].get(f"{form}, cut"):
                left = (
                    f"`{one['error']}: {readable(one['message'])[:70]}`" if "error" in one else marked(one["rows"][0])
                )
                rows.append([link(name, CUT_AT[name]), form, left])
    table(["trainer", "format", f"with `max_length={LIMIT}`"], rows)


def ends() -> None:
    """BOS at the beginning, EOS at the end, and a pad token that is EOS."""
    found, rows = measured()["closer"], []

    def shown(value) -> str:
        if value is None:
            return "-"
        return (
            value
            if isinstance(value, str)
            else " or ".join("yes" if v is True else "no" if v is False else str(v) for v in value)
        )

    for name in TRAINERS:
        if name == "ppo":
            continue
        one = dict(found[name])
        for form in ("text", "messages"):
            if one.get(f"{form}, eos") == [False]:  # no EOS that could carry loss
                one[f"{form}, pad eos"] = None
        keys = ("text, bos", "messages, bos", "messages, bos template", "text, eos", "messages, eos")
        rows.append([link(name), *(shown(one.get(key)) for key in (*keys, "text, pad eos", "messages, pad eos"))])
    table(
        ["trainer", "BOS, text", "BOS, messages", "BOS, messages, written by the template", "EOS behind text",
         "EOS behind messages", "EOS has loss if it is also pad: text", "EOS has loss if it is also pad: messages"],
        rows,
    )  # fmt: skip


def made_on() -> None:
    """The command, the versions and the machine."""
    result = measured()
    print(f"\n`{result['command']}`; {made_with(result)}.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure which trainer takes which format of data set.")
    parser.add_argument("trainers", nargs="*", choices=[*TRAINERS, []], help="only these")
    names = parser.parse_args().trainers or TRAINERS
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    from expected import machine

    result = json.loads(RESULT.read_text()) if RESULT.is_file() else {"cells": {}, "closer": {}}
    result |= {
        "command": "python tools/formats.py",
        "versions": {package: version(package) for package in PACKAGES},
        "machine": machine(),
    }
    for name in names:
        result["cells"][name] = {key: cell(name, key) for key in FORMATS}
        result["closer"][name] = closer(name)
        print(
            f"{name:11}",
            *(f"{key}: {one['result']}" for key, one in result["cells"][name].items()),
            sep="  ",
            flush=True,
        )
        result["cells"] = {name: result["cells"][name] for name in TRAINERS if name in result["cells"]}
        result["closer"] = {name: result["closer"][name] for name in TRAINERS if name in result["closer"]}
        RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
