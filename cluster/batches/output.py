"""What is left of a batch that has ended: a file of answers and a file of errors."""

import asyncio
import sqlite3
import time

from manta.cluster.batches.database import Database, storage_error
from manta.cluster.batches.files import FileRecord, NewFile, insert_file
from manta.cluster.batches.lines import error_line
from manta.cluster.batches.records import BatchRecord, Status, forget_lines, get_results, open_lines, set_status

_PAGE_BYTES = 1 << 20  # of results in memory at once
_PAGE = 1024  # lines without results in memory at once
_UNANSWERED = {
    Status.EXPIRED: ("batch_expired", "This request could not be executed before the completion window expired."),
    Status.CANCELLED: ("batch_cancelled", "This request was not executed before the batch was cancelled."),
}


async def end_batch(database: Database, batch: BatchRecord) -> None:
    """Writes the files of a batch that is finalizing, cancelling or, if it is in progress, has expired, and moves it
    to its last state. May be done again when it was cut off. Raises StorageError."""
    ends = {Status.FINALIZING: Status.COMPLETED, Status.CANCELLING: Status.CANCELLED}
    status = ends.get(batch.status, Status.EXPIRED)
    try:
        with NewFile(database.folder) as good, NewFile(database.folder) as bad:
            await _write_results(database, batch, good, bad)
            if status in _UNANSWERED and batch.num_total:
                await _write_unanswered(database, batch, bad, *_UNANSWERED[status])
            written = {name: file for name, file in (("output", good), ("error", bad)) if file.num_bytes}
            for file in written.values():
                await asyncio.to_thread(file.finish)
    except OSError as error:
        raise storage_error(database.folder, error) from None
    records = {name: _record(batch, name, file) for name, file in written.items()}
    await database.write(_close, batch, status, records)


async def _write_results(database: Database, batch: BatchRecord, good: NewFile, bad: NewFile) -> None:
    after = 0
    while page := await database.read(get_results, batch.place, after, _PAGE_BYTES):
        after = page[-1].number
        await asyncio.to_thread(good.write, [result.answer for result in page if result.is_good])
        await asyncio.to_thread(bad.write, [result.answer for result in page if not result.is_good])


async def _write_unanswered(database: Database, batch: BatchRecord, file: NewFile, code: str, message: str) -> None:
    after = 0
    while page := await database.read(open_lines, batch.place, after, _PAGE):
        after = page[-1].number
        await asyncio.to_thread(file.write, [error_line(line.custom_id, code, message) for line in page])


def _record(batch: BatchRecord, name: str, file: NewFile) -> FileRecord:
    now_s = int(time.time())
    expires_s = None if batch.output_lifetime_s is None else now_s + batch.output_lifetime_s
    title = f"{batch.id}_{name}.jsonl"
    return FileRecord(file.id, batch.tenant, "batch_output", title, file.num_bytes, now_s, expires_s)


def _close(connection: sqlite3.Connection, batch: BatchRecord, status: Status, files: dict[str, FileRecord]) -> None:
    columns = {f"{name}_file": record.id for name, record in files.items()}
    found = set_status(connection, batch.place, status, (batch.status,), **columns)
    if found.status is status:  # else it was cancelled a moment ago: files without a row are removed in time
        for record in files.values():
            insert_file(connection, record)
        forget_lines(connection, batch.place)
