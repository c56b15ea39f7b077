"""One experiment and its troubles, for both worlds."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast
from unittest.mock import patch

import msgspec
import numpy as np

from pdlab.core.types import Fetched, Joined, Migrated, Report, Request, Transferred
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.make_router import router
from pdlab.replay.log import EventLog
from pdlab.sim import build
from pdlab.workload.base import Workload
from tests.support.live_path import Asker, Site, play
from tests.support.views import Seen, Tolerated, Witness, blanked
from tests.support.virtual import VirtualLoop, run

HASH_TOKENS = 16
SYSTEM_PROMPTS, SYSTEM_TOKENS = 3, 192
TRAITS = ("prefixes", "priorities", "objectives", "best_of", "labels", "kill", "drain", "cut", "full")


def experiment(policy: str | dict[str, Any], traits: tuple[str, ...] = TRAITS, **changes: Any) -> Experiment:
    small: dict[str, Any] = {"engine": {"kv_blocks": 150}} if "full" in traits else {}
    faults: list[dict[str, Any]] = []
    if "kill" in traits:
        faults.append({"at_s": 5.25, "kill": "decode-1"})
    if "drain" in traits:
        faults.append({"at_s": 7.125, "drain": "prefill-1"})
    if "cut" in traits:
        faults.append({"at_s": 2.0, "cut": ["prefill-0", "decode-0"], "for_s": 3.0})
    mapping: dict[str, Any] = {
        "name": "sameness",
        "seed": 5,
        "model": "llama-3.1-8b",
        "workload": {"source": "synthetic", "requests": 1, "rate": 1.0, "prompt": 10, "output": 10},
        "cluster": {
            "instances": [
                {"role": "prefill", "count": 2, "hardware": "a10", "nics": 1},
                {"role": "decode", "count": 2, "hardware": "a10", "nics": 1},
                {"role": "decode", "hardware": "l4", "nics": 1, "name": "small", **small},
                {"role": "mixed", "hardware": "a10", "nics": 1},
            ],
            "network": {"gbytes_per_s": 5, "latency_us": 10},
            "detect_s": 0.0,
            "role_switch_s": 0.0,
            "reports": {"period_s": 0.3701},  # so that no report and no tick come at the same time
        },
        "engine": {"kv_blocks": 400},
        "policy": policy,
        "slo": {"ttft_s": 1.0, "tpot_s": 0.08},
        "limits": {"request_timeout_s": 60.0},
        "faults": faults,
    }
    mapping |= changes
    return Experiment.parse(mapping)


def workload(traits: tuple[str, ...] = TRAITS, requests: int = 100) -> Workload:
    rng = np.random.default_rng(4)
    prompts = np.minimum(2500, SYSTEM_TOKENS + rng.lognormal(5.5, 1.0, requests).astype(np.int32))
    hashes = [chain(i, int(tokens)) for i, tokens in enumerate(prompts)] if "prefixes" in traits else None
    return Workload(
        "sameness",
        arrival_s=np.cumsum(rng.exponential(0.09, requests)),
        prompt_tokens=prompts.astype(np.int32),
        output_tokens=np.minimum(200, 2 + rng.lognormal(3.8, 0.8, requests).astype(np.int32)).astype(np.int32),
        hashes=hashes,
        hash_tokens=HASH_TOKENS,
        priority=rng.choice([0, 0, 0, 1], requests).astype(np.int16) if "priorities" in traits else None,
        ttft_slo_s=np.where(rng.random(requests) < 0.3, 0.4, np.nan) if "objectives" in traits else None,
        tpot_slo_s=np.where(rng.random(requests) < 0.3, 0.06, np.nan) if "objectives" in traits else None,
        session=np.arange(requests, dtype=np.int32) % 7 - 1 if "labels" in traits else None,
        tenant=np.arange(requests, dtype=np.int32) % 3 - 1 if "labels" in traits else None,
        offline=(np.arange(requests) % 5 == 1).astype(np.int16) if "labels" in traits else None,
        n=counts(requests) if "best_of" in traits else None,
        best_of=counts(requests) if "best_of" in traits else None,
    )


def counts(requests: int) -> Any:
    """Every eighth request has two candidates."""
    return np.array([2 if i % 8 == 3 else 1 for i in range(requests)], np.int16)


def chain(i: int, tokens: int) -> tuple[int, ...]:
    """Prompts begin with one of a few system prompts, and go on by themselves; every tenth repeats the one before the last."""
    source = i - 2 if i % 10 == 9 else i
    system = SYSTEM_TOKENS // HASH_TOKENS
    return tuple(1 + source % SYSTEM_PROMPTS * system + u if u < system else (source + 1 << 20) + u for u in range(tokens // HASH_TOKENS))


def probes(work: Workload) -> list[Request]:
    return [] if work.hashes is None else [Request(-1, 0.0, int(work.prompt_tokens[i]), work.prompt_hashes(i)) for i in (0, 1, 9, 19)]


def simulated(plan: Experiment, work: Workload) -> list[Seen]:
    witness = Witness(probes(work))
    with patch.object(build, "router", lambda *args, **options: witness.watch(router(*args, **options))):  # which joins its instances
        world = build.world(plan, work, log=cast(EventLog, witness))
    world.run()
    return witness.seen


def live(plan: Experiment, work: Workload) -> list[Seen]:
    witness = Witness(probes(work))

    async def main(loop: VirtualLoop) -> dict[int, Asker]:
        return await play(loop, plan, work, cast(EventLog, witness), witness.watch, lambda site: trouble(site, plan))

    clients = run(main)
    assert len(clients) == len(work)
    return witness.seen


async def trouble(site: Site, plan: Experiment) -> None:
    """The experiment's faults, as they come about live."""
    await asyncio.gather(*(befall(site, fault) for fault in plan.faults))


