"""Workloads drawn from figures that were fitted to public traces, by name. `python -m pdlab.workload.fit` makes the figures anew.

What is kept of a trace, and how a request is drawn from it:
- both lengths' quantiles, and how they go together: a checkerboard copula, which is the share of the requests in each cell of a grid over
  both lengths' quantiles (so it knows that the longest outputs follow short prompts, which one correlation cannot say), and the longest
  prompt and output together, since a model's context limits it;
- the quantiles of the gaps between arrivals, and how bursts last: successive gaps are the quantiles of a Gaussian score, a part of whose
  variance persists from request to request. Part and persistence are set so that counts in 1, 10 and 60 s vary as the trace's do;
- where prompts share prefixes: how deep a request's prompt is in what came before (by prompt length), and how many requests ago the
  deepest shared unit was last used. A drawn request takes about that much of a chain that was used then and not since, a whole one
  where it can since turns go on where the last one ended, and continues with names of its own. A request that would go back to before
  the beginning starts anew, and so caches warm up as they did on the trace.

A trace without times (sharegpt, arxiv-summarization) arrives as Poisson, 1 request/s unless a rate is given.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdlab.workload.base import Ints, Workload
from pdlab.workload.chains import Chains

NAMES = ("arxiv-summarization", "azure-code-2023", "azure-conv-2023", "mooncake-conversation", "sharegpt")
Floats = NDArray[np.float64]


def unknown(name: str) -> str:
    """What to say of a name that is none of these."""
    near = difflib.get_close_matches(name, (*NAMES, "synthetic"), 1, 0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    files = "paths of .csv, .json, .jsonl, .parquet files (.gz, .zst)"
    return f"unknown source {name!r}{hint}; there are {', '.join(NAMES)}, synthetic, and {files}"


@cache
def figures(name: str) -> dict[str, Any]:
    """The fitted figures of a built-in, as `fit.py` wrote them."""
    text = resources.files("pdlab.workload").joinpath(f"data/{name}.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def rate_rps(name: str) -> float:
    """The trace's own mean rate; 1.0 where it has no times."""
    return float(figures(name).get("rate_rps", 1.0))


def requests(name: str) -> int:
    """How many the trace has."""
    return int(figures(name)["requests"])


