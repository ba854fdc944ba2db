"""host.py: the facts of a machine, from directories that stand for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from shifterwrap import host
from shifterwrap.host import Host

FACTS = Host(uid=2001, gid=2001, squashfuse="/usr/bin/squashfuse_ll", fuse=True, loop=False, overlay=True,
             full_capabilities=False, tool_path="/usr/bin")


@pytest.mark.parametrize(
    ("changes", "mounts"),
    [
        ({}, True),
        ({"fuse": False}, False),
        ({"squashfuse": ""}, False),
        ({"loop": True, "squashfuse": ""}, False),
        ({"uid": 0, "loop": True, "squashfuse": "", "fuse": False}, True),
        ({"uid": 0, "loop": False, "squashfuse": ""}, False),
    ],
)
def test_who_mounts_squashfs(changes: dict[str, Any], mounts: bool) -> None:
    assert FACTS._replace(**changes).mounts_squashfs is mounts


def program(path: Path, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    path.chmod(mode)
    return path


def test_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = program(tmp_path / "a" / "tool", 0o644)
    second = program(tmp_path / "b" / "tool")
    (tmp_path / "c" / "tool").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "b")
    assert host.which("tool", f"/nonexistent:{first.parent}:{tmp_path}/c:{second.parent}") == str(second)
    assert host.which("tool", f"{first.parent}:{tmp_path}/c") == ""
    assert host.which("tool", "") == ""
    assert host.which("tool", ".:::b") == ""  # the current directory is nobody's tool directory


def test_runtime_programs(tmp_path: Path) -> None:
    path = str(tmp_path)
    assert [host.runtime_program(name, path) for name in host.RUNTIME_PROGRAMS] == ["", ""]
    singularity = program(tmp_path / "singularity")
    assert host.runtime_program("apptainer", path) == str(singularity)
    apptainer = program(tmp_path / "apptainer")
    assert host.runtime_program("apptainer", path) == str(apptainer)
    assert host.runtime_program("charliecloud", path) == ""
    assert host.runtime_program("charliecloud", f"{path}:{program(tmp_path / 'x' / 'ch-run').parent}") != ""


@pytest.mark.parametrize(
    ("release", "numbers"),
    [("6.1.0-18-amd64", (6, 1)), ("4.18.0-513.el8.x86_64", (4, 18)), ("5.14", (5, 14)), ("6.6-rc1", (6, 6))],
)
def test_kernel(release: str, numbers: tuple[int, int]) -> None:
    assert host.kernel(release) == numbers


def test_kernel_of_this_machine() -> None:
    assert os.uname().release.startswith("{}.{}".format(*host.kernel()))


@pytest.mark.parametrize(
    ("release", "uid", "overlay"), [("5.10.0", 2001, False), ("5.11.0", 2001, True), ("4.18.0", 0, True)]
)
def test_overlay(release: str, uid: int, overlay: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "kernel", lambda: tuple(map(int, release.split(".")[:2])))
    assert host._overlay(uid) is overlay


def proc(root: Path, bounding: str, last: str) -> str:
    (root / "self").mkdir()
    (root / "sys" / "kernel").mkdir(parents=True)
    (root / "self" / "status").write_text(f"Name:\tx\n{bounding}Seccomp:\t0\n")
    (root / "sys" / "kernel" / "cap_last_cap").write_text(last)
    return str(root)


@pytest.mark.parametrize(
    ("bounding", "last", "full"),
    [
        ("CapBnd:\t000001ffffffffff\n", "40\n", True),
        ("CapBnd:\t000001fffffffffe\n", "40\n", False),
        ("CapBnd:\t00000000a80425fb\n", "40\n", False),
        ("", "40\n", False),
        ("CapBnd:\tnonsense\n", "40\n", False),
        ("CapBnd:\t000001ffffffffff\n", "", False),
    ],
)
def test_full_capabilities(tmp_path: Path, bounding: str, last: str, full: bool) -> None:
    assert host._full_capabilities(proc(tmp_path, bounding, last)) is full


def test_full_capabilities_without_proc(tmp_path: Path) -> None:
    assert host._full_capabilities(str(tmp_path)) is False


def test_probe_looks_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_BUNDLED", (str(tmp_path / "bundled"),))
    empty = host.probe(str(tmp_path / "tools"), str(tmp_path), str(tmp_path))
    assert (empty.squashfuse, empty.fuse, empty.loop, empty.full_capabilities) == ("", False, False, False)
    assert (empty.uid, empty.gid, empty.tool_path) == (os.getuid(), os.getgid(), str(tmp_path / "tools"))
    bundled = program(tmp_path / "bundled" / "squashfuse_ll")
    for name in ("fuse", "loop-control"):
        program(tmp_path / name)
    full = host.probe(str(tmp_path / "tools"), str(tmp_path), str(tmp_path))
    assert (full.squashfuse, full.fuse, full.loop) == (str(bundled), True, os.getuid() == 0)
    own = program(tmp_path / "tools" / "squashfuse_ll")
    assert host.probe(str(tmp_path / "tools")).squashfuse == str(own)
