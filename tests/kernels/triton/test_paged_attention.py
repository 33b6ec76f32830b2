"""Paged attention in Triton against torch's own attention in float64: interpreted on CPU tensors, or on a GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from manta.kernels import paged_attention_triton
from manta.kernels.gpu import Gpu
from manta.kernels.metadata import AttentionMetadata
from manta.kernels.paged_attention_plan import Plan, make_plan
from tests.kernels.triton.attention_cases import (
    NUM_BLOCKS,
    SHAPES,
    STEPS,
    attention_by_sdpa,
    make_step,
    make_tensors,
    to_device,
)
from tests.support.paging import PagedSequences
from tests.support.tolerances import KERNEL, relative_error
from tests.support.triton_device import INTERPRETED

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[pytest.param(CPU, id="interpreter"), pytest.param(CUDA, id="gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == CUDA and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if (request.param == CPU) != INTERPRETED:
        pytest.skip("kernels are interpreted here" if INTERPRETED else "kernels are compiled here, not interpreted")
    return torch.device(request.param)


def plan_of(q: Tensor, keys: Tensor, metadata: AttentionMetadata, window: int | None, **changes: Any) -> Plan:
    """The plan of a device that the step fills, so that nothing is split, with changes."""
    dim = keys.shape[3]
    plan = make_plan(
        q.shape[0], metadata.num_rows, metadata.num_decodes, metadata.max_query_len, metadata.max_seq_len, window,
        q.shape[1] // dim, keys.shape[1], dim, q.element_size(), keys.element_size() == 1, Gpu(90, 1), False,
    )  # fmt: skip
    assert plan.num_splits == 1
    return replace(plan, **changes)


CASES = [(shape, name, torch.float16) for shape in SHAPES for name in STEPS]
CASES += [(shape, "mixed", dtype) for shape in SHAPES[:3] for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("shape", "name", "dtype"), CASES, ids=str)
def test_values(shape: tuple[int, int, int, int], name: str, dtype: torch.dtype, device: torch.device) -> None:
    metadata = make_step(name, shape[3], device)
    q, keys, values = make_tensors(metadata, shape, dtype)
    scale = shape[2] ** -0.5
    out = paged_attention_triton.run(plan_of(q, keys, metadata, None), q, keys, values, metadata, scale)
    expected = attention_by_sdpa(q, keys, values, metadata, scale, None)
    assert out.dtype == dtype
    assert relative_error(out.cpu(), expected) < KERNEL[dtype]


@pytest.mark.parametrize(("window", "num_splits"), [(1, 1), (17, 1), (64, 1), (100, 2)])
@pytest.mark.parametrize("name", STEPS)
def test_window(name: str, num_splits: int, window: int, device: torch.device) -> None:
    shape = (6, 2, 20, 16)
    metadata = make_step(name, 16, device)
    q, keys, values = make_tensors(metadata, shape, torch.float16)
    plan = plan_of(q, keys, metadata, window, num_splits=num_splits)
    plan = replace(plan, tile=replace(plan.tile, block_n=16))  # several tiles in a window
    out = paged_attention_triton.run(plan, q, keys, values, metadata, 0.3, window)
    expected = attention_by_sdpa(q, keys, values, metadata, 0.3, window)
    assert relative_error(out.cpu(), expected) < KERNEL[torch.float16]


@pytest.mark.parametrize(
    ("name", "num_splits", "fixed_split", "tokens_per_launch"),
    [("decode", 2, 0, 99), ("decode", 21, 0, 99), ("decode", 9, 32, 99), ("mixed", 3, 0, 99), ("prefill", 3, 32, 13)],
)
def test_split(name: str, num_splits: int, fixed_split: int, tokens_per_launch: int, device: torch.device) -> None:
    """Keys shared out evenly or at fixed positions, with more splits than keys, and the step taken in turns."""
    metadata = make_step(name, 16, device)
    q, keys, values = make_tensors(metadata, (2, 1, 20, 16), torch.float32)
    assert num_splits * (fixed_split or 99) >= metadata.max_seq_len
    plan = plan_of(q, keys, metadata, None)
    plan = replace(plan, num_splits=num_splits, fixed_split=fixed_split, tokens_per_launch=tokens_per_launch)
    plan = replace(plan, tile=replace(plan.tile, block_n=16))
    out = paged_attention_triton.run(plan, q, keys, values, metadata, 0.3)
    assert relative_error(out.cpu(), attention_by_sdpa(q, keys, values, metadata, 0.3, None)) < KERNEL[torch.float32]


@pytest.mark.parametrize(
    ("num_splits", "dtype"), [(1, torch.float16), (1, torch.bfloat16), (1, torch.float32), (2, torch.float16)], ids=str
)
def test_fp8_pages(num_splits: int, dtype: torch.dtype, device: torch.device) -> None:
    """Pages of e4m3, over its whole range down to what it can only write without the leading one."""
    metadata = make_step("decode", 16, device)
    q, keys, values = make_tensors(metadata, (6, 2, 64, 16), dtype)
    spread = torch.logspace(-10, 8, keys.shape[1] * 64, base=2, dtype=dtype, device=device).view(-1, 1, 64)
    keys, values = (keys / 4).to(torch.float8_e4m3fn), (values * spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    k_scale, v_scale = torch.tensor([0.7], device=device), torch.tensor([3.0], device=device)
    plan = plan_of(q, keys, metadata, None, num_splits=num_splits)
    out = paged_attention_triton.run(plan, q, keys, values, metadata, 0.3, None, k_scale, v_scale)
    expected = attention_by_sdpa(q, keys.float() * 0.7, values.float() * 3.0, metadata, 0.3, None)
    for head in range(6):  # values of each size on their own
        part = slice(head * 64 + 32, head * 64 + 64)
        assert relative_error(out[:, part].cpu(), expected[:, part]) < KERNEL[dtype]


def test_large_scores(device: torch.device) -> None:
    """Scores of thousands: the exponential neither overflows nor leaves a row without weight."""
    metadata = make_step("mixed", 16, device)
    q, keys, values = make_tensors(metadata, (2, 1, 20, 16), torch.float32)
    q, keys = q * 30, keys * 30
    out = paged_attention_triton.run(plan_of(q, keys, metadata, None), q, keys, values, metadata, 1.0)
    assert relative_error(out.cpu(), attention_by_sdpa(q, keys, values, metadata, 1.0, None)) < 1e-4


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("one_token", [True, False], ids=["decode", "search"])
def test_padded_rows(one_token: bool, num_splits: int, device: torch.device) -> None:
    """A bucket of 8 rows for 4: rows of length 0 read no page (theirs do not exist) and get zeros."""
    metadata = make_step("decode", 16, device)
    q, keys, values = make_tensors(metadata, (6, 2, 20, 16), torch.float32)
    expected = attention_by_sdpa(q, keys, values, metadata, 0.3, None)
    tables = metadata.block_tables.new_full((8, metadata.block_tables.shape[1] + 3), 1 << 30)
    tables[:4, : metadata.block_tables.shape[1]] = metadata.block_tables
    bucket = replace(
        metadata,
        query_start=torch.arange(9, dtype=torch.int32, device=device),
        seq_lens=torch.cat((metadata.seq_lens, metadata.seq_lens.new_zeros(4))),
        block_tables=tables,
    )
    q = torch.cat((q, q.new_full((4, q.shape[1]), torch.nan)))
    plan = plan_of(q, keys, bucket, None, num_splits=num_splits)
    assert plan.one_token
    if not one_token:
        block_q = plan.tile.block_m // 3
        plan = replace(plan, one_token=False, block_q=block_q, num_tiles=8 // block_q + 8)
    out = paged_attention_triton.run(plan, q, keys, values, bucket, 0.3).cpu()
    assert relative_error(out[:4], expected) < KERNEL[torch.float32]
    assert not out[4:].any()


@pytest.mark.parametrize("num_splits", [1, 2])
def test_rows_without_tokens(num_splits: int, device: torch.device) -> None:
    """Rows that end where they begin, between others and behind all, have no part in the step."""
    metadata = make_step("mixed", 16, device)
    q, keys, values = make_tensors(metadata, (2, 1, 20, 16), torch.float32)
    expected = attention_by_sdpa(q, keys, values, metadata, 0.3, None)
    order = torch.tensor([0, 1, 1, 2, 3, 4, 4, 4], device=device)
    present = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0], device=device)
    counts = metadata.query_start.diff()[order] * present
    padded = replace(
        metadata,
        query_start=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        seq_lens=(metadata.seq_lens[order] * present).to(torch.int32),
        block_tables=metadata.block_tables[order],
        num_decodes=2,
    )
    plan = plan_of(q, keys, padded, None, num_splits=num_splits)
    out = paged_attention_triton.run(plan, q, keys, values, padded, 0.3)
    assert relative_error(out.cpu(), expected) < KERNEL[torch.float32]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_batch_invariance(
    dtype: torch.dtype, window: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token's output has the same bits alone, in one prompt, in chunks of a prompt, and among other sequences."""
    monkeypatch.setattr("manta.kernels.paged_attention_plan.INVARIANT_SPLIT", 64 if dtype == torch.float16 else 32)
    make_plan.cache_clear()
    shape, length = (2, 1, 20, 16), 100
    whole = PagedSequences(16, NUM_BLOCKS).step([(0, length)])
    q, keys, values = make_tensors(to_device(whole, device), shape, dtype)
    keys, values = keys.nan_to_num(0.5), values.nan_to_num(0.5)  # pages of the other sequences

    def attended(*steps: list[tuple[int, int]]) -> Tensor:
        """The outputs for sequence 0 of the last step; all sequences have queries as sequence 0 at their positions."""
        sequences = PagedSequences(16, NUM_BLOCKS)
        *_, metadata = [sequences.step(step) for step in steps]
        row = [sequence for sequence, _ in steps[-1]].index(0)
        first, last = metadata.query_start[row : row + 2].tolist()
        queries, metadata = q[metadata.positions.to(device)], to_device(metadata, device)
        out = paged_attention_triton.paged_attention(queries, keys, values, metadata, 0.3, window, batch_invariant=True)
        return out[first:last].cpu()

    expected = attended([(0, length)])
    assert relative_error(expected, attention_by_sdpa(q, keys, values, whole, 0.3, window)) < KERNEL[dtype]
    assert torch.equal(attended([(0, 70)], [(0, 30)]), expected[70:])
    assert torch.equal(attended([(0, 99)], [(0, 1)]), expected[99:])
    assert torch.equal(attended([(0, 64)], [(0, 1)]), expected[64:65])
    # Blocks are handed out in one order, so that sequence 0 has the same pages when the others come after it.
    assert torch.equal(attended([(0, 99), (1, 30)], [(1, 1), (0, 1), (2, 20)]), expected[99:])
    assert torch.equal(attended([(0, 99), (1, 90)], [(0, 1), (1, 1)]), expected[99:])
    make_plan.cache_clear()


@pytest.mark.gpu
def test_replay_of_a_captured_launch() -> None:
    """A CUDA graph captured for a bucket gives, replayed, the results for the lengths that lie there then."""
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    shape = (8, 2, 128, 16)
    metadata = make_step("decode", 16, CUDA)
    q, keys, values = make_tensors(metadata, shape, torch.bfloat16)
    keys, values = keys.nan_to_num(0.5), values.nan_to_num(0.5)
    full = replace(metadata, seq_lens=torch.full_like(metadata.seq_lens, 1), max_seq_len=4096)
    paged_attention_triton.paged_attention(q, keys, values, full, 0.1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention_triton.paged_attention(q, keys, values, full, 0.1)
    full.seq_lens.copy_(metadata.seq_lens)
    graph.replay()
    expected = attention_by_sdpa(q, keys, values, metadata, 0.1, None)
    assert relative_error(out.cpu(), expected) < KERNEL[torch.bfloat16]
