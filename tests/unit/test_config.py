"""config.py: which snapshot is believed, when a configuration is parsed anew, and where generated files lie."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest

from shifterwrap import config
from shifterwrap.config import Config
from shifterwrap.errors import ConfigError

UID = os.getuid()
root_only = pytest.mark.skipif(UID != 0, reason="only root gives files away")


class Site:
    """A configuration of its own, and a count of how often it was parsed."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = place / "etc" / "shifterwrap.yaml"
        self.drop_ins = self.path.parent / "conf.d"
        self.run = place / "run"
        self.path.parent.mkdir()
        self.run.mkdir(mode=0o700)
        self.path.write_text("retries: 7\n")
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(self.run))
        monkeypatch.setenv("SHIFTERWRAP_CONFIG", str(self.path))
        monkeypatch.setattr(config, "SITE_SNAPSHOT", str(place / "site.json"))
        self.site_snapshot = place / "site.json"
        self.parsed = 0
        refresh = config._refresh

        def counted(path: str) -> dict[str, Any]:
            self.parsed += 1
            return refresh(path)

        monkeypatch.setattr(config, "_refresh", counted)

    def load(self) -> Config:
        return config.load(os.environ, UID)

    @property
    def snapshot(self) -> Path:
        return Path(config.own_snapshot(os.environ, UID, str(self.path)))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def test_defaults_without_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SITE_FILE", str(tmp_path / "none.yaml"))
    assert config.load({}, UID) == Config()


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"SHIFTERWRAP_CONFIG names no file: /nonexistent/x\.yaml"):
        config.load({"SHIFTERWRAP_CONFIG": "/nonexistent/x.yaml"}, UID)


def test_parsed_once_then_read_from_the_snapshot(site: Site) -> None:
    assert site.load() == Config(retries=7)
    assert site.parsed == 1
    assert site.snapshot.stat().st_mode & 0o022 == 0
    assert [site.load(), site.load()] == [Config(retries=7)] * 2
    assert site.parsed == 1


def rewritten(site: Site) -> None:
    site.path.write_text("retries: 12\n")


