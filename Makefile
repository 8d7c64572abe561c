# An active environment is used as it is; otherwise .venv, which `make install` creates.
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
PYTHON ?= $(if $(ACTIVE),python,.venv/bin/python)
TRAINER ?= dpo
CHAIN ?= ppo
GENERATED = $(shell git grep -l --untracked -F '[[[cog' -- '*.md')
COG = $(PYTHON) -m cogapp -P -I tools --verbosity=1

.DEFAULT_GOAL := help
.PHONY: help install test check site serve sync coverage drift parity releases bump toy expected compare settings formats memory hacking symptoms chain gpu environments environment

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: ## install what the scripts, the tests and the site need, into the active environment or into .venv
	$(if $(ACTIVE),,python3 -m venv .venv)
	$(PYTHON) -m pip install -e '.[test,docs]'

test: environment ## run the tests
	$(PYTHON) -m pytest

check: environment ## lint, spelling, and whether everything generated is up to date; changes nothing
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	git ls-files -co --exclude-standard -z | xargs -0 $(PYTHON) -m codespell_lib
	$(PYTHON) tools/pins.py sync --check
	$(PYTHON) tools/scripts.py --check
	$(PYTHON) tools/walkthroughs.py sync --check
	$(PYTHON) tools/drift.py --page --check
	$(COG) --check --check-fail-msg='run make sync' $(GENERATED)

site: environment ## build the site into site/; every warning is an error
	$(PYTHON) tools/stage.py
	$(PYTHON) -m mkdocs build --strict

serve: environment ## show the site on this machine and follow changes
	$(PYTHON) tools/stage.py
	$(PYTHON) tools/stage.py --watch & trap "kill $$!" EXIT INT TERM; $(PYTHON) -m mkdocs serve

# Each part is a target of its own, so that `make --keep-going sync` makes what can be made
.PHONY: sync-pins sync-scripts sync-walkthroughs sync-tables sync-output sync-drift
sync: sync-pins sync-scripts sync-walkthroughs sync-tables sync-output sync-drift ## write again everything that is generated in place

sync-pins: environment
	$(PYTHON) tools/pins.py sync

sync-scripts: environment
	$(PYTHON) tools/scripts.py

sync-walkthroughs: environment
	$(PYTHON) tools/walkthroughs.py sync

sync-tables: environment
	$(COG) -r $(GENERATED)

sync-output: environment
	for page in reference_guides/*.md annotated_trainers/*.md; do $(PYTHON) tests/markdown_pages.py --write $$page || exit 1; done

sync-drift: environment
	$(PYTHON) tools/drift.py --page

coverage: environment ## how much of each trainer's code its walkthrough explains
	$(PYTHON) tools/walkthroughs.py coverage

drift: environment ## what another release of TRL does to the pages: make drift TRL=1.16.0
	$(if $(TRL),,$(error say which release: make drift TRL=1.16.0))$(PYTHON) tools/drift.py $(TRL)

parity: environment ## compare every formula with TRL and count: formulas, blocks, comparisons, the largest error
	$(PYTHON) -m pytest -q tests/test_formulas.py tests/test_loss_types.py tests/test_code_blocks.py tests/test_guide_*.py tests/test_walkthrough_*.py

releases: environment ## read again, from the wheels of TRL, which release has which trainer and argument
	$(PYTHON) tools/releases.py read

bump: environment ## move the pin of TRL, regenerate, list what to read again: make bump TRL=1.16.0
	$(if $(TRL),,$(error say which release: make bump TRL=1.16.0))$(PYTHON) tools/pins.py bump $(TRL)

toy: environment ## sample the toy world's data sets again, from the policy that is there
	$(PYTHON) annotated_examples/toy/build.py

expected: environment ## run a script and write its measurements: make expected TRAINER=dpo
	$(PYTHON) tools/expected.py $(TRAINER)

compare: environment ## put all trainers side by side on the toy world: annotated_examples/expected/compare.json
	$(PYTHON) tools/compare.py

settings: environment ## change one toy setting at a time: annotated_examples/expected/settings.json
	$(PYTHON) tools/settings.py

formats: environment ## give every format of data to every trainer: annotated_examples/expected/formats.json
	$(PYTHON) tools/formats.py

memory: environment ## count what each trainer holds in memory: annotated_examples/expected/memory.json
	$(PYTHON) tools/memory.py

hacking: environment ## train against rewards that can be fooled: annotated_examples/expected/reward_hacking.json
	$(PYTHON) tools/reward_hacking.py

symptoms: environment ## reproduce every entry of the troubleshooting guide: annotated_examples/expected/troubleshooting.json
	$(PYTHON) tools/troubleshooting.py --write

chain: environment ## run scripts on one another's folders: make chain CHAIN=ppo, dpo or online
	$(PYTHON) tools/chain.py $(CHAIN)

gpu: environment ## measure the scripts on this machine's NVIDIA GPU; again, until nothing is left: make gpu MINUTES=60
	$(PYTHON) tools/gpu.py run $(if $(MINUTES),--minutes $(MINUTES))

environments: environment ## run the tests with the lowest and the highest versions that pyproject.toml admits; needs uv
	$(PYTHON) tools/environments.py $(ONLY)

environment:
	@$(PYTHON) --version >/dev/null 2>&1 || \
		{ echo "$(PYTHON) cannot be run: run 'make install' first, or activate an environment." >&2; exit 1; }
