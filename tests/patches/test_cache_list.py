"""The list of the cache tensors that llama.cpp made: it tells what the tensors are, not what was asked for."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tqgguf._native import import_llama_cpp, library_path
from tqgguf.cache.tensors import calibration_sum
from tqgguf.config import CACHE_TYPES

api: Any = import_llama_cpp()
base = ctypes.CDLL(str(library_path("ggml-base")))
base.tq_ggml_sizeof.restype = ctypes.c_size_t


class Note(ctypes.Structure):
    """`struct tq_ggml_cache_tensor` of tq_ggml_cache.h."""

    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("device", ctypes.c_char * 64),
        *((name, ctypes.c_int64) for name in ("n_embd", "n_cells", "n_stream", "bytes", "n_mean", "n_gain")),
        *(("calibration_sum", ctypes.c_uint64), ("tail_bytes", ctypes.c_int64)),
        *((name, ctypes.c_int32) for name in ("layer", "side", "type", "tail_recent", "tail_first", "rotated")),
    )


class LayerPolicy(ctypes.Structure):
    """`struct tq_ggml_layer_policy` of tq_ggml_policy.h."""

    _fields_ = (
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("k_mean", ctypes.POINTER(ctypes.c_float)),
        ("k_gain", ctypes.POINTER(ctypes.c_float)),
        ("n_mean", ctypes.c_int64),
        ("n_gain", ctypes.c_int64),
    )


MEAN = np.random.default_rng(0).standard_normal(128).astype(np.float32)
GAIN = np.exp(MEAN[::-1])


def number(name: str) -> int:
    return CACHE_TYPES[name].number


def notes() -> list[Note]:
    """The calling thread's list."""
    n = base.tq_ggml_cache_list(None, 0)
    to = (Note * n)()
    assert base.tq_ggml_cache_list(to, n) == n
    return list(to)


@contextlib.contextmanager
def loaded(path: Path) -> Iterator[Any]:
    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    assert model
    yield model
    api.llama_model_free(model)


def made(
    model: Any,
    types: str | list[str | tuple[str, str]] = "f16",
    *,
    tail: int = 0,
    stock_tail: int = 0,
    flash: bool = True,
    means: dict[int, Any] | None = None,
    gains: dict[int, Any] | None = None,
    n_seq: int = 1,
    n_ctx: int = 512,
) -> list[Note]:
    """The notes of a context whose K and V have one type, or a type or a pair for each layer.

    Args:
        means: values of the mean key, by layer.
        gains: values of the gain, by layer.
    """
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = n_ctx
    params.n_seq_max, params.kv_unified, params.swa_full = n_seq, False, False
    params.flash_attn_type = int(flash)
    by_layer = [(t, t) if isinstance(t, str) else t for t in ([types] if isinstance(types, str) else types)]
    params.type_k, params.type_v = map(number, by_layer[0])
    layers = (LayerPolicy * len(by_layer))(*((number(k), number(v)) for k, v in by_layer))
    kept = []
    for name, vectors in (("mean", means or {}), ("gain", gains or {})):
        for layer, values in vectors.items():
            kept.append((ctypes.c_float * len(values))(*values))
            setattr(layers[layer], f"k_{name}", kept[-1])
            setattr(layers[layer], f"n_{name}", len(values))
    if not isinstance(types, str):
        base.tq_ggml_policy_set(layers, len(by_layer))
    base.tq_ggml_tail_set(tail, stock_tail)
    base.tq_ggml_cache_list_begin()
    context = api.llama_init_from_model(model, params)
    found = notes()
    base.tq_ggml_cache_list_end()
    base.tq_ggml_tail_set(0, 0)
    base.tq_ggml_policy_set(None, 0)
    assert context
    api.llama_free(context)
    return found