def draw(name: str, count: int, rng: np.random.Generator) -> Workload:
    """`count` requests like the trace's, at its own rate."""
    f = figures(name)
    prompts, outputs = draw_lengths(f, count, rng)
    arrival_s = np.cumsum(draw_gaps(f, count, rng))
    arrival_s -= arrival_s[0]
    if "prefix" not in f:
        return Workload(name, arrival_s, prompts, outputs)
    hash_tokens = int(f["prefix"]["hash_tokens"])
    return Workload(name, arrival_s, prompts, outputs, draw_chains(f["prefix"], prompts // hash_tokens, rng), hash_tokens)


# ---------------------------------------------------------------- lengths


def draw_lengths(figures: dict[str, Any], count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """[count] prompt and output tokens."""
    joint = figures["joint"]
    edges = np.array(joint["edges"])
    shares = np.array(joint["cells"], float).reshape(len(edges) - 1, -1)
    marks = _stratified(rng.random(count), rng)
    row = np.searchsorted(edges, marks, side="right") - 1
    cumulative = np.cumsum(shares, axis=1) / shares.sum(axis=1, keepdims=True)
    column = np.minimum((cumulative[row] < rng.random((count, 1))).sum(axis=1), len(edges) - 2)
    scores = edges[column] + (edges[column + 1] - edges[column]) * rng.random(count)
    prompts = np.maximum(np.rint(_at(figures["prompt_tokens"], marks)), 1).astype(np.int32)
    outputs = np.maximum(np.rint(_at(figures["output_tokens"], _stratified(scores, rng))), 1).astype(np.int32)
    return prompts, np.clip(figures["max_context_tokens"] - prompts, 1, outputs).astype(np.int32)


def _at(table: dict[str, list[float]], quantile: Floats) -> Floats:
    return np.interp(quantile, table["quantiles"], table["values"])


def _stratified(scores: Floats, rng: np.random.Generator) -> Floats:
    """Uniform marks in the order of the scores, one in each of n equal strata: any number of requests has the trace's quantiles."""
    marks = np.empty(len(scores))
    marks[np.argsort(scores)] = (np.arange(len(scores)) + rng.random(len(scores))) / len(scores)
    return marks


# ---------------------------------------------------------------- arrivals


def draw_gaps(figures: dict[str, Any], count: int, rng: np.random.Generator) -> Floats:
    """[count] seconds between arrivals; the first stands before the first arrival."""
    if "gaps_s" not in figures:
        return rng.exponential(1.0, count)
    part, persistence = figures["burst_part"], figures["burst_persistence"]
    lasting = np.empty(count)
    level = float(rng.standard_normal())
    for i, step in enumerate((rng.standard_normal(count) * math.sqrt(1 - persistence**2)).tolist()):
        level = persistence * level + step
        lasting[i] = level
    scores = math.sqrt(part) * lasting + math.sqrt(1 - part) * rng.standard_normal(count)
    return _at(figures["gaps_s"], _stratified(scores, rng))


# ---------------------------------------------------------------- prefixes

_REACH = 400  # requests before and after the one sought, among which one has to do


def draw_chains(prefix: dict[str, Any], units: NDArray[np.integer[Any]], rng: np.random.Generator) -> Chains:
    """Each request's chain, for prompts of so many full units."""
    edges, common = prefix["unit_edges"], prefix["common_units"]
    depths = prefix["depth"]
    groups = np.searchsorted(edges, units, side="right").tolist()
    fresh, depth = rng.random(len(units)).tolist(), rng.random(len(units)).tolist()
    lags = np.maximum(np.exp(_at(prefix["log_lag"], rng.random(len(units)))), 1).astype(int).tolist()
    chains = _Chains(units.tolist(), common)
    for i, size in enumerate(units.tolist()):
        table = depths[groups[i]]
        shared: list[tuple[int, int]] = []
        if fresh[i] >= table["fresh"] and lags[i] <= i and size > common:
            wanted = round(float(np.interp(depth[i], table["quantiles"], table["values"])) * size)
            shared = chains.returning(lags[i], min(max(common + 1, wanted), size), size)
        chains.extend(shared or [(0, min(common, size))], size)
    return chains.made


class _Chains:
    """The chains so far, and which request was the last to use each unit."""

    def __init__(self, units: list[int], common: int) -> None:
        self.made = Chains()
        self._units = units
        self._last = np.full(common + sum(units), -1, np.int32)  # [unit]
        self._unnamed = common

    def extend(self, shared: list[tuple[int, int]], size: int) -> None:
        """The next request's chain: what it shares, and new units up to its size."""
        own = size - sum(length for _, length in shared)
        runs = [*shared, (self._unnamed, own)]
        self._unnamed += own
        for first, length in runs:
            self._last[first : first + length] = len(self.made)
        self.made.append_runs(runs)

    def returning(self, lag: int, wanted: int, most: int) -> list[tuple[int, int]]:
        """About `wanted` units, at most `most`, of the request about `lag` ago that was the last to use them, as runs: all it has, where
        one has about as many, for a turn goes on from the end of the last; else the beginning of a longer one; else none."""
        slack = wanted // 10
        for index in self._around(lag, 10 + lag // 3):
            size = self._units[index]
            if wanted - slack <= size <= min(wanted + slack, most) and (runs := self._last_used(index, size)):
                return runs
        for index in self._around(lag, _REACH):
            if self._units[index] >= wanted and (runs := self._last_used(index, wanted)):
                return runs
        return []

    def _around(self, lag: int, reach: int) -> Iterator[int]:
        """Indices of requests, from the one `lag` ago outwards."""
        place = len(self.made) - lag
        for off in range(min(reach, _REACH)):
            if place >= off:
                yield place - off
            if 0 < off < lag:
                yield place + off

    def _last_used(self, index: int, units: int) -> list[tuple[int, int]]:
        """The first `units` of a request's chain as runs; none if another used them later."""
        runs = _beginning(self.made.runs(index), units)
        return runs if self._last[sum(runs[-1]) - 1] == index else []


def _beginning(runs: list[tuple[int, int]], units: int) -> list[tuple[int, int]]:
    """The first so many units of a chain."""
    cut = []
    for first, length in runs:
        cut.append((first, min(length, units)))
        units -= length
        if units <= 0:
            break
    return cut
