"""Messages from standard input: on a terminal with history and editing, over several lines if wanted."""

from __future__ import annotations

import contextlib
import sys
from typing import Final

BLOCK: Final = '"""'


class Prompt:
    r"""Reads messages from standard input.

    A line that ends with \ goes on in the next one. A message that begins with three double quotes ends with three.

    Attributes:
        block: whether the newest message was in quotes, and so is not a command.
    """

    def __init__(self) -> None:
        self.block = False
        self.terminal = sys.stdin is not None and sys.stdin.isatty()
        if self.terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() its arrow keys and history)
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")

    def read(self) -> str:
        """The next message.

        Raises:
            EOFError: there are no more messages.
            KeyboardInterrupt: Ctrl-C was typed.
        """
        line = self._line("> ")
        self.block = line.lstrip().startswith(BLOCK)
        if self.block:
            return self._block(line.lstrip()[len(BLOCK) :])
        while line.endswith("\\"):
            try:
                line = line[:-1] + "\n" + self._line(". ")
            except EOFError:
                return line[:-1]
        return line.strip()

    def _block(self, line: str) -> str:
        lines = [line]
        while not lines[-1].rstrip().endswith(BLOCK):
            try:
                lines.append(self._line(". "))
            except EOFError:
                return "\n".join(lines).strip()
        lines[-1] = lines[-1].rstrip()[: -len(BLOCK)]
        return "\n".join(lines).strip()

    def _line(self, mark: str) -> str:
        if not self.terminal:
            mark = ""
        elif not sys.stdout.isatty():  # input() would write the mark among the answers
            print(mark, end="", file=sys.stderr, flush=True)
            mark = ""
        try:
            return input(mark)
        except RuntimeError:  # standard input is closed
            raise EOFError from None
