"""The proof as it is kept: the runs of both worlds, and the figures held against the bar.

`pdlab validate` stores the runs; from them the same comparisons come out again, on any machine and without an engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pdlab.core.types import UsageError
from pdlab.results.comparison import Comparison, compare
from pdlab.results.run import Run
from pdlab.results.run_store import RunStore, StoredRun

BAR = {f"{key}.{point}": bound for key in ("ttft_s", "tpot_s", "e2e_s") for point, bound in (("mean", 0.05), ("p99", 0.10))}


@dataclass(frozen=True, slots=True)
class Check:
    """One figure of one policy in one run, against the bar: errors and spreads as in `pdlab.results.comparison`, `bound` as they are."""

    run: str
    policy: str
    key: str
    simulated: float
    measured: float
    error: float
    spread: float
    bound: float
    holds: bool

    @property
    def label(self) -> str:
        """TTFT mean, E2E p99."""
        latency, _, point = self.key.partition(".")
        return f"{latency.removesuffix('_s').upper()} {point}"


def checks(run: str, comparison: Comparison) -> Iterator[Check]:
    """Every figure that has a bar, of every policy. It holds where its error is within the bar or within the spread of the repeats; a
    figure that is missing does not."""
    for group in comparison.groups:
        for key, bound in BAR.items():
            line = group.line(key)
            allowed = bound if math.isnan(line.spread) else max(bound, line.spread)
            holds = abs(line.error) <= allowed
            yield Check(run, group.policy, key, line.simulated, line.mean, line.error, line.spread, bound, holds)


def all_checks(comparisons: Mapping[str, Comparison]) -> list[Check]:
    """Of every run."""
    return [check for run, comparison in comparisons.items() for check in checks(run, comparison)]


def load_checks(folder: str | Path) -> list[Check]:
    """As `pdlab validate` has judged. Raises UsageError where it has stored nothing there."""
    try:
        return [_check(row) for row in RunStore.load(Path(folder)).checks]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{folder}: its checks are not those of pdlab validate ({error!r})") from None


def _check(row: Mapping[str, Any]) -> Check:
    values: list[Any] = [math.nan if row[field.name] is None else row[field.name] for field in fields(Check)]
    return Check(*values)


def plain(check: Check) -> dict[str, Any]:
    """As JSON has it: null where there is no figure."""
    return {name: None if value != value else value for name, value in asdict(check).items()}


def stored(folder: str | Path) -> dict[str, Comparison]:
    """The comparisons of all runs in `folder`, by layout and rate: "1p1d, 2 req/s". Raises UsageError where there are none."""
    return compared(RunStore.load(Path(folder)).runs.values())


def compared(runs: Iterable[StoredRun], *, undisturbed: bool = False) -> dict[str, Comparison]:
    """By layout and rate. What counts of a measured run's simulations is those that know which cores were slow, where there are any and
    `undisturbed` does not ask for the others."""
    own: dict[tuple[str, str, float], list[StoredRun]] = {}
    for run in runs:
        own.setdefault((run.layout, run.policy, run.rate), []).append(run)
    results: dict[str, list[tuple[str, Run]]] = {}
    for (layout, _, rate), alike in own.items():
        informed = not undisturbed and any(run.world == "sim" and run.repeat for run in alike)
        counting = [run for run in alike if run.world == "real" or bool(run.repeat) == informed]
        results.setdefault(f"{layout}, {rate:g} req/s", []).extend((run.name, run.result) for run in counting)
    return {run: compare(alike) for run, alike in results.items()}
