"""What an image unpacks to, told by a tool that is not ours, and trees in a form that can be compared.

The oracle is `umoci unpack`, run as root. umoci 0.4.7 refuses some of what the catalogue holds: Docker's media types,
zstd, an index of several platforms, and old GNU sparse files. `expected` gives it the same content in a form it reads.
It also gets one thing wrong: a directory keeps the time at which a parent that no layer mentions was made in it, so
directories of "implicit-parents" cannot be compared by mtime.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.testbed.images import BUILDERS
from tests.testbed.ocilayout import Image, Layer, write_layout


def oracle(layout: str | Path, tag: str, out: str | Path) -> Path:
    """Have umoci unpack `tag` of a layout into the new directory `out`; return the root file system in there."""
    done = subprocess.run(
        ["umoci", "unpack", "--image", f"{layout}:{tag}", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"umoci cannot unpack {layout}:{tag}: {done.stdout}")
    return Path(out) / "rootfs"


def oracle_of(images: list[Image], out: str | Path, platform: str = "linux/amd64") -> Path:
    """The root file system of one platform's image, whatever its compression and media types are."""
    image = next(image for image in images if image.platform == platform)
    plain = Image([Layer(layer.source) for layer in image.layers], image.config, image.platform)
    with tempfile.TemporaryDirectory() as layout:
        write_layout(layout, [plain])
        return oracle(layout, "1", out)


def expected(name: str, out: str | Path) -> Path:
    """The root file system that the catalogue's image `name` must become, unpacked in the new directory `out`."""
    stored_otherwise = {"sparse-gnu": "sparse"}
    return oracle_of(BUILDERS[stored_otherwise.get(name, name)](), out)


class Node(NamedTuple):
    """All that lstat and reading tell of one path."""

    type: str
    mode: int
    uid: int
    gid: int
    mtime: int | None
    size: int
    target: bytes
    sha256: str
    device: tuple[int, int]
    group: bytes
    xattrs: tuple[tuple[str, bytes], ...]


TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFSOCK: "socket",
}


def tree(root: str | Path, directory_mtimes: bool = True) -> dict[bytes, Node]:
    """Everything below `root`, itself as b".", by path.

    `group` is the first path, in order, of the files that are one inode, b"" for a file with one name. Directories that
    no layer mentions have the mtime of their making, so `directory_mtimes` can be left out.
    """
    top = os.fsencode(root)
    paths = sorted(_walk(top))
    found = {path: os.lstat(os.path.join(top, path)) for path in paths}
    groups: dict[tuple[int, int], list[bytes]] = {}
    for path, status in found.items():
        groups.setdefault((status.st_dev, status.st_ino), []).append(path)
    nodes = {}
    for path, status in found.items():
        names = groups[status.st_dev, status.st_ino]
        node = _node(os.path.join(top, path), status)
        mtime = None if node.type == "directory" and not directory_mtimes else node.mtime
        nodes[path] = node._replace(mtime=mtime, group=names[0] if len(names) > 1 else b"")
    return nodes


def _walk(top: bytes) -> Iterator[bytes]:
    yield b"."
    for parent, directories, files in os.walk(top):
        for name in directories + files:
            yield os.path.relpath(os.path.join(parent, name), top)


def _node(path: bytes, status: os.stat_result) -> Node:
    kind = TYPES[stat.S_IFMT(status.st_mode)]
    regular = kind == "file"
    node = kind in ("char", "block")
    names = _xattr_names(path)
    return Node(
        type=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime=status.st_mtime_ns // 10**9,
        size=status.st_size if regular else 0,
        target=os.readlink(path) if kind == "symlink" else b"",
        sha256=_sha256(path) if regular else "",
        device=(os.major(status.st_rdev), os.minor(status.st_rdev)) if node else (0, 0),
        group=b"",
        xattrs=tuple((n, os.getxattr(path, n, follow_symlinks=False)) for n in names),
    )


def _xattr_names(path: bytes) -> list[str]:
    try:
        return sorted(os.listxattr(path, follow_symlinks=False))
    except OSError as error:
        if error.errno == errno.ENOTSUP:  # a squashfs without any
            return []
        raise


def _sha256(path: bytes) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def differences(expected: dict[bytes, Node], actual: dict[bytes, Node]) -> list[str]:
    """One line for each path and field in which two trees differ, for assertions that explain themselves."""
    lines = [f"missing: {path!r}" for path in expected if path not in actual]
    lines += [f"unexpected: {path!r}" for path in actual if path not in expected]
    for path in expected.keys() & actual.keys():
        for field in Node._fields:
            was, now = getattr(expected[path], field), getattr(actual[path], field)
            if was != now:
                lines.append(f"{path!r}: {field} {now!r}, should be {was!r}")
    return sorted(lines)
