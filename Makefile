# Two commands: `make demo` (the whole path on the embedded domain, minutes on a laptop) and `make test`.
# PYTHON chooses the interpreter for a new .venv, e.g. `make demo PYTHON=python3.12`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.c2f-installed

.PHONY: demo test test-slow test-all lab clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/c2f run all --profile tiny --run-id demo

# One test process per core, one torch thread in each: two threads on a busy machine can be ten times slower than one.
# Tests go to whichever process is free, and the finished run that many of them read is made once for all.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist load

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m "(slow or browser or slurm) and not study"

test-all: test test-slow

# On the project's folder: outputs, report and figures can be reached. Outputs of notebooks are kept from git (.gitattributes).
lab: $(READY)
	if test -e .git; then git config filter.c2f-notebook.clean 'python3 c2f_utils/notebook/git_filter.py'; fi
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks

# The stamp makes a second call install nothing. A torch that is already in .venv (a CUDA build, say) is kept: its pin is left out.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 \
	  "Python 3.11 or newer is needed and '$(PYTHON)' is older or missing; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	if $(BIN)/python -c 'import torch' 2>/dev/null; then grep -v '^torch==' constraints.txt; else cat constraints.txt; fi \
	  > .venv/constraints.txt
	$(BIN)/python -m pip install --quiet -c .venv/constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build c2f_utils.egg-info .pytest_cache .ruff_cache .hypothesis
	find c2f_utils tests -name __pycache__ -prune -exec rm -rf {} +
