"""Forged sessions: files are changed word by word, under right checksums, and given to `Llama.load_session`.

    python tests/fuzz/restore.py DIRECTORY [N [SEED]]

makes three models (full attention, sliding windows, recurrent layers beside attention), saves a session of each in
DIRECTORY, and loads N forgeries of them, from number SEED on. A forgery is refused with an error of tqgguf, or loads;
then the model must still go on. Anything else ends this process with an error, and the number printed last makes it
come again.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))

from architectures import write_architecture
from models import write_model

import tqgguf
from tqgguf.errors import TqggufError

N_TOKENS = 70
WORDS = (0, 1, 2, 3, 4, 7, 64, 255, 256, 257, 511, 512, 513, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 5)


def load(path: Path) -> tqgguf.Llama:
    return tqgguf.Llama(path, cache="pqo3", n_ctx=256, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False)


def seal(data: bytes, n_header: int, rng: random.Random) -> bytes:
    """A session with right checksums, and now and then with other counts in its header, too."""
    header, body = json.loads(data[48 : 48 + n_header]), data[48 + n_header :]
    header["n_state_bytes"] = len(body) - 4 * header["n_tokens"]
    if rng.random() < 0.2:
        header["n_tokens"] = max(0, header["n_tokens"] + rng.choice((-70, -2, -1, 1, 2)))
        header["n_state_bytes"] = max(0, len(body) - 4 * header["n_tokens"])
    header["sha256"] = hashlib.sha256(body).hexdigest()
    text = json.dumps(header).encode()
    return data[:12] + struct.pack("<I", len(text)) + hashlib.sha256(text).digest() + text + body


def forge(data: bytes, rng: random.Random) -> bytes:
    """One to four changes, most of them where counts, positions, types and sizes are."""
    n_header = struct.unpack_from("<I", data, 12)[0]
    start = 48 + n_header + 4 * N_TOKENS
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        where = rng.random()
        if where < 0.4:  # the beginning: what is what, cells
            at = start + 4 * rng.randrange(0, 8)
        elif where < 0.75:
            at = start + 4 * rng.randrange(0, 4 * N_TOKENS)
        else:
            at = rng.randrange(48 + n_header, len(out) - 4)
        how = rng.random()
        if how < 0.75:
            old = int.from_bytes(out[at : at + 4], "little")
            value = rng.choice((*WORDS, old + 1 & 0xFFFFFFFF, old - 1 & 0xFFFFFFFF, rng.getrandbits(32)))
            out[at : at + 4] = struct.pack("<I", value)
        elif how < 0.85:
            del out[at : at + 4 * rng.randrange(1, 40)]
        elif how < 0.95:
            out[at:at] = rng.randbytes(4 * rng.randrange(1, 40))
        else:
            del out[max(at, 48 + n_header + 4 * N_TOKENS) :]
    return seal(bytes(out), n_header, rng)


def main(folder: Path, n: int = 1000, seed: int = 0) -> None:
    models = []
    for path in (
        write_model(folder / "llama.gguf"),
        write_model(folder / "gemma2.gguf", arch="gemma2"),
        write_architecture(folder / "hybrid.gguf", "falcon-h1"),
    ):
        model = load(path)
        model.eval([3 + i % 200 for i in range(N_TOKENS)])
        file = folder / f"{path.stem}.session"
        model.save_session(file)
        models.append((model, file.read_bytes(), file))
    refused = loaded = 0
    for i in range(seed, seed + n):
        rng = random.Random(i)
        model, data, file = models[i % len(models)]
        file.write_bytes(forge(data, rng))
        print(f"\r{i}", end="", flush=True)
        try:
            model.load_session(file)
        except TqggufError:
            refused += 1
            assert model.n_tokens in (0, N_TOKENS, N_TOKENS + 1), model.n_tokens
        else:
            loaded += 1
        if rng.random() < 0.1:
            model.eval([5])
            model.reset()
    for model, data, file in models:
        file.write_bytes(data)
        assert model.load_session(file).n_tokens == N_TOKENS
        model.eval([5])
    print(f"\n{n} forgeries: {refused} refused, {loaded} loaded")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
