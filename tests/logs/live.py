"""The live world on the virtual clock, over stand-ins: an experiment's requests, and what goes wrong while they are served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from pdlab.core.types import Drained, Leads, RegistryAway, Role, Suspected
from pdlab.experiment.experiment import Experiment
from pdlab.real.router.remote import Unfit
from pdlab.workload.spec import build
from tests.support.virtual_cluster import Run, StandIn, played

HASH_TOKENS = 16
SYSTEM_PROMPTS, SYSTEM_UNITS = 3, 12


def serve(experiment: Experiment, log_path: Path, *, trouble: Callable[[Run], Coroutine[Any, Any, None]]) -> None:
    work = build(experiment.workload, experiment.seed, experiment.base_dir)

    async def play(live: Run) -> None:
        sizes = zip(work.arrival_s.tolist(), work.prompt_tokens.tolist(), work.output_tokens.tolist(), strict=True)
        for i, (at_s, prompt, output) in enumerate(sizes):
            live.submit_at(at_s, prompt, output, _hashes(i, prompt))
        await trouble(live)
        await live.until(lambda: len(live.clients) == len(work))

    played(experiment, play, log_path, HASH_TOKENS)


def _hashes(i: int, prompt_tokens: int) -> tuple[int, ...]:
    """Prompts begin with one of a few system prompts."""
    return tuple(1 + i % SYSTEM_PROMPTS * SYSTEM_UNITS + unit for unit in range(min(SYSTEM_UNITS, prompt_tokens // HASH_TOKENS)))


async def until(live: Run, at_s: float) -> None:
    await asyncio.sleep(at_s - live.loop.time())


def busiest(live: Run, role: Role) -> StandIn:
    there = [instance for instance in live.rack.instances.values() if instance.is_alive and instance.role is role]
    return max(there, key=lambda instance: len(instance.jobs))


async def moves(live: Run) -> None:
    """Deaths, broken connections, a cut link, clients that go, one that falls silent."""
    rack = live.rack
    await until(live, 2.0)
    rack.cuts["prefill-0", "decode-0"] = 0.1
    await until(live, 3.5)
    for request_id in list(live.world.requests.by_id)[-3:]:
        live.world.cancel(request_id)
    await until(live, 4.0)
    busiest(live, Role.DECODE).cut()
    await until(live, 5.0)
    rack.cuts.clear()
    rack.instances["decode-0"].kill()
    await until(live, 6.5)
    rack.bring_up("decode-0")
    await until(live, 8.0)
    rack.instances["prefill-1"].kill()
    await until(live, 9.0)
    rack.bring_up("prefill-1")
    busiest(live, Role.DECODE).silent = True


async def flips(live: Run) -> None:
    """The registry loses sight of an instance, then is away itself; another router leads for a while; an operator drains; one dies; one
    says that it cannot serve a request after all."""
    instances, rack = live.world.instances, live.rack
    await until(live, 0.2)
    instances.other(Leads(True))
    await until(live, 4.0)
    instances.other(Suspected("mixed-2", 0))
    await until(live, 5.0)
    instances.other(Suspected("mixed-2", 0, lost=False))
    await until(live, 6.0)
    instances.other(RegistryAway())
    await until(live, 8.0)
    instances.other(RegistryAway(away=False))
    await until(live, 9.0)
    instances.other(Drained("mixed-3", 0))
    await until(live, 10.5)
    instances.other(Drained("mixed-3", 0, draining=False))
    await until(live, 11.0)
    instances.other(Leads(False))
    await until(live, 13.0)
    instances.other(Leads(True))
    job = next(iter(busiest(live, Role.DECODE).jobs.values()))
    job.inbox.put_nowait(Unfit("too long for its model"))
    await until(live, 18.0)
    rack.instances["mixed-1"].kill()
    await until(live, 20.0)
    rack.bring_up("mixed-1")
