"""What a launch will do: request, image and site into one value that every runtime translates. Pure; nothing is done.

Environment, first to last, later wins: the host's (without PATH, LD_* and other names that only make sense on the
host), the image's, the site's, the request's. What the scheduler and the MPI launcher set for this task
(SLURM_*, PMI*, PMIX_* …) an image never overwrites, nor HOME: the home directory is the host's.
"""

from __future__ import annotations

import os

from .config import DEFAULT_PATH, Config
from .errors import UsageError
from .request import Bind, LaunchRequest, parse_bind
from .values import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Names of the host that mean host paths; inside they would point nowhere, or worse, somewhere.
HOST_ONLY = frozenset({"PATH", "OLDPWD", "_", "PWD", "SHLVL", "BASH_ENV", "ENV", "PYTHONHOME", "PYTHONPATH", "PERL5LIB",
                       "VIRTUAL_ENV", "CONDA_PREFIX", "SHIFTERWRAP_CACHE_DIR", "SHIFTERWRAP_CONFIG"})
HOST_ONLY_PREFIXES = ("LD_", "BASH_FUNC_", "CONDA_", "_CE_", "_CONDA")
# Set per task by the scheduler and the MPI launcher; an image that carries them was saved inside a job.
WIRE_UP_PREFIXES = ("SLURM_", "PMI", "PALS_", "OMPI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL")
# Directories of the operating system that are the image's own, never the host's, whatever the current directory is.
IMAGE_ONLY = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin", "/sys",
              "/usr")
IMAGE_ONLY_EXACT = ("/", "/home", "/media", "/mnt", "/opt", "/root", "/srv", "/var", "/tmp", "/var/tmp")


class User(NamedTuple):
    """Who launches, as the host's name service tells."""

    uid: int
    gid: int
    name: str
    group: str
    home: str
    shell: str


class Image(NamedTuple):
    """The image as the launch needs it: what to mount, what its config says, and which of the usual mount points
    (cache.MOUNT_POINTS) it has."""

    path: str
    kind: str
    env: tuple[str, ...]
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    working_dir: str
    points: frozenset[str] = frozenset()


class Plan(NamedTuple):
    """One launch, in no runtime's words. ``base`` are the host paths that every container gets and that external
    runtimes bind by themselves; ``binds`` are the site's and the user's. ``env`` is complete; ``overrides`` are the
    variables in it that the site or the user asked for. ``workdirs`` are tried in order."""

    image: Image
    base: tuple[Bind, ...]
    binds: tuple[Bind, ...]
    env: dict[str, str]
    overrides: frozenset[str]
    cwd: str
    workdirs: tuple[str, ...]
    strict_workdir: bool
    argv: tuple[str, ...]
    writable_tmpfs: bool
    user: User


class Command(NamedTuple):
    """A program to execute: what an external runtime is asked to do, and what it cannot do (``notes``)."""

    program: str
    argv: tuple[str, ...]
    env: dict[str, str]
    notes: tuple[str, ...] = ()


def make(request: LaunchRequest, image: Image, config: Config, user: User, environ: Mapping[str, str],
         cwd: str) -> Plan:
    """The plan; UsageError when there is nothing to run or a site's bind is malformed."""
    binds = tuple(parse_bind(text) for text in config.binds) + request.binds
    image_env = dict(item.partition("=")[::2] for item in image.env)
    overrides = dict(item.partition("=")[::2] for item in config.env)
    overrides.update(request.env)
    user_home = bindable_home(user.home) if config.mount_home else ""
    cwd_bind = bindable_cwd(cwd, user_home)
    if request.workdir:
        workdirs: tuple[str, ...] = (request.workdir,)
    else:
        fallback = image.working_dir if image.working_dir.startswith("/") else "/"
        workdirs = (cwd, fallback, "/") if cwd_bind or _covered(cwd, user_home, binds) else (fallback, "/")
    return Plan(
        image=image,
        base=base_binds(user_home, cwd_bind),
        binds=binds,
        env=environment(environ, image_env, overrides, user),
        overrides=frozenset(overrides),
        cwd=cwd,
        workdirs=workdirs,
        strict_workdir=bool(request.workdir),
        argv=command_line(request, image),
        writable_tmpfs=request.writable_tmpfs,
        user=user,
    )


