"""Q, K and V of a text as they enter attention (`model.reading`), of a model by its path or one that is loaded."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .._util import ranges
from ..errors import ArgumentError, UnsupportedError
from ..gguf.info import read_model_info
from ..model.llama import Llama
from ..model.reading import AttentionInputs, Loaded, read_attention

F32 = npt.NDArray[np.float32]


def loaded(model: Llama) -> Loaded:
    """What reads through a model need of it."""
    return Loaded(model.model, model.model_info, model.context_params.n_threads_batch)


def capture_attention(
    path: str | Path,
    text: str,
    layers: Collection[int],
    *,
    n_ctx: int = 512,
    n_threads: int | None = None,
    cache: str = "f32",
) -> dict[int, AttentionInputs]:
    """Runs the first n_ctx tokens of a text through a model as one batch and copies the inputs of attention.

    Args:
        path: a GGUF file.
        text: any text of at least n_ctx tokens.
        layers: numbers of the layers wanted; each must have a KV cache of its own.
        n_ctx: tokens.
        n_threads: threads; None for half of the processors.
        cache: type of the KV cache. With another type than f32, K and V are as decoded from it; if llama.cpp rotates
            the type, Q, K and V are rotated.

    Returns:
        By layer, ascending.

    Raises:
        ArgumentError: a layer without a KV cache of its own, or a text of fewer tokens than n_ctx.
        UnsupportedError: the model has no KV cache, does not run flash attention (Grok), or keeps V within K (MLA).
        TqggufError: see `tqgguf.Llama`; or llama.cpp could not run the text.
    """
    info = read_model_info(path)
    if not info.layers or info.mla:
        reason = "keeps V within K (MLA)" if info.mla else "has no KV cache"
        raise UnsupportedError(f"{info.path.name}: architecture {info.architecture} {reason}; nothing to capture")
    known = [layer.index for layer in info.layers]
    for layer in layers:
        if layer not in known:
            raise ArgumentError(f"layer {layer} has no KV cache of its own; layers with one are {ranges(known)}")
    if n_ctx < 2:
        raise ArgumentError(f"n_ctx is {n_ctx}, must be at least 2 tokens")
    # A callback needs a new context; the model's own context, which cannot take one, is as small as possible.
    model = Llama(path, cache="f16", n_ctx=256, n_threads=n_threads, n_threads_batch=n_threads, verbose=False)
    try:
        tokens = model.tokenize(text.encode())[:n_ctx]
        if len(tokens) < n_ctx:
            raise ArgumentError(f"the text has {len(tokens)} tokens, fewer than the {n_ctx} that were asked for")
        return read_attention(loaded(model), tokens, layers, lambda inputs: inputs, cache)
    finally:
        model.close()
