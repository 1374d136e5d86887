"""The release workflow, the Makefile and the Containerfile agree, and a release is refused before it is ready."""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tqgguf.cli.commands import serve

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", MAKEFILE, re.MULTILINE))
WORKFLOW_TEXT = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
WORKFLOW: dict[Any, Any] = yaml.safe_load(WORKFLOW_TEXT)
JOBS: dict[str, dict[str, Any]] = WORKFLOW["jobs"]
INSTRUCTIONS = [
    (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1])
    for line in re.sub(r"\\\n *", "", (ROOT / "Containerfile").read_text(encoding="utf-8")).splitlines()
    if line and line[0] != "#"
]


def argument(instruction: str) -> str:
    """What follows an instruction of the Containerfile, the last time that it stands there."""
    return [rest for name, rest in INSTRUCTIONS if name == instruction][-1]


def commands() -> list[tuple[str, dict[str, Any], list[str]]]:
    """Job, step and words of each command of the workflow."""
    found = []
    for name, job in JOBS.items():
        for step in job["steps"]:
            found += [(name, step, shlex.split(line)) for line in step.get("run", "").splitlines()]
    return found


# ---- The workflow ----


def test_every_step_is_a_target_of_make() -> None:
    made = set()
    for job, _, words in commands():
        if words[:2] == ["sudo", "apt-get"]:
            continue
        assert words[0] == "make" and words[1:], (job, words)
        assert set(words[1:]) <= TARGETS, (job, words)
        made.update(words[1:])
    assert {"wheel", "wheel-arm64", "wheel-check", "image", "image-check", "release-publish"} <= made


def test_each_job_may_do_what_it_must_and_no_more() -> None:
    assert WORKFLOW["permissions"] == {}
    for name, job in JOBS.items():
        words = {word for job_name, _, line in commands() for word in line if job_name == name}
        expected = {"contents": "write" if "release-publish" in words else "read"}
        if "image-login" in words:
            expected["packages"] = "write"
        assert job["permissions"] == expected, name


def test_what_publishes_is_done_if_it_is_asked_for() -> None:
    """And after all else: `publish` needs `machine`, which needs the rest."""
    for name, step, words in commands():
        if {"image-push", "image-join", "release-publish"} & set(words):
            assert "inputs.publish" in (step.get("if"), JOBS[name].get("if")), words
    needed = {name: job.get("needs", []) for name, job in JOBS.items()}
    assert needed == {"check": [], "wheels": [], "machine": ["check", "wheels"], "publish": ["machine"]}
    assert WORKFLOW[True]["workflow_dispatch"]["inputs"]["publish"]["default"] is False


def test_actions_are_pinned_and_keep_no_credentials() -> None:
    used = re.findall(r"uses: (\S+)(.*)", WORKFLOW_TEXT)
    assert len(used) > 4
    for action, comment in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action) and re.fullmatch(r" # v[\d.]+", comment), action
    assert len({action.split("@")[0] for action, _ in used}) == len({action for action, _ in used})
    steps = [step for job in JOBS.values() for step in job["steps"] if "uses" in step]
    checkouts = [step for step in steps if step["uses"].startswith("actions/checkout@")]
    assert len(checkouts) == len(JOBS) and all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_wheels_reach_the_jobs_that_need_them() -> None:
    steps = [step for job in JOBS.values() for step in job["steps"]]
    (made,) = [step["with"] for step in steps if step.get("uses", "").startswith("actions/upload-artifact@")]
    taken = [step["with"] for step in steps if step.get("uses", "").startswith("actions/download-artifact@")]
    assert made == {"name": "wheels", "path": "dist/*.whl", "if-no-files-found": "error"}
    assert taken == [{"name": made["name"], "path": "dist"}] * 2
    assert [name for name, _, words in commands() if "wheel-arm64" in words] == ["wheels"]


def test_what_the_workflow_sets_is_what_the_recipes_read() -> None:
    named = [(job["env"], name) for name, job in JOBS.items() if "env" in job]
    named += [(step["env"], str(step)) for job in JOBS.values() for step in job["steps"] if "env" in step]
    for variables, where in named:
        for variable in variables:
            read = (f"$({variable})", f"$${variable}")
            assert variable == "GH_TOKEN" or any(word in MAKEFILE for word in read), (where, variable)
    assert len(named) > 4 and re.search(r"^\tgh release create ", MAKEFILE, re.MULTILINE)


# ---- The image ----


