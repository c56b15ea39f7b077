"""Two servers that speak vLLM's dialogue, measured over HTTP: hand-offs between them, and what they cost each other."""

from __future__ import annotations

import asyncio
import json
import math
import os
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pdlab.core.types import UsageError
from pdlab.cost.profile import InstanceProfile
from pdlab.proof.calibrate.grid import Bounds
from pdlab.proof.calibrate.over_http import points
from pdlab.proof.calibrate.pair import behind, fitted, of_pair
from pdlab.proof.calibrate.run import CalibrationPlan
from pdlab.proof.calibrate.stream import MeasuredServer
from pdlab.real.host.core_probe import watched
from pdlab.real.net.http import HttpClient
from tests.support import served

SIZES = {"max_batch_tokens": 128, "max_seqs": 2, "max_tokens": 160}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def urls(model: Path) -> Iterator[tuple[str, str]]:
    with (
        served.server(model, "--role", "prefill", "--kv-gib", "0.05") as (prefill, _),
        served.server(model, "--role", "decode", "--kv-gib", "0.05") as (decode, _),
    ):
        yield prefill, decode


def figures(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = [line.rpartition(" ") for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name.partition("{")[0]: float(value) for name, _, value in lines}


def test_a_pair_is_measured_over_http_and_nothing_is_left_running(model: Path, urls: tuple[str, str]) -> None:
    said: list[str] = []
    config, how = str(model / "config.json"), CalibrationPlan(seconds=1.0)
    profile = of_pair(*urls, config, how, lambda what, share: said.append(what), **SIZES, kv_dtype="fp32")
    assert list(dict.fromkeys(said))[-3:] == ["transfers", "neighbours", "done"]
    assert profile.transfer is not None
    lengths = [m.bytes // profile.model.kv_bytes_per_token for m in profile.transfer.moved]
    assert lengths == [6, 34, 68, 102, 136]
    assert all(math.isfinite(seconds) for seconds in profile.beside.model_dump().values())  # of a tiny model, noise; see test_neighbour.py
    assert InstanceProfile.model_validate_json(profile.model_dump_json()) == profile
    routed = behind(urls[0], profile, *urls, CalibrationPlan())  # any server that answers will do for a router
    before_s, after_s = profile.overheads.request_s, routed.overheads.request_s
    assert after_s >= before_s
    assert routed.model_copy(update={"overheads": profile.overheads}) == profile
    assert figures(urls[1])["vllm:nixl_bytes_transferred_sum"] > 0
    for url in urls:
        assert figures(url)["vllm:num_requests_running"] == figures(url)["vllm:num_requests_waiting"] == 0


def test_where_a_probe_looks_at_their_cores_what_it_saw_and_what_serves_them_are_in_the_profile(model: Path, urls: tuple[str, str]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    with watched(cores) as pace:
        config, how = str(model / "config.json"), CalibrationPlan(seconds=0.5)
        profile = of_pair(*urls, config, how, lambda what, share: None, **SIZES, kv_dtype="fp32", pace=pace, cores=cores[:1])
        routed = behind(urls[0], profile, *urls, CalibrationPlan(), pace=pace, cores=cores[-1:])
    assert profile.unsteady.prefill_loop_s > 0 and profile.unsteady.decode_loop_s > 0
    assert all(len(measured.loop_s) == len(measured.seconds) for measured in profile.points)
    assert not profile.front.matters
    assert 0 < routed.front.request_s < 1


def test_set_up_and_rate_of_transfers_are_told_apart_by_their_length() -> None:
    found = {tokens: [0.2, 0.004 + tokens * 1000 / 5e8, -0.001] for tokens in (10, 100, 400)}
    setup_s, moved = fitted(found, token_bytes=1000)
    assert setup_s == pytest.approx(0.004)
    assert moved.bytes_per_s == pytest.approx(5e8)
    assert moved.mean_error == pytest.approx(0.0, abs=1e-9)


def test_only_whole_blocks_are_taken_for_cached() -> None:
    bounds = Bounds(256, 6, 512, 12800)
    cached = [point.cached for point in points(bounds, 32) if point.kind == "cached"]
    assert cached and not [tokens for tokens in cached if tokens % 32]
    assert not [point for point in points(bounds, 512) if point.kind == "cached"]
    assert len(points(bounds)) == len(set(points(bounds)))


def test_a_server_that_keeps_no_kv_is_said_so(model: Path) -> None:
    async def play(url: str) -> None:
        with closing(HttpClient(url)) as http, pytest.raises(UsageError, match="keeps no KV for another server"):
            await MeasuredServer(http, "fake", 99).prefill([1, 2, 3])

    async def without_connector(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        body = json.dumps({"choices": [{"text": "a"}], "kv_transfer_params": None}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def both() -> None:
        server = await asyncio.start_server(without_connector, "127.0.0.1", 0)
        async with server:
            await play(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")

    asyncio.run(both())
