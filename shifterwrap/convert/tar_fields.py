"""What the fields and PAX records of tar headers say: numbers, names, extended attributes."""

from __future__ import annotations

import base64
import binascii
from typing import Optional
from urllib.parse import unquote_to_bytes

from ..errors import ConvertError

Pax = dict[bytes, bytes]


def text(field: bytes) -> bytes:
    """A text field: up to its first NUL."""
    return field.split(b"\0", 1)[0]


def number(field: bytes) -> int:
    """A numeric field: octal digits, or base-256 when its first bit is set (GNU, star); ConvertError."""
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
        cut = text(digits)  # Go reads up to the first NUL
        if len(cut) < len(digits):
            return number(cut)
    raise ConvertError(f"a layer's tar has a bad number in a header: {field!r}")


def number_or(field: bytes, default: int) -> int:
    """number(), and ``default`` for what is none."""
    try:
        return number(field)
    except ConvertError:
        return default


def decimal(value: bytes, what: str) -> int:
    """A decimal number of a PAX record."""
    digits = value.removeprefix(b"-")
    if not (digits.isdigit() and digits.isascii() and len(digits) < 20):
        raise ConvertError(f"a layer's tar has a bad {what}: {value[:40]!r}")
    return int(value)


def parse_pax(data: bytes) -> Pax:
    """The records ``LENGTH KEY=VALUE\\n`` (POSIX pax, "pax Header Block"); values are bytes.

    The pairs GNU.sparse.offset, GNU.sparse.numbytes of sparse format 0.0 repeat; they become the map of format 0.1.
    """
    records: Pax = {}
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


def xattrs(pax: Pax) -> Optional[dict[bytes, bytes]]:
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
