"""Files that clients have uploaded, and those that batches have written: a row of the database and a file each."""

import contextlib
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

Purpose = Literal["batch", "batch_output"]
ABANDONED_S = 3600.0  # what has no row after so long belongs to an upload that was cut off
_ALIVE = "(expires_s IS NULL OR expires_s > :now_s)"
_UNFINISHED = "('validating', 'in_progress', 'finalizing', 'cancelling')"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file; times are Unix times."""

    id: str
    tenant: str
    purpose: str
    name: str
    num_bytes: int
    created_s: int
    expires_s: int | None = None

    def body(self) -> dict[str, Any]:
        """The file object of the OpenAI API."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_s,
            "expires_at": self.expires_s,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class FileInUseError(Exception):
    """An unfinished batch reads the file; the message is the id of the batch."""


class QuotaError(Exception):
    """The tenant's files would hold more bytes than it may have."""


def new_file_id() -> str:
    return f"file-{secrets.token_hex(12)}"


def content_path(folder: Path, file_id: str) -> Path:
    """Where its bytes are. Only for ids that the database knows."""
    return folder / "files" / file_id


class NewFile:
    """A file that is being written; it has a name of its own until `finish`. Leaving the block removes what is not
    finished."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        self.id = new_file_id()
        self.num_bytes = 0
        self._path = content_path(folder, self.id)
        self._part = self._path.with_name(f"{self.id}.part")
        self._file = self._part.open("xb")

    def write(self, pieces: Iterable[bytes]) -> None:
        """Raises OSError."""
        for piece in pieces:
            self._file.write(piece)
            self.num_bytes += len(piece)

    def finish(self) -> None:
        """What was written is on the disk when this returns. Raises OSError."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.rename(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # what was not written because the disk is full cannot be flushed
            self._file.close()
        self._part.unlink(missing_ok=True)


def insert_file(connection: sqlite3.Connection, record: FileRecord) -> None:
    connection.execute(
        "INSERT INTO files (id, tenant, purpose, name, num_bytes, created_s, expires_s) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (record.id, record.tenant, record.purpose, record.name, record.num_bytes, record.created_s, record.expires_s),
    )


def insert_upload(connection: sqlite3.Connection, record: FileRecord, max_tenant_bytes: int) -> None:
    """Raises QuotaError."""
    if num_bytes_of(connection, record.tenant) + record.num_bytes > max_tenant_bytes:
        raise QuotaError
    insert_file(connection, record)


def num_bytes_of(connection: sqlite3.Connection, tenant: str) -> int:
    """Of all files of a tenant, those that batches have written included."""
    query = "SELECT COALESCE(SUM(num_bytes), 0) FROM files WHERE tenant = ?"
    (num_bytes,) = connection.execute(query, (tenant,)).fetchone()
    return int(num_bytes)


def get_file(connection: sqlite3.Connection, tenant: str, file_id: str) -> FileRecord | None:
    """None also for another tenant's, and for one that has expired."""
    values = {"id": file_id, "tenant": tenant, "now_s": time.time()}
    row = connection.execute(f"SELECT * FROM files WHERE id = :id AND tenant = :tenant AND {_ALIVE}", values).fetchone()
    return None if row is None else _record(row)


def list_files(
    connection: sqlite3.Connection, tenant: str, purpose: str | None, after: str | None, limit: int, newest_first: bool
) -> list[FileRecord] | None:
    """Up to `limit` files behind the file `after` in that order; None if there is no such file."""
    values: dict[str, Any] = {"tenant": tenant, "now_s": time.time(), "limit": limit}
    conditions = ["tenant = :tenant", _ALIVE]
    if purpose is not None:
        conditions.append("purpose = :purpose")
        values["purpose"] = purpose
    if after is not None:
        found = connection.execute("SELECT place FROM files WHERE id = ? AND tenant = ?", (after, tenant)).fetchone()
        if found is None:
            return None
        conditions.append("place < :place" if newest_first else "place > :place")
        values["place"] = found["place"]
    order = "DESC" if newest_first else "ASC"
    query = f"SELECT * FROM files WHERE {' AND '.join(conditions)} ORDER BY place {order} LIMIT :limit"
    return [_record(row) for row in connection.execute(query, values)]


def delete_file(connection: sqlite3.Connection, tenant: str, file_id: str) -> bool:
    """Deletes the row; the content is the caller's. False if there is no such file. Raises FileInUseError."""
    if get_file(connection, tenant, file_id) is None:
        return False
    query = f"SELECT id FROM batches WHERE input_file = ? AND status IN {_UNFINISHED}"
    reader = connection.execute(query, (file_id,)).fetchone()
    if reader is not None:
        raise FileInUseError(reader["id"])
    connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
    return True


def delete_expired(connection: sqlite3.Connection, now_s: float) -> list[str]:
    """Deletes the rows of files whose time is over and which no unfinished batch reads; gives their ids."""
    query = (
        "SELECT id FROM files WHERE expires_s <= ? AND id NOT IN "
        f"(SELECT input_file FROM batches WHERE status IN {_UNFINISHED})"
    )
    ids = [row["id"] for row in connection.execute(query, (now_s,))]
    connection.executemany("DELETE FROM files WHERE id = ?", [(file_id,) for file_id in ids])
    return ids


def file_ids(connection: sqlite3.Connection) -> frozenset[str]:
    """Of all files of all tenants."""
    return frozenset(row["id"] for row in connection.execute("SELECT id FROM files"))


def remove_abandoned(folder: Path, known: Set[str], now_s: float) -> None:
    """Removes contents without a row that nobody writes any more."""
    for path in (folder / "files").iterdir():
        with contextlib.suppress(FileNotFoundError):  # somebody else has been quicker
            if path.name not in known and path.stat().st_mtime < now_s - ABANDONED_S:
                path.unlink()


def remove_contents(folder: Path, file_ids: Sequence[str]) -> None:
    for file_id in file_ids:
        content_path(folder, file_id).unlink(missing_ok=True)


def _record(row: sqlite3.Row) -> FileRecord:
    return FileRecord(
        row["id"], row["tenant"], row["purpose"], row["name"], row["num_bytes"], row["created_s"], row["expires_s"]
    )
