"""Lays sequences out in KV blocks, scattered on purpose, and says where the tokens of a step go."""

import random

import torch

from manta.kernels.metadata import AttentionMetadata


class PagedSequences:
    """Sequences that grow step by step, named by integers. Block 0 is never used: its pages stay zero."""

    def __init__(self, block_size: int, num_blocks: int, seed: int = 0) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._free = list(range(1, num_blocks))
        random.Random(seed).shuffle(self._free)
        self._blocks: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def step(self, rows: list[tuple[int, int]]) -> AttentionMetadata:
        """Each row is (sequence, new tokens); rows of one token at the front are the decode rows."""
        starts, tables, slots, positions = [0], [], [], []
        for sequence, num_new in rows:
            blocks = self._blocks.setdefault(sequence, [])
            first = self._lengths.get(sequence, 0)
            self._lengths[sequence] = first + num_new
            while len(blocks) * self.block_size < first + num_new:
                blocks.append(self._free.pop())
            for position in range(first, first + num_new):
                positions.append(position)
                slots.append(blocks[position // self.block_size] * self.block_size + position % self.block_size)
            starts.append(starts[-1] + num_new)
            tables.append(blocks)
        width = max(map(len, tables))
        lengths = [self._lengths[sequence] for sequence, _ in rows]
        num_decodes = next((i for i, (_, num_new) in enumerate(rows) if num_new != 1), len(rows))
        return AttentionMetadata(
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            num_decodes=num_decodes,
            max_query_len=max(num_new for _, num_new in rows),
            max_seq_len=max(lengths),
            block_size=self.block_size,
        )
