"""Refuses requests that can never run, and lets those that can into a replica."""

from collections.abc import Sequence as Many

from manta.scheduler.block_pool import BlockPool
from manta.scheduler.draft import Draft
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.types import Capacity, RefusedError, Request, SeqAdd, TooLongError


def check_beams_fit(request: Request, width: int, capacities: Many[Capacity], enable_chunked_prefill: bool) -> None:
    """As check_fits, for `width` beams that share the full blocks of the prompt and may share no others."""
    check_fits(request, capacities, enable_chunked_prefill)
    num_prompt, max_model_len = len(request.prompt), min(capacity.max_model_len for capacity in capacities)
    num_kv = min(num_prompt + request.max_tokens, max_model_len) - 1
    for capacity in capacities:
        num_shared = num_prompt // capacity.block_size
        needed = num_shared + width * (blocks_for(num_kv, capacity.block_size) - num_shared)
        if needed > capacity.num_blocks:
            raise TooLongError(
                f"prompt has {num_prompt} tokens and max_tokens is {request.max_tokens}, for which {width} beams need "
                f"up to {needed} blocks of {capacity.block_size} tokens; there are {capacity.num_blocks}"
            )


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def check_fits(request: Request, capacities: Many[Capacity], enable_chunked_prefill: bool) -> None:
    """Raises RefusedError for what is no request, TooLongError for what no replica state could ever make room for."""
    num_prompt, pools = len(request.prompt), request.pooling is not None
    if not num_prompt:
        raise RefusedError("the prompt is empty; it needs at least 1 token")
    if request.max_tokens < 1 and not pools:
        raise RefusedError(f"max_tokens is {request.max_tokens}; it must be at least 1")
    max_model_len = min(capacity.max_model_len for capacity in capacities)
    if pools and num_prompt > max_model_len:
        raise TooLongError(f"prompt has {num_prompt} tokens, the context holds {max_model_len}")
    if num_prompt >= max_model_len and not pools:
        raise TooLongError(
            f"prompt has {num_prompt} tokens and max_tokens is {request.max_tokens}, the context holds {max_model_len}"
        )
    # The last token is sampled and never computed: it needs no block.
    num_kv = num_prompt if pools else min(num_prompt + request.max_tokens, max_model_len) - 1
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


def check_capacities(replicas: Many[Capacity]) -> None:
    """Raises ValueError for capacities that cannot work, alone or together."""
    if not replicas:
        raise ValueError("a scheduler needs at least one replica")
    block_sizes = {capacity.block_size for capacity in replicas}
    if len(block_sizes) > 1:  # a sequence keeps its block hashes when it moves
        raise ValueError(f"replicas have block sizes {sorted(block_sizes)}; they must be equal")
    for i, capacity in enumerate(replicas):
        if capacity.max_num_batched_tokens < capacity.max_num_seqs:
            raise ValueError(
                f"replica {i}: max_num_batched_tokens={capacity.max_num_batched_tokens} must be at least "
                f"max_num_seqs={capacity.max_num_seqs}: every running sequence takes one token of a step"
            )
        if capacity.num_lanes > capacity.max_num_seqs:
            raise ValueError(
                f"replica {i}: max_num_seqs={capacity.max_num_seqs} must be at least the {capacity.num_lanes} lanes"
            )


