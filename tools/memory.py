"""Count the bytes of tensors that each trainer holds while it trains, on the CPU: annotated_examples/expected/memory.json.

    python tools/memory.py             # all fifteen, in all ways
    python tools/memory.py dpo kto     # only these; the others keep their figures

What is run: each script's own trainer on the toy world, as the bare command builds it, for two steps on the first rows of
the data. What is counted: the storage of every tensor, from the moment that an operation returns it until the last
reference to it is gone. Weights, gradients and buffers count too. What a kernel takes and gives back within one operation
is not seen, and neither is what an allocator keeps in reserve, or the libraries. The peak is taken from the end of the
optimizer's first step on, so Adam's two numbers for each weight are there.

Each byte belongs to one kind:

weights      parameters that are trained
frozen       parameters that are not, and buffers: reference, reward model, teacher, the base below an adapter
gradients    of the weights, once they are added up
optimizer    what the optimizer keeps for each weight
logits       tensors with one number for each token of the vocabulary: logits, their log-softmax, their gradient
cache        keys and values kept while answers are sampled
other        everything else: activations, gradients of activations, masks, batches

and each peak to one phase: sampling (in `generate`), scoring (without gradient), forward, backward, optimizer.

The toy's vocabulary has 261 tokens, and that of a real model about 100 times its width. In the ways that are "wide" every
model of the toy world has VOCABULARY tokens; the new ones are copies of the padding token, which is hardly ever sampled.
"""

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time
import weakref
from importlib.metadata import version
from pathlib import Path

from compare import load, rows
from formats import NAMES, quiet
from tables import TRAINERS, made_with

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "annotated_examples" / "toy"
RESULT = ROOT / "annotated_examples" / "expected" / "memory.json"
PACKAGES = ("trl", "transformers", "datasets", "peft", "accelerate", "torch")
KINDS = ("weights", "frozen", "gradients", "optimizer", "logits", "cache", "other")
PHASES = ("sampling", "scoring", "forward", "backward", "optimizer")
VOCABULARY = 8009  # a prime number, so that hardly any other size is a multiple of it
STEPS = 2
ROWS = 256  # of the data set

WAYS = {  # way -> (wide, flags behind the bare command, the trainers that it is tried with; None: all)
    "toy": (False, [], None),
    "wide": (True, [], None),
    "half": (True, ["--gradient_accumulation_steps", "2"], None),  # and half of the rows at once
    "checkpointing": (True, ["--gradient_checkpointing", "true"], None),
    "lora": (True, ["--use_peft"], None),
    "precomputed": (True, ["--precompute_ref_log_probs", "true"], ("dpo", "kto", "bco")),
    "whole logits": (True, ["--loss_type", "nll"], ("sft",)),
    "reference": (True, ["--beta", "0.04"], ("grpo",)),
}


# --- counting ---------------------------------------------------------------------------------------------------------


