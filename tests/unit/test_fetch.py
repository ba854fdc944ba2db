"""fetch.py against bodies that are scripts: each connection delivers pieces, then ends or breaks."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from typing import Optional, Union

import pytest

from shifterwrap import fetch
from shifterwrap.errors import DigestMismatch, RateLimited, Unreachable
from shifterwrap.events import Event
from shifterwrap.fetch import Settings, Transient
from shifterwrap.oci import Descriptor

LAYER = "application/vnd.oci.image.layer.v1.tar"
BLOB = bytes(range(256)) * 4096  # 1 MiB
BROKEN = Transient(Unreachable("broken", "hint"))
MANY = 1000

Step = Union[bytes, Exception]


def named(blob: bytes, algorithm: str = "sha256", size: Optional[int] = None) -> Descriptor:
    digest = f"{algorithm}:{hashlib.new(algorithm, blob).hexdigest()}"
    return Descriptor(LAYER, digest, len(blob) if size is None else size)


class Time:
    """A clock that moves when somebody sleeps, and jitter at its greatest."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.clock = fetch.Clock(lambda: self.now, lambda: self.now, self.sleep, lambda: 1.0)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Script:
    """A fetch.Body from a list of steps."""

    def __init__(self, start: int, steps: list[Step], total: Optional[int] = None) -> None:
        self.start, self.total, self.steps, self.closed = start, total, list(steps), False

    def read(self) -> bytes:
        step = self.steps.pop(0) if self.steps else b""
        if isinstance(step, Exception):
            raise step
        return step

    def close(self) -> None:
        self.closed = True


class Server:
    """An open_range that hands out scripts, or raises, in order; the last item serves for ever after."""

    def __init__(self, *connections: Union[Script, Exception]) -> None:
        self.connections = list(connections)
        self.starts: list[int] = []

    def __call__(self, descriptor: Descriptor, start: int) -> fetch.Body:
        self.starts.append(start)
        item = self.connections.pop(0) if len(self.connections) > 1 else self.connections[0]
        if isinstance(item, Exception):
            raise item
        return item


def pieces(blob: bytes, size: int) -> list[Step]:
    return [blob[at : at + size] for at in range(0, len(blob), size)]


def got(server: Server, descriptor: Descriptor, time: Optional[Time] = None, settings: Settings = Settings()) -> bytes:  # noqa: B008
    return b"".join(fetch.download(server, descriptor, settings=settings, clock=(time or Time()).clock))


# ---- whole bodies


@pytest.mark.parametrize("size", [100, 1000, 100_000, len(BLOB)])
def test_yields_the_bytes_in_order_and_not_in_crumbs(size: int) -> None:
    body = Script(0, pieces(BLOB, size))
    received = list(fetch.download(Server(body), named(BLOB), clock=Time().clock))
    assert b"".join(received) == BLOB
    assert all(len(piece) >= fetch.CHUNK_BYTES for piece in received[:-1])
    assert body.closed


def test_reports_each_piece_and_at_the_end_the_time() -> None:
    events: list[Event] = []
    time = Time()
    server = Server(Script(0, [BLOB[:300_000], BLOB[300_000:]]))
    for _ in fetch.download(server, named(BLOB), clock=time.clock, emit=events.append, subject="layer 1"):
        time.now += 2
    assert events == [
        Event("fetch", "layer 1", 300_000, len(BLOB)),
        Event("fetch", "layer 1", len(BLOB), len(BLOB)),
        Event("fetch", "layer 1", len(BLOB), len(BLOB), 4.0),
    ]


def test_an_empty_blob_needs_no_connection() -> None:
    server = Server(BROKEN)
    assert got(server, named(b"")) == b""
    assert server.starts == []


def test_sha512() -> None:
    assert got(Server(Script(0, [BLOB])), named(BLOB, "sha512")) == BLOB


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_wrong_digest_is_told_after_the_last_byte_and_before_the_end(algorithm: str) -> None:
    wrong = bytes([BLOB[0] ^ 1]) + BLOB[1:]
    stream = fetch.download(Server(Script(0, [wrong])), named(BLOB, algorithm), clock=Time().clock)
    assert next(stream) == wrong
    with pytest.raises(DigestMismatch, match="digest is " + algorithm) as info:
        next(stream)
    assert info.value.hint
    with pytest.raises(StopIteration):
        next(stream)


def test_no_byte_beyond_the_size_is_handed_out() -> None:
    received = []
    with pytest.raises(DigestMismatch, match="sends more bytes, the manifest says 1048576"):
        for piece in fetch.download(Server(Script(0, [BLOB, b"x"])), named(BLOB), clock=Time().clock):
            received.append(piece)
    assert b"".join(received) in (b"", BLOB)


@pytest.mark.parametrize("total", [len(BLOB) - 1, len(BLOB) + 1, 0])
def test_a_server_that_tells_another_size_is_not_read(total: int) -> None:
    body = Script(0, [BLOB], total)
    with pytest.raises(DigestMismatch, match=f"sends {total} bytes, the manifest says 1048576"):
        got(Server(body), named(BLOB))
    assert body.steps == [BLOB]
    assert body.closed


def test_a_consumer_that_stops_closes_the_connection() -> None:
    body = Script(0, pieces(BLOB, 300_000))
    stream = fetch.download(Server(body), named(BLOB), clock=Time().clock)
    assert isinstance(stream, Iterator)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert body.closed


# ---- broken bodies


@pytest.mark.parametrize("end", [[], [BROKEN]], ids=["ended", "broken"])
@pytest.mark.parametrize("at", [1, fetch.CHUNK_BYTES, fetch.CHUNK_BYTES + 1, len(BLOB) - 1])
def test_goes_on_where_the_connection_ended(at: int, end: list[Step]) -> None:
    first = Script(0, [BLOB[:at], *end])
    server = Server(first, Script(at, pieces(BLOB[at:], 70_000)))
    assert got(server, named(BLOB)) == BLOB
    assert server.starts == [0, at]
    assert first.closed


