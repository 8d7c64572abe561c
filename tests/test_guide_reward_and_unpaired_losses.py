"""The formulas of reference_guides/reward_and_unpaired_losses.md against TRL's own trainers, and against exact sums.

What RewardTrainer, KTO, BCO, ORPO and CPO compute is compared by the tests of their walkthroughs, called here with the
functions of the guide: real methods of real trainers on random logits, value and gradient, to 1e-5 (relative, float32).
What TRL does not have is compared with autograd, or with a sum over everything. `pytest -s` prints the largest error.
"""

import inspect
import itertools
import math
import re

import pytest
import test_walkthrough_bco as bco
import test_walkthrough_cpo as cpo
import test_walkthrough_kto as kto
import test_walkthrough_orpo as orpo
import test_walkthrough_reward as reward
import torch
from markdown_pages import GUIDES, ROOT, fences, formulas, named_formulas
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.bco import BCOConfig, BCOTrainer
from trl.experimental.bco.bco_trainer import RunningMoments
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.orpo.orpo_trainer import log1mexp
from walkthrough_tools import (
    LABELLED,
    PAIRS,
    checked_formulas,
    comparisons,
    config,
    labelled,
    make_trainer,
    noting,
    page_of,
    save,
)

PAGE = GUIDES / "reward_and_unpaired_losses.md"
WALKTHROUGHS = [ROOT / "annotated_trainers" / f"{name}.md" for name in ("reward", "kto", "bco", "orpo", "cpo")]
TRAINERS = {
    "Reward": (RewardTrainer, RewardConfig),
    "KTO": (KTOTrainer, KTOConfig),
    "BCO": (BCOTrainer, BCOConfig),
    "ORPO": (ORPOTrainer, ORPOConfig),
    "CPO": (CPOTrainer, CPOConfig),
}
SEEDS = (0, 1, 2)


page = page_of(PAGE)
ERRORS, agree = comparisons()[:2]


@pytest.fixture(scope="module", autouse=True)
def summary():
    lists = [ERRORS, *(module.ERRORS for module in (reward, kto, bco, orpo, cpo))]
    before = [len(errors) for errors in lists]
    yield
    errors = [e for errors, n in zip(lists, before, strict=True) for e in errors[n:]]
    print(f"\n{len(CHECKED)} formulas, {len(errors)} comparisons with TRL, largest error {max(errors, default=0):.1e}")


CALLED, CHECKED, checks = checked_formulas()
functions = noting(CALLED)


def close(ours, theirs, rel=1e-9) -> None:
    ours, theirs = (torch.as_tensor(value, dtype=torch.double).detach() for value in (ours, theirs))
    assert float((ours - theirs).abs().max()) <= rel * max(float(theirs.abs().max()), 1e-3), (ours, theirs)


# --------------------------------------------------------------------------------------------- the trainers of TRL


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    torch.manual_seed(0)
    sizes = config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
    checkpoint = save(Qwen3ForCausalLM(Qwen3Config(**sizes)), tmp_path_factory.mktemp("model"))

    def build(name, rows=None, **more):
        more = {"per_device_train_batch_size": 4, **more}
        if name not in ("Reward", "KTO"):
            more["remove_unused_columns"] = False
        rows = rows or (LABELLED if name in ("KTO", "BCO") else PAIRS)
        return make_trainer(*TRAINERS[name], tmp_path_factory.mktemp("run"), rows, model=checkpoint, **more)

    return build


@pytest.fixture(scope="module")
def trainers(build):
    """One trainer of each kind for all tests; a test that changes one puts it back."""
    return {name: build(name) for name in TRAINERS}


def plain(fixture):
    """The function below a fixture of a walkthrough's test module."""
    return inspect.unwrap(fixture)


@pytest.fixture(scope="module")
def trl_loss(trainers):
    """TRL's loss on random logits (or scores) for each trainer, by the means of the walkthroughs' tests."""
    return {
        "Reward": plain(reward.trls_loss)(lambda: trainers["Reward"]),
        "KTO": plain(kto.random_loss)(lambda: trainers["KTO"]),
        "BCO": plain(bco.random_loss)(lambda: trainers["BCO"]),
        "ORPO": plain(orpo.random_loss)(trainers["ORPO"]),
        "CPO": plain(cpo.random_loss)(trainers["CPO"]),
    }


def of_pair(method, logps, **settings):
    """A loss of TRL for one pair from its two log-probabilities, and the slopes in them."""
    pair = [torch.tensor([value], requires_grad=True) for value in logps]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(method.__self__, name, value, raising=False)
        loss = method(*pair)[0].mean()
    return loss, torch.autograd.grad(loss, pair)


# ------------------------------------------------------------------------------------------------------ the reward model


@checks("pairwise-reward-loss", "pairwise-reward-slope")
def test_the_loss_of_a_reward_model_and_its_slope_equal_trl(functions, trl_loss):
    for case in reward.CASES:
        reward.test_the_key_equation_and_its_slope_are_what_trl_computes(functions, trl_loss["Reward"], *case)


