"""The root of an embedded container: the image, what the host lends it, and the names that the image lacks for that.

Works in the mount namespace and on the directories that embedded.py has made. Sources are opened (O_PATH) in that
namespace before anything is mounted there, and bound through their descriptors: a path is resolved once, by the user's
own rights, and an image's symlink never leads to the host.
"""

from __future__ import annotations

import os
import stat
import sys

from .. import linux
from ..errors import SandboxError, UsageError
from ..host import Host
from ..plan import Plan, group_line, passwd_line
from ..request import Bind
from ..values import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Optional

READ_ONLY = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
# statvfs f_flag bits that a remount in a user namespace must keep (mount_namespaces(7), "locked" flags)
_LOCKED = {os.ST_NOSUID: linux.MS_NOSUID, os.ST_NODEV: linux.MS_NODEV, os.ST_NOEXEC: linux.MS_NOEXEC,
           os.ST_NOATIME: 0x400, os.ST_NODIRATIME: 0x800, os.ST_RELATIME: 0x200000}
_MAX_SYMLINKS = 40


class Opened(NamedTuple):
    """A bind whose source is open; the source's type decides the mount point's."""

    bind: Bind
    fd: int
    is_directory: bool


class step:
    """Names the step of building the container that the kernel refused. (contextlib costs a launch 1 ms.)"""

    def __init__(self, what: str, hint: str = "") -> None:
        self.what, self.hint = what, hint

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: object, trace: object) -> None:
        if isinstance(exc, OSError):
            where = f" ({exc.filename})" if exc.filename else ""
            raise SandboxError(f"the kernel refused {self.what}{where}: {exc.strerror}", self.hint) from None


def open_sources(plan: Plan) -> list[Opened]:
    opened = []
    for bind in plan.base + plan.binds:
        try:
            fd = _open_source(bind.source)
        except OSError as exc:
            if bind.optional:
                continue
            raise UsageError(f"bind source {bind.source}: {exc.strerror}", "correct --bind, or create it") from None
        opened.append(Opened(bind, fd, stat.S_ISDIR(os.fstat(fd).st_mode)))
    return opened


def _open_source(path: str) -> int:
    """A descriptor for the bind's source. O_DIRECTORY, for O_PATH alone would not trigger an automount (open(2))."""
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)


def assemble(plan: Plan, opened: list[Opened], host: Host) -> None:
    """Build /root from /lower and put every bind on it."""
    generated = _generate(plan)
    opened = _fitting(opened)
    targets = [(item.bind.target, item.is_directory) for item in opened]
    targets += [(path, False) for path in generated]
    _make_points(targets)
    missing = bool(os.listdir("/points"))
    if plan.writable_tmpfs or (missing and host.overlay):
        _overlay(plan.writable_tmpfs, host)
    elif missing:
        _open_directory("", os.stat("/lower").st_mode)
        linux.mount("", "/root", flags=linux.MS_REMOUNT | linux.MS_BIND | READ_ONLY)
    else:
        linux.mount("/lower", "/root", flags=linux.MS_BIND | linux.MS_REC)
    for path, made in generated.items():
        bind_mount(os.open(made, os.O_PATH | os.O_CLOEXEC), "/root" + place("/root", path, False), readonly=False)
    for item in opened:
        with step(f"the bind of {item.bind.source} on {item.bind.target}"):
            target = "/root" + place("/root", item.bind.target, item.is_directory)
            bind_mount(item.fd, target, readonly=item.bind.readonly)


def _fitting(opened: list[Opened]) -> list[Opened]:
    """The binds that the image has a place for.

    A default that it has none for is left out, with a warning: an image whose /tmp is a file can still run. What the
    user asked for is done or refused.
    """
    fitting = []
    for item in opened:
        try:
            path = place("/lower", item.bind.target, item.is_directory)
            _check_kind(path, item.bind.target, item.is_directory)
        except SandboxError as exc:
            if not item.bind.optional:
                raise
            print(f"wrapped-run: warning: {item.bind.target} is not bound: {exc}", file=sys.stderr, flush=True)
            os.close(item.fd)
            continue
        fitting.append(item)
    return fitting


def _check_kind(path: str, target: str, is_directory: bool) -> Optional[int]:
    """The mode of what the image has at ``path``, links as nothing; SandboxError when it is of the other kind."""
    mode = _mode("/lower" + path)
    if mode is None or stat.S_ISLNK(mode):
        return None
    if stat.S_ISDIR(mode) != is_directory:
        raise SandboxError(f"{target} is a {'directory' if stat.S_ISDIR(mode) else 'file'} in the image",
                           "bind a file on a file and a directory on a directory")
    return mode


def _make_points(targets: list[tuple[str, bool]]) -> None:
    """Make under /points what binds need and the image lacks; SandboxError where a file is in a directory's place."""
    places = [place("/lower", target, is_directory) for target, is_directory in targets]
    for (target, is_directory), path in zip(targets, places):
        if any(path.startswith(other + "/") for other in places):
            continue  # another bind covers the place: its content decides, the image's is not seen
        if _check_kind(path, target, is_directory) is not None:
            continue
        with step(f"a mount point at {target[:200]}"):
            _make_directories(path if is_directory else os.path.dirname(path), target)
            if not is_directory:
                os.close(os.open("/points" + path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))


