"""The same requests through the runtimes of others: what docs/runtimes.rst says of apptainer and ch-run, tried."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.box import HOSTILE, Box, boxed, configured, eventually, scratch
from tests.testbed.stock import StockedRegistry

OTHERS = [pytest.param("apptainer", marks=pytest.mark.needs("apptainer")),
          pytest.param("charliecloud", marks=pytest.mark.needs("ch-run"))]
pytestmark = pytest.mark.needs("users", "registry", "userns", "squashfuse_ll")


@pytest.fixture(scope="module")
def box(registry: StockedRegistry) -> Iterator[Box]:
    """The laboratory's image in a tester's cache."""
    with scratch(Path("/var/tmp")) as place:
        yield boxed(registry, place, "swtester", "squashfs")


@pytest.fixture(params=OTHERS)
def runtime(request: pytest.FixtureRequest) -> str:
    """The name of a runtime that is not ours."""
    return str(request.param)


def run(box: Box, runtime: str, script: str, *options: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in the container of ``runtime``; /tmp is the one directory that all of them have."""
    return box.sh(script, options=("--runtime", runtime, *options), **{"cwd": "/tmp", **how})


def said(box: Box, runtime: str, script: str, *options: str | Path, **how: Any) -> str:
    """What a script prints that must end well."""
    done = run(box, runtime, script, *options, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_user_is_the_caller(box: Box, runtime: str) -> None:
    assert said(box, runtime, "id -u; id -g").split() == [str(box.person.uid), str(box.person.gid)]


def test_the_images_variables_arrive_byte_for_byte(box: Box, runtime: str) -> None:
    seen = dict(item.partition("=")[::2] for item in said(box, runtime, "cat /proc/self/environ").split("\0"))
    assert {name: seen.get(name) for name in HOSTILE} == HOSTILE
    assert seen["PATH"] == "/bin:/opt/tools"


def test_precedence_of_variables(box: Box, runtime: str) -> None:
    env = {"FOO": "host", "SLURM_PROCID": "3", "PMI_RANK": "5", "LD_PRELOAD": None, "MINE": "host", "GIVEN": "host"}
    script = "echo $FOO $SLURM_PROCID $PMI_RANK $MINE $GIVEN"
    assert said(box, runtime, script, "--env", "GIVEN=user", env=env) == "from-image 3 5 host user\n"


@pytest.mark.parametrize("value", ["$HOME `id` $(id)", "a,b:c", "'quoted'", 'say "x"', "back\\slash", "two\nlines", ""])
def test_the_users_variables_arrive_byte_for_byte(box: Box, runtime: str, value: str) -> None:
    assert said(box, runtime, 'printf %s "$GIVEN"', "--env", f"GIVEN={value}") == value


def test_an_images_variables_do_not_reach_the_runtime_itself(box: Box, runtime: str) -> None:
    plan = json.loads(run(box, runtime, "true", "--dry-run", "--json").stdout)
    assert not [name for name in plan["env"] if name.startswith("IMG_") or name in ("FOO", "SLURM_PROCID")]


def test_home_and_current_directory(box: Box, runtime: str) -> None:
    home = pwd.getpwuid(box.person.uid).pw_dir if runtime == "apptainer" else str(box.person.home)
    assert said(box, runtime, "pwd; echo $HOME").split() == ["/tmp", home]  # apptainer asks the name service


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_exit_code_is_the_commands(box: Box, runtime: str, code: int) -> None:
    assert run(box, runtime, f"exit {code}").returncode == code


def test_standard_input_is_piped_through(box: Box, runtime: str) -> None:
    assert said(box, runtime, "cat", input="some text\n") == "some text\n"


def test_arguments_arrive_as_given(box: Box, runtime: str) -> None:
    words = ["two words", "$HOME", "", "--flag", "it's", "new\nline", "*"]
    done = box.run("sh", "-c", "printf '%s|' \"$@\"", "sh", *words, options=("--runtime", runtime), cwd="/tmp")
    assert done.stdout == "".join(f"{word}|" for word in words)


def test_bind_a_directory_and_start_in_it(box: Box, runtime: str, workspace: Path) -> None:
    (workspace / "file").write_text("of the host\n")
    options = ("--bind", f"{workspace}:/data/real", "--workdir", "/data/real")
    assert said(box, runtime, "pwd; cat file", *options) == "/data/real\nof the host\n"


def test_a_missing_source_is_said_before_the_runtime_starts(box: Box, runtime: str) -> None:
    done = run(box, runtime, "true", "--bind", "/no/such/place:/data/real")
    assert done.returncode == 125
    assert done.stderr.startswith("wrapped-run: bind source /no/such/place: ")


@pytest.mark.needs("apptainer")
def test_a_read_only_bind_is_read_only(box: Box, workspace: Path) -> None:
    os.chown(workspace, box.person.uid, box.person.gid)
    done = run(box, "apptainer", "touch /data/real/x", "--bind", f"{workspace}:/data/real:ro")
    assert done.returncode != 0
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize(("name", "options", "words"), [
    pytest.param("charliecloud", ("--writable-tmpfs",), "ch-run has no --writable-tmpfs", marks=OTHERS[1].marks),
    pytest.param("charliecloud", ("--bind", "/tmp:/data/real:ro"), "read-only", marks=OTHERS[1].marks),
    pytest.param("apptainer", ("--env", "A.B=1"), "cannot set the variable A.B", marks=OTHERS[0].marks),
])
def test_what_a_runtime_cannot_do_is_refused(box: Box, name: str, options: tuple[str, ...], words: str) -> None:
    done = run(box, name, "true", *options)
    assert done.returncode == 125
    assert words in done.stderr
    assert "--runtime embedded" in done.stderr


def test_the_lease_is_held_as_long_as_the_command_runs(box: Box, runtime: str) -> None:
    with box.running(options=("--runtime", runtime), cwd="/tmp") as process:
        assert box.in_use()
        assert "in use" in box.person.run(["shifterwrap", "rm", box.image]).stderr
        process.communicate()  # killed by -9, apptainer leaves its FUSE server behind, with the lease
    eventually(lambda: not box.in_use(), "the lease ends with the command")


def test_the_last_line_of_a_dry_run_can_be_pasted(box: Box, runtime: str) -> None:
    plan = run(box, runtime, "echo $FOO $GIVEN", "--dry-run", "--env", "GIVEN=a b $c")
    assert plan.returncode == 0, plan.stderr
    line = plan.stdout[plan.stdout.index("/ch-run") - 8 :] if runtime == "charliecloud" else plan.stdout
    start = line.index("env ") if runtime == "apptainer" else line.index("/")
    done = box.person.run(["bash", "-c", line[start:]], cwd="/tmp")
    assert done.stdout == "from-image a b $c\n", done.stderr


@pytest.mark.needs("apptainer")
def test_apptainer_is_preferred_unless_the_site_says_otherwise(box: Box) -> None:
    def chosen(settings: str) -> str:
        argv = ["wrapped-run", "--dry-run", box.image, "true"]
        return box.person.run(argv, env=configured(box.person, settings)).stdout.splitlines()[0]

    assert chosen("") == "runtime apptainer"
    assert chosen("runtime: embedded\n") == "runtime embedded"


def test_a_runtime_that_is_not_there_is_said(box: Box) -> None:
    for name, words in (("charliecloud", "is not installed"), ("nosuch", "unknown runtime")):
        argv = ["wrapped-run", "--runtime", name, box.image, "true"]
        done = box.person.run(argv, env=configured(box.person, "tool_path: /usr/sbin\n"))
        assert done.returncode == 125
        assert words in done.stderr
