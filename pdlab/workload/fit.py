"""Fit the built-in workloads' figures to the public traces, and write them into the package.

    python -m pdlab.workload.fit ../shared/data

Reads the traces through the loaders a user has. See builtin.py for what the figures mean.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from pdlab.workload import builtin, readers
from pdlab.workload.base import Workload

QUANTILES = (0.0, 0.001, 0.005, *(round(0.01 * k, 2) for k in range(1, 99)), 0.985, 0.99, 0.995, 0.998, 0.999, 0.9995, 1.0)
FINE = (*QUANTILES[:-1], 0.9998, 0.9999, 1.0)
FILES = {
    "azure-conv-2023": "azure2023_conv.csv.zst",
    "azure-code-2023": "azure2023_code.csv.zst",
    "mooncake-conversation": "mooncake_conversation_trace.jsonl.zst",
    "sharegpt": "sharegpt_val_10k_llama2.csv.zst",
    "arxiv-summarization": "arxiv_summarization_lengths.csv.zst",
}
EDGES = (*(round(0.05 * k, 2) for k in range(20)), 0.97, 0.98, 0.99, 1.0)
WINDOWS_S = (1.0, 10.0, 60.0)
Column = NDArray[np.float64]


def lengths(path: Path) -> tuple[Column, Column]:
    """A file of lengths only: its first two integer columns are prompt and output tokens."""
    text = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().decode()
    rows = list(csv.reader(io.StringIO(text)))[1:]
    table = np.array([[float(x) for x in row[:2]] for row in rows])
    return table[:, 0], table[:, 1]


def table(values: Column, quantiles: tuple[float, ...] = QUANTILES, digits: int = 5) -> dict[str, list[float]]:
    return {"quantiles": list(quantiles), "values": [float(f"{v:.{digits}g}") for v in np.quantile(values, quantiles)]}


def joint(prompt: Column, output: Column) -> dict[str, Any]:
    """Requests in each cell of a grid over both lengths' quantiles, row by row; equal lengths are ranked by lot."""
    edges = np.array(EDGES)
    rng = np.random.default_rng(0)
    place = []
    for values in (prompt, output):
        rank = np.empty(len(values))
        rank[np.lexsort((rng.random(len(values)), values))] = (np.arange(len(values)) + 0.5) / len(values)
        place.append(np.searchsorted(edges, rank, side="right") - 1)
    cells = np.zeros((len(edges) - 1, len(edges) - 1), int)
    np.add.at(cells, tuple(place), 1)
    return {"edges": list(EDGES), "cells": cells.ravel().tolist()}


def dispersion(arrival_s: Column, window_s: float) -> float:
    """Variance over mean of the counts in windows."""
    counts = np.bincount((arrival_s / window_s).astype(int))
    return float(counts.var() / counts.mean())


def arrivals(arrival_s: Column) -> dict[str, Any]:
    """Gap quantiles, and the lasting part of the gaps' scores: for each persistence on a grid the part that gives the trace's dispersion at
    10 s, by bisection on simulated arrivals, and of these the pair that comes nearest at 1 s and 60 s."""
    gaps = np.diff(arrival_s)
    found: dict[str, Any] = {"rate_rps": len(gaps) / float(arrival_s[-1] - arrival_s[0]), "gaps_s": table(gaps, FINE, 4)}
    wanted = np.log([dispersion(arrival_s - arrival_s[0], window_s) for window_s in WINDOWS_S])

    def simulated(part: float, persistence: float) -> Column:
        figures = found | {"burst_part": part, "burst_persistence": persistence}
        times_s = [np.cumsum(builtin.draw_gaps(figures, len(gaps) + 1, np.random.default_rng(seed))) for seed in range(4)]
        return np.log([np.mean([dispersion(times - times[0], window_s) for times in times_s]) for window_s in WINDOWS_S])

    best: tuple[float, float, float] | None = None
    for persistence in (round(1 - 2.0**-k, 5) for k in range(1, 12)):
        low, high = 0.0, 1.0
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if simulated(middle, persistence)[1] < wanted[1] else (low, middle)
        part = round((low + high) / 2, 4)
        off = float(np.square(simulated(part, persistence) - wanted).sum())
        if best is None or off < best[0]:
            best = off, part, persistence
    assert best is not None, "the grid is not empty"
    return found | {"burst_part": best[1], "burst_persistence": best[2]}


