"""Structured outputs: which tokens a grammar allows next. llguidance does the work; it is asked for one mask a token.

A grammar's text is `source(structured)`. `Grammars` compiles it against a vocabulary and keeps the result; each sequence gets a `Matcher`,
its place in the grammar, that `Row.count` moves on. Whoever takes a sequence over rebuilds its matcher from the tokens made.

Nothing is forced ahead of the model: where a grammar leaves only one text, the model still chooses how it is cut into tokens.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import llguidance
import msgspec
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from pdlab.real.engine.messages import StructuredOutputs, Vocabulary

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"  # in JSON; without a bound small models write blanks for ever
UNFORCED = '%llguidance {"no_forcing": true}'
KEPT = 64  # compiled grammars
MOST_REASON = 300  # characters
LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
PLACE = re.compile(r"^at \d+\(\d+\): ")

# Where a JSON schema holds others, for `disable_additional_properties`. Source: JSON Schema 2020-12, core, section 10.
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
INNER = ("items", "prefixItems", "additionalProperties", "contains", "not", "if", "then", "else", "allOf", "anyOf", "oneOf")


class GrammarError(ValueError):
    """It is no grammar, allows nothing, or is too large; one line."""


def source(structured: StructuredOutputs, special: frozenset[str] = frozenset()) -> str:
    """In llguidance's Lark. `special` are the names of tokens that are no text, of which a structural tag may begin with one. Raises
    GrammarError."""
    try:
        if structured.json is not None:
            return f"start: %json {json.dumps(_schema(structured, structured.json))}\n{UNFORCED}"
        if structured.json_object:
            return f"start: %json {json.dumps(_schema(structured, {'type': 'object'}))}\n{UNFORCED}"
        if structured.regex is not None:
            return f"start: /{llguidance.regex_to_lark(structured.regex, 'd')}/\n{UNFORCED}"
        if structured.choice:
            return f"start: {' | '.join(map(json.dumps, structured.choice))}\n{UNFORCED}"
        if structured.grammar is not None:
            return _unforced(any_to_lark(structured.grammar))
        if structured.structural_tag is not None:
            return _unforced(_tags(structured, special))
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except Exception as error:  # any_to_lark raises no narrower type
        raise GrammarError(_line(str(error))) from None
    raise GrammarError("it names no json, json_object, regex, choice, grammar or structural_tag")


def _unforced(lark: str) -> str:
    """A grammar with an option line of its own says itself what it wants."""
    lark = lark.replace("%llguidance {}\n", "", 1)
    return lark if "%llguidance" in lark else f"{lark}\n{UNFORCED}"


def _schema(structured: StructuredOutputs, schema: Any) -> Any:
    """With the options that the request brings, unless the schema has its own."""
    if isinstance(schema, str):
        schema = msgspec.json.decode(schema)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError(f"a JSON schema is an object, not {json.dumps(schema)[:80]}")
    if structured.disable_additional_properties:
        schema = _closed(schema)
    if structured.disable_any_whitespace:
        options: dict[str, Any] = {"whitespace_flexible": False}
    else:
        options = {"whitespace_pattern": WHITESPACE if structured.whitespace_pattern is None else structured.whitespace_pattern}
    return {"x-guidance": options, **schema}


def _closed(schema: Any) -> Any:
    """Objects with named properties have no others, unless they say so."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    copied = dict(schema)
    for key in MAPS:
        if isinstance(copied.get(key), dict):
            copied[key] = {name: _closed(inner) for name, inner in copied[key].items()}
    for key in INNER:
        if key in copied:
            copied[key] = _closed(copied[key])
    if "properties" in copied or "patternProperties" in copied:
        copied.setdefault("additionalProperties", False)
    return copied


class _Structure(msgspec.Struct, frozen=True):
    begin: str
    end: str
    schema: dict[str, Any] | bool = True


class _StructuralTag(msgspec.Struct, frozen=True):
    """Free text in which what begins with a trigger must be one of the structures."""

    structures: list[_Structure]
    triggers: list[str]


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    json_schema: dict[str, Any] | bool = True


