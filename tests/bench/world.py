"""What every row works in: one directory with the package installed, a registry, users, their caches, peers' images.

All of it is made for one run and removed at its end, with every process, mount and loop device that it left. Only the
built layouts of the large images are kept, where the test bed keeps them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench import processes
from tests.testbed import bench, upload
from tests.testbed.images import busybox_layer
from tests.testbed.ocilayout import Image, Layer, Member, directory, file, tar, write_layout
from tests.testbed.people import Person, settle
from tests.testbed.registry import Registry

CHECKOUT = Path(__file__).resolve().parents[2]
BASE = Path(os.environ.get("SHIFTERWRAP_TEST_BASE", "/var/tmp/shifterwrap-test"))
NOT_COPIED = (".*", "build", "*.egg-info", "__pycache__", "tests")
RUN_SECONDS = 900
SEED = 20261121


class Timed(NamedTuple):
    """What a stopwatch says of one start, or of several at once."""

    wall: float
    cpu: float
    codes: list[int]
    errors: list[str]

    def checked(self) -> Timed:
        """Itself, when all went well: a time of something that failed is no time."""
        if any(self.codes):
            raise RuntimeError(f"a measured command failed with {sorted(set(self.codes))}: {' | '.join(self.errors)}")
        return self


class Stopwatch:
    """Times commands from a small process that has this person's identity."""

    def __init__(self, person: Person, directory: Path) -> None:
        program = Path(__file__).with_name("stopwatch.py").read_text()
        self.person = person
        self._process = person.popen(
            ["/usr/bin/python3", "-SI", "-c", program, str(directory)], stdin=subprocess.PIPE, stderr=None
        )
        self.pid = self._process.pid

    def time(self, argv: Sequence[str | Path], env: Mapping[str, str] | None = None, times: int = 1) -> Timed:
        """Run to the end; `env` is on top of the person's own."""
        assert self._process.stdin and self._process.stdout
        variables = {**self.person.env, **(env or {})}
        request = {"argv": list(map(str, argv)), "env": variables, "times": times, "seconds": RUN_SECONDS}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Timed(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the small process, in the middle of something if need be."""
        self._process.kill()
        self._process.communicate()


class World:
    """See the module."""

    def __init__(self, scratch: Path, registry: Registry, *, quick: bool) -> None:
        self.quick = quick
        self.scratch = scratch
        self.registry = registry
        self.bin = scratch / "venv" / "bin"
        self.user = self._settle("swtester")
        self.root = self._settle("root")
        self.clock = self._stopwatch(self.user)
        self.root_clock = self._stopwatch(self.root)
        self._images: dict[str, str] = {}
        self._sifs: dict[str, Path] = {}

    def _settle(self, name: str) -> Person:
        person = settle(name, self.scratch)
        return person._replace(env={**person.env, "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"})

    def _stopwatch(self, person: Person) -> Stopwatch:
        return Stopwatch(person, self.directory(person, "stopwatch"))

    def close(self) -> None:
        """End the stopwatches."""
        self.clock.close()
        self.root_clock.close()

    def directory(self, person: Person, name: str) -> Path:
        """A new, empty directory of this person."""
        path = self.scratch / person.name / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700)
        os.chown(path, person.uid, person.gid)
        return path

    def image(self, name: str) -> str:
        """The reference of bb, sci or mid, pushed when it is first asked for."""
        if name not in self._images:
            say(f"image {name}")
            if name == "mid":
                self._images[name] = self._push_mid()
            else:
                self._images[name] = bench.push(name, BASE / "bench" / "layouts", self.registry.host)[0]
        return self._images[name]

    def _push_mid(self) -> str:
        """Busybox and four layers of some 12 MB: large enough to be killed while it is pulled."""
        layout = self.scratch / "mid"
        source = random.Random(SEED)
        layers = [busybox_layer(), *(Layer(tar(_filling(source, number))) for number in range(4))]
        write_layout(layout, [Image(layers, {"Env": ["PATH=/bin"], "Cmd": ["sh"]})])
        return upload.upload(self.registry.host, layout, "test/mid:1")

    def wrapped(self, *argv: str) -> list[str]:
        """A command line of wrapped-run."""
        return [str(self.bin / "wrapped-run"), *argv]

    def admin(self, person: Person, *argv: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `shifterwrap` to the end."""
        env = {"SHIFTERWRAP_CACHE_DIR": str(cache)} if cache else {}
        return person.run([self.bin / "shifterwrap", *argv], env=env, timeout=RUN_SECONDS)

    def warm(self, person: Person, name: str) -> Path:
        """The image in this person's own cache, pulled if need be: its file."""
        done = self.admin(person, "pull", "--json", self.image(name))
        if done.returncode:
            raise RuntimeError(f"shifterwrap pull failed: {done.stderr}")
        return Path(json.loads(done.stdout)[0]["path"])

    def apptainer(self, cache: Path) -> dict[str, str]:
        """The environment in which apptainer knows the registry and only this cache."""
        return {"APPTAINER_CACHEDIR": str(cache), "APPTAINER_TMPDIR": str(cache), "APPTAINER_NOHTTPS": "1"}

    def sif(self, name: str) -> Path:
        """The image as apptainer converted it."""
        if name not in self._sifs:
            self.pull_sif(name)
        return self._sifs[name]

    def pull_sif(self, name: str) -> Timed:
        """Have apptainer pull the image into a SIF, with a cold cache."""
        reference = self.image(name)
        say(f"apptainer pull {name}")
        cache = self.directory(self.user, "apptainer")
        target = self.directory(self.user, f"sif-{name}") / "image.sif"
        argv = ["/usr/bin/apptainer", "--silent", "pull", str(target), reference]
        taken = self.clock.time(argv, self.apptainer(cache)).checked()
        shutil.rmtree(cache)
        self._sifs[name] = target
        return taken

    def blob_gets(self) -> dict[str, int]:
        """How often each blob was fetched since the registry's record began."""
        counts: dict[str, int] = {}
        for request in self.registry.requests():
            if request.method == "GET" and "/blobs/sha256:" in request.path and request.status in (200, 206):
                digest = request.path.rpartition("/")[2]
                counts[digest] = counts.get(digest, 0) + 1
        return counts


def _filling(source: random.Random, number: int) -> list[Member]:
    """Files of all sizes in digits, which compress by half; some hide those of the layer below."""
    members: list[Member] = [directory("data"), directory(f"data/{number}")]
    for index in range(500):
        size = source.choice((300, 3_000, 30_000, 150_000))
        members.append(file(f"data/{number}/{index}", source.randbytes(size // 2).hex().encode()))
    return [*members, *(file(f"data/{index}", source.randbytes(20_000)) for index in range(50))]


def say(text: str) -> None:
    """Progress."""
    print(f"compare: {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def world(*, quick: bool) -> Iterator[World]:
    """Everything set up; and nothing left of it afterwards."""
    BASE.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="compare.", dir=BASE))
    scratch.chmod(0o755)
    try:
        say("a virtual environment with the package as it is now")
        install(scratch)
        with Registry(scratch / "registry") as registry:
            made = World(scratch, registry, quick=quick)
            try:
                yield made
            finally:
                made.close()
    finally:
        for text in clean(scratch):
            say(f"left behind, now removed: {text}")


def install(scratch: Path) -> None:
    """A virtual environment that ordinary users can read, with the package installed from a copy of the checkout."""
    copy, venv = scratch / "copy", scratch / "venv"
    shutil.copytree(CHECKOUT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "-qq", "--use-pep517", "--disable-pip-version-check"]
    subprocess.run(["/usr/bin/python3", "-m", "venv", str(venv)], check=True)
    subprocess.run([*pip, f"{copy}[fast]"], check=True)


def clean(scratch: Path) -> list[str]:
    """End, unmount, detach and delete whatever is in `scratch`; say what should not have been there any more."""
    found = _stray_processes(scratch)
    found += [_unmounted(point) for point in _mounts_in(scratch)]
    found += [_detached(loop) for loop in _loops_in(scratch)]
    shutil.rmtree(scratch, onerror=_open_and_retry)
    return found


def _stray_processes(scratch: Path) -> list[str]:
    """Kill what is still there after a moment, in which FUSE servers end, and what it starts meanwhile."""
    deadline = time.monotonic() + 3
    while any(processes.mentioning(scratch)) and time.monotonic() < deadline:
        time.sleep(0.05)
    found: dict[int, str] = {}
    while strays := list(processes.mentioning(scratch)):
        for pid in strays:
            command = processes.command_line(pid).replace(b"\0", b" ").decode(errors="replace")
            found[pid] = f"process {pid}: {command[:120].strip()}"
            processes.kill(pid)
        time.sleep(0.05)
    return list(found.values())


def _mounts_in(scratch: Path) -> list[str]:
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((point for point in points if point.startswith(f"{scratch}/")), reverse=True)


def _unmounted(point: str) -> str:
    subprocess.run(["umount", "--lazy", point], check=False)
    return f"mount {point}"


def _loops_in(scratch: Path) -> list[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if backing.read_text().startswith(f"{scratch}/"):
                found.append(backing.parts[3])
    return found


def _detached(loop: str) -> str:
    subprocess.run(["losetup", "--detach", f"/dev/{loop}"], check=False)
    return f"loop device {loop}"


def _open_and_retry(retry: Any, path: str, _: object) -> None:
    """A process that was just killed may have written one file more."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else os.unlink(path)
    if os.path.isdir(path):
        retry(path)
