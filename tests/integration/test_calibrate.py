"""Calibrating a model: what is measured, where it is kept, what it gains, and what of it is refused."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import program
import pytest

import tqgguf
from tqgguf.cache.calibration import stored_calibration
from tqgguf.demo import model as demo
from tqgguf.diagnostics.texts import own_text
from tqgguf.errors import ArgumentError, CalibrationError, TextError
from tqgguf.gguf.identity import model_identity
from tqgguf.model.calibrate import FAR, LONGEST, SPAN, far_starts, key_statistics, sampled, spread
from tqgguf.model.reading import AttentionInputs, Loaded, read_attention

pytestmark = pytest.mark.model

DEMO = demo.MODEL_PATH


@pytest.fixture(scope="module")
def calibration() -> tqgguf.Calibration:
    return tqgguf.calibrate(DEMO, n_tokens=512)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tqgguf.model.calibrate._unkept", {})
    return stored_calibration(model_identity(DEMO))


# ---- What is measured ----


def plain_statistics(q: Any, k: Any, scale: float, step: int) -> tuple[Any, Any, Any]:
    """Mean of k, E (k - mean)^2 and E q^2 of one head, weighted by p (1 - p), pair by pair."""
    n = len(q)
    weights = np.zeros((n, n))
    for i in range(0, n, step):
        p = np.exp(scale * (k[: i + 1] @ q[i]))
        p /= p.sum()
        weights[i, : i + 1] = p * (1 - p)
    of_keys, of_queries = weights.sum(axis=0), weights.sum(axis=1)
    mean = of_keys @ k / of_keys.sum()
    return mean, of_keys @ np.square(k - mean) / of_keys.sum(), of_queries @ np.square(q) / of_queries.sum()


@pytest.mark.parametrize("step", [1, 4])
def test_the_statistics_are_those_of_a_plain_sum(step: int) -> None:
    rng = np.random.default_rng(0)
    n, dim = 300, 32
    q, k = rng.standard_normal((n, 1, dim)).astype("f4"), rng.standard_normal((n, 1, dim)).astype("f4")
    k[:, :, 3] += 5
    mask = np.where(np.tri(n, dtype=bool), 0, -np.inf).astype("f4")
    k = k.astype("f2").astype("f4")  # as an f16 cache has them
    found = key_statistics(sampled(AttentionInputs(0, q, k, k, 0.2, mask, None, 0.0, 0.0), step))
    plain = plain_statistics(q[:, 0], k[:, 0], 0.2, step)
    for mine, want in zip((found.mean, found.k2, found.q2), plain, strict=True):
        np.testing.assert_allclose(mine[0], want, rtol=1e-4)
    gain = found.gain(1.0)
    assert np.log(gain).mean() == pytest.approx(0, abs=1e-6)
    expected = (found.q2 / found.k2) ** 0.25
    np.testing.assert_allclose(gain / gain[0, 0], expected / expected[0, 0], rtol=1e-3)


def test_tokens_are_taken_from_all_of_a_text() -> None:
    text = list(range(1000))
    assert spread(text, 1000) == spread(text, 2000) == text
    assert spread(text, SPAN) == text[:SPAN]
    some = spread(text, 3 * SPAN + 5)
    assert len(some) == 3 * SPAN + 5
    assert some[:SPAN] == text[:SPAN]
    assert some[3 * SPAN :] == text[-SPAN:][:5]
    assert some == sorted(some)


def test_where_the_parts_of_a_text_are_read() -> None:
    n = SPAN * len(FAR)
    assert far_starts(n, 10**6) == tuple(round(share * (LONGEST - SPAN)) for share in FAR)
    assert far_starts(n, 4096)[-1] == round(0.9 * (4096 - SPAN))
    assert far_starts(n, n) == far_starts(n - 1, 4096) == (0,)  # no room, or parts that are too short


def test_a_part_sees_itself_alone_at_its_own_positions(random_model: Callable[..., Path]) -> None:
    """What is read at position 1,000 has other keys than at 0, and the same values and scores."""
    path = random_model(n_layer=1)
    info = tqgguf.read_model_info(path)
    with contextlib.closing(tqgguf.Llama(path, cache="f16", n_ctx=256, verbose=False)) as model:
        loaded = Loaded(model._model.model, info, 1)
        tokens = list(range(5, 45))
        (near,) = read_attention(loaded, tokens, [0], lambda x: x).values()
        (both,) = read_attention(loaded, tokens + tokens, [0], lambda x: x, starts=(0, 100)).values()
    assert np.isneginf(both.mask[40:, :40]).all() and np.isneginf(both.mask[:40, 40:]).all()
    np.testing.assert_array_equal(both.k[:40], near.k)
    np.testing.assert_array_equal(both.v[40:], near.v)
    assert np.abs(both.k[40:] - near.k).max() > 0.1 * np.abs(near.k).max()
    far_q, far_k = both.q[40:], both.k[40:]
    group = near.q.shape[1] // near.k.shape[1]
    for head in range(near.q.shape[1]):
        want = near.q[:, head] @ near.k[:, head // group].T
        np.testing.assert_allclose(far_q[:, head] @ far_k[:, head // group].T, want, atol=1e-3 * np.abs(want).max())


def test_the_heads_of_a_group_count_together() -> None:
    rng = np.random.default_rng(1)
    n, dim = 64, 32
    q, k = rng.standard_normal((n, 6, dim)).astype("f4"), rng.standard_normal((n, 2, dim)).astype("f4")
    mask = np.where(np.tri(n, dtype=bool), 0, -np.inf).astype("f4")
    whole = key_statistics(AttentionInputs(0, q, k, k, 0.2, mask, None, 0.0, 0.0))
    for head in range(2):
        part = AttentionInputs(0, q[:, 3 * head : 3 * head + 3], k[:, head : head + 1], k, 0.2, mask, None, 0.0, 0.0)
        np.testing.assert_allclose(key_statistics(part).q2[0], whole.q2[head])
        np.testing.assert_allclose(key_statistics(part).mean[0], whole.mean[head])


def test_every_layer_is_calibrated(calibration: tqgguf.Calibration) -> None:
    info = tqgguf.read_model_info(DEMO)
    for vectors in (calibration.means, calibration.gains):
        assert [(layer, values.shape) for layer, values in vectors.items()] == [
            (layer.index, (layer.n_head_kv, layer.head_dim_k)) for layer in info.layers
        ]
    assert (calibration.model, calibration.n_tokens) == (model_identity(DEMO), 512)


def test_it_saves_a_model_with_hot_keys(tmp_path: Path) -> None:
    """Two pairs of channels in each head are 16 times as large as the others; they take the precision of the rest."""
    hot = tmp_path / "hot.gguf"
    program.load("benchmarks/quality/hot_model.py").make_hot(DEMO, hot, 16, 2)
    text = own_text(tqgguf.read_model_info(DEMO), 512, 2)
    calibration = tqgguf.calibrate(hot, text, n_tokens=512)
    found = tqgguf.compare(
        hot, ["f16", "pqt4"], tails=(0,), n_ctx=512, n_chunks=4, n_threads=1, calibration=calibration
    )
    kld = {row.type: row.kld.mean for row in found.rows}
    assert list(kld) == ["f16", "pqt4", "pqt4 calibrated"]
    assert kld["pqt4 calibrated"] < 0.3 * kld["pqt4"]
    assert found.rows[1].bytes == found.rows[2].bytes


# ---- Where it is kept ----


def test_a_file_holds_what_was_measured(calibration: tqgguf.Calibration, tmp_path: Path) -> None:
    path = tmp_path / "model.cal.gguf"
    calibration.write(path)
    again = tqgguf.read_calibration(path)
    for mine, theirs in ((calibration.means, again.means), (calibration.gains, again.gains)):
        assert mine.keys() == theirs.keys() and all((mine[layer] == theirs[layer]).all() for layer in mine)
    assert (again.model, again.n_layer, again.n_tokens) == (calibration.model, calibration.n_layer, 512)


def test_a_model_is_calibrated_once_and_then_loaded_with_it(cache_folder: Path) -> None:
    titles: list[str] = []

    def loaded() -> set[int]:
        with contextlib.closing(
            tqgguf.Llama(
                DEMO,
                cache="pqt3",
                n_ctx=256,
                verbose=False,
                calibration="auto",
                progress=lambda title, *_: titles.append(title),
            )
        ) as model:
            assert model.cache_info().layers[0].calibrated
            return set(model.cache_policy.k_gains)

    layers = loaded()
    assert "calibrating" in titles and cache_folder.is_file() and layers
    titles.clear()
    assert loaded() == layers and "calibrating" not in titles


@pytest.fixture
def by_default(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> Path:
    """Keys are calibrated as users have it; the folder where that is kept."""
    monkeypatch.delenv("TQGGUF_CALIBRATION")
    return cache_folder


def layers_calibrated(path: Path = DEMO, cache: Any = "pqt3", **options: Any) -> list[bool]:
    with contextlib.closing(tqgguf.Llama(path, cache=cache, n_ctx=256, verbose=False, **options)) as model:
        return [layer.calibrated for layer in model.cache_info().layers]


def test_types_of_tqgguf_are_calibrated_by_default(by_default: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert layers_calibrated(cache=("q8_0", "pqt3")) == layers_calibrated(cache="q4_0") == [False] * 4
    assert layers_calibrated(calibration="off") == [False] * 4 and not by_default.exists()
    assert layers_calibrated() == [True] * 4 and by_default.is_file()
    said = capfd.readouterr().err
    assert "tqgguf: calibrating the keys of demo.gguf, once for this model" in said
    assert "tqgguf: calibrated demo.gguf in " in said
    assert layers_calibrated() == [True] * 4 and capfd.readouterr().err == ""


def test_the_default_of_the_environment(by_default: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQGGUF_CALIBRATION", "off")
    assert layers_calibrated() == [False] * 4
    assert layers_calibrated(calibration="auto") == [True] * 4
    monkeypatch.setenv("TQGGUF_CALIBRATION", "yes")
    with pytest.raises(ArgumentError, match=r'TQGGUF_CALIBRATION is .yes., must be "auto" or "off"'):
        layers_calibrated()


def test_a_policy_with_means_of_its_own_is_left_as_it_is(by_default: Path) -> None:
    means = {2: np.ones((2, 64), np.float32)}
    policy = tqgguf.CachePolicy(("pqt3",) * 4, ("pqt3",) * 4, means)
    assert layers_calibrated(cache=policy) == [False, False, True, False] and not by_default.exists()


def test_models_that_cannot_be_calibrated_go_without(by_default: Path, architecture: Callable[[str], Path]) -> None:
    assert layers_calibrated(architecture("deepseek2"), "pqo3") == [False] * 4
    with pytest.raises(CalibrationError, match="MLA"):
        layers_calibrated(architecture("deepseek2"), "pqo3", calibration="auto")
    assert not by_default.parent.exists()


def test_a_model_whose_attention_cannot_be_seen_is_tried_once(
    by_default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrate(*_: Any, **__: Any) -> Any:
        raise tqgguf.UnsupportedError("no flash attention in layer 3")

    monkeypatch.setattr("tqgguf.model.calibrate.calibrate", calibrate)
    with pytest.raises(tqgguf.UnsupportedError, match="layer 3"):
        layers_calibrated(calibration="auto")
    with pytest.warns(UserWarning, match="layer 3; its keys are stored as they are"):
        assert layers_calibrated() == [False] * 4
    assert layers_calibrated() == [False] * 4


def test_a_pickled_model_keeps_its_calibration(by_default: Path) -> None:
    with contextlib.closing(tqgguf.Llama(DEMO, cache="pqt3", n_ctx=256, verbose=False)) as model:
        again = pickle.loads(pickle.dumps(model))
        with contextlib.closing(again):
            for layer, gain in model.cache_policy.k_gains.items():
                np.testing.assert_array_equal(again.cache_policy.k_gains[layer], gain)


def test_a_kept_one_of_another_model_is_not_used(by_default: Path, calibration: tqgguf.Calibration) -> None:
    by_default.parent.mkdir(parents=True)
    replace(calibration, model="0" * 64).write(by_default)
    with pytest.warns(UserWarning, match="holds the calibration of another model"):
        assert layers_calibrated() == [True] * 4
    assert tqgguf.read_calibration(by_default).model == model_identity(DEMO)


def test_a_damaged_one_is_measured_again(cache_folder: Path) -> None:
    cache_folder.parent.mkdir(parents=True)
    cache_folder.write_bytes(b"GGUF")
    with pytest.warns(UserWarning, match="calibrated again"):
        tqgguf.Llama(DEMO, cache="pqt3", n_ctx=256, verbose=False, calibration="auto").close()
    assert tqgguf.read_calibration(cache_folder).n_tokens == 1408


def test_a_folder_that_cannot_be_written(cache_folder: Path) -> None:
    cache_folder.parent.write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="cannot be kept in"):
        model = tqgguf.Llama(DEMO, cache="pqt3", n_ctx=256, verbose=False, calibration="auto")
    with contextlib.closing(model):
        assert model.cache_policy.k_gains
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not measured again
        assert layers_calibrated(calibration="auto") == [True] * 4


def test_the_command(python: Callable[..., Any], cache_folder: Path, tmp_path: Path) -> None:
    done = python("-m", "tqgguf", "calibrate", str(DEMO), "--tokens", "256")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("means and gains of 4 layers, from 256 tokens, in ") and cache_folder.is_file()
    options = ("--cache", "f16,pqo3", "--calibration", "auto", "--ctx", "256", "--chunks", "1", "--json")
    done = python("-m", "tqgguf", "compare", str(DEMO), *options)
    rows = json.loads(done.stdout)["comparison"]["rows"]
    assert [row["type"] for row in rows] == ["f16", "pqo3+128", "pqo3+128 calibrated"]
    done = python("-m", "tqgguf", "calibrate", str(DEMO), "--tokens", "128", "--json")
    said = json.loads(done.stdout)
    assert "takes the place of the calibration that was kept" in done.stderr
    assert said["file"] == str(cache_folder) and (said["n_tokens"], said["centred"]) == (128, [0, 1, 2, 3])
    assert tqgguf.read_calibration(cache_folder).n_tokens == 128


# ---- What is refused ----


def test_a_calibration_of_another_model(
    calibration: tqgguf.Calibration, random_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="measured on another model"):
        tqgguf.Llama(random_model(), cache="pqt3", verbose=False, calibration=calibration)
    path = tmp_path / "other.gguf"
    replace(calibration, model="0" * 64).write(path)
    with pytest.raises(CalibrationError, match=r"another model than demo\.gguf"):
        tqgguf.Llama(DEMO, cache="pqt3", verbose=False, calibration=path)


def test_one_byte_of_the_weights_makes_another_model(tmp_path: Path) -> None:
    data = bytearray(DEMO.read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.gguf").write_bytes(data)
    assert model_identity(tmp_path / "model.gguf") != model_identity(DEMO)


def test_an_identity_is_computed_once_for_a_file(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    first = model_identity(path)
    reading: list[Any] = []
    monkeypatch.setattr(os, "pread", lambda *at: reading.append(at) or b"other")
    assert model_identity(path) == first and not reading
    path.write_bytes(b"weighty")
    os.utime(path, ns=(0, 0))
    assert model_identity(path) != first and reading
    for note in (cache_folder.parents[1] / "identities").iterdir():
        note.write_text('{"files": 5}')  # what is damaged counts for nothing
    monkeypatch.undo()
    path.write_bytes(b"weights")
    assert model_identity(path) == first


def test_a_split_model_is_all_of_its_files(tmp_path: Path) -> None:
    parts = [tmp_path / f"model-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    first = model_identity(parts[0])
    parts[1].write_bytes(b"GGUX")
    assert model_identity(parts[0]) != first
    parts[1].unlink()
    with pytest.raises(tqgguf.ModelNotFoundError, match=r"cannot read the model .*model-00002-of-00002\.gguf"):
        model_identity(parts[0])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("gains", np.nan, "must be positive and finite"),
        ("gains", 0.0, "must be positive and finite"),
        ("gains", 1e9, "must be positive and finite"),
        ("means", np.inf, "must be finite"),
    ],
)
def test_absurd_values(calibration: tqgguf.Calibration, tmp_path: Path, name: str, value: float, words: str) -> None:
    vectors = {layer: values.copy() for layer, values in getattr(calibration, name).items()}
    vectors[1][0, 0] = value
    replace(calibration, **{name: vectors}).write(tmp_path / "bad.gguf")
    with pytest.raises(CalibrationError, match=words):
        tqgguf.read_calibration(tmp_path / "bad.gguf")


def test_other_head_counts(calibration: tqgguf.Calibration) -> None:
    halves = {layer: values[:1] for layer, values in calibration.gains.items()}
    with pytest.raises(CalibrationError, match=r"does not suit demo\.gguf: layer 0"):
        tqgguf.Llama(DEMO, cache="pqt3", verbose=False, calibration=replace(calibration, gains=halves))


def test_a_choice_that_could_change_nothing(calibration: tqgguf.Calibration) -> None:
    with pytest.raises(CalibrationError, match="no keys of cache f16/pqt3 are quantized: leave the calibration out"):
        layers_calibrated(cache=("f16", "pqt3"), calibration=calibration)
    policy = calibration.applied(tqgguf.CachePolicy(("pqt3",) * 4, ("pqt3",) * 4), tqgguf.read_model_info(DEMO))
    assert layers_calibrated(cache=policy) == [True] * 4
    with pytest.raises(CalibrationError, match=r'of its own: leave calibration="off" out'):
        layers_calibrated(cache=policy, calibration="off")
    with pytest.raises(ArgumentError, match="calibration is ''"):
        layers_calibrated(calibration="")


def test_a_calibration_of_no_layer(calibration: tqgguf.Calibration, tmp_path: Path) -> None:
    replace(calibration, means={}, gains={}).write(tmp_path / "none.gguf")
    with pytest.raises(CalibrationError, match=r"none\.gguf calibrates no layer"):
        tqgguf.read_calibration(tmp_path / "none.gguf")


def test_states_and_prefixes_of_another_calibration(calibration: tqgguf.Calibration) -> None:
    with contextlib.ExitStack() as stack:
        plain, calibrated = (
            stack.enter_context(
                contextlib.closing(tqgguf.Llama(DEMO, cache="pqt3", n_ctx=256, verbose=False, calibration=choice))
            )
            for choice in ("off", calibration)
        )
        for model, other in ((plain, calibrated), (calibrated, plain)):
            model.eval(model.tokenize(b"The capital of France is Paris."))
            state = pickle.loads(pickle.dumps(model.save_state()))
            n = other.n_tokens
            with pytest.raises(tqgguf.StateFileError, match="another calibration of keys; the model is as it was"):
                other.load_state(state)
            assert other.n_tokens == n
            model.load_state(state)


def test_an_interrupt_while_it_reads(by_default: Path, python: Callable[..., Any]) -> None:
    code = f"""
