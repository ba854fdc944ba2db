"""The docker source against the fake registry, which misbehaves in every way we know of, and against a real one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
import urllib3

from shifterwrap import fetch, oci
from shifterwrap.errors import (
    AuthDenied,
    ConfigError,
    DigestMismatch,
    Error,
    NotFound,
    RateLimited,
    RegistryError,
    Unreachable,
    describe,
)
from shifterwrap.fetch import Settings
from shifterwrap.sources import Resolved
from shifterwrap.sources.bearer import parse_challenges
from shifterwrap.sources.docker import DockerSource
from tests.fakes import registry as fake
from tests.fakes.registry import Image, Registry, Reply, image, index
from tests.testbed.ocilayout import Image as LayoutImage
from tests.testbed.ocilayout import Layer, attestation, file, tar, write_layout
from tests.testbed.registry import Registry as RealRegistry
from tests.testbed.tokens import TokenServer
from tests.testbed.upload import upload

AMD64 = oci.Platform("linux", "amd64")
ARM64 = oci.Platform("linux", "arm64")
WALL = 1_800_000_000.0
LAYER = os.urandom(3 << 20)
SMALL = image([b"layer"], {"Cmd": ["sh"], "Env": ["A=b"]})
TWO = index([("linux/amd64", SMALL), ("linux/arm64/v8", image([b"arm"], platform="linux/arm64"))])


class Time:
    """A clock on which sleeping costs nothing, and jitter at its greatest."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.clock = fetch.Clock(lambda: self.now, lambda: WALL, self.sleep, lambda: 1.0)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "requests_ca_bundle", "curl_ca_bundle"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as server:
        yield server


@pytest.fixture
def elsewhere() -> Iterator[Registry]:
    """Another host: where registries keep their blobs."""
    with Registry("127.0.0.2") as server:
        yield server


Open = Callable[..., DockerSource]


@pytest.fixture
def source(time: Time) -> Iterator[Open]:
    """Makes sources whose waits cost nothing."""
    made: list[DockerSource] = []

    def make(reference: str, settings: Settings = fetch.DEFAULTS, insecure: Sequence[str] = ()) -> DockerSource:
        parsed = oci.parse_reference(reference)
        made.append(DockerSource(parsed, settings=settings, clock=time.clock, insecure=insecure))
        return made[-1]

    yield make
    for each in made:
        each.close()


def refused(work: Callable[[], object], kind: type[Error], *words: str, hint: str = "") -> Error:
    """The error of exactly this kind that ``work`` raises: one line with these words, a hint, and no secrets."""
    with pytest.raises(Error) as info:
        work()
    error = info.value
    assert type(error) is kind, repr(error)
    line = describe(error)
    for word in words:
        assert word in str(error), line
    assert hint in error.hint, line
    assert error.hint, line
    assert error.__cause__ is None
    assert "\n" not in line
    for secret in ("token-", "Bearer", "X-Amz", "HTTPConnectionPool", "object at 0x"):
        assert secret not in line
    return error


def blob(of: DockerSource, descriptor: oci.Descriptor, time: Optional[Time] = None) -> bytes:
    clock = (time or Time()).clock
    return b"".join(fetch.download(of.open_range, descriptor, settings=of._settings, clock=clock))


def layers(of: DockerSource, resolved: Resolved) -> list[bytes]:
    return [blob(of, descriptor) for descriptor in resolved.manifest.layers]


def large(registry: Registry) -> tuple[str, oci.Descriptor]:
    """A reference to an image of one layer of 3 MiB, and that layer."""
    content = image([LAYER], compress=False)
    layer = content.document["layers"][0]
    return registry.add("lab/app", "large", content), oci.Descriptor(layer["mediaType"], layer["digest"], layer["size"])


# ---- what works


def test_resolves_a_manifest(registry: Registry, source: Open) -> None:
    found = source(registry.add("lab/app", "1", SMALL)).resolve(AMD64)
    assert found.source_digest == found.manifest.digest == SMALL.digest
    assert found.manifest_bytes == SMALL.body
    assert fake.digest_of(found.config_bytes) == found.manifest.config.digest
    assert (found.config.cmd, found.config.env) == (("sh",), ("A=b",))
    assert [r.method for r in registry.requests] == ["GET", "GET"]


@pytest.mark.parametrize(("platform", "number"), [(AMD64, 0), (ARM64, 1)])
def test_resolves_an_index_to_one_platform(
    registry: Registry, source: Open, platform: oci.Platform, number: int
) -> None:
    found = source(registry.add("lab/app", "1", TWO)).resolve(platform)
    assert found.source_digest == TWO.digest
    assert found.manifest.digest == TWO.document["manifests"][number]["digest"]
    assert found.config.architecture == platform.architecture


def test_asks_with_every_type_and_for_no_encoding(registry: Registry, source: Open) -> None:
    source(registry.add("lab/app", "1", SMALL)).resolve(AMD64)
    for request in registry.requests:
        assert request.headers["accept-encoding"] == "identity"
        assert request.headers["user-agent"].startswith("shifterwrap/")
        assert {"authorization", "cookie"}.isdisjoint(request.headers)
    accepted = set(registry.requests[0].headers["accept"].split(", "))
    assert accepted == {fake.OCI_INDEX, fake.OCI_MANIFEST, fake.DOCKER_LIST, fake.DOCKER_MANIFEST}


def test_a_pinned_digest_never_touches_the_tag(registry: Registry, source: Open) -> None:
    registry.add("lab/app", "1", TWO)
    pinned = source(f"docker://{registry.address}/lab/app:1@{TWO.digest}")
    assert pinned.digest() == TWO.digest
    assert registry.requests == []
    assert pinned.resolve(AMD64).source_digest == TWO.digest
    assert registry.count("", "/manifests/1") == 0


def test_docker_media_types(registry: Registry, source: Open) -> None:
    def docker(document: dict[str, Any]) -> None:
        document["mediaType"] = fake.DOCKER_MANIFEST
        document["config"]["mediaType"] = fake.DOCKER_CONFIG

    def docker_list(document: dict[str, Any]) -> None:
        document["mediaType"] = fake.DOCKER_LIST

    content = index([("linux/amd64", image([b"x"], edit=docker))], docker_list)
    assert source(registry.add("lab/app", "1", content)).resolve(AMD64).source_digest == content.digest


@pytest.mark.parametrize(
    "value", [None, "", "text/plain", "application/json; charset=utf-8", "application/octet-stream"]
)
@pytest.mark.parametrize("content", [SMALL, TWO], ids=["manifest", "index"])
def test_a_vague_content_type_does_not_matter(
    registry: Registry, source: Open, content: Image, value: Optional[str]
) -> None:
    registry.fault("/manifests/", fake.headers(content_type=value))
    assert source(registry.add("lab/app", "1", content)).resolve(AMD64).source_digest == content.digest


@pytest.mark.parametrize("content", [SMALL, TWO], ids=["manifest", "index"])
def test_a_document_without_media_type(registry: Registry, source: Open, content: Image) -> None:
    document = {key: value for key, value in content.document.items() if key != "mediaType"}
    bare = content._replace(body=json.dumps(document).encode())
    assert source(registry.add("lab/app", "1", bare)).resolve(AMD64).source_digest == bare.digest


