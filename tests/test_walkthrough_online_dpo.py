"""The claims of annotated_trainers/online_dpo.md that running TRL can show, on a random model of two layers, on the CPU.

Formulas get random logits, random answers and random rewards: `_generate` and the forward pass of the models are replaced,
the rest is the real `training_step` of a real trainer, with its backward pass. `pytest -s` prints the largest error.
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
import transformers
from datasets import Dataset
from markdown_pages import fences
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import DPOTrainer, GRPOConfig, TrlParser
from trl.experimental import utils
from trl.experimental.nash_md import NashMDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer, online_dpo_trainer
from trl.experimental.xpo import XPOConfig, XPOTrainer
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
    config,
    defaults_on,
    first_token,
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
    reward_model,
    save,
    section_of,
    tokenizer,
    trained,
)
from walkthrough_tools import QUESTION_ROWS as ROWS

PAGE = PAGES / "online_dpo.md"
section = functools.partial(section_of, PAGE)
MEASURED = EXPECTED / "online_dpo.json"
checkpoint = model_folder()


@pytest.fixture(scope="module")
def make(checkpoint, tmp_path_factory):
    """Makes an OnlineDPOTrainer; keyword arguments of OnlineDPOTrainer go there, all others to OnlineDPOConfig."""

    def make(rows=ROWS, model=None, **more) -> OnlineDPOTrainer:
        model = AutoModelForCausalLM.from_pretrained(checkpoint) if model is None else model
        sizes = {"per_device_train_batch_size": 4, "max_new_tokens": 8, "max_length": 64, "max_steps": 1}
        more = {**sizes, "reward_funcs": first_token, "gradient_checkpointing": False, **more}
        return make_trainer(
            OnlineDPOTrainer, OnlineDPOConfig, tmp_path_factory.mktemp("run"), rows, model=model, **more
        )

    return make


trained_once = made_and_trained(max_steps=2)
shared = made_once()


# ---------------------------------------------------------------------------- the formulas, against TRL's own methods


page = page_of(PAGE)


class Step:
    """TRL's own `training_step` on random answers, logits and rewards: what went in, what it made of it, what it logged."""

    def __init__(self, trainer, seed=0, pairs=4, length=7, values=None, answers=None, others=None, **settings):
        dice = torch.Generator().manual_seed(seed)
        prompt_ids = torch.randint(4, VOCABULARY, (2 * pairs, 3), generator=dice)
        ids = torch.randint(4, VOCABULARY, (2 * pairs, length), generator=dice) if answers is None else answers
        if answers is None:  # some of the answers end, at different places
            ends = torch.randint(0, 2 * length, (2 * pairs,), generator=dice)
            ids = torch.where(torch.arange(length) == ends[:, None], END, ids)
        self.ids, self.mask = utils.truncate_right(ids, END, 0)
        shape = (2 * pairs, 3 + self.ids.shape[1], VOCABULARY)
        self.logits = (2 * torch.randn(shape, generator=dice, dtype=torch.float64)).requires_grad_()
        ref_logits = self.logits.detach() + 0.7 * torch.randn(shape, generator=dice, dtype=torch.float64)
        self.values = torch.randn(2 * pairs, 2, generator=dice) if values is None else values
        columns = self.values.T.tolist()
        given = (prompt_ids, torch.ones_like(prompt_ids), self.ids, self.mask)
        score, self.gathered = trainer._calculate_rewards_from_functions, []

        def keep_rewards(**kwargs):
            self.rewards = score(**kwargs)  # the penalty will be taken from this tensor, in place
            return self.rewards

        def keep_gathered(tensor):
            self.gathered.append(tensor.detach())
            return tensor if others is None else torch.stack([tensor.detach().mean(), torch.tensor(others)])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "stats", {key: [] for key in trainer.stats})
            patch.setattr(trainer, "_generate", lambda model, prompts, images: given)
            patch.setattr(trainer, "ref_model", Says(ref_logits))
            patch.setattr(trainer, "reward_funcs", [lambda column=column, **_: column for column in columns])
            patch.setattr(trainer, "reward_processing_classes", [None] * len(columns))
            patch.setattr(trainer, "reward_weights", torch.ones(len(columns)))
            patch.setattr(trainer, "_calculate_rewards_from_functions", keep_rewards)
            patch.setattr(trainer.accelerator, "gather_for_metrics", keep_gathered)
            for name, value in settings.items():
                patch.setattr(trainer.args if name in ("missing_eos_penalty", "loss_type") else trainer, name, value)
            self.loss = trainer.training_step(Says(self.logits), {"prompt": ["1+2"] * pairs})
            self.logged = {key: value[0] for key, value in trainer.stats.items()}
        self.gradient = self.logits.grad
        self.logps, self.ref_logps = (
            torch.log_softmax(logits[:, 2:-1], -1).gather(-1, self.ids[..., None])[..., 0]
            for logits in (self.logits, ref_logits)
        )
        self.ended = (self.ids == END).any(1)


ERRORS, agree, summary = comparisons()


@pytest.mark.parametrize("name", ["online_dpo_loss", "online_ipo_loss"])
def test_the_losses_on_the_page_are_what_trl_computes(page, shared, name):
    kind = {"online_dpo_loss": "sigmoid", "online_ipo_loss": "ipo"}[name]
    for seed, pairs in itertools.product(range(4), (1, 2, 5)):
        step = Step(shared, seed, pairs, loss_type=kind, _beta=0.3)
        ours = page[name](step.logps, step.ref_logps, step.mask, step.rewards, beta=0.3)
        agree(ours, step.loss)
        (gradient,) = torch.autograd.grad(ours, step.logits)
        agree(gradient, step.gradient)


