"""In virtual time, with a store whose requests and answers take as long as they like: nobody holds what another may hold."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.core.types import Joined, Left, Report, UsageError
from pdlab.real.registry import Registry
from pdlab.real.registry.memory import MemoryStore
from tests.support.registry_worlds import MemoryWorld, Seen, report, spec, watching


class Slow(MemoryStore):
    """Each request and each answer is delayed; a request whose sender gave up arrives all the same."""

    def __init__(self, clock: Callable[[], float], seed: int, slow: float) -> None:
        super().__init__(clock)
        self.rng, self.slow = random.Random(seed), slow
        self.under_way: set[asyncio.Task[Any]] = set()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return self.delayed(found) if name in ("peek", "claim", "renew", "put", "release") else found

    def delayed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        async def later(*arguments: Any) -> Any:
            await asyncio.sleep(self.rng.expovariate(1 / self.slow))
            answer = await call(*arguments)
            await asyncio.sleep(self.rng.expovariate(1 / self.slow))
            return answer

        async def shielded(*arguments: Any) -> Any:
            task = asyncio.create_task(later(*arguments))
            self.under_way.add(task)
            task.add_done_callback(self.under_way.discard)
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            return await asyncio.shield(task)

        return shielded


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), slow=st.sampled_from([0.001, 0.1, 0.4]), outages=st.lists(st.tuples(st.floats(0.0, 3), st.booleans())))
def test_never_two_leaders_and_never_one_whose_lease_is_over(seed: int, slow: float, outages: list[tuple[float, bool]]) -> None:
    async def main() -> None:
        clock = asyncio.get_running_loop().time
        store = Slow(clock, seed, slow)
        registry = Registry(store, clock)
        candidates = [await registry.elect(f"r{k}", lease_s=1.0) for k in range(3)]
        terms: list[int] = []

        async def look(seconds: float) -> None:
            for _ in range(int(seconds / 0.01)):
                await asyncio.sleep(0.01)
                leaders = [one for one in candidates if one.is_leader]
                assert len(leaders) <= 1
                for leader in leaders:
                    terms.extend([leader.fencing] * (leader.fencing not in terms[-1:]))
                    assert not store.entries or not store.up or store.entries["leader/router"].claim.number == leader.fencing

        await look(3)
        for seconds, wipe in outages[:4]:
            store.stop()
            await look(seconds)
            store.start(wipe=wipe)
            await look(2)
        if not any(wipe for _, wipe in outages):  # with its counters a store loses the order of the terms
            assert terms == sorted(set(terms))
        await asyncio.gather(*(one.drop() for one in candidates))
        for task in list(store.under_way):
            task.cancel()
        await asyncio.sleep(0)

    MemoryWorld().run(main)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), slow=st.sampled_from([0.01, 0.1, 0.3]))
def test_no_instance_thinks_itself_alive_after_it_left(seed: int, slow: float) -> None:
    async def main() -> None:
        clock = asyncio.get_running_loop().time
        store = Slow(clock, seed, slow)
        theirs, ours = Registry(store, clock), Registry(store, clock)
        held = []
        async with watching(ours) as seen:
            until_s = clock() + 12
            while clock() < until_s:
                await asyncio.sleep(0.02)
                if not held or held[-1].lost.is_set():
                    try:
                        held.append(await theirs.register(spec(), lease_s=1.0))
                    except UsageError:  # the lost one's lease runs on, or no answer in time
                        continue
                left = {event.incarnation for event in seen.events if isinstance(event, Left)}
                assert not [one for one in held if one.alive and one.incarnation in left]
            joined = [event.spec.incarnation for event in seen.events if isinstance(event, Joined)]
            assert joined == sorted(set(joined))
        for one in held:
            await one.drop()
        for task in list(store.under_way):
            task.cancel()
        await asyncio.sleep(0)

    MemoryWorld().run(main)


def test_a_watcher_that_reads_too_slowly_gets_the_newest_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdlab.real.registry.watch.INBOX", 8)
    world = MemoryWorld()

    async def main() -> None:
        held = await (await world.open()).register(spec(), lease_s=100.0)
        events = (await world.open()).watch()
        assert await anext(events) == Joined(held.spec)
        for waiting in range(1, 50):
            await held.report(report(waiting))
            await asyncio.sleep(0.001)
        seen = [await anext(events)]
        while seen[-1] != Report("p0", 1, 1.5, waiting=49):
            seen.append(await anext(events))
        assert len(seen) < 20
        await events.aclose()

    world.run(main)


def test_closing_a_registry_deregisters_resigns_and_ends_what_watches() -> None:
    world = MemoryWorld()

    async def main() -> None:
        ours = await world.open()
        seen = Seen(ours)
        async with await world.connect() as theirs:
            their_own = Seen(theirs)
            held = await theirs.register(spec())
            leadership = await theirs.elect("r0")
            assert await leadership.changed()
            await seen.until(Joined(held.spec))
        assert held.lost.is_set() and not leadership.is_leader
        await asyncio.wait_for(their_own.task, 0.2)
        await seen.until(Left("p0", 1), within_s=0.01)
        assert await asyncio.wait_for((await ours.elect("r1")).changed(), 0.01)
        seen.task.cancel()
        await asyncio.wait([seen.task])

    world.run(main)
