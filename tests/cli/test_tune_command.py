"""`tqgguf tune` as a user meets it: tables, JSON, a policy file, and a sentence for every bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tqgguf import CachePolicy, read_policy
from tqgguf.cache.policy import model_hash
from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

Command = Callable[..., Any]
MODEL = str(demo.MODEL_PATH)
QUICK = ("--ctx", "256", "--chunks", "2", "--threads", "1", "--types", "pqo3,pqo4")


@pytest.fixture
def tune(python: Callable[..., Any]) -> Command:
    return lambda *args: python("-m", "tqgguf", "tune", *args)


def test_a_policy_is_written_and_used(tune: Command, python: Any, tmp_path: Path) -> None:
    done = tune(MODEL, "-o", "policy.gguf", "--budget", "4", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "rotation" not in done.stderr  # it is tune itself that switches it off
    assert "KLD of layers: predicted, from KLD measured for bands of them in pqo3" in done.stdout
    assert re.search(r"^  V of layers 2-3: \d[\d.e-]*", done.stdout, re.M)
    policy = read_policy(tmp_path / "policy.gguf")
    assert policy.model_hash == model_hash(demo.MODEL_PATH)
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "demo.gguf: chunks of 256 tokens; tuned on chunk 1, measured on chunk 2, which tuning did not read"
        "; pqo and pqt caches with a tail of 128 tokens in f16"
    )
    # the tail: 132 rows for 256 tokens, each of 16 bits a value and an owner's number of 4 bytes for 128 values
    tail = 132 / 256 * (16 + 32 / 128)
    assert lines[-1] == (
        f"written to policy.gguf: 4 bits per value, 512 bytes per token; {4 + tail:.4g} with the tail, at 256 tokens"
    )
    rows = {line.split()[0]: line.split() for line in lines if line}
    for layer in range(4):
        assert (rows[str(layer)][1], rows[str(layer)][-2]) == (policy.types_k[layer], policy.types_v[layer])
    assert rows["policy"][2] == "512" and rows["pqo3"][2] == "448"
    assert float(rows["policy"][1]) - float(rows["pqo3"][1]) == pytest.approx(0.5, abs=1e-3)
    assert float(rows["policy"][5]) < float(rows["pqo3"][5])

    compared = python("-m", "tqgguf", "compare", MODEL, "--cache", "f16,policy.gguf", *QUICK[:6])
    assert compared.returncode == 0 and "another model" not in compared.stderr
    answer = python("-m", "tqgguf", "demo", "--cache", "policy.gguf")
    assert "Paris" in answer.stdout and "4 of 16 bits per value" in answer.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "policy.gguf"]


def test_json(tune: Command, tmp_path: Path) -> None:
    done = tune(MODEL, "-o", "policy.gguf", "--max-kld", "0.2", "--calibration", "auto", "--json", *QUICK)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    policy = read_policy(tmp_path / "policy.gguf")
    assert data["policy"]["types_k"] == list(policy.types_k) and data["policy"]["centred"] == data["policy"]["gains"]
    assert sorted(policy.k_means) == data["policy"]["centred"] == [0, 1, 2, 3]
    assert len(data["bands"]) == 6 and len(data["sensitivities"]) == 4 * 2 * 2
    assert set(data["sensitivities"][0]) == {"layer", "side", "type", "distortion", "kld"}
    row = next(row for row in data["rows"] if row["type"] == "policy")
    assert row["kld"]["mean"] <= 0.2


def test_a_failure_leaves_the_file_that_was_there(
    tune: Command, tmp_path: Path, random_model: Callable[..., Path]
) -> None:
    path = tmp_path / "policy.gguf"
    CachePolicy(("pqo4",), ("pqo4",)).write(path)
    before = path.read_bytes()
    short, empty, latin = (tmp_path / name for name in ("short", "empty", "latin"))
    short.write_text("The code of Anna is falcon.\n")
    empty.write_text("\n")
    latin.write_bytes(b"caf\xe9")
    text = tmp_path / "text"
    text.write_text("abcd " * 200)
    for args, said in (
        (["-f", str(short)], "the text has 27 bytes, but a context of 256 needs as many tokens"),
        (["-f", str(empty)], "the text is empty"),
        (["-f", str(latin)], "is not UTF-8 text"),
        (["-f", str(tmp_path / "missing")], "No such file"),
        (["--budget", "3"], "no policy has 3 bits per value: pqo3"),
        (["--max-kld", "0.0001"], "no policy of pqo3, pqo4 has a mean KLD of 0.0001: pqo4 in all layers has 0.0"),
        (["--types", "pqo3"], "at least two cache types"),
        (["--chunks", "1"], "--chunks is 1, must be at least 2"),
        (["--calibration", "missing.gguf"], "calibration missing.gguf does not exist"),
        ([str(random_model(head_dim=80)), "-f", str(text)], "head_dim of K is 80"),
        ([str(random_model())], "needs a text to be measured on (-f FILE)"),
        (["-o", "policy.json"], "must end in .gguf"),
        (["-o", "nowhere/policy.gguf"], "does not exist"),
        (["-o", MODEL], "exists and is no cache policy: it is not overwritten"),
    ):
        model = [] if args[0].endswith(".gguf") else [MODEL]
        goal = [] if args[0] in ("--budget", "--max-kld") else ["--budget", "4"]
        done = tune(*model, *QUICK, "-o", "policy.gguf", *goal, *args)
        assert done.returncode == 1 and done.stdout == "", (args, done.stdout)
        assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert path.read_bytes() == before
    assert demo.MODEL_PATH.stat().st_size > 2**20


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-o", "p.gguf"], "one of the arguments --budget --max-kld is required"),
        (["-o", "p.gguf", "--budget", "4", "--max-kld", "1"], "not allowed with argument"),
        (["--budget", "4"], "the following arguments are required: -o"),
        (["-o", "p.gguf", "--budget", "x"], "must be a positive number, not 'x'"),
        (["-o", "p.gguf", "--max-kld", "inf"], "must be a positive number, not 'inf'"),
        (["-o", "p.gguf", "--budget", "4", "--types", "pqo3,pqo9"], "unknown cache type 'pqo9'"),
    ],
)
def test_usage_errors(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tqgguf.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["tune", MODEL, *args])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    from tqgguf.cli import main

    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    assert "example: tqgguf tune model.gguf -f text.txt -o policy.gguf --budget 4.0" in capsys.readouterr().out
