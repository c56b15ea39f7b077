"""What a router tells Prometheus: of itself under names of its own, of its instances under theirs."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as families

from pdlab.core.types import Dispatch, Handoff, Joined, Report, Role, Switched, Tick
from pdlab.real.router.metrics import Tally
from pdlab.real.router.remote import TransferTrouble
from pdlab.real.router.world import LiveWorld
from tests.real.router.test_cluster_engine import Alphabet, served, spec
from tests.support import echo_engine
from tests.support.local_instances import instance

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return echo_engine.byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def read(page: str) -> Series:
    return {(s.name, frozenset(s.labels.items())): s.value for family in families(page) for s in family.samples}


def value(page: str, name: str, **labels: str) -> float:
    """The sum of the series that have these labels; an error where there are none."""
    found = [figure for (own, of), figure in read(page).items() if own == name and set(labels.items()) <= of]
    assert found, f"no {name} with {labels}"
    return sum(found)


def lint(page: str) -> list[str]:
    """What promtool says, but for the colons in vLLM's names and ours after them."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian's prometheus has it)")
    run = subprocess.run(["promtool", "check", "metrics"], input=page.encode(), capture_output=True, timeout=60, check=False)
    lines = (run.stdout + run.stderr).decode().splitlines()
    return [line for line in lines if "should not contain ':'" not in line]


async def completion(http: httpx.AsyncClient, **fields: object) -> httpx.Response:
    return await http.post("/v1/completions", json={"model": "tiny", "prompt": "hello", "temperature": 0, "max_tokens": 6, **fields})


def test_a_routers_own_figures_have_names_of_their_own_and_its_prompts_count(folder: Path) -> None:
    async def test(http: httpx.AsyncClient, made: LiveWorld) -> None:
        (await completion(http)).raise_for_status()
        page = (await http.get("/metrics")).text
        own = {name for name, _ in read(page) if name.startswith("vllm:")}
        assert not [name for name in own if name.endswith(("_total", "_count", "_sum", "_bucket"))], (
            "a request would count at its legs, too"
        )
        assert (
            value(page, "pdlab:router_request_success_total")
            == value(page, "pdlab:router_request_success_total", finished_reason="length")
            == 1
        )
        prompt = len("hello")
        assert value(page, "pdlab:router_prefix_cache_queries_total") == prompt
        assert value(page, "pdlab:router_prefix_cache_hits_total") == 2
        assert value(page, "pdlab:router_prompt_tokens_total") == prompt - 2
        assert value(page, "pdlab:router_generation_tokens_total") == 6
        for name, figure in (("request_prompt_tokens", prompt), ("request_generation_tokens", 6), ("request_max_num_generation_tokens", 6)):
            assert (value(page, f"pdlab:router_{name}_count"), value(page, f"pdlab:router_{name}_sum")) == (1, figure)
        assert value(page, "process_resident_memory_bytes") > 1e6

    served(folder, test)


def test_a_gauge_names_its_instance_and_role(folder: Path) -> None:
    async def test(http: httpx.AsyncClient, made: LiveWorld) -> None:
        for name, running in (("p", 1), ("d", 5)):
            made.instances.report(Report(name, 0, time.time(), running=running, waiting=2, used_blocks=running * 10))
        page = (await http.get("/metrics")).text
        for name, role, running in (("p", "prefill", 1), ("d", "decode", 5)):
            whose = {"instance": name, "role": role}
            assert value(page, "vllm:num_requests_running", **whose) == running
            assert value(page, "vllm:num_requests_waiting", **whose) == 2
            assert value(page, "vllm:kv_cache_usage_perc", **whose) == pytest.approx(running / 10)
            assert value(page, "vllm:cache_config_info", num_gpu_blocks="100", **whose) == 1
        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:cache_config_info")
        assert {len([1 for (name, _) in read(page) if name == gauge]) for gauge in gauges} == {2}
        made.instances.leave("d", 0)
        assert not [1 for (name, of) in read((await http.get("/metrics")).text) if name in gauges and ("instance", "d") in of]

    served(folder, test)


