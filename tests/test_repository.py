"""The frame of the repository: commands, versions, ranges, Makefile, workflows, the map, and what no file may hold."""

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import compare
import environments
import pins
import pytest
import tables
import yaml
from commands import TESTED_COMMANDS
from markdown_pages import fences
from packaging.requirements import Requirement
from trl_source import newest_version

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SCRIPTS = sorted((ROOT / "annotated_examples").glob("*.py"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TRAINERS = {
    *("sft", "reward", "dpo", "kto", "orpo", "cpo", "bco", "ppo", "grpo", "rloo"),
    *("online_dpo", "nash_md", "gkd", "xpo", "prm"),
}
PINNED = pins.pinned()


@cache
def files() -> dict[str, str]:
    """Name -> text of every text file of the repository."""
    return pins.text_files()


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    outside = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return subprocess.run(command, cwd=ROOT, env=outside | variables, capture_output=True, text=True)


def make(*arguments: str) -> subprocess.CompletedProcess:
    return run("make", "--no-print-directory", *arguments, f"PYTHON={sys.executable}")


# ----------------------------------------------------------------------------------------------------------- commands


def readme_commands() -> dict[str, str]:
    """Name -> command line of the fences of README.md that are marked `<!-- command: name -->`."""
    marked = [(re.fullmatch(r"<!-- command: (\w+) -->", f.comment), f) for f in fences(ROOT / "README.md")]
    return {match[1]: fence.text.removesuffix("\n") for match, fence in marked if match}


def test_readme_has_one_command_to_try_and_one_to_test():
    found = readme_commands()
    assert set(found) == {"try", "test"}
    for command in found.values():
        assert "\n" not in command, "one copyable line"
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
    assert found["try"].endswith(" annotated_examples/dpo.py")
    assert found["test"].endswith(" -m pytest")


def test_ci_runs_the_very_commands_of_the_readme():
    shown = run("bash", ".ci/run", "--show")
    assert shown.stdout.splitlines() == [readme_commands()["try"], readme_commands()["test"]]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize(("command", "runner"), TESTED_COMMANDS.items())
def test_what_is_said_to_run_a_command_exists(command, runner):
    if runner == ".ci/run":
        assert command in readme_commands().values()
        return
    file, name = runner.split("::")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.fixture
def small_clone(tmp_path):
    """A function that makes a tiny repository with this .ci/run, and a PATH where browser and npm are found."""

    def build(test_command: str) -> tuple[Path, dict[str, str]]:
        clone, bin_folder = tmp_path / "clone", tmp_path / "bin"
        (clone / ".ci").mkdir(parents=True)
        bin_folder.mkdir()
        for name in ("chromium", "npm"):
            (bin_folder / name).write_text("#!/bin/sh\n")
            (bin_folder / name).chmod(0o755)
        shutil.copy(ROOT / ".ci" / "run", clone / ".ci" / "run")
        fence = "<!-- command: {} -->\n```bash\n{}\n```\n\n"
        (clone / "README.md").write_text(fence.format("try", "touch tried") + fence.format("test", test_command))
        (clone / "Makefile").write_text("check:\n\ttest -f tried && touch checked\nsite:\n\ttest -f checked\n")
        subprocess.run(["git", "init", "-q", str(clone)], check=True)
        (tmp_path / "tmp").mkdir()
        variables = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "tmp")}
        return clone, variables

    return build


def test_ci_ends_with_the_last_lines_of_the_tests_and_leaves_nothing(small_clone):
    clone, variables = small_clone("test -f tried && echo '7 passed in 1s' && touch made")
    done = run("bash", str(clone / ".ci" / "run"), **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "7 passed in 1s"
    assert {path.name for path in clone.iterdir()} == {".git", ".ci", "README.md", "Makefile"}
    assert not list(Path(variables["TMPDIR"]).iterdir())


def test_ci_fails_when_the_tests_fail(small_clone):
    clone, variables = small_clone("echo '1 failed' && false")
    done = run("bash", str(clone / ".ci" / "run"), **variables)
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1] == "1 failed"
    assert not list(Path(variables["TMPDIR"]).iterdir())


