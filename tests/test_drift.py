"""What the drift report and the page for readers say about a newer release: on two small ones, and on the real two."""

import json
import re
import shutil
import zipfile
from types import SimpleNamespace

import drift as drift_tool
import pytest
from drift import Unavailable, main, obtain, render
from fake_release import PAGES, ROOT, pages, release
from tables import NAMES, TRAINERS
from trl_source import Source, SourceError, SymbolError, fold, newest_version
from walkthroughs import Page

OLD = """\
class Toy:
    def loss(self, x):
        a = first(x)
        b = second(a)
        c = third(b)
        return a + b + c

    def log(self, logs):
        mode = "train"
        self.metrics.append(logs)
        super().log(logs)

    def gone(self):
        return 0


class Collator:
    def call(self, rows):
        return pad(rows)
"""
NEW = """\
from elsewhere import Collator


class Toy:
    def loss(self, x):
        a = first(x)
        a = a.detach()
        b = second(a)
        c = third(b, scale=2)
        d = fourth(c)
        return a + b + c

    def log(self, logs):
        mode = "train"
        if self.deep:
            self.metrics.append(logs)
        self.metrics.append(logs)
        super().log(logs, start_time)
"""
MOVED = """\
class Collator:
    def call(self, rows):
        return pad(rows)
"""
TOY = "trl.trainer.toy.Toy"
COLLATOR = "trl.trainer.toy.Collator"


def excerpt(symbol: str, start: str, to: str = "") -> str:
    to = f"to: {to}\n" if to else ""
    return f"<!-- excerpt: {symbol}\nfrom: {start}\n{to}-->\nNotes on {start}.\n<!-- /excerpt -->\n"


PAGE = (
    f"<!-- covers:\n{TOY}.loss\n{TOY}.log\n{TOY}.gone\n{COLLATOR}.call\n-->\n<!-- coverage-table -->\n<!-- /coverage-table -->\n"
    + excerpt(f"{TOY}.loss", "def loss", "a = first(x)")  # line 9: only moves
    + excerpt(f"{TOY}.loss", "b = second(a)", "c = third(b")  # line 15: changes
    + excerpt(f"{TOY}.log", 'mode = "train"')  # line 21: only moves
    + excerpt(f"{TOY}.log", "self.metrics.append(logs)")  # line 26: matches twice
    + excerpt(f"{TOY}.log", "super().log(logs)")  # line 31: matches nothing
    + excerpt(f"{TOY}.gone", "return 0")  # line 36: its symbol is gone
    + excerpt(f"{COLLATOR}.call", "return pad(rows)")  # line 41: its class is in another module
)


@pytest.fixture
def drift(tmp_path):
    """Runs the command from the old release to the new one; returns the exit status and what stands in the JSON."""
    release(tmp_path / "old", "1.0.0", {"trainer/__init__.py": "", "trainer/toy.py": OLD})
    release(tmp_path / "new", "2.0.0", {"trainer/__init__.py": "", "trainer/toy.py": NEW, "data/pad.py": MOVED})

    def run(*options: str, page: str = PAGE, target: str = str(tmp_path / "new")):
        folder = pages(tmp_path, toy=page)
        written = tmp_path / "drift.json"
        command = ["--pages", str(folder), "--trl", str(tmp_path / "old"), target, "--json", str(written)]
        status = main([*command, *options])
        return status, json.loads(written.read_text())

    return run


