"""progress.py on a terminal that remembers what was drawn, and in a batch log."""

from __future__ import annotations

import io
import re
from typing import Optional

import pytest

from shifterwrap import progress
from shifterwrap.events import Event
from shifterwrap.progress import Progress, Waiting, size

MIB = 1 << 20


class Clock:
    """Stands for the module time; moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Stream(io.StringIO):
    def __init__(self, tty: bool) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty

    def screen(self) -> list[str]:
        """The lines that a terminal would show now."""
        lines, row = [""], 0
        for piece in re.split(r"(\x1b\[\d*[AJK]|\r|\n)", self.getvalue()):
            if piece == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif piece == "\r" or piece == "\x1b[K":
                lines[row] = ""
            elif piece == "\x1b[J":
                lines[row:] = [""]
            elif re.fullmatch(r"\x1b\[\d+A", piece):
                row -= int(piece[2:-1])
                assert row >= 0
            else:
                lines[row] += piece
        return lines[:-1] if lines[-1] == "" else lines


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (100 << 10, "100 KiB"),
     (MIB, "1.0 MiB"), (289 * MIB, "289 MiB"), (1 << 30, "1.0 GiB"), (5 << 40, "5.0 TiB"), (5000 << 40, "5000 TiB")],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


PULL = [
    Event("resolve"),
    Event("resolve", seconds=0.1),
    Event("fetch", "sha256:aaaa", 1 * MIB, 4 * MIB),
    Event("fetch", "sha256:bbbb", 2 * MIB, 8 * MIB),
    Event("fetch", "sha256:aaaa", 4 * MIB, 4 * MIB, 0.5),
    Event("fetch", "sha256:bbbb", 8 * MIB, 8 * MIB, 0.6),
    Event("fetch", "", 12 * MIB, 12 * MIB, 1.0),
    Event("convert", "", 5 * MIB, 30 * MIB),
    Event("convert", "", 30 * MIB, 30 * MIB, 2.0),
    Event("verify", "", 30 * MIB, 30 * MIB, 0.25),
    Event("commit", seconds=3.5),
]


def listened(stream: Stream, events: list[Event], verbose: bool = False, quiet: bool = False) -> Progress:
    listener = Progress("prog", "docker://x:1", stream, verbose=verbose, quiet=quiet)
    for event in events:
        listener(event)
    return listener


def test_a_log_has_one_line_for_each_stage(clock: Clock) -> None:
    stream = Stream(tty=False)
    listened(stream, PULL).close()
    assert stream.getvalue().splitlines() == [
        "prog: resolve docker://x:1", "prog: fetch docker://x:1", "prog: convert docker://x:1 (30.0 MiB)",
        "prog: verify docker://x:1", "prog: commit docker://x:1",
    ]


def test_a_log_never_goes_back_a_stage(clock: Clock) -> None:
    """Layers overlap: one is still fetched while another is converted."""
    stream = Stream(tty=False)
    listened(stream, [Event(stage) for stage in ("convert", "fetch", "convert", "wait", "commit")])
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["convert", "commit"]


def test_seconds_of_stages_with_verbose(clock: Clock) -> None:
    stream = Stream(tty=False)
    listened(stream, PULL, verbose=True)
    timings = [line for line in stream.getvalue().splitlines() if line.endswith(" s")]
    assert timings == ["prog: resolve: 0.10 s", "prog: fetch: 1.00 s", "prog: convert: 2.00 s", "prog: verify: 0.25 s",
                       "prog: commit: 3.50 s"]


@pytest.mark.parametrize("tty", [False, True])
def test_warnings_are_one_printable_line(clock: Clock, tty: bool) -> None:
    stream = Stream(tty)
    listened(stream, [Event("warn", "a\nb\x1b[2J")], quiet=True).close()
    assert stream.getvalue() == "prog: warning: a b?[2J\n"


@pytest.mark.parametrize("tty", [False, True])
def test_quiet_says_nothing(clock: Clock, tty: bool) -> None:
    stream = Stream(tty)
    listened(stream, PULL, quiet=True).close()
    assert stream.getvalue() == ""


def test_a_terminal_shows_layers_and_a_total(clock: Clock) -> None:
    stream = Stream(tty=True)
    listener = listened(stream, PULL[:3])
    clock.now += 2
    listener(PULL[3])
    listener(Event("fetch", "sha256:aaaa", 2 * MIB, 4 * MIB))
    clock.now += 2
    listener(Event("fetch", "sha256:aaaa", 3 * MIB, 4 * MIB))
    first, second, total = stream.screen()
    assert first.split() == ["fetch", "sha256:aaaa", "3.0", "MiB", "of", "4.0", "MiB,", "768", "KiB/s"]
    assert second.split() == ["fetch", "sha256:bbbb", "2.0", "MiB", "of", "8.0", "MiB,", "1.0", "MiB/s"]
    assert total.strip() == "total 5.0 MiB of 12.0 MiB, 4 s"


def test_a_terminal_is_clean_at_the_end(clock: Clock) -> None:
    stream = Stream(tty=True)
    listener = Progress("prog", "docker://x:1", stream)
    for event in PULL:
        clock.now += 1
        listener(event)
    listener.close()
    assert stream.screen() == []
    listener.close()
    assert stream.screen() == []


def test_messages_stand_above_the_live_lines(clock: Clock) -> None:
    stream = Stream(tty=True)
    listener = listened(stream, PULL[:2])
    for _ in range(2):
        clock.now += 1
        listener(PULL[2])
        listener(Event("warn", "careful"))
        clock.now += 1
        listener(PULL[3])
    *messages, first, second, total = stream.screen()
    assert messages == ["prog: warning: careful"] * 2
    assert ("aaaa" in first, "bbbb" in second, "total" in total) == (True, True, True)


def test_a_terminal_is_not_drawn_for_each_chunk(clock: Clock) -> None:
    stream = Stream(tty=True)
    listener = listened(stream, PULL[:2])
    clock.now += 1
    before = len(stream.getvalue())
    listener(Event("fetch", "sha256:aaaa", 1, 1000))
    drawn = len(stream.getvalue())
    for done in range(2, 1000):
        listener(Event("fetch", "sha256:aaaa", done, 1000))
    assert before < drawn == len(stream.getvalue())


def test_a_stage_that_is_over_leaves_the_screen(clock: Clock) -> None:
    stream = Stream(tty=True)
    listener = Progress("prog", "docker://x:1", stream)
    for event in PULL[:8]:
        clock.now += 1
        listener(event)
    assert [line.split()[0] for line in stream.screen()] == ["convert"]


class Broken(Stream):
    """A terminal that went away."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("tty", [False, True])
