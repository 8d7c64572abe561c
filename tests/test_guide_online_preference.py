"""The formulas of reference_guides/online_preference.md against TRL's own trainers, and against exact sums.

What OnlineDPO, XPO and Nash-MD compute is compared with the real `training_step` of real trainers, by the `Step` of each
walkthrough's tests: random answers, logits and scores, value and gradient, to 1e-5. What TRL does not have is compared
with autograd, or with a sum over everything that can be written. `pytest -s` prints the largest error.
"""

import inspect
import itertools
import math
import re
from types import SimpleNamespace

import pytest
import test_walkthrough_nash_md as nash_md
import test_walkthrough_online_dpo as online_dpo
import test_walkthrough_xpo as xpo
import torch
from markdown_pages import GUIDES, ROOT, fences, formulas, inline_math, run_page, symbols
from transformers import AutoModelForCausalLM
from trl.experimental.nash_md import NashMDConfig, NashMDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.xpo import XPOConfig, XPOTrainer
from walkthrough_tools import (
    QUESTION_ROWS,
    calls_of,
    checked_formulas,
    make_trainer,
    model_folder,
    noting,
    page_of,
    reward_model,
    tokenizer,
)

PAGE = GUIDES / "online_preference.md"
WALKTHROUGHS = [ROOT / "annotated_trainers" / f"{name}.md" for name in ("online_dpo", "xpo", "nash_md")]
TRAINERS = {
    "OnlineDPO": (OnlineDPOTrainer, OnlineDPOConfig),
    "XPO": (XPOTrainer, XPOConfig),
    "Nash-MD": (NashMDTrainer, NashMDConfig),
}
SEEDS = (0, 1, 2)
TOKENS = 6  # that every answer has

checkpoint = model_folder(initializer_range=0.2)


page = page_of(PAGE)


CALLED, CHECKED, checks = checked_formulas()
functions = noting(CALLED)
ERRORS: list[float] = []


@pytest.fixture(scope="module", autouse=True)
def summary():
    modules = (online_dpo, xpo, nash_md)
    before = [len(module.ERRORS) for module in modules]
    yield
    errors = ERRORS + [e for module, n in zip(modules, before, strict=True) for e in module.ERRORS[n:]]
    print(f"\n{len(CHECKED)} formulas, {len(errors)} comparisons with TRL, largest error {max(errors, default=0):.1e}")


def agree(ours, theirs) -> None:
    """With TRL."""
    ours, theirs = (torch.as_tensor(value).detach().double() for value in (ours, theirs))
    ERRORS.append(float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)))
    assert ERRORS[-1] < 1e-5


def close(ours, theirs, rel=1e-9) -> None:
    """With an exact computation."""
    ours, theirs = torch.as_tensor(ours).detach(), torch.as_tensor(theirs).detach()
    assert float((ours - theirs).abs().max()) <= rel * max(float(theirs.abs().max()), 1e-3)


def slope(value, of):
    return torch.autograd.grad(value, of, retain_graph=True)[0]


# --------------------------------------------------------------------------------------------- the trainers of TRL


@pytest.fixture(scope="module")
def misspelt(tmp_path_factory):
    """The configs with a loss type that nobody knows. Made before the trainers: a new config resets accelerate's state."""
    folder = str(tmp_path_factory.mktemp("none"))
    return [kind(output_dir=folder, use_cpu=True, bf16=False, loss_type="hinge") for _, kind in TRAINERS.values()]


@pytest.fixture(scope="module")
def trainers(checkpoint, misspelt, tmp_path_factory):
    """One trainer of each kind, for tests that call its methods. Every answer has the same number of tokens."""
    made = {}
    for name, (trainer, settings) in TRAINERS.items():
        own = {} if name == "Nash-MD" else {"reward_processing_classes": tokenizer()}
        made[name] = make_trainer(
            trainer,
            settings,
            tmp_path_factory.mktemp("run"),
            QUESTION_ROWS,
            model=AutoModelForCausalLM.from_pretrained(checkpoint),
            reward_funcs=reward_model(),
            per_device_train_batch_size=4,
            max_new_tokens=TOKENS,
            generation_kwargs={"min_new_tokens": TOKENS, "use_cache": False},
            **own,
        )
    return made


@checks("online-dpo-loss", "online-ipo-loss")
def test_the_losses_of_online_dpo_equal_trl(trainers, functions):
    for seed, kind in itertools.product(SEEDS, ("sigmoid", "ipo")):
        step = online_dpo.Step(trainers["OnlineDPO"], seed, pairs=3 + seed, loss_type=kind, _beta=0.3)
        loss = functions["online_dpo_loss" if kind == "sigmoid" else "online_ipo_loss"]
        ours = loss(step.logps, step.ref_logps, step.mask, step.rewards, beta=0.3)
        agree(ours, step.loss)
        agree(slope(ours, step.logits), step.gradient)


@checks("weighted-reward")
def test_the_reward_of_online_dpo_equals_trl(trainers, functions):
    cut = []
    for seed in SEEDS:
        values = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        values[seed, 1] = math.nan
        weights = torch.tensor([1.0, 0.5, -2.0])
        settings = {"reward_weights": weights, "missing_eos_penalty": 0.7}
        step = online_dpo.Step(trainers["OnlineDPO"], seed, values=values, **settings)
        agree(functions["weighted_reward"](values, weights, step.ended, penalty=0.7), step.rewards)
        cut += step.ended.tolist()
    assert set(cut) == {True, False}


@checks("reward-to-pair")
def test_the_pair_of_online_dpo_equals_trl_also_where_rewards_are_equal(trainers, functions):
    ties = 0
    for seed in SEEDS:
        values = torch.randint(0, 2, (10, 1), generator=torch.Generator().manual_seed(seed)).float()
        step = online_dpo.Step(trainers["OnlineDPO"], seed, pairs=5, values=values)
        chosen, rejected = functions["reward_to_pair"](step.rewards)
        sums = (step.logps * step.mask).sum(1)
        agree(sums[chosen], step.gathered[2])
        agree(sums[rejected], step.gathered[3])
        ties += int((values[:5] == values[5:]).sum())
        assert (chosen[values[:5, 0] == values[5:, 0]] < 5).all()
        assert step.gradient.abs().amax((1, 2)).min() > 0  # ties too are trained on
    assert ties


