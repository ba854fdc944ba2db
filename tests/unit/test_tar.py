"""The tar reader: every header format, the leniency of Go's archive/tar, and nothing for a hostile header to gain."""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
from pathlib import Path

import pytest

from shifterwrap.convert import tar
from shifterwrap.convert.tree import DIRECTORY, FIFO, FILE, SYMLINK
from shifterwrap.errors import ConvertError
from tests.testbed.ocilayout import directory, fifo, file, hardlink, pax, symlink
from tests.unit.tarbuild import archive, content, merge, pieces, raw_header, read

BLOCK = 512


def one(data: bytes) -> tar.Member:
    found = read(data)
    assert len(found) == 1
    return found[0]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


# ---- header formats


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_pythons_tarfile(format: int) -> None:
    out = io.BytesIO()
    name = "d" * 90 + "/" + "f" * 60  # ustar needs its prefix field
    with tarfile.open(fileobj=out, mode="w", format=format) as writer:
        for member in (directory("x", mode=0o711, uid=1000, gid=2000, mtime=5), symlink("s", "x"), fifo("p")):
            writer.addfile(member)  # type: ignore[arg-type]
        info = tarfile.TarInfo(name)
        info.size = 3
        writer.addfile(info, io.BytesIO(b"abc"))
    found = read(out.getvalue())
    assert [(m.path, m.kind) for m in found] == [
        (b"x", DIRECTORY), (b"s", SYMLINK), (b"p", FIFO), (name.encode(), FILE),
    ]
    assert found[0][2:6] == (0o711, 1000, 2000, 5)
    assert out.getvalue()[found[3].offset :][:3] == b"abc"


def test_v7_headers_have_no_prefix_and_slashes_for_directories() -> None:
    v7 = {"magic": bytes(8), "major": bytes(8), "minor": bytes(8), "prefix": b"not a prefix"}
    found = read(raw_header(b"old/", b"\0", **v7) + raw_header(b"old/f", b"\0", 3, **v7) + padded(b"abc"))
    assert [(m.path, m.kind, m.size) for m in found] == [(b"old", DIRECTORY, 0), (b"old/f", FILE, 3)]


def test_a_name_that_fills_its_field_has_no_nul() -> None:
    assert one(raw_header(b"n" * 100)).path == b"n" * 100
    assert one(raw_header(b"n" * 100, prefix=b"p" * 155)).path == b"p" * 155 + b"/" + b"n" * 100


def test_gnu_headers_have_times_where_ustar_has_the_prefix() -> None:
    times = b"%011o\0" % 1_600_000_000 * 2
    assert one(raw_header(b"x", magic=b"ustar  \0", prefix=times)).path == b"x"


def test_the_misplaced_prefix_of_old_go() -> None:
    assert one(raw_header(b"x", magic=b"ustar  \0", prefix=b"usr/share/some/where")).path == b"usr/share/some/where/x"


def test_star_keeps_times_behind_a_shorter_prefix() -> None:
    block = raw_header(b"x", prefix=b"p".ljust(131, b"\0") + b"00000000000 " * 2)
    block = bytearray(block)
    block[508:512] = b"tar\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    assert one(bytes(block)).path == b"p/x"


@pytest.mark.parametrize(("field", "value"), [
    (b"0000123\0", 0o123), (b"    123 ", 0o123), (b"123\0junk", 0o123), (b"\0\0\0\0\0\0\0\0", 0), (b"        ", 0),
    (b"\x80\0\0\0\0\0\x01\0", 256), (b"\x80" + b"\0" * 3 + b"\xff\xff\xff\xfe", 2**32 - 2),
])
def test_numbers(field: bytes, value: int) -> None:
    assert one(raw_header(b"x", uid=field)).uid == value


@pytest.mark.parametrize("field", [b"0000009", b"0o12345", b"1_0\0\0\0\0", b"-000001", b"+000001", b"zzzzzzz"])
def test_what_is_no_number(field: bytes) -> None:
    with pytest.raises(ConvertError, match="bad number"):
        read(raw_header(b"x", uid=field))


def test_negative_base_256() -> None:
    minus_five = b"\xff" * 11 + b"\xfb"
    assert one(raw_header(b"x", mtime=minus_five)).mtime == 0
    with pytest.raises(ConvertError, match="impossible size"):
        read(_with(raw_header(b"x"), 124, minus_five))


