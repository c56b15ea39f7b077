"""The lab's pages in a real browser."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser, Page, expect

from pdlab.lab import Client
from tests.support.browser import chromium, sound, tab
from tests.support.lab_world import LabProcess, lab, long, small

EVIL = "<img src=x onerror=alert(1)>\"'<b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def world(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabProcess]:
    with lab(tmp_path_factory.mktemp("lab"), "--jobs", "1") as running:
        yield running


@pytest.fixture(scope="module")
def client(world: LabProcess) -> Iterator[Client]:
    with Client(world.url) as made:
        yield made


@pytest.fixture(scope="module")
def ids(client: Client) -> list[str]:
    jobs = [client.submit(small(name=name, policy=policy), tags=["t"]) for name, policy in ((EVIL, "round_robin"), ("plain", "random"))]
    return [job.wait(60).id for job in jobs]


def test_an_experiment_is_written_submitted_and_watched_until_it_is_done(browser: Browser, world: LabProcess) -> None:
    with tab(browser, world.url) as page:
        page.goto("/new")
        file = page.locator("#file")
        expect(page.locator("#mistakes")).to_contain_text("The file can run.")
        file.fill("model: llama-3.1-8b\ncluster:\n  instances:\n    - {rol: prefill}\n")
        wrong = page.get_by_role("button", name="line 4: cluster.instances.0.rol: unknown key; nearest is role")
        expect(wrong).to_be_visible()
        expect(page.locator("pre .wrong")).to_contain_text(["✗ 4"])
        expect(page.locator("#submit")).to_be_disabled()
        wrong.click()
        assert page.evaluate("document.getSelection().toString() || document.activeElement.id") in ("file", "    - {rol: prefill}")
        page.locator("#field-policy").select_option("dynamo_kv")
        page.get_by_role("button", name="Write the file").click()
        assert "policy: dynamo_kv" in file.input_value()
        file.fill(yaml.safe_dump(small(name="watched", workload__requests=100_000)))
        page.get_by_label("tags, with commas").fill("seen, t")
        expect(page.locator("#mistakes")).to_contain_text("The file can run.")
        sound(page)
        file.press("Control+Enter")
        page.wait_for_url(re.compile("/runs/"))
        expect(page.locator("main")).to_contain_text("so far")
        expect(page.locator("progress")).to_be_visible()
        expect(page.locator("h1 .badge")).to_have_text("done", timeout=60_000)
        expect(page.locator("h2", has_text="furthest from their objectives")).to_be_visible(timeout=30_000)
        expect(page.locator(".tag")).to_have_text(["seen", "t"])
        page.reload()
        expect(page.locator(".js-plotly-plot")).to_have_count(4)


def test_a_page_says_since_when_nothing_was_heard_of_a_run(browser: Browser, world: LabProcess, client: Client) -> None:
    job = client.submit(long(name="held"))
    with tab(browser, world.url) as page:
        page.clock.install()
        page.goto(f"/runs/{job.id}")
        expect(page.locator("main")).to_contain_text("so far")
        said = page.get_by_role("status").filter(has_text="Nothing was heard of it since")
        expect(said).to_have_count(0)
        for pid in world.workers():
            os.kill(pid, signal.SIGSTOP)
        for _ in range(20):  # what was on its way comes yet
            page.clock.fast_forward(40_000)
            if said.count():
                break
        expect(said).to_be_visible()
        for pid in world.workers():
            os.kill(pid, signal.SIGCONT)
        expect(said).to_have_count(0)
    job.cancel()


def test_runs_are_sorted_filtered_chosen_and_compared_and_names_are_text(
    browser: Browser, world: LabProcess, client: Client, ids: list[str]
) -> None:
    with tab(browser, world.url, width=420) as page:
        page.goto("/?tag=t")
        rows = page.locator("tbody tr")
        expect(rows.filter(has_text="onerror")).to_have_count(1)
        head = page.get_by_role("button", name="name", exact=True)
        head.focus()
        page.keyboard.press("Enter")
        expect(page.locator("th[aria-sort=descending]")).to_have_text("name")
        page.get_by_label("name, policy, model or id").fill("round_rob")
        expect(rows).to_have_count(1)
        page.get_by_label("name, policy, model or id").fill("")
        for id in ids:
            page.locator(f"tr[data-id='{id}'] input").check()
        sound(page)
        page.locator("#compare").click()
        expect(page.locator("h1")).to_have_text(f"{EVIL} against plain")
        expect(page.locator("main")).to_contain_text("what differs in the files")
        expect(page.locator(".js-plotly-plot")).to_have_count(3)
        assert page.locator("main img").count() == 0
        sound(page)
        page.goto(f"/runs/{ids[0]}")
        expect(page.locator(".js-plotly-plot")).to_have_count(4)
        sound(page)
        page.get_by_role("button", name="TTFT", exact=True).click()
        expect(page.locator("th[aria-sort=descending]")).to_have_text(["TTFT"])


def test_a_sweep_is_drawn_by_each_axis(browser: Browser, world: LabProcess, client: Client) -> None:
    job = client.submit(small(name=EVIL), kind="sweeps", seeds=1, grid=["workload.rate=20,40", "policy=random,round_robin"]).wait(120)
    with tab(browser, world.url, width=2560, scheme="dark") as page:
        page.goto(f"/sweeps/{job.id}")
        expect(page.locator(".js-plotly-plot")).to_have_count(4)
        page.get_by_label("axis").select_option("policy")
        expect(page.locator("tbody tr")).to_have_count(4)
        sound(page)


def test_a_lab_that_is_gone_is_said_to_be_and_its_page_goes_on_when_it_is_back(browser: Browser, tmp_path: Path) -> None:
    with lab(tmp_path, "--jobs", "1") as world, Client(world.url) as client, tab(browser, world.url) as page:
        job = client.submit(small(workload__requests=60_000))
        page.goto(f"/runs/{job.id}")
        expect(page.locator("main")).to_contain_text("so far")
        world.kill()
        expect(page.locator("#line")).to_have_text("connection lost, trying again")
        world.start()
        expect(page.locator("h1 .badge")).to_have_text("done", timeout=60_000)


def test_a_browser_logs_in_with_the_token(browser: Browser, tmp_path: Path) -> None:
    with lab(tmp_path, token="the-token-of-a-lab") as world, tab(browser, world.url) as page:
        page.goto("/")
        _log_in(page, "wrong")
        expect(page.get_by_role("alert")).to_have_text("That is not this lab's token.")
        _log_in(page, "the-token-of-a-lab")
        expect(page.locator("main")).to_contain_text("Nothing here yet")
        sound(page)
        assert page.evaluate("document.cookie") == "", "no script reads it"


def _log_in(page: Page, token: str) -> None:
    page.get_by_label("The lab's token").fill(token)
    page.get_by_role("button", name="Log in").click()
