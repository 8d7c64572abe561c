"""The example scripts side by side: each has its tests, and what they share is the same."""

import ast
import sys

import pytest
import scripts
from examples import EXAMPLES, ROOT, SCRIPTS, functions, load

SECTIONS = ("settings", "model and trainer", "held out", "the run")


def test_every_script_has_a_test_file_and_every_test_file_a_script():
    assert (
        sorted(path.stem.removeprefix("test_example_") for path in (ROOT / "tests").glob("test_example_*.py"))
        == SCRIPTS
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_the_scripts_share_is_the_same_to_the_letter(name):
    texts = [(EXAMPLES / f"{script}.py").read_text() for script in (name, "dpo")]
    assert all(text.count(scripts.MARK) == 1 for text in texts)
    own, model = (text.split(scripts.MARK)[1] for text in texts)
    assert own == model


# Functions of the upper parts that scripts have in common, and the scripts where the method asks for another one.
COMMON = {
    "stop": set(),
    "prompt_ids": {
        *("grpo", "rloo"),  # a row may come from GSM8K, and the template takes arguments
        *("online_dpo", "nash_md", "xpo"),  # TRL renders text first, and has a way of its own with BOS
    },
    "sample": {"ppo"},  # the policy stands in a wrapper beside the value model
    "held_out": {
        "reward",
        "prm",
        "grpo",
        "rloo",
    },  # scores instead of answers; on the toy no evaluation besides the answers
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_the_upper_parts_have_in_common_is_the_same_too(name):
    own, model = functions(name), functions("dpo")
    assert {"stop", "build", "show_row", "held_out", "main"} <= set(own)
    for function, others in COMMON.items():
        if function in own:
            assert (own[function] == model[function]) == (name not in others), function


DECLARED = {  # module -> the requirement of the PEP 723 block that brings it
    **{module: module for module in ("trl", "transformers", "datasets", "peft", "accelerate", "torch")},
    **{"yaml": "transformers", "packaging": "transformers", "numpy": "transformers"},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_nothing_but_what_its_first_lines_declare(name):
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported - sys.stdlib_module_names <= set(DECLARED)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_have_the_same_sections_in_the_same_order(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    found = [line.lstrip("# -") for line in lines if line.startswith("# -----")]
    assert tuple(found) == SECTIONS


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_first_line_leads_to_the_walkthrough(name):
    first = (EXAMPLES / f"{name}.py").read_text().splitlines()[0]
    assert first == f"# The walkthrough of TRL's implementation: annotated_trainers/{name}.md"
    assert (ROOT / "annotated_trainers" / f"{name}.md").is_file()


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_has_a_folder_and_expected_values_of_its_own(name):
    script = load(EXAMPLES / f"{name}.py")
    assert name == script.SCRIPT
    assert script.TOY["output_dir"] == f"outputs/{name}-toy"
    assert (EXAMPLES / "expected" / f"{name}.json").is_file()
