#!/bin/sh
# Cross-compiles libtqgguf for aarch64 and runs the conformance program of the ARM64 kernels under qemu-user: each on a
# processor that has what it needs and little more. One that lacks it must say so.
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

# on PROCESSOR KERNELS: runs these kernels there.
on() {
    processor=$1
    shift
    echo "$processor:"
    qemu-aarch64 -cpu "$processor" -L /usr/aarch64-linux-gnu build/neon/conformance "$@"
}

# lacks PROCESSOR KERNELS: fails if one of them would run there.
lacks() {
    processor=$1
    shift
    for kernel in "$@"; do
        if on "$processor" "$kernel" | grep -q "passed\|FAILED"; then
            echo "FAILED  $kernel ran on $processor, which lacks what it needs"
            exit 1
        fi
    done
}

on cortex-a72 portable neon
lacks cortex-a72 dotprod i8mm
on neoverse-n1 dotprod
lacks cortex-a76 i8mm
on max,pauth-impdef=on i8mm # else qemu signs every return address, which takes most of the time
