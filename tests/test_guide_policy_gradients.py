"""The formulas of reference_guides/policy_gradients.md against TRL's own trainers, and against exact sums.

What GRPO, RLOO and PPO compute is compared by the tests of their walkthroughs, called here with the functions of the guide:
real methods of real trainers on random logits, value and gradient, to 1e-5 (relative, float32). What TRL does not have is
compared with autograd, or with a sum over everything that can be sampled. `pytest -s` prints the largest error.
"""

import functools
import inspect
import itertools
import math
import re

import pytest
import test_walkthrough_grpo as grpo
import test_walkthrough_ppo as ppo
import test_walkthrough_rloo as rloo
import torch
from markdown_pages import GUIDES, ROOT, fences, formulas, inline_math, run_page, symbols
from test_walkthrough_grpo import built, config, random_batch, save, scored, trl_loss
from test_walkthrough_ppo import make, no_collections, random_round  # noqa: F401  (fixtures)
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.ppo import PPOConfig
from walkthrough_tools import checked_formulas, noting, page_of

PAGE = GUIDES / "policy_gradients.md"
WALKTHROUGHS = [ROOT / "annotated_trainers" / f"{name}.md" for name in ("grpo", "rloo", "ppo")]
SEEDS = (0, 1, 2)


page = page_of(PAGE)


@pytest.fixture(scope="module", autouse=True)
def summary():
    before = [len(module.ERRORS) for module in (grpo, rloo, ppo)]
    yield
    errors = [e for module, n in zip((grpo, rloo, ppo), before, strict=True) for e in module.ERRORS[n:]]
    print(f"\n{len(CHECKED)} formulas, {len(errors)} comparisons with TRL, largest error {max(errors, default=0):.1e}")


CALLED, CHECKED, checks = checked_formulas()
functions = noting(CALLED)


@pytest.fixture
def formula(functions):
    """The same in the form that the tests of GRPO's page want."""

    def named(name):
        grpo.CALLED.add(name)
        return functions[name]

    return named


def close(ours, theirs, rel=1e-9) -> None:
    ours, theirs = torch.as_tensor(ours).detach(), torch.as_tensor(theirs).detach()
    assert float((ours - theirs).abs().max()) <= rel * max(float(theirs.abs().max()), 1e-3)


# --------------------------------------------------------------------------------------------- the trainers of TRL


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return save(Qwen3ForCausalLM(Qwen3Config(**config())), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trainers(checkpoint, tmp_path_factory):
    return {
        kind: built(checkpoint, tmp_path_factory.mktemp(kind.__name__), trainer=kind, answers=grpo.ANSWERS)
        for kind in (GRPOTrainer, RLOOTrainer)
    }


@pytest.fixture
def fresh(trainers):
    """The GRPO trainer with its settings as they were; `fresh_rloo` is the other one."""
    yield from put_back(trainers[GRPOTrainer])


@pytest.fixture
def fresh_rloo(trainers):
    yield from put_back(trainers[RLOOTrainer])


def put_back(trainer):
    saved, args = dict(vars(trainer)), dict(vars(trainer.args))
    yield trainer
    trainer.model.__dict__.pop("forward", None)
    vars(trainer).clear()
    vars(trainer).update(saved)
    vars(trainer.args).update(args)


# ------------------------------------------------------------------------------------------------------ GRPO, against TRL


@checks("token-ratio", "sequence-ratio", "clipped-term", "cispo-term", "sapo-term", "vespo-weight", "vespo-term",
        "grpo-mean", "bnpo-mean", "dr-grpo-mean", "dapo-mean", "luspo-mean")  # fmt: skip
def test_terms_and_means_equal_trl_in_training(fresh, formula):
    grpo.test_terms_and_means_equal_trl_in_training(fresh, formula)


OPTIONS = ("plain", "reference", "reference without correction", "clip", "temperature")


@checks("k3-kl", "corrected-kl")
def test_every_loss_type_equals_trl_with_the_options_of_the_page(fresh, formula):
    before, arguments = dict(vars(fresh)), dict(vars(fresh.args))
    for loss_type, level, name in itertools.product(grpo.LOSS_TYPES, ("token", "sequence"), OPTIONS):
        vars(fresh).update(before, loss_type=loss_type, importance_sampling_level=level)
        vars(fresh.args).update(arguments)
        for key, value in grpo.OPTIONS[name].items():
            setattr(fresh.args if key in ("delta", "use_bias_correction_kl") else fresh, key, value)
        for seed in SEEDS:
            batch, logits = random_batch(seed)
            grpo.compare(formula, fresh, batch, logits, f"{loss_type}, {level}, {name}, seed {seed}")


@checks("grpo-loss", "group-advantage", "first-loss")
def test_the_loss_of_the_paper_equals_trl(fresh, formula):
    grpo.test_the_key_equation_equals_trl(fresh, formula)


@checks("group-advantage", "unscaled-advantage", "batch-advantage")
def test_advantages_of_groups_equal_trl(fresh, functions):
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(7))
    fresh.reward_funcs = [lambda **_: rewards.tolist()]
    fresh.reward_func_names, fresh.reward_processing_classes, fresh.reward_weights = ["a"], [None], torch.ones(1)
    for fresh.scale_rewards, name in (("group", "group"), ("none", "unscaled"), ("batch", "batch")):
        grpo.agree(functions[f"{name}_advantage"](rewards, 4), scored(fresh, rows=3)["advantages"], name)


