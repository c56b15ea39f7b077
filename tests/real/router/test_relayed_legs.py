"""Which legs go through the instance that prefilled, and what a break on the way is taken for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from pdlab.core.router import Router
from pdlab.core.types import CAPABILITIES, InstanceSpec, Role
from pdlab.experiment.deployment import TransferSpec
from pdlab.policies.round_robin import RoundRobin
from pdlab.real.api.app import create_app
from pdlab.real.api.service import Service
from pdlab.real.models.tokenizer import Tokenizer
from pdlab.real.net.http import Broken
from pdlab.real.net.wire import StreamEvent
from pdlab.real.router.cluster_engine import ClusterEngine
from pdlab.real.router.remote import Hear, LegAsk
from pdlab.real.router.world import LiveWorld
from tests.real.router.test_cluster_engine import Alphabet
from tests.support import echo_engine

MODES: list[dict[str, Any]] = [{"mode": "pull"}, {"mode": "push"}]
BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "temperature": 0}


class Spelling(Alphabet):
    """Reserves where it is asked to, and goes on when it is told. A leg that comes through one that has died breaks off after a while."""

    dead: frozenset[str] = frozenset()

    async def decode(self, ask: LegAsk, hear: Hear) -> None:
        if ask.params is not None and ask.params.pdlab is not None and ask.params.pdlab.reserve:
            self.going_on = asyncio.Event()
            hear(StreamEvent("reserved", ticket="t", descriptor="{}", block_ids=[1]))
            await self.going_on.wait()
            extra = msgspec.structs.replace(ask.params.pdlab, made=self.made)
            ask = replace(ask, params=msgspec.structs.replace(ask.params, pdlab=extra))
        heard = 0

        def until_it_dies(news: Any) -> None:
            nonlocal heard
            heard += 1
            if ask.through in Spelling.dead and heard > 3:
                raise Broken("the stream broke off")
            hear(news)

        await super().decode(ask, until_it_dies)

    async def proceed(self, go: Any) -> None:
        self.made = list(go.made)
        self.going_on.set()

    async def alive(self, within_s: float = 1.0) -> bool:
        return self.spec.url not in Spelling.dead


def play(transfer: dict[str, Any], test: Callable[[httpx.AsyncClient, LiveWorld], Awaitable[None]], folder: Path) -> None:
    async def main() -> None:
        started_s = time.monotonic()
        spec = TransferSpec(**transfer)
        router = Router(RoundRobin(), reserve_first=spec.reserve_first)
        made = LiveWorld(router, Spelling, transfer=spec, now=lambda: time.monotonic() - started_s)
        for name in ("p0", "p1", "d0"):
            role = Role.PREFILL if name.startswith("p") else Role.DECODE
            made.instances.join(InstanceSpec(name=name, role=role, kv_blocks=100, capabilities=CAPABILITIES, url=f"http://{name}:1"))
        made.open()
        tokenizer = Tokenizer.load(folder)
        app = create_app(Service(ClusterEngine(made, "tiny", tokenizer.vocab), tokenizer, "tiny", max_requests=None))
        try:
            async with httpx.AsyncClient(base_url="http://router", transport=httpx.ASGITransport(app), timeout=60) as http:
                await test(http, made)
        finally:
            await made.close()
        made.check()
        assert not made.requests.by_id

    asyncio.run(main())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return echo_engine.byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def remote(world: LiveWorld, name: str) -> Spelling:
    found = world.instances.members[name].remote
    assert isinstance(found, Spelling)
    return found


@pytest.mark.parametrize("transfer", MODES, ids=lambda mode: str(mode["mode"]))
@pytest.mark.parametrize("path", ["direct", "via_prefill"])
def test_decode_legs_go_through_who_prefilled_and_no_others(transfer: dict[str, Any], path: str, folder: Path) -> None:
    async def test(http: httpx.AsyncClient, world: LiveWorld) -> None:
        for _ in range(2):
            answer = await http.post("/v1/completions", json=BODY)
            assert answer.json()["choices"][0]["text"] == "abcdefgh"
        assert [ask.through for ask in remote(world, "d0").asks] == (["http://p0:1", "http://p1:1"] if path == "via_prefill" else ["", ""])
        assert not any(ask.through for name in ("p0", "p1") for ask in remote(world, name).asks)

    play({**transfer, "response_path": path}, test, folder)


@pytest.mark.parametrize("transfer", MODES, ids=lambda mode: str(mode["mode"]))
def test_a_break_is_the_prefill_instances_where_it_is_dead(transfer: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spelling, "dead", frozenset(["http://p0:1"]))

    async def test(http: httpx.AsyncClient, world: LiveWorld) -> None:
        answer = await http.post("/v1/completions", json=BODY, headers={"X-PDLab-Timeline": "1"})
        first, second = (remote(world, name).asks[0].tokens for name in ("p0", "p1"))
        sent = len(second) - len(first)  # which are part of the prompt now; it is spelled anew from there
        assert sent >= 2 and answer.json()["choices"][0]["text"] == "abcdefgh"[:sent] + "abcdefgh"[: 8 - sent]
        line = answer.json()["pdlab"]["timeline"]
        assert (line["prefill_instance"], line["decode_instance"], line["attempts"]) == ("p1", "d0", 2)
        assert world.instances.members["p0"].gone and not world.instances.members["d0"].gone

    play({**transfer, "response_path": "via_prefill"}, test, folder)
