"""Whatever Python the user has in his environment or around him, the commands run with theirs, cold and warm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import BASE
from tests.integration.box import copied, environment, pip, scratch
from tests.testbed.people import Person
from tests.testbed.stock import StockedRegistry

pytestmark = pytest.mark.needs("users", "registry", "userns", "fuse", "squashfuse_ll")

BIN = Path(sys.executable).parent
BROKEN = "raise SystemExit('hijacked')\n"
NAMES = ("json.py", "typing.py", "os.py", "sitecustomize.py", "usercustomize.py", "requests.py", "yaml.py",
         "filelock.py", "ctypes.py", "site.py", "isal.py", "subprocess.py", "shifterwrap/__init__.py",
         "shifterwrap/launch.py", "shifterwrap/cli.py", "shifterwrap/pull.py")


class Attack(NamedTuple):
    """What somebody has around him when he starts a command."""

    env: Mapping[str, str | None] = {}
    inside: str = ""


def trap(place: Path) -> Path:
    """A directory full of modules that end whoever imports them."""
    for name in NAMES:
        path = place / "trap" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(BROKEN)
    fake = place / "trap" / "bin"
    fake.mkdir()
    for name in ("python", "python3", f"python3.{sys.version_info[1]}", "env", "readlink"):
        (fake / name).write_text("#!/bin/sh\necho hijacked >&2\nexit 99\n")
        (fake / name).chmod(0o755)
    (place / "trap" / "startup.py").write_text(BROKEN)
    return place / "trap"


ATTACKS: dict[str, Callable[[Path, Person], Attack]] = {
    "nothing": lambda trap, person: Attack(),
    "PYTHONPATH": lambda trap, person: Attack({"PYTHONPATH": str(trap)}),
    "PYTHONHOME": lambda trap, person: Attack({"PYTHONHOME": "/nonexistent"}),
    "PYTHONSTARTUP and friends": lambda trap, person: Attack({
        "PYTHONSTARTUP": f"{trap}/startup.py", "PYTHONINSPECT": "1", "PYTHONPLATLIBDIR": "none", "PYTHONVERBOSE": "1",
        "PYTHONIOENCODING": "ascii", "PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error", "PYTHONUSERBASE": str(trap),
        "PYTHONEXECUTABLE": "/bin/false", "__PYVENV_LAUNCHER__": "/bin/false",
        "PYTHONBREAKPOINT": "os.abort", "PYTHONCASEOK": "1", "PYTHONOPTIMIZE": "2",
    }),
    "a virtual environment": lambda trap, person: Attack({
        "VIRTUAL_ENV": str(trap), "PATH": f"{trap}/bin:{person.env['PATH']}",
    }),
    "conda": lambda trap, person: Attack({
        "CONDA_PREFIX": str(trap), "CONDA_DEFAULT_ENV": "base", "CONDA_SHLVL": "1", "_CE_CONDA": "",
        "CONDA_PYTHON_EXE": f"{trap}/bin/python", "PATH": f"{trap}/bin:{person.env['PATH']}",
        "PYTHONNOUSERSITE": "", "LD_LIBRARY_PATH": f"{trap}/lib",
    }),
    "the current directory": lambda trap, person: Attack(inside=str(trap)),
    "a shell's own": lambda trap, person: Attack({
        "ENV": f"{trap}/startup.py", "BASH_ENV": f"{trap}/startup.py", "IFS": "/", "CDPATH": "/",
        "POSIXLY_CORRECT": "1",
    }),
    "no HOME": lambda trap, person: Attack({"HOME": None}),
    "no USER": lambda trap, person: Attack({"USER": None, "LOGNAME": None}),
    "no locale": lambda trap, person: Attack({"LANG": None}),
    "a locale that is not there": lambda trap, person: Attack({"LANG": "xx_YY.UTF-8", "LC_ALL": "xx_YY"}),
    "an empty environment": lambda trap, person: Attack({
        name: None for name in person.env if name != "SHIFTERWRAP_CACHE_DIR"
    }),
    "user site": lambda trap, person: Attack(),
}


def everything_works(
    person: Person, image: str, attack: Attack, programs: Path = BIN, before: tuple[str | Path, ...] = ()
) -> None:
    """Cold, warm, and the administrator's command."""
    cwd = attack.inside or None

    def run(*words: str | Path) -> tuple[int, str, str]:
        done = person.run([*before, programs / words[0], *words[1:]], env=attack.env, cwd=cwd)
        said = [line for line in done.stderr.splitlines(keepends=True) if "getcwd() failed" not in line]  # says sh
        return done.returncode, done.stdout, "".join(said)

    launch = ("wrapped-run", "--runtime", "embedded", image, "echo", "said")
    code, out, err = run(*launch)
    assert (code, out) == (0, "said\n"), err
    assert all(line.startswith("wrapped-run: ") for line in err.splitlines())
    assert run(*launch) == (0, "said\n", "")
    code, out, err = run("shifterwrap", "verify")
    assert (code, out[:2], err) == (0, "ok", "")
    assert run("shifterwrap", "rm", image)[0] == 0
    code, out, err = run("shifterwrap", "pull", image)
    assert (code, out.split()[0]) == (0, image), err


