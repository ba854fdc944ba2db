"""The decoded stream of a layer as something to take blocks from and to skip in."""

from __future__ import annotations

from collections.abc import Iterator


class Window:
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
