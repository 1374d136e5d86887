"""Who may use a model: one thread at a time, while it is open and its workers are there.

The bindings make every method take its turn (patches/bindings). Here stands what tqgguf adds: the kinds of errors, and
the workers that may have been lost meanwhile.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from .._native import import_llama_cpp
from ..errors import ArgumentError, CacheClosedError, ComputationError, OutOfMemoryError, WorkerError
from .workers import Workers

llama_cpp: Any = import_llama_cpp()

threads_left: Any = llama_cpp._internals.threads_left
"""As many threads as a context can have in this process, which may be a fork."""

_KINDS = {ValueError: ArgumentError, RuntimeError: ComputationError, MemoryError: OutOfMemoryError}
"""What the bindings raise, and what tqgguf makes of it: its own errors are of these kinds, too."""


class ModelTurns(llama_cpp._internals.Turns):  # type: ignore[misc]
    """Who uses a model now; the bindings make one for each model that is loaded.

    Attributes:
        workers: that the model lies on.
        context: the `llama_context` that waits for them.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.workers: Workers | None = None
        self.context: Any = None
        self._loaded_by = os.getpid()

    def closed_error(self) -> Exception:
        return CacheClosedError(f"the model {self.name} was closed")

    def refuse(self) -> None:
        """Raises unless the model can be used in this process."""
        if self.workers is not None and os.getpid() != self._loaded_by:
            raise ComputationError(
                f"the model {self.name} was loaded by process {self._loaded_by}, of which this one is a fork: its "
                f"workers serve that one. Load it here, on other workers"
            )
        super().refuse()

    def refuse_lost(self) -> None:
        """Raises WorkerError if a worker is lost."""
        if self.workers is not None and (message := self.workers.lost()):
            raise WorkerError(message)

    @contextlib.contextmanager
    def taken(self, what: str, changes: bool = False, step: bool = False) -> Iterator[None]:
        """For what uses the context: waits until no other thread does.

        Args:
            what: who asks, for messages.
            changes: whether it changes the cache, so that an answer that is not complete cannot go on.
            step: whether it is a step of an answer, which changes the cache for itself.
        """
        self.refuse_lost()
        with self._own_errors(), super().taken(what, changes, step):
            try:
                yield
            finally:
                if self.workers is not None and not self.closed:
                    llama_cpp.llama_synchronize(self.context)
                self.refuse_lost()

    @contextlib.contextmanager
    def looking(self, what: str) -> Iterator[None]:
        """For what looks at the context and asks nothing of the workers, which may be lost."""
        with self._own_errors(), super().taken(what):
            yield

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """For what reads the vocabulary alone, which does not wait for answers."""
        with self._own_errors(), super().reading():
            yield

    @contextlib.contextmanager
    def last(self) -> Iterator[bool]:
        """The turn that closes the model; yields whether there is something to free."""
        with self._own_errors(), super().last() as first:
            yield first

    @contextlib.contextmanager
    def lent(self, what: str) -> Iterator[None]:
        """While a function of the user's is called in the middle of a computation."""
        with super().lent(what):
            try:
                yield
            except BaseException as error:
                error._of_guest = True  # type: ignore[attr-defined]
                raise

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError, MemoryError) as error:
            if hasattr(error, "_of_guest") or type(error) not in _KINDS:
                raise
            raise _KINDS[type(error)](str(error)) from error
