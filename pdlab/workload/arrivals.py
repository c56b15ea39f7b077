"""Arrival processes: when requests come.

    arrival: poisson
    arrival: {process: gamma, cv: 2}                                     # renewal; the coefficient of variation of the gaps
    arrival: constant
    arrival: {process: ramp, to_rate: 20, over_s: 300}                   # from `rate`, linearly, and on at `to_rate`
    arrival: {process: step, at_s: [60, 120], rates: [12, 4]}            # `rate` first, then each from its time on
    arrival: {process: day, amplitude: 0.6, period_s: 86400}             # rate (1 + amplitude sin(2 pi t / period))
    arrival: {process: closed, concurrency: 32}                          # the next one comes when one has ended

Processes with a changing rate are Poisson in operational time: unit-rate arrivals mapped through the inverse of the cumulative rate.
`cv` may be given to any of them and makes the unit-rate gaps Gamma instead.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pdlab.core.strict import Strict

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Floats = NDArray[np.float64]

_NEEDS = {"gamma": ("cv",), "ramp": ("to_rate", "over_s"), "step": ("at_s", "rates"), "day": ("amplitude",), "closed": ("concurrency",)}
_TAKES = {"ramp": ("cv",), "step": ("cv",), "day": ("cv", "period_s")}


class Arrival(Strict):
    """See the head of this file."""

    process: Literal["poisson", "gamma", "constant", "ramp", "step", "day", "closed"] = "poisson"
    cv: Positive | None = None
    to_rate: Positive | None = None
    over_s: Positive | None = None
    at_s: tuple[Positive, ...] | None = None
    rates: tuple[Positive, ...] | None = None
    amplitude: Annotated[float, Field(gt=0, lt=1)] | None = None
    period_s: Positive | None = None
    concurrency: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needs = _NEEDS.get(self.process, ())
        for key in needs:
            if getattr(self, key) is None:
                raise ValueError(f"arrival process {self.process} needs {key}")
        for key in type(self).model_fields:
            if key != "process" and getattr(self, key) is not None and key not in (*needs, *_TAKES.get(self.process, ())):
                raise ValueError(f"arrival process {self.process} takes no {key}")
        if self.at_s is not None and self.rates is not None:
            if len(self.at_s) != len(self.rates):
                raise ValueError(f"arrival process step has {len(self.at_s)} times and {len(self.rates)} rates; give as many of each")
            if sorted(self.at_s) != list(self.at_s):
                raise ValueError("arrival process step: at_s must ascend")
        return self

    def slower(self, factor: float) -> Self:
        """The same with every rate it names divided: what sessions of `factor` requests each begin at."""
        changes: dict[str, object] = {}
        if self.to_rate is not None:
            changes["to_rate"] = self.to_rate / factor
        if self.rates is not None:
            changes["rates"] = tuple(rate / factor for rate in self.rates)
        return self.model_copy(update=changes)


def draw(arrival: Arrival, rate: float, count: int, rng: np.random.Generator) -> Floats:
    """[count] arrival times in seconds, ascending from about 0; zeros for a closed loop. `rate` in requests/s."""
    if arrival.process == "closed":
        return np.zeros(count)
    if arrival.process == "constant":
        return np.arange(count) / rate
    if arrival.cv is None:
        gaps = rng.exponential(1.0, count)
    else:
        shape = arrival.cv**-2
        gaps = rng.gamma(shape, 1 / shape, count)
    operational = np.cumsum(gaps)
    operational -= operational[0]
    if arrival.process in ("poisson", "gamma"):
        return operational / rate
    return _warp(arrival, rate, operational)


def _warp(arrival: Arrival, rate: float, operational: Floats) -> Floats:
    """Times at which the cumulative rate reaches each operational time."""
    if arrival.process == "ramp":
        assert arrival.to_rate is not None and arrival.over_s is not None
        slope = (arrival.to_rate - rate) / arrival.over_s
        whole = arrival.over_s * (rate + arrival.to_rate) / 2
        inside = np.minimum(operational, whole)
        if slope:
            times = (np.sqrt(np.maximum(rate**2 + 2 * slope * inside, 0.0)) - rate) / slope
        else:
            times = inside / rate
        return np.where(operational > whole, arrival.over_s + (operational - whole) / arrival.to_rate, times)
    if arrival.process == "step":
        assert arrival.at_s is not None and arrival.rates is not None
        times = np.array([0.0, *arrival.at_s])
        rates = np.array([rate, *arrival.rates])
        reached = np.concatenate(([0.0], np.cumsum(np.diff(times) * rates[:-1])))
        piece = np.searchsorted(reached, operational, side="right") - 1
        stepped: Floats = times[piece] + (operational - reached[piece]) / rates[piece]
        return stepped
    assert arrival.amplitude is not None
    period_s = arrival.period_s or 86400.0
    turn: float = 2 * np.pi / period_s
    phase_s = np.linspace(0.0, period_s, 4097)
    cumulative = rate * (phase_s + arrival.amplitude / turn * (1 - np.cos(turn * phase_s)))
    days, rest = np.divmod(operational, cumulative[-1])
    return days * period_s + np.interp(rest, cumulative, phase_s)
