"""The pull of a large image where a memory control group allows 512 MiB, page cache included."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.bench.report import Line, noted, required
from tests.bench.world import RUN_SECONDS, World, say

LIMIT = 512 << 20
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
JOIN = 'echo $$ >"$0" && exec setpriv "$@"'


class Outcome(NamedTuple):
    """How a command fared in a group: `peak` bytes count its page cache, `pressed` how often the limit was met."""

    code: int
    peak: int
    pressed: int
    killed: int
    said: str


def run(world: World) -> list[Line]:
    """The lines of this row."""
    if not _available():
        return [required("memory", "a writable memory cgroup", "none", "one")]
    ours = _ours(world)
    peer = None if world.quick else _theirs(world)
    what = f"cold pull of sci in {LIMIT >> 20} MiB"
    theirs = peer._asdict() if peer else {}
    return [
        required("memory", f"{what}: exit code", str(ours.code), "0", str(peer.code) if peer else "", said=ours.said),
        required("memory", f"{what}: out-of-memory kills", str(ours.killed), "0", str(peer.killed) if peer else ""),
        noted(
            "memory",
            f"{what}: peak with page cache; times at the limit",
            _usage(ours),
            _usage(peer) if peer else "",
            details={"ours": ours._asdict(), "peer": theirs},
        ),
    ]


def _usage(outcome: Outcome) -> str:
    return f"{outcome.peak >> 20} MiB; {outcome.pressed}"


def _ours(world: World) -> Outcome:
    say(f"memory: shifterwrap pull sci in {LIMIT >> 20} MiB")
    cache = world.directory(world.user, "memory")
    argv = [str(world.bin / "shifterwrap"), "pull", world.image("sci")]
    outcome = _limited(world, argv, {"SHIFTERWRAP_CACHE_DIR": str(cache)})
    checked = world.admin(world.user, "verify", "--all", cache=cache)
    if checked.returncode and not outcome.code:
        return outcome._replace(code=checked.returncode, said=checked.stdout + checked.stderr)
    world.directory(world.user, "memory")
    return outcome


def _theirs(world: World) -> Outcome:
    say(f"memory: apptainer pull sci in {LIMIT >> 20} MiB")
    place = world.directory(world.user, "memory")
    argv = ["/usr/bin/apptainer", "--silent", "pull", str(place / "image.sif"), world.image("sci")]
    outcome = _limited(world, argv, world.apptainer(place))
    world.directory(world.user, "memory")
    return outcome


def _limited(world: World, argv: Sequence[str], env: dict[str, str]) -> Outcome:
    user = world.user
    with _group() as group:
        identity = [f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"]
        join = ["sh", "-c", JOIN, str(group / "cgroup.procs"), *identity, *argv]
        done = subprocess.run(
            join,
            env={**user.env, **env},
            cwd=user.home,
            stdin=subprocess.DEVNULL,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=RUN_SECONDS,
            check=False,
        )
        if done.returncode:
            say(f"memory: exit code {done.returncode}: {done.stdout[-400:]}")
        return Outcome(done.returncode, *_readings(group), done.stdout[-400:])


def _available() -> bool:
    if (V1 / "memory.limit_in_bytes").exists():
        return os.access(V1, os.W_OK)
    controllers = V2 / "cgroup.controllers"
    return controllers.exists() and "memory" in controllers.read_text() and os.access(V2, os.W_OK)


@contextlib.contextmanager
def _group() -> Iterator[Path]:
    """A new group with the limit, of version 1 where that is mounted, else of version 2."""
    old = (V1 / "memory.limit_in_bytes").exists()
    if not old:
        (V2 / "cgroup.subtree_control").write_text("+memory")
    group = (V1 if old else V2) / f"shifterwrap-compare-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(LIMIT))
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """A group can be removed a moment after its last process ended; a FUSE server may take longer."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)
    say(f"memory: {group} cannot be removed")


def _readings(group: Path) -> tuple[int, int, int]:
    """Peak bytes, times that the limit was met, processes killed."""
    if (group / "memory.max_usage_in_bytes").exists():
        killed = _fields(group / "memory.oom_control").get("oom_kill", 0)
        return _number(group / "memory.max_usage_in_bytes"), _number(group / "memory.failcnt"), killed
    events = _fields(group / "memory.events")
    return _number(group / "memory.peak"), events.get("max", 0), events.get("oom_kill", 0)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except OSError:  # memory.peak came with Linux 5.19
        return 0


def _fields(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in path.read_text().splitlines())}
