"""Counts what attention's inner parts execute, by unit, in the machine code: docs/cuda.md's prediction rests on it.

Of the kernels for heads of 128 and up to eight query vectors: scores, from the copies' start to the next barrier, and
accumulate, whose loop runs twice per tile of 128 keys. Needs nvcc and cuobjdump; nothing is run.

Usage: python native/cuda/instructions.py [--arch sm_90]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
TYPES = {300: "pqo3", 301: "pqo4", 302: "pqt3", 303: "pqt4"}
UNITS = {
    "shared": "LDS STS",
    "global": "LDG STG LDGSTS LDL STL",
    "tensor": "HMMA",
    "float": "FMUL FADD FFMA HMUL2 HADD2 HFMA2",
    "multiply": "IMAD",
    "other": "MUFU SHFL BRA BSSY BSYNC WARPSYNC BAR NOP DEPBAR LDGDEPBAR B2R LDC ULDC",
}
"""Everything else is the integer unit's: shifts, masks, permutations, comparisons, selections."""
LOOPS = 2
"""Of accumulate per tile and warp: 128 keys, four parts of 16."""

Code = list[tuple[int, str]]


def disassemble(arch: str) -> dict[str, Code]:
    """Address and instruction of each kernel, predicates left out."""
    with tempfile.TemporaryDirectory() as folder:
        out, number = Path(folder) / "attention.o", arch.removeprefix("sm_")
        command = ["nvcc", "-std=c++17", "-O3", "-gencode", f"arch=compute_{number},code={arch}"]
        command += [f"-I{HERE.parent / 'include'}", "-c", str(HERE / "attention.cu"), "-o", str(out)]
        subprocess.run(command, check=True)
        said = subprocess.run(["cuobjdump", "-sass", str(out)], check=True, capture_output=True, text=True).stdout
    kernels: dict[str, Code] = {}
    for line in said.splitlines():
        if found := re.search(r"Function : (\w+)", line):
            code = kernels.setdefault(found[1], [])
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z].*?)\s*;", line):
            code.append((int(found[1], 16), found[2]))
    return kernels


def parts(code: Code) -> dict[str, tuple[list[str], int]]:
    """The instructions of each part, and how often a warp executes them per tile."""
    names = [text.split()[0] for _, text in code]
    seen = next(i for i, name in enumerate(names) if name.startswith("BAR.RED"))
    copied = next(i for i in range(seen, len(names)) if names[i] == "LDGDEPBAR")
    barriers = [i for i in range(copied, len(names)) if names[i].startswith("BAR.SYNC")]
    places = {address: i for i, (address, _) in enumerate(code)}
    for i in range(barriers[1], len(code)):
        found = re.match(r"BRA 0x([0-9a-f]+)", code[i][1])
        start = places[int(found[1], 16)] if found else i
        if start < i and any(name.startswith("HMMA") for name in names[start:i]):
            return {
                "scores": (names[copied + 1 : barriers[0] + 1], 1),
                "accumulate": (names[barriers[1] + 1 : start], 1),
                "its loop": (names[start : i + 1], LOOPS),
            }
    raise ValueError("no loop with products behind the second barrier: the kernel has another shape")


def unit_of(name: str) -> str:
    base = name.split(".")[0]
    return next((unit for unit, names in UNITS.items() if base in names.split()), "integer")


def main() -> int:
    parser = argparse.ArgumentParser(description="count the instructions of attention's inner parts")
    parser.add_argument("--arch", default="sm_90", help="architecture (default: sm_90)")
    kernels = disassemble(parser.parse_args().arch)
    units = [*UNITS, "integer"]
    print("| type | part | per tile | " + " | ".join(units) + " |\n" + "|---" * (len(units) + 3) + "|")
    for number, name in TYPES.items():
        code = next(code for kernel, code in kernels.items() if f"tq_attend_kernelILi{number}ELi1ELi4E" in kernel)
        for part, (instructions, n) in parts(code).items():
            count = Counter(unit_of(instruction) for instruction in instructions)
            cells = [str(n * count[unit]) for unit in units]
            print(f"| {name} | {part} | {n * len(instructions)} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
