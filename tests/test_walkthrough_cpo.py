"""The claims of annotated_trainers/cpo.md that running TRL can show, on a random model of two layers, on the CPU."""

import functools
import json
import math
import os
import re
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import Qwen3ForCausalLM
from trl import DPOConfig, DPOTrainer, TrlParser
from trl.experimental.cpo import CPOConfig, CPOTrainer, cpo_trainer
from walkthrough_tools import (
    CHECKPOINTING,
    EXAMPLES,
    EXPECTED,
    LOPSIDED,
    PAGES,
    TEMPLATE,
    arguments_of,
    batch_of,
    comparisons,
    counts,
    defaults_on,
    experts,
    first_cells,
    formula_names,
    functions_of,
    make_trainer,
    measured,
    metrics_on,
    model_folder,
    named_tests,
    page_of,
    pair,
    prose,
    raise_logits,
    random_pairs,
    repeated,
    save,
    section_of,
    t5,
    text,
    tokenizer,
    trained,
    words,
)
from walkthrough_tools import PAIRS as ROWS

PAGE = PAGES / "cpo.md"
section = functools.partial(section_of, PAGE)
MEASURED = EXPECTED / "cpo.json"
checkpoint = model_folder()


@pytest.fixture(scope="module")
def make(checkpoint, tmp_path_factory):
    """Makes a CPOTrainer; keyword arguments of CPOTrainer go there, all others to CPOConfig."""

    def make(rows=ROWS, model=None, **more) -> CPOTrainer:
        model = model if model or "model_init" in more else checkpoint
        sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 2}
        more = {**sizes, "remove_unused_columns": False, **more}
        return make_trainer(CPOTrainer, CPOConfig, tmp_path_factory.mktemp("run"), rows, model=model, **more)

    return make


@pytest.fixture
def trainer(make):
    """A trainer for the tests that look at one; what they set on it, they set for themselves."""
    return make(eval_dataset=Dataset.from_list(ROWS))


# ---------------------------------------------------------------------------- the formulas, against TRL's own methods


page = page_of(PAGE)
ERRORS, agree, summary = comparisons()


VOCABULARY = 13


@pytest.fixture
def random_loss(trainer):
    """TRL's own loss and metrics on random logits, the gradient in the logits, and what went into it."""

    def run(seed, pairs=3, **settings):
        dice = torch.Generator().manual_seed(seed)

        batch = trainer.data_collator(random_pairs(dice, pairs, VOCABULARY))
        stacked = trainer.concatenated_inputs(batch)
        ids, labels = stacked["concatenated_input_ids"], stacked["concatenated_labels"]
        logits = (2 * torch.randn((*ids.shape, VOCABULARY), generator=dice)).requires_grad_()

        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setattr(trainer, name, value, raising=False)
            loss, metrics = trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)
        (gradient,) = torch.autograd.grad(loss, logits)

        mask = labels[:, 1:] != -100
        logps = torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, ids[:, 1:, None])[..., 0] * mask
        tokens = mask.sum(1)
        return SimpleNamespace(
            loss=loss.detach(),
            metrics=metrics,
            gradient=gradient,
            logits=logits,
            token_logps=logps,
            mask=mask,
            tokens=tokens,
            chosen=logps.sum(1)[:pairs],
            rejected=logps.sum(1)[pairs:],
            chosen_mean=(logps.sum(1) / tokens)[:pairs],
            rejected_mean=(logps.sum(1) / tokens)[pairs:],
        )

    return run


CASES = [(seed, pairs) for seed in range(6) for pairs in (1, 4)]


def same(ours, found):
    """A value of the page and its gradient in the logits, against those of TRL."""
    agree(ours, found.loss.double())
    (gradient,) = torch.autograd.grad(ours, found.logits)
    agree(gradient, found.gradient)


@pytest.mark.parametrize("cpo_alpha", [0.0, 1.0, 30.0])
def test_the_key_equation_is_what_trl_computes(page, random_loss, cpo_alpha):
    for seed, pairs in CASES:
        found = random_loss(seed, pairs, beta=0.3, cpo_alpha=cpo_alpha)
        nll = page["cpo_nll"](found.chosen, found.tokens[:pairs])
        same(page["cpo_loss"](found.chosen, found.rejected, nll, beta=0.3, cpo_alpha=cpo_alpha), found)


def test_the_second_term_is_what_trl_computes(page, random_loss):
    for seed, pairs in CASES:
        found = random_loss(seed, pairs, cpo_alpha=1e6)  # so large that the first term is rounded away
        nll = page["cpo_nll"](found.chosen, found.tokens[:pairs])
        agree(nll, torch.tensor(found.metrics["nll_loss"], dtype=torch.double))
        (gradient,) = torch.autograd.grad(nll, found.logits)
        agree(gradient[:pairs], found.gradient[:pairs] / 1e6)


def test_the_pull_on_the_page_is_what_trl_has(page, random_loss):
    for seed, pairs in CASES:
        found = random_loss(seed, pairs, beta=0.3, cpo_alpha=2.0)
        pulls = page["cpo_pull"](found.chosen, found.rejected, found.tokens[:pairs], beta=0.3, cpo_alpha=2.0)
        each = torch.cat(pulls).detach()[:, None] * found.mask  # the same for all tokens of an answer
        (gradient,) = torch.autograd.grad(-(each * found.token_logps).sum(), found.logits)
        agree(gradient, found.gradient)


