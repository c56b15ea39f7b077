"""The experiment file as what is asked about a deployment: by which workload, at which cost, and what goes wrong meanwhile. Only the
simulator needs it; `pdlab bench` sends the workload.

Its other keys are beside what they are about: `hardware`, `host` and `nics` in the rows of `cluster.instances`, and `network`,
`reports.delay_s`, `role_switch_s`, `detect_s` and `autoscale.start_s` in `cluster`.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from pdlab.cost import CostSpec
from pdlab.experiment.fields import SIM, NotNegative, Number, Positive, Spec, Use
from pdlab.experiment.plan import PlanSpec
from pdlab.workload.spec import WorkloadSpec

KINDS = {
    "kill": ("restart_after_s",),
    "stop": ("for_s",),
    "drain": (),
    "slow": ("factor", "decode_factor", "for_s"),
    "slow_link": ("factor", "for_s"),
    "cut_link": ("for_s",),
    "cut": ("by_s", "for_s"),
    "lose_reports": ("for_s",),
    "delay_reports": ("by_s", "for_s"),
}
NEEDS = {"stop": "for_s", "slow": "factor", "slow_link": "factor", "delay_reports": "by_s"}


class FaultSpec(Spec):
    """At `at_s`, one of: an instance dies (and comes back), stands still, is drained and leaves, or computes slowly, its link slows down or
    is cut, its reports are lost or late; or two of them do not reach each other."""

    at_s: NotNegative
    kill: str | None = None
    stop: str | None = None
    drain: str | None = None
    slow: str | None = None
    slow_link: str | None = None
    cut_link: str | None = None
    cut: tuple[str, str] | None = None
    lose_reports: str | None = None
    delay_reports: str | None = None
    restart_after_s: Positive | None = None  # None: never
    factor: Annotated[Number, Field(gt=0, le=1)] | None = None
    decode_factor: Annotated[Number, Field(gt=0, le=1)] | None = None
    by_s: Positive | None = None
    for_s: Positive | None = None  # None: to the end; a stop has one

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def instances(self) -> tuple[str, ...]:
        """The names of those it befalls."""
        named = getattr(self, self.kind)
        return (named,) if isinstance(named, str) else tuple(named)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a fault is one of {', '.join(KINDS)}, not {' and '.join(given) or 'none of them'}")
        takes = KINDS[given[0]]
        for key in ("restart_after_s", "factor", "decode_factor", "by_s", "for_s"):
            if getattr(self, key) is not None and key not in takes:
                raise ValueError(f"{given[0]} takes no {key}, only {' and '.join(takes)}")
        needed = NEEDS.get(given[0])
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"{given[0]} needs {needed}")
        if self.cut is not None and self.cut[0] == self.cut[1]:
            raise ValueError(f"cut names two instances, not {self.cut[0]} twice")
        return self


class Study(Spec):
    """The keys at the top of the file that are its own."""

    workload: Annotated[WorkloadSpec, SIM]
    faults: Annotated[tuple[FaultSpec, ...], SIM] = ()
    cost: Annotated[CostSpec, SIM] = CostSpec()
    plan: Annotated[PlanSpec | None, Use(sim="", serve="")] = None  # no world's: `pdlab plan` reads it