@checks("margin-optimum")
def test_at_the_best_difference_trl_has_no_slope(functions, trl_loss):
    for (one, other), margin in itertools.product(((1, 1), (3, 2), (3, 1), (9, 1)), (0.0, 1.0, 3.0)):
        best = functions["margin_optimum"](one / (one + other), margin)
        first = torch.tensor([best] * one + [0.0] * other)
        second = torch.tensor([0.0] * one + [best] * other)
        for off, sign in ((0.0, 0), (0.1, 1), (-0.1, -1)):
            shift = torch.where(torch.arange(one + other) < one, off, 0.0)
            back = torch.where(torch.arange(one + other) < one, 0.0, off)
            up, down = trl_loss["Reward"](first + shift, second + back, torch.full_like(first, margin)).gradient
            slope = float(up[:one].sum() + down[one:].sum())  # in the score of the first answer
            assert abs(slope) < 1e-6 if sign == 0 else slope * sign > 1e-4


def test_a_margin_is_passed_on_where_readers_agree_and_lost_where_they_do_not(page):
    best = page["margin_optimum"]
    assert best(0.5, 3.0) == pytest.approx(0, abs=1e-12)
    assert best(0.99, 3.0) - best(0.99, 0.0) == pytest.approx(3, abs=0.03)
    assert best(0.9, 0.0) == pytest.approx(math.log(9))


def test_the_margin_column_is_used_without_being_asked_for(build, trainers):
    rows = [{**row, "margin": 1.5} for row in PAIRS]
    with_column, without = build("Reward", rows), trainers["Reward"]
    margins = [t.data_collator([t.train_dataset[0]]).get("margin") for t in (with_column, without)]
    assert margins[0].tolist() == [1.5]
    assert margins[1] is None
    assert "margin" not in RewardConfig.__dataclass_fields__
    reward.test_neither_accuracy_nor_margin_knows_the_margin_column(plain(reward.trls_loss)(lambda: trainers["Reward"]))


@checks("free-level")
def test_a_level_is_free_in_trl(functions, trl_loss):
    for seed, level in itertools.product(SEEDS, (-3.0, 0.5, 2.0)):
        chosen, rejected, margins = reward.random_scores(seed, 5)
        theirs = trl_loss["Reward"](chosen, rejected, margins)
        agree(functions["free_level"](chosen, rejected, level, margins).mean(), theirs.loss)
        agree(trl_loss["Reward"](chosen + level, rejected + level, margins).loss, theirs.loss)
        assert abs(float(theirs.gradient[0].sum() + theirs.gradient[1].sum())) < 1e-6


@checks("centring-ridge")
def test_centring_all_pairs_is_a_level_and_a_ridge(functions, trl_loss):
    for seed, count in itertools.product(SEEDS, (2, 3, 5)):
        scores = torch.randn(count, generator=torch.Generator().manual_seed(seed))
        first, second = scores[torch.tensor(list(itertools.combinations(range(count), 2)))].T
        terms = [trl_loss["Reward"](first, second, center=center).loss for center in (None, 1.0)]
        ours = functions["centring_ridge"](scores)
        close(ours / len(first), terms[1] - terms[0], rel=1e-5)


def test_centring_is_off_and_its_help_recommends_a_hundredth():
    field = RewardConfig.__dataclass_fields__["center_rewards_coefficient"]
    assert field.default is None
    assert "`0.01`" in field.metadata["help"]


def test_the_fitted_scores_are_the_optimum(page):
    for count, center in itertools.product((2, 4), (0.01, 0.1)):
        scores = page["fitted"](count, center, 5.0).requires_grad_()
        true = torch.linspace(1, -1, count, dtype=torch.double)
        first, second = torch.tensor(list(itertools.permutations(range(count), 2))).T
        losses = torch.stack(
            [
                page["pairwise_reward_loss"](scores[i][None], scores[j][None], center=center)
                for i, j in zip(first, second, strict=True)
            ]
        )
        (slope,) = torch.autograd.grad((torch.sigmoid(true[first] - true[second]) * losses).sum(), scores)
        assert slope.abs().max() < 1e-6
    spread = {center: page["fitted"](4, center, 0.0) for center in (0.0, 0.01, 0.1)}
    said = " ".join(PAGE.read_text("utf-8").split())
    assert (
        "from 2 to {:.2f} at 0.01, and to {:.2f} at 0.1".format(
            *(float(spread[center][0] - spread[center][-1]) for center in (0.01, 0.1))
        )
        in said
    )


# ------------------------------------------------------------------------------------------------------------------- KTO


