"""tqgguf: GGUF models in llama.cpp with a KV cache compressed to 3.5 or 4.5 bits per value.

Importing this package loads nothing heavy. It only makes sure that a later `import llama_cpp` gets the bindings and
libraries that belong to it, or says why that is impossible. Names below are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _native

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import reference
    from .cache.info import CacheInfo, LayerCacheInfo
    from .cache.policy import CachePolicy, read_policy
    from .config import CACHE_TYPES, CacheConfig, CacheType, parse_cache
    from .diagnostics.cache_contents import CacheContents, inspect_cache, inspect_session
    from .diagnostics.compare import Comparison, Divergence, TypeQuality, compare
    from .diagnostics.fit import Fit, fit
    from .diagnostics.recall import Recall, RecallScore, recall
    from .diagnostics.tune import Tuning, tune
    from .errors import (
        ArgumentError,
        CacheClosedError,
        CacheTypeError,
        LibraryError,
        ModelFileError,
        ModelNotFoundError,
        OutOfMemoryError,
        PolicyError,
        SessionError,
        StateFileError,
        StoppedError,
        TextError,
        TqggufError,
        UnsupportedError,
        WorkerError,
    )
    from .gguf.info import ModelInfo, read_model_info
    from .model.llama import Llama
    from .pqo.cache import PqoCache
    from .pqo.codec import dequantize, quantize
    from .pqo.device_array import DeviceArray
    from .session.file import Session, read_session

_HOME = {
    "Llama": "model.llama",
    "CacheInfo": "cache.info",
    "LayerCacheInfo": "cache.info",
    "PqoCache": "pqo.cache",
    "DeviceArray": "pqo.device_array",
    "CACHE_TYPES": "config",
    "CacheConfig": "config",
    "CacheType": "config",
    "parse_cache": "config",
    "quantize": "pqo.codec",
    "dequantize": "pqo.codec",
    "ModelInfo": "gguf.info",
    "CachePolicy": "cache.policy",
    "read_policy": "cache.policy",
    "read_model_info": "gguf.info",
    "Comparison": "diagnostics.compare",
    "Divergence": "diagnostics.compare",
    "TypeQuality": "diagnostics.compare",
    "compare": "diagnostics.compare",
    "Recall": "diagnostics.recall",
    "RecallScore": "diagnostics.recall",
    "recall": "diagnostics.recall",
    "CacheContents": "diagnostics.cache_contents",
    "inspect_cache": "diagnostics.cache_contents",
    "inspect_session": "diagnostics.cache_contents",
    "Fit": "diagnostics.fit",
    "fit": "diagnostics.fit",
    "Tuning": "diagnostics.tune",
    "tune": "diagnostics.tune",
    "ArgumentError": "errors",
    "CacheClosedError": "errors",
    "CacheTypeError": "errors",
    "LibraryError": "errors",
    "ModelFileError": "errors",
    "ModelNotFoundError": "errors",
    "OutOfMemoryError": "errors",
    "PolicyError": "errors",
    "Session": "session.file",
    "SessionError": "errors",
    "StateFileError": "errors",
    "StoppedError": "errors",
    "read_session": "session.file",
    "TextError": "errors",
    "TqggufError": "errors",
    "UnsupportedError": "errors",
    "WorkerError": "errors",
}

__all__ = [
    "CACHE_TYPES",
    "ArgumentError",
    "CacheClosedError",
    "CacheConfig",
    "CacheContents",
    "CacheInfo",
    "CachePolicy",
    "CacheType",
    "CacheTypeError",
    "Comparison",
    "DeviceArray",
    "Divergence",
    "Fit",
    "LayerCacheInfo",
    "LibraryError",
    "Llama",
    "ModelFileError",
    "ModelInfo",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "PolicyError",
    "PqoCache",
    "Recall",
    "RecallScore",
    "Session",
    "SessionError",
    "StateFileError",
    "StoppedError",
    "TextError",
    "TqggufError",
    "Tuning",
    "TypeQuality",
    "UnsupportedError",
    "WorkerError",
    "__version__",
    "compare",
    "dequantize",
    "fit",
    "inspect_cache",
    "inspect_session",
    "parse_cache",
    "quantize",
    "read_model_info",
    "read_policy",
    "read_session",
    "recall",
    "reference",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "reference":
        return importlib.import_module(".reference", __name__)
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_native.claim_llama_cpp()
