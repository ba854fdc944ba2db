"""sitefile.py: what each setting takes and refuses, and where its value came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from shifterwrap import config, sitefile
from shifterwrap.config import Config
from shifterwrap.errors import ConfigError
from shifterwrap.sitefile import SETTINGS

ROWS = {row.key: row for row in SETTINGS}


def test_there_is_a_row_for_every_setting_and_no_other() -> None:
    assert tuple(ROWS) == Config._fields


@pytest.mark.parametrize("key", ROWS)
def test_a_default_is_a_value_that_the_row_takes(key: str) -> None:
    row = ROWS[key]
    shown = yaml.safe_load(sitefile.show(row))
    assert row.parse(shown) == row.default
    assert row.help.endswith(".")
    assert row.form


GOOD: list[tuple[str, str, Any]] = [
    ("runtime", "embedded", "embedded"),
    ("default_registry", "registry.example:5000", "registry.example:5000"),
    ("insecure_registries", "[one.example, 'two.example:5000']", ("one.example", "two.example:5000")),
    ("insecure_registries", "[]", ()),
    ("local_scratch", "/scratch", "/scratch"),
    ("local_scratch", "''", ""),
    ("cache_max_bytes", "50G", 50 << 30),
    ("cache_max_bytes", "50 GiB", 50 << 30),
    ("cache_max_bytes", "1T", 1 << 40),
    ("cache_max_bytes", "10m", 10 << 20),
    ("cache_max_bytes", "4096", 4096),
    ("cache_max_bytes", "0", 0),
    ("cache_min_free_bytes", "512KB", 512 << 10),
    ("owner_policy", "keep", "keep"),
    ("compressor", "gzip", "gzip"),
    ("compression_level", "22", 22),
    ("block_bytes", "1M", 1 << 20),
    ("block_bytes", "65536", 65536),
    ("threads", "0", 0),
    ("retries", "0", 0),
    ("max_ratio", "100000", 100_000),
    ("mount_home", "false", False),
    ("mount_home", "no", False),
    ("binds", "['/a', '/a:/b', '/a:/b:ro']", ("/a", "/a:/b", "/a:/b:ro")),
    ("env", "[A=1, B=, 'C=a b=c']", ("A=1", "B=", "C=a b=c")),
    ("tool_path", "/opt/bin:/usr/bin", "/opt/bin:/usr/bin"),
]
BAD = [
    ("runtime", "docker"),
    ("runtime", "[embedded]"),
    ("default_registry", "'a b'"),
    ("default_registry", "5"),
    ("insecure_registries", "one.example"),
    ("insecure_registries", "[https://one.example]"),
    ("insecure_registries", "[1]"),
    ("local_scratch", "scratch"),
    ("local_scratch", "null"),
    ("cache_max_bytes", "-1"),
    ("cache_max_bytes", "1.5G"),
    ("cache_max_bytes", "50X"),
    ("cache_max_bytes", "G"),
    ("cache_max_bytes", "50GG"),
    ("cache_max_bytes", "true"),
    ("cache_max_bytes", "null"),
    ("cache_max_bytes", "[1]"),
    ("owner_policy", "mine"),
    ("compressor", "xz"),
    ("compression_level", "0"),
    ("compression_level", "23"),
    ("compression_level", "'1'"),
    ("compression_level", "1.0"),
    ("compression_level", "true"),
    ("block_bytes", "32K"),
    ("block_bytes", "2M"),
    ("block_bytes", "100000"),
    ("threads", "-1"),
    ("threads", "1025"),
    ("pull_deadline_seconds", "0"),
    ("connect_seconds", "0"),
    ("read_seconds", "3601"),
    ("retries", "101"),
    ("max_entries", "0"),
    ("max_ratio", "1"),
    ("mount_home", "0"),
    ("mount_home", "'true'"),
    ("binds", "/a:/b"),
    ("binds", "['/a:b']"),
    ("binds", "['/a:/']"),
    ("binds", "[1]"),
    ("env", "{A: 1}"),
    ("env", "[A]"),
    ("env", "['=1']"),
    ("env", "['a b=1']"),
    ("tool_path", "[/usr/bin]"),
    ("tool_path", '"a\\x1bb"'),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "shifterwrap.yaml"


def fail(text: str) -> None:
    raise AssertionError(text)


@pytest.mark.parametrize(("key", "text", "value"), GOOD)
def test_values(file: Path, key: str, text: str, value: Any) -> None:
    file.write_text(f"{key}: {text}\n")
    rows = {row.setting.key: row for row in sitefile.load(str(file), fail)}
    assert (rows[key].value, rows[key].source) == (value, str(file))
    assert {row.source for name, row in rows.items() if name != key} == {"default"}
    assert ROWS[key].parse(yaml.safe_load(sitefile.show(ROWS[key], value))) == value


@pytest.mark.parametrize(("key", "text"), BAD)
def test_bad_values_name_file_and_key(file: Path, key: str, text: str) -> None:
    file.write_text(f"{key}: {text}\n")
    with pytest.raises(ConfigError) as caught:
        sitefile.load(str(file), fail)
    assert caught.value.message.startswith(f"{file}: {key}: ")
    assert "wanted" in caught.value.message or "bind" in caught.value.message


def test_every_setting_has_a_bad_value() -> None:
    """But for what is any size."""
    assert set(ROWS) - {key for key, _ in BAD} == {"cache_min_free_bytes", "max_image_bytes"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [\n", "not YAML"),
        (b"a: b: c\n", "not YAML"),
        (b"\ttab: 1\n", "not YAML"),
        (b"key: \xff\n", "not YAML"),
        (b"key: !!python/object:os.system x\n", "not YAML"),
        (b"a: 1\n---\nb: 2\n", "not YAML"),
        (b"- a\n", "settings are KEY: VALUE lines"),
        (b"text\n", "settings are KEY: VALUE lines"),
        (b"[" * 5000, "not YAML"),
    ],
)
def test_files_that_are_none(file: Path, content: bytes, words: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        sitefile.load(str(file), fail)
    assert caught.value.message.startswith(f"{file}: ")
    assert words in caught.value.message


def test_a_file_that_cannot_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: str, **how: Any) -> NoReturn:
        raise PermissionError(13, "Permission denied", path)

    file.touch()
    monkeypatch.setattr(sitefile, "open", denied, raising=False)
    with pytest.raises(ConfigError, match=f"{file}: Permission denied"):
        sitefile.load(str(file), fail)


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n", "{}\n"])
def test_files_that_say_nothing(file: Path, content: str) -> None:
    file.write_text(content)
    assert {row.source for row in sitefile.load(str(file), fail)} == {"default"}


def test_unknown_keys_are_told_and_skipped(file: Path) -> None:
    file.write_text("of_tomorrow: 1\nretries: 7\n5: x\n")
    told: list[str] = []
    rows = {row.setting.key: row.value for row in sitefile.load(str(file), told.append)}
    assert told == [f"{file}: unknown setting of_tomorrow", f"{file}: unknown setting 5"]
    assert rows["retries"] == 7


def test_the_last_file_that_names_a_setting_wins(file: Path) -> None:
    more = file.parent / "conf.d"
    more.mkdir()
    file.write_text("retries: 1\nthreads: 1\nconnect_seconds: 1\n")
    (more / "b.yaml").write_text("retries: 3\n")
    (more / "a.yaml").write_text("retries: 2\nthreads: 2\n")
    (more / "c.yml").write_text("retries: 4\n")
    (more / "d.yaml").mkdir()
    rows = {row.setting.key: (row.value, row.source) for row in sitefile.load(str(file), fail)}
    assert rows["retries"] == (3, str(more / "b.yaml"))
    assert rows["threads"] == (2, str(more / "a.yaml"))
    assert rows["connect_seconds"] == (1, str(file))


def test_the_sample_is_comments_and_every_default() -> None:
    text = sitefile.sample()
    assert yaml.safe_load(text) is None
    active = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#") and not line.startswith("# "))
    values = yaml.safe_load(active)
    assert {key: ROWS[key].parse(value) for key, value in values.items()} == Config()._asdict()
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("cache_max_bytes", 50 << 30, "50G"),
        ("cache_max_bytes", 0, "0"),
        ("cache_max_bytes", 1000, "1000"),
        ("max_image_bytes", 1 << 40, "1T"),
        ("block_bytes", 128 << 10, "128K"),
        ("retries", 1024, "1024"),
        ("mount_home", True, "true"),
        ("binds", ("/a", "/b c"), '["/a", "/b c"]'),
        ("runtime", "auto", '"auto"'),
    ],
)
def test_show(key: str, value: Any, text: str) -> None:
    assert sitefile.show(ROWS[key], value) == text


def test_a_snapshot_becomes_a_config_again(file: Path) -> None:
    file.write_text("retries: 7\nbinds: ['/a:/b']\nmount_home: false\ncache_max_bytes: 1G\n")
    document = json.loads(json.dumps(sitefile.snapshot(str(file))))
    assert config.from_values(document["values"]) == Config(
        retries=7, binds=("/a:/b",), mount_home=False, cache_max_bytes=1 << 30
    )
    assert document["sources"] == config.fingerprint(str(file))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    return path


def test_answer_prints_and_keeps_the_snapshot(file: Path, run: Path, capsys: Any) -> None:
    file.write_text("retries: 7\n")
    assert sitefile.answer(str(file)) == 0
    printed = json.loads(capsys.readouterr().out)
    (kept,) = (run / "shifterwrap").iterdir()
    assert json.loads(kept.read_text()) == printed
    assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o644, 0o700)


def test_answer_of_a_mistake(file: Path, run: Path, capsys: Any) -> None:
    file.write_text("retries: many\n")
    assert sitefile.answer(str(file)) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["id"], error["message"].startswith(f"{file}: retries: ")) == ("ConfigError", True)
    assert list(run.iterdir()) == []


def open_to_all(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)


def somewhere_else(directory: Path) -> None:
    target = directory.parent / "target"
    target.mkdir()
    directory.symlink_to(target)


@pytest.mark.parametrize("make", [open_to_all, somewhere_else])
def test_no_snapshot_where_others_could_change_it(file: Path, run: Path, capsys: Any, make: Any) -> None:
    file.write_text("retries: 7\n")
    make(run / "shifterwrap")
    assert sitefile.answer(str(file)) == 0
    assert json.loads(capsys.readouterr().out)["values"]["retries"] == 7
    assert list((run / "shifterwrap").iterdir()) == []


def test_a_snapshot_that_cannot_be_kept_is_told(file: Path, run: Path, capsys: Any) -> None:
    file.write_text("retries: 7\n")
    (run / "shifterwrap").touch()
    assert sitefile.answer(str(file)) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["values"]["retries"] == 7
    assert err.startswith("shifterwrap: no configuration snapshot: ")