# ----------------------------------------------------------------------------------------------------------- versions

# A requirement on TRL, as pip, uv, conda or a lock file would spell it.
A_PIN = re.compile(r"\btrl(?:\[[\w,-]*\])?\s*(?:[=~<>!]=|@)\s*v?(\d[\w.]*)")
COG = re.compile(r"<!-- \[\[\[cog.*?\[\[\[end\]\]\] -->", re.S)


def test_trl_is_pinned_in_one_place_and_its_copies_agree():
    may_copy = {str(path.relative_to(ROOT)) for path in SCRIPTS}
    searched = {name: COG.sub("", text) for name, text in files().items() if not name.startswith("tests/")}
    found = {(name, version) for name, text in searched.items() for version in A_PIN.findall(text)}
    assert ("pyproject.toml", PINNED) in found
    assert {place for place in found if place[0] not in may_copy} == {("pyproject.toml", PINNED)}
    assert {version for _, version in found} == {PINNED}


def test_the_newest_release_stands_in_one_place_and_is_not_older_than_the_pinned_one():
    assert [newest_version()] == pins.NEWEST.findall(files()["pyproject.toml"])
    assert pins.order(newest_version()) >= pins.order(PINNED)
    assigned = re.compile(rf"^\s*\w+ *[:=] *[\"']?{re.escape(newest_version())}[\"']?", re.M)
    assert [name for name, text in files().items() if assigned.search(text)] == ["pyproject.toml"]


def test_no_tool_test_or_workflow_names_the_pinned_version():
    allowed = re.compile(r"pyproject\.toml|annotated_examples/\w+\.py|.*\.md")
    assert [line for line in pins.mentions(PINNED) if not allowed.fullmatch(line.split(":")[0])] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_readme_and_contributing_name_the_pinned_version_only_where_it_is_generated(name):
    assert PINNED not in COG.sub("", files()[name])


def test_readme_shows_the_ranges_of_pyproject():
    (shown,) = [generated for generated in COG.findall(README) if "pins.table()" in generated]
    for entry in PROJECT["dependencies"]:
        requirement = Requirement(entry)
        assert f" {requirement.name} |" in shown
        assert all(str(bound) in shown for bound in requirement.specifier)


def test_links_to_lines_of_trl_go_to_the_pinned_release():
    link = re.compile(r"github\.com/huggingface/trl/(?:blob|tree)/([^/\s)]+)/[^\s)]*#L\d")
    pages = {name: text for name, text in files().items() if name.endswith(".md")}
    between = pages.pop("annotated_trainers/newest_trl.md")
    assert {(name, tag) for name, text in pages.items() for tag in link.findall(text) if tag != f"v{PINNED}"} == set()
    assert set(link.findall(between)) <= {f"v{PINNED}", f"v{newest_version()}"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_declares_the_requirements_of_pyproject(script):
    (block,) = re.findall(r"(?m)^# /// script$\s((?:^#(?:| .*)$\s)+?)^# ///$", script.read_text("utf-8"))
    declared = tomllib.loads("\n".join(line.removeprefix("#")[1:] for line in block.splitlines()))
    assert declared == {"requires-python": PROJECT["requires-python"], "dependencies": PROJECT["dependencies"]}


def admitted(requirement: Requirement, version: str) -> bool:
    return requirement.specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("entry", PROJECT["dependencies"])
def test_the_installed_package_is_inside_its_range(entry):
    requirement = Requirement(entry)
    assert admitted(requirement, importlib.metadata.version(requirement.name))


def test_the_gpu_machine_of_the_measurements_is_admitted():
    ranges = {requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])}
    there = {"torch": "2.11.0", "transformers": "5.17.0", "accelerate": "1.15.0"}
    assert all(admitted(ranges[package], version) for package, version in there.items())
    assert admitted(Requirement(f"python{PROJECT['requires-python']}"), "3.12")


