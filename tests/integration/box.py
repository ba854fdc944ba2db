"""An image made to be launched, and people who have it in their caches, as a squashfs file or as a directory tree."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.testbed.images import BUSYBOX, busybox_layer
from tests.testbed.ocilayout import Image, Layer, directory, file, symlink, tar, write_layout
from tests.testbed.people import Person, settle
from tests.testbed.stock import StockedRegistry
from tests.testbed.upload import upload

PATIENCE_SECONDS = 30.0
NO_TOOLS = "tool_path: /nonexistent\n"  # neither squashfuse_ll nor a writer: whoever pulls gets a tree

# What an image may say, and a shell or a list separator may break.
HOSTILE = {
    "IMG_SPACES": "  two  words ",
    "IMG_QUOTES": "'\"`",
    "IMG_DOLLAR": "$HOME $(id) ${X}",
    "IMG_NEWLINE": "one\ntwo\n",
    "IMG_BACKSLASH": "a\\b\\",
    "IMG_COMMA": "a,b:c;d=e",
    "IMG_UNICODE": "Grüße ✓",
    "IMG_EMPTY": "",
}
WIRE_UP = {"SLURM_PROCID": "image", "PMI_RANK": "image", "PMIX_RANK": "image", "HOME": "/image"}
CONFIG = {
    "Env": ["PATH=/bin:/opt/tools", "FOO=from-image"]
    + [f"{name}={value}" for name, value in {**HOSTILE, **WIRE_UP}.items()],
    "Entrypoint": ["/opt/words", "entry"],
    "Cmd": ["cmd", "second word"],
    "WorkingDir": "/worktop",
}
WORDS = b"#!/bin/sh\nprintf '%s\\n' \"$@\"\n"


def lab() -> list[Image]:
    """A root with a shell, and everything that a launch may stumble over."""
    members = [
        directory("worktop"),
        directory("opt/tools"),
        directory("opt/directory"),
        directory("opt/suid"),
        directory("data"),
        directory("data/real"),
        directory("data/closed", mode=0o711),
        file("opt/words", WORDS, mode=0o755),
        file("opt/tools/tool", b"#!/bin/sh\necho tool\n", mode=0o755),
        file("opt/not-executable", b"#!/bin/sh\n", mode=0o644),
        file("opt/bad-interpreter", b"#!/no/such/program\n", mode=0o755),
        file("opt/no-format", b"neither one nor the other\n", mode=0o755),
        file("opt/suid/id", BUSYBOX.read_bytes(), mode=0o4755),
        file("data/real/file", b"of the image\n"),
        symlink("data/link", "real"),
        symlink("data/absolute", "/data/real"),
        symlink("data/escape", "../../../../../../data/real"),
        symlink("data/loop", "loop"),
        symlink("data/file-link", "real/file"),
        symlink("etc/localtime", "/usr/share/zoneinfo/Mars"),
    ]
    return [Image([busybox_layer(), Layer(tar(members))], CONFIG)]


class Row(NamedTuple):
    """What `shifterwrap list` tells of one entry."""

    name: str
    kind: str
    in_use: bool
    path: str


class Box(NamedTuple):
    """Somebody with a cached image. The embedded runtime is used unless `options` name another."""

    person: Person
    image: str
    kind: str

    def argv(self, command: tuple[str | Path, ...], options: tuple[str | Path, ...] = ()) -> list[str | Path]:
        return ["wrapped-run", "--runtime", "embedded", *options, self.image, *command]

    def run(
        self, *command: str | Path, options: tuple[str | Path, ...] = (), **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run the command in the container, to its end."""
        return self.person.run(self.argv(command, options), **how)

    def sh(
        self, script: str, *words: str | Path, options: tuple[str | Path, ...] = (), **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a script with the image's shell."""
        return self.run("sh", "-c", script, "sh", *words, options=options, **how)

    def out(self, script: str, *words: str | Path, options: tuple[str | Path, ...] = (), **how: Any) -> str:
        """What a script prints that must end well and say nothing on standard error."""
        done = self.sh(script, *words, options=options, **how)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    @contextlib.contextmanager
    def running(
        self, script: str = "", *, options: tuple[str | Path, ...] = (), **how: Any
    ) -> Iterator[subprocess.Popen[str]]:
        """A container that has run `script` and waits; it ends, if it has not, with the block."""
        argv = self.argv(("sh", "-c", f"{script}\necho ready\nexec cat"), options)
        process = self.person.popen(argv, stdin=subprocess.PIPE, **how)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
            process.communicate()

    def rows(self) -> list[Row]:
        """What is in the person's cache."""
        done = self.person.run(["shifterwrap", "list", "--json"])
        assert done.returncode == 0, done.stderr
        return [Row(row["name"], row["kind"], row["in_use"], row["path"]) for row in json.loads(done.stdout)]

    def in_use(self) -> bool:
        """Whether some process holds a lease."""
        return any(row.in_use for row in self.rows())


def published(registry: StockedRegistry, name: str, images: list[Image]) -> str:
    """The reference of an image that is not the catalogue's."""
    layout = registry.data / "layouts" / name
    if not layout.exists():
        write_layout(layout, images)
        upload(registry.host, layout, f"test/{name}:1")
        registry.forget()
    return f"docker://{registry.host}/test/{name}:1"


def boxed(registry: StockedRegistry, workspace: Path, name: str, kind: str, config: str = "") -> Box:
    """`name` with the laboratory's image in his cache, as an entry of that kind."""
    person = settle(name, workspace)
    box = Box(person, published(registry, "lab", lab()), kind)
    settings = configured(person, (NO_TOOLS if kind == "tree" else "") + config)
    done = person.run(["shifterwrap", "pull", box.image], env=settings)
    assert done.returncode == 0, done.stderr
    assert [row.kind for row in box.rows()] == [kind]
    return box


def configured(person: Person, text: str) -> Mapping[str, str]:
    """The environment that makes `text` the person's configuration."""
    place = person.home.parent / f"settings-{abs(hash(text))}"
    run = place / "run"  # the snapshot lies in there, and not in /dev/shm for ever
    place.mkdir(exist_ok=True)
    run.mkdir(mode=0o700, exist_ok=True)
    os.chown(run, person.uid, person.gid)
    (place / "shifterwrap.yaml").write_text(text, encoding="utf-8")
    return {"SHIFTERWRAP_CONFIG": str(place / "shifterwrap.yaml"), "XDG_RUNTIME_DIR": str(run)}


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A new directory that everybody may read."""
    path = Path(tempfile.mkdtemp(prefix="shifterwrap-test-", dir=parent))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def eventually(true: Callable[[], bool], what: str) -> None:
    """Poll until it is true; the test fails when it never becomes so."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def servers(path: str | Path) -> list[int]:
    """The squashfuse_ll processes that serve a file below `path`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if words[0].endswith(b"squashfuse_ll") and any(str(path).encode() in word for word in words):
                    found.append(int(entry.name))
    return found


# ---- installations of our own

BIN = Path(sys.executable).parent


def copied(place: Path) -> None:
    """The checkout as its users get it: what building leaves in the tree must not be left in ours."""
    unwanted = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "shared")
    shutil.copytree(Path(__file__).resolve().parents[2], place, ignore=unwanted)


def pip(python: str | Path, *words: str | Path) -> None:
    """Install, and nothing that it depends on."""
    quiet = ["-qq", "--disable-pip-version-check", "--no-deps", "--use-pep517"]
    subprocess.run([python, "-m", "pip", "install", *quiet, *words], check=True)


def environment(venv: Path, *words: str | Path, without: tuple[str, ...] = ()) -> Path:
    """The bin directory of a new environment, with this package from `words` and what ours has `without` some of it."""
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (site,) = (BIN.parent / "lib").glob("python3*/site-packages")
    (own,) = (venv / "lib").glob("python3*/site-packages")
    for package in site.iterdir():
        left_out = package.name.startswith(("shifterwrap", "__editable", "pip", "__pycache__", *without))
        if not left_out and not (own / package.name).exists():
            (own / package.name).symlink_to(package)
    pip(venv / "bin" / "python", *words)
    return venv / "bin"
