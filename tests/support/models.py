"""Random models of a given shape: llama, and four architectures that differ from it in one point each; an adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf_file import TOKENS, Tensor, shape_keys, write_gguf

_MORE_KEYS: Final[dict[str, dict[str, Any]]] = {
    "gemma2": {"attention.sliding_window": 48, "attn_logit_softcapping": 2.0},
    "qwen2": {"rope.freq_base": 1e30},
    "stablelm": {"attention.layer_norm_epsilon": 1e-5},
}


def write_model(
    path: Path,
    *,
    head_dim: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_layer: int = 2,
    n_ctx: int = 2048,
    n_embd: int = 64,
    n_ff: int = 96,
    n_vocab: int | None = None,
    seed: int = 0,
    arch: str = "llama",
    key_bias: float = 0.0,
    n_word: int = 0,
    n_rot: int | None = None,
    weights: str = "f32",
) -> Path:
    """Writes a model with random weights.

    Args:
        n_vocab: None is a vocabulary of bytes; a number is that many tokens without a tokenizer.
        n_word: so many whole words are added; at temperature 0 the model says nothing else and never ends.
        n_rot: RoPE turns the first n_rot values of a head; None is all of them.
        arch: "llama", "refact" (ALiBi), "gemma2" (softcap; windows of 48 tokens in every other layer), "stablelm"
            (layer norms), or "qwen2", whose keys have a constant added, N(0, key_bias) a channel; its RoPE turns too
            slowly to change that constant.
        weights: the type of matrices, as `write_gguf` has it.
    """
    shape = {"n_embd": n_embd, "n_layer": n_layer, "n_ff": n_ff, "n_head": n_head, "n_head_kv": n_head_kv}
    keys = shape_keys(n_ctx=n_ctx, head_dim=head_dim, **shape) | _MORE_KEYS.get(arch, {})
    keys["rope.dimension_count"] = n_rot or head_dim
    rng = np.random.default_rng(seed)
    n_token = n_vocab or len(TOKENS) + n_word

    def tensors() -> Iterator[Tensor]:
        for name, size in _shapes(arch, n_token=n_token, head_dim=head_dim, **shape):
            if name.endswith("attn_k.bias"):
                values = key_bias * rng.standard_normal(size)
            elif len(size) == 1:
                values = np.full(size, 0.0 if name.endswith("bias") else 1.0)
            else:
                values = rng.standard_normal(size) / np.sqrt(size[-1])
            if n_word and name == "output.weight":
                values[: len(TOKENS)] = 0
            yield name, values

    words = [f"\u2581word{i}".encode() for i in range(n_word)]
    return write_gguf(path, arch, keys, tensors(), words=words, n_vocab=n_vocab, weights=weights)


def _shapes(
    arch: str, *, n_token: int, n_embd: int, n_layer: int, n_ff: int, n_head: int, n_head_kv: int, head_dim: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors by name, matrices (n_out, n_in), in the order in which their values are drawn."""
    q, kv = n_head * head_dim, n_head_kv * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (n_embd,),
        "attn_q.weight": (q, n_embd),
        "attn_k.weight": (kv, n_embd),
        "attn_v.weight": (kv, n_embd),
        "attn_output.weight": (n_embd, q),
        **({"attn_k.bias": (kv,), "attn_q.bias": (q,), "attn_v.bias": (kv,)} if arch == "qwen2" else {}),
        "ffn_norm.weight": (n_embd,),
        "ffn_gate.weight": (n_ff, n_embd),
        "ffn_up.weight": (n_ff, n_embd),
        "ffn_down.weight": (n_embd, n_ff),
        **({"attn_norm.bias": (n_embd,), "ffn_norm.bias": (n_embd,)} if arch == "stablelm" else {}),
        **({f"post_{part}_norm.weight": (n_embd,) for part in ("attention", "ffw")} if arch == "gemma2" else {}),
    }
    yield "token_embd.weight", (n_token, n_embd)
    for i in range(n_layer):
        for name, size in layer.items():
            yield f"blk.{i}.{name}", size
    yield "output_norm.weight", (n_embd,)
    if arch == "stablelm":
        yield "output_norm.bias", (n_embd,)
    if arch != "gemma2":  # its output matrix is its embedding
        yield "output.weight", (n_token, n_embd)


def write_lora(path: Path, seed: int = 0) -> Path:
    """Writes an adapter of rank 8 for Q and K of the demo model, with random weights."""
    import gguf

    rng = np.random.default_rng(seed)
    with contextlib.closing(gguf.GGUFWriter(str(path), "llama")) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 8.0)
        for layer in range(4):
            for name, n_out in (("attn_q", 256), ("attn_k", 128)):
                for part, shape in (("lora_a", (8, 256)), ("lora_b", (n_out, 8))):
                    values = 0.06 * rng.standard_normal(shape).astype(np.float32)
                    writer.add_tensor(f"blk.{layer}.{name}.weight.{part}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path
