"""reference_guides/troubleshooting.md: every command shows its symptom, and its remedy removes it.

All commands run in this one process, shortened where they train. The same checks are made of the committed measurement,
which the page quotes. tools/troubleshooting.py has the code of the entries.
"""

import json
import math
import os
import re
import sys
from dataclasses import MISSING
from statistics import mean

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import formats
import pytest
import troubleshooting as tool
from drift import slug
from markdown_pages import GUIDES, fences
from troubleshooting import ENTRIES, RESULT

PAGE = GUIDES / "troubleshooting.md"
TEXT = PAGE.read_text("utf-8")
MEASURED = tool.measured()
LOG_2 = pytest.approx(math.log(2), abs=1e-4)

CHECKS = {}  # entry -> (what must hold of the symptom and of the remedy, how the command is shortened)


def shows(name: str, **shorter):
    def register(check):
        CHECKS[name] = check, shorter
        return check

    return register


LINES = {}  # entry -> what its committed curves must show


def curves(name: str):
    def register(check):
        LINES[name] = check
        return check

    return register


def stops_with(name: str, error: str, **expected) -> None:
    """An entry whose symptom is an error, and whose remedy trains (or gives `expected`)."""

    def check(wrong, right):
        assert error in wrong["error"], wrong
        for label, value in (expected or {"steps_trained": 1}).items():
            assert right[label.replace("_", " ")] == value, right

    shows(name)(check)


stops_with("no_requests", "ModuleNotFoundError: No module named 'requests'", imported=True)
stops_with("old_snippet", "DPOTrainer.__init__() got an unexpected keyword argument 'beta'")
stops_with("bf16_without_gpu", "ValueError: Your setup doesn't support bf16/gpu", bf16=False)
stops_with("wrong_format", "KeyError: 'chosen'")
stops_with("which_trainer", "KeyError: 'completion'")
stops_with("all_too_long", "ValueError: num_samples should be a positive integer value, but got num_samples=0")
stops_with(
    "gkd_vocabulary", "ValueError: The student model has vocab_size 261 but the teacher model has vocab_size 300"
)
stops_with("truth_taken_away", "missing 1 required positional argument: 'answer'")
stops_with("kto_batch_of_one", "ValueError: Actual (not effective) batch size must be > 1. KTO will not work properly")


@shows("import_gone")
def _(wrong, right):
    assert wrong["error"] == "ImportError: cannot import name 'PPOTrainer' from 'trl'"
    assert (wrong["of the fifteen, importable"], right["of the fifteen, importable"]) == (6, 15)


@shows("renamed_argument")
def _(wrong, right):
    assert wrong["error"] == "TypeError: SFTTrainer.__init__() got an unexpected keyword argument 'tokenizer'"
    assert wrong["and then"] == "TypeError: SFTConfig.__init__() got an unexpected keyword argument 'max_seq_length'"
    assert right["steps trained"] == 1


@shows("repeated_prompt")
def _(wrong, right):
    assert (wrong["times the question is in a row"], right["times the question is in a row"]) == (2, 1)
    assert wrong["tokens of the answer"] > right["tokens of the answer"]


@shows("implicit_prompt")
def _(wrong, right):
    assert right["taken for the prompt"] == "2+5+8"
    assert wrong["taken for the prompt"].startswith("2+5+8 2+5=7")
    assert wrong["tokens of the answer"] < right["tokens of the answer"] / 2


@shows("prompt_boundary")
def _(wrong, right):
    assert wrong == {"warned": True, "learned": "6 #16<|end|>"}  # the 1 is lost
    assert right == {"warned": False, "learned": "=16 #16<|end|>"}


@shows("double_bos")
def _(wrong, right):
    assert (wrong["BOS tokens"], right["BOS tokens"]) == (2, 1)


@shows("no_generation_tags")
def _(wrong, right):
    assert wrong["error"].startswith("ValueError: The chat template is not training-compatible")
    assert right["learned"].endswith("#21<|end|>")


@shows("completion_only")
def _(wrong, right):
    assert wrong["of them question"] == wrong["tokens learned"] - right["tokens learned"] > 0
    assert right["of them question"] == 0


@shows("cut_before_the_difference", steps=3)
def _(wrong, right):
    assert wrong["loss, last step"] == LOG_2 and wrong["grad_norm, last step"] < 1e-4
    assert right["loss, last step"] < 0.692 and right["grad_norm, last step"] > 0.1


