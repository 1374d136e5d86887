"""Fused attention of the CUDA kernels against the float64 oracle on the decoded values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from attention_case import Case, arguments, make_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tqgguf
from tqgguf import reference
from tqgguf.config import CACHE_TYPES

TOLERANCE = 2e-3
"""Relative L2 error of the output: q, levels and weights are f16, sums are f32. Measured are 3e-4 to 1e-3, and 2e-3
where scores are as large as 100."""


def compute(cuda: Any, case: Case) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The library's output and the oracle's, both (n_stream, n_q, n_head, head_dim_v)."""
    inputs = make_inputs(case, tqgguf.quantize)  # the oracle's bytes (test_codec_bytes.py), sooner
    out = np.full(inputs.want.shape, np.nan, dtype=np.float32)
    args = arguments(cuda.ffi, case, inputs, out, lambda array, offset: cuda.put(array, offset).address)
    result = cuda.put(out)
    args.out = result.address
    work_bytes = cuda.lib.tq_cuda_attn_work_bytes(args)
    assert work_bytes < 1 << 40, cuda.message()
    work = cuda.put(np.full(work_bytes + 16, 0xFF, np.uint8))
    aligned = cuda.ffi.cast("void *", -(-work.pointer // 16) * 16)
    cuda.check(cuda.lib.tq_cuda_attn(args, aligned, cuda.ffi.NULL))
    return result.read().astype(np.float64), inputs.want


def check_case(cuda: Any, case: Case, tolerance: float = TOLERANCE) -> None:
    """Computes a case and asserts that it agrees with the oracle, every query vector for itself."""
    got, want = compute(cuda, case)
    assert np.isfinite(got).all(), case
    norms = np.linalg.norm(want, axis=-1)
    errors = np.linalg.norm(got - want, axis=-1)
    assert np.linalg.norm(errors) <= tolerance * np.linalg.norm(norms), case
    assert (errors <= 4 * tolerance * np.maximum(norms, 0.1 * norms.mean())).all(), case


STOCK = ("f16", "q8_0")
PAIRS = [
    (k, v) for k in (*reference.TYPES, *STOCK) for v in (*reference.TYPES, *STOCK) if not (k in STOCK and v in STOCK)
]


@pytest.mark.parametrize(("k_type", "v_type"), PAIRS)
def test_pairs_of_types(cuda: Any, k_type: str, v_type: str) -> None:
    check_case(cuda, Case(k_type, v_type, 128, 128, n_kv=150, mask="holes"))
    check_case(cuda, Case(k_type, v_type, 96, 160, n_kv=70, n_q=5, mask="causal"))


@pytest.mark.parametrize(
    ("head_dim_k", "head_dim_v"),
    [(32 * i, 32 * i) for i in range(1, 9)] + [(512, 512), (576, 512), (192, 128), (64, 320)],
)
def test_head_sizes(cuda: Any, head_dim_k: int, head_dim_v: int) -> None:
    for type in reference.TYPES:
        n_q = 7 if type in ("pqo3", "pqt4", "pqt2") else 1
        check_case(
            cuda, Case(type, type, head_dim_k, head_dim_v, n_head=2, n_head_kv=1, n_q=n_q, n_kv=70, mask="holes")
        )


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 9, 12, 16, 20])
def test_grouped_queries(cuda: Any, group: int) -> None:
    check_case(cuda, Case(n_head=group * 3, n_head_kv=3, n_kv=130))
    check_case(cuda, Case("pqo4", "pqo4", n_head=group, n_head_kv=1, n_kv=33, n_q=3, mask="causal"))
    check_case(cuda, Case("pqo4", "pqo3", n_head=group, n_head_kv=1, n_kv=150, sinks=True))
    check_case(cuda, Case("pqt3", "pqt4", n_head=group, n_head_kv=1, n_kv=130))
    check_case(cuda, Case("pqt5", "pqt5", n_head=group, n_head_kv=1, n_kv=130))


@pytest.mark.parametrize("mask", ["none", "causal", "window", "holes", "values", "all"])
@pytest.mark.parametrize("n_q", [1, 2, 17])
def test_masks(cuda: Any, mask: str, n_q: int) -> None:
    for n_mask_head in (1, 4):
        bias = 8.0 if mask == "values" else 0.0
        check_case(cuda, Case(mask=mask, n_q=n_q, n_kv=300, n_mask_head=n_mask_head, max_bias=bias))


