"""The claims of annotated_trainers/gkd.md that running TRL can show, on random models of two layers, on the CPU."""

import copy
import inspect
import json
import math
import os
import random
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer, gkd_trainer
from trl.experimental.utils import DataCollatorForChatML, encode_with_byte_offsets
from trl.trainer import distillation_trainer
from walkthrough_tools import (
    CHECKPOINTING,
    END,
    EXAMPLES,
    EXPECTED,
    PAD,
    PAGES,
    TEMPLATE,
    comparisons,
    config,
    experts,
    formula_names,
    made_once,
    make_trainer,
    metrics_on,
    model_folder,
    page_of,
    save,
    tokenizer,
    trained,
    types_of_products,
)

PAGE = PAGES / "gkd.md"
MEASURED = EXPECTED / "gkd.json"
JSD = GKDTrainer.generalized_jsd_loss


def row(question: str, answer: str) -> dict:
    """One conversation of one turn."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [row("1+2", "1+2=3 #3"), row("7+12", "7+12=19 #19"), row("2+2", "2+2=4 #4"), row("5+5", "5+5=10 #10")]


student = model_folder()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """Wider than the student, and surer."""
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(**config(hidden_size=48)))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return save(model, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def make(student, teacher, tmp_path_factory):
    """Makes a GKDTrainer; keyword arguments of GKDTrainer go there, all others to GKDConfig."""

    def make(rows=ROWS, model=None, teacher_model=teacher, **more) -> GKDTrainer:
        sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 2, "max_new_tokens": 6}
        more = {**sizes, "lmbda": 0.0, "model": model or student, "teacher_model": teacher_model, **more}
        return make_trainer(GKDTrainer, GKDConfig, tmp_path_factory.mktemp("run"), rows, **more)

    return make


plain = made_once()


def batch_of(trainer: GKDTrainer, rows=ROWS[:2]) -> dict:
    return trainer.data_collator(rows)


def loss_of(trainer: GKDTrainer, batch: dict, **more) -> float:
    trainer.model.eval()
    return float(trainer.compute_loss(trainer.model, dict(batch), **more).detach())


def gradient_of(trainer: GKDTrainer) -> torch.Tensor:
    return torch.cat([w.grad.flatten() for w in trainer.model.parameters() if w.grad is not None])


def compared(batch: dict) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def texts(batch: dict) -> list[str]:
    """What carries a label, row by row."""
    return [tokenizer().decode([i for i in labels if i != -100]) for labels in batch["labels"].tolist()]


def watch(trainer: GKDTrainer) -> list[SimpleNamespace]:
    """Remembers what each call of `compute_loss` got."""
    seen, compute = [], trainer.compute_loss

    def spy(model, inputs, return_outputs=False, num_items_in_batch=None):
        n = None if num_items_in_batch is None else int(num_items_in_batch)
        shape = tuple(inputs["input_ids"].shape)
        seen.append(SimpleNamespace(n=n, compared=compared(inputs), shape=shape, texts=texts(inputs)))
        return compute(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    trainer.compute_loss = spy
    return seen


# ---------------------------------------------------------------------------- the formulas, against TRL's own methods


page = page_of(PAGE)
ERRORS, agree, summary = comparisons()


BETAS = (0.0, 0.1, 0.5, 0.8, 1.0)


def random_logits(seed: int, rows=3, length=7, words=11):
    dice = torch.Generator().manual_seed(seed)
    ours, theirs = (3 * torch.randn(rows, length, words, generator=dice) for _ in range(2))
    labels = torch.randint(0, words, (rows, length), generator=dice)
    for i in range(rows):
        labels[i, : int(torch.randint(1, length - 1, (1,), generator=dice))] = -100
    return ours.requires_grad_(), theirs, labels


@pytest.mark.parametrize("beta", BETAS)
def test_the_divergence_on_the_page_is_what_trl_computes(page, beta):
    for seed in range(4):
        ours, theirs, _ = random_logits(seed)
        mine, trls = page["generalized_jsd"](ours, theirs, beta), JSD(ours, theirs, beta=beta, reduction="none").sum(-1)
        agree(mine, trls)
        agree(torch.autograd.grad(mine.sum(), ours)[0], torch.autograd.grad(trls.sum(), ours)[0])


@pytest.mark.parametrize("beta", BETAS)
def test_the_loss_on_the_page_is_what_trl_computes(page, plain, monkeypatch, beta):
    monkeypatch.setattr(plain, "beta", beta)
    for seed in range(4):
        ours, theirs, labels = random_logits(seed)
        monkeypatch.setattr(
            plain, "teacher_model", torch.nn.Module()
        )  # its `eval` is called; the forward pass is the next line
        plain.teacher_model.forward = lambda _theirs=theirs, **kwargs: SimpleNamespace(logits=_theirs)
        batch = {"input_ids": labels, "attention_mask": torch.ones_like(labels), "labels": labels}
        for n in (None, 17):
            trls = plain.compute_loss(
                lambda _ours=ours, **kwargs: SimpleNamespace(logits=_ours), batch, num_items_in_batch=n
            )
            mine = page["gkd_loss"](ours, theirs, labels, beta, n)
            agree(mine, trls)
            agree(torch.autograd.grad(mine, ours)[0], torch.autograd.grad(trls, ours)[0])


@pytest.mark.parametrize("beta", BETAS[1:-1])
def test_the_slope_on_the_page_is_what_trl_has(page, beta):
    for seed in range(4):
        ours, theirs, _ = random_logits(seed)
        (trls,) = torch.autograd.grad(JSD(ours, theirs, beta=beta, reduction="sum"), ours)
        agree(page["gkd_slope"](ours, theirs, beta), trls)


def test_the_slope_of_the_forward_kl_is_the_difference_of_the_probabilities():
    ours, theirs, _ = random_logits(0)
    (slope,) = torch.autograd.grad(JSD(ours, theirs, beta=0, reduction="sum"), ours)
    agree(ours.softmax(-1) - theirs.softmax(-1), slope)


@pytest.mark.parametrize("cache", [True, False])
def test_the_cost_of_sampling_on_the_page_is_what_trl_pays(page, make, cache):
    trainer, positions = make(max_new_tokens=5, **{CHECKPOINTING: not cache}), []
    batch = batch_of(trainer)
    trainer.generation_config.min_new_tokens = 5  # so that no end token makes it shorter
    trainer.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with gkd_trainer.unwrap_model_for_generation(trainer.model, trainer.accelerator) as model:
        trainer.generate_on_policy_outputs(model, batch, trainer.generation_config)
    agree(float(page["sampling_cost"](batch["prompts"].shape[1], 5, cache)), float(sum(positions)))


def test_every_displayed_formula_has_its_function_and_is_compared_above():
    known = {"generalized-jsd", "gkd-loss", "gkd-slope", "sampling-cost"}
    assert formula_names(PAGE) == sorted(known)


# -------------------------------------------------------------------------------------------------------- the divergence


def test_beta_0_is_the_forward_and_beta_1_the_reverse_kl():
    ours, theirs, _ = random_logits(0, rows=1, length=4)
    s, t = torch.distributions.Categorical(logits=ours), torch.distributions.Categorical(logits=theirs)
    forward, reverse = torch.distributions.kl_divergence(t, s).sum(), torch.distributions.kl_divergence(s, t).sum()
    assert float(JSD(ours, theirs, beta=0, reduction="sum")) == pytest.approx(float(forward))
    assert float(JSD(ours, theirs, beta=1, reduction="sum")) == pytest.approx(float(reverse))
    assert float(forward) != pytest.approx(float(reverse), rel=0.05)


def test_the_loss_jumps_at_both_ends_of_beta():
    ours, theirs = (logits.detach().double() for logits in random_logits(0)[:2])
    end = {beta: float(JSD(ours, theirs, beta=beta, reduction="sum")) for beta in (0, 1e-5, 0.01, 1 - 1e-5, 1)}
    assert end[1e-5] < 1e-4 * end[0]
    assert end[1 - 1e-5] < 1e-4 * end[1]
    assert end[1e-5] / 1e-5 == pytest.approx(end[0], rel=1e-2)  # the limit is one of the loss over beta
    assert end[1 - 1e-5] / 1e-5 == pytest.approx(end[1], rel=1e-2)
    assert 50 < end[0] / end[0.01] < 300


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_between_the_ends_the_loss_has_a_bound(beta):
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    apart = torch.tensor([[[0.0, -90.0]]]), torch.tensor([[[-90.0, 0.0]]])
    assert float(JSD(*apart, beta=beta)) == pytest.approx(bound, rel=1e-5)
    assert float(JSD(*apart, beta=0)) == float(JSD(*apart, beta=1)) == pytest.approx(90.0)
    ours, theirs, _ = random_logits(0)
    assert float(JSD(ours, 9 * theirs, beta=beta, reduction="none").sum(-1).max()) < bound


def test_a_word_that_the_student_rules_out_gets_no_pull_but_from_the_forward_kl():
    ours, theirs = torch.tensor([[[0.0, 0.0, -60.0]]], requires_grad=True), torch.tensor([[[-60.0, -60.0, 0.0]]])
    pull = {beta: torch.autograd.grad(-JSD(ours, theirs, beta=beta), ours)[0][0, 0, 2].item() for beta in (0, 0.5, 1)}
    assert pull[0] == pytest.approx(1.0)
    assert abs(pull[0.5]) < 1e-9
    assert abs(pull[1]) < 1e-9


def test_the_loss_of_two_equal_models_is_rounding_and_can_be_negative():
    values = [float(JSD(random_logits(seed)[0], random_logits(seed)[0])) for seed in range(20)]
    assert min(values) < 0
    assert max(map(abs, values)) < 1e-7


def test_the_slip_itself_costs_what_the_right_token_costs(plain):
    """The loss of a place depends on what stands before it, not on what stands there."""
    right, slip = batch_of(plain, [row("1+2", "1+2=3 #3")]), batch_of(plain, [row("1+2", "1+2=4 #3")])
    place = int((right["input_ids"] != slip["input_ids"]).nonzero()[0, 1])
    with torch.no_grad():
        both = [
            JSD(
                *(m.eval()(input_ids=b["input_ids"]).logits for m in (plain.model, plain.teacher_model)),
                reduction="none",
            )
            for b in (right, slip)
        ]
    right, slip = (terms.sum(-1)[0] for terms in both)
    assert torch.equal(right[:place], slip[:place])
    assert not torch.equal(right[place:-1], slip[place:-1])


def test_a_logit_of_minus_infinity_makes_the_loss_nan():
    ours, theirs = torch.tensor([[[0.0, 1.0, -math.inf]]]), torch.tensor([[[1.0, 0.0, -math.inf]]])
    for beta in (0, 0.5, 1):
        assert math.isnan(JSD(ours, theirs, beta=beta))
        assert math.isnan(JSD(ours, ours, beta=beta))


def test_the_backward_pass_keeps_seven_tensors_of_the_size_of_the_logits():
    ours, theirs, labels = random_logits(0, rows=1, length=50, words=1000)
    kept = {}

    def remember(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for beta, expected in ((0, 2), (0.5, 7)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            JSD(ours, theirs, labels, beta=beta)
        assert sum(kept.values()) / (50 * 1000 * 4) == pytest.approx(expected, abs=0.01)


def test_the_mean_that_is_called_batchmean_is_over_tokens():
    ours, theirs, labels = random_logits(0)
    each = JSD(ours, theirs, reduction="none").sum(-1)
    mask = labels != -100
    assert float(JSD(ours, theirs, labels)) == pytest.approx(float(each[mask].mean()))
    by_answer = torch.stack([each[i][mask[i]].mean() for i in range(3)]).mean()  # the paper's equation 2
    assert float(JSD(ours, theirs, labels)) != pytest.approx(float(by_answer), rel=1e-3)
    assert float(JSD(ours, theirs, labels, reduction="mean")) == pytest.approx(float(each[mask].mean()) / 11)


def test_the_temperature_does_not_reach_the_divergence(make, plain):
    assert loss_of(make(temperature=0.1), batch_of(plain)) == loss_of(plain, batch_of(plain))
    ours, theirs, _ = random_logits(0)
    assert float(JSD(ours, theirs, temperature=2.0)) == pytest.approx(float(JSD(ours / 2, theirs / 2)))


# ------------------------------------------------------------------------------------------------------- what is logged


def test_the_page_lists_exactly_the_keys_that_a_run_logs(make):
    trainer = make(lmbda=0.5, eval_dataset=Dataset.from_list(ROWS), eval_strategy="epoch")
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert set(metrics_on(PAGE)) == logged


def test_nothing_of_what_sft_measures_is_logged(make):
    trainer = make()
    keys = set().union(*trained(trainer))
    assert not {"entropy", "mean_token_accuracy", "num_tokens", "aux_loss"} & keys
    assert trainer.compute_loss.__func__ is not SFTTrainer.compute_loss


def test_nothing_is_sampled_in_evaluation(make):
    trainer = make(lmbda=1.0, eval_dataset=Dataset.from_list(ROWS))
    seen = watch(trainer)
    found = trainer.evaluate()["eval_loss"]
    answers = [r["messages"][1]["content"] + "<|end|>" for r in ROWS]
    assert [text for call in seen for text in call.texts] == answers
    halves = [loss_of(trainer, batch_of(trainer, rows)) for rows in (ROWS[:2], ROWS[2:])]
    assert found == pytest.approx(sum(halves) / 2, rel=1e-4)


def test_an_evaluation_before_the_training_is_outside_mixed_precision(make):
    trainer, dtypes = make(bf16=True, eval_dataset=Dataset.from_list(ROWS[:2])), []
    for model in (trainer.model, trainer.teacher_model):
        model.lm_head.register_forward_hook(lambda _, __, logits: dtypes.append(logits.dtype))
    trainer.evaluate()
    assert dtypes == [torch.float32, torch.bfloat16]
    trainer.train()
    dtypes.clear()
    trainer.evaluate()
    assert dtypes == [torch.bfloat16] * 2


def test_the_auxiliary_loss_is_computed_and_not_added(make):
    trainer = make(model=experts(output_router_logits=False))
    batch = batch_of(trainer)
    trainer.model.eval()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert float(outputs.aux_loss) > 1
    with torch.no_grad():
        theirs = trainer.teacher_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert float(loss) == pytest.approx(float(JSD(outputs.logits[:, :-1], theirs[:, :-1], batch["labels"][:, 1:])))
    assert "aux_loss" not in trained(trainer)[0]


# ------------------------------------------------------------------------------------------------------------- the data


def test_only_the_last_message_is_compared(plain):
    turns = {"messages": ROWS[0]["messages"] + ROWS[1]["messages"]}
    assert texts(batch_of(plain, [turns])) == ["7+12=19 #19<|end|>"]


def test_a_question_at_the_end_is_taken_for_an_answer(plain):
    turns = {"messages": [*ROWS[0]["messages"], {"role": "user", "content": "123456"}]}
    assert texts(batch_of(plain, [turns])) == ["123456<|end|>"]


def test_a_prompt_column_moves_the_border(plain):
    batch = batch_of(plain, [{"prompt": "7+12", **ROWS[1]}])
    assert texts(batch) == ["2<|end|><|assistant|>7+12=19 #19<|end|>"]
    assert tokenizer().decode(batch["prompts"][0]) == "<|user|>7+1"  # the student writes on from here


@pytest.mark.parametrize(
    "bad",
    [{"prompt": ROWS[0]["messages"][:1], "completion": ROWS[0]["messages"][1:]}, {"text": "1+2"}],
    ids=["prompt and completion", "text"],
)
def test_rows_without_messages_fail_when_their_turn_comes(make, bad):
    trainer = make([bad] * 2)  # no complaint here
    with pytest.raises(KeyError, match="messages"):
        trainer.train()


def test_a_longer_header_takes_the_first_tokens_of_the_answer(make):
    template = TEMPLATE.replace("<|assistant|>{% endif", "<|assistant|>abc{% endif")
    assert texts(batch_of(make(processing_class=tokenizer(template)), ROWS[:1])) == ["=3 #3<|end|>"]


def byte_level(template: str) -> PreTrainedTokenizerFast:
    """One token per byte, and one of two: ':1'."""
    letters = sorted({*pre_tokenizers.ByteLevel.alphabet()})
    vocab = {token: i for i, token in enumerate(["<|pad|>", "<|end|>", *letters, ":1"])}
    core = Tokenizer(models.BPE(vocab, [(":", "1")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", chat_template=template
    )


def test_a_token_across_the_border_counts_as_prompt():
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    tok = byte_level(template)
    collate = DataCollatorForChatML(tok, max_length=99)
    for answer, labelled in (("23é", "23é"), ("13é", "3é")):
        labels = collate([row("ü", answer)])["labels"][0].tolist()
        assert tok.decode([i for i in labels if i != -100]) == labelled


def test_a_letter_of_several_bytes_is_taken_apart_and_plain_text_is_not_changed():
    tok = byte_level("")
    [(_, places)] = encode_with_byte_offsets(tok.backend_tokenizer, ["aé1"])
    assert places == [(0, 1), (1, 2), (2, 3), (3, 4)]
    [(_, places)] = encode_with_byte_offsets(tok.backend_tokenizer, ["a:12"])
    assert places == [(0, 1), (1, 3), (3, 4)] == list(tok.backend_tokenizer.encode("a:12").offsets)
    with pytest.raises(NotImplementedError, match="ByteLevel"):
        encode_with_byte_offsets(tokenizer().backend_tokenizer, ["a"])


def test_a_long_row_loses_its_beginning(make):
    trainer = make(max_length=17)  # the second row has 19 tokens
    batch = batch_of(trainer, ROWS[1:2])
    assert tokenizer().decode(batch["input_ids"][0]) == "+12<|end|><|assistant|>7+12=19 #19<|end|>"
    assert tokenizer().decode(batch["prompts"][0]) == "+12<|end|><|assistant|>"


def test_an_answer_that_fills_max_length_stops_the_run(make):
    trainer = make(max_length=12, lmbda=0.0)
    with pytest.raises(ValueError, match="no prompt tokens left"):
        trainer.train()


def test_max_length_cannot_be_switched_off(make):
    assert make(max_length=None).data_collator.max_length == 1024


def test_a_sampled_answer_is_not_cut_at_max_length(make):
    trainer = make(max_length=19, lmbda=1.0, max_new_tokens=30, max_steps=1)
    trainer.generation_config.min_new_tokens = 30
    seen = watch(trainer)
    trainer.train()
    assert seen[0].shape[1] > 30


def test_tokenized_rows_need_a_prompt_and_are_not_cut(make):
    trainer = make(max_length=5)
    tokens = {"input_ids": [2, 8, 6, 9, 1, 3, 10, 1], "completion_mask": [0] * 6 + [1] * 2}
    with pytest.raises(KeyError, match="messages"):
        batch_of(trainer, [tokens])
    batch = batch_of(trainer, [{**tokens, "prompt": "never read"}])
    assert batch["labels"].tolist() == [[-100] * 6 + [10, 1]]
    assert batch["prompts"].tolist() == [tokens["input_ids"][:6]]


def test_tools_of_a_row_do_not_reach_the_template(make):
    trainer = make(processing_class=tokenizer("{% if tools %}{{ 1 / 0 }}{% endif %}" + TEMPLATE))
    assert texts(batch_of(trainer, [{**ROWS[0], "tools": [{"name": "add"}]}])) == ["1+2=3 #3<|end|>"]


def test_a_tokenizer_without_a_pad_token_is_refused(make):
    with pytest.raises(ValueError, match="does not have a pad token"):
        make(processing_class=tokenizer(pad=None))


def test_a_row_without_an_answer_token_costs_nothing(plain):
    batch = batch_of(plain)
    batch["labels"][:] = -100
    assert loss_of(plain, batch) == 0.0


def test_everything_is_padded_on_the_left(plain):
    batch = batch_of(plain)
    for name, filling in (("input_ids", PAD), ("labels", -100), ("prompts", PAD), ("attention_mask", 0)):
        assert batch[name][0, 0] == filling
        assert batch[name][0, -1] != filling
    assert batch["prompts"][:, -1].tolist() == [3, 3]  # all prompts end with the assistant's header


def gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(tokenizer()), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=END, bos_token_id=None))


def test_padding_changes_the_loss_of_absolute_positions_only(make, plain):
    rows = [ROWS[0], row("1+1+1+1+1+1+1", "7")]

    def beside_a_longer_one(trainer) -> tuple[float, float]:
        batch = batch_of(trainer, rows)
        batch["labels"][1] = -100
        return loss_of(trainer, batch_of(trainer, rows[:1])), loss_of(trainer, batch)

    alone, beside = beside_a_longer_one(plain)
    assert beside == pytest.approx(alone, rel=1e-4)
    alone, beside = beside_a_longer_one(make(model=gpt2(0), teacher_model=gpt2(1)))
    assert beside != pytest.approx(alone, rel=1e-2)


# ---------------------------------------------------------------------------------------------------------- the teacher


def test_vocabularies_of_another_size_are_refused_and_others_are_not(make, teacher):
    model = Qwen3ForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(60)
    with pytest.raises(ValueError, match=f"vocab_size {len(tokenizer())} but the teacher model has vocab_size 60"):
        make(teacher_model=model)
    shuffled = Qwen3ForCausalLM.from_pretrained(teacher)
    order = torch.randperm(len(tokenizer()), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # the same teacher with another numbering of its words
        for matrix in (shuffled.get_input_embeddings().weight, shuffled.lm_head.weight):
            matrix.copy_(matrix[order].clone())
    plain, strange = make(teacher_model=teacher), make(teacher_model=shuffled)
    assert loss_of(plain, batch_of(plain)) != pytest.approx(loss_of(strange, batch_of(plain)), rel=1e-2)


def test_a_wider_teacher_can_be_cut_to_size(make, plain, teacher):
    model = Qwen3ForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(60)
    model.resize_token_embeddings(len(tokenizer()))
    assert loss_of(make(teacher_model=model), batch_of(plain)) == pytest.approx(loss_of(plain, batch_of(plain)))


def test_a_teacher_by_name_keeps_the_precision_of_its_file(make, student, teacher, tmp_path):
    half = save(Qwen3ForCausalLM.from_pretrained(teacher).to(torch.bfloat16), tmp_path / "half")
    trainer = make(teacher_model=half, model=half)
    assert (trainer.model.dtype, trainer.teacher_model.dtype) == (torch.float32, torch.bfloat16)
    assert make(teacher_model=half, teacher_model_init_kwargs={"dtype": "float32"}).teacher_model.dtype == torch.float32


def test_teacher_model_init_kwargs_need_a_dtype_as_text_and_once(make, teacher):
    with pytest.raises(KeyError, match="dtype"):
        make(teacher_model_init_kwargs={"attn_implementation": "eager"})
    with pytest.raises(TypeError, match="attribute name must be string"):
        make(teacher_model_init_kwargs={"dtype": torch.bfloat16})
    mine = {"dtype": "bfloat16"}
    args = make(teacher_model_init_kwargs=mine).args
    assert mine["dtype"] is torch.bfloat16
    with pytest.raises(TypeError, match="attribute name must be string"):
        GKDTrainer(
            make().model, teacher, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer()
        )
    with pytest.raises(ValueError, match="already instantiated"):
        make(teacher_model=Qwen3ForCausalLM.from_pretrained(teacher), teacher_model_init_kwargs={"dtype": "float32"})


def test_what_has_a_default_of_none_is_required(make, plain, student, teacher):
    data = Dataset.from_list(ROWS)
    parameters = inspect.signature(GKDTrainer.__init__).parameters
    assert all(parameters[name].default is None for name in ("args", "processing_class", "teacher_model"))
    assert "quantization_config" not in parameters
    with pytest.raises(AttributeError, match="remove_unused_columns"):
        GKDTrainer(student, teacher, train_dataset=data, processing_class=tokenizer())
    with pytest.raises(AttributeError, match="pad_token_id"):
        GKDTrainer(student, teacher, args=plain.args, train_dataset=data)
    with pytest.raises(AttributeError, match="config"):
        make(teacher_model=None, teacher_model_name_or_path=teacher)


def test_there_is_no_branch_for_fsdp():
    from trl.models.utils import prepare_fsdp

    assert callable(prepare_fsdp)
    assert "fsdp" not in inspect.getsource(GKDTrainer.__init__).lower()


def test_the_teacher_keeps_keys_and_values_that_nobody_reads(make):
    trainer, kept = make(max_steps=1), []
    for model in (trainer.model, trainer.teacher_model):
        model.register_forward_hook(lambda _, __, outputs: kept.append(outputs.past_key_values is not None))
    trainer.train()
    assert kept == [False, True]


def test_the_teacher_gets_no_gradient_although_it_is_not_frozen(make):
    trainer = make(max_steps=1)
    trainer.train()
    assert all(weight.requires_grad and weight.grad is None for weight in trainer.teacher_model.parameters())


# ------------------------------------------------------------------------------------------------------------- sampling


class Writer:
    """Stands in for a model: writes what it is told to."""

    def __init__(self, *answers):
        self.answers = torch.tensor(answers)

    def generate(self, input_ids, **kwargs):
        return SimpleNamespace(sequences=torch.cat([input_ids, self.answers], dim=1))


@pytest.mark.parametrize(
    ("end", "labelled"),
    [
        (END, [[7, 8, END], [9, 9, 9, 9, 9], [END]]),
        ([END, 8], [[7, 8], [9, 9, 9, 9, 9], [END]]),
        (None, [[7, 8, END, PAD, PAD], [9, 9, 9, 9, 9], [END, 5, 5, 5, 5]]),
    ],
    ids=["one end token", "several", "none"],
)
def test_the_labels_of_a_sampled_answer_end_with_its_first_end_token(end, labelled):
    batch = {
        "prompts": torch.tensor([[PAD, 4], [5, PAD], [5, 6]]),
        "prompt_attention_mask": torch.tensor([[0, 1], [1, 1], [1, 1]]),
    }
    answers = [7, 8, END, PAD, PAD], [9] * 5, [END, 5, 5, 5, 5]
    _, mask, labels = GKDTrainer.generate_on_policy_outputs(Writer(*answers), batch, GenerationConfig(eos_token_id=end))
    assert [[i for i in row if i != -100] for row in labels.tolist()] == labelled
    assert (labels[:, :2] == -100).all()
    assert mask[:, :2].tolist() == batch["prompt_attention_mask"].tolist()
    assert mask[:, 2:].tolist() == (labels[:, 2:] != -100).int().tolist()


def test_a_pad_token_equal_to_eos_does_no_harm(make):
    trainer = make(processing_class=tokenizer(pad="<|end|>"))
    batch = batch_of(trainer, ROWS[:2])
    assert texts(batch) == ["1+2=3 #3<|end|>", "7+12=19 #19<|end|>"]
    answers = [7, END, END], [7, 8, END]
    _, mask, labels = trainer.generate_on_policy_outputs(Writer(*answers), batch, trainer.generation_config)
    assert labels[:, -3:].tolist() == [[7, END, -100], [7, 8, END]]
    assert mask[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 0]


def test_sampling_takes_what_is_not_set_from_the_model(make, student):
    model = Qwen3ForCausalLM.from_pretrained(student)
    for name, value in {"repetition_penalty": 7.0, "min_p": 0.3, "top_k": 3, "top_p": 0.2, "temperature": 0.1}.items():
        setattr(model.generation_config, name, value)
    trainer, used = make(model=model), []
    processors = model._get_logits_processor
    model._get_logits_processor = lambda generation_config, *args, **kwargs: (
        used.append(copy.copy(generation_config)) or processors(generation_config, *args, **kwargs)
    )
    with gkd_trainer.unwrap_model_for_generation(
        trainer.model, trainer.accelerator, generation_kwargs=trainer.generation_kwargs
    ) as unwrapped:
        trainer.generate_on_policy_outputs(unwrapped, batch_of(trainer), trainer.generation_config)
    assert (used[0].repetition_penalty, used[0].min_p) == (7.0, 0.3)
    assert (used[0].top_k, used[0].top_p, used[0].temperature) == (0, 1.0, 0.9)
    trainer.generation_config.repetition_penalty = 1.0  # the remedy
    trainer.generate_on_policy_outputs(trainer.model, batch_of(trainer), trainer.generation_config)
    assert used[1].repetition_penalty == 1.0


def test_end_tokens_are_those_of_the_students_generation_config(make, student):
    model = Qwen3ForCausalLM.from_pretrained(student)
    model.generation_config.eos_token_id = [END, 5]
    assert make(model=model).generation_config.eos_token_id == [END, 5]


def test_checkpointing_takes_the_cache_away(make, tmp_path):
    assert GKDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False).gradient_checkpointing
    assert make(**{CHECKPOINTING: True}).generation_config.use_cache is False
    assert make().generation_config.use_cache is True


def while_sampling(model, look) -> list:
    seen, generate = [], model.generate

    def spy(*args, **kwargs):
        seen.append(look(model, kwargs))
        return generate(*args, **kwargs)

    model.generate = spy
    return seen


def test_answers_are_sampled_in_training_mode_but_for_the_first(make):
    trainer = make(lmbda=1.0, max_steps=3)
    seen = while_sampling(trainer.model, lambda model, _: model.training)
    trainer.train()
    assert seen == [False, True, True]


def test_after_an_evaluation_answers_are_sampled_in_evaluation_mode_once(make):
    rows = make().train_dataset
    trainer = make(lmbda=1.0, max_steps=3, eval_dataset=rows, eval_strategy="steps", eval_steps=2)
    seen = while_sampling(trainer.model, lambda model, _: model.training)
    trainer.train()
    assert seen == [False, True, False]


def test_the_settings_of_checkpointing_are_lost_while_sampling(make):
    def settings(trainer):
        return next(m for m in trainer.model.modules() if hasattr(m, "_gradient_checkpointing_func"))

    kept = {}
    for lmbda in (0.0, 1.0):
        mine = {CHECKPOINTING: True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        if CHECKPOINTING == "activation_checkpointing":
            mine["activation_checkpointing_kwargs"] = mine.pop("gradient_checkpointing_kwargs")
        trainer = make(lmbda=lmbda, max_steps=1, **mine)
        seen = while_sampling(trainer.model, lambda model, _: model.is_gradient_checkpointing)
        trainer.train()
        assert seen == [False] * int(lmbda)
        kept[lmbda] = settings(trainer)._gradient_checkpointing_func.keywords["use_reentrant"]
    assert kept == {0.0: True, 1.0: False}


def test_the_dropout_of_an_adapter_is_switched_off(make):
    adapter = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5)
    off, on = make(peft_config=adapter), make(peft_config=adapter, disable_dropout=False)
    rates = [{m.p for m in t.model.modules() if isinstance(m, torch.nn.Dropout)} for t in (off, on)]
    assert rates == [{0}, {0.5}]


def test_the_teacher_writes_where_the_student_does_not(make, teacher):
    model = Qwen3ForCausalLM.from_pretrained(teacher)
    model.generation_config.eos_token_id = 9
    for lmbda, seq_kd, expected in (
        (0.0, True, (0, 2)),
        (1.0, True, (2, 0)),
        (1.0, False, (2, 0)),
        (0.0, False, (0, 0)),
    ):
        trainer = make(lmbda=lmbda, seq_kd=seq_kd, teacher_model=copy.deepcopy(model))
        students = while_sampling(trainer.model, lambda *_: 1)
        teachers = while_sampling(trainer.teacher_model, lambda _, kwargs: kwargs["generation_config"])
        seen = watch(trainer)
        trainer.train()
        assert (len(students), len(teachers)) == expected
        assert all(settings.eos_token_id == END and settings.do_sample for settings in teachers)
        if seq_kd and not lmbda:
            assert not {text for call in seen for text in call.texts} & {r["messages"][1]["content"] for r in ROWS}


def test_one_number_decides_for_a_micro_batch_and_follows_from_the_seed(make):
    trainer = make(lmbda=0.5, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=3, seed=5)
    seen, answers = watch(trainer), {r["messages"][1]["content"] + "<|end|>" for r in ROWS}
    trainer.train()
    dice = random.Random(5)
    sampled = [call.texts[0] not in answers for call in seen]
    assert sampled == [dice.random() <= 0.5 for _ in range(12)]
    assert any(len(set(sampled[i : i + 4])) == 2 for i in (0, 4, 8))  # both kinds in one optimizer step


# ---------------------------------------------------------------------------------------------- what it is divided by


def test_sampled_answers_are_divided_by_the_tokens_of_the_data(make):
    for lmbda in (0.0, 1.0):
        trainer = make(ROWS[:2], lmbda=lmbda, max_new_tokens=40, max_steps=1)
        seen = watch(trainer)
        trainer.train()
        assert seen[0].n == len("1+2=3 #3.7+12=19 #19.")
        if lmbda:
            assert seen[0].compared > 1.5 * seen[0].n


def test_the_loss_of_sampled_answers_grows_as_the_data_gets_shorter(make):
    found = {}
    for answer in ("3", "1+2=3 #3 1+2=3"):
        trainer = make([row("1+2", answer)] * 2, lmbda=1.0, max_steps=1)
        seen = watch(trainer)
        found[answer] = trained(trainer)[0]["loss"], seen[0].texts, seen[0].n
    (short, texts_short, n_short), (long, texts_long, n_long) = found.values()
    assert texts_short == texts_long
    assert short / long == pytest.approx(n_long / n_short, rel=1e-3)
    assert n_long / n_short == 15 / 2


def test_without_the_count_the_loss_is_a_mean_over_what_is_compared(make):
    trainer = make(ROWS[:2], lmbda=1.0, max_new_tokens=40, max_steps=1)
    trainer.model_accepts_loss_kwargs = False
    seen = watch(trainer)
    trainer.train()
    assert seen[0].n is None


def test_accumulation_is_exact_for_the_answers_of_the_data(make):
    gradients = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = make(per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1)
        trainer.optimizer_cls_and_kwargs = None
        before = {}

        def keep(trainer=trainer, before=before):
            before["gradient"] = gradient_of(trainer).clone()

        step = trainer.training_step

        def spy(*args, step=step, keep=keep, **kwargs):
            loss = step(*args, **kwargs)
            keep()
            return loss

        trainer.training_step = spy
        trainer.train()
        gradients.append(before["gradient"])
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-8)


def test_several_processes_divide_the_gradient_twice(make, plain, monkeypatch):
    """transformers multiplies by the number of processes, as gradients will be averaged; GKD's own method does not."""
    rows = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in ROWS[:2]]
    args = {k: getattr(plain.args, k) for k in ("output_dir", "use_cpu", "bf16", "report_to", "disable_tqdm")}
    sft = SFTTrainer(
        plain.model.name_or_path,
        args=SFTConfig(**args),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    assert sft.args.average_tokens_across_devices
    found = {}
    for processes in (1, 2):
        monkeypatch.setattr(type(plain.accelerator), "num_processes", property(lambda _, n=processes: n))
        n = torch.tensor(20 * processes)  # the count is that of all processes
        batch = sft.data_collator([sft.train_dataset[i] for i in range(2)])
        found[processes] = (
            float(sft.compute_loss(sft.model, batch, num_items_in_batch=n).detach()),
            loss_of(plain, batch_of(plain), num_items_in_batch=n),
        )
    assert found[2][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[2][1] == pytest.approx(found[1][1] / 2, rel=1e-5)


def test_the_cache_of_the_gpu_is_emptied_after_every_micro_batch(make, monkeypatch):
    calls = []
    monkeypatch.setattr(gkd_trainer, "empty_cache", lambda: calls.append(1))
    make(per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2).train()
    assert len(calls) == 4


# --------------------------------------------------------------------------------------------------- options of SFT


def test_options_of_sft_do_nothing(make, plain):
    expected = trained(make(max_steps=1))[0]["loss"]
    for more in (
        {"completion_only_loss": False},
        {"loss_type": "nll"},
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.3},
        {"packing": True, "packing_strategy": "wrapped"},
        {"formatting_func": lambda example: "nothing of it"},
        {"dataset_text_field": "nothing", "pad_to_multiple_of": 64},
    ):
        assert trained(make(max_steps=1, **more))[0]["loss"] == expected, more


@pytest.mark.parametrize("more", [{"packing": True}, {"padding_free": True}])
def test_packing_is_refused_with_a_message_about_a_collator(make, more):
    with pytest.raises(ValueError, match="custom data collator is not supported when using padding-free"):
        make(**more)


HEAD = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}


