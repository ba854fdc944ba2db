"""No room left: the fault that both writers must tell from all others, and say where."""

from __future__ import annotations

import errno
import os

from ..errors import CacheFull

FULL = (errno.ENOSPC, errno.EDQUOT)


def no_room(path: str) -> CacheFull:
    """The error for a write to ``path`` that found its file system, or the user's share of it, full."""
    place = os.path.dirname(os.path.abspath(path))
    while not os.path.ismount(place):
        place = os.path.dirname(place)
    return CacheFull(f"no room left on {place} for {path}")
