"""tools/gpu.py, without a GPU: all of it runs with a tiny model, and what it counts is checked by hand."""

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_tables
import pytest
import torch
import trl_source
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

HEADER = {"gpu": "NVIDIA H200", "memory": 150e9, "cuda": "13.0", "python": "3.12.3", "versions": {"trl": "1.0"}}
FIGURES = {
    "status": "measured",
    "seconds_per_step": 2.0,
    "tokens_per_second": 1000.0,
    "generated_per_second": 0.0,
    "mfu": 0.25,
    "phases": {"forward": 0.25, "backward": 0.75},
    "curves": {"loss": [2.0, 1.0], "grad_norm": [1.0, 3.0]},
    "allocated": 8e9,
    "reserved": 10e9,
    "batch": 4,
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A build folder of its own, for this process and its children."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPU_BUILD", str(folder))
        for name, part in (("BUILD", ""), ("SITE", "site"), ("WHEELS", "wheels")):
            patch.setattr(gpu, name, folder / part)
        yield folder


def run_tool(*arguments: str) -> str:
    command = [sys.executable, str(Path(gpu.__file__)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def measured(build):
    """Three real jobs with the tiny model, two as forks and one in a fresh process: the JSON, and what was printed."""
    results = build / "results"
    printed = run_tool("run", "--tiny", str(results), "--only", "sft", "--ways", "ours", "plain")
    printed += run_tool("run", "--tiny", str(results), "--only", "grpo", "--ways", "plain", "--no-fork")
    (file,) = results.glob("*.json")
    return SimpleNamespace(file=file, jobs=json.loads(file.read_text())["jobs"], printed=printed)


# ------------------------------------------------------------------------------------------------------- real tiny jobs


def test_a_run_writes_every_figure_of_every_job(measured):
    assert set(measured.jobs) == {"sft ours", "sft plain", "grpo plain"}
    for name, record in measured.jobs.items():
        assert record["status"] == "measured", (name, record)
        assert record["seconds_per_step"] > 0 and record["tokens_per_second"] > 0 and record["flops_per_second"] > 0
        assert sum(record["phases"].values()) == pytest.approx(1)
        assert {"forward", "backward", "optimizer", "rest"} <= set(record["phases"])
        assert len(record["curves"]["grad_norm"]) == sum(gpu.STEPS["sampling"])
        assert record["seconds_of_each_timed_step"] == [record["seconds_per_step"]]
        assert name in measured.printed
    assert measured.printed.count("0 jobs are left.") == 2


def test_both_sides_do_the_same_work_and_give_the_same_losses(measured):
    ours, plain = measured.jobs["sft ours"], measured.jobs["sft plain"]
    assert ours["batch"] * ours["accumulation"] == plain["batch"] * plain["accumulation"] == 8 * 4
    assert "gradient_checkpointing" not in ours["changed"] and "shortened" in ours
    work = [record["tokens_per_second"] * record["seconds_per_step"] for record in (ours, plain)]
    assert work[0] == pytest.approx(work[1])
    assert ours["curves"]["loss"] == pytest.approx(plain["curves"]["loss"], rel=1e-4)


def test_every_sampled_answer_has_the_full_length(measured):
    record = measured.jobs["grpo plain"]
    sampled = record["generated_per_second"] * record["seconds_per_step"]
    assert sampled == pytest.approx(64 * 8)  # answers of a step, tokens of an answer
    assert record["phases"]["generation"] > 0
    assert 0 < record["curves"]["reward"][0] < 1
    assert record["shortened"] == {"answers": [8, gpu.load("grpo").REAL["max_completion_length"]]}


def test_three_timed_steps_give_their_median_and_an_average_number_of_tokens(measured, build, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(gpu, "steps_of", lambda *_: (1, 3, 1))
    monkeypatch.setattr(gpu.Work, "watch", lambda self: None)
    totals = iter(
        [
            {"tokens": 0, "generated": 0, "flops": 0},
            *({"tokens": n, "generated": 0, "flops": 0} for n in (30, 60, 120, 120)),
        ]
    )
    monkeypatch.setattr(gpu.Work, "totals", lambda self: next(totals))
    found = gpu.attempt(gpu.measure, job("sft", "plain"), "tiny")
    assert found["status"] == "measured", found
    seconds = sorted(found["seconds_of_each_timed_step"])
    assert len(seconds) == 3 and found["seconds_per_step"] == seconds[1]
    assert found["tokens_per_second"] == pytest.approx(40 / seconds[1])


def test_the_row_of_a_toy_run_holds_before_and_after(build, monkeypatch):
    script = gpu.load("sft")
    monkeypatch.setattr(script, "TOY", script.TOY | {"max_steps": 1})
    monkeypatch.setattr(gpu, "load", lambda name: script)
    monkeypatch.setattr(script, "held_out", lambda *_: ({"right answers": 0.5}, []))
    monkeypatch.setattr(sys, "argv", [])
    found = gpu.attempt(gpu.measure, job("sft", "toy"), "tiny")
    assert found["status"] == "measured", found
    assert found["before"] == found["after"] == {"right answers": 0.5} and found["seconds"] > 0


def test_a_second_run_has_nothing_to_do(measured):
    before = measured.file.stat().st_mtime_ns
    printed = run_tool("run", "--tiny", str(measured.file.parent), "--only", "sft", "--ways", "ours", "plain")
    assert printed == "0 jobs are left.\n" and measured.file.stat().st_mtime_ns == before


def test_without_a_gpu_nothing_is_measured(build, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "run", "--no-fork"])
    monkeypatch.setattr(gpu, "ask", lambda *_: {"gpu": None})
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        gpu.main()


def test_the_minutes_begin_with_the_process(build, monkeypatch):
    """Loading everything takes a minute on a machine that has never done it; a slice must end in time all the same."""
    now, asked = [1000.0], []
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "import_once", lambda names: now.__setitem__(0, 1060.0))
    monkeypatch.setattr(gpu, "ask", lambda *given: asked.append(given) or now.__setitem__(0, 1090.0) or {"gpu": None})
    monkeypatch.setattr(gpu, "run", lambda *given: asked.append(given) or [])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "run", "--tiny", "x", "--minutes", "9", "--limit", "40"])
    gpu.main()
    (command, *_, patience), (*_, deadline, again, also, longest) = asked
    assert (command, patience) == ("probe", 300)
    assert (deadline, again, also, longest) == (1000 + 9 * 60, False, [], 40)


