"""Contexts of llama.cpp: the one place where they are made, and their caches compared with what was asked for.

llama.cpp's log callback is one for the process, so contexts and models are made one at a time (`load_lock`). What it
says when it gives up is in its log alone (`load_error`); what it made is in the list of its cache's tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final, NamedTuple

from .._native import import_llama_cpp
from .._native.settings import aborts_to_stderr, policy_applied, rotation_allowed, tail_set, tensors_listed
from ..cache.policy import CachePolicy, base_types, needs_flash
from ..cache.tensors import CacheShape, CacheTensor, check_tensors
from ..errors import OutOfMemoryError, TqggufError
from ..gguf.info import ModelInfo
from .control import called_by_c
from .turns import threads_left

llama_cpp: Any = import_llama_cpp()

_bindings_log: Any = importlib.import_module("llama_cpp._logger")

LoadLog = list[tuple[int, str]]
"""llama.cpp's log as (level, text)."""

load_lock: Final = threading.Lock()

_LOG_WARN: Final = 3
_LOG_ERROR: Final = 4
_LOG_CONT: Final = 5


@contextlib.contextmanager
def captured_log(quiet: bool = False) -> Iterator[LoadLog]:
    """Collects llama.cpp's log and, unless quiet, still hands it on to whoever listened before."""
    lines: LoadLog = []
    before, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(user_data))
    # Of a quiet model the bindings print errors alone, and those are in what is raised.
    own, given = (ctypes.cast(each, ctypes.c_void_p).value for each in (_bindings_log.llama_log_callback, before))

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    @called_by_c
    def callback(level: int, text: bytes, data: Any) -> None:
        if level == _LOG_CONT and lines:
            lines[-1] = (lines[-1][0], lines[-1][1] + text.decode("utf-8", "replace"))
        else:
            lines.append((level, text.decode("utf-8", "replace")))
        silent = own == given and _bindings_log.logger.level >= logging.ERROR
        if before and not quiet and not silent:
            before(level, text, user_data)

    llama_cpp.llama_log_set(callback, None)
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(before, user_data)


def load_error(error: str, log: LoadLog, info: ModelInfo) -> TqggufError:
    """What llama.cpp said when it gave up, as an exception; an OutOfMemoryError if it was memory."""
    causes = [text.strip() for level, text in log if level in (_LOG_WARN, _LOG_ERROR) and text.strip()]
    errors = [text.strip() for level, text in log if level == _LOG_ERROR and text.strip()]
    said = "; ".join(errors[-3:]) or error
    message = f"llama.cpp could not load {info.path}: {said}"
    if re.search(r"failed to allocate|out of memory|bad_alloc|unable to allocate", " ".join(causes), re.IGNORECASE):
        return OutOfMemoryError(message)
    return TqggufError(message)


@contextlib.contextmanager
def opened_model(info: ModelInfo, params: Any) -> Iterator[Any]:
    """A `llama_model` of that file, without a context and without a log; it is freed when the `with` statement ends.

    Args:
        info: what the file says.
        params: `llama_model_params`.

    Raises:
        OutOfMemoryError: no memory for it.
        TqggufError: llama.cpp cannot load the model; the message carries its own errors.
    """
    with load_lock, captured_log(quiet=True) as log:
        model = llama_cpp.llama_model_load_from_file(os.fsencode(info.path), params)
    if not model:
        raise load_error("no model", log, info)
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


class Making(NamedTuple):
    """What `making` yields.

    Attributes:
        log: of llama.cpp, as far as it has come.
        tensors: of the caches that were made; complete when the `with` statement has ended.
    """

    log: LoadLog
    tensors: list[CacheTensor]


@contextlib.contextmanager
def making(
    policy: CachePolicy, tail: int | None, *, rotate: bool = True, quiet: bool = False, verbose: bool = True
) -> Iterator[Making]:
    """What must hold while the calling thread lets llama.cpp make a context.

    Args:
        policy: types and mean keys of its KV cache.
        tail: newest tokens kept in f16, as for `Llama`.
        rotate: whether llama.cpp may rotate a cache of stock quantized types, as it does by itself.
        planned: whether the model has no memory, so that the context has none; then llama.cpp's log is shown to nobody.
        verbose: whether llama.cpp's stderr stays on.
    """
    with (
        load_lock,
        captured_log(quiet) as log,
        aborts_to_stderr(verbose),
        policy_applied(policy),
        tail_set(tail),
        rotation_allowed(rotate),
        tensors_listed() as tensors,
    ):
        yield Making(log, tensors)


@contextlib.contextmanager
def make_context(
    model: Any,
    info: ModelInfo,
    policy: CachePolicy,
    params: Any,
    *,
    tail: int | None = 0,
    rotate: bool = True,
    planned: bool = False,
) -> Iterator[tuple[Any, Making]]:
    """Makes a context, whose KV cache is compared with the policy; it is freed when the `with` statement ends.

    Args:
        model: a `llama_model` pointer.
        info: what its file says.
        policy: types and mean keys of the KV cache; `type_k` and `type_v` of params are set by it.
        params: the other `llama_context_params`; flash attention is switched on where the policy needs it.
        tail: newest tokens kept in f16, as for `Llama`.
        rotate: whether llama.cpp may rotate a cache of stock quantized types, as it does by itself.
        quiet: whether llama.cpp's log goes to nobody else.

    Yields:
        A `llama_context` pointer, and what was said and made.

    Raises:
        CacheTypeError: llama.cpp made another cache.
        OutOfMemoryError: no memory for the cache.
        TqggufError: llama.cpp could not make the context; the message carries its own errors.
    """
    params.type_k, params.type_v = (kind.number for kind in base_types(policy, info))
    params.n_threads, params.n_threads_batch = map(threads_left, (params.n_threads, params.n_threads_batch))
    if needs_flash(policy, tail):
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    with making(policy, tail, rotate=rotate, quiet=planned) as made:
        context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise load_error("no context", made.log, info)
    try:
        check_tensors(made.tensors, info, policy, replace(cache_of(context, params, tail, rotate), planned=planned))
        yield context, made
    finally:
        llama_cpp.llama_free(context)


def cache_of(context: Any, params: Any, tail: int | None, rotate: bool = True) -> CacheShape:
    """The shape of the cache that a context of such parameters must have."""
    forbidden = re.match(r"\s*[+-]?0*[1-9]", os.environ.get("LLAMA_ATTN_ROT_DISABLE", ""))  # llama.cpp reads it, too
    return CacheShape(
        n_ctx=llama_cpp.llama_n_ctx(context),
        n_ubatch=llama_cpp.llama_n_ubatch(context),
        n_seq=llama_cpp.llama_n_seq_max(context),
        unified=params.kv_unified,
        swa_full=params.swa_full,
        tail=tail,
        rotate=rotate and not forbidden,
    )
