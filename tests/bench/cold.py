"""The first run of a large image that nobody has: download, convert, keep, start; and how much memory that takes.

The page cache is left alone for everybody: the registry's files are in it, caches are new.
"""

from __future__ import annotations

import os
import shutil

from tests.bench.processes import Memory
from tests.bench.report import Line, compared, limited
from tests.bench.world import Timed, World, say

RUNTIMES = ("apptainer", "embedded")
PEER = "bare apptainer"
MOST_RATIO = 0.2
MOST_MEGABYTES = 300.0
MEGABYTE = 1e6


def run(world: World) -> list[Line]:
    """The lines of this row."""
    world.image("sci")
    taken: dict[str, list[Timed]] = {name: [] for name in (*RUNTIMES, PEER)}
    rss = dict.fromkeys(taken, 0)
    for turn in range(1 if world.quick else 3):
        for name in taken:
            if name == PEER and turn > 1:
                continue  # it takes long
            with Memory(world.clock.pid, pss=False) as memory:
                taken[name].append(_theirs(world) if name == PEER else _ours(world, name))
            rss[name] = max(rss[name], memory.rss)
    lines = [line for name in RUNTIMES for line in _times(name, taken[name], taken[PEER])]
    return [*lines, *_memory(world, max(rss[name] for name in RUNTIMES), rss[PEER])]


def _times(runtime: str, ours: list[Timed], theirs: list[Timed]) -> list[Line]:
    what = f"sci, --runtime {runtime}: pull and first run"
    wall = compared("cold", what, [one.wall for one in ours], [one.wall for one in theirs], MOST_RATIO)
    return [wall, compared("cold", f"{what}, CPU", [one.cpu for one in ours], [one.cpu for one in theirs])]


def _ours(world: World, runtime: str) -> Timed:
    """The first run."""
    say(f"cold: wrapped-run --runtime {runtime} sci")
    cache = world.directory(world.user, "cold")
    os.sync()
    argv = world.wrapped("--runtime", runtime, world.image("sci"), "true")
    taken = world.clock.time(argv, {"SHIFTERWRAP_CACHE_DIR": str(cache)}).checked()
    shutil.rmtree(cache)
    return taken


def _theirs(world: World) -> Timed:
    """A pull and a first run."""
    os.sync()
    pulled = world.pull_sif("sci")
    argv = ["/usr/bin/apptainer", "--silent", "exec", str(world.sif("sci")), "true"]
    started = world.clock.time(argv).checked()
    return Timed(pulled.wall + started.wall, pulled.cpu + started.cpu, [], [])


def _memory(world: World, rss: int, peer_rss: int) -> list[Line]:
    """The peaks; the proportional one is of one more run, which is not timed."""
    with Memory(world.clock.pid, pss=True) as memory:
        _ours(world, "embedded")
    what = "sci: peak memory of all processes"
    if not memory.pss:  # not ours to read on this machine
        return [limited("cold", f"{what} (sum of RSS)", rss / MEGABYTE, "MB", MOST_MEGABYTES, peer_rss / MEGABYTE)]
    return [
        limited("cold", f"{what}, shared pages once (PSS)", memory.pss / MEGABYTE, "MB", MOST_MEGABYTES),
        limited("cold", f"{what}, sum of RSS", rss / MEGABYTE, "MB", None, peer_rss / MEGABYTE),
    ]
