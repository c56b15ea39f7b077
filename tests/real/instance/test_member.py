"""An instance's life in the registry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdlab.core.types import Report, Role, UsageError
from pdlab.real.engine.messages import Step
from pdlab.real.registry.memory import MemoryStore
from pdlab.real.registry.registry import Registry
from pdlab.real.registry.store import INSTANCE, REPORT
from tests.support import local_instances
from tests.support.kv_engine import KvEngine, descriptor
from tests.support.local_instances import Instance, instance, until

QUICK = {"report_s": 0.01, "lease_s": 30.0}
RUNNING = {"prompt": "abcd", "max_tokens": 400}


class Book:
    """What stands in a registry, and every report it took. Its clock can be set forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.store = MemoryStore(self.clock)
        self.registry = Registry(self.store, self.clock)

    def clock(self) -> float:
        return time.monotonic() + self.ahead_s

    def spec(self, name: str) -> Any:
        entry = self.store.entries.get(f"{INSTANCE}/{name}")
        return None if entry is None else msgspec.json.decode(entry.value)["spec"]

    def report(self, name: str) -> Report:
        return msgspec.json.decode(self.store.reports[f"{REPORT}/{name}"], type=Report)


@asynccontextmanager
async def joined(folder: Path, book: Book | None, **options: Any) -> AsyncIterator[Instance]:
    registry = None if book is None else book.registry
    engine = KvEngine("a", step_s=0.003)
    async with instance(folder, "a", role=Role.DECODE, registry=registry, engine=engine, **{**QUICK, **options}) as a:
        yield a


def test_an_instance_joins_reports_and_leaves(folder: Path) -> None:
    async def play() -> None:
        book = Book()
        async with joined(folder, book) as a:
            assert book.spec("a")["url"] == a.url
            a.engine.stored, a.engine.evicted = (1, 2), (3,)
            await until(lambda: f"{REPORT}/a" in book.store.reports and book.report("a").stored == (1, 2))
            assert book.report("a").evicted == (3,)
            await until(lambda: book.report("a").stored == ())
        assert book.spec("a") is None

    asyncio.run(play())


def test_what_the_registry_did_not_take_is_told_later_and_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdlab.real.instance.member.MOST_HASHES", 2)

    async def play() -> None:
        book = Book()
        async with joined(folder, book) as a:
            taken: list[int] = []
            refusing = True
            here = a.member._registration
            assert here is not None
            take = here.report

            async def report(given: Report) -> bool:
                assert len(given.stored) + len(given.evicted) <= 2
                if refusing:
                    return False
                taken.extend([*given.stored, *(-hash for hash in given.evicted)])
                return await take(given)

            here.report = report  # type: ignore[method-assign]
            a.engine.stored = (1, 2, 3, 4, 5)
            await until(lambda: not a.engine.stored)
            a.engine.evicted = (2, 9)
            await until(lambda: not a.engine.evicted)
            refusing = False
            await until(lambda: len(taken) == 6)
            assert sorted(taken) == [-9, -2, 1, 3, 4, 5]

    asyncio.run(play())


def test_an_instance_that_the_registry_lost_drops_everything_and_joins_again(folder: Path) -> None:
    """Its lease is over though the registry answers."""

    async def play() -> None:
        book = Book()
        async with joined(folder, book, lease_s=0.6) as a:
            a.engine.stored = (1, 2)
            await until(lambda: not a.engine.stored)
            async with a.stream(**RUNNING) as stream:
                await stream.next()
                a.engine.paused = True
                before = a.member.spec.incarnation
                book.store._drop(f"{INSTANCE}/a")
                last = (await stream.rest())[-1]
            assert last["error"]["code"] == "lease_lost"
            assert a.at_rest()
            a.engine.paused = False
            await until(lambda: book.spec("a") is not None and a.member.spec.incarnation > before)
            await until(lambda: f"{REPORT}/a" in book.store.reports and book.report("a").stored == (1, 2))
            assert book.report("a").incarnation == a.member.spec.incarnation
            assert (await a.ask(prompt="x")).status_code == 200

    asyncio.run(play())


