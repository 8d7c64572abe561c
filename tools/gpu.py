"""Measure the scripts on an NVIDIA GPU, without a network: memory, speed, and where the time goes.

    python tools/gpu.py pack      with a network: the packages that a machine with PyTorch and transformers lacks
    python tools/gpu.py run       on the GPU: measures what is not measured yet; again, until it says that nothing is left
    python tools/gpu.py list      what is measured, and what is not

A run starts no new job when its minutes (9) are over, counted from the start of the command, and writes one JSON for each
kind of GPU after every job: annotated_examples/expected/gpu/<name of the GPU>.json. A job that takes longer than LIMIT
seconds is stopped (--limit gives it another time). Importing everything takes longer than many a job, so it is done once,
and each job is a fork of that process; with --no-fork each job is a fresh process. What a job prints is in build/gpu/logs.

A job is one script in one way:

    toy      the bare command
    ours     the settings of the script for real models (REAL), Qwen3-0.6B
    plain    the same model, rows, batch of a step and method, with TRL's defaults for all that decides memory and speed
    lora     ours with --use_peft and checkpointing, Qwen3-8B in bfloat16
    plain + a lever    plain with one of LEVERS

Models. The architectures are Qwen3's, the weights random: they cost the same time and memory as trained ones. The words
of the tokenizer are made up, one token each. The teacher (GKD) is Qwen3-1.7B, the reward model Qwen3-0.6B.

Rows. Made up too, of random length (LENGTHS), the same in every way. GKD samples for every batch (lmbda 1; by default a
coin decides). PPO does not print samples.

Sampled answers. All of a trainer's have one length: the end token cannot be drawn before the last place, and is set there.
To save time they are shorter than the settings allow, and some trainers take fewer prompts for a step: 128 tokens for GRPO
and RLOO (ANSWERS), 64 for the others, 16 prompts (PROMPTS), 8 for Nash-MD, which samples without a cache. This is so in
every way but toy, so two ways still do the same work. The rows at once stay those of the way, as far as the step has so
many. Each record says what was shortened.

Time. The first steps of a job (STEPS) warm up and count for nothing. Then come those that give the seconds of a step: the
clock is read between two steps, after the GPU has finished. With three of them, the median counts; the record holds all.
Tokens in a second are those of an average timed step, divided by that median. The last step gives the shares of the
phases, and is not used for anything else, because here the GPU is waited for at each change of phase, which costs time. A
phase begins with

    generation   a call of generate; it ends with that call
    scoring      a forward pass without gradient: reference, reward model, teacher, value model while it samples
    forward      a forward pass with gradient; the loss that is computed from it belongs to it
    backward     the backward pass, with the second forward pass of gradient checkpointing
    optimizer    clipping and step

and lasts until the next one begins; after generation, backward and optimizer it is "rest". A step is one of the
trainer's: with all its accumulation steps, and for PPO one round. What happens before the first step is not in it: the
pass over the data of precompute_ref_log_probs. vLLM and continuous batching sample without generate, so their sampling
is "rest".

Memory. The largest amount that PyTorch had allocated, and reserved, at any time in the process, loading included. CUDA
itself takes some hundred MB more.

Tokens. Positions that a forward pass with gradient sees, prompts and answers, without padding; two passes over the same
answers (PPO) count twice. Sampled tokens are counted apart.

MFU. FLOPs / seconds / the GPU's dense bf16 peak from NVIDIA's data sheet (PEAKS; a GPU that is not listed has no MFU).
With N weights in the matrices of a model, its output layer included and its table of embeddings left out, N' of them
trained, L layers, A = heads * width of a head, and rows of T tokens:

    a token with gradient       4 N + 2 N' + 12 L A T    (N' = N: 6 N, the usual count)
    a token without gradient    2 N + 4 L A T
    a sampled token             2 N + 4 L A t,  t tokens so far

summed over all models of the job. Nothing is taken off for the causal mask (as in Chowdhery et al. 2022, arXiv
2204.02311, appendix B) or for output positions that a trainer leaves out, and nothing is added for what is computed
twice: checkpointing, or sampling without a cache.
"""

import argparse
import ast
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
import zipfile
from collections import Counter
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "annotated_examples"
BUILD = Path(os.environ.get("GPU_BUILD", ROOT / "build" / "gpu"))  # takes some 25 GB when all models are made
MEASURED, WHEELS, SITE = EXAMPLES / "expected" / "gpu", BUILD / "wheels", BUILD / "site"

# ------------------------------------------------------------------------------------------------------- what is measured

ORDER = (  # those that do not sample first: they take the least time
    *("sft", "dpo", "reward", "kto", "orpo", "cpo", "bco", "prm"),
    *("ppo", "grpo", "rloo", "gkd", "online_dpo", "xpo", "nash_md"),
)
SAMPLING = {"grpo", "rloo", "ppo", "gkd", "online_dpo", "nash_md", "xpo"}  # generate answers while they train
WITH_REWARD_MODEL = {"ppo", "online_dpo", "nash_md", "xpo"}
WAYS = ("ours", "plain", "toy", "lora", "levers")

