from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlab.core.types import InstanceSpec, Role, UsageError
from pdlab.real.engine.messages import Sampling, Scored, StructuredOutputs
from pdlab.real.net import http as net_http
from pdlab.real.net import sse
from pdlab.real.net.http import Broken, HttpClient
from pdlab.real.net.wire import MOST_IDS, Continue, Extra, KvParams, StreamEvent
from pdlab.real.router import http_remote as http
from pdlab.real.router.http_remote import HttpRemote, LegStream
from pdlab.real.router.remote import InstanceFull, LegAsk, LegNews, LegTokens, Prefilled, TransferTrouble, Unfit
from tests.support.fake_instance import Fake

Test = Callable[[Fake, HttpRemote], Awaitable[None]]


def spec(url: str, engine: str = "pdlab") -> InstanceSpec:
    return InstanceSpec(name="fake", role=Role.MIXED, kv_blocks=100, url=url, model="fake", engine=engine)


def world(test: Test, **fake_options: Any) -> None:
    """Runs `test` with a fake instance and a remote to it."""

    async def run() -> None:
        async with Fake(**fake_options) as fake:
            remote = HttpRemote(spec(fake.url, "vllm" if fake.vllm else "pdlab"), token="secret", api_key="key")
            try:
                async with asyncio.timeout(60):
                    await test(fake, remote)
            finally:
                remote.close()
                await asyncio.sleep(0.01)

    asyncio.run(run())


def ask(leg: str = "7-1-d", *, params: KvParams | None = None, raw_params: bytes | None = None, **sampling: Any) -> LegAsk:
    return LegAsk(leg, 7, 1, [5, 6, 7], Sampling(**sampling), priority=3, params=params, raw_params=raw_params)


async def everything(remote: HttpRemote, asked: LegAsk) -> list[LegNews]:
    found: list[LegNews] = []
    await remote.decode(asked, found.append)
    return found


def tokens_of(news: list[LegNews], candidate: int = 0) -> list[int]:
    return [token for one in news if isinstance(one, LegTokens) and one.candidate == candidate for token in one.tokens]


def chunk(tokens: list[int], finish: str | None = None, index: int = 0) -> bytes:
    return (
        b"data: " + json.dumps({"choices": [{"index": index, "text": "", "token_ids": tokens, "finish_reason": finish}]}).encode() + b"\n\n"
    )


def error_chunk(code: str | int | None, kind: str = "server_error") -> bytes:
    return b"data: " + json.dumps({"error": {"message": "so it is", "type": kind, "param": None, "code": code}}).encode() + b"\n\n"


def test_a_prefill_leg_asks_for_one_token_and_brings_the_params_word_for_word() -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        found = await remote.prefill(ask("7-1-p", max_tokens=50, min_tokens=5, best_of=3, seed=4, logit_bias={9: -1.5}))
        [(path, headers, body)] = fake.asked
        assert path == "/v1/completions" and headers["x-request-id"] == "7-1-p"
        assert headers["x-pdlab-token"] == "secret" and headers["authorization"] == "Bearer key"
        assert (
            body["max_tokens"] == 1 and body["stream"] is False and "n" not in body and "min_tokens" not in body and "best_of" not in body
        )
        assert body["model"] == "fake" and body["prompt"] == [5, 6, 7] and body["seed"] == 4 and body["logit_bias"] == {"9": -1.5}
        assert body["return_token_ids"] is True and body["detokenize"] is False and body["priority"] == 3
        assert body["kv_transfer_params"] == {"do_remote_decode": True}
        assert found.token == 97 and found.finish == "length" and found.cached_tokens == 2
        assert (
            found.params is not None
            and found.params.block_ids() == [1, 2, 3]
            and found.params.pdlab == Extra(descriptor="fake", kv_tokens=3)
        )
        assert found.raw_params is not None
        await everything(remote, ask(raw_params=found.raw_params))
        assert fake.asked[-1][2]["kv_transfer_params"] == json.loads(found.raw_params)

    world(test)


