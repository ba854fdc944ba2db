"""Events as people see them: a live line per layer and a total on a terminal, one line per stage in a batch log."""

from __future__ import annotations

import threading
import time
from typing import TextIO

from .errors import one_line
from .events import Event

_REFRESH_SECONDS = 0.1
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_STAGES = ("resolve", "fetch", "convert", "verify", "commit")


def size(count: float) -> str:
    """Bytes as people read them."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 or count >= 100 else f"{count:.1f} {_UNITS[unit]}"


def _write(stream: TextIO, text: str) -> None:
    """Write where somebody may have stopped reading: progress that nobody sees must not end a pull."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        pass


class Progress:
    """A listener for events that writes to ``stream``. Safe to call from several threads."""

    def __init__(self, prog: str, subject: str, stream: TextIO, *, verbose: bool = False, quiet: bool = False) -> None:
        self._prog, self._subject, self._stream = prog, subject, stream
        self._live = stream.isatty() and not quiet
        self._verbose, self._quiet = verbose, quiet
        self._lock = threading.Lock()
        self._began = self._drawn = time.monotonic()
        self._lines: dict[str, tuple[Event, float]] = {}
        self._height = 0
        self._stage = ""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        with self._lock:
            if event.stage == "warn":
                self._print(f"warning: {one_line(event.subject)}")
            elif self._live:
                self._update(event)
            elif not self._quiet:
                self._log(event)
            if self._verbose and event.seconds and not event.subject:
                self._print(f"{event.stage}: {event.seconds:.2f} s")

    def close(self) -> None:
        """Leave the terminal clean."""
        with self._lock:
            self._erase()
            self._lines.clear()

    def _log(self, event: Event) -> None:
        """One line when a stage begins; stages of layers overlap, so only a later one counts as new."""
        order = _STAGES.index(event.stage) if event.stage in _STAGES else -1
        if order > (_STAGES.index(self._stage) if self._stage else -1):
            self._stage = event.stage
            total = f" ({size(event.total)})" if event.total and event.stage == "convert" else ""
            self._print(f"{event.stage} {self._subject}{total}")

    def _update(self, event: Event) -> None:
        name = f"{event.stage} {event.subject}".strip()
        now = time.monotonic()
        began = self._lines[name][1] if name in self._lines else now
        if event.seconds and not event.subject:  # the stage is over, and its lines with it
            self._lines = {key: line for key, line in self._lines.items() if line[0].stage != event.stage}
        else:
            self._lines[name] = (event, began)
        if now - self._drawn >= _REFRESH_SECONDS or event.seconds:
            self._drawn = now
            self._draw(now)

    def _draw(self, now: float) -> None:
        lines = [self._line(name, event, now - began) for name, (event, began) in self._lines.items()]
        fetches = [event for event, _ in self._lines.values() if event.stage == "fetch" and event.total]
        if len(fetches) > 1:
            done, total = sum(event.done for event in fetches), sum(event.total for event in fetches)
            lines.append(f"  total {size(done)} of {size(total)}, {now - self._began:.0f} s")
        self._erase()
        _write(self._stream, "".join(f"{line[:100]}\n" for line in lines))
        self._height = len(lines)

    def _line(self, name: str, event: Event, elapsed: float) -> str:
        of = f" of {size(event.total)}" if event.total else ""
        rate = f", {size(event.done / elapsed)}/s" if elapsed > 0.5 and event.done and not event.seconds else ""
        end = f", {event.seconds:.1f} s" if event.seconds else ""
        return f"  {name:<28} {size(event.done)}{of}{rate}{end}" if event.done or event.total else f"  {name}{end}"

    def _print(self, text: str) -> None:
        self._erase()
        _write(self._stream, f"{self._prog}: {text}\n")

    def _erase(self) -> None:
        if self._height:
            _write(self._stream, f"\x1b[{self._height}A\x1b[J")
            self._height = 0


class Waiting:
    """What a waiter prints of another process's pull, from that process's record."""

    def __init__(self, prog: str, subject: str, stream: TextIO) -> None:
        self._prog, self._subject, self._stream = prog, subject, stream
        self._live = stream.isatty()
        self._drawn = time.monotonic() + 0.5  # a wait shorter than that is not worth a word
        self._told = False

    def __call__(self, record: dict[str, object]) -> None:
        """Take the record as it is now."""
        now = time.monotonic()
        if now < self._drawn:
            return
        done, total = record.get("done", 0), record.get("total", 0)
        amount = f", {size(float(str(done)))} of {size(float(str(total)))}" if total else ""
        text = f"waiting for process {record.get('pid', '?')} to pull {self._subject}"
        if self._live:
            _write(self._stream, f"\r\x1b[K  {text}: {record.get('stage', '')}{amount}"[:110])
            self._drawn = now + 0.2
        elif not self._told:
            _write(self._stream, f"{self._prog}: {text}\n")
            self._drawn = now + 60.0
        self._told = True

    def close(self) -> None:
        """Leave the terminal clean."""
        if self._live and self._told:
            _write(self._stream, "\r\x1b[K")
