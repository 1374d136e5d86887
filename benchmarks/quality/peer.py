"""Another program's cache types, by llama.cpp's own procedure: `real_models.py --peer PATH --types T,T`.

The program is a llama-perplexity. It reads the same text with an f16 cache, then with each type, and compares; the bits
that a type really takes are read from the size of the cache in its log. A program that stores other bits than a type's
name says is told of.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import real_sources

N_CTX: Final = 2048


class PeerError(Exception):
    """A program that does not do what a peer has to."""


@dataclass(frozen=True)
class Figures:
    """What the program says of one type, and what its cache takes.

    Attributes:
        type: as the program names it.
        bits: stored bits per cached value, from the size of K and V in the log.
        perplexity: of the text with this type.
        kld: mean divergence from its own f16, in nats.
        median: of the divergence.
        p999: 99.9 % of it.
        same_top: share of predictions with the same first token.
    """

    type: str
    bits: float
    perplexity: float
    kld: float
    median: float
    p999: float
    same_top: float


PATTERNS: Final = {
    "perplexity": r"Mean PPL\(Q\)",
    "kld": r"Mean +KLD",
    "median": r"Median +KLD",
    "p999": r"99\.9% +KLD",
    "same_top": r"Same top p",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --peer and what belongs to it."""
    group = parser.add_argument_group("another program's types")
    group.add_argument("--peer", type=Path, metavar="PROGRAM", help="a llama-perplexity to measure in the same way")
    group.add_argument("--types", default="q8_0,q4_0", help="its cache types (default: %(default)s)")
    group.add_argument("--peer-models", nargs="+", choices=list(real_sources.MODELS), default=["smollm2"])
    group.add_argument("--peer-text", choices=list(real_sources.TEXTS), default="prose")
    group.add_argument("--peer-chunks", type=int, default=1)
    group.add_argument("--threads", type=int, default=2)


def stored_bits(log: str, values: float) -> float:
    """Bits per value of K and V together, by what a log of llama.cpp says about the sizes of all its caches.

    Raises:
        PeerError: it says nothing of them.
    """
    found = re.findall(r"K \([^)]*\): +([\d.]+) MiB, V \([^)]*\): +([\d.]+) MiB", log)
    if not found:
        raise PeerError("the program's log has no sizes of K and V, so what it stores cannot be said")
    return sum(float(size) for pair in found for size in pair) * 2**20 * 8 / values


def doubt(kind: str, bits: float) -> str | None:
    """What is wrong with the size of a type whose name begins with a number of bits: "turbo3" is 3.0 to 4.0 bits.

    A block's scales take up to one bit per value in all of llama.cpp's types; q5_1 has two, and takes 6.0.
    """
    said = re.search(r"\d+", kind)
    if said is None or int(said[0]) <= bits <= int(said[0]) + 1:
        return None
    return f"{kind} takes {bits:.2f} bits per value, not the {said[0]} of its name"


class Program:
    """A llama-perplexity on one model, text and context."""

    def __init__(self, program: Path, model: Path, text: Path, n_chunks: int, n_threads: int) -> None:
        self.command = [str(program), "-m", str(model), "-f", str(text), "-fa", "on", "-c", str(N_CTX)]
        self.command += ["--chunks", str(n_chunks), "-t", str(n_threads), "-b", "512", "-ub", "512"]

    def run(self, cache: str, *options: str) -> str:
        """Its output and log.

        Raises:
            PeerError: it cannot be started, or fails.
        """
        command = [*self.command, "-ctk", cache, "-ctv", cache, *options]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise PeerError(f"cannot start {command[0]}: {error.strerror}") from error
        if done.returncode:
            raise PeerError(f"{command[0]} failed with a {cache} cache: {done.stderr.strip()[-500:]}")
        return done.stdout + done.stderr

    def figures(self, cache: str, base: Path, values: float) -> Figures:
        """One type against the stored f16.

        Raises:
            PeerError: as `run`, or it prints no statistics.
        """
        said = self.run(cache, "--kl-divergence-base", str(base), "--kl-divergence")
        found = {name: re.search(rf"^{pattern} *: *([\d.eE+-]+)", said, re.M) for name, pattern in PATTERNS.items()}
        if not all(found.values()):
            raise PeerError(f"{self.command[0]} printed no statistics for {cache}: {said.strip()[-500:]}")
        numbers = {name: float(match[1]) for name, match in found.items() if match}
        numbers["same_top"] /= 100
        return Figures(cache, stored_bits(said, values), **numbers)


def run(args: argparse.Namespace) -> None:
    """Measures and prints a line of JSON for each model and type, and on stderr what is doubtful."""
    for key in args.peer_models:
        model, name = real_sources.model_path(key), real_sources.MODELS[key].name
        real_sources.text(args.peer_text)
        text = real_sources.folder() / f"{args.peer_text}.txt"
        program = Program(args.peer, model, text, args.peer_chunks, args.threads)
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder, "base")
            values = stored_bits(program.run("f16", "--kl-divergence-base", str(base)), 1) / 16
            for kind in args.types.split(","):
                found = program.figures(kind, base, values)
                print(json.dumps({"model": name, "text": args.peer_text, **asdict(found)}), flush=True)
                if said := doubt(kind, found.bits):
                    print(f"WARNING: {said}", file=sys.stderr)
