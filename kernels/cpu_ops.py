"""The operations of `ops` on a CPU. Only `ops` imports it, where there are tensors of a CPU: it needs numba."""

import torch

from manta.kernels.argmax_cpu import argmax
from manta.kernels.cpu_decoder.layout import page_shape
from manta.kernels.linear_cpu import make_linear
from manta.kernels.logprobs_cpu import logprobs
from manta.kernels.metadata import AttentionMetadata
from manta.kernels.paged_attention_cpu import paged_attention
from manta.kernels.rms_norm_cpu import add_rms_norm, rms_norm
from manta.kernels.rope_kv_write_cpu import rope_kv_write
from manta.kernels.sample_cpu import RowSampler
from manta.kernels.silu_mul_cpu import silu_mul

__all__ = [
    "RowSampler",
    "add_rms_norm",
    "argmax",
    "logprobs",
    "make_linear",
    "page_shape",
    "paged_attention",
    "rms_norm",
    "rope_kv_write",
    "silu_mul",
    "warm_up",
]


def warm_up(dtype: torch.dtype, uses_decoder: bool) -> None:
    """Compiles what has not been compiled when the model was built."""
    argmax(torch.zeros(1, 1))
    logprobs(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), 1)
    if uses_decoder:
        return
    dim = 16
    ones = torch.ones(dim, dtype=dtype)
    keys, values = (torch.zeros(2, 1, 8, dim, dtype=dtype) for _ in range(2))
    # Large enough to go over all threads where there are several: serial and parallel forms compile separately.
    for num_tokens in (1, 8192):
        x = torch.zeros(num_tokens, dim * 3, dtype=dtype)
        weight = torch.ones(dim * 3, dtype=dtype)
        rms_norm(x, weight, 1e-6)
        add_rms_norm(x, torch.zeros_like(x), weight, 1e-6)
        silu_mul(x[:, : 2 * dim].contiguous())
        slots = torch.zeros(num_tokens, dtype=torch.int64)
        rope_kv_write(x, torch.zeros(num_tokens, dim), slots, keys, values, ones, ones, 1e-6)
        metadata = AttentionMetadata(
            query_start=torch.arange(num_tokens + 1, dtype=torch.int32),
            seq_lens=torch.ones(num_tokens, dtype=torch.int32),
            block_tables=torch.zeros(num_tokens, 1, dtype=torch.int32),
            slot_mapping=slots,
            positions=slots,
            num_decodes=num_tokens,
            max_query_len=1,
            max_seq_len=8,
            block_size=8,
        )
        paged_attention(x[:, :dim], keys, values, metadata, 1.0)
