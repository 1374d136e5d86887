"""Contexts of tiny models, operations on their sequences (remove, copy, shift, save, restore), and their cells."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tqgguf
from tqgguf._native import import_llama_cpp
from tqgguf.cache.policy import resolve
from tqgguf.model.context import make_context

api: Any = import_llama_cpp()

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Cells:
    """The cells of one KV cache in the order they lie in: position, sequences and rows of each.

    k and v hold (n_cells, bytes of a row) for each layer; types the numbers of K's and V's types, layer by layer.
    """

    positions: tuple[int, ...]
    sequences: tuple[tuple[int, ...], ...]
    k: tuple[U8, ...]
    v: tuple[U8, ...]
    types: tuple[tuple[int, int], ...]

    def rows(self, positions: Sequence[int]) -> list[U8]:
        """K and V rows of these positions, which must be there, once each."""
        at = [self.positions.index(position) for position in positions]
        return [rows[at] for rows in (*self.k, *self.v)]


class Context:
    """A llama_context, one thread, and operations on its sequences; positions are given as ranges [p0, p1)."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.memory = api.llama_get_memory(context)
        self.model = api.llama_get_model(context)
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def read(self, tokens: Sequence[int], at: int, seq: int | Sequence[int] = 0, batch: int = 64) -> F32:
        """Reads tokens at positions from `at` on, into one sequence or several at once; the last one's logits."""
        sequences = [seq] if isinstance(seq, int) else list(seq)
        for first in range(0, len(tokens), batch):
            part = tokens[first : first + batch]
            self.decode([(int(token), at + first + i, sequences) for i, token in enumerate(part)])
        return self.logits()

    def decode(self, batch: Sequence[tuple[int, int, Sequence[int]]]) -> int:
        """One llama_decode of (token, position, sequences); its status, asserted to be 0."""
        status = self.try_decode(batch)
        assert status == 0, f"llama_decode returned {status}"
        return status

    def try_decode(self, batch: Sequence[tuple[int, int, Sequence[int]]]) -> int:
        part = api.llama_batch_init(len(batch), 0, 16)
        part.n_tokens = len(batch)
        for i, (token, position, sequences) in enumerate(batch):
            part.token[i], part.pos[i], part.n_seq_id[i] = token, position, len(sequences)
            for j, sequence in enumerate(sequences):
                part.seq_id[i][j] = sequence
            part.logits[i] = i == len(batch) - 1
        status = int(api.llama_decode(self.context, part))
        api.llama_batch_free(part)
        return status

    def logits(self) -> F32:
        return np.array(np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, -1), (self.n_vocab,)))

    def remove(self, seq: int, p0: int = -1, p1: int = -1) -> bool:
        return bool(api.llama_memory_seq_rm(self.memory, seq, p0, p1))

    def copy(self, source: int, target: int, p0: int = -1, p1: int = -1) -> None:
        api.llama_memory_seq_cp(self.memory, source, target, p0, p1)

    def keep(self, seq: int) -> None:
        api.llama_memory_seq_keep(self.memory, seq)

    def add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        api.llama_memory_seq_add(self.memory, seq, p0, p1, delta)

    def divide(self, seq: int, p0: int, p1: int, by: int) -> None:
        api.llama_memory_seq_div(self.memory, seq, p0, p1, by)

    def span(self, seq: int = 0) -> tuple[int, int]:
        """First and last position of a sequence; -1 if it has none."""
        low, high = api.llama_memory_seq_pos_min, api.llama_memory_seq_pos_max
        return int(low(self.memory, seq)), int(high(self.memory, seq))

    def state(self, seq: int | None = None, *, on_device: bool = False) -> bytes:
        """The state of the context, or of one sequence; on_device: the rows stay in a buffer of the context."""
        if seq is None:
            buffer = (ctypes.c_uint8 * api.llama_state_get_size(self.context))()
            n = api.llama_state_get_data(self.context, buffer, len(buffer))
        else:
            flags = api.LLAMA_STATE_SEQ_FLAGS_ON_DEVICE if on_device else 0
            buffer = (ctypes.c_uint8 * api.llama_state_seq_get_size_ext(self.context, seq, flags))()
            n = api.llama_state_seq_get_data_ext(self.context, buffer, len(buffer), seq, flags)
        assert n == len(buffer)
        return bytes(buffer)

    def restore(self, state: bytes, seq: int | None = None, *, on_device: bool = False) -> bool:
        """Puts a state of the whole context, or of a sequence into `seq`; whether llama.cpp took it."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if seq is None:
            return int(api.llama_state_set_data(self.context, buffer, len(buffer))) == len(state)
        flags = api.LLAMA_STATE_SEQ_FLAGS_ON_DEVICE if on_device else 0
        return int(api.llama_state_seq_set_data_ext(self.context, buffer, len(buffer), seq, flags)) == len(state)

    def cells(self, seq: int = 0) -> Cells:
        """What a sequence holds in the first KV cache (the one without windows)."""
        return parse_sequence(self.state(seq))[0]

    def caches(self, seq: int, n: int) -> list[Cells]:
        """The same for the first n caches."""
        return parse_sequence(self.state(seq), n)


def parse_sequence(state: bytes, n_cache: int = 1) -> list[Cells]:
    """Reads the KV caches out of a state of one sequence, as llama.cpp's state_write left them."""
    at = 8  # a magic number and the sequence

    def take(kind: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, state, at)
        at += struct.calcsize("<" + kind)
        return value

    caches = []
    for _ in range(n_cache):
        found = Cells((), (), (), (), ())
        for _ in range(take("I")):
            n = take("I")
            if n == 0:
                continue
            positions, sequences = [], []
            for _ in range(n):
                positions.append(take("i"))
                sequences.append(tuple(take("i") for _ in range(take("I"))))
            transposed, n_layer = take("I"), take("I")
            assert not transposed, "without flash attention V lies transposed"
            sides: list[list[tuple[int, U8]]] = []
            for _ in range(2):
                sides.append([])
                for _ in range(n_layer):
                    kind, size = take("i"), take("Q")
                    rows = np.frombuffer(state, np.uint8, n * size, at).reshape(n, size)
                    at += n * size
                    sides[-1].append((kind, rows))
            found = Cells(
                tuple(positions),
                tuple(sequences),
                *(tuple(rows for _, rows in side) for side in sides),
                tuple((k, v) for (k, _), (v, _) in zip(*sides, strict=True)),
            )
        caches.append(found)
    return caches


