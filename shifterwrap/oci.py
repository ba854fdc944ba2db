"""OCI's nouns: reference, digest, descriptor, platform, manifest, config. Values and their parsers, no I/O.

Sources: OCI image-spec 1.1 (manifest.md, image-index.md, config.md), distribution-spec 1.1 ("pulling manifests":
the grammar of names and tags), distribution/reference (the meaning of a short name).
"""

from __future__ import annotations

import os

from .errors import BadReference, RegistryError
from .values import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Any, Optional

MAX_MANIFEST_BYTES = 4 << 20  # distribution-spec: registries should enforce no less, clients no more
MAX_CONFIG_BYTES = 8 << 20
MAX_REFERENCE_CHARS = 1024
_AT_FAULT = "the image, or what serves it in the registry's place, is broken; nothing was cached"

INDEX_TYPES = frozenset({
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
})
MANIFEST_TYPES = frozenset({
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
})
CONFIG_TYPES = frozenset({
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
})

_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_WORD = _LOWER | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_HEX = frozenset("0123456789abcdef")
_DIGEST_HEX_LENGTHS = {"sha256": 64, "sha512": 128}
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}


class Reference(NamedTuple):
    """Where an image is asked for, in canonical form; exactly one of ``tag`` and ``digest`` decides.

    A digest wins: with both given, ``tag`` is only remembered for people.
    """

    scheme: str
    registry: str
    repository: str
    tag: str
    digest: str

    @property
    def name(self) -> str:
        """What a registry is asked for: the digest, else the tag."""
        return self.digest or self.tag

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.scheme}://{self.registry}/{self.repository}{tag}{digest}"


