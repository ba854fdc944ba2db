"""Registries, references and images that are wrong, end to end: how the commands fail, and that the cache stays whole.

Each fault is seen by ``wrapped-run`` and, as the same failure, by ``shifterwrap pull`` after it.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from tests.fakes import registry as fake
from tests.fakes.registry import OCI_LAYER, Image, Registry, assemble, error, image, status, truncated
from tests.integration import ends
from tests.integration.ends import app, configured, refused, run, unharmed
from tests.testbed.ocilayout import entry, file, tar
from tests.testbed.people import Person

pytestmark = pytest.mark.needs(*ends.NEEDS)

MANIFEST, BLOB = "/manifests/", "/blobs/"
LATER = re.compile(r" \(so process \d+ found \d+ s ago\)")  # what a failure says to those who come after it
over = threading.Event()  # set at the end of a test, for the threads that keep silent
GIB = 1 << 30


@pytest.fixture
def hub() -> Iterator[Registry]:
    over.clear()
    with Registry() as running:
        yield running
        over.set()


@pytest.fixture
def user(tester: Person) -> Person:
    return configured(tester)


def fails(user: Person, reference: str, *words: str, pull_code: int = 1) -> str:
    """Both commands refuse ``reference`` with the same words; the cache stays as it was."""
    with unharmed(user):
        said = refused(user.run(["wrapped-run", reference, "true"]), *words)
        refused(user.run(["shifterwrap", "pull", reference]), *words, code=pull_code, prog="shifterwrap")
    return said


# ---- references


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("ftp://host/app:1", ("no source for ftp://",)),
        ("./app.sif", ("local image files are not supported",)),
        ("docker://host.example/App", ("bad repository name",)),
        ("docker://host.example/../../etc", ("bad repository name",)),
        ("docker://host.example/app:", ("bad tag",)),
        ("docker://host.example/app:-x", ("bad tag",)),
        ("docker://host.example/app@sha256:12", ("bad digest",)),
        ("docker://host.example:99999/app", ("bad registry",)),
        ("docker://" + "a" * 5000, ("longer than",)),
    ],
)
def test_a_reference_that_is_none_is_refused_as_wrong_usage(
    user: Person, hub: Registry, reference: str, words: tuple[str, ...]
) -> None:
    ends.kept(user, hub)
    said = fails(user, reference, *words, pull_code=2)
    assert len(said) < 1000


def test_an_image_that_is_not_cached_is_told_by_a_code_of_its_own(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    absent = kept.replace("kept:1", "absent:1")
    with unharmed(user):
        for command in ("rm", "pin", "inspect", "verify"):
            done = user.run(["shifterwrap", command, absent])
            refused(done, absent, "not in the cache", code=3, prog="shifterwrap")
        refused(user.run(["wrapped-run", "--pull", "never", absent]), absent, "not cached", "shifterwrap pull")


# ---- answers


class Answer(NamedTuple):
    """A way in which a registry is wrong: for which requests, how, and the words that tell it."""

    pattern: str
    fault: fake.Fault
    words: tuple[str, ...]


def silent(request: fake.Request, serve: fake.Serve) -> fake.Reply:
    """No answer for as long as anybody waits for one."""
    over.wait(ends.PATIENCE_SECONDS)
    return fake.Reply(500)


def other_bytes(data: bytes) -> bytes:
    """As long, and not the same."""
    return data[:-1] + bytes([data[-1] ^ 1])


ANSWERS = {
    "401": Answer(MANIFEST, status(401, {"WWW-Authenticate": 'Basic realm="x"'}), ("wants credentials", "basic")),
    "403": Answer(MANIFEST, error(403, "DENIED", "requested access is denied"), ("HTTP 403", "access is denied")),
    "404": Answer(MANIFEST, error(404, "MANIFEST_UNKNOWN"), ("is not in registry", "spelling")),
    "404 for a blob": Answer(BLOB, error(404, "BLOB_UNKNOWN"), ("blob", "is not in registry")),
    "429": Answer(MANIFEST, status(429, {"Retry-After": "3600"}), ("no more requests", "HTTP 429")),
    "429 for a blob": Answer(BLOB, status(429), ("no more requests", "HTTP 429")),
    "500": Answer(MANIFEST, status(500), ("HTTP 500", "nothing was cached")),
    "502 for a blob": Answer(BLOB, status(502), ("HTTP 502",)),
    "503": Answer(MANIFEST, status(503), ("HTTP 503",)),
    "418": Answer(MANIFEST, status(418), ("HTTP 418", "misconfigured")),
    "a reset": Answer(MANIFEST, fake.reset(), ("Connection reset",)),
    "silence": Answer(MANIFEST, silent, ("does not answer in time",)),
    "a stalled manifest": Answer(MANIFEST, fake.stalled(10), ("does not answer in time",)),
    "a stalled blob": Answer(BLOB, fake.stalled(100), ("does not answer in time",)),
    "a truncated manifest": Answer(MANIFEST, truncated(10), ("connection", "check the network")),
    "a truncated blob": Answer(BLOB, truncated(100), ("connection", "nothing was cached")),
    "other bytes in a manifest": Answer(MANIFEST, fake.body(other_bytes), ("what was received is sha256:",)),
    "other bytes in a blob": Answer(BLOB, fake.body(other_bytes), ("the content's digest is sha256:",)),
    "a short blob": Answer(BLOB, fake.body(lambda data: data[:-1]), ("bytes", "the manifest says")),
    "a long blob": Answer(BLOB, fake.body(lambda data: data + b"x"), ("bytes", "the manifest says")),
    "an endless redirect": Answer(MANIFEST, fake.redirect("{path}"), ("more than 5 redirects",)),
    "a redirect to the inside": Answer(BLOB, fake.redirect("http://169.254.169.254/x"), ("169.254.169.254", "inside")),
    "a manifest of 1 GB": Answer(MANIFEST, fake.zeros(GIB), ("an answer of more than", "broken or hostile")),
    "a blob of 1 GB": Answer(BLOB, fake.zeros(GIB), ("bytes", "the manifest says")),
    "a page of a portal": Answer(
        MANIFEST, status(200, {"Content-Type": "text/html"}, b"<html>Log in</html>"), ("is not JSON",)
    ),
    "control characters": Answer(MANIFEST, error(400, "X", "\x1b[2Jgone\r\nwrapped-run: fine"), ("?[2Jgone",)),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_wrong_answer_is_told_and_leaves_no_trace_and_the_right_one_works(
    user: Person, hub: Registry, name: str
) -> None:
    ends.kept(user, hub)
    reference = hub.add("lab/app", "1", app())
    sent = hub.bytes_sent
    hub.fault(ANSWERS[name].pattern, ANSWERS[name].fault)
    fails(user, reference, *ANSWERS[name].words)
    assert hub.bytes_sent - sent < 100 << 20
    hub.heal()
    assert run(user, reference, "--pull", "always") == "1"
    ends.verified(user)


def test_a_registry_that_is_down_is_named_with_the_reason(user: Person, hub: Registry) -> None:
    ends.kept(user, hub)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        fails(user, f"docker://{address}/app:1", address, "Connection refused", "check the network")


def test_a_registry_without_an_address_is_called_misspelt(user: Person, hub: Registry) -> None:
    ends.kept(user, hub)
    fails(user, "docker://no-such-host.invalid/app:1", "there is no host no-such-host.invalid", "spelling")


def test_a_missing_tag_is_named_and_the_others_are_served(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    fails(user, kept[:-1] + "2", "lab/kept:2", "is not in registry", "tag")
    assert run(user, kept) == "kept"


# ---- faults that are none


def test_a_whole_blob_in_answer_to_a_range_is_as_good(user: Person, hub: Registry) -> None:
    patient = configured(user, retries=3)
    reference = hub.add("lab/app", "1", app())
    hub.fault(BLOB, truncated(1000), times=1)
    hub.fault(BLOB, fake.no_ranges)
    assert run(patient, reference) == "1"
    ends.verified(patient)


def test_a_broken_download_goes_on_where_it_broke(user: Person, hub: Registry) -> None:
    patient = configured(user, retries=3)
    reference = hub.add("lab/app", "1", app())
    hub.fault(layer(app()), truncated(100_000), times=1)
    assert run(patient, reference) == "1"
    assert [r.headers.get("range", "")[:13] for r in hub.asked("GET", layer(app()))] == ["", "bytes=100000-"]


def layer(content: Image) -> str:
    """The digest of the image's lowest layer."""
    return str(content.document["layers"][0]["digest"])


