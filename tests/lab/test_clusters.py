"""A real cluster of a prefill and two decode instances, watched and operated through the lab, over HTTP and in a browser."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from pdlab import UsageError
from pdlab.lab import Client
from pdlab.lab.settings import registries_of, routers_of
from tests.support import served_cluster
from tests.support.browser import chromium, sound, tab
from tests.support.lab_world import LabProcess, lab
from tests.support.registry_worlds import Etcd
from tests.support.served_cluster import ServedCluster
from tests.support.small_cluster import SmallCluster
from tests.support.waiting import until

TOKEN = "the-cluster's"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallCluster]:
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("runtime"))
    folder = tmp_path_factory.mktemp("cluster")
    made = SmallCluster(folder, "--trace-events", str(folder / "events.jsonl"))
    try:
        yield made
    finally:
        made.stop()
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before


@pytest.fixture(scope="module")
def world(cluster: SmallCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabProcess]:
    with lab(tmp_path_factory.mktemp("lab"), "--router", f"here={cluster.url}", "--router", "http://127.0.0.1:1") as running:
        yield running


def test_a_cluster_is_told_and_operated_over_http(cluster: SmallCluster, world: LabProcess) -> None:
    with Client(world.url) as client:
        assert [one["name"] for one in client.call("GET", "/clusters")] == ["here", "127.0.0.1:1"]
        cluster.ask()
        found = {one["name"]: one for one in client.call("GET", "/clusters/here/instances")["instances"]}
        assert {name: one["role"] for name, one in found.items()} == {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}
        asked = client.call("GET", "/clusters/here/requests")
        assert (asked["requests"][0]["status"], asked["requests"][0]["output_tokens"]) == ("done", 20)
        stages = client.call("GET", "/clusters/here/timeline")
        spans = {one["name"]: (one["start_s"][0], one["end_s"][0]) for one in stages["stages"]}
        assert spans["prefill"][1] <= spans["decode"][0] < spans["decode"][1] <= stages["now_s"]
        events = client.call("GET", "/clusters/here/events")
        assert {one["instance"] for one in events["events"] if one["kind"] == "Joined"} == set(found)
        assert client.call("GET", f"/clusters/here/events?after={events['last']}")["events"] == []
        with pytest.raises(UsageError, match=r"prefill-0 stays prefill: nobody else can prefill"):
            client.call("POST", "/clusters/here/instances/prefill-0/drain", json={})
        with pytest.raises(UsageError, match=r"role 'prefil' is not one of .*; nearest is prefill"):
            client.call("POST", "/clusters/here/instances/decode-1/switch", json={"role": "prefil"})
        with pytest.raises(UsageError, match=r"no instance is named 'decode-9'"):
            client.call("POST", "/clusters/here/instances/decode-9/drain", json={})
        told = client.call("POST", "/clusters/here/instances/decode-1/switch", json={"role": "mixed"})
        assert told["words"] == "decode-1 drains, and will be mixed"

        def happened() -> list[tuple[str, str, str]]:
            return [(one["instance"], one["kind"], one["words"]) for one in client.call("GET", "/clusters/here/events")["events"]]

        until(lambda: ("decode-1", "Switched", "is mixed now") in happened())
        with pytest.raises(UsageError, match=r"no cluster is named 'there'; there are here, 127.0.0.1:1"):
            client.call("GET", "/clusters/there/instances")
        for what in ("instances", "requests", "events", "timeline"):
            with pytest.raises(UsageError, match=r"http://127.0.0.1:1 does not answer"):
                client.call("GET", f"/clusters/127.0.0.1:1/{what}")
    assert httpx.get(f"{cluster.url}/pdlab/v1/events?after=x").status_code == 400


def test_another_policy_is_asked_beside_a_running_router(cluster: SmallCluster, world: LabProcess) -> None:
    with world.http as http:
        assert http.get("/clusters/here/what-if").json() is None

        def view() -> dict[str, Any]:
            found: dict[str, Any] = http.get("/clusters/here/what-if").json()
            return found

        def counts() -> dict[str, tuple[int, int]]:
            return {one["hook"]: (one["asked"], one["differ"]) for one in view()["hooks"]}

        begun = http.post("/clusters/here/what-if", json={"policy": {"dispatch": "least_loaded"}})
        assert (begun.status_code, begun.json()["decides"]) == (201, "round_robin")
        until(lambda: view()["state"] == "live")
        before = counts().get("dispatch", (0, 0))
        for _ in range(4):
            cluster.ask(5)
        until(lambda: counts().get("dispatch", (0, 0))[0] == before[0] + 4)
        asked, differ = counts()["dispatch"]
        assert 0 < differ < asked, "round robin takes turns, and of idle instances the first is the least loaded"
        assert len([one for one in view()["departures"] if one["hook"] == "dispatch"]) == differ
        assert http.post("/clusters/here/what-if", json={"policy": "round_robin"}).status_code == 201
        until(lambda: counts().get("dispatch", (0, 0))[0] == asked)
        assert not view()["departures"], "the same policy decides alike"
        assert http.post("/clusters/here/what-if", json={"policy": {"name": "round_robin", "x": 1}}).status_code == 422
        assert http.post("/clusters/127.0.0.1:1/what-if", json={"policy": "round_robin"}).status_code == 502
        assert http.post("/clusters/there/what-if", json={"policy": "round_robin"}).status_code == 404
        assert http.delete("/clusters/here/what-if").json()["policy"] == "round_robin"
        assert http.delete("/clusters/here/what-if").json() is None
    about, head, *_ = httpx.get(f"{cluster.url}/pdlab/v1/trace?offset=0").content.splitlines()
    assert json.loads(about)["bytes"] > len(head) and json.loads(head)["policy"] == "round_robin"
    assert httpx.get(f"{cluster.url}/pdlab/v1/trace?offset=x").status_code == 400


def test_a_cluster_found_by_its_registry_is_operated(tmp_path: Path) -> None:
    """`pdlab serve` processes with a token, over etcd: what an operator does shows in what their router says, and in whom it asks."""
    server = Etcd(tmp_path / "etcd")
    server.start()
    try:
        asyncio.run(server.ready())
        model = served_cluster.make_model(tmp_path / "model")
        with served_cluster.cluster(tmp_path, model, server.url, token=TOKEN) as cluster:
            cluster.start("router", "router")
            for name in ("one", "two"):
                cluster.start(name, "mixed", "--no-self-profile")
            cluster.joined("one", "two")
            registries = ("--registry", f"far={server.url}", "--registry", "gone=redis://u:secret@127.0.0.1:1")
            with lab(tmp_path / "lab", *registries, environment={"PDLAB_INTERNAL_TOKEN": TOKEN}) as world, world.http as http:
                assert {one["name"]: one["url"] for one in http.get("/clusters").json()} == {
                    "far": server.url,
                    "gone": "redis://127.0.0.1:1",
                }
                for what in ("instances", "requests"):
                    away = http.get(f"/clusters/gone/{what}")
                    assert away.status_code == 502 and "no redis server answers there" in away.text and "secret" not in away.text
                _operated(cluster, http)
    finally:
        server.stop()


def _operated(cluster: ServedCluster, http: httpx.Client) -> None:
    def ask() -> None:
        body = {"model": served_cluster.NAME, "prompt": [1, 2, 3, 4], "max_tokens": 3, "ignore_eos": True}
        told = httpx.post(f"{cluster.url('router')}/v1/completions", json=body, timeout=60)
        assert (told.status_code, told.json()["usage"]["completion_tokens"]) == (200, 3), told.text

    def order(instance: str, what: str, **body: object) -> tuple[int, str]:
        told = http.post(f"/clusters/far/instances/{instance}/{what}", json=body)
        return told.status_code, told.json().get("words") or told.json()["errors"][0]

    found = http.get("/clusters/far/instances").json()
    assert (found["leader"], [(one["name"], one["role"]) for one in found["instances"]]) == ("router", [("one", "mixed"), ("two", "mixed")])
    assert order("tow", "drain") == (422, "no instance is named 'tow'; nearest is two")
    assert order("one", "switch", role="prefill") == (200, "one drains, and will be prefill")
    until(lambda: cluster.ready_roles() == {"one": "prefill", "two": "mixed"}, 60)
    assert order("two", "drain") == (422, "two stays mixed: nobody else can decode; start another instance, or use --force")
    assert order("two", "switch", role="decode") == (200, "two drains, and will be decode")
    until(lambda: cluster.ready_roles() == {"one": "prefill", "two": "decode"}, 60)
    ask()
    (last,) = http.get("/clusters/far/requests").json()["requests"]
    assert (last["prefill_instance"], last["decode_instance"], last["status"]) == ("one", "two", "done")
    assert order("one", "switch", role="mixed") == (200, "one drains, and will be mixed")
    until(lambda: cluster.ready_roles() == {"one": "mixed", "two": "decode"}, 60)
    assert order("two", "drain") == (200, "two drains")
    until(lambda: cluster.ready_roles() == {"one": "mixed"} and not cluster.processes["two"].alive, 60)
    ask()
    events = http.get("/clusters/far/events").json()["events"]
    assert [one["kind"] for one in events if one["instance"] == "two"][-1] == "Left"
    cluster.processes["router"].popen.terminate()
    cluster.processes["router"].popen.wait(60)
    away = http.get("/clusters/far/timeline")
    assert (away.status_code, away.json()["errors"]) == (502, ["cluster far: no router leads, and only a router tells of requests"])


def test_a_cluster_is_watched_and_drained_in_a_browser(cluster: SmallCluster, world: LabProcess) -> None:
    with chromium() as browser, tab(browser, world.url) as page:
        page.goto("/clusters")
        page.get_by_role("link", name="here").click()
        card = page.locator("[data-instance=decode-0]")
        expect(card).to_contain_text("ready")
        cluster.ask()
        expect(page.locator(".js-plotly-plot")).to_have_count(1)
        expect(page.get_by_role("region", name="what has happened")).to_contain_text("joined as prefill")
        page.get_by_label("policy", exact=True).fill("least_kv")
        page.get_by_label("parameters").fill("[1]")
        page.get_by_role("button", name="Ask it beside").click()
        expect(page.get_by_role("alert")).to_contain_text("parameters [1] are no mapping")
        page.get_by_label("parameters").fill("")
        page.get_by_role("button", name="Ask it beside").click()
        expect(page.locator("#what-if-state")).to_contain_text(re.compile("least_kv asked beside round_robin: live"))
        expect(page.locator("#what-if-found tr", has_text="dispatch").first).to_contain_text(re.compile(r"[1-9][\d.]* % \(\d+ of \d+\)"))
        page.get_by_text("Where it would").click()
        expect(page.locator("#what-if-found details tr").nth(1)).to_contain_text(re.compile("prefill-0|decode-0"))
        sound(page)
        page.get_by_role("button", name="Ask it no more").click()
        expect(page.locator("#what-if-found")).to_be_empty()
        card.get_by_role("button", name="Drain").click()
        page.get_by_role("button", name="No").click()
        expect(page.locator("dialog")).to_have_count(0)
        card.get_by_role("button", name="Drain").click()
        page.get_by_role("button", name="Do it").click()
        expect(page.get_by_text("decode-0 drains", exact=True)).to_be_visible()
        expect(page.locator("tr", has_text="decode-0").filter(has_text=re.compile("drains|left"))).not_to_have_count(0)
        page.goto("/clusters/127.0.0.1:1")
        expect(page.get_by_role("alert")).to_contain_text("http://127.0.0.1:1 does not answer")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["ftp://x"], "write http://HOST:PORT"),
        (["http://h:x"], "write http://HOST:PORT"),
        (["a=http://h", "a=http://i"], "'a' is there twice"),
        (["a/b=http://h"], "'a/b' is no name"),
    ],
)
def test_a_router_that_is_none_is_told_in_a_line(texts: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        routers_of(texts)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["http://h:1"], "--registry http://h:1: write etcd://HOST:PORT or redis://HOST:PORT, or NAME=etcd://HOST:PORT"),
        (["memory://"], "--registry memory://: write etcd://HOST:PORT"),
        (["a=redis://u:secret@h", "a=redis://u:secret@h"], "--registry redis://h: 'a' is there twice; write NAME=redis://h"),
    ],
)
def test_a_registry_that_is_none_is_told_in_a_line_without_its_password(texts: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as told:
        registries_of(texts)
    assert "secret" not in str(told.value)
    assert registries_of(["etcd://u:p@a:1,b:2"]) == {"a:1,b:2": "etcd://u:p@a:1,b:2"}
