"""The share of the covered lines that a walkthrough shows: counted as one would by hand, and held for each page."""

import pytest
from fake_release import PAGES, pages, release
from trl_source import Source
from walkthroughs import Page, main

# The comment at the end of a line says whether the line counts as code, and the how manieth of its symbol it is.
TOY = '''\
"""The module's docstring."""

import math  # the module is no symbol


class Toy:  # 1
    """A docstring
    over two lines."""

    @staticmethod  # 2, and 1 of `text`
    @cached(  # 3, 2
        size=3,  # 4, 3
    )  # 5, 4
    def text(n):  # 6, 5
        """One line."""
        # only a comment

        words = """one  # 7, 6
        # in a string, so it is code: 8, 7

        two"""  # 9, 8

        def inner(x):  # 10, 9 and 1 of `inner`
            """A docstring."""
            return x  # 11, 10, 2

        return inner(words)  # 12, 11

    beta: float = 0.1  # 13
    """A string that stands alone is documentation."""

    def other(self): "A docstring beside code."  # 14
'''
MODULE = "trl.trainer.toy"
PAGE = f"""\
<!-- covers:
{MODULE}.Toy.text
{MODULE}.Toy.other
-->
<!-- coverage-table -->
<!-- /coverage-table -->
<!-- left-out-table -->
<!-- /left-out-table -->

<!-- excerpt: {MODULE}.Toy.text
from: @staticmethod
to: words =
-->
Lines 10 to 17: six of code, and a docstring, a comment and a blank line.
<!-- /excerpt -->

<!-- excerpt: {MODULE}.Toy.text
from: def text(n):
to: two"
-->
Lines 14 to 21, of which two were shown before.
<!-- /excerpt -->

<!-- left-out: {MODULE}.Toy.text.inner
reason: nested
-->
"""


@pytest.fixture
def toy(tmp_path) -> Source:
    return release(tmp_path, "9.9.0", {"trainer/__init__.py": "", "trainer/toy.py": TOY})


@pytest.mark.parametrize(
    ("symbol", "expected"),
    [
        ("Toy", {6, 10, 11, 12, 13, 14, 18, 19, 21, 23, 25, 27, 29, 32}),
        ("Toy.text", {10, 11, 12, 13, 14, 18, 19, 21, 23, 25, 27}),
        ("Toy.text.inner", {23, 25}),
        ("Toy.beta", {29}),
        ("Toy.other", {32}),
    ],
)
def test_code_lines_are_counted_as_by_hand(toy, symbol, expected):
    assert toy.symbol(f"{MODULE}.{symbol}").code == expected


def test_a_line_counts_once_and_is_shown_left_out_or_missing(toy):
    page = Page(PAGE, "toy.md", toy)
    assert page.problems == []
    text, other, together = page.rows()
    numbers = [{n for _, n in lines} for lines in (text.shown, text.left, text.unaccounted)]
    assert numbers == [{10, 11, 12, 13, 14, 18, 19, 21}, {23, 25}, {27}]
    assert [n for _, n in other.unaccounted] == [32]
    assert [len(x) for x in (together.code, together.shown, together.left, together.unaccounted)] == [12, 8, 2, 2]
    assert together.share == 8 / 12


def test_a_symbol_inside_another_covered_one_is_not_counted_twice(toy):
    page = Page(PAGE.replace("Toy.other\n", "Toy.text.inner\n"), "toy.md", toy)
    assert [len(row.code) for row in page.rows()] == [11, 2, 11]


def test_an_excerpt_of_a_symbol_that_is_not_covered_adds_nothing(toy):
    more = f"<!-- excerpt: {MODULE}.Toy\nfrom: beta: float\n-->\nThe default.\n<!-- /excerpt -->\n"
    page = Page(PAGE + more, "toy.md", toy)
    assert page.problems == []
    assert page.rows()[-1].share == 8 / 12


def test_the_command_prints_the_missing_lines_and_fails_while_there_are_any(toy, tmp_path, capsys):
    folder = pages(tmp_path, toy=PAGE, index="# No directives here\n")
    command = ["--pages", str(folder), "--trl", str(tmp_path), "coverage"]
    assert main(command) == 1
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["page", "symbols", "code", "shown", "left", "out", "missing", "share"]
    assert [row.split() for row in rows] == [["annotated_trainers/toy.md", "2", "12", "8", "2", "2", "66.7%"]]

    assert main([*command, "--lines", "toy.md"]) == 1
    printed = capsys.readouterr().out
    assert f"{MODULE}.Toy.text: 1 of 11 code lines\n    27          return inner(words)" in printed
    assert f"{MODULE}.Toy.other: 1 of 1 code lines\n    32      def other(self): " in printed
    assert "return x" not in printed

    rest = f"<!-- left-out: {MODULE}.Toy.text\nfrom: return inner(words)\nreason: the end\n-->\n"
    pages(tmp_path, toy=PAGE.replace(f"{MODULE}.Toy.other\n", "") + rest)
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[2:] == ["11", "8", "3", "0", "72.7%"]


REQUIRED = 0.95  # of the code lines of the symbols that a page names


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_covered_line_is_shown_or_left_out_and_enough_of_them_is_shown(path):
    page = Page(path.read_text("utf-8"), path.name, Source.installed())
    assert page.problems == []
    *rows, together = page.rows()
    assert {row.block.symbol: sorted(n for _, n in row.unaccounted) for row in rows if row.unaccounted} == {}
    assert together.share >= REQUIRED
