"""reference_guides/versions.md and tools/releases.py: what was read from the wheels, what was decided, what is printed."""

import contextlib
import importlib
import inspect
import io
import json
import os
import re
from dataclasses import MISSING, fields
from itertools import pairwise

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")

import drift
import pytest
import releases
from markdown_pages import GUIDES, ROOT
from releases import TRAINERS, Release, arguments, at, check, gone, load, move, order, short, takes, where
from tables import quick_facts
from trl_source import Source, SourceError, newest_version, pinned_version

PAGE = GUIDES / "versions.md"
COG = re.compile(r"<!-- \[\[\[cog (.+?) \]\]\] -->\n(.*?)<!-- \[\[\[end\]\]\] -->", re.S)
CLASSES = [name for name, _ in releases.classes()]
PINNED, NEWEST = pinned_version(), newest_version()
each_trainer = pytest.mark.parametrize("trainer", TRAINERS)


def walkthrough(trainer):
    return (ROOT / "annotated_trainers" / f"{TRAINERS[trainer]}.md").read_text("utf-8")


def prose():
    """The page without what is generated, white space folded."""
    return " ".join(COG.sub("", PAGE.read_text("utf-8")).split())


# ------------------------------------------------------------------------------------------------------------ the JSON


def test_one_release_of_each_minor_version_was_read_and_none_is_left_out():
    versions = releases.releases()
    assert versions == sorted(versions, key=order)
    assert {PINNED, NEWEST} <= set(versions), "run `python tools/releases.py read`, then `make sync`"
    minors = [tuple(order(v)[:2]) for v in versions]
    assert minors[0] == (0, 8) and minors[-1] == tuple(order(NEWEST)[:2])
    for (major, minor), following in pairwise(minors):
        assert following in {(major, minor + 1), (major + 1, 0)}
    assert minors[minors.index((1, 0)) - 1] == (0, 29)  # the last before 1.0


def histories():
    for name in CLASSES:
        found = load()["classes"][name]
        for key in ("imports", "training_arguments", "old_names"):
            yield name, key, found[key]
        for argument, past in found["arguments"].items():
            yield name, argument, past


def test_each_history_begins_with_the_first_release_and_holds_changes_only():
    assert set(load()) == {"command", "releases", "of_transformers", "classes"}
    assert list(load()["classes"]) == CLASSES
    every = releases.releases()
    for name, what, past in histories():
        versions = [version for version, _ in past]
        assert versions[0] == every[0], (name, what)
        assert [v for v in every if v in versions] == versions, (name, what)
        assert all(before != after for (_, before), (_, after) in pairwise(past)), (name, what)


def test_a_class_has_arguments_exactly_where_it_can_be_imported():
    for name in CLASSES:
        for version in releases.releases():
            assert bool(where(name, version)) == bool(arguments(name, version)), (name, version)


def test_a_trainer_and_its_config_are_in_the_same_places():
    for trainer in TRAINERS:
        for version in releases.releases():
            places = [where(f"{trainer}{kind}", version) for kind in ("Trainer", "Config")]
            if places[1] or trainer not in ("SFT", "DPO"):  # which had no config at first
                places = [[place.replace("_trainer", "_config") for place in found] for found in places]
                assert places[0] == places[1], (trainer, version)


def test_the_file_is_written_as_the_tool_writes_it():
    assert releases.DATA.read_text("utf-8") == releases.written(load())


def is_what_is_read(source):
    now = releases.state(source)
    for name in CLASSES:
        kept = load()["classes"][name]
        for key in ("imports", "training_arguments", "old_names"):
            assert at(kept[key], source.version) == now[name][key], (name, key)
        assert arguments(name, source.version) == now[name]["arguments"], name
    assert load()["releases"][source.version] == Release(source.package).requires()


def test_the_pinned_release_is_what_is_read_from_it_now():
    is_what_is_read(Source.installed())


def test_the_newest_release_is_what_is_read_from_it_now():
    try:
        source = drift.obtain(NEWEST)
    except drift.Unavailable as error:
        pytest.skip(f"the newest TRL was not read: {error}")
    is_what_is_read(source)


