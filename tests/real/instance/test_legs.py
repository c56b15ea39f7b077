"""The legs of a request, as docs/reference/protocol.md tells them: prefill here, decode there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdlab.real.engine.messages import Proceed, Receive, Resume
from tests.support.kv_engine import KvEngine
from tests.support.local_instances import Instance, instance, tokens_of, until

PROMPT = list(b"abcdefghij")
HANDED_ON = ("remote_block_ids", "remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_num_tokens")
DECODE: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 5, "return_token_ids": True, "detokenize": False}


async def prefill(p: Instance, **fields: Any) -> Any:
    asked = {"prompt": PROMPT, "max_tokens": 1, "return_token_ids": True, "stream": False, **fields}
    asked.setdefault("kv_transfer_params", {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(HANDED_ON)})
    answer = await p.ask(request_id="r1-p", **asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("tp", [1, 2])
def test_a_prefill_leg_answers_what_vllm_answers_and_a_descriptor(tp: int, folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p") as p:
            p.engine.ready = msgspec.structs.replace(p.engine.ready, tp=tp)
            answer = await prefill(p)
            (choice,) = answer["choices"]
            assert (choice["token_ids"], choice["finish_reason"]) == ([PROMPT[0]], "length")
            (lease,) = p.engine.shelf
            assert answer["kv_transfer_params"] == {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_block_ids": [[100, 101, 102]],
                "remote_engine_id": "engine-p",
                "remote_request_id": lease,
                "remote_host": "127.0.0.1",
                "remote_port": int(p.url.rsplit(":", 1)[1]),
                "tp_size": tp,
                "remote_num_tokens": 10,
                "transfer_mode": "pull",
                "pdlab": {"descriptor": p.engine.ready.descriptor.decode(), "kv_tokens": 10},
            }
            assert answer["pdlab"] == {"event": "prefilled", "queue_s": 0.25}
            (submit,) = p.engine.submitted
            assert not submit.decodes_here

    asyncio.run(play())


def test_a_prompt_whose_first_token_ends_it_hands_nothing_on(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p") as p:
            for ending in ({"stop_token_ids": [PROMPT[0]]}, {"stop": "a"}):
                answer = await prefill(p, **ending)
                assert answer["choices"][0]["finish_reason"] == "stop"
                assert answer["kv_transfer_params"] is None
            await until(lambda: not p.engine.shelf)

    asyncio.run(play())


def test_pushed_kv_is_not_handed_on(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p") as p:
            push = {"descriptor": "{}", "ticket": "t", "block_ids": [1, 2, 3], "cached_tokens": 4, "granularity": "layer"}
            answer = await prefill(p, kv_transfer_params={"do_remote_decode": True, "pdlab": {"push": push}})
            assert answer["kv_transfer_params"] is None
            sent = p.engine.submitted[0].push
            assert sent is not None
            assert (sent.ticket, sent.blocks, sent.cached_tokens, sent.granularity) == ("t", [1, 2, 3], 4, "layer")

    asyncio.run(play())


def test_a_proxy_that_passes_the_params_through_gets_all_tokens_from_the_decode_instance(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p") as p, instance(folder, "d") as d:
            for chat in (False, True):
                path = "/v1/chat/completions" if chat else "/v1/completions"
                asked: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]} if chat else {"prompt": "hello"}
                first = await p.ask(path, **asked, max_tokens=1, kv_transfer_params={"do_remote_decode": True})
                answer = await d.ask(path, **asked, max_tokens=4, kv_transfer_params=first.json()["kv_transfer_params"])
                plain = await d.ask(path, **asked, max_tokens=4)
                assert answer.json()["choices"] == plain.json()["choices"]
            assert [type(heard) for heard in d.engine.heard] == [Receive, Receive]
            assert not p.engine.shelf

    asyncio.run(play())


def test_a_decode_leg_goes_on_after_what_is_made_and_tells_of_the_transfer(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p") as p, instance(folder, "d") as d:
            params = (await prefill(p))["kv_transfer_params"]
            params["pdlab"] |= {"made": PROMPT[:1], "events": True}
            async with d.stream(**DECODE, kv_transfer_params=params, stream_options={"include_usage": True}) as stream:
                event = await stream.event()
                assert event == {"event": "transferred", "bytes": 192, "seconds": 0.01, "waited_s": 0.002, "transport": "shm", "made": 1}
                chunks = await stream.rest()
            assert tokens_of(chunks) == PROMPT[1:5]
            assert all(choice["text"] == "" for chunk in chunks for choice in chunk["choices"])
            assert chunks[-2]["choices"][0]["finish_reason"] == "length"
            assert chunks[-1]["usage"]["completion_tokens"] == 4

    asyncio.run(play())


def test_who_serves_a_request_alone_tells_of_its_prompt_where_that_is_asked_for(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "m") as m:
            async with m.stream(**DECODE, kv_transfer_params={"pdlab": {"events": True}}) as stream:
                assert (await stream.event())["event"] == "prefilled"
                assert tokens_of(await stream.rest()) == PROMPT[:5]
            async with m.stream(**DECODE) as stream:
                chunks = await stream.rest()
            assert tokens_of(chunks) == PROMPT[:5] and not any("pdlab" in chunk for chunk in chunks)
            whole = await m.ask(**DECODE, kv_transfer_params={"pdlab": {"events": True}})
            assert whole.json()["choices"][0]["token_ids"] == PROMPT[:5]
            twice = await m.ask(**DECODE | {"prompt": [PROMPT, PROMPT]}, kv_transfer_params={"pdlab": {"events": True}})
            assert twice.status_code == 400 and "one prompt" in twice.text

    asyncio.run(play())


def test_text_goes_on_where_the_made_tokens_left_a_character_unfinished(folder: Path) -> None:
    async def play() -> None:
        prompt = list("äbc".encode())
        async with instance(folder, "p") as p, instance(folder, "d") as d:
            params = (await prefill(p, prompt=prompt))["kv_transfer_params"]
            params["pdlab"]["made"] = prompt[:1]
            answer = await d.ask(prompt=prompt, max_tokens=4, kv_transfer_params=params)
            assert answer.json()["choices"][0]["text"] == "äbc"

    asyncio.run(play())


def test_several_candidates_decode_from_one_prompt(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p") as p, instance(folder, "d") as d:
            params = (await prefill(p))["kv_transfer_params"]
            answer = await d.ask(**DECODE, n=3, kv_transfer_params=params)
            assert [choice["token_ids"] for choice in answer.json()["choices"]] == [PROMPT[c : c + 5] for c in range(3)]

    asyncio.run(play())


def test_at_the_instance_that_holds_the_kv_nothing_is_transferred(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p") as p:
            params = (await prefill(p))["kv_transfer_params"]
            params["pdlab"]["made"] = PROMPT[:1]
            async with p.stream(**DECODE, kv_transfer_params=params) as stream:
                assert tokens_of(await stream.rest()) == PROMPT[1:5]
            assert [type(heard) for heard in p.engine.heard] == [Resume]
            again = await p.ask(**DECODE, kv_transfer_params=params)
            assert (again.status_code, again.json()["error"]["code"]) == (409, "kv_lost")

    asyncio.run(play())


@pytest.mark.parametrize("missing", ["remote_block_ids", "remote_request_id", "pdlab", "all"])
def test_without_what_is_needed_to_read_the_kv_the_prompt_is_computed_here(folder: Path, missing: str) -> None:
    async def play() -> None:
        async with instance(folder, "p") as p, instance(folder, "d") as d:
            params = (await prefill(p))["kv_transfer_params"]
            params = {"do_remote_prefill": True} if missing == "all" else {**params, missing: None}
            answer = await d.ask(**DECODE, kv_transfer_params=params)
            assert answer.json()["choices"][0]["token_ids"] == PROMPT[:5]
            assert not d.engine.heard

    asyncio.run(play())


@pytest.mark.parametrize("push", [False, True])
def test_a_leg_reserves_and_decodes_when_it_is_told_where_its_kv_is(folder: Path, push: bool) -> None:
    async def play() -> None:
        async with instance(folder, "p") as p, instance(folder, "d") as d:
            params = {"do_remote_prefill": True, "pdlab": {"reserve": True, "events": True}}
            async with d.stream("r1-d", **DECODE, kv_transfer_params=params) as stream:
                event = await stream.event()
                assert event == {
                    "event": "reserved",
                    "ticket": event["ticket"],
                    "descriptor": d.engine.ready.descriptor.decode(),
                    "block_ids": [7, 8, 9],
                    "cached_tokens": 4,
                }
                go: dict[str, Any] = {"leg": "r1-d", "made": PROMPT[:1]}
                if not push:
                    go["kv_transfer_params"] = (await prefill(p))["kv_transfer_params"]
                assert (await d.ask("/pdlab/v1/continue", **go)).status_code == 200
                again = await d.ask("/pdlab/v1/continue", **go)
                assert (again.status_code, again.json()["error"]["code"]) == (404, "leg_unknown")
                assert (await stream.event())["event"] == "transferred"
                assert tokens_of(await stream.rest()) == PROMPT[1:5]
            assert [type(heard) for heard in d.engine.heard] == [Receive, Proceed]
            assert d.service.legs == {}

    asyncio.run(play())


def test_no_room_is_a_503_and_lost_kv_a_409(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "p") as p, instance(folder, "d") as d:
            params = (await prefill(p))["kv_transfer_params"]
            d.engine.full = True
            for stream in (False, True):
                answer = await d.ask(**DECODE, stream=stream, kv_transfer_params=params)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "kv_full")
            d.engine.full = False
            await p.ask("/pdlab/v1/release", lease=params["remote_request_id"])
            for stream in (False, True):
                answer = await d.ask(**DECODE, stream=stream, kv_transfer_params=params)
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (409, "kv_lost")
                assert error["message"] == f"the KV did not come: lease {params['remote_request_id']} has ended"
            assert d.at_rest()

    asyncio.run(play())


def test_after_the_stream_has_begun_a_loss_is_told_within_it(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "d") as d:
            params = {"do_remote_prefill": True, "pdlab": {"reserve": True, "deadline_s": 0.05}}
            async with d.stream(**DECODE, kv_transfer_params=params) as stream:
                assert (await stream.event())["event"] == "reserved"
                (last,) = await stream.rest()
            assert last["error"]["code"] == "kv_lost"

    asyncio.run(play())


def test_hanging_up_drops_a_leg_and_what_it_reserved_or_leased(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "d", engine=KvEngine("d", step_s=0.005)) as d:
            async with d.stream(**DECODE, kv_transfer_params={"do_remote_prefill": True, "pdlab": {"reserve": True}}) as stream:
                await stream.event()
                assert d.engine.inbound
            await until(d.at_rest)
            d.engine.paused = True
            asking = asyncio.create_task(prefill(d))
            await until(lambda: bool(d.engine.live))
            asking.cancel()
            await until(d.at_rest)
            assert not d.engine.shelf

    asyncio.run(play())


def test_both_forms_of_a_stream_with_token_ids_tell_the_same(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "d") as d:
            plain = {"prompt": PROMPT, "max_tokens": 30, "return_token_ids": True}
            async with d.stream(**plain) as stream:
                chunks = await stream.rest()
            assert tokens_of(chunks) == (PROMPT * 3)
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcdefghij" * 3
            assert set(chunks[0]["choices"][0]) == {"index", "text", "logprobs", "finish_reason", "token_ids"}
            chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 20, "stream": True, "return_token_ids": True}
            answer = await d.ask("/v1/chat/completions", **chat)
            assert answer.text.count('"token_ids":[') == 20
            scored = await d.ask(**plain, logprobs=1, return_tokens_as_token_ids=True)
            logprobs = scored.json()["choices"][0]["logprobs"]
            assert logprobs["tokens"][0] == f"token_id:{PROMPT[0]}"
            assert f"token_id:{PROMPT[0]}" in logprobs["top_logprobs"][0]

    asyncio.run(play())


def test_a_timeline_is_told_to_those_who_ask(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "d") as d:
            d.http.headers["X-PDLab-Timeline"] = "1"
            assert (await d.ask(prompt="x")).json()["pdlab"]["timeline"]["id"] == 1
            async with d.stream(prompt="x") as stream:
                assert (await stream.rest())[-1]["pdlab"]["timeline"]["id"] == 2
            del d.http.headers["X-PDLab-Timeline"]
            assert "pdlab" not in (await d.ask(prompt="x")).json()

    asyncio.run(play())


def test_slos_go_to_the_engine(folder: Path) -> None:
    async def play() -> None:
        async with instance(folder, "d") as d:
            assert (await d.ask(prompt="x", ttft_slo_ms=500, tpot_slo_ms=25)).status_code == 200
            assert (d.engine.submitted[0].ttft_slo_s, d.engine.submitted[0].tpot_slo_s) == (0.5, 0.025)

    asyncio.run(play())
