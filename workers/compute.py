"""The one thread that touches the device."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")

IDLE_S = 0.02  # without a job, before other work is done: longer than the gaps between the steps of a busy worker


class ComputeThread:
    """Does jobs one after the other, in the order they came.

    Loading, warming up and every step run here: OpenMP keeps a team of threads for each thread that starts parallel
    work, and a second team would fight the first for the cores.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle_work: Callable[[], bool] | None = None
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def post(self, job: Callable[[], None]) -> None:
        """Queues a job that handles its own errors."""
        self._jobs.put(job)

    def call(self, job: Callable[[], T], timeout_s: float | None = None) -> T:
        """Queues a job and returns, or raises, what it does; TimeoutError if that takes too long."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 (the caller gets it)
                future.set_exception(error)

        self.post(run)
        return future.result(timeout_s)

    def when_idle(self, work: Callable[[], bool]) -> None:
        """Calls `work`, a few milliseconds of it at most, while there are no jobs; when it returns False, not before
        the next job is done."""
        self.post(lambda: setattr(self, "_idle_work", work))

    def stop(self) -> None:
        """Ends the thread after the jobs it has."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            job()

    def _next_job(self) -> Callable[[], None] | None:
        wait_s = IDLE_S
        while self._idle_work is not None:
            try:
                return self._jobs.get(timeout=wait_s)
            except Empty:
                wait_s = 0.0
                if not self._idle_work():
                    break
        return self._jobs.get()
