"""What every backend must do, over memory in virtual time and over real servers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import msgspec
import pytest

from pdlab.core.types import Joined, Left, Report, Role, Suspected, Switched, UsageError
from pdlab.real.registry import Leadership, Registration, Registry
from pdlab.real.registry.lease import HeldLease, claim
from pdlab.real.registry.redis import RedisStore
from pdlab.real.registry.store import Peek, Store, StoreAway
from tests.support.registry_worlds import SERVERS, MemoryWorld, Process, Redis, RegistryWorld, Server, report, spec, watching

T = TypeVar("T")
NewServer = Callable[[str], Server]
LONG_S = 60.0  # a lease that no slow machine lets end


def test_a_watcher_sees_the_state_first_and_then_each_change_in_order(world: RegistryWorld) -> None:
    async def main() -> None:
        theirs, ours = await world.open(), await world.open()
        p0 = await theirs.register(spec("p0"), lease_s=LONG_S)
        d0 = await theirs.register(spec("d0", Role.DECODE, prefill_profile=((512, 0.1),)), lease_s=LONG_S)
        assert await p0.report(report(3))
        async with watching(ours) as seen:
            await seen.until(Joined(d0.spec), Joined(p0.spec), Report("p0", 1, 1.5, waiting=3))
            assert seen.events[0] == Joined(d0.spec)
            for waiting in range(4, 9):
                assert await p0.report(report(waiting, stored=(1, -2), evicted=(1 << 60,)))
            assert await p0.update(spec("p0", Role.MIXED))
            assert await p0.report(report(9))
            await d0.close()
            await seen.until(Left("d0", 1))
            mixed = msgspec.structs.replace(spec("p0", Role.MIXED), incarnation=1)
            assert seen.events[3:] == [
                *(Report("p0", 1, 1.5, waiting=w, stored=(1, -2), evicted=(1 << 60,)) for w in range(4, 9)),
                Joined(mixed),
                Switched("p0", 1, Role.MIXED),
                Report("p0", 1, 1.5, waiting=9),
                Left("d0", 1),
            ]
            assert not p0.lost.is_set() and d0.lost.is_set()

    world.run(main)


def test_incarnations_rise_and_a_held_name_is_refused(world: RegistryWorld) -> None:
    async def main() -> None:
        one, other = await world.open(), await world.open()
        first = await one.register(spec("d-0"), lease_s=LONG_S)
        for registry in (one, other):
            with pytest.raises(UsageError, match=r"is registered at .* already: choose another name"):
                await registry.register(spec("d-0"), lease_s=LONG_S)
        await first.close()
        second = await other.register(spec("d-0"), lease_s=LONG_S)
        await second.close()
        third = await one.register(spec("d-0", incarnation=41), lease_s=LONG_S)
        assert (first.incarnation, second.incarnation, third.incarnation) == (1, 2, 42)
        assert not await second.report(report(1)) and not await second.update(spec("d-0", Role.DECODE))
        assert third.alive and not second.alive

    world.run(main)


def test_of_many_that_want_one_name_at_once_one_gets_it(world: RegistryWorld) -> None:
    async def main() -> None:
        registries = [await world.open() for _ in range(4)]
        for incarnation in (1, 2):
            got = await asyncio.gather(*(r.register(spec(), lease_s=LONG_S) for r in registries), return_exceptions=True)
            made = [one for one in got if not isinstance(one, BaseException)]
            assert [one.incarnation for one in made] == [incarnation] and sum(isinstance(one, UsageError) for one in got) == 3
            await made[0].close()

    world.run(main)


def test_a_holder_that_falls_silent_leaves_when_its_lease_ends_and_its_name_is_free(world: RegistryWorld) -> None:
    async def main() -> None:
        theirs, ours = await world.open(), await world.open()
        held = await theirs.register(spec(), lease_s=world.lease_s)
        kept = await theirs.register(spec("d0", Role.DECODE), lease_s=LONG_S)
        async with watching(ours) as seen:
            await seen.until(Joined(held.spec), Joined(kept.spec))
            await asyncio.sleep(1.2 * world.lease_s)
            died_s = asyncio.get_running_loop().time()
            await held.drop()
            left_s = await seen.until(Left("p0", 1))
            print(f"\n{world.url.partition(':')[0] or 'memory'}: from death to Left {left_s - died_s:.2f} s, lease {world.lease_s} s")
            assert held._holding.deadline < left_s
            assert left_s - died_s < 1.3 * world.lease_s or not world.exact
            again = await theirs.register(spec(), lease_s=LONG_S)
            await seen.until(Joined(again.spec))
            assert again.incarnation == 2
            assert [e for e in seen.of(Left, Suspected) if not (isinstance(e, Left) and e.instance == "p0")] == []
            assert kept.alive

    world.run(main)


def test_a_killed_process_leaves(server: Server) -> None:
    async def main() -> None:
        async with watching(await server.open()) as seen:
            process = Process(server.url, "instance", "d7", str(server.lease_s))
            try:
                assert await process.line() == "1"
                while not seen.of(Joined):
                    await asyncio.sleep(0.01)
                process.signal(signal.SIGKILL)
                await seen.until(Left("d7", 1))
            finally:
                process.end()

    server.run(main)


async def outage(world: RegistryWorld, seconds: float, how: str) -> None:
    if how == "pause":
        assert isinstance(world, Server)
        world.pause()
        await asyncio.sleep(seconds)
        world.resume()
    else:
        await world.kill()
        await asyncio.sleep(seconds)
        await world.restart(wipe=how == "wiped")


async def outlive(world: RegistryWorld, how: str, seconds: float) -> None:
    theirs, ours = await world.open(), await world.open()
    lasting = await theirs.register(spec("p0"), lease_s=LONG_S)
    async with watching(ours) as seen:
        await seen.until(Joined(lasting.spec))
        brief = await theirs.register(spec("d0", Role.DECODE), lease_s=0.9)
        await seen.until(Joined(brief.spec))
        await outage(world, seconds, how)
        await brief.lost.wait()
        assert not brief.alive and lasting.alive
        while not await lasting.report(report(5)):  # its connection may not be back yet
            await asyncio.sleep(0.01)
        await seen.until(Report("p0", 1, 1.5, waiting=5), Left("d0", 1))
        again = await theirs.register(brief.spec, lease_s=LONG_S)
        await seen.until(Joined(again.spec))
        assert again.incarnation == 2 and lasting.alive
        of_p0 = [event for event in seen.events if (event.spec.name if isinstance(event, Joined) else event.instance) == "p0"]
        assert of_p0 == [Joined(lasting.spec), Report("p0", 1, 1.5, waiting=5)]


@pytest.mark.parametrize("kind", ["memory", *SERVERS])
def test_a_lease_that_outlives_an_outage_is_kept_and_who_could_not_renew_fences_itself(
    kind: str, new_server: NewServer, patient: None
) -> None:
    """The server is killed, or stopped, for 1 and 3 s, all four at once."""
    if kind == "memory":
        for seconds in (1, 3):
            memory = MemoryWorld()
            memory.run(lambda m=memory, s=seconds: outlive(m, "kill", s))  # type: ignore[misc]
        return
    cases = [(how, seconds, new_server(kind)) for how in ("kill", "pause") for seconds in (1, 3)]

    async def main() -> None:
        await asyncio.gather(*(server.within(lambda s=server, h=how, n=n: outlive(s, h, n)) for how, n, server in cases))  # type: ignore[misc]

    try:
        RegistryWorld().run(main)
    finally:
        for _, _, server in cases:
            server.stop()


def test_a_store_that_lost_its_data_gets_the_living_back_and_the_dead_leave_after_a_lease(mortal: RegistryWorld) -> None:
    async def main() -> None:
        theirs, ours = await mortal.open(), await mortal.open()
        living = await theirs.register(spec("p0"), lease_s=6.0 if mortal.exact else 12.0)
        dead = await theirs.register(spec("d0"), lease_s=2.0)
        async with watching(ours) as seen:
            await seen.until(Joined(living.spec), Joined(dead.spec))
            await mortal.kill()
            await dead.drop()
            await asyncio.sleep(0.1)
            await mortal.restart(wipe=True)
            await seen.until(Left("d0", 1))
            while not await living.report(report(2)):  # the holder may not know of its new lease yet
                await asyncio.sleep(0.01)
            assert living.alive
            await seen.until(Report("p0", 1, 1.5, waiting=2))
            of_p0 = [event for event in seen.of(Suspected, Left) if event.instance == "p0"]  # type: ignore[union-attr]
            back = [Suspected("p0", 1), Suspected("p0", 1, lost=False)]
            assert of_p0 == back or (of_p0 == [] and not mortal.exact)  # where it has found the server again before the watcher
            assert [event for event in seen.of(Suspected, Left) if event not in of_p0] == [Suspected("d0", 1), Left("d0", 1)]
            await living.close()
            assert (await theirs.register(spec("p0"))).incarnation == 2
            await seen.until(Left("p0", 1))

    mortal.run(main)


async def leads(*candidates: Leadership, within_s: float = 60.0) -> Leadership:
    async with asyncio.timeout(within_s):
        while not (leading := [one for one in candidates if one.is_leader]):
            await asyncio.sleep(0.01)
    assert len(leading) == 1
    return leading[0]


async def lasting(world: RegistryWorld, *candidates: Leadership) -> Leadership:
    """Who leads for longer than a lease. On a real machine, which may stand still for one, not each does."""
    for _ in range(1 if world.exact else 10):
        leader = await leads(*candidates)
        term = leader.fencing
        await asyncio.sleep(1.2 * world.lease_s)
        if [one for one in candidates if one.is_leader] == [leader] and leader.fencing == term and await leader.changed():
            return leader
    raise AssertionError("nobody leads for longer than a lease")


def test_one_candidate_leads_and_another_follows_with_a_higher_number(world: RegistryWorld) -> None:
    async def main() -> None:
        registries = [await world.open() for _ in range(3)]
        candidates = [await r.elect(f"router-{k}", lease_s=world.lease_s) for k, r in enumerate(registries)]
        numbers = []
        for end in (Leadership.resign, Leadership.drop):
            leader = await lasting(world, *candidates)
            numbers.append(leader.fencing)
            candidates.remove(leader)
            await end(leader)
            assert not leader.is_leader and not await leader.changed()
        numbers.append((await leads(*candidates)).fencing)
        assert numbers == sorted(set(numbers))
        elsewhere = await registries[0].elect("router-0", election="other", lease_s=world.lease_s)
        await leads(elsewhere)

    world.run(main)


def test_a_leader_without_its_store_is_deposed_and_may_be_elected_again(mortal: RegistryWorld) -> None:
    async def main() -> None:
        leader = await (await mortal.open()).elect("router-0", lease_s=1.0 if mortal.exact else 2.0)
        assert await leader.changed()
        first = leader.fencing
        await mortal.kill()
        killed_s = asyncio.get_running_loop().time()
        assert not await leader.changed()
        assert 0.5 < asyncio.get_running_loop().time() - killed_s < (1.0 if mortal.exact else 60.0)
        await mortal.restart()
        assert await asyncio.wait_for(leader.changed(), 60)
        assert leader.fencing > first

    mortal.run(main)


def test_a_paused_leader_knows_at_once_that_it_was_deposed(server: Server) -> None:
    async def main() -> None:
        lease_s = 3.0  # which a slow machine renews, too
        process = Process(server.url, "leader", "paused", str(lease_s))
        try:
            asked_s, led, old = (await process.line()).split()
            assert led == "1"
            other = await (await server.open()).elect("other", lease_s=lease_s)
            await asyncio.sleep(0.5)
            assert not other.is_leader
            process.signal(signal.SIGSTOP)
            await asyncio.wait_for(other.changed(), 60)
            elected_s = asyncio.get_running_loop().time()  # CLOCK_MONOTONIC, as in the other process
            await asyncio.sleep(0.2)
            process.signal(signal.SIGCONT)
            while float(asked_s) < elected_s:  # what it has said before may lie here yet
                asked_s, led, _ = (await process.line()).split()
            assert led == "0"
            await asyncio.sleep(0.5)
            assert other.is_leader and other.fencing > int(old)
        finally:
            rest = process.end()
        assert all(line.split()[1] == "0" for line in rest.splitlines())

    server.run(main)


def test_what_a_broken_peer_writes_is_skipped_with_one_line(world: RegistryWorld, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        theirs, ours = await world.open(), await world.open()
        held = await theirs.register(spec("p0"), lease_s=LONG_S)
        async with watching(ours) as seen:
            await seen.until(Joined(held.spec))
            for key in ("instance/x", "report/p0", "instance", "nonsense/\x00"):
                await world.scribble(key, b"\x80\x04cposix\nsystem\n")
            await world.scribble("instance/huge", b'{"lease_s": 1, "spec": {"name": "' + b"x" * 1_100_000 + b'"}}')
            await world.scribble("instance/y", b'{"lease_s": 1, "spec": {"name": "z", "role": "decode", "kv_blocks": 1, "incarnation": 1}}')
            later = await theirs.register(spec("p1"), lease_s=LONG_S)
            await seen.until(Joined(later.spec))
            await asyncio.sleep(0.5)
            assert seen.events == [Joined(held.spec), Joined(later.spec)]
            async with watching(ours) as fresh:
                await fresh.until(Joined(held.spec), Joined(later.spec))
                assert len(fresh.events) == 2

    with caplog.at_level(logging.WARNING, "pdlab.real.registry"):
        world.run(main)
    skipped = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    garbage = ["instance", "instance/huge", "instance/x", "instance/y", "report/p0"]
    assert sorted(line.split("'")[1] for line in skipped) == sorted(garbage * 2)  # two watchers


def test_a_put_reaches_a_watcher_soon(world: RegistryWorld) -> None:
    async def main() -> None:
        held = await (await world.open()).register(spec(), lease_s=LONG_S)
        loop = asyncio.get_running_loop()
        async with watching(await world.open()) as seen:
            await seen.until(Joined(held.spec))

            async def median_s(begin: int) -> float:
                delays = []
                for waiting in range(begin, begin + 59):
                    put_s = loop.time()
                    assert await held.report(report(waiting))
                    delays.append(await seen.until(Report("p0", 1, 1.5, waiting=waiting)) - put_s)
                delays.sort()
                name = world.url.partition(":")[0] or "memory"
                print(f"\n{name}: from put to watch p50 {delays[30] * 1e3:.2f} ms, max {delays[-1] * 1e3:.2f} ms")
                return delays[30]

            for begin in range(1, 2000, 100):  # on a busy machine not each time
                if await median_s(begin) < 0.1:
                    return
            raise AssertionError("no sooner than by polling")

    world.run(main)


def test_a_count_that_a_broken_peer_spoilt_is_said_so(server: Server) -> None:
    async def main() -> None:
        registry = await server.open()
        for count, said in ((b"many", "should count"), (b"007", "can't be raised from 7"), (b"1" * 40, "should count")):
            await server.spoil_count("instance/p0", count)
            with pytest.raises(UsageError, match=said):
                await registry.register(spec(), lease_s=server.lease_s)

    server.run(main)


def mortals(kind: str, new_server: NewServer, *cases: tuple[str, T]) -> list[tuple[RegistryWorld, str, T]]:
    """A store for each: what is to become of it (killed, wiped or paused, say), and for how many seconds, or when."""
    return [(MemoryWorld() if kind == "memory" else new_server(kind), *case) for case in cases if kind != "memory" or case[0] != "pause"]


def at_once(
    kind: str, worlds: list[tuple[RegistryWorld, str, T]], play: Callable[[RegistryWorld, str, T], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        await asyncio.gather(*(world.within(partial(play, world, how, more)) for world, how, more in worlds))

    try:
        (MemoryWorld() if kind == "memory" else RegistryWorld()).run(main)
    finally:
        for world, _, _ in worlds:
            if isinstance(world, Server):
                world.stop()


@pytest.mark.parametrize("kind", ["memory", *SERVERS])
def test_two_never_lead_at_once_whatever_becomes_of_the_store(kind: str, new_server: NewServer, patient: None) -> None:
    """Not even where it comes back at once, without its data, while the last leader's lease runs on."""

    async def play(world: RegistryWorld, how: str, seconds: float) -> None:
        candidates = [await (await world.open()).elect(f"r{k}", lease_s=2.0) for k in range(3)]
        await leads(*candidates)
        looking = asyncio.create_task(_never_two(candidates))
        await outage(world, seconds, how)
        await asyncio.sleep(1.0)
        await leads(*candidates)
        looking.cancel()
        await asyncio.wait([looking])
        assert looking.cancelled(), looking.exception()

    at_once(kind, mortals(kind, new_server, ("pause", 1.5), ("kill", 0.0), ("wiped", 0.0), ("wiped", 0.5)), play)


