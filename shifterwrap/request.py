"""What the user asked for: the command line of wrapped-run as a value.

One table of options drives the parser, ``--help`` and the manual. It is parsed by hand because argparse costs 14 ms of
a launch that takes 40.
"""

from __future__ import annotations

import os

from .errors import UsageError
from .oci import Platform, parse_platform
from .values import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Optional


class Bind(NamedTuple):
    """A host path made visible in the container; ``optional`` ones are skipped where the source is missing."""

    source: str
    target: str
    readonly: bool = False
    optional: bool = False


class LaunchRequest(NamedTuple):
    """One launch as asked for. ``entrypoint`` is None when the rule decides: not with a CMD, yes without.

    ``words`` are the options as they were typed.
    """

    image: str
    command: tuple[str, ...] = ()
    runtime: str = ""
    binds: tuple[Bind, ...] = ()
    workdir: str = ""
    env: tuple[tuple[str, str], ...] = ()
    entrypoint: Optional[bool] = None
    writable_tmpfs: bool = False
    pull: str = "missing"
    platform: Optional[Platform] = None
    dry_run: bool = False
    json: bool = False
    verbose: bool = False
    words: tuple[str, ...] = ()


class Option(NamedTuple):
    """One option: its spellings, the name of its argument (empty: a switch) and one line of help."""

    names: tuple[str, ...]
    argument: str
    help: str


OPTIONS = (
    Option(("--runtime",), "NAME", "auto, embedded, apptainer or charliecloud"),
    Option(("-B", "--bind"), "SRC[:DST[:ro]]", "make a host path visible in the container; may be repeated"),
    Option(("-w", "--workdir"), "DIR", "start there instead of the current directory"),
    Option(("-e", "--env"), "K[=V]", "set a variable in the container, or keep the host's over the image's"),
    Option(("--env-file",), "FILE", "read K=V lines, # starts a comment"),
    Option(("--entrypoint",), "", "run the image's entrypoint with CMD as its arguments"),
    Option(("--no-entrypoint",), "", "without CMD, run the image's cmd alone"),
    Option(("--writable-tmpfs",), "", "let the container write anywhere, into memory, forgotten at its end"),
    Option(("--pull",), "WHEN", "missing (default), always (look for a newer tag) or never"),
    Option(("--platform",), "OS/ARCH", "the image's platform; default is this machine's"),
    Option(("--dry-run",), "", "print the plan and start nothing"),
    Option(("--json",), "", "plans and errors as JSON"),
    Option(("-v", "--verbose"), "", "print the seconds of each stage"),
    Option(("-h", "--help"), "", "print this and exit"),
    Option(("--version",), "", "print the version and exit"),
)
_BY_NAME = {name: option for option in OPTIONS for name in option.names}
_USAGE = "wrapped-run [options] IMAGE [CMD [ARG...]]"


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> LaunchRequest:
    """The request that ``argv`` (without the program's name) makes; UsageError when it makes none.

    Options end at IMAGE, everything after it is the command's; ``--`` directly after IMAGE is dropped.
    Help and version come back as the images ``--help`` and ``--version``, which are no references.
    """
    options, rest = _split(argv)
    names = [name for name, _ in options]
    for special in ("--help", "--version"):
        if special in names:
            return LaunchRequest(special)
    if not rest or not rest[0]:
        raise UsageError("no IMAGE given", f"usage: {_USAGE}")
    image, *command = rest
    if command and command[0] == "--":
        command = command[1:]
    values: dict[str, str] = dict(options)  # the last one of an option that is given twice wins
    return LaunchRequest(
        image=image,
        command=tuple(command),
        runtime=values.get("--runtime", environ.get("SHIFTERWRAP_RUNTIME", "")),
        binds=tuple(parse_bind(value) for name, value in options if name == "--bind"),
        workdir=_absolute(values.get("--workdir", "")),
        env=tuple(_environment(options, environ)),
        entrypoint=_entrypoint(names),
        writable_tmpfs="--writable-tmpfs" in values,
        pull=_one_of("--pull", values.get("--pull", "missing"), ("missing", "always", "never")),
        platform=parse_platform(values["--platform"]) if "--platform" in values else None,
        dry_run="--dry-run" in values,
        json="--json" in values,
        verbose="--verbose" in values,
        words=tuple(argv[: len(argv) - len(rest)]),
    )


