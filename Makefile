# One virtual environment serves all; it is made anew when requirements.txt changes.
PYTHON ?= python3
BIN = .venv/bin
READY = .venv/.ready

.PHONY: demo test lint experiment clean

demo: $(READY)
	$(BIN)/python -m benchmark.demo

experiment: $(READY)
	$(BIN)/python -m benchmark.experiment $(EXPERIMENT)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(READY): requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf .venv demo