def counter():
    """The counting mode; made in a function, so that the tables of the page need no torch."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Counter(TorchDispatchMode):
        """While it is entered: bytes of live storages by kind, and the highest sum of them in each phase."""

        def __init__(self, vocabulary: int):
            super().__init__()
            self.vocabulary = vocabulary
            self.live: dict[int, list] = {}  # id of a storage -> [weak reference, bytes, kind]
            self.now = dict.fromkeys(KINDS, 0)
            self.in_optimizer = self.sampling = False
            self.trained: dict[int, int] = {}  # id of a weight in the optimizer -> its numbers
            self.forget()

        def forget(self) -> None:
            """Start again to look for the peak."""
            self.peaks: dict[str, dict[str, int]] = {}  # phase -> bytes of each kind when their sum was highest
            self.highest = dict.fromkeys(PHASES, 0)

        def where(self) -> str:
            if self.in_optimizer:
                return "optimizer"
            if self.sampling:
                return "sampling"
            if torch._C._current_graph_task_id() != -1:
                return "backward"
            return "forward" if torch.is_grad_enabled() else "scoring"

        def over_vocabulary(self, tensor) -> bool:
            """The last dimension is the vocabulary, or it is a flat view of such a tensor."""
            if not tensor.is_floating_point() or not tensor.ndim:
                return False
            flat = tensor.ndim == 1 and tensor.numel() > self.vocabulary
            return tensor.shape[-1] == self.vocabulary or (flat and tensor.numel() % self.vocabulary == 0)

        def note(self, tensor, kind: str | None = None) -> None:
            """Count the storage of a tensor, or give it another kind."""
            if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
                return
            storage = tensor.untyped_storage()
            key, found = id(storage), self.live.get(id(storage))
            if found is not None and found[0]() is storage:
                if kind is not None and found[2] != kind:
                    self.now[found[2]] -= found[1]
                    self.now[kind] += found[1]
                    found[2] = kind
                return
            if kind is None:
                kind = "logits" if self.over_vocabulary(tensor) else "other"
            size = storage.nbytes()
            self.live[key] = [weakref.ref(storage, lambda _: self.gone(key)), size, kind]
            self.now[kind] += size
            total, phase = sum(self.now.values()), self.where()
            if total > self.highest[phase]:
                self.highest[phase], self.peaks[phase] = total, dict(self.now)

        def gone(self, key: int) -> None:
            _, size, kind = self.live.pop(key)
            self.now[kind] -= size

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in tree_iter(result):
                self.note(tensor)
            return result

    return Counter


# --- the runs -----------------------------------------------------------------------------------------------------------


def flags(name: str, way: str, toy: dict) -> list[str]:
    found = list(WAYS[way][1])
    if way == "half" and name == "ppo":
        found = ["--num_mini_batches", "8"]  # the script refuses the two together, for an error in PPOTrainer
    elif way == "half":
        found += ["--per_device_train_batch_size", str(toy["per_device_train_batch_size"] // 2)]
    return found


def widened(folder: Path) -> None:
    """The models of the toy world with VOCABULARY tokens instead of 261. The new ones are copies of the padding token."""
    import torch
    import transformers

    for name in ("policy", "teacher", "reward_model"):
        shutil.copytree(TOY / name, folder / name)
        kind = json.loads((TOY / name / "config.json").read_text())["architectures"][0]
        model = getattr(transformers, kind).from_pretrained(TOY / name)
        rows = model.get_input_embeddings().weight.detach().clone()
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[len(rows) :] = rows[model.config.pad_token_id]
        model.save_pretrained(folder / name)
        (folder / name / "run.json").write_text(json.dumps({"script": "memory", "toy": True}))


def build(name: str, way: str, folder: str, world: Path, *more: str):
    """The trainer that the script builds on the first rows of its data."""
    script = load(name)
    command_line = [*flags(name, way, script.TOY), "--max_steps", str(STEPS), "--output_dir", folder, "--seed", "1"]
    command_line += ["--report_to", "none", "--disable_tqdm", "true"]
    for flag, model in (
        ("model_name_or_path", "policy"),
        ("reward_model_path", "reward_model"),
        ("teacher_model_name_or_path", "teacher"),
    ):
        if flag in script.TOY and world != TOY:
            command_line += [f"--{flag}", str(world / model)]
    command_line += more
    _, script_args, training_args, model_args, mixture_args = script.parse(command_line)
    rows = script.load_split(script.load_data(script_args, mixture_args), script_args.dataset_train_split)
    rows = rows.select(range(min(ROWS, len(rows))))
    tokenizer = script.load_tokenizer(script_args, training_args, model_args, next(iter(rows)))
    return script.build(script_args, training_args, model_args, rows, None, tokenizer)


def modules(trainer) -> list:
    """Every model that the trainer holds: policy, reference, teacher, reward and value models."""
    from torch import nn

    found = []
    for value in vars(trainer).values():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, nn.Module) and all(one is not other for other in found):
                found.append(one)
    return found


@contextlib.contextmanager
def watched(counter, passes, widths):
    """Tells the counter where in a step it is, which tensors are a cache, and notes the forward passes of the models."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
    from transformers import GenerationMixin
    from transformers.cache_utils import DynamicLayer
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    forward, generate, update = Qwen3Model.forward, GenerationMixin.generate, DynamicLayer.update
    stepped = []

    def noted_forward(model, input_ids=None, *arguments, **named):
        seen = input_ids if input_ids is not None else named["inputs_embeds"][..., 0]
        passes.append([*seen.shape, counter.where()])
        return forward(model, input_ids, *arguments, **named)

    def noted_generate(model, inputs=None, *arguments, **named):
        prompt = inputs if inputs is not None else named["input_ids"]
        widths.append(prompt.shape[1])
        counter.sampling = True
        try:
            return generate(model, inputs, *arguments, **named)
        finally:
            counter.sampling = False

    def noted_update(layer, *arguments, **named):
        result = update(layer, *arguments, **named)
        if counter.sampling:
            for tensor in result:
                counter.note(tensor, "cache")
        return result

    def before(optimizer, *_):
        counter.in_optimizer = True

    def after(optimizer, *_):
        for state in optimizer.state.values():
            for value in state.values():
                counter.note(value, "optimizer")
        for group in optimizer.param_groups:
            for weight in group["params"]:
                counter.note(weight, "weights")
                counter.trained[id(weight)] = weight.numel()
        counter.in_optimizer = False
        if not stepped:
            stepped.append(True)
            counter.forget()
            passes.clear()

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    Qwen3Model.forward, GenerationMixin.generate, DynamicLayer.update = noted_forward, noted_generate, noted_update
    try:
        with counter:
            yield
    finally:
        Qwen3Model.forward, GenerationMixin.generate, DynamicLayer.update = forward, generate, update
        for hook in hooks:
            hook.remove()