def test_three_nested_indexes_are_followed(registry: Registry, source: Open) -> None:
    content = index([("", index([("", index([("linux/amd64", SMALL)]))]))])
    found = source(registry.add("lab/app", "1", content)).resolve(AMD64)
    assert (found.source_digest, found.manifest.digest) == (content.digest, SMALL.digest)


def test_without_a_digest_header_the_body_is_hashed(registry: Registry, source: Open) -> None:
    registry.fault("/manifests/", fake.headers(docker_content_digest=None))
    assert source(registry.add("lab/app", "1", SMALL)).resolve(AMD64).source_digest == SMALL.digest


def test_a_sha512_digest_is_honoured(registry: Registry, source: Open) -> None:
    digest = fake.digest_of(SMALL.body, "sha512")
    registry.fault("/manifests/", fake.headers(docker_content_digest=digest))
    assert source(registry.add("lab/app", "1", SMALL)).resolve(AMD64).source_digest == digest


def test_layers_arrive_over_one_connection(registry: Registry, source: Open) -> None:
    content = image([LAYER, b"b", b"c"], compress=False)
    each = source(registry.add("lab/app", "1", content))
    assert layers(each, each.resolve(AMD64)) == [LAYER, b"b", b"c"]
    assert registry.connections == 1


def test_eight_threads_share_one_source_and_one_token(registry: Registry, source: Open) -> None:
    blobs = [os.urandom(400_000 + number) for number in range(8)]
    registry.require_token()
    each = source(registry.add("lab/app", "1", image(blobs, compress=False)))
    descriptors = each.resolve(AMD64).manifest.layers
    registry.expire_tokens()
    results: dict[int, bytes] = {}
    gate = threading.Barrier(8)

    def work(number: int) -> None:
        gate.wait()
        results[number] = blob(each, descriptors[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number] for number in range(8)] == blobs
    assert registry.count("GET", "^/token") == 2


# ---- the digest of a tag


def test_digest_by_head_alone(registry: Registry, source: Open) -> None:
    assert source(registry.add("lab/app", "1", TWO)).digest() == TWO.digest
    assert [r.method for r in registry.requests] == ["HEAD"]


@pytest.mark.parametrize(
    "fault",
    [
        *(fake.status(code) for code in (400, 401, 403, 404, 405)),
        fake.headers(docker_content_digest=None),
        fake.headers(docker_content_digest="sha256:nonsense"),
    ],
    ids=["400", "401", "403", "404", "405", "none", "nonsense"],
)
def test_digest_by_get_where_head_does_not_tell(registry: Registry, source: Open, fault: fake.Fault) -> None:
    registry.fault("/manifests/", fault, method="HEAD")
    assert source(registry.add("lab/app", "1", TWO)).digest() == TWO.digest
    assert registry.count("GET", "/manifests/1") == 1


def test_digest_of_nothing(registry: Registry, source: Open) -> None:
    refused(source(f"docker://{registry.address}/lab/app:1").digest, NotFound, "lab/app:1", registry.address)


def test_digest_waits_out_a_server_error(registry: Registry, source: Open, time: Time) -> None:
    registry.fault("/manifests/", fake.status(503), times=2, method="HEAD")
    assert source(registry.add("lab/app", "1", TWO)).digest() == TWO.digest
    assert time.slept == [0.5, 1.0]
    assert registry.count("GET", "") == 0


# ---- manifests and configs that are none


def edited(**changes: Any) -> Image:
    """A small image with other values in its manifest; None drops a key."""

    def edit(document: dict[str, Any]) -> None:
        document.update(changes)
        for key in [key for key, value in document.items() if value is None]:
            del document[key]

    return image([b"layer"], edit=edit)


def raw(body: bytes, media_type: str = fake.OCI_MANIFEST) -> Image:
    return Image(body, media_type)


DESCRIPTOR = fake.descriptor(fake.OCI_MANIFEST, b"x", platform={"os": "linux", "architecture": "amd64"})
HELM = "application/vnd.cncf.helm.config.v1+json"
SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(raw(b"<html>"), ("not JSON",), id="html"),
        pytest.param(raw(b""), ("not JSON",), id="empty"),
        pytest.param(raw(b"\xff\xfe"), ("not JSON",), id="not-utf8"),
        pytest.param(raw(b"[" * 100_000), ("not JSON",), id="deep"),
        pytest.param(raw(b"[]"), ("not a JSON object",), id="list"),
        pytest.param(raw(b"{}"), ("config", "descriptor"), id="nothing-in-it"),
        pytest.param(edited(layers=[]), ("has no layers",), id="no-layers"),
        pytest.param(edited(layers=None), ("no list of layers",), id="layers-missing"),
        pytest.param(edited(layers=[{"digest": "sha256:../../etc", "size": 1}]), ("bad digest",), id="path-as-digest"),
        pytest.param(edited(layers=[{"digest": fake.digest_of(b"")}]), ("layer", "size"), id="no-size"),
        pytest.param(edited(manifests=[DESCRIPTOR]), ("a manifest and an index at once",), id="ambiguous"),
        pytest.param(
            edited(manifests=[DESCRIPTOR], layers=None, mediaType=None), ("at once",), id="ambiguous-by-config"
        ),
        pytest.param(edited(mediaType=fake.OCI_INDEX), ("is called", fake.OCI_INDEX), id="manifest-called-index"),
        pytest.param(edited(schemaVersion=1), ("schema 1",), id="schema-1"),
        pytest.param(raw(b'{"fsLayers": []}', SCHEMA_1), ("schema 1",), id="schema-1-by-type"),
        pytest.param(raw(b'{"fsLayers": []}'), ("schema 1",), id="schema-1-by-fields"),
        pytest.param(edited(config=fake.descriptor(HELM, b"{}")), ("not a container image but", HELM), id="helm"),
        pytest.param(
            edited(mediaType="application/vnd.oci.artifact.manifest.v1+json"), ("oci.artifact.manifest",), id="artifact"
        ),
        pytest.param(
            edited(
                config=fake.descriptor("application/vnd.oci.empty.v1+json", b"{}"), artifactType="application/x.sbom"
            ),
            ("not a container image but application/x.sbom",),
            id="artifact-type",
        ),
        pytest.param(
            edited(config={"digest": fake.digest_of(b""), "size": oci.MAX_CONFIG_BYTES + 1}),
            ("config of 8388609 bytes",),
            id="huge-config",
        ),
        pytest.param(index([("linux/arm64", SMALL)]), ("no image for linux/amd64",), id="no-such-platform"),
        pytest.param(index([]), ("no image for linux/amd64",), id="empty-index"),
        pytest.param(
            index([("", index([("", index([("", index([("", SMALL)]))]))]))]), ("nested deeper than 3",), id="nesting"
        ),
    ],
)
def test_manifests_that_are_refused(
    registry: Registry, source: Open, content: Image, words: Sequence[str], time: Time
) -> None:
    reference = registry.add("lab/app", "1", content)
    refused(lambda: source(reference).resolve(AMD64), RegistryError, "lab/app:1", *words)
    assert time.slept == []


