"""The slot table against a naive mirror that keeps one record per sequence, and against plans that break the rules."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.protos.worker_pb2 import StepPlan
from manta.workers.columns import PlanError
from manta.workers.limits import Limits
from manta.workers.sampling_table import SamplingTable
from manta.workers.slot_table import Rows, SlotChanges, SlotTable
from manta.workers.token_table import TokenTable
from tests.support.plans import seq_add, step_plan

LIMITS = Limits(
    num_blocks=200, block_size=4, max_num_seqs=20, max_num_batched_tokens=64, max_model_len=40, vocab_size=50
)
NUM_LANES = 2
RowTuples = list[tuple[int, int, int, bool]]  # slot, start, tokens, samples


def make_table(limits: Limits = LIMITS) -> SlotTable:
    return SlotTable(limits, TokenTable(torch.device("cpu")), SamplingTable(limits.vocab_size))


@dataclass
class Sequence:
    lane: int
    length: int
    num_computed: int
    max_length: int
    blocks: list[int]
    decoding: bool = False


@dataclass
class Naive:
    """worker.proto's rules, word for word, one sequence at a time."""

    sequences: dict[int, Sequence] = field(default_factory=dict)

    def rows(self, lane: int, holds: list[int], prefill: list[tuple[int, int]]) -> RowTuples:
        """(slot, start, tokens, samples) of each row; the sequences move on."""
        rows = []
        for slot in sorted(self.sequences):
            seq = self.sequences[slot]
            if seq.lane == lane and seq.decoding and slot not in holds and seq.length < seq.max_length:
                rows.append((slot, 1))
        rows += prefill
        result = []
        for slot, count in rows:
            seq = self.sequences[slot]
            start = seq.num_computed
            seq.num_computed += count
            samples = seq.num_computed == seq.length
            if samples:
                seq.length += 1
                seq.decoding = True
            result.append((slot, start, count, samples))
        return result


def as_tuples(rows: Rows) -> RowTuples:
    sampled = set(rows.sampled.tolist())
    columns = zip(rows.slots.tolist(), rows.starts.tolist(), rows.num_tokens.tolist(), strict=True)
    return [(slot, start, count, i in sampled) for i, (slot, start, count) in enumerate(columns)]


