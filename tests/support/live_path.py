"""The live world on the virtual clock, each instance on the live path: what its engine says when it is ready becomes its spec, a `Member`
registers and reports it, records and reports pass the registry's codec, and the router's `Members` let it in.

In place of an engine stands `StandIn`, with the simulator's cost model and network; in place of HTTP, calls.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from pdlab.core.instance_spec import Placed, instance_spec
from pdlab.core.router import Router
from pdlab.core.types import InstanceSpec, Report, Role
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.make_router import router
from pdlab.real.api.errors import ApiError
from pdlab.real.api.service import Service
from pdlab.real.engine.messages import Ready, Sampling, Tokens
from pdlab.real.instance.member import Member, measured_of
from pdlab.real.net.http import Broken
from pdlab.real.net.wire import PROTOCOL, Continue
from pdlab.real.registry.memory import MemoryStore
from pdlab.real.registry.registry import Registry
from pdlab.real.router.remote import Busy, Fenced, Hear, LegAsk, Prefilled
from pdlab.real.router.roster import Members, follow
from pdlab.real.router.world import LiveWorld
from pdlab.real.transfer.descriptor import Descriptor, Geometry
from pdlab.replay.log import EventLog
from pdlab.sim.plans import InstancePlan
from pdlab.workload.base import Floats, Workload
from tests.support.virtual import VirtualLoop
from tests.support.virtual_cluster import Rack, StandIn, word

MODEL = "the model"
LONGEST_S = 300.0  # of a run


class Door:
    """Of a `Service`, what a `Member` opens and closes."""

    def __init__(self, hosted: Hosted) -> None:
        self._hosted = hosted
        self.closed, self.fenced = "", False
        self.on_end: Callable[[], None]
        self.metrics = SimpleNamespace(place=None)

    @property
    def in_flight(self) -> int:
        return len(self._hosted.engine.jobs)

    def check(self, ask: LegAsk) -> None:
        """As `Service.check_open`."""
        here = ask.params is not None and ask.params.remote_engine_id == self._hosted.engine.name
        if self.fenced:
            raise Fenced("it has lost its place")
        if self.closed and not here:
            raise Busy(self.closed)

    def break_off(self, error: ApiError) -> None:
        self._hosted.engine.cut()


class Load:
    """Of an `Exchanging` engine, what a `Member` asks."""

    def __init__(self, engine: StandIn) -> None:
        self._engine = engine
        self.on_load: Callable[[], None]
        engine.on_settled = lambda: self.on_load()

    @property
    def down(self) -> str | None:
        return None if self._engine.is_alive else "killed"

    @property
    def load(self) -> SimpleNamespace:
        return SimpleNamespace(idle=self._engine.worker.idle)

    def report(self, name: str, incarnation: int) -> Report:
        return msgspec.structs.replace(self._engine.worker.report(self._engine.loop.time()), instance=name, incarnation=incarnation)


class Hosted:
    """One process: an engine, its door, its membership. It is the `Remote` that the router's world speaks to."""

    def __init__(self, site: Site, plan: InstancePlan, name: str, role: Role) -> None:
        self.site = site
        spec = spec_of_ready(plan, name, role)
        self.engine = StandIn(site, plan, spec)
        self.door = Door(self)
        limits, reports = site.experiment.limits, site.experiment.cluster.reports
        self.member = Member(
            cast(Service, self.door),
            cast(Any, Load(self.engine)),
            site.registry,
            spec,
            report_s=reports.period_s,
            lease_s=limits.lease_s,
            left=self._left,
        )

    @property
    def spec(self) -> InstanceSpec:
        return self.member.spec

    def _left(self) -> None:
        self.engine.is_alive = False

    async def prefill(self, ask: LegAsk) -> Prefilled:
        self.door.check(ask)
        try:
            return await self.engine.prefill(ask)
        finally:
            self.door.on_end()

    async def decode(self, ask: LegAsk, hear: Hear) -> None:
        self.door.check(ask)
        try:
            await self.engine.decode(ask, hear)
        finally:
            self.door.on_end()

    async def proceed(self, go: Continue) -> None:
        await self.engine.proceed(go)

    async def release(self, lease: str) -> None:
        await self.engine.release(lease)

    async def renew(self, lease: str) -> bool:
        return await self.engine.renew(lease)

    async def alive(self, within_s: float = 1.0) -> bool | None:
        return await self.engine.alive(within_s)

    async def load(self) -> Report | None:
        return await self.engine.load()

    async def rejoin(self) -> None:
        if self.engine.is_alive:
            self.member.rejoin(self.spec.incarnation)

    async def switch(self, role: Role) -> None:
        self._ask(lambda: self.member.switch(role))

    async def drain(self) -> None:
        self._ask(self.member.drain)

    def _ask(self, what: Callable[[], None]) -> None:
        if not self.engine.is_alive:
            raise Broken("no answer")
        try:
            what()
        except ApiError as error:
            raise Broken(str(error)) from None

    def close(self) -> None:
        self.engine.close()

    async def kill(self) -> None:
        """The process is gone: nothing is said to anybody."""
        self.engine.kill()
        member = self.member
        for task in (member._keeping, member._changing):
            if task is not None:
                task.cancel()
        if member._registration is not None:
            await member._registration.drop()


