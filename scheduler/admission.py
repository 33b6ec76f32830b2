"""Refuses requests that can never run, and lets those that can into a replica."""

from collections.abc import Sequence as Many

from manta.scheduler.block_pool import BlockPool
from manta.scheduler.draft import Draft
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence
from manta.scheduler.types import Capacity, RefusedError, Request, SeqAdd, TooLongError


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def check_fits(request: Request, capacities: Many[Capacity], enable_chunked_prefill: bool) -> None:
    """Raises RefusedError for what is no request, TooLongError for what no replica state could ever make room for."""
    num_prompt = len(request.prompt)
    if not num_prompt:
        raise RefusedError("the prompt is empty; it needs at least 1 token")
    if request.max_tokens < 1:
        raise RefusedError(f"max_tokens is {request.max_tokens}; it must be at least 1")
    max_model_len = min(capacity.max_model_len for capacity in capacities)
    if num_prompt >= max_model_len:
        raise TooLongError(
            f"prompt has {num_prompt} tokens and max_tokens is {request.max_tokens}, the context holds {max_model_len}"
        )
    # The last token is sampled and never computed: it needs no block.
    num_kv = min(num_prompt + request.max_tokens, max_model_len) - 1
    for capacity in capacities:
        needed = blocks_for(num_kv, capacity.block_size)
        if needed > capacity.num_blocks:
            raise TooLongError(
                f"prompt has {num_prompt} tokens and max_tokens is {request.max_tokens}, which needs {needed} blocks "
                f"of {capacity.block_size} tokens; there are {capacity.num_blocks}"
            )
        if not enable_chunked_prefill and num_prompt > capacity.max_num_batched_tokens:
            raise TooLongError(
                f"prompt has {num_prompt} tokens and chunked prefill is off, a step holds "
                f"{capacity.max_num_batched_tokens}"
            )


class Admission:
    """Takes sequences from the head of the queue into one replica, in order: who does not fit yet keeps those behind
    it waiting, so that long prompts are not starved by short ones."""

    def __init__(self, replica: Replica, enable_chunked_prefill: bool) -> None:
        self._replica = replica
        self._enable_chunked_prefill = enable_chunked_prefill
        self._short: tuple[Sequence, BlockPool, int] | None = None  # who lacked blocks, with pool.num_freed then

    def has_room(self, draft: Draft, num_waiting: int) -> bool:
        """Whether the lane may take one more. A lane takes no more than its share of all, so that lanes stay even."""
        replica = self._replica
        if not replica.slots.free or replica.starved:
            return False
        capacity = replica.capacity
        num_all = min(len(replica.residents) + num_waiting, capacity.max_num_seqs)
        return draft.lane.num_residents < blocks_for(num_all, capacity.num_lanes)

    def admit(self, sequence: Sequence, draft: Draft, budget: int) -> int:
        """Puts the sequence into the draft, `budget` tokens of it at most, if there is room. Returns the number of
        tokens found in the prefix index, -1 if it has to wait."""
        replica, pool = self._replica, self._replica.pool
        if self._short == (sequence, pool, pool.num_freed):
            return -1
        num_tokens, block_size = len(sequence.tokens), replica.capacity.block_size
        hits = replica.find_prefix(sequence)
        if sequence.num_scored < sequence.num_to_score:  # records come of what is computed
            del hits[sequence.num_scored // block_size :]
        num_new = blocks_for(num_tokens, block_size) - len(hits)
        # One token at least must be computed, and that writes: a prefix that covers all ends in a copy.
        copies_last = num_new == 0
        # A step copies blocks before it computes: what it fills itself cannot be copied yet.
        if copies_last and (hits[-1] in draft.filling or not self._has_blocks(hits, 1)):
            hits.pop()
            num_new, copies_last = 1, False
        if not self._has_blocks(hits, num_new):
            self._short = (sequence, pool, pool.num_freed)
            return -1
        num_cached = num_tokens - 1 if copies_last else len(hits) * block_size
        if not self._may_start(num_tokens - num_cached, budget):
            return -1
        pool.share(hits)
        sequence.blocks = hits
        sequence.num_published = num_cached // block_size
        if copies_last:
            source = hits[-1]
            sequence.blocks[-1] = pool.writable(source, until=replica.step + 1)
            draft.copies.append((source, sequence.blocks[-1]))
        sequence.blocks += pool.take(num_new)
        sequence.num_planned = sequence.num_computed = num_cached
        replica.enter(sequence, draft.lane)
        draft.adds.append(_seq_add(sequence))
        draft.add_prefill(sequence, min(budget, num_tokens - num_cached))
        return num_cached

    def _has_blocks(self, hits: list[int], num_new: int) -> bool:
        """Whether `num_new` blocks can be taken beside `hits`. One in a hundred stays free for those that run: who
        comes in last would be the first to be preempted for them."""
        pool = self._replica.pool
        reserve = pool.num_blocks // 100 if self._replica.residents else 0
        return pool.num_free - pool.num_unreferenced(hits) >= num_new + reserve

    def _may_start(self, num_tokens: int, budget: int) -> bool:
        """Without chunked prefill a prompt waits for a step that computes it whole. What has grown beyond any step,
        a preempted sequence with its output, is chunked all the same: it has to come back."""
        return (
            self._enable_chunked_prefill
            or num_tokens <= budget
            or num_tokens > self._replica.capacity.max_num_batched_tokens
        )


def _seq_add(sequence: Sequence) -> SeqAdd:
    return SeqAdd(
        slot=sequence.slot,
        lane=sequence.lane,
        tokens=sequence.tokens,
        num_prompt_tokens=len(sequence.request.prompt),
        num_computed=sequence.num_computed,
        max_length=sequence.max_length,
        blocks=sequence.blocks.copy(),
        sampling=sequence.request.sampling,
    )
