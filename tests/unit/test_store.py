"""store.py: each invariant of the cache's write side, with children that are killed before every system call."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from shifterwrap import cache, evict, linux, store
from shifterwrap.cache import Ref
from shifterwrap.errors import CacheError, CacheFull, EntryBusy
from tests.unit import entries
from tests.unit.entries import keep, key, make_root, names, publish, whole, write_image

MIB = 1 << 20
REF = Ref("docker://host/app:1", "linux/amd64", key().digest, key().digest, 1.0)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return make_root(tmp_path)


# ---- create


def test_a_cache_is_private_tagged_and_versioned(tmp_path: Path) -> None:
    root = str(tmp_path / "deep" / "cache")
    store.create(root, os.getuid())
    assert stat.S_IMODE(os.stat(root).st_mode) == 0o700
    assert names(root, "") == ["CACHEDIR.TAG", "entries", "locks", "pins", "refs", "stage", "version"]
    assert Path(root, "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    assert cache.check(root, os.getuid())


def test_a_creator_that_is_killed_leaves_no_cache_or_all_of_it(tmp_path: Path) -> None:
    root = str(tmp_path / "cache")
    for _ in entries.every_death(lambda: store.create(root, os.getuid())):
        if cache.check(root, os.getuid()):
            assert {"entries", "locks", "pins", "refs", "stage"} < set(names(root, ""))
        store.create(root, os.getuid())
        assert cache.check(root, os.getuid())
        shutil.rmtree(root)


def test_a_directory_of_somebody_elses_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").touch()
    with pytest.raises(CacheError, match="not empty and not a cache"):
        store.create(str(tmp_path), os.getuid())
    assert os.listdir(tmp_path) == ["thesis"]


# ---- commit


def test_a_committer_that_is_killed_leaves_garbage_or_a_whole_entry(root: str) -> None:
    seen = set()
    for _ in entries.every_death(lambda: publish(root, key())):
        seen.add(len(names(root)))
        assert whole(root)
        store.reap(root)
        assert names(root, "stage") == []
        for name in names(root):
            held = cache.lease_name(root, name)
            assert held is not None
            os.close(held.fd)
            store.remove(root, name)
    assert seen == {0, 1}
    assert whole(root)


def test_everything_is_durable_before_the_rename_and_the_rename_after(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(fd: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def note_rename(source: str, target: str) -> None:
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    with store.stage(root) as made:
        os.close(store.commit(root, made, key(), write_image(made, b"image"), {}).fd)
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    assert before[0] == "image.sqsh"
    assert [name.startswith(".new-") for name in before[1:-1]] == [True, True]  # image.json and entry.json
    assert before[-1] == os.path.basename(made.path)
    assert after == ["entries"]


def test_the_lock_is_held_from_the_first_byte_to_the_lease(root: str) -> None:
    unlocked: list[str] = []

    def look() -> None:
        paths = [os.path.join(root, place, name) for place in ("stage", "entries") for name in names(root, place)]
        unlocked.extend(path for path in paths if not locked(os.path.join(path, "lock")))

    with store.stage(root) as made, entries.stepped(look):
        held = store.commit(root, made, key(), write_image(made, b"image"), {})
    look()
    assert unlocked == []
    os.close(held.fd)
    look()
    assert unlocked == [held.entry.path]


def locked(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return linux.ofd_locked(fd)
    finally:
        os.close(fd)


def test_a_committed_entry_is_leased_to_who_made_it(root: str) -> None:
    held = publish(root, key())
    with pytest.raises(EntryBusy):
        store.remove(root, held.entry.name)
    os.close(held.fd)
    assert store.remove(root, held.entry.name) == len(b"image")


def test_nobody_may_write_to_an_image_any_more(root: str) -> None:
    held = publish(root, key())
    assert stat.S_IMODE(os.stat(held.entry.image).st_mode) == 0o444


def test_what_only_the_making_needed_is_not_committed(root: str) -> None:
    with store.stage(root) as made:
        record = write_image(made, b"image")
        os.mkdir(os.path.join(made.path, "blobs"))
        Path(made.path, "blobs", "blob").touch()
        Path(made.path, "reserved.json").touch()
        held = store.commit(root, made, key(), record, {})
    assert set(os.listdir(held.entry.path)) == entries.WHOLE


def test_an_image_without_its_recorded_size_is_not_committed(root: str) -> None:
    with pytest.raises(CacheError, match="has not its recorded size"), store.stage(root) as made:
        store.commit(root, made, key(), {**write_image(made, b"image"), "bytes": 6}, {})
    assert names(root) == names(root, "stage") == []


def test_the_first_of_two_commits_of_a_key_stays(root: str) -> None:
    first = publish(root, key(), b"first")
    second = publish(root, key(), b"second")
    assert os.path.samestat(os.fstat(first.fd), os.fstat(second.fd))
    assert Path(second.entry.image).read_bytes() == b"first"
    assert second.entry.bytes == len(b"first")
    assert names(root, "stage") == []


def damage_image(path: str) -> None:
    os.unlink(os.path.join(path, "image.sqsh"))


def damage_record(path: str) -> None:
    Path(path, "entry.json").write_text("{")


def damage_lock(path: str) -> None:
    os.unlink(os.path.join(path, "lock"))


@pytest.mark.parametrize("damage", [damage_image, damage_record, damage_lock])
def test_a_damaged_entry_makes_way_for_a_sound_one_and_its_pin_stays(root: str, damage: Callable[[str], None]) -> None:
    name = keep(root, key())
    store.pin(root, name)
    damage(os.path.join(root, "entries", name))
    held = publish(root, key(), b"anew")
    assert Path(held.entry.image).read_bytes() == b"anew"
    assert cache.pinned(root, name)
    assert names(root, "stage") == []


def test_a_replacer_that_is_killed_leaves_the_damaged_entry_none_or_a_sound_one(root: str) -> None:
    def replace() -> None:
        publish(root, key())

    def spoil() -> None:
        for name in names(root):
            store.remove(root, name)
        damage_record(os.path.join(root, "entries", keep(root, key())))

    spoil()
    for _ in entries.every_death(replace):
        held = cache.lease(root, key())
        assert held is None or whole(root)
        if held is not None:
            os.close(held.fd)
        store.reap(root)
        spoil()


def test_a_damaged_entry_that_a_job_uses_stays(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_REMOVER_POLLS", 2)
    job = publish(root, key())
    damage_record(job.entry.path)
    with pytest.raises(EntryBusy, match="damaged and in use"):
        publish(root, key(), b"anew")
    assert Path(job.entry.image).read_bytes() == b"image"
    assert names(root, "stage") == []


# ---- stage and reap


def test_a_stage_directory_is_gone_after_a_failure(root: str) -> None:
    with pytest.raises(ZeroDivisionError), store.stage(root) as made:
        write_image(made, b"half")
        os.makedirs(os.path.join(made.path, "tree", "closed"), 0o500)
        os.chmod(os.path.join(made.path, "tree"), 0o500)
        _ = 1 // 0
    assert names(root, "stage") == []


def test_only_what_nobody_holds_is_reaped(root: str) -> None:
    for name in ("dead", "dead-without-lock"):
        os.mkdir(os.path.join(root, "stage", name))
        Path(root, "stage", name, "image.sqsh").touch()
    Path(root, "stage", "dead", "lock").touch()
    with store.stage(root) as made:
        assert store.reap(root) == 2
        assert names(root, "stage") == [os.path.basename(made.path)]


def test_a_reaper_that_is_killed_is_followed_by_one_that_finishes(root: str) -> None:
    def litter() -> None:
        os.makedirs(os.path.join(root, "stage", "dead", "blobs"))
        Path(root, "stage", "dead", "blobs", "blob").touch()
        Path(root, "stage", "dead", "lock").touch()

    litter()
    for _ in entries.every_death(lambda: store.reap(root)):
        store.reap(root)
        assert names(root, "stage") == []
        litter()


def test_a_reaper_does_not_stumble_over_what_it_cannot_remove(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(root, "stage", "a-file").touch()
    os.mkdir(os.path.join(root, "stage", "dead"))
    assert store.reap(root) == 1
    assert names(root, "stage") == ["a-file"]
    os.mkdir(os.path.join(root, "stage", "dead"))
    monkeypatch.setattr(os, "open", full)
    assert store.reap(root) == 0


def full(*args: object, **options: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_files_that_were_never_put_in_place_are_reaped_when_they_are_old(root: str) -> None:
    store.put_ref(root, os.path.join(root, "refs", "host", "app", ":1.json"), REF)
    places = [os.path.join(root, place) for place in ("", "pins", "refs/host/app")]
    for place in places:
        for name in (".new-1-old", ".new-2-young"):
            Path(place, name).touch()
        os.utime(os.path.join(place, ".new-1-old"), (0, 0))
    store.reap(root)
    assert [sorted(name for name in os.listdir(place) if name.startswith(".new-")) for place in places] == [
        [".new-2-young"]
    ] * 3


# ---- files


def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = set()
    for _ in entries.every_death(lambda: store.write_file(str(path), b"new", durable=True)):
        seen.add(path.read_bytes())
    assert seen <= {b"old", b"new"}
    assert path.read_bytes() == b"new"


def test_a_ref_is_replaced_in_one_step(root: str) -> None:
    path = os.path.join(root, "refs", "host", "app", ":1,linux-amd64.json")
    store.put_ref(root, path, REF)
    moved = REF._replace(digest=key(2).digest, resolved=2.0)
    seen = set()
    for _ in entries.every_death(lambda: store.put_ref(root, path, moved)):
        seen.add(cache.read_ref(path))
    assert seen <= {REF, moved}
    assert cache.read_ref(path) == moved
    assert list(cache.refs(root)) == [moved]  # what the dead left beside it is no ref


def test_a_write_that_fails_leaves_nothing_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write_file(str(tmp_path / "file"), b"new", durable=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, CacheFull, "no space left"),
        (errno.EDQUOT, CacheFull, "no space left"),
        (errno.EROFS, CacheError, "cannot be written"),
        (errno.EACCES, CacheError, "cannot be written"),
        (errno.EIO, CacheError, "/x failed"),
    ],
)
def test_what_the_system_refuses_is_explained(number: int, kind: type[CacheError], words: str) -> None:
    found = store.explain(OSError(number, os.strerror(number), "/x"), "/cache")
    assert type(found) is kind
    assert words in found.message
    assert found.hint


# ---- remove


def test_a_remover_that_is_killed_leaves_the_whole_entry_or_none(root: str) -> None:
    keep(root, key())
    seen = set()
    for _ in entries.every_death(lambda: store.remove(root, str(key()))):
        seen.add(len(names(root)))
        assert whole(root)
        store.reap(root)
        assert names(root, "stage") == []
        if not names(root):
            keep(root, key())
    assert seen == {0, 1}


def test_a_reader_sees_all_of_an_entry_or_nothing_while_it_is_removed(root: str) -> None:
    keep(root, key())
    seen = set()

    def look() -> None:
        seen.add(len(names(root)))
        assert whole(root)

    with entries.stepped(look):
        store.remove(root, str(key()))
    assert seen == {0, 1}


def test_a_leased_entry_is_not_removed_and_not_waited_for(root: str) -> None:
    held = publish(root, key())
    with pytest.raises(EntryBusy, match="in use"):
        store.remove(root, held.entry.name)
    assert whole(root)


def test_who_locked_an_entry_that_was_replaced_meanwhile_removes_nothing(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(root, key())
    real_lock = linux.ofd_lock

    def lose_the_race(fd: int, kind: int) -> bool:
        monkeypatch.setattr(linux, "ofd_lock", real_lock)
        store.remove(root, str(key()))
        publish(root, key(), b"image")
        return real_lock(fd, kind)

    monkeypatch.setattr(linux, "ofd_lock", lose_the_race)
    with pytest.raises(EntryBusy):
        store.remove(root, str(key()))
    assert names(root) == [str(key())]


def test_what_is_not_there_is_removed_for_free(root: str) -> None:
    assert store.remove(root, str(key())) == 0
    assert names(root) == []


def test_a_tree_that_denies_everything_to_its_owner_is_removed(root: str) -> None:
    with store.stage(root) as made:
        os.makedirs(os.path.join(made.path, "tree", "a", "b"))
        Path(made.path, "tree", "a", "b", "file").touch()
        for place in ("tree/a/b", "tree/a", "tree"):
            os.chmod(os.path.join(made.path, place), 0)
        os.close(store.commit(root, made, key(kind=cache.TREE), {"bytes": 1}, {}).fd)
    store.remove(root, str(key(kind=cache.TREE)))
    assert names(root) == names(root, "stage") == []


def test_refs_of_entries_that_are_gone_are_forgotten(root: str) -> None:
    for number in (1, 2):
        path = os.path.join(root, "refs", "host", f":{number}.json")
        store.put_ref(root, path, REF._replace(digest=key(number).digest))
    store.remove_refs(root, {key(1).digest})
    assert [ref.digest for ref in cache.refs(root)] == [key(2).digest]


def test_a_lease_and_a_removal_never_both_succeed(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes lease a thousand times each what a third removes and publishes again all the time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)

    def lease_often() -> None:
        got = missed = 0
        while got < 1000 or missed < 100:
            held = cache.lease(root, key())
            if held is None:
                missed += 1
                continue
            got += 1
            assert Path(held.entry.image).read_bytes() == b"image"
            assert set(os.listdir(held.entry.path)) == entries.WHOLE
            assert Path(root, "entries", held.entry.name).exists()
            os.close(held.fd)

    users = [entries.fork(lease_often) for _ in range(2)]
    removed = 0
    while users:
        keep(root, key())
        with contextlib.suppress(EntryBusy):
            removed += bool(store.remove(root, str(key())))
        users = [user for user in users if not gone(user)]
    assert removed > 0
    assert names(root, "stage") == []


def gone(child: int) -> bool:
    """Whether the child has ended, which must be well."""
    found, status = os.waitpid(child, os.WNOHANG)
    assert status == 0
    return found == child


# ---- pins, room


def test_a_pinned_or_leased_entry_is_no_candidate_for_eviction(root: str) -> None:
    pinned, free = keep(root, key(1)), keep(root, key(2))
    leased = publish(root, key(3))
    store.pin(root, pinned)
    assert {c.name: c.kept for c in store.candidates(root)} == {pinned: True, free: False, leased.entry.name: True}
    assert store.unpin(root, pinned)
    assert not store.unpin(root, pinned)
    os.close(leased.fd)
    assert [c.kept for c in store.candidates(root)] == [False] * 3


def test_a_pin_goes_with_its_entry(root: str) -> None:
    name = keep(root, key())
    store.pin(root, name)
    store.remove(root, name)
    assert names(root, "pins") == []


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with 100 MiB free, whatever is written."""
    monkeypatch.setattr(store, "_free", lambda path: 100 * MIB)


