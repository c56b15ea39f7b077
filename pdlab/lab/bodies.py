"""What the API takes and gives. An experiment is the mapping of its file, which `pdlab.experiment` checks and nobody here does again."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pdlab.lab.feed import Snapshot
from pdlab.lab.store import JobKind, JobRow, JobState


class SubmitBody(BaseModel):
    """`experiment` is a file's text or its mapping, `set` as `--set` has it, `options` those of the kind."""

    model_config = ConfigDict(extra="forbid")

    experiment: str | dict[str, Any]
    seeds: int = 1
    tags: list[str] = Field(default_factory=list)
    set: list[str] = Field(default_factory=list)
    options: dict[str, Any] = Field(default_factory=dict)


class BoardBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rows: str
    models: list[str] = Field(default_factory=list)
    tags: list[str] = Field(default_factory=list)


class CompareBody(BaseModel):
    """The others are compared with the first."""

    model_config = ConfigDict(extra="forbid")

    ids: Annotated[list[str], Field(min_length=2, max_length=8)]


class MistakeView(BaseModel):
    """`line` counts from 1; `path` is what `set` takes."""

    text: str
    path: str = ""
    line: int | None = None


class Trouble(BaseModel):
    """`errors` are the lines that the command would print."""

    errors: list[str]
    mistakes: list[MistakeView] = Field(default_factory=list)


class Validated(BaseModel):
    """`id` is what the experiment would run as; empty where it cannot."""

    id: str
    mistakes: list[MistakeView]
    doubts: list[str]
    resolved: str


class JobView(BaseModel):
    """Times are Unix seconds, figures a summary's. `progress` is there while it runs, and `heard_s`: when it
    began, or said the last of it."""

    id: str
    kind: JobKind
    name: str
    state: JobState
    policy: str
    model: str
    seeds: int
    tags: list[str]
    submitted_s: float
    started_s: float | None
    ended_s: float | None
    failure: str
    requests: int | None
    slo_attainment: float | None
    goodput_rps: float | None
    ttft_p99_s: float | None
    tpot_p99_s: float | None
    progress: dict[str, Any] = Field(default_factory=dict)
    heard_s: float | None = None


class JobDetail(JobView):
    """`summary`: what summary.json has, or the kind's own result; `by_seed` where there are several."""

    experiment: str
    asked: dict[str, Any]
    summary: dict[str, Any] | None = None
    seed_figures: dict[str, Any] | None = None
    files: list[str] = Field(default_factory=list)


class Submitted(JobView):
    """`new`: it was not there before, or is run again."""

    new: bool
    doubts: list[str]


class JobPage(BaseModel):
    total: int
    offset: int
    jobs: list[JobView]


class UploadView(BaseModel):
    name: str
    kind: str
    bytes: int
    sha256: str
    added_s: float


def view_fields(row: JobRow, newest: Snapshot) -> dict[str, Any]:
    order = row.order
    named = {name: getattr(order, name) for name in ("id", "kind", "name", "policy", "model", "seeds")}
    own = {name: getattr(row, name) for name in ("state", "submitted_s", "started_s", "ended_s", "failure", "requests")}
    return {**named, **own, **row.figures, "tags": list(row.tags), "progress": newest.get("progress", {}), "heard_s": newest.get("heard_s")}
