"""oci.py: the grammar of references, the choice of a platform, and what manifests and configs may not be."""

from __future__ import annotations

import json
import os
from typing import Any, Optional

import pytest

from shifterwrap import oci
from shifterwrap.errors import BadReference, Error, RegistryError
from shifterwrap.oci import Descriptor, Platform, parse_reference

SHA256 = "sha256:" + "0123456789abcdef" * 4
SHA512 = "sha512:" + "0123456789abcdef" * 8
AMD64 = Platform("linux", "amd64")
ARM64 = Platform("linux", "arm64")
WHERE = "docker://r.example/lab/app:1"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"


def is_clear(error: Error, *words: str) -> None:
    """One line that says what is wrong, with a hint."""
    assert error.hint
    for word in words:
        assert word in error.message


# ---- references


@pytest.mark.parametrize(
    ("text", "registry", "repository", "tag", "digest"),
    [
        # short names mean Docker Hub
        ("alpine", "docker.io", "library/alpine", "latest", ""),
        ("alpine:3.20", "docker.io", "library/alpine", "3.20", ""),
        ("org/app:1", "docker.io", "org/app", "1", ""),
        ("docker://alpine", "docker.io", "library/alpine", "latest", ""),
        ("docker://org/a/b/c:1", "docker.io", "org/a/b/c", "1", ""),
        ("docker.io/alpine", "docker.io", "library/alpine", "latest", ""),
        ("docker.io/library/alpine", "docker.io", "library/alpine", "latest", ""),
        ("index.docker.io/alpine", "docker.io", "library/alpine", "latest", ""),
        ("registry-1.docker.io/org/app", "docker.io", "org/app", "latest", ""),
        ("INDEX.Docker.io/alpine", "docker.io", "library/alpine", "latest", ""),
        # Shifter's spelling
        ("docker:alpine", "docker.io", "library/alpine", "latest", ""),
        ("docker:org/app:1", "docker.io", "org/app", "1", ""),
        ("docker:ghcr.io/org/app:1", "ghcr.io", "org/app", "1", ""),
        # registries: a dot, a colon or localhost makes one
        ("docker://ghcr.io/org/app:1", "ghcr.io", "org/app", "1", ""),
        ("docker://ghcr.io/app", "ghcr.io", "app", "latest", ""),
        ("docker://GHCR.io/org/app", "ghcr.io", "org/app", "latest", ""),
        ("docker://localhost/app", "localhost", "app", "latest", ""),
        ("docker://localhost:5000/app:1", "localhost:5000", "app", "1", ""),
        ("docker://host:5000/app", "host:5000", "app", "latest", ""),
        ("docker://host:65535/app", "host:65535", "app", "latest", ""),
        ("docker://127.0.0.1:5000/lab/app:1", "127.0.0.1:5000", "lab/app", "1", ""),
        ("docker://[::1]:5000/app:1", "[::1]:5000", "app", "1", ""),
        ("docker://[::1]/app", "[::1]", "app", "latest", ""),
        ("docker://[2001:DB8::1]/app", "[2001:db8::1]", "app", "latest", ""),
        ("docker://my-host.example/app", "my-host.example", "app", "latest", ""),
        ("app:1/2", "app:1", "2", "latest", ""),
        ("host/app", "docker.io", "host/app", "latest", ""),
        ("localhost:5000", "docker.io", "library/localhost", "5000", ""),
        # digests decide, tags are remembered
        (f"app@{SHA256}", "docker.io", "library/app", "", SHA256),
        (f"app:1@{SHA256}", "docker.io", "library/app", "1", SHA256),
        (f"docker://r.example:5000/a/b@{SHA512}", "r.example:5000", "a/b", "", SHA512),
        # words of repositories and tags
        ("r.example/a.b/c_d/e__f/g-h/i--j", "r.example", "a.b/c_d/e__f/g-h/i--j", "latest", ""),
        ("r.example/1/2:_x", "r.example", "1/2", "_x", ""),
        ("r.example/app:V1.0-rc_1", "r.example", "app", "V1.0-rc_1", ""),
        ("r.example/app:" + "t" * 128, "r.example", "app", "t" * 128, ""),
        ("r.example/" + "a" * 255, "r.example", "a" * 255, "latest", ""),
    ],
)
def test_references(text: str, registry: str, repository: str, tag: str, digest: str) -> None:
    reference = parse_reference(text)
    assert reference == oci.Reference("docker", registry, repository, tag, digest)
    assert reference.name == (digest or tag)
    assert parse_reference(str(reference)) == reference


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "repository"),
        ("docker://", "repository"),
        ("docker:", "repository"),
        ("docker:///app", "repository"),
        ("docker://r.example/", "repository"),
        ("docker://r.example//app", "repository"),
        ("docker://r.example/app/", "repository"),
        ("docker://r.example/lab//app", "repository"),
        ("App", "repository"),
        ("r.example/Lab/app", "repository"),
        ("r.example/lab/../app", "repository"),
        ("r.example/lab/./app", "repository"),
        ("r.example/-app", "repository"),
        ("r.example/app-", "repository"),
        ("r.example/a..b", "repository"),
        ("r.example/a___b", "repository"),
        ("r.example/a-_b", "repository"),
        ("r.example/app name", "repository"),
        ("r.example/app\tname", "repository"),
        ("r.example/app\nname", "repository"),
        ("r.example/app\n", "repository"),
        ("r.example/app\0", "repository"),
        ("r.example/app?x=1", "repository"),
        ("r.example/app#x", "repository"),
        ("r.example/%61pp", "repository"),
        ("r.example/\u0430pp", "repository"),  # a Cyrillic letter
        ("LOCALHOST/app", "repository"),
        ("r.example/" + "a" * 256, "repository"),
        ("app:", "tag"),
        ("app:-1", "tag"),
        ("app:.1", "tag"),
        ("app:1:2", "tag"),
        ("app:t\u00e4g", "tag"),
        ("app:1\n", "tag"),
        ("app:" + "t" * 129, "tag"),
        ("app@", "digest"),
        ("app:1@", "digest"),
        ("app@sha256", "digest"),
        ("app@sha256:", "digest"),
        ("app@" + SHA256[:-1], "digest"),
        ("app@" + SHA256 + "0", "digest"),
        ("app@" + SHA256.upper(), "digest"),
        ("app@sha256:" + "ABCDEF01" * 8, "digest"),
        ("app@sha256:" + "g" * 64, "digest"),
        ("app@sha256:" + "\u0661" * 64, "digest"),
        ("app@sha1:" + "0" * 40, "digest"),
        ("app@md5:" + "0" * 32, "digest"),
        ("app@sha512:" + "0" * 64, "digest"),
        ("app@sha256:../../../../etc/passwd", "digest"),
        (f"app@{SHA256}@{SHA256}", "digest"),
        ("host:/app", "registry"),
        ("host:0/app", "registry"),
        ("host:65536/app", "registry"),
        ("host:99999999999/app", "registry"),
        ("host:+80/app", "registry"),
        ("host:80x/app", "registry"),
        ("host:\u0661/app", "registry"),
        ("-host.example/app", "registry"),
        ("host-.example/app", "registry"),
        (".example/app", "local"),
        ("host..example/app", "registry"),
        ("host.example./app", "registry"),
        ("ho st.example/app", "registry"),
        ("user@host.example/app", "digest"),
        ("h\u00f6st.example/app", "registry"),
        ("docker://::1/app", "registry"),
        ("docker://[]/app", "repository"),
        ("docker://[::1]x:5000/app", "registry"),
        ("docker://[::g]:5000/app", "registry"),
        ("docker://[::1]:/app", "registry"),
        (".".join(["a" * 63] * 4) + "/app", "registry"),
        ("https://r.example/app", "no source for https://"),
        ("DOCKER://r.example/app", "no source for DOCKER://"),
        ("://app", "no source"),
        ("docker://docker://app", "registry"),
        ("./image.sif", "local image files"),
        ("/images/image.sif", "local image files"),
        ("a" * 1025, "longer than 1024 characters"),
    ],
)
def test_bad_references(text: str, word: str) -> None:
    with pytest.raises(BadReference) as info:
        parse_reference(text)
    is_clear(info.value, word)
    assert len(info.value.message) < 1400


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("app:1", "docker://r.example:5000/app:1"),
        ("lab/app", "docker://r.example:5000/lab/app:latest"),
        ("ghcr.io/lab/app", "docker://ghcr.io/lab/app:latest"),
        ("docker.io/app", "docker://docker.io/library/app:latest"),
        ("docker:app", "docker://r.example:5000/app:latest"),
    ],
)
def test_the_default_registry_of_a_site(text: str, expected: str) -> None:
    assert str(parse_reference(text, "r.example:5000")) == expected


