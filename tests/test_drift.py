"""What the drift report says about a newer release, on two small ones that differ in known ways."""

import json
import zipfile

import pytest
import walkthroughs
from fake_release import pages, release
from trl_source import Source
from walkthroughs import main

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
        command = ["--pages", str(folder), "--trl", str(tmp_path / "old"), "drift", target, "--json", str(written)]
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
    monkeypatch.setattr(walkthroughs, "REPOSITORY", tmp_path)
    wheel = tmp_path / "trl-2.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (tmp_path / "new").rglob("*"):
            archive.write(path, path.relative_to(tmp_path / "new"))
    assert drift(target=str(wheel)) == drift()
    assert [path.name for path in (tmp_path / ".cache").iterdir()] == ["trl-2.0.0-py3-none-any"]
    assert drift(target=str(wheel)) == drift()


@pytest.mark.parametrize("target", ["no-such-folder", "latest", "1.0 --index-url x"])
def test_a_target_that_is_no_release_is_refused_by_name(target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(walkthroughs, "REPOSITORY", tmp_path)
    release(tmp_path / "old", "1.0.0", {"trainer/__init__.py": "", "trainer/toy.py": OLD})
    folder = pages(tmp_path, toy=PAGE)
    assert main(["--pages", str(folder), "--trl", str(tmp_path / "old"), "drift", target]) == 2
    assert f"`{target}` is neither a folder, nor a wheel, nor a version like 1.16.0" in capsys.readouterr().err
    assert not (tmp_path / ".cache").exists()


def test_a_folder_without_trl_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no TRL in .*: neither"):
        Source.at(tmp_path)
