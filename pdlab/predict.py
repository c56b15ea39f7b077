"""Latency predictors that policies use, fitted to an instance's own profile. They extrapolate and never fail: without a profile
they say 0.0, so that every instance looks alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class PrefillPredictor:
    """TTFT(L) = a + b L + c L^2, seconds, by least squares. Source: xllm-service's TimePredictor (the model, not the code)."""

    __slots__ = ("a", "b", "c")

    def __init__(self, profile: Sequence[tuple[int, float]]) -> None:
        self.a = self.b = self.c = 0.0
        if profile:
            tokens, seconds = np.array([p[0] for p in profile], float), np.array([p[1] for p in profile], float)
            columns = np.stack([np.ones_like(tokens), tokens, tokens**2], axis=1)
            weights = 1.0 / np.maximum(seconds, 1e-9)  # relative error: short prompts count as much as long ones
            for terms in (3, 2, 1):  # a falling slope is noise, and would make the longest queues look empty
                solution = np.linalg.lstsq(columns[:, :terms] * weights[:, None], seconds * weights, rcond=None)[0]
                if all(x >= 0.0 for x in solution[1:]):
                    break
            self.a, self.b, self.c = (*(float(x) for x in solution), 0.0, 0.0)[:3]

    def seconds(self, tokens: float) -> float:
        return max(0.0, self.a + self.b * tokens + self.c * tokens * tokens)


class DecodePredictor:
    """TPOT(batch, context) = a + b batch + c context, seconds, context being the KV tokens of the whole batch."""

    __slots__ = ("a", "b", "c")

    def __init__(self, profile: Sequence[tuple[int, int, float]]) -> None:
        self.a = self.b = self.c = 0.0
        if profile:
            points = np.array(profile, float)
            columns = np.stack([np.ones(len(points)), points[:, 0], points[:, 1]], axis=1)
            weights = 1.0 / np.maximum(points[:, 2], 1e-9)
            solution = np.linalg.lstsq(columns * weights[:, None], points[:, 2] * weights, rcond=None)[0]
            self.a, self.b, self.c = (float(x) for x in solution)

    def seconds(self, batch: int, context_tokens: int) -> float:
        return max(0.0, self.a + self.b * batch + self.c * context_tokens)
