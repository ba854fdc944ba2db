"""Caches that are damaged, foreign, read-only or in the wrong place, end to end: what is refused stays untouched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.registry import Registry
from tests.integration import ends
from tests.integration.ends import app, configured, refused, run, unharmed
from tests.testbed.people import Person
from tests.testbed.stock import StockedRegistry

pytestmark = pytest.mark.needs(*ends.NEEDS)

MINE = "set SHIFTERWRAP_CACHE_DIR to a directory of yours"


@pytest.fixture
def hub() -> Iterator[Registry]:
    with Registry() as running:
        yield running


@pytest.fixture
def user(tester: Person) -> Person:
    return configured(tester)


def at(person: Person, cache: Path) -> Person:
    """This person with another cache."""
    return person._replace(cache=cache, env={**person.env, "SHIFTERWRAP_CACHE_DIR": str(cache)})


def everything(top: Path) -> dict[str, tuple[int, int, int, str]]:
    """Every name below ``top``, and ``top``, with mode, owner, time of change and content."""
    found = {}
    for base, directories, files in os.walk(top):
        for name in [".", *directories, *files]:
            path = Path(base, name)
            info = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path)] = (info.st_mode, info.st_uid, info.st_mtime_ns, content)
    return found


@contextlib.contextmanager
def untouched(top: Path) -> Iterator[None]:
    before = everything(top)
    yield
    assert everything(top) == before


def entry_of(person: Person) -> Path:
    """The directory of the only entry."""
    (entry,) = (person.cache / "entries").iterdir()
    return entry


def ref_of(person: Person) -> Path:
    """The file of the only ref."""
    (ref,) = (person.cache / "refs").rglob("*.json")
    return ref


def no_use(person: Person, hub: Registry, *words: str) -> None:
    """Neither command works with this cache, and both say the same."""
    reference = hub.add("lab/app", "1", app())
    refused(person.run(["wrapped-run", reference]), *words)
    refused(person.run(["wrapped-run", "--pull", "never", reference]), *words)
    refused(person.run(["shifterwrap", "pull", reference]), *words, code=1, prog="shifterwrap")
    refused(person.run(["shifterwrap", "gc"]), *words, code=1, prog="shifterwrap")
    assert hub.requests == []


# ---- the wrong place


def test_a_cache_of_a_newer_format_is_refused_and_left_alone(user: Person, hub: Registry) -> None:
    ends.kept(user, hub)
    (user.cache / "version").write_text("2\n")
    hub.requests.clear()
    with untouched(user.cache):
        no_use(user, hub, "layout version 2", "this is for 1", "SHIFTERWRAP_CACHE_DIR")


@pytest.mark.parametrize("version", [b"", b"\xff\xfe", b"one\n"])
def test_a_cache_whose_format_cannot_be_told_is_refused_and_left_alone(
    user: Person, hub: Registry, version: bytes
) -> None:
    (user.cache / "version").write_bytes(version)
    with untouched(user.cache):
        no_use(user, hub, "version")


def test_a_directory_with_other_things_in_it_is_refused_and_left_alone(user: Person, hub: Registry) -> None:
    (user.cache / "thesis.tex").write_text("mine")
    reference = hub.add("lab/app", "1", app())
    with untouched(user.cache):
        refused(user.run(["wrapped-run", reference]), "is not empty and not a cache")
        refused(user.run(["shifterwrap", "pull", reference]), "is not empty", code=1, prog="shifterwrap")


@pytest.mark.parametrize("mode", [0o770, 0o703])
def test_a_cache_that_others_may_write_to_is_refused_with_the_cure(user: Person, hub: Registry, mode: int) -> None:
    user.cache.chmod(mode)
    with untouched(user.cache):
        no_use(user, hub, "writable by others", f"chmod 700 {user.cache}")
    subprocess.run(["chmod", "700", user.cache], check=True)
    assert run(user, hub.add("lab/app", "1", app())) == "1"


def test_a_symbolic_link_is_no_cache(user: Person, hub: Registry) -> None:
    link = user.home / "link"
    link.symlink_to(user.cache)
    os.chown(link, user.uid, user.gid, follow_symlinks=False)
    with untouched(user.cache):
        no_use(at(user, link), hub, "symbolic link")


def test_a_file_is_no_cache(user: Person, hub: Registry) -> None:
    file = user.home / "place" / "file"
    file.parent.mkdir()
    file.write_text("mine")
    os.chown(file, user.uid, user.gid)
    with untouched(file.parent):
        no_use(at(user, file), hub, "is not a directory", MINE)


def test_a_path_through_a_file_is_no_cache(user: Person, hub: Registry) -> None:
    (user.home / "file").write_text("mine")
    no_use(at(user, user.home / "file" / "cache"), hub, "Not a directory", MINE)


def test_a_relative_path_is_no_cache(user: Person, hub: Registry) -> None:
    no_use(at(user, Path("cache")), hub, "not an absolute path", "node-local")


def test_a_place_that_cannot_be_written_is_told(user: Person, hub: Registry) -> None:
    reference = hub.add("lab/app", "1", app())
    closed = at(user, Path("/usr/shifterwrap-cache"))
    refused(closed.run(["wrapped-run", reference]), "/usr/shifterwrap-cache", "cannot be written", "Permission denied")
    assert not closed.cache.exists()


@pytest.mark.needs("mksquashfs")
def test_a_network_file_system_is_refused(user: Person, hub: Registry, workspace: Path) -> None:
    """squashfuse_ll stands for one: what FUSE mounts may be on a network, and none says whether it is."""
    with fuse_mounted(workspace) as mounted:
        no_use(at(user, mounted / "cache"), hub, "network file system (fuse)", "node-local")


@contextlib.contextmanager
def fuse_mounted(workspace: Path) -> Iterator[Path]:
    """An empty directory that squashfuse_ll serves to everybody."""
    empty, image, mounted = workspace / "empty", workspace / "image.sqsh", workspace / "mounted"
    empty.mkdir()
    mounted.mkdir()
    subprocess.run(["mksquashfs", empty, image, "-quiet", "-no-progress"], check=True, stdout=subprocess.DEVNULL)
    server = subprocess.Popen(["squashfuse_ll", "-f", "-o", "allow_other", image, mounted])
    try:
        ends.until(mounted.is_mount, "squashfuse_ll has mounted")
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)
        server.wait(ends.PATIENCE_SECONDS)


def test_a_new_cache_is_private_whatever_the_umask(user: Person, hub: Registry) -> None:
    reference = hub.add("lab/app", "1", app())
    new = at(user, user.home / "deep" / "er" / "cache")
    crowd = [new.popen(["wrapped-run", reference], umask=0o002) for _ in range(4)]
    assert [ends.finished(one).stdout for one in crowd] == ["1"] * 4
    assert new.cache.stat().st_mode & 0o777 == 0o700


# ---- somebody else's


def test_another_user_is_refused(user: Person, other: Person, hub: Registry) -> None:
    ends.kept(user, hub)
    hub.requests.clear()
    with untouched(user.cache):
        no_use(at(configured(other), user.cache), hub, f"belongs to uid {user.uid}, not to {other.uid}", MINE)


def test_root_is_refused_too(user: Person, root: Person, hub: Registry) -> None:
    ends.kept(user, hub)
    hub.requests.clear()
    with untouched(user.cache):
        no_use(at(configured(root), user.cache), hub, f"belongs to uid {user.uid}, not to 0", MINE)


def test_another_user_does_not_disturb_a_pull_that_is_going_on(user: Person, other: Person, hub: Registry) -> None:
    reference = hub.add("lab/app", "1", app())
    with ends.held(hub, "/blobs/") as hold:
        pulling = user.popen(["wrapped-run", reference])
        hold.reached()
        refused(at(configured(other), user.cache).run(["wrapped-run", reference]), "belongs to uid")
    assert ends.finished(pulling).stdout == "1"
    ends.verified(user)


# ---- read-only


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """The directory as a read-only mount."""
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_read_only_cache_serves_hits_and_tells_why_it_takes_no_more(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    absent = hub.add("lab/app", "1", app())
    with read_only(user.cache), unharmed(user):
        assert run(user, kept) == "kept"
        assert run(user, kept, "--pull", "never") == "kept"
        refused(user.run(["wrapped-run", absent]), str(user.cache), "Read-only file system")
        refused(user.run(["shifterwrap", "pull", absent]), "Read-only", code=1, prog="shifterwrap")
        refused(user.run(["shifterwrap", "rm", kept]), "Read-only", code=1, prog="shifterwrap")
        refused(user.run(["shifterwrap", "pin", kept]), "Read-only", code=1, prog="shifterwrap")
    assert run(user, absent) == "1"


# ---- damaged

Damage = Callable[[Path], None]


def truncated(entry: Path) -> None:
    (entry / "image.sqsh").chmod(0o644)
    os.truncate(entry / "image.sqsh", 1000)


def image_lost(entry: Path) -> None:
    (entry / "image.sqsh").unlink()


def image_replaced(entry: Path) -> None:
    (entry / "image.sqsh").unlink()
    (entry / "image.sqsh").symlink_to("/etc/passwd")


def lock_lost(entry: Path) -> None:
    (entry / "lock").unlink()


def record_lost(entry: Path) -> None:
    (entry / "entry.json").unlink()


def written(name: str, content: bytes) -> Damage:
    def damage(entry: Path) -> None:
        (entry / name).write_bytes(content)

    return damage


def all_lost(entry: Path) -> None:
    for path in entry.iterdir():
        path.unlink()


DAMAGES: dict[str, Damage] = {
    "a truncated image": truncated,
    "a lost image": image_lost,
    "a link for an image": image_replaced,
    "a lost lock": lock_lost,
    "a lost record": record_lost,
    "an empty record": written("entry.json", b""),
    "a record that is no JSON": written("entry.json", b"\0" * 4096),
    "a record that is a list": written("entry.json", b"[]"),
    "a record without a size": written("entry.json", b"{}"),
    "a record nested too deeply": written("entry.json", b"[" * 200_000),
    "an empty entry": all_lost,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_entry_is_a_miss_and_is_replaced_by_the_next_run(user: Person, hub: Registry, name: str) -> None:
    kept = ends.kept(user, hub)
    DAMAGES[name](entry_of(user))
    done = user.run(["wrapped-run", "--pull", "never", kept])
    refused(done, "not cached", f"shifterwrap pull {kept}")
    assert run(user, kept) == "kept"
    assert run(user, kept, "--pull", "never") == "kept"
    ends.verified(user)
    assert ends.unfinished(user.cache) == []
    assert len(list((user.cache / "entries").iterdir())) == 1


def test_a_damaged_tree_is_replaced_too(user: Person, hub: Registry) -> None:
    site = ends.with_trees(user)
    kept = ends.kept(site, hub)
    shutil.rmtree(entry_of(site) / "tree")
    assert run(site, kept) == "kept"
    (entry_of(site) / "tree" / "version").chmod(0o666)
    (entry_of(site) / "tree" / "version").write_text("fake")
    done = site.run(["shifterwrap", "verify"])
    assert (done.returncode, done.stdout.split()[0]) == (1, "DAMAGED")
    assert site.run(["shifterwrap", "rm", kept]).returncode == 0
    assert run(site, kept) == "kept"


def test_a_damaged_entry_is_replaced_where_the_tag_did_not_move(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    truncated(entry_of(user))
    assert run(user, kept, "--pull", "always") == "kept"
    ends.verified(user)


def test_a_pin_stays_when_its_damaged_entry_is_replaced(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    assert user.run(["shifterwrap", "pin", kept]).returncode == 0
    truncated(entry_of(user))
    assert run(user, kept) == "kept"
    (row,) = json.loads(user.run(["shifterwrap", "list", "--json"]).stdout)
    assert row["pinned"] is True


def test_a_damaged_entry_of_a_running_job_stays_and_the_error_says_so(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    job = user.popen(["wrapped-run", kept, "cat"], stdin=subprocess.PIPE)
    ends.until(lambda: "in use" in user.run(["shifterwrap", "list"]).stdout, "the job has its lease")
    record_lost(entry_of(user))
    refused(user.run(["wrapped-run", kept]), "damaged and in use", "end the jobs")
    assert ends.unfinished(user.cache) == []
    job.communicate("", timeout=ends.PATIENCE_SECONDS)
    assert job.returncode == 0
    assert run(user, kept) == "kept"


def test_bytes_that_changed_are_found_by_verify_and_its_advice_cures_them(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    image = entry_of(user) / "image.sqsh"
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 1
    image.chmod(0o644)
    image.write_bytes(content)
    done = user.run(["shifterwrap", "verify", kept])
    assert done.returncode == 1
    assert done.stdout.startswith("DAMAGED ")
    assert "shifterwrap rm NAME" in done.stderr
    assert user.run(["shifterwrap", "rm", done.stdout.split()[1]]).returncode == 0
    assert run(user, kept) == "kept"
    ends.verified(user)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"env": 1}', b"\xff", b"[" * 200_000])
def test_a_damaged_image_document_is_told_with_the_command_that_cures_it(
    user: Person, hub: Registry, content: bytes
) -> None:
    kept = ends.kept(user, hub)
    (entry_of(user) / "image.json").write_bytes(content)
    said = refused(user.run(["wrapped-run", kept]), "image.json is damaged", "and run again")
    cure = said.partition("remove the entry with: ")[2].partition(",")[0]
    assert user.run(shlex.split(cure)).returncode == 0
    assert run(user, kept) == "kept"


REFS = [
    b"",
    b"[]",
    b"{}",
    b"null",
    b"\0" * 4096,
    b"\xff\xfe",
    b"[" * 200_000,
    b'{"reference": 1}',
    b'{"reference":"r","platform":"p","digest":5,"source_digest":"","resolved":0}',
    b'{"reference":"r","platform":"p","digest":"../../../etc","source_digest":"","resolved":0}',
    b'{"reference":"r","platform":"p","digest":"sha256:%s","source_digest":"","resolved":"x"}' % (b"0" * 64),
    b'{"reference":"r","platform":"p","digest":"sha256:%s","source_digest":"","resolved":0}' % (b"0" * 64),
]


@pytest.mark.parametrize("number", range(len(REFS)))
def test_a_damaged_ref_is_a_miss_and_the_image_is_not_downloaded_again(
    user: Person, hub: Registry, number: int
) -> None:
    kept = ends.kept(user, hub)
    ref_of(user).write_bytes(REFS[number])
    refused(user.run(["wrapped-run", "--pull", "never", kept]), "not cached")
    assert user.run(["shifterwrap", "list"]).returncode == 0
    layers = [layer["digest"] for layer in app("kept").document["layers"]]
    before = [hub.count("GET", digest) for digest in layers]
    assert run(user, kept) == "kept"
    assert [hub.count("GET", digest) for digest in layers] == before
    ends.verified(user)


def test_what_does_not_belong_in_the_cache_is_in_nobodys_way(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    for place in ("entries", "refs", "stage", "pins", "locks"):
        (user.cache / place / "stray").write_text("x")
        (user.cache / place / "stray.d" / "x").mkdir(parents=True)
    (user.cache / "stray").write_text("x")
    assert run(user, kept) == "kept"
    assert run(user, hub.add("lab/app", "1", app())) == "1"
    for command in (["list"], ["verify"], ["gc"], ["rm", kept]):
        done = user.run(["shifterwrap", *command])
        assert (done.returncode, done.stderr) == (0, "")


def test_a_damaged_lock_record_is_no_record(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    assert user.run(["shifterwrap", "rm", kept]).returncode == 0
    for content in (b"", b"\0" * 9000, b'{"state":"failed","error":{},"time":"x"}', b'{"state":"failed","error":[]}'):
        for lock in (user.cache / "locks").iterdir():
            lock.write_bytes(content)
        assert run(user, kept) == "kept"
        assert user.run(["shifterwrap", "rm", kept]).returncode == 0


def test_an_entry_without_its_record_is_reported_and_can_be_removed(registry: StockedRegistry, tester: Person) -> None:
    assert tester.run(["shifterwrap", "pull", registry.image("busybox")]).returncode == 0
    (entry,) = (tester.cache / "entries").iterdir()
    entry.joinpath("entry.json").write_text("{")
    verified = tester.run(["shifterwrap", "verify"])
    assert verified.returncode == 1
    assert f"DAMAGED {entry.name}" in verified.stdout
    assert tester.run(["shifterwrap", "rm", entry.name]).returncode == 0
    assert not entry.exists()
