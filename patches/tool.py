#!/usr/bin/env python3
"""Fetch the pinned upstream source, apply the patch series to it, check the series and re-export it.

fetch and apply, which a build calls, need Python's standard library alone. The other commands are for developers, and
call git.

Exit status: 0 done, 1 failure with one readable cause, 2 usage error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from patch import TREES, Files, Patch, ToolError, apply_patch, read_patch
from release import DOWNLOADS, fetch, ggml_version, obtain, read_pin, read_releases, read_upstream, say, sha256

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "build" / "upstream"
FORMAT = "1"  # of the work tree: part of the stamp's key
HOOK_FIELDS = ("What:", "Why not in native/:", "Relies on:", "Tested by:")
FIX_FIELDS = ("What happens:", "To see it:", "Cause:", "Mend:", "Tested by:")
COLUMNS = 120
STAMP = ".tqgguf-stamp.json"


# ---- The series ----


def read_series(directory: Path) -> list[Patch]:
    """The patches of all series there are, in the order in which they are applied."""
    return [
        read_patch(directory, f"{folder}/{line}")
        for folder in TREES
        if (directory / folder / "series").is_file()
        for line in (directory / folder / "series").read_text(encoding="utf-8").split("\n")
        if line and not line.startswith("#")
    ]


def touched(series: Iterable[Patch]) -> list[str]:
    return sorted({path for patch in series for path in patch.files})


def stages_of(series: list[Patch], pristine: Files) -> list[Files]:
    """The touched files before the first patch and after each."""
    stages = [{path: pristine[path] for path in touched(series) if path in pristine}]
    for patch in series:
        stages.append(dict(stages[-1]))
        apply_patch(patch, stages[-1])
    return stages


# ---- The work tree ----


def series_key(directory: Path, series: list[Patch]) -> str:
    """Changes with the pin and with every hunk, not with the patches' headers."""
    pin = read_pin(directory)
    digest = hashlib.sha256(f"{FORMAT} {pin.sha256} {pin.subdir}".encode())
    for patch in series:
        digest.update(patch.body)
    return digest.hexdigest()


@dataclass
class Stamp:
    """What the work tree was made of, and the SHA-256 of each file that was written."""

    key: str = ""
    source: str = ""
    files: dict[str, str] = field(default_factory=dict)


