"""Files made to hurt: huge counts, endless headers, impossible shapes, false names. Refused at once, in words."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tqgguf import read_session
from tqgguf.cache.policy import CachePolicy, read_policy
from tqgguf.diagnostics.attention_path import _notes
from tqgguf.diagnostics.fit import _layer_weights
from tqgguf.errors import ModelFileError, PolicyError, SessionError
from tqgguf.gguf.header import LARGEST_HEADER, MOST_ENTRIES, read_header
from tqgguf.gguf.info import read_model_info

REGRESSIONS = Path(__file__).parents[1] / "fuzz" / "regressions"


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    begin = time.process_time()
    yield
    assert time.process_time() - begin < 20.0  # 2 s at most here; who trusts a count of 2^60 is not done in hours


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(path: Path, *, n_tensors: int = 0, n_keys: int = 0, then: bytes = b"", size: int = 0) -> Path:
    """A GGUF with these counts, the bytes after them, and zeros up to a size (a hole, no disk space)."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + then)
    if size:
        with path.open("r+b") as file:
            file.truncate(size)
    return path


@pytest.mark.parametrize(
    "counts", [{"n_tensors": 1 << 60}, {"n_keys": 1 << 60}, {"n_tensors": 1 << 63, "n_keys": 1 << 63}]
)
def test_counts_that_no_file_holds(tmp_path: Path, counts: dict[str, int]) -> None:
    with pytest.raises(ModelFileError, match=r"announces \d+ tensors and \d+ keys, the file has 124 bytes"):
        read_header(gguf(tmp_path / "m.gguf", **counts, then=bytes(100)))


def test_more_entries_than_any_model_has(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="announces"):
        read_header(gguf(tmp_path / "m.gguf", n_keys=MOST_ENTRIES + 1, size=1 << 34))


@pytest.mark.parametrize(
    "then",
    [
        struct.pack("<Q", 1 << 33),  # a key of 8 GiB, all there
        text("a") + struct.pack("<IQ", 8, 1 << 33),  # a text
        text("a") + struct.pack("<IIQ", 9, 8, 1 << 30),  # an array of empty texts
        text("a") + struct.pack("<IIQ", 9, 0, 1 << 33),  # an array of bytes
    ],
)
def test_a_header_without_end(tmp_path: Path, then: bytes) -> None:
    """In a file that is as large as it claims, which costs a forger nothing."""
    with pytest.raises(ModelFileError, match="truncated or damaged"):
        read_header(gguf(tmp_path / "m.gguf", n_keys=1, then=then, size=1 << 34))


def test_keys_up_to_the_largest_header(tmp_path: Path) -> None:
    long = text("a") + struct.pack("<IQ", 8, 1 << 26) + bytes(1 << 26)
    with pytest.raises(ModelFileError, match=f"byte 67108930 of the {LARGEST_HEADER} that a header may take"):
        read_header(gguf(tmp_path / "m.gguf", n_keys=3, then=long + long[:100], size=1 << 34))


def test_a_shape_over_which_llama_cpp_ends_the_process(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"tensor .* has the impossible shape"):
        read_header(REGRESSIONS / "gguf" / "shape-beyond-64-bits")
    shape = struct.pack("<IQQ", 2, 1 << 40, 1 << 40)
    with pytest.raises(ModelFileError, match=r"impossible shape \(1099511627776, 1099511627776\)"):
        read_header(gguf(tmp_path / "m.gguf", n_tensors=1, then=text("t") + shape + struct.pack("<IQ", 999, 0)))


def model(path: Path, arch: str, name: str) -> Path:
    keys = [("general.architecture", arch), ("general.name", name)]
    out = b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in keys)
    counts = {"block_count": 1, "embedding_length": 64, "context_length": 64, "attention.head_count": 1}
    out += b"".join(text(f"{arch}.{key}") + struct.pack("<II", 4, value) for key, value in counts.items())
    return gguf(path, n_keys=len(keys) + len(counts), then=out)


def test_names_that_would_command_a_terminal(tmp_path: Path) -> None:
    info = read_model_info(model(tmp_path / "m.gguf", "llama", "a\x1b[2Jb\r" + "c" * 1000))
    assert info.name == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}" + "c" * 249
    for arch in ("a\x1b[2J", "a" * 65, "a\nb"):
        with pytest.raises(ModelFileError, match=r"general.architecture is '.*', no name") as error:
            read_model_info(model(tmp_path / "m.gguf", arch, "m"))
        assert "\x1b" not in str(error.value)


