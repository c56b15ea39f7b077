"""The JSON of one tool call, read character by character as a model writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Literal

BLANK = " \t\n\r"
ARGUMENTS = ("arguments", "parameters")
Verdict = Literal["more", "done", "bad"]


class JsonValue:
    """Reads one JSON value, character by character; control characters in strings are let through, as models write them."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self._open: list[str] = []  # brackets
        self._in_string = self._escaped = False
        self._scalar = ""
        self._expects = "value"  # or: key, colon, comma; "first" of a list or "first key": it may also end

    def feed(self, c: str) -> Verdict:
        """Of a number that stands alone only what follows shows the end: it is then "bad" here, and `complete`."""
        self.text.append(c)
        if self._in_string:
            return self._string(c)
        if self._scalar:
            if c not in BLANK + ",]}:":
                self._scalar += c
                return "more" if len(self._scalar) < 400 and _begins_scalar(self._scalar) else "bad"
            if not _is_scalar(self._scalar):
                return "bad"
            self._scalar = ""
            self._expects = "comma"
            if not self._open:
                return "bad"
        return "more" if c in BLANK else self._structure(c)

    def _string(self, c: str) -> Verdict:
        if self._escaped:
            self._escaped = False
        elif c == "\\":
            self._escaped = True
        elif c == '"':
            self._in_string = False
            return self._ended()
        return "more"

    def _ended(self) -> Verdict:
        """A string, list or object has."""
        self._expects = "colon" if self._expects.endswith("key") else "comma"
        return "more" if self._open else "done"

    def _structure(self, c: str) -> Verdict:
        expects = self._expects
        if c == '"' and expects in ("value", "first", "key", "first key"):
            self._in_string = True
        elif c in "{[" and expects in ("value", "first"):
            self._open.append(c)
            self._expects = "first key" if c == "{" else "first"
        elif c in "}]" and self._open and self._open[-1] == {"}": "{", "]": "["}[c] and expects in ("comma", "first", "first key"):
            self._open.pop()
            self._expects = "value"
            return self._ended()
        elif c == "," and expects == "comma" and self._open:
            self._expects = "key" if self._open[-1] == "{" else "value"
        elif c == ":" and expects == "colon":
            self._expects = "value"
        elif expects in ("value", "first") and _begins_scalar(c):
            self._scalar = c
        else:
            return "bad"
        return "more"


def _begins_scalar(text: str) -> bool:
    return any(word.startswith(text) for word in ("true", "false", "null")) or all(c in "+-.eE0123456789" for c in text)


def _is_scalar(text: str) -> bool:
    try:
        return not isinstance(json.loads(text), str)
    except ValueError:
        return False


class CallReader:
    """Reads one {"name": ..., "arguments": {...}}, in any order, with other keys beside. `bare`: without arguments it is a call, too."""

    def __init__(self, is_tool: Callable[[str], bool], *, bare: bool) -> None:
        self.is_tool, self.bare = is_tool, bare
        self.name: str | None = None
        self.arguments = ""  # so far
        self.committed = False  # a call in all likelihood: its name is a tool's, and its arguments have begun as an object does
        self.whole = False  # the arguments are complete
        self._place = "{"  # what comes next: { key : value ,
        self._key = ""
        self._value = JsonValue()

    def feed(self, c: str) -> Verdict:
        place = self._place
        if place in ("key", "value"):
            return self._in_value(c)
        if c in BLANK:
            return "more"
        if place == "{" and c == "{":
            self._place = "first key"
        elif place in ("first key", "next key") and c == '"':
            self._begin("key")
            return self._in_value(c)
        elif c == "}" and place in ("first key", ","):
            return "done" if self.is_call else "bad"
        elif place == ":" and c == ":":
            self._begin("value")
        elif place == "," and c == ",":
            self._place = "next key"
        else:
            return "bad"
        return "more"

    @property
    def is_call(self) -> bool:
        if self.name is not None and self.bare and not self.arguments:
            return True
        return self.name is not None and self.whole

    def _begin(self, place: str) -> None:
        self._place, self._value = place, JsonValue()

    def _in_value(self, c: str) -> Verdict:
        value = self._value
        if self._place == "value" and c in BLANK and not value.text:
            return "more"
        verdict = value.feed(c)
        if verdict == "bad" and self._place == "value" and c in ",}" and _is_scalar("".join(value.text[:-1])):
            del value.text[-1]  # a number, or a word
            return (self._take() and self.feed(c)) or "bad"
        if self._place == "value" and self._key in ARGUMENTS and not self.whole and value.text[0] == "{":
            if verdict != "bad":
                self.arguments += c
            if not self.committed and self.name is not None and c not in BLANK and len(value.text) > 1:
                self.committed = verdict != "bad"
        if verdict == "done":
            return "more" if self._take() else "bad"
        return verdict

    def _take(self) -> bool:
        """A key or a value is complete. False: this cannot be a call."""
        text = "".join(self._value.text)
        try:
            read = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            return False
        if self._place == "key":
            self._key, self._place = str(read), ":"
            return True
        self._place = ","
        if self._key == "name" and self.name is None:
            self.name = read if isinstance(read, str) and self.is_tool(read) else None
            if self.name is not None and self.arguments:
                self.committed = True
            return self.name is not None
        if self._key in ARGUMENTS and not self.whole:
            if isinstance(read, str):  # some models write them as text
                try:
                    inner = json.loads(read, strict=False)
                except (ValueError, RecursionError):
                    return False
                self.arguments, read = read, inner
            elif read is None and self.bare:
                self.arguments, read = "{}", {}
            self.whole = isinstance(read, dict)
            return self.whole
        return True
