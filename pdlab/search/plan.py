"""From an experiment and a question (so many accelerators, that rate, that budget) to the deployments that answer it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.results.units import percent, seconds
from pdlab.search.plan_bound import ATTAINED, SLACK, Bound, PlanBounds
from pdlab.search.plan_judge import RateAsk, SimulatedJudge
from pdlab.search.plan_search import Contender, PlanSearch
from pdlab.search.plan_space import Fleet, Layout, PlanCandidate, PlanSpace
from pdlab.search.pool import TaskPool
from pdlab.search.run_journal import RunJournal
from pdlab.workload.base import Workload
from pdlab.workload.spec import build as build_workload

Objective = Literal["rate", "gpu", "dollar"]
WINDOW_S = 30.0  # of arrivals at the best bound: shorter runs end before queues show
LEAST_REQUESTS, MOST_REQUESTS = 1000, 20_000  # of a simulation, unless they are given
MOST_ACCELERATORS = 1024  # that a rate is looked for with
_WAVE = 16  # candidates that are asked at once whether they carry a rate


@dataclass(frozen=True, slots=True)
class PlanQuestion:
    """Given `rate`, the fewest accelerators are wanted; else the most requests a second, for each accelerator or each $ if `objective`
    says so. `lost` instances may be away."""

    gpus: str | None = None
    rate: float | None = None
    usd_per_h: float | None = None
    objective: Objective = "rate"
    lost: int = 0
    seeds: int = 5
    requests: int | None = None

    def check(self) -> None:
        """Raises UsageError."""
        if self.gpus is None and self.rate is None and self.usd_per_h is None:
            raise UsageError("say what there is: --gpus 8 (or h100-sxm=8,l40s=4), --budget $/h; or what is wanted: --rate requests/s")
        for name, value in (("--rate", self.rate), ("--budget", self.usd_per_h)):
            if value is not None and not 0 < value < 1e9:
                raise UsageError(f"{name} {value:g}: give a number above 0")
        if self.lost not in (0, 1):
            raise UsageError(f"--failures {self.lost}: 0, or 1 for one instance away")
        if self.seeds < 1:
            raise UsageError(f"--seeds {self.seeds}: a capacity needs a seed at least")
        if self.requests is not None and self.requests < 100:
            raise UsageError(f"--requests {self.requests}: fewer than 100 tell no attainment; leave it out, or give more")
        if self.rate is not None and self.objective != "rate":
            raise UsageError(f"--objective {self.objective}: with --rate the fewest accelerators are wanted already; leave one of them out")

    @property
    def words(self) -> str:
        parts = [f"{self.gpus} accelerators" if self.gpus and self.gpus.isdecimal() else self.gpus or ""]
        parts += [f"${self.usd_per_h:g} an hour" if self.usd_per_h is not None else ""]
        parts += [f"{self.rate:g} requests/s wanted" if self.rate is not None else ""]
        parts += ["one instance of the worst role away" if self.lost else ""]
        return ", ".join(part for part in parts if part)


class Plan:
    """`search`, once it has `begun`, is the one that answers; with a rate wanted, that of the fewest accelerators that carry it."""

    _search: PlanSearch | None = None
    judge: SimulatedJudge

    def __init__(self, base: Experiment, question: PlanQuestion) -> None:
        question.check()
        if base.workload.closed:
            raise UsageError(
                "workload.arrival: in a closed loop nobody comes at a rate, which a plan varies; leave it out, or give another"
            )
        self.base, self.question = base, question
        self.space = PlanSpace.of(base)
        self.fleet = self.space.fleet(question.gpus, question.usd_per_h)
        self.workload = self._drawn(question.requests or base.workload.requests or LEAST_REQUESTS)
        self.bounds = PlanBounds(self.space, self.workload)
        self.considered = 0
        self.ruled_out: Counter[str] = Counter()  # before the search that answers
        self.seeds = tuple(range(base.seed, base.seed + question.seeds))

    @property
    def begun(self) -> bool:
        return self._search is not None

    @property
    def search(self) -> PlanSearch:
        assert self._search is not None, "run() makes it"
        return self._search

    def run(self, pool: TaskPool, journal: RunJournal, ended: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Raises UsageError where nothing fits, or nobody meets the objectives."""
        if self.question.rate is None:
            contenders = self._possible(self._contenders(self.fleet, every=self.question.objective != "rate"))
            search = self._begin(contenders, max(one.bound.rps for one in contenders), pool, journal, ended)
        else:
            contenders = self._fewest(self.question.rate, pool, journal, ended)
            search = self._search = self._among(contenders)
        search.run()
        if not any(one.worth for one in search.finalists):
            raise UsageError(f"nobody meets the objectives at any rate: {self._missed(search)}")

    def _begin(
        self, contenders: list[Contender], rps: float, pool: TaskPool, journal: RunJournal, ended: Callable[[int, int], None]
    ) -> PlanSearch:
        requests = self.question.requests or max(min(len(self.workload), MOST_REQUESTS), min(ceil(rps * WINDOW_S), MOST_REQUESTS))
        if requests > len(self.workload):
            self.workload = self._drawn(requests)
        self.judge = SimulatedJudge(self.space, min(requests, len(self.workload)), pool, journal, lost=self.question.lost, ended=ended)
        self._search = self._among(contenders)
        return self._search

    def _among(self, contenders: list[Contender]) -> PlanSearch:
        return PlanSearch(contenders, self.judge, requests=self.judge.requests, seeds=self.seeds)

    def _drawn(self, requests: int) -> Workload:
        spec = self.base.workload.model_copy(update={"requests": requests, "duration_s": None})
        return build_workload(spec, self.base.seed, self.base.base_dir)

    def _contenders(self, fleet: Fleet, *, every: bool = False, exactly: int | None = None) -> list[Contender]:
        def keep(layout: Layout) -> bool:
            return exactly is None or sum(group.accelerators for group in layout) == exactly

        candidates = self.space.candidates(fleet, self.bounds.shares_prefixes, every=every, keep=keep)
        self.considered += len(candidates)
        return [Contender(one, self._bound(one), self._size(one)) for one in candidates]

    def _bound(self, candidate: PlanCandidate) -> Bound:
        if not self.question.lost:
            return self.bounds.of(candidate)
        return min((self.bounds.less(candidate, index) for index in range(len(candidate.layout))), key=lambda bound: bound.rps)

    def _size(self, candidate: PlanCandidate) -> float:
        sizes = {"rate": 1.0, "gpu": float(candidate.accelerators), "dollar": self.space.usd_per_h(candidate)}
        size = sizes[self.question.objective]
        if not size:
            raise UsageError(f"--objective dollar: nobody knows what {candidate.layout[0].kind.hardware} costs; write plan.usd_per_h")
        return size

    def _possible(self, contenders: list[Contender]) -> list[Contender]:
        """Those that carry anything. Raises UsageError where nothing fits, or nobody meets the objectives even alone."""
        if not contenders:
            raise UsageError(f"nothing fits {self.question.words}: {self._why_not()}")
        carrying = [one for one in contenders if one.bound.rps > 0]
        self.ruled_out["miss the objectives even alone"] += len(contenders) - len(carrying)
        if carrying:
            return carrying
        best = max(contenders, key=lambda one: one.bound.alone)
        if best.bound.alone >= ATTAINED:
            raise UsageError(f"no deployment is left when an instance is away: give more than {self.question.words}")
        slo = self.base.slo
        raise UsageError(
            f"nobody meets the objectives (TTFT {seconds(slo.ttft_s)}, TPOT {seconds(slo.tpot_s)}): the nearest is {best.candidate.words}, "
            f"on which {percent(best.bound.alone)} of the requests do, each alone, of {percent(ATTAINED)} wanted; "
            f"{best.bound.misses} is missed most"
        )

    def _why_not(self) -> str:
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in self.space.pruned.most_common(4))
        return reasons or "no instance is small enough: list a smaller plan.tp"

    def _fewest(self, rate: float, pool: TaskPool, journal: RunJournal, ended: Callable[[int, int], None]) -> list[Contender]:
        """The contenders of the least number of accelerators with which somebody carries `rate`."""
        most = self._most_accelerators()
        nearest: list[Contender] = []
        for count in range(1, most + 1):
            contenders = self._contenders(replace(self.fleet, accelerators=count), exactly=count)
            nearest = [one for one in contenders if one.bound.rps > 0] or nearest
            hopeful = [one for one in contenders if one.bound.rps * SLACK >= rate]
            self.ruled_out["with fewer accelerators, bounded below the rate"] += len(contenders) - len(hopeful)
            if not hopeful:
                continue
            search = self._begin(hopeful, rate, pool, journal, ended)
            search.phase = f"{count} accelerators"
            if self._anybody(search, rate):
                return [one for one in contenders if one.bound.rps > 0]
            self.ruled_out["with fewer accelerators, missed the rate"] += len(hopeful)
        raise UsageError(self._too_much(rate, most, nearest))

    def _most_accelerators(self) -> int:
        given = sum(self.fleet.of_type.values()) or self.fleet.accelerators or MOST_ACCELERATORS
        if self.fleet.usd_per_h is not None:
            given = min(given, int(self.fleet.usd_per_h / min(self.space.prices.values())))
        return given

    def _anybody(self, search: PlanSearch, rate: float) -> bool:
        """Does one carry that rate with each seed? Short runs flatter, and so whoever misses in one is asked no more."""
        for start in range(0, len(search.contenders), _WAVE):
            alive = search.contenders[start : start + _WAVE]
            whole, first = self.judge.requests, self.seeds[:1]
            for requests, seeds in ((search.short, first), (whole, first), (whole, self.seeds)):
                alive = self._carrying(search, alive, rate, requests, seeds)
            if alive:
                return True
        return False

    def _carrying(self, search: PlanSearch, alive: list[Contender], rate: float, requests: int, seeds: tuple[int, ...]) -> list[Contender]:
        """Those that meet the objectives at that rate with most seeds."""
        asks = [RateAsk(one.candidate, rate, requests, seed) for one in alive for seed in seeds]
        scores = self.judge.scores(asks)
        for asked, score in zip(asks, scores, strict=True):
            search.note(asked, score)
        met = [sum(score.met for score in scores[k * len(seeds) : (k + 1) * len(seeds)]) for k in range(len(alive))]
        return [one for one, times in zip(alive, met, strict=True) if 2 * times > len(seeds)]

    def _too_much(self, rate: float, most: int, nearest: list[Contender]) -> str:
        whole = f"no deployment of up to {most:,} accelerators carries {rate:g} requests/s"
        if not nearest:
            return f"{whole}: none fits; {self._why_not()}"
        if self._search is not None and self._search.missed:
            return f"{whole}: {self._missed(self._search)}"
        best = max(nearest, key=lambda one: one.bound.rps)
        return f"{whole}: the most is {best.bound.rps:.3g} or less, on {best.candidate.words}, where {best.bound.binds} binds"

    def _missed(self, search: PlanSearch) -> str:
        """The nearest miss, and what binds there."""
        if not search.missed:
            return "; ".join(reason for reason, _ in self.judge.failures.most_common(2))
        one, (rate, score) = max(search.missed.items(), key=lambda pair: pair[1][1].attained)
        if score.failure:
            return score.failure
        evidence = score.figures.get("bottleneck.evidence")
        at = f"at {rate:.3g} requests/s {percent(score.attained)} of the requests meet them, of {percent(ATTAINED)} wanted"
        return f"the nearest is {one.candidate.words}: {at}; {score.figures.get('bottleneck.resource')} binds ({evidence})"
