"""Fused attention on compressed K and V against the float64 oracle on the decoded values."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import here
import numpy as np
import numpy.typing as npt
import pytest
from attention_case import Case, arguments, make_inputs, tail_index
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tqgguf import reference
from tqgguf.config import MODES
from tqgguf.errors import ArgumentError

INTEGER_TOLERANCE = 1e-3
"""Relative L2 error of the output where a kernel sums 16-bit integers: measured are 3.5e-4 at most."""
TOLERANCE = 1e-5
"""The same for all other kernels: measured are 1e-6 at most, what float32 sums leave."""


def check_case(native: Any, case: Case) -> None:
    """Computes a case and asserts that it agrees with the oracle."""
    got, want = compute(native, case)
    assert np.isfinite(got).all()
    scale = float(np.linalg.norm(want))
    allowed = INTEGER_TOLERANCE if native.active_kernel() in here.INTEGER_SUMS else TOLERANCE
    assert np.linalg.norm(got - want) <= allowed * max(scale, 1e-3), case


def compute(native: Any, case: Case) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The library's output and the oracle's, both (n_stream, n_q, n_head, head_dim_v)."""
    ffi, lib = native.ffi, native.lib
    inputs, kept = make_inputs(case), []

    def put(array: npt.NDArray[Any], offset: int) -> Any:
        moved = np.zeros(array.nbytes + offset, dtype=np.uint8)
        moved[offset:] = array.reshape(-1).view(np.uint8)
        kept.append(moved)
        return ffi.cast("void *", moved.ctypes.data + offset)

    out = np.full(inputs.want.shape, np.nan, dtype=np.float32)
    args = arguments(ffi, case, inputs, out, put)
    args.out = ffi.from_buffer("float[]", out, require_writable=True)
    n_bytes = lib.tq_attn_work_bytes(args, case.n_threads)
    assert n_bytes > 0, ffi.string(lib.tq_last_error())
    scratch = put(np.full(n_bytes, 0xFF, dtype=np.uint8), case.offset)
    for phase in (0, 1):
        for thread in range(case.n_threads):
            native.check(lib.tq_attn_compute(args, phase, thread, case.n_threads, scratch))
    return out.astype(np.float64), inputs.want


def plain_arguments(ffi: Any) -> tuple[Any, Any]:
    """Arguments that are good until something is changed in them, and the memory they point to."""
    args = ffi.new("tq_attn *")
    data = ffi.new("char[]", 1 << 16)
    for operand, type, n_head in ((args.q, 0, 4), (args.k, 300, 2), (args.v, 300, 2)):
        operand.data, operand.type, operand.head_dim, operand.n_head, operand.n_stream = data, type, 64, n_head, 1
    args.n_q, args.n_kv, args.scale, args.out = 1, 10, 1.0, ffi.cast("float *", data)
    return args, data


TYPE_PAIRS = [
    ("pqo3", "pqo3"),
    ("pqo4", "pqo4"),
    ("pqo4", "pqo3"),
    ("pqo3", "f16"),
    ("f16", "pqo4"),
    ("f32", "pqo3"),
    ("pqt3", "pqt3"),
    ("pqt4", "pqt4"),
    ("pqt3", "pqo4"),
    ("pqo3", "pqt4"),
    ("pqt4", "f16"),
    ("pqt2", "pqt2"),
    ("pqt5", "pqt5"),
    ("pqt5", "pqt2"),
    ("pqo4", "pqt5"),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("head_dim_k", "head_dim_v"), [(32 * i, 32 * i) for i in range(1, 9)] + [(576, 512), (192, 128)]
)
@pytest.mark.parametrize("n_q", [1, 7])
def test_head_sizes(kernel: str, native: Any, head_dim_k: int, head_dim_v: int, n_q: int) -> None:
    for k_type, v_type in TYPE_PAIRS:
        check_case(native, Case(k_type, v_type, head_dim_k, head_dim_v, n_q=n_q, n_kv=70, mask="holes"))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16])
def test_grouped_queries(kernel: str, native: Any, group: int) -> None:
    for n_head_kv in (1, 3):
        check_case(native, Case(n_head=group * n_head_kv, n_head_kv=n_head_kv, n_kv=130))
        check_case(
            native, Case("pqo4", "pqo4", n_head=group * n_head_kv, n_head_kv=n_head_kv, n_kv=33, n_q=3, mask="causal")
        )
        for types in (("pqt3", "pqt4"), ("pqt5", "pqt2")):
            check_case(native, Case(*types, n_head=group * n_head_kv, n_head_kv=n_head_kv, n_kv=130))


@pytest.mark.parametrize("mask", ["none", "causal", "holes", "values", "all"])
@pytest.mark.parametrize("n_q", [1, 2, 17, 40])
def test_masks(kernel: str, native: Any, mask: str, n_q: int) -> None:
    for n_mask_head in (1, 4):
        case = Case(mask=mask, n_q=n_q, n_kv=90, n_mask_head=n_mask_head, max_bias=8.0 if mask == "values" else 0.0)
        check_case(native, case)


