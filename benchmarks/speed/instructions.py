"""Instructions that attention executes for a block of 32 values, on this x86-64 processor and on ARM64 ones.

    python benchmarks/speed/instructions.py                 # the table of docs/performance.md
    python benchmarks/speed/instructions.py neon pqo3 --by  # one kernel and type, by function and instruction

Counting needs no quiet machine and says nothing of time. ARM64 code is compiled by Debian's cross compiler and runs
under qemu-aarch64 with count_plugin.c; x86-64 code runs step by step (count_attention.c). Decode is 1 query row of 16
query heads and 8 KV heads of 128; prefill 64 rows of 2 query heads and 1 KV head. A figure is the difference of two
numbers of keys, over that of their blocks of K and V, so that it holds nothing of what is done once.
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "instructions"
TYPES = {"pqo3": 300, "pqo4": 301, "pqt3": 302, "pqt4": 303, "pqt2": 304, "pqt5": 305}
ARM = {"neon": "cortex-a72", "dotprod": "neoverse-n1", "i8mm": "max"}
"""The kernels of ARM64, each with a processor of qemu-aarch64's list that has no more than it needs."""
X86 = ("avx2", "avx512")
HEAD_DIM = 128
SHAPES = {"decode": (8, 2, 1, 64, 128), "prefill": (1, 2, 64, 64, 128)}
"""KV heads, query heads of each, query rows, and the two numbers of keys."""

Counts = collections.Counter[tuple[str, str]]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"instructions.py: {command[0]} failed: {done.stderr or done.stdout}")
    return done.stdout if done.stdout else done.stderr


def build(name: str, compiler: str, *options: str) -> Path:
    """The program with the library's objects in it, so that the emulator knows the names of functions."""
    folder = BUILD / name
    run("cmake", "-G", "Ninja", "-S", ROOT / "native", "-B", folder, "-DTQGGUF_VERSION=count",
        f"-DCMAKE_C_COMPILER={compiler}", *options)  # fmt: skip
    run("cmake", "--build", folder, "--target", "tqgguf")
    objects = sorted((folder / "CMakeFiles" / "tqgguf.dir").rglob("*.o"))
    program = folder / "count_attention"
    source = Path(__file__).with_name("count_attention.c")
    run(compiler, "-O2", "-static", "-I", ROOT / "native" / "include", source, *objects, "-lm", "-o", program)
    return program


def build_for(kernels: list[str]) -> dict[str, Path]:
    programs = {}
    if set(kernels) & set(ARM):
        target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
        programs |= dict.fromkeys(ARM, build("aarch64", "aarch64-linux-gnu-gcc", *target))
        plugin = BUILD / "count_plugin.so"
        run("cc", "-O2", "-shared", "-fPIC", Path(__file__).with_name("count_plugin.c"), "-o", plugin)
    if set(kernels) & set(X86):
        programs |= dict.fromkeys(X86, build("x86", "cc"))
    return programs


def emulated(kernel: str, program: Path, *arguments: str) -> Counts:
    plugin = BUILD / "count_plugin.so"
    lines = run("qemu-aarch64", "-cpu", ARM[kernel], "-plugin", plugin, program, kernel, *arguments).splitlines()
    counts: Counts = collections.Counter()
    for line in lines:
        function, name, n = line.split()
        counts[function, name] += int(n)
    return counts


def count(kernel: str, program: Path, *arguments: str) -> Counts:
    if kernel in X86:
        return collections.Counter({("all", "all"): int(run(program, kernel, *arguments, "1"))})
    once = emulated(kernel, program, *arguments, "1")
    twice = emulated(kernel, program, *arguments, "2")
    return collections.Counter({key: twice[key] - once[key] for key in twice})


def per_block(kernel: str, program: Path, cache: str, shape: str) -> dict[tuple[str, str], float]:
    heads, group, rows, few, many = SHAPES[shape]
    found = [
        count(kernel, program, *map(str, (TYPES[cache], HEAD_DIM, heads, group, rows, keys))) for keys in (few, many)
    ]
    blocks = 2 * heads * (many - few) * HEAD_DIM // 32
    return {key: (found[1][key] - found[0][key]) / blocks for key in found[1] if found[1][key] != found[0][key]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", nargs="*", metavar="KERNEL or TYPE", help="only these kernels and types")
    parser.add_argument("--by", action="store_true", help="by function and instruction (ARM64)")
    asked = parser.parse_args()
    kernels = [name for name in (*ARM, *X86) if name in asked.kernel] or [*ARM, *X86]
    types = [name for name in TYPES if name in asked.kernel] or list(TYPES)
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", "2")
    programs = build_for(kernels)
    for shape in SHAPES:
        print(f"\n| {shape} | " + " | ".join(types) + " |\n|---" + "|---" * len(types) + "|")
        for kernel in kernels:
            found = {cache: per_block(kernel, programs[kernel], cache, shape) for cache in types}
            print(f"| {kernel} | " + " | ".join(f"{sum(found[cache].values()):.1f}" for cache in types) + " |")
            sys.stdout.flush()
            for key in sorted(set().union(*found.values())) if asked.by else ():
                counts = " | ".join(f"{found[cache].get(key, 0):.2f}" for cache in types)
                print(f"|   {' '.join(key)} | {counts} |")


if __name__ == "__main__":
    main()
