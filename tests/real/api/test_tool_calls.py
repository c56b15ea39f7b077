"""What of a model's text is a tool call, and what is text; however it comes in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlab.real.api.call_json import JsonValue
from pdlab.real.api.tool_calls import CallParser, Hermes, Llama3, Named, Required

Made = Callable[..., Any]
TOOLS = {"get_weather", "f"}
CALL = '{"name": "get_weather", "arguments": {"city": "Zürich", "days": [1, 2.5e3], "deep": {"a": "}\\"]"}}}'
LLAMA = CALL.replace("arguments", "parameters")
ARGUMENTS = '{"city": "Zürich", "days": [1, 2.5e3], "deep": {"a": "}\\"]"}}'


def parsed(parser: CallParser, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and the calls; indices count up, and a name comes once, first."""
    content, calls = "", []
    for found in [*(parser.push(piece) for piece in pieces), parser.finish()]:
        content += found.content
        for piece in found.calls:
            if piece.name is not None:
                assert piece.index == len(calls)
                calls.append((piece.name, ""))
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    return content, calls


def of(kind: Made, text: str, *, eager: bool = False) -> tuple[str, list[tuple[str, str]]]:
    return parsed(kind(TOOLS.__contains__, eager=eager), [text])


CALLS = [
    (Hermes, f"<tool_call>\n{CALL}\n</tool_call>", "", [("get_weather", ARGUMENTS)]),
    (Hermes, f"<tool_call>{CALL}</tool_call>", "", [("get_weather", ARGUMENTS)]),
    (Hermes, f"I'll look.\n<tool_call>{CALL}</tool_call>\n", "I'll look.", [("get_weather", ARGUMENTS)]),
    (
        Hermes,
        f'<tool_call>{CALL}</tool_call>\n<tool_call>{{"name": "f", "arguments": {{}}}}</tool_call>',
        "",
        [("get_weather", ARGUMENTS), ("f", "{}")],
    ),
    (Hermes, '<tool_call>{"arguments": {"a": 1}, "id": 3, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    (Hermes, '<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", [("f", '{"a": 1}')]),
    (Hermes, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (Hermes, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    (Hermes, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (Hermes, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> done', "done", [("f", '{"a": 1}')]),  # a brace too few
    (Hermes, '<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (Hermes, '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', "", [("f", '{"a": "x\ny"}')]),
    (Hermes, '<tool_call>{"name": "f", "arguments": {"a": 1}, "n": 2}</tool_call>after', "after", [("f", '{"a": 1}')]),
    (Llama3, LLAMA, "", [("get_weather", ARGUMENTS)]),
    (Llama3, CALL, "", [("get_weather", ARGUMENTS)]),
    (Llama3, f"<|python_tag|>{LLAMA}", "", [("get_weather", ARGUMENTS)]),
    (Llama3, f'{LLAMA}; {{"name": "f", "parameters": {{}}}}', "", [("get_weather", ARGUMENTS), ("f", "{}")]),
    (Llama3, f" \n{LLAMA} ", "", [("get_weather", ARGUMENTS)]),
    (Llama3, f"Let me see. <|python_tag|>{LLAMA}", "Let me see.", [("get_weather", ARGUMENTS)]),
    (Llama3, '{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (Required, f'[{LLAMA}, {{"name": "f", "parameters": {{}}}}]', "", [("get_weather", ARGUMENTS), ("f", "{}")]),
    (Required, '[\n {"name": "f", "parameters": {"a": 1}}\n]', "", [("f", '{"a": 1}')]),
]

NO_CALLS = [
    (Hermes, "no call at all"),
    (Hermes, "a <tool_call> is written like this"),
    (Hermes, "<tool_call>"),
    (Hermes, "<tool_cal"),
    (Hermes, '<tool_call>{"name": "unknown", "arguments": {"a": 1}}</tool_call>'),
    (Hermes, '<tool_call>{"name": 3, "arguments": {"a": 1}}</tool_call>'),
    (Hermes, '<tool_call>{"nom": "f", "arguments": {"a": 1}}</tool_call>'),
    (Hermes, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (Hermes, '<tool_call>{"name": "f", "arguments": "x"}</tool_call>'),
    (Hermes, '<tool_call>["name", "f"]</tool_call>'),
    (Hermes, "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>"),
    (Hermes, '<tool_call>{"name": "f",}</tool_call>'),
    (Hermes, "{}"),
    (Hermes, LLAMA),
    (Llama3, "no call at all"),
    (Llama3, '{"a": 1}'),
    (Llama3, '{"name": "f"}'),
    (Llama3, '{"name": "unknown", "parameters": {}}'),
    (Llama3, f"The answer is {LLAMA}"),
    (Llama3, "{not JSON}"),
    (Llama3, "{"),
    (Llama3, '{"name": "f", "parameters": {"a": 1'),
    (Llama3, '  {"a": 1} and more {"name": "f", "parameters": {}}'),
]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("kind", "text", "content", "calls"), CALLS)
def test_calls_are_found(kind: Made, text: str, content: str, calls: list[tuple[str, str]], eager: bool) -> None:
    assert of(kind, text, eager=eager) == (content, calls)


@pytest.mark.parametrize(("kind", "text"), NO_CALLS)
def test_what_looks_like_a_call_and_is_none_is_text(kind: Made, text: str) -> None:
    assert of(kind, text) == (text, [])
    if not text.endswith("1"):  # a stream cannot know that its arguments break off
        assert of(kind, text, eager=True) == (text, [])


@pytest.mark.parametrize(
    ("kind", "text", "arguments"),
    [
        (Hermes, '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call>', '{"a": oops}}'),
        (Hermes, '<tool_call>{"name": "f", "arguments": {"a": 1', '{"a": 1'),
        (Llama3, '{"name": "f", "parameters": {"a": }}', '{"a": }}'),
        (Required, '[{"name": "f", "parameters": {"a": "bro', '{"a": "bro'),
    ],
)
def test_arguments_that_break_off_are_text_unless_a_stream_has_told_them(kind: Made, text: str, arguments: str) -> None:
    assert of(kind, text) == (text, [])
    assert of(kind, text, eager=True) == ("", [("f", arguments)])


def test_after_a_call_that_is_none_another_may_come() -> None:
    text = '<tool_call>{"name": "unknown", "arguments": {}}</tool_call><tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert of(Hermes, text) == ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', [("f", "{}")])
    assert of(Hermes, '<tool_call><tool_call>{"name": "f", "arguments": {}}</tool_call>') == ("<tool_call>", [("f", "{}")])


def test_a_tag_that_is_no_text_shows_in_none() -> None:
    assert of(Llama3, "<|python_tag|>print(1)") == ("print(1)", [])


def test_a_stream_has_arguments_as_they_come() -> None:
    parser = Hermes(TOOLS.__contains__, eager=True)
    told = [parser.push(piece) for piece in ('<tool_call>{"name": "f", "arg', 'uments": {"a', '": "long', " text", '"}}</tool_call>')]
    assert [[(p.name, p.arguments) for p in found.calls] for found in told] == [
        [],
        [("f", '{"a')],
        [(None, '": "long')],
        [(None, " text")],
        [(None, '"}')],
    ]


def test_a_named_tools_text_is_its_arguments() -> None:
    assert parsed(Named("f"), ['{"a"', ": 1}"]) == ("", [("f", '{"a": 1}')])
    assert parsed(Named("f"), [""]) == ("", [("f", "")])


# ---------------------------------------------------------------- any text, in any pieces

FRAGMENTS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<|python_tag|>", "<tool", "{", "}", "[", "]", '"name"', ": ", ":", '"f"', '"get_weather"', ",",
        '"arguments"', '"parameters"', '{"a": 1}', '"', "\\", "1", "true", "nul", " ", "\n", ";", "text", "é", CALL, LLAMA,
        f"<tool_call>{CALL}</tool_call>", '{"name": "f", "arguments": ', '{"name": "f", "parameters": {"a": ',
    ]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS, max_size=12).map("".join)
KINDS = st.sampled_from([Hermes, Llama3, Required])


@given(kind=KINDS, text=TEXTS, cuts=st.lists(st.integers(0, 300), max_size=30), eager=st.booleans())
def test_pieces_change_nothing(kind: Made, text: str, cuts: list[int], eager: bool) -> None:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    whole = parsed(kind(TOOLS.__contains__, eager=eager), [text])
    assert parsed(kind(TOOLS.__contains__, eager=eager), pieces) == whole
    assert parsed(kind(TOOLS.__contains__, eager=eager), list(text)) == whole


@given(kind=KINDS, text=TEXTS)
def test_calls_have_a_tools_name_and_arguments_that_are_json(kind: Made, text: str) -> None:
    _, calls = of(kind, text)
    for name, arguments in calls:
        assert name in TOOLS
        assert isinstance(json.loads(arguments, strict=False), dict)


@given(text=TEXTS)
def test_text_without_a_call_comes_through_unchanged(text: str) -> None:
    for eager in (False, True):
        content, calls = of(Hermes, text, eager=eager)
        if not calls:
            assert content == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(values=st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3), min_size=1, max_size=3), indent=st.sampled_from([None, 2]))
def test_any_arguments_come_back_as_they_were_written(values: list[dict[str, Any]], indent: int | None) -> None:
    calls = [{"name": "f", "parameters": value} for value in values]
    written = [json.dumps(call, indent=indent, ensure_ascii=False) for call in calls]
    for kind, text in (
        (Hermes, "".join(f"<tool_call>\n{one}\n</tool_call>" for one in written)),
        (Llama3, "; ".join(written)),
        (Required, json.dumps(calls, indent=indent, ensure_ascii=False)),
    ):
        for eager in (False, True):
            content, found = of(kind, text, eager=eager)
            assert content == ""
            assert [json.loads(arguments) for _, arguments in found] == values


@given(value=JSON, rest=st.sampled_from(["", " ", "}", "]", ",", '"', "x"]), at=st.integers(0, 99))
def test_the_reader_of_json_knows_its_end(value: Any, rest: str, at: int) -> None:
    text = json.dumps([value])
    reader = JsonValue()
    verdicts = [reader.feed(c) for c in text]
    assert verdicts == ["more"] * (len(text) - 1) + ["done"]
    wrong = JsonValue()
    cut = text[: at % len(text)] + rest
    done = next((i for i, c in enumerate(cut) if wrong.feed(c) == "done"), None)
    if done is not None:
        json.loads(cut[: done + 1], strict=False)
