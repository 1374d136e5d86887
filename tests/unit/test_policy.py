"""Cache policies: ranges of layers, files, and what they refuse."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import tqgguf
import tqgguf.gguf.header
from tqgguf.cache.policy import CachePolicy, model_hash, policy_from_ranges, read_policy, refuse_impossible, resolve
from tqgguf.demo import model as demo
from tqgguf.errors import ArgumentError, ModelNotFoundError, PolicyError, TqggufError
from tqgguf.gguf.info import centring_obstacle, gain_obstacle


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({}, "pqo3 pqo3 pqo3 pqo3 pqo3"),
        ({"0-1": "q8_0", "-2:": "pqo4"}, "q8_0 q8_0 pqo3 pqo4 pqo4"),
        ({"3": "f16", "-1": "f32"}, "pqo3 pqo3 pqo3 f16 f32"),
        ({":2": "q8_0"}, "q8_0 q8_0 pqo3 pqo3 pqo3"),
        ({"1:-1": "q8_0"}, "pqo3 q8_0 q8_0 q8_0 pqo3"),
        ({2: "q8_0"}, "pqo3 pqo3 q8_0 pqo3 pqo3"),
    ],
)
def test_ranges(layers: Any, expected: str) -> None:
    policy = policy_from_ranges({"default": "pqo3", "layers": layers}, 5)
    assert policy.types_k == policy.types_v == tuple(expected.split())


def test_pairs_for_k_and_v_apart() -> None:
    policy = policy_from_ranges({"default": ("pqo4", "pqo3"), "layers": {"0": ("q8_0", "f16")}}, 2)
    assert policy.types_k == ("q8_0", "pqo4")
    assert policy.types_v == ("f16", "pqo3")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"layers": {}}, "has no default"),
        ({"default": "pqo3", "layer": {}}, "unknown key 'layer'"),
        ({"default": "pqo3", "layers": ["0"]}, "must be a mapping"),
        ({"default": "pqo3", "layers": {"first": "f16"}}, "'first' is no range"),
        ({"default": "pqo3", "layers": {"3-5": "f16"}}, "layers 0 to 3"),
        ({"default": "pqo3", "layers": {"-5": "f16"}}, "layers 0 to 3"),
        ({"default": "pqo3", "layers": {"2:2": "f16"}}, "names no layers"),
        ({"default": "pqo3", "layers": {"2-1": "f16"}}, "names no layers"),
        (
            {"default": "pqo3", "layers": {"0-2": "f16", "-2:": "q8_0"}},
            "'0-2' and '-2:' of a cache policy both name layer 2",
        ),
    ],
)
def test_what_is_no_policy(spec: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        policy_from_ranges(spec, 4)


def test_an_unknown_type_lists_the_valid_ones() -> None:
    with pytest.raises(ArgumentError, match=r"valid types are .*pqo4"):
        policy_from_ranges({"default": "pqo3", "layers": {"0": "pqo5"}}, 4)


def written(path: Path, **changes: Any) -> Path:
    """A policy file for the demo model."""
    mean = np.arange(128, dtype=np.float32).reshape(2, 64)
    fields = {"types_k": ("pqo4",) * 4, "types_v": ("pqo3",) * 4, "k_means": {1: mean, 3: -mean}, "model_hash": "abc"}
    fields["k_gains"] = {0: (1 + mean) / 8, 3: np.ones((2, 64), np.float32)}
    CachePolicy(**{**fields, **changes}).write(path)
    return path


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    policy = read_policy(written(tmp_path / "policy.gguf"))
    assert policy.types_k == ("pqo4",) * 4 and policy.types_v == ("pqo3",) * 4 and policy.model_hash == "abc"
    assert sorted(policy.k_means) == [1, 3] and sorted(policy.k_gains) == [0, 3] and policy.calibrated
    np.testing.assert_array_equal(policy.k_means[3], -np.arange(128, dtype=np.float32).reshape(2, 64))
    np.testing.assert_array_equal(policy.k_gains[0].reshape(-1), np.arange(1, 129, dtype=np.float32) / 8)
    assert policy.tail is None and read_policy(written(tmp_path / "t.gguf", tail=0)).tail == 0
    for form in (str(tmp_path / "policy.gguf"), tmp_path / "policy.gguf", policy):
        assert resolve(form, 4).types_k == policy.types_k


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "policy.gguf")
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space left"):
        written(path, model_hash="other")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_policy(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        read_policy(tmp_path / "missing.gguf")
    with pytest.raises(ModelNotFoundError, match="is no regular file"):
        read_policy(tmp_path)
    with pytest.raises(PolicyError, match="no cache policy"):
        read_policy(demo.MODEL_PATH)
    (tmp_path / "text.gguf").write_text("default: pqo3")
    with pytest.raises(PolicyError, match="not a GGUF file"):
        read_policy(tmp_path / "text.gguf")
    with pytest.raises(PolicyError, match="must be finite"):
        read_policy(written(tmp_path / "nan.gguf", k_means={0: np.full((2, 64), np.nan, np.float32)}))
    zero = written(tmp_path / "zero.gguf", k_means={}, k_gains={0: np.full((2, 64), 0.375, np.float32)})
    zero.write_bytes(zero.read_bytes().replace(np.float32(0.375).tobytes(), bytes(4), 1))
    with pytest.raises(PolicyError, match="checksum of its means and gains does not match"):
        read_policy(zero)
    zero.write_bytes(zero.read_bytes().replace(b"tqgguf-policy.sha256", b"tqgguf-policy.none00"))  # as older files
    with pytest.raises(PolicyError, match="must be positive and finite"):
        read_policy(zero)
    writer = gguf.GGUFWriter(str(tmp_path / "newer.gguf"), "tqgguf-policy")
    writer.add_uint32("tqgguf-policy.version", 2)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(PolicyError, match="version 2, this tqgguf reads 1"):
        read_policy(tmp_path / "newer.gguf")


def test_damaged_files_are_errors_or_policies_never_crashes(tmp_path: Path) -> None:
    whole = written(tmp_path / "policy.gguf").read_bytes()
    chance = random.Random(0)
    refused = 0
    for i in range(300):
        data = bytearray(whole)
        if i % 3 == 0:
            del data[chance.randrange(len(data)) :]
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (tmp_path / "damaged.gguf").write_bytes(data)
        try:
            read_policy(tmp_path / "damaged.gguf")
        except TqggufError:
            refused += 1
    assert refused > 100


def test_a_hash_tells_models_apart(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    data = bytearray(demo.MODEL_PATH.read_bytes())
    other.write_bytes(data)
    assert model_hash(other) == model_hash(demo.MODEL_PATH)
    header = tqgguf.gguf.header.read_header(other).header_bytes
    data[header + 1000] ^= 1
    other.write_bytes(data)
    assert model_hash(other) != model_hash(demo.MODEL_PATH)


def test_a_range_of_layers_without_a_cache_is_named() -> None:
    info = tqgguf.read_model_info(demo.MODEL_PATH)
    hybrid = replace(info, layers=tuple(layer for layer in info.layers if layer.index in (1, 3)))
    for layers, said in (
        ({"0": "q8_0"}, "range '0' names layers without a KV cache: layer 0 has none"),
        ({"3": "f16", "-2": "q8_0"}, "range '-2' names layers without a KV cache: layer 2 has none"),
        ({"0": "pqo3"}, "range '0' names layers"),  # the default's own type, but somebody thought otherwise
        ({"0-1": "q8_0", "2:": "f16"}, None),
    ):
        policy = resolve({"default": "pqo3", "layers": layers}, 4)
        assert policy.obstacle(info) is None
        assert (policy.obstacle(hybrid) or "").startswith(said or "") and (policy.obstacle(hybrid) is None) == (
            not said
        )
        if said:
            with pytest.raises(tqgguf.errors.CacheTypeError, match=said):
                refuse_impossible(hybrid, policy)


def test_obstacles_name_the_layer(tmp_path: Path) -> None:
    info = tqgguf.read_model_info(demo.MODEL_PATH)
    assert resolve("pqo3", 4).obstacle(info) is None
    assert resolve("pqo3", 4).bits(info) == 3.5
    assert resolve({"default": ("pqo4", "pqo3"), "layers": {"0": "q8_0"}}, 4).bits(info) == (8.5 + 3 * 4.0) / 4
    assert "for 3 layers, the model has 4" in str(resolve("pqo3", 3).obstacle(info))
    wrong = CachePolicy(("f16",) * 4, ("f16",) * 4, {2: np.zeros((2, 32), np.float32)})
    assert "layer 2: the mean key has shape (2, 32)" in str(wrong.obstacle(info))
    wrong = CachePolicy(("f16",) * 4, ("f16",) * 4, k_gains={3: np.ones((4, 64), np.float32)})
    assert str(wrong.obstacle(info)) == ("layer 3: the key gain has shape (4, 64), the model's keys have (2, 64)")


@pytest.mark.parametrize(
    ("key", "tensor", "reason"),
    [("attn_logit_softcapping", "", "softcap"), ("", "blk.0.attn_sinks.weight", "attention sinks")],
)
def test_centring_is_refused_where_it_would_change_the_result(
    tmp_path: Path, key: str, tensor: str, reason: str
) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    if key:
        writer.add_float32(f"llama.{key}", 30.0)
    if tensor:
        writer.add_tensor(tensor, np.zeros(4, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    header = tqgguf.gguf.header.read_header(tmp_path / "model.gguf")
    assert reason in str(centring_obstacle(header))
    assert gain_obstacle(header) is None  # scores stay what they are
    assert tqgguf.read_model_info(demo.MODEL_PATH).centring_obstacle is None


@pytest.mark.parametrize(
    ("means", "said"),
    [
        ({0: np.full((2, 64), np.nan, np.float32)}, "must be finite"),
        ({0: np.full((2, 64), 3e38, np.float32)}, "at most 65504"),
        ({4: np.zeros((2, 64), np.float32)}, "layer 4; it has layers 0 to 3"),
        ({-1: np.zeros((2, 64), np.float32)}, "layer -1; it has layers"),
        ({0: "abc"}, "must be an array"),
        ({0: [1.0, 2.0]}, "must be an array"),
    ],
)
def test_mean_keys_that_cannot_be(means: Any, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        CachePolicy(("pqo3",) * 4, ("pqo3",) * 4, means)


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        *(
            (
                {0: np.full((2, 64), value, np.float32)},
                "layer 0: a key gain must be positive and finite, from 1/1024 to",
            )
            for value in (np.nan, np.inf, 0.0, -1.0, 1025.0, 1 / 1025)
        ),
        ({4: np.ones((2, 64), np.float32)}, "a key gain for layer 4; it has layers 0 to 3"),
        ({True: np.ones((2, 64), np.float32)}, "a key gain for layer True"),
        ({1: [1.0, 2.0]}, "layer 1: a key gain must be an array"),
        ({1: np.ones((2, 64), np.int32)}, "layer 1: a key gain must be an array"),
        ({1: np.ones(128, np.float32)}, "layer 1: a key gain must be an array"),
    ],
)
def test_gains_that_cannot_be(gains: Any, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        CachePolicy(("pqo3",) * 4, ("pqo3",) * 4, k_gains=gains)


def test_calibrated_keys_are_more_than_a_type() -> None:
    one = {0: np.ones((2, 64), np.float32)}
    plain, centred, scaled = (
        CachePolicy(("pqo3",) * 4, ("pqo3",) * 4, k_means=means, k_gains=gains)
        for means, gains in (({}, {}), (one, {}), ({}, one))
    )
    assert (plain.calibrated, centred.calibrated, scaled.calibrated) == (False, True, True)
    assert plain.uniform is not None and centred.uniform is None and scaled.uniform is None
    assert (plain.words, centred.words, scaled.words) == ("pqo3", "", "")


def test_layers_whose_keys_are_rotated_behind_their_calibration() -> None:
    info = tqgguf.read_model_info(demo.MODEL_PATH)
    types, gains = ("q4_0", "f16", "pqo3", "pqo3"), {i: np.ones((2, 64), np.float32) for i in (1, 2)}
    calibrated, plain = CachePolicy(types, types, k_gains=gains), CachePolicy(types, types)
    assert [calibrated.rotates_k(layer) for layer in info.layers] == [True, False, True, False]
    assert not any(plain.rotates_k(layer) for layer in info.layers)
    assert not calibrated.rotates_k(replace(info.layers[0], head_dim_k=96))


@pytest.mark.parametrize("arch", ["minimax-m3", "deepseek4", "qwen4exp"])
def test_architectures_that_read_keys_in_another_way(tmp_path: Path, arch: str) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), arch)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    header = tqgguf.gguf.header.read_header(tmp_path / "model.gguf")
    said = f"{arch} reads them otherwise than by llama.cpp's common attention"
    assert gain_obstacle(header) == f"keys cannot have gains: {said}"
    assert centring_obstacle(header) == f"keys cannot be centred: {said}"
