"""The members of a layer's tar: headers only, one pass over the decoded stream, data skipped but seen to the end.

Reads ustar, PAX and GNU tar as Go's archive/tar does, because that is what wrote and what else reads container layers:
lenient where it is lenient (no padding or end marker at the end, anything after the end marker), an error where it is
one. Numbered rules (F18, …) are those of docs and tests. What a member *does* to a tree is flatten's business.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Optional
from urllib.parse import unquote_to_bytes

from ..errors import ConvertError, LimitExceeded
from .tree import BLOCK, CHARACTER, DIRECTORY, FIFO, FILE, MAX_NAME, MAX_PATH, SYMLINK, Regions, show

HARD_LINK = 0  # the one kind of member that is no kind of inode
MAX_TIME = 2**32 - 1  # squashfs keeps unsigned 32-bit seconds
MAX_ID = 2**32 - 1
MAX_EXTENSION_BYTES = 1 << 20  # of one PAX header, GNU long name or sparse map, as Go's maxSpecialFileSize
MAX_FILE_BYTES = 1 << 50

_KINDS = {
    b"0": FILE, b"\0": FILE, b"7": FILE, b"S": FILE, b"1": HARD_LINK, b"2": SYMLINK,
    b"3": CHARACTER, b"4": BLOCK, b"5": DIRECTORY, b"6": FIFO,
}
# name mode uid gid size mtime checksum type linkname magic+version uname+gname major minor prefix (POSIX ustar)
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_ZERO_BLOCK = bytes(512)
_OCTAL_LIMIT = 8 << 30  # the first size that a ustar header cannot say
_Pax = dict[bytes, bytes]


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


def members(stream: Iterator[bytes], max_entries: int) -> Iterator[Member]:
    """Every member of the tar in ``stream``, which is read to its end (F31) so that whoever hashes it sees all of it.

    ConvertError for what is not a tar or a name, link or size that no file system could hold; LimitExceeded for more
    than ``max_entries``, counted by :func:`weight`.
    """
    window = _Window(stream)
    count = 0
    while True:
        header = _next_header(window)
        if header is None:
            break
        member = _member(window, header)
        count += weight(member)
        if count > max_entries:
            raise LimitExceeded(f"a layer has more than {max_entries} entries")
        yield member
    window.drain()


def weight(member: Member) -> int:
    """What ``member`` counts against max_entries: 1, and 1 more for each 512 bytes of metadata that it keeps."""
    kept = len(member.path) + len(member.link)
    if member.xattrs:
        kept += sum(len(name) + len(value) + 64 for name, value in member.xattrs.items())
    if member.sparse:
        kept += 128 * len(member.sparse)
    return 1 + kept // 512


# ---- the stream


class _Window:
    """The stream as something to take blocks from; ``position`` is absolute."""

    __slots__ = ("_at", "_piece", "_start", "_stream")

    def __init__(self, stream: Iterator[bytes]) -> None:
        self._stream = stream
        self._piece = b""
        self._at = 0
        self._start = 0  # the absolute offset of _piece

    @property
    def position(self) -> int:
        return self._start + self._at

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes; fewer only at the end of the stream."""
        end = self._at + count
        if end <= len(self._piece):
            taken = self._piece[self._at : end]
            self._at = end
            return taken
        parts = [self._piece[self._at :]]
        missing = end - len(self._piece)
        while missing > 0 and self._advance():
            parts.append(self._piece[:missing])
            self._at = len(parts[-1])
            missing -= self._at
        return b"".join(parts)

    def skip(self, count: int) -> int:
        """Pass over ``count`` bytes and return how many of them the stream did not have."""
        self._at += count
        while self._at > len(self._piece):
            beyond = self._at - len(self._piece)
            if not self._advance():
                return beyond
            self._at = beyond
        return 0

    def peek(self, count: int) -> bytes:
        """As take(), and nothing is taken."""
        at = self._at
        if at + count > len(self._piece):
            kept, start = self._piece[at:], self.position
            while len(kept) < count and self._advance():
                kept += self._piece
            self._piece, self._start, self._at = kept, start, 0
            at = 0
        return self._piece[at : at + count]

    def drain(self) -> None:
        while self._advance():
            pass

    def _advance(self) -> bool:
        piece = next(self._stream, None)
        self._start += len(self._piece)
        self._at = 0
        self._piece = piece or b""
        return piece is not None


# ---- one member


class _Header(NamedTuple):
    """A member's header block with what the extension headers before it said."""

    block: bytes
    fields: tuple[bytes, ...]
    pax: _Pax
    long_name: bytes
    long_link: bytes


def _next_header(window: _Window) -> Optional[_Header]:
    """The next member's header, extension headers folded in; None at the end of the archive."""
    pax: _Pax = {}
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
            pax = _parse_pax(data)
        elif kind == b"L":
            long_name = _text(data)
        elif kind == b"K":
            long_link = _text(data)
        elif kind != b"g":  # every container engine ignores global PAX headers (Go hands them out as a member)
            raise ConvertError(f"a layer's tar has a member of unknown type {kind!r}: {_text(fields[0])!r}")


