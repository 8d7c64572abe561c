"""What cog writes into ALL_TRAINERS_QUICK_REF.md: a row and a card for each trainer, rows of data, the quick start's table.

Nothing is told twice here. The import, the data and the models in memory come from the quick facts of the walkthrough, the
loss from the head of the script, defaults from the config's dataclass, figures from the committed measurements.
"""

import ast
import html
import importlib
import json
import re
from dataclasses import MISSING
from pathlib import Path

import compare
import gpu
import gpu_tables
from pins import pinned
from tables import made_with, quick_facts

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "annotated_examples" / "toy" / "data"

GROUPS = {
    "supervised": ("sft", "reward", "gkd", "prm"),
    "preferences": ("dpo", "kto", "orpo", "cpo", "bco"),
    "rewards": ("grpo", "rloo", "ppo"),
    "online": ("online_dpo", "xpo", "nash_md"),
}

ARGUMENTS = {  # those that a first run should think about, besides the learning rate
    "sft": ("max_length", "packing", "assistant_only_loss", "loss_type"),
    "reward": ("max_length", "center_rewards_coefficient", "disable_dropout"),
    "gkd": ("lmbda", "beta", "temperature", "max_new_tokens"),
    "prm": ("step_separator", "max_length", "train_on_last_step_only"),
    "dpo": ("beta", "loss_type", "max_length", "precompute_ref_log_probs"),
    "kto": ("beta", "loss_type", "desirable_weight", "undesirable_weight"),
    "orpo": ("beta", "max_length"),
    "cpo": ("beta", "loss_type", "cpo_alpha", "max_length"),
    "bco": ("beta", "max_length", "precompute_ref_log_probs"),
    "grpo": ("num_generations", "max_completion_length", "beta", "loss_type"),
    "rloo": ("num_generations", "max_completion_length", "beta", "num_iterations"),
    "ppo": ("kl_coef", "num_ppo_epochs", "stop_token", "response_length"),
    "online_dpo": ("beta", "max_new_tokens", "max_length", "missing_eos_penalty"),
    "xpo": ("alpha", "beta", "max_new_tokens"),
    "nash_md": ("mixture_coef", "beta", "max_new_tokens"),
}

CAUSAL = "AutoModelForCausalLM.from_pretrained(MODEL)"
JUDGE = "AutoModelForSequenceClassification.from_pretrained(JUDGE)"
TOKENIZE = "rows = rows.map(tokenized, remove_columns=rows.column_names)"
QUICK_START = {  # what goes into the template: POLICY, ROWS, SETTINGS, MORE, and PREPARE where it is not empty
    "sft": (CAUSAL, "prompt_completion", "", ""),
    "reward": ("AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=1)", "preference", "", ""),
    "gkd": (CAUSAL, "language_modeling", "max_new_tokens=40", "teacher_model=TEACHER"),
    "prm": (
        "AutoModelForTokenClassification.from_pretrained(MODEL, num_labels=2)",
        "stepwise_supervision",
        'step_separator=" "',
        "",
    ),
    "dpo": (CAUSAL, "preference", "", ""),
    "kto": (CAUSAL, "unpaired_preference", "", ""),
    "orpo": (CAUSAL, "preference", "", ""),
    "cpo": (CAUSAL, "preference", "", ""),
    "bco": (CAUSAL, "unpaired_preference", "", ""),
    "grpo": (CAUSAL, "prompt_only", "num_generations=4, max_completion_length=40", "reward_funcs=right"),
    "rloo": (CAUSAL, "prompt_only", "num_generations=4, max_completion_length=40", "reward_funcs=right"),
    "ppo": (
        CAUSAL,
        "prompt_only",
        'response_length=40, stop_token="eos", total_episodes=16',
        f"ref_model=None, reward_model={JUDGE}, value_model={JUDGE}",
        TOKENIZE,
    ),
    "online_dpo": (CAUSAL, "prompt_only", "max_new_tokens=40", "reward_funcs=right"),
    "xpo": (CAUSAL, "prompt_only", "max_new_tokens=40", "reward_funcs=JUDGE"),
    "nash_md": (CAUSAL, "prompt_only", "max_new_tokens=40", "reward_funcs=JUDGE"),
}


def names() -> list[str]:
    return [name for group in GROUPS.values() for name in group]


def facts(name: str) -> dict[str, str]:
    """The quick facts of a walkthrough; its links lead there."""
    found = quick_facts((ROOT / "annotated_trainers" / f"{name}.md").read_text("utf-8"))
    found = {key: value.replace("](#", f"]({name}.md#") for key, value in found.items()}
    return {key: re.sub(r"\]\((\w+\.md)", r"](annotated_trainers/\1", value) for key, value in found.items()}


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / "annotated_examples" / f"{name}.py").read_text("utf-8")))


def title(name: str) -> str:
    """The short name of a method, as its script has it in brackets or before a colon."""
    head = docstring(name).split(":")[0]
    return re.sub(r".*\(([^)]+)\)$", r"\1", head)


def purpose(name: str) -> str:
    sentence = " ".join(docstring(name).split("\n\n")[0].split()).split(": ", 1)[1]
    return sentence[0].upper() + sentence[1:]


def where(name: str) -> str:
    """What the letters of a loss mean, where it has some: the paragraph behind it in the head of the script."""
    if name not in ("kto", "bco"):
        return ""
    blocks = docstring(name).split("\n\n")
    after = next(n for n, block in enumerate(blocks) if re.search(r"^ +loss +=", block, re.M)) + 1
    return "<br>" + html.escape(" ".join(blocks[after].split()), quote=False)