def test_simpo_on_the_page_is_what_trl_computes(page, random_loss):
    for seed, pairs in CASES:
        settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.4}
        found = random_loss(seed, pairs, **settings)
        same(page["simpo_loss"](found.chosen_mean, found.rejected_mean, beta=2.0, gamma=1.4), found)


@pytest.mark.parametrize("alpha", [0.25, 0.5, -0.5, 0.0])
def test_alphapo_on_the_page_is_what_trl_computes(page, random_loss, alpha):
    for seed, pairs in CASES:
        settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 0.2, "simpo_gamma": 0.2, "alpha": alpha}
        found = random_loss(seed, pairs, **settings)
        chosen, rejected = (page["alphapo_reward"](x, alpha) for x in (found.chosen_mean, found.rejected_mean))
        same(page["simpo_loss"](chosen, rejected, beta=0.2, gamma=0.2), found)
        agree(0.2 * chosen.mean(), torch.tensor(found.metrics["rewards/chosen"], dtype=torch.double))


def test_hinge_on_the_page_is_what_trl_computes(page, random_loss):
    flat = 0
    for seed, pairs in CASES:
        found = random_loss(seed, pairs, loss_type="hinge", cpo_alpha=0.0, beta=0.3)
        ours = page["cpo_hinge"](found.chosen, found.rejected, beta=0.3)
        same(ours, found)
        flat += float(ours.detach()) < 0.5
    assert 0 < flat < len(CASES)  # both sides of the kink were seen


def test_ipo_on_the_page_is_what_trl_computes(page, random_loss):
    for seed, pairs in CASES:
        found = random_loss(seed, pairs, loss_type="ipo", cpo_alpha=0.0, beta=0.3)
        same(page["cpo_ipo"](found.chosen_mean, found.rejected_mean, beta=0.3), found)


def test_label_smoothing_on_the_page_is_what_trl_computes(page, random_loss):
    for seed, pairs in CASES:
        found = random_loss(seed, pairs, cpo_alpha=0.0, beta=0.3, label_smoothing=0.2)
        same(page["cpo_smoothed"](0.3 * (found.chosen - found.rejected), 0.2), found)
        settings = {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0, "beta": 0.3, "label_smoothing": 0.2}
        found = random_loss(seed, pairs, **settings)
        same(page["cpo_smoothed"](0.3 * (found.chosen_mean - found.rejected_mean) - 0.7, 0.2), found)


def test_a_smoothed_label_pulls_back_beyond_its_minimum(page):
    z = torch.tensor([math.log(0.8 / 0.2) + step for step in (-0.5, 0.0, 0.5)], requires_grad=True)
    (slope,) = torch.autograd.grad(page["cpo_smoothed"](z, 0.2), z)
    assert slope[0] < 0 < slope[2]
    assert float(slope[1]) == pytest.approx(0, abs=1e-7)


def test_every_displayed_formula_has_its_function_and_is_compared_above():
    known = {"cpo-loss", "cpo-nll", "cpo-pull", "simpo-loss", "alphapo-reward", "cpo-hinge", "cpo-ipo", "cpo-smoothed"}
    assert formula_names(PAGE) == sorted(known)


# ------------------------------------------------------------------------------------------------------- what is logged


def test_the_page_lists_exactly_the_keys_that_a_run_logs(make, tmp_path):
    model = save(experts(output_router_logits=True), tmp_path)
    trainer = make(model=model, eval_dataset=Dataset.from_list(ROWS), eval_strategy="epoch")
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert set(metrics_on(PAGE)) == logged
    assert trainer.aux_loss_enabled


@pytest.mark.parametrize("on", [True, False])
def test_the_auxiliary_loss_is_added_and_not_logged(make, tmp_path, on):
    trainer = make(model=save(experts(output_router_logits=on, router_aux_loss_coef=0.5), tmp_path))
    batch = batch_of(trainer, range(2))
    loss, metrics = measured(trainer, batch)
    with torch.no_grad():
        outputs = trainer.concatenated_forward(trainer.model, batch)
    two_terms = float(trainer.cpo_loss(*outputs[:2])[0].mean() + outputs[4])
    assert loss == pytest.approx(two_terms + (0.5 * float(outputs[5]) if on else 0), rel=1e-5)
    assert len(outputs) == 5 + on
    assert not [key for key in metrics if "aux" in key]


def test_total_flos_is_always_0(make):
    trainer = make()
    trainer.train()
    assert trainer.state.log_history[-1]["total_flos"] == 0


def test_the_first_losses_of_the_page_are_those_of_equally_likely_answers(make):
    table = {}
    for cells in first_cells(section("The first loss").replace("`simpo`, `alphapo`", "`simpo, alphapo`")):
        table |= dict.fromkeys(re.findall(r"\w+", cells[0]), float(cells[1]))
    assert set(table) == {"sigmoid", "hinge", "ipo", "simpo", "alphapo"}
    equal = torch.tensor([-3.0])
    for name, value in table.items():
        losses, _, _ = make(loss_type=name).cpo_loss(equal, equal)
        assert float(losses) == pytest.approx(value, abs=5e-5)