@pytest.mark.parametrize(
    ("content", "told"),
    [(SMALL, fake.OCI_INDEX), (SMALL, fake.DOCKER_LIST), (TWO, fake.OCI_MANIFEST), (TWO, fake.DOCKER_MANIFEST)],
)
def test_a_content_type_of_the_other_kind_is_refused(
    registry: Registry, source: Open, content: Image, told: str
) -> None:
    """CVE-2021-41190, with and without a mediaType in the document."""
    registry.fault("/manifests/1", fake.headers(content_type=told))
    reference = registry.add("lab/app", "1", content)
    refused(lambda: source(reference).resolve(AMD64), RegistryError, "is called", told)
    bare = {key: value for key, value in content.document.items() if key != "mediaType"}
    registry.add("lab/app", "1", content._replace(body=json.dumps(bare).encode()))
    refused(lambda: source(reference).resolve(AMD64), RegistryError, "is called", told)


def test_a_child_of_another_kind_than_its_index_says(registry: Registry, source: Open) -> None:
    def lie(document: dict[str, Any]) -> None:
        document["manifests"][0]["mediaType"] = fake.OCI_INDEX

    reference = registry.add("lab/app", "1", index([("linux/amd64", SMALL)], lie))
    refused(lambda: source(reference).resolve(AMD64), RegistryError, "is called", fake.OCI_INDEX)


def test_a_child_of_another_size_than_its_index_says(registry: Registry, source: Open) -> None:
    def lie(document: dict[str, Any]) -> None:
        document["manifests"][0]["size"] += 1

    reference = registry.add("lab/app", "1", index([("linux/amd64", SMALL)], lie))
    refused(lambda: source(reference).resolve(AMD64), DigestMismatch, "the index says")


def test_a_child_that_is_not_there(registry: Registry, source: Open) -> None:
    registry.fault(f"/manifests/{SMALL.digest}", fake.error(404, "MANIFEST_UNKNOWN"))
    reference = registry.add("lab/app", "1", TWO)
    refused(lambda: source(reference).resolve(AMD64), NotFound, "lab/app:1", SMALL.digest, registry.address)


def test_a_manifest_of_a_gigabyte_is_not_read(registry: Registry, source: Open) -> None:
    registry.fault("/manifests/", fake.zeros(1 << 30))
    reference = f"docker://{registry.address}/lab/app:1"
    refused(lambda: source(reference).resolve(AMD64), RegistryError, "more than 4194304 bytes", hint="hostile")
    assert registry.bytes_sent < 64 << 20  # what the kernel buffers


def test_nor_one_that_does_not_tell_its_length(registry: Registry, source: Open) -> None:
    endless = (bytes(fake.BLOCK) for _ in range(1 << 14))
    registry.fault("/manifests/", fake.instead(Reply(200, {}, endless)))
    reference = f"docker://{registry.address}/lab/app:1"
    refused(lambda: source(reference).resolve(AMD64), RegistryError, "more than 4194304 bytes")
    assert registry.bytes_sent < 64 << 20


def test_a_manifest_of_exactly_the_limit_is_read(registry: Registry, source: Open) -> None:
    padding = oci.MAX_MANIFEST_BYTES - len(SMALL.body)
    content = SMALL._replace(body=SMALL.body + b" " * padding)
    assert source(registry.add("lab/app", "1", content)).resolve(AMD64).source_digest == content.digest


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_an_altered_manifest_is_refused(registry: Registry, source: Open, pinned: bool, chunked: bool) -> None:
    registry.fault("/manifests/", fake.body(lambda body: body + b" ", chunked=chunked))
    reference = registry.add("lab/app", "" if pinned else "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), DigestMismatch, SMALL.digest, hint="alters content")


def test_a_pinned_manifest_is_checked_without_the_header_too(registry: Registry, source: Open) -> None:
    other = image([b"other"])
    honest = fake.digest_of(other.body)
    registry.fault("/manifests/", fake.instead(Reply(200, {"Docker-Content-Digest": honest}, other.body)), times=1)
    registry.fault("/manifests/", fake.instead(Reply(200, {}, other.body)))
    reference = registry.add("lab/app", "", SMALL)
    for _ in range(2):
        refused(lambda: source(reference).resolve(AMD64), DigestMismatch, SMALL.digest, honest)


def test_a_wrong_digest_header_is_refused(registry: Registry, source: Open) -> None:
    registry.fault("/manifests/", fake.headers(docker_content_digest=fake.digest_of(b"")))
    reference = registry.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), DigestMismatch, "not " + fake.digest_of(b""))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"no", ("config", "not JSON")),
        (b"[]", ("config", "not a JSON object")),
        (b"{}", ("1 layers but 0 diff_ids",)),
        (b'{"config": []  , "rootfs": 1}', ("malformed",)),
    ],
)
def test_configs_that_are_refused(registry: Registry, source: Open, config: bytes, words: Sequence[str]) -> None:
    reference = registry.add("lab/app", "1", fake.assemble(config, [b"layer"], fake.OCI_LAYER, None))
    refused(lambda: source(reference).resolve(AMD64), RegistryError, "lab/app:1", *words)


def test_an_altered_config_is_refused(registry: Registry, source: Open) -> None:
    registry.fault("/blobs/", fake.body(lambda body: body.replace(b"sh", b"rm")))
    reference = registry.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), DigestMismatch, "config", "digest")


def test_control_characters_of_a_registry_do_not_reach_the_terminal(registry: Registry, source: Open) -> None:
    registry.fault("/manifests/", fake.error(403, "DENIED", "\x1b[31mno\r\n\x07"))
    error = refused(lambda: source(f"docker://{registry.address}/lab/app:1").resolve(AMD64), AuthDenied)
    assert "\x1b" not in describe(error)


# ---- statuses and broken connections


@pytest.mark.parametrize(
    ("fault", "kind", "words", "hint"),
    [
        (fake.error(404, "MANIFEST_UNKNOWN"), NotFound, ("lab/app:1 is not in registry",), "spelling"),
        (fake.error(404, "NAME_UNKNOWN"), NotFound, ("has no repository lab/app",), "spelling"),
        (fake.status(404, body=b"<html>not here"), NotFound, ("lab/app:1 is not in registry",), "spelling"),
        (fake.error(403, "DENIED", "requested access is denied"), AuthDenied, ("403", "access is denied"), "private"),
        (fake.status(403), AuthDenied, ("403",), "private"),
        (fake.status(418), RegistryError, ("HTTP 418",), "misconfigured"),
        (fake.status(206), RegistryError, ("HTTP 206",), "misconfigured"),
        (fake.status(304), RegistryError, ("HTTP 304",), "misconfigured"),
        (fake.status(307), RegistryError, ("HTTP 307",), "misconfigured"),
    ],
)
def test_statuses_that_are_final(
    registry: Registry, source: Open, time: Time, fault: fake.Fault, kind: type[Error], words: Sequence[str], hint: str
) -> None:
    registry.fault("/manifests/", fault)
    reference = registry.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), kind, registry.address, *words, hint=hint)
    assert registry.count("", "") == 1
    assert time.slept == []


PASSING = [
    *((fake.status(code), f"HTTP {code}") for code in (408, 425, 500, 502, 503, 504)),
    (fake.reset(), "reset"),
    (fake.truncated(0), "ended after 0 of"),
    (fake.truncated(100), "ended after 100 of"),
]


