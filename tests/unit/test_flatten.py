"""The merge of layers: each rule F1..F35 of how container layers make a file system, by its number."""

from __future__ import annotations

import gzip
import hashlib

import pytest

from shifterwrap.convert import flatten, layer, tar
from shifterwrap.convert.tree import Tree, walk
from shifterwrap.errors import ConvertError, LimitExceeded, RegistryError
from shifterwrap.oci import parse_config, parse_manifest
from tests.testbed.ocilayout import (
    Member,
    device,
    directory,
    entry,
    fifo,
    file,
    hardlink,
    opaque,
    pax,
    symlink,
    whiteout,
    xattrs,
)
from tests.unit.tarbuild import archive, content, merge, merged, names, pieces, raw_header, read, scan


def node(tree: Tree, path: bytes):  # type: ignore[no-untyped-def]
    return dict(walk(tree.root))[path]


# ---- whiteouts


def test_F01_whiteout_removes_a_file_a_directory_and_a_symlink_itself() -> None:
    lower = [file("f", b"1"), directory("d"), file("d/x", b"2"), symlink("s", "target"), file("target", b"3")]
    assert merged(lower, [whiteout("f"), whiteout("d"), whiteout("s")]) == {"target": "f644 3"}


def test_F02_whiteout_of_what_is_not_there() -> None:
    assert merged([file("f", b"1")], [whiteout("nothing"), whiteout("no/such/place"), whiteout("f/below")]) == {
        "f": "f644 1"
    }


def test_F03_markers_never_appear() -> None:
    result = merged([directory("d")], [whiteout("d/x"), opaque("d"), whiteout("y"), directory(".wh..wh.plnk")])
    assert names(result) == ["d"]


@pytest.mark.parametrize("order", [1, -1])
def test_F04_whiteouts_spare_their_own_layer(order: int) -> None:
    upper = [file("x", b"new"), whiteout("x")][::order]
    assert merged([file("x", b"old")], upper) == {"x": "f644 new"}


@pytest.mark.parametrize("order", [1, -1])
def test_F04_a_directory_of_the_same_layer_loses_only_lower_entries(order: int) -> None:
    upper = [[directory("d", mode=0o700), file("d/new", b"2")], [whiteout("d")]][::order]
    assert merged([directory("d"), file("d/old", b"1")], [*upper[0], *upper[1]]) == {"d": "d700", "d/new": "f644 2"}


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_F05_opaque_before_or_after_siblings(position: int) -> None:
    upper = [directory("d", mode=0o711), file("d/new", b"2"), file("d/s/deep", b"3")]
    upper.insert(position, opaque("d"))
    lower = [directory("d"), file("d/old", b"1"), directory("d/s", mode=0o700), file("d/s/old", b"1")]
    assert merged(lower, upper) == {
        "d": "d711", "d/new": "f644 2", "d/s": "d755", "d/s/deep": "f644 3",
    }


def test_F05_opaque_root() -> None:
    assert names(merged([file("old"), file("d/old")], [file("new"), opaque("")])) == ["new"]


def test_F06_opaque_covers_all_descendants() -> None:
    assert merged([file("a/b/c/d/e", b"1")], [opaque("a")]) == {"a": "d755"}


def test_F07_a_directory_made_again_has_only_new_children() -> None:
    layers = [file("d/old", b"1")], [whiteout("d")], [directory("d"), file("d/new", b"2")]
    assert names(merged(*layers)) == ["d", "d/new"]


def test_F08_whiteout_of_a_parent_and_an_entry_below_it() -> None:
    lower = [directory("d", mode=0o700), file("d/old", b"1")]
    assert merged(lower, [whiteout("d"), file("d/new", b"2")]) == {"d": "d755", "d/new": "f644 2"}
    assert merged(lower, [file("d/new", b"2"), whiteout("d")]) == {"d": "d755", "d/new": "f644 2"}


def test_F08_whiteout_of_a_symlink_and_an_entry_below_its_name() -> None:
    lower = [file("e/keep", b"1"), symlink("d", "e")]
    assert merged(lower, [whiteout("d"), file("d/new", b"2")]) == {
        "d": "d755", "e": "d755", "d/new": "f644 2", "e/keep": "f644 1",
    }


@pytest.mark.parametrize("name", [".wh.", "d/.wh."])
def test_F09_a_whiteout_without_a_name_is_an_error(name: str) -> None:
    with pytest.raises(ConvertError, match="whiteout of nothing"):
        merged([file("d/x")], [file(name)])


