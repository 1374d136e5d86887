"""The figures of two real language models that README and docs quote: measured, saved, and written into the pages.

    make real                                          # all parts of EVIDENCE, on two quiet cores: under 90 minutes
    python benchmarks/real_models.py quality speed     # these parts, then the tables anew
    python benchmarks/real_models.py tables            # only the tables, from benchmarks/results/real_*.json
    python benchmarks/real_models.py --short           # one chunk of text on one model, saved nowhere
    python benchmarks/real_models.py --peer PATH/TO/llama-perplexity --types turbo3,turbo4

Parts are programs of their own, with options of their own:
    quality       benchmarks/quality/real_quality.py  divergence from f16, by model, text, context and cache
    answers       benchmarks/quality/real_answers.py  answers token by token; look-ups, sums, copies
    speed         benchmarks/speed/real_speed.py      tokens per second against the better f16
    calibration   benchmarks/quality/calibration.py   what decides how good a calibration of keys is: only by name

Parts that time nothing (quality, answers, calibration) run as several processes side by side, with one thread each.
A table of a page stands between `<!-- table NAME -->` and `<!-- end -->`; tests/docs checks that it is what the saved
figures give.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).parent / "common"))
sys.path.append(str(Path(__file__).parent / "quality"))

import machine
import peer
import real_sources

import tqgguf
from tqgguf._util import write_whole
from tqgguf.cache.policy import resolve
from tqgguf.config import parse_cache

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parent

PARTS: Final = {
    "quality": "quality/real_quality.py",
    "answers": "quality/real_answers.py",
    "speed": "speed/real_speed.py",
    "calibration": "quality/calibration.py",
}
EVIDENCE: Final = ("quality", "answers", "speed")
"""What is measured without naming a part."""

BY_MODEL: Final = (("--models", "smollm2"), ("--models", "gemma3"))
SIDE_BY_SIDE: Final = {
    "quality": (
        ("--models", "smollm2", "--no-long"),
        ("--models", "smollm2", "--no-hot", "--texts"),
        ("--models", "gemma3", "--no-hot"),
    ),
    "answers": BY_MODEL,
    "calibration": BY_MODEL,
}
"""Parts that time nothing: options of processes that run side by side, as equal in length as can be. With one thread
each, none waits for another."""

PAGES: Final = ("README.md", "docs/real-models.md", "docs/quality.md", "docs/faq.md")

LEADING: Final = (
    *("q8_0", "q5_0", "q4_0", "q4_0+128"),
    *("pqt5+128 calibrated", "pqt5/pqt4+128 calibrated"),
    *("pqt4", "pqt4+128", "pqt4+128 calibrated", "pqo4+128 calibrated", "pqt4/pqt3+128 calibrated"),
    *("pqt3", "pqt3+128", "pqt3+128 calibrated", "pqo3+128 calibrated"),
    *("pqt3/pqt2+128 calibrated", "pqt2+128 calibrated"),
)
MEASURED: Final = ROOT / "tqgguf" / "diagnostics" / "measured.json"
LENGTHS: Final = (2048, 8192, 32768)


def saved_at(part: str) -> Path:
    """The file of a part's figures."""
    return HERE / "results" / (f"{part}.json" if part == "calibration" else f"real_{part}.json")


def results(part: str) -> Any:
    """What a part saved."""
    return json.loads(saved_at(part).read_text(encoding="utf-8"))


# ---- Tables ----


def figure(value: float) -> str:
    """Three digits that count, without the zero before the point: .0517, 1.24, 14.5."""
    text = f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 1 else f"{value:.3g}"
    return text.removeprefix("0") if value < 1 else text


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)).replace("| --- ", "|---")


def facts(part: str) -> str:
    """The machine and the command of a part."""
    saved = results(part)
    machine = saved["machine"]
    return f"{machine['cores']} cores of an {machine['cpu']}, commit {machine['commit']}, {machine['date']}"


