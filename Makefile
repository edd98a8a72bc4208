PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all lint clean

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,video,dev]'
	touch $@

DEMO := runs/demo

demo: $(INSTALLED)
	$(BIN)/python -m data_prep.demo_assets --to $(DEMO)/assets
	$(BIN)/python -m data_prep.easy_vqa --from $(DEMO)/assets/easy_vqa --to $(DEMO)/data
	$(BIN)/deepspeed --num_accelerators 1 tasks/llava_instruct.py \
		--config configs/llava/easyvqa_smollm2_dora.yaml --overwrite true
	@echo
	@echo "The adapter is in $(DEMO)/adapter, its scores in $(DEMO)/metrics.json, pictures of the run in"
	@echo "$(DEMO)/loss_curve.png and $(DEMO)/contact_sheet.png. Ask about a picture of your own, a coloured shape:"
	@echo
	@echo "  $(BIN)/python tasks/image_qa.py --adapter $(DEMO)/adapter --image FILE --question \"what color is the shape?\""

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -q

test-all: $(INSTALLED) lint
	$(BIN)/python -m pytest -q

clean:
	rm -rf runs build dist .pytest_cache .ruff_cache