def test_the_table_of_loss_types_is_trls():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    compared = set(re.findall(r'"(\w+)"', " ".join(re.findall(r"self\.loss_type (?:==|in) (.*?):", source))))
    rows = {row["`loss_type`"].split("`")[1]: row for row in table("`loss_type`")}
    assert set(rows) == compared == set(grpo.LOSS_TYPES) and len(rows) == 8
    walkthrough = {
        cells[0].split("`")[1]: cells[1] for cells in grpo.first_cells(grpo.section("The loss: five means"))[1:]
    }
    assert {name: row["term"] for name, row in rows.items()} == walkthrough
    means = {"grpo": "grpo", "sapo": "grpo", "bnpo": "bnpo", "dr_grpo": "dr_grpo", "luspo": "luspo"}
    assert {n: row["mean"] for n, row in rows.items()} == {n: f"`{means.get(n, 'dapo')}_mean`" for n in rows}
    assert {row["mean"].strip("`") for row in rows.values()} == set(run_page(PAGE).namespace["MEANS"])
    (default,) = [name for name, row in rows.items() if "(default)" in row["`loss_type`"]]
    assert default == GRPOConfig.__dataclass_fields__["loss_type"].default


def test_only_bnpo_depends_on_how_answers_fall_into_micro_batches(fresh):
    for fresh.loss_type in grpo.LOSS_TYPES:
        batch, logits = random_batch(3)
        batch["num_items_in_batch"] = batch["completion_mask"].sum()
        assert batch["completion_mask"][:3].sum() != batch["completion_mask"][3:].sum()
        found = {}
        for parts in (1, 2):
            fresh.current_gradient_accumulation_steps = fresh.args.steps_per_generation = parts
            found[parts] = 0.0
            for rows in torch.arange(6).chunk(parts):
                part = {k: v[rows] if v.ndim else v for k, v in batch.items()}
                found[parts] += float(trl_loss(fresh, part, logits[rows], training=True).detach())
        same = found[1] == pytest.approx(found[2], rel=1e-4, abs=1e-5)
        assert same is (fresh.loss_type != "bnpo"), (fresh.loss_type, found)


def test_only_the_mean_over_answers_weighs_tokens_by_the_length_of_their_answer(fresh):
    fresh.model.eval()
    for fresh.loss_type in grpo.LOSS_TYPES:
        batch, logits = random_batch(1)
        batch["advantages"] = -torch.ones(6)
        del batch["old_per_token_logps"]
        logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, batch["completion_ids"][..., None])[..., 0]
        fresh._get_per_token_logps_and_entropies = lambda *_, logps=logps, **__: (logps, torch.zeros_like(logps), None)
        (slope,) = torch.autograd.grad(fresh._compute_loss(fresh.model, batch), logps)
        pushes, lengths = slope[:, 0], batch["completion_mask"].sum(1)
        if fresh.loss_type in ("grpo", "sapo"):
            pushes = pushes * lengths
            assert lengths.unique().numel() > 1
        assert torch.allclose(pushes, pushes[0].expand(6), rtol=1e-4), fresh.loss_type


def test_cispo_keeps_a_fifth_of_a_fresh_token_by_default(fresh):
    assert fresh.epsilon_high == 0.2 and GRPOConfig.__dataclass_fields__["epsilon_high"].default is None
    slopes = {}
    for fresh.loss_type, fresh.epsilon_high in (("dapo", 0.2), ("cispo", 0.2), ("cispo", 5.0)):
        batch, logits = random_batch(2)
        del batch["old_per_token_logps"]
        key = fresh.loss_type, fresh.epsilon_high
        (slopes[key],) = torch.autograd.grad(trl_loss(fresh, batch, logits), logits)
    close(slopes["cispo", 0.2], 0.2 * slopes["dapo", 0.2], rel=1e-5)
    close(slopes["cispo", 5.0], slopes["dapo", 0.2], rel=1e-5)


def test_on_fresh_answers_all_terms_push_alike(fresh):
    slopes = {}
    for fresh.loss_type in ("dapo", "vespo", "grpo", "sapo"):
        batch, logits = random_batch(2)
        del batch["old_per_token_logps"]
        (slopes[fresh.loss_type],) = torch.autograd.grad(trl_loss(fresh, batch, logits), logits)
    close(slopes["vespo"], slopes["dapo"], rel=1e-5)
    close(slopes["sapo"], slopes["grpo"], rel=1e-5)


