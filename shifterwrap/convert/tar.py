"""The members of a layer's tar: headers only, one pass over the decoded stream, data skipped but seen to the end.

Reads ustar, PAX and GNU tar as Go's archive/tar does, because that is what wrote and what else reads container layers:
lenient where it is lenient (no padding or end marker at the end, anything after the end marker), an error where it is
one. Numbered rules (F18, …) are those of docs and tests. What a member *does* to a tree is flatten's business.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Optional

from ..errors import ConvertError
from .tar_fields import Pax, decimal, number, number_or, parse_pax, text, xattrs
from .tar_sparse import sparse_layout
from .tar_stream import Window
from .tree import BLOCK, CHARACTER, DIRECTORY, FIFO, FILE, MAX_FILE_BYTES, MAX_NAME, MAX_PATH, SYMLINK, Regions, show

HARD_LINK = 0  # the one kind of member that is no kind of inode
MAX_TIME = 2**32 - 1  # squashfs keeps unsigned 32-bit seconds
MAX_ID = 2**32 - 1
MAX_EXTENSION_BYTES = 1 << 20  # of one PAX header, GNU long name or sparse map, as Go's maxSpecialFileSize

_KINDS = {
    b"0": FILE, b"\0": FILE, b"7": FILE, b"S": FILE, b"1": HARD_LINK, b"2": SYMLINK,
    b"3": CHARACTER, b"4": BLOCK, b"5": DIRECTORY, b"6": FIFO,
}
# name mode uid gid size mtime checksum type linkname magic+version uname+gname major minor prefix (POSIX ustar)
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_ZERO_BLOCK = bytes(512)
_OCTAL_LIMIT = 8 << 30  # the first size that a ustar header cannot say


class Member(NamedTuple):
    """One member. ``path`` is relative and normalised, b"" for the root; ``link`` is raw, a hard link's normalised.

    ``offset`` is where its data starts in the uncompressed layer; ``size`` is what the file will have; ``sparse`` are
    the (offset in the file, length) regions that are stored, None when all of it is. ``mtime`` is whole seconds,
    clamped to 0..2**32-1 (F21); ``xattrs`` are unfiltered.
    """

    path: bytes
    kind: int
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    link: bytes
    rdev: tuple[int, int]
    xattrs: Optional[dict[bytes, bytes]]
    offset: int
    sparse: Optional[Regions]


def members(stream: Iterator[bytes]) -> Iterator[Member]:
    """Every member of the tar in ``stream``, which is read to its end (F31) so that whoever hashes it sees all of it.

    ConvertError for what is not a tar, or a name, link or size that no file system could hold.
    """
    window = Window(stream)
    while (header := _next_header(window)) is not None:
        yield _member(window, header)
    window.drain()


def weight(member: Member) -> int:
    """What ``member`` counts against a limit of entries: 1, and 1 more for each 512 bytes of metadata that it keeps."""
    kept = len(member.path) + len(member.link)
    if member.xattrs:
        kept += sum(len(name) + len(value) + 64 for name, value in member.xattrs.items())
    if member.sparse:
        kept += 128 * len(member.sparse)
    return 1 + kept // 512


# ---- headers


class _Header(NamedTuple):
    """A member's header block with what the extension headers before it said."""

    block: bytes
    fields: tuple[bytes, ...]
    pax: Pax
    long_name: bytes
    long_link: bytes


def _next_header(window: Window) -> Optional[_Header]:
    """The next member's header, extension headers folded in; None at the end of the archive."""
    pax: Pax = {}
    long_name = long_link = b""
    while True:
        block = window.take(512)
        if not block:
            return None
        if len(block) < 512:
            raise ConvertError("a layer's tar ends inside a header")
        if block == _ZERO_BLOCK:
            following = window.take(512)
            if following and following != _ZERO_BLOCK[: len(following)]:
                raise ConvertError("a layer's tar has a zero block between its members")
            return None
        fields = _HEADER.unpack(block)
        _check_sum(block, fields[6])
        kind = fields[7]
        if kind in _KINDS:
            return _Header(block, fields, pax, long_name, long_link)
        data = _extension(window, fields)
        if kind == b"x":
            pax = parse_pax(data)
        elif kind == b"L":
            long_name = text(data)
        elif kind == b"K":
            long_link = text(data)
        elif kind != b"g":  # every container engine ignores global PAX headers (Go hands them out as a member)
            raise ConvertError(f"a layer's tar has a member of unknown type {kind!r}: {text(fields[0])!r}")


def _check_sum(block: bytes, field: bytes) -> None:
    # The low half of Adler-32 is 1 + the sum of the bytes modulo 65521, at a tenth of the cost of sum().
    claimed = number(field)
    if (zlib.adler32(block) - 1 - sum(field) + 256 - claimed & 0xFFFF) and not _sum_matches(block, claimed):
        raise ConvertError("a layer is not a tar, or its tar is damaged: header checksum")


def _sum_matches(block: bytes, claimed: int) -> bool:
    blanked = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(blanked)
    signed = unsigned - 256 * sum(byte > 127 for byte in blanked)  # old Sun tars
    return claimed in (unsigned, signed)


def _extension(window: Window, fields: tuple[bytes, ...]) -> bytes:
    size = number(fields[4])
    if not 0 <= size <= MAX_EXTENSION_BYTES:
        raise ConvertError(f"a layer's tar has an extended header of {size} bytes")
    data = window.take(size)
    if len(data) < size:
        raise ConvertError("a layer's tar ends inside an extended header")
    window.skip(-size % 512)
    return data


