"""The claims of annotated_trainers/nash_md.md that running TRL can show, on a random model of two layers, on the CPU.

Formulas get random logits, random answers and random scores: sampling, scoring and the forward pass of the models are
replaced, the rest is the real `training_step` of a real trainer, with its backward pass. `pytest -s` prints the largest error.
"""

import functools
import inspect
import itertools
import json
import os
import re
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl.experimental import utils
from trl.experimental.nash_md import NashMDConfig, NashMDTrainer, nash_md_trainer
from trl.experimental.nash_md.nash_md_trainer import GeometricMixtureWrapper
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from walkthrough_tools import (
    END,
    EXPECTED,
    PAGES,
    VOCABULARY,
    Says,
    arguments_of,
    calls_of,
    comparisons,
    config,
    formula_names,
    functions_of,
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

PAGE = PAGES / "nash_md.md"
section = functools.partial(section_of, PAGE)
MEASURED = EXPECTED / "nash_md.json"
TEXTS = [{"prompt": row["prompt"][0]["content"]} for row in ROWS]  # the same prompts as plain text


def policy(seed: int = 0, **more) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**config(initializer_range=0.2, **more)))


checkpoint = model_folder(initializer_range=0.2)


@pytest.fixture(scope="module")
def make(checkpoint, tmp_path_factory):
    """Makes a NashMDTrainer; keyword arguments of NashMDTrainer go there, all others to NashMDConfig."""

    def make(rows=ROWS, model=None, **more) -> NashMDTrainer:
        if more.get("generation_kwargs", {}) is not None:  # `None` leaves it to TRL
            more["generation_kwargs"] = {"use_cache": False} | more.get("generation_kwargs", {})
        sizes = {"per_device_train_batch_size": 4, "max_new_tokens": 6, "max_length": 64, "max_steps": 1}
        more = {**sizes, "reward_funcs": reward_model(), "gradient_checkpointing": False, **more}
        model = AutoModelForCausalLM.from_pretrained(checkpoint) if model is None else model
        return make_trainer(NashMDTrainer, NashMDConfig, tmp_path_factory.mktemp("run"), rows, model=model, **more)

    return make


trained_once = made_and_trained(max_steps=2)
shared = made_once()


def batch(*rows) -> dict:
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "raw": None}


# ---------------------------------------------------------------------------- the formulas, against TRL's own methods


page = page_of(PAGE)


class Step:
    """TRL's own `training_step` on random answers, logits and scores: what went in, and what it made of it."""

    def __init__(self, trainer, seed=0, pairs=4, length=7, scores=None, others=None, **settings):
        dice = torch.Generator().manual_seed(seed)

        def answers():  # some of them end, at different places
            ids = torch.randint(4, VOCABULARY, (pairs, length), generator=dice)
            ends = torch.randint(0, 2 * length, (pairs,), generator=dice)
            return torch.where(torch.arange(length) == ends[:, None], END, ids)

        sampled, rivals = answers(), answers()
        self.ids, self.mask = utils.truncate_right(sampled, END, 0)
        shape = (pairs, 3 + length, VOCABULARY)
        self.logits = (2 * torch.randn(shape, generator=dice, dtype=torch.float64)).requires_grad_()
        ref_logits = self.logits.detach() + 0.7 * torch.randn(shape, generator=dice, dtype=torch.float64)
        self.scores = torch.randn(2, pairs, generator=dice).double() if scores is None else scores

        def generate(model, prompts):
            assert prompts["input_ids"].shape == (pairs, 3)
            return tuple(torch.cat([prompts["input_ids"], ids], 1) for ids in (sampled, rivals))

        def gather(tensor):
            return tensor if others is None else torch.stack([tensor.detach().mean(), torch.tensor(others)])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "stats", {key: [] for key in trainer.stats})
            patch.setattr(trainer, "_generate_completions", generate)
            patch.setattr(trainer, "_compute_rewards", lambda *_: tuple(self.scores))
            patch.setattr(trainer, "ref_model", Says(ref_logits))
            patch.setattr(trainer.accelerator, "gather_for_metrics", gather)
            for name, value in settings.items():
                patch.setattr(trainer, name, value)
            self.loss = trainer.training_step(Says(self.logits), {"prompt": ["1+2"] * pairs})
            self.logged = {key: value[0] for key, value in trainer.stats.items()}
        self.gradient = self.logits.grad
        self.logps, self.ref_logps = (
            torch.log_softmax(logits[:, 2:-1], -1).gather(-1, self.ids[..., None])[..., 0]
            for logits in (self.logits, ref_logits)
        )
        self.win = torch.sigmoid(self.scores[0] - self.scores[1])
        self.ended, self.rival_ended = ((ids == END).any(1).double() for ids in (sampled, rivals))


