"""The scheduler process with a stopwatch: `python -m traced_engine TRACE_FILE ...`, the rest as for
`manta.cluster.engine.main`.

At the end the file holds two tables of int64. "plans": one row per plan, columns PLAN. "results": one row per result,
columns RESULT. Times are of time.monotonic_ns.
"""

import sys
import time
from typing import Any

import numpy as np

from manta.cluster.engine import main as engine_main
from manta.cluster.engine.epoch import EpochStreams
from manta.cluster.engine.replica import ReplicaLoop
from manta.cluster.engine.workers import WorkerGroup
from manta.scheduler.scheduler import Scheduler

PLAN = ("replica", "step", "began_ns", "sent_ns", "bytes", "num_rows")
RESULT = ("replica", "step", "received_ns")

plans: list[list[int]] = []
results: list[tuple[int, ...]] = []
_unsent: dict[int, list[int]] = {}  # by replica: the plan on its way to the wire
_index_of: dict[WorkerGroup, int] = {}


def install() -> None:
    """Wraps what a plan passes on its way out, and a result on its way in."""
    plan, send, receive, create = Scheduler.plan, EpochStreams.send, EpochStreams.receive, ReplicaLoop.__init__

    def traced_plan(self: Scheduler, replica: int = 0) -> Any:
        began_ns = time.monotonic_ns()
        made = plan(self, replica)
        if made is not None:
            _unsent[replica] = [replica, made.step, began_ns, 0, 0, made.num_decodes]
        return made

    def traced_send(self: EpochStreams, message: bytes) -> None:
        record = _unsent[_index_of[self._group]]
        send(self, message)
        record[3:5] = time.monotonic_ns(), len(message)
        plans.append(record)

    async def traced_receive(self: EpochStreams) -> Any:
        reply = await receive(self)
        index = _index_of[self._group]
        results.append((index, reply.result.step, time.monotonic_ns()))
        return reply

    def traced_create(self: ReplicaLoop, index: int, group: WorkerGroup, *args: Any) -> None:
        _index_of[group] = index
        create(self, index, group, *args)

    Scheduler.plan = traced_plan  # type: ignore[method-assign]
    EpochStreams.send = traced_send  # type: ignore[method-assign]
    EpochStreams.receive = traced_receive  # type: ignore[method-assign]
    ReplicaLoop.__init__ = traced_create  # type: ignore[method-assign]


def main() -> int:
    file, *argv = sys.argv[1:]
    install()
    code = engine_main.main(argv)
    np.savez(file, plans=np.array(plans, np.int64), results=np.array(results, np.int64))
    return code


if __name__ == "__main__":
    sys.exit(main())