def test_every_range_has_a_lower_and_an_upper_end():
    extras = PROJECT["optional-dependencies"]
    named = [*PROJECT["dependencies"], *(entry for group in extras.values() for entry in group)]
    open_ended = []
    for entry in named:
        operators = {bound.operator for bound in Requirement(entry).specifier}
        if operators != {"=="} and not (operators & {">="} and operators & {"<", "<="}):
            open_ended.append(entry)
    assert open_ended == ["aiohttp>=3.13.3"]  # vLLM bounds it


def test_the_extras_are_those_that_contributing_explains():
    told = set(
        re.findall(r"`(\w+)`", re.search(r"The extras (.*?) are for GPU users", files()["CONTRIBUTING.md"], re.S)[1])
    )
    assert told == set(PROJECT["optional-dependencies"]) - {"test", "docs", "maintain"}


def test_citation_and_project_have_one_version_and_licence():
    citation = yaml.safe_load(files()["CITATION.cff"])
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert f"## {PROJECT['version']}" in files()["CHANGELOG.md"]


def test_the_licence_is_the_unchanged_text_of_apache_2():
    known = "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == known


# ---------------------------------------------------------------------------------------------- moving the pin of TRL

PYPROJECT = '[project]\nrequires-python = ">=3.11"\ndependencies = ["trl==7.1", "peft>=1,<2"]\n'
SCRIPT = "# See x.md\n# /// script\n# dependencies = []\n# ///\n'''Doc.'''\n"


@pytest.fixture
def small_repository(tmp_path):
    (tmp_path / "annotated_examples" / "expected").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "annotated_examples" / "dpo.py").write_text(SCRIPT)
    (tmp_path / "page.md").write_text("TRL 7.1 does so.\nTRL 7.1.1 and 17.1 are others.\n")
    expected, measured = tmp_path / "annotated_examples" / "expected", {"versions": {"trl": "7.1"}}
    (expected / "dpo.json").write_text(
        json.dumps(measured | {"trainer": "dpo", "command": "python dpo.py --seed SEED"})
    )
    (expected / "memory.json").write_text(json.dumps(measured | {"command": "python tools/memory.py"}))
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def bumped(root: Path, fails: str = "") -> tuple[int, list[str]]:
    """Exit status of a move to 7.2, and the commands it started; those that contain `fails` fail."""
    started = []

    def pretend(command: list[str]) -> int:
        started.append(" ".join(command[1:]))
        return int(bool(fails) and fails in started[-1])

    return pins.bump("7.2", root, pretend), started


def test_bump_moves_the_pin_and_lists_what_to_read_again(small_repository, capsys):
    status, started = bumped(small_repository)
    assert status == 0
    assert pins.pinned(small_repository) == "7.2"
    assert [command.split(" PYTHON")[0] for command in started] == [
        "tools/drift.py 7.2",
        "-m pip install --quiet -e .",
        "--keep-going sync",
    ]
    printed = capsys.readouterr().out
    assert "page.md:1: TRL 7.1 does so." in printed
    assert "page.md:2" not in printed
    assert "dpo.json: measured with TRL 7.1; `make expected TRAINER=dpo`" in printed
    assert "memory.json: measured with TRL 7.1; `python tools/memory.py`" in printed


@pytest.mark.parametrize(("newest", "after"), [("7.1.9", "7.2"), ("7.2", "7.2"), ("7.10", "7.10")])
def test_bump_leaves_no_newest_release_that_is_older_than_the_pin(small_repository, newest, after):
    (small_repository / "pyproject.toml").write_text(PYPROJECT + f'[tool.annotated-trl]\nnewest = "{newest}"\n')
    assert bumped(small_repository)[0] == 0
    assert pins.NEWEST.findall((small_repository / "pyproject.toml").read_text()) == [after]


@pytest.mark.parametrize("step", ["drift", "pip install"])
def test_bump_changes_nothing_when_the_release_cannot_be_had(small_repository, step):
    with pytest.raises(pins.PinError, match="nothing was changed"):
        bumped(small_repository, fails=step)
    assert (small_repository / "pyproject.toml").read_text() == PYPROJECT


