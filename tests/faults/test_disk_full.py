"""A disk that is full, or out of inodes, at whatever a pull writes: a clear error, a whole cache, and then it works."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.registry import OCI_LAYER, Image, Registry, Reply, Request, Serve, assemble, digest_of
from tests.integration import ends
from tests.integration.ends import configured, refused, run
from tests.testbed.images import busybox_layer
from tests.testbed.ocilayout import file, tar
from tests.testbed.people import Person

pytestmark = pytest.mark.needs(*ends.NEEDS, "squashfs-mount")  # whoever mounts that mounts a tmpfs

SIZE = 64 << 20
PAGE = 4096
FULL = re.compile("No space left on device|no space left|no room left|are needed")
CURE = "shifterwrap gc, shifterwrap rm IMAGE"


class Disk:
    """A small file system that a user has his cache on, and a file of root's that fills the rest of it."""

    def __init__(self, path: Path, person: Person) -> None:
        self.path, self.cache, self._filler = path, path / "cache", path / "filler"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=0755", "tmpfs", path], check=True)
        self.cache.mkdir(mode=0o700)
        os.chown(self.cache, person.uid, person.gid)
        self._filler.touch()

    def fill(self, leave: int) -> None:
        """Leave that many bytes free."""
        self.free()
        filled = False
        while not filled:
            info = os.statvfs(self.path)
            with contextlib.suppress(OSError), self._filler.open("r+b") as filler:
                # refused when somebody else wrote meanwhile
                os.posix_fallocate(filler.fileno(), 0, info.f_bavail * info.f_frsize - leave)
                filled = True

    def free(self) -> None:
        os.truncate(self._filler, 0)

    def limit_inodes(self, more: int) -> None:
        """Let so many more files be made; the kernel wants 0 for no limit."""
        self._remount(f"nr_inodes={self.inodes() + more}")

    def inodes(self) -> int:
        """How many are in use."""
        info = os.statvfs(self.path)
        return info.f_files - info.f_ffree

    def unlimit(self) -> None:
        self._remount("nr_inodes=100000")

    def _remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", self.path], check=True)


@pytest.fixture
def disk(tester: Person, workspace: Path) -> Iterator[Disk]:
    path = workspace / "disk"
    path.mkdir()
    try:
        yield Disk(path, tester)
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def hub() -> Iterator[Registry]:
    with Registry() as running:
        yield running


@pytest.fixture
def user(tester: Person, disk: Disk) -> Person:
    person = configured(tester)
    return person._replace(cache=disk.cache, env={**person.env, "SHIFTERWRAP_CACHE_DIR": str(disk.cache)})


def one_layer(version: str) -> Image:
    """As ``ends.app`` in one layer, packed tighter than a squashfs of it: a pull needs more than it reserves."""
    base = busybox_layer().source
    assert isinstance(base, bytes)
    layer = tar([file("version", version.encode())])[:1024] + base  # without the end: header, data, base
    config = {"os": "linux", "architecture": "amd64", "config": {"Env": ["PATH=/bin"], "Cmd": ["cat", "/version"]},
              "rootfs": {"type": "layers", "diff_ids": [digest_of(layer)]}}  # fmt: skip
    return assemble(json.dumps(config).encode(), [gzip.compress(layer, 9)], f"{OCI_LAYER}+gzip", None)


def full(user: Person, reference: str) -> None:
    """The launch ends with the one error that a full disk has; what is visible and what was cached is sound."""
    before = ends.visible(user.cache)
    said = refused(user.run(["wrapped-run", reference]), CURE)
    assert FULL.search(said), said
    after = ends.visible(user.cache)
    assert before.items() <= after.items()
    assert {name for name in after if name.startswith("refs/")} == {name for name in before if name.startswith("refs/")}
    assert ends.unfinished(user.cache) == []


class Filling:
    """A fault: when that share of a blob is sent, the disk is filled."""

    def __init__(self, disk: Disk, share: float, leave: int) -> None:
        self._disk, self._share, self._leave = disk, share, leave

    def __call__(self, request: Request, serve: Serve) -> Reply:
        reply = serve(request)
        assert isinstance(reply.body, bytes)
        return reply._replace(body=self._filled(reply.body), length=len(reply.body))

    def _filled(self, body: bytes) -> Iterator[bytes]:
        at = int(len(body) * self._share)
        yield body[:at]
        self._disk.fill(self._leave)
        yield body[at:]


# ---- space


@pytest.mark.parametrize("pages", [0, 1, 2, 4, 6, 7, 8, 9, 16, 256])
def test_a_disk_that_is_full_from_the_beginning(user: Person, disk: Disk, hub: Registry, pages: int) -> None:
    reference = hub.add("lab/app", "1", one_layer("1"))
    disk.fill(pages * PAGE)
    full(user, reference)
    done = user.run(["shifterwrap", "pull", reference])
    assert FULL.search(refused(done, CURE, code=1, prog="shifterwrap"))
    disk.free()
    assert run(user, reference) == "1"
    ends.verified(user)


