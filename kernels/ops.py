"""The operations models are written with. This is the only place that picks a kernel by device.

A CUDA device runs Triton kernels, or plain torch where Triton is not installed; contracts (shapes, dtypes) are those of
`reference`.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manta.kernels import attention, linears, reference, step_tensors
from manta.kernels.cpu_decoder import memory
from manta.kernels.fp8 import Fp8Rows
from manta.kernels.metadata import AttentionMetadata, KVCache
from manta.kernels.sampling_parameters import Parameters


@cache
def _cpu() -> ModuleType:
    """What CPUs run. Imported when the first tensor of one comes: it compiles with numba, which GPUs do without."""
    from manta.kernels import cpu_ops

    return cpu_ops


def _kernels_for(x: Tensor, is_fp8: bool = False) -> Any:
    """CPUs have kernels of their own, but none of fp8."""
    return _gpu() if not x.is_cpu else reference if is_fp8 else _cpu()


@cache
def _gpu() -> ModuleType:
    """What GPUs run. Imported when the first tensor of one comes: processes of a CPU do without."""
    if find_spec("triton") is None:
        return reference
    from manta.kernels import gpu_ops

    return gpu_ops


def has_gpu_kernels() -> bool:
    """Whether steps on a GPU launch nothing that waits for the device, as CUDA graphs need it."""
    return find_spec("triton") is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm of x [T, hidden]."""
    out: Tensor = _kernels_for(x).rms_norm(x, weight, eps)
    return out


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Fp8Rows:
    """The same as fp8, quantised by scale (float32 [1]) or, without one, by each row's own."""
    rows: Fp8Rows = _kernels_for(x, is_fp8=True).rms_norm_fp8(x, weight, eps, scale)
    return rows


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place; returns its root mean square norm. x, residual: [T, hidden]."""
    out: Tensor = _kernels_for(x).add_rms_norm(x, residual, weight, eps)
    return out


def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Fp8Rows:
    """The same as fp8, as `rms_norm_fp8` gives it."""
    rows: Fp8Rows = _kernels_for(x, is_fp8=True).add_rms_norm_fp8(x, residual, weight, eps, scale)
    return rows


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * size], gate first -> silu(gate) * up [T, size]."""
    out: Tensor = _kernels_for(gate_up).silu_mul(gate_up)
    return out


def silu_mul_fp8(gate_up: Tensor, scale: Tensor | None = None) -> Fp8Rows:
    """The same as fp8, quantised by scale (float32 [1]) or, without one, by each row's own."""
    rows: Fp8Rows = _kernels_for(gate_up, is_fp8=True).silu_mul_fp8(gate_up, scale)
    return rows


def quantize(x: Tensor, scale: Tensor | None = None) -> Fp8Rows:
    """x [T, size] as fp8, likewise."""
    rows: Fp8Rows = _kernels_for(x, is_fp8=True).quantize(x, scale)
    return rows


