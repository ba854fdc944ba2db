"""The read-back: it finds every difference, and no image, however hostile, does it any harm."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from shifterwrap.convert import readback, sqfs_reader
from shifterwrap.convert.decompress import readable
from shifterwrap.convert.tree import DIRECTORY, FILE, Node, Tree
from shifterwrap.errors import ConvertError
from shifterwrap.events import ignore
from tests.testbed.ocilayout import directory, fifo, file, hardlink, symlink
from tests.unit.tarbuild import archive, image, mounted, status_of

pytestmark = pytest.mark.needs("tar2sqfs")
SMALL = [
    directory("d", mode=0o700), file("d/x", b"some content " * 500), symlink("s", "d/x"), hardlink("h", "d/x"),
    fifo("p"), file("e"), file("r", bytes(9000)), *(file(f"many/{i}", b"%d" % i) for i in range(40)),
]


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Tree]:
    path = tmp_path / "small.sqfs"
    return path, image(path, archive(*SMALL), block_size=4096)


def check(path: Path, tree: Tree) -> None:
    readback.check(str(path), tree, 2, ignore)


@pytest.mark.parametrize(("change", "message"), [
    (lambda root: root.children.pop(b"e"), "has, and should not have, /e"),
    (lambda root: root.children.update(missing=Node(FILE)) or root.children.update({b"a": Node(FILE)}), "lacks"),
    (lambda root: setattr(root, "mode", 0o700), "differs at / in mode"),
    (lambda root: setattr(root.children[b"d"], "uid", 1), "/d in uid: 0 instead of 1"),
    (lambda root: setattr(root.children[b"e"], "mtime", 1), "/e in mtime"),
    (lambda root: setattr(root.children[b"s"], "target", b"d/y"), "/s in target"),
    (lambda root: setattr(root.children[b"e"], "size", 1), "/e in size"),
    (lambda root: setattr(root.children[b"e"], "crc", 1), "/e in content"),
    (lambda root: setattr(root.children[b"r"], "crc", 1), "/r in content"),
    (lambda root: root.children.update({b"e": root.children[b"p"]}), "/e in|/p in"),
    (lambda root: root.children.update({b"e": root.children[b"h"]}), "/h in|/e in"),
    (lambda root: root.children.update({b"p": Node(DIRECTORY)}), "/p in type: 'fifo'"),
    (lambda root: setattr(root.children[b"p"], "xattrs", {b"user.x": b""}), "/p in extended attributes"),
])
def test_every_difference_is_named(small: tuple[Path, Tree], change: object, message: str) -> None:
    path, tree = small
    children = tree.root.children
    change(tree.root)  # type: ignore[operator]
    children.pop("missing", None)  # type: ignore[call-overload]
    with pytest.raises(ConvertError, match=message):
        check(path, tree)


def test_split_hard_links_are_found(small: tuple[Path, Tree]) -> None:
    path, tree = small
    original = tree.root.children[b"h"]
    copy = Node(FILE)
    for name in original.__slots__:
        setattr(copy, name, getattr(original, name))
    tree.root.children[b"h"] = copy
    with pytest.raises(ConvertError, match="hard links"):
        check(path, tree)


@pytest.mark.parametrize("compressor", ["gzip", "zstd", "lz4"])
def test_every_flipped_byte_is_found_or_changes_nothing(tmp_path: Path, compressor: str) -> None:
    if compressor not in readable():
        pytest.skip(f"nothing here reads {compressor}")
    path = tmp_path / "image"
    tree = image(path, archive(*SMALL), block_size=4096, compressor=compressor)
    good = path.read_bytes()
    used = sqfs_reader.superblock(str(path)).bytes_used
    chosen = random.Random(3)
    harmless = []
    for at in range(used):
        for flip in (0xFF, 1 << chosen.randrange(8)):
            with path.open("r+b") as out:
                out.seek(at)
                out.write(bytes([good[at] ^ flip]))
            try:
                check(path, tree)
                harmless.append((at, flip))
            except ConvertError:
                pass
            with path.open("r+b") as out:
                out.seek(at)
                out.write(good[at : at + 1])
    different = [(at, flip) for at, flip in harmless if not is_same_to_linux(tmp_path, good, at, flip)]
    assert different == []
    assert len(harmless) < 160


def is_same_to_linux(tmp_path: Path, good: bytes, at: int, flip: int) -> bool:
    """Whether Linux, where we are root, sees the same in an image whose flipped byte the read-back let pass."""
    if os.geteuid() != 0:
        return True
    (tmp_path / "flipped").write_bytes(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
    (tmp_path / "good").write_bytes(good)
    try:
        with mounted(tmp_path / "good") as a, mounted(tmp_path / "flipped") as b:
            return status_of(a) == status_of(b)
    except subprocess.CalledProcessError:
        return False


def test_truncated_images(small: tuple[Path, Tree]) -> None:
    path, tree = small
    good = path.read_bytes()
    used = sqfs_reader.superblock(str(path)).bytes_used
    for size in [0, 4, 95, 96, 97, *range(200, used, 37), used - 1]:
        path.write_bytes(good[:size])
        with pytest.raises(ConvertError):
            check(path, tree)
    path.write_bytes(good[:used])  # the padding to 4 KiB is nobody's
    check(path, tree)


def test_hostile_images_end_in_a_clean_error(small: tuple[Path, Tree]) -> None:
    path, tree = small
    good = path.read_bytes()
    used = sqfs_reader.superblock(str(path)).bytes_used
    chosen = random.Random(11)
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(chosen.randint(1, 12)):
            at = chosen.choice([chosen.randrange(96), chosen.randrange(used)])
            bad[at : at + 4] = chosen.choice([bytes(4), b"\xff" * 4, b"\xff\xff\xff\x7f", chosen.randbytes(4)])
        path.write_bytes(bytes(bad[: len(good)]))
        try:
            check(path, tree)
        except ConvertError:
            pass


def test_a_corrupted_data_block_is_found(tmp_path: Path) -> None:
    path = tmp_path / "i"
    noise = random.Random(1).randbytes(300_000)  # stored as it is: no decompressor would notice
    tree = image(path, archive(file("noise", noise), file("tail", b"t" * 500)))
    with path.open("r+b") as out:
        out.seek(200_000)
        byte = out.read(1)
        out.seek(200_000)
        out.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ConvertError, match="/noise in content"):
        check(path, tree)


def test_a_large_directory_has_a_sound_index(tmp_path: Path) -> None:
    path = tmp_path / "i"
    tree = image(path, archive(*(file(f"d/{i:05}-{'n' * 60}") for i in range(3000))))
    with sqfs_reader.Image(str(path)) as found:
        (name,) = found.names(found.inode(found.superblock.root))
        assert found.inode(name.ref).indexes > 0
        assert len(found.names(found.inode(name.ref))) == 3000
    assert tree.names == 3002


@pytest.mark.needs("mksquashfs")
def test_images_of_mksquashfs_are_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "d").mkdir(parents=True)
    (source / "d" / "f").write_bytes(b"content" * 100_000)
    for i in range(2000):
        (source / f"{i:04}-{'n' * 50}").write_bytes(b"%d" % i)
    os.symlink("d/f", source / "s")
    for options in (["-comp", "xz"], ["-comp", "gzip", "-Xcompression-level", "1"], ["-noI", "-noD", "-noF"]):
        path = tmp_path / "i"
        subprocess.run(["mksquashfs", str(source), str(path), "-quiet", "-no-progress", "-noappend", *options],
                       check=True, stdout=subprocess.DEVNULL)
        with sqfs_reader.Image(str(path)) as found:
            from shifterwrap.convert.decompress import decompressor

            names = {name.name: name for name in found.names(found.inode(found.superblock.root))}
            assert len(names) == 2002
            (below,) = found.names(found.inode(names[b"d"].ref))
            inode = found.inode(below.ref)
            content = found.content(inode, found.block_list(inode), decompressor(found.superblock.compressor), {})
            assert b"".join(content) == b"content" * 100_000
            assert found.inode(names[b"s"].ref).target == b"d/f"


def test_superblock_of_what_is_no_image(tmp_path: Path) -> None:
    for data in (b"", b"hsqs", b"not an image" * 100, b"hsqs" + bytes(92), b"hsqs" + b"\xff" * 92):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(ConvertError, match="squashfs"):
            sqfs_reader.superblock(str(tmp_path / "x"))
