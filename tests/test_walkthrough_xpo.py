"""The claims of annotated_trainers/xpo.md that running TRL can show, on a random model of two layers, on the CPU.

Formulas get random logits, random answers and random scores: sampling, the reward model and the forward pass of the models
are replaced, the rest is the real `training_step` of a real trainer, with its backward pass. `pytest -s` prints the largest
error.
"""

import functools
import inspect
import itertools
import json
import math
import os
import re
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, TrainerCallback
from trl.experimental import utils
from trl.experimental.nash_md import NashMDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.xpo import XPOConfig, XPOTrainer, xpo_trainer
from walkthrough_tools import (
    END,
    EXAMPLES,
    EXPECTED,
    LOG2,
    PAGES,
    QUESTIONS,
    VOCABULARY,
    Says,
    arguments_of,
    calls_of,
    comparisons,
    defaults_on,
    formula_names,
    gpt2,
    made_and_trained,
    made_once,
    make_trainer,
    metrics_on,
    model_folder,
    named_tests,
    page_of,
    parents_sampling_alone_reads,
    reward_model,
    section_of,
    tokenizer,
    trained,
)
from walkthrough_tools import QUESTION_ROWS as ROWS

PAGE = PAGES / "xpo.md"
section = functools.partial(section_of, PAGE)
MEASURED = EXPECTED / "xpo.json"
LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
checkpoint = model_folder()


@pytest.fixture(scope="module")
def policy(checkpoint):
    return lambda: AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def make(policy, tmp_path_factory):
    """Makes an XPOTrainer; keyword arguments of XPOTrainer go there, all others to XPOConfig."""

    def make(rows=ROWS, model=None, trainer=XPOTrainer, settings=XPOConfig, **more):
        if "reward_funcs" not in more:
            more = {"reward_funcs": reward_model(), "reward_processing_classes": tokenizer(), **more}
        sizes = {"per_device_train_batch_size": 4, "max_new_tokens": 8, "max_steps": 1}
        more = {**sizes, "gradient_checkpointing": False, **more}
        model = policy() if model is None else model
        return make_trainer(trainer, settings, tmp_path_factory.mktemp("run"), rows, model=model, **more)

    return make


trained_once = made_and_trained(max_steps=2)
shared = made_once()


def measured(key: str) -> list[float]:
    return json.loads(MEASURED.read_text("utf-8"))["log"][key]["mean"]


# ---------------------------------------------------------------------------- the formulas, against TRL's own methods


page = page_of(PAGE)


class Step:
    """TRL's own `training_step` on given or random answers, logits and scores. Policy first, reference second, always."""

    def __init__(self, trainer, seed=0, pairs=4, scores=None, answers=None, logits=None, others=None, **settings):
        dice = torch.Generator().manual_seed(seed)
        prompt = torch.tensor([trainer.processing_class("1+2")["input_ids"]] * pairs)
        if answers is None:  # two lengths, and some of the answers end
            answers = []
            for length in (7, 5):
                ids = torch.randint(4, VOCABULARY, (pairs, length), generator=dice)
                ends = torch.randint(0, 2 * length, (pairs,), generator=dice)
                answers.append(torch.where(torch.arange(length) == ends[:, None], END, ids))
        if logits is None:
            shapes = [(pairs, 3 + ids.shape[1], VOCABULARY) for ids in answers]
            own = [2 * torch.randn(shape, generator=dice, dtype=torch.float64) for shape in shapes]
            noise = [torch.randn(shape, generator=dice, dtype=torch.float64) for shape in shapes]
            logits = own, [a + 0.7 * b for a, b in zip(own, noise, strict=True)]
        self.logits, ref_logits = [a.clone().requires_grad_() for a in logits[0]], logits[1]
        self.scores = torch.randn(2, pairs, generator=dice) if scores is None else torch.tensor(scores)

        def gather(tensor):
            return tensor if others is None else torch.stack([tensor.mean().double(), torch.tensor(others).double()])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "stats", {key: [] for key in trainer.stats})
            outputs = [torch.cat([prompt, ids], 1) for ids in answers]
            patch.setattr(trainer, "_generate_completions", lambda prompts, model: outputs)
            patch.setattr(trainer, "_compute_rewards", lambda *_: tuple(self.scores))
            patch.setattr(trainer, "ref_model", Says(*ref_logits))
            patch.setattr(trainer.accelerator, "gather_for_metrics", gather)
            for name, value in settings.items():
                patch.setattr(trainer.args if name == "loss_type" else trainer, name, value)
            self.loss = trainer.training_step(Says(*self.logits), {"prompt": ["1+2"] * pairs})
            self.logged = {key: value[0] for key, value in trainer.stats.items()}
        self.gradient = [a.grad for a in self.logits]
        cut = [utils.truncate_right(ids, END, 0) for ids in answers]
        self.ended = [(ids == END).any(1) for ids, _ in cut]

        def sums(of):
            each = (
                (torch.log_softmax(a[:, 2:-1], -1).gather(-1, ids[..., None])[..., 0] * mask).sum(1)
                for a, (ids, mask) in zip(of, cut, strict=True)
            )
            return torch.stack(list(each))

        self.logps, self.ref_logps = sums(self.logits), sums(ref_logits)
        self.own_wins = self.scores[0] >= self.scores[1]