async def befall(site: Site, fault: Any) -> None:
    await asyncio.sleep(fault.at_s - site.loop.time())
    if fault.kill is not None:
        await site.hosted[fault.kill].kill()
    elif fault.cut is not None:
        a, b = fault.cut
        site.cut(a, b, site.asking_s if fault.by_s is None else fault.by_s)
        await asyncio.sleep(fault.for_s)
        for way in ((a, b), (b, a)):
            del site.cuts[way]
    elif fault.drain is not None:
        await site.hosted[fault.drain].drain()


# ---------------------------------------------------------------- what differs by nature

PLACE = ("url", "descriptor", "model", "incarnation")
LINK = ("link_bytes_per_s", "host_bytes_per_s")


def _anywhere(seen: Seen) -> Seen:
    event = seen.event
    fields = getattr(event, "__struct_fields__", ())
    if isinstance(event, Joined):
        event = Joined(msgspec.structs.replace(event.spec, url="", descriptor="", model="", incarnation=0))
    elif "incarnation" in fields:
        event = msgspec.structs.replace(event, incarnation=0)
    if isinstance(event, Report):  # sets, though they are told in some order
        event = msgspec.structs.replace(event, stored=tuple(sorted(event.stored)), evicted=tuple(sorted(event.evicted)))
    return blanked(replace(seen, event=event), BLANK)


def _unmeasured(seen: Seen) -> Seen:
    event = seen.event
    if isinstance(event, Joined):
        event = Joined(msgspec.structs.replace(event.spec, link_bytes_per_s=0.0, host_bytes_per_s=0.0))
    elif isinstance(event, Transferred | Migrated | Fetched):
        event = msgspec.structs.replace(event, size_bytes=0, seconds=0.0)
    cluster = {name: value for name, value in seen.view.cluster.items() if name != "links._reached"}
    return blanked(replace(seen, event=event, view=replace(seen.view, cluster=cluster)), OF_LINKS)


OF_LINKS = frozenset({*(f"spec.{name}" for name in LINK), "transfer_s"})
BLANK = frozenset({*(f"spec.{name}" for name in PLACE), "report.incarnation", "report.stored", "report.evicted"})  # the event has these
EXCEPTIONS = (
    Tolerated("place", "a live instance has an address, and its registry numbers incarnations; policies go by neither", _anywhere),
    Tolerated("links", "a simulated link has its nominal bandwidth from the start, a live one what transfers have reached", _unmeasured),
)
