# make demo and make test do all the set-up they need; a second call repeats nothing that did not change.

PYTHON ?= python3
JOBS   ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)

VENV  := .venv
BIN   := $(VENV)/bin
BUILD := build/cmake
STOCK := build/stock
CMAKE := $(BIN)/cmake
NINJA := -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
UPSTREAM_PROGRAMS := llama-archs save-load-state state-restore-fragmented thread-safety
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' tqgguf/__init__.py)
BACKEND_OPS := $(BIN)/python tests/patches/backend_ops.py $(BUILD)/bin/test-backend-ops

built_from := $(if $(CUDA),,! -path 'native/cuda/*' ! -name 'tq_ggml_cuda.*') ! -path '*/__pycache__/*'
sources := CMakeLists.txt pyproject.toml llama_cpp.py $(wildcard README.md) LICENSE build/options \
	$(shell find native patches tqgguf -type f ! -path 'patches/README.md' $(built_from) 2>/dev/null)

# CUDA=1: llama.cpp with its CUDA backend, for this machine's cards or CUDA_ARCHITECTURES.
CUDA               ?=
CUDA_ARCHITECTURES ?= native
export CMAKE_ARGS  := -DGGML_CUDA=$(if $(CUDA),ON "-DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)",OFF) $(CMAKE_ARGS)

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## this list
	@echo "tqgguf: GGUF models with a compressed KV cache"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-24s %s\n", $$1, $$2 }'

demo: build/installed ## build (CUDA=1: with llama.cpp's CUDA backend), then talk to a small model whose cache is pqo3
	$(BIN)/tqgguf demo

check: build/installed build/conformance-configured ## an answer in a minute: lint, quick tests, every kernel's bytes
	+$(MAKE) -j2 --output-sync=target --no-print-directory lint quick-tests conformance-kernels

quick-tests: build/installed
	$(BIN)/python -m pytest tests/unit tests/native --durations=5 \
		-m "not model and not slow and not emulated and not long"

# Two files of tests at a time; what a file has made once is used by all of its tests.
test: build/installed lint ## build, then lint and the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

