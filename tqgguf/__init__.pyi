from . import reference
from .cache.calibration import Calibration, read_calibration
from .cache.info import CacheInfo, LayerCacheInfo
from .cache.policy import CachePolicy, read_policy
from .config import CACHE_TYPES, CacheConfig, CacheType, parse_cache
from .diagnostics.cache_contents import CacheContents, inspect_cache, inspect_session
from .diagnostics.compare import Comparison, Divergence, TypeQuality, compare
from .diagnostics.continuation import Continuation, ContinuationQuality, continuation
from .diagnostics.fit import Fit, fit
from .diagnostics.recall import Recall, RecallScore, recall
from .diagnostics.tune import Tuning, tune
from .errors import (
    ArgumentError,
    CacheClosedError,
    CacheTypeError,
    CalibrationError,
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
from .model.calibrate import calibrate
from .model.llama import Llama
from .pqo.cache import PqoCache
from .pqo.codec import dequantize, quantize
from .pqo.device_array import DeviceArray
from .session.file import Session, read_session

__version__: str

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
    "Calibration",
    "CalibrationError",
    "Comparison",
    "Continuation",
    "ContinuationQuality",
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
    "calibrate",
    "compare",
    "continuation",
    "dequantize",
    "fit",
    "inspect_cache",
    "inspect_session",
    "parse_cache",
    "quantize",
    "read_calibration",
    "read_model_info",
    "read_policy",
    "read_session",
    "recall",
    "reference",
    "tune",
]