@checks("kto-loss", "kto-value", "kto-reference-point")
def test_the_loss_of_kto_equals_trl(functions, trl_loss):
    kto.test_the_key_equation_is_what_trl_computes(functions, trl_loss["KTO"])
    kto.test_the_reference_point_is_what_trl_computes(functions, trl_loss["KTO"])
    for seed, labels in kto.CASES:
        weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
        found = trl_loss["KTO"](seed, labels, beta=0.3, **weights)
        value = functions["kto_value"](found.logratios, found.labels, found.kl, beta=0.3, **weights)
        agree((torch.where(found.labels, 1.5, 0.7) - value).mean(), found.loss)


@checks("kto-slope")
def test_the_slope_of_kto_equals_trl(functions, trl_loss):
    kto.test_the_slope_on_the_page_is_what_trl_has(functions, trl_loss["KTO"])


@checks("apo-zero-unpaired")
def test_apo_zero_unpaired_equals_trl_and_a_pair_weighs_half_of_dpos(functions, trl_loss):
    kto.test_apo_zero_unpaired_on_the_page_is_what_trl_computes(functions, trl_loss["KTO"])
    found = trl_loss["KTO"](0, [True, False], beta=0.3, loss_type="apo_zero_unpaired", calculate_KL=False)
    h_w, h_l = found.logratios
    pair = torch.sigmoid(-0.3 * h_w) + torch.sigmoid(0.3 * h_l)  # DPO's apo_zero, compared by test_formulas.py
    close(found.loss, pair / 2, rel=1e-5)


@checks("divided-kto", "kto-threshold", "kto-loss")
def test_kto_takes_the_majority(functions):
    for good, bad, weights in ((1, 2, (1.0, 1.0)), (3, 2, (1.0, 1.0)), (3, 2, (1.0, 2.0)), (7, 3, (0.5, 1.5))):
        share, labels = good / (good + bad), torch.tensor([True] * good + [False] * bad)
        z = torch.linspace(-4, 4, 9, dtype=torch.double, requires_grad=True)
        expected = functions["divided_kto"](share, z, *weights)
        counted = [functions["kto_loss"](one.expand(good + bad), labels, 0.0, 1.0, *weights) for one in z]
        close(expected, torch.stack(counted), rel=1e-6)
        slope = torch.autograd.grad(expected.sum(), z)[0] / (torch.sigmoid(z) * torch.sigmoid(-z))
        close(slope, slope[0].expand(9))  # a straight line in sigma(z)
        assert (slope < 0).all() == (share > functions["kto_threshold"](*weights))
    assert functions["kto_threshold"](1.0, 3.0) == 0.75


@checks("balanced-weights", "kto-slope")
def test_the_rule_for_the_weights_is_trls_and_moves_the_threshold(functions, build, caplog):
    kto.test_the_rule_for_the_weights_is_the_one_that_trl_prints(
        functions, lambda rows, **more: build("KTO", rows, **more), caplog, 3, 1, (1.0, 1.0)
    )
    for good, bad in ((3, 1), (2, 5)):
        low, high = functions["balanced_weights"](good, bad)[1]
        labels = torch.tensor([True] * good + [False] * bad)
        for weight, ratio in ((high, 1.0), (low, 1.33)):
            pulls = functions["kto_slope"](torch.zeros(len(labels)), labels, 0.0, 0.1, 1.0, weight)
            assert -float(pulls[labels].sum() / pulls[~labels].sum()) == pytest.approx(ratio)
        assert functions["kto_threshold"](1.0, high) == pytest.approx(good / (good + bad))


