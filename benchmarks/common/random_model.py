"""Random-weight llama models of any attention shape, as GGUF: speed does not depend on what the weights say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np


@dataclass(frozen=True)
class Shape:
    """What decides the speed of a llama-architecture model.

    Attributes:
        n_layer, width, n_head, n_head_kv, head_dim, n_ff, n_vocab: as the GGUF keys of these names have them.
    """

    n_layer: int = 4
    width: int = 1024
    n_head: int = 16
    n_head_kv: int = 8
    head_dim: int = 128
    n_ff: int = 2816
    n_vocab: int = 4096

    @property
    def name(self) -> str:
        """A file name's worth of description."""
        return f"l{self.n_layer}-w{self.width}-h{self.n_head}-kv{self.n_head_kv}-d{self.head_dim}"


def write(path: Path, shape: Shape, seed: int = 0, weights: str = "q8_0") -> None:
    """Writes a model without tokenizer (llama-bench feeds it random token numbers), weights in q8_0, q4_0 or f16."""
    kind = gguf.GGMLQuantizationType[weights.upper()]
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(f"random {shape.name}")
    writer.add_context_length(1 << 17)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])

    def matrix(name: str, n_out: int, n_in: int) -> None:
        values = random.standard_normal((n_out, n_in), dtype=np.float32) / np.float32(np.sqrt(n_in))
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.width, dtype=np.float32))

    q_dim, kv_dim = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    matrix("token_embd.weight", shape.n_vocab, shape.width)
    norm("output_norm.weight")
    matrix("output.weight", shape.n_vocab, shape.width)
    for i in range(shape.n_layer):
        norm(f"blk.{i}.attn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", q_dim, shape.width)
        matrix(f"blk.{i}.attn_k.weight", kv_dim, shape.width)
        matrix(f"blk.{i}.attn_v.weight", kv_dim, shape.width)
        matrix(f"blk.{i}.attn_output.weight", shape.width, q_dim)
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.ffn_gate.weight", shape.n_ff, shape.width)
        matrix(f"blk.{i}.ffn_up.weight", shape.n_ff, shape.width)
        matrix(f"blk.{i}.ffn_down.weight", shape.width, shape.n_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