def test_transfers_retries_and_refusals_are_counted(folder: Path) -> None:
    async def test(http: httpx.AsyncClient, made: LiveWorld) -> None:
        (await completion(http)).raise_for_status()
        page = (await http.get("/metrics")).text
        assert value(page, "pdlab:router_dispatches_total", instance="p", role="prefill") == 1
        assert value(page, "pdlab:router_transfer_bytes_count", kind="handoff") == 1
        assert value(page, "pdlab:router_transfer_seconds_count", kind="handoff") == 1
        for name in ("retries", "migrations", "refusals", "role_switches", "transfer_failures"):
            assert value(page, f"pdlab:router_{name}_total") == 0
        assert value(page, "pdlab:router_transfer_failures_total", kind="handoff", cause="deadline") == 0  # there before the first
        remote = made.instances.members["d"].remote
        assert isinstance(remote, Alphabet)
        remote.broken = True
        assert (await completion(http)).status_code == 500
        page = (await http.get("/metrics")).text
        assert value(page, "pdlab:router_retries_total") == 2
        assert value(page, "pdlab:router_requests_ended_total", stage="failed") == 1
        assert value(page, "pdlab:router_requests_ended_total", stage="done") == 1

    served(folder, test)


def test_a_failed_transfer_is_counted_by_its_cause(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def decode(self: Alphabet, ask: object, hear: object) -> None:
        raise TransferTrouble("the lease was over", cause="expired")

    async def test(http: httpx.AsyncClient, made: LiveWorld) -> None:
        monkeypatch.setattr(Alphabet, "decode", decode)
        await completion(http)
        page = (await http.get("/metrics")).text
        assert value(page, "pdlab:router_transfer_failures_total", kind="handoff", cause="expired") >= 1
        monkeypatch.undo()

    served(folder, test)


def test_switches_and_retries_are_counted_from_what_the_router_hears_and_says() -> None:
    tally = Tally()
    tally.heard(Joined(spec("p")), [])
    for role in (Role.PREFILL, Role.DECODE, Role.DECODE, Role.PREFILL):
        tally.heard(Switched("p", 0, role), [])
    assert dict(tally.switches) == {"decode": 1, "prefill": 1}
    tally.heard(Tick(), [Dispatch(1, 1, "p"), Dispatch(1, 2, "p")])
    assert tally.retries == 1 and dict(tally.dispatches) == {"p": 2}


def test_a_hand_off_counts_where_room_is_reserved_before_prefill_too() -> None:
    tally = Tally()
    tally.heard(Tick(), [Dispatch(1, 1, "p", "d"), Dispatch(2, 1, "d", "d"), Dispatch(3, 1, "p"), Handoff(3, 1, "p", "e")])
    assert {name: count for name, count in tally.handoffs.items() if count} == {"d": 1, "e": 1}


def test_an_instance_labels_all_it_tells_with_its_name_and_role(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p", role=Role.PREFILL) as p:
            await p.ask(prompt="abcd", max_tokens=1, kv_transfer_params={"do_remote_decode": True})
            page = (await p.http.get("/metrics")).text
            for name, labels in read(page):
                if name.startswith(("vllm:", "pdlab:")):
                    assert {("instance", "p"), ("role", "prefill"), ("engine", "0")} <= labels, name
            assert value(page, "vllm:request_success_total") == 1
            assert value(page, "vllm:nixl_num_kv_expired_reqs_total") == value(page, "vllm:nixl_num_failed_transfers_total") == 0
            for name in ("bytes_transferred", "xfer_time_seconds"):
                assert value(page, f"vllm:nixl_{name}_count") == 0
            p.member.spec = spec("d")  # it has changed its role
            assert value((await p.http.get("/metrics")).text, "vllm:request_success_total", role="decode") == 1

    asyncio.run(play())


def test_prometheus_finds_the_children_at_their_router(folder: Path) -> None:
    async def test(http: httpx.AsyncClient, made: LiveWorld) -> None:
        for name, url in (("p2", "http://127.0.0.1:8101"), ("d2", "https://[::1]:8102")):
            own = spec(name)
            made.instances.join(type(own)(name=name, role=own.role, kv_blocks=9, url=url))
        answer = await http.get("/metrics/targets")
        assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
        assert answer.json() == [
            {"targets": ["[::1]:8102"], "labels": {"instance": "d2", "role": "decode", "__scheme__": "https"}},
            {"targets": ["127.0.0.1:8101"], "labels": {"instance": "p2", "role": "prefill", "__scheme__": "http"}},
        ]

    served(folder, test)


def test_promtool_finds_nothing_but_colons(folder: Path) -> None:
    pages: list[str] = []

    async def test(http: httpx.AsyncClient, made: LiveWorld) -> None:
        made.instances.report(Report("p", 0, time.time()))
        await completion(http)
        pages.append((await http.get("/metrics")).text)

    async def play() -> None:
        async with instance(folder, "p") as p:
            await p.ask(prompt="abcd", max_tokens=1)
            pages.append((await p.http.get("/metrics")).text)

    served(folder, test)
    asyncio.run(play())
    for page in pages:
        assert lint(page) == []
        assert not re.search(r"^# HELP \S+ *$", page, re.MULTILINE)
