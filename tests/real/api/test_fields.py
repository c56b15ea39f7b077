"""What fields of OpenAI's and vLLM's APIs do: each is honoured, refused by its name, or changes no answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdlab.real.api.chat import ChatRequest
from pdlab.real.api.completions import CompletionRequest
from pdlab.real.api.refused import RefusedFields
from tests.support import echo_engine
from tests.support.api_world import JSON, ApiWorld, served
from tests.support.echo_engine import CONTEXT, EOS, EchoEngine

CASES = Path("../shared/cases/api")
CALLS = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b": 18}'}}]
BY_ITEMS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}){% endfor %} {% endfor %}"
)
TOJSON = BY_ITEMS.replace(
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}", "{{ c.function.arguments | tojson }}"
)


def completion(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json={"prompt": "abcdef", "max_tokens": 9, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def events(http: httpx.Client, path: str = "/v1/completions", **fields: Any) -> list[dict[str, Any]]:
    answer = http.post(path, json={"stream": True, **fields})
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def prompt_of(world: ApiWorld) -> str:
    return bytes(token for token in world.engine.submitted[-1].tokens if token < 256).decode()


# ------------------------------------------------------------ tool calls in the prompt


@pytest.mark.parametrize(("template", "spelled"), [(BY_ITEMS, "add(a=3;b=18;)"), (TOJSON, 'add({"a": 3, "b": 18})')])
@pytest.mark.parametrize("arguments", ['{"a": 3, "b": 18}', {"a": 3, "b": 18}])
def test_arguments_of_tool_calls_are_a_mapping_to_the_template(tmp_path: Path, template: str, spelled: str, arguments: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with served(echo_engine.byte_tokenizer(tmp_path, template)) as world, httpx.Client(base_url=world.url) as http:
        answer = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
        assert answer.status_code == 200, answer.text
        assert prompt_of(world) == f"user:x assistant:{spelled} "
        assert http.post("/tokenize", json={"messages": messages}).json()["count"] == len(prompt_of(world))


@pytest.mark.parametrize(
    ("arguments", "spelled"), [("", "add()"), (None, "add()"), ("{}", "add()"), ('{"k": {"é": [1.5, null]}}', "add(k={'é': [1.5, None]};)")]
)
def test_arguments_that_are_empty_or_deep(tmp_path: Path, arguments: Any, spelled: str) -> None:
    call = {"function": {"name": "add", "arguments": arguments}}
    with served(echo_engine.byte_tokenizer(tmp_path, BY_ITEMS)) as world, httpx.Client(base_url=world.url) as http:
        messages = [{"role": "assistant", "tool_calls": [call]}]
        assert http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).status_code == 200
        assert spelled in prompt_of(world)


@pytest.mark.parametrize("arguments", ["{", "not json", "3", "[1]", '"text"', [1], 3, "[" * 5000])
def test_arguments_that_are_no_object_are_refused(http: httpx.Client, arguments: Any) -> None:
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
    ]
    answer = http.post("/v1/chat/completions", content=json.dumps({"messages": messages, "max_tokens": 1}))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "messages"
    assert "messages[1].tool_calls[0].function.arguments" in error["message"]


@pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases/api")
@pytest.mark.parametrize("template", ["tools_by_items.jinja", "tools_tojson.jinja"])
def test_the_reported_tool_calls_are_answered(tmp_path: Path, template: str) -> None:
    folder = echo_engine.byte_tokenizer(tmp_path, (CASES / template).read_text())
    with served(folder) as world, httpx.Client(base_url=world.url, headers=JSON) as http:
        body = json.loads((CASES / "tool_call_arguments.json").read_text()) | {"model": "tiny"}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert ('<arg name="a">3</arg>' if "items" in template else '"arguments": {"a": 3, "b": 18}') in prompt_of(world)


# ------------------------------------------------------------ the default of max_tokens, whole numbers, ids


@pytest.mark.parametrize("left", [1, 7, 15, 16, 17])
def test_the_default_of_max_tokens_shrinks_to_what_is_left(http: httpx.Client, left: int) -> None:
    answer = http.post("/v1/completions", json={"prompt": [100] * (CONTEXT - left)})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == min(left, 16)


def test_each_prompt_has_its_own_default(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": [[100] * (CONTEXT - 3), [101]]}).json()
    assert [len(choice["text"]) for choice in answer["choices"]] == [3, 16]
    assert http.post("/v1/completions", json={"prompt": [100] * CONTEXT}).status_code == 400
    assert http.post("/v1/completions", json={"prompt": [100] * (CONTEXT - 7), "max_tokens": 16}).status_code == 400


def test_whole_numbers_may_have_a_point(http: httpx.Client, world: ApiWorld) -> None:
    fields = {"max_tokens": 3.0, "n": 2.0, "seed": 5.0, "top_k": 4.0, "stop_token_ids": [9.0, 8], "logprobs": 1.0, "min_tokens": 1e0}
    answer = completion(http, prompt=[97.0, 98], **fields)
    assert [choice["text"] for choice in answer["choices"]] == ["aba", "bab"]
    how = world.engine.submitted[-1].sampling
    assert (how.max_tokens, how.seed, how.top_k, how.stop_token_ids, how.logprobs) == (3, 5, 4, (9, 8), 1)
    assert completion(http, prompt=[[97.0], [98.0]], max_tokens=1)["usage"]["prompt_tokens"] == 2
    chat = {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 2.0, "logprobs": True, "top_logprobs": 3.0}
    assert http.post("/v1/chat/completions", json=chat).json()["usage"]["completion_tokens"] == 2
    assert http.post("/detokenize", json={"tokens": [97.0, 98.0]}).json() == {"prompt": "ab"}


@pytest.mark.parametrize("path", ["/v1/completions", "/version", "/nowhere"])
def test_a_long_request_id_is_refused_and_not_sent_back(http: httpx.Client, path: str) -> None:
    long = "".join(str(i % 10) for i in range(50_000))
    answer = http.post(path, json={"prompt": "ab", "max_tokens": 20, "stream": True}, headers={"X-Request-Id": long})
    if path.startswith("/v1"):
        assert answer.status_code == 431
        assert "X-Request-Id has 50000 characters" in answer.json()["error"]["message"]
    assert len(answer.headers["x-request-id"]) < 256
    assert len(answer.content) < 1000


# ------------------------------------------------------------ stop tokens, streams' usage


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [{}, {"stop": "zz"}])
def test_a_stop_token_is_shown_where_what_stops_is_included(http: httpx.Client, stream: bool, more: dict[str, Any]) -> None:
    asked = {"prompt": "abcdef", "max_tokens": 9, "stop_token_ids": [ord("c")], "include_stop_str_in_output": True, **more}
    if stream:
        assert "".join(c["text"] for e in events(http, **asked) for c in e["choices"]) == "abc"
    else:
        assert completion(http, **asked)["choices"][0]["text"] == "abc"
    ended = completion(http, prompt=[97, EOS], include_stop_str_in_output=True)["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("a", "stop")  # special tokens are left out
    shown = completion(http, prompt=[97, EOS], include_stop_str_in_output=True, skip_special_tokens=False)["choices"][0]
    assert shown["text"] == "a<eos>"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_each_chunk_tells_the_usage_so_far(http: httpx.Client, path: str) -> None:
    prompt: dict[str, Any] = {"prompt": "abc"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "abc"}]}
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(http, path, **prompt, max_tokens=6, stream_options=options, return_token_ids=True)
    *chunks, last = found
    made, prompt_tokens = 0, last["usage"]["prompt_tokens"]
    for chunk in chunks:
        made += len(chunk["choices"][0].get("token_ids", []))
        assert chunk["usage"] == {"prompt_tokens": prompt_tokens, "completion_tokens": made, "total_tokens": prompt_tokens + made}
    assert made == last["usage"]["completion_tokens"] == 6
    assert last["choices"] == []
    quiet = events(http, path, **prompt, max_tokens=6, stream_options={"continuous_usage_stats": True})
    assert all("usage" not in chunk for chunk in quiet)


# ------------------------------------------------------------ log-probabilities and where texts begin


@pytest.mark.parametrize("prompt", ["🎉🎊 déjà ☃", "plain", "naïve 🏴\u200d☠️"])
def test_offsets_count_the_characters_of_the_text(http: httpx.Client, prompt: str) -> None:
    raw = prompt.encode()
    for echo in (False, True):
        choice = completion(http, prompt=prompt, max_tokens=len(raw), logprobs=1, echo=echo)["choices"][0]
        text, told = choice["text"], choice["logprobs"]
        bytes_of = raw * 2 if echo else raw
        assert text == prompt * (1 + echo)
        assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(told["text_offset"]) == len(bytes_of)
        for at, offset in enumerate(told["text_offset"]):
            assert offset == len(bytes_of[:at].decode(errors="ignore"))
        parts = events(http, prompt=prompt, max_tokens=len(raw), logprobs=1, echo=echo)
        assert [o for e in parts for c in e["choices"] if c["logprobs"] for o in c["logprobs"]["text_offset"]] == told["text_offset"]
        assert [p for e in parts for c in e["choices"] if c["logprobs"] for p in c["logprobs"]["token_logprobs"]] == told["token_logprobs"]


def test_offsets_leave_out_what_is_not_shown(http: httpx.Client) -> None:
    asked = {"prompt": [97, EOS, 98], "max_tokens": 4, "ignore_eos": True, "logprobs": 0}
    assert completion(http, **asked)["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1, 2]
    shown = completion(http, **asked, skip_special_tokens=False)["choices"][0]
    assert (shown["text"], shown["logprobs"]["text_offset"]) == ("a<eos>ba", [0, 1, 6, 7])
    echoed = completion(http, **asked, echo=True)["choices"][0]
    assert (echoed["text"], echoed["logprobs"]["text_offset"]) == ("ababa", [0, 1, 1, 2, 3, 3, 4])
    spelled = completion(http, **{**asked, "prompt": "a<eos>b"}, echo=True)["choices"][0]  # as it was sent
    assert (spelled["text"], spelled["logprobs"]["text_offset"][:3]) == ("a<eos>baba", [0, 1, 6])


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_has_the_prompts_log_probabilities(http: httpx.Client, world: ApiWorld, max_tokens: int, stream: bool) -> None:
    asked: dict[str, Any] = {"prompt": [list(b"abcd"), [120]], "max_tokens": max_tokens, "echo": True, "logprobs": 2}
    if stream:
        told = events(http, **asked, stream_options={"include_usage": True})
        usage = told.pop()["usage"]
        found: dict[int, dict[str, Any]] = {}
        for choice in (c for e in told for c in e["choices"]):
            whole = found.setdefault(choice["index"], {"text": "", "tokens": [], "token_logprobs": [], "top_logprobs": []})
            whole["text"] += choice["text"]
            for key in ("tokens", "token_logprobs", "top_logprobs"):
                whole[key] += (choice["logprobs"] or {}).get(key, [])
        first, second = found[0], found[1]
    else:
        answer = completion(http, **asked)
        usage = answer["usage"]
        first, second = ({"text": c["text"], **c["logprobs"]} for c in answer["choices"])
        assert [c["finish_reason"] for c in answer["choices"]] == ["length"] * 2
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 2 * max_tokens)
    assert first["text"] == "abcd" + "abc"[:max_tokens]
    assert first["tokens"] == [*"abcd", *"abc"[:max_tokens]]
    assert first["token_logprobs"] == [None, -0.1, -0.2, -0.3, *[-0.1] * max_tokens]
    assert first["top_logprobs"][:2] == [None, {"b": 0.0, "c": -0.1}]
    assert second["token_logprobs"] == [None, *[-0.1] * max_tokens]
    assert world.engine.submitted[-1].hashes == ()
    assert world.engine.submitted[-1].sampling.max_tokens == max(max_tokens, 1)


def test_without_a_prompt_to_show_nothing_cannot_be_asked_for(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 0}).status_code == 400
    assert completion(http, prompt="ab", max_tokens=0, echo=True)["choices"][0] == {
        "index": 0,
        "text": "ab",
        "logprobs": None,
        "finish_reason": "length",
    }
    assert completion(http, prompt="ab", max_tokens=0, prompt_logprobs=0)["choices"][0]["text"] == ""


def test_prompt_logprobs_in_vllms_shape(http: httpx.Client) -> None:
    choice = completion(http, prompt="abc", max_tokens=2, prompt_logprobs=2, n=2)["choices"][1]
    assert choice["text"] == "bc"
    none, second, third = choice["prompt_logprobs"]
    assert none is None
    assert second == {
        "98": {"logprob": -0.1, "rank": 1, "decoded_token": "b"},
        "99": {"logprob": -0.1, "rank": 2, "decoded_token": "c"},
    }
    assert list(third) == ["99", "100"] and third["99"]["rank"] == 2
    assert "prompt_logprobs" not in completion(http, prompt="abc")["choices"][0]
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "prompt_logprobs": 0}
    answer = http.post("/v1/chat/completions", json=chat).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["choices"][0]["message"]["content"]
    refused = http.post("/v1/chat/completions", json={**chat, "stream": True}).json()["error"]
    assert refused["param"] == "prompt_logprobs"
    opening = events(http, prompt="abc", max_tokens=2, prompt_logprobs=0)[0]["choices"][0]
    assert len(opening["prompt_logprobs"]) == 3


def test_too_many_log_probabilities_are_refused(folder: Path) -> None:
    with served(folder, engine=EchoEngine(context=20_000)) as world:
        body = {"prompt": [97] * 14_000, "max_tokens": 1, "prompt_logprobs": 20}
        error = httpx.post(f"{world.url}/v1/completions", json=body).json()["error"]
        assert error["param"] == "prompt_logprobs" and "14000 prompt tokens" in error["message"]
        assert httpx.post(f"{world.url}/v1/completions", json={**body, "prompt_logprobs": 0}).status_code == 200


# ------------------------------------------------------------ what may be made, and the prompt


def test_what_is_asked_reaches_the_engine(http: httpx.Client, world: ApiWorld) -> None:
    completion(http, allowed_token_ids=[9, 8, 9], bad_words=["cd", " é"])
    how = world.engine.submitted[-1].sampling
    assert how.allowed_token_ids == (8, 9)
    assert how.bad_words == {"cd": ((99, 100),), " é": ((195, 169),)}
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "allowed_token_ids": [7], "bad_words": ["z"]}
    assert http.post("/v1/chat/completions", json=chat).status_code == 200
    assert world.engine.submitted[-1].sampling.allowed_token_ids == (7,)


def test_a_prompt_is_cut_at_its_beginning(http: httpx.Client, world: ApiWorld) -> None:
    assert completion(http, truncate_prompt_tokens=2)["choices"][0]["text"] == "efefefefe"
    assert completion(http, truncate_prompt_tokens=2, echo=True, max_tokens=1)["choices"][0]["text"] == "efe"
    assert completion(http, truncate_prompt_tokens=100)["usage"]["prompt_tokens"] == 6
    assert completion(http, prompt=[97] * 2 * CONTEXT, truncate_prompt_tokens=-1)["usage"]["total_tokens"] == CONTEXT
    chat = {"messages": [{"role": "user", "content": "x" * 2 * CONTEXT}], "max_tokens": 5, "truncate_prompt_tokens": -1}
    assert http.post("/v1/chat/completions", json=chat).json()["usage"]["total_tokens"] == CONTEXT


def test_templates_get_what_they_read(tmp_path: Path) -> None:
    template = "{% for d in documents or [] %}[{{ d.text }}]{% endfor %}{{ reasoning_effort or '' }}{{ messages[0].reasoning_content }}"
    with served(echo_engine.byte_tokenizer(tmp_path, template)) as world, httpx.Client(base_url=world.url) as http:
        body = {"messages": [{"role": "user", "content": "x", "reasoning": "hm"}], "max_tokens": 1}
        asked = {**body, "documents": [{"text": "d"}], "reasoning_effort": "low"}
        assert http.post("/v1/chat/completions", json=asked).status_code == 200
        assert prompt_of(world) == "[d]lowhm"


def test_a_chat_is_tokenized_as_it_would_be_asked(http: httpx.Client, world: ApiWorld) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]
    for more in ({}, {"add_generation_prompt": False}, {"continue_final_message": True}, {"tools": [tool]}):
        assert http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1, **more}).status_code == 200
        assert http.post("/tokenize", json={"messages": messages, **more}).json()["tokens"] == world.engine.submitted[-1].tokens
    told = http.post("/tokenize", json={"prompt": "a<eos>", "return_token_strs": True}).json()
    assert (told["tokens"], told["token_strs"]) == ([97, EOS], ["a", "<eos>"])
    refused = http.post("/tokenize", json={"messages": messages, "chat_template": "x"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template")
    assert http.post("/tokenize", json={"prompt": "a", "model": "other"}).status_code == 404


CHANGES_AN_ANSWER = [
    ("use_beam_search", True),
    ("length_penalty", 0.8),
    ("early_stopping", True),
    ("logits_processors", ["a.b"]),
    ("vllm_xargs", {"a": 1}),
    ("cache_salt", "salt"),
    ("chat_template", "{{ messages }}"),
    ("mm_processor_kwargs", {"a": 1}),
    ("thinking_token_budget", 5),
    ("truncation_side", "right"),
    ("suffix", "x"),
    ("max_new_tokens", 5),
    ("n_predict", 5),
    ("num_predict", 5),
    ("min_new_tokens", 5),
    ("stop_sequences", ["x"]),
    ("stop_strings", ["x"]),
    ("stop_regex", "x+"),
    ("no_stop_trim", True),
    ("regex", "[ab]"),
    ("ebnf", 'root ::= "a"'),
    ("grammar", 'root ::= "a"'),
    ("json_schema", "{}"),
    ("repeat_penalty", 1.3),
    ("typical_p", 0.7),
    ("tfs_z", 0.7),
    ("mirostat", 2),
    ("top_a", 0.2),
    ("xtc_probability", 0.5),
    ("dry_multiplier", 0.8),
    ("dynatemp_range", 0.5),
    ("lora_path", "a"),
    ("custom_logit_processor", "x"),
    ("repetition_detection", {"max_pattern_size": 5}),
]
OF_COMPLETIONS = [
    ("prompt_embeds", "AAAA"),
    ("messages", [{"role": "user", "content": "x"}]),
    ("max_completion_tokens", 5),
    ("top_logprobs", 2),
    ("tools", [{"type": "function"}]),
    ("chat_template_kwargs", {"a": 1}),
    ("add_generation_prompt", False),
    ("continue_final_message", True),
    ("documents", [{"text": "x"}]),
    ("reasoning_effort", "low"),
]
OF_CHATS = [
    ("prompt", "x"),
    ("best_of", 2),
    ("echo", True),
    ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy"}),
    ("web_search_options", {}),
    ("verbosity", "low"),
    ("include_reasoning", False),
    ("documents", [{"text": "x"}]),
    ("reasoning_effort", "low"),
]
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        *(("/v1/completions", *one) for one in CHANGES_AN_ANSWER + OF_COMPLETIONS),
        *(("/v1/chat/completions", *one) for one in CHANGES_AN_ANSWER + OF_CHATS),
    ],
)
def test_what_would_change_an_answer_is_refused_by_name(http: httpx.Client, path: str, name: str, value: Any) -> None:
    body = {"prompt": "x", "max_tokens": 1} if path == "/v1/completions" else CHAT
    answer = http.post(path, json={**body, name: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", name, None)
    assert error["message"].startswith(f"{name} ")
    assert http.post(path, json={**body, name: None}).status_code == 200


def test_every_field_that_may_be_refused_has_its_test() -> None:
    assert set(CompletionRequest.refusals) == {name for name, _ in CHANGES_AN_ANSWER + OF_COMPLETIONS}
    assert set(ChatRequest.refusals) == {name for name, _ in CHANGES_AN_ANSWER + OF_CHATS} - {"documents", "reasoning_effort"}
    fields = {field.name for field in msgspec.structs.fields(RefusedFields)}
    assert fields == set(CompletionRequest.refusals) | set(ChatRequest.refusals)


def test_what_a_request_belongs_to_goes_to_the_engine(tmp_path: Path) -> None:
    with served(echo_engine.byte_tokenizer(tmp_path, BY_ITEMS)) as world, httpx.Client(base_url=world.url) as http:
        found = []
        for headers in ({}, {"X-Session-ID": "h", "X-User-ID": "u"}):
            body = {**CHAT, "user": "me", "session_id": "s", "service_tier": "flex", "waited_ms": 250, "max_tokens": 1}
            assert http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
            assert completion(http, service_tier="default")["choices"]
            asked, plain = world.engine.submitted[-2:]
            found.append((asked.session, asked.tenant, asked.offline, asked.waited_s))
            assert (plain.session, plain.tenant, plain.offline, plain.waited_s) == ("", "", False, 0.0)
        assert found == [("s", "me", True, 0.25), ("h", "u", True, 0.25)]
        for fields, said in (
            ({"user": "x" * 257}, "user has 257 characters, at most 256 are taken"),
            ({"waited_ms": -1}, "waited_ms must be"),
        ):
            answer = http.post("/v1/chat/completions", json={**CHAT, **fields})
            assert (answer.status_code, answer.json()["error"]["message"].startswith(said)) == (400, True), answer.text
        assert http.post("/v1/completions", json={"prompt": "x"}, headers={"X-User-ID": "x" * 257}).status_code == 400


def test_what_changes_no_answer_is_ignored(http: httpx.Client) -> None:
    harmless: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "flex",
        "prediction": {"type": "content", "content": "x"},
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "request_id": "r",
        "spaces_between_special_tokens": False,
        "unheard_of": {"x": 1},
        "use_beam_search": False,
        "length_penalty": 1.0,
        "logits_processors": [],
        "suffix": "",
        "mm_processor_kwargs": {},
        "repeat_penalty": 1.0,
        "mirostat": 0,
        "no_stop_trim": False,
    }
    plain = completion(http)["choices"]
    assert completion(http, **harmless, tools=[], add_generation_prompt=True)["choices"] == plain
    answer = http.post(
        "/v1/chat/completions", json={**CHAT, **harmless, "n": 1, "best_of": 1, "modalities": ["text"], "verbosity": "medium"}
    )
    assert answer.status_code == 200, answer.text


def test_messages_with_what_is_not_had_are_refused(http: httpx.Client) -> None:
    for name, value in (("function_call", {"name": "f", "arguments": "{}"}), ("audio", {"id": "a"})):
        answer = http.post("/v1/chat/completions", json={**CHAT, "messages": [{"role": "assistant", "content": "x", name: value}]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert f"messages[0].{name} is not supported" in answer.json()["error"]["message"]
    both = {**CHAT, "add_generation_prompt": True, "continue_final_message": True}
    assert http.post("/v1/chat/completions", json=both).json()["error"]["param"] == "continue_final_message"


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
MAYBE = sorted({field.name for kind in (CompletionRequest, ChatRequest) for field in msgspec.structs.fields(kind)} - {"prompt", "messages"})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["/v1/completions", "/v1/chat/completions"]), st.dictionaries(st.sampled_from(MAYBE), anything, max_size=3))
def test_no_field_is_a_500(http: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    body = {"prompt": "x", "max_tokens": 1} if path == "/v1/completions" else CHAT
    answer = http.post(path, content=json.dumps({**body, **fields}))
    assert answer.status_code in (200, 400, 404), answer.text


def test_the_official_client_sees_the_prompts_log_probabilities(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="abc", max_tokens=0, echo=True, logprobs=1).choices[0]
    assert found.logprobs is not None
    assert found.logprobs.token_logprobs == [None, -0.1, -0.2]
