"""Runs what is queued, as many at once as there are slots: a thread that waits for its processes' words.

An experiment takes a slot; what is many runs takes all that are free when its turn comes. A job whose process died, or has said nothing for
long, is run again once.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from pdlab.lab.bounded import BoundedProcess
from pdlab.lab.database import DatabaseAway
from pdlab.lab.feed import JobFeed
from pdlab.lab.job import JobPlace, perform
from pdlab.lab.store import JobKind, JobRow, JobState, LabStore
from pdlab.search.pool import MOST_ATTEMPTS

logger = logging.getLogger(__name__)
LOOK_S = 0.5  # between looks at time and memory
AGAIN_S = 1.0  # after which a database that did not answer is asked again


@dataclass(frozen=True, slots=True)
class JobLimits:
    """Of each job; `silence_s` of what lies between two of its words."""

    time_s: float = 3600.0
    rss_bytes: float = 8 << 30
    silence_s: float = 1800.0


@dataclass(slots=True, eq=False)
class RunningJob:
    row: JobRow
    process: BoundedProcess
    slots: int
    began_s: float
    heard_s: float


@dataclass(slots=True)
class Foreman:
    """`slots` processes; `folder` is where each job has a folder of its own."""

    store: LabStore
    feed: JobFeed
    context: ForkServerContext
    folder: Path
    uploads: Path
    slots: int
    limits: JobLimits
    ray: str | None = None
    running: dict[str, RunningJob] = field(default_factory=dict)
    to_cancel: set[str] = field(default_factory=set)
    unsaved: list[tuple[str, JobState, str, dict[str, Any]]] = field(default_factory=list)
    trouble: str = ""
    _stopping: bool = False
    _thread: threading.Thread | None = None
    _wake: tuple[Connection, Connection] = field(default_factory=lambda: Pipe(duplex=False))

    def start(self) -> None:
        """Raises DatabaseAway."""
        self.store.recover()
        self._thread = threading.Thread(target=self._work, name="foreman")
        self._thread.start()

    def stop(self) -> None:
        """What runs is ended, and queued when the lab starts again."""
        self._stopping = True
        self.nudge()
        if self._thread is not None:
            self._thread.join()

    def nudge(self) -> None:
        """There is something to do."""
        with suppress(OSError):
            self._wake[1].send_bytes(b".")

    def cancel(self, id: str) -> bool:
        """False where it neither waits nor runs. Raises DatabaseAway."""
        if self.store.cancel_queued(id):
            self.feed.forget(id)
            return True
        if id not in self.running:
            return False
        self.to_cancel.add(id)
        self.nudge()
        return True

    def folder_of(self, id: str) -> Path:
        return self.folder / id

    def _work(self) -> None:
        while not self._stopping:
            patience_s = LOOK_S
            try:
                self._save()
                if self.trouble:  # what it was asked last it may have done, and not been heard
                    self.store.recover(but=self.running)
                self._admit()
                self.trouble = ""
                patience_s = LOOK_S if self.running or self.unsaved else 60.0
            except DatabaseAway as away:
                if not self.trouble:
                    logger.warning("%s; nothing is lost, and it is asked again", away)
                self.trouble, patience_s = str(away), AGAIN_S
            self._listen(patience_s)
        for job in list(self.running.values()):
            job.process.kill()
        with suppress(DatabaseAway):
            self._save()

    def _listen(self, patience_s: float) -> None:
        pipes = {job.process.pipe: job for job in self.running.values()}
        for pipe in wait([self._wake[0], *pipes], patience_s):
            assert isinstance(pipe, Connection), "only pipes are waited for"
            if pipe is self._wake[0]:
                pipe.recv_bytes()
            else:
                self._hear(pipes[pipe])
        for job in list(self.running.values()):
            self._bound(job)

    def _hear(self, job: RunningJob) -> None:
        id = job.row.order.id
        try:
            kind, said = job.process.pipe.recv()
        except (EOFError, OSError):
            self._died(job)
            return
        if kind == "news":
            job.heard_s = time.monotonic()
            self.feed.put(id, {"progress": said, "heard_s": time.time()})
        elif kind == "done":
            self._end(job, JobState.DONE, "", said)
        else:
            self._end(job, JobState.FAILED, said)

    def _bound(self, job: RunningJob) -> None:
        id, limits, now = job.row.order.id, self.limits, time.monotonic()
        if id not in self.running:
            return
        if id in self.to_cancel:
            self._end(job, JobState.CANCELLED, "")
        elif now - job.heard_s > limits.silence_s:
            self._drop(job)
            self._again(job.row, f"said nothing for {limits.silence_s:g} s")
        elif now - job.began_s > limits.time_s:
            self._end(job, JobState.FAILED, f"it took longer than {limits.time_s:g} s: ask for less, or start the lab with --job-time-s")
        elif job.process.rss_bytes > limits.rss_bytes:
            most = f"{limits.rss_bytes / 2**30:g} GiB"
            self._end(job, JobState.FAILED, f"it took more than {most} of memory: ask for less, or start the lab with --job-gib")

    def _died(self, job: RunningJob) -> None:
        reason = job.process.how_it_ended()
        self._drop(job)
        self._again(job.row, reason)

    def _again(self, row: JobRow, reason: str) -> None:
        """Once more, or no more."""
        deaths = row.deaths + 1
        if deaths < MOST_ATTEMPTS:
            self.unsaved.append((row.order.id, JobState.QUEUED, "", {}))
        else:
            self.unsaved.append((row.order.id, JobState.FAILED, f"its process {reason}, {deaths} times", {}))

    def _end(self, job: RunningJob, state: JobState, failure: str, figures: dict[str, Any] | None = None) -> None:
        self._drop(job)
        self.unsaved.append((job.row.order.id, state, failure, figures or {}))

    def _drop(self, job: RunningJob) -> None:
        job.process.kill()
        self.to_cancel.discard(job.row.order.id)
        del self.running[job.row.order.id]

    def _save(self) -> None:
        """What has ended is known here until the database has it. Raises DatabaseAway."""
        while self.unsaved:
            id, state, failure, figures = self.unsaved[0]
            if state is JobState.QUEUED:
                self.store.requeue(id, died=True)
            else:
                self.store.ended(id, state, failure, figures)
            self.unsaved.pop(0)
            self.feed.forget(id)

    def _admit(self) -> None:
        """Raises DatabaseAway."""
        while (free := self.slots - sum(job.slots for job in self.running.values())) > 0 and (row := self.store.next_queued()):
            one_run = row.order.kind is JobKind.EXPERIMENT and row.order.seeds == 1
            slots = 1 if one_run else free
            folder = self.folder_of(row.order.id)
            if one_run:
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off; journals are kept
            try:
                process = BoundedProcess(self.context, perform, row.order, JobPlace(folder, self.uploads, slots, self.ray))
            except (OSError, EOFError) as error:  # no memory, no files, or whoever starts processes has died
                self._again(row, f"could not be started ({error or type(error).__name__})")
                return
            began_s = time.monotonic()
            self.running[row.order.id] = RunningJob(row, process, slots, began_s, began_s)
            self.feed.put(row.order.id, {"progress": {}, "heard_s": time.time()})