ERRORS, agree, summary = comparisons()


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_the_loss_on_the_page_is_what_trl_computes(page, shared, kind):
    wins = []
    for seed, pairs in itertools.product(range(4), (1, 2, 5)):
        step = Step(shared, seed, pairs, loss_type=kind, _beta=0.3, _alpha=0.02)
        ours = page["xpo_loss"](step.logps, step.ref_logps, step.own_wins, alpha=0.02, beta=0.3, loss_type=kind)
        agree(ours, step.loss)
        for ours_, theirs in zip(torch.autograd.grad(ours, step.logits), step.gradient, strict=True):
            agree(ours_, theirs)
        wins += step.own_wins.tolist()
    assert 0 < sum(wins) < len(wins)


def slope_of(margin, own_wins, alpha, beta, level=0.0):
    """What TRL's loss asks of the log-probability of the reference's answers. `margin`: h(policy's) - h(reference's)."""
    other = torch.full_like(margin, level).requires_grad_()
    this = SimpleNamespace(alpha=alpha, beta=beta, args=SimpleNamespace(loss_type="sigmoid"))
    sums = (margin + level, other, torch.full_like(margin, level), torch.zeros_like(margin))
    own, theirs, ref_theirs, ref_own = (each[:, None] for each in sums)
    loss, *_ = XPOTrainer._compute_losses(this, own - level, theirs, ref_theirs, ref_own, own_wins)
    return len(margin) * torch.autograd.grad(loss, other)[0]


def test_the_slope_on_the_page_is_what_trl_has(page):
    margin = torch.linspace(-40, 40, 9, dtype=torch.float64).repeat(2)
    own_wins = torch.arange(18) < 9
    for alpha, beta in itertools.product((0.0, 1e-5, 0.02), (0.1, 0.5)):
        agree(page["xpo_slope"](margin, own_wins, alpha, beta), slope_of(margin, own_wins, alpha, beta))


def test_the_balance_on_the_page_is_where_the_gradient_is_0(page):
    lost = torch.tensor([False])
    for alpha, beta in ((1e-5, 0.1), (0.01, 0.1), (0.06, 0.1), (0.2, 0.5)):
        lead = page["xpo_balance"](torch.tensor([alpha], dtype=torch.float64), beta)
        before, there, beyond = (slope_of(-lead + step, lost, alpha, beta).item() for step in (1.0, 0.0, -1.0))
        assert abs(there) < 1e-9 * beta
        assert before < 0 < beyond


def test_an_alpha_of_beta_or_more_never_lets_the_reference_win():
    margin = torch.linspace(-300, 300, 61, dtype=torch.float64)
    lost = torch.zeros(61, dtype=torch.bool)
    for alpha in (0.1, 0.2):
        assert (slope_of(margin, lost, alpha, beta=0.1) >= 0).all()
    assert (slope_of(margin, lost, 0.09, beta=0.1) < 0).any()
    assert slope_of(torch.zeros(1), lost[:1], 0.05 + 1e-6, beta=0.1) > 0 > slope_of(torch.zeros(1), lost[:1], 0.04, 0.1)


def test_the_exploration_has_one_slope_everywhere():
    for own_wins, level in itertools.product((True, False), (0.0, -10.0, -1000.0)):
        margin, wins = torch.tensor([0.0, 5.0], dtype=torch.float64), torch.tensor([own_wins] * 2)
        more = slope_of(margin, wins, 0.02, 0.1, level) - slope_of(margin, wins, 0.0, 0.1, level)
        agree(more, torch.full((2,), 0.02))


def test_every_displayed_formula_has_its_function_and_is_compared_above():
    known = {"xpo-loss", "xpo-slope", "xpo-balance"}
    assert formula_names(PAGE) == sorted(known)


# ------------------------------------------------------------------------------------------------------- what is logged


def test_the_page_lists_exactly_the_keys_that_a_run_logs(trained_once):
    logged = set().union(*trained_once.state.log_history)
    assert set(metrics_on(PAGE)) == logged
    assert trained_once.state.log_history[-1]["total_flos"] == 0