def test_the_first_loss_of_the_toy_run_has_two_parts():
    held_out = json.loads(MEASURED.read_text("utf-8"))["held_out"]
    loss, nll = held_out["loss"]["before"][0], held_out["nll_loss"]["before"][0]
    assert f"it is {loss:.3f}, of which {30 * nll:.3f} is the second term" in prose(PAGE)
    assert held_out["rewards/accuracies"]["before"][0] == pytest.approx(0.995)
    assert "0.995 on the toy world's pairs" in PAGE.read_text("utf-8")


def test_rewards_are_beta_times_the_log_probability_and_not_a_change(trainer, random_loss):
    _, metrics = measured(trainer, batch_of(trainer, range(2)))
    assert metrics["rewards/chosen"] == pytest.approx(0.1 * metrics["logps/chosen"])
    assert metrics["rewards/chosen"] < -3
    found = random_loss(0, loss_type="simpo", beta=2.0, simpo_gamma=7.0)  # gamma is not in them
    assert found.metrics["rewards/margins"] == pytest.approx(
        2.0 * float((found.chosen_mean - found.rejected_mean).mean().detach()), rel=1e-5
    )
    accuracy = float((found.chosen_mean > found.rejected_mean).double().mean())
    assert found.metrics["rewards/accuracies"] == pytest.approx(accuracy)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "simpo", "ipo"])
def test_logps_are_per_token_for_simpo_and_ipo(random_loss, loss_type):
    found = random_loss(3, loss_type=loss_type, simpo_gamma=0.5)
    ours = found.chosen_mean if loss_type in ("simpo", "ipo") else found.chosen
    assert found.metrics["logps/chosen"] == pytest.approx(float(ours.mean()), rel=1e-5)


def test_without_the_second_term_its_metric_is_0(trainer, monkeypatch):
    assert measured(trainer, batch_of(trainer, range(2)))[1]["nll_loss"] > 3
    monkeypatch.setattr(trainer, "cpo_alpha", 0)
    assert measured(trainer, batch_of(trainer, range(2)))[1]["nll_loss"] == 0


def test_the_mean_logits_run_over_prompt_and_padding_too(random_loss):
    found = random_loss(1, pairs=3)
    assert found.mask[:3].sum() < found.mask[:3].numel()
    assert found.metrics["logits/chosen"] == pytest.approx(float(found.logits[:3].mean().detach()), rel=1e-4)


def test_a_constant_added_to_the_logits_changes_their_metric_only(trainer, monkeypatch):
    batch = batch_of(trainer, range(2))
    before, metrics = measured(trainer, batch)
    raise_logits(trainer.model, 5)
    after, raised_metrics = measured(trainer, batch)
    assert after == pytest.approx(before, abs=1e-5)
    assert raised_metrics["logits/chosen"] == pytest.approx(metrics["logits/chosen"] + 5, abs=1e-4)


def test_metrics_since_the_last_training_line_are_never_shown(make):
    trainer = make(max_steps=3, logging_steps=2)
    assert len(trained(trainer)) == 1
    assert "rewards/margins" not in trainer.state.log_history[-1]
    assert len(trainer._stored_metrics["train"]["rewards/margins"]) == 1


def test_evaluation_metrics_are_means_of_batch_means(make):
    trainer = make(eval_dataset=Dataset.from_list(ROWS[:3]))
    found = trainer.evaluate()["eval_rewards/chosen"]
    each = [measured(trainer, batch_of(trainer, [i]))[1]["rewards/chosen"] for i in range(3)]
    assert found == pytest.approx(((each[0] + each[1]) / 2 + each[2]) / 2, rel=1e-5)
    assert found != pytest.approx(sum(each) / 3, rel=1e-3)


def test_two_evaluation_sets_share_one_name_for_their_rewards(make):
    sets = DatasetDict(a=Dataset.from_list(ROWS[:2]), b=Dataset.from_list(ROWS[2:]))
    trainer = make(eval_dataset=sets)
    both = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_rewards/margins"} <= set(both)
    assert not {"eval_a_rewards/margins", "eval_b_rewards/margins"} & set(both)
    own = trainer.evaluate(trainer.eval_dataset["a"], metric_key_prefix="mine")
    assert {"mine_loss", "eval_rewards/margins"} <= set(own)


def test_predict_is_mixed_into_the_next_evaluation(make):
    trainer = make(eval_dataset=Dataset.from_list(ROWS))
    clean = trainer.evaluate()["eval_rewards/margins"]
    assert not [key for key in trainer.predict(trainer.eval_dataset.select([0])).metrics if "rewards" in key]
    assert trainer.evaluate()["eval_rewards/margins"] != pytest.approx(clean, rel=1e-3)
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(clean)


def test_compute_metrics_sees_mean_logits(make):
    seen = []
    trainer = make(eval_dataset=Dataset.from_list(ROWS), compute_metrics=lambda p: seen.append(p) or {})
    trainer.evaluate()
    (prediction,) = seen
    _, metrics = measured(trainer, batch_of(trainer, range(2)))
    assert prediction.predictions.shape == (4,)  # two batches, two numbers each
    assert prediction.predictions[0] == pytest.approx(metrics["logits/chosen"], rel=1e-3)
    assert not prediction.label_ids.any()


# ------------------------------------------------------------------------------------------------------- the two terms


def test_one_forward_pass_of_one_model_makes_a_step(make):
    trainer, shapes = make(max_steps=1), []
    trainer.model.register_forward_hook(lambda _, args, __: shapes.append(args[0].shape[0]))
    trainer.train()
    assert shapes == [4]  # two pairs
    assert not [name for name in vars(trainer) if "ref" in name]


