"""The block decompressors of squashfs, bounded: ``(data, limit) -> at most limit bytes``, or ConvertError.

A block comes from a file that may be hostile or broken, so what a block's own header claims never sizes a buffer.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable
from typing import Any

from ..errors import ConvertError
from . import accelerators
from .decode import MAX_WINDOW_LOG

Decompress = Callable[[bytes, int], bytes]

_XZ_MEMORY_BYTES = 64 << 20


def readable() -> frozenset[str]:
    """The compressors that this Python can undo, and so the ones that an image may be written with here."""
    names = {"gzip", "xz"}
    if accelerators.zstandard is not None or accelerators.stdlib_zstd is not None:
        names.add("zstd")
    if accelerators.lz4_block is not None:
        names.add("lz4")
    return frozenset(names)


def decompressor(compressor: str) -> Decompress:
    """A decompressor for one thread; ConvertError when ``compressor`` is not :func:`readable` here."""
    if compressor not in readable():
        module = {"zstd": "zstandard", "lz4": "lz4"}.get(compressor)
        raise ConvertError(f"nothing here can read squashfs that is compressed with {compressor}",
                           f"install the Python module {module}" if module else "")
    if compressor == "zstd":
        return _unzstd_stdlib if accelerators.zstandard is None else _unzstd()
    if compressor == "gzip":
        return _inflate if accelerators.igzip_lib is None else _inflate_isal
    return _unxz if compressor == "xz" else _unlz4


def damaged(detail: object) -> ConvertError:
    """The error for a squashfs file that is not what it should be."""
    return ConvertError(f"the squashfs file is damaged: {detail}", "remove the image and pull it again")


def _whole(stream: Any, data: bytes, limit: int, fault: type[Exception]) -> bytes:
    """All of ``data``'s content from a decompressor object as of bz2 and lzma."""
    try:
        out = bytes(stream.decompress(data, limit))
        if not stream.eof and stream.decompress(b"", 1):  # the end may be all that is missing
            raise damaged("a block is too long")
    except (fault, EOFError) as exc:
        raise damaged(exc) from None
    if not stream.eof or stream.unused_data:
        raise damaged("a block has the wrong length")
    return out


def _inflate(data: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        out = stream.decompress(data, limit)
        if not stream.eof and stream.decompress(stream.unconsumed_tail, 1):
            raise damaged("a block is too long")
    except zlib.error as exc:
        raise damaged(exc) from None
    if not stream.eof or stream.unused_data:
        raise damaged("a block has the wrong length")
    return out


def _inflate_isal(data: bytes, limit: int) -> bytes:
    isal = accelerators.igzip_lib
    return _whole(isal.IgzipDecompressor(flag=isal.DECOMP_ZLIB), data, limit, isal.IsalError)


def _unxz(data: bytes, limit: int) -> bytes:
    stream = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)
    return _whole(stream, data, limit, lzma.LZMAError)


def _unlz4(data: bytes, limit: int) -> bytes:
    block = accelerators.lz4_block
    try:
        return bytes(block.decompress(data, uncompressed_size=limit))
    except block.LZ4BlockError as exc:
        raise damaged(exc) from None


def _unzstd() -> Decompress:
    zstandard = accelerators.zstandard
    context = zstandard.ZstdDecompressor(max_window_size=1 << MAX_WINDOW_LOG)

    def unzstd(data: bytes, limit: int) -> bytes:
        try:
            size = zstandard.frame_content_size(data)  # it would size the buffer
            if size > limit:
                raise damaged("a block is too long")
            return bytes(context.decompress(data, limit))
        except zstandard.ZstdError as exc:
            raise damaged(exc) from None

    return unzstd


def _unzstd_stdlib(data: bytes, limit: int) -> bytes:
    stdlib = accelerators.stdlib_zstd
    return _whole(stdlib.ZstdDecompressor(), data, limit, stdlib.ZstdError)
