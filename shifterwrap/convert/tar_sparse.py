"""The maps of sparse files, in each of the four forms that GNU tar has had (its manual, "Sparse Formats")."""

from __future__ import annotations

from typing import Optional

from ..errors import ConvertError
from .tar_fields import Pax, decimal, number
from .tar_stream import Window
from .tree import MAX_FILE_BYTES, Regions

MAX_MAP_BYTES = 1 << 20


def sparse_layout(
    window: Window, block: bytes, pax: Pax, name: bytes, stored: int
) -> tuple[bytes, int, Optional[Regions], int]:
    """(name, real size, regions, stored bytes) of a sparse file with the header ``block``; its map is read here.

    ``name`` and ``stored`` are what the header says; ``window`` is behind it. ConvertError for a map that is not sound.
    """
    version = (pax.get(b"GNU.sparse.major"), pax.get(b"GNU.sparse.minor"))
    if block[156:157] == b"S":
        size = number(block[483:495])
        numbers = _old_map(window, block)
    elif version == (b"1", b"0"):
        size = decimal(pax.get(b"GNU.sparse.realsize", b""), "sparse size")
        start = window.position
        numbers = _map_in_data(window)
        stored -= window.position - start
    elif b"GNU.sparse.map" in pax and version in ((None, None), (b"0", b"0"), (b"0", b"1")):
        size = decimal(pax.get(b"GNU.sparse.size", b"") or pax.get(b"GNU.sparse.realsize", b""), "sparse size")
        numbers = [decimal(item, "sparse map") for item in pax[b"GNU.sparse.map"].split(b",") if item]
    else:
        return name, stored, None, stored  # as Go: an unknown version is an ordinary file
    name = pax.get(b"GNU.sparse.name") or name
    return name, size, _regions(numbers, size, stored, name), stored


def _old_map(window: Window, block: bytes) -> list[int]:
    numbers, more = _old_pairs(block[386:482]), block[482]
    while more:
        block = window.take(512)
        if len(block) < 512:
            raise ConvertError("a layer's tar ends inside a sparse map")
        numbers += _old_pairs(block[:504])
        more = block[504]
        if len(numbers) > MAX_MAP_BYTES // 16:
            raise ConvertError("a layer's tar has a sparse file with too many regions")
    return numbers


def _old_pairs(area: bytes) -> list[int]:
    numbers: list[int] = []
    for at in range(0, len(area), 24):
        if not area[at]:
            break
        numbers += number(area[at : at + 12]), number(area[at + 12 : at + 24])
    return numbers


def _map_in_data(window: Window) -> list[int]:
    """Format 1.0: decimal lines before the data, the first is the number of pairs, padded to whole blocks."""
    lines, wanted, rest = [], 1, b""
    for _ in range(MAX_MAP_BYTES // 512):
        block = window.take(512)
        *complete, rest = (rest + block).split(b"\n")
        lines += complete
        if lines and wanted == 1:
            wanted += 2 * decimal(lines[0], "sparse map")
        if len(lines) >= wanted > 1 or lines[:1] == [b"0"]:
            return [decimal(line, "sparse map") for line in lines[1:wanted]]
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
