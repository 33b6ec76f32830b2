"""The slots' columns on the device, where steps read them. The host sends what plans change, and nothing else."""

import numpy as np
import torch

from manta.kernels.step_tensors import SlotColumns
from manta.workers.limits import Limits
from manta.workers.slot_table import SlotChanges
from manta.workers.token_table import TokenTable
from manta.workers.transfer import upload


class DeviceSlots:
    """Columns of all the slots there can ever be, so that they never move: CUDA graphs keep their addresses."""

    def __init__(self, limits: Limits, tokens: TokenTable, device: torch.device) -> None:
        """`tokens` must be as large."""
        num_slots = limits.max_num_slots
        assert tokens.ids.shape == (num_slots, limits.max_model_len)
        self._device = device
        self.columns = SlotColumns(
            length=torch.zeros(num_slots, dtype=torch.int32, device=device),
            num_computed=torch.zeros(num_slots, dtype=torch.int32, device=device),
            block_table=torch.zeros(num_slots, limits.max_blocks_per_seq, dtype=torch.int32, device=device),
            tokens=tokens.ids,
        )

    def apply(self, changes: SlotChanges) -> None:
        """Brings the columns to where the host's stand before the step; in the stream, waiting for nothing."""
        if changes.added:
            added = np.array(changes.added, np.int64)
            slots, lengths, computed = upload([added[:, 0], added[:, 1], added[:, 2]], self._device)
            self.columns.length[slots] = lengths.to(torch.int32)
            self.columns.num_computed[slots] = computed.to(torch.int32)
        if changes.blocks:
            columns = [np.concatenate(parts) for parts in zip(*changes.blocks, strict=True)]
            slots, places, blocks = upload(columns, self._device)
            self.columns.block_table[slots, places] = blocks.to(torch.int32)
