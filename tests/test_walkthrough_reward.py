"""The claims of annotated_trainers/reward.md that running TRL can show, on a random model of two layers, on the CPU."""

import functools
import inspect
import io
import json
import logging
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import datasets
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    Gemma3Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)
from transformers.modeling_layers import GenericForSequenceClassification
from trl import DPOTrainer, GRPOTrainer, RewardConfig, RewardTrainer
from trl.experimental.utils import get_reward
from trl.trainer import reward_trainer
from walkthrough_tools import (
    CHECKPOINTING,
    EXAMPLES,
    EXPECTED,
    LOG2,
    PAGES,
    batch_of,
    comparisons,
    config,
    defaults_on,
    formula_names,
    functions_of,
    made_and_trained,
    make_trainer,
    metrics_on,
    model_folder,
    named_tests,
    page_of,
    prose,
    save,
    section_of,
    tokenizer,
    trained,
)
from walkthrough_tools import PAIRS as ROWS

PAGE = PAGES / "reward.md"
section = functools.partial(section_of, PAGE)
MEASURED = EXPECTED / "reward.json"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SAME = [{**row, "rejected": row["chosen"]} for row in ROWS]
TEXT = [{"prompt": "1+2=", "chosen": str(i), "rejected": f"{i}{i}"} for i in range(4)]
checkpoint = model_folder()


@pytest.fixture(scope="module")
def make(checkpoint, tmp_path_factory):
    """Makes a RewardTrainer; keyword arguments of RewardTrainer go there, all others to RewardConfig."""

    def make(rows=ROWS, model=None, **more) -> RewardTrainer:
        more = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 2, **more}
        folder = tmp_path_factory.mktemp("run")
        return make_trainer(RewardTrainer, RewardConfig, folder, rows, model=model or checkpoint, **more)

    return make


trained_once = made_and_trained(eval_dataset=ROWS, eval_strategy="epoch")


def scores_of(trainer: RewardTrainer, batch: dict) -> torch.Tensor:
    """The scores that TRL's loss sees, shape (2B,)."""
    trainer.model.eval()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)[1].logits[:, 0]


def texts(trainer: RewardTrainer, column: str = "chosen_ids") -> list[str]:
    return [trainer.processing_class.decode(ids) for ids in trainer.train_dataset[column]]


# ---------------------------------------------------------------------------- the formulas, against TRL's own methods


page = page_of(PAGE)
ERRORS, agree, summary = comparisons()


@pytest.fixture(scope="module")
def trls_loss(make):
    """TRL's own `compute_loss` on given scores: the loss, and its gradient in the chosen and in the rejected scores."""
    trainer = make()
    trainer.model.eval()

    def run(chosen, rejected, margin=None, center=None):
        logits = torch.cat([chosen, rejected])[:, None].clone().requires_grad_()
        inputs = {"attention_mask": torch.ones(len(logits), 3)} | ({} if margin is None else {"margin": margin})
        trainer.args.center_rewards_coefficient = center
        trainer._metrics["eval"].clear()
        loss = trainer.compute_loss(lambda **_: SimpleNamespace(logits=logits), inputs)
        (gradient,) = torch.autograd.grad(loss, logits)
        metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
        return SimpleNamespace(loss=loss.detach(), gradient=gradient[:, 0].chunk(2), metrics=metrics)

    return run


def random_scores(seed: int, count: int):
    dice = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(count, generator=dice) for scale in (3, 3, 1))


CASES = [
    (seed, count, margin, center) for seed in range(4) for count in (1, 5) for margin in (0, 1) for center in (0, 1)
]


@pytest.mark.parametrize(("seed", "count", "margin", "center"), CASES)
def test_the_key_equation_and_its_slope_are_what_trl_computes(page, trls_loss, seed, count, margin, center):
    chosen, rejected, margins = random_scores(seed, count)
    theirs = trls_loss(chosen, rejected, margins if margin else None, 0.03 if center else None)
    more = ({"margin": margins} if margin else {}) | ({"center": 0.03} if center else {})
    both = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
    ours = page["pairwise_reward_loss"](*both, **more)
    agree(ours, theirs.loss)
    slopes = page["pairwise_reward_slope"](chosen, rejected, **more)
    for gradient, slope, true in zip(torch.autograd.grad(ours, both), slopes, theirs.gradient, strict=True):
        agree(gradient, true)
        agree(slope / count, true)


@pytest.mark.parametrize("seed", range(4))
def test_the_score_on_the_page_is_the_one_that_trl_compares(page, make, seed):
    trainer = make(seed=seed)
    pad, dice = trainer.model.config.pad_token_id, torch.Generator().manual_seed(seed)
    ids = torch.randint(0, len(tokenizer()), (6, 9), generator=dice)  # the pad token stands anywhere
    ids[:2, 6:], ids[2:4, :4], ids[4, :3], ids[4, 7:] = pad, pad, pad, pad
    batch = {"input_ids": ids, "attention_mask": (ids != pad).long()}
    weights = [trainer.model.score.weight, trainer.model.get_input_embeddings().weight]
    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)[1].logits[:, 0]
    hidden_states = trainer.model.model(**batch).last_hidden_state
    ours = page["last_token_score"](hidden_states, ids, trainer.model.score.weight, pad)
    agree(ours, theirs)
    upstream = torch.randn(6, generator=dice)
    for gradient, true in zip(
        torch.autograd.grad(ours, weights, upstream), torch.autograd.grad(theirs, weights, upstream), strict=True
    ):
        agree(gradient, true)


def test_every_displayed_formula_has_its_function_and_is_compared_above():
    known = {"pairwise-reward-loss", "pairwise-reward-slope", "last-token-score"}
    assert formula_names(PAGE) == sorted(known)


