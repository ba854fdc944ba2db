"""The bytes of one blob, in order and verified: resumes where a connection broke, backs off, gives up with the reason.

Knows no HTTP. A source's ``open_range`` hands over a :class:`Body`; it, or the body, raises :class:`Transient` for
what another attempt may cure and an :class:`~shifterwrap.errors.Error` for what none will. Nothing here is shared
between calls, so any number of threads may download at once.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import NamedTuple, Optional, Protocol, TypeVar

from .errors import DigestMismatch, Error, Unreachable
from .events import Emit, Event, ignore
from .oci import Descriptor

CHUNK_BYTES = 256 << 10  # smaller pieces cost a consumer more in calls than in bytes
PROGRESS_BYTES = 1 << 20  # as much between two failures earns a fresh set of retries (containers/image's rule)

Result = TypeVar("Result")


class Settings(NamedTuple):
    """How long to wait for what, and how often to try again. All times are seconds."""

    connect_seconds: float = 10.0
    read_seconds: float = 30.0  # of silence, not of transfer
    retries: int = 5  # attempts after the first one
    backoff_seconds: float = 0.5  # before the first retry; doubles with each
    backoff_cap_seconds: float = 30.0
    retry_after_cap_seconds: float = 60.0  # a server that asks for more is not waited for
    deadline: float = math.inf  # on Clock.monotonic


class Clock(NamedTuple):
    """What depends on the moment or on chance; tests pass their own."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[], float] = random.random  # 0 <= x < 1


DEFAULTS = Settings()
SYSTEM = Clock()


class Transient(Exception):
    """A failure that another attempt may cure.

    ``fault`` is what to raise when there is none left; ``after_seconds`` is how long the server asked to be left alone.
    """

    def __init__(self, fault: Error, after_seconds: float = 0.0) -> None:
        super().__init__(str(fault))
        self.fault = fault
        self.after_seconds = after_seconds


class Body(Protocol):
    """A blob being received: from byte ``start`` on, of ``total`` bytes in all as far as the server says."""

    start: int
    total: Optional[int]

    def read(self) -> bytes:
        """At least one byte and at most CHUNK_BYTES, ``b""`` at the end; Transient when the connection breaks."""

    def close(self) -> None:
        """Give up the connection."""


OpenRange = Callable[[Descriptor, int], Body]  # the body starts at the asked byte, or at 0 where ranges do not work


class Patience:
    """Counts the failures of one piece of work and spaces its attempts: exponential back-off with jitter."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._failures = 0

    def renew(self) -> None:
        """Forget the failures so far: there was progress."""
        self._failures = 0

    def pause(self, failure: Transient) -> None:
        """Sleep until the next attempt is due; raises the failure's fault when there is to be none."""
        limits = self._settings
        step = min(limits.backoff_cap_seconds, limits.backoff_seconds * 2.0**self._failures)
        delay = failure.after_seconds + step * (0.5 + self._clock.jitter() / 2)
        self._failures += 1
        if (
            self._failures > limits.retries
            or failure.after_seconds > limits.retry_after_cap_seconds
            or self._clock.monotonic() + delay >= limits.deadline
        ):
            raise failure.fault from None
        self._clock.sleep(delay)


def attempt(work: Callable[[], Result], *, settings: Settings = DEFAULTS, clock: Clock = SYSTEM) -> Result:
    """What ``work`` returns, tried again after each Transient for as long as ``settings`` allow."""
    patience = Patience(settings, clock)
    while True:
        try:
            return work()
        except Transient as failure:
            patience.pause(failure)


def download(
    open_range: OpenRange,
    descriptor: Descriptor,
    *,
    settings: Settings = DEFAULTS,
    clock: Clock = SYSTEM,
    emit: Emit = ignore,
    subject: str = "",
) -> Iterator[bytes]:
    """The bytes that ``descriptor`` names, in order, in pieces of mostly CHUNK_BYTES or a little more.

    Who finishes the loop has exactly ``descriptor.size`` bytes with that digest: anything else raises DigestMismatch
    first, though after pieces were handed out. Emits an Event for each piece and a last one with the seconds taken.
    """
    subject = subject or descriptor.digest[:19]
    algorithm, _, expected = descriptor.digest.partition(":")
    hasher = hashlib.new(algorithm)
    patience = Patience(settings, clock)
    began = clock.monotonic()

    def late() -> bool:
        return clock.monotonic() >= settings.deadline

    done = failed_at = 0
    while done < descriptor.size:
        try:
            with closing(_pieces(open_range, descriptor, done, late, subject)) as pieces:
                for piece in pieces:
                    hasher.update(piece)
                    done += len(piece)
                    emit(Event("fetch", subject, done, descriptor.size))
                    yield piece
        except Transient as failure:
            if done - failed_at >= PROGRESS_BYTES:
                patience.renew()
            failed_at = done
            patience.pause(failure)
    if hasher.hexdigest() != expected:
        raise DigestMismatch(f"{subject}: the content's digest is {algorithm}:{hasher.hexdigest()}")
    emit(Event("fetch", subject, done, descriptor.size, clock.monotonic() - began))


def _pieces(
    open_range: OpenRange, descriptor: Descriptor, start: int, late: Callable[[], bool], subject: str
) -> Generator[bytes, None, None]:
    """What one connection delivers from byte ``start`` on; then Transient unless that completes the blob."""
    body = open_range(descriptor, start)
    failure = Transient(Unreachable(f"{subject}: the connection ended before byte {descriptor.size}"))
    waiting: list[bytes] = []
    held, position = 0, body.start
    try:
        if body.total not in (None, descriptor.size):
            raise _wrong_size(subject, f"{body.total} bytes", descriptor.size)
        while data := body.read():
            position += len(data)
            if position > descriptor.size:
                raise _wrong_size(subject, "more bytes", descriptor.size)
            if late():
                raise too_late(subject, f" after {position} of {descriptor.size} bytes")
            fresh = data[max(0, len(data) - (position - start)) :]  # drops what lies before start
            waiting.append(fresh)
            held += len(fresh)
            if held >= CHUNK_BYTES:
                yield b"".join(waiting)
                waiting, held = [], 0
    except Transient as broken:
        failure = broken
    finally:
        body.close()
    if held:
        yield b"".join(waiting)
    if position < descriptor.size:
        raise failure


def _wrong_size(subject: str, got: str, size: int) -> DigestMismatch:
    return DigestMismatch(f"{subject}: the registry sends {got}, the manifest says {size}")


def too_late(what: str, progress: str = "") -> Unreachable:
    """The error for a pull that ``Settings.deadline`` ends."""
    hint = "the registry or the network is slow; raise pull_deadline_seconds in the configuration"
    return Unreachable(f"{what}: the deadline of the pull passed{progress}", hint)
