"""The site's settings as the launcher sees them: the values, and a snapshot that is read without a YAML parser.

``/etc/shifterwrap/shifterwrap.yaml`` and ``conf.d/*.yaml`` beside it are the configuration. Parsing YAML costs more
than a whole launch, so :mod:`shifterwrap.sitefile` leaves a JSON snapshot that names path, inode, size and mtime_ns of
every file and directory it came from; a launch stats those and reads one small file. A stale snapshot is made anew in a
child process. A snapshot is believed only when root owns it (the site's) or the caller does (his own).
"""

from __future__ import annotations

import os
import stat
import sys

from . import __version__
from .errors import ConfigError, from_record
from .values import TYPE_CHECKING, NamedTuple, loads

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Optional

SITE_FILE = "/etc/shifterwrap/shifterwrap.yaml"
SITE_SNAPSHOT = "/run/shifterwrap/config.json"
SNAPSHOT_VERSION = f"1 {__version__}"  # a snapshot holds every default, and those belong to a version
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Config(NamedTuple):
    """Every setting with its default; help, units and ranges are the rows of :data:`sitefile.SETTINGS`."""

    runtime: str = "auto"
    default_registry: str = "docker.io"
    insecure_registries: tuple[str, ...] = ()
    local_scratch: str = ""
    cache_max_bytes: int = 0
    cache_min_free_bytes: int = 1 << 30
    owner_policy: str = "root"
    compressor: str = "auto"
    compression_level: int = 1
    block_bytes: int = 128 << 10
    threads: int = 0
    pull_deadline_seconds: int = 3600
    connect_seconds: int = 10
    read_seconds: int = 30
    retries: int = 5
    max_image_bytes: int = 1 << 40
    max_entries: int = 5_000_000
    max_ratio: int = 200
    mount_home: bool = True
    binds: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    tool_path: str = DEFAULT_PATH


def load(environ: Mapping[str, str], uid: int) -> Config:
    """The configuration in force; ConfigError when a file is wrong or SHIFTERWRAP_CONFIG names none."""
    path = site_file(environ)
    sources = fingerprint(path)
    if not any(mark[1] for mark in sources):
        return Config()
    for snapshot in (SITE_SNAPSHOT, own_snapshot(environ, uid, path)):
        values = _read_snapshot(snapshot, uid, path, sources)
        if values is not None:
            return from_values(values)
    return from_values(_refresh(path))


def site_file(environ: Mapping[str, str]) -> str:
    """The file that the configuration begins with; ConfigError when SHIFTERWRAP_CONFIG names none."""
    chosen = environ.get("SHIFTERWRAP_CONFIG", "")
    if chosen and not os.path.isfile(chosen):
        raise ConfigError(f"SHIFTERWRAP_CONFIG names no file: {chosen}", "unset it, or correct the path")
    return chosen or SITE_FILE


def fingerprint(path: str) -> list[list[Any]]:
    """``[path, inode, size, mtime_ns]`` of the file, its conf.d and the files there; zeros for what is missing."""
    drop_ins = os.path.join(os.path.dirname(path), "conf.d")
    paths = [path, drop_ins]
    try:
        paths += sorted(os.path.join(drop_ins, name) for name in os.listdir(drop_ins) if name.endswith(".yaml"))
    except OSError:
        pass
    return [_mark(item) for item in paths]


def _mark(path: str) -> list[Any]:
    try:
        info = os.stat(path)
    except OSError:
        return [path, 0, 0, 0]
    return [path, info.st_ino, info.st_size, info.st_mtime_ns]


def own_snapshot(environ: Mapping[str, str], uid: int, path: str) -> str:
    """Where this user's own snapshot of the configuration at ``path`` lives."""
    return os.path.join(runtime_dir(environ, uid), f"config-{path.replace('/', '+')}.json")


def runtime_dir(environ: Mapping[str, str], uid: int) -> str:
    """The directory for this user's small generated files, in memory; it may not exist yet."""
    base = environ.get("XDG_RUNTIME_DIR", "")
    try:
        info = os.lstat(base)
        if stat.S_ISDIR(info.st_mode) and info.st_uid == uid and not info.st_mode & 0o022:
            return os.path.join(base, "shifterwrap")
    except OSError:
        pass
    return f"/dev/shm/shifterwrap-{uid}"


def _read_snapshot(snapshot: str, uid: int, path: str, sources: list[list[Any]]) -> Optional[dict[str, Any]]:
    try:
        fd = os.open(snapshot, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as stream:
        info = os.fstat(fd)
        owner = 0 if snapshot == SITE_SNAPSHOT else uid
        if info.st_uid != owner or info.st_mode & 0o022 or not _is_private(os.path.dirname(snapshot), owner):
            return None
        try:
            document = loads(stream.read().decode())
        except ValueError:
            return None
    if not isinstance(document, dict) or document.get("version") != SNAPSHOT_VERSION or document.get("path") != path:
        return None
    return document["values"] if document.get("sources") == sources else None


def _is_private(directory: str, owner: int) -> bool:
    """Whether only ``owner`` can put files there; a file system mounted on it could say anything about owners."""
    info = os.lstat(directory)
    same = info.st_dev == os.lstat(os.path.dirname(directory)).st_dev
    return stat.S_ISDIR(info.st_mode) and info.st_uid == owner and not info.st_mode & 0o022 and same


def from_values(values: Mapping[str, Any]) -> Config:
    """A Config of validated values; keys of a newer version are left out."""
    known: dict[str, Any] = {}
    for key in Config._fields:
        if key in values:
            known[key] = tuple(values[key]) if isinstance(values[key], list) else values[key]
    return Config(**known)


def _refresh(path: str) -> dict[str, Any]:
    """Parse in a child: this process stays without the YAML parser, and the next one finds the snapshot."""
    import subprocess  # only on a changed configuration

    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")
    child = subprocess.run([sys.executable, "-I", program, "snapshot", path], stdout=subprocess.PIPE, check=False)
    try:
        document = loads(child.stdout.decode())
    except ValueError:
        raise ConfigError(f"{path}: cannot be parsed") from None
    if "error" in document:
        raise from_record(document["error"])
    values: dict[str, Any] = document["values"]
    return values