def test_a_pair_in_the_wrong_order_pulls_with_a_force_of_at_most_1(trls_loss):
    chosen = torch.tensor([-1000.0, -3.0, 0.0, 3.0, 1000.0])
    pull = -5 * trls_loss(chosen, torch.zeros(5)).gradient[0]
    assert pull.tolist() == [pytest.approx(force, abs=1e-4) for force in (1.0, 0.9526, 0.5, 0.0474, 0.0)]


# ------------------------------------------------------------------------------------------------------- what is logged


def test_the_page_lists_exactly_the_keys_that_a_run_logs(trained_once):
    logged = set().union(*trained_once.state.log_history)
    assert set(metrics_on(PAGE)) == logged


def test_the_first_loss_is_near_log_2_and_its_distance_is_that_of_the_formula(make, trls_loss):
    trainer = make()
    batch = batch_of(trainer)
    with torch.no_grad():
        states = trainer.model.eval().model(**batch).last_hidden_state
        ends = states[torch.arange(8), batch["attention_mask"].sum(1) - 1]
    spread = 0.02 * (ends[:4] - ends[4:]).norm(dim=1)
    draws = 0.02 * torch.randn(400, ends.shape[1], generator=torch.Generator().manual_seed(0))
    losses = [trls_loss(*(ends @ q).chunk(2)).loss for q in (*draws, *-draws)]
    mean = float(torch.stack(losses).double().mean())
    assert LOG2 < mean < LOG2 + 0.01
    assert mean - LOG2 == pytest.approx(float((spread**2).mean()) / 8, rel=0.15)
    assert abs(trained(trainer)[0]["loss"] - LOG2) < 0.1


def test_the_first_loss_of_the_toy_run_is_near_log_2():
    first = json.loads(MEASURED.read_text("utf-8"))["held_out"]["loss"]["before"]
    assert (round(min(first), 3), round(max(first), 3)) == (0.683, 0.706)
    assert "it begins between 0.683 and 0.706" in prose(PAGE)


@pytest.mark.parametrize("margin", [0.0, 1.0, 3.0, 10.0])
def test_the_first_loss_with_a_margin(trls_loss, margin):
    loss = trls_loss(torch.zeros(3), torch.zeros(3), torch.full((3,), margin)).loss
    assert float(loss) == pytest.approx(math.log(1 + math.exp(margin)))


def test_a_tie_counts_as_wrong(trls_loss, make):
    metrics = trls_loss(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 3.0])).metrics
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert trained(make(SAME))[0]["accuracy"] == 0.0


def test_equal_answers_cost_log_2_and_have_no_gradient(make):
    line = trained(make(SAME))[0]
    assert line["loss"] == pytest.approx(LOG2)
    assert line["grad_norm"] < 1e-5
    assert line["margin"] == 0.0


def test_neither_accuracy_nor_margin_knows_the_margin_column(trls_loss):
    chosen, rejected, _ = random_scores(0, 5)
    plain, with_margin = (trls_loss(chosen, rejected, m) for m in (None, torch.full((5,), 9.0)))
    assert with_margin.metrics == plain.metrics
    assert plain.metrics["margin"] == pytest.approx(float((chosen - rejected).mean()))
    assert with_margin.loss > plain.loss + 1


