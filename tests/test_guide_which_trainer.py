"""reference_guides/which_trainer.md: every trainer can be reached, and what the page says of it is so.

The number of models in memory is counted in tests/test_quick_reference.py, where all fifteen are trained.
"""

import importlib
import re

import pytest
import quick_reference
import which
from examples import EXAMPLES, load
from markdown_pages import GUIDES, fences
from tables import NAMES, TRAINERS

PAGE = GUIDES / "which_trainer.md"
TEXT = PAGE.read_text("utf-8")
HEADINGS = {
    "answers worth imitating": "You have answers worth imitating",
    "a larger model": "You have a larger model",
    "pairs: better, worse": "You have pairs",
    "thumbs up and down": "You have thumbs up and down",
    "a program that checks": "You have a program that checks answers",
    "a reward model": "You have a reward model",
    "a verdict on every step": "You have a verdict on every step",
}


def test_every_trainer_can_be_reached_and_no_way_stands_twice():
    assert {name for _, name, _, _ in which.WAYS} == set(TRAINERS)
    assert len({(have, name) for have, name, _, _ in which.WAYS}) == len(which.WAYS)


@pytest.mark.parametrize("have", HEADINGS)
def test_the_part_about_what_you_have_names_its_trainers_in_the_order_of_the_table(have):
    part = TEXT.split(f"\n## {HEADINGS[have]}\n", 1)[1].split("\n## ", 1)[0]
    named = re.findall(r"\*\*\[\w+\]\(../annotated_trainers/(\w+)\.md\)\.?\*\*", part)
    assert named == [name for told, name, _, _ in which.WAYS if told == have]


def test_the_parts_are_those_of_the_table():
    assert list(HEADINGS) == list(dict.fromkeys(have for have, *_ in which.WAYS))


@pytest.mark.parametrize(("name", "flags"), [(name, flags) for _, name, _, flags in which.WAYS])
def test_a_command_is_understood_by_its_script(name, flags):
    toy, *_ = load(EXAMPLES / f"{name}.py").parse([*flags.split(), "--use_cpu"])
    assert toy


def test_the_picture_ends_at_trainers_of_the_table():
    (diagram,) = [fence.text for fence in fences(PAGE) if fence.lang == "mermaid"]
    ends = {name for label in re.findall(r'\["([^"]+)"\]', diagram) for name in label.split(" or ")}
    assert ends <= set(NAMES.values())
    first = {have: name for have, name, _, _ in reversed(which.WAYS)}
    assert {NAMES[name] for name in first.values()} <= ends  # the first choice of each kind of data


def test_what_a_trainer_does_while_it_trains_is_told_for_each():
    told = {name: which.samples(name) for name in TRAINERS}
    assert {name for name, word in told.items() if word == "half the time"} == {"gkd"}
    assert {name for name, word in told.items() if word == "yes"} == {
        *("ppo", "grpo", "rloo"),
        *("online_dpo", "nash_md", "xpo"),
    }


def test_the_newest_release_lacks_five():
    lacking = {name for name in TRAINERS if not which.newest_has(name)}
    assert lacking == {"ppo", "bco", "nash_md", "xpo", "prm"}
    told = {
        name for name in lacking if "newest TRL" in re.split(rf"annotated_trainers/{name}\.md\)\.?\*\*", TEXT)[1][:700]
    }
    assert told == lacking


def test_no_method_beat_sft_on_the_toy_world():
    rows = [quick_reference.measured(name) for name in TRAINERS]
    after = {row["name"]: sum(row["after"]) for row in rows if row["figure"] == "right answers"}
    assert max(after, key=after.get) == "sft"


def test_sampling_takes_time_on_the_toy_world():
    rows = [quick_reference.measured(name) for name in TRAINERS]
    policies = {row["name"]: row["seconds"] for row in rows if row["figure"] == "right answers"}
    sampling = {name for name in policies if which.samples(name) == "yes"}
    reading = {name for name in policies if which.samples(name) == "no"}
    assert min(policies[name] for name in sampling) > max(policies[name] for name in reading)


def test_gradient_checkpointing_is_on_in_all_fifteen():
    for name in TRAINERS:
        module, config = re.search(r"from (\S+) import (\w+Config)", quick_reference.facts(name)["Import"]).groups()
        fields = getattr(importlib.import_module(module), config).__dataclass_fields__
        assert fields["gradient_checkpointing"].default is True, name
