"""The claims of annotated_trainers/sft.md that running TRL can show, on a random model of two layers, on the CPU."""

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
import trl
import walkthrough_tools
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.chat_template_utils import clone_chat_template, get_training_chat_template
from trl.trainer import sft_trainer
from walkthrough_tools import PAGES, config, experts, make_trainer, metrics_on, page_of, prose, trained

PAGE = PAGES / "sft.md"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
UNMARKED = re.sub(r"{% (end)?generation %}", "", TEMPLATE)
QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text("utf-8")
SHORT = {"<|user|>": "U", "<|assistant|>": "A", "<|end|>": "E", "<|pad|>": ".", "<s>": "B"}


def turns(*contents: str) -> list[dict]:
    """A conversation: question, answer, question ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def pairs(*texts: tuple[str, str]) -> list[dict]:
    return [{"prompt": turns(q), "completion": turns(q, a)[1:]} for q, a in texts]


TEXTS = [("1+2", "1+2=3 #3"), ("7+12", "7+12=19 #19"), ("2+2", "2+2=4 #4 or so"), ("5+5", "5+5=10 #10")]
ROWS = pairs(*TEXTS)
CHATS = [{"messages": turns(q, a)} for q, a in TEXTS]
PLAIN = [{"text": f"{q} {a}"} for q, a in TEXTS]
UNEVEN = pairs(("1", "2"), ("1", "2 or 3 or 4 or 5 or 6"))


def tokenizer(template: str | None = TEMPLATE, **more):
    return walkthrough_tools.tokenizer(template, **more)


def saved(folder: Path, model=None, **more) -> str:
    torch.manual_seed(0)
    model = model or Qwen3ForCausalLM(Qwen3Config(**config(**more)))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("moe"), experts(output_router_logits=False))


@pytest.fixture
def build(checkpoint, tmp_path):
    """Makes an SFTTrainer; keyword arguments of SFTTrainer go there, all others to SFTConfig."""

    def make(rows=ROWS, model=None, processing_class=None, **more) -> SFTTrainer:
        own = {"model": model or checkpoint, "processing_class": processing_class or tokenizer()}
        sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 2}
        return make_trainer(SFTTrainer, SFTConfig, tmp_path / "run", rows, **own, **sizes | more)

    return make


def batch_of(trainer: SFTTrainer, count: int | None = None) -> dict:
    rows = list(trainer.train_dataset)
    return trainer.data_collator(rows[:count])


@torch.no_grad()
def loss_of(trainer: SFTTrainer, batch: dict) -> float:
    return float(trainer.compute_loss(trainer.model.eval(), dict(batch)))


def labelled(trainer: SFTTrainer, dataset=None, row: int = 0) -> tuple[str, str]:
    """A row as text, and below it which tokens are learned."""
    example = (dataset or trainer.train_dataset)[row]
    tokens = trainer.processing_class.convert_ids_to_tokens(example["input_ids"])
    learned = "".join("0" if label == -100 else "1" for label in example["labels"])
    return "".join(SHORT.get(token, token) for token in tokens), learned


page = page_of(PAGE)


# ------------------------------------------------------------------------------------------------------- the formula


def by_hand(page, logits, labels):
    return page["mean_over_learned_tokens"](logits, labels)


def random_logits(rows=3, length=40, vocabulary=19):
    logits = torch.randn(rows, length, vocabulary)
    labels = torch.randint(0, vocabulary, (rows, length))
    labels[torch.rand(rows, length) < 0.4] = -100
    return logits, labels


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_the_key_equation_is_what_the_default_loss_computes(page, chunk):
    hidden, head, bias = torch.randn(3, 40, 8), torch.randn(19, 8), torch.randn(19)
    _, labels = random_logits()
    theirs, correct, entropy, count = sft_trainer._chunked_cross_entropy_loss(
        hidden, head, chunk, labels=labels, lm_head_bias=bias
    )
    logits = hidden @ head.T + bias
    assert float(by_hand(page, logits, labels)) == pytest.approx(float(theirs), rel=1e-5)
    learned = labels[:, 1:] != -100
    probabilities = logits[:, :-1].softmax(-1)[learned]
    assert int(count) == len(probabilities)
    assert float(correct) == float((probabilities.argmax(-1) == labels[:, 1:][learned]).sum())
    assert float(entropy) == pytest.approx(-float((probabilities * probabilities.log()).sum()), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
def test_the_key_equation_is_what_the_trainer_computes(page, build, loss_type):
    trainer = build(loss_type=loss_type)
    batch = batch_of(trainer)
    with torch.no_grad():
        logits = trainer.model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert float(by_hand(page, logits, batch["labels"])) == pytest.approx(loss_of(trainer, batch), rel=1e-5)


def test_dft_on_the_page_is_what_trl_computes(page):
    logits, labels = random_logits()
    theirs = sft_trainer.dft_loss(SimpleNamespace(logits=logits.clone()), labels)
    learned = labels[:, 1:] != -100
    logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0][learned]
    assert float(page["dft_loss"](logps)) == pytest.approx(float(theirs), rel=1e-5)
    assert float(page["sft_loss"](logps)) == pytest.approx(float(by_hand(page, logits, labels)), rel=1e-5)


def test_the_gradient_of_dft_is_that_of_the_mean_probability():
    logits, labels = random_logits()
    logits.requires_grad_()
    (theirs,) = torch.autograd.grad(sft_trainer.dft_loss(SimpleNamespace(logits=logits), labels), logits)
    learned = labels[:, 1:] != -100
    probabilities = logits[:, :-1].softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    (ours,) = torch.autograd.grad(-probabilities[learned].mean(), logits)
    assert torch.allclose(theirs, ours, atol=1e-7)


def test_gkd_on_the_page_is_what_trl_computes(page):
    from trl.experimental.gkd import GKDTrainer

    student, labels = random_logits()
    teacher = torch.randn_like(student)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=0)
    learned = labels != -100
    assert float(page["gkd_loss"](student[learned], teacher[learned])) == pytest.approx(float(theirs), rel=1e-5)


def test_a_sure_teacher_makes_gkd_sft_and_an_advantage_of_one_makes_policy_gradient_sft(page):
    student, labels = torch.randn(9, 19), torch.randint(0, 19, (9,))
    sure = 200.0 * torch.nn.functional.one_hot(labels, 19)
    logps = student.log_softmax(-1)[torch.arange(9), labels]
    assert float(page["gkd_loss"](student, sure)) == pytest.approx(float(page["sft_loss"](logps)), rel=1e-5)
    assert float(page["policy_gradient_loss"](logps, torch.ones(9))) == pytest.approx(float(page["sft_loss"](logps)))


# ------------------------------------------------------------------------------------------------------- what is logged


def test_the_page_lists_exactly_the_keys_that_a_run_logs(build, mixture):
    trainer = build(model=mixture, eval_dataset=Dataset.from_list(ROWS), eval_strategy="epoch")
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert set(metrics_on(PAGE)) == logged
    early = build(eval_dataset=Dataset.from_list(ROWS)).evaluate()
    assert set(early) - logged == {"eval_model_preparation_time"}
    assert "eval_aux_loss" not in early


def test_the_loss_is_a_mean_over_tokens_and_not_over_rows(build):
    trainer = build(UNEVEN)
    together = loss_of(trainer, batch_of(trainer))
    alone = [loss_of(trainer, trainer.data_collator([row])) for row in trainer.train_dataset]
    counts = [sum(label != -100 for label in row["labels"]) for row in trainer.train_dataset]
    assert together == pytest.approx(sum(n * x for n, x in zip(counts, alone, strict=True)) / sum(counts), rel=1e-5)
    assert together != pytest.approx(sum(alone) / 2, rel=1e-3)


def test_the_number_of_tokens_leaves_the_first_one_out(build):
    trainer = build(PLAIN)
    batch = batch_of(trainer)
    labels = sum(len(row["labels"]) for row in trainer.train_dataset)
    assert int(trainer._get_num_items_in_batch([batch], torch.device("cpu"))) == labels - len(PLAIN)
    assert int((batch_of(build(PLAIN, padding_free=True, max_length=None))["labels"] != -100).sum()) == labels - 4


def test_random_weights_begin_at_the_logarithm_of_the_vocabulary(build):
    assert trained(build())[0]["loss"] == pytest.approx(math.log(len(tokenizer())), rel=0.02)


def test_the_logged_loss_is_the_mean_of_its_steps(build):
    each, both = trained(build()), trained(build(logging_steps=2))
    assert both[0]["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2)


def test_float_in_the_chunks_is_undone_by_autocast(build, monkeypatch):
    seen = []
    log_softmax = torch.nn.functional.log_softmax

    def spy(logits, **more):
        seen.append(logits.dtype)
        return log_softmax(logits, **more)

    monkeypatch.setattr(sft_trainer.F, "log_softmax", spy)
    build(max_steps=1).train()
    assert set(seen) == {torch.float32}
    seen.clear()
    build(max_steps=1, bf16=True).train()
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll", "dft"])
def test_accumulation_changes_neither_loss_nor_gradient(build, loss_type):
    settings = {"loss_type": loss_type, "max_steps": 1}
    one = trained(build(UNEVEN, **settings))[0]
    two = trained(build(UNEVEN, **settings, per_device_train_batch_size=1, gradient_accumulation_steps=2))[0]
    for key in ("loss", "grad_norm"):
        assert one[key] == pytest.approx(two[key], rel=1e-5)


def test_accumulation_changes_the_logged_accuracy(build):
    one = trained(build(UNEVEN, max_steps=1))[0]
    two = trained(build(UNEVEN, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2))[0]
    assert abs(one["mean_token_accuracy"] - two["mean_token_accuracy"]) > 0.05


def test_eval_loss_depends_on_the_batch_size(build):
    rows = Dataset.from_list(UNEVEN)
    trainer = build(UNEVEN, eval_dataset=rows)
    apart, together = (
        build(UNEVEN, eval_dataset=rows, per_device_eval_batch_size=size).evaluate()["eval_loss"] for size in (1, 2)
    )
    alone = [loss_of(trainer, trainer.data_collator([row])) for row in trainer.train_dataset]
    assert apart == pytest.approx(sum(alone) / 2, rel=1e-5)
    assert together == pytest.approx(loss_of(trainer, batch_of(trainer)), rel=1e-5)
    assert abs(apart - together) > 1e-3


def test_two_evaluation_sets_share_one_name_for_their_metrics(build):
    trainer = build(eval_dataset={"a": Dataset.from_list(ROWS[:2]), "b": Dataset.from_list(ROWS[2:])})
    trainer.train()
    both = set(trainer.evaluate())
    assert {"eval_a_loss", "eval_b_loss", "eval_entropy"} <= both
    assert not {"eval_a_entropy", "eval_b_entropy"} & both


def test_tokens_are_counted_with_the_prompt_and_without_padding(build):
    trainer = build(UNEVEN, max_steps=1)
    assert trained(trainer)[0]["num_tokens"] == sum(len(row["input_ids"]) for row in trainer.train_dataset)


def test_padding_free_counts_its_filling(build):
    settings = {"padding_free": True, "max_length": None, "max_steps": 1}
    trainer = build(UNEVEN, **settings, pad_to_multiple_of=64)
    assert trained(trainer)[0]["num_tokens"] == 64 > sum(len(row["input_ids"]) for row in trainer.train_dataset)
    assert (batch_of(trainer)["position_ids"][0, -20:] == 0).all()


def test_resuming_forgets_the_token_count(build):
    first = build(save_strategy="steps", save_steps=1)
    log = trained(first)
    second = build(save_strategy="steps", save_steps=1)
    second.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-1"))
    assert second.state.log_history[-2]["num_tokens"] == log[1]["num_tokens"] - log[0]["num_tokens"]


def test_liger_logs_no_entropy_and_skips_the_logits(build):
    trainer = build()
    trainer.args.use_liger_kernel, trainer.args.loss_type = True, "dft"  # set late: the real kernel is not installed
    received = []

    class Outputs(dict):
        __getattr__ = dict.get

    def forward(**inputs):
        received.append((inputs["skip_logits"], inputs["use_token_scaling"]))
        return Outputs(loss=torch.tensor(1.0), token_accuracy=torch.tensor(0.5))

    for training, loss_only in ((True, None), (False, None), (False, False)):
        trainer.model.train(training)
        batch = batch_of(trainer)
        if loss_only is not None:
            batch["_prediction_loss_only"] = loss_only
        trainer.compute_loss(forward, batch)
    assert received == [(True, True), (True, True), (False, True)]
    assert set(trainer._metrics["eval"]) == {"mean_token_accuracy", "num_tokens"}


# ------------------------------------------------------------------------------------------------- which tokens are learned


@pytest.mark.parametrize(
    ("row", "settings", "learned"),
    [
        (CHATS[0], {}, "111111111111111"),
        (CHATS[0], {"assistant_only_loss": True}, "000000111111111"),
        (ROWS[0], {}, "000000111111111"),
        (ROWS[0], {"completion_only_loss": False}, "111111111111111"),
    ],
)
def test_which_tokens_are_learned(build, row, settings, learned):
    assert labelled(build([row] * 2, **settings)) == ("U1+2EA1+2=3 #3E", learned)


def test_both_masks_must_allow_a_token(build):
    row = {"prompt": turns("1", "2", "3"), "completion": turns("3", "4")[1:]}
    assert labelled(build([row] * 2, assistant_only_loss=True)) == ("U1EA2EU3EA4E", "000000000011")
    both = {"assistant_only_loss": True, "completion_only_loss": False}
    assert labelled(build([row] * 2, **both)) == ("U1EA2EU3EA4E", "000011000011")


@pytest.mark.parametrize("rows", [CHATS, PLAIN], ids=["messages", "text"])
def test_completion_only_loss_without_a_completion_masks_nothing(build, rows):
    assert "0" not in labelled(build(rows, completion_only_loss=True))[1]


def test_the_evaluation_set_is_masked_like_the_training_set(build):
    trainer = build(PLAIN, eval_dataset=Dataset.from_list(ROWS))
    assert "0" not in labelled(trainer, trainer.eval_dataset)[1]
    trainer = build(ROWS, eval_dataset=Dataset.from_list(ROWS))
    assert labelled(trainer, trainer.eval_dataset)[1].startswith("000000111")


def test_assistant_only_loss_renders_qwen3_differently():
    ours = tokenizer(template=QWEN3)
    conversation = turns("a", "b", "c", "d")
    original = ours.apply_chat_template(conversation, tokenize=False)
    variant = ours.apply_chat_template(
        conversation, tokenize=False, chat_template=get_training_chat_template(processing_class=ours)
    )
    assert (original.count("<think>"), variant.count("<think>")) == (1, 2)


def test_a_template_without_marks_is_refused(build):
    for template in (UNMARKED, QWEN3 + " "):
        with pytest.raises(ValueError, match="patching is not supported for this template"):
            build(CHATS, assistant_only_loss=True, processing_class=tokenizer(template))


def test_the_saved_tokenizer_keeps_the_original_template(build):
    trainer = build(CHATS, assistant_only_loss=True, processing_class=tokenizer(QWEN3))
    assert trainer.chat_template != QWEN3
    assert trainer.processing_class.chat_template == QWEN3


def test_no_template_ends_in_a_type_error(build):
    with pytest.raises(TypeError, match="expected string"):
        build(CHATS, assistant_only_loss=True, processing_class=tokenizer(None))


def test_an_end_token_outside_the_marks_is_not_learned(build, caplog):
    outside = TEMPLATE.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    row = labelled(build(CHATS, assistant_only_loss=True, processing_class=tokenizer(outside)))
    assert row == ("U1+2EA1+2=3 #3E", "000000111111110")
    assert "the model may not learn to stop" in caplog.text


def test_conversations_without_an_answer_are_refused(build):
    with pytest.raises(RuntimeError, match="no assistant tokens"):
        build([{"messages": turns("1")}] * 2, assistant_only_loss=True)


def test_a_token_across_the_border_is_not_learned(build, caplog):
    merging = tokenizer(merges=[("a", "b")], more=["ab"])
    trainer = build([{"prompt": "ca", "completion": "bc"}] * 2, processing_class=merging)
    assert trainer.processing_class.convert_ids_to_tokens(trainer.train_dataset[0]["input_ids"])[1] == "ab"
    assert labelled(trainer) == ("cabcE", "0011")  # c, ab, c, end
    assert caplog.text.count("Mismatch between tokenized prompt") == 2


def test_tokenized_rows_use_masks_by_their_own_rules(build):
    ids = {"input_ids": [5, 6, 7]}
    cases = [
        ({"completion_mask": [0, 0, 1]}, {}, "111"),
        ({"completion_mask": [0, 0, 1]}, {"completion_only_loss": True}, "001"),
        ({"assistant_masks": [0, 1, 1]}, {}, "011"),
        ({"labels": [5, -100, 7], "assistant_masks": [0, 1, 1]}, {}, "101"),
    ]
    for columns, settings, learned in cases:
        assert labelled(build([ids | columns] * 2, **settings))[1] == learned
    with pytest.raises(ValueError, match="dataset is not conversational"):
        build([ids | {"assistant_masks": [0, 1, 1]}] * 2, assistant_only_loss=True)
    with pytest.raises(ValueError, match="would train on the full sequence"):
        build([ids | {"completion_mask": [0, 0, 1]}] * 2, dataset_kwargs={"skip_prepare_dataset": True})


def test_an_attention_mask_of_your_own_is_made_anew(build):
    trainer = build([{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0]}] * 2, max_steps=1)
    assert trained(trainer)[0]["num_tokens"] == 6


# ------------------------------------------------------------------------------------------------------- the end of an answer


def test_text_gets_an_eos_token_and_messages_do_not(build):
    assert labelled(build(PLAIN))[0].endswith("#3E")
    assert labelled(build([{"prompt": "1+2", "completion": "3"}] * 2)) == ("1+23E", "00011")
    unclosed = tokenizer(UNMARKED.replace("<|end|>", ""))
    assert "E" not in labelled(build(CHATS, processing_class=unclosed))[0]


def test_another_text_field_gets_no_eos_token(build):
    rows = [{"content": row["text"]} for row in PLAIN]
    assert "E" not in labelled(build(rows, dataset_text_field="content"))[0]


def test_the_eos_token_goes_to_a_text_column_that_is_not_learned(build):
    assert labelled(build([{"prompt": "ab", "completion": "cd", "text": "x"}] * 2)) == ("abcd", "0011")


def test_a_pad_token_equal_to_eos_does_no_harm(build):
    trainer = build(UNEVEN, processing_class=tokenizer(pad=None))
    assert trainer.processing_class.pad_token == "<|end|>"
    batch = batch_of(trainer)
    assert batch["input_ids"][0, -1] == trainer.processing_class.eos_token_id
    for labels, attention in zip(batch["labels"], batch["attention_mask"], strict=True):
        last = int(attention.sum()) - 1
        assert labels[last] == trainer.processing_class.eos_token_id
        assert (labels[last + 1 :] == -100).all()


def test_eos_token_reaches_the_model_when_training_starts(build):
    trainer = build(eos_token="<|assistant|>", max_steps=1)
    assert trainer.model.generation_config.eos_token_id == 1
    trainer.train()
    assert trainer.model.generation_config.eos_token_id == [3, 1]


def test_truncation_cuts_the_end_and_drops_rows_silently(build):
    trainer = build(max_length=7)  # the second prompt has seven tokens
    assert [labelled(trainer, row=i) for i in range(3)] == [(f"U{q}EA{q[0]}", "0000001") for q in ("1+2", "2+2", "5+5")]
    assert len(trainer.train_dataset) == 3
    with pytest.raises(ValueError, match="num_samples=0"):
        build(max_length=3).train()


def test_a_step_without_learned_tokens_logs_zero(build):
    for settings in ({"max_length": 3, "packing": True}, {"max_length": None}):
        rows = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 4
        assert trained(build(rows, **settings))[0]["loss"] == 0.0
    loss = sft_trainer._chunked_cross_entropy_loss(
        torch.randn(1, 3, 8),
        torch.randn(9, 8),
        256,
        labels=torch.full((1, 3), -100),
        num_items_in_batch=torch.tensor(0),
    )[0]
    assert math.isnan(float(loss))


# ------------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("rows", [CHATS, ROWS], ids=["messages", "prompt and completion"])
def test_formatting_func_is_ignored_where_trl_knows_the_columns(build, rows):
    more = {} if rows is CHATS else {"completion_only_loss": False}
    assert labelled(build(rows, formatting_func=lambda row: "zzz", **more))[0] == "U1+2EA1+2=3 #3E"
    assert labelled(build([{"q": "a"}] * 2, formatting_func=lambda row: "zzz"))[0] == "zzzE"
    with pytest.raises(KeyError, match="completion"):
        build([{"prompt": "a"}] * 2, formatting_func=lambda row: "zzz")


def test_formatting_func_writes_to_the_column_text_whatever_is_read(build):
    rows = [{"content": "abc"}] * 2
    assert labelled(build(rows, formatting_func=lambda row: "zzz", dataset_text_field="content"))[0] == "abc"


def test_a_prompt_beside_messages_fails(build):
    with pytest.raises((KeyError, TypeError, AttributeError)):
        build([{"prompt": "ab", **row} for row in CHATS])
    with pytest.raises(KeyError, match="completion"):
        build([{"prompt": turns("ab"), **row} for row in CHATS])


def test_text_that_begins_with_bos_gets_a_second_one(build):
    ours = tokenizer(bos="<s>", more=["<s>"])
    assert labelled(build([{"text": "<s>ab"}] * 2, processing_class=ours))[0] == "BBabE"
    assert labelled(build([{"text": "ab"}] * 2, processing_class=ours))[0] == "BabE"


def test_sharegpt_rows_keep_their_roles(build):
    def rows(asker, answerer):
        return [{"conversations": [{"from": asker, "value": q}, {"from": answerer, "value": a}]} for q, a in TEXTS]

    trainer = build(rows("human", "gpt"))
    assert trainer.train_dataset[0]["messages"][0]["role"] == "human"
    assert labelled(trainer)[0] == "human1+2Egpt1+2=3 #3E"  # headers that no model knows
    with pytest.raises(ValueError, match="dataset is not conversational"):
        build(rows("user", "assistant"), assistant_only_loss=True)


def test_predict_does_not_prepare_its_data_set(build):
    with pytest.raises(ValueError, match="No columns in the dataset match"):
        build().predict(Dataset.from_list(ROWS))


def test_an_empty_data_set_stops_without_a_message(build):
    with pytest.raises(StopIteration):
        build(Dataset.from_list(ROWS).select([]))


def test_a_data_set_with_a_transform_is_refused(build):
    with pytest.raises(ValueError, match="with_transform"):
        build(Dataset.from_list(ROWS).with_transform(lambda rows: rows))


# ------------------------------------------------------------------------------------------------- packing and padding-free


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(build, checkpoint, attention, caplog):
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, attn_implementation=attention)
    batch = batch_of(build(model=model, packing=True, max_length=64, loss_type="nll"), 1)
    assert "may lead to cross-contamination" in caplog.text
    starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
    assert len(starts) > 2
    with torch.no_grad():
        packed = model.eval()(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(batch["input_ids"][:, a:b]).logits for a, b in itertools.pairwise(starts)]
    assert torch.allclose(packed, torch.cat(alone, dim=1), atol=1e-5)


def test_wrapped_documents_see_each_other(build):
    trainer = build(packing=True, packing_strategy="wrapped", max_length=64, loss_type="nll")
    assert "seq_lengths" not in trainer.train_dataset.column_names
    batch = batch_of(trainer, 1)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    changed = batch["input_ids"].clone()
    changed[0, 1] = 20  # a letter in the first document
    with torch.no_grad():
        before, after = (trainer.model.eval()(ids).logits[0, -1] for ids in (batch["input_ids"], changed))
    assert (before - after).abs().max() > 1e-4


def test_packed_padded_and_padding_free_have_the_same_loss(build):
    def loss(**more):
        trainer = build(per_device_train_batch_size=4, **more)
        return loss_of(trainer, batch_of(trainer)), len(trainer.train_dataset)

    padded, rows = loss()
    free, same_rows = loss(padding_free=True, max_length=None)
    packed, packs = loss(packing=True, max_length=64)
    wrapped, _ = loss(packing=True, packing_strategy="wrapped", max_length=64)
    assert (rows, same_rows, packs) == (4, 4, 2)
    assert free == pytest.approx(padded, rel=1e-5)
    assert packed == pytest.approx(padded, rel=1e-5)
    assert abs(wrapped - padded) > 1e-3


def test_packing_cuts_the_end_whatever_the_truncation_mode(build):
    with pytest.warns(FutureWarning, match="keep_end"):
        trainer = build(packing=True, max_length=12, truncation_mode="keep_end")
    assert {labelled(trainer, row=i)[0][0] for i in range(4)} == {"U"}
    whole = sum(len(row["input_ids"]) for row in build().train_dataset)
    for strategy, kept in (("bfd", 4 * 12), ("bfd_split", whole)):
        trainer = build(packing=True, max_length=12, packing_strategy=strategy)
        assert sum(len(row["input_ids"]) for row in trainer.train_dataset) == kept


def test_rows_are_packed_within_each_thousand():
    ones = Dataset.from_list([{"input_ids": [5], "labels": [5]}] * 1500)
    assert [len(ids) for ids in pack_dataset(ones, 999, "bfd")["input_ids"]] == [999, 1, 500]


def test_a_pack_holds_documents_of_mixed_length():
    rows = Dataset.from_list([{"input_ids": [n] * n, "labels": [n] * n} for n in (3, 5, 2, 6, 1, 4)])
    assert pack_dataset(rows, 8, "bfd")["seq_lengths"] == [[6, 2], [5, 3], [4, 1]]


def test_evaluating_a_prepared_set_packs_it_again(build):
    rows = Dataset.from_list(ROWS)
    trainer = build(packing=True, max_length=64, eval_dataset=rows)
    assert [row["seq_lengths"] for row in trainer.eval_dataset] == [[21, 19, 17], [15]]
    right, again, wrong = (trainer.evaluate(*data)["eval_loss"] for data in ((), (rows,), (trainer.eval_dataset,)))
    assert right == again
    assert abs(right - wrong) > 1e-4


def test_wrapped_repeats_the_first_thousand_rows(build):
    rows = [{"input_ids": [4 + i % 40], "labels": [4 + i % 40]} for i in range(1500)]
    for row in rows[1000:]:
        row["input_ids"] = row["labels"] = [3]  # a token that is nowhere else
    settings = {"packing": True, "packing_strategy": "wrapped", "max_length": 32}

    def count(data):
        return sum(ids.count(3) for ids in build(data, **settings).train_dataset["input_ids"])

    assert count(rows) == 0
    assert count([{"input_ids": row["input_ids"]} for row in rows]) == 500  # `map` has written the labels


def test_padding_free_wants_no_max_length(build):
    with pytest.raises(ValueError, match="`max_length` is not enforced"):
        build(padding_free=True)


def test_position_numbers_begin_again_at_each_border():
    ids = sft_trainer.DataCollatorForLanguageModeling.get_position_ids_from_packed_seq_lengths([[3, 2], [1]])
    assert [positions.tolist() for positions in ids] == [[0, 1, 2, 0, 1], [0]]


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "settings",
    [{"label_smoothing_factor": 0.1}, {"compute_loss_func": lambda outputs, labels, **more: outputs.logits.mean()}],
    ids=["label smoothing", "compute_loss_func"],
)
def test_what_takes_the_labels_away_fails_with_the_default_loss(build, settings):
    with pytest.raises(AttributeError, match="num_valid_tokens"):
        build(**settings).train()
    assert trained(build(**settings, loss_type="nll"))


def test_compute_metrics_gets_counters_with_the_default_loss(build):
    received = []
    settings = {
        "compute_metrics": lambda p: received.append(p.predictions) or {},
        "eval_dataset": Dataset.from_list(ROWS),
    }
    build(**settings).evaluate()
    build(**settings, loss_type="nll").evaluate()
    assert [array.shape for array in received[0]] == [(2,)] * 3  # three numbers for each of two batches
    assert received[1].shape == (4, 21, len(tokenizer()))
    trainer = build()
    assert len(trainer.predict(trainer.train_dataset).predictions) == 3


def test_the_auxiliary_coefficient_reaches_only_the_default_loss(build, mixture):
    def first(loss_type, coefficient):
        return trained(build(model=mixture, loss_type=loss_type, router_aux_loss_coef=coefficient, max_steps=1))[0]

    for loss_type, expected in (("chunked_nll", 1.0), ("nll", 0.001), ("dft", 0.0)):
        without, line = first(loss_type, 0.0), first(loss_type, 1.0)
        assert line["loss"] - without["loss"] == pytest.approx(expected * line["aux_loss"], abs=2e-5)


def test_accumulation_multiplies_the_auxiliary_loss(build, mixture):
    def first(coefficient, **more):
        return trained(build(model=mixture, router_aux_loss_coef=coefficient, max_steps=1, **more))[0]

    for steps in (1, 2, 4):
        more = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
        without, line = first(0.0, **more), first(1.0, **more)
        assert line["loss"] - without["loss"] == pytest.approx(steps * line["aux_loss"], rel=1e-4)


def test_training_arguments_keep_their_own_defaults(checkpoint, tmp_path):
    trainer = SFTTrainer(
        model=checkpoint,
        args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
    )
    ours, theirs = trainer.args, SFTConfig(str(tmp_path), use_cpu=True)
    assert (ours.learning_rate, ours.bf16, ours.gradient_checkpointing, ours.logging_steps) == (5e-5, False, False, 500)
    assert (theirs.learning_rate, theirs.bf16, theirs.gradient_checkpointing, theirs.logging_steps) == (
        2e-5,
        True,
        True,
        10,
    )
    assert ours.max_length == theirs.max_length


def test_the_model_stays_patched(build, checkpoint):
    model, ids = Qwen3ForCausalLM.from_pretrained(checkpoint), torch.tensor([[5, 6, 7, 8]])
    assert model(ids, labels=ids).logits is not None
    build(model=model)
    assert model(ids, labels=ids).logits is None
    assert model(ids).logits is not None
    with pytest.raises(TypeError, match="not subscriptable"):
        build(model=model, loss_type="nll").train()


def test_liger_decides_the_default_loss(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True}
    assert SFTConfig(**settings).loss_type == "chunked_nll"
    assert SFTConfig(**settings, use_liger_kernel=True).loss_type == "nll"


# ------------------------------------------------------------------------------------------------------- adapters


def lora(**more) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **more)


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory) -> str:
    other = tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|new|>"]})
    folder = tmp_path_factory.mktemp("other")
    other.save_pretrained(folder)
    return str(folder)


def test_dropout_of_an_adapter_stays_on(build):
    trainer = build(peft_config=lora(lora_dropout=0.3))
    assert {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}


def test_a_cloned_template_makes_the_head_trainable(build, other_tokenizer):
    peft_config = lora()
    trainer = build(peft_config=peft_config, chat_template_path=other_tokenizer)
    assert peft_config.modules_to_save == ["lm_head"]
    known = len(tokenizer())
    assert peft_config.trainable_token_indices == {"embed_tokens": list(range(known, 64))}
    vocabulary = trainer.processing_class.get_vocab()
    assert len(vocabulary) == 64
    assert vocabulary["<|new|>"] == known
    assert "<extra_id_0>" in vocabulary
    assert trained(trainer)


def test_new_tokens_begin_as_the_mean_of_the_old_ones(checkpoint, other_tokenizer):
    model = Qwen3ForCausalLM.from_pretrained(checkpoint)
    old = model.get_input_embeddings().weight.detach().clone()
    model, _, added = clone_chat_template(model, tokenizer(), other_tokenizer)
    new = model.get_input_embeddings().weight[len(old) :]
    assert len(new) == len(added)
    assert torch.allclose(new, old.mean(0).expand_as(new), atol=1e-4)


def test_trainable_tokens_with_tied_embeddings_fail(build, tied, other_tokenizer):
    tokens = lora(trainable_token_indices={"embed_tokens": [1, 2, 3]})
    with pytest.raises(AttributeError, match="'TrainableTokensWrapper' object has no attribute 'bias'"):
        build(model=tied, peft_config=tokens).train()
    assert trained(build(model=tied, peft_config=tokens, loss_type="nll"))
    for loss_type in ("nll", "chunked_nll"):
        trainer = build(model=tied, peft_config=lora(), chat_template_path=other_tokenizer, loss_type=loss_type)
        with pytest.raises((AttributeError, ValueError), match="TrainableTokens"):
            trainer.train()


def test_an_adapter_on_the_head_is_refused_and_a_saved_head_is_trained(build, checkpoint):
    with pytest.raises(ValueError, match="`lm_head` is wrapped by a PEFT adapter"):
        build(peft_config=lora(target_modules=["q_proj", "lm_head"]))
    assert trained(build(peft_config=lora(target_modules="all-linear")))
    trainer = build(peft_config=lora(modules_to_save=["lm_head"]))
    trainer.train()
    (head,) = [p for name, p in trainer.model.named_parameters() if "lm_head.modules_to_save" in name]
    assert not torch.equal(head, Qwen3ForCausalLM.from_pretrained(checkpoint).lm_head.weight)


def test_the_first_weights_of_an_adapter_ignore_the_seed(build):
    def first_weights(state):
        torch.manual_seed(state)
        trainer = build(peft_config=lora())
        return next(p for name, p in trainer.model.named_parameters() if "lora_A" in name).detach().clone()

    assert not torch.equal(first_weights(1), first_weights(2))
    assert torch.equal(first_weights(1), first_weights(1))


def test_dft_fails_with_prompt_tuning(build):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(RuntimeError, match="must match the size"):
        build(peft_config=prompt, loss_type="dft").train()
    assert trained(build(peft_config=prompt))


# ------------------------------------------------------------------------------------------------------- memory


def test_full_fine_tuning_takes_sixteen_bytes_a_parameter(build):
    trainer, gradients = build(max_steps=1), []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **more):
            gradients.append(sum(p.grad.nbytes for p in model.parameters()))

    trainer.add_callback(Watch())
    trainer.train()
    weights = list(trainer.model.parameters())
    moments = [
        v for state in trainer.optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()
    ]
    held = sum(p.nbytes for p in weights) + gradients[0] + sum(v.nbytes for v in moments)
    assert held == 16 * sum(p.numel() for p in weights)


def test_only_learned_tokens_meet_the_head(monkeypatch):
    calls, chunk = [], sft_trainer._chunk

    def spy(hidden, *more):
        calls.append(len(hidden))
        return chunk(hidden, *more)

    monkeypatch.setattr(sft_trainer, "_chunk", spy)
    hidden, head = torch.randn(2, 400, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(0, 11, (2, 400))
    labels[:, :300] = -100
    loss = sft_trainer._chunked_cross_entropy_loss(hidden, head, 256, labels=labels)[0]
    assert calls == [256]  # 200 learned tokens of 800
    loss.backward()
    assert calls == [256, 256]  # and once more


def test_the_sizes_that_the_page_computes():
    text = prose(PAGE)
    rows, length, words, size = re.search(
        r"With (\d+) rows of (\d+) tokens and a vocabulary of ([\d,]+) words they take ([\d.]+) GB", text
    ).groups()
    assert int(rows) * int(length) * int(words.replace(",", "")) * 4 / 1e9 == pytest.approx(float(size), abs=0.005)
    billions, gigabytes = re.search(r"A (\d+)B model needs (\d+) GB", text).groups()
    assert int(billions) * 16 == int(gigabytes)
    assert sft_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE == 256


# ------------------------------------------------------------------------------------------------------- the page itself


def test_arguments_of_old_tutorials_are_gone():
    taken = set(inspect.signature(SFTTrainer.__init__).parameters)
    assert not {"tokenizer", "max_seq_length", "dataset_text_field", "packing"} & taken
    fields = set(SFTConfig.__dataclass_fields__)
    assert {"max_length", "dataset_text_field", "packing"} <= fields
    assert "max_seq_length" not in fields
    assert not hasattr(trl, "DataCollatorForCompletionOnlyLM")