# Flags on top of `plain`, the package that they need, and the scripts that they are tried with (None: all)
LEVERS = {
    "no checkpointing": ({"gradient_checkpointing": False}, None, None),
    "Liger kernels": ({"use_liger_kernel": True}, "liger_kernel", None),
    "packing": ({"packing": True}, None, {"sft"}),
    "padding-free": ({"padding_free": True, "max_length": None}, None, {"sft"}),  # no row is longer
    "packing, flex attention": ({"packing": True, "attn_implementation": "flex_attention"}, None, {"sft"}),
    "precomputed reference": ({"precompute_ref_log_probs": True}, None, {"dpo", "kto", "bco"}),
    "flash attention": ({"attn_implementation": "flash_attention_2"}, "flash_attn", None),
    "key-value cache": ({"generation_kwargs": {"use_cache": True}}, None, {"online_dpo", "xpo"}),
    # PPO's models and the reward models of XPO and Nash-MD compute in float32; all else does in bfloat16
    "TF32": ({"tf32": True}, None, {"ppo", "xpo", "nash_md"}),
    "vLLM": (
        {"use_vllm": True, "vllm_mode": "colocate", "generation_kwargs": {"ignore_eos": True}},
        "vllm",
        {"grpo", "rloo", "online_dpo"},
    ),
    "continuous batching": ({"use_transformers_continuous_batching": True}, None, {"grpo", "rloo"}),
    "compile": ({"torch_compile": True}, None, None),
    "twice the rows at once": ({}, None, None),  # and half of the accumulation steps
    "whole batch at once": ({}, None, None),  # no accumulation steps
    "eager attention": ({"attn_implementation": "eager"}, None, None),  # the default is better: what SDPA gives
    "optimizer not fused": ({"optim": "adamw_torch"}, None, None),  # and the fused one
}

# Further flags of a lever with some trainers. TRL 1.12 computes these four Liger losses outside of accelerate's autocast,
# in float32. And Liger's fused cross entropy looks for lm_head, which a model that gives scores does not have.
LEVERS_WITH = {
    "Liger kernels": {
        **{name: {"tf32": True} for name in ("dpo", "kto", "grpo", "gkd")},
        **{name: {"liger_kernel_config": {"fused_linear_cross_entropy": False}} for name in ("reward", "prm")},
    }
}

# What a user who writes no settings gets from TRL; everything else in REAL belongs to the method and stays
SPEED = {
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading", "torch_empty_cache_steps"),
    *("bf16", "tf32", "dtype", "attn_implementation", "use_liger_kernel", "liger_kernel_config", "optim"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "packing", "packing_strategy", "padding_free"),
    *("precompute_ref_log_probs", "precompute_ref_batch_size", "local_rollout_forward_batch_size", "use_vllm"),
    *("vllm_mode", "vllm_gpu_memory_utilization", "generation_kwargs", "pad_to_multiple_of"),
    *("dataloader_num_workers", "dataloader_pin_memory", "train_sampling_strategy"),
}
KEPT = {"ppo": {"bf16"}}  # PPOTrainer ignores bf16, and the script refuses it
PLAIN_FLAGS = {  # build() turns the cache on; TRL samples without one where it checkpoints gradients
    "online_dpo": {"generation_kwargs": {"use_cache": False}},
    "xpo": {"generation_kwargs": {"use_cache": False}},
}
OWN_FLAGS = {  # in every way but toy
    "gkd": {"lmbda": 1.0},
    "grpo": {"reward_funcs": ["gpu.even_tokens"]},
    "rloo": {"reward_funcs": ["gpu.even_tokens"]},
    "ppo": {"num_sample_generations": 0},
    "prm": {"step_separator": "w6"},  # the end of a line is no word
}

# The matrices of attention and MLP; "all-linear" would take the head of prm.py too, which is trained as a whole
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Words of prompt and answer, drawn evenly from these ranges; the prompts of GSM8K have about 100 tokens
LENGTHS = {
    **dict.fromkeys(ORDER, ((64, 448), (64, 448))),
    "sft": ((128, 512), (128, 1408)),
    "gkd": ((64, 384), (64, 576)),
    "prm": ((64, 256), (16, 64)),  # of each step
    "grpo": ((64, 192), (0, 0)),
    "rloo": ((64, 192), (0, 0)),
}
ROWS = 384  # six steps of 64
STEPS = {"training": (2, 3, 1), "sampling": (1, 1, 1)}  # warm-up, timed, split into phases
ANSWERS = {  # tokens of each sampled answer
    **dict.fromkeys(("grpo", "rloo"), 128),
    **dict.fromkeys(("ppo", "gkd", "online_dpo", "xpo", "nash_md"), 64),
}
ANSWER_FLAGS = ("max_completion_length", "response_length", "max_new_tokens")  # each config has one of them
PROMPTS = {"ppo": 16, "gkd": 16, "online_dpo": 16, "xpo": 16, "nash_md": 8}  # at most so many for a step
PROBE, LIMIT, LEAST = 300, 75, 25  # seconds: to look at the GPU, for one job, and that a job is started for

# hidden size, layers, heads, key-value heads, width of a head, of the MLP, tied embeddings, vocabulary: as published
SIZES = {
    "0.6b": (1024, 28, 16, 8, 128, 3072, True, 151_936),
    "1.7b": (2048, 28, 16, 8, 128, 6144, True, 151_936),
    "8b": (4096, 36, 32, 8, 128, 12288, False, 151_936),
    "tiny": (32, 2, 2, 1, 16, 64, True, 512),  # for tests: rows and answers are short too
}
PEAKS = {  # dense bf16, FLOP/s
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}
PACKAGES = ("trl", "transformers", "datasets", "peft", "accelerate", "torch")
CURVES = ("loss", "loss/policy_avg", "loss/value_avg", "objective/scores", "reward", "grad_norm", "rewards/margins")


def scripts() -> list[str]:
    """The trainers that have a script, in the order in which they are measured."""
    return [name for name in ORDER if (EXAMPLES / f"{name}.py").is_file()]


