PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch and torchvision must come as a pair; CPU wheels of other platforms resolve to the same versions.
TORCH ?= torch==2.14.1 torchvision==0.29.1

.PHONY: demo bench-kernels bench-speed bench-gpu test test-full test-hosts lint install clean

demo: $(VENV)/.installed
	$(BIN)/tokenprune demo --output demo-output

bench-kernels: $(VENV)/.installed
	$(BIN)/python -m tokenprune.evals.kernel_bench --output bench-output $(BENCH_OPTIONS)

bench-speed: $(VENV)/.installed
	$(BIN)/python -m tokenprune.evals.dinov2_speed
	$(BIN)/python -m tokenprune.evals.dinov2_speed --compile
	$(BIN)/python -m tokenprune.evals.ragged

bench-gpu: $(VENV)/.installed
	$(BIN)/python -m tokenprune.evals.gpu_bench --output bench-output $(BENCH_OPTIONS)

# One thread a process: the models of the tests are so small that a second one only waits. The tests of a file share
# what they count, so they stay in one process.
test test-full test-hosts: export OMP_NUM_THREADS = 1
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: $(VENV)/.installed
	$(PYTEST) -m "not full and not hosts"

test-full: $(VENV)/.installed
	$(PYTEST) -m "not hosts"

test-hosts: $(VENV)/.installed
	$(BIN)/python -m pytest -m hosts tests/hosts

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) dist demo-output bench-output
