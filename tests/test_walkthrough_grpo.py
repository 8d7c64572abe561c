"""The claims of annotated_trainers/grpo.md that running TRL can show, on a random model of two layers, on the CPU.

Formulas get random logits: the forward pass of the model is replaced, the rest is the real `_compute_loss` of a real
`GRPOTrainer`. Loss and gradient must agree to 1e-5 (relative, float32). `pytest -s` prints the largest error.
"""

import functools
import inspect
import itertools
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import pytest
import torch
import walkthrough_tools
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer
from trl.trainer.utils import RepeatSampler
from walkthrough_tools import (
    ANSWERS,
    CLIP_RATIOS,
    CUT,
    END,
    PAD,
    PAGES,
    built,
    changed,
    checked_formulas,
    comparisons_of_norms,
    ended,
    experts,
    first_cells,
    model_folder,
    page_of,
    random_batch,
    samples,
    save,
    scored,
    section_of,
    trained,
    trl_loss,
    types_of_products,
)
from walkthrough_tools import SUMS as ROWS

PAGE = PAGES / "grpo.md"
section = functools.partial(section_of, PAGE)
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")


def config(**more) -> dict:
    return walkthrough_tools.config(**{"pad_token_id": PAD} | more)


checkpoint = model_folder(pad_token_id=PAD)


@pytest.fixture
def build(checkpoint, tmp_path):
    return functools.partial(built, checkpoint, tmp_path)


@pytest.fixture(scope="module")
def shared(checkpoint, tmp_path_factory):
    """One trainer for all tests that only call its methods; `fresh` puts its settings back."""
    return built(checkpoint, tmp_path_factory.mktemp("shared"))


@pytest.fixture
def fresh(shared):
    saved, args = dict(vars(shared)), dict(vars(shared.args))
    yield shared
    shared.model.__dict__.pop("forward", None)
    vars(shared).clear()
    vars(shared).update(saved)
    vars(shared.args).update(args)


page = page_of(PAGE)


# ---------------------------------------------------------------------------------------- the formulas, against TRL


CALLED, CHECKED, checks = checked_formulas()
ERRORS, agree, summary = comparisons_of_norms()


@pytest.fixture
def formula(page):
    """A function of the page by its name; calling it is noted."""

    def named(name):
        def noted(*args, **kwargs):
            CALLED.add(name)
            return page[name](*args, **kwargs)

        return noted

    return named


def our_loss(formula, trainer, batch, logits, steps=(1, 1, 1)) -> torch.Tensor:
    """The loss from the functions of the page, with the settings of a trainer."""
    args, mask, advantages = trainer.args, batch["completion_mask"], batch["advantages"]
    log_probs = torch.log_softmax(logits[:, :-1] / trainer.temperature, -1)
    logps = log_probs.gather(-1, batch["completion_ids"][..., None])[..., 0]
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    old_logps = batch.get("old_per_token_logps", logps.detach())
    ratio = formula(f"{trainer.importance_sampling_level}_ratio")(logps, old_logps, mask)
    if trainer.loss_type == "cispo":
        term = formula("cispo_term")(logps, ratio, advantages, trainer.epsilon_high)
    elif trainer.loss_type == "sapo":
        term = formula("sapo_term")(logps, ratio, advantages, args.sapo_temperature_pos, args.sapo_temperature_neg)
    elif trainer.loss_type == "vespo":
        weight = formula("vespo_weight")(logps, old_logps, advantages, mask)
        term = formula("vespo_term")(logps, weight, advantages)
    else:
        term = formula("clipped_term")(logps, ratio, advantages, trainer.epsilon_low, trainer.epsilon_high, args.delta)
    seen = mask
    if trainer.off_policy_mask_threshold is not None:
        threshold = trainer.off_policy_mask_threshold
        term = term * formula("off_policy_mask")(logps, old_logps, advantages, mask, threshold)
    if trainer.top_entropy_quantile < 1:
        seen = formula("entropy_mask")(entropies.detach(), mask, trainer.top_entropy_quantile)
        term = term * seen
    if trainer.use_vllm and trainer.loss_type != "vespo":
        term = term * batch["importance_sampling_ratio"]
    if trainer.beta:
        kl = formula("k3_kl")(logps, batch["ref_per_token_logps"])
        if args.use_bias_correction_kl:
            kl = formula("corrected_kl")(ratio, logps, batch["ref_per_token_logps"])
        term = term + trainer.beta * kl
    per_generation, accumulation, devices = steps
    if trainer.loss_type in ("dapo", "cispo", "vespo"):
        tokens = batch["num_items_in_batch"]
        loss = formula("dapo_mean")(term, mask, tokens, per_generation, accumulation, devices)
    elif trainer.loss_type == "dr_grpo":
        loss = formula("dr_grpo_mean")(term, mask, trainer.max_completion_length) / accumulation
    else:
        name = {"grpo": "grpo", "sapo": "grpo", "bnpo": "bnpo", "luspo": "luspo"}[trainer.loss_type]
        loss = formula(f"{name}_mean")(term.expand(mask.shape), mask) / accumulation
    if trainer._entropy_bonus_enabled:
        loss = formula("entropy_bonus")(loss, entropies, seen, trainer.entropy_coef, accumulation)
    return loss


