"""Makes the moves that the scheduler wants: has blocks copied from workers to workers, and says when they are there."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import grpc.aio
import numpy as np

from manta.cluster.engine.bringup import Deployment
from manta.cluster.engine.move_meter import MoveMeter
from manta.cluster.engine.workers import WorkerError, describe_rpc_error
from manta.protos import worker_pb2 as pb
from manta.scheduler.move import Move
from manta.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

EVACUATION_S = 30.0  # then what is left is computed again elsewhere
_LOOK_AGAIN_S = 0.25
_AFTER_FAILURE_S = 30.0  # nothing is moved for balance meanwhile: who fails to move is computed again
# Whoever answers so is alive, and writes no more. Of others nobody knows.
_ANSWERED = (
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
)


class Mover:
    """`look` is called when a step was answered. Everything runs on the engine's event loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        deployment: Deployment,
        wake: Callable[[], None],
        fail: Callable[[int, WorkerError], None],
    ) -> None:
        """wake: replicas may have something to plan. fail: a rank of the replica cannot be reached, so that its epoch
        has to end."""
        self.meter = MoveMeter(deployment.bytes_per_block)
        self._moves = scheduler.moves
        self._deployment = deployment
        self._wake = wake
        self._fail = fail
        self._is_alone = len(deployment.groups) == 1
        self._failed_s = -_AFTER_FAILURE_S
        self._tasks: set[asyncio.Task[None]] = set()
        self._stepped = asyncio.Event()

    def look(self, replica: int) -> None:
        """A step of the replica was answered: some of its sequences may be better off elsewhere, or ready to go."""
        if self._is_alone:
            return
        self._stepped.set()
        if time.monotonic() - self._failed_s >= _AFTER_FAILURE_S:
            self._moves.look(replica)
        self._begin()

    async def evacuate(self, replica: int) -> None:
        """Moves away what the replica has, and lets it take no more. Returns when nothing is left that could move, or
        nobody takes it in time; at once if there is no other replica."""
        if not self._moves.has_others(replica):
            return
        self._moves.evacuate(replica)
        deadline_s = time.monotonic() + EVACUATION_S
        try:
            while not self._moves.is_evacuated(replica) and time.monotonic() < deadline_s:
                self._begin()
                self._wake()
                self._stepped.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stepped.wait(), _LOOK_AGAIN_S)
        except asyncio.CancelledError:  # whoever asked is gone
            self._moves.stay(replica)
            raise

    async def close(self) -> None:
        """Copies under way are left to the workers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self) -> None:
        if not self._moves.is_active:
            return
        for move in self._moves.ready(self.meter.figures()):
            task = asyncio.create_task(self._copy(move))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._wake()

    async def _copy(self, move: Move) -> None:
        """All ranks at once. The move ends when the last of them has answered: until then blocks are written to."""
        ranks = range(len(self._deployment.groups[move.target].addresses)) if move.copies else range(0)
        copied = await asyncio.gather(*(self._copy_rank(move, rank) for rank in ranks), return_exceptions=True)
        failures = [outcome for outcome in copied if isinstance(outcome, BaseException)]
        silent = next((error for error in failures if not _has_answered(error)), None)
        if failures and move.sequences:
            self._failed_s = time.monotonic()
            logger.warning("%d sequences are computed again: %s", len(move.sequences), failures[0])
        if silent is None:
            self._moves.end(move.id, is_copied=not failures)
        elif any(each.id == move.id for each in self._moves.under_way):
            self._fail(move.target, silent if isinstance(silent, WorkerError) else WorkerError(0, "", repr(silent)))
        self._stepped.set()
        self._wake()

    async def _copy_rank(self, move: Move, rank: int) -> None:
        """Raises WorkerError, from the AioRpcError that it stands for."""
        source, target = self._deployment.groups[move.source], self._deployment.groups[move.target]
        request = pb.ImportBlocksRequest(
            epoch=move.target_epoch,
            peer=source.addresses[rank],
            peer_epoch=move.source_epoch,
            peer_blocks=np.array(list(move.copies), "<u4").tobytes(),
            blocks=np.array(list(move.copies.values()), "<u4").tobytes(),
        )
        try:
            response = await target.stubs[rank].ImportBlocks(request)
        except grpc.aio.AioRpcError as error:
            raise WorkerError(rank, target.addresses[rank], describe_rpc_error(error)) from error
        self.meter.observe_copy(response.num_bytes, response.took_s)


def _has_answered(error: BaseException) -> bool:
    cause = error.__cause__
    return isinstance(cause, grpc.aio.AioRpcError) and cause.code() in _ANSWERED
