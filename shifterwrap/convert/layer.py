"""Pass 1: one layer read once, for its members and for the proof that it is the layer that the image config names.

Several layers are scanned at once, each in a thread of its own; inflating and hashing release the GIL.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from ..errors import ConvertError, LimitExceeded
from ..oci import check_digest
from .decode import decode
from .tar import Member, members, weight

_QUEUED_PIECES = 4  # of about 1 MiB, waiting to be hashed
_COUNTED_ENTRIES = 256  # at a time


class Limits(NamedTuple):
    """How much one image may unpack to (F36).

    ``max_unpacked_bytes`` is absolute; beyond ``ratio_floor_bytes``, so is ``max_ratio`` times the stored bytes;
    ``max_entries`` counts members, one with much metadata (long paths, attributes) as several.
    """

    max_unpacked_bytes: int = 256 << 30
    max_ratio: int = 200
    max_entries: int = 5_000_000
    ratio_floor_bytes: int = 100 << 20


class Layer(NamedTuple):
    """What a layer holds: its members in their order, and its uncompressed size."""

    index: int  # type: ignore[assignment]  # hides tuple.index(), which nobody wants of a layer
    members: list[Member]
    unpacked_bytes: int


class Budget:
    """What one image may still unpack, shared by the threads that scan its layers.

    ``stored_bytes`` is the size of all its blobs, so that the bound is the same whichever layer is read first.
    """

    __slots__ = ("_bytes", "_entries", "_lock", "limits", "max_bytes")

    def __init__(self, limits: Limits, stored_bytes: int) -> None:
        self.limits = limits
        self.max_bytes = min(limits.max_unpacked_bytes, max(limits.ratio_floor_bytes, limits.max_ratio * stored_bytes))
        self._bytes = 0
        self._entries = 0
        self._lock = threading.Lock()

    def add_bytes(self, count: int) -> None:
        """Count unpacked bytes; LimitExceeded when they are too many."""
        with self._lock:
            self._bytes += count
        if self._bytes > self.max_bytes:
            absolute = self.max_bytes == self.limits.max_unpacked_bytes
            why = "" if absolute else f", {self.limits.max_ratio} times its size"
            raise LimitExceeded(f"the image unpacks to more than {self.max_bytes} bytes{why}")

    def add_entries(self, count: int) -> None:
        """Count members; LimitExceeded when they are too many."""
        with self._lock:
            self._entries += count
        if self._entries > self.limits.max_entries:
            raise LimitExceeded(f"the image has more than {self.limits.max_entries} entries")


def scan(index: int, chunks: Iterable[bytes], diff_id: str, budget: Budget) -> Layer:
    """Read the layer whose compressed blob is ``chunks`` and return its members.

    The caller has checked, or checks meanwhile, the digest of the blob; that of the uncompressed bytes must be
    ``diff_id``, or else ConvertError (F33: config.md, "Layer DiffID").
    """
    algorithm, _, expected = check_digest(diff_id).partition(":")
    pieces = _Hashed(decode(chunks), algorithm, budget)
    found: list[Member] = []
    uncounted = 0
    for member in members(iter(pieces)):
        found.append(member)
        uncounted += weight(member)
        if uncounted >= _COUNTED_ENTRIES:
            budget.add_entries(uncounted)
            uncounted = 0
    budget.add_entries(uncounted)
    if pieces.digest.hexdigest() != expected:
        raise ConvertError(f"layer {index} is not the one that the image config names: its content is not {diff_id}")
    return Layer(index, found, pieces.size)


class _Hashed:
    """Pieces passed on, counted, and hashed by a thread beside the one that inflates and parses."""

    def __init__(self, pieces: Iterator[bytes], algorithm: str, budget: Budget) -> None:
        self._pieces = pieces
        self._budget = budget
        self.digest = hashlib.new(algorithm)
        self.size = 0

    def __iter__(self) -> Iterator[bytes]:
        waiting: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="diff-id") as hasher:
            for piece in self._pieces:
                self.size += len(piece)
                self._budget.add_bytes(len(piece))
                waiting.append(hasher.submit(self.digest.update, piece))
                if len(waiting) > _QUEUED_PIECES:
                    waiting.popleft().result()
                yield piece
