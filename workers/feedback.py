"""Sampled tokens on their way back from the last stage to the first."""

from collections import deque
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from manta.protos.worker_pb2 import StepPlan
from manta.workers.columns import Ints
from manta.workers.mesh import Incoming, Mesh
from manta.workers.token_table import TokenTable


@dataclass(frozen=True, slots=True)
class _Outstanding:
    """A step whose tokens the first stage has not received yet."""

    lane: int
    host_slots: Ints
    slots: Tensor
    positions: Tensor
    tokens: Incoming


class Feedback:
    """The first stage's list of tokens to come. The last stage sends those of every step that samples, in step order;
    the first makes room for them at once, so that no send waits for its receiver, and takes them in that order, as late
    as it can: just before they are needed.
    """

    def __init__(self, mesh: Mesh, tokens: TokenTable) -> None:
        self._mesh = mesh
        self._tokens = tokens
        self._outstanding: deque[_Outstanding] = deque()

    def expect(self, lane: int, host_slots: Ints, slots: Tensor, positions: Tensor) -> None:
        """The last stage will send the tokens of this step: of these slots, on the host and int64 [N] on the device, at
        these positions, int64 [N]."""
        tokens = self._mesh.expect_tokens(host_slots.size)
        self._outstanding.append(_Outstanding(lane, host_slots, slots, positions, tokens))

    def receive_for(self, plan: StepPlan) -> None:
        """Before the plan is applied: takes in what the plan's lane computes on, and what else would
        be written over the prompt of a slot's next sequence."""
        if not self._outstanding:
            return
        added = [add.slot for add in plan.adds]
        needed = [
            step.lane == plan.lane or bool(added and np.isin(added, step.host_slots).any())
            for step in self._outstanding
        ]
        while any(needed):
            needed.pop(0)
            self._receive()

    def drain(self) -> None:
        """Takes in everything, so that the next epoch begins with nothing under way."""
        while self._outstanding:
            self._receive()

    def _receive(self) -> None:
        step = self._outstanding.popleft()
        self._tokens.put(step.slots, step.positions, step.tokens.wait())
