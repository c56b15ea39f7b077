"""Debian's chromium, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

expect.set_options(timeout=120_000)  # of a busy machine

# What a reader must be able to tell apart (WCAG AA): 4.5 to 1, or 3 to 1 of large text. Returns what falls short.
CONTRAST = """() => {
  const parse = (text) => { const found = text.match(/[\\d.]+/g).map(Number); return found.length < 4 ? [...found, 1] : found; };
  const linear = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found[3] > 0.99) return found;
    }
    return [255, 255, 255, 1];
  };
  const short = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.getClientRects().length || node.closest('svg,:disabled,.skip,option')) continue;
    const style = getComputedStyle(node);
    const [dim, bright] = [light(parse(style.color)), light(behind(node))].sort((x, y) => x - y);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const shown = `${node.tagName} ${node.className}: ${node.textContent.slice(0, 30)}`;
    if ((bright + 0.05) / (dim + 0.05) < (large ? 3 : 4.5)) short.push(shown);
  }
  return short;
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips, saying so, where there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed: make servers, as root")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def tab(browser: Browser, url: str, *, width: int = 1280, scheme: Any = "light") -> Iterator[Page]:
    """A page of the lab at `url`, in which nothing goes wrong: no script fails, no dialog opens, and nothing is asked of anybody else."""
    wrong: list[str] = []
    context = browser.new_context(base_url=url, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss())[1])
    page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    page.on("request", lambda request: None if request.url.startswith((url, "data:", "blob:")) else wrong.append(f"asked {request.url}"))
    try:
        yield page
    finally:
        context.close()
    assert not wrong, wrong


def sound(page: Page) -> None:
    """Nothing is wider than the page, and everything can be read, in light and in dark."""
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.evaluate(CONTRAST) == []
        page.click("#theme")
