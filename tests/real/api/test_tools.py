"""Tools over the wire: which answers are calls, as OpenAI's client reads them, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pdlab.core.types import UsageError
from pdlab.real.api.tools import parser_of
from pdlab.real.engine.messages import StructuredOutputs
from pdlab.real.models.tokenizer import Tokenizer
from tests.support import echo_engine
from tests.support.api_world import ApiWorld, served
from tests.support.waiting import until

ECHO = "{% for m in messages %}{{ m.content }}{% endfor %}<eos>"  # so the stand-in says what it is told, and ends
HERMES = ECHO + "{# <tool_call> #}"
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "x", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "f"}},
]
TWO = (
    'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
)
BOTH = [("get_weather", '{"city": "Zürich"}'), ("f", "{}")]


@pytest.fixture(scope="module", params=[1, 7], ids=["token by token", "by seven"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiWorld]:
    folder = echo_engine.byte_tokenizer(tmp_path_factory.mktemp("hermes"), HERMES)
    with served(folder, engine=echo_engine.EchoEngine(per_step=request.param), tool_parser="hermes") as found:
        yield found
        until(found.at_rest)


@pytest.fixture(scope="module")
def client(world: ApiWorld) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def asked(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "tools": TOOLS, "max_tokens": 300, **fields}


def whole(client: openai.OpenAI, text: str, **fields: Any) -> tuple[str | None, list[tuple[str, str]], str]:
    choice = client.chat.completions.create(**asked(text, **fields)).choices[0]
    calls = choice.message.tool_calls or []
    assert all(call.id.startswith("call_") and call.type == "function" for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    return choice.message.content, [(call.function.name, call.function.arguments) for call in calls], choice.finish_reason


def streamed(client: openai.OpenAI, text: str, **fields: Any) -> tuple[str, list[tuple[str, str]], str]:
    content, calls, finish = "", [], ""
    for chunk in client.chat.completions.create(**asked(text, stream=True, **fields)):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    assert call.index == len(calls)
                    assert call.type == "function" and call.function.name
                    calls.append([call.function.name, ""])
                else:
                    assert call.function.name is None
                calls[call.index][1] += call.function.arguments
            finish = choice.finish_reason or finish
    return content, [(name, arguments) for name, arguments in calls], finish


def test_calls_come_with_the_text_before_them(client: openai.OpenAI) -> None:
    assert whole(client, TWO) == ("Let me see.", BOTH, "tool_calls")
    assert streamed(client, TWO) == ("Let me see.", BOTH, "tool_calls")
    assert whole(client, TWO.removeprefix("Let me see.")) == (None, BOTH, "tool_calls")


@pytest.mark.parametrize("text", ["just text", "<tool_call>", "<tool_call>{}</tool_call>", '{"name": "f", "arguments": {}}'])
def test_what_is_no_call_is_text(text: str, client: openai.OpenAI) -> None:
    assert whole(client, text) == (text, [], "stop")
    assert streamed(client, text) == (text, [], "stop")


def test_who_wants_no_calls_gets_text(client: openai.OpenAI) -> None:
    assert whole(client, TWO, tool_choice="none") == (TWO, [], "stop")
    assert whole(client, TWO, tools=[]) == (TWO, [], "stop")
    assert streamed(client, TWO, tool_choice="none") == (TWO, [], "stop")


def test_one_call_where_they_may_not_be_parallel(client: openai.OpenAI) -> None:
    assert whole(client, TWO, parallel_tool_calls=False) == ("Let me see.", BOTH[:1], "tool_calls")
    assert streamed(client, TWO, parallel_tool_calls=False) == ("Let me see.", BOTH[:1], "tool_calls")


def test_cut_off_it_is_a_matter_of_length(client: openai.OpenAI) -> None:
    content, calls, finish = whole(client, TWO, max_tokens=60)
    assert (content, calls, finish) == (TWO.encode()[:60].decode(), [], "length")
    content, calls, finish = streamed(client, TWO, max_tokens=75)
    assert (content, finish) == ("Let me see.", "length")
    assert calls == [("get_weather", '{"city": "Zür')]


def test_required_calls_are_a_list_that_a_grammar_makes_sure_of(client: openai.OpenAI, world: ApiWorld) -> None:
    text = json.dumps([{"name": name, "parameters": json.loads(arguments)} for name, arguments in BOTH], ensure_ascii=False)
    for way in (whole, streamed):
        content, calls, finish = way(client, text, tool_choice="required")
        assert (content or "", calls, finish) == ("", BOTH, "tool_calls")
        structured = world.engine.submitted[-1].sampling.structured
        assert structured is not None and structured.json is not None
        schema = json.loads(structured.json)
        assert (schema["type"], schema["minItems"]) == ("array", 1)
        assert [one["properties"]["name"] for one in schema["items"]["anyOf"]] == [{"const": "get_weather"}, {"const": "f"}]
        assert schema["items"]["anyOf"][0]["properties"]["parameters"] == WEATHER
    whole(client, text, tool_choice="required", parallel_tool_calls=False)
    assert '"maxItems":1' in (world.engine.submitted[-1].sampling.structured or StructuredOutputs()).json  # type: ignore[operator]


def test_a_named_tools_arguments_are_the_text(client: openai.OpenAI, world: ApiWorld) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    for way in (whole, streamed):
        content, calls, finish = way(client, BOTH[0][1], tool_choice=choice)
        assert (content or "", calls, finish) == ("", BOTH[:1], "tool_calls")
        structured = world.engine.submitted[-1].sampling.structured
        assert structured is not None and structured.json is not None
        assert json.loads(structured.json) == WEATHER


def test_definitions_move_to_the_root(client: openai.OpenAI, world: ApiWorld) -> None:
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"], "$defs": {"n": {"type": "integer"}}}
    tools = [*TOOLS, {"type": "function", "function": {"name": "g", "parameters": parameters}}]
    text = '[{"name": "g", "parameters": {"a": 1}}]'
    assert whole(client, text, tools=tools, tool_choice="required")[1] == [("g", '{"a": 1}')]
    other = {"type": "function", "function": {"name": "h", "parameters": {**parameters, "$defs": {"n": {"type": "string"}}}}}
    with pytest.raises(openai.BadRequestError, match="define 'n' in different ways"):
        whole(client, text, tools=[*tools, other], tool_choice="required")


def test_log_probabilities_and_token_ids_come_beside_calls(client: openai.OpenAI, world: ApiWorld) -> None:
    body = asked(TWO, stream=True, logprobs=True, return_token_ids=True)
    lines = httpx.post(f"{world.url}/v1/chat/completions", json=body, timeout=60).text.splitlines()
    choices = [c for line in lines if line.startswith("data: {") for c in json.loads(line[6:])["choices"]]
    assert bytes(t for c in choices for t in c.get("token_ids", []) if t < 256).decode() == TWO
    assert sum(len(c["logprobs"]["content"]) for c in choices if c["logprobs"]) == len(TWO.encode()) + 1
    assert "".join(call["function"]["arguments"] for c in choices for call in c["delta"].get("tool_calls", [])) == '{"city": "Zürich"}{}'


REFUSED = [
    ({"tools": [{"type": "function"}]}, "tools", "tools[0] must be of type function"),
    ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools", "tools[0] must be of type function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools", "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "not 'a b'"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools", "must be a JSON schema"),
    ({"tools": TOOLS[1:] * 129}, "tools", "129 entries, at most 128"),
    ({"tool_choice": "any"}, "tool_choice", "'any' is not one of none, auto, required"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "must be none, auto, required, or"),
    ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g', which is not among tools"),
    ({"tool_choice": "required", "tools": None}, "tool_choice", "needs tools"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format", "does not go with tool_choice"),
    ({"detokenize": False}, "tools", "tools need text"),
    (
        {"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}]},
        "tools",
        "Invalid type: objekt",
    ),
]


@pytest.mark.parametrize(("fields", "param", "says"), REFUSED)
def test_mistakes_are_named(fields: dict[str, Any], param: str, says: str, world: ApiWorld) -> None:
    answer = httpx.post(f"{world.url}/v1/chat/completions", json=asked("x", **fields), timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert says in answer.json()["error"]["message"]


# ---------------------------------------------------------------- which form a model has


def tokenizer_with(folder: Path, template: str | None) -> Tokenizer:
    return Tokenizer.load(echo_engine.byte_tokenizer(folder, template))


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ('Respond as {"name": function name, "parameters": dictionary of argument name and its value}.', "llama3_json"),
        (echo_engine.TEMPLATE, ""),
        (None, ""),
    ],
)
def test_the_chat_template_shows_how_calls_are_written(template: str | None, form: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    assert parser_of(tokenizer, None, None) == form
    assert parser_of(tokenizer, "hermes", None) == "hermes"
    assert parser_of(tokenizer, "hermes", False) == ""
    if form:
        assert parser_of(tokenizer, None, True) == form
    else:
        with pytest.raises(UsageError, match="--enable-auto-tool-choice needs --tool-call-parser"):
            parser_of(tokenizer, None, True)
    with pytest.raises(UsageError, match="'hermess' is not one of hermes, llama3_json"):
        parser_of(tokenizer, "hermess", None)


def test_a_tag_that_is_a_special_token_is_seen(tmp_path: Path) -> None:
    """And no other special token shows."""
    folder = echo_engine.byte_tokenizer(tmp_path, ECHO)
    written = json.loads((folder / "tokenizer.json").read_text())
    written["added_tokens"][1]["content"] = "<|python_tag|>"
    (folder / "tokenizer.json").write_text(json.dumps(written).replace('"<start>"', '"<|python_tag|>"'))
    with served(folder, tool_parser="llama3_json") as world, openai.OpenAI(base_url=f"{world.url}/v1", api_key="x", timeout=60) as client:
        text = '<end><|python_tag|>{"name": "f", "parameters": {"a": 1}}'
        assert whole(client, text) == (None, [("f", '{"a": 1}')], "tool_calls")
        assert streamed(client, text) == ("", [("f", '{"a": 1}')], "tool_calls")
        assert whole(client, text, tool_choice="none")[0] == '{"name": "f", "parameters": {"a": 1}}'
