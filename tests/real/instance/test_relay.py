"""A decode leg that is asked of the instance that prefilled, which passes the answer on: over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pdlab.core.types import InstanceSpec, Role
from pdlab.real.net.http import Broken
from pdlab.real.registry.memory import MemoryStore
from pdlab.real.registry.registry import Registry
from pdlab.real.router.http_remote import HttpRemote
from pdlab.real.router.remote import InstanceFull, LegAsk, TransferTrouble
from tests.real.router.test_http_remote import ask, everything, tokens_of
from tests.support.fake_instance import Fake
from tests.support.local_instances import TOKEN, Instance, instance, until

Test = Callable[[Fake, Instance, HttpRemote], Awaitable[None]]


def world(folder: Path, test: Test, **fake_options: object) -> None:
    """A fake decode instance, a real relay before it, and what a router has of the former."""

    async def run() -> None:
        async with Fake(**fake_options) as fake, instance(folder, "p") as p:  # type: ignore[arg-type]
            spec = InstanceSpec(name="d", role=Role.DECODE, kv_blocks=100, url=fake.url, model="fake")
            remote = HttpRemote(spec, token=TOKEN)
            try:
                async with asyncio.timeout(60):
                    await test(fake, p, remote)
            finally:
                remote.close()

    asyncio.run(run())


def through(p: Instance, leg: str = "7-1-d", **sampling: object) -> LegAsk:
    return replace(ask(leg, **sampling), through=p.url)


def test_the_answer_comes_whole_and_the_leg_keeps_its_name(folder: Path) -> None:
    async def test(fake: Fake, p: Instance, remote: HttpRemote) -> None:
        straight = await everything(remote, ask("7-1-a", max_tokens=40))
        relayed = await everything(remote, through(p, "7-1-b", max_tokens=40))
        assert tokens_of(relayed) == tokens_of(straight) and len(tokens_of(relayed)) == 40
        (_, headers, body), (_, before, same) = fake.asked[-1], fake.asked[-2]
        assert (headers["x-request-id"], headers["x-pdlab-token"]) == ("7-1-b", TOKEN) and body == same
        assert before["x-request-id"] == "7-1-a"

    world(folder, test)


def test_tokens_come_as_they_are_made(folder: Path) -> None:
    async def test(fake: Fake, p: Instance, remote: HttpRemote) -> None:
        heard: list[object] = []
        asking = asyncio.create_task(remote.decode(through(p, max_tokens=10_000), heard.append))
        await until(lambda: len(heard) > 2)
        assert fake.legs, "it still makes them"
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: "7-1-d" in fake.dropped)

    world(folder, test, interval_s=0.005)


@pytest.mark.parametrize(
    ("options", "trouble"),
    [
        ({"refuse": (503, "kv_full")}, InstanceFull),
        ({"refuse": (409, "kv_lost")}, TransferTrouble),
        ({"stream": [b"data: {}\n\n"], "hang_up": True}, Broken),
    ],
)
def test_its_troubles_are_those_of_the_decode_instance(folder: Path, options: dict[str, object], trouble: type[Exception]) -> None:
    async def test(fake: Fake, p: Instance, remote: HttpRemote) -> None:
        with pytest.raises(trouble):
            await everything(remote, through(p))

    world(folder, test, **options)


def test_who_hangs_up_in_the_middle_breaks_it_off(folder: Path) -> None:
    async def test(fake: Fake, p: Instance, remote: HttpRemote) -> None:
        heard: list[object] = []
        asking = asyncio.create_task(remote.decode(through(p, max_tokens=10_000), heard.append))
        await until(lambda: len(heard) > 2)
        for connection in list(fake.connections):
            connection.transport.abort()
        with pytest.raises(Broken):
            await asking

    world(folder, test, interval_s=0.005)


def test_only_members_are_asked_and_only_for_the_cluster(folder: Path) -> None:
    async def run() -> None:
        async with Registry(MemoryStore()) as registry, Fake() as fake, instance(folder, "p", registry=registry) as p:
            spec = InstanceSpec(name="d", role=Role.DECODE, kv_blocks=100, url=fake.url, model="fake")
            with closing(HttpRemote(spec, token=TOKEN)) as remote, pytest.raises(TransferTrouble, match="no instance is registered"):
                await everything(remote, through(p))
            with closing(HttpRemote(spec, token="wrong")) as foreign, pytest.raises(Broken, match="token"):
                await everything(foreign, through(p))
            assert not fake.asked

    asyncio.run(run())