def _member(window: Window, header: _Header) -> Member:
    """The member of ``header``; the window is left at the next header."""
    (name, mode, uid, gid, size_field, mtime, _, type_flag, link, magic, major, minor, prefix) = header.fields
    kind = _KINDS[type_flag]
    pax = header.pax
    raw = header.long_name or pax.get(b"path") or _ustar_name(name, prefix, magic, header.block)
    if type_flag == b"\0" and raw.endswith(b"/"):
        kind = DIRECTORY  # before POSIX
    size, sparse = number(size_field), None
    if pax:
        size = _pax_size(pax, size, raw)
    if not 0 <= size <= MAX_FILE_BYTES:
        raise ConvertError(f"{raw!r} has an impossible size in a layer's tar: {size}")
    stored = size if kind == FILE else 0  # Go: the other kinds have no data, whatever their size says
    if kind == FILE and (type_flag == b"S" or any(key.startswith(b"GNU.sparse.") for key in pax)):
        raw, size, sparse, stored = sparse_layout(window, header.block, pax, raw, stored)
    offset = window.position
    if kind == FILE:
        if window.skip(stored):
            raise ConvertError(f"a layer's tar ends inside {raw!r}")
        window.skip(-stored % 512)
    elif kind == HARD_LINK and size:
        _skip_link_data(window, size, raw)
    return Member(
        path := normalise(raw),
        kind,
        number(mode) & 0o7777,
        _owner(pax.get(b"uid"), uid, path),
        _owner(pax.get(b"gid"), gid, path),
        _time(pax.get(b"mtime"), mtime),
        size if kind == FILE else 0,
        _link(kind, header.long_link or pax.get(b"linkpath") or text(link), path),
        (number(major), number(minor)) if kind in (CHARACTER, BLOCK) else (0, 0),
        xattrs(pax) if pax else None,
        offset,
        sparse,
    )


def _skip_link_data(window: Window, size: int, name: bytes) -> None:
    """Pass over the data that pax(1) may give a hard link; GNU tar and Go say a size there and write no data (F20)."""
    following = window.peek(512)
    if not following or following == _ZERO_BLOCK:
        return
    if len(following) == 512 and _sum_matches(following, number_or(following[148:156], -1)):
        return
    if window.skip(size):
        raise ConvertError(f"a layer's tar ends inside {name!r}")
    window.skip(-size % 512)


def _ustar_name(name: bytes, prefix: bytes, magic: bytes, block: bytes) -> bytes:
    name = name.split(b"\0", 1)[0]
    if magic == b"ustar\00000":
        if block[508:512] == b"tar\0":
            prefix = prefix[:131]  # star keeps its times behind it
    elif magic != b"ustar  \0" or not _misplaced_prefix(prefix):
        return name
    prefix = prefix.split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix else name


def _misplaced_prefix(prefix: bytes) -> bool:
    """Whether a GNU header has a name where its times belong: Go before 1.8 wrote that, Docker layers have it."""
    times = (prefix[:12], prefix[12:24])
    return any(number_or(time, -1) == -1 for time in times) and text(prefix).isascii()


# ---- fields


def _owner(text: Optional[bytes], field: bytes, path: bytes) -> int:
    """Numeric owners only; the name strings mean nothing on another machine (F24)."""
    value = decimal(text, "owner") if text else number(field)
    if not 0 <= value <= MAX_ID:
        raise ConvertError(f"{show(path)} has an owner outside 0..2**32-1 in a layer's tar: {value}")
    return value


def _time(text: Optional[bytes], field: bytes) -> int:
    seconds = decimal(text.split(b".", 1)[0] or b"0", "time") if text else number(field)
    return min(max(seconds, 0), MAX_TIME)


def normalise(raw: bytes) -> bytes:
    """A member's name as a path relative to the root: ./x, /x, x/ and a//x mean what they say (F19).

    ConvertError for ``..``, NUL, a path over 4095 or a component over 255 bytes (F30).
    """
    parts = [part for part in raw.split(b"/") if part and part != b"."]
    path = b"/".join(parts)
    if b".." in parts:
        raise ConvertError(f"a layer's tar names a path with .. in it: {raw[:200]!r}")
    if len(path) > MAX_NAME and (len(path) > MAX_PATH or max(map(len, parts)) > MAX_NAME):
        raise ConvertError(f"a layer's tar names a path that is too long: {raw[:200]!r}…")
    if b"\0" in path:
        raise ConvertError(f"a layer's tar names a path with a NUL in it: {raw[:200]!r}")
    return path


def _link(kind: int, target: bytes, path: bytes) -> bytes:
    if kind == HARD_LINK:
        return normalise(target)
    if kind != SYMLINK:
        return b""
    if not target or len(target) > MAX_PATH or b"\0" in target:
        raise ConvertError(f"{show(path)} is a symlink with an impossible target in a layer's tar")
    return target


def _pax_size(pax: Pax, ustar: int, raw: bytes) -> int:
    """The size that counts. Headers that disagree smuggle members past one reader or another (CVE-2025-62518)."""
    text = pax.get(b"size")
    if not text:
        return ustar
    size = decimal(text, "size")
    if size != ustar and size < _OCTAL_LIMIT:
        raise ConvertError(f"{raw!r} has two sizes in a layer's tar: {ustar} and {size}")
    return size