def test_the_image_is_made_of_files_that_are_there() -> None:
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [rest.split()[:-1] for name, rest in INSTRUCTIONS if name == "COPY" and "--from=" not in rest]
    sources = [source for sources in copied for source in sources]
    assert sorted(sources) == ["dist/", "requirements-image.txt"]
    for source in sources:
        assert any(pattern.startswith(source) for pattern in let_in), source
        assert source == "dist/" or (ROOT / source).is_file()
    (install,) = [rest for name, rest in INSTRUCTIONS if name == "RUN" and "pip install" in rest]
    assert '/tmp/dist/tqgguf-${VERSION:?}"-*_"$(uname -m)".whl' in install
    arguments = {rest.partition("=")[0] for name, rest in INSTRUCTIONS if name == "ARG"}
    assert arguments == set(re.findall(r"--build-arg (\w+)=", MAKEFILE))


def test_the_image_starts_the_server_where_it_is_looked_for() -> None:
    words = json.loads(argument("ENTRYPOINT"))
    assert words[0] == "tqgguf"
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    args = parser.parse_args([*words[1:], "model.gguf"])
    assert words[1] == "serve" and args.host == "0.0.0.0" and args.port == int(argument("EXPOSE"))
    check = json.loads(argument("HEALTHCHECK").partition("CMD ")[2])
    ast.parse(check[2])
    assert check[:2] == ["python3", "-c"] and f"'127.0.0.1', {args.port}," in check[2] and "'/health'" in check[2]


def test_the_image_runs_as_no_root() -> None:
    assert int(argument("USER")) > 1000 and f"--uid {argument('USER')} " in str(INSTRUCTIONS)
    later = [name for name, _ in INSTRUCTIONS[[name for name, _ in INSTRUCTIONS].index("USER") + 1 :]]
    assert "RUN" not in later and "COPY" not in later


@pytest.mark.parametrize("python", ["3.10", "3.13"])
def test_the_image_has_what_the_package_asks_for(python: str) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.findall(r'^    "(.+)",$', project.partition("\ndependencies = [")[2].partition("]")[0], re.MULTILINE)
    assert len(wanted) > 5
    pins = re.findall(r"^([^\s#][^\\\n]*)", (ROOT / "requirements-image.txt").read_text(), re.MULTILINE)
    environment = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
    pinned = {}
    for pin in map(Requirement, pins):
        if pin.marker is None or pin.marker.evaluate(environment):
            pinned[pin.name] = str(pin.specifier).removeprefix("==")
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


# ---- Notes and checksums ----


@pytest.fixture
def release() -> ModuleType:
    """tools/release.py."""
    spec = importlib.util.spec_from_file_location("release", ROOT / "tools/release.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A version that is ready, and an older one."""
    (tmp_path / "tqgguf").mkdir()
    (tmp_path / "tqgguf/__init__.py").write_text('"""Text."""\n__version__ = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## 0.2.0 (2030-01-02)\n\n- New.\n\n## 0.1.0 (2029-01-02)\n\nOld.\n"
    )
    (tmp_path / "dist").mkdir()
    for tags in ("manylinux_2_27_x86_64", "manylinux_2_27_aarch64"):
        (tmp_path / f"dist/tqgguf-0.2.0-py3-none-{tags}.whl").write_text(tags)
        (tmp_path / f"dist/tqgguf-0.1.0-py3-none-{tags}.whl").write_text("old")
    return tmp_path


def test_notes_and_checksums(release: ModuleType, tree: Path) -> None:
    assert release.notes(tree) == "- New.\n"
    names = [f"tqgguf-0.2.0-py3-none-manylinux_2_27_{machine}.whl" for machine in ("aarch64", "x86_64")]
    sums = [hashlib.sha256((tree / "dist" / name).read_bytes()).hexdigest() for name in names]
    assert release.sums(tree) == "".join(f"{digest}  {name}\n" for digest, name in zip(sums, names, strict=True))


def test_what_is_not_ready_is_refused(release: ModuleType, tree: Path) -> None:
    changes, (arm, *_) = tree / "CHANGELOG.md", sorted((tree / "dist").glob("*0.2.0*"))
    ready = changes.read_text()
    changes.write_text(ready.replace("2030-01-02", "unreleased"))
    with pytest.raises(ValueError, match="a release has its day there"):
        release.notes(tree)
    changes.write_text(ready.replace("## 0.2.0 (2030-01-02)", "## 0.2 (2030-01-02)"))
    with pytest.raises(ValueError, match=r"no section 0\.2\.0"):
        release.notes(tree)
    second = arm.with_name(arm.name.replace("2_27", "2_28"))
    second.write_text("another")
    with pytest.raises(ValueError, match=r"2 wheels of 0\.2\.0 for aarch64"):
        release.sums(tree)
    second.unlink()
    (tree / "dist/tqgguf-0.2.0-py3-none-macosx_11_0_arm64.whl").write_text("another")
    with pytest.raises(ValueError, match="other wheels"):
        release.sums(tree)
    (tree / "dist/tqgguf-0.2.0-py3-none-macosx_11_0_arm64.whl").unlink()
    arm.unlink()
    with pytest.raises(ValueError, match=r"0 wheels of 0\.2\.0 for aarch64"):
        release.sums(tree)
