"""What `Llama` is given, checked before anything is loaded, and what of it changes what a cache holds."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .._machine import machine_memory, processors
from .._native import import_llama_cpp
from .._util import ranges
from ..cache.calibration import Calibration
from ..cache.policy import (
    CachePolicy,
    PolicySpec,
    base_types,
    cache_words,
    needs_flash,
    needs_tqgguf,
    refuse_idle_tail,
    refuse_impossible,
    resolve,
)
from ..cache.tail import check_tail, warn_unread
from ..cache.tensors import CacheTensor
from ..config import parse_cache
from ..errors import ArgumentError, ModelNotFoundError, OutOfMemoryError
from ..gguf.identity import model_identity
from ..gguf.info import ModelInfo, read_model_info
from .calibrate import calibrated_policy
from .workers import check_split

_STOCK_OPTIONS: Final = frozenset(inspect.signature(import_llama_cpp().Llama.__init__).parameters) - {
    *("self", "model_path", "kwargs", "model_options")
}
_LIMITS: Final = {
    "n_ctx": (0, 2**31 - 1),
    "n_batch": (1, 2**31 - 1),
    "n_ubatch": (1, 2**31 - 1),
    "n_threads": (1, 512),
    "n_threads_batch": (1, 512),
    "seed": (0, 2**32 - 1),
    "last_n_tokens_size": (-1, 2**31 - 1),
}
"""Beyond these llama.cpp ends the process, or takes the number modulo 2^32."""

_MAY_BE_NONE: Final = ("n_threads", "n_threads_batch", "seed")


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        info: what the model's file says.
        policy: types of the KV cache.
        tail: newest tokens kept in f16, as given to `Llama`.
        options: for the stock constructor.
        workers: as given to `Llama`; empty: the model lies here.
        types_on_workers: whether the workers must know the types of tqgguf, or a tail.
    """

    info: ModelInfo
    policy: CachePolicy
    tail: int | None
    options: dict[str, Any]
    workers: tuple[str, ...]
    types_on_workers: bool

    @property
    def vocab_only(self) -> bool:
        """Whether no weights are loaded, so that there is no cache."""
        return bool(self.options.get("vocab_only"))

    @property
    def tail_used(self) -> int:
        """Newest tokens that are kept in f16."""
        return self.policy.kept(self.tail)


