"""`tqgguf.tune` on loaded models: what it makes of a budget beats what others make of it, and of what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tqgguf
from tqgguf import CachePolicy, Tuning
from tqgguf.cache.policy import model_hash
from tqgguf.demo import model as demo
from tqgguf.diagnostics.compare import Reader
from tqgguf.diagnostics.tune import Band, cost, log_line
from tqgguf.errors import ArgumentError, CacheTypeError, TextError, UnsupportedError

pytestmark = pytest.mark.model

Model = Callable[..., Path]
SHORT: dict[str, Any] = {"n_ctx": 512, "n_chunks": 4, "n_threads": 1}
# A tail of 128 would be a quarter of these chunks, and hide most of what types cost.
QUICK, COMPARED = {**SHORT, "tail": 0}, {**SHORT, "tails": (0,)}


@pytest.fixture(scope="module")
def tuned() -> Tuning:
    return tqgguf.tune(demo.MODEL_PATH, budget=4.0, types=("q8_0", "pqo3", "pqo4"), **QUICK)


def klds(tuning: Tuning) -> dict[str, float]:
    """Mean divergence on the held-out part, by cache."""
    return {row.type: row.kld.mean for row in tuning.rows}


def test_a_budget_is_spent_where_it_counts(tuned: Tuning) -> None:
    info = tqgguf.read_model_info(demo.MODEL_PATH)
    assert tuned.policy.bits(info) == tuned.rows[1].bits == 4.0
    kld = klds(tuned)
    assert tuple(kld) == ("f16", "policy", "pqo3", "pqo4") and kld["f16"] == 0  # q8_0 is beside the question
    # Half-way between pqo3 and pqo4 in bytes, but nearly all the way in divergence: 1.03 times pqo4's. That is
    # 0.72 of what the line between the two gives, on which a choice of no worth lies.
    assert kld["policy"] < 0.6 * kld["pqo3"] and kld["policy"] < 1.25 * kld["pqo4"]
    assert tuned.line == pytest.approx(np.sqrt(kld["pqo3"] * kld["pqo4"]))
    assert kld["policy"] < 0.9 * tuned.line


def test_the_opposite_order_is_far_worse(tuned: Tuning) -> None:
    def other(types: tuple[str, ...]) -> tuple[str, ...]:
        return tuple({"pqo3": "pqo4", "pqo4": "pqo3"}[name] for name in types)

    policy = tuned.policy
    opposite = CachePolicy(other(policy.types_k), other(policy.types_v))
    info = tqgguf.read_model_info(demo.MODEL_PATH)
    assert opposite.bits(info) == policy.bits(info)
    own, turned = tqgguf.compare(demo.MODEL_PATH, ["f16", policy, opposite], **COMPARED).rows[1:]
    assert own.kld.mean < 0.6 * turned.kld.mean


def test_a_policy_knows_the_tail_it_was_tuned_with(tuned: Tuning, tmp_path: Path) -> None:
    path = tmp_path / "policy.gguf"
    tuned.policy.write(path)
    assert tqgguf.read_policy(path).tail == tuned.tail == tuned.policy.tail
    other = tuned.tail + 16
    notes = tqgguf.compare(
        demo.MODEL_PATH, ["f16", path], tails=[tuned.tail, other], n_ctx=256, n_chunks=1, n_threads=1
    ).notes
    assert [note for note in notes if "tuned" in note] == [f"policy+{other} was tuned with a tail of {tuned.tail}"]


def test_what_is_said_of_how_it_was_found(tuned: Tuning) -> None:
    assert (tuned.n_ctx, tuned.n_tuning, tuned.n_held_out, tuned.types) == (512, 2, 2, ("pqo3", "pqo4", "q8_0"))
    assert tuned.policy.model_hash == model_hash(demo.MODEL_PATH)
    assert {(s.layer, s.side, s.type) for s in tuned.sensitivities} == {
        (layer, side, name) for layer in range(4) for side in "KV" for name in tuned.types
    }
    # What parts cost nearly adds up; if they did not, the policy would be one for another model than this.
    assert tuned.predicted == pytest.approx(tuned.measured, rel=0.3)
    assert [(band.side, band.layers, band.type) for band in tuned.bands] == [
        (side, layers, "pqo3") for side in "KV" for layers in ((0,), (1,), (2, 3))
    ]
    for band in tuned.bands:
        rows = [s for s in tuned.sensitivities if (s.side, s.type) == (band.side, "pqo3") and s.layer in band.layers]
        assert sum(s.distortion for s in rows) == pytest.approx(band.distortion)
        assert sum(s.kld for s in rows) == pytest.approx(band.distortion * cost(band, tuned.bands))


def test_a_prediction_is_near_what_each_part_costs(tuned: Tuning) -> None:
    parts = [s for s in tuned.sensitivities if s.type == "pqo3"]
    rest = ("f16",) * 4
    policies = []
    for s in parts:
        one = (*rest[: s.layer], "pqo3", *rest[s.layer + 1 :])
        policies.append(CachePolicy(one, rest) if s.side == "K" else CachePolicy(rest, one))
    rows = tqgguf.compare(demo.MODEL_PATH, ["f16", *policies], **{**COMPARED, "n_chunks": 2}).rows[1:]
    # Layers differ a thousandfold in what they cost. Distortions alone put all eight parts in the order of the bands.
    for s, row in zip(parts, rows, strict=True):
        assert 0.25 < s.kld / row.kld.mean < 4, s
    by_distortion, by_cost = (
        sorted(range(8), key=key) for key in (lambda i: parts[i].distortion, lambda i: rows[i].kld.mean)
    )
    assert set(by_distortion[4:]) == set(by_cost[4:])


class Counted:
    """Counts the tokens that readers read, but for the one that warms them up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        decode = Reader.decode

        def counted(reader: Reader, tokens: Any, scored: Any) -> None:
            self.n += len(tokens) if len(tokens) > 1 else 0
            decode(reader, tokens, scored)

        monkeypatch.setattr(Reader, "decode", counted)


