"""Reads the header of a GGUF file: its metadata and tensor list, and whether the file is whole.

The `gguf` package reads headers too, but makes NumPy views of every token of the vocabulary, which takes seconds for
150,000 tokens; opening a model must not cost that, so long arrays are stepped over here.
Source of the format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import ModelFileError, ModelNotFoundError

LONGEST_ARRAY: Final = 4096
"""Longer arrays (vocabularies) are stepped over; what a KV cache depends on has an entry per layer at most."""

LARGEST_HEADER: Final = 1 << 27
"""Bytes. A vocabulary of a quarter of a million words takes 20 MB; more is damage, and must not be read for ever."""

MOST_ENTRIES: Final = 1 << 17
"""Keys, and tensors: the largest models have some thousands."""

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9

# Bytes per block of ggml's types, by values per block, to know where the tensor data must end.
_BLOCK_BYTES: Final = {
    1: {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2},
    32: {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 9: 36, 20: 18, 39: 17},
    256: {10: 84, 11: 110, 12: 144, 13: 176, 14: 210, 15: 292, 16: 66, 17: 74, 18: 98, 19: 50, 21: 110, 22: 82}
    | {23: 136, 29: 56, 34: 54, 35: 66},
}
_TENSOR_BLOCKS: Final = {kind: (n, size) for n, sizes in _BLOCK_BYTES.items() for kind, size in sizes.items()}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a GGUF file, found to lie within it if its type is known here.

    Attributes:
        name: its name.
        type: ggml's number of its type.
        shape: its sizes, the fastest dimension last.
        begin: its first byte in the file.
        bytes: its size; 0 for a type that is not known here.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    begin: int
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself.

    Attributes:
        path: the file.
        file_bytes: its size.
        metadata: every key; arrays of more than `LONGEST_ARRAY` entries appear as their length, in a `range`.
        tensors: those in this file (a model may be split over several files).
        header_bytes: length of what precedes the tensors' data.
    """

    path: Path
    file_bytes: int
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    header_bytes: int


def read_header(path: str | Path) -> GgufHeader:
    """Reads and checks the header of a GGUF file.

    Raises:
        ModelNotFoundError: the path does not exist, or is no regular file.
        ModelFileError: the file cannot be read, is not GGUF, is of a version llama.cpp does not read, or is truncated.
    """
    file = Path(path)
    if not file.exists():
        raise ModelNotFoundError(f"model file {file} does not exist")
    if not file.is_file():
        raise ModelNotFoundError(f"model path {file} is not a file")
    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ModelFileError(f"{file} is not a GGUF file: it does not begin with the four letters GGUF")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(file, data).header()
    except OSError as error:
        raise ModelFileError(f"cannot read {file}: {error.strerror}") from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.end = min(self.size, LARGEST_HEADER)  # of what is read here
        self.at = 4

    def header(self) -> GgufHeader:
        version = self.number("I")
        if version not in (2, 3):
            if int.from_bytes(int(version).to_bytes(4, "little"), "big") in (2, 3):
                raise ModelFileError(f"{self.path} is a big-endian GGUF file, which llama.cpp does not read here")
            raise ModelFileError(f"{self.path} has GGUF version {version}; versions 2 and 3 can be read")
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        # Each entry takes more than 12 bytes: a larger count is damage, and must not be looped over.
        if (n_tensors + n_keys) * 12 > self.size or max(n_tensors, n_keys) > MOST_ENTRIES:
            raise self.truncated(f"it announces {n_tensors} tensors and {n_keys} keys")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string()
            metadata[key] = self.value(self.number("I"), key)
        found = []
        for _ in range(n_tensors):
            name = self.string()
            where = f"{self.path}: tensor {name!r:.80}"
            n_dims = self.number("I")
            if n_dims > 4:
                raise ModelFileError(f"{where} has {n_dims} dimensions, at most 4 are possible")
            shape = tuple(self.number("Q") for _ in range(n_dims))[::-1]
            if math.prod(max(n, 1) for n in shape) >= 1 << 63:  # which llama.cpp would end the process over
                raise ModelFileError(f"{where} has the impossible shape {shape}")
            kind, offset = self.number("I"), self.number("Q")
            block, size = _TENSOR_BLOCKS.get(kind, (1, 0))
            found.append((name, kind, shape, offset, math.prod(shape) // block * size))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelFileError(f"{self.path}: general.alignment is {alignment!r}, must be a positive integer")
        begin = (self.at + alignment - 1) // alignment * alignment
        tensors = tuple(GgufTensor(name, kind, shape, begin + at, n) for name, kind, shape, at, n in found)
        needed = max((tensor.begin + tensor.bytes for tensor in tensors), default=self.at)
        if needed > self.size:
            raise self.truncated(f"its tensors need {needed} bytes")
        return GgufHeader(self.path, self.size, metadata, tensors, self.at)

    def truncated(self, why: str) -> ModelFileError:
        return ModelFileError(f"{self.path} is truncated or damaged: {why}, the file has {self.size} bytes")

    def too_long(self, why: str) -> ModelFileError:
        if self.end < self.size:
            why += f" of the {LARGEST_HEADER} that a header may take"
        return self.truncated(why)

    def number(self, kind: str) -> Any:
        size = struct.calcsize("<" + kind)
        if size > self.end - self.at:
            raise self.too_long(f"its header goes on at byte {self.at}")
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        length = self.number("Q")
        if length > self.end - self.at:
            raise self.too_long(f"a text of {length} bytes begins at byte {self.at}")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        # The one loop over a vocabulary: 0.15 s for 450,000 texts.
        unpack, data, at, end = struct.Struct("<Q").unpack_from, self.data, self.at, self.end
        for _ in range(count):
            if at + 8 > end:
                self.at = at
                raise self.too_long(f"its header goes on at byte {at}")
            at += 8 + unpack(data, at)[0]
        if at > end:
            raise self.too_long(f"an array of texts ends at byte {at}")
        self.at = at

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ModelFileError(f"{self.path}: key {key!r:.80} has the unknown type {kind}: it is damaged or newer")
        item, count = self.number("I"), self.number("Q")
        if item == _STRING:
            if count <= LONGEST_ARRAY:
                return [self.string() for _ in range(count)]
            self.skip_strings(count)
            return range(count)
        if item not in _SCALARS:
            raise ModelFileError(f"{self.path}: key {key!r:.80} is an array of the unsupported type {item}")
        size = struct.calcsize("<" + _SCALARS[item])
        if count * size > self.end - self.at:
            raise self.too_long(f"array {key!r:.80} has {count} entries from byte {self.at} on")
        if count <= LONGEST_ARRAY:
            values = list(struct.unpack_from(f"<{count}{_SCALARS[item]}", self.data, self.at))
        self.at += count * size
        return values if count <= LONGEST_ARRAY else range(count)
