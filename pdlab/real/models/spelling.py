"""How the tokens of a vocabulary spell text: as bytes, or as text in which characters stand for others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from pdlab.core.types import UsageError


@dataclass(frozen=True, slots=True)
class Spelling:
    """How tokens spell text. Byte-level: each character of a token stands for a byte. Else tokens are text in which `replaced`
    characters stand for others, and <0xNN> a byte; `strip` spaces are taken from the beginning of the whole, or, `bare_start`, all of
    the first token."""

    byte_level: bool
    replaced: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip: int = 0
    bare_start: bool = False

    def bytes_of(self, token: str) -> bytes:
        """UTF-8."""
        if self.byte_level:
            return bytes(BYTES[c] for c in token) if all(c in BYTES for c in token) else token.encode()
        if self.byte_fallback and (byte := byte_of(token)) is not None:
            return bytes((byte,))
        for old, new in self.replaced:
            token = token.replace(old, new)
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for those from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_alphabet()


def byte_of(token: str) -> int | None:
    """A token <0xNN>'s."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def spelling_of(backend: Backend, source: Path) -> Spelling:
    """From the decoder's steps. Raises UsageError where they are not those of a byte-level or a SentencePiece vocabulary."""
    state: Any = backend.decoder.__getstate__() if backend.decoder is not None else '{"type": "none"}'
    outer = json.loads(state)
    steps: list[dict[str, Any]] = outer["decoders"] if outer["type"] == "Sequence" else [outer]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Spelling(True)
    if kinds == ["Metaspace"]:
        return Spelling(False, ((steps[0]["replacement"], " "),), bare_start=steps[0].get("prepend_scheme", "always") != "never")
    order = [
        ("Replace", "ByteFallback", "Fuse", "Strip").index(kind) if kind in ("Replace", "ByteFallback", "Fuse", "Strip") else -1
        for kind in kinds
    ]
    strips = [step for step in steps if step["type"] == "Strip"]
    patterns = [step["pattern"].get("String") for step in steps if step["type"] == "Replace"]
    fit = -1 not in order and all(a < b or a == b == 0 for a, b in pairwise(order)) and None not in patterns
    if not fit or any(step["content"] != " " or step["stop"] or "Fuse" not in kinds for step in strips):
        raise UsageError(
            f"model {source}: its tokenizer's decoder {' + '.join(kinds)} is not supported, only ByteLevel and SentencePiece's"
        )
    replaced = tuple((step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace")
    return Spelling(False, replaced, "ByteFallback" in kinds, sum(step["start"] for step in strips))