def rope_kv_write(
    qkv: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    keys: Tensor,
    values: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Norms (if weights are given) and rotates queries (in place) and keys; writes keys and values to their pages.

    k_scale, v_scale: float32 [1], what keys and values are divided by in fp8 pages; None for other pages.
    """
    scales = () if k_scale is None else (k_scale, v_scale)
    write = _kernels_for(qkv, bool(scales)).rope_kv_write
    write(qkv, cos_sin, slot_mapping, keys, values, q_norm, k_norm, eps, *scales)


# This process's; set once by use_attention.
_gpu_attention: attention.PagedAttention | None = None
_batch_invariant = False


def use_attention(form: str | None = None, batch_invariant: bool = False) -> None:
    """What `paged_attention` runs on GPUs from now on, as attention.on_gpu says; without this call, the default.

    batch_invariant: linears that are made from now on do not depend on the batch either. Raises ValueError.
    """
    global _gpu_attention, _batch_invariant
    _gpu_attention, _batch_invariant = attention.on_gpu(form, batch_invariant), batch_invariant


def can_be_recorded() -> bool:
    """Whether CUDA graphs can hold a step: not with an attention that plans on the host from what the device knows."""
    return not isinstance(_gpu_attention, attention.PlansOnHost)


def is_batch_invariant() -> bool:
    """Whether a token's result must not depend, on a GPU, on what else is in its step."""
    return _batch_invariant


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [T, num_heads * head_dim] over each row's pages; `window` counts the query itself.

    k_scale, v_scale: float32 [1], what the contents of fp8 pages are multiplied by; None for other pages.
    """
    if q.is_cpu:
        return attention.on_cpu(q, keys, values, metadata, scale, window, k_scale, v_scale)
    if _gpu_attention is None:
        use_attention()
        assert _gpu_attention is not None
    return _gpu_attention(q, keys, values, metadata, scale, window, k_scale, v_scale)


def make_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The function [T, in] -> [T, out] of weight [out, in] and bias [out]; may hold a copy instead of the weight."""
    if not weight.is_cpu:
        return linears.make_linear(weight, bias, _batch_invariant)
    apply: Callable[[Tensor], Tensor] = _cpu().make_linear(weight, bias)
    return apply


def has_fp8_products(device: torch.device) -> bool:
    """Whether `make_fp8_linear` is for this device; elsewhere weights of fp8 are better widened when they are read."""
    return linears.has_fp8_products(device)


def make_fp8_linear(
    weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Callable[[Fp8Rows], Tensor]:
    """The function Fp8Rows of [T, in] -> [T, out] of dtype; weight float8_e4m3fn [out, in], scales float32 [out]."""
    return linears.make_fp8_linear(weight, weight_scales, bias, dtype, _batch_invariant)


def build_inputs(
    columns: step_tensors.SlotColumns,
    slots: Tensor,
    query_start: Tensor,
    block_size: int,
    out: step_tensors.StepInputs,
) -> None:
    """Fills `out` for a step whose row r computes the tokens query_start[r] : query_start[r + 1] of slots[r]."""
    form = step_tensors if slots.is_cpu or not has_gpu_kernels() else _gpu()
    form.build_inputs(columns, slots, query_start, block_size, out)


def advance(
    columns: step_tensors.SlotColumns,
    slots: Tensor,
    query_start: Tensor,
    out: step_tensors.StepInputs,
    sampled: Tensor,
) -> None:
    """Moves the columns to where such a step leaves them; sampled: int64 [R], by row."""
    form = step_tensors if slots.is_cpu or not has_gpu_kernels() else _gpu()
    form.advance(columns, slots, query_start, out, sampled)


def argmax(logits: Tensor) -> Tensor:
    """The best token int64 [N] of logits float32 [N, vocab]."""
    best: Tensor = _cpu().argmax(logits) if logits.is_cpu else logits.argmax(dim=-1)
    return best


RowSampler = Callable[[Tensor, NDArray[np.int64], NDArray[np.int64], Parameters, Tensor], Tensor]


def make_row_sampler(device: torch.device) -> RowSampler | None:
    """What chooses the tokens of all rows of a step in one call (see `sample_cpu.RowSampler`); None on devices where
    torch's operations do."""
    if device.type != "cpu" and not has_gpu_kernels():
        return None
    sampler: RowSampler = (_cpu() if device.type == "cpu" else _gpu()).RowSampler()
    return sampler


def logprobs(logits: Tensor, tokens: Tensor, num_best: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities float32 and ranks int64 [N] of tokens int64 [N]; ids and log-probabilities [N, num_best] of the
    best (up to 256)."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _kernels_for(logits).logprobs(logits, tokens, num_best)
    return found


def make_block_copier(kv_cache: KVCache) -> Any:
    """A `block_copy_triton.BlockCopier` of a cache on a GPU; None where torch's indexed copies have to do."""
    return None if kv_cache[0][0].is_cpu or not has_gpu_kernels() else _gpu().BlockCopier(kv_cache)


def uses_cpu_decoder(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the whole decoder runs as one kernel (`cpu_decoder`) instead of the operations above.

    dtype: of the KV cache. On every CPU but for bfloat16 on those with matrix units (AMX), which oneDNN uses and
    `cpu_decoder` does not, and for fp8.
    """
    if device.type != "cpu" or dtype == torch.float8_e4m3fn:
        return False
    return not (dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported())


def page_shape(block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """The last two dimensions of a KV cache tensor: one head's page of block_size tokens."""
    if not uses_cpu_decoder(dtype, device):
        return block_size, head_dim
    shape: tuple[int, int] = _cpu().page_shape(block_size, head_dim)
    return shape


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A large tensor of zeros, for the KV cache: on a CPU in large memory pages, taken from the system as it fills."""
    return memory.zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)


def warm_up(dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> None:
    """Compiles every kernel a model of this dtype with such pages runs, so that no request waits for it. Sizes are
    run-time values."""
    if device.type == "cpu":
        _cpu().warm_up(dtype, uses_cpu_decoder(kv_dtype, device))
