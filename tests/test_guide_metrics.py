"""reference_guides/metrics.md and tools/metrics.py: which keys there are, what is normal, what differs between trainers."""

import inspect
import io
import os
import re
from contextlib import redirect_stdout
from functools import cache
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ast

import metrics
import pytest
import torch
from datasets import Dataset
from markdown_pages import GUIDES, ROOT
from metrics import AVERAGES, GROUPS, READ, WORRIES, bands, logged, meanings, slug, trainers_of
from tables import TRAINERS, measurement, quick_facts
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.bco import BCOConfig, BCOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from walkthrough_tools import (
    PAIRS,
    SUMS,
    changed,
    config,
    make_trainer,
    random_batch,
    reward_model,
    save,
    settings_for,
    trl_loss,
)

PAGE = GUIDES / "metrics.md"
TEXT = PAGE.read_text("utf-8")
PROSE = " ".join(re.sub(r"<!-- \[\[\[cog.*?\[\[\[end\]\]\] -->", "", TEXT, flags=re.S).split())
OFFLINE = "sft reward dpo kto orpo cpo bco gkd prm"
MEANINGS = [(key, found) for group in meanings().values() for key, found in group.items()]
each_trainer = pytest.mark.parametrize("trainer", TRAINERS)


def part(title: str) -> str:
    return TEXT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


@cache
def rows() -> list[SimpleNamespace]:
    """The rows of the tables of keys, read from the page."""
    found = []
    for title in meanings():
        lines = [line for line in part(title).splitlines() if line.startswith("| <a id=")]
        assert lines, title
        for line in lines:
            key, what, limits, normal, worry = (cell.strip() for cell in line.strip("|").split(" | "))
            anchor, name, target = re.fullmatch(r'<a id="([\w-]+)"></a>\[`([^`]+)`\]\(#([\w-]+)\)', key).groups()
            assert anchor == target
            names = re.findall(r"annotated_trainers/(\w+)\.md#logged-metrics", normal)
            found.append(
                SimpleNamespace(key=name, anchor=anchor, what=what, limits=limits, trainers=names, normal=normal)
            )
            found[-1].worry = worry.strip("| ")
    return found


@cache
def class_of(trainer: str, kind: str) -> type:
    namespace: dict = {}
    exec(
        quick_facts((ROOT / "annotated_trainers" / f"{trainer}.md").read_text("utf-8"))["Import"].strip("`"), namespace
    )
    (found,) = (value for name, value in namespace.items() if name.endswith(kind))
    return found


# ------------------------------------------------------------------------------------------------------ the keys


def test_the_page_has_every_key_of_every_walkthrough_once_and_no_other():
    shown = [(row.key, trainer) for row in rows() for trainer in row.trainers]
    true = [(key, trainer) for trainer in TRAINERS for key in logged(trainer)]
    assert len(shown) == len(set(shown))
    assert set(shown) == set(true)
    assert len(true) > 400


@each_trainer
def test_the_keys_are_read_from_the_table_as_another_reader_reads_it(trainer):
    from walkthrough_tools import metrics_on

    other = metrics_on(ROOT / "annotated_trainers" / f"{trainer}.md")
    assert {key: row["What it is"] for key, row in logged(trainer).items()} == other


@each_trainer
def test_the_words_of_the_page_were_read_against_the_present_table(trainer):
    assert READ[trainer] == metrics.digest(trainer), (
        f'"Logged metrics" of {trainer}.md has changed: read GROUPS and WORRIES of tools/metrics.py against it, then put '
        "the digest that `python tools/metrics.py` prints into READ"
    )


@each_trainer
def test_every_key_of_the_toy_runs_is_on_the_page(trainer):
    keys = {row.key for row in rows() if trainer in row.trainers}
    assert {metrics.general(key) for key in measurement(trainer)["log"]} <= keys


def test_every_row_has_an_anchor_of_its_own_that_no_heading_has():
    anchors = [row.anchor for row in rows()]
    headings = [
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", TEXT, re.M)
    ]
    assert len(anchors) == len(set(anchors))
    assert not set(anchors) & set(headings)
    for key, found in MEANINGS:
        assert slug(key) in anchors
        assert len([row for row in rows() if row.key == key]) == len(found)


