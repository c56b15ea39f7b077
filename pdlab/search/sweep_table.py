"""A sweep in figures: which are shown, how they are worded, and the terminal's table of its points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pdlab.report.tables import BEST
from pdlab.results.statistics import MeanInterval
from pdlab.results.units import MISSING, interval_words
from pdlab.search.grid import worded
from pdlab.search.sweep import PointOutcome, Sweep

MOST_POINTS = 60  # in the terminal


@dataclass(frozen=True, slots=True)
class ShownFigure:
    """`name` is its path in a summary; `unit` is s, % or empty; `better` is 1 where more is better, else -1."""

    name: str
    label: str
    unit: str
    better: int

    def word(self, found: MeanInterval | None) -> str:
        """85.0 ±1.2 ms."""
        return MISSING if found is None else interval_words(found, self.unit)


SHOWN = (
    ShownFigure("slo_attainment", "attained", "%", 1),
    ShownFigure("goodput_rps", "goodput req/s", "", 1),
    ShownFigure("ttft_s.p50", "TTFT p50", "s", -1),
    ShownFigure("ttft_s.p99", "TTFT p99", "s", -1),
    ShownFigure("tpot_s.p50", "TPOT p50", "s", -1),
    ShownFigure("tpot_s.p99", "TPOT p99", "s", -1),
)


def point_cells(outcome: PointOutcome) -> list[str]:
    """The values of its axes, what makes its figures doubtful, and these."""
    return [
        *(worded(value) for value in outcome.point.values),
        ", ".join(outcome.marks),
        *(shown.word(outcome.figure(shown.name)) for shown in SHOWN),
    ]


def heads(sweep: Sweep) -> list[str]:
    """The axes by the ends of their paths, where these differ."""
    ends = [key.rpartition(".")[2] for key in sweep.grid.keys]
    return [*(ends if len(set(ends)) == len(ends) else sweep.grid.keys), "", *(shown.label for shown in SHOWN)]


def best_cells(outcomes: Sequence[PointOutcome]) -> list[list[bool]]:
    """Which cells are the best of their column by more than chance: the difference to each other point is outside its interval."""
    marks = [[False] * len(point_cells(outcome)) for outcome in outcomes]
    for column, shown in enumerate(SHOWN, -len(SHOWN)):
        ranked = [
            (shown.better * figure.mean, index) for index, one in enumerate(outcomes) if (figure := one.figure(shown.name)) is not None
        ]
        if len(ranked) < 2:
            continue
        _, best = max(ranked)
        if all(_better(outcomes[best], outcomes[index], shown) for _, index in ranked if index != best):
            marks[best][column] = True
    return marks


def _better(one: PointOutcome, other: PointOutcome, shown: ShownFigure) -> bool:
    found = one.difference(other, shown.name)
    return found is not None and found.half is not None and shown.better * found.mean > found.half


def sweep_table(sweep: Sweep, outcomes: Sequence[PointOutcome], title: str) -> RenderableType:
    """A line a point, up to a screenful."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    axes = len(sweep.grid.axes)
    for index, head in enumerate(heads(sweep)):
        words = index < axes or not head
        table.add_column(head, justify="left" if words else "right", style="bold" if index < axes else "", overflow="fold")
    marks = best_cells(outcomes)
    for outcome, best in zip(outcomes[:MOST_POINTS], marks, strict=False):
        cells = point_cells(outcome)
        table.add_row(*(Text(f"{cell} {BEST}", "bold green") if star else Text(cell) for cell, star in zip(cells, best, strict=True)))
    notes = [Text(note, "dim") for note in _notes(sweep, outcomes, marks)]
    return Panel(Group(table, *notes), title=title, title_align="left", border_style="dim", padding=(0, 1))


def _notes(sweep: Sweep, outcomes: Sequence[PointOutcome], marks: Sequence[Sequence[bool]]) -> list[str]:
    said = []
    if len(sweep.seeds) > 1:
        said.append(f"mean ± 95 % interval over {len(sweep.seeds)} seeds")
    if any(map(any, marks)):
        said.append(f"{BEST} best of its column: the difference to each other point, seed by seed, is outside its interval")
    if len(outcomes) > MOST_POINTS:
        said.append(f"{len(outcomes) - MOST_POINTS:,} more points are in the page")
    return said
