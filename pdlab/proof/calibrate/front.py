"""What serves the engines, as a running cluster shows it: the CPU time of HTTP, router and client, and what the router adds to a request.

The processor time of all but the engines is read before and after: of short requests, of long ones one at a time, and of several at once.
With R of a request, S of each step whose tokens are told and t of each of these tokens, a request of n tokens that decodes alone takes
R + n (S + t), and b that decode together take b R + n (S + b t).

On an engine's core that work costs the engine its time and no more: of one server's steps, 120 times 30 with its front end by turns on
the engine's core and elsewhere (models of 540 and of 210 MB), those beside it took 0.17 ms less of the engine's own CPU time, +- 0.16.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from pdlab.cost.profile import FrontCosts
from pdlab.proof.calibrate.grid import Bounds
from pdlab.proof.calibrate.over_http import median
from pdlab.proof.calibrate.stream import MeasuredServer, servers
from pdlab.real.host import processes
from pdlab.real.host.core_probe import Slower, never

SHORT_TOKENS, LONG_TOKENS = 2, 64  # of output
SHORT_REQUESTS, PROMPT_TOKENS = 12, 16
# By what share of a longer loop (pdlab.real.host.core_probe) a front end takes longer: 630 times 70 ms of asyncio and JSON on two cores
# of an AMD EPYC that were disturbed a tenth of the time, 0.72 and 0.77.
SHARE = 0.75
REPEATS, ROUTED = 3, 15


async def front(
    server: MeasuredServer,
    bounds: Bounds,
    cpu_s: Callable[[], float],
    repeats: int = REPEATS,
    slower: Slower = never,
) -> FrontCosts:
    """`cpu_s`: seconds that all but the engines have computed so far; what the machine's host adds to that (`slower`, of their core) is
    left out. Engines must have nothing else to do. Raises UsageError."""
    together = min(4, bounds.seqs)
    long = min(LONG_TOKENS, bounds.max_tokens - PROMPT_TOKENS)

    async def spent_s(requests: int, output_tokens: int, at_once: int) -> float:
        at_s, began_s = time.monotonic(), cpu_s()
        for _ in range(0, requests, at_once):
            await asyncio.gather(*(server.ask(server.prompt(PROMPT_TOKENS), output_tokens) for _ in range(at_once)))
        return (cpu_s() - began_s) / (1.0 + SHARE * (slower(at_s, time.monotonic(), False) - 1.0))

    await spent_s(together, SHORT_TOKENS, together)  # connections are made, and paths walked
    found = []
    for _ in range(repeats):
        short_s = await spent_s(SHORT_REQUESTS, SHORT_TOKENS, 1) / SHORT_REQUESTS
        found.append((short_s, await spent_s(1, long, 1), await spent_s(together, long, together)))
    return solved(*(median(list(column)) for column in zip(*found, strict=True)), long=long, together=together)


def solved(short_s: float, alone_s: float, together_s: float, *, long: int, together: int) -> FrontCosts:
    """R, S and t from the three; none is below nothing."""
    token_alone_s = max(0.0, (alone_s - short_s) / (long - SHORT_TOKENS))  # S + t
    request = max(0.0, short_s - SHORT_TOKENS * token_alone_s)
    step_of_all_s = max(0.0, (together_s - together * request) / long)  # S + b t
    token = min(token_alone_s, max(0.0, (step_of_all_s - token_alone_s) / (together - 1)))
    return FrontCosts(request_s=request, step_s=token_alone_s - token, token_s=token)


async def through(
    url: str,
    bounds: Bounds,
    vocab: int,
    direct_s: float,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    slower: Slower = never,
) -> tuple[float, FrontCosts]:
    """(what this router adds to the first token of a prompt of one token, which takes `direct_s` at an instance; the front end). All that
    serves runs below this process, which has no other engines. The gaps between tokens say nothing of it: the front end may be in them."""
    async with servers([url], vocab, temperature=temperature, seed=seed) as [server]:
        made = await front(server, bounds, lambda: processes.cpu_s(os.getpid())[1], slower=slower)
        heard = [await server.ask(server.prompt(1), 2) for _ in range(ROUTED)]
        return max(0.0, median([h.ttft_s for h in heard]) - direct_s), made
