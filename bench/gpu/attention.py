"""Paged attention alone: bytes and operations per second, as shares of what the device copies and multiplies."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hardware import Limits
from report import Unit
from timing import median_s
from torch import Tensor

from manta.kernels import ops
from manta.kernels.metadata import AttentionMetadata

_BLOCK_SIZE = 16
_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128  # of Llama-3.1-8B
_DTYPE = torch.bfloat16
_MAX_CACHE_BYTES = 40 * 2**30


def cases(small: bool) -> Iterator[tuple[str, int, int, int]]:
    """Kind, sequences, tokens of each that are computed, tokens of each in all."""
    if small:
        yield from (("decode", 4, 1, 256), ("prefill", 1, 256, 256))
        return
    for batch in (1, 8, 32, 128, 256):
        for context in (128, 1024, 4096, 8192, 32768):
            yield "decode", batch, 1, context
    for length in (512, 2048, 8192, 16384):
        yield "prefill", 1, length, length
    yield "chunk", 1, 2048, 16384


def units(device: torch.device, limits: Limits, small: bool) -> Iterator[Unit]:
    """One per case that fits into memory."""
    for kind, batch, num_new, length in cases(small):
        if _cache_bytes(batch, length) <= _MAX_CACHE_BYTES:
            name = f"{kind}, {batch} x {num_new} of {length}"
            yield name, partial(run, kind, batch, num_new, length, device, limits)


def run(
    kind: str, batch: int, num_new: int, length: int, device: torch.device, limits: Limits
) -> Iterator[dict[str, Any]]:
    """One record."""
    ours_s = median_s(_paged(device, _DTYPE, batch, num_new, length), device)
    theirs_us = None
    try:
        theirs_us = 1e6 * median_s(_sdpa(device, _DTYPE, batch, num_new, length), device)
    except RuntimeError as error:  # some of torch's forms copy keys for every head, which is more than the memory
        print(f"torch SDPA: {str(error).partition(chr(10))[0]}", flush=True)
    pairs = num_new * (length - num_new) + num_new * (num_new + 1) // 2
    flops, cache_bytes = 4 * batch * pairs * _HEADS * _HEAD_DIM, _cache_bytes(batch, length)
    record = {
        "kind": kind, "batch": batch, "new": num_new, "context": length, "us": ours_s * 1e6,
        "gb_per_s": cache_bytes / ours_s / 1e9,
        "share_of_copy": cache_bytes / ours_s / limits.copy_bytes_per_s,
        "tflops": flops / ours_s / 1e12,
        "share_of_matmul": flops / ours_s / limits.matmul_flops,
        "sdpa_us": theirs_us,
    }  # fmt: skip
    print(_line(record), flush=True)
    yield record


def _cache_bytes(batch: int, length: int) -> int:
    return 2 * batch * length * _KV_HEADS * _HEAD_DIM * _DTYPE.itemsize


def _line(record: dict[str, Any]) -> str:
    return (
        f"{record['kind']:>8} {record['batch']:>4} x {record['new']:>5} of {record['context']:>6}: "
        f"{record['us']:>9.1f} us, {record['gb_per_s']:>7.0f} GB/s ({record['share_of_copy']:.0%} of copy), "
        f"{record['tflops']:>6.1f} TFLOP/s ({record['share_of_matmul']:.0%} of matmul); torch SDPA on contiguous "
        f"keys {record['sdpa_us'] or float('nan'):.1f} us"
    )


def _paged(device: torch.device, dtype: torch.dtype, batch: int, num_new: int, length: int) -> Any:
    blocks_each = -(-length // _BLOCK_SIZE)
    num_blocks = batch * blocks_each
    page = ops.page_shape(_BLOCK_SIZE, _HEAD_DIM, dtype, device)
    keys, values = (torch.randn(num_blocks, _KV_HEADS, *page, device=device, dtype=dtype) for _ in range(2))
    tables = torch.randperm(num_blocks, device=device).to(torch.int32).view(batch, blocks_each)
    starts = torch.arange(batch + 1, device=device, dtype=torch.int32) * num_new
    positions = torch.arange(length - num_new, length, device=device).repeat(batch)
    metadata = AttentionMetadata(
        query_start=starts,
        seq_lens=torch.full((batch,), length, dtype=torch.int32, device=device),
        block_tables=tables,
        slot_mapping=torch.zeros(batch * num_new, dtype=torch.int64, device=device),
        positions=positions,
        num_decodes=batch if num_new == 1 else 0,
        max_query_len=num_new,
        max_seq_len=length,
        block_size=_BLOCK_SIZE,
    )
    q = torch.randn(batch * num_new, _HEADS * _HEAD_DIM, device=device).to(dtype)
    return lambda: ops.paged_attention(q, keys, values, metadata, _HEAD_DIM**-0.5)


def _sdpa(device: torch.device, dtype: torch.dtype, batch: int, num_new: int, length: int) -> Any:
    """torch's attention where all keys lie side by side; it has no pages."""

    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, _HEAD_DIM, device=device, dtype=dtype)

    q, k, v = random(_HEADS, num_new), random(_KV_HEADS, length), random(_KV_HEADS, length)
    if num_new == length or num_new == 1:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=num_new > 1, enable_gqa=True)
    mask = torch.ones(num_new, length, dtype=torch.bool, device=device).tril(length - num_new)
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
