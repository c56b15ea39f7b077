"""How many tokens a file's prefix ids stand for each, held against the lengths of its prompts.

A prompt of L tokens has ceil(L / unit) ids, of which the last may be of a part, or floor(L / unit), whole ones only. Each row so leaves
a range of units that it allows. Mooncake's 512 is taken while all rows allow it, else the one power of two that they leave, first of
those with parts; or the one number. A row that leaves none contradicts those before.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdlab.core.types import UsageError
from pdlab.workload.text import TextFile

USUAL = 512
_MOST = 1 << 30


@dataclass(slots=True)
class _Range:
    least: int = 1
    most: int = _MOST

    def narrow(self, least: int, most: int) -> None:
        self.least, self.most = max(self.least, least), min(self.most, most)

    def __contains__(self, unit: int) -> bool:
        return self.least <= unit <= self.most


class HashUnit:
    """`stated`: by the user or the format, else it is inferred. `fewer`: prompts may have ids for their beginning only."""

    def __init__(self, file: TextFile, column: str, stated: int | None, *, fewer: bool = False) -> None:
        self.stated = stated
        self.rows = 0  # with ids
        self._file, self._column, self._fewer = file, column, fewer
        self._begun, self._whole = _Range(), _Range()

    def see(self, prompt_tokens: int, ids: int) -> None:
        """A row with so many ids. Raises UsageError, which names it, where they can't be."""
        if not ids or not prompt_tokens:
            return
        self.rows += 1
        if self.stated is not None:
            least = 0 if self._fewer else prompt_tokens // self.stated
            if not least <= ids <= -(-prompt_tokens // self.stated):
                raise self._contradiction(prompt_tokens, ids, f"{self.stated} tokens each")
            return
        before = [(allowed.least, allowed.most) for allowed in (self._begun, self._whole)]
        self._begun.narrow(-(-prompt_tokens // ids), (prompt_tokens - 1) // (ids - 1) if ids > 1 else _MOST)
        self._whole.narrow(prompt_tokens // (ids + 1) + 1, prompt_tokens // ids)
        if self._begun.least > self._begun.most and self._whole.least > self._whole.most:
            self._begun, self._whole = (_Range(*limits) for limits in before)
            unit = self._unit() if self.rows > 1 else None
            others = f"{unit} tokens each, as the rows above" if unit else "any number of tokens"
            raise self._contradiction(prompt_tokens, ids, others)

    def _contradiction(self, prompt_tokens: int, ids: int, unit: str) -> UsageError:
        return self._file.wrong(
            f"{ids} ids for {prompt_tokens:,} tokens do not go with {unit}; hash_tokens says what an id stands for", self._column
        )

    def _unit(self) -> int | None:
        for allowed in (self._begun, self._whole):
            if USUAL in allowed:
                return USUAL
        for allowed in (self._begun, self._whole):
            powers = [1 << n for n in range(31) if 1 << n in allowed]
            if powers:
                return powers[0] if len(powers) == 1 else None
        ranges = [allowed for allowed in (self._begun, self._whole) if allowed.least <= allowed.most]
        sole = {unit for allowed in ranges for unit in (allowed.least, allowed.most)}
        return sole.pop() if len(sole) == 1 else None

    @property
    def tokens(self) -> int:
        """The unit, once all rows were seen. Raises UsageError where they leave several."""
        unit = self.stated or self._unit()
        if unit is None:
            ranges = [f"{r.least} to {r.most if r.most < _MOST else 'any number'}" for r in (self._begun, self._whole) if r.least <= r.most]
            raise UsageError(
                f"{self._file.path}: column {self._column}: an id may stand for {' or '.join(ranges)} tokens; hash_tokens says which"
            )
        return unit

    @property
    def like_mooncake(self) -> bool:
        """Whether each row seen had one id for each 512 tokens or begun 512."""
        return USUAL in self._begun
