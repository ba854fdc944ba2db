"""Many processes at once on a cold cache: all must start, and each blob may be downloaded once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from tests.bench.report import Line, compared, noted, required
from tests.bench.world import Timed, World, say

HERD = 64
SCI_HERD = 16


class Herd:
    """What became of one herd: how long, how many started, how often the registry served each blob."""

    def __init__(self, taken: Timed, gets: dict[str, int]) -> None:
        self.wall = taken.wall
        self.good = f"{taken.codes.count(0)}/{len(taken.codes)}"
        self.most = max(gets.values(), default=0)
        self.total = sum(gets.values())
        self.errors = taken.errors


def run(world: World) -> list[Line]:
    """The lines of this row."""
    image = world.image("bb")
    lines = []
    peer = _theirs(world, image)
    for runtime in ("apptainer", "embedded"):
        ours = _ours(world, image, runtime, HERD)
        what = f"{HERD} at once, bb, --runtime {runtime}"
        lines += _lines(what, ours, HERD, peer)
        lines.append(compared("herd", f"{what}: until the last ended", [ours.wall], [peer.wall]))
    count = 4 if world.quick else SCI_HERD
    ours = _ours(world, world.image("sci"), "apptainer", count)
    lines += _lines(f"{count} at once, sci, --runtime apptainer", ours, count, None)
    return [
        *lines,
        noted("herd", f"{count} at once, sci: until the last ended", f"{ours.wall:.1f} s", wall_s=ours.wall),
    ]


def _lines(what: str, ours: Herd, count: int, peer: Herd | None) -> list[Line]:
    good, most, total = (peer.good, str(peer.most), peer.total) if peer else ("", "", 0)
    errors = {"errors": ours.errors, "peer_errors": peer.errors if peer else []}
    return [
        required("herd", f"{what}: exit 0", ours.good, f"{count}/{count}", good, **errors),
        required("herd", f"{what}: most GETs of a blob", str(ours.most), "1", most, gets=ours.total, peer_gets=total),
    ]


def _ours(world: World, image: str, runtime: str, count: int) -> Herd:
    say(f"herd: {count} of wrapped-run --runtime {runtime} {image}")
    cache = world.directory(world.user, "herd")
    argv = world.wrapped("--runtime", runtime, image, "true")
    return _started(world, argv, {"SHIFTERWRAP_CACHE_DIR": str(cache)}, count)


def _theirs(world: World, image: str) -> Herd:
    say(f"herd: {HERD} of apptainer exec {image}")
    cache = world.directory(world.user, "herd")
    return _started(world, ["/usr/bin/apptainer", "--silent", "exec", image, "true"], world.apptainer(cache), HERD)


def _started(world: World, argv: Sequence[str], env: dict[str, str], count: int) -> Herd:
    world.registry.forget()
    taken = world.clock.time(argv, env, count)
    for error in taken.errors:
        say(f"herd: a failed one said: {error}")
    shutil.rmtree(world.scratch / world.user.name / "herd", ignore_errors=True)
    return Herd(taken, world.blob_gets())