def _runs(model: str, text: str | None = None, n_ctx: int | None = None) -> list[dict[str, Any]]:
    """Runs of the quality part, those asked for."""
    return [
        run
        for run in results("quality")["runs"]
        if run["model"] == model and text in (None, run["text"]) and n_ctx in (None, run["n_ctx"])
    ]


def _row(rows: list[dict[str, Any]], key: str, name: str) -> dict[str, Any] | None:
    return next((row for row in rows if row[key] == name), None)


def leading_table() -> str:
    """Bits with the tail by context, divergence on prose and decode speed, of both models: what README leads with."""
    names = [model.name for model in real_sources.MODELS.values()]
    short = [name.partition("-")[0] if "-" in name else " ".join(name.split()[:2]) for name in names]
    shape = tqgguf.read_model_info(ROOT / "tqgguf/demo/demo.gguf")  # of 128 values a row, as most models' heads
    speeds = {model["model"]: model["rows"] for model in results("speed")["models"]}
    head = ["cache", *(f"bits at {n:,}" for n in LENGTHS)]
    for name in short:
        head += [f"{name}: median KLD", "99.9 %", "decode"]
    lines = []
    for label in LEADING:
        cache = label.partition(" ")[0]
        kind, _, tail = cache.partition("+")
        cells = [f"**{label}**" if kind.startswith("pq") else label]
        cells += [f"{bits(kind, int(tail or 0), n, shape):.2f}" for n in LENGTHS]
        for name in names:
            found = _row(_runs(name, "prose", 2048)[0]["rows"], "type", label)
            cells += [figure(found["kld"]["median"]), figure(found["kld"]["p999"])] if found else ["", ""]
            decode = ("answer", 4096, 1, label)
            rows = (row for row in speeds[name] if (row["test"], row["depth"], row["threads"], row["cache"]) == decode)
            cells.append(next((f"{row['ratio']:.2f}" for row in rows), ""))
        lines.append(cells)
    return markdown(head, lines)


ADVICE: Final = {
    "q8_0": "memory for it",
    "best": "room for 5 bits per value",
    "pqt4": "room for 4.5 bits",
    "pqo4": "the same, and long prompts on few cores: it encodes four to five times as fast as `pqt4`",
    "balanced": "room for 4 bits",
    "pqt3": "room for 3.5 bits",
    "pqo3": "the same, and long prompts on few cores",
    "tiny": "less than that",
}
"""What speaks for a type, in the FAQ."""


def ladder_table() -> str:
    """What each step down costs, for the FAQ: types as `Llama` has them, and q4_0, which is none of the steps."""
    measured = measured_quality()
    lines = []
    for kind in (*ADVICE, "q4_0"):
        k, v = parse_cache(kind)
        words = resolve(kind, 1).words
        medians = measured["median_kld"][f"{words}+128 calibrated" if k.ours else words]
        advice = ADVICE.get(kind, "no reason to: it takes more than `tiny` and is less precise")
        named = f"`{kind}`" if words == kind else f"`{kind}` (K {k.name}, V {v.name})"
        lines.append([advice, named, f"{(k.bits + v.bits) / 2:g}", *map(figure, medians)])
    return markdown(["you have", "take", "bits", *(f"median KLD, {name}" for name in measured["models"])], lines)


def bits(kind: str, tail: int, n_ctx: int, info: tqgguf.ModelInfo) -> float:
    """Bits per cached value of a context, the tail included."""
    policy = resolve(kind.split("/") if "/" in kind else kind, info.n_layer)
    f16 = resolve("f16", info.n_layer)
    return 16 * policy.bytes(info, n_ctx, tail, 1) / f16.bytes(info, n_ctx, 0, 1)


def quality_tables() -> str:
    """A table for each model, text and context."""
    return "\n\n".join(quality_table(run) for run in results("quality")["runs"])


