"""Many listeners on one job: each hears of it, none is starved, and the lab answers others meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from pdlab.lab import Client
from tests.support.lab_world import lab, long

LISTENERS = 200
LISTENING_S = 60.0


@pytest.mark.slow
def test_two_hundred_listeners_hear_of_a_job_and_its_end_for_a_minute(tmp_path: Path) -> None:
    with lab(tmp_path, "--jobs", "1") as world, Client(world.url) as client:
        job = client.submit(long())
        next(event for event in job.events() if event["progress"].get("done"))
        heard = asyncio.run(listened(f"{world.url}/api/v1/experiments/{job.id}/events", client, job.cancel))
    counts = [len(events) for events in heard]
    assert len(counts) == LISTENERS
    assert min(counts) > max(counts) / 3 > 1, (min(counts), max(counts))
    assert {events[-1]["state"] for events in heard} == {"cancelled"}
    for events in heard:
        done = [event["progress"]["done"] for event in events[:-1]]
        assert done == sorted(done)


async def listened(url: str, client: Client, end: Callable[[], object]) -> list[list[dict[str, Any]]]:
    limits = httpx.Limits(max_connections=LISTENERS + 5)
    async with httpx.AsyncClient(limits=limits, timeout=60) as http:

        async def one() -> list[dict[str, Any]]:
            async with http.stream("GET", url) as answer:
                lines = [line async for line in answer.aiter_lines() if line.startswith("data: {") and "state" in line]
            return [json.loads(line.removeprefix("data: ")) for line in lines]

        tasks = [asyncio.create_task(one()) for _ in range(LISTENERS)]
        await asyncio.sleep(LISTENING_S)
        began_s = time.monotonic()
        await asyncio.to_thread(client.experiments)
        assert time.monotonic() - began_s < 30, "others are answered meanwhile"
        await asyncio.to_thread(end)
        return await asyncio.gather(*tasks)