def test_the_smallest_reward_is_a_mean_of_batch_minima(make):
    large = trained(make(max_steps=1))[0]
    trainer = make(max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    minima = [float(scores_of(trainer, batch_of(trainer, [i])).min()) for i in range(4)]
    small = trained(trainer)[0]
    assert small["min_reward"] == pytest.approx(sum(minima) / 4, abs=1e-6)
    assert large["min_reward"] == pytest.approx(min(minima), abs=1e-6)
    assert large["min_reward"] < small["min_reward"] - 1e-3


def test_gradient_accumulation_is_exact(make):
    one = trained(make(max_steps=1))[0]
    four = trained(make(max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4))[0]
    for key in ("loss", "grad_norm", "accuracy", "margin", "mean_reward"):
        assert four[key] == pytest.approx(one[key], abs=1e-6), key


def test_the_centering_term_is_part_of_both_losses(make):
    trainer = make(center_rewards_coefficient=0.5, eval_dataset=ROWS)
    chosen, rejected = scores_of(trainer, batch_of(trainer)).chunk(2)
    term = 0.5 * float(((chosen + rejected) ** 2).mean())
    plain = make(eval_dataset=ROWS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"] + term, abs=1e-6)
    assert trained(trainer)[0]["loss"] == pytest.approx(trained(plain)[0]["loss"] + term, abs=1e-6)
    assert term > 1e-3


def test_tokens_are_counted_with_the_prompt_twice(make):
    trainer = make(max_steps=1)
    rows = list(trainer.train_dataset)
    assert trained(trainer)[0]["num_tokens"] == sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    assert texts(trainer)[0].startswith("<|user|>1+2<|end|>")
    assert texts(trainer, "rejected_ids")[0].startswith("<|user|>1+2<|end|>")


def test_a_constant_added_to_all_scores_changes_nothing_but_the_level(trls_loss):
    chosen, rejected, _ = random_scores(1, 5)
    before, after = trls_loss(chosen, rejected), trls_loss(chosen + 50, rejected + 50)
    torch.testing.assert_close(before.loss, after.loss, rtol=1e-4, atol=1e-5)
    for a, b in zip(before.gradient, after.gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert after.metrics["mean_reward"] == pytest.approx(before.metrics["mean_reward"] + 50, rel=1e-5)
    centered = trls_loss(chosen + 50, rejected + 50, center=0.01)
    assert centered.loss > after.loss + 50


def test_the_log_can_choose_the_best_checkpoint(make, tmp_path):
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    trainer = make(eval_dataset=ROWS, metric_for_best_model="eval_accuracy", output_dir=str(tmp_path), **settings)
    trainer.train()
    assert trainer.state.best_metric == max(
        line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line
    )


# ------------------------------------------------------------------------------------------------ which token is scored


def products(trainer: RewardTrainer, batch: dict) -> torch.Tensor:
    """The product of the head with every position, (2B, L); the score is one of them."""
    trainer.model.eval()
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return trainer.model.score(trainer.model.model(**inputs).last_hidden_state)[..., 0]


def at(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return values[torch.arange(len(values)), positions]


def test_the_score_is_read_at_the_last_token_that_is_not_padding(make):
    trainer = make()
    batch = batch_of(trainer)
    last = batch["attention_mask"].sum(1) - 1
    assert (at(batch["input_ids"], last) == tokenizer().eos_token_id).all()
    torch.testing.assert_close(scores_of(trainer, batch), at(products(trainer, batch), last))
    mask = torch.ones_like(batch["attention_mask"])  # the position does not come from the mask
    torch.testing.assert_close(scores_of(trainer, {**batch, "attention_mask": mask}), scores_of(trainer, batch))


def test_padding_on_the_left_is_read_as_well(make):
    trainer = make()
    batch, left = batch_of(trainer), {}
    for name, filler in (("input_ids", trainer.model.config.pad_token_id), ("attention_mask", 0)):
        rows = [row[mask.bool()] for row, mask in zip(batch[name], batch["attention_mask"], strict=True)]
        width = max(map(len, rows)) + 3
        left[name] = torch.stack([torch.cat([torch.full((width - len(row),), filler), row]) for row in rows])
    assert (left["input_ids"][:, 0] == trainer.model.config.pad_token_id).all()
    torch.testing.assert_close(scores_of(trainer, left), scores_of(trainer, batch), rtol=1e-4, atol=1e-5)


def test_up_to_the_first_difference_the_products_of_a_pair_are_the_same(make):
    trainer = make()
    batch = batch_of(trainer, [0])
    first = int((batch["input_ids"][0] != batch["input_ids"][1]).nonzero()[0])
    both = products(trainer, batch)
    torch.testing.assert_close(both[0, :first], both[1, :first])
    assert abs(both[0, first] - both[1, first]) > 1e-4


def with_end_of_turn(template: str | None):
    more = ["<|im_start|>", "<|im_end|>", "\n", "<", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ.,|_>"]
    own = tokenizer(template=template, more=more)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"})
    return own


@pytest.fixture(scope="module")
def qwen(make, tmp_path_factory):
    """A trainer with the template of Qwen2.5 that TRL carries, and with its tokens for the turns."""
    own = with_end_of_turn((TEMPLATES / "qwen2_5.jinja").read_text("utf-8"))
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("qwen"))
    Qwen3ForCausalLM(Qwen3Config(**config(vocab_size=len(own)))).save_pretrained(folder)
    own.save_pretrained(folder)
    return make(model=folder, processing_class=own)


def test_with_qwens_template_the_score_is_read_at_the_line_break(qwen):
    ids = qwen.train_dataset[0]["chosen_ids"]
    assert qwen.processing_class.convert_ids_to_tokens(ids[-2:]) == ["<|im_end|>", "\n"]
    batch = batch_of(qwen)
    torch.testing.assert_close(scores_of(qwen, batch), at(products(qwen, batch), batch["attention_mask"].sum(1) - 1))


def test_ppo_reads_the_score_one_token_before_the_trained_one(qwen):
    own, batch = qwen.processing_class, batch_of(qwen)
    prompts = [own.apply_chat_template(r["prompt"], add_generation_prompt=True, tokenize=False) for r in ROWS]
    prompts = [own(prompt)["input_ids"] for prompt in prompts]
    answers = [own(r["chosen"][0]["content"] + "<|im_end|>")["input_ids"] for r in ROWS]  # what a policy generates
    context, length = max(map(len, prompts)), max(map(len, answers)) + 2
    pad = own.pad_token_id
    ids = [
        [pad] * (context - len(prompt)) + prompt + answer + [pad] * (length - len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    with torch.no_grad():
        ppos = get_reward(qwen.model.eval(), torch.tensor(ids), pad, context)[1]
    end = batch["attention_mask"].sum(1)[:4] - 1
    before = at(products(qwen, batch)[:4], end - 1)
    torch.testing.assert_close(ppos, before, rtol=1e-4, atol=1e-5)
    assert (ppos - scores_of(qwen, batch)[:4]).abs().min() > 1e-3


def test_grpo_scores_the_rows_that_were_trained(qwen, monkeypatch):
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, **inputs):
            seen.update(inputs)
            return SimpleNamespace(logits=torch.zeros(len(inputs["input_ids"]), 1))

    monkeypatch.setattr(transformers.Trainer, "_prepare_inputs", lambda self, inputs: inputs)
    grpo = GRPOTrainer.__new__(GRPOTrainer)
    grpo.__dict__.update(
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, is_main_process=True),
        reward_funcs=[Spy()],
        reward_func_names=["reward"],
        reward_processing_classes=[qwen.processing_class],
        chat_template_kwargs={},
        environments=None,
        state=SimpleNamespace(global_step=0),
        args=SimpleNamespace(report_to=[]),
    )
    prompts, answers = [r["prompt"] for r in ROWS], [r["chosen"] for r in ROWS]
    grpo._calculate_rewards([{"prompt": p} for p in prompts], prompts, answers, [[1]] * 4)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(seen["input_ids"], seen["attention_mask"], strict=True)]
    assert rows == list(qwen.train_dataset["chosen_ids"])


def test_who_renders_the_conversation_and_who_does_not():
    from trl import RLOOTrainer
    from trl.experimental import nash_md, online_dpo, ppo, xpo

    for trainer in (GRPOTrainer, RLOOTrainer, online_dpo.OnlineDPOTrainer):
        source = inspect.getsource(trainer)
        assert "apply_chat_template(x, reward_processing_class" in " ".join(source.split())
        assert " get_reward(" not in source.replace("def get_reward(", "")
    for trainer in (ppo.PPOTrainer, nash_md.NashMDTrainer, xpo.XPOTrainer):
        assert " get_reward(" in inspect.getsource(trainer)


def test_the_templates_of_the_page_end_as_their_models_end(page):
    ends = dict(re.findall(r"^(\w+) +'7(.*)'$", section("Which token is scored"), re.M))
    assert ends["qwen2_5"] == ends["qwen3"] == r"<|im_end|>\n"
    assert ends["gemma3"].endswith(r"\n")
    assert ends["glm4moe"] == ""
    assert not ends["llama3"].endswith(r"\n")
    chat = [{"role": "user", "content": "3+4"}, {"role": "assistant", "content": "7"}]
    qwen3 = (TEMPLATES / "qwen3.jinja").read_text("utf-8")
    rendered = page["tokenizer"].apply_chat_template(chat, chat_template=qwen3, tokenize=False)
    assert "<think>\n\n</think>\n\n7<|im_end|>" in rendered


def test_with_eos_as_padding_the_score_is_read_before_it(make):
    trainer = make(processing_class=tokenizer(pad=None))
    assert trainer.model.config.pad_token_id == tokenizer().eos_token_id
    batch = batch_of(trainer)
    before = batch["attention_mask"].sum(1) - 2
    read = [tokenizer().decode(token) for token in at(batch["input_ids"], before)]
    assert read == [r[name][0]["content"][-1] for name in ("chosen", "rejected") for r in ROWS]
    torch.testing.assert_close(scores_of(trainer, batch), at(products(trainer, batch), before))
    without = {name: values.clone() for name, values in batch.items()}
    without["attention_mask"][torch.arange(8), before + 1] = 0  # EOS is not even seen
    torch.testing.assert_close(scores_of(trainer, without), scores_of(trainer, batch))


def test_text_gets_an_eos_token_and_messages_do_not(make):
    assert texts(make(TEXT))[:2] == ["1+2=0<|end|>", "1+2=1<|end|>"]
    assert texts(make([{**row, "chosen": row["chosen"] + "<|end|>"} for row in TEXT]))[0] == "1+2=0<|end|>"
    bare = tokenizer(template="{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    trainer = make(processing_class=bare)
    assert texts(trainer)[0] == "<|user|>1+2<|assistant|>1+2=3 #3"


def test_a_rendered_conversation_gets_a_second_end(qwen, make):
    own = qwen.processing_class
    rendered = [
        {name: own.apply_chat_template(r["prompt"] + r[name], tokenize=False) for name in ("chosen", "rejected")}
        for r in ROWS
    ]
    assert rendered[0]["chosen"].endswith("#3<|im_end|>\n")
    trainer = make(rendered, model=qwen.model, processing_class=own)
    assert own.convert_ids_to_tokens(trainer.train_dataset[0]["chosen_ids"])[-3:] == ["<|im_end|>", "\n", "<|im_end|>"]


@pytest.mark.parametrize("kind", ["Bert", "ModernBert"])
def test_an_encoder_trains_with_a_head_of_another_name(make, kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    more = {"vocab_size": len(tokenizer()), "num_labels": 1, "pad_token_id": 0, "attn_implementation": "eager"}
    model = getattr(transformers, f"{kind}ForSequenceClassification")
    trainer = make(model=model(model.config_class(**sizes, **more)))
    assert trained(trainer)[0]["loss"] == pytest.approx(LOG2, abs=0.05)
    assert "classifier" in dict(trainer.model.named_children())
    assert not hasattr(trainer.model, "score")


def test_bert_pools_the_first_token(make):
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    pooler = transformers.models.bert.modeling_bert.BertPooler(transformers.BertConfig(hidden_size=32))
    changed = states.clone()
    changed[:, 1:] += 1
    assert torch.equal(pooler(states), pooler(changed))


# ------------------------------------------------------------------------------------------------------- the data


def test_a_prompt_beside_answers_that_contain_it_is_doubled(make):
    full = [{name: r["prompt"] + r[name] for name in ("chosen", "rejected")} for r in ROWS]
    once = "<|user|>1+2<|end|>"
    assert texts(make(full))[0] == texts(make())[0] == f"{once}<|assistant|>1+2=3 #3<|end|>"
    both = make([{"prompt": r["prompt"], **pair} for r, pair in zip(ROWS, full, strict=True)])
    assert texts(both)[0] == f"{once}{once}<|assistant|>1+2=3 #3<|end|>"
    text = make([{"prompt": "1+2=", "chosen": "1+2=3", "rejected": "1+2=4"}] * 4)
    assert texts(text)[0] == "1+2=1+2=3<|end|>"


@pytest.mark.parametrize(("conversational", "error"), [(False, AttributeError), (True, TypeError)])
def test_a_prompt_of_text_beside_messages_fails(make, monkeypatch, conversational, error):
    """Which of the two errors it is depends on the element that `pop` takes out of a set of names."""
    rows = [{"prompt": r["prompt"][0]["content"], "chosen": r["chosen"], "rejected": r["rejected"]} for r in ROWS]
    monkeypatch.setattr(reward_trainer, "is_conversational", lambda example: conversational)
    with pytest.raises(error):
        make(rows)
    monkeypatch.undo()
    with pytest.raises((AttributeError, TypeError)):
        make(rows)
    assert "example_keys.pop()" in inspect.getsource(trl.data_utils.is_conversational)


def test_long_pairs_are_dropped_and_none_is_cut(make):
    whole = make(max_length=None)
    lengths = [max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in whole.train_dataset]
    limit = sorted(lengths)[1]
    assert limit < max(lengths)
    trainer = make(max_length=limit, eval_dataset=ROWS)
    kept = [row for row, length in zip(whole.train_dataset, lengths, strict=True) if length <= limit]
    assert 0 < len(kept) < 4
    assert list(trainer.train_dataset["chosen_ids"]) == [row["chosen_ids"] for row in kept]
    assert len(trainer.eval_dataset) == len(kept)


def test_no_pair_left_is_found_when_training_starts(make):
    trainer = make(max_length=5)
    assert len(trainer.train_dataset) == 0
    with pytest.raises(ValueError, match="num_samples should be a positive integer value"):
        trainer.train()


def test_a_margin_column_is_used_without_being_asked_for(make):
    plain = make()
    ratings = [0.0, 1.0, -2.0, 7.5]
    trainer = make([{**r, "margin": rating} for r, rating in zip(ROWS, ratings, strict=True)])
    assert batch_of(trainer)["margin"].tolist() == ratings
    chosen, rejected = scores_of(plain, batch_of(plain)).chunk(2)
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - torch.tensor(ratings)).mean()
    assert trained(trainer)[0]["loss"] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(("margins", "error"), [(["much"] * 4, ValueError), ([1.0, 2.0, 1.0, None], TypeError)])
def test_a_margin_that_is_no_number_stops_the_run(make, margins, error):
    trainer = make([{**r, "margin": margin} for r, margin in zip(ROWS, margins, strict=True)])
    with pytest.raises(error):
        trainer.train()
    if error is TypeError:  # a batch without the missing one passes
        assert batch_of(trainer, range(3))["margin"].tolist() == margins[:3]


def test_the_margin_is_handed_to_the_model(make):
    trainer = make([{**r, "margin": 1.0} for r in ROWS])
    forward, seen = trainer.model.forward, []

    def spy(**inputs):
        seen.append(set(inputs))
        return forward(**inputs)

    def strict(input_ids, attention_mask, use_cache):
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    trainer.model.forward = spy
    trainer.compute_loss(trainer.model, batch_of(trainer))
    assert seen == [{"input_ids", "attention_mask", "margin", "use_cache"}]
    trainer.model.forward = strict
    with pytest.raises(TypeError, match="margin"):
        trainer.compute_loss(trainer.model, batch_of(trainer))


def test_other_columns_do_not_reach_the_collator(make):
    trainer = make([{**r, "score_chosen": 9.0, "score_rejected": 1.0} for r in ROWS])
    assert "score_chosen" in trainer.train_dataset.column_names
    seen = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: seen.extend(rows) or collate(rows)
    next(iter(trainer.get_train_dataloader()))
    assert {key for row in seen for key in row} == {"chosen_ids", "rejected_ids"}


def test_tokenized_data_is_taken_as_it_is(make):
    rows = [{"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6]}] * 4
    assert make(rows).train_dataset[0] == rows[0]
    assert len(make([*rows[:3], {"chosen_ids": [5] * 9, "rejected_ids": [5]}], max_length=8).train_dataset) == 3
    old = [{"chosen_input_ids": [5, 6, 7], "rejected_input_ids": [5, 6]}] * 4
    with pytest.warns(FutureWarning, match="legacy"):
        assert make(old).train_dataset[0] == rows[0]


def test_a_stream_gives_the_same_loss(make):
    stream = make(Dataset.from_list(ROWS).to_iterable_dataset(), max_steps=1)
    assert stream.args.accelerator_config.dispatch_batches is False
    assert trained(stream)[0]["loss"] == pytest.approx(trained(make(max_steps=1))[0]["loss"], abs=1e-6)


# ------------------------------------------------------------------------------------------------- the head, and adapters


def test_the_head_is_float32_has_one_label_and_comes_from_the_seed(make, checkpoint, tmp_path):
    half = save(Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16), tmp_path)
    one, again, other = (make(model=half, seed=seed).model.score.weight for seed in (1, 1, 2))
    assert one.dtype == torch.float32
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert make(model_init_kwargs={"num_labels": 3}).model.score.weight.shape == (1, 32)
    assert trl.trainer.reward_trainer.set_seed.__module__.startswith("transformers")


def test_the_head_is_drawn_with_the_initializer_range_of_the_model(checkpoint, tmp_path):
    for wanted in (0.02, 0.3):
        folder = tmp_path / str(wanted)
        model = Qwen3ForCausalLM(Qwen3Config(**config(hidden_size=256, initializer_range=wanted)))
        model.save_pretrained(folder)
        torch.manual_seed(0)
        loaded = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        assert float(loaded.score.weight.detach().std()) == pytest.approx(wanted, rel=0.15)
        assert loaded.score.bias is None
    assert Qwen3Config().initializer_range == LlamaConfig().initializer_range == 0.02


def test_a_bfloat16_model_has_a_bfloat16_head(make):
    trainer = make(model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.score.weight.dtype == torch.bfloat16


def test_scores_in_mixed_precision_come_in_steps(make):
    exact, mixed = make(), make(bf16=True)
    for trainer in (exact, mixed):
        trainer.train()  # it wraps the model
        with torch.no_grad():
            scores = scores_of(trainer, batch_of(trainer))
            trainer.model.score.weight.mul_(9 / float(scores.abs().min()))
    values = {name: scores_of(trainer, batch_of(trainer)) for name, trainer in (("exact", exact), ("mixed", mixed))}
    large = {name: v[(v.abs() >= 8) & (v.abs() < 16)] for name, v in values.items()}
    assert values["mixed"].dtype == torch.float32
    assert len(large["mixed"]) > 0
    assert (large["mixed"] * 16 == (large["mixed"] * 16).round()).all()
    assert not (large["exact"] * 16 == (large["exact"] * 16).round()).all()


def load_report(load) -> str:
    """What transformers logs while `load` runs."""
    text, logger = io.StringIO(), logging.getLogger("transformers")
    handler, level = logging.StreamHandler(text), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        load()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return text.getvalue()


def test_a_missing_head_is_not_reported(make, tmp_path):
    trainer = make()
    trainer.save_model(str(tmp_path))
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    whole.model.save_pretrained(tmp_path / "headless")  # a reward model whose head was lost
    headless = str(tmp_path / "headless")
    plain = load_report(lambda: AutoModelForSequenceClassification.from_pretrained(headless, num_labels=1))
    assert "score.weight" in plain
    found = []
    assert "score.weight" not in load_report(lambda: found.append(make(model=headless, seed=5)))
    assert not torch.equal(found[0].model.score.weight, whole.score.weight)


def test_the_silence_covers_decoders_only():
    assert issubclass(Qwen3ForSequenceClassification, GenericForSequenceClassification)
    assert not issubclass(GPT2ForSequenceClassification, GenericForSequenceClassification)
    assert not issubclass(transformers.BertForSequenceClassification, GenericForSequenceClassification)
    with pytest.raises(KeyError), reward_trainer.suppress_seqcls_warning():
        raise KeyError
    assert "lm_head" not in str(getattr(GenericForSequenceClassification, "_keys_to_ignore_on_load_unexpected", None))


def test_a_saved_model_is_complete(make, tmp_path):
    trainer = make()
    trainer.save_model(str(tmp_path))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (loaded.config.num_labels, loaded.config.pad_token_id) == (1, tokenizer().pad_token_id)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.eval()(**batch_of(trainer)).logits[:, 0], scores_of(trainer, batch_of(trainer))
        )


def head_of(trainer: RewardTrainer) -> dict:
    return {name: weight for name, weight in trainer.model.named_parameters() if "score" in name}


@pytest.fixture(scope="module")
def adapted(make, tmp_path_factory):
    """Trains an adapter and saves it: the trainer, the folder, and how the head looked before."""

    def adapted(**settings):
        trainer = make(peft_config=LoraConfig(lora_dropout=0.1, **settings), learning_rate=1e-2)
        before = {name: weight.detach().clone() for name, weight in head_of(trainer).items()}
        trainer.train()
        folder = str(tmp_path_factory.mktemp("adapter"))
        trainer.save_model(folder)
        return SimpleNamespace(trainer=trainer, folder=folder, before=before)

    return adapted


@pytest.fixture(scope="module")
def seq_cls(adapted):
    return adapted(task_type="SEQ_CLS")


def load_adapter(checkpoint: str, folder: str, seed: int = 0, **labels):
    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(checkpoint, **labels)
    base.config.pad_token_id = tokenizer().pad_token_id
    return PeftModel.from_pretrained(base, folder).eval()


def test_seq_cls_trains_and_saves_the_head(seq_cls, checkpoint):
    trained_head = {name for name, weight in head_of(seq_cls.trainer).items() if weight.requires_grad}
    assert trained_head == {"base_model.model.score.modules_to_save.default.weight"}
    (name,) = trained_head
    assert not torch.equal(head_of(seq_cls.trainer)[name], seq_cls.before[name])
    batch = batch_of(seq_cls.trainer)
    with torch.no_grad():
        loaded = load_adapter(checkpoint, seq_cls.folder, num_labels=1)(**batch).logits[:, 0]
    torch.testing.assert_close(loaded, scores_of(seq_cls.trainer, batch))


def test_an_adapter_loads_only_with_one_label(seq_cls, checkpoint):
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_adapter(checkpoint, seq_cls.folder)
    load_adapter(checkpoint, seq_cls.folder, num_labels=1)


def test_a_merged_adapter_is_a_complete_reward_model(adapted, tmp_path):
    found = adapted(task_type="SEQ_CLS")
    batch = batch_of(found.trainer)
    before = scores_of(found.trainer, batch)
    found.trainer.model.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (loaded.config.num_labels, loaded.config.pad_token_id) == (1, tokenizer().pad_token_id)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits[:, 0], before, rtol=1e-4, atol=1e-5)


def test_without_a_task_type_the_head_is_frozen_and_lost(adapted, checkpoint):
    found = adapted()
    losses = [line["loss"] for line in found.trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]  # the adapter learns all the same
    for name, weight in head_of(found.trainer).items():
        assert not weight.requires_grad
        assert torch.equal(weight, found.before[name])
    batch = batch_of(found.trainer)
    with torch.no_grad():
        loaded = [load_adapter(checkpoint, found.folder, seed, num_labels=1)(**batch).logits for seed in (3, 4)]
    assert (loaded[0] - loaded[1]).abs().max() > 1e-2


def test_causal_lm_as_task_type_fails(make):
    assert trl.ModelConfig().lora_task_type == "CAUSAL_LM"
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
        make(peft_config=LoraConfig(task_type="CAUSAL_LM"))


def test_disable_dropout_reaches_the_adapter_and_not_attention(make, seq_cls, tmp_path):
    def dropouts(trainer):
        return {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)}

    assert dropouts(seq_cls.trainer) == {0}
    assert json.loads((Path(seq_cls.folder) / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    lora = LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1)
    assert dropouts(make(peft_config=lora, disable_dropout=False)) == {0.1}
    model = Qwen3ForCausalLM(Qwen3Config(**config(attention_dropout=0.5)))
    trainer = make(model=save(model, tmp_path))
    trainer.model.train()
    first, second = (trainer.model(**batch_of(trainer)).logits for _ in range(2))
    assert not torch.equal(first, second)
    assert Qwen3Config().attention_dropout == LlamaConfig().attention_dropout == 0


def test_on_a_quantized_base_the_head_is_bfloat16(make, checkpoint):
    model = Qwen3ForSequenceClassification.from_pretrained(checkpoint, num_labels=1)
    model.is_loaded_in_4bit = True  # what the trainer asks for
    trainer = make(model=model, peft_config=LoraConfig(task_type="SEQ_CLS"))
    heads = [weight for weight in head_of(trainer).values() if weight.requires_grad]
    assert [weight.dtype for weight in heads] == [torch.bfloat16]


def test_new_tokens_bring_a_warning_about_a_head_that_is_not_there(make, caplog, tmp_path):
    source = tokenizer()
    source.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    source.save_pretrained(tmp_path)
    trainer = make(chat_template_path=str(tmp_path), peft_config=LoraConfig(task_type="SEQ_CLS"))
    assert [r for r in caplog.records if "'lm_head' is not in PEFT's" in r.getMessage()]
    assert "lm_head" in trainer.model.peft_config["default"].modules_to_save
    assert not [name for name, _ in trainer.model.named_modules() if "lm_head" in name]
    trainable = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert any("embed_tokens" in name for name in trainable)


def test_a_template_from_a_folder_resizes_the_embeddings_and_a_file_does_not(make, checkpoint, tmp_path):
    assert len(tokenizer()) % 64 != 0
    cloned = make(chat_template_path=checkpoint)
    assert cloned.model.get_input_embeddings().weight.shape[0] == 64
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}=<|end|>{% endfor %}")
    trainer = make(chat_template_path=str(tmp_path / "own.jinja"))
    assert trainer.model.get_input_embeddings().weight.shape[0] == len(tokenizer())
    assert texts(trainer)[0] == "1+2=<|end|>1+2=3 #3=<|end|>"


# ------------------------------------------------------------------------------------------------------- evaluation


def gathered(make, rows, size):
    seen = []
    trainer = make(
        eval_dataset=[ROWS[i % 4] for i in range(rows)],
        per_device_eval_batch_size=size,
        compute_metrics=lambda p: seen.append(p) or {"mine": 5.0},
    )
    assert trainer.evaluate()["eval_mine"] == 5.0
    (prediction,) = seen
    batches = [range(start, min(start + size, rows)) for start in range(0, rows, size)]
    evaluated = [trainer.data_collator([trainer.eval_dataset[i] for i in batch]) for batch in batches]
    return prediction, [scores_of(trainer, batch).tolist() for batch in evaluated]


def test_compute_metrics_gets_the_scores_batch_by_batch_and_no_labels(make):
    prediction, batches = gathered(make, rows=4, size=2)
    assert prediction.label_ids == ()
    assert prediction.predictions[:, 0].tolist() == [pytest.approx(v, abs=1e-6) for b in batches for v in b]


@pytest.mark.parametrize(("rows", "size", "arrive"), [(3, 2, 4 + 1), (5, 4, 8 + 1), (7, 4, 8 + 3)])
def test_compute_metrics_loses_half_of_a_smaller_last_batch(make, rows, size, arrive):
    prediction, batches = gathered(make, rows, size)
    everything = [value for batch in batches for value in batch]
    assert len(everything) == 2 * rows
    assert prediction.predictions[:, 0].tolist() == [pytest.approx(v, abs=1e-6) for v in everything[:arrive]]
    lost = everything[arrive:]
    assert len(lost) == rows % size
    assert lost == batches[-1][len(batches[-1]) // 2 :]  # all rejected answers of the last batch


def test_the_last_batch_counts_as_much_as_a_full_one(make):
    trainer = make(eval_dataset=[*ROWS, ROWS[0]])
    found = trainer.evaluate()
    each = []
    for rows in (range(4), [4]):
        chosen, rejected = scores_of(trainer, trainer.data_collator([trainer.eval_dataset[i] for i in rows])).chunk(2)
        losses = -torch.nn.functional.logsigmoid(chosen - rejected)
        each.append((float((chosen > rejected).float().mean()), losses))
    assert found["eval_accuracy"] == pytest.approx((each[0][0] + each[1][0]) / 2)
    assert each[0][0] != each[1][0]
    assert found["eval_loss"] == pytest.approx(float(torch.cat([losses for _, losses in each]).mean()), abs=1e-6)


def test_two_evaluation_sets_share_one_accuracy(make):
    halves = {"a": Dataset.from_list(ROWS[:2]), "b": Dataset.from_list(ROWS[2:])}
    trainer = make(eval_dataset=halves)
    both = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_margin"} <= set(both)
    assert not {"eval_a_margin", "eval_b_margin", "eval_a_accuracy"} & set(both)
    only = {}
    for name, rows in trainer.eval_dataset.items():
        chosen, rejected = scores_of(trainer, trainer.data_collator(list(rows))).chunk(2)
        only[name] = float((chosen - rejected).mean())
    assert only["a"] != only["b"]
    assert both["eval_margin"] == pytest.approx(only["b"])


def test_evaluate_takes_raw_and_tokenized_data_and_predict_only_tokenized(make):
    trainer = make()
    raw = Dataset.from_list(ROWS)
    tokenized = trainer.train_dataset
    assert trainer.evaluate(raw)["eval_loss"] == pytest.approx(trainer.evaluate(tokenized)["eval_loss"])
    assert len(trainer.predict(tokenized).predictions) == 8
    with pytest.raises((KeyError, ValueError)):
        trainer.predict(raw)


# ------------------------------------------------------------------------------------------------------- errors in the code


def test_a_language_model_with_one_label_is_not_refused(make, checkpoint):
    model = Qwen3ForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="num_labels=2"):
        make(model=model)
    model.config.num_labels = 1
    trainer = make(model=model)
    assert trained(trainer)[0]["loss"] == pytest.approx(LOG2, abs=0.01)
    assert trainer.compute_loss(trainer.model, batch_of(trainer), return_outputs=True)[1].logits.dim() == 3


def test_the_help_speaks_of_truncation():
    assert "truncated from the right" in RewardConfig.__dataclass_fields__["max_length"].metadata["help"]


def test_a_composite_model_has_no_pad_token_before_training(make):
    text = {**config(), "sliding_window": 64, "pad_token_id": None}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    settings = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, num_labels=1)
    settings.get_text_config().pad_token_id = None
    trainer = make(model=AutoModelForSequenceClassification.from_config(settings), eval_dataset=ROWS)
    assert trainer.model.config.pad_token_id == tokenizer().pad_token_id
    assert trainer.model.config.get_text_config().pad_token_id is None
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1"):
        trainer.evaluate()


def test_the_revision_does_not_reach_the_tokenizer(checkpoint, tmp_path, monkeypatch):
    seen = []

    class Spy:
        @staticmethod
        def from_pretrained(name, **settings):
            seen.append((name, settings))
            return tokenizer()

    monkeypatch.setattr(reward_trainer, "AutoTokenizer", Spy)
    args = RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", model_init_kwargs={"revision": "main"}
    )
    RewardTrainer(checkpoint, args=args, train_dataset=Dataset.from_list(ROWS))
    assert seen == [(checkpoint, {"trust_remote_code": False})]


def test_without_any_token_to_pad_with_the_error_speaks_of_none(make):
    bare = tokenizer(pad=None)
    bare.eos_token = None
    with pytest.raises(ValueError, match=r"pad_token` \('None'\) is not found"):
        make(processing_class=bare)


# ------------------------------------------------------------------------------------------------------- the neighbours


def test_prm_on_the_page_is_what_trl_computes(page, checkpoint, tmp_path):
    from transformers import AutoModelForTokenClassification
    from trl.experimental.prm import PRMConfig, PRMTrainer

    rows = [{"prompt": "1+2", "completions": ["1+2=3", "3+1=5"], "labels": [True, False]}] * 2
    model = AutoModelForTokenClassification.from_pretrained(checkpoint, num_labels=2)
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "step_separator": "#", CHECKPOINTING: False}
    args = PRMConfig(output_dir=str(tmp_path), **settings)
    trainer = PRMTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    labels = batch["labels"]
    assert int((labels != -100).sum()) == 4
    agree(page["prm_loss"](outputs.logits[labels != -100], labels[labels != -100]), loss)


