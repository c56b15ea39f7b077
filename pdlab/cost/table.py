"""Step times read off a measured or modelled grid: prefill over (new tokens, cached tokens), decode over (batch, context of one sequence).

Between grid points both are bilinear, so that at a fixed batch decode is a polyline in the total context. Outside the grid is a UsageError,
unless `extrapolate` is set: then the outermost cell is continued linearly, and `extrapolated` counts the look-ups that needed it. Several
prompt chunks of one step add up, the grid's fixed part (its value at zero tokens, continued) counted once. A mixed step is the prefill
step plus what decoding costs beyond the grid's cheapest decode, whose weights it shares, and never quicker than the decodes alone.

A profile is JSON: {"name", "source", "prefill": {"tokens": [...], "cached": [...], "seconds": [[...] a row of tokens]},
"decode": {"batch": [...], "context": [...], "seconds": [[...] a row of batch]}}. Axes ascend strictly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from importlib import resources
from itertools import pairwise
from math import inf
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pdlab.core.file_kinds import STEP_TABLE
from pdlab.core.json_file import json_model
from pdlab.core.types import UsageError, nearest
from pdlab.cost.base import Cost


class PrefillGrid(BaseModel):
    """seconds[i][j] for tokens[i] new prompt tokens after cached[j]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[int, ...]
    cached: tuple[int, ...] = (0,)
    seconds: tuple[tuple[float, ...], ...]

    @model_validator(mode="after")
    def _shape(self) -> PrefillGrid:
        check_grid("tokens", self.tokens, "cached", self.cached, self.seconds)
        return self


class DecodeGrid(BaseModel):
    """seconds[i][j] for batch[i] sequences of context[j] KV tokens each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: tuple[int, ...]
    context: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    @model_validator(mode="after")
    def _shape(self) -> DecodeGrid:
        check_grid("batch", self.batch, "context", self.context, self.seconds)
        return self


class Profile(BaseModel):
    """A table of step times, as kept in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    source: str = ""
    prefill: PrefillGrid = Field(description="seconds over (new tokens, cached tokens)")
    decode: DecodeGrid = Field(description="seconds over (batch, context tokens of one sequence)")


def shipped_tables() -> dict[str, Path]:
    """Those of pdlab, by name; `tables/NOTICE` says whose kernels they rest on."""
    folder = Path(str(resources.files("pdlab.cost").joinpath("tables")))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def table_path(name: str, base_dir: Path) -> Path:
    """A shipped table's, or a file's beside the experiment. Raises UsageError where a plain name is neither."""
    shipped = shipped_tables()
    if name in shipped:
        return shipped[name]
    path = base_dir / name
    if "/" not in name and not name.endswith(".json") and not path.exists():
        raise UsageError(f"cost.table {name!r} is neither a file nor one of {', '.join(shipped)}{nearest(name, list(shipped))}")
    return path


