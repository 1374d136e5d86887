"""Ctrl-C while llama.cpp computes: C code knows no KeyboardInterrupt, so the model is asked to stop instead."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model import Llama

_logger = logging.getLogger("llama-cpp-python")


@contextlib.contextmanager
def on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """While it lasts, Ctrl-C calls `act` and raises nothing."""
    before = signal.signal(signal.SIGINT, lambda *_: act())
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
