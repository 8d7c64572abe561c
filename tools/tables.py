"""The tables that stand in Markdown pages and are generated there by cog (`make sync`, checked by `make check`).

Each function prints Markdown. It reads its numbers from the one place where they are true: a config's dataclass in the
installed TRL, or a committed measurement in annotated_examples/expected.
"""

import json
from dataclasses import MISSING, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


TRAINERS = (  # in the order of this repository: supervised, preferences, reinforcement learning, online and advanced
    *("sft", "reward", "dpo", "kto", "orpo", "cpo", "bco", "ppo", "grpo", "rloo"),
    *("online_dpo", "nash_md", "gkd", "xpo", "prm"),
)


def status() -> None:
    """Which trainers have a script and a walkthrough already, for the README."""
    print("\n| | here | to come |\n| --- | --- | --- |")
    for part, folder, ending in (("scripts", "annotated_examples", "py"), ("walkthroughs", "annotated_trainers", "md")):
        here = [name for name in TRAINERS if (ROOT / folder / f"{name}.{ending}").is_file()]
        links = " ".join(f"[`{name}`]({folder}/{name}.{ending})" for name in here)
        print(f"| {part} | {links} | {' '.join(f'`{name}`' for name in TRAINERS if name not in here)} |")
    print()


def measurement(trainer: str) -> dict:
    """annotated_examples/expected/<trainer>.json"""
    return json.loads((ROOT / "annotated_examples" / "expected" / f"{trainer}.json").read_text())


def number(value: float) -> str:
    """Three significant digits, without an exponent where people can read it without."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.3f}" if "e" in text and abs(value) >= 1e-3 else text


def defaults(config: str, *names: str) -> None:
    """A table of arguments and their defaults, read from the dataclass `config` of the installed trl."""
    import trl

    found = {field.name: field for field in fields(getattr(trl, config))}
    print("\n| argument | default |\n| --- | --- |")
    for name in names:
        field = found[name]
        value = field.default if field.default is not MISSING else field.default_factory()
        print(f"| `{name}` | `{value!r}` |")
    print()


def expected_metrics(trainer: str) -> None:
    """For each logged metric: its band over the seeds at the first and the last logged step."""
    result = measurement(trainer)
    steps = next(iter(result["log"].values()))["step"]
    print(f"\n| key | step {steps[0]} | step {steps[-1]} |\n| --- | --- | --- |")
    for key, band in result["log"].items():
        ends = [f"{number(band['min'][index])} to {number(band['max'][index])}" for index in (0, -1)]
        print(f"| `{key}` | {ends[0]} | {ends[1]} |")
    print()


def expected_held_out(trainer: str) -> None:
    """The held-out figures before and after training, a row for each seed."""
    result = measurement(trainer)
    names = list(result["held_out"])
    print("\n| seed | " + " | ".join(f"{name}, before | after" for name in names) + " | seconds of training |")
    print("| --- |" + " --- |" * (2 * len(names) + 1))
    for index, seed in enumerate(result["seeds"]):
        cells = [f"{result['held_out'][name][when][index]:.3f}" for name in names for when in ("before", "after")]
        print(f"| {seed} | " + " | ".join(cells) + f" | {result['train_seconds'][index]:.0f} |")
    print()


def measured_with(trainer: str) -> None:
    """One line: the command, the versions and the machine of a measurement."""
    result = measurement(trainer)
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = ", ".join(
        f"{key}: {value}" if key in ("cores", "threads") else str(value)
        for key, value in result["machine"].items()
        if key != "python"
    )
    print(f"\n`{result['command']}` with seeds {', '.join(map(str, result['seeds']))}; {versions}; {machine}.\n")


def printed(trainer: str) -> None:
    """What the bare command prints, from the committed capture, with `...` in place of the lines of metrics."""
    path = Path("annotated_examples") / "expected" / f"{trainer}.txt"
    lines = (ROOT / path).read_text().rstrip().split("\n")
    kept = ["..." if line.startswith("{") else line for line in lines]
    kept = [line for index, line in enumerate(kept) if line != "..." or kept[index - 1] != "..."]
    print(f"\n<!-- output: {path.as_posix()} -->\n```text")
    print("\n".join(kept))
    print("```\n")


def rebuild() -> None:
    """What building the toy world from nothing gave on another machine, beside the committed models."""
    result = json.loads((ROOT / "annotated_examples" / "toy" / "rebuild.json").read_text())
    again, committed = ({**part["right answers"], **part["pairs in order"]} for part in (result, result["committed"]))
    measured = {"policy": "right answers", "teacher": "right answers", "reward_model": "pairs in order"}
    print("\n| | committed | built again |\n| --- | --- | --- |")
    for name, what in measured.items():
        print(f"| `{name}`, {what} on the test split | {committed[name]:.3f} | {again[name]:.3f} |")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    minutes = result["seconds"] / 60
    print(f"\n`{result['command']}` took {minutes:.0f} minutes ({result['machine']['cpu']}, cores: ", end="")
    print(f"{result['machine']['cores']}; {versions}).\n")