def run(name: str, way: str, world: Path) -> dict:
    """Two steps of one trainer, counted."""
    import torch

    passes, widths = [], []
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = build(name, way, folder, world)
        count = counter()(trainer.model.config.vocab_size)
        held = {id(tensor): tensor for module in modules(trainer) for tensor in module.parameters()}
        for module in modules(trainer):
            for tensor in (*module.parameters(), *module.buffers()):
                count.note(tensor, "frozen")  # until the optimizer has it
        for weight in held.values():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda weight: count.note(weight.grad, "gradients"))
        compute_loss = trainer.compute_loss

        def noted_loss(model, inputs, *arguments, **named):
            if "prompts" in inputs and isinstance(inputs["prompts"], torch.Tensor):
                widths.append(inputs["prompts"].shape[1])
            return compute_loss(model, inputs, *arguments, **named)

        trainer.compute_loss = noted_loss
        with watched(count, passes, widths):
            trainer.train()
        layers = {}
        for module in modules(trainer):
            for body in module.modules():
                if type(body).__name__ == "Qwen3Model" and any(id(w) in count.trained for w in body.parameters()):
                    layers[id(body)] = len(body.layers)
        learned = [one for one in passes if one[2] == "forward"]
        tokens = max(one[1] for one in learned)
        return {
            "peaks": {phase: count.peaks[phase] for phase in PHASES if phase in count.peaks},
            "rows": GRAPHS.get(name, 1) * max(one[0] for one in learned),
            "tokens": tokens,
            "answer": tokens - widths[-1] if widths else tokens,
            "layers": sum(layers.values()),
            "models": len(layers),
            "trained": sum(count.trained.values()),
            "frozen": sum(weight.numel() for key, weight in held.items() if key not in count.trained),
            "accumulation": trainer.args.gradient_accumulation_steps,
        }


GRAPHS = {"xpo": 2}  # forward passes whose graphs are alive together, where there is more than one


# --- the formula: the same numbers as the blocks of reference_guides/memory.md, held together by a test ----------------

# name -> copies of the logits in the worst moment: over whole rows, over answers; or over a number of positions (SFT)
COPIES = {
    **{"sft": (0, 0), "reward": (0, 0), "prm": (0, 0), "dpo": (4, 0), "kto": (4, 0), "bco": (4, 0), "orpo": (4.5, 0)},
    **{"cpo": (4.5, 0), "ppo": (3, 2), "grpo": (0, 4), "rloo": (0, 4), "online_dpo": (1, 2), "nash_md": (1, 3)},
    **{"gkd": (17, 0), "xpo": (1, 1.5)},
}
CHUNKS = 4 * 256  # SFT: four copies of 256 positions, however long the rows are
SAMPLED = {"ppo": 2, "nash_md": 5}  # copies of the logits of a whole round, of whole rows; others: the last position
KEPT = {"ppo": 1}  # copies of the logits of a round that are never let go, from its sampling to the next one's end
ROUND = 64  # answers of a round of PPO
HELD = {  # name -> trained, frozen, rows of a forward pass with gradient
    "sft": ("policy", "-", "B"),
    "reward": ("reward model", "-", "2B"),
    "dpo": ("policy", "reference", "2B"),
    "kto": ("policy", "reference", "B"),
    "orpo": ("policy", "-", "2B"),
    "cpo": ("policy", "-", "2B"),
    "bco": ("policy", "reference", "B"),
    "ppo": ("policy, value model", "reference, reward model", "B, at most round / `num_mini_batches`"),
    "grpo": ("policy", "- (reference with `beta` > 0)", "B"),
    "rloo": ("policy", "reference", "B"),
    "online_dpo": ("policy", "reference, reward model", "2B"),
    "nash_md": ("policy", "reference, reward model", "B"),
    "gkd": ("student", "teacher", "B"),
    "xpo": ("policy", "reference, reward model", "2B, as two passes of B"),
    "prm": ("step reward model", "-", "B"),
}


