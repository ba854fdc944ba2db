"""A tree written as one squashfs file, by the writer program that this machine has; nothing is extracted to disk.

tar2sqfs (squashfs-tools-ng) comes first: it needs 24 MB where mksquashfs takes gigabytes, writes the same bytes on
every run, and has none of squashfs-tools' races between hard links and duplicates (plougher/squashfs-tools #361, #395).
Then mksquashfs, never by its other name sqfstar, whose 4.5 refuses -Xcompression-level. What any of them wrote is
believed only after :func:`shifterwrap.convert.readback.check`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

from ..errors import ConverterMissing, ConvertError, Error
from ..events import Emit, Event
from . import merged_tar
from .content import OpenLayer, in_layer_order, stream
from .decompress import readable
from .room import FULL, no_room
from .sqfs_reader import superblock
from .tree import DIRECTORY, FILE, Node, Tree, first_names

SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"
PIPE_BYTES = 1 << 20  # /proc/sys/fs/pipe-max-size, what an ordinary user may have
_F_SETPIPE_SZ = 1031  # linux/fcntl.h; Python has its name from 3.10
_REPORT_BYTES = 16 << 20
_MKSQUASHFS_MEMORY = "256M"
_HINT = "nothing was cached; the writer is at fault, or this machine: shifterwrap doctor"
_LEVELLED = ("gzip", "zstd")


class Options(NamedTuple):
    """How to compress. ``level`` is the compressor's own (lz4: none), ``block_size`` a power of two, 4 KiB..1 MiB."""

    compressor: str = "zstd"
    level: int = 1
    block_size: int = 128 << 10
    threads: int = 2


class Writer(NamedTuple):
    """A program that writes squashfs from a tar, and what it can do."""

    program: str
    path: str
    version: tuple[int, ...]
    compressors: frozenset[str]

    def argv(self, output: str, options: Options, root: Node) -> list[str]:
        """Its command line; the tar comes on standard input, ``output`` exists and is overwritten."""
        build = _tar2sqfs_argv if self.program == "tar2sqfs" else _mksquashfs_argv
        return build(self, output, options, root)


# ---- which program


def find_writer(search_path: str, compressor: str) -> Writer:
    """The best writer in ``search_path`` (directories, colon-separated) that knows ``compressor``; ConverterMissing."""
    unfit = []
    for program in ("tar2sqfs", "mksquashfs"):
        path = _which(program, search_path)
        if path is None:
            continue
        writer = Writer(program, path, *_abilities(program, path))
        fault = unfitness(writer, compressor)
        if not fault:
            return writer
        unfit.append(f"{path}: {fault}")
    raise ConverterMissing("; ".join(unfit) or f"neither tar2sqfs nor mksquashfs is in {search_path}")


def unfitness(writer: Writer, compressor: str) -> str:
    """Why ``writer`` cannot be used, or nothing."""
    if writer.program == "mksquashfs" and writer.version < (4, 6):
        return "its version is below 4.6"  # 4.5 reads tars, but not their device numbers, and ignores -root-time
    if compressor not in writer.compressors:
        return f"it does not know {compressor}"
    return ""


