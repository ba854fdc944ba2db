"""The embedded runtime: builds the container in a mount namespace of this process, which then becomes the command.

enter() makes a namespace set or joins one; run() ends in execve, so stdin, signals, descriptors and the exit code are
the command's own. An ordinary user works in a user namespace that maps only himself; root needs none.

The root is assembled on a private tmpfs, which becomes the process's root first so that no host path is hidden by it::

    /lower    the image: kernel squashfs (root), squashfuse_ll (others) or a bound tree; read-only, nosuid, nodev
    /points   directories and files that binds need and the image lacks
    /made     generated files: passwd, group
    /upper    what a --writable-tmpfs container writes
    /root     lower, or an overlay of points over lower; where the kernel has no overlay in a user namespace (before
              5.11) a tree of binds that opens only the directories which lack a name

Sources are opened (O_PATH) in the new namespace before anything is mounted there, and bound through their descriptors:
a path is resolved once, by the user's own rights, and an image's symlink never leads to the host. Mounts propagate in,
never out.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

from .. import linux
from ..errors import CommandNotExecutable, CommandNotFound, SandboxError, UsageError
from ..host import Host
from ..plan import Command, Plan, group_line, passwd_line
from ..request import Bind
from ..values import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import NoReturn, Optional

_BASES = ("/tmp", "/var/tmp", "/mnt", "/run")
_READ_ONLY = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
# statvfs f_flag bits that a remount in a user namespace must keep (mount_namespaces(7), "locked" flags)
_LOCKED = {os.ST_NOSUID: linux.MS_NOSUID, os.ST_NODEV: linux.MS_NODEV, os.ST_NOEXEC: linux.MS_NOEXEC,
           os.ST_NOATIME: 0x400, os.ST_NODIRATIME: 0x800, os.ST_RELATIME: 0x200000}
_MAX_SYMLINKS = 40


class Namespaces(NamedTuple):
    """Descriptors of a namespace set that already holds the container; ``user`` is -1 where root made it."""

    user: int
    mount: int


class _Opened(NamedTuple):
    """A bind whose source is open; the source's type decides the mount point's."""

    bind: Bind
    fd: int
    is_directory: bool


class _Server(NamedTuple):
    """The squashfuse_ll of this container: the FUSE descriptor, the pipe whose end tells it that the mount is made
    (before, the device answers EPERM), and where it writes its complaints."""

    fuse_fd: int
    go_fd: int
    complaints_fd: int


def run(plan: Plan, host: Host, lease_fd: int, namespaces: Optional[Namespaces] = None) -> NoReturn:
    """Become the command inside the container. CommandNotFound, CommandNotExecutable or SandboxError if it cannot."""
    enter(plan, host, namespaces)
    sys.path.clear()  # from here on an import would take the image's files
    workdir = _enter_workdir(plan)
    env = {**plan.env, "PWD": workdir}
    program = find_program(plan.argv[0], env.get("PATH", ""))
    if lease_fd >= 0:
        os.set_inheritable(lease_fd, True)
    try:
        os.execve(program, plan.argv, env)
    except OSError as exc:
        raise _exec_error(program, exc) from exc


def enter(plan: Plan, host: Host, namespaces: Optional[Namespaces] = None) -> None:
    """Put this process into the container: into ``namespaces`` when given, else into a new set made by ``plan``."""
    if namespaces is not None:
        _join(namespaces)
        return
    umask = os.umask(0o022)
    tree = plan.image.kind == "tree"
    server, device = None, ""
    # A user namespace maps one uid, and overlay copies up no file of another: so that an ordinary user's writes reach
    # root's files too, he is root while the container is built, and himself again in a second namespace at its end.
    as_root = plan.writable_tmpfs and host.uid != 0
    owner = (0, 0) if as_root else (host.uid, host.gid)
    if host.uid != 0:
        unshare_user(owner, (host.uid, host.gid))
    if not tree and host.mounts_by_loop:
        device = _attach(plan.image.path)
    elif not tree:
        server = _start_server(plan.image.path, host.squashfuse)
    with _step("a mount namespace"):
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("", "/", flags=linux.MS_REC | linux.MS_SLAVE)
    opened = _open_sources(plan)
    image_fd = os.open(plan.image.path, os.O_PATH | os.O_CLOEXEC) if tree else -1
    _become_base()
    if server is not None:
        _mount_fuse(plan.image.path, server, owner)
    elif device:
        with _step(f"a mount of {plan.image.path}", "is squashfs in the kernel? shifterwrap doctor"):
            linux.mount(f"/old{device}", "/lower", "squashfs", _READ_ONLY)
    else:
        _bind(image_fd, "/lower", readonly=True)
    _assemble(plan, opened, host)
    proc_fd = os.open("/old/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chdir("/root")
    with _step("the container's root"):
        linux.pivot_root(".", ".")  # the old root is stacked on the new one; pivot_root(2)
        linux.umount(".", linux.MNT_DETACH)
    os.chdir("/")
    if as_root:
        unshare_user((host.uid, host.gid), owner, proc_fd)
    os.close(proc_fd)
    os.umask(umask)
    linux.no_new_privs()


def _join(namespaces: Namespaces) -> None:
    with _step("joining the container's namespaces"):
        if namespaces.user >= 0:
            linux.setns(namespaces.user, linux.CLONE_NEWUSER)
        linux.setns(namespaces.mount, linux.CLONE_NEWNS)
    os.chdir("/")
    linux.no_new_privs()


class _step:
    """Names the step of building the container that the kernel refused. (contextlib costs a launch 1 ms.)"""

    def __init__(self, what: str, hint: str = "") -> None:
        self.what, self.hint = what, hint

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: object, trace: object) -> None:
        if isinstance(exc, OSError):
            where = f" ({exc.filename})" if exc.filename else ""
            raise SandboxError(f"the kernel refused {self.what}{where}: {exc.strerror}", self.hint) from None


def unshare_user(inside: tuple[int, int], outside: tuple[int, int], proc_fd: Optional[int] = None) -> None:
    """Enter a user namespace in which the caller, uid and gid ``outside``, is ``inside``.

    His other groups stay effective, shown as nobody. ``proc_fd`` is /proc where that is not at its place.
    """
    with _step("a user namespace", "they are off for ordinary users here; shifterwrap doctor says how to allow them"):
        linux.unshare(linux.CLONE_NEWUSER)
        for name, line in (("setgroups", "deny"), ("uid_map", f"{inside[0]} {outside[0]} 1"),
                           ("gid_map", f"{inside[1]} {outside[1]} 1")):
            path = f"/proc/self/{name}" if proc_fd is None else f"self/{name}"
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc_fd)
            os.write(fd, line.encode())
            os.close(fd)


def _open_sources(plan: Plan) -> list[_Opened]:
    opened = []
    for bind in plan.base + plan.binds:
        try:
            fd = _open_source(bind.source)
        except OSError as exc:
            if bind.optional:
                continue
            raise UsageError(f"bind source {bind.source}: {exc.strerror}", "correct --bind, or create it") from None
        opened.append(_Opened(bind, fd, stat.S_ISDIR(os.fstat(fd).st_mode)))
    return opened


def _open_source(path: str) -> int:
    """A descriptor for the bind's source. O_DIRECTORY, for O_PATH alone would not trigger an automount (open(2))."""
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)


