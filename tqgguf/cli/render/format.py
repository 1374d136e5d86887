"""Figures as text, and dataclasses as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import TqggufError

if TYPE_CHECKING:
    from ...cache.info import CacheInfo


def size(n_bytes: int) -> str:
    """Bytes for a reader: "917,504 B", "12.3 MiB"."""
    value = float(n_bytes)
    if value < 2**20:
        return f"{n_bytes:,} B"
    for unit in ("MiB", "GiB"):
        value /= 1024 if unit == "GiB" else 2**20
        if value < 1024:
            break
    return f"{value:,.1f} {unit}"


def printable(text: str) -> str:
    """A text without control characters, with which a model's name or answer could move the cursor."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text)


def say(text: str) -> None:
    """Writes a line to stderr, at once."""
    print(printable(text), file=sys.stderr, flush=True)


def in_words(error: BaseException) -> str:
    """The message of an error; of an OSError the file and the reason, without the number."""
    if isinstance(error, OSError) and not isinstance(error, TqggufError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def to_json(data: Any) -> str:
    """A dataclass, or a dict holding some, as indented JSON."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"{value.__class__.__name__} has no JSON form")

    return json.dumps(data, indent=2, default=plain)


def show(result: Any, as_json: bool, render: Callable[[Any], None]) -> None:
    """Prints a result as JSON, or for a reader."""
    if as_json:
        print(to_json(result))
    else:
        render(result)


def cache_line(info: CacheInfo) -> str:
    """One line about a KV cache: types, bytes, and bytes against f16 in 64ths (14/64 is 3.5 of 16 bits)."""
    types = info.type_k if info.type_k == info.type_v else f"{info.type_k} (K) and {info.type_v} (V)"
    types += ", keys calibrated" if any(layer.calibrated for layer in info.layers) else ""
    if not info.f16_bytes:
        return f"KV cache {types}: size not known for this architecture"
    blocks = info.bytes - info.tail_bytes
    parts = 64 * blocks / info.f16_bytes
    line = (
        f"KV cache {types}: {blocks:,} bytes for {info.n_ctx:,} tokens, f16 would take {info.f16_bytes:,} bytes: "
        f"{parts:.4g}/64, {parts / 4:.4g} of 16 bits per value"
    )
    if info.tail:
        line += f"; {info.tail_bytes:,} bytes more keep the newest {info.tail} in f16: {info.ratio:.1%} of f16 in all"
    return line


def sparkline(values: Sequence[float], encoding: str = "utf-8") -> str:
    """Values from 0 up as a row of bars, the largest full; ASCII characters if the encoding has no bars."""
    bars = "▁▂▃▄▅▆▇█"
    try:
        bars.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        bars = "_.-=+*#@"
    top = max(values, default=0.0)
    return "".join(bars[min(len(bars) - 1, int(len(bars) * value / top))] if top > 0 else bars[0] for value in values)
