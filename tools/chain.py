"""Run scripts one after the other, each on the folder that an earlier one has written.

    python tools/chain.py ppo              # sft.py -> reward.py -> ppo.py, in outputs/chain-ppo
    python tools/chain.py --list           # the chains, as the commands that they are
    python tools/chain.py ppo --measure    # three seeds: annotated_examples/expected/chain_ppo.json
    python tools/chain.py ppo -- --max_steps 2     what follows -- goes to every script

Every stage looks at the same held-out data, so the figures of a chain can be read from top to bottom.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import expected
from expected import EXPECTED, ROOT

EXAMPLES = ROOT / "annotated_examples"
SEEDS = (1, 2, 3)
SFT, REWARD = "outputs/sft-toy", "outputs/reward-toy"
FEW = ["--max_steps", "3"]  # 48 demonstrations; the 960 of the plain command leave nothing to gain
CHAINS = {  # name -> its stages: script and flags
    "ppo": [
        ("sft", FEW),
        ("reward", ["--model_name_or_path", SFT]),
        ("ppo", ["--model_name_or_path", SFT, "--reward_model_path", REWARD]),
    ],
    "dpo": [("sft", FEW), ("dpo", ["--model_name_or_path", SFT])],
    "online": [("reward", []), *((name, ["--reward_model_path", REWARD]) for name in ("online_dpo", "nash_md", "xpo"))],
}


def command(script: str, *flags: str) -> str:
    """A stage as a reader would type it."""
    return " ".join(["python", f"annotated_examples/{script}.py", *flags])


def run(chain: str, folder: Path, *more: str) -> list[dict]:
    """Runs a chain in a folder -> for each stage its held-out figure before and after, and its seconds of training."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(expected.THREADS)}
    folder.mkdir(parents=True, exist_ok=True)  # a script replaces its own earlier toy run, and refuses any other
    stages = []
    for script, flags in CHAINS[chain]:
        print(f"\n$ {command(script, *flags, *more)}", flush=True)
        done = subprocess.run([sys.executable, EXAMPLES / f"{script}.py", *flags, *more], cwd=folder, env=environment)
        if done.returncode:
            raise SystemExit(f"{chain}: the chain ends here, {script}.py gave {done.returncode}")
        result = json.loads((folder / "outputs" / f"{script}-toy" / "held_out.json").read_text())
        figure = next(iter(result["after"]))
        values = {when: result[when][figure] for when in ("before", "after")}
        stages.append({"script": script, "figure": figure, **values, "seconds": result["seconds"]})
    print()
    for stage in stages:
        values = f"{stage['before']:.3f} -> {stage['after']:.3f}"
        print(f"{stage['script']:12}{stage['figure']:16}{values}   {stage['seconds']:.0f} s")
    return stages


def measure(chain: str) -> None:
    """Runs a chain once for each seed and writes the JSON, only when all runs succeeded."""
    runs = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(chain, Path(folder), "--seed", str(seed)))
    stages = [
        {
            "command": command(script, *flags),
            "script": script,
            "figure": runs[0][place]["figure"],
            **{key: [stages[place][key] for stages in runs] for key in ("before", "after", "seconds")},
        }
        for place, (script, flags) in enumerate(CHAINS[chain])
    ]
    result = {
        "chain": chain,
        "command": f"python tools/chain.py {chain} --measure",
        "versions": {package: version(package) for package in expected.PACKAGES},
        "machine": expected.machine(),
        "seeds": list(SEEDS),
        "stages": stages,
    }
    (EXPECTED / f"chain_{chain}.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chain", nargs="?", choices=CHAINS)
    parser.add_argument("--list", action="store_true", help="print the chains and run nothing")
    parser.add_argument("--measure", action="store_true", help="run it with three seeds and write down the figures")
    parser.add_argument("--folder", type=Path, help="where to run it (default: outputs/chain-NAME)")
    arguments = parser.parse_args(argv[:cut])
    if arguments.list or not arguments.chain:
        for chain, stages in CHAINS.items():
            print(f"{chain}:", *(command(script, *flags) for script, flags in stages), sep="\n  ")
    elif arguments.measure:
        measure(arguments.chain)
    else:
        folder = arguments.folder or Path("outputs") / f"chain-{arguments.chain}"
        run(arguments.chain, folder, *argv[cut + 1 :])
        print(f"\nThe models are in {folder / 'outputs'}.")


if __name__ == "__main__":
    main()
