"""The toy world keeps its promises: true answers, data sets in TRL's formats, no problem in two splits, models in their bands."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "annotated_examples" / "toy"
sys.path.insert(0, str(TOY))
import world  # noqa: E402

SPLITS = ("train", "validation", "test")
COLUMNS = {
    "prompt_only": {"prompt", "answer"},
    "prompt_completion": {"prompt", "completion"},
    "language_modeling": {"messages"},
    "preference": {"prompt", "chosen", "rejected"},
    "unpaired_preference": {"prompt", "completion", "label"},
    "stepwise_supervision": {"prompt", "completions", "labels"},
}


def rows(name: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (TOY / "data" / name / f"{split}.jsonl").read_text().splitlines()]


def problem(row: dict) -> str:
    """The sum that a row asks for, whatever the row's type."""
    turns = row.get("prompt", row.get("messages"))
    return turns.split("<|user|>")[1].split("<|end|>")[0] if isinstance(turns, str) else turns[0]["content"]


# ----------------------------------------------------------------------------------------------------------- verifier


def test_the_verifier_on_answers_worked_out_by_hand():
    assert world.answer((7, 9, 3)) == "7+9=16 16+3=19 #19"
    assert world.answer((7, 9, 3), wrong_step=0, error=1) == "7+9=17 17+3=20 #20"
    assert world.is_right((7, 9, 3), "7+9=16 16+3=19 #19")
    assert not world.is_right((7, 9, 3), "7+9=17 17+3=20 #20")
    assert not world.is_right((7, 9, 3), "7+9=16 16+3=19")  # no result
    assert not world.is_right((7, 9, 3), "#19 or #20")
    assert not world.is_right((7, 9, 3), "")


def test_a_step_is_right_while_the_answer_can_still_become_right():
    assert world.step_labels((7, 9, 3), "7+9=16 16+3=19 #19") == [True, True, True]
    assert world.step_labels((7, 9, 3), "7+9=16 16+3=20 #20") == [True, False, False]
    assert world.step_labels((7, 9, 3), "7+9=17 17+3=20 #20") == [False, False, False]  # 17+3 is 20, and yet of no use


def test_the_sloppy_teacher_slips_as_often_as_it_should_and_only_once():
    rng = random.Random(0)
    wrong = 0
    for _ in range(2000):
        numbers = world.draw(rng, "train", 5)
        answer = world.sloppy_answer(numbers, rng, 0.35)
        slips = 0
        for step in answer.split(" ")[:-1]:
            terms, result = step.split("=")
            slips += sum(map(int, terms.split("+"))) != int(result)
        assert slips <= 1
        assert world.is_right(numbers, answer) == (slips == 0)
        wrong += slips
    assert 0.31 < wrong / 2000 < 0.39


# ---------------------------------------------------------------------------------------------------------- data sets


@pytest.mark.parametrize("name", COLUMNS)
def test_every_data_set_opens_by_its_path_with_three_splits(name):
    from datasets import load_dataset

    dataset = load_dataset(str(TOY / "data" / name))
    assert set(dataset) == set(SPLITS)
    for split in SPLITS:
        assert set(dataset[split].column_names) == COLUMNS[name]
        assert dataset[split].num_rows == len(rows(name, split)) > 0


def test_no_problem_is_in_two_splits_nor_among_those_of_pretraining_and_of_the_reward_model():
    problems = {split: {problem(row) for name in COLUMNS for row in rows(name, split)} for split in SPLITS}
    assert not problems["train"] & problems["validation"]
    assert not problems["train"] & problems["test"]
    assert not problems["validation"] & problems["test"]
    for split in SPLITS:  # pretraining and the reward model draw from splits of their own
        assert {world.split_of(world.numbers_of(text)) for text in problems[split]} == {split}
    rng = random.Random(0)
    for split in ("pretrain", "reward"):
        drawn = {world.text_of(world.draw(rng, split, 5)) for _ in range(5000)}
        assert not drawn & set.union(*problems.values())


@pytest.mark.parametrize("split", SPLITS)
def test_what_the_rows_claim_is_true(split):
    for row in rows("preference", split):
        numbers = world.numbers_of(problem(row))
        assert world.is_right(numbers, row["chosen"][0]["content"])
        assert not world.is_right(numbers, row["rejected"][0]["content"])
    for row in rows("unpaired_preference", split):
        assert row["label"] == world.is_right(world.numbers_of(problem(row)), row["completion"][0]["content"])
    for row in rows("stepwise_supervision", split):
        assert row["labels"] == world.step_labels(world.numbers_of(problem(row)), " ".join(row["completions"]))
        assert len(row["labels"]) == len(row["completions"]) > 0
    for row in rows("prompt_only", split):
        assert int(row["answer"]) == sum(world.numbers_of(problem(row)))
    for row in rows("prompt_completion", split):
        assert world.is_right(world.numbers_of(problem(row)), row["completion"][0]["content"])
    for row in rows("language_modeling", split):
        assert world.is_right(world.numbers_of(problem(row)), row["messages"][1]["content"])


# ---------------------------------------------------------------------------------------------- tokenizer and models


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOY / "policy")


def test_any_text_survives_the_tokenizer_and_every_digit_is_a_token(tokenizer):
    for text in ("7+9=16 16+3=19 #19", "Grüße, 世界!\n\ttab"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer("123")["input_ids"]) == 3


def test_pad_and_end_differ_and_the_answers_carry_the_training_tags(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    turns = [{"role": "user", "content": "7+9"}, {"role": "assistant", "content": "7+9=16 #16"}]
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    learned = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(learned) == "7+9=16 #16<|end|>"
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded["input_ids"][: len(prompt)] == prompt  # what TRL's trainers rely on to find the answer


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("toy_build", TOY / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_answers_are_what_the_committed_policy_says(build, tokenizer):
    """The first rows of the data sets, made again, come out byte for byte: weights, noise and order have not changed."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(TOY / "policy", dtype="float32")
    unpaired = rows("unpaired_preference", "test")[:40]
    problems = [world.numbers_of(problem(row)) for row in unpaired]
    again = build.sample(policy, tokenizer, problems, seed=build.SEEDS["test"])
    assert again == [row["completion"][0]["content"] for row in unpaired]


def test_the_models_are_in_their_bands(build, tokenizer):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy = AutoModelForCausalLM.from_pretrained(TOY / "policy", dtype="float32")
    teacher = AutoModelForCausalLM.from_pretrained(TOY / "teacher", dtype="float32")
    reward_model = AutoModelForSequenceClassification.from_pretrained(TOY / "reward_model", dtype="float32")
    assert 0.60 <= build.accuracy(policy, tokenizer, "test") <= 0.75
    assert build.accuracy(teacher, tokenizer, "test") >= 0.97
    assert build.pair_accuracy(reward_model, tokenizer, "test") >= 0.97


def test_the_world_is_small_and_holds_no_pickles():
    tracked = subprocess.run(["git", "ls-files", "-z", "--", str(TOY)], cwd=ROOT, capture_output=True, text=True).stdout
    files = [ROOT / name for name in tracked.split("\0") if name]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".py", ".md", ".json", ".jsonl", ".jinja", ".safetensors"}
    assert len([path for path in files if path.suffix == ".safetensors"]) == 3