def test_each_difference_is_reported_once_and_under_its_own_head(drift):
    _, report = drift()
    assert (report["from"], report["to"]) == ("1.0.0", "2.0.0")
    found = report["pages"]["annotated_trainers/toy.md"]

    gone = {entry["symbol"]: (entry["now"], entry["page_lines"]) for entry in found["gone"]}
    assert gone == {f"{TOY}.gone": ([], [36]), f"{COLLATOR}.call": (["trl.data.pad.Collator.call"], [41])}

    twice, nothing = found["broken"]
    assert (twice["page_line"], nothing["page_line"]) == (26, 31)
    assert "matches 2 lines" in twice["message"] and "line 16: " in twice["message"]
    assert "line 17: " in twice["message"] and "matches no line" in nothing["message"]
    assert 'notes under this excerpt: "Notes on super().log(logs)."' in nothing["reread"]

    [changed] = found["changed"]
    assert (changed["page_line"], changed["old"], changed["new"]) == (15, [4, 5], [8, 9])
    assert changed["diff"][1:] == [" b = second(a)", "-c = third(b)", "+c = third(b, scale=2)"]

    moved = {entry["page_line"]: (entry["old"], entry["new"]) for entry in found["moved"]}
    assert moved == {9: ([2, 3], [5, 6]), 21: ([9, 9], [14, 14]), 41: ([19, 19], [3, 3])}

    gained = {entry["symbol"]: [number for number, _ in entry["lines"]] for entry in found["gained"]}
    assert gained == {f"{TOY}.loss": [7, 10], f"{TOY}.log": [15, 17, 18]}


def test_a_namesake_that_the_old_release_has_too_is_no_successor(drift, tmp_path):
    helper = "def pad(rows):\n    return rows\n"
    release(tmp_path / "before", "1.0.0", {"trainer/__init__.py": "", "trainer/toy.py": helper, "data/pad.py": helper})
    release(tmp_path / "after", "2.0.0", {"trainer/__init__.py": "", "trainer/toy.py": "", "data/pad.py": helper})
    covers = "<!-- covers:\ntrl.trainer.toy.pad\n-->\n<!-- coverage-table -->\n<!-- /coverage-table -->\n"
    page = covers + excerpt("trl.trainer.toy.pad", "return rows")
    folder, written = pages(tmp_path, toy=page), tmp_path / "drift.json"
    main(["--pages", str(folder), "--trl", str(tmp_path / "before"), str(tmp_path / "after"), "--json", str(written)])
    [gone] = json.loads(written.read_text())["pages"]["annotated_trainers/toy.md"]["gone"]
    assert (gone["now"], gone["at"]) == ([], None)


def test_a_left_out_that_grew_is_reported_as_changed(drift):
    left = f"<!-- left-out: {TOY}.loss\nfrom: b = second\nto: return\nreason: dull\n-->\n<!-- left-out-table -->\n<!-- /left-out-table -->\n"
    page = PAGE.replace(excerpt(f"{TOY}.loss", "b = second(a)", "c = third(b"), left)
    [changed] = drift(page=page)[1]["pages"]["annotated_trainers/toy.md"]["changed"]
    assert changed["kind"] == "left-out" and "+d = fourth(c)" in changed["diff"]


def test_the_report_in_words_names_lines_notes_and_the_difference(drift, tmp_path):
    drift("--markdown", str(tmp_path / "drift.md"))
    text = (tmp_path / "drift.md").read_text()
    assert text.startswith("# From TRL 1.0.0 to 2.0.0\n")
    assert "| annotated_trainers/toy.md | 2 | 2 | 1 | 3 | 5 |" in text
    assert "there is `trl.data.pad.Collator.call` (used in line 41)" in text
    assert (
        'Line 15, excerpt of `trl.trainer.toy.Toy.loss`, 4-5 -> 8-9. Reread the notes under this excerpt: "Notes on b'
        in text
    )
    assert "\n-c = third(b)\n+c = third(b, scale=2)\n" in text
    assert "\n    7          a = a.detach()\n" in text
    assert "`loss` 2 -> 5; `log` 9 -> 14; `call` 19 -> 3" in text


def test_the_exit_status_tells_of_drift_only_when_asked_and_not_of_moves(drift, tmp_path):
    assert drift()[0] == 0
    assert drift("--fail")[0] == 1
    release(tmp_path / "moved", "1.0.1", {"trainer/__init__.py": "", "trainer/toy.py": "\n\n" + OLD})
    status, report = drift("--fail", target=str(tmp_path / "moved"))
    found = report["pages"]["annotated_trainers/toy.md"]
    assert status == 0
    assert {kind: len(entries) for kind, entries in found.items() if entries} == {"moved": 7}


