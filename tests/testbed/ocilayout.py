"""Writes OCI image layouts from explicit layer specifications, byte for byte the same on every run.

Image builders refuse to produce most of what a converter has to survive. Here a layer is a list of tar members, each a
`TarInfo`, a `TarInfo` with its data, or raw bytes, so a test can write any member that a hostile registry could serve:

    layer = Layer(tar([directory("etc"), file("etc/motd", b"hello\\n"), symlink("lib", "usr/lib")]))
    digest = write_layout(path, [Image([layer], {"Cmd": ["sh"]})])
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union

Member = Union[bytes, tarfile.TarInfo, "tuple[tarfile.TarInfo, bytes]"]
Name = Union[str, bytes]
Json = dict[str, Any]

EPOCH = 1_700_000_000
CREATED = "2026-01-01T00:00:00Z"
CHUNK = 1 << 20
REF_NAME = "org.opencontainers.image.ref.name"

OCI, DOCKER = "application/vnd.oci.image", "application/vnd.docker"
MEDIA_TYPES = {
    "oci": {
        "index": f"{OCI}.index.v1+json",
        "manifest": f"{OCI}.manifest.v1+json",
        "config": f"{OCI}.config.v1+json",
        "gzip": f"{OCI}.layer.v1.tar+gzip",
        "zstd": f"{OCI}.layer.v1.tar+zstd",
        "none": f"{OCI}.layer.v1.tar",
    },
    "docker": {
        "index": f"{DOCKER}.distribution.manifest.list.v2+json",
        "manifest": f"{DOCKER}.distribution.manifest.v2+json",
        "config": f"{DOCKER}.container.image.v1+json",
        "gzip": f"{DOCKER}.image.rootfs.diff.tar.gzip",
        "zstd": f"{DOCKER}.image.rootfs.diff.tar.zstd",
        "none": f"{DOCKER}.image.rootfs.diff.tar",
    },
}


class Layer(NamedTuple):
    """One layer: its tar (bytes, or the path of a large one) and how the blob is stored.

    `media_type` and `diff_id` override the true values, for layers that lie about themselves.
    """

    source: bytes | Path
    compression: str = "gzip"
    media_type: str | None = None
    diff_id: str | None = None


class Image(NamedTuple):
    """One image of one platform. `config` is the OCI config's inner object: Env, Entrypoint, Cmd, WorkingDir, User."""

    layers: Sequence[Layer]
    config: Mapping[str, Any] = {}
    platform: str = "linux/amd64"
    media: str = "oci"


# ---- tar members


def text(name: Name) -> str:
    """The str that tarfile encodes to exactly these bytes."""
    return name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")


def entry(name: Name, kind: bytes = tarfile.REGTYPE, link: Name = "", /, **fields: float) -> tarfile.TarInfo:
    """A header; `fields` are TarInfo's own numbers: mode, uid, gid, mtime, size, devmajor, devminor."""
    info = tarfile.TarInfo(text(name))
    info.type, info.linkname, info.mtime = kind, text(link), EPOCH
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o777 if kind == tarfile.SYMTYPE else 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def file(name: Name, data: bytes = b"", **fields: float) -> Member:
    """A regular file with its content."""
    return entry(name, size=len(data), **fields), data


def directory(name: Name, **fields: float) -> Member:
    """A directory."""
    return entry(name, tarfile.DIRTYPE, **fields)


def symlink(name: Name, target: Name, **fields: float) -> Member:
    """A symbolic link."""
    return entry(name, tarfile.SYMTYPE, target, **fields)


def hardlink(name: Name, target: Name, **fields: float) -> Member:
    """A hard link to a member named `target`, of this layer or of a lower one."""
    return entry(name, tarfile.LNKTYPE, target, **fields)


def fifo(name: Name, **fields: float) -> Member:
    """A named pipe."""
    return entry(name, tarfile.FIFOTYPE, **fields)


def device(name: Name, kind: bytes, major: int, minor: int, **fields: float) -> Member:
    """A device node; `kind` is tarfile.CHRTYPE or tarfile.BLKTYPE."""
    return entry(name, kind, devmajor=major, devminor=minor, **fields)


def whiteout(path: str) -> Member:
    """The marker that removes `path` of the layers below."""
    parent, name = os.path.split(path)
    return file(os.path.join(parent, f".wh.{name}"))