def parse_version(text: str) -> tuple[int, ...]:
    """The first version number in what a program says about itself; () when there is none."""
    found = re.search(r"\b(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in found.groups() if part) if found else ()


def parse_compressors(text: str) -> frozenset[str]:
    """The compressors that a help text lists, each at the start of a line of its own."""
    return frozenset(re.findall(r"^\s+(gzip|lzma|lzo|xz|lz4|zstd)(?: \(default\))?$", text, re.MULTILINE))


def _abilities(program: str, path: str) -> tuple[tuple[int, ...], frozenset[str]]:
    version, listing = ("--version", "--help") if program == "tar2sqfs" else ("-version", "-help")
    return parse_version(_says(path, version)), parse_compressors(_says(path, listing))


def _says(path: str, option: str) -> str:
    done = subprocess.run([path, option], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=_environment(), check=False)
    return done.stdout.decode(errors="replace")


def _which(program: str, search_path: str) -> Optional[str]:
    for directory in search_path.split(":"):
        path = f"{directory}/{program}"
        if directory.startswith("/") and os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    return None


def _tar2sqfs_argv(writer: Writer, output: str, options: Options, root: Node) -> list[str]:
    level = ["--comp-extra", f"level={options.level}"] if options.compressor in _LEVELLED else []
    return [
        writer.path, "--quiet", "--force", "--no-skip", "--num-jobs", str(options.threads),
        "--block-size", str(options.block_size), "--compressor", options.compressor, *level, output,
    ]


def _mksquashfs_argv(writer: Writer, output: str, options: Options, root: Node) -> list[str]:
    level = ["-Xcompression-level", str(options.level)] if options.compressor in _LEVELLED else []
    careful = ["-no-duplicates"] if writer.version < (4, 7, 6) else []  # the races of its duplicate search, #361
    return [
        writer.path, "-", output, "-tar", "-noappend", "-quiet", "-no-progress", "-exit-on-error", "-no-exports",
        "-mem", _MKSQUASHFS_MEMORY, "-processors", str(options.threads), "-mkfs-time", "0",
        "-b", str(options.block_size), "-root-mode", f"{root.mode:o}", "-root-uid", str(root.uid),
        "-root-gid", str(root.gid), "-root-time", str(root.mtime), *careful, "-comp", options.compressor, *level,
    ]


def best_compressor() -> str:
    """zstd, or gzip where the read-back could not decompress zstd."""
    return "zstd" if "zstd" in readable() else "gzip"


def _environment() -> dict[str, str]:
    """What the writer gets: its messages in English, and not an arena of memory for each core."""
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "MALLOC_ARENA_MAX": "4"}


# ---- writing


def write(
    tree: Tree, open_layer: OpenLayer, path: str, options: Options, emit: Emit, *, writer: Optional[Writer] = None
) -> None:
    """Write ``tree`` to the new file ``path``, and leave the CRC-32 of each file's content in its node.

    ``open_layer(index)`` yields a layer's uncompressed bytes; layers are opened in order, each at most once, and only
    as far as something in them lives. Raises ConvertError, ConverterMissing, CacheFull, or LimitExceeded for too many
    holes; ``path`` does not exist then.
    """
    if options.compressor not in readable():
        raise ConvertError(f"an image compressed with {options.compressor} could not be read back here")
    writer = writer or find_writer(SEARCH_PATH, options.compressor)
    path = os.path.abspath(path)
    nodes, links = first_names(tree)
    files = in_layer_order(nodes)
    with _Program(writer, writer.argv(path, options, tree.root), path) as program:
        _send_headers(nodes, program.pipe)
        _send_files(files, open_layer, tree.live_bytes, program.pipe, emit)
        for link, node, first in links:
            program.pipe.put(merged_tar.header(link, node, first))
        program.pipe.put(merged_tar.END)
        program.pipe.flush()
        program.finish()
        _check_written(path, writer, options)
        program.keep()


def _send_headers(nodes: list[tuple[bytes, Node]], pipe: _Pipe) -> None:
    for path, node in nodes:
        if node.kind == DIRECTORY:
            pipe.put(merged_tar.header(path, node))
    for path, node in reversed(nodes):  # tar2sqfs searches a directory's list from its front for each name's place
        if node.kind not in (DIRECTORY, FILE):
            pipe.put(merged_tar.header(path, node))


def _send_files(
    files: list[tuple[bytes, Node]], open_layer: OpenLayer, total: int, pipe: _Pipe, emit: Emit
) -> None:
    done = reported = 0
    for path, node, content in stream(files, open_layer):
        pipe.put(merged_tar.header(path, node))
        for piece in content:
            pipe.put(piece)
        if node.size % 512:
            pipe.put(merged_tar.padding(node.size))
        done += node.stored_bytes()
        if done - reported >= _REPORT_BYTES or done == total:
            reported = done
            emit(Event("convert", "", done, total))