ERRORS, agree, summary = comparisons()


def test_the_loss_on_the_page_is_what_trl_computes(page, shared):
    for seed, pairs in itertools.product(range(4), (1, 2, 5)):
        step = Step(shared, seed, pairs, _beta=0.3)
        ours = page["nash_md_loss"](step.logps, step.ref_logps, step.mask, step.win, beta=0.3)
        agree(ours, step.loss)
        agree(torch.autograd.grad(ours, step.logits)[0], step.gradient)


def test_the_advantage_on_the_page_is_the_slope_of_trls_loss(page):
    dice = torch.Generator().manual_seed(0)
    for _ in range(4):
        logps, ref_logps = (-torch.rand(3, 5, generator=dice).double() for _ in range(2))
        win = torch.rand(3, generator=dice).double()
        loss, *_ = NashMDTrainer._compute_losses(SimpleNamespace(beta=0.3), logps.requires_grad_(), ref_logps, win)
        slope = -3 * torch.autograd.grad(loss, logps)[0]  # the loss is a mean over three answers
        agree(page["nash_md_advantage"](logps, ref_logps, win, beta=0.3), slope)


def mixture(model, ref_model, mixture_coef=0.5, **sampling) -> GeometricMixtureWrapper:
    sampling = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "use_cache": False} | sampling
    return GeometricMixtureWrapper(model, ref_model, GenerationConfig(**sampling), mixture_coef, torch.device("cpu"))


class Outputs:
    """A model that returns its logits in a new object each time."""

    def __init__(self, logits):
        self.logits, self.config = logits, None

    def __call__(self, *args, **kwargs):
        return SimpleNamespace(logits=self.logits)


def test_the_mixture_on_the_page_is_what_trl_samples_from(page):
    dice = torch.Generator().manual_seed(0)
    for coef in (0.0, 0.125, 0.5, 1.0, 1.5):
        ours, theirs = (3 * torch.randn(2, 4, 9, generator=dice).double() for _ in range(2))
        found = mixture(Outputs(ours), Outputs(theirs), coef)().logits
        agree(page["geometric_mixture"](ours, theirs, coef), found)
        agree(page["geometric_mixture"](ours.log_softmax(-1), theirs.log_softmax(-1), coef), found)
        if coef in (0, 1):  # the policy alone, the reference alone
            agree((theirs if coef else ours).log_softmax(-1), found)


def test_every_displayed_formula_has_its_function_and_is_compared_above():
    assert formula_names(PAGE) == ["geometric-mixture", "nash-md-advantage", "nash-md-loss"]


def test_a_lost_answer_makes_the_loss_negative_and_a_won_one_positive(shared):
    for own, rival, sign in ((0.0, 9.0, -1), (9.0, 0.0, 1)):
        scores = torch.tensor([[own] * 4, [rival] * 4]).double()
        assert sign * float(Step(shared, scores=scores, _beta=0.0).loss) > 1


def test_the_scale_of_the_scores_counts_and_is_bounded(shared):
    scores = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 2.0]]).double()
    norms = [float(Step(shared, scores=scale * scores, _beta=0.0).gradient.norm()) for scale in (0.01, 1, 20, 1000)]
    assert norms[0] < norms[1] / 20 < norms[2] / 20
    assert norms[2] == pytest.approx(norms[3], rel=1e-6)
    small = torch.tensor([[0.1, 0.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0]]).double()
    assert float((Step(shared, scores=small).win - 0.5).abs().max()) == pytest.approx(0.025, abs=1e-4)
    same = Step(shared, scores=scores + 100, _beta=0.0)
    assert float(same.gradient.norm()) == pytest.approx(norms[1])


def test_the_kl_term_misses_what_a_token_leads_to(page):
    """The expected gradient of TRL's KL term in the world of two words, from all answers and their probabilities."""
    start = torch.tensor([0.3, 1.0, -0.4], requires_grad=True)
    reference = page["two_words"](torch.tensor([0.0, -2.0, 0.5]))
    logps = page["two_words"](start)
    chances = logps.sum(1).exp()
    exact = torch.autograd.grad((chances * (logps - reference).sum(1)).sum(), start, retain_graph=True)[0]
    total = torch.zeros(3)
    for i, chance in enumerate(chances.detach()):
        loss, *_ = NashMDTrainer._compute_losses(
            SimpleNamespace(beta=1.0), logps[i : i + 1], reference[i : i + 1], torch.tensor([0.5])
        )
        total += chance * torch.autograd.grad(loss, start, retain_graph=True)[0]
    agree(total[1:], exact[1:])  # behind the last word nothing follows
    assert abs(total[0] - exact[0]) > 0.1
    alone = (chances.detach() * (logps - reference).sum(1)).sum()  # the log-ratio differentiated, and nothing else
    assert torch.autograd.grad(alone, start, retain_graph=True)[0].abs().max() < 1e-6
    # for the first word it is the divergence of that word alone
    first, ref_first = (torch.nn.functional.logsigmoid(torch.stack([w, -w])) for w in (start[0], torch.zeros(())))
    agree(total[0], torch.autograd.grad((first.exp() * (first - ref_first)).sum(), start)[0][0])


