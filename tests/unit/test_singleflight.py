"""singleflight.py: one producer at a time, what waiters and newcomers believe, and who takes over from the dead."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import time
from pathlib import Path
from typing import Any, NoReturn, Optional

import pytest

from shifterwrap import singleflight
from shifterwrap.errors import CacheError, CacheFull, Error, Interrupted, NotFound, RateLimited, WaitTimeout
from shifterwrap.singleflight import Flight, Waiter
from tests.unit import entries

FOREVER = 4e9


class Work:
    """Something to produce, whose result is a file; counts how often it was."""

    def __init__(self, path: Path) -> None:
        self.result, self.count = path / "result", 0
        self.lock = singleflight.lock_path(str(path), "docker://host/app:1 linux/amd64")
        os.makedirs(os.path.dirname(self.lock), exist_ok=True)

    def find(self) -> Optional[str]:
        return self.result.read_text() if self.result.exists() else None

    def produce(self, flight: Flight) -> None:
        self.count += 1
        singleflight.tell(flight, "pulling")
        self.result.write_text("made")
        singleflight.tell(flight, "done")

    def fail(self, flight: Flight, error: Optional[Error] = None) -> NoReturn:
        self.count += 1
        error = error or NotFound("no such tag", "look again")
        singleflight.tell_failure(flight, error)
        raise error

    def vanish(self, flight: Flight) -> None:
        """A worker that was killed: it left the record of what it was doing, and no result."""
        self.count += 1
        singleflight.tell(flight, "pulling")


def waiter(since: float = 0.0, deadline: float = FOREVER) -> Waiter:
    return Waiter(since, deadline, lambda record: None)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def take(work: Work) -> Flight:
    flight = singleflight.take(work.lock)
    assert flight is not None
    return flight


# ---- locks


def test_each_name_has_a_lock_of_its_own_that_no_name_can_choose() -> None:
    paths = [singleflight.lock_path("/c", name) for name in ("a", "b", "../../x", "a" * 5000)]
    assert len(set(paths)) == 4
    assert all(os.path.dirname(path) == "/c/locks" and len(os.path.basename(path)) == 69 for path in paths)


def test_a_lock_is_private_empty_of_meaning_and_stays(work: Work) -> None:
    flight = take(work)
    assert stat.S_IMODE(os.stat(work.lock).st_mode) == 0o600
    assert singleflight.read(work.lock) == {}
    os.close(flight.fd)
    assert os.path.exists(work.lock)


def test_only_one_takes_it(work: Work) -> None:
    flight = take(work)
    assert singleflight.take(work.lock) is None
    os.close(flight.fd)
    os.close(take(work).fd)


def test_it_is_not_inherited_by_accident(work: Work) -> None:
    assert not os.get_inheritable(take(work).fd)


def test_a_link_is_no_lock(work: Work, tmp_path: Path) -> None:
    os.symlink(tmp_path / "elsewhere", work.lock)
    with pytest.raises(CacheError, match="cannot be opened"):
        singleflight.take(work.lock)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("call", ["open", "posix_fallocate"])
def test_a_full_disk_is_called_full(work: Work, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*args: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(CacheFull, match="No space left"):
        singleflight.take(work.lock)
    monkeypatch.undo()
    assert os.listdir("/proc/self/fd") == before


# ---- records


def test_whoever_takes_the_lock_has_room_for_any_record(work: Work) -> None:
    flight = take(work)
    assert os.fstat(flight.fd).st_blocks * 512 >= os.fstat(flight.fd).st_size > 0
    size = os.fstat(flight.fd).st_size
    for text in ("\N{PILE OF POO}" * 9000, '"\\' * 9000, "\x1b" * 9000, "\udc80" * 9000):
        singleflight.tell_failure(flight, NotFound(text, text))
        assert singleflight.read(work.lock)["state"] == "failed"
        assert os.fstat(flight.fd).st_size == size


def test_a_record_says_who_and_when_and_what(work: Work) -> None:
    flight = take(work)._replace(deaths=2)
    began = time.time()
    singleflight.tell(flight, "pulling", stage="fetch", done=1, total=2)
    record = singleflight.read(work.lock)
    assert began <= record.pop("time") <= time.time()
    assert record == {"state": "pulling", "pid": os.getpid(), "deaths": 2, "stage": "fetch", "done": 1, "total": 2}


def test_a_record_that_cannot_be_written_does_no_harm(work: Work) -> None:
    flight = take(work)
    os.close(flight.fd)
    singleflight.tell(flight, "pulling")
    assert singleflight.read(work.lock) == {}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\0" * 100, b"[]", b"\xff", b'{"time": "x"}', b'{"deaths": []}', b'{"expires": null}']
)
def test_a_damaged_record_is_none(work: Work, content: bytes) -> None:
    Path(work.lock).write_bytes(content)
    assert singleflight.read(work.lock) == {}
    assert singleflight.join(work.lock, waiter(), work.find, work.produce) == "made"


# ---- producing


def test_what_is_there_is_found_without_a_lock(work: Work) -> None:
    work.result.write_text("there")
    assert singleflight.join(work.lock, waiter(), work.find, work.produce) == "there"
    assert not os.path.exists(work.lock)


def test_the_producer_holds_the_lock_and_lets_it_go(work: Work) -> None:
    def produce(flight: Flight) -> None:
        assert singleflight.take(work.lock) is None
        work.produce(flight)

    assert singleflight.join(work.lock, waiter(), work.find, produce) == "made"
    os.close(take(work).fd)


def test_the_lock_is_let_go_after_a_failure(work: Work) -> None:
    with pytest.raises(NotFound):
        singleflight.join(work.lock, waiter(), work.find, work.fail)
    os.close(take(work).fd)


def test_what_was_made_between_the_look_and_the_lock_is_not_made_again(work: Work) -> None:
    answers = iter([None, "made meanwhile"])
    assert singleflight.join(work.lock, waiter(), lambda: next(answers), work.produce) == "made meanwhile"
    assert work.count == 0


def test_of_many_processes_one_produces(work: Work, tmp_path: Path) -> None:
    def one() -> None:
        assert singleflight.join(work.lock, waiter(), work.find, work.produce) == "made"
        (tmp_path / f"{work.count}-{os.getpid()}").touch()

    children = [entries.fork(one) for _ in range(16)]
    assert [entries.ended(child) for child in children] == [0] * 16
    assert len(list(tmp_path.glob("0-*"))) == 15
    assert len(list(tmp_path.glob("1-*"))) == 1


# ---- waiting


class Holder:
    """A child that holds the lock, with a record, until it is told to do something and end."""

    def __init__(self, work: Work, **record: Any) -> None:
        self._work = work
        self._told_end, self._tell_end = os.pipe()
        ready_end, said_end = os.pipe()

        def hold() -> None:
            os.close(self._tell_end)
            flight = take(work)
            singleflight.tell(flight, "pulling", **record)
            os.write(said_end, b"x")
            order = os.read(self._told_end, 10)
            if order == b"make":
                work.produce(flight)
            elif order == b"fail":
                singleflight.tell_failure(flight, NotFound("no such tag", "look again"))

        self.pid = entries.fork(hold)
        assert os.read(ready_end, 1) == b"x"

    def end(self, order: bytes) -> None:
        os.write(self._tell_end, order)
        assert entries.ended(self.pid) == 0

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert entries.ended(self.pid) == -signal.SIGKILL


def once(act: Any) -> Any:
    """A waiter's progress that acts when it is first told something; what it was told is in ``told``."""

    def progress(record: dict[str, Any]) -> None:
        progress.told.append(record)  # type: ignore[attr-defined]
        if len(progress.told) == 1:  # type: ignore[attr-defined]
            act()

    progress.told = []  # type: ignore[attr-defined]
    return progress


