"""What the official client sees: texts, streams, candidates, log-probabilities, stops, usage, errors."""

from __future__ import annotations

import math
from typing import Any

import httpx
import openai
import pytest

from pdlab.real.models.tokenizer import Tokenizer

PROMPT = "The quick brown fox"


def complete(client: openai.OpenAI, **asked: object) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, "temperature": 0.0, "max_tokens": 12, **asked})  # type: ignore[call-overload]


def test_a_completion_has_text_reason_and_usage(client: openai.OpenAI) -> None:
    answer = complete(client)
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (19, 12, 31)
    assert answer.model == "tiny"


def test_the_same_prompt_again_is_found_in_the_cache(client: openai.OpenAI) -> None:
    prompt = "to be found again, " * 5
    first, second = (complete(client, prompt=prompt) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == 92


def test_a_stream_is_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    asked = {"max_tokens": 40, "extra_body": {"ignore_eos": True}}
    whole = complete(client, **asked).choices[0].text
    stream = complete(client, **asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 40
    assert all(c.usage is None for c in chunks[:-1])


def test_a_stream_ends_with_done_and_has_events_only(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "stream": True}
    with http.stream("POST", "/v1/completions", json=body, headers={"X-Request-Id": "abc-1"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-request-id"] == "abc-1"
        text = answer.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    assert all(part.startswith("data: ") for part in text.strip().split("\n\n"))


def test_a_chat_goes_through_the_template(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=9, temperature=0)  # type: ignore[arg-type]
    text = tokenizer.templates.chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}])
    plain = complete(client, prompt=tokenizer.encode(text, special=False), max_tokens=9)
    assert answer.choices[0].message.content == plain.choices[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert plain.usage is not None
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens


def test_a_chat_stream_opens_with_the_role(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": 3}
    chunks = list(client.chat.completions.create(**asked, stream=True))  # type: ignore[call-overload]
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_tools_reach_the_template(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    without = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with_tools = client.chat.completions.create(**asked, tools=[tool])  # type: ignore[call-overload]
    assert with_tools.usage.prompt_tokens == without.usage.prompt_tokens + len("tools:1")


def test_several_prompts_and_choices_keep_their_order(client: openai.OpenAI) -> None:
    prompts = ["first", "second one", "third"]
    alone = [complete(client, prompt=p).choices[0].text for p in prompts]
    together = complete(client, prompt=prompts)
    assert [c.text for c in together.choices] == alone
    assert [c.index for c in together.choices] == [0, 1, 2]
    twice = complete(client, prompt=prompts, n=2, temperature=1.0, seed=4, extra_body={"ignore_eos": True})
    assert [c.index for c in twice.choices] == [0, 1, 2, 3, 4, 5]
    assert twice.usage is not None
    assert twice.usage.completion_tokens == 6 * 12
    token_ids = complete(client, prompt=[list(p.encode()) for p in prompts])
    assert [c.text for c in token_ids.choices] == alone


def test_a_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    one, two = ([c.text for c in complete(client, temperature=1.0, seed=9, n=3).choices] for _ in range(2))
    assert one == two
    assert len(set(one)) == 3
    other = [c.text for c in complete(client, temperature=1.0, seed=10, n=3).choices]
    assert one != other


def test_best_of_gives_the_likeliest_by_mean_log_probability(client: openai.OpenAI) -> None:
    every = complete(client, temperature=1.0, seed=5, n=6, logprobs=0)
    means = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in every.choices}  # type: ignore[union-attr, arg-type]
    best = complete(client, temperature=1.0, seed=5, n=2, best_of=6)
    assert [c.text for c in best.choices] == sorted(means, key=lambda text: -means[text])[:2]
    assert [c.index for c in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    assert best.usage is not None
    assert best.usage.completion_tokens == 6 * 12


def test_a_stop_string_cuts_the_text_before_it(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=60).choices[0].text
    for stop in (whole[10:12], whole[20:25], whole[:1]):
        answer = complete(client, max_tokens=60, stop=["never there", stop])
        assert answer.choices[0].text == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        included = complete(client, max_tokens=60, stop=stop, extra_body={"include_stop_str_in_output": True})
        assert included.choices[0].text == whole[: whole.index(stop)] + stop
        chunks = list(client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=60, stop=stop, stream=True))
        assert "".join(c.choices[0].text for c in chunks) == whole[: whole.index(stop)]


def test_stop_tokens_minimum_and_bias(client: openai.OpenAI) -> None:
    end = {"256": 100.0}
    at_once = complete(client, logit_bias=end, max_tokens=10)
    assert (at_once.choices[0].text, at_once.choices[0].finish_reason) == ("", "stop")
    assert at_once.usage is not None
    assert at_once.usage.completion_tokens == 1
    ignored = complete(client, logit_bias=end, max_tokens=10, extra_body={"ignore_eos": True})
    assert ignored.choices[0].finish_reason == "length"
    later = complete(client, logit_bias=end, max_tokens=10, extra_body={"min_tokens": 4})
    assert later.usage is not None
    assert later.usage.completion_tokens == 5
    shown = complete(client, logit_bias=end, max_tokens=2, extra_body={"ignore_eos": True, "skip_special_tokens": False})
    assert shown.choices[0].text == "<eos><eos>"
    letter = complete(client, logit_bias={str(ord("x")): 100.0}, max_tokens=5, extra_body={"stop_token_ids": [ord("x")]})
    assert (letter.choices[0].text, letter.choices[0].finish_reason) == ("", "stop")


def test_log_probabilities_of_a_completion(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    found = complete(client, logprobs=3, max_tokens=6).choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 6
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert max(top.values()) == pytest.approx(logprob)  # greedy: the sampled token is the likeliest
        assert top[token] == pytest.approx(logprob)
        assert sum(map(math.exp, top.values())) <= 1.001


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0].logprobs  # type: ignore[call-overload]
    assert len(found.content) == 4
    for one in found.content:
        assert len(one.top_logprobs) == 2
        assert one.top_logprobs[0].logprob == pytest.approx(one.logprob)
        assert one.bytes is not None
    plain = client.chat.completions.create(**asked, logprobs=True).choices[0].logprobs  # type: ignore[call-overload]
    assert plain.content[0].top_logprobs == []


def test_echo_repeats_the_prompt(client: openai.OpenAI) -> None:
    plain = complete(client)
    assert complete(client, echo=True).choices[0].text == PROMPT + plain.choices[0].text
    chunks = list(client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=12, echo=True, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == PROMPT + plain.choices[0].text


def test_penalties_and_filters_are_taken(client: openai.OpenAI) -> None:
    repeated = complete(client, max_tokens=60).choices[0].text
    punished = complete(client, max_tokens=60, frequency_penalty=2.0, presence_penalty=2.0).choices[0].text
    assert len(set(punished)) >= len(set(repeated))
    for extra in ({"top_k": 1}, {"min_p": 1.0}, {"repetition_penalty": 1.2, "top_k": -1}):
        complete(client, temperature=1.0, extra_body=extra)
    assert complete(client, temperature=1.0, extra_body={"top_k": 1}).choices[0].text == complete(client).choices[0].text


def test_bytes_of_one_character_wait_for_each_other(client: openai.OpenAI) -> None:
    asked = {"logit_bias": {str(byte): 50.0 for byte in "é".encode()}, "max_tokens": 30}
    whole = complete(client, **asked).choices[0].text
    chunks = list(client.completions.create(model="tiny", prompt=PROMPT, temperature=0, stream=True, **asked))  # type: ignore[call-overload]
    assert "".join(c.choices[0].text for c in chunks) == whole


def test_models_version_tokens(client: openai.OpenAI, http: httpx.Client) -> None:
    assert [m.id for m in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert http.get("/health").status_code == 200
    assert http.get("/ready").json() == {"ready": True, "reasons": []}
    assert "version" in http.get("/version").json()
    tokens = http.post("/tokenize", json={"prompt": "hello"}).json()
    assert tokens["tokens"] == list(b"hello")
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "hello"}
    assert http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()["count"] > 5


def test_metrics_carry_vllms_names(client: openai.OpenAI, http: httpx.Client) -> None:
    complete(client)
    text = http.get("/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:num_preemptions_total",
        "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:request_time_per_output_token_seconds_bucket",
        "pdlab:leaked_blocks",
    ):
        assert f"\n{name}{{" in text, name
    assert 'model_name="tiny"' in text


def test_a_page_that_is_allowed_may_ask(http: httpx.Client) -> None:
    preflight = {"Access-Control-Request-Method": "POST"}
    for origin, status in (("https://page.example", 200), ("https://other.example", 400)):
        answer = http.options("/v1/chat/completions", headers={"Origin": origin, **preflight})
        assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (status, status == 200)


def test_a_prompts_log_probabilities_are_those_of_what_is_made(client: openai.OpenAI) -> None:
    made = complete(client, logprobs=1, extra_body={"ignore_eos": True}).choices[0]
    text = made.text
    assert made.logprobs is not None
    if "\ufffd" in text:  # its bytes are no text that could be sent back
        text = ""
    both = complete(client, prompt=PROMPT + text, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert both.text == PROMPT + text
    assert both.logprobs is not None and both.logprobs.token_logprobs is not None
    assert both.logprobs.token_logprobs[0] is None
    assert len(both.logprobs.token_logprobs) == len((PROMPT + text).encode())
    asked = {"prompt": list(PROMPT.encode()), "temperature": 0, "max_tokens": 12, "return_token_ids": True, "ignore_eos": True}
    ids = client.post("/completions", body=asked, cast_to=object)["choices"][0]["token_ids"]  # type: ignore[index]
    again = complete(client, prompt=[*PROMPT.encode(), *ids], max_tokens=0, echo=True, logprobs=1).choices[0].logprobs
    assert again is not None and again.token_logprobs is not None
    assert again.token_logprobs[len(PROMPT) :] == pytest.approx(made.logprobs.token_logprobs, abs=2e-3)