def test_F10_names_of_aufs_are_not_whiteouts() -> None:
    aufs = [directory(".wh..wh.plnk"), file(".wh..wh.aufs"), directory(".wh..wh.orph"), file("d/.wh..wh.foo")]
    lower = [file("d/.wh", b"1"), file("plnk", b"2"), file("foo", b"3")]
    assert names(merged(lower, aufs)) == ["d", "foo", "plnk", "d/.wh"]
    assert "plnk" not in merged(lower, [file(".wh.plnk")])


def test_F10_hard_links_into_the_directory_of_aufs() -> None:
    result = merged([file(".wh..wh.plnk/99.1", b"data"), hardlink("a", ".wh..wh.plnk/99.1")])
    assert result == {"a": "f644 data"}


@pytest.mark.parametrize("name", [".wh..", ".wh...", "d/.wh..."])
def test_F11_whiteouts_of_dot_and_dot_dot_are_refused(name: str) -> None:
    with pytest.raises(ConvertError, match="whiteout of nothing"):
        merged([file("d/x")], [file(name)])


def test_F12_whiteout_through_a_symlinked_parent_stays_inside() -> None:
    lower = [file("etc/passwd", b"1"), file("etc/group", b"2"), symlink("out", "../../../etc"), symlink("abs", "/etc")]
    assert names(merged(lower, [whiteout("out/passwd"), whiteout("abs/group")])) == ["abs", "etc", "out"]


@pytest.mark.parametrize("member", [
    hardlink(".wh.x", "y"), symlink(".wh.x", "/y"), directory(".wh.x"), fifo(".wh.x"), device(".wh.x", b"3", 0, 0),
])
def test_F13_a_whiteout_may_be_of_any_type(member: Member) -> None:
    assert names(merged([file("x"), file("y")], [member])) == ["y"]


def test_F13_nothing_may_be_below_a_whiteout() -> None:
    with pytest.raises(ConvertError, match="below a whiteout"):
        merged([file(".wh.x/y")])


def test_F14_an_overlay_whiteout_device_is_a_device() -> None:
    layers = [file("x", b"1")], [device("x", b"3", 0, 0)]
    assert merged(*layers) == {"x": "c644"}
    assert merged(*layers, policy="root") == {}


# ---- types and order


def test_F15_file_over_directory_and_directory_over_file() -> None:
    assert merged([file("d/x"), file("f", b"1")], [file("d", b"2"), directory("f")]) == {"d": "f644 2", "f": "d755"}


def test_F15_directory_over_symlink_replaces_it() -> None:
    lower = [file("usr/lib/x", b"1"), symlink("lib", "usr/lib")]
    assert merged(lower, [directory("lib"), file("lib/y", b"2")]) == {
        "lib": "d755", "usr": "d755", "lib/y": "f644 2", "usr/lib": "d755", "usr/lib/x": "f644 1",
    }


def test_F15_symlink_over_a_directory_with_content() -> None:
    assert merged([file("d/x"), file("d/e/y")], [symlink("d", "elsewhere")]) == {"d": "l777 elsewhere"}


@pytest.mark.parametrize("target", ["usr/lib", "/usr/lib", "./usr//lib/", "../../usr/lib", "usr/share/../lib"])
def test_F15_a_file_below_a_symlinked_directory_lands_in_its_target(target: str) -> None:
    lower = [directory("usr/lib"), directory("usr/share"), symlink("lib", target)]
    result = merged(lower, [file("lib/x/new", b"2")])
    assert result["usr/lib/x/new"] == "f644 2"
    assert result["lib"] == f"l777 {target}"


def test_F15_a_symlink_whose_target_is_missing_has_it_made() -> None:
    assert names(merged([symlink("a", "b/c")], [file("a/x")])) == ["a", "b", "b/c", "b/c/x"]


def test_F15_nothing_may_be_below_a_file() -> None:
    with pytest.raises(ConvertError, match=r"/f/x below a file|below a file"):
        merged([file("f")], [file("f/x")])


def test_F16_missing_parents_are_root_0755() -> None:
    tree = merge(archive(file("a/b/c", uid=5, gid=6)))
    assert [(n.mode, n.uid, n.gid) for _, n in walk(tree.root)] == [(0o755, 0, 0)] * 3 + [(0o644, 5, 6)]


