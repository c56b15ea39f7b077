"""How true the simulator is, in figures: errors of groups of rows, and whether configurations come out in their measured order.

error      simulated / measured - 1 of a row's TPOT, TTFT, or output tokens a second and accelerator (Little's law, of both alike)
MAPE       mean of the absolute errors; bias is the mean error, median that of the absolute errors
Spearman   rank correlation of simulated and measured values over the rows of a group, where it has three
order      of two configurations of one model on one accelerator, of like lengths, concurrency and format: does the simulator say which is
           better? Pairs count where the measured figures differ by 5 % or more; two that come out equal are half right
coverage   in how many rows the 95 % interval that the row's cost says of itself (`pdlab.cost.error`) holds the measured figure
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pdlab.cost.error import cost_error
from pdlab.cost.spec import CostSpec
from pdlab.search.board.run import ScoredRow

Floats = NDArray[np.float64]
MEASURES = ("tpot", "ttft", "throughput")
WITH_INTERVALS = ("tpot", "ttft")  # what a cost says its error of
BAND = 64  # concurrency up to which an aggregated server is neither full nor short of KV
DECIDED = 0.05  # how far apart two measured figures must lie


@dataclass(frozen=True, slots=True)
class Errors:
    """Of one figure over a group's simulated rows."""

    mape: float
    median: float
    bias: float
    spearman: float | None


@dataclass(frozen=True, slots=True)
class Order:
    """Pairs of configurations that measurements tell apart, and how many of them the simulator has right."""

    right: float
    pairs: int

    @property
    def share(self) -> float | None:
        return self.right / self.pairs if self.pairs else None


@dataclass(frozen=True, slots=True)
class Coverage:
    """Rows whose interval holds the measured figure."""

    held: int
    rows: int

    @property
    def share(self) -> float | None:
        return self.held / self.rows if self.rows else None


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that are told of together: `key` says which."""

    key: tuple[str, ...]
    rows: int
    failures: int
    errors: dict[str, Errors]


def band(scored: ScoredRow) -> str:
    """The concurrency band of an aggregated row; P/D rows are one band."""
    if scored.row.disaggregated:
        return "P/D"
    return f"<= {BAND}" if scored.row.concurrency <= BAND else f"> {BAND}"


def by_band(scored: ScoredRow) -> tuple[str, ...]:
    return (band(scored),)


def by_server(scored: ScoredRow) -> tuple[str, ...]:
    row = scored.row
    return row.model_name, row.hardware_name, row.engine, band(scored)


def groups(scored: Sequence[ScoredRow], key: Callable[[ScoredRow], tuple[str, ...]]) -> list[RowGroup]:
    """In the order of their keys."""
    found: dict[tuple[str, ...], list[ScoredRow]] = defaultdict(list)
    for one in scored:
        found[key(one)].append(one)
    return [_group(name, members) for name, members in sorted(found.items())]


def _group(key: tuple[str, ...], members: Sequence[ScoredRow]) -> RowGroup:
    done = [one for one in members if not one.failure]
    errors = {measure: _errors(done, measure) for measure in MEASURES} if done else {}
    return RowGroup(key, len(members), len(members) - len(done), errors)


def _errors(done: Sequence[ScoredRow], measure: str) -> Errors:
    misses = np.array([one.errors[measure] for one in done])
    pairs = [figures(one, measure) for one in done]
    measured, simulated = (np.array(column) for column in zip(*pairs, strict=True))
    return Errors(float(np.abs(misses).mean()), float(np.median(np.abs(misses))), float(misses.mean()), spearman(measured, simulated))


def figures(scored: ScoredRow, measure: str) -> tuple[float, float]:
    """(measured, simulated), in seconds or tokens a second and accelerator."""
    row = scored.row
    return {
        "tpot": (row.tpot_s, scored.tpot_s),
        "ttft": (row.ttft_s, scored.ttft_s),
        "throughput": (row.tokens_per_s_per_gpu, scored.tokens_per_s_per_gpu),
    }[measure]


def spearman(a: Floats, b: Floats) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None of fewer than three values, or where either is constant."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2)[inverse].astype(np.float64)
    return ranks


def order(scored: Sequence[ScoredRow], measure: str) -> Order:
    """Over all pairs of configurations that differ in nothing but how accelerators are used."""
    alike: dict[tuple[object, ...], list[ScoredRow]] = defaultdict(list)
    for one in scored:
        row = one.row
        if not one.failure:
            what = (row.model_name, row.hardware_name, row.engine, row.weight_dtype, row.disaggregated)
            alike[(*what, row.prompt_tokens, row.output_tokens, row.concurrency)].append(one)
    right, pairs = 0.0, 0
    for members in alike.values():
        for a, b in combinations(members, 2):
            (measured_a, simulated_a), (measured_b, simulated_b) = figures(a, measure), figures(b, measure)
            if a.row.sides == b.row.sides or abs(measured_a - measured_b) < DECIDED * max(measured_a, measured_b):
                continue
            pairs += 1
            same = (measured_a - measured_b) * (simulated_a - simulated_b)
            right += 1.0 if same > 0 else 0.5 if same == 0 else 0.0
    return Order(right, pairs)


def coverage(scored: Sequence[ScoredRow], measure: str) -> Coverage:
    """Of TPOT or TTFT, over the rows that were simulated and whose cost says its error."""
    held = [interval_holds(one, measure) for one in scored if not one.failure]
    return Coverage(sum(holds is True for holds in held), sum(holds is not None for holds in held))


def interval_holds(scored: ScoredRow, measure: str) -> bool | None:
    """Whether the interval about the simulated figure holds the measured one; None where the cost says nothing of its error."""
    error = cost_error(CostSpec(), scored.row.hardware(), scored.row.engine)
    if error is None or scored.failure:
        return None
    measured, simulated = figures(scored, measure)
    low, high = error.interval(simulated, measure)
    return low <= measured <= high
