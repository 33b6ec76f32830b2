"""Tensors on their way to parameters: to a GPU through pinned memory, so that reading goes on while they travel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BUFFER_BYTES = 64 * 2**20
NUM_BUFFERS = 2


class Stager:
    """Copies into parameters. What was placed is there after `finish`."""

    def __init__(
        self,
        device: torch.device,
        *,
        buffer_bytes: int = BUFFER_BYTES,
        pin: Callable[[int], Tensor] | None = None,
        mark: Callable[[], Any] | None = None,
    ) -> None:
        """For a CPU nothing is staged, unless there are `pin` (makes a uint8 buffer of so many bytes) and `mark` (what
        it returns has `synchronize`, which waits for the copies so far)."""
        is_gpu = device.type == "cuda"
        self._device = device
        self._mark = mark or _cuda_event
        make = pin or (_pinned if is_gpu else None)
        self._buffers = [] if make is None else [make(buffer_bytes) for _ in range(NUM_BUFFERS)]
        self._marks: list[Any] = [None] * len(self._buffers)
        self._next = 0

    def place(self, target: Tensor, tensor: Tensor) -> None:
        """target [n, ...] becomes tensor, of the same shape, cast to its dtype."""
        if not self._buffers or tensor.device.type != "cpu" or target.device != self._device:
            target.copy_(tensor)
            return
        row_bytes = target[:1].numel() * target.itemsize
        num_rows = self._buffers[0].numel() // max(1, row_bytes)
        if not num_rows:
            target.copy_(tensor)
            return
        for begin in range(0, tensor.shape[0], num_rows):
            self._place_rows(target[begin : begin + num_rows], tensor[begin : begin + num_rows])

    def finish(self) -> None:
        """Waits for all copies."""
        for mark in self._marks:
            if mark is not None:
                mark.synchronize()

    def _place_rows(self, target: Tensor, rows: Tensor) -> None:
        this, self._next = self._next, (self._next + 1) % len(self._buffers)
        if self._marks[this] is not None:
            self._marks[this].synchronize()
        staged = self._buffers[this][: target.numel() * target.itemsize].view(target.dtype).view(target.shape)
        staged.copy_(rows)
        target.copy_(staged, non_blocking=True)
        self._marks[this] = self._mark()


def _pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _cuda_event() -> Any:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