def compare(formula, trainer, batch, logits, what, training=False, steps=(1, 1, 1)) -> None:
    """Loss and gradient in the logits, TRL's and ours."""
    results = []
    for loss in (trl_loss(trainer, batch, logits, training), our_loss(formula, trainer, batch, logits, steps)):
        (slope,) = torch.autograd.grad(loss, logits)
        results.append((loss.detach(), slope))
    (theirs, their_slope), (ours, our_slope) = results
    agree(ours, theirs, f"loss, {what}")
    agree(our_slope, their_slope, f"gradient, {what}")


OPTIONS = {
    "plain": {},
    "reference": {"beta": 0.3},
    "reference without correction": {"beta": 0.3, "use_bias_correction_kl": False},
    "clip": {"epsilon_low": 0.1, "epsilon_high": 0.4, "delta": 1.2},
    "off-policy": {"off_policy_mask_threshold": 0.01},
    "entropy mask": {"top_entropy_quantile": 0.4, "beta": 0.3},
    "entropy bonus": {"entropy_coef": 0.05, "_entropy_bonus_enabled": True, "top_entropy_quantile": 0.4},
    "temperature": {"temperature": 0.7},
    "vllm": {"use_vllm": True},
}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_equals_trl_with_every_option(fresh, formula, loss_type, level):
    for (name, option), seed in itertools.product(OPTIONS.items(), (0, 1, 2)):
        fresh.loss_type, fresh.importance_sampling_level = loss_type, level
        defaults = {key: value for other in OPTIONS.values() for key, value in other.items() if key not in option}
        for key in defaults:
            setattr(fresh, key, {"epsilon_low": 0.2, "epsilon_high": 0.2, "temperature": 1.0}.get(key))
        fresh.beta, fresh.use_vllm, fresh._entropy_bonus_enabled = 0.0, False, False
        fresh.top_entropy_quantile, fresh.entropy_coef = 1.0, 0.0
        fresh.args.use_bias_correction_kl, fresh.args.delta = True, None
        for key, value in option.items():
            setattr(fresh.args if key in ("delta", "use_bias_correction_kl") else fresh, key, value)
        batch, logits = random_batch(seed)
        if fresh.use_vllm:
            batch["importance_sampling_ratio"] = torch.rand(6, 9, generator=torch.Generator().manual_seed(seed)) + 0.5
            if loss_type == "vespo":
                del batch["importance_sampling_ratio"]
        compare(formula, fresh, batch, logits, f"{loss_type}, {level}, {name}, seed {seed}")


@checks("token-ratio", "sequence-ratio", "clipped-term", "cispo-term", "sapo-term", "vespo-weight", "vespo-term",
        "grpo-mean", "bnpo-mean", "dr-grpo-mean", "dapo-mean", "luspo-mean")  # fmt: skip
def test_terms_and_means_equal_trl_in_training(fresh, formula):
    """In training the loss is also shared out over accumulation steps, and over steps of a round."""
    fresh.current_gradient_accumulation_steps, fresh.args.steps_per_generation = 3, 6
    for fresh.loss_type, fresh.importance_sampling_level in itertools.product(LOSS_TYPES, ("token", "sequence")):
        batch, logits = random_batch(4, drift=0.1)  # a sum over tokens in the exponent of vespo magnifies rounding
        compare(formula, fresh, batch, logits, fresh.loss_type, training=True, steps=(6, 3, 1))


@checks("k3-kl", "corrected-kl", "entropy-mask", "off-policy-mask", "entropy-bonus")
def test_parts_of_the_loss_equal_trl(fresh, formula):
    fresh.beta, fresh.top_entropy_quantile, fresh.off_policy_mask_threshold = 0.3, 0.4, 0.01
    fresh.entropy_coef, fresh._entropy_bonus_enabled = 0.05, True
    batch, logits = random_batch(5)
    compare(formula, fresh, batch, logits, "all parts together")
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    theirs = fresh.get_off_policy_mask(
        batch["advantages"][:, None], logps, batch["old_per_token_logps"], batch["completion_mask"], 0.01
    )
    dropped = int((theirs == 0).sum())
    assert 0 < dropped < len(theirs)  # the comparison above saw both kinds


@checks("grpo-loss", "group-advantage", "first-loss")
def test_the_key_equation_equals_trl(fresh, formula):
    """The same as above, from the two functions at the top of the page alone."""
    fresh.loss_type, fresh.beta, fresh.args.use_bias_correction_kl = "grpo", 0.3, False
    batch, logits = random_batch(6)
    batch["advantages"] = formula("group_advantage")(torch.randn(6), group_size=3)
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    kl = (batch["ref_per_token_logps"] - logps).exp() - (batch["ref_per_token_logps"] - logps) - 1
    ours = formula("grpo_loss")(
        logps, batch["old_per_token_logps"], batch["advantages"], batch["completion_mask"], kl, beta=0.3
    )
    theirs = trl_loss(fresh, batch, logits)
    agree(ours.detach(), theirs.detach(), "grpo_loss")
    agree(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)), "gradient of grpo_loss")

    fresh.loss_type, fresh.beta = "dapo", 0.0
    del batch["old_per_token_logps"]
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    ours = formula("first_loss")(batch["advantages"], batch["completion_mask"].sum(1))
    agree(ours, trl_loss(fresh, batch, logits).detach(), "first_loss")


