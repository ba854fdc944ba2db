"""YAML files to validated settings to the launcher's snapshot; the cold side of :mod:`shifterwrap.config`.

One row per setting drives the loader, ``etc/shifterwrap.yaml``, the manual and ``shifterwrap config``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Callable, NamedTuple, Optional, Union

import yaml

from .config import SITE_FILE, SITE_SNAPSHOT, SNAPSHOT_VERSION, Config, fingerprint, own_snapshot
from .errors import BadReference, ConfigError, UsageError
from .oci import parse_reference
from .request import parse_bind

Value = Union[str, int, bool, tuple[str, ...]]
_KEPT_SNAPSHOTS = 16
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Setting(NamedTuple):
    """One setting: its key, how a YAML value becomes the setting's value, and what it does (one sentence)."""

    key: str
    parse: Callable[[Any], Value]
    form: str
    help: str

    @property
    def default(self) -> Value:
        """The value without any file."""
        value: Value = Config._field_defaults[self.key]
        return value


class Explained(NamedTuple):
    """A setting's value in force and where it came from (a file, or ``default``)."""

    setting: Setting
    value: Value
    source: str


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("a string is wanted")
    return value


def _path(value: Any) -> str:
    if _text(value) and not value.startswith("/"):
        raise ValueError("an absolute path is wanted")
    return str(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false is wanted")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("a list of strings is wanted")
    return tuple(_text(item) for item in value)


def _pairs(value: Any) -> tuple[str, ...]:
    pairs = _texts(value)
    if any("=" not in pair or not pair.partition("=")[0].isidentifier() for pair in pairs):
        raise ValueError("a list of NAME=VALUE is wanted")
    return pairs


def _binds(value: Any) -> tuple[str, ...]:
    binds = _texts(value)
    for text in binds:
        try:
            parse_bind(text)
        except UsageError as exc:
            raise ValueError(exc.message) from None
    return binds


def _registry(value: Any) -> str:
    try:
        if parse_reference(f"docker://{_text(value)}/a/b").registry == value:
            return str(value)
    except BadReference:
        pass
    raise ValueError("HOST or HOST:PORT is wanted")


def _registries(value: Any) -> tuple[str, ...]:
    return tuple(_registry(item) for item in _texts(value))


def _choice(*names: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError(f"one of {', '.join(names)} is wanted")
        return str(value)

    return parse


def _number(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high} is wanted")
        return value

    return parse


def parse_size(value: Any) -> int:
    """Bytes from a number or a number with K, M, G or T (powers of 1024); ValueError otherwise."""
    text = str(value).strip().upper()
    if text.endswith("B"):
        text = text[:-1].removesuffix("I")
    digits = text.rstrip("KMGT")
    unit = text[len(digits) :]
    if isinstance(value, bool) or not digits.strip().isdigit() or unit not in _SIZES:
        raise ValueError("a size such as 50G is wanted")
    return int(digits) * _SIZES[unit]


def _block(value: Any) -> int:
    size = parse_size(value)
    if size & (size - 1) or not 64 << 10 <= size <= 1 << 20:
        raise ValueError("a power of two from 64K to 1M is wanted")
    return size


SETTINGS = (
    Setting("runtime", _choice("auto", "embedded", "apptainer", "charliecloud"),
            "auto, embedded, apptainer, charliecloud",
            "Runtime for users who do not choose one; auto prefers apptainer, then the embedded runtime."),
    Setting("default_registry", _registry, "HOST[:PORT]", "Registry of references that name none."),
    Setting("insecure_registries", _registries, "list of HOST[:PORT]",
            "Registries that may be spoken to over plain HTTP; loopback always may."),
    Setting("local_scratch", _path, "absolute path",
            "Node-local directory for per-user caches where the home directory is on a network file system."),
    Setting("cache_max_bytes", parse_size, "size; 0 is no limit",
            "Largest sum of the entries of one cache; the least recently used go first."),
    Setting("cache_min_free_bytes", parse_size, "size", "Space that a pull leaves free on the cache's file system."),
    Setting("owner_policy", _choice("root", "keep"), "root, keep",
            "root: files belong to root, are readable by all and have no setuid bits; keep: as in the layers."),
    Setting("compressor", _choice("auto", "zstd", "gzip"), "auto, zstd, gzip",
            "Compression of squashfs images; auto is zstd, or gzip without the Python package zstandard."),
    Setting("compression_level", _number(1, 22), "1 to 22; gzip has up to 9",
            "Compression level; 1 converts fastest."),
    Setting("block_bytes", _block, "power of two, 64K to 1M", "Squashfs block size."),
    Setting("threads", _number(0, 1024), "0 to 1024", "Threads that a conversion uses; 0 is one for each usable core."),
    Setting("pull_deadline_seconds", _number(1, 7 * 86400), "seconds", "Longest wait for an image, pull included."),
    Setting("connect_seconds", _number(1, 600), "seconds", "Time for a registry to accept a connection."),
    Setting("read_seconds", _number(1, 3600), "seconds", "Longest silence of a registry in mid-answer."),
    Setting("retries", _number(0, 100), "0 to 100", "Attempts after the first where a retry may help."),
    Setting("max_image_bytes", parse_size, "size", "Largest image, unpacked; more is taken for a bomb."),
    Setting("max_entries", _number(1, 1_000_000_000), "number", "Most files in the layers of one image."),
    Setting("max_ratio", _number(2, 100_000), "number", "Largest ratio of unpacked to packed bytes, past 100 MiB."),
    Setting("mount_home", _flag, "true, false", "Bind the user's home directory into the container."),
    Setting("binds", _binds, "list of SRC[:DST[:ro]]", "Binds of every container of this site."),
    Setting("env", _pairs, "list of NAME=VALUE",
            "Environment of every container of this site; users may set the same names otherwise."),
    Setting("tool_path", _text, "colon-separated directories", "Where runtimes and squashfs tools are looked for."),
)


def load(path: str, warn: Callable[[str], None]) -> list[Explained]:
    """Every setting with value and source; ConfigError names file and key. Unknown keys go to ``warn``."""
    rows = {row.key: Explained(row, row.default, "default") for row in SETTINGS}
    for file, document in _documents(path):
        for key, value in document.items():
            if key not in rows:
                warn(f"{file}: unknown setting {key}")
                continue
            try:
                rows[key] = Explained(rows[key].setting, rows[key].setting.parse(value), file)
            except ValueError as exc:
                raise ConfigError(f"{file}: {key}: {exc}") from None
    return list(rows.values())


def _documents(path: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for file, inode, *_ in fingerprint(path):
        if not inode or os.path.isdir(file):
            continue
        try:
            with open(file, encoding="utf-8") as stream:
                document = yaml.safe_load(stream)
        except OSError as exc:
            raise ConfigError(f"{file}: {exc.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as exc:
            raise ConfigError(f"{file}: not YAML: {exc}") from None
        if document is None:
            continue
        if not isinstance(document, dict):
            raise ConfigError(f"{file}: settings are KEY: VALUE lines")
        yield file, {str(key): value for key, value in document.items()}


def snapshot(path: str) -> dict[str, Any]:
    """The launcher's snapshot of the configuration at ``path``; the marks are taken before the files are read, so
    that a change in between makes the snapshot stale, never wrong."""
    sources = fingerprint(path)
    values = {row.setting.key: row.value for row in load(path, lambda text: None)}
    return {"version": SNAPSHOT_VERSION, "path": path, "sources": sources, "values": values}


def write_snapshot(document: dict[str, Any], path: str) -> None:
    """Put the snapshot in place for the launches to come; where that fails they work, only slower."""
    uid = os.getuid()
    site = uid == 0 and path == SITE_FILE
    target = SITE_SNAPSHOT if site else own_snapshot(os.environ, uid, path)
    directory = os.path.dirname(target)
    temporary = f"{target}.{os.getpid()}"
    try:
        os.makedirs(directory, 0o755 if site else 0o700, exist_ok=True)
        info = os.lstat(directory)
        if info.st_uid != uid or info.st_mode & 0o022 or os.path.islink(directory):
            return
        with open(temporary, "w", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, 0o644)) as stream:
            json.dump(document, stream)
        os.replace(temporary, target)
        if not site:
            _forget_old(directory)
    except OSError as exc:
        print(f"shifterwrap: no configuration snapshot: {exc.filename}: {exc.strerror}", file=sys.stderr)


def _forget_old(directory: str) -> None:
    """Keep the newest copies of a user who names a file for each of his jobs; what is missing is made anew."""
    names = [os.path.join(directory, name) for name in os.listdir(directory) if name.startswith("config-")]
    for name in sorted(names, key=os.path.getmtime)[:-_KEPT_SNAPSHOTS]:
        os.unlink(name)


def answer(path: str) -> int:
    """The main of the child that a launch asks: the snapshot on standard output, kept for the launches to come."""
    try:
        document = snapshot(path)
    except ConfigError as exc:
        print(json.dumps({"error": exc.record()}))
        return 1
    write_snapshot(document, path)
    print(json.dumps(document))
    return 0


def sample() -> str:
    """``etc/shifterwrap.yaml``: every setting, commented out, with its default."""
    lines = ["# shifterwrap: settings of this site. Every setting is here with its default; man 5 shifterwrap.yaml.",
             "# Files in conf.d/*.yaml are read after this one. Check with: shifterwrap config --check", ""]
    for row in SETTINGS:
        lines += [f"# {row.help}", f"# ({row.form})", f"#{row.key}: {show(row)}", ""]
    return "\n".join(lines)


def show(setting: Setting, value: Optional[Value] = None) -> str:
    """A value of ``setting``, its default if none is given, as YAML writes it; sizes as people do."""
    value = setting.default if value is None else value
    if setting.parse in (parse_size, _block) and isinstance(value, int):
        for unit in ("T", "G", "M", "K"):
            if value and value % _SIZES[unit] == 0:
                return f"{value // _SIZES[unit]}{unit}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)
