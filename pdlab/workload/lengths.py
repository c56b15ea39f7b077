"""Distributions of prompt and output lengths, in tokens, as an experiment file names them.

prompt: 1024
prompt: {uniform: [100, 2000]}
prompt: {lognormal: {median: 1000, cv: 1.0, max: 8192}}
output: {empirical: [[0.0, 1], [0.5, 129], [0.9, 424], [1.0, 1000]]}      # (quantile, tokens), interpolated
output: {empirical: lengths.txt}                                          # a file of lengths, one a line (.gz, .zst)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

from pdlab.core.strict import Strict
from pdlab.core.types import UsageError
from pdlab.workload.text import TextFile

MOST = 1 << 24  # tokens; far beyond any model's context, and sums of a few stay within 32 bits
Tokens = Annotated[int, Field(ge=1, le=MOST)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Lognormal(Strict):
    """Give the median or the mean, and cv or sigma (of the logarithm)."""

    median: Positive | None = None
    mean: Positive | None = None
    cv: Positive | None = None
    sigma: Positive | None = None
    max: Tokens | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.median is None) == (self.mean is None):
            raise ValueError("lognormal needs either median or mean")
        if (self.cv is None) == (self.sigma is None):
            raise ValueError("lognormal needs either cv or sigma")
        return self

    def parameters(self) -> tuple[float, float]:
        """(mu, sigma) of the logarithm."""
        sigma = self.sigma if self.sigma is not None else math.sqrt(math.log1p((self.cv or 0.0) ** 2))
        mu = math.log(self.median) if self.median is not None else math.log(self.mean or 1.0) - sigma**2 / 2
        return mu, sigma


class Distribution(Strict):
    """One of constant, for which a number alone stands, uniform, lognormal, empirical."""

    constant: Tokens | None = None
    uniform: tuple[Tokens, Tokens] | None = None
    lognormal: Lognormal | None = None
    empirical: tuple[tuple[float, float], ...] | str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"lengths are a number, or one of uniform, lognormal, empirical, not {' and '.join(given) or 'none'}")
        if self.uniform is not None and self.uniform[0] > self.uniform[1]:
            raise ValueError(f"uniform [{self.uniform[0]}, {self.uniform[1]}] ends before it begins")
        if isinstance(self.empirical, tuple):
            quantiles = [q for q, _ in self.empirical]
            values = [v for _, v in self.empirical]
            ascend = sorted(quantiles) == quantiles and sorted(values) == values
            if len(quantiles) < 2 or quantiles[0] != 0 or quantiles[-1] != 1 or not ascend or not 1 <= values[0] <= values[-1] <= MOST:
                raise ValueError("empirical needs (quantile, tokens) pairs ascending from quantile 0 to 1, of 1 token and more")
        return self


def _named(value: object) -> object:
    return value if value is None or isinstance(value, dict | Distribution) else {"constant": value}


Lengths = Annotated[Distribution | None, BeforeValidator(_named)]


def read(lengths: Distribution | None, base_dir: Path) -> Distribution | None:
    """The same, with a file of lengths replaced by its quantiles. Raises UsageError naming file and line."""
    if lengths is None or not isinstance(lengths.empirical, str):
        return lengths
    with TextFile(base_dir / lengths.empirical) as file:
        values = [_length(file, line) for line in file if line.strip() and not line.startswith("#")]
    if not values:
        raise UsageError(f"{file.path}: no lengths in it; it needs a number of tokens on each line")
    levels = np.linspace(0.0, 1.0, min(max(len(values), 2), 2001))
    return Distribution(empirical=tuple(zip(levels.tolist(), np.quantile(values, levels).tolist(), strict=True)))


def _length(file: TextFile, line: str) -> int:
    try:
        tokens = int(line)
    except ValueError:
        raise file.wrong(f"{line.strip()[:40]!r} is not a whole number of tokens") from None
    if not 1 <= tokens <= MOST:
        raise file.wrong(f"{tokens} tokens; must be from 1 to {MOST}")
    return tokens


def draw(lengths: Distribution, uniform: NDArray[np.float64]) -> NDArray[np.int32]:
    """Lengths at the given quantiles, [n] in (0, 1): at least 1 token each."""
    if lengths.constant is not None:
        return np.full(len(uniform), lengths.constant, np.int32)
    if lengths.uniform is not None:
        low, high = lengths.uniform
        values = low + np.floor(uniform * (high - low + 1))
    elif lengths.lognormal is not None:
        mu, sigma = lengths.lognormal.parameters()
        values = np.exp(mu + sigma * normal_quantile(uniform))
        if lengths.lognormal.max is not None:
            values = np.minimum(values, lengths.lognormal.max)
    else:
        assert isinstance(lengths.empirical, tuple), "read() replaces a file by its quantiles"
        table = np.array(lengths.empirical)
        values = np.interp(uniform, table[:, 0], table[:, 1])
    rounded: NDArray[np.int32] = np.clip(np.rint(values), 1, MOST).astype(np.int32)
    return rounded


def normal_quantile(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """The standard normal's inverse distribution function, within 5e-9 relative. Source: Acklam's rational approximation."""
    a = (-3.969683028665376e01, 2.209460984245205e02, -2.759285104469687e02, 1.383577518672690e02, -3.066479806614716e01, 2.506628277459239)
    b = (-5.447609879822406e01, 1.615858368580409e02, -1.556989798598866e02, 6.680131188771972e01, -1.328068155288572e01, 1.0)
    c = (-7.784894002430293e-03, -3.223964580411365e-01, -2.400758277161838, -2.549732539343734, 4.374664141464968, 2.938163982698783)
    d = (7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996, 3.754408661907416, 1.0)
    p = np.clip(p, 1e-300, 1 - 1e-16)
    q = p - 0.5
    r = q * q
    middle = np.polyval(a, r) * q / np.polyval(b, r)
    tail = np.sqrt(-2 * np.log(np.minimum(p, 1 - p)))
    outer = np.polyval(c, tail) / np.polyval(d, tail)
    return np.where(np.abs(q) <= 0.47575, middle, np.where(q < 0, outer, -outer))