def test_bump_fails_when_a_page_could_not_be_regenerated(small_repository, capsys):
    status, _ = bumped(small_repository, fails="sync")
    assert status == 1
    assert "repair what `make sync` complained of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "reason"), [("7.1", "already"), ("newest", "no version"), ("7.2; rm", "no version")]
)
def test_bump_refuses_what_is_no_new_version(small_repository, version, reason):
    with pytest.raises(pins.PinError, match=reason):
        pins.bump(version, small_repository, lambda command: pytest.fail(f"started {command}"))


def test_sync_writes_the_requirements_and_nothing_else_into_a_script(small_repository):
    script = small_repository / "annotated_examples" / "dpo.py"
    assert pins.sync(small_repository, check=True) == ["annotated_examples/dpo.py"]
    assert script.read_text() == SCRIPT
    pins.sync(small_repository)
    head, dependencies = (
        '# See x.md\n# /// script\n# requires-python = ">=3.11"\n',
        '#     "trl==7.1",\n#     "peft>=1,<2",\n',
    )
    assert script.read_text() == f"{head}# dependencies = [\n{dependencies}# ]\n# ///\n'''Doc.'''\n"
    assert pins.sync(small_repository, check=True) == []


def test_sync_refuses_a_script_without_a_block(small_repository):
    (small_repository / "annotated_examples" / "sft.py").write_text("print()\n")
    with pytest.raises(pins.PinError, match=r"sft\.py: needs exactly one PEP 723 block"):
        pins.sync(small_repository)
    assert (small_repository / "annotated_examples" / "dpo.py").read_text() == SCRIPT


# ------------------------------------------------------------------------------------------------ lowest and highest


def test_a_lower_bound_that_does_not_get_installed_is_named():
    versions = {package: environments.lower_bound(bounds) for package, bounds in environments.requirements().items()}
    assert environments.wrong_bounds(versions | {"torch": "0.1"}) == []  # torch is not varied
    assert environments.wrong_bounds(versions | {"peft": "99.0"}) == [
        f"peft: pyproject.toml says {versions['peft']}, the lowest that can be installed is 99.0"
    ]


def test_a_range_without_a_lower_end_is_an_error():
    with pytest.raises(environments.EnvironmentsError, match="no lower bound"):
        environments.lower_bound("<2")


def test_only_the_first_installation_of_an_environment_is_the_lowest(monkeypatch):
    monkeypatch.setattr(environments, "uv", lambda: "uv")
    _, first, second = environments.commands("lowest", "2.13.0", "python3")
    assert "--resolution lowest-direct -r pyproject.toml" in " ".join(first)
    assert "--resolution" not in second  # the test tools come on top, at their newest, and move nothing
    assert second[-4:] == ["--extra", "test", "--extra", "docs"]


def test_an_unknown_environment_is_refused(capsys):
    with pytest.raises(SystemExit):
        environments.main(["newest"])
    assert "choose from lowest, highest" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- Makefile

TARGETS = {
    *("help", "install", "test", "check", "site", "serve", "sync"),
    *("coverage", "drift", "parity", "releases", "bump", "toy", "expected", "compare", "settings", "formats"),
    *("memory", "hacking", "symptoms", "chain", "gpu", "environments"),
}


def test_make_help_lists_every_target():
    listed = {line.split()[0] for line in make("help").stdout.splitlines()}
    phony = set(re.search(r"^\.PHONY: (.*)$", files()["Makefile"], re.M)[1].split())
    assert listed == TARGETS == phony - {"environment"}
    assert make().stdout == make("help").stdout


@pytest.mark.parametrize("target", sorted(TARGETS - {"help"}))
def test_a_make_target_names_only_files_that_exist(target):
    dry = make("--dry-run", target, "TRL=9.9", "TRAINER=dpo")
    assert dry.returncode == 0, dry.stderr
    named = set(re.findall(r"\b(?:tools|tests|annotated_examples)/[\w/]+\.py", dry.stdout))
    assert {name for name in named if not (ROOT / name).is_file()} == set()
    assert sys.executable in dry.stdout


def test_the_site_is_built_strictly():
    (build,) = [line for line in make("--dry-run", "site").stdout.splitlines() if "mkdocs" in line]
    assert build.endswith("mkdocs build --strict")  # -q would turn strict off


