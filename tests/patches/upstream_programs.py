"""Runs upstream's test programs that need libllama, with stock and our cache types: upstream_programs.py BIN MODEL.

Two things that test-save-load-state asks for are not ours to give. With a precise tail, a restored state does not
continue bit for bit, for it holds the blocks alone: it runs without one. And its last test ("rf") switches flash
attention off, which no quantized V can do without: with one, that test must fail, and it passes with V in f16.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = ("pqo3", "pqo4", "pqt3", "pqt4", "pqt2", "pqt5")
PAIRS = [*((kind, kind) for kind in OURS), ("pqo4", "pqo3")]
ALL_PASS = ["PASS"] * 9


def types(k: str, v: str, tail: int = 0) -> list[str]:
    return ["-ctk", k, "-ctv", v, "-fa", "on", "--cache-tail", str(tail)]


def cases(binaries: Path, model: Path) -> list[tuple[list[str], list[str]]]:
    """Commands, and for test-save-load-state the results of its nine tests."""
    fragmented, threads, states = (
        [str(binaries / f"test-{name}"), "-t", "1"]
        for name in ("state-restore-fragmented", "thread-safety", "save-load-state")
    )
    fragmented += ["-m", str(model)]
    threads += ["-m", str(model), "-ngl", "0", "-p", "The meaning of life is"]
    threads += ["-n", "64", "-c", "256", "-ub", "32", "-np", "4"]
    states += ["--models", "."]  # in this mode it says how each test went, and waits until that is written
    found = [(fragmented, []), (threads, []), (states, ALL_PASS)]
    for k, v in PAIRS:
        for tail in (0, 128):
            found += [(fragmented + types(k, v, tail), []), (threads + types(k, v, tail), [])]
        found.append((states + types(k, v), [*ALL_PASS[1:], "FAIL"]))
    found += [(states + types(k, "f16"), ALL_PASS) for k in OURS]
    return [*found, ([str(binaries / "test-llama-archs"), "-s", "1"], [])]


def run(command: list[str], results: list[str], directory: str) -> str:
    """What went wrong, or nothing."""
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, errors="replace", check=False)
    output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    if re.findall("PASS|FAIL|SKIP", output) == results and done.returncode == ("FAIL" in results):
        return ""
    if not results and done.returncode == 0:
        return ""
    return f"exit status {done.returncode}\n{output[-3000:]}"


def main() -> int:
    binaries, model = (Path(argument).resolve() for argument in sys.argv[1:])
    n_bad, begin = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as directory:  # they leave files where they run
        Path(directory, "model.gguf").symlink_to(model)
        commands = cases(binaries, model)
        for command, results in commands:
            wrong = run(command, results, directory)
            n_bad += bool(wrong)
            if wrong:
                print(" ".join(command), wrong, sep="\n", flush=True)
    print(
        f"upstream's programs: {len(commands) - n_bad} of {len(commands)} runs pass, {time.monotonic() - begin:.0f} s"
    )
    return bool(n_bad)


if __name__ == "__main__":
    sys.exit(main())
