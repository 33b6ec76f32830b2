"""Whose the vectors are that come with a step: of prompts that are answered by one, in place of tokens.

How long each is follows from what requests asked for. What they say is not looked at here.
"""

from manta.scheduler.in_flight import InFlightStep


def num_vector_bytes(step: InFlightStep) -> int:
    """What the answer to a step must bring."""
    total = 0
    for prefill in step.prefills.values():
        pooling = prefill.sequence.request.pooling
        if prefill.pools and pooling is not None:
            total += pooling.num_bytes
    return total


def vectors_by_slot(step: InFlightStep, data: bytes) -> dict[int, bytes]:
    """Those of sequences that have left the replica are among them."""
    vectors, begin = {}, 0
    for slot, prefill in step.prefills.items():
        pooling = prefill.sequence.request.pooling
        if prefill.pools and pooling is not None:
            vectors[slot] = data[begin : begin + pooling.num_bytes]
            begin += pooling.num_bytes
    return vectors