def random_world(seed, prompts=3, answers=3):
    logits = torch.randn(3, prompts, answers, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return logits.softmax(-1)


@checks("true-level", "mismatched-level", "cut-level", "kto-reference-point")
def test_the_levels_are_those_of_everything_counted_out(functions):
    for seed in SEEDS:
        policy, reference, file = random_world(seed)
        pairs = [torch.distributions.Categorical(probs) for probs in (policy, reference)]
        close(functions["true_level"](policy, reference), torch.distributions.kl_divergence(*pairs).mean())
        h = (policy / reference).log()
        for size in (2, 3):
            mean = cut = 0.0
            orders = list(itertools.permutations(range(3), size))
            for order in orders:
                before = order[-1:] + order[:-1]
                for drawn in itertools.product(range(3), repeat=size):
                    weight = math.prod(float(file[x, y]) for x, y in zip(before, drawn, strict=True)) / len(orders)
                    logratios = torch.stack([h[x, y] for x, y in zip(order, drawn, strict=True)])
                    mean += weight * float(logratios.mean())
                    cut += weight * float(functions["kto_reference_point"](logratios))
            close(functions["cut_level"](policy, reference, file, size), cut)
            close(functions["mismatched_level"](policy, reference, file), mean)
            assert cut >= max(0.0, mean)


def test_the_level_sees_what_all_prompts_share_and_nothing_else(page):
    reference, level, divergence = page["world"](0.7, 0.5), page["mismatched_level"], page["true_level"]
    contents, style = page["world"](0.97, 0.5), page["world"](0.7, 0.95)
    close(level(style, reference, style), divergence(style, reference))
    close(level(style, reference, reference), -divergence(reference, style))
    for file in (reference, contents):
        assert level(contents, reference, file) < -2 < 0 < divergence(contents, reference)
    cuts = [page["cut_level"](style, reference, style, size) for size in (2, 3, 4)]
    assert cuts[0] > cuts[1] > cuts[2] > divergence(style, reference)
    assert 0.1 * math.log(0.97 / 0.7) + 0.9 * math.log(0.1) == pytest.approx(-2.04, abs=0.005)
    assert 0.97 * math.log(0.97 / 0.7) + 0.03 * math.log(0.1) == pytest.approx(0.25, abs=0.005)


def test_trl_shifts_the_answers_once_in_groups_of_the_batch_size(build):
    rows = [labelled(f"{i}+0", f"{i}", i % 2 == 0) for i in range(4)]
    trainer = build("KTO", rows, per_device_train_batch_size=2)
    answers = kto.texts(trainer, "completion_ids")
    assert kto.texts(trainer, "KL_completion_ids") == [answers[i] for i in (1, 0, 3, 2)]


@checks("bell-width", "kto-slope")
def test_the_bell_is_down_to_a_half_there(functions):
    good = torch.tensor([True])
    for beta, kl in itertools.product((0.1, 0.5, 1.0), (0.0, 3.0)):
        for h in (kl + functions["bell_width"](beta), kl - functions["bell_width"](beta)):
            here, top = (functions["kto_slope"](torch.tensor([x]), good, kl, beta) for x in (h, kl))
            close(here, top / 2, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------------- BCO


@checks("bco-loss", "bco-slope", "bco-reward-shift", "bco-density-weight")
def test_bco_equals_trl(functions, trl_loss):
    bco.test_the_key_equation_and_the_shift_are_what_trl_computes(functions, trl_loss["BCO"])
    bco.test_the_slope_on_the_page_is_what_trl_has(functions, trl_loss["BCO"])
    bco.test_the_weights_of_udm_are_what_trl_computes(functions, None, trl_loss["BCO"])
    bco.test_the_running_mean_is_that_of_all_rewards(functions)


def test_trl_takes_one_mean_over_both_kinds_and_weighs_bad_rows_only(trl_loss, page):
    labels = [True, True, True, False]
    found = trl_loss["BCO"](0, labels)
    good, bad = (
        page["bco_loss"](found.logratios[w], found.labels[w], found.delta, 0.3) for w in (found.labels, ~found.labels)
    )
    close(found.loss, (3 * good + bad) / 4, rel=1e-5)
    assert abs(float((found.loss - (good + bad) / 2).detach())) > 1e-3
    limits = [BCOConfig.__dataclass_fields__[f"{end}_density_ratio"].default for end in ("min", "max")]
    assert limits == [0.5, 10.0]
    weighted = trl_loss["BCO"](0, labels, probabilities=torch.tensor([0.8]))
    close(weighted.loss, (3 * good + 4 * bad) / 4, rel=1e-5)


@checks("bco-optimum", "bco-loss")
def test_bco_ends_at_the_share(functions):
    for good, bad in ((1, 3), (1, 1), (9, 2)):
        labels = torch.tensor([True] * good + [False] * bad)
        score = torch.tensor(functions["bco_optimum"](good / (good + bad)), requires_grad=True)
        loss = functions["bco_loss"](score.expand(good + bad) / 0.1, labels, 0.0, 0.1)
        assert abs(float(torch.autograd.grad(loss, score)[0])) < 1e-6


@checks("bco-bound", "best-shift")
def test_bco_is_above_dpo_by_the_bound_and_least_at_the_best_shift(functions):
    log_sigmoid = torch.nn.functional.logsigmoid
    for seed in SEEDS:
        h_w, h_l = 20 * torch.randn(2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        best = functions["best_shift"](h_w, h_l, 0.1)
        lowest = functions["bco_bound"](h_w, h_l, best, 0.1)
        for off in (-2.0, -0.1, 0.0, 0.1, 3.0):
            delta = best + off
            excess = log_sigmoid(0.1 * (h_w - h_l)) - log_sigmoid(0.1 * h_w - delta) - log_sigmoid(delta - 0.1 * h_l)
            bound = functions["bco_bound"](h_w, h_l, delta, 0.1)
            close(bound, excess)
            assert (bound > 0).all()
            assert off == 0 or (bound > lowest).all()


@checks("density-ratio")
def test_the_density_ratio_turns_one_distribution_into_the_other(functions):
    for seed in SEEDS:
        good, bad = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.double).softmax(-1)
        ratio, f = functions["density_ratio"](good, bad), torch.randn(6, dtype=torch.double)
        close(ratio, good / bad)
        close((bad * ratio * f).sum(), (good * f).sum())
        logits = torch.zeros(6, dtype=torch.double, requires_grad=True)  # a classifier with a weight for each prompt
        optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-10, tolerance_change=1e-14)

        def loss(logits=logits, good=good, bad=bad, optimizer=optimizer):
            optimizer.zero_grad()
            value = -(good * logits.sigmoid().log() + bad * (-logits).sigmoid().log()).sum()
            value.backward()
            return value

        optimizer.step(loss)
        close(logits.exp(), ratio, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------- ORPO and CPO


@checks("orpo-loss", "log-odds", "orpo-nll", "orpo-pull")
def test_orpo_equals_trl(functions, trl_loss):
    for beta in (0.1, 10.0):
        orpo.test_the_key_equation_is_what_trl_computes(functions, trl_loss["ORPO"], beta)
    orpo.test_the_supervised_term_on_the_page_is_what_trl_computes(functions, trl_loss["ORPO"])
    orpo.test_the_odds_on_the_page_are_what_trl_computes(functions, trl_loss["ORPO"])
    orpo.test_the_pull_on_the_page_is_what_trl_has(functions, trl_loss["ORPO"], 3.0)


@checks("odds-share", "log-odds-slope")
def test_the_share_of_the_odds_is_what_trl_logs_and_their_slope_what_trl_has(functions, trl_loss):
    for seed in SEEDS:
        found = trl_loss["ORPO"](seed, pairs=4)
        share = functions["odds_share"](found.chosen, found.rejected)
        agree(share.log().mean(), torch.tensor(found.metrics["log_odds_ratio"], dtype=torch.double))
    means = (-torch.logspace(-4, 1, 30)).requires_grad_()
    (slope,) = torch.autograd.grad((means - log1mexp(means)).sum(), means)
    agree(functions["log_odds_slope"](means.double()), slope.double())
    assert float(functions["odds_share"](*torch.tensor([[0.5], [0.25]]).log())) == pytest.approx(3 / 4)


@checks("cpo-loss", "cpo-nll", "cpo-pull", "cpo-hinge", "cpo-ipo", "cpo-smoothed", "simpo-loss", "alphapo-reward")
def test_cpo_equals_trl(functions, trl_loss):
    for cpo_alpha in (0.0, 1.0):
        cpo.test_the_key_equation_is_what_trl_computes(functions, trl_loss["CPO"], cpo_alpha)
    for test in (
        cpo.test_the_second_term_is_what_trl_computes,
        cpo.test_the_pull_on_the_page_is_what_trl_has,
        cpo.test_simpo_on_the_page_is_what_trl_computes,
        cpo.test_hinge_on_the_page_is_what_trl_computes,
        cpo.test_ipo_on_the_page_is_what_trl_computes,
        cpo.test_label_smoothing_on_the_page_is_what_trl_computes,
    ):
        test(functions, trl_loss["CPO"])
    for alpha in (0.25, -0.5):
        cpo.test_alphapo_on_the_page_is_what_trl_computes(functions, trl_loss["CPO"], alpha)


@checks("simpo-pull")
def test_the_pull_of_simpo_on_each_token_is_trls(functions, trl_loss):
    for seed, pairs in cpo.CASES:
        settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.4}
        found = trl_loss["CPO"](seed, pairs, **settings)
        lengths = found.tokens[:pairs], found.tokens[pairs:]
        pulls = functions["simpo_pull"](found.chosen_mean, found.rejected_mean, *lengths, beta=2.0, gamma=1.4)
        each = torch.cat(pulls).detach()[:, None] * found.mask  # the same for all tokens of an answer
        (gradient,) = torch.autograd.grad(-(each * found.token_logps).sum(), found.logits)
        agree(gradient, found.gradient)


@checks("alphapo-slope", "alphapo-reward")
def test_the_slope_of_alphapos_reward(functions, trainers):
    for alpha in (-0.5, 0.0, 0.5):
        means = torch.tensor([-3.0, -0.5], requires_grad=True)
        (slope,) = torch.autograd.grad(functions["alphapo_reward"](means, alpha).sum(), means)
        close(functions["alphapo_slope"](means, alpha), slope, rel=1e-6)
        # in TRL: the slopes of a pair are in the proportion of the two
        settings = {"loss_type": "simpo", "alpha": alpha, "beta": 0.7, "simpo_gamma": 0.3}
        _, (up, down) = of_pair(trainers["CPO"].cpo_loss, means.tolist(), **settings)
        close(-up / down, slope[0] / slope[1], rel=1e-5)


@checks("uniform-token-margin")
def test_a_reference_that_knows_nothing_leaves_the_lengths_in_the_margin(functions):
    dice, vocabulary = torch.Generator().manual_seed(0), 7
    lens = torch.tensor([[3, 9, 5], [8, 2, 5]])
    ids = torch.randint(0, vocabulary, (2, 3, 9), generator=dice)
    mask = torch.arange(9) < lens[..., None]
    logits = torch.randn(2, 3, 9, vocabulary, generator=dice, dtype=torch.double)
    policy, reference = (
        (model.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * mask).sum(-1) for model in (logits, logits * 0)
    )
    ours = functions["uniform_token_margin"](*policy, *lens, vocabulary)
    close(ours, (policy - reference)[0] - (policy - reference)[1], rel=1e-6)  # log(V) in float32


@checks("ipo-optimum", "hinge-optimum", "margin-optimum")
def test_where_trls_losses_rest_when_readers_are_divided(functions, trainers):
    method = trainers["CPO"].cpo_loss
    for share, beta in itertools.product((0.25, 0.6, 0.75, 0.9), (0.3, 1.0)):
        logit = math.log(share / (1 - share))
        places = {
            ("sigmoid", 0.0): logit / beta,
            ("simpo", 1.0): math.copysign(functions["margin_optimum"](max(share, 1 - share), 1.0), logit) / beta,
            ("ipo", 0.0): functions["ipo_optimum"](share, beta),
            ("hinge", 0.0): functions["hinge_optimum"](share, beta),
        }
        for (kind, gamma), place in places.items():
            slopes = []
            for margin in (place - 0.02, place, place + 0.02):
                settings = {"loss_type": kind, "beta": beta, "simpo_gamma": gamma}
                one, other = (of_pair(method, logps, **settings)[1][0] for logps in ((margin, 0.0), (-margin, 0.0)))
                slopes.append(float(share * one - (1 - share) * other))
            assert slopes[0] < 0 < slopes[2], (kind, share, slopes)
            assert kind == "hinge" or abs(slopes[1]) < 1e-6


def test_the_table_of_resting_places(page):
    for share in (0.6, 0.9):
        for loss, place in (
            (lambda d: page["cpo_smoothed"](d, 0.1), math.log((0.1 + 0.8 * share) / (0.9 - 0.8 * share))),
            (lambda d: page["simpo_loss"](d, 0 * d, beta=1.0, gamma=1.0), page["margin_optimum"](share, 1.0)),
            (lambda d: page["cpo_ipo"](d, 0 * d, beta=1.0), page["ipo_optimum"](share, 1.0)),
            (lambda d: page["cpo_hinge"](d, 0 * d, beta=1.0), page["hinge_optimum"](share, 1.0)),
        ):
            assert page["rests_at"](loss, share) == pytest.approx(place, abs=1e-6)


# ------------------------------------------------------------------------------------- what the page says beyond formulas


def table(header):
    """The rows of the table whose first headings are these, each a dictionary by heading."""
    lines = PAGE.read_text("utf-8").split("\n")
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {header} |"))
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in
             itertools.takewhile(lambda line: line.startswith("|"), lines[start:])]  # fmt: skip
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def dispatched(function):
    """The strings that a function of TRL compares its loss type with."""
    compared = re.findall(r"self\.loss_type == (\".*?\")|self\.loss_type in (\[.*?\])", inspect.getsource(function))
    return set(re.findall(r'"(\w+)"', str(compared).replace("'", "")))


