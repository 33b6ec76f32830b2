"""When the first stage takes in tokens of the last one: in step order, and just before they are needed."""

from collections import deque
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from manta.protos.worker_pb2 import StepPlan
from manta.workers.batch import build_batch
from manta.workers.feedback import Feedback
from manta.workers.limits import Limits
from manta.workers.mesh import Mesh
from manta.workers.sampling_table import SamplingTable
from manta.workers.slot_table import SlotTable
from manta.workers.token_table import TokenTable
from tests.support.plans import seq_add, step_plan

CPU = torch.device("cpu")
LIMITS = Limits(num_blocks=20, block_size=4, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=16, vocab_size=99)


class Pipe:
    """The tokens the last stage has sent."""

    def __init__(self) -> None:
        self.sent: deque[list[int]] = deque()

    def expect_tokens(self, n: int) -> "Arrival":
        return Arrival(self.sent, n)


class Arrival:
    def __init__(self, sent: deque[list[int]], n: int) -> None:
        self._sent = sent
        self._n = n

    def wait(self) -> Tensor:
        tokens = self._sent.popleft()
        assert len(tokens) == self._n
        return torch.tensor(tokens)


class FirstStage:
    """Everything of a runner's first stage that has to do with tokens."""

    def __init__(self) -> None:
        self.pipe = Pipe()
        self.tokens = TokenTable(CPU)
        self.slots = SlotTable(LIMITS, self.tokens, SamplingTable(LIMITS.vocab_size))
        self.feedback = Feedback(cast(Mesh, cast(Any, self.pipe)), self.tokens)

    def run(self, plan: StepPlan) -> list[int]:
        """The ids the step computes on."""
        self.feedback.receive_for(plan)
        rows = self.slots.apply(plan)
        if not rows.slots.size:
            return []
        batch = build_batch(rows, self.slots, LIMITS.block_size, CPU)
        self.feedback.expect(plan.lane, rows.sampled_slots, batch.sampled_slots, batch.sampled_positions)
        return self.tokens.gather(batch.token_slots, batch.metadata.positions).tolist()


@pytest.fixture
def stage() -> FirstStage:
    """Slot 0 runs in lane 0 and slot 1 in lane 1; both have sampled their first token, 50 and 60."""
    stage = FirstStage()
    for slot in (0, 1):
        add = seq_add(slot, [slot + 1, slot + 2], blocks=[2 * slot, 2 * slot + 1], max_length=8, lane=slot)
        assert stage.run(step_plan(slot + 1, lane=slot, adds=[add], prefill=[(slot, 2)])) == [slot + 1, slot + 2]
    stage.pipe.sent.extend([[50], [60]])
    return stage


def test_a_lane_waits_for_its_own_tokens_only(stage: FirstStage) -> None:
    assert stage.run(step_plan(3, lane=0)) == [50]
    assert len(stage.pipe.sent) == 1
    assert stage.run(step_plan(4, lane=1)) == [60]


def test_earlier_tokens_of_other_lanes_come_first(stage: FirstStage) -> None:
    assert stage.run(step_plan(3, lane=1)) == [60]
    assert stage.run(step_plan(4, lane=0)) == [50]


def test_late_tokens_do_not_spoil_the_next_sequence_of_their_slot() -> None:
    """Slot 0 is given away in a step of lane 1, while its last token of lane 0 has not been received."""
    stage = FirstStage()
    old = seq_add(0, [1, 2], blocks=[0], max_length=4)
    new = seq_add(0, [7, 8, 9, 10], blocks=[1], max_length=6, lane=1)
    stage.run(step_plan(1, adds=[old], prefill=[(0, 2)]))
    stage.pipe.sent.append([50])
    stage.run(step_plan(2, lane=1, frees=[0], adds=[new]))
    stage.feedback.receive_for(step_plan(3, lane=0))
    assert stage.run(step_plan(3, lane=1, prefill=[(0, 4)])) == [7, 8, 9, 10]


def test_a_new_epoch_begins_with_nothing_under_way(stage: FirstStage) -> None:
    stage.feedback.drain()
    assert not stage.pipe.sent
    stage.feedback.drain()
