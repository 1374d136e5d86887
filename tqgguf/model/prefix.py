"""Whether a KV cache still holds what the next token attends to, after tokens at its end were taken back.

llama-cpp-python takes tokens back (a prompt that shares a beginning with the last one, drafts that were wrong) and
reads on without asking whether that worked. It does not where a state cannot be taken back (recurrent layers), nor
where the cache of a sliding window, of the size of the window (`swa_full=False`), has given its old cells away:
llama.cpp then attends to what is left.
"""

from __future__ import annotations

from typing import Any

from .._native import import_llama_cpp

llama_cpp: Any = import_llama_cpp()


def take_back(context: Any, n_tokens: int) -> bool:
    """Removes sequence 0 from position n_tokens on.

    Returns:
        Whether the cache can continue there. If not, it must be emptied and the tokens read again.
    """
    memory = llama_cpp.llama_get_memory(context)
    if not memory or n_tokens == 0:
        return True
    if not llama_cpp.llama_memory_seq_rm(memory, 0, n_tokens, -1):
        return False
    model = llama_cpp.llama_get_model(context)
    window = int(llama_cpp.llama_model_n_swa(model))
    # Of a hybrid's state nothing is taken back without saying so.
    if not window or llama_cpp.llama_model_is_hybrid(model):
        return True
    first = int(llama_cpp.llama_memory_seq_pos_min(memory, 0))  # of a window's cache; -1: nothing of it is left
    return 0 <= first <= max(0, n_tokens - window + 1)
