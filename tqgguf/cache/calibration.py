"""Calibrations: a mean and a gain for every channel of a model's keys, and the files they are kept in.

A key k is stored as D (k - m), and a query q is read as q / D (`model.calibrate` measures them and says why). That
changes no score, but moves the encoder's precision to the channels that queries look at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, CalibrationError, ModelFileError, ModelNotFoundError, PolicyError
from ..gguf.header import read_header
from ..gguf.identity import cache_folder
from ..gguf.info import ModelInfo
from .policy import CachePolicy, read_vectors, vectors_written

CALIBRATION_VERSION: Final = 1
_ARCHITECTURE: Final = "tqgguf-calibration"


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is known of a model's keys.

    Attributes:
        means: by layer, (n_head_kv, head_dim_k) float32, subtracted from every key after RoPE. Empty where softmax
            would notice.
        gains: by layer, (n_head_kv, head_dim_k) float32, positive: what keys less their mean are multiplied by.
        model: `model_identity` of the file it was measured on.
        n_layer: layers of that model.
        n_tokens: tokens of the text it was measured on.
    """

    means: Mapping[int, npt.NDArray[np.float32]]
    gains: Mapping[int, npt.NDArray[np.float32]]
    model: str
    n_layer: int
    n_tokens: int

    def applied(self, policy: CachePolicy, info: ModelInfo) -> CachePolicy:
        """The policy with this calibration in each layer whose keys are quantized.

        Args:
            policy: types of the KV cache.
            info: the model.

        Raises:
            CalibrationError: the policy brings means or gains of its own; or the calibration is of another shape than
                the model's keys.
        """
        if policy.calibrated:
            raise CalibrationError("this cache policy has means or gains of its own: leave the calibration out")
        layers = [layer.index for layer in info.layers if policy.types(layer.index)[0].quantized]
        found = replace(
            policy,
            k_means={layer: self.means[layer] for layer in layers if layer in self.means},
            k_gains={layer: self.gains[layer] for layer in layers if layer in self.gains},
        )
        if obstacle := found.obstacle(info):
            raise CalibrationError(f"this calibration does not suit {info.path.name}: {obstacle}")
        return found

    def write(self, path: str | Path) -> None:
        """Writes a calibration file, whole or not at all.

        Args:
            path: the file.

        Raises:
            OSError: it cannot be written.
        """
        with vectors_written(path, "calibration", _ARCHITECTURE, self.means, self.gains) as writer:
            writer.add_uint32(f"{_ARCHITECTURE}.version", CALIBRATION_VERSION)
            writer.add_string(f"{_ARCHITECTURE}.model", self.model)
            writer.add_uint32(f"{_ARCHITECTURE}.n_layer", self.n_layer)
            writer.add_uint32(f"{_ARCHITECTURE}.n_tokens", self.n_tokens)


def read_calibration(path: str | Path) -> Calibration:
    """Reads a calibration file.

    Args:
        path: a file that `Calibration.write` or `tqgguf calibrate` wrote.

    Raises:
        CalibrationError: no such file; no calibration file, of another version, or damaged; values that are not finite,
            or gains that are not from 1/1024 to 1024.
    """
    file = Path(path)
    try:
        header = read_header(file)
        if header.metadata.get("general.architecture") != _ARCHITECTURE:
            raise CalibrationError(f"{file} is a GGUF file but no calibration")
        keys = ("version", "n_layer", "n_tokens", "model")
        version, n_layer, n_tokens, model = (header.metadata.get(f"{_ARCHITECTURE}.{key}") for key in keys)
        if version != CALIBRATION_VERSION:
            raise CalibrationError(
                f"{file} has calibration version {version!r}, this tqgguf reads {CALIBRATION_VERSION}: calibrate again"
            )
        if not (isinstance(n_layer, int) and isinstance(n_tokens, int) and isinstance(model, str)):
            raise CalibrationError(f"{file} does not say which model it was measured on")
        means, gains = read_vectors(file, header, n_layer)
        if not means and not gains:
            raise CalibrationError(f"{file} calibrates no layer: make one with tqgguf calibrate")
        CachePolicy(("f16",) * n_layer, ("f16",) * n_layer, means, k_gains=gains)  # which checks the values
    except ModelNotFoundError:
        what = "is no regular file" if file.exists() else "does not exist"
        raise CalibrationError(f"calibration {file} {what}: give auto, off, or a file of tqgguf calibrate") from None
    except (PolicyError, ModelFileError, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"{file} is a damaged calibration: {error}") from None
    return Calibration(means, gains, model, n_layer, n_tokens)


def default_choice() -> str:
    """What is done where no calibration is chosen: the environment variable TQGGUF_CALIBRATION, or else "auto".

    Raises:
        ArgumentError: the variable is neither "auto" nor "off".
    """
    value = os.environ.get("TQGGUF_CALIBRATION") or "auto"
    if value not in ("auto", "off"):
        raise ArgumentError(f'environment variable TQGGUF_CALIBRATION is {value!r}, must be "auto" or "off"')
    return value


def calibration_folder() -> Path:
    """Where calibrations are kept: in the user's cache folder."""
    return cache_folder() / "calibrations"


def stored_calibration(model: str) -> Path:
    """Where the calibration of a model is kept, by its `model_identity`."""
    return calibration_folder() / f"{model}.gguf"