def test_an_adapter_on_the_head_needs_another_loss_type(make):
    with pytest.raises(ValueError, match="lm_head"):
        make(peft_config=LoraConfig(**HEAD))
    trainer = make(peft_config=LoraConfig(**HEAD), loss_type="nll")
    trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    assert all(w.grad.abs().sum() > 0 for n, w in trainer.model.named_parameters() if "lm_head.lora" in n)


def test_the_configuration_refuses_numbers_outside_of_0_to_1(make):
    for name in ("lmbda", "beta"):
        with pytest.raises(ValueError, match=rf"{name} must be in the range"):
            make(**{name: 1.1})


# ------------------------------------------------------------------------------------------------------- the Liger path


class Kernel:
    """Stands in for Liger's kernel: a mean of the divergence over the tokens with a label, from hidden states."""

    def __init__(self, **settings):
        self.settings = settings

    def __call__(
        self, student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias
    ):
        ours, theirs = student_input @ student_weight.T, teacher_input @ teacher_weight.T
        return JSD(ours, theirs, true_labels, beta=self.settings["beta"])


@pytest.fixture
def liger(make, monkeypatch):
    monkeypatch.setattr(gkd_trainer, "LigerFusedLinearJSDLoss", Kernel, raising=False)

    def build(model=None, teacher_model=None, peft_config=None, **more):
        plain = make(model=model, loss_type="nll", **more)
        plain.args.use_liger_kernel = True  # as a setting it would also patch the model, which needs the real kernel
        plain.args.dataset_kwargs = None
        return GKDTrainer(
            plain.model,
            teacher_model or plain.teacher_model,
            args=plain.args,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer(),
            peft_config=peft_config,
        )

    return build


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_liger_computes_the_same_loss_and_divides_it_the_same_way(liger, beta):
    trainer = liger(beta=beta)
    ours = {"beta": beta, "ignore_index": -100, "compiled": False, "weight_hard_loss": 0.0, "weight_soft_loss": 1.0}
    assert trainer.liger_loss.settings == ours
    batch = batch_of(trainer)
    for n in (None, 5):
        fused = loss_of(trainer, batch, num_items_in_batch=n)
        trainer.use_liger_gkd_loss = False
        assert fused == pytest.approx(loss_of(trainer, batch, num_items_in_batch=n), rel=1e-5)
        trainer.use_liger_gkd_loss = True


