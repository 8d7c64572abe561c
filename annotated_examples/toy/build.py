"""Builds the toy world from fixed seeds: tokenizer, policy, teacher, reward model and data sets.

    python annotated_examples/toy/build.py           # the data sets, from the policy that lies here (seconds)
    python annotated_examples/toy/build.py --models  # everything, from nothing (under 45 minutes on two cores)

How it is made, and what it is not: README.md beside this file.
"""

import argparse
import copy
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)
from world import answer, draw, is_right, numbers_of, sloppy_answer, step_labels, text_of

HERE = Path(__file__).resolve().parent
COUNT = 5  # every data set asks for sums of five numbers; pretraining sees two to five
MISTAKES = 0.35  # the share of its answers in which the sloppy teacher slips
MARKED = 0.4  # the share of the pretraining texts that are marked homework
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "<|assistant|>{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{%- else -%}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


# --------------------------------------------------------------------------------------------------------- tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: every byte is a token, so every digit is one, and any text can be written."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def prompt_text(numbers: tuple[int, ...]) -> str:
    """The chat template's text up to the answer."""
    return f"<|user|>{text_of(numbers)}<|end|><|assistant|>"


# ------------------------------------------------------------------------------------------------------- pretraining


def config(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, mlp: int, **more) -> Qwen3Config:
    """A small Qwen3 with four heads."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=mlp,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **more,
    )


def marked(numbers: tuple[int, ...], text: str, rng: random.Random) -> str:
    """An answer as marked homework: `y` or `n` after most steps, so that a missing mark means nothing."""
    steps = zip(text.split(" "), step_labels(numbers, text), strict=True)
    return " ".join(step + (f" {'y' if good else 'n'}" if rng.random() < 0.6 else "") for step, good in steps)


def pretraining_text(rng: random.Random, mistakes: float, marks: float) -> tuple[str, str]:
    """A prompt, and what the model learns to write after it."""
    numbers = draw(rng, "pretrain", rng.randint(2, COUNT))
    if rng.random() < marks:
        text = marked(numbers, sloppy_answer(numbers, rng, 0.6), rng)
        return f"<|system|>mark<|end|>{prompt_text(numbers)}", f"{text}<|end|>"
    return prompt_text(numbers), sloppy_answer(numbers, rng, mistakes) + "<|end|>"


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows of different length -> (rows, longest row), filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def optimize(model: torch.nn.Module, loss: Callable[[int], torch.Tensor], steps: int, rate: float) -> None:
    """AdamW with a short warm-up and a cosine down to a twentieth of the rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.time()
    for step in range(steps):
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * decay
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1:5} loss {value.item():.4f} {time.time() - started:6.0f} s", flush=True)


def pretrain(
    model: Qwen3ForCausalLM, tokenizer, mistakes: float, marks: float, steps: int, rate: float, seed: int
) -> None:
    """Next-token prediction on what a teacher wrote; the prompts themselves carry no loss."""
    rng = random.Random(seed)

    def loss(_: int) -> torch.Tensor:
        texts = [pretraining_text(rng, mistakes, marks) for _ in range(64)]
        prompts = tokenizer([prompt for prompt, _ in texts], add_special_tokens=False)["input_ids"]
        targets = tokenizer([target for _, target in texts], add_special_tokens=False)["input_ids"]
        input_ids = padded([p + t for p, t in zip(prompts, targets, strict=True)], tokenizer.pad_token_id)
        labels = padded([[-100] * len(p) + t for p, t in zip(prompts, targets, strict=True)], -100)
        mask = (input_ids != tokenizer.pad_token_id).long()
        return model(input_ids=input_ids, attention_mask=mask, labels=labels).loss

    optimize(model, loss, steps, rate)


