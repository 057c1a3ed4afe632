# What `make setup` installs torch from; an installed torch (a GPU image's, say) is used as it is.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HAS_TORCH := $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo yes)

.PHONY: setup check test coverage test-transformers kernel-usage sanitize lint bench tables report demo clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(if $(HAS_TORCH),--system-site-packages) $(VENV)
	$(if $(HAS_TORCH),,$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

check: setup
	$(BIN)/sparse-mla check --html report.html

# The version that the H200's rows were measured with, beside the one that pip chose: the kernels'
# registers and spills are held to what was recorded with each.
MEASURED_TRITON := 3.6.0
MEASURED := $(VENV)/triton-$(MEASURED_TRITON)

$(MEASURED)/.installed: $(VENV)/.installed
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(MEASURED) triton==$(MEASURED_TRITON) && touch $@

# Processes that share the tests, a file at a time, in the order of tests/conftest.py.
WORKERS ?= 2
SHARED := --dist loadfile --no-loadscope-reorder

test: setup $(MEASURED)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) $(SHARED)

# The same tests, and which lines they ran; half as long again.
coverage: setup $(MEASURED)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) $(SHARED) --cov --cov-report=term

# tests/integrations with the newest transformers that [transformers] allows, and with the oldest.
# The oldest brings its own dependencies: its hub client is an older one, too. `make test` has
# neither version; what is missing here is an error, not a skipped test.
OLDEST_TRANSFORMERS := 5.17.0
OLDEST := $(VENV)/transformers-$(OLDEST_TRANSFORMERS)
NEEDED := import datasets, lm_eval, peft, scipy, transformers; print('transformers', transformers.__version__)

$(VENV)/.transformers: $(VENV)/.eval
	$(BIN)/python -m pip install --quiet --disable-pip-version-check peft
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade \
		--target $(OLDEST) transformers==$(OLDEST_TRANSFORMERS)
	touch $@

test-transformers: $(VENV)/.transformers
	$(BIN)/python -c "$(NEEDED)"
	$(BIN)/python -m pytest -n $(WORKERS) $(SHARED) tests/integrations
	PYTHONPATH=$(OLDEST) $(BIN)/python -c "$(NEEDED)"
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -n $(WORKERS) $(SHARED) tests/integrations

kernel-usage: setup $(MEASURED)/.installed
	$(BIN)/python tests/offline.py
	PYTHONPATH=$(MEASURED) $(BIN)/python tests/offline.py

# compute-sanitizer over one case of each kernel; needs a GPU and the CUDA toolkit.
sanitize: setup
	$(BIN)/python tests/sanitize.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Options of `sparse-mla bench`: make bench BENCH="--only 'decode h=64' --backend sm90"
BENCH ?=

bench: setup
	$(BIN)/sparse-mla bench --results benchmarks/results $(BENCH)

# README's and the documentation's generated tables and figures, from the committed rows.
tables: setup
	$(BIN)/python -m sparse_mla.bench.table

report: setup
	$(BIN)/sparse-mla check --json results.json --html report.html

$(VENV)/.eval: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,eval]'
	touch $@

# The trained model answers problems over the FP8 cache, loses one to a faulty kernel, and meets every
# tier of the evaluation: docs/evaluation.md. Answers to 50 problems do not tell the fault; the
# 1,319 of docs/reports do, and one attention call does.
MODEL ?= models/tiny-glm5
PROBLEMS ?= 50
# One of those that docs/reports lists as lost.
LOST := --start 192 --limit 1 --show 1

demo: $(VENV)/.eval
	@test -f $(MODEL)/config.json || { echo "no model in $(MODEL): say where it is," \
		"make demo MODEL=FOLDER, or train one (docs/tiny-model.md)"; exit 2; }
	$(BIN)/sparse-mla eval --model $(MODEL) --limit 4 --show 2
	@echo; echo "One more over the same cache; then with a kernel that rounds the scales down:"
	$(BIN)/sparse-mla eval --model $(MODEL) $(LOST)
	$(BIN)/sparse-mla eval --model $(MODEL) $(LOST) --fault scale_pow2_down
	@echo; echo "Five ways to attend, and who sees the faults:"
	$(BIN)/sparse-mla eval regression --model $(MODEL) --limit $(PROBLEMS) --html demo.html

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis report.html results.json demo.html
