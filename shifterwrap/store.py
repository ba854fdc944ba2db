"""The write side of the cache: stage, commit, remove, reserve. The layout and its invariants are in cache.py.

An entry is born in ``stage/UUID`` under the write lock of its ``lock`` file, which it keeps for life: commit() fsyncs
the bytes, renames the directory to its key and turns the write lock into the read lock that it returns, so there is no
moment in which an evictor could take what was just made. What a crash leaves behind:

- before the rename: a stage directory whose lock nobody holds, which the next reap() removes;
- after the rename: a complete entry, at worst without a ref; the next pull of it finds it by digest;
- in remove(): a directory in ``stage/`` again, never a half-removed entry under its key.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

from . import cache, evict, linux
from .cache import Entry, Key, Lease, Ref
from .errors import CacheError, CacheFull, EntryBusy, Error

FULL = (errno.ENOSPC, errno.EDQUOT)
_DIRECTORIES = ("entries", "refs", "pins", "locks", "stage")
_REMOVER_POLLS = 50
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# A cache of shifterwrap; see https://bford.info/cachedir/\n"


class Stage(NamedTuple):
    """A directory that is being filled, and the descriptor that holds its write lock."""

    path: str
    lock_fd: int


def create(root: str, uid: int) -> None:
    """Make sure that there is a cache at ``root``; ``version`` is written last, so half a layout is none.

    CacheError when the place cannot be written, belongs to others or holds something else.
    """
    if cache.check(root, uid):
        return
    with explained(root):
        os.makedirs(os.path.dirname(root), exist_ok=True)
        try:
            os.mkdir(root, 0o700)
        except FileExistsError:
            foreign = set(os.listdir(root)) - {"CACHEDIR.TAG", *_DIRECTORIES} - {"version"}
            if any(not name.startswith(".new-") for name in foreign):
                raise CacheError(f"{root} is not empty and not a cache", "name an empty or a new directory") from None
            if not cache.check(root, uid):
                os.chmod(root, 0o700)
        for name in _DIRECTORIES:
            os.makedirs(os.path.join(root, name), 0o700, exist_ok=True)
        write_file(os.path.join(root, "CACHEDIR.TAG"), _TAG.encode())
        write_file(os.path.join(root, "version"), f"{cache.LAYOUT_VERSION}\n".encode())


@contextmanager
def explained(root: str) -> Iterator[None]:
    """Turn an OSError of writing under ``root`` into the error that names the cache and the cure."""
    try:
        yield
    except OSError as exc:
        raise explain(exc, root) from exc


def explain(exc: OSError, root: str) -> Error:
    """The error for an OSError met while writing under ``root``."""
    if exc.errno in FULL:
        return CacheFull(f"no space left for the cache {root}")
    if exc.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return CacheError(f"cache {root} cannot be written", "set SHIFTERWRAP_CACHE_DIR to a directory of yours")
    return CacheError(f"cache {root}: {exc.filename or 'write'} failed")


def _free(path: str) -> int:
    try:
        info = os.statvfs(cache._existing(path))
    except OSError:
        return 0
    return info.f_bavail * info.f_frsize


def write_file(path: str, data: bytes, *, durable: bool = False) -> None:
    """Put ``data`` at ``path`` in one step; a crash leaves the old file or the new one, at worst a ``.new-`` beside."""
    temporary = os.path.join(os.path.dirname(path), f".new-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            if durable:
                os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        _unlink(temporary)
        raise


def write_json(path: str, document: dict[str, Any], *, durable: bool = False) -> None:
    """As :func:`write_file`, for a JSON object."""
    write_file(path, json.dumps(document, separators=(",", ":")).encode(), durable=durable)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


@contextmanager
def stage(root: str) -> Iterator[Stage]:
    """A stage directory for the block; whatever is still in it at the block's end is removed."""
    with explained(root):
        made = _new_stage(root)
    try:
        yield made
    finally:
        if cache.names_same_file(os.path.join(made.path, "lock"), made.lock_fd):  # not committed
            discard(made)
            os.close(made.lock_fd)


def _new_stage(root: str) -> Stage:
    while True:
        path = os.path.join(root, "stage", uuid.uuid4().hex)
        os.mkdir(path, 0o700)
        fd = _write_lock(os.path.join(path, "lock"))
        if fd is not None:
            return Stage(path, fd)
        # A reaper got between mkdir and lock, took the directory for garbage and removes it: take another name.


def _write_lock(path: str) -> Optional[int]:
    """A descriptor with the write lock of ``path``, which is made if need be; None when it is held or replaced."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        return None
    if linux.ofd_lock(fd, fcntl.F_WRLCK) and cache.names_same_file(path, fd):
        return fd
    os.close(fd)
    return None


def discard(made: Stage) -> None:
    """Remove a stage directory, its lock last: without the lock file it would be nobody's."""
    _remove_tree(made.path, keep="lock")
    _unlink(os.path.join(made.path, "lock"))
    try:
        os.rmdir(made.path)
    except OSError:
        pass


