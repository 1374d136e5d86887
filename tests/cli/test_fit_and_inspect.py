"""`fit`, `inspect` with something to look into, and `doctor` with a model, as a user meets them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tqgguf._native import library_path
from tqgguf.demo import model as demo
from tqgguf.diagnostics.installation import _FLAGS

pytestmark = pytest.mark.model

Command = Callable[..., subprocess.CompletedProcess[str]]
MODEL = str(demo.MODEL_PATH)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The capital of France is Paris. " * 40)
    return path


# ---- fit ----


def test_fit(tqgguf: Command) -> None:
    done = tqgguf("fit", MODEL, "--memory", "1G", "--cache", "pqo3,f16")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "2,048" in rows["pqo3"] and "1.1 MiB" in rows["pqo3"]
    assert "Recommended: pqo3, 2,048 tokens" in done.stdout
    assert "context  2,048 tokens wanted; trained for 2,048 (--ctx asks for more)" in done.stdout
    command = done.stdout.strip().splitlines()[-1].split()
    assert command[:2] == ["tqgguf", "chat"] and command[-4:] == ["--cache", "pqo3", "--ctx", "2048"]
    answer = tqgguf(*command[1:], "--temp", "0", "--threads", "1", stdin="What is the capital of Peru?\n")
    assert "Lima" in answer.stdout


@pytest.mark.parametrize(
    ("args", "ends"),
    [
        (["--cache", "pqo4/pqo3", "--tail", "0"], "--cache-k pqo4 --cache-v pqo3 --tail 0 --ctx 2048"),
        (["--cache", "q4_0", "--tail", "64"], "--cache q4_0 --tail 64 --ctx 2048"),
        (["--cache", "f16", "--tail", "64"], "--cache f16 --ctx 2048"),  # chat would refuse the tail
        (["--window-only"], None),  # what is counted is not what chat would take
        (["--vram", "1M"], None),
        (["--parallel", "2"], None),
    ],
)
def test_the_command_that_fit_recommends(tqgguf: Command, args: list[str], ends: str | None) -> None:
    out = tqgguf("fit", MODEL, "--memory", "1G", *args).stdout.strip()
    assert out.endswith(ends) if ends else "tqgguf chat" not in out, out


def test_no_figure_is_cut_short(tqgguf: Command, text: Path) -> None:
    for args, wanted in (
        (
            ["fit", MODEL, "--memory", "1G", "--vram", "1M"],
            ["layers on GPU", "video memory", "   2,048   1.1 MiB"],
        ),
        (["inspect", MODEL], ["bytes/token", "pqo3          3.5          448       1.1 MiB"]),
        (["inspect", MODEL, "-f", str(text)], ["layer     type  norm  scale  entropy  outliers  offset"]),
    ):
        done = tqgguf(*args, env={"COLUMNS": "20"})
        assert done.returncode == 0 and "…" not in done.stdout
        for part in wanted:
            assert part in done.stdout, done.stdout


def test_fit_with_a_context(tqgguf: Command) -> None:
    out = tqgguf("fit", MODEL, "--memory", "1G", "--ctx", "5000", "--cache", "pqo3").stdout
    assert "context  5,000 tokens wanted; trained for 2,048\n" in out and "Recommended: pqo3, 5,000 tokens" in out


def test_fit_json(tqgguf: Command) -> None:
    data = json.loads(tqgguf("fit", MODEL, "--memory", "1G", "--parallel", "2", "--unified", "--json").stdout)
    assert data["weights"] == 6038528 and data["memory"] == 2**30 and data["n_ctx"] == 4096
    assert data["setup"] == {"tail": None, "n_seq": 2, "unified": True, "swa_full": True}
    for row in data["rows"]:
        assert row["memory"] == data["weights"] + sum(row["plan"].values())
    assert data["recommended"]["cache"] == "f16"


def test_fit_with_video_memory(tqgguf: Command) -> None:
    done = tqgguf("fit", MODEL, "--memory", "6M", "--vram", "1G")
    assert done.returncode == 0 and "layers on GPU" in done.stdout
    assert re.search(r"pqo4 .* 5 ", done.stdout)  # four layers and the output
    said = "no CUDA backend" in " ".join(done.stdout.split())
    assert said is not library_path("ggml-cuda").is_file()
    assert "CUDA" not in tqgguf("fit", MODEL, "--memory", "6M", "--vram", "1G", "--cache", "f16").stdout
    on_gpu, kept = (
        tqgguf("fit", MODEL, "--memory", "32M", "--vram", "1G", "--cache", "q4_0", *tail).stdout
        for tail in ([], ["--tail", "64"])
    )
    assert "tail of stock types" not in on_gpu and "tail of stock types is for the CPU" in " ".join(kept.split())
    assert "CUDA" not in tqgguf("fit", MODEL, "--memory", "1G").stdout


def test_tables_without_blanks_at_the_end(tqgguf: Command) -> None:
    for command in (["fit", MODEL, "--memory", "1G"], ["inspect", MODEL], ["doctor"]):
        lines = tqgguf(*command).stdout.partition("Recommended")[0].splitlines()
        assert lines and [line for line in lines if line != line.rstrip()] == []


def test_fit_that_does_not(tqgguf: Command, random_model: Callable[..., Path]) -> None:
    done = tqgguf("fit", MODEL, "--memory", "6.2M")
    assert done.returncode == 1 and "does not fit" in done.stdout and "Nothing to recommend" in done.stdout
    done = tqgguf("fit", MODEL, "--memory", "1M")
    assert done.returncode == 1 and "weights of demo.gguf alone take 6,038,528 bytes" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = tqgguf("fit", str(random_model(head_dim=80)), "--memory", "1G")
    assert done.returncode == 0 and "cannot be used" in done.stdout
    assert "head_dim of K is 80" in " ".join(done.stdout.split())
    done = tqgguf("fit", str(random_model(head_dim=80)), "--memory", "1G", "--cache", "pqo3")
    assert done.returncode == 1 and "can have none of these caches" in done.stderr


# ---- inspect ----


class Page(HTMLParser):
    """Checks that tags close in order, and collects what a page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.links: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_inspect_a_text_and_write_a_page(tqgguf: Command, text: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    options = ["-f", str(text), "--cache", "pqo4", "--ctx", "256", "--threads", "1"]
    done = tqgguf("inspect", MODEL, *options, "--html", str(page))
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if "pqo4" in line]
    assert len(lines) == 8 and lines[0][:3] == ["0", "K", "pqo4"] and 3.5 < float(lines[0][5]) < 4
    found = Page(content := page.read_text(encoding="utf-8"))
    assert found.links == [] and "script" not in found.tags and "url(" not in content and "http" not in content
    # seven maps of K and V with four layers of two heads (no outlier channels), and two histograms of 16 bars
    assert found.tags["svg"] == 16 and found.tags["rect"] == 14 * 8 + 2 * 16 and found.tags["td"] == 8 * 10
    for rule in ("prefers-color-scheme: dark", "@media print", "width=device-width"):
        assert rule in content