def test_vespo_does_not_read_the_level_of_the_ratio(fresh):
    losses = set()
    for fresh.loss_type, fresh.importance_sampling_level in itertools.product(("vespo",), ("token", "sequence")):
        losses.add(float(trl_loss(fresh, *random_batch(2)).detach()))
    assert len(losses) == 1


def test_dr_grpo_alone_keeps_the_division_by_the_deviation(fresh, page):
    fresh.loss_type = "dr_grpo"
    rewards = [0.0, 1.0, 0.0, 0.5]
    fresh.reward_funcs, fresh.reward_func_names = [lambda **_: rewards], ["a"]
    fresh.reward_processing_classes, fresh.reward_weights = [None], torch.ones(1)
    assert fresh.scale_rewards == "group"  # nothing was set
    close(scored(fresh)["advantages"], page["group_advantage"](torch.tensor(rewards), 4), rel=1e-5)


def test_a_group_without_variance_has_the_advantages_0(fresh):
    fresh.reward_funcs, fresh.reward_func_names = [lambda completions, **_: [1.0] * len(completions)], ["a"]
    fresh.reward_processing_classes, fresh.reward_weights = [None], torch.ones(1)
    assert scored(fresh)["advantages"].tolist() == [0.0] * 4


def test_grpo_multiplies_k3_by_the_ratio_unless_told_not_to(fresh):
    assert fresh.args.use_bias_correction_kl is True
    fresh.beta, slopes = 1.0, []
    for fresh.args.use_bias_correction_kl in (True, False):
        batch, logits = random_batch(0)
        batch["advantages"] = torch.zeros(6)
        del batch["old_per_token_logps"]
        slopes.append(torch.autograd.grad(trl_loss(fresh, batch, logits), logits)[0])
    assert (slopes[0] - slopes[1]).norm() > 0.1 * slopes[1].norm()


# ------------------------------------------------------------------------------------------------------ RLOO, against TRL


@checks("penalized-reward", "leave-one-out-advantage", "centred-advantage")
@pytest.mark.parametrize("group", [2, 3, 4])
def test_rewards_and_advantages_of_rloo_equal_trl(fresh_rloo, functions, group):
    for seed, (beta, bounds) in itertools.product(SEEDS, ((0.05, None), (0.7, (-1.0, 0.5)), (0.0, None))):
        found = rloo.random_round(fresh_rloo, seed, group, beta=beta, reward_clip_range=bounds)
        rewards = functions["penalized_reward"](found.scores, found.policy, found.reference, found.mask, beta, bounds)
        for name in ("leave_one_out_advantage", "centred_advantage"):
            rloo.agree(functions[name](rewards, group), found.batch["advantages"])


@checks("rloo-loss")
def test_the_loss_of_rloo_equals_trl(fresh_rloo, functions):
    rloo.test_the_loss_on_the_page_is_what_trl_computes(fresh_rloo, functions)


@checks("rloo-on-fresh-answers", "reinforce-loss")
def test_on_fresh_answers_rloo_is_reinforce(fresh_rloo, functions):
    rloo.test_on_fresh_answers_the_gradient_is_that_of_reinforce(fresh_rloo, functions)
    for seed in SEEDS:
        found = rloo.random_loss(fresh_rloo, seed, drift=0)
        ours = functions["reinforce_loss"]((found.logps * found.mask).sum(1), found.advantages)
        rloo.agree(torch.autograd.grad(ours, found.logits)[0], found.slope)


# ------------------------------------------------------------------------------------------------------- PPO, against TRL


@checks("ppo-token-reward", "gae", "whitened-advantage", "ppo-policy-loss", "ppo-value-loss")
def test_rewards_advantages_and_losses_of_ppo_equal_trl(random_round, functions):  # noqa: F811
    clipped = 0
    for seed, settings in ppo.CASES[1:]:
        found = random_round(seed, **settings)
        ours, first = ppo.chain(functions, found), found.passes[0]
        for name in ("rewards", "returns", "values"):
            ppo.agree(getattr(ours, name), getattr(first, name))
        ppo.agree(ours.whitened, first.advantages)
        for (policy, value), theirs, slopes in zip(ours.losses, found.passes, found.gradients, strict=True):
            ppo.agree(policy, theirs.pg_loss)
            ppo.agree(value, theirs.vf_loss)
            ppo.agree(policy + settings["vf_coef"] * value, theirs.loss)
            ppo.agree(torch.autograd.grad(policy, found.policy, retain_graph=True)[0], slopes[0])
            (mine,) = torch.autograd.grad(value, found.new_guesses, retain_graph=True)
            ppo.agree(settings["vf_coef"] * mine, slopes[1])
            clipped += int((theirs.vf_losses2 > theirs.vf_losses1).sum())
    assert clipped > 5  # the clip of the value loss was seen at work


