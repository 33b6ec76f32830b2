"""Each CPU kernel against the reference, over dtypes, odd shapes and one or two threads."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from manta.kernels import (
    argmax_cpu,
    linear_cpu,
    ops,
    paged_attention_cpu,
    paged_attention_sdpa,
    reference,
    rms_norm_cpu,
    rope_kv_write_cpu,
    silu_mul_cpu,
)
from manta.kernels import cpu_scalars as scalars
from tests.support.paging import PagedSequences
from tests.support.tolerances import KERNEL, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"], autouse=True)
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With two threads even the smallest input is shared, so that the parallel form is what runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(scalars, "MIN_PARALLEL_WORK", 0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def close(actual: Tensor, expected: Tensor) -> bool:
    return relative_error(actual, expected) < KERNEL[expected.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 48), (3, 577), (64, 60)])
def test_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, size).to(dtype), torch.rand(size).to(dtype)
    assert close(rms_norm_cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 48), (3, 577), (64, 60)])
def test_add_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    x, residual, weight = (
        torch.randn(rows, size).to(dtype),
        torch.randn(rows, size).to(dtype),
        torch.ones(size).to(dtype),
    )
    expected_residual = residual.clone()
    expected = reference.add_rms_norm(x, expected_residual, weight, 1e-5)
    assert close(rms_norm_cpu.add_rms_norm(x, residual, weight, 1e-5), expected)
    assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 88), (33, 129)])
def test_silu_mul(rows: int, size: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(rows, 2 * size) * 20).to(dtype)
    assert close(silu_mul_cpu.silu_mul(gate_up), reference.silu_mul(gate_up))


def test_silu_mul_of_extreme_gates() -> None:
    gate = torch.tensor([[-1e30, -500.0, -88.0, 0.0, 88.0, 500.0, 1e30]])
    out = silu_mul_cpu.silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    assert torch.allclose(out[:, 2:], torch.nn.functional.silu(gate[:, 2:]))
    assert out[0, 1].abs() < 1e-30  # the exponential is clamped, not overflown


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), [(6, 2, 20), (1, 1, 2), (4, 4, 64), (9, 3, 80)])
def test_rope_kv_write(num_heads: int, num_kv_heads: int, dim: int, with_norm: bool, dtype: torch.dtype) -> None:
    sequences = PagedSequences(block_size=8, num_blocks=12)
    metadata = sequences.step([(0, 1), (1, 19), (2, 7)])
    qkv = torch.randn(27, (num_heads + 2 * num_kv_heads) * dim).to(dtype)
    cos_sin = torch.randn(27, dim // 2).repeat(1, 2)
    norms = (torch.rand(dim).to(dtype), torch.rand(dim).to(dtype)) if with_norm else (None, None)
    shape = (12, num_kv_heads, 8, dim)
    results = []
    kernels: list[Any] = [rope_kv_write_cpu.rope_kv_write, reference.rope_kv_write]
    for kernel in kernels:
        mine, keys, values = qkv.clone(), torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        kernel(mine, cos_sin, metadata.slot_mapping, keys, values, *norms, 1e-6)
        results.append((mine[:, : num_heads * dim], keys, values))
    for actual, expected in zip(*results, strict=True):
        assert close(actual, expected)


ATTENTION_SHAPES = [
    (1, 1, 16, 8),
    (6, 2, 20, 16),
    (6, 6, 24, 8),
    (8, 1, 64, 16),
    (9, 3, 80, 32),
    (4, 2, 128, 128),
]


@pytest.mark.parametrize("kernel", [paged_attention_cpu, paged_attention_sdpa], ids=["cpu", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim", "block_size"), ATTENTION_SHAPES)
def test_paged_attention(
    num_heads: int, num_kv_heads: int, dim: int, block_size: int, window: int | None, dtype: torch.dtype, kernel: Any
) -> None:
    sequences = PagedSequences(block_size, num_blocks=40)
    sequences.step([(0, 30), (1, 1), (2, 16), (3, 9)])
    metadata = sequences.step([(0, 1), (1, 1), (2, 1), (3, 33), (4, 17), (5, 1)])
    shape = (40, num_kv_heads, block_size, dim)
    keys, values = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    qkv = torch.randn(54, (num_heads + 2 * num_kv_heads) * dim).to(dtype)
    q = qkv[:, : num_heads * dim]  # strided, as the model passes it
    out = kernel.paged_attention(q, keys, values, metadata, dim**-0.5, window)
    assert close(out, reference.paged_attention(q, keys, values, metadata, dim**-0.5, window))


@pytest.mark.parametrize("max_values", [1, 600, 5000])
def test_sdpa_attention_in_turns(max_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of keys or scores has more values than it may, whatever the step; the result stays the same."""
    num_heads, dim = 4, 8
    sizes: list[tuple[int, int, int]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def measured(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        sizes.append((q.shape[0], q.shape[2], num_heads * k.shape[2]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", measured)
    monkeypatch.setattr(paged_attention_sdpa, "MAX_VALUES", max_values)
    sequences = PagedSequences(8, num_blocks=40)
    sequences.step([(0, 30), (1, 1), (2, 16)])
    metadata = sequences.step([(0, 1), (1, 1), (2, 1), (3, 33), (4, 17), (5, 1)])
    keys, values = torch.randn(40, 2, 8, dim), torch.randn(40, 2, 8, dim)
    q = torch.randn(54, num_heads * dim)
    out = paged_attention_sdpa.paged_attention(q, keys, values, metadata, 0.3, 20)
    assert close(out, reference.paged_attention(q, keys, values, metadata, 0.3, 20))
    for num_rows, num_queries, num_keys in sizes:
        assert num_rows == 1 or num_rows * num_keys * dim <= 2 * max_values  # the last block may be half full
        assert num_queries == 1 or num_rows * num_queries * num_keys <= max_values


def test_attention_of_large_scores_does_not_overflow() -> None:
    metadata = PagedSequences(8, num_blocks=9).step([(0, 40)])
    keys, values = torch.randn(9, 1, 8, 16) * 100, torch.randn(9, 1, 8, 16)
    q = torch.randn(40, 16) * 100
    expected = reference.paged_attention(q, keys, values, metadata, 1.0)
    assert relative_error(paged_attention_cpu.paged_attention(q, keys, values, metadata, 1.0), expected) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("rows", "in_size", "out_size"), [(1, 48, 131), (5, 33, 7), (40, 88, 48)])
def test_linear(rows: int, in_size: int, out_size: int, has_bias: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, in_size).to(dtype), torch.randn(out_size, in_size).to(dtype)
    bias = torch.randn(out_size).to(dtype) if has_bias else None
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert close(linear_cpu.make_linear(weight, bias)(x), expected.to(dtype))


def test_linear_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cpu, "_pack", lambda weight: None)
    x, weight = torch.randn(3, 20, dtype=torch.bfloat16), torch.randn(9, 20, dtype=torch.bfloat16)
    assert torch.equal(linear_cpu.make_linear(weight, None)(x), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("size", [1, 15, 16, 131, 1024, 1025, 5000, 49152])
def test_argmax(size: int) -> None:
    logits = torch.randn(5, size + 3)[:, :size]
    logits[1, size // 2] = logits[1, -1] = 9.0  # the first of two
    logits[2] = -torch.inf
    logits[3] = -2e30
    logits[3, size - 1] = -1e30
    assert torch.equal(argmax_cpu.argmax(logits), logits.argmax(dim=-1))
    logits[0, 0] = torch.nan
    assert 0 <= int(argmax_cpu.argmax(logits)[0]) < size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_warm_up_leaves_nothing_to_compile(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "uses_cpu_decoder", lambda *_: False)
    ops.warm_up(dtype, dtype, torch.device("cpu"))
    kernels = [
        rms_norm_cpu._norm_rows,
        rms_norm_cpu._norm_parallel,
        rms_norm_cpu._add_norm_parallel,
        silu_mul_cpu._rows_parallel,
        rope_kv_write_cpu._tokens_parallel,
        paged_attention_cpu._items_parallel,
        rms_norm_cpu._add_norm_rows,
        silu_mul_cpu._rows,
        rope_kv_write_cpu._tokens,
        paged_attention_cpu._items,
    ]
    before = [len(kernel.signatures) for kernel in kernels]
    test_rms_norm(3, 48, dtype)
    test_add_rms_norm(3, 48, dtype)
    test_silu_mul(2, 88, dtype)
    test_rope_kv_write(6, 2, 20, True, dtype)
    test_rope_kv_write(6, 2, 20, False, dtype)
    test_paged_attention(6, 2, 20, 16, None, dtype, paged_attention_cpu)
    test_paged_attention(6, 2, 20, 16, 7, dtype, paged_attention_cpu)
    assert [len(kernel.signatures) for kernel in kernels] == before
