"""Measure what a bare run of a script gives, over several seeds, and write it down as JSON, as a picture, and as the text that
the plain command prints.

    python tools/expected.py dpo              # runs annotated_examples/dpo.py with 5 seeds: expected/dpo.json, .svg, .txt
    python tools/expected.py dpo --picture    # only draws the picture again, from that JSON

Every number on the pages that says what is normal comes from this file: bands of the logged metrics over the steps, the
held-out figures before and after, the time. The smoke test compares its own run with the bands.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = ROOT / "annotated_examples" / "expected"
PACKAGES = ("trl", "transformers", "datasets", "peft", "accelerate", "torch")
SEEDS = (1, 2, 3, 4, 5)
THREADS = 1  # how sums are rounded depends on it; the tests run with one thread too
TIMES = {
    "epoch",
    "step",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
    "train_loss",
    "eps",  # PPO: answers for each second
    "step_time",  # GRPO and RLOO: seconds of a step
}


def machine() -> dict[str, str | int]:
    """What the figures depend on besides versions and seeds."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), name
        )
    found = {"cpu": name, "cores": os.cpu_count() or 0, "threads": THREADS, "python": platform.python_version()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def run(trainer: str, folder: Path, *flags: str) -> dict:
    """One bare run -> its log, held-out figures, seconds and printed text."""
    script = ROOT / "annotated_examples" / f"{trainer}.py"
    command = [sys.executable, str(script), *flags]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    output = folder / "outputs" / f"{trainer}-toy"
    state = json.loads((output / "trainer_state.json").read_text())
    held_out = json.loads((output / "held_out.json").read_text())
    return {"log": state["log_history"], "held_out": held_out, "seconds": held_out["seconds"], "printed": done.stdout}


def training_rows(log: list[dict]) -> list[dict]:
    """What a run logged while it trained: all rows but the evaluations and the summary at the end."""
    return [row for row in log if "train_runtime" not in row and not any(key.startswith("eval_") for key in row)]


def bands(logs: list[list[dict]]) -> dict[str, dict[str, list[float]]]:
    """For each logged key and step: smallest, mean and largest value over the runs."""
    found: dict[str, dict[int, list[float]]] = {}
    for log in logs:
        for row in training_rows(log):
            for key, value in row.items():
                if key not in TIMES:
                    found.setdefault(key, {}).setdefault(row["step"], []).append(value)
    result = {}
    for key, by_step in sorted(found.items()):
        incomplete = [step for step, values in by_step.items() if len(values) != len(logs)]
        if incomplete:
            raise SystemExit(f"{key} was not logged in every run at the steps {incomplete}")
        result[key] = {
            "step": list(by_step),
            "min": [min(values) for values in by_step.values()],
            "mean": [sum(values) / len(values) for values in by_step.values()],
            "max": [max(values) for values in by_step.values()],
        }
    return result


def measure(trainer: str) -> None:
    """Runs the script once for each seed and writes the JSON, only when all runs succeeded."""
    runs = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(trainer, Path(folder), "--seed", str(seed)))
        first, last = runs[-1]["held_out"]["before"], runs[-1]["held_out"]["after"]
        print(f"seed {seed}: {first} -> {last}, {runs[-1]['seconds']:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        plain = run(trainer, Path(folder))
    names = runs[0]["held_out"]["after"]
    result = {
        "trainer": trainer,
        "command": f"python annotated_examples/{trainer}.py --seed SEED",
        "versions": {package: version(package) for package in PACKAGES},
        "machine": machine(),
        "seeds": list(SEEDS),
        "held_out": {
            name: {when: [run["held_out"][when][name] for run in runs] for when in ("before", "after")}
            for name in names
        },
        "train_seconds": [run["seconds"] for run in runs],
        "log": bands([run["log"] for run in (*runs, plain)]),  # the plain command belongs to what is normal too
    }
    EXPECTED.mkdir(exist_ok=True)
    (EXPECTED / f"{trainer}.txt").write_text(plain["printed"])
    (EXPECTED / f"{trainer}.json").write_text(json.dumps(result, indent=1) + "\n")


def digest(trainer: str) -> str:
    """What ties a picture to the figures that it shows."""
    return hashlib.sha256((EXPECTED / f"{trainer}.json").read_bytes()).hexdigest()[:16]


def draw(trainer: str) -> None:
    """The learning curves as SVG: mean over the runs, and the band from the smallest to the largest."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "expected", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    import matplotlib.pyplot as plt

    result = json.loads((EXPECTED / f"{trainer}.json").read_text())
    keys = [key for key in result["log"] if key not in ("learning_rate", "lr", "num_tokens", "episode")]
    columns = 3
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(9, 2 * rows + 0.2), layout="constrained", squeeze=False)
    for key, axis in zip(keys, axes.flat, strict=False):
        band = result["log"][key]
        axis.fill_between(band["step"], band["min"], band["max"], color="#3f7fbf", alpha=0.3, linewidth=0)
        axis.plot(band["step"], band["mean"], color="#2a5d8f", linewidth=1.4)
        axis.set_title(key, fontsize=9)
    for axis in list(axes.flat)[len(keys) :]:
        axis.remove()
    figure.get_layout_engine().set(hspace=0.09)  # a title must not look like the label of the axis above it
    of = "rounds" if trainer == "ppo" else "steps"
    figure.supxlabel(f"{of}; line: mean of the runs, band: from the smallest to the largest", fontsize=9)
    path = EXPECTED / f"{trainer}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None, "Source": digest(trainer)}, facecolor="white")
    print(path.relative_to(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainer", help="the name of a script in annotated_examples, without .py")
    parser.add_argument("--picture", action="store_true", help="only draw the picture again")
    arguments = parser.parse_args()
    if not (ROOT / "annotated_examples" / f"{arguments.trainer}.py").is_file():
        known = sorted(path.stem for path in (ROOT / "annotated_examples").glob("*.py"))
        raise SystemExit(f"there is no script for {arguments.trainer!r}; there are: {', '.join(known)}")
    if not arguments.picture:
        measure(arguments.trainer)
    elif not (EXPECTED / f"{arguments.trainer}.json").is_file():
        raise SystemExit(f"nothing is measured for {arguments.trainer!r} yet: run this without --picture first")
    draw(arguments.trainer)


if __name__ == "__main__":
    main()
