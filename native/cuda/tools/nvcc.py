"""How nvcc compiles native/cuda, for the tools beside this file."""

from __future__ import annotations

from pathlib import Path

CUDA = Path(__file__).parents[1]
SOURCES = {
    line.split()[0]: line.split()[1:]
    for line in (CUDA / "sources.txt").read_text().splitlines()
    if line.split()[0].endswith((".cu", ".cpp"))
}
"""The files of sources.txt that are no C, and each one's own options."""


def command(source: str, arch: str, out: Path) -> list[str]:
    """Compiles one file for one architecture, sm_90 for instance."""
    number = arch.removeprefix("sm_")
    target = ["-gencode", f"arch=compute_{number},code={arch}", f"-I{CUDA.parent / 'include'}"]
    return ["nvcc", "-std=c++17", "-O3", *SOURCES[source], *target, "-c", str(CUDA / source), "-o", str(out)]
