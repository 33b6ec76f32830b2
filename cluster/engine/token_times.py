"""When requests got their tokens. A step only notes it; the arithmetic is done for many steps at once, when the arrays
and the code are in the processor's caches: a step of its own would pay for that several times over."""

import numpy as np
from numpy.typing import NDArray

from manta.cluster.engine.metrics import ReplicaMetrics
from manta.cluster.engine.request_table import RequestTable
from manta.cluster.engine.tenant_metrics import TenantMetrics

_MAX_NOTED = 64


class TokenTimes:
    """Writes first_token_s and last_token_s of the table. Whoever reads these, or closes a request, settles first."""

    def __init__(self, table: RequestTable, tenants: TenantMetrics) -> None:
        self._table = table
        self._tenants = tenants
        self._noted: list[tuple[ReplicaMetrics, NDArray[np.int64], float]] = []

    def note(self, metrics: ReplicaMetrics, rows: NDArray[np.int64], now_s: float) -> None:
        """The requests in `rows`, int64 [N], each got a token in a step of the replica with these metrics."""
        self._noted.append((metrics, rows, now_s))
        if len(self._noted) >= _MAX_NOTED:
            self.settle()

    def settle(self) -> None:
        """Brings the table and the metrics up to date."""
        noted, self._noted = self._noted, []
        for metrics, rows, now_s in noted:
            self._observe(metrics, rows, now_s)

    def _observe(self, metrics: ReplicaMetrics, rows: NDArray[np.int64], now_s: float) -> None:
        table = self._table
        last_s = table.last_token_s[rows]
        is_first = last_s == 0.0
        if is_first.any():
            first_rows = rows[is_first]
            table.first_token_s[first_rows] = now_s
            metrics.ttft_s.observe_many(now_s - table.arrival_s[first_rows])
            last_s = last_s[~is_first]
        table.last_token_s[rows] = now_s
        metrics.itl_s.observe_many(now_s - last_s)
        metrics.generation_tokens.value += len(rows)
        self._tenants.note_tokens(table.tenant[rows])
