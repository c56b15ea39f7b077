"""Simulated against measured: how far off each figure is, beside how much repeated measurements differ among themselves.

An error is the simulation's, signed, as a share of the measured mean: +0.1 says that it promises 10 % more than was measured. The spread is
half the range of the repeats, (max - min) / 2; an error inside it cannot be told from chance. One measured run has no spread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from pdlab.core.types import Stage, UsageError
from pdlab.results.comparison_notes import notes
from pdlab.results.metrics import SPREADS, untrimmed
from pdlab.results.records import Column, latencies
from pdlab.results.run import Run

NAN = math.nan
SIDES = ("simulated", "measured")
TELLING = 0.05  # of two means: the difference that makes one policy better than another
POINTS = ("mean", "p50", "p90", "p99")
RATES = (
    ("throughput, req/s", "throughput_rps"),
    ("output tokens/s", "output_tokens_per_s"),
    ("goodput, req/s", "goodput_rps"),
    ("SLO attainment", "slo_attainment"),
    ("prefix hits", "prefix_hit_rate"),
)
INSTANCE = (("requests", "requests"), ("prefill tokens", "prefill_tokens"), ("decode tokens", "decode_tokens"), ("busy", "busy_fraction"))
PAIRED = (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("E2E", "e2e_s"))
RANKED = (
    *((f"{label} {point}", f"{key}.{point}", -1) for label, key in PAIRED for point in ("mean", "p99")),
    ("throughput, req/s", "throughput_rps", 1),
    ("goodput, req/s", "goodput_rps", 1),
    ("SLO attainment", "slo_attainment", 1),
)


@dataclass(frozen=True, slots=True)
class ComparedFigure:
    """One figure. nan: there is none."""

    label: str
    key: str
    simulated: float
    measured: tuple[float, ...]

    @property
    def mean(self) -> float:
        return _mean(self.measured)

    @property
    def error(self) -> float:
        """(simulated - measured) / measured; 0 where both are 0, nan where only what was measured is."""
        if self.simulated == self.mean:
            return 0.0
        return (self.simulated - self.mean) / self.mean if self.mean else NAN

    @property
    def half_range(self) -> float:
        known = [value for value in self.measured if not math.isnan(value)]
        return (max(known) - min(known)) / 2 if len(known) > 1 else NAN

    @property
    def spread(self) -> float:
        """Half the range of the repeats, as a share of their mean."""
        return self.half_range / self.mean if self.mean else NAN

    @property
    def inside(self) -> bool:
        """Is the error no larger than the spread?"""
        return abs(self.simulated - self.mean) <= self.half_range + 1e-12 * abs(self.mean)


@dataclass(frozen=True, slots=True)
class Pairs:
    """A latency of the requests that both worlds completed, by request_id. `measured` is the mean over the repeats that have it."""

    label: str
    key: str
    simulated: Column
    measured: Column

    @property
    def errors(self) -> Column:
        held = self.measured > 0
        found: Column = self.simulated[held] / self.measured[held] - 1
        return found

    @property
    def bias(self) -> float:
        """The median error, signed."""
        return float(np.median(self.errors)) if self.errors.size else NAN

    @property
    def typical(self) -> float:
        """The median of the errors' sizes."""
        return float(np.median(np.abs(self.errors))) if self.errors.size else NAN

    @property
    def correlation(self) -> float:
        """Spearman's: do the same requests take long? nan where one side is constant."""
        if self.simulated.size < 3:
            return NAN
        a, b = _ranks(self.simulated), _ranks(self.measured)
        if not a.std() or not b.std():
            return NAN
        return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))


@dataclass(frozen=True, slots=True)
class VerdictLine:
    """A line of what may be concluded; `tone` 1: decided, 0: said."""

    words: str
    tone: int


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One policy: its simulations, which mostly are one, its measured runs, and what comes of them. Of two simulations the second stands
    for what was measured; `sides` are what both are called."""

    policy: str
    simulated: tuple[Run, ...]
    measured: tuple[Run, ...]
    lines: tuple[ComparedFigure, ...]
    instances: tuple[tuple[str, tuple[ComparedFigure, ...]], ...]
    pairs: tuple[Pairs, ...]
    notes: tuple[str, ...]
    sides: tuple[str, str] = SIDES
    verdict: tuple[VerdictLine, ...] = ()

    @property
    def two_simulations(self) -> bool:
        return self.sides != SIDES

    def line(self, key: str) -> ComparedFigure:
        return next(line for line in self.lines if line.key == key)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Policies by one figure, the best first; those that are equal stand as one, "a = b". A pair is decided where the measured means differ
    by more than both spreads, and by more than 5 %, within which a simulation may err; `agree` of the `decided` pairs stand in the same
    order in the simulation."""

    label: str
    simulated: tuple[str, ...]
    measured: tuple[str, ...]
    agree: int
    decided: int
    pairs: int


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    groups: tuple[Group, ...]
    rankings: tuple[Ranking, ...]


def compare(results: Sequence[tuple[str, Run]]) -> Comparison:
    """Of named results, simulated and measured in any order, grouped by the policy of their runs; of several simulations (other seeds,
    other faults) the mean counts. Raises UsageError where a policy has only one of both worlds."""
    by_policy: dict[str, dict[bool, list[tuple[str, Run]]]] = {}
    for name, result in results:
        sides = by_policy.setdefault(policy_of(result), {True: [], False: []})
        sides[result.summary["run"].get("world") == "real"].append((name, result))
    groups = []
    for policy, sides in by_policy.items():
        if not sides[True] or not sides[False]:
            there, missing = ("simulated", "measured") if sides[False] else ("measured", "simulated")
            names = ", ".join(name for side in sides.values() for name, _ in side)
            command = "bench" if missing == "measured" else "sim"
            raise UsageError(f"{names}: {there} with policy {policy}, and no {missing} result has it; add one of pdlab {command}")
        groups.append(make_group(policy, *([result for _, result in sides[real]] for real in (False, True))))
    return Comparison(tuple(groups), tuple(_rankings(groups)))


