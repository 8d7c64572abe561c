"""Each loss type of each config of the fifteen has a named formula with a block that a test compares with TRL."""

import ast
import importlib
import inspect
import re
import sys

import pytest
import quick_reference
from markdown_pages import markdown_files
from tables import TRAINERS

FORMULAS = {  # trainer -> loss type -> the formula of its loss; "" where there is no `loss_type`
    "sft": {"nll": "mean-over-tokens", "chunked_nll": "mean-over-tokens", "dft": "dft-loss"},
    "reward": {"": "pairwise-reward-loss"},
    "dpo": {
        **{name: f"dpo-{name}" for name in ("sigmoid", "hinge", "ipo", "robust", "aot", "discopop", "sft")},
        **{"exo_pair": "dpo-exo-pair", "nca_pair": "dpo-nca-pair", "bco_pair": "dpo-bco-pair"},
        **{"sppo_hard": "dpo-sppo-hard", "aot_unpaired": "dpo-aot-unpaired", "sigmoid_norm": "dpo-sigmoid-norm"},
        **{"apo_zero": "dpo-apo-zero", "apo_down": "dpo-apo-down"},
    },
    "kto": {"kto": "kto-loss", "apo_zero_unpaired": "apo-zero-unpaired"},
    "orpo": {"": "orpo-loss"},
    "cpo": {
        **{"sigmoid": "cpo-loss", "hinge": "cpo-hinge", "ipo": "cpo-ipo", "simpo": "simpo-loss"},
        "alphapo": "alphapo-reward",
    },
    "bco": {"": "bco-loss"},
    "ppo": {"": "ppo-policy-loss"},
    "grpo": {
        **{name: f"{name}-mean" for name in ("grpo", "bnpo", "dapo", "luspo")},
        **{name: f"{name}-term" for name in ("cispo", "sapo", "vespo")},
        "dr_grpo": "dr-grpo-mean",
    },
    "rloo": {"": "rloo-loss"},
    "online_dpo": {"sigmoid": "online-dpo-loss", "ipo": "online-ipo-loss"},
    "nash_md": {"": "nash-md-loss"},  # inherits the setting and does not read it
    "gkd": {"": "gkd-loss"},  # inherits SFT's setting; its own compute_loss does not read it
    "xpo": {"sigmoid": "xpo-loss", "ipo": "xpo-ipo-loss"},
    "prm": {"": "step-label-loss"},
}
REFUSED = {"cpo": {"kto_pair"}}  # named in the source to be refused


def compared(trainer: type, config: type) -> set[str]:
    """The strings that the source of the class and of its config compares a loss type with, or lists as choices."""
    found = set()
    for module in (trainer.__module__, config.__module__):
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module]))):
            if isinstance(node, ast.Compare) and ast.unparse(node.left).split(".")[-1] == "loss_type":
                strings = [leaf for leaf in ast.walk(node.comparators[0]) if isinstance(leaf, ast.Constant)]
                found |= {leaf.value for leaf in strings if isinstance(leaf.value, str)}
    return found


@pytest.mark.parametrize("name", TRAINERS)
def test_each_loss_type_of_trl_has_a_formula(name):
    module, config, trainer = re.search(
        r"from (\S+) import (\w+Config), (\w+Trainer)", quick_reference.facts(name)["Import"]
    ).groups()
    module = importlib.import_module(module)
    types = compared(getattr(module, trainer), getattr(module, config)) - REFUSED.get(name, set())
    assert set(FORMULAS[name]) == (types or {""})


def test_each_of_these_formulas_is_displayed_with_a_block_of_its_own():
    displayed = {
        name
        for path in markdown_files()
        for name in re.findall(r"^<!-- formula: ([\w-]+) -->$", path.read_text(), re.M)
    }
    assert {formula for of_trainer in FORMULAS.values() for formula in of_trainer.values()} <= displayed
    assert list(FORMULAS) == list(TRAINERS)
