"""What the lab knows: jobs and what came of them, their tags, and the files that were uploaded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import delete, desc, func, insert, nulls_last, select, update

from pdlab.core.types import UsageError, nearest
from pdlab.lab.database import Database
from pdlab.lab.tables import FIGURES, JOBS, TAGS, UPLOADS

MOST_LISTED = 1000
SORTED_BY = ("submitted_s", "ended_s", "name", "state", "policy", "model", "requests", *FIGURES)


class JobKind(StrEnum):
    EXPERIMENT = "experiment"
    PLAN = "plan"
    SWEEP = "sweep"
    TUNING = "tuning"
    BOARD = "board"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class JobOrder:
    """What is to be done: `asked` is plain values that say all of it, `id` the hash of what runs. `name`, `policy`, `model` and `seeds` are
    for lists."""

    id: str
    kind: JobKind
    name: str
    policy: str
    model: str
    seeds: int
    asked: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class JobRow:
    """An order and what has become of it. Times are Unix seconds. `figures` has those of FIGURES that there are."""

    order: JobOrder
    state: JobState
    submitted_s: float
    started_s: float | None
    ended_s: float | None
    deaths: int
    failure: str
    requests: int | None
    figures: Mapping[str, float | None]
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JobFilter:
    """None and empty: whatever it is. `text` is part of a name, a policy, a model, or of an id."""

    kind: JobKind | None = None
    state: JobState | None = None
    tag: str | None = None
    policy: str | None = None
    model: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    name: str
    kind: str
    bytes: int
    sha256: str
    added_s: float


class LabStore:
    """Each method is one transaction, and raises DatabaseAway where the database does not answer."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def put(self, order: JobOrder, tags: Sequence[str], most_queued: int) -> tuple[JobRow, bool] | None:
        """The job, and whether it is new; None where `most_queued` wait already. One that failed or was cancelled is queued again."""
        with self.database.begin() as connection:
            row = connection.execute(select(JOBS).where(JOBS.c.id == order.id)).mappings().first()
            anew = row is None or JobState(row["state"]) in (JobState.FAILED, JobState.CANCELLED)
            if anew:
                waiting = connection.execute(select(func.count()).where(JOBS.c.state == JobState.QUEUED)).scalar()
                if waiting >= most_queued:
                    return None
                if row is not None:
                    connection.execute(delete(JOBS).where(JOBS.c.id == order.id))
                connection.execute(insert(JOBS).values(**_values(order)))
            self._tag(connection, order.id, tags)
            found = self._one(connection, order.id)
            assert found is not None, "it was put there"
            return found, anew

    def get(self, id: str) -> JobRow | None:
        with self.database.read() as connection:
            return self._one(connection, id)

    def listed(
        self, wanted: JobFilter, *, sort: str = "submitted_s", descending: bool = True, offset: int = 0, limit: int = 100
    ) -> tuple[list[JobRow], int]:
        """Those of a page, and how many there are on all. Raises UsageError."""
        if sort not in SORTED_BY:
            raise UsageError(f"sort {sort!r} is not one of {', '.join(SORTED_BY)}{nearest(sort, SORTED_BY)}")
        column = JOBS.c[sort]
        order = [nulls_last(desc(column) if descending else column), JOBS.c.id]
        with self.database.read() as connection:
            conditions = _conditions(wanted)
            total = connection.execute(select(func.count()).select_from(JOBS).where(*conditions)).scalar()
            query = select(JOBS).where(*conditions).order_by(*order).offset(offset).limit(min(limit, MOST_LISTED))
            rows = connection.execute(query).mappings().all()
            tags = self._tags(connection, [row["id"] for row in rows])
        return [_row(row, tags.get(row["id"], ())) for row in rows], total

    def counts(self) -> dict[str, int]:
        """How many jobs there are in each state."""
        with self.database.read() as connection:
            rows = connection.execute(select(JOBS.c.state, func.count()).group_by(JOBS.c.state)).all()
        return {str(state): int(count) for state, count in rows}

    def next_queued(self) -> JobRow | None:
        """Whoever has waited the longest; it runs from now on."""
        with self.database.begin() as connection:
            query = select(JOBS.c.id).where(JOBS.c.state == JobState.QUEUED).order_by(JOBS.c.submitted_s, JOBS.c.id).limit(1)
            id = connection.execute(query).scalar()
            if id is None:
                return None
            connection.execute(update(JOBS).where(JOBS.c.id == id).values(state=JobState.RUNNING, started_s=time.time()))
            return self._one(connection, id)

    def requeue(self, id: str, *, died: bool) -> None:
        """To be run again, before those that came later."""
        with self.database.begin() as connection:
            values: dict[str, Any] = {"state": JobState.QUEUED, "started_s": None}
            if died:
                values["deaths"] = JOBS.c.deaths + 1
            connection.execute(update(JOBS).where(JOBS.c.id == id).values(**values))

    def ended(self, id: str, state: JobState, failure: str = "", figures: Mapping[str, Any] | None = None) -> None:
        known = {name: figures.get(name) for name in ("requests", *FIGURES)} if figures else {}
        with self.database.begin() as connection:
            values = {"state": state, "failure": failure, "ended_s": time.time(), **known}
            connection.execute(update(JOBS).where(JOBS.c.id == id).values(**values))

    def cancel_queued(self, id: str) -> bool:
        """False where it was not queued."""
        with self.database.begin() as connection:
            waiting = (JOBS.c.id == id) & (JOBS.c.state == JobState.QUEUED)
            done = connection.execute(update(JOBS).where(waiting).values(state=JobState.CANCELLED, ended_s=time.time()))
            return bool(done.rowcount)

    def forget(self, id: str, beside: Callable[[], None]) -> bool:
        """A job that has ended; False where it has not. `beside` belongs to it: what that raises leaves the job as it was."""
        with self.database.begin() as connection:
            over = (JOBS.c.id == id) & JOBS.c.state.not_in([JobState.QUEUED, JobState.RUNNING])
            if not connection.execute(delete(JOBS).where(over)).rowcount:
                return False
            connection.execute(delete(TAGS).where(TAGS.c.job == id))
            beside()
            return True

    def recover(self, but: Collection[str] = ()) -> int:
        """What is said to run, `but` for what does, is queued again: it ran when the lab ended, or nobody heard that it was to run. How
        many."""
        with self.database.begin() as connection:
            values = {"state": JobState.QUEUED, "started_s": None}
            lost = (JOBS.c.state == JobState.RUNNING) & JOBS.c.id.not_in(list(but))
            return int(connection.execute(update(JOBS).where(lost).values(**values)).rowcount)

    def tags(self) -> list[str]:
        with self.database.read() as connection:
            return list(connection.execute(select(TAGS.c.tag).distinct().order_by(TAGS.c.tag)).scalars())

    def add_upload(self, upload: Upload) -> Upload:
        """The one of that name: another's, where there was one."""
        with self.database.begin() as connection:
            there = connection.execute(select(UPLOADS).where(UPLOADS.c.name == upload.name)).mappings().first()
            if there is not None:
                return Upload(**there)
            values = {name: getattr(upload, name) for name in Upload.__slots__}
            connection.execute(insert(UPLOADS).values(**values))
        return upload

    def drop_upload(self, name: str, beside: Callable[[], None]) -> Upload | None:
        """None where there is none. Raises UsageError while a job that has not ended names it."""
        with self.database.begin() as connection:
            there = connection.execute(select(UPLOADS).where(UPLOADS.c.name == name)).mappings().first()
            if there is None:
                return None
            alive = JOBS.c.state.in_([JobState.QUEUED, JobState.RUNNING]) & JOBS.c.asked.contains(json.dumps(name), autoescape=True)
            users = list(connection.execute(select(JOBS.c.id).where(alive).limit(5)).scalars())
            if users:
                raise UsageError(f"{name}: {', '.join(users)} will read it; wait until they have ended, or cancel them")
            connection.execute(delete(UPLOADS).where(UPLOADS.c.name == name))
            beside()
            return Upload(**there)

    def uploads(self) -> list[Upload]:
        with self.database.read() as connection:
            return [Upload(**row) for row in connection.execute(select(UPLOADS).order_by(UPLOADS.c.name)).mappings()]

    def _tag(self, connection: Any, id: str, tags: Sequence[str]) -> None:
        there = self._tags(connection, [id]).get(id, ())
        for tag in dict.fromkeys(tags):
            if tag not in there:
                connection.execute(insert(TAGS).values(job=id, tag=tag))

    def _one(self, connection: Any, id: str) -> JobRow | None:
        row = connection.execute(select(JOBS).where(JOBS.c.id == id)).mappings().first()
        return None if row is None else _row(row, self._tags(connection, [id]).get(id, ()))

    def _tags(self, connection: Any, ids: Iterable[str]) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for job, tag in connection.execute(select(TAGS.c.job, TAGS.c.tag).where(TAGS.c.job.in_(list(ids))).order_by(TAGS.c.tag)):
            found[job] = (*found.get(job, ()), tag)
        return found


