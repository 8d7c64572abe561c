"""The claims of annotated_trainers/kto.md that running TRL can show, on a random model of two layers, on the CPU."""

import functools
import inspect
import json
import math
import os
import re
from types import SimpleNamespace
from typing import ClassVar

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Qwen3ForCausalLM
from trl import DPOTrainer, KTOConfig, KTOTrainer, TrlParser
from trl.data_utils import unpair_preference_dataset
from trl.trainer import kto_trainer
from walkthrough_tools import CHECKPOINTING as CHECKPOINTING  # for a guide's test
from walkthrough_tools import (
    EXAMPLES,
    EXPECTED,
    PAGES,
    PAIRS,
    arguments_of,
    batch_of,
    changed,
    comparisons,
    experts,
    formula_names,
    functions_of,
    loss_of,
    made_and_trained,
    make_trainer,
    metrics_on,
    model_folder,
    page_of,
    prose,
    raise_logits,
    random_ids,
    save,
    section_of,
    tokenizer,
    trained,
    types_of_products,
)
from walkthrough_tools import LABELLED as ROWS
from walkthrough_tools import labelled as row

PAGE = PAGES / "kto.md"
section = functools.partial(section_of, PAGE)
MEASURED = EXPECTED / "kto.json"
checkpoint = model_folder()


@pytest.fixture(scope="module")
def make(checkpoint, tmp_path_factory):
    """Makes a KTOTrainer; keyword arguments of KTOTrainer go there, all others to KTOConfig."""

    def make(rows=ROWS, model=None, **more) -> KTOTrainer:
        more = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 2, **more}
        folder = tmp_path_factory.mktemp("run")
        return make_trainer(KTOTrainer, KTOConfig, folder, rows, model=model or checkpoint, **more)

    return make


trained_once = made_and_trained(eval_dataset=ROWS, eval_strategy="epoch")


@pytest.fixture
def moved(make, checkpoint):
    """A trainer whose policy differs from its reference; a test may change its settings."""

    def moved(rows=ROWS, **more):
        return make(rows, model=changed(Qwen3ForCausalLM.from_pretrained(checkpoint)), **more)

    return moved


def last(trainer: KTOTrainer) -> dict:
    """The metrics of the last call of the loss in evaluation mode."""
    return {key: values[-1] for key, values in trainer._metrics["eval"].items()}


def texts(trainer: KTOTrainer, column: str) -> list[str]:
    return [trainer.processing_class.decode(ids).removesuffix("<|end|>") for ids in trainer.train_dataset[column]]


# ---------------------------------------------------------------------------- the formulas, against TRL's own methods


page = page_of(PAGE)
VOCABULARY = 13


