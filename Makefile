# make demo | compare | demo-cls | test | test-slow | test-oldest | test-newest | gpu-check | lint | docs | doctor | env.
# Everything runs in one virtual environment, built on first use and again when requirements.txt
# changes; VENV=... puts it elsewhere. Nothing is compiled, unless OPS=1 asks for mmcv's own operators;
# OPS=0 goes back.
VENV ?= .venv
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
DOCS ?= .venv-docs
PYTHON ?= python3.11
NORM ?= ubn
BIN := $(VENV)/bin

# What mmcv's operators are, and what they were made for: "1 onedl-mmcv==... torch==...".
OPS ?= $(or $(shell cut -c 1 "$(VENV)/operators" 2>/dev/null),0)
OPERATORS = $(OPS) $(shell grep -E '^(onedl-mmcv|torch)==' requirements.txt)
$(if $(filter 0 1,$(OPS)),,$(error OPS=$(OPS): 1 compiles the operators of mmcv, 0 takes those of torchvision))

.PHONY: env install operators operators-0 operators-1 oldest docs-env doctor
.PHONY: demo compare demo-cls test test-slow test-oldest test-newest gpu-check lint docs clean

# The package itself is linked in every time: another checkout may share the environment.
env:
	@cmp -s requirements.txt "$(VENV)/requirements.txt" || $(MAKE) --no-print-directory install
	@$(MAKE) --no-print-directory operators
	@PYTHONWARNINGS=ignore "$(BIN)/pip" install --quiet --no-build-isolation --no-deps --editable .

install:
	$(PYTHON) -m venv "$(VENV)"
	"$(BIN)/pip" install --upgrade pip 'setuptools<82' wheel ninja
	"$(BIN)/pip" install $$(grep -E '^(torch|torchvision)==' requirements.txt)
	$(MAKE) --no-print-directory operators
	"$(BIN)/pip" install --no-build-isolation -r requirements.txt
	"$(BIN)/pip" install --no-deps --force-reinstall $$(grep '^opencv-python-headless==' requirements.txt)
	cp requirements.txt "$(VENV)/requirements.txt"

operators:
	@test "$$(cat "$(VENV)/operators" 2>/dev/null)" = "$(OPERATORS)" || $(MAKE) --no-print-directory operators-$(OPS)
	@test $(OPS) = 1 || cmp -s tools/mmcv_ops/mmcv/_ext.py "$(VENV)"/lib/python*/site-packages/mmcv/_ext.py || \
		"$(BIN)/pip" install --quiet --no-build-isolation --no-deps --force-reinstall ./tools/mmcv_ops

# Build isolation hides torch from mmcv's setup.py, which then compiles nothing. Neither this wheel nor
# the next may pass through pip's cache, where the two have one name.
operators-0:
	"$(BIN)/pip" install --no-cache-dir --no-binary onedl-mmcv --no-deps --force-reinstall \
		$$(grep '^onedl-mmcv==' requirements.txt)
	echo "$(OPERATORS)" > "$(VENV)/operators"

# A quarter of an hour on two idle cores, where pip finds no wheel.
operators-1:
	"$(BIN)/pip" install --no-cache-dir --no-build-isolation --no-deps --force-reinstall \
		$$(grep '^onedl-mmcv==' requirements.txt)
	"$(BIN)/pip" uninstall --quiet --yes mmcv-torchvision-ops
	echo "$(OPERATORS)" > "$(VENV)/operators"

# What the environment is and what does not fit; runs where `make env` failed as well.
doctor:
	@for python in "$(BIN)/python" $(PYTHON) python3; do \
		if command -v "$$python" > /dev/null; then exec "$$python" mmubn/doctor.py; fi; done

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

# Side by side on as many cores, of which each takes about 1.5 GB. Each gets its share in the order of the
# files, so that what a file prepares is made once; who ends first takes over some of the others.
WORKERS ?= auto
FAST := -m 'not slow' -n $(WORKERS) --maxprocesses 4 --dist worksteal
test: env
	"$(BIN)/python" -m pytest $(FAST)

test-slow: env
	"$(BIN)/python" -m pytest -m slow

# The fast tests on the oldest torch that the package takes, with the upstream packages, whose mmengine
# finds no configs in a package that is linked in; so it must not be the checkout's that is imported.
test-oldest:
	@cmp -s tests/requirements-oldest.txt "$(OLDEST)/requirements.txt" || $(MAKE) --no-print-directory oldest
	@"$(OLDEST)/bin/pip" install --quiet --no-build-isolation --no-deps --force-reinstall . ./tools/mmcv_ops
	"$(OLDEST)/bin/pytest" $(FAST)

oldest:
	$(PYTHON) -m venv "$(OLDEST)"
	"$(OLDEST)/bin/pip" install --upgrade pip
	"$(OLDEST)/bin/pip" install -r tests/requirements-oldest.txt
	"$(OLDEST)/bin/pip" install --no-deps --force-reinstall $$(grep '^opencv-python-headless==' tests/requirements-oldest.txt)
	cp tests/requirements-oldest.txt "$(OLDEST)/requirements.txt"

# The fast tests with the newest packages, as pip installs them today by the README's command.
test-newest:
	@test -d "$(NEWEST)" || $(PYTHON) -m venv "$(NEWEST)"
	"$(NEWEST)/bin/pip" install --quiet --upgrade --upgrade-strategy eager '.[mm,test]' ./tools/mmcv_ops
	"$(NEWEST)/bin/pip" install --quiet --no-deps --force-reinstall \
		$$("$(NEWEST)/bin/pip" freeze | grep '^opencv-python-headless==')
	"$(NEWEST)/bin/pytest" $(FAST)

# On a machine with a GPU: the kernel tests, then the benchmarks, in ten minutes.
gpu-check: env
	"$(BIN)/python" tools/gpu_check.py

lint: env
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

# The site, into site/. Its environment is small: the code is read, not imported.
docs:
	@cmp -s docs/requirements.txt "$(DOCS)/requirements.txt" || $(MAKE) --no-print-directory docs-env
	NO_MKDOCS_2_WARNING=1 "$(DOCS)/bin/mkdocs" build --strict

docs-env:
	$(PYTHON) -m venv "$(DOCS)"
	"$(DOCS)/bin/pip" install --quiet -r docs/requirements.txt
	cp docs/requirements.txt "$(DOCS)/requirements.txt"

clean:
	rm -rf build site dist *.egg-info work_dirs data/scenes
