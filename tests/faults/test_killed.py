"""Pulls that are killed, stopped or interrupted: their locks are dropped, others take over, nothing is damaged."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.fakes import registry as fake
from tests.fakes.registry import Registry, status
from tests.integration import ends
from tests.integration.ends import app, configured, refused, run
from tests.testbed.people import Person

pytestmark = pytest.mark.needs(*ends.NEEDS)

CROWD = 8
STAGES = ("resolve", "fetch", "convert", "verify", "commit")
MANIFEST, BLOB = "/manifests/", "/blobs/"
CONFIG = f"{BLOB}{app().document['config']['digest']}"
LAYER = f"{BLOB}{app().document['layers'][0]['digest']}"


@pytest.fixture
def hub() -> Iterator[Registry]:
    with Registry() as running:
        yield running


@pytest.fixture
def user(tester: Person) -> Person:
    return configured(tester, read_seconds=int(ends.PATIENCE_SECONDS))


def start(user: Person, reference: str, *options: str) -> subprocess.Popen[str]:
    """A launch in a process group of its own, as a batch system starts a step."""
    return user.popen(["wrapped-run", *options, reference], start_new_session=True)


def crowd(user: Person, reference: str, count: int = CROWD) -> list[subprocess.Popen[str]]:
    return [start(user, reference) for _ in range(count)]


def waiting(users: list[subprocess.Popen[str]]) -> None:
    """Wait until all but one of them wait for that one, which they say."""
    for one in users:
        assert one.stderr is not None
        line = one.stderr.readline()
        assert line.startswith(("wrapped-run: waiting for process ", "wrapped-run: resolve ")), line


def recovers(user: Person, reference: str) -> None:
    """After a kill: what is visible is sound, gc takes the rest, and the next run works."""
    ends.swept(user)
    assert run(user, reference) == "1"
    ends.verified(user)
    assert ends.unfinished(user.cache) == []


# ---- killed at every stage


@pytest.mark.parametrize(
    ("pattern", "after"), [(MANIFEST, 0), (MANIFEST, 10), (CONFIG, 0), (LAYER, 0), (LAYER, 1000), (LAYER, 300_000)]
)
def test_a_pull_that_is_killed_while_the_registry_sends_leaves_only_garbage(
    user: Person, hub: Registry, pattern: str, after: int
) -> None:
    ends.kept(user, hub)
    before = ends.visible(user.cache)
    reference = hub.add("lab/app", "1", app())
    with ends.held(hub, pattern, after) as hold:
        process = start(user, reference)
        hold.reached()
        os.killpg(process.pid, signal.SIGKILL)
        assert ends.finished(process).returncode == -signal.SIGKILL
        assert ends.visible(user.cache) == before
    recovers(user, reference)


@pytest.mark.parametrize(
    ("stage", "tree"), [*((stage, False) for stage in STAGES), ("convert", True), ("commit", True)]
)
def test_a_pull_that_is_killed_when_a_stage_begins_leaves_only_garbage(
    user: Person, hub: Registry, stage: str, tree: bool
) -> None:
    user = ends.with_trees(user) if tree else user
    ends.kept(user, hub)
    before = ends.visible(user.cache)
    reference = hub.add("lab/app", "1", app())
    process = start(user, reference)
    assert process.stderr is not None
    assert [line for line in iter(process.stderr.readline, f"wrapped-run: {stage} {reference}\n") if not line] == []
    os.killpg(process.pid, signal.SIGKILL)
    ends.finished(process)
    assert before.items() <= ends.visible(user.cache).items()
    recovers(user, reference)


# ---- killed while others wait


def test_a_producer_that_is_killed_is_taken_over_and_all_succeed(user: Person, hub: Registry) -> None:
    reference = hub.add("lab/app", "1", app())
    with ends.held(hub, LAYER, 1000) as hold:
        users = crowd(user, reference)
        hold.reached()
        os.kill(ends.producer(user.cache), signal.SIGKILL)
        hold.reached()  # somebody took over
    assert [ends.finished(one).stdout for one in users] == ["1"] * CROWD
    assert hub.count("GET", LAYER) == 2
    assert ends.unfinished(user.cache) == []
    ends.verified(user)


def test_a_producer_that_is_killed_with_all_its_group_is_taken_over(user: Person, hub: Registry) -> None:
    reference = hub.add("lab/app", "1", app())
    with ends.held(hub, LAYER, 1000) as hold:
        first = start(user, reference)
        hold.reached()
        users = crowd(user, reference, CROWD - 1)
        waiting(users)
        os.killpg(first.pid, signal.SIGKILL)
        hold.reached()
    assert ends.finished(first).returncode == -signal.SIGKILL
    assert [ends.finished(one).stdout for one in users] == ["1"] * (CROWD - 1)
    assert hub.count("GET", LAYER) == 2
    ends.verified(user)


def test_a_launcher_that_is_killed_alone_does_not_end_the_pull_for_the_others(user: Person, hub: Registry) -> None:
    reference = hub.add("lab/app", "1", app())
    with ends.held(hub, LAYER, 1000) as hold:
        first = start(user, reference)
        hold.reached()
        users = crowd(user, reference, 3)
        waiting(users)
        os.kill(first.pid, signal.SIGKILL)
        first.wait(ends.PATIENCE_SECONDS)
    assert [ends.finished(one).stdout for one in users] == ["1"] * 3
    assert hub.count("GET", LAYER) == 1
    ends.verified(user)


def test_what_kills_three_producers_in_a_row_is_told_to_everybody(user: Person, hub: Registry) -> None:
    kept = ends.kept(user, hub)
    before = ends.visible(user.cache)
    reference = hub.add("lab/app", "1", app())
    with ends.held(hub, LAYER, 1000) as hold:
        first = start(user, reference)
        hold.reached()
        users = crowd(user, reference, CROWD - 1)
        waiting(users)
        dead = 0
        for following in (True, True, False):
            dead = ends.producer(user.cache, but=dead)
            os.kill(dead, signal.SIGKILL)
            if following:
                hold.reached()
        said = {refused(ends.finished(one), "3 processes died", "memory limit") for one in [first, *users]}
    assert len(said) == 1
    assert ends.visible(user.cache) == before
    assert run(user, reference) == "1"
    assert run(user, kept) == "kept"
    ends.swept(user)


# ---- deadlines


def test_a_waiter_gives_up_at_its_deadline_and_the_pull_goes_on(user: Person, hub: Registry) -> None:
    reference = hub.add("lab/app", "1", app())
    with ends.held(hub, LAYER, 1000) as hold:
        pulling = start(user, reference)
        hold.reached()
        hasty = configured(user, pull_deadline_seconds=1)
        worker = ends.producer(user.cache)
        said = refused(hasty.run(["wrapped-run", reference]), f"process {worker}", "deadline", "raise pull_deadline")
        assert "pulling" in said
        refused(hasty.run(["shifterwrap", "pull", reference]), "deadline", code=1, prog="shifterwrap")
    assert ends.finished(pulling).stdout == "1"


def test_a_waiter_for_another_tag_of_the_same_image_gives_up_too(user: Person, hub: Registry) -> None:
    first, second = (hub.add("lab/app", tag, app()) for tag in ("1", "2"))
    with ends.held(hub, LAYER, 1000) as hold:
        pulling = start(user, first)
        hold.reached()
        hasty = configured(user, pull_deadline_seconds=2)
        done = hasty.run(["wrapped-run", second])
        refused(done, "the deadline passed", "raise pull_deadline")
    assert ends.finished(pulling).stdout == "1"
    assert run(user, second) == "1"
    assert hub.count("GET", LAYER) == 1


def test_a_pull_ends_at_its_deadline(user: Person, hub: Registry) -> None:
    hasty = configured(user, pull_deadline_seconds=1)
    reference = hub.add("lab/app", "1", app())
    with ends.held(hub, LAYER, 1000), ends.unharmed(user):
        refused(hasty.run(["wrapped-run", reference]), "the deadline", "raise pull_deadline")
    assert run(user, reference, "--pull", "always") == "1"


def test_a_producer_that_is_stopped_is_waited_for_until_the_deadline(user: Person, hub: Registry) -> None:
    reference = hub.add("lab/app", "1", app())
    with ends.held(hub, LAYER, 1000) as hold:
        pulling = start(user, reference)
        hold.reached()
        os.killpg(pulling.pid, signal.SIGSTOP)
        hasty = configured(user, pull_deadline_seconds=1)
        refused(hasty.run(["wrapped-run", reference]), "deadline")
        os.killpg(pulling.pid, signal.SIGCONT)
    assert ends.finished(pulling).stdout == "1"


# ---- interrupted


@pytest.mark.parametrize("pattern", [MANIFEST, LAYER])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_pull_that_is_interrupted_says_nothing_and_the_next_one_works(
    user: Person, hub: Registry, pattern: str, number: signal.Signals, code: int
) -> None:
    reference = hub.add("lab/app", "1", app())
    with ends.held(hub, pattern, 100) as hold:
        process = start(user, reference)
        hold.reached()
        os.killpg(process.pid, number)
        done = ends.finished(process)
        assert done.returncode == code
        assert [line for line in done.stderr.splitlines() if line != f"wrapped-run: resolve {reference}"] in (
            [],
            [f"wrapped-run: fetch {reference}"],
        )
    recovers(user, reference)


def test_a_failure_is_forgotten_when_a_person_insists(user: Person, hub: Registry) -> None:
    reference = hub.add("lab/app", "1", app())
    hub.fault(MANIFEST, status(404), times=1)
    refused(user.run(["wrapped-run", reference]), "is not in registry")
    refused(user.run(["wrapped-run", reference]), "is not in registry")
    assert hub.count("GET", MANIFEST) == 1
    assert run(user, reference, "--pull", "always") == "1"


def test_a_broken_connection_in_the_middle_of_a_herd_is_one_more_request(user: Person, hub: Registry) -> None:
    patient = configured(user, retries=3)
    reference = hub.add("lab/app", "1", app())
    hub.fault(LAYER, fake.truncated(1000), times=1)
    users = crowd(patient, reference)
    assert [ends.finished(one).stdout for one in users] == ["1"] * CROWD
    assert hub.count("GET", LAYER) == 2
