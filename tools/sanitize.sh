#!/bin/sh
# Builds libtqgguf under the address, undefined-behaviour and thread sanitizers, and runs its test programs and tests.
#
# The tests given as arguments are run with the library of the address sanitizer. Leaks are not looked for, because those
# of the interpreter would be found, too; and allocations that are too large must return NULL, which some tests want.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

for kinds in address,undefined thread; do
    folder=build/sanitize/${kinds%%,*}
    cmake -G Ninja -S native -B "$folder" -DTQGGUF_VERSION="$TQGGUF_VERSION" -DTQGGUF_CONFORMANCE=ON \
        -DTQGGUF_SANITIZE="$kinds" >/dev/null
    cmake --build "$folder"
done
build/sanitize/thread/conformance_threads
build/sanitize/address/conformance_threads
build/sanitize/address/conformance
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 LD_PRELOAD=$(cc -print-file-name=libasan.so) \
    TQGGUF_LIB=$PWD/build/sanitize/address/libtqgguf.so \
    python -m pytest "$@" -k "not failed_allocation and not files"