class _Tag(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    begin: str
    content: _Content
    end: str
    type: Literal["tag"] = "tag"


class _TriggeredTags(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The same, as xgrammar writes it now."""

    type: str
    triggers: list[str] = []
    tags: list[_Tag] = []
    at_least_one: bool = False
    stop_after_first: bool = False


class _Triggered(msgspec.Struct, frozen=True):
    format: _TriggeredTags


_read_tag = msgspec.json.Decoder(_StructuralTag).decode
_read_triggered = msgspec.json.Decoder(_Triggered).decode


def _structural_tag(text: str) -> _StructuralTag:
    plain = msgspec.json.decode(text)
    form = plain.get("format") if isinstance(plain, dict) and "structures" not in plain else None
    if form is None:
        return _read_tag(text)
    kind = form.get("type") if isinstance(form, dict) else form
    if kind != "triggered_tags":
        raise GrammarError(f"a structural tag's format must be triggered_tags, not {str(kind)[:80]!r}")
    asked = _read_triggered(text).format
    for name in ("at_least_one", "stop_after_first"):
        if getattr(asked, name):
            raise GrammarError(f"triggered_tags: {name} is not had here")
    for tag in asked.tags:
        if tag.content.type != "json_schema":
            raise GrammarError(f"the content of tag {tag.begin[:80]!r} must be a json_schema, not {tag.content.type[:80]!r}")
    return _StructuralTag([_Structure(tag.begin, tag.end, tag.content.json_schema) for tag in asked.tags], asked.triggers)


def _tags(structured: StructuredOutputs, special: frozenset[str]) -> str:
    asked = _structural_tag(structured.structural_tag or "")
    if not asked.structures or not all(asked.triggers):
        raise GrammarError("a structural tag needs structures, and triggers that are not empty")
    tags = []
    for one in asked.structures:
        trigger = next((trigger for trigger in asked.triggers if one.begin.startswith(trigger)), None)
        if trigger is None:
            raise GrammarError(f"structure {one.begin[:80]!r} begins with none of the triggers")
        schema = _schema(structured, one.schema)
        tags.append(llguidance.StructTag(trigger=trigger, begin=one.begin, grammar=schema, end=one.end))
    return llguidance.StructTag.to_grammar(tags, assume_special=any(tag.trigger in special for tag in tags))


def _line(reason: str) -> str:
    """The library's reason in one line."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    first = PLACE.sub("", lines[0]) if lines else "no reason given"
    detail = next((line for line in lines[1:] if line.startswith("error: ")), "")
    return f"{first[:MOST_REASON]} {detail}".strip()


class Matcher:
    """A sequence's place in its grammar. `error` says why it cannot go on; `ended`: an end-of-sequence token was counted."""

    __slots__ = ("_inner", "ended", "eos_ids", "error")

    def __init__(self, inner: llguidance.LLMatcher, eos_ids: Sequence[int]) -> None:
        self._inner, self.eos_ids = inner, eos_ids
        self.error = ""
        self.ended = False

    def fill(self, words: NDArray[np.int32]) -> None:
        """One bit a token, 32 in a word, the lowest first; 0 beyond the vocabulary. All ones where there is an error."""
        if not self.error:
            bits = np.frombuffer(self._inner.compute_bitmask(), np.int32)[: len(words)]
            words[: len(bits)] = bits
            if self._inner.is_error():
                self.error = f"the grammar cannot go on: {_line(self._inner.get_error())}"
        if self.error:
            words.fill(-1)

    def count(self, token: int) -> None:
        if self.error or self.ended:
            return
        self.ended = token in self.eos_ids
        if not self._inner.consume_token(token):
            self.error = f"the grammar does not allow token {token} here"


class Grammars:
    """Compiled against one vocabulary; the last `KEPT` are kept."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Raises GrammarError where the vocabulary has no end-of-sequence token, without which no output could end."""
        if not vocabulary.eos_ids:
            raise GrammarError("the model has no end-of-sequence token, without which a structured output cannot end")
        self.eos_ids = vocabulary.eos_ids
        self.words = -(-len(vocabulary.tokens) // 32)
        self._special = frozenset(vocabulary.tokens[id].decode(errors="replace") for id in vocabulary.special_ids)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Greedy(vocabulary, self)), n_vocab=len(vocabulary.tokens), eos_token=list(vocabulary.eos_ids)
        )
        self._compiled: OrderedDict[StructuredOutputs, llguidance.LLMatcher] = OrderedDict()

    def greedy(self, text: bytes) -> list[int]:
        """The text in the longest tokens. Asked where a client's own grammar lets forced text through."""
        tokenizer = getattr(self, "_tokenizer", None)
        return [] if tokenizer is None else tokenizer.greedy_tokenize(text.decode(errors="replace"))

    def compile(self, structured: StructuredOutputs) -> llguidance.LLMatcher:
        """May be called in another thread. Raises GrammarError with the library's reason in one line."""
        inner = llguidance.LLMatcher(self._tokenizer, source(structured, self._special), log_level=0, limits=LIMITS)
        if not inner.is_error():
            inner.compute_bitmask()  # what allows nothing shows only here
        if inner.is_error():
            reason = inner.get_error()
            raise GrammarError("it allows no text at all" if reason.startswith("NoExtension") else _line(reason))
        return inner

    def keep(self, structured: StructuredOutputs, inner: llguidance.LLMatcher) -> None:
        self._compiled[structured] = inner
        while len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)

    def ensure(self, structured: StructuredOutputs) -> None:
        """Have it compiled. Raises GrammarError."""
        if structured not in self._compiled:
            self.keep(structured, self.compile(structured))
        self._compiled.move_to_end(structured)

    def matcher(self, structured: StructuredOutputs) -> Matcher:
        """At the grammar's beginning. Raises GrammarError."""
        self.ensure(structured)
        return Matcher(self._compiled[structured].deep_copy(), self.eos_ids)


class _Greedy:
    """As llguidance wants a tokenizer."""

    def __init__(self, vocabulary: Vocabulary, grammars: Grammars) -> None:
        self.eos_token_id = vocabulary.eos_ids[0]
        self.bos_token_id = None
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special_ids
        self.grammars = grammars

    def __call__(self, text: bytes) -> list[int]:
        return self.grammars.greedy(text)