def test_every_metric_is_what_the_table_says(shared):
    margins_of_scores = set()
    for seed in range(3):
        step = Step(shared, seed, _beta=0.3, _alpha=0.02)
        chosen, rejected = (0.3 * h for h in _by_rank(step.logps - step.ref_logps, step.own_wins))
        sums = _by_rank(step.logps + step.ref_logps, step.own_wins)
        table = {
            "loss/dpo": -torch.nn.functional.logsigmoid(chosen - rejected).mean(),
            "loss/xpo": 0.02 * step.logps[1].mean(),
            "objective/model_scores": step.scores[0].mean(),
            "objective/ref_scores": step.scores[1].mean(),
            "objective/scores_margin": (step.scores[0] - step.scores[1]).mean(),
            "objective/kl": (step.logps - step.ref_logps).mean(),
            "objective/entropy": -step.logps.mean(),
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).double().mean(),
            "logps/chosen": sums[0].mean(),
            "logps/rejected": sums[1].mean(),
            "val/model_contain_eos_token": step.ended[0].double().mean(),
            "val/ref_contain_eos_token": step.ended[1].double().mean(),
            "alpha": 0.02,
            "beta": 0.3,
        }
        assert set(table) == set(step.logged)
        for key, value in table.items():
            agree(value, step.logged[key])
        assert float(step.loss) == pytest.approx(step.logged["loss/dpo"] + step.logged["loss/xpo"])
        margins_of_scores.add(step.logged["objective/scores_margin"] > 0)
    assert margins_of_scores == {True, False}


def _by_rank(values, own_wins):
    """Values of the policy's and of the reference's answers, as those of chosen and of rejected ones."""
    return torch.where(own_wins, *values), torch.where(own_wins, values[1], values[0])


def test_all_metrics_are_gathered(shared):
    alone, with_others = Step(shared, seed=2), Step(shared, seed=2, others=1000.0)
    same = {key for key, value in alone.logged.items() if with_others.logged[key] == value}
    assert same == {"alpha", "beta"}


def test_logged_log_probabilities_are_those_of_two_models_added(trained_once):
    first = trained_once.state.log_history[0]
    # policy and reference are one model here, so the sum of both answers' keys is four times their mean
    assert first["logps/chosen"] + first["logps/rejected"] == pytest.approx(-4 * first["objective/entropy"], rel=1e-4)


@pytest.mark.parametrize(("own", "reference"), [((4, 2, 2), (2, 2, 4)), ((6, 1, 1), (2, 2, 4)), ((2, 4, 2), (1, 1, 6))])
def test_the_kl_is_half_of_a_difference_of_two(shared, own, reference):
    p, q = (torch.tensor(counts, dtype=torch.float64) / 8 for counts in (own, reference))
    tokens = torch.tensor([10, 11, 12])
    # eight answers of one token, each token as often as its writer says
    answers = [tokens.repeat_interleave(torch.tensor(counts))[:, None] for counts in (own, reference)]
    logits = []
    for distribution in (p, q):
        row = torch.full((VOCABULARY,), -1e9, dtype=torch.float64)
        row[tokens] = distribution.log()
        logits.append([row.expand(8, 4, -1).clone()] * 2)
    there, back = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    step = Step(shared, pairs=8, answers=answers, logits=logits)
    assert step.logged["objective/kl"] == pytest.approx(float(there - back) / 2, abs=1e-9)
    entropy, surprise = -(p * p.log()).sum(), -(q * p.log()).sum()
    assert step.logged["objective/entropy"] == pytest.approx(float(entropy + surprise) / 2)
    if own == (4, 2, 2):
        assert float(there) > 0.1
        assert step.logged["objective/kl"] == pytest.approx(0, abs=1e-9)  # far away, and the key says 0


def test_the_kl_of_the_toy_run_is_negative():
    kl = measured("objective/kl")
    assert all(value < 0 for value in kl[2:])
    assert kl[-1] < kl[0] - 0.1


def test_the_reference_of_the_toy_run_stays_and_the_policy_rises():
    own, other = measured("objective/model_scores"), measured("objective/ref_scores")
    assert min(own[-5:]) > max(own[:1]) + 2
    assert abs(sum(other[-7:]) / 7 - sum(other[:7]) / 7) < 0.5


def test_the_loss_of_the_toy_run_falls():
    loss = measured("loss")
    assert sum(loss[-5:]) / 5 < loss[0] - 0.05


@pytest.mark.parametrize(("loss_type", "first"), [("sigmoid", LOG2), ("ipo", 25.0)])
def test_the_first_loss_is_log_2_or_25_and_the_exploration(make, loss_type, first):
    line = trained(make(loss_type=loss_type, alpha=0.01))[0]
    assert line["loss/dpo"] == pytest.approx(first)
    assert line["loss/xpo"] < -0.01
    assert line["loss"] == pytest.approx(first + line["loss/xpo"], abs=1e-4)
    assert line["rewards/chosen"] == line["rewards/margins"] == line["rewards/accuracies"] == 0


