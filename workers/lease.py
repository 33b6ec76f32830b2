"""Ends a worker that nobody needs any more: one that lived on without scheduler would keep its device for ever."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

LEASE_S = 180.0  # before Load brings the configured one; longer than frontends wait for a scheduler
_CHECK_S = 5.0


class Lease:
    """Lapses when nothing was heard for `length_s` since the first call. Thread-safe."""

    def __init__(self, on_lapse: Callable[[], None], length_s: float = LEASE_S, check_s: float = _CHECK_S) -> None:
        self._on_lapse = on_lapse
        self.length_s = length_s
        self._check_s = check_s
        self._heard_s = time.monotonic()
        self._num_calls = 0  # under way: Load may take long
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def renew(self) -> None:
        """Somebody was heard."""
        self._heard_s = time.monotonic()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Holds the lease as long as a call is under way. The first one begins it."""
        with self._lock:
            self._num_calls += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="lease", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            self.renew()
            with self._lock:
                self._num_calls -= 1

    def end(self) -> None:
        """It does not lapse any more."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._check_s, self.length_s)):
            silent_s = time.monotonic() - self._heard_s
            if silent_s > self.length_s and not self._num_calls:
                logger.error("no scheduler was heard for %.0f s: this worker ends", silent_s)
                self._on_lapse()
                return
