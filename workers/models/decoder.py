"""A decoder of the Llama kind. What sets Llama, Mistral, Qwen2 and Qwen3 apart are fields of ModelSpec: biases, norms
of queries and keys, windows, rotary scaling, tied embeddings.

Names of modules are the targets in configs/weights.py.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from manta.configs.model import ModelSpec
from manta.configs.weights import local_size, num_local_kv_heads, stage_layers
from manta.kernels import ops
from manta.kernels.cpu_decoder.shape import LayerWeights, StageShape
from manta.kernels.fp8 import Fp8Rows
from manta.kernels.metadata import AttentionMetadata, KVCache
from manta.workers.formats import Format, plain
from manta.workers.layers import Layer, LMHead, MergedColumnLinear, QKVLinear, RMSNorm, RowLinear, VocabEmbedding
from manta.workers.mesh import Mesh
from manta.workers.rope import rope_table

if TYPE_CHECKING:  # it needs numba, which only CPUs do
    from manta.kernels.cpu_decoder.stage import CpuStage


@dataclass(slots=True)
class StepContext:
    """What every layer of a step shares."""

    metadata: AttentionMetadata
    cos_sin: Tensor  # float32 [T, head_dim]


class Attention(Layer):
    """Grouped-query attention over the paged cache."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, format: Format, name: str, window: int | None) -> None:
        super().__init__()
        parts = [f"{name}.{which}_proj" for which in "qkv"]
        self.qkv = QKVLinear(spec, mesh, format.linear(spec, *parts))
        self.o = RowLinear(spec, mesh, "heads", spec.o_bias, format.linear(spec, f"{name}.o_proj"))
        norm = (spec.head_dim, spec.rms_norm_eps, format.dtype, mesh.device)
        self.q_norm = RMSNorm(*norm) if spec.qk_norm else None
        self.k_norm = RMSNorm(*norm) if spec.qk_norm else None
        self.eps = spec.rms_norm_eps
        self.q_size = local_size(spec, mesh, "heads")
        self.scale = spec.head_dim**-0.5
        self.window = window
        # Of fp8 pages: float32 [1], what keys and values are divided by when they are written.
        self.kv_scales: tuple[Tensor, ...] = ()
        if format.has_fp8_pages:
            self.kv_scales = tuple(torch.ones(1, device=mesh.device) for _ in "kv")

    def forward(self, x: Tensor | Fp8Rows, step: StepContext, keys: Tensor, values: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        qkv = self.qkv(x)
        q_norm = self.q_norm.weight if self.q_norm is not None else None
        k_norm = self.k_norm.weight if self.k_norm is not None else None
        slots, scales = step.metadata.slot_mapping, self.kv_scales
        ops.rope_kv_write(qkv, step.cos_sin, slots, keys, values, q_norm, k_norm, self.eps, *scales)
        q = qkv[:, : self.q_size]
        out: Tensor = self.o(ops.paged_attention(q, keys, values, step.metadata, self.scale, self.window, *scales))
        return out


class MLP(Layer):
    """SwiGLU."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, format: Format, name: str) -> None:
        super().__init__()
        parts = [f"{name}.{which}_proj" for which in ("gate", "up")]
        self.gate_up = MergedColumnLinear(spec, mesh, format.linear(spec, *parts))
        down = format.linear(spec, f"{name}.down_proj")
        self.down = RowLinear(spec, mesh, "intermediate", spec.mlp_bias, down)

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        gate_up, takes = self.gate_up(x), self.down.takes
        gated = ops.silu_mul(gate_up) if takes is None else ops.silu_mul_fp8(gate_up, takes.scale)
        out: Tensor = self.down(gated)
        return out


class DecoderLayer(Layer):
    """Attention and MLP, each normed before and added to the residual after (the addition waits for the next norm)."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, format: Format, layer: int) -> None:
        super().__init__()
        norm = (spec.hidden_size, spec.rms_norm_eps, format.dtype, mesh.device)
        name = f"model.layers.{layer}"
        self.input_norm = RMSNorm(*norm)
        self.attention = Attention(spec, mesh, format, f"{name}.self_attn", spec.windows[layer])
        self.mlp_norm = RMSNorm(*norm)
        self.mlp = MLP(spec, mesh, format, f"{name}.mlp")

    def forward(self, x: Tensor | None, residual: Tensor, step: StepContext, pages: tuple[Tensor, Tensor]) -> Tensor:
        """x [T, hidden] is what is still to be added to the residual (None: nothing); returns the next such."""
        takes = self.attention.qkv.takes
        normed = self.input_norm(residual, takes) if x is None else self.input_norm.add(x, residual, takes)
        x = self.attention(normed, step, *pages)
        x = self.mlp(self.mlp_norm.add(x, residual, self.mlp.gate_up.takes))
        return x

    def take_weights(self) -> LayerWeights:
        """The layer's weights, which it no longer has afterwards."""
        attention, mlp = self.attention, self.mlp
        return LayerWeights(
            input_norm=self.input_norm.weight,
            qkv=attention.qkv.take(),
            q_norm=None if attention.q_norm is None else attention.q_norm.weight,
            k_norm=None if attention.k_norm is None else attention.k_norm.weight,
            o=attention.o.take(),
            mlp_norm=self.mlp_norm.weight,
            gate_up=mlp.gate_up.take(),
            down=mlp.down.take(),
            window=attention.window,
        )


class CausalLM(nn.Module):
    """One rank's share of the model: its stage's layers, its tp rank's part of each. Nothing is fp8 unless the `format`
    says so."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, dtype: torch.dtype, format: Format | None = None) -> None:
        super().__init__()
        format = format or plain(dtype)
        self.spec = spec
        self.mesh = mesh
        self.dtype = dtype
        self.format = format
        self.num_local_kv_heads = num_local_kv_heads(spec, mesh.tp_size)
        layers = stage_layers(spec.num_layers, mesh.pp_rank, mesh.pp_size)
        self.num_local_layers = len(layers)
        if mesh.is_first_stage:
            self.embed = VocabEmbedding(spec, mesh, dtype)
        self.layers = nn.ModuleList(DecoderLayer(spec, mesh, format, layer) for layer in layers)
        if mesh.is_last_stage:
            self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, dtype, mesh.device)
            if spec.has_lm_head:
                self.lm_head = LMHead(spec, mesh, dtype)
            if spec.has_lm_head and spec.tie_word_embeddings and mesh.is_first_stage:
                self.lm_head.weight = self.embed.weight
        self.rope_table = rope_table(spec.rope, spec.head_dim, spec.max_position).to(mesh.device)
        self.cpu_stage: CpuStage | None = None

    def prepare(self) -> None:
        """Call once, when all weights are loaded; the model can run afterwards."""
        if ops.uses_cpu_decoder(self.format.kv_dtype, self.mesh.device):
            self.cpu_stage = _cpu_stage(self)
            return
        for module in self.modules():
            if isinstance(module, LMHead | QKVLinear | MergedColumnLinear | RowLinear):
                module.prepare()

    @torch.inference_mode()
    def forward(
        self, x: Tensor, metadata: AttentionMetadata, kv_cache: KVCache, sampled: Tensor | None = None
    ) -> Tensor:
        """Token ids int64 [T] on the first stage, hidden [T, hidden_size] on later ones -> hidden [T, hidden_size].

        Writes the tokens' keys and values to the cache. Hidden states given are overwritten. On the last stage the
        final norm is applied, and with `sampled`, int64 [N], ascending, only those tokens' hidden states are given.
        """
        residual = self.embed(x) if self.mesh.is_first_stage else x
        if self.cpu_stage is not None:
            all_reduce = self.mesh.all_reduce if self.mesh.tp_size > 1 else None
            return self.cpu_stage.run(residual, metadata, kv_cache, all_reduce, sampled)
        step = StepContext(metadata, self.rope_table.index_select(0, metadata.positions))
        x_next: Tensor | None = None
        for layer, pages in zip(self.layers, kv_cache, strict=True):
            x_next = layer(x_next, residual, step, pages)
        assert x_next is not None
        if self.mesh.is_last_stage:
            if sampled is not None:
                x_next, residual = x_next[sampled], residual[sampled]
            return cast(Tensor, self.norm.add(x_next, residual))
        return residual.add_(x_next)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden_size] -> float32 [R, vocab_size], the same on every tp rank of the last stage."""
        if self.cpu_stage is not None:
            return self.mesh.all_gather_last_dim(self.cpu_stage.logits(hidden))[:, : self.spec.vocab_size]
        out: Tensor = self.lm_head(hidden)
        return out


def _cpu_stage(model: CausalLM) -> "CpuStage":
    """Packs the model's layers for the CPU; they give up their own weights."""
    from manta.kernels.cpu_decoder.stage import CpuStage

    spec, mesh = model.spec, model.mesh
    shape = StageShape(
        hidden=spec.hidden_size,
        num_heads=local_size(spec, mesh, "heads") // spec.head_dim,
        num_kv_heads=model.num_local_kv_heads,
        head_dim=spec.head_dim,
        intermediate=local_size(spec, mesh, "intermediate"),
        eps=spec.rms_norm_eps,
        is_split=mesh.tp_size > 1,
    )
    layers = [cast(DecoderLayer, layer).take_weights for layer in model.layers]
    norm = model.norm.weight if mesh.is_last_stage else None
    head = model.lm_head.take().weight if mesh.is_last_stage and spec.has_lm_head else None
    return CpuStage(shape, layers, norm, head, model.rope_table, model.dtype)


def allocate_kv_cache(
    model: CausalLM, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """Per local layer, keys and values [num_blocks, num_local_kv_heads, block_size, head_dim] (on CPUs padded and laid
    out as `kernels/cpu_decoder/layout.py` has them), zeroed."""
    page = ops.page_shape(block_size, model.spec.head_dim, dtype, device)
    shape = (num_blocks, model.num_local_kv_heads, *page)
    return [(ops.zeros(shape, dtype, device), ops.zeros(shape, dtype, device)) for _ in range(model.num_local_layers)]