@pytest.mark.parametrize("digest", [SHA256, SHA512])
def test_a_digest_is_itself(digest: str) -> None:
    assert oci.check_digest(digest) == digest


# ---- platforms


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("linux/amd64", AMD64),
        ("linux/amd64/v1", AMD64),
        ("linux/amd64/v3", Platform("linux", "amd64", "v3")),
        ("linux/arm64", ARM64),
        ("linux/arm64/v8", ARM64),
        ("linux/arm/v7", Platform("linux", "arm", "v7")),
    ],
)
def test_platforms(text: str, expected: Platform) -> None:
    assert oci.parse_platform(text) == expected
    assert oci.parse_platform(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "linux", "/", "linux/", "/amd64", "linux/amd64/", "a/b/c/d", "Linux/amd64", "a/b c"]
)
def test_bad_platforms(text: str) -> None:
    with pytest.raises(BadReference) as info:
        oci.parse_platform(text)
    is_clear(info.value, repr(text))


@pytest.mark.parametrize(
    ("machine", "architecture"),
    [("x86_64", "amd64"), ("aarch64", "arm64"), ("ppc64le", "ppc64le"), ("loongarch64", "loongarch64")],
)
def test_the_platform_of_this_machine(monkeypatch: pytest.MonkeyPatch, machine: str, architecture: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "n1", "6", "1", machine)))
    assert oci.host_platform() == Platform("linux", architecture)


