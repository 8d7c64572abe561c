"""Committed measurements are complete, belong to the pinned TRL, and the pictures show them."""

import json
import re

import expected
import pytest
import tables
import trl_source

MEASURED = sorted(path.stem for path in expected.EXPECTED.glob("*.json") if path.stem in tables.TRAINERS)


@pytest.mark.parametrize("trainer", MEASURED)
def test_a_measurement_says_how_it_was_made(trainer):
    result = json.loads((expected.EXPECTED / f"{trainer}.json").read_text())
    assert result["trainer"] == trainer
    assert result["command"] == f"python annotated_examples/{trainer}.py --seed SEED"
    assert result["versions"]["trl"] == trl_source.pinned_version()
    assert set(result["versions"]) == set(expected.PACKAGES)
    assert {"cpu", "cores", "threads", "python"} <= set(result["machine"])
    assert len(result["seeds"]) == len(set(result["seeds"])) == len(result["train_seconds"]) == 5


@pytest.mark.parametrize("trainer", MEASURED)
def test_bands_are_bands(trainer):
    result = json.loads((expected.EXPECTED / f"{trainer}.json").read_text())
    steps = {tuple(band["step"]) for band in result["log"].values()}
    assert len(steps) == 1
    for key, band in result["log"].items():
        rows = list(zip(band["min"], band["mean"], band["max"], strict=True))
        assert len(rows) == len(band["step"]) >= 10
        assert all(low <= mean <= high or low == pytest.approx(high) for low, mean, high in rows), key
    loss = result["log"]["loss" if "loss" in result["log"] else "loss/policy_avg"]  # PPOTrainer has no other
    assert any(low < high for low, high in zip(loss["min"], loss["max"], strict=True))


@pytest.mark.parametrize("trainer", MEASURED)
def test_every_seed_reaches_what_the_method_is_for(trainer):
    """Policies answer at least 15 points more held-out problems right; models that judge are right 95 times in 100."""
    held_out = json.loads((expected.EXPECTED / f"{trainer}.json").read_text())["held_out"]
    judges = {"reward": ["accuracy"], "prm": ["step accuracy", "first error found"]}
    if trainer in judges:
        least = {name: min(held_out[name]["after"]) for name in judges[trainer]}
        assert min(least.values()) >= 0.95, least
    else:
        right = held_out["right answers"]
        gains = [after - before for before, after in zip(right["before"], right["after"], strict=True)]
        assert min(gains) >= 0.15, gains


@pytest.mark.parametrize("trainer", MEASURED)
def test_a_run_is_short(trainer):
    limit = 90 if trainer in ("ppo", "nash_md", "xpo") else 60
    assert max(json.loads((expected.EXPECTED / f"{trainer}.json").read_text())["train_seconds"]) < limit


def test_all_scripts_together_train_for_less_than_a_quarter_of_an_hour():
    seconds = [json.loads((expected.EXPECTED / f"{trainer}.json").read_text())["train_seconds"] for trainer in MEASURED]
    assert sum(map(max, seconds)) < 15 * 60


@pytest.mark.parametrize("trainer", MEASURED)
def test_the_picture_was_drawn_from_this_measurement(trainer):
    assert expected.digest(trainer) in (expected.EXPECTED / f"{trainer}.svg").read_text()


@pytest.mark.parametrize("trainer", MEASURED)
def test_no_small_figure_is_rounded_to_nothing(trainer, capsys):
    tables.expected_held_out(trainer)
    figures = json.loads((expected.EXPECTED / f"{trainer}.json").read_text())["held_out"].values()
    values = [value for figure in figures for when in ("before", "after") for value in figure[when]]
    assert len(re.findall(r"\b0\.000\b", capsys.readouterr().out)) == values.count(0)


def test_every_script_is_measured():
    assert {path.stem for path in (expected.ROOT / "annotated_examples").glob("*.py")} == set(MEASURED)


def test_a_key_that_only_some_runs_log_is_refused():
    whole = [{"step": 1, "loss": 0.5, "entropy": 0.1}]
    with pytest.raises(SystemExit, match=r"entropy was not logged in every run at the steps \[1\]"):
        expected.bands([whole, [{"step": 1, "loss": 0.4}]])


def test_bands_hold_smallest_mean_and_largest():
    found = expected.bands(
        [[{"step": 5, "loss": 1.0, "epoch": 0.1}], [{"step": 5, "loss": 3.0}, {"eval_loss": 9.0, "step": 5}]]
    )
    assert found == {"loss": {"step": [5], "min": [1.0], "mean": [2.0], "max": [3.0]}}
