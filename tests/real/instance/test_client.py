"""The HTTP process's end of the engine's socket, with the other end in the hands of the test."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from pdlab.core.types import Report, StepTime
from pdlab.real.engine.messages import (
    AnyToEngine,
    AskLease,
    Export,
    Exported,
    FromEngine,
    FromQueue,
    Full,
    Holds,
    Landed,
    Proceed,
    Receive,
    Release,
    RenewLease,
    Reserved,
    Resume,
    Sampling,
    Step,
    Submit,
    Tokens,
)
from pdlab.real.instance.engine_client import EngineClient


class Engine:
    def __init__(self, client: EngineClient, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.client, self.reader, self.writer = client, reader, writer

    async def hears(self) -> Any:
        head = await self.reader.readexactly(4)
        return msgspec.msgpack.decode(await self.reader.readexactly(int.from_bytes(head, "little")), type=AnyToEngine)

    async def says(self, message: FromEngine) -> None:
        raw = msgspec.msgpack.encode(message)
        self.writer.write(len(raw).to_bytes(4, "little") + raw)
        await self.writer.drain()


@asynccontextmanager
async def engine() -> AsyncIterator[Engine]:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-c", ""])
    client = EngineClient(process, *await asyncio.open_connection(sock=ours))
    client._listening = asyncio.create_task(client._listen())
    found = Engine(client, *await asyncio.open_connection(sock=theirs))
    try:
        yield found
    finally:
        found.writer.close()
        await client.close()


def test_news_of_the_kv_come_before_the_tokens_and_full_ends_a_request() -> None:
    async def play() -> None:
        async with engine() as e:
            arriving: asyncio.Queue[FromQueue] = asyncio.Queue()
            e.client.receive(Receive(Submit(1, [5])), arriving)
            e.client.receive(Receive(Submit(2, [5])), arriving)
            e.client.resume(Resume(Submit(3, [5]), "lease"), arriving)
            assert [type(await e.hears()) for _ in range(3)] == [Receive, Receive, Resume]
            landed, tokens = Landed(1, 10, 0.1, "tcp", 0), Tokens(1, 0, 0, [7], "length")
            await e.says(Step([tokens, Tokens(2, 0, 0, [7], "length")], news=[Reserved(1, "", [3], 0), Full(2, "no room"), landed]))
            got = [await arriving.get() for _ in range(4)]
            assert got == [Reserved(1, "", [3], 0), Full(2, "no room"), landed, tokens]
            e.client.proceed(Proceed(2))  # it has ended: nothing is sent
            e.client.proceed(Proceed(3))
            e.client.release("lease")
            e.client.renew("lease", 5.0)
            assert [await e.hears() for _ in range(3)] == [Proceed(3), Release("lease"), RenewLease("lease", 5.0)]

    asyncio.run(play())


def test_exports_are_answered_by_number_and_fail_with_the_engine() -> None:
    async def play() -> None:
        async with engine() as e:
            asking = [asyncio.create_task(e.client.export(id, stop=id == 2)) for id in (1, 2, 3)]
            heard = [await e.hears() for _ in asking]
            assert heard[1] == Export(heard[1].call, 2, stop=True)
            await e.says(Exported(heard[1].call, lease="two"))
            await e.says(Exported(heard[0].call, lease="one"))
            assert [(await asking[at]).lease for at in (0, 1)] == ["one", "two"]
            e.writer.close()
            assert (await asking[2]).error == "the engine process has ended with status 0"
            assert (await e.client.export(4)).error == e.client.down
            arriving: asyncio.Queue[FromQueue] = asyncio.Queue()
            e.client.receive(Receive(Submit(5, [5], Sampling(best_of=2))), arriving)
            assert [(await arriving.get()).finish for _ in range(2)] == ["error", "error"]  # type: ignore[union-attr]
            e.client.release("lease")

    asyncio.run(play())


def test_an_engine_is_asked_whether_a_lease_holds_and_holds_none_when_it_has_ended() -> None:
    async def play() -> None:
        async with engine() as e:
            asking = [asyncio.create_task(e.client.leased(lease)) for lease in ("a", "b", "c")]
            heard = [await e.hears() for _ in asking]
            assert heard[1] == AskLease(heard[1].call, "b")
            await e.says(Holds(heard[1].call, True))
            await e.says(Holds(heard[0].call, False))
            assert [await asking[at] for at in (0, 1)] == [False, True]
            e.writer.close()
            assert not await asking[2]
            assert not await e.client.leased("d")

    asyncio.run(play())


def test_a_report_tells_what_became_of_each_prefix_since_the_last_one_and_a_step_of_each_kind() -> None:
    async def play() -> None:
        async with engine() as e:
            e.client.submit(Submit(1, [5]))
            few, many, decode = StepTime(0, 0, 10, 100, 0.1), StepTime(0, 0, 80, 6400, 0.5), StepTime(3, 90, 0, 0, 0.02)
            for report in (
                Report("", stored=(1, 2), steps=(many, StepTime(2, 80, 0, 0, 0.01))),
                Report("", stored=(3,), evicted=(1, 9), steps=(few, decode)),
                Report("", stored=(9,), waiting=2, preempted=4),
            ):
                await e.says(Step([], report))
            while e.client.load.report.waiting != 2:
                await asyncio.sleep(0)
            report = e.client.report("a", 6)
            assert (report.instance, report.incarnation, report.waiting, report.preempted) == ("a", 6, 2, 4)
            assert (report.stored, report.evicted) == ((2, 3, 9), (1,))  # 1 came and went: who has guessed that it is there must hear it
            assert report.steps == (many, decode)
            again = e.client.report("a", 6)
            assert (again.stored, again.evicted, again.steps, report.taken_s > 1e9) == ((), (), (), True)

    asyncio.run(play())