def test_each_tensor_is_noted_as_it_is(random_model: Callable[..., Path]) -> None:
    types = ["pqo3", "f16", "pqt4"]
    with loaded(random_model(n_layer=3)) as model:
        found = made(model, [*types], tail=100, means={1: MEAN}, gains={1: GAIN, 2: GAIN})
    assert [(note.layer, note.side) for note in found] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    for note in found:
        kind, k_or_v = CACHE_TYPES[types[note.layer]], "kv"[note.side]
        assert note.name == f"cache_{k_or_v}_l{note.layer}".encode()
        assert (note.n_embd, note.n_cells, note.n_stream) == (128, 512, 1)
        assert (note.type, note.bytes) == (kind.number, 512 * kind.row_bytes(128))
        mean = MEAN if (note.layer, k_or_v) == (1, "k") else None
        gain = GAIN if (note.layer > 0 and k_or_v == "k") else None
        assert (note.n_mean, note.n_gain) == (0 if mean is None else 128, 0 if gain is None else 128)
        assert note.calibration_sum == calibration_sum(mean, gain) and bool(note.calibration_sum) == (gain is not None)
        tail = (100, 4, 104 * (128 * 2 + 4)) if kind.ours else (0, 0, 0)
        assert (note.tail_recent, note.tail_first, note.tail_bytes) == tail
        assert (note.device, note.rotated) == (b"CPU", (note.layer, k_or_v) == (2, "k"))


def test_which_tensors_get_a_tail(random_model: Callable[..., Path]) -> None:
    types = ["pqo3", "q8_0", "f16"]
    with loaded(random_model(n_layer=3)) as model:
        for tails, want in (((9, 0), (9, 0, 0)), ((9, 7), (9, 7, 0)), ((0, 7), (0, 7, 0)), ((-1, -1), (0, 0, 0))):
            found = made(model, [*types], tail=tails[0], stock_tail=tails[1])
            assert [note.tail_recent for note in found] == [n for n in want for _ in "kv"]
        for flash, recent in ((True, [7, 0]), (False, [0, 0])):  # without flash attention nothing would read a tail
            found = made(model, [("q8_0", "f16")] * 3, stock_tail=7, flash=flash)
            assert [note.tail_recent for note in found] == recent * 3


def test_the_sum_of_a_calibration_tells_every_value_and_its_place() -> None:
    sums = {calibration_sum(MEAN, GAIN), calibration_sum(GAIN, MEAN), calibration_sum(MEAN, None)}
    for i in (0, 77, 127):
        other = MEAN.copy()
        other[i] = np.nextafter(other[i], np.float32(9))
        sums |= {calibration_sum(other, GAIN), calibration_sum(MEAN, other)}
    assert len(sums) == 9


def test_rotation_is_each_layers_own_where_keys_are_calibrated(
    random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    types = ["q8_0", "f16", "pqo3", "q4_0"]

    def rotated(**options: Any) -> list[int]:
        return [note.rotated for note in made(model, [*types], **options) if note.side == 0]

    with loaded(random_model(n_layer=4)) as model:
        assert rotated() == [0, 0, 0, 0]  # llama.cpp rotates all or none
        assert rotated(gains={1: GAIN}) == rotated(means={2: MEAN}) == [1, 0, 0, 1]
        assert rotated(gains={2: GAIN}) == [1, 0, 1, 1]  # a type of ours behind its own gain
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
        assert rotated(gains={1: GAIN}) == [0, 0, 0, 0]
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "0")
        base.tq_ggml_policy_set_rotation(False)
        assert rotated(gains={1: GAIN}) == [0, 0, 0, 0]
        base.tq_ggml_policy_set_rotation(True)
    with loaded(random_model(n_layer=4, head_dim=96)) as model:
        wide = np.ones(192)
        assert rotated(gains={1: wide}) == [0, 0, 0, 0]  # as llama.cpp, which rotates by 64 or more


