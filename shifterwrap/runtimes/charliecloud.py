"""The plan in ch-run's words.

ch-run keeps its environment, which is the host's less what must not get in; the image's and the user's variables are
given one by one (``--set-env=NAME=VALUE``, verbatim with --env-no-expand: an image's LD_PRELOAD must not reach a
program of the host). It mounts squashfs files itself and can make no mount point in a read-only image, so host
directories that the image has no place for are left out, with a warning, or refused where the user asked for them.
"""

from __future__ import annotations

from ..errors import RuntimeUnavailable
from ..host import Host
from ..plan import Command, Plan, is_host_only, within
from ..values import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_OWN = ("/dev", "/proc", "/sys", "/tmp")  # bound by ch-run, which also brings hosts, resolv.conf, passwd and group
_INSTEAD = "use --runtime embedded"


def command(plan: Plan, host: Host, program: str, environ: Mapping[str, str]) -> Command:
    """The program, arguments and environment; RuntimeUnavailable for what ch-run cannot express."""
    missing = [path for path in _OWN if path not in plan.image.points]
    if missing:
        raise RuntimeUnavailable(f"ch-run needs {', '.join(missing)} in the image", _INSTEAD)
    if plan.writable_tmpfs:
        raise RuntimeUnavailable("ch-run has no --writable-tmpfs", _INSTEAD)
    argv = [program, "--env-no-expand"]
    if not {"/etc/passwd", "/etc/group"} <= plan.image.points:
        argv.append("--no-passwd")
    reachable, notes = list(_OWN), []
    if plan.user.home == f"/home/{plan.user.name}" and "/home" in plan.image.points and _wants_home(plan):
        argv.append("--home")
        reachable.append(plan.user.home)
    for bind in plan.base:
        if bind.target.startswith("/etc/") or any(within(bind.target, path) for path in reachable):
            continue
        if bind.target in plan.image.points:
            argv += ["--bind", f"{bind.source}:{bind.target}"]
            reachable.append(bind.target)
        elif bind.target != "/var/tmp":
            notes.append(f"ch-run cannot bind {bind.source}: the image has no such directory")
    for bind in plan.binds:
        if bind.readonly:
            raise RuntimeUnavailable(f"ch-run cannot bind {bind.source} read-only", _INSTEAD)
        argv += ["--bind", f"{bind.source}:{bind.target}"]
        reachable.append(bind.target)
    argv += ["--cd", _workdir(plan, reachable)]
    argv += [f"--set-env={name}={_quoted(value)}" for name, value in plan.env.items()
             if name == "PATH" or environ.get(name) != value]
    env = {name: value for name, value in environ.items() if name == "PATH" or not is_host_only(name)}
    env.setdefault("USER", plan.user.name)  # ch-run ends without it
    return Command(program, (*argv, plan.image.path, "--", *plan.argv), env, tuple(notes))


def _wants_home(plan: Plan) -> bool:
    return any(bind.target == plan.user.home for bind in plan.base)


def _workdir(plan: Plan, reachable: list[str]) -> str:
    if plan.strict_workdir:
        return plan.workdirs[0]
    if plan.workdirs[0] == plan.cwd and not any(within(plan.cwd, path) for path in reachable):
        return plan.workdirs[1]
    return plan.workdirs[0]


def _quoted(value: str) -> str:
    """ch-run strips one pair of single quotes around a value."""
    return f"'{value}'" if value.startswith("'") and value.endswith("'") else value
