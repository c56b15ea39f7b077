"""What a plan asks of the simulator: does this deployment carry that rate?

Every ask is one simulation, or one for each instance that may be lost. They are kept by the hash of the experiment, so that none is done
twice, also by another plan in the same folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pdlab.cost.spec import CostFactors
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.study import FaultSpec
from pdlab.search.identity import RunHashes
from pdlab.search.plan_bound import ATTAINED
from pdlab.search.plan_space import PlanCandidate, PlanSpace
from pdlab.search.pool import Scalar, SimulationTask, TaskPool
from pdlab.search.run_journal import RunJournal

Figures = Mapping[str, Scalar]


@dataclass(frozen=True, slots=True)
class RateAsk:
    """`requests` of the workload, at `rate` a second. `factors` are those of cost: prefill, decode, link."""

    candidate: PlanCandidate
    rate: float
    requests: int
    seed: int
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class RateScore:
    """`attained` is the share of requests that met their objectives; `met`: it is enough, and no queue grew for ever."""

    attained: float
    met: bool
    figures: Figures = field(default_factory=dict)
    failure: str = ""

    @property
    def order(self) -> tuple[bool, float]:
        return (self.met, self.attained)


def rate_score(figures: Figures) -> RateScore:
    """The one place that says when a rate is carried: enough of the requests that arrived in the window met their objectives, and the run
    was not overloaded."""
    share = figures.get("slo_attainment")
    attained = float(share) if isinstance(share, int | float) else 0.0
    return RateScore(attained, attained >= ATTAINED and not figures.get("overloaded"), figures)


class Judge(Protocol):
    def scores(self, asks: Sequence[RateAsk]) -> list[RateScore]:
        """In the order of the asks."""
        ...


class SimulatedJudge:
    """`lost` is how many instances are away from the start: none, or one, of which each group is tried and the worst counts."""

    def __init__(
        self,
        space: PlanSpace,
        requests: int,
        pool: TaskPool,
        journal: RunJournal,
        *,
        lost: int = 0,
        ended: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.space, self.pool, self.journal, self.lost, self.ended = space, pool, journal, lost, ended
        self.hashes = RunHashes()
        self.simulated = 0
        self.asked = 0
        self.cpu_s = 0.0
        self.failures: Counter[str] = Counter()  # why simulations came to nothing
        self.requests = requests
        self._experiments: dict[PlanCandidate, Experiment] = {}

    def experiment(self, candidate: PlanCandidate) -> Experiment:
        """The deployment with the file's own workload, without what a plan leaves out: faults, autoscaling and the plan itself."""
        if candidate not in self._experiments:
            base, changes = self.space.base, self.space.changes(candidate)
            changes |= {"faults": [], "cluster.autoscale.enabled": False, "plan": None}
            changes |= {"workload.requests": self.requests, "workload.duration_s": None}
            self._experiments[candidate] = base.with_(changes)
        return self._experiments[candidate]

    def scores(self, asks: Sequence[RateAsk]) -> list[RateScore]:
        variants = [[(self.hashes.of(one), one) for one in self._variants(ask)] for ask in asks]
        wanted = {key: one for group in variants for key, one in group}
        self.asked += len(wanted)
        failures = self._simulate({key: one for key, one in wanted.items() if key not in self.journal.figures})
        return [min((self._score(key, failures) for key, _ in group), key=lambda one: one.order) for group in variants]

    def _score(self, key: str, failures: Mapping[str, str]) -> RateScore:
        if key in failures:
            return RateScore(0.0, False, {}, failures[key])
        return rate_score(self.journal.figures[key])

    def _simulate(self, missing: Mapping[str, Experiment]) -> dict[str, str]:
        failures = {}
        self.ended(0, len(missing))
        tasks = [SimulationTask(key, one) for key, one in missing.items()]
        for done, result in enumerate(self.pool.run(tasks), 1):
            self.simulated += 1
            self.cpu_s += result.cpu_s
            if result.failure:
                failures[result.key] = result.failure
                self.failures[result.failure] += 1
            else:
                self.journal.put(result.key, result.figures)
            self.ended(done, len(missing))
        return failures

    def _variants(self, ask: RateAsk) -> Iterator[Experiment]:
        whole = self.experiment(ask.candidate)
        updates: dict[str, Any] = {
            "seed": ask.seed,
            "workload": whole.workload.model_copy(update={"rate": ask.rate, "requests": ask.requests}),
        }
        if ask.factors != (1.0, 1.0, 1.0):
            prefill, decode, link = ask.factors
            updates["cost"] = whole.cost.model_copy(update={"factors": CostFactors(prefill=prefill, decode=decode, link=link)})
        if not self.lost:
            yield whole.model_copy(update=updates)
            return
        placed = whole.placements()
        for group in ask.candidate.layout:
            wanted = (group.role, group.kind.hardware, group.kind.tp)
            name = next(p.name for p in placed if (p.role, str(p.hardware), p.parallel.tp) == wanted)
            yield whole.model_copy(update={**updates, "faults": (FaultSpec(at_s=0.0, kill=name),)})
