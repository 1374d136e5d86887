"""The library of CUDA kernels, in two builds: on the GPU, and with a host compiler (native/cuda/simt_host.h)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("rows.cu", "attention.cu", "attention_plan.cu", "convert.cu", "memory.cu", "runtime.cu")
FLAGS = ("-x", "c++", "-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")
WARNINGS = ("-Wall", "-Wextra")
OPTIONS = ("-DTQ_CUDA_SHARED", "-fvisibility=hidden", f"-I{ROOT / 'native/include'}")


class View(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int),
        ("mode", ctypes.c_int),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    ]


class Index(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int),
        ("ne", ctypes.c_int64 * 3),
        ("nb", ctypes.c_size_t * 3),
    ]


class Device(ctypes.Structure):
    _fields_: ClassVar = [
        ("name", ctypes.c_char * 128),
        ("cc", ctypes.c_int),
        ("n_sm", ctypes.c_int),
        ("shared_per_block", ctypes.c_size_t),
        ("shared_per_sm", ctypes.c_size_t),
        ("total_bytes", ctypes.c_size_t),
    ]


class AttnTail(ctypes.Structure):
    """tq_attn_tail of tqgguf.h."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("owner", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n_recent", "n_first")),
        *((name, ctypes.c_size_t) for name in ("stride_row", "stride_head", "stride_stream", "owner_stride_stream")),
    ]


class Tail(ctypes.Structure):
    """tq_cuda_tail."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("owner", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n_recent", "n_first", "n_cells", "n_stream")),
        *((name, ctypes.c_size_t) for name in ("stride_row", "stride_stream", "owner_stride_stream")),
    ]


class Operand(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int),
        ("mode", ctypes.c_int),
        ("decoder", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("head_dim", "n_head", "n_stream")),
        *((name, ctypes.c_size_t) for name in ("stride_token", "stride_head", "stride_stream")),
        ("tail", AttnTail),
    ]


class Attention(ctypes.Structure):
    """tq_attn of tqgguf.h."""

    _fields_: ClassVar = [
        *((name, Operand) for name in "qkv"),
        ("n_q", ctypes.c_int64),
        ("n_kv", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("n_mask_head", ctypes.c_int64),
        ("n_mask_stream", ctypes.c_int64),
        *((f"mask_stride_{name}", ctypes.c_size_t) for name in ("row", "head", "stream")),
        ("sinks", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("max_bias", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("out", ctypes.c_void_p),
        *((f"out_stride_{name}", ctypes.c_size_t) for name in ("row", "head", "stream")),
    ]


class Memory:
    """An array in the library's memory."""

    def __init__(self, library: CudaLibrary, array: npt.NDArray[Any], offset: int = 0) -> None:
        data = ctypes.c_void_p()
        library.check(library.lib.tq_cuda_alloc(ctypes.c_size_t(array.nbytes + offset), ctypes.byref(data)))
        assert data.value is not None
        self.library, self.shape, self.dtype, self.nbytes = library, array.shape, array.dtype, array.nbytes
        self.base, self.pointer = data.value, data.value + offset
        source = np.ascontiguousarray(array)
        library.copy(source.ctypes.data, array.nbytes, 1, self.pointer)

    def read(self) -> npt.NDArray[Any]:
        out = np.empty(self.shape, self.dtype)
        self.library.check(self.library.lib.tq_cuda_synchronize(None))
        self.library.copy(self.pointer, self.nbytes, 2, out.ctypes.data)
        return out

    def free(self) -> None:
        self.library.check(self.library.lib.tq_cuda_free(ctypes.c_void_p(self.base)))


class CudaLibrary:
    """tq_cuda.h by ctypes."""

    View, Index, Operand, Attention, Tail = View, Index, Operand, Attention, Tail

    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))
        self.lib.tq_cuda_last_error.restype = ctypes.c_char_p
        self.lib.tq_cuda_attn_work_bytes.restype = ctypes.c_size_t
        self.emulated = bool(self.lib.tq_cuda_emulated())
        self.memory: list[Memory] = []

    def error(self) -> str:
        return str(self.lib.tq_cuda_last_error().decode())

    def check(self, status: int) -> None:
        assert status == 0, self.error()

    def copy(self, source: int, n: int, kind: int, target: int) -> None:
        p = ctypes.c_void_p
        self.check(self.lib.tq_cuda_copy(p(source), ctypes.c_size_t(n), kind, None, p(target)))

    def put(self, array: npt.NDArray[Any], offset: int = 0) -> Memory:
        self.memory.append(Memory(self, array, offset))
        return self.memory[-1]

    def free(self) -> None:
        for memory in self.memory:
            memory.free()
        self.memory.clear()


def build_emulated() -> Path:
    """Compiles native/cuda for the host, once for each state of the sources."""
    if sys.platform != "linux":
        pytest.skip("the emulated CUDA library has been tried on Linux only")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"the emulated CUDA library needs a C++ compiler; there is no {compiler}")
    folder = ROOT / "native" / "cuda"
    files = [*sorted(folder.glob("*")), *sorted((ROOT / "native/src").glob("codebook.*")), Path(__file__)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    out = ROOT / "build" / "cuda-emulated" / f"libtqgguf_cuda-{digest}.so"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in out.parent.glob("*"):
            old.unlink()
        codebook = out.with_name("codebook.o")
        c_flags = ("-x", "c", "-O2", "-fPIC", "-ffp-contract=off")
        subprocess.run(
            [compiler, *c_flags, *OPTIONS, "-c", str(ROOT / "native/src/codebook.c"), "-o", str(codebook)], check=True
        )
        jobs = []
        for source in SOURCES:
            target = out.with_name(source).with_suffix(".o")
            command = [compiler, *FLAGS, *WARNINGS, *OPTIONS, "-c", str(folder / source), "-o", str(target)]
            jobs.append((target, subprocess.Popen(command)))
        for target, job in jobs:
            assert job.wait() == 0, target
        objects = [str(target) for target, _ in jobs]
        part = out.with_suffix(".part")
        subprocess.run([compiler, "-shared", *objects, str(codebook), "-o", str(part)], check=True)
        part.rename(out)
    return out


def find_built() -> Path:
    """The library that TQGGUF_CUDA builds; skips where it or a GPU is missing."""
    path = Path(os.environ.get("TQGGUF_CUDA_LIB", ROOT / "build" / "cuda" / "libtqgguf_cuda.so"))
    if not path.exists():
        pytest.skip(f"no CUDA build: {path} does not exist (make cuda)")
    return path


@pytest.fixture(scope="session", params=["emulated", pytest.param("gpu", marks=pytest.mark.cuda)])
def cuda_build(request: pytest.FixtureRequest) -> CudaLibrary:
    library = CudaLibrary(build_emulated() if request.param == "emulated" else find_built())
    if not library.emulated and library.lib.tq_cuda_device_count() < 1:
        pytest.skip(f"no CUDA device: {library.error()}")
    library.check(library.lib.tq_cuda_device_use(0, None))
    return library


@pytest.fixture
def cuda(cuda_build: CudaLibrary) -> Iterator[CudaLibrary]:
    """The CUDA library, its kernels run by the CPU, then on the GPU if there is one."""
    yield cuda_build
    cuda_build.free()
