"""Simulated against measured, for the terminal and as one HTML page in the look of report.html."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pdlab.report.compare_figures import distributions, scatter
from pdlab.report.page import definition_list, escaped, page, table
from pdlab.report.svg import svg
from pdlab.results.comparison import ComparedFigure, Comparison, Group, Pairs
from pdlab.results.comparison_stored import Check
from pdlab.results.metrics import DEFINITIONS
from pdlab.results.units import MISSING, number, percent, seconds

INSIDE = "✓"
WORDS = {
    "error": "(simulated - measured) / measured, signed; measured is the mean of the repeats",
    "spread": "half the range of the repeats, (max - min) / 2, as a share of their mean; it takes two",
    f"{INSIDE} inside": "the error is no larger than the spread: repeats differ among themselves as much",
    "paired": "the same request in both worlds, by its id; its measured latency is the mean of the repeats",
    "decided": "pairs of policies whose measured means differ by more than the spreads (of single runs: all); only these have an order",
}
VERDICT_WORDS = {
    "better by": "the mean difference of the same requests, ± its 95 % interval over 10 stretches of arrivals (batch means); all count",
    "undecided": "the difference is within its interval",
    "paired": "the same request in both, by its id",
}


# ------------------------------------------------------------ terminal


def comparison_table(comparison: Comparison) -> RenderableType:
    """One panel a policy, and one for their order where there are several."""
    panels: list[RenderableType] = [_panel(group) for group in comparison.groups]
    if comparison.rankings:
        panels.append(ranking_table(comparison))
    if comparison.groups and comparison.groups[0].two_simulations:
        return Padding(Lines(*panels), 0)
    words = Text.assemble((f"{INSIDE} ", "green"), "error inside the spread; ", ("spread", "bold"), ": ", WORDS["spread"])
    return Padding(Lines(*panels, words), 0)  # which, other than a group, a notebook shows


def ranking_table(comparison: Comparison) -> RenderableType:
    """The policies' order in both worlds, by several figures."""
    rows = Table("", "simulated", "measured", "agree", box=box.SIMPLE_HEAD, pad_edge=False)
    for ranking in comparison.rankings:
        colour = "" if not ranking.decided else "green" if ranking.agree == ranking.decided else "red"
        words = agreement(ranking.agree, ranking.decided, ranking.pairs)
        rows.add_row(ranking.label, *map(order_words, (ranking.simulated, ranking.measured)), Text(words, colour))
    return Panel(rows, title="ranking of policies, best first", title_align="left", border_style="dim", padding=(0, 1))


def checks_table(checks: Sequence[Check]) -> RenderableType:
    """Every figure against its bar; those that miss it say so. A run and a policy are named where they begin."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    rows.add_column("run", no_wrap=True)
    rows.add_column("policy", max_width=24)
    rows.add_column("figure", no_wrap=True)
    for column in ("simulated", "measured", "error", "spread", "bar"):
        rows.add_column(column, justify="right", no_wrap=True)
    rows.add_column("", no_wrap=True)
    before = ("", "")
    for check in checks:
        run, policy = (new if (check.run, check.policy) != before else "" for new in (check.run, check.policy))
        before = (check.run, check.policy)
        spread = MISSING if math.isnan(check.spread) else f"±{check.spread * 100:,.1f} %"
        figures = (seconds(check.simulated), seconds(check.measured), signed(check.error), spread, f"{check.bound * 100:.0f} %")
        rows.add_row(run, policy, check.label, *figures, Text("" if check.holds else "missed", "red"))
    held = sum(check.holds for check in checks)
    return Padding(Lines(rows, Text(f"{held} of {len(checks)} figures are within their bar or the spread of the repeats")), 0)


def checks_markdown(checks: Sequence[Check]) -> str:
    """A row for each run and policy, a column for each figure: its error, the spread of the repeats, and in bold what was missed."""
    labels = list(dict.fromkeys(check.label for check in checks))
    rows = checks_words(checks, "**{}**{}")
    lines = [["run", "policy", *labels], ["---", "---", *("---:" for _ in labels)]]
    lines += [[*row, *(found.get(label, "") for label in labels)] for row, found in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def checks_words(checks: Sequence[Check], missed: str) -> dict[tuple[str, str], dict[str, str]]:
    """For each run and policy the error of each figure and the spread of the repeats, put into `missed` where it does not hold."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for check in checks:
        spread = "" if math.isnan(check.spread) else f" ±{check.spread:.1%}"
        words = ("{}{}" if check.holds else missed).format(f"{check.error:+.1%}", spread)
        rows.setdefault((check.run, check.policy), {})[check.label] = words
    return rows


