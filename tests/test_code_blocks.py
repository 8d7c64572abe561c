"""Every fence of every Markdown page of this repository is accounted for.

python    runs: the fences of a page in order, in one namespace
text      quotes what the python fence above prints, or a committed file: <!-- output: path -->
math      in reference_guides a named formula with the block that computes it; elsewhere a formula that a guide has too
bash,     commands that a test runs, listed in tests/commands.py
console
others    are excused, as any of these may be: <!-- not run: reason -->, directly before the fence
"""

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from markdown_pages import (
    FORMULA,
    GUIDES,
    OUTPUT_OF,
    ROOT,
    PageError,
    Run,
    fence_openings,
    fences,
    formulas,
    indented_blocks,
    markdown_files,
    named_formulas,
    quotes_block_above,
    ran,
    run_page,
    shown,
)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

PAGES = markdown_files()
each_page = pytest.mark.parametrize("path", PAGES, ids=shown)


def commands_that_tests_run():
    """Command line -> name of the test that runs it; empty while tests/commands.py does not exist."""
    try:
        return importlib.import_module("commands").TESTED_COMMANDS
    except ModuleNotFoundError:
        return {}


def commands_in(text, console):
    """The command lines of a bash fence, or those behind the prompts of a console fence, one string each."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    if console:
        lines = [line.lstrip()[2:] for line in lines if line.lstrip().startswith("$ ")]
    return [command for line in lines if (command := " ".join(shlex.split(line, comments=True, posix=False)))]


def unaccounted(fence):
    """Why a fence that no runner of code looks at is not accounted for; None if it is."""
    if fence.excuse is not None:
        return None if fence.excuse else "`<!-- not run: -->` names no reason"
    if fence.lang == "python" or quotes_block_above(fence):
        return None  # run and compared below
    if fence.lang == "text":
        return _not_in_a_file(fence)
    if fence.lang == "math":
        return None if fence.path.parent == GUIDES else _no_quoted_formula(fence)
    if fence.lang in {"bash", "console"}:
        commands = commands_in(fence.text, fence.lang == "console")
        untested = [command for command in commands if command not in commands_that_tests_run()]
        if not commands:
            return "no command in it: a console fence marks commands with `$ `"
        return f"no test runs {untested}: add them to tests/commands.py" if untested else None
    return f"nothing checks a {fence.lang or 'fence without language'!r}: put `<!-- not run: reason -->` directly before it"


def _not_in_a_file(fence):
    match = OUTPUT_OF.search(fence.comment)
    if not match:
        return (
            "say what this text quotes: `<!-- output: path of a committed file -->`, or place it below its python block"
        )
    file = ROOT / match[1].strip()
    if not file.is_file():
        return f"there is no file {match[1].strip()}"
    # a line of three dots stands for lines left out
    parts = re.split(r"^\.\.\.\n", fence.text, flags=re.MULTILINE)
    rest = file.read_text("utf-8")
    for part in parts:
        _, found, rest = rest.partition(part.rstrip("\n"))
        if not found:
            return f"{match[1].strip()} does not hold, in this order: {part.strip()!r}"
    return None


def _no_quoted_formula(fence):
    match = FORMULA.search(fence.comment)
    name = match[1].strip() if match else None
    known = {found.name: found.latex for path in sorted(GUIDES.glob("*.md")) for found in formulas(path)}
    if name not in known:
        return (
            "outside reference_guides, use a formula from there: `<!-- formula: its-name -->` directly before the fence"
        )
    (here,) = [found for found in named_formulas(fence.path) if found.fence.line == fence.line]
    if here.block is None and known[name].split() != fence.text.split():
        return f"differs from formula {name!r} in reference_guides, and no block below defines `{here.function}`"
    return None  # tests/test_formulas.py compares a block of its own with the guide's


def test_there_are_pages():
    assert GUIDES / "preference_losses.md" in PAGES


@each_page
def test_parser_and_raw_text_agree_on_the_fences(path):
    parsed = [fence.line for fence in fences(path)]
    assert parsed == fence_openings(path.read_text("utf-8")), "a fence is hidden from the parser, or opened by accident"


@each_page
def test_no_code_block_is_made_by_indentation(path):
    assert not indented_blocks(path), "use a fence with a language, so that the block can be checked"


@each_page
def test_every_fence_is_accounted_for(path):
    reasons = {fence.where: reason for fence in fences(path) if (reason := unaccounted(fence))}
    assert not reasons


@each_page
def test_python_fences_run_and_print_what_the_page_quotes(path):
    if not any(fence.lang == "python" and fence.excuse is None for fence in fences(path)):
        return
    run = ran(path)
    for fence in fences(path):
        if quotes_block_above(fence):
            printed = run.printed[fence.after.line]
            assert fence.text == printed, f"{fence.where}: run `python tests/markdown_pages.py --write {shown(path)}`"


def test_python_fences_are_formatted_like_the_scripts(tmp_path):
    for path in PAGES:
        for fence in fences(path):
            if fence.lang == "python":
                (tmp_path / f"{shown(path).replace('/', '.')}.line{fence.line}.py").write_text(fence.text, "utf-8")
    command = ["ruff", "format", "--diff", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, "the name of each file below holds page and line:\n" + result.stdout + result.stderr


@pytest.mark.parametrize("path", sorted(GUIDES.glob("*.md")), ids=shown)
def test_every_formula_of_a_guide_is_named_and_computed(path):
    formulas(path)


def test_what_runs_the_commands_exists():
    for command, runner in commands_that_tests_run().items():
        file, _, test = runner.partition("::")  # `tests/test_x.py::test_y`, or a script such as .ci/run
        assert (ROOT / file).is_file(), f"{command!r}: there is no file {file!r}"
        if test:
            definition = "def " + test.partition("[")[0] + "("
            assert definition in (ROOT / file).read_text("utf-8"), f"{command!r}: no {runner!r}"


# --- the reader of pages itself -------------------------------------------------------------------------------------------

NESTED = """\
# Page