def test_the_default_alpha_is_not_seen_in_the_loss(trained_once):
    first = trained_once.state.log_history[0]
    assert first["alpha"] == 1e-5
    assert first["loss"] == pytest.approx(LOG2, abs=4e-4)  # random answers, far longer in nats than the toy's
    assert -4e-4 < first["loss/xpo"] < 0
    assert max(abs(value) for value in measured("loss/xpo")) < 5e-5


# ----------------------------------------------------------------------------------------------------- pairs and scores


def test_a_tie_goes_to_the_policy(shared):
    tie, won, lost = (
        Step(shared, pairs=2, scores=s) for s in ([[1.0] * 2] * 2, [[2.0] * 2, [1.0] * 2], [[0.0] * 2, [1.0] * 2])
    )
    assert all(torch.equal(a, b) for a, b in zip(tie.gradient, won.gradient, strict=True))
    assert not torch.equal(tie.gradient[1], lost.gradient[1])


def test_a_tie_pushes_five_thousand_times_as_hard_as_the_default_alpha():
    fresh, tie = torch.zeros(1), torch.tensor([True])
    assert slope_of(fresh, tie, 0.0, 0.1).item() == pytest.approx(5000 * 1e-5)
    assert "five thousand" in section("Choosing the pair")


def test_a_tie_of_one_answer_twice_is_pushed_by_the_exploration_alone(shared):
    answers = [torch.tensor([[7, 8, 9, END]])] * 2
    same = torch.randn(1, 7, VOCABULARY, dtype=torch.float64)
    for alpha, moved in ((0.0, False), (0.01, True)):
        step = Step(shared, pairs=1, answers=answers, logits=([same] * 2, [same] * 2), scores=[[1.0]] * 2, _alpha=alpha)
        total = step.gradient[0] + step.gradient[1]  # both stand for one tensor
        assert (total.abs().max() > 1e-6) == moved


def test_the_reward_model_reads_the_policys_token_ids(make):
    trainer, given = make(max_new_tokens=40), []
    seen = calls_of(trainer.reward_funcs.model)
    ids = []
    trainer.reward_funcs.model.register_forward_pre_hook(
        lambda _, __, kw: ids.append(kw["input_ids"]), with_kwargs=True
    )
    score = trainer._compute_rewards
    trainer._compute_rewards = lambda *a: given.append(a) or score(*a)
    trainer.train()
    own, other, width = given[0]
    assert [tuple(call.shape) for call in seen] == [tuple(own["input_ids"].shape), tuple(other["input_ids"].shape)]
    assert torch.equal(ids[0], own["input_ids"])
    assert torch.equal(ids[1], other["input_ids"])
    assert not any(call.training or call.gradient for call in seen)
    ends = [(data["input_ids"][:, width:] == END).any(1) for data in (own, other)]
    assert not torch.cat(ends).all()  # a cut answer is read as a cut one
    assert own["input_ids"].shape != other["input_ids"].shape  # padded apart


def test_another_tokenizer_for_the_reward_model_is_ignored(make):
    other = tokenizer(more=["!", "?", "zz"])
    other.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    a, b = (
        trained(make(reward_funcs=reward_model(), reward_processing_classes=reader)) for reader in (tokenizer(), other)
    )
    assert a[0]["objective/model_scores"] == b[0]["objective/model_scores"]
    small = reward_model()
    small.resize_token_embeddings(4)  # a vocabulary of its own
    with pytest.raises(IndexError):
        make(reward_funcs=small, reward_processing_classes=tokenizer()).train()


def test_a_reward_function_is_refused_at_the_first_step(make):
    trainer = make(reward_funcs=lambda completions, **_: [0.0] * len(completions))
    with pytest.raises(AttributeError, match="base_model_prefix"):
        trainer.train()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=1, **sizes))
    with pytest.raises(AttributeError, match="score"):
        make(reward_funcs=bert, reward_processing_classes=tokenizer()).train()


def test_two_rewards_are_refused(make):
    with pytest.raises(ValueError, match="one reward function"):
        make(reward_funcs=[reward_model()] * 2, reward_processing_classes=[tokenizer()] * 2)


def test_the_weight_of_the_reward_does_nothing(make):
    plain, negative = (trained(make(max_steps=2, **more)) for more in ({}, {"reward_weights": [-1.0]}))
    for key in ("loss", "grad_norm", "objective/model_scores", "rewards/chosen"):
        assert [line[key] for line in plain] == [line[key] for line in negative]


