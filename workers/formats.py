"""In what form a rank keeps the weights of its linears and its KV pages: decided once, before the model is built."""

import logging
from dataclasses import dataclass
from enum import Enum

import torch

from manta.configs.model import ModelError, ModelSpec
from manta.configs.schema import KVCacheDType
from manta.kernels import ops

logger = logging.getLogger(__name__)


class Weights(Enum):
    PLAIN = "plain"  # of the activations' dtype
    STORED_FP8 = "stored"  # as the checkpoint has them, with its scales
    ONLINE_FP8 = "online"  # quantised when all of a linear is there, a scale per output channel


@dataclass(frozen=True, slots=True)
class Format:
    """dtype: of activations, and of everything that is not fp8; kv_dtype: of KV pages."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    weights: Weights = Weights.PLAIN

    @property
    def has_fp8_pages(self) -> bool:
        return self.kv_dtype == torch.float8_e4m3fn

    def itemsize_of(self, spec: ModelSpec, name: str) -> int:
        """Bytes per value of a tensor of the checkpoint."""
        linear = name.removesuffix(".weight")
        if not linear.endswith("_proj") or self.linear(spec, linear).weights == Weights.PLAIN:
            return self.dtype.itemsize
        return 1

    def linear(self, spec: ModelSpec, *names: str) -> "LinearFormat":
        """Of the linears with these names in the checkpoint, which are one product here. Raises ModelError if only some
        of them are quantised."""
        weights, quantization = self.weights, spec.quantization
        if weights == Weights.STORED_FP8 and quantization is not None:
            quantized = [quantization.quantizes(name) for name in names]
            if any(quantized) != all(quantized):
                raise ModelError(f"of {', '.join(names)} only some are quantised; they are multiplied as one")
            weights = weights if all(quantized) else Weights.PLAIN
        has_input_scale = weights == Weights.STORED_FP8 and quantization is not None and quantization.has_input_scales
        return LinearFormat(self.dtype, weights, has_input_scale)


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """has_input_scale: one scale quantises all inputs; else fp8 takes each row's own."""

    dtype: torch.dtype
    weights: Weights = Weights.PLAIN
    has_input_scale: bool = False


def plain(dtype: torch.dtype) -> Format:
    """Nothing in fp8."""
    return Format(dtype, dtype)


def choose_format(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantization: str | None = None,
    kv_cache_dtype: KVCacheDType = "auto",
    is_dummy: bool = False,
) -> Format:
    """What --quantization, --kv-cache-dtype and the checkpoint ask for, as far as the device can. is_dummy: there is no
    checkpoint to read. Raises ModelError where a flag asks for what the device has not."""
    kv_dtype = dtype if kv_cache_dtype == "auto" else torch.float8_e4m3fn
    has_products = ops.has_fp8_products(device)
    if quantization is not None and spec.quantization is None and not has_products:
        raise ModelError(
            f"--quantization {quantization} needs triton and a GPU of compute capability 8.9 or later; this rank is "
            f"on {device}. Leave the flag out to serve the weights as they are"
        )
    if spec.quantization is None:
        return Format(dtype, kv_dtype, Weights.PLAIN if quantization is None else Weights.ONLINE_FP8)
    reason = _why_widened(spec, has_products, device)
    if reason is not None:
        logger.warning("fp8 weights are widened to %s as they are read: %s", str(dtype).removeprefix("torch."), reason)
        return Format(dtype, kv_dtype)
    return Format(dtype, kv_dtype, Weights.ONLINE_FP8 if is_dummy else Weights.STORED_FP8)


def _why_widened(spec: ModelSpec, has_products: bool, device: torch.device) -> str | None:
    assert spec.quantization is not None
    if not has_products:
        return f"{device} has no fp8 products (GPUs of compute capability 8.9 and later have)"
    if spec.quantization.scales == "block":
        return "no kernel multiplies weights with scales per block; they take the memory of unquantised ones"
    return "the checkpoint leaves activations unquantised" if spec.quantization.weights_only else None