def test_a_release_does_not_drift_from_itself(drift, tmp_path):
    found = drift(target=str(tmp_path / "old"))[1]["pages"]["annotated_trainers/toy.md"]
    assert not any(found.values())


def test_a_wheel_is_unpacked_once_and_read(drift, tmp_path, monkeypatch):
    monkeypatch.setattr(drift_tool, "REPOSITORY", tmp_path)
    wheel = tmp_path / "trl-2.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (tmp_path / "new").rglob("*"):
            archive.write(path, path.relative_to(tmp_path / "new"))
    assert drift(target=str(wheel)) == drift()
    assert [path.name for path in (tmp_path / ".cache").iterdir()] == ["trl-2.0.0-py3-none-any"]
    assert drift(target=str(wheel)) == drift()


@pytest.mark.parametrize("target", ["no-such-folder", "latest", "1.0 --index-url x"])
def test_a_target_that_is_no_release_is_refused_by_name(target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drift_tool, "REPOSITORY", tmp_path)
    release(tmp_path / "old", "1.0.0", {"trainer/__init__.py": "", "trainer/toy.py": OLD})
    folder = pages(tmp_path, toy=PAGE)
    assert main(["--pages", str(folder), "--trl", str(tmp_path / "old"), target]) == 2
    assert f"`{target}` is neither a folder, nor a wheel, nor a version like 1.16.0" in capsys.readouterr().err
    assert not (tmp_path / ".cache").exists()


def test_a_folder_without_trl_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no TRL in .*: neither"):
        Source.at(tmp_path)


def test_an_excerpt_whose_end_is_found_far_away_is_broken_and_explains_nothing(drift, tmp_path):
    """`b = second(a)` is in one line still, but that is a new one at the end of the method."""
    far = "\n".join(f"        x{number} = {number}" for number in range(30)) + "\n        b = second(a)\n"
    new = OLD.replace("        b = second(a)\n", "        b = other(a)\n").replace(
        "        return a + b + c\n", "        return a + b + c\n" + far
    )
    release(tmp_path / "far", "2.0.0", {"trainer/__init__.py": "", "trainer/toy.py": new})
    page = PAGE.replace(excerpt(f"{TOY}.loss", "def loss", "a = first(x)"), "").replace(
        "from: b = second(a)", "from: a = first(x)"
    )
    page = page.replace("to: c = third(b", "to: b = second(a)")
    found = drift(page=page, target=str(tmp_path / "far"))[1]["pages"]["annotated_trainers/toy.md"]
    [broken] = found["broken"]
    assert (broken["old"], broken["new"], broken["key"]) == ([3, 4], [3, 4], "both")
    assert broken["message"].startswith("the anchors enclose 35 code lines, more than 22: lines 3-37 of trl/")
    assert [number for number, _ in found["gained"][0]["lines"]] == [4, *range(7, 38)]


def test_an_excerpt_that_grew_in_its_place_is_changed_however_long_it_is(drift, tmp_path):
    more = "".join(f"        x{number} = {number}\n" for number in range(30))
    new = OLD.replace("        c = third(b)\n", more + "        c = third(b)\n")
    release(tmp_path / "more", "2.0.0", {"trainer/__init__.py": "", "trainer/toy.py": new})
    found = drift(target=str(tmp_path / "more"))[1]["pages"]["annotated_trainers/toy.md"]
    assert [(entry["old"], entry["new"]) for entry in found["changed"]] == [([4, 5], [4, 35])]
    assert found["broken"] == found["gained"] == []


# The page for readers, on the two small releases