def layer_of(content: Image) -> str:
    return f"/blobs/{content.document['layers'][0]['digest']}"


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_a_disk_that_becomes_full_while_a_blob_is_written(
    user: Person, disk: Disk, hub: Registry, share: float
) -> None:
    kept = ends.kept(user, hub)
    content = one_layer("1")
    reference = hub.add("lab/app", "1", content)
    hub.fault(layer_of(content), Filling(disk, share, 0))
    full(user, reference)
    assert run(user, kept) == "kept"  # a hit needs no space
    ends.verified(user)
    disk.free()
    hub.heal()
    assert run(user, reference) == "1"


def test_a_disk_that_is_full_before_the_image_is_written(user: Person, disk: Disk, hub: Registry) -> None:
    """From what a pull reserves to what it needs, page by page at the end: the image, and the files beside it."""
    site = configured(user, compressor="gzip", compression_level=1, block_bytes="64K")
    content = one_layer("1")
    reference = hub.add("lab/app", "1", content)
    needed = pages(content.document["layers"][0]["size"]) + image_pages(site, reference)
    reserved = 2 * pages(content.document["layers"][0]["size"]) + 8
    assert reserved < needed - 8
    outcomes = []
    for leave in (reserved, (reserved + needed) // 2, *range(needed - 4, needed + 20, 4)):
        subprocess.run(["rm", "-r", *disk.cache.iterdir()], check=True)
        disk.fill(leave * PAGE)
        done = site.run(["wrapped-run", reference])
        outcomes.append(done.returncode == 0)
        if done.returncode:
            assert "no room left" in refused(done, CURE) or "no space left" in done.stderr
            assert ends.visible(user.cache) == {}
            assert ends.unfinished(user.cache) == []
        disk.free()
        assert run(site, reference) == "1"
        ends.verified(site)
    assert outcomes == sorted(outcomes)
    assert outcomes[:3] == [False] * 3
    assert outcomes[-1]


def test_a_disk_that_becomes_full_while_a_tree_is_written(user: Person, disk: Disk, hub: Registry) -> None:
    site = ends.with_trees(user)
    content = one_layer("1")
    reference = hub.add("lab/app", "1", content)
    hub.fault(layer_of(content), Filling(disk, 0.99, 1 << 20))
    full(site, reference)
    disk.free()
    hub.heal()
    assert run(site, reference) == "1"
    ends.verified(site)


def pages(size: int) -> int:
    return -(-size // PAGE)


def image_pages(user: Person, reference: str) -> int:
    """The pages that the image's squashfs takes."""
    assert run(user, reference) == "1"
    (entry,) = (user.cache / "entries").iterdir()
    return pages((entry / "image.sqsh").stat().st_size)


def test_on_a_full_disk_hits_work_and_removing_an_image_makes_room(user: Person, disk: Disk, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    reference = hub.add("lab/app", "1", one_layer("1"))
    disk.fill(0)
    assert run(user, kept) == "kept"
    full(user, reference)
    for command in (["list"], ["verify"], ["gc"], ["rm", kept]):
        done = user.run(["shifterwrap", *command])
        assert (done.returncode, done.stderr) == (0, "")
    assert ends.visible(user.cache) == {}
    assert os.statvfs(disk.path).f_bavail > 0


def test_a_pull_evicts_what_is_old_and_in_nobodys_way(user: Person, disk: Disk, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    (entry,) = (user.cache / "entries").iterdir()
    os.utime(entry / "lock", (0, 0))
    reference = hub.add("lab/app", "1", one_layer("1"))
    limited = configured(user, cache_max_bytes="3M")
    done = limited.run(["wrapped-run", reference])
    assert (done.returncode, done.stdout) == (0, "1")
    assert f"evicted {entry.name}" in done.stderr
    refused(user.run(["wrapped-run", "--pull", "never", kept]), "not cached")


def test_what_a_pull_needs_is_refused_before_anything_is_evicted_in_vain(
    user: Person, disk: Disk, hub: Registry
) -> None:
    kept = ends.kept(user, hub)
    (entry,) = (user.cache / "entries").iterdir()
    os.utime(entry / "lock", (0, 0))
    limited = configured(user, cache_max_bytes="1M")
    with ends.unharmed(user):
        done = limited.run(["wrapped-run", hub.add("lab/app", "1", one_layer("1"))])
        refused(done, "are needed", "may not be evicted", CURE)
    assert run(user, kept) == "kept"


# ---- inodes


def test_a_disk_that_runs_out_of_inodes_at_any_file(user: Person, disk: Disk, hub: Registry) -> None:
    """One more file may be made each time, until it is enough: each of them was the one that could not be made."""
    content = one_layer("1")
    reference = hub.add("lab/app", "1", content)
    failures = 0
    for more in range(1, 60):
        disk.limit_inodes(more)
        done = user.run(["wrapped-run", reference])
        if done.returncode == 0:
            break
        assert FULL.search(refused(done, CURE)), done.stderr
        assert not any(name.startswith("refs/") for name in ends.visible(user.cache))
        disk.unlimit()
        failures += 1
        # What a failed pull made for good is the layout and the locks; it makes the next one begin further on.
        subprocess.run(["rm", "-rf", *disk.cache.iterdir()], check=True)
    disk.unlimit()
    assert failures > 12
    assert run(user, reference) == "1"
    ends.swept(user)
