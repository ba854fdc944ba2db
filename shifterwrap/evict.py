"""Which entries must go: pure, over what the cache tells about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MIN_AGE_SECONDS = 120.0  # the job that an entry was pulled for has not leased it yet


class Candidate(NamedTuple):
    """What deciding needs to know of one entry; times in seconds since the epoch."""

    name: str
    bytes: int
    last_used: float
    kept: bool  # pinned, or leased by a running job


def victims(candidates: Sequence[Candidate], need_bytes: int, now: float) -> list[Candidate]:
    """The entries to remove so that ``need_bytes`` more become free, least recently used first.

    Fewer than that when the rest is kept or younger than MIN_AGE_SECONDS; none when nothing is needed.
    """
    chosen = []
    for candidate in sorted(candidates, key=lambda item: (item.last_used, item.name)):
        if need_bytes <= 0:
            break
        if not candidate.kept and not 0 <= now - candidate.last_used < MIN_AGE_SECONDS:
            chosen.append(candidate)
            need_bytes -= candidate.bytes
    return chosen
