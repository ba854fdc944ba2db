"""The first run of a large image that nobody has: download, convert, keep, start; and how much memory that takes.

The page cache is left alone for everybody: the registry's files are in it, caches are new.
"""

from __future__ import annotations

import os
import shutil

from tests.bench.processes import Memory
from tests.bench.report import Line, compared, limited
from tests.bench.world import World, say

RUNTIMES = ("apptainer", "embedded")
MOST_RATIO = 0.2
MOST_MEGABYTES = 300.0
MEGABYTE = 1e6


def run(world: World) -> list[Line]:
    """The lines of this row."""
    world.image("sci")
    ours: dict[str, list[float]] = {runtime: [] for runtime in RUNTIMES}
    theirs: list[float] = []
    peer_rss = 0
    for turn in range(1 if world.quick else 3):
        for runtime in RUNTIMES:
            ours[runtime].append(_ours(world, runtime))
        if turn < 2:
            with Memory(world.clock.pid, pss=False) as memory:
                theirs.append(_theirs(world))
            peer_rss = max(peer_rss, memory.rss)
    lines = [compared("cold", f"sci, --runtime {runtime}: pull and first run", ours[runtime], theirs, MOST_RATIO)
             for runtime in RUNTIMES]  # fmt: skip
    return [*lines, *_memory(world, peer_rss)]


def _ours(world: World, runtime: str) -> float:
    """Seconds of the first run."""
    say(f"cold: wrapped-run --runtime {runtime} sci")
    cache = world.directory(world.user, "cold")
    os.sync()
    argv = world.wrapped("--runtime", runtime, world.image("sci"), "true")
    taken = world.clock.time(argv, {"SHIFTERWRAP_CACHE_DIR": str(cache)}).checked()
    shutil.rmtree(cache)
    return taken.wall


def _theirs(world: World) -> float:
    """Seconds of a pull and a first run."""
    os.sync()
    pulled = world.pull_sif("sci").wall
    argv = ["/usr/bin/apptainer", "--silent", "exec", str(world.sif("sci")), "true"]
    return pulled + world.clock.time(argv).checked().wall


def _memory(world: World, peer_rss: int) -> list[Line]:
    """Of one more run, which is not timed."""
    with Memory(world.clock.pid, pss=True) as memory:
        _ours(world, "embedded")
    peer = peer_rss / MEGABYTE
    rss, pss = memory.rss / MEGABYTE, memory.pss / MEGABYTE
    if not memory.pss:  # not ours to read on this machine
        return [limited("cold", "sci: peak resident memory, all processes", rss, "MB", MOST_MEGABYTES, peer)]
    return [
        limited("cold", "sci: peak memory of all processes, shared pages once (PSS)", pss, "MB", MOST_MEGABYTES),
        limited("cold", "sci: peak memory of all processes, sum of RSS", rss, "MB", None, peer),
    ]