class Platform(NamedTuple):
    """An operating system and architecture, in OCI's (Go's) words; ``variant`` is often empty."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in self if part)


class Descriptor(NamedTuple):
    """Names content by digest and size (bytes)."""

    media_type: str
    digest: str
    size: int


class Manifest(NamedTuple):
    """The manifest of one platform: its own digest, its config and its layers, bottom first."""

    digest: str
    config: Descriptor
    layers: tuple[Descriptor, ...]


class ImageConfig(NamedTuple):
    """What the image says about running itself, and the digests of its uncompressed layers."""

    env: tuple[str, ...]
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    working_dir: str
    user: str
    labels: dict[str, str]
    architecture: str
    os: str
    diff_ids: tuple[str, ...]


def parse_reference(text: str, default_registry: str = "docker.io") -> Reference:
    """The reference that ``text`` spells; BadReference with the reason when it spells none.

    Accepts ``docker://[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]``, Shifter's ``docker:…`` and, for the default
    registry, the same without a scheme.
    """
    if len(text) > MAX_REFERENCE_CHARS:
        raise BadReference(f"reference is longer than {MAX_REFERENCE_CHARS} characters: {text[:64]}…")
    scheme, rest = _split_scheme(text)
    if scheme != "docker":
        raise BadReference(f"no source for {scheme}:// in {text}", "this version pulls docker:// references")
    rest, at, digest = rest.partition("@")
    if at:
        check_digest(digest)
    registry, remainder = _split_registry(rest, default_registry)
    repository, colon, tag = remainder.partition(":")
    if colon and not _is_tag(tag):
        raise BadReference(f"bad tag {tag!r} in {text}", "a tag is up to 128 letters, digits, _ . -")
    if registry == "docker.io" and "/" not in repository:
        repository = f"library/{repository}"
    if not _is_repository(repository):
        raise BadReference(f"bad repository name {repository!r} in {text}",
                              "a repository is lower-case words joined by . _ - and /")
    return Reference("docker", registry, repository, tag or ("" if digest else "latest"), digest)


def _split_scheme(text: str) -> tuple[str, str]:
    scheme, separator, rest = text.partition("://")
    if separator:
        return scheme, rest
    if text.startswith("docker:"):
        return "docker", text[len("docker:") :]
    if text.startswith((".", "/")):
        raise BadReference(f"local image files are not supported yet: {text}")
    return "docker", text


def _split_registry(rest: str, default: str) -> tuple[str, str]:
    first, slash, remainder = rest.partition("/")
    if not slash or not (first == "localhost" or "." in first or ":" in first):
        return default, rest
    first = first.lower()
    host, colon, port = first.rpartition(":") if ":" in first and not first.endswith("]") else (first, "", "")
    if not _is_host(host) or (colon and not _is_port(port)):
        raise BadReference(f"bad registry {first!r} in {rest}", "a registry is HOST or HOST:PORT")
    return "docker.io" if host in ("index.docker.io", "registry-1.docker.io") else first, remainder


def _is_host(host: str) -> bool:
    if host.startswith("[") and host.endswith("]"):
        return bool(host[1:-1]) and set(host[1:-1]) <= _HEX | {":", "."}
    labels = host.split(".")
    return len(host) <= 253 and all(
        label and set(label) <= _LOWER | {"-"} and not label.startswith("-") and not label.endswith("-")
        for label in labels
    )


def _is_port(port: str) -> bool:
    return port.isascii() and port.isdigit() and 0 < len(port) <= 5 and 0 < int(port) < 65536


def _is_tag(tag: str) -> bool:
    return 0 < len(tag) <= 128 and tag[0] in _WORD and set(tag) <= _WORD | {".", "-"}


def _is_repository(name: str) -> bool:
    return 0 < len(name) <= 255 and all(_is_component(part) for part in name.split("/"))


def _is_component(part: str) -> bool:
    """``[a-z0-9]+((\\.|_|__|-+)[a-z0-9]+)*`` without the 0.5 ms that compiling it costs each launch."""
    if not part or part[0] not in _LOWER or part[-1] not in _LOWER:
        return False
    separators = "".join("/" if c in _LOWER else c for c in part).split("/")
    return all(run in ("", ".", "_", "__") or set(run) == {"-"} for run in separators)


def check_digest(digest: str) -> str:
    """``digest`` itself when it is ``sha256:`` or ``sha512:`` and as many hex digits; else BadReference.

    A digest becomes a path component, so nothing else may ever pass for one (CVE-2024-3727).
    """
    algorithm, _, value = digest.partition(":")
    if _DIGEST_HEX_LENGTHS.get(algorithm) != len(value) or not set(value) <= _HEX:
        raise BadReference(f"bad digest {digest[:140]!r}", "a digest is sha256: and 64 hex digits")
    return digest


def parse_platform(text: str) -> Platform:
    """``OS/ARCH[/VARIANT]``; BadReference when it is not."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(p and set(p) <= _LOWER | {"-", "_", "."} for p in parts):
        raise BadReference(f"bad platform {text!r}", "write it as linux/amd64 or linux/arm64")
    return normalise(Platform(*parts))


def host_platform() -> Platform:
    """The platform of this machine."""
    machine = os.uname().machine
    return Platform("linux", _MACHINES.get(machine, machine))


def normalise(platform: Platform) -> Platform:
    """arm64 means arm64/v8 and the baseline of amd64 has no name (containerd's platforms package)."""
    if (platform.architecture, platform.variant) in (("arm64", "v8"), ("amd64", "v1")):
        return platform._replace(variant="")
    return platform


