"""Pass 2: the live files' content, in the order of the layers, so that every layer is inflated at most once.

What lower layers had and upper ones replaced is passed over; a layer in which nothing lives is not opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..errors import ConvertError, LimitExceeded
from .accelerators import crc32
from .tree import FILE, Node

OpenLayer = Callable[[int], Iterator[bytes]]  # the uncompressed bytes of the layer of this index, from its start

MAX_HOLE_BYTES = 16 << 30  # in one image: squashfs writers take a hole as zeros, at some 5 GB/s
_HOLE = bytes(1 << 20)
_ZEROS = memoryview(_HOLE)


def in_layer_order(nodes: list[tuple[bytes, Node]]) -> list[tuple[bytes, Node]]:
    """The files among ``nodes`` in the order in which the layers hold their content.

    LimitExceeded when they have more than MAX_HOLE_BYTES of holes, which cost time wherever the content goes.
    """
    files = [item for item in nodes if item[1].kind == FILE]
    holes = sum(node.size - node.stored_bytes() for _, node in files)
    if holes > MAX_HOLE_BYTES:
        raise LimitExceeded(f"the image has sparse files with {holes} bytes of holes, more than {MAX_HOLE_BYTES}",
                            "nothing was cached; this limit is fixed")
    return sorted(files, key=lambda item: (item[1].layer, item[1].offset, item[0]))


def stream(
    files: list[tuple[bytes, Node]], open_layer: OpenLayer
) -> Iterator[tuple[bytes, Node, Iterator[memoryview]]]:
    """For each of ``files``, which are in_layer_order(), its path, its node, and its content in pieces, holes as zeros.

    Each content must be consumed before the next is asked for; afterwards ``node.crc`` is its CRC-32.
    """
    reader = None
    try:
        for path, node in files:
            if not node.stored_bytes():
                yield path, node, _summed(node, _laid_out(node, iter(())))
                continue
            if reader is None or reader.layer != node.layer:
                if reader is not None:
                    reader.close()
                reader = _Forward(node.layer, open_layer(node.layer))
            yield path, node, _summed(node, _laid_out(node, reader.span(node.offset, node.stored_bytes())))
    finally:
        if reader is not None:
            reader.close()


def is_hole(piece: memoryview) -> bool:
    """Whether ``piece``, of what stream() gives, stands for a hole of a sparse file."""
    return piece.obj is _HOLE


class _Forward:
    """One layer's uncompressed bytes, read forward only."""

    __slots__ = ("_piece", "_pieces", "_start", "layer")

    def __init__(self, layer: int, pieces: Iterator[bytes]) -> None:
        self.layer = layer
        self._pieces = pieces
        self._piece = memoryview(b"")
        self._start = 0

    def span(self, offset: int, length: int) -> Iterator[memoryview]:
        at, end = offset - self._start, offset - self._start + length
        while at < end:
            if at >= len(self._piece):
                at, end = at - len(self._piece), end - len(self._piece)
                self._advance()
            else:
                yield self._piece[at:end]
                at = min(end, len(self._piece))

    def _advance(self) -> None:
        piece = next(self._pieces, None)
        if piece is None:
            raise ConvertError(f"layer {self.layer} is shorter than it was when it was scanned")
        self._start += len(self._piece)
        self._piece = memoryview(piece)

    def close(self) -> None:
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


def _laid_out(node: Node, stored: Iterator[memoryview]) -> Iterator[memoryview]:
    """The content of ``node`` with its holes, from the bytes that are stored."""
    if node.sparse is None:
        yield from stored
        return
    piece, at = memoryview(b""), 0
    for offset, length in node.sparse:
        yield from _zeros(offset - at)
        at = offset + length
        while length:
            if not piece:
                piece = next(stored)
            yield piece[:length]
            taken = min(length, len(piece))
            piece, length = piece[taken:], length - taken
    yield from _zeros(node.size - at)


def _zeros(count: int) -> Iterator[memoryview]:
    while count > 0:
        yield _ZEROS[:count]
        count -= len(_ZEROS)


def _summed(node: Node, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    crc = 0
    for piece in pieces:
        crc = crc32(piece, crc)
        yield piece
    node.crc = crc
