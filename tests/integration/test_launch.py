"""The embedded runtime: what a command finds in the container, and that it is the caller's own process.

Everything runs four times: as an ordinary user and as root, from a squashfs file and from a directory tree.
"""

from __future__ import annotations

import grp
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Optional

import pytest

from tests.conftest import BASE
from tests.integration.box import HOSTILE, Box, boxed, configured, eventually, published, scratch, servers
from tests.testbed.images import BUSYBOX, busybox_layer
from tests.testbed.ocilayout import Image, Layer, file, tar
from tests.testbed.stock import StockedRegistry

pytestmark = pytest.mark.needs("users", "registry", "userns", "squashfs-mount", "fuse", "squashfuse_ll")

STATUS = ("Uid", "Gid", "Groups", "SigIgn", "SigBlk", "SigCgt", "Umask", "NoNewPrivs")


@pytest.fixture(scope="module")
def boxes(registry: StockedRegistry) -> Iterator[Callable[[str], Box]]:
    """Who and what by name, each made when it is first asked for."""
    made: dict[str, Box] = {}
    (BASE / "tmp").mkdir(parents=True, exist_ok=True)
    with scratch(BASE / "tmp") as place:

        def make(name: str) -> Box:
            if name not in made:
                user, kind = name.split("-")
                (place / name).mkdir()
                made[name] = boxed(registry, place / name, user, kind)
            return made[name]

        yield make


@pytest.fixture(params=["swtester-squashfs", "swtester-tree", "root-squashfs", "root-tree"])
def box(request: pytest.FixtureRequest, boxes: Callable[[str], Box]) -> Box:
    return boxes(request.param)


@pytest.fixture(params=["swtester-squashfs", "root-tree"])
def either(request: pytest.FixtureRequest, boxes: Callable[[str], Box]) -> Box:
    """For what depends little on who runs from what."""
    return boxes(request.param)