@pytest.mark.parametrize(("fault", "word"), PASSING)
def test_what_passes_is_tried_again(registry: Registry, source: Open, time: Time, fault: fake.Fault, word: str) -> None:
    registry.fault("/manifests/", fault, times=3)
    assert source(registry.add("lab/app", "1", SMALL)).resolve(AMD64).source_digest == SMALL.digest
    assert time.slept == [0.5, 1, 2]


@pytest.mark.parametrize(("fault", "word"), PASSING)
def test_what_does_not_pass_is_given_up(
    registry: Registry, source: Open, time: Time, fault: fake.Fault, word: str
) -> None:
    registry.fault("/manifests/", fault)
    reference = registry.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), Unreachable, registry.address, hint="run again")
    assert time.slept == [0.5, 1, 2, 4, 8]


def test_nobody_listens(source: Open, time: Time) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        refused(
            lambda: source(f"docker://{address}/a/b:1").resolve(AMD64), Unreachable, address, "refused", hint="network"
        )
    assert len(time.slept) == 5


@pytest.mark.parametrize("after", [0, 100])
def test_a_stalled_manifest_meets_the_read_time_out(registry: Registry, source: Open, after: int) -> None:
    registry.fault("/manifests/", fake.stalled(after))
    reference = registry.add("lab/app", "1", SMALL)
    hasty = source(reference, Settings(read_seconds=0.1, retries=1))
    refused(lambda: hasty.resolve(AMD64), Unreachable, registry.address, "in time", hint="network")
    assert registry.count("GET", "/manifests/1") == 2


def test_silence_meets_the_read_time_out(source: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        hasty = source(f"docker://{address}/a/b:1", Settings(read_seconds=0.1, retries=1))
        refused(lambda: hasty.resolve(AMD64), Unreachable, address, "in time", hint="network")


def test_a_name_that_does_not_exist_is_not_tried_again(
    source: Open, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_names(monkeypatch)
    refused(
        lambda: source("docker://registry.test/a/b:1").resolve(AMD64),
        Unreachable,
        "no host registry.test",
        hint="spelling",
    )
    assert time.slept == []


def test_after_the_deadline_nothing_is_asked(registry: Registry, source: Open) -> None:
    reference = registry.add("lab/app", "1", SMALL)
    late = source(reference, Settings(deadline=999.0))
    refused(lambda: late.resolve(AMD64), Unreachable, "deadline", hint="pull_deadline")
    assert registry.requests == []


def test_a_trickling_manifest_ends_at_the_deadline(registry: Registry, source: Open, time: Time) -> None:
    def trickle() -> Iterator[bytes]:
        while True:
            time.now += 10
            yield b" "

    registry.fault("/manifests/", fake.instead(Reply(200, {}, trickle())))
    slow = source(f"docker://{registry.address}/a/b:1", Settings(deadline=2000.0))
    refused(lambda: slow.resolve(AMD64), Unreachable, "deadline", hint="pull_deadline")


# ---- 429


@pytest.mark.parametrize("value", ["7", formatdate(WALL + 7, usegmt=True)], ids=["seconds", "date"])
def test_waits_as_long_as_the_registry_asks(registry: Registry, source: Open, time: Time, value: str) -> None:
    registry.fault("/manifests/", fake.status(429, {"Retry-After": value}), times=1)
    assert source(registry.add("lab/app", "1", SMALL)).resolve(AMD64).source_digest == SMALL.digest
    assert time.slept == [7.5]


@pytest.mark.parametrize("value", ["3600", formatdate(WALL + 3600, usegmt=True)], ids=["seconds", "date"])
def test_says_when_to_come_back_when_that_is_too_far_away(
    registry: Registry, source: Open, time: Time, value: str
) -> None:
    registry.fault("/manifests/", fake.status(429, {"Retry-After": value}))
    reference = registry.add("lab/app", "1", SMALL)
    refused(
        lambda: source(reference).resolve(AMD64), RateLimited, "429", "again in 3600 s", registry.address, hint="mirror"
    )
    assert time.slept == []


@pytest.mark.parametrize("value", ["", "soon", "-5", formatdate(WALL - 99), "Mon, 99 Foo 20222 25:61:61", "9" * 400])
def test_a_429_that_does_not_say_how_long(registry: Registry, source: Open, time: Time, value: str) -> None:
    registry.fault("/manifests/", fake.status(429, {"Retry-After": value}))
    reference = registry.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), RateLimited, "429")
    assert len(time.slept) == (0 if value.startswith("9") else 5)


def test_a_429_says_why(registry: Registry, source: Open) -> None:
    registry.fault("/manifests/", fake.error(429, "TOOMANYREQUESTS", "You have reached your pull rate limit"))
    reference = registry.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), RateLimited, "You have reached your pull rate limit")


# ---- tokens


def test_an_anonymous_token_is_fetched_once(registry: Registry, source: Open) -> None:
    registry.require_token()
    each = source(registry.add("lab/app", "1", TWO))
    assert each.digest() == TWO.digest
    assert layers(each, each.resolve(AMD64))
    assert registry.count("GET", "^/token") == 1
    assert registry.asked("GET", "^/token")[0].path == (
        "/token?service=fake+registry&scope=repository%3Alab%2Fapp%3Apull"
    )


@pytest.mark.parametrize(
    "challenges",
    [
        ['Basic realm="x"', 'Bearer realm="{realm}",service="s"'],
        ['Bearer realm="{realm}"'],
        ["Bearer realm={realm},service=s,scope=repository:{repository}:pull"],
        ['Negotiate, bearer  service="a, b" , Realm = "{realm}",error="invalid_token"'],
        ['Negotiate YII=, Bearer realm="{realm}"'],
        ['BEARER realm="{realm}",scope="repository:{repository}:pull,push repository:x:pull"'],
    ],
)
def test_challenges_of_all_kinds(registry: Registry, source: Open, challenges: Sequence[str]) -> None:
    registry.require_token(*challenges)
    assert source(registry.add("lab/app", "1", SMALL)).resolve(AMD64).source_digest == SMALL.digest


def test_access_token_is_a_name_too(registry: Registry, source: Open) -> None:
    registry.require_token()
    registry.token_key = "access_token"
    assert source(registry.add("lab/app", "1", SMALL)).resolve(AMD64).source_digest == SMALL.digest


def test_another_scope_of_the_challenge_comes_first(registry: Registry, source: Open) -> None:
    registry.require_token('Bearer realm="{realm}?a=b",scope="special"')
    source(registry.add("lab/app", "1", SMALL)).resolve(AMD64)
    path = registry.asked("GET", "^/token")[0].path
    assert path == "/token?a=b&scope=special&scope=repository%3Alab%2Fapp%3Apull"


def test_a_challenge_that_only_the_root_sends(registry: Registry, source: Open) -> None:
    registry.require_token()
    registry.fault("/manifests/", fake.status(401), times=1)
    assert source(registry.add("lab/app", "1", SMALL)).resolve(AMD64).source_digest == SMALL.digest
    assert registry.count("GET", "^/v2/$") == 1