def settings_digest(name: str, toy: bool) -> str:
    """Changes when the script's TOY or REAL does: then a figure is out of date."""
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    wanted = "TOY" if toy else "REAL"
    node = next(node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == wanted)
    return hashlib.sha256(ast.dump(node.value).encode()).hexdigest()[:12]


def jobs(names: list[str], ways: list[str]) -> list[dict]:
    """All jobs, the important ones first: both sides of the comparison, script by script; then way by way."""
    order = [(name, way, None) for name in names for way in ("ours", "plain")]
    order += [(name, way, None) for way in ("toy", "lora") for name in names]
    order = [one for one in order if one[1] in ways]
    if "levers" in ways:
        order += [
            (name, "plain", lever)
            for lever, (_, _, takers) in LEVERS.items()
            for name in names
            if takers is None or name in takers
        ]
    digests = {(name, toy): settings_digest(name, toy) for name in names for toy in (False, True)}
    return [
        {"name": name, "way": way, "lever": lever, "digest": digests[name, way == "toy"]} for name, way, lever in order
    ]


def key(job: dict) -> str:
    """The name of a job in the JSON: "dpo ours", "dpo plain + packing"."""
    return f"{job['name']} {job['way']}" + (f" + {job['lever']}" if job["lever"] else "")


# -------------------------------------------------------------------------------------------------------- models and rows


def make_tokenizer(words: int):
    """A tokenizer whose text is words, w6 w7 w8 ..., each one token: what is decoded is encoded to the same tokens again."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|unknown|>"]
    vocabulary = {token: number for number, token in enumerate(special)}
    vocabulary |= {f"w{number}": number for number in range(len(special), words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        chat_template=(EXAMPLES / "toy" / "policy" / "chat_template.jinja").read_text(),
        model_max_length=4096,
    )


def make_model(size: str, kind: str, folder: Path) -> None:
    """Writes a folder with a random Qwen3 of a published size, in bfloat16 as the published ones are."""
    import torch
    import transformers

    hidden, layers, heads, key_values, head, width, tied, words = SIZES[size]
    config = transformers.Qwen3Config(
        vocab_size=words,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_values,
        head_dim=head,
        intermediate_size=width,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **({"num_labels": 1} if kind == "SequenceClassification" else {}),
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = getattr(transformers, f"Qwen3For{kind}")(config)
    unfinished = folder.with_name(folder.name + "-unfinished")
    model.save_pretrained(unfinished)
    make_tokenizer(words).save_pretrained(unfinished)
    unfinished.replace(folder)


def make_row(name: str, number: int, rng: random.Random, tiny: bool) -> dict:
    """One row in the shape that the script takes."""

    def text(part: int) -> str:
        low, high = (max(2, length // 16) if tiny and length else length for length in LENGTHS[name][part])
        return " ".join(f"w{rng.randrange(6, 512)}" for _ in range(rng.randint(low, high)))

    prompt = [{"role": "user", "content": text(0)}]
    first, second = ([{"role": "assistant", "content": text(1)}] for _ in range(2))
    if name in ("sft", "gkd"):
        return {"messages": prompt + first}
    if name in ("dpo", "orpo", "cpo", "reward"):
        return {"prompt": prompt, "chosen": first, "rejected": second}
    if name in ("kto", "bco"):
        return {"prompt": prompt, "completion": first, "label": number % 2 == 0}
    if name == "prm":
        return {
            "prompt": text(0),
            "completions": [text(1) for _ in range(4)],
            "labels": [True, True, True, number % 2 == 0],
        }
    return {"prompt": prompt}


def make_rows(name: str, folder: Path, tiny: bool) -> None:
    """Writes a data set of two files of JSON Lines."""
    unfinished = folder.with_name(folder.name + "-unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", ROWS), ("test", 8)):
        rng = random.Random(split)
        rows = [make_row(name, number, rng, tiny) for number in range(count)]
        (unfinished / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    unfinished.replace(folder)


def models(job: dict, size: str) -> dict[str, tuple[str, str]]:
    """flag -> size and kind of the model that it names; what learns to judge begins as a language model too."""
    small, large, teacher = ("tiny", "tiny", "tiny") if size == "tiny" else ("0.6b", "8b", "1.7b")
    found = {"model_name_or_path": (large if job["way"] == "lora" else small, "CausalLM")}
    if job["name"] == "gkd":
        found["teacher_model_name_or_path"] = (teacher, "CausalLM")
    if job["name"] in WITH_REWARD_MODEL:
        found["reward_model_path"] = (small, "SequenceClassification")
    return found


def even_tokens(completion_ids, **others) -> list[float]:
    """A reward for made-up answers: the share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


# ------------------------------------------------------------------------------------------------- one job, in a process


class Clock:
    """Seconds of each phase while it is on. The GPU is waited for whenever one phase follows another."""

    def __init__(self):
        self.on, self.phase, self.since, self.inside, self.seconds = False, "rest", 0.0, 0, Counter()

    def now(self) -> float:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self, phase: str) -> None:
        if self.on and phase != self.phase:
            self.add()
        self.phase = phase

    def add(self) -> None:
        """The seconds since the last change belong to the phase that is under way."""
        now = self.now()
        self.seconds[self.phase] += now - self.since
        self.since = now

    def start(self) -> None:
        self.on, self.since, self.seconds = True, self.now(), Counter()

    def timed(self, phase: str, function):
        """The function, with a phase of its own and the rest behind it."""

        def wrapped(*arguments, **named):
            self.begin(phase)
            try:
                return function(*arguments, **named)
            finally:
                self.begin("rest")

        return wrapped