def opaque(path: str) -> Member:
    """The marker that hides everything that the layers below have in the directory `path`."""
    return file(os.path.join(path, ".wh..wh..opq"))


def pax(records: Mapping[str, bytes]) -> bytes:
    """A PAX header for the member that follows, with binary values as Go writes them (tarfile cannot)."""
    body = b"".join(_pax_record(key.encode(), value) for key, value in records.items())
    header = entry("PaxHeaders/0", tarfile.XHDTYPE, size=len(body))
    return header.tobuf(tarfile.USTAR_FORMAT) + _padded(body)


def xattrs(attributes: Mapping[str, bytes]) -> bytes:
    """The PAX header that gives the member that follows these extended attributes."""
    return pax({f"SCHILY.xattr.{name}": value for name, value in attributes.items()})


def sparse(name: str, size: int, pieces: Sequence[tuple[int, bytes]], style: str = "1.0") -> bytes:
    """A sparse file of `size` bytes with data at the given offsets, in one of GNU tar's ways: "gnu", "0.1", "1.0".

    As there, a piece is whole blocks unless the file ends with it, and an empty piece tells where a last hole ends.
    """
    if not pieces or pieces[-1][0] + len(pieces[-1][1]) < size:
        pieces = [*pieces, (size, b"")]
    data = b"".join(piece for _, piece in pieces)
    numbers = [number for offset, piece in pieces for number in (offset, len(piece))]
    if style == "gnu":
        return _old_sparse_header(name, size, numbers, len(data)) + _padded(data)
    if style == "0.1":
        records = {"size": str(size), "numblocks": str(len(pieces)), "map": ",".join(map(str, numbers))}
    else:
        data = _padded("".join(f"{number}\n" for number in (len(pieces), *numbers)).encode()) + data
        records = {"major": "1", "minor": "0", "realsize": str(size)}
    extended = pax({f"GNU.sparse.{key}": value.encode() for key, value in {"name": name, **records}.items()})
    return extended + entry("GNUSparseFile.0/x", size=len(data)).tobuf(tarfile.USTAR_FORMAT) + _padded(data)


def _old_sparse_header(name: str, size: int, numbers: Sequence[int], stored: int) -> bytes:
    """Old GNU headers hold up to four pieces and the real size where ustar has the name's prefix."""
    header = bytearray(entry(name, tarfile.GNUTYPE_SPARSE, size=stored).tobuf(tarfile.GNU_FORMAT))
    header[386 : 386 + 12 * len(numbers)] = b"".join(b"%011o\0" % number for number in numbers)
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def _pax_record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(rest) + len(str(length)) != length:
        length += 1
    return str(length).encode() + rest


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def tar(members: Iterable[Member], *, format: Literal[0, 1, 2] = tarfile.PAX_FORMAT, closed: bool = True) -> bytes:
    """The uncompressed tar of `members`; not `closed`, it ends with the last data byte, as `umoci insert` ends it."""
    out, tail = [], 0
    for member in members:
        if isinstance(member, bytes):
            out.append(member)
            tail = 0
        else:
            info, data = member if isinstance(member, tuple) else (member, b"")
            out += [info.tobuf(format, "utf-8", "surrogateescape"), _padded(data)]
            tail = -len(data) % tarfile.BLOCKSIZE
    whole = b"".join(out)
    return whole + bytes(2 * tarfile.BLOCKSIZE) if closed else whole[: len(whole) - tail]


# ---- layouts


def write_layout(path: str | Path, images: Sequence[Image], tag: str = "1") -> str:
    """Write `images` into the layout at `path` under `tag`, and return the digest that the tag names.

    One image is tagged itself; several are tagged through an image index. A layout may hold many tags: a second call
    adds, or replaces its own.
    """
    root = Path(path)
    blobs = root / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    manifests: list[Json] = []
    for image in images:
        manifests.append(_put_image(blobs, image, manifests[-1]["digest"] if manifests else ""))
    top = manifests[0] if len(images) == 1 else _put_index(blobs, manifests, images[0].media)
    _tag(root, {**top, "annotations": {**top.get("annotations", {}), REF_NAME: tag}})
    return str(top["digest"])


def attestation(media: str = "oci") -> Image:
    """The provenance manifest that BuildKit puts into an index after the image it speaks of: no platform, no root."""
    statement = json.dumps({"_type": "https://in-toto.io/Statement/v0.1", "predicate": {}}).encode()
    return Image([Layer(statement, "none", "application/vnd.in-toto+json")], platform="unknown/unknown", media=media)


