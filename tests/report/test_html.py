from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

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
    used = [a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)]
    assert used
    assert set(used) <= set(ids)
    assert not re.search(r'https?://|src=|<link|@import|href="[^#]', page)
    assert page.count("<svg") == 3
    assert len(page) < 3_000_000


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
    page = page_of(result)
    assert "Load over time" not in page
    assert page.count("<svg") == 2


def test_figures_take_the_pages_colours(made_run: Made) -> None:
    page = page_of(made_run(50))
    assert "prefers-color-scheme:dark" in page
    drawing = page[page.index("<svg") :]
    assert "var(--ink)" in drawing
    assert "#4a5058" not in drawing
    assert '="var(' not in drawing


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
