"""Counts what a warp of attention executes for a tile, by unit, in the machine code: docs/cuda.md rests on it.

Of the kernels for heads of 64 and 128 (attention_warp.cuh): once round the loop over tiles of 16 keys, copies, mask,
softmax and all, by the way that a tile takes whose keys all count. Needs nvcc and cuobjdump; nothing is run.

Usage: python native/cuda/instructions.py [--arch sm_90] [--list KERNEL]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
UNITS = {
    "shared": "LDS STS",
    "global": "LDG STG LDGSTS LDL STL",
    "tensor": "HMMA",
    "float": "FMUL FADD FFMA HMUL2 HADD2 HFMA2",
    "multiply": "IMAD",
    "other": "MUFU MOVM SHFL VOTE BRA BSSY BSYNC WARPSYNC BAR NOP DEPBAR LDGDEPBAR B2R LDC ULDC CS2R S2R",
}
"""Everything else is the integer unit's: shifts, masks, permutations, comparisons, selections."""

PATTERN = r"tq_attend_warp_kernelI\d+tq_(\w{4})Li(\d)ELi(\d)E"
"""Type, tiles of eight vectors, and blocks of a head, in a kernel's mangled name."""


@dataclass(frozen=True)
class Instruction:
    """One instruction; conditional: it has a predicate."""

    address: int
    text: str
    conditional: bool

    @property
    def name(self) -> str:
        return self.text.split()[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes. Divergence within an exchange is for none but the debugger to see: not counted."""
        found = re.match(r"BRA(?!\.DIV).*?0x([0-9a-f]+)$", self.text)
        return int(found[1], 16) if found else None

    @property
    def counts(self) -> bool:
        """Whether only a way with as many of these as can be does what a tile needs."""
        return self.name.startswith(("HMMA", "LDGSTS.E.BYPASS.128"))


def disassemble(arch: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel."""
    with tempfile.TemporaryDirectory() as folder:
        out, number = Path(folder) / "attention.o", arch.removeprefix("sm_")
        command = ["nvcc", "-std=c++17", "-O3", "-gencode", f"arch=compute_{number},code={arch}"]
        command += [f"-I{HERE.parent / 'include'}", "-c", str(HERE / "attention.cu"), "-o", str(out)]
        subprocess.run(command, check=True)
        said = subprocess.run(["cuobjdump", "-sass", str(out)], check=True, capture_output=True, text=True).stdout
    kernels: dict[str, list[Instruction]] = {}
    for line in said.splitlines():
        if found := re.search(r"Function : (\w+)", line):
            code = kernels.setdefault(found[1], [])
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z].*?)\s*;", line):
            code.append(Instruction(int(found[1], 16), found[3], found[2] is not None))
    return kernels


def find_loop(code: list[Instruction], places: dict[int, int]) -> tuple[int, int]:
    """First and last instruction of the innermost loop with the most products."""
    loops = []
    for last, instruction in enumerate(code):
        first = last if instruction.target is None else places[instruction.target]
        if first < last:
            products = sum(code[i].name.startswith("HMMA") for i in range(first, last))
            loops.append((products, first - last, first, last))
    products, _, first, last = max(loops)
    if products == 0:
        raise ValueError("no loop with products in it: the kernel has another shape")
    return first, last


def way_round(code: list[Instruction]) -> list[Instruction]:
    """Once round the loop: of the ways with the most products and copies, the shortest."""
    places = {instruction.address: i for i, instruction in enumerate(code)}
    first, last = find_loop(code, places)
    best: dict[int, tuple[int, int, int]] = {
        last: (0, -1, last)
    }  # how many count, minus how many there are, the next one
    for i in range(last - 1, first - 1, -1):
        target = code[i].target
        nexts = [] if target is None else [places[target]]
        nexts += [i + 1] if target is None or code[i].conditional or "," in code[i].text else []
        known = [(*best[j][:2], j) for j in nexts if i < j <= last and j in best]
        if known and not (code[i].name == "EXIT" and not code[i].conditional):
            counted, minus, j = max(known)
            best[i] = (counted + code[i].counts, minus - 1, j)
    way = [first]
    while way[-1] != last:
        way.append(best[way[-1]][2])
    if sum(code[i].name.startswith("HMMA") for i in way) != sum(
        code[i].name.startswith("HMMA") for i in range(first, last)
    ):
        raise ValueError("no way round the loop meets all of its products: the kernel has another shape")
    return [code[i] for i in way]


def unit_of(name: str) -> str:
    base = name.split(".")[0]
    return next((unit for unit, names in UNITS.items() if base in names.split()), "integer")


def main() -> int:
    parser = argparse.ArgumentParser(description="count what a warp of attention executes for a tile")
    parser.add_argument("--arch", default="sm_90", help="architecture (default: sm_90)")
    parser.add_argument("--list", metavar="KERNEL", help='print the instructions of one, "pqo3 128 8" for instance')
    args = parser.parse_args()
    units = [*UNITS, "integer"]
    print("| type | head | vectors | 16 keys | " + " | ".join(units) + " |\n" + "|---" * (len(units) + 4) + "|")
    kernels = [(re.search(PATTERN, name), code) for name, code in sorted(disassemble(args.arch).items())]
    if not any(found for found, _ in kernels):
        raise ValueError(f"no kernel of attention.cu matches {PATTERN}")
    for found, code in kernels:
        if not found:
            continue
        name, vectors, head = found[1], 8 * int(found[2]), 32 * int(found[3])
        way = way_round(code)
        count = Counter(unit_of(instruction.name) for instruction in way)
        cells = [str(count[unit]) for unit in units]
        print(f"| {name} | {head} | {vectors} | {len(way)} | " + " | ".join(cells) + " |")
        if args.list == f"{name} {head} {vectors}":
            print("\n".join(f"{instruction.address:6x} {instruction.text}" for instruction in way))
    return 0


if __name__ == "__main__":
    sys.exit(main())