def test_a_tail_is_no_longer_than_its_stream_and_there_is_one_for_each(random_model: Callable[..., Path]) -> None:
    with loaded(random_model(n_layer=1)) as model:
        for note in made(model, "pqo4", tail=1000, n_seq=2):
            assert (note.n_cells, note.n_stream, note.tail_recent, note.tail_first) == (256, 2, 256, 4)
            assert note.tail_bytes == 2 * 260 * (128 * 2 + 4)


def test_windows_are_a_second_cache_after_the_first(random_model: Callable[..., Path]) -> None:
    with loaded(random_model(arch="gemma2", n_layer=4)) as model:
        found = made(model, n_ctx=2048)
    assert [(note.layer, note.side) for note in found] == [(il, side) for il in (1, 3, 0, 2) for side in (0, 1)]
    assert [note.n_cells for note in found] == [2048] * 4 + [768] * 4  # 48 + n_ubatch = 560, in steps of 256


@pytest.mark.parametrize(("name", "layers", "sides"), [("deepseek2", 4, 1), ("falcon-h1", 4, 2), ("mamba", 0, 0)])
def test_what_has_no_cells_or_no_v_is_not_noted(
    architecture: Callable[[str], Path], name: str, layers: int, sides: int
) -> None:
    with loaded(architecture(name)) as model:
        found = made(model)
    assert [(note.layer, note.side) for note in found] == [(il, side) for il in range(layers) for side in range(sides)]


def test_the_device_is_the_one_that_the_log_names(random_model: Callable[..., Path]) -> None:
    log: list[str] = []
    callback = api.llama_log_callback(lambda level, text, data: log.append(text.decode()))
    before, user_data = api.llama_log_callback(), ctypes.c_void_p()
    api.llama_log_get(ctypes.byref(before), ctypes.byref(user_data))
    with loaded(random_model(n_layer=2)) as model:
        api.llama_log_set(callback, None)
        found = made(model)
        api.llama_log_set(before, user_data)
    named = dict(re.findall(r"layer +(\d+): dev = (\S+)", "".join(log)))
    assert {str(note.layer): note.device.decode() for note in found} == named and named


def test_only_the_thread_that_asked_is_told_and_only_until_it_ends(random_model: Callable[..., Path]) -> None:
    with loaded(random_model(n_layer=1)) as model:
        base.tq_ggml_cache_list_begin()
        other = threading.Thread(target=lambda: seen.append(len(made(model))))
        seen: list[int] = []
        other.start()
        other.join()
        assert (seen, notes()) == ([2], [])
        assert len(made(model)) == 2  # and ends
        params = api.llama_context_default_params()
        params.n_ctx = 512
        api.llama_free(api.llama_init_from_model(model, params))
        assert notes() == []


def test_a_thread_may_forbid_the_rotation_of_its_own_contexts(random_model: Callable[..., Path]) -> None:
    rotated: dict[str, list[int]] = {}

    def note(key: str) -> None:
        rotated[key] = [x.rotated for x in made(model, "q8_0")]

    def without() -> None:
        base.tq_ggml_policy_set_rotation(False)
        note("forbidden")
        other = threading.Thread(target=note, args=("in another thread",))
        other.start()
        other.join()
        base.tq_ggml_policy_set_rotation(True)
        note("allowed")

    with loaded(random_model(n_layer=1)) as model:
        without()
    assert rotated == {"forbidden": [0, 0], "in another thread": [1, 1], "allowed": [1, 1]}


def test_sizes_of_structs_that_python_declares_again() -> None:
    sizes = {name: base.tq_ggml_sizeof(name.encode()) for name in ("tq_ggml_cache_tensor", "tq_ggml_layer_policy")}
    assert sizes == {"tq_ggml_cache_tensor": ctypes.sizeof(Note), "tq_ggml_layer_policy": ctypes.sizeof(LayerPolicy)}
    upstreams = [base.tq_ggml_sizeof(name) for name in (b"ggml_tensor", b"ggml_type_traits", b"ggml_threadpool_params")]
    assert all(upstreams) and base.tq_ggml_sizeof(b"another") == 0
