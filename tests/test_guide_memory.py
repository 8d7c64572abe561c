"""reference_guides/memory.md: its formulas against counted bytes, and its sentences against the measurement and TRL.

TRL has no such quantities, so each formula is compared with a count: of a model's weights, of what autograd saves, of live
tensors (the counter of tools/memory.py), of a cache, of an adapter, of FLOPs. The peaks of the fifteen are those committed
in annotated_examples/expected/memory.json, some of them measured anew.
"""

import inspect
import os
import re

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import compare
import formats
import memory
import pytest
import torch
import troubleshooting
import yaml
from drift import slug
from markdown_pages import GUIDES, ROOT, ran
from memory import COPIES, TOY, TRAINERS, WAYS, peak, predicted, total
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl.experimental.ppo import ppo_trainer
from walkthrough_tools import checked_formulas, noting

ONLINE = ("online_dpo", "nash_md", "xpo")
PAGE = GUIDES / "memory.md"
TEXT = PAGE.read_text("utf-8")
RESULT = memory.measured()
MEASURED = RESULT["ways"]
B, T = 3, 10


@pytest.fixture(scope="module")
def page():
    return ran(PAGE).namespace


CALLED, CHECKED, checks = checked_formulas()
functions = noting(CALLED)


SHAPES = [  # width, heads, key-value heads, width of a head, of the MLP
    (24, 5, 5, 8, 56),
    (24, 5, 1, 8, 56),
    (40, 4, 2, 16, 24),
]


def tiny(width, heads, kv, head, mlp, layers=2, vocabulary=50, tied=True):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv, head_dim=head,
        intermediate_size=mlp, num_hidden_layers=layers, tie_word_embeddings=tied,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).train()


def batch(padded=False):
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, :3] = 0 if padded else 1
    return {"input_ids": torch.randint(0, 50, (B, T)), "attention_mask": mask, "use_cache": False}


# --- weights ------------------------------------------------------------------------------------------------------------


@checks("parameter-count")
def test_the_count_of_weights_is_that_of_the_model(functions):
    for width, heads, kv, head, mlp in SHAPES:
        sizes = dict(width=width, queries=heads * head, keys=kv * head, mlp=mlp, head=head)
        ours = functions["parameter_count"](vocabulary=50, layers=2, **sizes)
        assert ours == sum(weight.numel() for weight in tiny(width, heads, kv, head, mlp).parameters())
    width, queries, keys, mlp = memory.shape()
    toy = functions["parameter_count"](261, 4, width, queries, keys, mlp, head=32)
    assert toy == MEASURED["toy"]["sft"]["trained"]


def counted_step(model, dtype=None):
    """Bytes by kind after a step of AdamW, from the counter."""
    count = memory.counter()(50)
    for weight in model.parameters():
        count.note(weight, "weights")
        weight.register_post_accumulate_grad_hook(lambda weight: count.note(weight.grad, "gradients"))
    adam = torch.optim.AdamW(model.parameters())
    with count, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        model(**batch()).logits.float().square().mean().backward()
        adam.step()
    for state in adam.state.values():
        for value in state.values():
            if value.ndim:
                count.note(value, "optimizer")
    return dict(count.now)  # what it is when this function ends is less


@checks("static-memory")
@pytest.mark.parametrize("kind, sizes", [("float32", (4, 4, 8)), ("autocast", (4, 4, 8)), ("bfloat16", (2, 2, 4))])
def test_bytes_of_weights_gradients_and_adam(functions, kind, sizes):
    model = tiny(*SHAPES[0])
    model = model.bfloat16() if kind == "bfloat16" else model
    number = sum(weight.numel() for weight in model.parameters())
    now = counted_step(model, kind)
    assert tuple(now[what] for what in ("weights", "gradients", "optimizer")) == tuple(number * size for size in sizes)
    whole = functions["static_memory"](number, [7, 5], *sizes, frozen_weight=2)
    assert whole == now["weights"] + now["gradients"] + now["optimizer"] + 24


