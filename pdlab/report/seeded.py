"""Several experiments side by side, each simulated with one seed or several: what differs by more than chance, and what does not.

A figure is the mean over seeds, ± the 95 % interval of Student's t. Two are compared seed by seed: the arrivals and lengths that
a seed gives to both cancel out (common random numbers). A star needs a difference to each other experiment that lies outside its interval;
where there is none the row is undecided. One seed tells nothing of chance, and gets no star.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import isclose
from typing import Self

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from pdlab.report.tables import BEST, Summary, plain_table
from pdlab.results.metrics import SPREADS, Scalar, flat_figures
from pdlab.results.statistics import MeanInterval, mean_interval, paired_difference
from pdlab.results.units import MISSING, interval_words, number, percent, seconds, size

UNDECIDED, WORSE, WITHIN = "undecided", "▼", "≈"
ALIKE = 1e-9  # of a figure: a difference as small is that of sums in another order
SEVERAL = "--seeds 5"
MOST_PAIRS = 10  # that are told one by one


@dataclass(frozen=True, slots=True)
class SeededRuns:
    """An experiment's runs: the single figures of each summary, by seed."""

    name: str
    by_seed: Mapping[int, Mapping[str, Scalar]]
    rests_on: tuple[str, ...] = ()

    @classmethod
    def of(cls, results: Sequence[tuple[str, Summary]]) -> list[Self]:
        """Of named summaries; those of one name are its seeds."""
        grouped: dict[str, dict[int, Mapping[str, Scalar]]] = {}
        for name, summary in results:
            runs = grouped.setdefault(name, {})
            seed = int(summary["run"].get("seed") or 0)
            runs[seed if seed not in runs else len(runs)] = flat_figures(summary)
        return [cls(name, runs) for name, runs in grouped.items()]

    def values(self, path: str) -> dict[int, float]:
        """By seed, where there is one."""
        return {seed: float(value) for seed, figures in self.by_seed.items() if isinstance(value := figures.get(path), int | float)}

    def figure(self, path: str) -> MeanInterval | None:
        return mean_interval(list(self.values(path).values()))

    def less(self, other: SeededRuns, path: str) -> MeanInterval | None:
        """This one's figure less the other's, over the seeds of both."""
        return paired_difference(self.values(path), other.values(path))

    def counted(self, path: str) -> list[tuple[str, int]]:
        """The texts of a figure, and how many seeds have each."""
        return Counter(str(value) for figures in self.by_seed.values() if (value := figures.get(path)) is not None).most_common()

    def share_words(self, path: str) -> str:
        """prefill compute 4/5, none 1/5; without the shares where all seeds say the same."""
        counts = self.counted(path)
        if len(counts) == 1 and counts[0][1] == len(self.by_seed):
            return counts[0][0]
        return ", ".join(f"{text} {times}/{len(self.by_seed)}" for text, times in counts)

    def most_words(self, path: str) -> str:
        """What most seeds say: prefill compute 4/5."""
        return self.share_words(path).partition(",")[0]


@dataclass(frozen=True, slots=True)
class TableRow:
    """One line of a comparison: the figure's path in a summary, its unit (%, s, B or none), and which direction is better (0: neither)."""

    label: str
    path: str
    unit: str
    better: int

    def word(self, found: MeanInterval | None) -> str:
        if found is None:
            return MISSING
        if found.half is None:
            words: dict[str, Callable[[float | None], str]] = {"%": percent, "s": seconds, "B": size}
            return words.get(self.unit, number)(found.mean)
        return size(found.mean) if self.unit == "B" else interval_words(found, self.unit)


