"""A registry that is closed leaves no connection behind, whatever was asked of it at that moment."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Callable

import pytest

from pdlab.real.registry import open_registry
from pdlab.real.registry.store import StoreAway
from tests.support.registry_worlds import Server


@pytest.mark.parametrize("after_s", [0.0, 0.0005, 0.001, 0.002])
def test_calls_that_still_connect_when_redis_is_left_leave_no_connection(shared: Callable[[str], Server], after_s: float) -> None:
    server = shared("redis")

    async def main() -> None:
        registry = await open_registry(server.url, timeout_s=60.0)
        asked = [asyncio.create_task(registry.store.snapshot()) for _ in range(30)]
        await asyncio.sleep(after_s)
        await registry.close()
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert not isinstance(outcome, BaseException) or isinstance(outcome, StoreAway)
        with pytest.raises(StoreAway, match="closed"):
            await registry.store.snapshot()

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        asyncio.run(main())
        gc.collect()
    assert not [str(one.message) for one in seen if issubclass(one.category, ResourceWarning)]
