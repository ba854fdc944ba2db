"""The images to demonstrate and measure with: test/bb:1, a megabyte, and test/sci:1 and :2, as large as real ones are.

`sci` is a Debian with MPI, a scientific Python stack, an application, and a top layer that hides some of it: four
layers, 0.9 GB in 22 000 files. `sci:2` differs from `sci:1` in the small top layer only. Building takes minutes, needs
root, the network and `debootstrap`, and is done once for each directory it is kept in.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.testbed import registry
from tests.testbed.images import busybox
from tests.testbed.ocilayout import Image, Layer, file, opaque, tar, whiteout, write_layout

SCI_CONFIG = {
    "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH=/opt/site:/opt/app"],
    "Entrypoint": ["/usr/bin/env"],
    "Cmd": ["bash"],
    "WorkingDir": "/opt",
}


def push(name: str, data: Path, host: str) -> list[str]:
    """Push every tag of the image `name`, built first if `data` does not hold it yet; return their URLs."""
    tags = {"bb": ("1",), "sci": ("1", "2")}[name]
    layout = data / name
    if not (layout / "index.json").exists():
        data.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=data) as scratch:
            new = Path(scratch) / "layout"
            _build_bb(new) if name == "bb" else _build_sci(new, Path(scratch))
            new.rename(layout)
    return [registry.push(host, layout, f"test/{name}:{tag}", tag) for tag in tags]


def _build_bb(layout: Path) -> None:
    write_layout(layout, busybox())


def _build_sci(layout: Path, scratch: Path) -> None:
    lower = [Layer(part(scratch)) for part in (_debian, _packages, _application)]
    hiding = [opaque("opt/site/pandas"), whiteout("opt/site/scipy")]
    for tag in ("1", "2"):
        top = Layer(tar([*hiding, file("opt/hello", f"hello {tag}\n".encode())]))
        write_layout(layout, [Image([*lower, top], SCI_CONFIG)], tag)


def _debian(scratch: Path) -> Path:
    root = scratch / "debian"
    _run("debootstrap", "--variant=minbase", "--include=python3-minimal,mpich", "trixie", str(root), _mirror())
    for unwanted in ("dev", "var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / unwanted)
        (root / unwanted).mkdir()
    return _tarred(root)


def _packages(scratch: Path) -> Path:
    wheels, root = scratch / "wheels", scratch / "packages"
    _pip(scratch, "download", "--no-deps", "--dest", str(wheels), "numpy", "scipy", "pandas")
    for wheel in wheels.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(root / "opt" / "site")
    return _tarred(root)


def _application(scratch: Path) -> Path:
    root = scratch / "application"
    _pip(scratch, "install", "--target", str(root / "opt" / "app"), "botocore", "sympy", "networkx", "cryptography")
    return _tarred(root)


def _pip(scratch: Path, *argv: str) -> None:
    venv = scratch / "venv"
    if not venv.exists():
        _run(sys.executable, "-m", "venv", str(venv))
    _run(str(venv / "bin" / "pip"), "--quiet", "--disable-pip-version-check", *argv)


def _tarred(root: Path) -> Path:
    archive = root.with_suffix(".tar")
    owner = ["--numeric-owner", "--sort=name", "--xattrs", "--xattrs-include=*"]
    _run("tar", "-C", str(root), *owner, "-cf", str(archive), ".")
    shutil.rmtree(root)
    return archive


def _mirror() -> str:
    """Where the machine's own apt gets this Debian release from."""
    release = [
        line for line in Path("/etc/os-release").read_text().splitlines() if line.startswith("VERSION_CODENAME=")
    ]
    codename = release[0].partition("=")[2]
    targets = _run("apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages").split("\n")
    return next(target.split()[1] for target in targets if target.startswith(f"{codename} "))


def _run(*argv: str) -> str:
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} failed:\n{done.stdout[-2000:]}")
    return done.stdout
