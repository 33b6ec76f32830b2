"""Launches of the norms, the gated activation and the rotation: shapes of Llama 3.1 8B and 70B, Qwen3 and SmolLM2."""

import torch
from torch import Tensor

from manta.kernels import quantize_triton, rms_norm_triton, rope_kv_write_triton, silu_mul_triton
from tests.support.aot import Launches


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _scale() -> Tensor:
    return _meta(1, dtype=torch.float32)


def _rope(num_heads: int, num_kv_heads: int, dim: int, has_norm: bool, is_fp8: bool) -> None:
    pages = [_meta(64, num_kv_heads, 16, dim, dtype=torch.float8_e4m3fn if is_fp8 else torch.bfloat16)] * 2
    norms = [_meta(dim)] * 2 if has_norm else [None, None]
    scales = [_scale()] * 2 if is_fp8 else [None, None]
    rope_kv_write_triton.rope_kv_write(
        _meta(256, (num_heads + 2 * num_kv_heads) * dim), _meta(256, dim, dtype=torch.float32),
        _meta(256, dtype=torch.int64), *pages, *norms, 1e-6, *scales,
    )  # fmt: skip


LAUNCHES: Launches = {
    "rms_norm 576": lambda: rms_norm_triton.rms_norm(_meta(256, 576), _meta(576), 1e-5),
    "rms_norm 4096": lambda: rms_norm_triton.rms_norm(_meta(256, 4096), _meta(4096), 1e-5),
    "rms_norm 4096 fp8": lambda: rms_norm_triton.rms_norm_fp8(_meta(256, 4096), _meta(4096), 1e-5),
    "add_rms_norm 1024": lambda: rms_norm_triton.add_rms_norm(_meta(9, 1024), _meta(9, 1024), _meta(1024), 1e-5),
    "add_rms_norm 4096": lambda: rms_norm_triton.add_rms_norm(_meta(9, 4096), _meta(9, 4096), _meta(4096), 1e-5),
    "add_rms_norm 4096 fp8": lambda: rms_norm_triton.add_rms_norm_fp8(
        _meta(9, 4096), _meta(9, 4096), _meta(4096), 1e-5
    ),
    "add_rms_norm 16384 fp8, one scale": lambda: rms_norm_triton.add_rms_norm_fp8(
        _meta(9, 16384), _meta(9, 16384), _meta(16384), 1e-5, _scale()
    ),
    "silu_mul 14336": lambda: silu_mul_triton.silu_mul(_meta(256, 28672)),
    "silu_mul 14336 fp8": lambda: silu_mul_triton.silu_mul_fp8(_meta(256, 28672)),
    "silu_mul 28672 fp8": lambda: silu_mul_triton.silu_mul_fp8(_meta(256, 57344)),
    "silu_mul 14336 fp8, one scale": lambda: silu_mul_triton.silu_mul_fp8(_meta(256, 28672), _scale()),
    "quantize 4096": lambda: quantize_triton.quantize(_meta(256, 4096)),
    "quantize 28672": lambda: quantize_triton.quantize(_meta(256, 28672)),
    "quantize 8192, one scale": lambda: quantize_triton.quantize(_meta(256, 8192), _scale()),
    "rope 32+8 heads of 128": lambda: _rope(32, 8, 128, False, False),
    "rope 32+8 heads of 128, fp8 pages": lambda: _rope(32, 8, 128, False, True),
    "rope 16+8 heads of 128, norms": lambda: _rope(16, 8, 128, True, False),
    "rope 9+3 heads of 64": lambda: _rope(9, 3, 64, False, False),
    "rope 8+1 heads of 256, norms, fp8 pages": lambda: _rope(8, 1, 256, True, True),
}
