"""A vLLM server that a keeper registers: it joins when it answers, leaves when it does not, and is drained before the keeper ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from pdlab.core.types import Role
from pdlab.real.instance.vllm_sidecar import Keeper
from pdlab.real.registry import Registry, open_registry
from pdlab.real.router.status import of_registry
from pdlab.real.router.vllm import Vllm
from tests.support.fake_instance import Fake

METRICS = """
vllm:cache_config_info{block_size="16",num_gpu_blocks="400"} 1.0
vllm:num_requests_running %d.0
vllm:num_requests_waiting 0.0
"""
Main = Callable[[Fake, Registry, Keeper], Coroutine[Any, Any, None]]


def kept(main: Main, running: int = 0, lease_s: float = 60.0) -> list[str]:
    """A server, its keeper, and a registry; what the keeper has said."""
    said: list[str] = []

    async def all_of_it() -> None:
        async with Fake(vllm=True, metrics=METRICS % running) as fake, await open_registry("memory://") as registry:
            upstream = Vllm(fake.url)
            keeper = Keeper(registry, upstream, "v0", Role.DECODE, report_s=0.02, lease_s=lease_s, say=said.append)
            keeping = asyncio.create_task(keeper.run())
            try:
                await asyncio.wait_for(main(fake, registry, keeper), 120)
            finally:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
                upstream.close()
            assert (await of_registry(registry)).rows == []

    asyncio.run(all_of_it())
    return said


async def until(condition: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.01)


async def running(registry: Registry) -> int | None:
    rows = (await of_registry(registry)).rows
    return rows[0].report.running if rows and rows[0].report is not None else None


def test_a_server_is_registered_and_reported_for() -> None:
    async def main(fake: Fake, registry: Registry, keeper: Keeper) -> None:
        async def seen() -> bool:
            return await running(registry) == 3

        await until(seen)
        (row,) = (await of_registry(registry)).rows
        assert (row.spec.role, row.spec.engine, row.spec.kv_blocks, row.spec.url) == (Role.DECODE, "vllm", 400, fake.url)

    assert "v0 has joined as decode" in kept(main, running=3)[0]


def test_a_server_that_falls_silent_leaves_and_comes_back_as_a_new_incarnation() -> None:
    async def main(fake: Fake, registry: Registry, keeper: Keeper) -> None:
        async def there() -> bool:
            return bool((await of_registry(registry)).rows)

        async def gone() -> bool:
            return not await there()

        await until(there)
        fake.silent = True
        await until(gone)
        fake.silent = False
        await until(there)
        assert (await of_registry(registry)).rows[0].spec.incarnation == 2

    said = kept(main, lease_s=1.5)
    assert [line.split(":")[0] for line in said] == [
        "v0 has joined as decode",
        "v0 has lost its place in the registry",
        "v0 has joined as decode",
    ]


def test_it_waits_until_the_server_has_nothing_left_to_do() -> None:
    async def main(fake: Fake, registry: Registry, keeper: Keeper) -> None:
        async def seen() -> bool:
            return await running(registry) == 2

        await until(seen)
        assert await keeper.drain(0.2) == 2
        assert (await of_registry(registry)).rows[0].state == "draining"
        fake.metrics = METRICS % 0
        assert await keeper.drain(60.0) == 0

    kept(main, running=2)
