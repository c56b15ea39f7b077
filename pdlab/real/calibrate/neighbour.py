"""How much longer the steps of one server take while another of the same machine computes: engines of one CPU share its caches and its
memory, and where there are no more cores than engines, what serves them runs on the engines' cores. So both are seen through HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from statistics import fmean

from pdlab.cost.profile import Beside, Point
from pdlab.real.calibrate.grid import Bounds
from pdlab.real.calibrate.over_http import OUTPUT_TOKENS, median, seconds
from pdlab.real.calibrate.stream import Server
from pdlab.types import UsageError

REPEATS, PROMPTS = 5, 5  # of each kind of steps beside each other; of prompts each time, since one is heard of once
TOKENS = 64  # of a prompt: few, since what a neighbour costs is the same for a longer one, and would be lost in its time


async def neighbours(one: Server, other: Server, bounds: Bounds, besides_s: float, repeats: int = REPEATS) -> Beside:
    """How much longer steps of `one` take while `other` computes; each difference is of two measurements one right after the other."""
    longest = bounds.max_tokens - 2 * OUTPUT_TOKENS
    tokens, context = min(TOKENS, bounds.step_tokens, longest), min(128, longest // 2)
    steps = {"prefill": Point(tokens=tokens), "decode": Point(batch=min(4, bounds.seqs), context=context)}
    more_s: dict[str, list[float]] = {f"{own}_beside_{load}_s": [] for own in steps for load in steps}
    for _ in range(repeats):
        for load, point in steps.items():
            alone_s = {own: await _seconds(one, p, besides_s) for own, p in steps.items()}
            async with _busy(other, point, bounds.max_tokens):
                for own, p in steps.items():
                    more_s[f"{own}_beside_{load}_s"].append(await _seconds(one, p, besides_s) - alone_s[own])
    return Beside(**{name: max(0.0, fmean(values)) for name, values in more_s.items()})  # they come and go: the mean counts, not the usual


async def _seconds(server: Server, point: Point, besides_s: float) -> float:
    return median([await seconds(server, point, besides_s) for _ in range(1 if point.batch else PROMPTS)])


@asynccontextmanager
async def _busy(server: Server, point: Point, max_tokens: int) -> AsyncIterator[None]:
    """It runs that kind of step meanwhile, without a pause: two prompts wait by turns, or as many as decode at once go on and on."""
    if point.batch:
        prompts = [server.prompt(point.context) for _ in range(point.batch)]
        await asyncio.gather(*(server.ask(prompt, 1) for prompt in prompts))  # from here on they are in its prefix cache
        tasks = [asyncio.create_task(_again(server, partial(list, prompt), max_tokens - point.context)) for prompt in prompts]
    else:
        tasks = [asyncio.create_task(_again(server, partial(server.prompt, point.tokens), 1)) for _ in range(2)]
    try:
        await server.ask(server.prompt(1), 1)
        yield
    finally:
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, UsageError):
                raise ended
        await server.ask(server.prompt(1), 1)  # behind what was hung up on


async def _again(server: Server, prompt: Callable[[], list[int]], output_tokens: int) -> None:
    while True:
        await server.ask(prompt(), output_tokens)
