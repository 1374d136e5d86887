"""Answers one prompt with two caches, side by side: python examples/compare_caches.py MODEL PROMPT [CACHE CACHE].

Decoding is greedy, so all differences come from the caches. Words that only one answer has are marked with *.
"""

import difflib
import sys
import textwrap
import time
from itertools import zip_longest

import tqgguf

WIDTH = 46


def answer(path: str, prompt: str, cache: str) -> tuple[str, str]:
    """The answer of the model with a cache, and a line of figures."""
    model = tqgguf.Llama(path, cache=cache, n_ctx=0, verbose=False)  # 0: the trained context
    start = time.perf_counter()
    reply = model.create_chat_completion([{"role": "user", "content": prompt}], temperature=0, max_tokens=200)
    seconds = time.perf_counter() - start
    info = model.cache_info()
    model.close()
    figures = f"{info.bytes_per_token * info.cells_used:,} bytes of {info.cells_used} tokens, {seconds:.2f} s"
    return reply["choices"][0]["message"]["content"].strip(), figures


def marked(words: list[str], others: list[str]) -> str:
    """The words as a text; those that the others lack are marked."""
    kept: set[int] = set()
    for block in difflib.SequenceMatcher(None, words, others, autojunk=False).get_matching_blocks():
        kept.update(range(block.a, block.a + block.size))
    return " ".join(word if i in kept else f"*{word}*" for i, word in enumerate(words))


def main(path: str, prompt: str, first: str = "f16", second: str = "pqo3") -> None:
    found = [answer(path, prompt, cache) for cache in (first, second)]
    words = [text.split() for text, _ in found]
    left, right = (textwrap.wrap(marked(*pair), WIDTH) for pair in (words, words[::-1]))
    print(f"{first:{WIDTH}}  {second}")
    print(f"{'-' * WIDTH}  {'-' * WIDTH}")
    for a, b in zip_longest(left, right, fillvalue=""):
        print(f"{a:{WIDTH}}  {b}")
    print()
    for cache, (_, figures) in zip((first, second), found, strict=True):
        print(f"{cache}: {figures}")
    print("the same words" if words[0] == words[1] else "the answers differ")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
