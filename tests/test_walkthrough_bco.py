"""The claims of annotated_trainers/bco.md that running TRL can show, on a random model of two layers, on the CPU."""

import functools
import json
import math
import os
import pickle
import random
import threading
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from markdown_pages import GUIDES
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM, T5Config, T5ForConditionalGeneration
from trl import KTOConfig, KTOTrainer
from trl.data_utils import apply_chat_template
from trl.experimental import utils
from trl.experimental.bco import BCOConfig, BCOTrainer, bco_trainer
from trl.experimental.bco.bco_trainer import RunningMoments
from trl.trainer.utils import disable_dropout_in_model
from walkthrough_tools import (
    EXAMPLES,
    EXPECTED,
    LOG2,
    PAGES,
    PAIRS,
    TEMPLATE,
    arguments_of,
    batch_of,
    changed,
    comparisons,
    config,
    defaults_on,
    experts,
    formula_names,
    functions_of,
    made_and_trained,
    make_trainer,
    metrics_on,
    model_folder,
    named_tests,
    page_of,
    prose,
    save,
    section_of,
    tokenizer,
    trained,
)
from walkthrough_tools import LABELLED as ROWS
from walkthrough_tools import labelled as row

PAGE = PAGES / "bco.md"
section = functools.partial(section_of, PAGE)
MEASURED = EXPECTED / "bco.json"
TEXT = [{"prompt": "1+2", "completion": "3", "label": i % 2 == 0} for i in range(2)]
checkpoint = model_folder()


@pytest.fixture(scope="module")
def make(checkpoint, tmp_path_factory):
    """Makes a BCOTrainer; keyword arguments of BCOTrainer go there, all others to BCOConfig."""

    def make(rows=ROWS, model=None, **more) -> BCOTrainer:
        model = None if "model_init" in more else model or checkpoint
        sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 2}
        more = {**sizes, "remove_unused_columns": False, **more}
        return make_trainer(BCOTrainer, BCOConfig, tmp_path_factory.mktemp("run"), rows, model=model, **more)

    return make


trained_once = made_and_trained(eval_dataset=ROWS, eval_strategy="epoch")


@pytest.fixture
def moved(make, checkpoint):
    """A trainer whose policy differs from its reference; a test may change its settings."""

    def moved(rows=ROWS, **more):
        model, reference = (Qwen3ForCausalLM.from_pretrained(checkpoint) for _ in range(2))
        return make(rows, model=changed(model), ref_model=reference, **more)

    return moved


def evaluated(trainer: BCOTrainer, batch: dict) -> tuple[float, dict]:
    """Loss and metrics of a batch, in evaluation: the shift stays where it is."""
    trainer.running.mean = float(trainer.running.mean)
    trainer.model.eval()
    with torch.no_grad():
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch, do_train=False)
    return float(loss), metrics


# ---------------------------------------------------------------------------- the formulas, against TRL's own methods


page = page_of(PAGE)
VOCABULARY = 13
ERRORS, agree, summary = comparisons()


@pytest.fixture(scope="module")
def random_loss(make):
    """TRL's own loss on random logits, after one earlier batch: value, gradient in the logits, and what went into it."""
    trainer = make()

    def logps(logits, labels):
        labels = labels[:, 1:]
        logps = torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return (logps * (labels != -100)).sum(1)

    def run(seed, labels, beta=0.3, probabilities=None):
        dice = torch.Generator().manual_seed(seed)
        rows = []
        for label in labels:
            length, start = (int(torch.randint(low, 9, (1,), generator=dice)) for low in (3, 1))
            start = min(start, length - 1)
            ids = torch.randint(4, VOCABULARY, (length,), generator=dice).tolist()
            rows.append(
                {
                    "prompt": "",
                    "completion_input_ids": ids,
                    "completion_attention_mask": [1] * length,
                    "completion_labels": [-100] * start + ids[start:],
                    "label": label,
                }
            )
        batch = trainer.data_collator(rows)
        shape = (*batch["completion_input_ids"].shape, VOCABULARY)
        policy = 2 * torch.randn(shape, generator=dice)
        reference = policy + 0.7 * torch.randn(shape, generator=dice)
        policy.requires_grad_()
        before = torch.randn(3, generator=dice)

        def returns(logits):
            return lambda *args, **kwargs: SimpleNamespace(logits=logits)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "ref_model", returns(reference))
            patch.setattr(trainer, "beta", beta)
            patch.setattr(trainer, "running", RunningMoments(accelerator=trainer.accelerator))
            if probabilities is not None:
                patch.setattr(trainer, "embedding_func", "on")
                patch.setattr(trainer, "embedding_tokenizer", "on")
                patch.setattr(trainer, "_get_prompt_embeddings", lambda batch: (None, None))
                patch.setattr(trainer, "_get_chosen_prob", lambda embeddings: probabilities)
            trainer.running.update(before)
            loss, metrics = trainer.get_batch_loss_metrics(returns(policy), batch)
        (gradient,) = torch.autograd.grad(loss, policy)
        ratios = logps(policy, batch["completion_labels"]) - logps(reference, batch["completion_labels"])
        return SimpleNamespace(
            loss=loss.detach(),
            gradient=gradient,
            delta=metrics["delta"],
            logits=policy,
            logratios=ratios.float(),
            before=before,
            labels=torch.tensor(labels),
        )

    return run


LABELS = ([True, False, True, False], [True, True, True, False, True], [True, True], [False, False, False])
CASES = [(seed, labels) for seed in range(4) for labels in LABELS]


def test_the_key_equation_and_the_shift_are_what_trl_computes(page, random_loss):
    for seed, labels in CASES:
        found = random_loss(seed, labels)
        delta, seen = page["bco_reward_shift"](found.before)
        delta, seen = page["bco_reward_shift"](0.3 * found.logratios, delta, seen)
        assert seen == len(labels) + 3
        agree(torch.tensor([float(delta), 1.0]), torch.tensor([found.delta, 1.0]))
        ours = page["bco_loss"](found.logratios, found.labels, delta, beta=0.3)
        agree(ours, found.loss)
        (gradient,) = torch.autograd.grad(ours, found.logits)
        agree(gradient, found.gradient)


def test_the_slope_on_the_page_is_what_trl_has(page, random_loss):
    for seed, labels in CASES:
        found = random_loss(seed, labels)
        slope = page["bco_slope"](found.logratios, found.labels, found.delta, beta=0.3)
        (gradient,) = torch.autograd.grad((slope.detach() * found.logratios).mean(), found.logits)
        agree(gradient, found.gradient)
        assert slope.abs().max() < 0.3


