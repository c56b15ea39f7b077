"""Tool calls in a model's text, found as the text comes. However it is cut into pieces, the same calls come out.

Hermes (Qwen, Hermes, SmolLM): <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number, with text around them.
Llama 3: {"name": ..., "parameters": {...}} as the whole answer, several with `;` between them; after <|python_tag|> anywhere.
Required: a JSON list of {"name", "parameters"}, which a grammar has made sure of. Named: the text is the arguments.

What is no call after all is text: no JSON, a name that is no tool's, no arguments. An `eager` parser, a stream's, gives arguments as they
come; if they then break off, or are no JSON, the client has them as the model wrote them. Any other parser takes that for text, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pdlab.real.api.call_json import BLANK, CallReader

PARSERS = ("hermes", "llama3_json")
HERMES_BEGIN, HERMES_END, PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class CallPiece:
    """News of call number `index`: its `name`, once, before any arguments; then more of their JSON text."""

    index: int
    name: str | None
    arguments: str


@dataclass(slots=True)
class Found:
    """What a piece of text has brought: text that is no call, and news of calls."""

    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)


class CallParser(Protocol):
    def push(self, text: str) -> Found: ...
    def finish(self) -> Found: ...


class _Parser:
    """What the forms have in common: text around calls, without the blanks that stand beside a call."""

    begin = ""  # that says a call follows
    end = ""  # that may stand after one
    hidden = False  # is `begin` no text where no call follows?
    bare = False

    def __init__(self, is_tool: Callable[[str], bool], *, eager: bool) -> None:
        self.is_tool, self.eager = is_tool, eager
        self.index = 0
        self._rest = ""  # not looked at
        self._blank = ""  # held back
        self._after_call = False
        self._reader: CallReader | None = None
        self._read = ""  # by it
        self._told = 0  # of its arguments; -1: not its name either
        self._broken = False  # its arguments are no JSON
        self._fresh = True  # nothing but blanks has come

    def push(self, text: str) -> Found:
        found = Found()
        self._rest += text
        while self._step(found):
            pass
        return _joined(found)

    def finish(self) -> Found:
        found = Found()
        while self._step(found):
            pass
        if self._reader is not None and not self._end_reader(found, "end"):
            while self._step(found):
                pass
            if self._reader is not None:
                self._not_a_call(found)
        if self._broken:
            self._tell(found, self._rest)
        else:
            self._text(found, self._rest)
        self._rest = ""
        if not self._after_call:
            found.content += self._blank
        self._blank = ""
        return _joined(found)

    def _step(self, found: Found) -> bool:
        """Look at some of the rest. False: more must come first."""
        if self._broken:
            return self._in_broken(found)
        if self._reader is not None:
            return self._in_call(found)
        return self._in_text(found)

    # ------------------------------------------------------------ text

    def _in_text(self, found: Found) -> bool:
        if not self._rest:
            return False
        before, there = self._up_to(self.begin)
        self._text(found, before)
        if there:
            self._open()
        return there

    def _up_to(self, mark: str) -> tuple[str, bool]:
        """What comes before the mark, and whether that has come; what may be its beginning waits."""
        at = self._rest.find(mark) if mark else -1
        if at >= 0:
            before, self._rest = self._rest[:at], self._rest[at + len(mark) :]
            return before, True
        split = len(self._rest) - _ending(self._rest, mark)
        before, self._rest = self._rest[:split], self._rest[split:]
        return before, False

    def _text(self, found: Found, text: str) -> None:
        """Blanks wait for what follows."""
        if not text:
            return
        stripped = text.rstrip(BLANK)
        if stripped:
            if self._after_call:
                stripped, self._blank = stripped.lstrip(BLANK), ""
            found.content += self._blank + stripped
            self._blank, self._after_call, self._fresh = "", False, False
            self._blank = text[len(text.rstrip(BLANK)) :]
        else:
            self._blank += text

    # ------------------------------------------------------------ calls

    def _open(self) -> None:
        self._reader = CallReader(self.is_tool, bare=self.bare)
        self._read, self._told = "", -1

    def _in_call(self, found: Found) -> bool:
        reader = self._reader
        assert reader is not None
        for at, c in enumerate(self._rest):
            verdict = reader.feed(c)
            if verdict != "more":
                self._read += self._rest[:at]
                self._rest = self._rest[at:] if verdict == "bad" else self._rest[at + 1 :]
                if verdict == "done":
                    self._read += c
                self._end_reader(found, verdict)
                return True
        self._read += self._rest
        self._rest = ""
        if self.eager and reader.committed:
            self._tell_reader(found)
        return False

    def _end_reader(self, found: Found, verdict: str) -> bool:
        """The object is complete, wrong, or the text is at its end. False: at its end, and no call."""
        reader = self._reader
        assert reader is not None
        if (reader.is_call and verdict == "done") or (reader.name is not None and reader.whole):
            self._tell_reader(found)
            self._call_over()
        elif self.eager and reader.committed:
            self._tell_reader(found)
            self._broken = True
        elif verdict == "end":
            return False
        else:
            self._not_a_call(found)
        return True

    def _call_over(self) -> None:
        self._reader, self._broken = None, False
        self._blank, self._after_call, self._fresh = "", True, False
        self.index += 1

    def _not_a_call(self, found: Found) -> None:
        """It is text, in which another call may begin."""
        self._reader = None
        if not self.hidden:
            self._text(found, self.begin)
        self._rest = self._read + self._rest
        self._read = ""

    def _tell_reader(self, found: Found) -> None:
        reader = self._reader
        assert reader is not None
        arguments = reader.arguments or "{}"
        if self._told < 0:
            self._blank = ""
            found.calls.append(CallPiece(self.index, reader.name, ""))
            self._told = 0
        self._tell(found, arguments[self._told :])
        self._told = len(arguments)

    def _tell(self, found: Found, arguments: str) -> None:
        if arguments:
            found.calls.append(CallPiece(self.index, None, arguments))

    def _in_broken(self, found: Found) -> bool:
        """To the end of the call, as the model has written it."""
        arguments, there = self._up_to(self.end)
        self._tell(found, arguments)
        if there:
            self._call_over()
        return there


class Hermes(_Parser):
    begin, end, bare = HERMES_BEGIN, HERMES_END, True

    def _in_text(self, found: Found) -> bool:
        if self._after_call:
            stripped = self._rest.lstrip(BLANK)
            if stripped.startswith(self.end):
                self._rest = stripped[len(self.end) :]
                return True
            if self.end.startswith(stripped):
                return False  # it may be the call's end
        return super()._in_text(found)


class Llama3(_Parser):
    begin, hidden = PYTHON_TAG, True

    def _in_text(self, found: Found) -> bool:
        stripped = self._rest.lstrip(BLANK)
        if self._after_call and stripped.startswith(";"):
            self._rest, self._fresh = stripped[1:], True
            return True
        if (self._after_call or self._fresh) and not stripped:
            return False
        if self._fresh and stripped.startswith("{"):
            self._blank += self._rest[: len(self._rest) - len(stripped)]
            self._rest, self._fresh = stripped, False
            self._open()
            self._bare_begin = True
            return True
        self._bare_begin = False
        return super()._in_text(found)

    def _not_a_call(self, found: Found) -> None:
        """A brace at the beginning was no call's: it is not looked at again."""
        if self._bare_begin and self._read:
            self._text(found, self._read[0])
            self._read = self._read[1:]
        super()._not_a_call(found)