# ------------------------------------------------------------------------------------------------------- what is logged


def test_the_page_lists_exactly_the_keys_that_a_run_logs(trained_once):
    logged = set().union(*trained_once.state.log_history)
    assert set(metrics_on(PAGE)) == logged
    assert trained_once.state.log_history[-1]["total_flos"] == 0


def test_every_metric_is_what_the_table_says(shared):
    for seed in range(3):
        step = Step(shared, seed, _beta=0.3, _mixture_coef=0.2)
        assert not step.mask.all()
        sums, ratios = ((values * step.mask).sum(1) for values in (step.logps, step.logps - step.ref_logps))
        table = {
            "loss/kl": ratios.mean(),
            "loss/score": ((step.win - 0.5) * sums).mean(),
            "objective/entropy": -sums.mean(),
            "rewards/probabilities": step.win.mean(),
            "rewards/accuracies": (ratios > 0).double().mean(),
            "rewards/margins": ratios.mean(),
            "rewards/chosen": step.scores[0].mean(),
            "rewards/rejected": step.scores[1].mean(),
            "logps/chosen": sums.mean(),
            "logps/rejected": (sums - ratios).mean(),
            "val/model_contain_eos_token": step.ended.mean(),
            "val/ref_contain_eos_token": step.rival_ended.mean(),
            "beta": 0.3,
            "mixture_coef": 0.2,
        }
        assert set(table) == set(step.logged)
        for key, value in table.items():
            agree(value, step.logged[key])


def test_six_names_from_dpo_mean_something_else(shared):
    won, lost = (
        Step(shared, scores=torch.tensor(s).double()) for s in ([[9.0] * 4, [0.0] * 4], [[0.0] * 4, [9.0] * 4])
    )
    for key in ("logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies"):
        assert won.logged[key] == lost.logged[key]
    assert won.logged["rewards/margins"] == pytest.approx(won.logged["loss/kl"])
    assert won.logged["objective/entropy"] == -won.logged["logps/chosen"]
    assert (won.logged["rewards/chosen"], won.logged["rewards/rejected"]) == (9, 0)


def test_all_metrics_are_gathered(shared):
    alone, with_others = Step(shared, seed=2), Step(shared, seed=2, others=1000.0)
    same = {key for key, value in alone.logged.items() if with_others.logged[key] == value}
    assert same == {"beta", "mixture_coef"}


def test_policy_and_reference_are_the_same_model_at_the_first_step(trained_once, make):
    first, second = (line for line in trained_once.state.log_history if "loss" in line)
    assert first["loss/kl"] == first["rewards/accuracies"] == 0
    assert second["loss/kl"] != 0
    dropping = policy(attention_dropout=0.5)
    assert abs(trained(make(model=dropping))[0]["loss/kl"]) > 1e-3


def test_the_toy_run_wins_half_of_its_games_and_improves_all_the_same():
    measured = json.loads(MEASURED.read_text("utf-8"))
    assert all(0.45 < value < 0.6 for value in measured["log"]["rewards/probabilities"]["mean"])
    assert measured["log"]["rewards/accuracies"]["mean"][-1] > 0.85
    assert all(value < 0 for value in measured["log"]["loss"]["mean"])
    right = measured["held_out"]["right answers"]
    assert min(right["after"]) > max(right["before"]) + 0.1


# ---------------------------------------------------------------------------------------------- the mixture and its cache

PROMPTS = batch([5, 6, 7, 8, 9], [9, 8, 7, 6, 5])
IDS, MASK = PROMPTS["input_ids"], PROMPTS["attention_mask"]
KEEP = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}


def recomputed(models, coef, sequences, start):
    """Log-probabilities of the mixture at each sampled place, by one pass of each model over everything."""
    with torch.no_grad():
        ours, theirs = (model(sequences[:, :-1]).logits[:, start - 1 :] for model in models)
    return ((1 - coef) * ours + coef * theirs).log_softmax(-1)


