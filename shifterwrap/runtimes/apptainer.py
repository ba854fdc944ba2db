"""The plan in apptainer's (and singularity's) words: one ``exec`` of the squashfs file or the directory tree.

apptainer binds home, current directory, /tmp, /dev, /proc, /sys and the name service files by itself, so only the
site's and the user's binds are passed. Its own environment is the host's: an image's variables (LD_PRELOAD,
APPTAINER_BIND …) must not reach a program of the host. They travel as APPTAINERENV_NAME, whose value apptainer writes
into a shell script in the container, within double quotes; what a shell would expand there is escaped (tried with
apptainer 1.4.5: newlines, quotes, backslashes, ``$(…)`` come out as they went in).
"""

from __future__ import annotations

from ..errors import RuntimeUnavailable
from ..host import Host
from ..plan import Command, Plan, is_host_only
from ..values import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_PREFIXES = {"apptainer": "APPTAINERENV_", "singularity": "SINGULARITYENV_"}
_OWN = frozenset({"HOME", "PWD"})  # apptainer sets these itself
_INSTEAD = "use --runtime embedded"


def command(plan: Plan, host: Host, program: str, environ: Mapping[str, str]) -> Command:
    """The program, arguments and environment; RuntimeUnavailable for what apptainer cannot express."""
    argv = [program, "--silent", "exec"]
    if host.uid == 0 and not host.full_capabilities:
        argv.append("--userns")  # it would ask for capabilities that root has not got here, and fail
    for bind in plan.binds:
        if any(mark in path for path in bind[:2] for mark in ",:"):
            raise RuntimeUnavailable(f"apptainer cannot bind {bind.source}: a comma or a colon in the path", _INSTEAD)
        argv += ["--bind", f"{bind.source}:{bind.target}:{'ro' if bind.readonly else 'rw'}"]
    if plan.user.home not in ("", "/") and all(bind.target != plan.user.home for bind in plan.base):
        argv.append("--no-home")
    if plan.strict_workdir or plan.workdirs[0] != plan.cwd:
        argv += ["--pwd", plan.workdirs[0]]
    if plan.writable_tmpfs:
        argv.append("--writable-tmpfs")
    argv += [plan.image.path, *plan.argv]
    prefix = _PREFIXES["singularity" if program.endswith("/singularity") else "apptainer"]
    return _with_environment(plan, environ, prefix, program, tuple(argv))


def _with_environment(plan: Plan, environ: Mapping[str, str], prefix: str, program: str,
                      argv: tuple[str, ...]) -> Command:
    env = {name: value for name, value in environ.items() if name in ("PATH", "PWD") or not is_host_only(name)}
    notes = []
    for name, value in plan.env.items():
        if name not in plan.overrides and (name in _OWN or (name != "PATH" and environ.get(name) == value)):
            continue
        if name in _OWN or not _is_shell_name(name):
            if name in plan.overrides:
                raise RuntimeUnavailable(f"apptainer cannot set the variable {name}", _INSTEAD)
            notes.append(f"apptainer cannot set the image's variable {name}; left out")
            continue
        env[prefix + name] = value.replace("\\", "\\\\").replace("$", "\\$").replace("`", "\\`")
    return Command(program, argv, env, tuple(notes))


def _is_shell_name(name: str) -> bool:
    return name.isidentifier() and name.isascii()
