"""Random llama models of any attention shape, as GGUF: speed does not depend on what the weights say."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))

from models import write_model


@dataclass(frozen=True)
class Shape:
    """What decides the speed of a llama-architecture model; the names are those of `write_model`."""

    n_layer: int = 4
    n_embd: int = 1024
    n_head: int = 16
    n_head_kv: int = 8
    head_dim: int = 128
    n_ff: int = 2816
    n_vocab: int = 4096

    @property
    def name(self) -> str:
        """A description that can be part of a file name."""
        return f"l{self.n_layer}-w{self.n_embd}-h{self.n_head}-kv{self.n_head_kv}-d{self.head_dim}"


def write(path: Path, shape: Shape, weights: str = "q8_0") -> None:
    """Writes a model without a tokenizer (llama-bench feeds it random token numbers), with weights of this type."""
    write_model(path, **asdict(shape), n_ctx=1 << 17, weights=weights)
