"""What a model reports while llama.cpp works, and how that is ended from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._native import import_llama_cpp

__all__ = ["Control", "Progress"]

Progress = Callable[[str, int, int], None]
"""Called with a title, how much is done, and of how much."""


class Control:
    """The two functions that llama.cpp calls, and what they know.

    Apart from the model, for ctypes would keep it alive in a circle.

    Attributes:
        progress: what is told; None: nothing.
        stopped: whether what is computed shall end.
        failure: what `progress` raised while the model was loaded, which ended that.
        on_load: for `llama_model_params.progress_callback`.
        on_step: for `llama_set_abort_callback`, called between the steps of a graph: 10 us for a token of four layers.
    """

    def __init__(self, progress: Progress | None) -> None:
        llama_cpp: Any = import_llama_cpp()
        self.progress = progress
        self.stopped = False
        self.failure: BaseException | None = None
        self.on_load = llama_cpp.llama_progress_callback(self._loaded)
        self.on_step = llama_cpp.ggml_abort_callback(lambda _: self.stopped)

    def _loaded(self, fraction: float, _: Any) -> bool:
        """False ends loading. An exception would be lost in C."""
        try:
            if self.progress:
                self.progress("loading the model", round(100 * fraction), 100)
        except BaseException as error:
            self.failure = error
        return self.failure is None
