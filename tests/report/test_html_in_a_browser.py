"""report.html in a real browser: alone, from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from pdlab.report.result import Result
from tests.support.browser import CONTRAST, chromium, tab

Made = Callable[..., Result]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.mark.parametrize(("width", "scheme"), [(420, "light"), (2560, "dark")])
def test_the_report_answers_to_hover_zoom_and_sort_and_nothing_is_cut(
    browser: Browser, made_run: Made, tmp_path: Path, width: int, scheme: str
) -> None:
    made_run(300, rejected=2).save(tmp_path)
    with tab(browser, "file:///", width=width, scheme=scheme) as page:
        page.goto((tmp_path / "report.html").as_uri())
        expect(page.locator(".js-plotly-plot")).to_have_count(4)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.evaluate(CONTRAST) == []
        _hover_and_zoom(page)
        head = page.locator("#instances").get_by_role("button", name="requests")
        head.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#instances th[aria-sort=descending]")).to_have_text("requests")
        served = [int(words.replace(",", "")) for words in page.locator("#instances td:nth-child(9)").all_inner_texts()]
        assert served == sorted(served, reverse=True)


def _hover_and_zoom(page: Page) -> None:
    figure = page.locator("#ttft .nsewdrag")
    figure.scroll_into_view_if_needed()
    box = figure.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 4, box["y"] + box["height"] / 4
    page.mouse.move(x, y)
    expect(page.locator("#ttft .hoverlayer")).to_contain_text("% within")
    shown = "() => document.getElementById('ttft').layout.xaxis.range?.[1] ?? document.getElementById('ttft')._fullLayout.xaxis.range[1]"
    before_s = page.evaluate(shown)
    page.mouse.down()
    page.mouse.move(x + box["width"] / 4, y, steps=4)
    page.mouse.up()
    page.wait_for_function(f"before => ({shown})() < before", arg=before_s)