@pytest.mark.parametrize("wipe", [False, True], ids=["with its data", "without"])
def test_an_instance_serves_on_while_the_registry_is_silent_and_keeps_its_place(folder: Path, wipe: bool) -> None:
    """For far longer than its lease."""

    async def play() -> None:
        book = Book()
        async with joined(folder, book, lease_s=0.6) as a:
            before = a.member.spec.incarnation
            async with a.stream(**RUNNING) as stream:
                await stream.next()
                a.engine.paused = True
                book.store.stop()
                await asyncio.sleep(1.0)
                a.engine.paused = False
                assert (await stream.rest())[-1]["choices"][0]["finish_reason"] == "length"
            assert (await a.ask(prompt="x")).status_code == 200
            a.engine.stored = (7,)
            await until(lambda: not a.engine.stored)
            book.store.start(wipe=wipe)
            await until(lambda: book.spec("a") is not None)
            assert book.spec("a")["incarnation"] == before == a.member.spec.incarnation
            await until(lambda: f"{REPORT}/a" in book.store.reports and book.report("a").stored == (7,))

    asyncio.run(play())


def test_whose_place_another_took_meanwhile_is_fenced(folder: Path) -> None:
    async def play() -> None:
        book = Book()
        async with joined(folder, book, lease_s=0.6) as a:
            async with a.stream(**RUNNING) as stream:
                await stream.next()
                a.engine.paused = True
                book.store.stop()
                await asyncio.sleep(1.0)
                book.store.start()
                other = await Registry(book.store, book.clock).register(a.member.spec, lease_s=0.6)
                assert (await stream.rest())[-1]["error"]["code"] == "lease_lost"
                await other.close()
            a.engine.paused = False
            await until(lambda: book.spec("a") is not None)
            assert a.member.spec.incarnation > other.incarnation

    asyncio.run(play())


def test_a_role_changes_when_nothing_is_in_flight_and_nothing_leased(folder: Path) -> None:
    async def play() -> None:
        book = Book()
        async with joined(folder, book) as a:
            first = await a.ask(prompt="abcd", max_tokens=1, kv_transfer_params={"do_remote_decode": True})
            async with a.stream(**RUNNING) as stream:
                await stream.next()
                a.engine.paused = True
                assert (await a.ask("/pdlab/v1/role", role="prefill")).status_code == 202
                await until(lambda: book.spec("a").get("draining", False))
                assert (await a.http.get("/pdlab/v1/instance")).json()["state"] == "switching"
                assert (await a.ask(prompt="x")).json()["error"]["code"] == "draining"
                a.engine.paused = False
                assert (await stream.rest())[-1]["choices"][0]["finish_reason"] == "length"
            await asyncio.sleep(0.05)
            assert book.spec("a")["role"] == "decode"
            await a.ask("/pdlab/v1/release", lease=first.json()["kv_transfer_params"]["remote_request_id"])
            await until(lambda: book.spec("a")["role"] == "prefill")
            assert not book.spec("a").get("draining", False)
            assert book.spec("a")["incarnation"] == 1
            assert (await a.ask(prompt="x")).status_code == 200

    asyncio.run(play())


def test_draining_lets_what_runs_end_then_leaves_and_says_so(folder: Path) -> None:
    async def play() -> None:
        book, gone = Book(), asyncio.Event()
        async with joined(folder, book, left=gone.set) as a:
            async with a.stream(**RUNNING) as stream:
                await stream.next()
                a.engine.paused = True
                assert (await a.ask("/pdlab/v1/drain")).status_code == 202
                await until(lambda: book.spec("a").get("draining", False))
                assert not gone.is_set()
                late = await a.ask("/pdlab/v1/role", role="mixed")
                assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
                a.engine.paused = False
                await stream.rest()
            async with asyncio.timeout(60):
                await gone.wait()
            assert book.spec("a") is None

    asyncio.run(play())