def _start_server(image: str, program: str) -> _Server:
    """Start squashfuse_ll outside the namespace that it serves.

    Its superblock then dies with the container's last process and the server ends by itself: were it inside, it would
    keep its own mount alive. It is nobody's child, has none of the user's descriptors and its own session, so neither
    ``$(wrapped-run …)`` nor a terminal's hang-up waits for it or kills it.
    """
    if not program:
        raise SandboxError(f"{image} cannot be mounted: no squashfuse_ll", "install squashfuse, or remove the entry")
    with _step("the FUSE device", "/dev/fuse must be readable and writable for users (mode 0666)"):
        fuse_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    complaints = os.memfd_create("squashfuse_ll", os.MFD_CLOEXEC)
    ready, go = os.pipe()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os.close(ready)
        return _Server(fuse_fd, go, complaints)
    try:
        os.setsid()  # before the next fork: a signal to the job's process group must not stop a server half started
        if os.fork() == 0:
            os.close(go)
            os.read(ready, 1)
            _serve(program, image, fuse_fd, complaints)
    finally:
        os._exit(0)


def _serve(program: str, image: str, fuse_fd: int, complaints: int) -> None:
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    keep = os.dup2(fuse_fd, 3) if fuse_fd != 3 else 3  # the others were opened later, none of them is 3
    for target, source in ((0, null), (1, null), (2, complaints)):
        os.dup2(source, target)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 3:
            _close(int(name))
    os.set_inheritable(keep, True)
    os.execve(program, (program, "-f", image, f"/dev/fd/{keep}"), {"PATH": "/usr/bin:/bin"})


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        pass  # the one that listed the directory


