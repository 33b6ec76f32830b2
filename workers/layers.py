"""The layers of a tensor-parallel decoder: each holds its rank's part and says in its name how it is split."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.configs.model import ModelSpec
from manta.configs.weights import local_size, padded_vocab_size
from manta.kernels import ops
from manta.kernels.cpu_decoder.shape import Linear
from manta.kernels.fp8 import Fp8Rows
from manta.workers.formats import LinearFormat, Weights
from manta.workers.mesh import Mesh


def _parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


class Layer(nn.Module):
    """A module that is called directly: nn.Module's hooks cost more than a small layer does in a decode step."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Fp8Input:
    """A linear takes fp8 rows: quantised by this scale (float32 [1]) or, without one, by each row's own."""

    scale: Tensor | None


class _Linear(Layer):
    """x @ weight.T + bias. Usable after `prepare`, which gives the weight to the device's quickest kernel."""

    weight: nn.Parameter | None
    weight_scale: nn.Parameter | None  # float32 [out]
    input_scale: nn.Parameter | None  # float32 [1]
    bias: nn.Parameter | None
    apply_weight: Callable[[Any], Tensor]
    takes: Fp8Input | None  # None: rows of the activations' dtype

    def __init__(self, in_size: int, out_size: int, bias: bool, format: LinearFormat, device: torch.device) -> None:
        super().__init__()
        self.format = format
        self.device = device
        is_stored = format.weights == Weights.STORED_FP8
        dtype = torch.float8_e4m3fn if is_stored else format.dtype
        # A weight that is still to be quantised waits on the host, so that the device never holds the wide model.
        where = torch.device("cpu") if format.weights == Weights.ONLINE_FP8 else device
        self.weight = _parameter(out_size, in_size, dtype=dtype, device=where)
        self.weight_scale = _parameter(out_size, dtype=torch.float32, device=device) if is_stored else None
        self.input_scale = _parameter(1, dtype=torch.float32, device=device) if format.has_input_scale else None
        self.bias = _parameter(out_size, dtype=format.dtype, device=device) if bias else None
        self.takes = None

    def prepare(self) -> None:
        """Call once, when the weight is loaded. The kernel may keep its own copy; the layer lets go of this one."""
        assert self.weight is not None
        if self.format.weights == Weights.PLAIN:
            self.apply_weight = ops.make_linear(self.weight, self.bias)
        else:
            self.takes = Fp8Input(self.input_scale)
            weight, scales = self._quantized(self.weight)
            self.apply_weight = ops.make_fp8_linear(weight, scales, self.bias, self.format.dtype)
        self.weight = self.weight_scale = None

    def _quantized(self, weight: Tensor) -> Fp8Rows:
        """fp8 [out, in] and float32 [out]."""
        if self.weight_scale is not None:
            return Fp8Rows(weight, self.weight_scale)
        rows = ops.quantize(weight.to(self.device))
        return Fp8Rows(rows.values, rows.scales[:, 0].contiguous())

    def take(self) -> Linear:
        """Weight and bias, which the layer no longer has afterwards."""
        assert self.weight is not None
        taken = Linear(self.weight, self.bias)
        self.weight = self.bias = None
        return taken

    def product(self, x: Tensor | Fp8Rows) -> Tensor:
        """[T, in] -> [T, out]; a linear that takes fp8 quantises what is not."""
        if self.takes is not None and isinstance(x, Tensor):
            x = ops.quantize(x, self.takes.scale)
        return self.apply_weight(x)

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """[T, in] -> [T, out]."""
        return self.product(x)


class ColumnLinear(_Linear):
    """Split by outputs: this rank's parts of `dims` (as the weight rules name them), one behind the other."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, dims: tuple[str, ...], bias: bool, format: LinearFormat) -> None:
        super().__init__(spec.hidden_size, local_size(spec, mesh, *dims), bias, format, mesh.device)


class QKVLinear(ColumnLinear):
    """Queries, keys and values of this rank's heads in one product."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, format: LinearFormat) -> None:
        super().__init__(spec, mesh, ("heads", "kv_heads", "kv_heads"), spec.qkv_bias, format)