def test_the_pull_of_the_second_term_shrinks_with_the_length(make):
    trainer = make([text("1", "2" * n, "3") for n in (9, 99)], cpo_alpha=1.0)
    slopes = []
    for i in range(2):
        batch = batch_of(trainer, [i])
        outputs = trainer.model.eval()(batch["chosen_input_ids"])
        outputs.logits.retain_grad()
        monkey = SimpleNamespace(logits=torch.cat([outputs.logits, outputs.logits.detach()]))
        *_, nll = trainer.concatenated_forward(lambda *_, monkey=monkey, **__: monkey, batch)
        nll.backward()
        # the slope in a token's log-probability is the gradient in its logit by (probability - 1)
        token = batch["chosen_input_ids"][0, 1]
        probability = outputs.logits[0, 0].softmax(-1)[token]
        slopes.append(float(outputs.logits.grad[0, 0, token] / (1 - probability)))
    assert slopes == [pytest.approx(-1 / 10, rel=1e-4), pytest.approx(-1 / 100, rel=1e-4)]


@pytest.mark.parametrize("cpo_alpha", [0.0, 1.0])
def test_accumulation_changes_the_loss_only_with_the_second_term(make, cpo_alpha):
    rows = [pair("1", "1", "2"), pair("3", "3 and a much longer answer to it", "4")]
    settings = {"max_steps": 1, "cpo_alpha": cpo_alpha}
    (one,) = trained(make(rows, per_device_train_batch_size=2, **settings))
    (two,) = trained(make(rows, per_device_train_batch_size=1, gradient_accumulation_steps=2, **settings))
    assert (one["loss"] == pytest.approx(two["loss"], abs=1e-4)) == (cpo_alpha == 0)
    assert (one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)) == (cpo_alpha == 0)


def test_the_parent_divides_by_the_accumulation_whatever_the_trainer_promises(make):
    found = []
    for promise in (False, True):
        trainer = make(max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2)
        trainer.model_accepts_loss_kwargs = promise
        found += trained(trainer)
    assert found[0] == found[1]


def test_simpo_keeps_the_second_term_unless_told_otherwise(make):
    for cpo_alpha, settings in ((1.0, {}), (0.0, {"cpo_alpha": 0})):
        trainer = make(loss_type="simpo", **settings)
        loss, metrics = measured(trainer, batch_of(trainer, range(2)))
        with torch.no_grad():
            outputs = trainer.concatenated_forward(trainer.model, batch_of(trainer, range(2)))
        first = float(trainer.cpo_loss(*outputs[:2])[0].mean())
        assert loss == pytest.approx(first + cpo_alpha * metrics["nll_loss"])
        assert (metrics["nll_loss"] > 3) == (cpo_alpha > 0)


def test_alphapo_alone_is_simpo(make):
    alone, simpo = make(loss_type="alphapo", cpo_alpha=7.0), make(loss_type="simpo", cpo_alpha=0.0)
    assert alone.loss_type == "simpo"
    assert alone.cpo_alpha == alone.alpha == 0
    assert measured(alone, batch_of(alone, range(2))) == measured(simpo, batch_of(simpo, range(2)))
    both = make(loss_type="alphapo", alpha=0.25)
    assert measured(both, batch_of(both, range(2)))[0] != pytest.approx(
        measured(simpo, batch_of(simpo, range(2)))[0], rel=1e-3
    )


def test_the_defaults_ask_simpo_for_five_nats_per_token():
    args = CPOConfig(output_dir="unused", use_cpu=True, bf16=False)
    assert args.simpo_gamma / args.beta == pytest.approx(5)
    assert 1 / (2 * args.beta) == pytest.approx(5)  # what ipo asks for
    assert "148 times" in PAGE.read_text("utf-8")
    assert math.exp(5) == pytest.approx(148, abs=0.5)


def test_hinge_and_ipo_ignore_label_smoothing(make, random_loss, caplog):
    for loss_type in ("hinge", "ipo"):
        one, other = (random_loss(2, loss_type=loss_type, label_smoothing=e).loss for e in (0.0, 0.3))
        assert one == other
        make(loss_type=loss_type, label_smoothing=0.3)
        assert "does not support label smoothing" in caplog.text
        caplog.clear()
    assert random_loss(2, label_smoothing=0.0).loss != random_loss(2, label_smoothing=0.3).loss


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
@pytest.mark.parametrize("alpha", [0.25, 1.0, -0.25])
def test_alpha_with_sums_is_nan_for_answers_of_some_length(trainer, monkeypatch, loss_type, alpha):
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "alpha", alpha)
    chosen, rejected = (torch.tensor([sum_], requires_grad=True) for sum_ in (-104.0, -110.0))
    loss = trainer.cpo_loss(chosen, rejected)[0].sum()
    loss.backward()
    assert chosen.grad.isnan().all()
    if alpha > 0:
        assert loss.isnan()


# ------------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "max_length", "expected"),
    [(20, 40, 30, 50, (10, 10)), (20, 60, 10, 50, (50, 0)), (20, 11, 10, 30, (11, 10)), (5, 30, 30, 30, (0, 0))],
)
def test_answers_are_cut_to_what_the_longer_answer_leaves(make, prompt, chosen, rejected, max_length, expected):
    row = text("1" * prompt, "2" * (chosen - 1), "3" * (rejected - 1))  # EOS is one token more
    assert counts(make([row], max_length=chosen + rejected + prompt)) == (chosen, rejected)
    assert counts(make([row], max_length=max_length)) == expected


