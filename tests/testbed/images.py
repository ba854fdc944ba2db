"""Small images that between them hold what layers can hold; `oracle` says what each of them unpacks to."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.testbed.ocilayout import (
    EPOCH,
    Image,
    Layer,
    Member,
    attestation,
    device,
    directory,
    fifo,
    file,
    hardlink,
    opaque,
    read_image,
    sparse,
    symlink,
    tar,
    whiteout,
    write_layout,
    xattrs,
)

BUSYBOX = Path("/bin/busybox")
# VFS_CAP_REVISION_2, effective: cap_net_raw
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


def layers(*members: list[Member]) -> list[Image]:
    """An image of one gzip layer for each list of members."""
    return [Image([Layer(tar(each)) for each in members], {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]})]


def busybox_layer() -> Layer:
    """A root that a shell runs in: busybox under all its names, and the files that programs expect."""
    names = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    places = ("bin", "dev", "etc", "home", "mnt", "opt", "proc", "root", "run", "srv", "sys", "usr", "usr/lib", "var")
    etc = {
        "os-release": b'NAME="shifterwrap testbed"\nID=testbed\nVERSION_ID=1\n',
        "passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        "group": b"root:x:0:\nnogroup:x:65534:\n",
        "hosts": b"127.0.0.1 localhost\n",
        "resolv.conf": b"",
    }
    members = [directory(place) for place in places]
    members += [directory("tmp", mode=0o1777), directory("var/tmp", mode=0o1777)]
    members += [file(f"etc/{name}", content) for name, content in etc.items()]
    members.append(file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755))
    members += [symlink(f"bin/{name}", "busybox") for name in sorted(names) if name != "busybox"]
    return Layer(tar(members))


def busybox() -> list[Image]:
    """What test/bb:1 is."""
    config = {"Env": ["PATH=/bin", "FOO=from-image"], "Cmd": ["sh"], "WorkingDir": "/srv"}
    return [Image([busybox_layer()], config)]


def _whiteouts() -> list[Image]:
    lower: list[Member] = [
        *(directory(d) for d in ("a", "a/sub", "b", "b/sub", "c", "same", "again")),
        *(file(f, f.encode()) for f in ("a/1", "a/2", "a/sub/x", "b/1", "b/sub/y", "c/1", "same/x", "again/1", "gone")),
        symlink("link", "a"),
        symlink("to-dir", "b"),
    ]
    middle: list[Member] = [
        whiteout("a/1"),
        whiteout("gone"),
        whiteout("never-was"),
        whiteout("a/sub/neither"),
        whiteout("link"),  # the link goes, a/ stays
        file("b/new", b"new"),
        opaque("b"),  # after a sibling of its own layer
        whiteout("c"),
        directory("c", mode=0o700),
        file("c/2", b"2"),
        file("same/x", b"newer"),
        whiteout("same/x"),  # of the layers below only
    ]
    upper: list[Member] = [
        whiteout("a/sub"),
        file("b/1", b"back"),
        opaque("again"),
        whiteout("to-dir/new"),  # through a symlink
        file("a/1", b"back"),
    ]
    return layers(lower, middle, upper)


def _opaque() -> list[Image]:
    lower: list[Member] = [
        *(directory(d) for d in ("first", "last", "deep", "deep/er", "bare", "twice", "kept")),
        *(file(f"{d}/old", b"old") for d in ("first", "last", "deep", "deep/er", "bare", "twice", "kept")),
    ]
    middle: list[Member] = [
        opaque("first"),
        file("first/new", b"new"),
        file("last/new", b"new"),
        directory("last/more"),
        file("last/more/new", b"new"),
        opaque("last"),
        directory("deep", mode=0o750),
        opaque("deep"),
        directory("deep/er", mode=0o711),
        file("deep/er/new", b"new"),
        opaque("bare"),
        opaque("twice"),
        file("twice/middle", b"middle"),
    ]
    return layers(lower, middle, [opaque("twice"), file("twice/new", b"new")])


def _replaced() -> list[Image]:
    lower: list[Member] = [
        directory("dir"),
        file("dir/x", b"x"),
        file("file", b"file"),
        directory("target"),
        file("target/x", b"x"),
        symlink("link", "target"),
        directory("merged", mode=0o700),
        file("merged/lower", b"1"),
        directory("to-link"),
        file("to-link/x", b"x"),
        file("twice", b"first"),
        file("twice", b"second, and longer"),
        file("grows", b"1"),
    ]
    upper: list[Member] = [
        file("dir", b"a file now"),
        directory("file", mode=0o711),
        file("file/x", b"x"),
        directory("link"),  # a directory in the place of a link to one: the link goes, target/ stays as it was
        file("link/y", b"y"),
        directory("merged", mode=0o755, mtime=EPOCH + 60),
        file("merged/upper", b"2"),
        symlink("to-link", "target"),
        file("grows", b"12345", mode=0o600),
    ]
    return layers(lower, upper)


def _hardlinks() -> list[Image]:
    lower: list[Member] = [
        directory("d"),
        file("d/one", b"one", mode=0o640),
        hardlink("d/two", "d/one"),
        hardlink("three", "d/two"),  # a chain
        file("shadowed", b"content that outlives its name"),
        file("removed", b"content that outlives its name, too"),
        symlink("sym", "d/one"),
        hardlink("sym-too", "sym"),  # of the link itself
        file("empty"),
        hardlink("empty-too", "empty"),
        file("changed", b"old"),
        hardlink("changed-too", "changed"),
    ]
    middle: list[Member] = [
        hardlink("across", "d/one"),
        hardlink("keeps-shadowed", "shadowed"),
        hardlink("keeps-removed", "removed"),
        file("d/fresh", b"fresh"),
        hardlink("d/fresh-too", "./d/fresh"),
        hardlink("d/fresh-3", "/d/fresh"),
    ]
    upper: list[Member] = [
        file("shadowed", b"new"),
        whiteout("removed"),
        file("changed", b"new"),  # a new file: changed-too keeps the old content
        whiteout("d/one"),
        hardlink("d/four", "d/two"),
    ]
    return layers(lower, middle, upper)


def _symlinked_parents() -> list[Image]:
    lower: list[Member] = [
        *(directory(d) for d in ("usr", "usr/lib", "usr/share", "deep", "deep/er")),
        symlink("lib", "usr/lib"),
        symlink("absolute", "/usr/share"),
        symlink("deep/er/up", "../../../../../usr/lib"),  # above the root is the root
        symlink("chain", "chain2"),
        symlink("chain2", "lib"),
        file("usr/lib/old", b"old"),
    ]
    upper: list[Member] = [
        file("lib/foo", b"foo"),
        directory("lib/sub"),
        file("lib/sub/bar", b"bar"),
        file("absolute/baz", b"baz"),
        file("deep/er/up/qux", b"qux"),
        file("chain/end", b"end"),
        hardlink("lib/foo-too", "lib/foo"),
        whiteout("lib/old"),
    ]
    return layers(lower, upper)


def _implicit_parents() -> list[Image]:
    lower: list[Member] = [file("no/parents/here/file", b"x"), symlink("nor/here/link", "x"), directory("./late/dir")]
    return layers([directory("./", mode=0o711), *lower], [file("no/more", b"y"), file("./dot/slash", b"z")])


def _modes() -> list[Image]:
    members: list[Member] = [
        file("setuid", b"#!", mode=0o4755),
        file("setgid", b"#!", mode=0o2755),
        directory("sticky", mode=0o1777),
        directory("setgid-dir", mode=0o2775),
        file("closed", b"secret", mode=0),
        directory("closed-dir", mode=0),
        file("closed-dir/inside", b"secret", mode=0o400),
        file("all", b"x", mode=0o7777),
        file("big-ids", b"x", uid=4_000_000_000, gid=3_999_999_999),
        file("ids", b"x", uid=1234, gid=5678),
        symlink("owned-link", "ids", uid=1234, gid=5678),
        directory("owned-dir", uid=1234, gid=5678),
    ]
    return layers(members)


def _mtimes() -> list[Image]:
    members: list[Member] = [
        file("epoch", b"x", mtime=0),
        file("fraction", b"x", mtime=EPOCH + 0.75),
        file("future", b"x", mtime=2_200_000_000),  # beyond 31 bits, within squashfs's 32
        directory("dir", mtime=1),
        file("dir/x", b"x", mtime=2),
        symlink("link", "dir", mtime=3),
    ]
    return layers(members)


def _names() -> list[Image]:
    names = [
        b"latin-\xe9",
        b"\xff\xfe",
        "gr\u00fc\u00dfe".encode(),
        b"new\nline",
        b" spaces  and\ttabs ",
        b"-dash",
        b"*",
        b"...",
    ]
    names += [b"back\\slash", b"quote'\"", b"wh.", b".whx", b"%s", b"a=b", b"n" * 120, b"c" * 255]
    long = [b"/".join([b"d" * 100] * depth) for depth in (1, 2, 3)]

    def members(top: bytes) -> list[Member]:
        links = [
            symlink(top + b"link", long[2]),
            hardlink(top + b"hard", top + b"n" * 120),
            symlink(top + b"raw", b"\xe9"),
        ]
        directories = [directory(top + name) for name in (b"", *long)]
        return [*directories, *(file(top + name, b"x") for name in (*names, long[2] + b"/file")), *links]

    as_pax, as_gnu = tar(members(b"pax/")), tar(members(b"gnu/"), format=tarfile.GNU_FORMAT)
    return [Image([Layer(as_pax), Layer(as_gnu)])]


def _xattrs() -> list[Image]:
    lower: list[Member] = [
        xattrs({"user.text": b"value", "user.binary": b"\0\xff\n=1"}),
        file("file", b"x"),
        xattrs({"security.capability": CAPABILITY}),
        file("ping", b"x", mode=0o755),
        xattrs({"user.dir": b"1"}),
        directory("dir"),
        xattrs({"user.lower": b"1"}),
        directory("merged"),
        xattrs({"user.long": b"v" * 1000}),
        file("more", b"x"),
    ]
    upper: list[Member] = [xattrs({"user.upper": b"2"}), directory("merged")]
    return layers(lower, upper)


def _nodes() -> list[Image]:
    members: list[Member] = [
        directory("dev"),
        device("dev/null", tarfile.CHRTYPE, 1, 3, mode=0o666),
        device("dev/loop0", tarfile.BLKTYPE, 7, 0, mode=0o660, gid=6),
        device("dev/high", tarfile.CHRTYPE, 511, 70_000, mode=0o600),
        fifo("pipe", mode=0o620),
    ]
    return layers(members)


def _sparse(style: str) -> Callable[[], list[Image]]:
    def build() -> list[Image]:
        mega = 1 << 20
        pieces = [(0, b"head" * 128), (mega, bytes(range(256)) * 6), (3 * mega, b"tail" * 384)]
        members: list[Member] = [
            sparse("holes", 4 * mega, pieces, style),
            sparse("all-hole", mega, [], style),
            sparse("ends-odd", mega + 3, [(mega, b"end")], style),
            file("zeros", bytes(300_000)),
            file("after", b"still in step"),
        ]
        return layers(members)

    return build


def _sizes() -> list[Image]:
    """Around the block and fragment boundaries of squashfs, with content that repeats and content that does not."""
    block = 128 << 10
    sizes = [0, 1, 511, 512, 513, block - 1, block, block + 1, 3 * block, 3 * block + 7, 1 << 20]
    noise = b"".join(hashlib.sha256(str(n).encode()).digest() for n in range((1 << 20) // 32))
    members: list[Member] = [file(f"noise-{size}", noise[:size]) for size in sizes]
    members += [file(f"text-{size}", (b"0123456789abcdef" * (size // 16 + 1))[:size]) for size in sizes]
    members.append(directory("many"))
    members += [file(f"many/{n:04d}", b"%d\n" % n) for n in range(1500)]  # directories longer than one metadata block
    return layers(members)


def _empty_layers() -> list[Image]:
    nothing = Layer(tar([]))
    return [Image([nothing, Layer(tar([file("only", b"x")])), nothing, Layer(b"")])]


def _stored(compression: str, media: str = "oci") -> Callable[[], list[Image]]:
    def build() -> list[Image]:
        source = _whiteouts()[0]
        return [Image([Layer(layer.source, compression) for layer in source.layers], source.config, media=media)]

    return build


def _mixed() -> list[Image]:
    source = _whiteouts()[0]
    kinds = ("zstd", "none", "gzip")
    return [Image([Layer(layer.source, kind) for layer, kind in zip(source.layers, kinds)], source.config)]


def _platforms(media: str) -> Callable[[], list[Image]]:
    def build() -> list[Image]:
        config = {"Cmd": ["/bin/sh"]}
        amd64 = Image([Layer(tar([file("arch", b"amd64")]))], config, media=media)
        arm64 = Image([Layer(tar([file("arch", b"arm64")]))], config, "linux/arm64/v8", media)
        proof = [attestation()] if media == "oci" else []
        return [arm64, amd64, *proof]  # the first is not the one wanted

    return build


def _unpadded() -> list[Image]:
    """Layers that end with their last data byte: no padding, no trailer. umoci's insert writes them so."""
    lower: list[Member] = [directory("etc"), file("etc/short", b"four")]
    upper: list[Member] = [file("etc/exact", bytes(512)), file("etc/last", b"unpadded")]
    return [Image([Layer(tar(lower, closed=False)), Layer(tar(upper, closed=False))])]


