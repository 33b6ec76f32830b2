"""A rank's runner on a cache of its own."""

from collections.abc import Mapping

from manta.configs.model import ModelSpec
from manta.configs.schema import ServeConfig
from manta.kernels import ops
from manta.workers.decode_graphs import CudaRecorder
from manta.workers.grammars import grammars_of
from manta.workers.limits import Limits
from manta.workers.model import HiddenShape
from manta.workers.models.decoder import CausalLM, allocate_kv_cache
from manta.workers.runner import Runner
from manta.workers.stage import Stage


def max_model_len(config: ServeConfig, spec: ModelSpec) -> int:
    """Tokens of one sequence at most."""
    return config.max_model_len or spec.max_position


def assemble(
    config: ServeConfig, model: CausalLM, num_blocks: int, small_files: Mapping[str, bytes] | None = None
) -> Runner:
    """Allocates KV blocks and the tables of steps; on a GPU records decode steps. Every rank calls it. small_files: of
    the model, by name, where this host does not have it."""
    mesh, spec = model.mesh, model.spec
    kv_cache = allocate_kv_cache(model, num_blocks, config.block_size, model.format.kv_dtype, mesh.device)
    limits = Limits(
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len(config, spec),
        vocab_size=spec.vocab_size,
    )
    stage = Stage(model, mesh, kv_cache, limits, HiddenShape(spec.hidden_size, model.dtype))
    on_device = mesh.device.type == "cuda" and ops.has_gpu_kernels()
    can_record = on_device and ops.can_be_recorded() and not config.enforce_eager
    record = CudaRecorder() if can_record and spec.has_lm_head else None
    grammars = grammars_of(config, spec, small_files) if mesh.is_last_stage else None
    return Runner(stage, on_device=on_device, record=record, grammars=grammars)
