"""What tqgguf calls of libggml and libggml-rpc: devices on other machines, connections to them, and being one."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

from ..errors import UnsupportedError
from .bindings import import_llama_cpp
from .library import library_path

__all__ = [
    "Protocol",
    "add_worker",
    "device_name",
    "hold",
    "local_gpus",
    "n_alive",
    "n_lost",
    "protocol",
    "release",
    "serve",
    "serving",
]

Protocol = tuple[int, int, int, int]
"""llama.cpp's RPC protocol, major, minor and patch, and the version of ours (tq_ggml_rpc.h; 0: one without)."""

_CPU, _GPU, _IGPU = 0, 1, 2
_MAX_DEVICES: Final = 16


@functools.cache
def _libraries() -> tuple[Any, Any]:
    """libggml and libggml-rpc, with the signatures of what is called.

    Raises:
        UnsupportedError: this build has no RPC.
        LibraryError: the native libraries are missing.
    """
    import_llama_cpp()
    if not library_path("ggml-rpc").exists():
        raise UnsupportedError(f"{library_path('ggml-rpc')} does not exist: this tqgguf was built with TQGGUF_RPC=OFF")
    ggml, rpc = ctypes.CDLL(str(library_path("ggml"))), ctypes.CDLL(str(library_path("ggml-rpc")))
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    for library, name, result, arguments in (
        (rpc, "tq_ggml_rpc_protocol", ctypes.c_uint32, []),
        (rpc, "tq_ggml_rpc_n_lost", ctypes.c_int32, [text]),
        (rpc, "tq_ggml_rpc_n_alive", ctypes.c_int32, [text]),
        (rpc, "ggml_backend_rpc_add_server", pointer, [text]),
        (rpc, "ggml_backend_rpc_start_server", None, [text, text, size, size, ctypes.POINTER(pointer)]),
        (ggml, "ggml_backend_dev_count", size, []),
        (ggml, "ggml_backend_dev_get", pointer, [size]),
        (ggml, "ggml_backend_dev_type", ctypes.c_int, [pointer]),
        (ggml, "ggml_backend_dev_name", text, [pointer]),
        (ggml, "ggml_backend_dev_description", text, [pointer]),
        (ggml, "ggml_backend_dev_init", pointer, [pointer, text]),
        (ggml, "ggml_backend_free", None, [pointer]),
        (ggml, "ggml_backend_dev_memory", None, [pointer, ctypes.POINTER(size), ctypes.POINTER(size)]),
        (ggml, "ggml_backend_reg_dev_count", size, [pointer]),
        (ggml, "ggml_backend_reg_dev_get", pointer, [pointer, size]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return ggml, rpc


def protocol() -> Protocol:
    """What this build speaks."""
    number = int(_libraries()[1].tq_ggml_rpc_protocol())
    return number >> 24, number >> 16 & 255, number >> 8 & 255, number & 255


def n_lost(endpoint: str) -> int:
    """Connections of this process to "host:port" that were lost so far."""
    return int(_libraries()[1].tq_ggml_rpc_n_lost(endpoint.encode()))


def n_alive(endpoint: str) -> int:
    """Connections of this process to "host:port" that are in use: 1, or 0."""
    return int(_libraries()[1].tq_ggml_rpc_n_alive(endpoint.encode()))


def add_worker(endpoint: str) -> list[int]:
    """The devices (`ggml_backend_dev_t`) of a worker; none if it could not be asked. They are never freed."""
    ggml, rpc = _libraries()
    registry = rpc.ggml_backend_rpc_add_server(endpoint.encode())
    if not registry:
        return []
    return [ggml.ggml_backend_reg_dev_get(registry, i) for i in range(ggml.ggml_backend_reg_dev_count(registry))]


def hold(device: int) -> int:
    """Keeps the connection to a device's worker, which llama.cpp drops and makes anew while a model is loaded.

    Returns:
        What `release` takes; 0 if it could not be kept.
    """
    return int(_libraries()[0].ggml_backend_dev_init(device, None) or 0)


def release(held: int) -> None:
    """Lets go of what `hold` returned."""
    _libraries()[0].ggml_backend_free(held)


def device_name(device: int) -> str:
    """llama.cpp's name of a device, such as "RPC0"."""
    name: bytes = _libraries()[0].ggml_backend_dev_name(device)
    return name.decode()


def _local(*kinds: int) -> list[int]:
    ggml, _ = _libraries()
    devices = (ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count()))
    return [device for device in devices if ggml.ggml_backend_dev_type(device) in kinds]


def local_gpus() -> list[int]:
    """The GPUs of this machine that llama.cpp knows."""
    return _local(_GPU, _IGPU)


def serving() -> list[tuple[str, str, int]]:
    """What `serve` lends out: name, description and bytes of memory of this machine's GPUs, or else of its CPU."""
    ggml, _ = _libraries()
    found: list[tuple[str, str, int]] = []
    for device in _serving():
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        description = ggml.ggml_backend_dev_description(device).decode("utf-8", "replace").strip()
        found.append((device_name(device), description, total.value))
    return found


def _serving() -> list[int]:
    return local_gpus()[:_MAX_DEVICES] or _local(_CPU)[:1]


def serve(endpoint: str, n_threads: int, tensor_dir: str | None) -> None:
    """Serves clients, one after the other, until the process ends. Returns only if it cannot listen.

    Args:
        endpoint: "host:port", the host an IPv4 address.
        n_threads: of the CPU.
        tensor_dir: where large weights are kept for the next time, or None.
    """
    devices = _serving()
    array = (ctypes.c_void_p * len(devices))(*devices)
    directory = None if tensor_dir is None else tensor_dir.encode()
    _libraries()[1].ggml_backend_rpc_start_server(endpoint.encode(), directory, n_threads, len(devices), array)
