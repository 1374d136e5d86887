# make demo and make test do all the set-up they need; a second call repeats nothing that did not change.

PYTHON ?= python3
JOBS   ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)

VENV  := .venv
BIN   := $(VENV)/bin
BUILD := build/cmake
STOCK := build/stock
CMAKE := $(BIN)/cmake
BACKEND_OPS := $(BIN)/python tests/patches/backend_ops.py $(BUILD)/bin/test-backend-ops

sources := CMakeLists.txt pyproject.toml llama_cpp.py $(wildcard README.md) LICENSE build/options $(shell find native patches tqgguf -type f \
	! -path '*/__pycache__/*' ! -path 'patches/README.md' $(if $(CUDA),,! -path 'native/cuda/*' ! -name 'tq_ggml_cuda.*') 2>/dev/null)

# CUDA=1: llama.cpp with its CUDA backend, for this machine's cards or CUDA_ARCHITECTURES.
CUDA               ?=
CUDA_ARCHITECTURES ?= native
export CMAKE_ARGS  := -DGGML_CUDA=$(if $(CUDA),ON "-DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)",OFF) $(CMAKE_ARGS)

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## this list
	@echo "tqgguf: GGUF models with a compressed KV cache"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-24s %s\n", $$1, $$2 }'

demo: build/installed ## build (CUDA=1: with llama.cpp's CUDA backend), then talk to a small model whose cache is pqo3
	$(BIN)/tqgguf demo

test: build/installed lint ## build, then ruff, mypy and the tests
	$(BIN)/python -m pytest

lint: $(VENV)/ready ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: build/installed ## build and install into .venv only

conformance: conformance-fast conformance-neon stock ## every kernel and upstream's own tests, all cases; stock types bit for bit
	$(BACKEND_OPS) -o FLASH_ATTN_EXT -p 'pq[ot]'
	TQGGUF_STOCK_LIB=$(STOCK)/cmake/bin $(BIN)/python -m pytest tests/native/test_stock_types.py

conformance-fast: conformance-programs ## the same with a part of the attention cases, for CI
	$(BUILD)/bin/conformance
	$(BUILD)/bin/test-quantize-fns
	$(BACKEND_OPS) -o SET_ROWS,GET_ROWS,CPY,MUL_MAT -p 'pq[ot]'
	$(BACKEND_OPS) -o FLASH_ATTN_EXT -p 'hsk=(64|128),.*kv=(1|113|512),nb=(1|75),.*pq[ot]'

conformance-neon: $(VENV)/ready ## the NEON kernels, cross-compiled and run by qemu-user
	@if command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64 >/dev/null; then \
		$(CMAKE) -G Ninja -S native -B build/neon -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DTQGGUF_VERSION=conformance -DTQGGUF_CONFORMANCE=ON \
			-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc >/dev/null && \
		$(CMAKE) --build build/neon && qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/conformance; \
	else echo "skipped neon: it needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)"; fi

cuda: $(VENV)/ready ## the CUDA kernels for this machine's cards (CUDA_ARCHITECTURES=...), as a library that the tests load
	$(CMAKE) -G Ninja -S native -B build/cuda -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DTQGGUF_VERSION=cuda -DTQGGUF_CUDA=ON \
		"-DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/build/cuda >/dev/null
	$(CMAKE) --build build/cuda --target tqgguf_cuda

cuda-test: cuda ## the tests on the GPU; upstream's own with our types, too, after make conformance-programs CUDA=1
	$(BIN)/python -m pytest -m cuda tests/native tests/patches

cuda-bench: build/installed cuda ## tests and speed of the CUDA kernels on the GPU, saved in benchmarks/results
	$(BIN)/python benchmarks/cuda.py

cuda-compile: $(VENV)/ready ## native/cuda for every supported architecture and the patched ggml-cuda.cu, where nvcc is present
	@if command -v nvcc >/dev/null; then $(BIN)/python patches/tool.py apply >/dev/null && \
		$(BIN)/python native/cuda/resources.py --compile build/cuda-compile --upstream build/upstream/llama.cpp; \
	else echo "skipped cuda: there is no nvcc (CUDA toolkit 12 or newer)"; fi

