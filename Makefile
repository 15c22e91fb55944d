# make demo   a real model probed on real data, from nothing
# make test   all tests, from nothing
# make check  what the gate runs beside the tests: lint, format, types, and every GPU kernel compiled
# make bench  benchmarks against the peers; make bench-compare shows what changed since the last one
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Editable, because the sources here hide a plain installation from a Python started in this folder.
# The constraints are the versions that the tests passed with; without a GPU they also keep the
# gigabytes of CUDA packages away.
CONSTRAINTS := -c $(if $(shell command -v nvidia-smi 2>/dev/null),constraints.txt,constraints-cpu.txt)
INSTALL     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PIP         := $(INSTALL) $(CONSTRAINTS)
ZOO         := $(abspath $(VENV))/zoo
OLDEST      := $(abspath $(VENV))/oldest
# Two processes of one thread each; what is timed runs by itself after them.
PYTEST      := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not alone"
ALONE       := $(BIN)/pytest -m alone
OR_SAY_WHY  := || { echo "The install failed. Where the lines above name nvidia or triton, this package index has torch for CUDA only: see the top of the README." >&2; exit 1; }
SOURCES     := $(shell find csrc geofast kernels -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.py' -o -name '*.png') CMakeLists.txt pyproject.toml constraints.txt constraints-cpu.txt

.PHONY: demo test check bench bench-compare sanitize clean

demo: $(VENV)/.demo
	$(BIN)/geofast demo satellite --out runs/satellite --overwrite

# Three times: as `make demo` installs geofast; beside open_clip, timm and torchvision, whose presence
# makes transformers take other processors; and with the oldest transformers that geofast takes.
test: $(VENV)/.dev $(VENV)/.zoo $(VENV)/.oldest
	$(PYTEST)
	$(ALONE)
	PYTHONPATH="$(ZOO)" $(PYTEST) $(foreach part,zoo families doctor roles edits_everywhere,tests/test_$(part).py)
	PYTHONPATH="$(OLDEST):$(ZOO)" $(PYTEST) -m oldest $(foreach part,families edits_everywhere,tests/test_$(part).py)

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h kernels/cuda/* tests/cuda_emulator/*)
	$(BIN)/mypy
	$(BIN)/python -P -m geofast.kernels.compile_report

sanitize: $(VENV)/.dev
	PYTHON="$(abspath $(BIN)/python)" tools/sanitize.sh

bench: $(VENV)/.dev
	$(BIN)/python bench/run.py

bench-compare: $(VENV)/.dev
	$(BIN)/python bench/run.py --compare

clean:
	rm -rf $(VENV) build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { echo "make needs Python 3.10 or newer with the venv module; set PYTHON=..." >&2; exit 1; }

$(VENV)/.demo: $(BIN)/python $(SOURCES)
	@echo "Installing geofast and what the demo needs into $(VENV) (about two minutes the first time)"
	$(PIP) -e '.[demo]' $(OR_SAY_WHY)
	touch $@

$(VENV)/.zoo: constraints-zoo.txt | $(BIN)/python
	@echo "Installing open_clip, timm and torchvision into $(ZOO), for tests alone"
	rm -rf "$(ZOO)"
	$(PIP) --no-deps --target "$(ZOO)" -r constraints-zoo.txt $(OR_SAY_WHY)
	touch $@

$(VENV)/.oldest: constraints-oldest.txt | $(BIN)/python
	@echo "Installing the oldest transformers that geofast takes into $(OLDEST), for tests alone"
	rm -rf "$(OLDEST)"
	$(INSTALL) --no-deps --target "$(OLDEST)" -r constraints-oldest.txt $(OR_SAY_WHY)
	touch $@

$(VENV)/.dev: $(BIN)/python $(SOURCES)
	@echo "Installing geofast and its development tools into $(VENV) (about three minutes the first time)"
	SKBUILD_CMAKE_DEFINE=GEOFAST_WERROR=ON $(PIP) -e '.[dev]' $(OR_SAY_WHY)
	touch $@