def test_a_crowd_of_orderly_people_can_go_in_a_circle():
    crowd = ("abc", "bca", "cab")
    for first, second in ("ab", "bc", "ca"):
        assert sum(ranks.index(first) < ranks.index(second) for ranks in crowd) == 2


def test_the_end_token_is_looked_for_in_the_prompt_too_by_two_of_the_three(trainers):
    """Every prompt ends its user's turn with the end token, and no answer has one."""
    prompts = [row["prompt"] for row in QUESTION_ROWS[:4]]
    for name, pays in (("OnlineDPO", True), ("XPO", False), ("Nash-MD", False)):
        scores = []
        for penalty in (None, 100.0):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(trainers[name], "stats", {key: [] for key in trainers[name].stats})
                patch.setattr(trainers[name].args, "missing_eos_penalty", penalty)
                torch.manual_seed(0)
                trainers[name].training_step(trainers[name].model, {"prompt": prompts})
                keys = {"OnlineDPO": "objective/scores", "XPO": "objective/model_scores", "Nash-MD": "rewards/chosen"}
                scores.append(trainers[name].stats[keys[name]][0])
        assert scores[0] - scores[1] == pytest.approx(100.0 if pays else 0.0, abs=1e-3), name


def test_a_penalty_that_both_answers_pay_changes_no_pair(page):
    scores, cut = torch.tensor([[1.0], [0.5], [0.2], [0.9]]), torch.zeros(4, dtype=torch.bool)
    pairs = [page["reward_to_pair"](page["weighted_reward"](scores, torch.ones(1), cut, p))[0] for p in (0.0, 0.7)]
    assert torch.equal(*pairs)


def test_only_the_order_of_two_rewards_counts(trainers):
    values = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    lead = 0.01 * (values[:4] > values[4:]) - 0.005
    losses = [online_dpo.Step(trainers["OnlineDPO"], values=v).loss for v in (values, torch.cat([lead, -lead]))]
    assert losses[0] == losses[1]
    won = [xpo.Step(trainers["XPO"], scores=s).loss for s in ([[9.0] * 4, [1.0] * 4], [[1.01] * 4, [1.0] * 4])]
    assert won[0] == won[1]


@checks("xpo-loss", "xpo-ipo-loss")
def test_the_losses_of_xpo_equal_trl(trainers, functions):
    wins = []
    for seed, kind in itertools.product(SEEDS, ("sigmoid", "ipo")):
        step = xpo.Step(trainers["XPO"], seed, pairs=3 + seed, loss_type=kind, _beta=0.3, _alpha=0.02)
        loss = functions["xpo_loss" if kind == "sigmoid" else "xpo_ipo_loss"]
        ours = loss(step.logps, step.ref_logps, step.own_wins, alpha=0.02, beta=0.3)
        agree(ours, step.loss)
        for mine, theirs in zip(torch.autograd.grad(ours, step.logits), step.gradient, strict=True):
            agree(mine, theirs)
        wins += step.own_wins.tolist()
    assert set(wins) == {True, False}


@checks("xpo-slope", "xpo-balance")
def test_the_slope_and_the_balance_of_xpo_equal_trl(functions):
    xpo.test_the_slope_on_the_page_is_what_trl_has(functions)
    xpo.test_the_balance_on_the_page_is_where_the_gradient_is_0(functions)


def test_a_tie_of_xpo_goes_to_the_policy(trainers):
    tie, won = (xpo.Step(trainers["XPO"], scores=[[own] * 4, [1.0] * 4]) for own in (1.0, 2.0))
    assert tie.loss == won.loss


def test_xpo_uses_a_pair_for_one_step_and_forgets_it(trainers):
    alone = xpo.Step(trainers["XPO"], seed=2).gradient
    xpo.Step(trainers["XPO"], seed=1)
    after = xpo.Step(trainers["XPO"], seed=2).gradient
    assert all(torch.equal(a, b) for a, b in zip(alone, after, strict=True))


@checks("nash-md-win", "nash-md-loss", "nash-md-advantage")
def test_probability_advantage_and_loss_of_nash_md_equal_trl(trainers, functions):
    nash_md.test_the_advantage_on_the_page_is_the_slope_of_trls_loss(functions)
    for seed, pairs in itertools.product(SEEDS, (1, 5)):
        step = nash_md.Step(trainers["Nash-MD"], seed, pairs, _beta=0.3)
        win = functions["nash_md_win"](*step.scores)
        agree(win.mean(), step.logged["rewards/probabilities"])
        ours = functions["nash_md_loss"](step.logps, step.ref_logps, step.mask, win, beta=0.3)
        agree(ours, step.loss)
        agree(slope(ours, step.logits), step.gradient)


@checks("geometric-mixture")
def test_the_mixture_equals_trl_at_each_position(functions):
    nash_md.test_the_mixture_on_the_page_is_what_trl_samples_from(functions)


def game(seed, size=4):
    """Weights of a policy (with gradient), the reference's log-probabilities, and a preference that need not be orderly."""
    dice = torch.Generator().manual_seed(seed)
    theta, ref = torch.randn(2, size, generator=dice, dtype=torch.double)
    upper = torch.rand(size, size, generator=dice, dtype=torch.double).triu(1)
    wins = upper + (1 - upper).triu(1).T + torch.eye(size, dtype=torch.double) / 2
    close(wins + wins.T, torch.ones(size, size, dtype=torch.double))
    return theta.requires_grad_(), ref.log_softmax(0), wins