@pytest.mark.parametrize("calibration", ["off", "auto"])
def test_a_budget_takes_eleven_readings_of_the_tuning_part(
    random_model: Model, monkeypatch: pytest.MonkeyPatch, calibration: str
) -> None:
    path = random_model(n_layer=7, head_dim=32)
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 1200).tolist()))
    counted = Counted(monkeypatch)
    options: dict[str, Any] = {**QUICK, "n_ctx": 128, "n_chunks": 2, "calibration": calibration}
    tqgguf.tune(path, text, budget=5.0, **options)
    held_out = 1 + 1 + 3  # f16, the policy, single types
    assert counted.n == 128 * (11 + held_out)


def test_a_divergence_takes_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    options: dict[str, Any] = {**QUICK, "n_ctx": 256, "n_chunks": 2, "types": ("pqo3", "pqo4")}
    tqgguf.tune(demo.MODEL_PATH, max_kld=0.15, **options)
    held_out = 3 + 2  # f16 and single types, before; f16 and the policy, in the end
    assert 10 + held_out + 2 <= counted.n / 256 <= 10 + held_out + 2 * 5


def test_the_figures_are_of_the_part_held_out(tuned: Tuning) -> None:
    # By `compare`, of all four chunks and of the first two, hence of the last two.
    four, two = (
        tqgguf.compare(demo.MODEL_PATH, ["f16", "pqo3"], **{**COMPARED, "n_chunks": n}).rows[1].kld.mean for n in (4, 2)
    )
    assert klds(tuned)["pqo3"] == pytest.approx(2 * four - two, rel=1e-6) != pytest.approx(two, rel=0.01)


