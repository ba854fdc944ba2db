"""The block decompressors of squashfs, bounded: ``(data, limit) -> at most limit bytes``, or ConvertError.

A block comes from a file that may be hostile or broken, so what a block's own header claims never sizes a buffer.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable
from typing import Any

from ..errors import ConvertError
from .decode import igzip_lib, stdlib_zstd, zstandard

Decompress = Callable[[bytes, int], bytes]

_XZ_MEMORY_BYTES = 64 << 20


def readable() -> frozenset[str]:
    """The compressors that this Python can undo, and so the ones that an image may be written with here."""
    names = {"gzip", "xz"}
    if zstandard is not None or stdlib_zstd() is not None:
        names.add("zstd")
    if _lz4() is not None:
        names.add("lz4")
    return frozenset(names)


def decompressor(compressor: str) -> Decompress:
    """A decompressor for one thread; ConvertError when ``compressor`` is not :func:`readable` here."""
    if compressor not in readable():
        module = {"zstd": "zstandard", "lz4": "lz4"}.get(compressor)
        raise ConvertError(f"nothing here can read squashfs that is compressed with {compressor}",
                           f"install the Python module {module}" if module else "")  # fmt: skip
    if compressor == "gzip":
        return _inflate if igzip_lib is None else _inflate_isal
    return {"xz": _unxz, "lz4": _unlz4}.get(compressor) or _unzstd()


def _damaged(detail: object) -> ConvertError:
    return ConvertError(f"the image is damaged: {detail}")


def _inflate(data: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        out = stream.decompress(data, limit)
        if not stream.eof and not stream.decompress(stream.unconsumed_tail, 1) and stream.eof:
            return out
    except zlib.error as exc:
        raise _damaged(exc) from None
    if not stream.eof:
        raise _damaged("a block is truncated or too long")
    return out


def _inflate_isal(data: bytes, limit: int) -> bytes:
    stream = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_ZLIB)
    try:
        out = stream.decompress(data, limit)
        if not stream.eof and stream.decompress(b"", 1):
            raise _damaged("a block is too long")
    except (igzip_lib.IsalError, EOFError) as exc:
        raise _damaged(exc) from None
    if not stream.eof:
        raise _damaged("a block is truncated")
    return bytes(out)


def _unxz(data: bytes, limit: int) -> bytes:
    stream = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)
    try:
        out = stream.decompress(data, limit)
        if not stream.eof and stream.decompress(b"", 1):
            raise _damaged("a block is too long")
    except (lzma.LZMAError, EOFError) as exc:
        raise _damaged(exc) from None
    if not stream.eof:
        raise _damaged("a block is truncated")
    return out


def _lz4() -> Any:
    try:
        import lz4.block  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        return None
    return lz4.block


def _unlz4(data: bytes, limit: int) -> bytes:
    block = _lz4()
    try:
        return bytes(block.decompress(data, uncompressed_size=limit))
    except block.LZ4BlockError as exc:
        raise _damaged(exc) from None


def _unzstd() -> Decompress:
    if zstandard is None:
        return _unzstd_stdlib
    context = zstandard.ZstdDecompressor(max_window_size=1 << 27)

    def unzstd(data: bytes, limit: int) -> bytes:
        try:
            if not 0 <= zstandard.frame_content_size(data) <= limit:  # it would size the buffer
                raise _damaged("a block does not say its size, or is too long")
            return bytes(context.decompress(data, limit))
        except zstandard.ZstdError as exc:
            raise _damaged(exc) from None

    return unzstd


def _unzstd_stdlib(data: bytes, limit: int) -> bytes:
    stdlib = stdlib_zstd()
    assert stdlib is not None
    stream = stdlib.ZstdDecompressor()
    try:
        out = bytes(stream.decompress(data, limit))
        if not stream.eof and stream.decompress(b"", 1):
            raise _damaged("a block is too long")
    except (stdlib.ZstdError, EOFError) as exc:
        raise _damaged(exc) from None
    if not stream.eof:
        raise _damaged("a block is truncated")
    return out
