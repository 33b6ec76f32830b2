"""Copies of whole KV blocks, before the step that writes to them (copy-on-write)."""

import numpy as np
import torch

from manta.kernels import ops
from manta.kernels.metadata import KVCache
from manta.protos.worker_pb2 import StepPlan
from manta.workers.columns import Ints, PlanError, decode_pairs
from manta.workers.transfer import upload


class BlockCopies:
    """Does the copies of plans in every layer of a cache: on a GPU as one launch for all layers, where there is a
    kernel for it."""

    def __init__(self, kv_cache: KVCache) -> None:
        self._kv_cache = kv_cache
        self._copier = ops.make_block_copier(kv_cache) if kv_cache else None

    def apply(self, plan: StepPlan) -> None:
        """All sources are read before any destination is written.

        Raises PlanError if a block lies outside the cache or is written twice.
        """
        if not plan.copies:
            return
        pairs = decode_pairs(plan.copies, f"step {plan.step}: copies")
        num_blocks = self._kv_cache[0][0].shape[0]
        if pairs.max() >= num_blocks:
            raise PlanError(f"step {plan.step}: copies name block {pairs.max()} of {num_blocks} on this worker")
        if np.unique(pairs[:, 1]).size != pairs.shape[0]:
            raise PlanError(f"step {plan.step}: copies write a block twice: {pairs.tolist()}")
        if self._copier is None:
            self._copy_by_layer(pairs)
            return
        (sources_and_targets,) = upload([np.stack([pairs[:, 0], pairs[:, 1]])], self._kv_cache[0][0].device)
        if np.isin(pairs[:, 0], pairs[:, 1]).any():  # programs of one launch run in any order
            self._copier.scatter(self._copier.gather(sources_and_targets[0]), sources_and_targets[1])
        else:
            self._copier.copy(sources_and_targets)

    def _copy_by_layer(self, pairs: Ints) -> None:
        sources, targets = upload([pairs[:, 0], pairs[:, 1]], self._kv_cache[0][0].device)
        for layer in self._kv_cache:
            for stored in layer:
                pages = stored.view(torch.uint8) if stored.element_size() == 1 else stored  # torch copies no fp8 so
                pages.index_copy_(0, targets, pages.index_select(0, sources))