def test_a_prompt_is_never_cut(make):
    trainer = make([text("1" * 40, "2" * 4, "3" * 4)], max_length=30)
    assert len(trainer.train_dataset[0]["prompt_input_ids"]) == 40
    assert len(trainer.train_dataset[0]["chosen_input_ids"]) > 30


def test_a_cut_answer_has_lost_its_end(make):
    row = text("1" * 20, "2" * 39, "3" * 29)
    assert words(make([row]), "chosen_labels")[-1] == "<|end|>"
    assert words(make([row], max_length=50), "chosen_labels")[-1] == "2"


@pytest.mark.parametrize("loss_type", ["simpo", "ipo", "sigmoid", "hinge"])
def test_one_empty_answer_fills_the_model_with_nan(make, loss_type):
    rows = [LOPSIDED, *[text("1", "2", "3")] * 3]
    trainer = make(rows, max_length=50, loss_type=loss_type, per_device_train_batch_size=4, max_steps=1)
    (line,) = trained(trainer)
    lost = loss_type in ("simpo", "ipo")
    assert (line["loss"] == 0.0) == lost
    assert math.isnan(line["grad_norm"]) == lost
    assert all(bool(weight.isnan().any()) == lost for weight in trainer.model.parameters())


def test_an_empty_answer_counts_as_certain_where_sums_are_compared(make):
    trainer = make([LOPSIDED, text("1", "2", "3")], max_length=50)
    _, metrics = measured(trainer, batch_of(trainer, [0]))
    assert metrics["logps/rejected"] == 0
    assert metrics["rewards/accuracies"] == 0


def test_a_micro_batch_of_empty_answers_has_no_second_term(make):
    swapped = text(LOPSIDED["prompt"], LOPSIDED["rejected"], LOPSIDED["chosen"])
    trainer = make([swapped, text("1", "2", "3")], max_length=50)
    assert math.isnan(measured(trainer, batch_of(trainer, [0]))[1]["nll_loss"])
    assert not math.isnan(measured(trainer, batch_of(trainer, [0, 1]))[1]["nll_loss"])


def test_text_and_messages_get_one_eos_each(make):
    for rows in ([text("1+2", "3", "4")], ROWS):
        assert words(make(rows), "chosen_labels").count("<|end|>") == 1
        assert words(make(rows), "chosen_labels")[-1] == "<|end|>"


def test_a_line_break_behind_the_turn_earns_a_second_eos(make):
    template = TEMPLATE.replace("<|end|>{% endfor %}", "<|end|>\n{% endfor %}")
    own = tokenizer(template, more=["\n"])
    assert words(make(processing_class=own), "chosen_labels")[-3:] == ["<|end|>", "\n", "<|end|>"]


def test_a_bos_token_is_added_where_the_template_has_none(make):
    own = tokenizer(more=["<s>"])
    own.add_special_tokens({"bos_token": "<s>"})
    trainer = make(processing_class=own)
    assert words(trainer, "chosen_input_ids")[:2] == words(trainer, "prompt_input_ids")[:2] == ["<s>", "<|user|>"]
    assert words(trainer, "chosen_labels")[0] == "-"
    rendered = own.apply_chat_template(ROWS[0]["prompt"], add_generation_prompt=True, tokenize=False)
    assert rendered.startswith("<|user|>")


def test_a_bos_token_of_the_template_is_not_doubled(make):
    own = tokenizer("<s>" + TEMPLATE, more=["<s>"])
    own.add_special_tokens({"bos_token": "<s>"})
    assert words(make(processing_class=own), "chosen_input_ids")[:2] == ["<s>", "<|user|>"]


def test_a_token_that_is_half_prompt_is_scored(make):
    own = tokenizer(merges=[(" ", "a")], more=[" a"])
    trainer = make([text("1 ", "a", "b")], processing_class=own)
    assert words(trainer, "chosen_input_ids") == ["1", " a", "<|end|>"]
    assert words(trainer, "chosen_labels") == ["-", " a", "<|end|>"]
    assert words(trainer, "rejected_labels") == ["-", "-", "b", "<|end|>"]  # here the space belongs to the prompt
    assert words(trainer, "prompt_input_ids") == ["1"]


def test_a_longer_merge_hides_the_beginning_of_the_answer(make):
    own = tokenizer(merges=[("b", "c"), ("a", "bc")], more=["bc", "abc"])
    trainer = make([text("1ab", "c 2", "d 2")], processing_class=own)
    assert words(trainer, "chosen_input_ids") == ["1", "abc", " ", "2", "<|end|>"]
    assert words(trainer, "chosen_labels") == ["-", "-", " ", "2", "<|end|>"]
    assert words(trainer, "rejected_labels")[3] == "d"


def test_a_text_that_shrinks_when_joined_stops_the_constructor(make):
    own = tokenizer(merges=[("b", "c"), ("a", "bc")], more=["bc", "abc"])
    with pytest.raises(ValueError, match="should have the same length"):
        make([text("1ab", "c", "d")], processing_class=own)


def test_a_text_prompt_is_ignored_if_the_answers_repeat_the_question(make):
    trainer = make([repeated("something else")])
    assert trainer.train_dataset[0]["prompt"] == "<|user|>1+2<|end|><|assistant|>"
    assert trainer.train_dataset[0]["chosen"] == "chosen<|end|>"