def test_a_redirect_to_another_host_is_followed_without_the_token(user: Person, hub: Registry) -> None:
    reference = hub.add("lab/app", "1", app())
    with Registry("127.0.0.2") as storage:
        storage.add("lab/app", "1", app())
        hub.require_token()
        hub.fault(BLOB, fake.redirect(f"http://{storage.address}{{path}}"))
        assert run(user, reference) == "1"
        assert storage.count("GET", BLOB) == 3
        assert [r for r in storage.requests if "authorization" in r.headers] == []
    assert [r for r in hub.asked("GET", BLOB) if "authorization" not in r.headers] == []


def test_another_host_that_serves_the_wrong_bytes_is_not_believed(user: Person, hub: Registry) -> None:
    ends.kept(user, hub)
    reference = hub.add("lab/app", "1", app())
    with Registry("127.0.0.2") as storage:
        storage.add("lab/app", "1", app())
        storage.fault(BLOB, fake.body(other_bytes))
        hub.fault(BLOB, fake.redirect(f"http://{storage.address}{{path}}"))
        fails(user, reference, "the content's digest is sha256:")


def test_a_token_that_is_refused_is_an_authentication_failure(user: Person, hub: Registry) -> None:
    ends.kept(user, hub)
    reference = hub.add("lab/app", "1", app())
    hub.require_token()
    hub.fault(MANIFEST, error(401, "UNAUTHORIZED", "no pull for you"))
    fails(user, reference, "HTTP 401", "no pull for you", "private or does not exist")
    assert hub.count("GET", "/token") > 0


