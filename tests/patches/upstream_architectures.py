"""Every architecture of upstream's test-llama-archs with compressed caches, and the table of docs/architectures.md.

    upstream_architectures.py PROGRAM [--only REGEX] [--write]    compares the table with docs, or writes it
    upstream_architectures.py --model FILE                        what one model does, as JSON

test-llama-archs saves its models, tiny and random, to files; `tqgguf.Llama` loads each with f16 and with compressed
caches, in a process of its own, and 136 tokens are read: 128 in batches of 64, then one by one. Models that llama.cpp
cannot save run inside test-llama-archs, with cache_types_preload.c.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import tqgguf
from tqgguf._native import import_llama_cpp, library_path
from tqgguf.cache.tail import READ_IN_PART
from tqgguf.gguf.info import read_model_info

api: Any = import_llama_cpp()

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architectures.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

RUNS: dict[str, tuple[Any, int]] = {
    "pqo4": ("pqo4", 0),
    "pqo4, pqo3": (("pqo4", "pqo3"), 0),
    "pqo3": ("pqo3", 0),
    "tail": ("pqo3", 256),
}
"""Caches, and how many tokens are kept in f16 as well: none, or all there are."""

UNSAVED = ("apertus", "bitnet", "gemma3n", "step35", "t5")
"""Run by test-llama-archs, but not saved (llama_model_saver_supports_arch)."""

_N_PROMPT, _N = 128, 136
_BIDIRECTIONAL = {"dream", "llada", "llada-moe", "rnd1"}  # llama.cpp reads what they see at once

Row = dict[str, Any]


# ---- One model ----


def logits(path: Path, architecture: str, cache: Any, tail: int) -> Any:
    """(136, n_vocab) float32."""
    n_ubatch = 256 if architecture in _BIDIRECTIONAL else 64
    options = {"n_ctx": 256, "n_batch": 256, "n_ubatch": n_ubatch, "n_threads": 1, "n_threads_batch": 1}
    model = tqgguf.Llama(path, cache=cache, tail=tail, flash_attn=True, verbose=False, **options)
    tokens = np.random.default_rng(0).integers(0, 128, _N).tolist()
    rows = []
    for start, end in [(0, _N_PROMPT), *((i, i + 1) for i in range(_N_PROMPT, _N))]:
        batch = api.llama_batch_init(end - start, 0, 1)
        batch.n_tokens = end - start
        for i in range(end - start):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = tokens[start + i], start + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        status = api.llama_decode(model.ctx, batch)
        api.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        for i in range(end - start):
            rows.append(np.array(np.ctypeslib.as_array(api.llama_get_logits_ith(model.ctx, i), (model.n_vocab(),))))
    model.close()
    return np.array(rows)


def error(a: Any, b: Any) -> float:
    """Distance of logits, relative to how much b varies over the vocabulary."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b - b.mean(1, keepdims=True)))


def reason(failure: Exception) -> str:
    """Why a cache was refused, without the model's and the cache's name."""
    text = str(failure)
    if isinstance(failure, tqgguf.CacheTypeError):
        return re.sub(r"^\S+ cannot have a .*? KV cache: ", "", text)
    return re.sub(r"^llama.cpp could not load \S+: (\w+: )?", "", text)


def measure(path: Path) -> Row:
    """Shape of a model's cache, and by name of the run the error of its logits, or why it was refused."""
    info = read_model_info(path)
    row: Row = {"architecture": info.architecture, "shape": shape(info), "compressed": compressed(info)}
    exact = logits(path, info.architecture, "f16", 0)
    for name, (cache, tail) in RUNS.items():
        try:
            row[name] = error(logits(path, info.architecture, cache, tail), exact)
        except tqgguf.TqggufError as failure:
            row[name] = reason(failure)
    return row


def shape(info: Any) -> str:
    sizes = sorted({(layer.n_head_kv, layer.head_dim_k, layer.head_dim_v) for layer in info.layers})
    return ", ".join(f"{n} x {k}" if v in (0, k) else f"{n} x {k} / {v}" for n, k, v in sizes)


def compressed(info: Any) -> str:
    if not info.layers:
        return ""
    n = len(info.layers)
    what = ("all layers" if n == info.n_layer else f"{n} of {info.n_layer} layers") + (
        ", one latent" if info.mla else ""
    )
    beside = [note.split(": ", 1)[1].split(";")[0] for note in info.notes if note.startswith("not modelled")]
    return what + "".join(f" ({note})" for note in beside)


# ---- All of them ----