def test_a_row_with_every_key_masked_gives_zeros(cuda: Any) -> None:
    for sinks in (False, True):
        for n_kv in (40, 1000):
            got, _ = compute(cuda, Case(mask="all", n_q=9, n_kv=n_kv, sinks=sinks))
            assert not got[:, :5].any()
            assert (np.abs(got[:, 5:]).sum(axis=-1) > 0).all()


def test_no_keys_give_zeros(cuda: Any) -> None:
    for sinks in (False, True):
        got, _ = compute(cuda, Case(n_kv=0, sinks=sinks))
        assert not got.any()


@pytest.mark.parametrize("n_q", [1, 6])
def test_sinks_softcap_alibi(cuda: Any, n_q: int) -> None:
    for sinks in (False, True):
        for softcap in (0.0, 2.5):
            for max_bias in (0.0, 8.0):
                mask = "values" if max_bias else "none"
                case = Case(n_q=n_q, n_head=6, sinks=sinks, softcap=softcap, max_bias=max_bias, mask=mask, n_kv=150)
                check_case(cuda, case)


@pytest.mark.parametrize("n_kv", [1, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 255, 257, 700])
def test_lengths(cuda: Any, n_kv: int) -> None:
    check_case(cuda, Case(n_kv=n_kv, n_head_kv=1, n_head=2))
    check_case(cuda, Case("pqo4", "pqo4", 128, 128, n_kv=n_kv, n_head_kv=1, n_head=2, n_q=5, sinks=True))


def test_streams(cuda: Any) -> None:
    check_case(cuda, Case(n_stream=3, mask="holes", n_mask_stream=3, n_q=2))
    check_case(cuda, Case(n_stream=4, n_kv_stream=2, mask="holes", n_mask_stream=2, n_q=2))
    check_case(cuda, Case(n_stream=2, n_kv_stream=1, mask="holes", n_mask_head=2))


@pytest.mark.parametrize("type", [*reference.TYPES, *STOCK])
def test_alignments(cuda: Any, type: str) -> None:
    other = "pqo3" if type in STOCK else type
    for offset, gap, head_dim in (
        (0, 0, 256),
        (2, 0, 128),
        (4, 0, 128),
        (0, 2, 128),
        (8, 8, 256),
        (0, 0, 32),
        (6, 14, 96),
    ):
        check_case(cuda, Case(type, other, head_dim, head_dim, offset=offset, gap=gap, n_kv=90))
        check_case(cuda, Case(other, type, head_dim, head_dim, offset=offset, gap=gap, n_kv=90, head_major=True))
        if type == "pqo4":
            check_case(cuda, Case(type, "pqo3", head_dim, head_dim, offset=offset, gap=gap, n_kv=90, n_q=2))


@pytest.mark.parametrize(("type", "mode"), [codec for codec in reference.CODECS if codec[1] != "search"])
def test_other_codebooks(cuda: Any, type: str, mode: str) -> None:
    check_case(cuda, Case(type, type, 128, 128, mode=mode))


@pytest.mark.parametrize(("q_scale", "v_scale"), [(1e-6, 1e-3), (30.0, 1e-2), (1e6, 3e4), (1.0, 2e4)])
def test_magnitudes(cuda: Any, q_scale: float, v_scale: float) -> None:
    """f16 in between must neither overflow nor lose what is small. Scores of a million flip a sign now and then."""
    for type in ("pqo3", "pqt4"):
        softcap = 5.0 if q_scale > 100 else 0.0
        case = Case(type, type, 128, 128, q_scale=q_scale, v_scale=v_scale, softcap=softcap, n_kv=200)
        check_case(cuda, case, 0.1 if q_scale > 100 else TOLERANCE)


@pytest.mark.parametrize(("k_type", "v_type"), PAIRS)
def test_a_precise_tail(cuda: Any, k_type: str, v_type: str) -> None:
    check_case(cuda, Case(k_type, v_type, 128, 128, n_kv=150, tail=40, first=4, mask="holes"))
    check_case(cuda, Case(k_type, v_type, 96, 160, n_kv=70, n_q=5, tail=7, mask="causal", sinks=True))