@checks("nash-md-gradient", "geometric-mixture")
@pytest.mark.parametrize("seed", SEEDS)
def test_the_mean_gradient_of_trls_loss_over_all_answers_is_that_of_the_game(functions, seed):
    theta, ref_logps, wins = game(seed)
    logps = theta.log_softmax(0)
    for coef, beta in itertools.product((0.0, 0.3, 1.0), (0.0, 0.1, 0.7)):
        rival = functions["geometric_mixture"](logps.detach(), ref_logps, coef).exp()
        total = 0.0
        for y, probability in enumerate(logps.detach().exp()):
            this = SimpleNamespace(beta=beta)
            loss, *_ = NashMDTrainer._compute_losses(
                this, logps[y].view(1, 1), ref_logps[y].view(1, 1), wins[y] @ rival
            )
            total = total + probability * slope(loss, theta)
        ours = functions["nash_md_gradient"](theta, ref_logps, wins, coef, beta)
        agree(ours, total)
        payoff = functions["regularized_game"](logps.exp(), rival, ref_logps.exp(), wins, beta)
        close(ours, -slope(payoff, theta))


# ------------------------------------------------------------------------------------------------------------ exact sums


def drawn(loss, logps, ref_logps, wins, pairs, beta):
    """The mean of a loss of OnlineDPO over all pairs of completions and both outcomes of the comparison."""
    total = 0.0
    for a, b in itertools.product(range(len(logps)), repeat=2):
        for reward, chance in ((1.0, wins[a, b]), (0.0, wins[b, a])):
            two = [values[[a, b]][:, None] for values in (logps, ref_logps)]
            one = loss(*two, torch.ones(2, 1), torch.tensor([reward, 1 - reward]), beta=beta)
            total = total + pairs[a, b] * chance * one
    return total


@checks("expected-pair-loss", "pair-slope")
@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_over_a_distribution_is_the_mean_over_all_pairs_and_outcomes(functions, seed):
    theta, ref_logps, wins = game(seed)
    logps = theta.log_softmax(0)
    pairs = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)).double()
    pairs = pairs / pairs.sum()
    ours = functions["expected_pair_loss"](logps, ref_logps, pairs, wins, 0.3)
    close(ours, drawn(functions["online_dpo_loss"], logps, ref_logps, wins, pairs, 0.3))
    # and the slopes of the pairs make up its gradient
    h = logps - ref_logps
    slopes = pairs * functions["pair_slope"](h[:, None] - h[None, :], wins, 0.3)
    close(slopes.sum(1) - slopes.sum(0), slope(ours, theta))


@checks("pairs-needed")
def test_the_number_of_pairs_needed_is_that_of_many_fits_to_drawn_pairs(functions, page):
    rewards, ref, beta = page["REWARDS"], page["START"], 1.0
    best, wins, dice = (ref.log() + rewards / beta).softmax(0), page["DRAWN"], torch.Generator().manual_seed(0)
    for first, second in ((ref, ref), (best, ref)):
        pairs, many, fits = first[:, None] * second[None, :], 4000, 400
        drawn_pairs = torch.multinomial(pairs.flatten(), many * fits, True, generator=dice)
        won = torch.rand(len(drawn_pairs), generator=dice, dtype=torch.double) < wins.flatten()[drawn_pairs]
        a, b = drawn_pairs // 4, drawn_pairs % 4
        fit = torch.arange(fits).repeat_interleave(many)
        beat = torch.zeros(fits * 16).double()  # how often a beat b, in each fit
        beat.index_add_(0, fit * 16 + torch.where(won, 4 * a + b, 4 * b + a), torch.ones(len(fit)).double())
        beat = beat.view(fits, 4, 4) * (1 - torch.eye(4))
        asked, h = beat + beat.transpose(1, 2), (rewards - rewards[3]).expand(fits, 4)
        for _ in range(12):  # Newton's method on DPO's loss; the last weight is held
            claimed = torch.sigmoid(beta * (h[:, :, None] - h[:, None, :]))
            told = asked * claimed * (1 - claimed) * beta**2
            curved = torch.diag_embed(told.sum(2)) - told
            step = torch.linalg.solve(curved[:, :3, :3], beta * (beat - asked * claimed).sum(2)[:, :3])
            h = h + torch.nn.functional.pad(step, (0, 1))
        fitted = (ref.log() + h).log_softmax(1)
        seen = many * (fitted.exp() * (fitted - best.log())).sum(1).mean()
        assert float(functions["pairs_needed"](pairs, wins, best)) == pytest.approx(float(seen), rel=0.12)
    for mild, start in ((True, [0.25] * 4), (True, [0.1, 0.7, 0.1, 0.1]), (False, [0.01, 0.97, 0.01, 0.01])):
        ref = torch.tensor(start, dtype=torch.double)
        best = (ref.log() + rewards).softmax(0)
        needed = [page["pairs_needed"](a[:, None] * b, wins, best) for a, b in ((ref, ref), (best, best), (best, ref))]
        assert (needed[0] < needed[1]) if mild else (needed[0] > 10 * needed[1])
        assert needed[2] < 1.4 * min(needed[:2])
    even = torch.full((2, 2), 0.25).double()
    close(functions["pairs_needed"](even, torch.full((2, 2), 0.5).double(), torch.full((2,), 0.5).double()), 1.0)


@checks("tie-pull")
def test_the_pull_of_ties_is_the_mean_over_both_orders(functions):
    for margin, beta in itertools.product((-7.0, 0.0, 0.3, 30.0), (0.1, 0.5)):
        m = torch.tensor(margin, dtype=torch.double, requires_grad=True)
        losses = []
        for h in (torch.stack([m, torch.zeros_like(m)]), torch.stack([torch.zeros_like(m), m])):
            given = h[:, None], torch.zeros(2, 1), torch.ones(2, 1), torch.ones(2)
            losses.append(functions["online_dpo_loss"](*given, beta=beta))
        close(functions["tie_pull"](m, beta), slope(sum(losses) / 2, m))