# ---- the choice in an index


def entry(number: int, platform: Any = None) -> dict[str, Any]:
    """A descriptor whose digest says which one it is."""
    value = {"mediaType": OCI_MANIFEST, "digest": f"sha256:{number:064x}", "size": 7}
    return value if platform is None else {**value, "platform": platform}


def on(text: str) -> dict[str, str]:
    return dict(zip(("os", "architecture", "variant"), text.split("/")))


def chosen(platform: Platform, *entries: Any) -> int:
    return int(oci.choose_manifest({"manifests": list(entries)}, platform, WHERE).digest[-64:], 16)


ATTESTATION = entry(99, on("unknown/unknown"))


@pytest.mark.parametrize(
    ("wanted", "offered", "number"),
    [
        ("linux/amd64", ["linux/amd64", "linux/arm64"], 0),
        ("linux/arm64", ["linux/amd64", "linux/arm64"], 1),
        ("linux/arm64", ["linux/amd64", "linux/arm64/v8"], 1),
        ("linux/arm64/v8", ["linux/amd64", "linux/arm64"], 1),
        ("linux/amd64", ["windows/amd64", "linux/amd64"], 1),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64"], 1),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64/v1"], 1),
        ("linux/amd64", ["linux/amd64/v2"], 0),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v3"], 1),
        ("linux/arm/v7", ["linux/arm/v6", "linux/arm/v7"], 1),
        ("linux/arm", ["linux/arm/v6", "linux/arm/v7"], 0),
        ("linux/amd64", ["linux/amd64", "linux/amd64"], 0),
    ],
)
def test_choice(wanted: str, offered: list[str], number: int) -> None:
    entries = [entry(at, on(text)) for at, text in enumerate(offered)]
    assert chosen(oci.parse_platform(wanted), *entries) == number
    assert chosen(oci.parse_platform(wanted), ATTESTATION, *entries) == number


@pytest.mark.parametrize("variant", [None, "", 0])
def test_a_variant_that_is_none(variant: Optional[str]) -> None:
    assert chosen(AMD64, entry(1, on("linux/amd64/v3")), entry(2, {**on("linux/amd64"), "variant": variant})) == 2


@pytest.mark.parametrize("platform", [None, {}, "linux/amd64", []])
def test_a_single_entry_that_does_not_say(platform: Any) -> None:
    assert chosen(AMD64, ATTESTATION, entry(7, platform)) == 7


@pytest.mark.parametrize(
    ("wanted", "entries", "offered"),
    [
        ("linux/amd64", [entry(0, on("linux/arm64")), entry(1, on("linux/arm/v7"))], "linux/arm64, linux/arm/v7"),
        ("linux/amd64", [ATTESTATION], "none"),
        ("linux/amd64", [], "none"),
        ("linux/arm/v7", [entry(0, on("linux/arm/v6"))], "linux/arm/v6"),
        ("linux/amd64/v3", [entry(0, on("linux/amd64"))], "linux/amd64"),
        ("linux/amd64", [entry(0), entry(1)], ""),
        ("linux/amd64", [entry(0), entry(1, on("linux/arm64"))], "linux/arm64"),
    ],
)
def test_no_choice(wanted: str, entries: list[Any], offered: str) -> None:
    with pytest.raises(RegistryError) as info:
        chosen(oci.parse_platform(wanted), *entries)
    is_clear(info.value, WHERE, f"has no image for {wanted}")
    assert offered in info.value.hint
    assert "--platform" in info.value.hint


