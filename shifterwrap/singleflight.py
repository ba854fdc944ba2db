"""One producer per reference: whoever holds its lock pulls, everybody else waits for the result or the failure.

The lock is an OFD write lock on ``locks/HASH.lock``; the kernel drops it when the producer is gone, however it went,
and the next waiter takes over. The file's content is the producer's record, one JSON object: who it is and how far it
got while it works; at its end the result or the failure, written before the lock is let go. Waiters never take a lock
to read it; a record caught in mid-write does not parse and is read again.

A failure is believed by those who were waiting when it happened, and by newcomers until its expiry, so that the ranks
of a job do not each try a registry that is down. Locks only save work here: without them the same image would be pulled
twice and committed once.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, TypeVar

from . import linux
from .errors import CacheError, CacheFull, Error, Interrupted, WaitTimeout, from_record

MAX_DEAD_PRODUCERS = 3  # what kills three producers in a row, such as a memory limit, kills the next one too
_RECORD_BYTES = 20 << 10  # an error holds two texts of errors.one_line, 2000 characters each, up to 4 bytes wide
_NUMBERS = ("pid", "time", "deaths", "expires")
_POLL_SECONDS = (0.01, 0.2)  # grows with the time waited
# How long a newcomer believes a failure (seconds); what is not named here is tried again at once.
FAILURE_EXPIRY_SECONDS = {
    "Unreachable": 5.0, "NotFound": 5.0, "AuthDenied": 5.0, "RateLimited": 30.0, "DigestMismatch": 5.0,
    "ConvertError": 10.0, "LimitExceeded": 5.0, "RegistryError": 5.0,
}

Found = TypeVar("Found")


class Flight(NamedTuple):
    """The producer's end of a lock: the descriptor that holds it, and how many producers died before in a row."""

    path: str
    fd: int
    deaths: int = 0


class Waiter(NamedTuple):
    """What a waiter wants to know: when it came (seconds since the epoch), until when it waits, whom it tells."""

    since: float
    deadline: float
    progress: Callable[[dict[str, Any]], None]


def lock_path(root: str, name: str) -> str:
    """The lock file of whatever ``name`` says (a reference and platform, or a key)."""
    return os.path.join(root, "locks", hashlib.sha256(name.encode()).hexdigest() + ".lock")


def join(path: str, waiter: Waiter, find: Callable[[], Optional[Found]],
         produce: Callable[[Flight], None], *, believe: bool = True) -> Found:
    """What ``find`` finds, once somebody produced it: we, when nobody else does.

    ``find`` is cheap and is asked first. ``produce`` runs with the lock held; it lets ``find`` succeed, or raises, or
    returns because what it started was killed. With ``believe`` false the expiry of old failures is not looked at
    (``--pull always``, or a person who insists). Raises the producer's error, Interrupted or WaitTimeout.
    """
    while True:
        found = find()
        if found is not None:
            return found
        flight = take(path)
        if flight is None:
            _wait(path, waiter)
            continue
        try:
            found = find()  # the last producer may have finished between our look and our lock
            if found is not None:
                return found
            record = read(path)
            _raise_failure(record, waiter.since, believe)
            if time.time() > waiter.deadline:
                raise WaitTimeout("the deadline passed and the image is still not in the cache")
            flight = _after_deaths(flight, record, waiter.since)
            tell(flight, "pulling", stage="start", done=0, total=0)  # who dies from here on is counted
            produce(flight)
        finally:
            os.close(flight.fd)


def _after_deaths(flight: Flight, record: dict[str, Any], since: float) -> Flight:
    """Count a producer that we saw alive and that left no result; Interrupted for everybody when there are too many."""
    if record.get("state") != "pulling" or float(record.get("time", 0)) < since:
        return flight
    deaths = int(record.get("deaths", 0)) + 1
    if deaths < MAX_DEAD_PRODUCERS:
        return flight._replace(deaths=deaths)
    error = Interrupted(f"{deaths} processes died while pulling the image, the last was {record.get('pid')}",
                        "look for a memory limit that is too small, or a kill in the system log")
    tell_failure(flight, error)
    raise error


def take(path: str) -> Optional[Flight]:
    """The lock, when it is free. Room for the record is taken with it, so that why a pull ended can always be told."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise _unusable(path, exc) from exc
    try:
        if linux.ofd_lock(fd, fcntl.F_WRLCK):
            os.posix_fallocate(fd, 0, _RECORD_BYTES)
            return Flight(path, fd)
    except OSError as exc:
        os.close(fd)
        raise _unusable(path, exc) from exc
    os.close(fd)
    return None


def _unusable(path: str, exc: OSError) -> CacheError:
    kind = CacheFull if exc.errno in (errno.ENOSPC, errno.EDQUOT) else CacheError
    return kind(f"lock {path} cannot be opened: {exc.strerror}")


def tell(flight: Flight, state: str, **record: Any) -> None:
    """Leave the producer's record; where that fails it costs the waiters their progress, nothing else."""
    whole = {"state": state, "pid": os.getpid(), "time": time.time(), "deaths": flight.deaths, **record}
    try:
        os.pwrite(flight.fd, json.dumps(whole, ensure_ascii=False).encode().ljust(_RECORD_BYTES), 0)
    except OSError:
        pass


def tell_failure(flight: Flight, error: Error) -> None:
    """Leave the failure for the waiters, with the time until which newcomers believe it."""
    expiry = FAILURE_EXPIRY_SECONDS.get(type(error).__name__, 0.0)
    tell(flight, "failed", error=error.record(), expires=time.time() + expiry)


def read(path: str) -> dict[str, Any]:
    """The producer's record; empty when there is none, or it is being written."""
    try:
        with open(path, "rb") as stream:
            record = json.loads(stream.read(_RECORD_BYTES) or b"{}")
    except (OSError, ValueError):
        return {}
    if not isinstance(record, dict) or not all(isinstance(record.get(name, 0), (int, float)) for name in _NUMBERS):
        return {}
    return record


def _wait(path: str, waiter: Waiter) -> None:
    """Wait until the lock seems free, telling how far its holder is."""
    watch = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    began = time.monotonic()
    record: dict[str, Any] = {}
    try:
        while linux.ofd_locked(watch):
            if time.time() > waiter.deadline:
                raise WaitTimeout(f"the deadline passed while process {record.get('pid', '?')} was pulling the image")
            record = read(path) or record
            waiter.progress(record)
            time.sleep(min(max((time.monotonic() - began) / 20, _POLL_SECONDS[0]), _POLL_SECONDS[1]))
    finally:
        os.close(watch)
    _raise_failure(read(path), waiter.since, believe=True)


def _raise_failure(record: dict[str, Any], since: float, believe: bool) -> None:
    if record.get("state") != "failed" or not isinstance(record.get("error"), dict):
        return
    happened, expires, now = float(record.get("time", 0)), float(record.get("expires", 0)), time.time()
    if happened > now:  # the clock was set back since
        return
    if happened >= since:
        raise from_record(record["error"])
    if believe and now < expires:
        error = from_record(record["error"])
        error.message += f" (so process {record.get('pid')} found {now - happened:.0f} s ago)"
        raise error