@pytest.fixture
def tester_box(boxes: Callable[[str], Box]) -> Box:
    """For what does not depend on the runtime."""
    return boxes("swtester-squashfs")


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A directory for everybody that no bind of every container covers."""
    with scratch(Path("/opt")) as path:
        path.chmod(0o777)
        yield path


def status(pid: int) -> dict[str, str]:
    """Of /proc/PID/status, what an execve must keep."""
    rows = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: " ".join(value.split()) for name, value in rows if name in STATUS}


# ---- who the command is


def test_the_kernel_sees_the_same_ids(box: Box) -> None:
    groups = [60123, 60124]
    with box.running(extra_groups=groups) as process:
        seen = status(process.pid)
    assert seen["Uid"] == " ".join([str(box.person.uid)] * 4)
    assert seen["Gid"] == " ".join([str(box.person.gid)] * 4)
    assert seen["Groups"].split() == [str(group) for group in groups]


def test_supplementary_groups_open_files(box: Box, workspace: Path) -> None:
    shared = workspace / "shared"
    shared.write_text("for the group")
    os.chown(shared, 0, 60123)
    shared.chmod(0o040)
    assert box.out('cat "$1"', shared, extra_groups=[60123]) == "for the group"


def test_the_command_is_the_process_that_was_started(box: Box) -> None:
    """Signals, limits, a job's accounting and srun's bookkeeping all hang on that."""
    process = box.person.popen(box.argv(("sh", "-c", "echo $$; cut -d' ' -f 4-6 /proc/$$/stat")))
    said, _ = process.communicate()
    pid, parent_group_session = said.splitlines()
    assert int(pid) == process.pid
    assert parent_group_session == f"{os.getpid()} {os.getpgid(0)} {os.getsid(0)}"


def test_signal_dispositions_are_the_callers(either: Box) -> None:
    """Python ignores SIGPIPE and SIGXFSZ for itself; a command that inherits that never ends in `cmd | head`."""
    done = either.run("cat", "/proc/self/status")
    rows = dict(line.split(":\t", 1) for line in done.stdout.splitlines())
    assert {name: int(rows[name], 16) for name in ("SigIgn", "SigBlk", "SigCgt")} == {
        "SigIgn": 0, "SigBlk": 0, "SigCgt": 0,
    }


@pytest.mark.parametrize("umask", ["0000", "0022", "0077", "0137"])
def test_umask_and_limits_are_the_callers(box: Box, umask: str) -> None:
    script = f'ulimit -n 99; ulimit -c 0; umask {umask}; exec "$@"'
    argv = ["sh", "-c", script, "sh", *box.argv(("sh", "-c", "ulimit -n; ulimit -c; umask"))]
    done = box.person.run(argv)
    assert (done.stdout.split(), done.stderr) == (["99", "0", umask], "")


def test_names_of_user_and_group(box: Box) -> None:
    group = grp.getgrgid(box.person.gid).gr_name
    assert box.out("id -un; id -gn; id -u; id -g").split() == [
        box.person.name, group, str(box.person.uid), str(box.person.gid),
    ]


def test_passwd_is_the_images_and_the_users_line(box: Box) -> None:
    lines = box.out("cat /etc/passwd").splitlines()
    image = ["root:x:0:0:root:/root:/bin/sh", "nobody:x:65534:65534:nobody:/:/bin/false"]
    assert lines[:2] == image
    added = [line.split(":") for line in lines[2:]]
    person = box.person
    expected = [person.name, "x", str(person.uid), str(person.gid), person.name, str(person.home), "/bin/sh"]
    assert added == ([] if person.uid == 0 else [expected])
    assert box.out("cat /etc/group").splitlines()[:2] == ["root:x:0:", "nogroup:x:65534:"]


def test_a_setuid_program_gains_nothing(registry: StockedRegistry, workspace: Path) -> None:
    """Neither one of the image, which only owner_policy keep leaves in it, nor one of the host."""
    box = boxed(registry, workspace, "swtester", "squashfs", "owner_policy: keep\n")
    keep = configured(box.person, "owner_policy: keep\n")
    assert box.out("stat -c %a /opt/suid/id", env=keep) == "4755\n"
    host = workspace / "id"
    shutil.copy(BUSYBOX, host)
    host.chmod(0o4755)
    for program in ("/opt/suid/id", str(host)):
        assert box.out('"$1" -u', program, env=keep) == f"{box.person.uid}\n"


# ---- what the command sees of the host


def test_home_is_there_for_reading_and_writing(box: Box) -> None:
    with scratch(Path("/opt")) as home:
        os.chown(home, box.person.uid, box.person.gid)
        home.chmod(0o700)
        (home / "before").write_text("read me")
        said = box.out('cat ~/before; echo new >~/after; echo " $HOME"', env={"HOME": str(home)}, cwd="/")
        after = home / "after"
        assert (said, after.read_text()) == (f"read me {home}\n", "new\n")
        assert (after.stat().st_uid, after.stat().st_gid) == (box.person.uid, box.person.gid)


def test_no_home_where_the_site_says_so(box: Box) -> None:
    with scratch(Path("/opt")) as home:
        env = {"HOME": str(home), **configured(box.person, "mount_home: false\n")}
        assert box.out(f"test -e {home} || echo none", env=env, cwd="/") == "none\n"


def test_current_directory_is_kept(box: Box, elsewhere: Path) -> None:
    deep = elsewhere / "a b" / "c:d"
    deep.mkdir(parents=True)
    (deep / "file").write_text("here")
    assert box.out("pwd; cat file", cwd=deep) == f"{deep}\nhere"


@pytest.mark.parametrize("path", ["/tmp", "/var/tmp", "/dev/shm"])
def test_current_directory_in_what_every_container_has(box: Box, path: str) -> None:
    assert box.out("pwd", cwd=path) == f"{path}\n"


@pytest.mark.parametrize("path", ["/", "/usr", "/usr/lib", "/etc", "/home", "/opt", "/proc/self"])
def test_current_directory_of_the_operating_system_is_the_images(box: Box, path: str) -> None:
    """The host's /usr says nothing about the image's: such a directory is neither bound nor entered."""
    assert box.out("pwd; head -n 1 /etc/os-release", cwd=path) == '/worktop\nNAME="shifterwrap testbed"\n'


def test_a_removed_current_directory_is_no_obstacle(box: Box, elsewhere: Path) -> None:
    gone = elsewhere / "gone"
    gone.mkdir()
    os.chown(gone, box.person.uid, box.person.gid)
    argv = ["sh", "-c", 'rmdir "$0"; exec "$@"', gone, *box.argv(("pwd",))]
    done = box.person.run(argv, cwd=gone)
    assert (done.returncode, done.stdout) == (0, "/worktop\n"), done.stderr


@pytest.mark.parametrize("path", ["/tmp", "/var/tmp", "/dev/shm"])
def test_scratch_is_the_hosts(box: Box, path: str) -> None:
    with scratch(Path(path)) as place:
        os.chown(place, box.person.uid, box.person.gid)
        (place / "in").write_text("in")
        assert box.out('cat "$1/in"; echo out >"$1/out"', place) == "in"
        assert (place / "out").read_text() == "out\n"


def test_devices_and_kernel_interfaces(box: Box) -> None:
    script = """
        echo gone >/dev/null; head -c 3 /dev/zero | wc -c; test -c /dev/urandom && test -d /dev/pts
        test "$(cat /proc/self/comm)" = cat; test -d /sys/kernel && test -r /sys/devices/system/cpu/online
        readlink /proc/$$/exe"""
    assert box.out(f"set -e; {script}") == "3\n/bin/busybox\n"


@pytest.mark.parametrize("path", ["/etc/resolv.conf", "/etc/hosts"])
def test_name_resolution_is_the_hosts(box: Box, path: str) -> None:
    assert box.out('cat "$1"', path) == Path(path).read_text()


def test_what_the_host_keeps_to_itself(box: Box) -> None:
    """No path of the host's operating system, and nothing of what the container was built with."""
    names = set(box.out("ls -a /").split())
    assert names == {
        ".", "..", "bin", "data", "dev", "etc", "home", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp",
        "usr", "var", "worktop",
    }
    mounts = [line.split()[4] for line in box.out("cat /proc/self/mountinfo").splitlines()]
    assert mounts[0] == "/"
    assert not [path for path in mounts if path.startswith(("/old", "/lower", "/points", "/made", "/upper"))]


