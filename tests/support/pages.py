"""The pages of the documentation, cut into what a reader would run and what he would see.

An indented block holds commands, one a line; a fence of `python` holds a program, and a fence of `text` right behind it
what it prints; `console` is not used. Any other fence is text to read.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

REPOSITORY = Path(__file__).parents[2]
KINDS = ("python", "text", "json")
"""What a fence may hold."""


@dataclass(frozen=True)
class Step:
    """Something to run.

    Attributes:
        line: of the page, counted from 1.
        command: a command line, or "" for a program.
        program: Python, or "".
        prints: what the page says it prints, or None.
    """

    line: int
    command: str = ""
    program: str = ""
    prints: str | None = None

    @property
    def name(self) -> str:
        """What to call it."""
        return self.command or f"program of line {self.line}"


def pages() -> list[Path]:
    """README and every page by hand; docs/api.md holds signatures, and has a test of its own."""
    return [
        REPOSITORY / "README.md",
        *(path for path in sorted((REPOSITORY / "docs").glob("*.md")) if path.name != "api.md"),
    ]


def steps(path: Path) -> Iterator[Step]:
    """What a page has to run, in its order."""
    waiting: Step | None = None
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "fence":
            if token.info not in KINDS:
                raise ValueError(f"{path.name}:{line}: a fence of {token.info!r}; allowed are {', '.join(KINDS)}")
            if waiting:
                prints = token.content if token.info == "text" else None
                yield Step(waiting.line, program=waiting.program, prints=prints)
                waiting = None
            if token.info == "python":
                waiting = Step(line, program=token.content)
            continue
        if waiting:
            yield waiting
            waiting = None
        if token.type == "code_block":
            for i, text in enumerate(token.content.splitlines()):
                if text.strip():
                    yield Step(line + i, command=shlex.join(shlex.split(text, comments=True)))
    if waiting:
        yield waiting


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Fences of text that are not what a program prints: line and contents."""
    before = ""
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        if token.type == "fence":
            if token.info == "text" and before != "python":
                yield (token.map or [0])[0] + 1, token.content
            before = token.info
        elif token.type in ("paragraph_open", "heading_open", "code_block"):
            before = ""