@pytest.mark.parametrize("value", [None, {}, "x", 7])
def test_an_index_without_a_list(value: Any) -> None:
    with pytest.raises(RegistryError) as info:
        oci.choose_manifest({"manifests": value}, AMD64, WHERE)
    is_clear(info.value, WHERE, "no list of manifests")


# ---- descriptors

ODD_SIZES: list[Any] = [-1, 1.0, "1", None, True, [], {}]
ODD_DIGESTS: list[Any] = [None, 7, "", "sha256:", "sha256:../..", SHA256.upper(), []]


def test_a_descriptor() -> None:
    assert oci.parse_descriptor(entry(1), WHERE) == Descriptor(OCI_MANIFEST, f"sha256:{1:064x}", 7)
    assert oci.parse_descriptor({"digest": SHA512, "size": 0}, WHERE) == Descriptor("", SHA512, 0)
    assert oci.parse_descriptor({"digest": SHA256, "size": 1, "mediaType": None}, WHERE).media_type == ""


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "sha256",
        {},
        {"digest": SHA256},
        {"size": 1},
        *({"digest": SHA256, "size": odd} for odd in ODD_SIZES),
        *({"digest": odd, "size": 1} for odd in ODD_DIGESTS),
    ],
)
def test_bad_descriptors(value: Any) -> None:
    with pytest.raises(RegistryError) as info:
        oci.parse_descriptor(value, f"{WHERE}: layer")
    assert type(info.value) is RegistryError
    is_clear(info.value, f"{WHERE}: layer", "digest")


# ---- JSON


@pytest.mark.parametrize(
    "body", [b"", b"{", b"<html>", b"\xff", b"{} {}", b"[" * 200_000, b'{"size": ' + b"9" * 100_000, b'{"a": NaN'],
)
def test_what_is_not_json(body: bytes) -> None:
    with pytest.raises(RegistryError) as info:
        oci.parse_json(body, "the manifest")
    is_clear(info.value, "the manifest is not JSON")


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"7", b"null", b"true"])
def test_json_that_is_not_an_object(body: bytes) -> None:
    with pytest.raises(RegistryError) as info:
        oci.parse_json(body, "the manifest")
    is_clear(info.value, "the manifest is not a JSON object")


# ---- manifests


def manifest(**changes: Any) -> dict[str, Any]:
    """A sound manifest with changes; None drops a key."""
    document = {
        "schemaVersion": 2,
        "config": {"mediaType": OCI_CONFIG, "digest": SHA256, "size": 2},
        "layers": [entry(1), entry(2)],
        **changes,
    }
    return {key: value for key, value in document.items() if value is not None}


def test_a_manifest_keeps_the_order_of_its_layers() -> None:
    parsed = oci.parse_manifest(manifest(), SHA512, WHERE)
    assert parsed.digest == SHA512
    assert parsed.config == Descriptor(OCI_CONFIG, SHA256, 2)
    assert [layer.digest for layer in parsed.layers] == [f"sha256:{1:064x}", f"sha256:{2:064x}"]