def test_the_root_is_read_only(box: Box) -> None:
    script = """
        for path in /new /etc/new /worktop/new /data/real/file /etc/passwd.new; do
            (echo x >"$path") 2>/dev/null && echo "wrote $path"
        done
        rm /data/real/file 2>/dev/null && echo removed; mkdir /home/new 2>/dev/null && echo made; true"""
    assert box.out(script) == ""


# ---- environment


Variables = Mapping[str, Optional[str]]


def environment(box: Box, options: tuple[str | Path, ...] = (), env: Variables | None = None) -> dict[str, str]:
    """The command's environment as the kernel has it."""
    done = box.run("cat", "/proc/self/environ", options=options, env=env, errors="surrogateescape")
    assert (done.returncode, done.stderr) == (0, "")
    return dict(item.partition("=")[::2] for item in done.stdout.split("\0")[:-1])


def test_the_images_variables_arrive_byte_for_byte(box: Box) -> None:
    seen = environment(box)
    assert {name: seen.get(name) for name in HOSTILE} == HOSTILE


MINE = {**{name.replace("IMG", "MY"): value for name, value in HOSTILE.items()}, "MY_LATIN": "caf\udce9"}


@pytest.mark.parametrize("way", ["host", "--env", "-e"])
def test_the_callers_variables_arrive_byte_for_byte(either: Box, way: str) -> None:
    options = {
        "host": [],
        "--env": [word for name, value in MINE.items() for word in ("--env", f"{name}={value}")],
        "-e": [word for name in MINE for word in ("-e", name)],
    }
    seen = environment(either, tuple(options[way]), {} if way == "--env" else MINE)
    assert {name: seen.get(name) for name in MINE} == MINE


def test_names_that_no_shell_takes(either: Box) -> None:
    seen = environment(either, ("--env", "my.dotted-name=x", "--env", "1=2"))
    assert (seen["my.dotted-name"], seen["1"]) == ("x", "2")


def test_variables_from_a_file(tester_box: Box, workspace: Path) -> None:
    path = workspace / "variables"
    path.write_bytes(b"# a comment\n\nFILE_ONE=1\n  FILE_TWO=two words  \nFILE_RAW=\xe9\nFOO=file\nBOTH=file\nUSER\n")
    seen = environment(tester_box, ("--env-file", path, "--env", "BOTH=option"))
    named = {name: seen.get(name) for name in ("FILE_ONE", "FILE_TWO", "FILE_RAW", "FOO", "BOTH", "USER")}
    assert named == {
        "FILE_ONE": "1", "FILE_TWO": "two words", "FILE_RAW": "\udce9", "FOO": "file", "BOTH": "option",
        "USER": "swtester",
    }


