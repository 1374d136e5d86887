"""Adds what the last `make fuzz` executed to benchmarks/results/fuzz.json.

    make fuzz FUZZ_SECONDS=600 && python benchmarks/endurance/fuzz_count.py

A log is taken once. Counts are of the code as it was then: whoever changes what a target tests takes its count out of
the file.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine

REPOSITORY: Final = Path(__file__).parents[2]
LOGS: Final = REPOSITORY / "build" / "fuzz"
RESULTS: Final = REPOSITORY / "benchmarks" / "results" / "fuzz.json"


def main() -> int:
    targets: dict[str, Any] = json.loads(RESULTS.read_text())["targets"] if RESULTS.exists() else {}
    logs = sorted(LOGS.glob("*.log"))
    if not logs:
        print(f"there is no log in {LOGS.relative_to(REPOSITORY)}: make fuzz", file=sys.stderr)
        return 1
    facts = machine.facts()
    for log in logs:
        text = log.read_text(errors="replace")
        done = re.search(r"^Done (\d+) runs in (\d+) second", text, re.M)
        if not done:
            print(f"{log.relative_to(REPOSITORY)} tells of no run that came to its end", file=sys.stderr)
            return 1
        sums = targets.setdefault(log.stem, {"executions": 0, "seconds": 0})
        sums["executions"] += int(done[1])
        sums["seconds"] += int(done[2])
    total = sum(each["executions"] for each in targets.values())
    machine.save({"machine": facts, "executions": total, "targets": dict(sorted(targets.items()))}, str(RESULTS))
    for log in logs:
        log.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
