# One virtual environment serves all but `make oldest`; each is made anew when its requirements change.
PYTHON ?= python3
BIN = .venv/bin
READY = .venv/.ready
OLDEST = .venv-oldest
QUICK = tests/test_model.py tests/test_diffusion.py tests/test_samplers.py tests/test_train.py \
	tests/test_main.py::test_released_schedule_and_network tests/test_export.py

.PHONY: demo test fuzz oldest lint experiment clean

demo: $(READY)
	$(BIN)/python -m benchmark.demo

experiment: $(READY)
	$(BIN)/python -m benchmark.experiment $(EXPERIMENT)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

# For FUZZ_MINUTES: random and mutated files through every reader.
FUZZ_MINUTES ?= 60
fuzz: $(READY)
	OMP_NUM_THREADS=1 FUZZ_MINUTES=$(FUZZ_MINUTES) $(BIN)/python -m pytest -q -n 0 -s tests/test_fuzz.py

# A quick part of the tests: network, FLOPs, samplers, training steps, exports.
oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n 2 $(QUICK) -k "not table and not resumed and not terminated"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(READY): requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

$(OLDEST)/.ready: requirements.txt constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q -r requirements.txt -c constraints-oldest.txt
	touch $@

clean:
	rm -rf .venv $(OLDEST) demo