def agreement(agree: int, decided: int, pairs: int) -> str:
    """How many pairs of policies stand in the same order."""
    if not decided:
        return "undecided, within the spread"
    undecided = f", {pairs - decided} undecided" if pairs > decided else ""
    return f"{agree} of {decided} pairs{undecided}"


def _panel(group: Group) -> Panel:
    parts: list[RenderableType] = [Text(f"• {line.words}", "bold" if line.tone else "") for line in group.verdict]
    parts += [Text.assemble(("warning  ", "bold yellow"), note) for note in group.notes]
    parts += [Text("")] if group.verdict else []
    columns = heads(group)
    figures = _rich("", *columns)
    for line in shown(group.lines):
        tone = "green" if line.inside and not group.two_simulations else ""
        figures.add_row(
            line.label, *figure_words(line)[:2], Text(signed(line.error), tone), *([_spread(line)] if "spread" in columns else [])
        )
    parts.append(figures)
    if group.instances:
        load = _rich("instance", "", *columns)
        for name, lines in group.instances:
            for k, line in enumerate(shown(lines)):
                load.add_row("" if k else name, line.label, *figure_words(line)[: len(columns)])
        parts += [Text(""), load]
    pairs = _rich("paired", "requests", f"median {_apart(group)[0]}", "median size", "rank correlation")
    for pair in group.pairs:
        pairs.add_row(pair.label, *pair_words(pair))
    parts += [Text(""), pairs]
    return Panel(Lines(*parts), title=Text(_title(group)), title_align="left", border_style="dim", padding=(0, 1))


def _rich(*columns: str) -> Table:
    found = Table(box=None, pad_edge=False, header_style="bold")
    for k, column in enumerate(columns):
        found.add_column(column, justify="left" if k == 0 or not column else "right", no_wrap=True)
    return found


# ------------------------------------------------------------ page


def comparison_page(comparison: Comparison) -> str:
    """All of it, with the distributions over each other and every pair of requests as a dot."""
    if comparison.groups and comparison.groups[0].two_simulations:
        return _page_of_two(comparison.groups[0])
    body = ["<h1>Simulated against measured</h1>", f"<p class=soft>{INSIDE}: the error is inside the spread of the repeats</p>"]
    if comparison.rankings:
        rows = [
            [r.label, agreement(r.agree, r.decided, r.pairs), order_words(r.simulated), order_words(r.measured)]
            for r in comparison.rankings
        ]
        marks = [[False, r.agree == r.decided > 0, False, False] for r in comparison.rankings]
        body += ["<h2>Ranking of policies, best first</h2>", table(["", "same order", "simulated", "measured"], rows, text=4, marks=marks)]
    for k, group in enumerate(comparison.groups):
        body += _section(k, group)
    body += ["<h2>What the words mean</h2>", definition_list([*DEFINITIONS.items(), *WORDS.items()])]
    return page("simulated against measured", body)


def _page_of_two(group: Group) -> str:
    """Two simulations: the verdict first."""
    title = _title(group)
    lines = "<br>".join(f"<b>{escaped(line.words)}</b>" if line.tone else escaped(line.words) for line in group.verdict)
    body = [f"<h1>{escaped(title)}</h1>", f'<p class="verdict good">{lines}</p>', *_section(0, group)]
    words = [
        *DEFINITIONS.items(),
        ("difference", f"({group.sides[0]} - {group.sides[1]}) / {group.sides[1]}, signed"),
        *VERDICT_WORDS.items(),
    ]
    return page(title, [*body, "<h2>What the words mean</h2>", definition_list(words)])


