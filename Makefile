# make ablation_scan            set up .venv, run the main experiment
# make <experiment> ARGS="-p epochs 30"
# make miniature                the paper in small, hours of every core, to be stopped and started (ARGS=--forecast, --quick)
# make speedrun                 CIFAR-10 with a model below 1 M parameters, 30 minutes; speedrun_long: three hours
# make gpu                      everything a GPU can tell; without one, what was predicted
# make results                  write the README's tables and figures from the records
# make test                     set up .venv, test every notebook and the rest
# make check                    the short test: package in step, ruff, what is fast
# make slow                     the tests that take minutes each: fuzzing, kills
# make lab                      open the notebooks in JupyterLab
# make export | lock            for those who change the code

PYTHON ?= python3
BIN := .venv/bin
EXPERIMENTS := $(filter-out index results, $(basename $(notdir $(wildcard nbs/[a-z]*.ipynb))))

# Certificates are the system's, as for pip, so that a company's proxy is no obstacle.
export UV_SYSTEM_CERTS ?= 1

# Threads sleep while they wait. Threads that spin take the processor from other processes: ten times slower, two at a time on two cores.
export OMP_WAIT_POLICY ?= passive

# Compiled modules are kept in .venv, also where containers say that they should not be: else each start takes three times as long.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help env test check slow lab export lock results miniature speedrun speedrun_long $(EXPERIMENTS)

help:
	@sed -n '/^# make/s/^# //p' Makefile
	@echo "experiments: $(EXPERIMENTS)"

env: .venv/.ready

.venv/.ready: requirements.lock setup.py settings.ini nbs/jupyter_server_config.json
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	mkdir -p .venv/etc/jupyter
	cp nbs/jupyter_server_config.json .venv/etc/jupyter/jupyter_server_config.json
	touch $@

$(EXPERIMENTS): env
	mkdir -p results/$@
	$(BIN)/papermill nbs/$@.ipynb results/$@/executed.ipynb $(ARGS)

miniature: env
	$(BIN)/python -W ignore -m localmamba.miniature $(ARGS)

# One line of results/speedrun/README.md; ARGS="-p seed 1" for another try.
speedrun speedrun_long: env
	mkdir -p results/speedrun
	$(BIN)/papermill nbs/imagenet.ipynb results/speedrun/executed_$@.ipynb -f nbs/configs/imagenet/$@.yaml $(ARGS)

results: env
	$(BIN)/papermill nbs/results.ipynb results/executed.ipynb $(ARGS)

test: env
	$(BIN)/python tests/suite.py
check: env
	$(BIN)/python tests/suite.py --check
slow: env
	$(BIN)/python -m pytest -m slow -n 2

lab: env
	$(BIN)/jupyter lab --notebook-dir . nbs/index.ipynb

export: env
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/contents.py

lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra dev setup.py --output-file requirements.lock