def _conditions(wanted: JobFilter) -> list[Any]:
    found = [JOBS.c[name] == value for name in ("kind", "state", "policy", "model") if (value := getattr(wanted, name))]
    if wanted.tag:
        found.append(JOBS.c.id.in_(select(TAGS.c.job).where(TAGS.c.tag == wanted.tag)))
    if wanted.text:
        parts = [JOBS.c[name].icontains(wanted.text, autoescape=True) for name in ("name", "policy", "model", "id")]
        found.append(parts[0] | parts[1] | parts[2] | parts[3])
    return found


def _values(order: JobOrder) -> dict[str, Any]:
    named = {name: getattr(order, name) for name in ("id", "kind", "name", "policy", "model", "seeds")}
    rest = {"state": JobState.QUEUED, "submitted_s": time.time(), "deaths": 0, "failure": ""}
    return {**named, **rest, "asked": json.dumps(order.asked)}


def _row(row: Mapping[str, Any], tags: tuple[str, ...]) -> JobRow:
    order = JobOrder(row["id"], JobKind(row["kind"]), row["name"], row["policy"], row["model"], row["seeds"], json.loads(row["asked"]))
    figures = {name: row[name] for name in FIGURES}
    own = {name: row[name] for name in ("submitted_s", "started_s", "ended_s", "deaths", "failure", "requests")}
    return JobRow(order, JobState(row["state"]), figures=figures, tags=tags, **own)
