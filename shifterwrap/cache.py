"""The read side of the node-local cache: where it is, what is in it, and the lease that keeps an entry.

::

    ROOT/                          one user's, 0700, on a node-local file system
      CACHEDIR.TAG  version        the layout's version; an unknown one is refused, never repaired
      entries/KEY/                 committed and immutable; KEY names digest, platform, format, owner policy, kind
        image.sqsh | tree/         what is mounted
        entry.json                 sizes and checksums, for list, verify and the check at each hit
        image.json                 what the launcher needs of the config: environment, command, mount points
        manifest.json config.json  as the registry sent them, byte for byte
        lock                       OFD read lock = lease (in use), write lock = being removed
      refs/REGISTRY/REPOSITORY/…   :TAG or @DIGEST and platform -> digest, replaced atomically
      pins/KEY                     exists = never evicted
      locks/HASH.lock              one producer at a time (singleflight.py); 0600, never unlinked
      stage/UUID/                  being written by the holder of its lock; unlocked = garbage that any run may reap

Invariants (each has a test):

- What is under ``entries/`` is complete: it came there by one rename(2) after its bytes were fsynced, and its content
  never changes. A changed converter is another KEY.
- A ref names a digest and no entry: it may dangle (then it is a miss), and never points to a half-written thing.
- An entry is removed only under its write lock, which is never waited for: a leased entry stays.
- Whoever got a lock checks that the path still names the locked file; else the entry was removed meanwhile: a miss.
- The size of the cache is the sum of its entries; there is no counter that could drift.

A lease is an OFD read lock on the entry's ``lock``. The descriptor is inherited over execve by the job; the kernel
drops it when the last process of the job is gone, however it went. Nothing here waits, and nothing here needs write
access: a hit works on a read-only cache. The one write of a hit is the lock file's access time, the last use.
"""

from __future__ import annotations

import fcntl
import os
import stat

from . import linux
from .errors import BadReference, CacheError, CacheFormat
from .oci import Platform, Reference, check_digest
from .values import TYPE_CHECKING, NamedTuple, loads

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any, Optional

LAYOUT_VERSION = 1
CONTENT_FORMAT = 1  # raised only when the bytes that an older version wrote would be wrong
SQUASHFS, TREE = "squashfs", "tree"
# Paths whose presence in an image some runtimes depend on; image.json records which are there.
MOUNT_POINTS = ("/dev", "/proc", "/sys", "/tmp", "/var/tmp", "/home", "/root", "/run", "/mnt", "/opt", "/srv",
                "/etc/passwd", "/etc/group", "/etc/hosts", "/etc/resolv.conf", "/etc/localtime")
IMAGE_NAMES = {SQUASHFS: "image.sqsh", TREE: "tree"}


class Key(NamedTuple):
    """What makes an entry's bytes: the manifest's digest, the platform, the owner policy and the kind."""

    digest: str
    platform: Platform
    policy: str
    kind: str

    def __str__(self) -> str:
        platform = "-".join(part for part in self.platform if part)
        return f"{self.digest.replace(':', '-')}.{platform}.v{CONTENT_FORMAT}.{self.policy}.{self.kind}"


class Ref(NamedTuple):
    """What a reference meant when it was last resolved (seconds since the epoch).

    ``digest`` is of the platform's manifest, the entry's; ``source_digest`` of what the tag itself names (an index).
    """

    reference: str
    platform: str
    digest: str
    source_digest: str
    resolved: float


class Entry(NamedTuple):
    """A committed entry as its ``entry.json`` describes it."""

    name: str
    path: str
    kind: str
    record: dict[str, Any]

    @property
    def image(self) -> str:
        """The squashfs file or the directory tree."""
        return os.path.join(self.path, IMAGE_NAMES[self.kind])

    @property
    def bytes(self) -> int:
        """Bytes on disk of the image."""
        return int(self.record["bytes"])


class Lease(NamedTuple):
    """An entry that stays as long as ``fd``, or a copy of it in another process, is open."""

    entry: Entry
    fd: int


def locate(environ: Mapping[str, str], uid: int, local_scratch: str) -> str:
    """The cache directory of this user: the one he names, else the first node-local place.

    CacheError when SHIFTERWRAP_CACHE_DIR names a directory on a network file system: locks there are not dependable,
    and a thousand nodes would write one cache.
    """
    named = environ.get("SHIFTERWRAP_CACHE_DIR", "")
    if named:
        if not named.startswith("/"):
            raise CacheError(f"SHIFTERWRAP_CACHE_DIR is not an absolute path: {named}", "name a node-local directory")
        _refuse_network(named)
        return os.path.normpath(named)
    for base, name in _candidates(environ, uid, local_scratch):
        if _is_safe_place(_existing(base), uid) and not linux.network_file_system(_existing(base)):
            return os.path.join(base, name)
    return f"/var/tmp/shifterwrap-{uid}"


