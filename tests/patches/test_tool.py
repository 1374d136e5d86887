"""patches/tool.py on a small upstream of its own: fetching, applying, exporting, checking, reporting; and the tables in
the real README."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

PATCHES = Path(__file__).parents[2] / "patches"
LINES = [f"line {i}\n" for i in range(1, 41)]
MARKS = "".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in ("table", "releases"))
VERSION = {"MAJOR": 1, "MINOR": 2, "PATCH": 3}
SERIES = "# At most {} files and {} hunks.\n"
HEADER = "Subject.\n\nWhat: x\nWhy not in native/: x\nRelies on: x\nTested by: x\n\n"


class Project:
    """A directory of patches, the sdist they are for, and a work tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.patches = root / "patches"
        self.work = root / "build" / "upstream"
        self.downloads = root / "build" / "download"
        self.downloads.mkdir(parents=True)
        (self.patches / "llama.cpp").mkdir(parents=True)
        self.tree = {"ggml/include/ggml.h": "".join(LINES), "src/other.c": "".join(LINES), "README.md": "hello\n"}
        self.tree["ggml/CMakeLists.txt"] = "".join(f"set(GGML_VERSION_{p} {i})\n" for p, i in VERSION.items())
        self.sdist = root / "thing-1.0.tar.gz"
        self.write_sdist(self.sdist, self.tree)
        self.write_pin(hashlib.sha256(self.sdist.read_bytes()).hexdigest())
        (self.patches / "README.md").write_text(MARKS)
        self.write_series("0001-first.patch", "0002-second.patch")
        self.first.write_text(HEADER)
        self.second.write_text(HEADER)
        self.apply()
        self.edit("ggml/include/ggml.h", "line 20\n", "line 20\nadded by first\n")
        self.run("export", "--into", "llama.cpp/0001")
        self.edit("ggml/include/ggml.h", "added by first\n", "added by first\nadded by second\n")
        self.edit("src/other.c", "line 3\n", "line three\n")
        self.run("export", "--into", "llama.cpp/0002")

    def write_sdist(self, path: Path, tree: dict[str, str], more: dict[str, str] | None = None) -> None:
        files = {f"thing-1.0/{name}": text for name, text in (more or {}).items()}
        files |= {f"thing-1.0/vendor/llama.cpp/{name}": text for name, text in tree.items()}
        files["thing-1.0/llama_cpp/__init__.py"] = "bindings = True\n"
        files["thing-1.0/LICENSE.md"] = "licence\n"
        files["thing-1.0/vendor/llama.cpp/.git"] = "gitdir: elsewhere\n"
        with tarfile.open(path, "w:gz") as archive:
            for name, text in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))

    def write_pin(self, sha256: str) -> None:
        (self.patches / "upstream.toml").write_text(
            f'package = "thing"\nversion = "1.0"\nsha256 = "{sha256}"\nsubdir = "vendor/llama.cpp"\nggml = "1.2.3"\n'
        )

    def write_series(self, *names: str, folder: str = "llama.cpp", budget: tuple[int, int] = (2, 5)) -> None:
        (self.patches / folder).mkdir(exist_ok=True)
        (self.patches / folder / "series").write_text(SERIES.format(*budget) + "".join(f"{name}\n" for name in names))

    @property
    def first(self) -> Path:
        return self.patches / "llama.cpp" / "0001-first.patch"

    @property
    def second(self) -> Path:
        return self.patches / "llama.cpp" / "0002-second.patch"

    def run(
        self,
        *arguments: str,
        status: int = 0,
        upstream: Path | str | None = None,
        env: dict[str, str] | None = None,
    ) -> str:
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
            env={
                **os.environ,
                "TQGGUF_UPSTREAM": str(self.sdist if upstream is None else upstream),
                "TQGGUF_DOWNLOADS": str(self.downloads),
                **(env or {}),
            },
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
        return {path.name: path.read_bytes() for path in self.patches.rglob("*.patch")}


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
    project.apply("--stock", "llama.cpp/0001")
    assert "added by first\nline 21\n" in header.read_text()
    assert (project.work / "llama.cpp/src/other.c").read_text() == project.tree["src/other.c"]


def test_changing_one_patch_rewrites_only_the_files_whose_contents_change(project: Project) -> None:
    before = project.snapshot()
    patch = project.second
    patch.write_text(patch.read_text().replace("line three", "line 3, changed"))
    project.apply()
    changed = {name for name, value in project.snapshot().items() if before[name] != value}
    assert changed == {"llama.cpp/src/other.c", ".tqgguf-stamp.json"}


