"""What this process may use of the machine: memory and processors, within the limits of its control groups.

A container sees the whole machine in /proc/meminfo and in the count of processors. What it may use stands in its
control groups (cgroups, version 1 or 2) and in its affinity: a process that takes more memory is killed without a word,
and threads beyond the processors wait for each other.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

ROOT: Final = Path("/")

_NO_LIMIT: Final = 1 << 60
"""Version 1 writes the largest number of pages there is where version 2 writes "max"."""


def machine_memory(root: Path = ROOT) -> int | None:
    """Bytes of main memory and swap space that this process may use; None where the system does not say, as Linux does.

    Args:
        root: the folder of proc and sys.
    """
    try:
        text = (root / "proc/meminfo").read_text("ascii")
    except OSError:
        return None
    found = dict(re.findall(r"^(MemTotal|SwapTotal): +(\d+) kB$", text, re.MULTILINE))
    if "MemTotal" not in found:
        return None
    memory, swap = (1024 * int(found.get(name, 0)) for name in ("MemTotal", "SwapTotal"))
    limits: list[float] = [memory + swap]
    for version, folder in _groups(root, "memory"):
        if version == 2:
            most, most_swap = _number(folder / "memory.max"), _number(folder / "memory.swap.max")
            limits.append(min(most, memory) + min(most_swap, swap))
        else:
            both = _number(folder / "memory.memsw.limit_in_bytes")
            limits.append(min(both, min(_number(folder / "memory.limit_in_bytes"), memory) + swap))
    return int(min(limits))


def processors(root: Path = ROOT) -> int:
    """Processors that this process may use at once: by its affinity and the quotas of its control groups; at least 1.

    Args:
        root: the folder of proc and sys.
    """
    try:
        n = float(len(os.sched_getaffinity(0)))
    except (AttributeError, OSError):  # another system than Linux
        n = float(os.cpu_count() or 1)
    for version, folder in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            if version == 2:
                quota, period = (folder / "cpu.max").read_text("ascii").split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text("ascii").strip()
                period = (folder / "cpu.cfs_period_us").read_text("ascii").strip()
            if quota not in ("max", "-1") and int(period) > 0:
                n = min(n, int(quota) / int(period))
    return max(1, math.ceil(n))


def _groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """Version and folder of each control group that this process is in: its own and those around it."""
    try:
        own = (root / "proc/self/cgroup").read_text("utf-8", "replace")
        mounts = (root / "proc/self/mountinfo").read_text("utf-8", "replace")
    except OSError:
        return
    paths: dict[int, str] = {}
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths[2] = path
        elif controller in controllers.split(","):
            paths[1] = path
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = [*after.split(" ", 2), "", ""][:3]
        version = {"cgroup2": 2, "cgroup": 1}.get(kind)
        if version not in paths or (version == 1 and controller not in options.split(",")):
            continue
        top, place = before.split(" ")[3:5]
        folder = root / place.replace("\\040", " ").lstrip("/")
        inside = PurePosixPath(paths[version])
        # In a container the group's path is that of the host, whose upper part is not mounted.
        with contextlib.suppress(ValueError):
            inside = PurePosixPath("/") / inside.relative_to(top)
        parts = [part for part in inside.parts[1:] if part != ".."]
        for n in range(len(parts), -1, -1):
            group = folder.joinpath(*parts[:n])
            if group.is_dir():
                yield version, group


def _number(path: Path) -> float:
    """A limit; infinity if there is none."""
    try:
        text = path.read_text("ascii").strip()
        value = int(text) if text != "max" else _NO_LIMIT
    except (OSError, ValueError):
        return math.inf
    return value if value < _NO_LIMIT else math.inf
