"""The claims of annotated_trainers/rloo.md that running TRL can show, on a random model of two layers, on the CPU.

Formulas get random logits or random log-probabilities: what the model returns is replaced, the rest is the real method of a
real `RLOOTrainer`. Values and gradients must agree to 1e-5 (relative, float32). `pytest -s` prints the largest error.
"""

import ast
import functools
import inspect
import itertools
import json
import math
import os
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import pytest
import torch
from datasets import Dataset
from markdown_pages import fences
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, TrlParser
from trl.trainer import rloo_config
from walkthrough_tools import (
    ANSWERS,
    CLIP_RATIOS,
    CUT,
    END,
    EXPECTED,
    PAD,
    PAGES,
    built,
    changed,
    comparisons_of_norms,
    config,
    defaults_on,
    ended,
    experts,
    metrics_on,
    model_folder,
    page_of,
    random_batch,
    samples,
    save,
    scored,
    section_of,
    trained,
    trl_loss,
)
from walkthrough_tools import SUMS as ROWS

PAGE = PAGES / "rloo.md"
section = functools.partial(section_of, PAGE)
LONG = [(ids * 20)[:40] for ids in ANSWERS]  # forty tokens each
checkpoint = model_folder(pad_token_id=PAD)


@pytest.fixture
def build(checkpoint, tmp_path):
    return functools.partial(built, checkpoint, tmp_path, trainer=RLOOTrainer, answers=ANSWERS)


@pytest.fixture
def moved(build, checkpoint):
    """A trainer whose policy differs from its reference."""

    def moved(**more):
        return build(model=changed(Qwen3ForCausalLM.from_pretrained(checkpoint)), **more)

    return moved


@pytest.fixture(scope="module")
def shared(checkpoint, tmp_path_factory):
    """One trainer for all tests that only call its methods; `fresh` puts its settings back."""
    return built(checkpoint, tmp_path_factory.mktemp("shared"), trainer=RLOOTrainer, answers=ANSWERS)


@pytest.fixture
def fresh(shared):
    saved = dict(vars(shared))
    yield shared
    shared.model.__dict__.pop("forward", None)
    vars(shared).clear()
    vars(shared).update(saved)


page = page_of(PAGE)


def advantages_of(trainer) -> list[float]:
    """The advantages of the last round."""
    return list(trainer._logs["advantages"])


def last(trainer, key: str) -> float:
    return trainer._metrics["train"][key][-1]


def same(completions, **_) -> list[float]:
    return [1.0] * len(completions)