def test_the_reward_on_the_page_is_what_trl_computes(page, shared):
    cut = 0
    for seed in range(6):
        values = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        values[seed % 8, 1] = math.nan
        weights = torch.tensor([1.0, 0.5, -2.0])
        step = Step(shared, seed, values=values, reward_weights=weights, missing_eos_penalty=0.7)
        agree(page["weighted_reward"](values, weights, step.ended, penalty=0.7), step.rewards)
        cut += int((~step.ended).sum())
    assert 0 < cut < 48  # answers with and without an end were seen


def test_the_pair_on_the_page_is_the_one_that_trl_makes(page, shared):
    ties = 0
    for seed in range(6):
        values = torch.randint(0, 2, (10, 1), generator=torch.Generator().manual_seed(seed)).float()
        step = Step(shared, seed, pairs=5, values=values)
        chosen, rejected = page["reward_to_pair"](step.rewards)
        sums = (step.logps * step.mask).sum(1)
        agree(sums[chosen], step.gathered[2])
        agree(sums[rejected], step.gathered[3])
        ties += int((values[:5] == values[5:]).sum())
    assert ties


def test_every_displayed_formula_has_its_function_and_is_compared_above():
    known = {"weighted-reward", "reward-to-pair", "online-dpo-loss", "online-ipo-loss"}
    assert formula_names(PAGE) == sorted(known)


# ------------------------------------------------------------------------------------------------------- what is logged


def test_the_page_lists_exactly_the_keys_that_a_run_logs(trained_once):
    logged = set().union(*trained_once.state.log_history)
    assert set(metrics_on(PAGE)) == logged
    assert trained_once.state.log_history[-1]["total_flos"] == 0


def test_every_metric_is_what_the_table_says(page, shared):
    for seed in range(3):
        step = Step(shared, seed, _beta=0.3, missing_eos_penalty=0.7)
        chosen, rejected = page["reward_to_pair"](step.rewards)
        sums, h = ((values * step.mask).sum(1) for values in (step.logps, step.logps - step.ref_logps))
        kl = (step.logps - step.ref_logps).sum(1)
        margins = 0.3 * (h[chosen] - h[rejected])
        table = {
            "objective/scores": step.rewards.mean(),
            "objective/scores_margin": (step.rewards[chosen] - step.rewards[rejected]).mean(),
            "objective/kl": kl.mean(),
            "objective/non_score_reward": -0.3 * kl.mean(),
            "objective/rlhf_reward": step.rewards.mean() - 0.3 * kl.mean(),
            "objective/entropy": -step.logps.sum(1).mean(),
            "rewards/chosen": 0.3 * h[chosen].mean(),
            "rewards/rejected": 0.3 * h[rejected].mean(),
            "rewards/margins": margins.mean(),
            "rewards/accuracies": (margins > 0).double().mean(),
            "logps/chosen": sums[chosen].mean(),
            "logps/rejected": sums[rejected].mean(),
            "val/contain_eos_token": step.ended.double().mean(),
            "beta": 0.3,
        }
        assert set(table) == set(step.logged)
        for key, value in table.items():
            agree(value, step.logged[key])


def test_the_kl_and_the_entropy_are_summed_over_the_padding_too(shared):
    step = Step(shared, seed=1)
    assert not step.mask.all()
    kl, entropy = step.logps - step.ref_logps, -step.logps
    for key, values in (("objective/kl", kl), ("objective/entropy", entropy)):
        assert step.logged[key] == pytest.approx(values.sum(1).mean().item())
        assert step.logged[key] != pytest.approx((values * step.mask).sum(1).mean().item(), abs=0.1)


def test_all_metrics_but_one_are_gathered(shared):
    alone, with_others = Step(shared, seed=2), Step(shared, seed=2, others=1000.0)
    same = {key for key, value in alone.logged.items() if with_others.logged[key] == value}
    assert same == {"val/contain_eos_token", "beta"}


def test_micro_batches_count_equally_in_the_log(make):
    trainer = make(ROWS[:5], num_train_epochs=1, max_steps=-1, logging_steps=2, learning_rate=0.0)
    seen, score = [], trainer._calculate_rewards_from_functions
    trainer._calculate_rewards_from_functions = lambda **kwargs: seen.append(score(**kwargs)) or seen[-1]
    (line,) = trained(trainer)
    assert [len(rewards) for rewards in seen] == [8, 2]
    assert line["objective/scores"] == pytest.approx(sum(float(rewards.mean()) for rewards in seen) / 2)


@pytest.mark.parametrize(("loss_type", "first"), [("sigmoid", LOG2), ("ipo", 25.0)])
def test_the_first_loss_is_log_2_or_25(make, loss_type, first):
    line = trained(make(loss_type=loss_type))[0]
    assert line["loss"] == round(first, 4)
    assert line["rewards/chosen"] == line["rewards/margins"] == line["rewards/accuracies"] == 0
    assert line["objective/kl"] == 0


def test_the_loss_of_the_toy_run_does_not_fall():
    loss = json.loads(MEASURED.read_text("utf-8"))["log"]["loss"]["mean"]
    assert loss[0] <= sum(loss[-5:]) / 5
    assert all(0.65 < value < 0.82 for value in loss)


def test_many_pairs_of_the_toy_policy_hold_one_answer_twice(page):
    policy = AutoModelForCausalLM.from_pretrained(str(EXAMPLES / "toy" / "policy"))
    prompts = [page["data"][i]["prompt"] for i in range(64)]
    answers = page["trainer"]._generate(policy, prompts)[2]
    twice = (answers[:64] == answers[64:]).all(1).double().mean()
    assert 0.4 < float(twice) < 0.65
    assert "About half of all pairs hold one answer twice" in section("What is normal")


