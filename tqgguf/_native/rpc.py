"""What tqgguf calls of libggml and libggml-rpc: devices on other machines, connections to them, and being one."""

from __future__ import annotations

import functools
from typing import Any, Final

from ..errors import UnsupportedError
from .bindings import import_llama_cpp
from .libggml import address, base, ffi, library_of, pointer
from .library import library_path

Protocol = tuple[int, int, int, int]
"""llama.cpp's RPC protocol, major, minor and patch, and the version of ours (tq_ggml_rpc.h; 0: one without)."""

_CPU, _GPU, _IGPU = 0, 1, 2
_MAX_DEVICES: Final = 16


@functools.cache
def _rpc() -> Any:
    """libggml-rpc.

    Raises:
        UnsupportedError: this build has no RPC.
        LibraryError: the native libraries are missing.
    """
    import_llama_cpp()
    if not library_path("ggml-rpc").exists():
        raise UnsupportedError(f"{library_path('ggml-rpc')} does not exist: this tqgguf was built with TQGGUF_RPC=OFF")
    return library_of("ggml-rpc")


def protocol() -> Protocol:
    """What this build speaks."""
    number = int(_rpc().tq_ggml_rpc_protocol())
    return number >> 24, number >> 16 & 255, number >> 8 & 255, number & 255


def n_lost(endpoint: str) -> int:
    """Connections of this process to "host:port" that were lost so far."""
    return int(_rpc().tq_ggml_rpc_n_lost(endpoint.encode()))


def n_alive(endpoint: str) -> int:
    """Connections of this process to "host:port" that are in use: 1, or 0."""
    return int(_rpc().tq_ggml_rpc_n_alive(endpoint.encode()))


def add_worker(endpoint: str) -> list[int]:
    """The devices (`ggml_backend_dev_t`) of a worker; none if it could not be asked. They are never freed."""
    registry = _rpc().ggml_backend_rpc_add_server(endpoint.encode())
    count = base().ggml_backend_reg_dev_count(registry) if registry else 0
    return [address(base().ggml_backend_reg_dev_get(registry, i)) for i in range(count)]


def hold(device: int) -> int:
    """Keeps the connection to a device's worker, which llama.cpp drops and makes anew while a model is loaded.

    Returns:
        What `release` takes; 0 if it could not be kept.
    """
    return address(base().ggml_backend_dev_init(pointer("void *", device), ffi().NULL))


def release(held: int) -> None:
    """Lets go of what `hold` returned."""
    base().ggml_backend_free(pointer("void *", held))


def device_name(device: int) -> str:
    """llama.cpp's name of a device, such as "RPC0"."""
    return str(ffi().string(base().ggml_backend_dev_name(pointer("void *", device))).decode())


def _local(*kinds: int) -> list[int]:
    ggml = library_of("ggml")
    devices = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    return [address(device) for device in devices if base().ggml_backend_dev_type(device) in kinds]


def local_gpus() -> list[int]:
    """The GPUs of this machine that llama.cpp knows."""
    return _local(_GPU, _IGPU)


def serving() -> list[tuple[str, str, int]]:
    """What `serve` lends out: name, description and bytes of memory of this machine's GPUs, or else of its CPU."""
    _rpc()
    found: list[tuple[str, str, int]] = []
    for device in _serving():
        free, total = ffi().new("size_t *"), ffi().new("size_t *")
        base().ggml_backend_dev_memory(pointer("void *", device), free, total)
        text = ffi().string(base().ggml_backend_dev_description(pointer("void *", device)))
        found.append((device_name(device), text.decode("utf-8", "replace").strip(), int(total[0])))
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
    rpc, devices = _rpc(), [pointer("void *", device) for device in _serving()]
    directory = ffi().NULL if tensor_dir is None else tensor_dir.encode()
    rpc.ggml_backend_rpc_start_server(endpoint.encode(), directory, n_threads, len(devices), devices)