@checks("group-advantage", "unscaled-advantage", "batch-advantage", "normalize-then-sum")
def test_advantages_equal_trl(fresh, formula):
    samples(fresh, ANSWERS)
    generator = torch.Generator().manual_seed(7)
    rewards, weights = torch.randn(12, 2, generator=generator), torch.tensor([0.3, 2.0])
    fresh.reward_funcs = [lambda column=k, **_: rewards[:, column].tolist() for k in range(2)]
    fresh.reward_func_names, fresh.reward_processing_classes = ["a", "b"], [None, None]
    fresh.reward_weights = weights
    total = rewards @ weights
    for fresh.scale_rewards, name in (
        ("group", "group_advantage"),
        ("none", "unscaled_advantage"),
        ("batch", "batch_advantage"),
    ):
        agree(formula(name)(total, 4), scored(fresh, rows=3)["advantages"], name)
    fresh.multi_objective_aggregation = "normalize_then_sum"
    agree(formula("normalize_then_sum")(rewards, weights, 4), scored(fresh, rows=3)["advantages"], "normalize_then_sum")


@checks("vllm-weight")
@pytest.mark.parametrize("mode", ["sequence_mask", "sequence_truncate", "token_mask", "token_truncate"])
def test_the_weight_for_vllm_equals_trl(fresh, formula, mode):
    fresh.use_vllm, fresh.vllm_importance_sampling_mode = True, mode
    fresh.vllm_importance_sampling_clip_min, fresh.vllm_importance_sampling_clip_max = 0.7, 1.4
    noise = torch.Generator().manual_seed(8)
    samples(fresh, ANSWERS, [(torch.randn(len(ids), generator=noise) * 0.4 - 3.7).tolist() for ids in ANSWERS])
    batch = scored(fresh)
    theirs = batch["importance_sampling_ratio"]
    ours = formula("vllm_weight")(
        batch["old_per_token_logps"], batch["sampling_per_token_logps"], batch["completion_mask"], mode, 0.7, 1.4
    )
    agree(ours, theirs, mode)
    assert theirs.unique().numel() > 1


def test_the_weight_for_vllm_is_inside_vespo(fresh, formula):
    """The only loss type that takes the correction into its own weight."""
    fresh.loss_type, fresh.use_vllm = "vespo", True
    batch, logits = random_batch(9)
    plain = trl_loss(fresh, batch, logits).detach()
    batch["importance_sampling_ratio"] = torch.where(batch["completion_mask"].bool(), 1.1, 1.0)
    weighted = trl_loss(fresh, batch, logits).detach()
    assert float(weighted) != pytest.approx(float(plain), rel=1e-3)
    batch["old_per_token_logps"] = batch["old_per_token_logps"] - math.log(1.1)
    del batch["importance_sampling_ratio"]
    assert float(trl_loss(fresh, batch, logits).detach()) == pytest.approx(float(weighted), rel=1e-4)


def test_every_formula_of_the_page_has_a_block_and_a_comparison(page):
    text = PAGE.read_text("utf-8")
    names = re.findall(r"^<!-- formula: ([a-z0-9-]+) -->$", text, re.M)
    assert len(names) == text.count("```math") == len(set(names)) >= 20
    for name in names:
        block = re.search(rf"<!-- formula: {name} -->.*?```python\n(.*?)```", text, re.S)[1]
        assert f"def {name.replace('-', '_')}(" in block, name
    assert set(names) == set(CHECKED)


def test_the_table_of_loss_types_names_all_of_trl_with_their_parts():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    compared = set(re.findall(r'"(\w+)"', " ".join(re.findall(r"self\.loss_type (?:==|in) (.*?):", source))))
    table = {cells[0].split("`")[1]: cells[1:] for cells in first_cells(section("The loss: five means"))[1:]}
    assert compared == set(LOSS_TYPES) == set(table)
    terms = {"sapo": "sigmoid", "cispo": "REINFORCE, clamped ratio", "vespo": "REINFORCE, a weight for each answer"}
    assert {name: cells[0] for name, cells in table.items()} == {n: terms.get(n, "clipped") for n in LOSS_TYPES}


def test_the_first_loss_of_each_type_is_what_the_table_says(fresh):
    table = {cells[0].split("`")[1]: cells[4] for cells in first_cells(section("The loss: five means"))[1:]}
    for equal, loss_type in itertools.product((True, False), LOSS_TYPES):
        batch, logits = random_batch(3)
        del batch["old_per_token_logps"]
        if equal:
            batch["completion_mask"] = torch.ones_like(batch["completion_mask"])
        batch["advantages"] = batch["advantages"] - batch["advantages"].mean()
        batch["num_items_in_batch"], fresh.loss_type = batch["completion_mask"].sum(), loss_type
        loss = abs(float(trl_loss(fresh, batch, logits).detach()))
        assert (loss < 1e-5) == (table[loss_type] == "0" or (equal and table[loss_type].startswith("about 0"))), (
            loss_type
        )


# ----------------------------------------------------------------------------------------- numbers that look wrong