def reserve(root: str, made: store.Stage, mib: int, max_mib: int = 0, min_free_mib: int = 0) -> list[str]:
    evicted: list[str] = []
    store.reserve(root, made, mib * MIB, max_mib * MIB, min_free_mib * MIB, evicted.append)
    return evicted


@pytest.mark.usefixtures("roomy")
def test_what_others_reserved_is_taken(root: str) -> None:
    with store.stage(root) as first, store.stage(root) as second:
        reserve(root, first, 60)
        with pytest.raises(CacheFull, match=r"60.0 MiB are needed"):
            reserve(root, second, 60)
        reserve(root, second, 40)
        assert store.shortage(root, MIB, 0, 0) > 0
    assert store.shortage(root, 100 * MIB, 0, 0) == 0


@pytest.mark.usefixtures("roomy")
def test_what_was_written_is_not_counted_as_reserved_any_more(root: str) -> None:
    with store.stage(root) as made:
        reserve(root, made, 2)
        assert store.shortage(root, 100 * MIB, 0, 0) == 2 * MIB - os.stat(f"{made.path}/reserved.json").st_blocks * 512
        os.mkdir(os.path.join(made.path, "blobs"))
        Path(made.path, "blobs", "blob").write_bytes(os.urandom(MIB))
        with open(os.path.join(made.path, "blobs", "blob"), "rb") as blob:
            os.fsync(blob.fileno())
        assert store.shortage(root, 100 * MIB, 0, 0) <= MIB
        Path(made.path, "image.sqsh").write_bytes(os.urandom(2 * MIB))
        with open(os.path.join(made.path, "image.sqsh"), "rb") as image:
            os.fsync(image.fileno())
        assert store.shortage(root, 100 * MIB, 0, 0) == 0


