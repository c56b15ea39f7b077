from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console, RenderableType

from pdlab.report.result import Result
from pdlab.report.tables import summary_table
from pdlab.results.metrics import DEFINITIONS
from pdlab.results.units import number, percent, seconds, size

Made = Callable[..., Result]


def printed(what: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_table_says_it_all(made_run: Made) -> None:
    result = made_run(300, rejected=3)
    text = printed(summary_table(result.summary, "made-up"))
    for word in (
        "TTFT",
        "TPOT",
        "ITL",
        "E2E",
        "transfer",
        "p99",
        "goodput",
        "prefill-1",
        "decode-0",
        "network",
        "bottleneck",
        "3 x queue full",
    ):
        assert word in text
    assert seconds(result.summary["ttft_s"]["p99"]) in text
    assert percent(result.summary["slo_attainment"]) in text
    assert result.summary["bottleneck"]["resource"] in text
    assert "\n│ busy  " not in text and "arrival to first token" not in text, "the words are explained when that is asked for"
    assert all(term in printed(summary_table(result.summary, explain=True)) for term in DEFINITIONS)


def test_it_is_in_the_order_of_the_question(made_run: Made) -> None:
    summary = made_run(300).summary
    summary = summary | {"overloaded": True, "run": summary["run"] | {"rests_on": ["h100-sxm: a guess"]}}
    text = printed(summary_table(summary, "made-up"))
    order = [
        "overloaded",
        "rests on  h100-sxm: a guess",
        "SLO attainment",
        "│ goodput",
        "bottleneck",
        "│ TTFT ",
        "prefix hits",
        "│ prefill-1 ",
        "│ network",
    ]
    assert sorted(order, key=text.index) == order


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits_the_terminal(made_run: Made, width: int) -> None:
    text = printed(summary_table(made_run(50).summary), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text


def test_partial_and_warnings_are_shown(made_run: Made) -> None:
    summary = made_run(20).summary | {"partial": True, "warnings": ["beyond the table's range"]}
    text = printed(summary_table(summary, "x"))
    assert "partial" in text
    assert "beyond the table's range" in text


def test_units() -> None:
    assert [seconds(x) for x in (12.34, 0.085, 1.0, 4.1e-4, 0.0, 1234.5, None, float("nan"))] == [
        "12.3 s",
        "85.0 ms",
        "1.00 s",
        "410 us",
        "0 ms",
        "1,234 s",
        "–",  # noqa: RUF001
        "–",  # noqa: RUF001
    ]
    assert [percent(x) for x in (1.0, 0.99999, 0.5, 1e-6, 0.0)] == ["100 %", ">99.9 %", "50.0 %", "<0.1 %", "0 %"]
    assert [number(x) for x in (12345, 8.314, 0.01234)] == ["12,345", "8.31", "0.0123"]
    assert [size(x) for x in (1.5e12, 2e6, 12)] == ["1.5 TB", "2 MB", "12 B"]
