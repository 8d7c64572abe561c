"""ALL_TRAINERS_QUICK_REF.md: its template is filled in and run for each trainer, and its tables say what is true."""

import ast
import html
import importlib
import os
import re

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import pytest
import quick_reference
import which
from markdown_pages import ROOT, fences
from tables import TRAINERS
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

PAGE = ROOT / "ALL_TRAINERS_QUICK_REF.md"
TEXT = PAGE.read_text("utf-8")
WORDS = ("IMPORT", "POLICY", "ROWS", "SETTINGS", "MORE", "PREPARE")


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def fills() -> dict[str, dict[str, str]]:
    """Trainer, as the page calls it -> word of the template -> what the page's table has for it."""
    rows = re.findall(r"^\| (.+) \|$", section("Quick start"), re.M)
    cells = [[cell.strip() for cell in row.split(" | ")] for row in rows]
    head, _, *body = cells
    assert head == ["trainer", *(f"`{word}`" for word in WORDS)]
    return {row[0]: dict(zip(WORDS, (cell.strip("`") for cell in row[1:]), strict=True)) for row in body}


def filled_in(words: dict[str, str]) -> str:
    """The template as the page tells a person to fill it in."""
    (template,) = [fence.text for fence in fences(PAGE) if fence.lang == "python"]
    config, trainer = re.search(r"import (\w+Config), (\w+Trainer)$", words["IMPORT"]).groups()
    lines = []
    for line in template.splitlines():
        for word, value in {**words, "CONFIG": config, "TRAINER": trainer}.items():
            if re.search(rf"\b{word}\b", line) and not value:
                break
            line = re.sub(rf"\b{word}\b", lambda match, value=value: value, line)
        else:
            lines.append(line)
    return "\n".join(lines)


def test_the_table_has_a_row_for_each_trainer():
    assert list(fills()) == [quick_reference.title(name) for name in quick_reference.names()]
    assert set(quick_reference.names()) == set(TRAINERS)


def test_each_word_of_the_template_is_in_the_table_and_the_other_way_round():
    (template,) = [fence.text for fence in fences(PAGE) if fence.lang == "python"]
    found = {word for word in (*WORDS, "CONFIG", "TRAINER") if re.search(rf"\b{word}\b", template)}
    assert found == {*WORDS, "CONFIG", "TRAINER"}


@pytest.mark.parametrize("name", quick_reference.names())
def test_the_template_filled_in_trains(name, monkeypatch, tmp_path):
    """Two steps, in a folder where the paths of the page lead to the toy world."""
    (tmp_path / "annotated_examples").symlink_to(ROOT / "annotated_examples")
    monkeypatch.chdir(tmp_path)
    code = filled_in(fills()[quick_reference.title(name)])
    code = code.replace("bf16=is_torch", "report_to='none', use_cpu=True, bf16=is_torch")  # a quiet run on the CPU
    namespace, models, forward = {"__name__": "quick_start"}, set(), Qwen3Model.forward

    def counted(model, *arguments, **named):
        models.add(id(model))
        return forward(model, *arguments, **named)

    monkeypatch.setattr(Qwen3Model, "forward", counted)
    exec(compile(code, f"quick start of {name}", "exec"), namespace)
    trainer = namespace["trainer"]
    assert type(trainer).__name__.removesuffix("Trainer").lower() == name.replace("_", "")
    assert trainer.state.global_step == (4 if name == "ppo" else 2)  # PPO counts rounds of four answers
    assert (tmp_path / "outputs" / "quick-start" / "model.safetensors").is_file()
    ways = {have: count for have, trainer, count, _ in which.WAYS if trainer == name}
    assert len(models) == ways.get("a program that checks", min(ways.values()))
    if "reward_funcs=right" in code:  # a reward model in place of the program is one more
        assert ways.get("a reward model", len(models) + 1) == len(models) + 1


@pytest.mark.parametrize("name", quick_reference.names())
def test_a_card_holds_the_facts(name):
    """The import runs, the arguments exist, and the loss is the one at the head of the script."""
    card = TEXT.split(f"\n### {quick_reference.title(name)}\n", 1)[1].split("\n## ", 1)[0].split("\n### ", 1)[0]
    cells = dict(re.findall(r"^\| (.+?) \| (.*) \|$", card, re.M))
    module, config = re.search(r"`from (\S+) import (\w+Config)", cells["import"]).groups()
    fields = getattr(importlib.import_module(module), config).__dataclass_fields__
    named = re.findall(r"`(\w+)` `", cells["arguments that matter, with defaults"])
    assert named[0] == "learning_rate"
    assert len(named) >= 3
    assert set(named) <= set(fields)
    script = ast.get_docstring(ast.parse((ROOT / "annotated_examples" / f"{name}.py").read_text("utf-8")))
    told = html.unescape("".join(re.findall(r"<code>(.+?)</code>", cells["loss"])))
    assert "loss = " in told
    assert re.sub(r"\s", "", told) in re.sub(r"\s", "", script)


def test_the_three_statements_that_do_not_hold():
    from trl import GRPOConfig, RLOOConfig

    stable = [name for name in TRAINERS if "experimental" not in quick_reference.facts(name)["Import"]]
    assert len(stable) == 6
    assert GRPOConfig.__dataclass_fields__["beta"].default == 0
    assert RLOOConfig.__dataclass_fields__["beta"].default > 0
    assert "reference" in quick_reference.facts("kto")["Models in memory"]
    one = {name for name in TRAINERS if "reference" not in quick_reference.facts(name)["Models in memory"]}
    assert one - {"gkd"} == {"sft", "orpo", "cpo", "reward", "prm"}
    gone = [
        name for name in TRAINERS if "\n## After TRL" in (ROOT / f"annotated_trainers/{name}.md").read_text("utf-8")
    ]
    assert len(gone) == 5
    assert not set(gone) & set(stable)


def test_the_start_of_all_methods_is_the_figure_that_the_page_names():
    before = {
        round(sum(row["before"]) / len(row["before"]), 3)
        for row in map(quick_reference.measured, quick_reference.names())
        if row["figure"] == "right answers"
    }
    (named,) = re.findall(r"right in ([\d.]+) of its answers", TEXT)
    assert before == {float(named)}


def test_what_a_gpu_gave_says_so_where_nobody_has_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(quick_reference.gpu, "MEASURED", tmp_path)
    assert quick_reference.on_a_gpu("dpo") == "not measured"