@pytest.mark.parametrize(("coef", "first_is_right"), [(0.0, True), (0.5, False), (1.0, False)])
def test_with_a_cache_the_opponent_is_not_the_mixture(coef, first_is_right):
    models = policy(0).eval(), policy(1).eval()
    for cache in (False, True):
        found = mixture(*models, coef, do_sample=False, use_cache=cache).generate(IDS, attention_mask=MASK, **KEEP)
        expected = recomputed(models, coef, found.sequences, 5)
        errors = (torch.stack(found.logits, 1) - expected).abs().amax((0, 2))
        if not cache:
            assert (errors < 1e-4).all()
        else:  # the policy reads the prompt before the reference writes; the reference reads it behind the policy's keys
            assert bool(errors[0] < 1e-4) == first_is_right
            assert (errors[1:] > 0.1).all()


def test_both_models_write_into_one_cache():
    models, seen = (policy(0).eval(), policy(1).eval()), []
    for name, model in zip(("policy", "reference"), models, strict=True):

        def hook(module, args, kwargs, name=name):
            cache = kwargs["past_key_values"]
            assert kwargs["use_cache"] is False  # asked for, and of no effect
            seen.append((name, id(cache), cache.get_seq_length()))

        model.register_forward_pre_hook(hook, with_kwargs=True)
    mixture(*models, max_new_tokens=2, use_cache=True).generate(IDS, attention_mask=MASK)
    assert len({cache for _, cache, _ in seen}) == 1
    assert [(name, length) for name, _, length in seen] == [
        ("policy", 0),
        ("reference", 5),
        ("policy", 10),
        ("reference", 11),
    ]


def test_a_checkpointed_policy_forgets_all_but_the_last_token(make):
    trainer, calls = make(gradient_checkpointing=True, generation_kwargs={"use_cache": True}), []
    trainer.model.train()
    hook = trainer.model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(
            (kwargs["input_ids"], module.is_gradient_checkpointing, output.logits.clone())
        ),
        with_kwargs=True,
    )
    trainer._generate_completions(trainer.model, PROMPTS)
    hook.remove()
    assert [on for _, on, _ in calls] == [False] * 6 + [True] * 6  # suspended for the first player alone
    ids, _, logits = calls[7]
    assert ids.shape == (2, 1)
    with torch.no_grad():
        alone = trainer.model.eval()(ids).logits
    assert torch.allclose(logits, alone, atol=1e-4)


def test_checkpointing_decides_about_the_cache_unless_you_do(make):
    for checkpointing, asked, expected in ((True, None, False), (False, None, True), (False, {}, False)):
        trainer = make(gradient_checkpointing=checkpointing, generation_kwargs=asked)  # `make` asks for no cache
        assert trainer.generation_config.use_cache is expected
    quantized = policy()
    quantized.is_loaded_in_8bit = True  # so it is treated like one
    lora = LoraConfig(task_type="CAUSAL_LM")
    trainer = make(model=quantized, peft_config=lora, gradient_checkpointing=True, generation_kwargs=None)
    assert trainer.generation_config.use_cache is True
    assert trainer.model.is_gradient_checkpointing


def test_the_log_shows_an_opponent_that_babbles(page):
    trainer = page["build"](gradient_checkpointing=False)
    trainer.model.train()
    prompts = page["prompts_of"](trainer, 32)
    width = prompts["input_ids"].shape[1]
    data = trainer._process_completions(*trainer._generate_completions(trainer.model, prompts), prompts)
    ours, theirs = trainer._compute_rewards(*data, width)
    win = torch.sigmoid(ours - theirs)
    assert theirs.mean() < -5
    assert win.mean() > 0.6
    assert win[ours > 0].min() > 0.9


def test_the_temperature_is_applied_to_the_mixture(page):
    models = policy(0).eval(), policy(1).eval()
    found = mixture(*models, 0.3, temperature=0.5, do_sample=True, top_k=0).generate(IDS, attention_mask=MASK, **KEEP)
    expected = recomputed(models, 0.3, found.sequences, 5)
    agree(torch.stack(found.scores, 1).softmax(-1), (expected / 0.5).softmax(-1))


def test_the_temperature_is_not_in_the_log_probabilities(make):
    data = batch([5, 6, 7, 8, 9, 10])
    model = policy()
    cold, hot = make(model=model, temperature=0.5), make(model=model, temperature=2.0)
    assert (cold.generation_config.temperature, hot.generation_config.temperature) == (0.5, 2.0)
    ours, theirs = (trainer._compute_logprobs(trainer.model.eval(), data, 3)[0] for trainer in (cold, hot))
    plain = model(data["input_ids"]).logits[:, 2:-1].log_softmax(-1).gather(-1, data["input_ids"][:, 3:, None])[..., 0]
    assert torch.allclose(ours, plain, atol=1e-5)
    assert torch.equal(ours, theirs)


