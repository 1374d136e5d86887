"""Arrays in device memory: taking other libraries' without a copy, and ours, which they can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from .._native.capsule import Managed, new_capsule
from .._native.cuda import LEGACY_STREAM, Memory, Queue
from ..errors import ArgumentError, UnsupportedError


class SupportsDLPack(Protocol):
    """A tensor of PyTorch, CuPy, JAX or another library that has DLPack."""

    def __dlpack__(self, *, stream: Any = ...) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...


class SupportsCudaArray(Protocol):
    """An array of CuPy, Numba or another library that has the CUDA array interface."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


Tensor = npt.NDArray[np.floating[Any]] | SupportsDLPack | SupportsCudaArray
"""What a cache on a device takes: a NumPy array, which is copied there, or a tensor that is there."""


@dataclass(frozen=True)
class Dtype:
    """A kind of floats, and what ggml, DLPack and the CUDA array interface call it.

    Attributes:
        name: "float32", "float16" or "bfloat16".
        number: ggml's.
        n_bytes: of one value.
        code: DLPack's type code.
        typestr: of the array interface, which has no name for bfloat16.
    """

    name: str
    number: int
    n_bytes: int
    code: int
    typestr: str | None


FLOAT32: Final = Dtype("float32", 0, 4, 2, "<f4")
FLOAT16: Final = Dtype("float16", 1, 2, 2, "<f2")
BFLOAT16: Final = Dtype("bfloat16", 30, 2, 4, None)
DTYPES: Final = (FLOAT32, FLOAT16, BFLOAT16)


class DeviceArray:
    """A C-contiguous array in device memory, which a cache returned.

    `torch.from_dlpack(a)`, `cupy.from_dlpack(a)`, `jax.numpy.from_dlpack(a)` and `cupy.asarray(a)` share its memory,
    which lives as long as any of them; `a.numpy()` copies it to the host. Its values are computed in the order of the
    cache's stream: what DLPack and the array interface hand over can be used on the consumer's stream at once.

    Attributes:
        shape: as NumPy's.
        dtype: "float32", "float16" or "bfloat16".
        device: "cuda:0", say.
    """

    def __init__(self, queue: Queue, shape: Sequence[int], dtype: Dtype) -> None:
        self.shape = tuple(shape)
        self.kind = dtype
        self.queue = queue
        with queue.current():
            self.memory = Memory(queue, self.nbytes)

    @property
    def dtype(self) -> str:
        """Name of the type of the values."""
        return self.kind.name

    @property
    def device(self) -> str:
        """The device, as PyTorch writes it."""
        return f"cuda:{self.queue.index}"

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.size * self.kind.n_bytes

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one index to the next."""
        return tuple(_contiguous(self.shape, self.kind))

    def numpy(self) -> npt.NDArray[Any]:
        """A copy in host memory, once the values are there.

        Raises:
            UnsupportedError: dtype is bfloat16, which NumPy lacks.
        """
        if self.kind.typestr is None:
            raise UnsupportedError(f"NumPy has no {self.dtype}; use torch.from_dlpack(a)")
        out = np.empty(self.shape, dtype=self.kind.typestr)
        with self.queue.current():
            self.queue.copy(self.memory.pointer, out.ctypes.data, out.nbytes, 2)
        return out

    def __dlpack_device__(self) -> tuple[int, int]:
        lib = self.queue.native.lib
        return int(lib.TQ_DLPACK_CPU if self.queue.native.emulated else lib.TQ_DLPACK_CUDA), self.queue.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule that shares the memory, usable on `stream` (None: the legacy default stream; -1: in no order).

        Raises:
            BufferError: another device or a copy is asked for, or stream is 0.
        """
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"this array is on {self.device} and is not moved: dl_device = {dl_device} given")
        if copy:
            raise BufferError("this array is shared, not copied: copy = True given")
        if stream == 0 and not self.queue.native.emulated:
            raise BufferError("stream = 0 is ambiguous in DLPack; 1 is the legacy and 2 the per-thread default stream")
        native, versioned = self.queue.native, max_version is not None and max_version[0] >= 1
        self.share(LEGACY_STREAM if stream is None else stream)
        shape = native.ffi.new("int64_t[]", self.shape)
        managed = native.lib.tq_cuda_memory_export(self.memory.handle, self.kind.number, self.ndim, shape, versioned)
        if managed == native.ffi.NULL:
            raise native.error(native.lib.TQ_E_MEMORY)
        return new_capsule(native, managed, versioned)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.kind.typestr is None:
            raise AttributeError(f"the CUDA array interface has no {self.dtype}; use DLPack")
        self.share(None)
        return {
            "shape": self.shape,
            "typestr": self.kind.typestr,
            "data": (self.memory.pointer, False),
            "strides": None,
            "stream": self.queue.stream,
            "version": 3,
        }

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without dimensions")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<DeviceArray {self.shape} {self.dtype} on {self.device}>"

    def share(self, stream: int | None) -> None:
        """Lets a stream use the memory, after the cache's own; None: one that is not known, and waits itself."""
        if stream == self.queue.stream:
            return
        native = self.queue.native
        native.lib.tq_cuda_memory_elsewhere(self.memory.handle)
        if stream is not None and stream != -1:
            with self.queue.current():
                native.check(native.lib.tq_cuda_stream_wait(native.ffi.cast("void *", stream), self.queue.handle))