def test_a_row_with_every_key_masked_gives_zeros(kernel: str, native: Any) -> None:
    for sinks in (False, True):
        got, _ = compute(native, Case(mask="all", n_q=9, sinks=sinks))
        assert not got[:, :5].any()
        assert (np.abs(got[:, 5:]).sum(axis=-1) > 0).all()


@pytest.mark.parametrize("n_q", [1, 12])
def test_sinks_softcap_alibi(kernel: str, native: Any, n_q: int) -> None:
    for sinks in (False, True):
        for softcap in (0.0, 2.5):
            for max_bias in (0.0, 8.0):
                mask = "values" if max_bias else "none"
                case = Case(n_q=n_q, n_head=6, sinks=sinks, softcap=softcap, max_bias=max_bias, mask=mask, n_kv=150)
                check_case(native, case)


@pytest.mark.parametrize("n_kv", [1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 127, 255, 257, 511, 700])
def test_lengths(kernel: str, native: Any, n_kv: int) -> None:
    for n_q, n_threads in ((1, 3), (5, 64)):
        check_case(native, Case(n_kv=n_kv, n_q=n_q, n_threads=n_threads, mask="causal" if n_kv >= n_q else "none"))


@pytest.mark.long
@pytest.mark.parametrize("type", reference.TYPES)
def test_outliers_and_tokens_of_very_different_size(kernel: str, native: Any, type: str) -> None:
    for n_kv in (64, 1000):
        check_case(native, Case(type, type, head_dim_k=128, head_dim_v=128, n_kv=n_kv, spread=2.0))


@pytest.mark.long
@pytest.mark.parametrize("n_kv", [1, 3, 7, 16, 65, 600])
@pytest.mark.parametrize("n_q", [1, 40])
def test_nan_in_q_is_never_hidden(kernel: str, native: Any, n_q: int, n_kv: int) -> None:
    for type in reference.TYPES:
        for n_threads in (1, 3):
            got, _ = compute(native, Case(type, type, n_q=n_q, n_kv=n_kv, poison="q", n_threads=n_threads))
            assert np.isnan(got).all()


@pytest.mark.parametrize("types", [("f16", "pqo3"), ("pqo3", "f16"), ("pqo4", "pqo4")])
@pytest.mark.parametrize("n_q", [1, 40])
def test_what_is_masked_does_not_count_whatever_it_is(
    kernel: str, native: Any, n_q: int, types: tuple[str, str]
) -> None:
    for poison in ("k", "v"):
        check_case(native, Case(*types, n_q=n_q, n_kv=70, mask="last", poison=poison))


@pytest.mark.parametrize("type", reference.TYPES)
@pytest.mark.parametrize("n_q", [1, 40])
def test_a_scale_that_is_not_finite_counts_as_zero(kernel: str, native: Any, n_q: int, type: str) -> None:
    for poison in ("k", "v"):
        got, _ = compute(native, Case(type, type, n_q=n_q, n_kv=5, poison=poison))
        assert np.isfinite(got).all()


@pytest.mark.long
@pytest.mark.parametrize("tail", [1, 31, 64, 128, 1000])
@pytest.mark.parametrize("n_q", [1, 3, 40])
def test_a_tail_is_read_where_it_owns_a_token(kernel: str, native: Any, n_q: int, tail: int) -> None:
    pairs = [("pqo3", "pqo3"), ("pqo4", "pqt3"), ("pqt4", "f16"), ("f16", "pqo4")]
    for k_type, v_type in (*pairs, ("f32", "f32"), ("f32", "pqo3"), ("f16", "f32")):
        for n_stream in (1, 2):
            case = Case(k_type, v_type, n_q=n_q, n_kv=300, n_stream=n_stream, tail=tail, first=4, mask="holes")
            check_case(native, case)


@pytest.mark.parametrize("tail", [1, 5, 64])
@pytest.mark.parametrize("n_q", [1, 2, 3, 40, 100])
def test_each_token_of_a_batch_reads_what_it_would_read_alone(kernel: str, native: Any, n_q: int, tail: int) -> None:
    pairs = [("pqo3", "pqo4"), ("pqt4", "pqt3"), ("pqt3", "f16"), ("f16", "pqo3"), ("f32", "f32"), ("pqo3", "f32")]
    for seed, (k_type, v_type) in enumerate(pairs):
        for n_stream, n_threads in ((1, 1), (3, 2)):
            shape = {"n_stream": n_stream, "n_mask_stream": n_stream, "n_threads": n_threads, "n_kv": 150}
            check_case(native, Case(k_type, v_type, n_q=n_q, tail=tail, first=4, batch=True, seed=seed, **shape))


