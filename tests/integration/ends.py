"""How a command ends when something is wrong, and what it leaves behind: what the tests of faults have in common."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fakes.registry import Image, Registry, Reply, Request, Serve, image
from tests.testbed.images import busybox_layer
from tests.testbed.ocilayout import file, tar
from tests.testbed.people import Person

NEEDS = ("users", "busybox", "userns", "tar2sqfs", "fuse", "squashfuse_ll")
# One attempt and short patience; a small file system is no reason to refuse.
QUICK = {"connect_seconds": 2, "read_seconds": 1, "retries": 0, "cache_min_free_bytes": 0}
DONE = subprocess.CompletedProcess
PATIENCE_SECONDS = 60.0
_PROGRESS = re.compile(r"[a-z-]+: ((resolve|fetch|convert|verify|commit) docker://|waiting for |warning: )")


# ---- who runs what


def configured(person: Person, **settings: Any) -> Person:
    """``person`` with the embedded runtime, in a site with QUICK and these settings."""
    number = len(list(person.home.parent.glob("site-*.yaml")))
    path = person.home.parent / f"site-{number}.yaml"
    path.write_text(json.dumps({**QUICK, **settings}))  # JSON is YAML
    path.chmod(0o644)
    env = {"SHIFTERWRAP_CONFIG": str(path), "SHIFTERWRAP_RUNTIME": "embedded", "XDG_RUNTIME_DIR": str(person.home)}
    return person._replace(env={**person.env, **env})


def with_trees(person: Person) -> Person:
    """``person`` where no tool writes squashfs: images become directory trees."""
    return configured(person, tool_path="/nonexistent")


@functools.cache
def app(version: str = "1") -> Image:
    """A busybox that says its version: ``cat /version``."""
    layer = busybox_layer().source
    assert isinstance(layer, bytes)
    return image([layer, tar([file("version", version.encode())])], {"Env": ["PATH=/bin"], "Cmd": ["cat", "/version"]})


def kept(person: Person, hub: Registry) -> str:
    """The reference of an image that the person has in the cache: pulled once, and copied for later tests."""
    reference = hub.add("lab/kept", "1", app("kept"))
    site = Path(person.env["SHIFTERWRAP_CONFIG"]).read_bytes()
    seed = Path(_seeds().name, f"{person.uid}-{hashlib.sha256(site).hexdigest()}")
    if not seed.exists():
        assert run(person, reference) == "kept"
        (seed / "registry").mkdir(parents=True)
        subprocess.run(["cp", "-a", person.cache, seed / "cache"], check=True)
        (seed / "registry" / hub.address).touch()
        return reference
    subprocess.run(["cp", "-a", f"{seed}/cache/.", person.cache], check=True)
    (before,) = os.listdir(seed / "registry")
    refs = person.cache / "refs"
    (refs / before).rename(refs / hub.address)
    (ref,) = refs.rglob("*.json")
    ref.write_bytes(ref.read_bytes().replace(before.encode(), hub.address.encode()))
    return reference


@functools.cache
def _seeds() -> tempfile.TemporaryDirectory[str]:
    """Goes when this process ends."""
    return tempfile.TemporaryDirectory(prefix="shifterwrap-seeds-", dir="/var/tmp")


def run(person: Person, reference: str, *options: str) -> str:
    """What the image's own command prints; the launch must succeed."""
    done = person.run(["wrapped-run", *options, reference])
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def finished(process: subprocess.Popen[str]) -> DONE[str]:
    """The end of what ``popen`` started."""
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return DONE(process.args, process.returncode, out, err)


# ---- how it ended


def refused(done: DONE[str], *words: str, code: int = 125, prog: str = "wrapped-run") -> str:
    """The one line of a failure: whose it is, what happened with these words in it, and a hint in parentheses."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if not _PROGRESS.match(line)]
    assert len(lines) == 1, done.stderr
    assert re.fullmatch(rf"{prog}: .+ \([^ ].*\)", lines[0]), lines[0]
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    assert "internal error" not in lines[0], lines[0]
    assert done.stdout == ""
    return lines[0]


def visible(cache: Path) -> dict[str, tuple[int, int]]:
    """What the cache shows: every file under entries/ and refs/ with its size and the time of its last change."""
    found = {}
    for part in ("entries", "refs"):
        for base, _, names in os.walk(cache / part):
            for name in names:
                info = os.lstat(os.path.join(base, name))
                found[os.path.relpath(os.path.join(base, name), cache)] = (info.st_size, info.st_mtime_ns)
    return found


def unfinished(cache: Path) -> list[str]:
    """The directories in stage/."""
    return sorted(os.listdir(cache / "stage")) if (cache / "stage").exists() else []


@contextmanager
def unharmed(person: Person) -> Iterator[None]:
    """The block leaves the cache as it was: nothing new is visible, nothing is unfinished, all of it is sound."""
    before = visible(person.cache)
    yield
    assert visible(person.cache) == before
    assert unfinished(person.cache) == []
    if before:
        verified(person)


def verified(person: Person) -> None:
    """Every entry is what was committed."""
    done = person.run(["shifterwrap", "verify"])
    assert done.returncode == 0, done.stdout + done.stderr


def swept(person: Person) -> None:
    """What a dead pull left is garbage that ``shifterwrap gc`` takes away, and no entry is damaged."""
    done = person.run(["shifterwrap", "gc"])
    assert done.returncode == 0, done.stderr
    assert unfinished(person.cache) == []
    verified(person)


# ---- waiting without luck


class Hold:
    """Requests that a registry does not answer before it is told to."""

    def __init__(self, hub: Registry, pattern: str, after: int) -> None:
        self._hub, self._pattern, self._after = hub, pattern, after
        self._waiting = threading.Semaphore(0)
        self._over = threading.Event()

    def __call__(self, request: Request, serve: Serve) -> Reply:
        """A fault: the honest reply, with a pause in its body."""
        reply = serve(request)
        assert isinstance(reply.body, bytes)
        return reply._replace(body=self._paused(reply.body), length=len(reply.body))

    def _paused(self, body: bytes) -> Iterator[bytes]:
        if self._after:
            yield body[: self._after]
        self._waiting.release()
        self._over.wait(PATIENCE_SECONDS)
        yield body[self._after :]

    def reached(self) -> None:
        """Wait for one more request to be held."""
        assert self._waiting.acquire(timeout=PATIENCE_SECONDS), f"nobody asked for {self._pattern}"

    def release(self) -> None:
        """Answer everything, now and from now on."""
        self._hub.heal()
        self._over.set()


@contextmanager
def held(hub: Registry, pattern: str, after: int = 0) -> Iterator[Hold]:
    """The registry holds its answers to these requests, after that many bytes, until the block ends."""
    hold = Hold(hub, pattern, after)
    hub.fault(pattern, hold, method="GET")
    try:
        yield hold
    finally:
        hold.release()


def until(true: Callable[[], bool], what: str) -> None:
    """Return once ``true()`` is; fail when that takes unreasonably long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.01)


def records(cache: Path) -> list[dict[str, Any]]:
    """What producers left in the lock files, as far as it can be read right now."""
    found = []
    for path in (cache / "locks").glob("*.lock"):
        try:
            found.append(json.loads(path.read_bytes()))
        except ValueError:  # empty, or being written
            continue
    return found


def producer(cache: Path, but: int = 0) -> int:
    """The process id of the worker that pulls, once there is one; not ``but``, which was killed."""

    def living() -> list[int]:
        return [int(r["pid"]) for r in records(cache) if r["state"] == "pulling" and r["pid"] != but]

    until(lambda: bool(living()), "a producer is at work")
    return living()[0]
