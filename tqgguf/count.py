"""Numbers that a caller gives, checked before anything is done with them."""

from __future__ import annotations

from typing import Any

from .errors import ArgumentError

__all__ = ["check_count"]


def check_count(name: str, value: Any, least: int = 1, most: int = 2**31 - 1) -> int:
    """The value as an integer; a NumPy integer will do.

    Raises:
        ArgumentError: it is none, or not from least to most.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentError(f"{name} is {value!r}, must be an integer of at least {least}")
    if value < least:
        raise ArgumentError(f"{name} is {value}, must be at least {least}")
    if value > most:
        raise ArgumentError(f"{name} is {value}, must be at most {most}")
    return int(value.__index__())
