"""Every script in annotated_examples runs as its page says, learns, and says clearly what is wrong with bad input."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "annotated_examples"
TOY = EXAMPLES / "toy"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command as a user would, in `folder`, without a network."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(command, cwd=folder, env=os.environ | quiet | environment, capture_output=True, text=True)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def losses(output: Path) -> dict[int, float]:
    """Step -> logged training loss of a finished run."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row["loss"] for row in log if "loss" in row}


# ------------------------------------------------------------------------------------------------------ the bare run


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """`python annotated_examples/dpo.py`, once, in a folder from which that very command works."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "annotated_examples").symlink_to(EXAMPLES)
    done = run(python("annotated_examples/dpo.py"), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_the_bare_run_learns(bare):
    folder, _ = bare
    held_out = json.loads((folder / "outputs/dpo-toy/held_out.json").read_text())
    assert held_out["after"]["right answers"] >= held_out["before"]["right answers"] + 0.15
    assert held_out["before"]["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: the policy is still the reference
    assert held_out["after"]["loss"] < 0.6


def test_the_bare_run_stays_in_the_expected_bands(bare):
    """Each logged value lies in the band of the committed seeds, widened by the width of that key's widest band."""
    folder, _ = bare
    expected = json.loads((EXAMPLES / "expected" / "dpo.json").read_text())["log"]
    log = json.loads((folder / "outputs/dpo-toy/trainer_state.json").read_text())["log_history"]
    rows = {row["step"]: row for row in log if "loss" in row}
    outside = []
    for key, band in expected.items():
        margin = max(high - low for low, high in zip(band["min"], band["max"], strict=True))
        margin += 1e-6 * max(map(abs, band["max"]))  # what two roundings may differ by where all seeds agree
        for step, low, high in zip(band["step"], band["min"], band["max"], strict=True):
            if not low - margin <= rows[step][key] <= high + margin:
                outside.append(f"{key} at step {step}: {rows[step][key]} is not in {low} to {high}")
    assert not outside, "\n".join(outside)


def test_the_logged_keys_are_the_expected_ones(bare):
    folder, _ = bare
    expected = json.loads((EXAMPLES / "expected" / "dpo.json").read_text())["log"]
    log = json.loads((folder / "outputs/dpo-toy/trainer_state.json").read_text())["log_history"]
    logged = {key for row in log if "loss" in row for key in row} - {"epoch", "step"}
    assert logged == set(expected)


def test_the_bare_run_prints_the_row_and_the_samples(bare):
    _, done = bare
    assert re.search(r"^prompt_ids +<\|user\|>[\d+]+<\|end\|><\|assistant\|>$", done.stdout, re.M)
    assert re.search(r"^chosen_ids +.*#\d+<\|end\|>$", done.stdout, re.M)
    assert (
        len(re.findall(r"^    before: ", done.stdout, re.M)) == len(re.findall(r"^    after: ", done.stdout, re.M)) == 3
    )


def shape(text: str) -> list[str]:
    """Printed lines without what differs from run to run: numbers, and the sampled answers."""
    lines = [line.split(":")[0] if line.startswith("    ") else line for line in text.rstrip().splitlines()]
    return [re.sub(r"\d+\+[\d+]+", "SUM", re.sub(r"-?\d[\d.]*(e[+-]\d+)?", "0", line)) for line in lines]


def test_the_captured_output_on_the_pages_is_what_the_command_prints(bare):
    _, done = bare
    assert shape(done.stdout) == shape((EXAMPLES / "expected" / "dpo.txt").read_text())


def test_the_saved_model_loads_and_answers(bare):
    folder, _ = bare
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = folder / "outputs/dpo-toy"
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2+3+4+5"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=64)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "1+2=3 3+3=6 6+4=10 10+5=15 #15"


def test_the_bare_command_works_twice_and_leaves_another_run_alone(bare):
    folder, _ = bare
    short = python("annotated_examples/dpo.py", "--max_steps", "2", "--logging_steps", "1")
    assert run(short, folder).returncode == 0
    assert set(losses(folder / "outputs/dpo-toy")) == {1, 2}

    other = folder / "outputs/other"
    other.mkdir()
    (other / "model.safetensors").write_text("somebody's weeks of work")
    done = run([*short, "--output_dir", "outputs/other"], folder)
    assert done.returncode != 0
    assert "holds another run" in done.stderr
    assert [path.name for path in other.iterdir()] == ["model.safetensors"]