def test_F17_directory_in_both_layers() -> None:
    lower = archive(xattrs({"user.old": b"1"}), directory("d", mode=0o755, uid=1), file("d/x"))
    upper = archive(xattrs({"user.new": b"2"}), directory("d", mode=0o700, uid=2, mtime=7), file("d/y"))
    tree = merge(lower, upper)
    found = node(tree, b"d")
    assert (found.mode, found.uid, found.mtime, found.xattrs) == (0o700, 2, 7, {b"user.new": b"2"})
    assert sorted(found.children) == [b"x", b"y"]


def test_F18_the_last_of_two_entries_wins() -> None:
    assert merged([file("x", b"1"), file("x", b"2")]) == {"x": "f644 2"}
    assert merged([file("x", b"1"), symlink("x", "y"), directory("x"), file("x/z", b"3"), directory("x")]) == {
        "x": "d755", "x/z": "f644 3",
    }


@pytest.mark.parametrize("name", ["a/b", "./a/b", "/a/b", "a//b", "a/./b", "a/b/", "///a/b"])
def test_F19_names_that_mean_the_same(name: str) -> None:
    assert merged([file("a/b", b"old")], [file(name, b"new")])["a/b"] == "f644 new"


@pytest.mark.parametrize("name", ["./", ".", "/"])
def test_F19_the_entry_of_the_root(name: str) -> None:
    root = merge(archive(file("x"), directory(name, mode=0o1777, uid=3, mtime=9))).root
    assert (root.mode, root.uid, root.mtime, list(root.children)) == (0o1777, 3, 9, [b"x"])


@pytest.mark.parametrize("member", [symlink("./", "/etc"), file("."), hardlink("/", "x")])
def test_F19_the_root_is_never_replaced(member: Member) -> None:
    with pytest.raises(ConvertError, match=r"replaces the root|directory"):
        merged([file("x")], [member])


# ---- hard links


def test_F20_to_a_file_of_the_same_layer() -> None:
    tree = merge(archive(file("a", b"1"), hardlink("b", "a"), hardlink("c", "./b")))
    assert node(tree, b"a") is node(tree, b"b") is node(tree, b"c")


def test_F20_before_its_target() -> None:
    tree = merge(archive(hardlink("z", "m"), hardlink("m", "d/a"), hardlink("y", "z"), file("d/a", b"1")))
    assert node(tree, b"z") is node(tree, b"m") is node(tree, b"y") is node(tree, b"d/a")


def test_F20_before_its_target_and_then_replaced() -> None:
    assert merged([hardlink("z", "a"), file("z", b"own"), file("a", b"1")])["z"] == "f644 own"


def test_F20_to_a_file_of_a_lower_layer() -> None:
    tree = merge(archive(file("a", b"1")), archive(hardlink("b", "a")))
    assert node(tree, b"a") is node(tree, b"b")


@pytest.mark.parametrize("later", [
    [whiteout("a"), hardlink("c", "d/b")], [file("a", b"2"), hardlink("c", "d/b")],
    [directory("a"), hardlink("c", "d/b")], [hardlink("c", "d/b"), opaque("")],
])
def test_F20_content_survives_what_happens_to_its_first_name(later: list[Member]) -> None:
    assert merged([file("a", b"1")], [hardlink("d/b", "a")], later)["c"] == "f644 1"


def test_F20_within_the_layer_that_hides_the_target() -> None:
    assert merged([file("a", b"1")], [hardlink("b", "a"), whiteout("a")]) == {"b": "f644 1"}


def test_F20_to_a_symlink_links_the_symlink() -> None:
    tree = merge(archive(file("a", b"1"), symlink("s", "a"), hardlink("h", "s")))
    assert node(tree, b"h") is node(tree, b"s")


def test_F20_through_a_symlinked_directory() -> None:
    tree = merge(archive(file("usr/lib/x", b"1"), symlink("lib", "/usr/lib")), archive(hardlink("y", "lib/x")))
    assert node(tree, b"y") is node(tree, b"usr/lib/x")


@pytest.mark.parametrize("target", ["d", "./", "/"])
def test_F20_to_a_directory_is_refused(target: str) -> None:
    with pytest.raises(ConvertError, match="hard link to a directory"):
        merged([directory("d")], [hardlink("h", target)])


@pytest.mark.parametrize("layers", [[[hardlink("h", "h")]], [[file("h")], [hardlink("h", "./h")]]])
def test_F20_to_itself_is_refused(layers: list[list[Member]]) -> None:
    with pytest.raises(ConvertError, match="hard link to itself"):
        merged(*layers)


