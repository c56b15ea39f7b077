"""The lab's database: where it is, that its schema is ours, and that one lab alone uses it.

SQLite beside the results by default, in WAL mode, so that readers never wait for the one who writes; or `postgresql://`.
"""

from __future__ import annotations

import fcntl
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from pdlab.core.types import UsageError
from pdlab.lab.tables import METADATA

MIGRATIONS = Path(__file__).parent / "migrations"
VERSION = "alembic_version"  # the table in which a schema has its number
BUSY_S = 5.0  # that a call waits for a lock
_ALONE = 0x70646C61_62  # "pdlab", the advisory lock's number


class DatabaseAway(Exception):
    """It does not answer, or is locked; what has been written is kept. The line says why."""


class Database:
    """An engine, and the lock that keeps a second lab out. Raises UsageError where there can be none."""

    def __init__(self, url: str) -> None:
        self.url = _with_driver(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self._lock: IO[bytes] | Any = None
        self.engine = _engine(self.url, self.sqlite)
        self._readers = self.engine.execution_options(reads=True)
        self._writing = threading.Lock()
        try:
            self._lock = self._only_user()
            self._migrate()
        except DatabaseAway as away:
            self.close()
            raise UsageError(f"{self.shown}: {away}; give another with --db") from None
        except BaseException:
            self.close()
            raise

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return str(self.url.render_as_string(hide_password=True)).replace("postgresql+psycopg:", "postgresql:")

    @contextmanager
    def begin(self) -> Iterator[Any]:
        """A transaction that writes, one after the other. Raises DatabaseAway."""
        with self._writing, told(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Any]:
        """A transaction that only reads, and waits for nobody. Raises DatabaseAway."""
        with told(), self._readers.begin() as connection:
            yield connection

    def close(self) -> None:
        if self._lock is not None:
            with suppress(SQLAlchemyError):
                if not self.sqlite:  # at once, and not when the server sees that we have gone
                    cast(Any, self._lock).execute(text(f"select pg_advisory_unlock({_ALONE})"))
                self._lock.close()
        self.engine.dispose()

    def _only_user(self) -> IO[bytes] | Any:
        if self.sqlite:
            return None if self.url.database in (None, ":memory:") else _locked(Path(str(self.url.database)))
        with told():
            connection = self.engine.connect()
            given_up_s = time.monotonic() + BUSY_S
            while not connection.execute(text(f"select pg_try_advisory_lock({_ALONE})")).scalar():
                if time.monotonic() < given_up_s:  # of a lab that was killed, the server may not know yet
                    time.sleep(0.1)
                    continue
                connection.close()
                raise UsageError(f"{self.shown}: another pdlab lab uses it; stop that one, or give another database with --db")
            connection.commit()
            return connection

    def _migrate(self) -> None:
        """To the newest schema, in one transaction."""
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        script = ScriptDirectory.from_config(config)

        def upgrade(revision: Any, _: Any) -> Any:
            return script._upgrade_revs("head", revision)

        try:
            with self.begin() as connection, EnvironmentContext(config, script, fn=upgrade) as environment:
                self._check_tables(set(inspect(connection).get_table_names()))
                environment.configure(connection=connection)
                environment.run_migrations()
        except CommandError as error:
            raise UsageError(
                f"{self.shown}: its schema is none that this pdlab knows ({error}): a newer pdlab has used it, so take that one, or give "
                "another database with --db; nothing was changed"
            ) from None

    def _check_tables(self, there: set[str]) -> None:
        """A server's database may be shared, under other names; a file is the lab's alone. Raises UsageError."""
        others = set() if VERSION in there else there if self.sqlite else there & set(METADATA.tables)
        if others:
            names = ", ".join(sorted(others)[:5])
            raise UsageError(f"{self.shown}: it has tables ({names}) that are no lab's; give another with --db; nothing was changed")


@contextmanager
def told() -> Iterator[None]:
    """What a driver raises, as DatabaseAway."""
    try:
        yield
    except PoolTimeout as error:
        raise DatabaseAway("the database does not answer (all connections wait)") from error
    except DBAPIError as error:
        why = str(error.orig).strip().partition("\n")[0]
        raise DatabaseAway(f"the database does not answer ({why})") from error


def _with_driver(url: str) -> Any:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        shown = re.sub(r"//.*@", "//***@", url)
        raise UsageError(f"--db {shown}: write sqlite:///path/lab.db, or postgresql://user@host/database") from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise UsageError(f"--db {parsed.drivername}: write sqlite:///path/lab.db, or postgresql://user@host/database")
    return parsed


def _engine(url: Any, sqlite: bool) -> Any:
    try:
        if not sqlite:
            return create_engine(url, pool_pre_ping=True, pool_size=10, pool_timeout=BUSY_S, connect_args=_bounds())
        if url.database not in (None, ":memory:"):
            Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, connect_args={"timeout": BUSY_S})
    except (NoSuchModuleError, OSError) as error:
        raise UsageError(f"--db {url.render_as_string(hide_password=True)}: {error}") from None
    event.listen(engine, "connect", _tuned)
    event.listen(engine, "begin", _begun)
    return engine


def _bounds() -> dict[str, Any]:
    """Of PostgreSQL, which waits for a lock, and TCP, which waits for a machine that is gone, for ever otherwise."""
    milliseconds = int(1000 * BUSY_S)
    alive = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 6 * milliseconds}
    return {"connect_timeout": 10, **alive, "options": f"-c lock_timeout={milliseconds} -c statement_timeout={6 * milliseconds}"}


def _tuned(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves: the driver's would begin late
    cursor = connection.cursor()
    cursor.execute("pragma journal_mode=wal")
    cursor.execute("pragma synchronous=normal")
    cursor.close()


def _begun(connection: Any) -> None:
    """Who means to write has the lock from the start, and so never has to begin again."""
    connection.exec_driver_sql("begin" if connection.get_execution_options().get("reads") else "begin immediate")


def _locked(path: Path) -> IO[bytes]:
    try:
        lock = path.with_name(f".{path.name}.lock").open("ab")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give another folder with --out, or another database with --db") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UsageError(f"{path}: another pdlab lab uses it; stop that one, or give another folder with --out") from None
    return lock
