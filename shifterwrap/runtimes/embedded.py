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

What fills them is rootfs.py's business. Mounts propagate in, never out.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

from .. import linux
from ..errors import CommandNotExecutable, CommandNotFound, SandboxError
from ..host import Host
from ..plan import Plan
from ..values import TYPE_CHECKING, NamedTuple
from .rootfs import READ_ONLY, assemble, bind_mount, open_sources, step

if TYPE_CHECKING:
    from typing import NoReturn, Optional

_BASES = ("/tmp", "/var/tmp", "/mnt", "/run")


class Namespaces(NamedTuple):
    """Descriptors of a namespace set that already holds the container; ``user`` is -1 where root made it."""

    user: int
    mount: int


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
    with step("a mount namespace"):
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("", "/", flags=linux.MS_REC | linux.MS_SLAVE)
    opened = open_sources(plan)
    image_fd = os.open(plan.image.path, os.O_PATH | os.O_CLOEXEC) if tree else -1
    _become_base()
    if server is not None:
        _mount_fuse(plan.image.path, server, owner)
    elif device:
        with step(f"a mount of {plan.image.path}", "is squashfs in the kernel? shifterwrap doctor"):
            linux.mount(f"/old{device}", "/lower", "squashfs", READ_ONLY)
    else:
        bind_mount(image_fd, "/lower", readonly=True)
    assemble(plan, opened, host)
    proc_fd = os.open("/old/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chdir("/root")
    with step("the container's root"):
        linux.pivot_root(".", ".")  # the old root is stacked on the new one; pivot_root(2)
        linux.umount(".", linux.MNT_DETACH)
    os.chdir("/")
    if as_root:
        unshare_user((host.uid, host.gid), owner, proc_fd)
    os.close(proc_fd)
    os.umask(umask)
    linux.no_new_privs()


def _join(namespaces: Namespaces) -> None:
    with step("joining the container's namespaces"):
        if namespaces.user >= 0:
            linux.setns(namespaces.user, linux.CLONE_NEWUSER)
        linux.setns(namespaces.mount, linux.CLONE_NEWNS)
    os.chdir("/")
    linux.no_new_privs()


def unshare_user(inside: tuple[int, int], outside: tuple[int, int], proc_fd: Optional[int] = None) -> None:
    """Enter a user namespace in which the caller, uid and gid ``outside``, is ``inside``.

    His other groups stay effective, shown as nobody. ``proc_fd`` is /proc where that is not at its place.
    """
    with step("a user namespace", "they are off for ordinary users here; shifterwrap doctor says how to allow them"):
        linux.unshare(linux.CLONE_NEWUSER)
        for name, line in (("setgroups", "deny"), ("uid_map", f"{inside[0]} {outside[0]} 1"),
                           ("gid_map", f"{inside[1]} {outside[1]} 1")):
            path = f"/proc/self/{name}" if proc_fd is None else f"self/{name}"
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc_fd)
            os.write(fd, line.encode())
            os.close(fd)


def _start_server(image: str, program: str) -> _Server:
    """Start squashfuse_ll outside the namespace that it serves.

    Its superblock then dies with the container's last process and the server ends by itself: were it inside, it would
    keep its own mount alive. It is nobody's child, has none of the user's descriptors and its own session, so neither
    ``$(wrapped-run …)`` nor a terminal's hang-up waits for it or kills it.
    """
    if not program:
        raise SandboxError(f"{image} cannot be mounted: no squashfuse_ll", "install squashfuse, or remove the entry")
    with step("the FUSE device", "/dev/fuse must be readable and writable for users (mode 0666)"):
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
    with step("a tmpfs for the container"):
        linux.mount("tmpfs", base, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755")
        for name in ("lower", "points", "made", "upper", "root", "old"):
            os.mkdir(os.path.join(base, name), 0o755)
        linux.pivot_root(base, os.path.join(base, "old"))
        os.chdir("/")


def _attach(image: str) -> str:
    with step(f"a loop device for {image}", "is the loop module loaded? shifterwrap doctor"):
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        device = linux.attach_loop(fd)
        os.close(fd)
    return device


def _mount_fuse(image: str, server: _Server, owner: tuple[int, int]) -> None:
    options = (f"fd={server.fuse_fd},rootmode=40000,user_id={owner[0]},group_id={owner[1]},"
               "allow_other,default_permissions")
    with step("a FUSE mount in a user namespace", "needs Linux 4.18 or newer"):
        linux.mount("squashfuse_ll", "/lower", "fuse", READ_ONLY, options)
    os.close(server.go_fd)
    os.close(server.fuse_fd)  # only the server has it now: if it ends, what follows fails instead of hanging
    try:
        os.lstat("/lower/.")
    except OSError as exc:
        text = os.pread(server.complaints_fd, 500, 0).decode(errors="replace")
        raise SandboxError(f"squashfuse_ll cannot serve {image}: {text or exc.strerror}",
                           "check the entry with: shifterwrap verify") from None
    os.close(server.complaints_fd)


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
