"""The tables of the terminal as pandas frames, worded alike, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from pdlab.report.compare import agreement, checks_words, figure_words, order_words, pair_words, shown
from pdlab.report.seeded import BINDS, SeededRuns, compared
from pdlab.report.tables import BEST, Summary
from pdlab.results.comparison import ComparedFigure, Comparison, Group
from pdlab.results.comparison_stored import Check
from pdlab.results.units import MISSING

FIGURES = ["simulated", "measured", "error", "spread"]


def runs_frame(results: Sequence[tuple[str, Summary]]) -> pd.DataFrame:
    """A column each name; summaries of one name are its seeds, and of several a star marks what is the best of its row by more than chance.
    Last, the bottlenecks."""
    runs = SeededRuns.of(results)
    rows = {
        row.label.strip(): [f"{words} {BEST}" if k == row.best else words for k, words in enumerate(row.words)] for row in compared(runs)
    }
    rows["bottleneck"] = [run.share_words(BINDS) for run in runs]
    return pd.DataFrame.from_dict(rows, orient="index", columns=[run.name for run in runs])


def bottlenecks(results: Sequence[tuple[str, Summary]]) -> str:
    """A line each run, with the evidence."""
    return "\n".join(f"{name}: {summary['bottleneck']['resource']}, {summary['bottleneck']['evidence']}" for name, summary in results)


def checks_frame(checks: Sequence[Check]) -> pd.DataFrame:
    """A row for each run and policy, a column for each figure: its error and the spread of the repeats; "missed" where it is not within its
    bar or the spread."""
    rows = checks_words(checks, "{}{} missed")
    return pd.DataFrame(list(rows.values()), index=pd.MultiIndex.from_tuples(rows, names=["run", "policy"])).fillna("")


def figures_frame(comparison: Comparison) -> pd.DataFrame:
    """Every figure that both worlds report, side by side for each policy."""
    frames = {group.policy: _figures(shown(group.lines)) for group in comparison.groups}
    return pd.concat(frames, axis=1).fillna(MISSING)


def instances_frame(group: Group) -> pd.DataFrame:
    """What each instance did."""
    return pd.concat({name: _figures(shown(lines)) for name, lines in group.instances}, names=["instance", ""])


def pairs_frame(group: Group) -> pd.DataFrame:
    """The same requests in both worlds."""
    head = ["requests", "median error", "median size of errors", "rank correlation"]
    return pd.DataFrame.from_dict({pair.label: pair_words(pair) for pair in group.pairs}, orient="index", columns=head)


def ranking_frame(comparison: Comparison) -> pd.DataFrame:
    """The policies' order in both worlds, best first, by several figures."""
    rows = {
        r.label: [order_words(r.simulated), order_words(r.measured), agreement(r.agree, r.decided, r.pairs)] for r in comparison.rankings
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["simulated", "measured", "same order"])


def _figures(lines: Iterable[ComparedFigure]) -> pd.DataFrame:
    return pd.DataFrame.from_dict({line.label: figure_words(line) for line in lines}, orient="index", columns=FIGURES)