def test_the_weights_of_udm_are_what_trl_computes(page, make, random_loss):
    probabilities = torch.tensor([0.01, 0.3, 0.34, 0.5, 0.7, 0.9, 0.95, 1.0])
    args = SimpleNamespace(min_density_ratio=0.5, max_density_ratio=10.0)
    theirs = BCOTrainer._get_udm_weight(SimpleNamespace(args=args, _get_chosen_prob=lambda e: e), probabilities)
    ours = page["bco_density_weight"](probabilities)
    agree(ours, theirs)
    assert ours.min() == 0.5
    assert ours.max() == 10
    for seed, labels in CASES:
        bad = labels.count(False)
        found = random_loss(seed, labels, probabilities=probabilities[2 : 2 + bad])
        weights = torch.ones(len(labels))
        weights[~found.labels] = page["bco_density_weight"](probabilities[2 : 2 + bad])
        ours = page["bco_loss"](found.logratios, found.labels, found.delta, beta=0.3, weights=weights)
        agree(ours, found.loss)
        (gradient,) = torch.autograd.grad(ours, found.logits)
        agree(gradient, found.gradient)


def test_the_running_mean_is_that_of_all_rewards(page):
    moments = RunningMoments(accelerator=SimpleNamespace(use_distributed=False))
    dice, delta, seen, everything = torch.Generator().manual_seed(1), 0.0, 0, []
    for size in (4, 1, 7, 2):
        rewards = torch.randn(size, generator=dice)
        everything.append(rewards)
        moments.update(rewards)
        delta, seen = page["bco_reward_shift"](rewards, delta, seen)
        agree(delta, moments.mean)
        agree(torch.cat(everything).mean(), moments.mean)
        assert moments.count == seen


def test_every_displayed_formula_has_its_function_and_is_compared_above():
    known = {"bco-loss", "bco-reward-shift", "bco-slope", "bco-density-weight"}
    assert formula_names(PAGE) == sorted(known)


# ------------------------------------------------------------------------------------------------------- what is logged


def test_the_page_lists_exactly_the_keys_that_a_run_logs(make):
    trainer = make(
        model=experts(output_router_logits=True), eval_dataset=Dataset.from_list(ROWS), eval_strategy="epoch"
    )
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert set(metrics_on(PAGE)) == logged


@pytest.mark.parametrize("labels", ["TFTF", "TTTF", "FFFF"])
def test_the_first_loss_is_log_2_whatever_the_labels(make, labels):
    (line,) = trained(make([{**r, "label": c == "T"} for r, c in zip(ROWS, labels, strict=True)], max_steps=1))
    assert line["loss"] == pytest.approx(LOG2, abs=1e-6)
    assert line["delta"] == 0


def test_the_first_loss_of_the_toy_run_is_log_2():
    before = json.loads(MEASURED.read_text("utf-8"))["held_out"]["loss"]["before"]
    assert before == pytest.approx([LOG2] * len(before), abs=1e-5)
    assert "**$\\log 2$, 0.6931**" in section("The first loss")
    assert round(LOG2, 4) == 0.6931


def test_the_shift_of_the_toy_run_is_far_from_the_middle():
    log = json.loads(MEASURED.read_text("utf-8"))["log"]
    good, bad, delta = (log[key]["mean"][-1] for key in ("rewards/chosen", "rewards/rejected", "delta"))
    said = prose(PAGE)
    assert (
        f"good rows is {good:.2f} and that of bad rows {bad:.2f}, the middle between them {(good + bad) / 2:.2f}"
        in said
    )
    assert f"$\\delta$ is {delta:.2f}." in said
    labels = datasets.load_dataset(str(EXAMPLES / "toy/data/unpaired_preference"), split="train")["label"]
    assert sum(labels) / len(labels) == pytest.approx(2 / 3, abs=0.01)


def test_the_toy_run_has_the_settings_that_the_page_names():
    assert '"beta": 1.0' in (EXAMPLES / "bco.py").read_text("utf-8")


def test_the_router_loss_is_added_and_has_no_key(make):
    losses = []
    for asked in (False, True):
        model = experts(output_router_logits=asked, router_aux_loss_coef=0.1)
        (line,) = trained(make(model=model, max_steps=1))
        losses.append(line["loss"])
        assert "aux_loss" not in line
    assert losses[0] == pytest.approx(LOG2, abs=1e-6)
    assert losses[1] > losses[0] + 0.01


def test_logits_are_summed_over_all_positions_and_the_vocabulary(moved):
    trainer = moved()
    batch = batch_of(trainer)
    _, metrics = evaluated(trainer, batch)
    with torch.no_grad():
        logits = trainer.model(batch["completion_input_ids"], attention_mask=batch["completion_attention_mask"]).logits
    good = torch.tensor(batch["label"])
    assert metrics["logits/chosen_sum"] == pytest.approx(float(logits[good].sum()), rel=1e-4)
    assert (batch["completion_attention_mask"][good] == 0).any()  # so that padding was among them


def test_a_line_without_rows_of_a_kind_leaves_its_keys_out(make):
    (line,) = trained(make([{**r, "label": True} for r in ROWS], max_steps=1))
    assert {"rewards/chosen", "logps/chosen", "logits/chosen", "delta"} <= set(line)
    assert not {"rewards/rejected", "logps/rejected", "logits/rejected", "rewards/margins"} & set(line)


def test_the_logged_rewards_are_means_over_rows(moved):
    labels = [True, False, False, False, True, True, True, True]
    rows = [row(f"{i}+{i}", f"{i}+{i}={7 * i}", label) for i, label in enumerate(labels)]
    trainer = moved(rows, logging_steps=2, learning_rate=0.0)
    (line,) = trained(trainer)
    each = []
    for i in range(8):
        _, metrics = evaluated(trainer, batch_of(trainer, [i]))
        each.append(metrics["rewards/chosen_sum" if labels[i] else "rewards/rejected_sum"])
    assert line["rewards/chosen"] == pytest.approx(
        sum(r for r, good in zip(each, labels, strict=True) if good) / 5, abs=1e-5
    )
    assert line["rewards/chosen"] != pytest.approx((each[0] + sum(each[4:]) / 4) / 2, abs=1e-3)
    assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6)


def test_total_flos_is_0(trained_once):
    assert trained_once.state.log_history[-1]["total_flos"] == 0


def test_predicting_leaves_its_metrics_for_the_next_evaluation(make):
    trainer = make(max_steps=1, eval_dataset=Dataset.from_list(ROWS[:1]))
    trainer.train()
    alone = trainer.evaluate()
    trainer.predict(trainer.train_dataset)
    mixed = trainer.evaluate()
    assert "eval_rewards/rejected" not in alone
    assert "eval_rewards/rejected" in mixed


# ------------------------------------------------------------------------------------------------------- the shift