def test_a_text_prompt_fails_if_the_answers_do_not_repeat_the_question(make):
    row = repeated("1+2")
    with pytest.raises(IndexError):
        make([{**row, "chosen": row["chosen"][1:], "rejected": row["rejected"][1:]}])


@pytest.mark.parametrize("column", ["messages", "label"])
def test_a_column_of_another_kind_of_data_stops_the_constructor(make, column):
    more = {"messages": ROWS[0]["prompt"], "label": True}[column]
    with pytest.raises(KeyError, match="Invalid keys"):
        make([{**row, column: more} for row in ROWS])


def test_tools_are_not_rendered(make, checkpoint, tmp_path):
    own = tokenizer("{% if tools %}{{ tools | length }} tools{% endif %}" + TEMPLATE)
    rows = [{**row, "tools": json.dumps([{"name": "add"}])} for row in ROWS]
    assert words(make(rows, processing_class=own), "prompt_input_ids")[0] == "<|user|>"
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    dpo = DPOTrainer(checkpoint, args=args, train_dataset=Dataset.from_list(rows), processing_class=own)
    assert own.decode(dpo.train_dataset[0]["prompt_ids"]).startswith("1 tools")


def test_the_prompt_is_cut_to_what_the_rendered_answers_share(make):
    in_header = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>think{% endif %}")
    trainer = make(processing_class=tokenizer(in_header))
    assert trainer.train_dataset[0]["prompt"].endswith("<|assistant|>")
    assert trainer.train_dataset[0]["chosen"] == "1+2=3 #3<|end|>"
    in_answer = TEMPLATE.replace("{{ m.content }}", "{% if m.role == 'assistant' %}think {% endif %}{{ m.content }}")
    trainer = make(processing_class=tokenizer(in_answer))
    assert trainer.train_dataset[0]["chosen"] == "think 1+2=3 #3<|end|>"


def test_a_prompt_that_ends_in_a_system_message_is_an_error(make):
    with pytest.raises(ValueError, match="Invalid role"):
        make([{**row, "prompt": [{"role": "system", "content": "1"}]} for row in ROWS])


def test_a_prompt_that_ends_with_the_assistant_is_left_open(make):
    prompt = [*ROWS[0]["prompt"], {"role": "assistant", "content": "well"}]
    trainer = make([{**ROWS[0], "prompt": prompt}])
    assert trainer.train_dataset[0]["prompt"].endswith("<|assistant|>well")


def test_a_column_named_like_a_tensor_stops_the_run(make):
    with pytest.raises(UnboundLocalError):
        make([{**row, "chosen_logps": -1.0} for row in ROWS]).train()
    with pytest.raises(TypeError):
        make([{**row, "my_labels": "good"} for row in ROWS]).train()
    make([{**row, "score_chosen": 1.0, "chosen_score": 1.0} for row in ROWS], max_steps=1).train()


def test_all_columns_stay(trainer):
    assert len(trainer.train_dataset.column_names) == 11
    assert batch_of(trainer, range(2))["chosen"] == trainer.train_dataset[:2]["chosen"]


def test_prompts_are_padded_on_the_left_and_sequences_on_the_right(trainer):
    batch, pad = batch_of(trainer, range(2)), trainer.pad_token_id
    assert batch["prompt_input_ids"][0, 0] == pad
    assert batch["chosen_input_ids"][0, -1] == pad
    assert batch["chosen_labels"][0, -1] == -100


def test_max_completion_length_does_nothing_here(make, trainer, caplog):
    other = make(max_completion_length=1)
    assert other.train_dataset["chosen_labels"] == trainer.train_dataset["chosen_labels"]
    assert "max_completion_length" not in caplog.text


def test_no_max_length_is_512(make):
    assert make(max_length=None).max_length == 512


def test_a_stream_is_refused(make):
    with pytest.raises(TypeError, match="num_proc"):
        make(Dataset.from_list(ROWS).to_iterable_dataset())


def test_a_dictionary_of_evaluation_sets_is_refused_and_a_datasetdict_is_not(make):
    sets = {"a": Dataset.from_list(ROWS)}
    with pytest.raises(AttributeError, match="map"):
        make(eval_dataset=sets)
    assert len(make(eval_dataset=DatasetDict(sets)).eval_dataset["a"]) == 4


def test_new_data_cannot_be_evaluated(trainer):
    with pytest.raises(KeyError, match="chosen_input_ids"):
        trainer.evaluate(Dataset.from_list(ROWS))


# ------------------------------------------------------------------------------------------------------- the model


def test_a_model_by_name_keeps_the_precision_of_its_files(make, checkpoint, tmp_path):
    half = save(Qwen3ForCausalLM.from_pretrained(checkpoint).to(torch.bfloat16), tmp_path / "half")
    assert make(model=half).model.dtype == torch.bfloat16
    assert make(model=half, model_init_kwargs={"dtype": "float32"}).model.dtype == torch.float32
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    dpo = DPOTrainer(half, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer())
    assert dpo.model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_default_learning_rate_is_lost_on_bfloat16_weights(make, checkpoint, dtype):
    model = Qwen3ForCausalLM.from_pretrained(checkpoint).to(dtype)
    before = {name: weight.clone() for name, weight in model.named_parameters() if "layers" in name}
    trainer = make(model=model, learning_rate=1e-6, bf16=True, max_steps=3)
    trainer.train()
    weights = dict(trainer.model.named_parameters())
    moved = sum(int((weights[name] != old).sum()) for name, old in before.items())
    share = moved / sum(old.numel() for old in before.values())
    assert share < 0.05 if dtype == torch.bfloat16 else share > 0.95