def measure_apart(path: Path) -> Row:
    command = [sys.executable, "-W", "ignore", str(Path(__file__)), "--model", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{path.name}: exit status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def measure_inside(program: Path, architecture: str, directory: Path) -> Row:
    """The same for a model that exists inside test-llama-archs only."""
    preload = directory / "cache_types_preload.so"
    upstream = ROOT / "build/upstream/llama.cpp"
    folders = [upstream / "include", upstream / "ggml/include", ROOT / "native/ggml", ROOT / "native/include"]
    source = Path(__file__).with_name("cache_types_preload.c")
    includes = [f"-I{folder}" for folder in folders]
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", *includes, source, "-o", preload, "-ldl"], check=True)
    row: Row = {"architecture": architecture, "shape": "", "compressed": "not known"}
    exact = None
    for name, (cache, tail) in {"f16": ("f16", 0), **RUNS}.items():
        k, v = (kind.number for kind in tqgguf.config.parse_cache(cache))
        file = directory / f"{architecture}-{name}.logits"
        values = {"TQGGUF_TEST_K": k, "TQGGUF_TEST_V": v, "TQGGUF_TEST_TAIL": tail, "TQGGUF_TEST_LOGITS": file}
        environment = {key: str(value) for key, value in {**values, "LD_PRELOAD": preload}.items()}
        for _ in range(5):  # its log is written by a thread that the end of the process may overtake
            done = subprocess.run(
                [program, "-s", "1", "-a", f"^{architecture}$"],
                env=os.environ | environment,
                capture_output=True,
                text=True,
                errors="replace",
            )
            said = re.findall(r"llama_init_from_model: (.*)", done.stdout + done.stderr)
            if said or not done.returncode:
                break
        if done.returncode:
            if not said:
                raise SystemExit(f"{architecture} with {name}: exit status {done.returncode}\n{done.stderr[-3000:]}")
            row[name] = said[-1].strip()
            continue
        found = np.fromfile(file, np.float32)[: 128 * 128].reshape(128, 128)
        exact = found if exact is None else exact
        row[name] = error(found, exact)
    return row


def rows_of(program: Path, only: str) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        command = [program, "-s", "1", "-o", directory, *(["-a", only] if only else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        paths = sorted(directory.glob("*.gguf"))
        stems = [path.stem.rsplit("-", 1)[0] for path in paths]
        for path, stem in zip(paths, stems, strict=True):
            row = measure_apart(path)
            if stems.count(stem) > 1 and path.stem.endswith("-moe"):
                row["architecture"] += " (experts)"
            rows.append(row)
            path.unlink()
            print(" | ".join(cells(row)), flush=True)
        for architecture in UNSAVED:
            if re.search(only, architecture):
                rows.append(measure_inside(program, architecture, directory))
                print(" | ".join(cells(rows[-1])), flush=True)
    return sorted(rows, key=lambda row: row["architecture"])


def cells(row: Row) -> list[str]:
    results = [row[name] for name in RUNS]
    if all(isinstance(result, str) for result in results):
        return [row["architecture"], row["shape"], f"refused: {results[0]}", "", "", "", "", ""]
    figures = [f"{100 * result:.2g} %" if isinstance(result, float) else f"refused: {result}" for result in results]
    read = ""
    if isinstance(row["pqo3"], float) and isinstance(row["tail"], float):
        read = "yes" if row["tail"] < 0.15 * row["pqo3"] else "in part" if row["tail"] < 0.7 * row["pqo3"] else "no"
    return [row["architecture"], row["shape"], row["compressed"], *figures, read]


def table(rows: list[Row]) -> str:
    head = ["architecture", "KV heads x size", "compressed", "pqo4", "K pqo4, V pqo3", "pqo3", "pqo3, all in the tail"]
    lines = ["| " + " | ".join([*head, "tail read"]) + " |", "|---" * 8 + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def differences(now: str, then: str) -> list[str]:
    """Rows of two tables that differ in more than the rounding of their figures."""

    def parsed(text: str) -> dict[str, list[str]]:
        return {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in text.splitlines()[2:]}

    def same(a: str, b: str) -> bool:
        if not (a.endswith(" %") and b.endswith(" %")):
            return a == b
        x, y = float(a[:-2]), float(b[:-2])
        return abs(x - y) <= 0.3 * max(x, y) + 0.1

    new, old = parsed(now), parsed(then)
    return [
        f"{name}: {' | '.join(new.get(name, ['nothing']))}\n   docs: {' | '.join(old.get(name, ['nothing']))}"
        for name in sorted(new.keys() | old.keys())
        if len(new.get(name, [])) != len(old.get(name, [])) or not all(map(same, new[name], old[name]))
    ]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("program", type=Path, nargs="?")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.model:
        print(json.dumps(measure(options.model)))
        return 0
    assert library_path("llama").exists()
    rows = rows_of(options.program.resolve(), options.only)
    in_part = {row["architecture"] for row in rows if cells(row)[-1] in ("in part", "no")}
    if not options.only and in_part != READ_IN_PART:
        print(f"the tail is read in part by {sorted(in_part)}, tqgguf/cache/tail.py says {sorted(READ_IN_PART)}")
        return 1
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    then, after = rest.split(END)
    now = table(rows)
    if options.write:
        PAGE.write_text(before + BEGIN + now + END + after)
        return 0
    if options.only:
        return 0
    differ = differences(now, then)
    print("\n".join(differ) or f"{len(rows)} models do as docs/architectures.md says")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
