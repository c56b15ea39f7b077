"""The dice's schedules: the same for the same seed, survivable by construction, and in the simulator's words."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdlab.experiment.study import FaultSpec
from tests.chaos.schedule import INSTANCES, KINDS, ROUND_S, arrivals, faults, schedule

SEEDS, ROUNDS = st.integers(0, 10_000), st.integers(0, 50)


@given(SEEDS, ROUNDS)
def test_a_round_is_a_function_of_its_seed_and_leaves_one_instance_of_each_role(seed: int, number: int) -> None:
    troubles = schedule(seed, number)
    assert troubles == schedule(seed, number)
    struck = [one.whom for one in troubles if one.whom in INSTANCES]
    assert len(set(struck)) == len(struck)
    assert {INSTANCES[name] for name in INSTANCES if name not in struck} == {"prefill", "decode"}
    assert all(0 < one.at_s < ROUND_S for one in troubles)
    assert not any(one.kind == "disk" for one in schedule(seed, number, disk=False))


@given(SEEDS, ROUNDS)
def test_the_simulator_takes_every_schedule(seed: int, number: int) -> None:
    found = faults(schedule(seed, number), dict.fromkeys(INSTANCES, 5.0))
    assert len([FaultSpec(**one) for one in found]) == len(found)


def test_every_kind_of_trouble_comes_up() -> None:
    assert {one.kind for number in range(20) for one in schedule(1, number)} == set(KINDS)


def test_requests_come_at_the_rate_that_was_asked() -> None:
    counts = [len(arrivals(1, number, 2.0)) for number in range(200)]
    assert 0.95 < sum(counts) / 200 / (2.0 * ROUND_S) < 1.05