def environment(host: Mapping[str, str], image: Mapping[str, str], overrides: Mapping[str, str],
                user: User) -> dict[str, str]:
    """The complete environment of the command, by the precedence of this module's docstring."""
    env = {name: value for name, value in host.items() if not is_host_only(name)}
    env["PATH"] = DEFAULT_PATH
    env.update(_safe_image_env(image))
    env["HOME"] = user.home or "/"
    env.update(overrides)
    return env


def _safe_image_env(image: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in image.items() if not name.startswith(WIRE_UP_PREFIXES) and name != "HOME"}


def is_host_only(name: str) -> bool:
    """Whether a variable of the host stays there."""
    return name in HOST_ONLY or name.startswith(HOST_ONLY_PREFIXES)


def base_binds(home: str, cwd: str) -> tuple[Bind, ...]:
    """The host paths that users of HPC containers expect to find: devices, kernel interfaces, scratch, home, cwd."""
    binds = [Bind("/dev", "/dev"), Bind("/proc", "/proc"), Bind("/sys", "/sys")]
    binds += [Bind(path, path, optional=True) for path in ("/tmp", "/var/tmp")]
    binds += [Bind(path, path, readonly=True, optional=True)
              for path in ("/etc/resolv.conf", "/etc/hosts", "/etc/localtime")]
    if home:
        binds.append(Bind(home, home, optional=True))
    if cwd:
        binds.append(Bind(cwd, cwd, optional=True))
    return tuple(binds)


def bindable_home(home: str) -> str:
    """The home directory when it can be bound; accounts of daemons live in /usr/sbin, and the image keeps its own."""
    home = "/" + os.path.normpath(home).lstrip("/") if home.startswith("/") else ""
    return "" if home != "/root" and _is_the_images(home) else home


def bindable_cwd(cwd: str, home: str) -> str:
    """The current directory when it must be bound on its own: not what other binds cover, not the image's own."""
    return "" if _is_the_images(cwd) or _covered(cwd, home, ()) else cwd


def _is_the_images(path: str) -> bool:
    return path in IMAGE_ONLY_EXACT or any(within(path, top) for top in IMAGE_ONLY)


def _covered(cwd: str, home: str, binds: Sequence[Bind]) -> bool:
    roots = ["/tmp", "/var/tmp", "/dev/shm", *(bind.target for bind in binds)]
    if home:
        roots.append(home)
    return any(within(cwd, root) for root in roots)


def within(path: str, root: str) -> bool:
    """Whether ``path`` is ``root`` or below it, by components (/scratch2 is not below /scratch)."""
    return path == root or path.startswith(root.rstrip("/") + "/")


def command_line(request: LaunchRequest, image: Image) -> tuple[str, ...]:
    """The command: CMD as given, else the image's own; UsageError when there is none."""
    use_entrypoint = request.entrypoint if request.entrypoint is not None else not request.command
    argv = (image.entrypoint if use_entrypoint else ()) + (request.command or image.cmd)
    if not argv or not argv[0]:
        raise UsageError("the image names no command to run", "give one: wrapped-run IMAGE CMD")
    return argv


def passwd_line(user: User) -> str:
    """The user's line for /etc/passwd."""
    return f"{user.name}:x:{user.uid}:{user.gid}:{user.name}:{user.home or '/'}:{user.shell or '/bin/sh'}\n"


def group_line(user: User) -> str:
    """The group's line for /etc/group."""
    return f"{user.group}:x:{user.gid}:\n"


def describe(plan: Plan, host_env: Mapping[str, str]) -> list[str]:
    """The plan, one operation a line; of the environment, what differs from the host's."""
    lines = [f"image {plan.image.kind} {plan.image.path}" + (" writable-tmpfs" if plan.writable_tmpfs else "")]
    for bind in plan.base + plan.binds:
        words = ["bind", bind.source, bind.target, "ro" if bind.readonly else "rw"]
        lines.append(" ".join(words + (["if-present"] if bind.optional else [])))
    lines += [f"env {name}={value!r}" for name, value in sorted(plan.env.items()) if host_env.get(name) != value]
    lines.append(f"workdir {os.pathsep.join(plan.workdirs)}")
    return lines
