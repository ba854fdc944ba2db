"""What this machine can do, each found by trying it, with the reason where it cannot."""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

USERS = ("swtester", "swother")
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
CGROUP_ROOTS = ("/sys/fs/cgroup/memory", "/sys/fs/cgroup")


@functools.cache
def lack(feature: str) -> str:
    """Why this machine lacks `feature`; "" where it has it."""
    return PROBES[feature]()


def summary() -> str:
    """One line for a report: every feature, and why it is missing."""
    reasons = {feature: lack(feature) for feature in PROBES}
    present = [feature for feature, reason in reasons.items() if not reason]
    absent = [f"{feature} ({reason})" for feature, reason in reasons.items() if reason]
    return f"{' '.join(present) or 'none'}{'; without ' if absent else ''}{', '.join(absent)}"


def _program(*names: str) -> Callable[[], str]:
    def probe() -> str:
        missing = [name for name in names if not shutil.which(name)]
        return f"no {' '.join(missing)} installed" if missing else ""

    return probe


def _tried(*argv: str) -> str:
    try:
        done = subprocess.run(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30, check=False
        )
    except OSError as error:
        return str(error)
    return (
        done.stdout.strip().replace("\n", " ") or f"{argv[0]}: exit code {done.returncode}" if done.returncode else ""
    )


def _user_namespaces() -> str:
    unprivileged = NOBODY if os.geteuid() == 0 else []
    return _tried(*unprivileged, "unshare", "--user", "--map-root-user", "--mount", "true")


def _squashfs_mount() -> str:
    if os.geteuid() != 0:
        return "only root mounts squashfs"
    with tempfile.TemporaryDirectory() as scratch:
        image = str(Path(scratch, "image"))
        source = Path(scratch, "source")
        source.mkdir()
        # the mount ends with the mount namespace
        mount = ["unshare", "--mount", "mount", "-t", "squashfs", "-o", "loop,ro", image, str(source)]
        return _tried("mksquashfs", str(source), image, "-quiet", "-no-progress") or _tried(*mount)


def _fuse() -> str:
    try:
        mode = os.stat("/dev/fuse").st_mode
    except OSError as error:
        return str(error)
    return "" if stat.S_ISCHR(mode) and mode & 0o006 == 0o006 else "/dev/fuse is not open to ordinary users"


def _cgroup_memory() -> str:
    for root in map(Path, CGROUP_ROOTS):
        controllers = root / "cgroup.controllers"
        ours = (root / "memory.limit_in_bytes").exists() or (
            controllers.exists() and "memory" in controllers.read_text()
        )
        if ours and os.access(root, os.W_OK):
            return ""
    return "no writable memory cgroup"


def _users() -> str:
    if os.geteuid() != 0:
        return "only root runs commands as other users"
    try:
        people = [pwd.getpwnam(name) for name in USERS]
    except KeyError as error:
        return str(error.args[0])
    identity = ["setpriv", f"--reuid={people[0].pw_uid}", f"--regid={people[0].pw_gid}", "--clear-groups"]
    reason = _tried(*identity, sys.executable, "-c", "")
    return f"{USERS[0]} cannot run {sys.executable}: {reason}" if reason else ""


PROBES: dict[str, Callable[[], str]] = {
    "users": _users,
    "userns": _user_namespaces,
    "squashfs-mount": _squashfs_mount,
    "fuse": _fuse,
    "squashfuse_ll": _program("squashfuse_ll"),
    "tar2sqfs": _program("tar2sqfs"),
    "mksquashfs": _program("mksquashfs"),
    "registry": _program("docker-registry", "skopeo"),
    "umoci": _program("umoci"),
    "busybox": _program("busybox"),
    "apptainer": _program("apptainer"),
    "ch-run": _program("ch-run"),
    "cgroup-memory": _cgroup_memory,
}
