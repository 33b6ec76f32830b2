"""Whole KV blocks copied in all layers by one launch: within the cache (copy-on-write), or between it and a buffer.

Every tensor of the cache is a run of blocks of one size in bytes. Their addresses stand in a table on the device, and a
program copies a piece of one block of one tensor, in the widest words that divide a block.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from manta.kernels.metadata import KVCache

PIECE_BYTES = 8192
_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@triton.jit(do_not_specialize=["num_tensors", "pair_stride"], do_not_specialize_on_alignment=["pairs"])
def _copy_kernel(
    addresses, buffer, pairs, num_tensors, pair_stride,
    BLOCK_WORDS: tl.constexpr, PIECE: tl.constexpr, WORD: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """MODE "copy": block pairs[0, i] to pairs[1, i]; "gather", "scatter": block pairs[i] to or from buffer[i]."""
    nth, which = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    source = tl.load(pairs + nth).to(tl.int64)
    target = tl.load(pairs + pair_stride + nth).to(tl.int64) if MODE == "copy" else source
    if (source < 0) | (target < 0):
        return
    word = tl.program_id(2) * PIECE + tl.arange(0, PIECE)
    inside = word < BLOCK_WORDS
    pages = tl.multiple_of(tl.load(addresses + which).to(tl.pointer_type(WORD)), 16)  # so torch allocates
    own = tl.multiple_of(buffer.to(tl.pointer_type(WORD)), 16) + (nth * num_tensors + which) * BLOCK_WORDS
    begin = own if MODE == "scatter" else pages + source * BLOCK_WORDS
    end = own if MODE == "gather" else pages + target * BLOCK_WORDS
    tl.store(end + word, tl.load(begin + word, mask=inside), mask=inside)


class BlockCopier:
    """Copies blocks of a KV cache whose tensors all have one shape, dtype and device, each block contiguous. Keeps the
    tensors alive. Launches only: nothing waits for the device."""

    def __init__(self, kv_cache: KVCache) -> None:
        self._tensors = [pages for layer in kv_cache for pages in layer]
        first = self._tensors[0]
        for pages in self._tensors:
            assert pages.shape == first.shape
            assert pages.dtype == first.dtype
            assert pages.is_contiguous()
        addresses = [0 if pages.is_meta else pages.data_ptr() for pages in self._tensors]
        self._addresses = torch.tensor(addresses, dtype=torch.int64).to(first.device)
        self.block_bytes = first[0].numel() * first.element_size()

    def copy(self, pairs: Tensor) -> None:
        """Copies block pairs[0, i] to pairs[1, i] for every i; pairs integer [2, n], on the device; below 0: nothing.

        No block may be both read and written, nor written twice: for others go through `gather` and `scatter`.
        """
        self._launch("copy", pairs, self._addresses)

    def gather(self, blocks: Tensor, buffer: Tensor | None = None) -> Tensor:
        """uint8 [n, tensors, block_bytes]: blocks (integer [n]) of every tensor (keys, then values, by layer)."""
        if buffer is None:
            shape = (blocks.shape[0], len(self._tensors), self.block_bytes)
            buffer = torch.empty(shape, dtype=torch.uint8, device=self._addresses.device)
        self._launch("gather", blocks, buffer)
        return buffer

    def scatter(self, buffer: Tensor, blocks: Tensor) -> None:
        """Writes what `gather` gave, of this cache or one of the same shape, to blocks (integer [n]) of this one."""
        self._launch("scatter", blocks, buffer)

    def _launch(self, mode: str, pairs: Tensor, buffer: Tensor) -> None:
        assert pairs.stride(-1) == 1
        if mode != "copy":
            assert buffer.is_contiguous()
            assert buffer.shape[1:] == (len(self._tensors), self.block_bytes)
            assert buffer.shape[0] >= pairs.shape[-1]
        if not pairs.shape[-1]:
            return
        width = next(width for width in _WORDS if self.block_bytes % width == 0)
        words = self.block_bytes // width
        piece = min(triton.next_power_of_2(words), PIECE_BYTES // width)
        _copy_kernel[pairs.shape[-1], len(self._tensors), triton.cdiv(words, piece)](
            self._addresses, buffer, pairs, len(self._tensors), pairs.stride(0),
            BLOCK_WORDS=words, PIECE=piece, WORD=_WORDS[width], MODE=mode, num_warps=4,
        )  # fmt: skip