def policy_of(result: Run) -> str:
    """The policy's name, or where it is put together, what it is made of."""
    return policy_words(result.summary["run"].get("policy", ""))


def policy_words(policy: Any) -> str:
    """dispatch prefix_aware, handoff least_kv"""
    if isinstance(policy, Mapping):
        plain = all(isinstance(part, str) for part in policy.values())
        return ", ".join(f"{hook} {part}" for hook, part in policy.items()) if plain else json.dumps(policy, sort_keys=True)
    return str(policy)


def make_group(policy: str, simulated: Sequence[Run], measured: Sequence[Run]) -> Group:
    """Of the runs of both sides."""
    sims, runs = ([_whole(result) for result in results] for results in (simulated, measured))
    lines = [_line(f"{label} {point}", f"{key}.{point}", sims, runs) for label, key in SPREADS for point in POINTS]
    lines += [_line(label, key, sims, runs) for label, key in RATES]
    return Group(
        policy,
        tuple(simulated),
        tuple(measured),
        tuple(lines),
        tuple(_instances(sims, runs)),
        tuple(_pairs(simulated, measured)),
        tuple(dict.fromkeys(notes(simulated, measured))),
    )


def _whole(result: Run) -> Mapping[str, Any]:
    """Its figures over all requests: two runs of the same requests seldom have the same warm-up."""
    summary = result.summary
    trimmed = summary.get("window", {}).get("warm_up_requests")
    return untrimmed(summary, result.records, result.gaps) if trimmed else summary


def _line(label: str, key: str, simulated: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]) -> ComparedFigure:
    def read(summary: Mapping[str, Any]) -> float:
        value: Any = summary
        for part in key.split("."):
            value = value[part]
        return NAN if value is None else float(value)

    return ComparedFigure(label, key, _mean([read(summary) for summary in simulated]), tuple(read(summary) for summary in measured))


def _instances(
    simulated: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]
) -> Iterable[tuple[str, tuple[ComparedFigure, ...]]]:
    """Every instance that any run names, and what it did in any. A run that tells of none says nothing; else one it does not name did
    nothing."""
    telling = [{use["name"]: use for use in summary["instances"]} for summary in (*simulated, *measured)]
    sims = len(simulated)
    names = dict.fromkeys(name for uses in telling for name in uses)
    if not any(telling[sims:]):
        return
    for name in names:
        lines = []
        for label, key in INSTANCE:
            values = [NAN if not uses else float(uses[name][key] or 0) if name in uses else 0.0 for uses in telling]
            if any(values):
                lines.append(ComparedFigure(label, key, _mean(values[:sims]), tuple(values[sims:])))
        yield name, tuple(lines)


def _pairs(simulated: Sequence[Run], measured: Sequence[Run]) -> Iterable[Pairs]:
    def means(runs: Sequence[Mapping[int, float]], ids: Iterable[int]) -> Column:
        return np.array([float(np.mean([run[i] for run in runs if i in run])) for i in ids])

    for label, key in PAIRED:
        ours, theirs = ([_by_id(result, key) for result in results] for results in (simulated, measured))
        both = [i for i in dict.fromkeys(i for run in ours for i in run) if any(i in run for run in theirs)]
        yield Pairs(label, key, means(ours, both), means(theirs, both))


def _by_id(result: Run, key: str) -> dict[int, float]:
    found = result.records.columns()
    values = latencies(found)[key]
    held = (found["status"] == Stage.DONE) & ~np.isnan(values)
    return dict(zip(found["request_id"][held].astype(int).tolist(), values[held].tolist(), strict=True))


def _rankings(groups: Sequence[Group]) -> Iterable[Ranking]:
    if len(groups) < 2:
        return
    for label, key, better in RANKED:
        lines = {group.policy: group.line(key) for group in groups}
        if any(math.isnan(line.simulated) or math.isnan(line.mean) for line in lines.values()):
            continue
        agree = decided = 0
        for a, b in combinations(lines.values(), 2):
            apart = max(_known(a.half_range), _known(b.half_range), TELLING * max(abs(a.mean), abs(b.mean)))
            if abs(a.mean - b.mean) <= apart:
                continue
            decided += 1
            agree += (a.simulated - b.simulated) * (a.mean - b.mean) > 0

        def order(
            value: Callable[[ComparedFigure], float], lines: Mapping[str, ComparedFigure] = lines, better: int = better
        ) -> tuple[str, ...]:
            places: dict[float, list[str]] = {}
            for policy in sorted(lines, key=lambda policy: -better * value(lines[policy])):
                places.setdefault(value(lines[policy]), []).append(policy)
            return tuple(" = ".join(place) for place in places.values())

        count = len(lines) * (len(lines) - 1) // 2
        yield Ranking(label, order(lambda line: line.simulated), order(lambda line: line.mean), agree, decided, count)


def _mean(values: Sequence[float]) -> float:
    """Of those that are known."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else NAN


def _known(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _ranks(values: Column) -> Column:
    """From 0; equal values share their mean rank."""
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(times)
    found: Column = (ends - (times + 1) / 2)[place]
    return found
