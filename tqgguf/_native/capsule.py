"""Python's side of DLPack: capsules around managed tensors, by the C interface of the interpreter."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

from ..errors import ArgumentError
from .cuda import CudaLibrary

_NAMES: Final = {False: b"dltensor", True: b"dltensor_versioned"}
_USED: Final = {False: b"used_dltensor", True: b"used_dltensor_versioned"}

# Prototypes of our own: attributes of ctypes.pythonapi belong to everybody in the process.
_named = (ctypes.py_object, ctypes.c_char_p)
_new = ctypes.PYFUNCTYPE(ctypes.py_object, *[ctypes.c_void_p] * 3)(("PyCapsule_New", ctypes.pythonapi))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, *_named)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, *_named)(("PyCapsule_GetPointer", ctypes.pythonapi))
_set_name = ctypes.PYFUNCTYPE(ctypes.c_int, *_named)(("PyCapsule_SetName", ctypes.pythonapi))


@functools.cache
def _parts(native: CudaLibrary) -> tuple[dict[bool, int], int]:
    """Addresses of the capsules' names and of their destructor, which is C: it may run at any time."""
    ffi, lib = native.ffi, native.lib
    address = [
        ffi.cast("void *", ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value)
        for name in ("PyCapsule_IsValid", "PyCapsule_GetPointer")
    ]
    lib.tq_cuda_capsule_api(*address)
    names = {versioned: int(ffi.cast("uintptr_t", lib.tq_cuda_capsule_name(versioned))) for versioned in _NAMES}
    return names, int(ffi.cast("uintptr_t", ffi.addressof(lib, "tq_cuda_capsule_free")))


def new_capsule(native: CudaLibrary, managed: Any, versioned: bool) -> Any:
    """A capsule around a managed tensor that tq_cuda_memory_export made; it deletes the tensor if nobody takes it."""
    names, destructor = _parts(native)
    return _new(int(native.ffi.cast("uintptr_t", managed)), names[versioned], destructor)


class Managed:
    """A managed tensor taken out of a capsule.

    Attributes:
        tensor: the tq_dlpack_tensor.

    Raises:
        ArgumentError: no capsule, one that was taken before, or of a major version other than 1.
    """

    def __init__(self, native: CudaLibrary, capsule: Any, name: str) -> None:
        versioned = bool(_is_valid(capsule, _NAMES[True]))
        if not versioned and not _is_valid(capsule, _NAMES[False]):
            raise ArgumentError(f"{name}: __dlpack__ gave no capsule of DLPack, but {capsule!r}")
        kind = "tq_dlpack_versioned *" if versioned else "tq_dlpack_managed *"
        self._managed: Any = native.ffi.cast(kind, _pointer(capsule, _NAMES[versioned]))
        _set_name(capsule, _USED[versioned])
        if versioned and self._managed.major != 1:
            major = self._managed.major
            self.release()
            raise ArgumentError(f"{name}: its DLPack tensor has version {major}, 1 is known here")
        self.tensor: Any = self._managed.tensor

    def release(self) -> None:
        """Gives the tensor back; once."""
        managed, self._managed = self._managed, None
        if managed is not None and managed.deleter:
            managed.deleter(managed)
