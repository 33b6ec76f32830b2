"""How many KV blocks a rank can hold."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self

from manta.configs.schema import ServeConfig

CPU_SHARE = 0.25  # of the free memory, for all ranks of the host together
CPU_MAX_BYTES = 4 * 2**30
GPU_GRAIN_BYTES = 2 * 2**20  # torch rounds large allocations up to these
SPARE_BLOCKS = 16  # beyond what all sequences at full length need
MIN_SEQUENCE_TOKENS = 256  # a pool that cannot hold one such sequence serves nobody


class CapacityError(RuntimeError):
    """The memory does not hold a useful number of KV blocks; the message has the numbers and the flags to change."""


class Pages(Protocol):
    """A tensor of KV blocks."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class KVSize:
    """What one block takes: keys and values of every layer have a tensor of their own."""

    num_tensors: int
    tensor_bytes: int  # of one block in one tensor
    block_size: int  # tokens

    @classmethod
    def of(cls, one_block: Iterable[tuple[Pages, Pages]], block_size: int) -> Self:
        """From a cache of a single block: per layer, keys and values."""
        tensors = [pages for layer in one_block for pages in layer]
        return cls(len(tensors), tensors[0].nbytes, block_size)

    @property
    def block_bytes(self) -> int:
        return self.num_tensors * self.tensor_bytes

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks of a sequence of so many tokens."""
        return -(-num_tokens // self.block_size)

    def bytes_of(self, num_tokens: int) -> int:
        """What a sequence of so many tokens takes."""
        return self.num_blocks(num_tokens) * self.block_bytes


def num_gpu_blocks(config: ServeConfig, kv: KVSize, left_bytes: int, max_model_len: int) -> int | None:
    """Blocks that fit into what is left of a GPU; None if these are too few to serve with. Raises CapacityError if the
    configuration gives the bytes, and they are too few.

    Where --max-model-len is given, one sequence of that length must fit; the model's own limit is only hoped for.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if config.kv_cache_memory_bytes is not None:
        return _blocks_of(config, int(config.kv_cache_memory_bytes), kv.block_bytes, max_model_len)
    # Every tensor is an allocation of its own, rounded up.
    per_tensor_bytes = max(0, left_bytes) // kv.num_tensors // GPU_GRAIN_BYTES * GPU_GRAIN_BYTES
    num_blocks = per_tensor_bytes // kv.tensor_bytes
    least = min_blocks(config, max_model_len)
    if config.max_model_len is not None:
        least = max(least, kv.num_blocks(max_model_len))
    return num_blocks if num_blocks >= least else None


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
            f"{mib(memory_bytes)} of KV cache hold {num_blocks} blocks of {config.block_size} tokens "
            f"({mib(bytes_per_block)} each), but {min_blocks(config, max_model_len)} are the least. "
            f"Raise --kv-cache-memory-bytes to {min_blocks(config, max_model_len) * bytes_per_block} or more, "
            f"or free memory on the host"
        )
    return num_blocks


def mib(num_bytes: int) -> str:
    """For people."""
    return f"{num_bytes / 2**20:,.1f} MiB"
