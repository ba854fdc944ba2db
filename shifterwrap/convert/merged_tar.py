"""A tree as one tar stream for a squashfs writer: directories, then what has no content, files, hard links last.

Plain ustar headers, with a PAX header (POSIX pax, "pax Header Block") before the members that need one.
"""

from __future__ import annotations

from typing import Optional

from .tree import BLOCK, CHARACTER, DIRECTORY, FIFO, FILE, SYMLINK, Node

END = bytes(1024)
_TYPES = {FILE: b"0", SYMLINK: b"2", CHARACTER: b"3", BLOCK: b"4", DIRECTORY: b"5", FIFO: b"6"}
_NAME_BYTES = 100
_MAX_OCTAL_ID = 0o7777777
_MAX_OCTAL_SIZE = 0o77777777777


def header(path: bytes, node: Node, link: Optional[bytes] = None) -> bytes:
    """The header of ``path``; with ``link``, of a hard link to that earlier path."""
    kind = _TYPES[node.kind] if link is None else b"1"
    name = path or b"./"
    target = node.target if link is None else link
    size = node.size if kind == b"0" else 0
    records = _records(name, target, node, size, link is None)
    block = _block(name, kind, target, node, size)
    return (_pax(records) + block) if records else block


def padding(size: int) -> bytes:
    """What fills the content of a file of ``size`` bytes up to a whole number of blocks."""
    return bytes(-size % 512)


def _records(name: bytes, target: bytes, node: Node, size: int, attributes: bool) -> list[tuple[bytes, bytes]]:
    records = []
    if len(name) > _NAME_BYTES:
        records.append((b"path", name))
    if len(target) > _NAME_BYTES:
        records.append((b"linkpath", target))
    if size > _MAX_OCTAL_SIZE:
        records.append((b"size", b"%d" % size))
    if node.uid > _MAX_OCTAL_ID:
        records.append((b"uid", b"%d" % node.uid))
    if node.gid > _MAX_OCTAL_ID:
        records.append((b"gid", b"%d" % node.gid))
    if attributes and node.xattrs:
        records += [(b"SCHILY.xattr." + key, value) for key, value in sorted(node.xattrs.items())]
    return records


def _block(name: bytes, kind: bytes, target: bytes, node: Node, size: int) -> bytes:
    major, minor = node.rdev
    return _sealed(
        name, node.mode, node.uid if node.uid <= _MAX_OCTAL_ID else 0, node.gid if node.gid <= _MAX_OCTAL_ID else 0,
        size if size <= _MAX_OCTAL_SIZE else 0, node.mtime, kind, target, major, minor,
    )


def _sealed(name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, kind: bytes, target: bytes,
            major: int, minor: int) -> bytes:
    """The ustar block of these fields, its checksum filled in."""
    before = b"%b%07o\0%07o\0%07o\0%011o\0%011o\0" % (_padded(name), mode, uid, gid, size, mtime)
    after = b"%b%bustar\00000%b%07o\0%07o\0" % (kind, _padded(target), bytes(64), major, minor)
    total = sum(before) + sum(after) + 8 * 32
    return b"%b%06o\0 %b%b" % (before, total, after, bytes(167))


def _padded(text: bytes) -> bytes:
    return text[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")


def _pax(records: list[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(_record(key, value) for key, value in records)
    return _sealed(b"PaxHeaders/x", 0o644, 0, 0, len(body), 0, b"x", b"", 0, 0) + body + padding(len(body))


def _record(key: bytes, value: bytes) -> bytes:
    """One record; the decimal length in front of it counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %b=%b\n" % (length, key, value)
