from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from pdlab.report.html import run_page
from pdlab.report.result import Result
from pdlab.results.records import Samples

Made = Callable[..., Result]
VOID = {"meta", "link", "br", "img", "input"}


class Balanced(HTMLParser):
    """Collects ids and fails on a tag that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser


def page_of(result: Result) -> str:
    return run_page(result.summary, result.records, result.samples, result.experiment, ["watch <this>"])


def test_the_page_is_whole_and_needs_nothing_else(made_run: Made) -> None:
    result = made_run(300, rejected=2)
    page = page_of(result)
    ids = read(page).ids
    assert len(ids) == len(set(ids))
    assert not re.search(r'https?://|src=|<link|@import|href="[^#]', page)
    assert {"ttft", "tpot", "load", "lanes", "instances", "links", "worst"} <= set(ids)
    assert len(page) < 3_000_000


def told(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="told">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    values: dict[str, Any] = json.loads(found[1])
    return values


def test_its_figures_are_those_of_the_run(made_run: Made) -> None:
    result = made_run(300, rejected=2)
    found = told(page_of(result))
    at = found["shares"].index(0.99)
    assert found["cdf"]["ttft_s"][at] == pytest.approx(result.requests.ttft_s.quantile(0.99), rel=1e-3)
    assert found["slo"]["ttft_s"] == result.summary["slo"]["ttft_s"]
    assert found["lanes"]["requests"] == 300
    arrivals = found["lanes"]["stages"][0]["start_s"]
    assert arrivals == sorted(arrivals)
    assert [row["times_objective"] for row in found["worst"][:2]] == [None, None]
    assert list(found["load"]["instances"]) == ["prefill-0", "prefill-1", "decode-0", "decode-1"]


def test_what_is_within_the_script_ends_no_script(made_run: Made) -> None:
    result = made_run(20)
    result.summary["instances"][0]["name"] = "</script><img src=x>"
    page = page_of(result)
    assert "</script><img" not in page
    assert told(page)["instances"][0]["name"] == "</script><img src=x>"


def test_words_are_escaped_and_present(made_run: Made) -> None:
    page = page_of(made_run(50, rejected=1))
    assert "watch &lt;this&gt;" in page
    assert "&lt;b&gt;&amp;" in page
    for words in ("Bottleneck:", "queue full", "network", "prefill-1", "SLO attainment", "seed: 1"):
        assert words in page


def test_a_server_that_tells_no_load_has_no_picture_of_it(made_run: Made) -> None:
    result = made_run(50)
    assert "Load over time" in page_of(result)
    result.samples = Samples(instances=["server"])
    result.samples.rows.extend((1, 0, 0, 0, 0, 0, 0, 100))
    assert "Load over time" not in page_of(result)


def test_equal_runs_give_equal_pages(made_run: Made) -> None:
    assert page_of(made_run(40)) == page_of(made_run(40))


def test_partial_runs_say_so(made_run: Made) -> None:
    result = made_run(20)
    result.summary |= {"partial": True, "unfinished": 4}
    assert "Stopped early: 4 requests" in page_of(result)


def test_what_the_client_cost_is_on_the_page_of_a_measured_run(made_run: Made) -> None:
    result = made_run(20)
    assert "The client that measured" not in page_of(result)
    late = {"p50": 0.0002, "p99": 0.0031, "max": 0.0123}
    result.summary["client"] = {
        "send_late_s": late,
        "read_late_s": dict.fromkeys(late),
        "cpu_s": 1.25,
        "cpu_share": 0.034,
        "connections": 17,
        "chunks": 2345,
        "tokens_per_chunk": 1.0,
    }
    page = page_of(result)
    read(page)
    for words in ("The client that measured", "12.3 ms", "3.4 % of a core, 1.25 s in all", "<dd>17</dd>", "2,345 of 1 tokens each"):
        assert words in page, words
    result.summary["client"] |= {"chunks": 0, "tokens_per_chunk": None, "cpu_share": None}
    assert "<dt>chunks</dt><dd>0</dd>" in page_of(result)


def test_the_head_of_a_page_counts_in_words_and_shortens_the_hash(made_run: Made) -> None:
    result = made_run(1)
    result.summary["run"]["policy_hash"] = "0123456789abcdef" * 4
    page = page_of(result)
    assert "1 request in " in page
    assert "policy hash 0123456789ab<" in page
