"""Train the toy policy against rewards that can be fooled, and watch the reward and the truth.

    python tools/reward_hacking.py               # all runs: annotated_examples/expected/reward_hacking.json and .svg
    python tools/reward_hacking.py rule best     # only these, in place of what is there; without names, what is missing
    python tools/reward_hacking.py --picture     # only draws the picture again

Every run is TRL's own GRPOTrainer on the toy policy, with the settings of annotated_examples/grpo.py but for those in
RUNS. Before the first step and after every EVERY steps the policy samples an answer to each of LOOK held-out problems, at
temperature 1, and this is written down:

reward    mean of what the run is trained on, over these answers
right     the share of them that end with the true sum, by the toy world's exact checker
kl        mean over them of log p(answer) - log p_base(answer), in nats per answer
tokens    mean length, the end token included
ended     the share of them that have an end token
samples   two of them

`few` is trained on a reward model that TRL's RewardTrainer makes of the toy policy and PAIRS pairs.

`best` samples ANSWERS answers of the untrained policy to each of PROBLEMS held-out problems and lets judges score them all.
From that comes, for each N, what the best of N is worth on average: by the judge, and in truth. The process model is made by
annotated_examples/prm.py in PRM_STEPS steps, a part of its run, so that it is not perfect.
"""

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "annotated_examples" / "toy"
RESULT = ROOT / "annotated_examples" / "expected" / "reward_hacking.json"
PICTURE = RESULT.with_suffix(".svg")
PACKAGES = ("trl", "transformers", "datasets", "accelerate", "torch")
EVERY, LOOK = 10, 256
PAIRS, PAIR_STEPS = 64, 40
PROBLEMS, ANSWERS, PRM_STEPS = 64, 64, 150
SIZES = (1, 2, 4, 8, 16, 32, 64)
RUNS = {  # name -> (what the reward is, what differs from the settings of grpo.py, seeds)
    "shipped": ("the shipped reward model", {"max_steps": 40}, (1, 2, 3)),
    "shipped-kl": ("the same, held by a KL penalty", {"max_steps": 40, "beta": 0.3}, (1, 2, 3)),
    "fast": ("the same, with larger steps", {"max_steps": 40, "learning_rate": 1e-3}, (1,)),
    "few": ("a reward model from 64 pairs", {"max_steps": 40}, (1, 2, 3)),
    "rule": ("a result, and few tokens", {"max_steps": 40}, (1, 2, 3)),
}
KEPT = ("learning_rate", "per_device_train_batch_size", "num_generations", "max_completion_length", "bf16")


def has_a_result(completions, **others) -> list[float]:
    """1 where the answer ends with # and a number."""
    return [float(bool(re.search(r"#\d+$", one[-1]["content"].strip()))) for one in completions]


def few_tokens(completion_ids, **others) -> list[float]:
    """Minus one for each ten tokens."""
    return [-len(ids) / 10 for ids in completion_ids]


RULE = (has_a_result, few_tokens)


