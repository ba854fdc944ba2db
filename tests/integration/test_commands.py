"""The subcommands of shifterwrap: what they print, for people and as JSON, what they do, and their exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shifterwrap import sitefile
from tests.integration.box import NO_TOOLS, configured, scratch
from tests.testbed.people import Person
from tests.testbed.stock import StockedRegistry

pytestmark = pytest.mark.needs("users", "registry", "userns", "fuse", "squashfuse_ll", "tar2sqfs", "mksquashfs")

NOT_CACHED, USAGE = 3, 2
LONG_AGO = 1_600_000_000


class Desk(NamedTuple):
    """A person, and two images that the registry has."""

    person: Person
    first: str
    second: str

    def admin(self, *words: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
        return self.person.run(["shifterwrap", *words], **how)

    def good(self, *words: str | Path, **how: Any) -> str:
        """The output of a command that must end well."""
        done = self.admin(*words, **how)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def data(self, *words: str | Path, **how: Any) -> Any:
        """The same, as JSON."""
        return json.loads(self.good(*words, "--json", **how))

    def refused(self, code: int, *words: str | Path, **how: Any) -> str:
        """The one line of a command that must fail."""
        done = self.admin(*words, **how)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert done.stderr.startswith("shifterwrap: ")
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    def entry(self, image: str) -> dict[str, Any]:
        (row,) = [row for row in self.data("list") if image in row["references"]]
        return dict(row)

    def age(self, image: str) -> None:
        """Have the image used long ago."""
        os.utime(Path(self.entry(image)["path"]).parent / "lock", (LONG_AGO, LONG_AGO))


@pytest.fixture
def desk(tester: Person, registry: StockedRegistry) -> Desk:
    return Desk(tester, registry.image("busybox"), registry.image("hardlinks"))


@pytest.fixture
def stocked(desk: Desk) -> Desk:
    """With both images in the cache."""
    desk.good("pull", desk.first, desk.second)
    return desk


# ---- pull and list


def test_pull_prints_what_it_got(desk: Desk) -> None:
    lines = [line.split() for line in desk.good("pull", desk.first, desk.second).splitlines()]
    assert [line[0] for line in lines] == [desk.first, desk.second]
    for _, digest, path in lines:
        assert digest.startswith("sha256:") and len(digest) == 71
        assert Path(path).is_file()


def test_pull_of_what_is_there_asks_nobody(stocked: Desk, registry: StockedRegistry) -> None:
    registry.forget()
    (row,) = stocked.data("pull", stocked.first)
    assert registry.requests() == []
    assert row["digest"] == stocked.entry(stocked.first)["digest"]


def test_pull_always_asks_once_and_fetches_nothing(stocked: Desk, registry: StockedRegistry) -> None:
    registry.forget()
    stocked.good("pull", "--always", stocked.first)
    asked = registry.requests()
    assert [request for request in asked if "/blobs/" in request.path] == []
    assert [request.method for request in asked if "/manifests/" in request.path] == ["HEAD"]


def test_pull_of_another_platform(desk: Desk, registry: StockedRegistry) -> None:
    image = registry.image("index")
    (row,) = desk.data("pull", "--platform", "linux/arm64", image)
    assert row["platform"] == "linux/arm64"
    done = desk.admin("pull", "--platform", "linux/s390x", image)
    assert (done.returncode, "has no image for linux/s390x" in done.stderr) == (1, True)


def test_pull_of_what_does_not_exist(desk: Desk, registry: StockedRegistry) -> None:
    done = desk.admin("pull", f"docker://{registry.host}/test/never:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("shifterwrap: ")
    assert desk.data("list") == []


def test_list_of_nothing(desk: Desk) -> None:
    desk.person.cache.rmdir()
    assert desk.good("list") == f"the cache {desk.person.cache} is empty\n"
    assert desk.data("list") == []
    assert not desk.person.cache.exists()


def test_list_as_a_table(stocked: Desk) -> None:
    stocked.good("pin", stocked.second)
    head, *rows = [line.split() for line in stocked.good("list").splitlines()]
    assert head[0].upper() == "REFERENCE"
    assert sorted(row[0] for row in rows) == sorted((stocked.first, stocked.second))
    assert {row[0]: "pinned" in row for row in rows} == {stocked.first: False, stocked.second: True}
    digest = stocked.entry(stocked.first)["digest"]
    assert [row[1] for row in rows if row[0] == stocked.first] == [digest[:19]]


def test_list_as_json(stocked: Desk) -> None:
    entry = stocked.entry(stocked.first)
    assert entry["kind"] == "squashfs"
    assert entry["bytes"] == Path(entry["path"]).stat().st_size
    assert (entry["pinned"], entry["in_use"], entry["references"]) == (False, False, [stocked.first])
    assert set(entry) >= {"digest", "platform", "created", "last_used", "name"}


# ---- inspect


def test_inspect(stocked: Desk) -> None:
    text = stocked.good("inspect", stocked.first)
    entry = stocked.entry(stocked.first)
    for wanted in (stocked.first, entry["digest"], entry["path"], "FOO=from-image", '["sh"]', "/srv", "layer:"):
        assert wanted in text
    (document,) = stocked.data("inspect", stocked.first)
    assert document["image"]["env"] == ["PATH=/bin", "FOO=from-image"]
    assert document["record"]["sha256"] in text
    assert len(document["layers"]) == 1


# ---- naming images

SPELLINGS = {
    "reference": lambda desk: desk.first,
    "digest": lambda desk: desk.entry(desk.first)["digest"],
    "8 digits": lambda desk: desk.entry(desk.first)["digest"][7:15],
    "sha256: and 8 digits": lambda desk: desk.entry(desk.first)["digest"][:15],
    "name": lambda desk: desk.entry(desk.first)["name"],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rm_by(stocked: Desk, spelling: str) -> None:
    path = stocked.entry(stocked.first)["path"]
    assert stocked.good("rm", SPELLINGS[spelling](stocked)).startswith(f"removed {stocked.first} (")
    assert not Path(path).parent.exists()
    assert [row["references"] for row in stocked.data("list")] == [[stocked.second]]
    assert stocked.refused(NOT_CACHED, "rm", stocked.first)


@pytest.mark.parametrize("command", ["inspect", "rm", "pin", "unpin", "verify", "export"])
def test_what_is_not_cached(desk: Desk, command: str) -> None:
    """Whether the cache is there or not."""
    words = [command, desk.second] + (["/nonexistent"] if command == "export" else [])
    assert "there is no cache" in desk.refused(NOT_CACHED, *words)
    desk.good("pull", desk.first)
    assert f"{desk.second} is not in the cache" in desk.refused(NOT_CACHED, *words)
    few = [desk.entry(desk.first)["digest"][7:14] if word == desk.second else word for word in words]
    assert desk.admin(*few).returncode in (USAGE, NOT_CACHED)


# ---- rm, pin, gc


def test_rm_all(stocked: Desk) -> None:
    assert len(stocked.good("rm", "--all").splitlines()) == 2
    assert stocked.data("list") == []
    stocked.good("pull", stocked.first)
    assert len(stocked.data("list")) == 1


def test_rm_of_what_is_in_use(stocked: Desk) -> None:
    """The rest is removed, and the exit code tells."""
    argv = ["wrapped-run", "--runtime", "embedded", stocked.first, "sh", "-c", "echo ready; exec cat"]
    process = stocked.person.popen(argv, stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    try:
        assert stocked.entry(stocked.first)["in_use"] is True
        assert "in use" in stocked.good("list")
        done = stocked.admin("rm", "--all")
        assert (done.returncode, len(done.stdout.splitlines())) == (1, 1)
        assert "is in use (wait for the jobs that use it to end)" in done.stderr
        assert [row["references"] for row in stocked.data("list")] == [[stocked.first]]
    finally:
        process.communicate()
    assert stocked.good("rm", stocked.first)


def test_pin_and_unpin(stocked: Desk) -> None:
    for image in (stocked.first, stocked.second):
        stocked.age(image)
    assert stocked.good("pin", stocked.first) == f"pinned {stocked.first}\n"
    assert stocked.entry(stocked.first)["pinned"] is True
    stocked.good("gc", "--older-than", "1")
    assert [row["references"] for row in stocked.data("list")] == [[stocked.first]]
    assert stocked.good("unpin", stocked.first) == f"unpinned {stocked.first}\n"
    assert stocked.good("unpin", stocked.first) == f"was not pinned: {stocked.first}\n"
    stocked.age(stocked.first)
    stocked.good("gc", "--older-than", "1")
    assert stocked.data("list") == []


@pytest.mark.parametrize("limit", [("--max-bytes", "1K"), ("--max-bytes", "0"), ("--older-than", "7")])
def test_gc(stocked: Desk, limit: tuple[str, str]) -> None:
    """What was used lately stays, whatever the limit is: its job may not have started yet."""
    stocked.age(stocked.first)
    entry = stocked.entry(stocked.first)
    dry = stocked.data("gc", "--dry-run", *limit)
    assert dry == {"dry_run": True, "removed": [{"name": entry["name"], "bytes": entry["bytes"]}], "reaped": 0}
    assert "would remove 1 entries" in stocked.good("gc", "--dry-run", *limit)
    assert len(stocked.data("list")) == 2
    assert stocked.good("gc", *limit).splitlines()[-1].startswith("removed 1 entries")
    assert [row["references"] for row in stocked.data("list")] == [[stocked.second]]


def test_gc_with_nothing_to_do(stocked: Desk) -> None:
    assert stocked.good("gc") == "removed 0 entries (0 B)\n"
    assert len(stocked.data("list")) == 2


def test_gc_reaps_what_dead_pulls_left(stocked: Desk) -> None:
    dead = stocked.person.cache / "stage" / "dead"
    (dead / "blobs").mkdir(parents=True)
    (dead / "blobs" / "half").write_bytes(b"x")
    (dead / "lock").touch()
    stocked.person.run(["true"])
    for path in (dead, dead / "blobs", dead / "blobs" / "half", dead / "lock"):
        os.chown(path, stocked.person.uid, stocked.person.gid)
    assert stocked.good("gc", "--dry-run") == "would remove 0 entries (0 B)\n"
    assert dead.exists()
    assert stocked.good("gc") == "removed 0 entries (0 B), 1 unfinished pulls\n"
    assert not dead.exists()


# ---- verify


def damage_squashfs(path: Path) -> None:
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(-100, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-100, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))


def cut_squashfs(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size - 1)


def damage_tree(path: Path) -> None:
    file = path / "d" / "fresh"
    file.chmod(0o644)
    file.write_bytes(b"FRESH")


def extend_tree(path: Path) -> None:
    (path / "d").chmod(0o755)
    (path / "d" / "more").touch()


@pytest.mark.parametrize("kind", ["squashfs", "tree"])
def test_verify_of_what_is_well(desk: Desk, kind: str) -> None:
    settings = configured(desk.person, NO_TOOLS) if kind == "tree" else {}
    desk.good("pull", desk.first, desk.second, env=settings)
    assert [line.split()[0] for line in desk.good("verify").splitlines()] == ["ok", "ok"]
    assert [line.split()[0] for line in desk.good("verify", desk.second).splitlines()] == ["ok"]
    assert [row["ok"] for row in desk.data("verify", "--all")] == [True, True]


@pytest.mark.parametrize(
    ("kind", "harm", "words"),
    [
        ("squashfs", damage_squashfs, "content differs from what was committed"),
        ("squashfs", cut_squashfs, "missing, or not of its recorded size"),
        ("tree", damage_tree, "content differs from what was committed"),
        ("tree", extend_tree, "content differs from what was committed"),
    ],
)
def test_verify_of_damage(desk: Desk, kind: str, harm: Any, words: str) -> None:
    settings = configured(desk.person, NO_TOOLS) if kind == "tree" else {}
    desk.good("pull", desk.first, desk.second, env=settings)
    entry = desk.entry(desk.second)
    assert entry["kind"] == kind
    harm(Path(entry["path"]))
    done = desk.admin("verify")
    assert done.returncode == 1
    bad = [line for line in done.stdout.splitlines() if line.startswith("DAMAGED")]
    assert bad == [f"DAMAGED {entry['name']} {words}"]
    assert "shifterwrap rm NAME" in done.stderr
    rows = json.loads(desk.admin("verify", "--json").stdout)
    assert [row["fault"] for row in rows if not row["ok"]] == [words]
    assert desk.good("rm", entry["name"])
    desk.good("pull", desk.second, env=settings)
    assert desk.good("verify")


# ---- export


@pytest.fixture
def out(tester: Person) -> Iterator[Path]:
    with scratch(tester.home.parent) as path:
        os.chown(path, tester.uid, tester.gid)
        yield path / "image.sqsh"


def test_export(stocked: Desk, out: Path) -> None:
    assert stocked.good("export", stocked.second, out).startswith(f"wrote {out} (")
    listing = subprocess.run(["unsquashfs", "-l", out], capture_output=True, text=True, check=True).stdout
    assert "squashfs-root/d/fresh-too" in listing.splitlines()
    before = out.read_bytes()
    assert f"{out} exists" in stocked.refused(USAGE, "export", stocked.first, out)
    assert out.read_bytes() == before
    stocked.good("export", "--force", stocked.first, out)
    assert out.read_bytes() != before
    assert os.listdir(out.parent) == [out.name]


def test_export_that_cannot_be(desk: Desk, out: Path) -> None:
    desk.good("pull", desk.first, env=configured(desk.person, NO_TOOLS))
    assert "is a directory tree" in desk.refused(1, "export", desk.first, out)
    desk.good("rm", desk.first)
    desk.good("pull", desk.first)
    assert "Permission denied" in desk.refused(1, "export", desk.first, "/usr/image.sqsh")
    assert "No such file" in desk.refused(1, "export", desk.first, "/nonexistent/image.sqsh")


# ---- config


def test_config_tells_values_and_sources(desk: Desk) -> None:
    settings = configured(desk.person, "retries: 7\nbinds: [/data]\ncache_max_bytes: 50G\n")
    path = settings["SHIFTERWRAP_CONFIG"]
    lines = desk.good("config", env=settings).splitlines()
    assert len(lines) == len(sitefile.SETTINGS)
    assert [line for line in lines if path in line] == [
        f"cache_max_bytes: 50G  # {path}", f"retries: 7  # {path}", f'binds: ["/data"]  # {path}',
    ]
    assert "connect_seconds: 10  # default" in lines
    assert desk.good("config", "retries", env=settings) == f"retries: 7  # {path}\n"
    assert desk.data("config", "retries", env=settings) == [{"key": "retries", "value": 7, "source": path}]
    assert "no setting nothing" in desk.refused(USAGE, "config", "nothing")


def test_config_drop_ins_come_later(desk: Desk) -> None:
    settings = configured(desk.person, "retries: 7\nthreads: 1\n")
    more = Path(settings["SHIFTERWRAP_CONFIG"]).parent / "conf.d"
    more.mkdir()
    (more / "10-first.yaml").write_text("retries: 8\n")
    (more / "20-last.yaml").write_text("retries: 9\n")
    (more / "30-not.txt").write_text("retries: 10\n")
    assert desk.good("config", "retries", env=settings) == f"retries: 9  # {more}/20-last.yaml\n"
    assert desk.good("config", "threads", env=settings).startswith("threads: 1  # ")


def test_config_sample_is_a_configuration_of_defaults(desk: Desk) -> None:
    sample = desk.good("config", "--sample")
    assert sample == sitefile.sample()
    active = re.sub("^#(?! )", "", sample, flags=re.MULTILINE)
    settings = configured(desk.person, active)
    assert desk.good("config", "--check", env=settings) .startswith(f"{settings['SHIFTERWRAP_CONFIG']}: ok, ")
    values = {row["key"]: row["value"] for row in desk.data("config", env=settings)}
    assert values == {row["key"]: row["value"] for row in desk.data("config")}
    assert {row["source"] for row in desk.data("config", env=settings)} == {settings["SHIFTERWRAP_CONFIG"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no_such_key: 1\n", ["unknown setting no_such_key"]),
        ("retries: many\n", ["retries", "a whole number from 0 to 100 is wanted"]),
        ("retries: [\n", ["not YAML"]),
        ("- retries\n", ["settings are KEY: VALUE lines"]),
    ],
)
def test_config_check_of_what_is_wrong(desk: Desk, text: str, words: list[str]) -> None:
    settings = configured(desk.person, text)
    done = desk.admin("config", "--check", env=settings)
    assert (done.returncode, done.stdout) == (1, "")
    for word in (settings["SHIFTERWRAP_CONFIG"], *words):
        assert word in done.stderr


def test_an_unknown_key_is_no_obstacle_to_work(desk: Desk) -> None:
    """A newer configuration meets an older node during an upgrade."""
    settings = configured(desk.person, "no_such_key: 1\nretries: 7\n")
    assert desk.good("pull", desk.first, env=settings)
    done = desk.admin("config", "retries", env=settings)
    assert (done.returncode, done.stdout.startswith("retries: 7")) == (0, True)


def test_a_bad_value_stops_everything(desk: Desk) -> None:
    settings = configured(desk.person, "retries: many\n")
    for words in (["pull", desk.first], ["list"]):
        line = desk.refused(1, *words, env=settings)
        assert f"{settings['SHIFTERWRAP_CONFIG']}: retries: a whole number" in line
    doctor = desk.admin("doctor", env=settings)
    assert (doctor.returncode, "retries: a whole number" in doctor.stderr, "ok " in doctor.stdout) == (0, True, True)
    run = desk.person.run(["wrapped-run", desk.first, "true"], env=settings)
    assert (run.returncode, "retries: a whole number" in run.stderr) == (125, True)


@pytest.mark.parametrize("words", [("config", "--check"), ("config",), ("list",)])
def test_a_configuration_that_is_not_there(desk: Desk, words: tuple[str, ...]) -> None:
    line = desk.refused(1, *words, env={"SHIFTERWRAP_CONFIG": "/nonexistent/shifterwrap.yaml"})
    assert "SHIFTERWRAP_CONFIG names no file: /nonexistent/shifterwrap.yaml" in line


# ---- doctor


@pytest.mark.parametrize("who", ["tester", "root"])
def test_doctor_on_a_machine_that_is_well(who: str, request: pytest.FixtureRequest) -> None:
    desk = Desk(request.getfixturevalue(who), "", "")
    findings = {row["subject"]: row for row in desk.data("doctor")}
    assert {row["level"] for row in findings.values()} == {"ok"}
    subjects = {
        "kernel", "user namespaces", "overlay", "mounting images", "squashfs with zstd", "squashfs with gzip",
        "squashfs writer", "Python package isal", "Python package zstandard", "runtime embedded", "cache",
    }
    assert subjects <= set(findings)
    assert str(desk.person.cache) in findings["cache"]["detail"]
    assert [line.split()[0] for line in desk.good("doctor").splitlines()] == ["ok"] * len(findings)


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        ("/usr/lib/nonexistent", "not writable"),
        ("/usr/lib/os-release", "is not a directory"),
        ("/usr", "belongs to uid 0, not to"),
        ("/sys/kernel", "belongs to uid 0, not to"),
    ],
)
def test_doctor_with_a_cache_that_cannot_be(desk: Desk, cache: str, words: str) -> None:
    done = desk.admin("doctor", env={"SHIFTERWRAP_CACHE_DIR": cache})
    assert (done.returncode, done.stderr) == (1, "")
    (finding,) = [line for line in done.stdout.splitlines() if line.startswith("fail")]
    assert words in finding
    assert "-> " in done.stdout.splitlines()[-1]


def test_doctor_of_a_full_disk(desk: Desk) -> None:
    done = desk.admin("doctor", "--json", env=configured(desk.person, "cache_min_free_bytes: 4000T\n"))
    (finding,) = [row for row in json.loads(done.stdout) if row["level"] == "fail"]
    assert (done.returncode, finding["subject"]) == (1, "cache")
    assert "free some space" in finding["hint"]


# ---- usage


@pytest.mark.parametrize(
    "words",
    [
        (), ("nothing",), ("list", "--nothing"), ("pull",), ("inspect",), ("rm",), ("rm", "--all", "x"), ("pin",),
        ("export", "x"), ("gc", "--max-bytes", "much"), ("gc", "--older-than", "long"), ("pull", "docker://"),
        ("pull", "docker://x/UPPER:1"), ("pull", "--platform", "nonsense/", "x:1"),
    ],
    ids=" ".join,
)
def test_wrong_usage(desk: Desk, words: tuple[str, ...]) -> None:
    done = desk.admin(*words)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert "shifterwrap" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version(desk: Desk, word: str) -> None:
    assert desk.good(word).startswith("usage: shifterwrap" if word == "--help" else "shifterwrap 0")


def test_errors_as_json(desk: Desk) -> None:
    done = desk.admin("inspect", "--json", desk.first)
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["id"]) == (NOT_CACHED, "NotCached")
    assert set(error) == {"id", "message", "hint"}


@pytest.mark.parametrize("words", [("config", "--sample"), ("list", "--json"), ("verify",), ("doctor",)], ids=" ".join)
def test_a_closed_pipe_is_no_bug(stocked: Desk, words: tuple[str, ...]) -> None:
    """As in `shifterwrap list | head -n 1`: the code is that of a program which SIGPIPE ended, and nothing is said."""
    reader, writer = os.pipe()
    os.close(reader)
    done = stocked.admin(*words, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_cache_of_somebody_else(stocked: Desk, other: Person) -> None:
    line = stocked._replace(person=other).refused(1, "list", env={"SHIFTERWRAP_CACHE_DIR": str(stocked.person.cache)})
    assert f"belongs to uid {stocked.person.uid}, not to {other.uid}" in line
