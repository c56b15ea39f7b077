"""Pictures of both worlds: their distributions over each other, every request as a dot, errors against the bar, policies side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from pdlab.report.look import GRID, INK, LIMIT, PALETTE, STYLE, Picture, completed, curve, nothing, picture, share_axis, tick, time_axis
from pdlab.results.comparison import Comparison, Group
from pdlab.results.comparison_stored import Check
from pdlab.results.gaps import Gaps
from pdlab.results.records import Column

SIMULATED, MEASURED = PALETTE[1], PALETTE[0]
HELD = PALETTE[2]
_DOTS = 3000  # of a scatter
_WIDEST = 0.5  # error that is drawn where it is
SHOWN = (("TTFT", "ttft_s.mean"), ("TTFT p99", "ttft_s.p99"), ("TPOT", "tpot_s.mean"), ("E2E", "e2e_s.mean"))


def distributions(group: Group) -> Picture:
    """TTFT, TPOT, ITL and E2E: the share within, of the simulation and of each measured run."""
    with mpl.rc_context(STYLE):
        figure = picture(9.6, 5.6)
        grid = figure.subplots(2, 2)
        runs = [
            (run, *look)
            for own, look in ((group.measured, (MEASURED, group.sides[1])), (group.simulated, (SIMULATED, group.sides[0])))
            for run in own
        ]
        several = {group.sides[1]: len(group.measured) > 1, group.sides[0]: len(group.simulated) > 1}
        for axes, (name, key) in zip(grid.flat, (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("ITL", ""), ("E2E", "e2e_s")), strict=True):
            for run, colour, label in runs:
                x, y = _gap_curve(run.gaps) if not key else _curve_of(completed(run.records, key))
                many = several[label]
                axes.plot(x, y, color=colour, label=label, linewidth=1.1 if many else 1.8, alpha=0.7 if many else 1.0)
            axes.set_title(f"{name}: share within")
            if axes.dataLim.width > 0:
                time_axis(axes)
            share_axis(axes)
        _legend(figure, grid[0][0])
        return figure


def scatter(group: Group) -> Picture:
    """One dot a request: measured across, simulated up. On the line the simulation is right."""
    with mpl.rc_context(STYLE):
        figure = picture(9.6, 3.5)
        for axes, pair in zip(figure.subplots(1, 3), group.pairs, strict=True):
            axes.set_title(pair.label)
            held = (pair.simulated > 0) & (pair.measured > 0)
            x, y = pair.measured[held], pair.simulated[held]
            step = -(-x.size // _DOTS) or 1
            if x.size:
                _square(axes, float(min(x.min(), y.min())) / 1.3, float(max(x.max(), y.max())) * 1.3)
                axes.plot(x[::step], y[::step], ".", color=SIMULATED, markersize=5 if x.size < 500 else 4, alpha=0.6, markeredgewidth=0)
            axes.set_xlabel(group.sides[1])
            axes.set_ylabel(group.sides[0])
        return figure


def errors(checks: Sequence[Check]) -> Picture:
    """Each figure's error, beside its bar (shaded) and the spread of the repeats (the line about nothing). Errors beyond 50 % stand at the
    edge, with their number."""
    runs = {run: [check for check in checks if check.run == run] for run in dict.fromkeys(check.run for check in checks)}
    rows = max((len(own) + len({check.policy for check in own}) for own in runs.values()), default=4)
    across = 2 if len(runs) > 1 else 1
    down = -(-len(runs) // across) or 1
    known = [abs(value) for check in checks for value in (check.error, check.spread, check.bound) if not math.isnan(value)]
    edge = min(_WIDEST, max(known, default=_WIDEST)) * 1.2
    with mpl.rc_context(STYLE):
        figure = picture(9.6, down * (0.8 + 0.17 * rows))
        grid = figure.subplots(down, across, squeeze=False)
        for axes in grid.flat[len(runs) :]:
            nothing(axes, "" if runs else "nothing to show")
        for axes, (run, own) in zip(grid.flat, runs.items(), strict=False):
            axes.set_title(run)
            _draw_errors(axes, own, edge)
        return figure


def _draw_errors(axes: Axes, checks: Sequence[Check], edge: float) -> None:
    labels: list[str] = []
    policy = ""
    for check in checks:
        if check.policy != policy:
            policy = check.policy
            axes.annotate(policy, (-edge, len(labels)), (3, 0), textcoords="offset points", va="center", fontsize=8, fontweight="bold")
            labels.append("")
        _draw_error(axes, len(labels), check, edge)
        labels.append(check.label)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=7.5)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(-edge, edge)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _draw_error(axes: Axes, row: int, check: Check, edge: float) -> None:
    axes.barh(row, 2 * check.bound, left=-check.bound, height=0.86, color=GRID, alpha=0.7, linewidth=0)
    if not math.isnan(check.spread):
        axes.plot([-check.spread, check.spread], [row, row], color=INK, linewidth=2.2, alpha=0.55, solid_capstyle="butt")
    colour = HELD if check.holds else LIMIT
    if math.isnan(check.error):
        axes.annotate("missing", (0, row), ha="center", va="center", fontsize=7, color=colour)
        return
    at = min(max(check.error, -edge * 0.97), edge * 0.97)
    axes.plot([at], [row], "o", color=colour, markersize=5)
    if at != check.error:
        place: dict[str, Any] = {"xytext": (-6, 0), "ha": "right"} if at > 0 else {"xytext": (6, 0), "ha": "left"}
        axes.annotate(f"{check.error * 100:+.0f} %", (at, row), textcoords="offset points", va="center", fontsize=7, color=colour, **place)


def policies(comparison: Comparison) -> Picture:
    """Each policy's latencies in both worlds: a dot a measured run, a diamond the simulation. Do the two order the policies alike?"""
    with mpl.rc_context(STYLE):
        figure = picture(9.6, 1.1 + 0.3 * len(comparison.groups))
        grid = figure.subplots(1, len(SHOWN), sharey=True)
        for axes, (label, key) in zip(grid, SHOWN, strict=True):
            axes.set_title(label)
            for row, group in enumerate(comparison.groups):
                line = group.line(key)
                runs = [value for value in line.measured if not math.isnan(value)]
                axes.plot(runs, [row] * len(runs), "o", color=MEASURED, alpha=0.6, markersize=6, label="measured")
                axes.plot([line.simulated], [row], "D", color=SIMULATED, markersize=5, label="simulated")
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_major_formatter(FuncFormatter(tick))
            axes.margins(x=0.15)
        grid[0].set_yticks(range(len(comparison.groups)), [group.policy for group in comparison.groups])
        grid[0].set_ylim(len(comparison.groups) - 0.5, -0.5)
        _legend(figure, grid[0])
        return figure


def _legend(figure: Picture, axes: Axes) -> None:
    """One entry a label, below all."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)


def _square(axes: Axes, low: float, high: float) -> None:
    """The same logarithmic scale both ways, and the line of equality."""
    axes.plot([low, high], [low, high], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    decades = math.log10(high / low)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(
            MaxNLocator(4)
            if decades < 0.7
            else LogLocator(subs=(1, 2, 5) if decades < 1.2 else (1, 3) if decades < 2 else (1,), numticks=8)
        )
        axis.set_major_formatter(FuncFormatter(tick))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, which="major", color=GRID)


def _curve_of(values: Column) -> tuple[Column, Column]:
    return curve(np.maximum(values, 1e-6)) if values.size else (values, values)


def _gap_curve(gaps: Gaps) -> tuple[Column, Column]:
    edges, counts = gaps.histogram()
    return np.maximum(edges, 1e-6), np.cumsum(counts) / max(counts.sum(), 1.0)
