"""The oracle itself: what the formats promise, checked on the NumPy code that everything else is compared with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tqgguf import reference
from tqgguf.errors import ArgumentError

blocks = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(32)), elements=st.floats(-10000, 10000, width=32))


def gaussian(n_blocks: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n_blocks, 32)).astype(np.float32)


def test_h32_is_orthonormal_and_its_own_inverse() -> None:
    h = reference.hadamard(np.eye(32, dtype=np.float32))
    np.testing.assert_allclose(h @ h.T, np.eye(32), atol=1e-6)
    np.testing.assert_allclose(np.abs(h), 32**-0.5, atol=1e-7)
    np.testing.assert_array_equal(h, h.T)


@pytest.mark.parametrize("mode", reference.MODES)
def test_transform_round_trip(mode: str) -> None:
    x = gaussian(100)
    back = reference.inverse_transform(reference.transform(x, mode), mode)
    np.testing.assert_allclose(back, x, atol=2e-6)


def test_signs_come_before_the_transform_in_search() -> None:
    # A Hadamard matrix would turn this block into one value, had the signs not come first.
    x = np.ones((1, 32), dtype=np.float32)
    assert np.abs(reference.hadamard(x)).max() == pytest.approx(32**0.5)
    assert np.abs(reference.transform(x)).max() < 3


@given(hnp.arrays(np.uint8, (3, 32), elements=st.integers(0, 7)))
def test_pack_3_bits(indices: npt.NDArray[np.uint8]) -> None:
    packed = reference.pack(indices, 3)
    assert packed.shape == (3, 12)
    np.testing.assert_array_equal(reference.unpack(packed, 3), indices)
    word = int.from_bytes(packed[0, :3].tobytes(), "little")
    assert [word >> (3 * j) & 7 for j in range(8)] == indices[0, :8].tolist()


@given(hnp.arrays(np.uint8, (3, 32), elements=st.integers(0, 15)))
def test_pack_4_bits(indices: npt.NDArray[np.uint8]) -> None:
    packed = reference.pack(indices, 4)
    assert packed.shape == (3, 16)
    np.testing.assert_array_equal(reference.unpack(packed, 4), indices)
    np.testing.assert_array_equal(packed, indices[:, ::2] | indices[:, 1::2] << 4)


@given(hnp.arrays(np.uint32, 3), hnp.arrays(np.uint8, (3, 32), elements=st.integers(0, 15)), st.integers(2, 5))
def test_pack_trellis(t: npt.NDArray[np.uint32], e: npt.NDArray[np.uint8], bits: int) -> None:
    e = e & (2 ** (bits - 1) - 1)
    packed = reference.pack_trellis(t, e, bits)
    assert packed.shape == (3, 4 * bits)
    np.testing.assert_array_equal(reference.unpack_trellis(packed, bits), 4 * e + reference.subsets(t))
    words = [int.from_bytes(packed[0, 4 * i : 4 * i + 4].tobytes(), "little") for i in range(bits)]
    assert words[0] == t[0]
    pairs = [words[1 + i % 2] >> (i - i % 2) & 3 if bits > 2 else words[1] >> i & 1 for i in range(32)]
    high = [sum((word >> i & 1) << bit for bit, word in enumerate(words[3:], 2)) for i in range(32)]
    assert [a + b for a, b in zip(pairs, high, strict=True)] == e[0].tolist()


def test_the_subset_of_a_value_depends_on_four_bits() -> None:
    for i in range(32):
        bits = np.array([1 << ((i - back) % 32) for back in range(32)], dtype=np.uint32)
        assert reference.subsets(bits)[:, i].tolist() == [2, 2, 1, 2] + 28 * [0]


@pytest.mark.parametrize(("cut", "exact", "excess"), [(16, 0.8, 1.02), (32, 0.97, 1.002)])
def test_the_path_closes_and_is_nearly_the_best(cut: int, exact: float, excess: float) -> None:
    rng = np.random.default_rng(3)
    distances = np.square(rng.standard_normal((200, 32, 4))).astype(np.float32)
    t, distance = reference.closed_path(distances, cut)
    on_path = np.take_along_axis(distances, reference.subsets(t)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(on_path.sum(axis=1), distance, rtol=1e-5)
    # The exact optimum: Viterbi's algorithm out of each of the eight states and back into it.
    state = np.arange(8)
    bit, a, b = state >> 2, state >> 1 & 1, state & 1
    cost = np.where(np.eye(8, dtype=bool), 0.0, np.inf)[None].repeat(200, axis=0)
    for i in range(32):
        cost = np.minimum(
            *(cost[..., 4 * a + 2 * b + c] + distances[:, i][:, None, 2 * (bit ^ a ^ c) + b] for c in (0, 1))
        )
    best = np.diagonal(cost, axis1=1, axis2=2).min(axis=1)
    assert (distance >= best * (1 - 1e-5)).all()
    assert (distance <= best * (1 + 1e-5)).mean() > exact and distance.sum() < excess * best.sum()


@pytest.mark.parametrize(("type", "mode"), reference.CODECS)
def test_codebooks_ascend_and_boundaries_lie_between(type: str, mode: str) -> None:
    book = reference.codebook(type, mode)
    x = np.linspace(-3, 3, 5001, dtype=np.float32)
    if type in reference.TRELLIS_TYPES:
        assert len(book.levels) == len(book.boundaries) + 4 == 2 ** (int(type[-1]) + 1)
        assert (book.levels[:-1] < book.levels[1:]).all()
        e, levels = reference.nearest_in_subsets(x, book)
        for u in range(4):
            nearest = np.abs(x[:, None] - book.levels[u::4]).argmin(axis=1)
            assert (nearest != e[:, u]).mean() < 0.002
            np.testing.assert_array_equal(levels[:, u], book.levels[u::4][e[:, u]])
        return
    assert len(book.levels) == len(book.boundaries) + 1 == (8 if type == "pqo3" else 16)
    assert (book.levels[:-1] < book.boundaries).all() and (book.boundaries < book.levels[1:]).all()
    nearest = np.abs(x[:, None] - book.levels).argmin(axis=1)
    assert (nearest != reference.quantize_indices(x, book)).mean() < 0.002


def test_l2norm_levels_are_the_means_of_their_cells() -> None:
    # Checked by sampling: coordinates of random unit vectors in R^32.
    x = np.random.default_rng(1).standard_normal((200_000, 32))
    t = (x / np.linalg.norm(x, axis=1, keepdims=True)).ravel()
    for bits in (3, 4):
        levels = np.array(reference.l2norm_levels(bits))
        cell = np.searchsorted(0.5 * (levels[:-1] + levels[1:]), t)
        means = np.bincount(cell, t) / np.bincount(cell)
        np.testing.assert_allclose(means, levels, atol=3e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("type", "mode", "bar"),
    [
        ("pqo3", "search", 0.0240),
        ("pqo4", "search", 0.0058),
        ("pqt2", "search", 0.0704),  # .0700 on a million blocks
        ("pqt3", "search", 0.0172),
        ("pqt4", "search", 0.0041),
        ("pqt5", "search", 0.00101),
        ("pqo3", "maxnorm", 0.0320),
        ("pqo3", "l2norm", 0.0325),
        ("pqo4", "maxnorm", 0.0083),
        ("pqo4", "l2norm", 0.0090),
    ],
)
def test_error_on_gaussian_blocks(type: str, mode: str, bar: float) -> None:
    x = gaussian(20_000)
    error = reference.decode(reference.encode(x, type, mode), type, mode) - x
    assert np.square(error).sum() / np.square(x).sum() < bar


@given(blocks, st.sampled_from(reference.CODECS))
def test_decoded_blocks_are_near(x: npt.NDArray[np.float32], codec: tuple[str, str]) -> None:
    decoded = reference.decode(reference.encode(x, *codec), *codec)
    # The worst block is a single spike after the transform: 31 zeros then cost the distance to the level nearest zero.
    worst = 0.3 if codec[0] == "pqt2" else 0.15 if codec[1] == "search" else 0.5
    energy = np.square(x.astype(np.float64)).sum(axis=1)
    error = np.square(decoded.astype(np.float64) - x).sum(axis=1)
    assert (error <= worst * energy + 32 * 2.0**-40).all()


@given(blocks, st.sampled_from([-4, -1, 1, 5]))
def test_search_scales_with_its_input(x: npt.NDArray[np.float32], exponent: int) -> None:
    keep = np.abs(x).max(axis=1) > 1e-2
    x = np.clip(x[keep], -1000, 1000)
    for type in ("pqo3", "pqt3"):
        scaled = reference.encode(np.ldexp(x, exponent), type)
        np.testing.assert_array_equal(scaled.reshape(-1, 14)[:, 2:], reference.encode(x, type).reshape(-1, 14)[:, 2:])


@pytest.mark.parametrize(("type", "mode"), reference.CODECS)
def test_zero_blocks(type: str, mode: str) -> None:
    for value in (0.0, -0.0, 1e-30, 2.0**-149):
        encoded = reference.encode(np.full(64, value, dtype=np.float32), type, mode)
        assert not encoded.any()


@pytest.mark.parametrize(("type", "mode"), reference.CODECS)
def test_nan_and_infinity_stay_in_their_block(type: str, mode: str) -> None:
    x = gaussian(3)
    clean = reference.encode(x, type, mode)
    x[1, 3], x[1, 7], x[1, 8] = np.nan, np.inf, -np.inf
    dirty = reference.encode(x, type, mode)
    np.testing.assert_array_equal(dirty[[0, 2]], clean[[0, 2]])
    replaced = x.copy()
    replaced[1, 3], replaced[1, 7], replaced[1, 8] = 0.0, 65504.0, -65504.0
    np.testing.assert_array_equal(reference.encode(replaced, type, mode), dirty)
    assert np.isfinite(reference.decode(dirty, type, mode)).all()


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0xFFFF])
def test_a_scale_that_is_no_number_decodes_as_zero(bits: int) -> None:
    block = np.full(14, 0xA5, dtype=np.uint8)
    block[:2] = bits & 0xFF, bits >> 8
    assert not reference.decode(block, "pqo3").any()


def test_leading_axes_are_kept() -> None:
    x = gaussian(12).reshape(3, 2, 64)
    encoded = reference.encode(x, "pqo4")
    assert encoded.shape == (3, 2, 36)
    assert reference.decode(encoded, "pqo4").shape == (3, 2, 64)
    np.testing.assert_array_equal(encoded[1, 1], reference.encode(x[1, 1], "pqo4"))


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="pqo3, pqo4"):
        reference.encode(np.zeros(32), "pqo5")
    with pytest.raises(ArgumentError, match=r"pqt3.*only mode is search"):
        reference.encode(np.zeros(32), "pqt3", "maxnorm")
    with pytest.raises(ArgumentError, match="search, maxnorm, l2norm"):
        reference.encode(np.zeros(32), "pqo3", "best")
    with pytest.raises(ArgumentError, match=r"\(33,\)"):
        reference.encode(np.zeros(33), "pqo3")
    with pytest.raises(ArgumentError, match="14 bytes"):
        reference.decode(np.zeros(18, dtype=np.uint8), "pqo3")


def test_attention_by_hand() -> None:
    q = np.array([[[2.0, 0.0]], [[0.0, 1.0]]])
    k = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    v = np.array([[[1.0]], [[3.0]]])
    out = reference.attention(q, k, v, 0.5, mask=np.array([[0.0, 0.0], [-np.inf, -np.inf]]))
    e = np.exp(1.0)
    assert out[0, 0, 0] == pytest.approx((e * 1 + 3) / (e + 1))
    assert out[1, 0, 0] == 0.0
    sunk = reference.attention(q, k, v, 0.5, sinks=np.array([0.5]), softcap=2.0)
    capped = np.exp(2.0 * np.tanh(0.5))
    assert sunk[0, 0, 0] == pytest.approx((capped * 1 + 3) / (capped + 1 + np.exp(0.5)))


def test_alibi_slopes_for_six_heads() -> None:
    np.testing.assert_allclose(reference.alibi_slopes(6, 8.0), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3], rtol=1e-12)
