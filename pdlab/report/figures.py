"""Pictures of a run, as matplotlib figures that no global state knows of.

`distributions` (TTFT and TPOT, with the objective drawn in), `load` (queues and KV use over time), `timeline` (a few requests through
prefill, link and decode), `overview` (all three), `compared_distributions` (several runs). Long runs are thinned to what a picture can
show, so drawing takes the same time for a thousand requests as for a million.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pdlab.core.types import Stage
from pdlab.report.aggregates import together
from pdlab.report.look import PALETTE, STYLE, Picture, completed, curve, limit_line, nothing, picture, share_axis, time_axis
from pdlab.report.stages import stretches
from pdlab.results.records import Column, Records, Samples
from pdlab.results.units import seconds

STAGE_COLOURS = {
    "queued": "#c3c9d1",
    "prefill": "#e0803a",
    "wait for room": "#dccfa6",
    "KV transfer": "#8e62c7",
    "wait to decode": "#a9b8c9",
    "decode": "#2f7ed8",
}
_STRETCHES = 400  # of time, in a curve of load


def distributions(records: Records, slo: tuple[float | None, float | None]) -> Picture:
    """TTFT and TPOT of the completed requests: how often (above), how many within (below). `slo` is (ttft_s, tpot_s)."""
    with mpl.rc_context(STYLE):
        figure = picture(9.6, 4.6)
        _draw_distributions(figure, records, slo)
        return figure


def load(samples: Samples, roles: Mapping[str, str] | None = None) -> Picture:
    """Waiting requests, running sequences and KV use over time. `roles` (by instance name) groups where there are many instances."""
    with mpl.rc_context(STYLE):
        figure = picture(9.6, 5.4)
        _draw_load(figure, samples, roles or {})
        return figure


def timeline(records: Records, requests: int = 32) -> Picture:
    """`requests` consecutive arrivals from the middle of the run, each a bar from arrival to its last token."""
    with mpl.rc_context(STYLE):
        figure = picture(9.6, 1.4 + 0.16 * max(4, min(requests, len(records))))
        _draw_timeline(figure, records, requests)
        return figure


def overview(records: Records, samples: Samples, slo: tuple[float | None, float | None], title: str = "") -> Picture:
    """All three in one; without the load where none was told."""
    with mpl.rc_context(STYLE):
        heights = (4.6, 5.2, 5.2) if samples.any_load else (4.6, 5.2)
        figure = picture(10, sum(heights))
        if title:
            figure.suptitle(title, fontsize=12, fontweight="bold", x=0.02, ha="left")
        parts = cast("Sequence[SubFigure]", figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.03))
        _draw_distributions(parts[0], records, slo)
        if samples.any_load:
            _draw_load(parts[1], samples, {})
        _draw_timeline(parts[-1], records, 28)
        return figure


def compared_distributions(runs: Sequence[tuple[str, Records]], slo: tuple[float | None, float | None]) -> Picture:
    """The TTFT and TPOT of several runs, one curve a run."""
    with mpl.rc_context(STYLE):
        figure = picture(9.6, 3.4)
        left, right = figure.subplots(1, 2)
        for axes, key, name, limit in ((left, "ttft_s", "TTFT", slo[0]), (right, "tpot_s", "TPOT", slo[1])):
            for k, (label, records) in enumerate(runs):
                values = completed(records, key)
                if values.size:
                    x, y = curve(values)
                    axes.plot(x, y, color=PALETTE[k % len(PALETTE)], label=label, linestyle="-" if k < len(PALETTE) else "--")
            axes.set_title(f"{name}: share within")
            time_axis(axes)
            share_axis(axes)
            limit_line(axes, limit)
        left.legend(loc="lower right")
        return figure


def _draw_distributions(figure: Figure | SubFigure, records: Records, slo: tuple[float | None, float | None]) -> None:
    grid = figure.subplots(2, 2, sharex="col")
    for column, (key, name, limit, colour) in enumerate((("ttft_s", "TTFT", slo[0], PALETTE[1]), ("tpot_s", "TPOT", slo[1], PALETTE[0]))):
        often, within = grid[0][column], grid[1][column]
        often.set_title(f"{name} of completed requests")
        values = completed(records, key)
        if not values.size:
            nothing(often)
            nothing(within)
            continue
        shown = np.maximum(values, 1e-6)
        # The objective stays in the picture; a stray outlier does not squeeze it.
        low, high = float(np.quantile(shown, 0.001)) / 1.15, float(shown.max()) * 1.15
        if limit is not None and math.isfinite(limit):
            low, high = min(low, limit / 1.3), max(high, limit * 1.3)
        often.hist(shown, bins=list(np.geomspace(low, high, 61)), weights=np.full(shown.size, 1 / shown.size), color=colour, alpha=0.85)
        often.set_ylabel("share of requests")
        often.yaxis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))
        x, y = curve(shown)
        within.plot(x, y, color=colour)
        for q in (0.5, 0.9, 0.99):
            at = float(np.quantile(shown, q))
            within.plot([at], [q], "o", color=colour, markersize=4)
            right = math.log(high / at) < 0.25 * math.log(high / low)
            place: dict[str, Any] = {"xytext": (-7, 3), "ha": "right"} if right else {"xytext": (7, -9)}
            within.annotate(f"p{q * 100:.0f} {seconds(at)}", (at, q), textcoords="offset points", fontsize=8, **place)
        within.set_ylabel("share within")
        within.set_xlim(low, high)
        time_axis(within)
        share_axis(within)
        limit_line(often, limit)
        limit_line(within, limit, words=False)


def _draw_load(figure: Figure | SubFigure, samples: Samples, roles: Mapping[str, str]) -> None:
    rows = figure.subplots(3, 1, sharex=True)
    t, instance = samples.column("t_s"), samples.column("instance").astype(np.int64)
    if not t.size:
        for axes in rows:
            nothing(axes)
        return
    blocks = samples.column("kv_blocks")
    columns = (
        ("waiting requests", samples.column("waiting")),
        ("running sequences", samples.column("running")),
        ("KV blocks in use", np.divide(samples.column("used_blocks"), blocks, out=np.zeros_like(t), where=blocks > 0)),
    )
    groups = _groups(samples, instance, roles)
    edges = np.linspace(t.min(), t.max() + 1e-9, min(_STRETCHES, max(2, t.size // max(1, len(np.unique(instance))))) + 1)
    for axes, (title, values) in zip(rows, columns, strict=True):
        for k, (label, mine) in enumerate(groups):
            x, mean, low, high = _thinned(t[mine], values[mine], edges)
            colour = PALETTE[k % len(PALETTE)]
            axes.plot(x, mean, color=colour, label=label, linewidth=1.2)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(title)
        axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    rows[2].set_ylim(0, 1.05)
    rows[2].set_yticks((0, 0.5, 1))
    rows[2].yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    rows[2].set_xlabel("time, s")
    rows[2].set_xlim(float(t.min()), float(max(t.max(), t.min() + 1e-9)))
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(6, len(groups)))


def _groups(samples: Samples, instance: np.ndarray[Any, np.dtype[np.int64]], roles: Mapping[str, str]) -> list[tuple[str, Any]]:
    present = [int(k) for k in np.unique(instance)]
    names = {samples.instances[k] if k < len(samples.instances) else f"instance {k}": k for k in present}
    lines = together(list(names), roles)
    return [(label, np.isin(instance, [names[one] for one in own])) for label, own in lines.items()]


def _thinned(t: Column, values: Column, edges: Column) -> tuple[Column, Column, Column, Column]:
    """(time, mean, min, max) of the values in each stretch of time from the first that has any; one without goes on with the value before,
    since nothing is reported while nothing happens."""
    place = np.clip(np.searchsorted(edges, t, side="right") - 1, 0, len(edges) - 2)
    count = np.bincount(place, minlength=len(edges) - 1)
    held = count > 0
    total = np.bincount(place, values, len(edges) - 1)
    low, high = np.full(len(edges) - 1, np.inf), np.full(len(edges) - 1, -np.inf)
    np.minimum.at(low, place, values)
    np.maximum.at(high, place, values)
    last = np.full(len(edges) - 1, -1)
    last[place] = np.arange(len(values))  # of equal places the last one stays
    before = values[np.maximum.accumulate(last)]
    mean, low, high = (np.where(held, one, before) for one in (total / np.maximum(count, 1), low, high))
    some = np.maximum.accumulate(held)
    return ((edges[:-1] + edges[1:]) / 2)[some], mean[some], low[some], high[some]


def _draw_timeline(figure: Figure | SubFigure, records: Records, requests: int) -> None:
    axes = figure.subplots()
    order = np.argsort(records.column("arrival_s"), kind="stable")
    start = max(0, (len(order) - requests) // 2)
    chosen = order[start : start + requests]
    if not chosen.size:
        nothing(axes)
        return
    for stretch in stretches(records):
        begin, end = stretch.start_s[chosen], stretch.end_s[chosen]
        shown = ~np.isnan(begin) & ~np.isnan(end) & (end > begin)
        on_top = stretch.place == "link"  # it may overlap the prefill it belongs to
        axes.barh(
            np.nonzero(shown)[0],
            (end - begin)[shown],
            left=begin[shown],
            height=0.42 if on_top else 0.82,
            color=STAGE_COLOURS[stretch.name],
            zorder=3 if on_top else 2,
            linewidth=0,
        )
    labels = [_route(records, int(k)) for k in chosen]
    axes.set_yticks(range(len(chosen)), labels, fontsize=7)
    axes.set_ylim(len(chosen) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time, s")
    axes.set_title(f"{len(chosen)} consecutive requests of {len(records):,}")
    figure.legend(handles=[Patch(color=c, label=name) for name, c in STAGE_COLOURS.items()], loc="outside lower center", ncols=6)


def _route(records: Records, row: int) -> str:
    found = records.columns(slice(row, row + 1))
    stage = Stage(int(found["status"][0]))
    names = []
    for key in ("prefill_instance", "decode_instance"):
        k = found[key][0]
        if not np.isnan(k) and 0 <= k < len(records.instances):
            names.append(records.instances[int(k)])
    route = " → ".join(dict.fromkeys(names))
    end = "" if stage is Stage.DONE else f" {stage.name.lower()}"
    return f"{int(found['request_id'][0])}  {route}{end}"