1. in a list

   ```python title="a.py" linenums="1"
   one = 1
   ```

> in a quote
>
> ~~~{.python}
> two = one + 1
> ~~~

- - ```text
    two marks deep
    ```

````text
```python
inside = "another fence"
```
````

Not a fence: ```inline```.
"""


@pytest.fixture
def page(tmp_path):
    def write(text):
        path = tmp_path / "page.md"
        path.write_text(text, "utf-8")
        fences.cache_clear()
        return path

    return write


def test_nested_fences_and_fences_with_attributes_are_found_and_run(page):
    path = page(NESTED)
    assert [(fence.line, fence.lang) for fence in fences(path)] == [
        (5, "python"), (11, "python"), (15, "text"), (19, "text"),
    ]  # fmt: skip
    assert fence_openings(NESTED) == [5, 11, 15, 19]
    run = run_page(path)
    assert run.namespace["two"] == 2 and "inside" not in run.namespace


@pytest.mark.parametrize(
    "hidden",
    [
        "<!--\n```python\nx = 1\n```\n-->\n",
        "text\n\n      ```python\n      x = 1\n      ```\n",
        "<div>\n```python\n```\n</div>\n",
    ],
)
def test_a_fence_that_the_parser_does_not_see_is_noticed(page, hidden):
    assert fences(page(hidden)) == [] and fence_openings(hidden) != []


def test_error_in_a_block_names_page_and_line(page):
    path = page("# Page\n\n```python\nfine = 1\n```\n\nand\n\n```python\n\nfine / 0\n```\n")
    with pytest.raises(PageError, match=r"page\.md:11: ZeroDivisionError"):
        run_page(path)
    with pytest.raises(PageError, match=r"page\.md:4: SyntaxError"):
        run_page(page("# Page\n\n```python\nfine = \n```\n"))


def test_excused_blocks_are_not_run_but_an_excuse_needs_a_reason(page):
    path = page(
        "<!-- not run: needs a GPU -->\n```python\nraise ValueError\n```\n\n<!-- not run: -->\n```yaml\na: 1\n```\n"
    )
    assert run_page(path) == Run(namespace=run_page(path).namespace) and not run_page(path).blocks
    good, bad = fences(path)
    assert unaccounted(good) is None and "no reason" in unaccounted(bad)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("```yaml\na: 1\n```\n", "nothing checks"),
        ("```\nno language\n```\n", "nothing checks"),
        ("```text\nmade up\n```\n", "say what this text quotes"),
        ("<!-- output: pyproject.toml -->\n```text\nno such line in it\n```\n", "does not hold"),
        ("<!-- output: no/such/file -->\n```text\nx\n```\n", "there is no file"),
        ("```bash\npython no_such_script.py\n```\n", "no test runs"),
        ("```console\noutput without a prompt\n```\n", "no command"),
        ("```math\nx = 1\n```\n", "use a formula from there"),
        ("<!-- formula: dpo-margin -->\n```math\nx = 1\n```\n", "differs from formula"),
        ("<!-- not run: reason -->\n\nA paragraph between.\n\n```json\n{}\n```\n", "nothing checks"),
    ],
)
def test_a_fence_that_nothing_checks_is_refused(page, text, complaint):
    (fence,) = fences(page(text))
    assert complaint in unaccounted(fence)


def test_quoted_files_may_leave_lines_out(page):
    text = "<!-- output: pyproject.toml -->\n```text\n[project]\n...\n[build-system]\n```\n"
    (fence,) = fences(page(text))
    assert unaccounted(fence) is None
    (backwards,) = fences(
        page(text.replace("[project]", "[x]").replace("[build-system]", "[project]").replace("[x]", "[build-system]"))
    )
    assert "does not hold" in unaccounted(backwards)


def test_commands_are_read_from_prompts_and_joined_over_lines():
    assert commands_in("# a comment\nmake test  # why\npython a.py \\\n    --flag 'a b'\n", console=False) == [
        "make test",
        "python a.py --flag 'a b'",
    ]
    assert commands_in("$ make test\nall fine\n", console=True) == ["make test"]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("```math\nx\n```\n", "put `<!-- formula"),
        ("<!-- formula: Not_A_Name -->\n```math\nx\n```\n", "put `<!-- formula"),
        ("<!-- formula: a-b -->\n```math\nx\n```\n", "must define `a_b`"),
        ("<!-- formula: a-b -->\n```math\nx\n```\n\n```python\ndef a_c(): ...\n```\n", "must define `a_b`"),
        ("<!-- formula: a -->\n```math\nx\n```\n\n<!-- formula: a -->\n```math\nx\n```\n", "used twice"),
    ],
)
def test_a_formula_without_name_or_block_is_refused(page, text, complaint):
    with pytest.raises(PageError, match=re.escape(complaint)):
        formulas(page(text))


def test_output_of_a_block_can_be_refreshed(page):
    from markdown_pages import refresh

    path = page("```python\nprint(1 + 1)\n```\n\n```text\n3\n4\n```\n\nAfter.\n")
    assert refresh(path) and path.read_text() == "```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n\nAfter.\n"
    assert not refresh(path)


def test_paths_are_shown_from_the_root():
    assert shown(GUIDES / "index.md") == str(Path("reference_guides") / "index.md")
