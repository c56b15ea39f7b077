"""Workloads drawn from figures that were fitted to public traces, by name. `python -m pdlab.workload.fit` makes the figures anew.

What is kept of a trace, and how a request is drawn from it:
- both lengths' quantiles, and their rank correlation, tied by a Gaussian copula;
- the quantiles of the gaps between arrivals, and one number for how bursts last: successive gaps are the quantiles of a Gaussian AR(1)
  process, its coefficient set so that counts in 10 s are as over-dispersed as the trace's;
- where prompts share prefixes: how deep a request's prompt is in what came before (by prompt length), and how many requests ago that was
  last used. A drawn request takes that much of an earlier one's chain and goes on with names of its own.

A trace without times (sharegpt, arxiv-summarization) arrives as Poisson, 1 request/s unless a rate is given.
"""

from __future__ import annotations

import difflib
import json
import math
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdlab.workload.base import Workload

NAMES = ("arxiv-summarization", "azure-code-2023", "azure-conv-2023", "mooncake-conversation", "sharegpt")
Floats = NDArray[np.float64]


def unknown(name: str) -> str:
    """What to say of a name that is none of these."""
    near = difflib.get_close_matches(name, (*NAMES, "synthetic"), 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown source {name!r}{hint}; there are {', '.join(NAMES)}, synthetic, and paths of .csv, .json, .jsonl files (.gz, .zst)"


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
    first, second = _correlated(f["rank_correlation"], count, rng)
    prompts = np.maximum(np.rint(_at(f["prompt_tokens"], first)), 1).astype(np.int32)
    outputs = np.maximum(np.rint(_at(f["output_tokens"], second)), 1).astype(np.int32)
    if "gaps_s" in f:
        gaps = _at(f["gaps_s"], _autoregressive(f["gap_correlation"], count, rng))
    else:
        gaps = rng.exponential(1.0, count)
    arrival_s = np.cumsum(gaps)
    arrival_s -= arrival_s[0]
    if "prefix" not in f:
        return Workload(name, arrival_s, prompts, outputs)
    hash_tokens = int(f["prefix"]["hash_tokens"])
    return Workload(name, arrival_s, prompts, outputs, _chains(f["prefix"], prompts, rng), hash_tokens)


def _at(table: dict[str, list[float]], quantile: Floats) -> Floats:
    return np.interp(quantile, table["quantiles"], table["values"])


def _stratified(scores: Floats, rng: np.random.Generator) -> Floats:
    """Uniform marks in the order of the scores, one in each of n equal strata: any number of requests has the trace's quantiles."""
    marks = np.empty(len(scores))
    marks[np.argsort(scores)] = (np.arange(len(scores)) + rng.random(len(scores))) / len(scores)
    return marks


def _correlated(rank_correlation: float, count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Two uniform columns with that Spearman correlation: r = 2 sin(pi rho / 6) for a Gaussian copula (Pearson 1907)."""
    r = 2 * math.sin(math.pi * rank_correlation / 6)
    z = rng.standard_normal(count)
    other = r * z + math.sqrt(1 - r * r) * rng.standard_normal(count)
    return _stratified(z, rng), _stratified(other, rng)


def _autoregressive(coefficient: float, count: int, rng: np.random.Generator) -> Floats:
    """Uniform marks whose Gaussian scores follow z' = c z + sqrt(1 - c^2) e."""
    noise = rng.standard_normal(count) * math.sqrt(1 - coefficient**2)
    scores = np.empty(count)
    z = float(rng.standard_normal())
    for i, e in enumerate(noise.tolist()):
        z = coefficient * z + e
        scores[i] = z
    return _stratified(scores, rng)


def _chains(prefix: dict[str, Any], prompts: NDArray[np.int32], rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Each request's chain of full prompt units."""
    units = (prompts // prefix["hash_tokens"]).tolist()
    edges = prefix["unit_edges"]
    bins = np.searchsorted(edges, units, side="right").tolist()
    fresh, depth, lag = rng.random(len(units)).tolist(), rng.random(len(units)), rng.random(len(units))
    lags = np.exp(_at(prefix["log_lag"], lag)).astype(int).tolist()
    common = prefix["common_units"]
    chains: list[tuple[int, ...]] = []
    next_name = common
    for i, u in enumerate(units):
        table = prefix["depth"][bins[i]]
        shared: tuple[int, ...] = ()
        if fresh[i] >= table["fresh"] and i:
            wanted = max(common + 1, round(float(np.interp(depth[i], table["quantiles"], table["values"])) * u))
            shared = _earlier(chains, i - max(1, lags[i]), min(wanted, u))
        shared = shared or tuple(range(min(common, u)))
        chains.append(shared + tuple(range(next_name, next_name + u - len(shared))))
        next_name += u - len(shared)
    return chains


def _earlier(chains: list[tuple[int, ...]], place: int, wanted: int) -> tuple[int, ...]:
    """The first `wanted` units of the chain nearest to `place` that has as many; () where none within reach has."""
    n = len(chains)
    place = min(max(place, 0), n - 1)
    for off in range(min(n, 400)):
        for i in (place - off, place + off):
            if 0 <= i < n and len(chains[i]) >= wanted:
                return chains[i][:wanted]
    return ()