class Site(Rack):
    """The instances of an experiment, and the registry that they are in."""

    def __init__(self, loop: VirtualLoop, experiment: Experiment, hash_tokens: int) -> None:
        super().__init__(loop, experiment, hash_tokens)
        self.store = MemoryStore(loop.time)
        self.registry = Registry(self.store, loop.time)
        self.hosted: dict[str, Hosted] = {}
        self.instances = ByUrl()

    def connect(self, spec: InstanceSpec) -> Any:
        return self.hosted[spec.name]

    async def join(self, name: str) -> None:
        """Start it: its first incarnation or the next."""
        plan = self.plans[name]
        hosted = self.hosted[name] = Hosted(self, plan, name, plan.placement.role)
        self.instances[name] = hosted.engine
        await hosted.member.join()

    async def follow(self, world: LiveWorld) -> None:
        async def speaks(_: InstanceSpec) -> int:
            return PROTOCOL

        await follow(self.registry, world.instances, Members(MODEL), ask=speaks)

    async def close(self) -> None:
        for hosted in self.hosted.values():
            keeping = hosted.member._keeping
            if keeping is not None and keeping.done() and not keeping.cancelled():
                keeping.result()
            await hosted.member.close()
        await self.registry.close()


# ---------------------------------------------------------------- a run


class Asker:
    """A client: what it got of each candidate, checked as it comes."""

    def __init__(self, prompt_tokens: int, best_of: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.made = [0] * best_of
        self.finish = [""] * best_of

    def take(self, tokens: Tokens) -> None:
        candidate = tokens.candidate
        assert not self.finish[candidate], f"{tokens} after the end"
        assert tokens.start == self.made[candidate], f"index {tokens.start} after {self.made[candidate]} tokens"
        for token in tokens.tokens:
            assert token == word(tokens.id, self.prompt_tokens + self.made[candidate]), f"a wrong token: {tokens}"
            self.made[candidate] += 1
        self.finish[candidate] = tokens.finish or ""


async def play(
    loop: VirtualLoop,
    experiment: Experiment,
    workload: Workload,
    log: EventLog,
    watch: Callable[[Router], Router],
    trouble: Callable[[Site], Coroutine[Any, Any, None]],
) -> dict[int, Asker]:
    """Serve a workload to its end, while `trouble` happens. `watch` is shown the router before it begins."""
    site = Site(loop, experiment, workload.hash_tokens)
    world = site.world = LiveWorld(
        watch(router(experiment, hash_tokens=workload.hash_tokens)),
        site.connect,
        transfer=experiment.transfer,
        now=loop.time,
        unix=loop.time,
        log=log,
        seed=experiment.seed,
        start=site.start if experiment.cluster.autoscale.enabled else None,
        name="router",
    )
    clients: dict[int, Asker] = {}
    following = asyncio.create_task(site.follow(world))
    await settled(loop)
    for name in site.plans:
        await site.join(name)
        await settled(loop)
    world.open()
    for i in range(len(workload)):
        loop.call_at(float(workload.arrival_s[i]), submit, world, workload, i, clients)
    making = asyncio.create_task(trouble(site))
    await making
    while len(clients) < len(workload) or world.requests.by_id:
        assert loop.time() < LONGEST_S, f"requests {list(world.requests.by_id)} do not end"
        await asyncio.sleep(0.05)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await world.close()
    await site.close()
    return clients


async def settled(loop: VirtualLoop) -> None:
    """All that follows from what has happened by now has happened."""
    done = loop.create_future()
    loop.when_quiet(lambda: done.set_result(None))
    await done


def submit(world: LiveWorld, workload: Workload, i: int, clients: dict[int, Asker]) -> None:
    prompt, output = int(workload.prompt_tokens[i]), int(workload.output_tokens[i])
    best_of = 1 if workload.best_of is None else int(workload.best_of[i])
    client = clients[i] = Asker(prompt, best_of)
    how = Sampling(max_tokens=output, temperature=0.0, best_of=best_of)
    number = world.submit(
        [word(i, place) for place in range(prompt)],
        how,
        client.take,
        hashes=workload.prompt_hashes(i),
        priority=0 if workload.priority is None else int(workload.priority[i]),
        ttft_slo_s=own(workload.ttft_slo_s, i),
        tpot_slo_s=own(workload.tpot_slo_s, i),
        **workload.labels(i, workload.sessions()),
    )
    assert number == i, "requests are numbered as they come"


def own(column: Floats | None, i: int) -> float | None:
    return None if column is None or math.isnan(column[i]) else float(column[i])


class ByUrl(dict[str, StandIn]):
    def __missing__(self, url: str) -> StandIn:
        return self[url.removeprefix("http://")]


def spec_of_ready(plan: InstancePlan, name: str, role: Role) -> InstanceSpec:
    """As `pdlab serve` makes it, of what an engine says when it is ready."""
    engine = plan.placement.engine
    geometry = Geometry(32, 8, engine.block_tokens, 128, "bfloat16", MODEL)
    descriptor = Descriptor(name, "1", plan.placement.host, geometry, plan.kv_blocks)
    spare = int(engine.watermark * plan.kv_blocks)
    most = (plan.kv_blocks - spare) * engine.block_tokens + 1
    ready = Ready(
        MODEL,
        min(plan.context_tokens or most, most),
        1 << 16,
        engine.block_tokens,
        plan.kv_blocks,
        "virtual",
        "bfloat16",
        block_bytes=plan.block_bytes,
        descriptor=descriptor.encode(),
        engine_id=name,
        context_tokens=plan.context_tokens,
        prefill_profile=plan.prefill_profile,  # as measured before the engine is ready
        decode_profile=plan.decode_profile,
    )
    placed = Placed(
        name=name,
        role=role,
        host=plan.placement.host,
        rack=plan.placement.rack,
        zone=plan.placement.zone,
        url=f"http://{name}",
        model=MODEL,
        max_seqs=engine.max_seqs,
        max_batch_tokens=engine.max_batch_tokens,
        prefix_cache=engine.prefix_cache,
        watermark=engine.watermark,
    )
    return instance_spec(placed, measured_of(ready))
