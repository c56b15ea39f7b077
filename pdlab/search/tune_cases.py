"""What a trial simulates, rung by rung, and what its winner is judged on, which tuning never saw.

A workload that is drawn (a built-in's, a synthetic one) is another with every seed: tuning has some seeds, and the judge has others. Of a
trace there is one. Tuning has its first part, and the judge the rest, in stretches (`pdlab.search.stretches`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.workload import builtin
from pdlab.workload.spec import SYNTHETIC


@dataclass(frozen=True, slots=True)
class TuneCase:
    """One simulation: a seed, and the part of the workload between two shares."""

    seed: int
    part: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class TuneCases:
    """A trial goes from rung to rung, each twice as long as the one before, until it is pruned. `judging` are the judge's, `stretches` how
    many figures each of them gives."""

    rungs: tuple[tuple[TuneCase, ...], ...]
    judging: tuple[TuneCase, ...]
    stretches: int | None

    @classmethod
    def of(cls, experiment: Experiment, seeds: int | None, judge: int, holdout: float, rungs: int) -> Self:
        """`seeds` is for tuning: None, 4 of a drawn workload and 1 of a trace. `judge` is the number of figures that an interval is over.
        Raises UsageError."""
        for option, value, least in (("--seeds", seeds, 1), ("--judge", judge, 2), ("--rungs", rungs, 1)):
            if value is not None and value < least:
                raise UsageError(f"{option} {value}: write {least} or more")
        if not 0.0 < holdout < 1.0:
            raise UsageError(f"--holdout {holdout:g}: it is the part of a trace that is kept for judging, above 0 and below 1")
        if is_drawn(experiment):
            return cls._drawn(experiment.seed, seeds or 4, judge, rungs)
        return cls._traced(experiment.seed, seeds or 1, judge, holdout, rungs)

    @classmethod
    def _drawn(cls, first: int, seeds: int, judge: int, rungs: int) -> Self:
        every = tuple(TuneCase(seed) for seed in range(first, first + seeds))
        counts = sorted({max(1, seeds >> (rungs - 1 - rung)) for rung in range(rungs)})
        judging = tuple(TuneCase(seed) for seed in range(first + seeds, first + seeds + judge))
        return cls(tuple(every[:count] for count in counts), judging, None)

    @classmethod
    def _traced(cls, first: int, seeds: int, judge: int, holdout: float, rungs: int) -> Self:
        numbers, end = range(first, first + seeds), 1.0 - holdout
        shares = [end / 2 ** (rungs - 1 - rung) for rung in range(rungs)]
        judging = tuple(TuneCase(seed, (end, 1.0)) for seed in range(first + seeds, first + 2 * seeds))
        return cls(tuple(tuple(TuneCase(seed, (0.0, share)) for seed in numbers) for share in shares), judging, judge)

    @property
    def figures(self) -> int:
        """That an interval is over."""
        return self.stretches or len(self.judging)

    def worded(self) -> str:
        if self.stretches is None:
            return f"{len(self.judging)} seeds that tuning never saw"
        return f"{self.stretches} stretches of the last {100 * (1 - self.judging[0].part[0]):.0f} % of the trace, which tuning never saw"


def is_drawn(experiment: Experiment) -> bool:
    """Are its requests others with another seed?"""
    return experiment.workload.source in (SYNTHETIC, *builtin.NAMES)
