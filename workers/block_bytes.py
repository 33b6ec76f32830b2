"""KV blocks of a rank, in all its layers, as bytes: what travels when a sequence moves to another replica.

Threads other than the one that runs steps may read blocks that no step writes to, and write to blocks that no step
uses: on a CPU in place, on a GPU in a stream of its own, so that steps go on beside it. The scales of fp8 pages are the
model's, one per layer, and not of a block, so there is nothing more to copy.
"""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manta.kernels import ops
from manta.kernels.metadata import KVCache
from manta.workers.columns import Ints


class BlockBytes(Protocol):
    """Blocks are int64 [n]; their bytes depend on nothing but `layout` and what they hold."""

    num_blocks: int
    block_bytes: int  # of one block in all tensors
    layout: str

    def read(self, blocks: Ints) -> bytes: ...
    def write(self, blocks: Ints, data: bytes) -> None:
        """`data`: n * block_bytes bytes."""
        ...


def block_bytes_of(kv_cache: KVCache) -> BlockBytes:
    return HostBlocks(kv_cache) if kv_cache[0][0].is_cpu else DeviceBlocks(kv_cache, ops.make_block_copier(kv_cache))


def _flat(pages: Tensor) -> Tensor:
    """uint8 [num_blocks, bytes of a block], of the same memory."""
    return pages.view(torch.uint8).view(pages.shape[0], -1)


def _layout_of(kv_cache: KVCache, order: str) -> str:
    first = kv_cache[0][0]
    return f"{len(kv_cache)} layers of {tuple(first.shape[1:])} {first.dtype}, {order}"


class HostBlocks:
    """By tensor, then by block. One thread copies: a second team of threads would fight that of the steps for cores."""

    def __init__(self, kv_cache: KVCache) -> None:
        self._tensors: list[NDArray[np.uint8]] = [_flat(pages).numpy() for layer in kv_cache for pages in layer]
        self.num_blocks = self._tensors[0].shape[0]
        self.block_bytes = sum(tensor.shape[1] for tensor in self._tensors)
        self.layout = _layout_of(kv_cache, "as CPUs keep them")

    def read(self, blocks: Ints) -> bytes:
        buffer = np.empty((len(self._tensors), len(blocks), self._tensors[0].shape[1]), np.uint8)
        for tensor, part in zip(self._tensors, buffer, strict=True):
            np.take(tensor, blocks, axis=0, out=part, mode="clip")  # checked before; other modes make a copy
        return buffer.tobytes()

    def write(self, blocks: Ints, data: bytes) -> None:
        buffer = np.frombuffer(data, np.uint8).reshape(len(self._tensors), len(blocks), -1)
        for tensor, part in zip(self._tensors, buffer, strict=True):
            tensor[blocks] = part


class DeviceBlocks:
    """By block, then by tensor. `copier` is a `kernels.block_copy_triton.BlockCopier`, or None where torch does."""

    def __init__(self, kv_cache: KVCache, copier: Any) -> None:
        self._tensors = [_flat(pages) for layer in kv_cache for pages in layer]
        self._copier = copier
        self._device = self._tensors[0].device
        self._stream: torch.cuda.Stream | None = None  # made when it is needed
        self.num_blocks, tensor_bytes = self._tensors[0].shape
        self._shape = (len(self._tensors), tensor_bytes)
        self.block_bytes = len(self._tensors) * tensor_bytes
        self.layout = _layout_of(kv_cache, "as GPUs keep them")

    @torch.inference_mode()
    def read(self, blocks: Ints) -> bytes:
        host = self._pinned(len(blocks))
        with torch.cuda.stream(self._own_stream()):
            index = torch.from_numpy(blocks).to(self._device)
            if self._copier is None:
                gathered = torch.stack([tensor.index_select(0, index) for tensor in self._tensors], 1)
            else:
                gathered = self._copier.gather(index)
            host.copy_(gathered, non_blocking=True)
        self._own_stream().synchronize()
        return host.numpy().tobytes()

    @torch.inference_mode()
    def write(self, blocks: Ints, data: bytes) -> None:
        host = self._pinned(len(blocks))
        host.numpy()[...] = np.frombuffer(data, np.uint8).reshape(host.shape)
        with torch.cuda.stream(self._own_stream()):
            index = torch.from_numpy(blocks).to(self._device)
            buffer = host.to(self._device, non_blocking=True)
            if self._copier is None:
                for nth, tensor in enumerate(self._tensors):
                    tensor.index_copy_(0, index, buffer[:, nth])
            else:
                self._copier.scatter(buffer, index)
        self._own_stream().synchronize()

    def _pinned(self, num_blocks: int) -> Tensor:
        return torch.empty((num_blocks, *self._shape), dtype=torch.uint8, pin_memory=True)

    def _own_stream(self) -> "torch.cuda.Stream":
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return self._stream
