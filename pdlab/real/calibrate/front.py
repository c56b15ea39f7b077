"""What serves the engines, as a running cluster shows it: the CPU time of HTTP, router and client, and what the router adds to a request.

The processor time of all but the engines is read before and after: of short requests, of long ones one at a time, and of several at once.
With R of a request, S of each step whose tokens are told and t of each of these tokens, a request of n tokens that decodes alone takes
R + n (S + t), and b that decode together take b R + n (S + b t).

On an engine's core that work costs the engine more than its time: it comes in small pieces, and after each the engine's caches are cold. By
how much is seen of one server, whose steps are timed with its front end on the engine's core and on another, by turns.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from statistics import fmean

from pdlab.cost.profile import Front, Unsteady
from pdlab.real import processes
from pdlab.real.calibrate.grid import Bounds
from pdlab.real.calibrate.over_http import gap_s, median
from pdlab.real.calibrate.stream import Heard, Server, connect, model_of
from pdlab.real.pace import STEADY, Slower, never

SHORT_TOKENS, LONG_TOKENS = 2, 64  # of output
SHORT_REQUESTS, PROMPT_TOKENS = 12, 16
# By what share of a longer loop (pdlab.real.pace) a front end takes longer: 630 times 70 ms of asyncio and JSON on two cores of an AMD EPYC
# that were disturbed a tenth of the time, 0.72 and 0.77.
SHARE = 0.75
CROWDED_TOKENS, CROWDED = 32, 8  # of output; repeats
REPEATS, ROUTED = 3, 15


async def front(
    server: Server,
    bounds: Bounds,
    cpu_s: Callable[[], float],
    repeats: int = REPEATS,
    slower: Slower = never,
) -> Front:
    """`cpu_s`: seconds that all but the engines have computed so far; what the machine's host adds to that (`slower`, of their core) is
    left out. Engines must have nothing else to do. Raises UsageError."""
    together = min(4, bounds.seqs)
    long = min(LONG_TOKENS, bounds.max_tokens - PROMPT_TOKENS)

    async def spent_s(requests: int, output_tokens: int, at_once: int) -> float:
        at_s, began_s = time.monotonic(), cpu_s()
        for _ in range(0, requests, at_once):
            await asyncio.gather(*(server.ask(server.prompt(PROMPT_TOKENS), output_tokens) for _ in range(at_once)))
        return (cpu_s() - began_s) / (1.0 + SHARE * (slower(at_s, time.monotonic()) - 1.0))

    await spent_s(together, SHORT_TOKENS, together)  # connections are made, and paths walked
    found = []
    for _ in range(repeats):
        short_s = await spent_s(SHORT_REQUESTS, SHORT_TOKENS, 1) / SHORT_REQUESTS
        found.append((short_s, await spent_s(1, long, 1), await spent_s(together, long, together)))
    return solved(*(median(list(column)) for column in zip(*found, strict=True)), long=long, together=together)


def solved(short_s: float, alone_s: float, together_s: float, *, long: int, together: int) -> Front:
    """R, S and t from the three; none is below nothing."""
    token_alone_s = max(0.0, (alone_s - short_s) / (long - SHORT_TOKENS))  # S + t
    request = max(0.0, short_s - SHORT_TOKENS * token_alone_s)
    step_of_all_s = max(0.0, (together_s - together * request) / long)  # S + b t
    token = min(token_alone_s, max(0.0, (step_of_all_s - token_alone_s) / (together - 1)))
    return Front(request_s=request, step_s=token_alone_s - token, token_s=token)


async def crowding(
    server: Server,
    bounds: Bounds,
    cpu_s: Callable[[], float],
    crowd: Callable[[bool], None],
    *,
    repeats: int = CROWDED,
    slower: Slower = never,
    unsteady: Unsteady = STEADY,
) -> float:
    """By how many seconds an engine's steps take longer for each second that what serves it computes on its core; 1 at least. `crowd` puts
    it there (True), or elsewhere; `cpu_s` as for `front`. What the machine's host does to the engine's core meanwhile (`slower`) is left
    out. Raises UsageError."""
    long = min(CROWDED_TOKENS, bounds.max_tokens - PROMPT_TOKENS)

    async def asked(at_once: int, output_tokens: int) -> list[Heard]:
        return await asyncio.gather(*(server.ask(server.prompt(PROMPT_TOKENS), output_tokens) for _ in range(at_once)))

    async def step_s(at_once: int, beside: bool) -> tuple[float, float]:
        """How long a step takes, and how long what serves it computes for it."""
        crowd(beside)
        began_s = cpu_s()
        await asked(at_once, SHORT_TOKENS)
        short_s = cpu_s() - began_s
        at_s = time.monotonic()
        heard = await asked(at_once, long)
        host = slower(at_s, time.monotonic())
        served_s = (cpu_s() - began_s - 2 * short_s) / (long - SHORT_TOKENS)
        return gap_s(heard) / unsteady.longer(host, prefill=False), served_s / (1.0 + SHARE * (host - 1.0))

    found = []
    for at_once in dict.fromkeys((1, min(4, bounds.seqs))):
        longer_s, served_s = [], []
        for number in range(repeats):
            order = (True, False) if number % 2 else (False, True)  # a machine that slows down does so for both
            seen = {beside: await step_s(at_once, beside) for beside in order}
            longer_s.append(seen[True][0] - seen[False][0])
            served_s.append(seen[True][1])
        if median(served_s) > 0.0:
            found.append(median(longer_s) / median(served_s))
    return max(1.0, fmean(found or [1.0]))


async def through(
    url: str,
    bounds: Bounds,
    vocab: int,
    direct_s: float,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    slower: Slower = never,
) -> tuple[float, Front]:
    """(what this router adds to the first token of a prompt of one token, which takes `direct_s` at an instance; the front end). All that
    serves runs below this process, which has no other engines. The gaps between tokens say nothing of it: the front end may be in them."""
    async with await connect() as http:
        server = Server(http, url, await model_of(http, url), vocab, temperature=temperature, seed=seed)
        made = await front(server, bounds, lambda: processes.cpu_s(os.getpid())[1], slower=slower)
        heard = [await server.ask(server.prompt(1), 2) for _ in range(ROUTED)]
        return max(0.0, median([h.ttft_s for h in heard]) - direct_s), made
