"""What the database keeps of batches and files: results once, states in order, files as long as they are needed."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from manta.cluster.batches import files
from manta.cluster.batches.database import FILE_NAME, Database, StorageError, open_folder
from manta.cluster.batches.files import FileInUseError, FileRecord, NewFile, insert_file
from manta.cluster.batches.keeper import FolderLock
from manta.cluster.batches.output import end_batch
from manta.cluster.batches.records import (
    BatchRecord,
    Line,
    Result,
    Status,
    add_lines,
    add_results,
    get_batch,
    get_results,
    insert_batch,
    open_lines,
    set_status,
    unfinished_batches,
)

Test = Callable[[Database], Coroutine[Any, Any, None]]


def with_database(folder: Path, test: Test) -> None:
    async def go() -> None:
        open_folder(folder)
        database = Database(folder)
        await database.open()
        await test(database)
        await database.close()

    asyncio.run(go())


async def new_batch(database: Database, **fields: Any) -> BatchRecord:
    given = {"endpoint": "/v1/completions", "input_file": "file-1", "completion_window": "1h", "metadata": None}
    return await database.write(insert_batch, "a", 3600, **(given | {"output_lifetime_s": None} | fields))


def test_a_line_has_one_result_whoever_writes_it(tmp_path: Path) -> None:
    async def test(database: Database) -> None:
        batch, other = await new_batch(database), await new_batch(database)
        for each in (batch, other):
            await database.write(add_lines, each.place, [Line(n, 10 * n, 9, f"id{n}") for n in range(1, 8)])
        first = [Result(n, n != 3, b"%d" % n * 300_000) for n in (5, 3, 1)]
        await database.write(add_results, batch.place, first)
        await database.write(add_results, batch.place, [Result(3, True, b"again"), Result(2, True, b"2")])
        found = await database.read(get_batch, "a", batch.id)
        assert found is not None
        assert (found.num_completed, found.num_failed) == (3, 1)
        assert [each.number for each in await database.read(open_lines, batch.place, 0, 9)] == [4, 6, 7]
        assert [each.number for each in await database.read(open_lines, batch.place, 4, 1)] == [6]
        assert len(await database.read(open_lines, other.place, 0, 9)) == 7
        pages, after = [], 0
        while page := await database.read(get_results, batch.place, after, 400_000):
            after = page[-1].number
            pages.append([(each.number, each.is_good, each.answer[:2]) for each in page])
        assert pages == [[(1, True, b"11"), (2, True, b"2"), (3, False, b"33")], [(5, True, b"55")]]

    with_database(tmp_path, test)


def test_states_change_only_from_those_before(tmp_path: Path) -> None:
    async def test(database: Database) -> None:
        batch = await new_batch(database)
        running = await database.write(set_status, batch.place, Status.IN_PROGRESS, (Status.VALIDATING,), num_total=3)
        assert (running.status, running.num_total) == (Status.IN_PROGRESS, 3)
        assert running.times_s[Status.IN_PROGRESS]
        cancelled = await database.write(set_status, batch.place, Status.CANCELLING, (Status.IN_PROGRESS,))
        kept = await database.write(set_status, batch.place, Status.FINALIZING, (Status.IN_PROGRESS,))
        assert kept == cancelled
        assert await database.read(unfinished_batches) == [cancelled]
        # Who began to write the files before it was cancelled changes nothing.
        await end_batch(database, running)
        assert await database.read(unfinished_batches) == [cancelled]
        await end_batch(database, cancelled)
        assert await database.read(unfinished_batches) == []

    with_database(tmp_path, test)


def test_files_go_when_their_time_is_over_and_nobody_reads_them(tmp_path: Path) -> None:
    async def test(database: Database) -> None:
        await new_batch(database, input_file="file-read")
        for name, expires_s in (("file-read", 100), ("file-old", 100), ("file-new", None)):
            await database.write(insert_file, FileRecord(name, "a", "batch", "x", 1, 1, expires_s))
            files.content_path(tmp_path, name).write_text("x")
        assert await database.read(files.get_file, "a", "file-old") is None
        assert await database.write(files.delete_expired, 200.0) == ["file-old"]
        files.remove_contents(tmp_path, ["file-old", "file-never"])
        await database.write(insert_file, FileRecord("file-1", "a", "batch", "x", 1, 1))
        await new_batch(database)
        with pytest.raises(FileInUseError):
            await database.write(files.delete_file, "a", "file-1")
        known = await database.read(files.file_ids)
        assert known == {"file-read", "file-new", "file-1"}
        (tmp_path / "files" / "lost").write_text("x")
        with NewFile(tmp_path) as file:
            files.remove_abandoned(tmp_path, known, os.stat(tmp_path / "files" / "lost").st_mtime + 60)
            assert len(list((tmp_path / "files").iterdir())) == 4  # somebody may still be writing the new ones
            files.remove_abandoned(tmp_path, known, os.stat(tmp_path / "files" / "lost").st_mtime + 7200)
            assert {path.name for path in (tmp_path / "files").iterdir()} == {"file-read", "file-new"}
        assert file.num_bytes == 0

    with_database(tmp_path, test)


def test_one_holds_the_lock(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert (first.try_take(), second.try_take()) == (True, False)
    first.release()
    assert second.try_take()
    second.release()


def test_what_is_no_database_of_ours_is_told(tmp_path: Path) -> None:
    async def never(database: Database) -> None:
        raise AssertionError

    (tmp_path / FILE_NAME).write_text("no database" * 1000)
    with pytest.raises(StorageError, match="not a database"):
        with_database(tmp_path, never)
    (tmp_path / FILE_NAME).unlink()

    async def age(database: Database) -> None:
        await database.write(lambda connection: connection.execute("PRAGMA user_version = 7").close())

    with_database(tmp_path, age)
    with pytest.raises(StorageError, match="another version"):
        with_database(tmp_path, never)
