"""The hot flow in order: request, lease, plan, execve. The other composer, and the main program of wrapped-run.

On a hit nothing is started and nothing is waited for; what a miss does is in lease.py.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what signal is made of, without its 3 ms
import grp
import os
import pwd
import sys
import time

from . import __version__, cache, config, host, lease, plan, request
from .cache import Lease
from .config import Config
from .errors import RuntimeUnavailable, UsageError, fill_standard_streams, guard, printable
from .host import Host
from .request import LaunchRequest
from .runtimes import apptainer, charliecloud, embedded
from .values import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn

PROG = "wrapped-run"
RUNTIMES = ("embedded", "apptainer", "charliecloud")


def main() -> int:
    """The program: parse, then launch; returns only when the command was not started."""
    fill_standard_streams()
    if "--json" in sys.argv:
        import json  # noqa: F401 - an error inside the container is told as JSON, and nothing can be imported there
    return guard(PROG, lambda: _parsed(request.parse(sys.argv[1:], os.environ)), json="--json" in sys.argv)


def _parsed(asked: LaunchRequest) -> int:
    if asked.image == "--help":
        print(request.help_text())
        return 0
    if asked.image == "--version":
        print(f"{PROG} {__version__}")
        return 0
    return guard(PROG, lambda: launch(asked, caller_environment()), json=asked.json)


def caller_environment() -> dict[str, str]:
    """The environment as the caller gave it: started with the C locale, Python sets LC_CTYPE (PEP 538)."""
    environ = dict(os.environ)
    if environ.get("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8"):
        with open("/proc/self/environ", "rb") as original:
            given = dict(item.partition(b"=")[::2] for item in original.read().split(b"\0"))
        del environ["LC_CTYPE"]
        if b"LC_CTYPE" in given:
            environ["LC_CTYPE"] = os.fsdecode(given[b"LC_CTYPE"])
    return environ


def launch(asked: LaunchRequest, environ: Mapping[str, str]) -> int:
    """Do what was asked; 0 after a dry run, otherwise this process becomes the command."""
    began = time.perf_counter()
    settings = config.load(environ, os.getuid())
    facts = host.probe(settings.tool_path)
    runtime = choose_runtime(asked.runtime or settings.runtime, settings)
    mounts = facts.mounts_squashfs or runtime == "charliecloud"  # ch-run brings its own squashfuse
    want = lease.wanted(asked.image, asked.platform, settings, mounts, environ, facts.uid)
    _tell(asked, "start", began)
    began = time.perf_counter()
    held = lease.obtain(want, settings, asked.pull, PROG, offline=asked.dry_run, verbose=asked.verbose)
    _tell(asked, "image", began)
    began = time.perf_counter()
    user = who(facts)
    made = plan.make(asked, _image(held), settings, user, environ, _cwd(user))
    if asked.dry_run:
        _print_plan(asked, made, facts, runtime, environ)
        return 0
    _tell(asked, "plan", began)
    return _start(made, facts, runtime, held, environ)


def choose_runtime(name: str, settings: Config) -> str:
    """The runtime that ``name`` means here; RuntimeUnavailable when it is not installed."""
    if name == "auto":
        return "apptainer" if host.runtime_program("apptainer", settings.tool_path) else "embedded"
    if name not in RUNTIMES:
        raise UsageError(f"unknown runtime {name!r}", f"one of: auto, {', '.join(RUNTIMES)}")
    if name != "embedded" and not host.runtime_program(name, settings.tool_path):
        raise RuntimeUnavailable(f"runtime {name} is not installed in {settings.tool_path}")
    return name


def who(facts: Host) -> plan.User:
    """The caller, by the host's name service; numbers where it does not know him."""
    try:
        entry = pwd.getpwuid(facts.uid)
        name, home, shell = entry.pw_name, entry.pw_dir, entry.pw_shell
    except KeyError:
        name, home, shell = str(facts.uid), "", "/bin/sh"
    try:
        group = grp.getgrgid(facts.gid).gr_name
    except KeyError:
        group = str(facts.gid)
    return plan.User(facts.uid, facts.gid, name, group, os.environ.get("HOME", "") or home, shell)


