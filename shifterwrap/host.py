"""Facts of this node that decide how an image can be mounted and which runtimes can start it."""

from __future__ import annotations

import os

from .values import NamedTuple

# Where packages of apptainer put the squashfuse_ll that they bring along.
_BUNDLED = ("/usr/libexec/apptainer/bin", "/usr/lib/x86_64-linux-gnu/apptainer/bin", "/usr/lib/apptainer/bin",
            "/usr/local/libexec/apptainer/bin")
RUNTIME_PROGRAMS = {"apptainer": ("apptainer", "singularity"), "charliecloud": ("ch-run",)}


class Host(NamedTuple):
    """What matters here; paths are empty where a program is not installed."""

    uid: int
    gid: int
    squashfuse: str
    fuse: bool
    loop: bool
    overlay: bool
    full_capabilities: bool
    tool_path: str

    @property
    def mounts_squashfs(self) -> bool:
        """Whether this caller can mount a squashfs file: root by a loop device, others by squashfuse_ll.

        squashfs never mounts in a user namespace, on no kernel so far (fs/squashfs/super.c lacks FS_USERNS_MOUNT).
        """
        return self.mounts_by_loop or bool(self.squashfuse and self.fuse)

    @property
    def mounts_by_loop(self) -> bool:
        """Whether the kernel's squashfs is mounted, by a loop device; only root can, and only where there are some."""
        return self.uid == 0 and self.loop


def probe(tool_path: str, proc: str = "/proc", dev: str = "/dev") -> Host:
    """Look; a few system calls, nothing is started."""
    uid = os.getuid()
    return Host(
        uid=uid,
        gid=os.getgid(),
        squashfuse=which("squashfuse_ll", ":".join((tool_path, *_BUNDLED))),
        fuse=os.access(f"{dev}/fuse", os.R_OK | os.W_OK),
        loop=uid == 0 and os.access(f"{dev}/loop-control", os.R_OK | os.W_OK),
        overlay=_overlay(uid),
        full_capabilities=_full_capabilities(proc) if uid == 0 else False,
        tool_path=tool_path,
    )


def which(name: str, path: str) -> str:
    """The first executable file called ``name`` in the absolute directories of ``path``; empty when there is none."""
    for directory in path.split(":"):
        candidate = os.path.join(directory, name)
        if directory.startswith("/") and os.access(candidate, os.X_OK) and os.path.isfile(candidate):
            return candidate
    return ""


def runtime_program(runtime: str, tool_path: str) -> str:
    """The program of an external runtime; empty when it is not installed."""
    for name in RUNTIME_PROGRAMS[runtime]:
        found = which(name, tool_path)
        if found:
            return found
    return ""


def _overlay(uid: int) -> bool:
    """overlayfs mounts in a user namespace since Linux 5.11; where that is wrong the embedded runtime falls back."""
    return uid == 0 or kernel() >= (5, 11)


def kernel(release: str = "") -> tuple[int, int]:
    """Major and minor number of the running kernel, or of ``release``."""
    numbers = (release or os.uname().release).replace("-", ".").split(".")
    return int(numbers[0]), int(numbers[1])


def _full_capabilities(proc: str) -> bool:
    """Whether the capability bounding set is whole; root in a container or a hardened unit has less."""
    try:
        with open(f"{proc}/self/status", encoding="ascii") as status, \
             open(f"{proc}/sys/kernel/cap_last_cap", encoding="ascii") as last:
            bounding = next(line.split()[1] for line in status if line.startswith("CapBnd:"))
            return int(bounding, 16) == (1 << (int(last.read()) + 1)) - 1
    except (OSError, StopIteration, ValueError):
        return False
