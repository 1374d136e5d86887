"""The attention part of `tqgguf compare`: its options, its table, its JSON."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from tqgguf import CACHE_TYPES
from tqgguf.cli.commands import compare
from tqgguf.cli.render import compare as rendered
from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

TEXT = demo.recall_prompt(7, 64).prompt


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compare.add_attention_options(parser)
    args = parser.parse_args(["--attention", *options])
    args.model, args.ctx, args.threads, args.json = demo.MODEL_PATH, 64, None, False
    return args


def run(capsys: pytest.CaptureFixture[str], types: list[str] | None, *options: str, as_json: bool = False) -> str:
    args = parse(*options)
    args.json = as_json
    assert compare.call_attention(args, TEXT, types) == 0
    return capsys.readouterr().out


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, ["q4_0", "pqo3"], "--layers", "0,3")
    data = json.loads(run(capsys, ["q4_0", "pqo3"], "--layers", "0,3", as_json=True))
    lines = out.splitlines()
    assert "64 tokens; mean/worst KV head" in lines[0]
    starts = [i for i, line in enumerate(lines) if line.startswith("layer ")]
    assert [lines[i].split(":")[0] for i in starts] == ["layer 0", "layer 3"]
    for start, layer in zip(starts, data["layers"], strict=True):
        assert lines[start + 1].startswith(f"  KV head 0: offset {layer['heads'][0]['offset']:.2f}, ")
        rows = {line.split()[0]: line.split()[1:] for line in lines[start + 3 : start + 6]}
        assert list(rows) == ["cache", "q4_0", "pqo3"]
        kl = [head["kl"] for head in layer["errors"]["pqo3"]]
        assert [f"0{part}" for part in rows["pqo3"][3].split("/")] == [f"{sum(kl) / 2:.4f}", f"{max(kl):.4f}"]


def test_json_carries_every_head(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(run(capsys, None, "--layers", "1-2", "--centre", "--no-rotation", as_json=True))
    assert (data["n_tokens"], data["centred"], data["rotated"]) == (64, True, False)
    assert [layer["layer"] for layer in data["layers"]] == [1, 2]
    for layer in data["layers"]:
        assert [head["head"] for head in layer["heads"]] == [0, 1]
        assert list(layer["errors"]) == list(CACHE_TYPES)
        for errors in layer["errors"].values():
            assert [set(error) for error in errors] == [{"head", "nmse_k", "nmse_v", "score", "kl", "output"}] * 2


def test_options_reach_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    first = run(capsys, ["q4_0"], "--layers", "3", "--centre", "--no-rotation").splitlines()[0]
    assert "keys centred" in first and "stock types not rotated" in first


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        ((), "no outlier channels"),
        ((3, 9), "(over 4 times the median) 3, 9"),
        (tuple(range(20)), "0, 1, 2, 3, 4, 5, 6, 7 and 12 more"),
    ],
)
def test_outliers_as_text(channels: tuple[int, ...], said: str) -> None:
    assert rendered._outliers(channels).endswith(said)


@pytest.mark.parametrize(("text", "layers"), [("0", (0,)), ("0,2-4", (0, 2, 3, 4)), ("5, 1,5", (1, 5))])
def test_layers(text: str, layers: tuple[int, ...]) -> None:
    assert parse("--layers", text).layers == layers


@pytest.mark.parametrize("text", ["", "x", "1,", "-1", "4-2", "1-", "0x1"])
def test_bad_layers(text: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parse(f"--layers={text}")
    assert "must be layers such as 0,1,5-7" in capsys.readouterr().err
