"""The tables that stand in Markdown pages and are generated there by cog (`make sync`, checked by `make check`).

Each function prints Markdown. It reads its numbers from the one place where they are true: a config's dataclass in the
installed TRL, or a committed measurement in annotated_examples/expected.
"""

import ast
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# In the order of this repository: supervised, preferences, reinforcement learning, online and advanced.
NAMES = {  # the name of a trainer's module, script and walkthrough -> that of its class, without "Trainer"
    **{"sft": "SFT", "reward": "Reward", "dpo": "DPO", "kto": "KTO", "orpo": "ORPO", "cpo": "CPO", "bco": "BCO"},
    **{"ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO", "online_dpo": "OnlineDPO", "nash_md": "NashMD", "gkd": "GKD"},
    **{"xpo": "XPO", "prm": "PRM"},
}
TRAINERS = tuple(NAMES)


def parts() -> None:
    """The script, the walkthrough and the card of each trainer, for the README."""
    import quick_reference

    print("\n| trainer | script | walkthrough | card |\n| --- | --- | --- | --- |")
    for name, trainer in NAMES.items():
        card = f"[{quick_reference.title(name)}](ALL_TRAINERS_QUICK_REF.md#{quick_reference.anchor(name)})"
        script, page = f"annotated_examples/{name}.py", f"annotated_trainers/{name}.md"
        print(f"| {trainer} | [{name}.py]({script}) | [line by line]({page}) | {card} |")
    print()


IN_SHORT = {  # a quick fact -> where its short form ends
    "On-policy or off-policy": "[:;]",
    "Models in memory": "$",
    "Data set type": "[:;]",
}


def quick_facts(text: str) -> dict[str, str]:
    """The table below "Quick facts" of a walkthrough: first cell -> second cell."""
    table = text.split("\n## Quick facts\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", table, re.M)
    return {name: value for name, value in rows if not name.startswith("---")}


def walkthroughs() -> None:
    """A row for each walkthrough: its quick facts in short, and how many lines of TRL it explains."""
    from trl_source import Source
    from walkthroughs import PAGES, Page

    source, code, shown = Source.installed(), 0, 0
    print("\n| walkthrough | whose answers | models in memory | data | lines explained |")
    print("| --- | --- | --- | --- | ---: |")
    for path in (PAGES / f"{name}.md" for name in TRAINERS):
        if not path.is_file():
            continue
        text = path.read_text("utf-8")
        facts, total = quick_facts(text), Page(text, path.name, source).rows()[-1]
        code, shown = code + len(total.code), shown + len(total.shown)
        cells = [f"[{text.split(',', 1)[0].removeprefix('# ')}]({path.name})"]
        cells += [re.split(cut, facts[name])[0].replace("](#", f"]({path.name}#") for name, cut in IN_SHORT.items()]
        print("| " + " | ".join(cells) + f" | {len(total.shown):,} of {len(total.code):,} |")
    print(f"| **together** | | | | {shown:,} of {code:,} ({shown / code:.1%}) |\n")


def errors() -> None:
    """The errors in TRL's code that the walkthroughs have found: the bold beginning of each point, and where it stands."""
    from walkthroughs import PAGES

    print("\n| walkthrough | error |\n| --- | --- |")
    for name in TRAINERS:
        path = PAGES / f"{name}.md"
        text = path.read_text("utf-8") if path.is_file() else ""
        section = text.partition("\n### Errors in the code\n")[2]
        for bold in re.findall(r"^- \*\*(.+?)\*\*", re.split(r"^##", section, flags=re.M)[0], re.M | re.S):
            words = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", " ".join(bold.split()).rstrip("."))
            print(f"| [{NAMES[name]}]({name}.md#errors-in-the-code) | {words} |")
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
    """For each logged metric: its band over the runs at the first and the last logged step."""
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
    print("\n| seed | " + " | ".join(f"{name}, before and after" for name in names) + " | seconds of training |")
    print("| --- |" + " --- |" * (len(names) + 1))
    for index, seed in enumerate(result["seeds"]):
        pairs = [[result["held_out"][name][when][index] for when in ("before", "after")] for name in names]
        cells = ["\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}".join(map(figure, pair)) for pair in pairs]
        print(f"| {seed} | " + " | ".join(cells) + f" | {result['train_seconds'][index]:.0f} |")
    print()


