"""The plan in apptainer's (and singularity's) words: one ``exec`` of the squashfs file or the directory tree.

apptainer binds home, current directory, /tmp, /dev, /proc, /sys and the name service files by itself, so only the
site's and the user's binds are passed. The image's variables travel as APPTAINERENV_NAME, which no shell and no list
separator ever sees; the host's pass by themselves, as the plan's precedence wants.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import RuntimeUnavailable
from ..host import Host
from ..plan import HOST_ONLY, Command, Plan, is_host_only

_PREFIXES = {"apptainer": "APPTAINERENV_", "singularity": "SINGULARITYENV_"}


def command(plan: Plan, host: Host, program: str, environ: Mapping[str, str]) -> Command:
    """The program, arguments and environment; RuntimeUnavailable for what apptainer cannot express."""
    argv = [program, "--silent", "exec"]
    if host.uid == 0 and not host.full_capabilities:
        argv.append("--userns")  # it would ask for capabilities that root has not got here, and fail
    for bind in plan.binds:
        if "," in bind.source + bind.target or ":" in bind.source + bind.target:
            raise RuntimeUnavailable(f"apptainer cannot bind {bind.source}: the path has a comma or a colon",
                                     "use --runtime embedded")  # fmt: skip
        argv += ["--bind", f"{bind.source}:{bind.target}:{'ro' if bind.readonly else 'rw'}"]
    if plan.strict_workdir or plan.workdirs[0] != _cwd(plan):
        argv += ["--pwd", plan.workdirs[0]]
    if plan.writable_tmpfs:
        argv.append("--writable-tmpfs")
    argv += [plan.image.path, *plan.argv]
    prefix = _PREFIXES["singularity" if program.endswith("/singularity") else "apptainer"]
    return Command(program, tuple(argv), _environment(plan, environ, prefix))


def _cwd(plan: Plan) -> str:
    return plan.env.get("PWD", "")


def _environment(plan: Plan, environ: Mapping[str, str], prefix: str) -> dict[str, str]:
    """apptainer's own environment: the host's, less what must not get in, and the plan's variables under its prefix."""
    kept = {name: value for name, value in environ.items() if name in ("PATH", "PWD") or not is_host_only(name)}
    kept = {name: value for name, value in kept.items() if name not in HOST_ONLY or name in ("PATH", "PWD")}
    changed = {name: value for name, value in plan.env.items() if name == "PATH" or environ.get(name) != value}
    kept.update({prefix + name: value for name, value in changed.items() if name != "HOME"})
    return kept
