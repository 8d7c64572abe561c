"""Put the trainers side by side on the toy world: what each gained, and what it cost.

    python tools/compare.py             # runs each measured script once with counters: expected/compare.json and .svg
    python tools/compare.py dpo kto     # only these; the others keep their figures
    python tools/compare.py --picture   # only draws the picture again

Held-out figures and seconds come from the five seeds in expected/<name>.json. The rest is counted in one run of the bare
command with seed 1, while its trainer trains and not while the script looks at held-out data:

forward passes    calls of a transformer's body, whichever model it belongs to (policy, reference, teacher, reward, value)
forward tokens    token positions that went through these calls, padding included
generated tokens  tokens that `generate` returned behind the prompts, end tokens included, padding not
memory            the growth of the process's resident memory: its highest point minus where it stood before training
KL                mean over held-out prompts of log p(answer) - log p_base(answer), answers sampled from the trained policy
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import expected
from expected import EXPECTED, ROOT
from tables import NAMES, TRAINERS

SEED = 1
POLICIES = tuple(name for name in TRAINERS if name not in ("reward", "prm"))


class Counter:
    """Counts what passes through transformers' models while `on`."""

    def __init__(self):
        self.on = False
        self.forward_passes = self.forward_tokens = self.generated_tokens = 0

    def watch(self) -> None:
        from transformers import GenerationMixin
        from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

        forward, generate = Qwen3Model.forward, GenerationMixin.generate

        def counted_forward(model, input_ids=None, *arguments, **named):
            if self.on:
                seen = input_ids if input_ids is not None else named["inputs_embeds"][..., 0]
                self.forward_passes += 1
                self.forward_tokens += seen.numel()
            return forward(model, input_ids, *arguments, **named)

        def counted_generate(model, inputs=None, *arguments, **named):
            output = generate(model, inputs, *arguments, **named)
            if self.on:
                prompt = inputs if inputs is not None else named["input_ids"]
                ids = output if hasattr(output, "shape") else output.sequences
                self.generated_tokens += until_end(ids[:, prompt.shape[1] :], model.generation_config.eos_token_id)
            return output

        Qwen3Model.forward, GenerationMixin.generate = counted_forward, counted_generate


def until_end(completions, eos_token_id) -> int:
    """Tokens of (rows, longest) up to and with each row's first end token."""
    import torch

    ends = torch.isin(completions, torch.as_tensor(eos_token_id, device=completions.device))
    return int((ends.cumsum(1) - ends.long() == 0).sum())


class Memory:
    """The highest resident memory of this process while it runs, in bytes; sampled every 10 ms."""

    def __enter__(self):
        import psutil

        self.process, self.running = psutil.Process(), True
        self.start = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()
        return self

    def sample(self) -> None:
        while self.running:
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.01)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()


def load(name: str):
    path = ROOT / "annotated_examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *flags: str) -> dict:
    """One bare run in this process and this folder, counted. The trained model is left in outputs/."""
    script, counter, found = load(name), Counter(), {}
    counter.watch()
    build = script.build

    def counted_build(*arguments):
        trainer = build(*arguments)
        train = trainer.train

        def counted_train(**named):
            counter.on = True
            with Memory() as memory:
                result = train(**named)
            counter.on = False
            found["memory"] = memory.peak - memory.start
            return result

        trainer.train = counted_train
        return trainer

    script.build = counted_build
    sys.argv = [f"{name}.py", "--seed", str(SEED), *flags]
    script.main()
    found |= {
        "data": Path(script.TOY["dataset_name"]).name,
        "forward_passes": counter.forward_passes,
        "forward_tokens": counter.forward_tokens,
        "generated_tokens": counter.generated_tokens,
    }
    if name in POLICIES:
        found["kl"] = kl_from_base(Path(script.TOY["output_dir"]), Path(script.WORLD))
    return found


