"""Priorities and objectives that requests carry themselves, as an experiment file names them.

priorities: {0: 0.9, 1: 0.1}                            # each priority's share
ttft_slo_s: 1.0                                         # all requests
ttft_slo_s: {0: 5.0, 1: 0.5}                            # by priority; one that is left out keeps the experiment's
tpot_slo_s: {uniform: [0.02, 0.2]}                      # any between
tpot_slo_s: {shares: [[0.02, 0.3], [0.1, 0.7]]}         # (seconds, share of the requests)
"""

from __future__ import annotations

from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

from pdlab.core.strict import Strict

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Priority = Annotated[int, Field(ge=-(2**15), le=2**15 - 1)]
Priorities = Annotated[dict[Priority, Positive], Field(min_length=1)]


class ObjectiveChoice(Strict):
    """One of constant, for which a number alone stands; by_priority, for which a mapping of priorities alone stands; uniform; shares."""

    constant: Positive | None = None
    by_priority: Annotated[dict[Priority, Positive], Field(min_length=1)] | None = None
    uniform: tuple[Positive, Positive] | None = None
    shares: Annotated[tuple[tuple[Positive, Positive], ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"an objective is a number, one for each priority, or one of uniform, shares, not {' and '.join(given) or 'none'}"
            )
        if self.uniform is not None and self.uniform[0] > self.uniform[1]:
            raise ValueError(f"uniform [{self.uniform[0]:g}, {self.uniform[1]:g}] ends before it begins")
        return self


def _named(value: object) -> object:
    if value is None or isinstance(value, ObjectiveChoice):
        return value
    if not isinstance(value, dict):
        return {"constant": value}
    return {"by_priority": value} if any(isinstance(key, int) for key in value) else value


Objective = Annotated[ObjectiveChoice | None, BeforeValidator(_named)]


def draw_priorities(priorities: dict[int, float], count: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """[count] priorities with the given shares, which need not add up to 1."""
    shares = np.array(list(priorities.values()))
    return rng.choice(np.array(list(priorities), np.int16), count, p=shares / shares.sum())


def draw(objective: ObjectiveChoice, priority: NDArray[np.int16], rng: np.random.Generator) -> NDArray[np.float64]:
    """[n] seconds for requests of the given priorities; nan where the objective says nothing."""
    count = len(priority)
    if objective.uniform is not None:
        return rng.uniform(*objective.uniform, count)
    if objective.shares is not None:
        values, shares = np.array(objective.shares).T
        chosen: NDArray[np.float64] = rng.choice(values, count, p=shares / shares.sum())
        return chosen
    seconds = np.full(count, np.nan if objective.constant is None else objective.constant)
    for value, given in (objective.by_priority or {}).items():
        seconds[priority == value] = given
    return seconds