@checks("exploration-mean", "exploration-gradient", "promised-value")
@pytest.mark.parametrize("seed", SEEDS)
def test_exploration_is_distance_from_the_reference_and_promised_value(functions, seed):
    theta, ref_logps, _ = game(seed, 5)
    logps, ref = theta.log_softmax(0), ref_logps.exp()
    mean = sum(ref[y] * logps[y] for y in range(5))
    close(functions["exploration_mean"](logps, ref_logps), mean)
    close(functions["exploration_gradient"](logps, ref_logps), slope(mean, theta))
    assert functions["exploration_gradient"](ref_logps, ref_logps).abs().max() == 0  # before the first step
    for beta in (0.1, 1.0):
        implied = beta * (logps - ref_logps)
        implied = (implied - ref @ implied).detach()
        best = (ref_logps + implied / beta).softmax(0)
        promised = best @ implied - beta * (best * (best.log() - ref_logps)).sum()  # reward minus penalty of the best
        close(functions["promised_value"](logps, ref_logps, beta), promised)
        close(promised, beta * (ref * (ref_logps - logps)).sum())
        close(best, logps.exp())


def test_a_step_of_the_exploration_raises_what_has_risen(page):
    logps, ref_logps = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]], dtype=torch.double).log()
    step = -page["exploration_gradient"](logps, ref_logps)
    assert step[0] > 0 > step[1] and abs(step[2]) < 1e-12


def random_policies(size, count=300, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.double).mul(3).softmax(1)


@checks("preference-of-policies", "exploitability", "regularized-game")
@pytest.mark.parametrize("seed", SEEDS)
def test_the_game_is_counted_out_and_fair(functions, seed):
    theta, ref_logps, wins = game(seed)
    probs, rival, ref = theta.detach().softmax(0), random_policies(4, 1, seed)[0], ref_logps.exp()
    count = sum(probs[a] * rival[b] * wins[a, b] for a, b in itertools.product(range(4), repeat=2))
    beats = functions["preference_of_policies"]
    close(beats(probs, rival, wins), count)
    close(functions["exploitability"](probs, wins), max(beats(one, probs, wins) for one in torch.eye(4).double()) - 0.5)
    assert all(beats(p, probs, wins) - 0.5 <= functions["exploitability"](probs, wins) for p in random_policies(4))
    kl = [sum(p[y] * math.log(p[y] / ref[y]) for y in range(4)) for p in (probs, rival)]
    there, back = functions["regularized_game"], functions["regularized_game"]
    close(there(probs, rival, ref, wins, 0.3), count - 0.3 * kl[0] + 0.3 * kl[1])
    close(there(probs, rival, ref, wins, 0.3) + back(rival, probs, ref, wins, 0.3), 1.0)


@checks("regularized-response", "regularized-gap")
@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_answer_with_a_penalty_is_best_and_the_gap_is_what_it_gains(functions, seed):
    theta, ref_logps, wins = game(seed)
    probs, ref = theta.detach().softmax(0), ref_logps.exp()
    for beta in (0.05, 0.3):
        best = functions["regularized_response"](probs, ref, wins, beta)
        gained = functions["regularized_game"](best, probs, ref, wins, beta) - 0.5
        close(functions["regularized_gap"](probs, ref, wins, beta), gained)
        assert all(
            functions["regularized_game"](p, probs, ref, wins, beta) - 0.5 < gained + 1e-12 for p in random_policies(4)
        )
        weights = best.log().requires_grad_()
        payoff = functions["regularized_game"](weights.softmax(0), probs, ref, wins, beta)
        assert slope(payoff, weights).abs().max() < 1e-12


@checks("log-odds-circle", "circle-equilibrium", "exploitability")
def test_rewards_close_every_circle_and_the_equilibrium_of_a_circle_cannot_be_beaten(functions):
    dice = torch.Generator().manual_seed(0)
    for _ in range(5):
        rewards = torch.randn(3, generator=dice, dtype=torch.double)
        scored = torch.stack([functions["nash_md_win"](one, rewards) for one in rewards])
        assert functions["log_odds_circle"](scored).abs() < 1e-12
        ab, bc, ca = 0.5 + torch.rand(3, generator=dice, dtype=torch.double) / 2
        wins = torch.tensor([[0.5, ab, 1 - ca], [1 - ab, 0.5, bc], [ca, 1 - bc, 0.5]], dtype=torch.double)
        close(functions["log_odds_circle"](wins), sum((p / (1 - p)).log() for p in (ab, bc, ca)))
        assert functions["log_odds_circle"](wins) > 0
        assert functions["exploitability"](functions["circle_equilibrium"](wins), wins) < 1e-12


@checks("self-play-step", "mirror-step", "mixture-compromise", "geometric-mixture")
@pytest.mark.parametrize("seed", SEEDS)
def test_steps_and_mixture_are_the_optima_that_they_are_said_to_be(functions, seed):
    theta, ref_logps, wins = game(seed)
    probs, ref = theta.detach().softmax(0), ref_logps.exp()

    def pays(p, start, rival, size):  # what a step of mirror descent makes largest
        return size * p @ wins @ rival - (p * (p / start).log()).sum()

    others = random_policies(4)
    for size in (0.2, 3.0):
        stepped = functions["self_play_step"](probs, wins, size)
        assert max(pays(p, probs, probs, size) for p in others) < pays(stepped, probs, probs, size)
        close(stepped, probs * (size * wins @ probs).exp() / (probs * (size * wins @ probs).exp()).sum())
    for coef in (0.1, 0.5):
        mixture = functions["geometric_mixture"](probs.log(), ref_logps, coef).exp()
        least = functions["mixture_compromise"](mixture, probs, ref, coef)
        assert min(functions["mixture_compromise"](p, probs, ref, coef) for p in others) > least
        close(least, -torch.log((probs ** (1 - coef) * ref**coef).sum()))
        stepped = functions["mirror_step"](probs, ref, wins, coef, 0.2)
        assert max(pays(p, mixture, mixture, coef / 0.2) for p in others) < pays(stepped, mixture, mixture, coef / 0.2)
        weights = stepped.log().requires_grad_()
        assert slope(pays(weights.softmax(0), mixture, mixture, coef / 0.2), weights).abs().max() < 1e-12


