"""Workers: machines that hold a part of a model and of its cache, reached through llama.cpp's RPC backend.

llama.cpp's client connects without a limit of time, asks nobody which types it knows, and takes silence for work. So a
worker is greeted here first, over a connection of its own: that it is there, free, of this protocol, and knows our
types is settled before llama.cpp hears of it. What goes wrong later the client notes (native/ggml/tq_ggml_rpc.h).
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, Final

from .._native.rpc import Protocol, add_worker, device_name, hold, local_gpus, n_alive, n_lost, protocol, release
from ..errors import ArgumentError, WorkerError
from ..gguf.info import ModelInfo

MAX_WORKERS: Final = 16
"""llama.cpp's limit of devices."""

PATIENCE: Final = 5.0
"""Seconds a worker has to answer a greeting. One that serves somebody else never does."""

TRUST: Final = (
    "Anybody who can reach a worker can read and write its memory and end it: llama.cpp's RPC has no encryption, no "
    "passwords and no defence against malformed requests. Use it on networks you trust, never on an open one."
)

# Of ggml-rpc.cpp; the number of the greeting is fixed for all protocols to come.
_HELLO: Final = 14
_CAPABILITIES: Final = 24


def parse_workers(rpc: Sequence[str]) -> tuple[str, ...]:
    """Workers as given to `Llama`, each "host:port".

    Raises:
        ArgumentError: something else, none, too many, or one twice.
    """
    if isinstance(rpc, str) or not isinstance(rpc, Sequence) or not rpc:
        raise ArgumentError(f'rpc is {rpc!r}, must be a list of workers such as ["10.0.0.2:50052"]')
    for each in rpc:
        match = re.fullmatch(r"([^\s:]+):(\d{1,5})", each) if isinstance(each, str) else None
        if match is None or not 1 <= int(match[2]) <= 65535:
            raise ArgumentError(
                f'{each!r} is no worker: give "host:port", the host a name or an IPv4 address, the port from 1 to 65535'
            )
    if len(rpc) > MAX_WORKERS:
        raise ArgumentError(f"{len(rpc)} workers given, llama.cpp takes {MAX_WORKERS} at most")
    return tuple(rpc)


def check_split(rpc: Sequence[str], info: ModelInfo, options: dict[str, Any]) -> None:
    """Sees to it that a model can be split over workers; all its layers are, unless `n_gpu_layers` says how many.

    Args:
        rpc: as given to `Llama`.
        info: of the model.
        options: for `llama_cpp.Llama`; `n_gpu_layers` is added.

    Raises:
        ArgumentError: it cannot; the message says why.
    """
    names = parse_workers(rpc)
    if len(names) > info.n_layer:
        raise ArgumentError(f"{len(names)} workers for {info.path.name}, of {info.n_layer} layers: some would get none")
    if options.get("n_gpu_layers") is None:
        options["n_gpu_layers"] = -1
    if options["n_gpu_layers"] == 0:
        raise ArgumentError("n_gpu_layers is 0, which leaves the workers of rpc no layer: leave one of the two out")
    if options.get("split_mode") not in (None, 1):  # LLAMA_SPLIT_MODE_LAYER
        raise ArgumentError(f"split_mode is {options['split_mode']}, must be 1 (by layers) with rpc")


class Workers:
    """The workers of one model, and what became of them.

    Attributes:
        names: as they were given.
        endpoints: their addresses, as llama.cpp is told.
        devices: for `llama_model_params.devices`, with NULL behind: the workers' devices, then this machine's GPUs.

    Args:
        names: from `parse_workers`.
        ours: whether they must know the types of tqgguf.

    Raises:
        ArgumentError: two names for one worker.
        WorkerError: one that cannot be reached or used; the message names it.
        UnsupportedError: this build has no RPC.
    """

    def __init__(self, names: Sequence[str], ours: bool) -> None:
        self.names, self.ours = tuple(names), ours
        self.endpoints = addresses(names)
        for i, endpoint in enumerate(self.endpoints):
            if (first := self.endpoints.index(endpoint)) != i:
                raise ArgumentError(f"{names[first]} and {names[i]} are the same worker: give it once")
        self.greet()
        self._lost_before = [n_lost(endpoint) for endpoint in self.endpoints]
        self._places: dict[str, str] = {}
        self._held: list[int] = []
        devices: list[int] = []
        for name, endpoint in zip(self.names, self.endpoints, strict=True):
            found = add_worker(endpoint)
            self._held += filter(None, map(hold, found[:1]))
            if not found:
                self.release()
                raise WorkerError(f"worker {name} went away while it was asked for its devices: start it anew")
            for i, device in enumerate(found):
                self._places[device_name(device)] = name if len(found) == 1 else f"{name}/{i}"
            devices += found
        devices += local_gpus()
        if (n := len(devices)) > MAX_WORKERS:
            self.release()
            raise ArgumentError(f"the workers and this machine have {n} devices, llama.cpp takes {MAX_WORKERS}")
        self.devices = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)

    def greet(self) -> None:
        """Raises WorkerError unless every worker is there and can be used."""
        greet(self.names, self.endpoints, self.ours)

    def release(self) -> None:
        """Lets the workers go, once the model is freed: only then can they serve somebody else."""
        while self._held:
            release(self._held.pop())

    def need_types(self) -> None:
        """Raises WorkerError unless every worker knows the types of tqgguf."""
        self.ours = True
        self.greet()

    def lost(self) -> str:
        """Which workers were lost since, and what to do; "" if none was."""
        counts = [n_lost(endpoint) for endpoint in self.endpoints]
        gone = [name for name, now, then in zip(self.names, counts, self._lost_before, strict=True) if now > then]
        if not gone:
            return ""
        return (
            f"the connection to worker {' and '.join(gone)} is lost, and with it the part of the model and of its "
            f"cache that lay there: when the worker is back, load the model again (Llama.reload)"
        )

    def place(self, device: str) -> str:
        """Where a device of llama.cpp is: a worker, "host:port", with "/number" if it has several; or its own name."""
        return self._places.get(device, device)


