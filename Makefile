# Everything a contributor or CI runs. Each target does its own set-up from Python 3.11 and make alone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := all,lint

.PHONY: help setup demo test test-torch test-fast fuzz lint format bench gpu ranking matrix default-spacings weights distill-report tune-report docs concept-plots gallery compat leaderboard pipeline-report resolution-report test-diffusers mean-flow-report test-emulated test-ptx leaderboard-long clean

help:            ## what there is
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

setup: $(STAMP)  ## make .venv and install the project with every extra that CI needs

$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
# Only for the network in its wheel, which tests/test_terrain.py samples; it asks for onnxruntime-gpu, which replaces onnxruntime.
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt adaptive-terrain-diffusion
	@touch $@

demo: setup      ## sample digits from the trained network with several solvers, with error and speed
	$(BIN)/fewstep compare --model digits --plot compare.png
	$(BIN)/fewstep sample --model digits --solver dpmpp_2m --steps 15 --guidance 2 --seed 0 --n 60 --out digits.png

test: setup      ## every test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# No part of `test`: these releases come as their CUDA build, 5 GB on disk. The lowest in pyproject.toml are the default.
TORCH ?= 2.11.0
TRITON ?= 3.6.0
OTHER := .venv-torch-$(TORCH)
OTHER_STAMP := $(OTHER)/.installed
$(OTHER_STAMP): pyproject.toml setup.py constraints.txt
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	grep -vE '^(torch|triton|setuptools)==' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install -q -c $(OTHER)/constraints.txt "setuptools>=77,<82" wheel \
		torch==$(TORCH) triton==$(TRITON) diffusers numba safetensors tqdm pytest pytest-xdist pytest-benchmark hypothesis scipy
	$(OTHER)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

test-torch: $(OTHER_STAMP) ## the GPU kernels' tests with other releases of torch and triton: TORCH=2.15.0 TRITON=3.9.0
	$(OTHER)/bin/python -m pytest -n 2 tests/test_triton_compile.py tests/test_triton_interpreted.py \
		tests/test_triton_launch.py tests/test_inductor.py tests/test_torch_ops.py tests/test_device_script.py \
		tests/test_triton_ptx.py

# No part of `test`: the emulator is in tinygrad's repository and in no package, and needs clang.
TINYGRAD ?= ../tinygrad
test-emulated: setup ## the GPU kernels' machine code (gfx942) executed in the emulator of a checkout of tinygrad, TINYGRAD=folder
	test -f $(TINYGRAD)/test/mockgpu/amd/emu.py
	TINYGRAD=$(TINYGRAD) $(BIN)/python -m pytest -n 0 tests/test_triton_emulated.py

test-ptx: setup  ## the GPU kernels' PTX (sm_90) executed in NumPy, in every case of five files of tests/interpreted (a minute)
	PTX=all $(BIN)/python -m pytest -n 0 tests/test_triton_ptx.py

# Each release in a folder of its own, before the installed one on the path; its dependencies are the installed ones.
DIFFUSERS ?= 0.35.0 0.39.0 0.42.1
test-diffusers: setup ## the twins' tests with three releases of diffusers, the oldest in pyproject.toml and the newest among them
	set -e; for version in $(DIFFUSERS); do \
		folder=build/diffusers/$$version; \
		test -d $$folder/diffusers || $(BIN)/python -m pip install -q --no-deps --target $$folder diffusers==$$version; \
		echo "diffusers $$version"; \
		PYTHONPATH=$(CURDIR)/$$folder $(BIN)/python -m pytest -n 2 --dist loadfile tests/test_diffusers_schedulers.py \
			tests/test_diffusers_corrections.py tests/test_diffusers_schedules.py; \
	done

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

# No network, and nothing is installed into the machine's own python3: see the script.
gpu:             ## on a machine with a GPU: bench/results/<gpu>.json and docs/bench.md's table, then the GPU tests
	PYTHON=$(PYTHON) bench/device.sh build/device; status=$$?; cp build/device/*.json bench/results/ && \
		PYTHONPATH=build/gpu $(PYTHON) bench/readme.py && exit $$status

weights: setup   ## train the shipped digits U-Net again (minutes on two cores)
	$(BIN)/python -m reports.train_digits

distill-report: setup ## train every distillation run and write docs/distill/results.md (up to an hour; ONLY="--only adversarial" for some)
	OMP_NUM_THREADS=1 $(BIN)/python -m reports.distill_report $(ONLY)

leaderboard: setup  ## train every distillation method on points and digits, into docs/distill/leaderboard.md (25 minutes; REDO="--redo mean_flow" for some)
	OMP_NUM_THREADS=1 $(BIN)/python -m reports.leaderboard $(REDO)

leaderboard-long: setup  ## which methods' one call reaches the pinwheel's teacher, into docs/distill/leaderboard_long.md (25 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m reports.leaderboard_long $(REDO)

mean-flow-report: setup ## draw what MeanFlow's weight does to the velocity, docs/distill/mean_flow_weight.png (15 s)
	OMP_NUM_THREADS=1 $(BIN)/python -m reports.mean_flow_weight

tune-report: setup  ## compare tuned plans with all hand-made ones, into docs/tuning (QUICK=--quick for a short run)
	OMP_NUM_THREADS=1 $(BIN)/python -m reports.tune_report --out $(or $(OUT),docs/tuning) $(QUICK)

pipeline-report: setup ## how far a plan fitted in a pipeline carries, into docs/plans-in-pipelines.md
	OMP_NUM_THREADS=1 $(BIN)/python -m reports.pipeline_report

resolution-report: setup ## how far a plan fitted at one resolution carries to others, into docs/plans-in-pipelines.md
	OMP_NUM_THREADS=1 $(BIN)/python -m reports.resolution_report

docs: setup      ## the documentation as a site, in build/site; a broken link or a page without a place in the menu is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q
	@echo build/site/index.html

concept-plots: setup  ## draw the pictures of docs/concepts
	$(BIN)/python -m reports.concepts

gallery: setup   ## the figures of docs/gallery.md and its interactive page (TRAIN=--train trains the students anew)
	$(BIN)/fewstep gallery --out docs/gallery $(TRAIN)

compat: setup    ## try the wheel in fresh environments, into docs/compat.md (ONLY="torch-2.14" for one; needs python3.11 to 3.13)
	$(BIN)/python -m reports.compat $(ONLY)

clean:           ## remove the environment and caches
	rm -rf $(VENV) $(LOWEST) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info
