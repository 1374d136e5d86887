"""Ctrl-C that ends a command within a second, also while llama.cpp computes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final

GRACE: Final = 0.7
"""Seconds that native code may still take after Ctrl-C."""


@contextlib.contextmanager
def prompt_interrupt(grace: float = GRACE) -> Iterator[None]:
    """While it lasts, Ctrl-C ends the process even if the main thread stays in native code.

    Python raises KeyboardInterrupt only between its own instructions: in the midst of a batch that takes llama.cpp ten
    seconds, that is ten seconds late. The signal also writes a byte to a socket at once, which a thread waits for; if
    Python has not noticed the signal when the grace is over, the thread ends the process with status 130.

    Where Ctrl-C is ignored or handled by somebody else, and outside the main thread, it does nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    noticed = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        noticed.set()
        signal.default_int_handler(number, frame)

    def watch() -> None:
        while byte := reader.recv(1):
            if byte[0] == signal.SIGINT and not noticed.wait(grace):
                with contextlib.suppress(OSError):
                    os.write(2, b"\ntqgguf: interrupted\n")
                os._exit(130)

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, handler)
    thread = threading.Thread(target=watch, name="tqgguf-interrupt", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join()
        reader.close()