def test_a_softcap_that_is_no_number_and_a_layer_of_5000_digits_are_ignored(tmp_path: Path) -> None:
    """What `doctor` and `fit --vram` take from a header beside the cache's shape."""
    path = model(tmp_path / "m.gguf", "gemma2", "m")
    key = text("gemma2.attn_logit_softcapping") + struct.pack("<I", 8) + text("much")
    sizes = struct.pack("<IQIQ", 1, 32, 0, 0)
    n_keys, rest = struct.unpack_from("<Q", path.read_bytes(), 16)[0], path.read_bytes()[24:]
    tensor = text(f"blk.{'9' * 5000}.attn_k.weight") + sizes
    info = read_model_info(gguf(path, n_tensors=1, n_keys=n_keys + 1, then=rest + key + tensor, size=8192))
    assert not [note for note in _notes(info, CachePolicy(("pqo3",), ("pqo3",)), 0) if "softcap" in note]
    assert _layer_weights(info, 128) == ([0, 0], 0)


def test_means_are_read_from_where_they_lie(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    means = {i: rng.standard_normal((2, 32 * (1 + i))).astype(np.float32) for i in (0, 3)}
    gains = {i: np.exp(mean) for i, mean in means.items()}
    CachePolicy(("pqo3",) * 4, ("f16",) * 4, means, k_gains=gains).write(tmp_path / "p.gguf")
    found = read_policy(tmp_path / "p.gguf")
    assert found.k_means.keys() == found.k_gains.keys() == means.keys()
    for layer, mean in means.items():
        np.testing.assert_array_equal(found.k_means[layer], mean)
        np.testing.assert_array_equal(found.k_gains[layer], gains[layer])


@pytest.mark.parametrize(
    "name", ["blk.4.k_mean", "blk.99999999999999999999.k_mean", "blk.\u0661.k_mean", "blk.4.k_gain", "x"]
)
def test_means_of_no_layer(tmp_path: Path, name: str) -> None:
    path = tmp_path / "p.gguf"
    CachePolicy(("pqo3",) * 4, ("f16",) * 4, {3: np.ones((1, 32), np.float32)}).write(path)
    data = path.read_bytes()
    head = data[: data.index(text("blk.3.k_mean"))]
    tensor = text(name) + struct.pack("<IQQIQ", 2, 32, 1, 0, 0)
    path.write_bytes(head + tensor + bytes(-len(head + tensor) % 32) + bytes(128))
    with pytest.raises(PolicyError, match="no policy for 4 layers has that"):
        read_policy(path)


def session(path: Path, **changes: Any) -> Path:
    fields: dict[str, Any] = {"model": "m", "model_hash": "00", "types_k": ["pqo3"], "types_v": ["pqo3"]}
    fields |= {
        "type_numbers": {},
        "k_means": "",
        "settings": {},
        "codec": 2,
        "state": 3,
        "n_tokens": 0,
        "n_state_bytes": 0,
    }
    header = json.dumps({**fields, "sha256": "00", "extra": {}, **changes}).encode()
    path.write_bytes(struct.pack("<8sII32s", b"tqgguf\x00S", 1, len(header), hashlib.sha256(header).digest()) + header)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"types_k": [{}]},
        {"types_v": [1]},
        {"types_k": ["pqo3\x1b[2J"]},
        {"model": "\ud800"},
        {"model_hash": "\r" * 64},
        {"settings": {"\x1b": 1}},
        {"n_tokens": 1.0},
    ],
)
def test_sessions_whose_header_holds_something_else(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert read_session(session(tmp_path / "good")).n_tokens == 0
    with pytest.raises(SessionError, match="cannot be read") as error:
        read_session(session(tmp_path / "s", **changes))
    assert str(error.value).isprintable()


def test_a_session_that_is_all_header(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(struct.pack("<8sII32s", b"tqgguf\x00S", 1, 0xFFFFFFFF, bytes(32)))
    with path.open("r+b") as file:
        file.truncate(1 << 33)
    with pytest.raises(SessionError, match="its header has 4,294,967,295 bytes, at most 16,777,216 can be"):
        read_session(path)
