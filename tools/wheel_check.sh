#!/bin/bash
# Tests the newest wheel in dist/, which `make wheel` leaves there, in a fresh environment.
set -eu
cd "$(dirname "$0")/.."

newest=
for wheel in dist/tqgguf-*-manylinux*.whl; do
    if [ -z "$newest" ] || [ "$wheel" -nt "$newest" ]; then
        newest=$wheel
    fi
done
if [ ! -f "$newest" ]; then
    echo "there is no wheel in dist/: make wheel"
    exit 1
fi
TQGGUF_WHEEL=$newest .venv/bin/python -m pytest tests/packaging