ROWS = (
    TableRow("SLO attainment", "slo_attainment", "%", 1),
    TableRow("goodput, req/s", "goodput_rps", "", 1),
    TableRow("  per accelerator", "goodput_rps_per_accelerator", "", 1),
    TableRow("throughput, req/s", "throughput_rps", "", 1),
    TableRow("output tokens/s", "output_tokens_per_s", "", 1),
    *(TableRow(f"{label} {point}", f"{key}.{point}", "s", -1) for label, key in SPREADS[:5] for point in ("mean", "p50", "p90", "p99")),
    TableRow("failed", "failed", "", -1),
    TableRow("rejected", "rejected", "", -1),
    TableRow("prefix hits", "prefix_hit_rate", "%", 1),
    TableRow("KV moved", "transfer_bytes", "B", 0),
    TableRow("preemptions", "preemptions", "", -1),
)
MAIN = ROWS[:2]
BINDS, BEFORE_BINDS = "bottleneck.resource", [row.label for row in ROWS[:3]]


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """The words of each run's cell, which of them is better than all others by more than chance, and whether nobody can tell."""

    label: str
    words: list[str]
    best: int | None = None
    undecided: bool = False
    marks: list[str] = field(default_factory=list)  # against a baseline


def compared(runs: Sequence[SeededRuns], baseline: str | None = None) -> list[ComparedRow]:
    """Every row in which any of them has a figure. With a `baseline`, each other is marked by how it differs from that one."""
    rows = []
    for row in ROWS:
        found = [run.figure(row.path) for run in runs]
        if all(figure is None for figure in found) or (row.path in ("failed", "rejected") and not any(f.mean for f in found if f)):
            continue
        words = [row.word(figure) for figure in found]
        if baseline is not None:
            rows.append(ComparedRow(row.label, words, marks=[_against(run, runs, baseline, row) for run in runs]))
            continue
        best = _best(runs, row)
        several = len(runs) > 1 and row.better != 0 and any(len(run.by_seed) > 1 for run in runs)
        rows.append(ComparedRow(row.label, words, best, several and best is None and _differ(runs, row)))
    return rows


def _best(runs: Sequence[SeededRuns], row: TableRow) -> int | None:
    """Whose figure is better than each other's by more than chance."""
    ranked = [(row.better * figure.mean, k) for k, run in enumerate(runs) if (figure := run.figure(row.path)) is not None]
    if len(ranked) < 2 or not row.better:
        return None
    _, best = max(ranked)
    return best if all(decided(runs[best], runs[k], row) > 0 for _, k in ranked if k != best) else None


def decided(one: SeededRuns, other: SeededRuns, row: TableRow) -> int:
    """1 where `one` is better by more than chance, -1 where it is worse, 0 where nobody can tell."""
    found = one.less(other, row.path)
    if found is None or found.half is None or not abs(found.mean) > found.half:
        return 0
    if abs(found.mean) <= ALIKE * max(map(abs, one.values(row.path).values()), default=0.0):
        return 0
    return 1 if found.mean * row.better > 0 else -1


def _differ(runs: Sequence[SeededRuns], row: TableRow) -> bool:
    return any(not _alike(run, runs[0], row.path) for run in runs)


def _alike(one: SeededRuns, other: SeededRuns, path: str) -> bool:
    own, its = one.values(path), other.values(path)
    return own.keys() == its.keys() and all(isclose(own[seed], its[seed], rel_tol=ALIKE) for seed in own)


def _against(run: SeededRuns, runs: Sequence[SeededRuns], baseline: str, row: TableRow) -> str:
    """+2.1 ±0.6 % ★"""
    base = next(other for other in runs if other.name == baseline)
    difference = run.less(base, row.path)
    if run is base or difference is None or _alike(run, base, row.path):
        return ""
    sign = "+" if difference.mean > 0 else ""
    words = f"{sign}{row.word(difference)}"
    if not row.better:
        return words
    verdict = {1: BEST, -1: WORSE, 0: WITHIN}[decided(run, base, row)]
    return f"{words} {verdict}"


# ------------------------------------------------------------ words