@pytest.mark.parametrize("tail", [1, 2, 31, 64, 129, 300])
def test_tails_of_any_length(cuda: Any, tail: int) -> None:
    """Shorter and longer than the cache, a tile, and a block's rows; some tokens own a row of K alone, or of V."""
    for n_kv, first, n_q in ((1, 4, 1), (65, 0, 3), (200, 4, 1), (200, 33, 9)):
        case = Case(
            n_kv=n_kv, tail=tail, first=first, n_q=n_q, n_head=6, n_stream=2, mask="values", max_bias=8.0, seed=n_kv
        )
        check_case(cuda, case)
    check_case(cuda, Case("pqt4", "pqo3", n_kv=130, tail=tail, first=2, softcap=2.5, n_stream=4, n_kv_stream=2))


@pytest.mark.parametrize("tail", [1, 5, 64])
@pytest.mark.parametrize(("n_q", "group"), [(2, 1), (3, 4), (9, 2), (33, 1)])
def test_each_token_of_a_batch_reads_what_it_would_read_alone(cuda: Any, n_q: int, group: int, tail: int) -> None:
    """Of the tokens that share a tile or a row of the tail, some query rows read the tail and others the blocks."""
    pairs = [("pqo3", "pqo3"), ("pqt4", "pqt3"), ("pqt3", "f16"), ("f16", "pqo4")]
    for seed, types in enumerate(pairs):
        shape = {"n_head": 2 * group, "n_head_kv": 2, "n_kv": 150 - seed, "n_q": n_q}
        check_case(cuda, Case(*types, tail=tail, first=4, batch=True, seed=seed, **shape))


def test_a_batch_of_several_streams(cuda: Any) -> None:
    shape = {"n_stream": 3, "n_mask_stream": 3, "n_kv": 90, "n_q": 4, "batch": True, "tail": 8, "first": 2}
    for types in (("pqo3", "pqo3"), ("pqo3", "pqt3")):
        for mask in ("none", "holes", "values"):
            check_case(cuda, Case(*types, mask=mask, **shape))


def test_a_tail_of_hidden_tokens_alone(cuda: Any) -> None:
    case = Case(n_kv=90, tail=8, first=4, n_q=3, mask="window")
    check_case(cuda, case)
    got, _ = compute(cuda, Case(mask="all", n_q=9, n_kv=40, tail=64))
    assert not got[:, :5].any()
    assert np.isfinite(got).all()
    got, _ = compute(cuda, Case(poison="q", n_kv=50, tail=64))
    assert np.isnan(got).all()


@pytest.mark.parametrize(("type", "mode"), [codec for codec in reference.CODECS if codec[1] != "search"])
def test_a_tail_of_other_transforms(cuda: Any, type: str, mode: str) -> None:
    check_case(cuda, Case(type, type, 128, 128, mode=mode, tail=50, first=1))


def test_unequal_tokens(cuda: Any) -> None:
    for type in reference.TYPES:
        check_case(cuda, Case(type, type, 128, 128, n_kv=600, spread=1.5, sinks=True))


@pytest.mark.parametrize("type", ["pqo3", "pqt4", *STOCK])
def test_hidden_tokens_may_hold_anything(cuda: Any, type: str) -> None:
    other = "pqo4" if type in STOCK else type
    for poison, k_type, v_type in (("k", type, other), ("v", other, type)):
        for head_dim in (64, 96):  # both kernels
            shape = {"head_dim_k": head_dim, "head_dim_v": head_dim, "n_kv": 77, "n_q": 2}
            check_case(cuda, Case(k_type, v_type, mask="last", poison=poison, **shape))


def test_nan_in_q_gives_nan(cuda: Any) -> None:
    for n_kv in (50, 900):
        got, _ = compute(cuda, Case(poison="q", n_kv=n_kv))
        assert np.isnan(got).all()


def test_sinks_of_minus_infinity_change_nothing(cuda: Any) -> None:
    got, _ = compute(cuda, Case(sinks=True, poison="sinks"))
    want, _ = compute(cuda, Case())
    np.testing.assert_array_equal(got, want)


