"""The proof as it is kept: a folder of results of both worlds, and the figures held against the bar.

`pdlab validate` writes the folder; from what is stored there the same comparisons come out again, on any machine and without an engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pdlab.core.types import UsageError
from pdlab.results.comparison import Comparison, compare
from pdlab.results.run import SUMMARY, Run

BAR = {f"{key}.{point}": bound for key in ("ttft_s", "tpot_s", "e2e_s") for point, bound in (("mean", 0.05), ("p99", 0.10))}
_ROLES = {"prefill": "p", "decode": "d"}


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


def load_checks(file: str | Path) -> list[Check]:
    """Of a checks.json. Raises UsageError where it is none."""
    file = Path(file)
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return [_check(row) for row in rows]
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; pdlab validate writes it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file}: not the checks of pdlab validate ({error!r})") from None


def _check(row: Mapping[str, Any]) -> Check:
    values: list[Any] = [math.nan if row[field.name] is None else row[field.name] for field in fields(Check)]
    return Check(*values)


def stored(folder: str | Path) -> dict[str, Comparison]:
    """The comparisons of all results in `folder`, by layout and rate. Raises UsageError where there are none."""
    runs: dict[str, list[tuple[str, Run]]] = {}
    for summary in sorted(Path(folder).glob(f"*/{SUMMARY}")):
        result = Run.load(summary.parent)
        runs.setdefault(run_of(result.experiment), []).append((summary.parent.name, result))
    if not runs:
        raise UsageError(f"{folder}: no result is stored there; pdlab validate FILE --out {folder} makes them")
    return {run: compare(results) for run, results in runs.items()}


def run_of(experiment: Mapping[str, Any]) -> str:
    """A short name of what was run, equal in both worlds: "1p1d, 2 req/s"."""
    counts: dict[str, int] = {}
    for row in experiment["cluster"]["instances"]:
        role = _ROLES.get(row["role"], row["role"])
        counts[role] = counts.get(role, 0) + row.get("count", 1)
    layout = "".join(f"{count}{role}" for role, count in counts.items())
    rate = experiment["workload"].get("rate")
    return layout if rate is None else f"{layout}, {rate:g} req/s"