class Work:
    """Counts tokens and FLOPs of all models in the process, and tells the clock which phase it is.

    The counts stay on the GPU until a step is over, so that counting does not wait for it.
    """

    def __init__(self, clock: Clock):
        self.clock, self.bodies, self.sums, self.generating = clock, {}, {}, False
        self.generated = self.flops_generated = 0

    def watch(self) -> None:
        """From here on every Qwen3 that is made and called is counted."""
        from transformers import GenerationMixin
        from transformers.models.qwen3 import modeling_qwen3 as qwen3

        self.wrap(qwen3.Qwen3Model, counting=True)
        for name in ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification", "Qwen3ForTokenClassification"):
            self.wrap(getattr(qwen3, name), counting=False)
        initialize, generate = qwen3.Qwen3ForCausalLM.__init__, GenerationMixin.generate

        def initialized(model, config, *arguments, **named):
            initialize(model, config, *arguments, **named)
            model.model.output_weights = config.hidden_size * config.vocab_size

        def sampled(model, *arguments, **named):
            return self.sample(generate, model, *arguments, **named)

        qwen3.Qwen3ForCausalLM.__init__ = initialized
        GenerationMixin.generate = sampled

    def wrap(self, kind, counting: bool) -> None:
        """Each call of a model of this kind begins a phase, and is counted."""
        import torch

        forward = kind.forward
        enter, leave, count = (torch.compiler.disable(step) for step in (self.enter, self.leave, self.count))

        @functools.wraps(forward)
        def watched(model, input_ids=None, *arguments, **named):
            if self.generating:
                return forward(model, input_ids, *arguments, **named)
            before = enter()
            if counting:
                count(model, input_ids, named)
            output = forward(model, input_ids, *arguments, **named)
            leave(before)
            return output

        kind.forward = watched

    def enter(self) -> str | None:
        """The phase to go back to: a reference that is asked while a loss is being computed interrupts the forward phase."""
        import torch

        if self.clock.phase == "backward":  # checkpointing computes a layer again, never a whole model
            return None
        before = self.clock.phase
        self.clock.begin("forward" if torch.is_grad_enabled() else "scoring")
        return before

    def leave(self, before: str | None) -> None:
        if before == "forward":
            self.clock.begin("forward")

    def count(self, body, input_ids, named: dict) -> None:
        """Adds the tokens of one call and, for the attention, the squares of the lengths of the rows."""
        import torch

        seen = input_ids if input_ids is not None else named["inputs_embeds"][..., 0]
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        if mask is not None and mask.dim() == 2:
            lengths = mask.sum(-1)
            tokens, squares = lengths.sum(), (lengths**2).sum()
        elif positions is not None:  # several rows in one: a row of T tokens has the positions 0 to T - 1
            tokens, squares = torch.tensor(seen.numel()), (2 * positions + 1).sum()
        else:
            tokens, squares = torch.tensor(seen.numel()), torch.tensor(seen.numel() * seen.shape[1])
        trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in body.parameters())
        self.bodies[id(body)] = body
        sums = self.sums.setdefault((id(body), trained), [0, 0])
        sums[0], sums[1] = sums[0] + tokens.double(), sums[1] + squares.double()

    def sample(self, generate, model, inputs=None, *arguments, **named):
        """generate(), with answers that all have the longest length that is allowed."""
        import torch
        from transformers import LogitsProcessorList

        ids = inputs if inputs is not None else named["input_ids"]
        mask = named.get("attention_mask")
        config = arguments[0] if arguments else named.get("generation_config")
        longest = named.get("max_new_tokens") or (config or model.generation_config).max_new_tokens
        end, last = model.config.eos_token_id, ids.shape[1] + longest - 1

        def fixed_length(so_far, scores):
            if so_far.shape[1] < last:
                scores = scores.clone()  # PPO keeps what came in
                scores[:, end] = -torch.inf
            else:
                scores = torch.full_like(scores, -torch.inf)
                scores[:, end] = 0
            return scores

        self.clock.begin("generation")
        self.generating = True
        try:
            output = generate(model, inputs, *arguments, logits_processor=LogitsProcessorList([fixed_length]), **named)
        finally:
            self.generating = False
            self.clock.begin("rest")
        prompts = (mask.sum(-1) if mask is not None else torch.full((len(ids),), ids.shape[1])).double()
        tokens = (prompts + longest).sum().item()
        squares = (prompts**2 + longest * prompts + longest * (longest + 1) / 2).sum().item()
        parts = [model.model, model.ref_model] if hasattr(model, "ref_model") else [model]  # Nash-MD mixes two
        for body in (module for part in parts for module in part.modules() if type(module).__name__ == "Qwen3Model"):
            self.flops_generated += flops(body, tokens, squares, trained=False)
        self.generated += len(ids) * longest
        return output

    def totals(self) -> dict[str, float]:
        """Everything so far. The tokens of a step are those of the model that is trained on most, which is the policy."""
        trained = Counter({model: sums[0].item() for (model, trained), sums in self.sums.items() if trained})
        work = sum(
            flops(self.bodies[model], sums[0].item(), sums[1].item(), trained)
            for (model, trained), sums in self.sums.items()
        )
        return {
            "tokens": max(trained.values(), default=0),
            "generated": self.generated,
            "flops": work + self.flops_generated,
        }


def weights(body) -> tuple[int, int]:
    """Weights in matrices, with the output layer and without the embeddings: all of them, and those that are trained."""
    matrices = [weight for name, weight in body.named_parameters() if weight.dim() == 2 and "embed_tokens" not in name]
    output, table = getattr(body, "output_weights", 0), body.get_input_embeddings().weight
    trained = sum(weight.numel() for weight in matrices if weight.requires_grad)
    return sum(weight.numel() for weight in matrices) + output, trained + (output if table.requires_grad else 0)


