"""What is pulled is what the layers say: each image of the catalogue against the oracle, by every way of reading it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.testbed.images import NAMES
from tests.testbed.oracle import Node, differences, expected, tree
from tests.testbed.people import Person
from tests.testbed.stock import StockedRegistry

WITHOUT_TOOLS = "tool_path: /nonexistent\n"  # no writer of squashfs: the entry is a directory tree
READ_ALL = """
import os, stat, sys
def failed(error): raise error
for base, directories, files in os.walk(os.fsencode(sys.argv[1]), onerror=failed):
    for name in files:
        path = os.path.join(base, name)
        if stat.S_ISREG(os.lstat(path).st_mode):
            with open(path, "rb") as stream:
                while stream.read(1 << 20):
                    pass
"""


def pulled(person: Person, reference: str, settings: str, workspace: Path) -> Path:
    """The image file or directory of ``reference``, pulled with ``settings``."""
    config = workspace / "settings.yaml"
    config.write_text(settings)
    done = person.run(["shifterwrap", "pull", "--json", reference], env={"SHIFTERWRAP_CONFIG": str(config)})
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)[0]["path"])


@contextmanager
def mounted(image: Path, target: Path, *command: str) -> Iterator[Path]:
    """The image mounted at ``target`` by ``command``, which gets both as its last arguments."""
    target.mkdir()
    subprocess.run([*command, str(image), str(target)], check=True, capture_output=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


def comparable(root: Path, name: str) -> dict[bytes, Node]:
    """The tree at ``root`` without what no layer says: the root's time, and that of parents made in passing."""
    nodes = tree(root, directory_mtimes=name != "implicit-parents")
    return {**nodes, b".": nodes[b"."]._replace(mtime=None)}


@pytest.mark.needs("squashfs-mount", "umoci")
@pytest.mark.parametrize("name", NAMES)
def test_a_kept_image_equals_the_oracles(name: str, registry: StockedRegistry, root: Person, workspace: Path) -> None:
    oracle = comparable(expected(name, workspace / "oracle"), name)
    image = pulled(root, registry.image(name), "owner_policy: keep\n", workspace)
    with mounted(image, workspace / "kernel", "mount", "-t", "squashfs", "-o", "loop,ro") as kernel:
        assert differences(oracle, comparable(kernel, name)) == []
    subprocess.run(["unsquashfs", "-quiet", "-no-progress", "-dest", str(workspace / "unsquashfs"), str(image)],
                   check=True, capture_output=True)
    assert differences(oracle, comparable(workspace / "unsquashfs", name)) == []


@pytest.mark.needs("squashfs-mount", "squashfuse_ll")
@pytest.mark.parametrize("name", NAMES)
def test_an_image_reads_alike_in_every_way_and_for_everybody(name: str, registry: StockedRegistry, root: Person,
                                                             other: Person, workspace: Path) -> None:
    image = pulled(root, registry.image(name), "", workspace)
    assert image.name == "image.sqsh"
    with mounted(image, workspace / "kernel", "mount", "-t", "squashfs", "-o", "loop,ro") as kernel:
        wanted = comparable(kernel, name)
        done = other.run([sys.executable, "-c", READ_ALL, kernel])
        assert (done.returncode, done.stderr) == (0, "")
    with mounted(image, workspace / "fuse", "squashfuse_ll") as fuse:
        assert differences(wanted, comparable(fuse, name)) == []
    root.run(["shifterwrap", "rm", "--all"])
    directory = pulled(root, registry.image(name), WITHOUT_TOOLS, workspace)
    assert directory.name == "tree"
    assert differences(wanted, comparable(directory, name)) == []


def test_the_default_policy_gives_everything_to_root_and_strips_privilege(registry: StockedRegistry, root: Person,
                                                                          workspace: Path) -> None:
    image = pulled(root, registry.image("modes"), "", workspace)
    with mounted(image, workspace / "kernel", "mount", "-t", "squashfs", "-o", "loop,ro") as kernel:
        nodes = tree(kernel)
    assert {(node.uid, node.gid) for node in nodes.values()} == {(0, 0)}
    assert [path for path, node in nodes.items() if node.type == "file" and node.mode & 0o6000] == []
    assert [path for path, node in nodes.items() if node.type != "symlink" and node.mode & 0o444 != 0o444] == []
