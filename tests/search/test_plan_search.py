"""The search, asked about deployments whose capacities are known: no simulator, so that what it finds can be checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import inf

import pytest

from pdlab.core.types import Role
from pdlab.results.statistics import MeanInterval
from pdlab.search.plan_bound import Bound
from pdlab.search.plan_judge import RateAsk, RateScore, rate_score
from pdlab.search.plan_search import CapacityBracket, Contender, Finalist, PlanSearch
from pdlab.search.plan_space import InstanceGroup, InstanceKind, PlanCandidate

H100 = InstanceKind("h100-sxm", 1)
SEEDS = (1, 2, 3)


def candidate(prefill: int, chunk: int = 512) -> PlanCandidate:
    """Of eight: that many prefill; of 0 all are mixed."""
    whole = (InstanceGroup(Role.MIXED, H100, 8),)
    apart = (InstanceGroup(Role.PREFILL, H100, prefill), InstanceGroup(Role.DECODE, H100, 8 - prefill))
    return PlanCandidate(apart if prefill else whole, chunk, 256, "chunked", json.dumps("least_loaded"), "push" if prefill else "", True)


class Oracle:
    """Attainment falls from 1 to 0 about each one's capacity. Few requests flatter by a half."""

    def __init__(self, capacity: Callable[[RateAsk], float], whole: int = 4000) -> None:
        self.capacity, self.whole, self.asks = capacity, whole, list[RateAsk]()

    def scores(self, asks: Sequence[RateAsk]) -> list[RateScore]:
        self.asks += asks
        return [self._score(ask) for ask in asks]

    def _score(self, ask: RateAsk) -> RateScore:
        flattery = 1.0 if ask.requests >= self.whole else 1.5
        attained = max(0.0, min(1.0, 0.9 - 2 * (ask.rate / (flattery * self.capacity(ask)) - 1)))
        return RateScore(attained, attained >= 0.9, {"ttft_s.p99": 0.3, "tpot_s.p99": 0.02})


def search(capacity: Callable[[RateAsk], float], candidates: Sequence[PlanCandidate], bound: float = 1.3) -> tuple[PlanSearch, Oracle]:
    oracle = Oracle(capacity)

    def of(one: PlanCandidate) -> float:
        return capacity(RateAsk(one, 1.0, 4000, 1))

    contenders = [Contender(one, Bound(bound * of(one), "decode", 1.0, "TTFT")) for one in candidates]
    searched = PlanSearch(contenders, oracle, requests=4000, seeds=SEEDS)
    searched.run()
    return searched, oracle


def peak(ask: RateAsk) -> float:
    """Five that prefill are best, of mixed ones none as good; a chunk of 2,048 helps, a seed shifts all alike."""
    shape = 100.0 - 7 * abs(len(ask.candidate.layout) - 1 and ask.candidate.layout[0].count - 5) if ask.candidate.transfer else 80.0
    return shape * (1.0 if ask.candidate.max_batch_tokens == 2048 else 0.93) * (1 + 0.05 * ask.seed)


ALL = [candidate(prefill, chunk) for prefill in range(8) for chunk in (512, 1024, 2048, 4096)]


def test_the_best_is_found_with_its_capacity_by_seed() -> None:
    found, _ = search(peak, ALL)
    first = found.ranked[0]
    assert first.candidate == candidate(5, 2048)
    assert first.capacities == pytest.approx({1: 105, 2: 110, 3: 115}, rel=0.01)
    assert [one.candidate for one in found.winners] == [first.candidate]


def test_the_best_of_either_split_is_among_the_finalists() -> None:
    found, _ = search(peak, ALL)
    assert {one.candidate.split for one in found.finalists} == {"mixed", "pd"}
    mixed = next(one for one in found.finalists if one.candidate.split == "mixed")
    assert mixed.candidate == candidate(0, 2048) and mixed.worth == pytest.approx(88, rel=0.01)


def test_what_is_bounded_below_the_best_is_never_simulated() -> None:
    found, oracle = search(peak, ALL, bound=1.05)
    asked = {ask.candidate for ask in oracle.asks}
    assert candidate(1, 512) not in asked
    assert found.left["bounded below the best"] > 0
    assert len({ask.candidate.layout for ask in oracle.asks}) < 8