def kl_from_base(output: Path, world: Path, max_new_tokens: int = 64) -> float:
    """Mean log p - log p_base of answers that the trained policy samples to the held-out prompts, in nats per answer."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    tokenizer = AutoTokenizer.from_pretrained(output, padding_side="left")
    policy, base = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (output, world / "policy")
    )
    prompts = list(load_dataset(str(world / "data" / "prompt_only"), split="test")["prompt"])
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    set_seed(SEED)
    with torch.no_grad():
        ids = policy.generate(
            **batch, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=max_new_tokens
        )
        start = batch["input_ids"].shape[1]
        ends = ids[:, start:] == tokenizer.eos_token_id
        scored = ends.cumsum(1) - ends.long() == 0  # up to and with the first end token
        mask = torch.cat([batch["attention_mask"], scored.long()], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        sums = []
        for model in (policy, base):
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, start - 1 : -1]
            logps = logits.log_softmax(-1).gather(-1, ids[:, start:, None]).squeeze(-1)
            sums.append((logps * scored).sum(1))
    return (sums[0] - sums[1]).mean().item()


def measure(names: list[str]) -> None:
    """Runs each script once, in a process and a folder of its own, and writes the JSON after each."""
    path = EXPECTED / "compare.json"
    made = {"versions": {package: version(package) for package in expected.PACKAGES}, "machine": expected.machine()}
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    kept = {name: found for name, found in earlier.get("trainers", {}).items() if name not in names}
    if kept and made != {key: earlier[key] for key in made}:
        raise SystemExit(f"{path.name} was made with other versions or on another machine: measure all, without names")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(expected.THREADS)}
            command = [sys.executable, __file__, "--one", name, "--into", str(Path(folder) / "found.json")]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
            kept[name] = json.loads((Path(folder) / "found.json").read_text())
        print(name, kept[name], flush=True)
        trainers = {name: kept[name] for name in TRAINERS if name in kept}
        result = {"command": "python tools/compare.py", "seed": SEED, **made, "trainers": trainers}
        path.write_text(json.dumps(result, indent=1) + "\n")


def rows() -> list[dict]:
    """One row for each trainer of compare.json, joined with the five seeds of its own measurement."""
    found = []
    for name, costs in json.loads((EXPECTED / "compare.json").read_text())["trainers"].items():
        own = json.loads((EXPECTED / f"{name}.json").read_text())
        figure, values = next(iter(own["held_out"].items()))
        seconds = own["train_seconds"]
        found.append({"name": name, "figure": figure, **values, "seconds": sum(seconds) / len(seconds), **costs})
    return found


def digest() -> str:
    """What ties the picture to the figures that it shows."""
    return hashlib.sha256(json.dumps(rows()).encode()).hexdigest()[:16]


def draw() -> None:
    """Held-out right answers of every policy, a dot for each seed, over its seconds of training."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "compare", "font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False}
    )
    import matplotlib.pyplot as plt

    policies = [row for row in rows() if row["name"] in POLICIES]
    policies.sort(key=lambda row: sum(row["after"]))
    # Narrow, with large letters: it is read on a phone too
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(5.6, 0.32 * len(policies) + 1.1),
        layout="constrained",
        sharey=True,
        gridspec_kw={"width_ratios": (3, 2)},
    )
    for place, row in enumerate(policies):
        left.plot(row["before"], [place] * len(row["before"]), "o", color="#9aa5ad", markersize=4)
        left.plot(row["after"], [place] * len(row["after"]), "o", color="#2a5d8f", markersize=4)
        right.barh(place, row["seconds"], color="#3f7fbf", height=0.6)
    left.set_yticks(range(len(policies)), [NAMES[row["name"]] for row in policies])
    left.set_xlim(0.55, 1.005)
    left.set_title("right answers, held out\ngrey: before, blue: after, 5 seeds", fontsize=10.5)
    right.set_title("seconds of training\n(one thread)", fontsize=10.5)
    path = EXPECTED / "compare.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None, "Source": digest()}, facecolor="white")
    print(path.relative_to(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="scripts to run (default: all that are measured)")
    parser.add_argument("--picture", action="store_true", help="only draw the picture again")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        arguments.into.write_text(json.dumps(run(arguments.one)))
        return
    measured = [name for name in TRAINERS if (EXPECTED / f"{name}.json").is_file()]
    if unknown := set(arguments.names) - set(measured):
        raise SystemExit(f"not measured yet: {', '.join(sorted(unknown))}. Run `make expected TRAINER=NAME` first")
    if not arguments.picture:
        measure(arguments.names or measured)
    draw()


if __name__ == "__main__":
    main()
