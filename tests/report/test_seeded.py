"""A star needs a difference outside its interval."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from pdlab.report.seeded import ROWS as rows
from pdlab.report.seeded import SeededRuns, compared, comparison, decided, overload_words, pair_lines
from pdlab.results.statistics import MeanInterval
from pdlab.results.units import interval_words

ATTAINMENT = next(row for row in rows if row.path == "slo_attainment")
TTFT = next(row for row in rows if row.path == "ttft_s.p99")


def runs(name: str, attainment: Sequence[float], ttft_s: Sequence[float] = (), **texts: Sequence[object]) -> SeededRuns:
    """Its figures by seed."""
    by_seed: dict[int, dict[str, object]] = {
        seed: {"slo_attainment": value, "goodput_rps": 10 * value} for seed, value in enumerate(attainment)
    }
    for seed, value in enumerate(ttft_s):
        by_seed[seed]["ttft_s.p99"] = value
    for path, values in {"bottleneck.resource": ["none"] * len(attainment), **texts}.items():
        for seed, text in enumerate(values):
            by_seed[seed][path.replace("__", ".")] = text
    return SeededRuns(name, by_seed)  # type: ignore[arg-type]


def printed(them: Sequence[SeededRuns], baseline: str | None = None, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison(them, baseline))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


LOW, HIGH = (0.90, 0.80, 0.70), (0.92, 0.83, 0.72)


def test_what_seeds_have_in_common_cancels_out() -> None:
    """By 0.023 better with every seed, though seeds differ by 0.2."""
    low, high = runs("low", LOW), runs("high", HIGH)
    assert decided(high, low, ATTAINMENT) == 1 and decided(low, high, ATTAINMENT) == -1
    row = compared([low, high])[0]
    assert (row.label, row.best, row.undecided) == ("SLO attainment", 1, False)
    assert "SLO attainment: high over low by 2.3 ±1.4 %" in pair_lines([low, high])[0]


def test_a_difference_within_its_interval_is_undecided() -> None:
    low, mixed = runs("low", LOW), runs("mixed", (0.95, 0.78, 0.74))
    row = compared([low, mixed])[0]
    assert (row.best, row.undecided) == (None, True)
    assert "SLO attainment: low and mixed undecided" in pair_lines([low, mixed])
    assert "undecided" in printed([low, mixed]) and "★" not in printed([low, mixed])


def test_a_star_is_for_who_is_better_than_each_other() -> None:
    low, high = runs("low", LOW), runs("high", HIGH)
    assert compared([low, high, runs("higher", [value + 0.001 for value in HIGH])])[0].best == 2
    assert compared([low, high, runs("close", (0.93, 0.825, 0.72))])[0].undecided


def test_one_seed_gets_no_star_and_is_told_how_to_get_one() -> None:
    text = printed([runs("a", [0.5]), runs("b", [0.9])])
    assert "★" not in text and "undecided" not in text
    assert "--seeds 5" in text and "50.0 %" in text


def test_less_is_better_for_latencies_and_what_is_alike_is_not_undecided() -> None:
    slow, fast = runs("slow", LOW, (0.5, 0.6, 0.7)), runs("fast", LOW, (0.4, 0.51, 0.59))
    found = {row.label: row for row in compared([slow, fast])}
    assert found["TTFT p99"].best == 1
    assert (found["SLO attainment"].best, found["SLO attainment"].undecided) == (None, False)
    nearly = runs("nearly", [value * (1 + 1e-14) for value in LOW])
    assert decided(nearly, slow, ATTAINMENT) == 0 and not compared([slow, nearly])[0].undecided
    assert "SLO attainment: slow and nearly alike" in pair_lines([slow, nearly])


def test_against_a_baseline_each_says_by_how_much_it_differs() -> None:
    low, high, mixed = runs("low", LOW), runs("high", HIGH), runs("mixed", (0.95, 0.78, 0.74))
    row = compared([low, high, mixed], "low")[0]
    assert row.marks[0] == "" and row.marks[1].endswith("★") and row.marks[1].startswith("+2.3 ±1.4 %") and row.marks[2].endswith("≈")
    assert compared([low, high], "high")[0].marks[0].endswith("▼")
    assert "the difference to low, seed by seed" in printed([low, high], "low")


def test_overload_stands_above_all_and_what_binds_after_goodput() -> None:
    over = runs("over", LOW, overloaded=[True, True, False], bottleneck__resource=["link", "link", "none"])
    assert overload_words(over) == "overloaded 2/3"
    text = printed([over, runs("fine", HIGH, overloaded=[False] * 3)])
    assert text.index("overloaded") < text.index("SLO attainment") < text.index("binds") < text.index("mean ±")
    assert "link 2/3" in text


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits_the_terminal(width: int) -> None:
    lines = printed([runs("prefix_aware", LOW, (0.5, 0.6, 0.7)), runs("least_loaded", HIGH, (0.4, 0.5, 0.6))], width=width).splitlines()
    assert max(map(len, lines)) <= width and "…" not in "".join(lines)


def test_no_figure_is_finer_than_its_interval() -> None:
    given = [
        (0.0914, 0.052, "s"),
        (2.64, 0.074, "s"),
        (12345.6, 1.0, ""),
        (70.0, 1e-14, ""),
        (0.0, 0.0, ""),
        (0.937, None, "%"),
        (-0.0212, 0.006, "%"),
    ]
    said = [interval_words(MeanInterval(mean, half), unit) for mean, half, unit in given]
    assert said == ["91 ±52 ms", "2.64 ±0.074 s", "12,346 ±1", "70.0 ±0", "0 ±0", "93.7 %", "-2.12 ±0.6 %"]