def prefixes(trace: Workload) -> dict[str, Any]:
    """How deep prompts are in what came before, by their length, and how long ago it was last used.

    A trace of n requests shows a return after k requests only where k came before, in n - k of n places, so it counts n / (n - k) times.
    """
    assert trace.hashes is not None, "a trace without hash ids shares nothing"
    last_use: dict[int, int] = {}
    units, depth, lag = [], [], []
    for i, chain in enumerate(trace.hashes):
        known = next((k for k, h in enumerate(chain) if h not in last_use), len(chain))
        units.append(len(chain))
        depth.append(known)
        lag.append(i - last_use[chain[known - 1]] if known else 0)
        last_use.update(dict.fromkeys(chain, i))
    u, d, ago = np.array(units), np.array(depth), np.array(lag)
    _, sharers = np.unique([chain[0] for chain in trace.hashes if chain], return_counts=True)
    common = int(sharers.max() > 0.9 * len(trace))
    deep = d > common
    weight = np.where(deep, len(u) / np.maximum(len(u) - ago, len(u) / 10), 0.0)
    edges = np.unique(np.quantile(u, np.linspace(0, 1, 13)[1:-1]).astype(int))
    group = np.searchsorted(edges, u, side="right")
    levels = np.linspace(0, 1, 15).round(4)
    by_length: list[dict[str, Any]] = []
    for own in (group == g for g in range(len(edges) + 1)):
        returns = own & deep
        fresh = round(max(0.0, 1 - float(weight[own].sum()) / max(1, own.sum())), 4)
        quantiles = (
            {"quantiles": [0.0, 1.0], "values": [0.0, 1.0]}
            if not returns.any()
            else weighted(d[returns] / u[returns], weight[returns], levels)
        )
        by_length.append({"fresh": fresh, **quantiles})
    return {
        "hash_tokens": trace.hash_tokens,
        "common_units": common,
        "unit_edges": edges.tolist(),
        "depth": by_length,
        "log_lag": weighted(np.log(ago[deep]), weight[deep], np.linspace(0, 1, 41).round(4)),
    }


def weighted(values: Column, weight: Column, levels: Column) -> dict[str, list[float]]:
    """Quantiles of weighted values."""
    order = np.argsort(values)
    mass = np.cumsum(weight[order]) - weight[order] / 2
    drawn = np.interp(levels, (mass - mass[0]) / max(mass[-1] - mass[0], 1e-9), values[order])
    return {"quantiles": levels.tolist(), "values": drawn.round(4).tolist()}


def fit(name: str, data: Path) -> dict[str, Any]:
    """All figures of one built-in."""
    path = data / "traces" / FILES[name]
    if name in ("sharegpt", "arxiv-summarization"):
        prompt, output = lengths(path)
        found: dict[str, Any] = {}
    else:
        trace = readers.load(path)
        prompt, output = trace.prompt_tokens.astype(float), trace.output_tokens.astype(float)
        found = arrivals(trace.arrival_s)
        if trace.hashes is not None:
            found["prefix"] = prefixes(trace)
    return {
        "requests": len(prompt),
        "prompt_tokens": table(prompt),
        "output_tokens": table(output),
        "joint": joint(prompt, output),
        "max_context_tokens": int((prompt + output).max()),
        **found,
    }


def main(data: Path) -> None:
    folder = Path(__file__).parent / "data"
    for name in builtin.NAMES:
        text = json.dumps(fit(name, data), separators=(",", ":"))
        (folder / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {len(text)} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