def draw_plan(data: st.DataObject, naive: Naive, step: int, spare_blocks: list[int]) -> tuple[StepPlan, RowTuples]:
    """A valid plan and the naive mirror's rows of it."""
    draw = data.draw
    frees = [slot for slot in naive.sequences if draw(st.booleans() if step % 3 == 0 else st.just(False))]
    for slot in frees:
        spare_blocks.extend(naive.sequences.pop(slot).blocks)
    adds = []
    for _ in range(draw(st.integers(0, 3))):
        unused = [slot for slot in range(LIMITS.max_num_slots) if slot not in naive.sequences]
        if len(naive.sequences) >= LIMITS.max_num_seqs:
            break
        slot = draw(st.sampled_from(unused))
        num_tokens = draw(st.integers(1, 20))
        cached = draw(st.integers(0, (num_tokens - 1) // LIMITS.block_size))
        blocks = [spare_blocks.pop() for _ in range(cached)]
        seq = Sequence(
            lane=draw(st.integers(0, NUM_LANES - 1)),
            length=num_tokens,
            num_computed=cached * LIMITS.block_size,
            max_length=num_tokens + draw(st.integers(1, 6)),
            blocks=blocks,
        )
        naive.sequences[slot] = seq
        adds.append(
            seq_add(
                slot, [1] * num_tokens, blocks=list(blocks), max_length=seq.max_length, lane=seq.lane,
                num_computed=seq.num_computed,
            )
        )  # fmt: skip
    lane = draw(st.integers(0, NUM_LANES - 1))
    of_lane = [slot for slot, seq in naive.sequences.items() if seq.lane == lane]
    holds = [slot for slot in of_lane if naive.sequences[slot].decoding and draw(st.integers(0, 3)) == 0]
    prefill = []
    for slot in of_lane:
        seq = naive.sequences[slot]
        if not seq.decoding and draw(st.booleans()):
            prefill.append((slot, draw(st.integers(1, min(seq.length - seq.num_computed, 10)))))
    prefill = draw(st.permutations(prefill[:4]))
    grow = []
    counts = dict(prefill) | {slot: 1 for slot in of_lane if naive.sequences[slot].decoding}
    for slot, count in counts.items():
        seq = naive.sequences[slot]
        while len(seq.blocks) * LIMITS.block_size < seq.num_computed + count:
            seq.blocks.append(spare_blocks.pop())
            grow.append((slot, seq.blocks[-1]))
    # Blocks of one slot keep their order; slots may be interleaved in any way.
    grow = sorted(grow, key=lambda pair: (naive.sequences[pair[0]].blocks.index(pair[1]), pair[0]))
    plan = step_plan(step, lane=lane, frees=frees, adds=adds, grow=grow, holds=holds, prefill=prefill)
    return plan, naive.rows(lane, holds, prefill)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_follows_a_naive_mirror(data: st.DataObject) -> None:
    table, naive = make_table(), Naive()
    spare_blocks = list(range(LIMITS.num_blocks))
    for step in range(1, data.draw(st.integers(2, 14))):
        plan, expected = draw_plan(data, naive, step, spare_blocks)
        rows = table.apply(plan)
        assert as_tuples(rows) == expected
        assert rows.sampled_positions.tolist() == [start + count for _, start, count, samples in expected if samples]
        for slot, seq in naive.sequences.items():
            assert table.block_table[slot, : len(seq.blocks)].tolist() == seq.blocks
            assert not table.block_table[slot, len(seq.blocks) :].any()
            assert (table.length[slot], table.num_computed[slot]) == (seq.length, seq.num_computed)
            assert table.decoding[slot] == seq.decoding
        assert table.in_use.sum() == len(naive.sequences)


def started_table() -> SlotTable:
    """Slot 3 decodes in lane 0 (4 tokens, 1 block); slot 5 of lane 1 has 2 of 6 tokens computed (2 blocks)."""
    table = make_table()
    table.apply(step_plan(1, adds=[seq_add(3, [1, 2, 3], blocks=[7], max_length=9)], prefill=[(3, 3)]))
    add = seq_add(5, [1] * 6, blocks=[8, 9], max_length=12, lane=1)
    table.apply(step_plan(2, lane=1, adds=[add], prefill=[(5, 2)]))
    return table


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frees": [4]}, "frees names slot 4, which is not in use"),
        ({"frees": [4000]}, "frees names slot 4000"),
        ({"frees": [3, 3]}, "twice"),
        ({"adds": [seq_add(3, [1], blocks=[1], max_length=5)]}, "slot 3 is added but in use"),
        ({"adds": [seq_add(40, [1], blocks=[1], max_length=5)]}, "slot 40 lies outside the 40 slots"),
        ({"adds": [seq_add(4, [1], blocks=[200], max_length=5)]}, "slot 4: block 200 lies outside"),
        ({"adds": [seq_add(4, [50], blocks=[1], max_length=5)]}, "slot 4: a token id lies outside the vocabulary"),
        ({"adds": [seq_add(4, [-1], blocks=[1], max_length=5)]}, "slot 4: a token id lies outside the vocabulary"),
        ({"adds": [seq_add(4, [], blocks=[1], max_length=5)]}, "slot 4: 0 prompt tokens among 0"),
        ({"adds": [seq_add(4, [1, 2], blocks=[1], max_length=2)]}, "2 prompt tokens among 2 tokens growing to 2"),
        ({"adds": [seq_add(4, [1], blocks=[1], max_length=41)]}, "the 40 of the model"),
        ({"adds": [seq_add(4, [1, 2], blocks=[1], max_length=9, num_computed=2)]}, "slot 4: 2 computed of 2"),
        ({"adds": [seq_add(4, [1] * 9, blocks=[1], max_length=12, num_computed=5)]}, "slot 4: 5 computed of 9"),
        ({"grow": [(4, 1)]}, "grow names slot 4"),
        ({"grow": [(3, 200)]}, "slot 3: block 200 lies outside"),
        ({"grow": [(3, 10 + i) for i in range(10)]}, "slot 3: a table of 11 blocks"),
        ({"holds": [6]}, "holds names slot 6"),
        ({"prefill": [(6, 1)]}, "prefill_slots names slot 6"),
        ({"prefill": [(5, 1)]}, "slot 5 of lane 1 is prefilled in a step of lane 0"),
        ({"prefill": [(3, 1)]}, "slot 3 is decoding"),
        ({"lane": 1, "prefill": [(5, 5)]}, "slot 5: 5 tokens are to be computed of 4"),
        ({"lane": 1, "prefill": [(5, 0)]}, "slot 5: 0 tokens"),
        ({"lane": 1, "prefill": [(5, 1), (5, 1)]}, "twice"),
        (
            {"lane": 1, "adds": [seq_add(6, [1] * 5, blocks=[1], max_length=9, lane=1)], "prefill": [(6, 5)]},
            "slot 6: its 1 blocks do not cover a write up to token 5",
        ),
    ],
)  # fmt: skip
def test_refuses_what_breaks_the_rules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as error:
        started_table().apply(step_plan(3, **fields))
    assert str(error.value).startswith("step 3: ")
    assert message in str(error.value)


