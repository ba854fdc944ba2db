"""Starts commands as the user who runs it, and times them: a JSON request a line in, a JSON answer a line out.

    python3 -SI stopwatch.py DIRECTORY      where the commands' standard error goes, one file for each

A request has argv, env, times (how many at once) and seconds (then they are killed). The answer has wall (seconds
until the last ended), cpu (seconds, of the commands and of what they waited for), codes, and errors: what the failed
ones wrote. This process is small and has the user's identity already, so a start costs a fraction of a millisecond.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

DISTINCT_ERRORS = 5
ERROR_BYTES = 400


def main() -> None:
    """Answer until standard input ends."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), sys.argv[1])), flush=True)


def answer(request: dict[str, Any], directory: str) -> dict[str, Any]:
    """Run what one request asks for."""
    files = [os.path.join(directory, f"stderr.{number}") for number in range(request["times"])]
    began = time.perf_counter()
    pids = [_spawn(request["argv"], request["env"], file) for file in files]
    codes, cpu = _collect(pids, request["seconds"])
    wall = time.perf_counter() - began
    failed = [_tail(file) for file, pid in zip(files, pids) if codes[pid]]
    for file in files:
        os.unlink(file)
    return {
        "wall": wall,
        "cpu": cpu,
        "codes": [codes[pid] for pid in pids],
        "errors": sorted(set(failed))[:DISTINCT_ERRORS],
    }


def _spawn(argv: list[str], env: dict[str, str], errors: str) -> int:
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 2, errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
    ]
    return os.posix_spawn(argv[0], argv, env, file_actions=actions, setpgroup=0)


def _collect(pids: list[int], seconds: int) -> tuple[dict[int, int], float]:
    """Exit code of each and CPU seconds of all; their process groups are killed when the time is over."""
    codes: dict[int, int] = {}
    cpu = 0.0

    def kill(*_: object) -> None:
        for pid in pids:
            if pid not in codes:
                os.killpg(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.alarm(seconds)
    while len(codes) < len(pids):
        pid, status, usage = os.wait4(-1, 0)
        codes[pid] = os.waitstatus_to_exitcode(status)
        cpu += usage.ru_utime + usage.ru_stime
    signal.alarm(0)
    return codes, cpu


def _tail(path: str) -> str:
    with open(path, "rb") as stream:
        return stream.read()[-ERROR_BYTES:].decode(errors="replace").strip()


if __name__ == "__main__":
    main()
