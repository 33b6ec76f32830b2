"""Runs stages of the CPU decoder through steps, as a worker would, upon caches that are NaN before."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from manta.kernels.cpu_decoder import layout
from manta.kernels.cpu_decoder.stage import CpuStage
from manta.kernels.metadata import KVCache
from tests.support.decoder_kernels import NAN, Variant
from tests.support.paging import PagedSequences
from tests.support.plain_decoder import PlainDecoder, Sizes

MAX_POSITION = 720

Steps = list[list[tuple[int, int]]]  # of (sequence, new tokens)


def make_stage(decoder: PlainDecoder, variant: Variant, num_threads: int = 1) -> CpuStage:
    torch.set_num_threads(num_threads)
    layers = [partial(replace, layer) for layer in decoder.layers]
    table = decoder.rope_table(MAX_POSITION)
    shape = decoder.sizes.stage_shape
    stage = CpuStage(shape, layers, decoder.norm, decoder.head, table, variant.dtype, variant.uses_dot)
    torch.set_num_threads(1)
    return stage


def make_cache(sizes: Sizes, dtype: torch.dtype, block_size: int, num_blocks: int) -> KVCache:
    shape = (num_blocks, sizes.num_kv_heads, *layout.page_shape(block_size, sizes.head_dim))
    return [tuple(torch.full(shape, NAN, dtype=dtype) for _ in range(2)) for _ in sizes.windows]  # type: ignore[misc]


def inputs(decoder: PlainDecoder, steps: Steps) -> dict[int, Tensor]:
    """Sequence -> [tokens, hidden], as an embedding would give."""
    lengths: dict[int, int] = {}
    for rows in steps:
        for sequence, num_new in rows:
            lengths[sequence] = lengths.get(sequence, 0) + num_new
    generator = torch.Generator().manual_seed(7)
    return {
        sequence: torch.randn(length, decoder.sizes.hidden, generator=generator).to(decoder.dtype)
        for sequence, length in sorted(lengths.items())
    }


class Run:
    """Steps of a stage upon a cache of its own; collects each sequence's hidden states and logits.

    With `keeps_last` the stage gives only the last token of each row, and none of a step's first row; `kept` are their
    positions.
    """

    def __init__(
        self,
        stage: CpuStage,
        decoder: PlainDecoder,
        sequences: dict[int, Tensor],
        block_size: int = 8,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        keeps_last: bool = False,
    ) -> None:
        self._keeps_last = keeps_last
        self._computed = dict.fromkeys(sequences, 0)
        self.kept: dict[int, list[int]] = {sequence: [] for sequence in sequences}
        self._stage, self._inputs, self._all_reduce = stage, sequences, all_reduce
        num_blocks = sum(len(x) // block_size + 1 for x in sequences.values()) + 1
        self._cache = make_cache(decoder.sizes, decoder.dtype, block_size, num_blocks)
        self._paged = PagedSequences(block_size, num_blocks)
        self._hidden: dict[int, list[Tensor]] = {sequence: [] for sequence in sequences}
        self._logits: dict[int, list[Tensor]] = {sequence: [] for sequence in sequences}

    def step(self, rows: list[tuple[int, int]]) -> None:
        parts = []
        for sequence, num_new in rows:
            computed = self._computed[sequence]
            parts.append(self._inputs[sequence][computed : computed + num_new])
            self._computed[sequence] += num_new
        x = torch.cat(parts)
        before = x.clone()
        ends = torch.tensor([num_new for _, num_new in rows]).cumsum(0) - 1
        kept = ends[1:] if self._keeps_last else None
        hidden = self._stage.run(x, self._paged.step(rows), self._cache, self._all_reduce, kept)
        assert torch.equal(x, before) or not x.isfinite().all()
        assert hidden.dtype == x.dtype
        logits = self._stage.logits(hidden)
        start = 0
        for sequence, num_new in rows[1:] if self._keeps_last else rows:
            count = 1 if self._keeps_last else num_new
            self._hidden[sequence].append(hidden[start : start + count].clone())
            self._logits[sequence].append(logits[start : start + count].clone())
            self.kept[sequence] += range(self._computed[sequence] - count, self._computed[sequence])
            start += count
        assert start == len(hidden)

    def all(self, steps: Steps) -> "Run":
        for rows in steps:
            self.step(rows)
        return self

    @property
    def hidden(self) -> dict[int, Tensor]:
        return {sequence: torch.cat(parts) for sequence, parts in self._hidden.items() if parts}

    @property
    def logits(self) -> dict[int, Tensor]:
        return {sequence: torch.cat(parts) for sequence, parts in self._logits.items() if parts}


def same_bits(one: Run, other: Run) -> bool:
    return all(torch.equal(one.logits[s], logits) for s, logits in other.logits.items()) and all(
        torch.equal(one.hidden[s], hidden) for s, hidden in other.hidden.items()
    )