def heads(group: Group) -> list[str]:
    """Of the columns: both sides, how far they are apart, and where runs are repeated their spread."""
    return [*group.sides, "difference"] if group.two_simulations else [*group.sides, "error", "spread"]


def _section(k: int, group: Group) -> list[str]:
    lines, columns = shown(group.lines), heads(group)
    figures = [[line.label, *figure_words(line)[: len(columns)]] for line in lines]
    both = " and ".join(group.sides)
    found = [
        *([] if group.two_simulations else [f"<h2>{escaped(_title(group))}</h2>"]),
        *(f"<p class=warning>{escaped(note)}</p>" for note in group.notes),
        table(["", *columns], figures, marks=None if group.two_simulations else _marks(lines, 3)),
        svg(distributions(group), f"distributions-{k}", f"Distributions, {both}"),
        "<h2>The same requests in both</h2>" if group.two_simulations else "<h2>The same requests in both worlds</h2>",
        table(
            ["", "requests", *(f"median {what}" for what in _apart(group)), "rank correlation"],
            [[pair.label, *pair_words(pair)] for pair in group.pairs],
        ),
        svg(scatter(group), f"scatter-{k}", f"Each request's latencies, {group.sides[1]} against {group.sides[0]}"),
    ]
    if group.instances:
        load = [(name, line) for name, own in group.instances for line in shown(own)]
        rows = [[name, line.label, *figure_words(line)[: len(columns)]] for name, line in load]
        marks = None if group.two_simulations else _marks([line for _, line in load], 4)
        found += ["<h2>Load of the instances</h2>", table(["instance", "", *columns], rows, text=2, marks=marks)]
    return found


def _apart(group: Group) -> tuple[str, str]:
    return ("difference", "size of differences") if group.two_simulations else ("error", "size of errors")


def _marks(lines: Sequence[ComparedFigure], column: int) -> list[list[bool]]:
    return [[line.inside and k == column for k in range(column + 2)] for line in lines]


# ------------------------------------------------------------ words


def signed(error: float) -> str:
    """+12.3 %, -0.4 %."""
    return MISSING if math.isnan(error) else f"{round(error * 100, 1) + 0.0:+,.1f} %"


def shown(lines: Sequence[ComparedFigure]) -> list[ComparedFigure]:
    """Without those that neither world has."""
    return [line for line in lines if not (math.isnan(line.simulated) and math.isnan(line.mean))]


def figure_words(line: ComparedFigure) -> list[str]:
    """Simulated, measured, error, spread."""
    word = _wording(line.key)
    return [word(line.simulated), word(line.mean), signed(line.error), _spread(line)]


def _spread(line: ComparedFigure) -> str:
    if math.isnan(line.spread):
        return MISSING
    return f"±{line.spread * 100:,.1f} %" + (f" {INSIDE}" if line.inside else "")


def pair_words(pair: Pairs) -> list[str]:
    """Requests, median error, median size of errors, rank correlation."""
    correlation = MISSING if math.isnan(pair.correlation) else f"{pair.correlation:.2f}"
    return [f"{pair.simulated.size:,}", signed(pair.bias), MISSING if math.isnan(pair.typical) else percent(pair.typical), correlation]


def _wording(key: str) -> Callable[[float | None], str]:
    if "." in key:  # a point of a latency
        return seconds
    return percent if key.endswith(("attainment", "hit_rate", "fraction")) else number


def _title(group: Group) -> str:
    if group.two_simulations:
        return group.policy
    sims, runs = len(group.simulated), len(group.measured)
    simulated = "one simulation" if sims == 1 else f"the mean of {sims} simulations"
    return f"{group.policy}: {simulated}, {runs} measured run{'s' if runs > 1 else ''}"


def order_words(policies: Sequence[str]) -> str:
    """The best first."""
    return " > ".join(policies)
