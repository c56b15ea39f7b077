"""What serves the engines, as a running cluster shows it: the CPU time of HTTP, router and client, and what the router adds to a request.

The processor time of all but the engines is read before and after: of short requests, of long ones one at a time, and of several at once.
With R of a request, S of each step whose tokens are told and t of each of these tokens, a request of n tokens that decodes alone takes
R + n (S + t), and b that decode together take b R + n (S + b t).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from pdlab.cost.profile import Front
from pdlab.real import processes
from pdlab.real.calibrate.grid import Bounds
from pdlab.real.calibrate.over_http import median
from pdlab.real.calibrate.stream import Server, connect, model_of

SHORT_TOKENS, LONG_TOKENS = 2, 64  # of output
SHORT_REQUESTS, PROMPT_TOKENS = 12, 16
REPEATS, ROUTED = 3, 15


async def front(server: Server, bounds: Bounds, cpu_s: Callable[[], float], repeats: int = REPEATS) -> Front:
    """`cpu_s`: seconds that all but the engines have computed so far. Engines must have nothing else to do. Raises UsageError."""
    together = min(4, bounds.seqs)
    long = min(LONG_TOKENS, bounds.max_tokens - PROMPT_TOKENS)

    async def spent_s(requests: int, output_tokens: int, at_once: int) -> float:
        began_s = cpu_s()
        for _ in range(0, requests, at_once):
            await asyncio.gather(*(server.ask(server.prompt(PROMPT_TOKENS), output_tokens) for _ in range(at_once)))
        return cpu_s() - began_s

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


async def through(url: str, bounds: Bounds, vocab: int, direct_s: float, *, temperature: float = 0.0, seed: int = 0) -> tuple[float, Front]:
    """(what this router adds to the first token of a prompt of one token, which takes `direct_s` at an instance; the front end). All that
    serves runs below this process, which has no other engines. The gaps between tokens say nothing of it: the front end may be in them."""
    async with await connect() as http:
        server = Server(http, url, await model_of(http, url), vocab, temperature=temperature, seed=seed)
        made = await front(server, bounds, lambda: processes.cpu_s(os.getpid())[1])
        heard = [await server.ask(server.prompt(1), 2) for _ in range(ROUTED)]
        return max(0.0, median([h.ttft_s for h in heard]) - direct_s), made