# --------------------------------------------------------------------------------------------------- the order of things


def job(name: str, way: str = "ours", lever: str | None = None) -> dict:
    return {"name": name, "way": way, "lever": lever, "digest": "d"}


TODO = [job("sft"), job("sft", "plain"), job("dpo")]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """run() with jobs that only pretend, listed in `calls`; `answers` says what comes of them."""
    calls, answers = [], {}

    def pretend(job, size, limit):
        calls.append((gpu.key(job), job.get("batch"), limit))
        answer = answers.get(gpu.key(job), FIGURES)
        return answer(job) if callable(answer) else answer

    monkeypatch.setattr(gpu, "run_job", pretend)
    file = tmp_path / "gpu.json"

    def run(todo=TODO, minutes=60.0, again=False, header=HEADER, also=(), longest=gpu.LIMIT):
        calls.clear()
        left = gpu.run(todo, "real", file, header, time.monotonic() + 60 * minutes, again, also, longest)
        return [gpu.key(one) for one in left]

    return SimpleNamespace(run=run, calls=calls, answers=answers, file=file, jobs=lambda: read(file)["jobs"])


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def test_a_run_that_is_cut_off_goes_on_where_it_stopped(tool):
    def cut_off(job):
        raise KeyboardInterrupt

    tool.answers["dpo ours"] = cut_off
    with pytest.raises(KeyboardInterrupt):
        tool.run()
    assert list(tool.jobs()) == ["sft ours", "sft plain"]
    tool.answers.clear()
    assert tool.run() == []
    assert [name for name, *_ in tool.calls] == ["dpo ours"] and len(tool.jobs()) == 3


def test_no_job_starts_when_the_minutes_are_over(tool):
    tool.answers["sft ours"] = lambda job: time.sleep(0.3) or FIGURES
    assert gpu.LEAST == 25  # seconds: the least that a job is started for
    assert tool.run(minutes=(25 + 0.2) / 60) == ["sft plain", "dpo ours"]
    assert list(tool.jobs()) == ["sft ours"]
    assert tool.calls[0][2] <= 25.2