def test_a_terminal_that_went_away_ends_no_pull(clock: Clock, tty: bool) -> None:
    stream = Broken(tty)
    listener = Progress("prog", "x", stream, verbose=True)
    waiting = Waiting("prog", "x", stream)
    for event in [*PULL, Event("warn", "w")]:
        clock.now += 1
        listener(event)
        waiting({"pid": 1})
    listener.close()
    waiting.close()


@pytest.mark.parametrize("closed", [True, False])
def test_a_closed_stream_ends_no_pull(clock: Clock, closed: bool) -> None:
    stream = Stream(tty=False)
    listener = Progress("prog", "x", stream)
    if closed:
        stream.close()
    for event in PULL:
        listener(event)
    assert closed or stream.getvalue()


# ---- waiting for somebody else's pull

RECORD: dict[str, object] = {"pid": 77, "stage": "fetch", "done": MIB, "total": 4 * MIB}


def waited(stream: Stream, clock: Clock, seconds: list[float], record: Optional[dict[str, object]] = None) -> Waiting:
    waiting = Waiting("prog", "x:1", stream)
    for step in seconds:
        clock.now += step
        waiting(RECORD if record is None else record)
    return waiting


@pytest.mark.parametrize("tty", [False, True])
def test_a_short_wait_is_not_worth_a_word(clock: Clock, tty: bool) -> None:
    stream = Stream(tty)
    waited(stream, clock, [0.1, 0.1, 0.2]).close()
    assert stream.getvalue() == ""


def test_a_long_wait_is_told_once_in_a_log(clock: Clock) -> None:
    stream = Stream(tty=False)
    waited(stream, clock, [1.0] * 200).close()
    assert stream.getvalue() == "prog: waiting for process 77 to pull x:1\n"


def test_a_wait_is_live_on_a_terminal(clock: Clock) -> None:
    stream = Stream(tty=True)
    waiting = waited(stream, clock, [1.0, 0.05, 1.0])
    assert stream.screen() == ["  waiting for process 77 to pull x:1: fetch, 1.0 MiB of 4.0 MiB"]
    assert stream.getvalue().count("waiting") == 2
    waiting.close()
    assert stream.screen() == []


def test_a_wait_without_a_record(clock: Clock) -> None:
    stream = Stream(tty=True)
    waited(stream, clock, [1.0], {})
    assert stream.screen() == ["  waiting for process ? to pull x:1: "]
