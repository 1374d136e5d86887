"""Grammars that constrain an answer, checked before llama.cpp reads them: a bad one would end the process.

llama.cpp gives no sampler for a grammar it cannot read, and llama_cpp puts that into its chain all the same; and its
parser calls itself for every bracket and every rule of a chain. Where all tokens that a grammar allows are forbidden by
something else (`logit_bias`, `min_tokens`), llama.cpp takes one of the others, and ends the process over it. And
llama_cpp writes out what a JSON schema repeats, 2,000,000,000 characters if `minLength` says so; of a schema that it
cannot read it says nothing, and takes any JSON.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._native import import_llama_cpp
from ..errors import ArgumentError

if TYPE_CHECKING:
    from .llama import Llama

__all__ = ["GrammarSampler", "check_grammar", "check_schemas"]

llama_cpp: Any = import_llama_cpp()
_Stock: Any = llama_cpp._internals.LlamaSampler

MAX_BYTES: Final = 1 << 18
MAX_DEPTH: Final = 2000
"""Brackets within brackets; llama.cpp overruns a stack of 8 MiB between 10,000 and 30,000. A schema's `maxLength` and
`maxItems` become as many."""
MAX_REPEATS: Final = 10_000
"""Of a part of a JSON schema: more makes no grammar that is read."""

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
        raise ArgumentError(f"the grammar has {deepest:,} brackets within each other, at most {MAX_DEPTH:,} are read")
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
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


def _bounded(item: str, least: int, most: int | None, *args: Any, **kwargs: Any) -> str:
    """In the place of llama_cpp's function of the same arguments."""
    if max(least, most or 0) > MAX_REPEATS:
        raise ArgumentError(f"it repeats a part {max(least, most or 0):,} times, at most {MAX_REPEATS:,} are read")
    text: str = _repetition(item, least, most, *args, **kwargs)
    return text


_repetition: Any = llama_cpp.llama_grammar._build_repetition
llama_cpp.llama_grammar._build_repetition = _bounded


class GrammarSampler(_Stock):  # type: ignore[misc]
    """A chain of samplers with a grammar in it, which looks at the token chosen before the grammar is told of it."""

    def sample(self, ctx: Any, idx: int = -1) -> int:
        """A token for the logits of the token idx of the last batch.

        Raises:
            ArgumentError: no token is both allowed by the grammar and possible otherwise.
        """
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(ctx.ctx)))
        candidates = np.zeros(n_vocab, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        candidates["id"] = np.arange(n_vocab)
        candidates["logit"] = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx.ctx, idx), (n_vocab,))
        data = candidates.ctypes.data_as(llama_cpp.llama_token_data_p)
        array = llama_cpp.llama_token_data_array(data=data, size=n_vocab, selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(self.sampler, ctypes.byref(array))
        chosen = array.data[array.selected]
        if not chosen.logit > -np.inf:  # a grammar forbids by -inf; NaN comes of that at an infinite temperature
            raise ArgumentError(
                "the grammar allows no token here that logit_bias, min_tokens or another option does not forbid: "
                "leave these out, or let the grammar go on"
            )
        token = int(chosen.id)
        self.accept(token)
        return token
