"""What this machine and this build have, which decides what tests run here."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from tqgguf import _native
from tqgguf._native.cuda import cuda_library_path
from tqgguf.errors import LibraryError

KERNELS = ("portable", "avx2", "avx512", "neon", "dotprod", "i8mm")
"""All kernels that there are, for any processor."""

INTEGER_SUMS = ("avx2", "avx512", "dotprod", "i8mm")
"""Those whose attention sums 16-bit integers, and so is less precise than f32 sums."""

_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni"},
    "neon": {"asimd"},
    "dotprod": {"asimd", "asimddp"},
    "i8mm": {"asimd", "asimddp", "i8mm"},
}
"""What /proc/cpuinfo of a processor says that runs a kernel."""


def kernels() -> list[str]:
    """The kernels that libtqgguf runs here, best first; empty if it is not built."""
    try:
        return [name for name, usable in _native.library().kernels().items() if usable]
    except LibraryError:
        return []


def kernels_by_flags() -> set[str] | None:
    """The kernels that this processor runs by what the system says of it; None if the system does not say it."""
    try:
        emulator = os.readlink("/proc/thread-self/exe")  # qemu-user answers /proc/self, but shows the host's cpuinfo
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    if "qemu" in emulator:
        return None
    named = ("flags", "Features")  # on x86-64 and on ARM64
    flags = set(next((line.partition(":")[2] for line in lines if line.startswith(named)), "").split())
    return {"portable", *(name for name, needed in _FLAGS.items() if needed <= flags)}


def lacks_gpu() -> str:
    """Why the CUDA kernels cannot run here; "" if they can."""
    try:
        driver, n = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return "no GPU"
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(n)) or not n.value:
        return "no GPU"
    return "" if cuda_library_path().is_file() else "no CUDA build (make cuda)"


def _has_openmp() -> bool:
    return any(b"libgomp" in path.read_bytes() for path in _native.LIB_DIR.glob("libggml-cpu*"))


def missing() -> dict[str, str]:
    """Markers of the tests that cannot run here, and what they lack."""
    lacks = {
        "cuda": lacks_gpu(),
        "own_threads": "threads of a ggml without OpenMP (make wheel-check)" if _has_openmp() else "",
        "stock": "" if os.environ.get("TQGGUF_STOCK_LIB") else "no stock build (make conformance)",
        "image": "" if os.environ.get("TQGGUF_IMAGE") else "no container image (make image image-check)",
        "wheel": "" if os.environ.get("TQGGUF_WHEEL") else "no wheel (make wheel wheel-check)",
    }
    return {marker: reason for marker, reason in lacks.items() if reason}
