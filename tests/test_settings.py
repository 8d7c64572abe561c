"""What each toy setting is worth: the tool does what it says, its committed figures are whole, and the scripts quote them."""

import json
import re
import statistics
from itertools import pairwise

import pytest
import reward_hacking
import settings
from examples import EXAMPLES, TOY

COMMITTED = json.loads(settings.RESULT.read_text())


def test_a_change_becomes_flags():
    assert settings.flags("beta=0.1") == ["--beta", "0.1"]
    assert settings.flags("system_message= new_layers=0") == ["--system_message", "", "--new_layers", "0"]
    assert settings.flags(settings.AS_SHIPPED) == []


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return settings.validation_world(tmp_path_factory.mktemp("world"))


def test_the_scripts_see_validation_rows_where_they_look_for_test_rows(world):
    for data in (TOY / "data").iterdir():
        seen, other = (world / "toy" / "data" / data.name / f"{split}.jsonl" for split in ("test", "validation"))
        assert seen.read_bytes() == (data / "validation.jsonl").read_bytes() != (data / "test.jsonl").read_bytes()
        assert not other.exists()
    for name in settings.CHANGES:
        assert (world / f"{name}.py").read_bytes() == (EXAMPLES / f"{name}.py").read_bytes()
    assert "validation" in {path.stem for path in (TOY / "data" / "preference").iterdir()}  # the world itself is whole


def few_problems(world, number):
    path = world / "toy" / "data" / "prompt_only" / "test.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:number]) + "\n")


def test_a_run_has_the_change_and_keeps_what_is_said(world):
    few_problems(world, 8)
    found = settings.run("sft", "learning_rate=1e-3", 7, world, "--max_steps", "2", "--logging_steps", "1")
    assert found["seed"] == 7 and set(found["held_out"]) == {"right answers", "loss", "mean_token_accuracy"}
    assert found["held_out"]["right answers"] * 8 == int(found["held_out"]["right answers"] * 8)  # of eight problems
    assert found["first"]["learning_rate"] == pytest.approx(1e-3)
    assert len(found["loss"]) == 2 and found["loss"][0] == found["first"]["loss"] != found["last"]["loss"]


def test_fooled_counts_wrong_answers_with_a_score_above_0(world, monkeypatch):
    few_problems(world, 32)
    rows = [json.loads(line) for line in (world / "toy/data/prompt_only/test.jsonl").read_text().splitlines()]
    seen = []

    def score(model, chats):
        seen[:] = [chat[-1]["content"].endswith(f"#{row['answer']}") for chat, row in zip(chats, rows, strict=True)]
        return [1.0 if right else -1.0 for right in seen]  # a judge without error

    monkeypatch.setattr(reward_hacking, "score", score)
    assert settings.fooled(TOY / "policy", world, seed=1) == 0
    assert 0 < sum(seen) < len(seen)
    monkeypatch.setattr(reward_hacking, "score", lambda model, chats: score(model, chats) and [1.0] * len(chats))
    assert settings.fooled(TOY / "policy", world, seed=1) == seen.count(False) / len(seen)


def test_only_what_is_missing_is_run_the_shipped_settings_first():
    found = settings.missing(["dpo", "sft"], {"runs": {"dpo": {settings.AS_SHIPPED: []}}})
    assert found[0] == ("sft", settings.AS_SHIPPED)
    assert set(found) == {("sft", change) for change in ("", *settings.CHANGES["sft"])} | {
        ("dpo", change) for change in settings.CHANGES["dpo"]
    }
    assert settings.missing(list(settings.CHANGES), COMMITTED) == []  # the committed file is whole


def test_figures_of_another_machine_are_not_mixed_in(monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "RESULT", tmp_path / "settings.json")
    settings.RESULT.write_text(json.dumps(COMMITTED | {"machine": {"cpu": "another"}}))
    before = settings.RESULT.read_bytes()
    with pytest.raises(SystemExit, match="another machine"):
        settings.measure(["sft"], again=True, jobs=1)
    assert settings.RESULT.read_bytes() == before


def test_each_change_has_all_seeds():
    assert list(COMMITTED["runs"]) == list(settings.TRAINERS)
    for name, changes in COMMITTED["runs"].items():
        assert set(changes) == {settings.AS_SHIPPED, *settings.CHANGES[name]}
        for runs in changes.values():
            assert [run["seed"] for run in runs] == COMMITTED["seeds"] == list(settings.SEEDS)
            assert all(("fooled" in run) == (name in settings.JUDGED) for run in runs)


def test_a_change_is_one_that_the_script_does_not_make_by_itself():
    """Otherwise a row of the table would compare the shipped settings with themselves."""
    import compare
    import tables

    for name, changes in settings.CHANGES.items():
        script = compare.load(name)
        for change in changes:
            for part in change.split():
                setting, _, value = part.partition("=")
                own = tables.setting_of(script, setting)
                assert str(own) != value and not (re.fullmatch(r"[\d.e-]+", value) and float(value) == own), (
                    name,
                    part,
                )


# What the scripts and the page say about these figures


def mean(name, change, figure=None):
    runs = COMMITTED["runs"][name][change]
    return statistics.fmean(run["held_out"][figure or next(iter(run["held_out"]))] for run in runs)


def ranges_meet(name, change):
    shipped, changed = (
        [next(iter(run["held_out"].values())) for run in COMMITTED["runs"][name][one]]
        for one in (settings.AS_SHIPPED, change)
    )
    return max(min(shipped), min(changed)) <= min(max(shipped), max(changed))


def last(name, change, key):
    return statistics.fmean(run["last"][key] for run in COMMITTED["runs"][name][change])