def test_the_first_loss_is_zero_per_answer_and_a_fact_about_lengths_per_token(build, page):
    for loss_type in ("grpo", "dapo"):
        trainer = build(answers=ANSWERS, loss_type=loss_type)
        line = trained(trainer)[0]
        advantages = torch.tensor(list(trainer._logs["advantages"]))
        expected = page["first_loss"](advantages, torch.tensor([float(len(ids)) for ids in ANSWERS]))
        assert line["loss"] == pytest.approx(0.0 if loss_type == "grpo" else float(expected), abs=1e-6)
        assert abs(float(expected)) > 0.01
        assert line["grad_norm"] > 0.1


def test_with_a_reference_the_loss_is_beta_times_the_distance(build, checkpoint):
    same_length = [ids[:3] for ids in ANSWERS]
    trainer = build(answers=same_length, beta=0.5, model=changed(Qwen3ForCausalLM.from_pretrained(checkpoint)))
    line = trained(trainer)[0]
    assert line["kl"] > 0.01
    assert line["loss"] == pytest.approx(0.5 * line["kl"], rel=1e-4)


def test_clip_ratios_are_zero_while_answers_are_used_once(build):
    once = trained(build(answers=ANSWERS, max_steps=2))[1]
    assert {once[key] for key in CLIP_RATIOS} == {0.0}
    twice = trained(build(answers=ANSWERS, max_steps=2, num_iterations=2, learning_rate=0.1))[1]
    assert twice["clip_ratio/region_mean"] > 0


def test_a_group_without_variance_has_no_gradient(build):
    line = trained(build(answers=ANSWERS, reward=lambda completions, **_: [1.0] * len(completions)))[0]
    assert (line["loss"], line["grad_norm"], line["frac_reward_zero_std"]) == (0.0, 0.0, 1.0)


def test_reward_std_is_that_of_the_whole_round(build):
    def by_prompt(prompts, **_):
        return [float(ord(prompt[0]["content"][-1])) for prompt in prompts]

    line = trained(build(answers=ANSWERS, reward=by_prompt, per_device_train_batch_size=8))[0]
    assert line["reward_std"] > 0.4
    assert line["frac_reward_zero_std"] == 1.0
    assert line["grad_norm"] == 0.0


def test_fewer_prompts_than_a_round_end_training_at_step_0(build):
    trainer = build(rows=ROWS[:1], per_device_train_batch_size=8)
    trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("disable_dropout", [False, True])
def test_attention_dropout_shows_in_kl_at_step_1(build, tmp_path, disable_dropout):
    torch.manual_seed(0)
    noisy = save(Qwen3ForCausalLM(Qwen3Config(**config(attention_dropout=0.5))), tmp_path / "noisy")
    assert trained(build(model=noisy, answers=ANSWERS, beta=0.1, disable_dropout=disable_dropout))[0]["kl"] > 1e-5


def test_equal_rewards_can_have_an_advantage(build):
    def step(reward):
        trainer = build(
            answers=ANSWERS,
            reward=lambda completions, **_: [reward] * len(completions),
            per_device_train_batch_size=8,
            num_generations=8,
        )
        return trained(trainer)[0], list(trainer._logs["advantages"])

    line, advantages = step(1000.1)
    assert advantages == [pytest.approx(-0.37, abs=0.005)] * 8
    assert line["grad_norm"] > 0.01
    assert line["frac_reward_zero_std"] == 0.0
    assert abs(step(10.1)[1][0]) == pytest.approx(0.009, abs=0.001)
    assert step(1.0)[1] == [0.0] * 8


@pytest.mark.parametrize(("loss_type", "factor"), [("dapo", 4), ("cispo", 4), ("vespo", 4), ("grpo", 1), ("bnpo", 1)])
def test_policy_loss_of_dapo_is_too_small_by_the_accumulation(build, checkpoint, loss_type, factor):
    trainer = build(
        answers=ANSWERS,
        model=changed(Qwen3ForCausalLM.from_pretrained(checkpoint)),
        loss_type=loss_type,
        beta=0.5,
        entropy_coef=1e-9,  # switches the metric on and changes nothing
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    line = trained(trainer)[0]
    assert abs(line["loss"]) > 1e-3
    assert line["loss"] == pytest.approx(factor * line["policy_loss"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ steps and groups


def test_the_plan_on_the_page_is_what_a_run_does(build, page):
    for answers, accumulation, per_generation, iterations, group in page["ROWS"]:
        trainer = build(
            per_device_train_batch_size=answers,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=per_generation,
            num_iterations=iterations,
            num_generations=group,
            max_steps=4,
            num_train_epochs=9,
        )
        rounds, old, compute = samples(trainer, ANSWERS), [], trainer._compute_loss

        def watched(model, inputs, old=old, compute=compute):
            old.append("old_per_token_logps" in inputs)
            return compute(model, inputs)

        trainer._compute_loss = watched
        trainer.train()
        plan = page["plan"](answers, accumulation, per_generation, iterations, group)
        sampled, prompts, steps, per_step, old_logps = plan
        assert set(rounds) == {sampled} == {trainer.args.generation_batch_size}
        assert len(rounds) == math.ceil(4 / steps)
        assert prompts * group == sampled
        assert len(old) * answers == 4 * per_step
        assert set(old) == {old_logps == "yes"}


def test_sampling_follows_accumulation_unless_told(build):
    assert build(gradient_accumulation_steps=8).args.steps_per_generation == 8
    assert build(gradient_accumulation_steps=8, generation_batch_size=16).args.steps_per_generation == 4


def test_iterations_inside_one_step_repeat_the_first(build):
    def weights(**more):
        trainer = build(answers=ANSWERS, steps_per_generation=1, **more)
        trained(trainer)
        return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])

    once, twice = weights(), weights(num_iterations=2, gradient_accumulation_steps=2)
    assert torch.allclose(once, twice, atol=1e-6)


def test_a_group_may_be_spread_over_passes(build):
    trainer = build(answers=ANSWERS, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_generations=8)
    trained(trainer)
    advantages = torch.tensor(list(trainer._logs["advantages"]))
    assert len(advantages) == 8
    assert float(advantages.sum()) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match=r"generation_batch_size \(6\) must be divisible by num_generations"):
        build(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match="at least 2 generations"):
        build(num_generations=1)


