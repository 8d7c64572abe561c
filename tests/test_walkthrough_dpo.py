"""The claims of annotated_trainers/dpo.md that running TRL can show, on a random model of two layers, on the CPU."""

import functools
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.data_utils import extract_prompt, is_conversational
from trl.trainer import dpo_trainer
from walkthrough_tools import (
    LOG2,
    PAGES,
    TEMPLATE,
    batch_of,
    changed,
    config,
    experts,
    first_cells,
    loss_of,
    make_trainer,
    metrics_on,
    model_folder,
    page_of,
    pair,
    raise_logits,
    save,
    section_of,
    tokenizer,
    trained,
    types_of_products,
)
from walkthrough_tools import PAIRS as ROWS

PAGE = PAGES / "dpo.md"
section = functools.partial(section_of, PAGE)
checkpoint = model_folder()


@pytest.fixture
def build(checkpoint, tmp_path):
    """Makes a DPOTrainer; keyword arguments of DPOTrainer go there, all others to DPOConfig."""

    def make(rows=ROWS, model=None, **more) -> DPOTrainer:
        sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 2}
        return make_trainer(DPOTrainer, DPOConfig, tmp_path / "run", rows, model=model or checkpoint, **sizes | more)

    return make


def with_reference(trainer: DPOTrainer, batch: dict, chosen: list[float], rejected: list[float]) -> dict:
    """Gives a batch the log-ratios `chosen` and `rejected`, by choosing the reference's log-probabilities."""
    trainer.precompute_ref_logps = True
    with torch.no_grad():
        logits = trainer.model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = torch.log_softmax(logits, -1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    logps = (logps * batch["completion_mask"][:, 1:]).sum(-1)
    ratios = torch.tensor(chosen + rejected)
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = (logps - ratios).chunk(2)
    return batch


# ------------------------------------------------------------------------------------------------------- what is logged


def test_the_page_lists_exactly_the_keys_that_a_run_logs(build, tmp_path):
    model = save(experts(output_router_logits=False), tmp_path / "moe")
    trainer = build(model=model, eval_dataset=Dataset.from_list(ROWS), eval_strategy="epoch")
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert set(metrics_on(PAGE)) == logged


def test_a_dense_model_logs_no_auxiliary_loss(build):
    assert "aux_loss" not in trained(build())[0]


def test_accuracy_starts_at_0_and_not_at_one_half(build):
    first = trained(build())[0]
    assert first["rewards/margins"] == 0.0
    assert first["rewards/accuracies"] == 0.0
    assert first["loss"] == pytest.approx(LOG2)


def test_the_first_loss_of_every_type_is_the_one_in_the_table(build):
    trainer = build(label_smoothing=1e-3)
    batch = batch_of(trainer, range(4))
    table = {cells[0].strip("`"): cells[1] for cells in first_cells(section("The first loss, by type"))}
    quoted = re.search(r"Should be one of \[(.*?)\]", inspect.getsource(DPOTrainer._compute_loss), re.S)[1]
    assert set(table) == set(re.findall(r"'(\w+)'", quoted))
    for loss_type, value in table.items():
        trainer.loss_types, trainer.loss_weights = [loss_type], [1.0]
        trainer.label_smoothing = 1e-3 if loss_type == "exo_pair" else 0.0
        if loss_type == "sft":
            assert value == "the mean cross-entropy"
            assert loss_of(trainer, batch) == pytest.approx(math.log(trainer.model.config.vocab_size), rel=0.05)
        else:
            assert loss_of(trainer, batch) == pytest.approx(float(value), abs=1e-4), loss_type


def test_the_level_of_the_logits_means_nothing(build):
    trainer = build()
    batch = batch_of(trainer, range(2))
    before, level = loss_of(trainer, batch), trainer._metrics["eval"]["logits/chosen"].pop()
    raise_logits(trainer.model, 5)
    assert loss_of(trainer, batch) == pytest.approx(before, abs=1e-6)
    assert trainer._metrics["eval"]["logits/chosen"].pop() == pytest.approx(level + 5, abs=1e-4)


def test_logged_rewards_ignore_the_divergence(build):
    trainer = build(f_divergence_type="js_divergence")
    batch = with_reference(trainer, batch_of(trainer, range(2)), [4.0, 4.0], [-4.0, -4.0])
    loss = loss_of(trainer, batch)
    assert trainer._metrics["eval"]["rewards/margins"] == [pytest.approx(0.8, abs=1e-4)]
    assert loss > -torch.nn.functional.logsigmoid(torch.tensor(0.8)).item() + 0.05


def test_tokens_are_counted_with_the_prompt_twice(build):
    trainer = build(max_steps=1)
    rows = [trainer.train_dataset[i] for i in range(4)]
    trainer.args.per_device_train_batch_size, trainer._train_batch_size = 4, 4
    expected = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    assert trained(trainer)[0]["num_tokens"] == expected


def test_what_was_not_logged_appears_in_the_last_line(build):
    trainer = build(max_steps=3, logging_steps=2)
    trainer.train()
    last = trainer.state.log_history[-1]
    assert {"train_runtime", "rewards/margins", "entropy"} <= set(last)
    assert "loss" not in last


def test_two_evaluation_sets_share_one_name_for_their_rewards(build):
    halves = {"a": Dataset.from_list(ROWS[:2]), "b": Dataset.from_list(ROWS[2:])}
    trainer = build(eval_dataset=halves)
    trainer.train()
    both = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_rewards/margins"} <= set(both)
    assert not {"eval_a_rewards/margins", "eval_b_rewards/margins"} & set(both)
    only = {name: trainer.evaluate(data)["eval_rewards/margins"] for name, data in halves.items()}
    assert only["a"] != only["b"]
    assert trainer.evaluate(halves)["eval_rewards/margins"] in only.values()


# ------------------------------------------------------------------------------------------------------- the reference


def test_the_reference_is_loaded_from_the_path_and_not_copied(build, checkpoint):
    first = trained(build(model=changed(Qwen3ForCausalLM.from_pretrained(checkpoint))))[0]
    assert first["rewards/margins"] != 0.0
    assert first["loss"] != pytest.approx(LOG2, abs=1e-3)


def test_precomputing_takes_the_model_in_memory_as_reference(build, checkpoint):
    model = changed(Qwen3ForCausalLM.from_pretrained(checkpoint))
    first = trained(build(model=model, precompute_ref_log_probs=True))[0]
    assert first["loss"] == pytest.approx(LOG2, abs=1e-6)


def test_a_model_without_a_path_gets_no_reference(build):
    with pytest.raises(OSError, match="Repo id must use alphanumeric chars"):
        build(model=Qwen3ForCausalLM(Qwen3Config(**config())))


def test_the_reference_is_float32_beside_a_bfloat16_policy(build, checkpoint):
    def policy():
        return Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)

    trainer = build(model=policy())
    assert (trainer.model.dtype, trainer.ref_model.dtype) == (torch.bfloat16, torch.float32)
    trainer = build(model=policy(), model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.ref_model.dtype == torch.bfloat16


def test_a_sum_in_bfloat16_moves_in_quarters(build, checkpoint):
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    trainer = build(model=model, precompute_ref_log_probs=True)
    values = trainer.train_dataset["ref_chosen_logps"]
    assert all(32 < -value < 64 and (value * 4).is_integer() for value in values)


def test_precomputed_values_are_made_outside_mixed_precision(build):
    assert trained(build(bf16=True))[0]["rewards/chosen"] == 0.0
    assert trained(build(bf16=True, precompute_ref_log_probs=True))[0]["rewards/chosen"] != 0.0


def stored(folder: Path):
    """A data set on disk, so that `datasets` caches what is made from it; opened anew by each call."""
    Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return lambda: datasets.load_dataset(
        "parquet", data_files=str(folder / "rows.parquet"), split="train", cache_dir=str(folder / "cache")
    )


def test_without_max_length_cached_values_ignore_a_changed_ld_alpha(build, tmp_path):
    load = stored(tmp_path)
    build(load(), precompute_ref_log_probs=True, max_length=None)
    stale = trained(build(load(), precompute_ref_log_probs=True, max_length=None, ld_alpha=0.0))[0]
    assert abs(stale["rewards/margins"]) > 0.01
    build(load(), precompute_ref_log_probs=True, max_length=64)
    fresh = trained(build(load(), precompute_ref_log_probs=True, max_length=64, ld_alpha=0.0))[0]
    assert fresh["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_an_explicit_reference_stays_in_memory_after_precomputing(build, checkpoint):
    other = Qwen3ForCausalLM.from_pretrained(checkpoint)
    assert build(ref_model=other, precompute_ref_log_probs=True).ref_model is not None
    assert build(precompute_ref_log_probs=True).ref_model is None


def test_values_of_your_own_are_ignored_or_refused(build):
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -9.0} for row in ROWS]
    assert trained(build(rows))[0]["loss"] == pytest.approx(LOG2)
    with pytest.raises(ValueError, match="can't have duplicated columns"):
        build(rows, precompute_ref_log_probs=True)


