"""Latency predictors that policies use: fitted to an instance's own profile, and corrected by the steps that its reports tell of.

With a profile the fit keeps its shape, and one factor follows what steps take beyond it: a slowed accelerator, a busy machine. Deviations
within `NOISE` are none of its business. Without a profile the steps themselves are what is fitted, the last of each size. Both extrapolate
and never fail; of an instance of which nothing is known at all they say 0.0, and note in `blind` that they were asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log

import numpy as np

from pdlab.core.types import StepTime

NOISE = 0.05  # of the logarithm of a step's seconds over those predicted
GAIN, FIRST_GAINS = 0.2, 3.0  # of a step in the factor: 1 / (steps + FIRST_GAINS) at first
MOST = 1.5  # of that logarithm, which one step may differ by from those before it
SHARE = 0.3  # of a step in what is known of its size
ENOUGH_POINTS = 4  # for a fit of its full form
RIDGE = 0.1  # how strongly a fit to fewer is drawn to the simplest
Float = np.dtype[np.float64]
Points = np.ndarray[tuple[int, ...], Float]
KEPT_STEPS = 256  # after so many others a size's steps are forgotten


class Correction:
    """Follows how much longer steps take than a profile says: `factor` times."""

    __slots__ = ("_logarithm", "_steps", "factor")

    def __init__(self) -> None:
        self.factor = 1.0
        self._logarithm = 0.0
        self._steps = 0

    def learn(self, seconds: float, profile_s: float) -> None:
        if seconds <= 0.0 or profile_s <= 0.0:
            return
        self._steps += 1
        beyond = log(seconds / profile_s) - self._logarithm
        if not -MOST <= beyond <= MOST:
            beyond = MOST if beyond > 0.0 else -MOST
        first_gain = 1.0 / (self._steps + FIRST_GAINS)
        self._logarithm += beyond * (first_gain if first_gain > GAIN else GAIN)
        if self._logarithm > NOISE:
            self.factor = exp(self._logarithm - NOISE)
        elif self._logarithm < -NOISE:
            self.factor = exp(self._logarithm + NOISE)
        else:
            self.factor = 1.0


class Sizes:
    """Steps seen, one mean for each size (a power of two): what stands in for a profile that nobody has measured."""

    __slots__ = ("_count", "points", "seen")

    def __init__(self) -> None:
        self.points: dict[tuple[int, int], tuple[float, float, float]] = {}  # (x, y, seconds) by the sizes of x and y
        self.seen: dict[tuple[int, int], int] = {}
        self._count = 0

    def add(self, x: int, y: int, seconds: float) -> None:
        size = (x.bit_length(), y.bit_length())
        known = self.points.get(size)
        if known is None:
            self.points[size] = (float(x), float(y), seconds)
        else:
            rest = 1.0 - SHARE
            self.points[size] = (rest * known[0] + SHARE * x, rest * known[1] + SHARE * y, rest * known[2] + SHARE * seconds)
        self._count += 1
        self.seen[size] = self._count
        for old in [size for size, at in self.seen.items() if at <= self._count - KEPT_STEPS]:
            del self.points[old], self.seen[old]

    def columns(self) -> Points:
        return np.array(list(self.points.values()), float)


class StepPredictor:
    """Three coefficients, a + b x + c y, `known` once they were fitted, to a profile or to the sizes of steps that were seen. `blind`
    gathers the names of those that were asked before."""

    __slots__ = ("_name", "_sizes", "a", "b", "blind", "c", "correction", "known")

    def __init__(self, known: bool, name: str, blind: set[str] | None) -> None:
        self.a = self.b = self.c = 0.0
        self.known = known
        self.correction = Correction()
        self.blind: set[str] = set() if blind is None else blind
        self._name = name
        self._sizes: Sizes | None = None if known else Sizes()


class PrefillPredictor(StepPredictor):
    """TTFT(L) = a + b L + c L^2, seconds, by least squares. Source: xllm-service's TimePredictor (the model, not the code)."""

    __slots__ = ()

    def __init__(self, profile: Sequence[tuple[int, float]], name: str = "", blind: set[str] | None = None) -> None:
        super().__init__(bool(profile), name, blind)
        if profile:
            self._fit(np.array(profile, float))

    def seconds(self, tokens: float) -> float:
        if not self.known:
            self.blind.add(self._name)
            return 0.0
        seconds = self.a + self.b * tokens + self.c * tokens * tokens
        return self.correction.factor * seconds if seconds > 0.0 else 0.0

    def step_s(self, step: StepTime) -> float:
        """Predicted for a step of prompts alone, several of them, or chunks after others."""
        return self.correction.factor * max(0.0, self.a + self.b * step.prompt_tokens + self.c * step.squared_tokens)

    def learn(self, tokens: int, squared_tokens: int, seconds: float) -> None:
        """A step that computed so many prompt tokens took so long; `squared_tokens` as in a StepTime."""
        if self._sizes is None:
            self.correction.learn(seconds, self.a + self.b * tokens + self.c * squared_tokens)
            return
        self._sizes.add(tokens, 0, seconds)
        self._fit(self._sizes.columns()[:, [0, 2]])
        self.known = True

    def _fit(self, points: Points) -> None:
        """To rows of (tokens, seconds). Few are taken for proportional, as far as they do not say otherwise."""
        tokens, seconds = points[:, 0], points[:, 1]
        columns = np.stack([np.ones_like(tokens), tokens, tokens**2], axis=1)
        few = len(points) < ENOUGH_POINTS
        ridge = np.array([RIDGE if few else 0.0, 0.0, 0.0]) / seconds.mean()
        solution = [0.0]
        for terms in (2, 1) if few else (3, 2, 1):  # a falling slope is noise, and would make the longest queues look empty
            solution = _fit(columns[:, :terms], seconds, ridge[:terms])
            if all(x >= 0.0 for x in solution[1:]):
                break
        self.a, self.b, self.c = (*solution, 0.0, 0.0)[:3]


