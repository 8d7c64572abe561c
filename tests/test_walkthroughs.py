"""The walkthroughs side by side: the same parts in the same order, and what each says that can be looked up."""

import ast
import os
import re
from dataclasses import MISSING
from functools import cache

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")

import pytest
from fake_release import PAGES, ROOT
from markdown_pages import language, tokens
from tables import TRAINERS, quick_facts
from trl_source import Source, newest_version, pinned_version
from walkthroughs import Page

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)

FACTS = (
    *("On-policy or off-policy", "Models in memory", "Forward passes a step", "Data set type"),
    *("Stable or experimental", "Import", "Releases", "Paper", "Script", "Mathematics"),
)
FIRST = ("Quick facts", "The key equation", "Symbols", "One row, from the data set to the loss")
REST = ("Inside TRL, line by line", "Logged metrics", "Paper against code", "You should know", "Neighbours")
NEWER = (f"In TRL {newest_version()}", f"After TRL {pinned_version()}")


QUOTED = {"grpo": 20, "dpo": 9, "kto": 6, "sft": 5}  # so many defaults at least; the others: 3


def sections(path) -> list[str]:
    return re.findall(r"^## (.+)$", path.read_text("utf-8"), re.M)


@cache
def imported(path) -> dict:
    """What the import line under "Quick facts" brings, by name; it is run."""
    namespace: dict = {}
    exec(quick_facts(path.read_text("utf-8"))["Import"].strip("`"), namespace)
    return {name: value for name, value in namespace.items() if name != "__builtins__"}


@each_page
def test_a_page_has_the_parts_of_all_pages_in_their_order(path):
    found = sections(path)
    assert found[: len(FIRST)] == list(FIRST)
    assert [title for title in found if title in REST] == list(REST)
    assert found[-3] == REST[-1]
    assert found[-2] in NEWER
    assert found[-1] == "Papers"
    more = set(found) - {*FIRST, *REST, *NEWER, "Papers"}  # between the row and TRL's lines
    assert all(found.index(title) < found.index(REST[0]) for title in more)


def test_the_index_names_these_parts_in_this_order():
    text = (ROOT / "annotated_trainers" / "index.md").read_text("utf-8")
    table = text.split("\n## How a page is built\n", 1)[1].split("\n\n")
    rows = next(part for part in table if part.startswith("| part"))
    named = re.findall(r"^\| (.+?) \|", rows, re.M)[2:]
    assert named == [*FIRST, *REST, f"{NEWER[0]}, or {NEWER[1]}"]


@each_page
def test_the_quick_facts_are_those_of_all_pages(path):
    facts = quick_facts(path.read_text("utf-8"))
    assert [name for name in facts if name in FACTS] == list(FACTS)
    assert facts["Script"] == f"[`annotated_examples/{path.stem}.py`](../annotated_examples/{path.stem}.py)"


@each_page
def test_the_import_works_and_says_whether_the_trainer_is_stable(path):
    facts = quick_facts(path.read_text("utf-8"))
    assert {re.sub(r".*(Trainer|Config)$", r"\1", name) for name in imported(path)} == {"Trainer", "Config"}
    assert facts["Stable or experimental"].startswith("experimental" if "experimental" in facts["Import"] else "stable")


@each_page
def test_every_test_that_a_page_names_exists(path):
    file = ROOT / "tests" / f"test_walkthrough_{path.stem}.py"
    tests = {node.name for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}
    named = set(re.findall(r"\btest_\w+", path.read_text("utf-8"))) - {file.stem}
    commands = set(re.findall(r"-k (\w+)", path.read_text("utf-8")))
    assert len(named) >= 10
    assert named <= tests
    assert {word for word in commands if not any(word in test for test in tests)} == set()


@each_page
def test_the_defaults_that_a_page_quotes_are_those_of_the_config(path):
    """Wherever a page says `name` (default VALUE)."""
    text = path.read_text("utf-8")
    quoted = re.findall(r"`(\w+)`\s\(default\s([^;,)]+)", text)
    (config,) = (value for name, value in imported(path).items() if name.endswith("Config"))
    defaults = {
        name: field.default if field.default is not MISSING else field.default_factory()
        for name, field in config.__dataclass_fields__.items()
    }
    assert len(quoted) >= QUOTED.get(path.stem, 3)
    for name, value in quoted:
        told, true = value.strip('`"'), defaults[name]
        if isinstance(true, list) and len(true) == 1:  # the config unpacks it
            (true,) = true
        same = float(told) == true if isinstance(true, (int, float)) and not isinstance(true, bool) else None
        assert same or told in {str(true), repr(true).strip("'")}, f"`{name}` (default {value}): it is {true!r}"


@each_page
def test_no_formula_of_a_page_is_hidden_in_a_picture_or_a_fence_without_language(path):
    assert all(language(token.info) for token in tokens(path.read_text("utf-8")) if token.type == "fence")


@each_page
def test_a_page_opens_with_what_the_method_is_for(path):
    opening = path.read_text("utf-8").split("<!-- covers:")[0].split("\n\n", 1)[1].strip()
    sentences = re.findall(r"[^.]+\.(?=\s|$)", opening)
    assert 2 <= len(sentences) <= 5
    assert "`" not in opening  # a newcomer knows no argument's name


def test_the_pages_explain_at_least_4500_lines_of_the_algorithms():
    source = Source.installed()
    pages = [Page(path.read_text("utf-8"), path.name, source) for path in PAGES]
    covered = set().union(*(page.rows()[-1].code for page in pages))
    shown = set().union(*(page.rows()[-1].shown for page in pages))
    assert len(covered) >= 4500
    assert len(shown) / len(covered) >= 0.9


def test_there_is_a_page_for_each_trainer():
    assert {path.stem for path in PAGES} == set(TRAINERS)
