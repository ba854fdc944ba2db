"""A layer blob's bytes, decompressed: gzip, zstd or plain tar, told apart by their magic and never by a media type.

Memory is bounded whatever the input: output comes in pieces of about 1 MiB. How much may come out in all is the
caller's business (:class:`~shifterwrap.convert.layer.Budget`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator

from ..errors import ConvertError
from . import accelerators

PIECE_BYTES = 1 << 20
MAX_WINDOW_LOG = 27  # what zstd's own command line accepts without --long=31: 128 MiB of window

_FED_BYTES = 128 << 10  # to a decompressor at a time; what it leaves at a member's end is copied
_GZIP_MAGIC = b"\x1f\x8b"
_PLAIN_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # a gzip member's without optional fields
_ZSTD_MAGIC = 0xFD2FB528
_SKIPPABLE_MAGIC = 0x184D2A50  # RFC 8878 3.1.2: sixteen of them, the last four bits are free
_FOREIGN = {b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"\x04\x22\x4d\x18": "lz4"}
_MAX_BLOCK_BYTES = 128 << 10  # RFC 8878 3.1.1.2.4: Block_Maximum_Size


def decode(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The uncompressed bytes of a layer blob; ConvertError when it is damaged, truncated or of another compression."""
    source = _Source(chunks)
    magic = source.peek(6)
    if magic.startswith(_GZIP_MAGIC):
        return _gunzip(source)
    word = int.from_bytes(magic[:4], "little")
    if len(magic) >= 4 and (word == _ZSTD_MAGIC or word & ~0xF == _SKIPPABLE_MAGIC):
        return _unzstd(source)
    for prefix, name in _FOREIGN.items():
        if magic.startswith(prefix):
            raise ConvertError(f"a layer is compressed with {name}, which image layers may not be")
    return source.rest()


class _Source:
    """The compressed bytes, with look-ahead. ``take`` and ``peek`` return less than asked only at the end."""

    __slots__ = ("_at", "_buffer", "_chunks")

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._buffer = b""
        self._at = 0

    def peek(self, count: int) -> bytes:
        while len(self._buffer) - self._at < count:
            more = next(self._chunks, None)
            if more is None:
                break
            self._buffer = self._buffer[self._at :] + more if self._at < len(self._buffer) else more
            self._at = 0
        return self._buffer[self._at : self._at + count]

    def take(self, count: int) -> bytes:
        taken = self.peek(count)
        self._at += len(taken)
        return taken

    def some(self) -> bytes:
        """Whatever comes next, at least one byte; b"" at the end."""
        self.peek(1)
        taken = self._buffer[self._at : self._at + _FED_BYTES]
        self._at += len(taken)
        return taken

    def unread(self, count: int) -> None:
        """Put back the end of what some() gave last."""
        self._at -= count

    def rest(self) -> Iterator[bytes]:
        while piece := self.some():
            yield piece


# ---- gzip


def _gunzip(source: _Source) -> Iterator[bytes]:
    """Every gzip member in turn (RFC 1952 2.2); zeros may follow the last one, as tapes and block devices pad."""
    isal = accelerators.igzip_lib
    inflate = _inflate_zlib if isal is None else _inflate_isal
    fault: type[Exception] = zlib.error if isal is None else isal.IsalError
    while True:
        _skip_member_header(source)
        try:
            yield from inflate(source)
        except fault as exc:
            raise ConvertError(f"a layer's gzip data is damaged: {exc}") from None
        following = source.some()
        while following and not following.strip(b"\0"):
            following = source.some()
        if not following:
            return
        source.unread(len(following.lstrip(b"\0")))
        if source.peek(2) != _GZIP_MAGIC:
            raise ConvertError("a layer has data after its gzip data")


def _skip_member_header(source: _Source) -> None:
    """Pass over a member's header with its optional fields; isal loses its way in one that comes in two parts."""
    fixed = _exactly(source, 10, "gzip")
    flags = fixed[3]
    if fixed[2] != 8 or flags & 0xE0:
        raise ConvertError("a layer's gzip data is damaged: unknown method or flags")
    if flags & 4:  # FEXTRA
        _exactly(source, int.from_bytes(_exactly(source, 2, "gzip"), "little"), "gzip")
    for flag in (8, 16):  # FNAME, FCOMMENT
        left = PIECE_BYTES if flags & flag else 0
        while left and _exactly(source, 1, "gzip") != b"\0":
            left -= 1
    if flags & 2:  # FHCRC
        _exactly(source, 2, "gzip")