@pytest.mark.parametrize("version", ["0.8", "0.12", "0.25"])  # the first, old names still taken, thin classes
def test_an_old_release_is_what_is_read_from_it_now(version):
    try:
        source = drift.obtain(releases.known(version))
    except drift.Unavailable as error:
        pytest.skip(f"TRL {version} was not read: {error}")
    is_what_is_read(source)


# ---------------------------------------------------------------------- the pinned release, imported: an independent reading


def imported(name):
    return getattr(importlib.import_module(where(name, PINNED)[0]), name)


def default_as_read(text):
    return eval(text) if text != releases.REQUIRED else MISSING


@each_trainer
def test_the_parameters_are_those_of_the_imported_trainer(trainer):
    signature = inspect.signature(imported(f"{trainer}Trainer").__init__).parameters
    true = {
        name: MISSING if p.default is p.empty else p.default
        for name, p in signature.items()
        if name != "self" and p.kind is not p.VAR_KEYWORD
    }
    read = {a: default_as_read(d) for a, d in arguments(f"{trainer}Trainer", PINNED).items() if not a.startswith("*")}
    assert read == true


@each_trainer
def test_the_fields_are_those_of_the_imported_config(trainer):
    from transformers import TrainingArguments

    parent = {field.name for field in fields(TrainingArguments)}
    true = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(imported(f"{trainer}Config"))
    }
    read = {argument: default_as_read(text) for argument, text in arguments(f"{trainer}Config", PINNED).items()}
    assert {name for name in true if name not in parent} == {name for name in read if name not in parent}
    assert {name: true[name] for name in read} == read
    assert issubclass(imported(f"{trainer}Config"), TrainingArguments)


@each_trainer
def test_the_top_level_exports_what_was_read(trainer):
    import trl

    for name in (f"{trainer}Trainer", f"{trainer}Config"):
        assert hasattr(trl, name) == ("trl" in where(name, PINNED))
        for place in where(name, PINNED):
            assert hasattr(importlib.import_module(place), name)


def test_the_arguments_of_transformers_are_those_of_the_installed_one():
    ours = {a for name in CLASSES if name.endswith("Config") for a in load()["classes"][name]["arguments"]}
    ours |= {new for _, _, new in pairs()}
    assert set(load()["of_transformers"]) == ours & releases.training_arguments()


# ------------------------------------------------------------------------------------- what was known before: walkthroughs

KNOWN = {  # first, `from trl` until, experimental since, gone in
    **{name: ("0.8", None, None, None) for name in ("SFT", "Reward", "DPO")},
    "KTO": ("0.8", None, "0.26", None),
    "GRPO": ("0.14", None, None, None),
    "RLOO": ("0.9", None, None, None),
    "ORPO": ("0.8", "0.28", "0.26", None),
    "CPO": ("0.8", "0.28", "0.26", None),
    "OnlineDPO": ("0.10", "0.28", "0.26", None),
    "GKD": ("0.11", "0.28", "0.26", None),
    "BCO": ("0.10", "0.28", "0.25", "1.14"),
    "PPO": ("0.8", "0.28", "0.26", "1.13"),
    "NashMD": ("0.11", "0.28", "0.26", "1.14"),
    "XPO": ("0.11", "0.28", "0.26", "1.14"),
    "PRM": ("0.13", "0.28", "0.26", "1.14"),
}


@each_trainer
def test_the_row_of_a_trainer_is_what_was_known(trainer):
    first, until, experimental, gone_in = KNOWN[trainer]
    cells = releases.row(trainer)
    assert cells[0].split(" ")[0] == first
    assert cells[1:4] == [until or "still", experimental or "-", gone_in or "-"]


@each_trainer
def test_the_walkthrough_imports_from_where_the_release_has_it(trainer):
    line = quick_facts(walkthrough(trainer))["Import"]
    assert line.startswith(f"`from {where(f'{trainer}Trainer', PINNED)[0]} import ")


