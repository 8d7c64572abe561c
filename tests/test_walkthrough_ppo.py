"""The claims of annotated_trainers/ppo.md that running TRL can show, on random models of two layers, on the CPU."""

import copy
import functools
import inspect
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import numpy as np
import pytest
import torch
from datasets import Dataset
from markdown_pages import fences
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PrinterCallback, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification, TrainerCallback
from trl import RLOOConfig, RLOOTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from trl.experimental.utils import get_reward
from trl_source import pinned_version
from walkthrough_tools import (
    CHECKPOINTING,
    EXAMPLES,
    EXPECTED,
    PAGES,
    arguments_of,
    comparisons,
    config,
    defaults_on,
    first_cells,
    formula_names,
    metrics_on,
    named_tests,
    page_of,
    section_of,
    tokenizer,
)

PAGE = PAGES / "ppo.md"
section = functools.partial(section_of, PAGE)
MEASURED = EXPECTED / "ppo.json"
PAD, EOS, USER = 0, 1, 2


def policy(ends=0.0, seed=0, **more):
    """A random language model; `ends` is added to the logit of the end token."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**config(pad_token_id=PAD, **more)))
    if ends:
        bias = torch.zeros(model.config.vocab_size)
        bias[EOS] = ends
        model.lm_head.register_forward_hook(lambda module, inputs, output: output + bias)
    return model


def judge(seed=1, **more):
    """A random model with one number for each token, in evaluation mode as `from_pretrained` leaves it."""
    torch.manual_seed(seed)
    sizes = config(pad_token_id=PAD, num_labels=1, **more)
    return Qwen3ForSequenceClassification(Qwen3Config(**sizes)).eval()


def left(**more):
    made = tokenizer(**more)
    made.padding_side = "left"
    return made


@functools.cache
def prompts(count=8) -> Dataset:
    """Token ids of two lengths."""
    texts = [f"{i % 10}+{i // 10}" + ("+1" if i % 2 else "") for i in range(count)]
    return Dataset.from_list([{"input_ids": [USER, *ids]} for ids in left()(texts)["input_ids"]])


@pytest.fixture(scope="module", autouse=True)
def no_collections():
    """`train` collects garbage several times a round, which takes a second in a process with this many objects."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_trainer, "gc", SimpleNamespace(collect=lambda: None))
        yield


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes a PPOTrainer; keyword arguments of PPOTrainer go there, all others to PPOConfig."""

    def make(**more) -> PPOTrainer:
        judges = {"reward_model": lambda: judge(1), "value_model": lambda: judge(2)}
        parts = {"model": policy, **judges, "train_dataset": prompts, "processing_class": left}
        own = {name: more.pop(name) if name in more else part() for name, part in parts.items()}
        own["ref_model"] = more.pop("ref_model", None)
        own |= {name: more.pop(name) for name in ("peft_config", "eval_dataset", "callbacks") if name in more}
        settings = {
            "output_dir": str(tmp_path_factory.mktemp("run")),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "per_device_train_batch_size": 4,
            "total_episodes": 8,
            "num_ppo_epochs": 2,
            "num_sample_generations": 0,
            "response_length": 6,
            "stop_token": "eos",
            "temperature": 1.0,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 1,
            **more,
        }
        np.random.seed(0)
        trainer = PPOTrainer(args=PPOConfig(**settings), **own)
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


def trained(trainer: PPOTrainer) -> list[dict]:
    """Trains, and returns the log lines."""
    trainer.train()
    return trainer.state.log_history


def watched(trainer: PPOTrainer, backward=None) -> list[SimpleNamespace]:
    """The local variables of `train` at each backward pass, copied; filled while `trainer` trains."""
    seen, original = [], trainer.accelerator.backward

    def copied(value):
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    def spy(loss):
        here = sys._getframe(1).f_locals
        seen.append(SimpleNamespace(**{name: copied(value) for name, value in here.items()}))
        (backward or original)(loss)

    trainer.accelerator.backward = spy
    return seen


# ---------------------------------------------------------------------------- the formulas, against TRL's own `train`


page = page_of(PAGE)
VOCABULARY, WIDTH = 13, 7


@pytest.fixture
def random_round(make, monkeypatch):
    """TRL's own `train`, for one round on random tensors instead of models. Returns what went in and what came out."""

    def run(seed, lengths=(3, 7, 1, 5), end=None, spread=0.4, **settings):
        trainer = make(**{"num_ppo_epochs": 1, "total_episodes": 4, **settings})
        dice = torch.Generator().manual_seed(seed)
        rows, found = len(lengths), SimpleNamespace(lengths=torch.tensor(lengths))

        def normal(*shape, scale=1.0):
            return scale * torch.randn(*shape, generator=dice)

        responses = torch.randint(4, VOCABULARY, (rows, WIDTH), generator=dice)
        for row, length in enumerate(lengths):
            if length < WIDTH:
                responses[row, length:] = PAD
                responses[row, length - 1] = EOS
        found.responses = responses
        found.sampled = normal(rows, WIDTH, VOCABULARY)
        found.scores = normal(rows, scale=3.0)

        def batch_generation(model, queries, *rest):
            found.context = queries.shape[1]
            found.whole = torch.cat([queries, responses], dim=1)
            shape = (rows, found.whole.shape[1], VOCABULARY)
            before = torch.zeros(rows, found.context - 1, VOCABULARY)
            after = torch.zeros(rows, 1, VOCABULARY)
            sampled = torch.cat([before, found.sampled, after], dim=1)
            found.policy = (sampled + normal(*shape, scale=spread)).requires_grad_()
            found.reference = sampled + normal(*shape, scale=0.5)
            found.guesses = normal(*shape[:2], 1)
            found.new_guesses = (found.guesses + normal(*shape[:2], 1, scale=0.3)).requires_grad_()
            return found.whole, found.sampled.clone()

        def forward(model, query_responses, pad_token_id):
            index = [int((found.whole == row).all(dim=1).nonzero()) for row in query_responses]
            if model is trainer.ref_model:
                return SimpleNamespace(logits=found.reference[index].clone())
            return SimpleNamespace(logits=found.policy[index]), found.new_guesses[index]

        def reward(model, query_responses, *rest):
            found.read["value" if model is trainer.value_model else "reward"] = query_responses
            return found.guesses, found.scores.clone(), None

        def backward(loss):
            found.gradients.append(torch.autograd.grad(loss, (found.policy, found.new_guesses)))

        found.gradients, found.read = [], {}
        for name, value in (("batch_generation", batch_generation), ("forward", forward), ("get_reward", reward)):
            monkeypatch.setattr(ppo_trainer, name, value)
        found.passes = watched(trainer, backward)
        found.log = trained(trainer)[0]
        found.args = trainer.args
        monkeypatch.undo()
        return found

    return run


