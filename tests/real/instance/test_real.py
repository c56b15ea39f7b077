"""Two instances with real engines, each in a process of its own: every way from one to the other gives what one engine alone gives."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pdlab.real.api.metrics import CAUSES
from pdlab.real.engine.messages import Exported
from pdlab.real.engine.options import EngineOptions
from pdlab.real.instance.engine_client import EngineClient
from tests.support import served, tiny_models
from tests.support.local_instances import Instance, instance, tokens_of

PROMPT = list(b"the quick brown fox jumps over the lazy dog")
ASKED: dict[str, Any] = {
    "prompt": PROMPT,
    "temperature": 0,
    "max_tokens": 24,
    "ignore_eos": True,
    "return_token_ids": True,
    "detokenize": False,
}


@asynccontextmanager
async def pair(folder: Path) -> AsyncIterator[tuple[Instance, Instance]]:
    def options(name: str) -> EngineOptions:
        return EngineOptions(
            model=str(folder), threads=1, block_tokens=4, kv_blocks=400, max_seqs=16, max_batch_tokens=256, kv_name=name, kv_token="t"
        )

    a = await EngineClient.start(options("a"))
    try:
        b = await EngineClient.start(options("b"))
        try:
            async with instance(folder, "a", engine=a) as one, instance(folder, "b", engine=b) as two:
                yield one, two
                await at_rest(one, two)
                assert a.load.leaked_blocks == b.load.leaked_blocks == 0
        finally:
            await b.close()
    finally:
        await a.close()


async def at_rest(*instances: Instance) -> None:
    """No block is in use. Each look is a request, since an idle engine does not tell its load."""
    async with asyncio.timeout(60):
        for one in instances:
            load = None
            while load is None or load.leases or load.report.used_blocks:
                assert (await one.ask(prompt="x", max_tokens=1)).status_code == 200
                load = one.engine.load


async def prefill(p: Instance) -> tuple[list[int], dict[str, Any]]:
    answer = await p.ask(**{**ASKED, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found["choices"][0]["token_ids"], found["kv_transfer_params"]


async def landed(p: Instance) -> float:
    page = (await p.http.get("/metrics")).text
    return next(float(line.split()[-1]) for line in page.splitlines() if line.startswith("vllm:nixl_bytes_transferred_count{"))


def test_every_way_from_one_instance_to_the_other(tmp_path: Path) -> None:
    async def play() -> None:
        folder = served.make(tmp_path)
        async with pair(folder) as (a, b):
            expected = (await b.ask(**ASKED)).json()["choices"][0]["token_ids"]
            assert len(expected) == 24
            async with b.stream(**ASKED, kv_transfer_params={"pdlab": {"events": True}}) as stream:
                told = await stream.event()
                assert told["event"] == "prefilled" and told["cached_tokens"] > 0 and told["queue_s"] > 0.0
                assert tokens_of(await stream.rest()) == expected

            first, params = await prefill(a)
            assert first == expected[:1]
            answer = await b.ask(**ASKED, kv_transfer_params=params)  # as a proxy that knows nothing of pdlab
            assert answer.json()["choices"][0]["token_ids"] == expected

            for where in (b, a):  # read there, or decoded where it was computed
                _, params = await prefill(a)
                params["pdlab"] |= {"made": first, "events": True}
                async with where.stream(**ASKED, kv_transfer_params=params) as stream:
                    assert (await stream.event())["made"] == 1
                    assert first + tokens_of(await stream.rest()) == expected

            reserve = {"do_remote_prefill": True, "pdlab": {"reserve": True, "events": True}}
            for push in (False, True):
                came = await landed(b)
                async with b.stream(f"reserved-{push}", **ASKED, kv_transfer_params=reserve) as stream:
                    event = await stream.event()
                    go: dict[str, Any] = {"leg": f"reserved-{push}", "made": first}
                    if push:
                        to = {key: event.get(key, 0) for key in ("descriptor", "ticket", "block_ids", "cached_tokens")}
                        pushed = {"do_remote_decode": True, "pdlab": {"push": {**to, "granularity": "layer"}}}
                        sent = await a.ask(**{**ASKED, "max_tokens": 1, "kv_transfer_params": pushed})
                        assert sent.json()["kv_transfer_params"] is None
                    else:
                        go["kv_transfer_params"] = (await prefill(a))[1]
                    assert (await b.ask("/pdlab/v1/continue", **go)).status_code == 200
                    assert (await stream.event())["event"] == "transferred"
                    assert first + tokens_of(await stream.rest()) == expected
                assert await landed(b) == came + 1, "a push counts as a pull does"

            _, params = await prefill(a)
            await a.ask("/pdlab/v1/release", lease=params["remote_request_id"])
            await at_rest(a)
            lost = await b.ask(**ASKED, kv_transfer_params=params)
            error = lost.json()["error"]
            assert (lost.status_code, error["code"], error["cause"]) == (409, "kv_lost", "expired")
            page = (await b.http.get("/metrics")).text
            failures = [line for line in page.splitlines() if line.startswith("pdlab:transfer_failures_total{")]
            assert [line.endswith(" 1.0") for line in failures if 'cause="expired"' in line] == [True]
            assert len(failures) == len(CAUSES)

    asyncio.run(play())


def stand_still_until_asked_for_its_kv(engine: EngineClient) -> None:
    """So that what it runs can't end before a destination has asked for it, however far this process, which is its server, lags behind."""
    export = engine.export

    async def asked(*args: Any, **options: Any) -> Exported:
        engine.process.send_signal(signal.SIGCONT)
        return await export(*args, **options)

    engine.process.send_signal(signal.SIGSTOP)
    engine.export = asked  # type: ignore[method-assign]


def test_a_running_request_moves(tmp_path: Path) -> None:
    async def play() -> None:
        folder = served.make(tmp_path, **tiny_models.SLOW, max_position_embeddings=2048)
        asked = {**ASKED, "max_tokens": 1200}
        async with pair(folder) as (a, b):
            expected = (await b.ask(**asked)).json()["choices"][0]["token_ids"]
            move = {"do_remote_prefill": True, "pdlab": {"migrate": {"url": a.url, "leg": "r1"}, "events": True}}
            async with a.stream("r1", **asked) as old:
                before = tokens_of([await old.next()])
                stand_still_until_asked_for_its_kv(a.engine)
                async with b.stream("r2", **asked, kv_transfer_params=move) as new:
                    made = (await new.event())["made"]
                    rest = await old.rest()
                    assert rest[-1]["pdlab"] == {"event": "moved"}
                    before += tokens_of(rest)
                    assert len(before) == made
                    assert before + tokens_of(await new.rest()) == expected

    asyncio.run(play())
