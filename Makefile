PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-names demo-vlbart demo-video test test-all fresh-install lower-bounds newest lint docs clean

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[video,docs,dev]'
	touch $@

# One process of the launcher, which tells of errors alone; without a GPU it need not look for one.
DEEPSPEED := $(if $(wildcard /dev/nvidia* /dev/dxg /dev/kfd),,DS_ACCELERATOR=cpu )$(BIN)/deepspeed --quiet --num_accelerators 1

DEMO := runs/demo

# A demo that was stopped goes on, and a finished one stays as it is: `make clean` makes room for another.
demo: $(INSTALLED)
	$(BIN)/dora-vl quickstart
	@echo "(here: $(BIN)/dora-vl, or first: source $(BIN)/activate)"

NAMES := runs/demo-names

demo-names: $(INSTALLED)
	$(BIN)/dora-vl quickstart --names

VLDEMO := runs/demo-vlbart
LITE0 := --library timm --name tf_efficientnet_lite0 --weights-in-order --image-size 128 --grid-pool 2 --workers 0 \
	--weights $(DEMO)/assets/efficientnet_lite0/efficientnet-lite0-57934424.pth

demo-vlbart: $(INSTALLED)
	$(BIN)/dora-vl quickstart --fetch-only
	$(BIN)/python -m data_prep.easy_vqa_halves --from $(DEMO)/assets/easy_vqa --to $(VLDEMO)/records
	$(BIN)/python -m data_prep.features --root $(DEMO)/assets/easy_vqa --to $(VLDEMO)/features/train $(LITE0) \
		--records $(VLDEMO)/records/pretrain.jsonl $(VLDEMO)/records/adapt.jsonl
	$(BIN)/python -m data_prep.features --root $(DEMO)/assets/easy_vqa --to $(VLDEMO)/features/test $(LITE0) \
		--records $(VLDEMO)/records/test.jsonl
	$(DEEPSPEED) tasks/vlbart_image.py \
		--config configs/vlbart/demo.yaml --variant pretrain --resume if_stopped
	test -e $(VLDEMO)/base || $(BIN)/dora-vl merge --adapter $(VLDEMO)/pretrain/adapter --to $(VLDEMO)/base
	$(DEEPSPEED) tasks/vlbart_image.py --config configs/vlbart/demo.yaml --variant adapt --resume if_stopped

VIDEO := runs/demo-video

demo-video: $(INSTALLED)
	$(BIN)/dora-vl quickstart --fetch-only
	$(BIN)/python -m data_prep.moving_shapes --to $(VIDEO)/data --seed 1
	$(BIN)/python -m data_prep.features --root $(VIDEO)/data --to $(VIDEO)/features --library timm \
		--name tf_efficientnet_lite0 --weights-in-order \
		--weights $(DEMO)/assets/efficientnet_lite0/efficientnet-lite0-57934424.pth \
		--layer -2 --grid-pool 4 --merge 2 --changes --image-size 128 --frames 6 --workers 0
	$(DEEPSPEED) tasks/vlbart_video.py \
		--config configs/vlbart/demo_video.yaml --variant pretrain --resume if_stopped
	test -e $(VIDEO)/base || $(BIN)/dora-vl merge --adapter $(VIDEO)/pretrain/adapter --to $(VIDEO)/base
	$(DEEPSPEED) tasks/vlbart_video.py --config configs/vlbart/demo_video.yaml --variant adapt --resume if_stopped

lint: $(INSTALLED) docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/hadolint Dockerfile
	$(BIN)/deptry dora_vl tasks data_prep
	$(BIN)/pyright

# The pages as a site, strictly: a broken link or a docstring that is not there ends it. Nothing is fetched to read it.
SITE := build/site

docs: $(INSTALLED)
	$(BIN)/zensical build --strict --clean
	@echo "$(SITE)/index.html; with search: $(BIN)/python -m http.server --directory $(SITE) 8080"

# Two processes of one thread each.
FAST := -m "not slow and not gpu" -q -n 2 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST)

# What the wheel's own dependencies are enough for, from an empty folder: the demo in little, a person's own pictures.
FRESH := runs/fresh-install

fresh-install:
	rm -rf $(FRESH)
	$(PYTHON) tests/fresh_install.py --to $(FRESH)

# Every dependency at the lower bound that pyproject.toml gives it, in an environment of its own; TESTS is what runs there.
LOWER := runs/lower-bounds
TESTS ?= tests

lower-bounds: $(LOWER)/.installed
	OMP_NUM_THREADS=1 $(LOWER)/venv/bin/python -m pytest -m "not slow and not gpu" -q $(TESTS)

$(LOWER)/.installed: pyproject.toml
	rm -rf $(LOWER)/venv
	$(PYTHON) -m venv $(LOWER)/venv
	$(LOWER)/venv/bin/python -m pip install --quiet uv
	$(LOWER)/venv/bin/uv pip install --quiet --python $(LOWER)/venv/bin/python --no-deps --editable .
	$(LOWER)/venv/bin/python tests/lower_bounds.py > $(LOWER)/constraints.txt
	$(LOWER)/venv/bin/uv pip install --quiet --compile-bytecode --python $(LOWER)/venv/bin/python \
		--constraint $(LOWER)/constraints.txt --editable '.[video,dev]'
	touch $@

# The newest release of every dependency, resolved anew each time, in an environment of its own; what others hold back is
# listed. uv's own variables choose where from: UV_TORCH_BACKEND=cpu for a small torch, UV_CONSTRAINT=FILE, UV_OVERRIDE=FILE.
NEWEST := runs/newest

newest:
	rm -rf $(NEWEST)/venv
	$(PYTHON) -m venv $(NEWEST)/venv
	$(NEWEST)/venv/bin/python -m pip install --quiet uv
	$(NEWEST)/venv/bin/uv pip install --quiet --compile-bytecode --python $(NEWEST)/venv/bin/python --editable '.[video,dev]'
	$(NEWEST)/venv/bin/uv pip list --outdated --python $(NEWEST)/venv/bin/python
	OMP_NUM_THREADS=1 $(NEWEST)/venv/bin/python -m pytest $(FAST) $(TESTS)

# Slow tests too, and every annotated shape and type checked at each call, which costs the fast ones a quarter.
test-all: $(INSTALLED) lint
	$(BIN)/python -m pytest -q --jaxtyping-packages=dora_vl,beartype.beartype

# The demos' and tests' output and the tools' caches alone: other folders in runs/ are somebody's training.
clean:
	rm -rf $(DEMO) $(NAMES) $(VLDEMO) $(VIDEO) $(FRESH) $(LOWER) $(NEWEST) build dist .cache .pytest_cache .ruff_cache
