"""What a lab gives back: runs that have ended, uploads; and the room that uploads have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from pdlab.lab import Client
from pdlab.lab.lab import GONE
from tests.support.browser import chromium, sound, tab
from tests.support.lab_world import LabProcess, lab, long, small


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabProcess]:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "runs" / f"killed{GONE}").mkdir(parents=True)
    with lab(folder, "--jobs", "1", "--uploads-gib", str(64 / 2**30)) as running:
        yield running


@pytest.fixture(scope="module")
def client(world: LabProcess) -> Iterator[Client]:
    with Client(world.url) as made:
        yield made


def test_a_run_that_has_ended_is_deleted_with_its_files_and_can_run_again(world: LabProcess, client: Client) -> None:
    assert not (world.folder / "runs" / f"killed{GONE}").exists(), "of a lab that was killed while it deleted"
    job = client.submit(small(name="short-lived"), tags=["only-here"]).wait(60)
    folder = world.folder / "runs" / job.id
    assert (folder / "summary.json").is_file()
    assert job.delete()["name"] == "short-lived"
    assert not list(folder.parent.glob(f"{job.id}*"))
    with world.http as http:
        assert http.get(f"/experiments/{job.id}").status_code == 404
        assert http.delete(f"/experiments/{job.id}/results").status_code == 404
        assert "only-here" not in http.get("/tags").json()
        again = client.submit(small(name="short-lived"))
        assert again.told["new"] and again.wait(60).summary["requests"] == 60


def test_what_has_not_ended_is_not_deleted(world: LabProcess, client: Client) -> None:
    job = client.submit(long(name="goes on"))
    with world.http as http:
        told = http.delete(f"/experiments/{job.id}/results")
        assert told.status_code == 409
        assert re.fullmatch(f"experiment {job.id} is (queued|running): cancel it, and then delete it", told.json()["errors"][0])
    job.cancel()


def test_an_upload_is_deleted_but_not_while_a_job_will_read_it_and_all_have_a_bound(world: LabProcess) -> None:
    def put(http: httpx.Client, name: str, size: int) -> httpx.Response:
        rows = b"arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,9,9\n"
        return http.post("/uploads", params={"name": name, "kind": "trace"}, content=rows.ljust(size)[:size])

    with world.http as http, Client(world.url) as client:
        assert put(http, "a.csv", 60).status_code == 201
        told = put(http, "b.csv", 5)
        assert (told.status_code, told.json()["errors"][0][:21]) == (413, "uploads may take 5.96")
        before = client.submit(long(name="holds the slot"))
        job = client.submit(small(name="reads it", workload={"source": "a.csv", "format": "vidur"}))
        told = http.delete("/uploads/a.csv")
        assert (told.status_code, told.json()["errors"]) == (
            409,
            [f"a.csv: {job.id} will read it; wait until they have ended, or cancel them"],
        )
        job.cancel()
        before.cancel()
        assert http.delete("/uploads/a.csv").json()["bytes"] == 60
        assert http.delete("/uploads/a.csv").status_code == 404
        assert http.delete("/uploads/..%2Fx").status_code == 404
        assert not (world.folder / "uploads" / "a.csv").exists()
        assert put(http, "a.csv", 64).status_code == 201, "the name is free again"
        http.delete("/uploads/a.csv").raise_for_status()


def test_runs_and_uploads_are_deleted_in_a_browser(world: LabProcess, client: Client, tmp_path: Path) -> None:
    (tmp_path / "page.csv").write_text("a,b\n")
    job = client.submit(small(name="seen off")).wait(60)
    with chromium() as browser, tab(browser, world.url, width=420) as page:
        page.goto("/uploads")
        expect(page.locator("main")).to_contain_text("There are none.")
        page.locator("input[type=file]").set_input_files(tmp_path / "page.csv")
        page.get_by_role("button", name="Upload", exact=True).click()
        expect(page.locator("tbody tr")).to_contain_text(["page.csv"])
        sound(page)
        page.get_by_role("button", name="Delete page.csv").click()
        page.get_by_role("button", name="Delete it").click()
        expect(page.locator("main")).to_contain_text("There are none.")
        page.goto(f"/runs/{job.id}")
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("button", name="No").click()
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("button", name="Delete it").click()
        page.wait_for_url(re.compile(r"/(\?.*)?$"))
        expect(page.locator(f"tr[data-id='{job.id}']")).to_have_count(0)
