"""request.py: command lines as people write them, and the request or the refusal that they make."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional

import pytest

from shifterwrap import request
from shifterwrap.errors import Error, UsageError
from shifterwrap.oci import Platform
from shifterwrap.request import Bind, LaunchRequest, parse, parse_bind

HERE = os.getcwd()


def asked(line: str, environ: Optional[dict[str, str]] = None) -> LaunchRequest:
    return parse(line.split(), environ or {})


def made(image: str = "i", command: str = "", **fields: Any) -> dict[str, Any]:
    """All fields of a request but `words`, with the defaults where none is given."""
    full = LaunchRequest(image, tuple(command.split()), **fields)._asdict()
    del full["words"]
    return full


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("i", made()),
        ("i cmd -v --bind x", made(command="cmd -v --bind x")),
        ("i -- cmd", made(command="cmd")),
        ("i -- -- cmd", made(command="-- cmd")),
        ("i cmd -- x", made(command="cmd -- x")),
        ("i --", made()),
        ("-- i cmd", made(command="cmd")),
        ("-v -- i -- cmd", made(command="cmd", verbose=True)),
        ("-v i -v", made(command="-v", verbose=True)),
        ("- cmd", made("-", "cmd")),
        ("--runtime embedded i", made(runtime="embedded")),
        ("--runtime=embedded i", made(runtime="embedded")),
        ("--runtime= i", made(runtime="")),
        ("--runtime a --runtime b i", made(runtime="b")),
        ("-w /x i", made(workdir="/x")),
        ("-w/x i", made(workdir="/x")),
        ("--workdir=/x/../y i", made(workdir="/y")),
        ("-w sub i", made(workdir=f"{HERE}/sub")),
        ("-w . i", made(workdir=HERE)),
        ("-vw /x i", made(workdir="/x", verbose=True)),
        ("-vw/x i", made(workdir="/x", verbose=True)),
        ("-vv i", made(verbose=True)),
        ("-B /a:/b i", made(binds=(Bind("/a", "/b"),))),
        ("-B/a:/b:ro i", made(binds=(Bind("/a", "/b", True),))),
        ("--bind=/a -B /c:/d i", made(binds=(Bind("/a", "/a"), Bind("/c", "/d")))),
        ("-e A=1 -eB=2 --env C=3 --env=D=4 i", made(env=(("A", "1"), ("B", "2"), ("C", "3"), ("D", "4")))),
        ("-e A= i", made(env=(("A", ""),))),
        ("-e A=b=c i", made(env=(("A", "b=c"),))),
        ("--entrypoint i", made(entrypoint=True)),
        ("--no-entrypoint i", made(entrypoint=False)),
        ("--entrypoint --no-entrypoint i", made(entrypoint=False)),
        ("--no-entrypoint --entrypoint i", made(entrypoint=True)),
        ("--writable-tmpfs --dry-run --json i", made(writable_tmpfs=True, dry_run=True, json=True)),
        ("--pull always i", made(pull="always")),
        ("--pull never --pull missing i", made()),
        ("--platform linux/arm64 i", made(platform=Platform("linux", "arm64"))),
        ("--help", made("--help")),
        ("-h i cmd", made("--help")),
        ("-vh", made("--help")),
        ("--version", made("--version")),
        ("--help --version", made("--help")),
        ("i --help", made(command="--help")),
    ],
)
def test_command_lines(line: str, expected: dict[str, Any]) -> None:
    found = asked(line)._asdict()
    del found["words"]
    assert found == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [("-vw /x --env=A=1 i -v", "-vw /x --env=A=1"), ("i", ""), ("-v -- i -- x", "-v --"), ("-e A -- i", "-e A --")],
)
def test_words_are_the_options_as_typed(line: str, words: str) -> None:
    assert asked(line).words == tuple(words.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no IMAGE given"),
        ("-v", "no IMAGE given"),
        ("--", "no IMAGE given"),
        ("--nothing i", "unknown option --nothing"),
        ("--nothing=x i", "unknown option --nothing"),
        ("--run embedded i", "unknown option --run"),
        ("-x i", "unknown option -x"),
        ("-vx i", "unknown option -x"),
        ("--json=yes i", "--json takes no argument"),
        ("--help=x", "--help takes no argument"),
        ("-w", "-w wants an argument: -w DIR"),
        ("--env-file", "--env-file wants an argument: --env-file FILE"),
        ("-vB", "-B wants an argument"),
        ("--pull sometimes i", "bad --pull 'sometimes'"),
        ("--pull= i", "bad --pull ''"),
        ("-e =x i", "bad variable '=x'"),
        ("--env= i", "bad variable ''"),
        ("--env-file /nonexistent/file i", "--env-file /nonexistent/file: No such file or directory"),
        ("--env-file / i", "--env-file /: Is a directory"),
        ("-B x:y i", "bad bind 'x:y'"),
    ],
)
def test_refusals(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        asked(line)
    assert caught.value.message.startswith(message)


def test_an_empty_image_is_none() -> None:
    with pytest.raises(UsageError):
        parse(["", "cmd"], {})


@pytest.mark.parametrize("platform", ["", "/", "linux", "linux/", "linux/amd64/v1/more", "a b/c"])
def test_bad_platforms(platform: str) -> None:
    with pytest.raises(Error):
        parse(["--platform", platform, "i"], {})


def test_arguments_are_not_split_or_changed() -> None:
    words = ["", " ", "a b", "\n", "$x", "'", "caf\udce9", "-e"]
    assert parse(["i", *words], {}).command == tuple(words)


@pytest.mark.parametrize(
    ("line", "environ", "runtime"),
    [
        ("i", {"SHIFTERWRAP_RUNTIME": "apptainer"}, "apptainer"),
        ("--runtime embedded i", {"SHIFTERWRAP_RUNTIME": "apptainer"}, "embedded"),
        ("i", {}, ""),
    ],
)
def test_runtime_of_the_environment(line: str, environ: dict[str, str], runtime: str) -> None:
    assert asked(line, environ).runtime == runtime


def test_env_without_a_value_is_the_callers() -> None:
    environ = {"KEPT": "a=b", "EMPTY": ""}
    assert asked("-e KEPT -e UNSET -e EMPTY i", environ).env == (("KEPT", "a=b"), ("EMPTY", ""))


def test_env_files_come_before_options(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"# comment\n\n  A=1 \nB=x # not a comment\nRAW=\xe9\nHOST\nNONE\nQ='q'\n\tT=t\n")
    two.write_text("A=2\r\nLAST=end")
    found = parse(["-e", "A=3", "--env-file", str(one), "--env-file", str(two), "i"], {"HOST": "h"}).env
    assert found == (
        ("A", "1"), ("B", "x # not a comment"), ("RAW", "\udce9"), ("HOST", "h"), ("Q", "'q'"), ("T", "t"),
        ("A", "2"), ("LAST", "end"), ("A", "3"),
    )


@pytest.mark.parametrize("content", [b"=x\n", b"A=1\n=\n", b"A=\0\n"])
def test_bad_env_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="bad variable"):
        parse(["--env-file", str(path), "i"], {})


@pytest.mark.parametrize(
    ("text", "bind"),
    [
        ("/a", Bind("/a", "/a")),
        ("/a/", Bind("/a", "/a")),
        ("/a/../b", Bind("/b", "/b")),
        ("/a:/b", Bind("/a", "/b")),
        ("/a:/b/", Bind("/a", "/b")),
        ("/a:/b/../c//d/.", Bind("/a", "/c/d")),
        ("/a:/b:ro", Bind("/a", "/b", True)),
        ("/a:/b:rw", Bind("/a", "/b")),
        ("/a:/b:", Bind("/a", "/b")),
        ("/a::ro", Bind("/a", "/a", True)),
        ("/a:", Bind("/a", "/a")),
        ("sub:/b", Bind(f"{HERE}/sub", "/b")),
        ("sub", Bind(f"{HERE}/sub", f"{HERE}/sub")),
        (".", Bind(HERE, HERE)),
        ("/", None),
        ("/a:/", None),
        ("/a://", None),
        ("/a:/..", None),
        ("/a:/b/..", None),
        ("", None),
        (":", None),
        (":/b", None),
        ("/a:b", None),
        ("/a:./b", None),
        ("/a:/b:rx", None),
        ("/a:/b:ro:x", None),
        ("/a:/b:RO", None),
    ],
)
def test_binds(text: str, bind: Optional[Bind]) -> None:
    if bind is not None:
        assert parse_bind(text) == bind
        return
    with pytest.raises(UsageError, match="bad bind"):
        parse_bind(text)


def test_help_fits_a_screen_and_names_every_option() -> None:
    lines = request.help_text().splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 110
    for option in request.OPTIONS:
        assert any(line.startswith(f"  {', '.join(option.names)}") and option.help in line for line in lines)
