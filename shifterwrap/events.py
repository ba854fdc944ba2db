"""One stream of events for whatever wants to know how a pull goes: progress lines, ``-v``, metrics, records.

A stage reports through the ``emit`` that it was given and knows nothing about who listens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Event(NamedTuple):
    """One step forward.

    ``stage`` is resolve, fetch, convert, verify, commit, wait or warn; ``subject`` tells layers apart (a short
    digest) or carries the text of a warning; ``done`` and ``total`` are bytes (total 0: not known);
    ``seconds`` is the time that the stage took, set on its last event only (0.0 before).
    """

    stage: str
    subject: str = ""
    done: int = 0
    total: int = 0
    seconds: float = 0.0


Emit = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener for callers who do not listen."""
