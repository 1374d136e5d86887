"""`tqgguf compare` as a user meets it: table, JSON, picture, and a sentence for every bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tqgguf import CachePolicy
from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

Command = Callable[..., Any]
MODEL = str(demo.MODEL_PATH)
QUICK = ("--ctx", "256", "--chunks", "1", "--threads", "1")


@pytest.fixture
def compare(python: Callable[..., Any]) -> Command:
    return lambda *args, **options: python("-m", "tqgguf", "compare", *args, **options)


def test_table_and_recall(compare: Command) -> None:
    done = compare(MODEL, "--cache", "f16,q8_0,pqo3", "--recall", *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("demo.gguf: 1 x 256 tokens, 127 predictions scored against f16")
    rows = [line.split() for line in done.stdout.splitlines() if line.split()]
    f16, q8_0, pqo3 = (next(row for row in rows if row[0] == name) for name in ("f16", "q8_0", "pqo3+128"))
    # type, bits, bytes, perplexity, speed: it has no divergence
    assert (f16[1:4], len(f16)) == (["16", "2,048", "524,288"], 6)
    assert pqo3[2:4] == ["448", f"{256 * 448 + 132 * 4 * 2 * 260:,}"] and len(pqo3) == len(q8_0) == 13
    assert float(pqo3[1]) == pytest.approx(3.5 + 132 / 256 * (16 + 32 / 128), rel=1e-4)
    assert 0 < float(q8_0[5]) < float(pqo3[5])
    assert [row[1] for row in rows if row[0] == "16"] == ["f16", "q8_0", "pqo3+128"]
    assert next(row for row in rows if row[:2] == ["16", "f16"])[-1] == "50/50"
    assert done.stderr.startswith("tqgguf: note: the demo model was taught to predict answers")


def test_json(compare: Command, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(demo.recall_prompt(seed, 60).context for seed in range(2)))
    done = compare(MODEL, "-f", str(text), "--cache", "q8_0,pqo4", "--batch", "64", "--tail", "64", *QUICK, "--json")
    assert done.stderr == ""
    data = json.loads(done.stdout)
    assert data["recall"] is None
    found = data["comparison"]
    assert (found["n_ctx"], found["n_chunks"], found["n_scored"], found["n_threads"]) == (256, 1, 127, 1)
    assert [(row["type"], row["tail"]) for row in found["rows"]] == [("q8_0+64", 64), ("pqo4+64", 64)]
    assert found["rows"][0]["kld"]["max"] == 0 < found["rows"][1]["kld"]["median"] < found["rows"][1]["kld"]["p99"]


def test_generate(compare: Command) -> None:
    options = ("--cache", "f16,q8_0,pqo3", "--tail", "0", "--generate", "20", *QUICK)
    done = compare(MODEL, *options)
    assert done.returncode == 0, done.stderr
    table = done.stdout.partition("own 1 x 20 tokens after 236 of text")[2]
    rows = [line.split() for line in table.splitlines() if line.split()]
    assert [span for span in rows[1] if "-" in span] == ["1-4", "5-8", "9-12", "13-16", "17-20"]
    assert [row[0] for row in rows if row[-1] in ("0/1", "1/1")] == ["q8_0", "pqo3"]
    data = json.loads(compare(MODEL, *options, "--json").stdout)["continuation"]
    assert [len(row["agreed"]) for row in data["rows"]] == [1, 1, 1]


@pytest.mark.parametrize(("n", "words"), [("0", "n_generate is 0"), ("200", "at most half of the context")])
def test_generate_too_few_or_too_many(compare: Command, n: str, words: str) -> None:
    done = compare(MODEL, "--generate", n, *QUICK)
    assert done.returncode and words in done.stderr and not done.stdout


def test_plot(compare: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = compare(MODEL, *QUICK, "--plot", "picture.svg")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "picture.svg").read_text(encoding="utf-8").count("<path") > 20


def test_plot_labels_and_positions(tmp_path: Path) -> None:
    matplotlib_text = pytest.importorskip("matplotlib.text")
    from tqgguf import Comparison, Divergence, TypeQuality
    from tqgguf.cli.render.plot import figure_of

    kinds = {"f16": (2048, 0.0), "q4_0": (576, 0.09), "pqo4": (576, 0.06), "pqo3": (448, 0.2)}
    rows = tuple(
        TypeQuality(name, 0, 0, 0, 2048 * size, 1, 0, Divergence(kld, kld / 10, kld, kld, kld, kld), 1, 1)
        for name, (size, kld) in kinds.items()
    )
    figure = figure_of(Comparison("m.gguf", 2048, 8, 8184, 1, rows, ()))
    labels = {a.get_text(): a for a in figure.axes[0].findobj(matplotlib_text.Annotation)}
    assert {name: label.xy for name, label in labels.items()} == {n: kinds[n] for n in ("q4_0", "pqo4", "pqo3")}
    sides = {name: label.get_horizontalalignment() for name, label in labels.items()}
    assert sides == {"pqo4": "left", "q4_0": "right", "pqo3": "left"}  # of equal size: right and left of their points
    assert figure.axes[0].get_yscale() == "log"


def test_plot_labels_do_not_cover_each_other() -> None:
    text = pytest.importorskip("matplotlib.text")
    from tqgguf import Comparison, Divergence, TypeQuality
    from tqgguf.cli.render.plot import figure_of

    kinds = {"f16": (2048, 0.0), "q4_0": (576, 0.0661), "pqt4+128": (576, 0.064), "pqo4": (576, 0.066)}
    kinds |= {"iq4_nl": (590, 0.065), "policy": (450, 0.185), "policy (2)": (460, 0.19), "pqo3": (448, 0.19)}
    rows = tuple(
        TypeQuality(name, 0, 0, 0, 2048 * size, 1, 0, Divergence(kld, kld / 10, kld, kld, kld, kld), 1, 1)
        for name, (size, kld) in kinds.items()
    )
    figure = figure_of(Comparison("m.gguf", 2048, 8, 8184, 1, rows, ()))
    figure.draw_without_rendering()
    labels = figure.axes[0].findobj(text.Annotation)
    boxes = [text.Text.get_window_extent(label) for label in labels]
    assert len(boxes) == 7
    assert not [(i, j) for i in range(7) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert all(abs(label.get_position()[1]) < 40 for label in labels)  # points: near what they name


def test_plot_without_matplotlib_says_what_to_install(compare: Command, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    done = compare(MODEL, "--plot", "a.png", env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"})
    assert done.returncode == 1 and "pip install 'tqgguf[plot]'" in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--cache", "f16,q9"], "unknown cache type 'q9'; valid types are f32"),
        (["--cache", "f16,pqo3,f16"], "f16 is given twice"),
        (["--cache", "pqo3"], "at least two caches"),
        (["--cache", "f16,pqo4/pqo9"], "unknown cache type 'pqo9'"),
        (["--cache", "f16,pqo4/pqo3,pqo4/pqo3"], "cache pqo4/pqo3 is given twice"),
        (["--cache", "f16,missing.gguf"], "missing.gguf does not exist"),
        (["--cache", "f16,"], "unknown cache type ''"),
        (["--ctx", "0"], "must be an integer between"),
        (["--chunks", "-1"], "must be an integer between"),
        (["--batch", "x"], "must be an integer between"),
    ],
)
def test_usage_errors(compare: Command, args: list[str], said: str) -> None:
    done = compare(MODEL, *args)
    assert done.returncode == 2 and done.stdout == "" and said in done.stderr


def test_failures_are_one_line_each(compare: Command, tmp_path: Path, random_model: Callable[..., Path]) -> None:
    short, empty, latin = (tmp_path / name for name in ("short", "empty", "latin"))
    short.write_text("The code of Anna is falcon.\n")
    empty.write_text("\n")
    latin.write_bytes(b"caf\xe9")
    for args, said in (
        ([MODEL, "-f", str(short)], "the text has 27 bytes, but a context of 2,048 needs as many tokens"),
        ([MODEL, "-f", str(empty)], "the text is empty"),
        ([MODEL, "-f", str(latin)], "is not UTF-8 text"),
        ([MODEL, "-f", str(tmp_path / "missing")], "No such file"),
        ([MODEL, "--ctx", "64"], "a context of 64 tokens is too short"),
        ([MODEL, "--plot", "a.gif"], "must end in .png"),
        ([MODEL, "--plot", "missing/a.png"], "does not exist"),
        ([str(random_model())], "needs a text to be measured on (-f FILE)"),
        ([str(random_model(head_dim=80)), "-f", str(short)], "head_dim of K is 80"),
        ([str(tmp_path / "missing.gguf")], "does not exist"),
    ):
        done = compare(*args)
        assert done.returncode == 1 and done.stdout == "", args
        assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_attention_on_the_models_own_text(compare: Command) -> None:
    options = ("--attention", "--layers", "0", "--ctx", "64", "--cache", "f16,pqo3", "--json")
    done = compare(str(demo.MODEL_PATH), *options)
    assert done.returncode == 0, done.stderr
    (layer,) = json.loads(done.stdout)["layers"]
    assert layer["errors"]["f16"][0]["output"] < 1e-3 < layer["errors"]["pqo3"][0]["output"]


def test_pairs_and_policies(compare: Command, tmp_path: Path) -> None:
    CachePolicy(("q8_0", "pqo3", "pqo3", "pqo3"), ("pqo3",) * 4).write(tmp_path / "first.gguf")
    caches = "f16,q8_0/pqo3,pqo3/q8_0,first.gguf,pqo3"
    done = compare(MODEL, "--cache", caches, "--tail", "0", *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["type"]: row for row in json.loads(done.stdout)["comparison"]["rows"]}
    assert {name: (row["bits"], row["bytes_per_token"]) for name, row in rows.items()} == {
        "f16": (16, 2048),
        "q8_0/pqo3": (6, 4 * (136 + 56)),
        "pqo3/q8_0": (6, 4 * (136 + 56)),
        "first": (3.5 + 5 / 8, 8 * 56 + 80),
        "pqo3": (3.5, 8 * 56),
    }
    kld = {name: row["kld"]["mean"] for name, row in rows.items()}
    assert kld["q8_0/pqo3"] != kld["pqo3/q8_0"]  # which is K's is not mistaken
    assert max(kld["q8_0/pqo3"], kld["pqo3/q8_0"], kld["first"]) < kld["pqo3"]


def test_recall_of_a_pair(compare: Command) -> None:
    done = compare(MODEL, "--cache", "f16,pqo4/pqo3", "--tail", "0", "--recall", *QUICK, "--json")
    scores = json.loads(done.stdout)["recall"]["scores"]
    assert {score["type"] for score in scores} == {"f16", "pqo4/pqo3"}


def test_attention_takes_types_alone(compare: Command) -> None:
    done = compare(MODEL, "--attention", "--cache", "f16,pqo4/pqo3")
    assert done.returncode == 2 and "--attention takes types in --cache" in done.stderr


@pytest.mark.parametrize("other", [["--recall"], ["--generate", "0"], ["--calibration", "auto"], ["--tail", "0"]])
def test_attention_goes_with_no_other_measurement(compare: Command, other: list[str]) -> None:
    done = compare(str(demo.MODEL_PATH), "--attention", *other)
    assert done.returncode == 2
    assert "--attention goes with none of --recall, --generate, --plot, --chunks" in done.stderr