def test_answers_are_padded_to_the_longest_of_the_round(build):
    trainer = build(answers=[*ANSWERS[:3], [5] * 8], per_device_train_batch_size=1, gradient_accumulation_steps=4)
    widths, compute = [], trainer._compute_loss

    def watched(model, inputs):
        widths.append((inputs["completion_ids"].shape[1], int(inputs["completion_mask"].sum())))
        return compute(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    assert {width for width, _ in widths} == {8}
    assert min(tokens for _, tokens in widths) == 3


def test_prompts_that_fill_no_round_are_dropped():
    order = list(RepeatSampler(range(5), mini_repeat_count=3, batch_size=2, repeat_count=2, seed=0))
    assert len(set(order)) == 4
    assert order[:6] == order[6:12]
    assert order[:3] == [order[0]] * 3


def test_a_group_without_variance_dilutes_the_others(fresh):
    for loss_type in LOSS_TYPES:
        slopes = []
        for silent in (0, 6):
            batch, logits = random_batch(2, rows=6 + silent)
            batch["completion_mask"] = torch.ones_like(batch["completion_mask"])
            batch["advantages"] = torch.cat([torch.linspace(-1, 1, 6), torch.zeros(silent)])
            batch["num_items_in_batch"], fresh.loss_type = batch["completion_mask"].sum(), loss_type
            del batch["old_per_token_logps"]
            logits = torch.cat([random_batch(2)[1][:6].detach(), logits[6:].detach()]).requires_grad_()
            batch["completion_ids"][:6] = random_batch(2)[0]["completion_ids"]
            (slope,) = torch.autograd.grad(trl_loss(fresh, batch, logits), logits)
            slopes.append(slope[:6])
        assert torch.allclose(slopes[0], 2 * slopes[1], atol=1e-7), loss_type


@pytest.mark.parametrize(("loss_type", "same"), [("bnpo", False), ("grpo", True), ("dr_grpo", True), ("dapo", True)])
def test_the_mean_of_bnpo_depends_on_micro_batches(fresh, loss_type, same):
    batch, logits = random_batch(2)
    batch["num_items_in_batch"], fresh.loss_type = batch["completion_mask"].sum(), loss_type
    fresh.current_gradient_accumulation_steps = fresh.args.steps_per_generation = 1
    together = trl_loss(fresh, batch, logits, training=True)
    fresh.current_gradient_accumulation_steps = fresh.args.steps_per_generation = 6
    apart = 0.0
    for i in range(6):
        row = {key: value if value.ndim == 0 else value[i : i + 1] for key, value in batch.items()}
        apart = apart + trl_loss(fresh, row, logits[i : i + 1], training=True)
    assert (float(apart.detach()) == pytest.approx(float(together.detach()), rel=1e-5)) == same


def test_doubling_the_length_limit_halves_the_gradient_of_dr_grpo(fresh):
    batch, logits = random_batch()
    fresh.loss_type = "dr_grpo"
    before = float(trl_loss(fresh, batch, logits).detach())
    fresh.max_completion_length *= 2
    assert float(trl_loss(fresh, batch, logits).detach()) == pytest.approx(before / 2)


def test_evaluation_sizes_are_checked_only_with_a_strategy(build):
    evaluation = {"eval_dataset": Dataset.from_list(ROWS[:4]), "num_generations_eval": 3}
    with pytest.raises(RuntimeError, match=r"shape '\[-1, 3\]' is invalid"):
        build(answers=ANSWERS, **evaluation).evaluate()
    with pytest.raises(ValueError, match="must be divisible by the number of generations used for evaluation"):
        build(eval_strategy="steps", **evaluation)


# ------------------------------------------------------------------------------------------------------ cut answers


@pytest.mark.parametrize("masked", [False, True])
def test_a_masked_answer_still_lowers_the_mean(build, masked):
    trainer = build(answers=CUT, reward=ended, mask_truncated_completions=masked)
    batch = scored(trainer)
    assert batch["advantages"].tolist() == [pytest.approx(x, abs=0.01) for x in (0.87, 0.87, -0.87, -0.87)]
    assert batch["completion_mask"].sum(1).tolist() == ([3, 3, 0, 0] if masked else [3, 3, 8, 8])
    assert int(batch["num_items_in_batch"]) == (6 if masked else 22)


def test_a_round_of_cut_answers_has_no_gradient(build):
    trainer = build(answers=[[token] * 8 for token in (5, 6, 7, 8)], mask_truncated_completions=True)
    line = trained(trainer)[0]
    assert (line["loss"], line["grad_norm"], line["completions/clipped_ratio"]) == (0.0, 0.0, 1.0)
    assert line["completions/mean_terminated_length"] == 0.0


def insists(model, tokens: list[int]):
    """Makes a model prefer one token, another one in each row."""
    forward = model.forward

    def biased(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        for row in range(len(outputs.logits)):
            outputs.logits[row, :, tokens[row % len(tokens)]] += 100
        return outputs

    model.forward = biased


def test_only_the_tokenizers_end_token_ends_an_answer(build, checkpoint):
    model = Qwen3ForCausalLM.from_pretrained(checkpoint)
    model.generation_config.eos_token_id = [END, 5]
    trainer = build(model=model)
    insists(trainer.model, [5])
    assert scored(trainer)["completion_ids"].tolist() == [[5] * 8] * 4
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [1.0]


def test_an_end_token_in_generation_kwargs_leaves_padding_in_the_loss(build):
    trainer = build(generation_kwargs={"eos_token_id": [END, 5]})
    insists(trainer.model, [5, 7])
    batch = scored(trainer)
    assert batch["completion_ids"][0].tolist() == [5] + [0] * 7
    assert batch["completion_mask"].sum(1).tolist() == [8] * 4
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [0.5]  # those that did end with 5


def test_max_prompt_length_is_gone(build):
    with pytest.raises(TypeError, match="max_prompt_length"):
        build(max_prompt_length=8)


# ---------------------------------------------------------------------------------------------------------- rewards


def test_none_counts_as_zero_beside_another_reward(build):
    def some(completions, **_):
        return [1.0, None] * (len(completions) // 2)

    def all_five(completions, **_):
        return [5.0] * len(completions)

    assert scored(build(answers=ANSWERS, reward=[some, all_five]))["advantages"][1] < -0.8
    assert scored(build(answers=ANSWERS, reward=some))["advantages"].tolist() == [0.0] * 4


def test_a_nan_is_taken_for_none(build):
    def broken(completions, **_):
        return [float("nan"), 3.0, 1.0, 2.0]

    assert scored(build(answers=ANSWERS, reward=broken))["advantages"].tolist() == [
        pytest.approx(x, abs=0.01) for x in (0.0, 1.0, -1.0, 0.0)
    ]


def test_a_group_with_one_judged_answer_teaches_nothing(build):
    def one(completions, **_):
        return [1.0, None, None, None]

    assert scored(build(answers=ANSWERS, reward=one))["advantages"].tolist() == [0.0] * 4


def test_the_largest_advantage_of_a_group(page):
    for size in (2, 8, 16):
        best = page["group_advantage"](torch.tensor([1.0] + [0.0] * (size - 1)), size).max()
        assert float(best) == pytest.approx((size - 1) / math.sqrt(size), rel=1e-3)


def test_special_tokens_are_removed_from_the_text(build):
    seen = []

    def look(completions, completion_ids, **_):
        seen.append((completions[0][0]["content"], completion_ids[0]))
        return [0.0] * len(completions)

    scored(build(answers=[[14, 2, 15, END]], reward=look))
    text, ids = seen[0]
    assert ids == [14, 2, 15, END]
    assert len(text) == 2


def test_removing_unused_columns_takes_the_truth_away(build):
    def exact(completions, answer, **_):
        return [float(completion[0]["content"] == truth) for completion, truth in zip(completions, answer, strict=True)]

    assert trained(build(answers=ANSWERS, reward=exact))
    with pytest.raises(TypeError, match="answer"):
        trained(build(answers=ANSWERS, reward=exact, remove_unused_columns=True))


def test_a_column_called_completions_is_an_error(build):
    with pytest.raises(TypeError, match="multiple values for keyword argument 'completions'"):
        trained(build(rows=[{**row, "completions": "x"} for row in ROWS], answers=ANSWERS))


def test_two_functions_of_one_name_share_their_metrics(build):
    one, three = (lambda completions, value=value, **_: [value] * len(completions) for value in (1.0, 3.0))
    line = trained(build(answers=ANSWERS, reward=[one, three]))[0]
    assert (line["rewards/<lambda>/mean"], line["reward"]) == (2.0, 4.0)


def test_a_reward_model_by_name_gets_the_policys_settings(build, tmp_path, monkeypatch):
    classifier = save(Qwen3ForSequenceClassification(Qwen3Config(**config(num_labels=1))), tmp_path / "classifier")
    load, seen = AutoModelForSequenceClassification.from_pretrained, []
    monkeypatch.setattr(
        AutoModelForSequenceClassification,
        "from_pretrained",
        lambda name, **kwargs: seen.append(kwargs) or load(name, **kwargs),
    )
    names = [classifier]
    build(reward=names, model_init_kwargs={"revision": "of-the-policy"})
    assert seen[0]["revision"] == "of-the-policy"
    assert isinstance(names[0], Qwen3ForSequenceClassification)  # see the test below


def test_the_list_of_rewards_is_changed_in_place(build, tmp_path):
    classifier = save(Qwen3ForSequenceClassification(Qwen3Config(**config(num_labels=1))), tmp_path / "classifier")
    rewards = [classifier]
    build(reward=rewards)
    assert rewards != [classifier]


def test_a_language_model_as_reward_gets_a_random_head(build, checkpoint):
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(build(reward=[checkpoint]).reward_funcs[0].score.weight)
    assert not torch.equal(*heads)


class Awaited:
    async def __call__(self, completions, **_):
        return [1.0] * len(completions)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_an_object_with_async_call_fails(build):
    with pytest.raises(TypeError, match="'coroutine' object is not iterable"):
        trained(build(answers=ANSWERS, reward=Awaited()))

    async def function(completions, **_):
        return [1.0] * len(completions)

    assert trained(build(answers=ANSWERS, reward=function))[0]["reward"] == 1.0


# ------------------------------------------------------------------------------------------- options that surprise


def test_cispo_with_the_default_limit_counts_a_fifth(fresh):
    batch, logits = random_batch()
    del batch["old_per_token_logps"]
    fresh.loss_type, losses = "cispo", []
    for fresh.epsilon_high in (0.2, 5.0):
        losses.append(float(trl_loss(fresh, batch, logits).detach()))
        positive = batch["advantages"] > 0
        share = batch["completion_mask"][positive].sum() / batch["completion_mask"].sum()
        expected = float(share) if fresh.epsilon_high < 1 else 0.0
        assert fresh._metrics["eval"]["cispo_clip_ratio"].pop() == pytest.approx(expected)
    assert losses[0] == pytest.approx(0.2 * losses[1])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"loss_type": "gspo"}, "Unknown loss type"),
        ({"importance_sampling_level": "answer"}, "Unknown importance sampling level"),
        ({"scale_rewards": "std"}, "Invalid value for scale_rewards"),
    ],
)
def test_a_misspelt_name_is_found_after_sampling(build, setting, message):
    trainer = build(**setting)
    rounds = samples(trainer, ANSWERS)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert rounds == [4]


