"""Prompts as token ids, made of a workload's lengths and prefix hashes, so that an engine shares exactly what the simulator shares.

A hash names a unit of `hash_tokens` tokens, and always gives the same ones; what has no name is the request's own. Where a conversation's
later turn repeats an answer, the ids that the server really gave take the place of made-up ones: only those are in its cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdlab.core.types import UsageError
from pdlab.workload.base import Workload

LOW, HIGH = 1000, 30_000  # below are bytes and specials in many vocabularies
_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
Words = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """The token ids that prompts are made of: from `low` up to, not including, `high`."""

    low: int = LOW
    high: int = HIGH

    @classmethod
    def of(cls, size: int) -> PromptTokens:
        """The usual ids, cut to a vocabulary of `size`; of a tiny one nearly all."""
        if size < 8:
            raise UsageError(f"--vocab {size}: a vocabulary has at least 8 tokens")
        return cls(min(LOW, size // 4), min(HIGH, size))


class Prompts:
    """The prompts of a workload; equal seeds give equal ones, in whatever order they are asked for (but for answers that come back)."""

    def __init__(self, workload: Workload, seed: int, vocabulary: PromptTokens) -> None:
        self.workload, self.vocabulary = workload, vocabulary
        self._named, self._own = _mixed(np.array([2 * seed & _WORD, (2 * seed + 1) & _WORD], np.uint64))
        self._steps = np.arange(workload.hash_tokens, dtype=np.uint64) * np.uint64(_GOLDEN)
        self._answers: dict[int, NDArray[np.uint64]] = {}
        self._sent: set[int] = set()

    def tokens(self, index: int) -> list[int]:
        """The prompt of request `index`."""
        workload = self.workload
        length, unit_tokens = int(workload.prompt_tokens[index]), workload.hash_tokens
        units = -(-length // unit_tokens)
        chain = () if workload.hashes is None else workload.hashes[index][:units]
        keys = np.arange(units, dtype=np.uint64) + np.uint64(index << 32)
        keys ^= self._own
        keys[: len(chain)] = np.array([name & _WORD for name in chain], np.uint64) ^ self._named
        span = np.uint64(self.vocabulary.high - self.vocabulary.low)
        blocks = _mixed(_mixed(keys)[:, None] + self._steps) % span + np.uint64(self.vocabulary.low)
        if self._answers:
            for unit, name in enumerate(chain):
                if (answer := self._answers.get(name)) is not None:
                    blocks[unit] = answer
        self._sent.update(chain[: length // unit_tokens])
        tokens: list[int] = blocks.ravel()[:length].tolist()
        return tokens

    def answered(self, index: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Remember what the server said, for prompts that repeat it. A unit that was already sent keeps the tokens it had."""
        if self.workload.hashes is None:
            return
        unit_tokens, context = self.workload.hash_tokens, [*prompt, *output]
        chain = self.workload.hashes[index]
        for unit in range(len(prompt) // unit_tokens, min(len(chain), len(context) // unit_tokens)):
            if chain[unit] not in self._sent:
                self._answers[chain[unit]] = np.array(context[unit * unit_tokens : (unit + 1) * unit_tokens], np.uint64)


def _mixed(words: Words) -> Words:
    """Scattered over 64 bits. Source: splitmix64, Steele et al. 2014."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: Words = words ^ (words >> np.uint64(31))
    return found