ERRORS, agree, summary = comparisons()


def logps_of(logits, responses):
    return torch.log_softmax(logits, dim=-1).gather(-1, responses[..., None])[..., 0]


def chain(page, found):
    """The functions of the page, one behind the other, from what went into the round to both losses of each pass."""
    args, place = found.args, torch.arange(WIDTH)
    here = slice(found.context - 1, -1)
    answer, scored = place < found.lengths[:, None], place <= found.lengths[:, None]
    ours = SimpleNamespace(answer=answer, scored=scored)
    ours.logps = logps_of(found.sampled, found.responses)
    ours.ref_logps = logps_of(found.reference[:, here], found.responses)
    ours.rewards = page["ppo_token_reward"](found.scores, ours.logps, ours.ref_logps, found.lengths, args.kl_coef)
    ours.values = torch.where(scored, found.guesses[:, here, 0], 0.0)
    ours.advantages, ours.returns = page["gae"](ours.rewards, ours.values, args.gamma, args.lam)
    ours.whitened = page["whitened_advantage"](ours.advantages, answer)
    new_logps = logps_of(found.policy[:, here], found.responses)
    new_values = found.new_guesses[:, here, 0]
    ours.losses = []
    for one in found.passes:
        i = one.micro_batch_inds
        ours.losses.append(
            (
                page["ppo_policy_loss"](new_logps[i], ours.logps[i], ours.whitened[i], answer[i], args.cliprange),
                page["ppo_value_loss"](new_values[i], ours.values[i], ours.returns[i], scored[i], args.cliprange_value),
            )
        )
    return ours


CASES = [
    (seed, {"num_mini_batches": parts, "kl_coef": kl_coef, "gamma": gamma, "lam": lam, "vf_coef": vf_coef})
    for seed, parts, kl_coef, gamma, lam, vf_coef in (
        (0, 1, 0.05, 1.0, 0.95, 0.1),
        (1, 2, 0.7, 0.9, 0.8, 0.5),
        (2, 2, 2.0, 1.0, 0.0, 1.0),
        (3, 4, 0.3, 0.99, 1.0, 0.1),
    )
]


def test_the_policy_loss_on_the_page_is_what_trl_computes(page, random_round):
    clipped = 0.0
    for seed, settings in CASES:
        found = random_round(seed, **settings)
        ours = chain(page, found)
        for (policy_loss, _), theirs, (gradient, _) in zip(ours.losses, found.passes, found.gradients, strict=True):
            agree(policy_loss, theirs.pg_loss)
            agree(torch.autograd.grad(policy_loss, found.policy, retain_graph=True)[0], gradient)
            clipped += float((theirs.pg_losses2 > theirs.pg_losses).sum())
    assert clipped > 5  # the clip was seen at work


def test_the_value_loss_on_the_page_is_what_trl_computes(page, random_round):
    clipped = 0.0
    for seed, settings in CASES:
        found = random_round(seed, **settings)
        ours = chain(page, found)
        for (_, value_loss), theirs, (_, gradient) in zip(ours.losses, found.passes, found.gradients, strict=True):
            agree(value_loss, theirs.vf_loss)
            (mine,) = torch.autograd.grad(value_loss, found.new_guesses, retain_graph=True)
            agree(settings["vf_coef"] * mine, gradient)
            clipped += float((theirs.vf_losses2 > theirs.vf_losses1).sum())
    assert clipped > 5


def test_the_whole_loss_is_the_sum_that_the_page_names(page, random_round):
    for seed, settings in CASES:
        found = random_round(seed, **settings)
        for (policy_loss, value_loss), theirs in zip(chain(page, found).losses, found.passes, strict=True):
            agree(policy_loss + settings["vf_coef"] * value_loss, theirs.loss)


def test_the_token_rewards_on_the_page_are_what_trl_computes(page, random_round):
    for seed, settings in CASES:
        found = random_round(seed, **settings)
        agree(chain(page, found).rewards, found.passes[0].rewards)


def test_gae_on_the_page_is_what_trl_computes(page, random_round):
    for seed, settings in CASES:
        found = random_round(seed, **settings)
        ours = chain(page, found)
        agree(ours.returns, found.passes[0].returns)
        agree(ours.whitened, found.passes[0].advantages)
        agree(ours.values, found.passes[0].values)


def test_the_whitened_advantage_on_the_page_is_what_trl_computes(page):
    for seed in range(4):
        dice = torch.Generator().manual_seed(seed)
        values = 3 + 2 * torch.randn(4, 9, generator=dice)
        mask = torch.rand(4, 9, generator=dice) < 0.7
        theirs = torch.masked_fill(ppo_trainer.masked_whiten(values, mask), ~mask, 0)
        agree(page["whitened_advantage"](values, mask), theirs)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_kl_estimates_on_the_page_are_what_trl_computes(page, random_round, estimator):
    for seed in range(3):
        found = random_round(seed, kl_estimator=estimator)
        ours = chain(page, found)
        kl = page["ppo_kl_estimate"](ours.logps, ours.ref_logps, estimator) * ours.answer
        agree(kl, found.passes[0].kl)
        assert float(kl.sum(1).mean()) == pytest.approx(found.log["objective/kl"], abs=1e-5)
        assert (kl.min() < -0.01) == (estimator == "k1")


def test_every_displayed_formula_has_its_function_and_is_compared_above():
    known = {
        "ppo-policy-loss",
        "ppo-token-reward",
        "gae",
        "whitened-advantage",
        "ppo-value-loss",
        "ppo-kl-estimate",
    }
    assert formula_names(PAGE) == sorted(known)


def test_k3_in_the_reward_does_not_push_back_to_the_reference(page):
    for seed in range(5):
        dice = torch.Generator().manual_seed(seed)
        reference = torch.log_softmax(torch.randn(9, generator=dice, dtype=torch.double), 0)
        logits = (reference + 0.05 * torch.randn(9, generator=dice, dtype=torch.double)).requires_grad_()
        logps = torch.log_softmax(logits, 0)
        (true,) = torch.autograd.grad((logps.exp() * (logps - reference)).sum(), logits, retain_graph=True)
        push = {}
        for name in ("k1", "k3"):
            paid = page["ppo_kl_estimate"](logps, reference, name).detach()
            (push[name],) = torch.autograd.grad((logps.exp().detach() * paid * logps).sum(), logits, retain_graph=True)
        torch.testing.assert_close(push["k1"], true)
        assert push["k3"].norm() < 0.1 * true.norm()


# ------------------------------------------------------------------------------------------------------- what is logged


@pytest.fixture(scope="module")
def logged(make):
    """A run with padding, mini-batches and several passes: its trainer, and what `train` knew at each pass."""
    trainer = make(model=policy(ends=2.0), num_mini_batches=2, missing_eos_penalty=1.0, cliprange=0.02, kl_coef=0.3)
    seen = watched(trainer)
    trainer.train()
    return trainer, seen


