"""Limits of memory and processors: of the machine, of control groups in both versions, in and out of containers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tqgguf._machine import machine_memory, processors

GIB = 2**30
MEMINFO = "MemTotal:       16777216 kB\nMemFree: 5 kB\nSwapTotal:       2097152 kB\n"
CGROUP2 = "30 23 0:26 {top} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
CGROUP1 = "31 30 0:27 {top} /sys/fs/cgroup/{name} rw,nosuid - cgroup cgroup rw,{name}\n"


def tree(root: Path, own: str, mounts: str, files: dict[str, str]) -> Path:
    """A folder with proc and sys, in which control groups have files of these contents."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    (root / "proc/self/cgroup").write_text(own)
    (root / "proc/self/mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_a_machine_without_limits(tmp_path: Path) -> None:
    assert machine_memory(tree(tmp_path, "", "", {})) == 18 * GIB
    assert machine_memory(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({"a/b/memory.max": "max", "a/memory.max": "max"}, 18 * GIB),
        ({"a/b/memory.max": f"{GIB}", "a/b/memory.swap.max": "0"}, GIB),
        ({"a/b/memory.max": f"{GIB}", "a/b/memory.swap.max": "max"}, 3 * GIB),
        ({"a/b/memory.max": f"{5 * GIB}", "a/memory.max": f"{GIB}", "a/memory.swap.max": f"{GIB}"}, 2 * GIB),
        ({"a/b/memory.max": "what?", "other/memory.max": "1"}, 18 * GIB),
    ],
)
def test_memory_in_version_2(tmp_path: Path, files: dict[str, str], most: int) -> None:
    (tmp_path / "sys/fs/cgroup/a/b").mkdir(parents=True)
    assert machine_memory(tree(tmp_path, "0::/a/b\n", CGROUP2.format(top="/"), files)) == most


def test_memory_in_a_container(tmp_path: Path) -> None:
    """What is mounted is the container's group; its path is that of the host, or of the container itself."""
    for i, (own, top) in enumerate((("/docker/1234", "/docker/1234"), ("/", "/"), ("/", "/../.."))):
        files = {"memory.max": f"{GIB}", "memory.swap.max": "0"}
        assert machine_memory(tree(tmp_path / str(i), f"0::{own}\n", CGROUP2.format(top=top), files)) == GIB


def test_memory_in_version_1(tmp_path: Path) -> None:
    own = "9:name=systemd:/a\n4:memory:/a\n3:cpu,cpuacct:/a\n0::/\n"
    mounts = CGROUP1.format(top="/", name="memory")
    limits = {"memory/a/memory.limit_in_bytes": f"{GIB}", "memory/memory.limit_in_bytes": f"{2**63 - 4096}"}
    assert machine_memory(tree(tmp_path / "1", own, mounts, limits)) == 3 * GIB
    both = limits | {"memory/a/memory.memsw.limit_in_bytes": f"{GIB + 5}"}
    assert machine_memory(tree(tmp_path / "2", own, mounts, both)) == GIB + 5


def test_processors(tmp_path: Path) -> None:
    n = len(os.sched_getaffinity(0))
    assert processors(tree(tmp_path / "0", "", "", {})) == n
    for i, (quota, most) in enumerate((("max 100000", n), ("50000 100000", 1), (f"{n * 100000 - 1} 100000", n))):
        files = {"a/cpu.max": quota}
        assert processors(tree(tmp_path / f"2{i}", "0::/a\n", CGROUP2.format(top="/"), files)) == most
    for i, (quota, most) in enumerate((("-1", n), ("100000", 1))):
        files = {"cpu/a/cpu.cfs_quota_us": quota, "cpu/a/cpu.cfs_period_us": "100000"}
        assert processors(tree(tmp_path / f"1{i}", "3:cpu:/a\n", CGROUP1.format(top="/", name="cpu"), files)) == most


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert processors() == 1
    finally:
        os.sched_setaffinity(0, before)