@pytest.mark.parametrize("members", [[hardlink("h", "gone")], [hardlink("a", "b"), hardlink("b", "a")]])
def test_F20_to_nothing_is_an_error(members: list[Member]) -> None:
    with pytest.raises(ConvertError, match="not there"):
        merged(members)


def test_F20_a_long_chain_in_reverse_takes_linear_time() -> None:
    chain = [hardlink(f"n{i}", f"n{i + 1}") for i in range(20_000)]
    tree = merge(archive(*chain, file("n20000", b"1")))
    assert node(tree, b"n0") is node(tree, b"n20000")


@pytest.mark.parametrize("data", [b"payload" * 100, b""])
def test_F20_a_link_with_a_size_and_with_or_without_data(data: bytes) -> None:
    padded = data + bytes(-len(data) % 512)
    whole = archive(file("a", b"1"), closed=True)[:1024] + raw_header(b"h", b"1", 700, b"a") + padded
    tree = merge(whole + archive(file("after", b"2")))
    assert node(tree, b"h") is node(tree, b"a")
    assert b"after" in tree.root.children


# ---- metadata


def test_F21_times_are_clamped_and_a_directory_keeps_its_own() -> None:
    records = [pax({"mtime": value}) for value in (b"-5.5", b"1.999999999", b"99999999999", b"4294967295.5")]
    members = [part for i, record in enumerate(records) for part in (record, file(f"f{i}"))]
    tree = merge(archive(directory("d", mtime=5), *members, file("d/x", mtime=9)))
    assert [node(tree, b"f%d" % i).mtime for i in range(4)] == [0, 1, 2**32 - 1, 2**32 - 1]
    assert node(tree, b"d").mtime == 5


def test_F22_set_id_bits_by_policy() -> None:
    layers = [file("s", mode=0o6755), directory("d", mode=0o3775), file("t", mode=0o1600)]
    assert merged(layers) == {"d": "d3775", "s": "f6755 ", "t": "f1600 "}
    assert merged(layers, policy="root") == {"d": "d1775", "s": "f755 ", "t": "f644 "}


def test_F22_policy_root_is_chmod_a_plus_rX_and_root_owned() -> None:
    members = [directory("d", mode=0, uid=4), file("x", mode=0o100, gid=5), file("n", mode=0), fifo("p", mode=0)]
    tree = merge(archive(*members), policy="root")
    modes = {path: child.mode for path, child in walk(tree.root)}
    assert modes == {b"": 0o755, b"d": 0o555, b"x": 0o555, b"n": 0o444, b"p": 0o444}
    assert {(child.uid, child.gid) for _, child in walk(tree.root)} == {(0, 0)}


def test_F23_mode_0000_is_no_obstacle() -> None:
    assert merged([directory("d", mode=0), file("d/x", b"1", mode=0)]) == {"d": "d0", "d/x": "f0 1"}


def test_F24_large_and_numeric_owners() -> None:
    big = archive(file("x", uid=2**31 + 3, gid=2**32 - 2))
    named = entry("y")
    named.uname = named.gname = "root"
    named.uid = 77
    tree = merge(big, archive(named), archive(pax({"uid": b"4000000000", "gid": b"1"}), file("z")))
    assert [(node(tree, p).uid, node(tree, p).gid) for p in (b"x", b"y", b"z")] == [
        (2**31 + 3, 2**32 - 2), (77, 0), (4000000000, 1),
    ]
    with pytest.raises(ConvertError, match="owner"):
        merge(archive(pax({"uid": b"4294967296"}), file("z")))


def test_F25_extended_attributes() -> None:
    capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    records = pax({
        "SCHILY.xattr.security.capability": capability, "SCHILY.xattr.user.text": b"a=b\nc",
        "LIBARCHIVE.xattr.user.per%20cent": b"AAEC", "SCHILY.xattr.security.selinux": b"label",
        "SCHILY.xattr.trusted.overlay.opaque": b"y", "SCHILY.xattr.user.overlay.origin": b"",
        "SCHILY.xattr.user.rootlesscontainers": b"x", "SCHILY.xattr.system.posix_acl_access": b"acl",
    })
    data = archive(records, file("x"))
    tree = merge(data)
    assert node(tree, b"x").xattrs == {
        b"security.capability": capability, b"user.text": b"a=b\nc", b"user.per cent": b"\0\1\2",
    }
    assert tree.warnings == ["dropped attribute system.posix_acl_access of /x"]
    assert node(merge(data, policy="root"), b"x").xattrs is None