def test_the_smallest_policy_for_a_divergence() -> None:
    seen: list[tuple[str, int, int]] = []
    options: dict[str, Any] = {**QUICK, "n_ctx": 256, "n_chunks": 2, "types": ("pqo3", "pqo4")}
    found = tqgguf.tune(demo.MODEL_PATH, max_kld=0.15, progress=lambda *at: seen.append(at), **options)
    kld = klds(found)
    assert kld["policy"] <= 0.15 < kld["pqo3"] and kld["pqo4"] < 0.15
    assert 3.5 < found.rows[1].bits < 4.5
    # With the bits of one step less, what tune makes of them diverges more than was allowed.
    less = tqgguf.tune(demo.MODEL_PATH, budget=found.rows[1].bits - 1 / 8, **options)
    assert less.rows[1].bits == found.rows[1].bits - 1 / 8 and klds(less)["policy"] > 0.15
    for title in {title for title, _, _ in seen}:
        last = [at for at in seen if at[0] == title][-1]
        assert last[1] == last[2]


def test_keys_with_a_constant_are_calibrated(random_model: Model) -> None:
    path = random_model(arch="qwen2", key_bias=8.0, head_dim=32, n_head=2)
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 1200).tolist()))
    options: dict[str, Any] = {**QUICK, "n_ctx": 256, "budget": 3.5, "types": ("pqo3", "pqo4")}
    calibrated, plain = (tqgguf.tune(path, text, calibration=choice, **options) for choice in ("auto", "off"))
    assert sorted(calibrated.policy.k_means) == sorted(calibrated.policy.k_gains) == [0, 1]
    assert not plain.policy.calibrated
    assert klds(calibrated)["policy"] < 0.5 * klds(plain)["policy"] == 0.5 * klds(plain)["pqo3"]
    # The mean takes most of the keys' energy with it, and the prediction knows.
    k = [sum(s.distortion for s in t.sensitivities if (s.side, s.type) == ("K", "pqo3")) for t in (calibrated, plain)]
    v = [sum(s.distortion for s in t.sensitivities if (s.side, s.type) == ("V", "pqo3")) for t in (calibrated, plain)]
    assert k[0] < 0.5 * k[1] and v[0] == v[1]


def test_models_whose_keys_cannot_be_centred(random_model: Model) -> None:
    path, text = random_model(arch="gemma2"), "abcd " * 100
    options: dict[str, Any] = {**QUICK, "n_ctx": 128, "budget": 4.0, "types": ("pqo3", "pqo4")}
    found = tqgguf.tune(path, text, calibration="auto", **options)
    assert not found.policy.k_means and found.policy.k_gains


