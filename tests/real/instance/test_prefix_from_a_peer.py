"""A prompt whose beginning another instance has cached: it is read there, over real transports, and the rest is computed. The tokens are
those of computing it all; and where nothing comes, all is computed and nothing lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdlab.core.prefix import chain
from pdlab.real.engine.load import load
from pdlab.real.engine.messages import Cancel, Exported, Landed, Lend, Missed, Receive, Release, Sampling, Source
from pdlab.real.engine.options import EngineOptions
from tests.real.instance.test_real import ASKED, pair
from tests.support import served
from tests.support.engine_driver import Driver
from tests.support.engine_nodes import BLOCK, Node, node, submit, until
from tests.support.local_instances import Instance

SAMPLING = Sampling(max_tokens=6, seed=3, top_p=0.9)
PREFIX = [random.Random(2).randrange(300) for _ in range(40)]
LONG = [*PREFIX, 5, 6, 7, 8, 9]


@pytest.fixture
def options(tiny: Any) -> EngineOptions:
    return EngineOptions(
        model=str(tiny("qwen3")[0]), block_tokens=BLOCK, kv_blocks=60, max_batch_tokens=16, threads=1, kv_name="x", batching="chunked"
    )


@pytest.fixture
def nodes(options: EngineOptions, request: pytest.FixtureRequest) -> Iterator[tuple[Node, Node]]:
    transport = getattr(request, "param", "auto")
    with ExitStack() as stack:
        yield tuple(stack.enter_context(node(name, options, transport=transport)) for name in "hp")  # type: ignore[misc]


@pytest.fixture
def expected(options: EngineOptions) -> list[int]:
    driver = Driver(load(options).engine)
    driver.submit(0, LONG, SAMPLING)
    driver.run()
    return driver.tokens[0, 0]


def lent(holder: Node, call: int, prompt: list[int] = LONG) -> Exported:
    holder.tell(Lend(call, chain(prompt[: len(prompt) - 1], BLOCK)))
    return until(lambda: holder.exported(call), holder)


def warmed(holder: Node) -> None:
    holder.tell(submit(100, [*PREFIX, 1], Sampling(max_tokens=1)))
    until(lambda: holder.finish(100), holder)


def fetching(holder: Node, loan: Exported, id: int = 1) -> Receive:
    source = Source(holder.descriptor, loan.lease, loan.blocks, loan.kv_tokens)
    return Receive(submit(id, LONG, SAMPLING), [], source, True, 5.0, prefix=True)


def computed(p: Node) -> int:
    return p.engine.load([], 0.0).prompt_tokens


@pytest.mark.parametrize("nodes", ["shm", "tcp"], indirect=True)
def test_tokens_are_those_of_computing_it_and_only_the_rest_is_computed(nodes: tuple[Node, Node], expected: list[int]) -> None:
    holder, p = nodes
    warmed(holder)
    loan = lent(holder, 1)
    assert loan.kv_tokens == 40
    before = computed(p)
    p.tell(fetching(holder, loan))
    until(lambda: p.finish(1), *nodes)
    assert p.tokens(1) == expected
    assert computed(p) - before == len(LONG) - 40
    (landed,) = p.news(Landed, 1)
    assert landed.prefix_tokens == 40
    assert landed.bytes > 0
    until(lambda: not holder.kv_service.lending.prefixes, *nodes)
    holder.at_rest()
    p.at_rest()


def test_what_was_lent_stays_while_others_want_blocks_and_is_free_after(nodes: tuple[Node, Node]) -> None:
    holder, _ = nodes
    warmed(holder)
    loan = lent(holder, 1)
    assert holder.engine.scheduler.pool.used == 10
    holder.tell(submit(2, [7] * 180, Sampling(max_tokens=2)))  # all that is left
    until(lambda: holder.finish(2), holder)
    assert lent(holder, 2).kv_tokens == 40, "it is there still"
    holder.tell(Release(loan.lease))
    holder.tell(Release(holder.exported(2).lease))  # type: ignore[union-attr]
    until(lambda: not holder.kv_service.lending.prefixes, holder)
    holder.at_rest()


def test_a_holder_that_has_evicted_lends_what_it_has(nodes: tuple[Node, Node]) -> None:
    holder, _ = nodes
    warmed(holder)
    holder.tell(submit(2, [9] * 200, Sampling(max_tokens=2)))  # 51 of 60 blocks
    until(lambda: holder.finish(2), holder)
    some = lent(holder, 1)
    assert 0 < some.kv_tokens < 40, "a prefix's tail goes first"
    holder.tell(Release(some.lease))
    holder.tell(submit(3, [11] * 238, Sampling(max_tokens=2)))
    until(lambda: holder.finish(3), holder)
    assert lent(holder, 2) == Exported(2), "nothing"


@pytest.mark.parametrize("trouble", ["the lease has ended", "the holder has died"])
def test_where_nothing_comes_it_is_computed(trouble: str, nodes: tuple[Node, Node], expected: list[int]) -> None:
    holder, p = nodes
    warmed(holder)
    loan = lent(holder, 1)
    if trouble == "the lease has ended":
        holder.tell(Release(loan.lease))
        until(lambda: not holder.kv_service.lending.prefixes, holder)
    else:
        holder.kv_service.background.run(holder.kv_service.endpoint.close())
    p.tell(fetching(holder, loan))
    until(lambda: p.finish(1), p)
    assert p.tokens(1) == expected
    assert p.news(Missed, 1)
    assert not p.news(Landed, 1)
    p.at_rest()


def test_without_blocks_to_wait_in_it_is_computed_in_its_turn(nodes: tuple[Node, Node], expected: list[int]) -> None:
    holder, p = nodes
    warmed(holder)
    p.tell(submit(2, [7] * 190, Sampling(max_tokens=30)))
    until(lambda: p.tokens(2), p)
    p.tell(fetching(holder, lent(holder, 1)))
    until(lambda: p.finish(1), *nodes)
    assert p.tokens(1) == expected
    until(lambda: p.finish(2), *nodes)
    p.at_rest()


def test_a_cancelled_one_leaves_nothing(nodes: tuple[Node, Node]) -> None:
    holder, p = nodes
    warmed(holder)
    p.tell(fetching(holder, lent(holder, 1)))
    p.tell(Cancel(1))
    until(lambda: p.finish(1), *nodes)
    assert p.finish(1) == "abort"
    until(lambda: p.engine.scheduler.idle, *nodes)
    p.at_rest()


# ---------------------------------------------------------------- over HTTP, each engine in a process of its own


async def prefilled(p: Instance, url: str, tokens: int = 40) -> tuple[dict[str, Any], dict[str, Any]]:
    """(its `pdlab`, its kv_transfer_params)"""
    params = {"do_remote_decode": True, "pdlab": {"fetch": {"url": url, "tokens": tokens, "deadline_s": 5.0}}}
    answer = await p.ask(**{**ASKED, "max_tokens": 1, "kv_transfer_params": params})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["pdlab"] | {"usage": body["usage"]}, body["kv_transfer_params"]


def test_whoever_computes_a_prompt_reads_its_prefix_from_another_instance_or_computes_it(tmp_path: Path) -> None:
    asyncio.run(_over_http(served.make(tmp_path)))


async def _over_http(folder: Path) -> None:
    async with pair(folder) as (holder, p):
        told, params = await prefilled(p, holder.url)
        assert told["fetched"] == {}, "it has nothing"
        expected = await decoded(p, params)
        await evicted(p)
        told, params = await prefilled(p, "http://127.0.0.1:9")
        assert told["fetched"] == {"unreachable": True}
        assert await decoded(p, params) == expected
        await evicted(p)
        told, params = await prefilled(p, "http://192.0.2.1:9")
        assert told["fetched"] == {}, "another host is not asked"
        assert await decoded(p, params) == expected
        await evicted(p)
        assert (await holder.ask(**ASKED)).json()["choices"][0]["token_ids"] == expected
        told, params = await prefilled(p, holder.url)
        assert told["fetched"]["tokens"] == 40
        assert told["fetched"]["bytes"] > 0
        assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == 40
        assert await decoded(p, params) == expected
        await evicted(p)
        whole = await p.ask(**ASKED, kv_transfer_params=alone(holder.url))
        assert whole.json()["choices"][0]["token_ids"] == expected, "who decodes what it prefills reads it, too"
        assert whole.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 40
        await _checked(holder, p)


def alone(url: str) -> dict[str, Any]:
    return {"pdlab": {"events": True, "fetch": {"url": url, "tokens": 40, "deadline_s": 5.0}}}


async def evicted(p: Instance) -> None:
    """Whatever it had cached: each of these prompts takes 118 of its 400 blocks."""
    for first in range(250, 254):
        answer = await p.ask(**{**ASKED, "prompt": [first, *range(1, 250), *range(1, 220)], "max_tokens": 1})
        assert answer.status_code == 200, answer.text


async def decoded(p: Instance, params: dict[str, Any]) -> list[int]:
    answer = await p.ask(**{**ASKED, "kv_transfer_params": params})
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


async def _checked(holder: Instance, p: Instance) -> None:
    for body, field in (({"hashes": []}, "hashes"), ({"hashes": [1], "lease_s": -1}, "lease_s"), ({}, "hashes")):
        answer = await holder.http.post("/pdlab/v1/lend", json=body)
        assert answer.status_code == 400, answer.text
        assert field in answer.text
    for fetch, words in (({"url": "ftp://x", "tokens": 1}, "neither http nor https"), ({"url": "http://x", "tokens": 0}, "out of range")):
        params = {"do_remote_decode": True, "pdlab": {"fetch": fetch}}
        answer = await p.ask(**{**ASKED, "max_tokens": 1, "kv_transfer_params": params})
        assert answer.status_code == 400
        assert words in answer.text
    for more, words in (
        ({"kv_transfer_params": {"pdlab": {"fetch": {"url": "http://x", "tokens": 1}}}}, "needs do_remote_decode"),
        ({"kv_transfer_params": alone("http://x"), "n": 2}, "n and best_of must be 1"),
    ):
        answer = await p.ask(**ASKED | more)
        assert answer.status_code == 400
        assert words in answer.text
    assert msgspec.json.decode((await holder.http.post("/pdlab/v1/lend", json={"hashes": [1, 2]})).content).get("lease", "") == ""