def _check_sum(block: bytes, field: bytes) -> None:
    # The low half of Adler-32 is 1 + the sum of the bytes modulo 65521, at a tenth of the cost of sum().
    claimed = _number(field)
    if (zlib.adler32(block) - 1 - sum(field) + 256 - claimed & 0xFFFF) and not _sum_matches(block, claimed):
        raise ConvertError("a layer is not a tar, or its tar is damaged: header checksum")


def _sum_matches(block: bytes, claimed: int) -> bool:
    blanked = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(blanked)
    signed = unsigned - 256 * sum(byte > 127 for byte in blanked)  # old Sun tars
    return claimed in (unsigned, signed)


def _extension(window: _Window, fields: tuple[bytes, ...]) -> bytes:
    size = _number(fields[4])
    if not 0 <= size <= MAX_EXTENSION_BYTES:
        raise ConvertError(f"a layer's tar has an extended header of {size} bytes")
    data = window.take(size)
    if len(data) < size:
        raise ConvertError("a layer's tar ends inside an extended header")
    window.skip(-size % 512)
    return data


def _member(window: _Window, header: _Header) -> Member:
    """The member of ``header``; the window is left at the next header."""
    (name, mode, uid, gid, size_field, mtime, _, type_flag, link, magic, major, minor, prefix) = header.fields
    kind = _KINDS[type_flag]
    pax = header.pax
    raw = header.long_name or pax.get(b"path") or _ustar_name(name, prefix, magic, header.block)
    if type_flag == b"\0" and raw.endswith(b"/"):
        kind = DIRECTORY  # before POSIX
    size, sparse = _number(size_field), None
    if pax:
        size = _pax_size(pax, size, raw)
    if not 0 <= size <= MAX_FILE_BYTES:
        raise ConvertError(f"{raw!r} has an impossible size in a layer's tar: {size}")
    stored = size if kind == FILE else 0  # Go: the other kinds have no data, whatever their size says
    if kind == FILE and (type_flag == b"S" or any(key.startswith(b"GNU.sparse.") for key in pax)):
        raw, size, sparse, stored = _sparse(window, header, raw, stored)
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
        _number(mode) & 0o7777,
        _owner(pax.get(b"uid"), uid, path),
        _owner(pax.get(b"gid"), gid, path),
        _time(pax.get(b"mtime"), mtime),
        size if kind == FILE else 0,
        _link(kind, header.long_link or pax.get(b"linkpath") or _text(link), path),
        (_number(major), _number(minor)) if kind in (CHARACTER, BLOCK) else (0, 0),
        _xattrs(pax) if pax else None,
        offset,
        sparse,
    )


def _skip_link_data(window: _Window, size: int, name: bytes) -> None:
    """Pass over the data that pax(1) may give a hard link; GNU tar and Go say a size there and write no data (F20)."""
    following = window.peek(512)
    if not following or following == _ZERO_BLOCK:
        return
    if len(following) == 512 and _sum_matches(following, _number_or(following[148:156], -1)):
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
    return any(_number_or(time, -1) == -1 for time in times) and _text(prefix).isascii()


# ---- fields


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _number(field: bytes) -> int:
    """A numeric field: octal digits, or base-256 when its first bit is set (GNU, star)."""
    digits = field.strip(b" \0")
    if digits.isdigit() and digits.isascii():
        try:
            return int(digits, 8)
        except ValueError:
            pass
    elif not digits:
        return 0
    elif field[0] & 0x80:
        value = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
        return value - (1 << 8 * len(field) - 1) if field[0] & 0x40 else value
    else:
        cut = _text(digits)  # Go reads up to the first NUL
        if len(cut) < len(digits):
            return _number(cut)
    raise ConvertError(f"a layer's tar has a bad number in a header: {field!r}")


def _number_or(field: bytes, default: int) -> int:
    try:
        return _number(field)
    except ConvertError:
        return default


def _decimal(value: bytes, what: str) -> int:
    text = value.removeprefix(b"-")
    if not (text.isdigit() and text.isascii() and len(text) < 20):
        raise ConvertError(f"a layer's tar has a bad {what}: {value[:40]!r}")
    return int(value)


def _owner(text: Optional[bytes], field: bytes, path: bytes) -> int:
    """Numeric owners only; the name strings mean nothing on another machine (F24)."""
    value = _decimal(text, "owner") if text else _number(field)
    if not 0 <= value <= MAX_ID:
        raise ConvertError(f"{show(path)} has an owner outside 0..2**32-1 in a layer's tar: {value}")
    return value


def _time(text: Optional[bytes], field: bytes) -> int:
    seconds = _decimal(text.split(b".", 1)[0] or b"0", "time") if text else _number(field)
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


# ---- PAX


