"""Short ways from tar members, as tests.testbed.ocilayout writes them, through the stages of convert."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import stat
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shifterwrap.convert import flatten, layer, readback, squashfs, tar
from shifterwrap.convert.decode import decode
from shifterwrap.convert.tree import CHARACTER, FILE, SYMLINK, Node, Tree, walk
from shifterwrap.events import ignore
from tests.testbed import ocilayout
from tests.testbed.ocilayout import Member

LETTERS = {0o100000: "f", 0o040000: "d", 0o120000: "l", 0o020000: "c", 0o060000: "b", 0o010000: "p"}


def pieces(data: bytes, size: int = 1 << 16) -> Iterator[bytes]:
    """``data`` as a download hands it on."""
    for at in range(0, len(data), size):
        yield data[at : at + size]


def archive(*members: Member, closed: bool = True) -> bytes:
    """The tar of ``members`` in GNU format, which has every kind that tests need beside raw PAX blocks."""
    return ocilayout.tar(members, format=1, closed=closed)


def read(data: bytes) -> list[tar.Member]:
    """The members of an uncompressed tar."""
    return list(tar.members(pieces(data)))


def scan(data: bytes, index: int = 0, **limits: int) -> layer.Layer:
    """The layer whose uncompressed tar is ``data``."""
    blob = gzip.compress(data, 1, mtime=0)
    budget = layer.Budget(layer.Limits(**limits), len(blob))
    return layer.scan(index, pieces(blob), f"sha256:{hashlib.sha256(data).hexdigest()}", budget)


def merge(*tars: bytes, policy: str = "keep") -> Tree:
    """The tree of these layers, bottom first."""
    return flatten.flatten([scan(data, index) for index, data in enumerate(tars)], policy)


def merged(*layers: Sequence[Member], policy: str = "keep") -> dict[str, str]:
    """What the layers, each a list of members, make: name -> kind, mode and where its content is (see shown)."""
    tars = [archive(*members) for members in layers]
    return shown(merge(*tars, policy=policy), tars)


def shown(tree: Tree, tars: Sequence[bytes]) -> dict[str, str]:
    """Each name (bytes as str) with its kind letter and octal mode, then a file's content or a symlink's target."""
    return {path.decode("utf-8", "backslashreplace"): _shown(node, tars) for path, node in walk(tree.root) if path}


def _shown(node: Node, tars: Sequence[bytes]) -> str:
    head = f"{LETTERS[node.kind]}{node.mode:o}"
    if node.kind == FILE:
        return f"{head} {content(node, tars).decode()}"
    return f"{head} {node.target.decode()}" if node.kind == SYMLINK else head


def content(node: Node, tars: Sequence[bytes]) -> bytes:
    """The content of a small file."""
    stored = tars[node.layer][node.offset : node.offset + node.stored_bytes()]
    if node.sparse is None:
        return stored
    whole = bytearray(node.size)
    for offset, length in node.sparse:
        whole[offset : offset + length], stored = stored[:length], stored[length:]
    return bytes(whole)


def names(result: dict[str, str]) -> list[str]:
    """Only the names of merged()."""
    return list(result)


def image(path: Path, *tars: bytes, policy: str = "keep", compressor: str = "gzip", **options: int) -> Tree:
    """Write and read back the squashfs image of these layers, and return its tree."""
    tree = merge(*tars, policy=policy)
    squashfs.write(tree, opener(*tars), str(path), squashfs.Options(compressor, **options), ignore)
    readback.check(str(path), tree, 2, ignore)
    return tree


def opener(*tars: bytes):  # type: ignore[no-untyped-def]
    """The open_layer of these layers, through their decoder."""
    blobs = [gzip.compress(data, 1) for data in tars]
    return lambda index: decode(pieces(blobs[index]))


def raw_header(name: bytes, kind: bytes = b"0", size: int = 0, link: bytes = b"", **fields: bytes) -> bytes:
    """One ustar header with fields as they are: mode, uid, gid, size, mtime, magic, prefix, sum override."""
    block = bytearray(512)
    block[0 : len(name)] = name
    for field, at, default in (
        ("mode", 100, b"0000644\0"), ("uid", 108, b"0000000\0"), ("gid", 116, b"0000000\0"),
        ("size", 124, b"%011o\0" % size), ("mtime", 136, b"00000000000\0"), ("magic", 257, b"ustar\00000"),
        ("major", 329, b"0000000\0"), ("minor", 337, b"0000000\0"), ("prefix", 345, b""), ("tail", 386, b""),
    ):
        value = fields.get(field, default)
        block[at : at + len(value)] = value
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[148:156] = fields.get("sum") or b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


def unsquashed(path: Path, tmp: Path) -> Path:
    """The image as unsquashfs, another implementation, extracts it."""
    target = tmp / f"unsquashed-{path.name}"
    subprocess.run(["unsquashfs", "-quiet", "-no-progress", "-d", str(target), str(path)], check=True,
                   stdout=subprocess.DEVNULL)
    return target


def status_of(root: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything below ``root`` as lstat tells it, with content."""
    result: dict[bytes, tuple[Any, ...]] = {}
    first: dict[int, bytes] = {}
    base = os.fsencode(root)
    for directory, directories, names in os.walk(base):
        for name in [b"", *names, *(d for d in directories if os.path.islink(os.path.join(directory, d)))]:
            path = os.path.join(directory, name) if name else directory
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            detail: object = b""
            if kind == FILE:
                detail = (status.st_size, zlib_crc(Path(os.fsdecode(path)).read_bytes()))
            elif kind == SYMLINK:
                detail = os.readlink(path)
            elif kind in (CHARACTER, stat.S_IFBLK):
                detail = (os.major(status.st_rdev), os.minor(status.st_rdev))
            short = path[len(base) + 1 :]
            first[status.st_ino] = min(short, first.get(status.st_ino, short))
            result[short] = (kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, int(status.st_mtime),
                             detail, status.st_ino)
    return {path: (*value[:-1], first[value[-1]]) for path, value in result.items()}


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Path]:
    """The image as Linux itself mounts it."""
    root = path.with_name(f"mounted-{path.name}")
    root.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", str(path), str(root)], check=True)
    try:
        yield root
    finally:
        subprocess.run(["umount", str(root)], check=True)