def test_normalize_then_sum_ignores_scale_rewards(build):
    seen = set()
    for scale in ("group", "batch", "none"):
        trainer = build(answers=ANSWERS, scale_rewards=scale, multi_objective_aggregation="normalize_then_sum")
        seen.add(tuple(scored(trainer)["advantages"].tolist()))
        assert trainer._metrics["train"]["frac_reward_zero_std"] == [0.0]
    assert len(seen) == 1


def test_the_entropy_mask_leaves_divisor_and_distance_alone(fresh):
    batch, logits = random_batch()
    fresh.beta, distances = 0.5, []
    silent = {**batch, "advantages": torch.zeros(6)}
    for fresh.top_entropy_quantile in (1.0, 0.2):
        distances.append(float(trl_loss(fresh, silent, logits).detach()))
    assert distances[0] == distances[1] > 0
    fresh.beta, fresh.loss_type = 0.0, "bnpo"
    one = {**batch, "advantages": torch.ones(6)}
    del one["old_per_token_logps"]  # every ratio is 1, so the loss is minus the share of tokens that count
    assert float(trl_loss(fresh, one, logits).detach()) == pytest.approx(-0.2, abs=0.03)


def test_scores_are_those_of_the_sampling_temperature(fresh):
    batch, logits = random_batch()
    fresh.temperature = 0.5
    trl_loss(fresh, batch, logits)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    theirs = fresh._get_per_token_logps_and_entropies(fresh.model, ids, torch.ones_like(ids), 9)[0]
    ours = torch.log_softmax(logits[:, :-1] / 0.5, -1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_there_is_no_reference_by_default(build):
    assert build().ref_model is None
    assert build(beta=0.1).ref_model is not None


def test_the_reference_is_loaded_from_the_path_in_float32(build, checkpoint):
    policy = changed(Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16))
    trainer = build(model=policy, answers=ANSWERS, beta=0.1)
    assert (trainer.model.dtype, trainer.ref_model.dtype) == (torch.bfloat16, torch.float32)
    assert trained(trainer)[0]["kl"] > 0.01


