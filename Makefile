# make demo   set up and run the main job: three mechanisms side by side on drawn images, and a report
# make test   set up and run every test
# make faults set up and try every promise at its full count: kills, full disks, lost processes, broken code; docs/RELIABILITY.md
# make lab    set up and open JupyterLab
# make notebooks  run the chapters and write their outputs
# make book   make the chapters, with the outputs they have, a book: build/book/html/index.html
# make slides  set up and make slides of chapters 01 to 05: build/slides
# make classroom  set up, make the students' versions of the assignments, try the grader, grade a class of twelve: build/classroom
# make bench  set up and measure the training speed beside the usual way, lightly, and the limit
# make gpu    set up and measure what wants a GPU; PICTURES=folder or .tar of large ones, DATA=CIFAR-10 if it is not to be downloaded
# make study  set up and measure the paper's claims: hours; stop it at any time, the same command goes on
# make figures  draw every picture of the study and write docs/RESULTS.md, from the rows in data/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OFFLINE := PYTHONPATH=$(CURDIR)/tests/offline TUTORIAL_MOCO_DATA=shapes
DATA ?= cifar10
HALF = $(shell $(BIN)/python -c 'import os; print(max(1, (os.cpu_count() or 1) // 2))')
CHAPTERS := $(patsubst notebooks/%.ipynb,chapter-%,$(wildcard notebooks/*.ipynb))
.PHONY: demo test test-code $(CHAPTERS) faults lab bench gpu study figures notebooks book slides classroom lint clean

demo: $(VENV)/ready-demo
	$(BIN)/tutorial-moco compare --data shapes --minutes 0.8

# Most of the tests gain little from a second processor: so two jobs at a time, half of the processors for each.
test: $(VENV)/ready-test lint
	OMP_NUM_THREADS=$(HALF) $(MAKE) --no-print-directory --keep-going --jobs=2 test-code $(CHAPTERS)

test-code: $(VENV)/ready-test
	$(BIN)/python -m pytest

$(CHAPTERS): chapter-%: $(VENV)/ready-test
	$(OFFLINE) $(BIN)/python tests/solved.py build/solved $*.ipynb

faults: $(VENV)/ready-test
	TUTORIAL_MOCO_FAULTS=1 $(BIN)/python -m pytest tests/faults tests/test_distributed.py tests/test_images.py tests/test_encoded.py

lint: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: $(VENV)/ready-notebooks
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

bench: $(VENV)/ready-benchmarks
	$(BIN)/python -m benchmarks.throughput

gpu: $(VENV)/ready-test
	$(BIN)/python -m pytest tests/test_gpu.py
	$(BIN)/python -m benchmarks.scale $(if $(PICTURES),--data $(PICTURES)) --json data/scale-gpu.json
	$(BIN)/python -m benchmarks.study --encoder resnet18 --only reference --seeds 1 --data $(DATA)

study: $(VENV)/ready-demo
	$(BIN)/python -m benchmarks.study

figures: $(VENV)/ready-demo
	$(BIN)/python -m benchmarks.figures

notebooks: $(VENV)/ready-notebooks
	$(BIN)/python book/execute.py

book: $(VENV)/ready-book
	$(BIN)/python book/build.py

slides: $(VENV)/ready-book
	$(BIN)/python book/slides.py

classroom: $(VENV)/ready-classroom
	$(BIN)/python tests/classroom.py

# One environment; each command adds what it needs, and again when pyproject.toml has changed.
$(VENV)/ready-demo: EXTRAS =
$(VENV)/ready-test: EXTRAS = [notebooks,book,classroom,export,test]
$(VENV)/ready-notebooks: EXTRAS = [notebooks]
$(VENV)/ready-book: EXTRAS = [notebooks,book]
$(VENV)/ready-classroom: EXTRAS = [notebooks,classroom]
$(VENV)/ready-benchmarks: EXTRAS = [benchmarks]
$(VENV)/ready-%: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (the first time about 5 GB and a few minutes: PyTorch)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.$(EXTRAS)'
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