def test_the_shift_contains_the_batch_at_hand_and_has_no_gradient(moved):
    trainer = moved()
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))
    rewards = metrics["rewards/chosen_sum"] + metrics["rewards/rejected_sum"]
    assert metrics["delta"] == pytest.approx(rewards / 4, abs=1e-6)
    assert abs(metrics["delta"]) > 0.01
    assert loss.requires_grad
    assert isinstance(trainer.running.mean, float)


class Together:
    """What RunningMoments sees of an accelerator, for threads that play processes: `reduce` adds up over all of them."""

    use_distributed, device = True, "cpu"

    def __init__(self, processes: int):
        self.barrier, self.shared, self.local = threading.Barrier(processes), {}, threading.local()

    def reduce(self, value):
        self.shared[threading.get_ident()] = value
        self.barrier.wait(timeout=20)
        total = sum(self.shared.values())
        self.barrier.wait(timeout=20)
        return total


def test_several_processes_share_one_shift():
    accelerator, moments = Together(2), {}
    batches = [[torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])], [torch.tensor([-4.0]), torch.tensor([6.0, 7.0])]]

    def process(number):
        moments[number] = RunningMoments(accelerator=accelerator)
        for batch in batches:
            moments[number].update(batch[number])

    threads = [threading.Thread(target=process, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = torch.cat([part for batch in batches for part in batch])
    for own in moments.values():
        assert own.mean == pytest.approx(float(everything.mean()), rel=1e-6)
        assert own.var == pytest.approx(float(everything.var(unbiased=False)), rel=1e-5)
        assert own.count == 7


def test_gradient_accumulation_changes_the_shift(moved):
    together = trained(moved(max_steps=1))[0]
    apart = trained(moved(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2))[0]
    assert together["rewards/chosen"] == pytest.approx(apart["rewards/chosen"], abs=1e-5)
    assert together["delta"] != pytest.approx(apart["delta"], abs=1e-4)
    assert together["loss"] != pytest.approx(apart["loss"], abs=1e-6)


def test_a_second_training_goes_on_counting(make):
    trainer = make(max_steps=1)
    trainer.train()
    assert trainer.running.count == 4
    trainer.train()
    assert trainer.running.count == 8


def test_compute_loss_by_hand_moves_the_shift(moved):
    trainer = moved()
    trainer.compute_loss(trainer.model, batch_of(trainer))
    assert trainer.running.count == 4


def test_an_evaluation_leaves_the_shift_alone(make):
    trainer = make(max_steps=1, eval_dataset=Dataset.from_list(ROWS))
    trainer.train()
    assert trainer.evaluate()["eval_delta"] == trainer.running.mean
    assert trainer.running.count == 4


def test_a_first_batch_of_one_row_pays_log_2(moved):
    trainer = moved(per_device_train_batch_size=1, max_steps=1)
    (line,) = trained(trainer)
    assert line["loss"] == pytest.approx(LOG2, abs=1e-6)
    assert line["delta"] == pytest.approx(line["rewards/chosen"])
    assert abs(line["delta"]) > 1e-3
    assert trainer.running.std == math.inf


def test_an_evaluation_before_training_fails_until_the_shift_is_a_float(make):
    trainer = make(eval_dataset=Dataset.from_list(ROWS))
    assert trainer.running.mean == 0
    assert isinstance(trainer.running.mean, int)
    with pytest.raises(RuntimeError, match="Long"):
        trainer.evaluate()
    trainer.running.mean = 0.0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(LOG2, abs=1e-6)
    with pytest.raises(RuntimeError, match="Long"):
        make(eval_dataset=Dataset.from_list(ROWS), eval_on_start=True).train()


def test_one_nan_row_ruins_the_shift_for_ever(make):
    trainer = make(precompute_ref_log_probs=True)
    trainer.get_train_dataloader()
    values = list(trainer.train_dataset["reference_logps"])
    trainer.train_dataset = trainer.train_dataset.remove_columns("reference_logps").add_column(
        "reference_logps", [math.nan, *values[1:]]
    )
    first, second = trained(trainer)
    assert first["loss"] == second["loss"] == 0  # what the parent logs for nan
    assert math.isnan(first["delta"])
    assert all(weight.isnan().any() for weight in trainer.model.parameters())
    moments = RunningMoments(accelerator=trainer.accelerator)
    for rewards in ([1.0, math.nan], [1.0, 2.0]):
        moments.update(torch.tensor(rewards))
    assert math.isnan(moments.mean)


# ------------------------------------------------------------------------------------------------- saving and resuming


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


def deltas(lines: list[dict]) -> dict[int, float]:
    return {line["step"]: line["delta"] for line in lines}


@pytest.fixture(scope="module")
def interrupted(make, tmp_path_factory):
    """The shifts of a whole run, its folder, and a function that goes on from its second checkpoint."""
    trainer = make(**SAVING)
    whole = deltas(trained(trainer))
    folder = Path(trainer.args.output_dir)

    def go_on(**more):
        return deltas(trained(make(**SAVING, **more), resume_from_checkpoint=str(folder / "checkpoint-2")))

    return whole, folder, go_on


def test_the_shift_is_resumed(interrupted):
    whole, folder, go_on = interrupted
    saved = json.loads((folder / "checkpoint-2" / "running.json").read_text("utf-8"))
    assert saved["mean"] == whole[2] != 0
    assert saved["count"] == 8
    assert go_on()[3] == pytest.approx(whole[3], abs=1e-7)


def test_a_checkpoint_without_its_file_starts_from_0(interrupted):
    whole, folder, go_on = interrupted
    file = folder / "checkpoint-2" / "running.json"
    kept = file.read_text("utf-8")
    file.unlink()
    try:
        assert go_on()[3] != pytest.approx(whole[3], abs=1e-3)
    finally:
        file.write_text(kept, "utf-8")


def test_a_saved_model_has_no_shift(make, tmp_path):
    trainer = make(**SAVING | {"max_steps": 1}, save_only_model=True)
    trainer.train()
    trainer.save_model(str(tmp_path))
    for folder in (tmp_path, Path(trainer.args.output_dir) / "checkpoint-1"):
        assert (folder / "model.safetensors").exists()
        assert not (folder / "running.json").exists()


def test_a_resumed_run_precomputes_with_its_checkpoint(make):
    settings = {**SAVING, "precompute_ref_log_probs": True}
    trainer = make(**settings)
    whole = {line["step"]: line["rewards/chosen"] for line in trained(trainer)}
    assert whole[3] > 0.01
    folder = Path(trainer.args.output_dir) / "checkpoint-2"
    resumed = trained(make(**settings), resume_from_checkpoint=str(folder))[-1]
    assert resumed["step"] == 3
    assert resumed["rewards/chosen"] == 0


# ------------------------------------------------------------------------------------------------------- the data


def questions(trainer: BCOTrainer) -> list[list[str]]:
    """Trains, and returns the prompts of each micro-batch."""
    seen, compute = [], trainer.compute_loss

    def spy(model, inputs, **kwargs):
        seen.append([prompt.removeprefix("<|user|>")[0] for prompt in inputs["prompt"]])
        return compute(model, inputs, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    return seen


def test_the_rows_come_in_the_order_of_the_file_in_every_epoch(make):
    rows = [row(str(i), f"{i}", i % 2 == 0) for i in range(8)]
    assert questions(make(rows, max_steps=4, seed=7)) == [list("0123"), list("4567")] * 2


def test_a_sampling_strategy_has_no_effect(make):
    rows = [row(str(i), f"{i}", i % 2 == 0) for i in range(8)]
    assert questions(make(rows, train_sampling_strategy="random")) == [list("0123"), list("4567")]


def test_pairs_are_trained_in_batches_of_one_kind(make):
    first, second = trained(make(PAIRS))
    assert "rewards/rejected" not in first
    assert "rewards/chosen" not in second
    assert second["delta"] == pytest.approx(second["rewards/rejected"] / 2)  # four zeros of good rows came first


def test_there_are_no_weights_for_the_two_kinds():
    assert not {"desirable_weight", "undesirable_weight"} & set(BCOConfig.__dataclass_fields__)
    assert {"desirable_weight", "undesirable_weight"} <= set(KTOConfig.__dataclass_fields__)


@pytest.mark.parametrize("labels", [(1, 0, 1, 0), (1.0, 0.0, 1.0, 0.0), ("good", "bad", "good", "bad")])
def test_labels_that_are_not_booleans_train_nothing(make, labels):
    trainer = make([{**r, "label": label} for r, label in zip(ROWS, labels, strict=True)])
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    first, second = trained(trainer)
    for line in (first, second):
        assert line["loss"] == line["grad_norm"] == 0
        assert math.isnan(line["delta"])
        assert not [key for key in line if key.startswith("rewards/")]
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


def test_a_row_without_a_label_is_dropped(moved):
    labels = [True, None, True, False]
    trainer = moved([{**r, "label": label} for r, label in zip(ROWS, labels, strict=True)])
    _, metrics = evaluated(trainer, batch_of(trainer))
    assert (metrics["count/chosen"], metrics["count/rejected"]) == (2, 1)


def long_row(trainer_or_make, max_length):
    rows = [{"prompt": "1+2+3+4+5", "completion": "1+2=3 #3 and so on", "label": i == 0} for i in range(2)]
    return trainer_or_make(rows, max_length=max_length).train_dataset[0]


def test_a_cut_answer_gets_an_end_token(make):
    row = long_row(make, 20)
    assert tokenizer().decode(row["completion_input_ids"]) == "1+2+3+4+51+2=3 #3 <|end|>"
    assert len(row["answer_input_ids"]) == 18  # stays as it was
    assert row["completion_labels"] == [-100] * 9 + row["completion_input_ids"][9:]


def test_a_row_that_fits_exactly_is_cut(make):
    whole = long_row(make, 100)["completion_input_ids"]
    assert len(whole) == 28
    assert len(long_row(make, 28)["completion_input_ids"]) == 27
    assert long_row(make, 29)["completion_input_ids"] == whole


@pytest.mark.parametrize(("max_length", "length"), [(11, 10), (10, 27), (8, 25)])
def test_a_prompt_over_max_length_makes_a_row_longer_than_it(make, max_length, length):
    # nine tokens of prompt and a budget of max_length - 2: none, one or three tokens over
    assert len(long_row(make, max_length)["completion_input_ids"]) == length


@pytest.mark.parametrize("empty", ["prompt", "completion"])
def test_an_empty_prompt_or_answer_fails(make, empty):
    with pytest.raises(IndexError):
        make([{**r, empty: ""} for r in TEXT])


def test_a_line_break_behind_the_end_gives_a_second_end(make):
    words = tokenizer(template=TEMPLATE.replace("<|end|>", "<|end|>\n"), more=("\n",))
    model = Qwen3ForCausalLM(Qwen3Config(**{**config(), "vocab_size": len(words)}))
    trainer = make(processing_class=words, model=model)
    assert words.decode(trainer.train_dataset[0]["completion_input_ids"]).endswith("#3<|end|>\n<|end|>")
    labels = trainer.train_dataset[0]["completion_labels"]
    assert labels.count(words.eos_token_id) == 2


def test_a_bos_token_is_added_where_the_template_has_none(make):
    words = tokenizer()
    words.bos_token = "a"
    row = make(TEXT, processing_class=words).train_dataset[0]
    assert words.decode(row["completion_input_ids"]) == "a1+23<|end|>"
    assert row["completion_labels"].count(-100) == 4


def test_tokens_that_merge_move_the_border_back_by_one():
    ours = bco_trainer._tokenize({"prompt": ["21"], "completion": ["+2"]}, tokenizer(merges=[("1", "+")], more=("1+",)))
    words = tokenizer(more=("1+",))
    assert words.convert_ids_to_tokens(ours["prompt_input_ids"][0]) == ["2"]
    assert words.convert_ids_to_tokens(ours["answer_input_ids"][0]) == ["1+", "2"]
    with pytest.raises(ValueError, match="same pairwise length"):
        shrinking = tokenizer(merges=[("1", "+"), ("2", "1+")], more=("1+", "21+"))  # "21" is two tokens, "21+" one
        bco_trainer._tokenize({"prompt": ["21"], "completion": ["+"]}, shrinking)


def test_tools_are_not_rendered(make):
    with_tools = make([{**r, "tools": [{"name": "x"}]} for r in ROWS]).train_dataset
    assert with_tools["completion_input_ids"] == make().train_dataset["completion_input_ids"]


def test_a_row_may_bring_settings_of_its_template():
    words = tokenizer(template=TEMPLATE + "{% if loud %}1{% endif %}")
    rendered = apply_chat_template({**ROWS[0], "chat_template_kwargs": {"loud": True}}, words)
    assert rendered["completion"].endswith("<|end|>1")
    with pytest.raises(ValueError, match="Invalid role"):
        apply_chat_template({**ROWS[0], "prompt": [{"role": "system", "content": "1"}]}, words)


def test_text_beside_messages_fails(make):
    with pytest.raises(TypeError):
        make([{**r, "prompt": "1+2"} for r in ROWS])


def test_a_conversation_without_a_prompt_fails(make):
    with pytest.raises(KeyError, match="Invalid keys"):
        make([{"completion": r["completion"], "label": r["label"]} for r in ROWS])


def test_a_stream_is_refused(make):
    with pytest.raises(TypeError, match="num_proc"):
        make(Dataset.from_list(ROWS).to_iterable_dataset())


def test_evaluation_sets_come_as_a_dataset_dict(make):
    sets = {"a": Dataset.from_list(ROWS[:2]), "b": Dataset.from_list(ROWS[2:])}
    with pytest.raises(AttributeError, match="map"):
        make(eval_dataset=sets)
    trainer = make(eval_dataset=DatasetDict(sets), max_steps=1)
    trainer.train()
    both = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_rewards/margins"} <= set(both)
    assert "eval_a_rewards/margins" not in both
    with pytest.raises(AttributeError, match="'str' object"):
        make(eval_dataset=DatasetDict(sets), precompute_ref_log_probs=True, eval_strategy="steps", eval_steps=1).train()


def test_raw_data_cannot_be_evaluated(trained_once):
    with pytest.raises(KeyError, match="completion_input_ids"):
        trained_once.evaluate(Dataset.from_list(ROWS))


def test_a_pad_token_is_needed_and_may_be_eos(make):
    words = tokenizer(pad=None)
    assert words.pad_token is None
    with pytest.raises(ValueError, match="padding token"):
        batch_of(make(processing_class=words))
    words.pad_token = words.eos_token
    batch = batch_of(make(processing_class=words))
    scored = batch["completion_labels"] != -100
    assert (scored.sum(1) == torch.tensor([len(ids) for ids in make().train_dataset["answer_input_ids"]])).all()
    assert not (scored & (batch["completion_attention_mask"] == 0)).any()


def test_prompts_are_padded_on_the_left_and_rows_on_the_right(make):
    batch = batch_of(make())
    masks = batch["prompt_attention_mask"], batch["completion_attention_mask"]
    assert [bool((mask[:, 0] == 0).any()) for mask in masks] == [True, False]
    assert [bool((mask[:, -1] == 0).any()) for mask in masks] == [False, True]


# ------------------------------------------------------------------------------------------------------- the constructor


def test_arguments_have_no_defaults(checkpoint):
    with pytest.raises(AttributeError, match="model_init_kwargs"):
        BCOTrainer(checkpoint, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer())


def test_model_init_fails(make, checkpoint):
    def model():
        return Qwen3ForCausalLM.from_pretrained(checkpoint)

    with pytest.raises(ValueError, match="is_encoder_decoder"):
        make(model_init=model)
    with pytest.raises(AttributeError):
        make(model_init=model, is_encoder_decoder=False)
    with pytest.raises(AttributeError):
        make(model_init=model, is_encoder_decoder=False, disable_dropout=False, precompute_ref_log_probs=True)


def test_encoder_decoder_models_fail(make):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer()), decoder_start_token_id=0, **sizes))
    with pytest.raises(ValueError, match="answer_input_ids"):
        make(TEXT, model=model).train()
    trainer = make(TEXT, model=model)
    columns = [name for name in trainer.train_dataset.column_names if name.startswith("answer_")]
    trainer.train_dataset = trainer.train_dataset.remove_columns(columns)
    with pytest.raises(KeyError, match="completion_input_ids"):
        trainer.train()