@checks("online-ipo-gradient")
@pytest.mark.parametrize("seed", SEEDS)
def test_the_mean_gradient_of_online_ipo_is_that_of_self_play(functions, seed):
    theta, ref_logps, wins = game(seed)
    logps = theta.log_softmax(0)
    probs = logps.exp().detach()
    for beta in (0.1, 0.7):
        loss = drawn(functions["online_ipo_loss"], logps, ref_logps, wins, probs[:, None] * probs[None, :], beta)
        close(functions["online_ipo_gradient"](theta, ref_logps, wins, beta), slope(loss, theta))


# ------------------------------------------------------------------------------------------------ claims about the worlds


def test_from_the_file_the_completions_never_asked_about_get_what_is_left_over(page):
    probs = page["settle"](page["WRITERS"]["a file of a, b"], page["DRAWN"])
    unscaled = torch.tensor([0.1 * 3, 0.7 / 3, 0.1, 0.1], dtype=torch.double)
    close(probs, unscaled / unscaled.sum(), rel=1e-6)
    assert float(unscaled.sum()) == pytest.approx(0.733, abs=5e-4) and float(probs[2]) == pytest.approx(0.136, abs=5e-4)


def test_with_chance_and_all_pairs_the_writer_makes_no_difference(page):
    best = (page["START"].log() + page["REWARDS"]).softmax(0)
    for pairs in ("the reference", "the policy"):  # where the policy is the best one, no pair pushes any more
        weights = best.log().requires_grad_()
        given = page["START"].log(), page["WRITERS"][pairs](best.detach()), page["DRAWN"], 1.0
        assert slope(page["expected_pair_loss"](weights.log_softmax(0), *given), weights).abs().max() < 1e-12
    even = page["settle"](lambda _: torch.full((4, 4), 1 / 16).double(), page["DRAWN"], steps=300)
    close(even, best, rel=1e-4)
    close(page["settle"](page["WRITERS"]["the policy"], page["DRAWN"], steps=1500), best, rel=1e-2)


def test_with_shared_weights_the_writer_makes_a_difference_and_neither_is_better_by_principle(page, monkeypatch):
    ahead = {}
    for start in (page["START"], torch.tensor([0.05, 0.3, 0.6, 0.05], dtype=torch.double)):
        monkeypatch.setitem(page, "START", start)
        for writer in ("the reference", "the policy"):
            probs = page["settle"](page["WRITERS"][writer], page["DRAWN"], page["SHARED"], steps=500)
            ahead[writer] = float(probs @ page["REWARDS"] - (probs * (probs / start).log()).sum())
        better = max(ahead, key=ahead.get)
        assert better == ("the policy" if start[2] == 0.6 else "the reference")
        assert abs(ahead["the reference"] - ahead["the policy"]) > 0.01


def test_a_judge_without_chance_has_no_resting_place(page):
    ends = [page["settle"](page["WRITERS"]["the policy"], page["CERTAIN"], steps=n)[3] for n in (100, 500, 1500)]
    assert 0.94 < ends[0] < ends[1] < ends[2] < 1
    # no finite margin is enough
    assert page["pair_slope"](torch.tensor(30.0, dtype=torch.double), torch.tensor(1.0), 1.0) < 0


def test_exploration_buys_reward_beyond_the_point_where_it_pays(page):
    def at(alpha):
        probs = page["settle"](lambda p: p[:, None] * page["START"][None, :], page["DRAWN"], alpha=alpha)
        kl = (probs * (probs / page["START"]).log()).sum()
        return float(probs @ page["REWARDS"]), float(kl), float(probs @ page["REWARDS"] - kl)

    rows = [at(alpha) for alpha in (0.0, 0.01, 0.03)]
    for column, sign in ((0, 1), (1, 1), (2, -1)):
        assert sign * rows[0][column] < sign * rows[1][column] < sign * rows[2][column]


def test_the_best_rewards_for_the_circle_get_one_of_three_wrong(page):
    wins, claimed = page["CIRCLE"], page["claimed"]
    close(claimed.sum(1), wins.sum(1), rel=1e-9)  # where the log-likelihood is largest
    wrong = [(i, j) for i, j in ((0, 1), (1, 2), (2, 0)) if (wins[i, j] > 0.5) != (claimed[i, j] > 0.5)]
    assert wrong == [(2, 0)]
    assert page["fitted"].argmax() == 0


def test_self_play_never_comes_closer_and_its_average_does(page):
    probs, nash, away = page["CAUTIOUS"], page["nash"], []
    for _ in range(2000):
        probs = page["self_play_step"](probs, page["CIRCLE"], 0.2)
        away.append(float((nash * (nash / probs).log()).sum()))
    assert all(later > earlier for earlier, later in itertools.pairwise(away))
    assert page["exploitability"](page["total"] / 2000, page["CIRCLE"]) < 0.01


def rests(page, coef, beta):
    """Where mirror descent comes to rest."""
    probs = page["CAUTIOUS"]
    for _ in range(1500):
        probs = page["mirror_step"](probs, page["CAUTIOUS"], page["CIRCLE"], coef, beta)
    close(page["mirror_step"](probs, page["CAUTIOUS"], page["CIRCLE"], coef, beta), probs, rel=1e-6)
    return probs