def test_a_mixture_that_does_not_pay_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqgguf.diagnostics import tune as module

    # A tuner that raises the wrong parts: what it makes of 4.5 bits is worse than pqo4 in all of them.
    monkeypatch.setattr(module, "allocate", lambda options, _: [part[0] for part in options])
    found = tqgguf.tune(demo.MODEL_PATH, budget=4.5, types=("pqo3", "pqo4"), **{**QUICK, "n_chunks": 2})
    assert set(found.policy.types_k + found.policy.types_v) == {"pqo4"}
    assert found.notes == ("no mixture of types measured better than pqo4 in all layers, so that is the policy",)
    assert klds(found)["policy"] == klds(found)["pqo4"] == found.line


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, ArgumentError, "one of the two"),
        ({"budget": 4, "max_kld": 0.1}, ArgumentError, "not both"),
        ({"budget": 3.4}, ArgumentError, "no policy has 3.4 bits per value: pqt3, the smallest of pqt3.*has 3.5"),
        ({"budget": float("nan")}, ArgumentError, "budget is nan, must be a positive number"),
        ({"max_kld": -1.0}, ArgumentError, "max_kld is -1.0, must be a positive number"),
        ({"max_kld": 1e-9}, ArgumentError, "no policy of pqt3, pqt4, q8_0 has a mean KLD of 1e-09: q8_0 in all"),
        ({"budget": 4, "types": ("pqo3",)}, ArgumentError, "at least two cache types"),
        ({"budget": 4, "types": ("pqo3", "PQO3")}, ArgumentError, "pqo3 is given twice"),
        ({"budget": 4, "types": ("pqo3", "pqo5")}, ArgumentError, "unknown cache type 'pqo5'"),
        ({"budget": 4, "n_chunks": 1}, ArgumentError, "n_chunks is 1, must be at least 2"),
        ({"budget": 4, "n_parallel": 0}, ArgumentError, "n_parallel is 0, must be at least 1"),
        ({"budget": 4, "n_ctx": 64}, ArgumentError, "a context of 64 tokens is too short"),
        ({"budget": 4, "n_ctx": 2**21}, ArgumentError, "own text has at most 1,048,576 tokens, not 2 chunks"),
        ({"budget": 4, "n_ctx": "256"}, ArgumentError, "n_ctx is '256', must be an integer of at least 1"),
        ({"budget": 4, "n_batch": 1.5}, ArgumentError, "n_batch is 1.5, must be an integer"),
        ({"budget": "4"}, ArgumentError, "budget is '4', must be a positive number"),
        ({"budget": 4, "types": "pqo3"}, ArgumentError, "types is 'pqo3', must be a list"),
        ({"budget": 4, "text": b"abcd"}, ArgumentError, "text is of type bytes, must be a str"),
        ({"budget": 4, "tail": "x"}, ArgumentError, "tail is 'x', must be an integer"),
        ({"budget": 4, "text": ""}, TextError, "the text is empty"),
        ({"budget": 4, "text": "abcd"}, TextError, "4 bytes, but a context of 256 needs as many tokens"),
        ({"budget": 4, "text": "The code of Anna is falcon. " * 60}, TextError, "less than two chunks of 256 tokens"),
    ],
)
def test_what_cannot_be_tuned(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        tqgguf.tune(demo.MODEL_PATH, **{"n_ctx": 256, "n_chunks": 2, "n_threads": 1, **options})


def test_models_that_cannot_be_tuned(random_model: Model, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="needs a text"):
        tqgguf.tune(random_model(), budget=4)
    with pytest.raises(CacheTypeError, match="head_dim of K is 80"):
        tqgguf.tune(random_model(head_dim=80), "abcd", budget=4)
    with pytest.raises(FileNotFoundError):
        tqgguf.tune(tmp_path / "missing.gguf", "abcd", budget=4)
    whole = demo.MODEL_PATH.read_bytes()
    recurrent = tmp_path / "recurrent.gguf"
    recurrent.write_bytes(whole.replace(b"llama", b"rwkv6"))
    with pytest.raises(UnsupportedError, match="has no KV cache; nothing to tune"):
        tqgguf.tune(recurrent, "abcd", budget=4)


def test_a_context_beyond_the_trained_one_is_noted(random_model: Model) -> None:
    options: dict[str, Any] = {"n_ctx": 320, "n_chunks": 2, "n_threads": 1, "tail": 0}
    found = tqgguf.tune(random_model(n_ctx=256), "abcd " * 200, budget=4.0, types=("pqo3", "pqo4"), **options)
    assert "the context of 320 tokens exceeds the 256 that the model was trained for" in found.notes


def test_the_line_is_straight_in_the_logarithm() -> None:
    assert log_line((3.5, 0.4), (4.5, 0.1), 4.0) == pytest.approx(0.2)
    assert log_line((3.5, 0.4), (4.5, 0.1), 4.5) == pytest.approx(0.1)


def test_a_band_that_was_measured_badly_costs_what_others_cost() -> None:
    def band(kld: float, error: float) -> Band:
        return Band("K", (0,), "pqt3", kld, error, distortion=0.01)

    sure = [band(0.02, 1e-6), band(0.04, 1e-6)]
    assert [cost(each, sure) for each in sure] == pytest.approx([2.0, 4.0])
    for kld in (0.0, -0.5, 0.5):
        unsure = band(kld, 1.0)
        assert cost(unsure, [*sure, unsure]) == pytest.approx(max((0.06 + kld), 1.0) / 0.03, rel=0.5)
    exact = band(0.0, 1e-4)  # it costs little, and that is known
    assert 0.01 <= cost(exact, [*sure, exact]) < 0.02
