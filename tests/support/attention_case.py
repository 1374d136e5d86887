"""Calls of attention that the tests of the CPU's and the CUDA kernels share: random inputs, and the oracle's output."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tqgguf import reference
from tqgguf.config import CACHE_TYPES

Array = npt.NDArray[Any]
PADDING = 0xEE


@dataclass(frozen=True)
class Case:
    """One call. Shapes follow tqgguf.h; n_kv_stream divides n_stream.

    Attributes:
        n_kv_stream: streams of K and V; 0: n_stream.
        offset: bytes that K and V, and scratch on the CPU, are off.
        gap: bytes between tokens.
        head_major: whether a head's tokens lie side by side.
        tail, first: recent and first rows of the precise tail, where the type may have one; f32 stands for a type that
            tqgguf does not know, and has a decoder then.
        batch: whether the query rows' own tokens, which lie anywhere, are a batch written before it is read. Then a
            row sees no own token behind its own, and the tail has a row of each own token, too.
        spread: tokens of V differ in magnitude (the standard deviation of its logarithm); channel 0 of q stands out.
        poison: where NaN (q) or infinities (k, v: their last token, as it is stored) are put after the oracle has been
            asked; sinks: all are -infinity.
    """

    k_type: str = "pqo3"
    v_type: str = "pqo3"
    head_dim_k: int = 64
    head_dim_v: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    n_q: int = 1
    n_kv: int = 100
    n_stream: int = 1
    n_kv_stream: int = 0
    n_threads: int = 1
    mask: str = "none"
    n_mask_head: int = 1
    n_mask_stream: int = 1
    sinks: bool = False
    softcap: float = 0.0
    max_bias: float = 0.0
    offset: int = 0
    gap: int = 0
    head_major: bool = False
    tail: int = 0
    first: int = 0
    batch: bool = False
    spread: float = 0.0
    q_scale: float = 1.0
    v_scale: float = 1.0
    mode: str = "search"
    poison: str = ""
    seed: int = 0


@dataclass
class Operand:
    """K or V: its bytes (n_stream, n_kv, n_head, row bytes), and the values that they and the tail stand for.

    The tail has rows (n_stream, tail + first, n_head, head_dim) and their owners (n_stream, tail + first). In a batch
    it has n_q rows more, what `tail_index` makes instead of owners, and values are (n_stream, n_q, n_kv, n_head,
    head_dim): those that each query row sees.
    """

    type: str
    head_dim: int
    data: npt.NDArray[np.uint8]
    values: npt.NDArray[np.float32]
    tail: tuple[npt.NDArray[np.float16], npt.NDArray[np.int32]] | None = None


@dataclass
class Inputs:
    """What a call is given, and the output it should have, (n_stream, n_q, n_head, head_dim_v)."""

    q: npt.NDArray[np.float32]
    k: Operand
    v: Operand
    mask: npt.NDArray[np.float16] | None
    sinks: npt.NDArray[np.float32] | None
    want: npt.NDArray[np.float64]


Encode = Callable[..., npt.NDArray[np.uint8]]


def store(x: npt.NDArray[np.float32], type: str, mode: str, encode: Encode) -> Operand:
    """x as a cache has it."""
    if type in ("f32", "f16"):
        plain = x.astype(type.replace("f", "float"))
        return Operand(type, x.shape[-1], plain.view(np.uint8), plain.astype(np.float32))
    if type == "q8_0":
        return store_q8_0(x)
    row_bytes = CACHE_TYPES[type].row_bytes(x.shape[-1])
    data = encode(x, type, mode).reshape(*x.shape[:-1], row_bytes)
    return Operand(type, x.shape[-1], data, reference.decode(data, type, mode).reshape(x.shape))


def store_q8_0(x: npt.NDArray[np.float32]) -> Operand:
    """x in ggml's q8_0: of 32 values, an f16 scale and as many signed bytes."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    units = np.round(blocks / np.where(scale == 0, 1, scale)).astype(np.int8)
    halves = scale.astype(np.float16)
    data = np.concatenate([halves.view(np.uint8), units.view(np.uint8)], axis=-1)
    values = (halves.astype(np.float32) * units).reshape(x.shape)
    return Operand("q8_0", x.shape[-1], data.reshape(*x.shape[:-1], -1), values)


def own_cells(case: Case, stream: int) -> npt.NDArray[np.int64]:
    """Where the query rows' own tokens lie: side by side, past the end and on from the beginning, or anywhere."""
    rng = np.random.default_rng((case.seed, stream))
    if rng.random() < 0.3:
        return rng.permutation(case.n_kv)[: case.n_q]
    cells: npt.NDArray[np.int64] = (rng.integers(case.n_kv) + np.arange(case.n_q)) % case.n_kv
    return cells


