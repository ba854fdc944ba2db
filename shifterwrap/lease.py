"""The image that is wanted, leased: a hit is read from the cache, a miss is produced once for the whole node.

On a miss one process becomes the producer: it starts ``shifterwrap pull-worker`` with the lock's descriptor, so that
it stays small itself, and the others wait for the result.
"""

from __future__ import annotations

import os
import sys
import time

from . import cache, oci
from .cache import Key, Lease
from .config import Config
from .errors import Error, NotCached, from_record
from .oci import Platform, Reference
from .values import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Optional

    from .singleflight import Flight


class Want(NamedTuple):
    """The image that is wanted, and the kinds of entry that serve here, best first."""

    reference: Reference
    platform: Platform
    root: str
    policy: str
    kinds: tuple[str, ...]


def wanted(text: str, platform: Optional[Platform], settings: Config, mounts: bool, environ: Mapping[str, str],
           uid: int) -> Want:
    """What ``text`` names, in this user's cache; a caller who cannot mount squashfs gets directory trees."""
    reference = oci.parse_reference(text, settings.default_registry)
    kinds = (cache.SQUASHFS, cache.TREE) if mounts else (cache.TREE,)
    root = cache.locate(environ, uid, settings.local_scratch)
    return Want(reference, platform or oci.host_platform(), root, settings.owner_policy, kinds)


def find(want: Want, since: float = 0.0) -> Optional[Lease]:
    """A lease on the image if it is cached, and was resolved not before ``since`` (seconds since the epoch)."""
    ref = cache.lookup(want.root, want.reference, want.platform)
    if ref is None or (since and not since <= ref.resolved <= time.time()):
        return None
    return cache.lease_first(want.root, [Key(ref.digest, want.platform, want.policy, kind) for kind in want.kinds])


def obtain(want: Want, settings: Config, pull: str, prog: str, *, offline: bool = False,
           verbose: bool = False) -> Lease:
    """A lease on the image, pulled first if need be; NotCached where that was forbidden.

    ``pull`` is missing, always (ask the registry whether the tag moved) or never; ``prog`` signs what is printed.
    """
    present = cache.check(want.root, os.getuid())
    held = find(want) if present and pull != "always" else None
    if held is None and (pull == "never" or offline):
        raise NotCached(f"{want.reference} is not cached", f"pull it first: shifterwrap pull {want.reference}")
    return held if held is not None else _produced(want, settings, pull == "always", prog, verbose)


def _produced(want: Want, settings: Config, always: bool, prog: str, verbose: bool) -> Lease:
    from . import singleflight, store  # these only on a miss
    from .progress import Waiting

    now = time.time()
    store.create(want.root, os.getuid())
    waiting = Waiting(prog, str(want.reference), sys.stderr)
    waiter = singleflight.Waiter(now, now + settings.pull_deadline_seconds, waiting)
    job = {"reference": want.reference, "platform": want.platform, "root": want.root, "kinds": want.kinds,
           "always": always, "deadline": waiter.deadline}
    order = {"job": job, "config": settings._asdict(), "prog": prog, "verbose": verbose}
    path = singleflight.lock_path(want.root, f"{want.reference} {want.platform}")
    try:
        return singleflight.join(path, waiter, lambda: find(want, now if always else 0.0),
                                 lambda flight: _work(flight, order), believe=not always)
    finally:
        waiting.close()


def _work(flight: Flight, order: dict[str, Any]) -> None:
    """Run the pull in a process of its own, which inherits the lock: killed alone, it is taken over."""
    import json
    import subprocess

    from . import singleflight

    text = json.dumps({**order, "flight": flight})
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")
    code = subprocess.run([sys.executable, "-I", program, "pull-worker"], input=text.encode(), stdout=2,
                          pass_fds=[flight.fd], check=False).returncode
    record = singleflight.read(flight.path) if code > 0 else {}
    if record.get("state") == "failed":
        raise from_record(record["error"])
    if code > 0 and record.get("state") != "done":
        raise Error(f"the pull ended with code {code} and left no reason", "run again with SHIFTERWRAP_DEBUG=1")
