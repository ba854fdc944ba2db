"""Which module may import which, and what a launch may load: the architecture, as a table that is checked.

Stages do not import stages: only the composers (pull, launch) and the doors (cli, doctor, __main__) know an order.
The exceptions are a noun and its verb: store and evict of cache, plan of request and config, runtimes of plan.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testbed.people import Person
from tests.testbed.stock import StockedRegistry

PACKAGE = Path(__file__).resolve().parent.parent / "shifterwrap"
THIRD_PARTY = {"filelock", "isal", "lz4", "prometheus_client", "psutil", "requests", "urllib3", "yaml", "zstandard"}

# module: what it may import of this package, and of what others wrote
MAY_IMPORT = {
    "__init__": "",
    "__main__": "pull sitefile cli",
    # foundations
    "values": "",
    "errors": "values",
    "linux": "",
    "events": "",
    "oci": "errors values",
    "request": "errors oci values",
    "config": "__init__ errors values",
    "sitefile": "errors config oci request yaml",
    "host": "errors linux values",
    "progress": "errors events",
    # the cache
    "cache": "errors linux oci values",
    "evict": "cache",
    "store": "errors linux cache evict",
    "singleflight": "errors linux",
    # cold stages
    "fetch": "errors events oci",
    "sources": "oci",
    "sources.http": "__init__ errors events oci fetch requests urllib3",
    "sources.bearer": "errors events oci fetch sources.http requests",
    "sources.docker": "errors events oci fetch sources sources.bearer sources.http requests",
    "convert": "",
    "convert.tree": "",
    "convert.room": "errors",
    "convert.tar_stream": "",
    "convert.tar_fields": "errors",
    "convert.tar_sparse": "errors convert.tar_fields convert.tar_stream convert.tree",
    "convert.tar": "errors convert.tar_fields convert.tar_sparse convert.tar_stream convert.tree",
    "convert.accelerators": "isal lz4 zstandard",
    "convert.decode": "errors convert.accelerators",
    "convert.layer": "errors oci convert.decode convert.tar",
    "convert.policy": "convert.tree",
    "convert.flatten": "errors convert.layer convert.policy convert.tar convert.tree",
    "convert.content": "errors convert.accelerators convert.tree",
    "convert.merged_tar": "convert.tree",
    "convert.decompress": "errors convert.accelerators convert.decode",
    "convert.sqfs_tables": "convert.decompress",
    "convert.sqfs_reader": "convert.decompress convert.sqfs_tables convert.tree",
    "convert.squashfs": (
        "errors events convert.content convert.decompress convert.merged_tar convert.room convert.sqfs_reader "
        "convert.tree"
    ),
    "convert.tree_writer": "errors events linux convert.content convert.room convert.tree",
    "convert.readback": (
        "errors events convert.accelerators convert.content convert.decompress convert.sqfs_reader convert.tree"
    ),
    # hot stages
    "lease": "errors values cache config oci progress singleflight store",
    "plan": "errors values config oci request",
    "runtimes": "",
    "runtimes.rootfs": "errors host linux plan request values",
    "runtimes.embedded": "errors host linux plan values runtimes.rootfs",
    "runtimes.apptainer": "errors host plan request values",
    "runtimes.charliecloud": "errors host plan request values",
    # composers
    "pull": (
        "__init__ cache config errors events fetch oci progress singleflight sources sources.docker store "
        "convert.content convert.decode convert.flatten convert.layer convert.readback convert.squashfs convert.tree "
        "convert.tree_writer filelock"
    ),
    "launch": (
        "__init__ cache config errors host lease oci plan request values "
        "runtimes.apptainer runtimes.charliecloud runtimes.embedded"
    ),
    # doors
    "doctor": "cache config convert.squashfs errors host linux plan progress runtimes.embedded psutil",
    "cli": (
        "__init__ cache config convert.sqfs_reader convert.tree_writer doctor errors evict host lease oci progress "
        "pull sitefile store"
    ),
}
STAGES = {"fetch", "sources", "convert", "lease", "plan", "runtimes"}
NOUN_AND_VERB = {("sources", "fetch"), ("runtimes", "plan")}

# What a launch never loads: each of these costs milliseconds, and 64 ranks start at once.
HEAVY = {
    "argparse", "asyncio", "base64", "collections", "concurrent", "configparser", "contextlib", "copy", "dataclasses",
    "email", "enum", "fnmatch", "functools", "gzip", "hashlib", "heapq", "http", "importlib.metadata", "inspect",
    "json", "locale", "logging", "multiprocessing", "pathlib", "pickle", "platform", "queue",
    "random", "re", "selectors", "shlex", "shutil", "signal", "site", "socket", "ssl", "string", "subprocess",
    "tempfile", "textwrap", "threading", "traceback", "typing", "urllib", "uuid", "weakref", "zlib",
} | THIRD_PARTY
DRY_RUN = {"collections", "enum", "functools", "json", "re", "shlex"}  # to print the plan
COLD = {
    "__main__", "cli", "convert", "doctor", "evict", "events", "fetch", "progress", "pull", "singleflight", "sitefile",
    "sources", "store",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name below it; a package's __init__ is the package's name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",) and parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """What the module imports anywhere in its file: names below this package, and third-party packages."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    package = name.split(".") if MODULES[name].name == "__init__.py" and name != "__init__" else name.split(".")[:-1]
    found: set[str] = set()
    for node in _run_time(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= _named(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                found |= _named(node.module or "", alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                found.add(_module_of(base, alias.name))
    return found - {name}


def _named(module: str, attribute: str = "") -> set[str]:
    parts = module.split(".")
    if parts[0] == "shifterwrap":
        return {_module_of(parts[1:], attribute)}
    return {parts[0]} & THIRD_PARTY


def _module_of(base: list[str], attribute: str) -> str:
    """`from base import attribute` loads base.attribute when that is a module, else it takes something out of base."""
    module = ".".join([*base, attribute])
    return module if module in MODULES else ".".join(base) or "__init__"


def _run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from _run_time(other)
            continue
        yield node
        yield from _run_time(node)


def test_every_module_has_a_row() -> None:
    assert sorted(MODULES) == sorted(MAY_IMPORT)


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_module_imports_what_its_row_allows(name: str) -> None:
    assert sorted(imports(name) - set(MAY_IMPORT[name].split())) == []


def test_rows_name_modules() -> None:
    named = {word for row in MAY_IMPORT.values() for word in row.split()}
    assert named <= set(MAY_IMPORT) | THIRD_PARTY


def room(name: str) -> str:
    return name.split(".")[0]


def test_stages_do_not_import_stages() -> None:
    """Between rooms; the rooms convert and sources keep their own order by the rows above."""
    crossing = {
        (name, other)
        for name in MODULES
        for other in imports(name)
        if room(name) in STAGES and room(other) in STAGES and room(name) != room(other)
        and (room(name), other) not in NOUN_AND_VERB
    }
    assert crossing == set()


def test_nothing_imports_a_door_or_a_composer() -> None:
    doors = {"__main__", "cli", "launch"}
    assert {name for name in MODULES if imports(name) & doors} <= {"__main__"}
    assert {name for name in MODULES if "pull" in imports(name)} <= {"__main__", "cli"}


def test_the_package_has_no_import_cycle() -> None:
    left = {name: imports(name) & set(MODULES) for name in MODULES}
    while True:
        leaves = {name for name, needs in left.items() if not needs & set(left)}
        if not leaves:
            break
        left = {name: needs for name, needs in left.items() if name not in leaves}
    assert left == {}


def names_of(heavy: set[str], loaded: set[str]) -> set[str]:
    """Which of ``heavy`` were loaded; a package's submodule counts as the package."""
    return {name for name in heavy if any(f"{other}.".startswith(f"{name}.") for other in loaded)}


def cold_part(loaded: set[str]) -> set[str]:
    ours = {name[len("shifterwrap.") :] for name in loaded if name.startswith("shifterwrap.")}
    return {name for name in ours if name in COLD or name.split(".")[0] in COLD}


def test_launch_closure_is_light() -> None:
    code = f"import sys; sys.path.append({str(PACKAGE.parent)!r}); import shifterwrap.launch; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-SI", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert names_of(HEAVY, loaded) == set()
    assert cold_part(loaded) == set()


# Runs wrapped-run in this interpreter and tells what was loaded when it becomes the command, or ends.
WATCHED = """
import os, sys
execve = os.execve
def become(*args):
    os.write(1, " ".join(sys.modules).encode())
    execve(*args)
os.execve = become
sys.argv = sys.argv[1:]
with open(sys.argv[0]) as script:
    program = compile(script.read(), sys.argv[0], "exec")
try:
    exec(program, {"__name__": "__main__"})
finally:
    print(*sys.modules)
"""


@pytest.mark.needs("users", "registry", "userns")
@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--dry-run", "--json")], ids=" ".join)
def test_a_warm_launch_loads_nothing_heavy(registry: StockedRegistry, tester: Person, options: tuple[str, ...]) -> None:
    image = registry.image("busybox")
    assert tester.run(["shifterwrap", "pull", image]).returncode == 0
    script = Path(sys.executable).parent / "wrapped-run"
    python: list[str | Path] = [sys.executable, "-SI", "-c", WATCHED, script]
    done = tester.run([*python, *options, "--runtime", "embedded", image, "true"])
    loaded = set(done.stdout.splitlines()[-1].split())
    assert (done.returncode, done.stderr) == (0, "")
    assert "shifterwrap.launch" in loaded
    assert names_of(HEAVY, loaded) <= (DRY_RUN if options else set())
    assert cold_part(loaded) == set()