def read_image(path: str | Path, tag: str) -> Image:
    """Read back one single-platform image with gzip layers, for images that another tool has edited."""
    root = Path(path)
    index = json.loads((root / "index.json").read_bytes())
    top = next(m for m in index["manifests"] if m.get("annotations", {}).get(REF_NAME) == tag)
    manifest = json.loads(_blob(root, top["digest"]))
    config = json.loads(_blob(root, manifest["config"]["digest"]))
    layers = [Layer(gzip.decompress(_blob(root, layer["digest"]))) for layer in manifest["layers"]]
    return Image(layers, config.get("config", {}), f"{config['os']}/{config['architecture']}")


def _blob(root: Path, digest: str) -> bytes:
    return (root / "blobs" / digest.replace(":", "/")).read_bytes()


def _put_image(blobs: Path, image: Image, subject: str) -> Json:
    types = MEDIA_TYPES[image.media]
    stored = [_put_layer(blobs, layer, types) for layer in image.layers]
    system, architecture, *variant = image.platform.split("/")
    platform = {"architecture": architecture, "os": system, **({"variant": variant[0]} if variant else {})}
    config = {
        "created": CREATED,
        **platform,
        "config": dict(image.config),
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in stored]},
        "history": [{"created": CREATED, "created_by": f"layer {number}"} for number in range(len(stored))],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": types["manifest"],
        "config": {"mediaType": types["config"], **_put(blobs, [_dump(config)])},
        "layers": [descriptor for descriptor, _ in stored],
    }
    descriptor = {"mediaType": types["manifest"], **_put(blobs, [_dump(manifest)]), "platform": platform}
    if system == "unknown":
        kind = {"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": subject}
        descriptor["annotations"] = kind
    return descriptor


def _put_index(blobs: Path, manifests: list[Json], media: str) -> Json:
    media_type = MEDIA_TYPES[media]["index"]
    index = {"schemaVersion": 2, "mediaType": media_type, "manifests": manifests}
    return {"mediaType": media_type, **_put(blobs, [_dump(index)])}


def _put_layer(blobs: Path, layer: Layer, types: Mapping[str, str]) -> tuple[Json, str]:
    plain = hashlib.sha256()

    def counted() -> Iterator[bytes]:
        for chunk in _chunks(layer.source):
            plain.update(chunk)
            yield chunk

    stored = _put(blobs, _compressed(counted(), layer.compression))
    descriptor = {"mediaType": layer.media_type or types[layer.compression], **stored}
    return descriptor, layer.diff_id or f"sha256:{plain.hexdigest()}"


def _chunks(source: bytes | Path) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as stream:
        yield from iter(lambda: stream.read(CHUNK), b"")


def _compressed(chunks: Iterable[bytes], compression: str) -> Iterator[bytes]:
    if compression == "none":
        yield from chunks
        return
    compressor: Any
    if compression == "zstd":
        import zstandard  # only these layers need it

        compressor = zstandard.ZstdCompressor(level=3).compressobj()
    else:
        compressor = zlib.compressobj(6, zlib.DEFLATED, 31)  # gzip framing with no time in it
    for chunk in chunks:
        yield compressor.compress(chunk)
    yield compressor.flush()


def _put(blobs: Path, chunks: Iterable[bytes]) -> Json:
    digest, size, new = hashlib.sha256(), 0, blobs / f".new-{os.getpid()}"
    with new.open("wb") as stream:
        for chunk in chunks:
            digest.update(chunk)
            size += stream.write(chunk)
    new.rename(blobs / digest.hexdigest())
    return {"digest": f"sha256:{digest.hexdigest()}", "size": size}


def _tag(root: Path, descriptor: Json) -> None:
    index = root / "index.json"
    others: list[Json] = []
    if index.exists():
        tag = descriptor["annotations"][REF_NAME]
        known = json.loads(index.read_bytes())["manifests"]
        others = [other for other in known if other.get("annotations", {}).get(REF_NAME) != tag]
    index.write_bytes(_dump({"schemaVersion": 2, "manifests": [*others, descriptor]}))
    (root / "oci-layout").write_bytes(_dump({"imageLayoutVersion": "1.0.0"}))


def _dump(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
