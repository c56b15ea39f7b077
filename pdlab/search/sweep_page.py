"""A sweep as one page: what was swept, the table of its points, and a picture for each axis."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from pdlab.experiment.experiment import Experiment
from pdlab.report.look import GRID, INK, PALETTE, STYLE, Picture, picture, share_axis, tick
from pdlab.report.page import definition_list, escaped, page, table
from pdlab.report.svg import svg
from pdlab.search.grid import worded
from pdlab.search.sweep import PointOutcome, Sweep, reasons
from pdlab.search.sweep_table import SHOWN, ShownFigure, best_cells, heads, point_cells

PANELS = tuple(shown for shown in SHOWN if not shown.name.endswith("p50"))
_READING = (
    "Means, and 95 % intervals over the seeds by Student's t. Green: the best of its column; the difference to each other point, seed by "
    "seed, is outside its interval."
)
_LINES = len(PALETTE)  # with a colour and a name of their own; of more only the mean has one


def sweep_page(sweep: Sweep, outcomes: Sequence[PointOutcome], base: Experiment) -> str:
    done = sum(len(outcome.done) for outcome in outcomes)
    seeds = f"seeds {sweep.seeds[0]} to {sweep.seeds[-1]}" if len(sweep.seeds) > 1 else f"seed {sweep.seeds[0]}"
    body = [
        f"<h1>{escaped(base.name)}</h1>",
        f"<p class=soft>{len(outcomes):,} points, {seeds}, {done:,} of {len(sweep.runs):,} runs</p>",
        *(f"<p class=warning>{escaped(line)}</p>" for line in warnings(sweep, done)),
    ]
    for index, axis in enumerate(sweep.grid.axes):
        drawing = svg(axis_picture(sweep, outcomes, index), f"axis-{index}", f"Figures by {axis.key}")
        body += [f"<h2>By {escaped(axis.key)}</h2>", drawing]
    body += [
        "<h2>Points</h2>",
        table(heads(sweep), [point_cells(one) for one in outcomes], text=len(sweep.grid.axes) + 1, marks=best_cells(outcomes)),
        f"<p class=soft>{_READING}</p>",
    ]
    if sweep.impossible:
        lines = [(_words(sweep, one.values), one.reason) for one in sweep.impossible]
        body += ["<h2>Combinations that are not possible</h2>", definition_list(lines)]
    body += [
        "<h2>Experiment, resolved</h2>",
        f"<details><summary>YAML</summary><pre>{escaped(base.to_yaml())}</pre></details>",
    ]
    return page(f"{base.name}, swept", body)


def warnings(sweep: Sweep, done: int) -> list[str]:
    """What is not there, and why."""
    said = [f"{times:,} run{'s' if times > 1 else ''} failed: {reason}" for reason, times in reasons(sweep)]
    if missing := len(sweep.runs) - done - len(sweep.failures):
        said.append(f"{missing:,} of {len(sweep.runs):,} runs are missing: the same command goes on")
    if sweep.impossible:
        first = sweep.impossible[0]
        such = f"{_words(sweep, first.values)}: {first.reason}"
        said.append(f"not possible, and left out: {len(sweep.impossible):,} of {len(sweep.grid):,} combinations, such as {such}")
    return said


def axis_picture(sweep: Sweep, outcomes: Sequence[PointOutcome], index: int) -> Picture:
    """Each panel a figure over the axis' values, each line one combination of the other axes' values."""
    ends = heads(sweep)
    lines: dict[str, list[PointOutcome]] = {}
    for outcome in outcomes:
        others = [f"{ends[k]} {worded(value)}" for k, value in enumerate(outcome.point.values) if k != index]
        lines.setdefault(", ".join(others), []).append(outcome)
    with mpl.rc_context(STYLE):
        figure = picture(9.6, 5.4)
        panels = figure.subplots(2, 2, sharex=True)
        for shown, axes in zip(PANELS, panels.flat, strict=True):
            _draw(axes, shown, sweep, lines, index)
        for axes in panels[-1]:
            axes.set_xlabel(sweep.grid.axes[index].key)
        _legend(figure, panels.flat[0])
        return figure


def _draw(axes: Axes, shown: ShownFigure, sweep: Sweep, lines: dict[str, list[PointOutcome]], index: int) -> None:
    axis = sweep.grid.axes[index]
    values = sorted(axis.values) if axis.numeric else list(axis.values)
    place = {worded(value): float(value) if axis.numeric else float(k) for k, value in enumerate(values)}
    own_names = len(lines) <= _LINES
    everything: dict[float, list[float]] = {}
    for number, (others, points) in enumerate(lines.items()):
        found = [(place[worded(one.point.values[index])], figure) for one in points if (figure := one.figure(shown.name)) is not None]
        found.sort(key=lambda one: one[0])
        x, y = [at for at, _ in found], [figure.mean for _, figure in found]
        for at, mean in zip(x, y, strict=True):
            everything.setdefault(at, []).append(mean)
        if own_names:
            halves = [figure.half or 0.0 for _, figure in found]
            joined = "-" if axis.numeric else ":"
            axes.errorbar(
                x, y, halves, linestyle=joined, color=PALETTE[number], marker="o", markersize=3.5, capsize=2.5, label=others or None
            )
        else:
            axes.plot(x, y, color=GRID, linewidth=0.8)
    if not own_names:
        x = sorted(everything)
        means = [float(np.mean(everything[at])) for at in x]
        axes.plot(x, means, color=INK, marker="o", markersize=3.5, label=f"mean of {len(lines)} combinations")
    axes.set_title(shown.label)
    if shown.unit == "%":
        share_axis(axes)
    elif shown.unit == "s":
        axes.yaxis.set_major_formatter(FuncFormatter(tick))
    if not axis.numeric:
        axes.set_xticks(range(len(values)), [_short(worded(value)) for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)


def _legend(figure: Picture, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), fontsize=8)


def _short(words: str, most: int = 24) -> str:
    return words if len(words) <= most else f"{words[: most - 3]}..."


def _words(sweep: Sweep, values: Sequence[object]) -> str:
    return ", ".join(f"{key}={worded(value)}" for key, value in zip(sweep.grid.keys, values, strict=True))
