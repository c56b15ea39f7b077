"""A run in stretches of equally many requests: one simulation gives as many figures, with the queues that it has, and no cold starts.

They stand in for independent runs where there is one trace and no chance in it. Neighbours are not quite independent, so an interval over
them is somewhat too narrow. Source: the method of batch means (Law, Simulation Modeling and Analysis, chapter 9).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdlab.core.types import Stage, UsageError
from pdlab.report.result import Result
from pdlab.results.records import Column, Records, latencies, met_both, met_tpot, met_ttft
from pdlab.search.pool import Scalar, summary_figures

LATENCIES = ("ttft_s", "tpot_s", "e2e_s", "queue_s", "transfer_s")
SPREAD = ("mean", "p50", "p90", "p95", "p99", "max")
SHARES = {"slo_attainment": met_both, "ttft_attainment": met_ttft, "tpot_attainment": met_tpot}
GOODPUT = "goodput_rps"
FIGURES = (*SHARES, GOODPUT, *(f"{name}.{point}" for name in LATENCIES for point in SPREAD))  # that requests have, and so stretches


@dataclass(frozen=True, slots=True)
class Stretches:
    """`names` are those of `FIGURES` that are wanted of each."""

    count: int
    names: tuple[str, ...]

    def __call__(self, result: Result) -> dict[str, Scalar]:
        """A task's figures: the run's, and those of each stretch."""
        return {**summary_figures(result), **self.figures(result.records, result.slo)}

    def figures(self, records: Records, slo: tuple[float, float]) -> dict[str, float | None]:
        """By `stretch_key`. Raises UsageError where there are fewer requests than stretches."""
        found = records.columns()
        if len(records) < self.count:
            raise UsageError(f"{len(records)} requests are fewer than {self.count} stretches; ask for fewer, or take a longer workload")
        derived = latencies(found)
        made: dict[str, float | None] = {}
        order = np.argsort(found["request_id"], kind="stable")
        for index, rows in enumerate(np.array_split(order, self.count)):
            some = {name: column[rows] for name, column in found.items()}
            its = {name: column[rows] for name, column in derived.items()}
            for name in self.names:
                value = _figure(name, some, its, slo)
                made[stretch_key(index, name)] = value if np.isfinite(value) else None
        return made


def stretch_key(index: int, name: str) -> str:
    return f"stretches.{index}.{name}"


def _figure(name: str, found: Mapping[str, Column], derived: Mapping[str, Column], slo: tuple[float, float]) -> float:
    """Of the requests of a stretch, as `results.metrics` has it of a run; nan where there is none."""
    if name in SHARES:
        return float(SHARES[name](found, derived, slo).mean())
    if name == GOODPUT:
        span_s = float(np.ptp(found["arrival_s"]))
        return float(met_both(found, derived, slo).sum()) / span_s if span_s > 0 else float("nan")
    kind, _, point = name.partition(".")
    whole: NDArray[np.bool_] = np.ones(len(derived[kind]), bool) if kind in ("queue_s", "transfer_s") else found["status"] == Stage.DONE
    values = derived[kind][whole & ~np.isnan(derived[kind])]
    if not values.size:
        return float("nan")
    if point in ("mean", "max"):
        return float(values.mean() if point == "mean" else values.max())
    return float(np.quantile(values, int(point[1:]) / 100))
