"""Which of many deployments carries the most, with few simulations.

1. *Scouts.* Of each split (mixed, or prefill and decode apart) the layouts with the highest bounds get their capacity, roughly. What is
   bounded below the best of them is out, unsimulated.
2. *Halving.* Of each split all meet the same arrivals, few of them, at one rate. Who misses is out; the rate rises until few are left.
   Short runs flatter everybody, mixed deployments most: therefore the splits are not compared yet.
3. *The cut.* The same with all requests. Of each layout and chunk budget the best setting is kept.
4. *Capacity.* The finalists' by bisection, with several seeds; all have the same arrivals and lengths.

Every decision is made when all of its runs are there, so that the number of processes changes nothing. After Ctrl-C what is there stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TypeVar

from pdlab.results.statistics import MeanInterval, mean_interval
from pdlab.search.plan_bound import ATTAINED, SLACK, Bound
from pdlab.search.plan_judge import Figures, Judge, RateAsk, RateScore
from pdlab.search.plan_space import PlanCandidate

Key = TypeVar("Key", bound=Hashable)

RESOLUTION = 0.04  # of the rates between which a capacity lies
TOLD_APART = 0.015  # capacities that are nearer are not
COMFORT = 0.8  # of capacity, where latencies are shown
SHARE_OF_REQUESTS = 4  # short runs have a fourth
LEAST_REQUESTS = 400  # of a short run
SCOUTS = 3
KEPT = 6  # of each split, after short runs
FINALISTS = 4
ALIKE = 0.99  # of the highest rate of a layout: its other settings that came so far made no difference
SENSITIVE = 2  # finalists whose sensitivity is looked at
TENTH = {
    "prefill +10 %": (1.1, 1.0, 1.0),
    "prefill -10 %": (0.9, 1.0, 1.0),
    "decode +10 %": (1.0, 1.1, 1.0),
    "decode -10 %": (1.0, 0.9, 1.0),
    "link +10 %": (1.0, 1.0, 1.1),
    "link -10 %": (1.0, 1.0, 0.9),
}
_FLOOR = 1e-3  # of where a search began: below, nothing is carried
_CEILING = 1e3  # above: so short a run is over before anything queues
_MOST_ROUNDS = 12


@dataclass(frozen=True)
class Contender:
    """A candidate, its bound, and what a rate is divided by before two are compared: 1, its accelerators, or its $ an hour."""

    candidate: PlanCandidate
    bound: Bound
    size: float = 1.0

    @property
    def order(self) -> tuple[float, int, int, str]:
        """The most promising first; of equals the simplest."""
        return (-self.bound.rps / self.size, self.candidate.accelerators, len(self.candidate.layout), self.candidate.words)


class CapacityBracket:
    """Between the highest rate that was carried and the lowest that was not, by bisection of their logarithms until they are `resolution`
    apart."""

    def __init__(self, start: float, *, step: float, resolution: float) -> None:
        self.start, self.step, self.resolution = start, step, resolution
        self.low, self.high = 0.0, inf
        self.shares = {0.0: 1.0}  # attained, by rate

    @property
    def next(self) -> float | None:
        """The rate to try; None where enough is known."""
        if not self.low:
            if self.high < self.start * _FLOOR or not self.start:
                return None
            return self.start if self.high == inf else self.high / self.step
        if self.high == inf:
            return None if self.low > self.start * _CEILING else self.low * self.step
        return None if self.high <= self.low * (1 + self.resolution) * (1 + 1e-9) else (self.low * self.high) ** 0.5

    def tell(self, rate: float, score: RateScore) -> None:
        self.shares[rate] = score.attained
        if score.met:
            self.low = max(self.low, rate)
        else:
            self.high = min(self.high, rate)
        if len(self.shares) > 2 and (not self.low or self.high == inf):
            self.step **= 1.5

    @property
    def capacity(self) -> float:
        """Where attainment falls through the objective, by interpolation; the middle where the queue, not attainment, says no."""
        if not self.low or self.high == inf:
            return self.low
        above, below = self.shares[self.low], self.shares[self.high]
        part = (above - ATTAINED) / (above - below) if above > below and below < ATTAINED else 0.5
        return float(self.low * (self.high / self.low) ** part)


@dataclass(slots=True)
class Finalist:
    """`alike`: other settings of its layout that did as well in the cut. `capacities` in requests a second by seed, `comfort` figures at
    80 % of the mean by seed, `varied` the first seed's capacity with costs a tenth higher or lower."""

    contender: Contender
    alike: list[Contender] = field(default_factory=list)
    capacities: dict[int, float] = field(default_factory=dict)
    comfort: dict[int, Figures] = field(default_factory=dict)
    varied: dict[str, float] = field(default_factory=dict)

    @property
    def candidate(self) -> PlanCandidate:
        return self.contender.candidate

    @property
    def capacity(self) -> MeanInterval | None:
        return mean_interval(list(self.capacities.values()))

    @property
    def worth(self) -> float:
        """What finalists are ranked by."""
        found = self.capacity
        return 0.0 if found is None else found.mean / self.contender.size

    def ties_with(self, other: Finalist) -> bool:
        """Is the difference, seed by seed, within its interval, or within what bisection tells apart?"""
        own, its = self.contender.size, other.contender.size
        both = [seed for seed in self.capacities if seed in other.capacities]
        found = mean_interval([self.capacities[seed] / own - other.capacities[seed] / its for seed in both])
        if found is None or found.half is None:
            return True
        return abs(found.mean) <= max(found.half, TOLD_APART * max(self.worth, other.worth))

    def mean(self, name: str) -> float | None:
        """A figure at 80 % of capacity, over the seeds."""
        values = [value for figures in self.comfort.values() if isinstance(value := figures.get(name), int | float)]
        found = mean_interval(values)
        return None if found is None else found.mean


