"""The directory tree: the same as the squashfs image of the same layers, and nothing outside of its root."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shifterwrap.convert import tree_writer
from shifterwrap.convert.tree import DIRECTORY, FILE, SYMLINK, walk
from shifterwrap.errors import CacheFull, ConvertError
from shifterwrap.events import Event, ignore
from tests.testbed.ocilayout import device, directory, file, hardlink, pax, symlink
from tests.unit.tarbuild import archive, every_kind, image, merge, mounted, opener, status_of


def written(path: Path, *tars: bytes, policy: str = "root") -> str:
    tree = merge(*tars, policy=policy)
    digest = tree_writer.write(tree, opener(*tars), str(path), ignore)
    assert tree_writer.digest_of(str(path)) == digest
    return digest


@pytest.mark.parametrize("policy", ["root", "keep"])
def test_the_tree_is_what_the_layers_say(tmp_path: Path, policy: str) -> None:
    data = archive(*every_kind())
    written(tmp_path / "t", data, policy=policy)
    for path, node in walk(merge(data, policy=policy).root):
        status = os.lstat(os.fsencode(tmp_path / "t") + b"/" + path if path else tmp_path / "t")
        assert stat.S_IFMT(status.st_mode) == node.kind
        if node.kind == SYMLINK:
            assert os.readlink(os.fsencode(tmp_path / "t") + b"/" + path) == node.target
        elif os.geteuid() == 0:
            extra = 0o500 if stat.S_ISDIR(node.kind) else 0o400 if stat.S_ISREG(node.kind) else 0
            assert stat.S_IMODE(status.st_mode) == node.mode | extra
            assert (status.st_uid, status.st_gid) == (node.uid, node.gid)
        assert int(status.st_mtime) == node.mtime


@pytest.mark.needs("tar2sqfs", "squashfs-mount")
@pytest.mark.parametrize("policy", ["root", "keep"])
def test_tree_and_squashfs_are_equal(tmp_path: Path, policy: str) -> None:
    layers = archive(*every_kind()), archive(hardlink("other", "big"), file("same", b"changed"), symlink("n", "same"))
    written(tmp_path / "t", *layers, policy=policy)
    image(tmp_path / "i", *layers, policy=policy)
    with mounted(tmp_path / "i") as root:
        squashed, plain = status_of(root), status_of(tmp_path / "t")
    for values in (squashed, plain):  # the owner's way in, which only the tree needs
        for path, (kind, mode, *rest) in values.items():
            extra = 0o500 if kind == DIRECTORY else 0o400 if kind == FILE else 0
            values[path] = (kind, mode | extra, *rest)
    assert squashed == plain


def test_F39_the_digest_depends_only_on_the_layers(tmp_path: Path) -> None:
    data = archive(*every_kind())
    assert written(tmp_path / "1", data) == written(tmp_path / "2", data)


@pytest.mark.parametrize("damage", [
    lambda t: (t / "big").open("r+b").write(b"X"), lambda t: (t / "big").chmod(0o600), lambda t: (t / "new").touch(),
    lambda t: (t / "empty").unlink(), lambda t: (t / "usr").chmod(0o711), lambda t: t.chmod(0o711),
    lambda t: ((t / "lib").unlink(), os.symlink("usr/lib64", t / "lib")), lambda t: os.truncate(t / "zeros", 5),
    lambda t: ((t / "usr/again").unlink(), shutil.copy2(t / "usr/bin/tool", t / "usr/again")),
    lambda t: ((t / "empty").unlink(), (t / "empty").mkdir()),
    lambda t: ((t / "same").unlink(), os.link(t / "big", t / "same")),
])
def test_the_digest_changes_with_everything(tmp_path: Path, damage: object) -> None:
    digest = written(tmp_path / "t", archive(*every_kind()))
    damage(tmp_path / "t")  # type: ignore[operator]
    assert tree_writer.digest_of(str(tmp_path / "t")) != digest


def test_the_digest_ignores_times_and_owners(tmp_path: Path) -> None:
    digest = written(tmp_path / "t", archive(*every_kind()))
    os.utime(tmp_path / "t" / "big")
    if os.geteuid() == 0:
        os.chown(tmp_path / "t" / "big", 5, 5)
    assert tree_writer.digest_of(str(tmp_path / "t")) == digest


def test_F23_modes_leave_the_owner_a_way_in(tmp_path: Path) -> None:
    written(tmp_path / "t", archive(directory("d", mode=0), file("d/f", b"1", mode=0), directory("d/e", mode=0o111)),
            policy="keep")
    modes = [stat.S_IMODE((tmp_path / "t" / name).stat().st_mode) for name in ("d", "d/f", "d/e")]
    assert modes == [0o500, 0o400, 0o511]


def test_F27_holes_stay_holes(tmp_path: Path) -> None:
    sparse = pax({"GNU.sparse.map": b"1000000,4", "GNU.sparse.size": b"%d" % (100 << 20)})
    written(tmp_path / "t", archive(sparse, file("s", b"data"), file("after", b"1")))
    status = (tmp_path / "t" / "s").stat()
    assert status.st_size == 100 << 20
    assert status.st_blocks * 512 < 1 << 20
    assert (tmp_path / "t" / "s").read_bytes()[1_000_000:1_000_004] == b"data"


def test_F38_nothing_outside_of_the_root_is_touched(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    (outside / "victim").write_bytes(b"safe")
    layers = archive(symlink("up", ".."), symlink("abs", str(outside)), symlink("f", str(outside / "victim"))), archive(
        file("up/outside/victim", b"pwned"), file("abs/victim", b"pwned", mode=0o777), directory("abs", mode=0o777),
        file("f", b"own"), hardlink("link", "up/outside/victim"),
    )
    before = os.stat(outside)
    written(tmp_path / "t", *layers)
    assert (outside / "victim").read_bytes() == b"safe"
    after = os.stat(outside)
    assert (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "t"]
    assert (tmp_path / "t" / "f").read_bytes() == b"own"


def test_F37_paths_as_long_as_linux_has_them(tmp_path: Path) -> None:
    deep = "/".join(["d" * 100] * 40)
    written(tmp_path / "t", archive(file(deep + "/x", b"1"), hardlink("y", deep + "/x")))
    assert (tmp_path / "t" / "y").stat().st_nlink == 2


def test_an_existing_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(FileExistsError):
        tree_writer.write(merge(), opener(), str(tmp_path / "t"), ignore)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small file system")
@pytest.mark.parametrize("size", ["64k", "1m"])
def test_a_full_disk(tmp_path: Path, size: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", str(small)], check=True)
    try:
        with pytest.raises(CacheFull, match=f"no room left on {small}"):
            written(small / "t", archive(*(file(str(i), os.urandom(50_000)) for i in range(40))))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_damaged_layer_is_a_convert_error(tmp_path: Path) -> None:
    def open_layer(index: int) -> Iterator[bytes]:
        yield b"short"

    with pytest.raises(ConvertError, match="shorter"):
        tree_writer.write(merge(archive(file("x", b"1"))), open_layer, str(tmp_path / "t"), ignore)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_an_ordinary_user_writes_what_he_can(workspace: Path) -> None:
    data = archive(file("s", b"1", mode=0o6755, uid=5), device("null", b"3", 1, 3), hardlink("null2", "null"))
    home = workspace / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    events: list[Event] = []
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            digest = tree_writer.write(merge(data), opener(data), str(home / "t"), events.append)
            status = 0 if tree_writer.digest_of(str(home / "t")) == digest and events[0].stage == "warn" else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert os.listdir(home / "t") == ["s"]
    assert stat.S_IMODE((home / "t" / "s").stat().st_mode) == 0o755
    assert (home / "t" / "s").stat().st_uid == 65534