def test_a_policy_at_rest_is_the_best_answer_to_the_mixture(page):
    gaps = []
    for coef in (0.02, 0.1, 0.5, 1.0):
        probs, ref = rests(page, coef, 0.1), page["CAUTIOUS"]
        rival = page["geometric_mixture"](probs.log(), ref.log(), coef).exp()
        close(page["regularized_response"](rival, ref, page["CIRCLE"], 0.1), probs, rel=1e-5)
        assert page["nash_md_gradient"](probs.log(), ref.log(), page["CIRCLE"], coef, 0.1).abs().max() < 1e-6
        gaps.append(float(page["regularized_gap"](probs, ref, page["CIRCLE"], 0.1)))
    assert 0 < gaps[0] < 1e-5 and gaps == sorted(gaps)
    close(rests(page, 1.0, 0.1), page["regularized_response"](page["CAUTIOUS"], page["CAUTIOUS"], page["CIRCLE"], 0.1))
    own = page["equilibrium"](page["CIRCLE"], page["CAUTIOUS"], 0.1)
    close(page["regularized_response"](own, page["CAUTIOUS"], page["CIRCLE"], 0.1), own)


def test_without_the_penalty_gradient_steps_rest_if_the_rival_is_a_mixture_and_the_mixture_is_the_equilibrium(page):
    wins, cautious = page["CIRCLE"], page["CAUTIOUS"]

    def steps(coef, rate, count, start):
        theta, seen = start.log(), []
        for _ in range(count):
            theta = theta - rate * page["nash_md_gradient"](theta, cautious.log(), wins, coef, 0.0)
            seen.append(theta.softmax(0))
        return torch.stack(seen)

    alone = steps(0.0, 0.3, 4000, cautious)
    assert (alone[2000:] - alone[-1]).abs().max() > 0.3
    for start in (cautious, torch.tensor([0.6, 0.3, 0.1], dtype=cautious.dtype)):
        seen = steps(0.5, 5, 12000, start)
        assert (seen[10000:] - seen[-1]).abs().max() < 1e-3
        assert (seen[1000:4000] - seen[-1]).abs().max() > 0.05  # it takes thousands of steps
        rival = page["geometric_mixture"](seen[-1].log(), cautious.log(), 0.5).exp()
        assert (wins @ rival - 0.5).abs().max() < 1e-3  # no answer beats the mixture: the equilibrium without penalty
        assert (wins @ seen[-1] - 0.5).abs().max() > 0.1


# ------------------------------------------------------------------------------------- sentences that begin with In TRL


def test_ipo_takes_sums_here_and_means_in_dpo(page):
    guide = run_page(GUIDES / "preference_losses.md").namespace
    h_w, h_l, lens = torch.tensor([2.0]), torch.tensor([-1.0]), torch.tensor([2])
    given = torch.stack([h_w, h_l]), torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([1.0, 0.0])
    ours = page["online_ipo_loss"](*given, beta=0.1)
    parameters = {"chosen_logratios": h_w, "rejected_logratios": h_l, "chosen_lens": lens, "rejected_lens": lens}
    wanted = inspect.signature(guide["dpo_ipo"]).parameters
    of_dpo = guide["dpo_ipo"](**{k: v for k, v in {**parameters, "beta": 0.1}.items() if k in wanted})
    assert float(ours) == 4.0 and float(of_dpo) == (3 / 2 - 5) ** 2  # both lengths are 2


def compared_in(trainer) -> set[str]:
    """The loss types that the source of a trainer's own methods tells apart."""
    found = set()
    for name, value in vars(trainer).items():
        if inspect.isfunction(value) and name != "__init__":
            found |= set(re.findall(r'self\.args\.loss_type == "(\w+)"', inspect.getsource(value)))
    return found


def test_the_table_of_loss_types_is_trls_and_each_has_a_formula():
    rows = {row["`loss_type`"].split("`")[1]: row for row in table("`loss_type`")}
    named = {found.function for found in formulas(PAGE)}
    for name, (trainer, settings) in TRAINERS.items():
        assert compared_in(trainer) == (set() if name == "Nash-MD" else set(rows))
        default = settings.__dataclass_fields__["loss_type"].default
        assert [kind for kind, row in rows.items() if "(default)" in row["`loss_type`"]] == [default]
        assert {row[name].strip("`") for row in rows.values()} <= named & {n.replace("-", "_") for n in CHECKED}
    assert set(rows) == {"sigmoid", "ipo"}


def test_nash_md_does_not_read_its_loss_type(trainers):
    losses = set()
    for kind in ("sigmoid", "ipo", "hinge"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainers["Nash-MD"].args, "loss_type", kind)
            losses.add(float(nash_md.Step(trainers["Nash-MD"], seed=3).loss))
    assert len(losses) == 1


def test_another_name_passes_the_configs_and_ends_the_first_step(trainers, misspelt):
    assert [args.loss_type for args in misspelt] == ["hinge"] * 3
    for name, module in (("OnlineDPO", online_dpo), ("XPO", xpo)):
        with pytest.raises(NotImplementedError):
            module.Step(trainers[name], loss_type="hinge")


def test_the_rivals_answer_is_not_trained_on(trainers):
    with pytest.MonkeyPatch.context() as patch:
        trainer, scored = trainers["Nash-MD"], []
        compute = trainer._compute_logprobs
        patch.setattr(trainer, "_compute_logprobs", lambda m, data, n: scored.append(data) or compute(m, data, n))
        step = nash_md.Step(trainer, seed=0)
    (data,) = scored
    assert torch.equal(data["input_ids"][:, 3:], step.ids)


