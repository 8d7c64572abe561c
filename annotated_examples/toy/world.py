"""The toy world: chains of sums, a teacher who makes mistakes, and a verifier that sees every one of them.

A problem is a few numbers from 0 to 9, written `7+9+3`. An answer adds them from left to right, one step at a time, and
ends with the result after a `#`:

    7+9=16 16+3=19 #19

Everything here is plain Python without torch, so the truth about an answer never depends on a model.
"""

import hashlib
import random
import re

LARGEST = 9  # the largest number that a problem adds
SPLITS = {"pretrain": 60, "train": 20, "reward": 12, "validation": 4, "test": 4}  # per cent of all problems


def text_of(numbers: tuple[int, ...]) -> str:
    """`(7, 9, 3)` -> `"7+9+3"`."""
    return "+".join(map(str, numbers))


def numbers_of(text: str) -> tuple[int, ...]:
    """`"7+9+3"` -> `(7, 9, 3)`."""
    return tuple(int(part) for part in text.split("+"))


def split_of(numbers: tuple[int, ...]) -> str:
    """The one split that this problem belongs to, decided by a hash of its text.

    No two splits can share a problem, whoever draws from them, in whatever order and however often.
    """
    bucket = int.from_bytes(hashlib.sha256(text_of(numbers).encode()).digest()[:8], "big") % 100
    for split, share in SPLITS.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares of the splits do not add up to 100")


def draw(rng: random.Random, split: str, count: int) -> tuple[int, ...]:
    """A random problem of `count` numbers that belongs to `split`."""
    while True:
        numbers = tuple(rng.randint(0, LARGEST) for _ in range(count))
        if split_of(numbers) == split:
            return numbers


def answer(numbers: tuple[int, ...], wrong_step: int | None = None, error: int = 0) -> str:
    """The answer to a problem; with `wrong_step`, that step (from 0) is off by `error` and the rest builds on it."""
    steps, total = [], numbers[0]
    for index, number in enumerate(numbers[1:]):
        result = total + number + (error if index == wrong_step else 0)
        steps.append(f"{total}+{number}={result}")
        total = result
    return " ".join([*steps, f"#{total}"])


def sloppy_answer(numbers: tuple[int, ...], rng: random.Random, mistakes: float) -> str:
    """What the sloppy teacher writes: with probability `mistakes`, one step of the answer is off by 1, 2 or 10."""
    if rng.random() >= mistakes:
        return answer(numbers)
    while True:
        wrong_step, error = rng.randrange(len(numbers) - 1), rng.choice((-10, -2, -1, 1, 2, 10))
        if sum(numbers[: wrong_step + 2]) + error >= 0:
            return answer(numbers, wrong_step, error)


def is_right(numbers: tuple[int, ...], text: str) -> bool:
    """Whether an answer ends with `#` and the true sum."""
    found = re.search(r"#(\d+)$", text.strip())
    return found is not None and int(found.group(1)) == sum(numbers)


def step_labels(numbers: tuple[int, ...], text: str) -> list[bool]:
    """One label per step: can this answer still become right after the step?

    A step that builds on a wrong number is wrong too, however well it adds: nothing can follow that ends at the true sum.
    This is the hard label of Math-Shepherd (Wang et al. 2024, arXiv 2312.08935, section 3.3), here exact instead of estimated.
    """
    truth = answer(numbers).split(" ")
    steps = text.strip().split(" ")
    return [steps[: index + 1] == truth[: index + 1] for index in range(len(steps))]
