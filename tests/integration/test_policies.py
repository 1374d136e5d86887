"""`Llama(cache=...)` with types by layer: ranges, policies, policy files; verified and counted like any other."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tqgguf
from tqgguf import CachePolicy
from tqgguf.cache.policy import model_hash
from tqgguf.demo import model as demo
from tqgguf.errors import ArgumentError, CacheTypeError, PolicyError
from tqgguf.gguf import info as gguf_info
from tqgguf.gguf.header import read_header

pytestmark = pytest.mark.model


def load(cache: Any, path: Path = demo.MODEL_PATH, **options: Any) -> Any:
    return tqgguf.Llama(path, cache=cache, n_ctx=512, n_threads=1, verbose=False, **options)


def logits(model: Any) -> np.ndarray:
    """Of the last of 128 tokens of the demo model's own text."""
    from llama_cpp import llama_get_logits_ith

    tokens = model.tokenize(demo.chat_text(0, 12, reach=8).encode(), special=True)[:128]
    model.eval(tokens)
    return np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).astype(np.float64)


def test_types_by_layer_are_stored_and_counted() -> None:
    model = load({"default": "pqo3", "layers": {"0": ("q8_0", "f16"), "-1": "pqt4"}})
    info = model.cache_info()
    assert [(layer.type_k, layer.type_v) for layer in info.layers] == [
        ("q8_0", "f16"),
        ("pqo3", "pqo3"),
        ("pqo3", "pqo3"),
        ("pqt4", "pqt4"),
    ]
    assert (info.type_k, info.type_v) == ("mixed", "mixed")
    # 128 values a side and token
    assert info.bytes_per_token == (136 + 256) + 2 * 2 * 56 + 2 * 72
    assert info.bytes - info.tail_bytes == 512 * info.bytes_per_token
    assert info.tail_bytes == 6 * (128 + 4) * (2 * 64 * 2 + 4)
    reply = model.create_chat_completion(
        [{"role": "user", "content": demo.capital_question("France", 0)}], temperature=0.0, max_tokens=16
    )
    assert "Paris" in reply["choices"][0]["message"]["content"]
    again = pickle.loads(pickle.dumps(model))
    assert again.cache_policy.types_k == model.cache_policy.types_k


def test_a_uniform_policy_is_the_type_itself() -> None:
    np.testing.assert_array_equal(logits(load({"default": "pqo4"})), logits(load("pqo4")))
    assert load({"default": "pqo4"}).cache_info() == load("pqo4").cache_info()


def test_a_policy_ends_with_the_model_it_was_for() -> None:
    load({"default": "pqo3", "layers": {"0": "f32"}})
    assert load("pqo3").cache_info().bytes_per_token == 4 * 2 * 56


def test_centred_keys_give_the_same_logits(tmp_path: Path, random_model: Callable[..., Path]) -> None:
    # The weights are f32. For weights of Q8_0 llama.cpp rounds activations to 8 bits: one that falls to the other level
    # moves the logits of the demo model by 2e-4.
    model = random_model(n_layer=4)
    random = np.random.default_rng(0)
    means = {i: random.standard_normal((2, 64)).astype(np.float32) for i in range(4)}
    path = tmp_path / "policy.gguf"

    def read(kind: str, flash_attn: bool, centre: bool) -> np.ndarray:
        CachePolicy((kind,) * 4, (kind,) * 4, means if centre else {}, model_hash(model)).write(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return logits(load(str(path), path=model, flash_attn=flash_attn))

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    # Without flash attention llama.cpp computes on an f32 cache as it is. The subtraction rounds each key by 2^-24, and
    # every sum after it rounds otherwise: 4e-7 in all, measured. Keys rounded to f16 would move logits by 1e-4.
    exact, centred = (read("f32", False, centre) for centre in (False, True))
    assert 0 < distance(centred, exact) < 1e-5
    # Keys less a mean of their own size have twice their variance, so 1.4 times their f16 rounding error, and the two
    # errors are independent: together 1.7 times that of the keys as they are.
    plain, centred = (read("f16", True, centre) for centre in (False, True))
    assert 0 < distance(centred, plain) < 4 * distance(plain, exact)


def test_mean_keys_survive_a_clearing_of_the_cache() -> None:
    # They lie in the cache's buffer. Of another size than the keys, they show in what is stored.
    from llama_cpp import llama_get_memory, llama_memory_clear

    means = {i: np.full((2, 64), 30.0, np.float32) for i in range(4)}
    model = load(CachePolicy(("pqo3",) * 4, ("f16",) * 4, means), tail=0)
    before = logits(model)
    llama_memory_clear(llama_get_memory(model.ctx), True)
    model.reset()
    np.testing.assert_array_equal(logits(model), before)
    assert np.linalg.norm(logits(load(("pqo3", "f16"), tail=0)) - before) > 0.1 * np.linalg.norm(before)


def test_a_uniform_policy_for_another_model_is_refused() -> None:
    for n_layer in (3, 8):
        with pytest.raises(CacheTypeError, match=f"for {n_layer} layers, the model has 4"):
            load(CachePolicy(("pqo3",) * n_layer, ("pqo3",) * n_layer))


def test_a_model_with_a_policy_reads_its_header_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(gguf_info, "read_header", lambda path: (read.append(path), read_header(path))[1])
    means = {0: np.zeros((2, 64), np.float32)}
    load(CachePolicy(("pqo4",) * 4, ("pqo3",) * 4, means, model_hash(gguf_info.read_model_info(demo.MODEL_PATH))))
    assert len(read) == 2  # one of them the line above


def test_a_policy_measured_on_another_model_warns() -> None:
    with pytest.warns(UserWarning, match="measured on another model"):
        load(CachePolicy(("pqo4",) * 4, ("pqo4",) * 4, {}, "0" * 64))


def test_policies_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(CacheTypeError, match="for 3 layers, the model has 4"):
        load(CachePolicy(("pqo4",) * 3, ("pqo4",) * 2 + ("f16",)))
    with pytest.raises(PolicyError, match="layers 0 to 3"):
        load({"default": "pqo4", "layers": {"4": "f16"}})
    with pytest.raises(ArgumentError, match="flash_attn=False cannot be combined with a KV cache with this policy"):
        load({"default": "f16", "layers": {"1": "pqo4"}}, flash_attn=False)
    with pytest.raises(FileNotFoundError):
        load(str(tmp_path / "missing.gguf"))


def test_a_policy_file_from_the_command_line(python: Any, tmp_path: Path) -> None:
    path = tmp_path / "policy.gguf"
    CachePolicy(("q8_0", "pqo3", "pqo3", "pqo4"), ("pqo3",) * 4, {}, model_hash(demo.MODEL_PATH)).write(path)
    done = python("-m", "tqgguf", "demo", "--cache", str(path))
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "KV cache mixed (K) and pqo3 (V)" in done.stdout
    done = python("-m", "tqgguf", "demo", "--cache", str(path), "--cache-k", "pqo4")
    assert done.returncode == 1 and "not a policy file" in done.stderr
