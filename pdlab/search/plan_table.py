"""A plan in the terminal: the verdict, the ranked table, what hangs on the costs, what was left out, and what to run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pdlab.report.tables import BEST
from pdlab.search.plan import Plan
from pdlab.search.plan_rows import COLUMNS, PlanRow, comfort_words, notes, sensitivity, verdict

SAME = ("per GPU", "GPUs", "$/h")  # columns that are left out where all rows have the same


def plan_table(plan: Plan, found: Sequence[PlanRow]) -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", justify="right")
    cells = [row.cells for row in found]
    shown = [k for k, head in enumerate(COLUMNS) if head not in SAME or len({row[k] for row in cells}) > 1]
    for index in shown:
        words = index in (0, len(COLUMNS) - 1)
        table.add_column(COLUMNS[index], justify="left" if words else "right", no_wrap=not words)
    for row, own in zip(found, cells, strict=True):
        best = row.rank == 1 or row.tied
        styled = [Text(own[k], "bold green" if best and k == 1 else "bold" if k == 0 else "") for k in shown]
        table.add_row(f"{row.rank}{BEST if best else ''}", *styled)
    parts: list[RenderableType] = [Text(verdict(plan, list(found)), "bold"), Text(""), table, Text("")]
    seeds = len(plan.seeds)
    parts.append(Text(f"capacity: mean{f' ± 95 % interval over {seeds} seeds' if seeds > 1 else ', one seed'}; {comfort_words()}", "dim"))
    if any(row.tied for row in found[1:]):
        parts.append(Text(f"{BEST} not told apart from the best: the difference, seed by seed, is within its interval", "dim"))
    parts += [Text(f"{name}  {words}", "dim") for name, words in sensitivity(list(found))]
    parts += [Text(line, "dim") for line in notes(plan)]
    return Panel(Group(*parts), title=f"{plan.base.name}: {plan.question.words}", title_align="left", border_style="dim", padding=(0, 1))
