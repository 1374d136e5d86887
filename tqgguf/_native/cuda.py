"""Loads `libtqgguf_cuda` through cffi (ABI mode), and holds its devices' memory.

Like libtqgguf's, the declarations are those of the installed header, `tq_cuda.h`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ..errors import UnsupportedError
from .library import PACKAGE_DIR, SUFFIX, NativeLibrary, library_path, read_header, version_in

LEGACY_STREAM: Final = 1
"""cudaStreamLegacy: the stream that is everybody's unless told otherwise, by a number that DLPack uses, too."""

PER_THREAD_STREAM: Final = 2
"""cudaStreamPerThread: memory freed by another thread would be freed in the order of another stream."""

NOT_BUILT: Final = (
    "this tqgguf was built without CUDA. In a source checkout, type `make cuda` (it needs the CUDA toolkit, 12 or "
    "newer); or build the wheel with CMAKE_ARGS=-DTQGGUF_CUDA=ON pip install ."
)
HINT: Final = "PqoCache(device='cuda') needs an NVIDIA GPU and a driver as new as the CUDA toolkit it was built with"


def cuda_library_path() -> Path:
    """Where libtqgguf_cuda is: TQGGUF_CUDA_LIB, or in the package, or in a checkout where `make cuda` leaves it."""
    given = os.environ.get("TQGGUF_CUDA_LIB")
    if given:
        return Path(given)
    installed = library_path("tqgguf_cuda")
    built = PACKAGE_DIR.parent / "build" / "cuda" / f"libtqgguf_cuda{SUFFIX}"
    return built if built.is_file() and not installed.is_file() else installed


def _header() -> str:
    # In a checkout the library is built apart (`make cuda`), so that the installed header may be older than it.
    source = PACKAGE_DIR.parent / "native" / "cuda" / "tq_cuda.h"
    return read_header(source if source.is_file() else PACKAGE_DIR / "include" / "tq_cuda.h")


class CudaLibrary(NativeLibrary):
    """The loaded libtqgguf_cuda.

    Attributes:
        emulated: whether it runs kernels on the CPU, as tests do; device memory is the host's then.
    """

    def __init__(self, path: Path) -> None:
        header, base = _header(), read_header()
        expected = 1000 * version_in(base, "TQ_ABI_VERSION") + version_in(header, "TQ_CUDA_ABI_VERSION")
        # Tensors that others own are deleted by this library's code: it stays, even when the interpreter ends.
        flags = os.RTLD_NOW | getattr(os, "RTLD_NODELETE", 0)
        super().__init__(path, "tq_cuda", expected, [base, header], NOT_BUILT, "make cuda", flags)
        self.emulated = bool(self.lib.tq_cuda_emulated())

    def queue(self, index: int, stream: int = LEGACY_STREAM) -> Queue:
        """A device with a stream to work on.

        Raises:
            ArgumentError: there is no device of that number.
            UnsupportedError: no device, no driver, a driver too old, or a device that this build has no code for.
        """
        ffi, lib = self.ffi, self.lib
        count = lib.tq_cuda_device_count()
        if count < 0:
            raise UnsupportedError(f"{self.error(count)}; {HINT}")
        before = self.check(lib.tq_cuda_device_swap(-1))
        info = ffi.new("tq_cuda_device *")
        try:
            self.check(lib.tq_cuda_device_use(index, info))
        finally:
            lib.tq_cuda_device_swap(before)
        return Queue(self, index, stream, ffi.string(info.name).decode("utf-8", "replace"))


class Memory:
    """Device memory; it goes with the last Python object or DLPack consumer that refers to it.

    Attributes:
        handle: the tq_cuda_memory.
        pointer: its address on the device.
    """

    def __init__(self, queue: Queue, n_bytes: int) -> None:
        ffi, lib = queue.native.ffi, queue.native.lib
        handle, data = ffi.new("tq_cuda_memory **"), ffi.new("void **")
        queue.native.check(lib.tq_cuda_memory_new(queue.index, n_bytes, queue.handle, handle, data))
        self.handle: Any = ffi.gc(handle[0], lib.tq_cuda_memory_free)
        self.pointer = int(ffi.cast("uintptr_t", data[0]))
        self.n_bytes = n_bytes


class Queue:
    """One device and one stream: work given to it is done in order, later.

    Attributes:
        native: the library.
        index: the device's number.
        stream: the cudaStream_t as a number; 1 is the legacy default stream.
        handle: the same for cffi.
        name: the device's name.
    """

    def __init__(self, native: CudaLibrary, index: int, stream: int, name: str) -> None:
        self.native, self.index, self.stream, self.name = native, index, stream, name
        self.handle: Any = native.ffi.cast("void *", stream)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the device the calling thread's current one for a while. PyTorch and CuPy look at the same setting."""
        lib = self.native.lib
        before = self.native.check(lib.tq_cuda_device_swap(self.index))
        try:
            yield
        finally:
            if before != self.index:
                lib.tq_cuda_device_swap(before)

    def copy(self, source: Any, target: Any, n_bytes: int, kind: int) -> None:
        """Copies bytes between addresses: kind 1 host to device, 2 device to host (both wait), 3 device to device."""
        ffi = self.native.ffi
        source, target = ffi.cast("void *", source), ffi.cast("void *", target)
        self.native.check(self.native.lib.tq_cuda_copy(source, n_bytes, kind, self.handle, target))

    def synchronize(self) -> None:
        """Waits until everything given to the stream is done."""
        self.native.check(self.native.lib.tq_cuda_synchronize(self.handle))


@functools.cache
def cuda_library() -> CudaLibrary:
    """The one libtqgguf_cuda of this process, loaded at the first call.

    Raises:
        LibraryError: it is missing, cannot be loaded, or is of another version.
    """
    return CudaLibrary(cuda_library_path())
