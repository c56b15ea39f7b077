"""What a tuning has come to, in words: the terminal's table, the verdict, and the head of the YAML that is to be run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pdlab.results.statistics import MeanInterval
from pdlab.search.grid import worded
from pdlab.search.stretches import SHARES
from pdlab.search.sweep_table import ShownFigure
from pdlab.search.tune import JudgedFigure, Judgement, TunePlan
from pdlab.search.tune_study import TuneStudy

_STYLES = {"better": "bold green", "worse": "bold red", "undecided": "dim"}


def judged_table(plan: TunePlan, judgements: Sequence[Judgement], title: str) -> RenderableType:
    """A column each for the untuned and who was judged: the values, then the judge's figures."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("untuned", justify="right")
    for one in judgements:
        table.add_column(f"trial {one.trial.number}" if len(judgements) > 1 else "tuned", justify="right")
    for parameter in plan.space.parameters:
        name = parameter.name
        table.add_row(name, _value(plan.untuned[name]), *(_value(one.trial.parameters[name]) for one in judgements))
    for index, objective in enumerate(plan.objectives):
        figures = [one.figures[index] for one in judgements]
        table.add_row(objective.name, _shown(figures[0], figures[0].untuned), *(_shown(one, one.tuned) for one in figures))
        table.add_row("  difference", "", *(Text(difference(one), _STYLES[one.verdict]) for one in figures))
        table.add_row("", "", *(Text(one.verdict, _STYLES[one.verdict]) for one in figures))
    return Panel(table, title=title, title_align="left", border_style="dim", padding=(0, 1))


def difference(figure: JudgedFigure) -> str:
    """+8.1 ±1.2 %."""
    return f"{'+' if figure.difference.mean > 0 else ''}{_shown(figure, figure.difference)}"


def best_line(plan: TunePlan, judgements: Sequence[Judgement]) -> str:
    """The verdict in one sentence."""
    on = f"on {plan.cases.worded()}"
    if not judgements:
        return "nothing better than the untuned was found: keep it"
    if len(judgements) > 1:
        better = sum(one.verdict == "better" for one in judgements)
        return f"{better} of {len(judgements)} of the front are better than the untuned, and worse in nothing, {on}"
    (one,) = judgements
    if one.verdict == "better":
        return f"better than the untuned {on}"
    if one.verdict == "worse":
        return f"worse than the untuned {on}: what was best in tuning was so by chance; keep the untuned"
    return f"not shown to be better than the untuned {on}: {one.verdict}"


def lines_of(plan: TunePlan, study: TuneStudy) -> list[str]:
    counts = study.counts
    parts = [f"{counts.over:,} trials", f"{counts.pruned:,} pruned"] + [f"{counts.failed:,} failed"] * bool(counts.failed)
    lines = [f"study    {study.name} in {study.url}: {', '.join(parts)}"]
    if counts.failed:
        lines.append(f"the last that failed: {study.failure}")
    return lines


def _shown(figure: JudgedFigure, value: MeanInterval) -> str:
    name = figure.objective.name
    return ShownFigure(name, name, "%" if name in SHARES else "s" if "_s." in name else "", figure.objective.better).word(value)


def _value(value: Any) -> str:
    return worded(value)