def test_a_missing_max_length_is_512(make):
    assert make(max_length=None).max_length == 512


def test_unused_columns_are_kept(make):
    assert make(remove_unused_columns=True).args.remove_unused_columns is False


def test_dropout_as_a_number_stays_on():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**config(attention_dropout=0.5)))
    disable_dropout_in_model(model)
    layer = torch.nn.Dropout(0.5)
    disable_dropout_in_model(layer)
    assert layer.p == 0
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        first, second = (model.train()(ids).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_the_cast_goes_by_names():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.my_normal_layer = torch.nn.Linear(2, 2).to(torch.bfloat16)
            self.lm_head = torch.nn.Linear(2, 2)
            self.body = torch.nn.Linear(2, 2).to(torch.bfloat16)

    model = Model()
    utils.peft_module_casting_to_bf16(model)
    assert model.my_normal_layer.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == model.body.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------- the reference


def test_the_reference_is_copied_and_not_loaded(make, checkpoint):
    (line,) = trained(make(model=changed(Qwen3ForCausalLM.from_pretrained(checkpoint)), max_steps=1))
    assert line["rewards/chosen"] == line["rewards/rejected"] == 0


def test_a_path_is_trained_in_the_precision_of_its_file(make, checkpoint, tmp_path):
    path = save(Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16), tmp_path / "half")
    trainer = make(model=path)
    assert trainer.model.dtype == trainer.ref_model.dtype == torch.bfloat16
    assert make(model=path, model_init_kwargs={"dtype": "float32"}).model.dtype == torch.float32
    args = KTOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=2)
    kto = KTOTrainer(path, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer())
    assert kto.model.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "low", "high"), [("bfloat16", 0, 0.05), ("float32", 0.9, 1)])
