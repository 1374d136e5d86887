"""Compares the figures that the pages quote with the pages and the benchmark results that they come from."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any, Final

import pytest

import tqgguf
from tqgguf import CACHE_TYPES
from tqgguf.demo import model as demo

REPOSITORY: Final = Path(__file__).parents[2]
QUALITY: Final = (REPOSITORY / "docs" / "quality.md").read_text(encoding="utf-8")

TYPES: Final = ("f16", "q8_0", "q4_0", "pqt4", "pqo4", "pqt3", "pqo3")


def words(page: str) -> str:
    """The text of a page with single blanks in the place of line breaks."""
    return " ".join((REPOSITORY / page).read_text(encoding="utf-8").split())


def mean_kld(type: str, tail: str) -> float:
    """The mean KLD of a type in the table of docs/quality.md."""
    row = re.search(rf"^\| (?:\*\*)?{type}(?:\*\*)? \| {tail} *\|(.*)$", QUALITY, re.M)
    assert row, (type, tail)
    return float(row[1].split("|")[3])


def results(name: str) -> Any:
    return json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_what_the_demo_model_missed() -> None:
    measured = {row["type"]: row for name in ("demo_quality", "demo_quality_trellis") for row in results(name)["types"]}
    assert set(TYPES) <= measured.keys()
    missed = {name: sum(score["n"] - score["right"] for score in row["scores"]) for name, row in measured.items()}
    assert {name: n for name, n in missed.items() if n} == {"pqo3": 3, "pqt3": 1}
    assert "pqo3 missed 3 questions of 556, pqt3 one, the other types none" in words("docs/quality.md")
    assert sum(score["n"] for score in measured["pqo3"]["scores"]) == 556


def test_the_tables_of_the_tail() -> None:
    rows = results("tail_quality")["rows"]
    kld = {(row["cache"], row["n_ubatch"], row["tail"]): row["mean_kld"] for row in rows}
    tails = (0, 1, 32, 128, 512)
    for cache in ("pqo3", "pqo4"):
        for n in (1, 64, 512, 2048):
            cells = [f"{kld[cache, n, tail]:.3g}" for tail in tails]
            assert f"| {cache} | {n:,} | {' | '.join(cells)} |" in QUALITY
            assert all(kld[cache, n, tail] == pytest.approx(kld[cache, 1, tail], rel=0.03) for tail in tails)
    removed = [f"{1 - kld[cache, 1, 128] / kld[cache, 1, 0]:.0%}".replace("%", " %") for cache in ("pqo3", "pqo4")]
    assert f"removes {removed[0]} of pqo3's KLD and {removed[1]} of pqo4's" in words("docs/quality.md")


def test_what_readme_says_of_memory() -> None:
    per_token = {name: 2 * CACHE_TYPES[name].row_bytes(32 * 8 * 128) for name in TYPES}
    gib = [per_token[name] * 131072 / 2**30 for name in ("f16", "pqo3", "pqo4")]
    page = words("README.md")
    assert "an f16 cache of 131,072 tokens takes 16 GiB" in page and "3.5 or 4.5 GiB for the same cache" in page
    assert gib == [16, 3.5, 4.5]


def test_the_figures_of_the_questions() -> None:
    quoted = re.search(
        r"without a tail \(\.(\d+) against \.(\d+)\) and with one on both \(\.(\d+) against \.(\d+);",
        words("docs/faq.md"),
    )
    tailed = re.search(r"a tail of 128 takes q4_0 from 0\.\d+ to (0\.\d+)", words("docs/quality.md"))
    assert quoted and tailed
    pqt4, q4_0, kept, stock_kept = (float(f"0.{digits}") for digits in quoted.groups())
    assert (pqt4, kept) == (round(mean_kld("pqt4", "0"), 3), round(mean_kld("pqt4", "128"), 3))
    assert (q4_0, stock_kept) == (round(mean_kld("q4_0", ""), 3), round(float(tailed[1]), 3))
    assert pqt4 / q4_0 == pytest.approx(1 / 2, abs=0.05) and kept / stock_kept == pytest.approx(1 / 2, abs=0.05)
    ratios = {row["test"]: row["ratio"] for row in results("cpu_llama_gqa2")["speeds"] if row["cache"] == "pqo3"}
    said = re.search(
        r"`pqo3` decodes on an Intel Xeon ([\d.]+) times as fast as f16 after 512 tokens "
        r"and ([\d.]+) times after 4,096",
        words("docs/faq.md"),
    )
    assert said
    for text, test in zip(said.groups(), ("tg32 @ 512", "tg32 @ 4096"), strict=True):
        assert float(text) == pytest.approx(ratios[test], abs=0.06)


def test_the_figures_of_the_real_models() -> None:
    """Sentences of README and docs/faq.md; the tables are compared in test_real_models.py."""
    kld = {
        run["model"]: {row["type"]: row["kld"]["mean"] for row in run["rows"]}
        for run in results("real_quality")["runs"]
        if (run["text"], run["n_ctx"]) == ("prose", 2048) and "hot" not in run["model"]
    }
    decode = {
        (model["model"], row["cache"]): row["ratio"]
        for model in results("real_speed")["models"]
        for row in model["rows"]
        if (row["test"], row["depth"], row["threads"]) == ("answer", 4096, 1)
    }
    smol, gemma = kld
    shown = [f"{kld[model][cache]:.3f}"[1:] for model in (smol, gemma) for cache in ("pqt3", "pqt3+128")]
    said = "from {} to {} for SmolLM2-135M, and from {} to {} for Gemma 3 270M".format(*shown)
    assert said in words("README.md")
    (run,) = (run for run in results("real_quality")["runs"] if "hot" in run["model"])
    hot = {row["type"]: row["kld"]["mean"] for row in run["rows"]}
    said = f"{hot['pqt3']:.2f} nats with pqt3, and of {hot['pqt3 calibrated']:.3f}".replace("of 0.", "of .")
    assert f"such a model has a mean KLD of {said} with calibrated pqt3" in words("README.md")
    speeds = [
        f"{decode[model, f'{cache}+128 calibrated']:.1f}" for model in (smol, gemma) for cache in ("pqo3", "pqt3")
    ]
    assert speeds[2] == speeds[3]
    said = "SmolLM2-135M decodes {} times as fast with `pqo3` and {} times with `pqt3`, and Gemma 3 270M {} times with "
    assert said.format(*speeds) in words("docs/faq.md")


@pytest.mark.model
def test_the_tail_in_a_long_context() -> None:
    with contextlib.closing(tqgguf.Llama(demo.MODEL_PATH, cache="pqo3", n_ctx=32768, verbose=False)) as model:
        ratio = model.cache_info().ratio
    assert f"at 32,768 tokens the whole cache is {100 * ratio:.1f} %" in words("docs/faq.md")
    assert f"{14 / 64:.1%}".replace("%", " %") in words("docs/faq.md")


def test_the_load_of_the_server() -> None:
    page = words("docs/serve.md")
    load, soak, kills = results("serve_load"), results("soak"), results("session_kill")
    found = [load[key] for key in ("answered", "wrong", "otherwise_by_a_near_tie", "requests", "clients", "parallel")]
    assert found == [10000, 0, 0, 10000, 32, 8]
    assert f"{load['requests_per_second']:.0f} requests and {load['tokens_per_second']:,.0f} tokens a second" in page
    assert f"grew by {load['slope_mib_per_1000_requests']:.2f} MiB per 1,000 requests" in page
    reuse = results("serve_load_reuse")
    assert reuse["reuse"] and f"{reuse['wrong']} of {reuse['requests']:,} answers differed" in page
    speed = {row["clients"]: row for row in results("serve_speed")["rows"] if row["server"] == "tqgguf serve"}
    assert f"{speed[4]['tokens_per_s']:.0f} tokens a second, {speed[4]['ratio']:.2f} of what" in page
    assert f"one client {speed[1]['tokens_per_s']:.0f}, {speed[1]['ratio']:.2f} of it" in page
    assert soak["wrong"] == 0 and not soak["failures"]
    assert f"answered {soak['requests_in_all']:,} requests, {soak['stopped_by_aborts']} of them aborted" in page
    assert f"{soak['slope_mib_per_1000_requests']:.2f} MiB per 1,000 requests" in page
    assert kills["whole"] == kills["kills"] == 1000 and 100 < kills["left_the_new_file"] < 900
    assert f"all files were whole, {kills['left_the_new_file']} of them the new one" in page
    assert f"{kills['killed_while_writing']} processes had been in the middle of writing" in page


def test_what_was_fuzzed() -> None:
    page = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    counts = results("fuzz")
    rows = {}
    for name, python, executions, seconds in re.findall(
        r"^\| `(\w+)`(, Python)? \|.*\| ([\d,]+) \| ([\d,]+) \|$", page, re.M
    ):
        target = f"files-{name}" if python or name in ("policy", "session", "state") else name
        rows[target] = {"executions": int(executions.replace(",", "")), "seconds": int(seconds.replace(",", ""))}
    assert rows == counts["targets"]
    assert counts["executions"] == sum(row["executions"] for row in rows.values()) > 10**8
    assert f"{counts['executions'] / 1e6:.0f} million executions in all" in page


def test_the_wheel_beside_a_native_build() -> None:
    page = (REPOSITORY / "docs" / "wheels.md").read_text(encoding="utf-8")
    rows = [results(name)["rows"] for name in ("wheel", "wheel_2_threads")]
    for weights in ("demo", "f16", "q8_0", "q4_0"):
        cells = [
            " / ".join(
                f"{row['wheel']['ratio']:.2f}".removeprefix("0")
                for cache in ("f16", "pqo3")
                for row in measured
                if (row["case"], row["phase"]) == (f"{weights}/{cache}", phase)
            )
            for measured in rows
            for phase in ("prefill", "decode")
        ]
        assert f"| {weights}, f16 / pqo3 | {' | '.join(cells)} |" in page
    assert min(row["wheel"]["ratio"] for measured in rows for row in measured) > 0.955
    assert "The wheel is within 4 % of native" in page


def test_right_answers_in_prose_are_those_of_the_table() -> None:
    rows = re.findall(r"\| (\S+(?: calibrated)?) \|[^|]*(?:\|[^|]*){7}\| (\d+) of 264 \|", words("docs/real-models.md"))
    smollm2, gemma = dict(rows[: len(rows) // 2]), dict(rows[len(rows) // 2 :])
    said = "{} of 264 on Gemma, where f16 gives {} and q4_0 {}; {} on SmolLM2, where f16 gives {} and q4_0 {}"
    figures = [model[name] for model in (gemma, smollm2) for name in ("pqt3+128 calibrated", "f16", "q4_0")]
    assert said.format(*figures) in words("docs/real-models.md")
    said = "Gemma 3 270M gives {1} right with f16, {0} with calibrated pqt3 and a tail, and {2} with q4_0"
    assert said.format(*figures) in words("README.md")
