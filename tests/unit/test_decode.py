"""The layer decoder: told by magic, bounded output, and an error for whatever is cut off or appended."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import struct
import zlib
from typing import Any

import pytest

from shifterwrap.convert import accelerators
from shifterwrap.convert.decode import PIECE_BYTES, decode
from shifterwrap.errors import ConvertError
from tests.unit.tarbuild import pieces

DATA = bytes(range(256)) * 9000 + random.Random(1).randbytes(300_000) + bytes(2_000_000)
GZIP = gzip.compress(DATA, 6, mtime=0)


@pytest.fixture(params=["isal", "zlib"])
def inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "zlib":
        monkeypatch.setattr(accelerators, "igzip_lib", None)
    elif accelerators.igzip_lib is None:
        pytest.skip("isal is not installed")


@pytest.fixture
def zstd() -> Any:
    return pytest.importorskip("zstandard")


def decoded(blob: bytes, chunk: int = 1 << 16) -> bytes:
    out = list(decode(pieces(blob, chunk)))
    assert all(0 < len(piece) <= PIECE_BYTES for piece in out)
    return b"".join(out)


# ---- plain


@pytest.mark.parametrize("data", [b"", b"x", b"\x1f", b"plain tar " * 500_000])
def test_plain_bytes_pass(data: bytes) -> None:
    assert decoded(data) == data
    assert decoded(data, 1 << 24) == data


@pytest.mark.parametrize(("blob", "name"), [(lzma.compress(b"x"), "xz"), (bz2.compress(b"x"), "bzip2")])
def test_other_compressions_are_named(blob: bytes, name: str) -> None:
    with pytest.raises(ConvertError, match=f"compressed with {name}"):
        decode([blob])


# ---- gzip


@pytest.mark.usefixtures("inflater")
@pytest.mark.parametrize("chunk", [997, 1 << 16, 1 << 24])
def test_gzip(chunk: int) -> None:
    assert decoded(GZIP, chunk) == DATA


@pytest.mark.usefixtures("inflater")
def test_gzip_of_nothing_and_byte_by_byte() -> None:
    assert decoded(gzip.compress(b""), 1) == b""
    assert decoded(gzip.compress(b"abc" * 100), 1) == b"abc" * 100


@pytest.mark.usefixtures("inflater")
def test_F31_concatenated_gzip_members() -> None:
    blob = gzip.compress(b"") + GZIP + gzip.compress(b"tail")
    assert decoded(blob) == DATA + b"tail"
    assert decoded(gzip.compress(b"a") * 500, 7) == b"a" * 500


@pytest.mark.usefixtures("inflater")
@pytest.mark.parametrize("chunk", [1, 1 << 16])
def test_F31_gzip_with_trailing_zeros(chunk: int) -> None:
    blob = gzip.compress(b"data")
    assert decoded(blob + bytes(5000), chunk) == b"data"
    assert decoded(blob + bytes(5000) + blob, chunk) == b"datadata"


@pytest.mark.usefixtures("inflater")
@pytest.mark.parametrize("tail", [b"garbage", bytes(10) + b"garbage", b"\x1f"])
def test_F31_gzip_with_trailing_garbage_is_refused_as_by_go(tail: bytes) -> None:
    with pytest.raises(ConvertError, match="data after its gzip data"):
        decoded(gzip.compress(b"data") + tail)


@pytest.mark.usefixtures("inflater")
@pytest.mark.parametrize("keep", [3, 9, 20, len(GZIP) // 2, len(GZIP) - 9, len(GZIP) - 1])
def test_truncated_gzip(keep: int) -> None:
    with pytest.raises(ConvertError, match="truncated"):
        decoded(GZIP[:keep])


@pytest.mark.usefixtures("inflater")
@pytest.mark.parametrize("at", [2, 3, len(GZIP) - 6, len(GZIP) - 1])
def test_damaged_gzip(at: int) -> None:
    bad = bytearray(GZIP)
    bad[at] ^= 0xE5
    with pytest.raises(ConvertError, match=r"damaged|truncated"):
        decoded(bytes(bad))
    if at > len(GZIP) // 2:
        with pytest.raises(ConvertError, match=r"damaged|truncated"):
            decoded(bytes(bad), 1)


@pytest.mark.usefixtures("inflater")
def test_gzip_with_every_optional_field() -> None:
    deflated = zlib.compress(b"data")[2:-4]
    head = b"\x1f\x8b\x08\x1e" + bytes(6) + struct.pack("<H", 3) + b"ext" + b"name\0" + b"comment\0" + b"hc"
    blob = head + deflated + struct.pack("<II", zlib.crc32(b"data"), 4)
    assert decoded(blob * 3) == decoded(blob * 3, 1) == b"data" * 3


@pytest.mark.usefixtures("inflater")
def test_F36_a_gzip_bomb_comes_out_in_bounded_pieces() -> None:
    blob = gzip.compress(bytes(64 << 20))
    stream = decode([blob])
    assert len(next(stream)) <= PIECE_BYTES
    assert sum(len(piece) for piece in stream) + PIECE_BYTES == 64 << 20


# ---- zstd


@pytest.mark.parametrize("chunk", [997, 1 << 16, 1 << 24])
def test_zstd(zstd: Any, chunk: int) -> None:
    for options in ({}, {"write_checksum": True}, {"write_content_size": False}):
        assert decoded(zstd.ZstdCompressor(level=3, **options).compress(DATA), chunk) == DATA


def test_zstd_streamed_and_of_nothing(zstd: Any) -> None:
    stream = zstd.ZstdCompressor(write_checksum=True).compressobj()
    assert decoded(b"".join([stream.compress(DATA), stream.flush()])) == DATA
    assert decoded(zstd.ZstdCompressor().compress(b""), 1) == b""


def test_F31_zstd_with_many_and_skippable_frames(zstd: Any) -> None:
    frame = zstd.ZstdCompressor().compress
    skip = struct.pack("<II", 0x184D2A57, 5000) + bytes(5000)
    assert decoded(skip + frame(b"one") + skip + frame(b"two") + skip, 11) == b"onetwo"
    assert decoded(struct.pack("<II", 0x184D2A50, 0)) == b""


def test_truncated_zstd(zstd: Any) -> None:
    blob = zstd.ZstdCompressor(write_checksum=True).compress(DATA)
    for keep in (4, 5, 8, 100, len(blob) // 2, len(blob) - 4, len(blob) - 1):
        with pytest.raises(ConvertError, match="truncated"):
            decoded(blob[:keep])
    with pytest.raises(ConvertError, match="truncated"):
        decoded(blob + struct.pack("<II", 0x184D2A50, 9) + b"short")


def test_damaged_zstd(zstd: Any) -> None:
    blob = zstd.ZstdCompressor(write_checksum=True).compress(DATA)
    with pytest.raises(ConvertError, match="data after its zstd data"):
        decoded(blob + b"garbage")
    for at in (20, len(blob) // 2, len(blob) - 1):
        bad = bytearray(blob)
        bad[at] ^= 0x55
        with pytest.raises(ConvertError, match="zstd data"):
            decoded(bytes(bad))


def test_F36_a_zstd_bomb_comes_out_in_bounded_pieces(zstd: Any) -> None:
    block = (128 << 10 << 3 | 2).to_bytes(3, "little") + b"\0"  # RLE: 4 bytes make 128 KiB
    blob = struct.pack("<I", 0xFD2FB528) + b"\0\x38" + block * 1000 + (1 | 2).to_bytes(3, "little") + b"\0"
    assert max(map(len, decode([blob]))) <= PIECE_BYTES
    assert len(decoded(blob)) == 128_000 << 10


def test_F36_a_huge_zstd_window_is_refused(zstd: Any) -> None:
    with pytest.raises(ConvertError, match="damaged"):
        decoded(struct.pack("<I", 0xFD2FB528) + b"\0\xa8" + b"\x01\0\0" * 5)  # a window of 2 GiB


def test_zstd_without_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "zstandard", None)
    monkeypatch.setattr(accelerators, "stdlib_zstd", None)
    with pytest.raises(ConvertError) as caught:
        list(decode([b"\x28\xb5\x2f\xfd" + bytes(100)]))
    assert "shifterwrap[fast]" in caught.value.hint
