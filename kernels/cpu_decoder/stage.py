"""The layers of one rank on the CPU, run by a team of threads: one call a step, or one per half layer between ranks.

Owns the packed weights, the activations and the tables that threads read (see `program`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manta.kernels.cpu_decoder import attention_tile, dot, layout, products, program
from manta.kernels.cpu_decoder.items import NO_JOINS, Work, attention_items, single_queries
from manta.kernels.cpu_decoder.memory import in_huge_pages, zeros
from manta.kernels.cpu_decoder.products import interleave, pack_weight
from manta.kernels.cpu_decoder.shape import LayerWeights, Linear, StageShape
from manta.kernels.cpu_decoder.team import team_of
from manta.kernels.cpu_decoder.tiles import LANES, MAX_ROWS
from manta.kernels.metadata import AttentionMetadata, KVCache

UNLIMITED = 1 << 40  # a window no sequence fills
_LINE_BYTES = 64


class CpuStage:
    """Several layers, and the head on the last stage. One thread calls it; all its threads compute.

    `layers` is consumed one by one, so that packing needs memory for one linear more than the weights. A final norm is
    given on the last stage. rope_table: float32 [max_position, head_dim]. uses_dot: whether products are dot products
    of bfloat16 pairs (`dot`); None for what the CPU does best.
    """

    def __init__(
        self,
        shape: StageShape,
        layers: Sequence[Callable[[], LayerWeights]],
        final_norm: Tensor | None,
        head: Tensor | None,
        rope_table: Tensor,
        dtype: torch.dtype,
        uses_dot: bool | None = None,
    ) -> None:
        self._shape = shape
        self._group = shape.num_heads // shape.num_kv_heads
        if uses_dot is None:
            uses_dot = dtype == torch.bfloat16 and dot.pays()
        self._team = team_of(torch.get_num_threads(), dtype, uses_dot=uses_dot)
        self._kept: list[Tensor] = [rope_table]  # what the tables have addresses of
        self._layers = np.zeros((len(layers), program.LAYER_FIELDS), np.int64)
        for fields, layer in zip(self._layers, layers, strict=True):
            self._set_layer(fields, layer())
        self._step = np.zeros(program.STEP_FIELDS, np.int64)
        self._pages: KVCache | None = None
        self._capacity = 0
        self._activations: list[Tensor] = []
        self._parts = torch.empty(0)
        self._logits = torch.empty(0)
        self._set_constants(final_norm, head, rope_table)
        self._set_block_size(LANES)  # until a step tells

    def run(
        self,
        x: Tensor,
        metadata: AttentionMetadata,
        kv_cache: KVCache,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """x [T, hidden] through the layers -> [T, hidden] in the same dtype, normed on the last stage.

        Writes the tokens' keys and values to the cache, whose pages are as `layout` has them. `all_reduce` sums a
        float32 [T, hidden] over the ranks in place; given if the shape is split. kept: int64 [N], ascending indices of
        the tokens whose result is needed; it is then [N, hidden], and the last layer does no more for the others than
        write their keys and values.
        """
        step, team = self._step, self._team
        num_tokens = x.shape[0]
        x = x.contiguous()
        self._reserve(num_tokens)
        self._set_pages(kv_cache)
        read = self._set_attention(metadata, attention_items(metadata, self._group, team.num_threads))
        step[program.NUM_TOKENS], step[program.X] = num_tokens, x.data_ptr()
        step[program.HAS_PARTIAL] = 0
        parts = program.LAYER_PARTS * len(self._layers)
        begin = 0
        if kept is not None and len(kept) < num_tokens:
            begin, num_tokens = parts - program.LAYER_PARTS + program.ATTEND_AND_SUM, len(kept)
            self._run(0, begin, all_reduce, enters=True)
            if num_tokens == 0:
                return x[:0]
            read = self._keep_rows(kept, metadata)
        out = x.new_empty(num_tokens, x.shape[1])
        step[program.OUT] = out.data_ptr()
        self._run(begin, parts, all_reduce, enters=begin == 0, leaves=True)
        del read
        return out

    def _run(
        self, begin: int, end: int, all_reduce: Callable[[Tensor], Tensor] | None, *, enters: bool,
        leaves: bool = False,
    ) -> None:  # fmt: skip
        """Parts begin : end, in one call where ranks have nothing to sum in between."""
        if all_reduce is None:
            self._call(begin, end, enters=enters, leaves=leaves)
            return
        partial = self._activations[1][: self._step[program.NUM_TOKENS]]
        while begin < end:
            stop = min(end, begin + (2 if begin % program.LAYER_PARTS == program.PROJECT else 1))
            self._call(begin, stop, enters=enters, leaves=False)
            if (stop - 1) % program.LAYER_PARTS != program.PROJECT:
                all_reduce(partial)
                self._step[program.HAS_PARTIAL] = 1
            begin, enters = stop, False
        if leaves:
            self._call(end, end, enters=False, leaves=True)

    def _call(self, begin: int, end: int, *, enters: bool, leaves: bool) -> None:
        self._step[program.BEGIN : program.LEAVES + 1] = (begin, end, enters, leaves)
        self._team.run(program.LAYERS_JOB, self._step.ctypes.data)

    def _keep_rows(self, kept: Tensor, metadata: AttentionMetadata) -> object:
        """Makes tokens `kept` the step's only ones; their queries stand alone. Returns what the threads then read."""
        indices, count = kept.numpy(), len(kept)
        for tensor in (self._activations[0], self._activations[3]):  # the residual stream, queries
            rows = tensor.numpy()
            rows[:count] = rows[indices]
        positions = metadata.positions[kept]
        row = torch.searchsorted(metadata.query_start, kept, right=True) - 1
        alone = replace(
            metadata,
            query_start=torch.arange(count + 1, dtype=torch.int32),
            seq_lens=(positions + 1).int(),
            block_tables=metadata.block_tables[row],
            slot_mapping=metadata.slot_mapping[kept],
            positions=positions,
            num_decodes=count,
            max_query_len=1,
        )
        self._step[program.NUM_TOKENS] = count
        return self._set_attention(alone, (single_queries(alone), NO_JOINS, 0))

    def logits(self, x: Tensor) -> Tensor:
        """x [R, hidden], normed -> float32 [R, vocab]; valid until the next call."""
        step, vocab = self._step, int(self._step[program.VOCAB])
        rows = x.shape[0]
        x = x.contiguous()
        self._reserve(rows)
        if self._logits.numel() < rows * vocab:
            self._logits = zeros((rows * vocab,), torch.float32)
        out = self._logits[: rows * vocab].view(rows, vocab)
        step[program.ROWS], step[program.X], step[program.LOGITS] = rows, x.data_ptr(), out.data_ptr()
        self._team.run(program.LOGITS_JOB, step.ctypes.data)
        return out

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _set_linear(self, fields: NDArray[np.int64], at: int, linear: Linear, *, is_gated: bool = False) -> None:
        weight, bias = linear.weight.detach(), linear.bias
        if is_gated:
            weight = interleave(weight)
            bias = None if bias is None else interleave(bias.detach())
        fields[at] = self._keep(in_huge_pages(pack_weight(weight)))
        if bias is not None:
            fields[at + 1] = self._keep(bias.detach().float().contiguous())

    def _set_layer(self, fields: NDArray[np.int64], layer: LayerWeights) -> None:
        fields[program.INPUT_NORM] = self._keep(layer.input_norm.detach().float())
        fields[program.MLP_NORM] = self._keep(layer.mlp_norm.detach().float())
        for field, weight in ((program.Q_NORM, layer.q_norm), (program.K_NORM, layer.k_norm)):
            if weight is not None:
                fields[field] = self._keep(weight.detach().float())
        self._set_linear(fields, program.QKV_LINEAR, layer.qkv)
        self._set_linear(fields, program.O_LINEAR, layer.o)
        self._set_linear(fields, program.GATE_UP_LINEAR, layer.gate_up, is_gated=True)
        self._set_linear(fields, program.DOWN_LINEAR, layer.down)
        fields[program.WINDOW] = UNLIMITED if layer.window is None else layer.window

    def _set_constants(self, final_norm: Tensor | None, head: Tensor | None, rope_table: Tensor) -> None:
        step, shape = self._step, self._shape
        step[program.HIDDEN], step[program.INTERMEDIATE] = shape.hidden, shape.intermediate
        step[program.NUM_HEADS], step[program.NUM_KV_HEADS] = shape.num_heads, shape.num_kv_heads
        step[program.HEAD_DIM] = shape.head_dim
        for field, address in self._team.kernels.items():
            step[field] = address
        step.view(np.float64)[program.EPS] = shape.eps
        step.view(np.float64)[program.SCALE] = shape.head_dim**-0.5
        step[program.IS_SPLIT] = shape.is_split
        step[program.ROPE_TABLE] = rope_table.data_ptr()
        step[program.LAYERS] = self._layers.ctypes.data
        if final_norm is not None:
            step[program.FINAL_NORM] = self._keep(final_norm.detach().float())
        if head is not None:
            self._set_linear(step, program.HEAD, Linear(head, None))
            step[program.VOCAB] = head.shape[0]

    def _reserve(self, num_tokens: int) -> None:
        """Makes room for the activations of so many tokens, and for the rows a tile reads beyond them."""
        if num_tokens <= self._capacity:
            return
        step, shape = self._step, self._shape
        self._capacity = max(64, num_tokens + num_tokens // 4)
        rows = self._capacity + MAX_ROWS
        heads = shape.num_heads * shape.head_dim
        widths = (
            (program.NORMED, program.NORMED_STRIDE, shape.hidden),
            (program.QKV, program.QKV_STRIDE, heads + 2 * shape.num_kv_heads * shape.head_dim),
            (program.ATTENDED, program.ATTENDED_STRIDE, heads),
            (program.GATED, program.GATED_STRIDE, shape.intermediate),
        )
        self._activations = [zeros((rows, shape.hidden), torch.float32) for _ in range(2)]
        step[program.RESIDUAL], step[program.PARTIAL] = (tensor.data_ptr() for tensor in self._activations)
        for field, stride_field, size in widths:
            # an odd number of cache lines, so that the rows of a tile do not fall into one set of the cache
            dtype = torch.float32 if field == program.QKV else self._team.left_dtype
            stride = (-(-size * dtype.itemsize // _LINE_BYTES) | 1) * _LINE_BYTES // dtype.itemsize
            self._activations.append(zeros((rows, stride), dtype))
            step[field], step[stride_field] = self._activations[-1].data_ptr(), stride

    def _set_pages(self, kv_cache: KVCache) -> None:
        if self._pages is kv_cache:
            return
        for fields, (keys, values) in zip(self._layers, kv_cache, strict=True):
            assert keys.is_contiguous()
            assert values.is_contiguous()
            fields[program.KEYS], fields[program.VALUES] = keys.data_ptr(), values.data_ptr()
        self._pages = kv_cache

    def _set_attention(self, metadata: AttentionMetadata, work: Work) -> object:
        """Fills in where the step's tokens are. The caller keeps what this returns until the step is over."""
        step, shape = self._step, self._shape
        if step[program.BLOCK_SIZE] != metadata.block_size:
            self._set_block_size(metadata.block_size)
        items, joins, num_parts = work
        size = num_parts * shape.num_heads * (shape.head_dim + 2)
        if self._parts.numel() < size:
            self._parts = torch.empty(size)
        tables = metadata.block_tables
        step[program.ITEMS], step[program.NUM_ITEMS] = items.ctypes.data, len(items)
        step[program.JOINS], step[program.NUM_JOINS] = joins.ctypes.data, len(joins)
        step[program.PARTS] = self._parts.data_ptr()
        step[program.POSITIONS] = metadata.positions.data_ptr()
        step[program.SLOT_MAPPING] = metadata.slot_mapping.data_ptr()
        step[program.QUERY_START] = metadata.query_start.data_ptr()
        step[program.SEQ_LENS] = metadata.seq_lens.data_ptr()
        step[program.BLOCK_TABLES], step[program.MAX_BLOCKS] = tables.data_ptr(), tables.stride(0)
        return work, metadata

    def _set_block_size(self, block_size: int) -> None:
        step = self._step
        page_tokens, page_dims = layout.page_shape(block_size, self._shape.head_dim)
        needed = max(products.SCRATCH_BYTES, attention_tile.scratch_bytes(self._group, page_tokens, page_dims))
        each = -(-needed // 4096) * 4096
        self._scratch = torch.zeros(self._team.num_threads * each + 4096, dtype=torch.uint8)
        step[program.BLOCK_SIZE] = block_size
        step[program.PAGE_TOKENS], step[program.PAGE_DIMS] = page_tokens, page_dims
        step[program.PAGES_PER_CHUNK] = attention_tile.chunk_pages(page_tokens, page_dims)
        step[program.SCRATCH] = -(-self._scratch.data_ptr() // 4096) * 4096
        step[program.SCRATCH_BYTES] = each
