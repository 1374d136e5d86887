"""The progress bar on a terminal's stderr, for everything that reports its progress."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE: Final = 0.5
"""Seconds before a bar appears; shorter work needs no bar."""


class Bar:
    """A `progress` for `Llama` and `tune`: called with (title, done, total), it shows a bar until done equals total."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._title, self._start = "", 0.0
        self._terminal: TextIO | None = None
        if sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            # llama_cpp redirects file descriptor 2 while it loads quietly; a copy of it still is the terminal.
            number = os.dup(sys.stderr.fileno())
            self._terminal = os.fdopen(number, "w", encoding=sys.stderr.encoding, errors="replace")

    def __call__(self, title: str, done: int, total: int) -> None:
        """Moves the bar."""
        if self._terminal is None:
            return
        if done >= total:
            self.close()
            return
        if title != self._title:
            self.close()
            self._title, self._start = title, time.monotonic()
        if self._bar is None and time.monotonic() - self._start > PATIENCE:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(file=self._terminal), transient=True)
            self._bar.start()
            self._bar.add_task(title, total=total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._title = None, ""
