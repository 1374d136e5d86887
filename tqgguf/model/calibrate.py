"""Measures a calibration of a model's keys: a mean and a gain for each channel, from one reading of a text.

Softmax gives the same weights to q.k and to (q / D).(D (k - m)), for any m and any D > 0 of a KV head. The encoder
spreads its error evenly over the channels of a block, so D makes it small where queries look. For a block whose
channels have E q^2 and E (k - m)^2, the expected squared error of a score is proportional to

    (sum_i D_i^2 E (k_i - m_i)^2) (sum_i E q_i^2 / D_i^2)

which is least for D_i = (E q_i^2 / E (k_i - m_i)^2)^(1/4). An error of key j moves the softmax of a query by p_j (1 -
p_j), so the expectations are weighted: a query by the sum of its p (1 - p), a key by the sum over the queries that see
it.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._machine import processors
from .._native import import_llama_cpp
from .._util import check_count, tell, warn
from ..cache.calibration import Calibration, default_choice, read_calibration, stored_calibration
from ..cache.policy import CachePolicy
from ..errors import ArgumentError, CalibrationError, TextError, UnsupportedError
from ..gguf.identity import model_identity
from ..gguf.info import ModelInfo, read_model_info
from .context import captured_log, opened_model
from .reading import AttentionInputs, Loaded, read_attention

llama_cpp: Any = import_llama_cpp()

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

TEXT: Final = Path(__file__).with_name("calibration.txt")
"""Prose, code, dialogue, tables and eight languages, about 2,000 tokens, written for this."""

DEFAULT_TOKENS: Final = 1408
FEWEST_TOKENS: Final = 64
SPAN: Final = 128
"""Tokens that are taken together, where a text has more than are read: a bit of every part says more than the first
part alone (benchmarks/quality/calibration.py)."""

EXPONENT: Final = 0.75
"""Of the best gain of the formula. Statistics of one text are not those of another, so the gain is held back: 1 leaves
less error in Gemma 3 and more in SmolLM2, by a twentieth each (benchmarks/quality/calibration.py)."""

QUERY_STEP: Final = 4
"""Every fourth query is asked which keys it looks at: reading the text takes longer than these statistics then."""

FAR: Final = (0.0, 0.1, 0.35, 0.9)
LONGEST: Final = 8192
"""Shares of a context of so many tokens, or of the trained one, at which the text's parts are read: those of short
contexts are favoured. Read at the beginning alone, the keys of SmolLM2 lost more than without a calibration at 8,192
tokens (benchmarks/quality/calibration.py)."""

QUERIES_AT_ONCE: Final = 256
SMALLEST_SHARE: Final = 1e-4
"""Of a head's mean energy, the least a channel is taken to have: a constant channel needs no infinite gain."""

LARGEST_GAIN: Final = 256.0


