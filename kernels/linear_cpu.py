"""x @ weight.T + bias on the CPU with the weight laid out for oneDNN once, not in every call."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def make_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Returns the function [T, in] -> [T, out] of weight [out, in] and bias [out].

    float16 weights are kept as float32, because few CPUs multiply float16: the inputs are widened and the outputs
    narrowed. Where oneDNN cannot take the weight, torch's own linear serves.
    """
    if weight.dtype == torch.float16:
        wide = make_linear(weight.float(), None if bias is None else bias.float())
        return lambda x: wide(x.float()).half()
    packed = _pack(weight)
    if packed is None:
        return lambda x: F.linear(x, weight, bias)
    linear: Any = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: linear(x, packed, bias, "none", [], "")


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's layout, tried out on one row; None where torch or the CPU lacks what it takes."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        torch.ops.mkldnn._linear_pointwise.default(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
    except RuntimeError:
        return None
    return packed