def test_static_memory_of_all_trainers_is_counted_to_the_byte():
    for way in WAYS:
        for name, one in MEASURED[way].items():
            at = peak(one)[1]
            assert at["weights"] == 4 * one["trained"], (way, name)
            assert at["optimizer"] - 8 * one["trained"] in range(1000), (way, name)  # and a counter for each tensor
            assert at["frozen"] - 4 * one["frozen"] in range(20_000), (way, name)  # and tables of frequencies


def test_who_loads_in_float32_whatever_the_file_has_and_who_in_the_precision_of_the_file():
    path = str(TOY / "teacher")
    assert AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype == torch.bfloat16
    sets = {"sft": "language_modeling", "gkd": "language_modeling", "kto": "unpaired_preference"}
    sets |= {"bco": "unpaired_preference", **dict.fromkeys(("grpo", "rloo", *ONLINE), "prompt_only")}
    loaded = {}
    for name in TRAINERS:
        if name in ("ppo", "prm"):  # which take a model, no name
            continue
        given = {"teacher_model": path} if name == "gkd" else {}
        if name in ("grpo", "rloo"):
            given = {"reward_funcs": troubleshooting.exact}
        elif name in ONLINE:
            given = {"reward_funcs": troubleshooting.judge()}
            given |= {"reward_processing_classes": formats.toy_tokenizer()} if name == "online_dpo" else {}
        batch = {"per_device_train_batch_size": 8}
        with formats.quiet():
            rows = troubleshooting.rows(sets.get(name, "preference"), 8)
            trainer = troubleshooting.trainer(name, rows, path, given=given, **batch)
        loaded[name] = next(trainer.model.parameters()).dtype
        if name == "gkd":
            assert next(trainer.teacher_model.parameters()).dtype == torch.bfloat16
    exact = {name for name, dtype in loaded.items() if dtype == torch.float32}
    assert exact == {"sft", "reward", "dpo", "kto", "grpo", "rloo", "gkd"}
    assert {name for name, dtype in loaded.items() if dtype == torch.bfloat16} == {"orpo", "cpo", "bco", *ONLINE}
    words = " ".join(TEXT.split())
    assert "SFT, Reward, DPO, KTO, GRPO, RLOO and GKD load a model that is given by its name in float32." in words


def test_bf16_leaves_weights_gradients_and_adam_in_float32(tmp_path):
    with formats.quiet():
        trainer = memory.build("sft", "toy", str(tmp_path), TOY, "--bf16", "true", "--use_cpu", "true")
        seen = set()
        for weight in trainer.model.parameters():
            weight.register_post_accumulate_grad_hook(lambda weight: seen.add(weight.grad.dtype))
        computed = set()
        trainer.model.lm_head.register_forward_hook(lambda *arguments: computed.add(arguments[-1].dtype))
        trainer.model.model.layers[0].mlp.register_forward_hook(lambda *arguments: computed.add(arguments[-1].dtype))
        trainer.train()
    assert computed == {torch.bfloat16} and seen == {torch.float32}
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    state = trainer.optimizer.state
    assert {value.dtype for one in state.values() for value in one.values() if value.ndim} == {torch.float32}


# --- activations ----------------------------------------------------------------------------------------------------------


def saved(shape, layers, kind="float32", padded=False):
    """Bytes that autograd saves for each token, and bytes of copies of weights."""
    model = tiny(*shape, layers=layers)
    model = model.bfloat16() if kind == "bfloat16" else model
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found, kept = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept.append(tensor)
            found[storage.data_ptr()] = (storage.nbytes(), tensor.shape)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"),
    ):
        model(**batch(padded))
    rows = [size for size, shape in found.values() if shape[0] in (B, B * T)]
    return sum(rows) / B / T, sum(size for size, shape in found.values() if shape[0] not in (B, B * T, 1))