def test_bfloat16_numbers_of_that_size_lie_as_far_apart_as_the_page_says():
    for number in (1 / 64, 0.02, 0.03):
        weight = torch.tensor(number, dtype=torch.bfloat16)
        assert (weight.float() + 2**-13).to(torch.bfloat16) - weight == 2**-13
        assert (weight.float() + 2**-15).to(torch.bfloat16) == weight
    assert "neighbouring bfloat16 numbers are 0.0001 apart" in prose(PAGE)
    assert f"{2**-13:.4f}" == "0.0001"


def test_model_init_kwargs_bring_an_automatic_device_map(make):
    trainer = make(model_init_kwargs={"dtype": "float32"})
    assert trainer.args.model_init_kwargs["device_map"] == "auto"
    assert trainer.args.model_init_kwargs["dtype"] is torch.float32
    assert not make().args.model_init_kwargs


def test_the_seed_does_not_reach_a_new_adapter(make):
    def start():
        trainer = make(peft_config=LoraConfig(task_type="CAUSAL_LM"))
        return next(weight for name, weight in trainer.model.named_parameters() if "lora_A" in name)

    assert not torch.equal(start(), start())
    torch.manual_seed(1)
    one = start()
    torch.manual_seed(1)
    assert torch.equal(one, start())


def test_lora_dropout_is_switched_off_and_attention_dropout_is_not(make, checkpoint):
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, attention_dropout=0.4)
    trainer = make(model=model, peft_config=LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.3))
    rates = [module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates
    assert not any(rates)
    kept = [module.attention_dropout for module in trainer.model.modules() if hasattr(module, "attention_dropout")]
    assert set(kept) == {0.4}


def test_a_trained_adapter_goes_on_without_a_peft_config(make, checkpoint):
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM")
    model = get_peft_model(Qwen3ForCausalLM.from_pretrained(checkpoint), lora)
    assert set(make(model=model).model.peft_config) == {"default"}
    with pytest.raises(ValueError, match="PeftModel"):
        make(model=model, peft_config=lora)


def test_a_missing_pad_token_is_replaced_too_late(make):
    own = tokenizer(pad=None)
    trainer = make(processing_class=own)
    assert own.pad_token == "<|end|>"
    with pytest.raises(ValueError, match="padding token"):
        trainer.train()


def test_a_pad_token_equal_to_eos_does_no_harm(make):
    one, two = make(), make(processing_class=tokenizer(pad="<|end|>"))
    assert measured(one, batch_of(one, range(2)))[0] == pytest.approx(measured(two, batch_of(two, range(2)))[0])
    assert words(two, "chosen_labels")[-1] == "<|end|>"


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("disable_dropout", [True, False])
def test_model_init_does_not_work(make, checkpoint, checkpointing, disable_dropout):
    own = {"model_init": lambda: Qwen3ForCausalLM.from_pretrained(checkpoint), "is_encoder_decoder": False}
    with pytest.raises(AttributeError, match="NoneType"):
        make(disable_dropout=disable_dropout, **{CHECKPOINTING: checkpointing}, **own)


def test_a_trainer_without_args_fails(checkpoint):
    with pytest.raises(AttributeError, match="NoneType"):
        CPOTrainer(checkpoint, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer())


def test_a_misspelt_loss_type_is_found_at_the_first_step(make):
    trainer = make(loss_type="simPO")
    with pytest.raises(ValueError, match="Unknown loss type"):
        trainer.train()
    with pytest.raises(SystemExit):
        TrlParser(CPOConfig).parse_args_and_config(["--output_dir", "x", "--loss_type", "simPO"])
    with pytest.raises(ValueError, match="kto_pair"):
        make(loss_type="kto_pair")


# ---------------------------------------------------------------------------- generation, encoder-decoder models


@pytest.fixture
def generated(make, monkeypatch):
    """Evaluates with `generate_during_eval`, and returns the table that wandb would get, and what was sampled."""

    def run(**more):
        tables, sampled = [], []
        table = SimpleNamespace(log=lambda logs: tables.append(logs["game_log"]), Table=lambda data: data)
        monkeypatch.setattr(cpo_trainer, "is_wandb_available", lambda: True)
        monkeypatch.setattr(cpo_trainer, "wandb", table, raising=False)
        trainer = make(generate_during_eval=True, eval_dataset=Dataset.from_list(ROWS), max_length=60, **more)
        trainer.args.report_to = ["wandb"]
        sample = trainer.generate_from_model
        trainer.generate_from_model = lambda *args: sampled.extend(sample(*args)) or sampled
        trainer.evaluate()
        return tables[0].to_dict("records"), sampled

    return run


def test_generated_answers_are_shown_without_their_beginning(generated):
    torch.manual_seed(0)
    rows, sampled = generated()
    for row, whole in zip(rows, sampled, strict=True):
        question = re.search(r"<\|user\|>(.*)<\|end\|>", row["Prompt"])[1]
        assert whole.startswith(question)
        assert row["Policy"] == whole[len(row["Prompt"]) :]
        assert len(row["Prompt"]) - len(question) == len("<|user|><|end|><|assistant|>")
        assert row["Policy"] != whole[len(question) :]


def test_generation_needs_as_many_rows_as_a_batch(generated):
    with pytest.raises(ValueError, match="larger than population"):
        generated(per_device_eval_batch_size=8)


def test_generation_needs_a_place_to_send_it_to(make, monkeypatch):
    for name in ("is_wandb_available", "is_comet_available"):
        monkeypatch.setattr(cpo_trainer, name, lambda: False)
    with pytest.raises(ValueError, match="generate_during_eval"):
        make(generate_during_eval=True)


def test_a_tiny_t5_trains(make):
    trainer = make(model=t5())
    assert trainer.is_encoder_decoder
    assert len(trained(trainer)) == 2
    shifted = trainer._shift_right(torch.tensor([[5, 6, -100]]))
    assert shifted.tolist() == [[0, 5, 6]]
    assert trainer._shift_right(torch.tensor([[5, -100, -100]])).tolist() == [[0, 5, 0]]


def test_only_an_encoder_decoder_model_reads_max_completion_length(make):
    assert counts(make(model=t5(), max_completion_length=2)) == (2, 2)
    assert make(model=t5()).max_completion_length == 128


def test_a_t5_is_refused_by_name(make, tmp_path):
    t5().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        make(model=str(tmp_path))


# ------------------------------------------------------------------------------------------------------- the neighbours


def test_dpo_on_the_page_is_the_one_of_the_page_about_dpo(page):
    theirs = functions_of(PAGES / "dpo.md", "dpo_loss")
    numbers = torch.tensor([[-3.0, -9.0], [-5.0, -2.0], [-4.0, -4.0], [-1.0, -6.0]])
    assert float(page["dpo_loss"](*numbers, beta=0.3)) == pytest.approx(float(theirs["dpo_loss"](*numbers, beta=0.3)))


def test_orpo_on_the_page_is_what_trl_computes(page):
    from trl.experimental.orpo import ORPOTrainer

    this = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device=torch.device("cpu")))
    chosen, rejected = torch.tensor([-0.5, -2.0]), torch.tensor([-1.5, -0.2])
    theirs = -ORPOTrainer.odds_ratio_loss(this, chosen, rejected)[0].mean()
    assert float(page["orpo_loss"](chosen, rejected, 0.0, beta=0.3)) == pytest.approx(float(theirs))


