"""What a request leaves behind: nothing that the garbage collector would have to find."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.api_world import served
from tests.support.waiting import until


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ends", ["in order", "hung up"])
def test_a_request_that_has_ended_is_gone_at_once(folder: Path, stream: bool, ends: str) -> None:
    """Cycles of what a request holds (its prompt, its text) live on until the collector comes by, and cost it the time of a request."""
    with served(folder) as world, ThreadPoolExecutor(1) as pool, no_collector():
        world.engine.paused = True
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "stream": stream}
        within_s = 60.0 if ends == "in order" else 0.5
        asked = pool.submit(httpx.post, f"{world.url}/v1/completions", json=body, timeout=within_s)
        until(lambda: bool(world.service.running))
        generations = [weakref.ref(one) for one in world.service.running]
        if ends == "in order":
            world.engine.paused = False
            assert asked.result().status_code == 200
        else:
            assert isinstance(asked.exception(), httpx.ReadTimeout)
        until(world.at_rest)
        until(lambda: not any(one() for one in generations))
