"""What every test starts from: no network, no telemetry, no GPU, one thread, fixed seeds, caches of its own.

A value that is already set in the environment wins: `OMP_NUM_THREADS=2 make test`.
"""

import gc
import os
import random
import re
import sys
import tempfile
from pathlib import Path

import pytest

pytest_plugins = ["examples"]  # its fixtures
pytest.register_assert_rewrite("walkthrough_tools")

CACHES = tempfile.TemporaryDirectory(prefix="annotated-trl-tests-")
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HOME": CACHES.name,  # a data set cached by an earlier version must not hide an error
    "CUDA_VISIBLE_DEVICES": "",  # the committed figures are those of a CPU
    "OMP_NUM_THREADS": "1",  # the order of float sums depends on it
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
# `ruff` and `accelerate` are those of this Python, also where its environment is not the active one.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def pytest_collection_finish():
    """What is imported by now stays: the collections that TRL and accelerate ask for need not go through it each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers for each test, whatever ran before it; torch and numpy are not imported for that."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


# How many numbers of the pages were compared with TRL's own: each test file that compares keeps its relative errors.

COMPARED: list[tuple[int, float]] = []  # a pair of number and largest error for each process


def pytest_sessionfinish(session):
    files = [module for name, module in sys.modules.items() if name.startswith("test_")]
    lists = {id(module.ERRORS): module.ERRORS for module in files if isinstance(getattr(module, "ERRORS", None), list)}
    errors = [error for found in lists.values() for error in found]
    if errors and not hasattr(session.config, "workeroutput"):
        COMPARED.append((len(errors), max(errors)))
    elif errors:  # a process of pytest-xdist tells the one that started it
        session.config.workeroutput["compared"] = (len(errors), max(errors))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if found := getattr(node, "workeroutput", {}).get("compared"):
        COMPARED.append(found)


def pytest_terminal_summary(terminalreporter):
    if not COMPARED:
        return
    from markdown_pages import fences, markdown_files

    pages = [fence for path in markdown_files() for fence in fences(path)]
    named = {name for path in markdown_files() for name in re.findall(r"<!-- formula: ([\w-]+) -->", path.read_text())}
    blocks = sum(fence.lang == "python" and fence.excuse is None for fence in pages)
    terminalreporter.write_line(
        f"{len(named)} formulas and {blocks} blocks of Python on the pages, {len(pages)} fences in all; "
        f"{sum(number for number, _ in COMPARED):,} comparisons with TRL, "
        f"largest relative error {max(largest for _, largest in COMPARED):.1e}"
    )