@each_trainer
def test_what_the_walkthrough_calls_gone_is_gone_and_was_there(trainer):
    text = walkthrough(trainer).split("\n### Older code and tutorials\n", 1)[1].split("\n## ")[0].split("\n### ")[0]
    names = [f"{trainer}Trainer", f"{trainer}Config"]
    ever = {a for name in names for a in load()["classes"][name]["arguments"]}
    lost = {a for name in names for _, a, _ in gone(name)}
    for paragraph in re.findall(r"([^.;:]*)\b(?:are|is) gone\b", text):
        for name in set(re.findall(r"`(\w+)=?`", paragraph)) & ever:
            assert name in lost, name
            assert not any(takes(n, name, PINNED) for n in names if n.endswith("Config")), name


def test_the_pairs_of_rloo_are_those_of_its_walkthrough():
    rows = re.findall(r"^\| `(\w+)`(?:, [^|]*)? \| `(\w+)`", walkthrough("RLOO"), re.M)
    told = {old: new for old, new in rows if old in load()["classes"]["RLOOConfig"]["arguments"]}
    told.pop("reward_clip_range")  # the same name, another meaning
    assert len(told) == 8
    assert told.items() <= releases.RENAMED["RLOOConfig"].items()


@pytest.mark.parametrize(
    ("trainer", "pull"), [("BCO", 7136), ("PPO", 7020), ("NashMD", 7255), ("XPO", 7256), ("PRM", 7133)]
)
def test_the_removed_ones_are_told_as_their_walkthroughs_tell_it(trainer, pull):
    line = next(line for line in PAGE.read_text("utf-8").splitlines() if f"pull/{pull}" in line)
    _, name, last, *_ = [cell.strip() for cell in line.split("|")]
    assert f"[{trainer}]" in name
    there = [v for v in releases.releases() if where(f"{trainer}Trainer", v)]
    assert last == short(there[-1]) and there[-1] != NEWEST
    heading = f"After TRL {PINNED}"
    told = walkthrough(trainer).split(f"\n## {heading}\n")[1].split("\n## ")[0]
    assert f"pull/{pull})" in told
    assert f"{TRAINERS[trainer]}.md#{drift.slug(heading)})" in name
    words = " ".join(told.split())
    for link in re.findall(r"issues/\d+", line):
        assert link in words
    removed = {t for t in TRAINERS if not where(f"{t}Trainer", NEWEST)}
    assert removed == {"BCO", "PPO", "NashMD", "XPO", "PRM"}


def test_every_link_to_a_thread_stands_in_a_walkthrough_too():
    known = "".join(path.read_text("utf-8") for path in (ROOT / "annotated_trainers").glob("*.md"))
    threads = set(re.findall(r"huggingface/trl/(?:pull|issues)/\d+", PAGE.read_text("utf-8")))
    assert len(threads) > 8
    assert {thread for thread in threads if thread + ")" not in known} == set()


# -------------------------------------------------------------------------------------------------- what a person decided


def pairs():
    return [(name, old, new) for name, found in releases.RENAMED.items() for old, new in found.items()]


@pytest.mark.parametrize(("name", "old", "new"), pairs())
def test_the_release_that_lost_the_old_name_has_the_new_one(name, old, new):
    lost = [version for version, argument, _ in gone(name) if argument == old]
    assert len(lost) == 1
    assert takes(name, new, lost[0])
    assert not takes(name, old, lost[0])
    first = next(v for v, value in load()["classes"][name]["arguments"][old] if value is not None)
    assert not takes(name, new, first) or releases.from_transformers(name, new, first)  # it came later
    accepted = [names[old] for _, names in load()["classes"][name]["old_names"] if old in names]
    assert accepted in ([], [new], [new, new])  # TRL's own word for it, where it has one


def test_every_name_that_a_trainer_still_took_is_among_the_pairs():
    for name in CLASSES:
        for _, accepted in load()["classes"][name]["old_names"]:
            assert accepted.items() <= releases.RENAMED.get(name, {}).items(), name


def test_what_is_named_instead_is_for_arguments_that_are_gone():
    for name, argument in releases.INSTEAD:
        assert argument in {a for _, a, _ in gone(name)}
        assert argument not in releases.RENAMED.get(name, {})
    for kind, names in {
        "Config": ("prompt_sample_size", "min_density_ratio", "max_density_ratio"),
        "Trainer": ("embedding_func", "embedding_tokenizer"),
    }.items():
        version = next(v for v, a, _ in gone(f"KTO{kind}") if a == names[0])
        assert set(names) <= set(arguments(f"BCO{kind}", version))
    assert {"loss_type", "loss_weights"} <= set(arguments("DPOConfig", PINNED))


