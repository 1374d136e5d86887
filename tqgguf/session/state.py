"""Reads the KV cache out of a state of llama.cpp: a session file, a sequence file, or the state of a live context.

A state is what `llama_state_save_file`, `llama_state_seq_save_file` and `llama_state_get_data` write: cells and rows of
the cache, one cache after another (full attention, then windows), each with its streams. It says how long its rows are
but not how many heads they hold, so it is read for a model, and every type, count and length in it is checked against
that model and against the bytes that are left before anything is done with it.
Source of the format: `state_write` of llama.cpp's src/llama-kv-cache.cpp and its neighbours.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..config import CACHE_TYPES, CacheType
from ..errors import StateFileError, UnsupportedError
from ..gguf.info import KVLayer, ModelInfo

U8 = npt.NDArray[np.uint8]

_SESSION: Final = 0x6767736E
_FILES: Final = {_SESSION: (10, "session"), 0x67677371: (3, "sequence")}
"""Versions by LLAMA_SESSION_MAGIC and LLAMA_STATE_SEQ_MAGIC."""
_SEQUENCE_DATA: Final = 0xAF143CD8
"""`io_magic` of src/llama-context.cpp."""

_MAX_SEQUENCES: Final = 256
_EXT_BYTES: Final = 12
"""`llama_kv_cell_ext`: a place in a picture and a token, in caches of some models."""

_TYPES: Final = {kind.number: kind for kind in CACHE_TYPES.values()}


@dataclass(frozen=True)
class StoredRows:
    """K or V of one layer as it lies in the cache.

    Attributes:
        layer: what the model's file says about the layer.
        side: "K" or "V".
        type: the storage type.
        rows: (n_cells, bytes of a row) uint8, all heads of a cell side by side.
    """

    layer: KVLayer
    side: str
    type: CacheType
    rows: U8

    @property
    def head_dim(self) -> int:
        """Values of a head."""
        return self.layer.head_dim_k if self.side == "K" else self.layer.head_dim_v


@dataclass(frozen=True)
class CacheState:
    """The cells of a KV cache that hold tokens.

    Attributes:
        n_cells: cells of the cache that has the most of them, over all streams.
        n_stream: streams: 1, or one for each sequence.
        tensors: K and V of each layer, K of all layers of a cache first.
        positions: of the cells of every cache, one cache after another.
    """

    n_cells: int
    n_stream: int
    tensors: tuple[StoredRows, ...]
    positions: npt.NDArray[np.int32]


def read_state(path: str | Path, info: ModelInfo) -> CacheState:
    """Reads a session or sequence file that llama.cpp wrote with a model.

    Raises:
        StateFileError: there is no such file, it is no state file, of another version, damaged, or of another model.
        UnsupportedError: see `parse_state`.
    """
    file = Path(path)
    try:
        if file.exists() and not file.is_file():
            raise StateFileError(f"cannot read the state {file}: it is no regular file")
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _file(file, memoryview(data), info)
    except (OSError, ValueError) as error:
        if isinstance(error, StateFileError):
            raise
        reason = error.strerror if isinstance(error, OSError) else "it is empty"
        raise StateFileError(f"cannot read the state {file}: {reason}") from None


def _file(file: Path, data: memoryview, info: ModelInfo) -> CacheState:
    with data:
        reader = _Reader(data, str(file))
        magic, version = reader.number("I"), reader.number("I")
        if magic not in _FILES:
            raise StateFileError(
                f"{file} is neither a session of tqgguf nor a state of llama.cpp (which begins with ggsn or ggsq)"
            )
        expected, kind = _FILES[magic]
        if version != expected:
            raise StateFileError(
                f"{file} is a {kind} file of version {version}, this tqgguf reads version {expected}: save it anew"
            )
        reader.take(4 * reader.number("I"), "tokens")
        return _parse(reader, info, magic == _SESSION, tail=False)


def parse_state(
    data: bytes | memoryview,
    info: ModelInfo,
    name: str = "the context's state",
    sequence: bool = False,
    tail: bool = False,
) -> CacheState:
    """Reads what `llama_state_get_data` gave for a context of a model. The rows are copies.

    Args:
        data: the state.
        info: the model it is of.
        name: of the state, for messages.
        sequence: whether it is one sequence, from `llama_state_seq_get_data`.
        tail: whether it holds the tail (native/ggml/tq_ggml_tail_state.h).

    Raises:
        StateFileError: it is damaged or of another model.
        UnsupportedError: the model has no KV cache, or one that is not modelled here.
    """
    reader = _Reader(memoryview(data), name)
    if sequence and (begin := reader.number("Q") & 0xFFFFFFFF) != _SEQUENCE_DATA:  # the number of the sequence follows
        raise reader.error(f"it begins with {begin:#x}, {_SEQUENCE_DATA:#x} expected")
    return _parse(reader, info, not sequence, tail)


def cell_positions(data: bytes | memoryview, info: ModelInfo, tail: bool) -> npt.NDArray[np.int32]:
    """The position of every cell in what `llama_state_seq_get_data` gave for a model, one cache after another.

    tail: whether the state holds the tail.

    llama.cpp takes positions from a state as they are, and looks at those of the windows' cache alone afterwards.

    Raises:
        StateFileError, UnsupportedError: as `parse_state`.
    """
    reader = _Reader(memoryview(data), "the sequence's state", with_rows=False)
    reader.take(8, "marks")  # a magic number and the sequence's, which llama.cpp reads
    return _parse(reader, info, False, tail).positions


def _parse(reader: _Reader, info: ModelInfo, has_architecture: bool, tail: bool) -> CacheState:
    if not info.layers or not info.exact:
        what = "is not modelled here" if info.layers else "does not exist"
        raise UnsupportedError(f"{info.path.name}: the KV cache of architecture {info.architecture} {what}")
    if has_architecture:
        name = bytes(reader.take(reader.number("I"), "name")).decode("utf-8", "replace")
        if name != info.architecture:
            raise reader.error(f"it is of architecture {name!r}, {info.path.name} is of {info.architecture!r}")
    windows = [layer for layer in info.layers if layer.window]
    full = [layer for layer in info.layers if not layer.window]
    caches = [full, windows] if windows else [full]
    begin = reader.at
    try:
        found = [_cache(reader, layers, info, 0, tail) for layers in caches]
    except StateFileError:
        # Cells of some architectures have more to them, which their file does not tell. Rows whose types and lengths
        # all fit will not come about by reading them wrongly.
        reader.at = begin
        try:
            found = [_cache(reader, layers, info, _EXT_BYTES, tail) for layers in caches]
        except StateFileError:
            reader.at = begin
            found = [_cache(reader, layers, info, 0, tail) for layers in caches]
    if reader.left and not any("hybrid" in note for note in info.notes):
        raise reader.error(f"{reader.left} bytes follow its last row")
    return CacheState(
        max(len(positions) for positions, _, _ in found),
        max(n_stream for _, n_stream, _ in found),
        tuple(tensor for _, _, tensors in found for tensor in tensors),
        np.concatenate([positions for positions, _, _ in found]),
    )


def _cache(
    reader: _Reader, layers: Sequence[KVLayer], info: ModelInfo, ext_bytes: int, tail: bool
) -> tuple[npt.NDArray[np.int32], int, list[StoredRows]]:
    """Positions of the cells, number of streams and rows of one cache, the streams' one after another."""
    n_stream = reader.number("I")
    if not 1 <= n_stream <= _MAX_SEQUENCES:
        raise reader.error(f"it has {n_stream} streams, allowed are 1 to {_MAX_SEQUENCES}")
    parts: dict[tuple[str, int], list[tuple[CacheType, U8]]] = {}
    positions = [np.empty(0, np.int32)]
    for _ in range(n_stream):
        n_cells = reader.number("I")
        if n_cells == 0:
            continue
        positions.append(_cells(reader, n_cells, ext_bytes))
        transposed, n_layer = reader.number("I"), reader.number("I")
        if transposed > 1 or n_layer != len(layers):
            raise reader.error(f"it has {n_layer} layers where {info.path.name} has {len(layers)}")
        sides = ("K",) if info.mla else ("K", "V")
        for side in sides:
            for layer in layers:
                kind, rows = _rows(reader, layer, side, n_cells, bool(transposed) and side == "V")
                parts.setdefault((side, layer.index), []).append((kind, rows))
        if tail:
            for layer in layers:
                for side in sides:
                    _skip_tail(reader, layer, side, n_cells)
    tensors = []
    for (side, index), pieces in parts.items():
        kind = pieces[0][0]
        if any(other != kind for other, _ in pieces):
            raise reader.error(f"layer {index} has {side} of several types")
        layer = next(layer for layer in layers if layer.index == index)
        rows = pieces[0][1] if len(pieces) == 1 else np.concatenate([rows for _, rows in pieces])
        tensors.append(StoredRows(layer, side, kind, rows))
    return np.concatenate(positions), n_stream, tensors