def players(trainer, monkeypatch):
    """What the two models of the mixture are, in one round of sampling."""
    seen = []

    class Spy(GeometricMixtureWrapper):
        def __init__(self, model, ref_model, *args, **kwargs):
            seen.append((model, ref_model, kwargs["mixture_coef"]))
            super().__init__(model, ref_model, *args, **kwargs)

    monkeypatch.setattr(nash_md_trainer, "GeometricMixtureWrapper", Spy)
    trainer._generate_completions(trainer.model, PROMPTS)
    return seen[0]


def test_a_wrapped_model_with_a_new_adapter_stops_at_the_first_step(make):
    trainer = make(peft_config=LoraConfig(task_type="CAUSAL_LM"))
    data = batch([5, 6, 7, 8, 9, 10])
    trainer._compute_logprobs(trainer.model, data, 3)
    with pytest.raises(AttributeError, match="disable_adapter"):
        trainer._compute_logprobs(torch.nn.DataParallel(trainer.model), data, 3)


def test_with_a_new_adapter_the_opponent_is_the_policy(make, monkeypatch):
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = make(peft_config=lora)
    assert trainer.ref_model is None
    ours, theirs, _ = players(trainer, monkeypatch)
    with torch.no_grad():
        with_adapter, base = ours.eval()(IDS).logits, theirs.eval()(IDS).logits
        with trainer.model.disable_adapter():
            without = trainer.model(IDS).logits
    assert torch.equal(with_adapter, base)
    assert not torch.allclose(base, without, atol=0.1)
    # the loss has the right one
    data = batch([5, 6, 7, 8, 9, 10])
    found = trainer._compute_logprobs(trainer.model, data, 3)[1]
    with torch.no_grad(), trainer.model.disable_adapter():
        logps = trainer.model(data["input_ids"]).logits[:, 2:-1].log_softmax(-1)
    assert torch.allclose(found, logps.gather(-1, data["input_ids"][:, 3:, None])[..., 0], atol=1e-5)
    # and so has an opponent that is given one, or one whose model brought its adapter along
    given = policy(1)
    trainer = make(peft_config=lora, ref_model=given)
    assert players(trainer, monkeypatch)[1] is given
    trainer = make(model=get_peft_model(policy(), lora))
    ours, theirs, _ = players(trainer, monkeypatch)
    assert theirs is trainer.ref_model
    assert not {id(weight) for weight in theirs.parameters()} & {id(weight) for weight in ours.parameters()}


def test_min_p_of_the_model_acts_on_the_policy_and_not_on_the_opponent(make):
    model = policy()
    model.generation_config.min_p = 1.0  # the likeliest token, always
    trainer = make(model=model, temperature=1.5)
    ours, theirs = trainer._generate_completions(trainer.model, batch(*[[5, 6, 7]] * 8))
    assert (ours == ours[0]).all()
    assert not (theirs == theirs[0]).all()


def test_the_wrapper_has_attributes_that_transformers_no_longer_reads():
    source = inspect.getsource(transformers.generation.utils)
    gone = {name for name in vars(GeometricMixtureWrapper) if name.startswith("_supports") and name not in source}
    assert gone == {"_supports_cache_class", "_supports_static_cache"}


# ------------------------------------------------------------------------------------------------------- rewards


def test_a_reward_function_fails_at_the_first_step(make):
    trainer = make(reward_funcs=lambda completions, **_: [0.0] * len(completions))
    with pytest.raises(AttributeError, match="'function' object has no attribute 'base_model_prefix'"):
        trainer.train()
    headless = reward_model()
    del headless.score
    with pytest.raises(AttributeError, match="score"):
        make(reward_funcs=headless).train()


def test_two_reward_models_are_refused_by_the_parent(make):
    with pytest.raises(ValueError, match=r"zip\(\)"):
        make(reward_funcs=[reward_model(), reward_model()])


def test_there_is_no_tokenizer_for_the_reward_model(make):
    theirs, ours = (set(inspect.signature(t.__init__).parameters) for t in (OnlineDPOTrainer, NashMDTrainer))
    assert theirs - ours == {"reward_processing_classes"}
    assert ours < theirs
    reader = tokenizer()
    assert make(processing_class=reader).reward_processing_classes == [reader]


def test_the_reward_model_reads_the_token_ids_of_the_policy(make):
    trainer, kept = make(), []
    process = trainer._process_completions
    trainer._process_completions = lambda *args: kept.append(process(*args)) or kept[-1]
    seen = calls_of(trainer.reward_funcs.model)
    trainer.train()
    assert len(seen) == 2
    for call, data in zip(seen, kept[0], strict=True):
        assert torch.equal(call.kwargs["input_ids"], data["input_ids"])
        assert not call.training
        assert not call.gradient


