"""What each setting of the toy runs is worth: change one, keep the rest, look at validation data.

    python tools/settings.py              # what is missing: annotated_examples/expected/settings.json
    python tools/settings.py dpo kto      # these again, the others keep their figures
    python tools/settings.py --jobs 2     # as many runs at a time (default: one for each core)

Each script runs unchanged with its toy settings, and again with each change of CHANGES, with SEEDS. It stands in a folder of
its own, beside a toy world whose split `test` holds the rows of `validation`: what is called held out there is what settings
may be chosen on. Of each run this is kept: the held-out figures after training, the loss over the steps, and each logged
metric at the first and the last step. Of the scripts with a reward model also this, from an answer to each validation prompt:

fooled   the share of the answers that are wrong, and that the shipped reward model takes for right: it gives them more than 0
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import expected
from expected import EXPECTED, ROOT, THREADS, TIMES
from tables import TRAINERS

EXAMPLES = ROOT / "annotated_examples"
RESULT = EXPECTED / "settings.json"
SEEDS = (1, 2, 3)
AS_SHIPPED = ""
# script -> what is changed in it, one run each; an empty text or 0 turns a setting off
CHANGES = {
    "sft": ("learning_rate=1e-3",),
    "reward": (
        "system_message=",
        "new_layers=0 new_learning_rate=0",
        "system_message= new_layers=0 new_learning_rate=0",
        "learning_rate=1e-3 new_learning_rate=0",
    ),
    "dpo": ("beta=0.1",),
    "kto": ("beta=0.1", "undesirable_weight=1"),
    "orpo": ("beta=0.1",),
    "cpo": ("cpo_alpha=0", "cpo_alpha=1"),
    "bco": ("beta=0.1",),
    "ppo": ("kl_coef=0.05", "cliprange_value=0.2", "temperature=0.7"),
    "grpo": ("learning_rate=1e-3", "num_generations=2"),
    "rloo": ("learning_rate=1e-4",),
    "online_dpo": ("beta=0.1",),
    "nash_md": ("temperature=0.7",),
    "gkd": ("temperature=0.9", "lmbda=0", "lmbda=1"),
    "xpo": ("beta=0.1",),
    "prm": ("prompt_prefix=", "new_layers=0 new_learning_rate=0", "prompt_prefix= new_layers=0 new_learning_rate=0"),
}
PAIRED = ("dpo", "kto", "orpo", "cpo", "bco")  # they log what they do to the good answers and to the bad ones
JUDGED = ("ppo", "online_dpo", "nash_md", "xpo")  # they learn from the shipped reward model


def flags(change: str) -> list[str]:
    """What a change is on the command line: "beta=0.1" -> ["--beta", "0.1"]."""
    return [word for part in change.split() for word in ("--{}\n{}".format(*part.split("=", 1))).split("\n")]


def validation_world(folder: Path) -> Path:
    """The scripts beside a toy world that shows its validation rows where they look for the test rows."""
    for name in TRAINERS:
        shutil.copy(EXAMPLES / f"{name}.py", folder)
    toy = folder / "toy"
    shutil.copytree(EXAMPLES / "toy", toy, ignore=shutil.ignore_patterns("__pycache__"))
    for data in (toy / "data").iterdir():
        (data / "validation.jsonl").replace(data / "test.jsonl")
    return folder


def fooled(model: Path, world: Path, seed: int) -> float:
    """The share of sampled answers that are wrong and that the reward model scores above 0."""
    import reward_hacking as hacking
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    hacking.quiet()
    rows = [json.loads(line) for line in (world / "toy/data/prompt_only/test.jsonl").read_text().splitlines()]
    tokenizer, policy = hacking.tokenizer(), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    batch = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    set_seed(seed)
    with torch.no_grad():
        ids = policy.generate(**batch, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=64)
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    chats = [row["prompt"] + [{"role": "assistant", "content": text}] for row, text in zip(rows, texts, strict=True)]
    scores = hacking.score(hacking.classifier(EXAMPLES / "toy" / "reward_model"), chats)
    wrong = [not text.endswith(f"#{row['answer']}") for row, text in zip(rows, texts, strict=True)]
    return sum(is_wrong and score > 0 for is_wrong, score in zip(wrong, scores, strict=True)) / len(rows)


def run(name: str, change: str, seed: int, world: Path, *more: str) -> dict:
    """One run of a script beside `world`, in a folder of its own, and what is kept of it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(world / f"{name}.py"), "--seed", str(seed), *flags(change), *more]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(THREADS),
            "HF_DATASETS_CACHE": str(Path(folder) / "cache"),
        }
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        output = Path(folder) / "outputs" / f"{name}-toy"
        log = expected.training_rows(json.loads((output / "trainer_state.json").read_text())["log_history"])
        found = {"seed": seed, "held_out": json.loads((output / "held_out.json").read_text())["after"]}
        if name in JUDGED:
            command = [sys.executable, __file__, "--fooled", str(output), str(world), str(seed)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found["fooled"] = float(done.stdout)
    kept = {key for row in log for key in row} - TIMES
    for place, rows in (("first", log), ("last", log[::-1])):
        found[place] = {key: next(row[key] for row in rows if key in row) for key in sorted(kept)}
    found["loss"] = [row["loss"] for row in log if "loss" in row]
    return found


def missing(names: list[str], result: dict) -> list[tuple[str, str]]:
    """The (script, change) that have no figures yet: the shipped settings first."""
    wanted = [(name, change) for name in names for change in (AS_SHIPPED, *CHANGES[name])]
    wanted.sort(key=lambda one: one[1] != AS_SHIPPED)
    return [(name, change) for name, change in wanted if change not in result["runs"].get(name, {})]


def measure(names: list[str], again: bool, jobs: int) -> None:
    """Runs what is missing, or all of `names` again, and writes the JSON after each change."""
    made = {"versions": {package: version(package) for package in expected.PACKAGES}, "machine": expected.machine()}
    result = {"command": "python tools/settings.py", "seeds": list(SEEDS), **made, "runs": {}}
    if RESULT.is_file():
        earlier = json.loads(RESULT.read_text())
        if made != {key: earlier[key] for key in made}:
            raise SystemExit(
                f"{RESULT.name} was made with other versions or on another machine: remove it, measure all"
            )
        result["runs"] = earlier["runs"]
    for name in names if again else ():
        result["runs"].pop(name, None)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        world = validation_world(Path(folder))
        started = [
            (name, change, [pool.submit(run, name, change, seed, world) for seed in SEEDS])
            for name, change in missing(names, result)
        ]
        for name, change, waiting in started:
            runs = [one.result() for one in waiting]
            result["runs"].setdefault(name, {})[change] = runs
            order = {
                name: {one: done[one] for one in (AS_SHIPPED, *CHANGES[name]) if one in done}
                for name in TRAINERS
                if (done := result["runs"].get(name))
            }
            RESULT.write_text(json.dumps(result | {"runs": order}, indent=1) + "\n")
            print(name, change or "as shipped", [next(iter(one["held_out"].values())) for one in runs], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="scripts to measure again (default: what is missing)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--fooled", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fooled:
        model, world, seed = arguments.fooled
        print(fooled(Path(model), Path(world), int(seed)))
        return
    if unknown := set(arguments.names) - set(CHANGES):
        raise SystemExit(f"there is no script for {', '.join(sorted(unknown))}; there are: {', '.join(CHANGES)}")
    measure(arguments.names or list(CHANGES), bool(arguments.names), arguments.jobs)


if __name__ == "__main__":
    main()
