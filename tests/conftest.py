"""Fixtures for every test. Nothing of the test bed is started, or needed, before a test asks for it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testbed import features
from tests.testbed.people import Person, settle
from tests.testbed.stock import StockedRegistry

OWN = "" if os.geteuid() == 0 else f"-{os.geteuid()}"
BASE = Path(os.environ.get("SHIFTERWRAP_TEST_BASE", f"/var/tmp/shifterwrap-test{OWN}"))
REQUIRE_ALL = os.environ.get("SHIFTERWRAP_TESTS_REQUIRE_ALL") == "1"
FOREIGN = ("SLURM_", "PMI", "SHIFTERWRAP_", "APPTAINER", "SINGULARITY")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"needs(feature, ...): what the machine must have: {', '.join(features.PROBES)}")


def pytest_report_header() -> str:
    return f"features: {features.summary()}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        _need(*marker.args)


def _need(*wanted: str) -> None:
    """Skip a test that the machine cannot run, or fail it where everything is meant to be there."""
    missing = [f"{feature}: {features.lack(feature)}" for feature in wanted if features.lack(feature)]
    if missing and REQUIRE_ALL:
        pytest.fail("; ".join(missing), pytrace=False)
    elif missing:
        pytest.skip("; ".join(missing))


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the job, the settings or the runtime of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)


def _scratch(prefix: str) -> Path:
    """A new directory on a node-local file system that every user can reach; pytest's tmp_path is root's alone."""
    parent = BASE / "tmp"
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=parent))
    path.chmod(0o755)
    return path


@pytest.fixture
def workspace() -> Iterator[Path]:
    """This test's own directory, for anybody to read."""
    path = _scratch("test")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def registry() -> Iterator[StockedRegistry]:
    """A real registry, one for the session: `registry.image(name)`, `registry.layout(name)`, `registry.requests()`."""
    _need("registry", "busybox")
    data = _scratch("registry")
    with StockedRegistry(data) as running:
        yield running
    shutil.rmtree(data)


@pytest.fixture
def tester(workspace: Path) -> Person:
    """An ordinary user."""
    _need("users")
    return settle("swtester", workspace)


@pytest.fixture
def other(workspace: Path) -> Person:
    """Another ordinary user."""
    _need("users")
    return settle("swother", workspace)


@pytest.fixture
def root(workspace: Path) -> Person:
    """The administrator."""
    _need("users")
    return settle("root", workspace)
