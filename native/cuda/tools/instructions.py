"""Counts what a warp of attention executes, by unit, in the machine code: docs/cuda.md rests on it.

Of the kernels by warps (attention_warp.cuh): once round the loop over tiles of 16 keys, copies, mask, softmax and all,
by the way that a tile takes whose keys all count; and before and after the loop, by the shortest way that writes
partial results, loops on it once round. Of large heads a team of two or four warps takes a tile: a key of a head costs
what all of them execute. Needs nvcc and cuobjdump; nothing is run.

Usage: python native/cuda/tools/instructions.py [--arch sm_90] [--list KERNEL]
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

import resources

UNITS = {
    "shared": "LDS STS",
    "global": "LDG STG LDGSTS LDL STL",
    "tensor": "HMMA",
    "float": "FMUL FADD FFMA HMUL2 HADD2 HFMA2",
    "multiply": "IMAD",
    "other": "MUFU MOVM SHFL VOTE BRA BSSY BSYNC WARPSYNC BAR NOP DEPBAR LDGDEPBAR B2R LDC ULDC CS2R S2R",
}
"""Everything else is the integer unit's: shifts, masks, permutations, comparisons, selections."""

WIDE_COPY = "LDGSTS.E.BYPASS.128"


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


def disassemble(arch: str, source: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel of a file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "attention.o"
        subprocess.run(resources.nvcc(source, arch, out), check=True)
        said = subprocess.run(["cuobjdump", "-sass", str(out)], check=True, capture_output=True, text=True).stdout
    kernels: dict[str, list[Instruction]] = {}
    for line in said.splitlines():
        if found := re.search(r"Function : (\w+)", line):
            code = kernels.setdefault(found[1], [])
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z].*?)\s*;", line):
            code.append(Instruction(int(found[1], 16), found[3], found[2] is not None))
    return kernels


def places_of(code: list[Instruction]) -> dict[int, int]:
    return {instruction.address: i for i, instruction in enumerate(code)}


def find_loop(code: list[Instruction]) -> tuple[int, int]:
    """First and last instruction of the innermost loop with the most products."""
    places = places_of(code)
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


def way(code: list[Instruction], first: int, last: int, needed: tuple[str, ...]) -> list[Instruction]:
    """From one instruction to another, never backwards: of the ways with the most that are needed, the shortest."""
    places = places_of(code)
    # how many are needed, minus how many there are, the next one
    best: dict[int, tuple[int, int, int]] = {last: (0, -1, last)}
    for i in range(last - 1, first - 1, -1):
        target = code[i].target
        nexts = [] if target is None else [places[target]]
        nexts += [i + 1] if target is None or code[i].conditional or "," in code[i].text else []
        known = [(*best[j][:2], j) for j in nexts if i < j <= last and j in best]
        if known and not (code[i].name == "EXIT" and not code[i].conditional):
            counted, minus, j = max(known)
            best[i] = (counted + code[i].name.startswith(needed), minus - 1, j)
    if first not in best:
        raise ValueError(f"no way from {code[first].address:x} to {code[last].address:x}: the kernel has another shape")
    found = [first]
    while found[-1] != last:
        found.append(best[found[-1]][2])
    return [code[i] for i in found]


def way_round(code: list[Instruction], first: int, last: int) -> list[Instruction]:
    """Once round the loop, with all of its products and the copies of a whole tile."""
    found = way(code, first, last, ("HMMA", WIDE_COPY))
    products = [sum(each.name.startswith("HMMA") for each in part) for part in (found, code[first:last])]
    if products[0] != products[1]:
        raise ValueError("no way round the loop meets all of its products: the kernel has another shape")
    return found


def ways_around(code: list[Instruction], first: int, last: int) -> list[Instruction]:
    """What is executed before the loop, with its copies, the table and q, and after it, with all exchanged results."""
    shared = ("LDS", "STS")
    ends = (i for i in range(last + 1, len(code)) if code[i].name == "EXIT")
    after = [way(code, last + 1, i, shared) for i in ends]
    writing = [part for part in after if any(each.name.startswith("STG") for each in part)]
    if not writing:
        raise ValueError("no way from the loop to an end writes results: the kernel has another shape")
    best = min(writing, key=lambda part: (-sum(each.name.startswith(shared) for each in part), len(part)))
    return way(code, 0, first - 1, ("LDGDEPBAR", "STS.128", "SHFL")) + best


@dataclass(frozen=True)
class Count:
    """What one warp of one kernel executes.

    Attributes:
        types: of K and V, "pqo4/pqo3", or one name for both.
        head: values of a head.
        vectors: query vectors.
        team: warps that share a tile of 16 keys.
        around: instructions before the loop and after it.
        tile: those once round it.
        units: the same by unit.
        shared_cycles: of the shared memory, for a tile: 16 bytes for each lane take it four times as long as four.
    """

    types: str
    head: int
    vectors: int
    team: int
    around: int
    tile: list[Instruction]
    units: Counter[str]
    shared_cycles: int

    @property
    def per_key(self) -> float:
        return len(self.tile) * self.team / 16


def shared_cycles(instruction: Instruction) -> int:
    wide = re.search(r"\.(64|128)\b", instruction.name)
    return 0 if unit_of(instruction.name) != "shared" else int(wide[1]) // 32 if wide else 1


def count(found: re.Match[str], code: list[Instruction]) -> Count:
    """Counts one kernel, whose name resources.TYPES has found."""
    tiles, blocks = int(found[3]), int(found[4])
    loop = find_loop(code)
    tile = way_round(code, *loop)
    return Count(
        types=f"{found[1]}/{found[2]}" if found[2] else found[1],
        head=32 * blocks,
        vectors=8 * tiles,
        team=max(1, blocks * tiles // 8),  # tqi_team_of
        around=len(ways_around(code, *loop)),
        tile=tile,
        units=Counter(unit_of(instruction.name) for instruction in tile),
        shared_cycles=sum(map(shared_cycles, tile)),
    )


def counts(arch: str, source: str) -> list[Count]:
    """The kernels by warps of one file."""
    kernels = [(re.search(resources.TYPES, name), code) for name, code in sorted(disassemble(arch, source).items())]
    return [count(found, code) for found, code in kernels if found]


def unit_of(name: str) -> str:
    base = name.split(".")[0]
    return next((unit for unit, names in UNITS.items() if base in names.split()), "integer")


def main() -> int:
    parser = argparse.ArgumentParser(description="count what a warp of attention executes for a tile")
    parser.add_argument("--arch", default="sm_90", help="architecture (default: sm_90)")
    parser.add_argument("--source", nargs="+", default=list(resources.WARP_SOURCES), help="files (default: all)")
    parser.add_argument("--list", metavar="KERNEL", help='print the instructions of one, "pqo3 128 8" for instance')
    args = parser.parse_args()
    units = [*UNITS, "integer"]
    heads = ["type", "head", "vectors", "warps", "around", "16 keys", "a key", *units]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    found = [each for source in args.source for each in counts(args.arch, source)]
    if not found:
        raise ValueError(f"no kernel of {', '.join(args.source)} matches {resources.TYPES}")
    for each in found:
        cells = [each.types, each.head, each.vectors, each.team, each.around, len(each.tile), f"{each.per_key:.1f}"]
        print("| " + " | ".join(map(str, [*cells, *(each.units[unit] for unit in units)])) + " |", flush=True)
        if args.list == f"{each.types} {each.head} {each.vectors}":
            print("\n".join(f"{instruction.address:6x} {instruction.text}" for instruction in each.tile))
    return 0


if __name__ == "__main__":
    sys.exit(main())
