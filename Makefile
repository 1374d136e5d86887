# make demo and make test do all the set-up they need; a second call repeats nothing that did not change.

PYTHON ?= python3
JOBS   ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)

VENV  := .venv
BIN   := $(VENV)/bin
BUILD := build/cmake
STOCK := build/stock
CMAKE := $(BIN)/cmake
UPSTREAM_PROGRAMS := llama-archs save-load-state state-restore-fragmented thread-safety
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' tqgguf/__init__.py)
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

test: build/installed lint ## build, then lint and the tests
	$(BIN)/python -m pytest

C_SOURCES = $(shell find native tests benchmarks -name '*.[ch]' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

lint: $(VENV)/ready ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)
	$(BIN)/mypy

install: build/installed ## build and install into .venv only

conformance: conformance-fast conformance-neon conformance-upstream conformance-cache stock ## every kernel and upstream's own tests, all cases; stock types bit for bit, a stock worker; slow tests
	$(BACKEND_OPS) -o FLASH_ATTN_EXT -p 'pq[ot]'
	TQGGUF_STOCK_LIB=$(STOCK)/cmake/bin $(BIN)/python -m pytest tests/native/test_stock_types.py
	TQGGUF_STOCK_LIB=$(STOCK)/cmake/bin $(BIN)/python -m pytest tests/integration/test_rpc.py -k stock
	$(BIN)/python -m pytest -m slow

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

conformance-cache: build/installed ## 10,000 random sequences of calls on a PqoCache beside a NumPy model of it
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest tests/native/test_cache_model.py

# FUZZ_TARGETS=blocks FUZZ_FILES= is one alone, without forged sessions. New inputs go to build/fuzz/corpus, a finding to build/fuzz/findings.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= blocks encode trellis attention cache gguf
FUZZ_FILES   ?= gguf policy session state
FUZZ_OPTIONS  = -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=3000 -print_final_stats=1 -artifact_prefix=build/fuzz/findings/$$target-

fuzz: build/installed ## every fuzz target for FUZZ_SECONDS (60); needs clang
	@command -v clang >/dev/null || { echo "make fuzz needs clang, whose libFuzzer it uses (Debian: clang)"; exit 1; }
	$(BIN)/python patches/tool.py apply >/dev/null
	$(CMAKE) -G Ninja -S tests/fuzz -B build/fuzz -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ >/dev/null
	$(CMAKE) --build build/fuzz
	@mkdir -p build/fuzz/findings
	@for target in $(FUZZ_TARGETS); do mkdir -p build/fuzz/corpus/native-$$target; echo "fuzzing $$target"; \
		case $$target in blocks) most=55;; cache) most=400;; gguf) most=700;; *) most=1200;; esac; \
		build/fuzz/fuzz_$$target $(FUZZ_OPTIONS) -len_control=0 -max_len=$$most build/fuzz/corpus/native-$$target \
			$$(ls -d tests/fuzz/corpus/$$target tests/fuzz/regressions/$$target 2>/dev/null) >build/fuzz/$$target.log 2>&1 || \
			{ tail -40 build/fuzz/$$target.log; exit 1; }; grep number_of_executed_units build/fuzz/$$target.log; done
	@$(if $(FUZZ_FILES),$(BIN)/pip install --quiet --require-hashes -r requirements-fuzz.txt)
	@for target in $(FUZZ_FILES); do mkdir -p build/fuzz/corpus/files-$$target; echo "fuzzing the reader of $$target"; \
		$(BIN)/python tests/fuzz/drive.py $$target $(FUZZ_OPTIONS) build/fuzz/corpus/files-$$target tests/fuzz/corpus/$$target \
			>build/fuzz/files-$$target.log 2>&1 || { tail -40 build/fuzz/files-$$target.log; exit 1; }; \
		grep number_of_executed_units build/fuzz/files-$$target.log; done
	@$(if $(FUZZ_FILES),mkdir -p build/fuzz/sessions && $(BIN)/python tests/fuzz/restore.py build/fuzz/sessions $$((20 * $(FUZZ_SECONDS))) 2>/dev/null | tail -1)

# Leaks of the interpreter are not ours, and some tests ask for more memory than there is. Not here: tests that also load llama.cpp,
# which refuses a second libtqgguf, that limit the address space, and the long ones, most of which conformance has.
SANITIZED := $(addprefix tests/native/test_,arguments.py cache.py codebook.py) tests/fuzz/test_replay.py