class Admission:
    """Takes sequences from the head of the queue into one replica, in order: who does not fit yet keeps those behind
    it waiting, so that long prompts are not starved by short ones."""

    def __init__(self, replica: Replica, enable_chunked_prefill: bool) -> None:
        self._replica = replica
        self._enable_chunked_prefill = enable_chunked_prefill
        self.num_kept_blocks = 0  # that must be left when a sequence is admitted, beside those that run
        self._short: tuple[Sequence, BlockPool, int] | None = None  # who lacked blocks, with pool.num_freed then

    def has_room(self, draft: Draft, num_waiting: int) -> bool:
        """Whether the lane may take one more. A lane takes no more than its share of all, so that lanes stay even."""
        replica = self._replica
        if len(replica.slots.free) <= replica.num_expected or replica.starved:
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
        if sequence.status is Status.PARKED:
            return self._resume(sequence, draft, budget)
        num_tokens = len(sequence.tokens)
        hits, num_cached = self._find_computed(sequence, draft)
        num_new = blocks_for(num_tokens, replica.capacity.block_size) - len(hits)
        # What is computed next is written to a block of one's own: one that is shared in part is copied.
        copies_last = num_cached < len(hits) * replica.capacity.block_size
        if not self._has_blocks(hits, num_new + copies_last):
            self._short = (sequence, pool, pool.num_freed)
            return -1
        if not self._may_start(num_tokens - num_cached, budget):
            return -1
        pool.share(hits)
        sequence.blocks = hits
        sequence.num_published = num_cached // replica.capacity.block_size
        if copies_last:
            self._own_last_block(sequence, draft)
        sequence.blocks += pool.take(num_new)
        sequence.num_planned = sequence.num_computed = num_cached
        self._enter(sequence, draft, min(budget, num_tokens - num_cached))
        return num_cached

    def _find_computed(self, sequence: Sequence, draft: Draft) -> tuple[list[int], int]:
        """Blocks to share that hold the KV of the first tokens, and of how many of these; one at least is left."""
        replica, block_size = self._replica, self._replica.capacity.block_size
        pooling = sequence.request.pooling
        if pooling is not None and pooling.needs_all:  # hidden states of what is cached are nowhere
            return [], 0
        if sequence.num_scored < sequence.num_to_score:  # records come of what is computed
            hits = replica.find_prefix(sequence)
            del hits[sequence.num_scored // block_size :]
            return hits, len(hits) * block_size
        donation = sequence.group.donor(sequence, replica.index) if sequence.group is not None else None
        if donation is not None and sequence.beam is not None:  # what a search needs at most counts on shared blocks
            return donation[0].blocks[: blocks_for(donation[1], block_size)], donation[1]
        hits, num_tokens = replica.find_prefix(sequence), len(sequence.tokens)
        num_cached = len(hits) * block_size
        if num_cached == num_tokens:
            # A prefix that covers all ends in a copy. A step copies blocks before it computes: what it fills itself
            # cannot be copied yet.
            if hits[-1] not in draft.filling and self._has_blocks(hits, 1):
                num_cached = num_tokens - 1
            else:
                hits.pop()
                num_cached -= block_size
        if donation is not None and donation[1] > num_cached:
            return donation[0].blocks[: blocks_for(donation[1], block_size)], donation[1]
        return hits, num_cached

    def _resume(self, sequence: Sequence, draft: Draft, budget: int) -> int:
        """As `admit`, for a sequence that has the blocks of what is computed of it. What comes next begins a block, or
        writes to a shared one, or to one of its own."""
        pool, block_size = self._replica.pool, self._replica.capacity.block_size
        index, num_tokens = sequence.num_computed // block_size, len(sequence.tokens)
        num_new = blocks_for(num_tokens, block_size) - len(sequence.blocks)
        copies_last = index < len(sequence.blocks) and not pool.is_own(sequence.blocks[index])
        if pool.num_free < num_new + copies_last:
            self._short = (sequence, pool, pool.num_freed)
            return -1
        if copies_last:
            self._own_last_block(sequence, draft)
        sequence.blocks += pool.take(num_new)
        del self._replica.parked[sequence]
        self._enter(sequence, draft, min(budget, num_tokens - sequence.num_computed))
        return sequence.num_computed

    def _own_last_block(self, sequence: Sequence, draft: Draft) -> None:
        source = sequence.blocks[-1]
        sequence.blocks[-1] = self._replica.pool.writable(source, until=self._replica.step + 1)
        if sequence.blocks[-1] != source:
            draft.copies.append((source, sequence.blocks[-1]))

    def _enter(self, sequence: Sequence, draft: Draft, num_tokens: int) -> None:
        self._replica.enter(sequence, draft.lane)
        draft.adds.append(_seq_add(sequence))
        draft.add_prefill(sequence, num_tokens)

    def _has_blocks(self, hits: list[int], num_new: int) -> bool:
        """Whether `num_new` blocks can be taken beside `hits`. One in a hundred stays free for those that run: who
        comes in last would be the first to be preempted for them."""
        pool = self._replica.pool
        reserve = max(pool.num_blocks // 100, self.num_kept_blocks) if self._replica.residents else 0
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
        pooling=None if sequence.request.pooling is None else sequence.request.pooling.params,
    )
