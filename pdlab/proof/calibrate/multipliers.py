"""Two multipliers of the shipped step times, from as few as 20 requests to a running server: what its prompts and its decode steps take,
measured / computed.

Half of the requests go one by one, with prompts of four lengths: each has a first token and, after it, steps of its own. The others go
eight at a time and decode together. What a request costs besides steps is learned from three prompts of one token, as the long form does.

A multiplier's logarithm is, before anything is measured, a normal variable about nothing whose spread is what the coefficients say of
their own error (95 % within `CostError`). The mean m of n measured ones has the variance v = s^2 / n + t^2, s their standard deviation and
t what few lengths and batches say too little of others. What is written is the mean of what follows, m p / (p + v) with the prior's
variance p, and 95 % lie within 1.96 sqrt(p v / (p + v)). So few or scattered requests move little, and many move all the way.
Source: the normal variable with a normal prior, Gelman et al., Bayesian Data Analysis (2013), section 2.5.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import fmean, variance

from pdlab.core.types import UsageError
from pdlab.cost.base import Cost
from pdlab.cost.error import CostError
from pdlab.proof.calibrate import over_http
from pdlab.proof.calibrate.stream import MeasuredServer

FEWEST = 20
SINGLE_TOKENS, TOGETHER_TOKENS = 12, 24
TOGETHER = 8
LENGTHS = (256, 512, 1024, 2048)
ONE_TOKEN = 3  # requests that learn what one costs besides steps
ELSEWHERE = 0.05  # t, of the logarithm
NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class Multiplier:
    """Measured / computed: as it is written, and the ends of its 95 % interval. `measured` is what the requests alone say."""

    value: float
    low: float
    high: float
    measured: float
    points: int
    expected: bool  # the requests alone lie within what the coefficients say of their error


@dataclass(frozen=True, slots=True)
class Multipliers:
    """Of prompts and of decode steps; `request_s` is what a request was found to cost besides."""

    prefill: Multiplier
    decode: Multiplier
    request_s: float
    requests: int


def shrunk(logs: Sequence[float], spread: float) -> Multiplier:
    """Of measured logarithms, at least one, and a prior of 95 % within `spread`."""
    mean = fmean(logs)
    prior = (spread / NORMAL_95) ** 2
    noise = (variance(logs) / len(logs) if len(logs) > 1 else 0.0) + ELSEWHERE**2
    centre, width = mean * prior / (prior + noise), NORMAL_95 * sqrt(prior * noise / (prior + noise))
    return Multiplier(exp(centre), exp(centre - width), exp(centre + width), exp(mean), len(logs), abs(mean) <= spread)


async def measure(
    server: MeasuredServer, cost: Cost, error: CostError, requests: int, most_tokens: int, say: Callable[[str, float], None]
) -> Multipliers:
    """Ask so many requests of `server`, and hold them against `cost`. Raises UsageError where they are fewer than 20, or prompts have no
    room."""
    if requests < FEWEST:
        raise UsageError(f"--requests {requests}: {FEWEST} are needed at least")
    lengths = [n for n in LENGTHS if n + TOGETHER_TOKENS <= most_tokens]
    if not lengths:
        raise UsageError(f"--max-model-len {most_tokens} has no room for a prompt of {LENGTHS[0]} tokens")
    rounds = max(1, (requests - ONE_TOKEN) // 2 // TOGETHER)
    singles = requests - ONE_TOKEN - rounds * TOGETHER
    besides_s = await over_http.request_s(server, ONE_TOKEN - 2)  # it leaves two more out, while the server warms up
    prefill, decode = [], []
    for k in range(singles):
        length = lengths[k % len(lengths)]
        heard = await server.ask(server.prompt(length), SINGLE_TOKENS)
        prefill.append(log(max(1e-6, heard.ttft_s - besides_s) / cost.prefill_s([(length, 0)])))
        decode.append(log(max(1e-6, heard.gap_s) / cost.decode_s(1, length + SINGLE_TOKENS // 2)))
        say("one by one", (ONE_TOKEN + k + 1) / requests)
    for k in range(rounds):
        length = lengths[k % len(lengths)]
        heard_all = await asyncio.gather(*(server.ask(server.prompt(length), TOGETHER_TOKENS) for _ in range(TOGETHER)))
        context = TOGETHER * (length + TOGETHER_TOKENS // 2)
        decode.append(log(max(1e-6, over_http.gap_s(heard_all)) / cost.decode_s(TOGETHER, context)))
        say("together", (ONE_TOKEN + singles + (k + 1) * TOGETHER) / requests)
    return Multipliers(shrunk(prefill, error.ttft), shrunk(decode, error.tpot), besides_s, requests)
