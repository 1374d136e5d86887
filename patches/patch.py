"""Applying patches with nothing but Python's standard library, as the build of an sdist must on a machine without git.

It is strict: a hunk fits at its place, or at the only place of the file where all of its lines stand. What developers
do with patches, tool.py does with git.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

Files = dict[str, bytes]
"""Contents by path in the work tree, such as llama.cpp/src/llama.cpp."""

TREES = {"llama.cpp": "llama.cpp", "bindings": "llama_cpp"}
"""The folder of a series, and the folder of the work tree that its patches change."""


class ToolError(Exception):
    """A cause that is printed as it stands."""


@dataclass
class Hunk:
    start: int  # its first line in the file before the patch, from 0
    lines: list[bytes]  # each with its mark: " ", "-" or "+"
    name: str

    def marked(self, marks: bytes) -> list[bytes]:
        """The lines that have one of these marks, without it."""
        return [line[1:] for line in self.lines if line[0] in marks]


@dataclass
class Patch:
    name: str  # its path below patches/, such as llama.cpp/0001-types.patch
    header: str  # everything before the first file
    body: bytes
    files: dict[str, list[Hunk]]

    @property
    def tree(self) -> str:
        return TREES[self.name.partition("/")[0]]

    def hunks(self) -> list[Hunk]:
        return [hunk for hunks in self.files.values() for hunk in hunks]


def read_patch(directory: Path, name: str) -> Patch:
    if not (directory / name).is_file():
        raise ToolError(f"the series names {name}, which does not exist")
    data = (directory / name).read_bytes()
    at = re.search(rb"^--- a/", data, re.MULTILINE)
    begin = at.start() if at else len(data)
    patch = Patch(name, data[:begin].decode("utf-8"), data[begin:], {})
    lines, i = patch.body.split(b"\n")[:-1], 0
    while i < len(lines):
        if lines[i].startswith(b"--- a/") and lines[i + 1 : i + 2] == [b"+++ b/" + lines[i][6:]]:
            hunks = patch.files.setdefault(f"{patch.tree}/{lines[i][6:].decode()}", [])
            i += 2
            continue
        match = re.match(rb"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", lines[i])
        if not match:
            raise ToolError(f"{name}: expected a file or a hunk, found {lines[i].decode('utf-8', 'replace')!r}")
        n_old, n_new = (1 if n is None else int(n) for n in match.group(2, 3))
        hunk = Hunk(int(match[1]) - 1, [], f"hunk {len(hunks) + 1} ({lines[i].decode('utf-8', 'replace')})")
        hunks.append(hunk)
        i += 1
        while (n_old > 0 or n_new > 0) and i < len(lines) and lines[i][:1] in (b" ", b"-", b"+"):
            hunk.lines.append(lines[i])
            n_old -= lines[i][:1] != b"+"
            n_new -= lines[i][:1] != b"-"
            i += 1
        if n_old or n_new:
            raise ToolError(f"{name}: {hunk.name} is cut short or miscounted")
    return patch


def apply_patch(patch: Patch, files: Files) -> int:
    """Changes files; returns how many lines from its place the hunk fitted that is furthest from it."""
    furthest = 0
    for path, hunks in patch.files.items():
        if path not in files:
            raise ToolError(f"{patch.name}: {path}: no such file upstream")
        lines, shift = files[path].split(b"\n"), 0
        for hunk in hunks:
            old, new, at = hunk.marked(b" -"), hunk.marked(b" +"), hunk.start + shift
            if lines[at : at + len(old)] != old:
                places = [i for i in range(len(lines)) if lines[i : i + len(old)] == old]
                if len(places) != 1:
                    raise ToolError(f"{patch.name}: {path}: {hunk.name} does not apply")
                furthest = max(furthest, places[0] - at, at - places[0])
                at = places[0]
            lines[at : at + len(old)] = new
            shift = at - hunk.start + len(new) - len(old)
        files[path] = b"\n".join(lines)
    return furthest