@pytest.fixture(scope="module")
def random_loss(make):
    """TRL's own `_compute_loss` on random logits: the loss, its gradient in the logits, and what went into it."""
    trainer = make()

    def logps(logits, ids, mask):
        logps = torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        return (logps * mask[:, 1:]).sum(1)

    def run(seed, labels, **settings):
        dice = torch.Generator().manual_seed(seed)

        rows = [
            {
                "prompt_ids": random_ids(dice, 1, 5, VOCABULARY),
                "completion_ids": random_ids(dice, 1, 8, VOCABULARY),
                "label": label,
            }
            for label in labels
        ]
        for here, before in zip(rows, rows[-1:] + rows[:-1], strict=True):
            here["KL_completion_ids"] = before["completion_ids"]
        batch = trainer.data_collator(rows)
        shapes = {prefix: (*batch[f"{prefix}input_ids"].shape, VOCABULARY) for prefix in ("", "KL_")}
        policy = {prefix: 2 * torch.randn(shape, generator=dice) for prefix, shape in shapes.items()}
        reference = {
            prefix: policy[prefix] + 0.7 * torch.randn(shape, generator=dice) for prefix, shape in shapes.items()
        }
        policy[""].requires_grad_()

        def returns(logits):
            def forward(input_ids, **kwargs):
                mismatched = input_ids is batch["KL_input_ids"]
                return SimpleNamespace(logits=logits["KL_" if mismatched else ""])

            return forward

        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"ref_model": returns(reference), **settings}.items():
                patch.setattr(trainer, name, value)
            trainer.model.eval()
            loss = trainer._compute_loss(returns(policy), batch, return_outputs=False)
            both = [trainer._compute_kl_logps(returns(logits), batch) for logits in (policy, reference)]
            trls_kl_logratios = both[0] - both[1] if trainer.calculate_KL else None
        (gradient,) = torch.autograd.grad(loss, policy[""])
        numbers = {
            prefix: logps(policy[prefix], batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"])
            - logps(reference[prefix], batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"])
            for prefix in shapes
        }
        return SimpleNamespace(
            loss=loss.detach(),
            gradient=gradient,
            kl=last(trainer)["kl"],
            logits=policy[""],
            logratios=numbers[""].float(),
            kl_logratios=numbers["KL_"].detach().float(),
            trls_kl_logratios=trls_kl_logratios,
            labels=torch.tensor(labels),
        )

    return run


ERRORS, agree, summary = comparisons()


LABELS = ([True, False, True, False], [True, True, True, False, True], [True, True], [False, False, False])
CASES = [(seed, labels) for seed in range(4) for labels in LABELS]


def test_the_key_equation_is_what_trl_computes(page, random_loss):
    above = 0
    for seed, labels in CASES:
        weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
        found = random_loss(seed, labels, beta=0.3, **weights)
        kl = page["kto_reference_point"](found.kl_logratios)
        ours = page["kto_loss"](found.logratios, found.labels, kl, beta=0.3, **weights)
        agree(ours, found.loss)
        (gradient,) = torch.autograd.grad(ours, found.logits)
        agree(gradient, found.gradient)
        above += float(kl) > 0
    assert 0 < above < len(CASES)  # both sides of the cut at 0 were seen


def test_the_reference_point_is_what_trl_computes(page, random_loss):
    for seed, labels in CASES:
        found = random_loss(seed, labels)
        torch.testing.assert_close(found.kl_logratios, found.trls_kl_logratios, rtol=1e-5, atol=1e-4)  # of tens of nats
        ours = float(page["kto_reference_point"](found.trls_kl_logratios))
        agree(torch.tensor(ours), torch.tensor(found.kl))


def test_apo_zero_unpaired_on_the_page_is_what_trl_computes(page, random_loss):
    for seed, labels in CASES:
        found = random_loss(seed, labels, beta=0.3, loss_type="apo_zero_unpaired", calculate_KL=False)
        ours = page["apo_zero_unpaired"](found.logratios, found.labels, beta=0.3)
        agree(ours, found.loss)
        (gradient,) = torch.autograd.grad(ours, found.logits)
        agree(gradient, found.gradient)
        assert found.kl == 0


def test_the_slope_on_the_page_is_what_trl_has(page, random_loss):
    for seed, labels in CASES:
        found = random_loss(seed, labels, beta=0.3, desirable_weight=2.0)
        slope = page["kto_slope"](found.logratios, found.labels, found.kl, beta=0.3, desirable_weight=2.0)
        (gradient,) = torch.autograd.grad((slope.detach() * found.logratios).mean(), found.logits)
        agree(gradient, found.gradient)


@pytest.mark.parametrize(("good", "bad", "weights"), [(3, 1, (1.0, 1.0)), (1, 3, (2.5, 0.5)), (5, 2, (0.3, 1.0))])
def test_the_rule_for_the_weights_is_the_one_that_trl_prints(page, make, caplog, good, bad, weights):
    rows = [row(f"{i}", f"{i}", i < good) for i in range(good + bad)]
    make(rows, desirable_weight=weights[0], undesirable_weight=weights[1])
    (message,) = [r.getMessage() for r in caplog.records if "recommend" in r.getMessage()]
    quoted = [float(number) for number in re.findall(r"\d+\.\d+", message)]
    n = {"desirable": good, "undesirable": bad}
    low, high = page["balanced_weights"](n["desirable"], n["undesirable"], *weights)
    assert quoted == [pytest.approx(bound, abs=0.0051) for bound in (*low, *high)]


def test_every_displayed_formula_has_its_function_and_is_compared_above():
    known = {"kto-loss", "kto-reference-point", "kto-slope", "apo-zero-unpaired", "balanced-weights"}
    assert formula_names(PAGE) == sorted(known)


# ------------------------------------------------------------------------------------------------------- what is logged


def test_the_page_lists_exactly_the_keys_that_a_run_logs(make, tmp_path):
    model = save(experts(output_router_logits=False), tmp_path / "moe")
    trainer = make(model=model, eval_dataset=Dataset.from_list(ROWS), eval_strategy="epoch")
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert set(metrics_on(PAGE)) == logged


def test_a_dense_model_logs_no_auxiliary_loss(trained_once):
    assert "aux_loss" not in set().union(*trained_once.state.log_history)


def test_there_is_no_accuracy(trained_once):
    assert not [key for line in trained_once.state.log_history for key in line if "accurac" in key]


@pytest.mark.parametrize(("weights", "labels"), [((1.0, 1.0), "TTTF"), ((1.0, 3.0), "TTTF"), ((0.5, 2.0), "FFTF")])
def test_the_first_loss_is_half_of_the_mean_weight(make, weights, labels):
    rows = [{**r, "label": letter == "T"} for r, letter in zip(ROWS, labels, strict=True)]
    trainer = make(rows, desirable_weight=weights[0], undesirable_weight=weights[1])
    each = [weights[0] if letter == "T" else weights[1] for letter in labels]
    assert loss_of(trainer, batch_of(trainer)) == pytest.approx(sum(each) / len(each) / 2)
    assert last(trainer)["kl"] == last(trainer)["rewards/chosen"] == last(trainer)["rewards/margins"] == 0


def test_the_first_loss_of_the_toy_run_is_half_of_its_mean_weight():
    first = json.loads(MEASURED.read_text("utf-8"))["held_out"]["loss"]["before"]
    assert len({round(value, 6) for value in first}) == 1
    labels = datasets.load_dataset(str(EXAMPLES / "toy/data/unpaired_preference"), split="test")["label"]
    assert first[0] == pytest.approx(sum(1.0 if label else 2.0 for label in labels) / len(labels) / 2, abs=2e-3)


def test_the_level_of_the_toy_run_rises_and_falls_back():
    kl = json.loads(MEASURED.read_text("utf-8"))["log"]["kl"]
    mean = dict(zip(kl["step"], kl["mean"], strict=True))
    assert max(mean.values()) == mean[20] == pytest.approx(1.6, abs=0.05)
    assert all(value < 0.04 for step, value in mean.items() if step >= 40)
    assert "rises to 1.6 at step 20 and stays below 0.04 from step 40 on" in prose(PAGE)


def test_a_batch_of_one_kind_leaves_the_other_out(moved):
    trainer = moved()
    trainer._metrics["eval"].clear()
    loss_of(trainer, batch_of(trainer, [0, 2]))
    assert {"rewards/chosen", "logps/chosen", "logits/chosen"} <= set(trainer._metrics["eval"])
    assert not {"rewards/rejected", "logps/rejected", "rewards/margins"} & set(trainer._metrics["eval"])


def test_the_logged_rewards_are_means_of_batch_means(moved):
    labels = [True, False, False, False, True, True, True, True]
    rows = [row(f"{i}+{i}", f"{i}+{i}={7 * i}", label) for i, label in enumerate(labels)]
    trainer = moved(rows, logging_steps=2, learning_rate=0.0)
    (line,) = trained(trainer)
    each = []
    for i in range(8):
        trainer._metrics["eval"].clear()
        loss_of(trainer, batch_of(trainer, [i]))
        each.append(last(trainer)["rewards/chosen" if labels[i] else "rewards/rejected"])
    good = [reward for reward, label in zip(each, labels, strict=True) if label]
    assert line["rewards/chosen"] == pytest.approx((each[0] + sum(each[4:]) / 4) / 2, abs=1e-5)
    assert line["rewards/chosen"] != pytest.approx(sum(good) / 5, abs=1e-3)
    # the margin knows only the batch that had both kinds
    assert line["rewards/margins"] == pytest.approx(each[0] - sum(each[1:4]) / 3, abs=1e-5)
    assert line["rewards/margins"] != pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-3)


def test_answers_for_the_kl_are_not_counted_as_tokens(make):
    trainer = make(max_steps=1)
    rows = list(trainer.train_dataset)
    expected = sum(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows)
    assert trained(trainer)[0]["num_tokens"] == expected


def test_two_evaluation_sets_share_one_name_for_their_rewards(make):
    trainer = make(eval_dataset={"a": Dataset.from_list(ROWS[:2]), "b": Dataset.from_list(ROWS[2:])})
    both = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_rewards/margins"} <= set(both)
    assert not {"eval_a_rewards/margins", "eval_b_rewards/margins"} & set(both)


def test_a_constant_added_to_the_logits_changes_their_metric_only(moved):
    trainer = moved()
    batch = batch_of(trainer)
    before, level = loss_of(trainer, batch), last(trainer)["logits/chosen"]
    raise_logits(trainer.model, 5)
    assert loss_of(trainer, batch) == pytest.approx(before, abs=1e-6)
    assert last(trainer)["logits/chosen"] == pytest.approx(level + 5, abs=1e-4)


# ------------------------------------------------------------------------------------------------- where the KL comes from


def test_each_prompt_gets_the_answer_before_it_and_the_first_the_last(make):
    trainer = make([*ROWS, *[row(str(i), f"{i}+0={i}", True) for i in range(3)]], per_device_train_batch_size=3)
    answers = texts(trainer, "completion_ids")
    assert texts(trainer, "KL_completion_ids") == [answers[i] for i in (2, 0, 1, 5, 3, 4, 6)]


def test_a_last_batch_of_one_row_is_measured_on_its_own_answer(moved):
    trainer = moved([*ROWS, row("9", "9+0=9", True)])
    assert trainer.train_dataset[4]["KL_completion_ids"] == trainer.train_dataset[4]["completion_ids"]
    loss_of(trainer, batch_of(trainer, [4]))
    assert last(trainer)["kl"] == pytest.approx(max(last(trainer)["rewards/chosen"] / 0.1, 0), abs=1e-4)


def test_neighbours_with_one_prompt_give_each_other_matching_answers(make):
    kinds = {"chosen": True, "rejected": False}
    rows = [{"prompt": p["prompt"], "completion": p[kind], "label": kinds[kind]} for p in PAIRS for kind in kinds]
    trainer = make(rows)
    questions = [r["prompt"][0]["content"] for r in rows]
    answers = texts(trainer, "KL_completion_ids")
    matching = [answer.startswith(question + "=") for question, answer in zip(questions, answers, strict=True)]
    assert matching == [False, True] * 4


def test_an_evaluation_set_is_rotated_by_the_training_batch_size(make):
    trainer = make(per_device_train_batch_size=2, per_device_eval_batch_size=4, eval_dataset=Dataset.from_list(ROWS))
    answers = trainer.eval_dataset["completion_ids"]
    assert list(trainer.eval_dataset["KL_completion_ids"]) == [answers[i] for i in (1, 0, 3, 2)]


def test_several_processes_cut_the_data_at_other_places(make):
    rows = [row(str(i), f"{i}+0={i}", i % 2 == 0) for i in range(6)]
    one, two = (texts(make(rows, dataset_num_proc=n), "KL_completion_ids") for n in (1, 2))
    answers = [f"{i}+0={i}" for i in range(6)]
    assert one == [answers[i] for i in (3, 0, 1, 2, 5, 4)]  # batches 0-3 and 4-5, as in training
    assert two == [answers[i] for i in (2, 0, 1, 5, 3, 4)]  # halves of three rows


def test_long_kl_answers_are_cut_too(make):
    trainer = make(max_length=12)
    assert batch_of(trainer)["KL_input_ids"].shape[1] == batch_of(trainer)["input_ids"].shape[1] == 12


def test_rows_whose_prompt_fills_max_length_are_gone_before_the_rotation(make):
    trainer = make(max_length=7)  # the second prompt has seven tokens
    answers = texts(trainer, "completion_ids")
    assert len(answers) == 3
    assert texts(trainer, "KL_completion_ids") == answers[-1:] + answers[:-1]


def test_a_batch_of_one_is_refused_in_training_only(make):
    with pytest.raises(ValueError, match="batch size must be > 1"):
        make(per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert make(per_device_eval_batch_size=1).args.per_device_eval_batch_size == 1


def test_the_kl_is_one_number_without_a_gradient(moved):
    trainer = moved()
    trainer.calculate_KL, batch = True, batch_of(trainer)
    values = trainer._compute_kl_logps(trainer.model, batch)
    assert values.shape == (4,)
    assert not values.requires_grad


def test_the_kl_is_averaged_over_processes_and_then_cut(moved, monkeypatch):
    trainer = moved()
    batch, gathered = batch_of(trainer), []
    gather = trainer.accelerator.gather_for_metrics

    def two_processes(value, *args, **kwargs):
        if not gathered:  # the first value that is gathered is the KL of this process
            gathered.append(float(value))
            return torch.stack([value, torch.as_tensor(other, dtype=value.dtype)])
        return gather(value, *args, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "gather_for_metrics", two_processes)
    for other in (8.0, -90.0):
        gathered.clear()
        loss_of(trainer, batch)
        assert last(trainer)["kl"] == pytest.approx(max((gathered[0] + other) / 2, 0), abs=1e-5)


def test_a_policy_below_the_reference_on_mismatched_answers_has_a_kl_of_0(moved):
    trainer = moved()
    batch = batch_of(trainer)
    with torch.no_grad():
        ours, theirs = (trainer._compute_kl_logps(m.eval(), batch) for m in (trainer.model, trainer.ref_model))
    loss_of(trainer, batch)
    assert last(trainer)["kl"] == pytest.approx(max(float((ours - theirs).mean()), 0), abs=1e-5)
    trainer.model, trainer.ref_model = trainer.ref_model, trainer.model
    trainer._metrics["eval"].clear()
    loss_of(trainer, batch)
    assert last(trainer)["kl"] == pytest.approx(max(float((theirs - ours).mean()), 0), abs=1e-5)
    assert float((ours - theirs).mean()) != 0  # so that one of the two was cut


@pytest.mark.parametrize(("loss_type", "passes"), [("kto", 2), ("apo_zero_unpaired", 1)])
def test_each_model_runs_twice_a_step_and_once_without_a_kl(make, loss_type, passes):
    trainer, seen = make(loss_type=loss_type), []
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        model.register_forward_pre_hook(lambda *args, name=name: seen.append((name, torch.is_grad_enabled())))
    trainer.train()
    expected = [("policy", False)] * (passes - 1) + [("policy", True)] + [("reference", False)] * passes
    assert seen == expected * 2


def test_gradient_accumulation_changes_the_kl(moved):
    rows = [{**r, "label": True} for r in ROWS]  # with one of each kind, the change would cancel
    together = trained(moved(rows, max_steps=1))[0]
    apart = trained(moved(rows, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2))[0]
    assert together["rewards/chosen"] == pytest.approx(apart["rewards/chosen"], abs=1e-5)
    assert together["kl"] != pytest.approx(apart["kl"], abs=1e-4)
    assert together["loss"] != pytest.approx(apart["loss"], abs=1e-5)


def test_a_batch_found_by_halving_keeps_the_answers_of_the_large_one(make, monkeypatch):
    trainer, sizes = make(auto_find_batch_size=True), []
    compute = trainer.compute_loss

    def too_large(model, inputs, **kwargs):
        sizes.append(len(inputs["label"]))
        if sizes[-1] == 4:
            raise RuntimeError("CUDA out of memory.")
        answers, others = (
            {tuple(ids[mask.bool()].tolist()) for ids, mask in zip(*columns, strict=True)}
            for columns in (
                (inputs["input_ids"], inputs["completion_mask"]),
                (inputs["KL_input_ids"], inputs["KL_completion_mask"]),
            )
        )
        if len(sizes) == 2:
            assert answers != others
        return compute(model, inputs, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", too_large)
    trainer.train()
    assert sizes[0] == 4
    assert 1 < sizes[1] < 4


def test_apo_zero_unpaired_has_no_kl(moved):
    trainer = moved(loss_type="apo_zero_unpaired")
    assert "KL_completion_ids" not in trainer.train_dataset.column_names
    assert "KL_input_ids" not in batch_of(trainer)
    loss_of(trainer, batch_of(trainer))
    assert last(trainer)["kl"] == 0
    assert make_single(trainer) == 1


def make_single(trainer) -> int:
    """A batch of one row is nothing special without a KL."""
    trainer.args.per_device_train_batch_size = 1
    return len(batch_of(trainer, [0])["label"])


# ------------------------------------------------------------------------------------------------------- the order of rows


def order(trainer: KTOTrainer) -> list[int]:
    return [list(trainer.train_dataset["prompt_ids"]).index(list(r["prompt_ids"])) for r in sampled(trainer)]


def sampled(trainer: KTOTrainer) -> list[dict]:
    return [trainer.train_dataset[i] for i in trainer._get_train_sampler(trainer.train_dataset)]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_rows_come_in_the_order_of_the_file_in_every_epoch(make, loss_type):
    rows = [row(str(i), f"{i}", i % 2 == 0) for i in range(8)]
    trainer, seen = make(rows, loss_type=loss_type, max_steps=4, seed=7), []
    compute = trainer.compute_loss

    def spy(model, inputs, **kwargs):
        seen.append([int(trainer.processing_class.decode(ids[1:2])) for ids in inputs["input_ids"]])
        return compute(model, inputs, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_another_order_is_refused_while_there_is_a_kl(make, strategy):
    with pytest.raises(ValueError, match="requires `train_sampling_strategy='sequential'`"):
        make(train_sampling_strategy=strategy)


def test_apo_zero_unpaired_can_be_shuffled(make):
    trainer = make(loss_type="apo_zero_unpaired", train_sampling_strategy="random")
    assert isinstance(trainer._get_train_sampler(trainer.train_dataset), torch.utils.data.RandomSampler)


def test_pairs_become_a_thousand_good_rows_and_then_a_thousand_bad_ones():
    pairs = Dataset.from_list([{"prompt": str(i), "chosen": "a", "rejected": "b", "source": i} for i in range(1500)])
    rows = unpair_preference_dataset(pairs)
    assert list(rows["label"]) == [True] * 1000 + [False] * 1000 + [True] * 500 + [False] * 500
    assert rows["prompt"][0] == rows["prompt"][1000] == "0"
    assert rows["source"][1000] == 0  # other columns are copied to both


def test_pairs_are_trained_in_batches_of_one_kind(make):
    first, second = trained(make(PAIRS))
    assert "rewards/chosen" in first
    assert "rewards/rejected" not in first
    assert "rewards/rejected" in second
    assert "rewards/chosen" not in second
    shuffled = unpair_preference_dataset(Dataset.from_list(PAIRS)).shuffle(seed=1)
    assert "rewards/margins" in trained(make(shuffled))[0]


# ------------------------------------------------------------------------------------------------------- labels and weights


@pytest.mark.parametrize("labels", [(1, -1, 1, -1), (0.9, 0.2, 0.7, 0.1), (5, 1, 4, 2)])
def test_every_label_but_0_counts_as_good(moved, labels):
    rows = [{**r, "label": label} for r, label in zip(ROWS, labels, strict=True)]
    trainer = moved(rows)
    strange = loss_of(trainer, batch_of(trainer))
    trainer = moved([{**r, "label": True} for r in ROWS])
    assert strange == pytest.approx(loss_of(trainer, batch_of(trainer)), abs=1e-6)


def test_labels_that_are_not_0_or_1_falsify_the_metrics(moved):
    trainer = moved([{**r, "label": 1 if r["label"] else -1} for r in ROWS])
    loss_of(trainer, batch_of(trainer))
    assert "rewards/chosen" not in last(trainer)  # 1 - 1 + 1 - 1 good answers
    assert last(trainer)["rewards/rejected"] == 0  # the sum over no bad answers, by four
    moved_half = moved([{**r, "label": 0.5} for r in ROWS])
    true = moved([{**r, "label": True} for r in ROWS])
    for trainer in (moved_half, true):
        loss_of(trainer, batch_of(trainer))
    assert last(moved_half)["rewards/chosen"] == pytest.approx(2 * last(true)["rewards/chosen"], rel=1e-4)


@pytest.mark.parametrize(("label", "error"), [("good", TypeError), (None, TypeError)])
def test_labels_of_text_or_none_stop_the_constructor(make, label, error):
    with pytest.raises(error):
        make([{**r, "label": label} for r in ROWS])


def test_weights_are_not_checked_where_the_counts_are_equal(make, caplog):
    make(desirable_weight=7.0)
    assert not [r for r in caplog.records if "recommend" in r.getMessage()]


@pytest.mark.parametrize(("weight", "warns"), [(1.0, False), (1.33, False), (1.4, True), (0.9, True)])
def test_the_ratio_is_accepted_from_1_to_4_thirds(make, caplog, weight, warns):
    rows = [row(f"{i}", f"{i}", i < 3) for i in range(9)]
    make(rows, desirable_weight=2 * weight)  # three good rows, six bad ones
    assert bool([r for r in caplog.records if "recommend" in r.getMessage()]) == warns


def test_the_weights_are_factors_and_not_shares(moved):
    trainer = moved()
    batch, losses = batch_of(trainer), []
    for trainer.desirable_weight, trainer.undesirable_weight in ((1, 0), (0, 1), (3, 5)):
        losses.append(loss_of(trainer, batch))
    assert losses[2] == pytest.approx(3 * losses[0] + 5 * losses[1], rel=1e-5)


def test_a_row_that_is_nan_hides_in_the_loss_and_ruins_the_gradient(make):
    trainer = make(precompute_ref_log_probs=True)
    batch = batch_of(trainer)
    batch["ref_logps"][0] = math.nan
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    assert float(loss.detach()) == pytest.approx(0.5)
    loss.backward()
    assert all(weight.grad.isnan().any() for weight in trainer.model.parameters())


# ------------------------------------------------------------------------------------------------------- the data


def test_a_row_without_a_prompt_fails(make):
    with pytest.raises(KeyError, match="chosen"):
        make([{"completion": r["completion"], "label": r["label"]} for r in ROWS])


def test_a_misspelt_loss_type_is_found_at_the_first_step(make):
    with pytest.raises(UnboundLocalError, match="chosen_losses"):
        make(loss_type="ktO").train()
    with pytest.raises(SystemExit):
        TrlParser(KTOConfig).parse_args_and_config(["--output_dir", "x", "--loss_type", "ktO"])


def test_text_gets_an_eos_token_and_messages_do_not(make):
    trainer = make([{"prompt": "1+2", "completion": "3", "label": i == 0} for i in range(2)])
    assert trainer.train_dataset[0]["completion_ids"][-1] == tokenizer().eos_token_id


def test_a_pad_token_equal_to_eos_does_no_harm(make):
    batch = batch_of(make(processing_class=tokenizer(pad=None)))
    for ids, mask, attention in zip(batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True):
        length = int(attention.sum())
        assert ids[length - 1] == tokenizer().eos_token_id
        assert mask[length - 1] == 1
        assert mask[length:].sum() == 0


def test_a_stream_is_rotated_too_and_its_weights_are_not_checked(make, caplog):
    rows = [*ROWS, row("9", "9+0=9", True), row("8", "8+0=8", True)]
    trainer = make(Dataset.from_list(rows).to_iterable_dataset(), per_device_train_batch_size=2)
    found = list(trainer.train_dataset)
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first["KL_completion_ids"] == second["completion_ids"]
    assert not [r for r in caplog.records if "recommend" in r.getMessage()]


# ------------------------------------------------------------------------------------------------------- the reference


def test_what_this_page_leaves_to_the_page_about_dpo_is_the_same_code():
    for name in ("evaluate", "compute_loss", "training_step", "log", "prediction_step", "_save_checkpoint"):
        ours, theirs = (
            inspect.getsource(getattr(t, name)).replace("KTO", "").replace("DPO", "") for t in (KTOTrainer, DPOTrainer)
        )
        assert ours == theirs, name
    ours, theirs = (
        inspect.getsource(t.__init__).replace("KTO", "").replace("DPO", "") for t in (KTOTrainer, DPOTrainer)
    )
    for start, end in (
        ("# PEFT\n", "dataset_sample ="),
        ("super().__init__", "# Disable dropout"),
        ("if args.sync_ref_model", "self.add_callback(SyncRefModelCallback"),
    ):
        part = ours[ours.index(start) : ours.index(end)]
        theirs_part = theirs[theirs.index(start) : theirs.index(end)].split("# Data collator")[0]
        assert "".join(part.split()).startswith("".join(theirs_part.split())[:400])


def test_the_reference_is_loaded_from_the_path_and_not_copied(moved):
    trainer = moved()
    loss_of(trainer, batch_of(trainer))
    assert last(trainer)["rewards/chosen"] != 0


def test_an_adapter_needs_no_second_model(make):
    trainer = make(peft_config=LoraConfig(task_type="CAUSAL_LM"))
    assert trainer.ref_model is None
    assert loss_of(trainer, batch_of(trainer)) == pytest.approx(0.5)
    assert last(trainer)["kl"] == last(trainer)["rewards/chosen"] == 0


def test_a_trained_adapter_is_copied_and_is_the_reference(make, checkpoint):
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(Qwen3ForCausalLM.from_pretrained(checkpoint), lora)
    trainer = make(model=model)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    assert loss_of(trainer, batch_of(trainer)) == pytest.approx(0.5)
    assert last(trainer)["rewards/chosen"] == 0


def test_precomputed_values_give_the_same_loss_without_a_reference(make, checkpoint):
    reference = Qwen3ForCausalLM.from_pretrained(checkpoint)
    plain = make(model=changed(Qwen3ForCausalLM.from_pretrained(checkpoint)))
    stored = make(
        model=changed(Qwen3ForCausalLM.from_pretrained(checkpoint)),
        ref_model=reference,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=3,
    )
    assert {"ref_logps", "ref_KL_logps"} <= set(stored.train_dataset.column_names)
    assert loss_of(stored, batch_of(stored)) == pytest.approx(loss_of(plain, batch_of(plain)), abs=1e-6)
    assert last(stored)["kl"] == pytest.approx(last(plain)["kl"], abs=1e-4)
    assert make(precompute_ref_log_probs=True).ref_model is None


def test_precomputed_values_are_made_outside_mixed_precision(make):
    assert trained(make(bf16=True))[0]["rewards/chosen"] == 0.0
    assert trained(make(bf16=True, precompute_ref_log_probs=True))[0]["rewards/chosen"] != 0.0


def test_the_reference_keeps_keys_and_values_that_nobody_reads(make):
    trainer, kept = make(), []
    for model in (trainer.model, trainer.ref_model):
        model.register_forward_hook(lambda _, __, outputs: kept.append(outputs.past_key_values is not None))
    loss_of(trainer, batch_of(trainer))
    assert kept == [False, False, True, True]


# ------------------------------------------------------------------------------------------------------- the Liger path


class Kernel:
    """Stands in for Liger's kernel: remembers its settings, and computes what the tests look at in the open."""

    made: ClassVar[list[dict]] = []

    def __init__(self, **settings):
        self.made.append(settings)
        self.settings = settings

    def __call__(self, _input, lin_weight, target, bias, preference_labels, ref_input, ref_weight, ref_bias, kl):
        def logps(hidden, weight):
            logits = hidden @ weight.T
            logps = torch.log_softmax(logits, -1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
            return (logps * (target != -100)).sum(-1), logits

        ours, logits = logps(_input, lin_weight)
        ratios = ours - logps(ref_input, ref_weight)[0] if self.settings["use_ref_model"] else ours
        good = preference_labels
        losses = 1 - torch.sigmoid(self.settings["beta"] * (ratios - kl) * torch.where(good, 1, -1))
        rewards = self.settings["beta"] * ratios
        sums = [(value[good].sum(), value[~good].sum()) for value in (ours, logits, rewards)]
        return losses.mean(), tuple(value for pair in sums for value in pair)


@pytest.fixture
def liger(make, monkeypatch):
    monkeypatch.setattr(kto_trainer, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(kto_trainer, "LigerFusedLinearKTOLoss", Kernel, raising=False)
    Kernel.made.clear()

    def build(**more):
        trainer = make(use_liger_kernel=False, **more)
        trainer.args.use_liger_kernel = True  # as a setting it would also patch the model, which needs the real kernel
        return KTOTrainer(
            model=trainer.model.get_base_model() if more.get("peft_config") else trainer.model,
            args=trainer.args,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer(),
            peft_config=more.get("peft_config"),
        )

    return build


def liger_loss_of(trainer) -> float:
    trainer.model.eval()
    return float(trainer.compute_loss(trainer.model, batch_of(trainer)).detach())


def test_liger_gets_neither_weight(liger):
    trainer = liger(desirable_weight=3.0, undesirable_weight=0.1)
    assert Kernel.made == [{"beta": 0.1, "use_ref_model": True}]
    assert liger_loss_of(trainer) == pytest.approx(0.5)
    assert loss_of(trainer, batch_of(trainer)) == pytest.approx(0.5 * (3.0 + 0.1) / 2)


def test_liger_with_an_adapter_has_no_reference(liger):
    trainer = liger(peft_config=LoraConfig(task_type="CAUSAL_LM"))
    assert Kernel.made == [{"beta": 0.1, "use_ref_model": False}]
    liger_loss_of(trainer)
    metrics = last(trainer)
    assert metrics["rewards/chosen"] == pytest.approx(0.1 * metrics["logps/chosen"])
    assert metrics["rewards/chosen"] < -1
    loss_of(trainer, batch_of(trainer))
    assert last(trainer)["rewards/chosen"] == 0


def test_liger_leaves_out_the_entropy_and_sums_the_logits(liger):
    trainer = liger()
    liger_loss_of(trainer)
    fused = dict(last(trainer))
    trainer._metrics["eval"].clear()
    loss_of(trainer, batch_of(trainer))
    plain = last(trainer)
    assert set(plain) - set(fused) == {"entropy"}
    assert fused["rewards/margins"] == pytest.approx(plain["rewards/margins"])
    batch = batch_of(trainer)
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    assert fused["logits/chosen"] == pytest.approx(float(logits[batch["label"]].sum()) / 2, rel=1e-3)


def test_liger_goes_around_bf16(make, liger):
    assert types_of_products(make(bf16=True)) == {torch.bfloat16}
    trainer = liger(bf16=True)
    trainer.args.use_liger_kernel = False
    assert trainer.use_liger_kernel and types_of_products(trainer) == {torch.float32}


@pytest.mark.parametrize("settings", [{"loss_type": "apo_zero_unpaired"}, {"precompute_ref_log_probs": True}])
def test_liger_refuses(make, monkeypatch, settings):
    monkeypatch.setattr(kto_trainer, "is_liger_kernel_available", lambda: True)
    args = make(**settings).args
    args.use_liger_kernel = True
    with pytest.raises(ValueError, match=r"[Ll]iger"):
        KTOTrainer(make().model, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer())


# ------------------------------------------------------------------------------------------------------- the neighbours

RATIOS = torch.tensor([3.0, -1.5, 0.2, 7.0])


def test_bco_on_the_page_is_what_trl_computes(page):
    from trl.experimental.bco import BCOTrainer

    this = SimpleNamespace(beta=0.3, running=SimpleNamespace(mean=0.2), match_underlying_distribution=False)
    zeros = torch.zeros(2)
    theirs = BCOTrainer.bco_loss(this, RATIOS[:2], RATIOS[2:], zeros, zeros, None, None, do_train=False)[0].mean()
    labels = torch.tensor([True, True, False, False])
    assert float(page["bco_loss"](RATIOS, labels, reward_shift=0.2, beta=0.3)) == pytest.approx(float(theirs))


def test_dpo_on_the_page_is_the_one_of_the_page_about_dpo(page):
    theirs = functions_of(PAGES / "dpo.md", "dpo_loss")
    good, bad = RATIOS[:2], RATIOS[2:]
    ours = page["dpo_loss"](RATIOS, torch.tensor([True, True, False, False]), beta=0.3)
    assert float(ours) == pytest.approx(float(theirs["dpo_loss"](good, bad, torch.zeros(2), torch.zeros(2), beta=0.3)))


# ------------------------------------------------------------------------------------------------------- the page itself


def test_the_toy_run_has_the_settings_that_the_page_names():
    script = (EXAMPLES / "kto.py").read_text("utf-8")
    assert '"beta": 1.0' in script
    assert '"undesirable_weight": 2.0' in script
    assert '"desirable_weight"' not in script


def test_the_arguments_that_the_page_calls_gone_are_gone():
    text = section("Older code and tutorials")
    here = arguments_of(KTOTrainer, KTOConfig)
    for name in ("max_prompt_length", "max_completion_length", "model_adapter_name", "ref_adapter_name"):
        assert f"`{name}`" in text
        assert name not in here
    assert "processing_class" in here
    assert "tokenizer" not in here


def test_the_experimental_import_works_with_a_warning(tmp_path):
    from trl.experimental.kto import KTOConfig as Old

    with pytest.warns(FutureWarning, match="from trl import KTOConfig"):
        assert isinstance(Old(output_dir=str(tmp_path), use_cpu=True), KTOConfig)


def test_numbers_in_the_notes_are_those_of_the_code(tmp_path):
    assert inspect.signature(kto_trainer.entropy_from_logits).parameters["chunk_size"].default == 128
    half = torch.nn.Linear(2, 2).to(torch.bfloat16)
    assert kto_trainer.hash_module(half) != kto_trainer.hash_module(half.float())
