"""kill -9 at random points of a pull: no cache is ever damaged, nothing half-made is ever seen, and the next run works.

Half of the kills hit the whole process group, as a batch system kills a step; half the producer only (the pull-worker
and what it started) while two launchers wait for it, which must both succeed then, by taking over.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench import processes
from tests.bench.report import Line, noted, required
from tests.bench.world import SEED, World, say

KILLS = 100  # of each way
SHARE_OF_WORKER = 0.8  # of a launch's time, at most; a kill that comes too late is no kill, and is tried again
WAIT_SECONDS = 120.0
HELD_SECONDS = 0.05  # a process being forked between SIGSTOP and a SIGCONT microseconds later stayed stopped
WHOLE = {"image.sqsh", "manifest.json", "config.json", "image.json", "entry.json", "lock"}


class Moment(NamedTuple):
    """When to kill: at a random time after the pull has reached one of `stages`, or after its start."""

    stages: tuple[str, ...]
    spread: float  # seconds; 0 is the whole pull


# Most of a pull's time is start and fetch. Where a mistake would do harm are the later stages, so they get their share.
MOMENTS = (
    Moment((), 0),
    Moment((), 0),
    Moment(("convert", "commit", "committed"), 0.2),
    Moment(("commit", "committed"), 0.03),
)


class Kill(NamedTuple):
    """One kill: how far the pull was, nothing when it had ended before, and what was wrong afterwards."""

    hit: str
    faults: list[str]


def run(world: World) -> list[Line]:
    """The lines of this row."""
    return Kills(world).run()


class Kills:
    """A cache that holds bb, and into which mid is pulled again and again."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cache = world.directory(world.user, "kills")
        self.env = {"SHIFTERWRAP_CACHE_DIR": str(self.cache)}
        self.argv = world.wrapped("--runtime", "embedded", world.image("mid"), "true")
        self.random = random.Random(SEED)
        self.count = KILLS // 10 if world.quick else KILLS

    def run(self) -> list[Line]:
        """Kill, and tell."""
        self._ok("pull", self.world.image("bb"))
        self.keeper = self._entries()
        seconds = self._usual_seconds()
        say(f"kills: a pull of mid takes {seconds:.2f} s")
        lines = [noted("kills", "seconds of a pull that is killed", f"{seconds:.2f} s", seconds=seconds)]
        lines.append(self._series("process group", lambda: self._kill_group(seconds)))
        lines.append(self._series("producer", lambda: self._kill_producer(seconds)))
        return [*lines, self._after_gc()]

    def _usual_seconds(self) -> float:
        taken = []
        for _ in range(3):
            taken.append(self.world.clock.time(self.argv, self.env).checked().wall)
            self._forget_mid()
        return statistics.median(taken)

    def _series(self, what: str, kill: Callable[[], Kill]) -> Line:
        hits: Counter[str] = Counter()
        faults: list[str] = []
        clean = attempts = 0
        while sum(hits.values()) < self.count and attempts < 3 * self.count:
            attempts += 1
            done = kill()
            for fault in done.faults:
                say(f"kills: {what}, kill {attempts} at {done.hit or 'its end'}: {fault}")
            faults += done.faults
            hits.update([done.hit] if done.hit else [])
            clean += bool(done.hit) and not done.faults
            if done.hit and sum(hits.values()) % 10 == 0:
                say(f"kills: {what}: {sum(hits.values())} of {self.count}, {clean} clean")
        where = ", ".join(f"{stage} {number}" for stage, number in sorted(hits.items()))
        numbers: dict[str, Any] = {"hits": dict(hits), "faults": faults, "attempts": attempts, "seed": SEED}
        got = f"{clean}/{self.count}" if not faults or clean < self.count else f"{clean}, with faults"
        return required(
            "kills", f"kill -9 of the {what} ({where}): clean", got, f"{self.count}/{self.count}", **numbers
        )

    def _kill_group(self, seconds: float) -> Kill:
        with tempfile.TemporaryFile("w+") as said:
            launcher = self._launch(said)
            self._wait(seconds, lambda: launcher.poll() is None)
            running = launcher.poll() is None
            if running:
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
        faults = [] if processes.wait_for_group(launcher.pid) else ["a process of the group is left"]
        hit = self._stage() if running else ""
        faults += self._faults(mid=None)
        again = self.world.clock.time(self.argv, self.env)
        faults += [f"the next run failed: {text}" for text in again.errors] if any(again.codes) else []
        return Kill(hit, [*faults, *self._faults(mid=True), *self._forget_mid()])

    def _kill_producer(self, seconds: float) -> Kill:
        with tempfile.TemporaryFile("w+") as said:
            launchers = [self._launch(said), self._launch(said)]
            hit, faults = self._kill_worker([launcher.pid for launcher in launchers], seconds)
            codes = [_ended(launcher) for launcher in launchers]
            said.seek(0)
            faults += [f"a waiting launcher failed: {codes} {said.read()[-400:]}"] if any(codes) else []
        return Kill(hit, [*faults, *self._faults(mid=True), *self._forget_mid()])

    def _launch(self, said: Any) -> subprocess.Popen[str]:
        return self.world.user.popen(
            self.argv, env=self.env, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )

    def _kill_worker(self, launchers: list[int], seconds: float) -> tuple[str, list[str]]:
        """Kill the worker and its children at some point of its life: how far it was, and what was wrong then.

        The launchers, each a process group, stand still meanwhile, so that what is looked at is what the kill left.
        """
        worker = _worker_of(launchers)
        self._wait(seconds * SHARE_OF_WORKER, lambda: processes.alive(worker))
        _signal(launchers, signal.SIGSTOP)
        try:
            if not processes.alive(worker):
                time.sleep(HELD_SECONDS)
                return "", []
            hit = self._stage()
            for pid in (doomed := [worker, *processes.descendants(worker)]):
                processes.kill(pid)
            while any(map(processes.alive, doomed)):
                time.sleep(0.001)
            return hit, self._faults(mid=None)
        finally:
            _signal(launchers, signal.SIGCONT)

    def _wait(self, seconds: float, running: Callable[[], bool]) -> None:
        """Wait for a random moment of a pull that takes `seconds`."""
        moment = self.random.choice(MOMENTS)
        while moment.stages and running() and self._stage() not in moment.stages:
            time.sleep(0.001)
        time.sleep(self.random.uniform(0, moment.spread or seconds))

    def _stage(self) -> str:
        """How far the pull is, told by the files it has made."""
        if self._entries() - self.keeper:
            return "committed"
        staged = [name for place in (self.cache / "stage").iterdir() for name in _names(place)]
        if "image.sqsh" in staged:
            return "convert" if "blobs" in staged else "commit"
        return "fetch" if staged else "before"

    def _entries(self) -> set[str]:
        return set(os.listdir(self.cache / "entries"))

    def _faults(self, mid: bool | None) -> list[str]:
        """What is wrong with the cache: bb must be in it, mid too or may be, each whole, listed and verified."""
        names = self._entries()
        faults = [fault for name in names for fault in _incomplete(self.cache / "entries" / name)]
        if not self.keeper <= names:
            faults.append("the entry of the other image is gone")
        if len(names - self.keeper) > 1 or (mid and not names - self.keeper):
            faults.append(f"unexpected entries: {sorted(names)}")
        return [*faults, *self._not_listed(names), *self._not_verified(names)]

    def _not_listed(self, names: set[str]) -> list[str]:
        done = self.world.admin(self.world.user, "list", "--json", cache=self.cache)
        if done.returncode:
            return [f"list failed: {done.stderr}"]
        rows = json.loads(done.stdout)
        faults = [] if {row["name"] for row in rows} == names else [f"list shows {[row['name'] for row in rows]}"]
        twice = [row["references"] for row in rows if len(set(row["references"])) != len(row["references"])]
        return faults + [f"list shows references twice: {references}" for references in twice]

    def _not_verified(self, names: set[str]) -> list[str]:
        done = self.world.admin(self.world.user, "verify", "--all", "--json", cache=self.cache)
        if done.returncode:
            return [f"verify: {done.stdout}{done.stderr}"]
        verified = {row["name"] for row in json.loads(done.stdout) if row["ok"]}
        return [] if verified == names else [f"verify knows only {sorted(verified)}"]

    def _forget_mid(self) -> list[str]:
        """Make mid cold again. The lease of a command that was just killed may last a moment longer."""
        for _ in range(100):
            done = self.world.admin(self.world.user, "rm", self.world.image("mid"), cache=self.cache)
            if done.returncode == 0:
                return []
            time.sleep(0.05)
        return [f"rm failed: {done.stderr}"]

    def _ok(self, *argv: str) -> None:
        done = self.world.admin(self.world.user, *argv, cache=self.cache)
        if done.returncode:
            raise RuntimeError(f"shifterwrap {argv[0]} failed: {done.stderr}")

    def _after_gc(self) -> Line:
        self._ok("gc")
        left = [str(path.relative_to(self.cache)) for path in (self.cache / "stage").iterdir()]
        left += [str(path.relative_to(self.cache)) for path in self.cache.rglob(".new-*")]
        faults = self._faults(mid=None)
        found = str(len(left) + len(faults))
        what = "left in stage/, or half-written elsewhere, after gc"
        return required("kills", what, found, "0", left=left, faults=faults)


def _signal(groups: list[int], number: int) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:  # renamed or removed meanwhile
        return []


def _worker_of(launchers: list[int]) -> int:
    """The pull-worker, once one of the launchers has started it; 0, which is no process, when they ended before."""
    while any(map(processes.alive, launchers)):
        for launcher in launchers:
            for pid in processes.descendants(launcher):
                if b"\0pull-worker\0" in processes.command_line(pid):
                    return pid
        time.sleep(0.002)
    return 0


def _ended(launcher: subprocess.Popen[str]) -> int:
    try:
        return launcher.wait(WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        return launcher.wait()


def _incomplete(entry: Path) -> list[str]:
    """What a committed entry lacks."""
    present = set(os.listdir(entry))
    if present != WHOLE:
        return [f"{entry.name} has {sorted(present)}"]
    size, recorded = (entry / "image.sqsh").stat().st_size, json.loads((entry / "entry.json").read_bytes())["bytes"]
    return [] if size == recorded else [f"{entry.name} has {size} bytes of {recorded}"]