def test_rewording_a_header_touches_no_file(project: Project) -> None:
    before = project.snapshot()
    patch = project.first
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
    assert "0001" in project.run("export", "--into", "llama.cpp/0001")
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
    patch = project.second
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
    patch = project.second
    patch.write_text(patch.read_text().replace(" line 21", " line twenty-one"))
    before = project.snapshot()
    message = project.apply(status=1)
    assert "error: llama.cpp/0002-second.patch: llama.cpp/ggml/include/ggml.h: hunk 1 (@@ -19,6 +19,7 @@" in message
    assert "does not apply" in message
    assert project.snapshot() == before


def test_a_patch_cut_short_is_an_error(project: Project) -> None:
    patch = project.second
    patch.write_text("".join(patch.read_text().splitlines(keepends=True)[:-2]))
    assert "llama.cpp/0002-second.patch: hunk 1" in project.apply(status=1)


def test_check_passes_and_finds_what_is_wrong(project: Project) -> None:
    assert "in order" in project.run("check")
    project.write_series("0001-first.patch", "0002-second.patch", budget=(2, 2))
    assert "llama.cpp: its 2 files and 3 hunks exceed its budget of 2 and 2" in project.run("check", status=1)
    (project.patches / "llama.cpp" / "series").write_text("0001-first.patch\n0002-second.patch\n")
    assert "series does not begin with: # At most N files and N hunks" in project.run("check", status=1)
    project.write_series("0001-first.patch", "0002-second.patch")
    patch = project.first
    text = patch.read_text()
    patch.write_text(text.replace("@@ -18,6 +18,7 @@", "@@ -19,6 +19,7 @@"))
    assert "0001-first.patch: applies only with an offset of 1 lines" in project.run("check", status=1)
    patch.write_text(
        text.replace("+added by first\n", "-line 21\n+added by first\n+line 21\n").replace(" line 21\n", "")
    )
    assert "re-export is not byte-equal" in project.run("check", status=1)
    patch.write_text(text.replace("Tested by: x\n", ""))
    assert "its header lacks 'Tested by:'" in project.run("check", status=1)
    patch.write_text(text.replace("+added by first", "+" + 121 * "x"))
    second = project.second.read_text()
    project.second.write_text(second.replace(" added by first", " " + 121 * "x"))
    assert "hunk 1 (@@ -18,6 +18,7 @@ line 17) adds a line of more than 120 columns" in project.run("check", status=1)
    patch.write_text(text)
    project.second.write_text(second)
    stray = project.patches / "llama.cpp" / "fixes" / "0003-stray.patch"
    stray.parent.mkdir()
    stray.write_text(HEADER)
    assert "llama.cpp/fixes/0003-stray.patch: not listed in a series" in project.run("check", status=1)


def test_a_fix_is_a_report_that_could_be_sent_upstream(project: Project) -> None:
    fix = project.patches / "llama.cpp" / "fixes" / "0001-fix.patch"
    fix.parent.mkdir()
    project.write_series("fixes/0001-fix.patch", "0001-first.patch", "0002-second.patch", budget=(2, 4))
    fix.write_text("Subject.\n\nWhat happens: x\nTo see it: x\nCause: x\nMend: x\nTested by: x\n\n")
    project.apply()
    project.edit("src/other.c", "line 30\n", "line thirty\n")
    assert "llama.cpp/fixes/0001-fix.patch" in project.run("export", "--into", "llama.cpp/fixes/0001")
    project.run("check")
    fix.write_text(fix.read_text().replace("To see it: x\n", ""))
    assert "llama.cpp/fixes/0001-fix.patch: its header lacks 'To see it:'" in project.run("check", status=1)


def test_a_second_series_changes_the_bindings(project: Project) -> None:
    project.write_series("0001-bindings.patch", folder="bindings", budget=(1, 1))
    (project.patches / "bindings" / "0001-bindings.patch").write_text(HEADER)
    project.apply()
    module = project.work / "llama_cpp" / "__init__.py"
    module.write_text("bindings = 'ours'\n")
    assert "say which one it belongs to" in project.run("export", "--into", "llama.cpp/0001", status=1)
    assert "changed: bindings/0001-bindings.patch" in project.run("export", "--into", "bindings/0001")
    assert b"--- a/__init__.py\n+++ b/__init__.py\n" in project.series()["0001-bindings.patch"]
    project.run("check")
    shutil.rmtree(project.work)
    project.apply()
    assert module.read_text() == "bindings = 'ours'\n"
    readme = (project.patches / "README.md").read_text()
    assert "| llama.cpp, together | 2 | 3 |" in readme and "| bindings, together | 1 | 1 | 1 | 1 |" in readme


def test_only_commands_for_developers_call_git(project: Project) -> None:
    shutil.rmtree(project.work)
    project.run("apply", env={"PATH": ""})
    for command in ("check", "export", "report"):
        said = project.run(command, *([str(project.sdist)] if command == "report" else []), env={"PATH": ""}, status=1)
        assert "error: this command calls git, which is not installed" in said


