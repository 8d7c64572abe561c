"""The claims of annotated_trainers/prm.md that running TRL can show, on a random model of two layers, on the CPU."""

import functools
import inspect
import json
import math
import os
import re
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import datasets
import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import RandomSampler
from transformers import (
    DataCollatorForTokenClassification,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Trainer,
    TrainerCallback,
)
from trl import ModelConfig, RewardConfig, RewardTrainer
from trl.experimental.prm import PRMConfig, PRMTrainer
from trl.experimental.prm.prm_trainer import compute_accuracy
from walkthrough_tools import (
    CHECKPOINTING,
    EXAMPLES,
    EXPECTED,
    LOG2,
    PAGES,
    batch_of,
    comparisons,
    config,
    defaults_on,
    formula_names,
    make_trainer,
    metrics_on,
    named_tests,
    page_of,
    prose,
    section_of,
    tokenizer,
    trained,
)

PAGE = PAGES / "prm.md"
section = functools.partial(section_of, PAGE)
MEASURED = EXPECTED / "prm.json"


def row(prompt: str, steps, labels) -> dict:
    """One row of a stepwise supervision data set."""
    return {"prompt": prompt, "completions": steps, "labels": labels}


ROWS = [
    row("<|user|>1+2+3", ["1+2=3", "3+3=6", "#6"], [True, True, True]),
    row("<|user|>7+1+2", ["7+1=9", "9+2=11", "#11"], [False, False, False]),
    row("<|user|>2+2+4", ["2+2=4", "4+4=9", "#9"], [True, False, False]),
    row("<|user|>5+5+1", ["5+5=10", "10+1=12", "#12"], [True, False, False]),
]
WITHOUT_LABEL = row("1" * 60, ["1"], [True])  # with a `max_length` that ends within the prompt


def model(kind=Qwen3ForTokenClassification, **more):
    torch.manual_seed(0)
    return kind(Qwen3Config(**config(pad_token_id=0, **more)))


@pytest.fixture
def make(tmp_path):
    """Makes a PRMTrainer; keyword arguments of PRMTrainer go there, all others to PRMConfig."""

    def make(rows=ROWS, **more) -> PRMTrainer:
        sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 1}
        more = {**sizes, "step_separator": " ", **more}
        own = more.pop("model", None) or model()
        return make_trainer(PRMTrainer, PRMConfig, tmp_path / "run", rows, model=own, **more)

    return make


def places(labels) -> list[int]:
    return [place for place, label in enumerate(labels) if label != -100]


def at_steps(tokenized: dict) -> list[int]:
    return [label for label in tokenized["labels"] if label != -100]


def tokenized(features: dict, tokens=None, **more) -> dict:
    """One row, through TRL's own static method."""
    settings = {"step_separator": " ", "max_length": None, "max_completion_length": None}
    settings |= {"train_on_last_step_only": False, "is_eval": False, **more}
    return PRMTrainer.tokenize_row(features, tokens or tokenizer(), **settings)


# ---------------------------------------------------------------------------- the formulas, against TRL's own methods


page = page_of(PAGE)
ERRORS, agree, summary = comparisons()


def random_rows(seed: int, steps: tuple[int, ...]) -> list[dict]:
    dice = torch.Generator().manual_seed(seed)

    def digits():
        length = int(torch.randint(1, 8, (1,), generator=dice))
        return "".join(str(int(d)) for d in torch.randint(0, 10, (length,), generator=dice))

    def label():
        return bool(torch.rand((), generator=dice) < 0.5)

    return [row(digits(), [digits() for _ in range(n)], [label() for _ in range(n)]) for n in steps]


CASES = [(seed, steps) for seed in range(3) for steps in ((1,), (2, 5), (3, 1, 4, 2), (1, 9, 1))]


@pytest.fixture
def random_loss(make):
    """What TRL's trainer computes for random rows and random logits: from the rows to the loss and its gradient."""

    def run(seed, steps):
        trainer = make(random_rows(seed, steps))
        batch = batch_of(trainer, range(len(steps)))
        dice = torch.Generator().manual_seed(100 + seed)
        logits = (3 * torch.randn(*batch["labels"].shape, 2, generator=dice)).requires_grad_()
        trainer.model.score = torch.nn.Identity()  # in place of the head, so that the logits are ours
        trainer.model.dropout = Gives(logits)
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        assert outputs.logits is logits
        (gradient,) = torch.autograd.grad(loss, logits)
        return batch["labels"], logits, loss.detach(), gradient

    return run


