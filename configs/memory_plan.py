"""How a deployment fits into its GPUs' memory, before there are any: what each rank holds, and how many sequences."""

from dataclasses import dataclass, replace

from manta.configs.capacity import CapacityError, KVSize, num_gpu_blocks
from manta.configs.memory_estimate import (
    activation_bytes,
    activation_itemsize,
    outside_bytes,
    table_bytes,
    weight_itemsize,
)
from manta.configs.model import ModelSpec
from manta.configs.schema import ServeConfig
from manta.configs.weights import num_local_kv_heads, stage_layers, weight_bytes


@dataclass(frozen=True, slots=True)
class PlannedRank:
    """Where a rank will stand: see configs.weights.Place."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


@dataclass(frozen=True, slots=True)
class RankMemory:
    """One GPU of a stage; no other one of the stage holds more."""

    pp_rank: int
    num_layers: int
    allowed_bytes: int  # by --gpu-memory-utilization
    weight_bytes: int  # as the worker will report them
    table_bytes: int
    activation_bytes: int  # an estimate
    outside_bytes: int  # an assumption: CUDA context, libraries, NCCL, recorded steps
    kv: KVSize
    num_blocks: int | None  # that fit; None if these are too few to serve with

    @property
    def left_bytes(self) -> int:
        """For KV blocks; below 0 where the rest is too much."""
        taken = self.weight_bytes + self.table_bytes + self.activation_bytes + self.outside_bytes
        return self.allowed_bytes - taken


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """One replica, of which there may be several."""

    stages: tuple[RankMemory, ...]
    asked_model_len: int  # --max-model-len, or the model's own
    block_size: int
    max_num_seqs: int
    problem: str | None  # one sentence, if it does not fit

    @property
    def fits(self) -> bool:
        return self.problem is None

    @property
    def num_blocks(self) -> int:
        """Every rank has the same, so the fewest count."""
        return min(stage.num_blocks or 0 for stage in self.stages)

    @property
    def max_model_len(self) -> int:
        """What will be served: without --max-model-len the model's context gives way to the memory."""
        return min(self.asked_model_len, self.num_blocks * self.block_size)

    def num_sequences(self, num_tokens: int) -> int:
        """How many sequences of so many tokens run at once; --max-num-seqs bounds them."""
        return min(self.max_num_seqs, self.num_blocks // -(-num_tokens // self.block_size))


def rank_weight_bytes(config: ServeConfig, spec: ModelSpec, place: PlannedRank) -> int:
    """What a worker on a GPU reports as its weight_bytes."""
    return weight_bytes(spec, place, lambda name: weight_itemsize(config, spec, name))


def kv_size(config: ServeConfig, spec: ModelSpec, place: PlannedRank) -> KVSize:
    """Of a block on a GPU."""
    itemsize = 1 if config.kv_cache_dtype != "auto" else activation_itemsize(config, spec)
    num_layers = len(stage_layers(spec.num_layers, place.pp_rank, place.pp_size))
    page_bytes = num_local_kv_heads(spec, place.tp_size) * config.block_size * spec.head_dim * itemsize
    return KVSize(2 * num_layers, page_bytes, config.block_size)


def plan_memory(config: ServeConfig, spec: ModelSpec, device_bytes: int) -> MemoryPlan:
    """Of a deployment whose sizes divide the model's (`preflight.check_parallel`), on GPUs of so many bytes that
    nobody else uses."""
    asked = config.max_model_len or spec.max_position
    stages: list[RankMemory] = []
    problem = None
    for pp_rank in range(config.pipeline_parallel_size):
        stage = _rank(config, spec, device_bytes, asked, pp_rank)
        stages.append(stage)
        problem = problem or _problem(config, stage, asked)
    return MemoryPlan(tuple(stages), asked, config.block_size, config.max_num_seqs, problem)


def _rank(config: ServeConfig, spec: ModelSpec, device_bytes: int, max_model_len: int, pp_rank: int) -> RankMemory:
    place = PlannedRank(0, config.tensor_parallel_size, pp_rank, config.pipeline_parallel_size)
    kv = kv_size(config, spec, place)
    known = RankMemory(
        pp_rank=pp_rank,
        num_layers=kv.num_tensors // 2,
        allowed_bytes=int(device_bytes * config.gpu_memory_utilization),
        weight_bytes=rank_weight_bytes(config, spec, place),
        table_bytes=table_bytes(config, spec, place, max_model_len),
        activation_bytes=activation_bytes(config, spec, place),
        outside_bytes=outside_bytes(config),
        kv=kv,
        num_blocks=None,
    )
    try:
        num_blocks = num_gpu_blocks(config, kv, known.left_bytes, max_model_len)
    except CapacityError:  # --kv-cache-memory-bytes holds too few
        num_blocks = None
    if num_blocks is not None and num_blocks * kv.block_bytes > known.left_bytes:
        num_blocks = None  # asked for by a flag
    return replace(known, num_blocks=num_blocks)


def _problem(config: ServeConfig, stage: RankMemory, max_model_len: int) -> str | None:
    where = f"a GPU of stage {stage.pp_rank}" if config.pipeline_parallel_size > 1 else "a GPU"
    left, sequence = stage.left_bytes, stage.kv.bytes_of(max_model_len)
    if left <= 0:
        return f"the weights and what steps need exceed what {where} allows by {gib(-left)}"
    if config.num_gpu_blocks_override is not None or config.kv_cache_memory_bytes is not None:
        flag = "--kv-cache-memory-bytes" if config.num_gpu_blocks_override is None else "--num-gpu-blocks-override"
        if stage.num_blocks is None:
            return f"{flag} does not suit {where}, which has {gib(left)} for blocks of {stage.kv.block_bytes} bytes"
        if config.max_model_len is not None and stage.num_blocks < stage.kv.num_blocks(max_model_len):
            return f"{flag} gives {stage.num_blocks * stage.kv.block_size} tokens, fewer than --max-model-len"
        return None
    if stage.num_blocks is None:
        return (
            f"{gib(left)} are left for KV blocks of {where}, and one sequence of {max_model_len} tokens needs "
            f"{gib(sequence)}"
        )
    return None


def gib(num_bytes: int) -> str:
    """For people."""
    return f"{num_bytes / 2**30:.1f} GiB"
