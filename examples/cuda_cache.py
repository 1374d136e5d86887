"""Attention over a compressed cache in GPU memory, with PyTorch: python examples/cuda_cache.py [device]."""

import sys

import torch

from tqgguf import CacheConfig, PqoCache


def main(device: str = "cuda") -> None:
    config = CacheConfig(bits=3, head_dim=128, n_head_kv=8)
    k, v = torch.randn(2, 1000, 8, 128, dtype=torch.float16, device=device)
    q = torch.randn(32, 128, dtype=torch.float16, device=device)  # 4 query heads for each KV head
    with PqoCache(config, device="cuda") as cache:
        cache.append(0, k[:-1], v[:-1])
        out = torch.from_dlpack(cache.decode(0, k[-1], v[-1], q, 128**-0.5))
        print(f"{cache.memory_usage():,} bytes for {cache.seq_len(0):,} tokens; f16 takes {2 * k.nbytes:,}")

    scores = torch.einsum("hgd,thd->hgt", q.float().view(8, 4, 128), k.float()) * 128**-0.5
    exact = torch.einsum("hgt,thd->hgd", scores.softmax(-1), v.float()).reshape(32, 128)
    print(f"relative error against f16 keys and values: {(out.float() - exact).norm() / exact.norm():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