def test_precedence(box: Box) -> None:
    """Host, then image, then site, then request; what belongs to the job, and HOME, no image changes."""
    env = {
        **configured(box.person, "env: [SITE=site, BOTH=site]\n"),
        "FOO": "host", "KEPT": "host", "SITE": "host", "BOTH": "host", "HOME": "/tmp", "PMI_RANK": "3",
        "SLURM_PROCID": "3", "LD_PRELOAD": "/no.so", "LD_LIBRARY_PATH": "/lib", "PYTHONPATH": "/x", "BASH_ENV": "/x",
        "CONDA_PREFIX": "/x", "VIRTUAL_ENV": "/x", "BASH_FUNC_f%%": "() { :; }", "LC_ALL": "C",
    }
    if box.person.uid == 0:  # the linker would ask for it on standard error
        del env["LD_PRELOAD"]
    done = box.run("cat", "/proc/self/environ", options=("--env", "BOTH=request", "-e", "UNSET"), env=env)
    seen = dict(item.partition("=")[::2] for item in done.stdout.split("\0")[:-1])
    assert {name: seen.get(name) for name in ("FOO", "KEPT", "SITE", "BOTH", "HOME", "PMI_RANK", "SLURM_PROCID")} == {
        "FOO": "from-image", "KEPT": "host", "SITE": "site", "BOTH": "request", "HOME": "/tmp", "PMI_RANK": "3",
        "SLURM_PROCID": "3",
    }
    assert (seen["PATH"], seen["PWD"], seen["LC_ALL"]) == ("/bin:/opt/tools", str(box.person.home), "C")
    assert "PMIX_RANK" not in seen
    hidden = {"LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "BASH_ENV", "CONDA_PREFIX", "VIRTUAL_ENV", "UNSET"}
    assert not {name for name in seen if name in hidden or name.startswith(("BASH_FUNC", "SHIFTERWRAP_"))}


@pytest.mark.parametrize("given", [None, "C.UTF-8", "C", "de_DE.UTF-8"])
def test_no_locale_is_added_or_changed(either: Box, given: str | None) -> None:
    """Python started with the C locale sets LC_CTYPE for its children (PEP 538)."""
    assert environment(either, env={"LANG": None, "LC_CTYPE": given}).get("LC_CTYPE") == given


# ---- streams, signals, exit codes


def test_standard_input_is_piped_through(box: Box) -> None:
    data = random.Random(1).randbytes(2 << 20)
    done = box.run("sha256sum", input=data.decode("latin-1"), encoding="latin-1")
    assert done.stdout.split()[0] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("code", [0, 1, 77, 125, 126, 127, 128, 137, 255])
def test_exit_code_is_the_commands(either: Box, code: int) -> None:
    done = either.sh(f"exit {code}")
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGPIPE, signal.SIGINT])
def test_death_by_a_signal(either: Box, number: signal.Signals) -> None:
    script = f"kill -{int(number)} $$"
    assert either.sh(script).returncode == -number
    shell = ["sh", "-c", '"$@"; echo $?', "sh", *either.argv(("sh", "-c", script))]
    assert either.person.run(shell).stdout == f"{128 + number}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_to_the_process_reach_the_command(box: Box, number: signal.Signals) -> None:
    name = number.name[len("SIG") :]
    loop = f"trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.02; done"
    process = box.person.popen(box.argv(("sh", "-c", loop)))
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said, _ = process.communicate()
    assert (process.returncode, said) == (9, f"got {name}\n")


def test_open_descriptors_pass(box: Box, workspace: Path) -> None:
    """srun gives the PMI socket to its tasks that way."""
    (workspace / "note").write_text("through five")
    script = 'exec 5<"$0"; exec "$@"'
    done = box.person.run(["sh", "-c", script, workspace / "note", *box.argv(("sh", "-c", "cat <&5"))])
    assert (done.stdout, done.stderr) == ("through five", "")


