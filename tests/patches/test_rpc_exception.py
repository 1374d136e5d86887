"""A request whose handling throws ends a client's connection, and not the worker (fixes/0008-rpc-exception)."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ALLOC_BUFFER, BUFFER_GET_BASE, GET_TENSOR, HELLO = 0, 3, 8, 14
I8 = 24  # GGML_TYPE_I8
N_BYTES = 2**30


def ask(client: socket.socket, command: int, request: bytes, n_answer: int) -> bytes:
    """The answer to a command without its length; shorter if the worker hung up."""
    client.sendall(struct.pack("<BQ", command, len(request)) + request)
    return client.makefile("rb").read(8 + n_answer)[8:]


def greeted(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    assert len(ask(client, HELLO, bytes(24), 28)) == 28
    return client


@pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit")
def test_a_tensor_that_there_is_no_memory_to_send(worker: Callable[..., Any]) -> None:
    import resource

    mine = worker()
    with greeted(mine.port) as client:
        buffer, _ = struct.unpack("<QQ", ask(client, ALLOC_BUFFER, struct.pack("<IQ", 0, N_BYTES), 16))
        (data,) = struct.unpack("<Q", ask(client, BUFFER_GET_BASE, struct.pack("<Q", buffer), 8))
        size = int(Path(f"/proc/{mine.process.pid}/status").read_text().partition("VmSize:")[2].split()[0]) * 1024
        limit = size + N_BYTES // 4
        resource.prlimit(mine.process.pid, resource.RLIMIT_AS, (limit, limit))
        shape = (N_BYTES, 1, 1, 1, 1, N_BYTES, N_BYTES, N_BYTES)
        tensor = struct.pack("<QIQ8I72x80xQQQ64xi", 1, I8, buffer, *shape, 0, 0, data, 0)
        assert ask(client, GET_TENSOR, tensor + struct.pack("<QQ", 0, N_BYTES), N_BYTES) == b""
    assert "a client's request fails: std::bad_alloc" in mine.said
    greeted(mine.port).close()
    assert mine.process.poll() is None
