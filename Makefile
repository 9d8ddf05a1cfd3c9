# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: test check demo bench evidence docs clean

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[diffusion,track,train,dev]"
	# timm without its torchvision: the wheel of torchvision does not load beside a CPU build of torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps timm
	touch $(STAMP)

# two processes of one thread each: most tests are too small for two threads
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(STAMP)
	$(BIN)/python scripts/demo.py --out out/demo

bench: $(STAMP)
	$(BIN)/python scripts/bench.py $(FAMILY) --out out/bench $(ARGS)

evidence: $(STAMP)
	$(BIN)/hasten evidence $(METHOD)

docs: $(STAMP)
	$(BIN)/python scripts/make_docs.py

clean:
	rm -rf out build .pytest_cache .mypy_cache .ruff_cache