def _cwd(user: plan.User) -> str:
    try:
        return os.getcwd()
    except OSError:
        return "/"  # removed, or not ours to read


def _image(held: Lease) -> plan.Image:
    document = cache.image_document(held.entry)
    return plan.Image(held.entry.image, held.entry.kind, tuple(document["env"]), tuple(document["entrypoint"]),
                      tuple(document["cmd"]), document["working_dir"], frozenset(document.get("points", ())))


def _start(made: plan.Plan, facts: Host, runtime: str, held: Lease, environ: Mapping[str, str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):  # Python ignores them, and an ignored signal outlives execve
        _signal.signal(number, _signal.SIG_DFL)
    if runtime == "embedded":
        embedded.run(made, facts, held.fd)
    _check_sources(made)
    command = _command(made, facts, runtime, environ)
    for note in command.notes:
        print(f"{PROG}: warning: {note}", file=sys.stderr, flush=True)
    os.set_inheritable(held.fd, True)  # the job's: the kernel drops the lease when its last process is gone
    try:
        os.execve(command.program, command.argv, command.env)
    except OSError as exc:
        raise RuntimeUnavailable(f"{command.program}: {exc.strerror}") from exc


def _check_sources(made: plan.Plan) -> None:
    """Say it before the runtime does, in our words and with our exit code; the embedded runtime opens them itself."""
    for bind in made.binds:
        try:
            os.stat(bind.source)
        except OSError as exc:
            raise UsageError(f"bind source {bind.source}: {exc.strerror}", "correct --bind, or create it") from None


def _command(made: plan.Plan, facts: Host, runtime: str, environ: Mapping[str, str]) -> plan.Command:
    program = host.runtime_program(runtime, facts.tool_path)
    if runtime == "apptainer":
        return apptainer.command(made, facts, program, environ)
    return charliecloud.command(made, facts, program, environ)


def _print_plan(asked: LaunchRequest, made: plan.Plan, facts: Host, runtime: str, environ: Mapping[str, str]) -> None:
    import json
    import shlex

    if runtime == "embedded":
        options = [word for word in asked.words if word not in ("--dry-run", "--json")]
        operations = plan.describe(made, environ)
        argv: tuple[str, ...] = (PROG, *options, asked.image, "--", *asked.command)
        changed: dict[str, str] = {}
    else:
        command = _command(made, facts, runtime, environ)
        operations, argv = [f"note {note}" for note in command.notes], command.argv
        changed = {name: value for name, value in command.env.items() if environ.get(name) != value}
    if asked.json:
        print(json.dumps({"runtime": runtime, "image": made.image.path, "operations": operations, "env": changed,
                          "argv": argv}))
        return
    print("\n".join([f"runtime {runtime}", *map(printable, operations)]))
    prefix = ["env", *(f"{name}={value}" for name, value in sorted(changed.items()))] if changed else []
    print(" ".join(_quoted(word, shlex.quote) for word in [*prefix, *argv]))


def _quoted(word: str, quote: Callable[[str], str]) -> str:
    """``word`` for a shell; what a terminal might obey, for an image's variables may hold that, as bash writes it."""
    if word.isprintable() or word.replace("\n", "").isprintable():
        return quote(word)
    data = os.fsencode(word)
    return "$'" + "".join(chr(c) if 32 <= c < 127 and c not in b"\\'" else f"\\x{c:02x}" for c in data) + "'"


def _tell(asked: LaunchRequest, stage: str, began: float) -> None:
    if asked.verbose:
        print(f"{PROG}: {stage}: {time.perf_counter() - began:.3f} s", file=sys.stderr)
