"""What every example script is tested for. A test file of one script makes a class from `Example`: see test_example_dpo.py."""

import ast
import importlib.util
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import drift
import pytest
import torch
import trl_source
from expected import TIMES, training_rows

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "annotated_examples"
TOY = EXAMPLES / "toy"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))

# ------------------------------------------------------------------------------------------------------------- rows

PROMPT, RIGHT, WRONG = "7+9+3", "7+9=16 16+3=19 #19", "7+9=16 16+3=20 #20"
USER = [{"role": "user", "content": PROMPT}]
ASSISTANT = [{"role": "assistant", "content": RIGHT}]
MISTAKEN = [{"role": "assistant", "content": WRONG}]

PREFERENCE = {  # TRL's formats: https://huggingface.co/docs/trl/dataset_formats
    "conversational, explicit prompt": {"prompt": USER, "chosen": ASSISTANT, "rejected": MISTAKEN},
    "conversational, implicit prompt": {"chosen": USER + ASSISTANT, "rejected": USER + MISTAKEN},
    "text, explicit prompt": {"prompt": PROMPT + " ", "chosen": RIGHT, "rejected": WRONG},
    "text, implicit prompt": {"chosen": f"{PROMPT} {RIGHT}", "rejected": f"{PROMPT} {WRONG}"},
    "trl-lib/ultrafeedback_binarized": {
        "chosen": USER + ASSISTANT,
        "rejected": USER + MISTAKEN,
        "score_chosen": 8.5,
        "score_rejected": 7.0,
    },
    "HuggingFaceH4/ultrafeedback_binarized": {
        "prompt": PROMPT,  # text, and once more in the conversations
        "prompt_id": "2f3a",
        "chosen": USER + ASSISTANT,
        "rejected": USER + MISTAKEN,
        "messages": USER + ASSISTANT,
        "score_chosen": 8.5,
        "score_rejected": 7.0,
    },
}

# Rows of every type, with the words by which a script that cannot take them says who can.
TYPES = [
    ({"prompt": PROMPT, "completion": RIGHT, "label": True}, "kto.py and bco.py"),
    ({"prompt": PROMPT, "completions": ["7+9=16"], "labels": [True]}, "prm.py"),
    ({"prompt": PROMPT, "chosen": RIGHT, "rejected": WRONG}, "dpo.py"),
    ({"prompt": PROMPT, "completion": RIGHT}, "sft.py"),
    ({"messages": USER + ASSISTANT}, "sft.py"),
    ({"text": RIGHT}, "sft.py"),
    ({"prompt": PROMPT}, "grpo.py"),
    ({"question": PROMPT, "good": RIGHT, "bad": WRONG}, "rename or map"),
]


# ---------------------------------------------------------------------------------------------------------- helpers


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command as a user would, in `folder`, without a network."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(command, cwd=folder, env=os.environ | quiet | environment, capture_output=True, text=True)


def python(*arguments: str | Path) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def logged(output: Path) -> dict[int, dict[str, float]]:
    """Step -> what a finished run logged while it trained."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row for row in training_rows(log)}


def losses(output: Path) -> dict[int, float]:
    return {step: row["loss"] for step, row in logged(output).items()}


def load(path: Path):
    """A script as a module; its `main()` then runs it in this process, with the flags in sys.argv."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions(name: str) -> dict[str, str]:
    """Name -> source of a script's functions."""
    text = (EXAMPLES / f"{name}.py").read_text()
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body if hasattr(node, "args")}


SHORT = ("--max_steps", "2", "--logging_steps", "1")


def write_rows(folder: Path, rows: list[dict], splits: tuple[str, ...] = ("train", "test")) -> Path:
    """A data set as a folder of JSON Lines, which `load_dataset` opens by its path."""
    folder.mkdir(parents=True)
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


ARCHITECTURES = ("Qwen3", "Llama", "Gemma", "Mistral")


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


REAL = ("--bf16", "false", "--use_cpu", "--max_steps", "1", "--logging_steps", "1")
REAL += ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1")


