"""A picture of the block tables, for people."""

from collections.abc import Iterable
from dataclasses import dataclass

from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SequenceSnapshot:
    request_id: int
    name: str
    replica: int  # -1 while waiting
    slot: int  # -1 while waiting
    lane: int  # -1 while waiting
    status: str  # sequence.Status
    num_tokens: int  # known ones
    num_computed: int  # tokens whose KV exists
    blocks: list[int]
    ref_counts: list[int]  # beside blocks: above 1 the block is shared


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    num_blocks: int
    block_size: int
    num_free_blocks: int  # cached ones included
    num_cached_blocks: int  # free, but still findable by the prefix index
    num_limbo_blocks: int  # free as soon as the plans in flight are answered


@dataclass(frozen=True, slots=True)
class Snapshot:
    sequences: list[SequenceSnapshot]  # resident ones by replica in order of admission, then the queue
    pools: list[PoolSnapshot]  # by replica


def take_snapshot(replicas: list[Replica], queue: Iterable[Sequence]) -> Snapshot:
    sequences = [_resident(replica, sequence) for replica in replicas for sequence in replica.residents.values()]
    sequences += [_waiting(sequence) for sequence in queue]
    return Snapshot(sequences, [_pool(replica) for replica in replicas])


def _resident(replica: Replica, sequence: Sequence) -> SequenceSnapshot:
    return SequenceSnapshot(
        request_id=sequence.request.id,
        name=sequence.request.name,
        replica=replica.index,
        slot=sequence.slot,
        lane=sequence.lane,
        status=sequence.status.value,
        num_tokens=replica.num_tokens(sequence),
        num_computed=replica.num_computed(sequence),
        blocks=sequence.blocks.copy(),
        ref_counts=[replica.pool.refs[block] for block in sequence.blocks],
    )


def _waiting(sequence: Sequence) -> SequenceSnapshot:
    return SequenceSnapshot(
        request_id=sequence.request.id,
        name=sequence.request.name,
        replica=-1,
        slot=-1,
        lane=-1,
        status=sequence.status.value,
        num_tokens=len(sequence.tokens),
        num_computed=0,
        blocks=[],
        ref_counts=[],
    )


def _pool(replica: Replica) -> PoolSnapshot:
    pool = replica.pool
    return PoolSnapshot(
        num_blocks=pool.num_blocks,
        block_size=replica.capacity.block_size,
        num_free_blocks=pool.num_free,
        num_cached_blocks=pool.num_cached,
        num_limbo_blocks=pool.num_limbo,
    )
