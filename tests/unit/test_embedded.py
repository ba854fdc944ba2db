"""runtimes/embedded.py: what can be decided without a namespace: links of an image, places of binds, programs."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Optional

import pytest

from shifterwrap.errors import CommandNotExecutable, CommandNotFound, Error, SandboxError
from shifterwrap.runtimes import embedded, rootfs

LINKS = {
    "lib": "usr/lib",
    "absolute": "/usr/lib",
    "up": "../../../usr/lib",
    "chain": "chain2",
    "chain2": "lib",
    "dangling": "none/here",
    "self": "self",
    "one": "two",
    "two": "one",
    "dot": ".",
    "slash": "/",
    "usr/lib/back": "../../etc",
    "usr/lib/out": "../../../../../../etc",
    "to-file": "etc/file",
}


@pytest.fixture
def root(tmp_path: Path) -> str:
    """An image's root with links that lead everywhere."""
    for name in ("usr/lib/sub", "etc"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "etc" / "file").touch()
    for name, target in LINKS.items():
        (tmp_path / name).symlink_to(target)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("path", "real"),
    [
        ("/", ""),
        ("/slash", ""),
        ("/usr/lib", "/usr/lib"),
        ("//usr/./lib/", "/usr/lib"),
        ("/lib/sub", "/usr/lib/sub"),
        ("/absolute/sub", "/usr/lib/sub"),
        ("/up/sub", "/usr/lib/sub"),
        ("/chain/sub", "/usr/lib/sub"),
        ("/dangling/x", "/none/here/x"),
        ("/dot/dot/usr", "/usr"),
        ("/slash/slash/etc", "/etc"),
        ("/usr/lib/back/file", "/etc/file"),
        ("/usr/lib/out/file", "/etc/file"),
        ("/lib/back/../usr", "/usr"),
        ("/../../etc", "/etc"),
        ("/usr/../..", ""),
        ("/none/../etc", "/etc"),
        ("/new/place", "/new/place"),
    ],
)
def test_links_stay_in_the_image(root: str, path: str, real: str) -> None:
    assert rootfs.resolve(root, path) == real


@pytest.mark.parametrize("path", ["/self", "/one/x", "/two"])
def test_loops_are_found(root: str, path: str) -> None:
    with pytest.raises(SandboxError, match="too many symbolic links in the image"):
        rootfs.resolve(root, path)


def test_a_long_chain_is_a_loop_too(tmp_path: Path) -> None:
    """As for the kernel, which follows 40."""
    for number in range(50):
        (tmp_path / f"l{number}").symlink_to(f"l{number + 1}")
    (tmp_path / "l50").touch()
    assert rootfs.resolve(str(tmp_path), "/l10") == "/l50"
    with pytest.raises(SandboxError):
        rootfs.resolve(str(tmp_path), "/l9")


@pytest.mark.parametrize(
    ("target", "directory", "place"),
    [
        ("/absolute", True, "/usr/lib"),
        ("/absolute/sub", False, "/usr/lib/sub"),
        ("/to-file", True, "/etc/file"),
        ("/to-file", False, "/to-file"),
        ("/lib/out", False, "/usr/lib/out"),
        ("/self", False, "/self"),
        ("/file", False, "/file"),
    ],
)
def test_where_a_bind_goes(root: str, target: str, directory: bool, place: str) -> None:
    """A directory through the image's links, a file in the place of one."""
    assert rootfs.place(root, target, directory) == place


@pytest.mark.parametrize("target", ["/slash", "/dot", "/slash/slash"])
def test_no_bind_replaces_the_root(root: str, target: str) -> None:
    with pytest.raises(SandboxError, match=f"{target} is a link to the root in the image"):
        rootfs.place(root, target, True)


def executable(path: Path, mode: int = 0o755) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    path.chmod(mode)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    executable(tmp_path / "a" / "plain", 0o644)
    executable(tmp_path / "b" / "plain")
    executable(tmp_path / "b" / "tool")
    executable(tmp_path / "b" / "only-plain", 0o644)
    (tmp_path / "a" / "tool").mkdir()
    (tmp_path / "a" / "broken").symlink_to("nothing")
    monkeypatch.chdir(tmp_path / "b")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "path", "found"),
    [
        ("tool", "{0}/b", "{0}/b/tool"),
        ("tool", "/nonexistent:{0}/a:{0}/b", "{0}/b/tool"),
        ("plain", "{0}/a:{0}/b", "{0}/b/plain"),
        ("tool", "{0}/a:", "./tool"),
        ("tool", "", "./tool"),
        ("./tool", "/bin", "./tool"),
        ("{0}/b/tool", "", "{0}/b/tool"),
        ("../b/tool", "", "../b/tool"),
        ("none", "{0}/a:{0}/b", CommandNotFound),
        ("broken", "{0}/a", CommandNotFound),
        ("{0}/none", "{0}/b", CommandNotFound),
        ("tool", "{0}/b/tool", CommandNotFound),
        ("only-plain", "{0}/a:{0}/b", CommandNotExecutable),
        ("tool", "{0}/a", CommandNotExecutable),
        ("{0}/a", "", CommandNotExecutable),
        ("./only-plain", "", CommandNotExecutable),
    ],
)
def test_which_program_a_command_is(tools: Path, name: str, path: str, found: object) -> None:
    name, path = name.format(tools), path.format(tools)
    if isinstance(found, str):
        assert embedded.find_program(name, path) == found.format(tools)
        return
    assert isinstance(found, type) and issubclass(found, Error)
    with pytest.raises(found):
        embedded.find_program(name, path)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOENT, CommandNotFound, "its interpreter is not in the image"),
        (errno.ENOEXEC, CommandNotExecutable, "neither a program for this machine nor a script"),
        (errno.EACCES, CommandNotExecutable, "Permission denied"),
        (errno.E2BIG, CommandNotExecutable, "Argument list too long"),
        (errno.ETXTBSY, CommandNotExecutable, "Text file busy"),
    ],
)
def test_what_execve_says(number: int, kind: type[Error], words: str) -> None:
    fault = embedded._exec_error("/bin/x", OSError(number, os.strerror(number)))
    assert type(fault) is kind
    assert str(fault).startswith("/bin/x: ")
    assert words in str(fault)


def test_mounts_below_a_bind(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    points = ["/", "/root/mnt", r"/root/mnt/a\040b", r"/root/mnt/tab\011nl\012back\134slash", "/root/mnt2", "/root/mn"]
    rows = [f"{number} 1 0:1 / {point} rw - tmpfs x rw" for number, point in enumerate(points)]
    (tmp_path / "self" / "mountinfo").write_text("\n".join(rows))
    found = rootfs._mounts_below("/root/mnt", str(tmp_path))
    assert found == ["/root/mnt", "/root/mnt/a b", "/root/mnt/tab\tnl\nback\\slash"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (OSError(1, "Operation not permitted"), "the kernel refused a thing: Operation not permitted"),
        (OSError(2, "No such file", "/x"), "the kernel refused a thing (/x): No such file"),
    ],
)
def test_a_step_names_what_the_kernel_refused(fault: OSError, message: str) -> None:
    with pytest.raises(SandboxError) as caught, rootfs.step("a thing", "do this"):
        raise fault
    assert (caught.value.message, caught.value.hint) == (message, "do this")


@pytest.mark.parametrize("fault", [None, KeyError("x"), CommandNotFound("x")])
def test_a_step_leaves_other_errors_alone(fault: Optional[Exception]) -> None:
    if fault is None:
        with rootfs.step("a thing"):
            return
    with pytest.raises(type(fault)), rootfs.step("a thing"):
        raise fault