def shape(text: str) -> list[str]:
    """Printed lines without what differs from run to run: numbers, and the sampled answers."""
    lines = [line.split(":")[0] if line.startswith("    ") else line for line in text.rstrip().splitlines()]
    return [re.sub(r"\d+\+[\d+]+", "SUM", re.sub(r"-?\d[\d.]*(e[+-]\d+)?", "0", line)) for line in lines]


# A process of this server has imported torch and TRL already, which takes a new Python five seconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["trl.trainer.dpo_trainer", "trl.trainer.grpo_trainer", "trl.experimental.online_dpo"])


def start(script: Path, flags: tuple[str, ...], folder: Path, output: str = os.devnull, limit: int | None = None):
    """Starts a script in `folder`, in a process of its own: what it prints goes to `output`, no file may outgrow `limit`."""
    process = SERVER.Process(target=run_as_main, args=(str(script), flags, str(folder), output, limit))
    process.start()
    return process


def run_as_main(script: str, flags: tuple[str, ...], folder: str, output: str, limit: int | None) -> None:
    os.chdir(folder)
    printed = os.open(output, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(printed, stream)
    sys.stdout.reconfigure(line_buffering=True)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def stops_at(line: str, script: Path, flags: tuple[str, ...], folder: Path, kind: signal.Signals):
    """Starts a script and sends it a signal as soon as it has printed `line`; gives the process when it has ended."""
    pipe = folder / "printed"
    os.mkfifo(pipe)
    process = start(script, flags, folder, str(pipe))
    with pipe.open() as printed:
        for text in printed:
            if line in text:
                os.kill(process.pid, kind)
                break
    process.join(timeout=60)
    return process


def pytest_generate_tests(metafunc):
    """The formats of a script are known only to its class."""
    if "row" in metafunc.fixturenames and "architecture" in metafunc.fixturenames:
        formats = metafunc.cls.formats
        first = next(iter(formats.values()))
        cases = [pytest.param(row, "Qwen3", id=name) for name, row in formats.items()]
        cases += [pytest.param(first, kind, id=kind) for kind in ARCHITECTURES[1:]]
        metafunc.parametrize(("row", "architecture"), cases)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> Path:
    """The toy world with a few rows of each data set: for runs of a few steps that need not learn anything."""
    world = tmp_path_factory.mktemp("small") / "toy"
    for split in sorted(TOY.glob("data/*/*.jsonl")):
        rows = split.read_text().splitlines(keepends=True)[: 128 if split.stem == "train" else 8]
        path = world / split.relative_to(TOY)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(rows))
    for model in ("policy", "teacher", "reward_model"):
        (world / model).symlink_to(TOY / model)
    return world


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    """One tiny model for each architecture. Tests that change a file copy the folder first."""
    return {kind: tiny_model(tmp_path_factory.mktemp("tiny") / kind.lower(), kind) for kind in ARCHITECTURES}


