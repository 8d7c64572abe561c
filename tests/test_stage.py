"""Staging the site: what tools/stage.py makes of the repository's Markdown, on small repositories made here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import drift
import pytest
import stage
import yaml
from trl_source import Source, newest_version, pinned_version

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "tools" / "site"
SCRIPT = '''\
# The walkthrough: annotated_trainers/dpo.md
"""Learn from pairs of answers,
one better than the other.

The formula: reference_guides/losses.md#dpo-sigmoid

Run it:

    python dpo.py          # the toy world
    accelerate launch dpo.py --use_peft \\\\
        --load_in_4bit
"""

# ------------------------------------------------------------ settings

FENCE = "```"  # not the end of the block

# ------------------------------------------------------------ the run

print(FENCE)
'''


@pytest.fixture
def repository(tmp_path):
    """A function that writes files (path -> text) over a small repository and returns its folder."""

    def write(**changes: str) -> Path:
        files = {
            "README.md": "# Home\n",
            "annotated_examples/dpo.py": SCRIPT,
            "annotated_trainers/dpo.md": "# DPO, line by line\n",
            "reference_guides/losses.md": "# Losses\n\n<!-- formula: dpo-sigmoid -->\n```math\nx\n```\n",
            "tests/test_dpo.py": "def test_nothing():\n    pass\n",
            ".github/workflows/ci.yml": "on: push\n",
            "tools/site/nav.yml": (SITE / "nav.yml").read_text("utf-8"),
        } | changes
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return write


def staged(root: Path, page: str, render=lambda text, page: text) -> str:
    """The text of a staged page, less its front matter."""
    stage.stage(root, render=render, vendor=False)
    return (root / "build/docs" / page).read_text("utf-8").partition("---\n\n")[2]


def readme(repository, text: str) -> str:
    return staged(repository(**{"README.md": text}), "index.md")


# Links


@pytest.mark.parametrize(
    ("link", "on_the_site"),
    [
        ("annotated_trainers/dpo.md", "annotated_trainers/dpo.md"),
        ("annotated_examples/dpo.py", "annotated_examples/dpo.md"),
        ("/annotated_examples/dpo.py", "annotated_examples/dpo.md"),
        ("reference_guides/losses.md#dpo-sigmoid", "reference_guides/losses.md#dpo-sigmoid"),
        ("annotated_examples/", "annotated_examples/index.md"),
        ("annotated_trainers", "annotated_trainers/index.md"),
        ("tests/test_dpo.py", "source/tests/test_dpo.py.md"),
        ("tests/test_dpo.py#L2", "source/tests/test_dpo.py.md"),
        ("tests", "source/tests/index.md"),
        (".github/workflows/ci.yml", "source/dot.github/workflows/ci.yml.md"),
        ("README.md#home", "index.md#home"),
        ("https://example.org/a.py", "https://example.org/a.py"),
        ("#home", "#home"),
    ],
)
def test_a_link_leads_to_the_page_of_what_it_names(repository, link, on_the_site):
    assert readme(repository, f"# Home\n\n[text]({link}) and\n\n[by name][x]\n\n[x]: {link}\n") == (
        f"# Home\n\n[text]({on_the_site}) and\n\n[by name][x]\n\n[x]: {on_the_site}\n"
    )


def test_a_link_is_relative_to_the_page_that_it_stands_on(repository):
    text = "# DPO\n\n[`dpo.py`](../annotated_examples/dpo.py), [home](../README.md), [test](../tests/test_dpo.py)\n"
    page = staged(repository(**{"annotated_trainers/dpo.md": text}), "annotated_trainers/dpo.md")
    assert re.findall(r"\((.*?)\)", page) == [
        "../annotated_examples/dpo.md",
        "../index.md",
        "../source/tests/test_dpo.py.md",
    ]


def test_a_link_in_raw_html_becomes_the_url_because_mkdocs_leaves_it_alone(repository):
    text = '# DPO\n\n<a href="../reference_guides/losses.md#dpo-sigmoid">x</a> <img src="plot.svg" alt="a plot">\n'
    root = repository(**{"annotated_trainers/dpo.md": text, "annotated_trainers/plot.svg": "<svg/>"})
    page = staged(root, "annotated_trainers/dpo.md")
    assert 'href="../../reference_guides/losses/#dpo-sigmoid"' in page
    assert 'src="../../source/annotated_trainers/plot.svg"' in page
    assert (root / "build/docs/source/annotated_trainers/plot.svg").read_text() == "<svg/>"


def test_a_picture_is_a_link_to_itself_and_one_in_a_line_or_in_an_example_is_not(repository):
    text = "# DPO\n\n![A long\nstory](plot.svg)\n\nIn a line ![x](plot.svg).\n\n```md\n![x](plot.svg)\n```\n"
    root = repository(**{"annotated_trainers/dpo.md": text, "annotated_trainers/plot.svg": "<svg/>"})
    page, plot = staged(root, "annotated_trainers/dpo.md"), "../source/annotated_trainers/plot.svg"
    assert f"\n[![A long\nstory]({plot})]({plot}){{ .picture }}\n" in page
    assert f"In a line ![x]({plot})." in page and "```md\n![x](plot.svg)\n```" in page
    assert page.count(".picture") == 1


def test_a_line_that_begins_with_the_number_of_a_thread_is_an_error(repository):
    text = "# DPO\n\nAs in [peft\n#430](https://example.org).\n\n```bash\n#!/bin/sh\n```\n"
    with pytest.raises(stage.StageError, match=r"annotated_trainers/dpo.md.*#430.*break the line elsewhere"):
        staged(repository(**{"annotated_trainers/dpo.md": text}), "annotated_trainers/dpo.md")
    text = text.replace("[peft\n#430]", "[peft #430]")
    assert "[peft #430]" in staged(repository(**{"annotated_trainers/dpo.md": text}), "annotated_trainers/dpo.md")


def test_what_only_looks_like_a_link_is_left_alone(repository):
    lookalikes = [
        "`[a](gone.md)`",
        "``a ` [b](gone.md)``",
        "$f[x](gone)$",
        "```python\nx[0](gone.md)\n```",
        "> ```text\n> [a](gone.md)\n> ```",
        "~~~text\n[a](gone.md)\n~~~",
        "```text\n~~~\n[a](gone.md)\n```",
    ]
    for text in lookalikes:
        assert text in readme(repository, f"# Home\n\n{text}\n")


def test_a_link_to_nothing_is_an_error_that_names_page_and_line_and_leaves_the_last_build(repository):
    root = repository(**{"README.md": "# Home\n\nGood.\n"})
    stage.stage(root, render=lambda text, page: text, vendor=False)
    repository(
        **{"README.md": "# Home\n\n[a](annotated_trainers/gone.md)\n", "CONTRIBUTING.md": "# C\n\n[b](../x.md)\n"}
    )
    with pytest.raises(stage.StageError) as error:
        stage.stage(root, render=lambda text, page: text, vendor=False)
    assert "README.md, line 3: the link `annotated_trainers/gone.md` leads to" in str(error.value)
    assert "CONTRIBUTING.md, line 3: the link `../x.md` leads out of the repository" in str(error.value)
    assert "Good." in (root / "build/docs/index.md").read_text()
    assert not (root / "build/docs/CONTRIBUTING.md").exists()


def test_a_file_that_is_no_page_is_shown_whole_and_a_binary_one_is_offered_as_it_is(repository):
    text = "# Home\n\n[t](tests/test_dpo.py) [w](weights.bin)\n"
    root = repository(**{"README.md": text, "weights.bin": b"\0\1\2"})
    assert "(source/weights.bin)" in staged(root, "index.md")
    assert "def test_nothing():\n    pass\n" in (root / "build/docs/source/tests/test_dpo.py.md").read_text()
    assert (root / "build/docs/source/weights.bin").read_bytes() == b"\0\1\2"


def test_a_link_to_a_folder_without_a_page_shows_what_is_in_it(repository):
    root = repository(**{"README.md": "# Home\n\n[tests](tests)\n", "tests/data/x.json": "{}"})
    assert staged(root, "source/tests/index.md") == "# `tests/`\n\n- `data/`\n- `test_dpo.py`\n"


# Comments, formulas, lists


def test_the_name_of_a_formula_becomes_an_anchor_right_before_it(repository):
    page = staged(repository(), "reference_guides/losses.md")
    assert re.search(
        r'<p class="formula" id="dpo-sigmoid"><a href="#dpo-sigmoid"[^>]*>dpo-sigmoid</a></p>\s+```math', page
    )


def test_comments_are_dropped_except_where_they_are_quoted(repository):
    page = readme(
        repository, "# Home\n\n<!-- not run: no GPU -->\n```text\n<!-- kept -->\n```\na `<!-- too -->` b<!-- c -->\n"
    )
    assert "not run" not in page
    assert "<!-- kept -->" in page
    assert "`<!-- too -->` b\n" in page


def test_a_comment_before_a_table_does_not_swallow_the_table(repository):
    page = readme(repository, "# Home\n\nText.\n<!-- [[[cog table() ]]] -->\n| a |\n|---|\n| b |\n<!-- [[[end]]] -->\n")
    assert "Text.\n\n" in page and "\n\n| a |\n|---|\n| b |\n" in page


def test_directives_are_rendered_and_one_that_is_not_is_an_error(repository):
    root = repository(**{"annotated_trainers/dpo.md": "# DPO\n\n<!-- excerpt: a.b\nfrom: x\n-->\n"})

    def render(text, page):
        return re.sub(r"<!--.*?-->", f"rendered for {page}", text, flags=re.DOTALL)

    assert "rendered for annotated_trainers/dpo.md" in staged(root, "annotated_trainers/dpo.md", render)
    with pytest.raises(stage.StageError, match=r"the directive `excerpt: a.b` was not rendered"):
        staged(root, "annotated_trainers/dpo.md")


BETWEEN = f"""\
# What changes

