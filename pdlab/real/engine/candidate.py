"""One sequence of a request at the engine."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import Any

from pdlab.core.sequence import Sequence
from pdlab.real.engine.messages import Scored, Submit, Tokens
from pdlab.real.engine.sampler import SamplerRow


@dataclass(slots=True, eq=False)
class Candidate:
    """One sequence of a request: its prompt and output tokens, and the ids of its KV blocks. `scores` are those of its prompt's tokens so
    far, where they are asked for and not told yet."""

    submit: Submit
    index: int
    tokens: list[int]
    row: SamplerRow
    seq: Sequence
    submitted_s: float
    table: abc.Sequence[int] = ()
    admitted_s: float = -1.0
    scores: list[Scored] | None = None
    held: Tokens | None = None  # its first token, while its KV waits for whoever decodes it
    drafting: Any = None  # what its drafter remembers of it

    @property
    def id(self) -> int:
        return self.submit.id

    @property
    def left(self) -> int:
        """Tokens that it may still make."""
        return self.submit.sampling.max_tokens - self.row.made