@pytest.mark.parametrize("name", ATTACKS)
def test_the_users_python_is_not_ours(name: str, registry: StockedRegistry, tester: Person, workspace: Path) -> None:
    attack = ATTACKS[name](trap(workspace), tester)
    if name == "user site":
        place = tester.home / ".local/lib" / f"python3.{sys.version_info[1]}" / "site-packages"
        shutil.copytree(workspace / "trap", place)
        (place / "evil.pth").write_text("import os; os._exit(98)\n")
        subprocess.run(["chown", "-R", f"{tester.uid}:{tester.gid}", tester.home / ".local"], check=True)
    everything_works(tester, registry.image("busybox"), attack)


def test_the_command_still_gets_what_the_user_set(registry: StockedRegistry, tester: Person) -> None:
    """Isolation is ours: variables that mean nothing on the host only pass unchanged."""
    env = {"PYTHONUNBUFFERED": "1", "PYTHONSTARTUP": "/x", "IFS": "/"}
    argv = ["wrapped-run", "--runtime", "embedded", registry.image("busybox"), "env"]
    lines = tester.run(argv, env=env).stdout.splitlines()
    assert {f"{name}={value}" for name, value in env.items()} - {"IFS=/"} <= set(lines)


# ---- where the command is started


def test_a_current_directory_that_cannot_be_read(registry: StockedRegistry, tester: Person, workspace: Path) -> None:
    closed = workspace / "closed"
    closed.mkdir()
    script = 'chmod 700 "$0"; cd "$0"; shift; chmod 0 .; exec "$@"'
    os.chown(closed, tester.uid, tester.gid)
    everything_works(tester, registry.image("busybox"), Attack(), before=("sh", "-c", script, closed, "x"))


def test_a_current_directory_that_was_removed(registry: StockedRegistry, tester: Person, workspace: Path) -> None:
    os.chown(workspace, tester.uid, tester.gid)
    script = 'mkdir "$0"; cd "$0"; rmdir "$0"; shift; exec "$@"'
    everything_works(tester, registry.image("busybox"), Attack(), before=("sh", "-c", script, workspace / "gone", "x"))


def absolute(place: Path) -> Path:
    for name in ("wrapped-run", "shifterwrap"):
        (place / name).symlink_to(BIN / name)
    return place


def relative_chain(place: Path) -> Path:
    (place / "one").mkdir()
    for name in ("wrapped-run", "shifterwrap"):
        (place / "one" / name).symlink_to(os.path.relpath(BIN / name, place / "one"))
        (place / name).symlink_to(f"one/{name}")
    return place


def through_a_directory(place: Path) -> Path:
    (place / "bin dir").symlink_to(BIN)
    return place / "bin dir"


@pytest.mark.parametrize("link", [absolute, relative_chain, through_a_directory])
def test_commands_started_through_links(
    link: Callable[[Path], Path], registry: StockedRegistry, tester: Person, workspace: Path
) -> None:
    (workspace / "links").mkdir()
    everything_works(tester, registry.image("busybox"), Attack(), link(workspace / "links"))


# ---- where the package is installed


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    """The checkout as its users get it, to be built and installed from."""
    with scratch(BASE) as place:
        copied(place / "copy")
        yield place


def in_a_virtual_environment(place: Path) -> Path:
    return environment(place / "venv", place / "copy")


def editable(place: Path) -> Path:
    return environment(place / "editable", "--editable", place / "copy")


def in_a_prefix(place: Path) -> Path:
    """As a distribution's package, or `pip install --prefix` and `--user`."""
    pip(sys.executable, "--ignore-installed", "--prefix", place / "prefix", place / "copy")
    return place / "prefix" / "bin"


def in_a_target(place: Path) -> Path:
    pip(sys.executable, "--target", place / "target", place / "copy")
    return place / "target" / "bin"


@pytest.mark.parametrize("install", [in_a_virtual_environment, editable, in_a_prefix, in_a_target])
def test_ways_to_install(
    install: Callable[[Path], Path], copy: Path, registry: StockedRegistry, tester: Person, workspace: Path
) -> None:
    programs = install(copy)
    everything_works(tester, registry.image("busybox"), Attack({"PYTHONPATH": str(trap(workspace))}), programs)
    done = tester.run([programs / "wrapped-run", "--version"])
    assert done.stdout.startswith("wrapped-run ")
