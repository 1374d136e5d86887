"""Sessions that were forged under right checksums: positions that no token has, and changes at random."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tqgguf
from tqgguf import SessionError

pytestmark = pytest.mark.model

SCRIPT = Path(__file__).parent / "restore.py"
N = 40


def sealed(data: bytes, at: int, value: int) -> bytes:
    """A session with one word changed, and right checksums."""
    n = struct.unpack_from("<I", data, 12)[0]
    body = bytearray(data[48 + n :])
    struct.pack_into("<i", body, at, value)
    header = json.dumps({**json.loads(data[48 : 48 + n]), "sha256": hashlib.sha256(body).hexdigest()}).encode()
    return data[:12] + struct.pack("<I", len(header)) + hashlib.sha256(header).digest() + header + body


@pytest.mark.parametrize("kind", ["llama", "gemma2", "falcon-h1"])
@pytest.mark.parametrize("position", [-1, -7, N, 2**31 - 1])
def test_a_cell_of_no_token(
    kind: str,
    position: int,
    tmp_path: Path,
    random_model: Callable[..., Path],
    architecture: Callable[[str], Path],
) -> None:
    """Of full attention's cache: llama.cpp looks at that of windows or recurrent layers alone, where there is one."""
    path = architecture(kind) if kind == "falcon-h1" else random_model(arch=kind)
    model = tqgguf.Llama(path, cache="pqo3", n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    model.eval(list(range(3, 3 + N)))
    file = tmp_path / "s"
    model.save_session(file)
    first = 4 * N + 16  # tokens; marks, streams, cells
    good = file.read_bytes()
    start = 48 + struct.unpack_from("<I", good, 12)[0]
    assert struct.unpack_from("<ii", good, start + first) == (0, 1)  # the first cell: of token 0, of one sequence
    file.write_bytes(sealed(good, first, position))
    with pytest.raises(SessionError, match=f"a cell of token {position}, and {N} tokens"):
        model.load_session(file)
    assert model.n_tokens == N  # refused before anything was changed
    file.write_bytes(sealed(good, first, 0))
    model.load_session(file)
    model.close()


def test_what_is_forged_is_refused_or_harmless(python: Callable[..., Any], tmp_path: Path) -> None:
    done = python(str(SCRIPT), str(tmp_path), "300", "0")
    assert done.returncode == 0, done.stdout[-100:] + done.stderr[-2000:]
    n_refused, n_loaded = (int(done.stdout.split()[i]) for i in (-4, -2))
    assert n_refused + n_loaded == 300 and min(n_refused, n_loaded) > 50