@curves("cut_before_the_difference")
def _(loss):
    assert all(value == LOG_2 for value in loss["wrong"]) and loss["right"][-1] < 0.6 < loss["right"][0] == LOG_2


@shows("pad_is_eos", steps=8)
def _(wrong, right):
    assert wrong["end tokens learned in a batch"] == 0 < right["end tokens learned in a batch"]
    assert wrong["the same with TRL's own collator"] == right["end tokens learned in a batch"]
    assert wrong["answers that end, before"] < 0.2 and wrong["answers that end, after"] < 0.2
    assert right["answers that end, after"] > 0.6


@curves("pad_is_eos")
def _(ends):
    assert max(ends["wrong"]) < 0.2 and ends["right"][-1] > 0.9


@shows("learning_rate", steps=6)
def _(wrong, right):
    assert wrong["loss, last step"] > 1 > 10 * right["loss, last step"]
    assert wrong["right answers"] < 0.1 < right["right answers, before"] <= right["right answers"]


@curves("learning_rate")
def _(loss):
    assert max(loss["wrong"]) > 5 * loss["wrong"][0] and loss["wrong"][-1] > 1 and max(loss["right"]) < 1


@shows("weights_do_not_move", steps=4)
def _(wrong, right):
    assert wrong["weights that a step changes"] < 0.05 and right["weights that a step changes"] > 0.99
    change = "loss, change over the run"
    assert right[change] < -1e-4 and right[change] < 20 * wrong[change]


@curves("weights_do_not_move")
def _(loss):
    assert all(right < 20 * wrong < 0 for wrong, right in zip(loss["wrong"], loss["right"], strict=True))


@shows("gradient_accumulation", names=("dpo", "kto", "orpo", "prm"), steps=2)
def _(wrong, right):
    names = [label.split(":")[0] for label in wrong if label.endswith("off by")]
    off = {name: wrong[f"{name}: gradient is off by"] for name in names}
    for name in names:
        apart = abs(wrong[f"{name}: loss"] - right[f"{name}: loss"])
        if name in ("SFT", "Reward", "DPO", "GKD"):
            assert off[name] == 0 and apart < 1e-4, name
        else:
            assert off[name] > 0.02 and apart > 0.01, name
    assert off["PRM"] == pytest.approx(3, abs=0.01)  # four times the gradient
    assert wrong["PRM: loss"] == pytest.approx(4 * right["PRM: loss"], rel=1e-3)


@curves("gradient_accumulation")
def _(prm, dpo):
    assert prm["wrong"] == pytest.approx([4 * loss for loss in prm["right"]], rel=1e-2)
    assert dpo["wrong"] == pytest.approx(dpo["right"], abs=1e-3)


@shows("out_of_memory")
def _(wrong, right):
    assert wrong["largest tensor kept, MB"] == pytest.approx(wrong["16 rows * tokens * vocabulary * 4, MB"])
    assert right["largest tensor kept, MB"] < wrong["largest tensor kept, MB"] / 10


@shows("grpo_loss_zero", steps=2)
def _(wrong, right):
    for side in (wrong, right):
        assert side["largest |loss|"] < 1e-5 and side["grad_norm"] > 0.01 and side["reward"] > 0.4


@curves("grpo_loss_zero")
def _(run):
    loss, reward = run["wrong"], run["right"]
    assert max(map(abs, loss)) < 1e-5 and mean(reward[-6:]) > mean(reward[:6])


@shows("clip_ratio_zero", steps=2)
def _(wrong, right):
    assert wrong["largest clip_ratio/region_mean"] == 0 < right["largest clip_ratio/region_mean"]


@curves("clip_ratio_zero")
def _(ratio):
    assert not any(ratio["wrong"]) and not any(ratio["right"][::2]) and any(ratio["right"][1::2])


@shows("grpo_loss_rises", steps=3)
def _(wrong, right):
    assert abs(wrong["loss, first step"]) < 1e-5 < 1e-4 < wrong["loss, last step"]
    assert wrong["loss, last step"] == pytest.approx(wrong["beta * kl, last step"], rel=0.5)
    assert abs(right["loss, last step"]) < 1e-5


@curves("grpo_loss_rises")
def _(loss):
    assert abs(loss["wrong"][0]) < 1e-5 and mean(loss["wrong"][-4:]) > 3 * mean(loss["wrong"][:8]) > 0
    assert max(map(abs, loss["right"])) < 1e-5