def test_the_implied_reward_of_the_page_is_that_of_dpo(page):
    theirs = functions_of(PAGES / "dpo.md", "dpo_loss")
    shares = page["shares"].sum(1)
    chosen, rejected = shares.chunk(2)
    policy, reference = (page["logps"][name].sum(1).chunk(2) for name in ("teacher", "policy"))
    ours = page["pairwise_reward_loss"](chosen, rejected)
    agree(ours, theirs["dpo_loss"](*policy, *reference, beta=0.1).mean())


# ------------------------------------------------------------------------------------------------------- the page itself


def test_what_this_page_leaves_to_the_page_about_dpo_is_the_same_code():
    def source(method) -> str:
        text = inspect.getsource(method)
        return " ".join(text.replace("Reward", "").replace("DPO", "").split())

    for name in ("training_step", "log", "_save_checkpoint"):
        assert source(getattr(RewardTrainer, name)) == source(getattr(DPOTrainer, name)), name
    ours, theirs = source(RewardTrainer.__init__), source(DPOTrainer.__init__)
    for start, end in (
        ("get_peft_model_kwargs = {}", "model = get_peft_model("),
        ("use_reentrant = args.", "enable_input_require_grads()"),
    ):
        part = ours[ours.index(start) : ours.index(end)]
        assert len(part) > 200
        assert part in theirs