HEADED = PAGE.replace("<!-- covers", "# Toy, line by line\n\n<!-- covers", 1)
for symbol, heading in (("loss", "Making the `loss`"), ("log", "Logging"), ("gone", "Old things")):
    HEADED = HEADED.replace(f"<!-- excerpt: {TOY}.{symbol}\n", f"\n## {heading}\n\n<!-- excerpt: {TOY}.{symbol}\n", 1)


@pytest.fixture
def between(drift, tmp_path, monkeypatch):
    """A function that writes the page about the two small releases and returns its text; its folder is tmp_path."""
    monkeypatch.setattr(drift_tool, "newest_version", lambda: "2.0.0")
    command = ["--trl", str(tmp_path / "old"), "--page"]

    def write(page: str = HEADED, *options: str, target: str = "new") -> str:
        folder = pages(tmp_path, toy=page)
        assert main([*command, "--pages", str(folder), *options, str(tmp_path / target)]) == 0
        return (folder / "newest_trl.md").read_text("utf-8")

    return write


def parts(text: str) -> dict[str, str]:
    """Heading -> what stands under it, up to the next heading of the same page part (## or ###)."""
    found = re.split(r"^#{2,3} (.*)$", text, flags=re.M)
    return dict(zip(found[1::2], found[2::2], strict=True))


def directives(text: str) -> list[str]:
    return re.findall(r"^<!-- drift: (.*) -->$", text, re.M)


def test_each_difference_stands_in_its_part_of_the_page(between):
    text = between()
    head, part = text.partition("\n## ")[0], parts(text)
    assert next(iter(part)) == "Toy, line by line" and "Of the 7 places" in part["Toy, line by line"]
    assert [name.removeprefix("Toy: ") for name in list(part)[1:]] == list(drift_tool.KINDS.values())
    counts = "[2](#toy-gone) | [2](#toy-anchor-broken) | [1](#toy-changed) | [5](#toy-new-lines) | [3](#toy-moved)"
    assert f"| [Toy, line by line](toy.md) | 7 | {counts} |" in head
    assert directives(head) == ["1.0.0 -> 2.0.0"]

    old, new = (f"https://github.com/huggingface/trl/blob/v{version}/trl/" for version in ("1.0.0", "2.0.0"))
    gone = part["Toy: gone"]
    assert f"**`Toy.gone`**, lines [13-14]({old}trainer/toy.py#L13-L14).\nTRL 2.0.0 has it no more.\n" in gone
    assert "quotes it once, under [Old things](toy.md#old-things).\n" in gone
    assert f"It is now [`trl.data.pad.Collator.call`]({new}data/pad.py#L2-L3).\n" in gone

    broken = part["Toy: anchor broken"]
    assert broken.count("#### ") == 1 and "#### [Logging](toy.md#logging)\n" in broken
    assert f"line [10]({old}trainer/toy.py#L10) → [16]({new}trainer/toy.py#L16)" in broken
    assert "The text of the first line stands there twice.\nThe lines themselves are the same.\n" in broken
    assert f"line [11]({old}trainer/toy.py#L11) → about [17-18]({new}trainer/toy.py#L17-L18)" in broken
    assert "The text of the first line is not there any more.\nReread: “Notes on super().log(logs).”" in broken
    assert directives(broken) == [f"{TOY}.log 11 -> 17-18"]

    changed = part["Toy: changed"]
    assert "#### [Making the `loss`](toy.md#making-the-loss)\n" in changed
    assert f"`Toy.loss`, lines [4-5]({old}trainer/toy.py#L4-L5) → [8-9]({new}trainer/toy.py#L8-L9).\nReread:" in changed
    assert directives(changed) == [f"{TOY}.loss 4-5 -> 8-9"]

    fresh = part["Toy: new lines"]
    assert directives(fresh) == [f"{TOY}.loss -> 7-10", f"{TOY}.log -> 15"]
    assert "2 of the 3 new lines stand above" in fresh

    moved = part["Toy: moved"]
    assert f"- [Making the `loss`](toy.md#making-the-loss): [2-3]({old}trainer/toy.py#L2-L3) → [5-6]({new}" in moved
    assert f"- [Old things](toy.md#old-things): [19]({old}trainer/toy.py#L19) → [3]({new}data/pad.py#L3)" in moved
    assert directives(moved) == []


