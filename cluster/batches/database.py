"""The SQLite file that files and batches are kept in, and the thread that talks to it."""

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

FILE_NAME = "batches.sqlite"
BUSY_TIMEOUT_S = 30.0  # for a process that writes at the same time
_VERSION = 1  # of the tables below
_SCHEMA = """
CREATE TABLE files (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, purpose TEXT NOT NULL,
    name TEXT NOT NULL, num_bytes INTEGER NOT NULL, created_s INTEGER NOT NULL, expires_s INTEGER
);
CREATE INDEX files_of_tenants ON files (tenant, place);
CREATE TABLE batches (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, status TEXT NOT NULL,
    endpoint TEXT NOT NULL, input_file TEXT NOT NULL, completion_window TEXT NOT NULL, metadata TEXT,
    output_lifetime_s INTEGER, errors TEXT, output_file TEXT, error_file TEXT,
    num_total INTEGER NOT NULL DEFAULT 0, num_completed INTEGER NOT NULL DEFAULT 0,
    num_failed INTEGER NOT NULL DEFAULT 0, created_s INTEGER NOT NULL, expires_s INTEGER NOT NULL,
    in_progress_s INTEGER, finalizing_s INTEGER, completed_s INTEGER, failed_s INTEGER, expired_s INTEGER,
    cancelling_s INTEGER, cancelled_s INTEGER
);
CREATE INDEX batches_of_tenants ON batches (tenant, place);
CREATE INDEX batches_by_status ON batches (status);
CREATE TABLE lines (
    batch INTEGER NOT NULL, number INTEGER NOT NULL, start INTEGER NOT NULL, num_bytes INTEGER NOT NULL,
    custom_id TEXT NOT NULL, PRIMARY KEY (batch, number)
) WITHOUT ROWID;
CREATE TABLE results (
    batch INTEGER NOT NULL, number INTEGER NOT NULL, is_good INTEGER NOT NULL, answer BLOB NOT NULL,
    PRIMARY KEY (batch, number)
);
"""

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger("manta.batches")


class StorageError(Exception):
    """The folder of batches cannot be used as it is now; the message is one sentence."""


def storage_error(folder: Path, error: OSError | sqlite3.Error) -> StorageError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return StorageError(f"the folder of --batch-dir, {folder}, cannot be used: {reason}")


def open_folder(folder: Path) -> None:
    """Makes the folder, for this user alone, and looks whether files can be written there. Raises StorageError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "files").mkdir(exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"-")
        probe.unlink()
    except OSError as error:
        raise storage_error(folder, error) from None


class Database:
    """Runs functions of a connection one after the other in a thread of their own: SQLite waits for disks and for other
    processes. Any number of processes may have one of the same folder.

    Nothing that has begun is taken back when its caller is cancelled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Raises StorageError."""
        await self._run(self._connect)

    async def close(self) -> None:
        """What was called before is done first."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown(wait=False)

    async def read(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **words: P.kwargs
    ) -> T:
        """`function(connection, ...)`, which sees one state of the database. Raises StorageError."""
        return await self._run(lambda: self._transact("BEGIN", lambda found: function(found, *args, **words)))

    async def write(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **words: P.kwargs
    ) -> T:
        """`function(connection, ...)` as one transaction, which is on the disk when this returns. Raises
        StorageError."""
        return await self._run(lambda: self._transact("BEGIN IMMEDIATE", lambda found: function(found, *args, **words)))

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (OSError, sqlite3.Error) as error:
            raise storage_error(self.folder, error) from None

    def _transact(self, begin: str, function: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._connection
        if connection is None:
            raise sqlite3.ProgrammingError("it is closed")
        connection.execute(begin)
        try:
            result = function(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return result

    def _connect(self) -> None:
        connection = sqlite3.connect(self.folder / FILE_NAME, BUSY_TIMEOUT_S, isolation_level=None)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # what was answered outlives a loss of power
            connection.execute("BEGIN IMMEDIATE")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise sqlite3.DatabaseError(f"{FILE_NAME} is of another version of Manta ({version}, not {_VERSION})")
            if version == 0:
                for statement in _SCHEMA.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