@pytest.mark.parametrize("size", [1000, 4096, 300_000, len(BLOB)])
def test_a_resumed_body_that_starts_over_is_skipped_up_to_there(size: int) -> None:
    server = Server(Script(0, [BLOB[:4096]]), Script(0, pieces(BLOB, size)))
    assert got(server, named(BLOB)) == BLOB
    assert server.starts == [0, 4096]


def test_a_restart_that_never_reaches_new_bytes_gives_up() -> None:
    time = Time()
    server = Server(*(Script(0, [BLOB[:4096]]) for _ in range(MANY)))
    with pytest.raises(Unreachable, match="the connection ended before byte 1048576"):
        got(server, named(BLOB), time)
    assert len(server.starts) == 1 + Settings().retries


def test_a_break_after_the_last_byte_does_not_matter() -> None:
    time = Time()
    assert got(Server(Script(0, [BLOB, BROKEN])), named(BLOB), time) == BLOB
    assert time.slept == []


def test_backs_off_twice_as_long_each_time_up_to_a_cap() -> None:
    time = Time()
    with pytest.raises(Unreachable, match="broken"):
        got(Server(BROKEN), named(BLOB), time, Settings(retries=6, backoff_seconds=1, backoff_cap_seconds=10))
    assert time.slept == [1, 2, 4, 8, 10, 10]


def test_jitter_halves_a_wait_at_most() -> None:
    time = Time()
    with pytest.raises(Unreachable):
        list(fetch.download(Server(BROKEN), named(BLOB), clock=time.clock._replace(jitter=lambda: 0.0)))
    assert time.slept == [0.25, 0.5, 1, 2, 4]


def test_progress_earns_new_retries() -> None:
    blob = bytes(12 << 20)
    step = fetch.PROGRESS_BYTES
    bodies = [Script(at, [blob[at : at + step], BROKEN]) for at in range(0, len(blob), step)]
    time = Time()
    assert got(Server(*bodies), named(blob), time) == blob
    assert time.slept == [0.5] * 11


def test_crumbs_are_no_progress() -> None:
    server = Server(*(Script(at, [BLOB[at : at + 1], BROKEN]) for at in range(MANY)))
    with pytest.raises(Unreachable, match="broken"):
        got(server, named(BLOB))
    assert len(server.starts) == 1 + Settings().retries


def test_old_progress_earns_nothing() -> None:
    server = Server(Script(0, [bytes(2 << 20), BROKEN]), *[BROKEN] * MANY)
    with pytest.raises(Unreachable, match="broken"):
        got(server, named(bytes(3 << 20)))
    assert len(server.starts) == 1 + Settings().retries


def test_waits_as_long_as_the_server_asks() -> None:
    time = Time()
    server = Server(Transient(RateLimited("slow down"), 20.0), Script(0, [BLOB]))
    assert got(server, named(BLOB), time) == BLOB
    assert time.slept == [20.5]


def test_does_not_wait_longer_than_the_cap() -> None:
    time = Time()
    with pytest.raises(RateLimited):
        got(Server(Transient(RateLimited("slow down"), 61.0)), named(BLOB), time)
    assert time.slept == []


def test_does_not_sleep_past_the_deadline() -> None:
    time = Time()
    with pytest.raises(Unreachable, match="broken"):
        got(Server(BROKEN), named(BLOB), time, Settings(retries=MANY, backoff_cap_seconds=1, deadline=1010.0))
    assert 1009 <= time.now < 1010


def test_a_trickle_ends_at_the_deadline() -> None:
    time = Time()

    class Trickle(Script):
        def read(self) -> bytes:
            time.now += 25
            return b"\0"

    body = Trickle(0, [])
    with pytest.raises(Unreachable, match="the deadline of the pull passed after 4 of 1048576 bytes") as info:
        got(Server(body), named(bytes(len(BLOB))), time, Settings(deadline=1100.0))
    assert "pull_deadline" in info.value.hint
    assert body.closed


def test_what_no_retry_cures_is_not_retried() -> None:
    time = Time()
    with pytest.raises(RateLimited):
        got(Server(RateLimited("no")), named(BLOB), time)
    assert time.slept == []


def test_the_cause_of_a_fault_stays_out_of_sight() -> None:
    """Messages of HTTP libraries hold URLs, and those can be signed secrets."""
    with pytest.raises(Unreachable) as info:
        got(Server(BROKEN), named(BLOB))
    assert info.value.__cause__ is None
    assert info.value.__suppress_context__


def test_many_threads_at_once() -> None:
    blobs = [bytes([number]) * (fetch.CHUNK_BYTES + number) for number in range(8)]
    results: dict[int, bytes] = {}

    def work(number: int) -> None:
        half = len(blobs[number]) // 2
        server = Server(Script(0, [blobs[number][:half]]), Script(half, pieces(blobs[number][half:], 1000)))
        results[number] = got(server, named(blobs[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number] for number in range(8)] == blobs


# ---- attempt


def test_attempt_returns_what_finally_works() -> None:
    time = Time()
    outcomes: list[Union[Exception, int]] = [BROKEN, BROKEN, 7]

    def work() -> int:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert fetch.attempt(work, clock=time.clock) == 7
    assert time.slept == [0.5, 1.0]


def test_attempt_gives_up_with_the_fault() -> None:
    def work() -> int:
        raise BROKEN

    with pytest.raises(Unreachable) as info:
        fetch.attempt(work, clock=Time().clock)
    assert info.value is BROKEN.fault
