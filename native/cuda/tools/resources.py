"""Compiles native/cuda for every supported architecture and tables each kernel's registers, spills and shared memory.

Fails on a warning, and on a kernel that spills more than a few registers. Nothing is run: it needs nvcc, no GPU.
With the patched upstream it also compiles what calls the kernels: ggml-cuda.cu and the adapter, for one architecture.

Usage: python native/cuda/tools/resources.py --compile DIR [--arch sm_90 ...] [--upstream LLAMA_CPP]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).parents[1]
SOURCES = {
    line.split()[0]: line.split()[1:]
    for line in (CUDA / "sources.txt").read_text().splitlines()
    if line.split()[0].endswith((".cu", ".cpp"))
}
"""The files of sources.txt that are no C, and each one's own options."""

TYPES = r"tqi_attend_warp_kernelI\d+tqi_(\w{3,4})(?:\d+tqi_(\w{3,4})|S\d*_)Li(\d)ELi(\d+)E"
"""K's type, V's if it is another, tiles of eight vectors, and blocks of a head, in a kernel's mangled name."""

WARP_SOURCES = ("attention_types.cu", "attention_pairs.cu", "attention_q8_0.cu", "attention_f16.cu")
"""Those with kernels by warps."""

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")
MOST_SPILLED = 64
"""Bytes of spill stores that a kernel may have."""


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
    name = re.sub(r"^_Z\w*?\d+(tqi_\w+?_kernel).*", r"\1", mangled)
    numbers = re.findall(r"Li(\d+)E", mangled)
    if name == "tqi_attend_kernel":
        return f"{name}, {8 * int(numbers[0])} vectors"
    if found := re.search(TYPES, mangled):
        types = f"{found[1]}/{found[2]}" if found[2] else found[1]
        return f"{name} {types} DK {32 * int(found[4])}, {8 * int(found[3])} vectors"
    return " ".join([name, *(f"{number} bits" for number in numbers)])


def nvcc(source: str, arch: str, out: Path) -> list[str]:
    """The command that compiles one file for one architecture, sm_90 for instance."""
    number = arch.removeprefix("sm_")
    target = ["-gencode", f"arch=compute_{number},code={arch}", f"-I{CUDA.parent / 'include'}"]
    return ["nvcc", "-std=c++17", "-O3", *SOURCES[source], *target, "-c", str(CUDA / source), "-o", str(out)]


def compile_file(source: str, arch: str, folder: Path) -> tuple[list[Kernel], str]:
    """The kernels of one file, and whatever else the compiler said."""
    command = nvcc(source, arch, folder / f"{Path(source).stem}-{arch}.o")
    command += ["-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]
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
        elif line.strip() and not re.search(r"^ptxas info|Function properties|^\S*\.(cu|cpp)$", line):
            rest.append(line)
    if done.returncode != 0 and not rest:
        rest.append(f"nvcc failed on {source} for {arch}")
    return kernels, "\n".join(rest)


def compile_callers(upstream: Path, folder: Path) -> str | None:
    """What the compilers say of ggml-cuda.cu, which is patched, and of the adapter; None where cuBLAS is missing."""
    ggml = upstream / "ggml"
    probe = subprocess.run(
        ["nvcc", "-E", "-x", "cu", "-"], input="#include <cublas_v2.h>", capture_output=True, text=True, check=False
    )
    if probe.returncode != 0:
        return None
    include = [f"-I{ggml / name}" for name in ("include", "src")] + [f"-I{CUDA.parent / 'ggml'}"]
    device = ["nvcc", "-std=c++17", "-use_fast_math", "-extended-lambda", "-gencode", "arch=compute_90,code=sm_90"]
    device += ["-DGGML_CUDA_USE_GRAPHS", *include, "-c", str(ggml / "src/ggml-cuda/ggml-cuda.cu")]
    host = ["cc", "-std=c11", "-O1", "-Wall", "-Wextra", "-Wno-unused-function", *include]
    host += [f"-I{CUDA}", f"-I{CUDA.parent / 'include'}", "-c", str(CUDA.parent / "ggml/tq_ggml_cuda.c")]
    said = ""
    for command in (device, host):
        done = subprocess.run([*command, "-o", str(folder / "caller.o")], capture_output=True, text=True, check=False)
        said += done.stdout + done.stderr
        if done.returncode != 0:
            said += f"{command[0]} failed on {command[-1]}\n"
    return said


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
    parser.add_argument(
        "--upstream", type=Path, metavar="LLAMA_CPP", help="patched llama.cpp whose CUDA backend to try"
    )
    args = parser.parse_args()
    args.compile.mkdir(parents=True, exist_ok=True)
    kernels: list[Kernel] = []
    failed = False
    start = time.monotonic()
    # The host's code, in .cpp files, is the same for all.
    device = [(source, arch) for arch in args.arch for source in SOURCES if source.endswith(".cu")]
    jobs = device + [(source, args.arch[0]) for source in SOURCES if source.endswith(".cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found, rest in pool.map(lambda job: compile_file(*job, args.compile), jobs):
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
    if args.upstream:
        start = time.monotonic()
        said = compile_callers(args.upstream, args.compile)
        if said is None:
            print("skipped ggml-cuda.cu: nvcc finds no cublas_v2.h (CUDA's libcublas-dev, or CPATH)")
        elif said.strip():
            print(said, file=sys.stderr)
            failed = True
        else:
            print(f"ggml-cuda.cu with our hooks, and the adapter: {time.monotonic() - start:.0f} s, no warning")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
