"""Machines that lack something: what still works there, how, and what doctor says to do about it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import BASE
from tests.integration.box import BIN, Box, boxed, configured, copied, environment, lab, published, scratch
from tests.testbed.images import BUSYBOX
from tests.testbed.ocilayout import Image, Layer, file, tar
from tests.testbed.people import Person
from tests.testbed.stock import StockedRegistry

pytestmark = pytest.mark.needs(
    "users", "registry", "userns", "squashfs-mount", "fuse", "squashfuse_ll", "tar2sqfs", "mksquashfs"
)

TOOLS = ("squashfuse_ll", "tar2sqfs", "mksquashfs", "gensquashfs", "unsquashfs")


# ---- kernels without overlay in a user namespace

# wrapped-run on a host that has no overlay, by its own probe
WITHOUT_OVERLAY = """
import sys
from shifterwrap import host, launch
probe = host.probe
host.probe = lambda *where: probe(*where)._replace(overlay=False)
sys.argv[0] = "wrapped-run"
sys.exit(launch.main())
"""
LOOK = """
hosts='-path /proc -o -path /sys -o -path /dev -o -path /tmp -o -path /var/tmp -o -path /new/deep -o -path /data/more'
find / \\( $hosts \\) -prune -o -exec stat -c '%A %N' {} + | sort
cd /data && find . -type f -exec sha256sum {} + | sort
sha256sum /bin/busybox /etc/passwd /etc/os-release
"""


@pytest.fixture(params=["swtester-squashfs", "swtester-tree", "root-squashfs", "root-tree"])
def box(request: pytest.FixtureRequest, registry: StockedRegistry, workspace: Path) -> Box:
    name, kind = request.param.split("-")
    return boxed(registry, workspace, name, kind)


def without_overlay(
    box: Box, script: str, options: tuple[str | Path, ...] = (), cwd: str = "/tmp", shell: str = "sh"
) -> subprocess.CompletedProcess[str]:
    python: list[str | Path] = [BIN / "python", "-c", WITHOUT_OVERLAY]
    return box.person.run([*python, *box.argv((shell, "-c", script), options)[1:]], cwd=cwd)


def test_a_root_of_binds_reads_as_an_overlay_does(box: Box, workspace: Path) -> None:
    """With mount points that the image has, and with some that it lacks, deep and at the top."""
    (workspace / "in").write_text("bound\n")
    file_bind = f"{workspace}/in:/data/real/beside"
    for options in ((), ("--bind", f"{workspace}:/new/deep", "--bind", f"{workspace}:/data/more", "--bind", file_bind)):
        overlay = box.out(LOOK, options=options, cwd="/tmp")
        done = without_overlay(box, LOOK, options)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == overlay.splitlines()
    assert without_overlay(box, "cat /new/deep/in /data/more/in /data/real/beside", options).stdout == "bound\n" * 3


def test_a_root_of_binds_is_read_only(box: Box, workspace: Path) -> None:
    script = """
        for path in /new /data/new /data/real/new /data/real/file /etc/new /data/deep/../new; do
            (echo x >"$path") 2>/dev/null && echo "wrote $path"
        done
        mkdir /data/made 2>/dev/null && echo made; rm /data/real/file 2>/dev/null && echo removed; true"""
    done = without_overlay(box, script, ("--bind", f"{workspace}:/data/deep", "--bind", f"{workspace}:/top"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_root_of_binds_where_the_image_has_nothing(registry: StockedRegistry, tester: Person) -> None:
    image = published(registry, "bare", [Image([Layer(tar([file("sh", BUSYBOX.read_bytes(), mode=0o755)]))], {})])
    assert tester.run(["shifterwrap", "pull", image]).returncode == 0
    done = without_overlay(Box(tester, image, "squashfs"), "echo /*; id -un", shell="/sh")
    assert (done.stderr, done.stdout) == ("", "/dev /etc /proc /sh /sys /tmp /var\nswtester\n")


# ---- tools that are not installed


class Machine(NamedTuple):
    """What is there, and what follows from it for an ordinary user."""

    tools: tuple[str, ...]
    kind: str
    warning: str
    doctor: Mapping[str, str]


SQUASHFUSE = {"squashfuse_ll": "install the package squashfuse"}
WRITER = {"squashfs writer": "install squashfs-tools-ng, or squashfs-tools 4.6 or newer"}
WARNING = "caching a directory tree instead"
MACHINES = {
    "everything": Machine(TOOLS, "squashfs", "", {}),
    "tar2sqfs only": Machine(("squashfuse_ll", "tar2sqfs"), "squashfs", "", {}),
    "no squashfuse_ll": Machine(TOOLS[1:], "tree", "", SQUASHFUSE),
    "no writer": Machine(("squashfuse_ll", "unsquashfs"), "tree", WARNING, WRITER),
    "nothing": Machine((), "tree", "", {**SQUASHFUSE, **WRITER}),
}


def toolbox(person: Person, tools: tuple[str, ...]) -> Mapping[str, str]:
    """The environment of a machine that has these tools only."""
    place = person.home.parent / "tools"
    place.mkdir()
    for name in tools:
        found = shutil.which(name)
        assert found is not None
        (place / name).symlink_to(found)
    return configured(person, f"tool_path: {place}\n")


def findings(person: Person, env: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What doctor finds to complain about; nothing of it may be a failure."""
    done = person.run(["shifterwrap", "doctor", "--json"], env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return {row["subject"]: row for row in json.loads(done.stdout) if row["level"] != "ok"}


@pytest.mark.parametrize("name", MACHINES)
def test_machines_without_some_tools(name: str, registry: StockedRegistry, tester: Person) -> None:
    machine = MACHINES[name]
    env = toolbox(tester, machine.tools)
    box = Box(tester, published(registry, "lab", lab()), machine.kind)
    cold = box.run("cat", "/data/real/file", env=env)
    assert (cold.returncode, cold.stdout) == (0, "of the image\n"), cold.stderr
    assert ("warning: " in cold.stderr, machine.warning in cold.stderr) == (bool(machine.warning), True)
    warm = box.run("cat", "/data/real/file", env=env)
    assert (warm.stdout, warm.stderr) == ("of the image\n", "")
    assert [row.kind for row in box.rows()] == [machine.kind]
    found = findings(tester, env)
    assert {subject: row["level"] for subject, row in found.items()} == dict.fromkeys(machine.doctor, "warn")
    for subject, words in machine.doctor.items():
        assert words in found[subject]["hint"]
        assert "cached as directory trees" in found[subject]["detail"]


def test_root_without_a_writer(registry: StockedRegistry, root: Person) -> None:
    """Root mounts by a loop device and needs no squashfuse_ll, but nobody writes a squashfs file without a tool."""
    env = toolbox(root, ())
    box = Box(root, published(registry, "lab", lab()), "tree")
    cold = box.run("cat", "/data/real/file", env=env)
    assert (cold.stdout, WARNING in cold.stderr) == ("of the image\n", True)
    assert [row.kind for row in box.rows()] == ["tree"]
    assert set(findings(root, env)) == set(WRITER)


def test_an_entry_that_cannot_be_mounted_any_more(registry: StockedRegistry, workspace: Path) -> None:
    """The package squashfuse was removed: the squashfs file is left alone, and the image is cached once more."""
    box = boxed(registry, workspace, "swtester", "squashfs")
    env = toolbox(box.person, TOOLS[1:])
    assert box.run("cat", "/data/real/file", env=env).stdout == "of the image\n"
    assert sorted(row.kind for row in box.rows()) == ["squashfs", "tree"]
    registry.forget()
    assert box.out("cat /data/real/file") == "of the image\n"
    assert registry.requests() == []


# ---- /dev/fuse that users may not open


@pytest.fixture
def closed_fuse(workspace: Path) -> list[str | Path]:
    """What to start a command with, so that only root may open its /dev/fuse."""
    null = workspace / "fuse"
    null.touch(0o600)
    script = 'mount --bind "$0" /dev/fuse && exec "$@"'
    return ["unshare", "--mount", "sh", "-ec", script, null]


def test_no_fuse_device_for_users(
    registry: StockedRegistry, tester: Person, closed_fuse: list[str | Path]
) -> None:
    identity = ["setpriv", f"--reuid={tester.uid}", f"--regid={tester.gid}", "--clear-groups"]

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*closed_fuse, *identity, *words], env=tester.env, cwd=tester.home, text=True,
                              capture_output=True, check=False)

    image = published(registry, "lab", lab())
    argv = ["wrapped-run", "--runtime", "embedded", image, "cat", "/data/real/file"]
    cold = run(*argv)
    assert (cold.returncode, cold.stdout) == (0, "of the image\n"), cold.stderr
    assert run(*argv).stderr == ""
    assert [row.kind for row in Box(tester, image, "tree").rows()] == ["tree"]
    rows = {row["subject"]: row for row in json.loads(run("shifterwrap", "doctor", "--json").stdout)}
    assert rows["/dev/fuse"]["level"] == "warn"
    assert "chmod 666 /dev/fuse" in rows["/dev/fuse"]["hint"]