def test_refuses_a_decode_that_its_table_does_not_cover() -> None:
    table = started_table()
    table.apply(step_plan(3))  # writes token 4, the last of the block
    with pytest.raises(PlanError, match="step 4: slot 3: its 1 blocks do not cover a write up to token 5"):
        table.apply(step_plan(4))


def test_refuses_more_tokens_than_a_step_may_have() -> None:
    adds = [seq_add(slot, [1] * 30, blocks=list(range(8)), max_length=31) for slot in range(3)]
    with pytest.raises(PlanError, match="90 tokens are more than max_num_batched_tokens=64"):
        make_table().apply(step_plan(1, adds=adds, prefill=[(slot, 30) for slot in range(3)]))


def test_refuses_columns_of_broken_bytes() -> None:
    with pytest.raises(PlanError, match="step 1: frees has 3 bytes"):
        make_table().apply(StepPlan(step=1, frees=b"abc"))
    with pytest.raises(PlanError, match="step 1: grow has 1 numbers"):
        make_table().apply(StepPlan(step=1, grow=[7]))


def test_a_sequence_freezes_at_its_max_length() -> None:
    table = make_table()
    table.apply(step_plan(1, adds=[seq_add(0, [1, 2], blocks=[0], max_length=4)], prefill=[(0, 2)]))
    assert table.apply(step_plan(2)).slots.tolist() == [0]
    assert table.length[0] == 4
    assert table.apply(step_plan(3)).slots.size == 0


def test_clear_frees_every_slot() -> None:
    table = started_table()
    table.clear()
    assert not table.in_use.any()
    rows = table.apply(step_plan(1, adds=[seq_add(3, [1], blocks=[0], max_length=3)], prefill=[(3, 1)]))
    assert rows.slots.tolist() == [3]


def test_a_new_epoch_hears_nothing_of_a_plan_that_could_not_be_followed() -> None:
    """Two lengths of one slot in one copy to the device would leave either."""
    changes = SlotChanges()
    table = SlotTable(LIMITS, TokenTable(torch.device("cpu")), SamplingTable(LIMITS.vocab_size), changes)
    with pytest.raises(PlanError, match="not in use"):
        table.apply(step_plan(1, adds=[seq_add(0, [1] * 9, blocks=[5, 6, 7], max_length=12)], grow=[(3, 1)]))
    table.clear()
    table.apply(step_plan(1, adds=[seq_add(0, [1, 2], blocks=[8], max_length=9)], prefill=[(0, 2)]))
    assert changes.added == [(0, 2, 0)]
    assert [[column.tolist() for column in part] for part in changes.blocks] == [[[0], [0], [8]]]
