"""Writes the first inputs of the targets in files.py: small whole files that a fuzzer would be long in guessing."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np

from tqgguf.cache.policy import CachePolicy


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def model() -> bytes:
    keys = {"context_length": 512, "embedding_length": 64, "block_count": 2, "attention.head_count": 2}
    keys |= {"attention.head_count_kv": 1, "attention.sliding_window": 48}
    out = text("general.architecture") + struct.pack("<I", 8) + text("gemma2")
    for key, value in keys.items():
        out += text(f"gemma2.{key}") + struct.pack("<II", 4, value)
    out += text("t") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    out += text("s") + struct.pack("<IIQ2f", 9, 6, 2, 0.0, 1.0)
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(keys) + 3) + out + tensor
    return head + bytes(-len(head) % 32) + bytes(32)


def policy(path: Path) -> None:
    means = {1: np.ones((1, 32), np.float32)}
    CachePolicy(("pqo3", "q8_0"), ("pqo4", "f16"), means, "00" * 32, k_gains={0: means[1]}).write(path)


def session() -> bytes:
    fields = {"model": "m", "model_hash": "00", "types_k": ["pqo3"], "types_v": ["pqo3"], "type_numbers": {"pqo3": 300}}
    fields |= {"k_means": "", "settings": {"a": 1.5}, "codec": 2, "state": 3, "n_tokens": 1, "n_state_bytes": 2}
    fields |= {"sha256": "00", "extra": {}, "tail": False}
    header = json.dumps(fields).encode()
    return b"\xff" + struct.pack("<H", len(header)) + header + bytes(6)


def state(magic: bytes, version: int, rows: bytes) -> bytes:
    name = struct.pack("<I", 5) + b"llama" if magic == b"nsgg" else b""
    return b"\x00" + magic + struct.pack("<III", version, 1, 7) + name + rows


def rows() -> bytes:
    cells = b"".join(struct.pack("<iIi", i, 1, 0) for i in range(2))
    kinds = b"".join(struct.pack("<iQ", 300, 14) + bytes(28) for _ in range(4))
    return struct.pack("<II", 1, 2) + cells + struct.pack("<II", 0, 2) + kinds


def main() -> None:
    for name in ("gguf", "policy", "session", "state"):
        Path(sys.argv[1], name).mkdir(parents=True, exist_ok=True)
    folder = Path(sys.argv[1])
    (folder / "gguf" / "model").write_bytes(model())
    policy(folder / "policy" / "policy")
    (folder / "session" / "session").write_bytes(session())
    (folder / "state" / "session").write_bytes(state(b"nsgg", 10, rows()))
    (folder / "state" / "sequence").write_bytes(state(b"qsgg", 3, rows()))


if __name__ == "__main__":
    main()
