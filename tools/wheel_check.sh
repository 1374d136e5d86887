#!/bin/bash
# Tests the newest wheel in dist/ for a machine, which `make wheel` or `make wheel-arm64` leaves there, in a fresh
# environment: on this machine, or, if the machine is an ARM64 one and this is not, under qemu-user.
set -eu
cd "$(dirname "$0")/.."
machine=${1:-$(uname -m)}

newest=
for wheel in dist/tqgguf-*-manylinux*_"$machine".whl; do
    if [ -z "$newest" ] || [ "$wheel" -nt "$newest" ]; then
        newest=$wheel
    fi
done
if [ ! -f "$newest" ]; then
    echo "there is no wheel for $machine in dist/: make wheel"
    exit 1
fi
tests=tests/packaging/test_wheel.py
if [ "$machine" != "$(uname -m)" ]; then
    tools/arm64_python.sh
    tests=tests/packaging/test_wheel_arm64.py
fi
TQGGUF_WHEEL=$newest .venv/bin/python -m pytest tests/packaging/test_wheel_files.py $tests
