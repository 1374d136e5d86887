"""Grammars that would end the process: llama.cpp says that it cannot parse one by a null pointer, which llama_cpp hands
back to it, and parses nested brackets by calling itself until there is no stack left.
"""

from __future__ import annotations

import re
from typing import Any, Final

from ._native import import_llama_cpp
from .errors import ArgumentError

__all__ = ["MAX_DEPTH", "MAX_LENGTH", "check_grammar"]

MAX_LENGTH: Final = 2**18
"""Characters: as many rules that call each other take a stack of a few MB when they are followed."""
MAX_DEPTH: Final = 256
"""Brackets within each other. 100,000 end a process."""

_LITERAL: Final = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)


def check_grammar(vocab: Any, text: str, root: str) -> None:
    """Raises ArgumentError unless llama.cpp can take a grammar.

    Args:
        vocab: of the model, a `llama_vocab` pointer.
        text: in llama.cpp's GBNF.
        root: the rule to begin with.
    """
    if len(text) > MAX_LENGTH:
        raise ArgumentError(f"the grammar has {len(text):,} characters, at most {MAX_LENGTH:,} are taken")
    depth = 0
    for bracket in re.findall("[()]", _LITERAL.sub("", text)):
        depth += 1 if bracket == "(" else -1
        if depth > MAX_DEPTH:
            raise ArgumentError(f"the grammar has more than {MAX_DEPTH} brackets within each other")
    llama_cpp = import_llama_cpp()
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, text.encode(), root.encode())
    if not sampler:
        raise ArgumentError(f"the grammar cannot be parsed: it must be GBNF, with a rule {root}")
    llama_cpp.llama_sampler_free(sampler)
