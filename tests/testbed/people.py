"""The users that tests act as: each with a clean environment, a home and a cache of its own for one test."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RUN_SECONDS = 120.0


class Person(NamedTuple):
    """Somebody who runs commands. `env` is all that a command sees; `cache` is its SHIFTERWRAP_CACHE_DIR."""

    name: str
    uid: int
    gid: int
    home: Path
    cache: Path
    env: dict[str, str]

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: str | Path | None = None,
        timeout: float = RUN_SECONDS,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, output captured. `env` adds variables to the clean ones, or with None takes one away."""
        options = {"capture_output": True, **options} if not {"stdout", "stderr"} & options.keys() else options
        return subprocess.run(argv, timeout=timeout, check=False, **self._as_this_person(env, cwd, options))

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: str | Path | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start and return at once, with output to pipes: for herds."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen(argv, **self._as_this_person(env, cwd, options))

    def _as_this_person(
        self, env: Mapping[str, str | None] | None, cwd: str | Path | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        variables = {**self.env, **(env or {})}
        identity: dict[str, Any] = {} if self.uid == os.geteuid() else {"user": self.uid, "group": self.gid}
        return {
            "cwd": cwd or self.home,
            "env": {name: value for name, value in variables.items() if value is not None},
            "text": True,
            "umask": 0o022,
            **({**identity, "extra_groups": []} if identity else {}),
            **({} if "input" in options else {"stdin": subprocess.DEVNULL}),
            **options,
        }


def settle(name: str, workspace: Path) -> Person:
    """Give `name` a place in `workspace`: a home and a cache that are theirs alone."""
    who = pwd.getpwnam(name)
    place = workspace / name
    home, cache = place / "home", place / "cache"
    for directory in (place, home, cache):
        directory.mkdir(mode=0o700)
        os.chown(directory, who.pw_uid, who.pw_gid)
    place.chmod(0o755)
    # the environment's own bin, unresolved: the interpreter in there is a link
    path = [str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
    env = {"HOME": str(home), "USER": name, "LOGNAME": name, "PATH": ":".join(path), "LANG": "C.UTF-8"}
    return Person(name, who.pw_uid, who.pw_gid, home, cache, {**env, "SHIFTERWRAP_CACHE_DIR": str(cache)})