def test_in_bfloat16_hardly_any_weight_moves(make, checkpoint, dtype, low, high):
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    trainer = make(model=model, max_steps=1, learning_rate=BCOConfig.__dataclass_fields__["learning_rate"].default)
    before = torch.cat([weight.detach().flatten() for weight in trainer.model.model.layers.parameters()])
    trainer.train()
    after = torch.cat([weight.detach().flatten() for weight in trainer.model.model.layers.parameters()])
    assert low <= float((before != after).float().mean()) <= high
    assert {state["exp_avg"].dtype for state in trainer.optimizer.state.values()} == {model.dtype}


def test_a_device_map_is_set_only_beside_other_settings(make, monkeypatch):
    asked, load = [], bco_trainer.AutoModelForCausalLM.from_pretrained

    def spy(path, **kwargs):
        asked.append(kwargs.pop("device_map", None))
        return load(path, **kwargs)

    monkeypatch.setattr(bco_trainer.AutoModelForCausalLM, "from_pretrained", spy)
    make()
    make(model_init_kwargs={"dtype": "float32"})
    assert asked == [None, "auto"]


def adapted(checkpoint):
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(Qwen3ForCausalLM.from_pretrained(checkpoint), lora)


def test_a_new_adapter_needs_no_second_model(make):
    trainer = make(peft_config=LoraConfig(task_type="CAUSAL_LM"), max_steps=1)
    assert trainer.ref_model is None
    assert trained(trainer)[0]["rewards/chosen"] == 0


def test_a_trained_adapter_is_measured_against_the_base_model(make, checkpoint):
    trainer = make(model=adapted(checkpoint), max_steps=1)
    assert abs(trained(trainer)[0]["rewards/chosen"]) > 0.01


def named(checkpoint):
    """A model with a trained adapter and a copy of it, called `ref`."""
    model = adapted(checkpoint)
    model.add_adapter("ref", LoraConfig(task_type="CAUSAL_LM"))
    weights = {k.replace(".default.", ".ref."): v.clone() for k, v in model.state_dict().items() if ".default." in k}
    model.load_state_dict(weights, strict=False)
    return model


