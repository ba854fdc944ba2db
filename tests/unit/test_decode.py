"""The layer decoder: told by magic, bounded output, and an error for whatever is cut off or appended."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import zlib

import pytest

from shifterwrap.convert import accelerators
from shifterwrap.convert.decode import PIECE_BYTES, decode
from shifterwrap.errors import ConvertError
from tests.unit.tarbuild import pieces

zstandard = pytest.importorskip("zstandard") if accelerators.stdlib_zstd is None else None
DATA = bytes(range(256)) * 9000 + random.Random(1).randbytes(300_000) + bytes(2_000_000)


@pytest.fixture(params=["isal", "zlib"])
def inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "zlib":
        monkeypatch.setattr(accelerators, "igzip_lib", None)
    elif accelerators.igzip_lib is None:
        pytest.skip("isal is not installed")