def test_an_instance_of_pdlab_hears_by_when_tokens_are_due_and_a_vllm_server_does_not() -> None:
    asked = dataclasses.replace(ask(), ttft_slo_s=0.5, tpot_slo_s=0.02, waited_s=0.25)
    found: list[dict[str, Any]] = []

    async def test(fake: Fake, remote: HttpRemote) -> None:
        await everything(remote, asked)
        found.append({key: value for key, value in fake.asked[0][2].items() if key.endswith("_ms")})

    world(test)
    world(test, vllm=True)
    assert found == [{"ttft_slo_ms": 500.0, "tpot_slo_ms": 20.0, "waited_ms": 250.0}, {}]


def test_a_prompt_whose_first_token_ends_it_leaves_no_kv() -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        assert await remote.prefill(ask()) == Prefilled(2, "stop", cached_tokens=2)

    world(test, stop=2)


def test_a_decode_leg_sends_its_whole_sampling_and_brings_events_and_tokens_to_the_end() -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        params = KvParams(do_remote_prefill=True, pdlab=Extra(made=[97], events=True))
        news = await everything(remote, ask(params=params, max_tokens=30, min_tokens=2, stop_token_ids=(1, 2), temperature=1.0))
        assert news[0] == StreamEvent("transferred", bytes=4096, seconds=0.001, transport="tcp", made=1)
        assert tokens_of(news) == [97 + i % 26 for i in range(1, 30)]
        assert isinstance(news[-1], LegTokens) and news[-1].finish == "length"
        body = fake.asked[0][2]
        assert body["stream"] is True and body["min_tokens"] == 2 and body["stop_token_ids"] == [1, 2] and body["max_tokens"] == 30
        assert body["temperature"] == 1.0 and body["top_p"] == 1.0 and body["top_k"] == 0 and body["repetition_penalty"] == 1.0
        assert body["kv_transfer_params"]["pdlab"] == {"made": [97], "events": True}

    world(test)


def test_tokens_that_came_together_go_out_together() -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        assert len(await everything(remote, ask(max_tokens=200))) <= 3

    world(test)


def test_candidates_are_told_apart() -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        news = await everything(remote, ask(max_tokens=4, best_of=3))
        assert all(tokens_of(news, candidate) == [97, 98, 99, 100] for candidate in range(3))
        assert sorted(one.candidate for one in news if isinstance(one, LegTokens) and one.finish) == [0, 1, 2]
        assert fake.asked[0][2]["n"] == 3

    world(test)


@pytest.mark.parametrize("vllm", [False, True])
def test_logprobs_come_with_token_ids_and_without_the_sampled_token_where_it_is_not_among_the_likeliest(vllm: bool) -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        first = await remote.prefill(ask(logprobs=1))
        assert (first.logprob, first.top) == (-0.5, [(0, -0.25)])
        news = await everything(remote, ask(max_tokens=2, logprobs=2))
        found = [one for one in news if isinstance(one, LegTokens)]
        assert [one.logprobs for one in found] == [[-0.5], [-0.5]]
        assert [one.top for one in found] == [[[(0, -0.25), (97, -0.5)]], [[(0, -0.25), (98, -0.5)]]]
        alone = await everything(remote, ask(max_tokens=1, logprobs=0))
        assert alone == [LegTokens(0, [97], "length", [-0.5])]

    world(test, vllm=vllm)


