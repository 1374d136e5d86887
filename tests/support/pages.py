"""Splits the pages of the documentation into commands, programs and the output that a reader would see.

An indented block holds commands, one a line. A fence of `python` holds a program. A fence of `text` directly after it
holds the program's output. Any other fence of `text` or `json` is text to read; other kinds of fences are errors.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

REPOSITORY = Path(__file__).parents[2]
KINDS = ("python", "text", "json")
"""Allowed kinds of fences."""


@dataclass(frozen=True)
class Step:
    """A command or a program of a page.

    Attributes:
        line: line on the page, counted from 1.
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
        """Its name in messages."""
        return self.command or f"program of line {self.line}"


def pages() -> list[Path]:
    """README and every page of docs/ except docs/api.md, which is generated and has its own test."""
    return [
        REPOSITORY / "README.md",
        *(path for path in sorted((REPOSITORY / "docs").glob("*.md")) if path.name != "api.md"),
    ]


def steps(path: Path) -> Iterator[Step]:
    """The commands and programs of a page, in order."""
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
    """Fences of text that are not the output of a program, as (line, contents)."""
    before = ""
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        if token.type == "fence":
            if token.info == "text" and before != "python":
                yield (token.map or [0])[0] + 1, token.content
            before = token.info
        elif token.type in ("paragraph_open", "heading_open", "code_block"):
            before = ""