def test_a_job_stopped_by_the_end_of_the_slice_is_measured_in_the_next_one(tool, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    tool.answers["sft plain"] = lambda job: now.__setitem__(0, 540.0)  # -> None: stopped
    now[0] = 0.0
    tool.answers["sft ours"] = lambda job: now.__setitem__(0, 500.0) or FIGURES
    assert tool.run(minutes=9) == ["sft plain", "dpo ours"]
    assert list(tool.jobs()) == ["sft ours"]


def test_so_is_one_whose_second_try_was_stopped_by_the_end_of_the_slice(tool, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    tool.answers["sft ours"] = lambda job: now.__setitem__(0, 460.0) or FIGURES  # so the first try has all its time

    def full_and_then_stopped(job):
        now[0] += 40
        return None if job.get("batch") else {"status": "out of memory"}

    tool.answers["sft plain"] = full_and_then_stopped
    assert tool.run(minutes=9) == ["sft plain", "dpo ours"]
    assert list(tool.jobs()) == ["sft ours"]


def test_a_job_that_used_up_its_whole_time_is_recorded(tool):
    tool.answers["sft ours"] = lambda job: None
    assert tool.run() == []
    assert tool.jobs()["sft ours"] == {"digest": "d", "status": "over 75 s"}
    assert {limit for *_, limit in tool.calls} == {75}


def test_a_job_can_be_given_another_limit(tool):
    tool.answers["sft ours"] = lambda job: None
    tool.run(longest=200)
    assert tool.jobs()["sft ours"]["status"] == "over 200 s"


def test_a_job_that_is_too_long_for_a_slice_does_not_stand_in_the_way_of_the_others(tool):
    tool.answers["sft ours"] = lambda job: None
    assert tool.run(minutes=1) == []
    assert tool.jobs()["sft ours"]["status"] == "over 60 s" and len(tool.jobs()) == 3


def test_out_of_memory_is_a_result_and_the_defaults_go_on_with_half_of_the_rows(tool):
    tool.answers["sft ours"] = {"status": "out of memory"}
    tool.answers["sft plain"] = lambda job: FIGURES if job.get("batch") == 2 else {"status": "out of memory"}
    assert tool.run() == []
    assert [call[:2] for call in tool.calls[:4]] == [("sft ours", None), *(("sft plain", n) for n in (None, 4, 2))]
    assert tool.jobs()["sft ours"]["status"] == "out of memory"
    assert tool.jobs()["sft plain"]["out_of_memory_at"] == [8, 4]
    tool.run()
    assert tool.calls == []


def test_a_lever_takes_as_many_rows_at_once_as_the_defaults_could(tool):
    tool.run([job("sft", "plain"), job("sft", "plain", "compile")])
    assert tool.calls[1][:2] == ("sft plain + compile", 4)


def test_an_error_is_recorded_and_tried_again_only_when_asked(tool):
    tool.answers["sft ours"] = {"status": "error", "error": "ValueError: no"}
    tool.run()
    assert tool.jobs()["sft ours"]["error"] == "ValueError: no"
    assert tool.run() == [] and tool.calls == []
    tool.answers.clear()
    tool.run(again=True)
    assert [name for name, *_ in tool.calls] == ["sft ours"] and tool.jobs()["sft ours"]["status"] == "measured"


def test_changed_settings_are_measured_again(tool):
    tool.run()
    tool.run([{**TODO[0], "digest": "another"}])
    assert [name for name, *_ in tool.calls] == ["sft ours"] and tool.jobs()["sft ours"]["digest"] == "another"


def test_figures_of_other_versions_are_not_mixed_in(tool):
    tool.run()
    with pytest.raises(SystemExit, match="another state of versions"):
        tool.run(header=HEADER | {"versions": {"trl": "1.13.0"}})


def test_a_lever_without_its_package_is_recorded_as_such_and_tried_once_it_is_there(tool, monkeypatch):
    wanted = job("grpo", "plain", "vLLM")
    monkeypatch.setitem(gpu.LEVERS, "vLLM", ({}, "no_such_package", None))
    tool.run([wanted])
    assert tool.calls == [] and tool.jobs()[gpu.key(wanted)]["status"] == "needs no_such_package"
    monkeypatch.setitem(gpu.LEVERS, "vLLM", ({}, "json", None))
    tool.run([wanted])
    assert tool.jobs()[gpu.key(wanted)]["status"] == "measured"


def test_the_last_lines_of_the_log_are_printed_for_what_failed(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "BUILD", tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "sft-plain.log").write_text("".join(f"line {number}\n" for number in range(20)))
    tool.answers["sft plain"] = {"status": "error", "error": "ValueError: no"}
    tool.run()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "sft plain: error ValueError: no" and lines[17].startswith("dpo ours: ")
    assert lines[2:17] == [f"    | line {number}" for number in range(5, 20)]


def test_names_of_logs_need_no_quotes():
    names = [gpu.log_of(one).name for one in gpu.jobs(gpu.scripts(), list(gpu.WAYS))]
    assert "sft-plain-packing-flex-attention.log" in names and len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in names)


def test_the_json_is_copied_after_each_job(tool, tmp_path):
    tool.run(also=[tmp_path / "out", tmp_path / "kept" / "here"])
    for folder in ("out", "kept/here"):
        assert read(tmp_path / folder / "gpu.json") == read(tool.file)


def test_a_run_without_a_json_goes_on_with_the_newest_copy(tool, tmp_path):
    """The working tree of a lent machine is replaced before each slice; a folder beside it is kept."""
    folders = [tmp_path / name for name in ("old", "new", "empty")]
    tool.run(TODO[:1], also=folders[:1])
    tool.run(TODO[:2], also=folders[1:2])
    os.utime(folders[0] / "gpu.json", (1, 1))
    tool.file.unlink()
    assert tool.run(also=folders) == []
    assert [name for name, *_ in tool.calls] == ["dpo ours"] and len(tool.jobs()) == 3
    assert len(read(folders[2] / "gpu.json")["jobs"]) == 3


def test_the_json_in_its_place_goes_before_any_copy(tool, tmp_path):
    tool.run(TODO[:1], also=[tmp_path / "copy"])
    tool.file.write_text(json.dumps(HEADER | {"jobs": {}}))
    tool.run(TODO[:1], also=[tmp_path / "copy"])
    assert [name for name, *_ in tool.calls] == ["sft ours"]


def test_the_comparison_comes_first_and_begins_with_what_does_not_sample():
    names = [gpu.key(one) for one in gpu.jobs(gpu.scripts(), list(gpu.WAYS))]
    assert names[:4] == ["sft ours", "sft plain", "dpo ours", "dpo plain"]
    sampling = [name in gpu.SAMPLING for name in gpu.scripts()]
    assert sampling == sorted(sampling) and sum(sampling) == 7
    ways = [re.sub(r"^\w+ ", "", name) for name in names]
    assert ways.index("toy") == 2 * len(gpu.scripts()) and ways[-1] == f"plain + {list(gpu.LEVERS)[-1]}"
    assert len(set(names)) == len(names)


def test_the_digest_follows_the_values_and_not_the_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "EXAMPLES", tmp_path)
    digests = []
    for text in ("REAL = {'a': 1}", "REAL = {\n    'a': 1,  # why\n}", "REAL = {'a': 2}"):
        (tmp_path / "sft.py").write_text(f"TOY = {{}}\n{text}\n")
        digests.append(gpu.settings_digest("sft", toy=False))
    assert digests[0] == digests[1] != digests[2]


