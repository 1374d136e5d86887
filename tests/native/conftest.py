"""The library of CUDA kernels in two builds: on the GPU (`make cuda`), and for the CPU (native/cuda/emulated)."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tqgguf._native import cuda as native_cuda

ROOT = Path(__file__).parents[2]


class Memory:
    """An array in the library's memory, `offset` bytes behind where that begins."""

    def __init__(self, queue: native_cuda.Queue, array: npt.NDArray[Any], offset: int) -> None:
        self.queue, self.shape, self.dtype = queue, array.shape, array.dtype
        self.memory = native_cuda.Memory(queue, array.nbytes + offset)
        self.pointer = self.memory.pointer + offset
        self.address = queue.native.ffi.cast("void *", self.pointer)
        queue.copy(np.ascontiguousarray(array).ctypes.data, self.pointer, array.nbytes, 1)

    def read(self) -> npt.NDArray[Any]:
        out = np.empty(self.shape, self.dtype)
        self.queue.synchronize()
        self.queue.copy(self.pointer, out.ctypes.data, out.nbytes, 2)
        return out


class CudaLibrary(native_cuda.CudaLibrary):
    """The library under test, and its memory on device 0."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.memory: list[Memory] = []

    def message(self) -> str:
        """What the last error said."""
        return str(self.ffi.string(self.lib.tq_cuda_last_error()).decode())

    def put(self, array: npt.NDArray[Any], offset: int = 0) -> Memory:
        queue = native_cuda.Queue(self, 0, native_cuda.LEGACY_STREAM, "")
        self.memory.append(Memory(queue, array, offset))
        return self.memory[-1]


def build_emulated() -> Path:
    """The library for the CPU, brought up to date."""
    if sys.platform != "linux":
        pytest.skip("the emulated CUDA library has been tried on Linux only")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    for tool in ("cmake", "ninja", os.environ.get("CXX", "c++")):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"the emulated CUDA library needs {tool}")
    folder = ROOT / "build" / "cuda-emulated"
    folder.mkdir(parents=True, exist_ok=True)
    configure = ["-G", "Ninja", "-S", str(ROOT / "native" / "cuda" / "emulated"), "-B", str(folder)]
    with (folder / "lock").open("w") as lock:  # another run of the tests may build it, too
        fcntl.flock(lock, fcntl.LOCK_EX)
        for step in (configure, ["--build", str(folder)]):
            done = subprocess.run(["cmake", *step], env={**os.environ, "PATH": path}, capture_output=True, text=True)
            assert done.returncode == 0 and "warning:" not in done.stdout, done.stdout + done.stderr
    return folder / "libtqgguf_cuda.so"


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
        pytest.skip(f"no CUDA device: {library.message()}")
    library.check(library.lib.tq_cuda_device_use(0, library.ffi.NULL))
    return library


@pytest.fixture
def cuda(cuda_build: CudaLibrary) -> Iterator[CudaLibrary]:
    """The CUDA library, its kernels run by the CPU, then on the GPU if there is one."""
    yield cuda_build
    cuda_build.memory.clear()


@pytest.fixture
def device(cuda_build: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[native_cuda.Queue]:
    """The library under test as tqgguf's own."""
    monkeypatch.setenv("TQGGUF_CUDA_LIB", str(cuda_build.path))
    native_cuda.cuda_library.cache_clear()
    yield native_cuda.cuda_library().queue(0)
    native_cuda.cuda_library.cache_clear()


@pytest.fixture
def emulated(device: native_cuda.Queue) -> native_cuda.Queue:
    """The same for what only the emulation can be told to do."""
    if not device.native.emulated:
        pytest.skip("a device does as it does")
    return device