def test_a_token_that_expires_in_mid_pull(registry: Registry, source: Open) -> None:
    registry.require_token()
    reference, layer = large(registry)
    each = source(reference)
    each.resolve(AMD64)
    received: list[bytes] = []
    registry.fault("/blobs/", fake.truncated(1 << 20), times=1)
    for piece in fetch.download(each.open_range, layer, clock=Time().clock):
        if not received:
            registry.expire_tokens()
        received.append(piece)
    assert b"".join(received) == LAYER
    assert registry.count("GET", "^/token") == 2


def test_only_the_token_that_expired_is_forgotten(source: Open) -> None:
    each = source("docker://registry.example/lab/app:1")._bearer
    each._token = "new"
    each._forget("old")
    assert each._token == "new"
    each._forget("new")
    assert each._token == ""


def test_the_challenge_to_an_expired_token_is_not_followed(registry: Registry, source: Open) -> None:
    """nvcr.io names another service there, at which anonymous users cannot get in."""
    registry.require_token()
    each = source(registry.add("lab/app", "1", SMALL))
    each.digest()
    registry.expire_tokens()

    def dead_end(request: fake.Request, serve: fake.Serve) -> Reply:
        if "authorization" in request.headers:
            return Reply(401, {"WWW-Authenticate": f'Bearer realm="http://{registry.address}/dead"'})
        return serve(request)

    registry.fault("/manifests/", dead_end, times=1, method="GET")
    assert each.resolve(AMD64).source_digest == SMALL.digest
    assert registry.count("", "/dead") == 0


def test_refused_even_with_a_token(registry: Registry, source: Open, time: Time) -> None:
    registry.fault(
        "/manifests/", fake.status(401, {"WWW-Authenticate": f'Bearer realm="http://{registry.address}/token"'})
    )
    reference = registry.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), AuthDenied, "lab/app:1", "401", hint="private")
    assert registry.count("GET", "/manifests/") == 2
    assert time.slept == []


@pytest.mark.parametrize("value", ['Basic realm="x"', "Negotiate", ""])
def test_only_credentials_would_do(registry: Registry, source: Open, value: str) -> None:
    registry.fault("/v2/", fake.status(401, {"WWW-Authenticate": value} if value else {}))
    reference = registry.add("lab/app", "1", SMALL)
    offered = value.partition(" ")[0].lower() or "nothing"
    refused(lambda: source(reference).resolve(AMD64), AuthDenied, "wants credentials", offered, hint="public")


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (fake.status(401), AuthDenied, ("token", "401")),
        (fake.error(403, "DENIED", "no anonymous users"), AuthDenied, ("token", "403", "no anonymous users")),
        (fake.status(404), RegistryError, ("token", "no token service")),
        (fake.status(400), RegistryError, ("token", "400")),
        (fake.status(500), Unreachable, ("token", "500")),
        (fake.status(429, {"Retry-After": "9999"}), RateLimited, ("token", "9999")),
        (fake.status(200, body=b"hello"), RegistryError, ("token", "not JSON")),
        (fake.status(200, body=b"{}"), RegistryError, ("token", "sends none")),
        (fake.status(200, body=b'{"token": 7}'), RegistryError, ("sends none",)),
        (fake.status(200, body=b'{"token": "a\\r\\nX-Evil: 1"}'), RegistryError, ("sends none",)),
        (fake.zeros(1 << 30), RegistryError, ("token", "more than 65536 bytes")),
        (fake.redirect("/token"), RegistryError, ("redirects",)),
        (fake.reset(), Unreachable, ("127.0.0.1", "reset")),
    ],
)
def test_token_services_that_fail(
    registry: Registry, source: Open, fault: fake.Fault, kind: type[Error], words: Sequence[str]
) -> None:
    registry.require_token()
    registry.fault("^/token", fault)
    reference = registry.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), kind, *words)
    assert registry.bytes_sent < 64 << 20


# ---- realms (CVE-2019-10214)


@pytest.mark.parametrize(
    ("realm", "words"),
    [
        ("http://auth.example/token", ("without TLS", "auth.example")),
        ("ftp://auth.example/token", ("usable address",)),
        ("/token", ("usable address",)),
        ("https://", ("usable address",)),
        ("https://[::1/token", ("usable address",)),
        ("https://auth.example:99999/token", ("usable address",)),
        ("https://user:secret@auth.example/token", ("usable address",)),
        ("https://169.254.169.254/latest/meta-data", ("inside", "169.254.169.254")),
        ("https://10.1.2.3/token", ("inside", "10.1.2.3")),
        ("https://192.168.1.1/token", ("inside",)),
        ("https://127.0.0.1/token", ("inside",)),
        ("https://127.1/token", ("inside",)),
        ("https://2852039166/token", ("inside",)),
        ("https://localhost/token", ("inside", "localhost")),
        ("https://[::1]/token", ("inside",)),
        ("https://[fe80::1]/token", ("inside",)),
        ("https://[::ffff:169.254.169.254]/token", ("inside",)),
    ],
)
def test_token_services_that_are_not_asked(source: Open, realm: str, words: Sequence[str]) -> None:
    each = source("docker://registry.example/lab/app:1")
    error = refused(lambda: each._bearer._fetch_token({"realm": realm}), RegistryError, "registry.example", *words)
    assert "secret" not in describe(error)


@pytest.mark.parametrize(
    ("reference", "realm"),
    [
        ("docker://registry.example/a/b", "https://auth.example/token"),
        ("docker://registry.example/a/b", "https://1.1.1.1/token"),
        ("docker://10.1.2.3/a/b", "https://10.1.2.3:8443/token"),
        ("docker://127.0.0.1:5000/a/b", "http://127.0.0.1:5001/token"),
        ("docker://localhost:5000/a/b", "http://127.0.0.1:5001/token"),
        ("docker://localhost:5000/a/b", "http://auth.example/token"),
    ],
)
def test_token_services_that_are_asked(source: Open, reference: str, realm: str) -> None:
    assert source(reference)._bearer._checked_realm(realm) == realm