def test_less_shared_memory(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turing has 64 KiB, Ampere and Ada for consumers 99: other tiles, or a refusal that says why."""
    if not cuda.emulated:
        pytest.skip("a device has what it has")
    monkeypatch.setenv("TQ_HOST_SHARED_KIB", "99")
    for type in reference.TYPES:
        check_case(cuda, Case(type, type, 576, 512, n_head=16, n_head_kv=1, n_kv=100))
    monkeypatch.setenv("TQ_HOST_SHARED_KIB", "64")
    for type in reference.TYPES:
        check_case(cuda, Case(type, type, 256, 256, n_q=8, n_kv=100))
    args = usable(cuda)
    args.q.head_dim = args.k.head_dim = 2048
    assert cuda.lib.tq_cuda_attn_supported(args) == -3
    assert "shared memory" in cuda.message()


@pytest.mark.parametrize("n_sm", [1, 5, 40])
def test_any_number_of_splits(cuda: Any, monkeypatch: pytest.MonkeyPatch, n_sm: int) -> None:
    if not cuda.emulated:
        pytest.skip("a device has what it has")
    monkeypatch.setenv("TQ_HOST_SM", str(n_sm))
    for n_kv in (129, 1000):
        check_case(cuda, Case(n_kv=n_kv, sinks=True, mask="window", n_head=6, n_head_kv=2))


@pytest.mark.parametrize("mask", ["none", "causal", "window", "holes", "values"])
@pytest.mark.parametrize("shared_kib", [227, 64])
def test_many_tiles_per_warp(cuda: Any, monkeypatch: pytest.MonkeyPatch, mask: str, shared_kib: int) -> None:
    """Three stages and two; masks copied 16 bytes at a time and value by value; scores so large that bases rise."""
    if cuda.emulated:
        monkeypatch.setenv("TQ_HOST_SM", "1")
        monkeypatch.setenv("TQ_HOST_SHARED_KIB", str(shared_kib))
    for n_kv, head_dim, n_q in ((1504, 128, 1), (1501, 128, 1), (1200, 64, 3)):
        mixed = ("pqo4", "pqo3")
        for pair in ("pqo3",) * 2, ("pqt4",) * 2 if n_q == 1 else ("pqo4",) * 2, mixed:
            n_head_kv = 256 // head_dim  # 16 bytes at a time; of 64 values, some heads need fewer copies than others
            case = Case(
                *pair,
                head_dim,
                head_dim,
                n_head=8,
                n_head_kv=n_head_kv,
                n_kv=n_kv,
                n_q=n_q,
                mask=mask,
                q_scale=8.0,
            )
            check_case(cuda, case)


# Heads of 256 and 512: query rows of 8 query heads, one tile of vectors or two, with 1, 2 and 4 warps to a head.
LARGE_HEADS = [(256, 1), (256, 2), (512, 1), (512, 2)]


def large(head_dim: int, n_q: int, types: tuple[str, str] = ("pqo3", "pqo3"), **options: Any) -> Case:
    """8 n_q query vectors of a KV head."""
    return Case(*types, head_dim, head_dim, n_head=8, n_head_kv=1, n_q=n_q, **options)


@pytest.mark.parametrize(("head_dim", "n_q"), LARGE_HEADS)
def test_large_heads(cuda: Any, monkeypatch: pytest.MonkeyPatch, head_dim: int, n_q: int) -> None:
    """Many tiles per warp, some of them hidden; scores so large that bases rise; warps that have no tile at all."""
    if cuda.emulated:
        monkeypatch.setenv("TQ_HOST_SM", "1")
    n_kv = 405 * 256 // (head_dim * n_q)  # as many tiles for each warp, or team of warps
    for mask in ("none", "window"):
        check_case(cuda, large(head_dim, n_q, n_kv=n_kv, mask=mask, q_scale=8.0))
    check_case(cuda, large(head_dim, n_q, n_kv=23, mask="values", max_bias=8.0))
    check_case(cuda, large(head_dim, n_q, n_kv=150, softcap=2.5, sinks=True, mask="holes"))


@pytest.mark.parametrize(("head_dim", "n_q"), LARGE_HEADS)
def test_large_heads_of_every_type(cuda: Any, head_dim: int, n_q: int) -> None:
    for types in [(type, type) for type in reference.TYPES[1:]] + [("pqo4", "pqo3")]:
        check_case(cuda, large(head_dim, n_q, types, n_kv=70))


@pytest.mark.parametrize(("k_type", "v_type"), [(k, v) for k, v in PAIRS if k in STOCK or v in STOCK])
def test_stock_types_beside_ours(cuda: Any, monkeypatch: pytest.MonkeyPatch, k_type: str, v_type: str) -> None:
    """Every size of head and both numbers of vectors, with tiles of which some keys count, all or none."""
    if cuda.emulated:
        monkeypatch.setenv("TQ_HOST_SM", "1")
    for head_dim, n_q in ((64, 1), (128, 2), *LARGE_HEADS):
        check_case(cuda, large(head_dim, n_q, (k_type, v_type), n_kv=45, mask="causal"))
    check_case(cuda, large(64, 2, (k_type, v_type), n_kv=150, mask="window", sinks=True))
    check_case(cuda, large(128, 1, (k_type, v_type), n_kv=150, mask="holes", tail=20))


@pytest.mark.parametrize("types", [("pqt5", "pqt4"), ("pqt4", "pqt3"), ("pqt3", "pqt2")])
def test_pairs_of_presets(cuda: Any, types: tuple[str, str]) -> None:
    for head_dim, n_q in ((64, 1), (128, 2), *LARGE_HEADS):
        check_case(cuda, large(head_dim, n_q, types, n_kv=45))


@pytest.mark.parametrize(("head_dim", "n_q"), LARGE_HEADS)
def test_large_heads_in_ranges_with_a_tail(cuda: Any, monkeypatch: pytest.MonkeyPatch, head_dim: int, n_q: int) -> None:
    if cuda.emulated:
        monkeypatch.setenv("TQ_HOST_SM", "5")
    check_case(cuda, large(head_dim, n_q, n_kv=330, tail=40, first=4, mask="causal", sinks=True))


@pytest.mark.parametrize(("head_dim", "n_q"), LARGE_HEADS)
def test_large_heads_anywhere_in_memory(cuda: Any, head_dim: int, n_q: int) -> None:
    """KV heads whose rows begin at multiples of 16 or not, with 16 bytes copied at a time or fewer; a stage less."""
    shape = {"n_head": 8 * 3, "n_head_kv": 3, "n_q": n_q, "n_kv": 50}
    for type in ("pqo3", "pqo4", "pqt5"):
        for offset, gap in ((0, 0), (2, 0), (4, 0), (8, 8)):
            check_case(cuda, Case(type, type, head_dim, head_dim, offset=offset, gap=gap, **shape))


def test_large_heads_have_a_kernel(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch tells how many ranges there are: of few tiles as many as tiles, in the kernel for any pair, too."""
    if not cuda.emulated:
        pytest.skip("how many ranges there are depends on the device")
    args = usable(cuda)
    args.n_kv, args.q.n_head = 1024, 16
    for head_dim, n_q in LARGE_HEADS:
        alone = (head_dim, n_q) == (256, 1)  # a warp takes a head by itself
        monkeypatch.setenv("TQ_HOST_SM", "64" if alone else "16")
        args.q.head_dim = args.k.head_dim = args.v.head_dim = head_dim
        args.n_q = n_q
        n_parts = []
        for types in (("pqo3", "pqo3"), ("pqo3", "pqo4")):
            for x, type in zip((args.k, args.v), types, strict=True):
                x.type, x.stride_head = CACHE_TYPES[type].number, CACHE_TYPES[type].row_bytes(head_dim)
                x.stride_token = 2 * x.stride_head
            n_parts.append(cuda.lib.tq_cuda_attn_work_bytes(args) / (4 * 16 * n_q * (head_dim + 2)))
        assert n_parts[0] == (8 if alone else 16), (head_dim, n_q)
        assert not alone or n_parts[1] == 16


def test_the_pair_that_people_choose_has_a_kernel(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few keys each kernel makes as many ranges as it has tiles, of 128 or of 64: scratch tells which it is."""
    if not cuda.emulated:
        pytest.skip("how many ranges there are depends on the device")
    monkeypatch.setenv("TQ_HOST_SM", "132")
    args = usable(cuda)
    args.q.head_dim = args.k.head_dim = args.v.head_dim = 128
    args.n_kv = 1024
    work = {}
    for k_type, v_type in (("pqo3", "pqo3"), ("pqo4", "pqo3"), ("pqo3", "pqo4"), ("pqt3", "pqo3")):
        args.k.type, args.v.type = CACHE_TYPES[k_type].number, CACHE_TYPES[v_type].number
        work[k_type, v_type] = cuda.lib.tq_cuda_attn_work_bytes(args)
    assert work["pqo4", "pqo3"] == work["pqo3", "pqo3"]
    assert work["pqo3", "pqo4"] == work["pqt3", "pqo3"] > 1.9 * work["pqo3", "pqo3"]


def usable(cuda: Any) -> Any:
    args = cuda.ffi.new("tq_attn *")
    for operand, type, n_head in ((args.q, 0, 4), (args.k, 300, 2), (args.v, 300, 2)):
        operand.type, operand.head_dim, operand.n_head, operand.n_stream = type, 64, n_head, 1
        operand.stride_token, operand.stride_head = 512, 256
    args.n_q, args.n_kv, args.scale = 1, 10, 1.0
    args.out_stride_row, args.out_stride_head = 1024, 256
    assert cuda.lib.tq_cuda_attn_supported(args) == 0, cuda.message()
    return args


@pytest.mark.parametrize(
    ("field", "value", "status", "text"),
    [
        ("k.type", 6, -3, "type 6"),
        ("k.head_dim", 80, -3, "head_dim = 80"),
        ("v.head_dim", 544, -3, "up to 512"),
        ("k.decoder", 1, -3, "decoder"),
        ("q.type", 1, -1, "f32"),
        ("q.n_head", 5, -1, "multiple"),
        ("k.stride_token", 27, -1, "even"),
        ("n_kv", -1, -1, "n_kv = -1"),
        ("out_stride_head", 6, -1, "multiples of four"),
        ("k.tail.data", 2, -1, "a tail of 0 and 0 rows"),
    ],
)
def test_what_is_refused_is_named(cuda: Any, field: str, value: int, status: int, text: str) -> None:
    args = usable(cuda)
    *path, name = field.split(".")
    target = args
    for part in path:
        target = getattr(target, part)
    field_type = dict(cuda.ffi.typeof(target[0] if target is args else target).fields)[name].type
    setattr(target, name, cuda.ffi.cast(field_type, value))
    if field == "k.head_dim":
        args.q.head_dim = value
    assert cuda.lib.tq_cuda_attn_supported(args) == status
    assert text in cuda.message()
    assert cuda.lib.tq_cuda_attn_work_bytes(args) == 2**64 - 1
    assert cuda.lib.tq_cuda_attn(args, cuda.ffi.NULL, cuda.ffi.NULL) == status


def test_one_side_is_of_tqggufs_types(cuda: Any) -> None:
    for k_type, v_type in ((1, 1), (1, 8), (8, 1), (8, 8)):
        args = usable(cuda)
        args.k.type, args.v.type = k_type, v_type
        assert cuda.lib.tq_cuda_attn_supported(args) == -3
        assert f"of types {k_type} and {v_type}; at least one must be of tqgguf's" in cuda.message()


def test_a_batch_has_a_row_for_each_of_its_tokens(cuda: Any) -> None:
    args = usable(cuda)
    tails = args.k.tail, args.v.tail
    for tail in tails:
        tail.n_recent, tail.n_own = 8, 1
    assert cuda.lib.tq_cuda_attn_supported(args) == 0, cuda.message()
    for n_q, of_v, streams in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        args.n_q, tails[1].n_own, args.q.n_stream = n_q, of_v, streams
        assert cuda.lib.tq_cuda_attn_supported(args) == -1
        assert "a row of its own for each query row" in cuda.message()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    pair=st.sampled_from(PAIRS),
    blocks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    group=st.integers(1, 9),
    n_head_kv=st.integers(1, 2),
    n_q=st.integers(1, 4),
    n_kv=st.integers(1, 300),
    mask=st.sampled_from(["none", "holes", "values", "window"]),
    softcap=st.sampled_from([0.0, 3.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    cuda: Any,
    pair: tuple[str, str],
    blocks: tuple[int, int],
    group: int,
    n_head_kv: int,
    n_q: int,
    n_kv: int,
    mask: str,
    softcap: float,
    sinks: bool,
    seed: int,
) -> None:
    if n_kv == 1 and mask == "holes":
        mask = "none"
    dims = (32 * blocks[0], 32 * blocks[1])
    case = Case(
        *pair,
        *dims,
        n_head=group * n_head_kv,
        n_head_kv=n_head_kv,
        n_q=n_q,
        n_kv=n_kv,
        mask=mask,
        softcap=softcap,
        sinks=sinks,
        seed=seed,
    )
    check_case(cuda, case)
