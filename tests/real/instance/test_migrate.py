"""A running request moves while it decodes, or stays where it is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pdlab.real.engine.messages import Exported, Proceed, Receive
from tests.support.kv_engine import KvEngine
from tests.support.local_instances import Instance, Stream, instance, tokens_of, until

PROMPT = list(b"abcdefghij")
ASKED: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 300, "return_token_ids": True, "detokenize": False}


def expected(made: int) -> list[int]:
    return [PROMPT[at % len(PROMPT)] for at in range(made)]


def move(src: Instance, leg: str = "r1", **more: Any) -> dict[str, Any]:
    return {"do_remote_prefill": True, "pdlab": {"migrate": {"url": src.url, "leg": leg}, "events": True, **more}}


def slow(name: str, context: int = 1024, holds_at: int = 0) -> KvEngine:
    """`holds_at`: it goes on decoding, and a request that is to move does not end before it has."""
    engine = KvEngine(name, step_s=0.003, context=context)
    engine.holds_at = holds_at
    return engine


async def some(stream: Stream, tokens: int) -> list[int]:
    found: list[int] = []
    while len(found) < tokens:
        found += tokens_of([await stream.next()])
    return found


def test_a_request_moves_and_no_token_is_lost_or_told_twice(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "a", engine=slow("a", holds_at=290)) as a, instance(folder, "b", engine=slow("b")) as b:
            async with a.stream("r1", **ASKED) as old:
                before = await some(old, 10)
                async with b.stream("r2", **ASKED, kv_transfer_params=move(a)) as new:
                    event = await new.event()
                    assert event["event"] == "transferred"
                    rest = await old.rest()
                    assert rest[-1]["pdlab"] == {"event": "moved"}
                    before += tokens_of(rest)
                    assert len(before) == event["made"]
                    assert before + tokens_of(await new.rest()) == expected(300)
            await until(lambda: a.at_rest() and b.at_rest())
            assert not a.engine.shelf or all(lease.startswith("a") for lease in a.engine.shelf)
            assert a.service.metrics.finished["moved"] == 1
            exports = [heard for heard in a.engine.heard if heard[0] == "export"]
            assert exports[0][2:] == (False, False)
            assert exports[-1][2:] == (True, False)

    asyncio.run(play())


def test_what_was_made_during_a_long_copy_is_copied_in_a_second_stage(folder: Path) -> None:
    class Slow(KvEngine):
        def read(self, id: int, made: list[int], source: Any, last: bool) -> None:
            """The first copy takes as long as 100 tokens of the source."""
            if isinstance(self.heard[-1], Receive):
                (one,) = a_engine.live.values()
                if one.made < len(made) + 100:
                    asyncio.get_running_loop().call_later(0.005, self.read, id, made, source, last)
                    return
            super().read(id, made, source, last)

    a_engine = KvEngine("a", step_s=0.001, context=2048)

    async def play() -> None:
        async with instance(folder, "a", engine=a_engine) as a, instance(folder, "b", engine=Slow("b", context=2048)) as b:
            asked = {**ASKED, "max_tokens": 2000}
            async with a.stream("r1", **asked) as old:
                before = await some(old, 4)
                async with b.stream("r2", **asked, kv_transfer_params=move(a)) as new:
                    await new.event()
                    before += tokens_of(await old.rest())
                    assert before + tokens_of(await new.rest()) == expected(2000)
            assert [one.last for one in b.engine.heard if isinstance(one, Receive | Proceed)] == [False, False, True]

    asyncio.run(play())


@pytest.mark.parametrize("trouble", ["full", "lost", "unknown", "nobody", "nonsense", "late"])
def test_what_cannot_move_goes_on_where_it_is(folder: Path, trouble: str) -> None:
    async def play() -> None:
        async with instance(folder, "a", engine=slow("a", holds_at=290)) as a, instance(folder, "b") as b:
            async with a.stream("r1", **ASKED) as old:
                made = await some(old, 3)
                params = move(a, **({"deadline_s": 0.02} if trouble == "late" else {}))
                if trouble == "full":
                    b.engine.full = True
                elif trouble == "lost":
                    b.engine.lost = "the peer has ended"
                elif trouble == "unknown":
                    params = move(a, "r7")
                elif trouble == "nobody":
                    params["pdlab"]["migrate"]["url"] = "http://127.0.0.1:1"
                elif trouble == "nonsense":
                    a.engine.export = nonsense  # type: ignore[method-assign]
                else:
                    b.engine.read = lambda *_: None  # type: ignore[method-assign]
                answer = await b.ask(**ASKED, stream=True, kv_transfer_params=params)
                code = answer.json()["error"]["code"]
                assert (answer.status_code, code) == ((503, "kv_full") if trouble == "full" else (409, "kv_lost")), answer.text
                a.engine.holds_at = 0
                assert made + tokens_of(await old.rest()) == expected(300)
            await until(lambda: a.at_rest() and b.at_rest())

    async def nonsense(*_: Any, **__: Any) -> Exported:
        return Exported(1, "", "lease", [1], 70, [99_999])

    asyncio.run(play())


def test_a_migration_that_nobody_waits_for_is_called_off_while_it_stands_still(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "a", engine=slow("a", holds_at=290)) as a, instance(folder, "b", engine=slow("b")) as b:
            async with a.stream("r1", **ASKED) as old:
                made = await some(old, 3)
                b.engine.proceed = lambda _: None  # type: ignore[method-assign]
                asking = asyncio.create_task(b.ask(**ASKED, stream=True, kv_transfer_params=move(a)))
                await until(lambda: bool(a.engine.moving))
                asking.cancel()
                a.engine.holds_at = 0
                assert made + tokens_of(await old.rest()) == expected(300)
            await until(lambda: a.at_rest() and b.at_rest())

    asyncio.run(play())