@given(data=st.data())
def test_the_index_of_a_batch_says_when_rows_are_taken(native: Any, data: st.DataObject) -> None:
    n_recent, n_first = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 4))
    cells = data.draw(st.lists(st.integers(0, 30), unique=True, max_size=20))
    owner = data.draw(st.lists(st.integers(0, 31), min_size=n_recent + n_first, max_size=n_recent + n_first))
    case = Case(tail=n_recent, first=n_first)
    want = tail_index(np.array(owner, np.int32), np.array(cells, np.int64), case)
    got = np.empty_like(want)
    native.lib.tq_tail_batch(
        n_recent, n_first, owner, [7 + cell for cell in cells], 7, len(cells), native.ffi.from_buffer("int32_t[]", got)
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_tail_are_the_transform_rounded_to_f16(kernel: str, native: Any, mode: str) -> None:
    ffi, lib = native.ffi, native.lib
    x = np.random.default_rng(5).standard_normal((67, 32)).astype(np.float32) * np.logspace(-8, 5, 67)[:, None].astype(
        "f4"
    )
    x[5, 3], x[6, 4], x[7, 5] = np.nan, np.inf, -1e38
    want = reference.encode_tail(x, mode)
    got = np.empty(want.shape, np.float16)
    status = lib.tq_tail_encode(
        301, MODES.index(mode), ffi.from_buffer("float[]", x), x.size, ffi.from_buffer("uint16_t[]", got, True)
    )
    assert status == 0
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))


@pytest.mark.parametrize("field", ["owner", "n_recent", "n_first", "type", "n_own", "other"])
def test_a_tail_that_cannot_be_is_refused(native: Any, field: str) -> None:
    ffi, lib = native.ffi, native.lib
    args, data = plain_arguments(ffi)
    tail = args.k.tail
    tail.data, tail.owner, tail.n_recent = ffi.cast("uint16_t *", data), ffi.cast("int32_t *", data), 8
    assert lib.tq_attn_work_bytes(args, 1) > 0
    if field == "owner":
        tail.owner = ffi.NULL
    elif field == "n_recent":
        tail.n_recent = 0
    elif field == "n_first":
        tail.n_first = -1
    elif field == "n_own":
        tail.n_own = args.n_q + 1
    elif field == "other":
        tail.n_own = args.n_q
        args.v.tail = tail
        args.v.tail.n_recent = 9
    else:
        args.k.type = 1
    assert lib.tq_attn_work_bytes(args, 1) == 0
    assert b"tail" in ffi.string(lib.tq_last_error())


def test_sinks_of_minus_infinity_are_none(kernel: str, native: Any) -> None:
    got, _ = compute(native, Case(mask="all", n_q=9, sinks=True, poison="sinks"))
    assert not got[:, :5].any()
    assert np.isfinite(got).all()


def test_streams_and_unaligned_operands(kernel: str, native: Any) -> None:
    for offset in (1, 2, 3):
        check_case(native, Case(n_stream=3, n_q=4, offset=offset, n_threads=2, mask="causal"))
        check_case(native, Case("pqo4", "pqo3", n_stream=2, offset=offset))
        check_case(native, Case("pqt3", "pqt4", n_stream=2, offset=offset))


@pytest.mark.long
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.builds(
        Case,
        k_type=st.sampled_from([*reference.TYPES, "f16"]),
        v_type=st.sampled_from([*reference.TYPES, "f16"]),
        head_dim_k=st.sampled_from([32, 64, 96, 128, 160]),
        head_dim_v=st.sampled_from([32, 64, 128, 224]),
        n_head=st.sampled_from([2, 4, 6, 8]),
        n_head_kv=st.sampled_from([1, 2]),
        n_q=st.integers(1, 34),
        n_kv=st.integers(1, 300),
        n_stream=st.integers(1, 2),
        n_threads=st.integers(1, 9),
        mask=st.sampled_from(["none", "holes", "values", "all"]),
        sinks=st.booleans(),
        softcap=st.sampled_from([0.0, 1.5]),
        offset=st.integers(0, 3),
        tail=st.sampled_from([0, 0, 1, 5, 64, 100, 400]),
        first=st.integers(0, 5),
        batch=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
)
def test_any_case(kernel: str, native: Any, case: Case) -> None:
    check_case(native, replace(case, batch=case.batch and case.tail > 0 and case.n_q <= case.n_kv))


def test_threads_that_really_run_at_once(native: Any, tolerance: float) -> None:
    # The result does not depend on which thread takes which part, so a race would show as a difference.
    case = Case("pqo4", "pqo3", n_head=8, n_q=1, n_kv=2000, n_threads=4)
    first, want = compute(native, case)
    results = []

    def work() -> None:
        results.append(compute(native, case)[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        np.testing.assert_array_equal(result, first)
    assert np.linalg.norm(first - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_head", 3), ("head_dim_k", 48), ("n_kv", -1), ("n_q", -1), ("n_threads", 0), ("n_threads", -1)],
)
def test_bad_arguments(native: Any, field: str, value: int) -> None:
    ffi, lib = native.ffi, native.lib
    args, data = plain_arguments(ffi)
    n_threads = 1
    assert lib.tq_attn_work_bytes(args, n_threads) > 0
    if field == "n_head":
        args.q.n_head = value
    elif field == "head_dim_k":
        args.q.head_dim = args.k.head_dim = value
    elif field == "n_threads":
        n_threads = value
    else:
        setattr(args, field, value)
    assert lib.tq_attn_work_bytes(args, n_threads) == 0
    assert ffi.string(lib.tq_last_error())
    with pytest.raises(ArgumentError):
        native.check(lib.tq_attn_compute(args, 0, 0, n_threads, data))