def flops(body, tokens: float, squares: float, trained: bool) -> float:
    """The formula at the top of this file; `squares` is the sum of T over the tokens."""
    config = body.config
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * squares
    every, changing = weights(body)
    if not trained:
        return 2 * every * tokens + attention
    return (4 * every + 2 * changing) * tokens + 3 * attention


def mfu(flops_per_second: float, gpu: str | None) -> float | None:
    """The share of what the GPU can do in bfloat16; None where that is not known."""
    return flops_per_second / PEAKS[gpu] if gpu in PEAKS else None


def steps_of(job: dict, size: str) -> tuple[int, int, int]:
    """How many steps warm up, are timed, and are split into phases."""
    return STEPS["sampling" if size == "tiny" or job["name"] in SAMPLING else "training"]


def load(name: str):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def rows_of_a_step(settings: dict) -> int:
    """8 and 1 are TRL's defaults."""
    return settings.get("per_device_train_batch_size", 8) * settings.get("gradient_accumulation_steps", 1)


def shortened(real: dict, now: dict) -> dict[str, list[int]]:
    """What is smaller than in the script's own settings, with both numbers: {"answers": [64, 256]}."""
    pairs = [("rows", [rows_of_a_step(now), rows_of_a_step(real)])]
    pairs += [("answers", [now[flag], real[flag]]) for flag in ANSWER_FLAGS if flag in real]
    return {what: pair for what, pair in pairs if pair[0] < pair[1]}


