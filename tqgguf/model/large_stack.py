"""Texts with long words, which llama.cpp cannot tokenize on an ordinary stack.

The tokenizers of many models (those of gpt-oss, DeepSeek, Mistral Nemo) cut texts by regular expressions, for which
llama.cpp takes std::regex; that calls itself for every character of a match, with 321 bytes of stack each time (GCC
12). 26,000 spaces, dashes or letters in a row, as padding or a sequence of DNA has, overran the 8 MiB of a thread and
ended the process.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from ..errors import ArgumentError, OutOfMemoryError

T = TypeVar("T")

LONGEST: Final = 1 << 20
"""Bytes of a stretch that are taken; the stack for it is address space, of which what is used takes memory."""

_SAFE: Final = 2048
_STACK_PER_BYTE: Final = 640
_STACK: Final = 8 << 20
_STRETCH: Final = re.compile(rb"\S{%d,}|\s{%d,}" % (_SAFE, _SAFE))
_lock = threading.Lock()


def longest_stretch(text: bytes) -> int:
    """Bytes of the longest stretch without white space, or of white space alone; 0 if it needs no large stack."""
    return max((len(match[0]) for match in _STRETCH.finditer(text)), default=0)


def on_large_stack(call: Callable[[], T], stretch: int) -> T:
    """What `call` returns or raises, from a thread whose stack suffices for a stretch of so many bytes.

    Raises:
        ArgumentError: the stretch is longer than `LONGEST`.
        OutOfMemoryError: the system has no room for such a stack.
    """
    if stretch > LONGEST:
        raise ArgumentError(
            f"the text has a word, or white space, of {stretch:,} bytes, at most {LONGEST:,} are read: is it a text?"
        )
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="tqgguf-large-stack")
    with _lock:  # the size is one for all threads that are started
        before = threading.stack_size(_STACK + _STACK_PER_BYTE * stretch & ~4095)
        try:
            thread.start()
        except RuntimeError:
            raise OutOfMemoryError(f"no room for a stack that suffices for a word of {stretch:,} bytes") from None
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