async def _never_two(candidates: list[Leadership]) -> None:
    while True:
        assert sum(one.is_leader for one in candidates) <= 1, "two lead at once"
        await asyncio.sleep(0.003)


def test_nobody_leads_a_store_without_data_before_the_last_leaders_lease_is_over(mortal: RegistryWorld) -> None:
    """The last leader does not hear that its store is another one now."""

    async def cut_off(*_: Any) -> None:
        raise StoreAway("cut off")

    async def main() -> None:
        leader = await (await mortal.open()).elect("old", lease_s=2.0)
        await leads(leader)
        other = await (await mortal.open()).elect("new", lease_s=2.0)
        await asyncio.sleep(0.8)
        leader.store.renew = leader.store.claim = cut_off  # type: ignore[method-assign, assignment]
        looking = asyncio.create_task(_never_two([leader, other]))
        await mortal.kill()
        await mortal.restart(wipe=True)
        await leads(other)
        looking.cancel()
        await asyncio.wait([looking])
        assert looking.cancelled(), looking.exception()

    if not mortal.exact:  # in memory both share the store's object
        mortal.run(main)


LOSSES = {"memory": ["restarted"], "etcd": ["restarted"], "redis": ["restarted", "flushed", "without its last writes"]}


async def lose_data(world: RegistryWorld, how: str) -> None:
    if how == "flushed":
        await cast(RedisStore, world.opened[0].store).client.flushall()
        return
    await world.kill()
    if how == "without its last writes":
        cast(Redis, world).set_back()
    await world.restart(wipe=how == "restarted")


