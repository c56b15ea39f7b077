"""The least of many candidates is the one that looking at each of them finds."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.core import ranked
from pdlab.core.ranked import FEW, Changes, Ranked


@dataclass(eq=False)
class Thing:
    tokens: int
    kind: int = 0


def tokens(x: Thing) -> int:
    return x.tokens


def kind(x: Thing) -> int:
    return x.kind


def things(count: int, changes: Changes[Thing], most: int = 9) -> Ranked[Thing]:
    rng = random.Random(count)
    return Ranked([Thing(rng.randrange(most), k % 3) for k in range(count)], changes)


@given(count=st.integers(0, 3 * FEW), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_least_is_the_first_least_whatever_changes(count: int, seed: int) -> None:
    changes: Changes[Thing] = Changes()
    there, elsewhere, rng = things(count, changes), Thing(-1), random.Random(seed)
    for _ in range(60):
        assert there.least(tokens) is min(there, key=tokens, default=None)
        for some in there.alike(kind):
            assert some.least(tokens) is min(some, key=tokens)
        for x in rng.sample(there, min(count, rng.randrange(4))):
            x.tokens = max(0, x.tokens + rng.choice((-3, -1, 0, 1, 3)))
            changes.note(x)
        changes.note(elsewhere)  # is no member, though it has fewest


def test_what_nobody_reads_is_not_kept_for_ever() -> None:
    changes: Changes[Thing] = Changes()
    there = things(2 * FEW, changes)
    assert there.least(tokens) is min(there, key=tokens)
    for k in range(3 * ranked._MOST_CHANGES):
        x = there[k % len(there)]
        x.tokens = (k * 7919) % 1000
        changes.note(x)
    assert len(changes.those) <= ranked._MOST_CHANGES
    assert there.least(tokens) is min(there, key=tokens)


def test_nothing_is_noted_for_nobody() -> None:
    changes: Changes[Thing] = Changes()
    things(FEW - 1, changes).least(tokens)
    assert not changes.wanted
    things(FEW, changes).least(tokens)
    assert changes.wanted


def test_a_heap_is_made_anew_before_it_grows_large() -> None:
    changes: Changes[Thing] = Changes()
    there = things(FEW, changes)
    for k in range(2000):
        there[k % FEW].tokens += 1
        changes.note(there[k % FEW])
        there.least(tokens)
    assert len(there._rankings[tokens].heap) <= 4 * FEW + 1


def test_functions_made_anew_get_an_answer_and_no_heap_each() -> None:
    there = things(FEW, Changes())
    assert all(there.least(lambda x, k=k: x.tokens + k) is min(there, key=tokens) for k in range(50))  # type: ignore[misc]
    assert len(there._rankings) <= 8