def greet(names: Sequence[str], endpoints: Sequence[str], ours: bool) -> None:
    """Raises WorkerError unless every worker is there and can be used.

    Args:
        names: as they were given, for messages.
        endpoints: their addresses.
        ours: whether they must know the types of tqgguf.
    """
    for name, endpoint in zip(names, endpoints, strict=True):
        _check(name, _greeted(name, endpoint), ours)


def forget(endpoints: Sequence[str]) -> None:
    """Asks these workers anew when they are greeted next: others may have come in their place."""
    for endpoint in endpoints:
        _known.pop(endpoint, None)


def ipv4_address(host: str) -> str:
    """The IPv4 address of a host. llama.cpp takes no names.

    Raises:
        ValueError: it has none; the message says so, and why.
    """
    try:
        return str(socket.getaddrinfo(host, None, family=socket.AF_INET)[0][4][0])
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{host} has no IPv4 address ({reason}), and llama.cpp takes no other") from None


def addresses(names: Sequence[str]) -> tuple[str, ...]:
    """The workers' addresses, "IPv4:port" each, which llama.cpp takes.

    Raises:
        WorkerError: one has none.
    """
    found = []
    for name in names:
        host, _, port = name.rpartition(":")
        try:
            found.append(f"{ipv4_address(host)}:{port}")
        except ValueError as error:
            raise WorkerError(f"worker {name}: {error}") from None
    return tuple(found)


_known: dict[str, Protocol] = {}
"""What workers said of themselves when they were last greeted, by endpoint."""


def _greeted(name: str, endpoint: str) -> Protocol:
    """The protocol a worker speaks. It answers one client at a time: if that is this process, it is not asked again."""
    if n_alive(endpoint) == 0 or endpoint not in _known:
        _known[endpoint] = _ask(name, endpoint)
    return _known[endpoint]


def _ask(name: str, endpoint: str) -> Protocol:
    host, _, port = endpoint.rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    except TimeoutError:
        raise WorkerError(
            f"worker {name} does not answer within {PATIENCE:g} s: is its machine on, its port open?"
        ) from None
    except OSError as error:
        raise WorkerError(
            f"no worker at {name}: {error.strerror or error}; start one there with "
            f"`tqgguf worker --host ADDRESS --port {port}`"
        ) from None
    answer = b""
    size = 4 + _CAPABILITIES
    end = time.monotonic() + PATIENCE
    with connection:
        try:
            connection.sendall(struct.pack(f"<BQ{_CAPABILITIES}x", _HELLO, _CAPABILITIES))
            while len(answer) < 8 + size and (part := connection.recv(8 + size - len(answer))):
                answer += part
                connection.settimeout(max(0.001, end - time.monotonic()))  # of the whole answer, not of each piece
        except TimeoutError:
            raise WorkerError(
                f"worker {name} takes the connection but does not answer within {PATIENCE:g} s: it serves another "
                f"client, and a worker serves one at a time"
            ) from None
        except OSError:
            pass  # closed: said below
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
    if len(answer) < 8 + size or struct.unpack_from("<Q", answer)[0] != size:
        raise WorkerError(
            f"what listens at {name} does not answer a greeting as a worker of llama.cpp does: it is something else, "
            f"or of a protocol before {protocol()[0]}; run `tqgguf worker`, of this version of tqgguf, there"
        )
    major, minor, patch, version = answer[8:12]
    return major, minor, patch, version


def _check(name: str, theirs: Protocol, ours: bool) -> None:
    mine = protocol()
    if theirs[:3] != mine[:3]:
        raise WorkerError(
            f"worker {name} speaks llama.cpp's RPC protocol {_dotted(theirs)}, this tqgguf {_dotted(mine)}: "
            f"run the same version of tqgguf on both machines"
        )
    if not ours:
        return
    if theirs[3] == 0:
        raise WorkerError(
            f"worker {name} is llama.cpp without the types of tqgguf: run `tqgguf worker` there, or choose a cache of "
            f"stock types, without a tail"
        )
    if theirs[3] != mine[3]:
        raise WorkerError(
            f"worker {name} has version {theirs[3]} of what tqgguf adds to llama.cpp's RPC, this tqgguf {mine[3]}: "
            f"run the same version of tqgguf on both machines"
        )


def _dotted(version: Protocol) -> str:
    return ".".join(map(str, version[:3]))