# ---- parse_challenges


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", []),
        (" , ,", []),
        ("Basic", [("basic", {})]),
        ("Negotiate abc==", [("negotiate", {"abc": "="})]),
        ('Bearer realm="https://a/t",service="b"', [("bearer", {"realm": "https://a/t", "service": "b"})]),
        ("Bearer realm=https://a/t?x,scope=r:a:pull", [("bearer", {"realm": "https://a/t?x", "scope": "r:a:pull"})]),
        ('Bearer realm="a, b=c", x=y', [("bearer", {"realm": "a, b=c", "x": "y"})]),
        (r'Bearer realm="a\"b\\c"', [("bearer", {"realm": 'a"b\\c'})]),
        ('Basic realm="a", Bearer realm="b"', [("basic", {"realm": "a"}), ("bearer", {"realm": "b"})]),
        ('Basic realm="a",Bearer realm="b",x="1"', [("basic", {"realm": "a"}), ("bearer", {"realm": "b", "x": "1"})]),
        ("Negotiate,Bearer realm=b", [("negotiate", {}), ("bearer", {"realm": "b"})]),
        ('Bearer realm="a",realm="b"', [("bearer", {"realm": "a"})]),
        ("Bearer REALM = \"a\"", [("bearer", {"realm": "a"})]),
        ('Bearer realm="never closed', [("bearer", {"realm": ""}), ("closed", {})]),
        ("realm=a", []),
    ],
)
def test_parse_challenges(header: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(header)[: len(expected) or None] == expected or header.endswith("closed")


@pytest.mark.parametrize("unit", [",", '"', "\\", '"\\', "a=", "a ", " ", "=", 'a="'])
def test_parse_challenges_takes_linear_time(unit: str) -> None:
    parse_challenges("Bearer " + unit * (32 << 10))


# ---- redirects


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_blobs_from_elsewhere_and_the_token_stays_here(
    registry: Registry, elsewhere: Registry, source: Open, code: int
) -> None:
    registry.require_token()
    reference, layer = large(registry)
    large(elsewhere)
    registry.fault("/blobs/", fake.redirect(f"http://{elsewhere.address}{{path}}?X-Amz-Signature=s", code))
    elsewhere.fault("/blobs/", fake.truncated(1 << 20), times=2)
    each = source(reference)
    each._bearer._token = registry.token
    assert blob(each, layer) == LAYER
    assert [r.headers.get("range") for r in elsewhere.requests] == [
        None,
        f"bytes={1 << 20}-{len(LAYER) - 1}",
        f"bytes={2 << 20}-{len(LAYER) - 1}",
    ]
    assert all("authorization" not in r.headers for r in elsewhere.requests)
    assert all(r.headers["authorization"] == "Bearer " + registry.token for r in registry.requests)


def test_the_token_does_not_go_to_another_port(registry: Registry, source: Open) -> None:
    with Registry() as neighbour:
        reference = registry.add("lab/app", "1", SMALL)
        neighbour.add("lab/app", "1", SMALL)
        registry.fault("/blobs/", fake.redirect(f"http://{neighbour.address}{{path}}"))
        registry.require_token()
        source(reference).resolve(AMD64)
        assert neighbour.requests
        assert all("authorization" not in r.headers for r in neighbour.requests)


def test_the_token_does_not_come_back_from_a_detour(registry: Registry, elsewhere: Registry, source: Open) -> None:
    reference = registry.add("lab/app", "1", SMALL)
    registry.fault("/blobs/", fake.redirect(f"http://{elsewhere.address}/detour"))
    elsewhere.fault("/detour", fake.redirect(f"http://{registry.address}/v2/chosen/elsewhere"))
    registry.require_token()
    refused(lambda: source(reference).resolve(AMD64), AuthDenied, "401")
    assert all("authorization" not in r.headers for r in registry.asked("GET", "/chosen/elsewhere"))


def test_relative_redirects_keep_the_token(registry: Registry, source: Open) -> None:
    reference = registry.add("lab/app", "1", SMALL)
    registry.require_token()
    registry.fault("/v2/lab/app/manifests/1", fake.redirect(f"../manifests/{SMALL.digest}"), times=2)
    assert source(reference).resolve(AMD64).source_digest == SMALL.digest


def test_a_redirect_loop_ends(registry: Registry, source: Open, time: Time) -> None:
    registry.fault("/manifests/", fake.redirect("{path}"))
    reference = registry.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), RegistryError, "more than 5 redirects", hint="misconfigured")
    assert registry.count("", "") == 6
    assert time.slept == []


@pytest.mark.parametrize(
    ("location", "word"),
    [
        ("ftp://mirror.example/x", "without TLS"),
        ("file:///etc/passwd", "without TLS"),
        ("http://user:secret@127.0.0.2/x", "without TLS"),
        ("http://[::1", "malformed"),
        ("http://127.0.0.2:99999/", "malformed"),
        ("http://169.254.169.254/latest/meta-data", "inside"),
        ("http://2852039166/latest", "inside"),
        ("http://[fe80::1]/", "inside"),
        ("http://[::ffff:169.254.169.254]/", "inside"),
    ],
)
def test_redirects_that_are_not_followed(registry: Registry, source: Open, location: str, word: str) -> None:
    registry.fault("/manifests/", fake.redirect(location))
    reference = registry.add("lab/app", "1", SMALL)
    error = refused(lambda: source(reference).resolve(AMD64), RegistryError, registry.address, word)
    assert "secret" not in describe(error)


def test_the_body_of_a_redirect_is_not_read(registry: Registry, source: Open) -> None:
    zeros = (bytes(fake.BLOCK) for _ in range(1 << 14))
    there = {"Location": f"/v2/lab/app/manifests/{SMALL.digest}"}
    registry.fault("/manifests/1", fake.instead(Reply(307, there, zeros, length=1 << 30)))
    assert source(registry.add("lab/app", "1", SMALL)).resolve(AMD64).source_digest == SMALL.digest
    assert registry.bytes_sent < 64 << 20


def test_an_expired_link_is_renewed(registry: Registry, elsewhere: Registry, source: Open, time: Time) -> None:
    reference, layer = large(registry)
    large(elsewhere)
    registry.fault("/blobs/", fake.redirect(f"http://{elsewhere.address}{{path}}?X-Amz-Signature=s"))
    elsewhere.fault("/blobs/", fake.truncated(2 << 20), times=1)
    elsewhere.fault("/blobs/", fake.status(403, body=b"<Error>Request has expired X-Amz-Signature</Error>"), times=1)
    assert blob(source(reference), layer, time) == LAYER
    assert registry.count("GET", "/blobs/") == 3


@pytest.mark.parametrize("code", [401, 403])
def test_storage_that_refuses_for_ever(registry: Registry, elsewhere: Registry, source: Open, code: int) -> None:
    reference, layer = large(registry)
    registry.fault("/blobs/", fake.redirect(f"http://{elsewhere.address}{{path}}?X-Amz-Signature=s"))
    elsewhere.fault(
        "/blobs/", fake.status(code, {"WWW-Authenticate": f'Bearer realm="http://{registry.address}/token"'})
    )
    refused(lambda: blob(source(reference), layer), AuthDenied, elsewhere.address, str(code), hint="expired")
    assert registry.count("", "^/token") == 0


def test_storage_that_is_down_is_named(registry: Registry, source: Open) -> None:
    reference, layer = large(registry)
    with socket.socket() as unused:
        unused.bind(("127.0.0.2", 0))
        address = f"127.0.0.2:{unused.getsockname()[1]}"
        registry.fault("/blobs/", fake.redirect(f"http://{address}/x?X-Amz-Signature=s"))
        refused(lambda: blob(source(reference), layer), Unreachable, address, "refused")


# ---- blobs


def test_a_blob_that_breaks_off_is_resumed_with_a_closed_range(registry: Registry, source: Open, time: Time) -> None:
    reference, layer = large(registry)
    registry.fault("/blobs/", fake.truncated(1_000_000), times=2)
    assert blob(source(reference), layer, time) == LAYER
    asked = [r.headers.get("range") for r in registry.asked("GET", "/blobs/")]
    assert asked == [None, f"bytes=1000000-{len(LAYER) - 1}", f"bytes=2000000-{len(LAYER) - 1}"]


