"""Batches as the database has them: their states, their lines, and the result of every line that has ended."""

import contextlib
import secrets
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson


class Status(StrEnum):
    """As in the OpenAI API."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


UNFINISHED = (Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING)
_TIMES: dict[Status, str] = {status: f"{status}_s" for status in Status if status is not Status.VALIDATING}


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One batch; times are Unix times."""

    place: int  # its number in the database
    id: str
    tenant: str
    status: Status
    endpoint: str
    input_file: str
    completion_window: str
    metadata: dict[str, str] | None
    output_lifetime_s: int | None
    errors: list[dict[str, Any]] | None
    output_file: str | None
    error_file: str | None
    num_total: int
    num_completed: int
    num_failed: int
    created_s: int
    expires_s: int
    times_s: dict[Status, int | None]  # when it got into the states behind the first

    def body(self) -> dict[str, Any]:
        """The batch object of the OpenAI API."""
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": None if self.errors is None else {"object": "list", "data": self.errors},
            "input_file_id": self.input_file,
            "completion_window": self.completion_window,
            "status": self.status.value,
            "output_file_id": self.output_file,
            "error_file_id": self.error_file,
            "created_at": self.created_s,
            "expires_at": self.expires_s,
            **{f"{status}_at": when_s for status, when_s in self.times_s.items()},
            "request_counts": {"total": self.num_total, "completed": self.num_completed, "failed": self.num_failed},
            "metadata": self.metadata,
        }


@dataclass(frozen=True, slots=True)
class Line:
    """Where a request of a batch is in its input file."""

    number: int  # from 1
    start: int  # bytes before it
    num_bytes: int
    custom_id: str


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one line."""

    number: int
    is_good: bool  # answered with a status below 400
    answer: bytes  # the line of the output


def insert_batch(connection: sqlite3.Connection, /, tenant: str, window_s: int, **fields: Any) -> BatchRecord:
    """`fields`: endpoint, input_file, completion_window, metadata, output_lifetime_s."""
    now_s = int(time.time())
    metadata = fields["metadata"]
    values = fields | {
        "id": f"batch_{secrets.token_hex(12)}",
        "tenant": tenant,
        "status": Status.VALIDATING,
        "metadata": None if metadata is None else orjson.dumps(metadata).decode(),
        "created_s": now_s,
        "expires_s": now_s + window_s,
    }
    names = ", ".join(values)
    marks = ", ".join(f":{name}" for name in values)
    connection.execute(f"INSERT INTO batches ({names}) VALUES ({marks})", values)
    record = get_batch(connection, tenant, values["id"])
    assert record is not None
    return record


def get_batch(connection: sqlite3.Connection, tenant: str, batch_id: str) -> BatchRecord | None:
    """None also for another tenant's."""
    row = connection.execute("SELECT * FROM batches WHERE id = ? AND tenant = ?", (batch_id, tenant)).fetchone()
    return None if row is None else _record(row)


def list_batches(
    connection: sqlite3.Connection, tenant: str, after: str | None, limit: int
) -> list[BatchRecord] | None:
    """Up to `limit` batches, the newest first, behind the batch `after`; None if there is no such batch."""
    place = 2**62
    if after is not None:
        found = get_batch(connection, tenant, after)
        if found is None:
            return None
        place = found.place
    query = "SELECT * FROM batches WHERE tenant = ? AND place < ? ORDER BY place DESC LIMIT ?"
    return [_record(row) for row in connection.execute(query, (tenant, place, limit))]


def unfinished_batches(connection: sqlite3.Connection) -> list[BatchRecord]:
    """Of all tenants, the oldest first."""
    marks = ", ".join("?" * len(UNFINISHED))
    query = f"SELECT * FROM batches WHERE status IN ({marks}) ORDER BY place"
    return [_record(row) for row in connection.execute(query, UNFINISHED)]


def set_status(
    connection: sqlite3.Connection, /, place: int, status: Status, from_: Sequence[Status], **fields: Any
) -> BatchRecord:
    """Moves the batch on, and sets other columns with it, if it is in one of the states `from_`; gives it as it is
    then."""
    changes = {"status": status, _TIMES[status]: int(time.time()), **fields}
    names = ", ".join(f"{name} = ?" for name in changes)
    marks = ", ".join("?" * len(from_))
    query = f"UPDATE batches SET {names} WHERE place = ? AND status IN ({marks})"
    connection.execute(query, (*changes.values(), place, *from_))
    return _record(connection.execute("SELECT * FROM batches WHERE place = ?", (place,)).fetchone())


def add_lines(connection: sqlite3.Connection, place: int, lines: Iterable[Line]) -> None:
    rows = [(place, line.number, line.start, line.num_bytes, line.custom_id) for line in lines]
    connection.executemany("INSERT INTO lines VALUES (?, ?, ?, ?, ?)", rows)


def open_lines(connection: sqlite3.Connection, place: int, after: int, limit: int) -> list[Line]:
    """Lines without a result behind line `after`, in order."""
    query = (
        "SELECT number, start, num_bytes, custom_id FROM lines WHERE batch = ?1 AND number > ?2 AND NOT EXISTS "
        "(SELECT 1 FROM results WHERE results.batch = ?1 AND results.number = lines.number) ORDER BY number LIMIT ?3"
    )
    return [Line(*row) for row in connection.execute(query, (place, after, limit))]


def add_results(connection: sqlite3.Connection, place: int, results: Iterable[Result]) -> None:
    """A line that has a result keeps it."""
    num_good = num_bad = 0
    for result in results:
        row = (place, result.number, result.is_good, result.answer)
        is_new = connection.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?)", row).rowcount
        num_good += is_new * result.is_good
        num_bad += is_new * (not result.is_good)
    query = "UPDATE batches SET num_completed = num_completed + ?, num_failed = num_failed + ? WHERE place = ?"
    connection.execute(query, (num_good, num_bad, place))


def get_results(connection: sqlite3.Connection, place: int, after: int, num_bytes: int) -> list[Result]:
    """Results behind line `after`, in the order of the lines: the next one, and more up to about so many bytes."""
    query = "SELECT number, is_good, answer FROM results WHERE batch = ? AND number > ? ORDER BY number"
    results: list[Result] = []
    with contextlib.closing(connection.execute(query, (place, after))) as rows:
        for number, is_good, answer in rows:
            results.append(Result(number, bool(is_good), answer))
            num_bytes -= len(answer)
            if num_bytes < 0:
                break
    return results


def forget_lines(connection: sqlite3.Connection, place: int) -> None:
    """Lines and results of a batch that has been written to files, or begins anew."""
    connection.execute("DELETE FROM lines WHERE batch = ?", (place,))
    connection.execute("DELETE FROM results WHERE batch = ?", (place,))


def _record(row: sqlite3.Row) -> BatchRecord:
    return BatchRecord(
        place=row["place"],
        id=row["id"],
        tenant=row["tenant"],
        status=Status(row["status"]),
        endpoint=row["endpoint"],
        input_file=row["input_file"],
        completion_window=row["completion_window"],
        metadata=None if row["metadata"] is None else orjson.loads(row["metadata"]),
        output_lifetime_s=row["output_lifetime_s"],
        errors=None if row["errors"] is None else orjson.loads(row["errors"]),
        output_file=row["output_file"],
        error_file=row["error_file"],
        num_total=row["num_total"],
        num_completed=row["num_completed"],
        num_failed=row["num_failed"],
        created_s=row["created_s"],
        expires_s=row["expires_s"],
        times_s={status: row[column] for status, column in _TIMES.items()},
    )