def test_it_leaves_when_its_engine_has_nothing_though_nobody_is_answered_any_more(folder: Path) -> None:
    async def play() -> None:
        book, gone = Book(), asyncio.Event()
        async with joined(folder, book, left=gone.set) as a:
            a.engine.load = Step([], idle=False)  # such as what it reserved for a client that has gone
            await a.ask("/pdlab/v1/drain")
            await until(lambda: book.spec("a").get("draining", False))
            await asyncio.sleep(0.05)
            assert not gone.is_set()
            a.engine.load = Step([])
            async with asyncio.timeout(60):
                await gone.wait()

    asyncio.run(play())


def test_a_report_that_fails_is_logged_once_and_the_next_is_made_all_the_same(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        book = Book()
        async with joined(folder, book) as a:
            make, failures = a.engine.report, 0

            def report(name: str, incarnation: int) -> Report:
                nonlocal failures
                if failures < 5:
                    failures += 1
                    raise ArithmeticError("no report")
                return make(name, incarnation)

            a.engine.report = report  # type: ignore[method-assign]
            await until(lambda: failures == 5)
            a.engine.stored = (1, 2)
            await until(lambda: f"{REPORT}/a" in book.store.reports and book.report("a").stored == (1, 2))
            assert (await a.ask(prompt="x")).status_code == 200

    asyncio.run(play())
    assert [record.message for record in caplog.records if record.exc_info] == ["a cannot report its load, and tries again"]


def test_what_is_leased_where_one_drains_may_still_be_decoded_there(folder: Path) -> None:
    async def play() -> None:
        book, gone = Book(), asyncio.Event()
        async with joined(folder, book, left=gone.set) as a:
            asked = {"prompt": "abcdefgh", "max_tokens": 3, "temperature": 0}
            held = (await a.ask(**{**asked, "max_tokens": 1}, kv_transfer_params={"do_remote_decode": True})).json()
            await a.ask("/pdlab/v1/drain")
            await until(lambda: book.spec("a").get("draining", False))
            late = await a.ask(**asked)
            assert (late.status_code, late.json()["error"]["code"]) == (503, "draining"), "nothing new comes in"
            answer = await a.ask(**asked, kv_transfer_params=held["kv_transfer_params"])
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 3
            async with asyncio.timeout(60):
                await gone.wait()

    asyncio.run(play())


def test_without_a_registry_it_switches_and_drains_as_well(folder: Path) -> None:
    async def play() -> None:
        gone = asyncio.Event()
        async with joined(folder, None, left=gone.set) as a:
            a.member.switch(Role.PREFILL)
            await until(lambda: a.member.state == "ready")
            assert a.member.spec.role is Role.PREFILL
            a.member.drain()
            async with asyncio.timeout(60):
                await gone.wait()
            assert (await a.ask(prompt="x")).status_code == 503

    asyncio.run(play())


def test_kv_that_does_not_fit_the_others_of_the_model_is_a_mistake_told_at_once(folder: Path) -> None:
    async def play() -> None:
        book = Book()
        other = KvEngine("b")
        other.ready = msgspec.structs.replace(other.ready, descriptor=descriptor("b", head_dim=16, dtype="bfloat16"))
        async with joined(folder, book):
            wrong = (
                r"^instance 'b' cannot join 'a', which serves tiny too: KV does not fit: head_dim 16 at b and 8 at a \(dtype "
                r"would be converted\)$"
            )
            with pytest.raises(UsageError, match=wrong):
                async with instance(folder, "b", registry=book.registry, engine=other, **QUICK):
                    pass
            other.ready = KvEngine("b").ready
            async with local_instances.instance(folder, "b", registry=book.registry, engine=other, **QUICK):
                assert book.spec("b") is not None

    asyncio.run(play())