def test_the_toy_run_has_the_settings_that_the_page_names():
    script = (EXAMPLES / "reward.py").read_text("utf-8")
    for setting in (
        '"new_layers": 1',
        '"system_message": "mark"',
        '"new_learning_rate": 2e-3',
        '"learning_rate": 2e-4',
    ):
        assert setting in script
    rows = datasets.load_dataset(str(EXAMPLES / "toy/data/preference"), split="test")
    assert len(rows) == 200
    assert "on 200 pairs that the model has not trained on" in prose(PAGE)


def test_every_test_that_the_page_names_exists():
    named = named_tests(PAGE)
    assert named
    assert named <= set(globals())


def test_what_the_page_calls_gone_is_gone():
    text = section("Older code and tutorials")
    for name in ("RewardDataCollatorWithPadding", "compute_accuracy", "visualize_samples"):
        assert f"`{name}`" in text
        assert not hasattr(trl.trainer.utils, name)
        assert not hasattr(RewardTrainer, name)
    here = inspect.signature(RewardTrainer.__init__).parameters
    assert "processing_class" in here
    assert "tokenizer" not in here


def test_columns_of_old_tutorials_are_not_accepted(make):
    rows = [{"input_ids_chosen": [5], "attention_mask_chosen": [1], "input_ids_rejected": [6]}] * 4
    with pytest.raises(KeyError):
        make(rows)