def test_the_command_gets_no_descriptor_of_ours(box: Box) -> None:
    """But for the lease, which is the point of it."""
    with box.running() as process:
        links = {int(fd.name): os.readlink(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()}
    extra = [path for fd, path in links.items() if fd > 2]
    assert len(extra) == 1
    assert extra[0].endswith("/lock")


@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
def test_closed_standard_streams(box: Box, closed: str, workspace: Path) -> None:
    """Neither the lease nor the FUSE device becomes standard input or output; what was closed is /dev/null."""
    note = workspace / "note"
    note.touch()
    os.chown(note, box.person.uid, box.person.gid)
    inside = f'for fd in {closed}; do link=$(readlink /proc/$$/fd/$fd); (echo $link >>"$1"); done'
    closing = " ".join(f"{fd}>&-" for fd in closed.split())
    argv = ["sh", "-c", f'exec "$@" {closing}', "sh", *box.argv(("sh", "-c", inside, "sh", note))]
    done = box.person.run(argv, stdin=subprocess.PIPE)
    assert (done.returncode, note.read_text().split()) == (0, ["/dev/null"] * len(closed.split())), done.stderr


# ---- lease and FUSE server


def test_a_running_command_holds_the_lease(box: Box) -> None:
    with box.running() as process:
        assert box.in_use()
        done = box.person.run(["shifterwrap", "rm", box.image])
        assert done.returncode == 1
        assert "in use" in done.stderr
        process.kill()
        process.wait()
        assert not box.in_use()
    assert [row.kind for row in box.rows()] == [box.kind]


def test_a_scripts_own_descriptors_do_not_end_the_lease(box: Box) -> None:
    with box.running("exec 3>/dev/null 4>/dev/null 9>/dev/null"):
        assert box.in_use()


def test_two_commands_share_the_entry(box: Box) -> None:
    with box.running() as first, box.running() as second:
        first.kill()
        first.wait()
        assert box.in_use()
        second.kill()
        second.wait()
        assert not box.in_use()


def test_command_substitution_returns_and_nothing_stays(box: Box) -> None:
    done = box.person.run(["sh", "-c", 'x=$("$@"); echo "[$x]"', "sh", *box.argv(("echo", "said"))])
    assert done.stdout == "[said]\n"
    eventually(lambda: not servers(box.person.cache), "the FUSE server ends with the container")
    loops = Path("/sys/block").glob("loop*/loop/backing_file")
    assert not [path for path in loops if str(box.person.cache) in path.read_text()]


def test_background_processes_keep_the_container(box: Box, workspace: Path) -> None:
    os.chown(workspace, box.person.uid, box.person.gid)
    go, result = workspace / "go", workspace / "result"
    script = 'while [ ! -e "$1" ]; do sleep 0.02; done; cat /data/real/file >"$2.new"; mv "$2.new" "$2"'
    try:
        assert box.out('sh -c "$@" </dev/null >/dev/null 2>&1 &', script, "sh", go, result) == ""
        assert box.in_use()
    finally:
        go.touch()
    eventually(result.exists, "the grandchild reads the image")
    assert result.read_text() == "of the image\n"
    eventually(lambda: not box.in_use(), "the lease ends with the last process")
    eventually(lambda: not servers(box.person.cache), "the FUSE server ends with the last process")


def test_the_fuse_server_holds_nothing_of_the_users(boxes: Callable[[str], Box], workspace: Path) -> None:
    """Else `srun` and `$(…)` wait for it, and it keeps the lease."""
    box = boxes("swtester-squashfs")
    secret = workspace / "secret"
    secret.touch()
    with secret.open() as opened, box.running(pass_fds=[opened.fileno()], cwd=workspace) as process:
        (server,) = servers(box.person.cache)
        links = sorted(os.readlink(fd) for fd in Path(f"/proc/{server}/fd").iterdir())
        allowed = ("/dev/null", "/dev/fuse", "/memfd:squashfuse_ll", f"{box.person.cache}/", "anon_inode:")
        assert [link for link in links if not link.startswith(allowed)] == []
        assert [link for link in links if link.endswith("/lock")] == []
        assert os.getsid(server) != os.getsid(process.pid)
        assert os.readlink(f"/proc/{server}/cwd") == "/"
        assert status(server)["Uid"].split()[0] == str(box.person.uid)
        variables = Path(f"/proc/{server}/environ").read_bytes().split(b"\0")
        assert [item for item in variables if item] == [b"PATH=/usr/bin:/bin"]


# ---- binds


def test_bind_a_directory(box: Box, elsewhere: Path) -> None:
    (elsewhere / "in").write_text("in")
    for target, options in (("/mnt", ("--bind", f"{elsewhere}:/mnt")), (str(elsewhere), ("-B", elsewhere))):
        assert box.out(f"cat {target}/in; echo out >{target}/out", options=options) == "in"
        assert (elsewhere / "out").read_text() == "out\n"
        (elsewhere / "out").unlink()


def test_bind_a_file(box: Box, elsewhere: Path) -> None:
    (elsewhere / "file").write_text("of the host")
    options = ("--bind", f"{elsewhere}/file:/data/real/file", "--bind", f"{elsewhere}/file:/new/place/file")
    assert box.out("cat /data/real/file /new/place/file", options=options) == "of the hostof the host"


def test_bind_relative_to_the_current_directory(box: Box, elsewhere: Path) -> None:
    (elsewhere / "sub").mkdir()
    (elsewhere / "sub" / "file").write_text("relative")
    assert box.out("cat /mnt/file", options=("--bind", "sub:/mnt"), cwd=elsewhere) == "relative"


def test_bind_read_only_is_so_with_what_is_mounted_below(box: Box, elsewhere: Path) -> None:
    below = elsewhere / "sub mount"
    below.mkdir()
    write = 'for d in "$1" "$1/sub mount"; do (echo x >"$d/f") 2>/dev/null && echo wrote; done; cat "$1/sub mount/in"'
    command = box.argv(("sh", "-c", write, "sh", "/mnt"), ("--bind", f"{elsewhere}:/mnt:ro"))
    mount = 'mount -t tmpfs -o mode=777 x "$1"; echo below >"$1/in"; shift; exec "$@"'
    identity = ["setpriv", f"--reuid={box.person.uid}", f"--regid={box.person.gid}", "--clear-groups"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", mount, "sh", below, *identity, *command],
        env=box.person.env, cwd=box.person.home, capture_output=True, text=True, check=False,
    )
    assert (done.stdout, done.stderr) == ("below\n", "")
    assert os.listdir(elsewhere) == ["sub mount"]


def test_bind_into_a_path_that_the_image_lacks(box: Box, elsewhere: Path) -> None:
    """The mount point appears, and everything beside it is still the image's."""
    (elsewhere / "in").write_text("deep\n")
    options = ("--bind", f"{elsewhere}:/new/very/deep", "--bind", f"{elsewhere}:/data/deep")
    said = box.out("cat /new/very/deep/in /data/deep/in; ls /data; cat /data/real/file", options=options)
    beside = ["absolute", "closed", "deep", "escape", "file-link", "link", "loop", "real"]
    assert said.splitlines() == ["deep", "deep", *beside, "of the image"]


def test_binds_nest(box: Box, elsewhere: Path) -> None:
    outer, inner = elsewhere / "outer", elsewhere / "inner"
    (outer / "point").mkdir(parents=True)
    inner.mkdir()
    (outer / "o").touch()
    (inner / "i").touch()
    options = ("--bind", f"{outer}:/mnt", "--bind", f"{inner}:/mnt/point")
    assert box.out("ls /mnt /mnt/point", options=options).split() == ["/mnt:", "o", "point", "/mnt/point:", "i"]


def test_the_later_bind_of_one_target_wins(box: Box, elsewhere: Path) -> None:
    for name in ("one", "two"):
        (elsewhere / name).mkdir()
        (elsewhere / name / name).touch()
    options = ("--bind", f"{elsewhere}/one:/mnt", "--bind", f"{elsewhere}/two:/mnt")
    assert box.out("ls /mnt", options=options) == "two\n"


@pytest.mark.parametrize("link", ["/data/link", "/data/absolute", "/data/escape"])
def test_bind_a_directory_through_a_link_of_the_image(box: Box, elsewhere: Path, link: str) -> None:
    (elsewhere / "in").write_text("bound")
    assert box.out("cat /data/real/in", options=("--bind", f"{elsewhere}:{link}")) == "bound"
    assert not Path("/data/real").exists()


def test_bind_a_file_in_the_place_of_a_link(box: Box, elsewhere: Path) -> None:
    (elsewhere / "zone").write_text("here")
    options = ("--bind", f"{elsewhere}/zone:/data/file-link")
    assert box.out("cat /data/file-link /data/real/file", options=options) == "hereof the image\n"


def test_bind_over_a_link_to_itself(either: Box, elsewhere: Path) -> None:
    done = either.run("true", options=("--bind", f"{elsewhere}:/data/loop"))
    assert done.returncode == 125
    assert done.stderr.startswith("wrapped-run: too many symbolic links in the image at /data/loop")


@pytest.mark.parametrize(
    ("bind", "words"),
    [
        ("/nonexistent/source:/mnt", "bind source /nonexistent/source: No such file or directory"),
        ("{dir}:/data/real/file", "/data/real/file is a file in the image"),
        ("{dir}/file:/data/real", "/data/real is a directory in the image"),
        ("{dir}:/data/real/file/below", "/data/real/file is a file in the image"),
        ("{dir}:relative", "bad bind"),
        ("{dir}:/", "the container's root cannot be replaced"),
        ("{dir}:/mnt:rx", "bad bind"),
        (":/mnt", "bad bind"),
        ("{dir}:/" + "x" * 300, "File name too long"),
        ("{dir}:" + "/long" * 1000, "the kernel refused"),
        ("/" + "x" * 5000, "bind source /xxx"),
    ],
    ids=lambda text: text[:30],
)
def test_binds_that_cannot_be(either: Box, elsewhere: Path, bind: str, words: str) -> None:
    (elsewhere / "file").touch()
    done = either.run("echo", "started", options=("--bind", bind.format(dir=elsewhere)))
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("wrapped-run: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_bind_of_what_the_user_may_not_read(boxes: Callable[[str], Box], elsewhere: Path) -> None:
    """Sources are opened with the user's own rights, never with those that he has in his namespace."""
    closed = elsewhere / "closed"
    closed.mkdir()
    (closed / "secret").write_text("secret")
    closed.chmod(0o700)
    options = ("--bind", f"{closed}/secret:/mnt/secret")
    assert boxes("root-squashfs").out("cat /mnt/secret", options=options) == "secret"
    refused = boxes("swtester-squashfs").run("true", options=options)
    assert (refused.returncode, "Permission denied" in refused.stderr) == (125, True)


def test_binds_of_the_site(box: Box, elsewhere: Path) -> None:
    (elsewhere / "in").write_text("site")
    env = configured(box.person, f"binds: ['{elsewhere}:/site:ro']\n")
    assert box.out("cat /site/in; (echo x >/site/out) 2>/dev/null || echo refused", env=env) == "siterefused\n"


# ---- working directory


@pytest.mark.parametrize("path", ["/data/real", "/data/link", "/tmp"])
def test_workdir(box: Box, path: str) -> None:
    assert box.out('pwd; echo "$PWD"', options=("--workdir", path)).split() == [path, path]


@pytest.mark.parametrize(
    ("path", "words"),
    [("/none", "No such file"), ("/data/real/file", "Not a directory"), ("/data/loop", "Too many levels")],
)
def test_workdir_that_is_not_there(either: Box, path: str, words: str) -> None:
    done = either.run("pwd", options=("-w", path))
    assert (done.returncode, done.stdout) == (125, "")
    assert f"working directory {path}: {words}" in done.stderr


# ---- which command


@pytest.mark.parametrize(
    ("options", "command", "said"),
    [
        ((), (), ["entry", "cmd", "second word"]),
        ((), ("echo", "mine"), ["mine"]),
        ((), ("--", "echo", "mine"), ["mine"]),
        ((), ("--", "echo", "--", "-v"), ["-- -v"]),
        (("--entrypoint",), ("mine", "a b"), ["entry", "mine", "a b"]),
        (("--entrypoint",), (), ["entry", "cmd", "second word"]),
        ((), ("/opt/words", "--bind", "x"), ["--bind", "x"]),
        ((), ("tool",), ["tool"]),
        ((), ("../opt/tools/tool",), ["tool"]),
    ],
)
def test_what_runs(either: Box, options: tuple[str, ...], command: tuple[str, ...], said: list[str]) -> None:
    options = ("--workdir", "/worktop", *options)
    done = either.run(*command, options=options)
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, said, "")


def test_no_entrypoint_runs_cmd_alone(tester_box: Box) -> None:
    done = tester_box.run(options=("--no-entrypoint",))
    assert done.returncode == 127
    assert "cmd: not found in the image" in done.stderr


def test_an_image_without_a_command(registry: StockedRegistry, tester_box: Box) -> None:
    image = published(registry, "silent", [Image([busybox_layer()], {"Env": ["PATH=/bin"]})])
    done = tester_box._replace(image=image).run()
    assert done.returncode == 125
    assert "the image names no command to run" in done.stderr


def test_the_search_ignores_what_cannot_be_run(either: Box) -> None:
    env = ("--env", "PATH=/none:/opt/directory:/opt:/opt/tools:/bin")
    assert either.run("tool", options=env).stdout == "tool\n"


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("nothing", 127, "nothing: not found in the image"),
        ("/none/nothing", 127, "/none/nothing: not found in the image"),
        ("/data/loop", 127, "/data/loop: not found in the image"),
        ("/opt/not-executable", 126, "/opt/not-executable: not executable"),
        ("/opt/directory", 126, "/opt/directory: not executable"),
        ("/opt/no-format", 126, "/opt/no-format: neither a program for this machine nor a script"),
        ("/opt/bad-interpreter", 127, "/opt/bad-interpreter: its interpreter is not in the image"),
        ("", 125, "the image names no command to run"),
    ],
)
def test_commands_that_cannot_start(either: Box, command: str, code: int, words: str) -> None:
    done = either.run(command)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("wrapped-run: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_ten_thousand_arguments(box: Box) -> None:
    words = [f"argument {number}" for number in range(10_000)]
    done = box.run("/opt/words", *words)
    assert done.stdout.splitlines() == words


def test_arguments_are_bytes(box: Box) -> None:
    words = ["", " ", "a\nb", "'", '"', "$(id)", "\\", "*", "-e", "--", "caf\udce9", "Grüße"]
    done = box.run("/opt/words", *words, errors="surrogateescape")
    assert done.stdout == "".join(f"{word}\n" for word in words)


# ---- a writable root


def test_writable_tmpfs(box: Box) -> None:
    script = """
        set -e; echo new >/etc/new; mkdir /worktop/sub; rm /data/real/file; echo changed >/etc/os-release
        cat /etc/new /etc/os-release; ls -d /worktop/sub; ls /data/real"""
    assert box.out(script, options=("--writable-tmpfs",)) == "new\nchanged\n/worktop/sub\n"
    assert box.out("cat /data/real/file; ls -A /worktop; head -c 4 /etc/os-release; test ! -e /etc/new") == (
        "of the image\nNAME"
    )
    assert box.person.run(["shifterwrap", "verify"]).returncode == 0


def test_writable_tmpfs_with_binds(box: Box, elsewhere: Path) -> None:
    options = ("--writable-tmpfs", "--bind", f"{elsewhere}:/new/place")
    assert box.out("echo x >/new/place/out; echo y >/new/beside; cat /new/beside", options=options) == "y\n"
    assert sorted(os.listdir(elsewhere)) == ["out"]


# ---- plans


def test_dry_run_starts_nothing(box: Box, workspace: Path) -> None:
    os.chown(workspace, box.person.uid, box.person.gid)
    done = box.run("touch", workspace / "made", options=("--dry-run",))
    assert (done.returncode, done.stderr) == (0, "")
    assert not (workspace / "made").exists()
    assert not servers(box.person.cache)
    lines = done.stdout.splitlines()
    assert lines[0] == "runtime embedded"
    assert lines[1].startswith(f"image {box.kind} {box.person.cache}/entries/sha256-")
    assert "bind /dev /dev rw" in lines
    assert "env FOO='from-image'" in lines


HARD_WORDS = ["printf", "%s|", "a b", "'", '"', "$HOME", "new\nline", "", "-v"]


def test_the_last_line_of_a_dry_run_can_be_pasted(box: Box, elsewhere: Path) -> None:
    (elsewhere / "in").write_text("bound")
    options = ("--dry-run", "--bind", f"{elsewhere}:/mnt:ro", "--env", "MINE=it's $HOME", "--workdir", "/data/real")
    script = 'cat /mnt/in; echo "$MINE"; pwd; printf "%s|" "$@"'
    plan = box.sh(script, *HARD_WORDS, options=options)
    (last,) = plan.stdout.split("\nworkdir ")[1].split("\n", 1)[1:]
    pasted = box.person.run(["sh", "-c", last])
    expected = "bound" + "it's $HOME\n/data/real\n" + "".join(f"{word}|" for word in HARD_WORDS)
    assert (pasted.returncode, pasted.stdout, pasted.stderr) == (0, expected, "")


def test_dry_run_as_json(box: Box) -> None:
    plan = json.loads(box.run("echo", "a b", options=("--dry-run", "--json")).stdout)
    assert plan["runtime"] == "embedded"
    assert plan["argv"][-2:] == ["echo", "a b"]
    assert Path(plan["image"]).exists()


def test_errors_as_json(tester_box: Box) -> None:
    done = tester_box.run("true", options=("--json", "--bind", "/none:/mnt"))
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["id"]) == (125, "UsageError")
    assert "/none" in error["message"]


