"""The read-back before a commit: an image holds exactly the tree that it was written from, or it is thrown away.

Squashfs tools have written wrong images without saying so; this is what finds out, whatever the tool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ..errors import ConvertError
from ..events import Emit, Event
from .accelerators import crc32
from .decompress import damaged, decompressor
from .sqfs_reader import Image, Inode, Name
from .tree import DIRECTORY, FILE, KIND_NAMES, Node, Tree, show, walk

_BATCH_BYTES = 16 << 20
_BATCH_FILES = 1000
_SURPLUS_NAMES = 1000  # that a directory may have before it is not read on to name the first
_HINT = "nothing was cached; the squashfs writer or this machine's memory or disk is at fault: shifterwrap doctor"


class _File(NamedTuple):
    path: bytes
    node: Node
    inode: Inode
    blocks: bytes


def check(path: str, tree: Tree, threads: int, emit: Emit) -> None:
    """Compare the image at ``path`` with ``tree``, content included; ConvertError names the first difference.

    ``threads`` decompress at once (1..). The nodes' ``crc`` were set when the image was written.
    """
    try:
        with Image(path) as image:
            _compare(image, tree, threads, emit)
    except ConvertError as exc:
        raise ConvertError(exc.message, _HINT) from None


def _compare(image: Image, tree: Tree, threads: int, emit: Emit) -> None:
    files = _Comparison(image, tree).files()
    total = sum(node.size for _, node, _, _ in files)
    done = 0
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="read-back") as pool:
        waiting = [pool.submit(_compare_content, image, batch) for batch in _batches(files)]
        try:
            for future in waiting:
                done += future.result()
                emit(Event("verify", "", done, total))
        finally:
            for future in waiting:
                future.cancel()


class _Comparison:
    """The image's names and inodes against the tree's."""

    def __init__(self, image: Image, tree: Tree) -> None:
        self._image = image
        self._tree = tree
        self._links = Counter(node for _, node in walk(tree.root) if node.kind != DIRECTORY)
        self._refs: dict[int, Node] = {}
        self._seen: dict[Node, int] = {}
        self._files: list[_File] = []

    def files(self) -> list[_File]:
        """Every file, each inode once, when everything but content is equal."""
        root = self._image.inode(self._image.superblock.root)
        self._same_inode(b"", self._tree.root, root)
        pending = [(b"", self._tree.root, root)]
        inodes = 1
        while pending:
            path, node, inode = pending.pop()
            names = self._image.names(inode, len(node.children) + _SURPLUS_NAMES)
            self._same_names(path, node, names)
            for name in names:
                inodes += self._visit(path + b"/" + name.name if path else name.name, node.children[name.name], name,
                                      inode, pending)
        if inodes != self._image.superblock.inodes:
            raise damaged(f"{self._image.superblock.inodes} inodes instead of {inodes}")
        return self._files

    def _same_names(self, path: bytes, node: Node, names: list[Name]) -> None:
        if [name.name for name in names] == sorted(node.children):
            return
        difference = min({name.name for name in names} ^ node.children.keys())
        what = "lacks" if difference in node.children else "has, and should not have,"
        raise ConvertError(f"the image {what} {show(path + b'/' + difference if path else difference)}")

    def _visit(self, path: bytes, node: Node, name: Name, parent: Inode,
               pending: list[tuple[bytes, Node, Inode]]) -> int:
        """Compare one name and return how many inodes it adds."""
        if name.ref in self._refs or node in self._seen:
            if self._refs.get(name.ref) is not node or node.kind == DIRECTORY or self._seen[node] != name.number:
                raise _differs(path, "hard links")
            return 0
        self._refs[name.ref], self._seen[node] = node, name.number
        inode = self._image.inode(name.ref)
        if (name.kind, name.number) != (inode.kind, inode.number):
            raise _differs(path, "the inode of its name")
        self._same_inode(path, node, inode)
        if node.kind == DIRECTORY:
            if inode.parent != parent.number:
                raise _differs(path, "its parent")
            pending.append((path, node, inode))
        elif inode.links != self._links[node]:
            raise _differs(path, "hard links", inode.links, self._links[node])
        if node.kind == FILE:
            self._files.append(_File(path, node, inode, self._image.block_list(inode)))
        return 1

    def _same_inode(self, path: bytes, node: Node, inode: Inode) -> None:
        if inode.kind != node.kind:
            raise _differs(path, "type", KIND_NAMES[inode.kind], KIND_NAMES[node.kind])
        for field in ("mode", "uid", "gid", "mtime", "target", "rdev"):
            if getattr(inode, field) != getattr(node, field):
                raise _differs(path, field, getattr(inode, field), getattr(node, field))
        if node.kind == FILE and inode.size != node.size:
            raise _differs(path, "size", inode.size, node.size)
        if self._image.attributes(inode) != (node.xattrs or {}):
            raise _differs(path, "extended attributes")


def _differs(path: bytes, what: str, found: object = None, wanted: object = None) -> ConvertError:
    detail = "" if found is None else f": {found!r} instead of {wanted!r}"
    return ConvertError(f"the image differs at {show(path)} in {what}{detail}")


def _batches(files: list[_File]) -> Iterator[list[_File]]:
    """``files`` in the order in which the image holds them, in runs of similar work; neighbours share fragments."""
    batch: list[_File] = []
    size = 0
    for file in sorted(files, key=lambda file: (file.inode.fragment, file.inode.start)):
        batch.append(file)
        size += file.node.size
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_FILES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _compare_content(image: Image, batch: list[_File]) -> int:
    decompress = decompressor(image.superblock.compressor)
    memo: dict[int, bytes] = {}
    size = 0
    for path, node, inode, blocks in batch:
        crc = 0
        for piece in image.content(inode, blocks, decompress, memo):
            crc = crc32(piece, crc)
        if crc != node.crc:
            raise _differs(path, "content")
        size += node.size
    return size
