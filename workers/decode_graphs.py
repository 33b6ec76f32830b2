"""Decode steps recorded once and replayed, one recording per number of rows: a replay costs the host one launch instead
of some hundred."""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from manta.workers.columns import Ints
from manta.workers.step_buffers import StepBuffers
from manta.workers.transfer import upload

_FINE_UP_TO, _FINE = 64, 8
_COARSE_UP_TO, _COARSE = 256, 16
_COARSEST_UP_TO, _COARSEST = 1024, 64
Body = Callable[[StepBuffers], Tensor]


class Recording(Protocol):
    """The launches of one function, to be done again."""

    def replay(self) -> None: ...


Record = Callable[[Callable[[], object]], Recording]


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of rows to record: a step runs in the next larger one, and few rows are wasted. Ascending; steps with
    more rows than the last one are launched one by one, which then costs little beside their work."""
    sizes = {1, 2, 4}
    sizes |= set(range(_FINE, _FINE_UP_TO + 1, _FINE))
    sizes |= set(range(_FINE_UP_TO, _COARSE_UP_TO + 1, _COARSE))
    sizes |= set(range(_COARSE_UP_TO, _COARSEST_UP_TO + 1, _COARSEST))
    return sorted({min(size, max_num_seqs) for size in sizes})


class DecodeGraph:
    """One number of rows."""

    def __init__(self, buffers: StepBuffers, body: Body, output: Tensor, record: Record) -> None:
        """output: [R, ...], where the recording leaves what the body gives."""
        self.buffers = buffers
        self._output = output
        self._slots = np.full(buffers.slots.shape[0], -1, np.int32)  # what the buffer holds
        # The body, which is the owner's, is not kept: a cycle would hold the cache until the next full collection.
        self._recording = record(lambda: output.copy_(body(buffers)))

    def set_slots(self, slots: Ints) -> None:
        """Who decodes: int64 [at most R]. As long as these are the same nothing is sent."""
        now = np.full_like(self._slots, -1)
        now[: slots.size] = slots
        if not np.array_equal(now, self._slots):
            self.buffers.slots.copy_(upload([now], self.buffers.slots.device)[0])
            self._slots = now

    def replay(self) -> Tensor:
        """What the body gave for the buffers as they are now; overwritten by the next replay of any size."""
        self._recording.replay()
        return self._output


class DecodeGraphs:
    """All recordings of one rank. `make_buffers` gives buffers for a number of rows, none of which are there yet."""

    def __init__(
        self,
        sizes: list[int],
        make_buffers: Callable[[int], StepBuffers],
        body: Body,
        output: Tensor,
        record: Record,
    ) -> None:
        """output: [the largest size, ...], all recordings' own. What a body gives is copied there: kept as it is, it
        would take memory of its own in every recording, which for logits is more than all the rest together.

        The largest is recorded first: the others find room in its memory.
        """
        self._sizes = sizes
        self._graphs = {size: DecodeGraph(make_buffers(size), body, output[:size], record) for size in reversed(sizes)}

    def fitting(self, num_rows: int) -> DecodeGraph | None:
        """The smallest that holds so many rows."""
        index = bisect_left(self._sizes, num_rows)
        return self._graphs[self._sizes[index]] if index < len(self._sizes) else None


@cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """One for all recordings: libraries keep memory for every stream they have seen, cuBLAS some 32 MiB."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _recording_stream(torch.cuda.current_device())

    def __call__(self, run: Callable[[], object]) -> Recording:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # libraries choose their algorithms and take their memory before
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's mistakes spoil the recording: NCCL's own thread may ask for events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph
