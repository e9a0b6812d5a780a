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
WHEELS := build/wheelhouse
RELEASES := build/releases
SOURCES := $(CURDIR)
RELEASE_PARTS = $(BUNDLE)/manifest.json build/firmware/build.json
# Signs what boards run. Made at the first flash; whoever has it can change every board that trusts it.
KEY := $(HOME)/.config/copresence/release.key
DATA := $(or $(COPRESENCE_DATA),../shared/data)

# One board is its own canary; a fleet waits until each batch has confirmed the release.
PLAYBOOK = $(if $(HOST)$(INVENTORY),,$(error give HOST=user@board or INVENTORY=fleet.ini)) \
	ANSIBLE_CONFIG=device/flash/ansible.cfg $(BIN)/ansible-playbook device/flash/flash.yml \
	-i $(if $(HOST),'$(HOST)$(comma)',$(INVENTORY)) -e repository=$(SOURCES) -e bundle=$(abspath $(BUNDLE)) \
	-e firmware=$(CURDIR)/build/firmware -e key=$(abspath $(KEY)) -e wheels=$(abspath $(WHEELS)) -e out=$(abspath $(RELEASES)) \
	-e wait_good=$(if $(HOST),no,yes) $(FLASH_OPTIONS)
comma := ,

# glibc gives large blocks back after every operation: on 35 MB an element-wise one took 30 ms, and 1.8 ms with this.
JEMALLOC = LD_PRELOAD=$(firstword $(wildcard /usr/lib/*/libjemalloc.so.2)) MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1

# The companion's own program on a board, as root, who may read the journal; a connection that is cut is noticed within 15 s.
on_board = $(if $(HOST),,$(error give HOST=user@board)){ ssh $(1) -o ServerAliveInterval=5 -o ServerAliveCountMax=3 $(HOST) \
	'$$([ "$$(id -u)" = 0 ] || echo sudo -n) /opt/copresence/current/venv/bin/copresence $(2)' \
	|| { status=$$?; [ $$status -ne 255 ] || echo "No connection to $(HOST), or it was cut; once it is back: make $@ HOST=$(HOST)" >&2; exit $$status; }; }

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: $(VENV)/.demo bundle ## make a scene, run the companion on it in real time, and show what it heard, saw, said and did
	$(BIN)/copresence-export scene --out $(DEMO)
	mapfile -t text < $(DEMO)/scene.txt; $(BIN)/copresence run --bundle $(BUNDLE) --mic $(DEMO)/scene.wav --camera $(DEMO)/scene.mkv \
		--text "$${text[@]}" --speaker $(DEMO)/out.wav --events $(DEMO)/events.jsonl --clock realtime
	$(BIN)/copresence-export timeline $(DEMO)

.PHONY: talk
talk: $(VENV)/.demo bundle ## sit down in front of the companion with a browser: prints the address of a page to talk to  [ARGS='--think URL']
	$(BIN)/copresence serve --bundle $(BUNDLE) $(ARGS)

.PHONY: bundle
bundle: $(VENV)/.demo ## build the bundle of the checkpoint in this repository
	$(BIN)/copresence-export build $(CHECKPOINT) --out $(BUNDLE)

.PHONY: engine
engine: ## compile the bundle on a board over ssh and fetch the engine, signed where there is a KEY: make engine HOST=user@board TARGET=…
	@.ci/board "$(HOST)" "$(TARGET)"
	$(MAKE) --no-print-directory bundle
	ssh $(HOST) mkdir -p copresence/build
	rsync -a --delete --include='*.py' --include='*.toml' --include='*/' --exclude='*' --prune-empty-dirs device export $(HOST):copresence/
	rsync -a --delete $(BUNDLE)/ $(HOST):copresence/$(BUNDLE)/
	ssh -t $(HOST) "cd copresence && python3 -m export.cli compile $(BUNDLE) --target $(TARGET)"
	rsync -a $(HOST):copresence/$(BUNDLE).$(TARGET).engine $(dir $(BUNDLE))
	$(if $(or $(wildcard $(KEY)),$(filter-out file,$(origin KEY))),$(BIN)/copresence-export sign $(BUNDLE).$(TARGET).engine --key $(KEY))

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
bench: $(VENV)/.setup bundle firmware ## measure the tick, the clock (a figure too), the bridge in QEMU and the network on this machine, as tables
	$(BIN)/copresence-export bench $(BUNDLE) --firmware build/firmware/bridge-qemu.elf
	$(BIN)/python -m export.clock_bench build/clock.png
	$(BIN)/python -m firmware_bridge.bench build/firmware/bridge-qemu.elf
	$(BIN)/python -m device.serve.bench $(BUNDLE)

.PHONY: firmware
firmware: ## build the microcontroller's firmware, and show how large it is
	.ci/packages gcc-arm-none-eabi libnewlib-arm-none-eabi
	$(FIRMWARE) all

.PHONY: flash-mcu
flash-mcu: firmware $(VENV)/.demo ## flash the microcontroller: [PORT=/dev/serial/by-id/… | DFU=1 | SWD=1]
	$(BIN)/copresence-bridge flash build/firmware $(if $(PORT),--port $(PORT)) $(if $(DFU),--by dfu) $(if $(SWD),--by swd)

.PHONY: flash
flash: $(VENV)/.flash $(KEY) $(RELEASE_PARTS) ## bring a release onto boards: HOST=user@board, or INVENTORY=fleet.ini
	$(PLAYBOOK)

.PHONY: flash-dry
flash-dry: $(VENV)/.flash $(KEY) $(RELEASE_PARTS) ## show what flash would change, and change nothing: HOST=…, or INVENTORY=…
	$(PLAYBOOK) --check --diff

.PHONY: wheelhouse
wheelhouse: $(VENV)/.flash ## collect the wheels that a kind of board installs: TARGET=orin-jp6, orin-jp7, thor or twin
	$(if $(TARGET),,$(error give TARGET, one of device/flash/targets.toml))
	$(BIN)/copresence-export wheelhouse --target $(TARGET) --out $(WHEELS)/$(TARGET)

.PHONY: flash-image
flash-image: $(VENV)/.demo ## write the whole disk of a Jetson in recovery mode: TARGET=orin-jp7 BOARD=… L4T=…/Linux_for_Tegra PUBLIC_KEY=~/.ssh/….pub
	$(if $(DRY),,sudo) $(BIN)/python -m device.flash.image --target "$(TARGET)" --board "$(BOARD)" --l4t "$(L4T)" --ssh-key "$(PUBLIC_KEY)" $(if $(DRY),--dry)

.PHONY: twin
twin: $(VENV)/.flash ## boot a board's twin under systemd-nspawn, to flash and to look at; Ctrl-C ends it
	.ci/packages debootstrap systemd-container rsync eatmydata
	$(BIN)/python tests/twin.py

.PHONY: twin-test
twin-test: $(VENV)/.setup $(VENV)/.flash $(RELEASE_PARTS) ## flash, boot, break and roll back twins, all of it (about an hour)
	COPRESENCE_TWIN=all $(BIN)/pytest tests/test_twin.py -s

.PHONY: bridge-soak
bridge-soak: $(VENV)/.setup firmware ## the bridge's long checks on QEMU: five minutes of acts, faults at every rate, a million frames
	COPRESENCE_SOAK=1 $(BIN)/pytest tests/test_bridge_qemu.py tests/test_bridge_core.py -s

.PHONY: camera-test
camera-test: $(VENV)/.setup ## picamera2 and libcamera with a virtual camera, in a Debian 13 root of their own; needs root, and minutes at first
	.ci/packages debootstrap
	tests/camera_root/make_root.sh build/camera-root
	$(BIN)/pytest tests/test_camera_root.py

.PHONY: fuzz-firmware
fuzz-firmware: firmware ## ten minutes of libFuzzer on the firmware's parser and core (SECONDS=…); what is new goes into tests/corpus
	.ci/packages clang
	$(FIRMWARE) CORPUS=$(CURDIR)/tests/corpus SECONDS=$(or $(SECONDS),600) fuzz

.PHONY: logs
logs: ## follow what the companion on a board tells: make logs HOST=user@board [ARGS='--level warning --grep bridge']
	@$(call on_board,-t,logs --follow $(ARGS))

.PHONY: top
top: ## watch what the companion on a board hears, sees, says and does: make top HOST=user@board
	@$(call on_board,-t,top)

.PHONY: doctor
doctor: ## what is wrong with a board, and what to do about it: make doctor HOST=user@board [ARGS=--json]
	@$(call on_board,,doctor $(ARGS))

.PHONY: pull
pull: ## fetch journal, versions and dumps of a board in one archive, for a bug report: make pull HOST=user@board
	@mkdir -p build
	@$(call on_board,,pull) > build/.pull
	@mv build/.pull build/copresence-$(HOST)-$$(date +%Y%m%dT%H%M%S).tar.gz
	@ls build/copresence-$(HOST)-*.tar.gz | tail -n 1

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
presence: $(VENV)/.setup bundle ## the scoreboard: three kinds of system on the same scenes, with people that training never met; of the INT8 bundle if there is one
	$(BIN)/copresence-export evaluate $(if $(wildcard $(QUANTIZED)/manifest.json),$(QUANTIZED),$(BUNDLE)) --data $(DATA) --ablations --out build/presence

.PHONY: train
train: $(VENV)/.setup ## train the checkpoint in this repository anew, and the teachers of its last stages; goes on where it was stopped
	$(JEMALLOC) $(BIN)/copresence-export distill export/recipes/companion-nano.json \
		--data $(DATA) --work build/train --out $(CHECKPOINT)

.PHONY: setup
setup: $(VENV)/.setup ## install everything into .venv, and the system packages; the other targets do this by themselves

.PHONY: clean
clean: ## delete what was built; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find device export firmware_bridge tests -name __pycache__ -prune -exec rm -rf {} +

# Where they are not there yet; `make bundle firmware` makes both anew.
$(BUNDLE)/manifest.json:
	$(MAKE) --no-print-directory bundle

build/firmware/build.json:
	$(MAKE) --no-print-directory firmware

$(HOME)/.config/copresence/release.key:
	mkdir -p $(@D)
	$(BIN)/copresence-export keygen --out $@

# Stamps: a second run costs nothing and needs no network.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		f"copresence needs Python 3.10 or newer; this is {sys.version.split()[0]}. Name another: make PYTHON=python3.12")'
	.ci/packages python3-venv
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	.ci/packages espeak-ng
	$(PIP) --editable '.[bridge,export,serve]'
	@touch $@

$(VENV)/.flash: pyproject.toml $(VENV)/.demo | $(BIN)/python
	.ci/packages rsync
	$(PIP) --editable '.[flash]'
	@touch $@

$(VENV)/.setup: pyproject.toml | $(BIN)/python
	.ci/packages espeak-ng gcc g++ python3-dev portaudio19-dev pulseaudio libasound2-plugins rt-tests libjemalloc2 libsamplerate0 \
		gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm cppcheck stress-ng rsync \
		pkg-config libgirepository1.0-dev libcairo2-dev gir1.2-gstreamer-1.0 gstreamer1.0-plugins-base
	@.ci/packages debootstrap systemd-container eatmydata || echo "Going on without a twin: the tests that flash one are skipped."
	@.ci/packages chromium || echo "Going on without Chromium, which Ubuntu has as a snap only: the tests that open the report in it are skipped."
	$(PIP) "$$(sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)" # by itself: the largest by far
	$(PIP) --editable '.[board,reach,serve,export,distill,scoreboard,flash,dev]'
	@touch $(VENV)/.demo $(VENV)/.flash $@