@shows("no_variance", steps=2)
def _(wrong, right):
    assert wrong["reward, mean"] == 1 and wrong["frac_reward_zero_std, mean"] == 1 and wrong["largest grad_norm"] == 0
    assert wrong["right answers, after"] == wrong["right answers, before"]
    assert right["frac_reward_zero_std, mean"] < 1 and right["largest grad_norm"] > 0.01


@curves("no_variance")
def _(norm):
    assert not any(norm["wrong"]) and min(norm["right"]) > 0.01
    then = MEASURED["no_variance"]["right"]
    assert then["right answers, after"] > then["right answers, before"] + 0.1


@shows("answers_cut", steps=2)
def _(wrong, right):
    assert wrong["completions/clipped_ratio, mean"] == 1 == wrong["frac_reward_zero_std, mean"]
    assert wrong["completions/mean_length, mean"] == 16 and wrong["reward, mean"] == 0
    assert right["completions/clipped_ratio, mean"] < 0.2 and right["reward, mean"] > 0.3


@curves("answers_cut")
def _(reward):
    assert not any(reward["wrong"]) and mean(reward["right"][-4:]) > mean(reward["right"][:4]) + 0.1


@shows("wrong_end_token")
def _(wrong, right):
    assert wrong == {"completions/clipped_ratio": 1, "completions/mean_length": 48}
    assert right["completions/clipped_ratio"] < 0.2 and right["completions/mean_length"] < 40


@shows("generation_batch_size")
def _(wrong, right):
    assert wrong["error"] == "ValueError: generation_batch_size (4) must be divisible by num_generations (8)."
    assert right["generation_batch_size"] % right["num_generations"] == 0


@shows("fewer_prompts_than_a_round")
def _(wrong, right):
    assert (wrong["steps trained"], right["steps trained"]) == (0, 1)


@shows("equal_rewards")
def _(wrong, right):
    assert wrong["grad_norm"] > 0.001 and wrong["frac_reward_zero_std"] == 0
    assert right["grad_norm"] == 0 and right["frac_reward_zero_std"] == 1


@shows("dpo_first_step", steps=4)
def _(first, last):
    assert first == {"loss": LOG_2, "rewards/accuracies": 0, "rewards/chosen": 0, "rewards/margins": 0}
    assert last["loss"] < 0.69 and last["rewards/accuracies"] > 0.5 and last["rewards/margins"] > 0


@curves("dpo_first_step")
def _(run):
    loss, accuracy = run["wrong"], run["right"]
    assert loss[0] == LOG_2 and loss[-1] < 0.68 and accuracy[0] == 0 and min(accuracy[1:]) > 0.8


@shows("accuracy_zero_or_one", steps=8)
def _(wrong, right):
    assert wrong["of them between 0 and 1"] == 0 < right["of them between 0 and 1"]
    assert right["pairs of a log line"] > wrong["pairs of a log line"] == 1 and wrong["lines"] == right["lines"]


@curves("accuracy_zero_or_one")
def _(accuracy):
    assert set(accuracy["wrong"]) == {0.0, 1.0} < set(accuracy["right"])


@shows("chosen_falls", steps=16)
def _(wrong, right):
    assert wrong["rewards/chosen"] < 0 < right["rewards/chosen"]
    assert min(wrong["rewards/margins"], right["rewards/margins"]) > 0.2
    assert min(wrong["rewards/accuracies"], right["rewards/accuracies"]) > 0.7
    assert wrong["logps/chosen"] < wrong["logps/chosen, first step"] - 0.5
    assert right["logps/chosen"] > wrong["logps/chosen"] + 0.5


@curves("chosen_falls")
def _(reward):
    assert mean(reward["wrong"][-5:]) < -0.2 < 0 < mean(reward["right"][-5:])


@shows("dpo_loss_zero", steps=6)
def _(wrong, right):
    assert wrong["loss"] < 0.01 and wrong["rewards/accuracies"] == 1 and wrong["rewards/margins"] > 5
    assert right["loss"] > 0.4
    assert wrong["right answers, before"] == right["right answers, before"]
    assert wrong["right answers, after"] < right["right answers, after"] - 0.05


@curves("dpo_loss_zero")
def _(loss):
    assert max(loss["wrong"][5:]) < 1e-3 and min(loss["right"]) > 0.5