C_SOURCES = $(shell find native tests benchmarks -name '*.[ch]' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

lint: $(VENV)/ready ## ruff, mypy, clang-format, and shellcheck if it is installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then shellcheck tools/*.sh .ci/run; \
	else echo "skipped shellcheck, which is not installed"; fi

install: build/installed ## build and install into .venv only

conformance: conformance-fast conformance-neon conformance-upstream conformance-cache stock ## all cases, and slow tests
	$(BACKEND_OPS) -o FLASH_ATTN_EXT -p 'pq[ot]'
	TQGGUF_STOCK_LIB=$(STOCK)/cmake/bin $(BIN)/python -m pytest -m stock
	$(BIN)/python -m pytest -m slow
	$(BIN)/python benchmarks/real_models.py --short

conformance-fast: conformance-programs ## the same with a part of the attention cases, for CI
	$(BUILD)/bin/conformance
	$(BUILD)/bin/test-quantize-fns
	$(BACKEND_OPS) -o SET_ROWS,GET_ROWS,CPY,MUL_MAT -p 'pq[ot]'
	$(BACKEND_OPS) -o FLASH_ATTN_EXT -p 'hsk=(64|128),.*kv=(1|113|512),nb=(1|75),.*pq[ot]'

conformance-neon: $(VENV)/ready ## the NEON kernels, cross-compiled and run by qemu-user
	tools/conformance_neon.sh

conformance-cache: build/installed ## 10,000 random sequences of calls on a PqoCache beside a NumPy model of it
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest tests/native/test_cache_model.py

fuzz: build/installed ## every fuzz target for FUZZ_SECONDS (60); needs clang (tools/fuzz.sh)
	tools/fuzz.sh

# Left out are tests that also load llama.cpp, which refuses a second libtqgguf, tests that limit the address space, and
# long ones, most of which the conformance program has.
SANITIZED := $(addprefix tests/native/test_,arguments.py cache.py codebook.py) tests/fuzz/test_replay.py

sanitize: build/installed ## libtqgguf and its tests under the address, undefined-behaviour and thread sanitizers
	TQGGUF_VERSION=$(VERSION) tools/sanitize.sh $(SANITIZED)

cuda: $(VENV)/ready ## the CUDA kernels for this machine's cards (CUDA_ARCHITECTURES=...), for the tests
	CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" tools/cuda.sh build

cuda-test: cuda ## the tests on the GPU; upstream's own with our types, too, after make conformance-programs CUDA=1
	$(BIN)/python -m pytest -m cuda tests/native tests/patches

cuda-bench: build/installed cuda ## tests and speed of the CUDA kernels on the GPU, saved in benchmarks/results
	$(BIN)/python benchmarks/speed/cuda.py

cuda-compile: $(VENV)/ready ## the CUDA code for every supported architecture (ARCH="sm_75 sm_90": these), where nvcc is
	ARCH="$(ARCH)" tools/cuda.sh compile

conformance-upstream: build/installed ## upstream's programs on the patched libllama; every architecture, as docs say
	$(CMAKE) -S . -B $(BUILD) -DTQGGUF_TOOLS=ON >build/configure.log 2>&1 || { cat build/configure.log; exit 1; }
	$(CMAKE) --build $(BUILD) $(UPSTREAM_PROGRAMS:%=--target test-%)
	$(BIN)/python tests/patches/upstream_programs.py $(BUILD)/bin tqgguf/demo/demo.gguf
	$(BIN)/python tests/patches/upstream_architectures.py $(BUILD)/bin/test-llama-archs

conformance-programs: build/installed build/conformance-configured
	$(CMAKE) --build $(BUILD) --target upstream_tests --target conformance

conformance-kernels: build/installed build/conformance-configured ## every kernel writes the bytes of the oracle
	$(CMAKE) --build $(BUILD) --target conformance
	$(BUILD)/bin/conformance

build/conformance-configured: build/installed
	$(CMAKE) -S . -B $(BUILD) -DTQGGUF_CONFORMANCE=ON >build/configure.log 2>&1 || { cat build/configure.log; exit 1; }
	@touch $@

# The same release without the series, built the same way; stock types and speed are compared with it. It has the
# first fix of the series, without which it crashes on processors with AMX.
stock: stock-configured
	$(CMAKE) --build $(STOCK)/cmake --target llama --target mtmd

stock-tools: stock-configured ## stock llama-bench and llama-perplexity, in build/stock/cmake/bin
	$(CMAKE) --build $(STOCK)/cmake --target llama-bench --target llama-perplexity

stock-configured: build/installed
	$(BIN)/python patches/tool.py --work $(STOCK)/source apply --stock llama.cpp/fixes/0001
	$(CMAKE) $(NINJA) -S $(STOCK)/source/llama.cpp -B $(STOCK)/cmake -DCMAKE_BUILD_TYPE=Release \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
		-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DGGML_RPC=ON -DGGML_RPC_RDMA=OFF \
		>build/stock/configure.log 2>&1 || { cat build/stock/configure.log; exit 1; }

tools: build/installed ## llama.cpp's programs and upstream's test programs, in build/bin
	$(CMAKE) -S . -B $(BUILD) -DTQGGUF_TOOLS=ON >build/configure.log 2>&1 || { cat build/configure.log; exit 1; }
	$(CMAKE) --build $(BUILD) --target tools
	ln -sfn cmake/bin build/bin

wheel: build/wheel-tools ## the wheel for any x86-64 Linux, in dist/ (docs/wheels.md)
	$(call wheel_by,wheel,manylinux.cmake)

wheel-arm64: build/wheel-tools ## the same for any ARM64 Linux, compiled on this machine whatever it is
	_PYTHON_HOST_PLATFORM=linux-aarch64 $(call wheel_by,wheel-arm64,manylinux_aarch64.cmake)

# $(call wheel_by,FOLDER,TOOLCHAIN): builds in build/FOLDER; auditwheel then gives the wheel the tag of its glibc.
wheel_by = $(BIN)/pip wheel --no-build-isolation --no-deps --wheel-dir build/$(1)/unchecked -C build-dir=build/$(1) \
		-C cmake.define.TQGGUF_ANY_CPU=ON -C cmake.define.CMAKE_TOOLCHAIN_FILE=$(CURDIR)/native/$(2) . && \
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/$(1)/unchecked/*-$(VERSION)-*.whl

wheel-check: build/wheel-tools ## the wheel for this machine in a fresh environment, here and on lesser processors under qemu-user
	tools/wheel_check.sh

wheel-check-arm64: build/wheel-tools ## the wheel for ARM64 under qemu-user, with a Python of Debian for ARM64
	tools/wheel_check.sh aarch64

build/wheel-tools: $(VENV)/ready requirements-wheel.txt
	$(BIN)/pip install --quiet --require-hashes -r requirements-wheel.txt
	@mkdir -p build && touch $@

# Docker, or what understands its commands. HEALTHCHECK is in no image of the format that the others choose by themselves.
CONTAINER ?= $(firstword $(notdir $(shell command -v docker podman 2>/dev/null)) docker)
IMAGE     ?= tqgguf
image_name = $(shell echo '$(IMAGE)' | tr '[:upper:]' '[:lower:]')
image_here = $(image_name):$(VERSION)-$(shell uname -m)

image: ## a container image of the wheel in dist/ for this machine's architecture (docs/release.md)
	$(CONTAINER) build $(if $(findstring podman,$(CONTAINER)),--format docker) $(if $(BASE),--build-arg BASE=$(BASE)) \
		--build-arg VERSION=$(VERSION) --file Containerfile --tag $(image_here) .

image-check: $(VENV)/ready ## that image: it answers, keeps to its memory, runs as no root, and ends when it is asked to
	TQGGUF_IMAGE=$(image_here) TQGGUF_CONTAINER=$(CONTAINER) $(BIN)/python -m pytest tests/packaging/test_image.py

image-login:
	@echo "$$REGISTRY_TOKEN" | $(CONTAINER) login --username "$$REGISTRY_USER" --password-stdin \
		$(firstword $(subst /, ,$(image_name)))

image-push: ## pushes it to IMAGE=registry/name, whose tag says the architecture
	$(CONTAINER) push $(image_here)

image-join: ## one image of those that image-push has pushed for each architecture
	$(CONTAINER) buildx imagetools create --tag $(image_name):$(VERSION) --tag $(image_name):latest \
		$(image_name):$(VERSION)-x86_64 $(image_name):$(VERSION)-aarch64

# With actionlint and hadolint where they are installed, which are no Python packages.
release-check: $(VENV)/ready requirements-release.txt ## workflow, Makefile and Containerfile are right and agree
	$(BIN)/pip install --quiet --require-hashes -r requirements-release.txt
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --pedantic .github/workflows
	@if command -v actionlint >/dev/null; then actionlint; else echo "skipped actionlint, which is not installed"; fi
	@if command -v hadolint >/dev/null; then hadolint Containerfile; \
	else echo "skipped hadolint, which is not installed"; fi
	$(BIN)/python -m pytest tests/unit/test_release.py

release-notes: $(VENV)/ready ## the section of CHANGELOG.md, which must have a day, in build/release
	$(BIN)/python tools/release.py notes build/release/notes.md

release-sums: $(VENV)/ready ## checksums of the wheels in dist/, of which there must be one for each architecture
	$(BIN)/python tools/release.py sums build/release/SHA256SUMS

release-publish: release-notes release-sums ## a release on GitHub with the wheels, of the commit that is checked out
	gh release create v$(VERSION) --target "$$(git rev-parse HEAD)" --title "tqgguf $(VERSION)" \
		--notes-file build/release/notes.md build/release/SHA256SUMS dist/tqgguf-$(VERSION)-*.whl

# Other programs on the machine slow it down, but change nothing that it judges.
MINUTES ?= 30
soak: build/installed ## MINUTES=30 of mixed requests, 10,000 requests to a server, 1,000 kills while a session is saved
	$(BIN)/python benchmarks/endurance/soak.py --minutes $(MINUTES)
	$(BIN)/python benchmarks/endurance/serve_load.py
	$(BIN)/python benchmarks/endurance/session_kill.py --kills 1000
	$(BIN)/python benchmarks/endurance/surface.py --calls 20000

real: build/installed ## two real models: quality, answers and speed of each type, and the tables of the pages
	$(BIN)/python benchmarks/real_models.py

report: $(VENV)/ready ## what becomes of the patches on other releases, which it downloads (patches/README.md)
	$(BIN)/python patches/tool.py report --write

docs: build/installed ## docs/api.md from the docstrings, and the pictures of docs/ anew
	$(BIN)/python docs/generate/api.py
	$(BIN)/python docs/generate/figures.py
	$(BIN)/python docs/generate/terminal.py

check-patches: $(VENV)/ready ## clean apply, byte-equal re-export, idempotence, budget of files and hunks
	$(BIN)/python patches/tool.py check

clean: ## remove everything built or installed here
	rm -rf build dist $(VENV) tqgguf/lib tqgguf/include tqgguf/_bindings

$(VENV)/ready: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"tqgguf needs Python 3.10 or newer, found " + sys.version)'
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "cannot create a virtual environment: install your system's python3-venv package"; exit 1; }
	$(BIN)/pip install --quiet --require-hashes -r requirements-dev.txt
	@touch $@

# What was built with other options is built again.
build/options: FORCE
	@mkdir -p build
	@echo '$(CMAKE_ARGS)' | cmp -s - $@ || echo '$(CMAKE_ARGS)' >$@

build/installed: $(VENV)/ready $(sources)
	@tools/install.sh
	@touch $@

# every target that is no path
.PHONY: $(shell sed -n 's/^\([a-z0-9-]*\):.*/\1/p' Makefile) FORCE
