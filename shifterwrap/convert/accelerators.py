"""The optional modules, each None where it is not installed: the extra ``fast``, lz4, and Python 3.14's zstd.

Whoever uses one looks it up here when it needs it, so that both ways can be tested in one interpreter.
"""

from __future__ import annotations

import importlib
import zlib
from typing import Any


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


igzip_lib = _optional("isal.igzip_lib")
zstandard = _optional("zstandard")
stdlib_zstd = _optional("compression.zstd")
lz4_block = _optional("lz4.block")

_isal_zlib = _optional("isal.isal_zlib")
crc32 = zlib.crc32 if _isal_zlib is None else _isal_zlib.crc32  # 1 GB/s, or 10