# ---- Python packages that are not installed


@pytest.fixture(scope="module")
def slow() -> Iterator[Path]:
    """The programs of an installation without the extra `fast`."""
    with scratch(BASE) as place:
        copied(place / "copy")
        yield environment(place / "venv", place / "copy", without=("isal", "zstandard"))


def test_without_the_fast_packages(slow: Path, registry: StockedRegistry, tester: Person) -> None:
    image = published(registry, "lab", lab())
    run = tester.run([slow / "wrapped-run", "--runtime", "embedded", image, "cat", "/data/real/file"])
    assert (run.returncode, run.stdout) == (0, "of the image\n"), run.stderr
    (document,) = json.loads(tester.run([slow / "shifterwrap", "inspect", "--json", image]).stdout)
    assert (document["kind"], document["record"]["compressor"]) == ("squashfs", "gzip")
    done = tester.run([slow / "shifterwrap", "doctor", "--json"])
    rows = {row["subject"]: row for row in json.loads(done.stdout) if row["level"] != "ok"}
    assert done.returncode == 0
    assert set(rows) == {"Python package isal", "Python package zstandard"}
    assert {row["hint"] for row in rows.values()} == {"pip install shifterwrap[fast]"}


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python has zstd itself")
def test_zstd_layers_without_zstandard(slow: Path, registry: StockedRegistry, tester: Person) -> None:
    done = tester.run([slow / "shifterwrap", "pull", registry.image("zstd")])
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert "zstd" in last
    assert "shifterwrap[fast]" in last or "zstandard" in last
    assert json.loads(tester.run([slow / "shifterwrap", "list", "--json"]).stdout) == []


def test_a_compressor_that_is_not_there(slow: Path, tester: Person, registry: StockedRegistry) -> None:
    """Chosen by the site: said, and not silently replaced by another one."""
    env = configured(tester, "compressor: zstd\n")
    done = tester.run([slow / "shifterwrap", "pull", registry.image("busybox")], env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert "zstd" in done.stderr.splitlines()[-1], done.stderr
    assert Box(tester, "", "").rows() == []