def test_the_classes_that_were_written_anew_share_little_with_their_namesakes():
    for name, release in releases.ANEW.items():
        now = releases.known(release)
        old, new = (set(arguments(name, v)) for v in (releases.before(now), now))
        if name.endswith("Config"):
            assert len(old & new) < len(old | new) / 2
        else:
            assert {"train_dataset", "model"} & new - old
    before = releases.before(releases.known(releases.ANEW["PPOTrainer"]))
    assert set(arguments("PPOv2Trainer", before)) - {"tokenizer"} <= set(
        arguments("PPOTrainer", releases.known(releases.ANEW["PPOTrainer"]))
    )


def test_each_default_that_changed_is_explained_or_left_out_for_a_reason():
    rows = releases.effects()
    needed = {(argument, short(version)) for version, argument, _, _ in rows if argument != "learning_rate"}
    assert needed == set(releases.EFFECT)
    changed = {
        (argument, short(version))
        for name in (f"{trainer}Config" for trainer in TRAINERS)
        for version, argument, _, _ in releases.changed_defaults(name)
        if releases.ANEW.get(name) != short(version)
    }
    assert set(releases.WITHOUT_EFFECT) == changed - needed - {(a, v) for a, v in changed if a == "learning_rate"}


def test_the_defaults_of_transformers_that_the_page_counts_with():
    from transformers import TrainingArguments

    found = {field.name: field.default for field in fields(TrainingArguments)}
    assert found["learning_rate"] == releases.LEARNING_RATE
    assert (found["gradient_accumulation_steps"], found["per_device_train_batch_size"]) == (1, 8)
    assert found["logging_steps"] == 500
    assert found["neftune_noise_alpha"] is None


@pytest.mark.parametrize(
    ("name", "argument", "release", "was", "now"),
    [
        ("DPOConfig", "learning_rate", "0.12", releases.OWN, "1e-06"),
        ("KTOConfig", "max_length", "0.14", "None", "1024"),
        ("GRPOConfig", "beta", "0.19", "0.04", "0.0"),
        ("GRPOConfig", "loss_type", "0.22", "'bnpo'", "'dapo'"),
        ("SFTConfig", "gradient_checkpointing", "0.22", releases.OWN, "True"),
        ("GRPOConfig", "max_completion_length", "1.10", "256", "512"),
    ],
)
def test_a_default_that_changed_is_found(name, argument, release, was, now):
    assert (releases.known(release), argument, was, now) in releases.changed_defaults(name)


# ------------------------------------------------------------------------------------------------------- what the page says


def test_every_table_of_the_page_is_what_the_tool_prints_now():
    blocks = COG.findall(PAGE.read_text("utf-8"))
    calls = [code.removeprefix("import releases; ") for code, _ in blocks]
    assert calls[:4] == [f"releases.{name}()" for name in ("counted", "trainers", "requirements", "tokenizers")]
    both = [f'releases.removed("{trainer}"); releases.added("{trainer}")' for trainer in TRAINERS]
    assert [call for call in calls if "removed" in call] == both
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code)
        assert shown == printed.getvalue(), f"{code}: run `make sync`"