def quiet() -> None:
    """No network, no progress bars, one thread."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOY / "policy", padding_side="left")


def policy():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TOY / "policy", dtype=torch.float32).eval()


def classifier(folder):
    import torch
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()


def rows(name: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (TOY / "data" / name / f"{split}.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ reward models


def score(model, conversations: list[list[dict]]) -> list[float]:
    """Scores of whole conversations, rendered and padded as GRPOTrainer does it."""
    import torch

    own = tokenizer()
    scores = []
    for start in range(0, len(conversations), 512):
        texts = [own.apply_chat_template(one, tokenize=False) for one in conversations[start : start + 512]]
        batch = own(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        with torch.no_grad():
            scores += model(**batch).logits[:, 0].tolist()
    return scores


def margins(model, pairs: list[dict]) -> list[float]:
    """For each pair, the score of the chosen answer minus that of the rejected one."""
    chosen, rejected = (
        score(model, [pair["prompt"] + pair[side] for pair in pairs]) for side in ("chosen", "rejected")
    )
    return [round(winner - loser, 4) for winner, loser in zip(chosen, rejected, strict=True)]


def from_few_pairs(seed: int, folder: Path, pairs: int = PAIRS, steps: int = PAIR_STEPS):
    """A reward model that RewardTrainer makes of the toy policy and the first pairs of the preference set."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import RewardConfig, RewardTrainer

    settings = RewardConfig(
        output_dir=str(folder),
        learning_rate=5e-4,
        per_device_train_batch_size=16,
        max_steps=steps,
        seed=seed,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    data = Dataset.from_list(rows("preference", "train")[:pairs])
    trainer = RewardTrainer(str(TOY / "policy"), args=settings, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model.eval()


# ------------------------------------------------------------------------------------------------------------ one run


def draw_answers(model, own, problems: list[dict], seed: int):
    """One answer to each problem at temperature 1, and what is needed to read it again; the dice are left alone."""
    import torch
    from torch.random import fork_rng

    batch = own.apply_chat_template(
        [row["prompt"] for row in problems],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    with fork_rng([]), torch.no_grad():
        torch.manual_seed(seed)
        ids = model.generate(**batch, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=48)
    start = batch["input_ids"].shape[1]
    ends = ids[:, start:] == own.eos_token_id
    written = ends.cumsum(1) - ends.long() == 0  # up to and with the first end token
    mask = torch.cat([batch["attention_mask"], written.long()], dim=1)
    answers = [row[keep].tolist() for row, keep in zip(ids[:, start:], written, strict=True)]
    return answers, (ids, mask, start, written)


def log_probability(model, ids, mask, start, written):
    """log p of each answer, summed over its tokens."""
    import torch

    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, start - 1 : -1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, start:, None]).squeeze(-1)
    return (logps * written).sum(1)


def is_right(text: str, row: dict) -> bool:
    return text.endswith(f"#{row['answer']}")


def look(model, base, own, problems: list[dict], reward, seed: int) -> dict:
    """One answer to each problem: reward, share of right ones, KL to the base, length."""
    training = model.training
    model.eval()
    answers, read = draw_answers(model, own, problems, seed)
    kl = (log_probability(model, *read) - log_probability(base, *read)).mean().item()
    model.train(training)
    texts = own.batch_decode(answers, skip_special_tokens=True)
    rewards = reward([row["prompt"] for row in problems], texts, answers)
    count = len(problems)
    return {
        "reward": round(sum(rewards) / count, 4),
        "right": round(sum(map(is_right, texts, problems)) / count, 4),
        "kl": round(kl, 3),
        "tokens": round(sum(map(len, answers)) / count, 2),
        "ended": round(sum(own.eos_token_id in answer for answer in answers) / count, 4),
        "samples": texts[:2],
    }


def run(name: str, seed: int, every: int = EVERY, problems: int = LOOK, pair_steps: int = PAIR_STEPS, **more) -> dict:
    """One run of GRPOTrainer, looked at every so many steps."""
    import compare
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    held_out, own, base, found = rows("prompt_only", "test")[:problems], tokenizer(), policy(), {"seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        kind = name.split("-")[0]
        functions = list(RULE) if kind == "rule" else [classifier(TOY / "reward_model")]
        if kind == "few":
            functions = [from_few_pairs(seed, Path(folder), steps=pair_steps)]
            found["margins"] = {
                "train": margins(functions[0], rows("preference", "train")[:PAIRS]),
                "test": margins(functions[0], rows("preference", "test")),
            }

        def reward(prompts, texts, answers) -> list[float]:
            chats = [[{"role": "assistant", "content": text}] for text in texts]
            if kind == "rule":
                each = [function(completions=chats, completion_ids=answers) for function in functions]
                return [sum(values) for values in zip(*each, strict=True)]
            return score(functions[0], [prompt + chat for prompt, chat in zip(prompts, chats, strict=True)])

        class Look(TrainerCallback):
            def see(self, model, step):
                self.looks.append({"step": step, **look(model, base, own, held_out, reward, seed)})

            def on_train_begin(self, args, state, control, model=None, **kwargs):
                self.looks = []
                self.see(model, 0)

            def on_step_end(self, args, state, control, model=None, **kwargs):
                if state.global_step % every == 0:
                    self.see(model, state.global_step)

        settings = {key: compare.load("grpo").TOY[key] for key in KEPT} | RUNS[name][1] | more
        args = GRPOConfig(
            output_dir=folder,
            seed=seed,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            **settings,
        )
        watch = Look()
        trainer = GRPOTrainer(
            model=str(TOY / "policy"),
            reward_funcs=functions,
            args=args,
            train_dataset=Dataset.from_list(rows("prompt_only", "train")),
            processing_class=own,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.process_time()
        trainer.train()
    rewards = [round(line["reward"], 4) for line in trainer.state.log_history if "reward" in line]
    return found | {"cpu_seconds": round(time.process_time() - started, 1), "trained": rewards, "looks": watch.looks}


# ----------------------------------------------------------------------------------------------------------- best of N


def best_of(scores: list[float], values: list[float], size: int) -> float:
    """Mean over all groups of `size` of these answers of the value of the one with the highest score; ties share."""
    count, total, taken = len(scores), 0.0, 0
    for height in sorted(set(scores)):
        tied = [value for score, value in zip(scores, values, strict=True) if score == height]
        # groups whose highest score is this one: those within all that are not above it, less those below it
        share = math.comb(taken + len(tied), size) - math.comb(taken, size)
        total += share / math.comb(count, size) * sum(tied) / len(tied)
        taken += len(tied)
    return total


def process_scores(folder: Path, problems: list[dict], texts: list[str]) -> list[list[float]]:
    """The probability of each step of each answer that all is right so far, read at the separator behind it."""
    import torch
    from transformers import AutoModelForTokenClassification

    own, found = tokenizer(), []
    model = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    separator = own.convert_tokens_to_ids("\u0120")  # a blank, which prm.py trains as separator
    for start in range(0, len(texts), 512):
        part = slice(start, start + 512)
        prompts = own.apply_chat_template(
            [row["prompt"] for row in problems[part]], add_generation_prompt=True, tokenize=False
        )
        whole = [f"{prompt}{text.strip()} " for prompt, text in zip(prompts, texts[part], strict=True)]
        batch = own(whole, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        with torch.no_grad():
            logits = model(**batch).logits
        right = torch.sigmoid(logits[..., 1] - logits[..., 0])
        found += [row[ids == separator].tolist() for row, ids in zip(right, batch["input_ids"], strict=True)]
    return found


def best(seed: int = 1, problems: int = PROBLEMS, answers: int = ANSWERS) -> dict:
    """Best of N by several judges on answers of the untrained policy."""
    import torch

    torch.set_num_threads(1)
    own, base, held_out = tokenizer(), policy(), rows("prompt_only", "test")[:problems]
    repeated = [row for row in held_out for _ in range(answers)]
    texts = []
    for start in range(0, len(repeated), 256):
        drawn, _ = draw_answers(base, own, repeated[start : start + 256], seed=1000 * seed + start)
        texts += own.batch_decode(drawn, skip_special_tokens=True)
    chats = [
        row["prompt"] + [{"role": "assistant", "content": text}] for row, text in zip(repeated, texts, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        judges = {
            "shipped": score(classifier(TOY / "reward_model"), chats),
            "few": score(from_few_pairs(seed, Path(folder)), chats),
        }
        command = [sys.executable, "-W", "ignore", str(ROOT / "annotated_examples" / "prm.py")]
        flags = ["--seed", str(seed), "--max_steps", str(PRM_STEPS)]
        done = subprocess.run([*command, *flags], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"prm.py ended with {done.returncode}:\n{done.stderr[-3000:]}")
        output = Path(folder) / "outputs" / "prm-toy"
        process = json.loads((output / "held_out.json").read_text())["after"]
        steps = process_scores(output, repeated, texts)
    judges |= {
        "process, minimum": [min(one, default=0.0) for one in steps],
        "process, product": [math.prod(one) if one else 0.0 for one in steps],
        "process, last": [one[-1] if one else 0.0 for one in steps],
    }
    right = [float(is_right(text, row)) for text, row in zip(texts, repeated, strict=True)]
    groups = [slice(start, start + answers) for start in range(0, len(texts), answers)]

    def mean(scores, values, size) -> float:
        return sum(best_of(scores[one], values[one], size) for one in groups) / len(groups)

    sizes = [size for size in SIZES if size <= answers]
    return {
        "seed": seed,
        "problems": problems,
        "answers": answers,
        "prm_steps": PRM_STEPS,
        "process": process,
        "reachable": [round(mean(right, right, size), 4) for size in sizes],  # a judge that knows the truth
        "judges": {
            name: {
                "right": [round(mean(scores, right, size), 4) for size in sizes],
                "score": [round(mean(scores, scores, size), 4) for size in sizes],
            }
            for name, scores in judges.items()
        },
    }


# ----------------------------------------------------------------------------------------------------- tables and picture


def measured() -> dict:
    return json.loads(RESULT.read_text())


def table(head: list[str], lines: list[list[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n| " + " | ".join("---" for _ in head) + " |")
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def runs() -> None:
    """Each run and seed: before the first step, at its best look, and at its last one."""
    lines = []
    for name, found in measured()["runs"].items():
        for one in found:
            first, last = one["looks"][0], one["looks"][-1]
            top = max(look["right"] for look in one["looks"])
            cells = [f"`{name}`", RUNS[name][0], str(one["seed"])]
            cells += [f"{first['reward']:.1f} to {last['reward']:.1f}"]
            cells += [f"{first['right']:.2f}", f"{top:.2f}", f"{last['right']:.2f}", f"{last['kl']:.1f}"]
            lines.append([*cells, f"{last['tokens']:.0f}"])
    head = ["run", "trained on", "seed", "reward", "right before", "right at best", "right at the end"]
    table([*head, "KL", "tokens"], lines)


def course(name: str, seed: int) -> None:
    """One run, look by look, with an answer."""
    (one,) = [one for one in measured()["runs"][name] if one["seed"] == seed]
    lines = []
    for look in one["looks"]:
        cells = [f"{look['reward']:.2f}", f"{look['right']:.2f}", f"{look['kl']:.1f}"]
        lines.append([str(look["step"]), *cells, f"`{look['samples'][0]}`"])
    table(["step", "reward", "right answers", "KL", "an answer"], lines)


def best_table() -> None:
    """Best of N: the share of right answers by judge."""
    found = measured()["best"]
    sizes = SIZES[: len(found["reachable"])]
    lines = [[f"{name}", *(f"{value:.2f}" for value in one["right"])] for name, one in found["judges"].items()]
    lines.append(["the truth", *(f"{value:.2f}" for value in found["reachable"])])
    lines.append(["KL, at most", *(f"{math.log(n) - (n - 1) / n:.2f}" for n in sizes)])
    table(["judge", *(f"N = {n}" for n in sizes)], lines)


def made_on() -> None:
    """The command, the versions and the machine."""
    from tables import made_with

    result = measured()
    print(f"\n`{result['command']}`; {made_with(result)}.\n")


def digest() -> str:
    """What ties the picture to the figures that it shows."""
    return hashlib.sha256(RESULT.read_bytes()).hexdigest()[:16]


def draw() -> None:
    """For each run the reward and the right answers over the steps, a line for each seed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "reward_hacking", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    import matplotlib.pyplot as plt

    found = measured()["runs"]
    figure, axes = plt.subplots(2, len(found), figsize=(9, 3.6), layout="constrained", sharex="col")
    for column, (name, seeds) in zip(axes.T, found.items(), strict=True):
        for one in seeds:
            steps = [look["step"] for look in one["looks"]]
            column[0].plot(steps, [look["reward"] for look in one["looks"]], color="#b5542b", linewidth=1.2)
            column[1].plot(steps, [look["right"] for look in one["looks"]], color="#2a5d8f", linewidth=1.2)
        column[0].set_title(name, fontsize=9)
        column[1].set_ylim(-0.03, 1.03)
        column[1].set_xlabel("step")
    axes[0, 0].set_ylabel("reward")
    axes[1, 0].set_ylabel("right answers")
    figure.savefig(PICTURE, metadata={"Date": None, "Creator": None, "Source": digest()}, facecolor="white")
    print(PICTURE.relative_to(ROOT))


def write(result: dict) -> None:
    order = {name: result["runs"][name] for name in RUNS if name in result["runs"]}
    RESULT.write_text(json.dumps(result | {"runs": order}, indent=1) + "\n")


def measure(names: list[str]) -> None:
    """Every run for every seed that is missing or named; the JSON is written after each."""
    from expected import machine

    result = measured() if RESULT.is_file() else {"runs": {}}
    made = {"versions": {package: version(package) for package in PACKAGES}, "machine": machine()}
    if any(made[key] != result.get(key, made[key]) for key in made):
        raise SystemExit(f"{RESULT.name} was made with other versions or on another machine: remove it and measure all")
    result = {"command": "python tools/reward_hacking.py", **made} | result
    for name in names:
        result.pop("best", None) if name == "best" else result["runs"].pop(name, None)
    jobs = [(name, seed) for name, (_, _, seeds) in RUNS.items() for seed in seeds]
    for name, seed in jobs:
        found = result["runs"].setdefault(name, [])
        if all(one["seed"] != seed for one in found):
            found.append(run(name, seed))
            last = {key: value for key, value in found[-1]["looks"][-1].items() if key != "samples"}
            print(name, seed, last, found[-1]["cpu_seconds"], flush=True)
            write(result)
    if "best" not in result:
        result["best"] = best()
        print("best", result["best"]["judges"], flush=True)
        write(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*RUNS, "best", []], help="measure these again")
    parser.add_argument("--picture", action="store_true", help="only draw the picture again")
    arguments = parser.parse_args()
    if not arguments.picture:
        quiet()
        measure(arguments.names or [])
    draw()


if __name__ == "__main__":
    main()