# ----------------------------------------------------------------------------------------------- rewards, pairs, penalty


def rewards_of(trainer, function, pairs=2):
    """The rewards of `2 * pairs` answers by one function."""
    trainer.reward_funcs, kept = [function], trainer.reward_funcs
    try:
        answers = [[{"role": "assistant", "content": str(i)}] for i in range(2 * pairs)]
        prompts = [row["prompt"] for row in ROWS[:pairs]] * 2
        return trainer._calculate_rewards_from_functions(
            prompts=prompts, completions=answers, completion_ids_list=[[5]] * len(answers)
        )
    finally:
        trainer.reward_funcs = kept


def test_a_reward_function_gets_padded_ids_and_doubled_columns(make):
    seen = []

    def look(prompts, completions, completion_ids, answer, trainer_state, **others):
        seen.append((prompts, completions, completion_ids, answer, trainer_state.global_step, others))
        return [0.0] * len(prompts)

    trainer = make(reward_funcs=look, max_new_tokens=40)
    trainer.train()
    prompts, completions, ids, answer, step, others = seen[0]
    assert prompts[:4] == prompts[4:]
    assert answer[:4] == answer[4:]
    assert {(prompt[0]["content"], truth) for prompt, truth in zip(prompts, answer, strict=True)} <= {
        (row["prompt"][0]["content"], row["answer"]) for row in ROWS
    }
    assert step == 0
    assert others == {}
    assert {len(row) for row in ids} == {len(ids[0])}  # one length,
    assert any(row[-1] == 0 for row in ids)  # by padding
    assert all(message["role"] == "assistant" for (message,) in completions)
    assert not any("<|end|>" in message["content"] for (message,) in completions)


def test_none_counts_as_0_and_beats_a_negative_reward(shared, page):
    rewards = rewards_of(shared, lambda completions, **_: [None, math.nan, -1.0, -2.0])
    assert rewards.tolist() == [0, 0, -1, -2]
    assert page["reward_to_pair"](rewards)[0].tolist() == [0, 1]


def test_only_the_order_of_two_rewards_counts(shared):
    values = torch.tensor([[3.0], [1.0], [2.0], [2.5], [-1.0], [7.0], [1.9], [2.5]])
    plain = Step(shared, values=values)
    for other in (10 * values, values + 100, values.exp()):
        step = Step(shared, values=other)
        assert step.loss == plain.loss
        assert torch.equal(step.gradient, plain.gradient)
    assert not torch.equal(Step(shared, values=-values).gradient, plain.gradient)


def test_a_tie_of_two_answers_is_trained_with_the_first_as_chosen(shared):
    tie, won, lost = (Step(shared, pairs=1, values=torch.tensor(v)) for v in ([[1.0], [1]], [[2.0], [1]], [[0.0], [1]]))
    assert torch.equal(tie.gradient, won.gradient)
    assert not torch.equal(tie.gradient, lost.gradient)
    assert tie.gradient.abs().max() > 0


def test_ties_pull_the_log_ratios_together_on_average():
    margin = torch.tensor([-3.0, -0.5, 0.5, 3.0], requires_grad=True)
    both_ways = -(torch.nn.functional.logsigmoid(margin) + torch.nn.functional.logsigmoid(-margin)) / 2
    (slope,) = torch.autograd.grad(both_ways.sum(), margin)
    assert torch.equal(slope.sign(), margin.sign())


def test_a_pair_of_one_answer_twice_has_no_gradient_and_counts_as_wrong(make):
    answer = torch.tensor([[7, 8, 9, END]])
    trainer = make(max_steps=2, reward_funcs=lambda completions, **_: [1.0] * len(completions))
    trainer._generate = lambda model, prompts, images: (
        *(2 * [torch.full((8, 3), 5)]),
        answer.repeat(8, 1),
        torch.ones(8, 4, dtype=torch.long),
    )
    for line in trained(trainer):
        assert line["loss"] == 0.6931
        assert line["grad_norm"] < 1e-6
        assert line["rewards/accuracies"] == 0


def test_the_penalty_is_taken_from_the_sum_and_cancels_if_both_were_cut(shared):
    ended, cut = [7, 8, END], [7, 8, 9]
    for first, second, chosen in ((cut, cut, 0), (cut, ended, 1), (ended, cut, 0)):
        answers, values = torch.tensor([first, second]), torch.tensor([[0.5, 0.5], [0.25, 0.25]])
        step = Step(shared, pairs=1, answers=answers, values=values, missing_eos_penalty=0.7)
        expected = [1.0 - 0.7 * (first is cut), 0.5 - 0.7 * (second is cut)]
        assert step.rewards.tolist() == pytest.approx(expected)  # once, although there are two functions
        assert int(step.rewards.argmax()) == chosen
    bonus = Step(shared, pairs=1, answers=torch.tensor([cut, ended]), missing_eos_penalty=-5.0)
    assert int(bonus.rewards.argmax()) == 0


def test_the_reward_model_reads_a_cut_answer_as_a_finished_one(make):
    model = reward_model()
    trainer = make(reward_funcs=model, reward_processing_classes=tokenizer())
    seen, sampled, generate = calls_of(model), [], trainer._generate
    trainer._generate = lambda *args: sampled.append(generate(*args)) or sampled[-1]
    trainer.train()
    texts = tokenizer().batch_decode(seen[0].kwargs["input_ids"])
    assert not (sampled[0][2] == END).any(1).all()  # some of the answers were cut
    assert all(text.replace("<|pad|>", "").endswith("<|end|>") for text in texts)
    assert all(text.startswith("<|user|>") for text in texts)  # padding is on the right
    answers = tokenizer().batch_decode(sampled[0][2], skip_special_tokens=True)
    assert all(f"<|assistant|>{answer}<|end|>" in text for answer, text in zip(answers, texts, strict=True))
    assert not seen[0].training