@checks("k1-kl", "k3-kl")
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_estimators_of_ppo_are_k1_and_k3(random_round, functions, estimator):  # noqa: F811
    found = random_round(0, kl_estimator=estimator)
    ours = ppo.chain(functions, found)
    both = {name: functions[f"{name}_kl"](ours.logps, ours.ref_logps) * ours.answer for name in ("k1", "k3")}
    ppo.agree(both[estimator], found.passes[0].kl)
    # and it is what the reward of each token holds
    rewards = ours.rewards + found.args.kl_coef * (both["k1"] - both[estimator])
    ppo.agree(rewards, found.passes[0].rewards)


@checks("gae-sum", "gae")
def test_gae_is_the_sum_of_later_surprises(functions):
    for seed, (gamma, lam) in itertools.product(SEEDS, ((1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0))):
        rewards, values = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        advantages, returns = functions["gae"](rewards, values, gamma, lam)
        surprises = rewards + gamma * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
        close(functions["gae_sum"](surprises, gamma, lam), advantages, rel=1e-6)  # its weights are float32
        close(returns, advantages + values)
        if lam == 0:
            close(advantages, surprises)
        if lam == gamma == 1:  # what was really earned, minus the guess
            close(advantages, rewards.flip(1).cumsum(1).flip(1) - values)


# ------------------------------------------------------------------------------------------------------------ exact sums


@pytest.fixture(params=SEEDS)
def bandit(request):
    """Weights of a policy over four completions (with gradient), and their rewards."""
    dice = torch.Generator().manual_seed(request.param)
    theta, rewards = torch.randn(2, 4, generator=dice, dtype=torch.double)
    return theta.requires_grad_(), rewards


def score_by_autograd(theta):
    logps = theta.log_softmax(0)
    return torch.stack([torch.autograd.grad(one, theta, retain_graph=True)[0] for one in logps])


def exact_gradient(theta, rewards):
    return torch.autograd.grad((theta.softmax(0) * rewards).sum(), theta)[0]


@checks("expected-reward", "score-function", "score-mean", "policy-gradient", "baseline-gradient")
def test_the_policy_gradient_is_that_of_the_expected_reward_with_any_baseline(bandit, functions):
    theta, rewards = bandit
    close(functions["expected_reward"](theta, rewards), torch.distributions.Categorical(logits=theta).probs @ rewards)
    close(functions["score_function"](theta), score_by_autograd(theta))
    assert functions["score_mean"](theta).abs().max() < 1e-12
    close(functions["policy_gradient"](theta, rewards), exact_gradient(theta, rewards))
    for b in (-7.0, 0.0, 0.3, 100.0):
        close(functions["baseline_gradient"](theta, rewards, b), exact_gradient(theta, rewards), rel=1e-8)


@checks("reinforce-loss")
def test_the_average_of_reinforce_over_all_samples_is_the_exact_gradient(bandit, functions):
    theta, rewards = bandit
    total = torch.zeros(4, dtype=torch.double)
    for drawn in map(list, itertools.product(range(4), repeat=2)):
        logps = theta.log_softmax(0)[drawn]
        loss = functions["reinforce_loss"](logps, rewards[drawn])
        total += logps.detach().sum().exp() * torch.autograd.grad(loss, theta)[0]
    close(-total, exact_gradient(theta, rewards))


@checks("gradient-variance", "best-baseline")
def test_the_best_baseline_has_the_least_variance_and_samples_have_that_variance(bandit, functions):
    theta, rewards = (value.detach() for value in bandit)
    best = functions["best_baseline"](theta, rewards)
    lowest = functions["gradient_variance"](theta, rewards, best)
    for away in (-1.0, -0.01, 0.01, 1.0):
        assert functions["gradient_variance"](theta, rewards, best + away) > lowest
    drawn = torch.multinomial(theta.softmax(0), 200_000, True, generator=torch.Generator().manual_seed(0))
    scores = torch.eye(4, dtype=torch.double) - theta.softmax(0)
    pushes = (rewards[drawn] - 0.3)[:, None] * scores[drawn]
    assert float(pushes.var(0).sum()) == pytest.approx(
        float(functions["gradient_variance"](theta, rewards, 0.3)), rel=0.05
    )


