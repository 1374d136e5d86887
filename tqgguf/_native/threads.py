"""Threads that a context keeps where ggml has no OpenMP: ggml would start and end all of them for every token."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, Final

from .backends import cpu_function
from .bindings import import_llama_cpp
from .libggml import ffi, library_of, pointer

_POLL: Final = 1
"""How long a thread without work looks out for some before it sleeps: 2 ms on an Intel Xeon, more where a pause takes
longer; the next token of an answer comes in that time. With llama.cpp's own 50 it is 85 ms after each answer in which
processors are kept busy; with 0 each token has to wake the threads."""

_alive: Final[list[tuple[Any, dict[int, Any]]]] = []
"""Contexts that have threads, and their pools by the number of threads."""


@functools.cache
def _pool_functions() -> tuple[Any, Any]:
    """`ggml_threadpool_new` and `ggml_threadpool_free` of the CPU backend, which may be a plug-in."""
    new, free = (cpu_function(name) for name in (b"ggml_threadpool_new", b"ggml_threadpool_free"))
    return pointer("void * (*)(struct ggml_threadpool_params *)", new), pointer("void (*)(void *)", free)


@functools.cache
def without_openmp() -> bool:
    """Whether ggml was built without OpenMP, which keeps its threads itself."""
    return b"OPENMP = 1" not in import_llama_cpp().llama_print_system_info()


@contextlib.contextmanager
def kept_threads(context: Any, n_threads: int, n_threads_batch: int) -> Iterator[None]:
    """Gives a context threads of its own until the `with` statement ends; nothing must be computed with it after that.

    A child of `fork`, which has none of them, computes as if the context had never had any.

    Args:
        context: a `llama_context` pointer.
        n_threads: threads for one token, as the context was told.
        n_threads_batch: threads for more than one.
    """
    if n_threads == n_threads_batch == 1 or not without_openmp():
        yield
        return
    new, free = _pool_functions()
    # A pool for each number: threads that a graph does not use would look out for work all the while it is computed.
    pools = {
        n: new(ffi().new("struct ggml_threadpool_params *", {"n_threads": n, "poll": _POLL}))
        for n in {n_threads, n_threads_batch}
    }
    mine = (pointer("void *", context), pools)
    _alive.append(mine)
    llama = library_of("llama")
    llama.llama_attach_threadpool(mine[0], pools[n_threads], pools[n_threads_batch])
    try:
        yield
    finally:
        llama.llama_detach_threadpool(mine[0])
        _alive.remove(mine)
        for pool in pools.values():
            free(pool)


def _forked() -> None:
    for context, pools in _alive:
        library_of("llama").llama_detach_threadpool(context)
        pools.clear()  # to free a pool is to wait for its threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
