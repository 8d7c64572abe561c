"""Excerpts of TRL on the walkthrough pages: found by symbol and anchor, or an error that says what to reread."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import trl_source
from fake_release import PAGES, ROOT, pages, release
from trl_source import AnchorError, Source, SourceError, SymbolError
from walkthroughs import Page, PageError, main, render

TOY = """\
import math


class ToyTrainer:
    def compute_loss(self, model, inputs):
        logits = model(inputs)
        logps = log_softmax(logits)
        if self.average:
            logps = logps / len(inputs)
        ref_logps = log_softmax(self.ref_model(inputs))
        if self.average:
            ref_logps = ref_logps / len(inputs)
        # the loss
        loss = -(logps - ref_logps)
        return loss

    @staticmethod
    def prepare(rows):
        if rows:
            def tokenize(row):
                return row.split()

            rows = [tokenize(row) for row in rows]
        return rows
"""
LOSS = "trl.trainer.toy_trainer.ToyTrainer.compute_loss"
PREPARE = "trl.trainer.toy_trainer.ToyTrainer.prepare"
PAGE = f"""\
# Toy

<!-- covers:
{LOSS}
-->

<!-- coverage-table -->
<!-- /coverage-table -->

<!-- excerpt: {LOSS}
from: logits = model(inputs)
to: logps = log_softmax(logits)
-->

The forward pass, then log-probabilities.

<!-- /excerpt -->

