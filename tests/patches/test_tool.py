"""patches/tool.py on a small upstream of its own: fetching, applying, exporting, checking, reporting; and the table in
the real README."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

PATCHES = Path(__file__).parents[2] / "patches"
LINES = [f"line {i}\n" for i in range(1, 41)]
HEADER = "Subject.\n\nWhat: x\nWhy not in native/: x\nRelies on: x\nTested by: x\n\n"


class Project:
    """A directory of patches, the sdist they are for, and a work tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.patches = root / "patches"
        self.work = root / "build" / "upstream"
        self.patches.mkdir()
        self.tree = {"ggml/include/ggml.h": "".join(LINES), "src/other.c": "".join(LINES), "README.md": "hello\n"}
        self.sdist = root / "thing-1.0.tar.gz"
        self.write_sdist(self.sdist, self.tree)
        self.write_pin(hashlib.sha256(self.sdist.read_bytes()).hexdigest())
        (self.patches / "README.md").write_text("<!-- table: begin -->\n<!-- table: end -->\n")
        (self.patches / "series").write_text("# two\n0001-first.patch\n0002-second.patch\n")
        (self.patches / "0001-first.patch").write_text(HEADER)
        (self.patches / "0002-second.patch").write_text(HEADER)
        self.apply()
        self.edit("ggml/include/ggml.h", "line 20\n", "line 20\nadded by first\n")
        self.run("export", "--into", "0001")
        self.edit("ggml/include/ggml.h", "added by first\n", "added by first\nadded by second\n")
        self.edit("src/other.c", "line 3\n", "line three\n")
        self.run("export", "--into", "0002")

    def write_sdist(self, path: Path, tree: dict[str, str]) -> None:
        files = {f"thing-1.0/vendor/llama.cpp/{name}": text for name, text in tree.items()}
        files["thing-1.0/llama_cpp/__init__.py"] = "bindings = True\n"
        files["thing-1.0/LICENSE.md"] = "licence\n"
        files["thing-1.0/vendor/llama.cpp/.git"] = "gitdir: elsewhere\n"
        with tarfile.open(path, "w:gz") as archive:
            for name, text in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))

    def write_pin(self, sha256: str, max_lines: int = 10) -> None:
        (self.patches / "upstream.toml").write_text(
            f'package = "thing"\nversion = "1.0"\nsha256 = "{sha256}"\nsubdir = "vendor/llama.cpp"\nggml = "1"\n'
            f"max_lines = {max_lines}\n"
        )

    def run(self, *arguments: str, status: int = 0, upstream: Path | None = None) -> str:
        done = subprocess.run(
            [
                sys.executable,
                str(PATCHES / "tool.py"),
                "--patches",
                str(self.patches),
                "--work",
                str(self.work),
                *arguments,
            ],
            env={**os.environ, "TQGGUF_UPSTREAM": str(upstream or self.sdist)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def apply(self, *arguments: str, status: int = 0) -> str:
        return self.run("apply", *arguments, status=status)

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.work / "llama.cpp" / name
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    def snapshot(self) -> dict[str, tuple[bytes, int]]:
        return {
            str(path.relative_to(self.work)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in self.work.rglob("*")
            if path.is_file()
        }

    def series(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.patches.glob("*.patch")}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_apply_unpacks_source_bindings_and_licence_but_no_git_link(project: Project) -> None:
    assert "added by first\nadded by second\n" in (project.work / "llama.cpp/ggml/include/ggml.h").read_text()
    assert (project.work / "llama_cpp/__init__.py").read_text() == "bindings = True\n"
    assert (project.work / "LICENSE.md").read_text() == "licence\n"
    assert not (project.work / "llama.cpp/.git").exists()


def test_apply_twice_touches_no_file(project: Project) -> None:
    before = project.snapshot()
    assert "up to date" in project.apply()
    assert project.snapshot() == before
    project.apply("--force")
    assert {n: t for n, (_, t) in project.snapshot().items() if not n.startswith(".tqgguf")} == {
        n: t for n, (_, t) in before.items() if not n.startswith(".tqgguf")
    }


def test_stock_is_upstream_with_no_patch_or_the_named_ones(project: Project) -> None:
    header = project.work / "llama.cpp/ggml/include/ggml.h"
    project.apply("--stock")
    assert header.read_text() == project.tree["ggml/include/ggml.h"]
    project.apply("--stock", "0001")
    assert "added by first\nline 21\n" in header.read_text()
    assert (project.work / "llama.cpp/src/other.c").read_text() == project.tree["src/other.c"]


def test_changing_one_patch_rewrites_only_the_files_whose_contents_change(project: Project) -> None:
    before = project.snapshot()
    patch = project.patches / "0002-second.patch"
    patch.write_text(patch.read_text().replace("line three", "line 3, changed"))
    project.apply()
    changed = {name for name, value in project.snapshot().items() if before[name] != value}
    assert changed == {"llama.cpp/src/other.c", ".tqgguf-stamp.json"}


def test_rewording_a_header_touches_no_file(project: Project) -> None:
    before = project.snapshot()
    patch = project.patches / "0001-first.patch"
    patch.write_text(patch.read_text().replace("Subject.", "Another subject."))
    project.apply()
    assert project.snapshot() == before


def test_export_without_edits_is_byte_equal(project: Project) -> None:
    before = project.series()
    assert "nothing changed" in project.run("export")
    assert project.series() == before
    assert b"@@ -18,6 +18,7 @@" in before["0001-first.patch"]
    assert b"@@ -19,6 +19,7 @@" in before["0002-second.patch"]


def test_an_edit_goes_to_the_last_patch_of_the_file_or_to_the_one_named(project: Project) -> None:
    before = project.series()
    project.edit("ggml/include/ggml.h", "line 30\n", "line thirty\n")
    assert "0002" in project.run("export")
    assert project.series()["0001-first.patch"] == before["0001-first.patch"]
    project.edit("ggml/include/ggml.h", "line 10\n", "line ten\n")
    assert "0001" in project.run("export", "--into", "0001")
    assert b"+line ten" in project.series()["0001-first.patch"]
    assert b"line ten" not in project.series()["0002-second.patch"]
    tree = project.snapshot()["llama.cpp/ggml/include/ggml.h"][0]
    shutil.rmtree(project.work)
    project.apply()
    assert project.snapshot()["llama.cpp/ggml/include/ggml.h"][0] == tree
    project.run("check", status=0)


def test_an_edit_of_a_file_in_no_patch_needs_a_patch_named(project: Project) -> None:
    project.edit("README.md", "hello\n", "goodbye\n")
    assert "say which one it belongs to with --into" in project.run("export", status=1)


def test_apply_does_not_overwrite_edits_of_the_work_tree(project: Project) -> None:
    project.edit("src/other.c", "line 7\n", "line seven\n")
    patch = project.patches / "0002-second.patch"
    patch.write_text(patch.read_text().replace("line three", "LINE 3"))
    assert "edits that are not in the series (llama.cpp/src/other.c)" in project.apply(status=1)
    project.apply("--force")
    assert "line seven" not in (project.work / "llama.cpp/src/other.c").read_text()


def test_a_wrong_hash_names_both_hashes_and_unpacks_nothing(project: Project) -> None:
    expected = "0" * 64
    found = hashlib.sha256(project.sdist.read_bytes()).hexdigest()
    project.write_pin(expected)
    shutil.rmtree(project.work)
    message = project.apply(status=1)
    assert f"SHA-256 is {found}, expected {expected}" in message
    assert len(message.strip().splitlines()) == 1
    assert not project.work.exists()


def test_an_upstream_that_does_not_exist_is_one_sentence(project: Project) -> None:
    missing = project.root / "nothing.tar.gz"
    message = project.run("apply", "--force", upstream=missing, status=1)
    assert f"TQGGUF_UPSTREAM names {missing}, which does not exist" in message


def test_a_series_that_does_not_apply_names_patch_file_and_hunk(project: Project) -> None:
    patch = project.patches / "0002-second.patch"
    patch.write_text(patch.read_text().replace(" line 21", " line twenty-one"))
    before = project.snapshot()
    message = project.apply(status=1)
    assert "error: 0002-second.patch: ggml/include/ggml.h: hunk 1 (@@ -19,6 +19,7 @@" in message
    assert "does not apply" in message
    assert project.snapshot() == before


def test_a_patch_cut_short_is_an_error(project: Project) -> None:
    patch = project.patches / "0002-second.patch"
    patch.write_text("".join(patch.read_text().splitlines(keepends=True)[:-2]))
    assert "0002-second.patch: hunk 1" in project.apply(status=1)


def test_check_passes_and_finds_what_is_wrong(project: Project) -> None:
    assert "in order" in project.run("check")
    project.write_pin(hashlib.sha256(project.sdist.read_bytes()).hexdigest(), max_lines=3)
    assert "changes 4 lines, its budget is 3" in project.run("check", status=1)
    project.write_pin(hashlib.sha256(project.sdist.read_bytes()).hexdigest())
    patch = project.patches / "0001-first.patch"
    text = patch.read_text()
    patch.write_text(text.replace("@@ -18,6 +18,7 @@", "@@ -19,6 +19,7 @@"))
    assert "0001-first.patch: applies only with an offset" in project.run("check", status=1)
    patch.write_text(
        text.replace("+added by first\n", "-line 21\n+added by first\n+line 21\n").replace(" line 21\n", "")
    )
    assert "re-export is not byte-equal" in project.run("check", status=1)
    patch.write_text(text.replace("Tested by: x\n", ""))
    assert "its header lacks 'Tested by:'" in project.run("check", status=1)
    patch.write_text(text)
    (project.patches / "0003-stray.patch").write_text(HEADER)
    assert "0003-stray.patch: not listed in series" in project.run("check", status=1)


def test_report_tells_clean_offset_and_failure_apart(project: Project) -> None:
    moved = project.root / "moved.tar.gz"
    broken = project.root / "broken" / "vendor" / "llama.cpp"
    shifted = {**project.tree, "ggml/include/ggml.h": "new\nnew\n" + "".join(LINES)}
    project.write_sdist(moved, shifted)
    for name, text in project.tree.items():
        (broken / name).parent.mkdir(parents=True, exist_ok=True)
        (broken / name).write_text(text.replace("line 4\n", "line four\n") if name == "src/other.c" else text)
    assert project.run("report", str(project.sdist)).count("clean") == 2
    assert project.run("report", str(moved)).count("offset +2") == 2
    text = project.run("report", str(moved), str(broken.parents[1]), status=1)
    assert "FAIL" in text
    assert "0002-second.patch: src/other.c: hunk 1" in text


def test_usage_errors_have_status_two(project: Project) -> None:
    project.run("frobnicate", status=2)
    project.run("report", status=2)


def test_the_real_readme_table_and_line_budget_are_current(tmp_path: Path) -> None:
    copy = tmp_path / "patches"
    shutil.copytree(PATCHES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tool; from pathlib import Path; p = Path(sys.argv[1]);"
        "series = tool.read_series(p); pin = tool.read_pin(p / 'upstream.toml');"
        "assert (p / 'README.md').read_text() == tool.readme_with_table(p), 'run: python patches/tool.py export';"
        "lines = sum(sum(patch.lines_changed()) for patch in series);"
        "assert 0 < lines <= pin.max_lines, lines;"
        "assert all(f in patch.header for patch in series for f in tool.HEADER_FIELDS)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
