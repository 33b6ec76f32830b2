"""The oracle itself, against torch's own functions on dense tensors."""

import pytest
import torch
import torch.nn.functional as F

from manta.kernels import ops, reference
from tests.support.paging import PagedSequences
from tests.support.tolerances import KERNEL, relative_error

TOLERANCE = KERNEL[torch.float32]


def test_rms_norm_equals_torch() -> None:
    x, weight = torch.randn(7, 60), torch.rand(60)
    assert relative_error(reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (60,), weight, 1e-5)) < TOLERANCE


def test_add_rms_norm_adds_in_place() -> None:
    x, residual, weight = torch.randn(5, 24), torch.randn(5, 24), torch.rand(24)
    total = x + residual
    out = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert relative_error(out, F.rms_norm(total, (24,), weight, 1e-5)) < TOLERANCE


def test_silu_mul_equals_torch() -> None:
    gate, up = torch.randn(3, 17), torch.randn(3, 17)
    assert relative_error(reference.silu_mul(torch.cat((gate, up), dim=1)), F.silu(gate) * up) < TOLERANCE


def test_rope_rotates_complex_pairs() -> None:
    x, angles = torch.randn(9, 2, 20), torch.randn(9, 10)
    pairs = torch.complex(x[..., :10], x[..., 10:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    out = reference.apply_rope(x, torch.cat((angles.cos(), angles.sin()), dim=1))
    assert relative_error(out, torch.cat((pairs.real, pairs.imag), dim=-1)) < TOLERANCE


@pytest.mark.parametrize("window", [None, 1, 5])
def test_attention_equals_dense_sdpa(window: int | None) -> None:
    length, num_heads, num_kv_heads, dim = 21, 6, 2, 20
    sequences = PagedSequences(block_size=8, num_blocks=9)
    metadata = sequences.step([(0, length)])
    k, v = torch.randn(length, num_kv_heads, dim), torch.randn(length, num_kv_heads, dim)
    keys, values = torch.zeros(9, num_kv_heads, 8, dim), torch.zeros(9, num_kv_heads, 8, dim)
    reference.kv_write(k, v, metadata.slot_mapping, keys, values)
    q = torch.randn(length, num_heads, dim)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    dense = F.scaled_dot_product_attention(
        q.transpose(0, 1),
        k.repeat_interleave(3, dim=1).transpose(0, 1),
        v.repeat_interleave(3, dim=1).transpose(0, 1),
        attn_mask=seen,
        scale=0.3,
    )
    out = reference.paged_attention(q.flatten(1), keys, values, metadata, 0.3, window)
    assert relative_error(out, dense.transpose(0, 1).flatten(1)) < TOLERANCE


@pytest.mark.parametrize("scale", [0.02, 1.0, None])
def test_fp8_outputs_are_the_values_within_a_rounding(scale: float | None) -> None:
    """Through `ops`, which takes the reference for them on a CPU: 3 bits of mantissa, nothing beyond 448."""
    x, residual, weight = torch.randn(5, 24), torch.randn(5, 24), torch.rand(24)
    divisor = None if scale is None else torch.tensor([scale])
    x[2] = residual[2] = 0
    pairs = [
        (ops.rms_norm_fp8(x, weight, 1e-5, divisor), ops.rms_norm(x, weight, 1e-5)),
        (ops.silu_mul_fp8(x * 4, divisor), ops.silu_mul(x * 4)),
        (ops.quantize(x, divisor), x),
        (ops.add_rms_norm_fp8(x, residual.clone(), weight, 1e-5, divisor), ops.add_rms_norm(x, residual, weight, 1e-5)),
    ]
    for (values, scales), exact in pairs:
        assert values.dtype == torch.float8_e4m3fn
        if scale is None:  # the greatest value of a row becomes the greatest there is
            assert torch.equal(values.float().abs().amax(dim=1), torch.where(exact.any(dim=1), 448.0, 0.0))
        expected = exact.clamp(-448 * scales, 448 * scales)
        assert bool(((values.float() * scales - expected).abs() <= expected.abs() / 16 + scales * 2**-10).all())


def test_fp8_pages_hold_what_other_pages_do_within_a_rounding() -> None:
    metadata = PagedSequences(block_size=8, num_blocks=4).step([(0, 11)])
    qkv, cos_sin = torch.randn(11, 4 * 16), torch.randn(11, 16)
    exact = [torch.zeros(4, 1, 8, 16) for _ in range(2)]
    quantised = [pages.to(torch.float8_e4m3fn) for pages in exact]
    k_scale, v_scale = torch.tensor([0.5]), torch.tensor([0.25])
    ops.rope_kv_write(qkv.clone(), cos_sin, metadata.slot_mapping, *quantised, k_scale=k_scale, v_scale=v_scale)
    ops.rope_kv_write(qkv, cos_sin, metadata.slot_mapping, *exact)
    for pages, expected, scale in zip(quantised, exact, (k_scale, v_scale), strict=True):
        assert bool(((pages.float() * scale - expected).abs() <= expected.abs() / 16 + scale * 2**-10).all())
