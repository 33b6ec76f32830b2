"""Whether a replica has room for sequences of others, and which sequences can go there."""

from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence, Status

_KEPT_SHARE = 50  # such a part of the blocks stays free for those that run there
_RUNNING = (Status.PREFILLING, Status.DECODING)


def is_movable(replicas: list[Replica], sequence: Sequence) -> bool:
    """Whether it is running, and neither a beam, whose blocks are shared in part with others of its search, nor a
    prompt that becomes a vector, of which more than the KV counts, nor about to move already."""
    is_plain = sequence.beam is None and sequence.request.pooling is None
    return is_plain and sequence.status in _RUNNING and sequence.slot not in replicas[sequence.replica].frozen


def spare_blocks(replica: Replica) -> int:
    """Blocks that those who run there will not need soon."""
    kept = replica.capacity.num_blocks // _KEPT_SHARE + len(replica.residents) if replica.residents else 0
    return replica.pool.num_free - kept


def has_room(replica: Replica, num_blocks: int) -> bool:
    """Whether one more sequence, which needs so many blocks, would fit."""
    has_slot = len(replica.slots.free) > replica.num_expected + len(replica.followers)
    return replica.accepts and has_slot and not replica.starved and spare_blocks(replica) >= num_blocks
