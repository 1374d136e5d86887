"""What `tqgguf tune` predicts for K and V of layers, beside what they cost when each is measured alone.

    python benchmarks/quality/sensitivities.py                 # SmolLM2, saves results/sensitivities.json
    python benchmarks/quality/sensitivities.py --model demo --layers 1 --output -

`tune` runs on prose of benchmarks/common/real_sources.py without a tail. Then K and V of every few layers are stored in
the smallest type, with f16 everywhere else, and read the same chunk. So "distortion" and "predicted" are compared with
what they predict. The policy of `tune` is compared, on chunks behind those that were tuned on, with the policy that the
same budget gives where the measured figures are shared out instead, and with any policy files that are named.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
import numpy as np
import real_sources

import tqgguf
from tqgguf import CachePolicy, Tuning
from tqgguf.cache.policy import resolve
from tqgguf.config import cache_type
from tqgguf.demo import model as demo
from tqgguf.diagnostics.allocation import Option, allocate
from tqgguf.diagnostics.compare import NamedCache, Reader, further_context, load, read_chunks
from tqgguf.diagnostics.texts import own_text, text_chunks
from tqgguf.model.calibrate import chosen_calibration

RESULTS: Final = Path(__file__).parents[1] / "results" / "sensitivities.json"
AT_ONCE: Final = 6

Parts = dict[tuple[str, tuple[int, ...]], float]
"""By side and layers."""


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of figures without ties."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def measured(path: Path, text: str, tuning: Tuning, n_layers: int, n_threads: int | None, special: bool) -> Parts:
    """The mean divergence of K or V of every n_layers layers in the smallest type, calibrated, on the first chunk."""
    info = tqgguf.read_model_info(path)
    calibration = chosen_calibration(info, None)
    layers = [layer.index for layer in info.layers]
    parts = [(side, tuple(layers[i : i + n_layers])) for side in "KV" for i in range(0, len(layers), n_layers)]
    caches = []
    for side, group in parts:
        one = tuple(tuning.types[0] if i in group else "f16" for i in range(info.n_layer))
        rest = ("f16",) * info.n_layer
        policy = CachePolicy(*((one, rest) if side == "K" else (rest, one)))
        caches.append(NamedCache("part", calibration.applied(policy, info) if calibration else policy, 0))
    f16, found = NamedCache("f16", resolve("f16", info.n_layer)), {}
    with contextlib.closing(load(path, f16, tuning.n_ctx, n_threads, n_batch=512, swa_full=False)) as model:
        chunk = text_chunks(model, text, tuning.n_ctx, 1, special)
        for first in range(0, len(parts), AT_ONCE):
            with contextlib.ExitStack() as stack:
                group = caches[first : first + AT_ONCE]
                readers = [Reader(cache, stack.enter_context(further_context(model, cache))) for cache in group]
                read_chunks(model, [Reader(f16, model.ctx), *readers], chunk, None)
            for part, reader in zip(parts[first:], readers, strict=False):
                found[part] = float(np.concatenate(reader.kld).mean())
                print(*part, found[part], file=sys.stderr, flush=True)
    return found


def rows(tuning: Tuning, found: Parts) -> list[dict[str, Any]]:
    """A row for each part that was measured, with the floor taken away."""
    of_part = {(s.side, s.layer): s for s in tuning.sensitivities if s.type == tuning.types[0]}
    return [
        {
            "side": side,
            "layers": layers,
            "distortion": sum(of_part[side, layer].distortion for layer in layers),
            "predicted": sum(of_part[side, layer].kld for layer in layers),
            "measured": kld - tuning.floor,
        }
        for (side, layers), kld in found.items()
    ]


def from_measured(path: Path, tuning: Tuning, found: Parts) -> CachePolicy:
    """The policy within the budget if the measured divergences are shared out among a part's layers and types."""
    info = tqgguf.read_model_info(path)
    smallest = {(s.side, s.layer): s.distortion for s in tuning.sensitivities if s.type == tuning.types[0]}
    cost = {}
    for (side, layers), kld in found.items():
        each = max(kld - tuning.floor, 1e-5) / sum(smallest[side, layer] for layer in layers)
        cost |= {(side, layer): each for layer in layers}
    parts = [(side, layer) for layer in info.layers for side in "KV"]
    options = [
        [
            Option(
                s.type,
                cache_type(s.type).row_bytes(layer.n_head_kv * (layer.head_dim_k if side == "K" else layer.head_dim_v)),
                cost[side, layer.index] * s.distortion,
            )
            for s in tuning.sensitivities
            if (s.side, s.layer) == (side, layer.index)
        ]
        for side, layer in parts
    ]
    assert tuning.budget is not None
    chosen = allocate(options, int(tuning.budget * info.values_per_token / 8 + 1e-6))
    types = {(side, layer.index): option.type for (side, layer), option in zip(parts, chosen, strict=True)}
    k, v = (tuple(types.get((side, i), tuning.types[0]) for i in range(info.n_layer)) for side in "KV")
    calibration = chosen_calibration(info, None)
    policy = CachePolicy(k, v)
    return calibration.applied(policy, info) if calibration else policy


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| part | distortion | predicted KLD | measured KLD |", "|---|---|---|---|"]
    for row in found:
        first, last = row["layers"][0], row["layers"][-1]
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        lines.append(
            f"| {row['side']} of {layers} | {row['distortion']:#.2g} | {row['predicted']:.5f} | {row['measured']:.5f} |"
        )
    return "\n".join(lines)


