PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The versions that the suites were counted with; `make test CONSTRAINTS=/dev/null` takes the newest instead.
CONSTRAINTS ?= tests/constraints.txt

.PHONY: demo demo-diffusion bench-kernels bench-speed bench-denoisers bench-lvlm bench-gpu eval-diffusion eval-quality
.PHONY: test test-full test-hosts test-gpu lint docs docs-pictures install clean

demo: $(VENV)/.installed
	$(BIN)/tokenprune demo --output demo-output

demo-diffusion: $(VENV)/.installed
	$(BIN)/tokenprune demo-diffusion --output demo-diffusion-output $(DEMO_OPTIONS)

bench-kernels: $(VENV)/.installed
	$(BIN)/python -m tokenprune.evals.kernel_bench --output bench-output $(BENCH_OPTIONS)

bench-speed: $(VENV)/.installed
	$(BIN)/python -m tokenprune.evals.dinov2_speed
	$(BIN)/python -m tokenprune.evals.dinov2_speed --compile
	$(BIN)/python -m tokenprune.evals.ragged
	$(BIN)/python -m tokenprune.evals.window_speed

bench-denoisers: $(VENV)/.installed
	$(BIN)/python -m tokenprune.evals.denoiser_speed
	$(BIN)/python -m tokenprune.evals.region_speed

bench-lvlm: $(VENV)/.installed
	$(BIN)/python -m tokenprune.evals.lvlm_speed $(BENCH_OPTIONS)

eval-diffusion: $(VENV)/.installed
	$(BIN)/python -m tokenprune.evals.generation_curves dit-digits --output eval-output
	$(BIN)/python -m tokenprune.evals.generation_curves unet-digits --output eval-output
	$(BIN)/python -m tokenprune.evals.region_quality --output eval-output

eval-quality: $(VENV)/.installed
	$(BIN)/python -m tokenprune.evals.quality_table digits --output eval-output
	$(BIN)/python -m tokenprune.evals.quality_table saliency --output eval-output

bench-gpu: $(VENV)/.installed
	$(BIN)/python -m tokenprune.evals.gpu_bench --output bench-output $(BENCH_OPTIONS)

# One thread a process: the models of the tests are so small that a second one only waits. The tests of a file share
# what they count, so they stay in one process.
test test-full test-hosts: export OMP_NUM_THREADS = 1
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: $(VENV)/.installed
	$(PYTEST) -m "not full and not hosts"

test-full: $(VENV)/.installed
	$(PYTEST) -m "not hosts" --hypothesis-profile=full

test-hosts: $(VENV)/.installed
	$(BIN)/python -m pytest -m hosts tests/hosts

# What needs a GPU, and the kernels' tests on it.
test-gpu: export CUBLAS_WORKSPACE_CONFIG = :4096:8
test-gpu: $(VENV)/.installed
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'torch finds no GPU here'"
	$(BIN)/python -m pytest tests/gpu tests/kernels/accelerated

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/, from what is here alone; a link or a name that leads nowhere ends it.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

docs-pictures: $(VENV)/.installed
	$(BIN)/python -m tokenprune.evals.method_pictures --output docs/images/methods

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch torchvision
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) dist demo-output demo-diffusion-output bench-output eval-output site