def test_liger_goes_around_bf16(make, liger):
    assert types_of_products(make(bf16=True, lmbda=0.0)) == {torch.bfloat16}
    trainer = liger(bf16=True, lmbda=0.0)
    trainer.args.use_liger_kernel = False
    assert trainer.use_liger_gkd_loss and types_of_products(trainer) == {torch.float32}


def test_liger_keeps_the_beta_that_it_was_built_with(liger):
    trainer = liger(beta=0.5)
    before = loss_of(trainer, batch_of(trainer))
    trainer.beta = 0.0
    assert loss_of(trainer, batch_of(trainer)) == before
    trainer.use_liger_gkd_loss = False
    assert loss_of(trainer, batch_of(trainer)) != pytest.approx(before, rel=0.1)


def test_liger_passes_over_an_adapter_on_the_head(liger):
    trainer = liger(peft_config=LoraConfig(**HEAD))
    trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    found = {n: w.grad for n, w in trainer.model.named_parameters() if w.requires_grad}
    assert all(grad is None for name, grad in found.items() if "lm_head" in name)
    assert all(grad.abs().sum() > 0 for name, grad in found.items() if "q_proj" in name)


def test_liger_passes_over_capped_logits(liger):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**config(final_logit_softcapping=0.1)))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    trainer = liger(model=model)
    fused = loss_of(trainer, batch_of(trainer))
    trainer.use_liger_gkd_loss = False
    assert loss_of(trainer, batch_of(trainer)) != pytest.approx(fused, rel=1e-2)