def parse_descriptor(value: Any, where: str) -> Descriptor:
    """One descriptor of a manifest; RegistryError names ``where`` when it is malformed."""
    size = value.get("size") if isinstance(value, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0 or not isinstance(value.get("digest"), str):
        raise RegistryError(f"{where}: descriptor without a digest and a size", _AT_FAULT)
    try:
        digest = check_digest(value["digest"])
    except BadReference as exc:
        raise RegistryError(f"{where}: {exc.message}", _AT_FAULT) from None
    return Descriptor(str(value.get("mediaType") or ""), digest, size)


def parse_json(body: bytes, what: str) -> dict[str, Any]:
    """The JSON object in ``body``; RegistryError when it is anything else."""
    try:
        import json  # the launcher parses references only

        value = json.loads(body)
    except (ValueError, RecursionError):
        raise RegistryError(f"{what} is not JSON", _AT_FAULT) from None
    if not isinstance(value, dict):
        raise RegistryError(f"{what} is not a JSON object", _AT_FAULT)
    return value


def choose_manifest(index: dict[str, Any], platform: Platform, where: str) -> Descriptor:
    """The descriptor in an image index or manifest list that runs on ``platform``.

    Attestations (platform unknown/unknown) are not images. Without a match the error lists what there is.
    """
    found: list[tuple[Platform, Descriptor]] = []
    for item in _items(index, "manifests", where):
        raw = item.get("platform") if isinstance(item, dict) else None
        raw = raw if isinstance(raw, dict) else {}
        names = [str(raw.get(key) or "") for key in ("os", "architecture", "variant")]
        if names[0] != "unknown":
            found.append((normalise(Platform(*names)), parse_descriptor(item, where)))
    for exact in (True, False):
        for candidate, descriptor in found:
            if candidate == platform if exact else candidate[:2] == platform[:2] and not platform.variant:
                return descriptor
    unnamed = [descriptor for candidate, descriptor in found if not candidate.os]
    if len(found) == 1 and unnamed:
        return unnamed[0]  # an index of one that does not say: umoci and early tools write these
    offered = ", ".join(str(candidate) for candidate, _ in found) or "none"
    raise RegistryError(f"{where} has no image for {platform}", f"it offers: {offered}; choose with --platform")


def parse_manifest(document: dict[str, Any], digest: str, where: str) -> Manifest:
    """The manifest in ``document``; RegistryError when it is not an image with at least one layer."""
    if "manifests" in document:
        raise RegistryError(f"{where} is a manifest and an index at once", _AT_FAULT)  # CVE-2021-41190
    config = parse_descriptor(document.get("config"), f"{where}: config")
    if config.media_type and config.media_type not in CONFIG_TYPES:
        kind = document.get("artifactType") or config.media_type
        raise RegistryError(f"{where} is not a container image but {kind}", "only container images can be run")
    layers = tuple(parse_descriptor(item, f"{where}: layer") for item in _items(document, "layers", where))
    if not layers:
        raise RegistryError(f"{where} has no layers", "an image without layers has nothing to run")
    return Manifest(digest, config, layers)


def _items(document: dict[str, Any], key: str, where: str) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list):
        raise RegistryError(f"{where} has no list of {key}", _AT_FAULT)
    return value


def parse_config(document: dict[str, Any], layers: int, where: str) -> ImageConfig:
    """The config of an image with ``layers`` layers; RegistryError when types or the number of diff_ids are wrong."""
    run = document.get("config") or {}
    rootfs = document.get("rootfs") or {}
    if not isinstance(run, dict) or not isinstance(rootfs, dict):
        raise RegistryError(f"{where}: config is malformed", _AT_FAULT)
    diff_ids = _strings(rootfs.get("diff_ids"), f"{where}: diff_ids")
    if len(diff_ids) != layers:
        raise RegistryError(f"{where}: {layers} layers but {len(diff_ids)} diff_ids", _AT_FAULT)
    for diff_id in diff_ids:
        try:
            check_digest(diff_id)
        except BadReference as exc:
            raise RegistryError(f"{where}: diff_ids: {exc.message}", _AT_FAULT) from None
    labels = run.get("Labels") or {}
    return ImageConfig(
        env=tuple(item for item in _strings(run.get("Env"), f"{where}: Env") if item.find("=") > 0),
        entrypoint=_strings(run.get("Entrypoint"), f"{where}: Entrypoint"),
        cmd=_strings(run.get("Cmd"), f"{where}: Cmd"),
        working_dir=_string(run.get("WorkingDir"), f"{where}: WorkingDir"),
        user=_string(run.get("User"), f"{where}: User"),
        labels={str(k): str(v) for k, v in labels.items()} if isinstance(labels, dict) else {},
        architecture=str(document.get("architecture") or ""),
        os=str(document.get("os") or "linux"),
        diff_ids=diff_ids,
    )


def _string(value: Optional[Any], where: str) -> str:
    if value is not None and not _is_text(value):
        raise RegistryError(f"{where} is not a string", _AT_FAULT)
    return value or ""


def _strings(value: Optional[Any], where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(_is_text(item) for item in value):
        raise RegistryError(f"{where} is not a list of strings", _AT_FAULT)
    return tuple(value)


def _is_text(value: Any) -> bool:
    """Whether execve can take it: a string without NUL and without the half surrogate pairs that JSON can spell."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
