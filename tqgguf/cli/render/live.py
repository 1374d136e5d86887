"""Answers while they are generated: plain text, and on a terminal also a line of live figures about the cache."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ...errors import TqggufError
from .format import printable, size, sparkline

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...model.llama import Llama


def answer_pieces(chunks: Iterable[Any]) -> Iterator[tuple[str, str | None]]:
    """The texts of a streamed answer without white space at its beginning, each with the reason if the answer ends."""
    begun = False
    for chunk in chunks:
        choice = chunk["choices"][0]
        piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        yield piece, choice["finish_reason"]


class PlainView:
    """Streams an answer to stdout.

    Attributes:
        speed: tokens per second of the newest answer, without the time for the prompt; 0 before the first answer.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.speed = 0.0
        self._terminal = sys.stdout is not None and sys.stdout.isatty()
        self._first, self._start = 0, 0.0

    def begin(self) -> None:
        """Begins an answer."""
        self._start = 0.0

    def write(self, piece: str) -> None:
        """Shows a part of the answer."""
        if not self._start:
            self._first, self._start = self.model.n_tokens, time.perf_counter()
        elif self.model.n_tokens > self._first:
            self.speed = (self.model.n_tokens - self._first) / (time.perf_counter() - self._start)
        self._show(printable(piece) if self._terminal else piece)

    def end(self) -> None:
        """Ends the answer."""
        print(flush=True)

    def _show(self, piece: str) -> None:
        print(piece, end="", flush=True)


class LiveView(PlainView):
    """The same with figures below; in a file or a pipe the figures follow each answer on stderr."""

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
        """Begins an answer."""
        super().begin()
        self._line = ""

    def end(self) -> None:
        """Ends the answer."""
        from ...diagnostics.cache_contents import k_scales

        if self._live is not None:
            self._live.stop()
            self._live = None
            self.console.print(self._line, soft_wrap=True)
        else:
            super().end()
        try:
            self._scales = tuple(k_scales(self.model).values())
        except TqggufError as error:
            self._errors.print(f"tqgguf: note: K's scales are not shown: {error}", soft_wrap=True)
        self._errors.print(self.figures(), style="dim", soft_wrap=True)

    def figures(self) -> str:
        """One line about the cache: tokens, bytes against f16, speed, the scales of K by layer."""
        info = self.model.cache_info()
        used = info.cells_used
        f16 = info.f16_bytes * used // info.n_ctx
        parts = [f"{used:,}/{info.n_ctx:,} tokens"]
        if f16:
            n_bytes = info.bytes_per_token * used
            parts.append(f"{size(n_bytes)}, f16 {size(f16)} ({n_bytes / f16:.0%})")
        if self.speed:
            parts.append(f"{self.speed:.1f} tokens/s")
        if self._scales:
            parts.append(f"K scale by layer {sparkline(self._scales, self.console.encoding)}")
        return "  ".join(parts)

    def _show(self, piece: str) -> None:
        if not self._moving:
            super()._show(piece)
            return
        if self._live is None:  # not earlier, because the progress bar uses the terminal while the prompt is read
            from rich.live import Live

            self._live = Live(console=self.console, transient=True, refresh_per_second=8, get_renderable=self._render)
            self._live.start()
        *lines, self._line = (self._line + piece).split("\n")
        for line in lines:  # whole lines scroll above the figures
            self.console.print(line, soft_wrap=True)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        return Group(Text(self._line), Text(self.figures(), style="dim"))
