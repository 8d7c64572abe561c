"""The tables of what tools/gpu.py has measured, for cog: one set for each GPU in annotated_examples/expected/gpu.

Each function prints Markdown. What has no figure says so: a script that is not measured, one whose settings have
changed since it was, one that ran out of memory.
"""

import json
import math
from pathlib import Path

import gpu
from tables import TRAINERS, number

PHASES = ("generation", "scoring", "forward", "backward", "optimizer", "rest")
NOT_MEASURED = "not measured"


def table(head: list[str], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def record(result: dict, name: str, way: str, lever: str | None = None) -> dict:
    """One job of the JSON; one that is missing or out of date counts as not measured."""
    found = result["jobs"].get(gpu.key({"name": name, "way": way, "lever": lever}))
    if found is None or name not in gpu.scripts() or found["digest"] != gpu.settings_digest(name, way == "toy"):
        return {"status": NOT_MEASURED}
    return found


def has_figures(found: dict) -> bool:
    return found["status"] == "measured"


def gigabytes(found: dict, what: str = "allocated") -> str:
    return f"{found[what] / 1e9:.1f}" if what in found else "–"


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def speed(result: dict, way: str) -> None:
    """Memory, speed and where the time goes, a row for each trainer."""
    head = ["", "GB allocated", "GB reserved", "s/step", "tokens/s", "sampled tokens/s", "MFU", *PHASES]
    rows = []
    for name in TRAINERS:
        found = record(result, name, way)
        if has_figures(found):
            cells = [gigabytes(found), gigabytes(found, "reserved"), number(found["seconds_per_step"])]
            sampled = found["generated_per_second"]
            cells += [f"{found['tokens_per_second']:,.0f}", f"{sampled:,.0f}" if sampled else "–", share(found["mfu"])]
            cells += [share(found["phases"].get(phase, 0.0)) for phase in PHASES]
        else:
            cells = [found["status"]] + [""] * (len(head) - 2)
        rows.append([f"`{name}`", *cells])
    table(head, rows)


def shortened(result: dict, way: str) -> None:
    """A sentence for each group of trainers whose answers or steps were shortened alike."""
    groups = {}
    for name in TRAINERS:
        found = record(result, name, way).get("shortened", {})
        if found:
            groups.setdefault(json.dumps(found), []).append(f"`{name}`")
    for found, names in groups.items():
        found, parts = json.loads(found), []
        if "answers" in found:
            parts.append("answers of {} tokens; the settings allow {}".format(*found["answers"]))
        if "rows" in found:
            parts.append("{} rows a step; the settings take {}".format(*found["rows"]))
        print(f"{', '.join(names)}: {'. '.join(part.capitalize() for part in parts)}.\n")


def largest_difference(ours: dict, plain: dict) -> tuple[float | None, float | None]:
    """Over the steps: of the losses, and of the gradient norms as a share of their mean."""
    loss = "loss" if "loss" in ours["curves"] else "loss/value_avg"  # PPO logs two

    def gap(name: str) -> tuple[float, float] | None:
        pairs = list(zip(ours["curves"].get(name, ()), plain["curves"].get(name, ()), strict=False))
        if not pairs:
            return None
        return max(abs(a - b) for a, b in pairs), sum(abs(b) for _, b in pairs) / len(pairs)

    losses, norms = gap(loss), gap("grad_norm")
    return losses and losses[0], norms and norms[0] / norms[1] if norms and norms[1] else None


def ratios(result: dict) -> dict[str, float]:
    """trainer -> how many times as many tokens in a second as with TRL's defaults, where both are measured."""
    found = {}
    for name in TRAINERS:
        ours, plain = record(result, name, "ours"), record(result, name, "plain")
        if has_figures(ours) and has_figures(plain):
            found[name] = ours["tokens_per_second"] / plain["tokens_per_second"]
    return found


def compared(result: dict) -> None:
    """Our settings and TRL's defaults side by side."""
    head = [
        "",
        "tokens/s: TRL's defaults",
        "ours",
        "ratio",
        "GB: TRL's defaults",
        "ours",
        "rows at once: TRL's defaults",
    ]
    head += ["ours", "gradient norms differ by", "losses by"]
    times, rows = ratios(result), []
    for name in TRAINERS:
        ours, plain = record(result, name, "ours"), record(result, name, "plain")
        if name in times:
            loss, norm = largest_difference(ours, plain)
            cells = [f"{found['tokens_per_second']:,.0f}" for found in (plain, ours)] + [f"**{times[name]:.2f}**"]
            cells += [gigabytes(plain), gigabytes(ours), str(plain["batch"]), str(ours["batch"])]
            cells += ["–" if norm is None else f"{100 * norm:.1f} %", "–" if loss is None else number(loss)]
        else:
            statuses = ["" if has_figures(found) else found["status"] for found in (plain, ours)]
            cells = statuses + [""] * (len(head) - 3)
        rows.append([f"`{name}`", *cells])
    table(head, rows)
    if times:
        mean = math.exp(sum(map(math.log, times.values())) / len(times))
        print(f"Geometric mean over {len(times)} of {len(TRAINERS)} trainers: **{mean:.2f}** times.\n")
        print(
            "The last two columns say whether both sides computed the same: the largest difference between two steps with the "
            "same rows. Look at the gradient norms, as a share of their mean. The weights are random, so a loss is near log 2 "
            "or near the logarithm of the vocabulary whatever the settings do, and equal losses prove little.\n"
        )


def levers(result: dict) -> None:
    """What each lever gives on top of TRL's defaults: tokens in a second, and memory, as multiples of theirs."""
    rows = []
    for name in TRAINERS:
        plain, cells = record(result, name, "plain"), []
        for lever, (_, _, takers) in gpu.LEVERS.items():
            found = record(result, name, "plain", lever)
            if takers is not None and name not in takers:
                cells.append("")
            elif has_figures(found) and has_figures(plain):
                cell = f"{found['tokens_per_second'] / plain['tokens_per_second']:.2f}"
                if "allocated" in found and "allocated" in plain:
                    cell += f", GB {found['allocated'] / plain['allocated']:.2f}"
                cells.append(cell)
            else:
                cells.append(NOT_MEASURED if has_figures(found) else found["status"])
        rows.append([f"`{name}`", *cells])
    table(["", *gpu.LEVERS], rows)


def toy(result: dict) -> None:
    """The bare command."""
    rows = []
    for name in TRAINERS:
        found = record(result, name, "toy")
        cells = [found["status"], ""]
        if has_figures(found):
            figure = next(iter(found["after"]))
            cells = [
                f"{found['seconds']:.0f}",
                f"{figure}: {found['before'][figure]:.3f} → {found['after'][figure]:.3f}",
            ]
        rows.append([f"`{name}`", *cells])
    table(["", "seconds of training", "held out"], rows)


def measured_with(result: dict) -> None:
    """The machine and the versions in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    memory = f"{result['memory'] / 1e9:.0f} GB, " if result.get("memory") else ""
    print(f"\n{result['gpu']}, {memory}CUDA {result.get('cuda')}, Python {result['python']}; {versions}.\n")


def everything(folder: Path = gpu.MEASURED, level: int = 2) -> None:
    """All tables of all GPUs; without a measurement, the list of what is missing."""
    files = sorted(folder.glob("*.json"))
    if not files:
        table(["", "real model on a GPU"], [[f"`{name}`", NOT_MEASURED] for name in TRAINERS])
        print("`make gpu` measures them on any machine with an NVIDIA GPU; `make sync` then writes this table.\n")
    for file in files:
        result, mark = json.loads(file.read_text()), "#" * level
        print(f"\n{mark} {result['gpu']}")
        measured_with(result)
        print(f"{mark}# These scripts' settings, Qwen3-0.6B")
        speed(result, "ours")
        shortened(result, "ours")
        print(f"{mark}# Beside TRL's defaults")
        compared(result)
        shortened(result, "plain")
        print(f"{mark}# What each lever gives")
        print(
            "\nTokens in a second and memory as multiples of those with TRL's defaults; the lever is all that differs. With "
            "Liger, `dpo`, `kto`, `grpo` and `gkd` have `tf32` too, because TRL computes those losses in float32; `reward` and "
            "`prm` do without its cross entropy, which their models cannot use."
        )
        levers(result)
        print(f"{mark}# Qwen3-8B with an adapter")
        speed(result, "lora")
        shortened(result, "lora")
        print(f"{mark}# The toy run")
        toy(result)
