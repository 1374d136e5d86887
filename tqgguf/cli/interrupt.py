"""Ctrl-C while llama.cpp computes: it ends a command within a second, or stops the answer and not the chat."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Final

from ..model.control import CALLED_BY_C

if TYPE_CHECKING:
    from ..model.llama import Llama

_logger = logging.getLogger("llama-cpp-python")

GRACE: Final = 0.7
"""Seconds that native code may still take after Ctrl-C."""

_noticed: Final = threading.Event()
"""Whether Python has seen Ctrl-C, which `prompt_interrupt` waits for."""


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
    _noticed.clear()

    def handler(number: int, frame: FrameType | None) -> None:
        if _called_by_c(frame):  # once more, when it may have returned; if that does not help, `watch` ends it
            again = threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, number))
            again.daemon = True
            again.start()
        else:
            _noticed.set()
            signal.default_int_handler(number, frame)

    def watch() -> None:
        while byte := reader.recv(1):
            if byte[0] == signal.SIGINT and not _noticed.wait(grace):
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


def _called_by_c(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in CALLED_BY_C:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """While it lasts, Ctrl-C calls `act` and raises nothing, and `prompt_interrupt` leaves the rest to that."""

    def handler(_number: int, _frame: FrameType | None) -> None:
        _noticed.set()
        act()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def stopping(model: Llama) -> Iterator[None]:
    """While it lasts, Ctrl-C makes what the model computes raise `StoppedError`."""
    level = _logger.level

    def stop() -> None:
        _logger.setLevel(logging.CRITICAL)  # llama.cpp reports what it was asked to do as an error
        model.stop()

    try:
        with on_interrupt(stop):
            yield
    finally:
        model.resume()
        _logger.setLevel(level)