def _refuse_network(path: str) -> None:
    kind = linux.network_file_system(_existing(path))
    if kind:
        raise CacheError(f"{path} is on a network file system ({kind})",
                         "set SHIFTERWRAP_CACHE_DIR to a node-local directory")


def _is_safe_place(base: str, uid: int) -> bool:
    """Whether we can write there and nobody else can exchange what we wrote: a user's directory is not root's."""
    try:
        info = os.stat(base)
    except OSError:
        return False
    return os.access(base, os.W_OK) and (info.st_uid in (0, uid) or bool(info.st_mode & stat.S_ISVTX))


def _candidates(environ: Mapping[str, str], uid: int, local_scratch: str) -> Iterator[tuple[str, str]]:
    home = environ.get("HOME", "")
    xdg = environ.get("XDG_CACHE_HOME", "") or (os.path.join(home, ".cache") if home else "")
    if xdg.startswith("/"):
        yield xdg, "shifterwrap"
    for base in (local_scratch, environ.get("TMPDIR", "")):
        if base.startswith("/"):
            yield base, f"shifterwrap-{uid}"


def _existing(path: str) -> str:
    """The nearest ancestor of ``path`` that exists."""
    while not os.path.isdir(path) and path not in ("/", ""):
        path = os.path.dirname(path)
    return path or "/"


def check(root: str, uid: int) -> bool:
    """Whether there is a cache at ``root``; CacheError when it belongs to somebody else, or others may write to it.

    CacheFormat when another version of the layout is there. Nothing is changed in any case.
    """
    try:
        info = os.lstat(root)
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise CacheError(f"cache {root}: {exc.strerror}", "set SHIFTERWRAP_CACHE_DIR to a directory of yours") from exc
    if stat.S_ISLNK(info.st_mode):
        raise CacheError(f"cache {root} is a symbolic link", "set SHIFTERWRAP_CACHE_DIR to the directory itself")
    if not stat.S_ISDIR(info.st_mode):
        raise CacheError(f"cache {root} is not a directory", "set SHIFTERWRAP_CACHE_DIR to a directory of yours")
    if info.st_uid != uid:
        raise CacheError(f"cache {root} belongs to uid {info.st_uid}, not to {uid}",
                         "a cache without a daemon has one user: set SHIFTERWRAP_CACHE_DIR to a directory of yours")
    _refuse_network(root)  # FUSE too: whoever serves it says who owns it
    if info.st_mode & 0o022:
        raise CacheError(f"cache {root} is writable by others", f"repair it with: chmod 700 {root}")
    try:
        with open(os.path.join(root, "version"), encoding="ascii") as stream:
            version = stream.read(32).strip()
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError) as exc:
        raise CacheError(f"cache {root}: its version cannot be read") from exc
    if version != str(LAYOUT_VERSION):
        raise CacheFormat(f"cache {root} has layout version {version or 'none'}, this is for {LAYOUT_VERSION}")
    return True


def ref_path(root: str, reference: Reference, platform: Platform) -> str:
    """The file under ``refs/``; no tag can be taken for a repository, since a component never starts with ``:`` or
    ``@``, and none can lead out of the directory (oci.parse_reference)."""
    name = f"@{reference.digest}" if reference.digest else f":{reference.tag}"
    leaf = f"{name},{str(platform).replace('/', '-')}.json"
    return os.path.join(root, "refs", reference.registry, reference.repository, leaf)


def lookup(root: str, reference: Reference, platform: Platform) -> Optional[Ref]:
    """What ``reference`` was last resolved to; None when it never was."""
    return read_ref(ref_path(root, reference, platform))


def read_ref(path: str) -> Optional[Ref]:
    """The ref in a file; None when it is missing or not one."""
    document = read_json(path) or {}
    try:
        reference, platform, digest, source_digest = (str(document[name]) for name in Ref._fields[:4])
        return Ref(reference, platform, check_digest(digest), source_digest, float(document["resolved"]))
    except (KeyError, ValueError, TypeError, BadReference):
        return None


