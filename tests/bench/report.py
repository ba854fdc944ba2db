"""The lines of the comparison, the table they are printed as, and the verdicts."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

HEADINGS = ("ROW", "WHAT", "OURS", "PEER", "RATIO", "TARGET", "")


class Line(NamedTuple):
    """One comparison. `ok` is None where there is no target; a `fatal` one that is not ok fails the whole run."""

    row: str
    what: str
    ours: str
    peer: str = ""
    ratio: float | None = None
    target: str = ""
    ok: bool | None = None
    fatal: bool = False
    numbers: dict[str, Any] = {}

    @property
    def verdict(self) -> str:
        """What the last column says."""
        return "" if self.ok is None else "ok" if self.ok else "MISS"


def compared(row: str, what: str, ours: Sequence[float], peer: Sequence[float], most: float | None = None) -> Line:
    """The ratio of two medians of seconds; at most `most`, where that is wanted."""
    mine, theirs = statistics.median(ours), statistics.median(peer)
    ratio = mine / theirs
    numbers = {"ours_s": list(ours), "peer_s": list(peer), "most": most}
    target = f"<= {most:g}" if most else ""
    return Line(
        row, what, _seconds(mine), _seconds(theirs), ratio, target, ratio <= most if most else None, False, numbers
    )


def limited(row: str, what: str, value: float, unit: str, most: float | None = None, peer: float | None = None) -> Line:
    """A figure of ours that may be at most `most`, beside the peer's where there is one."""
    numbers = {"ours": value, "peer": peer, "unit": unit, "most": most}
    theirs = f"{peer:.0f} {unit}" if peer is not None else ""
    ratio = value / peer if peer else None
    target, ok = (f"<= {most:g} {unit}", value <= most) if most else ("", None)
    return Line(row, what, f"{value:.{0 if value >= 100 else 1}f} {unit}", theirs, ratio, target, ok, False, numbers)


def required(row: str, what: str, got: str, wanted: str, peer: str = "", **numbers: Any) -> Line:
    """A matter of correctness: anything but `wanted` fails the run."""
    return Line(row, what, got, peer, None, wanted, got == wanted, True, numbers)


def noted(row: str, what: str, ours: str, peer: str = "", **numbers: Any) -> Line:
    """For information."""
    return Line(row, what, ours, peer, numbers=numbers)


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def table(lines: Sequence[Line]) -> str:
    """The lines as people read them."""
    cells = [HEADINGS, *map(_cells, lines)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in cells)


def _cells(line: Line) -> tuple[str, ...]:
    ratio = "" if line.ratio is None else f"{line.ratio:.3f}"
    return (line.row, line.what, line.ours, line.peer, ratio, line.target, line.verdict)


def write(path: str, lines: Sequence[Line], *, quick: bool) -> None:
    """Every figure, and on what machine it was measured."""
    machine = {"kernel": platform.release(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()}
    document = {
        "quick": quick,
        "machine": machine,
        "lines": [{**line._asdict(), "verdict": line.verdict} for line in lines],
    }
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(document, stream, indent=1)