@pytest.mark.parametrize(("options", "command", "code", "name"), [
    ((), "nosuch", 127, "CommandNotFound"), (("--workdir", "/none"), "true", 125, "SandboxError"),
])
def test_errors_in_the_container_as_json(either: Box, options: tuple[str, ...], command: str, code: int,
                                         name: str) -> None:
    done = either.run(command, options=("--json", *options))
    assert (done.returncode, json.loads(done.stdout)["error"]["id"]) == (code, name), done.stderr


def test_read_only_below_a_path_with_a_space(registry: StockedRegistry, tester_box: Box, elsewhere: Path) -> None:
    (elsewhere / "sub").mkdir(mode=0o777)
    os.chmod(elsewhere / "sub", 0o777)
    write = 'echo x >"/mnt/a b/sub/f"'
    command = tester_box.argv(("sh", "-c", write), ("--bind", f"{elsewhere}:/mnt/a b:ro"))
    mount = 'mount -t tmpfs -o mode=777 x "$1"; shift; exec "$@"'
    person = tester_box.person
    identity = ["setpriv", f"--reuid={person.uid}", f"--regid={person.gid}", "--clear-groups"]
    done = subprocess.run(["unshare", "--mount", "sh", "-ec", mount, "sh", elsewhere / "sub", *identity, *command],
                          env=person.env, cwd=person.home, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Read-only" in done.stderr


def test_dry_run_of_what_is_not_cached(tester_box: Box, registry: StockedRegistry) -> None:
    registry.forget()
    done = tester_box._replace(image=f"docker://{registry.host}/test/never:1").run("true", options=("--dry-run",))
    assert done.returncode == 125
    assert "is not cached" in done.stderr
    assert registry.requests() == []


def test_verbose_tells_the_stages(tester_box: Box) -> None:
    done = tester_box.run("true", options=("-v",))
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == ["start", "image", "plan"]


# ---- joining a running container

JOIN = """
import os, sys
from shifterwrap import cache, host, plan
from shifterwrap.runtimes import embedded
pid, *command = sys.argv[1:]
facts = host.probe("/usr/bin:/bin")
user = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY) if facts.uid else -1
mount = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
made = plan.Plan(
    image=plan.Image("", cache.SQUASHFS, (), (), (), "/"), base=(), binds=(), env={"PATH": "/bin"},
    overrides=frozenset(), cwd="/", workdirs=("/data/real",), strict_workdir=True, argv=tuple(command),
    writable_tmpfs=False, user=plan.User(facts.uid, facts.gid, "", "", "", ""),
)
embedded.run(made, facts, -1, embedded.Namespaces(user, mount))
"""


def test_a_second_process_joins_the_container(box: Box) -> None:
    script = "pwd; cat file; readlink /proc/self/ns/mnt; readlink /proc/self/ns/user; id -u"
    with box.running() as process:
        joined = box.person.run([sys.executable, "-c", JOIN, str(process.pid), "sh", "-c", script], cwd="/")
        spaces = [os.readlink(f"/proc/{process.pid}/ns/{kind}") for kind in ("mnt", "user")]
    assert (joined.stderr, joined.returncode) == ("", 0)
    assert joined.stdout.splitlines() == ["/data/real", "of the image", *spaces, str(box.person.uid)]


def test_several_readers_at_once(tester_box: Box) -> None:
    script = "for i in 1 2 3 4 5 6 7 8; do sha256sum /bin/busybox & done; wait"
    lines = tester_box.out(script).splitlines()
    assert (len(lines), set(lines)) == (8, {f"{hashlib.sha256(BUSYBOX.read_bytes()).hexdigest()}  /bin/busybox"})


def test_an_image_without_any_directory(registry: StockedRegistry, tester_box: Box) -> None:
    """An image with nothing but one program has no directory to mount on; all of them are made."""
    image = published(registry, "bare", [Image([Layer(tar([file("sh", BUSYBOX.read_bytes(), mode=0o755)]))], {})])
    done = tester_box._replace(image=image).run("/sh", "-c", "echo /*; cat /etc/passwd")
    assert done.stdout.splitlines()[0].split() == ["/dev", "/etc", "/proc", "/sh", "/sys", "/tmp", "/var"]
    assert done.stdout.splitlines()[1].startswith("swtester:x:2001:")