@shows("stale_reference")
def _(wrong, right):
    assert wrong["loss"] != LOG_2 and wrong["rewards/chosen"] != 0
    assert right == {"loss": LOG_2, "rewards/chosen": 0}


@shows("reference_with_peft")
def _(wrong, right):
    assert wrong["parameters in memory"] > 1.9 * right["parameters in memory"]
    assert wrong["trained"] == right["trained"] and wrong["loss, first step"] == right["loss, first step"] == LOG_2


@shows("sum_or_mean")
def _(wrong, right):
    assert wrong["rewards/accuracies"] == 0 and wrong["rewards/margins"] < -5
    assert abs(right["rewards/margins"]) < 0.1


@shows("labels_not_boolean")
def _(wrong, right):
    assert wrong == {"loss": 0, "grad_norm": 0}
    assert right["loss"] == LOG_2 and right["grad_norm"] > 0.1


@shows("lora_without_task_type")
def _(wrong, right):
    assert (wrong["the head is trained"], right["the head is trained"]) == (False, True)


@shows("ppo_reward_function")
def _(wrong, right):
    assert wrong["error"] == "AttributeError: 'function' object has no attribute 'modules'"
    assert wrong["and then"].startswith("AttributeError: 'NoneType' object has no attribute")
    assert right["rounds trained"] == 1


@shows("ppo_first_kl")
def _(wrong, right):
    assert abs(wrong["objective/kl, first round"]) > 0.1 and abs(right["objective/kl, first round"]) < 1e-3


@shows("ppo_negative_kl", steps=3)
def _(wrong, right):
    assert wrong["below 0"] > right["below 0"] and wrong["smallest"] < 0 and wrong["smallest"] < right["smallest"]


@curves("ppo_negative_kl")
def _(kl):
    for side in ("wrong", "right"):
        entry = MEASURED["ppo_negative_kl"][side]
        assert entry["below 0"] == sum(value < 0 for value in kl[side]) and entry["smallest"] == min(kl[side])


@shows("ppo_random_reward", steps=1)
def _(wrong, right):
    assert 0.2 < wrong["pairs in the right order"] < 0.8 and right["pairs in the right order"] > 0.95
    assert right["after"] >= wrong["after"]


@curves("ppo_random_reward")
def _(solved):
    before = MEASURED["ppo_random_reward"]["right"]["right answers, before PPO"]
    assert solved["step"][0] == 0 and solved["wrong"][0] == solved["right"][0] == before
    assert max(solved["wrong"]) <= before < before + 0.1 < solved["right"][-1]


# ------------------------------------------------------------------------------ the commands


@pytest.fixture
def no_collections(monkeypatch):
    """PPO collects garbage several times a round, which takes a second in a process with many objects."""
    from types import SimpleNamespace

    from trl.experimental.ppo import ppo_trainer

    monkeypatch.setattr(ppo_trainer, "gc", SimpleNamespace(collect=lambda: None))


def test_every_entry_has_a_check():
    assert set(CHECKS) == set(ENTRIES)


@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize("name", ENTRIES)
def test_the_symptom_shows_and_the_remedy_removes_it(name):
    check, shorter = CHECKS[name]
    with formats.quiet():
        found = ENTRIES[name].run(**shorter)
    check(found["wrong"], found["right"])
    then = MEASURED[name]
    if name != "gradient_accumulation":  # which has a part of its trainers here
        assert [list(found[side]) for side in ("wrong", "right")] == [list(then[side]) for side in ("wrong", "right")]
    assert found["met"] == then["met"]
    assert found["cure"] == then["cure"] or name == "dpo_first_step"  # which names the last step


@pytest.mark.parametrize("name", ENTRIES)
def test_the_committed_numbers_show_it_too(name):
    CHECKS[name][0](MEASURED[name]["wrong"], MEASURED[name]["right"])


@pytest.mark.parametrize(
    "name", [name for name in ENTRIES if name != "grpo_loss_zero"]
)  # both of its sides are healthy
def test_a_check_notices_a_missing_symptom_and_a_useless_remedy(name):
    check, then = CHECKS[name][0], MEASURED[name]
    for side in ("wrong", "right"):
        with pytest.raises((AssertionError, KeyError)):
            check(then[side], then[side])