class Borrowed:
    """Somebody's values on a device, for the duration of a call.

    Attributes:
        pointer: address of the first value.
        shape: as NumPy's.
        strides: in bytes.
        kind: of the values.
    """

    def __init__(self, name: str, pointer: int, shape: Sequence[int], strides: Sequence[int], kind: Dtype) -> None:
        self.name, self.pointer, self.kind = name, pointer, kind
        self.shape, self.strides = tuple(shape), tuple(strides)
        if any(stride < 0 for stride in self.strides):
            raise ArgumentError(f"{name} has the strides {self.strides}; negative ones are not supported: copy it")
        moved = [stride for n, stride in zip(self.shape, self.strides, strict=True) if n > 1]
        if any(number % kind.n_bytes for number in (pointer, *moved)):
            raise ArgumentError(
                f"{name} lies at addresses that are no multiples of {kind.n_bytes}, the size of a value"
            )
        self._owner: object = None

    def keep(self, owner: object) -> Borrowed:
        """Keeps the owner of the memory alive as long as this object."""
        self._owner = owner
        return self

    def release(self) -> None:
        """Gives the memory back, once what uses it has been given to the stream."""
        owner, self._owner = self._owner, None
        if isinstance(owner, Managed):
            owner.release()


def borrow(x: Tensor, name: str, queue: Queue) -> Borrowed:
    """x for the work of a queue: its own memory where it is on the device, otherwise a copy of the NumPy array x.

    Raises:
        ArgumentError: neither, on another device, or of another type than float32, float16 and bfloat16.
        OutOfMemoryError: no device memory for the copy.
    """
    if isinstance(x, np.ndarray):
        return _upload(x, name, queue)
    if isinstance(x, DeviceArray) and (x.queue.native, x.queue.index) == (queue.native, queue.index):
        x.share(queue.stream)
        return Borrowed(name, x.memory.pointer, x.shape, x.strides, x.kind).keep(x.memory)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _from_dlpack(x, name, queue)
    try:
        interface = x.__cuda_array_interface__
    except AttributeError:
        raise ArgumentError(
            f"{name} must be a NumPy array, or an array on the device that has __dlpack__ or "
            f"__cuda_array_interface__, not {x.__class__.__name__}"
        ) from None
    return _from_interface(x, interface, name, queue)