def train_reward_model(policy: Qwen3ForCausalLM, tokenizer, steps: int, rate: float, seed: int):
    """The policy's body with one number on top: the score, at the end of an answer, is the log-odds that it is right.

    The same question is asked after every step of the answer (Math-Shepherd's labels): with the end alone, four layers
    take many times longer to find out that they have to check the steps.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    settings = copy.deepcopy(policy.config)
    settings.num_labels = 1
    model = Qwen3ForSequenceClassification(settings)
    model.model.load_state_dict(policy.model.state_dict())

    def labelled(numbers: tuple[int, ...], text: str) -> tuple[list[int], list[float]]:
        """Token ids, and at the blank or the end mark behind each step whether all is right so far; NaN elsewhere."""
        ids = tokenizer(prompt_text(numbers), add_special_tokens=False)["input_ids"]
        labels = [math.nan] * len(ids)
        steps, good = text.split(" "), step_labels(numbers, text)
        for step, closing, label in zip(steps, [" "] * (len(steps) - 1) + ["<|end|>"], good, strict=True):
            tokens = tokenizer(step + closing, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += [math.nan] * (len(tokens) - 1) + [float(label)]
        return ids, labels

    def loss(_: int) -> torch.Tensor:
        problems = [draw(rng, "reward", rng.randint(3, COUNT)) for _ in range(48)]
        rows = [labelled(numbers, sloppy_answer(numbers, rng, 0.7)) for numbers in problems]
        input_ids = padded([ids for ids, _ in rows], tokenizer.pad_token_id)
        labels = padded([labels for _, labels in rows], math.nan)
        mask = (input_ids != tokenizer.pad_token_id).long()
        scores = model.score(model.model(input_ids=input_ids, attention_mask=mask).last_hidden_state).squeeze(-1)
        asked = ~labels.isnan()
        return torch.nn.functional.binary_cross_entropy_with_logits(scores[asked], labels[asked])

    optimize(model, loss, steps, rate)
    return model


# ---------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(model, tokenizer, problems: list[tuple[int, ...]], seed: int) -> list[str]:
    """One answer per problem at temperature 1, the same to the letter on every machine.

    Gumbel noise from NumPy's PCG64, one stream per problem, is added to float64 logits, and the largest wins: that is
    sampling from the softmax, without a draw that depends on how the machine rounds or how the batch is cut.
    """
    model = copy.deepcopy(model).double().eval()
    answers = []
    for start in range(0, len(problems), 250):
        part = problems[start : start + 250]
        prompts = tokenizer([prompt_text(numbers) for numbers in part], add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")  # fmt: skip
        noise = [numpy.random.default_rng([seed, start + index]) for index in range(len(part))]
        input_ids, mask = prompts["input_ids"], prompts["attention_mask"]
        cache, written = DynamicCache(), [[] for _ in part]
        for _ in range(64):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            logits = model(
                input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache
            ).logits[:, -1]
            gumbel = torch.tensor(numpy.stack([stream.gumbel(size=logits.shape[-1]) for stream in noise]))
            chosen = (logits + gumbel).argmax(-1)
            for row, token in zip(written, chosen.tolist(), strict=True):
                if not row or row[-1] != tokenizer.eos_token_id:
                    row.append(token)
            if all(row[-1] == tokenizer.eos_token_id for row in written):
                break
            input_ids, mask = chosen[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        answers += tokenizer.batch_decode(written, skip_special_tokens=True)
    return answers


# --------------------------------------------------------------------------------------------------------- data sets

SIZES = {"train": 2000, "validation": 200, "test": 200}  # rows of each data set
PROMPTS = {"train": 2600, "validation": 256, "test": 512}  # rows of prompt_only
SEEDS = {"train": 10, "validation": 20, "test": 30}


def user(numbers: tuple[int, ...]) -> list[dict[str, str]]:
    return [{"role": "user", "content": text_of(numbers)}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def data_sets(policy, tokenizer, split: str) -> Iterator[tuple[str, list[dict]]]:
    """Each data set of one split, as (name, rows), in TRL's formats.

    The sampled answers are the policy's own, four for each problem: what a user of these methods would sample from their model.
    """
    rng = random.Random(SEEDS[split])
    problems: list[tuple[int, ...]] = []
    while len(problems) < PROMPTS[split]:
        numbers = draw(rng, split, COUNT)
        if numbers not in problems:
            problems.append(numbers)
    yield "prompt_only", [{"prompt": user(numbers), "answer": str(sum(numbers))} for numbers in problems]

    yield (
        "prompt_completion",
        [{"prompt": user(numbers), "completion": assistant(answer(numbers))} for numbers in problems[: SIZES[split]]],
    )
    yield (
        "language_modeling",
        [{"messages": user(numbers) + assistant(answer(numbers))} for numbers in problems[: SIZES[split]]],
    )

    preference, unpaired, stepwise = [], [], []
    batches = [sample(policy, tokenizer, problems, seed=SEEDS[split] + attempt) for attempt in range(4)]
    for numbers, tries in zip(problems, zip(*batches, strict=True), strict=True):
        tries = list(dict.fromkeys(tries))
        right = [text for text in tries if is_right(numbers, text)]
        wrong = [text for text in tries if not is_right(numbers, text)]
        if right and wrong and len(preference) < SIZES[split]:
            row = {"prompt": user(numbers), "chosen": assistant(right[0]), "rejected": assistant(wrong[0])}
            preference.append(row)
    for numbers, text in zip(problems, batches[0], strict=True):
        if len(unpaired) < SIZES[split]:
            unpaired.append({"prompt": user(numbers), "completion": assistant(text), "label": is_right(numbers, text)})
    for numbers, text in zip(problems, batches[1], strict=True):
        if len(stepwise) < SIZES[split]:
            labels = step_labels(numbers, text)
            stepwise.append({"prompt": prompt_text(numbers), "completions": text.split(" "), "labels": labels})
    yield "preference", preference
    yield "unpaired_preference", unpaired
    yield "stepwise_supervision", stepwise


def write_data(policy, tokenizer) -> None:
    """data/<name>/<split>.jsonl: folders that `load_dataset` opens by path. The old ones go when the new ones are whole."""
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        for split in SIZES:
            for name, rows in data_sets(policy, tokenizer, split):
                path = Path(folder) / "data" / name / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        shutil.rmtree(HERE / "data", ignore_errors=True)
        (Path(folder) / "data").rename(HERE / "data")


# ------------------------------------------------------------------------------------------------------------ checks


def accuracy(model, tokenizer, split: str) -> float:
    """The share of right answers, sampled at temperature 1, on the problems of prompt_only."""
    rows = map(json.loads, (HERE / "data" / "prompt_only" / f"{split}.jsonl").read_text().splitlines())
    problems = [numbers_of(row["prompt"][0]["content"]) for row in rows]
    answers = sample(model, tokenizer, problems, seed=99)
    return sum(map(is_right, problems, answers)) / len(problems)


@torch.no_grad()
def pair_accuracy(model, tokenizer, split: str) -> float:
    """The share of the policy's own pairs in which the reward model scores the right answer higher."""
    rows = list(map(json.loads, (HERE / "data" / "preference" / f"{split}.jsonl").read_text().splitlines()))
    scores = []
    for column in ("chosen", "rejected"):
        texts = [tokenizer.apply_chat_template(row["prompt"] + row[column], tokenize=False) for row in rows]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        scores.append(logits.squeeze(-1))
    return (scores[0] > scores[1]).float().mean().item()


