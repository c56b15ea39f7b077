"""Token ids to text as they come, and the strings that end it. Both hold back only what later tokens could still change."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from pdlab.core.types import UsageError
from pdlab.real.models.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class Detokenizer:
    """All that `push` and then `finish` return, joined, is `tokenizer.decode` of all ids.

    `continues` means that the text follows a prompt, so that SentencePiece's space before the first word is kept. One difference is
    meant: in a run of <0xNN> tokens that is not all UTF-8, `decode` shows every byte as U+FFFD; here the characters before the first wrong
    byte had been shown already.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special: bool = True, *, continues: bool = False, kept: frozenset[int] = frozenset()
    ) -> None:
        """`kept` special tokens are text, nevertheless."""
        spelling = tokenizer.spelling
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - kept if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace" if spelling.byte_level else "strict")
        self._run = 0  # bytes held back
        self._broken = False  # this run of bytes is not UTF-8
        self._strip = 0 if continues else spelling.strip
        self._bare = spelling.bare_start and not continues

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        tokenizer = self._tokenizer
        ids = [id for id in token_ids if id not in self._skipped]
        if tokenizer.spelling.byte_level:
            return self._utf8.decode(b"".join([tokenizer.piece_bytes(id) for id in ids]))
        return self._stripped("".join([self._byte(id) if tokenizer.is_byte(id) else self._text(id) for id in ids]))

    def finish(self) -> str:
        """What is left: bytes that never became a character."""
        if self._tokenizer.spelling.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._stripped(self._end_run())

    def _byte(self, id: int) -> str:
        if self._broken:
            return REPLACEMENT
        self._run += 1
        try:
            text = self._utf8.decode(self._tokenizer.piece_bytes(id))
        except UnicodeDecodeError:
            self._broken = True
            return REPLACEMENT * self._run
        if text:
            self._run = 0
        return text

    def _end_run(self) -> str:
        held = 0 if self._broken else self._run
        self._run, self._broken = 0, False
        self._utf8.reset()
        return REPLACEMENT * held

    def _text(self, id: int) -> str:
        text = self._tokenizer.piece(id)
        if self._bare and text:
            text, self._bare = text.replace(" ", ""), False
        return self._end_run() + text

    def _stripped(self, text: str) -> str:
        spaces = min(len(text) - len(text.lstrip(" ")), self._strip)
        kept = text[spaces:]
        self._strip = 0 if kept else self._strip - spaces
        return kept


class StopStrings:
    """The stop string that is complete first ends the text; of those complete at once, the longest. However the text is cut into pushes.

    Knuth, Morris, Pratt: `_at[i]` is how many characters of stop string i the text now ends with."""

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        """`include` keeps the stop string in the text."""
        if "" in stops:
            raise UsageError("stop: an empty string would end every text at once; leave it out")
        self.matched: str | None = None
        self._stops = stops
        self._include = include
        self._fallbacks = [_fallbacks(stop) for stop in stops]
        self._at = [0] * len(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(what can be shown now, whether a stop string ended the text). After the end, nothing more."""
        if self.matched is not None:
            return "", True
        if not self._stops:
            return text, False
        whole = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            if stop := self._step(character):
                self.matched, self._held = stop, ""
                return whole[: end if self._include else end - len(stop)], True
        shown = len(whole) - max(self._at)
        self._held = whole[shown:]
        return whole[:shown], False

    def finish(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str:
        """The longest stop string that is complete with this character, or an empty one."""
        longest = ""
        for index, (stop, fallback) in enumerate(zip(self._stops, self._fallbacks, strict=True)):
            at = self._at[index]
            while at and stop[at] != character:
                at = fallback[at - 1]
            at += stop[at] == character
            self._at[index] = at
            if at == len(stop) > len(longest):
                longest = stop
        return longest


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`, how long its longest ending is that `stop` begins with."""
    found, at = [0], 0
    for character in stop[1:]:
        while at and stop[at] != character:
            at = found[at - 1]
        at += stop[at] == character
        found.append(at)
    return found
