"""What the kinds of jobs ask beside an experiment. The values and their bounds are those of the commands."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pdlab.core.types import UsageError
from pdlab.experiment.mistakes import mistakes
from pdlab.lab.store import JobKind

Text = Annotated[str, Field(max_length=2000)]
Texts = Annotated[list[Text], Field(max_length=100)]


class JobOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ExperimentOptions(JobOptions):
    """None."""


class PlanOptions(JobOptions):
    """As those of `pdlab plan`."""

    gpus: Text | None = None
    rate: float | None = None
    budget: float | None = Field(None, description="Dollars an hour.")
    objective: Literal["rate", "gpu", "dollar"] = "rate"
    failures: Literal[0, 1] = 0
    requests: int | None = None


class SweepOptions(JobOptions):
    """As those of `pdlab sweep`."""

    grid: Texts = Field(default_factory=list, description="Axes: key.path=value,value")


class TuningOptions(JobOptions):
    """As those of `pdlab tune`."""

    policy: Text | None = None
    params: Texts = Field(default_factory=list)
    trials: Annotated[int, Field(ge=1, le=100_000)] = 200
    objective: Texts = Field(default_factory=lambda: ["slo_attainment"])
    rungs: Annotated[int, Field(ge=1, le=20)] = 3
    holdout: float = 0.4
    judge: Annotated[int, Field(ge=1, le=1000)] = 10
    seeds: int | None = None


class BoardOptions(JobOptions):
    """As those of `pdlab board`; `rows` is the name of an upload."""

    rows: Text
    models: Texts = Field(default_factory=list)


OPTIONS: dict[JobKind, type[JobOptions]] = {
    JobKind.EXPERIMENT: ExperimentOptions,
    JobKind.PLAN: PlanOptions,
    JobKind.SWEEP: SweepOptions,
    JobKind.TUNING: TuningOptions,
    JobKind.BOARD: BoardOptions,
}


def read_options(kind: JobKind, given: Any) -> dict[str, Any]:
    """With the defaults in place. Raises UsageError with a line for each mistake."""
    model = OPTIONS[kind]
    try:
        return model.model_validate(given).model_dump()
    except ValidationError as error:
        raise UsageError("\n".join(f"options.{line}" for line in mistakes(error, model))) from None