def distance(a: F32, b: F32) -> float:
    """Distance of logits, relative to how much b varies."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b - b.mean()))


Open = Callable[..., Context]


@pytest.fixture
def opened() -> Iterator[Open]:
    """opened(model, cache, tail=…, **context parameters): a fresh `Context`; the model is loaded once for a test."""
    with contextlib.ExitStack() as stack:
        loaded: dict[Path, Any] = {}

        def open_context(
            path: Path, cache: Any = "pqo3", *, tail: int = 0, rotate: bool = True, **params: Any
        ) -> Context:
            if path not in loaded:
                model = tqgguf.Llama(path, cache="f16", n_ctx=256, n_threads=1, verbose=False)
                loaded[path] = model
                stack.callback(model.close)
            model = loaded[path]
            policy = resolve(cache, model.model_info.n_layer)
            chosen = type(model.context_params).from_buffer_copy(model.context_params)
            chosen.n_threads = chosen.n_threads_batch = 1
            chosen.n_seq_max, chosen.kv_unified = 1, True
            chosen.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED  # of f16, too: the same path for all
            for name, value in ({"n_ctx": 512, "n_batch": 512, "n_ubatch": 512} | params).items():
                assert hasattr(chosen, name)
                setattr(chosen, name, value)
            making = make_context(model.model, model.model_info, policy, chosen, tail=tail, rotate=rotate)
            return Context(stack.enter_context(making)[0])

        yield open_context