def test_a_token_service_that_denies_is_an_authentication_failure(user: Person, hub: Registry) -> None:
    ends.kept(user, hub)
    reference = hub.add("lab/app", "1", app())
    hub.require_token()
    hub.fault("/token", status(403))
    fails(user, reference, "token", "HTTP 403", "private or does not exist")


# ---- images


def edited(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update(fields)


def wrong_size(document: dict[str, Any]) -> None:
    document["layers"][0]["size"] += 1


def no_diff_ids(config: dict[str, Any]) -> None:
    config["rootfs"]["diff_ids"] = []


def false_diff_ids(config: dict[str, Any]) -> None:
    config["rootfs"]["diff_ids"] = ["sha256:" + "0" * 64]


ROOT = tar([file("etc", b"x")])


def with_config(config: bytes) -> Image:
    return assemble(config, [gzip.compress(ROOT)], OCI_LAYER, None)


IMAGES: dict[str, tuple[Image, tuple[str, ...]]] = {
    "a config that is not JSON": (with_config(b"\x7fELF"), ("config is not JSON",)),
    "a config that is a list": (with_config(b"[]"), ("not a JSON object",)),
    "a config nested too deeply": (with_config(b"[" * 200_000), ("config is not JSON",)),
    "no layers": (image([]), ("has no layers",)),
    "a layer of another size": (image([ROOT], edit=wrong_size), ("the manifest says",)),
    "too few diff ids": (image([ROOT], edit_config=no_diff_ids), ("1 layers but 0 diff_ids",)),
    "false diff ids": (image([ROOT], edit_config=false_diff_ids), ("is not the one", "config names", "sha256:000")),
    "a layer that is no tar": (image([b"x" * 2048]), ("layer",)),
    "a layer that is cut off": (image([tar([file("a", b"x" * 10_000)])[:5000]]), ("layer",)),
    "a layer of damaged gzip": (
        assemble(
            json.dumps({"rootfs": {"diff_ids": ["sha256:" + "0" * 64]}}).encode(),
            [gzip.compress(ROOT)[:-12] + b"x" * 12],
            f"{OCI_LAYER}+gzip",
            None,
        ),
        ("gzip data is",),
    ),
    "an artifact": (
        image(
            [ROOT],
            edit=edited(
                config={
                    "mediaType": "application/vnd.cncf.helm.config.v1+json",
                    "size": 2,
                    "digest": fake.digest_of(b"{}"),
                }
            ),
        ),
        ("is not a container image", "helm"),
    ),
    "a media type that is longer than a record": (
        image([ROOT], edit=edited(mediaType="\N{PILE OF POO}" * 5000))._replace(media_type=fake.OCI_MANIFEST),
        ("is not a container image", "\N{PILE OF POO}"),
    ),
    "another platform": (fake.index([("linux/s390x", image([ROOT]))]), ("has no image for linux/", "linux/s390x")),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_is_wrong_is_told_and_leaves_no_trace(user: Person, hub: Registry, name: str) -> None:
    ends.kept(user, hub)
    content, words = IMAGES[name]
    fails(user, hub.add("lab/app", "1", content), *words)


def bomb() -> Image:
    """10 GB of zeros in 10 MB: a tar header, and the same gzip member over and over."""
    header = entry("zeros", size=10 * GIB).tobuf()
    block = gzip.compress(bytes(16 << 20), 9)
    blob = gzip.compress(header) + block * (10 * GIB >> 24)
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]}}
    return assemble(json.dumps(config).encode(), [blob], f"{OCI_LAYER}+gzip", None)


