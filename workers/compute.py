"""The one thread that touches the device."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class ComputeThread:
    """Does jobs one after the other, in the order they came.

    Loading, warming up and every step run here: OpenMP keeps a team of threads for each thread that starts parallel
    work, and a second team would fight the first for the cores.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def post(self, job: Callable[[], None]) -> None:
        """Queues a job that handles its own errors."""
        self._jobs.put(job)

    def call(self, job: Callable[[], T]) -> T:
        """Queues a job and returns, or raises, what it does."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 (the caller gets it)
                future.set_exception(error)

        self.post(run)
        return future.result()

    def stop(self) -> None:
        """Ends the thread after the jobs it has."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
