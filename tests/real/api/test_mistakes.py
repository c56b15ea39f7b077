"""Requests that are wrong get OpenAI's error object with the parameter at fault; nothing a client can send is a 500."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import echo_engine
from tests.support.api_world import ApiWorld, served

COMPLETION: dict[str, Any] = {"prompt": "x", "max_tokens": 1}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}

WRONG = [
    ({"prompt": ...}, "prompt", "prompt is required"),
    ({"prompt": ""}, "prompt", "prompt is empty"),
    ({"prompt": []}, "prompt", "prompt is empty"),
    ({"prompt": ["a", ""]}, "prompt", "prompt is empty"),
    ({"prompt": 3}, "prompt", "expected"),
    ({"prompt": ["a", 3]}, "prompt", "prompt must be a string, a list of strings"),
    ({"prompt": [True]}, "prompt", "prompt must be a string"),
    ({"prompt": [[1], []]}, "prompt", "prompt must be a string"),
    ({"prompt": [300]}, "prompt", "token 300, which is not in the vocabulary of 300"),
    ({"prompt": [-1]}, "prompt", "token -1"),
    ({"prompt": ["a"] * 2000}, "prompt", "prompt has 2000 prompts, more than the 1024"),
    ({"prompt": "x" * 600}, "prompt", "the prompt has 600 tokens, which leaves no room for output in the 512 that fit"),
    ({"max_tokens": 512}, "max_tokens", "together more than the 512 that fit"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, not 0"),
    ({"max_tokens": "many"}, "max_tokens", "expected `int | null`, got `str`"),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens must be a whole number, not 1.5"),
    ({"stop_token_ids": [1, 2.5]}, "stop_token_ids", "stop_token_ids must be a whole number, not 2.5"),
    ({"prompt": [1.5]}, "prompt", "prompt must be a string"),
    ({"ignore_eos": 1.0}, "ignore_eos", "expected `bool | null`, got `float`"),
    ({"min_tokens": 2}, "min_tokens", "min_tokens must be at most 1, not 2"),
    ({"ignore_eos": 1}, "ignore_eos", "expected `bool | null`, got `int`"),
    ({"temperature": 2.5}, "temperature", "temperature must be from 0 to 2, not 2.5"),
    ({"temperature": -1}, "temperature", "not -1"),
    ({"top_p": 0}, "top_p", "top_p must be above 0 and at most 1, not 0"),
    ({"top_k": -2}, "top_k", "top_k must be at least -1"),
    ({"min_p": 1.5}, "min_p", "min_p must be from 0 to 1"),
    ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "from -2 to 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ({"n": 0}, "n", "n must be at least 1, not 0"),
    ({"n": 129}, "n", "n must be at most 128, not 129"),
    ({"n": 3, "best_of": 2}, "n", "n 3 must not exceed best_of 2"),
    ({"best_of": 200}, "best_of", "best_of must be at most 128"),
    ({"n": 1, "best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
    ({"stop": ["a"] * 17}, "stop", "stop has 17 strings, at most 16"),
    ({"stop": [""]}, "stop", "stop has an empty string"),
    ({"stop": [1]}, "stop", "expected"),
    ({"stop_token_ids": [999]}, "stop_token_ids", "stop_token_ids has token 999"),
    ({"logit_bias": {"999": 1}}, "logit_bias", "logit_bias has '999'"),
    ({"logit_bias": {f"{n % 300:0{3 + n // 300}}": 1 for n in range(1025)}}, "logit_bias", "has 1025 tokens, at most 1024"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "logit_bias has 'a'"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100, not 101"),
    ({"logprobs": 21}, "logprobs", "logprobs must be from 0 to 20, not 21"),
    ({"suffix": "s"}, "suffix", "suffix is not supported"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "leaves nothing to answer with"),
    ({"allowed_token_ids": [300]}, "allowed_token_ids", "token 300"),
    ({"bad_words": [""]}, "bad_words", "not ''"),
    ({"bad_words": ["a"] * 129}, "bad_words", "bad_words has 129 words, at most 128"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "prompt_logprobs must be from 0 to 20, not 21"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "from 0 to 20"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "must be -1 or at least 1, not 0"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "must be -1 or at least 1, not -2"),
    ({"min_tokens": 1, "max_tokens": 0, "echo": True}, "min_tokens", "min_tokens must be at most 0, not 1"),
    ({"seed": 2**70}, "seed", "seed"),
    ({"priority": 2**40}, "priority", "priority must be at most"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream: true"),
    ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options", "stream_options.include_usage: expected"),
]

WRONG_CHATS = [
    ({"messages": ...}, "messages", "messages is required"),
    ({"messages": []}, "messages", "messages is empty"),
    ({"messages": [{"content": "x"}]}, "messages", "role is required"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages", "messages[0].content: expected"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "content of type 'image_url' is not supported"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages", "no role alien"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "leaves no room for output"),
    ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20, not 21"),
    ({"tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
    ({"max_completion_tokens": 900}, "max_completion_tokens", "together more than the 512 that fit"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens must be at least 1, not 0"),
]


def refused(http: httpx.Client, path: str, body: dict[str, Any], param: str | None, says: str) -> None:
    answer = http.post(path, json={key: value for key, value in body.items() if value is not ...})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert says in error["message"]
    assert "\n" not in error["message"]
    assert error["code"] == ("context_length_exceeded" if "that fit" in says or "no room" in says else None)


@pytest.mark.parametrize(("change", "param", "says"), WRONG, ids=[str(w[0])[:40] for w in WRONG])
def test_a_wrong_completion_names_the_parameter(change: dict[str, Any], param: str, says: str, http: httpx.Client) -> None:
    refused(http, "/v1/completions", {**COMPLETION, **change}, param, says)


@pytest.mark.parametrize(("change", "param", "says"), WRONG_CHATS, ids=[str(w[0])[:40] for w in WRONG_CHATS])
def test_a_wrong_chat_names_the_parameter(change: dict[str, Any], param: str, says: str, http: httpx.Client) -> None:
    refused(http, "/v1/chat/completions", {**CHAT, **change}, param, says)


def test_bodies_that_are_no_json_object(http: httpx.Client) -> None:
    for raw in (b"", b"{", b"[]", b"3", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 100_000):
        answer = http.post("/v1/completions", content=raw)
        assert answer.status_code == 400, raw[:20]
        assert answer.json()["error"]["message"]


def test_a_body_too_large(http: httpx.Client) -> None:
    assert http.post("/v1/completions", content=b" " * (33 << 20)).status_code == 413


def test_unknown_models_and_places(client: openai.OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-9' does not exist; this server has 'tiny'") as caught:
        client.completions.create(model="gpt-9", prompt="x")
    assert caught.value.code == "model_not_found"
    assert http.get("/v1/models/some/other").json()["error"]["code"] == "model_not_found"
    lost = http.get("/v2/completions", headers={"X-Request-Id": "lost"})
    assert (lost.status_code, lost.json()["error"]["message"]) == (404, "there is no /v2/completions here")
    assert lost.headers["x-request-id"] == "lost"
    wrong = http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"], wrong.json()["error"]["param"]) == (405, "POST", None)
    assert http.post("/detokenize", json={"tokens": [999]}).json()["error"]["param"] == "tokens"
    for body in ({}, {"prompt": "x", "messages": []}):
        assert http.post("/tokenize", json=body).status_code == 400


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    with served(echo_engine.byte_tokenizer(tmp_path, template=None)) as world:
        answer = httpx.post(f"{world.url}/v1/chat/completions", json=CHAT)
        assert answer.status_code == 400
        assert "has no chat template" in answer.json()["error"]["message"]


def test_a_fault_of_ours_is_a_500_without_its_secrets(world: ApiWorld, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.service.tokenizer, "encode", lambda *_: 1 / 0)
    answer = http.post("/v1/completions", json=COMPLETION)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "division" not in answer.text


def test_the_key_is_asked_for(folder: Path) -> None:
    with served(folder, api_key="sesame") as world:
        assert httpx.get(f"{world.url}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}, {"Authorization": b"Bearer \xff"}):
            answer = httpx.get(f"{world.url}/v1/models", headers=headers)  # type: ignore[arg-type]
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{world.url}/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(-2, 3) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
MORE = {"model", "stream", "echo", "user", "tools", "chat_template_kwargs", "skip_special_tokens", "include_stop_str_in_output"}
MORE |= {"add_generation_prompt", "continue_final_message"}
FIELDS = sorted({key for change, *_ in WRONG + WRONG_CHATS for key in change} | MORE)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4),
)
def test_nothing_a_client_sends_is_a_500(http: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    base = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT, "/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [1]}}[path]
    answer = http.post(path, content=json.dumps({**base, **fields}))
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls", "x"]), json_values, max_size=4), max_size=3))
def test_no_messages_are_a_500(http: httpx.Client, messages: list[dict[str, Any]]) -> None:
    answer = http.post("/v1/chat/completions", content=json.dumps({**CHAT, "messages": messages}))
    assert answer.status_code in (200, 400), answer.text