class Example:
    """The tests that all scripts share. A subclass says what is special about its script in these attributes."""

    name: ClassVar[str]
    formats: ClassVar[dict[str, dict]]  # name -> a row; the first is conversational where the trainer takes that
    needs: ClassVar[tuple[set[str], ...]]  # the script's COLUMNS
    at_start: ClassVar[dict[str, tuple[float, float]]] = {}  # held-out figure -> (value, tolerance) before training
    figure: ClassVar[str] = "right answers"  # the held-out figure that shows whether the method works
    gain: ClassVar[float] = 0.15  # what it must gain at least
    least: ClassVar[float] = 0.0  # what it must reach at least
    printed: ClassVar[dict[str, str]] = {}  # how the bare run shows its row: label -> pattern
    resumes: ClassVar[bool] = True
    adapter: ClassVar[bool] = True
    flags: ClassVar[tuple[str, ...]] = ()  # of its own, for one step with a tiny model
    removed: ClassVar[str | None] = None  # the release of TRL that has the trainer no more

    @staticmethod
    def row(place: int, row: dict) -> dict:
        """What the `place`-th row of a data set of equal rows is made into: labels of both kinds, where a method needs them."""
        return row

    @pytest.fixture(scope="class")
    def path(self, small_world) -> Path:
        """The script beside the small world."""
        return Path(shutil.copy(EXAMPLES / f"{self.name}.py", small_world.parent))

    @pytest.fixture(scope="class")
    def script(self, path):
        return load(path)

    @pytest.fixture(scope="class")
    def expected(self) -> dict:
        return json.loads((EXAMPLES / "expected" / f"{self.name}.json").read_text())

    @pytest.fixture
    def call(self, script, monkeypatch, tmp_path):
        """A function that runs the script in this process, in the folder of the test."""

        def run_in_process(*arguments: str | Path, module=script) -> None:
            monkeypatch.chdir(tmp_path)
            monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
            module.main()

        return run_in_process

    @pytest.fixture(scope="class")
    def bare(self, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
        """`python annotated_examples/<name>.py`, once, in a folder from which that very command works."""
        folder = tmp_path_factory.mktemp("bare")
        (folder / "annotated_examples").symlink_to(EXAMPLES)
        done = run(python(f"annotated_examples/{self.name}.py"), folder)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder / "outputs" / f"{self.name}-toy", done

    @pytest.fixture
    def real(self, tiny_models, tmp_path):
        """A function that gives the flags for one step with a tiny model on rows of our own."""

        def flags(rows: list[dict] | None = None, model: Path | str = tiny_models["Qwen3"], data: Path | None = None):
            if data is None:
                rows = [next(iter(self.formats.values()))] * 8 if rows is None else rows
                data = write_rows(tmp_path / "data", [self.row(place, row) for place, row in enumerate(rows)])
            return ["--model_name_or_path", model, "--dataset_name", data, *REAL, *self.flags]

        return flags

    @pytest.fixture
    def refused(self, call, tmp_path):
        """A function that gives the message of a run that stops before it trains, writes or overwrites anything."""

        def files() -> dict[Path, bytes]:  # an empty folder may have been made
            return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

        def message(*arguments: str | Path) -> str:
            before = files()
            with pytest.raises(SystemExit) as stopped:
                call(*arguments)
            assert files() == before
            return str(stopped.value)

        return message

    @pytest.fixture
    def own_model(self, tiny_models, tmp_path) -> Path:
        """A tiny model whose files a test may change."""
        return shutil.copytree(tiny_models["Qwen3"], tmp_path / "model")

    # -- the bare run ----------------------------------------------------------------------------------------------------

    def test_the_bare_run_learns(self, bare):
        output, _ = bare
        held_out = json.loads((output / "held_out.json").read_text())
        before, after = held_out["before"], held_out["after"]
        assert after[self.figure] >= max(before[self.figure] + self.gain, self.least)
        for figure, (value, tolerance) in self.at_start.items():
            assert before[figure] == pytest.approx(value, abs=tolerance), figure

    def test_the_bare_run_stays_in_the_expected_bands(self, bare, expected):
        """Each logged value lies in the band of the committed seeds, widened by the width of that key's widest band."""
        rows = logged(bare[0])
        outside = []
        for key, band in expected["log"].items():
            margin = max(high - low for low, high in zip(band["min"], band["max"], strict=True))
            margin += 1e-6 * max(1.0, *map(abs, band["max"]))  # what two roundings may differ by where all seeds agree
            for step, low, high in zip(band["step"], band["min"], band["max"], strict=True):
                if not low - margin <= rows[step][key] <= high + margin:
                    outside.append(f"{key} at step {step}: {rows[step][key]} is not in {low} to {high}")
        assert not outside, "\n".join(outside)

    def test_the_logged_keys_are_the_expected_ones(self, bare, expected):
        keys = {key for row in logged(bare[0]).values() for key in row} - TIMES
        assert keys == set(expected["log"])

    def test_the_bare_run_prints_the_row_and_the_samples(self, bare):
        _, done = bare
        for label, pattern in self.printed.items():
            assert re.search(rf"^{label} +{pattern}$", done.stdout, re.M), label
        old, new = (re.findall(rf"^    {when}: ", done.stdout, re.M) for when in ("before", "after"))
        assert len(old) == len(new) == 3

    def test_the_captured_output_on_the_pages_is_what_the_command_prints(self, bare):
        _, done = bare
        assert shape(done.stdout) == shape((EXAMPLES / "expected" / f"{self.name}.txt").read_text())

    def test_the_saved_model_loads_and_is_the_trained_one(self, bare):
        """The files alone, opened without TRL, give what the run said of them."""
        import transformers

        output, _ = bare
        assert not (output / "unfinished").exists()
        tokenizer = transformers.AutoTokenizer.from_pretrained(output)
        [architecture] = transformers.AutoConfig.from_pretrained(output).architectures
        model = getattr(transformers, architecture).from_pretrained(output)
        if self.figure == "right answers":
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": "1+2+3+4+5"}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            answer = model.generate(**prompt, do_sample=False, max_new_tokens=64)[0, prompt["input_ids"].shape[1] :]
            assert tokenizer.decode(answer, skip_special_tokens=True) == "1+2=3 3+3=6 6+4=10 10+5=15 #15"

    def test_the_bare_command_works_twice_and_leaves_another_run_alone(self, bare, call, tmp_path):
        output, _ = bare
        shutil.copytree(output, tmp_path / "outputs" / output.name)
        call(*SHORT)
        assert set(logged(tmp_path / "outputs" / output.name)) == {1, 2}

        for marker in (None, {"script": "another", "toy": True}, {"script": self.name, "toy": False}):
            other = tmp_path / "outputs" / "other"
            other.mkdir(exist_ok=True)
            (other / "model.safetensors").write_text("somebody's weeks of work")
            if marker:
                (other / "run.json").write_text(json.dumps(marker))
            for checkpoint in (False, True):  # without one, nothing can be gone on with
                if checkpoint:
                    (other / "checkpoint-2").mkdir(exist_ok=True)
                with pytest.raises(SystemExit, match="holds another run") as refused:
                    call(*SHORT, "--output_dir", "outputs/other")
                assert ("--resume_from_checkpoint" in str(refused.value)) == (self.resumes and checkpoint)
            (other / "checkpoint-2").rmdir()
            assert (other / "model.safetensors").read_text() == "somebody's weeks of work"

    # -- interrupted, repeated, and short of room ------------------------------------------------------------------------

    def test_a_killed_run_goes_on_where_it_stopped_and_ends_with_the_same_losses(self, call, path, tmp_path):
        """kill -9 behind the second checkpoint, which is then damaged as if it had been half written."""
        if not self.resumes:
            state = tmp_path / "outputs" / f"{self.name}-toy" / "checkpoint-2" / "trainer_state.json"
            state.parent.mkdir(parents=True)
            state.write_text("{}")
            with pytest.raises(SystemExit, match="cannot resume a run: start again without"):
                call(*SHORT, "--resume_from_checkpoint", "true")
            assert state.is_file()
            state.unlink()  # a checkpoint without a state is a model: nothing to go on from, and no reason to look for more
            with pytest.raises(SystemExit, match="cannot resume a run: start again without"):
                call(*SHORT, "--resume_from_checkpoint", "true")
            return
        flags = ["--max_steps", "6", "--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "2"]
        call(*flags, "--output_dir", "whole")
        part = tmp_path / "part"
        flags += ["--output_dir", "part"]
        process = start(path, tuple(flags), tmp_path)
        while process.is_alive() and not (part / "checkpoint-4/trainer_state.json").exists():
            time.sleep(0.05)
        process.kill()
        process.join()
        assert not (part / "model.safetensors").exists()
        shutil.rmtree(part / "checkpoint-6", ignore_errors=True)
        (part / "checkpoint-4" / "trainer_state.json").unlink(missing_ok=True)
        call(*flags, "--resume_from_checkpoint", "true")  # from checkpoint-2, the last one that is whole
        first, second = losses(tmp_path / "whole"), losses(part)
        assert set(second) == {1, 2, 3, 4, 5, 6}
        assert second == pytest.approx(first, abs=1e-6)

    def test_a_full_gpu_ends_with_what_helps(self, path, monkeypatch, tmp_path):
        def full(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.64 GiB")

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("datasets.load_dataset", full)
        monkeypatch.setattr(sys, "argv", [str(path)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(path), run_name="__main__")
        words = (
            "4.64 GiB",
            f"{self.name}.py: the memory of the GPU is full",
            "--gradient_checkpointing true",
            "recipes",
        )
        assert all(word in str(stopped.value) for word in words)

    def test_two_runs_with_one_seed_give_the_same_log(self, call, tmp_path):
        for output in ("one", "two"):
            call(*SHORT, "--output_dir", output)
        one, two = (logged(tmp_path / output) for output in ("one", "two"))
        for step in (1, 2):
            assert {k: v for k, v in one[step].items() if k not in TIMES} == {
                k: v for k, v in two[step].items() if k not in TIMES
            }

    def test_ctrl_c_leaves_no_model(self, path, tmp_path):
        process = stops_at("'epoch'", path, ("--logging_steps", "1"), tmp_path, signal.SIGINT)
        assert process.exitcode == 1
        output = tmp_path / "outputs" / f"{self.name}-toy"
        assert {path.name for path in output.iterdir()} <= {"run.json", "runs"}

    def test_a_full_disk_leaves_no_half_of_a_model(self, path, tmp_path):
        """A file may not grow beyond 1 MB, as on a disk that fills up while the model is written."""
        process = start(path, SHORT, tmp_path, limit=1_000_000)
        process.join()
        assert process.exitcode == 1
        output = tmp_path / "outputs" / f"{self.name}-toy"
        assert {path.name for path in output.iterdir()} <= {"run.json", "runs"}

    def test_an_output_folder_that_cannot_be_written_is_refused_before_training(self, call, tmp_path):
        (tmp_path / "file").write_text("not a folder")
        with pytest.raises(SystemExit, match="cannot write to file"):
            call(*SHORT, "--output_dir", "file/run")
        assert (tmp_path / "file").read_text() == "not a folder"

    # -- several processes, adapters, copies -----------------------------------------------------------------------------

    def test_two_processes_train_one_model(self, path, script, tmp_path):
        """`accelerate launch --cpu --num_processes 2` would quietly start one process; --multi_gpu starts two, on a CPU too."""
        # The script, and a line more that tells the weights of each process
        (tmp_path / "toy").symlink_to(path.parent / "toy")
        text, line = path.read_text(), "    seconds = time.perf_counter() - started\n"
        assert text.count(line) == 1
        spy = "    file = Path(f'weights-{trainer.accelerator.process_index}')\n"
        spy += "    file.write_text(str(sum(float(p.double().abs().sum()) for p in trainer.model.parameters())))\n"
        (tmp_path / "spied.py").write_text(text.replace(line, line + spy))
        launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
        launch += ["spied.py", "--use_cpu", *SHORT, "--output_dir", "two"]
        done = run(launch, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        one, other = ((tmp_path / f"weights-{process}").read_text() for process in (0, 1))
        assert one == other  # had they trained apart, they would differ
        log = logged(tmp_path / "two")
        assert set(log) == {1, 2}
        data = Path(script.TOY["dataset_name"]) / "train.jsonl"
        rows = len(data.read_text().splitlines())
        each = script.TOY["per_device_train_batch_size"] * script.TOY.get("gradient_accumulation_steps", 1)
        each //= script.TOY.get("num_generations", 1)  # a batch counts completions where a prompt gets a group of them
        assert log[2]["epoch"] == pytest.approx(2 * 2 * each / rows, rel=0.02)  # 2 steps in each of 2 processes
        for label in list(self.printed)[:1]:
            assert done.stdout.count(label) == 1
        assert (tmp_path / "two" / "model.safetensors").is_file()

    def test_lora_trains_an_adapter(self, call, tmp_path):
        flags = ["--use_peft", "--lora_r", "4", "--learning_rate", "1e-3", *SHORT, "--output_dir", "lora"]
        if not self.adapter:
            with pytest.raises(SystemExit, match="use_peft"):
                call(*flags)
            return
        call(*flags)
        assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
        assert not (tmp_path / "lora" / "model.safetensors").exists()

    def test_copied_alone_it_trains_on_local_files(self, row, architecture, call, real, tiny_models, tmp_path):
        """In each of TRL's formats for this trainer, and on other architectures."""
        shutil.copy(EXAMPLES / f"{self.name}.py", tmp_path / "copied.py")
        model = tiny_models[architecture]
        call(*real([row] * 8, model=model), module=load(tmp_path / "copied.py"))
        output = tmp_path / "outputs" / f"{self.name}-{model.name}"
        assert set(logged(output)) == {1}
        assert (output / "model.safetensors").is_file()

    def test_on_the_newest_trl_it_runs_or_says_what_does(self, path, tmp_path):
        try:
            newest = drift.obtain(trl_source.newest_version()).package.parent
        except drift.Unavailable as error:
            pytest.skip(str(error))
        done = run(python(path, *SHORT), tmp_path, PYTHONPATH=str(newest))
        if self.removed:
            assert done.returncode == 1
            pip = f"pip install 'trl=={trl_source.pinned_version()}'"
            for words in (f"removed in TRL {self.removed}", f"uv run {self.name}.py", pip):
                assert words in done.stderr
        else:
            assert done.returncode == 0, done.stderr[-2000:]
            assert set(losses(tmp_path / "outputs" / f"{self.name}-toy")) == {1, 2}

    # -- the settings ----------------------------------------------------------------------------------------------------

    def test_toy_settings_do_not_reach_a_real_run(self, script):
        toy, script_args, training_args, model_args, _ = script.parse(
            ["--model_name_or_path", "some/model", "--use_cpu"]
        )
        assert not toy
        assert script_args.dataset_name == script.REAL["dataset_name"]
        assert model_args.model_name_or_path == "some/model"
        for settings, value in script.TOY.items():
            if settings not in (*script.REAL, "model_name_or_path"):
                now = next((getattr(a, settings) for a in (training_args, script_args) if hasattr(a, settings)), None)
                assert now != value, settings

    def test_what_was_trained_on_the_toy_world_gets_toy_settings_again(self, script, call, refused, tmp_path):
        earlier = tmp_path / "outputs" / "sft-toy"
        shutil.copytree(TOY / "policy", earlier)
        (earlier / "run.json").write_text('{"script": "sft", "toy": true}')
        flags = ["--model_name_or_path", str(earlier)]
        for command_line in (flags, ["=".join(flags)]):
            toy, _, training_args, model_args, _ = script.parse(command_line)
            assert toy
            assert training_args.max_steps == script.TOY["max_steps"]
            assert model_args.model_name_or_path == str(earlier)
        assert "would replace it" in refused(*flags, "--output_dir", earlier)
        (earlier / "run.json").write_text('{"script": "sft", "toy": false}')
        assert not script.parse([*flags, "--use_cpu"])[0]

    def test_a_flag_beats_the_yaml_file_and_the_file_beats_the_script(self, script, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("model_name_or_path: some/model\nweight_decay: 0.3\nlearning_rate: 2.0e-6\nbf16: false\n")
        toy, _, training_args, model_args, _ = script.parse(
            ["--config", str(recipe), "--learning_rate", "3e-6", "--use_cpu"]
        )
        assert not toy
        assert model_args.model_name_or_path == "some/model"
        assert (training_args.weight_decay, training_args.learning_rate) == (0.3, 3e-6)
        assert training_args.lr_scheduler_type == script.REAL["lr_scheduler_type"]

    # -- bad input -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(("row", "taker"), TYPES, ids=[" ".join(row) for row, _ in TYPES])
    def test_rows_of_another_type_are_refused_with_the_script_that_takes_them(self, row, taker, real, refused):
        if any(columns <= set(row) for columns in self.needs):
            return
        message = refused(*real([row] * 4))
        assert taker in message
        for column in row:
            assert column in message

    @pytest.mark.parametrize("streaming", [(), ("--dataset_streaming",)], ids=["whole", "streamed"])
    @pytest.mark.parametrize("kind", ["json", "csv", "parquet", "csv without a line"])
    def test_an_empty_split_is_refused(self, kind, streaming, real, refused, tmp_path):
        from datasets import Dataset

        row = next(iter(self.formats.values()))
        flags, data = real([row]), tmp_path / "data"
        full = Dataset.from_list([row])
        for split, rows in (("train", full.select([])), ("test", full)):
            (data / f"{split}.jsonl").unlink()
            ending = kind.split()[0]
            getattr(rows, f"to_{ending}")(data / f"{split}.{ending}")
        if kind == "csv without a line":  # an older datasets writes no header either
            (data / "train.csv").write_text("")
        assert "is empty" in refused(*flags, *streaming)

    def test_a_missing_split_is_refused_with_those_that_are_there(self, real, refused):
        message = refused(*real(), "--dataset_train_split", "train_prefs")
        assert "train_prefs" in message
        assert "['test', 'train']" in message

    @pytest.mark.parametrize("model", ["./no/such/model", "no-such-model", "nobody/no-such-model"])
    def test_a_model_that_is_nowhere_is_refused(self, model, real, refused):
        message = refused(*real(model=model))
        assert model in message
        assert "neither a model folder here nor on the hub" in message

    def test_conversations_without_a_chat_template_are_refused(self, real, refused, own_model):
        row = next(iter(self.formats.values()))
        if isinstance(next(iter(row.values())), str):
            return  # this trainer takes text only
        (own_model / "chat_template.jinja").unlink()
        assert "no chat template" in refused(*real(model=own_model))

    def test_a_pad_token_that_is_the_end_token_is_refused_and_a_flag_helps(
        self, real, call, refused, own_model, tmp_path
    ):
        path = own_model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|end|>"}))
        flags = real(model=own_model)
        message = refused(*flags)
        assert "--pad_token" in message
        assert "<|pad|>" in message  # it names a token of this very vocabulary
        assert "is not a token of" in refused(*flags, "--pad_token", "<|nothing|>")
        call(*flags, "--pad_token", "<|pad|>")
        assert (tmp_path / "outputs" / f"{self.name}-model" / "model.safetensors").is_file()

    def test_an_adapter_is_refused_as_the_model_to_begin_with(self, real, refused, own_model):
        """transformers would freeze it and its base, or not know the folder for a model."""
        (own_model / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
        assert "peft.AutoPeftModelForCausalLM" in refused(*real(model=own_model))

    def test_a_model_without_a_tokenizer_is_refused(self, real, refused, own_model):
        for path in own_model.glob("*token*"):
            path.unlink()
        assert "no tokenizer: save it there too" in refused(*real(model=own_model))

    @pytest.mark.parametrize("checkpoint", ["true", "outputs/checkpoint-7"])
    def test_a_checkpoint_that_is_not_there_is_refused(self, checkpoint, refused):
        message = refused("--resume_from_checkpoint", checkpoint, "--output_dir", "outputs/new")
        assert "no whole checkpoint" in message or "resume" in message

    def test_a_data_set_without_a_model_is_refused(self, refused):
        assert "--model_name_or_path" in refused("--dataset_name", "trl-lib/anything")

    def test_an_old_trl_is_refused(self, monkeypatch):
        import importlib.metadata

        real = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.28.0" if name == "trl" else real(name))
        with pytest.raises(SystemExit, match=r"trl 0\.28\.0 is installed: pip install 'trl==1\.12\.0'"):
            load(EXAMPLES / f"{self.name}.py")