def test_a_waiter_is_told_how_far_it_is_and_finds_the_result(work: Work) -> None:
    holder = Holder(work, done=5, total=9)
    progress = once(lambda: holder.end(b"make"))
    assert singleflight.join(work.lock, Waiter(0.0, FOREVER, progress), work.find, work.produce) == "made"
    assert (progress.told[0]["pid"], progress.told[0]["done"], progress.told[0]["total"]) == (holder.pid, 5, 9)
    assert work.count == 0


def test_a_waiter_fails_as_its_producer_did(work: Work) -> None:
    holder = Holder(work)
    progress = once(lambda: holder.end(b"fail"))
    with pytest.raises(NotFound) as caught:
        singleflight.join(work.lock, Waiter(time.time(), FOREVER, progress), work.find, work.produce)
    assert (caught.value.message, caught.value.hint) == ("no such tag", "look again")
    assert work.count == 0


def test_a_waiter_takes_over_from_a_producer_that_was_killed(work: Work) -> None:
    holder = Holder(work)
    progress = once(holder.kill)
    assert singleflight.join(work.lock, Waiter(0.0, FOREVER, progress), work.find, work.produce) == "made"
    assert work.count == 1


def test_a_waiter_gives_up_at_its_deadline_and_names_the_producer(work: Work) -> None:
    holder = Holder(work)
    with pytest.raises(WaitTimeout, match=f"process {holder.pid} was pulling"):
        singleflight.join(work.lock, Waiter(0.0, time.time() + 0.05, lambda record: None), work.find, work.produce)
    holder.end(b"make")
    assert work.count == 0