def tail_index(owner: npt.NDArray[np.int32], cells: npt.NDArray[np.int64], case: Case) -> npt.NDArray[np.int32]:
    """The integers of `tq_tail_batch`, found by writing one token after the other."""
    owners = np.concatenate((owner, cells + 1))
    until = np.full(len(owners), len(cells))
    held = np.arange(len(owner))  # the row of the copy that a row of the tail stands for
    for i, cell in enumerate(cells):
        row = case.tail + cell if cell < case.first else cell % case.tail
        until[held[row]] = i
        held[row] = len(owner) + i
    return np.concatenate((owners, until, np.argsort(cells))).astype(np.int32)


def add_tail(rng: Any, exact: npt.NDArray[np.float32], operand: Operand, case: Case) -> None:
    """A tail of tokens written in an order of chance, some of them disowned."""
    n_stream, n_kv, *shape = exact.shape
    n_row, n_own = case.tail + case.first, case.n_q if case.batch else 0
    rows = np.full((n_stream, n_row + n_own, *shape), np.nan, dtype=np.float16)
    owner = np.zeros((n_stream, n_row), dtype=np.int32)
    indices: list[Array] = []
    seen: list[Any] = []

    def write(s: int, t: Any, values: Array, copy: int | None = None) -> None:
        row = case.tail + t if t < case.first else t % case.tail
        if left := owner[s, row]:
            values[left - 1] = operand.values[s, left - 1]
        owner[s, row] = t + 1
        # f32 loses nothing that a tail could keep: its rows are others, so that a row not read is noticed
        kept = exact[s, t] + 1 if operand.type == "f32" else reference.encode_tail(exact[s, t], case.mode)
        rows[s, row if copy is None else copy] = kept
        kept = kept.astype(np.float16)
        values[t] = kept if operand.type == "f32" else reference.decode_tail(kept, case.mode)

    for s in range(n_stream):
        own = own_cells(case, s) if case.batch else np.empty(0, np.int64)
        values = operand.values[s].copy()
        for t in rng.permutation(n_kv) if rng.random() < 0.5 else np.arange(n_kv):
            if t not in own:
                write(s, t, values)
        for row in np.flatnonzero(rng.random(n_row) < 0.2):
            if left := owner[s, row]:
                values[left - 1] = operand.values[s, left - 1]
            owner[s, row] = 0
        if case.batch:
            indices.append(tail_index(owner[s], own, case))
            seen.append([])
            for i, t in enumerate(own):
                write(s, t, values, n_row + i)
                seen[-1].append(values.copy())
        else:
            seen.append(values)
    operand.values = np.array(seen)
    operand.tail = rows, np.array(indices) if case.batch else owner