def correlations(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Rank correlation of distortion and of prediction with what was measured: of K, of V and of all parts."""
    result = {}
    for name in ("distortion", "predicted"):
        for sides in ("K", "V", "KV"):
            some = [row for row in found if row["side"] in sides]
            result[f"{name} {sides}"] = rank_correlation([x[name] for x in some], [x["measured"] for x in some])
    return result


def judged(path: Path, text: str, caches: Sequence[Any], tuning: Tuning, args: argparse.Namespace) -> list[Any]:
    """Figures of policies on chunks behind those of the tuning part."""
    size = {"n_ctx": tuning.n_ctx, "n_chunks": args.judge_chunks, "n_threads": args.threads}
    found = tqgguf.compare(path, ["f16", *caches], text, tails=(0,), calibration="off", **size)
    return [asdict(row) for row in found.rows[1:]]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["demo", *real_sources.MODELS], default="smollm2")
    parser.add_argument("--budget", type=float, default=4.0, help="bits (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="layers measured together (default: %(default)s)")
    parser.add_argument("--ctx", type=int, default=2048, help="tokens in a chunk (default: %(default)s)")
    parser.add_argument("--judge-chunks", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--policies", type=Path, nargs="*", default=[], help="policy files to judge as well")
    parser.add_argument("--threads", type=int, help="threads (default: all processors)")
    parser.add_argument("--output", default=str(RESULTS), help="file, - for none (default: %(default)s)")
    args = parser.parse_args()
    own = args.model == "demo"
    path = demo.MODEL_PATH if own else real_sources.model_path(args.model)
    text = own_text(tqgguf.read_model_info(path), args.ctx, 8) if own else real_sources.text("prose")
    start = time.monotonic()
    tuning = tqgguf.tune(
        path, None if own else text, budget=args.budget, tail=0, n_ctx=args.ctx, n_chunks=2, n_threads=args.threads
    )
    seconds = time.monotonic() - start
    found = measured(path, text, tuning, args.layers, args.threads, own)
    by_part = rows(tuning, found)
    caches = [tuning.policy, from_measured(path, tuning, found), *args.policies]
    result = {
        "machine": machine.facts(),
        "model": path.name,
        "budget": args.budget,
        "n_ctx": args.ctx,
        "floor": tuning.floor,
        "bands": [asdict(band) for band in tuning.bands],
        "seconds": seconds,
        "correlations": correlations(by_part),
        "rows": by_part,
        "policies": judged(path, text[len(text) // 2 :], caches, tuning, args),
        "types": [[policy.types_k, policy.types_v] for policy in caches[:2]],
    }
    print(table(by_part))
    print(result["correlations"], *((row["type"], row["bits"], row["kld"]) for row in result["policies"]), sep="\n")
    if args.output != "-":
        machine.save(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