def test_the_page_lists_exactly_the_keys_that_a_run_logs(logged):
    keys = set().union(*logged[0].state.log_history)
    assert set(metrics_on(PAGE)) == keys


def test_every_metric_is_what_the_table_says(logged):
    trainer, seen = logged
    for number, line in enumerate(trainer.state.log_history):
        passes = [one for one in seen if one.update == number + 1]
        assert len(passes) == 4
        first = passes[0]
        answer, scored = ~first.padding_mask, ~first.padding_mask_p1
        assert 0 < answer.float().mean() < 0.9  # there is padding
        kl = ((first.logprobs - first.ref_logprobs) * answer).sum(1).mean()
        old = first.logprobs
        expected = {
            "objective/kl": kl,
            "objective/non_score_reward": -0.3 * kl,
            "objective/scores": first.scores.mean(),
            "objective/rlhf_reward": first.scores.mean() - 0.3 * kl,
            "objective/entropy": -(old * answer).sum(1).mean(),
            "val/num_eos_tokens": (first.responses == EOS).sum(),
            "lr": trainer.args.learning_rate * (1 - number / 2),
            "episode": 4 * (number + 1),
            "epoch": 4 * (number + 1) / 8,
            "step": number + 1,
        }
        means = {key: [] for key in ("approxkl", "clipfrac", "entropy", "ratio", "policy", "value", "value_clip")}
        for one in passes:
            i = one.micro_batch_inds
            inside, places = answer[i], scored[i]
            ratio = torch.where(inside, (one.new_logprobs - old[i]).exp(), 1.0)
            means["ratio"].append(ratio.mean())
            means["approxkl"].append(0.5 * (ratio.log() ** 2).mean())
            means["entropy"].append(torch.distributions.Categorical(logits=one.logits).entropy().mean())
            advantage = first.advantages[i]
            beyond = torch.where(advantage > 0, ratio > 1.02, ratio < 0.98)
            means["clipfrac"].append(beyond[inside].float().mean())
            clipped = ratio.clamp(0.98, 1.02)
            means["policy"].append(torch.max(-advantage * ratio, -advantage * clipped)[inside].mean())
            guess, start, target = one.vpred, first.values[i], first.returns[i]
            near = start + (guess - start).clamp(-0.2, 0.2)
            errors = (guess - target) ** 2, (near - target) ** 2
            means["value"].append(0.5 * torch.max(*errors)[places].mean())
            means["value_clip"].append((errors[1] > errors[0])[places].float().mean())
        average = {key: torch.stack(values) for key, values in means.items()}
        expected |= {
            "policy/approxkl_avg": average["approxkl"].mean(),
            "policy/clipfrac_avg": average["clipfrac"].mean(),
            "policy/entropy_avg": average["entropy"].mean(),
            "val/ratio": average["ratio"].mean(),
            "val/ratio_var": average["ratio"].var(),
            "loss/policy_avg": average["policy"].mean(),
            "loss/value_avg": average["value"].mean(),
            "val/clipfrac_avg": average["value_clip"].mean(),
        }
        assert set(expected) == set(line) - {"eps"}
        for key, value in expected.items():
            assert line[key] == pytest.approx(float(value), rel=1e-4, abs=2e-7), key
        assert isinstance(line["eps"], int)
    assert trainer.state.log_history[1]["policy/clipfrac_avg"] > 0 or line["policy/clipfrac_avg"] > 0


def test_the_first_round_has_no_kl(logged):
    first, second = logged[0].state.log_history
    assert abs(first["objective/kl"]) < 1e-5
    assert first["objective/rlhf_reward"] == pytest.approx(first["objective/scores"], abs=1e-5)
    assert abs(second["objective/kl"]) > 1e-3
    assert second["objective/non_score_reward"] == pytest.approx(-0.3 * second["objective/kl"])


def test_the_policy_loss_of_an_undivided_first_pass_is_0(make):
    (line,) = trained(make(num_ppo_epochs=1, total_episodes=4))
    assert abs(line["loss/policy_avg"]) < 1e-6
    assert line["loss/value_avg"] > 1e-4


def test_the_value_loss_of_a_first_pass_is_half_of_the_mean_square_of_the_advantages(page, random_round):
    found = random_round(0)
    found.new_guesses = found.guesses
    ours = chain(page, found)
    half = 0.5 * (ours.advantages[ours.scored] ** 2).mean()
    assert float(ours.losses[0][1]) == pytest.approx(float(half), rel=1e-5)


def test_the_value_loss_grows_with_the_square_of_the_scores(make):
    lines = []
    for factor in (1.0, 10.0):
        models = {"reward_model": judge(1), "value_model": judge(2)}
        for model in models.values():
            model.score.weight.data *= factor
        lines += trained(make(num_ppo_epochs=1, total_episodes=4, kl_coef=0.0, **models))
    assert lines[1]["objective/scores"] == pytest.approx(10 * lines[0]["objective/scores"], rel=1e-4)
    assert lines[1]["loss/value_avg"] == pytest.approx(100 * lines[0]["loss/value_avg"], rel=1e-3)


def test_ratio_var_is_nan_with_one_pass(make):
    (line,) = trained(make(num_ppo_epochs=1, total_episodes=4))
    assert math.isnan(line["val/ratio_var"])


def test_a_repetition_penalty_shows_as_kl_in_the_first_round(make):
    model = policy()
    model.generation_config.repetition_penalty = 1.5
    (line,) = trained(make(model=model, total_episodes=4, learning_rate=0.0))
    assert abs(line["objective/kl"]) > 1e-3
    assert line["policy/approxkl_avg"] > 1e-6  # ratios have left 1, and no step was taken
    assert make(model=model).ref_model.generation_config.repetition_penalty == 1.5


def test_attention_dropout_shows_as_kl_in_the_first_round(make):
    kl = {}
    for dropout in (0.0, 0.5):
        model = policy(attention_dropout=dropout, initializer_range=0.2)
        kl[dropout] = abs(trained(make(model=model, total_episodes=4))[0]["objective/kl"])
    assert kl[0.0] < 1e-4
    assert kl[0.5] > 1e-2


def test_bfloat16_shows_before_the_first_step(make):
    distance = {}
    for dtype in (torch.float32, torch.bfloat16):
        models = {"model": policy(), "reward_model": judge(1), "value_model": judge(2)}
        models = {name: model.to(dtype) for name, model in models.items()}
        distance[dtype] = trained(make(learning_rate=0.0, total_episodes=4, **models))[0]
    assert distance[torch.float32]["policy/approxkl_avg"] < 1e-10
    assert distance[torch.bfloat16]["policy/approxkl_avg"] > 1e-8
    assert abs(distance[torch.bfloat16]["objective/kl"]) > 1e-4