def same_size_later(site: Site) -> None:
    before = site.path.stat()
    site.path.write_text("retries: 8\n")
    os.utime(site.path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def another_inode(site: Site) -> None:
    before = site.path.stat()
    other = site.path.with_suffix(".new")
    other.write_text("retries: 9\n")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(site.path)


def a_drop_in(site: Site) -> None:
    site.drop_ins.mkdir()
    (site.drop_ins / "a.yaml").write_text("retries: 3\n")


@pytest.mark.parametrize(
    ("change", "retries"), [(rewritten, 12), (same_size_later, 8), (another_inode, 9), (a_drop_in, 3)]
)
def test_every_change_is_seen(site: Site, change: Callable[[Site], None], retries: int) -> None:
    site.load()
    change(site)
    assert (site.load().retries, site.parsed) == (retries, 2)
    assert (site.load().retries, site.parsed) == (retries, 2)


def test_a_changed_and_a_removed_drop_in_are_seen(site: Site) -> None:
    a_drop_in(site)
    assert site.load().retries == 3
    (site.drop_ins / "a.yaml").write_text("retries: 33\n")
    assert site.load().retries == 33
    (site.drop_ins / "a.yaml").unlink()
    assert (site.load().retries, site.parsed) == (7, 3)


def edited(**changes: Any) -> Callable[[Site], None]:
    """The snapshot with other top-level values."""

    def edit(site: Site) -> None:
        document = {**json.loads(site.snapshot.read_text()), **changes}
        site.snapshot.write_text(json.dumps(document))

    return edit


def written(text: str) -> Callable[[Site], None]:
    def write(site: Site) -> None:
        site.snapshot.write_text(text)

    return write


def through_a_link(site: Site) -> None:
    real = site.snapshot.with_suffix(".real")
    site.snapshot.rename(real)
    site.snapshot.symlink_to(real)


DISTRUSTED: dict[str, Callable[[Site], None]] = {
    "writable by the group": lambda site: site.snapshot.chmod(0o664),
    "writable by others": lambda site: site.snapshot.chmod(0o646),
    "a symbolic link": through_a_link,
    "of another version": edited(version=99),
    "of another file": edited(path="/etc/other.yaml"),
    "of other sources": edited(sources=[]),
    "not JSON": written("{"),
    "empty": written(""),
    "a list": written("[1]"),
    "a number": written("7"),
    "missing": lambda site: site.snapshot.unlink(),
}


@pytest.mark.parametrize("fault", DISTRUSTED)
def test_a_snapshot_that_is_not_believed(site: Site, fault: str) -> None:
    site.load()
    DISTRUSTED[fault](site)
    assert (site.load(), site.parsed) == (Config(retries=7), 2)


@root_only
def test_a_snapshot_of_somebody_else_is_not_believed(site: Site) -> None:
    site.load()
    edited(values={"retries": 99})(site)
    os.chown(site.snapshot, 2002, 2002)
    assert (site.load(), site.parsed) == (Config(retries=7), 2)


def test_the_sites_snapshot_comes_first(site: Site) -> None:
    site.load()
    document = json.loads(site.snapshot.read_text())
    document["values"]["retries"] = 70
    site.site_snapshot.write_text(json.dumps(document))
    site.site_snapshot.chmod(0o644)
    assert (site.load().retries, site.parsed) == (70, 1)


def test_values_of_a_newer_version_are_left_out(site: Site) -> None:
    site.load()
    document = json.loads(site.snapshot.read_text())
    document["values"]["of_tomorrow"] = 1
    del document["values"]["threads"]
    site.snapshot.write_text(json.dumps(document))
    assert (site.load(), site.parsed) == (Config(retries=7), 1)


def test_lists_come_back_as_tuples(site: Site) -> None:
    site.path.write_text("binds: ['/a:/b']\nenv: [A=1]\n")
    for _ in range(2):
        assert site.load()[:] == Config(binds=("/a:/b",), env=("A=1",))[:]


def test_a_bad_value_is_the_same_error_from_the_child(site: Site) -> None:
    site.path.write_text("retries: many\n")
    with pytest.raises(ConfigError, match=r"shifterwrap\.yaml: retries: a whole number from 0 to 100 is wanted"):
        site.load()
    assert not site.snapshot.exists()


def test_a_child_that_says_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.CompletedProcess([], -9, b"")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: gone)
    with pytest.raises(ConfigError, match="cannot be parsed"):
        site.load()


def test_no_place_for_a_snapshot_is_no_obstacle(site: Site) -> None:
    (site.run / "shifterwrap").write_text("in the way")
    assert [site.load(), site.load()] == [Config(retries=7)] * 2
    assert site.parsed == 2


def test_fingerprint_names_files_and_directory(site: Site) -> None:
    assert config.fingerprint(str(site.path))[1] == [str(site.drop_ins), 0, 0, 0]
    a_drop_in(site)
    (site.drop_ins / "not.txt").touch()
    names = [mark[0] for mark in config.fingerprint(str(site.path))]
    assert names == [str(site.path), str(site.drop_ins), str(site.drop_ins / "a.yaml")]


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o770, 0o707])
def test_runtime_dir(tmp_path: Path, mode: int) -> None:
    """Not in a directory that others may change."""
    base = tmp_path / "run"
    base.mkdir()
    base.chmod(mode)
    own = str(base / "shifterwrap") if not mode & 0o022 else f"/dev/shm/shifterwrap-{UID}"
    assert config.runtime_dir({"XDG_RUNTIME_DIR": str(base)}, UID) == own


@pytest.mark.parametrize("base", ["", "/nonexistent/run", "relative"])
def test_runtime_dir_without_a_session(base: str) -> None:
    assert config.runtime_dir({"XDG_RUNTIME_DIR": base} if base else {}, 4711) == "/dev/shm/shifterwrap-4711"


def test_runtime_dir_of_somebody_else(tmp_path: Path) -> None:
    assert config.runtime_dir({"XDG_RUNTIME_DIR": str(tmp_path)}, UID + 1) == f"/dev/shm/shifterwrap-{UID + 1}"
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert config.runtime_dir({"XDG_RUNTIME_DIR": str(link)}, UID) == f"/dev/shm/shifterwrap-{UID}"
