"""Turns the rows of a step into what the model reads."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manta.kernels.metadata import AttentionMetadata
from manta.workers.slot_table import Rows, SlotTable
from manta.workers.transfer import upload


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens in R rows on the device, N of which sample."""

    metadata: AttentionMetadata
    token_slots: Tensor  # int64 [T]: where the token table holds the ids, beside metadata.positions
    sampled_tokens: Tensor  # int64 [N]: index among the T tokens of each sampling row's last one
    sampled_slots: Tensor  # int64 [N]
    sampled_positions: Tensor  # int64 [N]: where the sampled tokens go


def build_batch(rows: Rows, table: SlotTable, block_size: int, device: torch.device) -> Batch:
    """The step's tokens, rows in order. Vectorised over rows and tokens; does not wait for the device."""
    query_start = np.zeros(rows.slots.size + 1, np.int64)
    np.cumsum(rows.num_tokens, out=query_start[1:])
    num_tokens = int(query_start[-1])
    seq_lens = rows.seq_lens
    token_slots = np.repeat(rows.slots, rows.num_tokens)
    positions = np.repeat(rows.starts - query_start[:-1], rows.num_tokens) + np.arange(num_tokens)
    block_index, offset = np.divmod(positions, block_size)
    slot_mapping = table.block_table[token_slots, block_index].astype(np.int64) * block_size + offset

    max_seq_len = int(seq_lens.max())
    block_tables = table.block_table[rows.slots, : -(-max_seq_len // block_size)]
    query_start_32, seq_lens_32, block_tables_32 = upload(
        [query_start.astype(np.int32), seq_lens.astype(np.int32), block_tables], device
    )
    slots, positions_64, slot_mapping_64, sampled_tokens, sampled_slots, sampled_positions = upload(
        [
            token_slots,
            positions,
            slot_mapping,
            query_start[1:][rows.sampled] - 1,
            rows.sampled_slots,
            rows.sampled_positions,
        ],
        device,
    )
    metadata = AttentionMetadata(
        query_start=query_start_32,
        seq_lens=seq_lens_32,
        block_tables=block_tables_32,
        slot_mapping=slot_mapping_64,
        positions=positions_64,
        num_decodes=rows.num_decodes,
        max_query_len=int(rows.num_tokens.max()),
        max_seq_len=max_seq_len,
        block_size=block_size,
    )
    return Batch(metadata, slots, sampled_tokens, sampled_slots, sampled_positions)