def calibrate(
    path: str | Path,
    text: str | None = None,
    *,
    n_tokens: int | None = None,
    n_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measures mean and gain of every channel of a model's keys in one reading of a text.

    Any calibration leaves what a model computes as it is, up to rounding; a good one makes the error of quantized keys
    smaller. Which text it is hardly matters.

    Args:
        path: a GGUF file.
        text: any text; None for a built-in one of about 2,000 tokens.
        n_tokens: how many of its tokens are read, as one batch: in spans that lie evenly over the text. None:
            DEFAULT_TOKENS, or as many as the text has or the model was trained on.
        n_threads: threads; None for all processors.
        progress: called as progress(layers read, layers in all).

    Raises:
        ArgumentError: n_tokens below FEWEST_TOKENS.
        TextError: the text has fewer tokens than that.
        CalibrationError: nothing of the model may be calibrated: it has no KV cache, or keeps V within K (MLA).
        UnsupportedError: the model does not run flash attention.
        ModelFileError, OutOfMemoryError, TqggufError: as `tqgguf.Llama`.
    """
    if n_tokens is not None:
        check_count("n_tokens", n_tokens, FEWEST_TOKENS)
    info = read_model_info(path)
    _refuse_impossible(info)
    words = TEXT.read_text(encoding="utf-8") if text is None else text
    if not isinstance(words, str):
        raise ArgumentError(f"text is of type {type(words).__name__}, must be a str")
    if n_threads is None:
        n_threads = processors()
    inputs, used = _reading(info, words, n_tokens, n_threads, progress)
    # Not while the model waits: the threads of NumPy's matrix products and those of ggml would wait for each other.
    with ThreadPoolExecutor(n_threads) as pool:
        found = dict(zip(inputs, pool.map(key_statistics, inputs.values()), strict=True))
    centred = info.centring_obstacle is None
    return Calibration(
        means={layer: each.mean.astype(np.float32) for layer, each in found.items()} if centred else {},
        gains={layer: each.gain(EXPONENT, centred) for layer, each in found.items()},
        model=model_identity(info.path),
        n_layer=info.n_layer,
        n_tokens=used,
    )


def _reading(
    info: ModelInfo,
    text: str,
    n_tokens: int | None,
    n_threads: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[int, AttentionInputs], int]:
    """What `sampled` leaves of the inputs of each layer, for tokens of a text, and how many tokens these are."""
    done = 0

    def read(inputs: AttentionInputs) -> AttentionInputs:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(info.layers))
        return sampled(inputs, QUERY_STEP)

    params = llama_cpp.llama_model_default_params()  # mapped, so that who loads it next finds it in memory
    params.n_gpu_layers = 0
    with captured_log(quiet=True), opened_model(info, params) as model:
        most = n_tokens or min(DEFAULT_TOKENS, llama_cpp.llama_model_n_ctx_train(model) or DEFAULT_TOKENS)
        tokens = spread(_tokens(model, text), most)
        if len(tokens) < (n_tokens or FEWEST_TOKENS):
            raise TextError(
                f"the text has {len(tokens):,} tokens, fewer than "
                + (f"the {n_tokens:,} asked for" if n_tokens else f"{FEWEST_TOKENS}, which a calibration needs")
            )
        # Where layers keep a recurrent state, llama.cpp computes sequences side by side and not one after another.
        hybrid = llama_cpp.llama_model_is_hybrid(model) or llama_cpp.llama_model_is_recurrent(model)
        starts = (0,) if hybrid else far_starts(len(tokens), llama_cpp.llama_model_n_ctx_train(model))
        layers = [layer.index for layer in info.layers]
        loaded = Loaded(model, info, n_threads)
        return read_attention(loaded, tokens, layers, read, cache="f16", starts=starts), len(tokens)


def far_starts(n_tokens: int, n_ctx_train: int) -> tuple[int, ...]:
    """Positions at which equal parts of a text are read, each from an empty context.

    RoPE turns slow channels by little in a thousand tokens, so the mean that keys have there is not the mean of keys at
    other positions, and subtracting it would add to them. Positions of a long context in part have both in view.
    """
    n_part = n_tokens // len(FAR)
    end = min(n_ctx_train, LONGEST)
    return tuple(round(share * (end - n_part)) for share in FAR) if end > n_tokens and n_part >= SPAN else (0,)


def spread(tokens: list[int], n: int) -> list[int]:
    """n tokens of a text, or all if it has no more: spans of SPAN that lie evenly over it, the first at its beginning.

    The last span is shorter if n is no multiple.
    """
    if len(tokens) <= n:
        return tokens
    n_span = -(-n // SPAN)
    starts = (round(i * (len(tokens) - SPAN) / max(n_span - 1, 1)) for i in range(n_span))
    return [token for start in starts for token in tokens[start : start + SPAN]][:n]


def sampled(inputs: AttentionInputs, step: int) -> AttentionInputs:
    """Every step-th query of a layer, and its keys, which come from an f16 cache: a fifth of the memory, or less."""
    q, mask = (np.ascontiguousarray(x[::step]) for x in (inputs.q, inputs.mask))
    return replace(inputs, q=q, k=inputs.k.astype(np.float16), v=inputs.v[:0], mask=mask.astype(np.float16))


def calibrated_by_default(info: ModelInfo, policy: CachePolicy) -> bool:
    """Whether keys are calibrated without being asked: some of them have a type of tqgguf, and nothing forbids it."""
    ours = any(policy.types(layer.index)[0].ours for layer in info.layers)
    return ours and not policy.calibrated and obstacle(info) is None


def obstacle(info: ModelInfo) -> str | None:
    """Why nothing of a model can be calibrated; None if something can."""
    if not info.layers:
        return "it has no KV cache"
    if info.architecture == "t5":
        return "T5's attention has a bias, for which flash attention has no place"
    return info.gain_obstacle


def _refuse_impossible(info: ModelInfo) -> None:
    if reason := obstacle(info):
        raise CalibrationError(f"nothing of {info.path.name} can be calibrated: {reason}")


def calibrated_policy(
    info: ModelInfo,
    policy: CachePolicy,
    choice: Calibration | str | Path | None,
    **options: Any,
) -> CachePolicy:
    """The policy with the calibration that was chosen for its model.

    Args:
        info: the model.
        policy: types of the KV cache.
        choice: None for `default_choice` where `calibrated_by_default`; else as for `chosen_calibration`.
        options: as for `chosen_calibration`.

    Raises:
        CalibrationError, ArgumentError: as `chosen_calibration`.
    """
    if choice is None and not calibrated_by_default(info, policy):
        return policy
    if choice == "off" and policy.calibrated:
        raise CalibrationError('this cache policy has means or gains of its own: leave calibration="off" out')
    if choice not in (None, "off") and not any(policy.types(layer.index)[0].quantized for layer in info.layers):
        raise CalibrationError(f"no keys of cache {policy.words or 'policy'} are quantized: leave the calibration out")
    found = chosen_calibration(info, choice, **options)
    return found.applied(policy, info) if found else policy


def chosen_calibration(
    info: ModelInfo,
    choice: Calibration | str | Path | None,
    *,
    measure: bool = True,
    n_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration | None:
    """The calibration that was chosen for a model, or None.

    Args:
        info: the model.
        choice: None for `default_choice`; "off" for none; "auto" for the one that is kept for this model, which is
            measured and kept if there is none yet; else a calibration, or the path of one.
        measure: whether one may be measured now, which needs the memory of this machine for the model.
        n_threads: threads to measure with.
        progress: called as progress(layers done, layers in all) while it is measured.

    Raises:
        ArgumentError: the choice is something else, or TQGGUF_CALIBRATION is.
        CalibrationError: a file that is no calibration or belongs to another model; nothing of the model may be
            calibrated; "auto" where there is none and none may be measured.
        Any other error of `calibrate`.
    """
    chosen = default_choice() if choice is None else choice
    if chosen == "off":
        return None
    if not isinstance(chosen, (Calibration, str, Path)) or chosen == "":
        raise ArgumentError(f'calibration is {choice!r}, must be "auto", "off", a Calibration or the path of one')
    if chosen == "auto":
        return _kept(info, choice is None, measure, n_threads, progress)
    found = chosen if isinstance(chosen, Calibration) else read_calibration(chosen)
    if found.model != model_identity(info.path):
        raise CalibrationError(
            f"this calibration was measured on another model than {info.path.name}: make one with tqgguf calibrate"
        )
    return found


def _kept(
    info: ModelInfo,
    unasked: bool,
    measure: bool,
    n_threads: int | None,
    progress: Callable[[int, int], None] | None,
) -> Calibration | None:
    """The model's calibration in the user's cache folder; measured now if there is none, or none that can be used.

    unasked: nobody chose it, so that a model that cannot have one goes without.
    """
    _refuse_impossible(info)
    identity = model_identity(info.path)
    path = stored_calibration(identity)
    if path.exists():
        try:
            kept = read_calibration(path)
            if kept.model == identity:
                return kept
            warn(f"{path} holds the calibration of another model: {info.path.name} is calibrated again")
        except CalibrationError as error:
            warn(f"{error}: the model is calibrated again")
    if identity in _unkept:
        return _unkept[identity]
    if not measure:
        said = f"{info.path.name} has not been calibrated on this machine: `tqgguf calibrate` does it"
        if not unasked:
            raise CalibrationError(said)
        warn(f"{said}; its keys are stored as they are")
        return None
    tell(f"calibrating the keys of {info.path.name}, once for this model (TQGGUF_CALIBRATION=off leaves it out)")
    start = time.monotonic()
    try:
        found = calibrate(info.path, n_threads=n_threads, progress=progress)
    except UnsupportedError as error:
        if not unasked:
            raise
        warn(f"{error}; its keys are stored as they are")
        found = _unkept[identity] = Calibration({}, {}, identity, info.n_layer, 0)  # it is not tried again
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.write(path)
    except (OSError, ArgumentError) as error:  # the latter: it is no regular file
        warn(
            f"the calibration of {info.path.name} cannot be kept in {path.parent} ({error}): this process alone has it"
        )
        _unkept[identity] = found
    tell(f"calibrated {info.path.name} in {time.monotonic() - start:.1f} s")
    return found


_unkept: Final[dict[str, Calibration]] = {}
"""By model identity, calibrations that serve this process alone: that could not be written, and those of models whose
attention cannot be seen, which are empty."""


def _tokens(model: Any, text: str) -> list[int]:
    data = text.encode()
    room = len(data) + 8
    tokens = (llama_cpp.llama_token * room)()
    vocab = llama_cpp.llama_model_get_vocab(model)
    n = llama_cpp.llama_tokenize(
        vocab, data, len(data), ctypes.cast(tokens, llama_cpp.llama_token_p), room, True, False
    )
    return list(tokens[: max(n, 0)])


@dataclass(frozen=True)
class KeyStatistics:
    """Weighted statistics of one layer's attention. All are (n_head_kv, head_dim_k) float64.

    Attributes:
        mean: of the keys.
        k2: E (k - mean)^2.
        q2: E q^2, over the query heads of a KV head.
    """

    mean: F64
    k2: F64
    q2: F64

    def gain(self, exponent: float, centred: bool = True) -> F32:
        """D of each channel: (q2 / k2)^(exponent / 4), of geometric mean 1 in each head.

        Args:
            exponent: 1 is best for these statistics, less holds the gain back.
            centred: whether keys are stored less their mean; else k2 is E k^2.
        """
        energy = self.k2 if centred else self.k2 + np.square(self.mean)
        q2, k2 = (x + SMALLEST_SHARE * x.mean(axis=1, keepdims=True) + 1e-30 for x in (self.q2, energy))
        log = exponent / 4 * (np.log(q2) - np.log(k2))
        found = np.exp(log - log.mean(axis=1, keepdims=True))
        gain: F32 = np.clip(found, 1 / LARGEST_GAIN, LARGEST_GAIN).astype(np.float32)
        return gain


def key_statistics(inputs: AttentionInputs, weighted: bool = True) -> KeyStatistics:
    """The statistics of a layer whose text was read as one batch.

    Args:
        inputs: Q, K and what else attention takes; of the queries, as many as there are.
        weighted: whether queries and keys count by what softmax lets through; else all count alike.
    """
    (n, n_head_kv, _), n_q = inputs.k.shape, len(inputs.q)
    group = inputs.q.shape[1] // n_head_kv
    shape = (n_head_kv, inputs.k.shape[2])
    mean, k2, q2 = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    parts = [np.arange(first, min(first + QUERIES_AT_ONCE, n_q)) for first in range(0, n_q, QUERIES_AT_ONCE)]
    ends = [int(np.flatnonzero(np.isfinite(inputs.mask[rows]).any(axis=0))[-1]) + 1 for rows in parts]
    for head in range(n_head_kv):
        k = np.ascontiguousarray(inputs.k[:, head], dtype=np.float32)
        of_keys, total = np.zeros(n), 0.0
        for query_head in range(head * group, (head + 1) * group):
            for rows, end in zip(parts, ends, strict=True):
                q = inputs.q[rows, query_head]
                if weighted:
                    p = inputs.weights(q @ k[:end].T, query_head, rows)
                    moved = p - np.square(p)
                    of_keys[:end] += moved.sum(axis=0)
                    of_queries = moved.sum(axis=1)
                else:
                    of_queries = np.ones(len(q), np.float32)
                q2[head] += of_queries @ np.square(q)
                total += float(of_queries.sum())
        if not weighted:
            of_keys += 1.0
        weight = of_keys / max(of_keys.sum(), 1e-30)
        mean[head] = weight @ k
        k2[head] = weight @ np.square(k - mean[head])
        q2[head] /= max(total, 1e-30)
    return KeyStatistics(mean, k2, q2)