def load_profile(path: Path) -> Profile:
    """Read a profile. Raises UsageError when it is missing or malformed, naming the first wrong place."""
    return json_model(path, Profile, "cost table", STEP_TABLE)


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile as JSON that `load_profile` reads."""
    path.write_text(profile.model_dump_json() + "\n", encoding="utf-8")


class Table(Cost):
    """The cost of a profile. `extrapolated` counts look-ups outside the grid; it stays 0 unless `extrapolate` allows them."""

    def __init__(self, profile: Profile, extrapolate: bool = False) -> None:
        self.extrapolate = extrapolate
        self.extrapolated = 0
        self._name = profile.name or "cost table"
        self._prefill, self._decode = profile.prefill, profile.decode
        grid = profile.prefill
        self._fixed_s = 0.0
        if len(grid.tokens) > 1:
            slope = (grid.seconds[1][0] - grid.seconds[0][0]) / (grid.tokens[1] - grid.tokens[0])
            self._fixed_s = min(max(0.0, grid.seconds[0][0] - slope * grid.tokens[0]), grid.seconds[0][0])
        self._cheapest_decode_s = profile.decode.seconds[0][0]
        self._rows: dict[int, tuple[float, ...]] = {}

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        total_s = self._fixed_s * (1 - len(chunks))
        for new, context in chunks:
            total_s += self._prefill_one_s(new, context)
        return total_s

    def decode_line(self, batch: int, context_tokens: int) -> tuple[float, float, float]:
        row = self._rows.get(batch)
        if row is None:
            row = self._rows[batch] = self._row(batch)
        axis = self._decode.context
        low, high = axis[0] * batch, axis[-1] * batch
        if not low <= context_tokens <= high or not self._decode.batch[0] <= batch <= self._decode.batch[-1]:
            self._note_decode(batch, context_tokens, low, high)
        if len(axis) == 1:
            return row[0], 0.0, inf
        i = min(max(bisect_right(axis, context_tokens / batch) - 1, 0), len(axis) - 2)
        slope = (row[i + 1] - row[i]) / ((axis[i + 1] - axis[i]) * batch)
        base_s = row[i] - slope * axis[i] * batch
        last = i == len(axis) - 2
        until = (inf if self.extrapolate else high + 1.0) if last else float(axis[i + 1] * batch)
        return base_s, slope, until

    def mixed_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        decode_s = self.decode_s(batch, context_tokens)
        return max(decode_s, self.prefill_s(chunks) + max(0.0, decode_s - self._cheapest_decode_s))

    def _prefill_one_s(self, new: int, context: int) -> float:
        tokens, cached, seconds = self._prefill.tokens, self._prefill.cached, self._prefill.seconds
        if not (tokens[0] <= new <= tokens[-1] and cached[0] <= context <= cached[-1]):
            self._note(f"prefill of {new} tokens after {context}", f"{tokens[0]}..{tokens[-1]} tokens after {cached[0]}..{cached[-1]}")
        return max(0.0, bilinear(tokens, cached, seconds, new, context))

    def _row(self, batch: int) -> tuple[float, ...]:
        """Decode seconds of this batch along the context axis."""
        i, u = _cell(self._decode.batch, batch)
        near, far = self._decode.seconds[i], self._decode.seconds[min(i + 1, len(self._decode.batch) - 1)]
        return tuple(max(0.0, (1 - u) * a + u * b) for a, b in zip(near, far, strict=True))

    def _note_decode(self, batch: int, context_tokens: int, low: int, high: int) -> None:
        batches = self._decode.batch
        if not batches[0] <= batch <= batches[-1]:
            self._note(f"decode of batch {batch}", f"batch {batches[0]}..{batches[-1]}")
        elif not low <= context_tokens <= high:
            self._note(f"decode of batch {batch} with context {context_tokens}", f"context {low}..{high} there")

    def _note(self, asked: str, covered: str) -> None:
        if not self.extrapolate:
            raise UsageError(f"{self._name}: {asked} lies outside the grid ({covered}): widen the profile or set extrapolate: true")
        self.extrapolated += 1


def bilinear(rows: Sequence[int], columns: Sequence[int], seconds: Sequence[Sequence[float]], x: float, y: float) -> float:
    """At row x and column y; beyond the grid its outermost cells go on."""
    i, u = _cell(rows, x)
    j, v = _cell(columns, y)
    near, far = seconds[i], seconds[min(i + 1, len(rows) - 1)]
    k = min(j + 1, len(columns) - 1)
    return (1 - u) * ((1 - v) * near[j] + v * near[k]) + u * ((1 - v) * far[j] + v * far[k])


def _cell(axis: Sequence[int], x: float) -> tuple[int, float]:
    """The axis cell that x falls in (the outermost beyond its ends), and how far along it, in cells."""
    if len(axis) == 1:
        return 0, 0.0
    i = min(max(bisect_right(axis, x) - 1, 0), len(axis) - 2)
    return i, (x - axis[i]) / (axis[i + 1] - axis[i])


def check_grid(
    name: str, rows: Sequence[int], other: str, columns: Sequence[int], seconds: Sequence[Sequence[float]], least_s: float | None = None
) -> None:
    """Raises ValueError unless the axes ascend and the seconds are as many, and positive; or, with `least_s`, at least that."""
    for label, axis, least in ((name, rows, 1), (other, columns, 0)):
        if not axis or axis[0] < least or any(a >= b for a, b in pairwise(axis)):
            raise ValueError(f"axis {label!r} must ascend strictly from at least {least}")
    if len(seconds) != len(rows) or any(len(row) != len(columns) for row in seconds):
        raise ValueError(f"seconds must be {len(rows)} rows ({name}) of {len(columns)} ({other})")
    if not all((value > 0.0 if least_s is None else value >= least_s) and value < inf for row in seconds for value in row):
        raise ValueError(f"every time must be {'positive' if least_s is None else f'at least {least_s:g}'} and finite")
