"""The values that conversion passes on: one :class:`Node` per inode and the :class:`Tree` of a whole image.

No tar, no squashfs, no file system: what a tree *is*, and the one order in which everybody walks it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import NamedTuple, Optional

# The kinds of a node are the file type bits of st_mode (inode(7)), so that os.lstat() says the same.
FILE = stat.S_IFREG
DIRECTORY = stat.S_IFDIR
SYMLINK = stat.S_IFLNK
CHARACTER = stat.S_IFCHR
BLOCK = stat.S_IFBLK
FIFO = stat.S_IFIFO
SOCKET = stat.S_IFSOCK

KIND_NAMES = {
    FILE: "file", DIRECTORY: "directory", SYMLINK: "symlink", CHARACTER: "character device",
    BLOCK: "block device", FIFO: "fifo", SOCKET: "socket",
}

MAX_PATH = 4095  # bytes of a path or link target, without the NUL: PATH_MAX of limits.h
MAX_FILE_BYTES = 1 << 50  # more than any file system of today holds in one file
MAX_NAME = 255  # bytes of one component: NAME_MAX

Regions = tuple[tuple[int, int], ...]  # the data of a sparse file: (offset in the file, length), ascending


class Node:
    """One inode; two names that share a node are hard links.

    ``mode`` is 0..0o7777, ``uid``, ``gid`` and ``mtime`` are 0..2**32-1. A file's content is ``layer``'s uncompressed
    bytes from ``offset``: ``size`` of them, or the lengths in ``sparse`` laid out over ``size`` bytes of zeros.
    ``crc`` is the CRC-32 of the content, known once it was written.
    """

    __slots__ = ("children", "crc", "gid", "kind", "layer", "mode", "mtime", "offset", "rdev", "size", "sparse",
                 "target", "uid", "xattrs")

    def __init__(self, kind: int, mode: int = 0o755, uid: int = 0, gid: int = 0, mtime: int = 0) -> None:
        self.kind = kind
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime = mtime
        self.size = 0
        self.target = b""
        self.rdev = (0, 0)
        self.xattrs: Optional[dict[bytes, bytes]] = None
        self.children: dict[bytes, Node] = {}
        self.layer = 0
        self.offset = 0
        self.sparse: Optional[Regions] = None
        self.crc = 0

    def stored_bytes(self) -> int:
        """How many bytes of the layer hold this file's content: less than ``size`` for a sparse file."""
        return self.size if self.sparse is None else sum(length for _, length in self.sparse)


class Tree(NamedTuple):
    """A whole image: what to write, and what to tell the user about it.

    ``names`` counts names (hard links each, the root too) and ``live_bytes`` the content that is read out of layers.
    """

    root: Node
    warnings: list[str]
    names: int
    live_bytes: int


def walk(root: Node) -> Iterator[tuple[bytes, Node]]:
    """Every (path, node) below ``root``, a directory before its children, names in byte order; the root is b""."""
    yield b"", root
    pending = [(b"", root)]
    while pending:
        prefix, node = pending.pop()
        below = []
        for name in sorted(node.children):
            child = node.children[name]
            path = prefix + name
            yield path, child
            if child.kind == DIRECTORY:
                below.append((path + b"/", child))
        pending += reversed(below)


def first_names(tree: Tree) -> tuple[list[tuple[bytes, Node]], list[tuple[bytes, Node, bytes]]]:
    """The tree as ([(path, node)] with each inode once, [(path, node, its first path)] for the rest), in walk order."""
    names: dict[Node, bytes] = {}
    nodes, links = [], []
    for path, node in walk(tree.root):
        first = names.setdefault(node, path) if node.kind != DIRECTORY else path
        if first is path:
            nodes.append((path, node))
        else:
            links.append((path, node, first))
    return nodes, links


def show(path: bytes) -> str:
    """``path`` for a message, absolute."""
    return "/" + path.decode("utf-8", "backslashreplace")