def _split(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Options as (long name, argument) in order, and what follows them."""
    found = []
    words = list(argv)
    while words and words[0].startswith("-") and words[0] != "-":
        word = words.pop(0)
        if word == "--":
            break
        name, separator, value = word.partition("=") if word.startswith("--") else (word[:2], word[2:], word[2:])
        option = _BY_NAME.get(name)
        if option is None:
            raise UsageError(f"unknown option {name}", "wrapped-run --help lists them; options stand before IMAGE")
        if not option.argument and separator:
            if word.startswith("--"):
                raise UsageError(f"{name} takes no argument")
            words.insert(0, f"-{value}")  # -vw DIR is -v -w DIR
            value = ""
        elif option.argument and not separator:
            if not words:
                raise UsageError(f"{name} wants an argument: {name} {option.argument}")
            value = words.pop(0)
        found.append((option.names[-1], value))
    return found, words


def parse_bind(text: str) -> Bind:
    """``SRC[:DST[:ro|rw]]``; UsageError when it is not. A relative SRC is taken from the current directory."""
    source, *more = text.split(":")
    target, mode = (more + ["", ""])[:2]
    target = target or _absolute(source)
    if not source or len(more) > 2 or mode not in ("", "ro", "rw") or not target.startswith("/"):
        raise UsageError(f"bad bind {text!r}", "write it as SRC[:DST[:ro]] with an absolute DST")
    target = os.path.normpath(target)
    if target in ("/", "//"):
        raise UsageError(f"bad bind {text!r}: the container's root cannot be replaced")
    return Bind(_absolute(source), target, readonly=mode == "ro")


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path else ""


def _environment(options: Sequence[tuple[str, str]], environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs from files first, then from the command line, so that the latter win."""
    lines = [line for name, path in options if name == "--env-file" for line in _env_file(path)]
    pairs = []
    for text in lines + [value for name, value in options if name == "--env"]:
        name, separator, value = text.partition("=")
        if not name or "\0" in text:
            raise UsageError(f"bad variable {text!r}", "write it as NAME=VALUE")
        if separator or name in environ:
            pairs.append((name, value if separator else environ[name]))
    return pairs


def _env_file(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            lines = [line.strip() for line in stream]
    except OSError as exc:
        raise UsageError(f"--env-file {path}: {exc.strerror}") from None
    return [line for line in lines if line and not line.startswith("#")]


def _entrypoint(names: Sequence[str]) -> Optional[bool]:
    wanted = [name == "--entrypoint" for name in names if name in ("--entrypoint", "--no-entrypoint")]
    return wanted[-1] if wanted else None


def _one_of(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise UsageError(f"bad {name} {value!r}", f"one of: {', '.join(choices)}")
    return value


def help_text() -> str:
    """What ``--help`` prints; fits a screen."""
    rows = [(", ".join(option.names) + (f" {option.argument}" if option.argument else ""), option.help)
            for option in OPTIONS]
    width = max(len(left) for left, _ in rows)
    lines = [f"usage: {_USAGE}", "", "Run CMD, or the image's own command, in a container. The image is pulled and",
             "converted once for the whole node, then starts from the cache.", ""]
    lines += [f"  {left:<{width}}  {text}" for left, text in rows]
    lines += ["", "IMAGE: docker://REGISTRY/REPOSITORY:TAG, or NAME:TAG for the site's default registry.",
              "Exit: the command's own code; 125 failed before it started, 126 it cannot be executed,",
              "127 it is not in the image (apptainer and ch-run say so with 255 and 1).",
              "Environment: SHIFTERWRAP_CACHE_DIR, SHIFTERWRAP_CONFIG, SHIFTERWRAP_RUNTIME, SHIFTERWRAP_DEBUG."]
    return "\n".join(lines)
