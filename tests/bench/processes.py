"""Processes as /proc shows them: whose descendant, how much memory, and which are left from this run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self

PROC = Path("/proc")
PAGE = os.sysconf("SC_PAGE_SIZE")
SAMPLE_SECONDS = 0.02


class Status(NamedTuple):
    """What /proc/PID/stat says."""

    state: str
    parent: int
    group: int


def status(pid: int) -> Status | None:
    """None when there is no such process."""
    try:
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return Status(fields[0], int(fields[1]), int(fields[2]))


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    found = status(pid) if pid else None
    return found is not None and found.state not in "ZX"


def pids() -> set[int]:
    """Every process of this machine."""
    return {int(name) for name in os.listdir(PROC) if name.isdigit()}


def descendants(pid: int) -> list[int]:
    """The children of a process, theirs, and so on; parents first."""
    children: dict[int, list[int]] = {}
    for candidate in pids():
        found = status(candidate)
        if found:
            children.setdefault(found.parent, []).append(candidate)
    tree = [pid]
    for member in tree:
        tree += children.get(member, [])
    return tree[1:]


def command_line(pid: int) -> bytes:
    """The arguments with NULs between them; empty for what is gone."""
    return _read(pid, "cmdline")


def _read(pid: int, name: str) -> bytes:
    try:
        return (PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""


def wait_for_group(group: int, seconds: float = 10.0) -> bool:
    """Whether every process of a killed process group is gone within that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        members = [found for found in map(status, pids()) if found and found.group == group]
        if not any(member.state not in "ZX" for member in members):
            return True
        time.sleep(0.005)
    return False


def kill(pid: int) -> None:
    """kill -9; nothing when it is gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def mentioning(path: Path) -> Iterator[int]:
    """Processes that have `path`, which names this run's directory, in their arguments or environment."""
    needle = os.fsencode(path)
    for pid in pids() - {os.getpid()}:
        if needle in _read(pid, "cmdline") or needle in _read(pid, "environ"):
            yield pid


class Memory:
    """Peaks of the memory of a process's descendants while the block runs, in bytes.

    `rss` is the sum of the resident sets, in which a page that several share counts several times; `pss` shares it out,
    but is read with the process's memory locked, so it is asked for where nothing is timed.
    """

    def __init__(self, pid: int, *, pss: bool) -> None:
        self.rss = self.pss = 0
        self._want_pss = pss
        self._members = {pid: False}
        self._others = pids() - {pid}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            present = pids()
            self._admit(present)
            counted = [pid for pid, counts in self._members.items() if counts and pid in present]
            self.rss = max(self.rss, sum(map(_resident, counted)))
            if self._want_pss:
                self.pss = max(self.pss, sum(map(_proportional, counted)))

    def _admit(self, present: set[int]) -> None:
        """A process is ours when its parent was, at the first sight of it; processes come in the order of their ids."""
        for pid in sorted(present - self._others - self._members.keys()):
            found = status(pid)
            if found and found.parent in self._members:
                self._members[pid] = True
            else:
                self._others.add(pid)


def _resident(pid: int) -> int:
    words = _read(pid, "statm").split()
    return int(words[1]) * PAGE if words else 0


def _proportional(pid: int) -> int:
    for line in _read(pid, "smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0