@pytest.mark.parametrize(
    "fault",
    [
        fake.no_ranges,
        fake.if_ranged(fake.status(416, {"Content-Range": "bytes */1"})),
        fake.if_ranged(fake.status(400)),
        fake.if_ranged(fake.headers(content_range=None)),
        fake.if_ranged(fake.headers(content_range=f"bytes 0-{len(LAYER) - 1}/{len(LAYER)}")),
        fake.if_ranged(fake.headers(content_range=f"bytes 7-{len(LAYER) - 1}/{len(LAYER)}")),
        fake.if_ranged(fake.headers(content_range="nonsense")),
    ],
    ids=["200", "416", "400", "none", "from-0", "from-7", "nonsense"],
)
def test_registries_without_sound_ranges(registry: Registry, source: Open, fault: fake.Fault) -> None:
    reference, layer = large(registry)
    registry.fault("/blobs/", fake.truncated(1_000_000), times=1)
    registry.fault("/blobs/", fault)
    assert blob(source(reference), layer) == LAYER


@pytest.mark.parametrize("size", [len(LAYER) - 1, len(LAYER) + 1])
def test_a_range_of_a_blob_of_another_size(registry: Registry, source: Open, size: int) -> None:
    reference, layer = large(registry)
    registry.fault("/blobs/", fake.truncated(1_000_000), times=1)
    registry.fault("/blobs/", fake.headers(content_range=f"bytes 1000000-{size - 1}/{size}"))
    refused(lambda: blob(source(reference), layer), DigestMismatch, str(size), str(len(LAYER)), hint="alters")


def test_a_range_whose_total_is_not_told(registry: Registry, source: Open) -> None:
    reference, layer = large(registry)
    registry.fault("/blobs/", fake.truncated(1_000_000), times=1)
    registry.fault("/blobs/", fake.headers(content_range=f"bytes 1000000-{len(LAYER) - 1}/*"))
    assert blob(source(reference), layer) == LAYER


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "digest"),
        (lambda data: data + b"x", "bytes"),
        (lambda data: b"<html>login</html>", ""),
    ],
    ids=["altered", "longer", "other"],
)
def test_blobs_that_are_not_what_their_digest_says(
    registry: Registry, source: Open, edit: Callable[[bytes], bytes], word: str, chunked: bool
) -> None:
    reference, layer = large(registry)
    registry.fault("/blobs/", fake.body(edit, chunked=chunked))
    kind = Unreachable if chunked and not word else DigestMismatch
    refused(lambda: blob(source(reference), layer), kind, layer.digest[:19], word)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity"])
def test_content_encoding_does_not_change_the_bytes(registry: Registry, source: Open, encoding: str) -> None:
    """Storage that labels .tar.gz objects as gzip-encoded must not have them unpacked on the way."""
    content = image([b"layer" * 1000])
    registry.fault("/blobs/", fake.headers(content_encoding=encoding))
    each = source(registry.add("lab/app", "1", content))
    found = each.resolve(AMD64)
    assert layers(each, found) == [content.blobs[found.manifest.layers[0].digest]]


def test_a_stalled_blob_is_resumed(registry: Registry, source: Open) -> None:
    reference, layer = large(registry)
    registry.fault("/blobs/", fake.stalled(1_000_000), times=1)
    assert blob(source(reference, Settings(read_seconds=0.2)), layer) == LAYER
    resumed = int(registry.asked("GET", "/blobs/")[1].headers["range"][len("bytes=") :].partition("-")[0])
    lost = 0 if hasattr(urllib3.HTTPResponse, "read1") else fetch.CHUNK_BYTES  # what urllib3 1 has of a piece
    assert 1_000_000 - lost <= resumed <= 1_000_000


@pytest.mark.parametrize("fault", [fake.status(500), fake.status(502), fake.status(503), fake.reset()])
def test_server_errors_on_blobs_pass(registry: Registry, source: Open, time: Time, fault: fake.Fault) -> None:
    reference, layer = large(registry)
    registry.fault("/blobs/", fault, times=3)
    assert blob(source(reference), layer, time) == LAYER
    assert time.slept == [0.5, 1, 2]


def test_a_blob_that_is_not_there(registry: Registry, source: Open) -> None:
    reference = registry.add("lab/app", "1", SMALL)
    missing = oci.Descriptor(fake.OCI_LAYER, fake.digest_of(b"?"), 1)
    refused(lambda: blob(source(reference), missing), NotFound, missing.digest, registry.address)


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    ],
)
def test_foreign_layers(registry: Registry, source: Open, media_type: str) -> None:
    reference = registry.add("lab/app", "1", SMALL)
    missing = oci.Descriptor(media_type, fake.digest_of(b"?"), 1)
    refused(lambda: blob(source(reference), missing), RegistryError, "not distributed", hint="not supported")


# ---- the environment


