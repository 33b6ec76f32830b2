"""Step plans written by hand: a driver that knows sequences by slot and turns simple calls into differences."""

from dataclasses import dataclass, field

import numpy as np

from manta.protos.sampling_pb2 import Pooling, Sampling
from manta.protos.worker_pb2 import SeqAdd, StepPlan, StepResult

GREEDY = Sampling(top_p=1.0, repetition_penalty=1.0)


def uint32(values: list[int]) -> bytes:
    return np.array(values, "<u4").tobytes()


def seq_add(
    slot: int,
    tokens: list[int],
    *,
    blocks: list[int],
    max_length: int,
    lane: int = 0,
    num_prompt_tokens: int | None = None,
    num_computed: int = 0,
    sampling: Sampling = GREEDY,
    pooling: Pooling | None = None,
) -> SeqAdd:
    """A SeqAdd with numbers for columns."""
    return SeqAdd(
        slot=slot,
        lane=lane,
        tokens=np.array(tokens, "<i4").tobytes(),
        num_prompt_tokens=len(tokens) if num_prompt_tokens is None else num_prompt_tokens,
        num_computed=num_computed,
        max_length=max_length,
        blocks=uint32(blocks),
        sampling=sampling,
        pooling=pooling,
    )


def step_plan(
    step: int,
    *,
    epoch: int = 1,
    lane: int = 0,
    frees: list[int] | None = None,
    adds: list[SeqAdd] | None = None,
    grow: list[tuple[int, int]] | None = None,
    copies: list[tuple[int, int]] | None = None,
    holds: list[int] | None = None,
    prefill: list[tuple[int, int]] | None = None,
) -> StepPlan:
    """A StepPlan with numbers for columns."""
    return StepPlan(
        epoch=epoch,
        step=step,
        lane=lane,
        frees=uint32(frees or []),
        adds=adds or [],
        grow=[number for pair in grow or [] for number in pair],
        copies=uint32([number for pair in copies or [] for number in pair]),
        holds=uint32(holds or []),
        prefill_slots=uint32([slot for slot, _ in prefill or []]),
        prefill_lengths=uint32([length for _, length in prefill or []]),
    )


@dataclass
class _Sequence:
    lane: int
    tokens: list[int]
    num_prompt_tokens: int
    length: int  # of `tokens` once all steps that were planned are answered
    num_computed: int
    max_length: int
    num_blocks: int
    decoding: bool = False


@dataclass
class Driver:
    """Plans steps and hands their tokens to the sequences. Blocks are given out in order and never reused."""

    block_size: int
    epoch: int = 1
    step: int = 0
    sequences: dict[int, _Sequence] = field(default_factory=dict)
    _next_block: int = 0
    _adds: list[SeqAdd] = field(default_factory=list)
    _sampled: dict[int, list[int]] = field(default_factory=dict)  # step -> slots in row order

    def add(
        self,
        slot: int,
        prompt: list[int],
        num_new: int,
        *,
        lane: int = 0,
        sampling: Sampling = GREEDY,
        output: list[int] | None = None,
    ) -> None:
        """A sequence that joins with the next plan and generates num_new tokens; of these it knows `output` already if
        it was preempted."""
        tokens, num_prompt, max_length = [*prompt, *(output or [])], len(prompt), len(prompt) + num_new
        self._adds.append(
            seq_add(
                slot, tokens, blocks=[], max_length=max_length, lane=lane, num_prompt_tokens=num_prompt,
                sampling=sampling,
            )
        )  # fmt: skip
        self.sequences[slot] = _Sequence(lane, tokens, num_prompt, len(tokens), 0, max_length, 0)

    def plan(
        self,
        prefill: list[tuple[int, int]],
        *,
        lane: int = 0,
        frees: list[int] | None = None,
        holds: list[int] | None = None,
    ) -> StepPlan:
        """The next step: decodes whatever can decode, and prefills as told."""
        self.step += 1
        for slot in frees or []:
            del self.sequences[slot]
        decodes = [
            slot
            for slot, seq in sorted(self.sequences.items())
            if seq.decoding and seq.lane == lane and seq.length < seq.max_length and slot not in (holds or [])
        ]
        grow: list[tuple[int, int]] = []
        sampled: list[int] = []
        for slot, length in [*((slot, 1) for slot in decodes), *prefill]:
            seq = self.sequences[slot]
            seq.num_computed += length
            while seq.num_blocks * self.block_size < seq.num_computed:
                grow.append((slot, self._next_block))
                self._next_block += 1
                seq.num_blocks += 1
            if seq.num_computed == seq.length:
                seq.decoding = True
                seq.length += 1
                sampled.append(slot)
        self._sampled[self.step] = sampled
        adds, self._adds = self._adds, []
        return step_plan(
            self.step, epoch=self.epoch, lane=lane, frees=frees, adds=adds, grow=grow, holds=holds, prefill=prefill
        )

    def take(self, result: StepResult) -> None:
        """Appends a step's tokens to its sequences. Fails if there are too many or too few."""
        assert result.error == "", result.error
        slots = self._sampled.pop(result.step)
        for slot, token in zip(slots, np.frombuffer(result.tokens, "<i4").tolist(), strict=True):
            if slot in self.sequences:
                self.sequences[slot].tokens.append(token)

    @property
    def unfinished(self) -> list[int]:
        return [slot for slot, seq in self.sequences.items() if seq.length < seq.max_length]

    def output(self, slot: int) -> list[int]:
        seq = self.sequences[slot]
        return seq.tokens[seq.num_prompt_tokens :]
