"""A tree written as a directory, for machines that cannot mount squashfs; and the digest of such a directory.

Everything goes through directory descriptors, without following a symlink and without opening what exists, into a
directory made here: nothing that an image says can reach outside of it. Directories get their modes and times last.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from .. import linux
from ..errors import ConvertError
from ..events import Emit, Event
from .content import OpenLayer, in_layer_order, is_hole, stream
from .room import FULL, no_room
from .tree import BLOCK, CHARACTER, DIRECTORY, FIFO, FILE, KIND_NAMES, SYMLINK, Node, Tree, first_names, show

_OPEN_DIRECTORIES = 64
_REPORT_BYTES = 16 << 20
_READ_BYTES = 1 << 20
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Entry(NamedTuple):
    """One line of the manifest. ``detail`` is a file's SHA-256, a symlink's target, a device's number."""

    kind: int
    mode: int
    size: int
    detail: bytes


def write(tree: Tree, open_layer: OpenLayer, path: str, emit: Emit) -> str:
    """Write ``tree`` as the new directory ``path``, synced to disk, and return what :func:`digest_of` says of it.

    Everything belongs to the caller; only root gives files their owners, attributes and device nodes. Whatever the
    image says, the owner may read files and read, search and change directories, so that caches can be used and
    removed. Raises CacheFull, ConvertError, OSError; the caller removes what is there then.
    """
    try:
        os.mkdir(path, 0o700)
        with _Directories(path) as directories:
            digest = _Writing(tree, directories, emit).run(open_layer)
            linux.syncfs(directories.fd(b""))
    except OSError as exc:
        if exc.errno in FULL:
            raise no_room(path) from None
        raise
    return digest


class _Directories:
    """Descriptors of the directories below one root, the last used of them kept open."""

    def __init__(self, root: str) -> None:
        self._root_fd = os.open(root, _OPEN_DIRECTORY)
        self._open: OrderedDict[bytes, int] = OrderedDict()

    def __enter__(self) -> _Directories:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in (*self._open.values(), self._root_fd):
            os.close(fd)

    def fd(self, path: bytes) -> int:
        """A descriptor of the directory ``path``, valid until the next call."""
        if not path:
            return self._root_fd
        found = self._open.get(path)
        if found is not None:
            self._open.move_to_end(path)
            return found
        missing = []
        while path and path not in self._open:
            path, _, name = path.rpartition(b"/")
            missing.append(name)
        fd = self.fd(path)
        while missing:
            name = missing.pop()
            fd = os.open(name, _OPEN_DIRECTORY, dir_fd=fd)
            path = path + b"/" + name if path else name
            self._open[path] = fd
            if len(self._open) > _OPEN_DIRECTORIES:
                os.close(self._open.popitem(last=False)[1])
        return fd