def _skip_tail(reader: _Reader, layer: KVLayer, side: str, n_cells: int) -> None:
    """Goes past the rows that K or V of a layer has beside its cells (native/ggml/tq_ggml_tail_state.h)."""
    n, n_bytes = reader.number("I"), reader.number("I")
    expected = 2 * layer.n_head_kv * (layer.head_dim_k if side == "K" else layer.head_dim_v)
    if n > n_cells or n_bytes != expected:
        raise reader.error(
            f"layer {layer.index} has a tail of {n} rows of {n_bytes} bytes of {side} beside {n_cells} cells; "
            f"rows have {expected} bytes"
        )
    reader.take(n * (4 + n_bytes), "a tail")


def _cells(reader: _Reader, n_cells: int, ext_bytes: int) -> npt.NDArray[np.int32]:
    """Positions of cells."""
    if n_cells * (8 + ext_bytes) > reader.left:
        raise reader.error(f"it announces {n_cells} cells")
    positions = np.empty(n_cells, np.int32)
    size = 12 + ext_bytes
    if n_cells * size <= reader.left:  # all of one sequence, as nearly always: at once
        words = _words(reader, n_cells, size)
        if (words[:, 1] == 1).all():
            reader.take(n_cells * size, "cells")
            positions[:] = words[:, 0]
            return positions
    for i in range(n_cells):
        positions[i] = reader.number("i")
        n_seq = reader.number("I")
        if n_seq > _MAX_SEQUENCES:
            raise reader.error(f"a cell is of {n_seq} sequences, allowed are {_MAX_SEQUENCES}")
        reader.take(ext_bytes + 4 * n_seq, "cells")
    return positions