conformance-programs: build/installed
	$(CMAKE) -S . -B $(BUILD) -DTQGGUF_CONFORMANCE=ON >build/configure.log 2>&1 || { cat build/configure.log; exit 1; }
	$(CMAKE) --build $(BUILD) --target upstream_tests --target conformance

# The same release without the series, built the same way: what stock types and speed are compared with. Of the series it has
# patch 7 alone, without which it crashes on processors with AMX.
stock: stock-configured
	$(CMAKE) --build $(STOCK)/cmake --target llama --target mtmd

stock-tools: stock-configured ## stock llama-bench and llama-perplexity, in build/stock/cmake/bin
	$(CMAKE) --build $(STOCK)/cmake --target llama-bench --target llama-perplexity

stock-configured: build/installed
	$(BIN)/python patches/tool.py --work $(STOCK)/source apply --stock 0007
	$(CMAKE) -G Ninja -S $(STOCK)/source/llama.cpp -B $(STOCK)/cmake -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=Release \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
		-DLLAMA_OPENSSL=OFF >build/stock/configure.log 2>&1 || { cat build/stock/configure.log; exit 1; }

tools: build/installed ## patched llama-cli, -server, -bench, -perplexity and upstream's test programs, in build/bin
	$(CMAKE) -S . -B $(BUILD) -DTQGGUF_TOOLS=ON >build/configure.log 2>&1 || { cat build/configure.log; exit 1; }
	$(CMAKE) --build $(BUILD) --target tools
	ln -sfn cmake/bin build/bin

wheel: build/installed ## the wheel, in dist/
	$(BIN)/pip wheel --no-build-isolation --no-deps --wheel-dir dist .

docs: build/installed ## docs/api.md from the docstrings, and the pictures of docs/ anew
	$(BIN)/python docs/generate/api.py
	$(BIN)/python docs/generate/figures.py
	$(BIN)/python docs/generate/terminal.py

check-patches: $(VENV)/ready ## clean apply, byte-equal re-export, idempotence, line budget
	$(BIN)/python patches/tool.py check

clean: ## remove everything built or installed here
	rm -rf build dist $(VENV) tqgguf/lib tqgguf/include tqgguf/_bindings

$(VENV)/ready: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tqgguf needs Python 3.10 or newer, found " + sys.version)'
	@$(PYTHON) -m venv $(VENV) || { echo "cannot create a virtual environment: install your system's python3-venv package"; exit 1; }
	$(BIN)/pip install --quiet -r requirements-dev.txt
	@touch $@

# What was built with other options is built again.
build/options: FORCE
	@mkdir -p build
	@echo '$(CMAKE_ARGS)' | cmp -s - $@ || echo '$(CMAKE_ARGS)' >$@

# The libraries are found through these links when Python runs in this directory, so that both ways use the same files.
build/installed: $(VENV)/ready $(sources)
	@mkdir -p build
	@echo "building tqgguf (the first time this takes minutes; full log in build/install.log)"
	@{ $(BIN)/pip install -v --no-build-isolation --no-deps --force-reinstall . 2>&1; echo $$? >build/status; } | tee build/install.log | \
		grep --line-buffered -E '^ *(\[[0-9]+/[0-9]+\]|patches:|FAILED|Successfully)' || true
	@test "$$(cat build/status)" = 0 || { echo; echo "The build failed; the cause, from build/install.log:"; \
		grep -m3 -E 'patches: error|[Ee]rror[: ]' build/install.log; exit 1; }
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))') && \
		for part in lib include _bindings; do rm -rf tqgguf/$$part && ln -s "$$site/tqgguf/$$part" tqgguf/$$part; done
	@touch $@

.PHONY: help demo docs test lint install cuda cuda-test cuda-bench cuda-compile conformance conformance-fast conformance-neon conformance-programs stock stock-tools stock-configured tools wheel check-patches clean FORCE
