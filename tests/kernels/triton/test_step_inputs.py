"""Inputs built from slots on the device against those the host builds, with rows that are not there and room left."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from manta.kernels import step_tensors
from manta.kernels.step_tensors import SlotColumns, StepInputs
from manta.workers.batch import build_batch
from manta.workers.slot_table import Rows
from tests.support.triton_device import DEVICE, INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
from manta.kernels import step_inputs_triton

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

FORMS = {"torch": step_tensors, "triton": step_inputs_triton}
NUM_SLOTS, NUM_BLOCKS, VOCAB_SIZE = 12, 40, 1000


class Slots:
    """Columns of random sequences, on the host and the device."""

    def __init__(self, block_size: int, num_computed: list[int], length: list[int], seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.block_size = block_size
        self.length, self.num_computed = np.zeros(NUM_SLOTS, np.int64), np.zeros(NUM_SLOTS, np.int64)
        self.length[: len(length)], self.num_computed[: len(length)] = length, num_computed
        self.block_table = generator.integers(1, 10_000, (NUM_SLOTS, NUM_BLOCKS)).astype(np.int32)
        self.tokens = generator.integers(0, VOCAB_SIZE, (NUM_SLOTS, NUM_BLOCKS * block_size)).astype(np.int32)
        self.columns = SlotColumns(
            *(
                torch.from_numpy(x.astype(np.int32)).to(DEVICE)
                for x in (self.length, self.num_computed, self.block_table, self.tokens)
            )
        )


STEPS: dict[str, tuple[int, list[int], list[int], list[int], list[int]]] = {
    # block size; num_computed and length by slot; slots and numbers of tokens of the rows
    "decodes": (8, [7, 8, 0, 30], [8, 9, 1, 31], [3, 0, 1], [1, 1, 1]),
    "prefills": (4, [0, 0, 5], [19, 7, 33], [2, 0, 1], [28, 19, 7]),
    "parts of prompts": (16, [0, 16, 31, 2], [300, 40, 32, 3], [3, 2, 0, 1], [1, 1, 280, 17]),
    "one long row": (2, [1], [80], [0], [79]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_more_rows", "num_more_tokens", "num_more_blocks"), [(0, 0, 0), (3, 3, 1), (5, 300, 30)])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_inputs_are_those_of_the_host(
    step: tuple[int, list[int], list[int], list[int], list[int]],
    num_more_rows: int, num_more_tokens: int, num_more_blocks: int, form: str,
) -> None:  # fmt: skip
    block_size, num_computed, length, slots, num_tokens = step
    table = Slots(block_size, num_computed, length)
    starts, counts = table.num_computed[slots], np.array(num_tokens)
    sampled = np.flatnonzero(starts + counts == table.length[slots])
    rows = Rows(np.array(slots), starts, counts, sampled, num_tokens.count(1))
    host: Any = SimpleNamespace(block_table=table.block_table)
    expected = build_batch(rows, host, block_size, torch.device("cpu"))

    R, T, W = len(slots), sum(num_tokens), expected.metadata.block_tables.shape[1]
    out = StepInputs.empty(T + num_more_tokens, R + num_more_rows, min(W + num_more_blocks, NUM_BLOCKS), DEVICE)
    for tensor in (getattr(out, name) for name in StepInputs.__slots__):
        tensor.fill_(77)
    # Rows that are not there have a token each, as in a CUDA graph of decoding rows, as far as there are tokens.
    more = np.minimum(np.arange(1, num_more_rows + 1), num_more_tokens)
    query_start = np.concatenate(([0], np.cumsum(num_tokens), T + more)).astype(np.int32)
    row_slots = torch.tensor(slots + [-1] * num_more_rows, dtype=torch.int32, device=DEVICE)
    FORMS[form].build_inputs(table.columns, row_slots, torch.from_numpy(query_start).to(DEVICE), block_size, out)

    metadata = expected.metadata
    assert torch.equal(out.positions[:T].cpu(), metadata.positions)
    assert torch.equal(out.slot_mapping[:T].cpu(), metadata.slot_mapping)
    ids = table.tokens[expected.token_slots.numpy(), metadata.positions.numpy()]
    assert out.token_ids[:T].tolist() == ids.tolist()
    assert torch.equal(out.seq_lens[:R].cpu(), metadata.seq_lens)
    for row in range(R):
        used = -(-int(metadata.seq_lens[row]) // block_size)
        assert torch.equal(out.block_tables[row, :used].cpu(), metadata.block_tables[row, :used])
        assert not out.block_tables[row, used:].any()
    positions = out.sampled_positions[:R].cpu().numpy()
    assert np.flatnonzero(positions >= 0).tolist() == sampled.tolist()
    assert positions[sampled].tolist() == expected.sampled_positions.tolist()
    assert out.last_tokens[:R].cpu()[sampled].tolist() == expected.sampled_tokens.tolist()
    # What is not there
    assert not out.token_ids[T:].any()
    assert not out.positions[T:].any()
    assert bool((out.slot_mapping[T:] == -1).all())
    assert not out.seq_lens[R:].any()
    assert not out.block_tables[R:].any()
    assert bool((out.sampled_positions[R:] == -1).all())
    assert bool(((out.last_tokens[R:] >= 0) & (out.last_tokens[R:] < T + num_more_tokens)).all())


@pytest.mark.parametrize("form", FORMS)
def test_advance_makes_the_next_step_of_this_one(form: str) -> None:
    """A prompt in parts, then two sampled tokens; another slot decodes beside it; a row is not there."""
    table = Slots(4, [0, 9], [7, 10])
    before = table.tokens.copy()
    out = StepInputs.empty(8, 3, 4, DEVICE)
    slots = torch.tensor([1, 0, -1], dtype=torch.int32, device=DEVICE)
    kernels = FORMS[form]
    for step, count in enumerate((5, 2, 1, 1)):
        query_start = torch.tensor([0, 1, 1 + count, 2 + count], dtype=torch.int32, device=DEVICE)
        kernels.build_inputs(table.columns, slots, query_start, 4, out)
        sampled = torch.tensor([100 + step, 200 + step, 300 + step], device=DEVICE)
        kernels.advance(table.columns, slots, query_start, out, sampled)
    assert table.columns.num_computed.tolist()[:3] == [9, 13, 0]
    assert table.columns.length.tolist()[:3] == [10, 14, 0]
    before[0, 7:10] = 201, 202, 203
    before[1, 10:14] = 100, 101, 102, 103
    assert np.array_equal(table.columns.tokens.cpu().numpy(), before)
    assert out.token_ids.tolist() == [102, 202, 0, 0, 0, 0, 0, 0]
