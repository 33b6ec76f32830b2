"""The forms of paged attention behind one interface. `ops` chooses by device; users may ask for another on GPUs."""

from functools import partial
from importlib.util import find_spec
from typing import Protocol

from torch import Tensor

from manta.kernels import paged_attention_sdpa
from manta.kernels.metadata import AttentionMetadata

GPU_FORMS = ("triton", "flashinfer", "sdpa")


class PlansOnHost:
    """Attention that reads lengths back from the device: a CUDA graph cannot hold it."""


class PagedAttention(Protocol):
    """The contract of reference.paged_attention; k_scale and v_scale are those of quantised pages, float32 [1]."""

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
    ) -> Tensor: ...


def on_cpu(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention for CPUs; of fp8 pages, which its kernel does not read, through torch."""
    if k_scale is not None:
        return paged_attention_sdpa.paged_attention(q, keys, values, metadata, scale, window, k_scale, v_scale)
    from manta.kernels import paged_attention_cpu  # needs numba

    return paged_attention_cpu.paged_attention(q, keys, values, metadata, scale, window)


def on_gpu(form: str | None = None, batch_invariant: bool = False) -> PagedAttention:
    """Attention for GPUs by one of GPU_FORMS; None: triton where it is installed, else sdpa.

    batch_invariant: a token's result has the same bits whatever else is in its step, which only triton offers.
    Raises ValueError for a form that does not exist, is not installed, or cannot be batch-invariant.
    """
    has_triton = find_spec("triton") is not None
    if form is None:
        form = "triton" if has_triton or batch_invariant else "sdpa"
    if form not in GPU_FORMS:
        raise ValueError(f"attention form {form!r} does not exist; there are {', '.join(GPU_FORMS)}")
    if batch_invariant and form != "triton":
        raise ValueError(f"attention by {form} depends on the batch; batch-invariant attention takes triton")
    if form == "sdpa":
        return paged_attention_sdpa.paged_attention
    if find_spec(form) is None:
        raise ValueError(f"attention by {form} needs the package {form!r}, which is not installed")
    if form == "flashinfer":
        from manta.kernels.paged_attention_flashinfer import FlashInferAttention

        return FlashInferAttention()
    from manta.kernels.paged_attention_triton import paged_attention

    return partial(paged_attention, batch_invariant=batch_invariant)
