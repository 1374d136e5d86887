"""The texts that caches are measured on, and their tokens in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._native import import_llama_cpp
from ..demo import model as demo
from ..errors import ArgumentError, TextError
from ..gguf.info import ModelInfo
from ..model.llama import Llama

llama_cpp: Any = import_llama_cpp()

MAX_OWN_TOKENS: Final = 2**20
"""Of the demo model's own text, which takes a second to make."""

DEFAULT_CHUNKS: Final = 8
"""Chunks of the demo model's own text. Any other text is read as a whole."""


def read_text(path: str | Path) -> str:
    """A file's text as llama.cpp's tools read it: without one newline at the end, otherwise unchanged.

    Raises:
        TextError: the file does not exist, cannot be read, or is not UTF-8 (the message says at which byte).
    """
    try:
        return Path(path).read_bytes().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error


def own_text(info: ModelInfo, n_ctx: int, n_chunks: int) -> str:
    """The demo model's text: a conversation of n_chunks * n_ctx tokens or more; questions reach back n_ctx/2 tokens.

    Raises:
        ArgumentError: it is another model, or the text would have more than MAX_OWN_TOKENS.
    """
    if info.name != demo.MODEL_NAME:
        raise ArgumentError(
            f"{info.path.name} needs a text to be measured on (-f FILE): only the demo model has its own"
        )
    if n_chunks * n_ctx > MAX_OWN_TOKENS:
        raise ArgumentError(
            f"the demo model's own text has at most {MAX_OWN_TOKENS:,} tokens, not {n_chunks:,} chunks of {n_ctx:,}: "
            f"give a shorter context, fewer chunks, or a text"
        )
    n_turns = n_chunks * n_ctx // demo.CHAT_TURN_TOKENS + 1
    reach = n_ctx // demo.CHAT_TURN_TOKENS  # two facts a turn, so half of the context
    return demo.chat_text(0, n_turns, reach=min(reach, len(demo.NAMES) * len(demo.KINDS)))


def chosen_text(info: ModelInfo, text: Any, n_ctx: int, n_chunks: int | None) -> str:
    """The text to read, which has as many bytes as n_ctx tokens need: every token but BOS has at least one.

    Args:
        info: the model.
        text: what the user gave; None for the demo model's own text.
        n_ctx: tokens in a chunk.
        n_chunks: chunks of the demo model's own text.

    Raises:
        ArgumentError: the text is not a str; or as `own_text`.
        TextError: the text is empty or too short.
    """
    if text is None:
        return own_text(info, n_ctx, n_chunks or DEFAULT_CHUNKS)
    if not isinstance(text, str):
        raise ArgumentError(f"text is of type {type(text).__name__}, must be a str")
    if not text:
        raise TextError("the text is empty")
    n_bytes = len(text.encode())
    if n_bytes + 8 < n_ctx:
        raise TextError(
            f"the text has {n_bytes:,} bytes, but a context of {n_ctx:,} needs as many tokens: "
            f"give a longer text or a shorter context"
        )
    return text


def text_chunks(model: Llama, text: str, n_ctx: int, n_chunks: int | None, special: bool) -> npt.NDArray[np.int32]:
    """Tokens (n_chunks, n_ctx) of a text, with control tokens parsed if `special`; each chunk begins with BOS if the
    model wants one.

    Raises:
        TextError: the text has fewer than n_ctx tokens.
    """
    tokens = np.array(model.tokenize(text.encode(), add_bos=True, special=special), np.int32)
    there = len(tokens) // n_ctx
    if not there:
        raise TextError(
            f"the text has {len(tokens):,} tokens, but a context of {n_ctx:,} needs as many: "
            f"give a longer text or a shorter context"
        )
    chunks = tokens[: min(there, n_chunks or there) * n_ctx].reshape(-1, n_ctx)
    if llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(model.model)):
        chunks[:, 0] = model.token_bos()
    return chunks
