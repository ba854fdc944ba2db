"""cache.py: the read side's invariants, one test for each; the write side's are in test_store.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shifterwrap import cache, linux, store
from shifterwrap.cache import Key, Ref
from shifterwrap.errors import CacheError, CacheFormat, EntryBusy
from shifterwrap.oci import Platform, parse_reference
from tests.unit import entries
from tests.unit.entries import AMD64, keep, key, make_root, publish

APP = parse_reference("docker://host.example/lab/app:1")


@pytest.fixture
def root(tmp_path: Path) -> str:
    return make_root(tmp_path)


# ---- keys and refs


def test_whatever_changes_the_bytes_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Key("sha256:" + "a" * 64, Platform("linux", "arm", "v7"), "root", cache.SQUASHFS)
    others = [
        base._replace(digest="sha256:" + "b" * 64),
        base._replace(platform=Platform("linux", "arm", "v6")),
        base._replace(platform=Platform("linux", "arm")),
        base._replace(policy="keep"),
        base._replace(kind=cache.TREE),
    ]
    names = {str(base), *map(str, others)}
    assert len(names) == 1 + len(others)
    assert all("/" not in name and ":" not in name for name in names)
    monkeypatch.setattr(cache, "CONTENT_FORMAT", cache.CONTENT_FORMAT + 1)
    assert str(base) not in names


def test_no_two_references_share_a_ref() -> None:
    texts = [
        "docker://host.example/lab/app:1", "docker://host.example/lab/app:2", "docker://host.example/lab:1",
        "docker://host.example:5000/lab/app:1", "docker://host.example/lab/app@sha256:" + "1" * 64,
        "docker://host.example/lab/app/1", "docker://other.example/lab/app:1",
    ]  # fmt: skip
    paths = {cache.ref_path("/c", parse_reference(text), platform)
             for text in texts for platform in (AMD64, Platform("linux", "arm64"))}  # fmt: skip
    assert len(paths) == 2 * len(texts)
    assert all(os.path.normpath(path).startswith("/c/refs/") for path in paths)


def put(root: str, digest: str) -> Ref:
    ref = Ref(str(APP), str(AMD64), digest, digest, 1.5)
    store.put_ref(root, cache.ref_path(root, APP, AMD64), ref)
    return ref


def test_a_ref_is_read_as_it_was_written(root: str) -> None:
    assert cache.lookup(root, APP, AMD64) is None
    ref = put(root, key().digest)
    assert cache.lookup(root, APP, AMD64) == ref
    assert list(cache.refs(root)) == [ref]


def test_a_ref_may_dangle_and_is_a_miss_then(root: str) -> None:
    ref = put(root, key().digest)
    assert cache.lease(root, key()._replace(digest=ref.digest)) is None


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"{}", b'{"reference":"r"}',
        json.dumps({**Ref("r", "p", "sha256:" + "0" * 64, "", 1.0)._asdict(), "digest": "../../x"}).encode(),
        json.dumps({**Ref("r", "p", "sha256:" + "0" * 64, "", 1.0)._asdict(), "resolved": "soon"}).encode(),
    ],
)  # fmt: skip
def test_a_damaged_ref_is_a_miss(root: str, content: bytes) -> None:
    put(root, key().digest)
    Path(cache.ref_path(root, APP, AMD64)).write_bytes(content)
    assert cache.lookup(root, APP, AMD64) is None
    assert list(cache.refs(root)) == []


def test_a_ref_with_what_a_newer_version_adds_is_read(root: str) -> None:
    ref = put(root, key().digest)
    Path(cache.ref_path(root, APP, AMD64)).write_text(json.dumps({**ref._asdict(), "principal": "anonymous"}))
    assert cache.lookup(root, APP, AMD64) == ref


# ---- leases


def test_a_lease_marks_the_last_use_and_writes_nothing_else(root: str) -> None:
    name = keep(root, key(), used=1.0)
    path = Path(root, "entries", name)
    before = {item.name: item.stat().st_mtime_ns for item in path.iterdir() if item.name != "lock"}
    held = cache.lease(root, key())
    assert held is not None
    assert cache.last_used(held.entry) > 1.0
    assert {item.name: item.stat().st_mtime_ns for item in path.iterdir() if item.name != "lock"} == before
    assert sorted(item.name for item in path.iterdir()) == sorted(entries.WHOLE)


def test_a_lease_needs_no_right_to_write(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = keep(root, key(), used=1.0)
    flags = []
    real_open = os.open

    def note(path: str, flag: int, *more: int) -> int:
        flags.append(flag & os.O_ACCMODE)
        return real_open(path, flag, *more)

    def refuse(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "open", note)
    monkeypatch.setattr(os, "utime", refuse)
    held = cache.lease_name(root, name)
    assert held is not None
    assert set(flags) == {os.O_RDONLY}


def test_many_hold_leases_on_one_entry(root: str) -> None:
    held = [publish(root, key()), cache.lease(root, key()), cache.lease(root, key())]
    for one in held:
        assert one is not None
        assert cache.in_use(one.entry)
        with pytest.raises(EntryBusy):
            store.remove(root, one.entry.name)
        os.close(one.fd)
    assert store.remove(root, str(key()))


def test_an_entry_that_is_being_removed_is_a_miss(root: str) -> None:
    name = keep(root, key())
    fd = os.open(os.path.join(root, "entries", name, "lock"), os.O_RDWR)
    assert linux.ofd_lock(fd, 1)  # F_WRLCK
    assert cache.lease(root, key()) is None
    os.close(fd)
    assert cache.lease(root, key()) is not None


def test_a_lock_that_was_replaced_between_open_and_lock_is_a_miss(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = keep(root, key())
    real_lock = linux.ofd_lock

    def lose_the_race(fd: int, kind: int) -> bool:
        monkeypatch.setattr(linux, "ofd_lock", real_lock)
        store.remove(root, name)
        keep(root, key(), b"another")
        return real_lock(fd, kind)

    monkeypatch.setattr(linux, "ofd_lock", lose_the_race)
    assert cache.lease(root, key()) is None
    assert cache.lease(root, key()) is not None


def test_a_lease_survives_execve_and_ends_with_the_last_process(root: str) -> None:
    held = publish(root, key())
    script = "sleep_pid=; cat <&0 & exec cat"  # two processes that read the same pipe to its end
    job = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, pass_fds=[held.fd])
    os.close(held.fd)
    assert cache.in_use(held.entry)
    with pytest.raises(EntryBusy):
        store.remove(root, held.entry.name)
    assert job.stdin is not None
    job.stdin.close()
    assert job.wait(entries.PATIENCE_SECONDS) == 0
    entries.until(lambda: not cache.in_use(held.entry))
    assert store.remove(root, held.entry.name)


def test_a_lease_outlives_the_process_that_took_it(root: str) -> None:
    name = keep(root, key())
    entry = cache.read_entry(os.path.join(root, "entries", name))
    assert entry is not None
    reader, writer = os.pipe()

    def take_and_leave() -> None:
        held = cache.lease_name(root, name)
        assert held is not None
        os.close(writer)
        if os.fork() == 0:
            os.read(reader, 1)  # until the test closes its end
            os._exit(0)

    assert entries.ended(entries.fork(take_and_leave)) == 0
    assert cache.in_use(entry)
    os.close(writer)
    os.close(reader)
    entries.until(lambda: not cache.in_use(entry))


def test_a_lease_ends_when_its_holder_is_killed(root: str) -> None:
    held = publish(root, key())
    job = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[held.fd])
    os.close(held.fd)
    assert cache.in_use(held.entry)
    job.kill()
    job.communicate()
    entries.until(lambda: not cache.in_use(held.entry))


def test_a_lease_is_not_inherited_by_accident(root: str) -> None:
    held = publish(root, key())
    assert not os.get_inheritable(held.fd)
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.fstat({held.fd})"], close_fds=False, stderr=subprocess.PIPE, check=False
    )
    assert b"Bad file descriptor" in done.stderr


# ---- damage


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"bytes": "5"}', b"\xff", b"[" * 100_000])
def test_a_damaged_record_is_a_miss_and_no_entry(root: str, content: bytes) -> None:
    name = keep(root, key())
    Path(root, "entries", name, "entry.json").write_bytes(content)
    assert cache.lease_name(root, name) is None
    assert list(cache.entries(root)) == []


def test_an_image_of_another_size_is_a_miss(root: str) -> None:
    name = keep(root, key())
    image = Path(root, "entries", name, "image.sqsh")
    image.chmod(0o644)
    image.write_bytes(b"longer than it was")
    assert cache.lease_name(root, name) is None


def test_a_miss_keeps_no_descriptor(root: str) -> None:
    name = keep(root, key())
    Path(root, "entries", name, "entry.json").write_bytes(b"")
    before = os.listdir("/proc/self/fd")
    assert cache.lease_name(root, name) is None
    assert os.listdir("/proc/self/fd") == before


def test_an_image_that_is_a_link_is_a_miss(root: str, tmp_path: Path) -> None:
    name = keep(root, key())
    image = Path(root, "entries", name, "image.sqsh")
    image.unlink()
    (tmp_path / "elsewhere").write_bytes(b"image")
    image.symlink_to(tmp_path / "elsewhere")
    assert cache.lease_name(root, name) is None


def test_a_lock_that_is_a_link_is_a_miss(root: str, tmp_path: Path) -> None:
    name = keep(root, key())
    lock = Path(root, "entries", name, "lock")
    lock.rename(tmp_path / "lock")
    lock.symlink_to(tmp_path / "lock")
    assert cache.lease_name(root, name) is None


@pytest.mark.parametrize("document", [{}, {"env": []}, {**entries.IMAGE, "env": "A=b"}, {**entries.IMAGE, "cmd": None}])
def test_a_damaged_image_document_is_an_error_with_the_cure(root: str, document: dict[str, object]) -> None:
    held = publish(root, key())
    assert cache.image_document(held.entry) == entries.IMAGE
    Path(held.entry.path, "image.json").write_text(json.dumps(document))
    with pytest.raises(CacheError) as caught:
        cache.image_document(held.entry)
    assert f"shifterwrap rm {held.entry.name}," in caught.value.hint


def test_a_kind_of_a_newer_version_is_no_entry_and_stays(root: str) -> None:
    os.rename(
        os.path.join(root, "entries", keep(root, key())),
        os.path.join(root, "entries", "sha256-1.linux-amd64.v1.root.sif"),
    )
    assert list(cache.entries(root)) == []
    store.reap(root)
    assert entries.names(root) == ["sha256-1.linux-amd64.v1.root.sif"]


# ---- the place


def test_no_cache_is_no_error(tmp_path: Path) -> None:
    assert not cache.check(str(tmp_path / "absent"), os.getuid())
    assert not cache.check(str(tmp_path), os.getuid())


def test_a_cache_of_somebody_else_is_refused(root: str) -> None:
    with pytest.raises(CacheError, match=f"belongs to uid {os.getuid()}, not to 12345"):
        cache.check(root, 12345)


@pytest.mark.parametrize("version", ["2\n", "", "one"])
def test_another_layout_is_refused(root: str, version: str) -> None:
    Path(root, "version").write_text(version)
    with pytest.raises(CacheFormat):
        cache.check(root, os.getuid())


def test_a_named_cache_is_taken_as_named(tmp_path: Path) -> None:
    named = f"{tmp_path}/a/../b/"
    assert cache.locate({"SHIFTERWRAP_CACHE_DIR": named, "HOME": "/x"}, 1, "/scratch") == f"{tmp_path}/b"
    with pytest.raises(CacheError, match="not an absolute path"):
        cache.locate({"SHIFTERWRAP_CACHE_DIR": "cache"}, 1, "")


def test_without_a_name_the_first_local_place_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.getuid()
    home, xdg, scratch, tmp = (str(tmp_path / name) for name in ("home", "xdg", "scratch", "tmp"))
    for path in (home, xdg, scratch, tmp):
        os.mkdir(path)
    remote: set[str] = set()
    monkeypatch.setattr(linux, "network_file_system", lambda path: "nfs" if path in remote else "")
    environ = {"HOME": home, "XDG_CACHE_HOME": xdg, "TMPDIR": tmp}
    places = []
    for path in (xdg, scratch, tmp, ""):
        places.append(cache.locate(environ, uid, scratch))
        remote.add(path)
    own = f"shifterwrap-{uid}"
    assert places == [f"{xdg}/shifterwrap", f"{scratch}/{own}", f"{tmp}/{own}", f"/var/tmp/{own}"]
    remote.clear()
    assert cache.locate({"HOME": home}, uid, "") == f"{home}/.cache/shifterwrap"


@pytest.mark.needs("users")
def test_a_place_where_another_user_could_exchange_the_cache_is_passed_over(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    os.chown(scratch, 2001, 2001)
    assert cache.locate({"TMPDIR": str(tmp_path)}, 0, str(scratch)) == f"{tmp_path}/shifterwrap-0"
    scratch.chmod(0o1777)  # nobody may rename what is not his
    assert cache.locate({}, 0, str(scratch)) == f"{scratch}/shifterwrap-0"


def test_the_last_use_is_that_of_the_newest_lease(root: str) -> None:
    name = keep(root, key(), used=5.0)
    (entry,) = cache.entries(root)
    assert cache.last_used(entry) == 5.0
    began = time.time() - 1
    held = cache.lease_name(root, name)
    assert held is not None
    assert cache.last_used(entry) >= began
