"""What each KV cache type does to attention: on synthetic keys, and on Q, K and V of a real encoder and the demo model.

    python benchmarks/quality/attention_quality.py   # a few minutes; saves results/attention_quality.json
    python benchmarks/quality/attention_quality.py --data "constant offset" --output -

Synthetic data have 8 KV heads of 128, one query head each, 1,024 tokens and causal attention. Values are independent
N(0, 1), and so are keys to begin with. Queries are too, scaled so that the scores' RMS is 2.1 in each head.

- gaussian: nothing else.
- hot channels: 4 channels of each head, chosen at random, are 8 times as wide.
- constant offset: one vector per head, 2.2 times N(0, 1) in every channel, is added to all of its keys, as the bias of
  a key projection does. Queries have less of its direction than of others, so that the offset and the varying part
  have equal shares in the variance of the scores.
- bert: the 6 layers of all-MiniLM-L6-v2 (12 heads of 32, attention in both directions) on 3 times 512 tokens of this
  repository's own documents.
- demo model: the 4 layers of the bundled model (4 query heads, 2 KV heads of 64), taken from llama.cpp's graph while it
  reads 512 tokens of facts.

Forms of a type:

- stored: as llama.cpp stores it. Stock quantized types stand behind the graph's Hadamard rotation where the head size
  is a multiple of 64; BERT's heads of 32 are not rotated.
- signs+H32: stock quantized types behind the block transform that the PQO types have (`reference.transform`) instead.
  This is what "rotated" means for heads of 32.
- centred: as stored, after subtracting each head's mean key. The mean is that of other data: of a second draw, or of
  the text before this one (the last one for the first).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "common"))

import bert
import machine
import numpy as np
import numpy.typing as npt

from tqgguf import CACHE_TYPES, reference
from tqgguf.demo import model as demo
from tqgguf.diagnostics.attention import HeadError, attention_error, head_facts
from tqgguf.diagnostics.capture import capture_attention

F32 = npt.NDArray[np.float32]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "attention_quality.json"
TEXTS = ("README.md", "CONTRIBUTING.md", "docs/demo-model.md")
N_TOKENS = 1024
N_HEAD = 8
HEAD_DIM = 128
SCORE_RMS = 2.1
N_HOT = 4
HOT_WIDTH = 8.0
OFFSET_RMS = 2.2
BERT_TEXTS = 3
BERT_TOKENS = 510
DEMO_TOKENS = 512
SIMILAR = ("The weather is lovely today.", "It's so sunny outside!", 0.6660)
"""Two sentences and their similarity as published for the model (sbert.net, quickstart): a check of the encoder."""

FIGURES = ("nmse_k", "nmse_v", "score", "kl", "output")


@dataclass(frozen=True)
class Inputs:
    """Attention of one layer.

    Attributes:
        q, k, v: (n_tokens, n_head, head_dim).
        mask: (n_tokens, n_tokens), or None for the causal one.
        mean: (n_head, head_dim), each head's mean key on other data.
    """

    q: F32
    k: F32
    v: F32
    mask: F32 | None
    mean: F32


@dataclass(frozen=True)
class Row:
    """One type in one form on one kind of data: the mean over heads (layers, texts), and the worst head."""

    type: str
    bits: float
    form: str
    mean: dict[str, float]
    worst: dict[str, float]


def synthetic(width: F32, offset: F32) -> list[Inputs]:
    """Keys N(0, 1) times width plus offset, both (N_HEAD, HEAD_DIM); queries and values as the module's text says."""
    rng = np.random.default_rng(0)
    keys, other, q, v = rng.standard_normal((4, N_TOKENS, N_HEAD, HEAD_DIM), dtype=np.float32)
    keys, other = keys * width + offset, other * width + offset
    size = np.linalg.norm(offset, axis=1, keepdims=True)
    if size.all():
        direction = offset / size
        along = np.einsum("nhd,hd->nh", q, direction)[:, :, None]
        q -= (1 - np.sqrt(HEAD_DIM) / size) * along * direction
    seen = np.tril(np.ones((N_TOKENS, N_TOKENS), dtype=bool))
    for h in range(N_HEAD):
        scores = (q[:, h] @ keys[:, h].T)[seen] / np.sqrt(HEAD_DIM)
        q[:, h] *= SCORE_RMS / np.sqrt(np.square(scores).mean())
    return [Inputs(q, keys, v, None, other.mean(axis=0))]


def gaussian() -> list[Inputs]:
    """Nothing special."""
    ones = np.ones((N_HEAD, HEAD_DIM), dtype=np.float32)
    return synthetic(ones, 0 * ones)


def hot_channels() -> list[Inputs]:
    """A few channels much wider than the others."""
    rng = np.random.default_rng(1)
    width = np.ones((N_HEAD, HEAD_DIM), dtype=np.float32)
    for head in width:
        head[rng.choice(HEAD_DIM, N_HOT, replace=False)] = HOT_WIDTH
    return synthetic(width, 0 * width)


def constant_offset() -> list[Inputs]:
    """All keys of a head displaced by the same vector."""
    offset = np.random.default_rng(1).standard_normal((N_HEAD, HEAD_DIM), dtype=np.float32)
    return synthetic(np.ones_like(offset), np.float32(OFFSET_RMS) * offset)


