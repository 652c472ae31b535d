# make demo | compare | demo-cls | test | test-slow | lint | env. Everything runs in one virtual
# environment, built on first use and again when requirements.txt changes; VENV=... puts it elsewhere.
VENV ?= .venv
PYTHON ?= python3.11
NORM ?= ubn
BIN := $(VENV)/bin

.PHONY: env install demo compare demo-cls test test-slow lint clean

# The package itself is linked in every time: another checkout may share the environment.
env:
	@cmp -s requirements.txt "$(VENV)/requirements.txt" || $(MAKE) --no-print-directory install
	@"$(BIN)/pip" install --quiet --no-build-isolation --no-deps --editable .

install:
	$(PYTHON) -m venv "$(VENV)"
	"$(BIN)/pip" install --upgrade pip 'setuptools<82' wheel ninja
	"$(BIN)/pip" install $$(grep -E '^(torch|torchvision)==' requirements.txt)
	"$(BIN)/pip" install --no-build-isolation -r requirements.txt
	"$(BIN)/pip" install --no-deps --force-reinstall $$(grep '^opencv-python-headless==' requirements.txt)
	cp requirements.txt "$(VENV)/requirements.txt"

# Trains a small Mask R-CNN with UBN, or with another norm: make demo NORM=bn.
DEMO := work_dirs/demo_$(NORM)
DEMO_CONFIG := configs/demo/mask_rcnn_r18_$(NORM)_scenes.py

# Threads that wait spin less than they would: other programs may want the two cores.
demo demo-cls: export GOMP_SPINCOUNT = 10000
demo: env
	"$(BIN)/python" tools/make_scenes.py data/scenes
	rm -rf $(DEMO)
	"$(BIN)/python" tools/train.py $(DEMO_CONFIG) --work-dir $(DEMO)
	"$(BIN)/python" tools/test.py $(DEMO_CONFIG) "$$(cat $(DEMO)/last_checkpoint)" \
		--work-dir $(DEMO)/test --show-dir $(DEMO)/predictions
	"$(BIN)/python" tools/demo.py $(DEMO)

# The demo with both norms, one after the other, and their condensation side by side.
compare:
	$(MAKE) demo NORM=bn
	$(MAKE) demo NORM=ubn
	"$(BIN)/python" tools/plot_condensation.py work_dirs/demo_bn work_dirs/demo_ubn \
		--out work_dirs/plots

# A small classifier on drawn shapes with both norms, side by side too.
demo-cls: env
	rm -rf work_dirs/demo_shapes_bn work_dirs/demo_shapes_ubn
	for norm in bn ubn; do "$(BIN)/python" tools/train.py configs/demo/resnet18_$${norm}_shapes.py \
		--work-dir work_dirs/demo_shapes_$$norm || exit 1; done
	"$(BIN)/python" tools/plot_condensation.py work_dirs/demo_shapes_bn work_dirs/demo_shapes_ubn \
		--out work_dirs/demo_shapes

test: env
	"$(BIN)/python" -m pytest -m 'not slow'

test-slow: env
	"$(BIN)/python" -m pytest -m slow

lint: env
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

clean:
	rm -rf build dist *.egg-info work_dirs data/scenes
