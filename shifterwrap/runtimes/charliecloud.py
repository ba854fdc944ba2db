"""The plan in ch-run's words. ch-run passes its environment through, so the plan's is simply given to it."""

from __future__ import annotations

from ..errors import RuntimeUnavailable
from ..host import Host
from ..plan import Command, Plan


def command(plan: Plan, host: Host, program: str) -> Command:
    """The program, arguments and environment; RuntimeUnavailable for what ch-run cannot express."""
    argv = [program, "--no-home"]
    if plan.writable_tmpfs:
        raise RuntimeUnavailable("ch-run has no --writable-tmpfs", "use --runtime embedded")
    for bind in plan.base + plan.binds:
        if bind.target in ("/dev", "/proc", "/sys", "/tmp") or bind.target.startswith("/etc/"):
            continue  # ch-run's own
        argv += ["--bind", f"{bind.source}:{bind.target}"]
    argv += ["--cd", plan.workdirs[0], plan.image.path, "--", *plan.argv]
    return Command(program, tuple(argv), plan.env)
