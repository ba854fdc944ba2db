"""launch.py: what is decided before a container is built, and what main prints."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shifterwrap import config, host, launch
from shifterwrap.config import Config
from shifterwrap.errors import Error, RuntimeUnavailable, UsageError
from tests.unit.test_host import FACTS


@pytest.fixture(autouse=True)
def _no_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SITE_FILE", str(tmp_path / "none.yaml"))
    monkeypatch.setenv("SHIFTERWRAP_CACHE_DIR", str(tmp_path / "cache"))


def installed(place: Path, *names: str) -> Config:
    for name in names:
        (place / name).touch(0o755)
    return Config(tool_path=str(place))


@pytest.mark.parametrize(
    ("wanted", "programs", "chosen"),
    [
        ("auto", (), "embedded"),
        ("auto", ("apptainer",), "apptainer"),
        ("auto", ("singularity",), "apptainer"),
        ("auto", ("ch-run",), "embedded"),
        ("embedded", ("apptainer",), "embedded"),
        ("apptainer", ("apptainer",), "apptainer"),
        ("charliecloud", ("ch-run",), "charliecloud"),
        ("apptainer", (), RuntimeUnavailable),
        ("charliecloud", ("apptainer",), RuntimeUnavailable),
        ("docker", (), UsageError),
        ("", (), UsageError),
    ],
)
def test_choose_runtime(tmp_path: Path, wanted: str, programs: tuple[str, ...], chosen: object) -> None:
    settings = installed(tmp_path, *programs)
    if isinstance(chosen, str):
        assert launch.choose_runtime(wanted, settings) == chosen
        return
    assert isinstance(chosen, type) and issubclass(chosen, Error)
    with pytest.raises(chosen):
        launch.choose_runtime(wanted, settings)


def test_who_somebody_is(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = pwd.getpwuid(0)
    monkeypatch.delenv("HOME", raising=False)
    user = launch.who(FACTS._replace(uid=0, gid=0))
    assert (user.uid, user.gid, user.name, user.home, user.shell) == (0, 0, entry.pw_name, entry.pw_dir, entry.pw_shell)
    monkeypatch.setenv("HOME", "/elsewhere")
    assert launch.who(FACTS._replace(uid=0)).home == "/elsewhere"


def test_who_somebody_unknown_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uid that comes from a directory service which does not answer on this node."""
    monkeypatch.delenv("HOME", raising=False)
    user = launch.who(FACTS._replace(uid=3_999_999_999, gid=3_999_999_998))
    assert user[:] == (3_999_999_999, 3_999_999_998, "3999999999", "3999999998", "", "/bin/sh")


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, None), ({"LC_CTYPE": "C"}, "C"), ({"LC_CTYPE": "C.UTF-8"}, "C.UTF-8"), ({"LC_CTYPE": ""}, ""),
        ({"LANG": "C.UTF-8"}, None), ({"LC_ALL": "C"}, None), ({"LC_CTYPE": "POSIX"}, "POSIX"),
    ],
)
def test_the_callers_locale(given: dict[str, str], seen: Any) -> None:
    """Python coerces the C locale before any code of ours runs, so only a new process can show it."""
    code = "import json; from shifterwrap import launch; print(json.dumps(launch.caller_environment()))"
    env = {"PATH": "/usr/bin:/bin", "RAW": "caf\udce9", **given}
    where = Path(launch.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=where, stdout=subprocess.PIPE, check=True)
    environ = json.loads(done.stdout)
    assert environ.get("LC_CTYPE") == seen
    assert {name: value for name, value in environ.items() if name != "LC_CTYPE"} == {
        name: value for name, value in env.items() if name != "LC_CTYPE"
    }


def test_a_current_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = launch.who(FACTS)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    assert launch._cwd(user) == str(gone)
    gone.rmdir()
    assert launch._cwd(user) == "/"
    os.chdir(tmp_path)


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        (["--help"], 0, "usage: wrapped-run", ""),
        (["-vh", "x"], 0, "usage: wrapped-run", ""),
        (["--version"], 0, "wrapped-run 0", ""),
        ([], 125, "", "wrapped-run: no IMAGE given (usage: wrapped-run"),
        (["--nothing", "x"], 125, "", "wrapped-run: unknown option --nothing"),
        (["--runtime", "docker", "x:1"], 125, "", "wrapped-run: unknown runtime 'docker'"),
        (["docker://UPPER/case:1"], 125, "", "wrapped-run: "),
        (["--pull", "never", "x:1", "true"], 125, "", "wrapped-run: docker://docker.io/library/x:1 is not cached"),
        (["--dry-run", "x:1", "true"], 125, "", "wrapped-run: docker://docker.io/library/x:1 is not cached"),
    ],
)
def test_main(
    argv: list[str], code: int, out: str, err: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["wrapped-run", *argv])
    monkeypatch.setattr(host, "runtime_program", lambda *_: "")
    assert launch.main() == code
    said = capsys.readouterr()
    assert (said.out[: len(out)], said.err[: len(err)]) == (out, err)
    assert (bool(said.out), bool(said.err)) == (bool(out), bool(err))


@pytest.mark.parametrize("argv", [["--json"], ["--json", "--pull", "never", "x:1"], ["--json", "--bind", "x:y", "i"]])
def test_main_for_machines(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["wrapped-run", *argv])
    assert launch.main() == 125
    said = capsys.readouterr()
    assert set(json.loads(said.out)["error"]) == {"id", "message", "hint"}
    assert said.err.startswith("wrapped-run: ")