class _Ended(Exception):
    """The writer ended before its input did."""


class _Pipe:
    """The writer's standard input; what is put is gathered and written about a pipe's capacity at a time."""

    __slots__ = ("_fd", "_pieces", "_size")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pieces: list[Union[bytes, memoryview]] = []
        self._size = 0
        with contextlib.suppress(OSError):  # above the user's pipe-user-pages: it stays small
            fcntl.fcntl(fd, _F_SETPIPE_SZ, PIPE_BYTES)

    def put(self, piece: Union[bytes, memoryview]) -> None:
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size >= PIPE_BYTES or len(self._pieces) >= 512:  # IOV_MAX is 1024
            self.flush()

    def flush(self) -> None:
        pieces, self._pieces, self._size = self._pieces, [], 0
        while pieces:
            try:
                written = os.writev(self._fd, pieces)
            except BrokenPipeError:
                raise _Ended from None
            while pieces and written >= len(pieces[0]):
                written -= len(pieces.pop(0))
            if written:
                pieces[0] = memoryview(pieces[0])[written:]


class _Program:
    """The writer running; left in any way, it is dead and reaped, and the output is gone unless keep() was called.

    The output is created here and stays open here: after a failure, when tar2sqfs says "I/O error" and has removed the
    file, the room that it took is still taken, and one more write tells whether there was too little.
    """

    def __init__(self, writer: Writer, argv: Sequence[str], path: str) -> None:
        self._writer, self._path = writer, path
        self._kept = False
        self._output_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._said_fd = os.memfd_create("writer-said")
        try:
            self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0,
                                             stderr=self._said_fd, env=_environment(), cwd="/")
        except OSError as exc:
            self._discard()
            raise ConverterMissing(f"cannot run {argv[0]}") from exc
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        self.pipe = _Pipe(self._stdin.fileno())

    def __enter__(self) -> _Program:
        return self

    def __exit__(self, kind: object, exc: object, trace: object) -> None:
        try:
            self._stdin.close()
            if isinstance(exc, _Ended):
                raise self._failure(self._process.wait()) from None
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._discard()

    def _discard(self) -> None:
        os.close(self._output_fd)
        os.close(self._said_fd)
        if not self._kept:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)

    def finish(self) -> None:
        """Wait for the writer to end, and raise what it failed of."""
        self._stdin.close()
        code = self._process.wait()
        if code:
            raise self._failure(code)
        if not os.path.samestat(os.fstat(self._output_fd), os.stat(self._path)):
            raise ConvertError(f"{self._writer.program} did not write {self._path}", _HINT)

    def keep(self) -> None:
        """Leave the output where it is."""
        self._kept = True

    def _failure(self, code: int) -> Error:
        said = self._said()
        if self._is_full(said):
            return no_room(self._path)
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            why = " (perhaps for using too much memory)" if -code == signal.SIGKILL else ""
            return ConvertError(f"{self._writer.path} was killed by {name}{why}", _HINT)
        said = said or "it did not say why"
        return ConvertError(f"{self._writer.path} failed with exit code {code}: {said}", _HINT)

    def _said(self) -> str:
        """The end of what the writer printed."""
        size = os.fstat(self._said_fd).st_size
        return os.pread(self._said_fd, 1000, max(size - 1000, 0)).decode(errors="replace").strip()

    def _is_full(self, said: str) -> bool:
        if any(os.strerror(number) in said for number in FULL):
            return True
        try:
            written = os.pwrite(self._output_fd, bytes(PIPE_BYTES), os.fstat(self._output_fd).st_size)
        except OSError as exc:
            return exc.errno in FULL
        return written < PIPE_BYTES


def _check_written(path: str, writer: Writer, options: Options) -> None:
    """The cheap look at the result: the superblock is that of a complete image of the kind that was asked for."""
    found = superblock(path)
    if (found.compressor, found.block_size) != (options.compressor, options.block_size):
        raise ConvertError(f"{writer.path} wrote {found.compressor} blocks of {found.block_size} bytes", _HINT)
