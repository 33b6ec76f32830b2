"""Where each token of a step sits in the paged KV cache: shared by every attention kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """T tokens in R rows, a row being one sequence's share of the step; decode rows (one token each) come first.

    The KV cache of a layer is two tensors [num_blocks, num_kv_heads, block_size, head_dim]; position p of row r lies in
    block block_tables[r, p // block_size] at offset p % block_size.
    """

    query_start: Tensor  # int32 [R + 1]: row r holds tokens query_start[r] : query_start[r + 1]
    seq_lens: Tensor  # int32 [R]: tokens of the row's sequence whose KV exists after this step's write
    block_tables: Tensor  # int32 [R, max_blocks], padded with 0
    slot_mapping: Tensor  # int64 [T]: block * block_size + offset that token t's KV is written to
    positions: Tensor  # int64 [T]
    num_decodes: int  # rows 0 : num_decodes have exactly one token
    max_query_len: int
    max_seq_len: int
    block_size: int

    def __post_init__(self) -> None:
        for name in ("query_start", "seq_lens", "block_tables"):  # kernels read them by address
            assert getattr(self, name).dtype == torch.int32, f"{name} must be int32"
        assert self.slot_mapping.dtype == torch.int64, "slot_mapping must be int64"
        assert self.block_tables.stride(-1) == 1, "rows of block_tables must be contiguous"

    @property
    def num_rows(self) -> int:
        return int(self.seq_lens.shape[0])


KVCache = list[tuple[torch.Tensor, torch.Tensor]]  # per local layer: keys and values