def read_json(path: str) -> Optional[dict[str, Any]]:
    """The JSON object in a file of the cache; None when it is missing or damaged."""
    try:
        with open(path, "rb") as stream:
            document = loads(stream.read().decode())
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def lease(root: str, key: Key) -> Optional[Lease]:
    """A lease on the entry of ``key``; None when it is not there, is being removed or has not its recorded size."""
    return lease_name(root, str(key))


def lease_name(root: str, name: str) -> Optional[Lease]:
    """As :func:`lease`, by the entry's directory name."""
    path = os.path.join(root, "entries", name)
    lock_path = os.path.join(path, "lock")
    try:
        fd = os.open(lock_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    if linux.ofd_lock(fd, fcntl.F_RDLCK) and names_same_file(lock_path, fd):
        entry = read_entry(path)
        if entry is not None and sound(entry):
            _mark_used(fd)
            return Lease(entry, _out_of_the_way(fd))
    os.close(fd)
    return None


def _out_of_the_way(fd: int) -> int:
    """The lease on a descriptor that no script takes for its own: ``exec 3>file`` would end it."""
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100)
    except OSError:  # RLIMIT_NOFILE is lower
        return fd
    os.close(fd)
    return high


def lease_first(root: str, keys: Sequence[Key]) -> Optional[Lease]:
    """The first lease that can be had, in the caller's order of preference."""
    for key in keys:
        found = lease(root, key)
        if found is not None:
            return found
    return None


def names_same_file(path: str, fd: int) -> bool:
    """Whether ``path`` still names the open file ``fd``."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except OSError:
        return False


def _mark_used(fd: int) -> None:
    """The lock's access time is the last use, set by hand so that noatime mounts do not matter."""
    try:
        os.utime(fd)
    except OSError:
        pass  # a read-only cache has no eviction either


def read_entry(path: str) -> Optional[Entry]:
    """The entry in a directory under ``entries/``; None when there is none."""
    record = read_json(os.path.join(path, "entry.json"))
    name = os.path.basename(path)
    kind = name.rpartition(".")[2]
    if record is None or kind not in IMAGE_NAMES or not isinstance(record.get("bytes"), int):
        return None
    return Entry(name, path, kind, record)


def sound(entry: Entry) -> bool:
    """The check that each hit pays: a squashfs has its recorded size, a tree exists."""
    try:
        info = os.lstat(entry.image)
    except OSError:
        return False
    if entry.kind == TREE:
        return stat.S_ISDIR(info.st_mode)
    return stat.S_ISREG(info.st_mode) and info.st_size == entry.bytes


def entries(root: str) -> Iterator[Entry]:
    """Every committed entry, by name."""
    for path in entry_paths(root):
        entry = read_entry(path)
        if entry is not None:
            yield entry


def entry_paths(root: str) -> list[str]:
    """The directories of all entries, of the damaged too."""
    base = os.path.join(root, "entries")
    try:
        names = sorted(name for name in os.listdir(base) if name.rpartition(".")[2] in IMAGE_NAMES)
        return [os.path.join(base, name) for name in names]
    except OSError:
        return []


def damaged(path: str) -> Entry:
    """A stand-in for an entry whose ``entry.json`` cannot be read, so that it can be named and removed."""
    name = os.path.basename(path)
    return Entry(name, path, name.rpartition(".")[2], {"bytes": 0})


def refs(root: str) -> Iterator[Ref]:
    """Every ref, by reference."""
    paths = (os.path.join(base, name) for base, _, names in os.walk(os.path.join(root, "refs")) for name in names
             if name.endswith(".json"))
    yield from sorted(ref for ref in map(read_ref, paths) if ref is not None)


def last_used(entry: Entry) -> float:
    """Seconds since the epoch of the last lease, or of the commit."""
    return os.stat(os.path.join(entry.path, "lock")).st_atime


def pinned(root: str, name: str) -> bool:
    """Whether the entry is pinned."""
    return os.path.exists(os.path.join(root, "pins", name))


def in_use(entry: Entry) -> bool:
    """Whether any process holds a lease on the entry."""
    try:
        fd = os.open(os.path.join(entry.path, "lock"), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return linux.ofd_locked(fd)
    finally:
        os.close(fd)


def image_document(entry: Entry) -> dict[str, Any]:
    """The entry's ``image.json``; CacheError when it is damaged."""
    document = read_json(os.path.join(entry.path, "image.json")) or {}
    lists = (document.get(name) for name in ("env", "entrypoint", "cmd"))
    if not all(isinstance(value, list) for value in lists) or not isinstance(document.get("working_dir"), str):
        raise CacheError(f"{entry.path}/image.json is damaged",
                         f"remove the entry with: shifterwrap rm {entry.name}, and run again")
    return document