def change_settings(job: dict, script, size: str, folder: Path) -> dict:
    """Puts the settings of a job in the place of the script's REAL -> those that differ from it.

    They do not go through the command line, which does not take all of them: not the generation_kwargs of OnlineDPOConfig.
    """
    import torch

    at_once = script.REAL.get("per_device_train_batch_size", 8)
    batch = rows_of_a_step(script.REAL)
    batch = min(batch, PROMPTS.get(job["name"], batch))
    known = {field.name for kind in script.FLAGS for field in fields(kind)}
    new = {flag: str(BUILD / "models" / f"{made}-{kind}") for flag, (made, kind) in models(job, size).items()}
    new |= {"dataset_name": str(rows_folder(job, size)), "output_dir": str(folder / "output")}
    new |= {"max_steps": sum(steps_of(job, size)), "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    if job["name"] != "ppo":  # it does not evaluate, and wants to have the data for it
        new["eval_strategy"] = "no"
    new |= OWN_FLAGS.get(job["name"], {})
    if job["way"] == "plain":
        kept = {name for name in script.REAL if name not in SPEED} | KEPT.get(job["name"], set())
        script.REAL = {name: value for name, value in script.REAL.items() if name in kept}
        at_once = (job.get("batch") or 8) * (2 if job["lever"] == "twice the rows at once" else 1)
        at_once = batch if job["lever"] == "whole batch at once" else at_once
        new |= PLAIN_FLAGS.get(job["name"], {})
    at_once = next(count for count in range(min(at_once, batch), 0, -1) if batch % count == 0)
    new |= {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": batch // at_once}
    if job["name"] in SAMPLING:
        new |= {flag: 8 if size == "tiny" else ANSWERS[job["name"]] for flag in ANSWER_FLAGS if flag in known}
    if job["way"] == "lora":
        new |= {"use_peft": True, "lora_target_modules": ADAPTED, "dtype": "bfloat16", "gradient_checkpointing": True}
    if job["lever"]:
        new |= LEVERS[job["lever"]][0] | LEVERS_WITH.get(job["lever"], {}).get(job["name"], {})
        if job["lever"] == "no checkpointing":  # then TRL samples with a cache
            new.pop("generation_kwargs", None)
    if not torch.cuda.is_available() and "bf16" not in script.REAL:
        new["bf16"] = False
    if set(new) - known:
        raise ValueError(f"{job['name']}.py has no flag {sorted(set(new) - known)}")
    script.REAL = script.REAL | new
    return new


def rows_folder(job: dict, size: str) -> Path:
    return BUILD / "rows" / f"{job['name']}-{'tiny' if size == 'tiny' else 'real'}"


def prepare(job: dict, size: str) -> None:
    """Makes the models and rows of a job where they are not there yet, outside of the measured process."""
    for made, kind in models(job, size).values():
        folder = BUILD / "models" / f"{made}-{kind}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            make_model(made, kind, folder)
    if not rows_folder(job, size).is_dir():
        make_rows(job["name"], rows_folder(job, size), size == "tiny")


def measure(job: dict, size: str) -> dict:
    """One job in this process, with a look at the trainer from outside."""
    import torch
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import TrainerCallback

    script, clock, marks, trainers = load(job["name"]), Clock(), [], []
    work = Work(clock)
    steps = steps_of(job, size)
    build = script.build

    class Marks(TrainerCallback):
        """Reads the clock between two steps; the last steps are those with phases."""

        def on_step_end(self, args, state, control, **_):
            now = clock.now()
            if clock.on:
                clock.add()
            clock.phase = "rest"
            marks.append({"time": now, "phases": dict(clock.seconds), **work.totals()})
            if len(marks) == sum(steps[:2]):
                clock.start()

    def watched_build(*arguments):
        trainer = build(*arguments)
        trainers.append(trainer)
        trainer.add_callback(Marks())
        trainer.accelerator.backward = clock.timed("backward", trainer.accelerator.backward)
        trainer.accelerator.clip_grad_norm_ = clock.timed("optimizer", trainer.accelerator.clip_grad_norm_)
        return trainer

    with tempfile.TemporaryDirectory() as folder:
        if job["way"] == "toy":
            sys.argv = [f"{job['name']}.py", "--output_dir", f"{folder}/output"]
            script.main()
            return json.loads(Path(folder, "output", "held_out.json").read_text()) | memory()
        real = script.REAL
        changed = change_settings(job, script, size, Path(folder))
        sys.argv = [f"{job['name']}.py", "--model_name_or_path", changed["model_name_or_path"]]
        script.build = watched_build
        script.show_row = script.save = lambda *_: None  # an untrained model has nothing to show or to keep
        script.held_out = lambda *_: ({}, [])
        AcceleratedOptimizer.step = clock.timed("optimizer", AcceleratedOptimizer.step)
        work.watch()
        begun = time.perf_counter()
        script.main()
    warm_up, timed, phased = steps
    if len(marks) != sum(steps):
        raise RuntimeError(f"{sum(steps)} steps were asked for, and the trainer has made {len(marks)}")
    first, last, end = marks[warm_up - 1], marks[warm_up + timed - 1], marks[-1]
    times = [mark["time"] for mark in marks[warm_up - 1 : warm_up + timed]]
    each = [after - before for before, after in pairwise(times)]
    seconds = statistics.median(each)
    per_second = {name: (last[name] - first[name]) / timed / seconds for name in ("tokens", "generated", "flops")}
    whole = sum(end["phases"].values())
    log = [row for row in trainers[0].state.log_history if "train_runtime" not in row]
    args = trainers[0].args
    return {
        "seconds_per_step": seconds,
        "seconds_of_each_timed_step": each,
        "tokens_per_second": per_second["tokens"],
        "generated_per_second": per_second["generated"],
        "flops_per_second": per_second["flops"],
        "mfu": mfu(per_second["flops"], torch.cuda.get_device_name() if torch.cuda.is_available() else None),
        "phases": {name: value / whole for name, value in sorted(end["phases"].items())},
        "phased_seconds_per_step": whole / phased,
        "seconds_before_the_second_step": marks[0]["time"] - begun,
        "batch": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "shortened": shortened(real, script.REAL),
        "curves": {name: [row[name] for row in log if name in row] for name in CURVES if any(name in r for r in log)},
        "changed": {name: value for name, value in changed.items() if "/" not in str(value)},
    } | memory()


def memory() -> dict[str, int]:
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def attempt(function, job: dict, size: str) -> dict:
    """What comes of prepare or measure: figures, "out of memory", or an error with its last line."""
    try:
        return {"status": "measured"} | (function(job, size) or {})
    except (Exception, SystemExit) as error:
        import torch

        words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
        if isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words):
            return {"status": "out of memory"} | memory()
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        return {"status": "error", "error": f"{type(error).__name__}: {lines[-1][:300]}"}


# ------------------------------------------------------------------------------------------------------------ all jobs


IMPORTED = False  # whether import_once() has run; then a job is a fork of this process


def environment() -> dict[str, str]:
    """What every process of a run has in its environment."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(BUILD / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH")))),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],  # one GPU
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # is_available() then asks the driver's library and starts no CUDA
    }


def import_once(names: list[str]) -> None:
    """Imports what these scripts import, but runs none of their lines: some of those ask CUDA what it can do.

    CUDA does not survive a fork, so nothing in this process may start it.
    """
    global IMPORTED
    os.environ.update(environment())
    import torch
    from accelerate.optimizer import AcceleratedOptimizer  # noqa: F401 - what measure() asks for
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

    for name in names:
        tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
        tree.body = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        with contextlib.suppress(ImportError):  # its job will say so
            exec(compile(tree, f"the imports of {name}.py", "exec"), {})
    assert not torch.cuda.is_initialized(), "an import has started CUDA, so jobs cannot be forks: use --no-fork"
    # Threads of numpy's and pyarrow's libraries; both put themselves in order in a fork
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    IMPORTED = True


def child(arguments: list[str], limit: float, log) -> int | None:
    """Runs answer() in a process of its own; its exit status, or None if it had to be stopped at the limit."""
    sys.stdout.flush()  # else the fork has the text too
    parent, deadline, ended = os.getpid(), time.monotonic() + limit, None
    pid = os.fork()
    if pid == 0:
        become_child(arguments, log, parent)
    with contextlib.suppress(OSError):  # the child does it too: who comes first is open, and both need it
        os.setpgid(pid, pid)
    try:
        while ended is None and time.monotonic() < deadline:
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            time.sleep(0 if ended else 0.05)
    finally:
        os.killpg(pid, signal.SIGKILL)  # with whatever it has started
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


def become_child(arguments: list[str], log, parent: int) -> None:
    """What a fork does, from its first line to its end; without the imports it becomes a fresh process of this file."""
    status = 1
    try:
        die_with(parent)
        os.setpgid(0, 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        if not IMPORTED:
            os.execve(sys.executable, [sys.executable, str(Path(__file__).resolve()), *arguments], environment())
        answer(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # nothing of the parent is cleaned up here


def die_with(parent: int) -> None:
    """From here on the kernel kills this process when its parent ends, however it ends: no job stays on the GPU alone."""
    PR_SET_PDEATHSIG = 1  # it outlasts execve
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


def log_of(job: dict, command: str = "job") -> Path:
    """dpo-plain-packing.log: letters, digits and dashes, which any tool can carry."""
    return BUILD / "logs" / f"{slug(key(job) if job else command)}.log"


def last_lines(file: Path, count: int) -> str:
    lines = file.read_text(errors="replace").rstrip().splitlines() if file.is_file() else []
    return "".join(f"    | {line[:300]}\n" for line in lines[-count:])


def ask(command: str, job: dict, size: str, limit: float) -> dict | None:
    """The answer of a child, "error" if it died without one, or None if it had to be stopped."""
    log_file = log_of(job, command)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, log_file.open("w") as log:
        reply = Path(folder) / "reply.json"
        status = child([command, json.dumps(job), size, str(reply)], limit, log)
        if reply.is_file():
            return json.loads(reply.read_text())
    if status is None:
        return None
    last = (log_file.read_text(errors="replace").strip().splitlines() or [""])[-1][:300]
    return {"status": "error", "error": f"the process ended with {status}: {last}"}


def answer(command: str, job: str, size: str, file: str) -> None:
    """What a child does: the job comes as JSON, and what comes of it goes into the file."""
    job, file = json.loads(job), Path(file)
    found = probe() if command == "probe" else attempt({"prepare": prepare, "job": measure}[command], job, size)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found))
    unfinished.replace(file)


def probe() -> dict:
    """The GPU, asked in a process of its own, so that the one which waits takes none of its memory."""
    import datasets  # noqa: F401 - both can be loaded, or the first thing that is seen is why not
    import torch
    import trl  # noqa: F401

    if not torch.cuda.is_available():
        return {"gpu": None}
    memory = torch.cuda.get_device_properties(0).total_memory
    return {"gpu": torch.cuda.get_device_name(), "memory": memory, "cuda": torch.version.cuda}


def run_job(job: dict, size: str, limit: float) -> dict | None:
    """One job -> its record, or None if it had to be stopped."""
    started = time.perf_counter()
    if job["way"] != "toy":
        prepared = ask("prepare", job, size, limit)
        if prepared is None or prepared["status"] != "measured":
            return prepared
    found = ask("job", job, size, limit - (time.perf_counter() - started))
    return found and found | {"wall_seconds": time.perf_counter() - started}


def is_done(record: dict | None, job: dict, again: bool) -> bool:
    """Whether this job needs no run: there is a record of these very settings, and no reason to try again."""
    if record is None or record["digest"] != job["digest"]:
        return False
    if record["status"].startswith("needs"):
        return missing_package(job) is not None
    return record["status"] == "measured" or not again


def missing_package(job: dict) -> str | None:
    """The package without which a lever cannot be tried."""
    package = LEVERS[job["lever"]][1] if job["lever"] else None
    return package if package and importlib.util.find_spec(package) is None else None


def run(
    todo: list[dict], size: str, file: Path, header: dict, deadline: float, again=False, also=(), longest=LIMIT
) -> list[dict]:
    """Runs the jobs that are not done, and writes the file after each; the jobs that are left when the time is over."""
    earlier = left_by_earlier_run(file, also)
    result = json.loads(earlier.read_text()) if earlier else {**header, "jobs": {}}
    changed = {name: (result.get(name), now) for name, now in header.items() if result.get(name) != now}
    if changed:
        raise SystemExit(
            f"{earlier} was measured with another state of {', '.join(changed)} (then, now): {changed}. Delete it to "
            "measure everything again"
        )
    records, least = result["jobs"], 0 if size == "tiny" else LEAST
    left = [job for job in todo if not is_done(records.get(key(job)), job, again)]
    many = len(left)
    while left:
        job, limit, too_large = left[0], min(longest, deadline - time.monotonic()), []
        if limit <= least:
            break
        if job["way"] == "plain" and job["lever"]:  # as many rows at once as fitted without the lever
            job = job | {"batch": records.get(f"{job['name']} plain", {}).get("batch")}
        if missing_package(job):
            record = {"status": f"needs {missing_package(job)}"}
        else:
            record = run_job(job, size, limit)
            while record and record["status"] == "out of memory" and job["way"] == "plain" and not job["lever"]:
                too_large.append(job.get("batch") or 8)
                if too_large[-1] == 1:
                    break
                job = job | {"batch": too_large[-1] // 2}  # as its user would: half of the rows at once
                limit = min(longest, deadline - time.monotonic())
                record = run_job(job, size, limit)
        if record is None and limit < longest and len(left) < many:
            break  # the slice has ended; the next one begins with this job and gives it all its time
        record = {"digest": job["digest"], **(record or {"status": f"over {limit:.0f} s"})}
        records[key(job)] = record | ({"out_of_memory_at": too_large} if too_large else {})
        left.pop(0)
        write(file, result, also)
        print(f"{key(job)}: {summary(record)}", flush=True)
        if record["status"].startswith(("error", "over")):
            print(last_lines(log_of(job), 15), end="", flush=True)
    return left


def left_by_earlier_run(file: Path, also) -> Path | None:
    """The JSON that this run goes on with: the one in its place, or else the newest copy in the other folders."""
    copies = [folder / file.name for folder in also if (folder / file.name).is_file()]
    return file if file.is_file() else max(copies, key=lambda copy: copy.stat().st_mtime, default=None)


def summary(record: dict) -> str:
    if record["status"] != "measured":
        return " ".join(filter(None, (record["status"], record.get("error"))))
    if "seconds" in record:
        return f"{record['seconds']:.0f} s, {record['before']} -> {record['after']}"
    return f"{record['seconds_per_step']:.2f} s a step, {record['tokens_per_second']:,.0f} tokens/s"


def write(file: Path, result: dict, also=()) -> None:
    """Puts the whole file into its place, so that it is never half written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(file)
    for folder in also:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)


