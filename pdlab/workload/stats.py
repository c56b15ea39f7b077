"""What a workload is like: how fast and how bursty requests come, how long they are, and how much of their prompts they share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdlab.workload.base import Workload

CAPACITIES_UNITS = (1_000, 5_000, 10_000, 30_000, 50_000, 100_000)

Numbers = NDArray[np.float64]


def stats(workload: Workload, capacities_units: Sequence[int] = CAPACITIES_UNITS) -> dict[str, Any]:
    """Figures of a workload, ready for JSON; None stands for what does not exist.

    arrivals   of requests that wait for no other: `span_s`, `rate_rps`, coefficient of variation of the gaps `interarrival_cv` (Poisson:
               1), variance over mean of the counts in bins of 1 s and 10 s `dispersion_1s`, `dispersion_10s` (Poisson: 1), and the rate of
               the fullest minute `peak_minute_rps`. None in closed loop.
    prompt_tokens, output_tokens    `mean p50 p90 p99 max cv`; `correlation` (Pearson), `rank_correlation` (Spearman) of the two
    prefix     what caches of prefix units would hit, requests served one after another in order of arrival: `token_hit_ratio` of prompt
               tokens and `unit_hit_ratio` of full prompt units without eviction; `lru_hit_ratio` of units for each capacity in units.
               None where nothing is shared.
    """
    return {
        "name": workload.name,
        "requests": len(workload),
        "dropped": workload.dropped,
        "reading": workload.reading,
        "notes": list(workload.notes),
        "concurrency": workload.concurrency,
        "sessions": None if workload.after is None else int((workload.after < 0).sum()),
        "arrivals": arrivals(workload),
        "prompt_tokens": lengths(workload.prompt_tokens),
        "output_tokens": lengths(workload.output_tokens),
        "correlation": correlation(workload.prompt_tokens.astype(float), workload.output_tokens.astype(float)),
        "rank_correlation": correlation(ranks(workload.prompt_tokens), ranks(workload.output_tokens)),
        "prefix": None if workload.hashes is None else prefix(workload, capacities_units),
    }


def opening_s(workload: Workload) -> Numbers:
    """[k] arrival times of the requests that wait for no other; none in closed loop."""
    if workload.concurrency is not None:
        return np.zeros(0)
    return workload.arrival_s if workload.after is None else workload.arrival_s[workload.after < 0]


def arrivals(workload: Workload) -> dict[str, float | None] | None:
    """See `stats`. Bins begin at the first arrival; the last, which may be a part of one, counts."""
    times_s = opening_s(workload)
    if not len(times_s):
        return None
    since_s = times_s - times_s[0]
    span_s = float(since_s[-1])
    gaps_s = np.diff(times_s)
    return {
        "span_s": span_s,
        "rate_rps": (len(times_s) - 1) / span_s if span_s > 0 else None,
        "interarrival_cv": float(gaps_s.std() / gaps_s.mean()) if span_s > 0 else None,
        "dispersion_1s": _dispersion(since_s, 1.0),
        "dispersion_10s": _dispersion(since_s, 10.0),
        "peak_minute_rps": float(_counts(since_s, 60.0).max()) / 60 if span_s >= 60 else None,
    }


def _counts(since_s: Numbers, bin_s: float) -> Numbers:
    """[occupied bins] requests in each bin that has any."""
    _, counts = np.unique((since_s / bin_s).astype(np.int64), return_counts=True)
    return counts.astype(np.float64)


def _dispersion(since_s: Numbers, bin_s: float) -> float | None:
    """Variance over mean of the counts in bins, the empty ones included; None for fewer than two whole bins."""
    if since_s[-1] < 2 * bin_s:
        return None
    bins = int(since_s[-1] / bin_s) + 1
    mean = len(since_s) / bins
    return (float(np.square(_counts(since_s, bin_s)).sum()) / bins - mean**2) / mean


def lengths(tokens: NDArray[np.int32]) -> dict[str, float]:
    """Mean, quantiles (interpolated), maximum, coefficient of variation."""
    p50, p90, p99 = np.quantile(tokens, (0.5, 0.9, 0.99)).tolist()
    mean = float(tokens.mean())
    return {"mean": mean, "p50": p50, "p90": p90, "p99": p99, "max": int(tokens.max()), "cv": float(tokens.std()) / mean}


def correlation(xs: Numbers, ys: Numbers) -> float | None:
    """Pearson's; None where one of them is constant."""
    if np.ptp(xs) == 0 or np.ptp(ys) == 0:
        return None
    return float(np.corrcoef(xs, ys)[0, 1])


def ranks(values: NDArray[np.int32]) -> Numbers:
    """[n] places from 1 in ascending order; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    places: Numbers = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return places


def prefix(workload: Workload, capacities_units: Sequence[int] = CAPACITIES_UNITS) -> dict[str, Any]:
    """See `stats`. A capacity at which everything fits is the last one shown."""
    assert workload.hashes is not None, "prefix reuse of a workload without hashes"
    hits = unit_hits(workload)
    prompts = [workload.prompt_hashes(i) for i in range(len(workload))]
    units = sum(map(len, prompts))
    unique = len({unit for chain in workload.hashes for unit in chain})
    lru: dict[str, float] = {}
    for capacity in sorted(capacities_units):
        if units:
            lru[str(capacity)] = _lru_hits(prompts, workload.hashes, capacity) / units
        if capacity >= unique:
            break
    return {
        "hash_tokens": workload.hash_tokens,
        "units": units,
        "unique_units": unique,
        "unit_hit_ratio": int(hits.sum()) / units if units else 0.0,
        "token_hit_ratio": int(hits.sum()) * workload.hash_tokens / int(workload.prompt_tokens.sum(dtype=np.int64)),
        "requests_with_hit": float((hits > 0).mean()),
        "lru_hit_ratio": lru,
    }


def unit_hits(workload: Workload) -> NDArray[np.int64]:
    """[n] leading prompt units that earlier requests have left in a cache without bounds."""
    hits = np.zeros(len(workload), np.int64)
    if workload.hashes is None:
        return hits
    seen: set[int] = set()
    for index, context in enumerate(workload.hashes):
        hits[index] = _leading(workload.prompt_hashes(index), seen)
        seen.update(context)
    return hits


def _leading(chain: Sequence[int], cached: Any) -> int:
    for count, unit in enumerate(chain):
        if unit not in cached:
            return count
    return len(chain)


def _lru_hits(prompts: Sequence[Sequence[int]], contexts: Sequence[Sequence[int]], capacity: int) -> int:
    """Hits of an LRU cache. A chain is touched from its end: its head is needed for any hit, so the tail goes first."""
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for prompt, context in zip(prompts, contexts, strict=True):
        hits += _leading(prompt, cached)
        for unit in reversed(context):
            cached[unit] = None
            cached.move_to_end(unit)
        while len(cached) > capacity:
            cached.popitem(last=False)
    return hits
