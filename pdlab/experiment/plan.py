"""`plan` in the experiment file: the deployments that `pdlab plan` chooses among."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pdlab.experiment.fields import Batching, Count, Hardware, Positive, Spec

Split = Literal["mixed", "pd"]


class PlanSpec(Spec):
    """Each list has the values that are tried. None: as the rest of the file has it, or as `pdlab plan` says."""

    splits: Annotated[tuple[Split, ...], Field(min_length=1)] = ("mixed", "pd")
    hardware: Annotated[tuple[Hardware, ...], Field(min_length=1)] | None = None
    tp: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 4, 8)
    max_batch_tokens: Annotated[tuple[Count, ...], Field(min_length=1)] = (512, 2048, 8192)
    max_seqs: Annotated[tuple[Count, ...], Field(min_length=1)] = (256, 1024)
    batching: Annotated[tuple[Batching, ...], Field(min_length=1)] | None = None
    policy: Annotated[tuple[str | dict[str, Any], ...], Field(min_length=1)] | None = None
    transfer: Annotated[tuple[Literal["push", "pull"], ...], Field(min_length=1)] = ("push", "pull")
    prefix_cache: Annotated[tuple[bool, ...], Field(min_length=1)] | None = None
    accelerators_per_host: Count = 8
    usd_per_h: dict[str, Positive] | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for key in type(self).model_fields:
            values = getattr(self, key)
            if isinstance(values, tuple) and any(value in values[:index] for index, value in enumerate(values)):
                raise ValueError(f"{key}: a value is there twice")
        return self