async def answers(store: Store) -> None:
    """By a connection to the server that is there now."""
    while True:
        with contextlib.suppress(StoreAway):
            await store.check()
            return


@pytest.mark.parametrize("kind", LOSSES)
def test_a_store_that_lost_its_data_between_two_looks_is_no_free_place(kind: str, new_server: NewServer, patient: None) -> None:
    """However short the outage was: who has waited for a lease has waited in another store than the one that it finds now. It is lost
    before the other candidate looks, or between its look and its claim."""
    lease_s = 3.0

    async def vote(registry: Registry) -> HeldLease | None:
        try:
            return await claim(registry.store, registry.clock, "leader/x", lambda number: b"%d" % number, lease_s, settle_s=lease_s)
        except StoreAway:  # a connection was to the one before
            return None

    async def play(world: RegistryWorld, how: str, looks: str) -> None:
        first, other = await world.open(), await world.open()
        while await other.store.peek("leader/x", lease_s) != (found := await other.store.peek("leader/x", 0.0)):
            await asyncio.sleep(0.1)
        assert not found.held, "nobody ever claimed it"
        if isinstance(world, Redis):
            world.keep()
        leader = None
        while leader is None:
            leader = await vote(first)
            await asyncio.sleep(0.1)
        leader.task.cancel()  # it does not hear of what follows, and believes its lease
        peek = other.store.peek

        async def late(key: str, settle_s: float) -> Peek:
            other.store.peek = peek  # type: ignore[method-assign]
            await lose_data(world, how)
            await answers(other.store)
            return found

        if looks == "before":
            await lose_data(world, how)
        else:
            other.store.peek = late  # type: ignore[method-assign]
        until_s = leader.deadline
        while (second := await vote(other)) is None:
            await asyncio.sleep(0.1)
        assert second.tenure.asked_s >= until_s, f"two lead at once: {how} {looks}"
        await second.drop()

    looks = ["while it claims"] if kind == "memory" else ["before", "while it claims"]  # in memory one look is everybody's
    at_once(kind, mortals(kind, new_server, *((how, look) for how in LOSSES[kind] for look in looks)), play)


