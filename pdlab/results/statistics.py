"""What several seeds say of a figure: its mean, and the 95 % interval about it, by Student's t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

# The quantile 0.975 of Student's t, by degrees of freedom from 1; beyond the table, Cornish and Fisher's expansion about the normal's.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)
_NORMAL = 1.959964


@dataclass(frozen=True, slots=True)
class MeanInterval:
    """`half` is half the interval's width; None where one value tells nothing of it."""

    mean: float
    half: float | None


def student_t(freedom: int) -> float:
    """How many standard errors to each side hold 95 %."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def mean_interval(values: Sequence[float]) -> MeanInterval | None:
    """None where there are no values."""
    if not values:
        return None
    if len(values) == 1:
        return MeanInterval(values[0], None)
    return MeanInterval(fmean(values), student_t(len(values) - 1) * stdev(values) / sqrt(len(values)))


def paired_difference(own: Mapping[int, float], other: Mapping[int, float]) -> MeanInterval | None:
    """Of two experiments' figures by seed, the first less the second over the seeds of both: the arrivals and lengths that they share
    cancel out."""
    return mean_interval([own[seed] - other[seed] for seed in own if seed in other])
