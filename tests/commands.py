"""Command lines that pages show, each with what runs it: a test, as `file::name`, or `.ci/run`, which reads the README."""

TESTED_COMMANDS = {
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python annotated_examples/dpo.py": ".ci/run",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test,docs]' && .venv/bin/python -m pytest": ".ci/run",
    "python annotated_examples/dpo.py": "tests/examples.py::test_the_bare_run_learns",
    "python tools/drift.py --page": "tests/test_drift.py::test_the_committed_page_is_what_the_command_writes_now",
}
