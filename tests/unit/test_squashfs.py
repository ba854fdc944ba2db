"""Writing squashfs with the real tools: what they make is the tree, and each way in which they fail is told apart."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shifterwrap.convert import accelerators, merged_tar, readback, sqfs_reader, squashfs
from shifterwrap.convert.tree import CHARACTER, DIRECTORY, FILE, SYMLINK, Node, Tree, walk
from shifterwrap.errors import CacheFull, ConverterMissing, ConvertError, LimitExceeded
from shifterwrap.events import Event, ignore
from tests.testbed.ocilayout import file, hardlink, pax, symlink, xattrs
from tests.unit.tarbuild import archive, every_kind, image, merge, mounted, opener, status_of, unsquashed, zlib_crc

needs_writer = pytest.mark.needs("tar2sqfs")
TAR2SQFS = squashfs.Writer("tar2sqfs", "/usr/bin/tar2sqfs", (1, 2, 0), frozenset({"gzip", "zstd", "lz4", "xz"}))
MKSQUASHFS = squashfs.Writer("mksquashfs", "/usr/bin/mksquashfs", (4, 6, 1), frozenset({"gzip", "zstd"}))


# ---- choosing a writer


def test_versions_are_parsed() -> None:
    assert squashfs.parse_version("tar2sqfs (squashfs-tools-ng) 1.2.0\nCopyright (c) 2019") == (1, 2, 0)
    assert squashfs.parse_version("mksquashfs version 4.7.5-9d89fba4 (2026/03/01)") == (4, 7, 5)
    assert squashfs.parse_version("mksquashfs version 4.6 (2023/03/17)") == (4, 6)
    assert squashfs.parse_version("something else") == ()


def test_compressors_are_parsed() -> None:
    ng = "Available SquashFS block compressors:\n\tgzip\n\tlzma\n\txz (default)\n\tzstd\n\nSupported tar"
    assert squashfs.parse_compressors(ng) == {"gzip", "lzma", "xz", "zstd"}
    tools = "Compressors available and compressor specific options:\n\tgzip (default)\n\t  -Xcompression-level\n\tlz4\n"
    assert squashfs.parse_compressors(tools) == {"gzip", "lz4"}


@pytest.mark.parametrize(("version", "fault"), [((4, 3), "below 4.6"), ((4, 5, 1), "below 4.6"), ((), "below 4.6"),
                                                ((4, 6), ""), ((4, 7, 6), "")])
def test_old_mksquashfs_is_unfit(version: tuple[int, ...], fault: str) -> None:
    assert fault in squashfs.unfitness(MKSQUASHFS._replace(version=version), "zstd")
    assert bool(squashfs.unfitness(MKSQUASHFS._replace(version=version), "zstd")) == bool(fault)


def test_a_writer_without_the_compressor_is_unfit() -> None:
    assert squashfs.unfitness(MKSQUASHFS, "lz4") == "it does not know lz4"


def fake(directory: Path, name: str, body: str) -> Path:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_find_writer_prefers_tar2sqfs_and_falls_back(tmp_path: Path) -> None:
    with pytest.raises(ConverterMissing, match="neither"):
        squashfs.find_writer(str(tmp_path), "zstd")
    fake(tmp_path, "mksquashfs", "printf 'mksquashfs version 4.5.1 (2022)\\n\\tzstd\\n'")
    with pytest.raises(ConverterMissing, match=r"mksquashfs: its version is below 4\.6"):
        squashfs.find_writer(str(tmp_path), "zstd")
    fake(tmp_path, "mksquashfs", "printf 'mksquashfs version 4.7.6 (2026)\\n\\tzstd\\n'")
    assert squashfs.find_writer(f"relative::{tmp_path}", "zstd").version == (4, 7, 6)
    fake(tmp_path, "tar2sqfs", "printf 'tar2sqfs 1.2.0\\n\\tgzip\\n'")
    assert squashfs.find_writer(str(tmp_path), "zstd").program == "mksquashfs"
    assert squashfs.find_writer(str(tmp_path), "gzip").program == "tar2sqfs"


@needs_writer
def test_find_writer_of_this_machine() -> None:
    writer = squashfs.find_writer(squashfs.SEARCH_PATH, "zstd")
    assert writer.program == "tar2sqfs"
    assert writer.version >= (1, 0)


def test_command_lines() -> None:
    options = squashfs.Options("zstd", 3, 65536, 4)
    root = Node(DIRECTORY, 0o711, 5, 6, 7)
    assert TAR2SQFS.argv("/o", options, root) == [
        "/usr/bin/tar2sqfs", "--quiet", "--force", "--no-skip", "--num-jobs", "4", "--block-size", "65536",
        "--compressor", "zstd", "--comp-extra", "level=3", "/o",
    ]
    assert "--comp-extra" not in TAR2SQFS.argv("/o", options._replace(compressor="lz4"), root)
    argv = MKSQUASHFS.argv("/o", options, root)
    assert argv[:4] == ["/usr/bin/mksquashfs", "-", "/o", "-tar"]
    assert "-no-duplicates" in argv
    assert argv[argv.index("-root-mode") :][:8] == ["-root-mode", "711", "-root-uid", "5", "-root-gid", "6",
                                                   "-root-time", "7"]
    assert "-no-duplicates" not in MKSQUASHFS._replace(version=(4, 7, 6)).argv("/o", options, root)


def test_best_compressor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "zstandard", None)
    monkeypatch.setattr(accelerators, "stdlib_zstd", None)
    assert squashfs.best_compressor() == "gzip"
    with pytest.raises(ConvertError, match="could not be read back"):
        squashfs.write(merge(), opener(), "/nowhere", squashfs.Options("zstd"), ignore)


# ---- the merged tar


def test_headers_are_what_python_reads() -> None:
    import io
    import tarfile

    node = Node(FILE, 0o6751, 2**32 - 2, 2**21, 2**32 - 1)
    node.size, node.xattrs = 3, {b"user.x": b"\0binary\n"}
    link = Node(SYMLINK, 0o777)
    link.target = b"t" * 101
    stream = b"".join([
        merged_tar.header(b"", Node(DIRECTORY, 0o755)), merged_tar.header(b"p" * 99 + b"/n", node), b"abc",
        merged_tar.padding(3), merged_tar.header(b"s", link), merged_tar.header(b"h", node, b"q" * 200), merged_tar.END,
    ])
    root, found, symbolic, hard = tarfile.open(fileobj=io.BytesIO(stream)).getmembers()
    assert (root.name, root.isdir()) == (".", True)
    assert (found.name, found.mode, found.uid, found.gid, found.mtime, found.size) == (
        "p" * 99 + "/n", 0o6751, 2**32 - 2, 2**21, 2**32 - 1, 3,
    )
    assert found.pax_headers["SCHILY.xattr.user.x"] == "\0binary\n"
    assert (symbolic.linkname, hard.linkname, hard.islnk(), hard.size) == ("t" * 101, "q" * 200, True, 0)


@pytest.mark.parametrize("length", [0, 1, 89, 90, 91, 986, 987, 988, 989, 990])
def test_pax_lengths_count_themselves(length: int) -> None:
    record = merged_tar._record(b"path", b"v" * length)
    assert int(record.split(b" ")[0]) == len(record)


# ---- whole images


def compressors() -> list[str]:
    return sorted({"gzip", "zstd", "lz4"})


def readable_or_skip(compressor: str) -> None:
    from shifterwrap.convert.decompress import readable

    if compressor not in readable():
        pytest.skip(f"nothing here reads {compressor}")


@needs_writer
@pytest.mark.parametrize("compressor", compressors())
@pytest.mark.parametrize("block_size", [4096, 131072, 1 << 20])
def test_every_kind_survives(tmp_path: Path, compressor: str, block_size: int) -> None:
    readable_or_skip(compressor)
    path = tmp_path / "i.sqfs"
    image(path, archive(*every_kind()), compressor=compressor, block_size=block_size)
    found = sqfs_reader.superblock(str(path))
    assert (found.compressor, found.block_size, found.version) == (compressor, block_size, (4, 0))


def expected_of(tree: Tree) -> dict[bytes, tuple[object, ...]]:
    result = {}
    for path, node in walk(tree.root):
        detail: object = b""
        if node.kind == FILE:
            detail = (node.size, node.crc)
        elif node.kind == SYMLINK:
            detail = node.target
        elif node.kind in (CHARACTER, stat.S_IFBLK):
            detail = node.rdev
        result[path] = (node.kind, node.mode, node.uid, node.gid, node.mtime, detail, node)
    return result


def same(found: dict[bytes, tuple[object, ...]], tree: Tree) -> None:
    """The same names with the same values, and the same groups of hard links."""
    expected = expected_of(tree)
    assert {path: value[:-1] for path, value in found.items()} == {p: value[:-1] for p, value in expected.items()}
    assert groups(found) == groups(expected)


def groups(values: dict[bytes, tuple[object, ...]]) -> set[frozenset[bytes]]:
    by_inode: dict[object, set[bytes]] = {}
    for path, value in values.items():
        by_inode.setdefault(value[-1] if value[0] != DIRECTORY else (path,), set()).add(path)
    return {frozenset(paths) for paths in by_inode.values()}


@needs_writer
@pytest.mark.needs("squashfs-mount")
@pytest.mark.parametrize("policy", ["root", "keep"])
def test_the_kernel_sees_the_tree(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "i.sqfs"
    tree = image(path, archive(*every_kind()), policy=policy)
    with mounted(path) as root:
        same(status_of(root), tree)


@needs_writer
@pytest.mark.skipif(os.geteuid() != 0, reason="only root extracts owners and devices")
@pytest.mark.skipif(not shutil.which("unsquashfs"), reason="no unsquashfs installed")
def test_unsquashfs_extracts_the_tree(tmp_path: Path) -> None:
    members = [member for member in every_kind() if getattr(member, "name", "") != "disk"]  # it garbles large numbers
    tree = image(tmp_path / "i.sqfs", archive(*members))
    same(status_of(unsquashed(tmp_path / "i.sqfs", tmp_path)), tree)


@needs_writer
def test_attributes_survive_and_are_compared(tmp_path: Path) -> None:
    capability = b"\x01\0\0\x02\0\x20" + bytes(14)
    data = archive(xattrs({"security.capability": capability, "user.x": bytes(range(256)) * 10}), file("x", b"1"),
                   xattrs({"user.y": b""}), file("y"), hardlink("z", "x"))
    tree = image(tmp_path / "i.sqfs", data)
    tree.root.children[b"x"].xattrs = {b"security.capability": capability}
    with pytest.raises(ConvertError, match="/x in extended attributes"):
        readback.check(str(tmp_path / "i.sqfs"), tree, 1, ignore)


@needs_writer
def test_layers_are_opened_once_in_order_and_only_as_far_as_they_live(tmp_path: Path) -> None:
    dead = archive(file("a", b"1"))
    long = archive(file("b", b"2"), file("late", bytes(5 << 20)))
    top = archive(file("a", b"3"), file("late", b""), hardlink("c", "b"))
    opened, read = [], 0

    def open_layer(index: int) -> Iterator[bytes]:
        nonlocal read
        opened.append(index)
        for at in range(0, len([dead, long, top][index]), 4096):
            read += 1
            yield [dead, long, top][index][at : at + 4096]

    tree = merge(dead, long, top)
    squashfs.write(tree, open_layer, str(tmp_path / "i"), squashfs.Options("gzip"), ignore)
    readback.check(str(tmp_path / "i"), tree, 1, ignore)
    assert opened == [1, 2]
    assert read == 2


@needs_writer
def test_F27_sparse_files_are_written_with_their_holes(tmp_path: Path) -> None:
    sparse = pax({"GNU.sparse.map": b"1000000,4,70000000,2", "GNU.sparse.size": b"200000000"})
    tree = image(tmp_path / "i", archive(sparse, file("s", b"dataXY"), file("after", b"1")))
    assert os.path.getsize(tmp_path / "i") < 100_000
    assert tree.root.children[b"s"].crc == zlib_crc(
        bytes(1_000_000) + b"data" + bytes(70_000_000 - 1_000_004) + b"XY" + bytes(200_000_000 - 70_000_002)
    )


def test_F27_a_terabyte_of_holes_is_refused(tmp_path: Path) -> None:
    sparse = pax({"GNU.sparse.map": b"0,1", "GNU.sparse.size": b"%d" % (1 << 40)})
    with pytest.raises(LimitExceeded, match="holes"):
        squashfs.write(merge(archive(sparse, file("s", b"x"))), opener(), str(tmp_path / "i"), squashfs.Options("gzip"),
                       ignore, writer=TAR2SQFS)
    assert not (tmp_path / "i").exists()


@needs_writer
def test_F39_the_same_layers_make_the_same_bytes(tmp_path: Path) -> None:
    layers = [archive(*every_kind()), archive(*(file(f"n{i}", bytes([i]) * (i * 3000)) for i in range(100)))]
    for name in ("1", "2"):
        image(tmp_path / name, *layers, threads=2)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@needs_writer
def test_progress_is_reported(tmp_path: Path) -> None:
    events: list[Event] = []
    data = archive(*(file(f"f{i}", bytes([i]) * (9 << 20)) for i in range(5)))
    tree = merge(data)
    squashfs.write(tree, opener(data), str(tmp_path / "i"), squashfs.Options("gzip"), events.append)
    assert [event.stage for event in events] == ["convert"] * len(events)
    assert len(events) >= 3
    assert events[-1].done == events[-1].total == tree.live_bytes
    readback.check(str(tmp_path / "i"), tree, 2, events.append)
    assert (events[-1].stage, events[-1].done) == ("verify", tree.live_bytes)


@pytest.mark.needs("mksquashfs")
def test_mksquashfs_writes_the_same_tree(tmp_path: Path) -> None:
    path = "/usr/bin/mksquashfs"
    writer = squashfs.Writer("mksquashfs", path, *squashfs._abilities("mksquashfs", path))
    sound = writer.version >= (4, 6)
    members = [member for member in every_kind() if sound or getattr(member, "name", "") not in ("disk", "null")]
    data = archive(*members)
    tree = merge(data)
    squashfs.write(tree, opener(data), str(tmp_path / "i"), squashfs.Options("gzip"), ignore, writer=writer)
    if not sound:  # below 4.6, device numbers are wrong and -root-time does nothing: that is why it is unfit
        with sqfs_reader.Image(str(tmp_path / "i")) as found:
            tree.root.mtime = found.inode(found.superblock.root).mtime
    readback.check(str(tmp_path / "i"), tree, 2, ignore)


# ---- failures of the writer


def failing(tmp_path: Path, body: str) -> squashfs.Writer:
    return TAR2SQFS._replace(path=str(fake(tmp_path, "tar2sqfs", body)))


def write_some(writer: squashfs.Writer, path: Path, size: int = 4 << 20) -> None:
    data = archive(file("x", os.urandom(size)))
    squashfs.write(merge(data), opener(data), str(path), squashfs.Options("gzip"), ignore, writer=writer)


@pytest.mark.parametrize(("body", "why"), [
    ("cat >/dev/null; echo some reason >&2; exit 3", "failed with exit code 3: some reason"),
    ("echo early >&2; exit 1", "failed with exit code 1: early"),
    ("exit 1", "failed with exit code 1: it did not say why"),
    ("kill -KILL $$", r"was killed by SIGKILL \(perhaps"),
    ("cat >/dev/null; kill -SEGV $$", "was killed by SIGSEGV"),
    ("exec <&-; kill -ABRT $$", "was killed by SIGABRT"),
    ("cat >/dev/null", "not a squashfs image|makes no sense"),
    ("cat >/dev/null; for last; do :; done; rm $last; echo no > $last", "did not write"),
    ("cat >/dev/null; for last; do :; done; printf hsqs > $last", "not a squashfs image|makes no sense"),
    ("exec head -c 100000 /dev/zero >&2", "failed|not a squashfs|killed"),
])
def test_failures_are_explained_and_leave_nothing(tmp_path: Path, body: str, why: str) -> None:
    with pytest.raises(ConvertError, match=why):
        write_some(failing(tmp_path, body), tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_a_writer_that_cannot_be_run(tmp_path: Path) -> None:
    with pytest.raises(ConverterMissing, match="cannot run"):
        write_some(TAR2SQFS._replace(path=str(tmp_path / "gone")), tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_a_full_disk_that_the_writer_names(tmp_path: Path) -> None:
    body = "cat >/dev/null; echo 'Write failed because No space left on device' >&2; exit 1"
    with pytest.raises(CacheFull, match="no room left on /"):
        write_some(failing(tmp_path, body), tmp_path / "i")


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@needs_writer
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_the_real_writer_killed(tmp_path: Path, number: signal.Signals) -> None:
    data = archive(*(file(f"x{i}", os.urandom(1 << 20)) for i in range(40)))
    before = children()

    def open_layer(index: int) -> Iterator[bytes]:
        for at in range(0, len(data), 1 << 20):
            if at == 10 << 20:
                (pid,) = set(children()) - set(before)
                os.kill(pid, number)
            yield data[at : at + (1 << 20)]

    with pytest.raises(ConvertError, match=f"killed by {number.name}"):
        squashfs.write(merge(data), open_layer, str(tmp_path / "i"), squashfs.Options("gzip"), ignore)
    assert not (tmp_path / "i").exists()
    assert children() == before


@needs_writer
def test_an_error_of_ours_ends_the_writer(tmp_path: Path) -> None:
    data = archive(file("x", bytes(3 << 20)))
    before = children()

    def open_layer(index: int) -> Iterator[bytes]:
        yield data[: 1 << 20]
        raise ConvertError("a damaged layer")

    with pytest.raises(ConvertError, match="a damaged layer"):
        squashfs.write(merge(data), open_layer, str(tmp_path / "i"), squashfs.Options("gzip"), ignore)
    with pytest.raises(ConvertError, match="shorter than it was"):
        squashfs.write(merge(data), lambda index: iter([data[:900]]), str(tmp_path / "i"), squashfs.Options("gzip"),
                       ignore)
    assert children() == before
    assert not (tmp_path / "i").exists()


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of the size that the test asks for."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a small file system")
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.param}", "small", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


@needs_writer
@pytest.mark.parametrize("small_disk", ["64k", "256k", "1m", "4m"], indirect=True)
def test_a_full_disk(small_disk: Path) -> None:
    with pytest.raises(CacheFull, match=f"no room left on {small_disk}"):
        write_some(squashfs.find_writer(squashfs.SEARCH_PATH, "gzip"), small_disk / "i", 8 << 20)
    assert list(small_disk.iterdir()) == []


@pytest.mark.needs("mksquashfs")
@pytest.mark.parametrize("small_disk", ["256k"], indirect=True)
def test_a_full_disk_with_mksquashfs(small_disk: Path) -> None:
    with pytest.raises(CacheFull, match=f"no room left on {small_disk}"):
        write_some(MKSQUASHFS, small_disk / "i", 8 << 20)


def test_F38_names_reach_the_writer_only_inside_the_tar(tmp_path: Path) -> None:
    writer = failing(tmp_path, 'cat >/dev/null; printf "%s " "$@" >&2; env >&2; exit 1')
    data = archive(symlink("--force", "/etc/passwd"), file("$(touch x)", b"1"))
    os.environ["LEAK"] = "secret"
    try:
        with pytest.raises(ConvertError) as caught:
            squashfs.write(merge(data), opener(data), str(tmp_path / "i"), squashfs.Options("gzip"), ignore,
                           writer=writer)
    finally:
        del os.environ["LEAK"]
    assert "touch" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "MALLOC_ARENA_MAX=4" in str(caught.value)

