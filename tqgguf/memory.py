"""How much memory the machine has, so that what can never fit is refused at once and not after minutes of swapping."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["machine_memory"]


def machine_memory() -> int | None:
    """Bytes of main memory and swap space of the machine; None where the system does not say, as Linux does."""
    try:
        text = Path("/proc/meminfo").read_text("ascii")
    except OSError:
        return None
    found = dict(re.findall(r"^(MemTotal|SwapTotal): +(\d+) kB$", text, re.MULTILINE))
    return 1024 * sum(map(int, found.values())) if "MemTotal" in found else None