def make_mask(rng: Any, case: Case) -> npt.NDArray[np.float16] | None:
    mask = np.zeros((case.n_mask_stream, case.n_mask_head, case.n_q, case.n_kv), dtype=np.float16)
    if case.mask == "causal":
        rows, columns = np.arange(case.n_q)[:, None], np.arange(case.n_kv)[None]
        mask[..., columns > rows + case.n_kv - case.n_q] = -np.inf
    elif case.mask == "window":
        mask[..., : case.n_kv // 2] = -np.inf
    elif case.mask == "holes":
        mask[rng.random(mask.shape) < 0.4] = -np.inf
    elif case.mask == "values":
        mask[:] = -np.abs(rng.standard_normal(mask.shape)) * 3
    elif case.mask == "all":
        mask[..., : (case.n_q + 1) // 2, :] = -np.inf
    elif case.mask == "last":
        mask[..., -1] = -np.inf
    elif not case.batch:
        assert case.mask == "none"
        return None
    if case.batch:
        for s in range(case.n_stream):
            for i, cell in enumerate(own_cells(case, s)):
                mask[s % case.n_mask_stream, :, :i, cell] = -np.inf
    return mask


def poison(case: Case, inputs: Inputs) -> None:
    """Puts in what must not be seen, or must be."""
    for name, x in (("k", inputs.k), ("v", inputs.v)):
        if case.poison == name:  # f16: every value, otherwise the scale of the first block
            last = x.data[:, -1, :, : None if x.type == "f16" else 2]
            last[:] = np.tile(np.array([0, 0x7C], np.uint8), last.shape[-1] // 2)
    if case.poison == "q":
        inputs.q[..., 3] = np.nan
    if case.poison == "sinks" and inputs.sinks is not None:
        inputs.sinks[:] = -np.inf


def make_inputs(case: Case, encode: Encode = reference.encode) -> Inputs:
    rng = np.random.default_rng(case.seed)
    n_kv_stream = case.n_kv_stream or case.n_stream

    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    q = normal(case.n_stream, case.n_head, case.n_q, case.head_dim_k) * np.float32(case.q_scale)
    q[..., 0] *= 1 + 5 * case.spread
    sizes = np.exp(case.spread * normal(n_kv_stream, case.n_kv, 1, 1)) * np.float32(case.v_scale)
    shape = (n_kv_stream, case.n_kv, case.n_head_kv)
    k_exact, v_exact = normal(*shape, case.head_dim_k), sizes * normal(*shape, case.head_dim_v)
    k, v = store(k_exact, case.k_type, case.mode, encode), store(v_exact, case.v_type, case.mode, encode)
    for exact, x in ((k_exact, k), (v_exact, v)):
        if case.tail and x.type not in ("f16", "q8_0"):
            add_tail(rng, exact, x, case)
    sinks = normal(case.n_head) if case.sinks else None
    mask = make_mask(rng, case)
    seen = None if case.poison == "sinks" else sinks  # of -infinity they are none

    def attended(s: int, rows: slice, k: npt.NDArray[np.float32], v: npt.NDArray[np.float32]) -> Array:
        return reference.attention(
            q[s, :, rows].swapaxes(0, 1),
            k,
            v,
            case.head_dim_k**-0.5,
            mask=None if mask is None else mask[s % case.n_mask_stream, :, rows],
            sinks=seen,
            softcap=case.softcap,
            max_bias=case.max_bias,
        )

    def values(x: Operand, s: int, row: int) -> Array:
        of_stream: Array = x.values[s]
        return of_stream[row] if of_stream.ndim == 4 else of_stream

    if case.batch:
        want = [
            np.concatenate([attended(s, slice(i, i + 1), values(k, s, i), values(v, s, i)) for i in range(case.n_q)])
            for s in range(case.n_stream)
        ]
    else:
        kv_streams = [s * n_kv_stream // case.n_stream for s in range(case.n_stream)]
        want = [attended(s, slice(None), k.values[of], v.values[of]) for s, of in enumerate(kv_streams)]
    inputs = Inputs(q, k, v, mask, sinks, np.array(want))
    poison(case, inputs)
    return inputs


def lay_out(x: Operand, case: Case) -> tuple[npt.NDArray[np.uint8], tuple[int, int, int]]:
    """An operand's memory, and its strides by stream, token and head."""
    n_stream, n_kv, n_head, n_bytes = x.data.shape
    if case.head_major:
        stored = np.full((n_stream, n_head, n_kv, n_bytes + case.gap), PADDING, np.uint8)
        stored[..., :n_bytes] = x.data.swapaxes(1, 2)
        return stored, (stored.strides[0], stored.strides[2], stored.strides[1])
    stored = np.full((n_stream, n_kv, n_head * n_bytes + case.gap), PADDING, np.uint8)
    stored[..., : n_head * n_bytes] = x.data.reshape(n_stream, n_kv, n_head * n_bytes)
    return stored, (*stored.strides[:2], n_bytes)


@functools.cache
def decoder(ffi: Any) -> Any:
    """A tq_row_decoder of rows of f32."""
    return ffi.callback("tq_row_decoder", lambda row, x, n: ffi.memmove(x, row, 4 * n))


def arguments(ffi: Any, case: Case, inputs: Inputs, out: Array, put: Callable[[Array, int], Any]) -> Any:
    """The tq_attn of a case, but for args.out. put(array, offset) copies an array into memory that is off by offset."""
    args = ffi.new("tq_attn *")
    args.q.data, args.q.type = put(inputs.q, 0), CACHE_TYPES["f32"].number
    args.q.head_dim, args.q.n_head, args.q.n_stream = case.head_dim_k, case.n_head, case.n_stream
    args.q.stride_stream, args.q.stride_head, args.q.stride_token = inputs.q.strides[:3]
    for target, x in ((args.k, inputs.k), (args.v, inputs.v)):
        target.type, target.mode = CACHE_TYPES[x.type].number, reference.MODES.index(case.mode)
        target.head_dim, target.n_head, target.n_stream = x.head_dim, case.n_head_kv, len(x.data)
        stored, (target.stride_stream, target.stride_token, target.stride_head) = lay_out(x, case)
        target.data = put(stored, case.offset if CACHE_TYPES[x.type].ours or case.offset % 2 == 0 else 0)
        if x.tail:
            if x.type == "f32":
                target.type, target.decoder = 77, decoder(ffi)
            rows, owner = x.tail
            target.tail.data, target.tail.owner = put(rows, 0), put(owner, 0)
            target.tail.n_recent, target.tail.n_first = case.tail, case.first
            target.tail.n_own = case.n_q if case.batch else 0
            target.tail.stride_stream, target.tail.stride_row, target.tail.stride_head = rows.strides[:3]
            target.tail.owner_stride_stream = owner.strides[0]
    args.n_q, args.n_kv = case.n_q, case.n_kv
    if inputs.mask is not None:
        args.mask = put(inputs.mask, 0)
        args.n_mask_head, args.n_mask_stream = case.n_mask_head, case.n_mask_stream
        args.mask_stride_stream, args.mask_stride_head, args.mask_stride_row = inputs.mask.strides[:3]
    if inputs.sinks is not None:
        args.sinks = put(inputs.sinks, 0)
    args.scale, args.max_bias, args.softcap = case.head_dim_k**-0.5, case.max_bias, case.softcap
    args.out_stride_stream, args.out_stride_row, args.out_stride_head = out.strides[:3]
    return args
