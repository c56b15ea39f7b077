"""What a policy's fields say of its parameters: the kind of each, its bounds, and what it is left at."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any

from pdlab.core.policy import Policy, Range
from pdlab.core.types import UsageError


@dataclass(frozen=True, slots=True)
class Parameter:
    """`hint` is its whole type, and `kind` what is in it beside None and `Annotated`; `choices` are all its values where these can be
    counted; `default` is dataclasses.MISSING where it has none."""

    name: str
    hint: Any
    kind: Any
    optional: bool
    bounds: Range | None
    default: Any

    @property
    def choices(self) -> tuple[Any, ...] | None:
        if self.kind is bool:
            return (False, True)
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is typing.Literal else None

    def check(self, value: object) -> None:
        """Raises UsageError where a policy cannot have it."""
        if value is None and self.optional:
            return
        must = ""
        if self.choices is not None and value not in self.choices:
            must = " or ".join(map(str, self.choices))
        elif self.bounds is not None and not (isinstance(value, int | float) and self.bounds.hold(value)):
            must = str(self.bounds)
        if must:
            raise UsageError(f"policy parameter {self.name} must be {must}{', or null' * self.optional}, not {value!r}")


def parameters(cls: type) -> Mapping[str, Parameter]:
    """Of a policy's class, by name; none where it is no dataclass. Raises NameError where an annotation names what is not there."""
    if not dataclasses.is_dataclass(cls):
        return {}
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: _parameter(field, hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def check(policy: Policy) -> None:
    """Raises UsageError where a field lies outside its bounds."""
    try:
        known = parameters(type(policy))
    except NameError:  # of a notebook, perhaps: what is not known to Python bounds nothing
        return
    for name, parameter in known.items():
        parameter.check(getattr(policy, name))


def _parameter(field: dataclasses.Field[Any], hint: Any) -> Parameter:
    kind, optional, bounds = hint, False, None
    while (inner := typing.get_args(kind)) and typing.get_origin(kind) in (typing.Annotated, typing.Union, UnionType):
        if typing.get_origin(kind) is typing.Annotated:
            kind = inner[0]
            bounds = next((one for one in inner[1:] if isinstance(one, Range)), bounds)
            continue
        rest = [one for one in inner if one is not NoneType]
        optional = optional or len(rest) < len(inner)
        if len(rest) > 1:
            break
        kind = rest[0]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return Parameter(field.name, hint, kind, optional, bounds, default)
