"""Grammars that constrain an answer, checked before llama.cpp reads them: a bad one would end the process.

llama.cpp gives no sampler for a grammar it cannot read, and llama_cpp puts that into its chain all the same; and its
parser calls itself for every bracket and every rule of a chain. Where all tokens that a grammar allows are forbidden by
something else (`logit_bias`, `min_tokens`), llama.cpp takes one of the others, and ends the process over it. And
llama_cpp writes out what a JSON schema repeats, 2,000,000,000 characters if `minLength` says so; of a schema that it
cannot read it says nothing, and takes any JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from .._native import import_llama_cpp
from ..errors import ArgumentError

llama_cpp: Any = import_llama_cpp()

MAX_BYTES: Final = 1 << 18
MAX_DEPTH: Final = 2000
"""Brackets within brackets; llama.cpp overruns a stack of 8 MiB between 10,000 and 30,000. A schema's `maxLength` and
`maxItems` become as many."""
MAX_REPEATS: Final = 10_000
"""Of a part of a JSON schema: more makes no grammar that is read."""

_NO_STRUCTURE: Final = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)


def check_grammar(vocabulary: Any, text: str, root: str) -> None:
    """Raises ArgumentError unless llama.cpp can read a grammar whose first rule is `root`.

    Args:
        vocabulary: a `llama_vocab` pointer.
        text: the grammar.
        root: name of a rule.
    """
    if len(text.encode()) > MAX_BYTES:
        raise ArgumentError(f"the grammar has {len(text.encode()):,} bytes, at most {MAX_BYTES:,} are read")
    depth = deepest = 0
    for bracket in re.findall(r"[()]", _NO_STRUCTURE.sub("", text)):
        depth += 1 if bracket == "(" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ArgumentError(f"the grammar has {deepest:,} brackets within each other, at most {MAX_DEPTH:,} are read")
    sampler = llama_cpp.llama_sampler_init_grammar(vocabulary, text.encode(), root.encode())
    if not sampler:
        raise ArgumentError(
            f"llama.cpp cannot read the grammar: it must be GBNF, have a rule {root!r}, name no rule that is not "
            f"there, and have none that begins with itself"
        )
    llama_cpp.llama_sampler_free(sampler)


def check_schemas(options: Mapping[str, Any]) -> None:
    """Raises ArgumentError unless llama_cpp can read the JSON schemas that its options of a chat completion name."""
    wanted = []
    form, choice = options.get("response_format"), options.get("tool_choice")
    if form and form.get("type") == "json_object" and "schema" in form:
        wanted.append(form["schema"])
    if isinstance(choice, Mapping):
        name = choice.get("function", {}).get("name")
        functions = [tool["function"] for tool in options.get("tools") or ()]
        wanted += [function["parameters"] for function in functions if function["name"] == name]
    for schema in wanted:
        try:
            llama_cpp.llama_grammar.json_schema_to_gbnf(json.dumps(schema))
        except Exception as error:  # of whatever kind: it was written for schemas that are right
            raise ArgumentError(
                f"no grammar can be made of the JSON schema: {type(error).__name__}: {error}"
            ) from error