def test_a_hunk_that_moved_fits_if_there_is_one_place_for_it(project: Project) -> None:
    tree = project.root / "moved"
    for name, text in project.tree.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("new\nnew\n" + text if name == "src/other.c" else text)
    assert "0002-second.patch: offset 2" in project.run("apply", upstream=tree)
    assert "line three\nline 4\n" in (project.work / "llama.cpp/src/other.c").read_text()
    (tree / "src/other.c").write_text("new\n" + project.tree["src/other.c"] * 2)
    assert "hunk 1 (@@ -1,6 +1,6 @@) does not apply" in project.run("apply", "--force", upstream=tree, status=1)


def test_report_tells_clean_offset_context_and_failure_apart(project: Project) -> None:
    moved = project.root / "moved.tar.gz"
    project.write_sdist(moved, {**project.tree, "ggml/include/ggml.h": "new\nnew\n" + "".join(LINES)})
    assert project.run("report", str(project.sdist)).count("clean") == 2
    assert project.run("report", str(moved)).count("offset 2") == 2
    for old, new, word, said in (
        ("line 5\n", "line five\n", "context 1 of 2", "Context reduced to (1/1)"),
        ("line 3\n", "line drei\n", "FAIL 1 of 2", "Rejected hunk #1"),
    ):
        tree = project.root / word.split()[0] / "vendor" / "llama.cpp"
        for name, text in project.tree.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text.replace(old, new) if name == "src/other.c" else text)
        text = project.run("report", str(moved), str(tree.parents[1]), status=1)
        assert f"| `llama.cpp/0002-second.patch` | offset 2 | {word} |" in text
        assert f"llama.cpp/0002-second.patch: llama.cpp/src/other.c: {said}" in text
    assert "| hunks to be made anew | 0 of 3 | 1 of 3 |" in text


def test_a_file_that_is_gone_upstream_fails_with_all_its_hunks(project: Project) -> None:
    gone = project.root / "gone.tar.gz"
    project.write_sdist(gone, {name: text for name, text in project.tree.items() if name != "src/other.c"})
    said = project.run("report", str(gone), status=1)
    assert "| `llama.cpp/0002-second.patch` | FAIL 1 of 2 |" in said and "No such file" in said


def test_usage_errors_have_status_two(project: Project) -> None:
    project.run("frobnicate", status=2)
    project.run("move", status=2)
    project.run("report", "--write", str(project.sdist), status=2)
    assert "nothing.tar.gz is no version, and no file" in project.run("report", "nothing.tar.gz", status=1)


def test_the_pin_moves_and_moves_back(project: Project) -> None:
    other = "".join(LINES).replace("line 3\n", "line drei\n")
    header = ("new\n" + "".join(LINES)).replace("line 17\n", "line seventeen\n").replace("line 18\n", "")
    project.write_sdist(
        project.downloads / "thing-1.1.tar.gz", {**project.tree, "ggml/include/ggml.h": header, "src/other.c": other}
    )
    shutil.copy(project.sdist, project.downloads / "thing-1.0.tar.gz")
    digest = hashlib.sha256((project.downloads / "thing-1.1.tar.gz").read_bytes()).hexdigest()
    before, pin = project.series(), (project.patches / "upstream.toml").read_text()
    said = project.run("move", "1.1", upstream="")
    assert "0001-first.patch: context 1 of 1" in said and "0002-second.patch: FAIL 1 of 2" in said
    assert f'version = "1.1"\nsha256 = "{digest}"' in (project.patches / "upstream.toml").read_text()
    assert f'"1.1" = "{digest}"' in (project.patches / "releases.toml").read_text()
    rejected = (project.work.parent / "rejects" / "llama.cpp" / "0002-second.patch").read_text()
    assert "src/other.c" in rejected and "-line 3\n+line three\n" in rejected and "ggml.h" not in rejected
    assert "added by first\nadded by second\n" in (project.work / "llama.cpp/ggml/include/ggml.h").read_text()
    project.edit("src/other.c", "line drei\n", "line three\n")
    project.run("export", "--into", "llama.cpp/0002", upstream="")
    assert project.series() != before
    project.run("check", upstream="")
    said = project.run("move", "1.0", upstream="")
    assert "FAIL 1 of 2" in said  # what was repaired for one release need not fit the other
    project.edit("src/other.c", "line 3\n", "line three\n")
    project.run("export", "--into", "llama.cpp/0002", upstream="")
    assert project.series() == before and (project.patches / "upstream.toml").read_text() == pin
    project.run("check", upstream="")