@checks("group-mean-gradient", "leave-one-out-advantage", "unscaled-advantage")
def test_leave_one_out_is_exact_and_the_mean_of_the_group_loses_its_share(bandit, functions):
    theta, rewards = bandit
    wanted, scores = exact_gradient(theta, rewards), score_by_autograd(theta)
    for size in (2, 3, 4):
        found = {"unscaled_advantage": 0.0, "leave_one_out_advantage": 0.0}
        for drawn in map(list, itertools.product(range(4), repeat=size)):
            probability = theta.softmax(0)[drawn].prod().detach()
            for name in found:
                push = functions[name](rewards[drawn], size)[:, None] * scores[drawn]
                found[name] = found[name] + probability * push.mean(0)
        close(found["leave_one_out_advantage"], wanted)
        close(found["unscaled_advantage"], (size - 1) / size * wanted)
        close(functions["group_mean_gradient"](theta.detach(), rewards, size), (size - 1) / size * wanted)


def test_dividing_by_the_deviation_turns_the_gradient(page):
    theta, rewards = torch.tensor([[0.2, -0.1, 0.4], [1.0, 0.0, 0.5]], dtype=torch.double)
    plain = page["policy_gradient"](theta, rewards)
    scaled = page["group_mean_gradient"](theta, rewards, 3, page["group_advantage"])
    ratio = scaled / plain
    assert ratio.max() / ratio.min() > 1.2


def test_a_factor_of_the_loss_does_not_change_steps_of_adam():
    ends = []
    for factor in (1.0, 0.5):
        weight = torch.ones(3, dtype=torch.double, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (factor * (weight * torch.tensor([1.0, 2.0, 3.0])).sin().sum()).backward()
            optimizer.step()
        ends.append(weight.detach())
    close(ends[0], ends[1], rel=1e-6)


@checks("coin-push", "group-advantage", "unscaled-advantage")
def test_the_push_of_a_group_is_its_deviation(functions):
    for size, logit in itertools.product((2, 5, 8), (-2.0, 0.7)):
        for right in range(size + 1):
            weight = torch.tensor(logit, dtype=torch.double, requires_grad=True)
            rewards = (torch.arange(size) < right).double()
            logps = torch.where(
                rewards > 0, torch.nn.functional.logsigmoid(weight), torch.nn.functional.logsigmoid(-weight)
            )
            for name, scaled in (("group_advantage", True), ("unscaled_advantage", False)):
                (push,) = torch.autograd.grad(
                    (functions[name](rewards, size) * logps).mean(), weight, retain_graph=True
                )
                assert float(functions["coin_push"](right, size, scaled)) == pytest.approx(float(push), abs=1e-12)


@checks("importance-sampling")
def test_importance_ratios_keep_value_and_gradient(bandit, functions):
    theta, rewards = bandit
    old_probs = torch.randn(4, generator=torch.Generator().manual_seed(9), dtype=torch.double).softmax(0)
    ours = functions["importance_sampling"](theta.softmax(0), old_probs, rewards)
    close(ours, theta.softmax(0) @ rewards)
    close(torch.autograd.grad(ours, theta)[0], exact_gradient(theta, rewards))


@checks("ratio-variance")
def test_the_variance_of_the_ratio_is_that_of_all_answers_counted_out(functions):
    for seed, length in itertools.product(SEEDS, (1, 2, 4)):
        probs, old_probs = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.double).softmax(
            1
        )
        mean = square = 0.0
        for answer in map(list, itertools.product(range(3), repeat=length)):
            ratio, weight = (probs[answer] / old_probs[answer]).prod(), old_probs[answer].prod()
            mean, square = mean + weight * ratio, square + weight * ratio**2
        close(functions["ratio_variance"](probs, old_probs, length), square - mean**2)


# ----------------------------------------------------------------------------------------------------- the KL estimators


def divergence(first, second):
    return torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=one) for one in (first, second)))


@pytest.fixture(params=itertools.product(SEEDS, (0.1, 1.0)), ids=lambda p: f"{p[0]}-{p[1]}")
def apart(request):
    """Weights of a policy (with gradient) and log-probabilities of a reference, near and far."""
    seed, distance = request.param
    dice = torch.Generator().manual_seed(100 + seed)
    reference, noise = torch.randn(2, 12, generator=dice, dtype=torch.double)
    return (reference + distance * noise).requires_grad_(), reference.log_softmax(0)


@checks("k1-kl", "k2-kl", "k3-kl", "kl-bias", "kl-variance")
def test_as_a_value_k1_and_k3_are_unbiased_and_k2_is_not(apart, functions):
    theta, reference = apart[0].detach(), apart[1]
    logps, true = theta.log_softmax(0), divergence(apart[0].detach(), apart[1])
    for name in ("k1", "k2", "k3"):
        estimator = functions[f"{name}_kl"]
        each = estimator(logps, reference)
        bias, variance = (functions[what](logps, reference, estimator) for what in ("kl_bias", "kl_variance"))
        close(bias, logps.exp() @ each - true)
        close(variance, logps.exp() @ (each - logps.exp() @ each) ** 2, rel=1e-7)
        assert (abs(float(bias)) > 1e-6) is (name == "k2")
        assert name == "k1" or each.min() >= 0
        # autograd gives the derivatives that the page names
        leaf = logps.clone().requires_grad_()
        (slope,) = torch.autograd.grad(estimator(leaf, reference).sum(), leaf)
        close(slope, {"k1": logps * 0 + 1, "k2": logps - reference, "k3": 1 - (reference - logps).exp()}[name])