<!-- excerpt: {LOSS}
from: loss = -(logps
-->

The loss is minus the log ratio.

<!-- /excerpt -->

<!-- left-out: {LOSS}
from: if self.average:
to: logps = logps / len(inputs)
before: ref_logps = log_softmax
reason: averaging
-->

<!-- left-out-table -->
<!-- /left-out-table -->
"""


def toy(folder: Path, text: str = TOY, name: str = "trainer/toy_trainer.py") -> Source:
    return release(folder, "9.9.0", {"trainer/__init__.py": "", name: text})


def problems(source: Source, page: str = PAGE) -> str:
    """What building the site says about a page."""
    with pytest.raises(PageError) as error:
        render(page, "annotated_trainers/toy.md", source)
    return str(error.value)


# What a new release of TRL can do to a page


def test_a_renamed_method_stops_the_build_and_says_what_to_reread(tmp_path):
    said = problems(toy(tmp_path, TOY.replace("def compute_loss(", "def compute_the_loss(")))
    assert f"annotated_trainers/toy.md:10: excerpt of `{LOSS}`: TRL 9.9.0 has no `{LOSS}`" in said
    assert "nearest: `compute_the_loss`" in said
    assert 'Reread the notes under this excerpt: "The forward pass, then log-probabilities."' in said
    assert 'Reread the reason of this left-out: "averaging"' in said
    assert f"annotated_trainers/toy.md:3: covers: TRL 9.9.0 has no `{LOSS}`" in said


def test_a_class_in_another_module_stops_the_build_and_says_where_it_is_now(tmp_path):
    said = problems(toy(tmp_path, name="experimental/toy/toy_trainer.py"))
    assert "there is `trl.experimental.toy.toy_trainer.ToyTrainer.compute_loss`" in said


def test_a_line_whose_text_changed_stops_the_build_and_shows_the_nearest_line(tmp_path):
    said = problems(toy(tmp_path, TOY.replace("loss = -(logps - ref", "loss = -self.beta * (logps - ref")))
    assert "annotated_trainers/toy.md:19: " in said
    assert "`from: loss = -(logps` matches no line among lines 5-15 of trl/trainer/toy_trainer.py" in said
    assert "line 14: `loss = -self.beta * (logps - ref_logps)`" in said
    assert 'Reread the notes under this excerpt: "The loss is minus the log ratio."' in said


def test_an_anchor_that_matches_twice_stops_the_build_and_names_both_lines(tmp_path):
    twice = TOY.replace("        return loss\n", "        loss = -(logps + 1)\n        return loss\n")
    said = problems(toy(tmp_path, twice))
    assert "annotated_trainers/toy.md:19: " in said
    assert "`from: loss = -(logps` matches 2 lines" in said
    assert "line 14: `loss = -(logps - ref_logps)`; line 15: `loss = -(logps + 1)`" in said
    assert 'Reread the notes under this excerpt: "The loss is minus the log ratio."' in said


def test_all_problems_of_a_page_are_reported_together(tmp_path):
    page = PAGE.replace("from: loss = -(logps", "from: nowhere").replace("reason: averaging", "because: averaging")
    said = problems(toy(tmp_path, TOY.replace("logits = model(inputs)", "out = model(inputs)")), page)
    assert re.findall(r"toy\.md:(\d+): ", said) == ["27", "27", "10", "19"]


# What a writer can get wrong


@pytest.mark.parametrize(
    ("wrong", "right", "expected"),
    [
        ("<!-- left-out: ", "<!-- /excerpt -->\n\n<!-- left-out: ", "toy.md:19: this excerpt is not closed: `<!-- /excerpt -->`"),
        ("<!-- excerpt: ", "<!-- /excerpt -->\n\n<!-- excerpt: ", "toy.md:10: this excerpt is not closed before the next one, line 17"),
        ("\n<!-- /excerpt -->\n<!-- /excerpt -->\n", "\n<!-- /excerpt -->\n", "the end of an excerpt that was not opened"),
        ("from: loss = -(logps\nsize: 3", "from: loss = -(logps", "toy.md:19: unknown key in `size: 3`: excerpt takes after,"),
        ("from: loss = -(logps\nfrom: x", "from: loss = -(logps", "toy.md:19: `from:` stands twice"),
        ("from:", "from: loss = -(logps", "toy.md:19: `from:` is empty"),
        ("<!-- only a comment -->", "The loss is minus the log ratio.", "toy.md:19: excerpt of `{LOSS}` has no note"),
        ("", "reason: averaging\n", "toy.md:27: left-out of `{LOSS}` has no `reason:`"),
        ("", "from: if self.average:\n", "toy.md:27: left-out of `{LOSS}` has no `from:`"),
        ("from: logps = log_softmax", "from: if self.average:", "toy.md:27: left out here and shown by the excerpt in line 10: TRL's line 7"),
        ("", "<!-- left-out-table -->\n<!-- /left-out-table -->\n", "add `<!-- left-out-table -->` and"),
        ("", "<!-- /coverage-table -->\n", "toy.md:7: `<!-- /coverage-table -->` is missing"),
        ("", "<!-- coverage-table -->\n", "toy.md:7: `<!-- /coverage-table -->` has no partner"),
        (f"{LOSS}\n{LOSS}\n-->", f"{LOSS}\n-->", "toy.md:3: `{LOSS}` is covered twice"),
        (f"{PREPARE}\n-->", f"{LOSS}\n-->", "toy.md:27: left-out of `{LOSS}` lies in no covered symbol"),
        (f"{LOSS}.py\n-->", f"{LOSS}\n-->", "covers: TRL 9.9.0 has no `{LOSS}.py`"),
        ("trl.trainer\n-->", f"{LOSS}\n-->", "`trl.trainer` names a module"),
        ("torch.nn\n-->", f"{LOSS}\n-->", "`torch.nn` is not a dotted name inside trl"),
        ("  <!-- left-out:", "<!-- left-out:", "toy.md:27: `<!-- left-out: {LOSS}` is not how a directive begins"),
        ("<!-- left-out ", "<!-- left-out: ", "toy.md:27: `<!-- left-out {LOSS}` is not how a directive begins"),
        ("reason: averaging\n", "reason: averaging\n-->\n", "toy.md:27: the comment is not closed by `-->`"),
        ("averaging --> x\n", "averaging\n-->\n", "toy.md:27: the comment is not closed by `-->` at the end of a line"),
        ("```python\n# Toy", "# Toy", "toy.md:1: this code fence is not closed"),
        ("from: return loss\nto: logits = model(inputs)", "from: loss = -(logps", "`to: logits = model(inputs)` matches no line among lines 15-15"),
    ],
)  # fmt: skip
def test_a_malformed_directive_stops_the_build(tmp_path, wrong, right, expected):
    assert right in PAGE
    assert expected.replace("{LOSS}", LOSS) in problems(toy(tmp_path), PAGE.replace(right, wrong, 1))


def test_a_page_that_quotes_and_covers_nothing_stops_the_build(tmp_path):
    page = re.sub(r"<!-- covers:.*?-->", "", PAGE, flags=re.DOTALL)
    assert "the page quotes TRL and covers nothing" in problems(toy(tmp_path), page)


def test_an_excerpt_shows_at_most_22_code_lines(tmp_path):
    page = PAGE.replace("to: logps = log_softmax(logits)", "to: return loss").split("<!-- left-out: ")[0]
    lines = "        # a comment, which is not counted\n" + "        x = 1\n" * 13
    fits = toy(tmp_path / "a", TOY.replace("        # the loss\n", lines))
    assert Page(page, "toy.md", fits).problems == []
    long = toy(tmp_path / "b", TOY.replace("        # the loss\n", lines + "        x = 1\n"))
    assert "shows 23 code lines, more than 22" in problems(long, page)


def test_a_directive_inside_a_code_fence_is_only_an_example(tmp_path):
    page = f"Write:\n\n- ```text\n  x\n  ```\n\n```markdown\n{PAGE.replace('from:', 'wrong:')}```\n"
    assert render(page, "CONTRIBUTING.md", toy(tmp_path)) == page


# How lines are found


def test_an_anchor_matches_whole_words_with_white_space_folded(tmp_path):
    source = toy(tmp_path)
    assert source.select(LOSS, "logps =  log_softmax(").first == 7  # not 10, `ref_logps = log_softmax(`
    assert source.select(LOSS, "ref_logps = log_softmax(").first == 10
    with pytest.raises(AnchorError, match="matches no line"):
        source.select(LOSS, "logps = log_soft")


def test_an_anchor_without_a_letter_is_a_whole_line(tmp_path):
    source = toy(tmp_path, TOY.replace("-(logps - ref_logps)", "-(\n            logps - f(ref_logps)\n        )"))
    assert source.select(LOSS, "loss = -(", ")").last == 16


def test_after_and_before_bound_where_a_repeated_text_is_sought(tmp_path):
    source = toy(tmp_path)
    with pytest.raises(AnchorError, match=r"from: if self.average:` matches 2 lines.*line 8: .*line 11: "):
        source.select(LOSS, "if self.average:")
    assert source.select(LOSS, "if self.average:", after="ref_logps = log_softmax").first == 11
    assert source.select(LOSS, "if self.average:", before="ref_logps = log_softmax").first == 8
    # `before` itself repeats: the one behind `from` bounds `to`
    block = source.select(LOSS, "logps = logps / len(inputs)", "ref_logps =", before="if self.average:")
    assert (block.first, block.last) == (9, 10)
    with pytest.raises(AnchorError, match="before: nowhere` matches no line"):
        source.select(LOSS, "return loss", before="nowhere")


def test_a_symbol_reaches_from_its_decorator_to_its_last_line_and_can_be_nested(tmp_path):
    source = toy(tmp_path)
    extents = {name: (b.first, b.last) for name in ("", ".tokenize") if (b := source.symbol(PREPARE + name))}
    assert extents == {"": (17, 24), ".tokenize": (20, 21)}


def test_a_name_defined_twice_is_an_error(tmp_path):
    again = "\n    def compute_loss(self):\n        return 0\n"
    with pytest.raises(SymbolError, match=r"defines `.*compute_loss` 2 times \(lines 5, 26\)"):
        toy(tmp_path, TOY + again).symbol(LOSS)


# What is written into the pages


def test_sync_writes_links_and_tables_and_then_finds_nothing_to_do(tmp_path):
    toy(tmp_path)
    folder = pages(tmp_path, toy=PAGE)
    command = ["--pages", str(folder), "--trl", str(tmp_path), "sync"]
    assert main([*command, "--check"]) == 1
    assert (folder / "toy.md").read_text() == PAGE
    assert main(command) == 0
    text = (folder / "toy.md").read_text()
    address = "https://github.com/huggingface/trl/blob/v9.9.0/trl/trainer/toy_trainer.py#L"
    assert (
        f"to: logps = log_softmax(logits)\n-->\n[`ToyTrainer.compute_loss`, lines 6-7]({address}6-L7): "
        "from `logits = model(inputs)` to `logps = log_softmax(logits)`\n\nThe forward pass"
    ) in text
    assert f"[`ToyTrainer.compute_loss`, line 14]({address}14): `loss = -(logps`\n\nThe loss" in text
    assert f"| `ToyTrainer.compute_loss` | [8-9]({address}8-L9) | 2 | averaging |" in text
    assert f"| `ToyTrainer.compute_loss` | [5-15]({address}5-L15) | 10 | 3 | 2 |" in text
    assert "| **together** | | 10 | 3 (30.0%) | 2 |" in text
    assert main([*command, "--check"]) == 0


def test_sync_replaces_what_an_older_release_left_on_the_page(tmp_path):
    toy(tmp_path / "old")
    toy(tmp_path / "new", "# one line more\n" + TOY)
    folder = pages(tmp_path, toy=PAGE)
    main(["--pages", str(folder), "--trl", str(tmp_path / "old"), "sync"])
    old = (folder / "toy.md").read_text()
    assert main(["--pages", str(folder), "--trl", str(tmp_path / "new"), "sync", "--check"]) == 1
    assert main(["--pages", str(folder), "--trl", str(tmp_path / "new"), "sync", "toy"]) == 0
    text = (folder / "toy.md").read_text()
    assert "lines 7-8](" in text and "lines 6-7](" not in text
    assert text.count("\n") == old.count("\n")


def test_sync_writes_no_page_when_one_page_has_a_problem(tmp_path, capsys):
    toy(tmp_path)
    folder = pages(tmp_path, good=PAGE, wrong=PAGE.replace("loss = -(logps", "nowhere"))
    assert main(["--pages", str(folder), "--trl", str(tmp_path), "sync"]) == 2
    assert "annotated_trainers/wrong.md:19: " in capsys.readouterr().err
    assert (folder / "good.md").read_text() == PAGE


# What the site shows


def html_of(text: str) -> str:
    markdown = pytest.importorskip("markdown", reason="the site's packages are not installed: pip install -e .[docs]")
    extensions = ["md_in_html", "tables", "attr_list", "toc", "pymdownx.highlight", "pymdownx.superfences"]
    return markdown.markdown(text, extensions=extensions)


def test_the_site_shows_the_true_lines_with_their_numbers_beside_the_notes(tmp_path):
    notes = "The loss is *minus* it.\n\n- a list\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n```python\n1 + 1\n```"
    page = PAGE.replace("The loss is minus the log ratio.", notes)
    html = html_of(render(page, "annotated_trainers/toy.md", toy(tmp_path)))
    for hidden in ("covers", "excerpt:", "left-out", "-table", "from:", "```", "markdown=", "from <code>"):
        assert hidden not in html
    assert "averaging</td>" in html and "<strong>together</strong>" in html
    blocks = html.split('<div class="excerpt">')[1:]
    assert len(blocks) == 2
    code, note = blocks[1].split('<div class="excerpt__notes">')
    assert code.lstrip().startswith('<div class="excerpt__code">')
    plain = re.sub(r"<[^>]+>", "", code)
    assert "loss = -(logps - ref_logps)" in plain and "ToyTrainer.compute_loss" in plain
    assert re.findall(r'<span class="normal">(\d+)</span>', code) == ["14"]
    assert 'toy_trainer.py#L14">line 14 of trl/trainer/toy_trainer.py</a>' in code
    assert "<em>minus</em>" in note and "<li>a list</li>" in note and "<td>1</td>" in note and "highlight" in note
    assert re.findall(r'<span class="normal">(\d+)</span>', blocks[0]) == ["6", "7"]
    assert html.count("<div") == html.count("</div>")


def test_backticks_in_trl_do_not_end_the_block_on_the_site(tmp_path):
    odd = TOY.replace("        return loss\n", '        text = """\n```\n"""\n        return loss\n')
    page = PAGE.replace("from: loss = -(logps", 'from: text = """\nto: return loss')
    code = html_of(render(page, "toy.md", toy(tmp_path, odd))).split('<div class="excerpt__code">')[2]
    assert re.findall(r'<span class="normal">(\d+)</span>', code) == ["15", "16", "17", "18"]


# The installed release and the real pages


def test_the_installed_trl_is_the_pinned_one():
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"trl=={importlib.metadata.version('trl')}" in pins
    assert Source.installed().version == importlib.metadata.version("trl")


def test_another_trl_than_the_pinned_one_is_refused(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["datasets", "trl==0.0.1"]\n')
    monkeypatch.setattr(trl_source, "REPOSITORY", tmp_path)
    Source.installed.cache_clear()
    with pytest.raises(SourceError, match=r"is installed, but pyproject\.toml pins 0\.0\.1.*run `make install`"):
        Source.installed()


def test_reading_trls_source_imports_neither_trl_nor_torch():
    code = (
        "import sys; from walkthroughs import Source; Source.installed().symbol('trl.trainer.dpo_trainer.DPOTrainer');"
        "print({'trl', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_the_dpo_walkthrough_is_among_the_pages():
    assert "dpo.md" in [path.name for path in PAGES]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_directive_of_the_page_resolves_and_the_page_is_in_step(path):
    page = Page(path.read_text("utf-8"), path.name, Source.installed())
    assert page.problems == []
    assert page.covers and page.quotes
    assert main(["sync", "--check", path.name]) == 0, "run `make sync`"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_linked_line_numbers_are_those_of_the_installed_file(path):
    """Reads the numbers and the anchors off the page itself, and the lines with those numbers from the file."""
    root = Path(importlib.util.find_spec("trl").origin).parent.parent
    text = path.read_text("utf-8")
    directives = re.findall(r"^<!-- excerpt:(.*?)-->\n([^\n]*)", text, re.MULTILINE | re.DOTALL)
    assert len(directives) == text.count("\n<!-- /excerpt -->") > 0
    for directive, written in directives:
        link = re.match(
            r"\[`.*\(https://github\.com/huggingface/trl/blob/v([\d.]+)/(\S+)#L(\d+)(?:-L(\d+))?\): ", written
        )
        assert link, f"no link after `<!-- excerpt:{directive}`: run `make sync`"
        version, file, first, last = link.groups()
        assert version == importlib.metadata.version("trl")
        lines = (root / file).read_text("utf-8").splitlines()
        for key, number in (("from", first), ("to", last or first)):
            if anchor := re.search(rf"^{key}:(.*)", directive, re.MULTILINE):
                assert " ".join(anchor[1].split()) in " ".join(lines[int(number) - 1].split())