def test_a_reward_model_reads_plain_text_without_an_end(make):
    model = reward_model()
    trainer = make([{"prompt": text} for text in QUESTIONS], reward_funcs=model, reward_processing_classes=tokenizer())
    seen = calls_of(model)
    trainer.train()
    texts = tokenizer().batch_decode(seen[0].kwargs["input_ids"])
    assert not any("<|end|>" in text for text in texts)
    assert all(re.match(r"\d+\+\d+", text) for text in texts)


def test_a_function_can_compare_both_answers(shared):
    def longer_wins(completions, **_):
        first, second = completions[: len(completions) // 2], completions[len(completions) // 2 :]
        wins = [len(a[0]["content"]) > len(b[0]["content"]) for a, b in zip(first, second, strict=True)]
        return [float(win) for win in wins] + [float(not win) for win in wins]

    assert rewards_of(shared, longer_wins, pairs=8).tolist() == [0.0] * 8 + [1.0] * 8  # "0" to "15"


def test_weights_are_factors(make):
    trainer = make(reward_funcs=[lambda **_: [1.0] * 2, lambda **_: [10.0] * 2], reward_weights=[2.0, 0.5])
    one = {"prompts": [ROWS[0]["prompt"]] * 2, "completions": ["a", "b"], "completion_ids_list": [[5], [6]]}
    assert trainer._calculate_rewards_from_functions(**one).tolist() == [7, 7]
    with pytest.raises(ValueError, match="reward weights"):
        make(reward_weights=[1.0, 1.0])


def test_the_list_of_rewards_is_changed_in_place(make, tmp_path):
    path = save(reward_model(), tmp_path)
    rewards = [first_token, path]
    trainer = make(reward_funcs=rewards)
    assert isinstance(rewards[1], torch.nn.Module)
    assert rewards[1].training is False
    assert trainer.reward_processing_classes[1].chat_template == tokenizer().chat_template


def test_reward_and_policy_are_loaded_with_the_same_arguments(make, checkpoint, tmp_path, monkeypatch):
    seen = {}
    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        load = getattr(online_dpo_trainer, name).from_pretrained

        def spy(path, name=name, load=load, **kwargs):
            seen[name] = dict(kwargs)
            return load(path, **{key: value for key, value in kwargs.items() if key != "device_map"})

        monkeypatch.setattr(online_dpo_trainer, name, SimpleNamespace(from_pretrained=spy))
    path = save(reward_model(), tmp_path)
    trainer = make(model=checkpoint, reward_funcs=path, model_init_kwargs={"dtype": "bfloat16"})
    assert seen["AutoModelForCausalLM"]["device_map"] == "auto"
    assert "device_map" not in seen["AutoModelForSequenceClassification"]
    assert trainer.reward_funcs[0].dtype == trainer.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="already instantiated"):
        make(reward_funcs=path, model_init_kwargs={"dtype": "bfloat16"})


def test_a_path_is_loaded_in_the_dtype_of_the_checkpoint(make, tmp_path):
    half = Qwen3ForCausalLM(Qwen3Config(**config())).to(torch.bfloat16)
    path = save(half, tmp_path)
    assert make(model=path).model.dtype == torch.bfloat16


def test_a_reward_model_with_an_adapter_gets_no_tokenizer_and_stays_in_training_mode(make):
    model = get_peft_model(reward_model(), LoraConfig(task_type="SEQ_CLS"))
    model.train()
    trainer = make(reward_funcs=model)
    assert trainer.reward_processing_classes == [None]
    assert trainer.reward_funcs[0].training
    with pytest.raises(AttributeError, match="apply_chat_template"):
        trainer.train()


def test_reward_model_path_is_read_by_nobody(make):
    with pytest.raises(ValueError, match="`reward_funcs` must be provided"):
        make(reward_funcs=None, reward_model_path="anything")
    source = inspect.getsource(online_dpo_trainer)
    assert "reward_model_path" not in source


# ------------------------------------------------------------------------------------------------ prompts and sampling


def prompts_for(trainer, prompts):
    trainer.model.train()
    return trainer._generate(trainer.model, prompts)[:4]


def test_prompts_are_padded_on_the_left_whatever_the_tokenizer_says(make):
    right = tokenizer()
    right.padding_side = "right"
    trainer = make(processing_class=right)
    ids, mask, *_ = prompts_for(trainer, [row["prompt"] for row in ROWS[:2]])
    assert right.batch_decode(ids) == 2 * ["<|pad|><|user|>1+2<|end|><|assistant|>", "<|user|>7+12<|end|><|assistant|>"]
    assert mask.tolist() == 2 * [[0, 1, 1, 1, 1, 1, 1], [1] * 7]


def test_a_prompt_of_plain_text_gets_no_bos(make):
    reader = tokenizer()
    reader.bos_token = "<|user|>"
    reader._tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 2)])
    assert reader("1+2")["input_ids"][0] == 2
    ids, *_ = prompts_for(make(processing_class=reader), ["1+2", "7+1"])
    assert reader.batch_decode(ids[:2]) == ["1+2", "7+1"]


def test_answers_stand_in_two_blocks(shared):
    ids, mask, answers, _ = prompts_for(shared, [row["prompt"] for row in ROWS[:3]])
    assert torch.equal(ids[:3], ids[3:])
    assert torch.equal(mask[:3], mask[3:])
    assert len(answers) == 6


def test_the_policy_samples_in_training_mode(make):
    trainer = make()
    seen = calls_of(trainer.model)
    trainer.train()
    assert len(seen) == 9
    assert all(call.training for call in seen)
    assert [call.gradient for call in seen] == [False] * 8 + [True]