@checks("kl-in-the-loss", "kl-in-the-reward", "corrected-kl")
def test_each_estimator_in_each_place_pushes_as_the_table_says(apart, functions):
    theta, reference = apart
    forward = torch.autograd.grad(divergence(theta, reference), theta)[0]
    backward = torch.autograd.grad(divergence(reference, theta), theta)[0]
    k1, k2, k3 = (functions[f"{name}_kl"] for name in ("k1", "k2", "k3"))
    logps = theta.log_softmax(0)
    (of_mean,) = torch.autograd.grad(logps.exp() @ k2(logps, reference), theta)
    in_loss, in_reward = functions["kl_in_the_loss"], functions["kl_in_the_reward"]
    with_ratio = functions["kl_with_ratio"]
    logps = theta.log_softmax(0)
    fresh = (logps - logps.detach()).exp()  # the ratio while answers are used once
    weighted = logps.exp().detach() * functions["corrected_kl"](fresh, logps, reference, k3)
    close(torch.autograd.grad(weighted.sum(), theta)[0], forward)
    assert in_loss(theta, reference, k1).abs().max() < 1e-12
    close(in_loss(theta, reference, k2), forward)
    close(in_loss(theta, reference, k3), backward)
    close(in_reward(theta, reference, k1), forward)
    close(in_reward(theta, reference, k3), forward - backward)
    assert (in_reward(theta, reference, k2) - forward).norm() > 0.1 * forward.norm()
    close(with_ratio(theta, reference, k1), forward)
    close(with_ratio(theta, reference, k2), of_mean)
    close(with_ratio(theta, reference, k3), forward)
    assert (of_mean - forward).norm() > 1e-3 * forward.norm()
    for estimator in (k1, k2, k3):
        both = in_loss(theta, reference, estimator) + in_reward(theta, reference, estimator)
        close(with_ratio(theta, reference, estimator), both)


@checks("push-variance")
def test_the_weights_of_the_pushes_are_those_of_autograd_and_so_is_their_variance(apart, functions):
    theta, reference = apart
    logps, scores, probs = theta.log_softmax(0), score_by_autograd(theta), theta.softmax(0).detach()
    log_ratio = (logps - reference).detach()
    k1, k2, k3 = (functions[f"{name}_kl"] for name in ("k1", "k2", "k3"))
    fresh = (logps - logps.detach()).exp()

    def samples(values):  # the gradient of each sample's own number
        return torch.stack([torch.autograd.grad(one, theta, retain_graph=True)[0] for one in values])

    for pushes, weights in (
        (samples(k1(logps, reference).detach() * logps), log_ratio),
        (samples(fresh * k1(logps, reference)), log_ratio + 1),
        (samples(k2(logps, reference)), log_ratio),
        (samples(fresh * k3(logps, reference)), log_ratio),
        (samples(k3(logps, reference)), 1 - (-log_ratio).exp()),
    ):
        close(pushes, weights[:, None] * scores)
        mean = probs @ pushes
        close(
            functions["push_variance"](theta.detach(), weights),
            probs @ (pushes - mean).square().sum(1),
            rel=1e-7,
        )


def test_per_token_k3_times_ratio_is_exact_for_the_last_token_alone():
    """On the two-token answers of RLOO's page: weight 0 makes the first token, 1 and 2 the second."""
    there = run_page(rloo.PAGE).namespace
    wanted = there["exact"](torch.zeros(4), 1.0)
    corrected = functools.partial(there["k3_in_the_loss"], corrected=True)
    found, plain = (there["expected"](one, torch.zeros(4), 1.0) for one in (corrected, there["k3_in_the_loss"]))
    close(found[1:], wanted[1:], rel=1e-4)
    assert abs(float(found[0] - wanted[0])) > 0.1 * abs(float(wanted[0]))
    assert float((plain - wanted)[1:].abs().max()) > 1e-3


def test_the_experiment_says_what_the_page_says_of_it(page):
    quieter = set()
    for (where, distance), seed in itertools.product(page["FAR"].items(), range(20)):
        logps, reference, theta = page["pair"](distance, seed=seed)
        logps = logps.detach()
        true = float(divergence(theta.detach(), reference))
        spread = {n: math.sqrt(page["kl_variance"](logps, reference, e)) / true for n, e in page["ESTIMATORS"].items()}
        k2_bias = float(page["kl_bias"](logps, reference, page["k2_kl"])) / true
        negative = float(logps.exp()[logps < reference].sum())
        pushed = page["kl_in_the_reward"](theta, reference, page["k3_kl"]).norm()
        wanted = page["kl_in_the_reward"](theta, reference, page["k1_kl"]).norm()
        if where == "near":
            assert 14.5 < spread["k1"] < 24 and min(spread["k2"], spread["k3"]) > 0.9
            assert max(spread["k2"], spread["k3"]) < 2.5
            assert 0.38 < negative < 0.62 and abs(k2_bias) < 0.05
            assert pushed < 0.15 * wanted  # "hardly anything near the reference"
        else:
            quieter.add(spread["k3"] < spread["k1"])
    assert quieter == {True, False}