@pytest.mark.parametrize(
    ("settings", "limit"), [({}, "times its size"), ({"max_image_bytes": "50M"}, "52428800 bytes")]
)
def test_a_layer_bomb_is_stopped_at_the_limit(
    user: Person, hub: Registry, settings: dict[str, Any], limit: str
) -> None:
    ends.kept(user, hub)
    site = configured(user, **settings)
    fails(site, hub.add("lab/bomb", "1", bomb()), "unpacks to more than", limit, "raise the limit")


# ---- --pull


def test_never_asks_no_registry(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    asked = len(hub.requests)
    hub.add("lab/kept", "1", app("newer"))
    assert run(user, kept, "--pull", "never") == "kept"
    assert len(hub.requests) == asked


def test_always_takes_the_image_that_the_tag_moved_to_and_keeps_the_old_one(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    old = ends.visible(user.cache)
    hub.add("lab/kept", "1", app("newer"))
    assert run(user, kept) == "kept"
    assert run(user, kept, "--pull", "always") == "newer"
    assert run(user, kept) == "newer"
    assert {path for path in old if path.startswith("entries")} < set(ends.visible(user.cache))
    ends.verified(user)


def test_always_costs_one_head_where_the_tag_did_not_move(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    before = len(hub.requests)
    assert run(user, kept, "--pull", "always") == "kept"
    assert [(r.method, r.path) for r in hub.requests[before:]] == [("HEAD", "/v2/lab/kept/manifests/1")]


@pytest.mark.parametrize("name", ["500", "404", "401", "silence"])
def test_always_fails_with_the_registry_and_the_cached_image_stays(user: Person, hub: Registry, name: str) -> None:
    kept = ends.kept(user, hub)
    hub.fault(MANIFEST, ANSWERS[name].fault)
    with unharmed(user):
        refused(user.run(["wrapped-run", "--pull", "always", kept, "true"]), *ANSWERS[name].words)
        done = user.run(["shifterwrap", "pull", "--always", kept])
        refused(done, *ANSWERS[name].words, code=1, prog="shifterwrap")
    assert run(user, kept) == "kept"


# ---- herds


def herd(user: Person, reference: str, *options: str, count: int = 16) -> list[ends.DONE[str]]:
    """That many launches at once."""
    crowd = [user.popen(["wrapped-run", *options, reference], start_new_session=True) for _ in range(count)]
    return [ends.finished(one) for one in crowd]


def test_a_cold_herd_downloads_each_blob_once(user: Person, hub: Registry) -> None:
    reference = hub.add("lab/app", "1", app())
    assert [(d.returncode, d.stdout) for d in herd(user, reference)] == [(0, "1")] * 16
    paths = [request.path for request in hub.requests]
    assert len(paths) == len(set(paths)) == 1 + len(app().blobs)
    ends.verified(user)
    assert ends.unfinished(user.cache) == []


@pytest.mark.parametrize(("name", "most"), [("404", 3), ("401", 6), ("500", 3)])
def test_a_herd_shares_a_failure(user: Person, hub: Registry, name: str, most: int) -> None:
    ends.kept(user, hub)
    before = len(hub.requests)
    reference = hub.add("lab/app", "1", app())
    hub.fault(ANSWERS[name].pattern, ANSWERS[name].fault)
    with unharmed(user):
        said = {LATER.sub("", refused(done, *ANSWERS[name].words)) for done in herd(user, reference)}
    assert len(said) == 1
    assert len(hub.requests) - before <= most


def test_a_herd_that_asks_again_pulls_no_blob_of_an_unchanged_tag(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    before = len(hub.requests)
    assert [d.returncode for d in herd(user, kept, "--pull", "always")] == [0] * 16
    assert {r.method for r in hub.requests[before:]} == {"HEAD"}


def test_two_tags_of_one_image_are_converted_once(user: Person, hub: Registry) -> None:
    tags = [hub.add("lab/app", tag, app()) for tag in ("1", "2", "3")]
    crowd = [user.popen(["wrapped-run", tag]) for tag in tags]
    assert [ends.finished(one).stdout for one in crowd] == ["1"] * 3
    assert len(os.listdir(user.cache / "entries")) == 1
    assert hub.count("GET", re.escape(layer(app()))) == 1
