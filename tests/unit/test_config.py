"""Cache types and the stand-alone cache's configuration: what is accepted, and what the refusals say."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tqgguf import config
from tqgguf.errors import ArgumentError, TqggufError


def test_types_are_numbered_and_sized_as_in_ggml() -> None:
    import gguf

    for kind in config.CACHE_TYPES.values():
        if kind.ours:
            continue
        number = gguf.GGMLQuantizationType[kind.name.upper()]
        assert (int(number), gguf.GGML_QUANT_SIZES[number]) == (kind.number, (kind.block, kind.bytes))


@pytest.mark.parametrize(
    ("name", "number", "bits"),
    [
        ("pqo3", 300, 3.5),
        ("pqo4", 301, 4.5),
        ("pqt3", 302, 3.5),
        ("pqt4", 303, 4.5),
        ("pqt2", 304, 2.5),
        ("pqt5", 305, 5.5),
    ],
)
def test_our_types_take_3_5_and_4_5_bits(name: str, number: int, bits: float) -> None:
    kind = config.CACHE_TYPES[name]
    assert kind.ours and (kind.number, kind.bits, kind.row_bytes(128)) == (number, bits, 16 * bits)


def test_numbers_are_those_of_the_library(native: Any) -> None:
    for kind in config.CACHE_TYPES.values():
        name = native.lib.tq_type_name(kind.number)
        if kind.ours:
            assert native.ffi.string(name).decode() == kind.name
            assert native.lib.tq_row_bytes(kind.number, 96) == kind.row_bytes(96)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("pqo3", ("pqo3", "pqo3")),
        ("PQO4", ("pqo4", "pqo4")),
        (("pqo4", "q8_0"), ("pqo4", "q8_0")),
        (["f16", "f32"],) * 2,
        *config.PRESETS.items(),
        ("Balanced", config.PRESETS["balanced"]),
    ],
)
def test_parse_cache(spec: Any, expected: Any) -> None:
    assert tuple(kind.name for kind in config.parse_cache(spec)) == tuple(expected)


def test_an_unknown_type_lists_the_valid_ones() -> None:
    with pytest.raises(ArgumentError) as caught:
        config.parse_cache("q3")
    assert "'q3'" in str(caught.value)
    for name in (*config.CACHE_TYPES, *config.PRESETS):
        assert name in str(caught.value)


def test_a_preset_is_a_pair_of_falling_size_and_its_keys_are_the_more_precise() -> None:
    pairs = [[config.cache_type(name).bits for name in pair] for pair in config.PRESETS.values()]
    assert all(k >= v for k, v in pairs)
    assert sorted(pairs, key=sum, reverse=True) == pairs


@pytest.mark.parametrize("spec", [None, 300, (), ("pqo3",), ("pqo3", "pqo3", "pqo3"), ("pqo3", None), {"k": "pqo3"}])
def test_what_is_no_cache_specification(spec: Any) -> None:
    with pytest.raises(ArgumentError):
        config.parse_cache(spec)


@pytest.mark.parametrize("n", [-32, 1, 33])
def test_a_row_holds_whole_blocks(n: int) -> None:
    with pytest.raises(ArgumentError, match=str(n)):
        config.CACHE_TYPES["pqo3"].row_bytes(n)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("bits", 5, "3 or 4"),
        ("bits", 3.0, "integer"),
        ("bits", True, "integer"),
        ("head_dim", 80, "80.*multiple of 32"),
        ("head_dim", 0, "0.*multiple of 32"),
        ("head_dim", -32, "-32"),
        ("head_dim", 2**32, "multiple of 32"),
        ("n_head_kv", 0, "between 1"),
        ("n_head_kv", "8", "integer"),
        ("n_layer", -1, "-1"),
        ("n_layer", 2**31, "between 1 and 2147483647"),
        ("mode", "max", "search, maxnorm, l2norm"),
    ],
)
def test_config_names_what_was_given_and_what_is_allowed(field: str, value: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said) as caught:
        config.CacheConfig(**{field: value})
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, TqggufError)


def test_config_is_frozen_and_counts_bytes() -> None:
    made = config.CacheConfig(bits=4, head_dim=128, n_head_kv=8, n_layer=2)
    assert made.bytes_per_token == 2 * 8 * 72
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.bits = 3  # type: ignore[misc]