def real() -> list[Inputs]:
    """Layers of the encoder, text by text."""
    encoder = bert.Encoder(bert.fetch())
    similarity = encoder.similarity(*SIMILAR[:2])
    if abs(similarity - SIMILAR[2]) > 1e-3:
        raise SystemExit(f"the encoder is wrong: it gives a similarity of {similarity:.4f}, not {SIMILAR[2]}")
    tokens = encoder.tokens("\n".join((ROOT / name).read_text() for name in TEXTS))
    runs = [encoder.run(tokens[i * BERT_TOKENS : (i + 1) * BERT_TOKENS])[0] for i in range(BERT_TEXTS)]
    return [
        Inputs(q, k, v, np.zeros((len(q), len(k)), dtype=np.float32), before[layer][1].mean(axis=0))
        for before, run in zip((runs[-1], *runs), runs, strict=False)
        for layer, (q, k, v) in enumerate(run)
    ]


def demo_model() -> list[Inputs]:
    """Layers of the bundled model, on one of two prompts."""
    prompt, other = (
        capture_attention(demo.MODEL_PATH, demo.recall_prompt(seed, 140).prompt, range(4), n_ctx=DEMO_TOKENS)
        for seed in (1, 2)
    )
    return [Inputs(x.q, x.k, x.v, x.mask, other[layer].k.mean(axis=0)) for layer, x in prompt.items()]


DATA: dict[str, Callable[[], list[Inputs]]] = {
    "gaussian": gaussian,
    "hot channels": hot_channels,
    "constant offset": constant_offset,
    "bert": real,
    "demo model": demo_model,
}


def block_transform(x: F32) -> F32:
    """Signs and H32 on blocks of 32 values, as in the PQO types. Orthonormal: attention is the same behind it."""
    return reference.transform(x.reshape(-1, reference.BLOCK)).reshape(x.shape)


def measure(inputs: list[Inputs]) -> list[Row]:
    """All types in all forms."""
    quantized = [kind.name for kind in CACHE_TYPES.values() if kind.quantized]
    stock = [name for name in quantized if not CACHE_TYPES[name].ours]
    found: dict[tuple[str, str], list[HeadError]] = {}
    for x in inputs:
        scale = x.q.shape[2] ** -0.5
        turned = (block_transform(x.q), block_transform(x.k), block_transform(x.v))
        for form, errors in (
            ("stored", attention_error(x.q, x.k, x.v, ["f16", *quantized], scale, mask=x.mask)),
            ("signs+H32", attention_error(*turned, stock, scale, mask=x.mask, rotate=False)),
            ("centred", attention_error(x.q, x.k, x.v, quantized, scale, mask=x.mask, offset=x.mean)),
        ):
            for name, heads in errors.items():
                found.setdefault((name, form), []).extend(heads)
    return [row(name, form, heads) for (name, form), heads in found.items()]


def row(name: str, form: str, heads: list[HeadError]) -> Row:
    """Mean and worst of each figure, to four digits."""
    values = {figure: [getattr(head, figure) for head in heads] for figure in FIGURES}
    return Row(
        name,
        CACHE_TYPES[name].bits,
        form,
        {figure: float(f"{np.mean(v):.4g}") for figure, v in values.items()},
        {figure: float(f"{max(v):.4g}") for figure, v in values.items()},
    )


def table(title: str, rows: list[Row]) -> Iterator[str]:
    """A Markdown table of the means, most bits first, then by output error."""
    yield f"\n{title}\n\n| type | bits | form | NMSE of K | q.k | KL | output | worst head's output |"
    yield "|---|---|---|---|---|---|---|---|"
    for r in sorted(rows, key=lambda r: (-r.bits, -r.mean["output"])):
        cells = [f"{r.mean[figure]:.4f}" for figure in ("nmse_k", "score", "kl", "output")]
        yield f"| {r.type} | {r.bits:g} | {r.form} | {' | '.join(cells)} | {r.worst['output']:.4f} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="kinds of data (default: all)")
    parser.add_argument("--output", default=str(RESULTS), help="JSON file, - for stdout")
    args = parser.parse_args()
    data: dict[str, Any] = {}
    for name in args.data:
        start = time.perf_counter()
        inputs = DATA[name]()
        facts = [fact for x in inputs for fact in head_facts(x.k)]
        rows = measure(inputs)
        data[name] = {
            "heads": len(facts),
            "offset": round(float(np.mean([fact.offset for fact in facts])), 3),
            "outlier_channels": round(float(np.mean([len(fact.outliers) for fact in facts])), 2),
            "seconds": round(time.perf_counter() - start, 1),
            "rows": [asdict(r) for r in rows],
        }
        print("\n".join(table(name, rows)), file=sys.stderr, flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/quality/attention_quality.py", *sys.argv[1:]]),
        "machine": machine.facts(),
        "bert": bert.REQUIREMENT,
        "data": data,
    }
    text = json.dumps(result, indent=1) + "\n"
    if args.output == "-":
        print(text, end="")
    else:
        Path(args.output).write_text(text)


if __name__ == "__main__":
    main()
