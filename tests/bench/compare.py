"""The main program of compare.sh: chooses the rows, runs them in one world, prints the table."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # run by path: the checkout is not on sys.path yet, and this directory should not be
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.bench import cold, herd, kills, memory, report, warm
from tests.bench.world import World, say, world

ABOUT = """Measure shifterwrap beside apptainer and ch-run, each ratio in turns within this run. herd: 64 processes on
a cold cache. cold: pull and first run of a large image, and its memory. warm: starts of a cached image, and their CPU.
memory: a cold pull in 512 MiB. kills: 200 times kill -9 in a pull. A missed ratio is told; only what was wrong (herd,
memory, kills, or a row that could not be measured) makes the exit code 1."""

ROWS: dict[str, Callable[[World], list[report.Line]]] = {
    "herd": herd.run,
    "cold": cold.run,
    "warm": warm.run,
    "memory": memory.run,
    "kills": kills.run,
}


def main() -> int:
    """0 when nothing was wrong, however slow."""
    options = _options()
    if os.geteuid() != 0:
        sys.exit("compare: must run as root: it acts as the ordinary user swtester, and in a memory cgroup")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    os.umask(0o022)
    lines: list[report.Line] = []
    failed = []
    with world(quick=options.quick) as made:
        for name in options.row or ROWS:
            say(f"row {name}")
            try:
                lines += ROWS[name](made)
            except (RuntimeError, OSError) as error:  # the other rows are worth having
                say(f"row {name} could not be measured: {error}")
                failed.append(name)
    print(report.table(lines))
    if options.json:
        report.write(options.json, lines, quick=options.quick)
    failed += [line.row for line in lines if line.fatal and not line.ok]
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare.sh", description=ABOUT)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: minutes, and rough figures")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    parser.add_argument("row", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}; all of them by default")
    options = parser.parse_args()
    unknown = set(options.row) - ROWS.keys()
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