def _parse_pax(data: bytes) -> _Pax:
    """The records ``LENGTH KEY=VALUE\\n`` (POSIX pax, "pax Header Block"); values are bytes.

    The pairs GNU.sparse.offset, GNU.sparse.numbytes of sparse format 0.0 repeat; they become the map of format 0.1.
    """
    records: _Pax = {}
    pairs: list[bytes] = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 12)
        length = data[at:space] if space > 0 else b""
        end = at + int(length) if length.isdigit() and length.isascii() else 0
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not (at < space < end <= len(data) and equals and key and data[end - 1] == 10):
            raise ConvertError("a layer's tar has a malformed PAX header")
        if key in (b"path", b"linkpath") and b"\0" in value:
            raise ConvertError("a layer's tar names a path with a NUL in it")
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            pairs.append(value)
        records[key] = value
        at = end
    if pairs:
        records[b"GNU.sparse.map"] = b",".join(pairs)
    return records


def _pax_size(pax: _Pax, ustar: int, raw: bytes) -> int:
    """The size that counts. Headers that disagree smuggle members past one reader or another (CVE-2025-62518)."""
    text = pax.get(b"size")
    if not text:
        return ustar
    size = _decimal(text, "size")
    if size != ustar and size < _OCTAL_LIMIT:
        raise ConvertError(f"{raw!r} has two sizes in a layer's tar: {ustar} and {size}")
    return size


def _xattrs(pax: _Pax) -> Optional[dict[bytes, bytes]]:
    """Extended attributes as star and Go (raw) or libarchive (percent-encoded name, base64 value) write them."""
    found: dict[bytes, bytes] = {}
    for key, value in pax.items():
        if key.startswith(b"LIBARCHIVE.xattr."):
            try:
                found[unquote_to_bytes(key[17:])] = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
            except binascii.Error:
                raise ConvertError("a layer's tar has a malformed extended attribute") from None
    for key, value in pax.items():
        if key.startswith(b"SCHILY.xattr."):
            found[key[13:]] = value
    return found or None


# ---- sparse files


def _sparse(window: _Window, header: _Header, raw: bytes, stored: int) -> tuple[bytes, int, Optional[Regions], int]:
    """(name, real size, regions, stored bytes) of a sparse file, its map read (GNU tar manual, "Sparse Formats")."""
    pax = header.pax
    if header.fields[7] == b"S":
        size = _number(header.block[483:495])
        numbers = _old_map(window, header.block)
    elif (version := (pax.get(b"GNU.sparse.major"), pax.get(b"GNU.sparse.minor"))) == (b"1", b"0"):
        size = _decimal(pax.get(b"GNU.sparse.realsize", b""), "sparse size")
        start = window.position
        numbers = _map_in_data(window)
        stored -= window.position - start
    elif b"GNU.sparse.map" in pax and version in ((None, None), (b"0", b"0"), (b"0", b"1")):
        size = _decimal(pax.get(b"GNU.sparse.size", b"") or pax.get(b"GNU.sparse.realsize", b""), "sparse size")
        numbers = [_decimal(number, "sparse map") for number in pax[b"GNU.sparse.map"].split(b",") if number]
    else:
        return raw, stored, None, stored  # as Go: an unknown version is an ordinary file
    raw = pax.get(b"GNU.sparse.name") or raw
    return raw, size, _regions(numbers, size, stored, raw), stored


def _old_map(window: _Window, block: bytes) -> list[int]:
    numbers, more = _old_pairs(block[386:482]), block[482]
    while more:
        block = window.take(512)
        if len(block) < 512:
            raise ConvertError("a layer's tar ends inside a sparse map")
        numbers += _old_pairs(block[:504])
        more = block[504]
        if len(numbers) > MAX_EXTENSION_BYTES // 16:
            raise ConvertError("a layer's tar has a sparse file with too many regions")
    return numbers


def _old_pairs(area: bytes) -> list[int]:
    numbers: list[int] = []
    for at in range(0, len(area), 24):
        if not area[at]:
            break
        numbers += _number(area[at : at + 12]), _number(area[at + 12 : at + 24])
    return numbers


def _map_in_data(window: _Window) -> list[int]:
    """Format 1.0: decimal lines before the data, the first is the number of pairs, padded to whole blocks."""
    lines, wanted, rest = [], 1, b""
    for _ in range(MAX_EXTENSION_BYTES // 512):
        block = window.take(512)
        *complete, rest = (rest + block).split(b"\n")
        lines += complete
        if lines and wanted == 1:
            wanted += 2 * _decimal(lines[0], "sparse map")
        if len(lines) >= wanted > 1 or lines[:1] == [b"0"]:
            return [_decimal(number, "sparse map") for number in lines[1:wanted]]
        if len(block) < 512:
            break
    raise ConvertError("a layer's tar has a malformed sparse map")


def _regions(numbers: list[int], size: int, stored: int, name: bytes) -> Regions:
    """The pairs in ``numbers`` checked: ascending, apart, inside the file, and together what is stored."""
    regions, end = [], 0
    for offset, length in zip(numbers[::2], numbers[1::2]):
        if not (end <= offset and length >= 0 and offset + length <= size):
            raise ConvertError(f"{name!r} has an impossible sparse map in a layer's tar")
        end = offset + length
        if length:
            regions.append((offset, length))
    if len(numbers) % 2 or size > MAX_FILE_BYTES or sum(length for _, length in regions) != stored:
        raise ConvertError(f"{name!r} has an impossible sparse map in a layer's tar")
    return tuple(regions)
