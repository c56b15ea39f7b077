"""Runs beside each other: the verdict of `pdlab compare` on each against the first, and their distributions over one another."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from pdlab.core.types import UsageError
from pdlab.lab.bodies import CompareBody, Trouble
from pdlab.lab.routes import lab_of
from pdlab.lab.store import JobKind
from pdlab.report.aggregates import AGGREGATES
from pdlab.results.comparison import Group
from pdlab.results.comparison_sims import compare_simulations, differences
from pdlab.results.run import Run


class VerdictView(BaseModel):
    """`decided`: the difference is outside its interval."""

    words: str
    decided: bool


class PairView(BaseModel):
    """A run against the first. `differs` is what its file has other, in words."""

    id: str
    name: str
    verdict: list[VerdictView]
    notes: list[str]
    differs: str


class FigureView(BaseModel):
    """A figure of each run, in their order."""

    label: str
    key: str
    values: list[float | None]


class ComparisonView(BaseModel):
    """`cdf`: of each run by its id, latencies at `shares` of its requests."""

    ids: list[str]
    names: list[str]
    pairs: list[PairView]
    figures: list[FigureView]
    shares: list[float]
    cdf: dict[str, dict[str, list[float] | None]]
    slo: dict[str, float | None]


def comparing() -> APIRouter:
    router = APIRouter(prefix="/api/v1", tags=["compare"])
    troubles: dict[int | str, dict[str, Any]] = {
        404: {"model": Trouble, "description": "one is not there, or has not ended"},
        422: {"model": Trouble, "description": "mistakes"},
    }
    router.add_api_route(
        "/compare", _compare, methods=["POST"], response_model=ComparisonView, responses=troubles, summary="Runs against the first"
    )
    return router


def _compare(request: Request, body: CompareBody) -> ComparisonView:
    if len(set(body.ids)) < len(body.ids):
        raise UsageError("ids: one is there twice; name each run once")
    found = [lab_of(request).done(JobKind.EXPERIMENT, id) for id in body.ids]
    return compared([row.order.name for row, _ in found], body.ids, [folder for _, folder in found])


def compared(names: Sequence[str], ids: Sequence[str], folders: Sequence[Path]) -> ComparisonView:
    """Raises UsageError where a folder holds no run."""
    runs = [Run.load(folder) for folder in folders]
    told = [name if names.count(name) == 1 else f"{name} {id[:6]}" for name, id in zip(names, ids, strict=True)]
    groups = [compare_simulations((told[0], runs[0]), (told[k], run)).groups[0] for k, run in enumerate(runs) if k]
    pairs = [_pair(group, ids[k], told[k], runs[0], runs[k]) for k, group in enumerate(groups, 1)]
    aggregates = [json.loads((folder / AGGREGATES).read_text(encoding="utf-8")) for folder in folders]
    return ComparisonView(
        ids=list(ids),
        names=told,
        pairs=pairs,
        figures=[
            FigureView(
                label=line.label,
                key=line.key,
                values=[_known(line.simulated), *(_known(group.line(line.key).mean) for group in groups)],
            )
            for line in groups[0].lines
        ],
        shares=aggregates[0]["shares"],
        cdf={id: one["cdf"] for id, one in zip(ids, aggregates, strict=True)},
        slo=dict(runs[0].summary["slo"]),
    )


def _pair(group: Group, id: str, name: str, first: Run, other: Run) -> PairView:
    verdict = [VerdictView(words=line.words, decided=line.tone == 1) for line in group.verdict]
    return PairView(id=id, name=name, verdict=verdict, notes=list(group.notes), differs=differences(first.experiment, other.experiment))


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