def read_stamp(work: Path) -> Stamp:
    try:
        return Stamp(**json.loads((work / STAMP).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Stamp()


def write_stamp(work: Path, stamp: Stamp) -> None:
    (work / STAMP).write_text(json.dumps(asdict(stamp), indent=0), encoding="utf-8")


def hand_edits(work: Path, stamp: Stamp) -> list[str]:
    return [name for name, digest in stamp.files.items() if (work / name).is_file() and sha256(work / name) != digest]


def refuse_edits(work: Path, stamp: Stamp) -> None:
    edited = hand_edits(work, stamp)
    if edited:
        names = ", ".join(edited[:3])
        raise ToolError(f"{work} holds edits that are not in the series ({names}): run export first, or apply --force")


def apply(directory: Path, work: Path, force: bool = False, stock: list[str] | None = None) -> bool:
    """Brings the work tree to upstream plus series; only files whose contents change are written. True if any was.

    Args:
        stock: of the series only the patches whose names begin with one of these; None: all.
    """
    pin, series = read_pin(directory), read_series(directory)
    if stock is not None:
        series = [patch for patch in series if patch.name.startswith(tuple(stock))]
    key, stamp = series_key(directory, series), read_stamp(work)
    source = os.environ.get("TQGGUF_UPSTREAM", "")
    if stamp.key == key and stamp.source == source and not force and (work / "llama.cpp").is_dir():
        return False
    if not force:
        refuse_edits(work, stamp)
    files = read_upstream(fetch(pin, DOWNLOADS), pin.subdir)
    for patch in series:
        offset = apply_patch(patch, files)
        say(f"{patch.name}: {f'offset {offset}' if offset else 'clean'}")
    (work / STAMP).unlink(missing_ok=True)
    written = 0
    for name, data in files.items():
        path = work / name
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            written += 1
    for name in stamp.files.keys() - files.keys():
        (work / name).unlink(missing_ok=True)
    write_stamp(work, Stamp(key, source, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}))
    say(f"{written} files written to {work}")
    return written > 0


# ---- git, for developers ----


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Runs git in a folder that is no repository, without the user's settings: all users get the same output."""
    ceiling = {"GIT_CEILING_DIRECTORIES": str(folder.parent), "GIT_CONFIG_GLOBAL": os.devnull}
    env = {**os.environ, **ceiling, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    try:
        return subprocess.run(["git", *arguments], cwd=folder, env=env, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise ToolError("this command calls git, which is not installed") from error


def write_files(folder: Path, files: Files) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def diff(patch: Patch, before: Files, after: Files) -> bytes:
    """The text of a patch that makes after of before."""
    with tempfile.TemporaryDirectory() as scratch:
        for side, files, others in (("a", before, after), ("b", after, before)):
            changed = {path: data for path, data in files.items() if others.get(path) != data}
            write_files(Path(scratch) / side, {path.partition("/")[2]: data for path, data in changed.items()})
            (Path(scratch) / side).mkdir(exist_ok=True)
        text = git(Path(scratch), "diff", "--no-index", "--no-prefix", "--patience", "a", "b").stdout
    lines = text.splitlines(keepends=True)
    return patch.header.encode() + b"".join(x for x in lines if not x.startswith((b"diff --git ", b"index ")))


def merged(path: str, base: bytes, ours: bytes, theirs: bytes) -> bytes | None:
    """Ours with the changes from base to theirs; None if both changed the same lines."""
    with tempfile.TemporaryDirectory() as scratch:
        write_files(Path(scratch), {"base": base, "ours": ours, "theirs": theirs})
        done = git(Path(scratch), "merge-file", "-p", "ours", "base", "theirs")
    return done.stdout if done.returncode == 0 else None


def export(directory: Path, work: Path, into: str | None) -> list[str]:
    """Moves edits of the work tree into the series; returns the names of the patches that changed."""
    pin, series, stamp = read_pin(directory), read_series(directory), read_stamp(work)
    if stamp.key != series_key(directory, series):
        raise ToolError(f"{work} is not this series applied: run apply first")
    named = [i for i, patch in enumerate(series) if into and patch.name.startswith(into)]
    if into and len(named) != 1:
        raise ToolError(f"{len(named)} patches begin with {into}; there are {', '.join(p.name for p in series)}")
    edited = hand_edits(work, stamp)
    pristine = read_upstream(fetch(pin, DOWNLOADS), pin.subdir)
    stages = stages_of(series, pristine)
    for path in edited:
        owners = named or [i for i, patch in enumerate(series) if path in patch.files][-1:]
        if not owners or series[owners[0]].tree != path.partition("/")[0]:
            raise ToolError(f"{path} is edited but in no patch: say which one it belongs to with --into")
        last, new = stages[-1].get(path, pristine.get(path, b"")), (work / path).read_bytes()
        for k, stage in enumerate(stages):
            stage.setdefault(path, last)
            if k > owners[0]:
                text = merged(path, last, stage[path], new)
                if text is None:
                    raise ToolError(
                        f"{path}: this edit needs what a patch after {series[owners[0]].name} adds: choose that one"
                    )
                stage[path] = text
    changed = []
    for k, patch in enumerate(series):
        text = diff(patch, stages[k], stages[k + 1])
        if (directory / patch.name).read_bytes() != text:
            (directory / patch.name).write_bytes(text)
            changed.append(patch.name)
    write_table(directory)
    stamp.files |= {path: sha256(work / path) for path in edited}
    stamp.key = series_key(directory, read_series(directory))
    write_stamp(work, stamp)
    return changed


# ---- Checks ----


def budget(directory: Path, folder: str) -> tuple[int, int]:
    """The files and hunks that a series may have at most, as its first line says."""
    match = re.match(r"# At most (\d+) files and (\d+) hunks\b", (directory / folder / "series").read_text("utf-8"))
    if not match:
        raise ToolError(f"{folder}/series does not begin with: # At most N files and N hunks")
    return int(match[1]), int(match[2])


def table(directory: Path, series: list[Patch]) -> str:
    """What each patch takes, and each series together."""
    rows = ["| patch | files | hunks | lines added | removed |", "|---|---|---|---|---|"]
    for folder, tree in TREES.items():
        mine = [patch for patch in series if patch.tree == tree]
        for title, part in [*((f"`{p.name}`", [p]) for p in mine), (f"{folder}, together", mine)] if mine else ():
            hunks = [hunk for patch in part for hunk in patch.hunks()]
            lines = [sum(len(hunk.marked(mark)) for hunk in hunks) for mark in (b"+", b"-")]
            rows.append(f"| {title} | {len(touched(part))} | {len(hunks)} | {lines[0]} | {lines[1]} |")
    return "\n".join(rows) + "\n"


def with_region(text: str, name: str, content: str) -> str:
    """The text of a README with what stands between its two marks replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ToolError(f"README.md lacks the lines {begin} and {end}")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{content}{end}", text, flags=re.DOTALL)


def readme_with_table(directory: Path) -> str:
    text = (directory / "README.md").read_text(encoding="utf-8")
    return with_region(text, "table", table(directory, read_series(directory)))


def write_table(directory: Path) -> None:
    (directory / "README.md").write_text(readme_with_table(directory), encoding="utf-8")


def wrong_in(directory: Path, series: list[Patch]) -> list[str]:
    """What is wrong with a series apart from whether it applies."""
    wrong = []
    for patch in series:
        fields = FIX_FIELDS if "/fixes/" in patch.name else HOOK_FIELDS
        wrong += [f"{patch.name}: its header lacks {name!r}" for name in fields if name not in patch.header]
        for path, hunks in patch.files.items():
            for hunk in hunks:  # where upstream has a long line, its successor may be long, too
                n_long = [sum(len(line) > COLUMNS for line in hunk.marked(mark)) for mark in (b"-", b"+")]
                if n_long[1] > n_long[0]:
                    wrong.append(f"{patch.name}: {path}: {hunk.name} adds a line of more than {COLUMNS} columns")
    for folder, tree in TREES.items():
        mine = [patch for patch in series if patch.tree == tree]
        if mine:
            n_files, n_hunks = len(touched(mine)), sum(len(patch.hunks()) for patch in mine)
            most = budget(directory, folder)
            if n_files > most[0] or n_hunks > most[1]:
                wrong.append(
                    f"{folder}: its {n_files} files and {n_hunks} hunks exceed its budget of {most[0]} and {most[1]}"
                )
    files = (path.relative_to(directory).as_posix() for path in directory.rglob("*.patch"))
    stray = {*files} - {patch.name for patch in series}
    wrong += [f"{name}: not listed in a series" for name in sorted(stray)]
    if (directory / "README.md").read_text(encoding="utf-8") != readme_with_table(directory):
        wrong.append("README.md: the table is out of date: run export")
    return wrong


def check(directory: Path) -> list[str]:
    """Everything that is wrong with the series, in words."""
    pin, series = read_pin(directory), read_series(directory)
    source = fetch(pin, DOWNLOADS)
    files, wrong = read_upstream(source, pin.subdir), []
    for patch in series:
        before = {path: files[path] for path in patch.files if path in files}
        offset = apply_patch(patch, files)
        if offset:
            wrong.append(f"{patch.name}: applies only with an offset of {offset} lines: re-export it")
        elif diff(patch, before, {path: files[path] for path in before}) != (directory / patch.name).read_bytes():
            wrong.append(f"{patch.name}: re-export is not byte-equal")
    wrong += wrong_in(directory, series)
    if not wrong:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["TQGGUF_UPSTREAM"] = str(source)
            apply(directory, Path(scratch) / "tree")
            if apply(directory, Path(scratch) / "tree") or apply(directory, Path(scratch) / "tree", force=True):
                wrong.append("apply is not idempotent: a second run wrote files")
    return wrong


# ---- Other releases ----


@dataclass
class Outcome:
    """What became of one patch on another release."""

    n_hunks: int
    offset: int = 0
    remarks: list[str] = field(default_factory=list)
    n_loose: int = 0  # hunks that fit with less context
    n_failed: int = 0
    rejects: bytes = b""  # those hunks

    @property
    def word(self) -> str:
        if self.n_failed:
            return f"FAIL {self.n_failed} of {self.n_hunks}"
        if self.n_loose:
            return f"context {self.n_loose} of {self.n_hunks}"
        return f"offset {self.offset}" if self.offset else "clean"


def apply_by_git(patch: Patch, files: Files) -> Outcome:
    """Changes files by every hunk that fits anywhere with at least one line of context on either side."""
    outcome = Outcome(len(patch.hunks()))
    with tempfile.TemporaryDirectory() as scratch:
        write_files(Path(scratch), {path: files[path] for path in patch.files if path in files})
        for part in re.split(rb"^(?=--- a/)", patch.body, flags=re.MULTILINE)[1:]:
            path = f"{patch.tree}/{part.splitlines()[0][6:].decode()}"
            (Path(scratch) / "patch").write_bytes(part)
            done = git(Path(scratch), "apply", "-C1", "--reject", f"--directory={patch.tree}", "patch")
            said = done.stderr.decode("utf-8", "replace")
            outcome.offset = max([outcome.offset, *(int(n) for n in re.findall(r"\(offset -?(\d+) lines?\)", said))])
            outcome.n_loose += said.count("Context reduced to")
            n_failed = said.count("Rejected hunk #") if path in files else len(patch.files[path])
            outcome.n_failed += n_failed
            outcome.remarks += [
                f"{patch.name}: {path}: {line}"
                for line in said.split("\n")
                if re.match(r"Context reduced|Rejected|error: .*No such file", line)
            ]
            reject = Path(scratch) / f"{path}.rej"
            if n_failed:
                outcome.rejects += reject.read_bytes() if reject.is_file() else part
            if path in files:
                files[path] = (Path(scratch) / path).read_bytes()
    return outcome


def report(directory: Path, names: list[str]) -> tuple[dict[str, list[Outcome]], list[str]]:
    """What becomes of each patch on other releases, and what git says of every hunk that does not fit exactly.

    Args:
        names: paths of trees or sdists, or versions, which are downloaded; none: all recorded versions.
    """
    pin, series = read_pin(directory), read_series(directory)
    found: dict[str, list[Outcome]] = {}
    for name in names or [*read_releases(directory)]:
        path = Path(name)
        files = read_upstream(path if path.exists() else obtain(directory, pin, name), pin.subdir)
        outcomes = [apply_by_git(patch, files) for patch in series]
        found[f"{path.name if path.exists() else name}, ggml {ggml_version(files)}"] = outcomes
    return found, [f"{name}: {text}" for name, outcomes in found.items() for o in outcomes for text in o.remarks]


def report_table(series: list[Patch], found: dict[str, list[Outcome]]) -> str:
    """Markdown: a row for each patch, a column for each release, and what must be made anew in each."""
    rows = [f"| patch | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for k, patch in enumerate(series):
        rows.append(f"| `{patch.name}` | {' | '.join(outcomes[k].word for outcomes in found.values())} |")
    sums = [(sum(o.n_failed for o in outcomes), sum(o.n_hunks for o in outcomes)) for outcomes in found.values()]
    rows.append(f"| hunks to be made anew | {' | '.join(f'{failed} of {n}' for failed, n in sums)} |")
    return "\n".join(rows) + "\n"


def move(directory: Path, work: Path, version: str, rejects: Path) -> list[Path]:
    """Rewrites pin and series for another release; returns files with the hunks that must be made anew by hand.

    A hunk that fits with less context is taken. git holds what was.
    """
    pin, series = read_pin(directory), read_series(directory)
    refuse_edits(work, read_stamp(work))
    path = obtain(directory, pin, version)
    files = read_upstream(path, pin.subdir)
    for old in rejects.rglob("*.patch") if rejects.is_dir() else ():
        old.unlink()
    left: list[Path] = []
    for patch in series:
        before = dict(files)
        outcome = apply_by_git(patch, files)
        for text in (f"{patch.name}: {outcome.word}", *(f"  {remark}" for remark in outcome.remarks)):
            say(text)
        (directory / patch.name).write_bytes(diff(patch, before, files))
        if outcome.n_failed:
            left.append(rejects / patch.name)
            write_files(rejects, {patch.name: outcome.rejects})
    text = (directory / "upstream.toml").read_text(encoding="utf-8")
    for name, value in (("version", version), ("sha256", sha256(path)), ("ggml", ggml_version(files))):
        text = re.sub(rf"^{name}\s*=.*$", f'{name} = "{value}"', text, flags=re.MULTILINE)
    (directory / "upstream.toml").write_text(text, encoding="utf-8")
    write_table(directory)
    if not os.environ.get("TQGGUF_UPSTREAM"):
        apply(directory, work, force=True)
    return left


# ---- Command line ----


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tool.py", description="the pinned upstream and the patch series")
    parser.add_argument("--patches", type=Path, default=HERE, help="directory of upstream.toml and the series")
    parser.add_argument("--work", type=Path, default=WORK, help="work tree (default: build/upstream)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("fetch", help="obtain and verify the pinned sdist, print its path")
    command = commands.add_parser("apply", help="bring the work tree to upstream plus series")
    command.add_argument("--force", action="store_true", help="overwrite edits made in the work tree")
    command.add_argument(
        "--stock", nargs="*", metavar="NAME", help="without the series, or these patches of it only, to compare with"
    )
    commands.add_parser("check", help="clean apply, idempotence, byte-equal re-export, headers, budget, table")
    command = commands.add_parser("export", help="move edits made in the work tree into the series")
    command.add_argument("--into", metavar="NAME", help="the patch that takes them (default: the file's last)")
    command = commands.add_parser("report", help="how the series fares on other releases")
    command.add_argument("upstream", nargs="*", help="versions, sdists, trees (default: all of releases.toml)")
    command.add_argument("--write", action="store_true", help="put the table of the recorded versions into README.md")
    command = commands.add_parser("move", help="rewrite pin and series for another release, as far as hunks fit")
    command.add_argument("version", help="of the package, such as 0.3.36")
    args = parser.parse_args(arguments)
    work = args.work.resolve()
    try:
        if args.command == "fetch":
            print(fetch(read_pin(args.patches), DOWNLOADS))
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
            if args.write and args.upstream:
                parser.error("--write takes the versions in releases.toml and no others")
            found, remarks = report(args.patches, args.upstream)
            text = report_table(read_series(args.patches), found)
            if args.write:
                readme = args.patches / "README.md"
                readme.write_text(with_region(readme.read_text(encoding="utf-8"), "releases", text), encoding="utf-8")
            print(text, *remarks, sep="\n")
            return 0 if args.write or not remarks else 1
        elif args.command == "move":
            for path in move(args.patches, work, args.version, work.parent / "rejects"):
                name = path.relative_to(work.parent / "rejects").as_posix()
                say(f"to be made anew in {work}, then export --into {name}: {path}")
    except (ToolError, OSError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