class Gives(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, hidden):
        return self.value


def test_the_loss_on_the_page_is_what_trl_computes(page, random_loss):
    for case in CASES:
        labels, logits, loss, gradient = random_loss(*case)
        ours = page["step_label_loss"](logits, labels)
        agree(ours, loss)
        agree(torch.autograd.grad(ours, logits)[0], gradient)


def test_the_slope_on_the_page_is_what_trl_has(page, random_loss):
    for case in CASES:
        labels, logits, _, gradient = random_loss(*case)
        slope = page["step_label_slope"](logits, labels)
        agree(slope, gradient[..., 1])
        agree(-slope, gradient[..., 0])


@pytest.mark.parametrize("seed", range(4))
def test_the_probability_on_the_page_is_what_trl_has(page, random_loss, monkeypatch, seed):
    """The loss of a row with one right step is -log of the step's probability."""
    monkeypatch.setitem(globals(), "random_rows", lambda *_: [row("12", ["34"], [True])])
    labels, logits, loss, gradient = random_loss(seed, (1,))
    (ours,) = page["step_probability"](logits)[labels != -100]
    agree(ours, loss.exp() ** -1)
    agree(torch.autograd.grad(-ours.log(), logits)[0], gradient)


def test_the_accuracy_on_the_page_is_what_trl_computes(page):
    for seed in range(6):
        dice = torch.Generator().manual_seed(seed)
        logits = torch.randn(5, 11, 2, generator=dice)
        labels = torch.randint(0, 2, (5, 11), generator=dice)
        labels[torch.rand(5, 11, generator=dice) < 0.6] = -100
        logits[0] = 0.0  # ties, which count as "wrong"
        theirs = compute_accuracy((logits.numpy(), labels.numpy()))["accuracy"]
        agree(page["step_accuracy"](logits, labels), theirs)
    ties = compute_accuracy((np.zeros((1, 4, 2)), np.array([[0, 1, 1, -100]])))
    assert ties == {"accuracy": pytest.approx(1 / 3)}