def test_every_link_within_the_page_leads_to_a_row_or_a_heading():
    targets = {row.anchor for row in rows()}
    targets |= {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", TEXT, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= targets


def test_the_numbers_of_keys_in_the_introduction_are_counted():
    keys = {row.key for row in rows()}
    training = {key for key in keys if not key.startswith("eval_")}
    several = {key for key in training if sum(row.key == key for row in rows()) > 1}
    said = [int(number) for number in re.findall(r"\d+", TEXT.split("\nThere are ")[1].split("\n\n")[0])]
    assert said == [len(keys), len(keys) - len(training), len(training), len(several)]


def test_no_row_leans_on_the_one_above():
    for row in rows():
        assert row.what and row.limits
        for text in (row.what, row.worry):
            assert not re.search(r"\b(as|see|line) (above|below)\b|^(the same|their difference)$|: the same$", text), (
                row
            )


def test_what_is_worried_about_comes_from_the_walkthroughs():
    for row in rows():
        for trainer in row.trainers:
            told = WORRIES.get((row.key, trainer), logged(trainer)[row.key]["Worry when"])
            assert re.sub(r"\]\([^)]*\)", "", told) in re.sub(r"\]\([^)]*\)", "", row.worry), (row.key, trainer)


def test_a_wrong_table_is_refused(monkeypatch):
    good = metrics.section("sft")
    for bad, error in (
        (good.replace("| Worry when |", "| Alarm |"), "columns"),
        (good.replace("| `epoch` |", "| `step` |"), "twice"),
        (good.replace("| optimizer steps (only in `log_history`) |", "|"), "length"),
    ):
        assert bad != good
        monkeypatch.setattr(metrics, "section", lambda trainer, bad=bad: bad)
        with pytest.raises(ValueError, match=error):
            logged.__wrapped__("sft")


@pytest.mark.parametrize(
    ("key", "found", "error"),
    [
        ("loss", [], "`loss` of sft has 0 meanings"),
        (
            "loss",
            [*GROUPS["Loss and optimizer"]["loss"], metrics.signed("sft", "again")],
            "`loss` of sft has 2 meanings",
        ),
        ("lost", [metrics.signed("dpo", "a typing error")], r"no walkthrough lists.*\('lost', 'dpo'\)"),
    ],
)
def test_a_key_too_many_or_too_few_stops_the_tables(monkeypatch, key, found, error):
    group = {**GROUPS["Loss and optimizer"], key: found}
    monkeypatch.setattr(metrics, "meanings", lambda: {**meanings(), "Loss and optimizer": group})
    with pytest.raises(ValueError, match=error):
        metrics.check()


# --------------------------------------------------------------------------------------------------- what is normal


def test_the_normal_values_are_those_of_the_measurements():
    """Read again from the JSON and rounded by hand: three digits."""
    compared = 0
    for row in rows():
        for trainer in row.trainers:
            result = measurement(trainer)
            if row.key.startswith("eval_"):
                ends = result["held_out"].get(row.key.removeprefix("eval_"))
                ends = ends and [[min(ends[when]), max(ends[when])] for when in ("before", "after")]
            else:
                found = [band for key, band in result["log"].items() if key == row.key or _named(key) == row.key]
                ends = [[found[0][end][line] for end in ("min", "max")] for line in (0, -1)] if found else None
            shown = re.search(
                rf"\({re.escape(f'../annotated_trainers/{trainer}.md')}#logged-metrics\) ([^<|]+)", row.normal
            )
            assert bool(shown) == bool(ends), (row.key, trainer)
            if not ends:
                continue
            for text, (low, high) in zip(shown[1].strip().split(" → "), ends, strict=True):
                numbers = [float(number.replace(",", "")) for number in text.split(" to ")]
                assert numbers == pytest.approx([low, high][: len(numbers)], rel=0.006), (row.key, trainer)
                assert len(numbers) == 2 or low == pytest.approx(high, rel=0.011), (row.key, trainer)
                compared += 1
    assert compared > 400


def _named(key: str) -> str:
    return re.sub(r"^rewards/(exact_answer|\w+_answer)/", "rewards/NAME/", key)


def test_every_toy_value_lies_in_the_range_of_its_row():
    """Over the whole run, not only at its ends."""
    limits = {(key, trainer): m for key, found in MEANINGS for m in found for trainer in trainers_of(m.trainers)}
    compared = 0
    for trainer in TRAINERS:
        for key, band in measurement(trainer)["log"].items():
            meaning = limits[metrics.general(key), trainer]
            assert meaning.low is None or min(band["min"]) >= meaning.low, (key, trainer)
            assert meaning.high is None or max(band["max"]) <= meaning.high, (key, trainer)
            compared += 1
        for key, ends in bands(trainer).items():
            meaning = limits[key, trainer]
            assert meaning.low is None or (ends[0][0] >= meaning.low and ends[1][0] >= meaning.low), (key, trainer)
            assert meaning.high is None or (ends[0][1] <= meaning.high and ends[1][1] <= meaning.high), (key, trainer)
    assert compared == 200


def test_a_share_lies_between_0_and_1():
    shares = [row for row in rows() if row.what.startswith("share")]
    assert len(shares) > 20
    assert {row.limits for row in shares} == {"0 to 1"}


# ------------------------------------------------------------------------------------------------- how to read a log


def test_a_line_comes_every_ten_steps_by_default():
    assert "every `logging_steps` steps (10 by default" in PROSE
    assert {class_of(trainer, "Config").__dataclass_fields__["logging_steps"].default for trainer in TRAINERS} == {10}


def test_the_trainer_of_transformers_logs_what_the_page_says(tmp_path, capsys):
    torch.manual_seed(0)
    ids = [[4, 5, 6, 7], [5, 6, 7, 8]]
    data = Dataset.from_list([{"input_ids": i, "labels": i} for i in ids])
    settings = settings_for(tmp_path, per_device_train_batch_size=2, max_steps=2, eval_strategy="steps", eval_steps=1)
    model = Qwen3ForCausalLM(Qwen3Config(**config(num_hidden_layers=1)))
    trainer = Trainer(model, TrainingArguments(**settings), train_dataset=data, eval_dataset=data)
    trainer.train()
    keys = set().union(*trainer.state.log_history)
    said = PROSE.split("come from the `Trainer` of transformers: ")[1].split(". TRL adds")[0]
    assert set(re.findall(r"`(\w+)`", said)) == keys
    printed = ast.literal_eval(next(line for line in capsys.readouterr().out.splitlines() if "'loss'" in line))
    assert printed["loss"] == f"{trainer.state.log_history[0]['loss']:.4g}"  # four digits
    assert "step" not in printed and "step" in trainer.state.log_history[0]


def test_ppo_has_two_keys_of_that_trainer_only():
    said = PROSE.split("come from the `Trainer` of transformers: ")[1].split(". TRL adds")[0]
    assert set(re.findall(r"`(\w+)`", said)) & set(logged("ppo")) == {"epoch", "step"}


@pytest.mark.parametrize(("names", "text"), AVERAGES.items())
def test_the_numbers_of_a_line_are_averaged_as_the_page_says(names, text):
    for trainer in trainers_of(names):
        made = class_of(trainer, "Trainer")
        if text.startswith("a line for each round"):
            source = inspect.getsource(made.train)
            assert "update % self.args.logging_steps" not in source and "self.log(metrics)" in source
        elif text.startswith("`loss` only"):
            training = {key for key in logged(trainer) if not key.startswith(("eval_", "train_"))}
            assert training == {"loss", "grad_norm", "learning_rate", "epoch", "step", "total_flos"}
        elif "online_dpo" in names:
            source = inspect.getsource(made._maybe_log_save_evaluate)
            assert "logs[key] = sum(val) / len(val)" in source
            assert "log" not in vars(made)  # so that the last line, which train() makes itself, has no more
        else:
            source = inspect.getsource(made.log)
            left = "never shown" if '"train" if "loss" in logs else "eval"' in source else "comes in its last line"
            assert text.endswith(left)
            if left != "never shown":
                assert 'mode = "train" if self.model.training else "eval"' in source
            assert ("isnan" in source) == ("NaN left out" in text)
            assert ("/ count_sum" in source) == ("**rows**" in text)
            assert re.search(r"sum\((val|valid)\) / len|torch\.[tT]ensor\(metrics\)\.mean\(\)", source)


def test_the_list_of_averages_names_each_trainer_once():
    assert sorted(" ".join(AVERAGES).split()) == sorted(TRAINERS)


def test_four_trainers_have_no_evaluation_line():
    without = {trainer for trainer in TRAINERS if not any(key.startswith("eval_") for key in logged(trainer))}
    assert without == {"ppo", "online_dpo", "nash_md", "xpo"}
    assert "Four trainers have no such line: PPO, OnlineDPO, NashMD and XPO" in PROSE


def test_loss_is_the_mean_of_its_steps_and_grad_norm_that_of_the_last(pairs):
    one, two = (pairs("dpo", logging_steps=n, max_steps=2, seed=1) for n in (1, 2))
    one.train()
    two.train()
    (first, second), (both,) = ([x for x in t.state.log_history if "loss" in x] for t in (one, two))
    assert both["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
    assert both["grad_norm"] == pytest.approx(second["grad_norm"])
    assert both["grad_norm"] != pytest.approx(first["grad_norm"], rel=0.01)
    assert both["rewards/margins"] == pytest.approx((first["rewards/margins"] + second["rewards/margins"]) / 2)


# --------------------------------------------------------------------------------------- same key, different meaning

HELD = {  # key -> tests of the walkthroughs that hold what the list says about it
    "loss": [
        "grpo::test_the_first_loss_is_zero_per_answer_and_a_fact_about_lengths_per_token",
        "rloo::test_the_loss_is_zero_in_every_step_and_its_gradient_is_not",
        "online_dpo::test_the_loss_of_the_toy_run_does_not_fall",
    ],
    "rewards/chosen": [
        "nash_md::test_six_names_from_dpo_mean_something_else",
        "xpo::test_every_metric_is_what_the_table_says",
    ],
    "rewards/rejected": ["nash_md::test_six_names_from_dpo_mean_something_else"],
    "rewards/margins": ["nash_md::test_six_names_from_dpo_mean_something_else"],
    "rewards/accuracies": [
        "nash_md::test_six_names_from_dpo_mean_something_else",
        "online_dpo::test_a_pair_of_one_answer_twice_has_no_gradient_and_counts_as_wrong",
    ],
    "logps/chosen": [
        "cpo::test_logps_are_per_token_for_simpo_and_ipo",
        "xpo::test_logged_log_probabilities_are_those_of_two_models_added",
    ],
    "logps/rejected": ["nash_md::test_every_metric_is_what_the_table_says"],
    "logits/chosen": [
        "cpo::test_the_mean_logits_run_over_prompt_and_padding_too",
        "orpo::test_the_mean_logits_leave_out_the_last_position_only",
        "bco::test_logits_are_summed_over_all_positions_and_the_vocabulary",
    ],
    "logits/rejected": ["bco::test_logits_are_summed_over_all_positions_and_the_vocabulary"],
    "nll_loss": ["orpo::test_the_sft_term_covers_prompt_and_chosen_answer"],
    "kl": [
        "kto::test_the_kl_is_averaged_over_processes_and_then_cut",
        "grpo::test_terms_and_means_equal_trl_in_training",
        "rloo::test_the_penalty_is_signed_and_so_is_kl",
    ],
    "objective/kl": [
        "ppo::test_every_metric_is_what_the_table_says",
        "online_dpo::test_the_kl_and_the_entropy_are_summed_over_the_padding_too",
        "xpo::test_the_kl_is_half_of_a_difference_of_two",
    ],
    "entropy": ["grpo::test_scores_are_those_of_the_sampling_temperature"],
    "objective/entropy": [
        "online_dpo::test_the_kl_and_the_entropy_are_summed_over_the_padding_too",
        "nash_md::test_six_names_from_dpo_mean_something_else",
    ],
    **{
        f"clip_ratio/{name}": [
            "rloo::test_clip_ratios_count_answers",
            "grpo::test_terms_and_means_equal_trl_in_training",
        ]
        for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")
    },
    "reward": ["rloo::test_the_logged_reward_has_neither_clip_nor_penalty"],
    "frac_reward_zero_std": ["rloo::test_equal_rewards_count_as_variance_once_the_policy_has_moved"],
    "objective/scores": [
        "ppo::test_every_metric_is_what_the_table_says",
        "online_dpo::test_every_metric_is_what_the_table_says",
    ],
    "objective/scores_margin": ["xpo::test_every_metric_is_what_the_table_says"],
    "objective/non_score_reward": ["online_dpo::test_every_metric_is_what_the_table_says"],
    "objective/rlhf_reward": ["online_dpo::test_every_metric_is_what_the_table_says"],
    "val/ref_contain_eos_token": ["nash_md::test_the_log_shows_an_opponent_that_babbles"],
    "mean_token_accuracy": [],
    "num_tokens": [
        "kto::test_answers_for_the_kl_are_not_counted_as_tokens",
        "grpo::test_tokens_are_counted_on_after_resuming",
    ],
    "grad_norm": [
        "online_dpo::test_gradients_of_accumulated_batches_are_summed",
        "prm::test_four_micro_batches_give_four_times_the_loss_and_the_gradient",
    ],
    "epoch": ["ppo::test_every_metric_is_what_the_table_says"],
    "step": ["ppo::test_every_metric_is_what_the_table_says"],
    "train_samples_per_second": [],
    "total_flos": ["cpo::test_total_flos_is_always_0", "bco::test_total_flos_is_0"],
}


def test_the_list_has_every_key_with_several_meanings_and_no_other():
    items = [" ".join(item.split()) for item in part("Same key, different meaning").split("\n\n")[0].split("\n- ")]
    keys = [item.split("). ", 1)[0] + ")" for item in items]
    listed = [pair for text in keys for pair in re.findall(r"\[`([^`]+)`\]\(#([\w-]+)\)", text)]
    several = {key for key, found in MEANINGS if len(found) > 1 and not key.startswith("eval_")}
    assert {key for key, _ in listed} == several == set(HELD)
    assert len(listed) == len(several)
    assert all(anchor == slug(key) for key, anchor in listed)


def test_every_test_that_holds_a_line_of_the_list_exists():
    named = {entry for names in HELD.values() for entry in names}
    there = set()
    for trainer in TRAINERS:
        text = (ROOT / "tests" / f"test_walkthrough_{trainer}.py").read_text("utf-8")
        there |= {f"{trainer}::{name}" for name in re.findall(r"^def (test_\w+)\(", text, re.M)}
    assert named <= there


CLASSES = {
    "dpo": (DPOTrainer, DPOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "bco": (BCOTrainer, BCOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "sft": (SFTTrainer, SFTConfig),
}
UNPAIRED = [
    {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
    for row in PAIRS for kind in ("chosen", "rejected")
]  # fmt: skip
CHOSEN = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A random model that is sure of some tokens and not of others."""
    torch.manual_seed(0)
    return save(changed(Qwen3ForCausalLM(Qwen3Config(**config())), by=0.2), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(checkpoint, tmp_path_factory):
    """Makes a trainer of the offline ones, on four pairs or what can be made of them; the model is always the same."""

    def make(name, **more):
        rows = {"kto": UNPAIRED, "bco": UNPAIRED, "sft": CHOSEN}.get(name, PAIRS)
        model = reward_model() if name == "reward" else checkpoint
        settings = {"per_device_train_batch_size": len(rows), "max_steps": 1, "remove_unused_columns": False, **more}
        if name in ("kto", "bco"):
            settings |= {"max_length": 64}
        if name in ("sft", "dpo", "kto", "reward"):
            settings.pop("remove_unused_columns")
        return make_trainer(*CLASSES[name], tmp_path_factory.mktemp(name), rows, model=model, **settings)

    return make


@pytest.fixture(scope="module")
def first(pairs):
    """Trainer -> its first log line: the same four pairs, the same model, before any step."""
    lines = {}
    for name in CLASSES:
        trainer = pairs(name)
        trainer.train()
        lines[name] = next(line for line in trainer.state.log_history if "loss" in line)
    return lines


def test_the_same_pairs_and_model_have_rewards_of_0_with_a_reference_and_below_0_without(first):
    for name in ("dpo", "kto", "bco"):
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert first[name][key] == pytest.approx(0, abs=1e-6), name
    for name in ("orpo", "cpo"):
        assert first[name]["rewards/chosen"] == pytest.approx(0.1 * first[name]["logps/chosen"], rel=1e-5)
        assert first[name]["rewards/chosen"] < -0.1


def test_the_same_pairs_and_model_have_another_accuracy(first):
    assert first["dpo"]["rewards/accuracies"] == 0.0
    assert first["cpo"]["rewards/accuracies"] > 0
    assert not [key for name in ("kto", "bco") for key in first[name] if "accurac" in key]


def test_the_same_answers_have_logps_of_another_size_in_orpo(first):
    sums = [first[name]["logps/chosen"] for name in ("dpo", "cpo", "kto", "bco")]
    assert sums == pytest.approx([sums[0]] * 4, rel=1e-4)
    per_token = first["orpo"]["logps/chosen"]
    assert -5 < per_token < -1
    assert sums[0] < 5 * per_token


def test_the_same_answers_have_logits_of_another_size_in_bco(first):
    mean, all_places, added = (first[name]["logits/chosen"] for name in ("dpo", "cpo", "bco"))
    assert first["kto"]["logits/chosen"] == pytest.approx(mean, rel=1e-3)
    assert all_places != pytest.approx(mean, rel=1e-3)
    assert abs(added) > 100 * abs(mean)


def test_the_nll_loss_of_orpo_is_of_prompts_too(first):
    dpo, cpo, orpo = (first[name] for name in ("dpo", "cpo", "orpo"))
    assert orpo["nll_loss"] != pytest.approx(cpo["nll_loss"], rel=1e-3)
    tokens = sum(len(row["chosen"][0]["content"]) + 1 for row in PAIRS)  # a letter each, and the end
    assert cpo["nll_loss"] == pytest.approx(-4 * dpo["logps/chosen"] / tokens, rel=1e-4)


def test_the_same_pairs_have_another_number_of_tokens(first):
    def lengths(kind):
        return sum(len(row[kind][0]["content"]) + 1 for row in PAIRS)

    prompts = sum(len(row["prompt"][0]["content"]) + 3 for row in PAIRS)  # two headers and an end
    assert first["sft"]["num_tokens"] == prompts + lengths("chosen")
    for name in ("dpo", "reward", "kto"):
        assert first[name]["num_tokens"] == 2 * prompts + lengths("chosen") + lengths("rejected")
    assert "num_tokens" not in first["orpo"] | first["cpo"] | first["bco"]


def test_entropy_and_token_accuracy_count_other_tokens(first):
    assert first["dpo"]["entropy"] == pytest.approx(first["kto"]["entropy"], rel=1e-3)  # all answers, of both kinds
    assert first["sft"]["entropy"] != pytest.approx(first["dpo"]["entropy"], rel=1e-4)  # the chosen ones
    assert first["sft"]["mean_token_accuracy"] == pytest.approx(first["dpo"]["mean_token_accuracy"], abs=1e-6)


def test_with_another_beta_the_same_policy_has_another_reward(pairs):
    values = {}
    for beta in (0.1, 0.5):
        trainer = pairs("dpo", beta=beta)
        trainer.ref_model.load_state_dict(changed(trainer.ref_model, by=0.02).state_dict())
        trainer.train()
        values[beta] = trainer.state.log_history[0]
    assert values[0.1]["logps/chosen"] == pytest.approx(values[0.5]["logps/chosen"])
    assert abs(values[0.1]["rewards/chosen"]) > 1e-3
    assert values[0.5]["rewards/chosen"] == pytest.approx(5 * values[0.1]["rewards/chosen"], rel=1e-4)


@pytest.mark.parametrize(("level", "answers"), [("token", False), ("sequence", True)])
def test_grpo_counts_clipped_answers_if_the_ratio_is_that_of_an_answer(checkpoint, tmp_path, level, answers):
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8}
    settings = {"importance_sampling_level": level, "epsilon": 0.05, **sizes}
    trainer = make_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, SUMS, model=checkpoint, reward_funcs=lambda **_: [0.0] * 4, **settings
    )
    batch, logits = random_batch(rows=6)
    trl_loss(trainer, batch, logits)
    (share,) = trainer._metrics["eval"]["clip_ratio/region_mean"]
    assert 0 < share < 1
    tokens = float(batch["completion_mask"].sum())
    assert share * (6 if answers else tokens) == pytest.approx(round(share * (6 if answers else tokens)), abs=1e-4)
    assert share * (tokens if answers else 6) != pytest.approx(round(share * (tokens if answers else 6)), abs=1e-2)


def test_eight_trainers_have_no_flos():
    assert "0 for eight trainers" in PROSE
    zero = [trainer for row in rows() if row.key == "total_flos" and row.limits == "0" for trainer in row.trainers]
    assert len(zero) == 8
    for trainer in zero:
        assert re.search(r"\b0(\*\*)?: ", logged(trainer)["total_flos"]["What it is"]), trainer


# ----------------------------------------------------------------------------------------------------- what cog runs


def test_the_mark_for_the_field_stands_once_before_the_tables():
    assert TEXT.count('<div class="filter-tables"></div>') == 1
    assert TEXT.index("filter-tables") < min(TEXT.index(f"\n## {title}\n") for title in meanings())
    assert ".filter-tables" in (ROOT / "tools/site/site.js").read_text("utf-8")


def test_every_group_is_written_by_cog_into_its_section():
    for title in meanings():
        (printed,) = re.findall(r"\[\[\[cog import metrics; (.+?) \]\]\] -->\n(.*?)<!-- \[\[\[end", part(title), re.S)
        out = io.StringIO()
        with redirect_stdout(out):
            eval(f"metrics.{printed[0].removeprefix('metrics.')}")
        assert out.getvalue() == printed[1], title
