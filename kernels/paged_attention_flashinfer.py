"""Paged attention by FlashInfer (Ye et al. 2025), where it is installed and asked for. Manta does not depend on it.

FlashInfer plans on the host: the first layer of a step reads the row lengths back from the device, which waits for it,
so that steps cannot be captured in CUDA graphs. The plan is made again only when metadata, scale or window change.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from manta.kernels.attention import PlansOnHost
from manta.kernels.metadata import AttentionMetadata

WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends


class FlashInferAttention(PlansOnHost):
    """Owns FlashInfer's workspace and plans, one per kind of layer, of one device. Not for several threads at once."""

    def __init__(self) -> None:
        """Raises ModuleNotFoundError where flashinfer is not installed."""
        self._flashinfer: Any = importlib.import_module("flashinfer")
        self._wrappers: dict[tuple[object, ...], tuple[Any, AttentionMetadata | None]] = {}

    def __call__(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor:
        """Same contract as reference.paged_attention; float16 and bfloat16. Raises ValueError for quantised pages."""
        if k_scale is not None or v_scale is not None:
            raise ValueError("attention by FlashInfer reads no fp8 pages here: ask for triton, or 16-bit pages")
        num_kv_heads, block_size, dim = keys.shape[1:]
        heads = q.reshape(q.shape[0], -1, dim)
        kind = (heads.shape[1], num_kv_heads, dim, block_size, scale, window, q.dtype, keys.dtype, q.device)
        wrapper, planned = self._wrappers.get(kind, (None, None))
        if wrapper is None:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
            wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        if planned is not metadata:
            pages = page_lists(metadata)
            wrapper.plan(
                metadata.query_start, *pages, heads.shape[1], num_kv_heads, dim, block_size, causal=True,
                sm_scale=scale, window_left=-1 if window is None else window - 1,
                q_data_type=q.dtype, kv_data_type=keys.dtype,
            )  # fmt: skip
            self._wrappers[kind] = (wrapper, metadata)  # held, so that another step's cannot take its identity
        out: Tensor = wrapper.run(heads, (keys, values))
        return out.reshape(q.shape)


def page_lists(metadata: AttentionMetadata) -> tuple[Tensor, Tensor, Tensor]:
    """Block tables as FlashInfer takes them, int32: where each row's pages begin [R + 1], all rows' pages one after
    another, and how many tokens the last page of each row has [R]."""
    counts = (metadata.seq_lens + metadata.block_size - 1) // metadata.block_size
    begins = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    columns = torch.arange(metadata.block_tables.shape[1], device=counts.device)
    pages = metadata.block_tables[columns < counts[:, None]]
    return begins, pages, metadata.seq_lens - (counts - 1).clamp(min=0) * metadata.block_size