@functools.cache  # its layers hold the time at which they were made
def _umoci() -> list[Image]:
    """What `umoci insert` itself makes of a file, a directory, an opaque directory and a whiteout."""
    with tempfile.TemporaryDirectory() as scratch:
        layout, source = Path(scratch, "layout"), Path(scratch, "source")
        write_layout(layout, layers([directory("old"), file("old/x", b"x"), file("gone", b"x")]))
        (source / "sub").mkdir(parents=True)
        (source / "sub" / "file").write_bytes(b"inserted")
        insert = ["umoci", "insert", "--image", f"{layout}:1"]
        for argv in (
            [str(source / "sub" / "file"), "/file"],
            [str(source), "/tree"],
            ["--opaque", str(source), "/old"],
            ["--whiteout", "/gone"],
        ):
            subprocess.run([*insert, *argv], check=True, capture_output=True)
        return [read_image(layout, "1")]


BUILDERS: dict[str, Callable[[], list[Image]]] = {
    "busybox": busybox,
    "whiteouts": _whiteouts,
    "opaque": _opaque,
    "replaced": _replaced,
    "hardlinks": _hardlinks,
    "symlinked-parents": _symlinked_parents,
    "implicit-parents": _implicit_parents,
    "modes": _modes,
    "mtimes": _mtimes,
    "names": _names,
    "xattrs": _xattrs,
    "nodes": _nodes,
    "sparse": _sparse("1.0"),
    "sparse-0.1": _sparse("0.1"),
    "sparse-gnu": _sparse("gnu"),
    "sizes": _sizes,
    "empty-layers": _empty_layers,
    "zstd": _stored("zstd"),
    "uncompressed": _stored("none"),
    "mixed": _mixed,
    "docker": _stored("gzip", "docker"),
    "index": _platforms("oci"),
    "docker-list": _platforms("docker"),
    "unpadded": _unpadded,
    "umoci": _umoci,
}
NAMES = tuple(BUILDERS)


def catalogue() -> dict[str, list[Image]]:
    """Every image by name. To name them without building any (for pytest's parameters), use `NAMES`."""
    return {name: build() for name, build in BUILDERS.items()}
