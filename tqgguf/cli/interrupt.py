"""Ctrl-C while llama.cpp computes: C code knows no KeyboardInterrupt, so the model is asked to stop instead."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model import Llama


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
    try:
        with on_interrupt(model.stop):
            yield
    finally:
        model.resume()
