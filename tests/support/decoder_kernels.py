"""The kernels of the CPU decoder as functions of tensors: the very code that engines compile, called by its address."""

import ctypes
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from manta.kernels.cpu_decoder import attention_tile, layout, products, program
from manta.kernels.cpu_decoder.items import attention_items
from manta.kernels.cpu_decoder.stage import UNLIMITED
from manta.kernels.cpu_decoder.team import Team, team_of
from manta.kernels.cpu_decoder.tiles import MAX_ROWS
from manta.kernels.metadata import AttentionMetadata

NAN, INFINITY = float("nan"), float("inf")
_GUARD_BYTES = 1024  # behind what a kernel may write
_KINDS = {torch.bfloat16: ctypes.c_uint16, torch.float16: ctypes.c_int16, torch.float32: ctypes.c_float}


@dataclass(frozen=True)
class Variant:
    """What kernels are compiled for."""

    dtype: torch.dtype
    uses_dot: bool = False

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.") + ("-dot" if self.uses_dot else "")

    @cached_property
    def team(self) -> Team:
        return team_of(1, self.dtype, uses_dot=self.uses_dot)

    @cached_property
    def left(self) -> torch.dtype:
        return self.team.left_dtype


PLAIN = [Variant(torch.float32), Variant(torch.bfloat16), Variant(torch.float16)]
VARIANTS = [*PLAIN, Variant(torch.bfloat16, uses_dot=True)]


def run_kernel(variant: Variant, kernel: int, *arguments: int | float | torch.dtype) -> None:
    """Runs a kernel, named by its field of the step's table, with ints, then floats, then the dtypes of elements."""
    types: list[type] = []
    values: list[int | float] = []
    for argument in arguments:
        if isinstance(argument, torch.dtype):
            types.append(_KINDS[argument])
            values.append(0)
        else:
            types.append(ctypes.c_double if isinstance(argument, float) else ctypes.c_int64)
            values.append(argument)
    ctypes.CFUNCTYPE(None, *types)(variant.team.kernels[kernel])(*values)