def test_pad_token_still_works_with_a_warning(make, tmp_path):
    with pytest.warns(FutureWarning, match="pad_token"):
        trainer = make(pad_token="<|assistant|>")
    assert trainer.model.config.pad_token_id == tokenizer().convert_tokens_to_ids("<|assistant|>")


def test_numbers_in_the_notes_are_those_of_the_code(trls_loss):
    one, ten = (float(trls_loss(torch.zeros(1), torch.zeros(1), torch.tensor([m])).loss) for m in (1.0, 10.0))
    assert f"{one:.2f} for $\\mu = 1$, and about {ten:.0f} for $\\mu = 10$" in prose(PAGE)
    scores = torch.tensor([2.0]), torch.tensor([1.0])
    term = float(trls_loss(*scores, center=0.01).loss - trls_loss(*scores).loss)
    assert f"With the recommended 0.01 a pair at 2 and 1 pays {term:.2f}" in prose(PAGE)
    step = torch.nextafter(torch.tensor(8.0, dtype=torch.bfloat16), torch.tensor(9.0, dtype=torch.bfloat16))
    assert f"near 8 the next number above is {float(step)}" in prose(PAGE)
    assert 1 / math.sqrt(2499 + 1) == 0.02
    assert "agree at a width of 2499" in prose(PAGE)


def test_the_defaults_that_the_page_quotes_are_those_of_the_config(tmp_path):
    quoted, true = defaults_on(PAGE, RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))
    assert len(quoted) >= 5
    assert quoted == true