class _Writing:
    """One tree being written, and its manifest as it grows."""

    def __init__(self, tree: Tree, directories: _Directories, emit: Emit) -> None:
        self._tree, self._directories, self._emit = tree, directories, emit
        self._is_root = os.geteuid() == 0
        self._manifest: dict[bytes, _Entry] = {}

    def run(self, open_layer: OpenLayer) -> str:
        nodes, links = first_names(self._tree)
        files = in_layer_order(nodes)
        below = [(path, node) for path, node in nodes if node.kind == DIRECTORY]
        for path, _ in below[1:]:
            os.mkdir(_name(path), 0o700, dir_fd=self._parent(path))
        for path, node in nodes:
            if node.kind not in (DIRECTORY, FILE):
                self._special(path, node)
        self._files(files, open_layer)
        for path, _, first in links:
            self._link(path, first)
        for path, node in reversed(below):
            self._manifest[path] = _Entry(DIRECTORY, self._settle(self._directories.fd(path), node), 0, b"")
        return _digest(self._manifest, {path: first for path, _, first in links if first in self._manifest})

    def _parent(self, path: bytes) -> int:
        return self._directories.fd(path.rpartition(b"/")[0])

    def _special(self, path: bytes, node: Node) -> None:
        name, parent = _name(path), self._parent(path)
        detail = b""
        if node.kind == SYMLINK:
            os.symlink(node.target, name, dir_fd=parent)
            detail = node.target
        elif node.kind == FIFO:
            os.mkfifo(name, 0o600, dir_fd=parent)
        elif self._is_root:
            os.mknod(name, node.kind | 0o600, os.makedev(*node.rdev), dir_fd=parent)
            detail = b"%d,%d" % node.rdev
        else:
            self._emit(Event("warn", f"left out {KIND_NAMES[node.kind]} {show(path)}: only root can make it"))
            return
        mode = 0o777
        if self._is_root:
            os.chown(name, node.uid, node.gid, dir_fd=parent, follow_symlinks=False)
        if node.kind != SYMLINK:
            mode = self._mode(node)
            os.chmod(name, mode, dir_fd=parent)  # not a symlink: it was just made, in a directory of our own
        os.utime(name, ns=_times(node), dir_fd=parent, follow_symlinks=False)
        self._manifest[path] = _Entry(node.kind, mode, 0, detail)

    def _files(self, files: list[tuple[bytes, Node]], open_layer: OpenLayer) -> None:
        done = reported = 0
        for path, node, content in stream(files, open_layer):
            fd = os.open(_name(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600,
                         dir_fd=self._parent(path))
            try:
                digest = _fill(fd, content)
                os.ftruncate(fd, node.size)  # a hole at the end
                self._manifest[path] = _Entry(FILE, self._settle(fd, node), node.size, digest)
            finally:
                os.close(fd)
            done += node.stored_bytes()
            if done - reported >= _REPORT_BYTES or done == self._tree.live_bytes:
                reported = done
                self._emit(Event("convert", "", done, self._tree.live_bytes))

    def _link(self, path: bytes, first: bytes) -> None:
        if first in self._manifest:  # else a device node that was left out
            source = os.dup(self._parent(first))  # the next look-up may close it
            try:
                os.link(_name(first), _name(path), src_dir_fd=source, dst_dir_fd=self._parent(path),
                        follow_symlinks=False)
            finally:
                os.close(source)

    def _settle(self, fd: int, node: Node) -> int:
        """Give the open file or directory its owner, attributes, mode and time; return the mode."""
        if self._is_root:
            os.fchown(fd, node.uid, node.gid)  # before the mode: it clears the set-ID bits
            for name, value in sorted((node.xattrs or {}).items()):
                os.setxattr(fd, name, value)
        mode = self._mode(node)
        os.fchmod(fd, mode)
        os.utime(fd, ns=_times(node))
        return mode

    def _mode(self, node: Node) -> int:
        mode = node.mode if self._is_root else node.mode & 0o1777  # the caller's own set-user-ID files help nobody
        return mode | (0o500 if node.kind == DIRECTORY else 0o400)


def _name(path: bytes) -> bytes:
    return path.rpartition(b"/")[2]


def _times(node: Node) -> tuple[int, int]:
    return node.mtime * 10**9, node.mtime * 10**9


def _fill(fd: int, content: Iterator[memoryview]) -> bytes:
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
        if is_hole(piece):
            os.lseek(fd, len(piece), os.SEEK_CUR)
            continue
        while piece:
            piece = piece[os.write(fd, piece) :]
    return digest.hexdigest().encode()


# ---- the digest


def digest_of(path: str) -> str:
    """The SHA-256, as hex, over names, types, modes, sizes, links and content of everything in the directory ``path``.

    Owners and times are not in it. ConvertError when the directory holds a socket; OSError when it cannot be read.
    """
    manifest: dict[bytes, _Entry] = {}
    inodes: dict[tuple[int, int], list[bytes]] = {}
    with _Directories(path) as directories:
        manifest[b""] = _Entry(DIRECTORY, stat.S_IMODE(os.fstat(directories.fd(b"")).st_mode), 0, b"")
        pending = [b""]
        while pending:
            base = pending.pop()
            for name in sorted(map(os.fsencode, os.listdir(directories.fd(base)))):
                below = base + b"/" + name if base else name
                status = os.stat(name, dir_fd=directories.fd(base), follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(below)
                elif status.st_nlink > 1:
                    inodes.setdefault((status.st_dev, status.st_ino), []).append(below)
                    if len(inodes[status.st_dev, status.st_ino]) > 1:
                        continue
                manifest[below] = _entry(name, status, directories.fd(base), below)
    return _digest(manifest, {path: names[0] for names in inodes.values() for path in names[1:]})


def _entry(name: bytes, status: os.stat_result, parent: int, path: bytes) -> _Entry:
    kind, mode = stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode)
    if kind == FILE:
        return _Entry(kind, mode, status.st_size, _content_digest(name, parent))
    if kind == SYMLINK:
        return _Entry(kind, 0o777, 0, os.readlink(name, dir_fd=parent))
    if kind in (CHARACTER, BLOCK):
        return _Entry(kind, mode, 0, b"%d,%d" % (os.major(status.st_rdev), os.minor(status.st_rdev)))
    if kind in (DIRECTORY, FIFO):
        return _Entry(kind, mode, 0, b"")
    raise ConvertError(f"{show(path)} is a {KIND_NAMES.get(kind, 'file of unknown type')}")


def _content_digest(name: bytes, parent: int) -> bytes:
    digest = hashlib.sha256()
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    with contextlib.closing(os.fdopen(fd, "rb", buffering=0)) as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest().encode()


def _digest(manifest: dict[bytes, _Entry], links: dict[bytes, bytes]) -> str:
    """Over one line for each name in byte order; of hard links, the first name has the inode's line."""
    groups: dict[bytes, list[bytes]] = {}
    for path, known in links.items():
        groups.setdefault(known, [known]).append(path)
    lines = dict(manifest)
    for known, names in groups.items():
        entry = lines.pop(known)
        first, *others = sorted(names)
        lines[first] = entry
        for other in others:
            lines[other] = _Entry(0, 0, 0, first)
    digest = hashlib.sha256()
    for path in sorted(lines):
        kind, mode, size, detail = lines[path]
        digest.update(b"%b\0%o %o %d %b\0" % (path, kind, mode, size, detail))
    return digest.hexdigest()
