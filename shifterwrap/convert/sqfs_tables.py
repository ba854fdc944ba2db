"""The parts of a squashfs file: superblock, tables of metadata blocks, lists, attributes; each checked as it is read.

Format: Documentation/filesystems/squashfs.rst and fs/squashfs/squashfs_fs.h of Linux. No size that the file claims is
allocated before it was compared with a bound.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from .decompress import Decompress, damaged

NONE = 2**64 - 1  # the start of a table that is not there

_COMPRESSORS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
_SUPERBLOCK = struct.Struct("<4sIIIIHHHHHHQQQQQQQQ")
_MAGIC = b"hsqs"
_METADATA_BYTES = 8192
_RAW_METADATA = 1 << 15  # of a metadata block's size: it is not compressed
_HAS_OPTIONS = 1 << 10  # of the flags
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


def read_superblock(fd: int, path: str) -> Superblock:
    raw = os.pread(fd, _SUPERBLOCK.size, 0)
    if len(raw) < _SUPERBLOCK.size or raw[:4] != _MAGIC:
        raise damaged(f"{path} is not a squashfs image")
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
        or any(place != NONE and not found.directory_table <= place < found.bytes_used for place in optional)
    ):
        raise damaged(f"the superblock of {path} makes no sense")
    return found


def check_options(fd: int, sb: Superblock) -> None:
    """The compressor's options behind the superblock, where Linux would trip over wrong ones."""
    if not sb.flags & _HAS_OPTIONS:
        if sb.compressor == "lz4":
            raise damaged("lz4 without its options")
        return
    raw = os.pread(fd, 10, _SUPERBLOCK.size)
    size = 4 if sb.compressor == "zstd" else 8
    if len(raw) < 10 or int.from_bytes(raw[:2], "little") != (_RAW_METADATA | size):
        raise damaged("its compressor's options make no sense")
    if sb.compressor == "lz4" and raw[2:6] != b"\1\0\0\0":  # the version of lz4's format
        raise damaged("an unknown version of lz4")


class Metadata:
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
                raise damaged("a table ends too early")
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
            raise damaged("a table lies outside of its place")
        data = os.pread(self._fd, size, at + 2)
        if len(data) < size:
            raise damaged("it is truncated")
        return data if word & _RAW_METADATA else self._decompress(data, _METADATA_BYTES), block + 2 + size


def read_table(
    fd: int, start: int, count: int, width: int, end: int, decompress: Decompress
) -> tuple[bytes, int]:
    """A table of ``count`` records of ``width`` bytes, and where it begins: blocks, then at ``start`` their positions.

    The index ends exactly where the next table begins, at ``end``: Linux mounts no other image.
    """
    per_block = _METADATA_BYTES // width
    blocks = -(-count // per_block)
    if start == NONE or not blocks or start + 8 * blocks != end:
        raise damaged("a table lies outside of its place")
    index = os.pread(fd, 8 * blocks, start)
    positions = [position for (position,) in struct.iter_unpack("<Q", index)]
    if any(not 2 < after - at <= _METADATA_BYTES + 2 for at, after in zip(positions, [*positions[1:], start])):
        raise damaged("a table's index makes no sense")
    table = Metadata(fd, 0, start, decompress)
    parts = []
    for position in positions:
        parts.append(table.read(position, 0, min(count, per_block) * width)[0])
        count -= per_block
    return b"".join(parts), positions[0]


class Cursor:
    """A directory list being read; ``left`` bytes of it remain."""

    __slots__ = ("_block", "_metadata", "_offset", "left")

    def __init__(self, metadata: Metadata, block: int, offset: int, left: int) -> None:
        self._metadata, self._block, self._offset, self.left = metadata, block, offset, left

    def block_here(self) -> int:
        """The block in which the next byte is."""
        if self._offset == _METADATA_BYTES:
            self._block, self._offset = self._metadata.following(self._block), 0
        return self._block

    def take(self, count: int) -> bytes:
        self.left -= count
        if self.left < 0:
            raise damaged("a directory ends too early")
        data, self._block, self._offset = self._metadata.read(self._block, self._offset, count)
        return data


class Xattrs:
    """The extended attributes: sets of key and value, by number."""

    def __init__(self, fd: int, superblock: Superblock, decompress: Decompress) -> None:
        at, end = superblock.xattr_table, superblock.bytes_used
        header = os.pread(fd, 16, at)
        if len(header) < 16:
            raise damaged("it is truncated")
        self.start, self._count, _ = struct.unpack("<QII", header)
        index_bytes = 8 * -(-self._count // 512)
        if at + 16 + index_bytes != end or not superblock.directory_table <= self.start <= at:
            raise damaged("the attributes lie outside of their place")
        self._index = [position for (position,) in struct.iter_unpack("<Q", os.pread(fd, index_bytes, at + 16))]
        self._ids = Metadata(fd, 0, at, decompress)
        self._values = Metadata(fd, self.start, at, decompress)

    def read(self, number: int) -> dict[bytes, bytes]:
        if number >= self._count or number // 512 >= len(self._index):
            raise damaged("an attribute lies outside of its table")
        raw = self._ids.read(self._index[number // 512], number % 512 * 16, 16)[0]
        ref, count, _ = struct.unpack("<QII", raw)
        position, found = [ref >> 16, ref & 0xFFFF], {}
        if count > 4096:
            raise damaged("too many attributes")
        for _ in range(count):
            raw, *position = self._values.read(position[0], position[1], 4)
            kind, length = struct.unpack("<HH", raw)
            name, *position = self._values.read(position[0], position[1], length)
            value, *position = self._value(position[0], position[1])
            if kind & 0x100:  # stored elsewhere: the value is a reference
                if len(value) != 8:
                    raise damaged("an attribute makes no sense")
                elsewhere = int.from_bytes(value, "little")
                value = self._value(elsewhere >> 16, elsewhere & 0xFFFF)[0]
            if kind & 0xFF not in _XATTR_SPACES:
                raise damaged("an attribute makes no sense")
            found[_XATTR_SPACES[kind & 0xFF] + name] = value
        return found

    def _value(self, block: int, offset: int) -> tuple[bytes, int, int]:
        raw, block, offset = self._values.read(block, offset, 4)
        length = int.from_bytes(raw, "little")
        if length > 1 << 16:
            raise damaged("an attribute is too long")
        return self._values.read(block, offset, length)