@pytest.mark.parametrize("media_type", [OCI_CONFIG, DOCKER_CONFIG, "", None])
def test_configs_of_container_images(media_type: Optional[str]) -> None:
    config = {"mediaType": media_type, "digest": SHA256, "size": 2}
    assert oci.parse_manifest(manifest(config=config), SHA256, WHERE).config.size == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"manifests": []}, ("a manifest and an index at once",)),
        ({"config": None}, ("config", "descriptor without")),
        ({"config": []}, ("config", "descriptor without")),
        ({"config": {"digest": "sha256:0", "size": 1}}, ("config", "bad digest")),
        ({"layers": None}, ("no list of layers",)),
        ({"layers": {}}, ("no list of layers",)),
        ({"layers": []}, ("has no layers",)),
        ({"layers": [entry(1), None]}, ("layer", "descriptor without")),
        ({"layers": [entry(1), {"digest": "x", "size": 1}]}, ("layer", "bad digest")),
        (
            {"config": {"mediaType": "application/vnd.sylabs.sif.config.v1+json", "digest": SHA256, "size": 1}},
            ("not a container image but application/vnd.sylabs.sif.config.v1+json",),
        ),
        (
            {
                "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": SHA256, "size": 2},
                "artifactType": "application/vnd.example.sbom",
            },
            ("not a container image but application/vnd.example.sbom",),
        ),
    ],
)
def test_bad_manifests(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(RegistryError) as info:
        oci.parse_manifest(manifest(**changes), SHA256, WHERE)
    is_clear(info.value, WHERE, *words)


# ---- configs


def config(run: Any = None, **changes: Any) -> dict[str, Any]:
    return {"rootfs": {"type": "layers", "diff_ids": [SHA256, SHA512]}, "config": run, **changes}


def test_a_whole_config() -> None:
    run = {
        "Env": ["PATH=/bin", "EMPTY=", "A=b=c"],
        "Entrypoint": ["/init"],
        "Cmd": ["sh", "-c", "d\u00e9j\u00e0"],
        "WorkingDir": "/work",
        "User": "1000:100",
        "Labels": {"a": "b"},
    }
    assert oci.parse_config(config(run, architecture="arm64", os="linux"), 2, WHERE) == oci.ImageConfig(
        env=("PATH=/bin", "EMPTY=", "A=b=c"),
        entrypoint=("/init",),
        cmd=("sh", "-c", "d\u00e9j\u00e0"),
        working_dir="/work",
        user="1000:100",
        labels={"a": "b"},
        architecture="arm64",
        os="linux",
        diff_ids=(SHA256, SHA512),
    )


@pytest.mark.parametrize(
    "run", [None, {}, {"Env": None, "Cmd": None, "Labels": None, "User": None, "WorkingDir": None}]
)
def test_a_config_that_says_nothing(run: Any) -> None:
    parsed = oci.parse_config(config(run), 2, WHERE)
    assert parsed == oci.ImageConfig((), (), (), "", "", {}, "", "linux", (SHA256, SHA512))


@pytest.mark.parametrize("item", ["", "=", "NAME", "=value", "=a=b"])
def test_variables_without_a_name_or_a_value_are_dropped(item: str) -> None:
    assert oci.parse_config(config({"Env": ["A=b", item]}), 2, WHERE).env == ("A=b",)


@pytest.mark.parametrize("labels", [[], "x", 7])
def test_odd_labels_are_no_reason_to_refuse_an_image(labels: Any) -> None:
    assert oci.parse_config(config({"Labels": labels}), 2, WHERE).labels == {}


@pytest.mark.parametrize("key", ["Env", "Entrypoint", "Cmd"])
@pytest.mark.parametrize("value", ["sh -c x", {}, 7, [7], [None], [["sh"]], ["a\0b"], [json.loads('"\\ud800"')]])
def test_lists_of_strings_that_are_none(key: str, value: Any) -> None:
    with pytest.raises(RegistryError) as info:
        oci.parse_config(config({key: value}), 2, WHERE)
    is_clear(info.value, WHERE, key, "not a list of strings")


@pytest.mark.parametrize("key", ["WorkingDir", "User"])
@pytest.mark.parametrize("value", [7, ["/"], {}, "/a\0b", json.loads('"\\udcff"')])
def test_strings_that_are_none(key: str, value: Any) -> None:
    with pytest.raises(RegistryError) as info:
        oci.parse_config(config({key: value}), 2, WHERE)
    is_clear(info.value, WHERE, key, "not a string")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": ["x"]}, ("config is malformed",)),
        ({"config": "x"}, ("config is malformed",)),
        ({"rootfs": ["x"]}, ("config is malformed",)),
        ({"rootfs": None}, ("2 layers but 0 diff_ids",)),
        ({"rootfs": {}}, ("2 layers but 0 diff_ids",)),
        ({"rootfs": {"diff_ids": [SHA256]}}, ("2 layers but 1 diff_ids",)),
        ({"rootfs": {"diff_ids": [SHA256] * 3}}, ("2 layers but 3 diff_ids",)),
        ({"rootfs": {"diff_ids": "xy"}}, ("diff_ids is not a list",)),
        ({"rootfs": {"diff_ids": [SHA256, 7]}}, ("diff_ids is not a list",)),
        ({"rootfs": {"diff_ids": [SHA256, "sha256:../x"]}}, ("diff_ids: bad digest",)),
        ({"rootfs": {"diff_ids": [SHA256, "md5:" + "0" * 32]}}, ("diff_ids: bad digest",)),
    ],
)
def test_bad_configs(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(RegistryError) as info:
        oci.parse_config(config(**changes), 2, WHERE)
    is_clear(info.value, WHERE, *words)
