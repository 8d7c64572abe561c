"""Scripts on one another's folders: the chains run, each stage takes the earlier folders, and the figures show it."""

import json
import sys

import chain
import expected
import pytest
import trl_source
from examples import EXAMPLES, ROOT, SHORT, load, run

COMMITTED = {name: json.loads((expected.EXPECTED / f"chain_{name}.json").read_text()) for name in chain.CHAINS}


@pytest.mark.parametrize("name", chain.CHAINS)
def test_the_figures_are_those_of_the_commands(name):
    found = COMMITTED[name]
    assert [stage["command"] for stage in found["stages"]] == [
        chain.command(s, *flags) for s, flags in chain.CHAINS[name]
    ]
    assert found["versions"]["trl"] == trl_source.pinned_version()
    for stage in found["stages"]:
        assert len(stage["before"]) == len(stage["after"]) == len(stage["seconds"]) == len(found["seeds"]) == 3


@pytest.mark.parametrize("name", ["ppo", "dpo"])
def test_a_chain_begins_where_sft_ended_and_ends_above_it(name):
    """The same seed draws the same answers, so the figure before a stage is exactly the one after the stage that made it."""
    sft, *_, last = COMMITTED[name]["stages"]
    assert last["before"] == sft["after"]
    assert all(after > before for before, after in zip(sft["after"], last["after"], strict=True))


def test_the_online_methods_gain_with_a_reward_model_of_reward_py():
    reward, *policies = COMMITTED["online"]["stages"]
    assert min(reward["after"]) >= 0.95
    for stage in policies:
        gains = [after - before for before, after in zip(stage["before"], stage["after"], strict=True)]
        assert min(gains) >= 0.15, stage["script"]


@pytest.mark.parametrize("name", chain.CHAINS)
def test_the_command_runs_a_chain_shortened(name, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "chain.py"), name, "--folder", "here", "--", *SHORT]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {}
    for script, flags in chain.CHAINS[name]:
        assert f"$ {chain.command(script, *flags, *SHORT)}" in done.stdout
        results[script] = json.loads((tmp_path / "here" / "outputs" / f"{script}-toy" / "held_out.json").read_text())
    if "sft" in results:
        assert results[name]["before"]["right answers"] == results["sft"]["after"]["right answers"]


@pytest.mark.parametrize(("name", "place"), [(n, i) for n, stages in chain.CHAINS.items() for i in range(len(stages))])
def test_every_stage_gets_toy_settings(name, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (chain.SFT, chain.REWARD):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "run.json").write_text('{"script": "any", "toy": true}')
    script, flags = chain.CHAINS[name][place]
    assert load(EXAMPLES / f"{script}.py").parse(flags)[0]


def test_a_stage_that_fails_ends_the_chain(tmp_path):
    done = run(
        [sys.executable, str(ROOT / "tools" / "chain.py"), "dpo", "--folder", "here", "--", "--beta", "none"], tmp_path
    )
    assert done.returncode == 1
    assert "the chain ends here, sft.py gave" in done.stderr
    assert "dpo.py" not in done.stdout