def test_attention_dropout_stays_on(build, tmp_path):
    torch.manual_seed(0)
    noisy = save(Qwen3ForCausalLM(Qwen3Config(**config(attention_dropout=0.5))), tmp_path / "noisy")
    assert trained(build(model=noisy))[0]["rewards/margins"] != 0.0


def test_dropout_of_an_adapter_is_switched_off(build):
    lora = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.3)

    def rates(trainer):
        return {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}

    assert rates(build(peft_config=lora)) == {0}
    assert rates(build(peft_config=lora, disable_dropout=False)) == {0.3}


def test_a_trained_adapter_is_copied_and_saved_with_every_checkpoint(build, checkpoint):
    def adapted(**more):
        return get_peft_model(Qwen3ForCausalLM.from_pretrained(checkpoint), LoraConfig(task_type="CAUSAL_LM"), **more)

    trainer = build(model=adapted(), save_strategy="steps", save_steps=2)
    assert list(trainer.model.peft_config) == ["default", "ref"]
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-2"
    assert (folder / "adapter_model.safetensors").is_file()
    assert (folder / "ref" / "adapter_model.safetensors").is_file()
    with pytest.raises(KeyError, match="default"):
        build(model=adapted(adapter_name="sft"))


def test_resuming_forgets_a_synchronized_reference_and_the_token_count(build, checkpoint):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "save_strategy": "steps", "save_steps": 1}
    first = build(**settings)
    log = trained(first)
    name, original = next(iter(Qwen3ForCausalLM.from_pretrained(checkpoint).named_parameters()))
    assert not torch.equal(first.ref_model.get_parameter(name), original)

    second = build(**settings)
    seen, compute = [], second._compute_loss

    def watched(*args, **kwargs):
        seen.append(second.ref_model.get_parameter(name).clone())
        return compute(*args, **kwargs)

    second._compute_loss = watched
    second.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-1"))
    assert torch.equal(seen[0], original)
    assert second.state.log_history[-2]["num_tokens"] == log[1]["num_tokens"] - log[0]["num_tokens"]


