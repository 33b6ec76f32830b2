"""Who runs the batches of a folder: of all frontends that share it, the one that holds its lock."""

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from manta.cluster.batches.database import StorageError, storage_error
from manta.cluster.batches.files import delete_expired, file_ids, remove_abandoned, remove_contents
from manta.cluster.batches.gate import Gate
from manta.cluster.batches.records import BatchRecord, Status, unfinished_batches
from manta.cluster.batches.runner import Runner
from manta.cluster.batches.store import BatchStore

SCAN_S = 0.5  # between two looks for what other frontends have been told, and for a lock that was let go
SWEEP_S = 60.0  # between two looks for files whose time is over
RETRY_S = 5.0  # after a failure
logger = logging.getLogger("manta.batches")


class FolderLock:
    """One process has it at most; the system takes it from a process that ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle: int | None = None

    def try_take(self) -> bool:
        """Raises StorageError."""
        try:
            handle = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise storage_error(self._folder, error) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            return False
        self._handle = handle
        return True

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


@dataclass(slots=True)
class _Work:
    task: "asyncio.Task[None]"
    cancelled: asyncio.Event


class Keeper:
    """Waits for the lock of the folder; then runs its unfinished batches side by side, until `stop`."""

    def __init__(self, store: BatchStore, runner: Runner, gate: Gate) -> None:
        self._store = store
        self._runner = runner
        self._gate = gate
        self._lock = FolderLock(store.folder)
        self._works: dict[str, _Work] = {}  # by id of the batch
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Lines under way are given up; who runs the batch next begins them anew."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._insist(self._take_lock)
                logger.info("this frontend runs the batches of %s", self._store.folder)
                tasks.create_task(self._insist(self._gate.watch))
                tasks.create_task(self._insist(self._scan))
        finally:
            tasks_left = [work.task for work in self._works.values()]
            for task in tasks_left:
                task.cancel()
            await asyncio.gather(*tasks_left, return_exceptions=True)
            self._lock.release()

    async def _insist(self, work: Callable[[], Awaitable[None]]) -> None:
        """Until it succeeds."""
        while True:
            try:
                return await work()
            except StorageError as error:
                logger.error("batches wait: %s", error)
            except Exception:
                logger.exception("batches wait: the server failed")
            await asyncio.sleep(RETRY_S)

    async def _take_lock(self) -> None:
        while not await asyncio.to_thread(self._lock.try_take):
            await asyncio.sleep(SCAN_S)

    async def _scan(self) -> None:
        """For ever: begins what is new, tells what is cancelled, removes what nobody needs."""
        swept_s = -SWEEP_S
        while True:
            self._store.news.clear()
            for batch in await self._store.database.read(unfinished_batches):
                work = self._works.get(batch.id)
                if work is None:
                    work = self._works[batch.id] = self._begin(batch)
                if batch.status is Status.CANCELLING:
                    work.cancelled.set()
            if time.monotonic() >= swept_s + SWEEP_S:
                swept_s = time.monotonic()
                await self._sweep()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._store.news.wait(), SCAN_S)

    def _begin(self, batch: BatchRecord) -> _Work:
        cancelled = asyncio.Event()
        task = asyncio.create_task(self._runner.run(batch, cancelled))
        task.add_done_callback(lambda task: self._note_end(batch, task))
        return _Work(task, cancelled)

    def _note_end(self, batch: BatchRecord, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            del self._works[batch.id]
            return
        logger.error("batch %s goes on in %g s", batch.id, RETRY_S, exc_info=error)
        asyncio.get_running_loop().call_later(RETRY_S, self._works.pop, batch.id, None)

    async def _sweep(self) -> None:
        database, folder, now_s = self._store.database, self._store.folder, time.time()
        expired = await database.write(delete_expired, now_s)
        await asyncio.to_thread(remove_contents, folder, expired)
        known = await database.read(file_ids)
        await asyncio.to_thread(remove_abandoned, folder, known, now_s)