def test_what_the_page_says_of_releases_holds():
    def had(name, argument):
        return [short(v) for v in releases.releases() if argument in arguments(name, v)]

    text = prose()
    assert "`SFTConfig` has `max_length` since 0.16 and lost `max_seq_length` in 0.20" in text
    assert had("SFTConfig", "max_length")[0] == "0.16" and had("SFTConfig", "max_seq_length")[-1] == "0.19"
    assert "`SFTConfig` and `DPOConfig` came in 0.9" in text
    assert had("SFTConfig", "packing")[0] == had("DPOConfig", "beta")[0] == "0.9"
    assert "both trainers lost them in 0.13" in text
    for name, argument in (("SFTTrainer", "packing"), ("SFTTrainer", "dataset_text_field"), ("DPOTrainer", "beta")):
        assert had(name, argument)[-1] == "0.12"
    assert "Only 0.12 names an upper end for transformers" in text
    assert [short(v) for v, asked in load()["releases"].items() if "<" in asked["transformers"]] == ["0.12"]
    assert "From 0.25 or 0.26 to 0.28 both imports work" in text
    both = {}
    for trainer in TRAINERS:
        if KNOWN[trainer][1]:
            both[trainer] = [short(v) for v in releases.releases() if len(where(f"{trainer}Trainer", v)) == 2]
    assert {found[-1] for found in both.values()} == {"0.28"} and {found[0] for found in both.values()} == {
        "0.25",
        "0.26",
    }
    assert "`from trl import KTOTrainer` worked all the time" in text
    assert all("trl" in where("KTOTrainer", v) for v in releases.releases())
    assert "trl.experimental.kto" in where("KTOTrainer", NEWEST)
    assert "For three minor releases most old names still worked" in text
    assert had("RLOOConfig", "rloo_k")[had("RLOOConfig", "rloo_k").index("0.22") :] == ["0.22", "0.23", "0.24"]
    assert "`GKDConfig` is an `SFTConfig`" in text
    assert issubclass(imported("GKDConfig"), imported("SFTConfig"))
    assert "ORPO, CPO, Online DPO and GKD are experimental" in text
    left = [t for t in TRAINERS if where(f"{t}Trainer", NEWEST)]
    assert len(left) == 10
    assert [t for t in left if "trl" not in where(f"{t}Trainer", NEWEST)] == ["ORPO", "CPO", "OnlineDPO", "GKD"]


def test_no_config_has_max_prompt_length_and_the_samplers_have_no_max_length():
    for trainer in TRAINERS:
        for version in (PINNED, NEWEST):
            assert "max_prompt_length" not in arguments(f"{trainer}Config", version)
    for name in ("GRPOConfig", "RLOOConfig"):
        assert not any("max_length" in arguments(name, v) for v in (PINNED, NEWEST))


# --------------------------------------------------------------------------------------------------------- check and move


def test_the_old_script_is_one_of_its_release_and_the_new_one_of_both():
    assert check(releases.OLD_SCRIPT, "0.9") == []
    assert len(check(releases.OLD_SCRIPT, PINNED)) == 7
    assert check(releases.NEW_SCRIPT, PINNED) == check(releases.NEW_SCRIPT, NEWEST) == []
    back = [message for _, message in check(releases.NEW_SCRIPT, "0.9")]
    assert "CPOTrainer: `from trl import CPOTrainer`" in back
    assert "`processing_class` of SFTTrainer: not yet there, it came in 0.12" in back


@each_trainer
def test_the_script_of_this_repository_passes_with_the_pinned_release(trainer):
    text = (ROOT / "annotated_examples" / f"{TRAINERS[trainer]}.py").read_text("utf-8")
    assert f"{trainer}Trainer(" in text
    assert check(text, PINNED) == []
    found = [message for _, message in check(text, NEWEST)]
    gone_in = KNOWN[trainer][3]
    assert bool(found) == bool(gone_in)
    assert not gone_in or f"{trainer}Trainer: not in {short(NEWEST)}" in " ".join(found)


@pytest.mark.parametrize(
    ("script", "version", "message"),
    [
        ("DPOTrainer(tokenizer=t)", "0.13", "still taken, with a warning; write `processing_class`"),
        ("DPOTrainer(tokenizer=t)", "0.16", "gone in 0.12; instead: `processing_class`"),
        ("DPOTrainer(beta=1)", "0.13", "gone in 0.13; instead: the same in `DPOConfig`"),
        ("SFTTrainer(max_seq_length=1)", "0.20", "and there: gone in 0.20; instead: `max_length`"),
        ("DPOConfig(use_num_logits_to_keep=1)", "0.29", "and then `use_logits_to_keep`: gone in 0.29"),
        ("DPOTrainer(nonsense=1)", "0.29", "in no release that was read"),
        ("trl.GRPOConfig(max_prompt_length=1)", "1.0", "gone in 0.28; instead: nothing"),
        ("from trl import PPOTrainer", "1.13", "PPOTrainer: not in 1.13.0, it was there until 1.12"),
        ("from trl import GRPOTrainer", "0.13", "GRPOTrainer: not in 0.13.0, it came later"),
        ("from trl.trainer.orpo_trainer import ORPOTrainer", "1.0", "`from trl.experimental.orpo import ORPOTrainer`"),
    ],
)
def test_what_a_release_does_not_know_is_named(script, version, message):
    ((line, said),) = check(script, version)
    assert line == 1 and message.replace(".0,", ",") in said


