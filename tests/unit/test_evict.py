"""evict.py: what must go, as a pure function over tables."""

from __future__ import annotations

import random

import pytest

from shifterwrap.evict import MIN_AGE_SECONDS, Candidate, victims

NOW = 1_000_000.0
OLD = NOW - 10 * MIN_AGE_SECONDS


def candidate(name: str, size: int = 10, used: float = OLD, kept: bool = False) -> Candidate:
    return Candidate(name, size, used, kept)


@pytest.mark.parametrize(
    ("need", "expected"), [(-5, ""), (0, ""), (1, "a"), (10, "a"), (11, "ab"), (20, "ab"), (21, "abc"), (99, "abc")]
)
def test_the_least_recently_used_go_first_and_no_more_than_needed(need: int, expected: str) -> None:
    table = [candidate("c", used=OLD + 2), candidate("a", used=OLD), candidate("b", used=OLD + 1)]
    assert "".join(victim.name for victim in victims(table, need, NOW)) == expected


def test_what_is_kept_or_new_stays_however_much_is_needed() -> None:
    table = [
        candidate("kept", kept=True),
        candidate("new", used=NOW - MIN_AGE_SECONDS + 1),
        candidate("due", used=NOW - MIN_AGE_SECONDS),
        candidate("of the future", used=NOW + 5),  # the clock was set back, and nothing is known of it
    ]
    assert [victim.name for victim in victims(table, 10**9, NOW)] == ["due", "of the future"]


@pytest.mark.parametrize("seed", range(300))
def test_any_table_is_decided_by_the_same_rules(seed: int) -> None:
    chance = random.Random(seed)
    table = [
        candidate(
            str(n), chance.randrange(100), NOW - chance.choice([0, 60, 120, 500, 500, 9000]), chance.random() < 0.3
        )
        for n in range(chance.randrange(12))
    ]
    before, need = list(table), chance.randrange(-10, 400)
    chosen = victims(table, need, NOW)
    due = [item for item in table if not item.kept and NOW - item.last_used >= MIN_AGE_SECONDS]
    assert table == before
    assert set(chosen) <= set(due)
    assert len(set(chosen)) == len(chosen)
    freed = sum(item.bytes for item in chosen)
    assert freed >= need or sorted(chosen) == sorted(due)  # enough, or all there is
    assert not chosen or freed - chosen[-1].bytes < need  # without the last it would not be enough
    assert max((i.last_used for i in chosen), default=0) <= min(
        (i.last_used for i in due if i not in chosen), default=NOW
    )
    chance.shuffle(table)
    assert victims(table, need, NOW) == chosen
    assert victims(tuple(table), need, NOW) == chosen
