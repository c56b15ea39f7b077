"""A workload as a picture: when requests come, how long they are, how much of their prompts a prefix cache would hit."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from pdlab.report.look import PALETTE, STYLE, Picture, nothing, picture
from pdlab.workload.base import Workload
from pdlab.workload.stats import correlation, opening_s, prefix, ranks

_BINS = 240  # of time, at most
_DOTS = 4000  # in the scatter plot; more hide each other
PROMPT, OUTPUT, CACHE = PALETTE[0], PALETTE[1], PALETTE[2]


def overview(workload: Workload) -> Picture:
    """Four panels: arrivals over time, lengths, prompt against output, prefix reuse against cache size."""
    with mpl.rc_context(STYLE):
        figure = picture(10.5, 6.4)
        figure.suptitle(f"{workload.name}: {len(workload):,} requests", x=0.01, ha="left", fontsize=12, fontweight="bold")
        axes = figure.subplots(2, 2)
        _arrivals(axes[0, 0], workload)
        _lengths(axes[0, 1], workload)
        _joint(axes[1, 0], workload)
        _prefix(axes[1, 1], workload)
        return figure


def _arrivals(axes: Axes, workload: Workload) -> None:
    axes.set_title("Arrivals")
    times_s = opening_s(workload)
    if not len(times_s) or times_s[-1] <= times_s[0]:
        said = f"closed loop: {workload.concurrency} at once" if workload.concurrency is not None else "all at the same time"
        return nothing(axes, said)
    span_s = float(times_s[-1] - times_s[0])
    bins = max(1, min(_BINS, len(times_s) // 20))
    counts, edges = np.histogram(times_s, bins)
    axes.stairs(counts / (span_s / bins), edges, fill=True, color=PROMPT, alpha=0.35)
    axes.stairs(counts / (span_s / bins), edges, color=PROMPT, linewidth=1.0)
    axes.axhline(len(times_s) / span_s, color="black", linewidth=0.9, linestyle="--", label=f"mean {len(times_s) / span_s:.3g} requests/s")
    axes.set(
        xlabel="time, s",
        ylabel=f"requests/s, in bins of {span_s / bins:.3g} s",
        ylim=(0, float(counts.max()) / (span_s / bins) * 1.2),
        xlim=(edges[0], edges[-1]),
    )
    axes.legend(loc="upper right")
    return None


def _lengths(axes: Axes, workload: Workload) -> None:
    axes.set_title("Lengths: share of requests with at most so many tokens")
    for name, tokens, colour in (("prompt", workload.prompt_tokens, PROMPT), ("output", workload.output_tokens, OUTPUT)):
        values, counts = np.unique(tokens, return_counts=True)
        share = np.cumsum(counts) / len(tokens)
        p50, p99 = np.quantile(tokens, (0.5, 0.99))
        axes.step(values, share, where="post", color=colour, label=f"{name}: p50 {p50:,.0f}, p99 {p99:,.0f}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.set(xlabel="tokens", ylim=(0, 1.32), yticks=np.linspace(0, 1, 6))  # room above for the legend
    axes.legend(loc="upper left")


def _joint(axes: Axes, workload: Workload) -> None:
    rank = correlation(ranks(workload.prompt_tokens), ranks(workload.output_tokens))
    axes.set_title("Prompt against output" + ("" if rank is None else f", rank correlation {rank:.2f}"))
    every = -(-len(workload) // _DOTS)
    axes.plot(
        workload.prompt_tokens[::every], workload.output_tokens[::every], ".", color=PALETTE[3], markersize=2.5, alpha=0.35, rasterized=True
    )
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="output tokens")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))


def _prefix(axes: Axes, workload: Workload) -> None:
    axes.set_title("Prefix reuse: hits of full prompt units")
    if workload.hashes is None:
        return nothing(axes, "the requests share no prefixes")
    largest = max(10, len({unit for chain in workload.hashes for unit in chain}))
    capacities = np.unique(np.geomspace(max(10, largest / 1000), largest, 9).astype(int)).tolist()
    found = prefix(workload, capacities)
    sizes = [int(size) * workload.hash_tokens for size in found["lru_hit_ratio"]]
    limit = found["unit_hit_ratio"]
    axes.plot(sizes, list(found["lru_hit_ratio"].values()), "o-", color=CACHE, markersize=3.5, label="LRU cache of that size")
    axes.axhline(limit, color="black", linewidth=0.9, linestyle="--", label=f"without eviction: {limit * 100:.1f} %")
    axes.set(xscale="log", xlabel="cache, tokens", ylim=(0, max(0.05, limit * 1.25)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if limit > 0.05 else 1, symbol=" %"))
    axes.legend(loc="lower right")
    return None
