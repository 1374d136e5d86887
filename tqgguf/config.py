"""Cache types by name, the `cache=` specification, and the configuration of a stand-alone cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from .errors import ArgumentError

Mode = Literal["search", "maxnorm", "l2norm"]
"""How the scale of a block is found (docs/formats.md)."""
MODES: Final[tuple[Mode, ...]] = ("search", "maxnorm", "l2norm")

CacheSpec = str | Sequence[str]
"""What `cache=` accepts: the name of a type or of a preset, or a pair (K type, V type)."""


@dataclass(frozen=True)
class CacheType:
    """A type that llama.cpp can store K or V in.

    Attributes:
        name: as written everywhere, "pqo3" or "q8_0".
        number: ggml's number of the type; ours are registered by our patch series and never change.
        block: values per block; head_dim must be a multiple of it.
        bytes: bytes per block.
    """

    name: str
    number: int
    block: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits per value."""
        return 8 * self.bytes / self.block

    @property
    def quantized(self) -> bool:
        """Whether values are stored in blocks, as opposed to plain floats."""
        return self.block > 1

    @property
    def ours(self) -> bool:
        """Whether this is a type of tqgguf, which stock llama.cpp does not know."""
        return self.name.startswith(("pqo", "pqt"))

    def row_bytes(self, n: int) -> int:
        """Bytes of n values.

        Raises:
            ArgumentError: n is negative or no multiple of the block.
        """
        if n < 0 or n % self.block:
            raise ArgumentError(f"{n} values cannot be stored as {self.name}: not a multiple of {self.block}")
        return n // self.block * self.bytes


CACHE_TYPES: Final[dict[str, CacheType]] = {
    t.name: t
    for t in (
        CacheType("f32", 0, 1, 4),
        CacheType("f16", 1, 1, 2),
        CacheType("bf16", 30, 1, 2),
        CacheType("q8_0", 8, 32, 34),
        CacheType("q5_1", 7, 32, 24),
        CacheType("q5_0", 6, 32, 22),
        CacheType("q4_1", 3, 32, 20),
        CacheType("q4_0", 2, 32, 18),
        CacheType("iq4_nl", 20, 32, 18),
        CacheType("pqt5", 305, 32, 22),
        CacheType("pqt4", 303, 32, 18),
        CacheType("pqo4", 301, 32, 18),
        CacheType("pqt3", 302, 32, 14),
        CacheType("pqo3", 300, 32, 14),
        CacheType("pqt2", 304, 32, 10),
    )
}
"""Every type a KV cache may have, by name: ours, and those of llama.cpp (f32, f16, bf16, q8_0 to iq4_nl)."""

MEASURED_TYPES: Final = ("f16", "q8_0", "q5_0", "q4_0", "iq4_nl", "pqo4", "pqt4", "pqo3", "pqt3")
"""The types that `compare` and `recall` measure by default; the first is the reference."""

PREFERRED_TYPES: Final = ("f16", "q8_0", "pqt4", "pqo4", "pqt3", "pqo3", "q4_0")
"""The types that `inspect` lists by default, in the order of the median KL divergence from f16 on two real
models, each as `Llama` has it (README). q4_0 is larger than the two before it and less precise."""


PRESETS: Final[dict[str, tuple[str, str]]] = {
    "best": ("pqt5", "pqt4"),
    "balanced": ("pqt4", "pqt3"),
    "small": ("pqt3", "pqt3"),
    "tiny": ("pqt3", "pqt2"),
}
"""Pairs (K type, V type) by purpose. Errors of keys cost more than those of values, so K is the more precise one."""


FIT_CACHES: Final = ("f16", "q8_0", "best", "pqt4", "pqo4", "balanced", "pqt3", "pqo3", "tiny", "q4_0")
"""What `fit` lists by default, in the order of the median KL divergence, up to rounding; `small` is pqt3. q4_0 is
larger than some before it and less precise than all."""


def cache_type(name: Any) -> CacheType:
    """The cache type of that name (case does not matter).

    Raises:
        ArgumentError: there is none such; the message lists the valid ones.
    """
    found = CACHE_TYPES.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise ArgumentError(f"unknown cache type {name!r}; valid types are {', '.join(CACHE_TYPES)}")
    return found


def parse_cache(spec: CacheSpec) -> tuple[CacheType, CacheType]:
    """K and V type of a `cache=` specification.

    Args:
        spec: the name of a type for both, a pair of names for K and V apart, such as ("pqo4", "pqo3"), or the name of
            one of PRESETS.

    Raises:
        ArgumentError: neither a name nor a pair of names, or an unknown name.
    """
    if isinstance(spec, str):
        if spec.lower() not in {*PRESETS, *CACHE_TYPES}:
            raise ArgumentError(
                f"unknown cache type {spec!r}; valid types are {', '.join(CACHE_TYPES)}; presets are "
                f"{', '.join(f'{name} ({k}/{v})' for name, (k, v) in PRESETS.items())}"
            )
        k, v = PRESETS.get(spec.lower(), (spec, spec))
        return cache_type(k), cache_type(v)
    if isinstance(spec, Sequence) and len(spec) == 2:
        return cache_type(spec[0]), cache_type(spec[1])
    raise ArgumentError(f"cache must be a type name or a pair (K type, V type), not {spec!r}")


MAX_HEAD_DIM: Final = 16384
MAX_HEADS: Final = 16384
"""As TQ_MAX_HEAD_DIM and TQ_MAX_HEADS in tqgguf.h."""


@dataclass(frozen=True)
class CacheConfig:
    """Shape and codec of a `PqoCache`.

    Attributes:
        bits: 3 (type pqo3) or 4 (type pqo4).
        head_dim: values per head, a multiple of 32.
        n_head_kv: KV heads.
        n_layer: layers.
        mode: how scales are found: `search` (least squared error), or `maxnorm` and `l2norm` as turboquant-rs does.

    Raises:
        ArgumentError: a field is out of its range; the message says what was given and what is allowed.
    """

    bits: int = 3
    head_dim: int = 128
    n_head_kv: int = 1
    n_layer: int = 1
    mode: Mode = "search"

    def __post_init__(self) -> None:
        for name in ("bits", "head_dim", "n_head_kv", "n_layer"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise ArgumentError(f"{name} must be an integer, not {value!r}")
            object.__setattr__(self, name, value.__index__())
        if self.bits not in (3, 4):
            raise ArgumentError(f"bits is {self.bits}, must be 3 or 4")
        if not 0 < self.head_dim <= MAX_HEAD_DIM or self.head_dim % 32:
            raise ArgumentError(
                f"head_dim is {self.head_dim}, must be a positive multiple of 32, at most {MAX_HEAD_DIM}"
            )
        for name, most in (("n_head_kv", MAX_HEADS), ("n_layer", 2**31 - 1)):
            if not 0 < getattr(self, name) <= most:
                raise ArgumentError(f"{name} is {getattr(self, name)}, must be between 1 and {most}")
        if self.mode not in MODES:
            raise ArgumentError(f"unknown mode {self.mode!r}; valid modes are {', '.join(MODES)}")

    @property
    def type(self) -> CacheType:
        """The block format: pqo3 or pqo4."""
        return CACHE_TYPES["pqo3" if self.bits == 3 else "pqo4"]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of blocks, K and V, that one token takes in one layer."""
        return 2 * self.n_head_kv * self.type.row_bytes(self.head_dim)
