"""Grammars that constrain an answer, checked before llama.cpp reads them: a bad one would end the process.

llama.cpp gives no sampler for a grammar it cannot read, and llama_cpp puts that into its chain all the same; and its
parser calls itself for every bracket and every rule of a chain.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from ._native import import_llama_cpp
from .errors import ArgumentError

if TYPE_CHECKING:
    from .model import Llama

__all__ = ["check_grammar"]

llama_cpp: Any = import_llama_cpp()

MAX_BYTES: Final = 1 << 18
MAX_DEPTH: Final = 256
"""Brackets within brackets."""

_NO_STRUCTURE: Final = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)


def check_grammar(model: Llama, grammar: Any) -> None:
    """Raises ArgumentError unless llama.cpp can read a `LlamaGrammar`."""
    text, root = str(grammar._grammar), str(grammar._root)
    if len(text.encode()) > MAX_BYTES:
        raise ArgumentError(f"the grammar has {len(text.encode()):,} bytes, at most {MAX_BYTES:,} are read")
    depth = deepest = 0
    for bracket in re.findall(r"[()]", _NO_STRUCTURE.sub("", text)):
        depth += 1 if bracket == "(" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ArgumentError(f"the grammar has {deepest:,} brackets within each other, at most {MAX_DEPTH} are read")
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    sampler = llama_cpp.llama_sampler_init_grammar(vocabulary, text.encode(), root.encode())
    if not sampler:
        raise ArgumentError(
            f"llama.cpp cannot read the grammar: it must be GBNF, have a rule {root!r}, name no rule that is not "
            f"there, and have none that begins with itself"
        )
    llama_cpp.llama_sampler_free(sampler)