def test_inspect_says_what_it_leaves_out(tqgguf: Command, text: Path) -> None:
    done = tqgguf("inspect", MODEL, "-f", str(text), "--ctx", "64", "--json")
    assert json.loads(done.stdout)["n_cells"] == 64
    n_tokens = re.search(r"note: of (\d+) tokens the first 64 are read; --ctx (\d+) reads all", done.stderr)
    assert n_tokens and n_tokens[1] == n_tokens[2] and int(n_tokens[1]) > 200
    done = tqgguf(
        "inspect", MODEL, "-f", str(text), "--ctx", "2000000000", "--json"
    )  # no more cells than the text takes
    assert json.loads(done.stdout)["n_cells"] == int(n_tokens[1]) and done.stderr == ""


def test_a_page_is_written_whole_or_not_at_all(python: Callable[..., Any], text: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
from tqgguf.cli import main
sys.exit(main(["inspect", {MODEL!r}, "-f", {str(text)!r}, "--html", {str(page)!r}]))
"""
    done = python("-c", code)
    assert done.returncode == 1 and f"tqgguf: error: {page}: File too large; a page that was there" in done.stderr
    assert page.read_text() == "old" and not list(tmp_path.glob(".*.part"))


def test_inspect_json_says_the_same(tqgguf: Command, text: Path) -> None:
    options = ["-f", str(text), "--cache", "pqo4", "--ctx", "256", "--threads", "1", "--json"]
    data = json.loads(tqgguf("inspect", MODEL, *options).stdout)
    assert len(data["tensors"]) == 8 and data["n_stream"] == 1
    head = data["tensors"][0]["heads"][1]
    assert len(head["codes"]) == 16 and 0 < head["nmse_4"] < head["nmse_3"] < 0.03


def test_inspect_names_that_are_markup(tqgguf: Command, text: Path, tmp_path: Path) -> None:
    model = tmp_path / "<b>&amp;.gguf"
    data = demo.MODEL_PATH.read_bytes()
    model.write_bytes(data.replace(b"tqgguf demo", b"<script>a&b", 1))
    page = tmp_path / "r.html"
    done = tqgguf("inspect", str(model), "-f", str(text), "--ctx", "64", "--threads", "1", "--html", str(page))
    assert done.returncode == 0, done.stderr
    assert "script" not in Page(page.read_text()).tags and "&lt;script&gt;a&amp;b" in page.read_text()


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["--html", "r.html"], 2, "need something to look into"),
        (["--session", "a", "-f", "b"], 2, "two sources"),
        (["--session", "missing"], 1, "No such file"),
        (["--session", "missing", "--html", "no/such/r.html"], 1, "does not exist"),
        (["--session", "missing", "--html", "."], 1, "is a folder"),
        (["-f", "missing"], 1, "missing"),
        (["--session", MODEL], 1, "neither a session of tqgguf nor a state of llama.cpp"),
        (["--session", "/dev/null"], 1, "it is no regular file"),
        (["--session", "a", "--ctx", "64"], 2, "--ctx is for --file or for sizes"),
        (["--cache", "pqo4"], 2, "are for a model that reads --file"),
        (["--session", "a", "--threads", "1"], 2, "are for a model that reads --file"),
        (["--calibration", "off"], 2, "are for a model that reads --file"),
        (["-f", __file__, "--calibration", "missing.gguf"], 1, "calibration missing.gguf does not exist"),
        (["-f", "/dev/null"], 1, "/dev/null is empty"),
    ],
)
def test_inspect_mistakes(tqgguf: Command, args: list[str], status: int, said: str) -> None:
    done = tqgguf("inspect", MODEL, *args)
    assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_a_pipe_is_not_waited_for(tqgguf: Command, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = tqgguf("inspect", MODEL, "--session", "pipe", timeout=20)
    assert done.returncode == 1 and "cannot read the session pipe: it is no regular file" in done.stderr


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize("width", [500, 1200])
def test_a_page_in_a_browser(tqgguf: Command, text: Path, tmp_path: Path, width: int) -> None:
    page, picture = tmp_path / "r.html", tmp_path / "r.png"
    tqgguf("inspect", MODEL, "-f", str(text), "--ctx", "256", "--threads", "1", "--html", str(page))
    # Nothing may be wider than the window, on a telephone either.
    script = "<script>document.title = [document.documentElement.scrollWidth, innerWidth].join('/')</script>"
    page.write_text(page.read_text().replace("</body>", script + "</body>"))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    options += [f"--window-size={width},1500", f"--screenshot={picture}", "--dump-dom", f"file://{page}"]
    done = subprocess.run(["chromium", *options], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"<title>(\d+)/(\d+)</title>", done.stdout)
    assert found and int(found[1]) <= int(found[2])


# ---- doctor ----


def test_doctor_has_a_line_for_each_finding_where_it_is_piped(tqgguf: Command) -> None:
    done = tqgguf("doctor", env={"COLUMNS": "40"})
    assert all(line.startswith("ok  ") for line in done.stdout.splitlines()) and len(done.stdout.splitlines()) == 13


def test_doctor_with_a_model(tqgguf: Command, random_model: Callable[..., Path]) -> None:
    done = tqgguf("doctor", MODEL, "--cache-k", "pqo4", "--cache-v", "q8_0")
    assert done.returncode == 0, done.stdout
    out = " ".join(done.stdout.split())
    assert "layers 0-3, pqo4/q8_0: tiled, because only K is of a type of tqgguf" in out
    data = json.loads(tqgguf("doctor", MODEL, "--json").stdout)
    assert data["ok"] and data["attention"]["paths"][0]["decode"] == "fused"
    assert {check["name"] for check in data["checks"]} >= {"libllama", "libggml-base", "libggml-cpu", "cpu", "cuda"}
    assert all("ours; build id" in check["detail"] for check in data["checks"] if check["name"].startswith("libggml"))
    done = tqgguf("doctor", str(random_model(head_dim=80)))
    assert done.returncode == 1 and "WRONG" in done.stdout and "head_dim of K is 80" in " ".join(done.stdout.split())
    done = tqgguf("doctor", "missing.gguf")
    assert done.returncode == 1 and "does not exist" in done.stderr


def test_doctor_finds_libraries_of_others(tqgguf: Command, tmp_path: Path) -> None:
    data = json.loads(tqgguf("doctor", "--json", env={"LLAMA_CPP_LIB_PATH": str(tmp_path)}).stdout)
    wrong = {check["name"]: check["detail"] for check in data["checks"] if not check["ok"]}
    assert not data["ok"] and str(tmp_path) in wrong["llama_cpp"] and "not loaded" in wrong["libllama"]


def test_doctor_finds_a_cuda_library_that_cannot_be_used(tqgguf: Command, tmp_path: Path) -> None:
    library = tmp_path / "libtqgguf_cuda.so"
    library.write_bytes(b"no library")
    data = json.loads(tqgguf("doctor", "--json", env={"TQGGUF_CUDA_LIB": str(library)}).stdout)
    (wrong,) = (check for check in data["checks"] if not check["ok"])
    assert not data["ok"] and wrong["name"] == "cuda" and str(library) in wrong["detail"]


def test_doctor_tells_of_calibrations(tqgguf: Command, tmp_path: Path) -> None:
    def told(**env: str) -> tuple[bool, str]:
        data = json.loads(tqgguf("doctor", "--json", env=env).stdout)
        (check,) = (check for check in data["checks"] if check["name"] == "calibrations")
        return check["ok"], check["detail"]

    folder = tmp_path / "tqgguf" / "calibrations"
    assert told(XDG_CACHE_HOME=str(tmp_path)) == (True, f"off by default; 0 kept in {folder}")
    folder.mkdir(parents=True)
    (folder / "one.gguf").touch()
    choice = {"XDG_CACHE_HOME": str(tmp_path), "TQGGUF_CALIBRATION": "auto"}
    assert told(**choice) == (True, f"auto by default; 1 kept in {folder}")
    ok, detail = told(TQGGUF_CALIBRATION="never")
    assert not ok and 'must be "auto" or "off"' in detail


def test_doctor_finds_stock_libraries(python: Callable[..., Any], tmp_path: Path) -> None:
    code = """
from tqgguf.diagnostics import installation
installation._MARKS["llama"] = b"no library has this\\0"
print([check.detail for check in installation.installation().checks if not check.ok])
"""
    done = python("-c", code)
    assert "without the patches of tqgguf: reinstall" in done.stdout, done.stderr


def test_doctor_compares_ggml_with_the_processor(python: Callable[..., Any], tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from tqgguf.diagnostics import installation
installation._CPUINFO = Path(sys.argv[1])
installation._FLAGS["QUANTUM"] = "quantum"
(cpu,) = (check for check in installation.installation().checks if check.name == "cpu")
print("ok" if cpu.ok else "WRONG", cpu.detail)
"""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name: none\n")
    said = python("-c", code, str(cpuinfo)).stdout
    assert said.startswith("ok") and "QUANTUM" not in said
    used = set(re.findall(r"\w+", said.split("ggml uses ")[1]))
    cpuinfo.write_text(f"flags : fpu {' '.join(_FLAGS.values())} quantum\n")
    said = python("-c", code, str(cpuinfo)).stdout
    assert said.startswith("ok") and "QUANTUM, which the processor has as well" in said.split(", not ")[1]
    if "AVX" not in used:
        pytest.skip("ggml uses no AVX here, so that no processor lacks what it uses")
    cpuinfo.write_text("flags : fpu avx\n")
    said = python("-c", code, str(cpuinfo)).stdout
    lacks = said.split("this processor has no ")[1].split(": ggml was compiled for another one")[0].split(", ")
    assert said.startswith("WRONG") and set(lacks) == (used & set(_FLAGS)) - {"AVX"} and "SIGILL" in said
