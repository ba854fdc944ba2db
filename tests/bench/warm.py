"""Starts of an image that is cached: beside the bare runtime on the same image, in turns."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.bench.report import Line, compared, limited
from tests.bench.world import Stopwatch, Timed, World, say

MOST_APPTAINER = 1.3
MOST_EMBEDDED = 0.4
MOST_CPU_MS = 30.0  # later 20
PAUSE_SECONDS = 0.05  # in which the last start's FUSE server ends
TRUE = ("true",)

Case = Callable[[], Timed]


def run(world: World) -> list[Line]:
    """The lines of this row."""
    turns = 10 if world.quick else 40
    lines = []
    for name in ("bb",) if world.quick else ("bb", "sci"):
        say(f"warm: {turns} turns with {name}")
        lines += _starts(world, name, turns)
    return [*lines, _cpu(world, turns)]


def _starts(world: World, name: str, turns: int) -> list[Line]:
    image, sif = world.image(name), world.sif(name)
    squashfs = world.warm(world.user, name)
    world.warm(world.root, name)
    with _mount_point(world):
        times = in_turns(
            {
                "apptainer": _wrapped(world, world.clock, "apptainer", image),
                "bare apptainer": _bare(world.clock, ["/usr/bin/apptainer", "--silent", "exec", str(sif), *TRUE]),
                "embedded": _wrapped(world, world.clock, "embedded", image),
                "root": _wrapped(world, world.root_clock, "embedded", image),
                "charliecloud": _wrapped(world, world.clock, "charliecloud", image),
                "bare ch-run": _bare(world.clock, ["/usr/bin/ch-run", str(squashfs), "--", *TRUE]),
            },
            turns,
        )
    wall = {case: [one.wall for one in taken] for case, taken in times.items()}
    bare = wall["bare apptainer"]
    return [
        compared("warm", f"{name}, --runtime apptainer / apptainer exec", wall["apptainer"], bare, MOST_APPTAINER),
        compared("warm", f"{name}, --runtime embedded / apptainer exec", wall["embedded"], bare, MOST_EMBEDDED),
        compared("warm", f"{name}, --runtime embedded as root / the same", wall["root"], bare),
        compared("warm", f"{name}, --runtime charliecloud / ch-run", wall["charliecloud"], wall["bare ch-run"]),
    ]


def in_turns(cases: Mapping[str, Case], turns: int) -> dict[str, list[Timed]]:
    """A B C A B C …, so that whatever else the machine does hits all of them; the first turn is not counted."""
    taken: dict[str, list[Timed]] = {name: [] for name in cases}
    for turn in range(turns + 1):
        for name, case in cases.items():
            one = case().checked()
            if turn:
                taken[name].append(one)
            time.sleep(PAUSE_SECONDS)
    return taken


def _wrapped(world: World, clock: Stopwatch, runtime: str, image: str) -> Case:
    return _bare(clock, world.wrapped("--runtime", runtime, image, *TRUE))


def _bare(clock: Stopwatch, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Case:
    return lambda: clock.time(argv, env)


@contextlib.contextmanager
def _mount_point(world: World) -> Iterator[None]:
    """Where ch-run mounts squashfs files; it makes the directory and leaves it."""
    place = Path(f"/var/tmp/{world.user.name}.ch")
    existed = place.exists()
    yield
    if not existed:
        shutil.rmtree(place, ignore_errors=True)


def _cpu(world: World, turns: int) -> Line:
    """CPU of wrapped-run until it becomes the runtime, beyond an interpreter that does nothing.

    The runtime is a copy of /bin/true, whose half millisecond is charged to us, as is the shell that finds the
    interpreter.
    """
    world.warm(world.user, "bb")
    env = _nothing_as_apptainer(world)
    say(f"warm: {turns} turns for the CPU before execve")
    times = in_turns(
        {
            "ours": _bare(world.clock, world.wrapped("--runtime", "apptainer", world.image("bb"), *TRUE), env),
            "bare": _bare(world.clock, [str(world.bin / "python"), "-SI", "-c", "pass"]),
        },
        turns,
    )
    ours, bare = (statistics.median(one.cpu for one in times[case]) * 1000 for case in ("ours", "bare"))
    line = limited("warm", "CPU until execve, less the bare interpreter", ours - bare, "ms", MOST_CPU_MS)
    figures = {case: [one.cpu for one in taken] for case, taken in times.items()}
    return line._replace(peer=f"({ours:.1f} - {bare:.1f})", numbers={**line.numbers, "cpu_s": figures})


def _nothing_as_apptainer(world: World) -> dict[str, str]:
    """The environment in which the site's configuration finds /bin/true as apptainer."""
    place = world.directory(world.user, "nothing")
    shutil.copy("/bin/true", place / "apptainer")
    settings = place / "shifterwrap.yaml"
    settings.write_text(f"tool_path: {place}:/usr/bin:/bin\n")
    snapshots = world.directory(world.user, "run")
    for path in (place / "apptainer", settings):
        os.chown(path, world.user.uid, world.user.gid)
    return {"SHIFTERWRAP_CONFIG": str(settings), "XDG_RUNTIME_DIR": str(snapshots)}
