"""Two servers of one machine, one that prefills and one that decodes: the steps of the first, what a hand-off between them costs, and how
much longer the steps of one take while the other computes.

The decode leg of a hand-off, to a server with nothing else to do, has its first token after r + transfer + D(1), with r what a request
costs besides steps: so the transfer is what is left of TTFT, over prompts of several lengths. The prefill leg is a request of one token,
answered when its KV is put aside; what that takes besides the first token of any request counts as set-up, too.

Where both run below this process, a probe of their cores says when the machine's host slowed them, and what their router and its members
compute is seen, too.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Sequence

import numpy as np

from pdlab.cost.profile import InstanceProfile, Moved, TransferFit
from pdlab.proof.calibrate.front import front
from pdlab.proof.calibrate.grid import Bounds
from pdlab.proof.calibrate.neighbour import beside, neighbours
from pdlab.proof.calibrate.over_http import OUTPUT_TOKENS, median
from pdlab.proof.calibrate.run import BESIDE, CalibrationPlan, Say, of_server
from pdlab.proof.calibrate.stream import MeasuredServer, servers
from pdlab.real.host import processes
from pdlab.real.host.core_probe import Pace, Slower, slower_on

SHARES = (0.05, 0.25, 0.5, 0.75, 1.0)  # of the longest prompt whose KV is moved
REPEATS, ROUTED = 5, 15  # of a length, of a request through a router
LEAST_S = 1e-6  # tokens that come together are no time apart


def of_pair(
    prefill_url: str,
    decode_url: str,
    model_name: str,
    plan: CalibrationPlan,
    say: Say,
    *,
    max_batch_tokens: int,
    max_seqs: int,
    max_tokens: int,
    kv_dtype: str,
    pace: Pace | None = None,
    cores: Sequence[int] = (),
) -> InstanceProfile:
    """`of_server` of the first while the second has nothing to do, and what is between them. `pace` looks at `cores`, those of the first.
    Raises UsageError."""
    alone = of_server(
        prefill_url,
        model_name,
        plan,
        lambda what, share: say(what, 0.7 * share),
        max_batch_tokens=max_batch_tokens,
        max_seqs=max_seqs,
        max_tokens=max_tokens,
        kv_dtype=kv_dtype,
        loops=lambda spans: pace.mean_s(cores, spans) if pace is not None else (),
    )
    return asyncio.run(_between(alone, prefill_url, decode_url, plan, say, slower_on(pace, cores, alone.unsteady)))


async def _between(
    alone: InstanceProfile, prefill_url: str, decode_url: str, plan: CalibrationPlan, say: Say, slower: Slower
) -> InstanceProfile:
    engine, besides_s = alone.engine, alone.overheads.request_s
    bounds = Bounds(engine.max_batch_tokens, engine.max_seqs, engine.max_tokens, engine.kv_blocks * engine.block_tokens)
    asked = servers((prefill_url, decode_url), alone.model.vocab, temperature=plan.temperature, seed=plan.seed + 1)
    async with asked as [prefill, decode]:
        say("transfers", 0.7)
        longest = bounds.max_tokens - 2 * OUTPUT_TOKENS
        lengths = [max(1, int(share * longest)) for share in SHARES]
        handoff_s, moved = await transfers(prefill, decode, lengths, besides_s, alone.model.kv_bytes_per_token, seed=plan.seed)
        say("neighbours", 0.8)
        seen = await neighbours(prefill, decode, bounds, besides_s, budget_s=BESIDE * plan.seconds, slower=slower, unsteady=alone.unsteady)
    say("done", 1.0)
    overheads = alone.overheads.model_copy(update={"handoff_s": handoff_s})
    return alone.model_copy(
        update={
            "overheads": overheads,
            "transfer": moved,
            "beside": beside(seen),
            "beside_seen": tuple(seen),
            "how": f"{prefill_url}, {decode_url}",
        }
    )


# ------------------------------------------------------------ transfers


async def transfers(
    prefill: MeasuredServer,
    decode: MeasuredServer,
    lengths: Sequence[int],
    besides_s: float,
    token_bytes: int,
    *,
    repeats: int = REPEATS,
    seed: int = 0,
) -> tuple[float, TransferFit]:
    """(set-up seconds, the rest). What a prefill leg takes longer than the first token of a plain request is part of the set-up."""
    found: dict[int, list[float]] = {length: [] for length in lengths}
    longer: list[float] = []
    rng = random.Random(seed)
    for number in range(repeats + 1):  # in the first the two get to know each other
        for length in rng.sample(list(found), len(found)):
            plain, prompt = await prefill.ask(prefill.prompt(length), 2), prefill.prompt(length)
            began_s = time.perf_counter()
            kept = await prefill.prefill(prompt)
            leg_s = time.perf_counter() - began_s
            heard = await decode.ask(prompt, OUTPUT_TOKENS, kept)
            if number:
                found[length].append(heard.ttft_s - besides_s - heard.gap_s)
                longer.append(leg_s - plain.ttft_s)
    setup_s, moved = fitted(found, token_bytes)
    return setup_s + max(0.0, median(longer)), moved


def fitted(found: dict[int, list[float]], token_bytes: int) -> tuple[float, TransferFit]:
    """Of seconds by the number of tokens, which may be below nothing: as they are differences, they err by as much where they are small,
    so all lengths count alike."""
    sizes = np.array([tokens * token_bytes for tokens in found], dtype=float)
    took_s = np.array([median(times) for times in found.values()])
    s_per_byte = max(0.0, float(np.polyfit(sizes, took_s, 1)[0]))
    setup_s = max(0.0, float(np.mean(took_s - s_per_byte * sizes)))
    off = np.abs(setup_s + s_per_byte * sizes - took_s).mean() / max(LEAST_S, float(took_s.mean()))
    moved = tuple(Moved(bytes=tokens * token_bytes, seconds=tuple(times)) for tokens, times in found.items())
    return setup_s, TransferFit(transport="the servers' own", bytes_per_s=1.0 / max(s_per_byte, 1e-12), mean_error=float(off), moved=moved)


# ------------------------------------------------------------ a router


def behind(
    router_url: str,
    alone: InstanceProfile,
    prefill_url: str,
    decode_url: str,
    plan: CalibrationPlan,
    *,
    pace: Pace | None = None,
    cores: Sequence[int] = (),
) -> InstanceProfile:
    """With what a router before the two adds to a request, half of it to each leg; and, where `pace` looks at `cores`, on which all but the
    two runs below this process, what that computes. Raises UsageError."""
    watched_s = slower_on(pace, cores, alone.unsteady) if pace is not None else None
    return asyncio.run(_behind(router_url, alone, prefill_url, decode_url, plan, watched_s))


async def _behind(
    router_url: str, alone: InstanceProfile, prefill_url: str, decode_url: str, plan: CalibrationPlan, slower: Slower | None
) -> InstanceProfile:
    engine, overheads, made = alone.engine, alone.overheads, alone.front
    asked = servers((router_url, prefill_url, decode_url), alone.model.vocab, temperature=plan.temperature, seed=plan.seed + 3)
    async with asked as [router, prefill, decode]:
        more_s: list[float] = []
        for _ in range(ROUTED + 1):
            began_s, prompt = time.perf_counter(), prefill.prompt(1)
            told = await prefill.prefill(prompt)
            direct_s = time.perf_counter() - began_s + (await decode.ask(prompt, 2, told)).ttft_s
            more_s.append((await router.ask(router.prompt(1), 2)).ttft_s - direct_s)
        if slower is not None:
            bounds = Bounds(engine.max_batch_tokens, engine.max_seqs, engine.max_tokens, engine.kv_blocks * engine.block_tokens)
            made = await front(router, bounds, lambda: processes.cpu_s(os.getpid())[1], slower=slower)
    routed = overheads.model_copy(update={"request_s": overheads.request_s + max(0.0, median(more_s[1:])) / 2})
    return alone.model_copy(update={"overheads": routed, "front": made})