def test_every_loss_type_of_the_five_configs_is_in_the_table():
    rows = table("config")
    found = {
        name: [r["`loss_type`"] for r in rows if r["config"] == f"`{name}`"]
        for name in {r["config"].strip("`") for r in rows}
    }
    for _, arguments in TRAINERS.values():
        name = arguments.__name__
        field = arguments.__dataclass_fields__.get("loss_type")
        assert (field is None) is (found[name] == ["none"]), name
        if field is not None:
            (default,) = [cell for cell in found[name] if "(default)" in cell]
            assert default.split("`")[1] == field.default
    listed = {name: {cell.split("`")[1] for cell in cells} for name, cells in found.items() if cells != ["none"]}
    assert listed["KTOConfig"] == dispatched(KTOTrainer._compute_loss) == {"kto", "apo_zero_unpaired"}
    own = dispatched(CPOTrainer.cpo_loss) | dispatched(CPOConfig.__post_init__)
    assert listed["CPOConfig"] == own == {"sigmoid", "hinge", "ipo", "simpo", "alphapo"}
    assert set(found) == {arguments.__name__ for _, arguments in TRAINERS.values()}


def test_formulas_and_signatures_are_those_of_the_walkthroughs():
    def bare(latex):
        return re.sub(r"\\[,; ]|\s", "", latex)

    ours = {found.name: found for found in formulas(PAGE)}
    compared = set()
    for path in WALKTHROUGHS:
        lines = path.read_text("utf-8").split("\n")
        for fence in fences(path):
            above = "\n".join(lines[max(fence.line - 4, 0) : fence.line - 1])
            if fence.lang == "math" and (named := re.search(r"<!-- formula: ([a-z0-9-]+) -->", above)):
                name = named[1]
                if name == "last-token-score":
                    continue  # where the score is read is no matter of the loss
                assert bare(ours[name].latex) == bare(fence.text), name
                block = next(f for f in fences(path) if f.line > fence.line and f.lang == "python")
                pattern = rf"def {name.replace('-', '_')}\((.*?)\):"
                assert re.search(pattern, ours[name].block.text)[1] == re.search(pattern, block.text)[1], name
                compared.add(name)
    assert len(compared) == 23
    assert not any(found.block is None for found in named_formulas(PAGE))


