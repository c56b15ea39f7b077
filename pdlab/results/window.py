"""Over which part of a run its figures are counted, and whether it kept up.

*The arrival window* reaches from the first arrival to the last. What is done after it, when nothing arrives any more, is no part of a rate:
a run of 2,000 requests at 90 a second arrives in 22 s, and the last answers take half as long again.

*Warm-up* is left out by MSER-5 on TTFT: of all ways to leave out the first d of the means of five requests each, that one whose remaining
mean has the smallest estimated error, `sum((x - mean)^2) / (k - d)^2`. A d beyond half of them says that no steady state was reached, and
nothing is left out. Source: White, Cobb and Spratt, "A comparison of five steady-state truncation heuristics for simulation", WSC 2000;
Hoad, Robinson and Davies, "Automating warm-up length estimation", WSC 2008, have the half.

A run is *overloaded* where its queue grows to its end. The window is cut into ten parts; the mean number of requests that wait in each is
tested for a trend by Mann and Kendall's S, one-sided at 1 %. The growth must cost a request more than a prefill takes, and the queue be
about its longest at the end. Source: Kendall, "Rank Correlation Methods", table of S.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdlab.core.types import Stage
from pdlab.results.records import Column, Records, latencies, met_both

BATCH = 5  # requests behind each mean of MSER-5
LEAST_REQUESTS = 100  # fewer say nothing of a warm-up, or of a trend
PARTS = 10  # of the window, in which the queue is looked at
TREND = 27  # S of ten parts is as high by chance in fewer than 1 % of cases
AT_ITS_LONGEST = 0.8  # of the longest queue, at the end
ALIKE = 1e-9  # of the mean TTFT
LAST = 0.05  # of the arrivals, by which the wait at the end is judged


@dataclass(frozen=True, slots=True)
class ArrivalWindow:
    """`start_s` and `end_s` are of all arrivals, the first `warm_up` of them, which do not count, too; `offered_rps` is how many arrived a
    second, of closed loops too; `served_rps` how many were begun a second: as many, or where the run is `overloaded` fewer, since the queue
    at the end is served, too."""

    start_s: float
    end_s: float
    requests: int
    warm_up: int
    warm_up_s: float
    offered_rps: float
    served_rps: float
    overloaded: bool


@dataclass(frozen=True, slots=True)
class WindowFigures:
    """What the requests of a window come to. Rates are in requests/s; nan where there were none."""

    window: ArrivalWindow
    slo_attainment: float
    goodput_rps: float
    throughput_rps: float

    @property
    def overloaded(self) -> bool:
        return self.window.overloaded


def window_figures(records: Records, slo: tuple[float, float], *, trim: bool = True, duration_s: float = math.nan) -> WindowFigures:
    """`slo` is the experiment's (ttft_s, tpot_s), inf where there is none. Without `trim` the warm-up counts. `duration_s`, the run's,
    stands for the window where all requests arrived at once."""
    found = records.columns()
    window = arrival_window(found, trim=trim, duration_s=duration_s)
    kept = after_warm_up(found, window)
    good = met_both(found, latencies(found), slo)[kept]
    done = (found["status"] == Stage.DONE)[kept]
    attainment = _share(good)
    return WindowFigures(window, attainment, attainment * window.offered_rps, _share(done) * window.served_rps)


def arrival_window(found: Mapping[str, Column], *, trim: bool = True, duration_s: float = math.nan) -> ArrivalWindow:
    """Of `Records.columns()`; see `window_figures`. A run that is overloaded has no steady state, and so no warm-up."""
    arrival = found["arrival_s"]
    count = arrival.size
    if not count:
        return ArrivalWindow(0.0, 0.0, 0, 0, 0.0, math.nan, math.nan, False)
    start_s, end_s = float(arrival.min()), float(arrival.max())
    span_s = end_s - start_s
    if span_s <= 0.0:
        at_once = count / duration_s if duration_s > 0.0 else math.nan
        return ArrivalWindow(start_s, end_s, count, 0, 0.0, at_once, at_once, False)
    offered_rps = float((arrival > start_s).sum()) / span_s  # which of batches, and of a closed loop's first requests, is right, too
    order = np.argsort(arrival, kind="stable")
    overloaded = count >= LEAST_REQUESTS and _grows(found, start_s, end_s, offered_rps)
    served_rps = offered_rps * span_s / (span_s + _last_wait_s(found, order)) if overloaded else offered_rps
    left_out = warm_up_requests((found["first_token_s"] - arrival)[order]) if trim and not overloaded else 0
    warm_up_s = float(arrival[order[left_out]]) - start_s if left_out else 0.0
    return ArrivalWindow(start_s, end_s, count, left_out, warm_up_s, offered_rps, served_rps, overloaded)


def after_warm_up(found: Mapping[str, Column], window: ArrivalWindow) -> NDArray[np.int64] | slice:
    """The rows that count."""
    if not window.warm_up:
        return slice(None)
    order = np.argsort(found["arrival_s"], kind="stable")
    return np.sort(order[window.warm_up :])


def warm_up_requests(ttft_s: Column) -> int:
    """How many requests MSER-5 leaves out, of their TTFTs in the order of their arrivals; nan, of those without a token, tells nothing."""
    answered = np.flatnonzero(~np.isnan(ttft_s))
    batches = answered.size // BATCH
    if answered.size < LEAST_REQUESTS:
        return 0
    means = ttft_s[answered[: batches * BATCH]].reshape(batches, BATCH).mean(axis=1)
    middle = float(means.mean())
    if float(np.ptp(means)) <= ALIKE * middle:  # what differs by its last bits is alike
        return 0
    means -= middle
    left = np.arange(batches, 0, -1)
    sums, squares = (np.cumsum(values[::-1])[::-1] for values in (means, means * means))
    error = (squares - sums * sums / left)[: batches // 2 + 1] / left[: batches // 2 + 1] ** 2
    best = int((error <= error.min() + ALIKE * error[0]).argmax())
    return int(answered[best * BATCH]) if 0 < best < batches // 2 else 0


def waiting(found: Mapping[str, Column], edges: Column) -> Column:
    """Between each two `edges`, in seconds, the mean number of requests that waited: for prefill, or for a decode instance to take them."""
    total = np.zeros(edges.size)
    for begun, over in _waits(found):
        total += [np.maximum(np.minimum(over, edge) - begun, 0.0).sum() for edge in edges]
    mean: Column = np.diff(total) / np.diff(edges)
    return mean


def _waits(found: Mapping[str, Column]) -> list[tuple[Column, Column]]:
    """From when to when requests waited. One that never got on waits till it ends, or for ever."""
    ended = np.where(np.isnan(found["finish_s"]), math.inf, found["finish_s"])
    arrival, first, moved = found["arrival_s"], found["first_token_s"], found["transfer_end_s"]
    prefill = (arrival, np.fmin(found["prefill_start_s"], ended))
    known = ~np.isnan(first)
    room = (first[known], np.maximum(np.fmin(np.fmin(found["transfer_start_s"], found["decode_start_s"]), ended)[known], first[known]))
    known = ~np.isnan(moved)
    turn = (moved[known], np.maximum(np.fmin(found["decode_start_s"], ended)[known], moved[known]))
    return [prefill, room, turn]


def _grows(found: Mapping[str, Column], start_s: float, end_s: float, offered_rps: float) -> bool:
    queue = waiting(found, np.linspace(start_s, end_s, PARTS + 1))
    trend = sum(int(np.sign(queue[later] - queue[k])) for k in range(PARTS) for later in range(k + 1, PARTS))
    prefill_s = found["first_token_s"] - found["prefill_start_s"]
    known = prefill_s[~np.isnan(prefill_s)]
    typical_s = float(np.median(known)) if known.size else 0.0
    return bool(
        trend >= TREND and (queue[-1] - queue[0]) / offered_rps > typical_s and queue[-2:].mean() >= AT_ITS_LONGEST * float(queue.max())
    )


def _last_wait_s(found: Mapping[str, Column], order: NDArray[np.int64]) -> float:
    """How long the last of those that arrived had to wait, as a rule; what never ended, till the run's last known moment."""
    ends = found["finish_s"][~np.isnan(found["finish_s"])]
    now = max(float(ends.max()) if ends.size else 0.0, float(found["arrival_s"].max()))
    last = order[-max(1, int(LAST * order.size)) :]
    part = {name: column[last] for name, column in found.items()}
    waited = np.fmin(part["prefill_start_s"], now) - part["arrival_s"]
    for name, before in (("transfer_start_s", "first_token_s"), ("decode_start_s", "transfer_end_s")):
        waited += np.nan_to_num(np.maximum(part[name] - part[before], 0.0))
    return float(np.median(waited))


def _share(met: NDArray[np.bool_]) -> float:
    return float(met.mean()) if met.size else math.nan