def test_an_adapter_can_be_named_as_the_reference(make, checkpoint):
    first, second = trained(make(model=named(checkpoint), ref_adapter_name="ref"))
    assert first["rewards/chosen"] == 0
    assert second["rewards/chosen"] != 0


def test_an_error_leaves_the_reference_adapter_on(make, checkpoint):
    trainer = make(model=named(checkpoint), ref_adapter_name="ref")
    with pytest.raises(RuntimeError, match="stop"), trainer.null_ref_context():
        raise RuntimeError("stop")
    assert trainer.model.active_adapters == ["ref"]


def test_precomputed_values_are_made_outside_mixed_precision(make):
    assert trained(make(bf16=True, max_steps=1))[0]["rewards/chosen"] == 0
    assert trained(make(bf16=True, max_steps=1, precompute_ref_log_probs=True))[0]["rewards/chosen"] != 0


def test_two_passes_a_step_and_the_reference_keeps_its_cache(make):
    trainer, seen = make(max_steps=1), []
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        model.register_forward_hook(
            lambda _, __, outputs, name=name: seen.append(
                (name, torch.is_grad_enabled(), outputs.past_key_values is not None)
            )
        )
    trainer.train()
    assert seen == [("policy", True, False), ("reference", False, True)]


EVALUATING = {"eval_strategy": "steps", "eval_steps": 1}


def eval_rewards(trainer: BCOTrainer) -> list[float]:
    trainer.train()
    return [line["eval_rewards/chosen"] for line in trainer.state.log_history if "eval_loss" in line]


def test_the_evaluation_set_is_precomputed_with_the_trained_policy(make, checkpoint):
    data = Dataset.from_list(ROWS)
    plain = eval_rewards(make(eval_dataset=data, **EVALUATING))
    late = eval_rewards(make(eval_dataset=data, precompute_ref_log_probs=True, **EVALUATING))
    assert plain[0] > 0.01
    assert late[0] == 0
    assert late[1] == pytest.approx(plain[1] - plain[0], abs=1e-5)
    reference = Qwen3ForCausalLM.from_pretrained(checkpoint)
    kept = make(eval_dataset=data, ref_model=reference, precompute_ref_log_probs=True, **EVALUATING)
    assert eval_rewards(kept) == pytest.approx(plain, abs=1e-5)
    assert kept.ref_model is not None
    lora = {"peft_config": LoraConfig(task_type="CAUSAL_LM")}
    assert eval_rewards(make(eval_dataset=data, precompute_ref_log_probs=True, **lora, **EVALUATING))[0] != 0


def test_a_second_evaluation_set_is_measured_against_the_policy_itself(make):
    other = make(ROWS[:2]).train_dataset
    trainer = make(eval_dataset=Dataset.from_list(ROWS), precompute_ref_log_probs=True, **EVALUATING)
    trainer.train()
    found = trainer.evaluate(other)
    assert found["eval_rewards/chosen"] == found["eval_rewards/rejected"] == 0
    trainer = make(eval_dataset=Dataset.from_list(ROWS), precompute_ref_log_probs=True, max_steps=1)
    trainer.train()
    trainer.evaluate(other)  # the first set that is evaluated
    assert len(trainer.eval_dataset) == 2


# ------------------------------------------------------------------------------------ underlying distribution matching


class Classifier:
    """Stands in for scikit-learn's LogisticRegression: the same objective, minimized by Newton's method."""

    def __init__(self, class_weight):
        self.class_weight = class_weight

    def fit(self, x, y):
        x = torch.cat([torch.as_tensor(x).double(), torch.ones(len(x), 1, dtype=torch.double)], 1)
        y = torch.as_tensor(y).double()
        weight = torch.ones_like(y)
        if self.class_weight == "balanced":
            weight = torch.where(y == 1, len(y) / (2 * y.sum()), len(y) / (2 * (1 - y).sum()))
        penalty = torch.eye(x.shape[1], dtype=torch.double)
        penalty[-1, -1] = 0  # the offset is free
        self.w = torch.zeros(x.shape[1], dtype=torch.double)
        for _ in range(30):
            p = torch.sigmoid(x @ self.w)
            gradient = x.T @ (weight * (p - y)) + penalty @ self.w
            hessian = (x * (weight * p * (1 - p))[:, None]).T @ x + penalty
            self.w = self.w - torch.linalg.solve(hessian, gradient)
        return self

    def predict_proba(self, x):
        good = torch.sigmoid(torch.as_tensor(x).double() @ self.w[:-1] + self.w[-1])
        return torch.stack([1 - good, good], 1).numpy()

    def score(self, x, y):
        return float(((self.predict_proba(x)[:, 1] > 0.5) == y).mean())


TABLE = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
MANY = [row(f"{i % 9}+{i}", f"{i}", i % 3 != 0) for i in range(60)]


def embed(input_ids, attention_mask):
    return (TABLE[input_ids] * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)


@pytest.fixture
def udm(make, monkeypatch):
    """Makes a trainer with UDM, without scikit-learn and joblib."""

    def dump(value, path, compress):
        Path(path).write_bytes(pickle.dumps(value))

    joblib = SimpleNamespace(dump=dump, load=lambda path: pickle.loads(Path(path).read_bytes()))
    monkeypatch.setattr(bco_trainer, "LogisticRegression", Classifier, raising=False)
    monkeypatch.setattr(bco_trainer, "joblib", joblib, raising=False)
    monkeypatch.setattr(bco_trainer, "is_sklearn_available", lambda: True)
    monkeypatch.setattr(bco_trainer, "is_joblib_available", lambda: True)

    def build(rows=MANY, embedding_func=embed, embedding_tokenizer=None, **more):
        return make(rows, embedding_func=embedding_func, embedding_tokenizer=embedding_tokenizer or tokenizer(), **more)

    return build


def test_the_stand_in_for_scikit_learn_predicts_what_it_does():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] + torch.randn(80, generator=torch.Generator().manual_seed(1)) > 0.8).float()
    theirs = linear_model.LogisticRegression(class_weight="balanced", tol=1e-8).fit(x.numpy(), y.numpy())
    ours = Classifier(class_weight="balanced").fit(x.numpy(), y.numpy())
    assert ours.predict_proba(x.numpy())[:, 1] == pytest.approx(theirs.predict_proba(x.numpy())[:, 1], abs=1e-4)


def test_udm_asks_for_scikit_learn(make, monkeypatch):
    monkeypatch.setattr(bco_trainer, "is_sklearn_available", lambda: False)
    with pytest.raises(ImportError, match="scikit-learn"):
        make(embedding_func=embed, embedding_tokenizer=tokenizer())


def test_an_embedding_function_alone_fails(udm, make):
    with pytest.raises(KeyError, match="embedding_input_ids"):
        make(embedding_func=embed)