# ------------------------------------------------------------------------------------------------------- the data


def test_extract_prompt_reads_the_last_character_when_nothing_is_shared():
    assert extract_prompt({"chosen": "yes ", "rejected": "no"}) == {"prompt": "yes", "chosen": " ", "rejected": "o"}
    assert extract_prompt({"chosen": "yes", "rejected": "no"}) == {"prompt": "", "chosen": "yes", "rejected": "no"}


def test_extract_prompt_cuts_inside_a_word():
    row = {"chosen": "It is warm", "rejected": "It is wet"}
    assert extract_prompt(row) == {"prompt": "It is w", "chosen": "arm", "rejected": "et"}


def test_extract_prompt_of_an_empty_answer_fails():
    with pytest.raises(UnboundLocalError):
        extract_prompt({"chosen": "", "rejected": "no"})


def test_text_prompt_beside_messages_is_judged_by_chance():
    row = {key: value for key, value in ROWS[0].items() if key != "prompt"} | {"prompt": "1+2"}
    code = f"from typing import Any\n{inspect.getsource(is_conversational)}\nprint(is_conversational({row!r}))"
    verdicts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in range(12)
    }
    assert verdicts == {"True", "False"}


def test_text_prompt_beside_messages_fails_either_way(build):
    with pytest.raises((TypeError, AttributeError)):
        build([{**row, "prompt": "1+2"} for row in ROWS])


