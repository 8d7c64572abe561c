"""The recipes: flags that the scripts know, and configurations that accelerate reads."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from examples import EXAMPLES, SCRIPTS, load, run

RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
ACCELERATE = sorted((EXAMPLES / "recipes" / "accelerate").glob("*.yaml"))
SAMPLING = {"grpo", "rloo", "online_dpo"}
TAKERS = {  # recipe -> the scripts that it is for, where these are not all
    "vllm_colocate": SAMPLING,
    "vllm_server": SAMPLING,
    "full_24gb": set(SCRIPTS) - {"ppo", "gkd"},
}
CASES = [
    pytest.param(recipe, name, id=f"{recipe.stem}, {name}")
    for recipe in RECIPES
    for name in SCRIPTS
    if name in TAKERS.get(recipe.stem, SCRIPTS)
]


@pytest.mark.parametrize(("recipe", "name"), CASES)
def test_a_recipe_is_read_by_the_real_parser_of_each_script_that_it_is_for(recipe, name):
    toy, *parsed = load(EXAMPLES / f"{name}.py").parse(["--config", str(recipe), "--use_cpu"])
    assert not toy
    for key, value in yaml.safe_load(recipe.read_text()).items():
        found = [getattr(part, key) for part in parsed if hasattr(part, key)]
        assert found == [value], key


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    wanted = yaml.safe_load(path.read_text())
    found = load_config_from_file(str(path))
    assert found.distributed_type == wanted["distributed_type"]
    assert found.num_processes == wanted["num_processes"]
    for part in ("fsdp_config", "deepspeed_config"):
        for key, value in wanted.get(part, {}).items():
            assert getattr(found, part)[key] == value


@pytest.mark.parametrize("recipe", [*RECIPES, *ACCELERATE], ids=lambda path: path.stem)
def test_the_commands_of_a_recipe_name_files_that_exist(recipe):
    text = recipe.read_text()
    named = set(re.findall(r"annotated_examples/[\w./]+\.(?:py|yaml)", text))
    assert named
    for path in named:
        assert (EXAMPLES.parent / path).is_file(), path
    assert recipe.name in (EXAMPLES / "recipes" / "README.md").read_text()


def test_without_an_accelerator_the_fsdp_recipe_does_not_shard(tmp_path):
    """What recipes/README.md says: two processes on a CPU get plain data parallelism, and nothing warns."""
    script = tmp_path / "which.py"
    line = "sys.stdout.write(f'type: {Accelerator(cpu=True).distributed_type.value}\\n')"  # in one piece, from each process
    script.write_text(f"import sys\nfrom accelerate import Accelerator\n{line}\n")
    config = str(EXAMPLES / "recipes" / "accelerate" / "fsdp2.yaml")
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", config]
    done = run([*launch, "--num_processes", "2", "--mixed_precision", "no", str(script)], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.findall("type: (.*)", done.stdout) == ["MULTI_CPU", "MULTI_CPU"]