def test_move_takes_no_file_whose_hash_is_another(project: Project) -> None:
    project.write_sdist(project.downloads / "thing-1.1.tar.gz", project.tree)
    (project.patches / "releases.toml").write_text(f'"1.1" = "{"0" * 64}"\n')
    before, pin = project.series(), (project.patches / "upstream.toml").read_text()
    assert f"expected {'0' * 64}" in project.run("move", "1.1", upstream="", status=1)
    assert project.series() == before and (project.patches / "upstream.toml").read_text() == pin


def test_report_writes_the_table_of_the_recorded_releases(project: Project) -> None:
    digests = []
    for version, tree in (("0.9", {**project.tree, "src/other.c": "new\n" + "".join(LINES)}), ("1.0", project.tree)):
        path = project.downloads / f"thing-{version}.tar.gz"
        project.write_sdist(path, tree)
        digests.append(f'"{version}" = "{hashlib.sha256(path.read_bytes()).hexdigest()}"\n')
    (project.patches / "releases.toml").write_text("# oldest first\n" + "".join(digests))
    project.run("report", "--write", upstream="")
    readme = (project.patches / "README.md").read_text()
    assert "| patch | 0.9, ggml 1.2.3 | 1.0, ggml 1.2.3 |\n" in readme
    assert (
        "| `llama.cpp/0001-first.patch` | clean | clean |\n| `llama.cpp/0002-second.patch` | offset 1 | clean |\n"
        in readme
    )
    assert "| llama.cpp, together | 2 | 3 |" in readme  # the other table is as it was


def test_code_of_a_download_runs_only_if_its_hash_is_the_pinned_one(project: Project) -> None:
    served, marker = project.root / "served", project.root / "backend-ran"
    served.mkdir()
    backend = (
        f"open({str(marker)!r}, 'w')\nimport os\n"
        "def prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
        "    os.makedirs(folder + '/thing-1.0.dist-info')\n"
        "    with open(folder + '/thing-1.0.dist-info/METADATA', 'w') as file:\n"
        "        file.write('Metadata-Version: 2.1\\nName: thing\\nVersion: 1.0\\n')\n"
        "    return 'thing-1.0.dist-info'\n"
    )
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    more = {"pyproject.toml": build, "backend.py": backend}
    more["PKG-INFO"] = "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"
    sdist = served / "thing-1.0.tar.gz"
    project.write_sdist(sdist, project.tree, more)
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(served), "PIP_CONFIG_FILE": os.devnull}
    project.write_pin("0" * 64)
    said = project.run("fetch", upstream="", status=1, env=env)
    assert "pip could not download thing 1.0" in said and not marker.exists()
    assert not (project.downloads / sdist.name).exists()
    project.write_pin(hashlib.sha256(sdist.read_bytes()).hexdigest())
    assert str(project.downloads / sdist.name) in project.run("fetch", upstream="", env=env)
    assert marker.exists() and (project.downloads / sdist.name).read_bytes() == sdist.read_bytes()


def test_the_committed_table_of_releases_is_true() -> None:
    """For the releases whose sdists lie in build/download."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import json, tool, release; from pathlib import Path\n"
        "p = Path(sys.argv[1]); pin = tool.read_pin(p); there = release.read_releases(p)\n"
        "have = [v for v in there if (release.DOWNLOADS / release.replace(pin, version=v).sdist).is_file()]\n"
        "found, _ = tool.report(p, have) if have else ({}, [])\n"
        "print(json.dumps([pin.version, [*there], {k: [o.word for o in v] for k, v in found.items()}]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(PATCHES)], capture_output=True, text=True, check=True)
    pinned, versions, found = json.loads(done.stdout)
    readme = (PATCHES / "README.md").read_text()
    region = readme.split("<!-- releases: begin -->\n")[1].split("<!-- releases: end -->")[0]
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in region.splitlines())
    assert [name.split(",")[0] for name in head[1:]] == versions, "run: python patches/tool.py report --write"
    assert pinned in versions and len(versions) >= 3
    column = head.index(next(name for name in head[1:] if name.startswith(f"{pinned},")))
    assert {row[column] for row in rows[:-1]} == {"clean"}
    for name, words in found.items():
        assert [row[head.index(name)] for row in rows[:-1]] == words, "run: python patches/tool.py report --write"
    if not found:
        pytest.skip("no sdist of a recorded release in build/download")


def test_the_real_series_is_in_order() -> None:
    """Its headers, budgets, lines and table; `make check-patches` also applies and exports it."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tool; from pathlib import Path; p = Path(sys.argv[1]);"
        "series = tool.read_series(p); print(len(series)); wrong = tool.wrong_in(p, series); assert not wrong, wrong"
    )
    done = subprocess.run([sys.executable, "-c", program, str(PATCHES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len([*PATCHES.rglob("*.patch")])
