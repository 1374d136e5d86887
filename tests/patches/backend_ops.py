"""Runs upstream's test-backend-ops on the CPU backend and says in one line how it went: backend_ops.py PROGRAM OPTION…

Failing cases are printed in full. No case at all is a failure, too: a filter that matches nothing proves nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time


def main() -> int:
    program, *options = sys.argv[1:]
    begin = time.monotonic()
    n_ok = 0
    bad: list[str] = []
    command = [program, "test", "-b", "CPU", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace") as child:
        assert child.stdout
        for raw in child.stdout:
            line = re.sub(r"\x1b\[[0-9;]*m", "", raw).strip()
            if re.match(r"[A-Z_]+\(.*: OK$", line):
                n_ok += 1
            elif "FAIL" in line or "not supported" in line:
                bad.append(line)
                print(line, flush=True)
    seconds = time.monotonic() - begin
    what = " ".join(options)
    if child.returncode or bad or not n_ok:
        counts = f"{n_ok} passed, {len(bad)} did not, exit status {child.returncode}"
        print(f"test-backend-ops {what}: FAILED ({counts}, {seconds:.0f} s)")
        return 1
    print(f"test-backend-ops {what}: {n_ok} cases passed in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
