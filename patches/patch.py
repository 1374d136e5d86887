"""Patches: reading them, applying them exactly or with less context, and writing them from the files they change.

An implementation of our own, in plain Python, because whoever can build the project must be able to run it, and because
what is exported must be the same bytes on every machine.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

CONTEXT = 3

# Text by path; None where upstream has no such file.
Contents = dict[str, "str | None"]


class ToolError(Exception):
    """A cause that is printed as it stands."""


@dataclass
class Hunk:
    start: int  # 1-based first line in the file before the patch; 0 for an empty file
    old: list[str]
    new: list[str]
    header: str
    number: int

    def trimmed(self, before: int, after: int) -> Hunk | None:
        """The same change with less context, if it has so much of it and something is left to find its place by."""
        pairs = list(zip(self.old, self.new, strict=False))
        back = list(zip(self.old[::-1], self.new[::-1], strict=False))
        n_before = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        n_after = next((i for i, (a, b) in enumerate(back) if a != b), len(back))
        if before > n_before or after > n_after or before + after >= len(self.old):
            return None
        old, new = (lines[before : len(lines) - after] for lines in (self.old, self.new))
        return Hunk(self.start + before, old, new, self.header, self.number)

    def text(self, path: str) -> str:
        """As a patch of one hunk, to be read."""
        out = [f"--- a/{path}\n+++ b/{path}\n{self.header}\n"]
        i = j = 0
        for bi, bj, n in [*matching_blocks(self.old, self.new), (len(self.old), len(self.new), 0)]:
            out += ["-" + line for line in self.old[i:bi]] + ["+" + line for line in self.new[j:bj]]
            out += [" " + line for line in self.old[bi : bi + n]]
            i, j = bi + n, bj + n
        return "".join(out)


@dataclass
class Patch:
    name: str
    header: str  # everything before the first file
    files: dict[str, list[Hunk]]

    def lines_changed(self) -> tuple[int, int]:
        added = removed = 0
        for hunk in (h for hunks in self.files.values() for h in hunks):
            same = sum(n for _, _, n in matching_blocks(hunk.old, hunk.new))
            added += len(hunk.new) - same
            removed += len(hunk.old) - same
        return added, removed


def parse_patch(path: Path) -> Patch:
    if not path.is_file():
        raise ToolError(f"series names {path.name}, which does not exist")
    lines = split_lines(read_text(path))
    first = next((i for i, line in enumerate(lines) if line.startswith("--- a/")), len(lines))
    patch = Patch(path.name, "".join(lines[:first]), {})
    hunks: list[Hunk] = []
    i = first
    while i < len(lines):
        if lines[i].startswith("--- a/") and i + 1 < len(lines) and lines[i + 1] == "+++ b/" + lines[i][6:]:
            hunks = patch.files.setdefault(lines[i][6:].rstrip("\n"), [])
            i += 2
            continue
        match = re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", lines[i])
        if not match:
            raise ToolError(f"{path.name}:{i + 1}: expected a file or a hunk, found {lines[i].rstrip()!r}")
        n_old, n_new = (int(g) if g is not None else 1 for g in match.group(2, 3))
        hunk = Hunk(int(match.group(1)), [], [], lines[i].rstrip("\n"), len(hunks) + 1)
        i += 1
        while (len(hunk.old) < n_old or len(hunk.new) < n_new) and i < len(lines):
            mark, text = lines[i][0], lines[i][1:]
            if mark not in " +-":
                break
            if mark != "+":
                hunk.old.append(text)
            if mark != "-":
                hunk.new.append(text)
            i += 1
        if len(hunk.old) != n_old or len(hunk.new) != n_new:
            raise ToolError(f"{path.name}: hunk {hunk.number} ({hunk.header}) is cut short or miscounted")
        hunks.append(hunk)
    return patch


def split_lines(text: str) -> list[str]:
    """Lines with their newlines. str.splitlines would also split at form feeds and Unicode separators."""
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# ---- Applying ----


@dataclass
class Outcome:
    """What became of one patch."""

    n_hunks: int = 0
    offsets: list[int] = field(default_factory=list)  # of hunks that moved
    loosened: list[str] = field(default_factory=list)  # messages of hunks that fit with less context
    failures: list[str] = field(default_factory=list)  # messages of hunks, or files, that do not fit
    rejects: list[tuple[str, Hunk]] = field(default_factory=list)  # those hunks

    @property
    def word(self) -> str:
        if self.failures:
            return f"FAIL {len(self.failures)} of {self.n_hunks}"
        if self.loosened:
            return f"context {len(self.loosened)} of {self.n_hunks}"
        return f"offset {max(self.offsets, key=abs):+d}" if self.offsets else "clean"

    def remarks(self) -> list[str]:
        return self.loosened + self.failures


def find(lines: list[str], old: list[str], expected: int, lowest: int) -> int | None:
    """The index nearest to expected, at or after lowest, where the lines old stand."""
    last = len(lines) - len(old)
    for distance in range(max(abs(expected - lowest), abs(last - expected), 0) + 1):
        for at in dict.fromkeys((expected - distance, expected + distance)):
            if lowest <= at <= last and lines[at : at + len(old)] == old:
                return at
    return None


def find_loosely(lines: list[str], hunk: Hunk, lowest: int) -> tuple[Hunk, int] | None:
    """The hunk with one or two lines of context less on either side, and its place, if there is just one."""
    for before, after in sorted(((a, b) for a in range(3) for b in range(3)), key=lambda ab: (sum(ab), max(ab))):
        less = hunk.trimmed(before, after)
        if less is None or not before + after:
            continue
        n = len(less.old)
        places = [at for at in range(lowest, len(lines) - n + 1) if lines[at : at + n] == less.old]
        if places:
            return (less, places[0]) if len(places) == 1 else None
    return None


def apply_patch(patch: Patch, files: Contents, loosen: bool = False) -> tuple[dict[str, str], Outcome]:
    """Applies every hunk that can be applied; with loosen also those that fit with less context."""
    result: dict[str, str] = {}
    outcome = Outcome(sum(len(hunks) for hunks in patch.files.values()))
    for path, hunks in patch.files.items():
        text = files.get(path)
        if text is None:
            outcome.failures += [f"{patch.name}: {path}: no such file upstream"] * len(hunks)
            outcome.rejects += [(path, hunk) for hunk in hunks]
            continue
        lines = split_lines(text)
        done: list[str] = []
        position = shift = 0
        for hunk in hunks:
            expected = max(hunk.start - 1, 0)
            at = find(lines, hunk.old, expected + shift, position)
            if at is None:
                name = f"{patch.name}: {path}: hunk {hunk.number} ({hunk.header})"
                loose = find_loosely(lines, hunk, position) if loosen else None
                if loose is None:
                    outcome.failures.append(f"{name} does not apply")
                    outcome.rejects.append((path, hunk))
                    continue
                n_less = len(hunk.old) - len(loose[0].old)
                outcome.loosened.append(f"{name} applies without {n_less} of its context lines")
                hunk, at = loose
                expected = max(hunk.start - 1, 0)
            shift = at - expected
            if shift:
                outcome.offsets.append(shift)
            done += lines[position:at] + hunk.new
            position = at + len(hunk.old)
        result[path] = "".join(done + lines[position:])
    return result, outcome


def apply_series(series: list[Patch], pristine: Contents, loosen: bool = False) -> tuple[list[Contents], list[Outcome]]:
    """The contents of the touched files before the first and after every patch, and what became of each."""
    stages = [dict(pristine)]
    outcomes = []
    for patch in series:
        changed, outcome = apply_patch(patch, stages[-1], loosen)
        stages.append({**stages[-1], **changed})
        outcomes.append(outcome)
    return stages, outcomes


def touched(series: Iterable[Patch]) -> list[str]:
    return sorted({path for patch in series for path in patch.files})


# ---- Diffs ----


def matching_blocks(a: list[str], b: list[str]) -> list[tuple[int, int, int]]:
    """Runs (i, j, n) of equal lines by patience diff: lines that occur once on both sides are the anchors. Fast on
    files of ten thousand lines, where difflib is not, and the same on every machine."""
    blocks: list[tuple[int, int, int]] = []

    def walk(a0: int, a1: int, b0: int, b1: int) -> None:
        n = 0
        while a0 + n < a1 and b0 + n < b1 and a[a0 + n] == b[b0 + n]:
            n += 1
        if n:
            blocks.append((a0, b0, n))
        a0, b0 = a0 + n, b0 + n
        n = 0
        while a1 - n > a0 and b1 - n > b0 and a[a1 - n - 1] == b[b1 - n - 1]:
            n += 1
        tail = (a1 - n, b1 - n, n)
        a1, b1 = a1 - n, b1 - n
        if a0 < a1 and b0 < b1:
            anchors = unique_anchors(a, b, (a0, a1), (b0, b1))
            if anchors:
                for i, j in anchors:
                    walk(a0, i, b0, j)
                    a0, b0 = i, j
                walk(a0, a1, b0, b1)
            else:
                matcher = difflib.SequenceMatcher(None, a[a0:a1], b[b0:b1], autojunk=False)
                blocks.extend((a0 + i, b0 + j, size) for i, j, size in matcher.get_matching_blocks() if size)
        if n:
            blocks.append(tail)

    walk(0, len(a), 0, len(b))
    merged: list[tuple[int, int, int]] = []
    for i, j, n in blocks:
        if merged and merged[-1][0] + merged[-1][2] == i and merged[-1][1] + merged[-1][2] == j:
            merged[-1] = (merged[-1][0], merged[-1][1], merged[-1][2] + n)
        else:
            merged.append((i, j, n))
    return merged


def unique_anchors(a: list[str], b: list[str], ra: tuple[int, int], rb: tuple[int, int]) -> list[tuple[int, int]]:
    def once(lines: list[str], span: tuple[int, int]) -> dict[str, int]:
        seen: dict[str, int] = {}
        for i in range(*span):
            seen[lines[i]] = -1 if lines[i] in seen else i
        return {line: i for line, i in seen.items() if i >= 0}

    in_b = once(b, rb)
    pairs = sorted((i, in_b[line]) for line, i in once(a, ra).items() if line in in_b)
    # Longest increasing subsequence in b.
    tops: list[int] = []
    ends: list[int] = []
    before: list[int] = []
    for k, (_, j) in enumerate(pairs):
        at = bisect_left(tops, j)
        before.append(ends[at - 1] if at else -1)
        tops[at : at + 1] = [j]
        ends[at : at + 1] = [k]
    chain = []
    k = ends[-1] if ends else -1
    while k >= 0:
        chain.append(pairs[k])
        k = before[k]
    return chain[::-1]


def diff(path: str, old: str, new: str) -> str:
    """A unified diff with three lines of context and, like git's, the enclosing definition behind each hunk's @@."""
    a, b = split_lines(old), split_lines(new)
    if any(text and not text.endswith("\n") for text in (old, new)):
        raise ToolError(f"{path} does not end in a newline: such a file cannot be patched here")
    edits: list[tuple[int, int, int, int]] = []
    i = j = 0
    for bi, bj, n in [*matching_blocks(a, b), (len(a), len(b), 0)]:
        if i < bi or j < bj:
            edits.append((i, bi, j, bj))
        i, j = bi + n, bj + n
    out = [f"--- a/{path}\n", f"+++ b/{path}\n"]
    while edits:
        group = [edits.pop(0)]
        while edits and edits[0][0] - group[-1][1] <= 2 * CONTEXT:
            group.append(edits.pop(0))
        a0 = max(group[0][0] - CONTEXT, 0)
        a1 = min(group[-1][1] + CONTEXT, len(a))
        b0 = group[0][2] - (group[0][0] - a0)
        b1 = group[-1][3] + (a1 - group[-1][1])
        section = next((line.rstrip()[:80] for line in reversed(a[:a0]) if re.match(r"[A-Za-z_$]", line)), "")
        out.append(f"@@ -{span(a0, a1)} +{span(b0, b1)} @@ {section}".rstrip() + "\n")
        at = a0
        for x0, x1, y0, y1 in group:
            for mark, lines in ((" ", a[at:x0]), ("-", a[x0:x1]), ("+", b[y0:y1])):
                out += [mark + line for line in lines]
            at = x1
        out += [" " + line for line in a[at:a1]]
    return "".join(out)


def span(begin: int, end: int) -> str:
    start = begin + 1 if end > begin else begin
    return f"{start}" if end - begin == 1 else f"{start},{end - begin}"


def export_patch(patch: Patch, before: Contents, after: Contents) -> str:
    parts = [patch.header]
    for path in sorted(after):
        old, new = before.get(path), after[path]
        if old is not None and new is not None and old != new:
            parts.append(diff(path, old, new))
    return "".join(parts)


def diff_hunks(path: str, old: str, new: str) -> list[Hunk]:
    with tempfile.TemporaryDirectory() as scratch:
        name = Path(scratch) / "edit"
        name.write_bytes(encode(diff(path, old, new)))
        return parse_patch(name).files[path]
