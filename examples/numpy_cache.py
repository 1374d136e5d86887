"""A compressed KV cache of NumPy arrays, without llama.cpp: python examples/numpy_cache.py [bits].

One layer with 32 query heads and 8 KV heads of 128 reads a prompt of 1,000 tokens, then 50 tokens one by one. The
script compares the outputs with attention on the uncompressed keys and values.
"""

import sys

import numpy as np
import numpy.typing as npt

from tqgguf import CacheConfig, PqoCache

N_HEAD, N_HEAD_KV, HEAD_DIM, SCALE = 32, 8, 128, 128**-0.5
F32 = npt.NDArray[np.float32]


def exact_attention(q: F32, k: F32, v: F32) -> F32:
    """q (n_head, head_dim), k and v (n_tokens, n_head_kv, head_dim); query head h reads KV head h // 4."""
    grouped = q.reshape(N_HEAD_KV, N_HEAD // N_HEAD_KV, HEAD_DIM)
    scores = np.einsum("hgd,thd->hgt", grouped, k) * SCALE
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out: F32 = np.einsum("hgt,thd->hgd", weights, v).reshape(N_HEAD, HEAD_DIM)
    return out


def main(bits: int = 3) -> None:
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1050, N_HEAD_KV, HEAD_DIM), dtype=np.float32)
    config = CacheConfig(bits=bits, head_dim=HEAD_DIM, n_head_kv=N_HEAD_KV)
    with PqoCache(config) as cache:
        cache.append(0, k[:1000], v[:1000])
        errors = []
        for t in range(1000, 1050):
            # The query resembles an earlier key, as in retrieval heads, so that attention has a clear target.
            q = np.repeat(1.5 * k[t - 700], N_HEAD // N_HEAD_KV, axis=0)
            out = cache.decode(0, k[t], v[t], q, SCALE)  # stores token t and attends to tokens 0 to t
            exact = exact_attention(q, k[: t + 1], v[: t + 1])
            errors.append(float(np.linalg.norm(out - exact) / np.linalg.norm(exact)))
        blocks = config.bytes_per_token * cache.seq_len()
        print(f"{config.type.name}: {blocks:,} bytes of blocks for {cache.seq_len():,} tokens, f16 {4 * k.size:,}")
        print(f"relative error of attention's output: {np.mean(errors):.3f}")

        cache.truncate(0, 1000)  # removes the answer, as before generating it again
        again = cache.decode(0, k[1000], v[1000], np.repeat(1.5 * k[300], 4, axis=0), SCALE)
        print(f"{cache.seq_len():,} tokens after going back; {again.shape} {again.dtype}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