class MergedColumnLinear(ColumnLinear):
    """Gate and up projection in one product."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, format: LinearFormat) -> None:
        super().__init__(spec, mesh, ("intermediate", "intermediate"), spec.mlp_bias, format)


class RowLinear(_Linear):
    """Split by inputs; the ranks' products are summed, so that only one of them adds the bias. Scales of fp8 inputs and
    weights are the rank's own: its product is in them before it is summed."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, dim: str, bias: bool, format: LinearFormat) -> None:
        super().__init__(local_size(spec, mesh, dim), spec.hidden_size, bias, format, mesh.device)
        self.mesh = mesh

    def prepare(self) -> None:
        if self.mesh.tp_rank > 0:
            self.bias = None
        super().prepare()

    def take(self) -> Linear:
        if self.mesh.tp_rank > 0:
            self.bias = None
        return super().take()

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """[T, in / tp] -> [T, out], the same on every tp rank."""
        out = self.product(x)
        return sum_in_order(self.mesh, out) if ops.is_batch_invariant() else self.mesh.all_reduce(out)


def sum_in_order(mesh: Mesh, x: Tensor) -> Tensor:
    """x [T, size] summed over the tp ranks, rank by rank in float32: NCCL's order depends on the number of tokens."""
    if mesh.tp_size == 1:
        return x
    total, *others = mesh.all_gather_last_dim(x).view(x.shape[0], mesh.tp_size, -1).float().unbind(dim=1)
    for other in others:
        total = total + other
    return total.to(x.dtype)


class VocabEmbedding(Layer):
    """Split by tokens; a rank contributes zeros for the tokens of others."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__()
        self.mesh = mesh
        self.num_rows = padded_vocab_size(spec, mesh.tp_size) // mesh.tp_size
        self.weight = _parameter(self.num_rows, spec.hidden_size, dtype=dtype, device=mesh.device)

    def forward(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, hidden]."""
        if self.mesh.tp_size == 1:
            return F.embedding(token_ids, self.weight)
        rows = token_ids - self.mesh.tp_rank * self.num_rows
        is_other = (rows < 0) | (rows >= self.num_rows)
        x = F.embedding(rows.masked_fill_(is_other, 0), self.weight).masked_fill_(is_other[:, None], 0)
        return self.mesh.all_reduce(x)


class LMHead(_Linear):
    """Split by tokens; the parts are gathered and the padding of the vocabulary cut off."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, dtype: torch.dtype) -> None:
        num_rows = padded_vocab_size(spec, mesh.tp_size) // mesh.tp_size
        super().__init__(spec.hidden_size, num_rows, False, LinearFormat(dtype), mesh.device)
        self.mesh = mesh
        self.vocab_size = spec.vocab_size

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """[R, hidden] -> float32 [R, vocab_size], the same on every tp rank."""
        return self.mesh.all_gather_last_dim(self.apply_weight(x))[:, : self.vocab_size].float()


class RMSNorm(Layer):
    """Root mean square norm, alone or after adding to the residual."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = _parameter(size, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x: Tensor, out: Fp8Input | None = None) -> Tensor | Fp8Rows:
        """[T, size] -> [T, size], as the linear that follows takes it."""
        if out is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.rms_norm_fp8(x, self.weight, self.eps, out.scale)

    def add(self, x: Tensor, residual: Tensor, out: Fp8Input | None = None) -> Tensor | Fp8Rows:
        """residual += x in place; returns the norm of it."""
        if out is None:
            return ops.add_rms_norm(x, residual, self.weight, self.eps)
        return ops.add_rms_norm_fp8(x, residual, self.weight, self.eps, out.scale)
