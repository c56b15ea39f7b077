"""Simulated against measured, for the terminal and as one HTML page in the look of report.html."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich import box
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pdlab.compare import Comparison, Group, Line, Pairs
from pdlab.gaps import Gaps
from pdlab.metrics import DEFINITIONS
from pdlab.records import Column
from pdlab.report.figures import GRID, INK, PALETTE, STYLE, Picture, _completed, _curve, _picture, _share_axis, _tick, _time_axis
from pdlab.report.html import _definition_list, _page, _svg, _table, _text
from pdlab.report.units import MISSING, number, percent, seconds

SIMULATED, MEASURED = PALETTE[1], PALETTE[0]
INSIDE = "✓"
_DOTS = 3000  # of a scatter
WORDS = {
    "error": "(simulated - measured) / measured, signed; measured is the mean of the repeats",
    "spread": "half the range of the repeats, (max - min) / 2, as a share of their mean; it takes two",
    f"{INSIDE} inside": "the error is no larger than the spread: repeats differ among themselves as much",
    "paired": "the same request in both worlds, by its id; its measured latency is the mean of the repeats",
    "decided": "pairs of policies whose measured means differ by more than the spreads (of single runs: all); only these have an order",
}


# ------------------------------------------------------------ terminal


def comparison_table(comparison: Comparison) -> RenderableType:
    """One panel a policy, and one for their order where there are several."""
    panels: list[RenderableType] = [_panel(group) for group in comparison.groups]
    if comparison.rankings:
        table = Table("", "simulated", "measured", "agree", box=box.SIMPLE_HEAD, pad_edge=False)
        for ranking in comparison.rankings:
            colour = "" if not ranking.decided else "green" if ranking.agree == ranking.decided else "red"
            words = agreement(ranking.agree, ranking.decided, ranking.pairs)
            table.add_row(ranking.label, *map(_order, (ranking.simulated, ranking.measured)), Text(words, colour))
        panels.append(Panel(table, title="ranking of policies, best first", title_align="left", border_style="dim", padding=(0, 1)))
    return Lines(*panels, Text.assemble((f"{INSIDE} ", "green"), "error inside the spread; ", ("spread", "bold"), ": ", WORDS["spread"]))


def agreement(agree: int, decided: int, pairs: int) -> str:
    """How many pairs of policies stand in the same order."""
    if not decided:
        return "undecided, within the spread"
    undecided = f", {pairs - decided} undecided" if pairs > decided else ""
    return f"{agree} of {decided} pairs{undecided}"


def _panel(group: Group) -> Panel:
    parts: list[RenderableType] = [Text.assemble(("warning  ", "bold yellow"), note) for note in group.notes]
    table = _rich("", "simulated", "measured", "error", "spread")
    for line in _shown(group.lines):
        table.add_row(line.label, *_cells(line)[:2], Text(signed(line.error), "green" if line.inside else ""), _spread(line))
    parts.append(table)
    if group.instances:
        load = _rich("instance", "", "simulated", "measured", "error", "spread")
        for name, lines in group.instances:
            for k, line in enumerate(_shown(lines)):
                load.add_row("" if k else name, line.label, *_cells(line))
        parts += [Text(""), load]
    pairs = _rich("paired", "requests", "median error", "median size", "rank correlation")
    for pair in group.pairs:
        pairs.add_row(pair.label, *_pair_cells(pair))
    parts += [Text(""), pairs]
    return Panel(Lines(*parts), title=Text(_title(group)), title_align="left", border_style="dim", padding=(0, 1))


def _rich(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k == 0 or not column else "right", no_wrap=True)
    return table


# ------------------------------------------------------------ page


def comparison_page(comparison: Comparison) -> str:
    """All of it, with the distributions over each other and every pair of requests as a dot."""
    body = ["<h1>Simulated against measured</h1>", f"<p class=soft>{INSIDE}: the error is inside the spread of the repeats</p>"]
    if comparison.rankings:
        rows = [[r.label, _order(r.simulated), _order(r.measured), agreement(r.agree, r.decided, r.pairs)] for r in comparison.rankings]
        marks = [[False, False, False, r.agree == r.decided > 0] for r in comparison.rankings]
        body += ["<h2>Ranking of policies, best first</h2>", _table(["", "simulated", "measured", "same order"], rows, text=3, marks=marks)]
    for k, group in enumerate(comparison.groups):
        body += _section(k, group)
    body += ["<h2>What the words mean</h2>", _definition_list([*DEFINITIONS.items(), *WORDS.items()])]
    return _page("simulated against measured", body)


def _section(k: int, group: Group) -> list[str]:
    lines = _shown(group.lines)
    found = [
        f"<h2>{_text(_title(group))}</h2>",
        *(f"<p class=warning>{_text(note)}</p>" for note in group.notes),
        _table(["", "simulated", "measured", "error", "spread"], [[line.label, *_cells(line)] for line in lines], marks=_marks(lines, 3)),
        _svg(distributions(group), f"distributions-{k}", "Distributions, simulated and measured"),
        "<h2>The same requests in both worlds</h2>",
        _table(
            ["", "requests", "median error", "median size of errors", "rank correlation"],
            [[pair.label, *_pair_cells(pair)] for pair in group.pairs],
        ),
        _svg(scatter(group), f"scatter-{k}", "Each request's latencies, measured against simulated"),
    ]
    if group.instances:
        load = [(name, line) for name, own in group.instances for line in _shown(own)]
        rows = [[name, line.label, *_cells(line)] for name, line in load]
        head = ["instance", "", "simulated", "measured", "error", "spread"]
        found += ["<h2>Load of the instances</h2>", _table(head, rows, text=2, marks=_marks([line for _, line in load], 4))]
    return found


def _marks(lines: Sequence[Line], column: int) -> list[list[bool]]:
    return [[line.inside and k == column for k in range(column + 2)] for line in lines]


# ------------------------------------------------------------ words


def signed(error: float) -> str:
    """+12.3 %, -0.4 %."""
    return MISSING if math.isnan(error) else f"{round(error * 100, 1) + 0.0:+,.1f} %"


def _shown(lines: Sequence[Line]) -> list[Line]:
    """Without those that neither world has."""
    return [line for line in lines if not (math.isnan(line.simulated) and math.isnan(line.mean))]


def _cells(line: Line) -> list[str]:
    word = _wording(line.key)
    return [word(line.simulated), word(line.mean), signed(line.error), _spread(line)]


def _spread(line: Line) -> str:
    if math.isnan(line.spread):
        return MISSING
    return f"±{line.spread * 100:,.1f} %" + (f" {INSIDE}" if line.inside else "")


def _pair_cells(pair: Pairs) -> list[str]:
    correlation = MISSING if math.isnan(pair.correlation) else f"{pair.correlation:.2f}"
    return [f"{pair.simulated.size:,}", signed(pair.bias), MISSING if math.isnan(pair.typical) else percent(pair.typical), correlation]


def _wording(key: str) -> Callable[[float | None], str]:
    if "." in key:  # a point of a latency
        return seconds
    return percent if key.endswith(("attainment", "hit_rate", "fraction")) else number


def _title(group: Group) -> str:
    runs = len(group.measured)
    return f"{group.policy}: one simulation, {runs} measured run{'s' if runs > 1 else ''}"


def _order(policies: Sequence[str]) -> str:
    return " > ".join(policies)


# ------------------------------------------------------------ pictures


def distributions(group: Group) -> Picture:
    """TTFT, TPOT, ITL and E2E: the share within, of the simulation and of each measured run."""
    with mpl.rc_context(STYLE):
        figure = _picture(9.6, 5.6)
        grid = figure.subplots(2, 2)
        runs = [*((run, MEASURED, "measured") for run in group.measured), (group.simulated, SIMULATED, "simulated")]
        for axes, (name, key) in zip(grid.flat, (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("ITL", ""), ("E2E", "e2e_s")), strict=True):
            for run, colour, label in runs:
                x, y = _gap_curve(run.gaps) if not key else _curve_of(_completed(run.records, key))
                many = label == "measured" and len(group.measured) > 1
                axes.plot(x, y, color=colour, label=label, linewidth=1.1 if many else 1.8, alpha=0.7 if many else 1.0)
            axes.set_title(f"{name}: share within")
            if axes.dataLim.width > 0:
                _time_axis(axes)
            _share_axis(axes)
        handles = dict(zip(*reversed(grid[0][0].get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
        return figure


def scatter(group: Group) -> Picture:
    """One dot a request: measured across, simulated up. On the line the simulation is right."""
    with mpl.rc_context(STYLE):
        figure = _picture(9.6, 3.5)
        for axes, pair in zip(figure.subplots(1, 3), group.pairs, strict=True):
            axes.set_title(pair.label)
            held = (pair.simulated > 0) & (pair.measured > 0)
            x, y = pair.measured[held], pair.simulated[held]
            step = -(-x.size // _DOTS) or 1
            if x.size:
                _square(axes, float(min(x.min(), y.min())) / 1.3, float(max(x.max(), y.max())) * 1.3)
                axes.plot(x[::step], y[::step], ".", color=SIMULATED, markersize=4, alpha=0.6, markeredgewidth=0)
            axes.set_xlabel("measured")
            axes.set_ylabel("simulated")
        return figure


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
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.2 else (1, 3) if decades < 2 else (1,), numticks=8))
        axis.set_major_formatter(FuncFormatter(_tick))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, which="major", color=GRID)


def _curve_of(values: Column) -> tuple[Column, Column]:
    return _curve(np.maximum(values, 1e-6)) if values.size else (values, values)


def _gap_curve(gaps: Gaps) -> tuple[Column, Column]:
    edges, counts = gaps.histogram()
    return np.maximum(edges, 1e-6), np.cumsum(counts) / max(counts.sum(), 1.0)