def _words(reader: _Reader, n: int, size: int) -> npt.NDArray[np.int32]:
    """The first two words of n records that begin here: a copy, so that an error may outlive the file's mapping."""
    records = np.frombuffer(reader.data, np.uint8, n * size, reader.at).reshape(n, size)
    words: npt.NDArray[np.int32] = records[:, :8].copy().view("<i4")
    return words


def _rows(reader: _Reader, layer: KVLayer, side: str, n_cells: int, transposed: bool) -> tuple[CacheType, U8]:
    """One tensor of a stream: its type, and (n_cells, bytes of a row)."""
    number = reader.number("i")
    kind = _TYPES.get(number)
    if kind is None:
        raise reader.error(f"layer {layer.index} has {side} of the unknown type {number}")
    width = layer.n_head_kv * (layer.head_dim_k if side == "K" else layer.head_dim_v)
    if layer.obstacle(kind, kind):
        raise reader.error(f"layer {layer.index} has {side} of type {kind.name}, which it cannot have")
    row_bytes = kind.row_bytes(width)
    if transposed:
        size, n = reader.number("I"), reader.number("I")
        if (size, n) != (kind.bytes, width) or kind.quantized:
            raise reader.error(
                f"layer {layer.index} has {n} rows of V of {size} bytes, {width} of {kind.bytes} expected"
            )
        found = reader.take(n_cells * row_bytes, "V")
        if not reader.with_rows:
            return kind, np.empty((n_cells, 0), np.uint8)
        columns = np.frombuffer(found, np.uint8).reshape(width, n_cells, size)
        return kind, columns.transpose(1, 0, 2).reshape(n_cells, row_bytes)
    given = reader.number("Q")
    if given != row_bytes:
        raise reader.error(f"layer {layer.index} has rows of {side} of {given} bytes, {row_bytes} expected")
    found = reader.take(n_cells * row_bytes, side)
    if not reader.with_rows:
        return kind, np.empty((n_cells, 0), np.uint8)
    data = np.frombuffer(found, np.uint8)
    return kind, data.reshape(n_cells, row_bytes).copy()


class _Reader:
    def __init__(self, data: memoryview, name: str, with_rows: bool = True) -> None:
        self.data, self.name, self.with_rows, self.at = data, name, with_rows, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def error(self, what: str) -> StateFileError:
        return StateFileError(f"{self.name} is damaged or of another model: {what} (at byte {self.at:,})")

    def number(self, kind: str) -> Any:
        size = struct.calcsize("<" + kind)
        if size > self.left:
            raise self.error(f"it ends after {len(self.data):,} bytes")
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += size
        return value

    def take(self, n: int, what: str) -> memoryview:
        if n > self.left:
            raise self.error(f"{n:,} bytes of {what} are announced, {self.left:,} are left")
        self.at += n
        return self.data[self.at - n : self.at]