class Scratch:
    """A thread's own memory: NaN in every dtype at first, an address that begins a cache line, a guard behind."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = torch.full((num_bytes + _GUARD_BYTES + 64,), 255, dtype=torch.uint8)
        self.address = -(-self._memory.data_ptr() // 64) * 64
        self._end = self.address - self._memory.data_ptr() + num_bytes

    def check(self) -> None:
        assert (self._memory[self._end :] == 255).all(), "written behind the scratch memory"


def multiply(
    variant: Variant, x: Tensor, weight: Tensor, bias: Tensor | None, mode: int, out: Tensor, num_threads: int = 1
) -> None:
    """The product `mode` of x [rows, in] and weight [out, in], gates first for SILU_MUL, into out [rows, out].

    The parts of the threads run one after another. Memory of x that the kernel may read but not use is NaN.
    """
    rows, num_in = x.shape
    stride = num_in + num_in % 2 + 6
    left = torch.full((rows + MAX_ROWS, stride), NAN, dtype=variant.left)
    left[:rows, : num_in + num_in % 2] = 0
    left[:rows, :num_in] = x
    if mode == products.SILU_MUL:
        weight = products.interleave(weight)
        bias = None if bias is None else products.interleave(bias)
    packed = products.pack_weight(weight)
    bias = None if bias is None else bias.float().contiguous()
    linear = np.array([packed.data_ptr(), 0 if bias is None else bias.data_ptr()], np.int64)
    scratch = Scratch(products.SCRATCH_BYTES)
    counter = np.zeros(1, np.int64)
    for thread in range(num_threads):
        run_kernel(
            variant, program.MULTIPLY, thread, num_threads, left.data_ptr(), stride, rows, num_in, linear.ctypes.data,
            out.shape[1], out.data_ptr(), out.stride(0), mode, scratch.address, counter.ctypes.data, variant.left,
            variant.dtype,
        )  # fmt: skip
    scratch.check()


class PagedHeads:
    """Pages of the decoder's layout, all of them `filler` until tokens are written, and the kernels upon them."""

    def __init__(
        self, variant: Variant, num_heads: int, num_kv_heads: int, dim: int, block_size: int, num_blocks: int,
        filler: float = 0.0,
    ) -> None:  # fmt: skip
        self.variant = variant
        self.num_heads, self.num_kv_heads, self.dim, self.block_size = num_heads, num_kv_heads, dim, block_size
        self.page_tokens, self.page_dims = layout.page_shape(block_size, dim)
        shape = (num_blocks, num_kv_heads, self.page_tokens, self.page_dims)
        self.keys, self.values = (torch.full(shape, filler, dtype=variant.dtype) for _ in range(2))

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.dim

    def unpaged(self) -> tuple[Tensor, Tensor]:
        """Keys and values [num_blocks, num_kv_heads, block_size, dim]."""
        return layout.from_pages(self.keys, self.values, self.block_size, self.dim)

    def write(
        self, qkv: Tensor, metadata: AttentionMetadata, rope_table: Tensor | None = None, q_norm: Tensor | None = None,
        k_norm: Tensor | None = None, eps: float = 0.0, num_threads: int = 1,
    ) -> None:  # fmt: skip
        """rope_kv_write upon qkv float32 [T, qkv_size]; without a table nothing is rotated."""
        if rope_table is None:
            rope_table = torch.zeros(int(metadata.positions.max()) + 1, self.dim)
            rope_table[:, : self.dim // 2] = 1
        rows = qkv.shape[0]
        for thread in range(num_threads):
            run_kernel(
                self.variant, program.ROPE_KV_WRITE, rows * thread // num_threads, rows * (thread + 1) // num_threads,
                rows, qkv.data_ptr(), qkv.stride(0), rope_table.data_ptr(), metadata.positions.data_ptr(),
                metadata.slot_mapping.data_ptr(), self.keys.data_ptr(), self.values.data_ptr(), self.num_heads,
                self.num_kv_heads, self.dim, self.block_size, self.page_tokens, self.page_dims,
                0 if q_norm is None else q_norm.data_ptr(), 0 if k_norm is None else k_norm.data_ptr(), eps,
                self.variant.dtype,
            )  # fmt: skip

    def attend(
        self, qkv: Tensor, metadata: AttentionMetadata, scale: float, window: int | None = None, num_threads: int = 1
    ) -> Tensor:
        """Attention of the queries in qkv float32 [T, qkv_size], in items as for so many threads: [T, heads * dim]."""
        variant, group = self.variant, self.num_heads // self.num_kv_heads
        items, joins, num_parts = attention_items(metadata, group, num_threads)
        parts = torch.full((max(1, num_parts) * self.num_heads, self.dim + 2), NAN)
        out = torch.full((qkv.shape[0], self.num_heads * self.dim), NAN, dtype=variant.left)
        scratch = Scratch(attention_tile.scratch_bytes(group, self.page_tokens, self.page_dims))
        for item in items:
            for head in range(self.num_kv_heads):
                run_kernel(
                    variant, program.ATTEND, item.ctypes.data, head, qkv.data_ptr(), qkv.stride(0),
                    self.keys.data_ptr(), self.values.data_ptr(), out.data_ptr(), out.stride(0),
                    metadata.query_start.data_ptr(), metadata.seq_lens.data_ptr(), metadata.block_tables.data_ptr(),
                    metadata.block_tables.stride(0), self.num_kv_heads, group, self.dim, self.block_size,
                    self.page_tokens, self.page_dims, attention_tile.chunk_pages(self.page_tokens, self.page_dims),
                    UNLIMITED if window is None else window, parts.data_ptr(), scratch.address, scale, variant.left,
                    variant.dtype,
                )  # fmt: skip
        scratch.check()
        for token, first_part, count in joins.tolist():
            for head in range(self.num_kv_heads):
                run_kernel(
                    variant, program.JOIN, token, first_part, count, head, self.num_kv_heads, group, self.dim,
                    parts.data_ptr(), out.data_ptr(), out.stride(0), variant.left,
                )  # fmt: skip
        return out
