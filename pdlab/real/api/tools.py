"""`tools` and `tool_choice` of a chat: checked, what they make the output be, and how calls are read back from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from pdlab.core.types import UsageError, nearest
from pdlab.real.api.errors import bad
from pdlab.real.api.tool_calls import (
    HERMES_BEGIN,
    HERMES_END,
    PARSERS,
    PYTHON_TAG,
    CallParser,
    CallPiece,
    Found,
    Hermes,
    Llama3,
    Named,
    Required,
)
from pdlab.real.engine.messages import StructuredOutputs
from pdlab.real.models.tokenizer import Tokenizer

MOST_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
TAGS = {"hermes": (HERMES_BEGIN, HERMES_END), "llama3_json": (PYTHON_TAG,)}


def parser_of(tokenizer: Tokenizer, parser: str | None, enabled: bool | None) -> str:
    """How calls are read back where the model may choose: `parser` if that is given, else as its chat template shows them; "" for not at
    all. Raises UsageError."""
    if parser is not None and parser not in PARSERS:
        raise UsageError(f"--tool-call-parser {parser!r} is not one of {', '.join(PARSERS)}{nearest(parser, PARSERS)}")
    if enabled is False:
        return ""
    text = tokenizer.templates.text
    guess = "hermes" if HERMES_BEGIN in text else "llama3_json" if PYTHON_TAG in text or '"parameters": dictionary' in text else ""
    if enabled and not (parser or guess):
        raise UsageError(
            "--enable-auto-tool-choice needs --tool-call-parser hermes or llama3_json: "
            "the model's chat template does not show how it calls tools"
        )
    return parser or guess


class ToolFields(Protocol):
    """A body's fields that are read here."""

    @property
    def tools(self) -> list[dict[str, Any]] | None: ...
    @property
    def tool_choice(self) -> str | dict[str, Any] | None: ...
    @property
    def parallel_tool_calls(self) -> bool | None: ...
    @property
    def stream(self) -> bool | None: ...


@dataclass(frozen=True, slots=True)
class ToolUse:
    """`parser` makes one for each candidate. `kept_ids`: special tokens that are text to it."""

    parser: Callable[[], CallParser]
    kept_ids: frozenset[int] = frozenset()


def tools_of(body: ToolFields, tokenizer: Tokenizer, parser: str) -> tuple[StructuredOutputs | None, ToolUse | None]:
    """What the output must be, and how it is read; neither where no tool may be called. Raises ApiError."""
    tools = _functions(body.tools or [])
    choice = body.tool_choice
    name = _named(choice) if isinstance(choice, dict) else None
    if choice is not None and name is None and choice not in ("none", "auto", "required"):
        raise bad(f"tool_choice {choice!r} is not one of none, auto, required, or a function", "tool_choice")
    if (choice == "required" or name is not None) and not tools:
        raise bad("tool_choice needs tools", "tool_choice")
    if name is not None and name not in tools:
        raise bad(f"tool_choice names {name[:80]!r}, which is not among tools", "tool_choice")
    eager, one = bool(body.stream), body.parallel_tool_calls is False
    if name is not None:
        return _json(tools[name]), ToolUse(lambda: Named(name))
    if choice == "required":
        return _json(_list_of(tools, one)), ToolUse(lambda: Required(tools.__contains__, eager=eager))
    if choice == "none" or not tools or not parser:
        return None, None
    kind = Hermes if parser == "hermes" else Llama3
    ids = [tokenizer.backend.token_to_id(tag) for tag in TAGS[parser]]

    def free() -> CallParser:
        made = kind(tools.__contains__, eager=eager)
        return First(made) if one else made

    return None, ToolUse(free, frozenset(id for id in ids if id is not None))


class First:
    """The first call, and no other."""

    def __init__(self, parser: CallParser) -> None:
        self.parser = parser

    def push(self, text: str) -> Found:
        return self._first(self.parser.push(text))

    def finish(self) -> Found:
        return self._first(self.parser.finish())

    def _first(self, found: Found) -> Found:
        return Found(found.content, [piece for piece in found.calls if not piece.index])


def _functions(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The schemas of their parameters, by name."""
    if len(tools) > MOST_TOOLS:
        raise bad(f"tools has {len(tools)} entries, at most {MOST_TOOLS} are allowed", "tools")
    schemas: dict[str, Any] = {}
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            raise bad(f"tools[{number}] must be of type function, with a function", "tools")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise bad(f"tools[{number}].function.name must be of letters, digits, _ . : / -, at most 128, not {str(name)[:80]!r}", "tools")
        if parameters is not None and not isinstance(parameters, dict):
            raise bad(f"tools[{number}].function.parameters must be a JSON schema", "tools")
        schemas[name] = {"type": "object", **parameters} if parameters else {"type": "object", "properties": {}}
    return schemas


def _named(choice: dict[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise bad('tool_choice must be none, auto, required, or {"type": "function", "function": {"name": ...}}', "tool_choice")
    return name


def _list_of(tools: dict[str, Any], one: bool) -> dict[str, Any]:
    """The schema of a list of calls. What the tools' schemas define is defined at its root, where their references look for it."""
    shared: dict[str, dict[str, Any]] = {}
    calls = []
    for name, schema in tools.items():
        for place in ("$defs", "definitions"):
            for key, definition in (schema.get(place) or {}).items():
                if shared.setdefault(place, {}).setdefault(key, definition) != definition:
                    raise bad(f"tools define {key!r} in different ways: give one of them another name", "tools")
        inner = {key: value for key, value in schema.items() if key not in ("$defs", "definitions")}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": inner},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    return {"type": "array", "minItems": 1, **({"maxItems": 1} if one else {}), "items": {"anyOf": calls}, **shared}


def _json(schema: dict[str, Any]) -> StructuredOutputs:
    try:
        return StructuredOutputs(json=msgspec.json.encode(schema).decode())
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise bad(f"tools cannot be read: {error}", "tools") from None


def call_of(piece: CallPiece, id: str) -> dict[str, Any]:
    """As a delta tells of it; `id` goes with the name."""
    function = {"arguments": piece.arguments} if piece.name is None else {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, **({} if piece.name is None else {"id": id, "type": "function"}), "function": function}


def calls_of(pieces: list[CallPiece], new_id: Callable[[], str]) -> list[dict[str, Any]]:
    """Whole calls, as a message has them."""
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.name is not None:
            calls.append({"id": new_id(), "type": "function", "function": {"name": piece.name, "arguments": ""}})
        calls[-1]["function"]["arguments"] += piece.arguments
    return calls