def _remove_tree(path: str, keep: str = "") -> None:
    """Empty ``path`` but for ``keep``. Directories are lifted to the top before they are entered, so that neither depth
    nor length of what an image nests can stop it, and opened to us first, whatever their modes deny."""
    todo = [path]
    while todo:
        here = todo.pop()
        for item in list(os.scandir(here)):
            if here == path and item.name == keep:
                continue
            if not item.is_dir(follow_symlinks=False):
                _unlink(item.path)
                continue
            os.chmod(item.path, 0o700)
            lifted = item.path
            if here != path:
                lifted = os.path.join(path, uuid.uuid4().hex)
                os.rename(item.path, lifted)
            todo.append(lifted)
        if here != path:
            os.rmdir(here)


def commit(root: str, made: Stage, key: Key, record: dict[str, Any], image: dict[str, Any]) -> Lease:
    """Publish the stage directory as the entry of ``key`` and return it leased.

    The one commit point of the whole project is the rename in here. The caller wrote and verified the image in
    ``made.path``; this checks its size once more, makes everything durable, renames. An entry that is there already
    stays, ours is dropped (publishing never overwrites), and the lease is on the one that is there. Only one that is
    damaged, so that no lease on it can be had, goes first.
    """
    target = os.path.join(root, "entries", str(key))
    staged = Entry(str(key), made.path, key.kind, record)
    with explained(root):
        if not cache.sound(staged):
            raise CacheError(f"{staged.image} has not its recorded size", "run again; nothing was cached")
        if key.kind == cache.SQUASHFS:
            _fsync(staged.image)
            os.chmod(staged.image, 0o444)
        _keep_only(made.path, {cache.IMAGE_NAMES[key.kind], "manifest.json", "config.json", "lock"})
        write_json(os.path.join(made.path, "image.json"), image, durable=True)
        write_json(os.path.join(made.path, "entry.json"), record, durable=True)
        _fsync(made.path)
        while True:
            os.utime(made.lock_fd)  # its first use is now, not when the pull began
            try:
                os.rename(made.path, target)  # before: garbage that any run may reap; after: complete
                break
            except OSError as exc:  # a directory that is not empty is never replaced: rename(2)
                if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                found = cache.lease(root, key)
            if found is not None:
                return found
            _make_way(root, str(key))
        _fsync(os.path.join(root, "entries"))
    linux.ofd_lock(made.lock_fd, fcntl.F_RDLCK)  # a conversion: the lock is never let go in between
    return Lease(Entry(str(key), target, key.kind, record), made.lock_fd)


def _keep_only(path: str, names: set[str]) -> None:
    """Drop what was only needed to make the image: blobs, the reservation."""
    for item in os.scandir(path):
        if item.name not in names:
            if item.is_dir(follow_symlinks=False):
                _remove_tree(item.path)
                os.rmdir(item.path)
            else:
                os.unlink(item.path)


def _make_way(root: str, name: str) -> None:
    """Take a damaged entry away. Its pin stays, for the entry that comes in its place."""
    for _ in range(_REMOVER_POLLS):
        try:
            _take_away(root, name)
            return
        except EntryBusy:
            time.sleep(0.01)  # by somebody who removes it, or by a job that leased it before it was damaged
    raise EntryBusy(f"entry {name} is damaged and in use", "end the jobs that use it, then run again")


def _fsync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def put_ref(root: str, path: str, ref: Ref) -> None:
    """Record what a reference means now; written after the entry, so that it never names what is not there yet."""
    with explained(root):
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        write_json(path, ref._asdict())


def remove(root: str, name: str) -> int:
    """Remove an entry and its pin; the bytes that became free. EntryBusy when it is leased."""
    size = _take_away(root, name)
    _unlink(os.path.join(root, "pins", name))
    return size


def _take_away(root: str, name: str) -> int:
    """Remove an entry.

    The entry leaves its key by a rename into ``stage/`` while its write lock is held: whoever looks sees all of it or
    nothing, and if this process dies the next reap() finishes the work.
    """
    path = os.path.join(root, "entries", name)
    with explained(root):
        fd = _write_lock(os.path.join(path, "lock"))
        if fd is None:
            if not os.path.lexists(path):
                return 0
            raise EntryBusy(f"entry {name} is in use")
        try:
            entry = cache.read_entry(path)
            size = entry.bytes if entry else 0
            doomed = os.path.join(root, "stage", uuid.uuid4().hex)
            os.rename(path, doomed)
            discard(Stage(doomed, fd))
        finally:
            os.close(fd)
    return size