# ------------------------------------------------------------------------------------------------------- the neighbours


def test_with_a_sure_teacher_the_forward_kl_is_the_loss_of_sft(page):
    logits, token = torch.randn(11, generator=torch.Generator().manual_seed(0)), 4
    sure = 200.0 * torch.nn.functional.one_hot(torch.tensor(token), 11)
    assert float(page["generalized_jsd"](logits, sure, 0)) == pytest.approx(float(page["sft_loss"](logits, token)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_on_the_page_is_what_trl_computes(page, temperature):
    dice = torch.Generator().manual_seed(0)
    h_s, h_t = torch.randn(2, 5, 8, generator=dice), torch.randn(2, 5, 12, generator=dice)
    w_s, w_t = torch.randn(30, 8, generator=dice), torch.randn(30, 12, generator=dice)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    sizes = (
        {"chunk_size": 4}
        if "chunk_size" in inspect.signature(distillation_trainer._chunked_divergence_loss).parameters
        else {}
    )
    for beta in BETAS:
        theirs = distillation_trainer._chunked_divergence_loss(
            h_s, h_t, w_s, w_t, mask, beta=beta, temperature=temperature, **sizes
        )[0]
        each = page["distillation_loss"](h_s @ w_s.T, h_t @ w_t.T, beta, temperature)
        agree((each * mask).sum() / mask.sum(), theirs)


def test_the_defaults_of_distillation_are_those_on_the_page(page, tmp_path):
    from trl import DistillationConfig

    args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    ours = inspect.signature(page["distillation_loss"]).parameters
    assert (ours["beta"].default, ours["temperature"].default) == (args.beta, args.temperature)


def test_what_this_page_leaves_to_the_page_about_sft_is_the_same_code():
    own = {name for name, value in vars(GKDTrainer).items() if inspect.isfunction(value)}
    assert own == {"__init__", "compute_loss", "_liger_student_forward", "training_step"}
    assert issubclass(GKDTrainer, SFTTrainer)


# ------------------------------------------------------------------------------------------------------- the page itself


def test_the_top_level_has_no_gkd_and_the_collator_has_moved():
    import trl
    import trl.trainer.utils

    assert not hasattr(trl, "GKDTrainer")
    assert not hasattr(trl.trainer.utils, "DataCollatorForChatML")


def test_one_combination_warns_about_the_stable_trainer(make, caplog):
    for lmbda, temperature, warns in ((1.0, 1.0, True), (1.0, 0.9, False), (0.5, 1.0, False)):
        caplog.clear()
        make(lmbda=lmbda, temperature=temperature)
        assert any("DistillationTrainer" in r.getMessage() for r in caplog.records) == warns


def test_the_script_mends_the_division_as_the_page_says():
    assert "trainer.model_accepts_loss_kwargs = False" in (EXAMPLES / "gkd.py").read_text("utf-8")


def test_the_first_loss_of_the_toy_is_far_below_the_bound():
    first = json.loads(MEASURED.read_text("utf-8"))["held_out"]["loss"]["before"]
    assert all(0.001 < value < 0.01 for value in first)