# ------------------------------------------------------------------------------------------------------------ children


PARENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import gpu
gpu.IMPORTED, gpu.__file__ = sys.argv[2] == "fork", sys.argv[3]
gpu.answer = lambda file: exec(open(sys.argv[3]).read())
with open(sys.argv[4], "w") as log:
    gpu.child([sys.argv[5]], 60, log)
"""
JOB = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def is_alive(process: int) -> bool:
    """Whether it still runs; one that nobody has asked for its exit status does not."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"


def wait_until(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.parametrize("way", ["fork", "fresh process"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_does_not_outlive_the_run(tmp_path, way, how):
    """Else it would hold the GPU while the next run measures."""
    (tmp_path / "job.py").write_text(JOB)
    log = tmp_path / "log"
    arguments = [str(Path(gpu.__file__).parent), way, str(tmp_path / "job.py"), str(log), "x"]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *arguments])
    try:
        assert wait_until(lambda: log.is_file() and log.read_text().endswith("\n"))
        child = int(log.read_text())
        assert is_alive(child) and child != parent.pid
        parent.send_signal(how)
        parent.wait()
        gone = wait_until(lambda: not is_alive(child), 3)
        if not gone:
            os.kill(child, signal.SIGKILL)
        assert gone
    finally:
        parent.kill()
        parent.wait()


def test_a_fork_is_stopped_at_its_limit_with_what_it_has_started(tmp_path, monkeypatch):
    def answer(*_):
        print(subprocess.Popen(["sleep", "60"]).pid)
        time.sleep(60)

    monkeypatch.setattr(gpu, "IMPORTED", True)
    monkeypatch.setattr(gpu, "answer", answer)
    started = time.perf_counter()
    with (tmp_path / "log").open("w") as log:
        assert gpu.child([], 1.0, log) is None
    assert time.perf_counter() - started < 5
    grandchild = int((tmp_path / "log").read_text())
    assert wait_until(lambda: not is_alive(grandchild), 3)


def test_what_a_fork_prints_and_how_it_ends_is_known(build, monkeypatch, capfd):
    def answer(*_):
        print("on stdout")
        os.write(2, b"on stderr\n")
        raise KeyError("the last line")

    monkeypatch.setattr(gpu, "IMPORTED", True)
    monkeypatch.setattr(gpu, "answer", answer)
    found = gpu.ask("job", job("sft"), "tiny", 60)
    assert found == {"status": "error", "error": "the process ended with 1: KeyError: 'the last line'"}
    text = gpu.log_of(job("sft")).read_text()
    assert "on stdout\n" in text and "on stderr\n" in text
    assert "on std" not in "".join(capfd.readouterr())


def test_importing_for_all_scripts_starts_no_cuda(build):
    """As on a machine with a GPU: torch is told that it was built for CUDA, and what would start it is watched."""
    code = f"""
import sys, torch, traceback
sys.path.insert(0, {str(Path(gpu.__file__).parent)!r})
def started(*_): traceback.print_stack(); raise SystemExit("CUDA was started")
torch.cuda._is_compiled, torch.cuda._device_count_nvml = lambda: True, lambda: 1
torch._C._cuda_getDeviceCount = torch.cuda._lazy_init = started
torch._C._cuda_getCurrentRawStream = started  # a build for CPUs has none, and parts of torch import it
import gpu
gpu.import_once(gpu.scripts())
assert torch.cuda.is_available() and gpu.IMPORTED
assert {{"trl.trainer.dpo_trainer", "trl.experimental.xpo.xpo_trainer"}} <= set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_failing_job_leaves_its_last_line(build):
    found = gpu.ask("job", {"name": "no_script", "way": "ours", "lever": None}, "tiny", 60)
    assert found["status"] == "error" and "no_script.py" in found["error"]


def test_a_child_that_dies_leaves_its_last_line(build, monkeypatch):
    monkeypatch.setattr(gpu, "child", lambda arguments, limit, log: log.write("loading\nkilled by the kernel\n") and -9)
    assert gpu.ask("job", job("sft"), "tiny", 60)["error"] == "the process ended with -9: killed by the kernel"


def test_a_child_is_stopped_at_its_limit(build):
    started = time.perf_counter()
    assert gpu.ask("probe", {}, "tiny", 0.2) is None
    assert time.perf_counter() - started < 5


def test_out_of_memory_is_told_from_other_errors():
    def fail(error):
        def measure(job, size):
            raise error

        return gpu.attempt(measure, job("sft"), "tiny")

    assert fail(torch.OutOfMemoryError("CUDA out of memory."))["status"] == "out of memory"
    assert fail(RuntimeError("CUDA error: out of memory"))["status"] == "out of memory"
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert fail(RuntimeError(cublas))["status"] == "out of memory"
    found = fail(SystemExit("sft.py: first line\nlast line"))
    assert found == {"status": "error", "error": "SystemExit: last line"}


@pytest.mark.parametrize("status", ["out of memory", "error"])
def test_a_model_that_cannot_be_made_is_a_result_too(monkeypatch, status):
    asked = []
    monkeypatch.setattr(gpu, "ask", lambda command, *_: asked.append(command) or {"status": status})
    assert gpu.run_job(job("sft", "lora"), "real", 60) == {"status": status} and asked == ["prepare"]


# ------------------------------------------------------------------------------------------------- tokens, FLOPs, phases


def small_model(**changes) -> Qwen3ForCausalLM:
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "attn_implementation": "eager", "eos_token_id": 1}
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**(sizes | {"pad_token_id": 0, "tie_word_embeddings": True} | changes)))


@pytest.fixture
def work(monkeypatch):
    """A counter that watches every Qwen3 of this test."""
    from transformers import GenerationMixin
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    for kind in (qwen3.Qwen3Model, qwen3.Qwen3ForCausalLM, qwen3.Qwen3ForSequenceClassification):
        monkeypatch.setattr(kind, "forward", kind.forward)  # so that it is put back
    monkeypatch.setattr(qwen3.Qwen3ForTokenClassification, "forward", qwen3.Qwen3ForTokenClassification.forward)
    monkeypatch.setattr(qwen3.Qwen3ForCausalLM, "__init__", qwen3.Qwen3ForCausalLM.__init__)
    monkeypatch.setattr(GenerationMixin, "generate", GenerationMixin.generate)
    counter = gpu.Work(gpu.Clock())
    counter.watch()
    return counter


# Weights of one layer: q and o 32 x 64, k and v 32 x 32, three matrices 32 x 48; twice that, and 300 x 32 for the output.
BY_HAND = 2 * (2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48) + 300 * 32


def test_weights_and_flops_by_hand(work):
    body = small_model().model
    assert gpu.weights(body) == (BY_HAND, BY_HAND)
    tokens, squares = 30, 10 * 10 + 20 * 20  # two rows, L = 2, A = 64
    assert gpu.flops(body, tokens, squares, trained=True) == 6 * BY_HAND * 30 + 12 * 2 * 64 * 500
    assert gpu.flops(body, tokens, squares, trained=False) == 2 * BY_HAND * 30 + 4 * 2 * 64 * 500


def test_the_formula_agrees_with_what_pytorch_counts(work):
    model, ids = small_model(), torch.randint(6, 300, (3, 40))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert work.totals()["flops"] == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert work.totals()["tokens"] == ids.numel()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    assert work.totals()["flops"] == pytest.approx(4 * counter.get_total_flops(), rel=0.01)
    assert work.totals()["tokens"] == ids.numel()  # a pass without gradient trains on none


def test_frozen_weights_need_no_gradient_of_their_own(work):
    model, ids = small_model(), torch.randint(6, 300, (3, 40))
    for weight in model.parameters():
        weight.requires_grad = False
    inputs = model.get_input_embeddings()(ids).requires_grad_()
    model.model.layers[0].mlp.up_proj.weight.requires_grad = True
    assert gpu.weights(model.model) == (BY_HAND, 32 * 48)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=inputs).logits.sum().backward()
    assert work.totals()["flops"] == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_padding_is_not_counted_and_packed_rows_are_taken_apart(work):
    body, ids = small_model().model, torch.full((2, 10), 7)
    mask = torch.tensor([[1] * 10, [0] * 6 + [1] * 4])
    body(input_ids=ids, attention_mask=mask)
    assert [int(value) for value in work.sums[(id(body), True)]] == [14, 100 + 16]
    work.sums.clear()
    body(input_ids=ids[:1], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]))
    assert [int(value) for value in work.sums[(id(body), True)]] == [10, 16 + 36]


def test_the_policy_counts_and_not_the_models_beside_it(work):
    policy, reference, ids = small_model(), small_model(), torch.full((2, 10), 7)
    reference.requires_grad_(False)
    policy(input_ids=ids)
    reference(input_ids=ids)
    with torch.no_grad():
        policy(input_ids=torch.full((4, 10), 7))
    assert work.totals()["tokens"] == 20
    assert work.totals()["flops"] == gpu.flops(policy.model, 20, 200, True) + gpu.flops(policy.model, 60, 600, False)


def test_sampling_has_one_length_and_is_counted(work):
    model = small_model().eval()
    ids = torch.tensor([[0, 0, 7, 8], [7, 8, 9, 10]])
    output = model.generate(
        input_ids=ids, attention_mask=(ids != 0).long(), do_sample=True, max_new_tokens=6, pad_token_id=0
    )
    answers = output[:, 4:]
    assert answers.shape == (2, 6) and answers[:, -1].tolist() == [1, 1] and not (answers[:, :-1] == 1).any()
    assert work.totals()["generated"] == 12 and work.totals()["tokens"] == 0
    seen = sum(prompt**2 + sum(range(prompt + 1, prompt + 7)) for prompt in (2, 4))
    assert work.totals()["flops"] == 2 * BY_HAND * (2 + 4 + 12) + 4 * 2 * 64 * seen


def test_seconds_go_to_the_phase_that_is_under_way(work, monkeypatch):
    clock, now = work.clock, [0.0]
    monkeypatch.setattr(clock, "now", lambda: now[0])

    def after(seconds):
        now[0] += seconds

    policy, reference, ids = small_model(), small_model(), torch.full((1, 4), 7)
    clock.begin("rest")
    clock.start()
    after(1)
    with torch.no_grad():
        reference(input_ids=ids)
    after(2)  # what is done with its output is scoring too
    policy(input_ids=ids)
    after(4)
    with torch.no_grad():
        reference(input_ids=ids)  # in the middle of a loss
    after(8)
    clock.timed("backward", lambda: after(16))()
    clock.timed("optimizer", lambda: after(32))()
    after(64)
    clock.add()
    assert clock.seconds == {"rest": 1 + 64, "scoring": 2, "forward": 4 + 8, "backward": 16, "optimizer": 32}


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_the_share_of_the_peak(name):
    assert gpu.mfu(989e12 / 4, name) == 0.25


@pytest.mark.parametrize("name", [None, "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "Tesla T4"])
def test_an_unknown_gpu_has_no_mfu(name):
    assert gpu.mfu(1e12, name) is None


# ---------------------------------------------------------------------------------------------------- models, rows, flags


def test_a_model_is_written_with_a_tokenizer_of_whole_words(tmp_path):
    default = torch.get_default_dtype()
    try:
        gpu.make_model("tiny", "CausalLM", tmp_path / "model")
    finally:
        torch.set_default_dtype(default)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == 512
    tokenizer = gpu.make_tokenizer(512)
    ids = list(range(6, 512))
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    chat = [{"role": "user", "content": "w6 w7"}]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] == [
        2,
        6,
        7,
        1,
        3,
    ]


def test_the_published_sizes():
    for size, millions in (("0.6b", 596), ("1.7b", 1721), ("8b", 8191)):
        hidden, layers, heads, key_values, head, width, tied, words = gpu.SIZES[size]
        layer = hidden * head * (2 * heads + 2 * key_values) + 3 * hidden * width + 2 * hidden + 2 * head
        assert round((layers * layer + hidden + words * hidden * (1 if tied else 2)) / 1e6) == millions


def test_rows_have_the_lengths_that_are_stated_and_are_the_same_each_time(tmp_path):
    for folder in ("a", "b"):
        gpu.make_rows("dpo", tmp_path / folder, tiny=False)
    text = (tmp_path / "a" / "train.jsonl").read_text()
    assert text == (tmp_path / "b" / "train.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    lengths = [len(row["prompt"][0]["content"].split()) for row in rows]
    assert len(rows) == gpu.ROWS and 64 <= min(lengths) < 70 and 440 < max(lengths) <= 448


@pytest.fixture(scope="module")
def modules():
    return {name: gpu.load(name) for name in gpu.scripts()}


def known(script) -> set[str]:
    return {field.name for kind in script.FLAGS for field in fields(kind)}


def test_every_flag_exists(modules):
    assert set().union(*map(known, modules.values())) >= gpu.SPEED
    for flags in (gpu.OWN_FLAGS, gpu.PLAIN_FLAGS, gpu.KEPT):
        assert all(set(flags[name]) <= known(modules[name]) for name in flags if name in modules)
    for lever, (flags, _, takers) in gpu.LEVERS.items():
        for name in takers or modules:
            assert name not in modules or set(flags) <= known(modules[name]), (lever, name)
    for name, flags in ((name, flags) for more in gpu.LEVERS_WITH.values() for name, flags in more.items()):
        assert set(flags) <= known(modules[name])
    assert set(gpu.LEVERS_WITH) <= set(gpu.LEVERS)
    for name in gpu.SAMPLING & set(modules):
        assert len(set(gpu.ANSWER_FLAGS) & known(modules[name])) == 1
    for name in gpu.WITH_REWARD_MODEL & set(modules):
        assert "reward_model_path" in known(modules[name])


def changed(script, one: dict, folder: Path, size: str = "real") -> dict:
    """The settings of a job, with the script as it was afterwards."""
    real = script.REAL
    try:
        gpu.change_settings(one, script, size, folder)
        return script.REAL
    finally:
        script.REAL = real


def rows(settings: dict) -> tuple[int, int]:
    return settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]


def test_plain_keeps_the_method_and_the_batch_and_drops_the_rest(modules, tmp_path):
    for name, script in modules.items():
        real, plain = script.REAL, changed(script, job(name, "plain"), tmp_path)
        assert set(real) - set(plain) <= gpu.SPEED
        assert all(plain[key] == real[key] for key in ("learning_rate", "beta", "num_generations") if key in real)
        assert rows(plain)[0] == 8


def test_both_sides_take_the_same_rows_and_answers_for_a_step(modules, tmp_path):
    for name, script in modules.items():
        ours, plain = (changed(script, job(name, way), tmp_path) for way in ("ours", "plain"))
        step = gpu.rows_of_a_step(script.REAL)
        step = min(step, 8 if name == "nash_md" else 16) if name in gpu.PROMPTS else step
        assert gpu.rows_of_a_step(ours) == gpu.rows_of_a_step(plain) == step
        assert rows(ours)[0] == min(script.REAL.get("per_device_train_batch_size", 8), step)
        if name in gpu.SAMPLING:
            (flag,) = set(gpu.ANSWER_FLAGS) & known(script)
            assert ours[flag] == plain[flag] == (128 if name in ("grpo", "rloo") else 64)
            assert gpu.shortened(script.REAL, ours)["answers"] == [ours[flag], script.REAL[flag]]


def test_rows_at_once_never_change_the_rows_of_a_step(modules, tmp_path, monkeypatch):
    script = modules["xpo"]
    for at_once, steps, expected in ((32, 1, (16, 1)), (6, 4, (4, 4)), (2, 2, (2, 2))):
        real = script.REAL | {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": steps}
        monkeypatch.setattr(script, "REAL", real)
        assert rows(changed(script, job("xpo"), tmp_path)) == expected


def test_what_is_not_shortened_is_not_named():
    real = {"max_new_tokens": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 16}
    assert gpu.shortened(real, real) == {}
    assert gpu.shortened(real, real | {"gradient_accumulation_steps": 8}) == {"rows": [16, 32]}


def test_liger_gets_what_it_needs_with_each_trainer(modules, tmp_path):
    settings = {
        name: changed(script, job(name, "plain", "Liger kernels"), tmp_path) for name, script in modules.items()
    }
    assert all(found["use_liger_kernel"] for found in settings.values())
    assert {name for name, found in settings.items() if found.get("tf32")} == {"dpo", "kto", "grpo", "gkd"}
    without = {"fused_linear_cross_entropy": False}
    assert {name for name, found in settings.items() if found.get("liger_kernel_config") == without} == {
        "reward",
        "prm",
    }


def test_an_unknown_flag_is_an_error(modules, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.LEVERS, "wrong", ({"no_such_flag": 1}, None, None))
    with pytest.raises(ValueError, match=r"sft.py has no flag \['no_such_flag'\]"):
        gpu.change_settings(job("sft", "plain", "wrong"), modules["sft"], "tiny", tmp_path)


# --------------------------------------------------------------------------------------------------------------- packing


def test_the_packages_have_the_versions_of_this_repository():
    needed = gpu.requirements(gpu.ALONG)
    assert needed[0] == f"trl=={trl_source.pinned_version()}"
    assert any(line.startswith("datasets>=") for line in needed) and any(
        re.match("liger-kernel>=", line) for line in needed
    )
    assert "dill" in needed and len(needed) == len(gpu.ALONG)


def test_too_large_a_load_is_refused(build, monkeypatch, capsys):
    def download(command, **_):
        if "download" in command:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir(parents=True)
            (folder / "trl-1.0-py3-none-any.whl").write_bytes(b"0" * 2**20)
            assert command[command.index("--python-version") + 1] == "3.12"
        return SimpleNamespace(stdout="pyproject.toml\0")  # the repository, as git lists it

    monkeypatch.setattr(gpu.subprocess, "run", download)
    gpu.pack("3.12", [], room=64)
    assert "1.0 MiB  trl-1.0" in capsys.readouterr().out and list(gpu.WHEELS.glob("*.whl"))
    with pytest.raises(SystemExit, match="nothing is kept"):
        gpu.pack("3.12", [], room=1)
    assert not list(gpu.WHEELS.glob("*.whl"))


def test_only_what_is_missing_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WHEELS", tmp_path)
    monkeypatch.setattr(gpu, "SITE", tmp_path / "site")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("trl-1.0", "no_such_thing-1.0"):
        with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "")
            wheel.writestr(f"{name}.dist-info/METADATA", f"Name: {name.split('-')[0]}\nVersion: 1.0\n")
    gpu.unpack()
    assert {path.name for path in (tmp_path / "site").iterdir()} == {"no_such_thing", "no_such_thing-1.0.dist-info"}
    assert importlib.util.find_spec("no_such_thing") and importlib.metadata.version("no_such_thing") == "1.0"


def test_a_machine_without_the_packages_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WHEELS", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(gpu, "PACKAGES", ("no_such_thing_either",))
    with pytest.raises(SystemExit, match="no_such_thing_either is not installed here"):
        gpu.unpack()


# ---------------------------------------------------------------------------------------------------------------- tables


def result_of(jobs: dict) -> dict:
    for name, record in jobs.items():
        record["digest"] = gpu.settings_digest(name.split()[0], name.endswith("toy"))
    return {**HEADER, "jobs": jobs}


def test_without_a_measurement_every_trainer_is_shown_as_not_measured(tmp_path, capsys):
    gpu_tables.everything(tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("not measured") == 15 and "make gpu" in printed


def test_the_tables_of_a_measurement(tmp_path, capsys):
    jobs = {"dpo ours": FIGURES | {"tokens_per_second": 2000.0}, "dpo plain": dict(FIGURES)}
    jobs |= {"sft ours": FIGURES | {"tokens_per_second": 4500.0}, "sft plain": dict(FIGURES)}
    jobs |= {"kto ours": {"status": "out of memory"}, "kto plain": dict(FIGURES)}
    jobs |= {"sft plain + packing": FIGURES | {"tokens_per_second": 1500.0, "allocated": 4e9}}
    jobs |= {
        "sft toy": {
            "status": "measured",
            "seconds": 3.2,
            "before": {"right answers": 0.7},
            "after": {"right answers": 0.95},
        }
    }
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(result_of(jobs)))
    gpu_tables.everything(tmp_path)
    printed = capsys.readouterr().out
    assert "| `dpo` | 8.0 | 10.0 | 2 | 2,000 | – | 25 % | 0 % | 0 % | 25 % | 75 % | 0 % | 0 % |" in printed
    assert "| `dpo` | 1,000 | 2,000 | **2.00** | 8.0 | 8.0 | 4 | 4 | 0.0 % | 0 |" in printed
    assert printed.index("gradient norms differ by") < printed.index("losses by")
    assert "equal losses prove little" in printed
    assert "| `kto` | out of memory |" in printed
    assert "Geometric mean over 2 of 15 trainers: **3.00** times." in printed
    assert "1.50, GB 0.50" in printed and "right answers: 0.700 → 0.950" in printed
    for heading in printed.split("\n### ")[
        1:
    ]:  # each table has a row for each trainer, and each row a figure or a reason
        rows = [line for line in heading.splitlines() if line.startswith("| `")]
        assert len(rows) == 15
        assert all(re.search(r"\d|not measured|out of memory", row.split("|", 2)[2]) for row in rows)


def test_what_was_shortened_is_said_beside_the_figures(tmp_path, capsys):
    answers, rows = {"answers": [64, 256]}, {"rows": [16, 32]}
    jobs = {f"{name} ours": FIGURES | {"shortened": answers | rows} for name in ("ppo", "xpo")}
    jobs |= {"gkd ours": FIGURES | {"shortened": answers}, "sft ours": FIGURES | {"shortened": {}}}
    gpu_tables.shortened(result_of(jobs), "ours")
    lines = capsys.readouterr().out.split("\n\n")
    assert lines[:2] == [
        "`ppo`, `xpo`: Answers of 64 tokens; the settings allow 256. 16 rows a step; the settings take 32.",
        "`gkd`: Answers of 64 tokens; the settings allow 256.",
    ]
    assert lines[2:] == [""]


def test_figures_of_settings_that_have_changed_are_not_shown(tmp_path, capsys):
    result = result_of({"dpo ours": dict(FIGURES)})
    result["jobs"]["dpo ours"]["digest"] = "of yesterday"
    gpu_tables.speed(result, "ours")
    assert capsys.readouterr().out.count("not measured") == 15


def test_curves_are_compared_step_by_step():
    other = {"curves": {"loss": [2.0, 1.5], "grad_norm": [1.0, 3.5]}}
    assert gpu_tables.largest_difference(other, FIGURES) == (0.5, 0.25)


@pytest.mark.parametrize("file", sorted(gpu.MEASURED.glob("*.json")), ids=lambda file: file.stem)
def test_a_committed_measurement_belongs_to_the_pinned_trl(file):
    result = read(file)
    assert file.stem == gpu.slug(result["gpu"]) and result["versions"]["trl"] == trl_source.pinned_version()
    assert result["how"] == gpu.how_measured("real")


def test_the_tool_needs_nothing_heavy_to_start():
    tree = ast.parse(Path(gpu.__file__).read_text())
    imported = {
        getattr(node, "module", None) or node.names[0].name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