def test_a_vllm_server_is_spoken_to_in_its_own_terms() -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        found = await remote.prefill(ask())
        assert found.params is not None and found.params.block_ids() == [1, 2, 3]
        fake.stop = 2
        news = await everything(remote, ask(raw_params=found.raw_params, max_tokens=3))
        assert tokens_of(news) == [97, 98, 2]
        assert isinstance(news[-1], LegTokens) and news[-1].finish == "stop"  # its token_ids hold the stop token, as ours do
        body = fake.asked[-1][2]
        assert body["kv_transfer_params"]["remote_block_ids"] == [[1, 2, 3]] and body["kv_transfer_params"]["dcp_size"] == 1
        assert "priority" not in body and "detokenize" not in body
        await remote.release("lease")
        assert await remote.renew("lease")
        assert len(fake.asked) == 2

    world(test, vllm=True)


REFUSALS = [
    (503, "kv_full", InstanceFull),
    (429, "overloaded", InstanceFull),
    (503, "draining", Broken),
    (503, "engine_down", Broken),
    (400, "context_length_exceeded", Unfit),
    (413, "", Unfit),
    (409, "kv_lost", TransferTrouble),
    (401, "invalid_api_key", Broken),
    (404, "", Broken),
    (500, "", Broken),
]


@pytest.mark.parametrize(("status", "code", "kind"), REFUSALS)
def test_a_refusal_is_told_by_its_status_and_code(status: int, code: str, kind: type[Exception]) -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        with pytest.raises(kind, match="refused"):
            await remote.prefill(ask())
        with pytest.raises(kind, match="refused"):
            await everything(remote, ask())
        assert fake.opened == 1

    world(test, refuse=(status, code))


@pytest.mark.parametrize(
    ("code", "type_", "kind"),
    [
        ("kv_full", "server_error", InstanceFull),
        ("kv_lost", "server_error", TransferTrouble),
        ("engine_down", "server_error", Broken),
        (None, "invalid_request_error", Unfit),
        (400, "BadRequestError", Unfit),
        (500, "InternalServerError", Broken),
    ],
)
def test_an_error_within_a_stream_comes_after_the_tokens_before_it(code: str | int | None, type_: str, kind: type[Exception]) -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        news: list[LegNews] = []
        with pytest.raises(kind, match="so it is"):
            await remote.decode(ask(), news.append)
        assert news == [LegTokens(0, [11, 12])]

    world(test, stream=[chunk([11]), chunk([12]), error_chunk(code, type_)])


@pytest.mark.parametrize(
    ("stream", "hang_up"),
    [
        ([chunk([11])], True),
        ([chunk([11], "length")], True),
        ([chunk([11])], False),
        ([chunk([11]), b"data: {garbage\n\n"], False),
        ([chunk([11]), b'data: {"choices": 3}\n\n'], False),
        ([chunk([11]), chunk([-1])], False),
        ([chunk([11]), chunk([12], "abort")], False),
        ([chunk([11]), chunk([12], index=1)], False),
        ([chunk([11], "stop"), chunk([12], "stop")], False),
        ([], True),
    ],
)
def test_a_stream_that_is_not_brought_to_its_end_or_cannot_be_read_is_broken(stream: list[bytes], hang_up: bool) -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        with pytest.raises(Broken):
            await everything(remote, ask())

    world(test, stream=stream, hang_up=hang_up)


@pytest.mark.parametrize("whole", [b"", b"[]", b"{}", b'{"choices": [{"token_ids": [1, 2], "finish_reason": "length"}]}', b"\xff"])
def test_a_prefill_answer_that_is_none_is_broken(whole: bytes) -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        with pytest.raises(Broken):
            await remote.prefill(ask())

    world(test, whole=whole)


def test_a_migrated_leg_ends_with_moved() -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        assert await everything(remote, ask()) == [LegTokens(0, [11]), StreamEvent("moved")]

    world(test, stream=[chunk([11]), b'data: {"choices": [], "pdlab": {"event": "moved"}}\n\n'])


