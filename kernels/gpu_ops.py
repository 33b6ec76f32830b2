"""The operations of `reference` as Triton kernels, under the same names. Only `ops` imports it, where Triton is."""

from manta.kernels.rms_norm_triton import add_rms_norm, rms_norm
from manta.kernels.rope_kv_write_triton import rope_kv_write
from manta.kernels.silu_mul_triton import silu_mul

__all__ = ["add_rms_norm", "rms_norm", "rope_kv_write", "silu_mul"]