def test_netrc_is_not_read(registry: Registry, source: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    registry.require_token()
    source(registry.add("lab/app", "1", SMALL)).resolve(AMD64)
    assert all("Basic" not in r.headers.get("authorization", "") for r in registry.requests)


def test_loopback_is_never_reached_through_a_proxy(
    registry: Registry, elsewhere: Registry, source: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{elsewhere.address}")
    monkeypatch.setenv("all_proxy", f"http://{elsewhere.address}")
    source(registry.add("lab/app", "1", SMALL)).resolve(AMD64)
    assert elsewhere.requests == []


def test_proxies_of_the_environment_are_used(registry: Registry, source: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    known_names(monkeypatch)
    registry.name = "registry.test"
    monkeypatch.setenv("http_proxy", f"http://{registry.address}")
    source(registry.add("lab/app", "1", SMALL), insecure=["registry.test"]).resolve(AMD64)
    assert registry.asked("GET", "^http://registry.test/v2/lab/app/manifests/1$")


def test_a_proxy_that_is_down(source: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{unused.getsockname()[1]}")
        each = source("docker://registry.test/a/b:1")
        refused(lambda: each.resolve(AMD64), Unreachable, "registry.test", "proxy", hint="HTTPS_PROXY")


def test_cookies_are_not_kept(registry: Registry, source: Open) -> None:
    registry.fault("/v2/", fake.headers(set_cookie="id=1; Path=/"))
    source(registry.add("lab/app", "1", SMALL)).resolve(AMD64)
    assert all("cookie" not in r.headers for r in registry.requests)


# ---- TLS


class Tls(NamedTuple):
    """A key and a certificate for registry.test that only those trust who are told to."""

    context: ssl.SSLContext
    certificate: str


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", "/CN=registry.test",
         "-addext", "subjectAltName=DNS:registry.test,DNS:storage.test"],
        check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return Tls(context, certificate)


def known_names(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Names that lead to this machine; other names that are not addresses do not exist."""
    lookup = socket.getaddrinfo

    def patched(host: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(host, str) and not host[:1].isdigit() and host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return lookup("127.0.0.1" if host in names else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", patched)


@pytest.fixture
def secure(tls: Tls, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """registry.test, with TLS, trusted."""
    known_names(monkeypatch, "registry.test", "storage.test", "other.test")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", tls.certificate)
    with Registry(tls=tls.context) as server:
        server.name = f"registry.test:{server.address.rpartition(':')[2]}"
        yield server


def test_pulls_over_tls(secure: Registry, source: Open) -> None:
    secure.require_token()
    each = source(secure.add("lab/app", "1", TWO))
    assert layers(each, each.resolve(AMD64))


def test_an_unknown_certificate_is_refused_at_once(
    secure: Registry, source: Open, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    reference = secure.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), Unreachable, secure.name, "certificate", hint="CA")
    assert time.slept == []
    assert secure.requests == []


def test_a_certificate_for_another_name_is_refused(secure: Registry, source: Open) -> None:
    secure.name = secure.name.replace("registry", "other")
    reference = secure.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), Unreachable, "other.test", "certificate is not valid", hint="CA")


def test_a_bundle_that_is_not_there(secure: Registry, source: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent/ca.pem")
    reference = secure.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), ConfigError, "REQUESTS_CA_BUNDLE", "/nonexistent/ca.pem")


def test_plain_http_is_not_spoken_to_strangers(
    registry: Registry, source: Open, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_names(monkeypatch, "registry.test")
    registry.name = f"registry.test:{registry.address.rpartition(':')[2]}"
    reference = registry.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), Unreachable, "does not speak TLS", hint="insecure")
    assert registry.requests == []
    assert time.slept == []


@pytest.mark.parametrize("port", [True, False], ids=["host:port", "host"])
def test_insecure_registries_are_spoken_to_in_plain_http(
    registry: Registry, source: Open, monkeypatch: pytest.MonkeyPatch, port: bool
) -> None:
    known_names(monkeypatch, "registry.test")
    registry.name = f"registry.test:{registry.address.rpartition(':')[2]}"
    registry.require_token()
    reference = registry.add("lab/app", "1", SMALL)
    marked = registry.name if port else "registry.test"
    assert source(reference, insecure=[marked]).resolve(AMD64).source_digest == SMALL.digest


def test_insecure_registries_are_spoken_to_with_tls_if_they_can(secure: Registry, source: Open) -> None:
    reference = secure.add("lab/app", "1", SMALL)
    assert source(reference, insecure=[secure.name]).resolve(AMD64).source_digest == SMALL.digest


def test_a_bad_certificate_is_no_reason_for_plain_http(
    secure: Registry, source: Open, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    reference = secure.add("lab/app", "1", SMALL)
    each = source(reference, insecure=[secure.name])
    refused(lambda: each.resolve(AMD64), Unreachable, secure.name, "certificate", hint="CA")
    assert time.slept == []


def test_an_insecure_registry_that_is_down_is_tried_again(
    source: Open, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_names(monkeypatch, "registry.test")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        name = f"registry.test:{unused.getsockname()[1]}"
        each = source(f"docker://{name}/a/b:1", insecure=[name])
        refused(lambda: each.resolve(AMD64), Unreachable, name, "refused")
    assert len(time.slept) == 5


def test_tls_is_not_left_by_a_redirect(secure: Registry, elsewhere: Registry, source: Open) -> None:
    secure.fault("/blobs/", fake.redirect(f"http://{elsewhere.address}{{path}}?X-Amz-Signature=s"))
    reference = secure.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), RegistryError, secure.name, "without TLS")
    assert elsewhere.requests == []


def test_nor_by_a_token_service(secure: Registry, elsewhere: Registry, source: Open) -> None:
    secure.require_token(f'Bearer realm="http://{elsewhere.address}/token"')
    reference = secure.add("lab/app", "1", SMALL)
    refused(lambda: source(reference).resolve(AMD64), RegistryError, secure.name, "without TLS")
    assert elsewhere.requests == []


def test_storage_with_tls_at_another_name(secure: Registry, source: Open, tls: Tls) -> None:
    with Registry(tls=tls.context) as storage:
        port = storage.address.rpartition(":")[2]
        reference = secure.add("lab/app", "1", SMALL)
        storage.add("lab/app", "1", SMALL)
        secure.require_token()
        secure.fault("/blobs/", fake.redirect(f"https://storage.test:{port}{{path}}"))
        each = source(reference)
        assert layers(each, each.resolve(AMD64))
        assert storage.requests
        assert all("authorization" not in r.headers for r in storage.requests)


# ---- a real registry


def stock(real: RealRegistry, folder: Path) -> tuple[str, str, bytes]:
    """Push an index of two platforms and an attestation; its reference, its digest and its amd64 layer."""
    layer = tar([file("data", LAYER)])
    plain, arm = Layer(layer, "none"), Layer(tar([file("arm", b"arm")]))
    images = [LayoutImage([plain, arm]), LayoutImage([arm], platform="linux/arm64"), attestation()]
    digest = write_layout(folder / "layout", images)
    return upload(real.host, folder / "layout", "test/app:1"), digest, layer


@pytest.fixture
def real(tmp_path: Path) -> Iterator[RealRegistry]:
    with RealRegistry(tmp_path / "data") as running:
        yield running


@pytest.mark.needs("registry")
def test_pulls_from_a_real_registry(real: RealRegistry, source: Open, tmp_path: Path) -> None:
    reference, digest, layer = stock(real, tmp_path)
    each = source(reference)
    assert each.digest() == digest
    found = each.resolve(AMD64)
    assert found.source_digest == digest
    assert fake.digest_of(found.manifest_bytes) == found.manifest.digest
    assert layers(each, found)[0] == layer
    assert each.resolve(ARM64).config.architecture == "arm64"
    pinned = source(f"{reference}@{found.manifest.digest}").resolve(AMD64)
    assert pinned.source_digest == pinned.manifest.digest == found.manifest.digest


@pytest.mark.needs("registry")
def test_resumes_at_a_real_registry(real: RealRegistry, source: Open, tmp_path: Path) -> None:
    reference, _, layer = stock(real, tmp_path)
    each = source(reference)
    body = each.open_range(each.resolve(AMD64).manifest.layers[0], 1_234_567)
    assert (body.start, body.total) == (1_234_567, len(layer))
    received = b"".join(iter(body.read, b""))
    body.close()
    assert received == layer[1_234_567:]


@pytest.mark.needs("registry")
@pytest.mark.parametrize("name", ["test/app:2", "test/other:1", f"test/app@{SMALL.digest}"])
def test_what_a_real_registry_does_not_have(real: RealRegistry, source: Open, tmp_path: Path, name: str) -> None:
    stock(real, tmp_path)
    reference = f"docker://{real.host}/{name}"
    refused(lambda: source(reference).resolve(AMD64), NotFound, reference, real.host, hint="spelling")


@pytest.mark.needs("registry")
def test_a_real_registry_that_wants_tokens(source: Open, tmp_path: Path) -> None:
    """It checks their signatures, and the service and scope that we asked for."""
    with RealRegistry(tmp_path / "data") as real:
        _, digest, layer = stock(real, tmp_path)
    with TokenServer(tmp_path / "tokens", {}) as tokens, RealRegistry(tmp_path / "data", tokens=tokens) as real:
        each = source(f"docker://{real.host}/test/app:1")
        found = each.resolve(AMD64)
        assert found.source_digest == digest
        assert layers(each, found)[0] == layer
        assert [request.scopes for request in tokens.requests] == [("repository:test/app:pull",)]
        private = source(f"docker://{real.host}/private/app:1")
        refused(lambda: private.resolve(AMD64), AuthDenied, real.host, "401", hint="private")


@pytest.mark.needs("registry")
def test_a_real_registry_that_wants_a_password(source: Open, tmp_path: Path) -> None:
    with RealRegistry(tmp_path / "data", users={"somebody": "secret"}) as real:
        each = source(f"docker://{real.host}/test/app:1")
        refused(lambda: each.resolve(AMD64), AuthDenied, real.host, "basic", hint="public")