def test_the_page_holds_no_line_of_either_release(between):
    text = between(re.sub(r"^Notes on .*$", "A note.", HEADED, flags=re.M))
    lines = {fold(line) for line in f"{OLD}{NEW}{MOVED}".splitlines()}
    assert sorted(line for line in lines if len(line) >= 8 and line in fold(text)) == []


def test_a_left_out_that_changed_is_named_with_its_reason(between):
    left = f"<!-- left-out: {TOY}.loss\nfrom: b = second\nto: return\nreason: dull\n-->\n<!-- left-out-table -->\n<!-- /left-out-table -->\n"
    text = between(HEADED.replace(excerpt(f"{TOY}.loss", "b = second(a)", "c = third(b"), left))
    assert "→ [8-11](" in parts(text)["Toy: changed"] and "\nLeft out there: dull.\n" in parts(text)["Toy: changed"]


def test_lines_that_have_no_place_any_more_are_shown_as_removed(between, tmp_path):
    removed = OLD.replace("        super().log(logs)\n", "")
    release(tmp_path / "less", "2.0.0", {"trainer/__init__.py": "", "trainer/toy.py": removed, "data/pad.py": MOVED})
    text = between(target="less")
    assert "→ nothing in 2.0.0." in parts(text)["Toy: anchor broken"]
    assert directives(parts(text)["Toy: anchor broken"]) == [f"{TOY}.log 11 -> nothing"]
    site = render(text, "newest_trl.md", Source.at(tmp_path / "old"), Source.at(tmp_path / "less"))
    assert "```diff\n@@ -11 @@\n-super().log(logs)\n```" in site


def test_the_site_shows_the_true_difference_with_the_line_numbers_of_both_files(between, tmp_path):
    site = render(between(), "newest_trl.md", Source.at(tmp_path / "old"), Source.at(tmp_path / "new"))
    assert "<!-- drift" not in site
    fences = re.findall(r"```diff\n(.*?)\n```", site, re.S)
    assert fences == [
        "@@ -11 +17 @@\n-super().log(logs)\n+self.metrics.append(logs)\n+super().log(logs, start_time)",
        "@@ -4 +8 @@\n b = second(a)\n-c = third(b)\n+c = third(b, scale=2)",
        "@@ +6 @@\n a = first(x)\n+a = a.detach()\n b = second(a)\n+c = third(b, scale=2)\n+d = fourth(c)\n return a + b + c",
        '@@ +14 @@\n mode = "train"\n+if self.deep:\n     self.metrics.append(logs)',
    ]


def test_a_difference_in_a_symbol_that_moved_is_read_from_both_places(between, tmp_path):
    changed = MOVED.replace("return pad(rows)", "return pad(rows)  # now in blocks")
    release(tmp_path / "pads", "2.0.0", {"trainer/__init__.py": "", "trainer/toy.py": NEW, "data/pad.py": changed})
    text = between(target="pads")
    assert f"{COLLATOR}.call 19 -> trl.data.pad.Collator.call 3" in directives(parts(text)["Toy: changed"])
    site = render(text, "newest_trl.md", Source.at(tmp_path / "old"), Source.at(tmp_path / "pads"))
    assert "@@ -19 +3 @@\n-return pad(rows)\n+return pad(rows)  # now in blocks\n```" in site


def test_a_long_difference_is_folded_away_and_backticks_in_it_do_not_end_the_fence(tmp_path):
    shown = drift_tool.shown(["@@ -1 +1 @@", "-```", *[f"+line {number}" for number in range(drift_tool.LONG)]])
    assert shown.startswith(
        '<details class="drift" markdown="1">\n<summary>32 lines of difference</summary>\n\n````diff\n'
    )
    assert shown.endswith("\n````\n\n</details>")
    assert "details" not in drift_tool.shown(["@@ -1 +1 @@", "-a", "+b"])