import os, signal, tqgguf
from tqgguf.model import reading
seen = []
tensor_at = reading.tensor_at
def counted(address):
    seen.append(address)
    if len(seen) == 40:
        os.kill(os.getpid(), signal.SIGINT)
    return tensor_at(address)
reading.tensor_at = counted
try:
    tqgguf.Llama({str(DEMO)!r}, cache="pqt3", n_ctx=256, verbose=False)
except KeyboardInterrupt:
    print("interrupted")
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    done = python("-c", code)
    assert done.stdout == "interrupted\nTrue\n" and "ignored" not in done.stderr, done.stderr
    assert not by_default.exists()


def test_the_command_overwrites_nothing_else(python: Callable[..., Any], tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(DEMO.read_bytes())
    for output, said in ((model, "exists and is no calibration"), (tmp_path / "no" / "a.gguf", "does not exist")):
        done = python("-m", "tqgguf", "calibrate", str(model), "--tokens", "64", "-o", str(output))
        assert done.returncode == 1 and said in done.stderr
    assert model.read_bytes() == DEMO.read_bytes()


def test_a_damaged_value_that_would_pass_for_one(calibration: tqgguf.Calibration, tmp_path: Path) -> None:
    path = tmp_path / "c.gguf"
    calibration.write(path)
    data = bytearray(path.read_bytes())
    data[-2] ^= 1  # a bit of the last gain's significand
    path.write_bytes(data)
    with pytest.raises(CalibrationError, match="damaged: the checksum of its means and gains does not match"):
        tqgguf.read_calibration(path)


def test_a_mistake_is_told_by_the_option(python: Callable[..., Any]) -> None:
    done = python("-m", "tqgguf", "calibrate", str(DEMO), "--tokens", "10")
    assert done.returncode == 1 and "--tokens is 10, must be at least 64" in done.stderr


def test_no_calibration_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        tqgguf.read_calibration(tmp_path / "none.gguf")
    with pytest.raises(CalibrationError, match="no calibration"):
        tqgguf.read_calibration(DEMO)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3")
    with pytest.raises(CalibrationError, match="damaged"):
        tqgguf.read_calibration(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"text": "short"}, TextError, "fewer than 64, which a calibration needs"),
        ({"text": "short", "n_tokens": 100}, TextError, "fewer than the 100 asked for"),
        ({"n_tokens": 10}, ArgumentError, "n_tokens is 10, must be at least 64"),
        ({"text": 5}, ArgumentError, "text is of type int"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tqgguf.calibrate(DEMO, **options)


def test_what_progress_raises_ends_it() -> None:
    def progress(done: int, total: int) -> None:
        assert (done, total) == (1, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tqgguf.calibrate(DEMO, n_tokens=64, progress=progress)


def test_a_choice_that_is_none() -> None:
    with pytest.raises(ArgumentError, match="calibration is 5"):
        tqgguf.Llama(DEMO, cache="pqt3", verbose=False, calibration=5)  # type: ignore[arg-type]


def test_a_model_of_which_nothing_can_be_calibrated(architecture: Callable[[str], Path]) -> None:
    with pytest.raises(CalibrationError, match="it has no KV cache"):
        tqgguf.calibrate(architecture("mamba"))
    with pytest.raises(CalibrationError, match="MLA"):
        tqgguf.calibrate(architecture("deepseek2"))


def test_a_policy_with_gains_of_its_own(calibration: tqgguf.Calibration) -> None:
    policy = calibration.applied(tqgguf.CachePolicy(("pqt3",) * 4, ("pqt3",) * 4), tqgguf.read_model_info(DEMO))
    with pytest.raises(CalibrationError, match="of its own"):
        tqgguf.Llama(DEMO, cache=policy, verbose=False, calibration=calibration)
