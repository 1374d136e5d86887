"""Answers as they come: plain text anywhere, and on a terminal a line of live figures about the cache below it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from .format import printable, size, sparkline

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...model.llama import Llama


class PlainView:
    """Streams an answer to stdout.

    Attributes:
        speed: tokens per second of the newest answer, the reading of the prompt not counted; 0: none yet.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.speed = 0.0
        self._terminal = sys.stdout is not None and sys.stdout.isatty()
        self._first, self._start = 0, 0.0

    def begin(self) -> None:
        """An answer will come."""
        self._start = 0.0

    def write(self, piece: str) -> None:
        """A part of it has come."""
        if not self._start:
            self._first, self._start = self.model.n_tokens, time.perf_counter()
        elif self.model.n_tokens > self._first:
            self.speed = (self.model.n_tokens - self._first) / (time.perf_counter() - self._start)
        self._show(printable(piece) if self._terminal else piece)

    def end(self) -> None:
        """It has ended."""
        print(flush=True)

    def _show(self, piece: str) -> None:
        print(piece, end="", flush=True)


class LiveView(PlainView):
    """The same, with figures below; on anything but a terminal they follow each answer on stderr."""

    def __init__(self, model: Llama) -> None:
        from rich.console import Console

        super().__init__(model)
        self.console = Console(highlight=False, markup=False, emoji=False)
        self._errors = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._moving = self.console.is_terminal and not self.console.is_dumb_terminal
        self._live: Any = None
        self._line = ""
        self._scales: tuple[float, ...] = ()

    def begin(self) -> None:
        """An answer will come."""
        super().begin()
        self._line = ""

    def end(self) -> None:
        """It has ended."""
        from ...diagnostics.scales import k_scales

        if self._live is not None:
            self._live.stop()
            self._live = None
            self.console.print(self._line, soft_wrap=True)
        else:
            super().end()
        self._scales = tuple(k_scales(self.model).values())
        self._errors.print(self.figures(), style="dim", soft_wrap=True)

    def figures(self) -> str:
        """One line about the cache: tokens, bytes against f16, speed, the scales of K by layer."""
        info = self.model.cache_info()
        used = info.cells_used
        f16 = info.f16_bytes * used // info.n_ctx
        parts = [f"{used:,}/{info.n_ctx:,} tokens"]
        if f16:
            ours = info.bytes_per_token * used
            parts.append(f"{size(ours)}, f16 {size(f16)} ({ours / f16:.0%})")
        if self.speed:
            parts.append(f"{self.speed:.1f} tokens/s")
        if self._scales:
            parts.append(f"K scale by layer {sparkline(self._scales, self.console.encoding)}")
        return "  ".join(parts)

    def _show(self, piece: str) -> None:
        if not self._moving:
            super()._show(piece)
            return
        if self._live is None:  # only now: while the prompt is read, its bar has the terminal
            from rich.live import Live

            self._live = Live(console=self.console, transient=True, refresh_per_second=8, get_renderable=self._render)
            self._live.start()
        *lines, self._line = (self._line + piece).split("\n")
        for line in lines:  # whole lines scroll by above the figures
            self.console.print(line, soft_wrap=True)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        return Group(Text(self._line), Text(self.figures(), style="dim"))
