# Each target makes what it needs. PYTHON=python3.12 chooses the interpreter, TORCH=torch==2.8.0 the torch requirement;
# another choice than last time makes the environment anew.
PYTHON ?= python3
TORCH ?= torch
BIN := .venv/bin
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt MANIFEST.in $(wildcard csrc/*)
CHOICE := $(PYTHON) $(TORCH)

.PHONY: demo test lint bench report docs wheel clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/minegan-fast demo

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/extra-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/* bench/*.cu tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/*.h

bench: .venv/installed
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,iqr --show-capture=no --record

report: .venv/installed
	$(BIN)/python bench/report.py

docs: .venv/extra-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: .venv/installed
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist *.egg-info minegan_fast/_C*.so minegan_fast/_build.txt .pytest_cache .ruff_cache .hypothesis

# Remade only when the choice differs from the one it holds.
ifneq ($(CHOICE),$(shell cat .venv/choice 2>/dev/null))
.PHONY: .venv/choice
endif
.venv/choice:
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install '$(TORCH)'
	@echo '$(CHOICE)' >$@

.venv/installed: .venv/choice $(BUILT_FROM)
	$(BIN)/python -m pip install -e '.[test]' '$(TORCH)'
	@touch $@

# Requirements of an extra, read from the installed package: installing the extra itself would build the package again.
.venv/extra-%: .venv/installed
	$(BIN)/python -m pip install $$($(BIN)/python -c 'import importlib.metadata as m; \
	print(*(r.split(";")[0].strip() for r in m.requires("minegan_fast") if r.rstrip("\"").endswith("== \"$*")))')
	@touch $@
