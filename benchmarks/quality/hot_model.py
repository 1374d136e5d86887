"""Makes from a llama model one that computes the same but has hot key channels, as models do that break low-bit caches.

    python benchmarks/quality/hot_model.py MODEL.gguf HOT.gguf --scale 16 --pairs 2

In every KV head the first RoPE pairs of the keys are multiplied by a power of two, and those of the query heads that
read them are divided by it. RoPE turns a pair as a whole, so every score keeps its value: the keys alone differ. Public
reports of models with such keys (weights of a key norm, biases): Qwen3-0.6B with a q4_0 cache, Qwen2.5-7B with turbo3.

Both projections are stored as f32, in which the factors are exact. A scale of 1 gives the model to compare with: logits
of the two are equal bit for bit with an f32 cache (tests/integration/test_hot_model.py).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt


def factors(n_head: int, head_dim: int, n_pairs: int, scale: float) -> npt.NDArray[np.float32]:
    """(n_head * head_dim): scale for the channels of the hot pairs of every head, 1 for the others.

    The hot pairs are spread over the head. A llama model keeps a RoPE pair in neighbouring rows.
    """
    one = np.ones(head_dim, np.float32)
    for pair in range(n_pairs):
        first = 2 * (pair * (head_dim // 2) // n_pairs)
        one[first : first + 2] = scale
    return np.tile(one, n_head)


def make_hot(source: Path, target: Path, scale: float, n_pairs: int) -> None:
    """Writes the model with hot keys.

    Raises:
        ValueError: the model is not of the llama family, scale is no power of two, a head has not as many pairs, or
            target is source.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    if architecture != "llama":
        raise ValueError(f"{source} is a {architecture} model: only those of the llama architecture are supported")
    if scale <= 0 or math.frexp(scale)[0] != 0.5:
        raise ValueError(f"the scale is {scale:g}, must be a power of two, for which the factors are exact")

    def number(key: str) -> int:
        return int(reader.fields[f"llama.{key}"].contents())

    n_head, n_head_kv = number("attention.head_count"), number("attention.head_count_kv")
    head_dim = number("embedding_length") // n_head
    if not 1 <= n_pairs <= head_dim // 2:
        raise ValueError(f"{n_pairs} pairs asked for: a head of {head_dim} has 1 to {head_dim // 2}")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the source itself: give another file to write")
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            _copy_field(writer, field)
    for tensor in reader.tensors:
        scaled = {"attn_k": (n_head_kv, scale), "attn_q": (n_head, 1 / scale)}.get(tensor.name.split(".")[-2])
        if scaled is None:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        column = factors(scaled[0], head_dim, n_pairs, scaled[1])
        writer.add_tensor(tensor.name, values * (column if values.ndim == 1 else column[:, None]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_field(writer: gguf.GGUFWriter, field: Any) -> None:
    value, kind = field.contents(), field.types[0]
    sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, value, kind, sub_type)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a GGUF model of the llama architecture")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--scale", type=float, default=16, help="of the hot channels, a power of two (default: 16)")
    parser.add_argument("--pairs", type=int, default=2, help="hot RoPE pairs in each head (default: 2)")
    args = parser.parse_args()
    try:
        make_hot(args.source, args.target, args.scale, args.pairs)
    except (OSError, ValueError) as error:
        sys.exit(f"hot_model.py: {error}")


if __name__ == "__main__":
    main()