def test_what_the_page_quotes_is_made_from_the_measurement():
    reports = [tool.report(name, MEASURED[name]) for name in ENTRIES]
    assert "\n".join(reports) == RESULT.with_suffix(".txt").read_text("utf-8")
    assert json.loads(RESULT.read_text())["command"] == "python tools/troubleshooting.py --write"


def test_every_entry_with_curves_has_their_check_and_their_picture():
    drawn = {name for name, entry in MEASURED.items() if entry.get("curves")}
    assert drawn == set(LINES) == {path.stem for path in tool.PICTURES.iterdir()}
    for name in drawn:
        assert tool.drawn_from(MEASURED[name]) in tool.picture(name).read_text("utf-8"), name


@pytest.mark.parametrize("name", LINES)
def test_the_curves_show_what_the_entry_says(name):
    LINES[name](*MEASURED[name]["curves"].values())


@pytest.mark.parametrize("name", [name for name in LINES if name not in ("grpo_loss_zero", "dpo_first_step")])
def test_a_check_of_curves_notices_two_equal_runs(name):
    for side in ("wrong", "right"):
        same = [
            values | dict.fromkeys(("wrong", "right"), values[side]) for values in MEASURED[name]["curves"].values()
        ]
        with pytest.raises(AssertionError):
            LINES[name](*same)


def test_a_picture_is_told_in_words():
    told = tool.told_in_words(tool.curve("loss", [0.5, 0.25], [1, 0], names=("before", "after"), of="round"))
    assert told == "loss by round: before from 0.5000 to 0.2500, after from 1.0000 to 0.0000"


def command(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["troubleshooting.py", *arguments])
    tool.main()
    return capsys.readouterr().out


def test_a_command_prints_what_the_page_shows(monkeypatch, capsys):
    for name in ("generation_batch_size", "prompt_boundary"):
        assert command(monkeypatch, capsys, name) == tool.report(name, MEASURED[name]) + "\n"


def test_the_list_names_every_entry(monkeypatch, capsys):
    lines = command(monkeypatch, capsys, "--list").splitlines()
    assert [line.split()[0] for line in lines] == list(ENTRIES)


def test_steps_shorten_those_that_train(monkeypatch, capsys):
    assert "step 1 of the same run" in command(monkeypatch, capsys, "dpo_first_step", "--steps", "1")


@pytest.mark.parametrize("arguments, complaint", [(("typo",), "no entry 'typo'"), ((), "give the name of an entry")])
def test_a_wrong_command_says_what_to_type(monkeypatch, capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        command(monkeypatch, capsys, *arguments)
    assert complaint in capsys.readouterr().err


# ------------------------------------------------------------------------------ the page


def sections() -> dict[str, str]:
    """Heading -> text of every entry."""
    parts = re.split(r"^### (.+)$", TEXT, flags=re.M)[1:]
    return {
        heading.replace("\\", ""): body.split("\n## ")[0] for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }


def test_the_page_has_the_entries_of_the_script_in_their_order():
    assert list(sections()) == [entry.symptom for entry in ENTRIES.values()]


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_has_cause_proof_remedy_and_its_threads(name):
    body = sections()[ENTRIES[name].symptom]
    places = [body.index(part) for part in ("**Cause.**", "**How to see it.**", f"py {name}\n", "**Remedy.**")]
    assert places == sorted(places)
    assert tool.report(name, MEASURED[name]) in body
    for number in ENTRIES[name].threads:
        assert f"[#{number}]({tool.TRL}{number})" in body


def test_every_command_of_the_page_is_one_that_is_run_here():
    shown = re.findall(r"^\$ python tools/troubleshooting\.py (\w+)$", TEXT, re.M)
    assert shown == list(ENTRIES) and len(shown) == sum(fence.lang == "text" for fence in fences(PAGE))


def test_every_question_that_users_asked_most_has_an_entry():
    asked = {
        *(6168, 2226, 3059, 2518, 1886, 2164, 4110, 1623, 931, 3091, 4879, 4147, 1400, 2703, 3452, 3120, 5697, 6263),
        *(3061, 1677, 1868, 3187, 789, 5889, 1236, 2371, 1365, 640, 2554, 1911, 1387, 3093, 2363, 2357, 615, 1098),
        *(2813, 2972, 1106, 1539, 2604, 2175, 2215, 3028, 2015, 106),
    }
    assert asked == {number for entry in ENTRIES.values() for number in entry.threads}


def test_headings_are_shown_as_they_are_typed():
    """A `__` that is not escaped would make a word bold, and lose the underscores in its anchor too."""
    from markdown_pages import tokens

    found, inside = [], False
    for token in tokens(TEXT):
        if token.type == "inline" and inside:
            found.append("".join(child.content for child in token.children))
            assert {child.type for child in token.children} <= {"text", "text_special"}
        inside = token.type == "heading_open" and token.tag == "h3"
    assert found == [entry.symptom for entry in ENTRIES.values()]


def test_the_index_leads_to_every_entry():
    table = TEXT.split("\n| symptom | trainers |\n")[1].split("\n\n")[0]
    assert re.findall(r"^\| \[.+?\]\(#(\S+)\) \|", table, re.M) == [slug(e.symptom) for e in ENTRIES.values()]
    by_trainer = TEXT.split("\n| trainer | entries |\n")[1].split("\n\n")[0]
    assert set(re.findall(r"\[`(\w+)`\]", by_trainer)) == set(ENTRIES)
    assert all(f"({name}.md" in by_trainer.replace("../annotated_trainers/", "(") or name for name in tool.TRAINERS)


def test_links_within_the_repository_lead_to_headings_that_exist():
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        path = (PAGE.parent / file).resolve() if file else PAGE
        if not path.exists():
            broken.append(target)
        elif heading:
            headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.M)
            if heading not in {slug(re.sub(r"[`*$\\]", "", text)) for text in headings}:
                broken.append(target)
    assert broken == []