def quality_table(run: dict[str, Any]) -> str:
    """One run of the quality part."""
    f16 = _row(run["rows"], "type", "f16")
    assert f16
    title = (
        f"**{run['model']}, {run['text']}, {run['n_ctx']:,} tokens**, {run['n_scored']:,} predictions; "
        f"perplexity of f16 {f16['perplexity']:.2f}:"
    )
    head = ["cache", "bits", "mean KLD", "median", "99 %", "99.9 %", "same top", "perplexity"]
    lines = []
    for row in sorted(run["rows"], key=lambda row: -row["bits"]):
        if row is not f16:
            kld = [figure(row["kld"][key]) for key in ("mean", "median", "p99", "p999")]
            cells = [row["type"], f"{row['bits']:.2f}", *kld, percent(row["same_top"]), f"{row['perplexity']:.2f}"]
            lines.append(cells)
    return f"{title}\n\n{markdown(head, lines)}"


def continuation_tables() -> str:
    """What happens to an answer: one table for each model and kind of answer."""
    parts = []
    for model in results("answers")["models"]:
        for name, found in model["continuations"].items():
            n, n_spans = found["n_generate"], len(found["rows"][0]["by_position"])
            edges = [n * i // n_spans for i in range(n_spans + 1)]
            spans = [f"{a + 1}-{b}" for a, b in itertools.pairwise(edges)]
            head = ["cache", "mean KLD", *spans, "same top", "agrees for (median)", "same answers"]
            lines = []
            for row in found["rows"][1:]:
                agreed = sorted(row["agreed"])
                same = sum(value == n for value in agreed)
                cells = [row["type"], figure(row["kld"]["mean"]), *map(figure, row["by_position"])]
                cells += [percent(row["same_top"]), f"{agreed[len(agreed) // 2]}", f"{same} of {len(agreed)}"]
                lines.append(cells)
            title = f"**{model['model']}, {name}** ({n:,} tokens after {found['n_prompt']:,} of {found['text']}):"
            parts.append(f"{title}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def task_tables() -> str:
    """Right answers of each model: log-probability, and how many are the likeliest."""
    parts = []
    for model in results("answers")["models"]:
        tasks = model["tasks"]
        first = next(iter(tasks.values()))["rows"]
        lines = []
        for i, row in enumerate(first):
            cells = [row["type"]]
            for found in tasks.values():
                mine = found["rows"][i]
                cells += [f"{mine['log_probability']:.2f}", f"{mine['right']} of {mine['n']}"]
            counts = [found["rows"][i] for found in tasks.values()]
            lines.append([*cells, f"{sum(row['right'] for row in counts)} of {sum(row['n'] for row in counts)}"])
        head = ["cache", *(cell for name in tasks for cell in (f"{name}: log p", "right")), "all: right"]
        parts.append(f"**{model['model']}**:\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def speed_tables() -> str:
    """Tokens per second of each model."""
    parts = []
    for model in results("speed")["models"]:
        tests = list(dict.fromkeys((row["test"], row["depth"], row["threads"]) for row in model["rows"]))
        for kind, said in (("answer", "decode"), ("read", "prefill")):
            mine = [test for test in tests if test[0] == kind]
            head = ["cache", *(f"after {depth:,}, {n} thread{'s'[: n > 1]}" for _, depth, n in mine)]
            lines = []
            for cache in dict.fromkeys(row["cache"] for row in model["rows"]):
                found = {(r["test"], r["depth"], r["threads"]): r for r in model["rows"] if r["cache"] == cache}
                shown = [f"{found[t]['tokens_per_s']:.0f} ({found[t]['ratio']:.2f})" for t in mine]
                lines.append([cache, *shown])
            parts.append(f"**{model['model']}, {said}**:\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def calibration_tables() -> str:
    """What decides how good a calibration is."""
    parts = []
    for run in results("calibration")["runs"]:
        plain = run["rows"][0]["kld"]["mean"]
        head = [f"{run['model']}, {run['cache']}, {run['n_ctx']:,} tokens", "mean KLD", "of plain", "median", "99.9 %"]
        lines = [
            [
                row["variant"],
                figure(row["kld"]["mean"]),
                f"{row['kld']['mean'] / plain:.2f}",
                figure(row["kld"]["median"]),
                figure(row["kld"]["p999"]),
            ]
            for row in run["rows"]
        ]
        parts.append(markdown(head, lines))
    return "\n\n".join(parts)


TABLES: Final[dict[str, Callable[[], str]]] = {
    "leading": leading_table,
    "ladder": ladder_table,
    "quality": quality_tables,
    "continuations": continuation_tables,
    "tasks": task_tables,
    "speed": speed_tables,
    "calibration": calibration_tables,
    **{f"machine of {part}": lambda part=part: f"Machine: {facts(part)}." for part in PARTS},
}


def with_tables(page: str) -> str:
    """A page's text with every table in it as the saved figures give it."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise KeyError(f"no table {name!r}: there are {', '.join(TABLES)}")
        return f"<!-- table {name} -->\n\n{TABLES[name]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table ([\w ]+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def measured_quality() -> dict[str, Any]:
    """What `tqgguf fit` shows beside a cache: the median divergence of every type on prose of 2,048 tokens."""
    names = [model.name for model in real_sources.MODELS.values()]
    runs = [_runs(name, "prose", 2048)[0] for name in names]
    found = [{row["type"]: float(f"{row['kld']['median']:.3g}") for row in run["rows"]} for run in runs]
    types = [kind for kind in found[0] if all(kind in rows for rows in found) and "," not in kind]
    return {
        "models": names,
        "text": runs[0]["text"],
        "n_ctx": runs[0]["n_ctx"],
        "median_kld": {kind: [rows[kind] for rows in found] for kind in types},
    }


def write_tables() -> None:
    """Writes the tables into the pages that have places for them, and the figures of `tqgguf fit`."""
    write_whole(MEASURED, [json.dumps(measured_quality(), indent=1).encode() + b"\n"], what="the figures")
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            write_whole(page, [new.encode()], what="the page")
            print(f"wrote the tables of {name}")


# ---- Parts ----


def run_part(part: str, options: Sequence[str] = ()) -> None:
    """Runs a part's program, and ends with its status if it fails."""
    done = subprocess.run([sys.executable, str(HERE / PARTS[part]), *options], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def run_side_by_side(part: str) -> None:
    """Runs a part as several processes, and saves what they found as one; ends with the status of one that fails."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.json" for i in range(len(SIDE_BY_SIDE[part]))]
        processes = []
        for options, file in zip(SIDE_BY_SIDE[part], files, strict=True):
            command = [sys.executable, str(HERE / PARTS[part]), "--threads", "1", "--output", str(file), *options]
            processes.append(subprocess.Popen(command))
        if failed := [process.returncode for process in processes if process.wait()]:
            sys.exit(failed[0])
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    merged = {**found[0], "command": f"python benchmarks/real_models.py {part}"}
    for other in found[1:]:
        merged.update({key: merged[key] + value for key, value in other.items() if isinstance(value, list)})
    machine.save(merged, str(saved_at(part)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = f"{', '.join(PARTS)}, tables (default: {' '.join(EVIDENCE)})"
    parser.add_argument("parts", nargs="*", metavar="PART", help=parts)
    parser.add_argument("--short", action="store_true", help="one chunk of prose on one model, saved nowhere")
    peer.add_options(parser)
    args = parser.parse_args()
    if args.peer:
        try:
            peer.run(args)
        except (peer.PeerError, real_sources.SourceError) as error:
            sys.exit(f"real_models.py: {error}")
        return
    if unknown := set(args.parts) - {*PARTS, "tables"}:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)} and tables")
    if args.short:
        run_part("quality", ["--short"])
        return
    for part in args.parts or EVIDENCE:
        start = time.monotonic()
        if part in SIDE_BY_SIDE:
            run_side_by_side(part)
        elif part != "tables":
            run_part(part)
        print(f"{part}: {(time.monotonic() - start) / 60:.0f} minutes")
    write_tables()


if __name__ == "__main__":
    main()
