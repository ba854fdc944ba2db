"""Squashfs 4.0 read back, by a reader that trusts nothing in the file: every offset, size and count is checked first.

Format: Documentation/filesystems/squashfs.rst and fs/squashfs/squashfs_fs.h of Linux. No size that the file claims is
allocated before it was compared with a bound; nothing recurses; whatever is wrong is a
:class:`~shifterwrap.errors.ConvertError`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Optional

from .decompress import Decompress, damaged, decompressor
from .sqfs_tables import NONE, Cursor, Metadata, Superblock, Xattrs, check_options, read_superblock, read_table
from .tree import BLOCK, CHARACTER, DIRECTORY, FIFO, FILE, MAX_NAME, MAX_PATH, SOCKET, SYMLINK

MAX_NAMES = 5_000_000  # in one directory, unless the caller knows better

_NO_FRAGMENT = _NO_XATTR = 2**32 - 1
_STORED_RAW = 1 << 24  # of a data block's size: it is not compressed
_KINDS = (DIRECTORY, FILE, SYMLINK, BLOCK, CHARACTER, FIFO, SOCKET)  # inode types 1..7, and 8..14 extended


class Inode:
    """One inode of an image. ``start`` and ``offset`` say where its directory list or its block list is."""

    __slots__ = ("fragment", "fragment_offset", "gid", "indexes", "kind", "links", "mode", "mtime", "number", "offset",
                 "parent", "position", "rdev", "size", "start", "target", "uid", "xattr")

    def __init__(self, kind: int, mode: int, uid: int, gid: int, mtime: int, number: int) -> None:
        self.kind, self.mode, self.uid, self.gid, self.mtime, self.number = kind, mode, uid, gid, mtime, number
        self.links = 1
        self.size = self.start = self.offset = self.fragment_offset = self.indexes = self.parent = 0
        self.fragment = _NO_FRAGMENT
        self.position = (0, 0)  # in the inode table, behind the fixed part: block list or directory index
        self.target = b""
        self.rdev = (0, 0)
        self.xattr = _NO_XATTR


class Name(NamedTuple):
    """One entry of a directory; ``ref`` locates the inode."""

    name: bytes
    ref: int
    kind: int
    number: int


def superblock(path: str) -> Superblock:
    """The superblock of the image at ``path``, plausible in itself and against the file's size, else ConvertError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_superblock(fd, path)
    finally:
        os.close(fd)


