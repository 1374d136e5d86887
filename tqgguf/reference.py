"""The readable NumPy oracle: what the formats mean, step by step, independent of the C code.

A block is 32 consecutive values of one head. Functions that work on blocks take arrays of shape (n_blocks, 32) and
work on all rows at once; the step names are those of the C sources (`signs`, `transform`, `codebook`, `search_scale`,
`pack`, ...). The encoder computes in IEEE float32, round to nearest even, without fused multiply-add, in the order
written here: that order is part of the format, because every implementation must produce the same bytes.

Sources: the formats follow PolarQuant Outlier of turboquant-rs (modes `maxnorm` and `l2norm` reproduce it); the
orthonormal Walsh-Hadamard transform H32 stands for the random rotation of TurboQuant (Zandieh et al., ICLR 2026);
`search` with its signed codebooks is this project's own encoder. The types pqt2 to pqt5 quantise a block along a path
through a trellis (trellis-coded quantisation, Marcellin and Fischer, IEEE Trans. Commun. 38(1), 1990), a closed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError

__all__ = [
    "BLOCK",
    "BLOCK_BYTES",
    "CODECS",
    "MODES",
    "SEARCH_FACTORS",
    "SIGNS",
    "TYPES",
    "Codebook",
    "attention",
    "closed_path",
    "codebook",
    "decode",
    "decode_tail",
    "encode",
    "encode_tail",
    "hadamard",
    "inverse_transform",
    "l2norm_levels",
    "nearest_in_subsets",
    "pack",
    "pack_trellis",
    "quantize_indices",
    "sanitize",
    "search_path",
    "search_scale",
    "subsets",
    "sum32",
    "transform",
    "unpack",
    "unpack_trellis",
]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]

BLOCK: Final = 32
"""Values per block."""

BLOCK_BYTES: Final = {"pqo3": 14, "pqo4": 18, "pqt3": 14, "pqt4": 18, "pqt2": 10, "pqt5": 22}
"""Bytes per block, by type in the order of the numbers: an f16 scale, then 2 to 5 bits for each of 32 values."""

TYPES: Final = tuple(BLOCK_BYTES)
MODES: Final = ("search", "maxnorm", "l2norm")
TRELLIS_TYPES: Final = ("pqt2", "pqt3", "pqt4", "pqt5")
CODECS: Final = tuple((type, mode) for type in TYPES for mode in MODES if mode == "search" or type not in TRELLIS_TYPES)
"""The pairs (type, mode) there are: the trellis types have no encoder but `search`."""

F16_MAX: Final = np.float32(65504.0)
AMAX_MIN: Final = np.float32(2.0**-24)
"""The smallest f16. A transformed block whose values are all below it is stored as zeros."""
NORM_MIN: Final = np.float32(1e-10)
"""turboquant-rs clamps its scales from below by this."""
RSQRT_BLOCK: Final = np.float32(1.0 / np.sqrt(32.0))

SIGNS: Final[F32] = np.array([1 if c == "+" else -1 for c in "+-++--+-++-+-+--+--++-+--+++--+-"], dtype=np.float32)
"""The fixed signs of the block transform, shape (32,)."""

SEARCH_FACTORS: Final = {
    "pqo3": (0.82, 0.90, 1.00),
    "pqo4": (0.92, 0.97, 1.03),
    "pqt2": (0.68, 0.765, 0.85, 0.955),
    "pqt3": (0.78, 0.86, 0.94, 1.04),
    "pqt4": (0.88, 0.93, 0.98, 1.04),
    "pqt5": (0.97, 0.985, 1.00, 1.015),
}
"""Scale candidates of `search`, as multiples of the smallest scale that clips no value."""

CUTS: Final = {"pqt2": 32, "pqt3": 16, "pqt4": 16, "pqt5": 16}
"""Values on either side of the cut that decide the state there (`closed_path`)."""

# Signed (asymmetric) codebooks, fitted to transformed Gaussian blocks whose scale is searched. A negative scale mirrors
# them, which is what makes the asymmetry a gain: NMSE .0253 -> .0229 for pqo3 at the same bytes.
_SEARCH_LEVELS: Final = {
    "pqo3": (-1.814201, -1.106490, -0.579246, -0.123892, 0.312649, 0.776305, 1.337817, 2.219803),
    "pqo4": (
        *(-1.999333, -1.585588, -1.253617, -0.968201, -0.714014, -0.482657, -0.263340, -0.047417),
        *(0.170632, 0.395389, 0.630699, 0.882685, 1.161876, 1.486655, 1.906427, 2.503710),
    ),
}

# The trellis types' levels, in units of 1/64: as small integers they can be looked up 16 to 64 at once. The rounding
# costs less than 0.2 % in NMSE, 1 % for pqt5.
_TRELLIS_LEVELS: Final = {
    "pqt2": (-96, -54, -28, -6, 16, 39, 69, 127),
    "pqt3": (-101, -75, -57, -44, -32, -22, -12, -3, 7, 16, 27, 38, 51, 66, 90, 127),
    "pqt4": (
        *(-104, -87, -74, -64, -56, -50, -43, -38, -33, -28, -23, -19, -14, -10, -5, -1),
        *(3, 8, 12, 17, 22, 27, 33, 38, 44, 50, 57, 65, 75, 86, 100, 127),
    ),
    "pqt5": (
        *(-122, -111, -100, -91, -84, -77, -71, -66, -62, -58, -54, -50, -47, -44, -41, -38),
        *(-36, -33, -30, -28, -25, -23, -21, -19, -16, -14, -11, -10, -7, -5, -3, -1),
        *(2, 4, 6, 8, 11, 12, 15, 17, 20, 22, 24, 26, 29, 31, 34, 37),
        *(40, 43, 46, 49, 52, 56, 60, 64, 68, 73, 79, 85, 92, 100, 111, 127),
    ),
}

# turboquant-rs' MaxNorm tables: Lloyd-Max at 3 bits, a uniform grid between the same ends at 4 bits.
_MAXNORM_OUTER: Final = np.float32(2.1573)
_MAXNORM_LEVELS: Final = (-2.1573, -1.3336, -0.7434, -0.2428, 0.2428, 0.7434, 1.3336, 2.1573)
_MAXNORM_BOUNDARIES: Final = (-1.7455, -1.0385, -0.4931, 0.0, 0.4931, 1.0385, 1.7455)


@dataclass(frozen=True)
class Codebook:
    """The table that a block's indices refer to, ascending.

    Attributes:
        levels: (n_levels,) float32; 2^b levels for a pqo type of b bits, 2^(b+1) for a pqt type.
        boundaries: float32. pqo3 and pqo4: (n_levels - 1,); a value's index is the number of boundaries below it.
            Trellis types: (n_levels - 4,); boundary j lies midway between levels j and j + 4, neighbours in a subset.
    """

    levels: F32
    boundaries: F32


@cache
def codebook(type: str, mode: str = "search") -> Codebook:
    """The codebook of a type in a mode (`search`, `maxnorm`, `l2norm`).

    Raises:
        ArgumentError: unknown type or mode, or the type does not have that mode.
    """
    _check(type, mode)
    if type in TRELLIS_TYPES:
        levels = np.array(_TRELLIS_LEVELS[type], dtype=np.float32) / np.float32(64.0)
        boundaries = np.float32(0.5) * (levels[:-4] + levels[4:])
    elif mode == "search":
        levels = np.array(_SEARCH_LEVELS[type], dtype=np.float32)
        boundaries = np.float32(0.5) * (levels[:-1] + levels[1:])
    elif mode == "l2norm":
        exact = np.array(l2norm_levels(3 if type == "pqo3" else 4), dtype=np.float64)
        levels = exact.astype(np.float32)
        boundaries = (0.5 * (exact[:-1] + exact[1:])).astype(np.float32)
    elif type == "pqo3":
        levels = np.array(_MAXNORM_LEVELS, dtype=np.float32)
        boundaries = np.array(_MAXNORM_BOUNDARIES, dtype=np.float32)
    else:
        step = np.float32(2.0) * _MAXNORM_OUTER / np.float32(15.0)
        levels = -_MAXNORM_OUTER + np.arange(16, dtype=np.float32) * step
        boundaries = -_MAXNORM_OUTER + (np.arange(15, dtype=np.float32) + np.float32(0.5)) * step
    levels.flags.writeable = False
    boundaries.flags.writeable = False
    return Codebook(levels, boundaries)


@cache
def l2norm_levels(bits: int) -> tuple[float, ...]:
    """Lloyd-Max levels for one coordinate of a random unit vector in R^32, rounded to 6 significant digits.

    The coordinate's density is proportional to (1 - t^2)^((32 - 3) / 2) on [-1, 1]. Lloyd's iteration (Lloyd 1957, Max
    1960) alternates midpoints as boundaries with the mean of each cell as level, in float64 until no level moves.
    """
    exponent = (BLOCK - 3) / 2
    nodes, weights = np.polynomial.legendre.leggauss(96)
    levels = np.sqrt(3.0 / BLOCK) * (np.arange(2**bits) + 0.5 - 2 ** (bits - 1)) / 2 ** (bits - 1)
    for _ in range(100_000):
        edges = np.concatenate(([-1.0], 0.5 * (levels[:-1] + levels[1:]), [1.0]))
        half = 0.5 * np.diff(edges)[:, None]
        t = half * nodes + 0.5 * (edges[:-1] + edges[1:])[:, None]
        density = weights * (1.0 - t * t) ** exponent
        moved = (t * density).sum(axis=1) / density.sum(axis=1)
        moved = 0.5 * (moved - moved[::-1])  # the density is even: keep the table exactly symmetric
        change = float(np.abs(moved - levels).max())
        levels = moved
        if change < 1e-14:
            break
    return tuple(float(f"{level:.6g}") for level in levels)


# ---- Steps of the encoder ----


def sanitize(x: npt.ArrayLike) -> F32:
    """NaN becomes 0, magnitudes above the largest f16 (65504), infinities too, become the largest f16."""
    values = np.asarray(x, dtype=np.float32)
    clean: F32 = np.where(np.isnan(values), np.float32(0.0), values)
    return np.clip(clean, -F16_MAX, F16_MAX)


def sum32(p: F32) -> F32:
    """Sum of the last axis (32 values) in a halving tree: p[i] += p[i + h] for h = 16, 8, 4, 2, 1."""
    h = BLOCK // 2
    while h > 0:
        p = p[..., :h] + p[..., h : 2 * h]
        h //= 2
    return p[..., 0]


def hadamard(x: F32) -> F32:
    """H32 x / sqrt(32) over the last axis: butterflies (a, b) -> (a + b, a - b) at distances 1, 2, 4, 8, 16."""
    y: F32 = np.array(x, dtype=np.float32)
    for h in (1, 2, 4, 8, 16):
        pairs = y.reshape(*y.shape[:-1], BLOCK // (2 * h), 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack((a + b, a - b), axis=-2).reshape(x.shape)
    scaled: F32 = y * RSQRT_BLOCK
    return scaled


def transform(x: F32, mode: str = "search") -> F32:
    """The block transform: H32 (s * x) for `search`; s * (H32 x) for `maxnorm` and `l2norm`, as turboquant-rs does.

    Signs before the transform matter: llama.cpp's own graph rotation is a Hadamard matrix too and would undo an H32
    without them. Signs after it change nothing, since those codebooks are symmetric.
    """
    return hadamard(x * SIGNS) if mode == "search" else hadamard(x) * SIGNS


def inverse_transform(y: F32, mode: str = "search") -> F32:
    """The inverse of `transform`, which is its transpose: the same steps in the other order."""
    return hadamard(y) * SIGNS if mode == "search" else hadamard(y * SIGNS)


def quantize_indices(t: F32, book: Codebook) -> U8:
    """Index of the nearest level: the number of boundaries b with t > b."""
    return np.searchsorted(book.boundaries, t, side="left").astype(np.uint8)


def scale_candidates(y: F32, type: str) -> tuple[npt.NDArray[np.bool_], list[F32]]:
    """Which blocks are zero, and the scales to try: positive and negative in turn, factor by factor."""
    book = codebook(type, "search")
    one = np.float32(1.0)
    r_high, r_low = one / book.levels[-1], one / book.levels[0]
    high, low = y.max(axis=-1), y.min(axis=-1)
    zero = np.maximum(high, -low) < AMAX_MIN
    base_p = np.where(zero, one, np.maximum(high * r_high, low * r_low))
    base_n = np.where(zero, one, np.maximum(-low * r_high, -high * r_low))
    factors = [np.float32(f) for f in SEARCH_FACTORS[type]]
    return zero, [d for f in factors for d in (base_p * f, -(base_n * f))]


def search_scale(y: F32, type: str) -> F32:
    """The scale of each transformed block, (n_blocks, 32) -> (n_blocks,), that minimises the squared error.

    Candidates are a few multiples of the smallest scale that clips nothing, for the codebook as it is and mirrored
    (negative scale). With indices fixed, the least-squares scale is d = sum(y v) / sum(v v), and it lowers the squared
    error by sum(y v)^2 / sum(v v): the candidate with the largest gain wins, the first one if several tie. A block
    whose magnitudes are all below 2^-24 gets 0.
    """
    book = codebook(type, "search")
    zero, candidates = scale_candidates(y, type)
    best = np.full(y.shape[:-1], -1.0, dtype=np.float32)
    scale = np.zeros(y.shape[:-1], dtype=np.float32)
    for d in candidates:
        v = book.levels[quantize_indices(y * (np.float32(1.0) / d)[..., None], book)]
        yv, vv = sum32(y * v), sum32(v * v)
        gain = (yv * yv) / vv
        better = gain > best
        best = np.where(better, gain, best)
        scale = np.where(better, yv / vv, scale)
    return np.where(zero, np.float32(0.0), scale)


def pack(indices: U8, bits: int) -> U8:
    """Packs (n_blocks, 32) indices into (n_blocks, 4 * bits) bytes.

    Eight indices make a little-endian word of 8 * bits bits, index j at bits j*bits and up. For 4 bits that is two
    indices per byte, the first one in the low nibble.
    """
    groups = indices.reshape(-1, BLOCK // 8, 8).astype(np.uint64)
    words = np.bitwise_or.reduce(groups << (np.arange(8, dtype=np.uint64) * np.uint64(bits)), axis=-1)
    shifts = np.arange(bits, dtype=np.uint64) * np.uint64(8)
    packed: U8 = ((words[..., None] >> shifts) & np.uint64(0xFF)).astype(np.uint8)
    return packed.reshape(-1, 4 * bits)


def unpack(qs: U8, bits: int) -> U8:
    """The inverse of `pack`: (n_blocks, 4 * bits) bytes to (n_blocks, 32) indices."""
    groups = qs.reshape(-1, BLOCK // 8, bits).astype(np.uint64)
    words = np.bitwise_or.reduce(groups << (np.arange(bits, dtype=np.uint64) * np.uint64(8)), axis=-1)
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    indices: U8 = ((words[..., None] >> shifts) & np.uint64(2**bits - 1)).astype(np.uint8)
    return indices.reshape(-1, BLOCK)


# ---- The trellis of the pqt types ----
#
# The levels are dealt out to four subsets, level j to subset j % 4. A value's subset comes from a 32-bit word t that
# all values share, its level within the subset from k - 1 bits e of its own: so each value has 2^(k+1) levels to be
# near to, for k bits. Value i's subset depends on bits i, i - 1, i - 2 and i - 3 of t (modulo 32): a path through a
# trellis whose states are three bits of t, and closed, since the first value follows on the last. Any word is a path.


def _rotate(t: U32, n: int) -> U32:
    rotated: U32 = t << np.uint32(n) | t >> np.uint32(32 - n)
    return rotated


def subsets(t: U32) -> U8:
    """The subset, 0 to 3, of every value: (n_blocks,) words to (n_blocks, 32)."""
    low = _rotate(t, 2)
    high = t ^ _rotate(t, 1) ^ _rotate(t, 3)
    bits = np.arange(BLOCK, dtype=np.uint32)
    found: U8 = (2 * (high[:, None] >> bits & 1) + (low[:, None] >> bits & 1)).astype(np.uint8)
    return found


def nearest_in_subsets(x: F32, book: Codebook) -> tuple[U8, F32]:
    """e of the level nearest to x in each subset, and that level, both (..., 4): the boundaries below x are counted."""
    boundaries = book.boundaries.reshape(-1, 4)
    e: U8 = (x[..., None, None] > boundaries).sum(axis=-2).astype(np.uint8)
    return e, book.levels[4 * e + np.arange(4)]


def closed_path(distances: F32, cut: int) -> tuple[U32, F32]:
    """The path t of the least distance, near enough, and that distance: (n_blocks, 32, 4) to (n_blocks,) twice.

    distances[:, i, u] is what it costs to put value i into subset u. Viterbi's algorithm finds the best path out of a
    given state, so a closed path takes eight runs, one for each state. Instead a first run, free at both ends, over the
    last `cut` values and then the first ones, tells in which state the best path is between values 31 and 0; a second
    run from value 0 closes the path there. With a cut of 16, once around the block, that costs 0.8 % in NMSE against
    all eight runs, for a quarter of the work; with 32, twice around, it costs 0.1 %.
    """
    n = len(distances)
    state = np.arange(8)
    bit, a, b = state >> 2, state >> 1 & 1, state & 1  # a state is (t[i], t[i - 1], t[i - 2])
    # Two states lead to each: the last bit of the older one, t[i - 3], is 0 or 1.
    before = [4 * a + 2 * b + c for c in (0, 1)]
    subset = [2 * (bit ^ a ^ c) + b for c in (0, 1)]

    def step(cost: F32, i: int) -> tuple[F32, npt.NDArray[np.intp]]:
        zero, one = (cost[:, before[c]] + distances[:, i, subset[c]] for c in (0, 1))
        return np.minimum(zero, one), np.where(one < zero, before[1], before[0])

    cost = np.zeros((n, 8), dtype=np.float32)
    through = np.tile(state, (n, 1))
    for i in range(BLOCK - cut, BLOCK):
        cost, _ = step(cost, i)
    for i in range(cut):
        cost, origin = step(cost, i)
        through = np.take_along_axis(through, origin, axis=1)
    rows = np.arange(n)
    closing = through[rows, cost.argmin(axis=1)]

    cost = np.where(state == closing[:, None], np.float32(0.0), np.float32(1e30))
    origins = []
    for i in range(32):
        cost, origin = step(cost, i)
        origins.append(origin)
    t = np.zeros(n, dtype=np.uint32)
    at = closing
    for i in reversed(range(32)):
        t |= (at >> 2).astype(np.uint32) << np.uint32(i)
        at = origins[i][rows, at]
    return t, cost[rows, closing]


def search_path(y: F32, type: str) -> tuple[F32, U32]:
    """Scale and path of each transformed block, (n_blocks, 32) -> (n_blocks,) twice, for the least squared error.

    The candidates are those of `search_scale`. Each has its best path and the squared error of that; the smallest
    wins, the first one if several tie, and its scale is then fitted by least squares to the levels on its path.
    """
    book = codebook(type)
    zero, candidates = scale_candidates(y, type)
    best = np.full(len(y), np.inf, dtype=np.float32)
    inverse = np.ones(len(y), dtype=np.float32)
    t = np.zeros(len(y), dtype=np.uint32)
    for d in candidates:
        tried = np.float32(1.0) / d
        x = y * tried[:, None]
        _, levels = nearest_in_subsets(x, book)
        difference = x[..., None] - levels
        path, distance = closed_path(difference * difference, CUTS[type])
        error = distance * (d * d)
        better = error < best
        best = np.where(better, error, best)
        inverse = np.where(better, tried, inverse)
        t = np.where(better, path, t)
    _, levels = nearest_in_subsets(y * inverse[:, None], book)
    v = np.take_along_axis(levels, subsets(t)[..., None], axis=-1)[..., 0]
    return np.where(zero, np.float32(0.0), sum32(y * v) / sum32(v * v)), t


def pack_trellis(t: U32, e: U8, bits: int) -> U8:
    """Packs (n_blocks,) words and (n_blocks, 32) e into (n_blocks, 4 * bits) bytes.

    They are little-endian words: t; the two low bits of e[i] for even i, at bits i and i + 1; the same for odd i, at
    bits i - 1 and i; then, for each further bit of e, a word with that bit of e[i] at bit i. For 2 bits e has one bit,
    which has such a word. Shifting each word right by j brings values j, 8 + j, 16 + j and 24 + j into the same bits of
    its four bytes, which is how vector code reads them.
    """
    place = np.arange(0, BLOCK, 2, dtype=np.uint32)
    low = (e & 3).astype(np.uint32)
    words = [t]
    if bits > 2:
        words += [np.bitwise_or.reduce(low[:, odd::2] << place, axis=1) for odd in (0, 1)]
    for bit in _single_bits(bits):
        single = (e >> bit & 1).astype(np.uint32) << np.arange(BLOCK, dtype=np.uint32)
        words.append(np.bitwise_or.reduce(single, axis=1))
    return np.stack(words, axis=1).astype("<u4").view(np.uint8)


def unpack_trellis(data: U8, bits: int) -> U8:
    """(n_blocks, 4 * bits) bytes to (n_blocks, 32) indices of levels, 4 e + subset."""
    words = np.ascontiguousarray(data).view("<u4").astype(np.uint32)
    i = np.arange(BLOCK)
    e = np.zeros((len(words), BLOCK), dtype=np.uint32)
    if bits > 2:
        e |= words[:, 1 + i % 2] >> (i - i % 2).astype(np.uint32) & np.uint32(3)
    single = _single_bits(bits)
    for k, bit in enumerate(single, bits - len(single)):
        e |= (words[:, k : k + 1] >> i.astype(np.uint32) & np.uint32(1)) << np.uint32(bit)
    return (4 * e + subsets(words[:, 0])).astype(np.uint8)


def _single_bits(bits: int) -> range:
    """The bits of e that have a word each."""
    return range(0 if bits == 2 else 2, bits - 1)


# ---- Whole blocks ----


def encode(x: npt.ArrayLike, type: str, mode: str = "search") -> U8:
    """Encodes (..., n) values, n a multiple of 32, into (..., n / 32 * block bytes) bytes.

    NaN encodes as 0 and magnitudes above 65504 as +-65504. A block of zeros, or of values too small for an f16 scale,
    gives scale 0 and index bytes 0.

    Raises:
        ArgumentError: unknown type or mode, or n is not a multiple of 32.
    """
    book = codebook(type, mode)
    values = np.asarray(x)
    if values.ndim == 0 or values.shape[-1] % BLOCK:
        raise ArgumentError(f"the last axis of x must be a multiple of {BLOCK} values, shape is {values.shape}")
    blocks = sanitize(values).reshape(-1, BLOCK)
    path: U32 = np.zeros(len(blocks), dtype=np.uint32)
    if mode == "search":
        y = transform(blocks, mode)
        if type in TRELLIS_TYPES:
            scale, path = search_path(y, type)
        else:
            scale = search_scale(y, type)
        d = np.clip(scale, -F16_MAX, F16_MAX).astype(np.float16)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            t = y * (np.float32(1.0) / d.astype(np.float32))[:, None]
    elif mode == "maxnorm":
        y = transform(blocks, mode)
        scale = np.maximum(np.abs(y).max(axis=-1, initial=0.0) / _MAXNORM_OUTER, NORM_MIN)
        t = y / scale[:, None]
        d = np.minimum(scale, F16_MAX).astype(np.float16)
    else:
        scale = np.maximum(np.sqrt(sum32(blocks * blocks)), NORM_MIN)
        unit = (blocks / scale[:, None]).astype(np.float32)
        t = transform(unit, mode)
        d = np.minimum(scale, F16_MAX).astype(np.float16)
    if type in TRELLIS_TYPES:
        e, _ = nearest_in_subsets(t, book)
        qs = pack_trellis(path, np.take_along_axis(e, subsets(path)[..., None], axis=-1)[..., 0], _bits(type))
    else:
        qs = pack(quantize_indices(t, book), _bits(type))
    zero = d == 0
    qs[zero] = 0
    d = np.where(zero, np.float16(0.0), d)
    out = np.concatenate((d.astype("<f2").view(np.uint8).reshape(-1, 2), qs), axis=1)
    return out.reshape(*values.shape[:-1], values.shape[-1] // BLOCK * BLOCK_BYTES[type])


def decode(blocks: npt.ArrayLike, type: str, mode: str = "search") -> F32:
    """Decodes (..., n_blocks * block bytes) bytes into (..., n_blocks * 32) float32 values.

    Any bytes are valid input; a scale that is NaN or infinite decodes as 0.

    Raises:
        ArgumentError: unknown type or mode, or the last axis does not hold whole blocks.
    """
    book = codebook(type, mode)
    data = np.asarray(blocks, dtype=np.uint8)
    size = BLOCK_BYTES[type]
    if data.ndim == 0 or data.shape[-1] % size:
        raise ArgumentError(f"the last axis must hold whole {type} blocks of {size} bytes, shape is {data.shape}")
    rows = np.ascontiguousarray(data.reshape(-1, size))
    d = np.ascontiguousarray(rows[:, :2]).view("<f2").astype(np.float32)
    d = np.where(np.isfinite(d), d, np.float32(0.0))
    indices = (unpack_trellis if type in TRELLIS_TYPES else unpack)(rows[:, 2:], _bits(type))
    y = d * book.levels[indices]
    return inverse_transform(y, mode).reshape(*data.shape[:-1], data.shape[-1] // size * BLOCK)


def encode_tail(x: npt.ArrayLike, mode: str = "search") -> npt.NDArray[np.float16]:
    """What a precise tail holds of (..., n) values, n a multiple of 32: each block transformed and rounded to f16.

    NaN counts as 0, and magnitudes above 65504 as 65504, before the transform and after it.
    """
    values = np.asarray(x)
    y = transform(sanitize(values).reshape(-1, BLOCK), mode)
    return np.clip(y, -F16_MAX, F16_MAX).astype(np.float16).reshape(values.shape)


def decode_tail(rows: npt.NDArray[np.float16], mode: str = "search") -> F32:
    """The values (..., n) that rows of a tail (..., n) stand for."""
    return inverse_transform(rows.astype(np.float32).reshape(-1, BLOCK), mode).reshape(rows.shape)


# ---- Attention ----


def alibi_slopes(n_head: int, max_bias: float) -> F64:
    """ALiBi slope of each head, (n_head,), as ggml computes it (Press et al. 2021); ones for max_bias 0."""
    if max_bias <= 0:
        return np.ones(n_head)
    n_power = 1 << (n_head.bit_length() - 1)
    m0, m1 = 2.0 ** (-max_bias / n_power), 2.0 ** (-max_bias / 2 / n_power)
    return np.array([m0 ** (h + 1) if h < n_power else m1 ** (2 * (h - n_power) + 1) for h in range(n_head)])


def attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    scale: float,
    *,
    mask: npt.ArrayLike | None = None,
    sinks: npt.ArrayLike | None = None,
    softcap: float = 0.0,
    max_bias: float = 0.0,
) -> F64:
    """Softmax attention in float64, with everything llama.cpp's flash attention may add to it.

    score = softcap(scale <q, k>) + slope_h mask, with softcap(x) = c tanh(x / c) for c > 0; exp(sink_h) joins the
    softmax's denominator. A row whose keys are all masked (-inf) gives zeros.

    Args:
        q: (n_q, n_head, head_dim_k).
        k: (n_kv, n_head_kv, head_dim_k); n_head is a multiple of n_head_kv, and query head h reads KV head
            h // (n_head // n_head_kv).
        v: (n_kv, n_head_kv, head_dim_v).
        scale: factor on the dot products, 1 / sqrt(head_dim) as a rule.
        mask: (n_q, n_kv) or (n_mask_head, n_q, n_kv), added to the scores; head h reads plane h % n_mask_head.
        sinks: (n_head,) logits, or None.

    Returns:
        (n_q, n_head, head_dim_v).
    """
    q64, k64, v64 = (np.asarray(a, dtype=np.float64) for a in (q, k, v))
    n_q, n_head, _ = q64.shape
    n_kv, n_head_kv, _ = k64.shape
    if n_head % n_head_kv:
        raise ArgumentError(f"n_head {n_head} is not a multiple of n_head_kv {n_head_kv}")
    planes = None if mask is None else np.atleast_3d(np.asarray(mask, dtype=np.float64)).reshape(-1, n_q, n_kv)
    slopes = alibi_slopes(n_head, max_bias)
    out = np.zeros((n_q, n_head, v64.shape[2]))
    for h in range(n_head):
        kv = h // (n_head // n_head_kv)
        score = scale * (q64[:, h] @ k64[:, kv].T)
        if softcap > 0:
            score = softcap * np.tanh(score / softcap)
        if planes is not None:
            score = score + slopes[h] * planes[h % len(planes)]
        sink = -np.inf if sinks is None else float(np.asarray(sinks, dtype=np.float64)[h])
        top = np.maximum(score.max(axis=1, initial=-np.inf), sink)
        top = np.where(np.isfinite(top), top, 0.0)[:, None]
        weight = np.exp(score - top)
        total = weight.sum(axis=1, keepdims=True) + np.exp(sink - top)
        out[:, h] = (weight / np.where(total > 0, total, 1.0)) @ v64[:, kv]
    return out


def _bits(type: str) -> int:
    return int(type[-1])


def _check(type: Any, mode: Any) -> None:
    if type not in TYPES:
        raise ArgumentError(f"unknown type {type!r}; valid types are {', '.join(TYPES)}")
    if mode not in MODES:
        raise ArgumentError(f"unknown mode {mode!r}; valid modes are {', '.join(MODES)}")
    if (type, mode) not in CODECS:
        raise ArgumentError(f"{type} has no mode {mode!r}; its only mode is search")