def test_F26_devices_and_fifos() -> None:
    members = [device("n", b"3", 1, 3), device("d/b", b"4", 8, 1), fifo("p"), hardlink("m", "n")]
    assert merged(members) == {"d": "d755", "m": "c644", "n": "c644", "p": "p644", "d/b": "b644"}
    tree = merge(archive(*members), policy="root")
    assert [path for path, _ in walk(tree.root)] == [b"", b"d", b"p"]
    assert tree.warnings == [
        "dropped character device /m (1, 3)", "dropped character device /n (1, 3)", "dropped block device /d/b (8, 1)",
    ]


def test_F26_device_numbers_that_linux_does_not_have() -> None:
    tree = merge(archive(device("x", b"3", 4096, 0), device("y", b"3", 0, 2**20)))
    assert not tree.root.children
    assert len(tree.warnings) == 2


def test_F27_sparse_files() -> None:
    data = archive(pax({"GNU.sparse.map": b"2,3,10,1", "GNU.sparse.size": b"12", "GNU.sparse.name": b"s"}),
                   file("GNUSparseFile.0/s", b"abcd"))
    tree = merge(data)
    assert content(node(tree, b"s"), [data]) == b"\0\0abc\0\0\0\0\0d\0"
    assert tree.live_bytes == 4


def test_F27_a_terabyte_of_hole_is_only_a_number() -> None:
    tree = merge(archive(pax({"GNU.sparse.map": b"0,1", "GNU.sparse.size": b"%d" % (1 << 40)}), file("s", b"x")))
    assert (node(tree, b"s").size, tree.live_bytes) == (1 << 40, 1)


def test_F28_long_names_reach_the_tree() -> None:
    name, target = "/".join(["n" * 200] * 3), "t" * 300
    assert merged([file(name, b"1"), symlink("s", target)]) == {
        "n" * 200: "d755", "s": f"l777 {target}", "/".join(["n" * 200] * 2): "d755", name: "f644 1",
    }


def test_F29_names_are_bytes() -> None:
    tree = merge(archive(file(b"\xff\xfe", b"1"), symlink(b"s\x80", b"\xc0")))
    assert sorted(tree.root.children) == [b"s\x80", b"\xff\xfe"]
    assert node(tree, b"s\x80").target == b"\xc0"


def test_F30_names_that_no_file_system_holds() -> None:
    for name in (b"x/" + b"n" * 256, b"/".join([b"d" * 200] * 21)):
        with pytest.raises(ConvertError, match="too long"):
            merge(archive(pax({"path": name}), file("x")))
    with pytest.raises(ConvertError, match="NUL"):
        merge(archive(pax({"path": b"a\0b"}), file("x")))
    assert names(merged([file("new\nline")])) == ["new\nline"]  # Linux allows it, and nothing here minds


@pytest.mark.parametrize("name", ["../x", "a/../x", "a/..", ".."])
def test_F30_names_with_dot_dot_are_refused(name: str) -> None:
    with pytest.raises(ConvertError, match=r"\.\."):
        merged([file(name)])
    with pytest.raises(ConvertError, match=r"\.\."):
        merged([file("x"), hardlink("y", name)])


# ---- layers as a whole


def test_F31_an_empty_layer_and_trailing_archives() -> None:
    assert merge(b"", archive(file("x"))).names == 2
    second = archive(file("hidden"))
    found = scan(archive(file("x")) + second + b"garbage")
    assert [member.path for member in found.members] == [b"x"]
    assert found.unpacked_bytes == len(archive(file("x")) + second + b"garbage")


def test_F31_no_layers() -> None:
    assert flatten.flatten([], "root").names == 1
    with pytest.raises(RegistryError, match="no layers"):
        parse_manifest({"config": {"digest": "sha256:" + "0" * 64, "size": 1}, "layers": []}, "d", "it")


def test_F32_as_many_diff_ids_as_layers() -> None:
    with pytest.raises(RegistryError, match="1 layers but 2 diff_ids"):
        parse_config({"rootfs": {"diff_ids": ["a", "b"]}}, 1, "it")


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_F33_the_diff_id_must_match(algorithm: str) -> None:
    data = archive(file("x", b"1"))
    budget = layer.Budget(layer.Limits(), 1 << 20)
    right, wrong = (f"{algorithm}:{hashlib.new(algorithm, text).hexdigest()}" for text in (data, data + b"\0"))
    assert layer.scan(0, [gzip.compress(data)], right, budget).members
    with pytest.raises(ConvertError, match="layer 3 is not the one"):
        layer.scan(3, [gzip.compress(data)], wrong, budget)


