"""Step times as DistServe fits them: prefill a + b * sum(len) + c * sum(len^2), decode a + b * sum(context) + c * batch, with two decode
regimes, the larger from `large_batch` sequences on.

A chunk of n tokens after c in KV costs the difference of squares, n^2 + 2 n c. A mixed step is a prefill step whose weights the decodes
share: the decodes add what grows with context and batch, and it is never quicker than the decodes alone. The shipped profiles
(`fitted.json`: seconds; each by tp) are the coefficients DistServe publishes for OPT on A100-80GB, its own engine's and vLLM's.
Sources: Zhong et al., DistServe (OSDI'24) §4; LLMServe/DistServe@82831f1, profiler-a100-80g (there in milliseconds).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from importlib import resources
from math import inf

from pydantic import BaseModel, ConfigDict, Field

from pdlab.core.types import UsageError
from pdlab.cost.base import Cost


class PrefillFit(BaseModel):
    """Seconds: base_s + s_per_token * tokens + s_per_token2 * tokens^2."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_s: float
    s_per_token: float = Field(ge=0.0)
    s_per_token2: float = 0.0


class DecodeFit(BaseModel):
    """Seconds: base_s + s_per_token * context tokens in all + s_per_sequence * batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_s: float
    s_per_token: float = Field(ge=0.0)
    s_per_sequence: float = 0.0


class FittedCoefficients(BaseModel):
    """DistServe's form, in seconds. `large` holds from `large_batch` sequences on; without it `decode` always does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: PrefillFit
    decode: DecodeFit
    large: DecodeFit | None = None
    large_batch: int = Field(default=95, ge=1)


@cache
def shipped_fits() -> dict[str, dict[int, FittedCoefficients]]:
    """The shipped profiles: name -> tp -> coefficients."""
    raw = json.loads(resources.files("pdlab.cost").joinpath("fitted.json").read_text(encoding="utf-8"))
    return {name: {int(tp): FittedCoefficients(**values) for tp, values in by_tp.items()} for name, by_tp in raw["profiles"].items()}


def shipped_fit(name: str, tp: int) -> FittedCoefficients:
    """A shipped profile's coefficients at this tp. Raises UsageError naming what there is."""
    known = shipped_fits()
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.0)
        raise UsageError(f"unknown fitted profile {name!r}: nearest are {', '.join(near)}")
    if tp not in known[name]:
        raise UsageError(f"fitted profile {name!r} has no tp {tp}: choose one of {', '.join(map(str, known[name]))}")
    return known[name][tp]


class Fitted(Cost):
    """The cost these coefficients give; no step takes less than nothing."""

    def __init__(self, fit: FittedCoefficients) -> None:
        prefill, small, large = fit.prefill, fit.decode, fit.large or fit.decode
        self._prefill = (prefill.base_s, prefill.s_per_token, prefill.s_per_token2)
        self._small = (small.base_s, small.s_per_token, small.s_per_sequence)
        self._large = (large.base_s, large.s_per_token, large.s_per_sequence)
        self._large_batch = fit.large_batch

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        base_s, linear, square = self._prefill
        total_s = base_s
        for new, context in chunks:
            total_s += new * (linear + square * (new + 2 * context))
        return total_s if total_s > 0.0 else 0.0

    def decode_line(self, batch: int, context_tokens: int) -> tuple[float, float, float]:
        base_s, s_per_token, s_per_sequence = self._small if batch < self._large_batch else self._large
        return base_s + s_per_sequence * batch, s_per_token, inf

    def mixed_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        base_s, s_per_token, s_per_sequence = self._small if batch < self._large_batch else self._large
        added_s = s_per_token * context_tokens + s_per_sequence * batch
        return max(base_s + added_s, self.prefill_s(chunks) + added_s)