# ------------------------------------------------------------------------------ what the page says beside the numbers


def default(name: str, field: str):
    found = formats.classes(name)[0].__dataclass_fields__[field]
    return found.default if found.default is not MISSING else found.default_factory()


def test_the_defaults_that_the_page_names():
    assert "2e-5 for SFT, 1e-6 for DPO and GRPO" in TEXT
    assert [default(name, "learning_rate") for name in ("sft", "dpo", "grpo")] == [2e-5, 1e-6, 1e-6]
    assert "the default is 1024 tokens" in TEXT and default("dpo", "max_length") == 1024
    assert default("grpo", "remove_unused_columns") is False and default("grpo", "beta") == 0.0
    assert "default, 512 tokens" in TEXT and default("grpo", "max_completion_length") == 512
    assert tool.config("sft").loss_type == "chunked_nll"


def test_an_empty_data_set_ends_in_a_bare_stop_iteration_and_too_long_rows_of_sft_in_the_other_error():
    with formats.quiet():
        assert tool.fails(lambda: tool.trainer("dpo", [])) == "StopIteration"
        made = tool.trainer("sft", tool.rows("prompt_completion", 4), max_length=8)
        assert "num_samples=0" in tool.fails(made.train)


def test_one_row_at_a_time_is_possible_without_a_level():
    settings = {"per_device_train_batch_size": 1, "loss_type": "apo_zero_unpaired"}
    with formats.quiet():
        assert len(tool.trained(tool.trainer("kto", tool.rows("unpaired_preference", 4), **settings))) == 1


def test_kto_takes_a_label_of_minus_1_for_good():
    def trained(label):
        rows, model = [row | {"label": label} for row in tool.rows("unpaired_preference", 4)], tool.toy()
        with formats.quiet():
            (line,) = tool.trained(tool.trainer("kto", rows, model, learning_rate=1e-3))
        return model.lm_head.weight.detach().clone(), "rewards/rejected" in line

    good, bad, number = trained(True), trained(False), trained(-1)
    assert number[0].equal(good[0]) and not number[0].equal(bad[0])
    assert (good[1], number[1]) == (False, True)  # and the log calls it rejected


def test_numbers_become_labels_by_the_line_of_the_page():
    from datasets import Dataset, Value, disable_progress_bars

    disable_progress_bars()
    dataset = Dataset.from_list([{"label": 1}, {"label": 0}, {"label": -1}])
    (line,) = re.findall(r"`(dataset\.map\(lambda row: .+?)`", TEXT)
    without_cast, with_cast = (
        eval(code, {"dataset": dataset, "Value": Value}) for code in (line.split(".cast")[0], line)
    )
    assert [str(label) for label in without_cast["label"]] == ["1", "0", "0"]
    assert [str(label) for label in with_cast["label"]] == ["True", "False", "False"]