@pytest.mark.parametrize("target", ["drift", "bump"])
def test_a_target_without_its_release_says_what_to_type(target):
    done = make(target)
    assert done.returncode != 0
    assert f"make {target} TRL=" in done.stderr


def test_make_without_an_environment_names_the_remedy():
    done = run("make", "test", "PYTHON=.venv/bin/no-such-python")
    assert done.returncode != 0
    assert "run 'make install' first" in done.stderr


def test_make_uses_the_active_environment_and_otherwise_its_own():
    bare = run("make", "--dry-run", "install", VIRTUAL_ENV="", CONDA_PREFIX="").stdout.splitlines()
    active = run("make", "--dry-run", "install", VIRTUAL_ENV="/some/where", CONDA_PREFIX="").stdout.splitlines()
    assert bare == ["python3 -m venv .venv", ".venv/bin/python -m pip install -e '.[test,docs]'"]
    assert active == ["python -m pip install -e '.[test,docs]'"]


def test_the_hooks_run_commands_of_make_check():
    hooks = yaml.safe_load(files()[".pre-commit-config.yaml"])["repos"][0]["hooks"]
    checked = make("--dry-run", "check").stdout.replace(sys.executable, "python")
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "codespell", "pins"}
    for hook in hooks:
        command = hook["entry"].removesuffix(" --force-exclude")
        assert command in checked


# ---------------------------------------------------------------------------------------------------------- workflows

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def workflow(path: Path) -> dict:
    found = yaml.safe_load(path.read_text("utf-8"))
    return {"on" if key is True else key: value for key, value in found.items()}  # YAML reads `on` as true


def steps(path: Path) -> list[dict]:
    return [step for job in workflow(path)["jobs"].values() for step in job["steps"]]


def test_there_are_these_workflows():
    assert {path.stem for path in WORKFLOWS} == {"tests", "lowest-highest", "nightly", "site"}


@each_workflow
def test_a_workflow_can_be_started_by_hand_and_has_limits(path):
    found = workflow(path)
    assert "workflow_dispatch" in found["on"]
    assert found["permissions"]["contents"] == "read"
    assert all(job["timeout-minutes"] <= 90 for job in found["jobs"].values())


@each_workflow
def test_actions_are_pinned_by_major_version(path):
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert used
    assert [action for action in used if not re.fullmatch(r"actions/[\w-]+@v\d+", action)] == []


@each_workflow
def test_a_workflow_runs_only_what_exists(path):
    commands = "\n".join(step.get("run", "") for step in steps(path))
    assert set(re.findall(r"\bmake (\w+)", commands)) <= TARGETS
    named = re.findall(r"\b(?:tools|tests)/\w+\.py|\.ci/\w+", commands)
    assert [name for name in named if not (ROOT / name).is_file()] == []
    for script in (step["run"] for step in steps(path) if "run" in step):
        script = re.sub(r"\$\{\{.*?\}\}", "x", script)
        assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


def test_the_lowest_and_highest_versions_run_weekly():
    found = workflow(ROOT / ".github" / "workflows" / "lowest-highest.yml")
    minute, hour, day, month, weekday = found["on"]["schedule"][0]["cron"].split()
    assert minute.isdigit() and hour.isdigit() and (day, month) == ("*", "*") and weekday.isdigit()
    (job,) = found["jobs"].values()
    assert job["strategy"]["matrix"]["which"] == list(environments.RESOLUTION)


def test_the_next_trl_is_reported_and_never_blocks():
    (job,) = workflow(ROOT / ".github" / "workflows" / "nightly.yml")["jobs"].values()
    assert job["continue-on-error"] is True
    reporting = [step for step in job["steps"] if "GITHUB_STEP_SUMMARY" in step.get("run", "")]
    assert len(reporting) == 2
    assert all(step["continue-on-error"] is True for step in reporting)
    assert [entry["install"] for entry in job["strategy"]["matrix"]["next"]] == [
        "trl",
        "git+https://github.com/huggingface/trl",
    ]


# ------------------------------------------------------------------------------------------------ what the README says