def test_the_score_is_read_at_the_end_token_or_at_the_last_one():
    model = reward_model().eval()
    ids = torch.tensor([[0, 5, 6, 7, END, 0], [4, 5, 6, 7, 8, 9]])  # two tokens of prompt; ended, cut
    logits, scores, places = utils.get_reward(model, ids, 0, 2)
    assert places.tolist() == [4, 5]
    assert torch.equal(scores, logits[[0, 1], [4, 5], 0])
    assert scores[0].item() == pytest.approx(model(ids[:1, 1:5]).logits.item(), abs=1e-5)


def test_a_pad_token_equal_to_eos_hides_the_ends_from_the_reward_model(make):
    trainer = make(processing_class=tokenizer(pad=None))
    assert trainer.processing_class.pad_token_id == END
    seen = calls_of(trainer.reward_funcs.model)
    ids = torch.tensor([[END, 2, 5, 6, END, 3, 7, 8, END, END]])  # padding, a turn of the user, an answer that ended
    data = {"input_ids": ids}
    scores, _ = trainer._compute_rewards(data, data, 6)
    assert seen[0].kwargs["attention_mask"].tolist() == [
        [False, True, True, True, False, True, True, True, False, False]
    ]
    without_ends = torch.tensor([[2, 5, 6, 3, 7, 8]])
    assert scores.item() == pytest.approx(trainer.reward_funcs(without_ends).logits.item(), abs=1e-5)


def test_the_penalty_looks_for_the_end_token_in_the_prompt_too(make):
    ended, cut = [7, 8, END], [7, 8, 9]
    own, rival = (batch([*start, *ended], [*start, *cut]) for start in ([2, 5, 3], [2, 5, 3]))
    closed = batch([2, 5, END, *ended], [2, 5, END, *cut])  # the user's turn has an end
    free, fined = make(), make(missing_eos_penalty=5.0)
    before, after = (trainer._compute_rewards(own, rival, 3)[0] for trainer in (free, fined))
    assert torch.allclose(before - after, torch.tensor([0.0, 5.0]), atol=1e-5)
    before, after = (trainer._compute_rewards(closed, closed, 3)[0] for trainer in (free, fined))
    assert torch.equal(before, after)
    # both players were cut, and both pay
    ours, theirs = fined._compute_rewards(own, rival, 3)
    assert ours[1] == theirs[1]


def test_the_opponents_answer_is_not_trained_on(make):
    trainer, kept, graded = make(), [], []
    process = trainer._process_completions
    trainer._process_completions = lambda *args: kept.append(process(*args)) or kept[-1]
    trainer.model.register_forward_pre_hook(lambda _, args: graded.append(args[0]) if torch.is_grad_enabled() else None)
    trainer.train()
    own, rival = kept[0]
    assert len(graded) == 1
    assert torch.equal(graded[0], own["input_ids"])
    assert not torch.equal(own["input_ids"], rival["input_ids"])


# ------------------------------------------------------------------------------------------------ prompts and sampling


def test_a_bos_token_is_put_in_front_of_prompts_that_lack_it():
    reader = tokenizer()
    rows = [{"prompt": "1+2"}, {"prompt": "<|user|>1+2<|end|><|assistant|>"}]
    for bos, added in ((None, [0, 0]), ("<|user|>", [1, 0]), ("<|assistant|>", [1, 1])):
        reader.bos_token = bos
        for row, count in zip(rows, added, strict=True):
            ids = OnlineDPOTrainer.tokenize_row(row, False, reader)["prompt_input_ids"]
            plain = reader(row["prompt"], add_special_tokens=False)["input_ids"]
            assert ids == [reader.bos_token_id] * count + plain
    assert "self.tokenize_row" not in inspect.getsource(OnlineDPOTrainer)


def test_how_often_each_model_runs_in_a_step(make):
    trainer = make(ROWS[:1] * 4, generation_kwargs={"min_new_tokens": 6})
    ours, theirs, judge = (calls_of(m) for m in (trainer.model, trainer.ref_model, trainer.reward_funcs.model))
    trainer.train()
    growing = list(range(6, 12))  # the whole sequence for each token: there is no cache
    assert [call.shape[1] for call in ours] == [*growing, *growing, 12]
    assert [call.shape[1] for call in theirs] == [*growing, 12]
    assert [call.shape for call in judge] == [(4, 12)] * 2


def test_the_policy_plays_both_parts_in_training_mode(make):
    trainer = make()
    ours, theirs = calls_of(trainer.model), calls_of(trainer.ref_model)
    trainer.train()
    assert all(call.training for call in ours)
    assert not any(call.training for call in theirs)
    assert [call.gradient for call in ours] == [False] * (len(ours) - 1) + [True]