def test_alphapo_is_simpo_with_one_setting_and_the_other_types_keep_the_second_term(trl_loss, build):
    args = build("CPO", loss_type="alphapo").args
    assert (args.loss_type, args.cpo_alpha, args.alpha) == ("simpo", 0.0, 0.0)
    defaults = {name: CPOConfig.__dataclass_fields__[name].default for name in ("beta", "simpo_gamma", "cpo_alpha")}
    assert defaults == {"beta": 0.1, "simpo_gamma": 0.5, "cpo_alpha": 1.0}
    assert defaults["simpo_gamma"] / defaults["beta"] == 5
    assert 1 / (2 * defaults["beta"]) == 5
    for kind in ("simpo", "hinge", "ipo"):
        both, one = (trl_loss["CPO"](0, loss_type=kind, simpo_gamma=0.5, cpo_alpha=alpha) for alpha in (1.0, 0.0))
        assert both.metrics["nll_loss"] > 0.1
        close(both.loss - one.loss, both.metrics["nll_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "simpo"])
def test_who_reads_label_smoothing_and_alpha(trl_loss, trainers, kind):
    plain_loss, smoothed, bent = (
        float(trl_loss["CPO"](1, loss_type=kind, simpo_gamma=0.5, beta=0.3, cpo_alpha=0.0, **more).loss)
        for more in ({}, {"label_smoothing": 0.2}, {"alpha": 0.01})
    )
    assert (plain_loss == smoothed) is (kind in ("hinge", "ipo"))
    assert plain_loss != bent
    far, _ = of_pair(trainers["CPO"].cpo_loss, (-200.0, -210.0), loss_type=kind, alpha=0.5, simpo_gamma=0.5)
    near, _ = of_pair(trainers["CPO"].cpo_loss, (-2.0, -2.1), loss_type=kind, alpha=0.5, simpo_gamma=0.5)
    assert not math.isfinite(float(far.detach()))
    assert math.isfinite(float(near.detach()))


def test_hinge_and_ipo_warn_about_label_smoothing(build, caplog):
    build("CPO", loss_type="ipo", label_smoothing=0.1)
    assert "does not support label smoothing" in caplog.text


def test_a_prompt_is_learned_by_orpo_and_not_by_cpo(trl_loss):
    for name, learned in (("ORPO", True), ("CPO", False)):
        found = trl_loss[name](3, pairs=1)
        first = found.gradient[0, 0].abs().sum()  # predicts the second token, which is the prompt's or the answer's
        mask = (found.answer if name == "ORPO" else found.mask)[0]
        assert not mask[0]
        assert (float(first) > 1e-4) is learned


def test_where_the_two_terms_of_cpo_are_equal(page):
    margin = torch.tensor([10 * math.log(2)])
    up, down = page["cpo_pull"](margin, torch.zeros(1), torch.tensor([30]))
    close(up, -2 * down, rel=1e-5)
    assert round(float(margin)) == 7


def test_the_numbers_by_hand_are_trls(page, trainers):
    rows = {row["loss"]: float(row["value"]) for row in table("loss | how")}
    assert set(rows) == set(page["BY_HAND"])
    assert rows == {name: pytest.approx(loss.item(), abs=5.1e-4) for name, loss in page["BY_HAND"].items()}
    log2 = math.log(2)
    sums, means = (-2 * log2, -6 * log2), (-log2, -2 * log2)
    trainer = trainers["CPO"]
    for name, logps, settings in (
        ("DPO", (2 * log2, -3 * log2), {"loss_type": "sigmoid"}),
        ("CPO, first term", sums, {"loss_type": "sigmoid"}),
        ("CPO, hinge", sums, {"loss_type": "hinge"}),
        ("CPO, ipo", means, {"loss_type": "ipo"}),
        ("SimPO", means, {"loss_type": "simpo", "simpo_gamma": log2}),
        ("AlphaPO, alpha 1", means, {"loss_type": "simpo", "simpo_gamma": log2, "alpha": 1.0}),
    ):
        loss, _ = of_pair(trainer.cpo_loss, logps, beta=1.0, **settings)
        assert float(loss.detach()) == pytest.approx(rows[name], abs=5.1e-4), name
    loss, _ = of_pair(trainers["ORPO"].odds_ratio_loss, means, beta=1.0)
    assert -float(loss.detach()) == pytest.approx(rows["ORPO, odds"], abs=5.1e-4)


def test_the_slopes_side_by_side_are_trls(page, trainers):
    cpo_loss, odds = trainers["CPO"].cpo_loss, trainers["ORPO"].odds_ratio_loss
    kinds = {
        "DPO": (cpo_loss, 1, {"loss_type": "sigmoid"}),  # with a reference that is equal for both answers
        "sigmoid, no NLL": (cpo_loss, 1, {"loss_type": "sigmoid"}),
        "hinge, no NLL": (cpo_loss, 1, {"loss_type": "hinge"}),
        "ipo, no NLL": (cpo_loss, 4, {"loss_type": "ipo"}),
        "simpo": (cpo_loss, 4, {"loss_type": "simpo", "simpo_gamma": 0.5}),
        "alphapo, 0.5": (cpo_loss, 4, {"loss_type": "simpo", "simpo_gamma": 0.5, "alpha": 0.5}),
        "ORPO, odds only": (odds, 4, {}),
    }
    for logps in page["PLACES"].values():
        for name, (method, tokens, settings) in kinds.items():
            _, slopes = of_pair(method, [value / tokens for value in logps], beta=1.0, **settings)
            sign = -1 if method is odds else 1  # TRL subtracts this term
            close(page["slopes_at"](name, logps), [sign * float(slope) / tokens for slope in slopes], rel=1e-4)
        for full, part in (("sigmoid (CPO)", "sigmoid, no NLL"), ("ORPO", "ORPO, odds only")):
            (up, down), (up_part, down_part) = (page["slopes_at"](name, logps) for name in (full, part))
            assert (up - up_part, down) == pytest.approx((-0.25, down_part), abs=1e-6)
        for shift in (0.0, -8.0):  # TRL's own loss of BCO, from logarithms, with the shift held
            name = "BCO, shift -8" if shift else "BCO"
            pair = [torch.tensor([value], requires_grad=True) for value in logps]
            bco_trainer, moments = trainers["BCO"], RunningMoments(accelerator=trainers["BCO"].accelerator)
            moments.mean = shift
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(bco_trainer, "beta", 1.0)
                patch.setattr(bco_trainer, "running", moments)
                eight = torch.tensor([-8.0])
                losses = bco_trainer.bco_loss(*pair, eight, eight, None, None, do_train=False)[0]
            slopes = torch.autograd.grad(2 * losses.mean(), pair)
            close(page["slopes_at"](name, logps), [float(slope) for slope in slopes], rel=1e-4)


def test_what_each_loss_sees_of_a_pair_that_fell(page):
    start, fell = (
        {name: page["slopes_at"](name, page["PLACES"][p]) for name in page["LOSSES"]} for p in ("margin 0", "both fell")
    )
    blind = {name for name in start if fell[name] == pytest.approx(start[name], abs=1e-6)}
    assert blind == {"DPO", "sigmoid (CPO)", "sigmoid, no NLL", "hinge, no NLL", "ipo, no NLL", "simpo"}
    assert fell["kto"] == pytest.approx([0, 0], abs=1e-3)
    assert fell["BCO"] == pytest.approx([-1, 0], abs=1e-3)
    assert fell["BCO, shift -8"] == pytest.approx(start["BCO"], abs=1e-6)
    assert abs(fell["alphapo, 0.5"][0]) > 2 * abs(start["alphapo, 0.5"][0])
    assert page["slopes_at"]("ipo, no NLL", page["PLACES"]["margin +5"])[0] > 0


def test_which_loss_looks_at_what(trainers, trl_loss):
    rows = {cell: row for row in table("loss | looks at") for cell in row["loss"].replace("`", "").split(", ")}
    assert set(rows) == {"reward model", "DPO", "kto", "apo_zero_unpaired", "BCO", "ORPO",
                         "sigmoid", "hinge", "ipo", "simpo", "alphapo"}  # fmt: skip
    for name, rows_of in (
        ("KTO", ("kto", "apo_zero_unpaired")),
        ("BCO", ("BCO",)),
        ("ORPO", ("ORPO",)),
        ("CPO", ("sigmoid", "hinge", "ipo", "simpo", "alphapo")),
    ):
        for row in rows_of:
            assert rows[row]["reference"] == ("yes" if getattr(trainers[name], "ref_model", None) is not None else "no")
            assert rows[row]["looks at"].startswith("one answer") is (name in ("KTO", "BCO"))
            assert rows[row]["tokens"] == (
                "sum" if row in ("kto", "apo_zero_unpaired", "BCO", "sigmoid", "hinge") else "mean"
            )
    for kind in ("sigmoid", "hinge", "ipo", "simpo"):
        found = trl_loss["CPO"](5, loss_type=kind, simpo_gamma=0.5)
        per_answer = {"sum": found.chosen, "mean": found.chosen_mean}[rows[kind]["tokens"]]
        assert found.metrics["logps/chosen"] == pytest.approx(float(per_answer.mean().detach()), rel=1e-4)
    # the level of KTO couples the rows of a batch, apo_zero_unpaired leaves each alone
    assert rows["kto"]["looks at"] == "one answer and the batch"
    assert rows["BCO"]["looks at"] == "one answer and all before"