def loss(name: str) -> list[str]:
    """The lines of the script's first indented block that says what the loss is."""
    blocks = re.findall(r"(?:^    .+\n)+", docstring(name), re.M)
    lines = next(block for block in blocks if re.search(r"^ +loss +=", block, re.M)).splitlines()
    joined: list[str] = []
    for line in lines:
        if re.match(r"    \w+ +=", line) or not joined:
            joined.append(line)
        else:  # the second half of a long formula
            joined[-1] += line
    return [" ".join(line.split()) for line in joined]


def config(name: str):
    line = re.search(r"from (\S+) import (\w+Config)", facts(name)["Import"])
    return getattr(importlib.import_module(line[1]), line[2])


def default(name: str, argument: str) -> str:
    field = config(name).__dataclass_fields__[argument]
    value = field.default if field.default is not MISSING else field.default_factory()
    if isinstance(value, list) and len(value) == 1:  # the config unpacks it
        (value,) = value
    return f"`{argument}` `{value!r}`"


def measured(name: str) -> dict:
    return next(row for row in compare.rows() if row["name"] == name)


def toy(name: str, row: dict) -> str:
    before, after = (sum(row[when]) / len(row[when]) for when in ("before", "after"))
    found = f"{row['figure']} {before:.3f} → {after:.3f} ({min(row['after']):.3f} to {max(row['after']):.3f})"
    kl = f", KL {row['kl']:.2f} nats" if "kl" in row else ""
    return f"{found}{kl}, {row['seconds']:.0f} s, {row['memory'] / 1e6:.0f} MB"


def on_a_gpu(name: str) -> str:
    found = []
    for path in sorted(gpu.MEASURED.glob("*.json")):
        job = gpu_tables.record(json.loads(path.read_text()), name, "ours")
        if gpu_tables.has_figures(job):
            how = " (with shorter answers)" if "answers" in job.get("shortened", {}) else ""
            found.append(f"{path.stem}: {gpu_tables.gigabytes(job)} GB, {job['seconds_per_step']:.2f} s a step{how}")
    return "; ".join(found) or gpu_tables.NOT_MEASURED


def install() -> None:
    """The line that installs TRL, with the pinned release."""
    command = f"pip install 'trl=={pinned()}' requests"
    print(f"\n<!-- not run: .ci/run installs this release, by the README -->\n```bash\n{command}\n```\n")


def summary() -> None:
    """A row for each trainer."""
    print("\n| trainer | what it does | data | whose answers | right answers on the toy world | seconds |")
    print("| --- | --- | --- | --- | ---: | ---: |")
    for name in names():
        row, found = measured(name), facts(name)
        after = f"{sum(row['after']) / len(row['after']):.3f}"
        result = after if row["figure"] == "right answers" else "-"
        whose = re.split("[:;]", found["On-policy or off-policy"])[0]
        cells = [f"[{title(name)}](#{anchor(name)})", purpose(name).rstrip("."), f"`{row['data']}`", whose, result]
        print("| " + " | ".join(cells) + f" | {row['seconds']:.0f} |")
    print()


def anchor(name: str) -> str:
    return re.sub(r"[^\w-]", "", title(name).lower().replace(" ", "-"))


def rows() -> None:
    """One row of each type of data set, quoted from the toy world's files."""
    for folder in dict.fromkeys(measured(name)["data"] for name in names()):
        path = DATA / folder / "train.jsonl"
        takers = ", ".join(f"[{title(name)}](#{anchor(name)})" for name in names() if measured(name)["data"] == folder)
        first = path.read_text("utf-8").splitlines()[0]
        print(f"\n**`{folder}`**, for {takers}:\n")
        print(f"<!-- output: {path.relative_to(ROOT).as_posix()} -->\n```text\n{first}\n```")
    print()


def cards(group: str) -> None:
    """What to know of each trainer of a group, in a table of its own."""
    for name in GROUPS[group]:
        found, row = facts(name), measured(name)
        arguments = ", ".join(default(name, argument) for argument in ("learning_rate", *ARGUMENTS[name]))
        lines = {
            "import": found["Import"],
            "data": found["Data set type"],
            "models in memory": found["Models in memory"],
            "loss": "<br>".join(f"<code>{html.escape(line, quote=False)}</code>" for line in loss(name)) + where(name),
            "arguments that matter, with defaults": arguments,
            "on the toy world": toy(name, row),
            "on a GPU": on_a_gpu(name),
            "releases": found["Releases"],
            "more": f"[script](annotated_examples/{name}.py), [walkthrough](annotated_trainers/{name}.md)",
        }
        print(f"\n### {title(name)}\n\n{purpose(name)}\n\n| | |\n| --- | --- |")
        for key, value in lines.items():
            print(f"| {key} | {value.replace('|', '&#124;')} |")
    print()


def quick_start() -> None:
    """What to put into the template for each trainer."""
    print("\n| trainer | `IMPORT` | `POLICY` | `ROWS` | `SETTINGS` | `MORE` | `PREPARE` |\n|" + " --- |" * 7)
    for name in names():
        parts = (*QUICK_START[name], "")[:5]
        cells = [facts(name)["Import"], *(f"`{part}`" if part else "" for part in parts)]
        print(f"| {title(name)} | " + " | ".join(cells) + " |")
    print()


def measured_with() -> None:
    """One line: how often, and with what the toy world's figures were measured."""
    result = json.loads((ROOT / "annotated_examples" / "expected" / "compare.json").read_text())
    print(f"\n`{result['command']}`; {made_with(result)}.\n")
