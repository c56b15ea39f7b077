"""A lab's parts, and what its routes ask of them."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import yaml
from starlette.concurrency import run_in_threadpool

from pdlab.core.types import UsageError
from pdlab.lab.bodies import JobDetail, JobView, view_fields
from pdlab.lab.bounded import forkserver
from pdlab.lab.clerk import read_bounded
from pdlab.lab.database import Database
from pdlab.lab.feed import JobFeed
from pdlab.lab.foreman import Foreman
from pdlab.lab.job import CHOICES, POINTS, SEED_FIGURES
from pdlab.lab.settings import LabSettings
from pdlab.lab.store import JobKind, JobRow, JobState, LabStore
from pdlab.lab.submission import Submission, SubmissionReading, check_tags
from pdlab.report.aggregates import AGGREGATES
from pdlab.report.result import REPORT
from pdlab.results.run import SUMMARY
from pdlab.search.board.page import PAGE as BOARD_PAGE
from pdlab.search.plan_store import MANIFEST as PLAN
from pdlab.search.plan_store import PAGE as PLAN_PAGE
from pdlab.search.sweep_store import PAGE as SWEEP_PAGE

PAGES = {
    JobKind.EXPERIMENT: REPORT,
    JobKind.PLAN: PLAN_PAGE,
    JobKind.SWEEP: SWEEP_PAGE,
    JobKind.BOARD: BOARD_PAGE,
}
SUMMARIES = {JobKind.EXPERIMENT: SUMMARY, JobKind.PLAN: PLAN, JobKind.SWEEP: POINTS, JobKind.TUNING: "tune.json"}
MOST_TOLD = 10_000  # jobs whose newest state is at hand for who listens
GONE = ".gone"  # of a folder that is being deleted
KEPT = {AGGREGATES, CHOICES}  # which have an endpoint of their own


class NotThere(Exception):
    """The line says what, and perhaps why."""


class ClusterAway(Exception):
    """Its router does not answer; the line says why."""


class TooMany(Exception):
    """Jobs that wait."""


@dataclass(slots=True)
class Lab:
    settings: LabSettings
    database: Database
    store: LabStore
    feed: JobFeed
    foreman: Foreman
    context: ForkServerContext
    told: dict[str, tuple[int, asyncio.Future[JobView]]] = field(default_factory=dict)
    keeping: threading.Lock = field(default_factory=threading.Lock)  # of uploads: a name is given once

    @classmethod
    def open(cls, settings: LabSettings) -> Lab:
        """Raises UsageError."""
        settings.check()
        uploads, runs = settings.folder / "uploads", settings.folder / "runs"
        try:
            for folder in (uploads, runs):
                folder.mkdir(parents=True, exist_ok=True)
            for folder in runs.glob(f"*{GONE}"):  # of a lab that was killed meanwhile
                shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            raise UsageError(f"--out {settings.folder}: cannot write there ({error.strerror}); give another folder") from None
        database = Database(settings.url)
        store, feed = LabStore(database), JobFeed()
        context = forkserver("pdlab.lab.job", "pdlab.lab.clerk")
        foreman = Foreman(store, feed, context, runs.resolve(), uploads.resolve(), settings.jobs, settings.limits, settings.ray)
        return cls(settings, database, store, feed, foreman, context)

    def close(self) -> None:
        self.foreman.stop()
        self.database.close()

    def read(
        self, kind: JobKind, experiment: str | Mapping[str, Any], seeds: int, changes: Sequence[str], options: Any
    ) -> SubmissionReading:
        """By a clerk. Raises UsageError for options that are none."""
        submission = Submission(kind, experiment, self.foreman.uploads, seeds, tuple(changes), options, self.settings.allow_code)
        return read_bounded(self.context, submission)

    def submit(self, reading: SubmissionReading, tags: Sequence[str]) -> tuple[JobRow, bool]:
        """The job, and whether it is new. Raises UsageError, TooMany, DatabaseAway."""
        assert reading.order is not None, "only what was understood is submitted"
        found = self.store.put(reading.order, check_tags(tags), self.settings.most_queued)
        if found is None:
            raise TooMany(f"{self.settings.most_queued:,} jobs wait already; try again when some have ended")
        if found[1]:
            self.feed.touch(found[0].order.id)
        self.foreman.nudge()
        return found

    def row(self, kind: JobKind | None, id: str) -> JobRow:
        """Raises NotThere, DatabaseAway."""
        row = self.store.get(id) if len(id) == 16 and id.isalnum() else None
        if row is None or (kind is not None and row.order.kind is not kind):
            raise NotThere(f"no {kind or 'job'} has the id {id[:40]!r}")
        return row

    def done(self, kind: JobKind | None, id: str) -> tuple[JobRow, Path]:
        """With the folder of its files. Raises NotThere, DatabaseAway."""
        row = self.row(kind, id)
        if row.state is not JobState.DONE:
            why = f": {row.failure}" if row.failure else ""
            raise NotThere(f"{row.order.kind} {id} is {row.state}, and has no results{why}")
        return row, self.foreman.folder_of(id)

    def forget(self, row: JobRow) -> bool:
        """A job that has ended, and its files. False where it has not. Raises DatabaseAway, and UsageError where its files stay."""
        id = row.order.id
        folder = self.foreman.folder_of(id)
        aside = folder.with_name(f"{id}{GONE}")

        def move() -> None:
            with suppress(FileNotFoundError):
                folder.rename(aside)

        try:
            forgotten = self.store.forget(id, move)
        except BaseException as error:
            if aside.is_dir() and not folder.exists():
                aside.rename(folder)
            if isinstance(error, OSError):
                raise UsageError(f"{folder}: cannot be deleted ({error.strerror})") from None
            raise
        shutil.rmtree(aside, ignore_errors=True)
        self.told.pop(id, None)
        return forgotten

    def view(self, row: JobRow) -> JobView:
        return JobView(**view_fields(row, self.feed.get(row.order.id)))

    async def news(self, id: str) -> JobView:
        """As `view` has it, asked for once however many listen. Raises NotThere, DatabaseAway."""
        version = self.feed.versions.get(id, 0)
        known = self.told.get(id)
        if known is None or known[0] != version:
            if len(self.told) > MOST_TOLD:
                self.told.clear()
            known = self.told[id] = (version, asyncio.ensure_future(run_in_threadpool(lambda: self.view(self.row(None, id)))))
        try:
            return await asyncio.shield(known[1])
        except Exception:
            self.told.pop(id, None)
            raise

    def detail(self, row: JobRow) -> JobDetail:
        folder = self.foreman.folder_of(row.order.id)
        done = row.state is JobState.DONE
        asked = dict(row.order.asked)
        experiment = asked.pop("experiment", None)
        text = "" if experiment is None else yaml.safe_dump(experiment, sort_keys=False, allow_unicode=True, width=110)
        files = sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")) if done and folder.is_dir() else []
        return JobDetail(
            **view_fields(row, self.feed.get(row.order.id)),
            experiment=text,
            asked=asked,
            summary=_json(folder / SUMMARIES.get(row.order.kind, "")) if done else None,
            seed_figures=_json(folder / SEED_FIGURES) if done and row.order.seeds > 1 else None,
            files=[name for name in files if name not in KEPT],
        )


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
