"""Copies of whole KV blocks, before the step that writes to them (copy-on-write)."""

import numpy as np

from manta.kernels.metadata import KVCache
from manta.protos.worker_pb2 import StepPlan
from manta.workers.columns import PlanError, decode_pairs
from manta.workers.transfer import upload


def copy_blocks(plan: StepPlan, kv_cache: KVCache) -> None:
    """Does the plan's copies in every layer. All sources are read before any destination is written.

    Raises PlanError if a block lies outside the cache or is written twice.
    """
    if not plan.copies:
        return
    pairs = decode_pairs(plan.copies, f"step {plan.step}: copies")
    keys = kv_cache[0][0]
    if pairs.max() >= keys.shape[0]:
        raise PlanError(f"step {plan.step}: copies name block {pairs.max()} of {keys.shape[0]} on this worker")
    if np.unique(pairs[:, 1]).size != pairs.shape[0]:
        raise PlanError(f"step {plan.step}: copies write a block twice: {pairs.tolist()}")
    sources, destinations = upload([pairs[:, 0], pairs[:, 1]], keys.device)
    for layer in kv_cache:
        for pages in layer:
            pages.index_copy_(0, destinations, pages.index_select(0, sources))
