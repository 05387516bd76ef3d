# `make retrain` runs the main job, `make test` checks everything; each makes .venv first when it is missing.
PYTHON ?= python3
BIN := .venv/bin
# Names given on the command line (make retrain K=8 DATA=mnist) become parameters of the notebook, in lower case but for a K at the end.
# A value may hold spaces; then Make's list has its further words, too, without an equals sign.
GIVEN := $(filter-out PYTHON,$(foreach v,$(MAKEOVERRIDES),$(if $(findstring =,$(v)),$(firstword $(subst =, ,$(v))))))
named = $(shell echo $(1) | tr A-Z a-z | sed -E 's/(^|_)k$$/\1K/')
PARAMETERS = $(foreach v,$(GIVEN),-p $(call named,$(v)) '$($(v))')
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: retrain test lowest paper bench lab export docs docs-serve
retrain: .venv
	$(BIN)/deepkmeans retrain $(foreach v,$(GIVEN),'$(call named,$(v))=$($(v))')

test: .venv
	$(BIN)/ruff check
	$(ONE_THREAD) $(BIN)/nbdev_test --n_workers 2
	$(ONE_THREAD) $(BIN)/pytest -n 2 --dist loadfile

# Some tests with the lowest versions that pyproject.toml declares, in an environment that is removed afterwards
lowest:
	PYTHON=$(PYTHON) .ci/lowest

# make paper PROTOCOL=smoke|cpu|full SEEDS=3: every notebook of nbs/paper, with the runs that it lacks
paper: .venv
	$(BIN)/deepkmeans reproduce all --protocol $(or $(PROTOCOL),cpu) $(if $(SEEDS),--seeds $(SEEDS))

# The k-means engine against its peers, half an hour on an otherwise idle machine; make bench DEVICE=cuda: on a GPU
bench: .venv
	@mkdir -p runs
	$(BIN)/papermill nbs/benchmarks.ipynb runs/benchmarks.ipynb --log-output --no-progress-bar -p execute True $(PARAMETERS)

lab: .venv
	$(BIN)/jupyter lab nbs

# The page of figures/ and the README's table, then the site into docs/_build/html; no network, no Quarto.
docs: .venv
	$(BIN)/python docs/gallery.py
	$(BIN)/python docs/readme.py
	$(BIN)/python docs/build.py

docs-serve: docs
	$(BIN)/python -m http.server $(or $(PORT),8000) --bind 127.0.0.1 --directory docs/_build/html

export: .venv
	$(BIN)/nbdev_export

.venv: .venv/ready
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[all]' || $(BIN)/pip install -q -e '.[all]'
	touch $@
