"""Where a GPU's memory goes while a rank starts: measured, not estimated, and told in one message if it runs out."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from manta.configs.capacity import CapacityError, KVSize, mib
from manta.configs.schema import ServeConfig

T = TypeVar("T")
_OUT_OF_MEMORY = ("out of memory", "alloc_failed")  # as CUDA, NCCL and cuBLAS say it in errors of no type of their own


@dataclass(frozen=True, slots=True)
class Reading:
    """A GPU's counters, in bytes."""

    total_bytes: int
    free_bytes: int  # by the driver: what no process has taken
    reserved_bytes: int  # taken by torch for this process's tensors and graphs
    peak_reserved_bytes: int  # the most of that since the last `restart`

    @property
    def outside_bytes(self) -> int:
        """Taken, but not through torch: other processes, this one's context, libraries, graphs in the driver."""
        return max(0, self.total_bytes - self.free_bytes - self.reserved_bytes)


class Meter(Protocol):
    """Reads one GPU's counters."""

    def read(self) -> Reading: ...

    def release(self) -> None:
        """Gives back what torch has reserved and nothing uses."""
        ...

    def restart(self) -> None:
        """Releases, and forgets the peak."""
        ...


class CudaMeter:
    """Of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(self) -> Reading:
        torch.cuda.synchronize(self._device)
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        reserved_bytes = torch.cuda.memory_reserved(self._device)
        return Reading(total_bytes, free_bytes, reserved_bytes, torch.cuda.max_memory_reserved(self._device))

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def restart(self) -> None:
        self.release()
        torch.cuda.reset_peak_memory_stats(self._device)


class GpuMemory:
    """The account of one rank's GPU. The owner of these numbers, all in bytes; None is not known yet."""

    def __init__(self, config: ServeConfig, meter: Meter) -> None:
        """Call before anything is loaded. Raises CapacityError if the device has not even room for a CUDA context."""
        self._config = config
        self._meter = meter
        try:
            first = meter.read()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise CapacityError(
                "other processes use all of the GPU's memory: there is no room for a CUDA context. Free the device, or "
                "choose another one with CUDA_VISIBLE_DEVICES"
            ) from error
        self.total_bytes = first.total_bytes
        self.others_bytes = first.outside_bytes
        self.weight_bytes: int | None = None
        self.table_bytes: int | None = None  # of the slots and of steps' inputs, and the memory of decode graphs
        self.activation_bytes: int | None = None  # beside these, at the worst moment
        self.library_bytes: int | None = None  # outside torch: NCCL, cuBLAS, kernels, the driver's part of graphs
        self._sequence: tuple[int, int] | None = None  # tokens of the longest one, and what its KV takes

    @property
    def allowed_bytes(self) -> int:
        """The part of the device that --gpu-memory-utilization allows all of its users together."""
        return int(self.total_bytes * self._config.gpu_memory_utilization)

    @property
    def left_bytes(self) -> int:
        """What is left of that for KV blocks; below 0 where it is exceeded."""
        parts = (self.weight_bytes, self.table_bytes, self.activation_bytes, self.library_bytes)
        return self.allowed_bytes - self.others_bytes - sum(part or 0 for part in parts)

    def weights_are_loaded(self, kv: KVSize, max_model_len: int) -> None:
        """Everything this process holds now are weights; KV blocks will have these sizes."""
        self._meter.restart()
        self.weight_bytes = self._meter.read().reserved_bytes
        self._sequence = max_model_len, kv.bytes_of(max_model_len)

    def try_out(self, build: Callable[[], T], exercise: Callable[[T], None]) -> None:
        """Measures what a runner takes beside weights and KV blocks: builds one, on a cache of next to no blocks, has
        it do its largest steps, and lets go of it. Built a second time, on the real cache, it takes the same again."""
        self._meter.restart()
        before = self._meter.read()
        with self.during("building the tables of steps and recording decode steps"):
            built = build()
        self._meter.release()
        standing = self._meter.read()
        self.table_bytes = standing.reserved_bytes - before.reserved_bytes
        with self.during(f"running a step of {self._config.max_num_batched_tokens} tokens"):
            exercise(built)
            after = self._meter.read()
        self.activation_bytes = after.peak_reserved_bytes - standing.reserved_bytes
        self.library_bytes = max(0, after.outside_bytes - self.others_bytes)
        del built
        self._meter.restart()

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Inside, running out of memory is a CapacityError that says where the memory is."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self.error(f"out of memory while {what}") from error

    def error(self, headline: str) -> CapacityError:
        """The headline, all that is known, and the flags that would help."""
        config = self._config
        parts = [
            f"the GPU has {mib(self.total_bytes)}, of which --gpu-memory-utilization {config.gpu_memory_utilization} "
            f"allows {mib(self.allowed_bytes)}",
            f"other processes and the CUDA context use {mib(self.others_bytes)}",
        ]
        known = {
            "weights": self.weight_bytes,
            f"activations of {config.max_num_batched_tokens} tokens": self.activation_bytes,
            f"tables{'' if config.enforce_eager else ' and graphs'} for {config.max_num_seqs} sequences": (
                self.table_bytes
            ),
            "libraries": self.library_bytes,
        }
        parts += [f"{name} {mib(num_bytes)}" for name, num_bytes in known.items() if num_bytes is not None]
        if self.activation_bytes is not None:
            parts.append(f"KV blocks can have {mib(max(0, self.left_bytes))}")
        if self._sequence is not None:
            parts.append(f"one sequence of {self._sequence[0]} tokens needs {mib(self._sequence[1])} of them")
        return CapacityError(f"{headline}: {', '.join(parts)}. {self._advice()}")

    def _advice(self) -> str:
        eager = "" if self._config.enforce_eager else "use --enforce-eager, "
        return (
            "Free the device of other processes, raise --gpu-memory-utilization (lower it, if others need the device "
            "too), lower --max-num-batched-tokens, --max-num-seqs or --max-model-len, "
            f"{eager}or split the model with --tensor-parallel-size"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory was too small: torch has a type for that, drivers and libraries have words."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)
