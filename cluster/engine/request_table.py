"""Columns of the unfinished requests, so that a step's tokens are routed and timed by arithmetic on whole arrays."""

import numpy as np
from numpy.typing import NDArray

_ROW_BITS = 24
_ROW_MASK = (1 << _ROW_BITS) - 1


class RequestTable:
    """One row per unfinished request. A request id is (serial number << 24) | row: unique, and its row is a mask away.

    Times are of one monotonic clock, in seconds; 0 means not yet.
    """

    def __init__(self, num_rows: int = 1024) -> None:
        self.frontend = np.zeros(num_rows, np.int64)  # Frontend.number
        self.handle = np.zeros(num_rows, np.uint64)
        self.tenant = np.zeros(num_rows, np.int64)  # TenantMetrics' number
        self.arrival_s = np.zeros(num_rows)
        self.started_s = np.zeros(num_rows)
        self.first_token_s = np.zeros(num_rows)
        self.last_token_s = np.zeros(num_rows)
        self._free = list(range(num_rows - 1, -1, -1))
        self._num_opened = 0

    def open(self, frontend: int, handle: int, tenant: int, now_s: float) -> int:
        """Takes a row and returns the new request's id."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._num_opened += 1
        self.frontend[row] = frontend
        self.handle[row] = handle
        self.tenant[row] = tenant
        self.arrival_s[row] = now_s
        self.started_s[row] = self.first_token_s[row] = self.last_token_s[row] = 0.0
        return self._num_opened << _ROW_BITS | row

    def close(self, request_id: int) -> None:
        self._free.append(request_id & _ROW_MASK)

    @staticmethod
    def row(request_id: int) -> int:
        return request_id & _ROW_MASK

    @staticmethod
    def rows(request_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [N] -> int64 [N]."""
        return request_ids & _ROW_MASK

    def _grow(self) -> None:
        num_rows = len(self.handle)
        for name in ("frontend", "handle", "tenant", "arrival_s", "started_s", "first_token_s", "last_token_s"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self._free = list(range(2 * num_rows - 1, num_rows - 1, -1))
