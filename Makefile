# Every action a person takes with this repository; `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

export PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check
CHECKPOINT := export/checkpoints/companion-nano
BUNDLE := build/companion-nano
DEMO := build/demo
FIRMWARE = $(MAKE) --no-print-directory -C firmware_bridge/firmware OUT=$(CURDIR)/build/firmware
CALIBRATION := build/calibration
QUANTIZED := build/companion-nano-int8
DATA := $(or $(COPRESENCE_DATA),../shared/data)

# glibc gives large blocks back after every operation: on 35 MB an element-wise one took 30 ms, and 1.8 ms with this.
JEMALLOC = LD_PRELOAD=$(firstword $(wildcard /usr/lib/*/libjemalloc.so.2)) MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: $(VENV)/.demo bundle ## make a scene, run the companion on it in real time, and show what it heard, saw, said and did
	$(BIN)/copresence-export scene --out $(DEMO)
	mapfile -t text < $(DEMO)/scene.txt; $(BIN)/copresence run --bundle $(BUNDLE) --mic $(DEMO)/scene.wav --camera $(DEMO)/scene.mkv \
		--text "$${text[@]}" --speaker $(DEMO)/out.wav --events $(DEMO)/events.jsonl --clock realtime
	$(BIN)/copresence-export timeline $(DEMO)

.PHONY: bundle
bundle: $(VENV)/.demo ## build the bundle of the checkpoint in this repository
	$(BIN)/copresence-export build $(CHECKPOINT) --out $(BUNDLE)

.PHONY: engine
engine: bundle ## compile the bundle on a board over ssh and fetch the engine: make engine HOST=user@board TARGET=orin-nano-super
	$(if $(and $(HOST),$(TARGET)),,$(error give HOST=user@board and TARGET, one of export/targets.toml))
	ssh $(HOST) mkdir -p copresence/build
	rsync -a --delete --include='*.py' --include='*.toml' --include='*/' --exclude='*' --prune-empty-dirs device export $(HOST):copresence/
	rsync -a --delete $(BUNDLE)/ $(HOST):copresence/$(BUNDLE)/
	ssh -t $(HOST) "cd copresence && python3 -m export.cli compile $(BUNDLE) --target $(TARGET)"
	rsync -a $(HOST):copresence/$(BUNDLE).$(TARGET).engine $(dir $(BUNDLE))

.PHONY: test
test: lint ## everything that CI checks: lint, then the tests
	$(BIN)/pytest

.PHONY: lint
lint: $(VENV)/.setup ## ruff, mypy, the import rule, and cppcheck for the firmware
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(FIRMWARE) lint

.PHONY: bench
bench: $(VENV)/.setup bundle firmware ## measure the tick, the clock (a figure too) and the bridge in QEMU on this machine, as tables
	$(BIN)/copresence-export bench $(BUNDLE) --firmware build/firmware/bridge-qemu.elf
	$(BIN)/python -m export.clock_bench build/clock.png
	$(BIN)/python -m firmware_bridge.bench build/firmware/bridge-qemu.elf

.PHONY: firmware
firmware: ## build the microcontroller's firmware, and show how large it is
	.ci/packages gcc-arm-none-eabi libnewlib-arm-none-eabi
	$(FIRMWARE) all

.PHONY: flash-mcu
flash-mcu: firmware $(VENV)/.demo ## flash the microcontroller: [PORT=/dev/serial/by-id/… | DFU=1 | SWD=1]
	$(BIN)/copresence-bridge flash build/firmware $(if $(PORT),--port $(PORT)) $(if $(DFU),--by dfu) $(if $(SWD),--by swd)

.PHONY: bridge-soak
bridge-soak: $(VENV)/.setup firmware ## the bridge's long checks on QEMU: five minutes of acts, faults at every rate, a million frames
	COPRESENCE_SOAK=1 $(BIN)/pytest tests/test_bridge_qemu.py tests/test_bridge_core.py -s

.PHONY: calibration
calibration: $(VENV)/.setup bundle ## record a calibration set without hardware: the demonstration's scene, and people of the training split
	rm -rf $(CALIBRATION)
	$(BIN)/copresence-export scene --out $(DEMO)
	mapfile -t text < $(DEMO)/scene.txt; $(BIN)/copresence run --bundle $(BUNDLE) --mic $(DEMO)/scene.wav --camera $(DEMO)/scene.mkv \
		--text "$${text[@]}" --speaker none --clock simulated --record-calibration $(CALIBRATION)
	$(BIN)/copresence-export record $(BUNDLE) --data $(DATA) --out $(CALIBRATION)

.PHONY: quantize
quantize: calibration ## quantize the bundle to INT8 and prove that it still behaves
	$(BIN)/copresence-export quantize $(BUNDLE) --calibration $(CALIBRATION) --out $(QUANTIZED) --sensitivity build/sensitivity
	$(BIN)/copresence-export verify $(QUANTIZED) --against $(BUNDLE) --data $(DATA)

.PHONY: presence
presence: $(VENV)/.setup bundle ## the scoreboard: three kinds of system on the same scenes, with people that training never met
	$(BIN)/copresence-export evaluate $(BUNDLE) --data $(DATA) --ablations --out build/presence

.PHONY: train
train: $(VENV)/.setup ## train the checkpoint in this repository anew; goes on where it was stopped
	$(JEMALLOC) $(BIN)/copresence-export train export/recipes/companion-nano.json \
		--data $(DATA) --work build/train --out $(CHECKPOINT)

.PHONY: setup
setup: $(VENV)/.setup ## install everything into .venv, and the system packages; the other targets do this by themselves

.PHONY: clean
clean: ## delete what was built; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find device export firmware_bridge tests -name __pycache__ -prune -exec rm -rf {} +

# Stamps: a second run costs nothing and needs no network.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		f"copresence needs Python 3.10 or newer; this is {sys.version.split()[0]}. Name another: make PYTHON=python3.12")'
	.ci/packages python3-venv
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	.ci/packages espeak-ng
	$(PIP) --editable '.[bridge,export]'
	@touch $@

$(VENV)/.setup: pyproject.toml | $(BIN)/python
	.ci/packages espeak-ng gcc g++ python3-dev portaudio19-dev pulseaudio libasound2-plugins rt-tests libjemalloc2 \
		gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm cppcheck stress-ng
	@.ci/packages chromium || echo "Going on without Chromium, which Ubuntu has as a snap only: the tests that open the report in it are skipped."
	$(PIP) "$$(sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)" # by itself: the largest by far
	$(PIP) --editable '.[board,reach,export,distill,scoreboard,dev]'
	@touch $(VENV)/.demo $@