class PlanSearch:
    """`requests` are a whole run's. `phase` says what is going on."""

    def __init__(self, contenders: Sequence[Contender], judge: Judge, *, requests: int, seeds: Sequence[int]) -> None:
        self.contenders = sorted(contenders, key=lambda one: one.order)
        self.judge, self.requests, self.seeds = judge, requests, tuple(seeds)
        self.short = min(requests, max(LEAST_REQUESTS, requests // SHARE_OF_REQUESTS))
        self.phase = ""
        self.left: Counter[str] = Counter()  # how many went at which stage
        self.known: dict[Contender, float] = {}  # the highest rate that was carried, with all requests and the first seed
        self.missed: dict[Contender, tuple[float, RateScore]] = {}  # likewise, the lowest rate that was not
        self._of_candidate = {one.candidate: one for one in self.contenders}
        self.finalists: list[Finalist] = []

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(one.candidate.split for one in self.contenders))

    def run(self) -> None:
        self.finalists = self._cut(self._halved(self._scouted()))
        self.measure()

    def measure(self) -> None:
        """Everything that is said of the finalists."""
        self._capacities()
        self._comfort()
        self._sensitivity()

    @property
    def ranked(self) -> list[Finalist]:
        """Those of whom something is known, the best first."""
        there = [one for one in self.finalists if one.capacities]
        return sorted(there, key=lambda one: (-one.worth, one.contender.order[1:]))

    @property
    def winners(self) -> list[Finalist]:
        """The best, and who ties with it."""
        ranked = self.ranked
        return [one for one in ranked if one is ranked[0] or one.ties_with(ranked[0])]

    # 1

    def _scouted(self) -> dict[str, list[Contender]]:
        self.phase = "scouting"
        scouts = [one for split in self.splits for one in self._layouts_of(split)[:SCOUTS]]
        brackets = {one: CapacityBracket(0.8 * one.bound.rps, step=1.25, resolution=0.1) for one in scouts}
        self._climb(brackets, self._ask)
        best = max((bracket.low / one.size for one, bracket in brackets.items()), default=0.0)
        flattered = max((bracket.low / one.bound.rps for one, bracket in brackets.items() if one.bound.rps), default=0.0)
        slack = max(SLACK, 1.1 * flattered)
        leading = {self._leader_of(split).candidate.layout for split in self.splits}
        alive = [one for one in self.contenders if one.candidate.layout in leading or one.bound.rps * slack / one.size >= best]
        self.left["bounded below the best"] += len(self.contenders) - len(alive)
        return {split: [one for one in alive if one.candidate.split == split] for split in self.splits}

    def _leader_of(self, split: str) -> Contender:
        """Of what is known of a split, the best; at first the most promising."""
        own = [one for one in self.contenders if one.candidate.split == split]
        return min(own, key=lambda one: (-self.known.get(one, 0.0) / one.size, one.order))

    def _layouts_of(self, split: str) -> list[Contender]:
        """The first contender of each layout."""
        first: dict[object, Contender] = {}
        for one in self.contenders:
            if one.candidate.split == split:
                first.setdefault(one.candidate.layout, one)
        return list(first.values())

    # 2

    def _halved(self, alive: Mapping[str, list[Contender]]) -> dict[str, list[Contender]]:
        self.phase = "short runs"
        many = {split: own for split, own in alive.items() if len(own) > KEPT and self.short < self.requests}
        leaders = {self._leader_of(split): split for split in many}
        brackets = {one: CapacityBracket(self._start_of(one), step=1.25, resolution=0.1) for one in leaders}
        self._climb(brackets, lambda one, rate: self._ask(one, rate, self.short))
        kept = dict(alive)
        for one, split in leaders.items():
            worth = (brackets[one].low or brackets[one].start) / one.size
            raced = self._race(many[split], 0.95 * worth, KEPT, self.short, 1.05)
            kept[split] = [*raced, *_other_chunks(raced, many[split])]
            self.left["fell behind in short runs"] += len(many[split]) - len(kept[split])
        return kept

    def _worth_of(self, split: str) -> float:
        """The best that is known of a split."""
        return max((rate / one.size for one, rate in self.known.items() if one.candidate.split == split), default=0.0)

    def _race(self, alive: list[Contender], worth: float, most: int, requests: int, step: float) -> list[Contender]:
        """The `most` that carry the highest common rate for their size; where that cannot be told, who comes nearest."""
        for _ in range(_MOST_ROUNDS):
            asks = [self._ask(one, worth * one.size, requests) for one in alive]
            scores = self.judge.scores(asks)
            for asked, score in zip(asks, scores, strict=True):
                self.note(asked, score)
            pairs = sorted(zip(scores, alive, strict=True), key=lambda pair: (not pair[0].met, -pair[0].attained, pair[1].order))
            met = sum(score.met for score in scores)
            alive = [one for _, one in pairs[: met if met > most else most]]
            if met <= most:
                break
            worth *= step
        return alive[:most]

    # 3

    def _cut(self, alive: Mapping[str, list[Contender]]) -> list[Finalist]:
        """The best settings of the best layouts and chunk budgets, and of each split at least one."""
        self.phase = "the cut"
        for split, own in alive.items():
            if len(own) > 1 and (worth := self._worth_of(split)):
                self._race(own, worth, 1, self.requests, 1.03)
        layouts: dict[object, list[Contender]] = {}
        for one in sorted(self.known, key=lambda one: (-self.known[one] / one.size, one.order)):
            layouts.setdefault((one.candidate.layout, one.candidate.max_batch_tokens), []).append(one)
        ranked = [
            Finalist(first, [one for one in others if self.known[one] >= ALIKE * self.known[first]]) for first, *others in layouts.values()
        ]
        first_of = {one.candidate.split: one for one in reversed(ranked)}
        found = [one for index, one in enumerate(ranked) if index < FINALISTS or one is first_of[one.candidate.split]]
        self.left["fell behind in whole runs"] += len(self.known.keys() | {one for own in alive.values() for one in own}) - len(found)
        return found

    # 4

    def _capacities(self) -> None:
        self.phase = "capacities"
        brackets = {(one.contender, self.seeds[0]): self._fine(self._start_of(one.contender)) for one in self.finalists}

        def ask(key: tuple[Contender, int], rate: float) -> RateAsk:
            return RateAsk(key[0].candidate, rate, self.requests, key[1])

        self._climb(brackets, ask)
        others = {(one, seed): self._fine(bracket.capacity) for (one, _), bracket in brackets.items() for seed in self.seeds[1:]}
        self._climb(others, ask)
        for finalist in self.finalists:
            own = {seed: bracket.capacity for (one, seed), bracket in {**brackets, **others}.items() if one is finalist.contender}
            finalist.capacities = own

    def _fine(self, start: float) -> CapacityBracket:
        return CapacityBracket(start, step=1 + RESOLUTION, resolution=RESOLUTION)

    def _start_of(self, one: Contender) -> float:
        return self.known.get(one) or self._worth_of(one.candidate.split) * one.size or 0.5 * one.bound.rps

    def _comfort(self) -> None:
        self.phase = "latencies"
        wanted = [(one, seed) for one in self.finalists if one.worth for seed in self.seeds]
        asks = [
            RateAsk(one.candidate, COMFORT * one.capacity.mean, self.requests, seed) for one, seed in wanted if one.capacity is not None
        ]
        for (one, seed), score in zip(wanted, self.judge.scores(asks), strict=True):
            one.comfort[seed] = score.figures

    def _sensitivity(self) -> None:
        self.phase = "sensitivity"
        brackets = {}
        for one in self.ranked[:SENSITIVE]:
            for name, factors in TENTH.items():
                if one.worth and (one.candidate.transfer or factors[2] == 1.0):
                    brackets[one.contender, name] = CapacityBracket(one.capacities[self.seeds[0]], step=1.06, resolution=0.06)

        def ask(key: tuple[Contender, str], rate: float) -> RateAsk:
            return RateAsk(key[0].candidate, rate, self.requests, self.seeds[0], TENTH[key[1]])

        self._climb(brackets, ask, noted=False)
        finalists = {one.contender: one for one in self.finalists}
        for (contender, name), bracket in brackets.items():
            finalists[contender].varied[name] = bracket.capacity

    # shared

    def _ask(self, one: Contender, rate: float, requests: int | None = None) -> RateAsk:
        return RateAsk(one.candidate, rate, requests or self.requests, self.seeds[0])

    def _climb(self, brackets: Mapping[Key, CapacityBracket], ask: Callable[[Key, float], RateAsk], *, noted: bool = True) -> None:
        """All of them, side by side, until enough is known."""
        while asks := {key: ask(key, rate) for key, bracket in brackets.items() if (rate := bracket.next) is not None}:
            for (key, asked), score in zip(asks.items(), self.judge.scores(list(asks.values())), strict=True):
                brackets[key].tell(asked.rate, score)
                if noted:
                    self.note(asked, score)

    def note(self, asked: RateAsk, score: RateScore) -> None:
        """What a whole run with the first seed and the costs as they are says of a deployment."""
        if asked.requests != self.requests or asked.seed != self.seeds[0]:
            return
        one = self._of_candidate[asked.candidate]
        if score.met:
            self.known[one] = max(self.known.get(one, 0.0), asked.rate)
            return
        before = self.missed.get(one)
        if before is None or asked.rate < before[0]:
            self.missed[one] = asked.rate, score


def _other_chunks(kept: Sequence[Contender], alive: Sequence[Contender]) -> list[Contender]:
    """Of the best layout that was kept the first contender of each chunk budget that was not: short runs say little of chunks."""
    if not kept:
        return []
    seen = {one.candidate.max_batch_tokens for one in kept if one.candidate.layout == kept[0].candidate.layout}
    found: dict[int, Contender] = {}
    for one in alive:
        if one.candidate.layout == kept[0].candidate.layout and one.candidate.max_batch_tokens not in seen:
            found.setdefault(one.candidate.max_batch_tokens, one)
    return list(found.values())