def test_end_tokens_that_fill_up_are_counted(make):
    model = policy(ends=2.0)
    model.generation_config.pad_token_id = None
    trainer = make(model=model, total_episodes=4, response_length=12)
    seen = watched(trainer)
    (line,) = trained(trainer)
    ended = int((seen[0].postprocessed_responses == EOS).sum())
    assert line["val/num_eos_tokens"] > ended > 0


def test_the_toy_run_is_as_the_page_says():
    measured = json.loads(MEASURED.read_text("utf-8"))
    assert measured["log"]["loss/value_avg"]["mean"][0] == pytest.approx(14, abs=0.7)
    assert measured["log"]["loss/value_avg"]["mean"][-1] < 2
    assert max(measured["log"]["objective/kl"]["max"]) < 1
    assert measured["log"]["objective/entropy"]["mean"][-1] < measured["log"]["objective/entropy"]["mean"][0] / 3
    script = (EXAMPLES / "ppo.py").read_text("utf-8")
    for setting in ('"kl_coef": 1.0', '"cliprange_value": 100.0', '"num_ppo_epochs": 2', '"num_mini_batches": 4'):
        assert setting in script  # eight optimizer steps a round


# ------------------------------------------------------------------------------------------------------- what is a round


def steps_of(trainer: PPOTrainer) -> dict[int, int]:
    """Trains, and counts the optimizer's steps in each round."""
    steps, optimizer = [], trainer.optimizer.optimizer
    step = optimizer.step
    optimizer.step = lambda *args, **more: (steps.append(trainer.state.global_step), step(*args, **more))[1]
    trainer.train()
    return dict(Counter(steps))


PLANS = [(4, 1, 1, 2), (4, 1, 4, 1), (1, 4, 1, 2), (1, 4, 4, 2), (1, 4, 2, 1), (2, 2, 4, 1)]


@pytest.mark.parametrize("plan", PLANS)
def test_the_plan_on_the_page_is_what_a_run_does(page, make, plan):
    answers, accumulation, parts, epochs = plan
    trainer = make(
        per_device_train_batch_size=answers,
        gradient_accumulation_steps=accumulation,
        num_mini_batches=parts,
        num_ppo_epochs=epochs,
        total_episodes=8,
        train_dataset=prompts(16),
        response_length=3,
        learning_rate=1e-6,
    )
    sampled, rounds, size, steps, factor = page["round_plan"](*plan, episodes=8)
    seen = watched(trainer)
    assert steps_of(trainer) == {number: steps for number in range(rounds)}
    assert {len(one.micro_batch_inds) for one in seen} == {size}
    assert len(seen[0].responses) == sampled == 4
    for line in trainer.state.log_history:
        assert line["val/ratio"] == pytest.approx(factor, rel=1e-3)
    assert trainer.state.max_steps == trainer.state.global_step == rounds


def test_the_rows_of_the_plan_are_those_that_the_text_explains(page):
    assert page["round_plan"](16, 4, 4, 4)[3:] == (4, 0.25)
    assert page["round_plan"](3, 2, 3, 1)[3] == 1.5
    assert page["round_plan"](64, 1, 4, 4)[2:4] == (16, 16)
    assert page["round_plan"](16, 1, 1, 4, devices=2)[:2] == (32, 313)


def test_metrics_are_averaged_over_places_that_were_never_filled(make):
    def line(parts):
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "learning_rate": 0.0}
        return trained(make(num_mini_batches=parts, total_episodes=4, train_dataset=prompts(16), **settings))[0]

    right, wrong = line(1), line(4)
    for key in ("val/ratio", "policy/entropy_avg", "loss/value_avg"):
        assert wrong[key] == pytest.approx(right[key] / 4, rel=1e-4)
    assert wrong["objective/entropy"] == pytest.approx(right["objective/entropy"], rel=1e-5)


def test_a_gradient_may_wait_for_the_next_round(make):
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_mini_batches": 3}
    trainer = make(num_ppo_epochs=1, total_episodes=12, train_dataset=prompts(24), **settings)
    assert steps_of(trainer) == {0: 1, 1: 2}


ACCUMULATION = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_ppo_epochs": 1}


def test_accumulation_is_off_in_the_last_round_of_each_pass_through_the_prompts(make):
    trainer = make(total_episodes=16, train_dataset=prompts(8), **ACCUMULATION)
    assert steps_of(trainer) == {0: 1, 1: 4, 2: 1, 3: 4}


@pytest.mark.parametrize(("held_out", "steps"), [(4, {0: 1, 1: 4, 2: 4}), (8, {0: 1, 1: 1, 2: 1})])
def test_a_table_from_one_batch_switches_accumulation_off(make, capsys, held_out, steps):
    tables = {"eval_dataset": prompts(held_out), "per_device_eval_batch_size": 4, "num_sample_generations": 1}
    trainer = make(total_episodes=12, train_dataset=prompts(16), **tables, **ACCUMULATION)
    assert steps_of(trainer) == steps


def test_prompts_that_fill_no_round_are_dropped(make):
    trainer = make(train_dataset=prompts(11))
    assert len(trainer.dataloader) == 2


def test_too_few_prompts_hang_for_ever(make):
    trainer = make(train_dataset=prompts(3))
    assert len(trainer.dataloader) == 0

    class Empty:
        asked = 0

        def __iter__(self):
            self.asked += 1
            if self.asked > 100:
                raise TimeoutError
            return iter(())

    trainer.dataloader = Empty()
    with pytest.raises(TimeoutError):
        trainer.train()


def test_sizes_that_do_not_divide_are_refused(make):
    with pytest.raises(ValueError, match="inexact division: 4 / 3"):
        make(num_mini_batches=3)


def test_epochs_give_the_episodes_and_max_steps_does_not(make):
    trainer = make(total_episodes=None, num_train_epochs=2, max_steps=1, train_dataset=prompts(10))
    assert (trainer.args.total_episodes, trainer.args.num_total_batches) == (20, 5)


def test_with_a_warmup_the_first_round_has_learning_rate_0(make):
    trainer = make(warmup_steps=1)
    before = copy.deepcopy(trainer.policy_model.state_dict())
    weights = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            weights.append(copy.deepcopy(trainer.policy_model.state_dict()))

    trainer.add_callback(Look)
    lines = trained(trainer)
    assert [line["lr"] for line in lines] == [0.0, 1e-3]
    assert all(torch.equal(before[name], weight) for name, weight in weights[0].items())
    assert not all(torch.equal(before[name], weight) for name, weight in weights[1].items())


# ------------------------------------------------------------------------------------------------------- settings


def weights_after(make, **settings) -> dict:
    trainer = make(response_length=3, total_episodes=8, **settings)
    trainer.train()
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def plain(make):
    return weights_after(make)