class Image:
    """An open image. Inodes, names and attributes are for one thread; :meth:`content` is for many."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.superblock = sb = read_superblock(self._fd, path)
            self._decompress = decompressor(sb.compressor)
            check_options(self._fd, sb)
            end = sb.bytes_used
            self._xattrs = None
            if sb.xattr_table != NONE:
                self._xattrs = Xattrs(self._fd, sb, self._decompress)
                end = self._xattrs.start
            raw, end = read_table(self._fd, sb.id_table, sb.ids, 4, end, self._decompress)
            self._ids = [word for (word,) in struct.iter_unpack("<I", raw)]
            if sb.export_table != NONE:
                _, end = read_table(self._fd, sb.export_table, sb.inodes, 8, end, self._decompress)
            raw = b""
            if sb.fragments:
                raw, end = read_table(self._fd, sb.fragment_table, sb.fragments, 16, end, self._decompress)
            self._fragments = list(struct.iter_unpack("<QII", raw))
            self._inodes = Metadata(self._fd, sb.inode_table, sb.directory_table, self._decompress)
            self._lists = Metadata(self._fd, sb.directory_table, end, self._decompress)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Image:
        return self

    def __exit__(self, kind: Optional[type[BaseException]], exc: object, trace: Optional[TracebackType]) -> None:
        os.close(self._fd)

    # ---- inodes

    def inode(self, ref: int) -> Inode:
        """The inode at ``ref`` (block << 16 | offset in it)."""
        head, block, offset = self._inodes.read(ref >> 16, ref & 0xFFFF, 16)
        kind, mode, uid, gid, mtime, number = struct.unpack("<HHHHII", head)
        if not 1 <= kind <= 14 or mode > 0o7777 or max(uid, gid) >= len(self._ids):
            raise damaged("an inode makes no sense")
        inode = Inode(_KINDS[(kind - 1) % 7], mode, self._ids[uid], self._ids[gid], mtime, number)
        layout, fill = _LAYOUTS[kind]
        raw, block, offset = self._inodes.read(block, offset, layout.size)
        fill(inode, layout.unpack(raw))
        inode.position = (block, offset)
        if inode.kind == SYMLINK:
            self._read_target(inode, kind == 10)
        return inode

    def _read_target(self, inode: Inode, extended: bool) -> None:
        if not 0 < inode.size <= MAX_PATH:
            raise damaged("a symlink has an impossible length")
        inode.target, block, offset = self._inodes.read(*inode.position, inode.size)
        if extended:
            inode.xattr = int.from_bytes(self._inodes.read(block, offset, 4)[0], "little")

    def block_list(self, inode: Inode) -> bytes:
        """The stored sizes of a file's blocks, 32 bits each; the caller has found its size acceptable."""
        size = self.superblock.block_size
        if inode.fragment != _NO_FRAGMENT and inode.size % size == 0:
            raise damaged("a fragment of a file without a tail")  # Linux refuses it too
        whole = inode.size // size if inode.fragment != _NO_FRAGMENT else -(-inode.size // size)
        return self._inodes.read(*inode.position, 4 * whole)[0]

    def attributes(self, inode: Inode) -> dict[bytes, bytes]:
        """The extended attributes of an inode."""
        if inode.xattr == _NO_XATTR:
            return {}
        if self._xattrs is None:
            raise damaged("an attribute without a table")
        return self._xattrs.read(inode.xattr)

    # ---- directories

    def names(self, directory: Inode, at_most: int = MAX_NAMES) -> list[Name]:
        """The entries of a directory: sorted, each name once, as Linux' own look-up relies on."""
        cursor = Cursor(self._lists, directory.start, directory.offset, directory.size - 3)
        found: list[Name] = []
        runs: dict[int, tuple[int, bytes]] = {}  # the offset of each header: its block, its first name
        while cursor.left > 0:
            at, block = directory.size - 3 - cursor.left, cursor.block_here()
            count, start, base = struct.unpack("<III", cursor.take(12))
            if count >= 256 or len(found) > at_most:
                raise damaged("a directory makes no sense")
            first = len(found)
            found += [self._name(cursor, start, base) for _ in range(count + 1)]
            runs[at] = (block, found[first].name)
        names = [entry.name for entry in found]
        if any(left >= right for left, right in zip(names, names[1:])):
            raise damaged("a directory is not sorted")
        self._check_indexes(directory, runs)
        return found

    def _name(self, cursor: Cursor, start: int, base: int) -> Name:
        offset, delta, kind, length = struct.unpack("<HhHH", cursor.take(8))
        if not 1 <= kind <= 7 or length >= MAX_NAME + 1:
            raise damaged("a directory entry makes no sense")
        name = cursor.take(length + 1)
        if b"/" in name or b"\0" in name or name in (b".", b".."):
            raise damaged("a directory has an impossible name")
        return Name(name, start << 16 | offset, _KINDS[kind - 1], base + delta & 0xFFFFFFFF)

    def _check_indexes(self, directory: Inode, runs: dict[int, tuple[int, bytes]]) -> None:
        """A directory's index, by which Linux finds names in long ones, must point at what is there."""
        position = [*directory.position]
        for _ in range(directory.indexes):
            raw, *position = self._inodes.read(position[0], position[1], 12)
            at, block, length = struct.unpack("<III", raw)
            if length >= MAX_NAME + 1:
                raise damaged("a directory index makes no sense")
            name, *position = self._inodes.read(position[0], position[1], length + 1)
            if runs.get(at) != (block, name):
                raise damaged("a directory index points nowhere")

    # ---- content

    def content(self, inode: Inode, blocks: bytes, decompress: Decompress, memo: dict[int, bytes]) -> Iterator[bytes]:
        """The content of a file, block by block. ``memo`` keeps the last fragment between calls of one thread."""
        block_size = self.superblock.block_size
        at, left = inode.start, inode.size
        for (word,) in struct.iter_unpack("<I", blocks):
            expected = min(left, block_size)
            stored = word & (_STORED_RAW - 1)
            yield self._data(at, word, expected, decompress) if stored else bytes(expected)
            at += stored
            left -= expected
        if inode.fragment != _NO_FRAGMENT:
            end = inode.fragment_offset + left
            whole = memo.get(inode.fragment)
            if whole is None:
                memo.clear()
                whole = memo[inode.fragment] = self._fragment(inode.fragment, decompress)
            if end > len(whole):
                raise damaged("a fragment is too short")
            yield whole[inode.fragment_offset : end]

    def _fragment(self, number: int, decompress: Decompress) -> bytes:
        if number >= len(self._fragments):
            raise damaged("a fragment lies outside of its table")
        start, word, _ = self._fragments[number]
        return self._data(start, word, 0, decompress)

    def _data(self, at: int, word: int, expected: int, decompress: Decompress) -> bytes:
        """The data block at ``at``; of exactly ``expected`` bytes unless that is 0."""
        stored = word & (_STORED_RAW - 1)
        limit = self.superblock.block_size
        if word >= 2 * _STORED_RAW or stored > limit or at + stored > self.superblock.inode_table:
            raise damaged("a block lies outside of its place")
        data = os.pread(self._fd, stored, at)
        if len(data) < stored:
            raise damaged("it is truncated")
        if not word & _STORED_RAW:
            data = decompress(data, limit)
        if expected and len(data) != expected:
            raise damaged("a block has the wrong length")
        return data