def _with(block: bytes, at: int, value: bytes) -> bytes:
    changed = bytearray(block)
    changed[at : at + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def test_the_header_checksum() -> None:
    good = raw_header(b"x")
    for at in (0, 150, 300, 511):
        bad = bytearray(good)
        bad[at] ^= 1
        with pytest.raises(ConvertError, match=r"checksum|bad number"):
            read(bytes(bad))


def test_the_signed_checksum_of_old_suns() -> None:
    block = raw_header(b"\xff\xfe")
    signed = sum(byte - 256 * (byte > 127) for byte in block[:148] + b" " * 8 + block[156:])
    assert one(raw_header(b"\xff\xfe", sum=b"%06o\0 " % signed)).path == b"\xff\xfe"


# ---- F28: long names, PAX


def test_F28_gnu_long_names_and_links() -> None:
    name, target = b"d/" * 100 + b"x", b"t/" * 120
    data = (raw_header(b"././@LongLink", b"L", len(name) + 1) + padded(name + b"\0")
            + raw_header(b"././@LongLink", b"K", len(target) + 1) + padded(target + b"\0")
            + raw_header(b"short", b"2", link=b"short"))
    assert one(data)[:8:7] == (name, target)


def test_F28_pax_overrides() -> None:
    records = pax({"path": b"long", "linkpath": b"to", "uid": b"5", "gid": b"6", "mtime": b"7.25"})
    member = one(archive(records, symlink("s", "t")))
    assert (member.path, member.link, member.uid, member.gid, member.mtime) == (b"long", b"to", 5, 6, 7)


def test_F28_empty_pax_values_do_not_override() -> None:
    assert one(archive(pax({"path": b"", "uid": b"", "size": b""}), file("x", b"1", uid=4)))[:7:6] == (b"x", 1)


def test_F28_a_global_header_is_passed_over_as_every_engine_does() -> None:
    body = b"18 path=elsewhere\n"
    data = raw_header(b"pax_global_header", b"g", len(body)) + padded(body) + archive(file("x"))
    assert one(data).path == b"x"


def test_F28_a_size_beyond_octal() -> None:
    big = (8 << 30) + 1
    block = archive(pax({"size": b"%d" % big}), file("x"))[: 3 * BLOCK]
    with pytest.raises(ConvertError, match="ends inside"):  # it believes the size and finds the data missing
        read(block)
    assert one(_with(raw_header(b"d", b"5"), 124, b"\x80" + big.to_bytes(11, "big"))).size == 0


@pytest.mark.parametrize(("ustar", "said"), [(0, b"1024"), (1024, b"0"), (512, b"1024")])
def test_F28_two_sizes_that_disagree_are_refused(ustar: int, said: bytes) -> None:
    smuggled = archive(file("smuggled"))
    with pytest.raises(ConvertError, match="two sizes"):
        read(pax({"size": said}) + raw_header(b"x", b"0", ustar) + smuggled)


@pytest.mark.parametrize("body", [
    b"5 path\n", b"99 path=x\n", b"10 path=xy", b"path=x\n", b"-3 a=b\n", b"6 =abc\n", b"0 a=b\n", b"1 a=b\n",
    b"6 a=b\npath=x\n",
])
def test_F28_malformed_pax_headers(body: bytes) -> None:
    with pytest.raises(ConvertError, match="malformed PAX"):
        read(raw_header(b"h", b"x", len(body)) + padded(body) + raw_header(b"x"))


@pytest.mark.parametrize("records", [{"uid": b"x"}, {"mtime": b"1e9"}, {"size": b"1.5"}, {"gid": b"-"}])
def test_F28_bad_pax_numbers(records: dict[str, bytes]) -> None:
    with pytest.raises(ConvertError):
        read(archive(pax(records), file("x")))


def test_F28_extension_headers_are_bounded() -> None:
    with pytest.raises(ConvertError, match="extended header of 4294967296 bytes"):
        read(_with(raw_header(b"h", b"x"), 124, b"\x80" + (1 << 32).to_bytes(11, "big")))


def test_F25_malformed_attribute() -> None:
    with pytest.raises(ConvertError, match="malformed extended attribute"):
        read(archive(pax({"LIBARCHIVE.xattr.user.x": b"*"}), file("x")))


def test_F30_impossible_symlinks() -> None:
    for target in (b"", b"t" * 4096):
        with pytest.raises(ConvertError, match="impossible target"):
            read(pax({"linkpath": target}) + raw_header(b"s", b"2"))


def test_unknown_types_are_an_error() -> None:
    for kind in (b"V", b"M", b"D", b"A", b"8"):
        with pytest.raises(ConvertError, match="unknown type"):
            read(raw_header(b"x", kind))


# ---- F27: sparse files, as GNU tar itself writes them


@pytest.mark.parametrize("options", [
    ["--format=gnu"], ["--format=posix", "--sparse-version=0.0"], ["--format=posix", "--sparse-version=0.1"],
    ["--format=posix", "--sparse-version=1.0"],
])
@pytest.mark.parametrize("regions", [1, 3, 5, 40])
def test_F27_sparse_files_of_gnu_tar(tmp_path: Path, options: list[str], regions: int) -> None:
    with (tmp_path / "sparse").open("wb") as out:
        for i in range(regions):
            out.seek((2 * i + 1) << 16)
            out.write(b"%04d" % i * 1024)
        out.truncate(regions << 18)
    (tmp_path / "after").write_bytes(b"after")
    data = subprocess.run(["tar", "-S", *options, "-C", str(tmp_path), "-cf", "-", "sparse", "after"],
                          check=True, stdout=subprocess.PIPE).stdout
    tree = merge(data)
    assert tree.root.children[b"sparse"].sparse is not None
    assert content(tree.root.children[b"sparse"], [data]) == (tmp_path / "sparse").read_bytes()
    assert content(tree.root.children[b"after"], [data]) == b"after"


@pytest.mark.parametrize("sparse_map", [b"0,5", b"0", b"4,4,2,1", b"0,3,2,2", b"9,4", b"x,1", b"0,-4", b"0,2", b"-1,4"])
def test_F27_impossible_maps(sparse_map: bytes) -> None:
    with pytest.raises(ConvertError, match="sparse"):
        read(archive(pax({"GNU.sparse.map": sparse_map, "GNU.sparse.size": b"10"}), file("x", b"data")))


def test_F27_maps_are_bounded() -> None:
    huge = b"%d\n" % 10**15
    records = pax({"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0", "GNU.sparse.realsize": b"10"})
    with pytest.raises(ConvertError, match="malformed sparse map"):
        read(archive(records, file("x", huge + b"1\n" * (1 << 20))))
    more = b"1" + bytes(7)
    endless = (_with(raw_header(b"x", b"S"), 386, b"00000000000\0" * 8 + b"\1")
               + (b"00000000000\0" * 42 + more) * 3000)
    with pytest.raises(ConvertError, match="too many regions"):
        read(endless)


# ---- F31: where the archive ends


def test_F31_without_padding_or_end_marker_as_umoci_inserts() -> None:
    data = archive(file("a", b"1"), file("b", b"22"), closed=False)
    assert len(data) % BLOCK == 2
    assert [m.path for m in read(data)] == [b"a", b"b"]


@pytest.mark.parametrize("tail", [b"", bytes(512), bytes(1024), bytes(10240), bytes(700)])
def test_F31_ends_that_go_accepts(tail: bytes) -> None:
    assert one(raw_header(b"x") + tail).path == b"x"


@pytest.mark.parametrize(("data", "why"), [
    (raw_header(b"x")[:300], "inside a header"),
    (raw_header(b"x", size=100) + b"short", "inside b'x'"),
    (raw_header(b"x") + bytes(511), "inside a header"),
    (raw_header(b"x") + bytes(512) + raw_header(b"y"), "zero block between"),
    (raw_header(b"h", b"x", 100), "inside an extended header"),
    (b"<html>not a tar</html>" * 40, "not a tar|bad number"),
])
def test_F31_truncated_and_foreign_streams(data: bytes, why: str) -> None:
    with pytest.raises(ConvertError, match=why):
        read(data)


def test_F31_everything_after_the_end_is_read() -> None:
    seen = []

    def watched():  # type: ignore[no-untyped-def]
        for piece in pieces(archive(file("x")) + b"trailing" * 10_000, 1000):
            seen.append(len(piece))
            yield piece

    assert len(list(tar.members(watched()))) == 1
    assert sum(seen) == len(archive(file("x"))) + 80_000


# ---- hostile input


def test_F36_damaged_tars_end_in_a_clean_error() -> None:
    chosen = random.Random(5)
    good = archive(pax({"path": b"long" * 30, "GNU.sparse.map": b"0,4", "GNU.sparse.size": b"9"}), file("s", b"data"),
                   directory("d"), hardlink("h", "d"), symlink("l", "d"), file("f", b"x" * 600))
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(chosen.randint(1, 4)):
            bad[chosen.randrange(len(bad))] = chosen.randrange(256)
        if chosen.random() < 0.5:  # with a header checksum that holds, so that the fields are believed
            at = chosen.randrange(len(bad) // BLOCK) * BLOCK
            bad[at + 148 : at + 156] = b" " * 8
            bad[at + 148 : at + 156] = b"%06o\0 " % sum(bad[at : at + BLOCK])
        try:
            found = read(bytes(bad[: chosen.randint(1, len(bad))]))
        except ConvertError:
            continue
        assert all(0 <= m.size < 1 << 51 and 0 <= m.uid < 1 << 32 and b".." not in m.path.split(b"/") for m in found)

