"""A cache with made-up entries, and children that die where they are told to: for the tests of the cache's modules."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shifterwrap import cache, linux, store
from shifterwrap.cache import Key, Lease
from shifterwrap.oci import Platform

AMD64 = Platform("linux", "amd64")
WHOLE = {"image.sqsh", "image.json", "entry.json", "lock"}
IMAGE = {"env": [], "entrypoint": [], "cmd": [], "working_dir": ""}
PATIENCE_SECONDS = 60.0
# Whatever changes a file system, and what is between.
STEPS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "chmod", "utime", "close")


def make_root(path: Path) -> str:
    """A cache, empty."""
    root = str(path / "cache")
    store.create(root, os.getuid())
    return root


def key(number: int = 1, kind: str = cache.SQUASHFS) -> Key:
    return Key(f"sha256:{number:064x}", AMD64, "root", kind)


def write_image(made: store.Stage, content: bytes) -> dict[str, Any]:
    """What a conversion leaves in the stage directory, and its record."""
    Path(made.path, "image.sqsh").write_bytes(content)
    return {"bytes": len(content), "digest": key().digest}


def publish(root: str, which: Key, content: bytes = b"image") -> Lease:
    """A committed entry, leased."""
    with store.stage(root) as made:
        return store.commit(root, made, which, write_image(made, content), dict(IMAGE))


def keep(root: str, which: Key, content: bytes = b"image", used: float = 0.0) -> str:
    """A committed entry that nobody uses; its name."""
    held = publish(root, which, content)
    os.utime(held.fd, (used, used))
    os.close(held.fd)
    return held.entry.name


def names(root: str, part: str = "entries") -> list[str]:
    return sorted(os.listdir(os.path.join(root, part)))


def whole(root: str, content: bytes = b"image") -> bool:
    """Whether every entry that is visible is complete."""
    return all(
        set(os.listdir(os.path.join(root, "entries", name))) == WHOLE
        and Path(root, "entries", name, "image.sqsh").read_bytes() == content
        and cache.read_entry(os.path.join(root, "entries", name)) is not None
        for name in names(root)
    )


# ---- children


def stepped(before: Callable[[], None]) -> contextlib.ExitStack:
    """Have ``before`` called before each step, but for its own, in this process, until the stack is closed."""
    restore = contextlib.ExitStack()
    looking = [False]
    places = [*((os, name) for name in STEPS), (linux, "ofd_lock")]
    for module, name in places:
        original = getattr(module, name)

        def step(*args: Any, original: Callable[..., Any] = original, **options: Any) -> Any:
            if not looking[0]:
                looking[0] = True
                before()
                looking[0] = False
            return original(*args, **options)

        setattr(module, name, step)
        restore.callback(setattr, module, name, original)
    return restore


def dies_at(number: int, work: Callable[[], object]) -> bool:
    """Do ``work`` in a child that is killed before its step of that number; False when it ended before."""
    left = [number]

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def mortal() -> None:
        stepped(count)
        work()

    status = ended(fork(mortal))
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def every_death(work: Callable[[], object]) -> Iterator[int]:
    """Every step before which a child dies of ``work``; then it is done once more, to its end."""
    number = 0
    while dies_at(number, work):
        yield number
        number += 1
    assert number >= 3


def fork(work: Callable[[], object]) -> int:
    """A child that does ``work`` and ends with 0, or with 1 and a traceback; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - a child must never return into pytest
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Wait for the child; its exit code, or the signal that killed it with a minus."""
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