def figure(value: float) -> str:
    """Three decimals, or two significant digits where those would hide them."""
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def made_with(result: dict) -> str:
    """The versions and the machine of a measurement."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = ", ".join(
        f"{key}: {value}" if key in ("cores", "threads") else str(value)
        for key, value in result["machine"].items()
        if key != "python"
    )
    return f"{versions}; {machine}"


def measured_with(trainer: str) -> None:
    """One line: the command, the versions and the machine of a measurement."""
    result = measurement(trainer)
    print(f"\n`{result['command']}` with seeds {', '.join(map(str, result['seeds']))}; {made_with(result)}.\n")


def printed(trainer: str) -> None:
    """What the bare command prints, from the committed capture, with `...` in place of the lines of metrics."""
    from stage import abridged

    path = Path("annotated_examples") / "expected" / f"{trainer}.txt"
    print(f"\n<!-- output: {path.as_posix()} -->\n```text\n{abridged((ROOT / path).read_text())}\n```\n")


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


def scripts() -> None:
    """Each script with the first sentence of its docstring."""
    print("\n| script | what it does |\n| --- | --- |")
    for name in TRAINERS:
        docstring = ast.get_docstring(ast.parse((ROOT / "annotated_examples" / f"{name}.py").read_text()))
        sentence = " ".join(docstring.split("\n\n")[0].split())
        print(f"| [{name}.py]({name}.py) | {sentence} |")
    print()


def compare() -> None:
    """What each trainer learned on the toy world, from the five seeds of each and expected/compare.json."""
    import compare

    print("\n| script | data | held out | before | after, mean | after, range | KL, nats | seconds |")
    print("| --- | --- | --- |" + " ---: |" * 5)
    for row in compare.rows():
        before, after = (sum(row[when]) / len(row[when]) for when in ("before", "after"))
        kl = f"{row['kl']:.2f}" if "kl" in row else "-"
        cells = [f"[{row['name']}.py]({row['name']}.py)", f"`{row['data']}`", row["figure"], f"{before:.3f}"]
        cells += [f"{after:.3f}", f"{min(row['after']):.3f} to {max(row['after']):.3f}", kl, f"{row['seconds']:.0f}"]
        print("| " + " | ".join(cells) + " |")
    print()


def costs() -> None:
    """What each trainer spent while it trained, from expected/compare.json."""
    import compare

    print("\n| script | forward passes | tokens forward | tokens generated | memory, MB |\n| --- |" + " ---: |" * 4)
    for row in compare.rows():
        counts = [f"{row[key]:,}" for key in ("forward_passes", "forward_tokens", "generated_tokens")]
        print(
            "| " + " | ".join([f"[{row['name']}.py]({row['name']}.py)", *counts, f"{row['memory'] / 1e6:.0f}"]) + " |"
        )
    print()


def compared_with() -> None:
    """One line: the command, the versions and the machine of the comparison."""
    result = json.loads((ROOT / "annotated_examples" / "expected" / "compare.json").read_text())
    print(f"\n`{result['command']}`, counted with seed {result['seed']}; {made_with(result)}.\n")


def chain(name: str) -> None:
    """A chain of scripts: the command of each stage, and what it gave with each seed."""
    result = json.loads((ROOT / "annotated_examples" / "expected" / f"chain_{name}.json").read_text())
    print("\n| command | held out | before | after | seconds |\n| --- | --- | --- | --- | --- |")
    for stage in result["stages"]:
        before, after = (", ".join(f"{value:.3f}" for value in stage[when]) for when in ("before", "after"))
        seconds = ", ".join(f"{value:.0f}" for value in stage["seconds"])
        print(f"| `{stage['command']}` | {stage['figure']} | {before} | {after} | {seconds} |")
    print(
        f"\n`{result['command']}`, seeds {', '.join(map(str, result['seeds']))}, in this order; {made_with(result)}.\n"
    )


def setting_of(script, name: str):
    """What a toy run has for a setting: its own value, or the default of TRL's config."""
    if name in script.TOY:
        return script.TOY[name]
    found = next(field for flags in script.FLAGS for field in fields(flags) if field.name == name)
    return found.default


def written(value) -> str:
    """A setting as the scripts write it: 2e-4, 30, mark; `off` for none, `on` for a text that a table cannot hold."""
    if value in ("", None):
        return "off"
    if "|" in str(value):
        return "on"
    return re.sub(r"e-0", "e-", f"{value:.0e}") if isinstance(value, float) and 0 < value < 0.01 else str(value)


def spread(runs: list[dict], key: str | None = None) -> str:
    """Mean and range over the seeds, of the first held-out figure or of `key`."""
    values = [next(iter(run["held_out"].values())) if key is None else run[key] for run in runs]
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def change_in_words(script, change: str) -> str:
    """`beta` 1.0 → 0.1, from "beta=0.1"."""
    parts = [part.partition("=") for part in change.split()]
    words = []
    for name, _, new in parts:
        default = next(field.default for kind in script.FLAGS for field in fields(kind) if field.name == name)
        off = not new or (new == "0" and default is None)  # 0 in place of a number that need not be there
        words.append(f"`{name}` {written(setting_of(script, name))} → {'off' if off else new}")
    return ", ".join(words)


def settings_changed() -> None:
    """What each change gave on validation rows, from expected/settings.json, and one thing that shows why."""
    import compare
    import settings

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values)

    print("\n| script | changed | as shipped | with the change | also |\n| --- | --- | --- | --- | --- |")
    for name, changes in measurement("settings")["runs"].items():
        script, shipped = compare.load(name), changes[""]
        for change, runs in changes.items():
            if not change:
                continue
            also = "-"
            if name in settings.JUDGED:
                before, after = (mean(run["fooled"] for run in some) for some in (shipped, runs))
                also = f"fooled {before:.3f} → {after:.3f}"
            elif name in settings.PAIRED:
                before, after = (mean(run["last"]["logps/chosen"] for run in some) for some in (shipped, runs))
                also = f"`logps/chosen` {before:.2f} → {after:.2f}"
            cells = [f"[{name}.py]({name}.py)", change_in_words(script, change), spread(shipped), spread(runs), also]
            print("| " + " | ".join(cells) + " |")
    print()


def settings_with() -> None:
    """One line: the command, the seeds, the versions and the machine of that measurement."""
    result = measurement("settings")
    print(f"\n`{result['command']}`, seeds {', '.join(map(str, result['seeds']))}; {made_with(result)}.\n")
