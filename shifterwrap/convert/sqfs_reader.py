"""Squashfs 4.0 read back, by a reader that trusts nothing in the file: every offset, size and count is checked first.

Format: Documentation/filesystems/squashfs.rst and fs/squashfs/squashfs_fs.h of Linux. No size that the file claims is
allocated before it was compared with a bound; nothing recurses; whatever is wrong is a ConvertError.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Optional

from ..errors import ConvertError
from .decompress import Decompress, decompressor
from .tree import BLOCK, CHARACTER, DIRECTORY, FIFO, FILE, MAX_NAME, MAX_PATH, SOCKET, SYMLINK

MAX_NAMES = 20_000_000  # that a walk visits: directories may share their lists, so the file's size is no bound

_COMPRESSORS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
_SUPERBLOCK = struct.Struct("<4sIIIIHHHHHHQQQQQQQQ")
_MAGIC = b"hsqs"
_NONE = 2**64 - 1  # the start of a table that is not there
_NO_FRAGMENT = _NO_XATTR = 2**32 - 1
_METADATA_BYTES = 8192
_STORED_RAW = 1 << 24  # of a data block's size: it is not compressed
_RAW_METADATA = 1 << 15  # of a metadata block's size: it is not compressed
_HAS_OPTIONS = 1 << 10  # of the flags
_KINDS = (DIRECTORY, FILE, SYMLINK, BLOCK, CHARACTER, FIFO, SOCKET)  # inode types 1..7, and 8..14 extended
_XATTR_SPACES = {0: b"user.", 1: b"trusted.", 2: b"security."}
_CACHED_BLOCKS = 2048  # of metadata, 8 KiB each, in each table


class Superblock(NamedTuple):
    """What the first 96 bytes say; offsets and sizes in bytes, ``mkfs_time`` in seconds."""

    inodes: int
    mkfs_time: int
    block_size: int
    fragments: int
    compressor: str
    flags: int
    ids: int
    version: tuple[int, int]
    root: int
    bytes_used: int
    id_table: int
    xattr_table: int
    inode_table: int
    directory_table: int
    fragment_table: int
    export_table: int


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
        return _superblock(fd, path)
    finally:
        os.close(fd)


def _superblock(fd: int, path: str) -> Superblock:
    raw = os.pread(fd, _SUPERBLOCK.size, 0)
    if len(raw) < _SUPERBLOCK.size or raw[:4] != _MAGIC:
        raise ConvertError(f"{path} is not a squashfs image")
    (_, inodes, mkfs_time, block_size, fragments, compressor, block_log, flags, ids, major, minor, *places) = (
        _SUPERBLOCK.unpack(raw)
    )
    found = Superblock(inodes, mkfs_time, block_size, fragments, _COMPRESSORS.get(compressor, f"number {compressor}"),
                       flags, ids, (major, minor), *places)
    size = os.fstat(fd).st_size
    tables = (found.inode_table, found.directory_table, found.id_table)
    optional = (found.fragment_table, found.export_table, found.xattr_table)
    if (
        (major, minor) != (4, 0)
        or not 12 <= block_log <= 20
        or block_size != 1 << block_log
        or not _SUPERBLOCK.size <= found.bytes_used <= size
        or not ids
        or not _SUPERBLOCK.size <= found.inode_table < found.directory_table <= found.id_table < found.bytes_used
        or any(place >= found.bytes_used for place in tables)
        or any(place != _NONE and not found.directory_table <= place < found.bytes_used for place in optional)
    ):
        raise ConvertError(f"{path} is a damaged squashfs image: its superblock makes no sense")
    return found


class _Metadata:
    """A run of metadata blocks from ``start`` to below ``end``: each at most 8 KiB, with a two-byte header."""

    def __init__(self, fd: int, start: int, end: int, decompress: Decompress) -> None:
        self._fd, self._start, self._end, self._decompress = fd, start, end, decompress
        self._blocks: dict[int, tuple[bytes, int]] = {}

    def read(self, block: int, offset: int, count: int) -> tuple[bytes, int, int]:
        """``count`` bytes from ``offset`` in the block at ``block``, and where the next byte is."""
        data, following = self._block(block)
        if offset + count <= len(data):
            return data[offset : offset + count], block, offset + count
        parts, missing = [], count
        while True:
            part = data[offset : offset + missing]
            missing -= len(part)
            parts.append(part)
            if not missing:
                return b"".join(parts), block, offset + len(part)
            if offset > len(data) or len(data) < _METADATA_BYTES:
                raise ConvertError("the image is damaged: a table ends too early")
            block, offset = following, 0
            data, following = self._block(block)

    def following(self, block: int) -> int:
        """Where the block after the one at ``block`` is."""
        return self._block(block)[1]

    def _block(self, block: int) -> tuple[bytes, int]:
        known = self._blocks.get(block)
        if known is None:
            if len(self._blocks) >= _CACHED_BLOCKS:
                self._blocks.clear()
            known = self._blocks[block] = self._load(block)
        return known

    def _load(self, block: int) -> tuple[bytes, int]:
        at = self._start + block
        header = os.pread(self._fd, 2, at) if self._start <= at <= self._end - 3 else b""
        word = int.from_bytes(header, "little")
        size = word & (_RAW_METADATA - 1)
        if len(header) < 2 or not 0 < size <= _METADATA_BYTES or at + 2 + size > self._end:
            raise ConvertError("the image is damaged: a table lies outside of its place")
        data = os.pread(self._fd, size, at + 2)
        if len(data) < size:
            raise ConvertError("the image is truncated")
        return data if word & _RAW_METADATA else self._decompress(data, _METADATA_BYTES), block + 2 + size


class Image:
    """An open image. Inodes, names and attributes are for one thread; :meth:`content` is for many."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.superblock = sb = _superblock(self._fd, path)
            self._decompress = decompressor(sb.compressor)
            self._check_options()
            end = sb.bytes_used
            self._xattrs = None
            if sb.xattr_table != _NONE:
                self._xattrs = _Xattrs(self._fd, sb, self._decompress)
                end = self._xattrs.start
            raw, end = self._table(sb.id_table, sb.ids, 4, end)
            self._ids = [word for (word,) in struct.iter_unpack("<I", raw)]
            if sb.export_table != _NONE:
                _, end = self._table(sb.export_table, sb.inodes, 8, end)
            raw, end = self._table(sb.fragment_table, sb.fragments, 16, end) if sb.fragments else (b"", end)
            self._fragments = list(struct.iter_unpack("<QII", raw))
            self._inodes = _Metadata(self._fd, sb.inode_table, sb.directory_table, self._decompress)
            self._lists = _Metadata(self._fd, sb.directory_table, end, self._decompress)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Image:
        return self

    def __exit__(self, kind: Optional[type[BaseException]], exc: object, trace: Optional[TracebackType]) -> None:
        os.close(self._fd)

    # ---- tables

    def _check_options(self) -> None:
        """The compressor's options behind the superblock, where Linux would trip over wrong ones."""
        sb = self.superblock
        if not sb.flags & _HAS_OPTIONS:
            if sb.compressor == "lz4":
                raise ConvertError("the image is damaged: lz4 without its options")
            return
        raw = os.pread(self._fd, 10, _SUPERBLOCK.size)
        size = 4 if sb.compressor == "zstd" else 8
        if len(raw) < 10 or int.from_bytes(raw[:2], "little") != (_RAW_METADATA | size):
            raise ConvertError("the image is damaged: its compressor's options make no sense")
        if sb.compressor == "lz4" and raw[2:6] != b"\1\0\0\0":  # the version of lz4's format
            raise ConvertError("the image is damaged: an unknown version of lz4")

    def _table(self, start: int, count: int, width: int, end: int) -> tuple[bytes, int]:
        """A table of ``count`` records, and where it begins: blocks, then at ``start`` the index of their positions.

        The index ends exactly where the next table begins, at ``end``: Linux mounts no other image.
        """
        per_block = _METADATA_BYTES // width
        blocks = -(-count // per_block)
        if start == _NONE or not blocks or start + 8 * blocks != end:
            raise ConvertError("the image is damaged: a table lies outside of its place")
        index = os.pread(self._fd, 8 * blocks, start)
        positions = [position for (position,) in struct.iter_unpack("<Q", index)]
        if any(not 2 < after - at <= _METADATA_BYTES + 2 for at, after in zip(positions, [*positions[1:], start])):
            raise ConvertError("the image is damaged: a table's index makes no sense")
        table = _Metadata(self._fd, 0, start, self._decompress)
        parts = []
        for position in positions:
            parts.append(table.read(position, 0, min(count, per_block) * width)[0])
            count -= per_block
        return b"".join(parts), positions[0]

    # ---- inodes

    def inode(self, ref: int) -> Inode:
        """The inode at ``ref`` (block << 16 | offset in it)."""
        head, block, offset = self._inodes.read(ref >> 16, ref & 0xFFFF, 16)
        kind, mode, uid, gid, mtime, number = struct.unpack("<HHHHII", head)
        if not 1 <= kind <= 14 or mode > 0o7777 or max(uid, gid) >= len(self._ids):
            raise ConvertError("the image is damaged: an inode makes no sense")
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
            raise ConvertError("the image is damaged: a symlink has an impossible length")
        inode.target, block, offset = self._inodes.read(*inode.position, inode.size)
        if extended:
            inode.xattr = int.from_bytes(self._inodes.read(block, offset, 4)[0], "little")

    def block_list(self, inode: Inode) -> bytes:
        """The stored sizes of a file's blocks, 32 bits each; the caller has found its size acceptable."""
        size = self.superblock.block_size
        if inode.fragment != _NO_FRAGMENT and inode.size % size == 0:
            raise ConvertError("the image is damaged: a fragment of a file without a tail")  # Linux refuses it too
        whole = inode.size // size if inode.fragment != _NO_FRAGMENT else -(-inode.size // size)
        return self._inodes.read(*inode.position, 4 * whole)[0]

    def attributes(self, inode: Inode) -> dict[bytes, bytes]:
        """The extended attributes of an inode."""
        if inode.xattr == _NO_XATTR:
            return {}
        if self._xattrs is None:
            raise ConvertError("the image is damaged: an attribute without a table")
        return self._xattrs.read(inode.xattr)

    # ---- directories

    def names(self, directory: Inode) -> list[Name]:
        """The entries of a directory: sorted, each name once, as Linux' own look-up relies on."""
        cursor = _Cursor(self._lists, directory.start, directory.offset, directory.size - 3)
        found: list[Name] = []
        runs: dict[int, tuple[int, bytes]] = {}  # the offset of each header: its block, its first name
        while cursor.left > 0:
            at, block = directory.size - 3 - cursor.left, cursor.block_here()
            count, start, base = struct.unpack("<III", cursor.take(12))
            if count >= 256:
                raise ConvertError("the image is damaged: a directory makes no sense")
            first = len(found)
            found += [self._name(cursor, start, base) for _ in range(count + 1)]
            runs[at] = (block, found[first].name)
        names = [entry.name for entry in found]
        if any(left >= right for left, right in zip(names, names[1:])):
            raise ConvertError("the image is damaged: a directory is not sorted")
        self._check_indexes(directory, runs)
        return found

    def _name(self, cursor: _Cursor, start: int, base: int) -> Name:
        offset, delta, kind, length = struct.unpack("<HhHH", cursor.take(8))
        if not 1 <= kind <= 7 or length >= MAX_NAME + 1:
            raise ConvertError("the image is damaged: a directory entry makes no sense")
        name = cursor.take(length + 1)
        if b"/" in name or b"\0" in name or name in (b".", b".."):
            raise ConvertError("the image is damaged: a directory has an impossible name")
        return Name(name, start << 16 | offset, _KINDS[kind - 1], base + delta & 0xFFFFFFFF)

    def _check_indexes(self, directory: Inode, runs: dict[int, tuple[int, bytes]]) -> None:
        """A directory's index, by which Linux finds names in long ones, must point at what is there."""
        position = [*directory.position]
        for _ in range(directory.indexes):
            raw, *position = self._inodes.read(position[0], position[1], 12)
            at, block, length = struct.unpack("<III", raw)
            if length >= MAX_NAME + 1:
                raise ConvertError("the image is damaged: a directory index makes no sense")
            name, *position = self._inodes.read(position[0], position[1], length + 1)
            if runs.get(at) != (block, name):
                raise ConvertError("the image is damaged: a directory index points nowhere")

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
                raise ConvertError("the image is damaged: a fragment is too short")
            yield whole[inode.fragment_offset : end]

    def _fragment(self, number: int, decompress: Decompress) -> bytes:
        if number >= len(self._fragments):
            raise ConvertError("the image is damaged: a fragment lies outside of its table")
        start, word, _ = self._fragments[number]
        return self._data(start, word, 0, decompress)

    def _data(self, at: int, word: int, expected: int, decompress: Decompress) -> bytes:
        """The data block at ``at``; of exactly ``expected`` bytes unless that is 0."""
        stored = word & (_STORED_RAW - 1)
        limit = self.superblock.block_size
        if word >= 2 * _STORED_RAW or stored > limit or at + stored > self.superblock.inode_table:
            raise ConvertError("the image is damaged: a block lies outside of its place")
        data = os.pread(self._fd, stored, at)
        if len(data) < stored:
            raise ConvertError("the image is truncated")
        if not word & _STORED_RAW:
            data = decompress(data, limit)
        if expected and len(data) != expected:
            raise ConvertError("the image is damaged: a block has the wrong length")
        return data


class _Cursor:
    """A directory list being read; ``left`` bytes of it remain."""

    __slots__ = ("_block", "_metadata", "_offset", "left")

    def __init__(self, metadata: _Metadata, block: int, offset: int, left: int) -> None:
        self._metadata, self._block, self._offset, self.left = metadata, block, offset, left

    def block_here(self) -> int:
        """The block in which the next byte is."""
        if self._offset == _METADATA_BYTES:
            self._block, self._offset = self._metadata.following(self._block), 0
        return self._block

    def take(self, count: int) -> bytes:
        self.left -= count
        if self.left < 0:
            raise ConvertError("the image is damaged: a directory ends too early")
        data, self._block, self._offset = self._metadata.read(self._block, self._offset, count)
        return data


class _Xattrs:
    """The extended attributes: sets of key and value, by number."""

    def __init__(self, fd: int, superblock: Superblock, decompress: Decompress) -> None:
        at, end = superblock.xattr_table, superblock.bytes_used
        header = os.pread(fd, 16, at)
        if len(header) < 16:
            raise ConvertError("the image is truncated")
        self.start, self._count, _ = struct.unpack("<QII", header)
        index_bytes = 8 * -(-self._count // 512)
        if at + 16 + index_bytes != end or not superblock.directory_table <= self.start <= at:
            raise ConvertError("the image is damaged: the attributes lie outside of their place")
        self._index = [position for (position,) in struct.iter_unpack("<Q", os.pread(fd, index_bytes, at + 16))]
        self._ids = _Metadata(fd, 0, at, decompress)
        self._values = _Metadata(fd, self.start, at, decompress)

    def read(self, number: int) -> dict[bytes, bytes]:
        if number >= self._count or number // 512 >= len(self._index):
            raise ConvertError("the image is damaged: an attribute lies outside of its table")
        raw = self._ids.read(self._index[number // 512], number % 512 * 16, 16)[0]
        ref, count, _ = struct.unpack("<QII", raw)
        position, found = [ref >> 16, ref & 0xFFFF], {}
        if count > 4096:
            raise ConvertError("the image is damaged: too many attributes")
        for _ in range(count):
            raw, *position = self._values.read(position[0], position[1], 4)
            kind, length = struct.unpack("<HH", raw)
            name, *position = self._values.read(position[0], position[1], length)
            value, *position = self._value(position[0], position[1])
            if kind & 0x100:  # stored elsewhere: the value is a reference
                if len(value) != 8:
                    raise ConvertError("the image is damaged: an attribute makes no sense")
                elsewhere = int.from_bytes(value, "little")
                value = self._value(elsewhere >> 16, elsewhere & 0xFFFF)[0]
            if kind & 0xFF not in _XATTR_SPACES:
                raise ConvertError("the image is damaged: an attribute makes no sense")
            found[_XATTR_SPACES[kind & 0xFF] + name] = value
        return found

    def _value(self, block: int, offset: int) -> tuple[bytes, int, int]:
        raw, block, offset = self._values.read(block, offset, 4)
        length = int.from_bytes(raw, "little")
        if length > 1 << 16:
            raise ConvertError("the image is damaged: an attribute is too long")
        return self._values.read(block, offset, length)


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