def scored(trainer, own, other=None, width=3):
    own, other = (torch.tensor(ids) for ids in (own, own if other is None else other))
    return trainer._compute_rewards({"input_ids": own}, {"input_ids": other}, width)


@pytest.mark.parametrize(("pad", "last", "visible"), [("<|pad|>", 5, 6), (None, 4, 4)])
def test_a_pad_token_equal_to_eos_hides_every_end_from_the_reward_model(make, monkeypatch, pad, last, visible):
    reader = tokenizer(pad=pad)
    trainer, places = make(processing_class=reader), []
    monkeypatch.setattr(xpo_trainer, "get_reward", lambda *a: places.append(utils.get_reward(*a)) or places[-1])
    masks = []
    trainer.reward_funcs.model.register_forward_pre_hook(
        lambda _, __, kw: masks.append(kw["attention_mask"]), with_kwargs=True
    )
    row = [
        10,
        END,
        3,
        20,
        21,
        END,
        reader.pad_token_id,
    ]  # a question, its end, the assistant's header, an answer, its end
    scored(trainer, [row])
    assert places[0][2].tolist() == [last]
    assert masks[0].sum().item() == visible


def test_a_cut_answer_is_scored_at_its_last_word(shared, monkeypatch):
    places = []
    monkeypatch.setattr(xpo_trainer, "get_reward", lambda *a: places.append(utils.get_reward(*a)) or places[-1])
    scored(shared, [[10, 3, 2, 20, 21, 22], [10, 3, 2, 20, END, 0]])
    assert places[0][2].tolist() == [5, 4]


def test_the_reward_model_stays_out_of_mixed_precision(make):
    trainer, kinds = make(bf16=True), {"policy": set(), "reward": set()}
    for name, model in (("policy", trainer.model), ("reward", trainer.reward_funcs)):
        layer = model.model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda _, __, output, name=name: kinds[name].add(output.dtype))
    trainer.train()
    assert kinds == {"policy": {torch.bfloat16}, "reward": {torch.float32}}


def test_an_end_token_in_the_prompt_saves_every_answer_from_the_penalty(make):
    trainer = make(missing_eos_penalty=5.0)
    free = make()
    cut, ended, chat = [10, 11, 2, 20, 21], [10, 11, 2, 20, END], [10, END, 3, 20, 21]
    for row, pays in ((cut, 5.0), (ended, 0.0), (chat, 0.0)):
        (without, _), (with_penalty, _) = scored(free, [row]), scored(trainer, [row])
        assert (without - with_penalty).item() == pytest.approx(pays, abs=1e-5)
    both_free, both = scored(free, [cut]), scored(trainer, [cut])
    assert both_free[0] - both_free[1] == both[0] - both[1]
    pads_with_the_end = make(missing_eos_penalty=5.0, processing_class=tokenizer(pad=None))
    plain = make(processing_class=tokenizer(pad=None))
    left = [END, 10, 11, 20, 21]  # padded on the left by an end token
    assert scored(plain, [left])[0] == scored(pads_with_the_end, [left])[0]
    assert scored(plain, [cut])[0] > scored(pads_with_the_end, [cut])[0] + 4
    line = trained(make(missing_eos_penalty=1000.0))[0]
    assert line["val/model_contain_eos_token"] < 1  # an answer was cut,
    assert line["objective/model_scores"] > -100  # and nobody paid: the template ends the user's turn


# ------------------------------------------------------------------------------------------------ prompts and sampling


def prompts_of(trainer, texts):
    rows = [trainer.tokenize_row({"prompt": text}, False, trainer.processing_class) for text in texts]
    found = trainer.data_collator(rows)
    return {"input_ids": found["prompt_input_ids"], "attention_mask": found["prompt_attention_mask"], "raw": texts}


def test_a_prompt_gets_a_bos_once(make):
    reader = tokenizer()
    reader.bos_token = "<|user|>"
    reader._tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 2)])
    for text in ("1+2", "<|user|>1+2"):
        row = XPOTrainer.tokenize_row({"prompt": text}, False, reader)
        assert reader.decode(row["prompt_input_ids"]) == "<|user|>1+2"
        assert row["prompt_attention_mask"] == [1] * 4
    assert (
        XPOTrainer.tokenize_row({"prompt": "1+2"}, False, tokenizer())["prompt_input_ids"]
        == tokenizer()("1+2")["input_ids"]
    )