def test_max_length_loss_type_and_reward_weights_are_ignored(make):
    trainer = make(max_length=8, max_new_tokens=7)
    seen = calls_of(trainer.model)
    trainer.train()
    assert seen[0].shape[1] in (7, 8)  # the longest prompt
    assert seen[-1].shape[1] == seen[0].shape[1] + 7 > 8
    plain, other = trained(make())[0], trained(make(loss_type="ipo", reward_weights=[-7.0], max_length=7))[0]
    assert plain["loss"] != 0
    assert (plain["loss"], plain["grad_norm"]) == (other["loss"], other["grad_norm"])
    with pytest.warns(UserWarning, match="completely removed"):
        NashMDConfig(output_dir="unused", use_cpu=True, max_length=6, max_new_tokens=6)


def test_positions_are_counted_with_the_padding(make):
    alone, behind = batch([5, 6, 7, 8, 9]), batch([0, 0, 5, 6, 7, 8, 9])
    behind["attention_mask"][:, :2] = 0
    for model, shifted in ((gpt2(), True), (policy(), False)):
        trainer = make(model=model)
        trainer.model.eval()
        ours, theirs = (trainer._compute_logprobs(trainer.model, *case)[0] for case in ((alone, 3), (behind, 5)))
        assert torch.allclose(ours, theirs, atol=1e-4) != shifted


def test_what_lies_behind_the_end_is_masked_in_both_tensors(shared):
    outputs = (torch.tensor([[5, 6, 7, END, 8, 9], [5, 6, 7, 8, 9, 10]]),) * 2
    own, _ = shared._process_completions(*outputs, batch([5, 6], [5, 6]))
    assert own["input_ids"].tolist()[0] == [5, 6, 7, END, 0, 0]
    for logps in shared._compute_logprobs(shared.model, own, 2):
        assert (logps == 0).tolist() == [[False, False, True, True], [False] * 4]


# ------------------------------------------------------------------------------------------------------- the step, the run


def answers_from_prompts(model, prompts):
    """Stands in for sampling: answers that depend on the prompt alone."""
    number = (prompts["input_ids"] * prompts["attention_mask"]).sum(1)
    ids = torch.stack([4 + number % 30, 4 + 3 * number % 37, torch.full_like(number, END)], dim=1)
    rivals = torch.stack([4 + 7 * number % 31, 5 + number % 17, torch.full_like(number, END)], dim=1)
    return tuple(torch.cat([prompts["input_ids"], answer], 1) for answer in (ids, rivals))


