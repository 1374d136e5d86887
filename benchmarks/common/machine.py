"""What a benchmark's figures depend on besides the code: machine, versions, commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np


def copy_bandwidth(n_bytes: int = 1 << 28, repeats: int = 7) -> float:
    """Bytes read plus bytes written per second when one thread copies memory larger than the caches: the median."""
    source = np.ones(n_bytes, dtype=np.uint8)
    target = np.zeros_like(source)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return 2 * n_bytes / float(np.median(seconds))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    family = f"family {named.get('cpu family', '?')} model {named.get('model', '?')}"
    return f"{named.get('model name', platform.machine())} ({family})"


def _commit() -> str:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def facts() -> dict[str, Any]:
    """Machine facts to save beside figures."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "copy_gb_per_s": round(copy_bandwidth() / 1e9, 2),
    }


def save(result: dict[str, Any], output: str) -> None:
    """Writes a result as JSON to a file, or to stdout if output is "-"."""
    text = json.dumps(result, indent=1) + "\n"
    if output == "-":
        print(text, end="")
        return
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(text, encoding="utf-8")
    print(f"saved {output}")