@pytest.mark.parametrize("kind", ["memory", *SERVERS])
def test_a_patient_holder_keeps_its_place_through_any_outage_and_nobody_is_told_to_have_left(
    kind: str, new_server: NewServer, patient: None
) -> None:
    """For less and for more than a lease."""

    async def play(world: RegistryWorld, how: str, seconds: float) -> None:
        theirs, ours = await world.open(), await world.open()
        held = [await theirs.register(spec(name), lease_s=2.0, patient=True) for name in ("p0", "d0")]
        ill: list[bool] = []
        async with watching(ours) as seen:
            watched = asyncio.create_task(_drain(ours, ill))
            await seen.until(*(Joined(one.spec) for one in held))
            await asyncio.sleep(0.5)
            await outage(world, seconds, how)
            reporting = asyncio.create_task(_report_on(held))
            await seen.until(*(Report(name, 1, 1.5, waiting=7) for name in ("p0", "d0")))
            await asyncio.sleep(1.2)
            assert not reporting.done()
            reporting.cancel()
            await asyncio.wait([reporting])
            assert all(one.alive and one.incarnation == 1 for one in held)
            assert seen.of(Left) == []
            assert ill[-1:] in ([], [False]), "all is well again"
            watched.cancel()
            await asyncio.wait([watched])

    cases = [(how, seconds) for how in ("kill", "wiped", "pause") for seconds in (0.5, 2.6)]
    at_once(kind, mortals(kind, new_server, *cases), play)


async def _report_on(held: Sequence[Registration]) -> None:
    """As instances do: a report that a store lost with its lease is followed by others."""
    while True:
        for one in held:
            await one.report(report(7))
        await asyncio.sleep(0.05)


async def _drain(registry: Registry, ill: list[bool]) -> None:
    async for _ in registry.watch(ill=ill.append):
        pass
