"""Checks `tqgguf compare` against llama.cpp's own `llama-perplexity --kl-divergence`, on the same file and types.

    python benchmarks/quality/compare_upstream.py tqgguf/lib/llama-perplexity

Prints perplexity, mean KL divergence and same-top-token rate of both, type by type, and fails if perplexity or
divergence differ in the third digit. llama-perplexity stores the reference's log-probabilities in 16 bits, clipped at
16 nats below the best token; compare keeps them exact. The divergence that llama-perplexity finds between the reference
and itself is the size of that rounding: below 0.000001 nats on the demo model, and other types differ by 0.000002.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tqgguf
from tqgguf.demo import model as demo
from tqgguf.diagnostics.texts import read_text

TYPES = ("f16", "q8_0", "q4_0", "pqo3")
RELATIVE = 5e-4
KLD_RELATIVE = 2e-3
"""Half a unit of the third digit is 5e-4 to 5e-3. In a vocabulary of 262,144 the tokens 16 nats below the best one,
which llama-perplexity clips, have enough probability together to move a divergence by 1e-3."""
KLD_NOISE = 5e-6
"""Nats, for the 16 bits of the stored reference and the six decimals that llama-perplexity prints."""


@dataclass(frozen=True)
class Figures:
    """What both programs say of a type: perplexity, mean KLD in nats, share of tokens with the same top token."""

    perplexity: float
    kld: float
    same_top: float


class Perplexity:
    """The program llama-perplexity on one model, text and context."""

    def __init__(self, program: Path, model: Path, text: Path, n_ctx: int, n_chunks: int, n_threads: int) -> None:
        self.command = [str(program), "-m", str(model), "-f", str(text), "-fa", "on"]
        self.command += ["-c", str(n_ctx), "--chunks", str(n_chunks), "-t", str(n_threads)]

    def run(self, cache: str, *options: str) -> str:
        """Its output."""
        types = ["--cache-type-k", cache, "--cache-type-v", cache]
        done = subprocess.run([*self.command, *types, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"llama-perplexity failed with a {cache} cache:\n{done.stderr[-2000:]}")
        return done.stdout + done.stderr

    def figures(self, cache: str, base: Path) -> Figures:
        """One type against the stored base."""
        said = self.run(cache, "--kl-divergence-base", str(base), "--kl-divergence")
        found = {
            name: re.search(rf"{pattern} *: *([\d.eE+-]+)", said)
            for name, pattern in (("ppl", r"Mean PPL\(Q\)"), ("kld", r"Mean +KLD"), ("top", "Same top p"))
        }
        if not all(found.values()):
            sys.exit(f"llama-perplexity printed no statistics (too few tokens?):\n{said[-2000:]}")
        ppl, kld, top = (float(match[1]) for match in found.values() if match)
        return Figures(ppl, kld, top / 100)


def demo_text(path: Path, n_cases: int) -> None:
    """Writes facts, questions and answers of the demo model as plain text."""
    cases = [demo.recall_prompt(seed, 40) for seed in range(n_cases)]
    path.write_text("\n".join(f"{case.prompt} {case.fact.sentence}" for case in cases) + "\n")


def agree(ours: Figures, theirs: Figures) -> bool:
    """Whether perplexity and divergence are the same to three digits, the noise of the stored base allowed for."""
    return (
        abs(ours.perplexity / theirs.perplexity - 1) < RELATIVE
        and abs(ours.kld - theirs.kld) < KLD_RELATIVE * theirs.kld + KLD_NOISE
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="llama-perplexity, built with the patch series")
    parser.add_argument("-m", "--model", type=Path, default=demo.MODEL_PATH, help="GGUF file (default: the demo model)")
    parser.add_argument("-f", "--file", type=Path, help="text (default: the demo model's facts and questions)")
    parser.add_argument("--cache", default=",".join(TYPES), help="types, reference first (default: %(default)s)")
    parser.add_argument("--ctx", type=int, default=1024, help="tokens in a chunk (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=4, help="chunks (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: %(default)s)")
    args = parser.parse_args()
    types = args.cache.split(",")
    with tempfile.TemporaryDirectory() as folder:
        text, base = args.file or Path(folder, "text.txt"), Path(folder, "base.bin")
        if not args.file:
            demo_text(text, 4 * args.ctx * args.chunks // 1000 + 4)
        upstream = Perplexity(args.program, args.model, text, args.ctx, args.chunks, args.threads)
        upstream.run(types[0], "--kl-divergence-base", str(base))
        comparison = tqgguf.compare(
            *(args.model, types, read_text(text)),
            tails=(0,),
            n_ctx=args.ctx,
            n_chunks=args.chunks,
            n_threads=args.threads,
            calibration="off",
        )  # without a tail, as upstream's tools are unless told otherwise
        good = True
        print(f"{comparison.model}, {comparison.n_chunks} chunks of {comparison.n_ctx} tokens\n")
        print("| cache | program | perplexity | mean KLD | same top |\n|---|---|---|---|---|")
        for row in comparison.rows:
            ours = Figures(row.perplexity, row.kld.mean, row.same_top)
            theirs = upstream.figures(row.type, base)
            for name, said in (("tqgguf compare", ours), ("llama-perplexity", theirs)):
                print(
                    f"| {row.type} | {name} | {said.perplexity:.4f} | {said.kld:.6f} | {said.same_top:.3%} |",
                    flush=True,
                )
            good &= agree(ours, theirs)
    print("\nagree" if good else "\nDO NOT AGREE")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