def test_the_supervised_term_of_orpo_covers_the_prompt(make, checkpoint, tmp_path):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = [text("1+2", "3", "4"), text("7+1", "8", "9")]
    args = ORPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    own = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer()}
    orpo, cpo = ORPOTrainer(checkpoint, args=args, **own), make(rows)
    terms = []
    for trainer, covered in ((orpo, 4), (cpo, 2)):  # of five tokens the first is not predicted; two are the answer's
        batch = batch_of(trainer, range(2))
        trainer.model.eval()
        with torch.no_grad():
            terms.append(float(trainer.concatenated_forward(trainer.model, batch)[4]))
            logits = trainer.model(batch["chosen_input_ids"]).logits[:, :-1]
        logps = torch.log_softmax(logits, -1).gather(-1, batch["chosen_input_ids"][:, 1:, None])[..., 0]
        assert logps.shape == (2, 4)
        assert terms[-1] == pytest.approx(-float(logps[:, -covered:].mean()), rel=1e-5)


def test_length_counts_for_cpo_and_not_for_its_neighbours(page):
    shares = page["shares"]
    assert shares["CPO"] == [pytest.approx(1 / (1 + math.exp(-z)), rel=1e-4) for z in (0, 3, -3)]
    for name in ("DPO", "SimPO", "ORPO"):
        assert len({round(value, 5) for value in shares[name]}) == 1


# ------------------------------------------------------------------------------------------------------- the page itself


def test_the_toy_run_has_the_settings_that_the_page_names():
    script = (EXAMPLES / "cpo.py").read_text("utf-8")
    toy = script[script.index("TOY = {") : script.index("REAL = {")]
    assert '"cpo_alpha": 30.0' in toy
    assert '"beta"' not in toy
    rows = datasets.load_dataset(str(EXAMPLES / "toy/data/preference"), split="train")
    tokens = [len(row["chosen"][0]["content"]) + 1 for row in rows]  # one token per character, and the end
    assert sum(tokens) / len(tokens) == pytest.approx(33, abs=0.5)
    assert "its answers have 33 tokens on average and `cpo_alpha` is 30" in prose(PAGE)


def test_every_test_that_the_page_names_exists():
    named = named_tests(PAGE)
    assert named
    assert named <= set(globals())


def test_the_arguments_that_the_page_calls_gone_are_gone():
    section_text = section("Older code and tutorials")
    here = arguments_of(CPOTrainer, CPOConfig)
    for name in ("max_prompt_length", "truncation_mode", "padding_value", "label_pad_token_id"):
        assert f"`{name}`" in section_text
        assert name not in here
    assert "processing_class" in here
    assert "tokenizer" not in here


def test_the_defaults_that_the_page_quotes_are_those_of_the_config(tmp_path):
    quoted, true = defaults_on(PAGE, CPOConfig(output_dir=str(tmp_path), use_cpu=True))
    assert len(quoted) >= 6
    assert quoted == true