def zlib_crc(data: bytes) -> int:
    return zlib.crc32(data)


def every_kind() -> list[Member]:
    """Members of every kind, with names and sizes at the edges of the formats."""
    big = bytes(range(256)) * 1200  # more than two blocks
    return [
        ocilayout.directory("./", mode=0o755),
        ocilayout.directory("usr/bin"),
        ocilayout.file("usr/bin/tool", b"#!/bin/sh\n" * 100, mode=0o4755, uid=7, gid=8, mtime=2**32 - 1),
        ocilayout.file("empty"),
        ocilayout.file("big", big, mtime=0),
        ocilayout.file("exact", bytes(range(256)) * 512),
        ocilayout.file("zeros", bytes(300_000)),
        ocilayout.file("same", big),
        ocilayout.file("n" * 255, b"long name"),
        ocilayout.file("/".join(["deep" * 50] * 18) + "/end", b"long path"),
        ocilayout.file(b"caf\xe9\xff", b"not UTF-8"),
        ocilayout.file("with\nnewline and \\x2d", b"odd"),
        ocilayout.symlink("lib", "usr/lib"),
        ocilayout.symlink("far", "t/" * 1500),
        ocilayout.hardlink("usr/again", "usr/bin/tool"),
        ocilayout.hardlink("link-to-link", "lib"),
        ocilayout.fifo("pipe", mode=0o600),
        ocilayout.device("null", b"3", 1, 3, mode=0o666),
        ocilayout.device("disk", b"4", 4095, 2**20 - 1, mode=0o600),
        ocilayout.file("owned", b"x", uid=2**32 - 2, gid=2**21 + 5),
        ocilayout.directory("secret", mode=0),
        ocilayout.file("secret/none", b"hidden", mode=0),
        ocilayout.directory("sticky", mode=0o3777),
    ]


