"""Completions and chats as the official client sees them; the engine says the prompt again, round and round."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pdlab.core.prefix import chain
from tests.support.api_world import ApiWorld, served
from tests.support.echo_engine import BLOCK, CONTEXT, EOS, EchoEngine

CHAT = "<start>user\nhi<end><start>assistant\n"
EVERLASTING = {"ignore_eos": True}


def complete(client: openai.OpenAI, prompt: Any = "abcdef", **asked: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 9, **asked})


def chat(client: openai.OpenAI, content: Any = "hi", **asked: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}], **{"max_tokens": 20, **asked})


def test_no_torch_in_the_http_process() -> None:
    code = "import sys, pdlab.real.api.app, pdlab.real.api.http_server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=180).returncode == 0


def test_a_completion_has_text_reason_and_usage(client: openai.OpenAI, world: ApiWorld) -> None:
    answer = complete(client, "never seen before")
    assert (answer.object, answer.model, answer.choices[0].text, answer.choices[0].finish_reason) == (
        "text_completion",
        "tiny",
        "never see",
        "length",
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (17, 9, 26)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert complete(client, "never seen before").usage.prompt_tokens_details.cached_tokens == 16
    assert world.engine.submitted[-1].hashes == chain(list(b"never seen before"), BLOCK)


def test_prompts_in_all_four_shapes_keep_their_order(client: openai.OpenAI) -> None:
    assert complete(client, list(b"abc")).choices[0].text == "abcabcabc"
    assert [c.text for c in complete(client, ["ab", "xyz"], max_tokens=3).choices] == ["aba", "xyz"]
    assert [c.text for c in complete(client, [[97, 98], [120]], max_tokens=3).choices] == ["aba", "xxx"]
    twice = complete(client, ["ab", "xyz"], n=2, max_tokens=3)
    assert [(c.index, c.text) for c in twice.choices] == [(0, "aba"), (1, "bab"), (2, "xyz"), (3, "yzx")]
    assert twice.usage.completion_tokens == 12


@pytest.mark.parametrize("prompt", ["plain text", ["ab", "xyz"], "déjà vu ☃ 🎉"])
def test_a_stream_is_the_same_text_in_pieces(client: openai.OpenAI, prompt: Any) -> None:
    whole = complete(client, prompt, n=2, max_tokens=40)
    chunks = list(complete(client, prompt, n=2, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        of_it = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert "".join(c.text for c in of_it) == choice.text
        assert [c.finish_reason for c in of_it][-1] == choice.finish_reason
        assert all(c.finish_reason is None for c in of_it[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_without_being_asked_for_a_stream_tells_no_usage(client: openai.OpenAI) -> None:
    assert all(c.usage is None and c.choices for c in complete(client, stream=True))


def test_the_bytes_of_a_stream(http: httpx.Client) -> None:
    body = {"prompt": "ab", "max_tokens": 3, "stream": True}
    answer = http.post("/v1/completions", json=body, headers={"X-Request-Id": "abc-1"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"] == "abc-1"
    assert "content-length" not in answer.headers
    assert answer.text.endswith("data: [DONE]\n\n")
    assert all(part.startswith("data: ") for part in answer.text.removesuffix("\n\n").split("\n\n"))
    assert '"id":"cmpl-abc-1"' in answer.text


def test_tokens_that_wait_for_a_slow_reader_come_together(folder: Any) -> None:
    with served(folder, engine=EchoEngine(per_step=50)) as world:
        answer = httpx.post(f"{world.url}/v1/completions", json={"prompt": "ab", "max_tokens": 200, "stream": True})
        assert 4 <= answer.text.count("data: ") <= 6


def test_a_chat_goes_through_the_template(client: openai.OpenAI, world: ApiWorld) -> None:
    answer = chat(client, max_tokens=None, max_completion_tokens=12)
    assert bytes(t for t in world.engine.submitted[-1].tokens if t < 256) == b"user\nhiassistant\n"
    assert (answer.object, answer.choices[0].message.role, answer.choices[0].message.content) == (
        "chat.completion",
        "assistant",
        "user\nhias",  # <end> and <start> are two of the twelve
    )
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert chat(client, parts).choices[0].message.content == "user\nh\niassistant"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert chat(client, tools=[tool]).usage.prompt_tokens == answer.usage.prompt_tokens + len("tools:1")


def test_a_chat_without_a_limit_may_fill_the_context(client: openai.OpenAI, world: ApiWorld) -> None:
    answer = chat(client, max_tokens=None)
    assert answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"


def test_a_chat_stream_opens_with_the_role(client: openai.OpenAI) -> None:
    whole = chat(client, n=2)
    chunks = list(chat(client, n=2, stream=True))
    assert [c.choices[0].delta.role for c in chunks[:2]] == ["assistant", "assistant"]
    assert all(c.choices[0].delta.role is None for c in chunks[2:])
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    for choice in whole.choices:
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == choice.index)
        assert text == choice.message.content


def test_a_stop_string_cuts_the_text_and_frees_the_engine(client: openai.OpenAI, world: ApiWorld) -> None:
    for stop, text in (("cd", "ab"), (["zz", "fab"], "abcde"), ("a", "")):
        before = len(world.engine.cancelled)
        answer = complete(client, max_tokens=400, stop=stop)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "stop")
        assert len(world.engine.cancelled) == before + 1
        streamed = complete(client, max_tokens=400, stop=stop, stream=True)
        assert "".join(c.choices[0].text for c in streamed) == text
    assert complete(client, stop="cd", extra_body={"include_stop_str_in_output": True}).choices[0].text == "abcd"
    assert complete(client, stop="fax").choices[0].text == "abcdefabc"  # what was held back comes at the end
    assert complete(client, stop="cd", max_tokens=20, extra_body={"min_tokens": 5}).choices[0].text == "abcdefab"


def test_tokens_after_a_stop_string_are_not_counted(folder: Any) -> None:
    with served(folder, engine=EchoEngine(per_step=100)) as world:
        body = {"prompt": "abcdef", "max_tokens": 400, "stop": "cd", "logprobs": 0}
        answer = httpx.post(f"{world.url}/v1/completions", json=body).json()
        assert answer["choices"][0]["text"] == "ab"
        assert answer["usage"]["completion_tokens"] == len(answer["choices"][0]["logprobs"]["tokens"]) == 4


def test_stop_tokens_and_the_end_of_sequence(client: openai.OpenAI) -> None:
    assert complete(client, extra_body={"stop_token_ids": [ord("c")]}).choices[0].text == "ab"
    prompt = [97, 98, EOS]
    ended = complete(client, prompt)
    assert (ended.choices[0].text, ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("ab", "stop", 3)
    assert complete(client, prompt, max_tokens=4, extra_body=EVERLASTING).choices[0].text == "aba"
    shown = complete(client, prompt, max_tokens=4, extra_body={**EVERLASTING, "skip_special_tokens": False})
    assert shown.choices[0].text == "ab<eos>a"


def test_what_is_asked_reaches_the_engine(client: openai.OpenAI, world: ApiWorld) -> None:
    extra = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5, "min_tokens": 2, "stop_token_ids": [300 - 1], "priority": -3}
    complete(
        client,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=11,
        logit_bias={"5": 3},
        user="me",
        extra_body=extra,
    )
    submit = world.engine.submitted[-1]
    how = submit.sampling
    assert (how.temperature, how.top_p, how.top_k, how.min_p, how.seed, how.min_tokens) == (0.5, 0.9, 7, 0.1, 11, 2)
    assert (how.presence_penalty, how.frequency_penalty, how.repetition_penalty) == (1.0, -1.0, 1.5)
    assert (how.logit_bias, how.stop_token_ids, how.logprobs, how.best_of, submit.priority) == ({5: 3.0}, (299,), None, 1, -3)
    complete(client, extra_body={"top_k": -1, "unheard_of": {"x": 1}})
    assert world.engine.submitted[-1].sampling.top_k == 0


def test_best_of_gives_the_likeliest_by_mean_log_probability(client: openai.OpenAI, world: ApiWorld) -> None:
    best = complete(client, n=2, best_of=4, max_tokens=6)  # candidates' log-probabilities: -0.1, -0.4, -0.2, -0.5
    assert [(c.index, c.text, c.logprobs) for c in best.choices] == [(0, "abcdef", None), (1, "cdefab", None)]
    assert best.usage.completion_tokens == 24
    assert world.engine.submitted[-1].sampling.logprobs == 0
    per_prompt = complete(client, ["ab", "xyz"], n=1, best_of=3, max_tokens=2, logprobs=1)
    assert [c.text for c in per_prompt.choices] == ["ab", "xy"]
    assert len(list(complete(client, n=2, best_of=2, stream=True, max_tokens=1))) == 2


def test_log_probabilities_of_a_completion(client: openai.OpenAI) -> None:
    found = complete(client, "aé", max_tokens=3, logprobs=2).choices[0].logprobs
    assert found.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert found.token_logprobs == [-0.1] * 3
    assert found.top_logprobs[0] == {"a": -0.1, "b": -1.1}
    assert found.text_offset == [0, 1, 1]
    assert complete(client, logprobs=0).choices[0].logprobs.top_logprobs is None
    streamed = list(complete(client, "ab", max_tokens=3, logprobs=1, stream=True))
    assert [t for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens] == ["a", "b", "a"]
    assert [o for c in streamed if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset] == [0, 1, 2]


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    content = chat(client, max_tokens=3, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [(c.token, c.logprob, c.bytes) for c in content][1:] == [("u", -0.1, [117]), ("s", -0.1, [115])]
    assert [(t.token, t.logprob) for t in content[1].top_logprobs] == [("u", -0.1), ("v", -1.1)]
    assert chat(client, max_tokens=1, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    streamed = chat(client, max_tokens=3, logprobs=True, stream=True)
    assert sum(len(c.choices[0].logprobs.content) for c in streamed if c.choices[0].logprobs) == 3


def test_echo_repeats_the_prompt(client: openai.OpenAI) -> None:
    assert complete(client, ["ab", "xyz"], echo=True, max_tokens=2).choices[1].text == "xyzxy"
    assert complete(client, list(b"abc"), echo=True, max_tokens=2).choices[0].text == "abcab"
    assert "".join(c.choices[0].text for c in complete(client, "ab", echo=True, max_tokens=2, stream=True)) == "abab"


def test_models_version_tokens(client: openai.OpenAI, http: httpx.Client) -> None:
    assert [m.id for m in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert "version" in http.get("/version").json()
    tokens = http.post("/tokenize", json={"prompt": "hello"}).json()
    assert tokens == {"count": 5, "max_model_len": CONTEXT, "tokens": list(b"hello")}
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "hello"}
    assert http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()["count"] == 20


def test_a_long_text_is_tokenized_beside_the_others(folder: Path) -> None:
    with (
        served(folder, engine=EchoEngine(context=300_000)) as world,
        openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        _tokenized_beside_the_others(client, world)


def _tokenized_beside_the_others(client: openai.OpenAI, world: ApiWorld) -> None:
    text = "é" * 50_000
    found = asyncio.run_coroutine_threadsafe(world.service.encode(text), world.loop).result(120)
    assert found == world.service.tokenizer.encode(text)

    def held_up() -> float:
        """The longest time that the loop stood, as a share of what the answer took."""
        longest_s = 0.0

        async def watch() -> None:
            nonlocal longest_s
            while True:
                at_s = time.monotonic()
                await asyncio.sleep(0.001)
                longest_s = max(longest_s, time.monotonic() - at_s)

        watching = asyncio.run_coroutine_threadsafe(watch(), world.loop)
        started_s = time.monotonic()
        with pytest.raises(openai.BadRequestError, match="the prompt has 1000000 tokens"):
            complete(client, "word " * 200_000)
        elapsed_s = time.monotonic() - started_s
        watching.cancel()
        return longest_s / elapsed_s

    assert any(held_up() < 0.5 for _ in range(20))  # on a busy machine not each time


def test_metrics_carry_vllms_names_and_count(folder: Any) -> None:
    with served(folder) as world:
        asked = {"prompt": "to be counted once", "max_tokens": 4}
        for _ in range(2):
            httpx.post(f"{world.url}/v1/completions", json=asked)
        lines = httpx.get(f"{world.url}/metrics").text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    labels = 'model_name="tiny"'

    def value(name: str, more: str = "") -> float:
        return float(next(v for k, v in found.items() if k.startswith(f"{name}{{") and labels in k and 'engine="0"' in k and more in k))

    assert value("vllm:request_success_total", 'finished_reason="length"') == 2
    assert value("vllm:request_success_total", 'finished_reason="abort"') == 0
    assert value("vllm:generation_tokens_total") == 8
    assert value("vllm:prefix_cache_queries_total") == 36
    assert value("vllm:prefix_cache_hits_total") == 16
    assert value("vllm:prompt_tokens_total") == 20
    assert value("vllm:cache_config_info", 'block_size="4"') == 1
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert value(f"vllm:{name}") == 0
    assert value("vllm:num_preemptions_total") == value("pdlab:leaked_blocks") == value("pdlab:http_requests_rejected_total") == 0
    for name, count in {
        "time_to_first_token_seconds": 2,
        "inter_token_latency_seconds": 6,
        "request_time_per_output_token_seconds": 2,
        "e2e_request_latency_seconds": 2,
        "request_queue_time_seconds": 2,
        "request_prefill_time_seconds": 2,
        "request_decode_time_seconds": 2,
        "request_inference_time_seconds": 2,
        "request_prompt_tokens": 2,
        "request_generation_tokens": 2,
        "request_max_num_generation_tokens": 2,
        "request_params_n": 2,
        "request_params_max_tokens": 2,
    }.items():
        assert value(f"vllm:{name}_count") == count, name
        assert value(f"vllm:{name}_bucket", 'le="+Inf"') == count
    assert value("vllm:request_queue_time_seconds_sum") == 0.5
    assert value("vllm:request_prompt_tokens_sum") == 36 and value("vllm:request_generation_tokens_sum") == 8
    assert value("vllm:request_prompt_tokens_bucket", 'le="10.0"') == 0 and value("vllm:request_prompt_tokens_bucket", 'le="20.0"') == 2
    assert value("vllm:request_params_max_tokens_sum") == 8