class Catches(TrainerCallback):
    """Keeps the gradient of the head as it is before the optimizer's step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = model.score.weight.grad.clone()


@pytest.mark.parametrize("steps", [(1, 4, 2), (3, 3, 3, 3)])
def test_the_accumulated_loss_on_the_page_is_what_a_run_of_trl_makes(page, make, steps):
    rows = random_rows(7, steps)
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(steps), "max_grad_norm": 1e9}
    trainer, catches = make(rows, **settings), Catches()
    trainer.add_callback(catches)
    logged = trained(trainer)[0]["loss"]
    own = model().eval()
    losses = []
    for number in range(len(steps)):
        batch = batch_of(trainer, [number])
        logits = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses.append(page["step_label_loss"](logits, batch["labels"]))
    ours = page["prm_accumulated_loss"](losses)
    agree(ours, logged)
    agree(torch.autograd.grad(ours, own.score.weight)[0], catches.gradient)


def test_every_displayed_formula_has_its_function_and_is_compared_above():
    known = {"step-probability", "step-label-loss", "step-label-slope", "prm-accumulated-loss", "step-accuracy"}
    assert formula_names(PAGE) == sorted(known)


# ------------------------------------------------------------------------------------------------------- what is logged


def test_the_page_lists_exactly_the_keys_that_a_run_logs(make):
    trainer = make(eval_dataset=ROWS, eval_strategy="epoch")
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert set(metrics_on(PAGE)) == logged


def test_the_first_loss_is_near_log_2(make):
    rows = [{**r, "labels": [label] * 3} for r in ROWS for label in (True, False)]
    assert trained(make(rows, per_device_train_batch_size=8))[0]["loss"] == pytest.approx(LOG2, abs=0.03)
    quarter = trained(make(rows, per_device_train_batch_size=2, gradient_accumulation_steps=4))[0]["loss"]
    assert quarter == pytest.approx(4 * LOG2, abs=0.12)
    assert f"Four accumulation steps make {4 * LOG2:.1f} of it" in prose(PAGE)


def test_the_first_loss_of_the_toy_run_is_near_log_2():
    before = json.loads(MEASURED.read_text("utf-8"))["held_out"]["loss"]["before"]
    low, high = re.search(r"it lies between (0\.\d+) and (0\.\d+) over (?:five) seeds", prose(PAGE)).groups()
    assert len(before) == 5
    assert float(low) < min(before) < LOG2 < max(before) < float(high)
    assert max(before) - min(before) > 0.06


def test_the_loss_of_the_toy_run_is_below_log_2_in_its_first_line():
    loss = json.loads(MEASURED.read_text("utf-8"))["log"]["loss"]
    assert loss["step"][0] == 20
    assert loss["max"][0] < LOG2
    assert '"logging_steps": 20' in MEASURED.parents[1].joinpath("prm.py").read_text("utf-8")


def test_saying_right_to_everything_has_the_accuracy_on_the_page(page):
    labels = np.array([page["labels"]])
    says_right = np.stack([np.zeros(labels.shape), np.ones(labels.shape)], axis=-1)
    assert f"share of right steps   {compute_accuracy((says_right, labels))['accuracy']:.3f}" in PAGE.read_text("utf-8")


def test_the_toy_labels_are_false_behind_the_first_mistake():
    folder = EXAMPLES / "toy/data/stepwise_supervision"
    for split in ("train", "test"):
        for labels in datasets.load_dataset(str(folder), split=split)["labels"]:
            assert labels == sorted(labels, reverse=True)


def test_eval_loss_is_a_mean_of_batches_and_accuracy_one_of_steps(make):
    rows = [row("1", ["1"], [True]), row("2", ["2"] * 5, [False] * 5)]

    def evaluated(size):
        return make(eval_dataset=rows, per_device_eval_batch_size=size).evaluate()

    together, apart = evaluated(2), evaluated(1)
    each = [make(eval_dataset=[r]).evaluate()["eval_loss"] for r in rows]
    assert apart["eval_loss"] == pytest.approx(sum(each) / 2, rel=1e-5)
    assert together["eval_loss"] == pytest.approx((each[0] + 5 * each[1]) / 6, rel=1e-5)
    assert abs(apart["eval_loss"] - together["eval_loss"]) > 0.003
    assert apart["eval_accuracy"] == together["eval_accuracy"]


# ------------------------------------------------------------------------------------------- the sum over micro-batches


def test_four_micro_batches_give_four_times_the_loss_and_the_gradient(make):
    at_once = trained(make(max_grad_norm=1e9))[0]
    four = trained(make(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_grad_norm=1e9))[0]
    for key in ("loss", "grad_norm"):
        assert four[key] == pytest.approx(4 * at_once[key], rel=1e-4)


def test_the_number_of_labels_is_offered_taken_and_lost(make):
    trainer = make()
    assert trainer.model_accepts_loss_kwargs
    counted = trainer._get_num_items_in_batch([batch_of(trainer)], torch.device("cpu"))
    assert counted == 12
    losses = [
        trainer.compute_loss(trainer.model.eval(), dict(batch_of(trainer)), num_items_in_batch=torch.tensor(count))
        for count in (12, 1200)
    ]
    assert losses[0] == losses[1]


def test_each_process_multiplies_its_loss_by_their_number(make, monkeypatch):
    trainer = make(eval_dataset=ROWS)
    trainer.model.eval()
    assert trainer.args.average_tokens_across_devices

    def losses():
        counted = trainer._get_num_items_in_batch([batch_of(trainer)], torch.device("cpu"))
        training = trainer.compute_loss(trainer.model, dict(batch_of(trainer)), num_items_in_batch=counted)
        evaluation = trainer.prediction_step(trainer.model, dict(batch_of(trainer)), prediction_loss_only=True)[0]
        return [float(training.detach()), float(evaluation)]

    alone = losses()
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert losses() == pytest.approx([2 * loss for loss in alone])
    trainer.model_accepts_loss_kwargs = False
    assert losses() == pytest.approx(alone)


def test_adam_hides_the_factor_and_sgd_does_not(make):
    def moved(**settings):
        own = model()
        before = own.score.weight.detach().clone()
        make(model=own, max_grad_norm=1e9, **settings).train()
        return own.score.weight.detach() - before

    four = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    torch.testing.assert_close(moved(**four), moved(), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(moved(optim="sgd", **four), 4 * moved(optim="sgd"), rtol=1e-3, atol=1e-7)


def test_one_line_mends_the_accumulation(make):
    at_once = trained(make())[0]
    trainer = make(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer.model_accepts_loss_kwargs = False
    mended = trained(trainer)[0]
    for key in ("loss", "grad_norm"):
        assert mended[key] == pytest.approx(at_once[key], rel=1e-4)
    line = "trainer.model_accepts_loss_kwargs = False"
    assert f"`{line}`" in prose(PAGE)
    assert line in MEASURED.parents[1].joinpath("prm.py").read_text("utf-8")


# ------------------------------------------------------------------------------------------------------------ the rows


def test_the_label_stands_at_the_last_token_of_the_separator(make):
    trainer = make(step_separator=" #", processing_class=tokenizer())
    tokens, first = trainer.processing_class, trainer.train_dataset[2]
    ends = [tokens.decode(first["input_ids"][: place + 1]) for place in places(first["labels"])]
    prompt = "<|user|>2+2+4"
    assert ends == [prompt + "2+2=4 #", prompt + "2+2=4 #4+4=9 #", prompt + "2+2=4 #4+4=9 ##9 #"]
    assert at_steps(first) == [1, 0, 0]


def test_nothing_stands_between_prompt_and_steps_and_nothing_at_the_end(make):
    tokens = tokenizer()
    assert tokens.decode(tokenized(ROWS[0])["input_ids"]) == "<|user|>1+2+31+2=3 3+3=6 #6 "
    assert tokens.eos_token_id not in tokenized(ROWS[0])["input_ids"]


def test_messages_are_refused():
    message = [{"role": "user", "content": "1+2"}]
    with pytest.raises((ValueError, TypeError)):
        tokenized({**ROWS[0], "prompt": message})
    with pytest.raises((ValueError, TypeError)):
        tokenized({**ROWS[0], "completions": [message] * 3})
    assert tokenizer().chat_template  # there is one, and it is not used


def test_bos_is_put_in_front_of_a_prompt_that_has_one():
    tokens = tokenizer()
    tokens.bos_token = "<|user|>"
    assert tokens.decode(tokenized(ROWS[0], tokens)["input_ids"]).startswith("<|user|><|user|>1+2+3")
    assert tokens.decode(tokenized({**ROWS[0], "prompt": "1+2+3"}, tokens)["input_ids"]).startswith("<|user|>1+2+3")


def test_soft_labels_become_0():
    assert at_steps(tokenized({**ROWS[0], "labels": [0.9, 0.2, 1.0]})) == [0, 0, 1]


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_beyond_the_classes_stop_the_first_step(make, label):
    trainer = make([{**ROWS[0], "labels": [1, 0, label]}] * 4)
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        trainer.train()
    assert "Target 2 is out of bounds" in prose(PAGE)


def test_a_third_class_needs_a_head_of_three(make):
    trainer = make([{**ROWS[0], "labels": [1, 0, 2]}] * 4, model=model(num_labels=3))
    assert trained(trainer)[0]["loss"] == pytest.approx(math.log(3), abs=0.05)


def test_a_label_of_minus_100_leaves_the_step_out(make):
    trainer = make([{**ROWS[2], "labels": [1, 0, -100]}])
    assert at_steps(trainer.train_dataset[0]) == [1, 0]
    assert trainer._get_num_items_in_batch([batch_of(trainer, [0])], torch.device("cpu")) == 2


def test_a_text_in_place_of_steps_is_read_letter_by_letter():
    letters = tokenized(row("7", "1+2", [True, False, True]))
    assert tokenizer().decode(letters["input_ids"]) == "71 + 2 "
    assert at_steps(letters) == [1, 0, 1]


def test_a_missing_label_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        tokenized({**ROWS[0], "labels": [True, False]})


def test_a_separator_that_the_tokenizer_drops_leaves_the_label_at_the_step():
    assert tokenizer()("\n", add_special_tokens=False)["input_ids"] == []
    dropped = tokenized(ROWS[2], step_separator="\n")
    text = tokenizer().decode(dropped["input_ids"])
    assert text == "<|user|>2+2+42+2=44+4=9#9"
    ends = [tokenizer().decode(dropped["input_ids"][: place + 1])[-3:] for place in places(dropped["labels"])]
    assert ends == ["2=4", "4=9", "9#9"]


def merging():
    return tokenizer(merges=[("6", " ")], more=["6 "])


def test_a_row_tokenized_at_once_may_have_other_tokens():
    tokens = merging()
    by_steps = tokenized(ROWS[0], tokens)["input_ids"]
    at_once = tokens(tokens.decode(by_steps), add_special_tokens=False)["input_ids"]
    assert tokens.decode(at_once) == tokens.decode(by_steps)
    assert len(at_once) < len(by_steps)


def test_the_page_scores_answers_as_the_trainer_does(page, make):
    tokens = merging()
    tokens.bos_token = "<|user|>"
    own = model(vocab_size=len(tokens)).eval()
    trainer = make(model=own, processing_class=tokens)
    for number, features in enumerate(ROWS):
        ids = torch.tensor([trainer.train_dataset[number]["input_ids"]])
        theirs = own(input_ids=ids).logits.softmax(-1)[0, places(trainer.train_dataset[number]["labels"]), 1]
        ours = page["score_steps"](own, tokens, features["prompt"], features["completions"], separator=" ")
        assert ours == pytest.approx(theirs.tolist(), rel=1e-5)


def test_a_cut_step_loses_its_label_and_leaves_its_text():
    whole, cut = tokenized(ROWS[2]), tokenized(ROWS[2], max_length=16)
    assert tokenizer().decode(cut["input_ids"]) == "<|user|>2+2+42+2=4 4+4="
    assert cut["labels"] == whole["labels"][:16]
    assert at_steps(cut) == [1]
    assert at_steps(tokenized(ROWS[2], max_length=6)) == []


def test_bos_and_prompt_do_not_count_as_completion():
    tokens = tokenizer()
    tokens.bos_token = "<|user|>"
    for own, prompt in ((tokenizer(), 6), (tokens, 7)):
        cut = tokenized(ROWS[2], own, max_completion_length=8)
        assert len(cut["input_ids"]) == len(cut["labels"]) == prompt + 8


def test_evaluation_asks_about_every_step(make):
    trainer = make(eval_dataset=ROWS, train_on_last_step_only=True)
    assert [at_steps(r) for r in trainer.train_dataset] == [[1], [0], [0], [0]]
    assert [at_steps(r) for r in trainer.eval_dataset] == [[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 0]]
    for r in trainer.train_dataset:
        assert places(r["labels"]) == [len(r["labels"]) - 1]


def test_a_row_without_steps_fails_with_one_option_only():
    empty = row("12", [], [])
    assert tokenized(empty)["labels"] == [-100, -100]
    assert tokenized(empty, train_on_last_step_only=True, is_eval=True)["labels"] == [-100, -100]
    with pytest.raises(IndexError):
        tokenized(empty, train_on_last_step_only=True)


def test_the_example_in_the_docstring_cannot_be_run():
    lines = [line.strip() for line in inspect.getdoc(PRMTrainer.tokenize_row).split("\n")]
    call = " ".join(lines[next(i for i, line in enumerate(lines) if "PRMTrainer.tokenize_row(" in line) :])
    assert "max_length=" not in call.split(")", 1)[0].replace("max_completion_length=", "")
    with pytest.raises(TypeError, match="max_length"):
        PRMTrainer.tokenize_row(
            ROWS[0], tokenizer(), "\n", max_completion_length=None, train_on_last_step_only=False, is_eval=False
        )
    ids, labels = (re.search(rf"'{name}': \[(.*?)\]", call)[1].count(",") + 1 for name in ("input_ids", "labels"))
    assert labels < ids


def test_labels_stay_integers_although_the_column_was_boolean(make):
    rows = Dataset.from_list(ROWS)
    trainer = make(rows)
    assert {-100, 0, 1} == {label for r in trainer.train_dataset for label in r["labels"]}
    plain = rows.map(lambda r: {"labels": [-100, -100, int(r["labels"][0])]})  # as TRL once did
    assert set(plain["labels"][0]) == {True}


# ----------------------------------------------------------------------------------------------- rows without a label


def test_a_batch_without_labels_teaches_nothing_and_is_logged_as_0(make):
    own = model()
    before = {name: weight.clone() for name, weight in own.named_parameters()}
    trainer = make([WITHOUT_LABEL] * 4, model=own, max_length=40)
    assert math.isnan(trainer.compute_loss(own, dict(batch_of(trainer))))
    (line,) = trained(trainer)
    assert line["loss"] == line["grad_norm"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in own.named_parameters())


def test_an_empty_micro_batch_adds_no_gradient_and_its_place_decides_what_is_logged(make):
    settings = {"max_length": 40, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    if "train_sampling_strategy" not in PRMConfig.__dataclass_fields__:
        pytest.skip("this transformers cannot be told the order")
    alone = trained(make(ROWS[:1], **settings))[0]
    first, second = (
        trained(make(rows, gradient_accumulation_steps=2, **settings))[0]
        for rows in ([WITHOUT_LABEL, ROWS[0]], [ROWS[0], WITHOUT_LABEL])
    )
    assert first["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
    assert second["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-5)  # 0 in place of nan
    assert second["loss"] == pytest.approx(2 * alone["loss"], rel=1e-5)  # what was there so far, again


def test_an_evaluation_batch_without_labels_is_left_out_or_nan(make):
    settings = {"max_length": 40, "per_device_eval_batch_size": 1}
    whole = make(eval_dataset=ROWS, **settings).evaluate()
    cut = make(eval_dataset=[WITHOUT_LABEL, *ROWS], **settings).evaluate()
    assert cut["eval_accuracy"] == whole["eval_accuracy"]
    if "5.10." in transformers.__version__:
        assert math.isnan(cut["eval_loss"])
    elif "5.23." in transformers.__version__:
        assert cut["eval_loss"] == pytest.approx(whole["eval_loss"])


# ------------------------------------------------------------------------------------------------------------ the model


def test_the_head_is_random_with_a_bias_of_0_and_a_dropout():
    own = model()
    assert own.score.weight.shape == (2, 32)
    assert float(own.score.weight.std()) == pytest.approx(own.config.initializer_range, rel=0.3)
    assert own.score.bias.tolist() == [0, 0]
    assert own.dropout.p == 0.1
    assert own.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_an_adapter_trains_the_head_with_its_task_type_only(make):
    def head(task_type, **more):
        trainer = make(peft_config=LoraConfig(target_modules=["q_proj"], task_type=task_type, **more))
        return [name for name, weight in trainer.model.named_parameters() if "score" in name and weight.requires_grad]

    assert len(head("TOKEN_CLS")) == 2
    assert head(None) == []
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
        head("CAUSAL_LM")
    assert ModelConfig().lora_task_type == "CAUSAL_LM"
    with pytest.raises(TypeError, match="modules_to_save"):
        make(peft_config=LoraConfig(target_modules="all-linear", task_type="TOKEN_CLS"))
    make(peft_config=LoraConfig(target_modules="all-linear", exclude_modules=["score"], task_type="TOKEN_CLS"))


def test_a_second_adapter_is_refused(make):
    adapter = LoraConfig(target_modules=["q_proj"], task_type="TOKEN_CLS")
    once = make(peft_config=adapter).model
    with pytest.raises(ValueError, match="merge"):
        make(model=once, peft_config=adapter)


def test_dropout_is_switched_off_in_head_and_adapter(make):
    adapter = LoraConfig(target_modules=["q_proj"], task_type="TOKEN_CLS", lora_dropout=0.3)

    def rates(**settings):
        modules = make(peft_config=adapter, **settings).model.modules()
        return {module.p for module in modules if isinstance(module, torch.nn.Dropout)}

    assert rates() == {0}
    assert rates(disable_dropout=False) == {0.1, 0.3}


def test_checkpointing_makes_the_output_of_frozen_embeddings_require_a_gradient(make):
    adapter = LoraConfig(target_modules=["q_proj"], task_type="TOKEN_CLS")
    on, plain = {CHECKPOINTING: True}, {f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}

    def requires(**settings):
        embeddings = make(model=get_peft_model(model(), adapter), **settings).model.get_input_embeddings()
        assert not embeddings.weight.requires_grad
        return embeddings(torch.tensor([[1]])).requires_grad

    assert requires(**on)
    assert requires(**on, **plain)  # TRL's own lines are passed over, and transformers has done it already
    assert not requires()


def test_a_tokenizer_without_a_pad_token_fails_at_the_first_batch(make):
    trainer = make(processing_class=tokenizer(pad=None))
    with pytest.raises(ValueError, match="padding token"):
        trainer.train()


def test_padding_with_eos_does_no_harm(make):
    rows = [ROWS[0], row("<|user|>1", ["1<|end|>"], [True])]
    trainer = make(rows, processing_class=tokenizer(pad="<|end|>"))
    batch = batch_of(trainer, [0, 1])
    lengths = [len(r["input_ids"]) for r in trainer.train_dataset]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["labels"] != -100).sum(1).tolist() == [3, 1]


def test_labels_are_padded_on_the_side_of_the_tokenizer(make):
    tokens = tokenizer()
    tokens.padding_side = "left"
    batch = batch_of(make([*ROWS[:1], ROWS[3]], processing_class=tokens), [0, 1])
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert len(ids) == len(labels)
        assert {ids[place] for place in places(labels)} == {tokens.convert_tokens_to_ids(" ")}
    assert batch["input_ids"][0, 0] == tokens.pad_token_id


def test_a_path_model_init_or_no_args_fail(make, tmp_path):
    own = {"train_dataset": Dataset.from_list(ROWS), "processing_class": tokenizer()}
    args = PRMConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(AttributeError, match="disable_dropout"):
        PRMTrainer(model(), **own)
    for wrong in ({"model": "some/path"}, {"model_init": model}):
        with pytest.raises(AttributeError):
            PRMTrainer(args=args, **wrong, **own)
    with pytest.raises(ValueError, match="required"):
        PRMTrainer(model(), args=args, processing_class=tokenizer())
    defaults = inspect.signature(PRMTrainer.__init__).parameters
    assert defaults["args"].default is defaults["model"].default is None


def test_a_language_model_learns_to_write_token_1_in_place_of_the_separator(make):
    own = model(Qwen3ForCausalLM)
    trainer = make(model=own, max_steps=40, learning_rate=1e-2)
    losses = [line["loss"] for line in trained(trainer)]
    assert losses[0] > 3
    assert losses[-1] < 0.1
    batch = batch_of(trainer, [0])
    says = own(input_ids=batch["input_ids"]).logits[0].argmax(-1)
    assert [int(says[place - 1]) for place in places(batch["labels"][0].tolist())] == [1, 1, 1]


def test_a_sequence_classifier_fails(make):
    with pytest.raises((RuntimeError, ValueError)):
        make(model=model(Qwen3ForSequenceClassification, num_labels=1)).train()


# ------------------------------------------------------------------------------------------------------- the evaluation


def test_a_dictionary_of_evaluation_sets_fails(make):
    assert "dict" in str(inspect.signature(PRMTrainer.__init__).parameters["eval_dataset"].annotation)
    with pytest.raises(AttributeError, match="map"):
        make(eval_dataset={"a": Dataset.from_list(ROWS)})


def test_one_question_decides_for_both_data_sets(make):
    done = Dataset.from_list([{"input_ids": [4, 5, 6], "labels": [-100, -100, 1]}])
    with pytest.raises(KeyError, match="prompt"):
        make(eval_dataset=done)
    trainer = make(done, eval_dataset=ROWS)
    assert trainer.eval_dataset.column_names == ["prompt", "completions", "labels"]
    with pytest.raises(ValueError, match="input_ids"):
        trainer.evaluate()
    assert make(done, eval_dataset=done).evaluate()["eval_loss"] > 0


def test_streams_fail(make):
    with pytest.raises(TypeError, match="num_proc"):
        make(Dataset.from_list(ROWS).to_iterable_dataset())


def test_predictions_without_their_last_dimension_are_taken_for_pairs(make):
    def shorter(logits, labels):
        return logits.argmax(-1)

    plain = make(eval_dataset=ROWS).evaluate()["eval_accuracy"]
    assert round(plain * 12) == pytest.approx(plain * 12)  # a share of twelve steps
    try:
        found = make(eval_dataset=ROWS, preprocess_logits_for_metrics=shorter).evaluate()["eval_accuracy"]
    except ValueError as error:
        assert "broadcast" in str(error)
    else:
        assert found != plain


def test_the_rows_are_shuffled(make):
    assert isinstance(make()._get_train_sampler(), RandomSampler)


# ------------------------------------------------------------------------------------------------------- the neighbours


def test_the_outcome_loss_on_the_page_is_what_reward_trainer_computes(page, tmp_path):
    rows = [{"prompt": "1+2", "chosen": "1+2=3", "rejected": "1+2=4"}, {"prompt": "2", "chosen": "2", "rejected": "33"}]
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", CHECKPOINTING: False}
    trainer = RewardTrainer(
        model(Qwen3ForSequenceClassification, num_labels=1),
        args=RewardConfig(output_dir=str(tmp_path), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    batch = batch_of(trainer, [0, 1])
    loss, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    ours = page["outcome_loss"](*outputs.logits.squeeze(-1).chunk(2))
    agree(ours, loss)
    gradients = [torch.autograd.grad(each, outputs.logits, retain_graph=True)[0] for each in (ours, loss)]
    agree(*gradients)


def test_what_the_page_says_about_the_option_is_what_the_trainer_tokenizes(page):
    for features in page["data"]:
        last = tokenized(features, page["tokenizer"], train_on_last_step_only=True)
        assert at_steps(last) == [int(features["labels"][-1])]
        assert int(all(features["labels"])) == int(features["labels"][-1])  # "right so far" ends in the outcome


# ------------------------------------------------------------------------------------------------------- the page itself


def test_no_method_but_one_of_the_parent_is_overridden():
    own = {name for name, value in vars(PRMTrainer).items() if callable(getattr(value, "__func__", value))}
    assert own == {"__init__", "tokenize_row", "_save_checkpoint"}
    base = {name for name in vars(PRMTrainer.__mro__[1]) if name in vars(Trainer)}
    assert {"compute_loss", "training_step", "prediction_step", "log"}.isdisjoint(base)
    assert not hasattr(PRMTrainer, "score")


def test_a_plain_trainer_does_the_same(make):
    trls = make(eval_dataset=ROWS, max_steps=3)
    own = model()
    own.dropout.p = 0.0
    plain = Trainer(
        model=own,
        args=trls.args,
        data_collator=DataCollatorForTokenClassification(tokenizer()),
        train_dataset=Dataset.from_list([tokenized(r) for r in ROWS]),
        eval_dataset=Dataset.from_list([tokenized(r, is_eval=True) for r in ROWS]),
        compute_metrics=compute_accuracy,
    )
    plain.remove_callback(PrinterCallback)
    assert trained(plain) == trained(trls)
    for key in ("eval_loss", "eval_accuracy"):
        assert plain.evaluate()[key] == trls.evaluate()[key]


def test_the_collator_is_that_of_transformers(make):
    assert type(make().data_collator) is DataCollatorForTokenClassification


def test_it_is_the_shortest_of_the_fifteen_trainers():
    package = Path(trl.__file__).parent
    experimental = ("orpo", "cpo", "bco", "ppo", "online_dpo", "nash_md", "gkd", "xpo", "prm")
    stable = ("sft", "reward", "dpo", "kto", "grpo", "rloo")
    paths = [package / "experimental" / name / f"{name}_trainer.py" for name in experimental]
    paths += [package / "trainer" / f"{name}_trainer.py" for name in stable]
    lengths = {path.stem: len(path.read_text("utf-8").split("\n")) for path in paths}
    assert len(lengths) == 15
    assert min(lengths, key=lengths.get) == "prm_trainer"


def test_the_helper_for_adapters_is_shared():
    users = [
        path.parent.name
        for path in (Path(trl.__file__).parent / "experimental").glob("*/*_trainer.py")
        if "import prepare_peft_model" in path.read_text("utf-8") or ", prepare_peft_model" in path.read_text("utf-8")
    ]
    assert len(users) >= 3
    assert "prm" in users


def test_the_arguments_that_the_page_calls_gone_are_gone():
    assert "`max_prompt_length` is gone" in prose(PAGE)
    assert "max_prompt_length" not in PRMConfig.__dataclass_fields__
    assert not hasattr(trl, "PRMTrainer")


def test_the_script_trains_on_the_data_that_the_page_names():
    script = MEASURED.parents[1].joinpath("prm.py").read_text("utf-8")
    assert '"dataset_name": "trl-lib/math_shepherd"' in script
    assert "trl-lib/math_shepherd" in section("Papers")


def test_every_test_that_the_page_names_exists():
    named = named_tests(PAGE)
    assert len(named) > 30
    assert named <= set(globals())


def test_the_defaults_that_the_page_quotes_are_those_of_the_config(tmp_path):
    quoted, true = defaults_on(PAGE, PRMConfig(output_dir=str(tmp_path), use_cpu=True))
    assert len(quoted) >= 7
    assert quoted == true
