from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from pdlab.cli import compare as compare_cli
from pdlab.core.types import UsageError
from pdlab.report.compare import agreement, checks_markdown, checks_table, comparison_page, comparison_table, ranking_table, signed
from pdlab.report.result import Result
from pdlab.results.comparison import Comparison, compare
from pdlab.results.comparison_stored import Check, checks
from tests.support.measured_runs import measured, simulated


@pytest.fixture(scope="module")
def policies() -> dict[str, Result]:
    return {policy: simulated(policy) for policy in ("least_loaded", "round_robin")}


@pytest.fixture(scope="module")
def comparison(policies: dict[str, Result]) -> Comparison:
    sims = list(policies.items())
    return compare([*sims, *((name, measured(run, factor)) for name, run in sims for factor in (0.97, 1.05))])


def shown(what: RenderableType) -> str:
    console = Console(width=140)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def printed(comparison: Comparison) -> str:
    return shown(comparison_table(comparison))


def test_the_terminal_shows_errors_spreads_and_the_order_of_policies(comparison: Comparison) -> None:
    said = printed(comparison)
    for words in ("TTFT p99", "ITL mean", "throughput, req/s", "-1.0 %", "±4.0 % ✓", "decode-0", "rank correlation", "ranking of policies"):
        assert words in said, words
    assert "1 simulation" not in said and "one simulation, 2 measured runs" in said


def test_what_neither_world_has_is_left_out(policies: dict[str, Result]) -> None:
    sim = policies["least_loaded"]
    run = measured(sim, 1.0)
    for summary in (sim.summary, run.summary):
        summary["transfer_s"] = dict.fromkeys(summary["transfer_s"])
    found = compare([("a", sim), ("b", run)])
    assert "transfer" not in printed(found) and "queue p99" in printed(found)


def test_the_page_is_one_file_with_its_pictures(comparison: Comparison) -> None:
    page = comparison_page(comparison)
    assert (
        page.startswith("<!doctype html>") and page.count("<svg") == 4 and "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    )
    assert not re.search(r'(?:src|href)="http', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_every_figure_stands_beside_its_bar(comparison: Comparison) -> None:
    said = shown(checks_table(list(checks("2p1d", comparison))))
    assert "TPOT p99" in said and "±4.0 %" in said and "10 %" in said and "missed" not in said
    assert "12 of 12 figures are within" in said
    far = compare([("sim", comparison.groups[0].simulated[0]), ("real", measured(comparison.groups[0].simulated[0], 2.0))])
    said = shown(checks_table(list(checks("2p1d", far))))
    assert said.count("missed") == 6 and "-50.0 %" in said and "0 of 6 figures" in said


def test_the_ranking_can_be_shown_alone(comparison: Comparison) -> None:
    said = shown(ranking_table(comparison))
    assert "TTFT mean" in said and "round_robin" in said and "decode-0" not in said


def test_errors_are_signed() -> None:
    assert (signed(0.123), signed(-0.004), signed(float("nan"))) == ("+12.3 %", "-0.4 %", "–")  # noqa: RUF001
    assert agreement(2, 2, 3) == "2 of 2 pairs, 1 undecided" and agreement(0, 0, 1).startswith("undecided")


def test_the_command_reads_directories_and_writes_the_page(
    policies: dict[str, Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies["round_robin"].save(tmp_path / "sim")
    measured(policies["round_robin"], 1.2).save(tmp_path / "real")
    compare_cli.compare([tmp_path / "sim", tmp_path / "real"], out_file=tmp_path / "x" / "page.html")
    assert "-16.7 %" in capsys.readouterr().out
    assert "Simulated against measured" in (tmp_path / "x" / "page.html").read_text()
    compare_cli.compare([tmp_path / "real", tmp_path / "sim"], out_file=tmp_path / "page.html", quiet=True)
    assert capsys.readouterr().out == ""


def test_the_commands_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one of pdlab bench"):
        compare_cli.compare([tmp_path])
    with pytest.raises(UsageError, match="no result is saved there"):
        compare_cli.compare([tmp_path, tmp_path])


def test_the_markdown_table_shows_each_error_with_its_spread_and_what_was_missed_in_bold() -> None:
    good = Check("1p1d, 2 req/s", "least_loaded", "ttft_s.mean", 1.01, 1.0, 0.01, 0.02, 0.05, True)
    bad = Check("1p1d, 2 req/s", "least_loaded", "e2e_s.p99", 1.5, 1.0, 0.5, math.nan, 0.1, False)
    assert checks_markdown([good, bad]).splitlines() == [
        "| run | policy | TTFT mean | E2E p99 |",
        "| --- | --- | ---: | ---: |",
        "| 1p1d, 2 req/s | least_loaded | +1.0% ±2.0% | **+50.0%** |",
    ]
