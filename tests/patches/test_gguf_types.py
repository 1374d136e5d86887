"""GGUF files with tensors of the new types, and of the unused type numbers below and beyond them.

The registered numbers are 300 and 301, upstream's last one is 42: ggml's tables have a gap in between, which must
behave as the types that upstream removed (4, 5, 31, ...) do: an error message, never a crash. Each file is read in a
process of its own, so that a crash is a failed test.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LIB = Path(__file__).parents[2] / "tqgguf" / "lib"
GGML = LIB / ("libggml-base.dylib" if sys.platform == "darwin" else "libggml-base.so")

pytestmark = pytest.mark.skipif(not GGML.exists(), reason="the native libraries are not built")

PROGRAM = """
import ctypes, json, sys

ggml = ctypes.CDLL(sys.argv[1])

class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]

ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
ggml.gguf_init_from_file.restype = ctypes.c_void_p
ggml.gguf_get_tensor_type.argtypes = [ctypes.c_void_p, ctypes.c_int64]
ggml.gguf_get_tensor_size.argtypes = [ctypes.c_void_p, ctypes.c_int64]
ggml.gguf_get_tensor_size.restype = ctypes.c_size_t
ggml.ggml_type_name.restype = ctypes.c_char_p
ggml.ggml_type_size.restype = ctypes.c_size_t
ggml.ggml_blck_size.restype = ctypes.c_int64
ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
ggml.ggml_validate_row_data.restype = ctypes.c_bool
"""


def run(body: str, *arguments: str) -> tuple[Any, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + body, str(GGML), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout), done.stderr


def write_gguf(path: Path, tensor_type: int, n: int, n_bytes: int) -> None:
    name = b"t"
    header = struct.pack("<4sIqq", b"GGUF", 3, 1, 0)
    header += struct.pack("<Q", len(name)) + name + struct.pack("<IqiQ", 1, n, tensor_type, 0)
    header += b"\0" * (-len(header) % 32)
    path.write_bytes(header + b"\0" * (n_bytes + -n_bytes % 32))


def read_gguf(path: Path) -> tuple[Any, str]:
    return run(
        """
file = ggml.gguf_init_from_file(sys.argv[2].encode(), Params(True, None))
print(json.dumps([ggml.gguf_get_tensor_type(file, 0), ggml.gguf_get_tensor_size(file, 0)] if file else None))
""",
        str(path),
    )


@pytest.mark.parametrize("tensor_type", [4, 31, 43, 100, 299])
def test_a_tensor_of_an_unused_type_is_rejected_as_one_of_a_removed_type_is(tmp_path: Path, tensor_type: int) -> None:
    write_gguf(tmp_path / "x.gguf", tensor_type, 64, 64)
    found, message = read_gguf(tmp_path / "x.gguf")
    assert found is None
    assert f"tensor 't' of type {tensor_type} (" in message
    assert "(null)" not in message
    assert "failed to read tensor info" in message


@pytest.mark.parametrize("tensor_type", [306, -1, 2**31 - 1, -(2**31)])
def test_a_type_out_of_range_is_rejected(tmp_path: Path, tensor_type: int) -> None:
    write_gguf(tmp_path / "x.gguf", tensor_type, 64, 64)
    found, message = read_gguf(tmp_path / "x.gguf")
    assert found is None
    assert f"invalid ggml type {tensor_type}. should be in [0, 306)" in message


@pytest.mark.parametrize(
    ("tensor_type", "block_bytes"), [(300, 14), (301, 18), (302, 14), (303, 18), (304, 10), (305, 22)]
)
def test_a_tensor_of_ours_is_read_with_its_size(tmp_path: Path, tensor_type: int, block_bytes: int) -> None:
    write_gguf(tmp_path / "x.gguf", tensor_type, 96, 3 * block_bytes)
    found, _ = read_gguf(tmp_path / "x.gguf")
    assert found == [tensor_type, 3 * block_bytes]


@pytest.mark.parametrize(("tensor_type", "name"), [*enumerate(("pqo3", "pqo4", "pqt3", "pqt4", "pqt2", "pqt5"), 300)])
def test_a_tensor_of_ours_of_a_part_of_a_block_is_rejected(tmp_path: Path, tensor_type: int, name: str) -> None:
    write_gguf(tmp_path / "x.gguf", tensor_type, 48, 64)
    found, message = read_gguf(tmp_path / "x.gguf")
    assert found is None
    assert f"of type {tensor_type} ({name}) has 48 elements per row, not a multiple of block size (32)" in message


def test_every_type_number_has_a_name_and_only_real_ones_a_size() -> None:
    rows, _ = run(
        """
row = lambda i: [ggml.ggml_type_name(i).decode(), ggml.ggml_blck_size(i), ggml.ggml_type_size(i)]
print(json.dumps([row(i) for i in range(306)]))
"""
    )
    assert rows[43:300] == [["UNUSED", 0, 0]] * 257
    assert rows[300:] == [
        ["pqo3", 32, 14],
        ["pqo4", 32, 18],
        ["pqt3", 32, 14],
        ["pqt4", 32, 18],
        ["pqt2", 32, 10],
        ["pqt5", 32, 22],
    ]
    assert rows[42] == ["q2_0", 64, 18]


def test_row_validation_survives_unused_types_and_knows_bad_scales() -> None:
    verdicts, message = run(
        """
inf = b"\\x00\\x7c" + bytes(12)
print(json.dumps([ggml.ggml_validate_row_data(*a) for a in (
    (43, bytes(64), 64), (299, bytes(64), 64), (306, bytes(64), 64), (-1, bytes(64), 64), (4, bytes(64), 64),
    (300, bytes(28), 28), (301, bytes(36), 36), (302, bytes(28), 28),
    (300, bytes(14) + inf, 28), (303, inf + bytes(4), 18), (300, bytes(15), 15),
    (304, bytes(20), 20), (305, bytes(44), 44), (304, inf[:10], 10), (305, bytes(22) + inf + bytes(8), 44))]))
"""
    )
    assert verdicts == [False] * 5 + [True, True, True, False, False, False, True, True, False, False]
    assert "NaN or infinite in block 1 of type pqo3" in message