def test_a_prompt_repeated_in_the_answers_is_trained_on(build):
    rows = [
        {**row, "chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in ROWS
    ]
    trainer = build(rows, processing_class=tokenizer())
    row = trainer.train_dataset[0]
    assert trainer.processing_class.decode(row["chosen_ids"]) == "1+2<|end|><|assistant|>1+2=3 #3<|end|>"


def test_tokens_that_merge_across_the_boundary_are_lost(build):
    merging = tokenizer(merges=[("a", "b")], more=["ab"])
    row = build([{"prompt": "ca", "chosen": "bc", "rejected": "cc"}] * 2, processing_class=merging).train_dataset[0]
    assert merging.decode(row["prompt_ids"] + row["chosen_ids"]) == "cac<|end|>"
    assert merging.decode(row["prompt_ids"] + row["rejected_ids"]) == "cacc<|end|>"


def test_text_gets_an_eos_token_and_messages_do_not(build):
    row = build([{"prompt": "1+2", "chosen": "3", "rejected": "4"}] * 2).train_dataset[0]
    assert row["chosen_ids"][-1] == tokenizer().eos_token_id
    open_ended = tokenizer(template=TEMPLATE.replace("<|end|>", ""))
    row = build(processing_class=open_ended).train_dataset[0]
    assert open_ended.eos_token_id not in row["chosen_ids"]


def test_a_pad_token_equal_to_eos_does_no_harm(build):
    trainer = build(processing_class=tokenizer(pad=None))
    assert trainer.processing_class.pad_token == "<|end|>"
    batch = batch_of(trainer, range(2))
    assert batch["input_ids"][0, -1] == trainer.processing_class.eos_token_id
    for ids, mask, attention in zip(
        *(batch[k] for k in ("input_ids", "completion_mask", "attention_mask")), strict=True
    ):
        last = int(attention.sum()) - 1
        assert ids[last] == trainer.processing_class.eos_token_id
        assert mask[last] == 1
        assert mask[last + 1 :].sum() == 0


def test_rows_whose_prompt_fills_max_length_are_dropped_silently(build):
    trainer = build(max_length=7)  # the second prompt has seven tokens
    assert len(trainer.train_dataset) == 3
    trainer = build(max_length=3)
    with pytest.raises(ValueError, match="num_samples=0"):
        trainer.train()


def test_an_emptied_evaluation_set_gives_no_loss(build):
    assert "eval_loss" not in build(max_length=7, eval_dataset=Dataset.from_list(ROWS[1:2])).evaluate()


def test_an_empty_data_set_stops_without_a_message(build):
    with pytest.raises(StopIteration):
        build(Dataset.from_list(ROWS).select([]))


def test_a_pair_that_differs_behind_the_cut_teaches_nothing(build):
    trainer = build([pair("1+2", "1+2=3 #3", "1+2=3 #4")] * 4, max_length=12)
    first = trained(trainer)[0]
    assert first["grad_norm"] == pytest.approx(0.0, abs=1e-6)
    assert first["rewards/accuracies"] == 0.0


def test_tokenized_data_is_not_recognized(build):
    trainer = build(eval_dataset=Dataset.from_list(ROWS))
    tokens = trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    with pytest.raises(KeyError, match="chosen"):
        build(tokens)
    with pytest.raises(KeyError, match="chosen"):
        trainer.evaluate(tokens)


def test_predict_does_not_prepare_its_data_set(build):
    with pytest.raises(ValueError, match="No columns in the dataset match"):
        build().predict(Dataset.from_list(ROWS))


# ------------------------------------------------------------------------------------------------------- the loss


def test_sigmoid_ignores_label_smoothing(build):
    plain, smoothed = ([line["loss"] for line in trained(build(label_smoothing=value))] for value in (0.0, 0.3))
    assert plain == smoothed


def test_an_unknown_name_is_found_at_the_first_step(build):
    for trainer in (build(loss_type=["kto_pair"]), build(f_divergence_type="total_variation")):
        with pytest.raises(ValueError, match="Unknown"):
            trainer.train()


def test_loss_weights_are_not_normalized(build):
    one = trained(build(loss_type=["sigmoid", "hinge"]))[0]["loss"]
    assert one == pytest.approx(LOG2 + 1)
    halved = trained(build(loss_type=["sigmoid", "hinge"], loss_weights=[0.5, 0.5]))[0]["loss"]
    assert halved == pytest.approx((LOG2 + 1) / 2)


@pytest.mark.parametrize(
    ("loss_type", "message"), [("hinge", "modified by an inplace"), ("sft", "single memory location")]
)
def test_weighting_fails_with(build, loss_type, message):
    with pytest.raises(RuntimeError, match=message):
        build(loss_type=[loss_type], use_weighting=True).train()


def test_a_weight_can_exceed_one(build):
    trainer = build(use_weighting=True)
    batch, forward = batch_of(trainer, range(2)), trainer.model.forward

    def confident(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        labels = batch["input_ids"].roll(-1, 1)
        # probability 1/2 for the label, 1/2 spread over the rest: about 1/2 over 1/4, so a weight of about 2 per answer
        right = torch.nn.functional.one_hot(labels, outputs.logits.shape[-1])
        outputs.logits = right * math.log(outputs.logits.shape[-1] - 1)
        return outputs

    trainer.model.forward = trainer.ref_model.forward = confident
    assert loss_of(trainer, batch) > 3.5 * LOG2


def test_forward_kl_overflows_where_alpha_divergence_is_clamped(build):
    trainer = build(f_divergence_type="forward_kl")
    batch = with_reference(trainer, batch_of(trainer, range(2)), [-100.0, -100.0], [-100.0, -100.0])
    assert math.isnan(loss_of(trainer, batch))
    trainer.f_divergence_type, trainer.f_alpha_divergence_coef = "alpha_divergence", 0.1
    assert loss_of(trainer, batch) == pytest.approx(LOG2)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9])