IGNORED = [
    {"max_grad_norm": 1e-9},
    {"max_steps": 1},
    {"logging_steps": 100},
    {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": prompts(8)},
    {"save_strategy": "epoch"},
    {"remove_unused_columns": False},
    {"label_smoothing_factor": 0.5},
    {"neftune_noise_alpha": 5.0},
    {"dataloader_drop_last": True, "dataloader_num_workers": 2},
    {"resume_from_checkpoint": "nowhere"},
    {"sft_model_path": "nowhere", "reward_model_path": "nowhere", "dataset_num_proc": 7},
]


@pytest.mark.parametrize("settings", IGNORED, ids=lambda settings: " ".join(settings))
def test_a_setting_that_is_ignored_changes_no_weight(make, plain, settings):
    after = weights_after(make, **settings)
    assert all(torch.equal(plain[name], weight) for name, weight in after.items())


@pytest.mark.parametrize("settings", [{"weight_decay": 0.5}, {"learning_rate": 2e-3}, {"seed": 2}, {"optim": "sgd"}])
def test_a_setting_that_counts_changes_weights(make, plain, settings):
    after = weights_after(make, **settings)
    assert not all(torch.equal(plain[name], weight) for name, weight in after.items())


def test_half_precision_and_checkpointing_are_ignored(make, plain):
    trainer = make(bf16=True, **{CHECKPOINTING: True})
    assert trainer.accelerator.mixed_precision == "no"
    assert not trainer.model.policy.is_gradient_checkpointing
    assert not trainer.model.value_model.is_gradient_checkpointing
    after = weights_after(make, bf16=True, **{CHECKPOINTING: True})
    assert all(torch.equal(plain[name], weight) for name, weight in after.items())


def test_saving_by_epoch_saves_nothing(make):
    trainer = make(save_strategy="epoch")
    trainer.train()
    assert not list(Path(trainer.args.output_dir).iterdir())


def test_every_setting_that_is_tested_as_ignored_stands_in_the_table():
    listed = set(re.findall(r"`(\w+)", section("Settings that are ignored").split("What does count")[0]))
    tested = {name for settings in IGNORED for name in settings} - {"eval_dataset"} | {"bf16"}
    assert tested <= listed
    assert listed - tested <= {
        "PPOConfig",
        "TrainingArguments",
        "PPOTrainer",
        "fp16",
        "gradient_checkpointing",
        "gradient_checkpointing_enable",
        "logging_strategy",
        "total_episodes",
        "accelerate",
    }
    source = inspect.getsource(ppo_trainer)
    for name in ("max_grad_norm", "max_steps", "fp16", "logging_strategy", "sft_model_path", "dataset_num_proc"):
        assert f"args.{name}" not in source


def test_accelerate_launch_still_sets_the_precision(make, monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        assert make().accelerator.mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state()


def test_every_round_is_logged_and_nothing_is_evaluated(make):
    lines = trained(make(logging_steps=100, eval_strategy="steps", eval_steps=1, eval_dataset=prompts(8)))
    assert [line["step"] for line in lines] == [1, 2]
    assert not [key for line in lines for key in line if key.startswith("eval")]


def test_a_guess_that_has_moved_far_enough_gets_no_gradient(random_round):
    found = random_round(0, cliprange_value=0.01)
    free = random_round(0, cliprange_value=100.0)
    start, target, scored = free.passes[0].values, free.passes[0].returns, ~free.passes[0].padding_mask_p1
    guess = torch.zeros_like(start)
    guess[free.passes[0].micro_batch_inds] = free.passes[0].vpred
    towards = scored & (((target - start) * (guess - start)) > 0) & ((guess - start).abs() > 0.01)
    towards &= (target - start).abs() > (guess - start).abs()
    here = slice(found.context - 1, -1)
    assert towards.any()
    assert (found.gradients[0][1][:, here, 0][towards] == 0).all()
    assert (free.gradients[0][1][:, here, 0][towards] != 0).all()


def test_numpy_shuffles_and_is_not_seeded(make):
    def after(seed):
        trainer = make(num_mini_batches=4, total_episodes=4)
        np.random.seed(seed)
        trainer.train()
        return torch.cat([weight.flatten() for weight in trainer.policy_model.parameters()])

    make()  # it sets numpy's seed to 0 before it builds the trainer
    left_behind = np.random.get_state()[1].copy()
    np.random.seed(0)
    assert (left_behind == np.random.get_state()[1]).all()
    assert torch.equal(after(1), after(1))
    assert not torch.equal(after(1), after(2))


def test_a_callback_cannot_stop_the_run(make):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            control.should_training_stop = True

    assert len(trained(make(callbacks=[Stop()]))) == 2


def test_train_takes_no_checkpoint(make):
    assert list(inspect.signature(PPOTrainer.train).parameters) == ["self"]
    with pytest.raises(TypeError, match="resume_from_checkpoint"):
        make().train(resume_from_checkpoint=True)


def test_evaluate_fails(make):
    with pytest.raises(AttributeError, match="_memory_tracker"):
        make(eval_dataset=prompts(8)).evaluate()


def test_a_checkpoint_holds_the_policy_alone(make):
    trainer = make(save_strategy="steps", save_steps=1)
    trainer.train()
    folder = Path(trainer.args.output_dir, "checkpoint-2")
    assert {"checkpoint-1", "checkpoint-2"} <= {path.name for path in Path(trainer.args.output_dir).iterdir()}
    saved = load_file(folder / "model.safetensors")
    assert set(saved) == set(policy().state_dict())
    assert torch.equal(saved["lm_head.weight"], trainer.policy_model.lm_head.weight)
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    both = sum(1 for weight in trainer.model.parameters() if weight.requires_grad)
    assert len(state) == both > len(saved)


# ------------------------------------------------------------------------------------------------------- the four models


def test_a_missing_value_model_is_an_error(make):
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'base_model_prefix'"):
        make(value_model=None)


def test_a_reward_function_or_a_plain_module_is_an_error(make):
    with pytest.raises(AttributeError, match="'function' object has no attribute 'modules'"):
        make(reward_model=lambda texts: [1.0])
    with pytest.raises(AttributeError, match="base_model_prefix"):
        make(reward_model=torch.nn.Linear(2, 2)).train()


def test_one_object_as_policy_and_reference_is_an_error(make):
    model = policy()
    with pytest.raises(ValueError, match="cannot be the same object"):
        make(model=model, ref_model=model)


def test_k2_is_refused(make):
    with pytest.raises(ValueError, match="either 'k1'"):
        make(kl_estimator="k2")


@pytest.mark.parametrize("shared", [True, False])
def test_one_object_as_reward_and_value_model_trains_the_reward(make, shared):
    model = judge(1)
    before = copy.deepcopy(model.state_dict())
    trained(make(reward_model=model, value_model=model if shared else judge(1)))
    moved = not all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert moved == shared


def test_the_modes_of_the_four_models(make, monkeypatch):
    modes = {}
    real = {name: getattr(ppo_trainer, name) for name in ("generate", "get_reward", "forward")}
    trainer = make(total_episodes=4)

    def spy(name):
        def call(model, *rest):
            which = {
                id(trainer.policy_model): "policy",
                id(trainer.ref_model): "reference",
                id(trainer.value_model): "value",
                id(trainer.reward_model): "reward",
                id(trainer.model): "both",
            }[id(model)]
            modes.setdefault((name, which), set()).add((model.training, torch.is_grad_enabled()))
            return real[name](model, *rest)

        return call

    for name in real:
        monkeypatch.setattr(ppo_trainer, name, spy(name))
    trainer.train()
    assert modes == {
        ("generate", "policy"): {(True, False)},
        ("forward", "reference"): {(False, False)},
        ("get_reward", "value"): {(True, False)},
        ("get_reward", "reward"): {(False, False)},
        ("forward", "both"): {(True, True)},
    }
    assert make(reward_model=judge(1).train()).reward_model.training
    assert make(ref_model=policy().train()).ref_model.training
    learning = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    for model, learns in (
        (trainer.policy_model, True),
        (trainer.value_model, True),
        (trainer.ref_model, False),
        (trainer.reward_model, False),
    ):
        assert all((id(weight) in learning) == learns for weight in model.parameters())
    assert all(weight.requires_grad for weight in trainer.reward_model.parameters())


def test_checkpointing_pauses_while_sampling_and_comes_back_without_its_settings(make, monkeypatch):
    model, calls = policy(), []
    model.gradient_checkpointing_enable({"use_reentrant": True})
    trainer = make(model=model, total_episodes=4)
    assert trainer.model.is_gradient_checkpointing
    for name in ("gradient_checkpointing_disable", "gradient_checkpointing_enable"):
        monkeypatch.setattr(model, name, lambda *args, name=name, **more: calls.append((name, args, more)))
    trainer.train()
    assert calls == [("gradient_checkpointing_disable", (), {}), ("gradient_checkpointing_enable", (), {})]


def test_the_reference_is_a_copy_in_the_dtype_of_the_policy(make):
    trainer = make(model=policy().bfloat16())
    assert trainer.ref_model.dtype == torch.bfloat16
    assert not any(weight.requires_grad for weight in trainer.ref_model.parameters())
    assert not hasattr(trainer.model, "add_model_tags")


def test_the_reward_model_reads_the_policys_ids(make):
    read = []
    model = judge(1)
    model.model.register_forward_pre_hook(lambda _, args, more: read.append(more["input_ids"]), with_kwargs=True)
    trainer = make(reward_model=model, total_episodes=4)
    seen = watched(trainer)
    trainer.train()
    whole = torch.cat([seen[0].queries, seen[0].postprocessed_responses], dim=1)
    assert torch.equal(read[0], whole)  # padding is token 0 here
    torch.manual_seed(0)
    small = Qwen3ForSequenceClassification(Qwen3Config(**config(pad_token_id=PAD, num_labels=1) | {"vocab_size": 5}))
    with pytest.raises(IndexError):
        make(reward_model=small).train()


def test_the_score_is_read_at_the_end_token():
    model, context = judge(1), 3
    rows = torch.tensor(
        [[2, 5, 6, 7, 8, EOS, PAD, PAD], [2, 5, 6, 7, 8, 9, 10, 11], [2, 5, 6, PAD, PAD, PAD, PAD, PAD]]
    )
    with torch.no_grad():
        every, score, last = get_reward(model, rows, PAD, context)
        own = model(rows[:1, :6]).logits[0, 0]
    assert last.tolist() == [5, 7, 2]  # the end token; the last one of a cut answer; the prompt's, for an empty one
    assert rows[0, last[0]] == EOS
    assert torch.equal(score, every[torch.arange(3), last, 0])
    torch.testing.assert_close(score[0], own)


def test_a_chat_template_may_go_on_behind_the_end_token():
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text("utf-8")
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    text = tokenizer(template=template).apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_end|>\n")


def test_the_adapter_is_for_the_policy_alone(make):
    trainer = make(peft_config=LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5))
    learning = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert all("lora_" in name for name in learning if name.startswith("policy."))
    value = [name for name in learning if name.startswith("value_model.")]
    assert len(value) == len(list(judge().parameters()))
    assert trainer.ref_model is None
    assert abs(trained(trainer)[0]["objective/kl"]) < 1e-5


def test_dropout_layers_are_off_in_all_four(make):
    models = {name: maker() for name, maker in (("model", policy), ("reward_model", judge), ("value_model", judge))}
    for model in models.values():
        model.more = torch.nn.Dropout(0.3)
    trainer = make(**models, peft_config=LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5))
    layers = [m for model in (trainer.model, trainer.reward_model) for m in model.modules()]
    dropout = [layer.p for layer in layers if isinstance(layer, torch.nn.Dropout)]
    assert len(dropout) > 3 and set(dropout) == {0}
    assert make(model=models["model"]).ref_model.more.p == 0


