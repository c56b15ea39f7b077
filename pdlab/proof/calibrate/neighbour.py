"""How much longer the steps of one server take while another of the same machine computes: engines of one CPU share its caches and its
memory, and where there are no more cores than engines, what serves them runs on the engines' cores. So both are seen through HTTP.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from statistics import fmean, median
from typing import Literal

from pdlab.core.types import UsageError
from pdlab.cost.profile import BesideSeen, CoreSpeed, Interference, Point
from pdlab.proof.calibrate.grid import Bounds
from pdlab.proof.calibrate.over_http import OUTPUT_TOKENS, seconds
from pdlab.proof.calibrate.stream import MeasuredServer
from pdlab.real.host.core_probe import STEADY, Slower, never

REPEATS, LEAST = 6, 2  # of each kind of steps beside each other
PROMPTS, LONG_PROMPTS, DECODES = 5, 3, 2  # each time: of a prompt one hears once, of decodes together many times
TOKENS, LONG_TOKENS = 48, 192  # of a prompt: a neighbour costs it something anyway, and something for each token


async def neighbours(
    one: MeasuredServer,
    other: MeasuredServer,
    bounds: Bounds,
    besides_s: float,
    *,
    budget_s: float = math.inf,
    slower: Slower = never,
    unsteady: CoreSpeed = STEADY,
) -> list[BesideSeen]:
    """How much longer steps of `one` take while `other` computes; each difference is of two measurements one right after the other, again
    and again until the budget is spent. What the machine's host does to the core of `one` meanwhile (`slower`), and so to its steps, is
    left out."""

    async def of(point: Point) -> float:
        repeats = DECODES if point.batch else LONG_PROMPTS if point.tokens > TOKENS else PROMPTS
        found = []
        for _ in range(repeats):
            began_s = time.monotonic()
            took_s = await seconds(one, point, besides_s)
            prefill = not point.batch
            found.append(took_s / unsteady.longer(slower(began_s, time.monotonic(), prefill), prefill=prefill))
        return fmean(found) if point.batch else median(found)

    longest = bounds.max_tokens - 2 * OUTPUT_TOKENS
    few, many = (min(tokens, bounds.step_tokens, longest) for tokens in (TOKENS, LONG_TOKENS))
    decode = Point(batch=min(4, bounds.seqs), context=min(128, longest // 2))
    loads: dict[Literal["prefill", "decode"], Point] = {"prefill": Point(tokens=few), "decode": decode}
    steps = [Point(tokens=few), Point(tokens=many), decode]
    seen = []
    until_s = time.monotonic() + budget_s
    for number in range(REPEATS):
        if number >= LEAST and time.monotonic() > until_s:
            break
        for load, point in loads.items():
            alone_s = [await of(p) for p in steps]
            async with _busy(other, point, bounds.max_tokens):
                few_s, many_s, decode_s = [await of(p) - alone for p, alone in zip(steps, alone_s, strict=True)]
            seen.append(BesideSeen(load=load, few_tokens=few, many_tokens=many, few_s=few_s, many_s=many_s, decode_s=decode_s))
    return seen


def beside(seen: Sequence[BesideSeen]) -> Interference:
    """The median of what was seen, or nothing. Only that is held above nothing: one by one, chance would add up."""
    found: dict[str, float] = {}
    for load in dict.fromkeys(s.load for s in seen):
        of = [s for s in seen if s.load == load]
        few, many = of[0].few_tokens, of[0].many_tokens
        few_s, many_s, decode_s = (median([getattr(s, name) for s in of]) for name in ("few_s", "many_s", "decode_s"))
        token_s = max(0.0, (many_s - few_s) / (many - few)) if many > few else 0.0
        found[f"prefill_token_beside_{load}_s"] = token_s
        found[f"prefill_beside_{load}_s"] = max(0.0, (few_s + many_s - (few + many) * token_s) / 2)  # through both, or level between them
        found[f"decode_beside_{load}_s"] = max(0.0, decode_s)
    return Interference(**found)


@asynccontextmanager
async def _busy(server: MeasuredServer, point: Point, max_tokens: int) -> AsyncIterator[None]:
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


async def _again(server: MeasuredServer, prompt: Callable[[], list[int]], output_tokens: int) -> None:
    while True:
        await server.ask(prompt(), output_tokens)
