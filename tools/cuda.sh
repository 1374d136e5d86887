#!/bin/sh
# The CUDA kernels, apart from the rest of the build.
#
#   tools/cuda.sh build      a library for this machine's cards, or for CUDA_ARCHITECTURES, in build/cuda
#   tools/cuda.sh compile    native/cuda for every supported architecture, or for those of ARCH ("sm_75 sm_90"), and the
#                            patched ggml-cuda.cu, where nvcc is
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

case ${1-} in
build)
    cmake -G Ninja -S native -B build/cuda -DTQGGUF_VERSION=cuda -DTQGGUF_CUDA=ON \
        "-DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURES:-native}" "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$PWD/build/cuda" \
        >/dev/null
    cmake --build build/cuda --target tqgguf_cuda
    ;;
compile)
    if ! command -v nvcc >/dev/null; then
        echo "skipped cuda: there is no nvcc (CUDA toolkit 12 or newer)"
        exit
    fi
    python patches/tool.py apply >/dev/null
    # shellcheck disable=SC2086 # several words
    python native/cuda/tools/resources.py --compile build/cuda-compile --upstream build/upstream/llama.cpp \
        ${ARCH:+--arch $ARCH}
    ;;
*)
    echo "usage: tools/cuda.sh build|compile" >&2
    exit 2
    ;;
esac