class DecodePredictor(StepPredictor):
    """TPOT(batch, context) = a + b batch + c context, seconds, context being the KV tokens of the whole batch."""

    __slots__ = ()

    def __init__(self, profile: Sequence[tuple[int, int, float]], name: str = "", blind: set[str] | None = None) -> None:
        super().__init__(bool(profile), name, blind)
        if profile:
            self._fit(np.array(profile, float))

    def seconds(self, batch: int, context_tokens: int) -> float:
        if not self.known:
            self.blind.add(self._name)
            return 0.0
        return self.correction.factor * max(0.0, self.a + self.b * batch + self.c * context_tokens)

    def share_s(self, batch: int, context_tokens: int) -> float:
        """What so many decodes add to a step that is taken anyway, as beside a prompt."""
        return self.correction.factor * max(0.0, self.b * batch + self.c * context_tokens)

    def learn(self, batch: int, context_tokens: int, seconds: float) -> None:
        """A decode step took so long."""
        if self._sizes is None:
            self.correction.learn(seconds, self.a + self.b * batch + self.c * context_tokens)
            return
        self._sizes.add(batch, context_tokens, seconds)
        self._fit(self._sizes.columns())
        self.known = True

    def _fit(self, points: Points) -> None:
        """To rows of (batch, context tokens in all, seconds). Few are taken for alike, as far as they do not say otherwise."""
        columns = np.stack([np.ones(len(points)), points[:, 0], points[:, 1]], axis=1)
        if len(points) >= ENOUGH_POINTS:
            self.a, self.b, self.c = _fit(columns, points[:, 2], np.zeros(3))
            if self.b >= 0.0 and self.c >= 0.0:
                return
        mean = points.mean(axis=0)
        a, b, c = _fit(columns, points[:, 2], RIDGE * np.array([0.0, mean[0], mean[1]]) / mean[2])
        self.b, self.c = max(0.0, b), max(0.0, c)
        self.a = a if b >= 0.0 and c >= 0.0 else max(0.0, float(mean[2] - self.b * mean[0] - self.c * mean[1]))


def _fit(columns: Points, seconds: Points, ridge: Points) -> list[float]:
    """Least squares of relative errors: short steps count as much as long ones. `ridge` draws coefficients to 0, each by so much."""
    weights = 1.0 / np.maximum(seconds, 1e-9)
    rows = np.concatenate([columns * weights[:, None], np.diag(ridge)])
    wanted = np.concatenate([seconds * weights, np.zeros(len(ridge))])
    return [float(x) for x in np.linalg.lstsq(rows, wanted, rcond=None)[0]]


def learn(prefill: PrefillPredictor, decode: DecodePredictor, step: StepTime) -> None:
    """Correct both predictors of an instance by one of its steps. Beside prompts, what decodes add is taken off."""
    if not step.prompt_tokens:
        decode.learn(step.batch, step.context_tokens, step.seconds)
        return
    seconds = step.seconds - decode.share_s(step.batch, step.context_tokens) if step.batch else step.seconds
    if seconds > step.seconds / 2:  # else its own part is too small to be told apart
        prefill.learn(step.prompt_tokens, step.squared_tokens, seconds)
