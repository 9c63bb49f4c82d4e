"""A SQL database asked from the event loop: opened by URL, one thread, one kind of silence.

Every piece of work is one transaction. A database that cannot be reached, is damaged, has no room,
or does not answer in time, is RegistryDown whatever its driver calls it. A SQLite file is opened
for each transaction, so that one which was removed or replaced meanwhile is seen to be.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, NullPool, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from serve.errors import RegistryDown, SettingsError

T = TypeVar("T")

ANSWER_TIMEOUT_S = 15.0
# The database gives up before we do, so that no statement of ours takes effect after its refusal.
SQLITE_WAIT_S, SQLITE_RETRY_S = 5.0, 0.01
COMMIT_S = 2.0  # that are left for it, or nothing is committed: its caller may have gone
SMALLEST_PAGE = 512  # of SQLite's: its files are whole pages
IN_MEMORY = (None, "", ":memory:")
REMEDY = "`quantserve registry check` says more, `quantserve registry restore` puts it right"
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
POSTGRES = {
    "connect_timeout": 5,
    "application_name": "quantserve",
    "options": "-c statement_timeout=8000 -c lock_timeout=5000",
    "keepalives_idle": 5,
    "tcp_user_timeout": 10_000,
}


class Database:
    """Transactions on a thread of their own: SQLite has one writer, and a hang holds one thread.

    `file` is SQLite's, None for any other.
    """

    def __init__(self, url: str) -> None:
        parsed = checked(url)
        self._closed = False
        self.was_there = False  # then SQLite must not make a new one
        self.file = _file(parsed)
        self.name = str(self.file or parsed.render_as_string(hide_password=True))
        self._engine = _engine(parsed)
        if self.local:
            event.listen(self._engine, "connect", self._sqlite_connected)
        self._thread = ThreadPoolExecutor(1, "registry")

    @property
    def local(self) -> bool:
        """Whether it is this machine's own, so that its silence is no network's."""
        return self._engine.dialect.name == "sqlite"

    async def read(self, work: Callable[[Connection], T]) -> T:
        """What `work` finds, in one transaction. RegistryDown when there is no answer."""
        return await self._run(work, writes=False)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Like `read`, holding the writer's lock where the database has one."""
        return await self._run(work, writes=True)

    def _look(self) -> None:
        """SQLite makes a new database where it finds nothing: not where there was one."""
        if self.file is None:
            return
        if not self.was_there:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            return
        size = self.file.stat().st_size if self.file.is_file() else 0
        if not size or size % SMALLEST_PAGE:
            gone = "cut short" if size else "empty" if self.file.exists() else "gone"
            raise RegistryDown(f"the adapter registry {self.name} is {gone}: {REMEDY}")

    def _sqlite_connected(self, connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions begin below, not inside the driver
        connection.execute(f"PRAGMA busy_timeout={SQLITE_WAIT_S * 1000:.0f}")
        if not self.was_there:  # the file remembers it; and another's is not to be changed
            _write_ahead(connection)
        connection.execute("PRAGMA synchronous=FULL")

    def close(self) -> None:
        """Begin nothing more; what runs ends first, and gives its connection back to be closed."""
        if self._closed:
            return
        self._closed = True
        self._thread.submit(self._engine.dispose)
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[Connection], T], *, writes: bool) -> T:
        end = time.monotonic() + ANSWER_TIMEOUT_S

        def transaction() -> T:
            if self._closed or time.monotonic() > end:  # it waited, and its caller has gone
                raise TimeoutError
            self._look()
            connecting = self._engine.connect().execution_options(writes=writes)
            with connecting as connection, connection.begin():
                found = work(connection)
                if time.monotonic() > end - min(COMMIT_S, ANSWER_TIMEOUT_S / 2):
                    raise TimeoutError  # which takes everything back
                return found

        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)
        except TimeoutError as fault:
            silence = f"the adapter registry has not answered for {ANSWER_TIMEOUT_S:g} s"
            raise RegistryDown(silence) from fault
        except (SQLAlchemyError, sqlite3.Error, OSError) as fault:
            raise _down(fault, self.name) from fault


def _down(fault: Exception, name: str) -> RegistryDown:
    """Whatever a driver or the disk says, under the one name, with what to do about damage."""
    cause = fault.orig if isinstance(fault, DBAPIError) else fault
    told = " ".join(str(cause).split())
    if getattr(cause, "sqlite_errorcode", 0) & 0xFF in DAMAGED:
        return RegistryDown(f"the adapter registry {name} is damaged ({told}): {REMEDY}")
    if isinstance(fault, DBAPIError) and fault.connection_invalidated:
        return RegistryDown(f"the adapter registry went away: {told}")
    return RegistryDown(f"the adapter registry does not answer: {told}")


def checked(url: str) -> URL:
    """The URL with the driver we use. SettingsError when it is neither SQLite nor PostgreSQL."""
    try:
        parsed = make_url(url)
    except ArgumentError as fault:
        raise SettingsError(f"database_url: {fault}") from fault
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql", "postgres"):
        raise SettingsError(
            f"database_url: {parsed.drivername!r} is not known; give sqlite:///FILE or "
            "postgresql://USER:PASSWORD@HOST/DATABASE"
        )
    return parsed.set(drivername="sqlite" if backend == "sqlite" else "postgresql+psycopg")


def _file(parsed: URL) -> Path | None:
    """SQLite's, unless its name is a URI of its own, or it is kept in memory."""
    name = parsed.database if parsed.drivername == "sqlite" else None
    return None if name in IN_MEMORY or name.startswith("file:") else Path(name)


def _engine(parsed: URL) -> Engine:
    if parsed.drivername == "sqlite":
        engine = create_engine(parsed, poolclass=None if parsed.database in IN_MEMORY else NullPool)
        event.listen(engine, "begin", _sqlite_begin)
        return engine
    theirs = parsed.query.get("options", "")  # of libpq: a search_path, say
    args = {**POSTGRES, "options": f"{POSTGRES['options']} {theirs}"}
    try:
        return create_engine(parsed, pool_pre_ping=True, connect_args=args)
    except ImportError as fault:
        raise SettingsError(
            "database_url: PostgreSQL needs psycopg: pip install 'quantserve[postgres]'"
        ) from fault


def _write_ahead(connection: Any) -> None:
    """Switches the file to a write-ahead log. Of several that do so at once all but one are told
    right away that it is locked: for this SQLite does not wait, whatever its busy timeout."""
    end = time.monotonic() + SQLITE_WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as fault:
            if fault.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(SQLITE_RETRY_S)
        else:
            return


def _sqlite_begin(connection: Connection) -> None:
    """A writer takes its lock first: one that began by reading could not wait for it."""
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
