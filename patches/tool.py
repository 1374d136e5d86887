#!/usr/bin/env python3
"""Fetch the pinned upstream source, apply the patch series to it, check the series and re-export it.

Needs only Python's standard library (no git, no patch): whoever can build the project can run this. The series edits
files that exist upstream; new code belongs in native/. Applying is exact: context lines must match, but may have moved.

Exit status: 0 done, 1 failure with one readable cause, 2 usage error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from patch import (
    Outcome,
    Patch,
    ToolError,
    apply_patch,
    apply_series,
    diff_hunks,
    encode,
    export_patch,
    parse_patch,
    read_text,
    touched,
)
from release import DOWNLOADS, Pin, Upstream, fetch, obtain, read_pin, read_releases, say, sha256

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "build" / "upstream"
FORMAT = "1"  # of the work tree: part of the stamp's key
HEADER_FIELDS = ("What:", "Why not in native/:", "Relies on:", "Tested by:")
STAMP = ".tqgguf-stamp.json"


# ---- The series ----


def read_series(directory: Path) -> list[Patch]:
    names = [line.strip() for line in (directory / "series").read_text(encoding="utf-8").splitlines()]
    return [parse_patch(directory / name) for name in names if name and not name.startswith("#")]


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


def with_region(text: str, name: str, content: str) -> str:
    """The text of a README with what stands between its two marks replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ToolError(f"README.md lacks the lines {begin} and {end}")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{content}{end}", text, flags=re.DOTALL)


def readme_with_table(directory: Path) -> str:
    text = (directory / "README.md").read_text(encoding="utf-8")
    return with_region(text, "table", table(read_series(directory), read_pin(directory / "upstream.toml")))


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


# ---- Other releases ----


def report(directory: Path, names: list[str]) -> tuple[dict[str, list[Outcome]], list[str]]:
    """What becomes of each patch on other releases, and every hunk that does not apply exactly, in words.

    A name is a path of a tree or an sdist, or a version, which is downloaded; without names, all recorded versions.
    """
    pin, series = read_pin(directory / "upstream.toml"), read_series(directory)
    found: dict[str, list[Outcome]] = {}
    for name in names or [*read_releases(directory)]:
        path = Path(name)
        upstream = Upstream(path if path.exists() else obtain(directory, pin, name), pin.subdir)
        _, outcomes = apply_series(series, upstream.read(touched(series)), loosen=True)
        found[f"{path.name if path.exists() else name}, ggml {upstream.ggml()}"] = outcomes
    return found, [f"{name}: {text}" for name, outcomes in found.items() for o in outcomes for text in o.remarks()]


def report_table(series: list[Patch], found: dict[str, list[Outcome]]) -> str:
    """Markdown: a row for each patch, a column for each release."""
    rows = [f"| patch | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for k, patch in enumerate(series):
        rows.append(f"| `{patch.name}` | {' | '.join(outcomes[k].word for outcomes in found.values())} |")
    return "\n".join(rows) + "\n"


def move(directory: Path, work: Path, version: str, rejects: Path) -> list[Path]:
    """Rewrites pin and series for another release; returns files with the hunks that must be made anew by hand.

    A hunk that fits with less context is taken where that is the only place. git holds what was.
    """
    pin, series = read_pin(directory / "upstream.toml"), read_series(directory)
    edited = hand_edits(work, read_stamp(work))
    if edited:
        raise ToolError(f"{work} holds edits that are not in the series ({', '.join(edited[:3])}): run export first")
    upstream = Upstream(path := obtain(directory, pin, version), pin.subdir)
    stages, outcomes = apply_series(series, upstream.read(touched(series)), loosen=True)
    left: list[Path] = []
    for old in rejects.glob("*.patch") if rejects.is_dir() else ():
        old.unlink()
    for k, (patch, outcome) in enumerate(zip(series, outcomes, strict=True)):
        say(f"{patch.name}: {outcome.word}")
        for remark in outcome.remarks():
            say(f"  {remark}")
        (directory / patch.name).write_bytes(encode(export_patch(patch, stages[k], stages[k + 1])))
        if outcome.rejects:
            rejects.mkdir(parents=True, exist_ok=True)
            left.append(rejects / patch.name)
            left[-1].write_bytes(encode("".join(hunk.text(file) for file, hunk in outcome.rejects)))
    text = (directory / "upstream.toml").read_text(encoding="utf-8")
    for name, value in (("version", version), ("sha256", sha256(path)), ("ggml", upstream.ggml())):
        text = re.sub(rf"^{name}\s*=.*$", f'{name} = "{value}"', text, flags=re.MULTILINE)
    (directory / "upstream.toml").write_text(text, encoding="utf-8")
    write_table(directory)
    if not os.environ.get("TQGGUF_UPSTREAM"):
        apply(directory, work, force=True)
    return left


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
    command = commands.add_parser("report", help="how the series fares on other releases")
    command.add_argument("upstream", nargs="*", help="versions, sdists, trees (default: all of releases.toml)")
    command.add_argument("--write", action="store_true", help="put the table of the recorded versions into README.md")
    command = commands.add_parser("move", help="rewrite pin and series for another release, as far as hunks fit")
    command.add_argument("version", help="of the package, such as 0.3.36")
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
            left = move(args.patches, work, args.version, work.parent / "rejects")
            for path in left:
                say(f"to be made anew in {work / 'llama.cpp'}, then export --into {path.name[:4]}: {path}")
    except ToolError as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
