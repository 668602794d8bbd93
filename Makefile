# make demo, test, lint, bench, soak: each installs what it needs into .venv once, then works offline.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint format bench soak clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/gradcomp demo $(ARGS)

# Two files at a time: many tests wait for processes to start, or for what a timeout brings.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What they measure, and how to run them on hosts of your own: docs/BENCHMARKS.md. The last needs root, and says so (2).
RANKS := $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node
bench: $(INSTALLED)
	$(BIN)/gradcomp bench codecs --sizes 1e4,1e6,25e6 --png codecs.png
	$(RANKS) 4 -m gradcomp.bench.all_gather --sizes 0.1,4,16 --beside-gloo
	$(RANKS) 4 -m gradcomp.bench.step_time --model dense --steps 8 --beside-ddp
	$(RANKS) 4 -m gradcomp.bench.ddp_hooks --model vgg11 --steps 8
	$(BIN)/gradcomp bench memory
	$(BIN)/gradcomp bench cluster --rates 100mbit,1gbit --steps 8 --png cluster.png || [ $$? = 2 ]

soak: $(INSTALLED)
	GRADCOMP_SOAK_STEPS=200 $(BIN)/python -m pytest tests/test_engine.py -k identical $(ARGS)
	GRADCOMP_SOAK_PUSHES=100000 $(BIN)/python -m pytest tests/test_server_network.py -k "changes_nothing and async" $(ARGS)
	GRADCOMP_SOAK_KILLS=50 $(BIN)/python -m pytest -s tests/test_server_durability.py -k kills $(ARGS)
	GRADCOMP_SOAK_KILLS=50 $(BIN)/python -m pytest -s tests/test_soak_training.py $(ARGS)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# Debian's python3 may come without ensurepip; its pip can then fill the environment from outside.
# PIP_BUILD_CONSTRAINT: newer versions of pip read this one for the packages the build itself needs.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard gradcomp/kernels/native/*)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv || \
		{ $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]'
	@touch $@