def _upload(x: npt.NDArray[Any], name: str, queue: Queue) -> Borrowed:
    kind = {np.dtype(np.float32): FLOAT32, np.dtype(np.float16): FLOAT16}.get(x.dtype)
    if kind is None:
        raise ArgumentError(f"{name} must be an array of float32 or float16, not an array of {x.dtype}")
    values = np.ascontiguousarray(x)
    memory = Memory(queue, values.nbytes)
    queue.copy(values.ctypes.data, memory.pointer, values.nbytes, 1)
    return Borrowed(name, memory.pointer, x.shape, values.strides, kind).keep(memory)


def _from_dlpack(x: Any, name: str, queue: Queue) -> Borrowed:
    native = queue.native
    lib = native.lib
    where = tuple(int(number) for number in x.__dlpack_device__())
    kinds = (lib.TQ_DLPACK_CPU,) if native.emulated else (lib.TQ_DLPACK_CUDA, lib.TQ_DLPACK_CUDA_MANAGED)
    if where[0] not in kinds or where[1] != queue.index:
        names = {lib.TQ_DLPACK_CPU: "in host memory", lib.TQ_DLPACK_CUDA: f"on cuda:{where[1]}"}
        place = names.get(where[0], f"on DLPack device {where}")
        raise ArgumentError(f"{name} is {place}, the cache on cuda:{queue.index}: move it there, or give a NumPy array")
    stream = None if native.emulated else queue.stream
    try:
        try:
            capsule = x.__dlpack__(stream=stream, max_version=(1, 1))
        except TypeError:  # made before DLPack 1.0
            capsule = x.__dlpack__(stream=stream)
    except (BufferError, RuntimeError) as error:  # PyTorch: a tensor that requires a gradient, or is sparse
        raise ArgumentError(f"{name} cannot be taken through DLPack: {error}") from None
    managed = Managed(native, capsule, name)
    try:
        tensor = managed.tensor
        found = (tensor.code, tensor.bits, tensor.lanes)
        kind = next((d for d in DTYPES if (d.code, 8 * d.n_bytes, 1) == found), None)
        if kind is None:
            raise ArgumentError(
                f"{name} must be of float32, float16 or bfloat16, not of {getattr(x, 'dtype', f'DLPack type {found}')}"
            )
        shape = [int(tensor.shape[i]) for i in range(tensor.n_dims)]
        if tensor.strides == native.ffi.NULL:
            strides = _contiguous(shape, kind)
        else:
            strides = [kind.n_bytes * int(tensor.strides[i]) for i in range(tensor.n_dims)]
        pointer = int(native.ffi.cast("uintptr_t", tensor.data)) + tensor.byte_offset
        return Borrowed(name, pointer, shape, strides, kind).keep(managed)
    except BaseException:
        managed.release()
        raise


def _from_interface(x: object, interface: dict[str, Any], name: str, queue: Queue) -> Borrowed:
    native = queue.native
    kind = next((d for d in DTYPES if d.typestr is not None and d.typestr == interface["typestr"]), None)
    if kind is None:
        raise ArgumentError(f"{name} must be of float32 or float16 ('<f4', '<f2'), not of {interface['typestr']!r}")
    if interface.get("mask") is not None:
        raise ArgumentError(f"{name} has a mask, which is not supported")
    shape = [int(n) for n in interface["shape"]]
    strides = interface.get("strides") or _contiguous(shape, kind)
    pointer = int(interface["data"][0] or 0)
    if prod(shape) > 0:
        where = native.lib.tq_cuda_device_of(native.ffi.cast("void *", pointer))
        if where < 0:
            raise ArgumentError(f"{name}: {native.error(where)}")
        if where != queue.index:
            raise ArgumentError(f"{name} is on cuda:{where}, the cache on cuda:{queue.index}: move it there")
    stream = interface.get("stream")
    if stream is not None and int(stream) != queue.stream:
        native.check(native.lib.tq_cuda_stream_wait(queue.handle, native.ffi.cast("void *", int(stream))))
    return Borrowed(name, pointer, shape, [int(n) for n in strides], kind).keep(x)


def _contiguous(shape: Sequence[int], kind: Dtype) -> list[int]:
    return [kind.n_bytes * prod(shape[i + 1 :]) for i in range(len(shape))]
