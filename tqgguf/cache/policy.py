"""Cache policies: which type each layer stores K and V in, and how its keys are calibrated: a mean and a gain.

A policy is written by hand, as ranges of layers::

    {"default": "pqo3", "layers": {"0-1": "q8_0", "-2:": ("pqo4", "pqo3")}}

or measured by `tqgguf tune` and kept in a policy file: a GGUF file without weights that any GGUF tool can list.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .._util import replacing, warn
from ..config import CACHE_TYPES, CacheSpec, CacheType, parse_cache
from ..errors import ArgumentError, CacheTypeError, ModelFileError, ModelNotFoundError, PolicyError
from ..gguf.header import GgufHeader, read_header
from ..gguf.info import KVLayer, ModelInfo, read_model_info
from .tail import kept, tail_bytes

POLICY_VERSION: Final = 1
"""Of the file format; another one is refused."""

_ARCHITECTURE: Final = "tqgguf-policy"
_F32: Final = 0
_HASHED_BYTES: Final = 1 << 20
_LARGEST_MEAN: Final = 65504.0
"""The largest f16: no key that can be stored is larger."""
_LARGEST_GAIN: Final = 1024.0
"""Of a channel, and the inverse of the smallest. Beyond, keys of usual size (1 to 64) leave the range of f16."""


@dataclass(frozen=True, eq=False)
class CachePolicy:
    """A type for K and V of every layer of a model.

    Attributes:
        types_k: names of the types of K, by layer; layers without a cache have one too, which is not used.
        types_v: the same for V.
        k_means: by layer, what is subtracted from every key before it is stored: (n_head_kv, head_dim_k) float32,
            after RoPE. Softmax does not notice, for all scores of a query move alike. Empty: keys are not centred.
        model_hash: of the model it was measured on (`model_hash`), or "" if it was not measured.
        tail: newest tokens that were kept in f16 when it was measured; None if it was not. Nothing is set by it.
        ranges: layers that were named together, by the words that named them; see `policy_from_ranges`.
        k_gains: by layer, what every key less its mean is multiplied by before it is stored, as `k_means`: positive,
            1/1024 to 1024. Queries are divided by it, so that scores stay what they are. It moves precision to the
            channels whose gain is large. Empty: by nothing.
    """

    types_k: tuple[str, ...]
    types_v: tuple[str, ...]
    k_means: Mapping[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    model_hash: str = ""
    tail: int | None = None
    ranges: Mapping[str, Sequence[int]] = field(default_factory=dict)
    k_gains: Mapping[int, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n_k, n_v = len(self.types_k), len(self.types_v)
        if n_k != n_v:
            raise PolicyError(f"a policy has types for K of {n_k} layers and for V of {n_v}")
        for name in (*self.types_k, *self.types_v):
            if name not in CACHE_TYPES:
                raise PolicyError(f"a policy names the cache type {name!r}; valid types are {', '.join(CACHE_TYPES)}")
        self._check_vectors("mean key", self.k_means)
        for layer, mean in self.k_means.items():
            if not (np.abs(mean) <= _LARGEST_MEAN).all():
                raise PolicyError(f"layer {layer}: a mean key must be finite and at most {_LARGEST_MEAN:g}")
        self._check_vectors("key gain", self.k_gains)
        for layer, gain in self.k_gains.items():
            if not ((gain >= 1 / _LARGEST_GAIN) & (gain <= _LARGEST_GAIN)).all():
                bounds = f"from 1/{_LARGEST_GAIN:g} to {_LARGEST_GAIN:g}"
                raise PolicyError(f"layer {layer}: a key gain must be positive and finite, {bounds}")

    def _check_vectors(self, name: str, vectors: Mapping[int, npt.NDArray[np.float32]]) -> None:
        for layer, values in vectors.items():
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.n_layer:
                raise PolicyError(f"a policy has a {name} for layer {layer!r}; it has layers 0 to {self.n_layer - 1}")
            if not isinstance(values, np.ndarray) or values.dtype.kind != "f" or values.ndim != 2:
                raise PolicyError(
                    f"layer {layer}: a {name} must be an array (n_head_kv, head_dim_k) of floats, not {values!r:.80}"
                )

    @property
    def calibrated(self) -> bool:
        """Whether keys of a layer are stored less a mean or times a gain."""
        return bool(self.k_means or self.k_gains)

    @property
    def uniform(self) -> tuple[CacheType, CacheType] | None:
        """The types of K and V if all layers share them and no keys are calibrated: what llama.cpp does by itself."""
        same = len(set(self.types_k)) == len(set(self.types_v)) == 1 and not self.calibrated
        return self.types(0) if same else None

    @property
    def words(self) -> str:
        """ "pqo3", or "pqo4/pqo3" if K and V differ; "" if layers do or keys are calibrated."""
        if self.uniform is None:
            return ""
        k, v = self.uniform
        return k.name if k == v else f"{k.name}/{v.name}"

    @property
    def n_layer(self) -> int:
        """Layers it has types for."""
        return len(self.types_k)

    def types(self, layer: int) -> tuple[CacheType, CacheType]:
        """Types of K and V of a layer."""
        return CACHE_TYPES[self.types_k[layer]], CACHE_TYPES[self.types_v[layer]]

    def bytes_per_token(self, info: ModelInfo) -> int:
        """Bytes that one token takes in all layers together of the model that info describes."""
        return sum(layer.bytes_per_token(*self.types(layer.index)) for layer in info.layers)

    @property
    def ours(self) -> bool:
        """Whether a layer has a type of tqgguf."""
        return any(CACHE_TYPES[name].ours for name in (*self.types_k, *self.types_v))

    @property
    def quantized(self) -> bool:
        """Whether a layer has a quantized type, so that there can be a tail."""
        return any(CACHE_TYPES[name].quantized for name in (*self.types_k, *self.types_v))

    def kept(self, tail: int | None) -> int:
        """Newest tokens that are kept in f16 beside the blocks of a layer; 0: none are.

        Args:
            tail: as for `Llama`.
        """
        return max((kept(CACHE_TYPES[name], tail) for name in (*self.types_k, *self.types_v)), default=0)

    def kept_by_stock(self, tail: int | None) -> bool:
        """Whether a stock type has a tail, which is for the CPU alone.

        Args:
            tail: as for `Llama`.
        """
        kinds = (CACHE_TYPES[name] for name in (*self.types_k, *self.types_v))
        return any(kept(kind, tail) for kind in kinds if not kind.ours)

    def bytes(
        self,
        info: ModelInfo,
        n_ctx: int,
        tail: int | None,
        n_ubatch: int = 512,
        *,
        n_seq: int = 1,
        unified: bool = False,
        swa_full: bool = True,
    ) -> int:
        """Bytes llama.cpp allocates for the KV cache of a context, its tail included.

        Args:
            info: the model.
            n_ctx: tokens of all sequences together.
            tail: newest tokens kept in f16, as for `Llama`.
            n_ubatch: tokens computed at once; they add to the cells of layers that keep their sliding window alone.
            n_seq: sequences that share the context.
            unified: whether all share one cache, instead of a part of the context for each.
            swa_full: whether layers with a sliding window keep all tokens nevertheless, as `Llama` has it by default.
        """
        total = 0
        n_stream = 1 if unified else n_seq
        for layer in info.layers:
            k, v = self.types(layer.index)
            cells = layer.cells(n_ctx, n_ubatch, n_seq, unified, swa_full)
            total += n_stream * (cells * layer.bytes_per_token(k, v) + tail_bytes(layer, k, v, tail, cells))
        return total

    def bits(self, info: ModelInfo) -> float:
        """Bits per value of K and V, over all layers of the model that info describes, tails not counted."""
        return 8 * self.bytes_per_token(info) / info.values_per_token if info.layers else 0.0

    def obstacle(self, info: ModelInfo) -> str | None:
        """Why this policy cannot be used with the model that info describes, or None if it can."""
        if self.n_layer != info.n_layer:
            return f"it is for {self.n_layer} layers, the model has {info.n_layer}"
        cached = {layer.index for layer in info.layers}
        for text, layers in self.ranges.items():
            if cached.isdisjoint(layers):
                which = f"layer {layers[0]} has" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]} have"
                return f"range {text!r} names layers without a KV cache: {which} none"
        for layer in info.layers:
            k, v = self.types(layer.index)
            if info.mla and k != v:
                return f"layer {layer.index}: K and V share one latent in this model (MLA), their types cannot differ"
            if reason := layer.obstacle(k, v):
                return reason
            for what, vectors in (("mean key", self.k_means), ("key gain", self.k_gains)):
                values = vectors.get(layer.index)
                if values is not None and values.shape != (layer.n_head_kv, layer.head_dim_k):
                    return (
                        f"layer {layer.index}: the {what} has shape {values.shape}, "
                        f"the model's keys have ({layer.n_head_kv}, {layer.head_dim_k})"
                    )
        return (info.centring_obstacle if self.k_means else None) or (info.gain_obstacle if self.k_gains else None)

    def rotates_k(self, layer: KVLayer) -> bool:
        """Whether keys of a layer are rotated behind their calibration, where rotation is allowed.

        llama.cpp rotates the keys of all layers or of none. A policy that calibrates a layer leaves that to the layers:
        each of a stock quantized type is rotated, and each of a type of tqgguf that has a gain. Such a type rotates
        every block of 32 values by itself; behind a gain, which makes keys large where queries are, a Hadamard matrix
        of its blocks makes them equal, too.
        """
        k, _ = self.types(layer.index)
        gains = k.quantized and (not k.ours or layer.index in self.k_gains)
        return self.calibrated and gains and layer.head_dim_k % 64 == 0

    def write(self, path: str | Path) -> None:
        """Writes a policy file, whole or not at all: a failure leaves a file that was there as it is.

        Args:
            path: the file; its name must end in .gguf to be taken as a policy file where a cache type is expected.

        Raises:
            OSError: it cannot be written.
        """
        with vectors_written(path, "policy", _ARCHITECTURE, self.k_means, self.k_gains) as writer:
            writer.add_uint32(f"{_ARCHITECTURE}.version", POLICY_VERSION)
            writer.add_string(f"{_ARCHITECTURE}.model_hash", self.model_hash)
            if self.tail is not None:
                writer.add_uint32(f"{_ARCHITECTURE}.tail", self.tail)
            writer.add_array(f"{_ARCHITECTURE}.types_k", list(self.types_k))
            writer.add_array(f"{_ARCHITECTURE}.types_v", list(self.types_v))


# ---- Ranges of layers ----


def policy_from_ranges(spec: Mapping[str, Any], n_layer: int) -> CachePolicy:
    """A policy from `{"default": TYPES, "layers": {RANGE: TYPES, ...}}`.

    TYPES is a type name, or a pair for K and V apart. RANGE is a layer ("3", "-1" the last), first and last ("0-1"), or
    a Python slice ("-2:", ":4", "2:6"). Layers in it may be without a KV cache, as in hybrid models, but not all.

    Raises:
        PolicyError: an unknown key, a range that is no range or names a layer the model does not have, or two ranges
            that name the same layer.
        ArgumentError: an unknown type; the message lists the valid ones.
    """
    unknown = sorted(set(map(str, spec)) - {"default", "layers"})
    if unknown or "default" not in spec:
        what = f"has the unknown key {unknown[0]!r}" if unknown else "has no default"
        raise PolicyError(f'a cache policy {what}; it is {{"default": TYPE, "layers": {{"0-1": TYPE, ...}}}}')
    ranges = spec.get("layers") or {}
    if not isinstance(ranges, Mapping):
        raise PolicyError(f"layers of a cache policy must be a mapping from ranges to types, not {ranges!r}")
    types = [parse_cache(spec["default"])] * n_layer
    owner: dict[int, str] = {}
    named = {str(text): tuple(_layers(str(text), n_layer)) for text in ranges}
    for text, kinds in ranges.items():
        pair = parse_cache(kinds)
        for layer in named[str(text)]:
            if layer in owner:
                raise PolicyError(f"ranges {owner[layer]!r} and {text!r} of a cache policy both name layer {layer}")
            owner[layer] = str(text)
            types[layer] = pair
    return CachePolicy(tuple(k.name for k, _ in types), tuple(v.name for _, v in types), ranges=named)


def _layers(text: str, n_layer: int) -> range:
    if m := re.fullmatch(r"([0-9]+)-([0-9]+)", text):
        first, last = int(m[1]), int(m[2])
    elif re.fullmatch(r"-?[0-9]+", text):
        first = last = int(text) + (n_layer if text.startswith("-") else 0)
    elif m := re.fullmatch(r"(-?[0-9]+)?:(-?[0-9]+)?", text):
        bounds = [int(bound) + (n_layer if bound.startswith("-") else 0) if bound else None for bound in m.groups()]
        first, last = bounds[0] or 0, (n_layer if bounds[1] is None else bounds[1]) - 1
    else:
        raise PolicyError(f"{text!r} is no range of layers; allowed are '3', '-1', '0-1', '-2:', ':4', '2:6'")
    if not 0 <= first <= last < n_layer:
        raise PolicyError(f"range {text!r} names no layers of this model; it has layers 0 to {n_layer - 1}")
    return range(first, last + 1)


# ---- Files ----


def model_hash(model: str | Path | ModelInfo) -> str:
    """What ties a policy to a model: SHA-256 of a GGUF file's header, its size, and the first MiB of its weights.

    Args:
        model: a GGUF file, or what was read from it, which spares reading its header again.

    Raises:
        ModelFileError: see `read_model_info`.
    """
    info = model if isinstance(model, ModelInfo) else read_model_info(model)
    with info.path.open("rb") as file:
        digest = hashlib.sha256(file.read(info.header_bytes + _HASHED_BYTES))
    digest.update(info.file_bytes.to_bytes(8, "little"))
    return digest.hexdigest()


Vectors = dict[int, npt.NDArray[np.float32]]
"""By layer, (n_head_kv, head_dim_k)."""


@contextlib.contextmanager
def vectors_written(
    path: str | Path,
    what: str,
    architecture: str,
    means: Mapping[int, npt.NDArray[np.float32]],
    gains: Mapping[int, npt.NDArray[np.float32]],
) -> Iterator[Any]:
    """For writing a GGUF file with means and gains, whole or not at all: yields the writer, for its keys.

    Args:
        path: the file.
        what: what it is, for messages.
        architecture: its `general.architecture`.
        means: by layer.
        gains: by layer.

    Raises:
        OSError: it cannot be written.
    """
    import gguf

    with replacing(path, what=what) as part, contextlib.closing(gguf.GGUFWriter(str(part), architecture)) as writer:
        yield writer
        writer.add_string(f"{architecture}.sha256", _vectors_digest(means, gains))
        for name, vectors in (("k_mean", means), ("k_gain", gains)):
            for layer, values in sorted(vectors.items()):
                writer.add_tensor(f"blk.{layer}.{name}", np.ascontiguousarray(values, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _vectors_digest(means: Mapping[int, npt.NDArray[np.float32]], gains: Mapping[int, npt.NDArray[np.float32]]) -> str:
    """SHA-256 of means and gains, each with its layer and shape."""
    digest = hashlib.sha256()
    for name, vectors in (("k_mean", means), ("k_gain", gains)):
        for layer, values in sorted(vectors.items()):
            digest.update(f"{name} {layer} {np.shape(values)}".encode())
            digest.update(np.ascontiguousarray(values, "<f4").tobytes())
    return digest.hexdigest()


def read_vectors(file: Path, header: GgufHeader, n_layer: int) -> tuple[Vectors, Vectors]:
    """The means and gains of a file that `vectors_written` wrote for n_layer layers.

    Raises:
        PolicyError: it holds another tensor, or one twice; or their checksum, which older files lack, does not match.
    """
    vectors: dict[str, Vectors] = {"k_mean": {}, "k_gain": {}}
    for tensor in header.tensors:
        match = re.fullmatch(r"blk\.([0-9]{1,4})\.(k_mean|k_gain)", tensor.name)
        layer, found_in = (int(match[1]), vectors[match[2]]) if match else (-1, {})
        if (tensor.type, len(tensor.shape)) != (_F32, 2) or not 0 <= layer < n_layer or layer in found_in:
            raise PolicyError(f"{file} holds the tensor {tensor.name!r:.80}: no policy for {n_layer} layers has that")
        values = np.fromfile(file, "<f4", tensor.bytes // 4, offset=tensor.begin)
        found_in[layer] = values.astype(np.float32).reshape(tensor.shape)
    means, gains = vectors["k_mean"], vectors["k_gain"]
    expected = header.metadata.get(f"{header.metadata.get('general.architecture')}.sha256")
    if expected is not None and expected != _vectors_digest(means, gains):
        raise PolicyError(f"{file} is damaged: the checksum of its means and gains does not match")
    return means, gains


def read_policy(path: str | Path) -> CachePolicy:
    """Reads a policy file.

    Args:
        path: a file that `CachePolicy.write` or `tqgguf tune` wrote.

    Raises:
        ModelNotFoundError: no such file, or no regular one.
        PolicyError: not a policy file, of another version, damaged, or with an unknown type.
    """
    file = Path(path)
    try:
        header = read_header(file)
        found = {key: header.metadata.get(f"{_ARCHITECTURE}.{key}") for key in ("version", "types_k", "types_v")}
        if header.metadata.get("general.architecture") != _ARCHITECTURE:
            raise PolicyError(f"{file} is a GGUF file but no cache policy")
        if (version := found["version"]) != POLICY_VERSION:
            raise PolicyError(f"{file} has policy version {version!r}, this tqgguf reads {POLICY_VERSION}: tune again")
        types_k, types_v = found["types_k"], found["types_v"]
        if not (isinstance(types_k, list) and isinstance(types_v, list)):
            raise PolicyError(f"{file} has no types")
        means, gains = read_vectors(file, header, len(types_k))
        hash_ = header.metadata.get(f"{_ARCHITECTURE}.model_hash")
        tail = header.metadata.get(f"{_ARCHITECTURE}.tail")
        return CachePolicy(
            tuple(types_k),
            tuple(types_v),
            means,
            hash_ if isinstance(hash_, str) else "",
            tail if isinstance(tail, int) else None,
            k_gains=gains,
        )
    except ModelNotFoundError:
        what = "is no regular file" if file.exists() else "does not exist"
        raise ModelNotFoundError(f"cache policy {file} {what}") from None
    except ModelFileError as error:
        raise PolicyError(f"cannot read the cache policy: {error}") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError(f"{file} is a damaged cache policy: {error}") from None


# ---- What `Llama` asks for ----


PolicySpec = CacheSpec | Mapping[str, Any] | CachePolicy | Path
"""What `cache=` of `Llama` accepts: a type, a pair, ranges of layers, a policy, or the path of a policy file."""


def resolve(cache: PolicySpec, n_layer: int) -> CachePolicy:
    """The policy that any form of `cache=` stands for, in a model of n_layer layers.

    Raises:
        ArgumentError, PolicyError, ModelNotFoundError: as `parse_cache`, `policy_from_ranges` and `read_policy`.
    """
    if isinstance(cache, CachePolicy):
        return cache
    if isinstance(cache, Path) or (isinstance(cache, str) and cache.endswith(".gguf")):
        return read_policy(cache)
    if isinstance(cache, Mapping):
        return policy_from_ranges(cache, n_layer)
    if isinstance(cache, (str, Sequence)):
        k, v = parse_cache(cache)
        return CachePolicy((k.name,) * n_layer, (v.name,) * n_layer)
    raise ArgumentError(f"cache must be a type, a pair of types, a policy or a policy file, not {cache!r}")


def needs_flash(policy: CachePolicy, tail: int | None) -> bool:
    """Whether a cache works with flash attention alone: one with a type of tqgguf, a quantized V, or a tail."""
    types = (policy.types(layer) for layer in range(policy.n_layer))
    return policy.kept(tail) > 0 or any(k.ours or v.quantized for k, v in types)


def needs_tqgguf(policy: CachePolicy, tail: int | None) -> bool:
    """Whether a stock llama.cpp would not do with a cache: one with a type of tqgguf, or a tail."""
    return policy.ours or policy.kept(tail) > 0


def base_types(policy: CachePolicy, info: ModelInfo) -> tuple[CacheType, CacheType]:
    """The types in llama.cpp's own parameters: those of the first layer that has a cache."""
    return policy.types(info.layers[0].index if info.layers else 0)