def test_F34_the_same_layer_twice() -> None:
    same = [file("a", b"1"), hardlink("b", "a"), directory("d"), symlink("s", "d"), whiteout("x")]
    assert merged(same, [file("x")], same) == merged(same)


def test_F35_many_layers() -> None:
    layers = [[file("last", str(i).encode()), file(f"f{i}")] for i in range(300)]
    result = merged(*layers)
    assert (len(result), result["last"]) == (301, "f644 299")


# ---- limits and hostile images


def test_F36_unpacked_bytes_are_limited() -> None:
    data = archive(file("zeros", bytes(3_000_000)))
    with pytest.raises(LimitExceeded, match="more than 1000000 bytes"):
        scan(data, max_unpacked_bytes=1_000_000)
    with pytest.raises(LimitExceeded, match="200 times its size"):
        scan(data, ratio_floor_bytes=1_000_000)
    assert scan(data, ratio_floor_bytes=4_000_000).unpacked_bytes == len(data)


def test_F36_layers_share_one_budget() -> None:
    data = archive(file("x", bytes(600_000)))
    budget = layer.Budget(layer.Limits(max_unpacked_bytes=1_000_000), 1 << 20)
    diff_id = f"sha256:{hashlib.sha256(data).hexdigest()}"
    layer.scan(0, [data], diff_id, budget)
    with pytest.raises(LimitExceeded):
        layer.scan(1, [data], diff_id, budget)


def test_F36_entries_and_their_metadata_are_limited() -> None:
    with pytest.raises(LimitExceeded, match="more than 100 entries"):
        scan(archive(*(file(str(i)) for i in range(101))), max_entries=100)
    with pytest.raises(LimitExceeded, match="more than 100 entries"):
        scan(archive(xattrs({"user.x": bytes(60_000)}), file("x")), max_entries=100)


def test_F37_symlink_loops() -> None:
    for loop in ([symlink("a", "a")], [symlink("a", "b"), symlink("b", "a")], [symlink("a", "a/b")]):
        with pytest.raises(ConvertError, match="loop"):
            merged([*loop, file("a/x")])
        with pytest.raises(ConvertError, match="loop"):
            merged(loop, [whiteout("a/x")])


def test_F37_deep_nesting() -> None:
    deep = "d/" * 1000
    assert len(merged([file(deep + "x")])) == 1001
    spiral = [directory(deep), symlink("s", deep)]
    with pytest.raises(ConvertError, match="too deeply"):
        merged([*spiral, symlink(deep + "t", "d"), file(f"s/{deep}x"), symlink("u", f"s/{deep}"), file(f"u/{deep}x")])


def test_F37_symlinks_that_multiply_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatten, "MAX_EXPANSION", 1000)
    with pytest.raises(LimitExceeded, match="symlinks"):
        merged([symlink("s", "./" * 100), *(file(f"s/{i}") for i in range(20))])


def test_F37_repeated_markers_take_linear_time() -> None:
    upper = [file(f"d/{i}/x") for i in range(2000)] + [opaque(f"d/{i % 2}") for i in range(2000)] + [opaque("d")] * 5000
    assert len(merged([file("d/old")], upper)) == 4001


def test_F38_paths_lead_nowhere_but_into_the_root() -> None:
    escape = [symlink("up", "../../.."), symlink("abs", "/tmp"), symlink("loop", "up/up/up")]
    result = merged(escape, [file("up/a", b"1"), file("abs/b", b"2"), file("loop/etc/c", b"3")])
    assert [result[name] for name in ("a", "tmp/b", "etc/c")] == ["f644 1", "f644 2", "f644 3"]


def test_F39_the_same_layers_make_the_same_tree() -> None:
    layers = archive(file("b/1"), file("a/2")), archive(file("c"), directory("a"), fifo("z"))
    first, second = ([(path, vars_of(child)) for path, child in walk(merge(*layers).root)] for _ in range(2))
    assert first == second
    assert [path for path, _ in first] == [b"", b"a", b"b", b"c", b"z", b"a/2", b"b/1"]


def vars_of(child: object) -> list[object]:
    return [getattr(child, name) for name in child.__slots__ if name != "children"]  # type: ignore[attr-defined]


def test_members_arrive_in_pieces_of_any_size() -> None:
    data = archive(file("a", b"x" * 700), directory("n" * 150), file("b", b"y"))
    whole = read(data)
    for size in (1, 7, 511, 512, 513, 4096):
        assert list(tar.members(pieces(data, size))) == whole