def test_a_last_assistant_message_is_not_continued(fresh):
    prompt = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3 is"}]
    ids = fresh._tokenize_prompts([prompt])[0][0]
    assert fresh.processing_class.decode(ids) == "<|user|>1+2<|end|><|assistant|>3 is<|end|><|assistant|>"


def test_sampling_happens_in_training_mode(build):
    trainer = build()
    seen, generate = [], trainer.model.generate
    trainer.model.generate = lambda **kwargs: seen.append(trainer.model.training) or generate(**kwargs)
    trained(trainer)
    assert seen == [True]


def test_continuous_batching_leaves_the_weights_in_bfloat16(build):
    trainer = build(use_transformers_continuous_batching=True, bf16=True)
    assert trainer.model.dtype == torch.float32
    trainer.model.generate_batch = lambda prompts, **_: {
        i: SimpleNamespace(generated_tokens=ANSWERS[i % 4]) for i in range(len(prompts))
    }
    trained(trainer)
    assert trainer.model.dtype == torch.bfloat16


def test_tokens_are_counted_on_after_resuming(build):
    settings = {"answers": ANSWERS, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    first = build(**settings)
    counts = [line["num_tokens"] for line in trained(first)]
    second = build(**settings)
    second.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-1"))
    assert second.state.log_history[-2]["num_tokens"] == counts[1]


# -------------------------------------------------------------------------------------------------- what is logged


def listed() -> dict[str, str]:
    """The keys of the page's table, each with what it is."""
    return {cells[0].strip("`"): cells[1] for cells in first_cells(section("Logged metrics").split("###")[0])}


def test_the_page_lists_exactly_the_keys_that_runs_log(build, tmp_path):
    model = save(experts(pad_token_id=PAD, output_router_logits=False), tmp_path / "moe")
    logged = set()
    for loss_type in ("dapo", "cispo", "vespo"):
        trainer = build(
            model=model,
            answers=ANSWERS,
            beta=0.1,
            entropy_coef=0.01,
            loss_type=loss_type,
            eval_dataset=Dataset.from_list(ROWS[:2]),
            eval_strategy="steps",
            eval_steps=1,
        )
        trainer.train()
        lines = trainer.state.log_history
        training, evaluation = (next(set(x) for x in lines if key in x) for key in ("loss", "eval_loss"))
        speed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
        without = {"grad_norm", "learning_rate", "step_time", "entropy_coef", "epoch", "step"}
        assert evaluation == {f"eval_{key}" for key in training - without} | speed | {"epoch", "step"}
        logged |= training | speed | set(lines[-1])
        assert lines[-1]["total_flos"] == 0
        seconds, speeds = next((x["eval_runtime"], x["eval_samples_per_second"]) for x in lines if "eval_loss" in x)
        assert seconds * speeds == pytest.approx(2, rel=0.1)  # prompts; there were eight answers
    logged = {re.sub("/first_token/", "/NAME/", key) for key in logged}
    elsewhere = {key for key, what in listed().items() if re.search(r"only with (tools|vLLM|Liger)", what)}
    elsewhere |= {"sampling/sampling_logp_difference/max"}
    elsewhere |= {f"sampling/importance_sampling_ratio/{name}" for name in ("mean", "max")}
    assert set(listed()) == logged | elsewhere
    assert logged & elsewhere == set()


def test_liger_goes_around_bf16(build):
    """Its loss takes the place of the model's forward for one call, and with it that of the wrapper that is bf16."""
    from trl.models.utils import _ForwardRedirection

    def kernel(_input, lin_weight, **others):
        return (_input @ lin_weight.T).mean(), [torch.zeros(())]

    assert types_of_products(build(bf16=True)) == {torch.bfloat16}
    trainer = build(bf16=True)
    trainer.use_liger_kernel, trainer.liger_loss = True, kernel  # as a setting it would need the real kernel
    trainer._forward_redirection = _ForwardRedirection()
    assert types_of_products(trainer) == {torch.float32}


def test_the_keys_that_need_tools_vllm_or_liger_stand_in_the_source():
    source = inspect.getsource(GRPOTrainer)
    written = set(re.findall(r'_metrics\[mode\]\[\s*"([^"]+)"\s*\]', source))
    assert written - set(listed()) == set()
    assert {"tools/call_frequency", "clip_ratio", "sampling/importance_sampling_ratio/min"} <= written


# ---------------------------------------------------------------------------------------------------- the neighbours


def test_rloo_on_the_page_is_what_trl_computes(checkpoint, tmp_path, page):
    rewards = [1.0, 0.25, 0.0, 0.75]
    trainer = built(
        checkpoint, tmp_path, trainer=RLOOTrainer, reward=lambda **_: rewards, answers=ANSWERS, beta=0.0, epsilon=0.1
    )
    batch, logits = scored(trainer), random_batch(1)[1]
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    logits = logits[:4, : ids.shape[1] + 1]
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[..., None])[..., 0]
    old_logps = logps.detach() + torch.tensor([0.3, 0.01, -0.02, -0.3])[:, None] / mask.sum(1, keepdim=True)
    batch["old_logps"] = (old_logps * mask).sum(1)
    theirs = trl_loss(trainer, batch, logits)
    ours = page["rloo_loss"](logps, old_logps, torch.tensor(rewards), mask, group_size=4, epsilon=0.1)
    agree(ours.detach(), theirs.detach(), "rloo_loss")
    agree(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)), "gradient of rloo_loss")


def test_reinforce_on_the_page_has_the_gradient_of_trl_on_fresh_answers(fresh, page):
    fresh.loss_type = "grpo"
    batch, logits = random_batch(1)
    del batch["old_per_token_logps"]
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    ours = page["reinforce_loss"](logps, batch["advantages"], batch["completion_mask"])
    theirs = trl_loss(fresh, batch, logits)
    agree(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)), "reinforce_loss")


# ----------------------------------------------------------------------------------------------------- the page itself


def test_defaults_that_the_page_tells_in_words(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, num_generations=8)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.beta) == (8, 1, 0.0)
    assert (args.loss_type, args.disable_dropout, args.remove_unused_columns) == ("dapo", False, False)