class Required:
    """A list of calls, by a grammar. Cut off, what has come of a call is a call's only to an eager client."""

    def __init__(self, is_tool: Callable[[str], bool], *, eager: bool) -> None:
        self._inner = _Listed(is_tool, eager=eager)
        self._whole = ""

    def push(self, text: str) -> Found:
        self._whole += text
        return self._inner.push(text)

    def finish(self) -> Found:
        found = self._inner.finish()
        if not self._inner.index and self._inner._told < 0:
            return Found(self._whole)
        return Found("", found.calls)


class _Listed(_Parser):
    """Brackets and commas between the calls are nothing to anybody, nor is what follows a mistake."""

    over = False

    def _in_text(self, found: Found) -> bool:
        if self.over:
            self._rest = ""
            return False
        stripped = self._rest.lstrip(BLANK + "[],")
        self._rest = stripped
        if not stripped:
            return False
        self._open()
        return True

    def _not_a_call(self, found: Found) -> None:
        self._reader, self._rest, self._read, self.over = None, "", "", True


class Named:
    """All of the text are the arguments of one tool."""

    def __init__(self, name: str) -> None:
        self.name: str | None = name

    def push(self, text: str) -> Found:
        if not text:
            return Found()
        found = Found(calls=[CallPiece(0, self.name, text)])
        self.name = None
        return found

    def finish(self) -> Found:
        return Found(calls=[CallPiece(0, self.name, "")] if self.name is not None else [])


def _ending(text: str, tag: str) -> int:
    """How many characters at the text's end the tag may begin with."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)


def _joined(found: Found) -> Found:
    """One piece a call."""
    joined: dict[int, CallPiece] = {}
    for piece in found.calls:
        before = joined.get(piece.index, CallPiece(piece.index, None, ""))
        joined[piece.index] = CallPiece(piece.index, before.name or piece.name, before.arguments + piece.arguments)
    return Found(found.content, list(joined.values()))
