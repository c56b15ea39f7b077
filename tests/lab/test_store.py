"""One contract for what keeps the lab's jobs, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text

from pdlab import UsageError
from pdlab.lab import database as databases
from pdlab.lab.database import Database, DatabaseAway
from pdlab.lab.store import JobFilter, JobKind, JobOrder, JobState, LabStore, Upload
from pdlab.lab.tables import METADATA
from tests.support.postgres import postgres


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'lab.db'}"
        return
    yield request.getfixturevalue("server")
    database = Database(request.getfixturevalue("server"))
    with database.engine.begin() as connection:
        METADATA.drop_all(connection)
        connection.execute(text("drop table alembic_version"))
    database.close()


@pytest.fixture
def store(url: str) -> Iterator[LabStore]:
    database = Database(url)
    yield LabStore(database)
    database.close()


def order(id: str, **changes: Any) -> JobOrder:
    said: dict[str, Any] = {
        "kind": JobKind.EXPERIMENT,
        "name": f"n-{id}",
        "policy": "random",
        "model": "m",
        "seeds": 1,
        "asked": {"x": "ä"},
    }
    return JobOrder(id=id, **{**said, **changes})


def put(store: LabStore, id: str, *tags: str, **changes: Any) -> bool:
    found = store.put(order(id, **changes), tags, 100)
    assert found is not None
    return found[1]


def test_a_job_is_queued_once_run_and_ended(store: LabStore) -> None:
    assert put(store, "a", "t1")
    assert not put(store, "a", "t2", "t1")
    assert put(store, "b")
    first = store.next_queued()
    assert first is not None
    assert (first.order, first.state, first.tags) == (order("a"), JobState.RUNNING, ("t1", "t2"))
    assert first.started_s is not None
    store.ended("a", JobState.DONE, figures={"requests": 10, "slo_attainment": 0.5, "ttft_p99_s": None, "other": 1})
    found = store.get("a")
    assert found is not None
    assert (found.state, found.requests, found.figures["slo_attainment"], found.figures["tpot_p99_s"]) == (JobState.DONE, 10, 0.5, None)
    assert not put(store, "a"), "what is done is not queued again"
    assert store.counts() == {"done": 1, "queued": 1}
    assert store.get("nobody") is None


def test_what_failed_or_was_cancelled_is_queued_anew_when_it_is_submitted_again(store: LabStore) -> None:
    put(store, "a", "kept")
    store.next_queued()
    store.ended("a", JobState.FAILED, "because")
    assert put(store, "a")
    row = store.get("a")
    assert row is not None
    assert (row.state, row.failure, row.tags) == (JobState.QUEUED, "", ("kept",))
    assert store.cancel_queued("a")
    assert not store.cancel_queued("a")
    assert put(store, "a")


def test_what_ran_when_the_lab_ended_is_queued_first_when_it_begins(store: LabStore) -> None:
    for id in "abc":
        put(store, id)
    assert store.next_queued() is not None
    assert store.next_queued() is not None
    store.ended("b", JobState.DONE)
    store.requeue("a", died=True)
    assert store.next_queued() is not None
    assert store.recover() == 1
    row = store.next_queued()
    assert row is not None
    assert (row.order.id, row.deaths) == ("a", 1)


def test_too_many_are_refused_and_nothing_is_kept_of_them(store: LabStore) -> None:
    assert store.put(order("a"), (), 1) is not None
    assert store.put(order("b"), ("t",), 1) is None
    assert store.put(order("a"), (), 1) is not None, "it is there already"
    assert store.get("b") is None
    assert store.tags() == []


def test_lists_are_filtered_sorted_and_paged_and_what_has_no_figure_is_last(store: LabStore) -> None:
    for k, (id, attained) in enumerate([("a", 0.5), ("b", None), ("c", 0.9), ("d", 0.1)]):
        put(store, id, *(["odd"] if k % 2 else []), policy="p%x_" if id == "c" else "random")
        store.next_queued()
        store.ended(id, JobState.DONE, figures={"slo_attainment": attained})
    put(store, "e", kind=JobKind.SWEEP)

    def ids(wanted: JobFilter = JobFilter(kind=JobKind.EXPERIMENT), **how: Any) -> str:  # noqa: B008
        return "".join(row.order.id for row in store.listed(wanted, **how)[0])

    assert ids(sort="slo_attainment") == "cadb"
    assert ids(sort="slo_attainment", descending=False) == "dacb"
    assert ids(sort="name", descending=False, offset=1, limit=2) == "bc"
    assert store.listed(JobFilter(kind=JobKind.EXPERIMENT), limit=1)[1] == 4
    assert ids(JobFilter(tag="odd"), sort="name", descending=False) == "bd"
    assert ids(JobFilter(text="P%X_")) == "c"
    assert ids(JobFilter(text="%")) == "c"
    assert ids(JobFilter(state=JobState.QUEUED)) == "e"
    with pytest.raises(UsageError, match=r"sort 'nme' is not one of"):
        store.listed(JobFilter(), sort="nme")


def test_many_threads_put_one_job_once(store: LabStore) -> None:
    new: list[bool] = []
    threads = [threading.Thread(target=lambda: new.append(put(store, "same", "t"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(new) == [False] * 15 + [True]


def test_an_upload_is_there_once(store: LabStore) -> None:
    one = Upload("x.csv", "trace", 3, "ab", 1.0)
    assert store.add_upload(one) == one
    assert store.add_upload(Upload("x.csv", "trace", 4, "cd", 2.0)) == one
    assert store.uploads() == [one]


def test_a_second_lab_is_refused_and_a_restart_finds_what_was_there(url: str) -> None:
    first = Database(url)
    put(LabStore(first), "a")
    with pytest.raises(UsageError, match=r"another pdlab lab uses it"):
        Database(url)
    first.close()
    again = Database(url)
    assert LabStore(again).get("a") is not None
    again.close()


def test_the_migrations_make_the_tables_that_the_code_knows(store: LabStore) -> None:
    with store.database.engine.connect() as connection:
        there = inspect(connection)
        for table in METADATA.tables.values():
            columns = {column["name"]: column["nullable"] for column in there.get_columns(table.name)}
            assert columns == {column.name: column.nullable for column in table.columns}
            assert {index["name"] for index in there.get_indexes(table.name)} >= {index.name for index in table.indexes}
        assert MigrationContext.configure(connection).get_current_revision() == "0001"


def test_a_newer_schema_is_left_as_it_is(url: str) -> None:
    database = Database(url)
    with database.engine.begin() as connection:
        connection.execute(text("update alembic_version set version_num = '9999'"))
    database.close()
    with pytest.raises(UsageError, match=r"a newer pdlab has used it"):
        Database(url)
    engine = database.engine
    with engine.begin() as connection:
        assert connection.execute(text("select version_num from alembic_version")).scalar() == "9999"
        connection.execute(text("update alembic_version set version_num = '0001'"))
    engine.dispose()


def test_a_locked_database_is_told_and_works_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdlab.lab.database.BUSY_S", 0.05)
    database = Database(f"sqlite:///{tmp_path / 'lab.db'}")
    store, other = LabStore(database), sqlite3.connect(tmp_path / "lab.db", isolation_level=None)
    other.execute("begin immediate")
    with pytest.raises(DatabaseAway, match=r"database is locked"):
        put(store, "a")
    assert store.counts() == {}, "who reads waits for nobody"
    other.execute("rollback")
    other.close()
    assert put(store, "a")
    database.close()


def test_a_locked_table_of_a_server_is_told_and_nothing_is_lost(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "BUSY_S", 0.2)
    database = Database(server)
    store, other = LabStore(database), create_engine(server.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with other.begin() as connection:
            connection.execute(text("lock table jobs"))
            with pytest.raises(DatabaseAway, match=r"lock timeout"):
                put(store, "a")
        assert put(store, "a")
    finally:
        other.dispose()
        with database.engine.begin() as connection:
            METADATA.drop_all(connection)
            connection.execute(text("drop table alembic_version"))
        database.close()


def test_what_is_said_to_run_but_does_not_is_queued_again(store: LabStore) -> None:
    for id in ("a", "b"):
        put(store, id)
        store.next_queued()
    assert store.recover(but=["b"]) == 1
    assert {id: row.state for id in ("a", "b") if (row := store.get(id))} == {"a": JobState.QUEUED, "b": JobState.RUNNING}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://x/y", "write sqlite:///"),
        ("nonsense", "write sqlite:///"),
        ("postgresql://u:secret@127.0.0.1:1/x", "does not answer"),
        ("postgresql://u:secret@127.0.0.1:port/x", "write sqlite:///"),
        ("sqlite:////proc/nobody/lab.db", "No such file"),
    ],
)
def test_a_database_that_is_none_is_told_in_a_line_without_its_password(url: str, said: str) -> None:
    with pytest.raises(UsageError) as told:
        Database(url)
    assert said in str(told.value)
    assert "secret" not in str(told.value)
    assert "\n" not in str(told.value)


def test_a_database_of_something_else_is_told_and_left_as_it_is(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("create table jobs (x int)")
    other.commit()
    with pytest.raises(
        UsageError, match=r"other.db: it has tables \(jobs\) that are no lab's; give another with --db; nothing was changed"
    ):
        Database(f"sqlite:///{tmp_path / 'other.db'}")
    assert other.execute("select name from sqlite_master").fetchall() == [("jobs",)]
    other.close()