def test_an_embedding_tokenizer_alone_does_nothing(make, caplog):
    trainer = make(embedding_tokenizer=tokenizer())
    assert "embedding_input_ids" in trainer.train_dataset.column_names
    assert not trainer.match_underlying_distribution
    assert not hasattr(trainer, "clf")
    assert not [record for record in caplog.records if "embedding" in record.getMessage()]


def test_udm_weighs_bad_rows_only(udm):
    trainer = udm()
    batch = batch_of(trainer, range(60))
    _, bad = trainer._get_prompt_embeddings(batch)
    weights = trainer._get_udm_weight(bad)
    assert len(weights) == 20
    assert weights.mean() != pytest.approx(1, abs=0.01)
    loss, metrics = evaluated(trainer, batch)
    assert metrics["rewards/chosen_sum"] == 0
    assert loss == pytest.approx(LOG2 * (40 + float(weights.sum())) / 60, rel=1e-5)


def test_unequal_numbers_do_not_carry_over_into_the_weights(udm):
    rows = [row(f"{i % 5}+{i % 5}", f"{i}", i % 10 < 5 and i < 20) for i in range(100)]
    trainer = udm(rows, min_density_ratio=1e-3, max_density_ratio=1e3)
    _, bad = trainer._get_prompt_embeddings(batch_of(trainer, range(100)))
    assert len(bad) == 90
    balanced = trainer._get_udm_weight(bad).mean()
    trainer.clf = Classifier(class_weight=None).fit(
        embed(**{k: batch_of(trainer, range(100))[f"embedding_{k}"] for k in ("input_ids", "attention_mask")}),
        torch.tensor([r["label"] for r in rows]),
    )
    assert balanced == pytest.approx(1, abs=0.35)
    assert trainer._get_udm_weight(bad).mean() == pytest.approx(1 / 9, abs=0.05)


def test_prompts_are_drawn_with_replacement(udm):
    seen = []

    def spy(input_ids, attention_mask):
        seen.extend(tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True))
        return embed(input_ids, attention_mask)

    rows, drawn = [row(f"{i}", f"{i}", i % 2 == 0) for i in range(200)], []
    for seed in (1, 1, 2):
        seen.clear()
        udm(rows, spy, per_device_train_batch_size=50, seed=seed)
        assert len(seen) == 200
        assert 0.57 < len(set(seen)) / 200 < 0.69  # 1 - 1/e is 0.63
        drawn.append(list(seen))
    assert drawn[0] == drawn[1] != drawn[2]


def test_udm_needs_both_kinds(udm):
    with pytest.raises(IndexError):
        udm([{**r, "label": True} for r in ROWS])


def test_the_embedding_model_reads_the_rendered_prompt(udm):
    rows = udm().train_dataset
    assert tokenizer().decode(rows[0]["embedding_input_ids"]) == rows[0]["prompt"] == "<|user|>0+0<|end|><|assistant|>"
    assert len(udm(max_length=8).train_dataset[11]["embedding_input_ids"]) == len(rows[11]["embedding_input_ids"])


def test_an_embedding_with_the_pad_token_as_its_mean_is_taken_for_padding(udm):
    centred = torch.tensor([1.0, -1, 2, -2, 0, 0])
    replace: list[int] = []

    def some_centred(input_ids, attention_mask):
        vectors = embed(input_ids, attention_mask)
        vectors[replace] = centred
        return vectors

    trainer = udm(MANY, some_centred)
    bad = [i for i, r in enumerate(MANY) if not r["label"]]
    assert tokenizer().pad_token_id == 0

    batch = batch_of(trainer, [1, bad[0]])  # one good row, one bad one
    replace[:] = [1]
    loss, metrics = evaluated(trainer, batch)
    assert metrics["count/rejected"] == 1
    assert loss == pytest.approx(LOG2)  # the good row's, alone
    replace[:] = []
    assert evaluated(trainer, batch)[0] != pytest.approx(LOG2, abs=1e-3)

    batch = batch_of(trainer, [1, *bad[:2]])
    _, vectors = trainer._get_prompt_embeddings(batch)
    second = float(trainer._get_udm_weight(vectors)[1])
    replace[:] = [1]
    assert evaluated(trainer, batch)[0] == pytest.approx(LOG2 * (1 + 2 * second) / 3, rel=1e-5)

    batch = batch_of(trainer, [1, *bad[:3]])
    replace[:] = []
    _, vectors = trainer._get_prompt_embeddings(batch)
    first = float(trainer._get_udm_weight(vectors)[0])
    replace[:] = [2, 3]
    assert evaluated(trainer, batch)[0] == pytest.approx(LOG2 * (1 + 3 * first) / 4, rel=1e-5)

    replace[:] = [2]
    with pytest.raises(RuntimeError, match="size of tensor"):
        evaluated(trainer, batch)


def test_a_real_token_with_the_number_of_the_pad_token_is_replaced(make):
    policy, embedding = tokenizer(), tokenizer()
    policy.pad_token = "a"
    embedding.pad_token = "b"
    ids, seen = torch.tensor([[policy.convert_tokens_to_ids(token) for token in ("c", "a", "d")]]), []
    this = SimpleNamespace(
        processing_class=policy,
        embedding_tokenizer=embedding,
        embedding_func=lambda input_ids, attention_mask: seen.append((input_ids, attention_mask)),
    )
    BCOTrainer._vectorize_prompt(this, ids, torch.ones_like(ids))
    assert embedding.convert_ids_to_tokens(seen[0][0][0]) == ["c", "b", "d"]
    assert seen[0][1].all()


def test_a_run_to_be_resumed_fits_no_classifier(udm):
    trainer = udm(resume_from_checkpoint="somewhere")
    assert not hasattr(trainer, "clf")
    with pytest.raises(AttributeError, match="clf"):
        evaluated(trainer, batch_of(trainer, range(6)))


def test_the_classifier_is_resumed(udm):
    trainer = udm(**SAVING | {"max_steps": 1})
    trainer.train()
    folder = str(Path(trainer.args.output_dir) / "checkpoint-1")
    other = udm(MANY[:12], resume_from_checkpoint=folder)
    other.train(resume_from_checkpoint=folder)
    assert torch.equal(other.clf.w, trainer.clf.w)


def test_good_prompts_are_embedded_for_nothing(udm):
    trainer = udm()
    batch = batch_of(trainer, range(6))
    found = evaluated(trainer, batch)[0]
    split = trainer._get_prompt_embeddings
    trainer._get_prompt_embeddings = lambda batch: (None, split(batch)[1])
    assert evaluated(trainer, batch)[0] == found


# ------------------------------------------------------------------------------------------------------- generation