def test_a_baseline_of_the_mean_helps_where_the_page_says_so(page):
    for where, distance in page["FAR"].items():
        logps, reference, theta = page["pair"](distance)
        log_ratio = (logps - reference).detach()
        mean = float(logps.detach().exp() @ log_ratio)
        plain, centred, plus_one = (
            float(page["push_variance"](theta.detach(), log_ratio - b)) for b in (0.0, mean, -1.0)
        )
        if where == "near":
            assert plain == pytest.approx(centred, rel=0.01) and plus_one > 50 * plain
        else:
            assert centred < 0.9 * plain


def test_samples_have_the_mean_and_the_deviation_of_the_exact_sums(page):
    for distance, name in itertools.product(page["FAR"].values(), ("k1", "k2", "k3")):
        logps, reference, _ = page["pair"](distance, seed=5)
        logps, estimator = logps.detach(), page["ESTIMATORS"][name]
        drawn = torch.multinomial(logps.exp(), 100_000, True, generator=torch.Generator().manual_seed(2))
        seen, deviation = estimator(logps, reference)[drawn], page["kl_variance"](logps, reference, estimator).sqrt()
        mean = divergence(logps, reference) + page["kl_bias"](logps, reference, estimator)
        assert abs(seen.mean() - mean) < 4 * deviation / math.sqrt(100_000)
        assert float(seen.std()) == pytest.approx(float(deviation), rel=0.05)


# -------------------------------------------------------------------------------------- numbers of the text and the tables


def test_the_clip_is_one_sided_and_delta_cuts_the_open_corner(page):
    ratios = page["RATIOS"].tolist()
    good, bad = (dict(zip(ratios, page["push"](page["clipped_term"], a).tolist(), strict=True)) for a in (1.0, -1.0))
    for ratio in good:
        assert good[ratio] == pytest.approx(ratio if ratio < 1.2 else 0.0)
        assert bad[ratio] == pytest.approx(-ratio if ratio > 0.8 else 0.0)
    assert page["push"](page["clipped_term"], -1.0, delta=2.0)[-1] == 0.0


def test_pushes_of_sapo_and_vespo_fade_above_and_those_of_cispo_do_not(page):
    for advantage in (1.0, -1.0):
        for name in ("sapo_term", "vespo"):
            pushes = page["push"](page[name], advantage).abs()
            assert pushes[-1] < pushes[2]
        assert page["push"](page["cispo_term"], advantage, epsilon_high=5.0).abs()[-1] == pytest.approx(4.0)


def test_a_guess_beyond_its_limit_gets_no_gradient_even_if_it_overshot(page):
    for guess, slope in ((0.1, -0.9), (0.5, 0.0), (1.5, 0.0)):
        value = torch.tensor([[guess]], requires_grad=True)
        loss = page["ppo_value_loss"](value, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1))
        assert float(torch.autograd.grad(loss, value)[0]) == pytest.approx(slope)


