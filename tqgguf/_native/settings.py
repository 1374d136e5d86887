"""What llama.cpp is told beside its parameters while a thread makes a context, and the list of the tensors it made."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import numpy as np

from ..cache.policy import CachePolicy
from ..cache.tail import tails
from ..cache.tensors import CacheTensor
from .libggml import base, ffi


@contextlib.contextmanager
def policy_applied(policy: CachePolicy) -> Iterator[None]:
    """While it lasts, contexts that this thread makes follow the policy (native/ggml/tq_ggml_policy.h)."""
    if policy.uniform:
        yield
        return
    kept = []  # until the policy is cleared
    layers = ffi().new("struct tq_ggml_layer_policy[]", policy.n_layer)
    for i, layer in enumerate(layers):
        layer.type_k, layer.type_v = (kind.number for kind in policy.types(i))
        for name, vectors in (("mean", policy.k_means), ("gain", policy.k_gains)):
            if i in vectors:
                values = np.ascontiguousarray(vectors[i], dtype=np.float32)
                kept.append(ffi().from_buffer("float[]", values))
                setattr(layer, f"k_{name}", kept[-1])
                setattr(layer, f"n_{name}", values.size)
    base().tq_ggml_policy_set(layers, policy.n_layer)
    try:
        yield
    finally:
        base().tq_ggml_policy_set(ffi().NULL, 0)


@contextlib.contextmanager
def tail_set(n: int | None) -> Iterator[None]:
    """While it lasts, contexts that this thread makes have a tail of n tokens (native/ggml/tq_ggml_tail.h)."""
    base().tq_ggml_tail_set(*tails(n))
    try:
        yield
    finally:
        base().tq_ggml_tail_set(0, 0)


@contextlib.contextmanager
def tail_in_states(held: bool = True) -> Iterator[None]:
    """While it lasts, states that this thread reads and writes hold the tail (native/ggml/tq_ggml_tail_state.h)."""
    base().tq_ggml_tail_in_states(held)
    try:
        yield
    finally:
        base().tq_ggml_tail_in_states(False)


@contextlib.contextmanager
def rotation_allowed(allowed: bool) -> Iterator[None]:
    """While it lasts, contexts that this thread makes may rotate stock quantized types, or may not."""
    base().tq_ggml_policy_set_rotation(allowed)
    try:
        yield
    finally:
        base().tq_ggml_policy_set_rotation(True)


@contextlib.contextmanager
def tensors_listed() -> Iterator[list[CacheTensor]]:
    """Yields a list that is empty at first: at the end it holds the cache tensors of all contexts this thread made."""
    made: list[CacheTensor] = []
    base().tq_ggml_cache_list_begin()
    try:
        yield made
        notes = ffi().new("struct tq_ggml_cache_tensor[]", base().tq_ggml_cache_list(ffi().NULL, 0))
        base().tq_ggml_cache_list(notes, len(notes))
        for note in notes:
            fields = {name: getattr(note, name) for name in CacheTensor.__dataclass_fields__}
            fields["device"] = ffi().string(note.device).decode()
            fields |= {"side": {0: "K", 1: "V"}.get(note.side, f"side {note.side}"), "rotated": bool(note.rotated)}
            made.append(CacheTensor(**fields))
    finally:
        base().tq_ggml_cache_list_end()


@contextlib.contextmanager
def aborts_to_stderr(verbose: bool) -> Iterator[None]:
    """While it lasts, what ggml says when it ends the process comes to stderr, which a quiet load turns off.

    llama.cpp ends the process where it meets what it had ruled out, as an odd model can make it. Any of its threads may
    call the function of Python that says so: the one that waits for them in C has released the interpreter's lock.

    Args:
        verbose: whether stderr stays on. Then ggml's own way is left alone, which adds a backtrace.
    """
    if verbose or sys.stderr is None:  # closed when Python began: another file may have its number
        yield
        return
    with open(os.dup(2), "wb", buffering=0) as stderr:

        @ffi().callback("ggml_abort_callback_t")  # type: ignore[untyped-decorator]
        def tell(message: object) -> None:
            stderr.write(b"\ntqgguf: error: llama.cpp ended this process: " + ffi().string(message) + b"\n")

        before = base().ggml_set_abort_callback(tell)
        try:
            yield
        finally:
            base().ggml_set_abort_callback(before)