def test_gradients_of_accumulated_batches_are_summed(make):
    def line(passes, mend=False):
        trainer = make(per_device_train_batch_size=8 // passes, gradient_accumulation_steps=passes)
        trainer._generate_completions = answers_from_prompts
        if mend:
            trainer.accelerator.gradient_accumulation_steps = passes
        return trained(trainer)[0]

    at_once, in_four = line(1), line(4)
    assert at_once["loss"] != 0
    assert in_four["loss"] == pytest.approx(at_once["loss"], abs=2e-4)  # the logged loss is divided
    assert in_four["grad_norm"] == pytest.approx(4 * at_once["grad_norm"], rel=1e-3)
    assert line(4, mend=True)["grad_norm"] == pytest.approx(at_once["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("name", ["mixture_coef", "beta"])
def test_a_list_ends_the_run_at_the_second_step(make, name):
    trainer = make(max_steps=2, **{name: [0.1, 0.2]})
    with pytest.raises(TypeError, match="list indices must be integers"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert getattr(make(**{name: [0.3]}), name) == 0.3


def test_a_callback_can_change_the_mixture(make):
    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer._mixture_coef = 0.9

    trainer = make(max_steps=2, callbacks=[Change()])
    assert [line["mixture_coef"] for line in trained(trainer)] == [0.5, 0.9]


def test_evaluation_and_streams_fail_as_in_the_parent(make):
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        make(eval_dataset=Dataset.from_list(ROWS)).evaluate()
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(TypeError, match=r"Can only (find the batch size of|concatenate) tensors"):
        make(stream).train()
    assert trained(make(stream, accelerator_config={"dispatch_batches": False}))


def test_text_is_a_prompt_too_and_other_columns_are_not_read(make):
    rows = [{**row, "answer": "3", "note": None} for row in TEXTS]
    assert trained(make(rows))


def test_what_this_page_leaves_to_the_page_about_online_dpo_is_inherited():
    own = {
        name for name, value in vars(NashMDTrainer).items() if inspect.isroutine(value) or isinstance(value, property)
    }
    assert own == {
        "__init__",
        "mixture_coef",
        "_generate_completions",
        "_process_completions",
        "_compute_rewards",
        "_compute_logprobs",
        "_compute_losses",
        "_log_statistics",
        "training_step",
    }
    assert set(NashMDConfig.__dataclass_fields__) - set(OnlineDPOConfig.__dataclass_fields__) == {"mixture_coef"}
    assert "vllm" not in inspect.getsource(nash_md_trainer).lower()


def test_with_vllm_the_first_step_ends_in_an_attribute_error(make):
    """vLLM is not installed here: what its branch of the parent's constructor leaves out is taken away again."""
    with_vllm, without = inspect.getsource(OnlineDPOTrainer.__init__).split("# Set up transformers generation config")
    assert "self.llm = LLM(" in with_vllm and "self.generation_kwargs =" not in with_vllm
    assert "self.generation_kwargs = generation_kwargs" in without
    trainer = make()
    del trainer.generation_kwargs
    with pytest.raises(AttributeError, match="generation_kwargs"):
        trainer.train()


def test_two_settings_are_read_by_the_parents_sampling_alone():
    parents_sampling_alone_reads(NashMDConfig, nash_md_trainer, "cache_implementation", "ds3_gather_for_generation")


def test_the_end_of_a_step_is_the_parents():
    ends = []
    for trainer in (OnlineDPOTrainer, NashMDTrainer):
        source = inspect.getsource(trainer.training_step)
        end = source[source.index("        if (\n            self.args.torch_empty_cache_steps") :]
        ends.append([line for line in end.splitlines() if line])
    assert ends[0] == ends[1]


# ------------------------------------------------------------------------------------------------------- the neighbours


@pytest.fixture
def case():
    """Log-probabilities of two answers of one length, by policy and reference, and two scores."""
    dice = torch.Generator().manual_seed(3)
    logps, ref_logps = (-torch.rand(2, 3, generator=dice) for _ in range(2))
    return logps.requires_grad_(), ref_logps, torch.tensor([0.9, 0.2])


def ours_of(page, name, case):
    logps, ref_logps, scores = case
    h = (logps - ref_logps).detach()
    return page[name](h[0], h[1], scores[0] - scores[1], beta=0.3)


def test_the_push_of_nash_md_is_that_of_trl(page, case):
    logps, ref_logps, scores = case
    win = torch.sigmoid(scores[:1] - scores[1:])
    loss, *_ = NashMDTrainer._compute_losses(SimpleNamespace(beta=0.3), logps[:1], ref_logps[:1], win)
    agree(ours_of(page, "nash_md_push", case), -torch.autograd.grad(loss, logps)[0][0])


def test_the_push_of_rloo_is_that_of_the_page_about_rloo(page, case):
    logps, ref_logps, scores = case
    theirs = functions_of(PAGES / "rloo.md", "penalized_reward", "leave_one_out_advantage", "rloo_loss")
    ones, old = torch.ones(2, 3), logps.detach()
    rewards = theirs["penalized_reward"](scores, old, ref_logps, ones, beta=0.3)
    loss = theirs["rloo_loss"](logps, old, theirs["leave_one_out_advantage"](rewards, 2), ones)
    agree(ours_of(page, "rloo_push", case), -2 * torch.autograd.grad(loss, logps)[0][0])  # a mean over two answers


def test_the_push_of_online_dpo_is_that_of_the_page_about_online_dpo(page, case):
    logps, ref_logps, scores = case
    theirs = functions_of(PAGES / "online_dpo.md", "weighted_reward", "reward_to_pair", "online_dpo_loss")
    for points in (scores, scores.flip(0)):
        loss = theirs["online_dpo_loss"](logps, ref_logps, torch.ones(2, 3), points, beta=0.3)
        slope = -torch.autograd.grad(loss, logps, retain_graph=True)[0][0]
        agree(ours_of(page, "online_dpo_push", (logps, ref_logps, points)), slope)


# ------------------------------------------------------------------------------------------------------- the page itself


def test_every_test_that_the_page_names_exists():
    named = named_tests(PAGE)
    assert named
    assert named <= set(globals())


def test_the_arguments_that_the_page_calls_gone_are_gone():
    text = section("Older code and tutorials")
    here = arguments_of(NashMDTrainer, NashMDConfig)
    for name in ("reward_model", "judge"):
        assert f"`{name}=`" in text
        assert name not in here
    assert "reward_funcs" in here


def test_the_defaults_that_the_page_quotes_are_those_of_the_config(tmp_path):
    text = PAGE.read_text("utf-8")
    args = NashMDConfig(output_dir=str(tmp_path), use_cpu=True)
    quoted = re.findall(r"`(\w+)`\s\(default ([^)]+)\)", text)
    assert len(quoted) >= 3
    quoted += re.findall(r"`(\w+)`, (\S+) unless you say otherwise", text)
    assert {name: value for name, value in quoted} == {name: str(getattr(args, name)) for name, _ in quoted}
    assert {"mixture_coef", "beta"} <= {name for name, _ in quoted}