<!-- drift: {pinned_version()} -> {newest_version()} -->

Lines [1](dpo.md) → [1](dpo.md).

<!-- drift: trl.trainer.dpo_trainer.DPOTrainer.training_step 1 -> 1 -->
"""


def test_without_the_newest_release_the_site_is_built_and_says_what_is_missing(repository, monkeypatch, capsys):
    def obtain(target):
        raise drift.Unavailable(f"pip cannot download TRL {target}: no index")

    monkeypatch.setattr(drift, "obtain", obtain)
    root = repository(**{"annotated_trainers/newest_trl.md": BETWEEN})
    page = staged(root, "annotated_trainers/newest_trl.md", render=None)
    assert "<!--" not in page
    assert page.count("could not be had when this site was built, so the difference is not shown here") == 1
    warning = capsys.readouterr().err
    assert warning.startswith("warning: annotated_trainers/newest_trl.md shows no differences, only links: pip cannot")
    assert warning.count("\n") == 1


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (f"-> {newest_version()}", "-> 0.0.1", r"newest_trl.md is not about TRL .*: run `make sync`"),
        (f"<!-- drift: {pinned_version()}", "<!-- other: 1", r"newest_trl.md is not about TRL .*: run `make sync`"),
        (" 1 -> 1 -->", " 1 => 1 -->", r"newest_trl.md:7: .*is no directive"),
        ("<!-- drift: trl", " <!-- drift: trl", r"the directive `drift: trl.* was not rendered"),
        (" 1 -> 1 -->", " 1 -> 1 -->", r"lines 1-1 are not in `trl.trainer.dpo_trainer.DPOTrainer.training_step`"),
    ],
)
def test_a_difference_that_does_not_hold_stops_the_build(repository, monkeypatch, right, wrong, message):
    monkeypatch.setattr(drift, "obtain", lambda target: Source.installed())
    text = BETWEEN
    assert right in text
    root = repository(**{"annotated_trainers/newest_trl.md": text.replace(right, wrong, 1)})
    with pytest.raises(stage.StageError, match=message):
        staged(root, "index.md", render=None)


def test_a_directive_that_does_not_hold_is_reported_with_all_the_others(repository):
    def render(text, page):
        raise ValueError("anchor not found")

    with pytest.raises(stage.StageError, match=r"README.md: anchor not found[\s\S]*losses.md: anchor not found"):
        staged(repository(), "index.md", render)


def test_a_list_may_follow_a_paragraph_or_a_fence_without_a_blank_line(repository):
    page = readme(
        repository, "# Home\n\nText:\n- one\n- two\n    - inner\n\n```text\n- quoted\n```\n1. first\n2. second\n"
    )
    assert "Text:\n\n- one\n- two\n    - inner\n" in page
    assert "```text\n- quoted\n```\n\n1. first\n2. second\n" in page


def test_a_wrapped_line_that_begins_with_a_number_stays_in_its_paragraph(repository):
    text = "# Home\n\nTRL of the year\n2026. It has fifteen trainers.\n"
    assert readme(repository, text) == text


@pytest.mark.parametrize("inner", ["  - inner", "  3. wrapped", "\n  a paragraph", "  ```text\n  x\n  ```"])
def test_fewer_than_four_spaces_inside_a_list_are_an_error(repository, inner):
    with pytest.raises(stage.StageError, match=r"README.md: .*inside a list, indent by four spaces"):
        readme(repository, f"# Home\n\n- one\n{inner}\n")


# Scripts


def test_the_page_of_a_script_tells_what_it_does_and_how_to_run_it_and_links_to_its_other_parts(repository):
    page = staged(repository(), "annotated_examples/dpo.md")
    assert page.startswith("# `dpo.py`\n\nLearn from pairs of answers,\none better than the other.\n")
    assert "[DPO, line by line](../annotated_trainers/dpo.md)" in page
    assert "[Losses](../reference_guides/losses.md#dpo-sigmoid)" in page
    commands = "python dpo.py          # the toy world\naccelerate launch dpo.py --use_peft \\\n    --load_in_4bit"
    assert f"```bash\n{commands}\n```" in page
    assert ">settings</a>, " in page and ">the run</a>." in page


def test_a_script_that_names_no_guide_gets_the_one_of_its_walkthrough(repository):
    walkthrough = "# DPO\n\n| | |\n|---|---|\n| Mathematics | [losses](../reference_guides/losses.md#x) |\n"
    script = SCRIPT.replace("The formula: reference_guides/losses.md#dpo-sigmoid\n\n", "")
    root = repository(**{"annotated_examples/dpo.py": script, "annotated_trainers/dpo.md": walkthrough})
    assert "[Losses](../reference_guides/losses.md#x)" in staged(root, "annotated_examples/dpo.md")


def test_the_page_of_a_script_holds_all_of_it_and_the_file_lies_beside_it(repository):
    root = repository()
    page = staged(root, "annotated_examples/dpo.md")
    assert f'````{{ .python linenums="1" title="dpo.py"}}\n{SCRIPT}````'.replace('"}', '" }') in page
    assert "[Download `dpo.py`](dpo.py){" in page
    assert (root / "build/docs/annotated_examples/dpo.py").read_text() == SCRIPT


def test_the_page_of_a_measured_script_shows_what_it_prints_and_logs(repository):
    bare = staged(repository(), "annotated_examples/dpo.md")
    assert "What it prints" not in bare and '<a href="#__span-1-' in bare
    measured = {"expected/dpo.txt": "row\n{'loss': 1}\n{'loss': 0}\n\nHeld out:\n", "expected/dpo.svg": "<svg/>"}
    root = repository(**{f"annotated_examples/{name}": text for name, text in measured.items()})
    page = staged(root, "annotated_examples/dpo.md")
    assert "## What it prints\n\n```text\nrow\n...\n\nHeld out:\n```" in page
    [picture] = re.findall(r"six runs\]\((\S+?dpo\.svg)\)", page)
    assert (root / "build/docs/annotated_examples" / picture).read_text() == "<svg/>"
    assert '<a href="#__span-2-' in page  # commands, what it prints, the script


def test_a_walkthrough_that_a_script_names_and_that_is_missing_is_an_error(repository):
    script = SCRIPT.replace("annotated_trainers/dpo.md", "annotated_trainers/gone.md")
    with pytest.raises(stage.StageError, match=r"annotated_examples/dpo.py.*gone.md. leads to"):
        staged(repository(**{"annotated_examples/dpo.py": script}), "index.md")


@pytest.mark.parametrize(("code", "message"), [("x = 1\n", "dpo.py has no docstring"), ("x = (\n", "dpo.py, line 1")])
def test_a_script_that_makes_no_page_is_an_error(repository, code, message):
    with pytest.raises(stage.StageError, match=message):
        staged(repository(**{"annotated_examples/dpo.py": code}), "index.md")


def test_a_folder_gets_a_page_that_lists_its_pages_unless_somebody_wrote_one(repository):
    scripts = staged(repository(), "annotated_examples/index.md")
    assert "\n- [`dpo.py`](dpo.md): Learn from pairs of answers, one better than the other.\n" in scripts
    assert "\n- [DPO, line by line](dpo.md)\n" in staged(repository(), "annotated_trainers/index.md")
    root = repository(**{"annotated_trainers/index.md": "# By hand\n"})
    assert staged(root, "annotated_trainers/index.md") == "# By hand\n"


def test_the_page_between_two_releases_comes_after_all_walkthroughs(repository):
    pages = {f"annotated_trainers/{name}.md": f"# {name}\n" for name in ("newest_trl", "online_dpo")}
    root = repository(**pages)
    listed = re.findall(r"^- .*\((.*)\)$", staged(root, "annotated_trainers/index.md"), re.M)
    assert listed == ["dpo.md", "online_dpo.md", "newest_trl.md"]
    assert navigation(root)[2]["Annotated trainers"][-1] == "annotated_trainers/newest_trl.md"


# Navigation


def navigation(root: Path) -> list:
    stage.stage(root, render=lambda text, page: text, vendor=False)
    return yaml.safe_load((root / "build/nav.yml").read_text("utf-8"))["nav"]


def test_the_navigation_leaves_out_what_does_not_exist(repository):
    assert navigation(repository()) == [
        {"Home": "index.md"},
        {"Annotated examples": ["annotated_examples/index.md", {"dpo.py": "annotated_examples/dpo.md"}]},
        {"Annotated trainers": ["annotated_trainers/index.md", {"DPO": "annotated_trainers/dpo.md"}]},
        {"Reference guides": ["reference_guides/index.md", "reference_guides/losses.md"]},
    ]


def test_the_navigation_plans_a_script_and_a_walkthrough_for_each_of_the_fifteen_trainers(repository):
    names = ["sft", "reward", "dpo", "kto", "orpo", "cpo", "bco", "ppo", "grpo", "rloo", "online_dpo", "nash_md"]
    names += ["gkd", "xpo", "prm"]
    files = {f"annotated_examples/{name}.py": '"""Train."""\n' for name in names}
    files |= {f"annotated_trainers/{name}.md": "# Inside\n" for name in names}
    sections = {key: value for entry in navigation(repository(**files)) for key, value in entry.items()}
    for section, folder in (("Annotated examples", "annotated_examples"), ("Annotated trainers", "annotated_trainers")):
        planned = [next(iter(entry.values())) for entry in sections[section] if isinstance(entry, dict)]
        assert planned == [f"{folder}/{name}.md" for name in names]


def test_a_page_without_a_place_in_the_navigation_is_an_error(repository):
    with pytest.raises(stage.StageError, match=r"annotated_trainers/other.md.*Add it to tools/site/nav.yml"):
        navigation(repository(**{"annotated_trainers/other.md": "# Other\n"}))


# The build folder and the assets


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("in_place", [False, True])
def test_staging_twice_gives_the_same_bytes_and_keeps_nothing_that_is_gone(repository, in_place):
    root = repository(**{"CONTRIBUTING.md": "# C\n"})
    for _ in range(2):
        stage.stage(root, render=lambda text, page: text, vendor=False, in_place=in_place)
    before = everything(root / "build")
    (root / "CONTRIBUTING.md").unlink()
    stage.stage(root, render=lambda text, page: text, vendor=False, in_place=in_place)
    after = everything(root / "build")
    assert set(before) - set(after) == {"docs/CONTRIBUTING.md"}
    assert {name for name in after if after[name] != before.get(name)} == {"nav.yml"}


def test_staging_in_place_touches_only_what_changed(repository):
    root = repository(**{"CONTRIBUTING.md": "# C\n"})
    stage.stage(root, render=lambda text, page: text, vendor=False)
    folder = (root / "build/docs").stat().st_ino
    times = {p: p.stat().st_mtime_ns for p in (root / "build").rglob("*") if p.is_file()}
    repository(**{"CONTRIBUTING.md": "# Changed\n"})
    stage.stage(root, render=lambda text, page: text, vendor=False, in_place=True)
    assert {p.name for p, time in times.items() if p.stat().st_mtime_ns != time} == {"CONTRIBUTING.md"}
    assert (root / "build/docs").stat().st_ino == folder


def test_without_npm_the_error_says_what_to_install(repository, monkeypatch):
    root = repository(**{"tools/site/package-lock.json": "{}"})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(stage.StageError, match=r"npm was not found.*install Node.js"):
        stage.stage(root, render=lambda text, page: text)
    assert not (root / "build").exists()


def test_a_failing_npm_is_an_error_that_quotes_it(repository, monkeypatch):
    broken = "#!/bin/sh\necho disk full >&2\nexit 1\n"
    root = repository(**{"tools/site/package-lock.json": "{}", "bin/npm": broken, "bin/node": broken})
    for name in ("npm", "node"):
        (root / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(root / "bin"))
    with pytest.raises(stage.StageError, match=r"`npm ci` failed in .*/tools/site:\ndisk full"):
        stage.stage(root, render=lambda text, page: text)
    assert not (root / "build").exists()


def test_the_command_prints_the_error_and_no_traceback(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/stage.py").write_bytes((ROOT / "tools/stage.py").read_bytes())
    for name in ("walkthroughs", "drift"):
        (tmp_path / f"tools/{name}.py").write_text("def render(text, page):\n    return text\n")
    done = subprocess.run([sys.executable, tmp_path / "tools/stage.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("stage: ") and "has no README.md" in done.stderr and "Traceback" not in done.stderr


def test_the_lock_file_pins_what_package_json_asks_for_and_names_no_registry():
    wanted = json.loads((SITE / "package.json").read_text())["dependencies"]
    text = (SITE / "package-lock.json").read_text()
    packages = json.loads(text)["packages"]
    assert wanted == {name: packages[f"node_modules/{name}"]["version"] for name in ("katex", "mermaid")}
    assert "resolved" not in text
    assert all("integrity" in package for name, package in packages.items() if name)
