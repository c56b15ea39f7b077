"""What a client wants its output to be: response_format, structured_outputs and guided_*, read, bounded, and tried before anything runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import weakref
from collections import OrderedDict
from operator import attrgetter
from typing import Any, Protocol

import msgspec

from pdlab.real.api.errors import bad
from pdlab.real.engine.messages import StructuredOutputs, Vocabulary
from pdlab.real.host.processes import MODULE
from pdlab.real.models.tokenizer import Tokenizer

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_fields = attrgetter("structured_outputs", *GUIDED, "response_format")
_NO_FIELDS = (None,) * (len(GUIDED) + 2)
MOST_BYTES, MOST_CHOICES = 1 << 18, 4096
KNOWN = 256  # grammars whose answer is kept
DEATHS = {
    signal.SIGPROF: "it takes too long to compile",
    signal.SIGSEGV: "it is nested too deeply",
    signal.SIGABRT: "it takes too much memory to compile",
    signal.SIGKILL: "it takes too much memory to compile",
}


class StructuredAsk(msgspec.Struct, frozen=True):
    """vLLM's `structured_outputs`, as clients write it. Other keys are ignored."""

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False


class StructuredFields(Protocol):
    """A body's fields that are read here."""

    @property
    def structured_outputs(self) -> StructuredAsk | None: ...
    @property
    def guided_json(self) -> str | dict[str, Any] | bool | None: ...
    @property
    def guided_regex(self) -> str | None: ...
    @property
    def guided_choice(self) -> list[str] | None: ...
    @property
    def guided_grammar(self) -> str | None: ...
    @property
    def guided_whitespace_pattern(self) -> str | None: ...
    @property
    def response_format(self) -> dict[str, Any] | None: ...


def structured_field(body: StructuredFields) -> str:
    """Which field says what the output must be, or "". Raises ApiError where several do."""
    if _fields(body) == _NO_FIELDS:
        return ""
    fields = [name for name in ("structured_outputs", *GUIDED) if getattr(body, name) is not None]
    if body.response_format is not None and body.response_format.get("type") != "text":
        fields.append("response_format")
    if len(fields) > 1:
        raise bad(f"only one of {' and '.join(fields)} can be given", fields[1])
    return fields[0] if fields else ""


def structured_of(body: StructuredFields) -> StructuredOutputs | None:
    """Raises ApiError naming the field that is wrong or too large."""
    field = structured_field(body)
    if not field:
        return None
    if field == "response_format":
        asked = _of_format(body.response_format or {})
    elif field == "structured_outputs":
        asked = body.structured_outputs or StructuredAsk()
    else:
        asked = StructuredAsk(**{field.removeprefix("guided_"): getattr(body, field)})
    if body.guided_whitespace_pattern is not None and asked.whitespace_pattern is None:
        asked = msgspec.structs.replace(asked, whitespace_pattern=body.guided_whitespace_pattern)
    given = [kind for kind in KINDS if getattr(asked, kind) not in (None, False) or (kind == "json" and asked.json is False)]
    if len(given) != 1:
        raise bad(f"{field} must have one of {', '.join(KINDS)}, not {' and '.join(given) or 'none'}", field)
    if asked.choice is not None and not 0 < len(asked.choice) <= MOST_CHOICES:
        raise bad(f"{field} has {len(asked.choice)} choices, it must have 1 to {MOST_CHOICES}", field)
    structured = StructuredOutputs(
        json=None if asked.json is None else _text(asked.json, field),
        regex=asked.regex,
        choice=None if asked.choice is None else tuple(asked.choice),
        grammar=asked.grammar,
        json_object=bool(asked.json_object),
        structural_tag=None if asked.structural_tag is None else _text(asked.structural_tag, field),
        whitespace_pattern=asked.whitespace_pattern,
        disable_any_whitespace=asked.disable_any_whitespace,
        disable_additional_properties=asked.disable_additional_properties,
    )
    check_size(structured, field)
    return structured


def check_size(structured: StructuredOutputs, field: str) -> None:
    """Raises ApiError."""
    if (size := len(msgspec.msgpack.encode(structured))) > MOST_BYTES:
        raise bad(f"{field} has {size:,} bytes, at most {MOST_BYTES:,} are allowed", field)


def _of_format(given: dict[str, Any]) -> StructuredAsk:
    kind = given.get("type")
    if kind == "json_object":
        return StructuredAsk(json_object=True)
    if kind == "json_schema":
        inner = given.get("json_schema")
        schema = inner.get("schema", inner.get("json_schema")) if isinstance(inner, dict) else None
        if not isinstance(schema, dict | bool):
            raise bad("response_format.json_schema.schema must be a JSON schema", "response_format")
        return StructuredAsk(json=schema)
    if kind == "structural_tag":
        return StructuredAsk(structural_tag={key: value for key, value in given.items() if key != "type"})
    raise bad(f"response_format {kind!r} is not one of text, json_object, json_schema, structural_tag", "response_format")


def _text(value: str | dict[str, Any] | bool, field: str) -> str:
    try:
        return value if isinstance(value, str) else msgspec.json.encode(value).decode()
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise bad(f"{field} cannot be read: {error}", field) from None


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    tokens = [tokenizer.piece_bytes(id) for id in range(tokenizer.vocab)]
    return Vocabulary(tokens, sorted(tokenizer.special_ids), tuple(sorted(tokenizer.eos_ids)))


class GrammarCheck:
    """Tries grammars in a process of its own, one after the other; it is started when first needed, and again when one has ended it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._vocabulary: Vocabulary | None = None
        self._known: OrderedDict[StructuredOutputs, str] = OrderedDict()
        self._turn = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    async def vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = await asyncio.to_thread(vocabulary_of, self.tokenizer)
        return self._vocabulary

    async def reason(self, structured: StructuredOutputs) -> str:
        """Why there is no such grammar, in one line, or ""."""
        if structured not in self._known:
            async with self._turn:
                if structured not in self._known:
                    vocabulary = await self.vocabulary()
                    self._known[structured] = await asyncio.to_thread(self._ask, vocabulary, structured)
        self._known.move_to_end(structured)
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)
        return self._known[structured]

    def _ask(self, vocabulary: Vocabulary, structured: StructuredOutputs) -> str:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start(vocabulary)
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            _write(process, structured)
        if line := process.stdout.readline():
            return line.decode(errors="replace").strip()
        _end(process)
        return DEATHS.get(signal.Signals(-process.returncode), "") if process.returncode < 0 else "it cannot be compiled"

    def _start(self, vocabulary: Vocabulary) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PDLAB_")}
        command = [*MODULE, "pdlab.real.engine.grammar_check"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        weakref.finalize(self, _end, process)
        with contextlib.suppress(BrokenPipeError):
            _write(process, vocabulary)
        return process


def _write(process: subprocess.Popen[bytes], message: Vocabulary | StructuredOutputs) -> None:
    assert process.stdin is not None
    raw = msgspec.msgpack.encode(message)
    process.stdin.write(len(raw).to_bytes(4, "little") + raw)
    process.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    if process.returncode is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()