def slug(gpu: str) -> str:
    """NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3"""
    return re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-")


def how_measured(size: str) -> dict:
    """What figures have to share if they are to stand side by side."""
    return {
        "size": size,
        "rows": {name: list(map(list, LENGTHS[name])) for name in ORDER},
        "number of rows": ROWS,
        "steps": {name: list(steps) for name, steps in STEPS.items()},
        "tokens of a sampled answer": ANSWERS,
        "prompts of a step, at most": PROMPTS,
    }


# ------------------------------------------------------------------------------------ packages for a machine without network

ALONG = (  # what TRL and datasets need, without pyarrow and pandas, which are large and mostly there: --with adds them
    *("trl", "datasets", "dill", "multiprocess", "xxhash", "liger-kernel"),
    *("requests", "urllib3", "certifi", "idna", "charset-normalizer"),
)


def requirements(names: tuple[str, ...]) -> list[str]:
    """Each package with the range that pyproject.toml gives it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {}
    for line in sum(project["optional-dependencies"].values(), project["dependencies"]):
        ranges[re.match(r"[\w-]+", line)[0]] = line
    return [ranges.get(name, name) for name in names]


def pack(python: str, more: list[str], room: int) -> None:
    """Downloads the wheels, if they and the repository have no more than `room` MiB."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(WHEELS)]
    for platform in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"):
        command += ["--platform", platform]
    subprocess.run([*command, *requirements((*ALONG, *more))], check=True)
    wheels = sorted(WHEELS.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    tree = sum((ROOT / name).stat().st_size for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())
    packed = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{packed / 2**20:6.1f} MiB  in {WHEELS}, and {tree / 2**20:.1f} MiB in the repository")
    if packed + tree > room * 2**20:
        shutil.rmtree(WHEELS)
        raise SystemExit(f"together more than {room} MiB, so nothing is kept: ask for less, or give more --room")


def unpack() -> None:
    """Puts the packages that are missing here into a folder that only the jobs see."""
    sys.path.insert(0, str(SITE))
    for wheel in sorted(WHEELS.glob("*.whl")):
        try:
            version(wheel.name.split("-")[0])
        except PackageNotFoundError:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(SITE)
    importlib.invalidate_caches()
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"{package} is not installed here. Where there is a network: python {sys.argv[0]} pack")


