# Every target sets up .venv by itself: `make demo` and `make test` are all that a newcomer types.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test lint bench assets clean

demo: .venv/ready
	$(BIN)/trimtab train crd-micro --resume

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: .venv/ready
	$(BIN)/trimtab bench crd-micro

# The built-in model and its recognizer, from nothing; see docs/micro.md.
assets: .venv/ready
	$(BIN)/trimtab train pretrain-micro-vae --resume
	$(BIN)/trimtab train pretrain-micro --resume
	$(BIN)/trimtab train pretrain-recognizer --resume
	cp -r runs/pretrain-micro/export/. src/trimtab/assets/micro/
	cp -r runs/pretrain-recognizer/export/. src/trimtab/assets/recognizer/
	$(BIN)/trimtab train gndm-micro-1step --resume
	cp -r runs/gndm-micro-1step/export/scheduler src/trimtab/assets/micro-turbo/
	$(BIN)/python -c "import torch; from diffusers import SD3Transformer2DModel; SD3Transformer2DModel.from_pretrained( \
		'runs/gndm-micro-1step/export/transformer').half().save_pretrained('src/trimtab/assets/micro-turbo/transformer')"
	cp src/trimtab/assets/micro/transformer/config.json src/trimtab/assets/micro-turbo/transformer/

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis

# torch first, and by its version: where an index has a CPU build of it, that is taken, and no range looks further.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