def checked_request(
    model_path: str | Path,
    cache: PolicySpec,
    tail: Any,
    flash_attn: bool | None,
    rpc: Sequence[str] | None,
    calibration: Calibration | str | Path | None,
    options: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> Request:
    """Checks the arguments of `Llama`, which describes them and what is raised; calibrates, if that is asked for.

    `progress` is called as progress(layers done, layers in all) meanwhile.
    """
    kwargs = dict(options)
    for name in ("type_k", "type_v"):
        if kwargs.pop(name, None) is not None:
            raise ArgumentError(f"{name} is set by cache: give cache=(K type, V type) by name instead")
    if not isinstance(model_path, (str, os.PathLike)):
        raise ArgumentError(f"model_path must be a path, not {model_path!r}")
    _check_options(kwargs)
    n_tail = check_tail(tail)
    if isinstance(cache, (str, tuple, list)) and not str(cache).endswith(".gguf"):
        parse_cache(cache)  # a wrong name is told before the file is opened
    info = read_model_info(model_path)
    policy = resolve(cache, info.n_layer)
    refuse_idle_tail(policy, n_tail)
    with_flash = needs_flash(policy, n_tail)
    if flash_attn is False and with_flash:
        raise ArgumentError(
            f"flash_attn=False cannot be combined with {cache_words(policy)}: "
            f"a quantized V, every type of tqgguf, and every tail needs flash attention"
        )
    if not kwargs.get("vocab_only"):
        refuse_impossible(info, policy)
        if rpc is None:
            _refuse_too_long(info, policy, kwargs)
        threads = kwargs.get("n_threads_batch")
        policy = calibrated_policy(info, policy, calibration, measure=rpc is None, n_threads=threads, progress=progress)
    warn_unread(policy.kept(n_tail), info.architecture)
    workers: tuple[str, ...] = ()
    if rpc is not None:
        check_split(rpc, info, kwargs)
        workers = () if kwargs.get("vocab_only") else tuple(rpc)
    if kwargs.get("n_threads") is None:
        kwargs["n_threads"] = min(max(processors() // 2, 1), 512)
    if kwargs.get("n_threads_batch") is None:
        kwargs["n_threads_batch"] = min(processors(), 512)
    k, v = base_types(policy, info)
    kwargs |= {"type_k": k.number, "type_v": v.number, "flash_attn": with_flash if flash_attn is None else flash_attn}
    here = kwargs.get("offload_kqv") is False  # then no worker sees a cache
    return Request(info, policy, n_tail, kwargs, workers, needs_tqgguf(policy, n_tail) and not here)


def _check_options(options: dict[str, Any]) -> None:
    """Raises ArgumentError for options that the stock class would swallow and numbers that llama.cpp cannot take."""
    for name, value in options.items():
        if name not in _STOCK_OPTIONS:
            near = difflib.get_close_matches(name, [*sorted(_STOCK_OPTIONS), "cache"], n=1)
            raise ArgumentError(f"Llama has no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if name in _LIMITS and not (value is None and name in _MAY_BE_NONE):
            low, high = _LIMITS[name]
            if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= value <= high:
                raise ArgumentError(f"{name} is {value!r}, must be an integer between {low} and {high}")
    overrides = options.get("kv_overrides")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ArgumentError(f"kv_overrides is {overrides!r:.80}, must be a dict of keys of the model's header")
    for key, value in (overrides or {}).items():
        kinds = isinstance(key, str) and isinstance(value, (bool, int, float, str))
        if not kinds or "\0" in key or not 0 < len(key.encode(errors="replace")) < 128:
            raise ArgumentError(
                f"kv_overrides has {key!r:.80}: {value!r:.80}, must be a key of the model's header, of at most 127 "
                f"bytes, and a bool, an int, a float or a str"
            )
    lora = options.get("lora_path")
    if lora is not None and not Path(lora).is_file():
        raise ModelNotFoundError(f"lora_path {lora} does not exist or is no file")


def _refuse_too_long(info: ModelInfo, policy: CachePolicy, options: Mapping[str, Any]) -> None:
    """Raises OutOfMemoryError for a context whose cache exceeds all memory, which llama.cpp would try to fill."""
    n_ctx = options.get("n_ctx", 512) or info.n_ctx_train
    have = machine_memory()
    if have is None or (options.get("n_gpu_layers") and options.get("offload_kqv", True)):
        return
    need = policy.bytes(info, n_ctx, 0, swa_full=options.get("swa_full") is not False)
    if need > have:
        raise OutOfMemoryError(
            f"the KV cache of {n_ctx:,} tokens of {info.path.name} takes {need:,} bytes, this process may use "
            f"{have:,}: take a shorter context (`tqgguf fit` says how long it can be)"
        )


def cache_settings(model: Any, tensors: Sequence[CacheTensor]) -> dict[str, Any]:
    """What else than its types decides what a loaded model's cache holds, for the sessions and states it saves.

    docs/reliability.md says what is compared.

    Args:
        model: a loaded `Llama`.
        tensors: of its cache.
    """
    params = model.context_params
    names = ["rope_scaling_type", "rope_freq_base", "rope_freq_scale", "flash_attn_type", "yarn_orig_ctx"]
    names += ["yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"]
    settings: dict[str, Any] = {name: getattr(params, name) for name in names}
    # Models with LongRoPE turn keys otherwise in a context longer than the one they were first trained for.
    first = model.metadata.get(f"{model.model_info.architecture}.rope.scaling.original_context_length")
    settings["long_rope"] = first is not None and model.n_ctx() > int(first)
    settings["kv_overrides"] = {key: str(value) for key, value in (model.kv_overrides or {}).items()}
    settings["model_identity"] = model_identity(model.model_info.path)
    rotated: dict[str, list[int]] = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.layer):
        if tensor.rotated:
            rotated.setdefault(tensor.side, []).append(tensor.layer)
    settings["rotated"] = {side: ranges(sorted(set(layers))) for side, layers in sorted(rotated.items())}
    if model.lora_path:
        lora = Path(model.lora_path)
        settings["lora"] = [lora.name, lora.stat().st_size, model.lora_scale]
        settings["lora_identity"] = model_identity(lora)
    return settings
