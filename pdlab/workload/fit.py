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
Column = NDArray[np.float64]


def lengths(path: Path) -> tuple[Column, Column]:
    """A file of lengths only: its first two integer columns are prompt and output tokens."""
    text = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().decode()
    rows = list(csv.reader(io.StringIO(text)))[1:]
    table = np.array([[float(x) for x in row[:2]] for row in rows])
    return table[:, 0], table[:, 1]


def table(values: Column, quantiles: tuple[float, ...] = QUANTILES, digits: int = 5) -> dict[str, list[float]]:
    return {"quantiles": list(quantiles), "values": [float(f"{v:.{digits}g}") for v in np.quantile(values, quantiles)]}


def rank_correlation(a: Column, b: Column) -> float:
    """Spearman's, ties by mean rank."""
    ranks = []
    for x in (a, b):
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def dispersion(arrival_s: Column, window_s: float) -> float:
    """Variance over mean of the counts in windows."""
    counts = np.bincount((arrival_s / window_s).astype(int))
    return float(counts.var() / counts.mean())


def arrivals(arrival_s: Column) -> dict[str, Any]:
    """Gap quantiles, and the AR(1) coefficient that gives the trace's dispersion at 10 s, by bisection on simulated arrivals."""
    gaps = np.diff(arrival_s)
    found: dict[str, Any] = {"rate_rps": len(gaps) / float(arrival_s[-1] - arrival_s[0]), "gaps_s": table(gaps, FINE, 4)}
    wanted = dispersion(arrival_s - arrival_s[0], 10.0)

    def simulated(coefficient: float) -> float:
        seen = []
        for seed in range(3):
            rng = np.random.default_rng(seed)
            drawn = builtin._at(found["gaps_s"], builtin._autoregressive(coefficient, 30_000, rng))
            seen.append(dispersion(np.cumsum(drawn), 10.0))
        return float(np.mean(seen))

    low, high = 0.0, 0.995
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if simulated(middle) < wanted else (low, middle)
    return found | {"gap_correlation": round((low + high) / 2, 4)}


def prefixes(trace: Workload) -> dict[str, Any]:
    """How deep prompts are in what came before, by their length, and how long ago it was last used."""
    assert trace.hashes is not None
    last_use: dict[int, int] = {}
    units, depth, lag = [], [], []
    for i, chain in enumerate(trace.hashes):
        known = next((k for k, h in enumerate(chain) if h not in last_use), len(chain))
        units.append(len(chain))
        depth.append(known)
        lag.append(i - last_use[chain[known - 1]] if known else 0)
        last_use.update(dict.fromkeys(chain, i))
    u, d, ago = np.array(units), np.array(depth), np.array(lag)
    everybody = np.array([chain[0] for chain in trace.hashes if chain])
    common = int(np.mean(everybody == np.bincount(everybody - everybody.min()).argmax() + everybody.min()) > 0.9)
    deep = d > common
    edges = np.unique(np.quantile(u, np.linspace(0, 1, 13)[1:-1]).astype(int))
    bins = np.searchsorted(edges, u, side="right")
    quantiles = tuple(np.linspace(0, 1, 15).round(4).tolist())
    by_length = []
    for b in range(len(edges) + 1):
        own = bins == b
        share = (d[own & deep] / u[own & deep]).astype(float)
        fresh = float(1 - deep[own].mean()) if own.any() else 1.0
        by_length.append({"fresh": round(fresh, 4), **(table(share, quantiles, 4) if share.size else {"quantiles": [0, 1], "values": [0, 1]})})
    lags = np.log(np.maximum(ago[deep], 1).astype(float))
    return {
        "hash_tokens": trace.hash_tokens,
        "common_units": common,
        "unit_edges": edges.tolist(),
        "depth": by_length,
        "log_lag": table(lags, tuple(np.linspace(0, 1, 41).round(4).tolist()), 4),
    }


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
        "rank_correlation": round(rank_correlation(prompt, output), 4),
        "prompt_tokens": table(prompt),
        "output_tokens": table(output),
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