def main() -> None:
    started = time.monotonic()
    if sys.argv[1:2] in (["probe"], ["prepare"], ["job"]):  # a child
        return answer(*sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="download the packages for a machine without network")
    packing.add_argument("--python", default="3.12", help="the version of Python there")
    packing.add_argument("--with", dest="more", nargs="+", default=[], help="further packages: pyarrow pandas")
    packing.add_argument("--room", type=int, default=64, help="MiB for the repository and the packages")
    running = commands.add_parser("run", help="measure what is not measured yet")
    running.add_argument("--minutes", type=float, default=9, help="start no job after this time, loading included")
    running.add_argument("--limit", type=float, default=LIMIT, help="seconds after which a job is stopped")
    running.add_argument("--only", nargs="+", choices=ORDER, default=None, help="these trainers")
    running.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="these ways")
    running.add_argument("--again", action="store_true", help="try again what has failed")
    folders = "copy the JSON to these folders after each job; a run without a JSON goes on with the newest of them"
    running.add_argument("--also", type=Path, nargs="+", default=[], help=folders)
    running.add_argument("--no-fork", action="store_true", help="each job in a fresh process, which imports everything")
    running.add_argument("--tiny", type=Path, help=argparse.SUPPRESS)  # the tests: a tiny model, results in this folder
    commands.add_parser("list", help="what is measured")
    arguments = parser.parse_args()
    if arguments.command == "pack":
        return pack(arguments.python, arguments.more, arguments.room)
    if arguments.command == "list":
        return show()
    unpack()
    size = "tiny" if arguments.tiny else "real"
    names = [name for name in scripts() if arguments.only is None or name in arguments.only]
    if not arguments.no_fork:
        import_once(names)
    machine = ask("probe", {}, size, PROBE)
    if not machine or "error" in machine:
        print(last_lines(log_of({}, "probe"), 15), end="")
        raise SystemExit(f"the GPU cannot be asked: {machine['error'] if machine else f'no answer in {PROBE} s'}")
    if not machine["gpu"] and not arguments.tiny:
        raise SystemExit("PyTorch finds no NVIDIA GPU here: nothing can be measured")
    machine["gpu"] = machine["gpu"] or "none"
    versions = {package: version(package) for package in PACKAGES}
    python = ".".join(map(str, sys.version_info[:3]))
    header = machine | {"python": python, "versions": versions, "how": how_measured(size)}
    file = (arguments.tiny or MEASURED) / f"{slug(machine['gpu'])}.json"
    deadline = started + 60 * arguments.minutes
    todo = jobs(names, arguments.ways)
    left = run(todo, size, file, header, deadline, arguments.again, arguments.also, arguments.limit)
    print(f"{len(left)} jobs are left" + (": the same command goes on with them." if left else "."))


def show() -> None:
    """Each GPU and its jobs."""
    for file in sorted(MEASURED.glob("*.json")):
        records = json.loads(file.read_text())["jobs"]
        print(file.stem)
        for job in jobs(scripts(), list(WAYS)):
            record = records.get(key(job))
            stale = record and record["digest"] != job["digest"]
            state = "not measured" if not record else "the settings have changed since" if stale else summary(record)
            print(f"  {key(job):40}{state}")
    if not any(MEASURED.glob("*.json")):
        print("Nothing is measured on a GPU yet.")


if __name__ == "__main__":
    main()
