# On a fresh machine with Python 3.11 or newer: `make demo` (some minutes), then `make test`.
# If Python has another name: `make demo PYTHON=python3.12`.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := 1_data_exploration 2_finetune_models 3_evaluate_results
STRIP := nbstripout --keep-output --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.language_info.version"

.PHONY: demo test quicktest bench notebooks clean

# The three notebooks on the synthetic phantom, then an overlay of one X-ray: see runs/demo/.
demo: .venv/installed
	@mkdir -p runs/demo .venv/etc/ipython
	@# A notebook's kernel is interrupted before it is shut down, and may print that as an error.
	@echo 'import logging; logging.getLogger("IPKernelApp").addFilter(lambda record: "KeyboardInterrupt" not in record.getMessage())' \
		> .venv/etc/ipython/ipython_kernel_config.py
	@for name in $(NOTEBOOKS); do \
		echo "== $$name.ipynb"; \
		$(BIN)/papermill $$name.ipynb runs/demo/$$name.ipynb --log-output --no-progress-bar || exit 1; \
	done
	$(BIN)/python overlay_cam.py -i assets/phantom.png -m demo/resnet18 -o runs/demo/overlay.png
	@echo "== the executed notebooks, three trained networks and overlay.png are in runs/demo/"

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/$(STRIP) --verify *.ipynb
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# The tests that do not train networks, start programs or run notebooks: under two minutes.
quicktest: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

# Compares the speed with that of the usual way, and tests whether a training survives kills.
# Prints tables, and writes them to benchmarks/results/.
bench: .venv/installed
	@for name in training frozen_features kills memory read_table "cam --no-libraries"; do \
		set -- $$name; echo "== benchmarks/$$1.py $$2"; $(BIN)/python benchmarks/$$1.py $$2 || exit 1; \
	done
	@if [ -f runs/demo/resnet18/model.json ]; then $(BIN)/python benchmarks/overlay.py; \
	else echo "overlay.py: left out, it needs the network of make demo"; fi

# After `make demo`: copies the executed notebooks over the committed ones.
notebooks: .venv/installed-dev
	@for name in $(NOTEBOOKS); do cp runs/demo/$$name.ipynb . && $(BIN)/$(STRIP) $$name.ipynb || exit 1; done

.venv/installed: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv runs data/phantom