# ------------------------------------------------------------------------- resume, several processes, adapters, copies


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    whole = python(
        EXAMPLES / "dpo.py", "--max_steps", "6", "--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "3"
    )
    assert run([*whole, "--output_dir", "whole"], tmp_path).returncode == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    done = run([*whole, "--output_dir", "part", "--resume_from_checkpoint", "true"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = losses(tmp_path / "whole"), losses(tmp_path / "part")
    assert second == pytest.approx(first, abs=1e-6)
    assert set(second) == {1, 2, 3, 4, 5, 6}


def test_two_processes_train_one_model(tmp_path):
    """`accelerate launch --cpu --num_processes 2` would quietly start one process; --multi_gpu starts two, on a CPU too."""
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    launch += [str(EXAMPLES / "dpo.py"), "--use_cpu", "--max_steps", "2", "--logging_steps", "1", "--output_dir", "two"]
    done = run(launch, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    log = [row for row in json.loads((tmp_path / "two/trainer_state.json").read_text())["log_history"] if "loss" in row]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    pairs = len((TOY / "data/preference/train.jsonl").read_text().splitlines())
    assert log[-1]["epoch"] == pytest.approx(2 * 2 * 16 / pairs, rel=0.02)  # 2 steps of 16 pairs in each of 2 processes
    assert done.stdout.count("prompt_ids") == 1
    assert (tmp_path / "two/model.safetensors").is_file()


def test_lora_trains_an_adapter_and_no_second_model(tmp_path):
    arguments = ["--use_peft", "--lora_r", "4", "--learning_rate", "1e-3", "--max_steps", "2", "--logging_steps", "1"]
    done = run(python(EXAMPLES / "dpo.py", *arguments, "--output_dir", "lora"), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "lora/adapter_model.safetensors").is_file()
    assert not (tmp_path / "lora/model.safetensors").exists()
    assert losses(tmp_path / "lora")[1] == pytest.approx(0.6931, abs=1e-3)


PROMPT, CHOSEN, REJECTED = "7+9+3", "7+9=16 16+3=19 #19", "7+9=16 16+3=20 #20"
TURNS = [
    [{"role": "user", "content": PROMPT}],
    [{"role": "assistant", "content": CHOSEN}],
    [{"role": "assistant", "content": REJECTED}],
]
FORMATS = {  # TRL's preference formats: https://huggingface.co/docs/trl/dataset_formats
    "conversational, explicit prompt": {"prompt": TURNS[0], "chosen": TURNS[1], "rejected": TURNS[2]},
    "conversational, implicit prompt": {"chosen": TURNS[0] + TURNS[1], "rejected": TURNS[0] + TURNS[2]},
    "text, explicit prompt": {"prompt": PROMPT + " ", "chosen": CHOSEN, "rejected": REJECTED},
    "text, implicit prompt": {"chosen": f"{PROMPT} {CHOSEN}", "rejected": f"{PROMPT} {REJECTED}"},
}


def write_rows(folder: Path, rows: list[dict], splits: tuple[str, ...] = ("train", "test")) -> Path:
    """A data set as a folder of JSON Lines, which `load_dataset` opens by its path."""
    folder.mkdir(parents=True)
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny_model(folder: Path, architecture: str) -> Path:
    """A random model of the given architecture with the toy's tokenizer."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(TOY / "policy")
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    settings |= {"head_dim": 16, "intermediate_size": 64, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    settings |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(
        getattr(transformers, f"{architecture}Config")(**settings)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def script():
    """dpo.py as a module; `main()` then runs it in this process, with the flags in sys.argv."""
    spec = importlib.util.spec_from_file_location("dpo_script", EXAMPLES / "dpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script, monkeypatch, folder: Path, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["dpo.py", *map(str, arguments)])
    script.main()


REAL_RUN = ["--bf16", "false", "--max_steps", "1", "--logging_steps", "1", "--per_device_train_batch_size", "2"]
REAL_RUN += ["--gradient_accumulation_steps", "1", "--max_length", "64", "--use_cpu"]


@pytest.mark.parametrize("architecture", ["Qwen3", "Llama"])
@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)
def test_copied_alone_it_trains_on_local_files_in_every_format(row, architecture, tmp_path, monkeypatch):
    shutil.copy(EXAMPLES / "dpo.py", tmp_path / "copied.py")
    spec = importlib.util.spec_from_file_location("copied", tmp_path / "copied.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    data, model = write_rows(tmp_path / "data", [row] * 8), tiny_model(tmp_path / "model", architecture)
    call(copied, monkeypatch, tmp_path, "--model_name_or_path", model, "--dataset_name", data, *REAL_RUN)
    output = tmp_path / "outputs" / "dpo-model"
    assert losses(output)[1] == pytest.approx(0.6931, abs=1e-3)
    assert (output / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------------- the settings


def test_toy_settings_do_not_reach_a_real_run(script):
    toy, script_args, training_args, model_args, _ = script.parse(["--model_name_or_path", "some/model", "--use_cpu"])
    assert not toy
    assert script_args.dataset_name == "trl-lib/ultrafeedback_binarized"
    assert model_args.model_name_or_path == "some/model"
    leaked = {
        name
        for name in set(script.TOY) - set(script.REAL)
        if name != "model_name_or_path" and getattr(training_args, name, None) == script.TOY[name]
    }
    assert leaked == set()


def test_a_flag_beats_the_yaml_file_and_the_file_beats_the_script(script, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: some/model\nbeta: 0.3\nlearning_rate: 2.0e-6\nbf16: false\n")
    toy, _, training_args, model_args, _ = script.parse(
        ["--config", str(recipe), "--learning_rate", "3e-6", "--use_cpu"]
    )
    assert not toy
    assert model_args.model_name_or_path == "some/model"
    assert (training_args.beta, training_args.learning_rate) == (0.3, 3e-6)
    assert training_args.gradient_accumulation_steps == script.REAL["gradient_accumulation_steps"]


# ------------------------------------------------------------------------------------------------------- bad input


def refused(script, monkeypatch, folder: Path, *arguments: str) -> str:
    """The message of a run that stops before it trains or writes anything (an empty folder may have been made)."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = files()
    with pytest.raises(SystemExit) as stopped:
        call(script, monkeypatch, folder, *arguments)
    assert files() == before
    return str(stopped.value)


@pytest.mark.parametrize(
    ("columns", "taker"),
    [
        ({"prompt": PROMPT, "completion": CHOSEN, "label": True}, "kto.py and bco.py"),
        ({"prompt": PROMPT, "completions": ["7+9=16"], "labels": [True]}, "prm.py"),
        ({"prompt": PROMPT, "completion": CHOSEN}, "sft.py"),
        ({"messages": TURNS[0] + TURNS[1]}, "sft.py"),
        ({"text": CHOSEN}, "sft.py"),
        ({"prompt": PROMPT}, "grpo.py"),
        ({"question": PROMPT, "good": CHOSEN, "bad": REJECTED}, "rename or map"),
    ],
)
def test_rows_of_another_type_are_refused_with_the_script_that_takes_them(
    columns, taker, script, tmp_path, monkeypatch
):
    data, model = write_rows(tmp_path / "data", [columns] * 4), tiny_model(tmp_path / "model", "Qwen3")
    message = refused(script, monkeypatch, tmp_path, "--model_name_or_path", model, "--dataset_name", data, *REAL_RUN)
    assert taker in message
    for column in columns:
        assert column in message


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_empty_split_is_refused(kind, script, tmp_path, monkeypatch):
    from datasets import Dataset

    data, model = tmp_path / "data", tiny_model(tmp_path / "model", "Qwen3")
    write_rows(data, [FORMATS["text, explicit prompt"]])
    if kind == "jsonl":
        (data / "train.jsonl").write_text("")
    else:
        full = Dataset.from_list([FORMATS["text, explicit prompt"]])
        for split, rows in (("train", full.select([])), ("test", full)):
            (data / f"{split}.jsonl").unlink()
            rows.to_parquet(data / f"{split}.parquet")
    message = refused(script, monkeypatch, tmp_path, "--model_name_or_path", model, "--dataset_name", data, *REAL_RUN)
    assert "is empty" in message


def test_a_missing_split_is_refused_with_those_that_are_there(script, tmp_path, monkeypatch):
    data, model = (
        write_rows(tmp_path / "data", [FORMATS["text, explicit prompt"]]),
        tiny_model(tmp_path / "model", "Qwen3"),
    )
    flags = ["--model_name_or_path", model, "--dataset_name", data, "--dataset_train_split", "train_prefs", *REAL_RUN]
    message = refused(script, monkeypatch, tmp_path, *flags)
    assert "train_prefs" in message
    assert "['test', 'train']" in message


@pytest.mark.parametrize("name", ["./no/such/model", "no-such-model", "nobody/no-such-model"])
def test_a_model_that_is_nowhere_is_refused(name, script, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "data", [FORMATS["text, explicit prompt"]])
    message = refused(script, monkeypatch, tmp_path, "--model_name_or_path", name, "--dataset_name", data, *REAL_RUN)
    assert name in message
    assert "neither a model folder here nor on the hub" in message


def change_tokenizer(model: Path, **changes: str | None) -> None:
    """Edits the tokenizer's settings on disk; None removes one."""
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def test_conversations_without_a_chat_template_are_refused(script, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "data", [FORMATS["conversational, explicit prompt"]] * 4)
    model = tiny_model(tmp_path / "model", "Qwen3")
    (model / "chat_template.jinja").unlink()
    message = refused(script, monkeypatch, tmp_path, "--model_name_or_path", model, "--dataset_name", data, *REAL_RUN)
    assert "no chat template" in message


def test_a_pad_token_that_is_the_end_token_is_refused_and_a_flag_helps(script, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "data", [FORMATS["text, explicit prompt"]] * 4)
    model = tiny_model(tmp_path / "model", "Qwen3")
    change_tokenizer(model, pad_token="<|end|>")
    flags = ["--model_name_or_path", model, "--dataset_name", data, *REAL_RUN]
    message = refused(script, monkeypatch, tmp_path, *flags)
    assert "--pad_token" in message
    assert "<|pad|>" in message  # it names a token of this very vocabulary
    call(script, monkeypatch, tmp_path, *flags, "--pad_token", "<|pad|>")
    assert (tmp_path / "outputs/dpo-model/model.safetensors").is_file()


def test_a_max_length_that_cuts_every_pair_is_refused(script, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "data", [FORMATS["conversational, explicit prompt"]] * 4)
    model = tiny_model(tmp_path / "model", "Qwen3")
    for length in ("20", "4"):  # the answers are cut; the prompt alone does not fit, and TRL drops every row
        flags = ["--model_name_or_path", model, "--dataset_name", data, *REAL_RUN, "--max_length", length]
        assert f"max_length={length}" in refused(script, monkeypatch, tmp_path, *flags)


@pytest.mark.parametrize("checkpoint", ["true", "outputs/checkpoint-7"])
def test_a_checkpoint_that_is_not_there_is_refused(checkpoint, script, tmp_path, monkeypatch):
    message = refused(
        script, monkeypatch, tmp_path, "--resume_from_checkpoint", checkpoint, "--output_dir", "outputs/new"
    )
    assert "no checkpoint" in message


def test_a_data_set_without_a_model_is_refused(script, tmp_path, monkeypatch):
    message = refused(script, monkeypatch, tmp_path, "--dataset_name", "trl-lib/ultrafeedback_binarized")
    assert "--model_name_or_path" in message


def test_an_old_trl_is_refused(monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.28.0" if name == "trl" else real(name))
    spec = importlib.util.spec_from_file_location("dpo_old", EXAMPLES / "dpo.py")
    with pytest.raises(SystemExit, match=r"trl 0\.28\.0 is installed: pip install 'trl==1\.12\.0'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# ------------------------------------------------------------------------------------------------- scripts and tests


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_points_to_its_walkthrough_and_has_expected_values(name):
    first = (EXAMPLES / f"{name}.py").read_text().splitlines()[0]
    assert f"annotated_trainers/{name}.md" in first
    assert (ROOT / "annotated_trainers" / f"{name}.md").is_file()
    assert (EXAMPLES / "expected" / f"{name}.json").is_file()


def test_there_are_scripts():
    assert "dpo" in SCRIPTS