@pytest.fixture
def table(make, monkeypatch):
    """Evaluates with `generate_during_eval=True`; returns the rows of the table that went to wandb, and the texts."""
    tables = []
    wandb = SimpleNamespace(Table=lambda data: tables.append(data.values.tolist()), log=lambda data: None)
    monkeypatch.setattr(bco_trainer, "is_wandb_available", lambda: True)
    monkeypatch.setattr(bco_trainer, "wandb", wandb, raising=False)

    def evaluate(rows, **more):
        random.seed(0)
        trainer = make(
            rows, generate_during_eval=True, eval_dataset=Dataset.from_list(rows), max_length=64, max_steps=1, **more
        )
        trainer.train()
        trainer.args.report_to = ["wandb"]
        decoded, modes, answer = [], [], trainer.generate_from_model_and_ref

        def spy(model, batch):
            modes.append(model.training)
            decoded.append(answer(model, batch))
            return decoded[-1]

        trainer.generate_from_model_and_ref = spy
        trainer.evaluate()
        return SimpleNamespace(rows=tables[-1], decoded=decoded[-1], training=modes[-1])

    return evaluate


def test_generating_needs_a_service(make, monkeypatch):
    monkeypatch.setattr(bco_trainer, "is_wandb_available", lambda: False)
    monkeypatch.setattr(bco_trainer, "is_comet_available", lambda: False)
    with pytest.raises(ValueError, match="Weights and Biases or Comet"):
        make(generate_during_eval=True)


def test_the_table_of_a_conversation_lacks_its_first_letters(table):
    found = table(ROWS)
    assert found.training
    assert [prompt for prompt, _, _ in found.rows] == [  # of the bad answers alone
        "<|user|>7+12<|end|><|assistant|>",
        "<|user|>5+5<|end|><|assistant|>",
    ] or [prompt for prompt, _, _ in found.rows] == [
        "<|user|>5+5<|end|><|assistant|>",
        "<|user|>7+12<|end|><|assistant|>",
    ]
    headers = len("<|user|><|end|><|assistant|>")
    assert headers == 28
    for (prompt, policy, _), text in zip(found.rows, found.decoded[0], strict=True):
        question = prompt.removeprefix("<|user|>").split("<")[0]
        assert text.startswith(question)
        assert policy == text[len(question) + headers :]


@pytest.mark.parametrize(
    ("labels", "size", "error"), [("TF", 2, ValueError), ("TT", 2, TypeError), ("TFTF", 8, ValueError)]
)
def test_generating_needs_two_bad_rows(table, labels, size, error):
    rows = [{**r, "label": letter == "T"} for r, letter in zip(ROWS, labels, strict=False)]
    with pytest.raises(error):
        table(rows, per_device_eval_batch_size=size)


# ------------------------------------------------------------------------------------------------------- the neighbours

RATIOS = torch.tensor([3.0, -1.5, 0.2, 7.0])
SIGNS = torch.tensor([True, True, False, False])


def test_kto_on_the_page_is_the_one_of_the_page_about_kto(page):
    theirs = functions_of(PAGES / "kto.md", "kto_loss")["kto_loss"](RATIOS, SIGNS, 0.7, beta=0.3)
    assert float(page["kto_loss"](RATIOS, SIGNS, kl=0.7, beta=0.3)) == pytest.approx(float(theirs))


def test_dpo_on_the_page_is_the_one_of_the_page_about_dpo(page):
    theirs = functions_of(PAGES / "dpo.md", "dpo_loss")["dpo_loss"](
        RATIOS[:2], RATIOS[2:], torch.zeros(2), torch.zeros(2), beta=0.3
    )
    assert float(page["dpo_loss"](RATIOS[:2], RATIOS[2:], beta=0.3)) == pytest.approx(float(theirs))


def test_bco_pair_on_the_page_is_the_one_of_the_guide_and_twice_bco(page):
    guide = functions_of(GUIDES / "preference_losses.md", "dpo_bco_pair")
    theirs = guide["dpo_bco_pair"](RATIOS[:2], RATIOS[2:], 0.3).mean()
    ours = page["bco_pair"](RATIOS[:2], RATIOS[2:], beta=0.3)
    assert float(ours) == pytest.approx(float(theirs))
    assert float(ours) == pytest.approx(2 * float(page["bco_loss"](RATIOS, SIGNS, 0.0, beta=0.3)))


def test_bco_is_above_dpo_at_every_shift(page):
    dice = torch.Generator().manual_seed(0)
    for shift in (-2.0, 0.0, 1.5):
        good, bad = 20 * torch.randn(2, 50, generator=dice)
        for g, b in zip(good, bad, strict=True):
            above = 2 * page["bco_loss"](torch.stack([g, b]), torch.tensor([True, False]), shift)
            assert float(above) > float(page["dpo_loss"](g[None], b[None]))


def test_cpo_and_orpo_on_the_page_are_those_of_the_page_about_dpo(page):
    theirs = functions_of(PAGES / "dpo.md", "orpo_loss")
    good, bad = torch.tensor([-8.0]), torch.tensor([-9.0])
    cpo = theirs["cpo_loss"](good, bad, chosen_nll=-good.mean() / 10)
    orpo = theirs["orpo_loss"](good / 10, bad / 10, chosen_nll=-good.mean() / 10)
    assert float(page["cpo_loss"](good, bad)) == pytest.approx(float(cpo))
    assert float(page["orpo_loss"](good, bad)) == pytest.approx(float(orpo))


def test_the_slope_of_kto_is_about_half_of_its_largest_where_the_page_says_so(page):
    h = torch.tensor([-16.0, -19.0], requires_grad=True)
    page["kto_loss"](h, torch.tensor([True, True]), kl=0.0).backward()
    assert (-h.grad * 2 / 0.1 / 0.25).tolist() == pytest.approx([0.5, 0.5], abs=0.07)


# ------------------------------------------------------------------------------------------------------- the page itself


def test_every_test_that_the_page_names_exists():
    named = named_tests(PAGE)
    assert named
    assert named <= set(globals())


def test_the_arguments_that_the_page_calls_gone_are_gone():
    text = section("Older code and tutorials")
    here = arguments_of(BCOTrainer, BCOConfig)
    for name in (
        "max_prompt_length",
        "truncation_mode",
        "label_pad_token_id",
        "padding_value",
        "ref_model_init_kwargs",
    ):
        assert f"`{name}`" in text
        assert name not in here
    assert "processing_class" in here
    assert "tokenizer" not in here
    with pytest.raises(ImportError):
        exec("from trl import BCOTrainer")


def test_the_defaults_that_the_page_quotes_are_those_of_the_config(tmp_path):
    quoted, true = defaults_on(PAGE, BCOConfig(output_dir=str(tmp_path), use_cpu=True))
    assert len(quoted) >= 6
    assert quoted == true