def cache_words(policy: CachePolicy) -> str:
    """A cache in words, for messages."""
    if policy.uniform is None:
        return "a KV cache with this policy"
    k, v = policy.uniform
    return f"a {k.name} KV cache" if k == v else f"a {k.name} (K) and {v.name} (V) KV cache"


def refuse_idle_tail(policy: CachePolicy, tail: int | None) -> None:
    """Raises ArgumentError if a tail is asked for beside types that are precise without one."""
    if tail and not policy.quantized:
        raise ArgumentError(
            f"tail is {tail}, but {cache_words(policy)} has no blocks that a tail could improve: leave it out, "
            f"or choose a quantized type"
        )


def refuse_impossible(info: ModelInfo, policy: CachePolicy) -> None:
    """Raises CacheTypeError if the model cannot have such a cache; the message names layer and reason.

    Warns if the policy was measured on another model.
    """
    same = policy.uniform
    fits = policy.n_layer == info.n_layer
    obstacle = info.obstacle(*same) if same and fits and not policy.ranges else policy.obstacle(info)
    if obstacle:
        raise CacheTypeError(f"{info.path.name} cannot have {cache_words(policy)}: {obstacle}")
    if policy.model_hash and policy.model_hash != model_hash(info):
        warn(
            f"this cache policy was measured on another model than {info.path.name}: "
            f"its types, mean keys and gains may not suit it"
        )