# ---- what follows the head of an inode, by its type


def _basic_directory(inode: Inode, fields: tuple[int, ...]) -> None:
    inode.start, inode.links, inode.size, inode.offset, inode.parent = fields


def _extended_directory(inode: Inode, fields: tuple[int, ...]) -> None:
    inode.links, inode.size, inode.start, inode.parent, inode.indexes, inode.offset, inode.xattr = fields


def _basic_file(inode: Inode, fields: tuple[int, ...]) -> None:
    inode.start, inode.fragment, inode.fragment_offset, inode.size = fields


def _extended_file(inode: Inode, fields: tuple[int, ...]) -> None:
    inode.start, inode.size, _, inode.links, inode.fragment, inode.fragment_offset, inode.xattr = fields


def _symlink(inode: Inode, fields: tuple[int, ...]) -> None:
    inode.links, inode.size = fields


def _device(inode: Inode, fields: tuple[int, ...]) -> None:
    inode.links, number, *xattr = fields
    inode.rdev = (number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00)  # new_decode_dev() of linux/kdev_t.h
    inode.xattr = xattr[0] if xattr else _NO_XATTR


def _pipe(inode: Inode, fields: tuple[int, ...]) -> None:
    inode.links, *xattr = fields
    inode.xattr = xattr[0] if xattr else _NO_XATTR


_LAYOUTS = {
    1: (struct.Struct("<IIHHI"), _basic_directory), 8: (struct.Struct("<IIIIHHI"), _extended_directory),
    2: (struct.Struct("<IIII"), _basic_file), 9: (struct.Struct("<QQQIIII"), _extended_file),
    3: (struct.Struct("<II"), _symlink), 10: (struct.Struct("<II"), _symlink),
    4: (struct.Struct("<II"), _device), 11: (struct.Struct("<III"), _device),
    5: (struct.Struct("<II"), _device), 12: (struct.Struct("<III"), _device),
    6: (struct.Struct("<I"), _pipe), 13: (struct.Struct("<II"), _pipe),
    7: (struct.Struct("<I"), _pipe), 14: (struct.Struct("<II"), _pipe),
}
