"""Places that images come from, one module each.

A source is made from a reference and implements ``resolve(platform) -> Resolved`` and, as a
:data:`shifterwrap.fetch.OpenRange`, ``open_range(descriptor, start)``; pull.py composes the rest.
"""

from __future__ import annotations

from typing import NamedTuple

from ..oci import ImageConfig, Manifest


class Resolved(NamedTuple):
    """What a reference stands for on one platform, at one moment.

    ``source_digest`` is of the index or manifest that the reference names and tells whether a tag moved;
    ``manifest.digest`` is of the one platform's manifest. Both bodies are as received, byte for byte.
    """

    source_digest: str
    manifest: Manifest
    config: ImageConfig
    manifest_bytes: bytes
    config_bytes: bytes