def test_cancelling_a_leg_hangs_up_at_once() -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        task = asyncio.create_task(everything(remote, ask("cancelled", max_tokens=10_000)))
        while "cancelled" not in fake.legs:
            await asyncio.sleep(0.002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while fake.legs:
            await asyncio.sleep(0.002)
        assert fake.dropped == ["cancelled"] and not fake.connections
        fake.silent = True
        prefill = asyncio.create_task(remote.prefill(ask("prefill")))
        while not fake.connections:
            await asyncio.sleep(0.002)
        prefill.cancel()
        await asyncio.gather(prefill, return_exceptions=True)
        while fake.connections:
            await asyncio.sleep(0.002)

    world(test, interval_s=0.002)


def test_what_is_raised_where_news_are_heard_ends_the_leg() -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        heard: list[LegNews] = []

        def hear(news: LegNews) -> None:
            heard.append(news)
            if len(heard) == 3:
                raise TransferTrouble("no more")

        with pytest.raises(TransferTrouble, match="no more"):
            await remote.decode(ask("left", max_tokens=10_000), hear)
        while fake.legs:
            await asyncio.sleep(0.002)
        assert len(heard) == 3 and fake.dropped == ["left"]

    world(test, interval_s=0.002)


def test_a_leg_that_is_left_after_its_last_token_keeps_its_connection() -> None:
    async def leg(remote: HttpRemote) -> None:
        def hear(news: LegNews) -> None:
            if isinstance(news, LegTokens) and news.finish:
                task.cancel()

        task = asyncio.create_task(remote.decode(ask(max_tokens=2), hear))
        await asyncio.gather(task, return_exceptions=True)

    async def test(fake: Fake, remote: HttpRemote) -> None:
        for _ in range(5):
            await leg(remote)
        assert fake.opened == 1

    world(test)


def test_connections_are_kept_and_one_that_was_closed_meanwhile_is_replaced() -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        for _ in range(5):
            await remote.prefill(ask())
            await everything(remote, ask(max_tokens=3))
        assert fake.opened == 1
        [connection] = fake.connections
        connection.transport.abort()
        await asyncio.sleep(0)
        await remote.prefill(ask())
        fake.close_idle = True
        await remote.prefill(ask())
        await remote.prefill(ask())
        assert fake.opened == 3

    world(test)


def test_nobody_at_the_url_is_broken_and_a_release_does_not_mind() -> None:
    async def test() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            remote = HttpRemote(spec(f"http://127.0.0.1:{taken.getsockname()[1]}"))
            with pytest.raises(Broken, match="cannot connect"):
                await remote.prefill(ask())
            with pytest.raises(Broken, match="cannot connect"):
                await everything(remote, ask())
            with pytest.raises(Broken):
                await remote.drain()
            await remote.release("lease")
            assert not await remote.renew("lease") and not await remote.alive()

    asyncio.run(test())


def test_the_small_calls_go_where_the_protocol_says() -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        await remote.proceed(Continue("7-1-d", [97], KvParams(do_remote_prefill=True, remote_request_id="r")))
        await remote.release("lease")
        assert await remote.renew("lease") and await remote.alive()
        await remote.switch(Role.DECODE)
        await remote.drain()
        assert [(path, body) for path, _, body in fake.asked] == [
            (
                "/pdlab/v1/continue",
                {"leg": "7-1-d", "made": [97], "kv_transfer_params": {"do_remote_prefill": True, "remote_request_id": "r"}},
            ),
            ("/pdlab/v1/release", {"lease": "lease", "lease_s": 30.0}),
            ("/pdlab/v1/renew", {"lease": "lease", "lease_s": 30.0}),
            ("/health", None),
            ("/pdlab/v1/role", {"role": "decode"}),
            ("/pdlab/v1/drain", {}),
        ]
        assert all(headers["x-pdlab-token"] == "secret" for _, headers, _ in fake.asked)
        fake.refuse = (409, "kv_lost")
        assert not await remote.renew("lease")
        with pytest.raises(Broken, match="refused"):
            await remote.proceed(Continue("7-1-d"))

    world(test)


def test_a_small_call_does_not_wait_for_ever() -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        with pytest.raises(Broken, match=r"within 0\.02 s"):
            await HttpClient(fake.url).call(b"GET", b"/health", within_s=0.02)
        while fake.connections:
            await asyncio.sleep(0.002)

    world(test, silent=True)


def test_what_a_peer_sends_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MOST_EVENT_BYTES", 1000)
    monkeypatch.setattr(net_http, "MOST_BODY_BYTES", 1000)

    async def test(fake: Fake, remote: HttpRemote) -> None:
        with pytest.raises(Broken, match="line of the stream is too long"):
            await everything(remote, ask())
        with pytest.raises(Broken, match="answer is too long"):
            await remote.prefill(ask())

    world(test, stream=[b"data: " + b"x" * 2000], hang_up=True, whole=b" " * 2000)


def test_token_ids_of_one_answer_are_bounded() -> None:
    stream = LegStream(Sampling())
    assert not stream.feed(b'data: {"choices": [{"index": 0, "token_ids": [' + b"1," * MOST_IDS + b"1]}]}\n\n")
    assert isinstance(stream.failed, Broken)


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000, "head of the answer is too long"),
        (b"SSH-2.0-OpenSSH\r\n", "no HTTP"),
        (b"", "the connection was lost"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 15\r\n\r\n<p>Bad gateway.", r"<p>Bad gateway\. \(502\)"),
    ],
)
def test_a_peer_that_is_no_instance_is_broken(says: bytes, why: str) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(says)
        writer.close()

    async def test() -> None:
        async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
            remote = HttpRemote(spec(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
            with pytest.raises(Broken, match=why):
                await remote.prefill(ask())
            remote.close()
            await asyncio.sleep(0.02)

    asyncio.run(test())


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://host:port"])
def test_a_url_that_cannot_be_one_is_the_users_mistake(url: str) -> None:
    with pytest.raises(UsageError, match="url must be like"):
        HttpRemote(spec(url))


def test_a_token_with_a_line_break_is_the_users_mistake() -> None:
    with pytest.raises(UsageError, match="printable"):
        HttpRemote(spec("http://host"), token="a\r\nX: y")


@given(cuts=st.lists(st.integers(0, 600), max_size=8), crlf=st.booleans())
@settings(max_examples=100, deadline=None)
def test_where_a_stream_is_cut_does_not_matter(cuts: list[int], crlf: bool) -> None:
    text = chunk([1]) + b": a comment\n\n" + chunk([2, 3]) + chunk([4], "stop") + b"data: [DONE]\n\n"
    if crlf:
        text = text.replace(b"\n", b"\r\n")
    stream, found = LegStream(Sampling()), []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(text)], strict=True):
        found += stream.feed(text[begin:end])
    assert tokens_of(found) == [1, 2, 3, 4] and stream.ended and stream.failed is None
    assert [one.finish for one in found if isinstance(one, LegTokens)][-1] == "stop"


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_what_they_mean(noise: bytes) -> None:
    stream = LegStream(Sampling())
    stream.feed(b"data: " + noise + b"\n")
    stream.feed(noise)
    assert stream.failed is None or isinstance(stream.failed, http.TROUBLES)


