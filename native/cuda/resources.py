"""Compiles native/cuda for every supported architecture and tables each kernel's registers, spills and shared memory.

Fails on a warning, and on a kernel that spills more than a few registers. Nothing is run: it needs nvcc, no GPU.

Usage: python native/cuda/resources.py --compile DIR [--arch sm_90 ...]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")
SOURCES = {
    "rows.cu": ["-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"],
    "attention.cu": [],
    "attention_plan.cu": [],
    "convert.cu": [],
    "memory.cu": [],
    "runtime.cu": [],
}
MOST_SPILLED = 64
"""Bytes of spill stores that a kernel may have."""

TYPES = {"300": "pqo3", "301": "pqo4", "302": "pqt3", "303": "pqt4", "0": "any"}


@dataclass(frozen=True)
class Kernel:
    """One kernel's resources on one architecture."""

    arch: str
    name: str
    registers: int
    spilled: int
    shared: int


def readable(mangled: str) -> str:
    """The kernel's name, and its template arguments as words."""
    name = re.sub(r"^_Z\w*?\d+(tq_\w+?_kernel).*", r"\1", mangled)
    numbers = re.findall(r"Li(\d+)E", mangled)
    if name == "tq_attend_kernel":
        size = f" DK {32 * int(numbers[2])}" if numbers[2] != "0" else ""
        return f"{name} {TYPES[numbers[0]]}{size}, {8 * int(numbers[1])} vectors"
    return " ".join([name, *(f"{number} bits" for number in numbers)])


def compile_file(source: str, arch: str, folder: Path) -> tuple[list[Kernel], str]:
    """The kernels of one file, and whatever else the compiler said."""
    number = arch.removeprefix("sm_")
    command = ["nvcc", "-std=c++17", "-O3", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v", *SOURCES[source]]
    command += ["-gencode", f"arch=compute_{number},code={arch}", f"-I{HERE.parent / 'include'}"]
    command += ["-c", str(HERE / source), "-o", str(folder / f"{Path(source).stem}-{arch}.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    kernels: list[Kernel] = []
    rest: list[str] = []
    name, spilled = "", 0
    for line in (done.stdout + done.stderr).splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name, spilled = readable(found[1]), 0
        elif found := re.search(r"(\d+) bytes spill stores", line):
            spilled = int(found[1])
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels.append(Kernel(arch, name, int(found[1]), spilled, int(shared[1]) if shared else 0))
        elif line.strip() and not re.search(r"^ptxas info|Function properties|^\S*\.cu$", line):
            rest.append(line)
    if done.returncode != 0 and not rest:
        rest.append(f"nvcc failed on {source} for {arch}")
    return kernels, "\n".join(rest)


def table(kernels: list[Kernel]) -> str:
    """Markdown: a row per kernel, registers (and spilled bytes) per architecture."""
    archs = list(dict.fromkeys(kernel.arch for kernel in kernels))
    lines = ["| kernel | static shared | " + " | ".join(archs) + " |", "|" + "---|" * (len(archs) + 2)]
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        mine = {kernel.arch: kernel for kernel in kernels if kernel.name == name}
        cells = [f"{k.registers}" + (f" ({k.spilled} B)" if k.spilled else "") for k in (mine[arch] for arch in archs)]
        lines.append(f"| {name} | {mine[archs[0]].shared} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="compile native/cuda and table what its kernels take")
    parser.add_argument("--compile", type=Path, required=True, metavar="DIR", help="where the object files go")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help="architectures (default: all supported)")
    args = parser.parse_args()
    args.compile.mkdir(parents=True, exist_ok=True)
    kernels: list[Kernel] = []
    failed = False
    start = time.monotonic()
    for arch in args.arch:
        for source in SOURCES:
            found, rest = compile_file(source, arch, args.compile)
            kernels += found
            if rest:
                print(rest, file=sys.stderr)
                failed = True
    print(table(kernels))
    print(f"\n{len(args.arch)} architectures in {time.monotonic() - start:.0f} s; registers per thread (bytes spilled)")
    for kernel in kernels:
        if kernel.spilled > MOST_SPILLED:
            print(f"{kernel.name} spills {kernel.spilled} bytes on {kernel.arch}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