def test_a_release_has_nothing_to_say_against_itself(between, tmp_path, monkeypatch):
    monkeypatch.setattr(drift_tool, "newest_version", lambda: "1.0.0")
    text = between(target="old")
    assert "Nothing: the walkthroughs are about TRL 1.0.0 itself" in text and directives(text) == ["1.0.0 -> 1.0.0"]
    old = Source.at(tmp_path / "old")
    assert "<!-- drift" not in render(text, "newest_trl.md", old, old)


def test_the_page_is_about_the_one_release_that_pyproject_names(between, tmp_path, monkeypatch, capsys):
    before = between()
    monkeypatch.setattr(drift_tool, "newest_version", lambda: "3.0.0")
    command = ["--trl", str(tmp_path / "old"), "--pages", str(tmp_path / "annotated_trainers"), "--page"]
    assert main([*command, str(tmp_path / "new")]) == 2
    assert "the page is about TRL 3.0.0, which pyproject.toml names" in capsys.readouterr().err
    assert (tmp_path / "annotated_trainers/newest_trl.md").read_text("utf-8") == before


def test_check_tells_a_stale_page_and_writes_nothing(between, tmp_path, capsys):
    between()
    page = tmp_path / "annotated_trainers/newest_trl.md"
    command = ["--trl", str(tmp_path / "old"), "--pages", str(page.parent), "--page", "--check", str(tmp_path / "new")]
    assert main(command) == 0
    page.write_text(stale := page.read_text("utf-8").replace("twice", "three times"), "utf-8")
    capsys.readouterr()
    assert main(command) == 1
    assert "newest_trl.md is not what tools/drift.py writes now, run `make sync`" in capsys.readouterr().out
    assert page.read_text("utf-8") == stale


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        ("Short.", "Short."),
        ("One paragraph.\n\nAnother.", "One paragraph."),
        ("**Bold** and [a link](dpo.md#x), over\ntwo lines.", "Bold and a link, over two lines."),
        ("word " * 17 + "`a b c` end", " ".join(["word"] * 17) + " ..."),
        ("word " * 15 + "$a + b$ next `a b c` end", " ".join(["word"] * 15) + " $a + b$ next ..."),
    ],
)
def test_the_first_words_of_a_note_are_cut_between_words(notes, expected):
    assert drift_tool.beginning(notes) == expected


