"""What surrounds the layers of a decode step, captured in a CUDA graph and replayed with other rows than captured."""

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="numba is not installed", exc_type=ImportError)
from manta.kernels import sample_cpu, step_tensors
from manta.kernels.step_tensors import SlotColumns, StepInputs
from tests.kernels.test_sample_cpu import Filters, parameters
from tests.support.triton_device import INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
from manta.kernels import sample_triton, step_inputs_triton
from manta.kernels.block_copy_triton import BlockCopier
from manta.kernels.sample_penalties_triton import make_counts
from manta.kernels.sampling_rows import SamplingRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")
NUM_ROWS, NUM_SLOTS, VOCAB_SIZE, BLOCK_SIZE = 8, 12, 5000, 16


def make_columns(device: torch.device) -> SlotColumns:
    generator = torch.Generator().manual_seed(0)
    length = torch.randint(2, 60, (NUM_SLOTS,), generator=generator, dtype=torch.int32)
    return SlotColumns(
        length=length.to(device),
        num_computed=(length - 1).to(device),
        block_table=torch.randint(1, 99, (NUM_SLOTS, 8), generator=generator, dtype=torch.int32).to(device),
        tokens=torch.randint(0, VOCAB_SIZE, (NUM_SLOTS, 128), generator=generator, dtype=torch.int32).to(device),
    )


def test_replayed_steps_are_those_of_the_cpu() -> None:
    """Ten steps of three to eight rows: inputs, penalties, draws and the slots' columns, beside torch and the CPU."""
    columns, expected_columns = make_columns(CUDA), make_columns(torch.device("cpu"))
    chosen_by = parameters(NUM_SLOTS, Filters(0.8, 40, 0.95, 0.01), seed=np.arange(NUM_SLOTS, dtype=np.uint64))
    chosen_by.frequency_penalty[::2] = 0.5
    chosen_by.repetition_penalty[::3] = 1.2
    all_logits = torch.randn(10, NUM_ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 3

    out, expected = (StepInputs.empty(NUM_ROWS, NUM_ROWS, 8, device) for device in (CUDA, torch.device("cpu")))
    slots = torch.full((NUM_ROWS,), -1, dtype=torch.int32, device=CUDA)
    query_start = torch.arange(NUM_ROWS + 1, dtype=torch.int32, device=CUDA)
    none = np.zeros(NUM_ROWS, np.int64)
    rows = SamplingRows.of(none - 1, none, parameters(1, Filters()), CUDA)
    logits = torch.zeros(NUM_ROWS, VOCAB_SIZE, device=CUDA)
    counts = make_counts(4, VOCAB_SIZE, CUDA)

    def step() -> torch.Tensor:
        step_inputs_triton.build_inputs(columns, slots, query_start, BLOCK_SIZE, out)
        sampled = sample_triton.sample(logits, rows, columns.tokens, counts)
        step_inputs_triton.advance(columns, slots, query_start, out, sampled)
        return sampled

    step()  # compiles; no row is there
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampled = step()
    sampler = sample_cpu.RowSampler()
    for i in range(10):
        num_rows = 3 + i % 6
        host_slots = np.random.default_rng(i).permutation(NUM_SLOTS)[:num_rows]
        positions = expected_columns.length.numpy()[host_slots].astype(np.int64)
        slots.fill_(-1)[:num_rows] = torch.from_numpy(host_slots).to(CUDA, torch.int32)
        now = SamplingRows.of(host_slots, positions, chosen_by, CUDA)
        rows.ints.fill_(-1)
        rows.floats[:, :num_rows], rows.ints[:, :num_rows] = now.floats, now.ints
        logits.copy_(all_logits[i])
        graph.replay()

        cpu_slots = slots.cpu()
        step_tensors.build_inputs(expected_columns, cpu_slots, query_start.cpu(), BLOCK_SIZE, expected)
        for name in StepInputs.__slots__:
            assert torch.equal(getattr(out, name).cpu(), getattr(expected, name)), name
        tokens = sampler(all_logits[i, :num_rows].clone(), host_slots, positions, chosen_by, expected_columns.tokens)
        assert sampled[:num_rows].tolist() == tokens.tolist()
        padded = torch.zeros(NUM_ROWS, dtype=torch.int64)
        padded[:num_rows] = tokens
        step_tensors.advance(expected_columns, cpu_slots, query_start.cpu(), expected, padded)
        for name in SlotColumns.__slots__:
            assert torch.equal(getattr(columns, name).cpu(), getattr(expected_columns, name)), name
    assert not counts.any()


def test_replayed_copies_take_the_pairs_of_then() -> None:
    kv_cache = [(torch.randn(9, 2, 16, 64, device=CUDA), torch.randn(9, 2, 16, 64, device=CUDA)) for _ in range(3)]
    pairs = torch.full((2, 4), -1, dtype=torch.int64, device=CUDA)
    copier = BlockCopier(kv_cache)
    copier.copy(pairs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copier.copy(pairs)
    before = [pages.clone() for layer in kv_cache for pages in layer]
    pairs[:, 1:3] = torch.tensor([[3, 5], [0, 8]], device=CUDA)
    graph.replay()
    for pages, was in zip([pages for layer in kv_cache for pages in layer], before, strict=True):
        assert torch.equal(pages, was[[3, 1, 2, 3, 4, 5, 6, 7, 5]])
