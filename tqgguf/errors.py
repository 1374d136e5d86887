"""The exceptions of tqgguf. Every one is a `TqggufError`, and also the built-in exception a caller would expect."""

from __future__ import annotations


class TqggufError(Exception):
    """Base of all errors that tqgguf raises on purpose."""


class ArgumentError(TqggufError, ValueError):
    """An argument is out of its range; the message says what was given and what is allowed."""


class OutOfMemoryError(TqggufError, MemoryError):
    """The native library could not allocate memory; the object it was called on is unchanged."""


class UnsupportedError(TqggufError, RuntimeError):
    """Right in itself, but not on this machine or in this build."""


class ComputationError(TqggufError, RuntimeError):
    """llama.cpp could not compute what it was asked for, or this process cannot; the message says why."""


class LibraryError(TqggufError, ImportError):
    """A native library is missing, of another version, or not the one that belongs to this package."""


class CacheTypeError(TqggufError, ValueError):
    """A KV cache type cannot be used with a model, or llama.cpp did not use the one it was given."""


class PolicyError(TqggufError, ValueError):
    """A cache policy is not well formed, is damaged, or cannot be applied to a model."""


class CalibrationError(TqggufError, ValueError):
    """A calibration is not well formed, is damaged, or belongs to another model."""


class StateFileError(TqggufError, ValueError):
    """A saved state of llama.cpp is damaged, of another version, or does not belong to the model."""


class SessionError(TqggufError, ValueError):
    """A session file is damaged or no session, or belongs to another model, cache or version."""


class StoppedError(TqggufError, RuntimeError):
    """A computation was ended by `Llama.stop`."""


class CacheClosedError(TqggufError, ValueError):
    """A `PqoCache` or a `Llama` was used after `close()`."""


class ModelFileError(TqggufError, ValueError):
    """A model file is not GGUF, is truncated, or lacks what its architecture requires."""


class ModelNotFoundError(ModelFileError, FileNotFoundError):
    """A model file does not exist or is no regular file."""


class WorkerError(TqggufError, ConnectionError):
    """A worker cannot be reached or used, or the connection to it was lost."""


class TextError(TqggufError, ValueError):
    """A text to measure on is missing, empty, not UTF-8, or too short for the context."""