@pytest.mark.parametrize("vllm", [False, True])
@pytest.mark.parametrize(
    ("structured", "body"),
    [
        (StructuredOutputs(json='{"type":"object"}'), {"json": '{"type":"object"}'}),
        (StructuredOutputs(json_object=True, disable_any_whitespace=True), {"json_object": True, "disable_any_whitespace": True}),
        (StructuredOutputs(choice=("a", "é")), {"choice": ["a", "é"]}),
        (StructuredOutputs(regex="a+"), {"regex": "a+"}),
        (None, None),
    ],
)
def test_what_the_output_must_be_goes_along_as_vllm_spells_it(
    structured: StructuredOutputs | None, body: dict[str, Any] | None, vllm: bool
) -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        await remote.prefill(ask(structured=structured))
        await everything(remote, ask(structured=structured))
        assert [asked.get("structured_outputs") for _, _, asked in fake.asked] == [body, body]

    world(test, vllm=vllm)


SCORES: list[Any] = [
    None,
    {"6": {"logprob": -0.5, "rank": 1}, "9": {"logprob": -1.5, "rank": 2}},
    {"8": {"logprob": -0.1}, "7": {"logprob": -3.0, "rank": 9}},
]


def test_a_prompts_log_probabilities_come_with_the_answer_of_who_computes_it() -> None:
    params = {"remote_request_id": "lease", "remote_block_ids": [1]}
    choice = {"index": 0, "token_ids": [5], "finish_reason": "length", "prompt_logprobs": SCORES}
    whole = json.dumps({"choices": [choice], "kv_transfer_params": params}).encode()

    async def test(fake: Fake, remote: HttpRemote) -> None:
        found = await remote.prefill(ask(prompt_logprobs=1))
        assert found.scores == [Scored(-0.5, 1, [(6, -0.5)]), Scored(-3.0, 9, [(8, -0.1)])]
        assert fake.asked[0][2]["prompt_logprobs"] == 1
        assert (await remote.prefill(ask())).scores is None

    world(test, whole=whole)
    world(test, whole=whole, vllm=True)