sanitize: build/installed ## libtqgguf, its test programs and tests under the address, undefined-behaviour and thread sanitizers
	@for kind in address,undefined thread; do \
		$(CMAKE) -G Ninja -S native -B build/sanitize/$${kind%%,*} -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DTQGGUF_VERSION=$(VERSION) \
			-DTQGGUF_CONFORMANCE=ON -DTQGGUF_SANITIZE=$$kind >/dev/null && $(CMAKE) --build build/sanitize/$${kind%%,*} || exit 1; done
	build/sanitize/thread/conformance_threads
	build/sanitize/address/conformance_threads
	build/sanitize/address/conformance
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 LD_PRELOAD=$$(cc -print-file-name=libasan.so) \
		TQGGUF_TEST_LIB=$(CURDIR)/build/sanitize/address/libtqgguf.so $(BIN)/python -m pytest $(SANITIZED) -k "not failed_allocation and not files"

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
		$(BIN)/python native/cuda/tools/resources.py --compile build/cuda-compile --upstream build/upstream/llama.cpp; \
	else echo "skipped cuda: there is no nvcc (CUDA toolkit 12 or newer)"; fi

conformance-upstream: build/installed ## upstream's programs on the patched libllama, with our types; every architecture, as docs say
	$(CMAKE) -S . -B $(BUILD) -DTQGGUF_TOOLS=ON >build/configure.log 2>&1 || { cat build/configure.log; exit 1; }
	$(CMAKE) --build $(BUILD) $(UPSTREAM_PROGRAMS:%=--target test-%)
	$(BIN)/python tests/patches/upstream_programs.py $(BUILD)/bin tqgguf/models/demo.gguf
	$(BIN)/python tests/patches/architectures.py $(BUILD)/bin/test-llama-archs

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
		-DLLAMA_OPENSSL=OFF -DGGML_RPC=ON -DGGML_RPC_RDMA=OFF >build/stock/configure.log 2>&1 || { cat build/stock/configure.log; exit 1; }

tools: build/installed ## patched llama-cli, -server, -bench, -perplexity and upstream's test programs, in build/bin
	$(CMAKE) -S . -B $(BUILD) -DTQGGUF_TOOLS=ON >build/configure.log 2>&1 || { cat build/configure.log; exit 1; }
	$(CMAKE) --build $(BUILD) --target tools
	ln -sfn cmake/bin build/bin

wheel: build/wheel-tools ## the wheel for any x86-64 Linux, in dist/ (docs/wheels.md)
	@rm -rf build/wheelhouse
	$(BIN)/pip wheel --no-build-isolation --no-deps --wheel-dir build/wheelhouse -C build-dir=build/wheel \
		-C cmake.define.TQGGUF_ANY_CPU=ON -C cmake.define.CMAKE_TOOLCHAIN_FILE=$(CURDIR)/native/manylinux.cmake .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheelhouse/*.whl

wheel-check: build/wheel-tools ## that wheel in a fresh environment, on this processor and on lesser ones under qemu-user
	@ls dist/tqgguf-*-manylinux*.whl >/dev/null || { echo "there is no wheel in dist/: make wheel"; exit 1; }
	TQGGUF_WHEEL=$$(ls -t dist/tqgguf-*-manylinux*.whl | head -n 1) $(BIN)/python -m pytest tests/packaging

build/wheel-tools: $(VENV)/ready requirements-wheel.txt
	$(BIN)/pip install --quiet --require-hashes -r requirements-wheel.txt
	@mkdir -p build && touch $@

# Other programs on the machine slow it down, but change nothing that it judges.
MINUTES ?= 30
soak: build/installed ## MINUTES=30 of mixed requests, 1,000 requests at once, 1,000 kills while a session is saved
	$(BIN)/python benchmarks/soak.py --minutes $(MINUTES)
	$(BIN)/python benchmarks/serve_load.py
	$(BIN)/python benchmarks/session_kill.py --kills 1000

report: $(VENV)/ready ## what becomes of the patches on other releases, which it downloads (patches/README.md)
	$(BIN)/python patches/tool.py report --write

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
	$(BIN)/pip install --quiet --require-hashes -r requirements-dev.txt
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

# every target that is no path
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*/\1/p' Makefile) FORCE