def _inflate_isal(source: _Source) -> Iterator[bytes]:
    isal = accelerators.igzip_lib
    member = isal.IgzipDecompressor(flag=isal.DECOMP_GZIP)
    member.decompress(_PLAIN_HEADER)
    while not member.eof:
        data = b""
        if member.needs_input:
            data = source.some()
            if not data:
                raise ConvertError("a layer's gzip data is truncated")
        piece = member.decompress(data, PIECE_BYTES)
        if piece:
            yield piece
    source.unread(len(member.unused_data))


def _inflate_zlib(source: _Source) -> Iterator[bytes]:
    member = zlib.decompressobj(31)  # 16: gzip, 15: the largest window
    member.decompress(_PLAIN_HEADER)
    while not member.eof:
        data = member.unconsumed_tail or source.some()
        piece = member.decompress(data, PIECE_BYTES)
        if piece:
            yield piece
        elif not data and not member.eof:
            raise ConvertError("a layer's gzip data is truncated")
    source.unread(len(member.unused_data))


# ---- zstd


def _unzstd(source: _Source) -> Iterator[bytes]:
    """Every zstd frame in turn, skippable ones dropped (zstd:chunked keeps its index in them).

    The frame and block headers (RFC 8878 3.1.1) are read here and the decompressor is fed whole blocks, up to eight at
    a time: its output is bounded, which it does not offer itself, and a missing end is noticed, which it does not say.
    """
    new_frame, fault = _zstd_backend()
    while True:
        word = int.from_bytes(source.peek(4), "little")
        if not source.peek(1):
            return
        if word & ~0xF == _SKIPPABLE_MAGIC:
            _skip(source, int.from_bytes(_exactly(source, 8)[4:], "little"))
        elif word == _ZSTD_MAGIC:
            try:
                yield from _frame(source, new_frame())
            except fault as exc:
                raise ConvertError(f"a layer's zstd data is damaged: {exc}") from None
        else:
            raise ConvertError("a layer has data after its zstd data")


def _frame(source: _Source, decompress: Callable[[bytes], bytes]) -> Iterator[bytes]:
    header = _exactly(source, 5)
    descriptor = header[4]
    single_segment = descriptor >> 5 & 1
    content_size_bytes = (single_segment, 2, 4, 8)[descriptor >> 6]
    blocks = [header, _exactly(source, (not single_segment) + (0, 1, 2, 4)[descriptor & 3] + content_size_bytes)]
    last = 0
    while not last:
        word = _exactly(source, 3)
        block_header = int.from_bytes(word, "little")
        last, kind, size = block_header & 1, block_header >> 1 & 3, block_header >> 3
        if size > _MAX_BLOCK_BYTES:
            raise ConvertError("a layer's zstd data is damaged: a block is too large")
        blocks += word, _exactly(source, 1 if kind == 1 else size)  # 1: one byte, repeated
        if last and descriptor & 4:
            blocks.append(_exactly(source, 4))  # the checksum of the content
        if last or len(blocks) >= 16:
            piece = decompress(b"".join(blocks))
            blocks.clear()
            if piece:
                yield piece


def _exactly(source: _Source, count: int, format: str = "zstd") -> bytes:
    data = source.take(count)
    if len(data) < count:
        raise ConvertError(f"a layer's {format} data is truncated")
    return data


def _skip(source: _Source, count: int) -> None:
    while count:
        count -= len(_exactly(source, min(count, PIECE_BYTES)))


def _zstd_backend() -> tuple[Callable[[], Callable[[bytes], bytes]], type[Exception]]:
    """A factory of "decompress the next blocks of one frame", and what it raises."""
    zstandard, stdlib = accelerators.zstandard, accelerators.stdlib_zstd
    if zstandard is not None:
        context = zstandard.ZstdDecompressor(max_window_size=1 << MAX_WINDOW_LOG)
        return (lambda: context.decompressobj().decompress), zstandard.ZstdError
    if stdlib is None:
        raise ConvertError("a layer is compressed with zstd, and nothing here can read that",
                           "install python3-zstandard, or: pip install shifterwrap[fast]")
    options = {stdlib.DecompressionParameter.window_log_max: MAX_WINDOW_LOG}
    return (lambda: stdlib.ZstdDecompressor(options=options).decompress), stdlib.ZstdError