def penalties(trainer, batch, temperature=1.0) -> torch.Tensor:
    """The log-ratio of policy and reference for each answer token, from two plain forward passes. Shape (N, T)."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    both = []
    for model in (trainer.model, trainer.ref_model):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1] / temperature
        logps = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        both.append(logps[:, -batch["completion_ids"].shape[1] :] * batch["completion_mask"])
    return both[0] - both[1]


# ---------------------------------------------------------------------------------------- the formulas, against TRL

ERRORS, agree, summary = comparisons_of_norms()
COMPARED = {"penalized-reward", "leave-one-out-advantage", "rloo-loss", "rloo-on-fresh-answers", "centred-advantage"}
COMPARED |= {"normalized-advantage"}


def random_round(trainer, seed, group, **settings):
    """TRL's own scoring of a round of twelve answers with random log-probabilities and two random reward functions."""
    dice = torch.Generator().manual_seed(seed)
    weights = torch.tensor([0.3, 2.0])
    rewards = torch.randn(12, 2, generator=dice)
    logps = {"policy": -torch.rand(12, 6, generator=dice), "reference": -torch.rand(12, 6, generator=dice)}

    def scores_of(model, *_, **__):
        return logps["reference" if model is trainer.ref_model else "policy"], None, None

    with pytest.MonkeyPatch.context() as patch:
        functions = [lambda column=k, **_: rewards[:, column].tolist() for k in range(2)]
        for name, value in {
            "_get_per_token_logps_and_entropies": scores_of,
            "reward_funcs": functions,
            "reward_func_names": ["a", "b"],
            "reward_processing_classes": [None, None],
            "reward_weights": weights,
            "num_generations": group,
            **settings,
        }.items():
            patch.setattr(trainer, name, value)
        batch = scored(trainer, rows=12 // group, copies=group)
    return SimpleNamespace(batch=batch, scores=rewards @ weights, mask=batch["completion_mask"], **logps)


@pytest.mark.parametrize("group", [2, 3, 4])
def test_reward_and_advantage_on_the_page_are_what_trl_computes(fresh, page, group):
    for seed, (beta, bounds) in itertools.product(range(3), ((0.05, None), (0.7, (-1.0, 0.5)), (0.0, None))):
        found = random_round(fresh, seed, group, beta=beta, reward_clip_range=bounds)
        rewards = page["penalized_reward"](found.scores, found.policy, found.reference, found.mask, beta, bounds)
        for name in ("leave_one_out_advantage", "centred_advantage"):
            agree(page[name](rewards, group), found.batch["advantages"])
        agree((found.policy * found.mask).sum(1), found.batch["old_logps"])
        normalized = random_round(
            fresh, seed, group, beta=beta, reward_clip_range=bounds, normalize_advantages=True
        ).batch
        plain = page["leave_one_out_advantage"](rewards, group)
        agree(page["normalized_advantage"](plain), normalized["advantages"])


def random_loss(trainer, seed, drift=0.05, **settings):
    """TRL's own `_compute_loss` on random logits, its gradient, and what went into it."""
    batch, logits = random_batch(seed, drift)
    batch["old_logps"] = (batch["old_per_token_logps"] * batch["completion_mask"]).sum(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(trainer, name, value)
        logps = torch.log_softmax(logits[:, :-1] / trainer.temperature, -1)
        logps = logps.gather(-1, batch["completion_ids"][..., None])[..., 0]
        if drift == 0:
            batch["old_logps"] = (logps.detach() * batch["completion_mask"]).sum(1)
        trainer._metrics["eval"].clear()
        loss = trl_loss(trainer, batch, logits)
    (slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return SimpleNamespace(loss=loss.detach(), slope=slope, logits=logits, logps=logps, mask=batch["completion_mask"],
                           **{k: batch[k] for k in ("advantages", "old_per_token_logps")})  # fmt: skip


def test_the_loss_on_the_page_is_what_trl_computes(fresh, page):
    clipped = 0
    for seed, (low, high) in itertools.product(range(6), ((0.2, 0.2), (0.1, 0.3))):
        found = random_loss(fresh, seed, epsilon_low=low, epsilon_high=high)
        ours = page["rloo_loss"](found.logps, found.old_per_token_logps, found.advantages, found.mask, low, high)
        agree(ours, found.loss)
        agree(torch.autograd.grad(ours, found.logits)[0], found.slope)
        clipped += fresh._metrics["eval"]["clip_ratio/region_mean"][0]
    assert 0 < clipped < 12  # both kinds of answers were seen
    plain = page["rloo_loss"](found.logps, found.old_per_token_logps, found.advantages, found.mask)
    agree(plain, random_loss(fresh, seed).loss)


def test_on_fresh_answers_the_gradient_is_that_of_reinforce(fresh, page):
    for seed in range(4):
        found = random_loss(fresh, seed, drift=0, temperature=0.7)
        ours = page["rloo_on_fresh_answers"](found.logps, found.advantages, found.mask)
        agree(torch.autograd.grad(ours, found.logits)[0], found.slope)
        assert float(found.loss) == pytest.approx(-float(found.advantages.mean()), abs=1e-6)


def test_every_formula_of_the_page_has_a_block_and_a_comparison():
    text = PAGE.read_text("utf-8")
    names = re.findall(r"^<!-- formula: ([a-z0-9-]+) -->$", text, re.M)
    assert len(names) == text.count("```math") == len(set(names))
    assert set(names) == COMPARED
    here = Path(__file__).read_text("utf-8")
    for name in names:
        function = name.replace("-", "_")
        block = re.search(rf"<!-- formula: {name} -->.*?```python\n(.*?)```", text, re.S)[1]
        assert f"def {function}(" in block, name
        assert f'"{function}"' in here, name


# ----------------------------------------------------------------------------------- what is the same as in GRPO

WORD_FOR_WORD = {
    *("_set_signature_columns_if_needed", "get_train_dataloader", "get_eval_dataloader", "_get_train_sampler"),
    *("_get_eval_sampler", "_prepare_inputs", "training_step", "prediction_step", "_log_completion_extra"),
    "_log_metric",
}
LACKING = {  # a method -> how many of its lines are not GRPO's: signatures and calls with fewer names
    "_calculate_rewards": 0,
    "_get_per_token_logps_and_entropies": 0,
    "compute_loss": 0,
    "log": 0,
    "_save_checkpoint": 0,
    "_tokenize_prompts": 1,
    "_generate_single_turn": 3,
    "_generate": 2,
}


def statements(function) -> list[str]:
    """A method line by line, without comments and docstrings, and with GRPO's name replaced."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)).replace("GRPO", "RLOO"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return [line.strip() for line in ast.unparse(tree).split("\n")]


def words(line: str) -> set[str]:
    return set(re.findall(r"\w+", line))


def test_the_methods_that_the_page_calls_the_same_are():
    for name in WORD_FOR_WORD:
        assert statements(getattr(RLOOTrainer, name)) == statements(getattr(GRPOTrainer, name)), name
    intro = section("Inside TRL, line by line").split("###")[0]
    assert "Ten methods are the same word for word" in " ".join(intro.split())
    assert len(WORD_FOR_WORD) == 10
    for name in ("_set_signature_columns_if_needed", "_prepare_inputs", "training_step", "prediction_step"):
        assert f"`{name}`" in intro


def test_the_methods_that_lack_something_hold_nothing_new():
    for name, count in LACKING.items():
        ours, theirs = (statements(getattr(trainer, name)) for trainer in (RLOOTrainer, GRPOTrainer))
        new = [line for line in ours if line not in theirs]
        assert len(new) == count, (name, new)
        assert len(ours) < len(theirs)
        for line in new:
            assert any(words(line) <= words(other) | {"_"} for other in theirs), line
    assert "Eight only lack something" in " ".join(section("Inside TRL, line by line").split())
    others = {"__init__", "_generate_and_score_completions", "_compute_loss"}
    own = {name for name, value in vars(RLOOTrainer).items() if inspect.isfunction(value)}
    assert own == WORD_FOR_WORD | set(LACKING) | others
    settings, theirs = statements(RLOOConfig.__post_init__), statements(GRPOConfig.__post_init__)
    assert [line for line in settings if line not in theirs] == []


def test_what_rloo_lacks():
    assert not issubclass(RLOOTrainer, GRPOTrainer)
    assert not {"compute_liger_loss", "_tool_call_loop"} & set(dir(RLOOTrainer))
    parameters = set(inspect.signature(RLOOTrainer.__init__).parameters)
    assert not {"tools", "environment_factory", "rollout_func", "ref_model", "reward_model"} & parameters
    fields = set(RLOOConfig.__dataclass_fields__)
    assert not {"loss_type", "scale_rewards", "delta", "importance_sampling_level"} & fields
    assert fields - set(GRPOConfig.__dataclass_fields__) == {"normalize_advantages", "reward_clip_range"}
    assert "to_parquet" in inspect.getsource(GRPOTrainer.log)
    assert "to_parquet" not in inspect.getsource(RLOOTrainer.log)


def test_on_fresh_answers_it_is_dr_grpo_times_two_factors(build, checkpoint, tmp_path):
    def gradient(trainer):
        batch = scored(trainer, rows=2)
        trainer.model.eval()
        trainer._compute_loss(trainer.model, batch).backward()
        return torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()])

    theirs = built(checkpoint, tmp_path, answers=ANSWERS, loss_type="dr_grpo", scale_rewards="none")
    agree(gradient(build(beta=0.0)), gradient(theirs) * 4 / 3 * theirs.max_completion_length)


# ----------------------------------------------------------------------------------------- numbers that look wrong


def test_the_loss_is_zero_in_every_step_and_its_gradient_is_not(build):
    trainer = build(max_steps=3, beta=0.3, learning_rate=1e-2, per_device_train_batch_size=8)
    lines = trained(trainer)
    assert [line["loss"] for line in lines] == [pytest.approx(0, abs=1e-6)] * 3
    assert all(line["grad_norm"] > 0.5 for line in lines)
    assert lines[0]["kl"] == 0.0
    assert lines[2]["kl"] != 0.0


def measured(name: str, key: str) -> list[float]:
    return json.loads((EXPECTED / f"{name}.json").read_text("utf-8"))["log"][key]["mean"]


def test_the_first_loss_of_the_toy_run_is_rounding():
    assert max(abs(loss) for loss in measured("rloo", "loss")) < 1e-7
    rewards = measured("rloo", "reward")
    assert rewards[-1] > rewards[0] + 0.15


def test_the_gradient_of_the_toy_run_is_above_one_and_grpos_is_not():
    assert min(measured("rloo", "grad_norm")) > 1
    assert max(measured("grpo", "grad_norm")) < 0.5


def test_with_several_steps_for_a_round_the_loss_is_the_mean_of_what_fell_into_the_step(build):
    trainer = build(per_device_train_batch_size=2, steps_per_generation=4, max_steps=4, learning_rate=0.0)
    seen, compute = [], trainer._compute_loss

    def watched(model, inputs):
        seen.append(-float(inputs["advantages"].mean()))
        return compute(model, inputs)

    trainer._compute_loss = watched
    lines = trained(trainer)
    assert [line["loss"] for line in lines] == [pytest.approx(value, abs=1e-5) for value in seen]
    assert max(abs(value) for value in seen) > 0.1
    assert sum(seen) == pytest.approx(0, abs=1e-5)


def test_the_logged_reward_has_neither_clip_nor_penalty(moved):
    rewards = [100.0, 1.0, -100.0, 0.0]
    line = trained(moved(reward=lambda **_: rewards, reward_clip_range=(-5.0, 5.0), beta=3.0))[0]
    assert line["kl"] != 0
    assert line["reward"] == line["rewards/<lambda>/mean"] == 0.25
    assert line["reward_std"] == pytest.approx(torch.tensor(rewards).std().item())


def test_the_mean_penalty_is_beta_times_kl_times_length(moved):
    trainer = moved(reward=same, beta=0.7)
    per_token = penalties(trainer, scored(trainer))
    length = last(trainer, "completions/mean_length")
    assert length == 4.5
    mean_penalty = 0.7 * float(per_token.sum(1).mean())
    assert mean_penalty == pytest.approx(0.7 * last(trainer, "kl") * length, rel=1e-4)


def test_the_penalty_is_signed_and_so_is_kl(moved):
    trainer = moved()
    per_answer = penalties(trainer, scored(trainer)).sum(1)
    assert per_answer.min() < -0.1 < 0.1 < per_answer.max()
    assert last(trainer, "kl") < 0


def test_equal_rewards_count_as_variance_once_the_policy_has_moved(build, moved):
    line = trained(moved(reward=same))[0]
    assert (line["frac_reward_zero_std"], line["reward_std"]) == (0.0, 0.0)
    for trainer in (moved(reward=same, beta=0.0), build(reward=same), moved(reward=same, answers=ANSWERS[:1])):
        assert trained(trainer)[0]["frac_reward_zero_std"] == 1.0


def test_with_equal_rewards_the_gradient_is_that_of_the_penalty(moved, page):
    trainer = moved(reward=same, beta=0.3)
    batch = scored(trainer)
    expected = page["leave_one_out_advantage"](-0.3 * penalties(trainer, batch).sum(1), 4)
    torch.testing.assert_close(batch["advantages"], expected, atol=1e-5, rtol=1e-4)
    assert trained(moved(reward=same))[0]["grad_norm"] > 0.1
    assert trained(moved(reward=same, beta=0.0))[0]["grad_norm"] == 0.0


def test_the_gradient_grows_with_the_length_and_grpos_does_not(build, checkpoint, tmp_path):
    norms = {"rloo": [], "grpo": []}
    for tokens in (2, 32):
        settings = {"answers": [[*(ids[:-1] * 20)[:tokens], END] for ids in ANSWERS], "max_completion_length": 40}
        norms["rloo"].append(trained(build(beta=0.0, **settings))[0]["grad_norm"])
        norms["grpo"].append(trained(built(checkpoint, tmp_path, **settings))[0]["grad_norm"])
    assert norms["rloo"][1] > 5 * norms["rloo"][0]
    assert norms["grpo"][1] < 1.5 * norms["grpo"][0]


def test_clip_ratios_count_answers(fresh):
    batch, logits = random_batch(0, rows=4)
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    now = (logps.detach() * batch["completion_mask"]).sum(1)
    batch["advantages"] = torch.tensor([1.0, 1.0, -1.0, -1.0])

    def clip_ratios(log_ratios):
        fresh._metrics["eval"].clear()
        batch["old_logps"] = now - torch.tensor(log_ratios)
        trl_loss(fresh, batch, logits)
        return [
            fresh._metrics["eval"][f"clip_ratio/{name}"][0]
            for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")
        ]

    assert clip_ratios([0.5, 0.0, -0.5, 0.0]) == [0.25, 0.0, 0.25, 1.0, 0.5]
    assert clip_ratios([-0.5, -0.5, 0.5, 0.5]) == [0.0] * 5  # the direction that is never clipped
    batch["advantages"] = -torch.ones(4)
    assert clip_ratios([-0.5] * 4) == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_one_answer_for_each_prompt_in_evaluation_has_no_advantage(moved):
    trainer = moved(eval_dataset=Dataset.from_list(ROWS[:4]), num_generations_eval=1)
    line = trainer.evaluate()
    assert (line["eval_loss"], line["eval_frac_reward_zero_std"]) == (0.0, 1.0)
    assert line["eval_reward_std"] > 0
    assert advantages_of(trainer) == [0.0] * 4


# ------------------------------------------------------------------------------------------------------ the penalty


def test_there_is_a_reference_by_default(build):
    assert build().ref_model.dtype == torch.float32
    assert build(beta=0.0).ref_model is None


def test_a_bfloat16_policy_is_penalized_before_it_has_moved(build, checkpoint):
    policy = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    trainer = build(model=policy, reward=same, beta=1.0)
    line = trained(trainer)[0]
    assert trainer.ref_model.dtype == torch.float32
    assert line["kl"] != 0
    assert max(abs(advantage) for advantage in advantages_of(trainer)) > 1e-3


def test_the_penalty_is_the_sum_of_log_ratios(moved, page):
    trainer = moved(beta=1.0)
    batch = scored(trainer)
    per_token = penalties(trainer, batch)
    assert last(trainer, "kl") == pytest.approx(float(per_token.sum() / batch["completion_mask"].sum()), rel=1e-4)
    rewards = torch.tensor([ids[0] / 8 for ids in ANSWERS]) - per_token.sum(1)
    torch.testing.assert_close(batch["advantages"], page["leave_one_out_advantage"](rewards, 4), rtol=1e-4, atol=1e-4)
    k3 = torch.exp(-per_token) + per_token - 1
    other = page["leave_one_out_advantage"](torch.tensor([ids[0] / 8 for ids in ANSWERS]) - k3.sum(1), 4)
    assert float((batch["advantages"] - other).abs().max()) > 0.1


def test_an_answer_twice_as_long_pays_twice_as_much(fresh):
    samples(fresh, [[5] * 3 + [END], [6] * 7 + [END]])
    fresh.reward_funcs, fresh.num_generations = [same], 2
    apart = 20 / 8  # nats for each token: twenty for the answer of eight tokens

    def scores_of(model, ids, *_, **__):
        return torch.full((len(ids), 8), 0.0 if model is fresh.ref_model else apart), None, None

    fresh._get_per_token_logps_and_entropies = scores_of
    short, long = scored(fresh, copies=2)["advantages"].tolist()
    assert fresh.beta == 0.05
    assert (short, long) == (pytest.approx(0.5), pytest.approx(-0.5))  # they paid 0.5 and 1


def test_the_penalty_is_that_at_the_sampling_temperature(moved):
    trainer = moved(temperature=0.5)
    batch = scored(trainer)
    for temperature, equal in ((0.5, True), (1.0, False)):
        mean = float(penalties(trainer, batch, temperature).sum() / batch["completion_mask"].sum())
        assert (last(trainer, "kl") == pytest.approx(mean, rel=1e-4)) == equal


def test_reward_and_penalty_have_no_gradient(moved):
    trainer = moved(num_iterations=2, max_steps=2, learning_rate=0.05, beta=1.0)
    seen, compute = [], trainer._compute_loss

    def watched(model, inputs):
        seen.append(inputs["advantages"])
        return compute(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    assert [advantages.requires_grad for advantages in seen] == [False, False]
    assert torch.equal(*seen)  # the policy has moved in between


def test_a_masked_answer_pays_no_penalty_and_still_counts(moved, page):
    trainer = moved(answers=CUT, reward=ended, mask_truncated_completions=True, beta=1.0)
    batch = scored(trainer)
    assert batch["completion_mask"].sum(1).tolist() == [3, 3, 0, 0]
    paid = penalties(trainer, batch).sum(1)
    assert paid[2:].tolist() == [0.0, 0.0]
    assert paid[:2].abs().min() > 0.01
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0]) - paid
    torch.testing.assert_close(batch["advantages"], page["leave_one_out_advantage"](rewards, 4), rtol=1e-4, atol=1e-5)
    assert batch["old_logps"][2:].tolist() == [0.0, 0.0]


def test_the_score_is_clipped_before_the_penalty(moved, page):
    trainer = moved(reward=lambda **_: [100.0, 1.0, -100.0, 0.0], reward_clip_range=(-5.0, 5.0), beta=3.0)
    batch = scored(trainer)
    paid = 3.0 * penalties(trainer, batch).sum(1)
    rewards = torch.tensor([5.0, 1.0, -5.0, 0.0]) - paid
    other_order = (torch.tensor([100.0, 1.0, -100.0, 0.0]) - paid).clamp(-5, 5)
    assert float((rewards - other_order).abs().max()) > 1
    torch.testing.assert_close(batch["advantages"], page["leave_one_out_advantage"](rewards, 4), rtol=1e-4, atol=1e-4)


def test_normalizing_blows_up_the_penalty_where_all_earn_the_same(moved):
    small, large = (moved(reward=same, normalize_advantages=normalize) for normalize in (False, True))
    scored(small)
    scored(large)
    deviations = [float(torch.tensor(advantages_of(trainer)).std()) for trainer in (small, large)]
    assert 0.01 < deviations[0] < 0.1
    assert deviations[1] == pytest.approx(1, abs=0.02)


def test_a_trained_adapter_is_copied_without_need(build, checkpoint, tmp_path):
    for kind, adapters in ((RLOOTrainer, {"default", "ref"}), (GRPOTrainer, {"default"})):
        lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(Qwen3ForCausalLM.from_pretrained(checkpoint), lora)
        trainer = built(checkpoint, tmp_path, model=model, trainer=kind, beta=0.0)
        assert set(trainer.model.peft_config) == adapters


def test_answers_that_nobody_judged_are_no_others(build):
    batch = scored(build(reward=lambda **_: [1.0, None, 3.0, None], beta=0.0))
    assert batch["advantages"].tolist() == [-2.0, 0.0, 2.0, 0.0]
    batch = scored(build(reward=lambda **_: [1.0, None, None, None], beta=0.0))
    assert batch["advantages"].tolist() == [0.0] * 4


# -------------------------------------------------------------------------------------------------------- the ratio


@pytest.mark.parametrize(("change", "silent"), [(0.10, True), (0.01, False)])
def test_the_ratio_is_that_of_the_whole_answer(fresh, change, silent):
    assert math.log(1.2) > 0.10  # each token stays inside the band
    batch, logits = random_batch(0)
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, batch["completion_ids"][..., None])[..., 0].detach()
    batch["advantages"] = torch.ones(6)
    batch["old_logps"] = ((logps - change) * batch["completion_mask"]).sum(1)
    (slope,) = torch.autograd.grad(trl_loss(fresh, batch, logits), logits)
    long_ones = batch["completion_mask"].sum(1) >= 2
    assert long_ones.all()
    assert (float(slope.abs().max()) == 0) == silent


def test_a_second_use_is_clipped(build):
    first, second = trained(build(max_steps=2, num_iterations=2, learning_rate=0.05))
    assert {first[key] for key in CLIP_RATIOS} == {0.0}
    assert second["clip_ratio/region_mean"] > 0
    assert second["loss"] != 0


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_the_policy_scores_its_answers_twice(build, beta):
    trainer, passes = build(beta=beta), []
    for name in ("model", "ref_model"):
        if getattr(trainer, name):
            getattr(trainer, name).register_forward_hook(
                lambda *_, name=name: passes.append((name, torch.is_grad_enabled()))
            )
    trainer.train()
    assert passes == [("model", False), *([("ref_model", False)] if beta else []), ("model", True)]


def test_there_is_no_correction_for_vllm(build):
    correction = {name for name in GRPOConfig.__dataclass_fields__ if name.startswith("vllm_importance_sampling")}
    assert len(correction) >= 4
    assert not correction & set(RLOOConfig.__dataclass_fields__)
    trainer = build(beta=0.0)
    del trainer._generate_single_turn  # the answers of the tests; now it is TRL's own again
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    sampled = [[[-9.0] for _ in ids] for ids in ANSWERS]  # what vLLM says of its tokens
    trainer.vllm_generation = SimpleNamespace(
        sync_weights=lambda: None, generate=lambda **_: (None, [list(ids) for ids in ANSWERS], sampled, None)
    )
    batch = scored(trainer)
    assert batch["completion_ids"][0].tolist() == [*ANSWERS[0], 0]
    assert set(batch) == {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "old_logps", "advantages"}
    assert float((batch["old_logps"] + 9 * batch["completion_mask"].sum(1)).abs().min()) > 1


def test_iterations_inside_one_step_repeat_the_first(build):
    def weights(**more):
        trainer = build(steps_per_generation=1, **more)
        trained(trainer)
        return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])

    once, twice = weights(), weights(num_iterations=2, gradient_accumulation_steps=2)
    assert torch.allclose(once, twice, atol=1e-6)


def test_accumulation_gives_the_gradient_of_the_large_batch(build):
    def weights(**more):
        trainer = build(beta=0.0, max_grad_norm=0.0, optim="sgd", learning_rate=1e-2, **more)
        trained(trainer)
        return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])

    start = torch.cat([weight.detach().flatten() for weight in build(beta=0.0).model.parameters()])
    together = weights(per_device_train_batch_size=4)
    apart = weights(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert float((together - start).abs().max()) > 1e-4
    assert torch.allclose(together, apart, atol=1e-7)


# ----------------------------------------------------------------------------------------------------- errors in TRL


def with_adapter(checkpoint, dropout):
    torch.manual_seed(0)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        lora_dropout=dropout,
        lora_alpha=32,
        target_modules="all-linear",
    )
    return get_peft_model(Qwen3ForCausalLM.from_pretrained(checkpoint), lora)


def test_dropout_makes_fresh_answers_look_old(build, checkpoint, tmp_path):
    settings = {"answers": LONG, "max_completion_length": 64, "beta": 0.0}
    line = trained(build(model=with_adapter(checkpoint, 0.1), **settings))[0]
    assert abs(line["loss"]) > 1e-4
    assert line["clip_ratio/region_mean"] > 0
    for trainer in (
        build(model=with_adapter(checkpoint, 0.0), **settings),
        build(model=with_adapter(checkpoint, 0.1), disable_dropout=True, **settings),
        built(checkpoint, tmp_path, model=with_adapter(checkpoint, 0.1), loss_type="grpo", **settings),
    ):
        line = trained(trainer)[0]
        assert line["loss"] == pytest.approx(0, abs=1e-6)
        assert line["clip_ratio/region_mean"] == 0


def test_attention_dropout_cannot_be_disabled(build, tmp_path):
    torch.manual_seed(0)
    noisy = changed(Qwen3ForCausalLM(Qwen3Config(**config(attention_dropout=0.5))), by=0.3)
    settings = {"answers": LONG, "max_completion_length": 64, "beta": 0.0, "disable_dropout": True}
    assert trained(build(model=save(noisy, tmp_path / "noisy"), **settings))[0]["clip_ratio/region_mean"] > 0


def test_the_clip_range_works_in_yaml_and_not_on_the_command_line(tmp_path):
    def parsed(*flags):
        flags = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", *flags]
        return TrlParser(RLOOConfig).parse_args_and_config(flags)[0].reward_clip_range

    with pytest.raises(ValueError, match="not used"):
        parsed("--reward_clip_range", "-5", "5")
    assert parsed("--reward_clip_range", "(-5,5)") == ("(", "-", "5", ",", "5", ")")
    (tmp_path / "settings.yaml").write_text("reward_clip_range: [-5.0, 5.0]\n")
    assert list(parsed("--config", str(tmp_path / "settings.yaml"))) == [-5.0, 5.0]


@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_an_infinite_ratio_breaks_the_gradient_and_the_loss_does_not_always_tell(build, advantage):
    trainer = build(beta=0.0)
    batch = scored(trainer)
    trainer.model.eval()
    batch["advantages"] = torch.tensor([advantage, 1.0, -1.0, 0.0])
    for log_ratio, broken in ((88.0, False), (90.0, True)):
        old = batch["old_logps"] - torch.tensor([log_ratio, 0.0, 0.0, 0.0])
        loss = trainer._compute_loss(trainer.model, {**batch, "old_logps": old})
        if not broken or advantage > 0:
            assert loss.isfinite()
        else:
            assert loss.isnan() if advantage == 0 else loss == math.inf
        trainer.model.zero_grad()
        loss.backward()
        assert all(not weight.grad.isfinite().all() for weight in trainer.model.parameters()) == broken


def test_numbers_in_the_notes_are_those_of_the_code():
    assert torch.tensor(88.7).exp().isfinite()
    assert torch.tensor(88.8).exp().isinf()
    assert math.log(1.2) == pytest.approx(0.18, abs=0.005)
    text = PAGE.read_text("utf-8")
    assert "0.18 nats for the *whole answer*, which is 0.0018 per token" in " ".join(text.split())
    other = PAGE.with_name("grpo.md").read_text("utf-8")
    assert "lr=0.01)" in text
    assert "lr=0.3)" in other  # thirty times larger
    comments = inspect.getsource(RLOOTrainer._generate_and_score_completions)
    assert "huggingface.co/papers/2405.14782" in comments  # not the paper of RLOO, which is the next one
    assert RLOOTrainer._paper["id"] == "2402.14740"


# -------------------------------------------------------------------------------------------------- what is logged


def test_the_page_lists_exactly_the_keys_that_a_run_logs(build, tmp_path):
    model = save(experts(pad_token_id=PAD, output_router_logits=False), tmp_path / "moe")
    trainer = build(model=model, eval_dataset=Dataset.from_list(ROWS[:2]), eval_strategy="steps", eval_steps=1)
    trainer.train()
    lines = trainer.state.log_history
    training, evaluation = (next(set(line) for line in lines if key in line) for key in ("loss", "eval_loss"))
    speed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    without = {"grad_norm", "learning_rate", "step_time", "epoch", "step"}
    assert evaluation == {f"eval_{key}" for key in training - without} | speed | {"epoch", "step"}
    logged = {re.sub("/first_token/", "/NAME/", key) for key in training | speed | set(lines[-1])}
    assert set(metrics_on(PAGE)) == logged
    assert lines[-1]["total_flos"] == 0
    seconds, speeds = next((x["eval_runtime"], x["eval_samples_per_second"]) for x in lines if "eval_loss" in x)
    assert seconds * speeds == pytest.approx(2, rel=0.1)  # prompts; there were eight answers


def test_kl_and_aux_loss_need_a_reference_and_experts(build):
    assert not {"kl", "aux_loss"} & set(trained(build(beta=0.0))[0])


# ---------------------------------------------------------------------------------------------------- the neighbours


def test_the_expected_gradient_of_the_page_is_the_exact_one(page):
    for scores, beta in ((page["right_or_wrong"], 0.0), (torch.zeros(4), 1.0), (torch.randn(4), 0.3)):
        exact = page["exact"](scores, beta)
        torch.testing.assert_close(page["expected"](page["rloo"], scores, beta), exact, rtol=1e-4, atol=1e-6)
    half = page["expected"](page["k3_in_the_loss"], page["right_or_wrong"], 0.0)
    torch.testing.assert_close(half, page["exact"](page["right_or_wrong"], 0.0) / 2, rtol=1e-4, atol=1e-6)
    exact, zeros = page["exact"](torch.zeros(4), 1.0), torch.zeros(4)
    plain = page["expected"](page["k3_in_the_loss"], zeros, 1.0)
    corrected = page["expected"](functools.partial(page["k3_in_the_loss"], corrected=True), zeros, 1.0)
    assert float((plain - exact).abs().min()) > 1e-3
    torch.testing.assert_close(corrected[1:], exact[1:], rtol=1e-4, atol=1e-6)
    assert float((corrected - exact)[0].abs()) > 0.01


@pytest.mark.parametrize("corrected", [False, True])
def test_k3_in_the_loss_on_the_page_is_what_grpo_computes(checkpoint, tmp_path, page, corrected):
    trainer = built(checkpoint, tmp_path, loss_type="luspo", beta=0.3, use_bias_correction_kl=corrected)
    batch, logits = random_batch(2, rows=4)
    batch["completion_mask"] = torch.ones_like(batch["completion_mask"])
    scores = torch.tensor([1.0, 0.0, 0.5, 0.0])
    batch["advantages"] = scores - scores.mean()
    del batch["old_per_token_logps"]
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    ours = page["k3_in_the_loss"](logps, batch["ref_per_token_logps"], scores, 0.3, corrected)
    theirs = trl_loss(trainer, batch, logits)
    agree(ours, theirs)
    agree(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


def test_grpos_advantage_on_the_page_is_that_of_its_own_page(page):
    theirs = {}
    block = next(fence for fence in fences(PAGE.with_name("grpo.md")) if fence.lang == "python")
    exec(block.text, theirs)
    rewards = torch.tensor([1.0] + [0.0] * 7 + [1.0] * 4 + [0.0] * 4)
    agree(page["grpo_advantage"](rewards, 8), theirs["group_advantage"](rewards, 8))
    best = [round(float(f(rewards, 8).max()), 2) for f in (page["grpo_advantage"], page["leave_one_out_advantage"])]
    assert best == [2.47, 1.0]
    assert float(page["leave_one_out_advantage"](rewards, 8)[8]) == pytest.approx(0.57, abs=0.005)


def test_ppos_advantage_on_the_page_is_what_trl_computes(page):
    """The lines of PPO's loop that make advantages, run on their own, with values of 0 and lambda 1."""
    from trl.experimental.ppo import PPOTrainer

    source = inspect.getsource(PPOTrainer.train)
    start, end = source.index("lastgaelam = 0"), source.index("returns = advantages")
    lines = textwrap.dedent(" " * 16 + source[start:end])
    dice = torch.Generator().manual_seed(0)
    scores, kl = torch.randn(3, generator=dice), torch.randn(3, 5, generator=dice)
    rewards = -0.1 * kl
    rewards[:, -1] += scores
    names = {"torch": torch, "rewards": rewards, "values": torch.zeros(3, 5), "gen_length": 5, "responses": kl}
    names["args"] = SimpleNamespace(gamma=1.0, lam=1.0)
    exec(lines, names)
    agree(page["ppo_advantage"](scores, kl, beta=0.1), names["advantages"])


# ----------------------------------------------------------------------------------------------------- the page itself


def test_the_old_arguments_are_gone():
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section("Older code and tutorials").split("\n")
        if line.startswith("| `")
    ]
    assert len(rows) >= 10
    fields, parameters = set(RLOOConfig.__dataclass_fields__), set(inspect.signature(RLOOTrainer.__init__).parameters)
    for then, now in rows[1:]:
        gone = {word for word in re.findall(r"`(\w+)`", then.split(",")[0])}
        assert gone == {"reward_clip_range"} or not gone & fields, gone
        assert set(re.findall(r"`(\w+)`", now)) <= fields
    assert not {"config", "policy", "ref_policy", "reward_model"} & parameters
    assert {"model", "reward_funcs"} <= parameters
    assert RLOOConfig.__dataclass_fields__["num_iterations"].default == 1
    assert "rloo_k" not in inspect.getsource(rloo_config)


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text("utf-8"))) - {Path(__file__).stem}
    assert len(named) > 30
    assert named <= set(globals())


def test_the_defaults_that_the_page_quotes_are_those_of_the_config(tmp_path):
    args = RLOOConfig(output_dir=str(tmp_path), use_cpu=True)
    quoted, true = defaults_on(PAGE, args)
    assert len(quoted) >= 15
    assert quoted == true
    assert (args.per_device_train_batch_size, args.disable_dropout, args.remove_unused_columns) == (8, False, False)
