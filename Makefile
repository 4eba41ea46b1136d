# Everything a contributor or CI runs. Each target does its own set-up from Python 3.11 and make alone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := all,lint

.PHONY: help setup demo test test-fast fuzz lint format bench gpu ranking matrix default-spacings weights distill-report tune-report clean

help:            ## what there is
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

setup: $(STAMP)  ## make .venv and install the project with every extra that CI needs

$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: setup      ## sample digits from the trained network with several solvers, with error and speed
	$(BIN)/fewstep compare --model digits --plot compare.png
	$(BIN)/fewstep sample --model digits --solver dpmpp_2m --steps 15 --guidance 2 --seed 0 --n 60 --out digits.png

test: setup      ## every test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: setup ## under 2 minutes: leaves out the slow tests (training, tuning, compilers, fresh processes) and a GPU's
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

SEED ?= $(shell date +%s)
fuzz: setup      ## the long fuzz profile, from a printed seed (SEED=7 repeats one): an hour or more
	FUZZ=long $(BIN)/python -m pytest tests/test_fuzz.py -n 0 --hypothesis-seed=$(SEED)

# mypy cannot follow the editable install's import hook, so it reads a real installation.
lint: setup      ## ruff, ruff format --check, mypy --strict on the installed package and the reports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed build/lib && $(BIN)/python -m pip install -q --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy --strict -p fewstep -p reports

format: setup    ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup     ## step overhead against diffusers and the copy floor, with a summary table
	SAVE=$(SAVE) STRICT=$(STRICT) $(BIN)/python -m pytest bench -p no:xdist -o addopts="-q" -W ignore::DeprecationWarning \
		--benchmark-disable-gc --benchmark-columns=median,iqr,rounds --benchmark-sort=name

RANKED := digits ring digits-exact

ranking: setup   ## rank every solver on three models: the tables and plots of docs/solvers.md (minutes)
	mkdir -p docs/ranking
	for model in $(RANKED); do $(BIN)/fewstep compare --model $$model --all --nfe 8,16 --n 200 \
		--markdown docs/ranking/$$model.md --plot docs/ranking/$$model.png > /dev/null || exit 1; done

matrix: setup    ## run every cell of the feature table, then write docs/matrix.md (about 10 minutes on two cores)
	cd tests && ../$(BIN)/python -m matrix

default-spacings: setup  ## measure every solver's default spacing, into docs/ranking/spacings.md (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m reports.default_spacings

# No network, and nothing is installed into the machine's own python3, which brings torch, triton and pytest. Under 8
# minutes: what runs out of time is interrupted, and the benchmark writes what it has by then.
GPU := env PYTHONPATH=build/gpu $(PYTHON) -m pytest -p no:cacheprovider -W default -o addopts="-ra" -m gpu
gpu:             ## on a machine with a GPU: the GPU tests, then bench/results/<gpu>.json and docs/bench.md's table
	$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu needs a CUDA device')"
	rm -rf build/gpu build/lib && $(PYTHON) -m pip install -q --no-deps --no-index --no-build-isolation --target build/gpu .
	timeout -s INT -k 10 225 $(GPU) tests/test_gpu_runs.py
	timeout -s INT -k 10 225 $(GPU) -s bench/test_gpu.py; status=$$?; \
		PYTHONPATH=build/gpu $(PYTHON) bench/readme.py && exit $$status

weights: setup   ## train the shipped digits U-Net again (minutes on two cores)
	$(BIN)/python -m reports.train_digits

distill-report: setup ## train every distillation run and write docs/distill/results.md (up to an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m reports.distill_report

tune-report: setup  ## compare tuned plans with all hand-made ones, into docs/tuning (QUICK=--quick for a short run)
	OMP_NUM_THREADS=1 $(BIN)/python -m reports.tune_report --out $(or $(OUT),docs/tuning) $(QUICK)

clean:           ## remove the environment and caches
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info
