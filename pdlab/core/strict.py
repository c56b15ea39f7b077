"""What a file's parts have in common: they are frozen, an unknown key is a mistake, and YAML's `yes` is no number."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        truth = _truth_in(value)
        if truth is not None and info.field_name is not None:
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if (int in kinds or float in kinds) and bool not in kinds:
                raise ValueError(f"must be a number, not {str(truth).lower()}")
        return value


def _truth_in(value: object) -> bool | None:
    """A truth value, if it is one or a list has one."""
    if isinstance(value, bool):
        return value
    return next((one for one in value if isinstance(one, bool)), None) if isinstance(value, list | tuple) else None


def _kinds(annotation: object) -> list[object]:
    """The types that a field may have, within lists and unions."""
    return [annotation, *(kind for one in get_args(annotation) for kind in _kinds(one))]