def test_the_alpha_of_trl_is_one_minus_the_alpha_of_the_paper(build, alpha):
    trainer = build(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 - alpha)
    chosen, rejected = [1.5, -0.5], [-1.0, 2.0]
    batch = with_reference(trainer, batch_of(trainer, range(2)), chosen, rejected)
    ratio = {"w": torch.tensor(chosen).exp(), "l": torch.tensor(rejected).exp()}
    paper = {key: (1 - u**-alpha) / alpha for key, u in ratio.items()}
    expected = -torch.nn.functional.logsigmoid(0.1 * (paper["w"] - paper["l"])).mean()
    assert loss_of(trainer, batch) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_sorting_needs_more_than_one_pair(build, loss_type):
    trainer = build()

    def distance(chosen, rejected):
        batch = with_reference(trainer, batch_of(trainer, range(len(chosen))), chosen, rejected)
        values = []
        for trainer.loss_types in (["sigmoid"], [loss_type]):
            values.append(loss_of(trainer, batch))
        return abs(values[1] - values[0])

    assert distance([3.0], [-4.0]) < 1e-6
    # one of the two puts policy and reference in different orders, whatever the random policy says
    assert max(distance([3.0, -2.0], [-4.0, 8.0]), distance([-2.0, 3.0], [8.0, -4.0])) > 1e-3


def test_without_a_prompt_the_mean_divides_by_one_token_too_many(build):
    trainer = build(loss_type=["sigmoid_norm"], beta=1.0)
    rows = [{"prompt_ids": [], "chosen_ids": [5, 6, 7, 8, 1], "rejected_ids": [5, 9, 1]}] * 2
    batch = with_reference(trainer, trainer.data_collator(rows), [4.0, 4.0], [-2.0, -2.0])
    delta = torch.tensor(4.0 / 5 - -2.0 / 3)  # 4 and 2 tokens were summed
    assert loss_of(trainer, batch) == pytest.approx(float(-torch.nn.functional.logsigmoid(delta)), abs=1e-5)