def adapted(seed=0):
    torch.manual_seed(seed)
    return get_peft_model(policy(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))


def test_a_trained_adapter_is_measured_against_the_base_below_it(make):
    trainer = make(model=adapted(), total_episodes=4)
    assert isinstance(trainer.policy_model, PeftModel)
    assert trainer.ref_model is None
    assert abs(trained(trainer)[0]["objective/kl"]) > 1e-2


def test_a_second_copy_of_the_adapter_is_the_reference(make):
    model = adapted()
    model.add_adapter("sft", LoraConfig(task_type="CAUSAL_LM"))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    weights = {name: weights[name.replace(".sft.", ".default.")] for name in weights}
    model.load_state_dict(weights)
    trainer = make(model=model, ref_adapter_name="sft")
    first, second = trained(trainer)
    assert abs(first["objective/kl"]) < 1e-5 < abs(second["objective/kl"])
    after = trainer.policy_model.state_dict()
    moved = {name: not torch.equal(weights[name], after[name]) for name in weights if "lora_B" in name}
    assert all(changed == (".default." in name) for name, changed in moved.items())


def test_inside_distributed_data_parallel_saving_and_lora_break(make, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        trainer = make()
        trainer.model = torch.nn.parallel.DistributedDataParallel(trainer.model)
        with pytest.raises(RuntimeError, match="share memory"):
            trainer.save_model(str(tmp_path / "saved"))
        trainer.model.policy = trainer.model.module.policy  # the way out of the script
        trainer.save_model(str(tmp_path / "saved"))
        assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(policy().state_dict())
        lora = make(peft_config=LoraConfig(task_type="CAUSAL_LM"))
        lora.model = torch.nn.parallel.DistributedDataParallel(lora.model)
        with pytest.raises(AttributeError, match="policy"), lora.null_ref_context():
            pass
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------- prompts and ends


def test_right_padding_begins_the_answer_behind_padding(make):
    for side, behind in (("left", 0), ("right", 2)):
        processing_class = tokenizer()
        processing_class.padding_side = side
        trainer = make(processing_class=processing_class, total_episodes=4)
        seen = watched(trainer)
        trainer.train()
        assert int((seen[0].queries[:, -1] == PAD).sum()) >= behind
        if side == "left":
            assert (seen[0].queries[:, -1] != PAD).all()


def test_a_text_column_is_an_error(make):
    rows = prompts().map(lambda row: {"prompt": "text"})
    with pytest.raises(ValueError, match="prompt"):
        make(train_dataset=rows).train()


def test_without_a_stop_token_answers_never_end_and_the_model_forgets_how_to(make, tmp_path):
    model = policy(ends=4.0)
    model.generation_config.eos_token_id = EOS
    trainer = make(model=model, stop_token=None, total_episodes=4)
    seen = watched(trainer)
    trainer.train()
    assert (seen[0].responses == EOS).sum() > 4
    assert (seen[0].sequence_lengths == 5).all()  # six tokens each
    trainer.save_model(str(tmp_path))
    assert "eos_token_id" not in json.loads((tmp_path / "generation_config.json").read_text())


def test_a_list_of_end_tokens_is_replaced_by_one(make):
    model = policy()
    model.generation_config.eos_token_id = [EOS, 7]
    make(model=model)
    assert model.generation_config.eos_token_id == EOS


def test_padding_equal_to_the_end_token_hides_the_end(make, monkeypatch):
    masks = []
    model = policy(ends=3.0)
    model.generation_config.pad_token_id = EOS
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **more: (masks.append(more), generate(**more))[1])
    rows = Dataset.from_list([{"input_ids": [USER, 5, EOS, 3]}] * 8)
    processing_class = left(pad=None)
    processing_class.pad_token = processing_class.eos_token
    trainer = make(model=model, processing_class=processing_class, train_dataset=rows, total_episodes=4)
    seen = watched(trainer)
    trainer.train()
    assert masks[0]["attention_mask"][0].tolist() == [True, True, False, True]
    assert masks[0]["input_ids"][0].tolist() == [USER, 5, 0, 3]
    ends = seen[0].responses == EOS
    assert ends.any()
    assert seen[0].padding_mask[ends].all()  # no end token is trained


