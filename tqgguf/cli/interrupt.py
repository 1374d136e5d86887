"""Ctrl-C while llama.cpp computes: it ends a command within a second, or stops the answer of a chat."""

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
"""Seconds that native code may take after Ctrl-C."""

_noticed: Final = threading.Event()
"""Set when Python has noticed Ctrl-C; `prompt_interrupt` waits for it."""


@contextlib.contextmanager
def prompt_interrupt(grace: float = GRACE) -> Iterator[None]:
    """In this context Ctrl-C ends the process even if the main thread stays in native code.

    Python raises KeyboardInterrupt between its own instructions only, which is ten seconds late if llama.cpp takes ten
    seconds for a batch. But the signal also writes a byte to a socket at once, which a thread waits for. If Python has
    not noticed the signal when the grace is over, the thread ends the process with status 130.

    Where Ctrl-C is ignored or has another handler, and outside the main thread, the context does nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _noticed.clear()

    def handler(number: int, frame: FrameType | None) -> None:
        # An exception raised now would be lost in C. The signal is sent again, until the function may have returned;
        # if that does not help, `watch` ends the process.
        if _called_by_c(frame):
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
    """Whether C has called the function of the frame, or one that called it.

    A counter that such functions increase would not do: Python can run the handler before their first instruction.
    """
    while frame is not None and frame.f_code not in CALLED_BY_C:
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """In this context Ctrl-C calls `act` and raises nothing, and `prompt_interrupt` does not end the process."""

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
    """In this context Ctrl-C makes the model's computation raise `StoppedError`."""
    level = _logger.level

    def stop() -> None:
        _logger.setLevel(logging.CRITICAL)  # llama.cpp reports the stop as an error
        model.stop()

    try:
        with on_interrupt(stop):
            yield
    finally:
        model.resume()
        _logger.setLevel(level)
