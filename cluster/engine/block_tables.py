"""The scheduler's picture of its block tables as the message that `manta top` and the doors show."""

from manta.protos import engine_pb2 as pb
from manta.scheduler.snapshot import Snapshot


def block_tables(snapshot: Snapshot) -> pb.BlockTablesResponse:
    """Counts are sums over the replicas. A waiting sequence has slot -1, no blocks and replica 0."""
    return pb.BlockTablesResponse(
        sequences=[
            pb.SequenceBlocks(
                request_id=sequence.name,
                replica=max(sequence.replica, 0),
                slot=sequence.slot,
                status=sequence.status,
                num_tokens=sequence.num_tokens,
                num_computed=sequence.num_computed,
                blocks=sequence.blocks,
                ref_counts=sequence.ref_counts,
            )
            for sequence in snapshot.sequences
        ],
        num_blocks=sum(pool.num_blocks for pool in snapshot.pools),
        num_free_blocks=sum(pool.num_free_blocks for pool in snapshot.pools),
        num_cached_blocks=sum(pool.num_cached_blocks for pool in snapshot.pools),
        block_size=snapshot.pools[0].block_size,
    )