# A release that cannot be had


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("ERROR: Could not find a version that satisfies trl==9.9 (from versions: none)", Unavailable),
        (
            "WARNING: Retrying after connection broken\nERROR: Could not find a version (from versions: none)",
            Unavailable,
        ),
        ("ERROR: HTTPSConnectionPool: Max retries exceeded", Unavailable),
        ("ERROR: Could not find a version that satisfies trl==9.9 (from versions: 0.1.0, 1.0.0)", SourceError),
    ],
)
def test_an_index_out_of_reach_is_told_from_a_version_that_does_not_exist(tmp_path, monkeypatch, said, kind):
    monkeypatch.setattr(drift_tool, "REPOSITORY", tmp_path)
    answer = SimpleNamespace(returncode=1, stdout="", stderr=said)
    monkeypatch.setattr(drift_tool.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(SourceError, match=r"pip cannot download TRL 9\.9") as error:
        obtain("9.9")
    assert error.type is kind
    assert list((tmp_path / ".cache").iterdir()) == []


def test_without_an_index_the_site_gets_a_sentence_in_place_of_each_difference(between, tmp_path, monkeypatch, capsys):
    text = between()
    monkeypatch.setattr(drift_tool, "REPOSITORY", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip itself is asked, and says no
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    capsys.readouterr()
    site = render(text, "annotated_trainers/newest_trl.md", Source.at(tmp_path / "old"))
    missing = "*TRL 2.0.0 could not be had when this site was built, so the difference is not shown here."
    assert site.count(missing) == len(directives(text)) - 1 == 4
    assert "<!-- drift" not in site and "```diff" not in site
    warning = capsys.readouterr().err
    assert warning.startswith("warning: annotated_trainers/newest_trl.md shows no differences, only links: pip cannot")
    assert warning.count("\n") == 1


def test_without_an_index_check_passes_and_says_so_and_nothing_else_does(between, tmp_path, monkeypatch, capsys):
    between()

    def unavailable(target):
        raise Unavailable("no index")

    monkeypatch.setattr(drift_tool, "obtain", unavailable)
    command = ["--trl", str(tmp_path / "old"), "--pages", str(tmp_path / "annotated_trainers")]
    capsys.readouterr()
    assert main([*command, "--page", "--check"]) == 0
    assert capsys.readouterr().err == "newest_trl.md was not checked: no index\n"
    assert main([*command, "--page"]) == main([*command, "2.0.0"]) == 2


# The committed page


@pytest.fixture(scope="module")
def newest() -> Source:
    """The release that pyproject.toml names as the newest, from .cache/ or fetched by pip."""
    try:
        return obtain(newest_version())
    except Unavailable as error:
        pytest.skip(f"the page about the newest TRL was not compared, pip reaches no index: {fold(str(error))}")


def test_the_committed_page_is_what_the_command_writes_now(newest, tmp_path):
    folder = tmp_path / "annotated_trainers"
    folder.mkdir()
    for path in PAGES:
        shutil.copy(path, folder)
    assert main(["--page", "--pages", str(folder)]) == 0
    written, committed = (path / "newest_trl.md" for path in (folder, ROOT / "annotated_trainers"))
    assert written.read_text("utf-8") == committed.read_text("utf-8"), "run `make sync`"


def test_the_committed_page_holds_no_line_of_trl(newest):
    text = fold((ROOT / "annotated_trainers/newest_trl.md").read_text("utf-8"))
    lines = set()
    for path in PAGES:
        for symbol in Page(path.read_text("utf-8"), path.name, Source.installed()).covers:
            for source in (Source.installed(), newest):
                try:
                    lines |= {fold(line) for line in source.symbol(symbol).lines}
                except SymbolError:
                    assert source is newest
    long = {line for line in lines if len(line) >= 12 and not re.fullmatch(r"\w+", line)}  # a bare name is no line
    assert len(long) > 500
    assert sorted(line for line in long if line in text) == []


def test_the_site_shows_every_difference_of_the_committed_page(newest):
    text = (ROOT / "annotated_trainers/newest_trl.md").read_text("utf-8")
    site = render(text, "newest_trl.md", None, newest)
    assert re.findall(r"^`{3,}diff\n@@ [-+]\d+", site, re.M) and "<!-- drift" not in site
    assert len(re.findall(r"^`{3,}diff$", site, re.M)) == len(directives(text)) - 1


def test_the_trainers_that_the_committed_page_says_are_gone_are_those_that_the_release_lacks():
    parts = (ROOT / "annotated_trainers" / "newest_trl.md").read_text().split("\n## ")[1:]
    told = {
        re.search(r"\[the walkthrough\]\((\w+)\.md\)", part)[1]
        for part in parts
        if "does not have this trainer" in part
    }
    classes = json.loads((ROOT / "reference_guides" / "releases.json").read_text())["classes"]
    assert told == {name for name in TRAINERS if not classes[f"{NAMES[name]}Trainer"]["imports"][-1][1]}


def test_every_heading_that_the_committed_page_links_to_is_on_the_walkthrough():
    text = (ROOT / "annotated_trainers/newest_trl.md").read_text("utf-8")
    links = set(re.findall(r"\]\((\w+\.md)#([\w-]+)\)", text))
    assert links
    for file, fragment in links:
        headings = re.findall(r"^#+ (.*)$", (ROOT / "annotated_trainers" / file).read_text("utf-8"), re.M)
        assert fragment in map(drift_tool.slug, headings)