def _become_base() -> None:
    """Make a tmpfs this process's root, the host's old root visible at /old."""
    base = next((path for path in _BASES if os.path.isdir(path)), "")
    if not base:
        raise SandboxError("no directory to build the container on", f"one of {', '.join(_BASES)} must exist")
    with _step("a tmpfs for the container"):
        linux.mount("tmpfs", base, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755")
        for name in ("lower", "points", "made", "upper", "root", "old"):
            os.mkdir(os.path.join(base, name), 0o755)
        linux.pivot_root(base, os.path.join(base, "old"))
        os.chdir("/")


def _attach(image: str) -> str:
    with _step(f"a loop device for {image}", "is the loop module loaded? shifterwrap doctor"):
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        device = linux.attach_loop(fd)
        os.close(fd)
    return device


def _mount_fuse(image: str, server: _Server, owner: tuple[int, int]) -> None:
    options = (f"fd={server.fuse_fd},rootmode=40000,user_id={owner[0]},group_id={owner[1]},"
               "allow_other,default_permissions")
    with _step("a FUSE mount in a user namespace", "needs Linux 4.18 or newer"):
        linux.mount("squashfuse_ll", "/lower", "fuse", _READ_ONLY, options)
    os.close(server.go_fd)
    os.close(server.fuse_fd)  # only the server has it now: if it ends, what follows fails instead of hanging
    try:
        os.lstat("/lower/.")
    except OSError as exc:
        text = os.pread(server.complaints_fd, 500, 0).decode(errors="replace")
        raise SandboxError(f"squashfuse_ll cannot serve {image}: {text or exc.strerror}",
                           "check the entry with: shifterwrap verify") from None
    os.close(server.complaints_fd)


def _assemble(plan: Plan, opened: list[_Opened], host: Host) -> None:
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
        linux.mount("", "/root", flags=linux.MS_REMOUNT | linux.MS_BIND | _READ_ONLY)
    else:
        linux.mount("/lower", "/root", flags=linux.MS_BIND | linux.MS_REC)
    for path, made in generated.items():
        _bind(os.open(made, os.O_PATH | os.O_CLOEXEC), "/root" + place("/root", path, False), readonly=False)
    for item in opened:
        with _step(f"the bind of {item.bind.source} on {item.bind.target}"):
            target = "/root" + place("/root", item.bind.target, item.is_directory)
            _bind(item.fd, target, readonly=item.bind.readonly)


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


def _fitting(opened: list[_Opened]) -> list[_Opened]:
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
        with _step(f"a mount point at {target[:200]}"):
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


def _overlay(writable: bool, host: Host) -> None:
    """An overlay without an upper directory is read-only by itself; user.* xattrs are what a user namespace may set."""
    options = "lowerdir=/points:/lower"
    if writable:
        os.mkdir("/upper/data", stat.S_IMODE(os.stat("/lower").st_mode) | 0o700)
        os.mkdir("/upper/work", 0o700)
        options += ",upperdir=/upper/data,workdir=/upper/work" + (",userxattr" if host.uid else "")
    with _step("an overlay mount", "in a user namespace it needs Linux 5.11 or newer"):
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


def _bind(fd: int, target: str, *, readonly: bool) -> None:
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


def _enter_workdir(plan: Plan) -> str:
    for path in plan.workdirs:
        try:
            os.chdir(path)
            return path
        except OSError as exc:
            if plan.strict_workdir:
                raise SandboxError(f"working directory {path}: {exc.strerror}",
                                   "it must exist in the container; --bind brings a host directory in") from None
    return "/"


def find_program(name: str, path: str) -> str:
    """The file that ``name`` means in the container; CommandNotFound (127) or CommandNotExecutable (126)."""
    candidates = [name] if "/" in name else [os.path.join(part or ".", name) for part in path.split(":")]
    denied = ""
    for candidate in candidates:
        try:
            mode = os.stat(candidate).st_mode
        except PermissionError:
            denied = denied or candidate
            continue
        except OSError:
            continue
        if stat.S_ISREG(mode) and os.access(candidate, os.X_OK):
            return candidate
        denied = denied or candidate
    if denied:
        raise CommandNotExecutable(f"{denied}: not executable")
    raise CommandNotFound(f"{name}: not found in the image")


def _exec_error(program: str, exc: OSError) -> Exception:
    if exc.errno == errno.ENOENT:
        return CommandNotFound(f"{program}: its interpreter is not in the image", "see its first line, or its libc")
    if exc.errno == errno.ENOEXEC:
        return CommandNotExecutable(f"{program}: neither a program for this machine nor a script with a #! line")
    return CommandNotExecutable(f"{program}: {exc.strerror}")


def command(plan: Plan, host: Host, program: str) -> Command:
    """How to ask for the same launch again, for --dry-run."""
    return Command(program, (program, "--runtime", "embedded", *plan.argv), plan.env)
