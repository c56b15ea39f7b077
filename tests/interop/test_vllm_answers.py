"""What pdlab's router takes for granted of a vLLM server, asked of a real one, by the router's own classes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pdlab.core.types import UNKNOWN, InstanceSpec, Role, UsageError
from pdlab.real.engine.messages import Sampling
from pdlab.real.net.http import Broken
from pdlab.real.router.http_remote import HttpRemote
from pdlab.real.router.remote import LegAsk, LegNews, LegTokens, Prefilled, Unfit
from pdlab.real.router.vllm import Vllm
from tests.support.vllm_servers import NAME, VllmServer

pytestmark = pytest.mark.interop
Pair = tuple[VllmServer, VllmServer]


def prompt(tokens: int, seed: int) -> list[int]:
    rng = random.Random(f"{tokens} {seed}")
    return [rng.randrange(100, 40_000) for _ in range(tokens)]


def ask(tokens: list[int], leg: str, raw: bytes | None = None, **sampling: Any) -> LegAsk:
    sampling = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | sampling
    return LegAsk(leg, 1, 1, tokens, Sampling(**sampling), raw_params=raw)


def legs(pair: Pair, test: Callable[[HttpRemote, HttpRemote], Awaitable[None]]) -> None:
    async def run() -> None:
        remotes = [
            HttpRemote(InstanceSpec(name=name, role=Role.MIXED, kv_blocks=1, url=server.url, model=NAME, engine="vllm"))
            for name, server in zip(("p", "d"), pair, strict=True)
        ]
        try:
            async with asyncio.timeout(300):
                await test(*remotes)
        finally:
            for remote in remotes:
                remote.close()
            await asyncio.sleep(0.01)

    asyncio.run(run())


async def read(remote: HttpRemote, asked: LegAsk) -> tuple[list[int], str | None, list[float]]:
    heard: list[Any] = []
    await remote.decode(asked, heard.append)
    assert all(isinstance(news, LegTokens) for news in heard) and all(news.finish is None for news in heard[:-1])
    tokens = [token for news in heard for token in news.tokens]
    return tokens, heard[-1].finish, [logprob for news in heard for logprob in news.logprobs or []]


async def both(p: HttpRemote, d: HttpRemote, tokens: list[int], **sampling: Any) -> tuple[Prefilled, list[int], str | None]:
    """The two legs, one after the other."""
    first = await p.prefill(ask(tokens, "p", **sampling))
    assert first.raw_params is not None
    made, finish, _ = await read(d, ask(tokens, "d", first.raw_params, **sampling))
    return first, made, finish


def test_it_says_what_it_is_and_how_much_kv_it_holds(pair: Pair) -> None:
    async def test() -> None:
        vllm = Vllm(pair[0].url)
        try:
            spec, longest = await vllm.probe("p", Role.PREFILL)
            assert spec.model == NAME and spec.block_tokens == 128 and spec.kv_blocks == 182 and longest == 4096
            assert spec.prefix_cache and spec.engine == "vllm" and spec.capabilities == ("pull",)
            with pytest.raises(UsageError, match="serves smol, not 'other'"):
                await vllm.probe("p", Role.PREFILL, "other")
        finally:
            vllm.close()
            await asyncio.sleep(0.01)

    asyncio.run(test())


@pytest.mark.parametrize("length", [5, 128, 261])
def test_what_one_prefilled_another_decodes_as_one_alone_would(pair: Pair, length: int) -> None:
    p, d = pair
    tokens = prompt(length, 1)
    before, computed = d.metric("vllm:nixl_bytes_transferred_sum"), d.metric("vllm:prompt_tokens_by_source_total", source="local_compute")

    async def test(prefill: HttpRemote, decode: HttpRemote) -> None:
        first, made, finish = await both(prefill, decode, tokens)
        assert made[0] == first.token and len(made) == 8 and finish == "length"
        assert first.params is not None and first.params.do_remote_prefill and first.params.remote_num_tokens == length
        moved = d.metric("vllm:nixl_bytes_transferred_sum") - before
        assert moved == -(-length // 128) * 128 * 30 * 2 * 3 * 64 * 4  # whole blocks of 30 layers, K and V, 3 heads of 64 float32
        assert d.metric("vllm:prompt_tokens_by_source_total", source="local_compute") == computed
        assert made == p.generate(tokens, 8)

    legs(pair, test)


def test_logprobs_come_with_token_ids(pair: Pair) -> None:
    """The first that ask for them wait for a compiler, up to a minute on two cores."""

    async def test(prefill: HttpRemote, decode: HttpRemote) -> None:
        tokens = prompt(40, 2)
        first = await prefill.prefill(ask(tokens, "p", logprobs=2))
        made, _, logprobs = await read(decode, ask(tokens, "d", first.raw_params, logprobs=2))
        assert first.top is not None and first.top[0] == (first.token, first.logprob) and len(first.top) == 2
        assert first.logprob == pytest.approx(logprobs[0], abs=1e-3) and len(logprobs) == len(made) == 8

    legs(pair, test)


def test_a_stop_token_ends_either_leg_and_is_told(pair: Pair) -> None:
    async def test(prefill: HttpRemote, decode: HttpRemote) -> None:
        tokens = prompt(150, 3)
        _, made, _ = await both(prefill, decode, tokens)
        first = await prefill.prefill(ask(tokens, "p2", stop_token_ids=(made[0],)))
        assert (first.token, first.finish) == (made[0], "stop")
        stop = next(token for token in made if token != made[0])
        _, until, finish = await both(prefill, decode, tokens, stop_token_ids=(stop,))
        assert (until, finish) == (made[: made.index(stop) + 1], "stop")

    legs(pair, test)


def test_several_candidates_are_drawn_from_one_pull(pair: Pair) -> None:
    async def test(prefill: HttpRemote, decode: HttpRemote) -> None:
        tokens = prompt(150, 4)
        first = await prefill.prefill(ask(tokens, "p"))
        found: dict[int, list[int]] = {0: [], 1: []}

        def hear(news: LegNews) -> None:
            assert isinstance(news, LegTokens)
            found[news.candidate] += news.tokens

        await decode.decode(ask(tokens, "d", first.raw_params, best_of=2, temperature=1.0, seed=7), hear)
        assert [len(made) for made in found.values()] == [8, 8] and found[0] != found[1]

    legs(pair, test)


def test_what_it_can_never_serve_is_the_clients_fault(pair: Pair) -> None:
    async def test(prefill: HttpRemote, decode: HttpRemote) -> None:
        too_long = prompt(4097, 5)
        for leg in (prefill.prefill(ask(too_long, "p")), read(decode, ask(too_long, "d"))):
            with pytest.raises(Unfit, match="maximum context length is 4096"):
                await leg

    legs(pair, test)


def test_kv_that_nobody_has_breaks_the_leg_and_leaves_the_server_well(pair: Pair) -> None:
    async def test(prefill: HttpRemote, decode: HttpRemote) -> None:
        tokens = prompt(150, 6)
        first = await prefill.prefill(ask(tokens, "p"))
        assert first.raw_params is not None and first.params is not None
        nobody = first.raw_params.replace(str(first.params.remote_engine_id).encode(), b"nobody")
        nobody = nobody.replace(str(first.params.remote_port).encode(), b"9")
        with pytest.raises(Broken, match="500"):
            await read(decode, ask(tokens, "d", nobody))
        assert await decode.alive()
        assert (await read(decode, ask(tokens, "d2", first.raw_params)))[0][0] == first.token

    legs(pair, test)


def test_hanging_up_ends_the_leg_at_the_server_and_its_load_tells(pair: Pair) -> None:
    async def test(_: HttpRemote, decode: HttpRemote) -> None:
        vllm = Vllm(pair[1].url)
        try:
            spec, _ = await vllm.probe("d", Role.DECODE)
            leg = asyncio.create_task(decode.decode(ask(prompt(300, 7), "d", max_tokens=3000), lambda news: None))
            while (report := await vllm.report(spec, 0.0)).running != 1:
                await asyncio.sleep(0.05)
            assert report.used_blocks >= 3 and report.free_blocks == spec.kv_blocks - report.used_blocks
            leg.cancel()
            while (report := await vllm.report(spec, 0.0)).running or report.used_blocks:
                await asyncio.sleep(0.05)
            assert (report.free_blocks, report.waiting, report.waiting_tokens) == (spec.kv_blocks, 0, UNKNOWN)
        finally:
            vllm.close()

    legs(pair, test)