@pytest.mark.parametrize(
    ("name", "words", "changes"),
    [
        ("reward", "Without the next three settings as many steps put {} of the pairs in order", [2]),
        ("reward", "without the first alone, {}", [0]),
        ("reward", "before the new ones can read\n    # it ({})", [3]),
        ("prm", "Without the next three settings a run of this length judges {} of the steps", [2]),
        ("orpo", "and {} of the answers end right", [0]),
    ],
)
def test_a_comment_quotes_the_mean(name, words, changes):
    text = (EXAMPLES / f"{name}.py").read_text()
    for change in changes:
        assert words.format(f"{mean(name, settings.CHANGES[name][change]):.2f}") in text


def test_the_comment_on_prm_quotes_its_other_figures():
    text = " ".join((EXAMPLES / "prm.py").read_text().replace("\n    #", "").split())
    first = mean("prm", settings.CHANGES["prm"][2], "first error found")
    assert f'rightly, and "first error found" is {first:.2f} (README.md, on validation rows)' in text
    rows = [json.loads(line) for line in (TOY / "data/stepwise_supervision/validation.jsonl").read_text().splitlines()]
    labels = [label for row in rows for label in row["labels"]]
    flawless = statistics.fmean(all(row["labels"]) for row in rows)
    assert f'to say "right" everywhere gives {statistics.fmean(labels):.2f} and {flawless:.2f}' in text


@pytest.fixture(scope="module")
def base():
    """The share of right answers on validation rows that all policies begin with, over the seeds."""
    rows, tokenizer, policy = (
        reward_hacking.rows("prompt_only", "validation"),
        reward_hacking.tokenizer(),
        reward_hacking.policy(),
    )
    right = []
    for seed in COMMITTED["seeds"]:
        answers, _ = reward_hacking.draw_answers(policy, tokenizer, rows, seed)
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        right += [text.endswith(f"#{row['answer']}") for text, row in zip(texts, rows, strict=True)]
    return statistics.fmean(right)


def test_what_the_page_says_about_beta(base):
    assert "about where it began, at 0.66," in (EXAMPLES / "README.md").read_text()
    assert base == pytest.approx(0.66, abs=0.02)  # another processor draws a few other answers
    assert abs(mean("dpo", "beta=0.1") - base) < 0.04 and mean("kto", "beta=0.1") < base - 0.05
    for name in ("dpo", "kto"):
        runs = COMMITTED["runs"][name]["beta=0.1"]
        assert all(run["last"]["rewards/margins"] > 5 * run["first"]["rewards/margins"] for run in runs)
        assert all(run["last"]["logps/chosen"] < run["first"]["logps/chosen"] - 0.5 for run in runs)
        assert all(run["last"]["logps/rejected"] < run["first"]["logps/rejected"] - 2 for run in runs)
        assert last(name, settings.AS_SHIPPED, "logps/chosen") > -0.3
    assert 0.02 < mean("bco", settings.AS_SHIPPED) - mean("bco", "beta=0.1") < 0.05
    assert mean("cpo", "cpo_alpha=0") < base - 0.1 and last("cpo", "cpo_alpha=0", "logps/chosen") < -2
    assert mean("cpo", "cpo_alpha=0") < mean("cpo", "cpo_alpha=1") < mean("cpo", settings.AS_SHIPPED)


def test_what_the_page_says_about_fooled_reward_models():
    runs = COMMITTED["runs"]["online_dpo"]["beta=0.1"]
    fooled = [run for run in runs if run["fooled"] > 0.1]
    (one,) = fooled
    page = (EXAMPLES / "README.md").read_text()
    assert f"{one['held_out']['right answers']:.2f} of its answers are right" in page
    assert all(one["last"]["objective/scores"] >= run["last"]["objective/scores"] for run in runs)
    for name in settings.JUDGED:
        assert all(run["fooled"] < 0.03 for run in COMMITTED["runs"][name][settings.AS_SHIPPED])


def test_what_the_page_says_about_the_rest():
    for name in ("nash_md", "ppo"):
        assert mean(name, "temperature=0.7") < mean(name, settings.AS_SHIPPED) - 0.03
    for name in ("reward", "prm"):
        hint, layer, *_ = settings.CHANGES[name]
        assert mean(name, layer) < mean(name, hint) - 0.05 < mean(name, settings.AS_SHIPPED) - 0.05
        assert ranges_meet(name, hint)  # in some seeds only
    for name, change in (
        ("kto", "undesirable_weight=1"),
        ("ppo", "cliprange_value=0.2"),
        ("ppo", "kl_coef=0.05"),
        ("grpo", "num_generations=2"),
        ("gkd", "lmbda=0"),
        ("gkd", "lmbda=1"),
        ("gkd", "temperature=0.9"),
    ):
        assert ranges_meet(name, change), (name, change)
    for run in COMMITTED["runs"]["sft"]["learning_rate=1e-3"]:  # "the loss jumps up and down"
        assert sum(after > before + 1e-3 for before, after in pairwise(run["loss"])) >= 2
    for name, change in (("sft", "learning_rate=1e-3"), ("grpo", "learning_rate=1e-3"), ("rloo", "learning_rate=1e-4")):
        assert mean(name, change) < mean(name, settings.AS_SHIPPED), name


def test_a_number_that_need_not_be_there_is_off_at_0():
    import compare
    import tables

    words = tables.change_in_words(compare.load("reward"), "system_message= new_layers=0 new_learning_rate=0")
    assert words == "`system_message` mark → off, `new_layers` 1 → 0, `new_learning_rate` 2e-3 → off"
    assert tables.change_in_words(compare.load("gkd"), "lmbda=0") == "`lmbda` 0.5 → 0"