@checks("layer-activations")
@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
def test_a_layer_keeps_what_the_formula_says(functions, kind):
    for width, heads, kv, head, mlp in SHAPES:
        shape = (width, heads, kv, head, mlp)
        (one, casts), (two, more) = saved(shape, 1, kind), saved(shape, 2, kind)
        numbers = functions["PRECISIONS"][kind]
        ours = functions["layer_activations"](width, heads * head, kv * head, mlp, numbers)
        small = 4 * (2 + 2 * heads + kv)  # for each norm and each head
        assert two - one == pytest.approx(ours + small)
        matrices = 2 * width * head * (heads + kv) + 3 * width * mlp
        assert more - casts == (2 * matrices if kind == "autocast" else 0)  # a copy of each matrix
    padded = saved(SHAPES[0], 2, kind, padded=True)[0] - saved(SHAPES[0], 1, kind, padded=True)[0]
    without = saved(SHAPES[0], 2, kind)[0] - saved(SHAPES[0], 1, kind)[0]
    assert padded - without == pytest.approx((4 if kind == "float32" else 2) * T)  # the mask
    shape = width, heads, kv, head, mlp = 64, 4, 2, 16, 192  # fewer keys and values than queries
    padded = saved(shape, 2, kind, padded=True)[0] - saved(shape, 1, kind, padded=True)[0]
    without = saved(shape, 2, kind)[0] - saved(shape, 1, kind)[0]
    size = 4 if kind == "float32" else 2
    assert padded - without == pytest.approx(size * (T + 2 * head * (heads - kv)))  # and what is repeated


def alive(model, **inputs):
    """Bytes of activations after a forward pass of the body, from the counter."""
    count = memory.counter()(model.config.vocab_size)
    for weight in model.parameters():
        count.note(weight, "weights")
    with count:
        output = model.model(**inputs)  # noqa: F841 (holds the graph)
        return count.now["other"]


@checks("activation-memory", "checkpointed-activations")
def test_what_is_alive_after_the_forward_pass(functions):
    width, heads, kv, head, mlp = 64, 4, 2, 16, 192
    for layers in (1, 4):
        model = tiny(width, heads, kv, head, mlp, layers=layers)
        layer = functions["layer_activations"](width, heads * head, kv * head, mlp)
        ours = functions["activation_memory"](B, T, layers, layer, width)
        assert alive(model, **batch()) == pytest.approx(ours, rel=0.04)
        model.gradient_checkpointing_enable()
        ours = functions["checkpointed_activations"](B, T, layers, width)
        assert alive(model, **batch()) == pytest.approx(ours, rel=0.08)


