"""Two simulations against each other: the same comparison as of a simulation with what was measured, and what may be concluded of it.

The same request, by its id, has the same arrival and lengths in both where workload and seed are the same. The differences of a figure are
averaged over stretches of consecutive arrivals, which lie far enough apart to be nearly independent, and Student's t of these means gives
an interval (batch means). What lies within it is undecided. Figures are over all requests, warm-up or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pdlab.core.types import Stage
from pdlab.results.comparison import Comparison, Group, VerdictLine, make_group, policy_words
from pdlab.results.records import Column, latencies, met_both
from pdlab.results.run import Run
from pdlab.results.statistics import MeanInterval, mean_interval
from pdlab.results.units import interval_words, percent, seconds

STRETCHES = 10  # of arrivals
LEAST = 5  # requests in a stretch, and stretches
MOST_DIFFERENCES = 12  # between two files, that are told one by one
_OWN = ("name", "base_dir")


@dataclass(frozen=True, slots=True)
class _Judged:
    """A figure of the verdict: its path in a summary, its unit, and which direction is better."""

    label: str
    path: str
    unit: str
    better: int


_JUDGED = (
    _Judged("SLO attainment", "slo_attainment", "%", 1),
    _Judged("TTFT mean", "ttft_s.mean", "s", -1),
    _Judged("TPOT mean", "tpot_s.mean", "s", -1),
    _Judged("E2E mean", "e2e_s.mean", "s", -1),
)


def compare_simulations(one: tuple[str, Run], other: tuple[str, Run]) -> Comparison:
    """`one` takes the place of what was simulated, `other` of what was measured."""
    sides = _sides(one[0], other[0])
    a, b = one[1], other[1]
    group = make_group(f"{sides[0]} against {sides[1]}", [a], [b])
    doubts = (*_doubts(a, b, sides), *_warned(a, b, sides))
    return Comparison((replace(group, sides=sides, notes=doubts, verdict=tuple(_verdict(group, a, b, sides))),), ())


def _sides(one: str, other: str) -> tuple[str, str]:
    """As short as tells them apart."""
    a, b = Path(one).name, Path(other).name
    return (a, b) if a != b else (one, other)


def _verdict(group: Group, a: Run, b: Run, sides: tuple[str, str]) -> Iterator[VerdictLine]:
    for run, side in ((a, sides[0]), (b, sides[1])):
        if run.summary.get("overloaded"):
            yield VerdictLine(f"{side} is overloaded: its queue grew to the end, and its figures depend on its length", 0)
    paired = _same_requests(a, b)
    values = _values(a, b) if paired else {}
    for judged in _JUDGED:
        line = group.line(judged.path)
        if not (math.isnan(line.simulated) and math.isnan(line.mean)):
            yield _judge(judged, line.simulated, line.mean, values.get(judged.path), sides)
    for run, side in ((a, sides[0]), (b, sides[1])):
        found = run.summary["bottleneck"]
        yield VerdictLine(
            f"{side} is held back by {found['resource']}: {found['evidence']}"
            if found["resource"] != "none"
            else f"{side}: {found['evidence']}",
            0,
        )
    differing = differences(a.experiment, b.experiment)
    yield VerdictLine(f"what differs in the files ({sides[0]}, not {sides[1]}): {differing}" if differing else "the files are the same", 0)
    yield VerdictLine("one run each, of one seed: pdlab sim FILE FILE --seeds 5 tells what other arrivals make of it", 0)


def _judge(judged: _Judged, own: float, its: float, values: Column | None, sides: tuple[str, str]) -> VerdictLine:
    word = percent if judged.unit == "%" else seconds
    words = f"{judged.label}: {word(own)} against {word(its)}"
    found = None if values is None else batch_means(values)
    if found is None or found.half is None:
        return VerdictLine(f"{words}; one run each, and no request in common, tell nothing of chance", 0)
    if abs(found.mean) <= found.half or abs(found.mean) <= 1e-9 * max(abs(own), abs(its)):
        return VerdictLine(f"{words}: {'alike' if found.mean == 0 == found.half else 'undecided'} ({_signed(found, judged.unit)})", 0)
    better = sides[0] if found.mean * judged.better > 0 else sides[1]
    size = MeanInterval(abs(found.mean), found.half)
    return VerdictLine(f"{words}: {better} is better by {interval_words(size, judged.unit)}", 1)


def _signed(found: MeanInterval, unit: str) -> str:
    return f"{'+' if found.mean > 0 else ''}{interval_words(found, unit)}"


def batch_means(values: Column) -> MeanInterval | None:
    """The mean of a figure's differences, in the order of arrival, and its interval over stretches of them; nan tells nothing."""
    known = values[~np.isnan(values)]
    count = min(STRETCHES, known.size // LEAST)
    if count < LEAST:
        return None if not known.size else MeanInterval(float(known.mean()), None)
    found = mean_interval([float(part.mean()) for part in np.array_split(known, count)])
    return None if found is None else MeanInterval(float(known.mean()), found.half)


def _values(a: Run, b: Run) -> dict[str, Column]:
    """Each judged figure's difference, request by request, in the order of arrival; nan where one of the two did not end."""
    columns, tables = (a.records.columns(), b.records.columns()), []
    for found, run in zip(columns, (a, b), strict=True):
        derived = latencies(found)
        done = found["status"] == Stage.DONE
        table = {"slo_attainment": met_both(found, derived, run.slo).astype(np.float64)}
        table |= {f"{key}.mean": np.where(done, derived[key], np.nan) for key in ("ttft_s", "tpot_s", "e2e_s")}
        order = np.argsort(found["request_id"])
        tables.append((found["request_id"][order], found["arrival_s"][order], {path: column[order] for path, column in table.items()}))
    (ids, arrivals, own), (its_ids, _, its) = tables
    _, left, right = np.intersect1d(ids, its_ids, return_indices=True)
    by_arrival = np.argsort(arrivals[left], kind="stable")
    return {path: (own[path][left] - its[path][right])[by_arrival] for path in own}


def _same_requests(a: Run, b: Run) -> bool:
    """Have those with the same id the same prompt?"""
    prompts = [
        dict(zip(c["request_id"].tolist(), c["prompt_tokens"].tolist(), strict=True)) for c in (a.records.columns(), b.records.columns())
    ]
    shared = prompts[0].keys() & prompts[1].keys()
    return bool(shared) and all(prompts[0][i] == prompts[1][i] for i in shared)


# ------------------------------------------------------------ what differs


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """As "policy round_robin, not prefix_aware"; hardware first, since it decides most."""
    ours, theirs = _leaves(one), _leaves(other)
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    keys.sort(key=lambda key: not key.endswith((".hardware", ".tp")))
    words = [f"{key} {ours.get(key, 'left out')}, not {theirs.get(key, 'left out')}" for key in keys[:MOST_DIFFERENCES]]
    return "; ".join([*words, f"and {len(keys) - MOST_DIFFERENCES} more"] if len(keys) > MOST_DIFFERENCES else words)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if path in _OWN:
        return {}
    if path == "policy":
        return {path: policy_words(value)}
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        return {path: value}
    return {key: leaf for name, part in parts for key, leaf in _leaves(part, f"{path}.{name}" if path else str(name)).items()}


def _doubts(a: Run, b: Run, sides: tuple[str, str]) -> Iterator[str]:
    if a.summary["run"].get("seed") != b.summary["run"].get("seed"):
        yield f"{sides[0]} has seed {a.summary['run'].get('seed')}, {sides[1]} {b.summary['run'].get('seed')}: requests are no pairs"
    elif not _same_requests(a, b):
        yield "requests have other prompts: not the same workload, and requests are no pairs"
    kinds = [dict.fromkeys(_hardware(run)) for run in (a, b)]
    if kinds[0] != kinds[1]:
        yield f"other hardware: {', '.join(kinds[0])} in {sides[0]}, {', '.join(kinds[1])} in {sides[1]}"
    for run, side in ((a, sides[0]), (b, sides[1])):
        if run.summary["partial"]:
            yield f"{side} was stopped early"


def _hardware(run: Run) -> list[str]:
    rows: Sequence[Mapping[str, Any]] = run.experiment.get("cluster", {}).get("instances", [])
    counts: dict[str, int] = {}
    for row in rows:
        name = f"{row.get('hardware')}" + (f" tp {row['tp']}" if row.get("tp", 1) > 1 else "")
        counts[name] = counts.get(name, 0) + int(row.get("count", 1))
    return [f"{count} x {name}" for name, count in counts.items()]


def _warned(a: Run, b: Run, sides: tuple[str, str]) -> Iterator[str]:
    """What one of them warns of, and not the other."""
    own, its = a.summary["warnings"], b.summary["warnings"]
    for warnings, others, side in ((own, its, sides[0]), (its, own, sides[1])):
        yield from (f"{said} ({side})" for said in warnings if said not in others)