def test_a_sampled_padding_token_ends_the_answer(random_round):
    found = random_round(0, lengths=(7, 7, 7, 7))
    assert (found.passes[0].sequence_lengths == 6).all()
    original = torch.randint

    def with_padding(*args, **more):
        made = original(*args, **more)
        made[0, 2] = PAD
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", with_padding)
        found = random_round(0, lengths=(7, 7, 7, 7))
    assert found.passes[0].sequence_lengths.tolist() == [1, 6, 6, 6]
    assert found.passes[0].padding_mask[0].tolist() == [False] * 2 + [True] * 5


@pytest.mark.parametrize("own", [False, True])
def test_the_penalty_is_subtracted_from_answers_without_the_tokenizers_end_token(random_round, own):
    stop = {}
    if own:  # a stop token that ends the first answer before its end token
        stop = {"stop_token": None, "stop_token_id": int(random_round(0).responses[0, 0])}
    found = random_round(0, missing_eos_penalty=2.5, **stop)
    expected = found.scores.clone()
    expected[1] -= 2.5  # the answer of seven tokens was cut
    if own:
        assert found.passes[0].postprocessed_responses[0, 1:].tolist() == [PAD] * (WIDTH - 1)
        ended = (found.passes[0].postprocessed_responses == EOS).any(dim=1)
        expected = found.scores - 2.5 * (~ended).float()
        assert not ended[0]
    torch.testing.assert_close(found.passes[0].scores, expected)
    assert torch.equal(found.read["value"], found.whole)
    cut = torch.cat([found.whole[:, : found.context], found.passes[0].postprocessed_responses], dim=1)
    assert torch.equal(found.read["reward"], cut)
    assert torch.equal(cut, found.whole) != own
    assert found.log["objective/scores"] == pytest.approx(float(expected.mean()), rel=1e-5)


def test_a_negative_penalty_is_a_bonus(random_round):
    found = random_round(0, missing_eos_penalty=-2.5)
    assert float(found.passes[0].scores[1]) == pytest.approx(float(found.scores[1]) + 2.5)


def test_the_score_reaches_the_policy_although_its_place_is_masked(random_round):
    found = random_round(0)
    first = found.passes[0]
    for row, length in enumerate(found.lengths.tolist()):
        place = min(length, WIDTH - 1)
        assert float(first.rewards[row, place]) == pytest.approx(
            float(found.scores[row]) + (0.0 if length < WIDTH else -0.05 * float(first.kl[row, place])), rel=1e-5
        )
        assert bool(first.padding_mask[row, place]) == (length < WIDTH)
        assert not first.padding_mask_p1[row, place]
    advantages = first.returns - first.values
    last = [(row, length - 1) for row, length in enumerate(found.lengths.tolist())]
    for row, t in last:
        if t < WIDTH - 1:
            surprise = found.scores[row] - first.values[row, t + 1]
            here = first.rewards[row, t] + first.values[row, t + 1] - first.values[row, t]
            assert float(advantages[row, t]) == pytest.approx(float(here + 0.95 * surprise), rel=1e-4, abs=1e-5)


def test_masked_log_probabilities_are_1_and_change_nothing(random_round):
    first = random_round(0).passes[0]
    assert first.padding_mask.any()
    for name in ("logprobs", "ref_logprobs", "new_logprobs"):
        values = getattr(first, name)
        mask = first.padding_mask if name != "new_logprobs" else first.padding_mask[first.micro_batch_inds]
        assert (values[mask] == 1.0).all()
    assert (first.ratio[first.padding_mask[first.micro_batch_inds]] == 1).all()
    assert (first.kl[first.padding_mask] == 0).all()
    assert (first.advantages[first.padding_mask] == 0).all()
    assert first.padding_mask_p1.any()
    assert not (first.padding_mask_p1 & ~first.padding_mask).any()
    for values in (first.values, first.returns, first.rewards):
        assert (values[first.padding_mask_p1] == 0).all()
    assert (first.vpred[first.padding_mask_p1[first.micro_batch_inds]] == 0).all()