def _make_directories(path: str, target: str) -> None:
    """Directories of /points down to ``path``, with the image's modes where it has them."""
    walked = ""
    for part in path.split("/")[1:]:
        walked += "/" + part
        mode = _mode("/lower" + walked)
        if mode is not None and not stat.S_ISDIR(mode):
            raise SandboxError(f"{walked} is a file in the image", f"{target} cannot be made there")
        try:
            os.mkdir("/points" + walked, 0o755)
        except FileExistsError:
            continue
        if mode is not None:
            os.chmod("/points" + walked, stat.S_IMODE(mode))


def _mode(path: str) -> Optional[int]:
    try:
        return os.lstat(path).st_mode
    except OSError:
        return None


def place(root: str, target: str, is_directory: bool) -> str:
    """Where a bind goes: a directory through the image's links, a file in place of a link.

    /etc/localtime is a link to a zone in many images; followed, the host's time would become that zone's.
    """
    if is_directory:
        found = resolve(root, target)
        if not found:
            raise SandboxError(f"{target} is a link to the root in the image", "bind on a directory below it")
        return found
    return resolve(root, os.path.dirname(target)).rstrip("/") + "/" + os.path.basename(target)


def resolve(root: str, path: str) -> str:
    """``path`` with every symbolic link resolved as if ``root`` were /, which is empty; the rest of it may not exist.

    SandboxError for a loop. (openat2's RESOLVE_IN_ROOT needs Linux 5.6 and an existing path.)
    """
    done: list[str] = []
    todo = [part for part in reversed(path.split("/")) if part not in ("", ".")]
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            done = done[:-1]
            continue
        candidate = "/".join(["", *done, part])
        try:
            link = os.readlink(root + candidate)
        except OSError:
            done.append(part)
            continue
        links += 1
        if links > _MAX_SYMLINKS:
            raise SandboxError(f"too many symbolic links in the image at {path}")
        if link.startswith("/"):
            done = []
        todo += [piece for piece in reversed(link.split("/")) if piece not in ("", ".")]
    return "/".join(["", *done])


def _generate(plan: Plan) -> dict[str, str]:
    """passwd and group: the image's, with the user's lines where they are missing; container path -> file."""
    made = {}
    for path, line in (("/etc/passwd", passwd_line(plan.user)), ("/etc/group", group_line(plan.user))):
        text = _read_image_file(path)
        number = line.split(":")[2]
        known = any(row.split(":")[2:3] == [number] for row in text.splitlines())
        if not known:
            text = text + ("\n" if text and not text.endswith("\n") else "") + line
        made[path] = f"/made/{os.path.basename(path)}"
        with open(made[path], "w", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(text)
    return made


def _read_image_file(path: str) -> str:
    """A small text file of the image; empty when there is none. A link in the image stays in the image."""
    try:
        fd = os.open("/lower" + resolve("/lower", path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return ""
    with open(fd, encoding="utf-8", errors="surrogateescape") as stream:
        return stream.read(1 << 20)


def _overlay(writable: bool, host: Host) -> None:
    """An overlay without an upper directory is read-only by itself; user.* xattrs are what a user namespace may set."""
    options = "lowerdir=/points:/lower"
    if writable:
        os.mkdir("/upper/data", stat.S_IMODE(os.stat("/lower").st_mode) | 0o700)
        os.mkdir("/upper/work", 0o700)
        options += ",upperdir=/upper/data,workdir=/upper/work" + (",userxattr" if host.uid else "")
    with step("an overlay mount", "in a user namespace it needs Linux 5.11 or newer"):
        linux.mount("overlay", "/root", "overlay", linux.MS_NOSUID | linux.MS_NODEV, options)


def _open_directory(path: str, mode: int) -> None:
    """The overlay's stand-in: /root + path as a tmpfs directory in which every child of the image's directory is bound
    or copied (links), and the missing names are made. Descends only where /points has something to add."""
    target = "/root" + path
    if not path:
        linux.mount("tmpfs", target, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755")
    added = set(os.listdir("/points" + path))
    existing = set(os.listdir("/lower" + path)) if _mode("/lower" + path) is not None else set()
    for name in sorted(existing | added):
        child, source = f"{path}/{name}", f"/lower{path}/{name}"
        pointed = _mode(f"/points{child}")
        kind = pointed if pointed is not None else os.lstat(source).st_mode
        if stat.S_ISLNK(kind):
            os.symlink(os.readlink(source), "/root" + child)
        elif stat.S_ISDIR(kind):
            os.mkdir("/root" + child, 0o755)
            if name in added:
                _open_directory(child, kind)
            else:
                linux.mount(source, "/root" + child, flags=linux.MS_BIND | linux.MS_REC)
        else:
            os.close(os.open("/root" + child, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
            if pointed is None:
                linux.mount(source, "/root" + child, flags=linux.MS_BIND)
    if path:
        os.chmod(target, stat.S_IMODE(mode))


def bind_mount(fd: int, target: str, *, readonly: bool) -> None:
    proc = "/old/proc"
    linux.mount(f"{proc}/self/fd/{fd}", target, flags=linux.MS_BIND | linux.MS_REC)
    os.close(fd)
    if readonly:
        for path in _mounts_below(target, proc):
            _remount_readonly(path)


def _mounts_below(target: str, proc: str) -> list[str]:
    """``target`` and the mount points below it, which a recursive bind brought along."""
    with open(f"{proc}/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        points = [_unescape(line.split(" ", 5)[4]) for line in table]
    return [target, *(point for point in points if point.startswith(target + "/"))]


def _unescape(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash as three octal digits (proc(5))."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def _remount_readonly(path: str) -> None:
    present = os.statvfs(path).f_flag
    flags = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY
    for bit, flag in _LOCKED.items():
        if present & bit:
            flags |= flag
    linux.mount("", path, flags=flags)
