#!/bin/sh
# Cross-compiles libtqgguf for aarch64 and runs the conformance program of the NEON kernels under qemu-user.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

if ! command -v aarch64-linux-gnu-gcc >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
    echo "skipped neon: it needs aarch64-linux-gnu-gcc and qemu-aarch64" \
        "(Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)"
    exit
fi
cmake -G Ninja -S native -B build/neon -DTQGGUF_VERSION=conformance -DTQGGUF_CONFORMANCE=ON \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc >/dev/null
cmake --build build/neon
qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/conformance
