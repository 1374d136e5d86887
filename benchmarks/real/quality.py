"""What cache types cost the real models on real texts: perplexity and divergence from f16, chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import tqgguf
from tqgguf.diagnostics import compare as comparing

STOCK: Final = ("bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl")
PQO: Final = ("pqo4", "pqt4", "pqo3", "pqt3")
PAIRS: Final = (("pqo4", "pqo3"), ("pqt4", "pqt3"), ("q8_0", "pqt4"))
"""K precise, V small."""

CACHES: Final = (*STOCK, *PQO, *PAIRS)
LONG: Final = ("q8_0", "q5_0", "q4_0", "iq4_nl", *PQO)
"""What is measured at 8,192 tokens, where a chunk costs four times as much and more."""

TAILS: Final = (0, 128)
TOGETHER: Final = 6
"""Caches beside the reference at a time. Each has logits of a batch and compute buffers of its own: about 1 GiB with
Gemma's vocabulary."""

N_BATCH: Final = 512


def measure(
    path: Path,
    text: str,
    n_ctx: int,
    n_chunks: int,
    caches: Sequence[Any] = CACHES,
    tails: Sequence[int] = TAILS,
    n_threads: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of `tqgguf.compare` against f16, f16 first, and last f16 with batches of a quarter: the noise."""
    rows: dict[str, dict[str, Any]] = {}
    for group in (caches[i : i + TOGETHER] for i in range(0, len(caches), TOGETHER)):
        found = tqgguf.compare(
            path,
            ("f16", *group),
            text,
            tails=tails,
            n_ctx=n_ctx,
            n_chunks=n_chunks,
            n_batch=N_BATCH,
            n_threads=n_threads,
        )
        rows.update((row.type, asdict(row)) for row in found.rows)
    return [*rows.values(), noise(path, text, n_ctx, n_chunks, n_threads)]


def noise(path: Path, text: str, n_ctx: int, n_chunks: int, n_threads: int | None = None) -> dict[str, Any]:
    """f16 against f16 that computes a quarter as many tokens at once: what a difference of rounding alone gives."""
    info = tqgguf.read_model_info(path)
    f16 = comparing.compared_caches(("f16", "q8_0"), info.n_layer, (0,))[0]
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(contextlib.closing(comparing.load(path, f16, n_ctx, n_threads, n_batch=N_BATCH)))
        chunks = comparing.text_chunks(model, text, n_ctx, n_chunks, False)
        other = stack.enter_context(model.further_context(f16.policy, tail=0, n_ubatch=N_BATCH // 4))
        readers = [comparing.Reader(f16, model.ctx), comparing.Reader(f16, other)]
        comparing.read_chunks(model, readers, chunks, None)
        return asdict(readers[1].quality(info, n_ctx, chunks.size)) | {"type": "f16, other batch size"}


def chunks_of(text: str) -> Iterator[str]:
    """A text cut where paragraphs end, for tasks that want a different one each time."""
    yield from (paragraph for paragraph in text.split("\n\n") if len(paragraph) > 200)
