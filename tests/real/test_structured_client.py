"""Structured outputs and tool calls of a served model, as the official client asks for them."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SAID: list[Any] = [{"role": "user", "content": "Who?"}]
TOOL: Any = {"type": "function", "function": {"name": "greet", "parameters": SCHEMA}}


def is_person(text: str | None) -> bool:
    person = json.loads(text or "")
    return set(person) == {"name", "age"} and 0 <= person["age"] <= 150


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_json_schema(temperature: float, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=SAID,
        temperature=temperature,
        n=2,
        max_tokens=300,
        logprobs=True,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}},
    )
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert all(is_person(choice.message.content) for choice in answer.choices)


def test_a_stream_of_one(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=SAID,
        max_tokens=300,
        seed=4,
        stream=True,
        extra_body={"guided_json": SCHEMA, "guided_whitespace_pattern": " "},
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert is_person("".join(chunk.delta.content or "" for chunk in chunks))
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[a-c]{4}"}, "[a-c]{4}"),
        ({"guided_choice": ["red", "green"]}, "red|green"),
        ({"guided_grammar": 'root ::= "(" [0-9]+ ")"', "logit_bias": {")": 0}}, r"\([0-9]+\)"),
        ({"structured_outputs": {"regex": "x{2}"}}, "xx"),
    ],
)
def test_a_completion_that_is_guided(fields: dict[str, Any], pattern: str, http: httpx.Client) -> None:
    if "logit_bias" in fields:
        fields["logit_bias"] = {str(ord(")")): 3.0}
    answer = http.post("/v1/completions", json={"prompt": "Which?", "max_tokens": 100, "seed": 2, **fields})
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert re.fullmatch(pattern, choice["text"]) if choice["finish_reason"] == "stop" else choice["text"].startswith("(")


def test_calls_that_are_required_or_named(client: openai.OpenAI) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "greet"}}):
        answer = client.chat.completions.create(
            model="tiny", messages=SAID, max_tokens=400, seed=1, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False  # type: ignore[arg-type]
        )  # fmt: skip
        (call,) = answer.choices[0].message.tool_calls or []
        assert answer.choices[0].finish_reason == "tool_calls"
        assert call.function.name == "greet"  # type: ignore[union-attr]
        assert is_person(call.function.arguments)  # type: ignore[union-attr]


def test_what_is_no_schema_is_refused_at_once(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Invalid type: objekt"):
        client.chat.completions.create(model="tiny", messages=SAID, extra_body={"guided_json": {"type": "objekt"}})
