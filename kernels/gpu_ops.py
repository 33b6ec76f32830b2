"""The operations of `reference` as Triton kernels, under the same names, and what only GPUs have. Imported by `ops`,
where Triton is."""

from manta.kernels.block_copy_triton import BlockCopier
from manta.kernels.logprobs_triton import logprobs
from manta.kernels.quantize_triton import quantize
from manta.kernels.rms_norm_triton import add_rms_norm, add_rms_norm_fp8, rms_norm, rms_norm_fp8
from manta.kernels.rope_kv_write_triton import rope_kv_write
from manta.kernels.sample_triton import RowSampler
from manta.kernels.silu_mul_triton import silu_mul, silu_mul_fp8
from manta.kernels.step_inputs_triton import advance, build_inputs

__all__ = [
    "BlockCopier",
    "RowSampler",
    "add_rms_norm",
    "add_rms_norm_fp8",
    "advance",
    "build_inputs",
    "logprobs",
    "quantize",
    "rms_norm",
    "rms_norm_fp8",
    "rope_kv_write",
    "silu_mul",
    "silu_mul_fp8",
]