@pytest.mark.usefixtures("roomy")
def test_of_many_who_reserve_at_once_only_those_succeed_who_fit(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(root: str) -> list[evict.Candidate]:
        time.sleep(0.01)  # whoever looks gives the others the time to look, too
        return []

    def take() -> None:
        with store.stage(root) as made:
            try:
                reserve(root, made, 30)
            except CacheFull:
                os.mkdir(tmp_path / f"refused-{os.getpid()}")
                return
            os.mkdir(tmp_path / f"taken-{os.getpid()}")
            entries.until(lambda: len(os.listdir(tmp_path)) == 9)  # the cache is one of them

    monkeypatch.setattr(store, "candidates", slowly)
    children = [entries.fork(take) for _ in range(8)]
    assert [entries.ended(child) for child in children] == [0] * 8
    assert sum(name.startswith("taken-") for name in os.listdir(tmp_path)) == 3


@pytest.mark.usefixtures("roomy")
def test_free_space_is_left_as_configured(root: str) -> None:
    with store.stage(root) as made:
        with pytest.raises(CacheFull):
            reserve(root, made, 60, min_free_mib=50)
        reserve(root, made, 50, min_free_mib=50)


@pytest.mark.usefixtures("roomy")
def test_the_budget_is_kept_by_evicting_what_was_not_used_for_longest(root: str) -> None:
    old, young = keep(root, key(1), bytes(2 * MIB), used=1.0), keep(root, key(2), bytes(2 * MIB), used=2.0)
    with store.stage(root) as made:
        assert reserve(root, made, 2, max_mib=4) == [old]
    assert names(root) == [young]


@pytest.mark.usefixtures("roomy")
def test_nothing_is_evicted_in_vain(root: str) -> None:
    keep(root, key(1), bytes(MIB))
    with store.stage(root) as made, pytest.raises(CacheFull, match="cache_max_bytes allows 2 MiB"):
        reserve(root, made, 3, max_mib=2)
    assert len(names(root)) == 1


@pytest.mark.usefixtures("roomy")
def test_what_is_leased_in_the_last_moment_is_not_evicted(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = keep(root, key(), bytes(2 * MIB))
    seen = store.candidates(root)
    held = cache.lease_name(root, name)
    monkeypatch.setattr(store, "candidates", lambda root: seen)
    with store.stage(root) as made:
        assert reserve(root, made, 2, max_mib=3) == []
    assert held is not None
    assert Path(held.entry.image).exists()


def test_the_size_of_the_cache_is_the_sum_of_its_entries(root: str) -> None:
    keep(root, key(1), bytes(1000))
    keep(root, key(2), bytes(500))
    assert sum(candidate.bytes for candidate in store.candidates(root)) == 1500
    shutil.rmtree(os.path.join(root, "entries", str(key(1))))  # behind our back
    assert sum(candidate.bytes for candidate in store.candidates(root)) == 500
    assert evict.victims(store.candidates(root), 1, evict.MIN_AGE_SECONDS)[0].name == str(key(2))


def test_a_stage_directory_goes_however_deep_and_closed_an_image_nests_it(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    with store.stage(root) as made:
        parent = os.open(made.path, os.O_RDONLY)
        for _ in range(3000):
            os.mkdir("d" * 40, 0o700, dir_fd=parent)
            child = os.open("d" * 40, os.O_RDONLY, dir_fd=parent)
            os.close(parent)
            parent = child
        os.fchmod(parent, 0)
        os.close(parent)
    assert not os.path.exists(made.path)


def test_a_committed_entrys_last_use_is_its_commit(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    with store.stage(root) as made:
        os.utime(made.lock_fd, (1.0, 1.0))  # a pull that took long
        record = write_image(made, b"image")
        lease = store.commit(root, made, key(), record, {})
    assert time.time() - cache.last_used(lease.entry) < evict.MIN_AGE_SECONDS
    os.close(lease.fd)
