"""What every test starts from: no network, no telemetry, no GPU, one thread, fixed seeds, caches of its own.

A value that is already set in the environment wins: `OMP_NUM_THREADS=2 make test`.
"""

import os
import random
import sys
import tempfile
from pathlib import Path

import pytest

pytest_plugins = ["examples"]  # its fixtures

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


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers for each test, whatever ran before it; torch and numpy are not imported for that."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
