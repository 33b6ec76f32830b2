"""The layers of a tensor-parallel decoder: each holds its rank's part and says in its name how it is split."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manta.configs.model import ModelSpec
from manta.kernels import ops
from manta.kernels.cpu_decoder.shape import Linear
from manta.workers.mesh import Mesh
from manta.workers.weights import local_size, padded_vocab_size


def _parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


class Layer(nn.Module):
    """A module that is called directly: nn.Module's hooks cost more than a small layer does in a decode step."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


class _Linear(Layer):
    """x @ weight.T + bias. Usable after `prepare`, which gives the weight to the device's quickest kernel."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    apply_weight: Callable[[Tensor], Tensor]

    def __init__(self, in_size: int, out_size: int, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = _parameter(out_size, in_size, dtype=dtype, device=device)
        self.bias = _parameter(out_size, dtype=dtype, device=device) if bias else None

    def prepare(self) -> None:
        """Call once, when the weight is loaded. The kernel may keep its own copy; the layer lets go of this one."""
        assert self.weight is not None
        self.apply_weight = ops.make_linear(self.weight, self.bias)
        self.weight = None

    def take(self) -> Linear:
        """Weight and bias, which the layer no longer has afterwards."""
        assert self.weight is not None
        taken = Linear(self.weight, self.bias)
        self.weight = self.bias = None
        return taken

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return self.apply_weight(x)


class ColumnLinear(_Linear):
    """Split by outputs: this rank's parts of `dims` (as the weight rules name them), one behind the other."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, dims: tuple[str, ...], bias: bool, dtype: torch.dtype) -> None:
        super().__init__(spec.hidden_size, local_size(spec, mesh, *dims), bias, dtype, mesh.device)


class QKVLinear(ColumnLinear):
    """Queries, keys and values of this rank's heads in one product."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__(spec, mesh, ("heads", "kv_heads", "kv_heads"), spec.qkv_bias, dtype)


class MergedColumnLinear(ColumnLinear):
    """Gate and up projection in one product."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__(spec, mesh, ("intermediate", "intermediate"), spec.mlp_bias, dtype)


class RowLinear(_Linear):
    """Split by inputs; the ranks' products are summed, so that only one of them adds the bias."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, dim: str, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(local_size(spec, mesh, dim), spec.hidden_size, bias, dtype, mesh.device)
        self.mesh = mesh

    def prepare(self) -> None:
        if self.mesh.tp_rank > 0:
            self.bias = None
        super().prepare()

    def take(self) -> Linear:
        if self.mesh.tp_rank > 0:
            self.bias = None
        return super().take()

    def forward(self, x: Tensor) -> Tensor:
        """[T, in / tp] -> [T, out], the same on every tp rank."""
        return self.mesh.all_reduce(self.apply_weight(x))


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
        super().__init__(spec.hidden_size, num_rows, False, dtype, mesh.device)
        self.mesh = mesh
        self.vocab_size = spec.vocab_size

    def forward(self, x: Tensor) -> Tensor:
        """[R, hidden] -> float32 [R, vocab_size], the same on every tp rank."""
        return self.mesh.all_gather_last_dim(self.apply_weight(x))[:, : self.vocab_size].float()


class RMSNorm(Layer):
    """Root mean square norm, alone or after adding to the residual."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = _parameter(size, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[T, size] -> [T, size]."""
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x in place; returns the norm of it."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