@pytest.mark.parametrize("told", [None, SCORES[:2], [None, {"9": {"logprob": -1.0}}, SCORES[2]], [None, None, None]])
def test_log_probabilities_that_are_not_the_prompts_break_the_leg(told: Any) -> None:
    choice = {"index": 0, "token_ids": [5], "finish_reason": "length", "prompt_logprobs": told}

    async def test(fake: Fake, remote: HttpRemote) -> None:
        with pytest.raises(Broken, match="log-probabilities"):
            await remote.prefill(ask(prompt_logprobs=0))

    world(test, whole=json.dumps({"choices": [choice]}).encode())


def test_a_stream_brings_the_prompts_log_probabilities_first() -> None:
    first = {"index": 0, "text": "", "prompt_logprobs": SCORES, "finish_reason": None}
    stream = LegStream(Sampling(prompt_logprobs=1), [5, 6, 7])
    found = stream.feed(b"data: " + json.dumps({"choices": [first]}).encode() + b"\n\n" + chunk([1]) + chunk([2], "stop"))
    scored, *rest = [one for one in found if isinstance(one, LegTokens)]
    assert scored.scores is not None and [one.logprob for one in scored.scores] == [-0.5, -3.0]
    assert tokens_of(list(rest)) == [1, 2] and all(one.scores is None for one in rest)
    without = LegStream(Sampling(prompt_logprobs=1), [5, 6, 7])
    without.feed(chunk([1]))
    assert isinstance(without.failed, Broken)


def test_a_vllm_servers_stream_has_no_log_probabilities_of_the_prompt() -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        with pytest.raises(Unfit, match="do not come in the stream of a vLLM server"):
            await everything(remote, ask(prompt_logprobs=0))
        assert fake.asked == []

    world(test, vllm=True)


@pytest.mark.parametrize("vllm", [False, True])
def test_what_may_be_made_goes_with_every_leg(vllm: bool) -> None:
    async def test(fake: Fake, remote: HttpRemote) -> None:
        await remote.prefill(ask(allowed_token_ids=(1, 2), bad_words={"no": ((3,), (4, 3))}, min_tokens=7))
        body = fake.asked[0][2]
        assert (body["allowed_token_ids"], body["bad_words"], body["min_tokens"]) == ([1, 2], ["no"], 1)
        await remote.prefill(ask())
        assert not {"allowed_token_ids", "bad_words", "prompt_logprobs", "min_tokens"} & fake.asked[1][2].keys()

    world(test, vllm=vllm)
