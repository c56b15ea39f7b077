"""Whoever runs the jobs goes on where one cannot be started, and where the database did and did not say so."""

from __future__ import annotations

from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from pdlab.lab import foreman as module
from pdlab.lab.bounded import forkserver
from pdlab.lab.database import Database, DatabaseAway
from pdlab.lab.feed import JobFeed
from pdlab.lab.foreman import Foreman, JobLimits
from pdlab.lab.store import JobKind, JobOrder, JobRow, JobState, LabStore
from tests.support.waiting import until

ORDER = JobOrder("a" * 16, JobKind.EXPERIMENT, "n", "random", "m", 1, {"experiment": {}, "seeds": 1, "options": {}})


class Refused:
    """In place of a process."""

    def __init__(self, *_: Any) -> None:
        raise OSError(24, "Too many open files")


def foreman(folder: Path, store: LabStore) -> Foreman:
    return Foreman(store, JobFeed(), forkserver(), folder, folder, 1, JobLimits())


def test_a_job_that_cannot_be_started_is_tried_twice_and_others_get_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BoundedProcess", Refused)
    database = Database(f"sqlite:///{tmp_path / 'lab.db'}")
    store = LabStore(database)
    store.put(ORDER, (), 9)
    one = foreman(tmp_path, store)
    one.start()
    until(lambda: (row := store.get(ORDER.id)) is not None and row.state is JobState.FAILED)
    row = store.get(ORDER.id)
    assert row is not None and row.failure == "its process could not be started ([Errno 24] Too many open files), 2 times"
    one.stop()
    database.close()


class Silent:
    """A process that says nothing."""

    rss_bytes = 0

    def __init__(self, *_: Any) -> None:
        self.pipe, self._theirs = Pipe()

    def kill(self) -> None:
        self.pipe.close()
        self._theirs.close()


def test_a_job_that_says_nothing_for_long_is_run_again_once_and_tells_since_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BoundedProcess", Silent)
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    database = Database(f"sqlite:///{tmp_path / 'lab.db'}")
    store = LabStore(database)
    store.put(ORDER, (), 9)
    one = Foreman(store, JobFeed(), forkserver(), tmp_path, tmp_path, 1, JobLimits(silence_s=0.1))
    heard = set[float]()

    def failed() -> bool:
        heard.add(one.feed.get(ORDER.id).get("heard_s", 0.0))
        row = store.get(ORDER.id)
        return row is not None and row.state is JobState.FAILED

    one.start()
    until(failed)
    row = store.get(ORDER.id)
    assert row is not None and (row.deaths, row.failure) == (1, "its process said nothing for 0.1 s, 2 times")
    assert max(heard) > row.submitted_s
    one.stop()
    database.close()


class Unheard(LabStore):
    """Once, what it was asked is done, and the answer is lost on its way."""

    lost = 0

    def next_queued(self) -> JobRow | None:
        row = super().next_queued()
        if row is not None and not self.lost:
            self.lost += 1
            raise DatabaseAway("the connection was lost")
        return row


def test_a_job_whose_beginning_nobody_heard_of_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BoundedProcess", Refused)
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    database = Database(f"sqlite:///{tmp_path / 'lab.db'}")
    store = Unheard(database)
    store.put(ORDER, (), 9)
    one = foreman(tmp_path, store)
    one.start()
    until(lambda: (row := store.get(ORDER.id)) is not None and row.state is JobState.FAILED)
    assert store.lost == 1
    one.stop()
    database.close()
