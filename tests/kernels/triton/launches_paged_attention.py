"""Paged attention as it is launched for real models: what `tests.support.aot` compiles."""

from functools import partial

import torch

from manta.kernels import paged_attention_triton
from manta.kernels.metadata import AttentionMetadata
from tests.support.aot import Launches

META = torch.device("meta")


def step(num_decodes: int, prompts: list[int], max_seq_len: int, block_size: int) -> AttentionMetadata:
    """Metadata of a step on the "meta" device: of the tensors only shapes are there."""
    num_rows, num_tokens = num_decodes + len(prompts), num_decodes + sum(prompts)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    return AttentionMetadata(
        query_start=empty(num_rows + 1),
        seq_lens=empty(num_rows),
        block_tables=empty(num_rows, -(-max_seq_len // block_size)),
        slot_mapping=empty(num_tokens, dtype=torch.int64),
        positions=empty(num_tokens, dtype=torch.int64),
        num_decodes=num_decodes,
        max_query_len=max([1, *prompts]),
        max_seq_len=max_seq_len,
        block_size=block_size,
    )


def launch(
    heads: tuple[int, int, int],
    rows: tuple[int, list[int], int],
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    fp8: bool = False,
    batch_invariant: bool = False,
) -> None:
    """heads: query heads, KV heads, head size; rows: decoding rows, new tokens of the others, longest sequence."""
    num_heads, num_kv_heads, dim = heads
    metadata = step(*rows, block_size)
    num_tokens = metadata.positions.shape[0]
    pages = (1024, num_kv_heads, block_size, dim)
    keys, values = (torch.empty(pages, dtype=torch.float8_e4m3fn if fp8 else dtype, device=META) for _ in range(2))
    q = torch.empty(num_tokens, (num_heads + 2 * num_kv_heads) * dim, dtype=dtype, device=META)[:, : num_heads * dim]
    scale = torch.empty(1, device=META) if fp8 else None
    paged_attention_triton.paged_attention(
        q, keys, values, metadata, dim**-0.5, window, scale, scale, batch_invariant=batch_invariant
    )


DECODE, SPLIT, MIXED, PREFILL = (256, [], 2048), (4, [], 32768), (64, [512, 100], 4096), (0, [8192], 8192)
MIXED_SPLIT, PREFILL_SPLIT = (4, [20], 32768), (0, [64], 32768)
LLAMA, QWEN, SMOL, PHI2, PHI3, GEMMA = (32, 8, 128), (16, 8, 128), (9, 3, 64), (32, 32, 80), (32, 8, 96), (16, 8, 256)
LAUNCHES: Launches = {
    "32/8 heads of 128, decode": partial(launch, LLAMA, DECODE),
    "32/8 heads of 128, decode, split, pages of 64": partial(launch, LLAMA, SPLIT, 64),
    "32/8 heads of 128, decode, fp8": partial(launch, LLAMA, DECODE, 32, fp8=True),
    "32/8 heads of 128, mixed": partial(launch, LLAMA, MIXED),
    "32/8 heads of 128, mixed, fp8": partial(launch, LLAMA, MIXED, fp8=True),
    "32/8 heads of 128, mixed, split": partial(launch, LLAMA, MIXED_SPLIT),
    "32/8 heads of 128, prefill": partial(launch, LLAMA, PREFILL),
    "32/8 heads of 128, prefill, window, pages of 64": partial(launch, LLAMA, PREFILL, 64, window=4096),
    "32/32 heads of 80, decode": partial(launch, PHI2, DECODE),
    "16/8 heads of 256, decode": partial(launch, GEMMA, DECODE),
    "16/8 heads of 256, prefill": partial(launch, GEMMA, PREFILL, 32),
    "32/8 heads of 128, mixed, split, fp8": partial(launch, LLAMA, MIXED_SPLIT, fp8=True),
    "32/8 heads of 128, prefill, split": partial(launch, LLAMA, PREFILL_SPLIT),
    "32/8 heads of 128, prefill, split, fp8": partial(launch, LLAMA, PREFILL_SPLIT, fp8=True),
    "32/8 heads of 128, decode, split, fp8": partial(launch, LLAMA, SPLIT, fp8=True),
    "16/8 heads of 128, decode": partial(launch, QWEN, DECODE),
    "16/8 heads of 128, decode, split": partial(launch, QWEN, SPLIT),
    "16/8 heads of 128, mixed, split": partial(launch, QWEN, MIXED_SPLIT),
    "16/8 heads of 128, prefill": partial(launch, QWEN, PREFILL),
    "32/8 heads of 128, mixed, fp8, batch-invariant": partial(launch, LLAMA, MIXED, fp8=True, batch_invariant=True),
    "32/8 heads of 128, decode, fp8, window": partial(launch, LLAMA, DECODE, fp8=True, window=4096),
    "16/8 heads of 256, decode, fp8": partial(launch, GEMMA, DECODE, fp8=True),
    "16/8 heads of 256, mixed, fp8": partial(launch, GEMMA, MIXED, fp8=True),
    "16/8 heads of 256, prefill, fp8": partial(launch, GEMMA, PREFILL, fp8=True),
    "32/8 heads of 96, prefill, fp8": partial(launch, PHI3, PREFILL, fp8=True),
    "9/3 heads of 64, mixed, fp8": partial(launch, SMOL, MIXED, fp8=True),
    "32/8 heads of 96, mixed": partial(launch, PHI3, MIXED, 32, dtype=torch.float16),
    "32/8 heads of 128, mixed, batch-invariant": partial(launch, LLAMA, MIXED, 64, batch_invariant=True),
    "32/8 heads of 128, prefill, fp8": partial(launch, LLAMA, PREFILL, 64, fp8=True),
    "9/3 heads of 64, decode": partial(launch, SMOL, DECODE),
    "9/3 heads of 64, prefill": partial(launch, SMOL, PREFILL),
    "16/8 heads of 256, mixed, window": partial(launch, GEMMA, MIXED, 32, window=512),
    "32/8 heads of 128, mixed, float32": partial(launch, LLAMA, MIXED, dtype=torch.float32),
}