def test_prompts_are_padded_on_the_left(shared):
    prompts = prompts_of(shared, ["1+2", "15+15"])
    assert prompts["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]


def test_max_length_is_ignored(make):
    long = [{"prompt": "1+" * 20 + "1"}] * 4
    lines, shapes = [], []
    for settings in ({"max_length": 9}, {"max_length": 512}):
        trainer = make(long, **settings)
        seen = calls_of(trainer.model)
        lines.append(trained(trainer)[0])
        shapes.append([call.shape for call in seen if call.gradient])
    assert shapes[0] == shapes[1] == [(4, 49)] * 2
    assert lines[0]["grad_norm"] == lines[1]["grad_norm"]
    assert "max_length" not in inspect.getsource(xpo_trainer)


def test_the_writers_take_turns(make):
    exactly = {"min_new_tokens": 8, "max_new_tokens": 8}
    order = []
    trainer = make(generation_kwargs=exactly)
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        model.register_forward_pre_hook(
            lambda _, args, kw, name=name: order.append((name, len(args[0] if args else kw["input_ids"]))),
            with_kwargs=True,
        )
    trainer.train()
    assert order == ([("policy", 4)] * 8 + [("reference", 4)] * 8 + [("policy", 4)] * 2 + [("reference", 4)] * 2)
    parent = make(trainer=OnlineDPOTrainer, settings=OnlineDPOConfig, generation_kwargs=exactly)
    seen = [calls_of(parent.model), calls_of(parent.ref_model)]
    parent.train()
    assert [[call.shape[0] for call in calls] for calls in seen] == [[8] * 9, [8]]


def test_checkpointing_turns_off_the_cache_of_both_writers(make):
    for settings, lengths in (
        ({}, [6] + 7 * [1]),
        ({"gradient_checkpointing": True}, list(range(6, 14))),
        ({"gradient_checkpointing": True, "generation_kwargs": {"use_cache": True}}, [6] + 7 * [1]),
    ):
        settings["generation_kwargs"] = {"min_new_tokens": 8, **settings.get("generation_kwargs", {})}
        trainer = make(ROWS[:1] * 4, **settings)
        seen = [calls_of(trainer.model), calls_of(trainer.ref_model)]
        trainer.train()
        for calls in seen:
            assert [call.shape[1] for call in calls] == [*lengths, 14, 14]
    assert XPOConfig.__dataclass_fields__["gradient_checkpointing"].default is True


def test_the_policy_samples_in_training_mode_and_the_reference_does_not(make):
    trainer = make()
    own, other = calls_of(trainer.model), calls_of(trainer.ref_model)
    trainer.train()
    assert all(call.training for call in own)
    assert not any(call.training or call.gradient for call in other)
    assert [call.gradient for call in own] == [False] * (len(own) - 2) + [True] * 2
    dropping = trained(make(model=gpt2(), disable_dropout=False))[0]
    assert abs(dropping["loss/dpo"] - LOG2) > 1e-4
    assert trained(make(model=gpt2()))[0]["loss/dpo"] == pytest.approx(LOG2, abs=1e-5)


DATA = {"input_ids": torch.tensor([[5, 6, 7, 9, 10, 11]]), "attention_mask": torch.ones(1, 6, dtype=torch.long)}


def test_the_temperature_is_not_in_the_log_probabilities(make, policy):
    model = policy().eval()
    for heat in (0.5, 2.0):
        trainer = make(model=model, temperature=heat)
        assert trainer.generation_config.temperature == heat
        with torch.no_grad():
            found = trainer._compute_logprobs(model, DATA, DATA, 3)[0]
            plain = model(DATA["input_ids"]).logits[:, 2:-1].log_softmax(-1)
        assert torch.allclose(found, plain.gather(-1, DATA["input_ids"][:, 3:, None])[..., 0], atol=1e-5)


def test_padding_on_the_left_shifts_the_positions_of_gpt_2_and_not_of_qwen3(make, policy):
    padded = {key: torch.cat([torch.zeros(1, 3, dtype=torch.long), value], 1) for key, value in DATA.items()}
    for model, shifted in ((gpt2(), True), (policy(), False)):
        trainer = make(model=model)
        model.eval()
        with torch.no_grad():
            alone, behind = (
                trainer._compute_logprobs(model, DATA, DATA, 3),
                trainer._compute_logprobs(model, padded, padded, 6),
            )
        assert torch.allclose(alone[0], behind[0], atol=1e-4) != shifted


def test_there_is_no_branch_for_vllm(make):
    assert "vllm" not in inspect.getsource(xpo_trainer)
    assert "self.generation_config = SamplingParams" in inspect.getsource(OnlineDPOTrainer.__init__)
    with_vllm, without = inspect.getsource(OnlineDPOTrainer.__init__).split("# Set up transformers generation config")
    assert "self.generation_kwargs =" not in with_vllm and "self.generation_kwargs = generation_kwargs" in without
    trainer = make()
    trainer.generation_config = SimpleNamespace(n=2, max_tokens=8)  # in place of vLLM's parameters
    del trainer.generation_kwargs  # which the branch for vLLM does not set
    with pytest.raises(AttributeError, match="generation_kwargs"):
        trainer.train()


def test_two_settings_are_read_by_the_parents_sampling_alone():
    parents_sampling_alone_reads(XPOConfig, xpo_trainer, "cache_implementation", "ds3_gather_for_generation")


def test_the_raw_prompts_are_read_by_nobody(make):
    trainer = make()
    process = trainer._process_completions

    def without_raw(*args):
        return [{key: value for key, value in data.items() if key != "raw"} for data in process(*args)]

    trainer._process_completions = without_raw
    assert trained(trainer)


# -------------------------------------------------------------------------------------------------------------- adapters


def loud(trainer):
    """Makes the adapter one that changes what the model says."""
    for name, weight in trainer.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return trainer


def writers(trainer, base):
    """Whether the policy's answers, and the reference's, are those of the base model. Nothing is left to chance."""
    prompts = prompts_of(trainer, ["1+2", "7+8", "2+2", "9+1"])
    trainer.generation_config.do_sample = False
    expected = base.generate(
        **{k: prompts[k] for k in ("input_ids", "attention_mask")}, generation_config=trainer.generation_config
    )
    own, other = trainer._generate_completions(prompts, trainer.model)
    return torch.equal(own, expected), torch.equal(other, expected), torch.equal(own, other)


@pytest.mark.filterwarnings("ignore")
def test_with_a_new_adapter_the_policy_writes_both_answers(make, policy):
    trainer = loud(make(peft_config=LoraConfig(**LORA)))
    assert trainer.ref_model is None
    assert writers(trainer, policy()) == (False, False, True)
    with torch.no_grad():  # and yet the reference scores without the adapter
        own, _, _, ref_own = trainer._compute_logprobs(trainer.model, DATA, DATA, 3)
        plain = make()._compute_logprobs(policy(), DATA, DATA, 3)[0]
    assert torch.allclose(ref_own, plain, atol=1e-5)
    assert not torch.allclose(own, plain, atol=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_a_reference_of_its_own_writes_beside_an_adapter(make, policy):
    trainer = loud(make(peft_config=LoraConfig(**LORA), ref_model=policy()))
    assert writers(trainer, policy()) == (False, True, False)


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_an_adapter_has_a_reference_that_writes(make, policy):
    trainer = make(model=get_peft_model(policy(), LoraConfig(**LORA)))
    assert trainer.ref_model is not None
    assert writers(loud(trainer), policy()) == (False, True, False)


def test_a_wrapped_model_with_a_new_adapter_stops_at_the_first_step(make):
    trainer = make(peft_config=LoraConfig(**LORA))
    trainer._compute_logprobs(trainer.model, DATA, DATA, 3)
    with pytest.raises(AttributeError, match="disable_adapter"):
        trainer._compute_logprobs(torch.nn.DataParallel(trainer.model), DATA, DATA, 3)
    assert not hasattr(torch.nn.parallel.DistributedDataParallel, "disable_adapter")
    assert "with self.model.disable_adapter()" in inspect.getsource(OnlineDPOTrainer.training_step)


# ---------------------------------------------------------------------------------------------------------- step and run


def same_answers(trainer):
    """Puts answers in the place of sampling and of scoring that depend on the prompt alone."""

    def generate(prompts, model):
        first = prompts["input_ids"]
        keys = (first * prompts["attention_mask"]).sum(1)
        pairs = [
            torch.stack([4 + (keys + i) % 40, 4 + (3 * keys + i) % 40, torch.full_like(keys, END)], 1) for i in (0, 7)
        ]
        return tuple(torch.cat([first, answer], 1) for answer in pairs)

    trainer._generate_completions = generate
    return trainer


def test_gradients_of_accumulated_batches_are_summed(make):
    rows = [{"prompt": f"{i}+1"} for i in range(8)]

    def norm(passes, mend=False):
        trainer = same_answers(make(rows, per_device_train_batch_size=8 // passes, gradient_accumulation_steps=passes))
        if mend:
            trainer.accelerator.gradient_accumulation_steps = passes
        line = trained(trainer)[0]
        return line["grad_norm"], line["loss"]

    at_once, loss = norm(1)
    assert norm(4) == (pytest.approx(4 * at_once, rel=1e-3), pytest.approx(loss, abs=1e-4))
    assert norm(4, mend=True)[0] == pytest.approx(at_once, rel=1e-3)


def test_a_list_for_alpha_ends_the_run_at_the_second_step(make):
    trainer = make(alpha=[0.01, 0.02], max_steps=2)
    with pytest.raises(TypeError, match="list indices must be integers"):
        trainer.train()
    assert trainer.state.global_step == 1
    alone = make(alpha=[0.3])
    assert alone.args.alpha == alone.alpha == 0.3


def test_a_callback_can_change_alpha(make):
    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer._alpha = 0.5

    trainer = make(max_steps=2, callbacks=[Change()])
    assert [line["alpha"] for line in trained(trainer)] == [1e-5, 0.5]


def test_evaluation_does_not_work(make):
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        make(eval_dataset=Dataset.from_list(ROWS)).evaluate()


def test_what_this_page_leaves_to_the_parent_is_inherited(make):
    assert issubclass(XPOTrainer, OnlineDPOTrainer)
    own = {name for name in vars(XPOTrainer) if not name.startswith("__")} - {"_tag_names", "_name", "_paper"}
    covered = re.search(r"<!-- covers:\n(.*?)-->", PAGE.read_text("utf-8"), re.S)[1].split()
    assert own == {name.split(".")[-1] for name in covered if ".XPOTrainer." in name} - {"__init__"}
    ours, parents = (inspect.getsource(trainer.training_step) for trainer in (XPOTrainer, OnlineDPOTrainer))
    tail = ours[ours.index("        if (\n") :]
    # from the emptying of the cache on, the backward pass included
    assert parents.replace("\n\n", "\n").endswith(tail.replace("\n\n", "\n"))
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(TypeError, match=r"Can only (find the batch size of|concatenate) tensors"):
        make(stream).train()
    assert trained(make(stream, accelerator_config={"dispatch_batches": False}))


# ------------------------------------------------------------------------------------------------------- the neighbours


def test_the_neighbours_on_the_page_are_what_trl_computes_for_a_tie(page):
    theta = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    logp, ref = theta.log_softmax(0), page["REFERENCE"].double().log()
    win = torch.tensor([True])
    ours = [(page["explore"](0.02)(logp, logp - ref)), page["nash"](logp, logp - ref)]
    for i, j in itertools.product(range(3), range(3)):
        this = SimpleNamespace(alpha=0.02, beta=0.1, args=SimpleNamespace(loss_type="sigmoid"))
        own, other, ref_other, ref_own = (v[None, None] for v in (logp[i], logp[j], ref[j], ref[i]))
        xpo, *_ = XPOTrainer._compute_losses(this, own, other, ref_other, ref_own, win)
        nash, *_ = NashMDTrainer._compute_losses(this, own, ref_own, torch.tensor([0.5], dtype=torch.float64))
        for our, their in zip(ours, (xpo, nash), strict=True):
            agree(*(torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in (our[i, j], their)))


def test_a_step_on_ties_leads_where_the_page_says(page):
    away, explore, ref = page["away"], page["explore"], page["REFERENCE"]
    assert away(explore(0.0)) < 0
    assert away(page["nash"], ref) < 0
    without, default, large = (away(explore(alpha), ref) for alpha in (0.0, 1e-5, 0.01))
    assert 0 < without < default < large
    assert default - without < 1e-3 * without
    assert large < 2 * without  # a thousand times the default still adds less than the ties do


# ------------------------------------------------------------------------------------------------------- the page itself


def test_the_toy_run_has_the_settings_that_the_page_names():
    assert '"beta": 1.0' in (EXAMPLES / "xpo.py").read_text("utf-8")
    assert set(measured("alpha")) == {1e-5}


def test_every_test_that_the_page_names_exists():
    named = named_tests(PAGE)
    assert named
    assert named <= set(globals())


def test_the_arguments_that_the_page_calls_gone_are_gone():
    text = section("Older code and tutorials")
    here = arguments_of(XPOTrainer, XPOConfig)
    for name in ("judge", "reward_model"):
        assert f"`{name}=`" in text
        assert name not in here
    assert "reward_funcs" in here


def test_the_defaults_that_the_page_quotes_are_those_of_the_config(tmp_path):
    args = XPOConfig(output_dir=str(tmp_path), use_cpu=True)
    quoted, true = defaults_on(PAGE, args)
    assert len(quoted) >= 7
    assert quoted == true
    assert math.isclose(args.beta / 2 / args.alpha, 5000)


def test_the_config_adds_alpha_and_nothing_else():
    assert set(XPOConfig.__dataclass_fields__) - set(OnlineDPOConfig.__dataclass_fields__) == {"alpha"}
    assert QUESTIONS


def test_the_exploration_in_the_example_is_the_number_on_the_page(page):
    weight = page["trainer"].args.alpha
    share = weight * page["ref_logps"][1].mean().item()
    assert f"it is {share:.3f}." in section("The first loss")