def pair_lines(runs: Sequence[SeededRuns]) -> list[str]:
    """Each two of several, by attainment and goodput: SLO attainment: fast over slow by 2.1 ±0.6 %; fast and turns undecided."""
    if len(runs) < 2 or len(runs) * (len(runs) - 1) // 2 > MOST_PAIRS or all(len(run.by_seed) < 2 for run in runs):
        return []
    return [f"{row.label}: {'; '.join(_pair_words(one, other, row) for one, other in combinations(runs, 2))}" for row in MAIN]


def _pair_words(one: SeededRuns, other: SeededRuns, row: TableRow) -> str:
    verdict = decided(one, other, row)
    if _alike(one, other, row.path):
        return f"{one.name} and {other.name} alike"
    if not verdict:
        return f"{one.name} and {other.name} {UNDECIDED}"
    first, second = (one, other) if verdict > 0 else (other, one)
    return f"{first.name} over {second.name} by {row.word(_size(first.less(second, row.path)))}"


def _size(found: MeanInterval | None) -> MeanInterval | None:
    return None if found is None else MeanInterval(abs(found.mean), found.half)


def overload_words(run: SeededRuns) -> str:
    """overloaded, overloaded 2/5, or nothing."""
    times = sum(bool(figures.get("overloaded")) for figures in run.by_seed.values())
    return "" if not times else "overloaded" if times == len(run.by_seed) else f"overloaded {times}/{len(run.by_seed)}"


def notes(runs: Sequence[SeededRuns], rows: Sequence[ComparedRow], baseline: str | None) -> list[str]:
    """What the marks mean."""
    seeds = max((len(run.by_seed) for run in runs), default=0)
    said = []
    if seeds > 1:
        said.append(f"mean ± 95 % interval over {seeds} seeds")
    if baseline is not None:
        said.append(
            f"beside it the difference to {baseline}, seed by seed: {BEST} better, {WORSE} worse, {WITHIN} {UNDECIDED}: within its interval"
        )
    elif any(row.best is not None for row in rows):
        said.append(f"{BEST} best of its row: the difference to each other, seed by seed, is outside its interval")
    if len(runs) > 1 and seeds < 2:
        said.append(f"one seed tells nothing of chance: with {SEVERAL} a star marks what is better by more")
    return said


def comparison(runs: Sequence[SeededRuns], baseline: str | None = None, title: str = "comparison") -> RenderableType:
    """One column a run; overload first, what binds beside attainment and goodput, then latencies; below, each two of them."""
    rows = compared(runs, baseline)
    undecided = any(row.undecided for row in rows)
    table = plain_table("", *(run.name for run in runs), *([""] if undecided else []))
    if any(over := [overload_words(run) for run in runs]):
        table.add_row(
            "overloaded", *(Text(words.removeprefix("overloaded ") if words else "no", "bold red" if words else "") for words in over)
        )
    main = [row.label for row in rows if row.label in BEFORE_BINDS]
    for row in rows:
        cells = [_cell(row, k) for k in range(len(runs))]
        table.add_row(row.label, *cells, *([Text(UNDECIDED if row.undecided else "", "dim")] if undecided else []))
        if main and row.label == main[-1]:
            table.add_row("binds", *(run.most_words(BINDS) for run in runs))
    lines = [Text(line) for line in pair_lines(runs)] if baseline is None else []
    basis = [Text.assemble(("rests on  ", "bold"), (line, "dim")) for line in dict.fromkeys(x for run in runs for x in run.rests_on)]
    said = [Text(note, "dim") for note in notes(runs, rows, baseline)]
    return Panel(Group(*basis, table, *lines, *said), title=title, title_align="left", border_style="dim", padding=(0, 1))


def _cell(row: ComparedRow, k: int) -> Text:
    if row.marks:
        mark = row.marks[k]
        colour = "green" if mark.endswith(BEST) else "red" if mark.endswith(WORSE) else "dim"
        return Text.assemble(row.words[k], *([("  " + mark, colour)] if mark else []))
    return Text(f"{row.words[k]} {BEST}", "bold green") if row.best == k else Text(f"{row.words[k]}  ")