def test_a_lock_that_nobody_describes_is_waited_for_too(work: Work) -> None:
    flight = take(work)
    with pytest.raises(WaitTimeout, match=r"process \?"):
        singleflight.join(work.lock, waiter(deadline=0.0), work.find, work.produce)
    os.close(flight.fd)


# ---- deaths


def test_after_three_deaths_in_a_row_nobody_tries_again(work: Work) -> None:
    with pytest.raises(Interrupted, match="3 processes died"):
        singleflight.join(work.lock, waiter(), work.find, work.vanish)
    assert work.count == singleflight.MAX_DEAD_PRODUCERS
    with pytest.raises(Interrupted, match="3 processes died"):  # who waited meanwhile
        singleflight.join(work.lock, waiter(), work.find, work.produce)
    assert work.count == singleflight.MAX_DEAD_PRODUCERS


def test_a_newcomer_tries_again_whoever_died_before(work: Work) -> None:
    with pytest.raises(Interrupted):
        singleflight.join(work.lock, waiter(), work.find, work.vanish)
    assert singleflight.join(work.lock, waiter(since=time.time()), work.find, work.produce) == "made"


def test_deaths_before_its_time_are_not_counted_by_a_newcomer(work: Work) -> None:
    flight = take(work)._replace(deaths=2)
    singleflight.tell(flight, "pulling")
    os.close(flight.fd)
    assert singleflight.join(work.lock, waiter(since=time.time() + 1), work.find, work.produce) == "made"


def test_deaths_are_counted_over_processes(work: Work) -> None:
    flight = take(work)._replace(deaths=1)
    singleflight.tell(flight, "pulling")
    os.close(flight.fd)
    seen = []

    def produce(flight: Flight) -> None:
        seen.append(flight.deaths)
        work.produce(flight)

    singleflight.join(work.lock, waiter(), work.find, produce)
    assert seen == [2]


# ---- what is believed


def failed(work: Work, error: Error) -> float:
    """Have somebody fail now; when that was."""
    with pytest.raises(type(error)):
        singleflight.join(work.lock, waiter(), work.find, lambda flight: work.fail(flight, error))
    return float(singleflight.read(work.lock)["time"])


def test_a_newcomer_believes_a_failure_until_it_expires(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    happened = failed(work, RateLimited("slow down"))
    expiry = singleflight.FAILURE_EXPIRY_SECONDS["RateLimited"]
    monkeypatch.setattr(time, "time", lambda: happened + expiry - 1)
    with pytest.raises(RateLimited, match=rf"slow down \(so process {os.getpid()} found 29 s ago\)"):
        singleflight.join(work.lock, waiter(since=happened + 1), work.find, work.produce)
    monkeypatch.setattr(time, "time", lambda: happened + expiry + 1)
    assert singleflight.join(work.lock, waiter(since=happened + expiry), work.find, work.produce) == "made"


@pytest.mark.parametrize("error", [CacheFull("full"), WaitTimeout("late"), Interrupted("dead")])
def test_what_is_no_fault_of_the_registry_is_tried_again_at_once(work: Work, error: Error) -> None:
    happened = failed(work, error)
    assert singleflight.join(work.lock, waiter(since=happened + 0.001), work.find, work.produce) == "made"


def test_who_insists_believes_no_old_failure(work: Work) -> None:
    happened = failed(work, NotFound("no such tag"))
    late = waiter(since=happened + 0.001)
    assert singleflight.join(work.lock, late, work.find, work.produce, believe=False) == "made"


def test_who_waited_believes_even_when_he_insists(work: Work) -> None:
    happened = failed(work, NotFound("no such tag"))
    with pytest.raises(NotFound):
        singleflight.join(work.lock, waiter(since=happened), work.find, work.produce, believe=False)


def test_a_failure_from_the_future_is_not_believed(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock was set back; it may be hours until it comes round again."""
    happened = failed(work, NotFound("no such tag"))
    monkeypatch.setattr(time, "time", lambda: happened - 1000)
    assert singleflight.join(work.lock, waiter(since=happened - 1000), work.find, work.produce) == "made"


def test_a_failure_of_a_newer_version_is_an_error_all_the_same(work: Work) -> None:
    flight = take(work)
    record = {"id": "NewKind", "message": "new", "hint": "h"}
    singleflight.tell(flight, "failed", error=record, expires=FOREVER)
    os.close(flight.fd)
    with pytest.raises(Error, match="new") as caught:
        singleflight.join(work.lock, waiter(), work.find, work.produce)
    assert type(caught.value) is Error


def test_a_lock_taken_by_another_kind_of_lock_is_none_of_ours(work: Work) -> None:
    """OFD locks and flock do not see each other; only OFD locks count."""
    fd = os.open(work.lock, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.close(take(work).fd)
    os.close(fd)
