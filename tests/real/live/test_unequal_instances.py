"""The router's world over instances of other ranks and elements, in processes of their own."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from pdlab.core.types import Role
from tests.real.live.test_same_tokens import GREEDY, WAYS, ask, engines, experiment, some_prompts, world
from tests.support import served
from tests.support.local_instances import Instance as Server
from tests.support.local_instances import instance


async def pair(folder: Path, stack: AsyncExitStack, p: dict[str, Any], d: dict[str, Any]) -> dict[str, Server]:
    servers = {}
    for name, own in (("p", p), ("d", d)):
        started = await stack.enter_async_context(engines(folder, name, "auto", **own))
        servers[name] = await stack.enter_async_context(instance(folder, name, engine=started[name]))
    return servers


@pytest.mark.slow
@pytest.mark.parametrize(("p", "d"), [({"tp": 2}, {}), ({}, {"tp": 2}), ({"tp": 2}, {"tp": 4})], ids=["2x1", "1x2", "2x4"])
def test_unequal_ranks_give_what_one_instance_gives(p: dict[str, Any], d: dict[str, Any], tmp_path: Path) -> None:
    folder, prompts = served.make(tmp_path), some_prompts(8)

    async def run() -> None:
        async with AsyncExitStack() as stack:
            servers = await pair(folder, stack, p, d)
            async with world({"d": servers["d"]}, {"d": Role.MIXED}, experiment()) as alone:
                expected = await ask(alone, prompts, GREEDY)
            for way in ("pull", "push by layer"):
                async with world(servers, {"p": Role.PREFILL, "d": Role.DECODE}, experiment(**WAYS[way])) as cluster:
                    assert await ask(cluster, prompts, GREEDY) == expected, way
                    assert sum(cluster.timeline(i)["transfer_bytes"] for i in range(8)) > 0  # type: ignore[misc]

    asyncio.run(run())


NARROWER = [({"dtype": "float32"}, {"dtype": "bfloat16"}), ({"kv_cache_dtype": "bfloat16"}, {"kv_cache_dtype": "fp8"})]


@pytest.mark.slow
@pytest.mark.parametrize(("p", "d"), NARROWER, ids=["float32 to bfloat16", "KV to fp8"])
def test_instances_of_unequal_elements_serve_together(p: dict[str, Any], d: dict[str, Any], tmp_path: Path) -> None:
    """And a prompt begins as it would at the first alone."""
    folder, prompts = served.make(tmp_path), some_prompts(6)

    async def run() -> None:
        async with AsyncExitStack() as stack:
            servers = await pair(folder, stack, p, d)
            async with world({"p": servers["p"]}, {"p": Role.MIXED}, experiment()) as alone:
                expected = await ask(alone, prompts, GREEDY)
            for way in ("pull", "push by chunk"):
                async with world(servers, {"p": Role.PREFILL, "d": Role.DECODE}, experiment(**WAYS[way])) as cluster:
                    found = await ask(cluster, prompts, GREEDY)
                    assert [one[0][0] for one in found] == [one[0][0] for one in expected], way
                    assert [len(one[0]) for one in found] == [GREEDY.max_tokens] * 6
                    assert sum(cluster.timeline(i)["transfer_bytes"] for i in range(6)) > 0  # type: ignore[misc]

    asyncio.run(run())
