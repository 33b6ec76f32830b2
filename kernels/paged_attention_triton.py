"""Attention over the paged KV cache on a GPU: one launch for rows that decode and rows that prefill.

Method: vLLM's "unified" Triton attention (Ringlein et al., "The anatomy of a Triton attention kernel", 2025,
arXiv 2511.11581): query heads that share a KV head are packed as rows of one tile, and tiles of all rows of the step
form one grid, each finding its row by bisection. Where too few tiles exist to fill the device, keys are split and
merged by a second kernel (Flash-Decoding, Dao et al. 2023). Grids depend on host numbers only (tokens, rows and bounds
of lengths), and real lengths are read on the device, so that a launch can be captured in a CUDA graph with bounds of a
bucket and replayed: rows of length 0 read no page and give zeros, tokens behind the last row are not written.
"""

import torch
import triton.language as tl
from torch import Tensor

from manta.kernels.gpu import gpu_of
from manta.kernels.metadata import AttentionMetadata
from manta.kernels.paged_attention_plan import MIN_SPLIT_TILES, Plan, make_plan, next_power_of_2
from manta.kernels.paged_attention_triton_kernels import attend, merge

_DOT_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Same contract as reference.paged_attention; q float16, bfloat16 or float32 [T, num_heads * head_dim].

    keys, values: q's dtype or float8_e4m3fn [num_blocks, num_kv_heads, block_size, head_dim], pages contiguous;
    k_scale, v_scale: float32 [1], what stored keys and values are multiplied by (both or none). scale is positive.
    batch_invariant: a token's result has the same bits whatever else is in the step.
    """
    num_tokens, dim = q.shape[0], keys.shape[3]
    num_heads = q.shape[1] // dim
    plan = make_plan(
        num_tokens, metadata.num_rows, metadata.num_decodes, metadata.max_query_len, metadata.max_seq_len, window,
        num_heads, keys.shape[1], dim, q.element_size(), keys.element_size() == 1, gpu_of(q.device), batch_invariant,
    )  # fmt: skip
    return run(plan, q, keys, values, metadata, scale, window, k_scale, v_scale)


def run(
    plan: Plan,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`paged_attention` as the plan lays it out."""
    num_tokens, (num_kv_heads, block_size, dim) = q.shape[0], keys.shape[1:]
    num_heads = q.shape[1] // dim
    assert q.stride(1) == 1, "rows of q must be contiguous"
    assert keys.stride()[2:] == (dim, 1), "pages must be contiguous"
    assert keys.stride() == values.stride(), "keys and values must be laid out alike"
    assert scale > 0, "scores are compared before they are scaled"
    assert block_size & (block_size - 1) == 0, f"the block size must be a power of 2, not {block_size}"
    out = torch.empty(num_tokens, num_heads * dim, dtype=q.dtype, device=q.device)
    if not num_tokens:
        return out
    is_fp8 = keys.dtype == torch.float8_e4m3fn
    assert is_fp8 == (k_scale is not None) == (v_scale is not None), "fp8 pages, and only they, have scales"
    fp8_bits = is_fp8 and (q.is_cpu or not gpu_of(q.device).converts_e4m3)
    if fp8_bits:
        keys, values = keys.view(torch.int8), values.view(torch.int8)
    is_split = plan.num_splits > 1
    partial, sums = out, out  # stand in where there are no splits
    if is_split:
        tokens = min(num_tokens, plan.tokens_per_launch)
        partial = q.new_empty((tokens, num_heads, plan.num_splits, dim), dtype=torch.float32)
        sums = q.new_empty((2, tokens, num_heads, plan.num_splits), dtype=torch.float32)
    # Triton's interpreter multiplies the bits of bfloat16 as integers.
    dot = tl.float32 if q.is_cpu and q.dtype == torch.bfloat16 else _DOT_TYPES[q.dtype]
    padded_dim = next_power_of_2(dim)
    for begin in range(0, num_tokens, plan.tokens_per_launch):
        end = min(begin + plan.tokens_per_launch, num_tokens)
        attend[plan.num_tiles, num_kv_heads, plan.num_splits](
            q, keys, values, out, partial, sums[0], sums[-1], metadata.query_start, metadata.seq_lens,
            metadata.block_tables, k_scale, v_scale, scale, 0 if window is None else window, metadata.num_rows,
            begin, end, metadata.block_tables.stride(0), q.stride(0), out.stride(0), keys.stride(0), keys.stride(1),
            NUM_HEADS=num_heads, GROUP=num_heads // num_kv_heads, DIM=dim, DIM_PADDED=padded_dim,
            BLOCK_SIZE=block_size, BLOCK_M=plan.tile.block_m, BLOCK_N=plan.tile.block_n, BLOCK_Q=plan.block_q,
            HAS_WINDOW=window is not None, ONE_TOKEN=plan.one_token, IS_SPLIT=is_split, FIXED_SPLIT=plan.fixed_split,
            MIN_SPLIT_TILES=MIN_SPLIT_TILES, HAS_SCALES=is_fp8, FP8_BITS=fp8_bits, DOT=dot,
            num_warps=plan.tile.num_warps,
            num_stages=plan.tile.num_stages, maxnreg=plan.tile.max_registers,
        )  # fmt: skip
        if is_split:
            merge[end - begin, num_heads](
                out, partial, sums[0], sums[1], metadata.query_start, v_scale, metadata.num_rows, begin,
                plan.num_splits, out.stride(0), NUM_HEADS=num_heads, DIM=dim, DIM_PADDED=padded_dim, BLOCK_S=16,
                HAS_SCALES=is_fp8, FP8_BITS=fp8_bits, num_warps=4,
            )  # fmt: skip
    return out