def test_all_meet_the_same_arrivals() -> None:
    """Whoever is asked at the same stage is asked with the same number of requests and the same seed."""
    _, oracle = search(peak, ALL)
    assert {ask.requests for ask in oracle.asks} == {1000, 4000}
    assert {ask.seed for ask in oracle.asks if ask.requests == 1000} == {SEEDS[0]}


def test_equal_deployments_tie_and_the_simpler_comes_first() -> None:
    found, _ = search(lambda ask: 50.0 + 10 * ask.seed, ALL)
    assert found.ranked[0].candidate.split == "mixed"
    assert len(found.winners) == len(found.finalists) > 1


def test_chunk_budgets_are_told_apart_by_whole_runs() -> None:
    found, _ = search(lambda ask: 80.0 if ask.candidate.transfer else 100.0, ALL)
    assert {one.candidate.max_batch_tokens for one in found.finalists if one.candidate.split == "mixed"} == {512, 1024, 2048, 4096}
    assert len(found.winners) >= 3


def test_a_difference_that_seeds_do_not_bear_out_is_a_tie() -> None:
    one, other = (Finalist(Contender(candidate(prefill), Bound(1.0, "decode", 1.0, ""))) for prefill in (3, 4))
    one.capacities, other.capacities = {1: 100.0, 2: 130.0, 3: 90.0}, {1: 110.0, 2: 90.0, 3: 95.0}
    assert one.ties_with(other) and other.ties_with(one)
    other.capacities = {1: 80.0, 2: 111.0, 3: 69.0}
    assert not one.ties_with(other), "each seed says the same, though the capacities overlap"


def test_a_tenth_more_of_a_cost_shows() -> None:
    def slower(ask: RateAsk) -> float:
        return peak(ask) / ask.factors[0]

    found, _ = search(slower, ALL)
    first = found.ranked[0]
    assert first.varied["prefill +10 %"] == pytest.approx(first.capacities[1] / 1.1, rel=0.02)
    assert first.varied["decode -10 %"] == pytest.approx(first.capacities[1], rel=0.02)


def test_latencies_are_those_at_four_fifths_of_capacity() -> None:
    found, oracle = search(peak, ALL)
    first = found.ranked[0]
    assert isinstance(first.capacity, MeanInterval) and set(first.comfort) == set(SEEDS) and first.mean("ttft_s.p99") == 0.3
    rates = {ask.rate for ask in oracle.asks if ask.candidate == first.candidate and ask.seed == 3}
    assert any(rate == pytest.approx(0.8 * first.capacity.mean) for rate in rates)


def test_a_search_is_the_same_each_time() -> None:
    asks = [search(peak, ALL)[1].asks for _ in range(2)]
    assert asks[0] == asks[1]


def test_nobody_who_carries_anything_is_no_finalist() -> None:
    oracle = Oracle(lambda ask: 1e-9)
    found = PlanSearch([Contender(one, Bound(10.0, "decode", 1.0, "")) for one in ALL], oracle, requests=4000, seeds=SEEDS)
    found.run()
    assert not found.finalists and found.missed


def test_a_capacity_lies_where_attainment_falls_through_the_objective() -> None:
    for start in (0.1, 40.0, 50.0, 900.0):
        bracket = CapacityBracket(start, step=1.04, resolution=0.04)
        while (rate := bracket.next) is not None:
            attained = max(0.0, min(1.0, 0.9 - (rate / 50.0 - 1)))
            bracket.tell(rate, RateScore(attained, attained >= 0.9))
        assert bracket.low <= 50.0 < bracket.high <= bracket.low * 1.0401
        assert bracket.capacity == pytest.approx(50.0, rel=0.002)


def test_a_run_too_short_to_queue_ends_the_search() -> None:
    bracket = CapacityBracket(2.0, step=1.06, resolution=0.06)
    while (rate := bracket.next) is not None:
        bracket.tell(rate, RateScore(0.95, met=True))
    assert 2000.0 < bracket.capacity < inf


def test_an_overloaded_run_is_not_carried_whatever_it_attained() -> None:
    assert rate_score({"slo_attainment": 0.95}).met
    assert not rate_score({"slo_attainment": 0.95, "overloaded": True}).met
    assert not rate_score({"slo_attainment": 0.89}).met
    assert not rate_score({"slo_attainment": None}).met