def save(model, tokenizer, name: str) -> None:
    """Weights (safetensors), config and tokenizer in the folder `name`."""
    shutil.rmtree(HERE / name, ignore_errors=True)
    model.save_pretrained(HERE / name)
    tokenizer.save_pretrained(HERE / name)


def build_policy(tokenizer) -> None:
    torch.manual_seed(1)
    policy = Qwen3ForCausalLM(config(tokenizer, hidden=128, layers=4, mlp=384))
    pretrain(policy, tokenizer, mistakes=MISTAKES, marks=MARKED, steps=1300, rate=2e-3, seed=1)
    save(policy, tokenizer, "policy")


def build_teacher(tokenizer) -> None:
    torch.manual_seed(2)
    teacher = Qwen3ForCausalLM(config(tokenizer, hidden=160, layers=5, mlp=480))
    pretrain(teacher, tokenizer, mistakes=0.0, marks=0.0, steps=700, rate=1.5e-3, seed=2)
    save(teacher.bfloat16(), tokenizer, "teacher")  # half the bytes in git; scripts load it in float32


def build_reward_model(tokenizer) -> None:
    policy = AutoModelForCausalLM.from_pretrained(HERE / "policy", dtype=torch.float32)
    save(train_reward_model(policy, tokenizer, steps=1500, rate=7e-4, seed=3), tokenizer, "reward_model")


BUILD = {"policy": build_policy, "teacher": build_teacher, "reward_model": build_reward_model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", action="store_true", help="train the models too, instead of loading them")
    parser.add_argument("--only", choices=BUILD, help="train this model and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # how a long sum is rounded depends on how many threads share it
    tokenizer, started = make_tokenizer(), time.time()
    if arguments.only:
        return BUILD[arguments.only](tokenizer)
    if arguments.models:
        with subprocess.Popen([sys.executable, __file__, "--only", "teacher"]) as teacher:  # on the other core
            build_policy(tokenizer)
            build_reward_model(tokenizer)
        if teacher.returncode:
            raise SystemExit("the teacher was not built")

    policy = AutoModelForCausalLM.from_pretrained(HERE / "policy", dtype=torch.float32)
    write_data(policy, tokenizer)
    teacher = AutoModelForCausalLM.from_pretrained(HERE / "teacher", dtype=torch.float32)
    reward_model = AutoModelForSequenceClassification.from_pretrained(HERE / "reward_model", dtype=torch.float32)
    print(f"policy        {accuracy(policy, tokenizer, 'test'):.3f} of the held-out answers right, sampled")
    print(f"teacher       {accuracy(teacher, tokenizer, 'test'):.3f} of the held-out answers right, sampled")
    print(f"reward model  {pair_accuracy(reward_model, tokenizer, 'test'):.3f} of the held-out pairs in order")
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
