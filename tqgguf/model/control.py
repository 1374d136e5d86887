"""What a model reports while llama.cpp works, and how that is ended from outside."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, Final, TypeVar

from .._native import import_llama_cpp
from .._native.libggml import address, base, ffi

F = TypeVar("F", bound=Callable[..., Any])

Progress = Callable[[str, int, int], None]
"""Called with a title, how much is done, and of how much."""


CALLED_BY_C: Final[set[CodeType]] = set()
"""Code of Python's that llama.cpp calls, where an exception would be printed and lost: also a KeyboardInterrupt, which
Python raises on entering the function, before its first line."""


def called_by_c(function: F) -> F:
    """Decorator: adds a function to `CALLED_BY_C`."""
    CALLED_BY_C.add(function.__code__)
    return function


@contextlib.contextmanager
def interrupts_held(act: Callable[[], None]) -> Iterator[None]:
    """In this context a Ctrl-C calls `act`, where it would raise KeyboardInterrupt, which C code would lose.

    Where somebody else handles Ctrl-C, or in another thread than the main one, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Control:
    """The two functions that llama.cpp calls, and what they know.

    Apart from the model, for ctypes would keep it alive in a circle.

    Attributes:
        progress: what is told; None: nothing.
        failure: what `progress` raised while the model was loaded, which ended that.
        on_load: for `llama_model_params.progress_callback`.
        on_step: for `llama_set_abort_callback`, called between the steps of a graph. It is no Python function: in one,
            the KeyboardInterrupt of a Ctrl-C would be lost.
        flag: what `on_step` reads.
    """

    def __init__(self, progress: Progress | None) -> None:
        llama_cpp: Any = import_llama_cpp()
        self.progress = progress
        self.flag = ctypes.c_bool(False)
        self.failure: BaseException | None = None
        self.on_load = llama_cpp.llama_progress_callback(self._loaded)
        is_set = ffi().addressof(base(), "tq_ggml_is_set")
        self.on_step = llama_cpp.ggml_abort_callback(address(is_set))

    @property
    def stopped(self) -> bool:
        """Whether what is computed shall end."""
        return self.flag.value

    @stopped.setter
    def stopped(self, value: bool) -> None:
        self.flag.value = value

    def _loaded(self, fraction: float, _: Any) -> bool:
        """False ends loading. An exception would be lost in C."""
        try:
            if self.progress:
                self.progress("loading the model", round(100 * fraction), 100)
        except BaseException as error:
            self.failure = error
        return self.failure is None