def shape() -> tuple[int, int, int, int]:
    """Width, width of all queries, of all keys, and of the MLP in the toy world."""
    config = json.loads((TOY / "policy" / "config.json").read_text())
    heads = [config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads")]
    return config["hidden_size"], *heads, config["intermediate_size"]


def predicted(name: str, way: str, one: dict) -> int | None:
    """Bytes in the worst moment, in float32; None where the page has no formula."""
    if way in ("lora", "whole logits"):
        return None
    width, queries, keys, mlp = shape()
    vocabulary = VOCABULARY if WAYS[way][0] else 261
    static = 12 * one["trained"] + 4 * one["frozen"]
    static += 4 * vocabulary * KEPT.get(name, 0) * ROUND * one["answer"]
    gradients = 4 * one["trained"]
    positions = one["rows"] * one["tokens"]
    layer = 4 * (6 * width + 4 * queries + 4 * keys + 4 * mlp)
    ends = 4 * 3 * width * one["models"]
    whole, answer = COPIES[name]
    logits = 4 * vocabulary * (whole * positions + answer * one["rows"] * one["answer"])
    if name == "sft":
        logits = 4 * vocabulary * CHUNKS
    if way == "checkpointing":
        micro_batch = positions * (4 * width * one["layers"] + ends) + max(positions * layer, logits)
    else:
        micro_batch = positions * (layer * one["layers"] + ends) + logits
    waiting = gradients if one["accumulation"] > 1 else 0
    sampled = ROUND * one["answer"] if name == "ppo" else positions
    sampled *= 4 * vocabulary * SAMPLED.get(name, 0)
    return static + int(max(gradients + positions * layer, waiting + micro_batch, sampled))


def measured() -> dict:
    return json.loads(RESULT.read_text())


def peak(one: dict) -> tuple[str, dict]:
    """The phase with the highest sum, and what was there."""
    phase = max(one["peaks"], key=lambda phase: sum(one["peaks"][phase].values()))
    return phase, one["peaks"][phase]


def total(one: dict) -> int:
    return sum(peak(one)[1].values())


# --- the tables of the page -----------------------------------------------------------------------------------------------


def link(name: str) -> str:
    return f"[{NAMES[name]}](../annotated_trainers/{name}.md)"


def table(head: list[str], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + " --- |" + " ---: |" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def megabytes(value: float) -> str:
    return f"{value / 1e6:.1f}"


def copies(name: str) -> str:
    whole, answer = COPIES[name]
    numbers = ((whole, "row"), (answer, "answer"), (KEPT.get(name), "whole round"))
    words = [f"{number:g} of the {what}" for number, what in numbers if number]
    return "4 of 256 positions" if name == "sft" else " + ".join(words) or "-"


def held() -> None:
    """What each trainer has in memory, how many rows go through with gradient, and how many copies of logits there are."""
    print("\n| | trained | frozen | rows with gradient | copies of logits |\n|" + " --- |" * 5)
    for name in TRAINERS:
        print("| " + " | ".join([link(name), *HELD[name], copies(name)]) + " |")
    print()


def peaks(way: str) -> None:
    """The measured peak by kind, and what the formula says."""
    kinds = [kind for kind in KINDS if kind != "cache"]
    rows = []
    for name, one in measured()["ways"][way].items():
        phase, at = peak(one)
        ours = predicted(name, way, one)
        rows.append([link(name), f"**{megabytes(total(one))}**", megabytes(ours), f"{ours / total(one):.2f}", phase])
        rows[-1] += [megabytes(at[kind] + (at["cache"] if kind == "other" else 0)) for kind in kinds]
    table(["MB", "measured", "formula", "ratio", "peak in", *kinds], rows)


def ways() -> None:
    """What each lever leaves of the peak, and the formula's share where there is one."""
    result = measured()["ways"]
    shown = ("half", "checkpointing", "lora", "precomputed")
    rows = []
    for name, one in result["wide"].items():
        cells = [megabytes(total(one))]
        for way in shown:
            other = result[way].get(name)
            if other is None:
                cells.append("-")
                continue
            ours = predicted(name, way, other)
            cells.append(
                f"{total(other) / total(one):.2f}" + (f" ({ours / predicted(name, 'wide', one):.2f})" if ours else "")
            )
        rows.append([link(name), *cells])
    table(["", "MB", "half the rows at once", "checkpointing", "LoRA", "precomputed reference"], rows)


def speed() -> None:
    """Seconds, passes and tokens of the bare commands, from compare.json and the five seeds of each."""
    cells = []
    for row in rows():
        per = row["forward_tokens"] / row["seconds"]
        cells.append([link(row["name"]), f"{row['seconds']:.0f}", f"{row['forward_passes']:,}"])
        cells[-1] += [f"{row['forward_tokens']:,}", f"{row['generated_tokens']:,}", f"{per:,.0f}"]
    head = ["", "seconds", "forward passes", "tokens forward", "tokens generated", "tokens forward in a second"]
    table(head, cells)


def resident() -> None:
    """The counted peak of the bare command beside the growth of the process in compare.json."""
    costs, counted = {row["name"]: row["memory"] for row in rows()}, measured()["ways"]["toy"]
    cells = [[link(name), megabytes(total(one)), megabytes(costs[name])] for name, one in counted.items()]
    table(["MB", "tensors, counted", "growth of the process"], cells)


def checkpointing() -> None:
    """What checkpointing cost in one run."""
    result = measured()["checkpointing_time"]
    ratios = [with_it / without for with_it, without in zip(result["with"], result["without"], strict=True)]
    print(
        f"\nMeasured on the toy world with {NAMES[result['trainer']]}, {result['steps']} steps without and with it, "
        f"{len(ratios)} times in turn: {', '.join(f'{ratio:.2f}' for ratio in ratios)} times the seconds of the processor.\n"
    )


def made_on() -> None:
    """The command, the versions and the machine."""
    result = measured()
    print(f"\n`{result['command']}`; {made_with(result)}.\n")


def timed(steps: int = 20, turns: int = 3) -> dict:
    """Seconds of the processor for SFT on the toy world without and with checkpointing, in turn, and not counted."""
    found = {"trainer": "sft", "steps": steps, "without": [], "with": []}
    for _ in range(turns):
        for kind, on in (("without", "false"), ("with", "true")):
            with tempfile.TemporaryDirectory() as folder, quiet():
                more = ["--gradient_checkpointing", on, "--max_steps", str(steps)]
                trainer = build("sft", "toy", folder, TOY, *more)
                started = time.process_time()  # whatever else this machine does meanwhile
                trainer.train()
                found[kind].append(round(time.process_time() - started, 2))
    return found


def measure(names: list[str]) -> None:
    """Runs the trainers in all ways, one after the other, and writes the JSON after each."""
    from expected import machine

    made = {"versions": {package: version(package) for package in PACKAGES}, "machine": machine()}
    everything = set(names) == set(TRAINERS)
    earlier = {"ways": {}} if everything else measured()
    if not everything and made != {key: earlier[key] for key in made}:
        raise SystemExit(f"{RESULT.name} was made with other versions or on another machine: measure all")
    result = {"command": "python tools/memory.py", "steps": STEPS, "vocabulary": VOCABULARY, **made, "ways": {}}
    result["checkpointing_time"] = timed() if everything else earlier["checkpointing_time"]
    for way in WAYS:
        found = earlier["ways"].get(way, {})
        result["ways"][way] = {name: one for name, one in found.items() if name not in names}
    with tempfile.TemporaryDirectory() as folder:
        widened(Path(folder))
        for way, (wide, _, only) in WAYS.items():
            for name in names:
                if only and name not in only:
                    continue
                kept = result["ways"][way]
                one = kept[name] = run(name, way, Path(folder) if wide else TOY)
                result["ways"][way] = {name: kept[name] for name in TRAINERS if name in kept}
                print(f"{way:14}{name:11}{peak(one)[0]:9}{megabytes(total(one)):>8} MB", flush=True)
                RESULT.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*TRAINERS, []], help="trainers (default: all)")
    names = parser.parse_args().names or list(TRAINERS)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    measure(names)


if __name__ == "__main__":
    main()
