"""How many KV blocks a rank can hold."""

from dataclasses import dataclass

import torch

from manta.configs.schema import ServeConfig

CPU_SHARE = 0.25  # of the free memory, for all ranks of the host together
CPU_MAX_BYTES = 4 * 2**30
SPARE_BLOCKS = 16  # beyond what all sequences at full length need
MIN_SEQUENCE_TOKENS = 256  # a pool that cannot hold one such sequence serves nobody


class CapacityError(RuntimeError):
    """The memory does not hold a useful number of KV blocks; the message has the numbers and the flags to change."""


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """A GPU after a profiling run, in bytes."""

    total_bytes: int
    peak_bytes: int  # of this process's tensors during the run: weights and activations
    other_bytes: int  # everything else on the device: contexts, libraries, other processes

    @staticmethod
    def measured(device: torch.device) -> "GpuMemory":
        """Reads the counters; the run must have followed a reset of the peak."""
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        other_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved(device)
        return GpuMemory(total_bytes, torch.cuda.max_memory_allocated(device), max(0, other_bytes))


def num_gpu_blocks(config: ServeConfig, memory: GpuMemory, bytes_per_block: int, max_model_len: int) -> int:
    """Blocks that fit beside weights and activations. Raises CapacityError."""
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if config.kv_cache_memory_bytes is not None:
        return _blocks_of(config, int(config.kv_cache_memory_bytes), bytes_per_block, max_model_len)
    budget_bytes = int(memory.total_bytes * config.gpu_memory_utilization)
    left_bytes = budget_bytes - memory.peak_bytes - memory.other_bytes
    num_blocks = left_bytes // bytes_per_block
    if num_blocks < min_blocks(config, max_model_len):
        raise CapacityError(
            f"no room for KV blocks: --gpu-memory-utilization {config.gpu_memory_utilization} allows "
            f"{_mib(budget_bytes)} of {_mib(memory.total_bytes)}, weights and activations of "
            f"{config.max_num_batched_tokens} tokens take {_mib(memory.peak_bytes)}, other use of the device "
            f"{_mib(memory.other_bytes)}; {min_blocks(config, max_model_len)} blocks of {_mib(bytes_per_block)} are "
            f"the least. Raise --gpu-memory-utilization, lower --max-num-batched-tokens or --max-num-seqs, or split "
            f"the model with --tensor-parallel-size"
        )
    return num_blocks


def num_cpu_blocks(
    config: ServeConfig, available_bytes: int, num_workers_on_host: int, bytes_per_block: int, max_model_len: int
) -> int:
    """Blocks this rank takes of the host's memory. Raises CapacityError."""
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if config.kv_cache_memory_bytes is not None:
        return _blocks_of(config, int(config.kv_cache_memory_bytes), bytes_per_block, max_model_len)
    share_bytes = min(int(available_bytes * CPU_SHARE) // num_workers_on_host, CPU_MAX_BYTES)
    num_blocks = _blocks_of(config, share_bytes, bytes_per_block, max_model_len)
    useful = config.max_num_seqs * -(-max_model_len // config.block_size) + SPARE_BLOCKS
    return min(num_blocks, useful)


def min_blocks(config: ServeConfig, max_model_len: int) -> int:
    """The fewest blocks worth serving with."""
    return max(2, -(-min(max_model_len, MIN_SEQUENCE_TOKENS) // config.block_size))


def _blocks_of(config: ServeConfig, memory_bytes: int, bytes_per_block: int, max_model_len: int) -> int:
    num_blocks = memory_bytes // bytes_per_block
    if num_blocks < min_blocks(config, max_model_len):
        raise CapacityError(
            f"{_mib(memory_bytes)} of KV cache hold {num_blocks} blocks of {config.block_size} tokens "
            f"({_mib(bytes_per_block)} each), but {min_blocks(config, max_model_len)} are the least. "
            f"Raise --kv-cache-memory-bytes to {min_blocks(config, max_model_len) * bytes_per_block} or more, "
            f"or free memory on the host"
        )
    return num_blocks


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