@pytest.mark.parametrize(
    "script",
    [
        "SFTConfig(learning_rate=1, max_length=2, warmup_ratio=3)",  # of transformers, of TRL, of some transformers
        "DPOTrainer(**settings)",
        "from trl.trainer.dpo_trainer import DPOTrainer",
        "from trl import ModelConfig, get_peft_config",
        "SomethingElse(tokenizer=1)",
    ],
)
def test_what_is_right_or_unknown_is_not_complained_of(script):
    assert check(script, "1.0") == []


def test_find_tells_the_life_of_an_argument(capsys):
    assert releases.main(["find", "max_seq_length"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "SFTTrainer: 0.8 `None`, 0.13 gone" in lines
    assert "SFTConfig: 0.9 `None`, 0.15 `1024`, 0.16 `None`, 0.20 gone" in lines
    assert [line.split(":")[0] for line in lines] == ["SFTTrainer", "SFTConfig", "GKDTrainer", "GKDConfig"]
    assert f"GRPOConfig: 0.14 `1`, 0.15 {releases.OWN}" in releases.find("per_device_train_batch_size")
    assert "GRPOTrainer: 0.14 required, 1.8 `None`" in releases.find("reward_funcs")
    assert releases.main(["find", "nonsense"]) == 0
    assert "no class here ever had" in capsys.readouterr().out


def test_what_came_later_is_there_now_or_went_again(capsys):
    for trainer in TRAINERS:
        releases.added(trainer)
        for line in capsys.readouterr().out.splitlines():
            if not (cells := re.fullmatch(r"\| ([\d.]+) \| `(\w+)` \| (.+) \|", line)):
                continue
            version, name, found = releases.known(cells[1]), cells[2], re.findall(r"`([\w*]+)`", cells[3])
            for argument in found:
                assert argument in arguments(name, version)
                assert not takes(name, argument, releases.before(version))


def test_move_leaves_out_what_came_and_went_in_between():
    lines = "\n".join(move("OnlineDPO", "0.11", NEWEST))
    assert "`reward_model` in 0.25; instead: `reward_funcs`" in lines
    assert "from trl import OnlineDPOTrainer` is now `from trl.experimental.online_dpo" in lines
    assert "gpu_memory_utilization" not in lines  # not there in 0.11
    assert "- `RLOOTrainer` was written anew in 0.22" in "\n".join(move("RLOO", "0.21", "0.22"))
    assert move("BCO", "0.11", NEWEST) == [f"- BCOTrainer: not in {short(NEWEST)}, it was there until 1.13"]
    assert move("SFT", "0.27", "0.28") == []


def test_the_command_says_what_is_wrong_and_how_it_went(tmp_path, capsys):
    script = tmp_path / "old.py"
    script.write_text(releases.OLD_SCRIPT, "utf-8")
    assert releases.main(["check", str(script), PINNED]) == 1
    printed = capsys.readouterr().out
    assert printed in PAGE.read_text("utf-8")
    assert releases.main(["check", str(script), "0.9"]) == 0
    assert releases.main(["move", "SFT", "0.27", "0.28"]) == 0
    assert capsys.readouterr().out == "nothing that was read from the classes\n"
    for wrong in (["check", str(script), "7.7"], ["move", "DPO", "1.0", "0.9"], ["check", str(tmp_path / "no"), "1.0"]):
        assert releases.main(wrong) == 2
    script.write_text("def (", "utf-8")
    assert releases.main(["check", str(script), "1.0"]) == 2
    assert "old.py cannot be read as Python" in capsys.readouterr().err


def test_read_writes_the_file_again(tmp_path, monkeypatch):
    """With an almost empty package in place of all: reading every wheel takes half a minute."""
    asked = []
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text("", "utf-8")
    (tmp_path / "trl-9.9.dist-info").mkdir()
    (tmp_path / "trl-9.9.dist-info" / "METADATA").write_text("Requires-Python: >=3.9\nRequires-Dist: transformers>=4\n")

    def obtain(version):
        asked.append(version)
        return Source(tmp_path / "trl", version)

    monkeypatch.setattr(drift, "obtain", obtain)
    monkeypatch.setattr(releases, "DATA", tmp_path / "releases.json")
    monkeypatch.setattr(releases, "load", lambda: {"releases": {"0.1.0": {}, "0.1.1": {}, PINNED: {}}})
    assert releases.main(["read", "--add", "9.9"]) == 0
    assert asked == list(dict.fromkeys(["0.1.1", PINNED, NEWEST, "9.9"]))
    kept = json.loads((tmp_path / "releases.json").read_text("utf-8"))
    assert kept["releases"]["9.9"] == {"python": ">=3.9", "transformers": ">=4"}
    assert kept["classes"]["DPOTrainer"]["imports"] == [["0.1.1", []]]


# ------------------------------------------------------------------------------------------------------------- the reader

PACKAGE = {
    "__init__.py": '_import_structure = {"trainer": ["XTrainer", "XConfig"]}\nif TYPE_CHECKING:\n    from .x import Hidden\n',
    "trainer/__init__.py": "",
    "trainer/x_trainer.py": """
from ..experimental.x import XTrainer as _XTrainer
class XTrainer(_XTrainer):
    @deprecate_kwarg("config", "0.1", "args")
    @deprecate_kwarg("old", new_name="new", version="0.1")
    def __init__(self, *args, extra=1, **kwargs): ...
""",
    "trainer/x_config.py": """
from transformers import TrainingArguments
from trl.trainer.base import Base
@dataclass
class XConfig(Base):
    a: int = 2
    b: list = field(default_factory=lambda: [0.1], metadata={"help": "b"})
    c: dict = field(default_factory=dict)
    d: str = field(metadata={})
    _hidden: int = 1
    shared: ClassVar[int] = 1
    plain = 3
""",
    "trainer/base.py": "from transformers import TrainingArguments\nclass Base(TrainingArguments):\n    a: int = 1\n    z: int = 5\n",
    "experimental/__init__.py": "",
    "experimental/x/__init__.py": "from .x_trainer import XTrainer\n",
    "experimental/x/x_trainer.py": "class XTrainer:\n    def __init__(self, model, args=None, *, new='y', **other): ...\n",
}


@pytest.fixture
def package(tmp_path):
    for name, text in PACKAGE.items():
        path = tmp_path / "trl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return Release(tmp_path / "trl")


def test_a_thin_class_has_the_parameters_of_the_one_that_it_stands_for(package):
    found = package.read("XTrainer", "x")
    assert found["imports"] == ["trl", "trl.experimental.x"]
    assert found["arguments"] == {"model": "", "args": "None", "new": "'y'", "**other": "", "extra": "1"}
    assert found["old_names"] == {"config": "args", "old": "new"}


def test_fields_are_read_with_those_of_the_base_and_their_defaults(package):
    found = package.read("XConfig", "x")
    assert found["imports"] == ["trl"] and found["training_arguments"]
    assert found["arguments"] == {"a": "2", "z": "5", "b": "[0.1]", "c": "dict()", "d": ""}


def test_a_class_that_is_defined_and_not_exported_is_found_in_its_module(package):
    (package.package / "__init__.py").write_text("from .nothing import Nothing\n", "utf-8")
    assert package.exported() == {"Nothing"}
    assert package.read("XConfig", "x")["imports"] == ["trl.trainer.x_config"]
    assert package.read("YConfig", "y") == {
        "imports": [],
        "arguments": {},
        "old_names": {},
        "training_arguments": False,
    }


def test_an_export_without_a_class_is_an_error(package):
    (package.package / "__init__.py").write_text('_import_structure = {"trainer": ["YConfig"]}\n', "utf-8")
    with pytest.raises(SourceError, match="exported from trl and not defined"):
        package.read("YConfig", "y")