def remove_refs(root: str, digests: set[str]) -> None:
    """Forget what pointed to ``digests``, the manifests of entries that are no more."""
    for base, _, names in os.walk(os.path.join(root, "refs")):
        for name in names:
            path = os.path.join(base, name)
            ref = cache.read_ref(path)
            if ref is not None and ref.digest in digests:
                _unlink(path)


def reap(root: str) -> int:
    """Remove what dead processes left in ``stage/``; the number of directories removed."""
    count = 0
    base = os.path.join(root, "stage")
    for name in _names(base):
        try:
            count += _reap_one(os.path.join(base, name))
        except OSError:
            continue  # a full disk, or nothing of ours: it stays where it harms nobody
    for directory in (root, os.path.join(root, "pins"), *(base for base, _, _ in os.walk(os.path.join(root, "refs")))):
        for name in _names(directory):
            if name.startswith(".new-"):
                _unlink_old(os.path.join(directory, name))
    return count


def _reap_one(path: str) -> bool:
    fd = _write_lock(os.path.join(path, "lock"))
    if fd is None:
        return False
    try:
        discard(Stage(path, fd))
    finally:
        os.close(fd)
    return not os.path.lexists(path)


def _unlink_old(path: str) -> None:
    try:
        if time.time() - os.lstat(path).st_mtime > 3600:
            os.unlink(path)
    except OSError:
        pass


def _names(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def pin(root: str, name: str) -> None:
    """Keep the entry from ever being evicted."""
    with explained(root):
        write_file(os.path.join(root, "pins", name), b"")


def unpin(root: str, name: str) -> bool:
    """Undo :func:`pin`; False when it was not pinned."""
    with explained(root):
        try:
            os.unlink(os.path.join(root, "pins", name))
        except FileNotFoundError:
            return False
    return True


def candidates(root: str) -> list[evict.Candidate]:
    """What :func:`evict.victims` decides about."""
    found = []
    for entry in cache.entries(root):
        try:
            used = cache.last_used(entry)
        except OSError:
            continue  # removed while we looked
        kept = cache.pinned(root, entry.name) or cache.in_use(entry)
        found.append(evict.Candidate(entry.name, entry.bytes, used, kept))
    return found


def shortage(root: str, need_bytes: int, max_bytes: int, min_free_bytes: int) -> int:
    """Bytes that must go before ``need_bytes`` more fit; 0 when they fit, by our own budget and the file system's.

    What other pulls reserved and have not written yet counts as used.
    """
    promised = sum(_outstanding(os.path.join(root, "stage", name)) for name in _names(os.path.join(root, "stage")))
    lacking = need_bytes + promised + min_free_bytes - _free(root)
    if max_bytes:
        lacking = max(lacking, need_bytes + promised + sum(entry.bytes for entry in cache.entries(root)) - max_bytes)
    return max(lacking, 0)


def _outstanding(path: str) -> int:
    reserved = cache.read_json(os.path.join(path, "reserved.json"))
    if not reserved:
        return 0
    written = _blocks(path) + _blocks(os.path.join(path, "blobs"))
    return max(int(reserved.get("bytes", 0)) - written, 0)


def _blocks(directory: str) -> int:
    """Bytes on disk of the files in ``directory``, not below it."""
    total = 0
    for name in _names(directory):
        try:
            total += os.lstat(os.path.join(directory, name)).st_blocks * 512
        except OSError:
            continue  # its owner removed it meanwhile
    return total


def reserve(root: str, made: Stage, need_bytes: int, max_bytes: int, min_free_bytes: int,
            on_evict: Callable[[str], None]) -> None:
    """Make room for ``need_bytes``, evicting the least recently used, and promise them to this stage directory.

    CacheFull when what may be evicted is not enough: nothing is evicted then. One process at a time looks and promises,
    so that no two take the same room.
    """
    with explained(root), _alone(os.path.join(root, "stage")):
        lacking = shortage(root, need_bytes, max_bytes, min_free_bytes)
        doomed = evict.victims(candidates(root), lacking, time.time())
        if sum(victim.bytes for victim in doomed) < lacking:
            limit = f", cache_max_bytes allows {max_bytes >> 20} MiB in all" if max_bytes else ""
            raise CacheFull(f"cache {root}: {need_bytes / (1 << 20):.1f} MiB are needed, {_free(root) >> 20} MiB are "
                            f"free{limit}, and what is in use, pinned or new may not be evicted")
        for victim in doomed:
            try:
                remove(root, victim.name)
            except EntryBusy:
                continue  # leased since we looked; the write that does not fit will say so
            on_evict(victim.name)
        write_json(os.path.join(made.path, "reserved.json"), {"bytes": need_bytes})


@contextmanager
def _alone(directory: str) -> Iterator[None]:
    """The block runs in one process at a time; it must not wait for anything in there."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