def test_a_reward_function_of_online_dpo_may_go_in_circles(trainers):
    beats = {(5, 6), (6, 7), (7, 5)}  # each token beats the next

    def judge(completion_ids, **_):
        first, second = completion_ids[: len(completion_ids) // 2], completion_ids[len(completion_ids) // 2 :]
        won = [float((a[0], b[0]) in beats) for a, b in zip(first, second, strict=True)]
        return won + [1 - w for w in won]

    trainer = trainers["OnlineDPO"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("reward_funcs", [judge]), ("reward_processing_classes", [None])):
            patch.setattr(trainer, name, value)
        patch.setattr(trainer, "reward_weights", torch.ones(1))
        ids = [[5], [6], [7], [6], [7], [5]]
        given = {"prompts": ["1"] * 6, "completions": ["x"] * 6, "completion_ids_list": ids}
        rewards = trainer._calculate_rewards_from_functions(**given)
    assert rewards.tolist() == [1, 1, 1, 0, 0, 0]


# ---------------------------------------------------------------------------------------------------- the tables of the end


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_costs_what_the_page_says(trainers, page, name):
    trainer, batch = trainers[name], {"prompt": [row["prompt"] for row in QUESTION_ROWS[:4]]}
    ours, theirs, judge = (calls_of(m) for m in (trainer.model, trainer.ref_model, reward_of(trainer)))
    written = []
    with pytest.MonkeyPatch.context() as patch:
        method = "_generate" if name == "OnlineDPO" else "_generate_completions"
        generate = getattr(trainer, method)

        def kept(*args, **kwargs):
            written.append(generate(*args, **kwargs))
            return written[-1]

        patch.setattr(trainer, method, kept)
        trainer.training_step(trainer.model, batch)
    (output,) = written
    answers = len(output[2]) if name == "OnlineDPO" else sum(len(ids) for ids in output)
    trained = sum(call.gradient for call in ours)
    found = (len(ours) - trained, trained, len(theirs), len(judge), answers)
    assert found == page["COSTS"][name](4, TOKENS)


def reward_of(trainer):
    models = trainer.reward_funcs if isinstance(trainer.reward_funcs, list) else [trainer.reward_funcs]
    return models[0].model


def means_of(step, name, beta=0.3) -> dict:
    """The cells of the table of keys, and what they are in numbers, for one step of a trainer."""
    if name == "OnlineDPO":
        h, sums = (((v) * step.mask).sum(1) for v in (step.logps - step.ref_logps, step.logps))
        first = step.rewards[:4] >= step.rewards[4:]
        (h_w, h_l), (w, lose), (r_w, r_l) = (
            (torch.where(first, *v.chunk(2)), torch.where(first, *v.chunk(2)[::-1])) for v in (h, sums, step.rewards)
        )
        padded = (step.logps - step.ref_logps).sum(1).mean()
        return {
            "rewards/chosen": (r"$\beta h_w$", beta * h_w),
            "rewards/rejected": (r"$\beta h_l$", beta * h_l),
            "rewards/margins": (r"$\beta (h_w - h_l)$", beta * (h_w - h_l)),
            "rewards/accuracies": ("share of margins above 0", (h_w > h_l).double()),
            "logps/chosen": (r"$\log \pi_\theta(y_w \mid x)$", w),
            "logps/rejected": (r"$\log \pi_\theta(y_l \mid x)$", lose),
            "objective/entropy": (r"$-\log \pi_\theta$ of all answers, with padding", -step.logps.sum(1)),
            "objective/kl": ("$h$ of all answers, with padding", padded),
            "objective/non_score_reward": (r"$-\beta$ times the line above", -beta * padded),
            "objective/scores": ("score of all answers", step.rewards),
            "objective/rlhf_reward": (r"score minus $\beta$ times `objective/kl`", step.rewards.mean() - beta * padded),
            "objective/scores_margin": ("score of winner minus loser", r_w - r_l),
            "val/contain_eos_token": ("share of answers that ended", step.ended.double()),
            "beta": (r"$\beta$", beta),
        }
    if name == "XPO":
        h, wins = step.logps - step.ref_logps, step.own_wins
        (h_w, h_l), (w, lose), (ref_w, ref_l) = (
            (torch.where(wins, *v), torch.where(wins, v[1], v[0])) for v in (h, step.logps, step.ref_logps)
        )
        both = r"$\log \pi_\theta(y_{0} \mid x) + \log \pi_{{\mathrm{{ref}}}}(y_{0} \mid x)$"
        return {
            "rewards/chosen": (r"$\beta h_w$", beta * h_w),
            "rewards/rejected": (r"$\beta h_l$", beta * h_l),
            "rewards/margins": (r"$\beta (h_w - h_l)$", beta * (h_w - h_l)),
            "rewards/accuracies": ("share of margins above 0", (h_w > h_l).double()),
            "logps/chosen": (both.format("w"), w + ref_w),
            "logps/rejected": (both.format("l"), lose + ref_l),
            "objective/entropy": ("the same, without padding", -step.logps),
            "objective/kl": ("$h$ of all answers", h),
            "objective/scores_margin": ("score of policy minus reference", step.scores[0] - step.scores[1]),
            "objective/model_scores": ("score of the policy's answers", step.scores[0]),
            "objective/ref_scores": ("score of the reference's answers", step.scores[1]),
            "loss/dpo": ("the loss without exploration", torch.log1p((-beta * (h_w - h_l)).exp())),
            "loss/xpo": (r"$\alpha \log \pi_\theta(\tilde{y} \mid x)$", 0.02 * step.logps[1]),
            "val/model_contain_eos_token": ("of the policy's", step.ended[0].double()),
            "val/ref_contain_eos_token": ("of the reference's", step.ended[1].double()),
            "beta": (r"$\beta$", beta),
            "alpha": (r"$\alpha$", 0.02),
        }
    h, sums = (((v) * step.mask).sum(1) for v in (step.logps - step.ref_logps, step.logps))
    return {
        "rewards/chosen": ("score of the policy's answers", step.scores[0]),
        "rewards/rejected": ("score of the rival's answers", step.scores[1]),
        "rewards/margins": ("$h$ of the policy's answers", h),
        "rewards/accuracies": ("share of $h$ above 0", (h > 0).double()),
        "logps/chosen": (r"$\log \pi_\theta(y \mid x)$", sums),
        "logps/rejected": (r"$\log \pi_{\mathrm{ref}}(y \mid x)$, the same answers", sums - h),
        "objective/entropy": ("of the policy's answers, without padding", -sums),
        "rewards/probabilities": ("$P_i$", step.win),
        "loss/score": (r"$(P_i - \tfrac{1}{2}) \log \pi_\theta(y_i \mid x_i)$", (step.win - 0.5) * sums),
        "loss/kl": ("$h$ of the policy's answers", h),
        "val/model_contain_eos_token": ("of the policy's", step.ended),
        "val/ref_contain_eos_token": ("of the rival's", step.rival_ended),
        "beta": (r"$\beta$", beta),
        "mixture_coef": (r"$\eta$", 0.5),
    }


@pytest.mark.parametrize(("name", "module"), [("OnlineDPO", online_dpo), ("XPO", xpo), ("Nash-MD", nash_md)])
def test_every_key_is_what_the_table_says(trainers, name, module):
    settings = {"_beta": 0.3} | ({"_alpha": 0.02} if name == "XPO" else {})
    rows = {row["key"].strip("`"): row[name] for row in table("key")}
    for seed in SEEDS:
        step = module.Step(trainers[name], seed, **settings)
        cells = means_of(step, name)
        assert {key: cell for key, cell in rows.items() if cell != "-"} == {
            key: text for key, (text, _) in cells.items()
        }
        assert set(cells) == set(step.logged)
        for key, (_, value) in cells.items():
            agree(torch.as_tensor(value).double().mean(), step.logged[key])


def test_defaults_on_the_page_are_trls(page):
    def default(kind, name):
        value = kind.__dataclass_fields__[name]
        return value.default_factory()[0] if isinstance(value.default, type(inspect._empty)) or callable(
            value.default_factory
        ) else value.default  # fmt: skip

    assert {default(kind, "temperature") for _, kind in TRAINERS.values()} == {0.9}
    row = next(row for row in table("") if row[""] == "distance to the reference")
    assert f"`alpha` {default(XPOConfig, 'alpha')}" in row["XPO"]
    assert f"`beta` {default(NashMDConfig, 'beta')}" in row["Nash-MD"]
    for function, kind, names in (
        ("online_dpo_loss", OnlineDPOConfig, {"beta": "beta"}),
        ("online_ipo_loss", OnlineDPOConfig, {"beta": "beta"}),
        ("xpo_loss", XPOConfig, {"beta": "beta", "alpha": "alpha"}),
        ("xpo_ipo_loss", XPOConfig, {"beta": "beta", "alpha": "alpha"}),
        ("nash_md_loss", NashMDConfig, {"beta": "beta"}),
        ("geometric_mixture", NashMDConfig, {"mixture_coef": "mixture_coef"}),
        ("nash_md_gradient", NashMDConfig, {"mixture_coef": "mixture_coef", "beta": "beta"}),
    ):
        parameters = inspect.signature(page[function]).parameters
        assert {n: parameters[n].default for n in names} == {n: default(kind, o) for n, o in names.items()}, function


def test_numbers_of_the_text():
    text = " ".join(PAGE.read_text("utf-8").split())
    for sentence, value in (
        (r"$-\log \sigma(0.1 \cdot 3) = 0.554$", math.log1p(math.exp(-0.3))),
        (r"$\log 2 = 0.693$", math.log(2)),
        (r"= \log 54 = 3.99$", math.log(9 * 4 * 1.5)),
        (r"$\sigma(1) = 0.731$", 1 / (1 + math.exp(-1))),
        (r"$0.1 \cdot 2$ and leaves 0.031", 1 / (1 + math.exp(-1)) - 0.5 - 0.2),
        (r"0.031 \cdot 0.5 = 0.247$", 0.2311 + 0.0311 * 0.5),
        ("+ 0.5 \\cdot 0.4 = 0.5$", 0.375 * 0.5 + 0.125 * 0.9 + 0.5 * 0.4),
        ("times 0.01 that is -0.08", -8 * 0.01),
    ):
        assert sentence in text, sentence
        number = re.findall(r"-?\d+\.\d+", sentence)[-1]
        assert value == pytest.approx(float(number), abs=0.5001 * 10 ** -len(number.split(".")[1])), sentence
    assert "one part in 5000" in text and math.isclose(0.05 / 1e-5, 5000)


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
    assert {found.name for found in formulas(PAGE)} == set(CHECKED)


def test_formulas_are_written_as_in_the_walkthroughs():
    ours, shared = {found.name: found.latex.split() for found in formulas(PAGE)}, set()
    for path in WALKTHROUGHS:
        pattern = r"<!-- formula: ([a-z0-9-]+) -->\n(?:<!--.*?-->\n)?```math\n(.*?)```"
        for name, latex in re.findall(pattern, path.read_text("utf-8"), re.S):
            assert ours[name] == latex.split(), f"{name} differs from {path.name}"
            shared.add(name)
    assert len(shared) == 10  # all that the three pages have


def math_symbols(cell):
    return {symbol for latex in cell.split("$")[1::2] for symbol in symbols(latex)}


def test_every_symbol_is_in_the_notation_or_in_the_table_of_this_page():
    own = table("symbol")
    notation = re.findall(r"^\| (\$.*?) \|", (GUIDES / "notation.md").read_text("utf-8"), re.M)
    known = {symbol for cell in [*notation, *(row["symbol"] for row in own)] for symbol in math_symbols(cell)}
    lines = PAGE.read_text("utf-8").splitlines()
    used = {symbol for found in formulas(PAGE) for symbol in symbols(found.latex)}
    for line, latex in inline_math(PAGE):
        if not lines[line - 1].startswith("| $"):
            used |= symbols(latex)
    assert used <= known, sorted(used - known)
    code = "".join(fence.text for fence in fences(PAGE) if fence.lang == "python")
    for row in own:
        assert math_symbols(row["symbol"]) <= used, row["symbol"]
        for name in re.findall(r"`([^`]+)`", row["name in the code"]):
            start = r"\b" if name[0].isalnum() else ""
            assert re.search(start + re.escape(name), code), f"no block uses the name {name!r}"
