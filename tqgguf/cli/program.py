"""`tqgguf llama-server` and its like: llama.cpp's programs, with files of tqgguf that belong to their model."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence

from ..errors import ArgumentError


def run_program(name: str, words: Sequence[str]) -> int:
    """Becomes a program of llama.cpp's.

    Args:
        name: one of `_native.programs.PROGRAMS`.
        words: its arguments. A calibration is compared with the whole model, and `--cache-calibration auto` becomes
            the file that is kept for this model, which is measured if there is none yet.

    Raises:
        LibraryError: the program is missing.
        ArgumentError: "auto" without a model.
        CalibrationError: a calibration of another model, or damaged.
    """
    from .._native.programs import program

    path = program(name)
    command = [name, *_with_calibration(list(words))]
    sys.stdout.flush()
    os.execv(path, command)


def _with_calibration(words: list[str]) -> list[str]:
    """The arguments, with the file of a calibration in the place of "auto"."""
    if not (choice := _value(words, "--cache-calibration")) or choice == "off":
        return words
    from ..cache.calibration import stored_calibration
    from ..gguf.identity import model_identity
    from ..gguf.info import read_model_info
    from ..model.calibrate import chosen_calibration

    if not (model := _value(words, "-m", "--model")):
        raise ArgumentError("--cache-calibration needs the model as a file: -m FILE")
    chosen_calibration(read_model_info(model), choice)
    if choice == "auto":
        kept = stored_calibration(model_identity(model))
        if not kept.exists():
            raise ArgumentError(f"{kept} could not be written: make a file with `tqgguf calibrate {model} -o FILE`")
        words[words.index("--cache-calibration") + 1] = str(kept)
    return words


def _value(words: Sequence[str], *names: str) -> str | None:
    """What follows the last of these options."""
    found = [value for word, value in itertools.pairwise(words) if word in names]
    return found[-1] if found else None
