"""`tqgguf worker`: holds a part of another machine's model and of its cache."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

from ..._machine import processors
from ..._util import listen
from ...config import CACHE_TYPES
from ...errors import ArgumentError, TqggufError
from ..options import port, threads
from ..render.format import say, size

DEFAULT_PORT: Final = 50052
"""The default of llama.cpp."""

PATIENCE: Final = 5.0
"""Seconds within which llama.cpp must begin to listen."""

_NEWS: Final = {b"Accepted client connection": "a client has come", b"Client connection closed": "the client has gone"}
"""Lines that llama.cpp prints, and what is said instead."""


def add_parser(commands: Any) -> None:
    """Adds the command."""
    from ...model.workers import TRUST

    parser = commands.add_parser(
        "worker",
        help="hold a part of another machine's model",
        description="Lends this machine's GPUs, or else its CPU, and their memory to a model on another machine: "
        "layers and their KV cache, compressed as they are there. One client at a time. " + TRUST,
        epilog="example: tqgguf worker --host 10.0.0.2; then on the other machine: "
        "tqgguf run model.gguf --rpc 10.0.0.2:50052 -p 'What is a KV cache?'",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument(
        "--port", type=port, default=DEFAULT_PORT, metavar="N", help=f"port; 0: any free one (default: {DEFAULT_PORT})"
    )
    parser.add_argument("--threads", type=threads, metavar="N", help="threads (default: half of the processors)")
    parser.add_argument(
        "--keep-weights",
        metavar="DIR",
        help="keep weights of more than 10 MiB in this folder, so that they are not sent again (default: not kept)",
    )
    parser.set_defaults(call=call, own_interrupt=True)


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ..._native import rpc
    from ...model.workers import TRUST, ipv4_address

    try:
        host = ipv4_address(args.host)
    except ValueError as error:
        raise ArgumentError(f"--host {error}") from None
    folder = _folder(args.keep_weights)
    with listen(host, args.port, socket.AF_INET) as bound:  # to know that llama.cpp can
        number = bound.getsockname()[1]
    n_threads = args.threads or max(1, processors() // 2)
    major, minor, patch, version = rpc.protocol()
    for name, description, n_bytes in rpc.serving():
        cores = f", threads: {n_threads}" if name == "CPU" else ""
        say(f"{name}: {description}, {size(n_bytes)}{cores}")
    pqo_types = ", ".join(name for name, kind in CACHE_TYPES.items() if kind.ours)
    say(f"cache types {pqo_types} and llama.cpp's own; protocol {major}.{minor}.{patch}, tqgguf's part {version}")
    if host.startswith("127."):
        say(TRUST)
    else:
        say(f"\nWARNING: {args.host} is an address that other machines can reach.\n{TRUST}\n")

    ended = threading.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: ended.set())
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    failed = threading.Event()

    def serve() -> None:
        rpc.serve(f"{host}:{number}", n_threads, folder)
        failed.set()
        ended.set()

    for work in (serve, lambda: _relay(reader)):
        threading.Thread(target=work, daemon=True).start()
    if _listening(host, number, ended):
        say(f"listening on {args.host}:{number}, for one client at a time (Ctrl-C ends)")
        ended.wait()
    if failed.is_set() or not ended.is_set():
        raise TqggufError(f"llama.cpp does not listen on {host}:{number}; its own message is above")
    sys.stderr.flush()
    os._exit(0)  # the serving thread is inside llama.cpp, which has no way to stop it


def _relay(reader: int) -> None:
    """Reports clients that llama.cpp says have come or gone; its other lines are not needed."""
    with os.fdopen(reader, "rb") as lines:
        while lines.readline().strip() not in (b"Client connection closed", b""):
            pass  # lines of llama.cpp's start and of the connection of `_listening`
        for line in lines:
            if news := _NEWS.get(line.strip()):
                say(news)


def _listening(host: str, number: int, ended: threading.Event) -> bool:
    """Waits until the worker takes connections or has ended; returns whether it takes them."""
    end = time.monotonic() + PATIENCE
    while not ended.is_set() and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host, number), timeout=PATIENCE):
            return True
        time.sleep(0.01)
    return False


def _folder(path: str | None) -> str | None:
    if path is None:
        return None
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--keep-weights {path} is not a folder and cannot be created: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ArgumentError(f"--keep-weights {path}: no permission to write there")
    return str(folder.resolve())