def test_the_map_names_everything_at_the_top_and_nothing_else():
    section = README.split("\n## Map\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \[([^\]]+)\]\(([^)]+)\) \| \S", section, re.M)
    assert {label.rstrip("/") for label, _ in rows} == {name.split("/")[0] for name in files()}
    assert [link for _, link in rows if not (ROOT / link).exists()] == []
    assert [label for label, link in rows if not link.startswith(label)] == []


def test_the_table_of_parts_has_a_row_for_each_trainer_whose_links_lead_somewhere():
    (table,) = [generated for generated in COG.findall(README) if "tables.parts()" in generated]
    rows = re.findall(
        r"^\| \w+ \| \[(\w+)\.py\]\((\S+)\) \| \[line by line\]\((\S+)\) \| \[.+\]\((\S+)#\S+\) \|$", table, re.M
    )
    assert [name for name, *_ in rows] == list(tables.TRAINERS) and set(tables.TRAINERS) == TRAINERS
    assert all((ROOT / link).is_file() for _, *links in rows for link in links)
    walkthroughs = {path.stem for path in (ROOT / "annotated_trainers").glob("*.md")} - {"index", "newest_trl"}
    assert {path.stem for path in SCRIPTS} == walkthroughs == TRAINERS


def test_the_picture_on_the_first_page_shows_what_its_description_says():
    (alt,) = re.findall(r"!\[([^\]]+)\]\(annotated_examples/expected/compare\.svg\)", README)
    rows = {row["name"]: row for row in compare.rows() if row["name"] in compare.POLICIES}
    before = [value for row in rows.values() for value in row["before"]]
    after = {name: sum(row["after"]) / len(row["after"]) for name, row in rows.items()}
    best, last = max(after, key=after.get), min(after, key=after.get)
    told = f"Thirteen trainers on one task. Each dot is a seed: all start between {min(before):.2f} and {max(before):.2f} right "
    told += f"answers, {tables.NAMES[best]} ends at {after[best]:.2f}, {tables.NAMES[last]} at {after[last]:.2f}; "
    told += f"{tables.NAMES[best]} trained for {rows[best]['seconds']:.0f} seconds, "
    assert alt == told + f"{tables.NAMES[last]} for {rows[last]['seconds']:.0f}"
    assert len(rows) == 13


def test_the_place_of_the_telemetry_is_the_one_that_the_readme_names():
    symbol, file = re.search(r"`(\w+\.\w+)` in `(trl/[\w/]+\.py)`", README).groups()
    package = Path(importlib.metadata.distribution("trl").locate_file(file))
    (trainer,) = [
        n for n in ast.parse(package.read_text("utf-8")).body if getattr(n, "name", "") == symbol.split(".")[0]
    ]
    methods = {node.name: ast.unparse(node) for node in trainer.body if isinstance(node, ast.FunctionDef)}
    assert "send_telemetry(" in methods[symbol.split(".")[1]]
    assert f"self.{symbol.split('.')[1]}()" in methods["__init__"]


def test_the_variable_that_silences_experimental_modules_is_the_one_that_the_readme_names():
    variable = re.search(r"`(\w+)=1` hides it", README)[1]
    source = Path(importlib.metadata.distribution("trl").locate_file("trl/experimental/__init__.py")).read_text("utf-8")
    assert f'os.environ.get("{variable}")' in source


# ------------------------------------------------------------------------------------------------ what no file may hold

# Spelled so that these lines do not hold what they look for.
OF_A_MACHINE = re.compile(r"(?<![\w.~/-])/(?:work|root|opt|home|Users|mnt)/\w")
OF_A_REGISTRY = re.compile(
    r"p[y]pi\.org|p[y]thonhosted\.org|n[p]mjs\.(?:org|com)|d[o]wnload\.pytorch|d[e]bian\.org|c[o]nda\.anaconda"
)


@pytest.mark.parametrize("unwanted", [OF_A_MACHINE, OF_A_REGISTRY], ids=["path of a machine", "host of a registry"])
def test_no_file_names_a(unwanted):
    found = [
        f"{n}:{i}"
        for n, text in files().items()
        for i, line in enumerate(text.splitlines(), 1)
        if unwanted.search(line)
    ]
    assert found == []
