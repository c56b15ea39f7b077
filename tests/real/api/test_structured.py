"""What a client wants its output to be: read from every field that names it, refused in one line where it is none; no grammar harms the
server."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdlab.real.engine.messages import StructuredOutputs
from tests.support.api_world import ApiWorld, served
from tests.support.echo_engine import EchoEngine

COMPLETION: dict[str, Any] = {"prompt": "x", "max_tokens": 2}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
BOTH = [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}, "required": ["b"]}
TAG = {"structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}], "triggers": ["<f"]}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))

READ = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, StructuredOutputs(json_object=True)),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, StructuredOutputs(json=TEXT)),
    ({"response_format": {"type": "structural_tag", **TAG}}, StructuredOutputs(structural_tag=json.dumps(TAG, separators=(",", ":")))),
    ({"guided_json": SCHEMA}, StructuredOutputs(json=TEXT)),
    ({"guided_json": TEXT, "guided_whitespace_pattern": " ?"}, StructuredOutputs(json=TEXT, whitespace_pattern=" ?")),
    ({"guided_regex": "a+"}, StructuredOutputs(regex="a+")),
    ({"guided_choice": ["a", "b"]}, StructuredOutputs(choice=("a", "b"))),
    ({"guided_grammar": 'root ::= "a"'}, StructuredOutputs(grammar='root ::= "a"')),
    ({"guided_decoding_backend": "xgrammar", "guided_regex": "a"}, StructuredOutputs(regex="a")),
    ({"structured_outputs": {"json": True}}, StructuredOutputs(json="true")),
    ({"structured_outputs": {"json_object": True, "disable_any_whitespace": True}}, None),
    ({"structured_outputs": {"choice": ["é"], "regex": None}}, StructuredOutputs(choice=("é",))),
    ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, StructuredOutputs(structural_tag=json.dumps(TAG))),
    ({"response_format": {"type": "text"}, "guided_regex": "a"}, StructuredOutputs(regex="a")),
]
READ[11] = (READ[11][0], StructuredOutputs(json_object=True, disable_any_whitespace=True))


@pytest.mark.parametrize(("path", "body"), BOTH, ids=["completions", "chat"])
@pytest.mark.parametrize(("fields", "expected"), READ)
def test_it_reaches_the_engine(
    fields: dict[str, Any], expected: StructuredOutputs | None, path: str, body: dict[str, Any], http: httpx.Client, world: ApiWorld
) -> None:
    answer = http.post(path, json=body | fields)
    assert answer.status_code == 200, answer.text
    assert world.engine.submitted[-1].sampling.structured == expected


REFUSED = [
    ({"response_format": {"type": "xml"}}, "response_format", "'xml' is not one of text, json_object, json_schema, structural_tag"),
    ({"response_format": {}}, "response_format", "None is not one of"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema must be a JSON schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}}, "response_format", "must be a JSON schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}},
        "response_format",
        "Invalid type: objekt",
    ),
    ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format", "format must be triggered_tags, not 'None'"),
    ({"guided_json": "{"}, "guided_json", "truncated"),
    ({"guided_json": {"$ref": "#/nowhere"}}, "guided_json", "does not exist"),
    ({"guided_json": {"type": "string", "pattern": "(?=a)"}}, "guided_json", "look-around"),
    ({"guided_json": 3}, "guided_json", "expected"),
    ({"guided_regex": "("}, "guided_regex", "unclosed group"),
    ({"guided_choice": []}, "guided_choice", "0 choices, it must have 1 to 4096"),
    ({"guided_choice": [1]}, "guided_choice", "expected `str`"),
    ({"guided_grammar": "nonsense"}, "guided_grammar", "Expected ::="),
    ({"structured_outputs": {}}, "structured_outputs", "must have one of json, regex, choice"),
    ({"structured_outputs": {"reggex": "a"}}, "structured_outputs", "must have one of json, regex, choice"),
    ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs", "not regex and json_object"),
    ({"structured_outputs": "a"}, "structured_outputs", "expected"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "only one of guided_regex and guided_choice"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format", "only one of"),
    ({"guided_regex": "a" * 300_000}, "guided_regex", "bytes, at most 262,144 are allowed"),
    ({"guided_grammar": "start: start"}, "guided_grammar", "it allows no text at all"),
]


@pytest.mark.parametrize(("path", "body"), BOTH, ids=["completions", "chat"])
@pytest.mark.parametrize(("fields", "param", "says"), REFUSED)
def test_it_is_refused_in_one_line(
    fields: dict[str, Any], param: str, says: str, path: str, body: dict[str, Any], http: httpx.Client, world: ApiWorld
) -> None:
    before = len(world.engine.submitted)
    answer = http.post(path, json=body | fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert "\n" not in error["message"] and len(error["message"]) < 600
    assert len(world.engine.submitted) == before


HOSTILE = [
    ({"guided_json": {"type": "integer", "multipleOf": 999_983}}, "too long|too much memory"),
    ({"guided_grammar": "start: T0\n" + "".join(f'T{i}: T{i + 1} "a"\n' for i in range(12_000)) + 'T12000: "x"'}, "deep"),
    ({"guided_grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000}, "deep"),
    ({"guided_json": '{"items":' * 20_000 + "1" + "}" * 20_000}, "deep"),
]


@pytest.mark.parametrize(("fields", "says"), HOSTILE, ids=["slow", "overflowing", "nested grammar", "nested schema"])
def test_a_hostile_grammar_costs_nobody_else_anything(fields: dict[str, Any], says: str, http: httpx.Client, world: ApiWorld) -> None:
    """Others are answered meanwhile, and the next grammar is compiled."""
    answers: list[httpx.Response] = []
    hostile = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{world.url}/v1/completions", json=COMPLETION | fields, timeout=120))
    )
    hostile.start()
    slowest_s, started_s = 0.0, time.monotonic()
    while hostile.is_alive():
        begin_s = time.monotonic()
        assert http.post("/v1/completions", json=COMPLETION).status_code == 200
        slowest_s = max(slowest_s, time.monotonic() - begin_s)
    hostile.join()
    ended_s = time.monotonic()
    assert answers[0].status_code == 400
    assert re.search(says, answers[0].json()["error"]["message"])
    assert slowest_s < max(1.0, (ended_s - started_s) / 2)  # on a busy machine all takes longer
    assert http.post("/v1/completions", json=COMPLETION | {"guided_regex": f"a{{{len(says)}}}"}).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "properties", "items", "enum", "anyOf", "a", "json", "regex", "choice", "json_schema", "schema", "$ref"]
            ),
            x,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    field=st.sampled_from(["guided_json", "structured_outputs", "response_format", "guided_choice", "guided_regex", "guided_grammar"]),
    value=JSON,
)
def test_nothing_a_client_writes_there_is_a_500(field: str, value: Any, http: httpx.Client) -> None:
    assert http.post("/v1/completions", json=COMPLETION | {field: value}).status_code in (200, 400)


class ForeignEngine(EchoEngine):
    """As if vLLM servers alone stood behind it, which read grammars of their own."""

    foreign = True


def test_what_only_vllm_servers_will_see_is_theirs_to_check(folder: Path) -> None:
    with served(folder, engine=ForeignEngine()) as world:
        body = COMPLETION | {"structured_outputs": {"structural_tag": {"format": {"type": "any_text"}}}}
        answer = httpx.post(f"{world.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert world.engine.submitted[-1].sampling.structured == StructuredOutputs(structural_tag='{"format":{"type":"any_text"}}')
