"""Writes GGUF models whose weights are random: their words are noise, their shapes are real."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

TOKENS: Final = (b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256)), "\u2581".encode())
"""A vocabulary that can spell any text: three special tokens, every byte, and the blank."""

Tensor = tuple[str, npt.NDArray[Any]]


def shape_keys(
    *, n_ctx: int, n_embd: int, n_layer: int, n_ff: int, n_head: int, n_head_kv: int, head_dim: int
) -> dict[str, Any]:
    """The keys that every transformer has, without the architecture's prefix."""
    return {
        "context_length": n_ctx,
        "embedding_length": n_embd,
        "block_count": n_layer,
        "feed_forward_length": n_ff,
        "rope.dimension_count": head_dim,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_head_kv,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }


def write_gguf(
    path: Path,
    arch: str,
    keys: dict[str, Any],
    tensors: Iterable[Tensor],
    *,
    words: Sequence[bytes] = (),
    n_vocab: int | None = None,
    weights: str = "f32",
) -> Path:
    """Writes a model and returns its path.

    Args:
        keys: int, float or list of int by name; the architecture's prefix is added.
        tensors: float arrays by name, matrices (n_out, n_in).
        words: more tokens behind `TOKENS`.
        n_vocab: without a tokenizer, so many tokens; then there are no words.
        weights: the type of matrices (f32, f16, q8_0, ...); vectors are f32.
    """
    kind = gguf.GGMLQuantizationType[weights.upper()]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("random")
    if weights != "f32":
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[type(value)]
        add(f"{arch}.{key}", value)
    if n_vocab is not None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(n_vocab)
    else:
        _add_tokenizer(writer, words)
    for name, values in tensors:
        if values.ndim == 1 or weights == "f32":
            writer.add_tensor(name, values.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, words: Sequence[bytes]) -> None:
    tokens = [*TOKENS, *words]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256
    kinds += [gguf.TokenType.NORMAL] * (len(tokens) - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
