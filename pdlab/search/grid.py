"""The axes of a sweep, as they are written on a command line, and the points between them.

Grid.read(["workload.rate=4,8,16", "policy=round_robin,{dispatch: prefix_aware, handoff: least_kv}"]).points(experiment)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Self

import yaml

from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.fields import unused
from pdlab.experiment.yaml import read_list

_NO_AXIS = {
    "seed": "--seeds N says how many seeds each point has",
    "name": "it changes nothing that runs",
    "base_dir": "give the paths themselves as values",
}


@dataclass(frozen=True, slots=True)
class Axis:
    key: str
    values: tuple[Any, ...]

    @classmethod
    def read(cls, text: str) -> Self:
        """Of key.path=1,2,4, the values in YAML. Raises UsageError."""
        key, equals, listed = text.partition("=")
        if not equals or not all(key.split(".")):
            raise UsageError(f"--grid {text}: write key.path=value,value, such as workload.rate=4,8,16")
        if key in _NO_AXIS:
            raise UsageError(f"--grid {text}: {key} is no axis: {_NO_AXIS[key]}")
        values = read_list(listed, f"--grid {text}")
        if not values:
            raise UsageError(f"--grid {text}: it has no values; write {key}=value,value")
        words = [worded(value) for value in values]
        for word in words:
            if words.count(word) > 1:
                raise UsageError(f"--grid {text}: {word} is there twice")
        return cls(key, tuple(values))

    @property
    def numeric(self) -> bool:
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)

    @property
    def plain(self) -> bool:
        """Are its values of one kind that a table's column can have?"""
        return self.numeric or (len({type(value) for value in self.values}) == 1 and isinstance(self.values[0], bool | str))


@dataclass(frozen=True, slots=True)
class GridPoint:
    values: tuple[Any, ...]  # in the order of the axes
    experiment: Experiment


@dataclass(frozen=True, slots=True)
class ImpossiblePoint:
    """A combination that no experiment can have."""

    values: tuple[Any, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Grid:
    axes: tuple[Axis, ...]

    @classmethod
    def read(cls, texts: Sequence[str]) -> Self:
        """Raises UsageError."""
        if not texts:
            raise UsageError("a sweep needs an axis at least: --grid key.path=value,value, such as --grid workload.rate=4,8,16")
        axes = tuple(map(Axis.read, texts))
        for index, axis in enumerate(axes):
            for other in axes[:index]:
                if axis.key == other.key:
                    raise UsageError(f"--grid {axis.key}: the key is there twice; write all of its values after one")
                if f"{axis.key}.".startswith(f"{other.key}.") or f"{other.key}.".startswith(f"{axis.key}."):
                    raise UsageError(f"--grid {axis.key}: it and {other.key} are one inside the other; give the values of one of them")
        return cls(axes)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(axis.key for axis in self.axes)

    def __len__(self) -> int:
        return prod(len(axis.values) for axis in self.axes)

    def points(self, base: Experiment) -> tuple[list[GridPoint], list[ImpossiblePoint]]:
        """Raises UsageError for a value that fits neither the experiment nor any of the others' values."""
        points: list[GridPoint] = []
        impossible: list[ImpossiblePoint] = []
        for values in product(*(axis.values for axis in self.axes)):
            try:
                points.append(GridPoint(values, base.with_(dict(zip(self.keys, values, strict=True)))))
            except UsageError as error:
                impossible.append(ImpossiblePoint(values, _first_line(error)))
        if impossible:
            self._check_values(base, points)
        for axis in self.axes:
            said = points[0].experiment.model_dump(mode="json", exclude_unset=True)
            top = _without_rows(axis.key)
            if any(top == key or top.startswith(f"{key}.") for key in unused(said, Experiment, "sim")):
                raise UsageError(f"--grid {axis.key}: a simulation does not use it, so that its points would be alike")
        return points, impossible

    def _check_values(self, base: Experiment, points: Sequence[GridPoint]) -> None:
        """Raises UsageError for the first value that stands in no point, and cannot stand alone either."""
        for index, axis in enumerate(self.axes):
            used = {worded(point.values[index]) for point in points}
            for value in axis.values:
                if worded(value) in used:
                    continue
                try:
                    base.with_({axis.key: value})
                except UsageError as error:
                    raise UsageError(f"--grid {axis.key}={worded(value)}: {_first_line(error)}") from None
        if not points:
            raise UsageError("no point of the grid is possible: each value goes with the experiment, but none with the others'")


def worded(value: Any) -> str:
    """As a person would write it in the file."""
    return (
        value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=1_000_000).removesuffix("...\n").strip()
    )


def _first_line(error: UsageError) -> str:
    return str(error).partition("\n")[0]


def _without_rows(key: str) -> str:
    return ".".join(part for part in key.split(".") if not part.isdecimal())