def test_dropout_parts_policy_and_reference_at_the_first_step(make):
    assert trained(make(model=gpt2()))[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(trained(make(model=gpt2(), disable_dropout=False))[0]["objective/kl"]) > 1e-2
    torch.manual_seed(0)
    dropping = Qwen3ForCausalLM(Qwen3Config(**config(attention_dropout=0.5)))
    assert abs(trained(make(model=dropping))[0]["objective/kl"]) > 1e-3


def test_disable_dropout_reaches_the_adapter_and_not_the_attention(make):
    torch.manual_seed(0)
    dropping = Qwen3ForCausalLM(Qwen3Config(**config(attention_dropout=0.5)))
    trainer = make(model=dropping, peft_config=LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.3))
    assert {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)} == {0}
    assert {layer.self_attn.attention_dropout for layer in dropping.model.layers} == {0.5}


def test_checkpointing_turns_off_the_cache_and_a_setting_turns_it_on(make):
    for settings, lengths in (
        ({}, [6] + 7 * [1]),
        ({"gradient_checkpointing": True}, list(range(6, 14))),
        ({"gradient_checkpointing": True, "generation_kwargs": {"use_cache": True}}, [6] + 7 * [1]),
    ):
        settings["generation_kwargs"] = {"min_new_tokens": 8, **settings.get("generation_kwargs", {})}
        trainer = make(ROWS[:1] * 4, **settings)
        seen = calls_of(trainer.model)
        trainer.train()
        assert [call.shape[1] for call in seen] == [*lengths, 14]
    assert OnlineDPOConfig.__dataclass_fields__["gradient_checkpointing"].default is True


def test_checkpointing_is_suspended_while_the_policy_samples(make):
    trainer, on = make(gradient_checkpointing=True), []
    trainer.model.register_forward_pre_hook(lambda *_: on.append(trainer.model.is_gradient_checkpointing))
    trainer.train()
    assert on == [False] * 8 + [True]


def test_the_costs_on_the_page_follow_from_its_settings(page):
    answers, prompt, length = 16, 12, 32
    with_cache = answers * (prompt + length - 1)
    without = answers * sum(prompt + done for done in range(length))
    scored = answers * (prompt + length)
    block = re.search(r"```text\n16 answers in one step.*?```", PAGE.read_text("utf-8"), re.S)[0]
    rows = [line for line in block.splitlines() if "pass" in line]
    found = {line.split("  ")[0].strip(): [int(n) for n in line.split()[-3:]] for line in rows}
    assert found == {
        "GRPO, its defaults, 1 pass": [length + 1, 0, with_cache + scored],
        "GRPO, its defaults, 4 passes": [length + 4, 0, with_cache + scored],
        "Online DPO, its defaults, 1 pass": [length + 1, 1, without + 2 * scored],
        "Online DPO, its defaults, 4 passes": [4 * (length + 1), 4, without + 2 * scored],
        "Online DPO, no checkpointing, 1 pass": [length + 1, 1, with_cache + 2 * scored],
        "Online DPO, no checkpointing, 4 passes": [4 * (length + 1), 4, with_cache + 2 * scored],
    }


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_saved_config_has_the_cache_off(make, tmp_path, checkpointing):
    make(gradient_checkpointing=checkpointing).save_model(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is False
    assert transformers.GenerationConfig.from_pretrained(tmp_path).use_cache is True
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    seen = calls_of(model)
    model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert [call.shape[1] for call in seen] == [4, 1, 1]


def test_a_static_cache_needs_a_cache(make):
    for settings, expected in (({}, True), ({"gradient_checkpointing": True}, False)):
        trainer, kinds = make(cache_implementation="static", **settings), set()
        trainer.model.model.register_forward_pre_hook(
            lambda _, args, kwargs, kinds=kinds: kinds.add(type(kwargs.get("past_key_values")).__name__),
            with_kwargs=True,
        )
        trainer.train()
        assert ("StaticCache" in kinds) == expected


def test_only_the_tokenizers_end_token_ends_an_answer(make, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.generation_config.eos_token_id = [END, 7]
    trainer = make(model=model, max_new_tokens=40)
    *_, ids, mask = prompts_for(trainer, [row["prompt"] for row in ROWS])
    places = [(row.tolist().index(7), int(m.sum())) for row, m in zip(ids, mask, strict=True) if 7 in row.tolist()]
    assert any(length > place + 1 for place, length in places)
    assert trainer.generation_config.eos_token_id == END


def test_min_p_of_the_model_acts_where_the_config_has_none(make, checkpoint):
    for settings, twice in (({}, True), ({"min_p": 0.0}, False)):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        model.generation_config.min_p = 1.0  # the likeliest token, always
        *_, ids, _ = prompts_for(make(model=model, **settings), [row["prompt"] for row in ROWS[:4]])
        assert torch.equal(ids[:4], ids[4:]) == twice


# -------------------------------------------------------------------------------------- where an answer ends, truncation


def test_the_end_token_counts_and_what_follows_does_not():
    ids = torch.tensor([[7, END, 8, END], [7, 8, 9, 7], [END, 7, 7, 7]])
    cut, mask = utils.truncate_right(ids, END, 0)
    assert cut.tolist() == [[7, END, 0, 0], [7, 8, 9, 7], [END, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_a_pad_token_equal_to_eos_does_no_harm(make):
    reader = tokenizer(pad=None)
    trainer = make(processing_class=reader, max_new_tokens=40)
    assert reader.pad_token == reader.eos_token
    *_, ids, mask = prompts_for(trainer, [row["prompt"] for row in ROWS])
    assert (mask.sum(1) < ids.shape[1]).any()
    for row, bits in zip(ids.tolist(), mask.tolist(), strict=True):
        length = row.index(END) + 1 if END in row else len(row)
        assert bits == [1] * length + [0] * (len(row) - length)


PROMPT, ANSWER = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10, 11, 12, 13, 14]])


def forward(trainer, model, prompt=PROMPT, answer=ANSWER, prompt_mask=None):
    model.eval()
    masks = (torch.ones_like(prompt) if prompt_mask is None else prompt_mask), torch.ones_like(answer)
    with torch.no_grad():
        return trainer._forward(model, prompt, masks[0], answer, masks[1])


def test_a_long_prompt_is_sampled_from_in_full_and_scored_without_its_beginning(make):
    trainer = make(max_length=13)
    seen = calls_of(trainer.model)
    trainer.train()
    assert seen[0].shape[1] in (7, 8)  # with the headers of both turns and the end of the user's
    assert seen[-1].shape[1] == 13 < seen[0].shape[1] + 8
    trainer.max_length = 9
    assert torch.allclose(forward(trainer, trainer.model), forward(trainer, trainer.model, PROMPT[:, 1:]))


def test_without_a_prompt_each_token_is_scored_by_the_prediction_of_the_next(make):
    with pytest.warns(UserWarning, match="completely removed"):
        trainer = make(max_length=6, max_new_tokens=6)
    model = trainer.model
    found = forward(trainer, model)
    with torch.no_grad():
        logps = model(ANSWER).logits.log_softmax(-1)
    assert torch.allclose(found, logps.gather(-1, ANSWER[..., None])[..., 0])
    trainer.max_length = 64
    whole = forward(trainer, model)
    assert not torch.allclose(found, whole, atol=1e-2)
    trainer.max_length = 3  # shorter than the answer, which is not cut
    assert forward(trainer, model).shape == ANSWER.shape


def test_padding_on_the_left_shifts_the_positions_of_gpt_2_and_not_of_qwen3(make, checkpoint):
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], 1)
    mask = (padded != 0).long()
    for model, shifted in ((gpt2(), True), (AutoModelForCausalLM.from_pretrained(checkpoint), False)):
        trainer = make(model=model)
        alone, behind = forward(trainer, model), forward(trainer, model, padded, prompt_mask=mask)
        assert torch.allclose(alone, behind, atol=1e-4) != shifted
        returns = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "pad_token_id": 0}
        sampled = model.generate(padded, attention_mask=mask, max_new_tokens=1, **returns).logits[0].log_softmax(-1)
        assert float(sampled[0, ANSWER[0, 0]]) == pytest.approx(float(alone[0, 0]), abs=1e-4)  # not shifted