@checks("kv-cache")
def test_the_cache_is_that_of_transformers(functions):
    model = tiny(*SHAPES[1], layers=3)
    with torch.no_grad():
        cache = model(input_ids=torch.ones(B, T, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == functions["kv_cache"](3, B, T, keys=8)
    for name in ("grpo", "rloo", "online_dpo", "xpo"):  # one token is never fed back
        one = MEASURED["wide"][name]
        rows = one["rows"] // memory.GRAPHS.get(name, 1)
        assert one["peaks"]["sampling"]["cache"] == functions["kv_cache"](4, rows, one["tokens"] - 1, keys=128), name


# --- logits and peaks, in the committed measurement -------------------------------------------------------------------------


def test_the_measurement_has_every_trainer_in_every_way():
    assert list(MEASURED) == list(WAYS)
    for way, (_, _, only) in WAYS.items():
        assert list(MEASURED[way]) == [name for name in TRAINERS if only is None or name in only]


@checks("logits-memory")
def test_copies_of_logits_are_those_of_the_measurement(functions):
    for name in TRAINERS:
        if name == "sft":
            continue
        one = MEASURED["wide"][name]
        ours = functions["logits_memory"](memory.VOCABULARY, one["rows"], one["tokens"], one["answer"], *COPIES[name])
        worst = one["peaks"]["backward"] if name == "nash_md" else peak(one)[1]  # its peak is in sampling
        if name == "ppo":
            ours += functions["sampling_logits"](memory.VOCABULARY, memory.ROUND, one["answer"], memory.KEPT[name])
        assert worst["logits"] == pytest.approx(ours, rel=0.025), name


def test_ppo_keeps_the_logits_of_the_round_while_it_learns(functions):
    """Half the rows in a micro-batch, and the round is as large as before."""
    seen = set()
    for way in ("wide", "half"):
        one = MEASURED[way]["ppo"]
        kept = functions["sampling_logits"](memory.VOCABULARY, memory.ROUND, one["answer"], 1)
        own = functions["logits_memory"](memory.VOCABULARY, one["rows"], one["tokens"], one["answer"], *COPIES["ppo"])
        assert one["peaks"]["backward"]["logits"] == pytest.approx(own + kept, rel=0.001), way
        seen.add(one["rows"])
    assert len(seen) == 2
    source = inspect.getsource(ppo_trainer.PPOTrainer.train)
    assert "query_responses, logitss = batch_generation(" in source
    assert not re.search(r"\bdel\b[^)\n]*\blogitss\b|^ +logitss,$", source, re.M)


def test_the_four_copies_of_selective_log_softmax():
    from trl.trainer.utils import selective_log_softmax

    made, worst = {}, {}

    class Named(memory.counter()):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            before, result = dict(self.live), super().__torch_dispatch__(function, types, args, kwargs)
            made.update({key: function.__name__.split(".")[0] for key in self.live if key not in before})
            if sum(self.now.values()) > worst.get("total", 0):
                large = [key for key, (_, size, _) in self.live.items() if size > 4 * 500 * B * (T - 2)]
                worst.update(total=sum(self.now.values()), names=sorted(made[key] for key in large))
            return result

    hidden, weights = torch.randn(B, T, 8), torch.randn(500, 8, requires_grad=True)
    with Named(500):
        logits = hidden @ weights.T
        selective_log_softmax(logits[:, :-1], torch.ones(B, T - 1, dtype=torch.long)).sum().backward()
    assert worst["names"] == ["mm", "new_zeros", "scatter_add", "stack"]


def test_the_logits_of_sft_do_not_grow_with_the_rows():
    chunk = 4 * memory.VOCABULARY * 256
    for way in ("wide", "half"):
        assert peak(MEASURED[way]["sft"])[1]["logits"] in (3 * chunk, 4 * chunk)
    whole = max(at["logits"] for at in MEASURED["whole logits"]["sft"]["peaks"].values())
    one = MEASURED["whole logits"]["sft"]
    assert whole > 2 * 4 * memory.VOCABULARY * one["rows"] * one["tokens"] * 0.95


@checks("sampling-logits")
def test_logits_while_answers_are_sampled(functions):
    ppo, nash = MEASURED["wide"]["ppo"], MEASURED["wide"]["nash_md"]
    three = memory.SAMPLED["ppo"] + memory.KEPT["ppo"]
    ours = functions["sampling_logits"](memory.VOCABULARY, memory.ROUND, ppo["answer"], three)
    assert three == 3 and ppo["peaks"]["scoring"]["logits"] == pytest.approx(ours, rel=0.01)
    ours = functions["sampling_logits"](memory.VOCABULARY, nash["rows"], nash["tokens"], memory.SAMPLED["nash_md"])
    assert nash["peaks"]["sampling"]["logits"] == pytest.approx(ours, rel=0.01)
    for name in ("grpo", "rloo", "online_dpo", "xpo"):  # the last position only, twice
        one = MEASURED["wide"][name]
        rows = one["rows"] // memory.GRAPHS.get(name, 1)
        assert one["peaks"]["sampling"]["logits"] <= 4 * 4 * memory.VOCABULARY * rows, name


def of_page(functions, name, way, one):
    """The prediction, put together from the functions on the page."""
    width, queries, keys, mlp = memory.shape()
    vocabulary = memory.VOCABULARY if WAYS[way][0] else 261
    rows, tokens = one["rows"], one["tokens"]
    layer = functions["layer_activations"](width, queries, keys, mlp)
    logits = functions["logits_memory"](vocabulary, rows, tokens, one["answer"], *COPIES[name])
    if name == "sft":
        logits = functions["logits_memory"](vocabulary, 1, memory.CHUNKS, 0, 1, 0)
    models = one["models"]
    per_model = one["layers"] / models
    if way == "checkpointing":
        activations = models * functions["checkpointed_activations"](rows, tokens, per_model, width)
        logits = max(logits, rows * tokens * layer)
    else:
        activations = models * functions["activation_memory"](rows, tokens, per_model, layer, width)
    copies = memory.SAMPLED.get(name, 0)
    sampling = functions["sampling_logits"](vocabulary, rows, tokens, copies)
    if name == "ppo":
        sampling = functions["sampling_logits"](vocabulary, memory.ROUND, one["answer"], copies)
    static = functions["static_memory"](one["trained"], [one["frozen"]])
    if name == "ppo":
        static += functions["sampling_logits"](vocabulary, memory.ROUND, one["answer"], memory.KEPT[name])
    layer, accumulation = rows * tokens * layer, one["accumulation"]
    return functions["training_peak"](static, 4 * one["trained"], layer, activations, logits, accumulation, sampling)


@checks("training-peak")
def test_the_tables_are_made_with_the_formulas_of_the_page(functions):
    for way in WAYS:
        for name, one in MEASURED[way].items():
            ours = predicted(name, way, one)
            if ours is not None:
                assert ours == pytest.approx(of_page(functions, name, way, one), rel=1e-9), (way, name)


ANEW = ["sft", "dpo", "orpo", "prm"]


@pytest.mark.parametrize("name", ANEW)
def test_a_peak_counted_anew_is_the_committed_one(name):
    now, then = memory.run(name, "toy", TOY), MEASURED["toy"][name]
    assert {key: now[key] for key in then if key != "peaks"} == {key: then[key] for key in then if key != "peaks"}
    assert total(now) == pytest.approx(total(then), rel=0.03)
    assert peak(now)[0] == peak(then)[0] or name == "sft"  # whose forward and backward pass need the same to 1 %
    for kind in ("weights", "optimizer", "logits"):
        assert peak(now)[1][kind] == pytest.approx(peak(then)[1][kind], rel=0.01, abs=2e5), kind


def test_the_counter_agrees_with_the_allocator():
    model, inputs = tiny(64, 4, 2, 16, 192, layers=3, vocabulary=500), batch()

    def step():
        model(**inputs).logits.square().mean().backward()
        model.zero_grad()

    step()
    count = memory.counter()(500)
    for weight in model.parameters():
        count.note(weight, "weights")
    before = sum(count.now.values())
    with count:
        step()
    ours = max(count.highest.values()) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    assert ours == pytest.approx(highest, rel=0.05)


# --- levers -----------------------------------------------------------------------------------------------------------------


@checks("adapter-count")
def test_the_count_of_an_adapter_is_that_of_peft(functions):
    model = tiny(*SHAPES[2], layers=3)
    matrices = [(m.in_features, m.out_features) for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(matrices) == 3 * 7
    adapted = get_peft_model(model, LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert adapted.get_nb_trainable_parameters()[0] == functions["adapter_count"](5, matrices)
    toy = functions["adapter_count"](16, 4 * 2 * [(128, 128)])  # the scripts' adapter: queries and values
    assert MEASURED["lora"]["dpo"]["trained"] == toy


@checks("quantized-bytes")
def test_bits_of_a_quantized_weight(functions):
    weights = 64 * 256 * 3  # three blocks of scales
    bits = 4 * weights + 8 * (weights // 64) + 32 * (weights // 64 // 256)
    assert functions["quantized_bytes"]() == pytest.approx(bits / 8 / weights)
    saving = 8 * (functions["quantized_bytes"](double=False) - functions["quantized_bytes"]())
    assert saving == pytest.approx(0.373, abs=5e-4)  # section 3 of the paper


@checks("sharded-memory")
def test_parts_on_all_processes_add_up(functions):
    sharded, sizes = functions["sharded_memory"], dict(weight=4, gradient=4, optimizer=8)
    for stage in range(4):
        copied = sum(list(sizes.values())[: 3 - stage])
        assert 8 * sharded(100, 8, stage, **sizes) == 100 * (16 - copied) + 8 * 100 * copied
    assert sharded(100, 8, 0) == functions["static_memory"](100)
    paper = [sharded(7.5e9, 64, stage, 2, 2, 12) / 1e9 for stage in range(4)]
    assert [round(value, 1) for value in paper] == [120, 31.4, 16.6, 1.9]  # figure 1 of the paper


@checks("checkpointing-cost")
def test_flops_of_a_step_with_checkpointing(functions):
    body = tiny(64, 4, 4, 16, 192, layers=3).model
    embedded, found = torch.randn(2, 8, 64), {}
    for reentrant in (None, False, True):
        if reentrant is not None:
            body.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with FlopCounterMode(display=False) as counter:
            output = body(inputs_embeds=embedded.clone().requires_grad_(), use_cache=False)
            output.last_hidden_state.sum().backward()
        found[reentrant] = counter.get_total_flops()
    down = 64 * 192 / (4 * 64 * 64 + 3 * 64 * 192)
    assert found[False] / found[None] == pytest.approx(functions["checkpointing_cost"](down), rel=0.01)
    assert found[True] / found[None] == pytest.approx(functions["checkpointing_cost"](0), rel=0.01)


# --- sentences of the page --------------------------------------------------------------------------------------------------


def ratios(way):
    return {name: predicted(name, way, one) / total(one) for name, one in MEASURED[way].items()}


def test_how_far_the_formula_is_off():
    wide, toy = ratios("wide"), ratios("toy")
    backward = {n for n, one in MEASURED["wide"].items() if peak(one)[0] == "backward" and peak(one)[1]["logits"] > 5e7}
    assert all(abs(wide[name] - 1) < 0.01 for name in backward) and len(backward) >= 7
    assert all(0.94 < ratio < 1.01 for ratio in wide.values())
    assert all(0.945 < wide[name] < 0.97 for name in ("sft", "reward", "prm"))
    scoring = {name for name, one in MEASURED["toy"].items() if peak(one)[0] == "scoring"}
    assert scoring == {"dpo", "kto", "bco", "online_dpo", "nash_md", "xpo"}
    assert all(0.86 <= round(toy[name], 2) <= 0.94 for name in scoring)
    assert all(0.94 <= round(ratio, 2) < 1 for name, ratio in toy.items() if name not in scoring)


def test_what_the_levers_leave():
    share = {
        way: {name: total(one) / total(MEASURED["wide"][name]) for name, one in MEASURED[way].items()}
        for way in ("half", "checkpointing", "lora", "precomputed")
    }
    for way in ("half", "checkpointing"):
        assert all(0.92 < ratio < 1.08 for ratio in ratios(way).values()), way
    assert min(share["half"].values()) > 0.5
    assert set(sorted(share["half"], key=share["half"].get)[-2:]) == {"sft", "ppo"}
    assert set(sorted(share["checkpointing"], key=share["checkpointing"].get)[-3:]) == {"gkd", "ppo", "nash_md"}
    for name in ("ppo", "nash_md"):
        assert peak(MEASURED["checkpointing"][name])[0] == ("scoring" if name == "ppo" else "sampling")
    for name, one in MEASURED["checkpointing"].items():
        before, after = MEASURED["wide"][name]["peaks"]["backward"], one["peaks"]["backward"]
        assert after["other"] < 0.3 * before["other"], name
        assert after["logits"] == pytest.approx(before["logits"], rel=0.06), name
    for name in ("dpo", "kto", "bco"):
        assert 0.92 < share["precomputed"][name] < 1


def test_what_an_adapter_leaves():
    kept = {"nash_md", "xpo"}
    for name, one in MEASURED["lora"].items():
        before = MEASURED["wide"][name]
        saved = before["frozen"] + before["trained"] - one["frozen"]  # weights that are not there any more
        reference = memory.HELD[name][1].startswith("reference") and name not in kept
        if reference:
            assert saved == pytest.approx(MEASURED["wide"]["sft"]["trained"], rel=0.01), name
        else:
            assert abs(saved) < 0.13 * before["trained"], name
        left = one["peaks"]["backward"]["other"] / before["peaks"]["backward"]["other"]
        assert 0.6 < left < 0.8, (name, left)


def test_the_table_of_models_is_what_the_trainers_hold(tmp_path):
    for name, (trained, frozen, rows) in memory.HELD.items():
        one, script = MEASURED["wide"][name], memory.load(name)
        assert one["models"] == len(trained.split(", ")), name
        models = 0 if frozen.startswith("-") else len(frozen.split(", "))
        size = MEASURED["wide"]["sft"]["trained"]
        assert round(one["frozen"] / size) == models or (name == "gkd" and one["frozen"] > size), name
        per_row = script.TOY["per_device_train_batch_size"]
        if name == "ppo":
            assert rows == "B, at most round / `num_mini_batches`"
            assert one["rows"] == min(per_row, memory.ROUND // script.TOY["num_mini_batches"])
            assert per_row == memory.ROUND and MEASURED["half"][name]["rows"] == one["rows"] // 2
        else:
            assert one["rows"] == (2 if rows.startswith("2B") else 1) * per_row, name


def test_a_reference_for_grpo_is_another_model():
    with_it, without = MEASURED["reference"]["grpo"], MEASURED["wide"]["grpo"]
    assert without["frozen"] == 0 and with_it["frozen"] == without["trained"]


def test_who_computes_logits_for_the_answer_alone():
    assert {name for name, (whole, answer) in COPIES.items() if answer and not whole} == {"grpo", "rloo"}
    for name in ("gkd", "dpo", "online_dpo", "nash_md", "xpo", "ppo"):
        assert COPIES[name][0]


def test_precomputing_removes_the_reference():
    for name in ("dpo", "kto", "bco"):
        assert MEASURED["precomputed"][name]["frozen"] == 0 < MEASURED["wide"][name]["frozen"]


def test_what_sampling_costs():
    from compare import rows

    found = {row["name"]: row for row in rows()}
    grpo, nash, steps = found["grpo"], found["nash_md"], memory.load("grpo").TOY["max_steps"]
    assert steps == 40 and round(1 - steps / grpo["forward_passes"], 2) == 0.97
    assert found["xpo"]["forward_passes"] / found["online_dpo"]["forward_passes"] == pytest.approx(2, rel=0.01)
    assert nash["generated_tokens"] < grpo["generated_tokens"]
    assert nash["forward_tokens"] / grpo["forward_tokens"] == pytest.approx(10, abs=0.5)
    assert max(found, key=lambda name: found[name]["seconds"]) == "nash_md"
    assert [memory.load(name).TOY["max_steps"] for name in ("reward", "prm")] == [360, 400]
    assert memory.load("ppo").TOY["num_ppo_epochs"] == 2
    slow = sorted(found, key=lambda name: found[name]["forward_tokens"] / found[name]["seconds"])[:5]
    assert set(slow) == {"sft", "reward", "orpo", "cpo", "prm"}


def test_the_growth_of_the_process_is_smaller_for_two():
    from compare import rows

    growth = {row["name"]: row["memory"] for row in rows()}
    assert {name for name in TRAINERS if growth[name] < total(MEASURED["toy"][name])} == {"bco", "gkd"}


def test_settings_that_the_page_names():
    fields = {name: formats.classes(name)[0].__dataclass_fields__ for name in TRAINERS}
    assert fields["grpo"]["vllm_gpu_memory_utilization"].default == 0.3
    assert "vllm_enable_sleep_mode" in fields["grpo"]
    assert "use_logits_to_keep" not in fields["dpo"]
    assert {name for name in TRAINERS if "precompute_ref_log_probs" in fields[name]} == {"dpo", "kto", "bco"}
    assert all(fields[name]["gradient_checkpointing"].default is True for name in TRAINERS)
    assert all(fields[name]["bf16"].default is None for name in TRAINERS)
    assert {name for name in TRAINERS if "activation_offloading" in fields[name]} == {
        "sft",
        "reward",
        "dpo",
        "kto",
        "gkd",
    }
    assert {name for name in TRAINERS if "padding_free" in fields[name]} == {"sft", "dpo", "gkd"}
    assert {name for name in TRAINERS if "packing" in fields[name]} == {"sft", "gkd"}
    assert "packing, padding-free (SFT) |" in TEXT  # dpo.md and gkd.md show that the other two refuse or ignore it


def test_the_sizes_of_the_worked_example(page):
    assert "0.596 · 12 = 7.2 GB" in TEXT and round(page["n"] * 12 / 1e9, 1) == 7.2
    _, activations, logits, highest = page["estimate"]("grpo")
    assert [round(value / 1e9, 1) for value in (activations, logits, highest)] == [14.1, 5.0, 26.3]
    assert round(4 * 512 * 151_936 * 4 / 1e9, 2) == 1.24
    assert list(page["FIFTEEN"]) == list(TRAINERS)
    for name, (per_row, trained, frozen, *copies) in page["FIFTEEN"].items():
        models, others, rows = memory.HELD[name]
        assert tuple(copies) == COPIES[name], name
        assert trained == len(models.split(", ")), name
        assert frozen == (0 if others.startswith("-") else len(others.split(", "))), name
        assert per_row == (2 if rows.startswith("2B") else 1), name
    matrices = page["n"] - page["n"] % 1  # nearly all weights are in matrices
    assert round(2 * matrices / 1e9, 1) == 1.2


def test_the_table_of_the_scripts_settings_is_theirs_and_fits_the_cards_that_it_names(page):
    assert sorted(page["SCRIPTS"]) == sorted(TRAINERS)
    recipe = yaml.safe_load((ROOT / "annotated_examples/recipes/full_24gb.yaml").read_text())
    assert recipe["gradient_checkpointing"] is True and recipe["per_device_train_batch_size"] == 1
    for name, (batch, tokens, answer) in page["SCRIPTS"].items():
        real, config = compare.load(name).REAL, formats.classes(name)[0]
        assert real["per_device_train_batch_size"] == batch and real["gradient_checkpointing"] is False, name
        longest = real.get("max_length", getattr(config, "max_length", None))
        if name in ("grpo", "rloo"):  # prompts are not cut
            longest = 512 + answer
        elif name == "ppo":
            longest = compare.load(name).Arguments.max_prompt_length + answer
        elif name == "gkd":  # the student's own answer behind a prompt that leaves room for one token
            longest += answer - 1
        assert longest == tokens, name
        lengths = ("max_completion_length", "max_new_tokens", "response_length")
        sampled = [real[key] for key in lengths if key in real]
        assert sampled in ([], [answer]), name
        assert page["estimate"](name, batch, tokens, answer)[-1] < 0.85 * 80e9, name
        least = page["estimate"](name, 2 if name == "kto" else 1, tokens, answer, checkpointing=True)[-1]
        assert (least < 0.65 * 24e9) == (name not in ("ppo", "gkd")), name


# --- links and tables ---------------------------------------------------------------------------------------------------------


def headings(path):
    lines = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {slug(line) for line in lines}


def test_every_link_leads_to_a_section_that_exists():
    for file, section in re.findall(r"\]\(((?!https?:)[^)#]*)(?:#([^)]*))?\)", TEXT):
        path = (PAGE.parent / file).resolve() if file else PAGE
        assert path.exists(), file
        assert not section or section in headings(path), f"{file}#{section}"


def test_the_tables_of_the_page_are_those_of_the_measurement(capsys):
    calls = re.findall(r"\[\[\[cog import memory; memory\.(\w+)\((?:\"(\w+)\")?\) \]\]\]", TEXT)
    assert len(calls) == 8
    for function, argument in calls:
        getattr(memory, function)(*[argument] if argument else [])
        assert capsys.readouterr().out.strip() in TEXT, f"{function}: run `make sync`"
