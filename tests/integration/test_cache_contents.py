"""`inspect_cache` and `inspect_session`: figures that can be checked, every cache layout, and damaged state files."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tqgguf
from tqgguf._native import import_llama_cpp
from tqgguf.cache.policy import resolve
from tqgguf.demo import model as demo
from tqgguf.diagnostics.cache_contents import inspect_cache, inspect_session
from tqgguf.errors import ArgumentError, CacheClosedError, SessionError, StateFileError, UnsupportedError
from tqgguf.gguf.info import read_model_info
from tqgguf.session.state import parse_state, read_state

llama_cpp: Any = import_llama_cpp()

pytestmark = pytest.mark.model

Model = Callable[..., Path]
TEXT = ("The capital of France is Paris. What is the capital of Spain? Madrid. " * 40).encode()


@contextlib.contextmanager
def read(path: Path, cache: Any, n: int = 300, **options: Any) -> Iterator[tqgguf.Llama]:
    """A model that has read n tokens."""
    options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **options}
    with contextlib.closing(tqgguf.Llama(path, cache=cache, **options)) as model:
        model.eval(model.tokenize(TEXT)[:n])
        yield model


def save(model: tqgguf.Llama, path: Path, sequence: bool = False) -> Path:
    ids = (llama_cpp.llama_token * model.n_tokens)(*model.input_ids[: model.n_tokens].tolist())
    if sequence:
        assert llama_cpp.llama_state_seq_save_file(model.ctx, str(path).encode(), 0, ids, len(ids))
    else:
        assert llama_cpp.llama_state_save_file(model.ctx, str(path).encode(), ids, len(ids))
    return path


def state_of(model: tqgguf.Llama) -> bytes:
    size = llama_cpp.llama_state_get_size(model.ctx)
    data = (ctypes.c_uint8 * size)()
    return bytes(data[: llama_cpp.llama_state_get_data(model.ctx, data, size)])


@pytest.mark.parametrize("cache", ["f16", "q8_0", "pqo3", "pqt4", ("pqo4", "q8_0")])
def test_files_hold_what_the_context_holds(tmp_path: Path, cache: Any) -> None:
    with read(demo.MODEL_PATH, cache) as model:
        live = inspect_cache(model)
        for sequence in (False, True):
            found = inspect_session(save(model, tmp_path / "s", sequence), demo.MODEL_PATH)
            assert found.tensors == live.tensors and found.n_cells == live.n_cells == 300
        k, v = cache if isinstance(cache, tuple) else (cache, cache)
        assert [t.type for t in live.tensors] == [k, v] * 4 and len(live.tensors[0].heads) == 2
        info = model.cache_info()
        assert live.bytes == sum(layer.bytes_per_token for layer in info.layers) * 300


def test_sessions_hold_what_the_context_holds(tmp_path: Path, random_model: Model) -> None:
    path = tmp_path / "talk.session"
    with read(demo.MODEL_PATH, ("pqo4", "q8_0")) as model:
        live = inspect_cache(model)
        model.save_session(path)
    found = inspect_session(path, demo.MODEL_PATH)
    assert found.tensors == live.tensors and found.n_cells == 300 and found.source == str(path)
    assert not any("does not tell" in note for note in found.notes)
    with pytest.raises(SessionError, match="saved with another model, tqgguf demo"):
        inspect_session(path, random_model())
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(SessionError, match="checksum of its contents"):
        inspect_session(path, demo.MODEL_PATH)
    path.write_bytes(data[:100])
    with pytest.raises(SessionError, match="truncated"):
        inspect_session(path, demo.MODEL_PATH)


def test_estimates_agree_with_what_the_values_themselves_give() -> None:
    with read(demo.MODEL_PATH, "f32") as model:
        exact = inspect_cache(model)
    for cache in ("q8_0", "q4_0", "pqo3", "pqo4"):
        with read(demo.MODEL_PATH, cache, tail=0) as model:
            near = inspect_cache(model)
        for a, b in zip(
            exact.tensors[:2], near.tensors[:2], strict=True
        ):  # the first layer's are the same but for rounding
            for x, y in zip(a.heads, b.heads, strict=True):
                assert y.norm == pytest.approx(x.norm, rel=0.02)
                assert y.offset == pytest.approx(x.offset, abs=0.02)
                assert y.nmse_3 == pytest.approx(x.nmse_3, rel=0.12)
                assert y.nmse_4 == pytest.approx(x.nmse_4, rel=0.12)
                assert y.bit_gain == pytest.approx(y.nmse_3 / y.nmse_4)


def test_code_use() -> None:
    for cache, levels in (("pqo3", 8), ("pqo4", 16), ("pqt3", 16), ("pqt4", 32), ("pqt2", 8), ("pqt5", 64)):
        with read(demo.MODEL_PATH, cache) as model:
            heads = [head for tensor in inspect_cache(model).tensors for head in tensor.heads]
        for head in heads:
            assert len(head.codes) == levels and sum(head.codes) == pytest.approx(1)
            assert np.log2(levels) - 0.4 < head.entropy < np.log2(levels)
            assert head.scale > 0
    with read(demo.MODEL_PATH, "q4_0") as model:
        contents = inspect_cache(model)
    assert contents.tensors[0].heads[0].codes == () and contents.tensors[0].heads[0].scale is None
    assert any("types of tqgguf" in note for note in contents.notes)


def test_offsets_and_outliers_are_found(random_model: Model) -> None:
    with read(random_model(arch="qwen2", head_dim=32, n_head=2, n_head_kv=2, key_bias=200.0), "pqo4", tail=0) as model:
        k, v = inspect_cache(model).tensors[:2]
    # A constant was added to every key; RoPE still turns the first pair of channels through the circle.
    assert min(head.offset for head in k.heads) > 0.8 > 0.7 > max(head.offset for head in v.heads)
    assert not any(head.outliers for head in v.heads)


def test_outliers_behind_a_rotation_are_found_where_they_are(random_model: Model) -> None:
    path = random_model(arch="qwen2", head_dim=64, n_head=1, n_head_kv=1, key_bias=200.0, seed=1)
    found = {}
    for cache in ("f16", "q8_0", "pqo4"):
        with read(path, cache, tail=0) as model:
            found[cache] = [head.outliers for tensor in inspect_cache(model).side("K") for head in tensor.heads]
    assert any(found["f16"]) and found["q8_0"] == found["pqo4"] == found["f16"]


@pytest.mark.parametrize("cache", ["pqo4", "q8_0"])
def test_calibrated_keys_are_shown_as_they_were(random_model: Model, cache: str) -> None:
    path = random_model(arch="qwen2", head_dim=64, n_head=1, n_head_kv=1, key_bias=200.0, seed=1)
    calibration = tqgguf.calibrate(path, TEXT.decode(), n_tokens=64)
    policy = calibration.applied(resolve(cache, 2), read_model_info(path))
    with read(path, policy, tail=0) as model, read(path, "f16", tail=0) as exact:
        found, plain = inspect_cache(model), inspect_cache(exact)
    for mine, other in zip(found.side("K"), plain.side("K"), strict=True):
        head, its = mine.heads[0], other.heads[0]
        assert head.outliers == its.outliers and head.norm == pytest.approx(its.norm, rel=0.02)
        assert head.offset == pytest.approx(its.offset, rel=0.02)
        gain = calibration.gains[mine.layer]
        assert head.gain == (gain.min(), gain.max()) and 0.5 < head.mean < 1.1
        assert (its.mean, its.gain) == (0.0, (1.0, 1.0))
    assert any("stored calibrated" in note for note in found.notes)
    assert {(head.mean, head.gain) for tensor in found.side("V") for head in tensor.heads} == {(0.0, (1.0, 1.0))}


def test_a_sample_is_enough() -> None:
    with read(demo.MODEL_PATH, "pqo3") as model:
        whole, part = inspect_cache(model), inspect_cache(model, sample=100)
        assert part.n_sampled == 100 and part.n_cells == 300 and part.bytes == whole.bytes
        for a, b in zip(whole.tensors, part.tensors, strict=True):
            assert b.heads[0].norm == pytest.approx(a.heads[0].norm, rel=0.05)
        with pytest.raises(ArgumentError, match="sample is 0"):
            inspect_cache(model, sample=0)


@pytest.mark.parametrize("name", ["gemma3", "deepseek2", "jamba", "falcon-h1", "gpt2"])
@pytest.mark.parametrize("cache", ["f16", "pqo3"])
def test_every_layout_of_a_cache(architecture: Model, tmp_path: Path, name: str, cache: str) -> None:
    path = architecture(name)
    info = read_model_info(path)
    with read(path, cache, n=150, swa_full=False) as model:
        live = inspect_cache(model)
        found = inspect_session(save(model, tmp_path / "s"), path)
    assert found.tensors == live.tensors
    assert [t.layer for t in live.side("K")] == [layer.index for layer in info.layers]
    assert len(live.side("V")) == (0 if info.mla else len(info.layers))


def test_nothing_to_look_at(architecture: Model) -> None:
    model = tqgguf.Llama(demo.MODEL_PATH, n_ctx=256, n_threads=1, verbose=False)
    with pytest.raises(ArgumentError, match="empty"):
        inspect_cache(model)
    model.close()
    with pytest.raises(CacheClosedError):
        inspect_cache(model)
    with pytest.raises(UnsupportedError, match="does not exist"), read(architecture("mamba"), "f16") as model:
        inspect_cache(model)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with read(demo.MODEL_PATH, "pqo3", n=5, n_ctx=256, tail=0) as model:
        return save(model, tmp_path_factory.mktemp("session") / "five.session")


def test_every_truncation_is_told_and_no_damage_crashes(session: Path, tmp_path: Path) -> None:
    info, data = read_model_info(demo.MODEL_PATH), session.read_bytes()
    path = tmp_path / "cut"
    lengths = {*range(200), *range(200, len(data), 37), len(data) - 1}
    for n in lengths:
        path.write_bytes(data[:n])
        with pytest.raises(StateFileError):
            read_state(path, info)
    path.write_bytes(data + b"\0")
    with pytest.raises(StateFileError, match="1 bytes follow"):
        read_state(path, info)
    rng = np.random.default_rng(0)
    for at in [*range(200), *rng.integers(200, len(data), 200).tolist()]:
        for value in (0xFF, 0x80, 1):
            path.write_bytes(data[:at] + bytes([data[at] ^ value]) + data[at + 1 :])
            with contextlib.suppress(StateFileError):
                assert read_state(path, info).n_cells <= len(data)


def test_counts_of_a_file_are_not_trusted(session: Path) -> None:
    info, data = read_model_info(demo.MODEL_PATH), session.read_bytes()
    body = data[12 + 4 * 5 :]  # magic, version, number of tokens, tokens
    assert parse_state(body, info).n_cells == 5
    at = 4 + len("llama")  # then streams, cells
    for field, value, said in ((at, 257, "257 streams"), (at, 0, "0 streams"), (at + 4, 2**31, "announces 2147483648")):
        with pytest.raises(StateFileError, match=said):
            parse_state(body[:field] + struct.pack("<I", value) + body[field + 4 :], info)
    for field, value, said in ((0, 2**32 - 1, "name are announced"), (at + 12, 10**6, "sequences")):
        with pytest.raises(StateFileError, match=said):
            parse_state(body[:field] + struct.pack("<I", value) + body[field + 4 :], info)


def test_files_of_another_kind(session: Path, tmp_path: Path, architecture: Model, random_model: Model) -> None:
    info, data = read_model_info(demo.MODEL_PATH), session.read_bytes()
    path = tmp_path / "other"
    for content, said in (
        (b"", "empty"),
        (b"GGUF" + bytes(100), "neither a session of tqgguf nor a state of llama.cpp"),
        (data[:4] + struct.pack("<I", 9) + data[8:], "version 9, this tqgguf reads version 10"),
    ):
        path.write_bytes(content)
        with pytest.raises(StateFileError, match=said):
            read_state(path, info)
    with pytest.raises(StateFileError, match="No such file"):
        read_state(tmp_path / "missing", info)
    with pytest.raises(StateFileError, match="it is no regular file"):
        read_state(tmp_path, info)
    for other, said in ((architecture("qwen3"), "architecture 'llama'"), (random_model(n_layer=3), "4 layers")):
        with pytest.raises(StateFileError, match=said):
            inspect_session(session, other)
    with pytest.raises(StateFileError, match="of 56 bytes, 112 expected"):
        inspect_session(session, random_model(n_layer=4, n_head_kv=4))


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    with read(demo.MODEL_PATH, "f16", n=5) as model:
        data = bytearray(save(model, tmp_path / "s").read_bytes())
    data[-2:] = b"\x00\x7e"  # V of the last layer
    (tmp_path / "s").write_bytes(data)
    contents = inspect_session(tmp_path / "s", demo.MODEL_PATH)
    assert "layer 3: 1 of the sampled values of V are not finite and count as 0" in contents.notes
    assert all(np.isfinite(head.norm + head.nmse_3) for tensor in contents.tensors for head in tensor.heads)