def test_the_temperature_is_not_in_the_log_probabilities(make, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    cold, hot = make(model=model, temperature=0.5), make(model=model, temperature=2.0)
    assert (cold.generation_config.temperature, hot.generation_config.temperature) == (0.5, 2.0)
    with torch.no_grad():
        logits = model(torch.cat([PROMPT, ANSWER], 1)).logits[:, PROMPT.shape[1] - 1 : -1]
    plain = logits.log_softmax(-1).gather(-1, ANSWER[..., None])[..., 0]
    for trainer in (cold, hot):
        assert torch.allclose(forward(trainer, model), plain, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the step, the run


def two_answers_each(model, prompts, images):
    """Stands in for sampling: answers that depend on the prompt alone."""
    places = [QUESTIONS.index(prompt[0]["content"]) for prompt in prompts]
    ids = torch.tensor([[10 + place, 4 + 3 * place, END] for place in [*places, *(place + 9 for place in places)]])
    return (
        torch.full((len(ids), 3), 5),
        torch.ones(len(ids), 3, dtype=torch.long),
        ids % VOCABULARY,
        torch.ones_like(ids),
    )


def test_gradients_of_accumulated_batches_are_summed(make):
    def norm(passes, mend=False):
        trainer = make(per_device_train_batch_size=8 // passes, gradient_accumulation_steps=passes)
        trainer._generate = two_answers_each
        if mend:
            trainer.accelerator.gradient_accumulation_steps = passes
        line = trained(trainer)[0]
        assert line["loss"] == 0.6931  # the logged loss is divided
        return line["grad_norm"]

    at_once = norm(1)
    assert norm(4) == pytest.approx(4 * at_once, rel=1e-3)
    assert norm(4, mend=True) == pytest.approx(at_once, rel=1e-3)


def test_a_list_for_beta_ends_the_run_at_the_second_step(make):
    trainer = make(beta=[0.1, 0.2], max_steps=2)
    with pytest.raises(TypeError, match="list indices must be integers"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert make(beta=[0.3]).args.beta == 0.3


def test_a_callback_can_change_beta(make):
    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer._beta = 0.5

    trainer = make(max_steps=2, callbacks=[Change()])
    assert [line["beta"] for line in trained(trainer)] == [0.1, 0.5]


def test_evaluation_does_not_work(make):
    for settings, run in (({}, "evaluate"), ({"eval_strategy": "steps", "eval_steps": 1}, "train")):
        trainer = make(eval_dataset=Dataset.from_list(ROWS), **settings)
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            getattr(trainer, run)()


def test_a_stream_needs_one_more_setting(make):
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(TypeError, match=r"Can only (find the batch size of|concatenate) tensors"):
        make(stream).train()
    assert trained(make(stream, accelerator_config={"dispatch_batches": False}))


def test_columns_with_certain_names_become_tensors_and_come_once(make):
    rows = [{**row, "my_labels": [1, 2]} for row in ROWS]
    seen = []
    make(rows, reward_funcs=lambda my_labels, **o: seen.append(my_labels) or [0.0] * len(o["prompts"])).train()
    assert isinstance(seen[0], torch.Tensor)
    assert len(seen[0]) == 4


def test_a_misspelt_loss_type_is_found_at_the_first_step(make):
    with pytest.raises(NotImplementedError, match="invalid loss type"):
        make(loss_type="hinge").train()
    with pytest.raises(SystemExit):
        TrlParser(OnlineDPOConfig).parse_args_and_config(["--output_dir", "x", "--loss_type", "hinge"])


def test_missing_arguments(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    given = {"model": model, "train_dataset": Dataset.from_list(ROWS), "processing_class": tokenizer()}
    with pytest.raises(ValueError, match="`reward_funcs` must be provided"):
        OnlineDPOTrainer(**given)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'model_init_kwargs'"):
        OnlineDPOTrainer(**given, reward_funcs=first_token)
    with pytest.raises(ValueError, match="cannot be the same object"):
        OnlineDPOTrainer(**given, ref_model=model, reward_funcs=first_token)


def test_a_new_adapter_needs_no_second_model(make):
    trainer = make(peft_config=LoraConfig(task_type="CAUSAL_LM"))
    assert trainer.ref_model is None
    line = trained(trainer)[0]
    assert line["loss"] == 0.6931
    assert line["rewards/chosen"] == 0


def test_a_model_with_an_adapter_is_copied_whole(make, checkpoint):
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), lora)
    trainer = make(model=model)
    ours, theirs = (sum(weight.numel() for weight in m.parameters()) for m in (trainer.model, trainer.ref_model))
    assert ours == theirs
    assert trained(trainer)[0]["rewards/chosen"] == 0  # its adapter is in the reference too


def test_the_copy_is_frozen_and_in_evaluation_mode(make, checkpoint):
    trainer = make(model=AutoModelForCausalLM.from_pretrained(checkpoint).train())
    assert trainer.model.training
    assert not trainer.ref_model.training
    assert not any(weight.requires_grad for weight in trainer.ref_model.parameters())


# ------------------------------------------------------------------------------------------------------- vLLM, replaced


@pytest.fixture
def engine(make, monkeypatch):
    """A trainer that believes it has vLLM, and the list of what was asked of it."""
    trainer, asked = make(), []
    answers = {"ids": [[9, END]] * 4}
    outputs = [SimpleNamespace(token_ids=[9, END])] * 2
    llm = SimpleNamespace(
        wake_up=lambda tags: asked.append(f"wake {tags[0]}"),
        sleep=lambda level: asked.append(f"sleep {level}"),
        generate=lambda texts, *_, **__: (
            asked.append("generate") or [SimpleNamespace(outputs=outputs, prompt_token_ids=[5]) for _ in texts]
        ),
    )
    client = SimpleNamespace(generate=lambda **_: {"completion_ids": answers["ids"]})
    values = {
        "generation_config": SimpleNamespace(max_tokens=6),
        "llm": llm,
        "vllm_client": client,
        "_last_loaded_step": -1,
    }
    for name, value in values.items():
        monkeypatch.setattr(trainer, name, value, raising=False)
    monkeypatch.setattr(trainer, "_move_model_to_vllm", lambda: asked.append("weights"))
    return trainer, answers, asked


def test_in_server_mode_padding_becomes_part_of_the_prompt(engine):
    trainer, *_ = engine
    trainer.vllm_mode = "server"
    ids, mask, *_ = trainer._generate_vllm(["1+2", "1"])
    assert (ids == 0).any()
    assert (mask == 1).all()


def test_answers_of_the_server_are_brought_into_two_blocks(engine):
    trainer, answers, _ = engine
    trainer.vllm_mode = "server"
    answers["ids"] = [[10, END], [11, END], [20, END], [21, END]]  # prompt by prompt
    assert trainer._generate_vllm(["1+2", "1+3"])[2][:, 0].tolist() == [10, 20, 11, 21]


def test_an_appended_end_token_is_not_trained_on_and_counts_as_an_end(engine):
    trainer, answers, _ = engine
    trainer.vllm_mode = "server"
    answers["ids"] = [[9, 10], [9, END], [9, 9, 9, 9, 9, 9], [9, END]]  # stopped at a stop word, ended, cut, ended
    *_, ids, mask = trainer._generate_vllm(["1+2", "1+3"])
    assert ids.tolist()[0] == [9, 10, END, 0, 0, 0]
    assert mask.tolist()[0] == [1, 1, 0, 0, 0, 0]
    assert mask.tolist()[1] == [1] * 6
    assert ids.shape[1] == 6  # the longest that may be, not the longest that is


def test_an_empty_answer_from_vllm_stops_the_run(engine):
    trainer, answers, _ = engine
    trainer.vllm_mode = "server"
    answers["ids"] = [[], [9, END], [9, END], [9, END]]
    with pytest.raises(IndexError):
        trainer._generate_vllm(["1+2", "1+3"])


def test_the_second_batch_of_a_step_wakes_vllm_without_weights(engine, monkeypatch):
    trainer, _, asked = engine
    trainer.vllm_mode = "colocate"
    monkeypatch.setattr(trainer.args, "vllm_enable_sleep_mode", True)
    for _ in range(2):
        trainer._generate_vllm(["1+2", "1+3"])
    round_ = ["wake kv_cache", "generate", "sleep 2"]
    assert asked == ["wake weights", "weights", *round_, "wake weights", *round_]


def test_colocated_prompts_are_padded_with_a_mask_of_0(engine):
    trainer, *_ = engine
    trainer.vllm_mode = "colocate"
    trainer._generate_vllm_colocate = lambda prompts, images: ([[9, END]] * 2, [[5, 6], [5]])
    ids, mask, *_ = trainer._generate_vllm(["a", "b"])
    assert ids.tolist() == [[5, 6], [0, 5]]
    assert mask.tolist() == [[1, 1], [0, 1]]


# ------------------------------------------------------------------------------------------------------- the neighbours


@pytest.fixture
def answers():
    dice = torch.Generator().manual_seed(3)
    logps, ref_logps = -torch.rand(6, 5, generator=dice), -torch.rand(6, 5, generator=dice)
    mask = (torch.arange(5) < torch.tensor([3, 5, 2, 4, 5, 1])[:, None]).float()
    return logps.requires_grad_(), ref_logps, mask, torch.randn(6, generator=dice)


def test_xpo_on_the_page_is_what_trl_computes(page, answers):
    logps, ref_logps, mask, rewards = answers
    this = SimpleNamespace(alpha=0.02, beta=0.3, args=SimpleNamespace(loss_type="sigmoid"))
    (own, ref_answer), (ref_own, ref_ref) = ((v * mask).chunk(2) for v in (logps, ref_logps))
    won = rewards[:3] >= rewards[3:]
    theirs, *_ = XPOTrainer._compute_losses(this, own, ref_answer, ref_ref, ref_own, won)
    ours = page["xpo_loss"](logps, ref_logps, mask, rewards, alpha=0.02, beta=0.3)
    agree(ours, theirs)
    agree(torch.autograd.grad(ours, logps)[0], torch.autograd.grad(theirs, logps)[0])


def test_nash_md_on_the_page_is_what_trl_computes(page, answers):
    logps, ref_logps, mask, rewards = answers
    own, ref = (logps * mask)[:3], (ref_logps * mask)[:3]
    theirs, *_ = NashMDTrainer._compute_losses(
        SimpleNamespace(beta=0.3), own, ref, torch.sigmoid(rewards[:3] - rewards[3:])
    )
    ours = page["nash_md_loss"](logps, ref_logps, mask, rewards, beta=0.3)
    agree(ours, theirs)
    agree(torch.autograd.grad(ours, logps)[0], torch.autograd.grad(theirs, logps)[0])


def test_grpo_on_the_page_is_the_one_of_the_page_about_grpo(page, answers):
    logps, _, mask, rewards = answers
    blocks, theirs = [fence.text for fence in fences(PAGE.with_name("grpo.md")) if fence.lang == "python"], {}
    for name in ("group_advantage", "grpo_loss"):
        exec(next(block for block in blocks if f"def {name}(" in block), theirs)
    groups = torch.stack(rewards.chunk(2), dim=1).flatten()  # pair by pair, as GRPO has them
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    loss = theirs["grpo_loss"](logps[order], logps[order].detach(), theirs["group_advantage"](groups, 2), mask[order])
    ours = page["grpo_loss_of_two"](logps, mask, rewards)
    agree(torch.autograd.grad(ours, logps)[0], torch.autograd.grad(loss, logps)[0])


def test_dpo_on_the_page_is_the_one_of_the_page_about_dpo(page, answers):
    logps, ref_logps, mask, rewards = answers
    theirs = functions_of(PAGES / "dpo.md", "dpo_loss")
    chosen, rejected = page["reward_to_pair"](rewards)
    sums, refs = (logps * mask).sum(1), (ref_logps * mask).sum(1)
    loss = theirs["dpo_loss"](sums[chosen], sums[rejected], refs[chosen], refs[rejected], beta=0.3)
    agree(page["online_dpo_loss"](logps, ref_logps, mask, rewards, beta=0.3), loss)


def test_nash_md_and_xpo_inherit_all_but_the_training_step():
    for child in (NashMDTrainer, XPOTrainer):
        assert issubclass(child, OnlineDPOTrainer)
        assert "training_step" in vars(child)
        assert not {"_maybe_log_save_evaluate", "_save_checkpoint", "beta", "_enable_gradient_checkpointing"} & set(
            vars(child)
        )
        assert "self.tokenize_row" in inspect.getsource(child.training_step)
    assert "self.tokenize_row" not in inspect.getsource(OnlineDPOTrainer)


# ------------------------------------------------------------------------------------------------------- the page itself


def test_what_this_page_leaves_to_the_page_about_dpo_is_the_same_code():
    assert inspect.getsource(OnlineDPOTrainer._save_checkpoint) == inspect.getsource(DPOTrainer._save_checkpoint)


def test_the_toy_run_has_the_settings_that_the_page_names():
    assert '"beta": 1.0' in (EXAMPLES / "online_dpo.py").read_text("utf-8")


def test_every_test_that_the_page_names_exists():
    named = named_tests(PAGE)
    assert named
    assert named <= set(globals())


def test_the_arguments_that_the_page_calls_gone_are_gone():
    text = section("Older code and tutorials")
    here = arguments_of(OnlineDPOTrainer, OnlineDPOConfig)
    for name in ("reward_model", "judge", "reward_processing_class", "dataset_num_proc"):
        assert re.search(rf"`{name}=?`", text)
        assert name not in here
    assert "reward_funcs" in here


def test_the_switch_for_paged_sampling_is_one_of_grpo_only():
    assert "use_transformers_continuous_batching" in GRPOConfig.__dataclass_fields__
    assert not [name for name in OnlineDPOConfig.__dataclass_fields__ if "paged" in name or "batching" in name]


def test_the_defaults_that_the_page_quotes_are_those_of_the_config(tmp_path):
    quoted, true = defaults_on(PAGE, OnlineDPOConfig(output_dir=str(tmp_path), use_cpu=True))
    assert len(quoted) >= 7
    assert quoted == true
    assert XPOConfig(output_dir=str(tmp_path), use_cpu=True).alpha == 1e-5