def test_numbers_of_the_text():
    text = " ".join(PAGE.read_text("utf-8").split())
    for sentence, value in (
        ("the fourth root of that is 1.072", 1.32 ** (1 / 4)),
        (r"\cdot 0.8 = 1.32$", 1.5 * 1.1 * 1.0 * 0.8),
        ("1 of 8 counts 0.66 of", math.sqrt(7) / math.sqrt(16)),
        ("what 4 of 8 counts, not 0.44", 7 / 16),
        (r"$\log 1.5 = 0.405$", math.log(1.5)),
        (r"$\log 0.5 = -0.693$", math.log(0.5)),
        ("so 0.131 on average", 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ("half of $0.8^2$ is 0.32", 0.8**2 / 2),
    ):
        assert sentence in text, sentence
        number = re.findall(r"-?\d+\.\d+", sentence)[-1]
        assert value == pytest.approx(float(number), abs=0.5001 * 10 ** -len(number.split(".")[1])), sentence
    on_average = 0.75 * (1 / 1.5 - 1) + 0.25 * (2 - 1)
    assert on_average == pytest.approx(0) and "which is 0 on average" in text


def test_defaults_in_the_tables_are_trls():
    def default(kind, name):
        return kind.__dataclass_fields__[name].default

    weights = {row["trainer"]: row["default weight"] for row in table("trainer")}
    for name, kind, setting in (
        ("PPO", PPOConfig, "kl_coef"),
        ("RLOO", RLOOConfig, "beta"),
        ("GRPO", GRPOConfig, "beta"),
    ):
        assert weights[name].split(":")[0] == f"`{setting}` {default(kind, setting)}"
    clip = next(row for row in table("") if row[""] == "limits of the clip")
    assert f"`cliprange` {default(PPOConfig, 'cliprange')}" in clip["PPO"]
    for name, kind in (("RLOO", RLOOConfig), ("GRPO", GRPOConfig)):
        assert f"`epsilon` {default(kind, 'epsilon')}" in clip[name]
    assert default(PPOConfig, "kl_estimator") == "k1"
    assert default(GRPOConfig, "use_bias_correction_kl") is True
    assert default(GRPOConfig, "importance_sampling_level") == "token"
    assert default(GRPOConfig, "delta") is None


def test_defaults_of_the_functions_are_trls(page):
    of_ppo = {name: name for name in ("kl_coef", "gamma", "lam", "cliprange", "cliprange_value")}
    of_vespo = {name: f"vespo_{name}" for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
    of_sapo = {name: f"sapo_{name}" for name in ("temperature_pos", "temperature_neg")}
    clips = {"epsilon": "epsilon", "epsilon_high": "epsilon_high"}
    for function, kind, names in (
        ("ppo_token_reward", PPOConfig, of_ppo),
        ("gae", PPOConfig, of_ppo),
        ("gae_sum", PPOConfig, of_ppo),
        ("ppo_policy_loss", PPOConfig, of_ppo),
        ("ppo_value_loss", PPOConfig, of_ppo),
        ("penalized_reward", RLOOConfig, {"beta": "beta", "clip_range": "reward_clip_range"}),
        ("rloo_loss", RLOOConfig, clips),
        ("grpo_loss", GRPOConfig, {"beta": "beta", "epsilon": "epsilon"}),
        ("clipped_term", GRPOConfig, clips | {"delta": "delta"}),
        ("sapo_term", GRPOConfig, of_sapo),
        ("vespo_weight", GRPOConfig, of_vespo),
    ):
        parameters = inspect.signature(page[function]).parameters.values()
        found = {one.name: one.default for one in parameters if one.default is not one.empty and one.name in names}
        assert found and found == {name: kind.__dataclass_fields__[names[name]].default for name in found}, function


# ---------------------------------------------------------------------------------------------------- nothing is left out


def table(first_header) -> list[dict]:
    """The rows of the table of the page whose first header is this; of tables with an empty one, the last."""
    lines = PAGE.read_text("utf-8").splitlines()
    start = [n for n, line in enumerate(lines) if line.startswith(f"| {first_header} |".replace("|  |", "| |"))][-1]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in rows]
    head = ["", *cells[0]] if not first_header and len(cells[0]) < len(cells[2]) else cells[0]
    return [dict(zip(head, row, strict=True)) for row in cells[2:]]


def test_every_formula_has_a_test():
    displayed = {found.name for found in formulas(PAGE)}
    assert displayed == set(CHECKED)


def test_formulas_are_written_as_in_the_walkthroughs():
    ours = {found.name: found.latex.split() for found in formulas(PAGE)}
    shared = set()
    for path in WALKTHROUGHS:
        text = path.read_text("utf-8")
        for name, latex in re.findall(
            r"<!-- formula: ([a-z0-9-]+) -->\n(?:<!--.*?-->\n)?```math\n(.*?)```", text, re.S
        ):
            if name in ours:
                shared.add(name)
                assert ours[name] == latex.split(), f"{name} differs from {path.name}"
    assert len(shared) >= 28


def math_symbols(cell):
    return {symbol for latex in cell.split("$")[1::2] for symbol in symbols(latex)}


def test_every_symbol_is_in_the_notation_or_in_the_table_of_this_page():
    own = table("symbol")
    notation = re.findall(r"^\| (\$.*?) \|", (GUIDES / "notation.md").read_text("utf-8"), re.M)
    known = {symbol for cell in [*notation, *(row["symbol"] for row in own)] for symbol in math_symbols(cell)}
    lines, used = PAGE.read_text("utf-8").splitlines(), set()
    in_formulas = {symbol for found in formulas(PAGE) for symbol in symbols(found.latex)}
    for line, latex in inline_math(PAGE):
        if not lines[line - 1].startswith("| $"):
            used |= symbols(latex)
    assert used | in_formulas <= known, sorted((used | in_formulas) - known)
    code = "".join(fence.text for fence in fences(PAGE) if fence.lang == "python")
    for row in own:
        assert math_symbols(row["symbol"]) <= used | in_formulas, row["symbol"]
        for name in re.findall(r"`([^`]+)`", row["name in the code"]):
            start = r"\b" if name[0].isalnum() else ""
            assert re.search(start + re.escape(name), code), f"no block uses the name {name!r}"