@pytest.mark.parametrize(("loss_type", "same"), [("ipo", True), ("sft", False)])
def test_accumulation_changes_the_loss_only_of_a_token_mean(build, loss_type, same):
    rows = [pair("1", "2", "3"), pair("1", "2 or 3 or 4 or 5 or 6", "7")]
    together = build(rows, loss_type=[loss_type], max_steps=1)
    apart = build(
        rows, loss_type=[loss_type], max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    one, two = (trained(trainer)[0]["grad_norm"] for trainer in (together, apart))
    assert (one == pytest.approx(two, rel=1e-4)) == same


def test_padding_free_does_nothing(build):
    trainer = build(padding_free=True)
    assert trainer.padding_free is False
    assert batch_of(trainer, range(3))["attention_mask"].min() == 0


def test_liger_gets_beta_and_the_loss_type_only(build, monkeypatch):
    received = []

    class Kernel:
        def __init__(self, **settings):
            received.append(settings)

        def __call__(self, weight, hidden, labels, bias, ref_hidden, ref_weight, ref_bias):
            half = torch.zeros(labels.shape[0] // 2)
            mean = torch.zeros(())
            return (hidden @ weight.T).mean(), (half, half, mean, mean, mean, half, half)

    monkeypatch.setattr(dpo_trainer, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(dpo_trainer, "LigerFusedLinearDPOLoss", Kernel, raising=False)
    settings = {"label_smoothing": 0.2, "ld_alpha": 0.5, "use_weighting": True, "loss_weights": [0.5]}
    trainer = build(use_liger_kernel=False, loss_type=["robust"], **settings)
    trainer.args.use_liger_kernel = True  # as a setting it would also patch the model, which needs the real kernel
    again = DPOTrainer(
        model=trainer.model, args=trainer.args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer()
    )
    assert received == [{"beta": 0.1, "loss_type": "robust"}]
    again.model.eval()
    again.compute_loss(again.model, batch_of(again, range(2)))
    plain = build()
    loss_of(plain, batch_of(plain, range(2)))
    assert set(plain._metrics["eval"]) - set(again._metrics["eval"]) == {"entropy", "mean_token_accuracy"}

    # bf16 is a wrapper around the model's forward, which the fused loss goes around
    assert types_of_products(build(bf16=True)) == {torch.bfloat16}
    trainer = build(bf16=True)
    trainer.args.use_liger_kernel = True
    again = DPOTrainer(
        model=trainer.model, args=trainer.args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer()
    )
    again.args.use_liger_kernel = False
    assert again.use_liger_kernel and types_of_products(again) == {torch.float32}


# ------------------------------------------------------------------------------------------------------- the neighbours


page = page_of(PAGE)


LOGPS = {"c": torch.tensor([-3.0, -1.5]), "r": torch.tensor([-2.0, -4.0])}


def test_the_key_equation_is_what_trl_computes(build, page):
    trainer = build(beta=0.3)
    chosen, rejected = [1.5, -0.5], [-1.0, 0.75]
    batch = with_reference(trainer, batch_of(trainer, range(2)), chosen, rejected)
    zeros = torch.zeros(2)
    ours = page["dpo_loss"](torch.tensor(chosen), torch.tensor(rejected), zeros, zeros, beta=0.3)
    assert loss_of(trainer, batch) == pytest.approx(float(ours), abs=1e-5)


def test_cpo_on_the_page_is_what_trl_computes(page):
    from trl.experimental.cpo import CPOTrainer

    this = SimpleNamespace(
        alpha=0.0, beta=0.3, label_smoothing=0.0, loss_type="sigmoid", accelerator=SimpleNamespace(device="cpu")
    )
    theirs = CPOTrainer.cpo_loss(this, LOGPS["c"], LOGPS["r"])[0].mean() + 0.7 * 2.0
    ours = page["cpo_loss"](LOGPS["c"], LOGPS["r"], chosen_nll=2.0, beta=0.3, alpha=0.7)
    assert float(ours) == pytest.approx(float(theirs))


def test_orpo_on_the_page_is_what_trl_computes(page):
    from trl.experimental.orpo import ORPOTrainer

    this = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs = 2.0 - ORPOTrainer.odds_ratio_loss(this, LOGPS["c"], LOGPS["r"])[0].mean()
    ours = page["orpo_loss"](LOGPS["c"], LOGPS["r"], chosen_nll=2.0, beta=0.3)
    assert float(ours) == pytest.approx(float(theirs))


def test_bco_on_the_page_is_what_trl_computes(page):
    from trl.experimental.bco import BCOTrainer

    this = SimpleNamespace(beta=0.3, running=SimpleNamespace(mean=0.2), match_underlying_distribution=False)
    theirs = BCOTrainer.bco_loss(
        this, LOGPS["c"], LOGPS["r"], torch.zeros(2), torch.zeros(2), None, None, do_train=False
    )[0].mean()
    ours = page["bco_loss"](LOGPS["c"], LOGPS["r"], reward_shift=0.2, beta=0.3)
    assert float(ours) == pytest.approx(float(theirs))


def test_kto_on_the_page_is_what_trl_computes(page, build, checkpoint, tmp_path):
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in ROWS[:2]]
    rows += [{"prompt": r["prompt"], "completion": r["rejected"], "label": False} for r in ROWS[:2]]
    trainer = KTOTrainer(
        model=changed(Qwen3ForCausalLM.from_pretrained(checkpoint)),
        args=KTOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=4
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.eval()
    sigmoid, torch_sigmoid = [], torch.nn.functional.sigmoid

    def spy(x):
        sigmoid.append(x.detach())
        return torch_sigmoid(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "sigmoid", spy)
        theirs = float(trainer._compute_loss(trainer.model, batch, return_outputs=False).detach())
    kl = trainer._metrics["eval"]["kl"][0]
    chosen, rejected = sigmoid[0] / 0.1 + kl, kl - sigmoid[1] / 0.1
    assert float(page["kto_loss"](chosen, rejected, kl=kl, beta=0.1)) == pytest.approx(theirs, abs=1e-5)