def test_whitened_rewards_pay_every_token(page):
    lengths = torch.tensor([5, 30])
    inside = torch.arange(31) <= lengths[:, None]
    rewards = page["ppo_token_reward"](torch.ones(2), torch.zeros(2, 31), torch.zeros(2, 31), lengths)
    white = ppo_trainer.masked_whiten(rewards, inside, shift_mean=False)
    mean, deviation = rewards[inside].mean(), rewards[inside].std()
    assert deviation < 1 and mean > 0
    extra = float(mean * (1 - 1 / deviation))
    assert extra < 0
    assert float(white[0, 0]) == pytest.approx(extra, rel=1e-4)
    assert torch.equal(white[inside & (rewards == 0)], white[0, 0].expand(35))


def test_whitening_takes_place_over_the_whole_round(page, random_round):
    found = random_round(0, whiten_rewards=True, per_device_train_batch_size=8, lengths=(3, 7, 1, 5, 2, 6, 7, 4), total_episodes=8)  # fmt: skip
    ours = chain(page, found)
    theirs = ppo_trainer.masked_whiten(ours.rewards, ours.scored, shift_mean=False)
    torch.testing.assert_close(found.passes[0].rewards, torch.where(ours.scored, theirs, 0.0))


def test_whitening_of_rewards_wants_eight_answers_in_a_mini_batch(make):
    with pytest.raises(AssertionError, match="insufficient for whitening"):
        make(whiten_rewards=True)


def test_one_token_cannot_be_whitened():
    mask = torch.tensor([[True, False]])
    assert ppo_trainer.masked_whiten(torch.ones(1, 2), mask).isnan().all()
    with pytest.raises(ValueError, match="mini_batch_size"):
        ppo_trainer.masked_whiten(torch.ones(1, 2), mask & False)


def test_the_temperature_is_in_every_log_probability(make):
    trainer = make(temperature=0.5, total_episodes=4, num_ppo_epochs=1)
    seen = watched(trainer)
    trainer.train()
    whole = torch.cat([seen[0].queries, seen[0].responses], dim=1)
    with torch.no_grad():
        logits = ppo_trainer.forward(trainer.ref_model, whole, PAD).logits[:, seen[0].context_length - 1 : -1]
    logps = logps_of(logits / 0.5, seen[0].responses)
    answer = ~seen[0].padding_mask
    for name in ("logprobs", "ref_logprobs"):
        torch.testing.assert_close(getattr(seen[0], name)[answer], logps[answer], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- tables of samples


def test_tables_come_after_the_first_round_and_then_evenly(make, monkeypatch):
    rounds = []
    trainer = make(eval_dataset=prompts(8), num_sample_generations=2, total_episodes=24, train_dataset=prompts(8))
    monkeypatch.setattr(trainer, "generate_completions", lambda sampling: rounds.append(trainer.state.global_step))
    trainer.train()
    assert rounds == [1, 4]


def test_too_few_prompts_make_an_empty_table(make, capsys):
    trainer = make(eval_dataset=prompts(3), per_device_eval_batch_size=4, num_sample_generations=1, total_episodes=4)
    assert len(trainer.eval_dataloader) == 0
    trainer.train()


def test_a_dictionary_of_evaluation_sets_is_not_understood(make):
    trainer = make(eval_dataset={"one": prompts(8)}, per_device_eval_batch_size=1, num_sample_generations=1)
    with pytest.raises(KeyError):
        trainer.train()


def test_a_run_with_tables_samples_other_answers(make, capsys):
    without = trained(make(num_sample_generations=0, eval_dataset=prompts(8)))
    with_tables = trained(make(num_sample_generations=1, eval_dataset=prompts(8), per_device_eval_batch_size=4))
    assert with_tables[0]["objective/scores"] == without[0]["objective/scores"]
    assert with_tables[1]["objective/scores"] != without[1]["objective/scores"]
    assert "model response" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- the neighbours


def test_the_group_baselines_on_the_page_are_those_of_the_page_about_grpo(page):
    namespace = {}
    for fence in fences(PAGE.with_name("grpo.md")):
        if fence.lang == "python" and ("def group_advantage(" in fence.text or "def rloo_loss(" in fence.text):
            exec(fence.text, namespace)
    scores = torch.tensor([1.0, 0.0, 0.5, 2.0, 2.0, -1.0])
    torch.testing.assert_close(
        page["group_baseline"](scores, 3, "GRPO"), namespace["group_advantage"](scores, group_size=3)
    )
    logps = torch.zeros(6, 1, requires_grad=True)
    loss = namespace["rloo_loss"](logps, torch.zeros(6, 1), scores, torch.ones(6, 1), group_size=3)
    (gradient,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(page["group_baseline"](scores, 3, "RLOO"), -6 * gradient[:, 0])


def test_the_settings_of_rloo_that_the_page_names_exist():
    fields = arguments_of(RLOOTrainer, RLOOConfig)
    for cells in first_cells(section(f"After TRL {pinned_version()}")):
        for name in re.findall(r"`(\w+)`", cells[1]):
            assert name in fields or name in {"prompt", "RLOOConfig", "RLOOTrainer", "model"}, name
        for name in re.findall(r"`(\w+)`", cells[0]):
            known = arguments_of(PPOTrainer, PPOConfig)
            assert name in known or name in {"input_ids", "PPOConfig", "PPOTrainer"}, name
    assert RLOOConfig(output_dir="x", use_cpu=True, bf16=False).beta > 0


# ------------------------------------------------------------------------------------------------------- the page itself


def test_every_test_that_the_page_names_exists():
    named = named_tests(PAGE)
    assert len(named) > 40
    assert named <= set(globals())


def test_the_arguments_that_the_page_calls_gone_are_gone():
    text = section("Older code and tutorials")
    here = arguments_of(PPOTrainer, PPOConfig)
    for name in ("config", "tokenizer", "policy", "ref_policy"):
        assert f"`{name}=`" in text
        assert name not in here
    for name in ("init_kl_coef", "target", "adap_kl_ctrl", "ppo_epochs"):
        assert f"`{name}`" in text
        assert name not in here


def test_the_defaults_that_the_page_quotes_are_those_of_the_config(tmp_path):
    quoted, true = defaults_on(PAGE, PPOConfig(output_dir=str(tmp_path), use_cpu=True))
    assert len(quoted) >= 8
    assert quoted == true


def test_the_defaults_in_the_table_of_rounds_are_those_of_the_config(tmp_path):
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True)
    rows = {cells[0].strip("`"): cells[2] for cells in first_cells(section("What is a round").split("```")[0])}
    for name, text in rows.items():
        if number := re.match(r"\d+", text):
            assert getattr(args, name) == int(number[0]), name
    assert args.total_episodes is None and args.num_train_epochs == 3
    assert (args.max_grad_norm, args.per_device_eval_batch_size, args.save_steps) == (1.0, 8, 500)
    assert (args.stop_token, args.missing_eos_penalty, args.whiten_rewards) == (None, None, False)
    assert getattr(args, CHECKPOINTING) is True and args.temperature == 0.7
    assert {"max_steps", "response_length", "num_ppo_epochs"} <= set(rows)
