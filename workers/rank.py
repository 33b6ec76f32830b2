"""What one rank loads, and what it becomes once it knows its number of KV blocks."""

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from manta.configs.capacity import KVSize, num_cpu_blocks, num_gpu_blocks
from manta.configs.model import ModelSpec, read_model_spec
from manta.configs.schema import ServeConfig
from manta.configs.weights import weight_bytes
from manta.kernels import ops
from manta.workers.assembly import assemble, max_model_len
from manta.workers.checkpoint_files import Files
from manta.workers.gpu_memory import CudaMeter, GpuMemory
from manta.workers.host_cores import num_cores
from manta.workers.host_memory import available_memory_bytes
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh, connect_mesh
from manta.workers.model_source import open_model
from manta.workers.models.decoder import CausalLM, allocate_kv_cache
from manta.workers.options import set_up
from manta.workers.runner import Runner
from manta.workers.warmup import run_largest_steps, run_small_steps

logger = logging.getLogger(__name__)

# Bounds every wait of a rank for another one. The longest is for weights from a slow disk.
COLLECTIVE_TIMEOUT_S = 1800.0
JOIN_TIMEOUT_S = 120.0  # of a rank that has its weights for others, which have been started by then


class PlacementError(ValueError):
    """The load request contradicts the configuration; the message names the field."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a rank stands and whom it joins. Rank 0 has the store, the others its address."""

    tp_rank: int
    pp_rank: int
    num_workers_on_host: int
    rendezvous_host: str
    rendezvous_port: int
    store: Any  # what mesh.open_store opened; None on the other ranks
    meeting: str = ""  # a name for this coming together of the ranks


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """A rank with its weights, which knows how many KV blocks it can hold."""

    config: ServeConfig
    spec: ModelSpec
    mesh: Mesh
    model: CausalLM
    dtype: torch.dtype
    num_blocks: int
    weight_bytes: int
    bytes_per_block: int
    load_s: float
    profile_s: float
    gpu_memory: GpuMemory | None  # of a rank on a GPU
    folder: Path | None = None  # of the model's files, if this host has them
    small_files: Mapping[str, bytes] | None = None  # else all but the weights, by name

    def start(self, num_blocks: int) -> Runner:
        """Allocates the KV blocks and runs the model once in each shape of step. Every rank calls it. Raises
        CapacityError."""
        ops.warm_up(self.dtype, self.model.format.kv_dtype, self.mesh.device)
        with _during(self.gpu_memory, f"allocating {num_blocks} KV blocks and getting ready for steps on them"):
            runner = assemble(self.config, self.model, num_blocks, self.small_files)
            length = max_model_len(self.config, self.spec)
            run_small_steps(runner, self.config, length, generates=self.spec.has_lm_head)
        gc.collect()
        gc.freeze()  # what lives now lives for good: the collector need not look at it during steps
        return runner


def load_rank(config: ServeConfig, placement: Placement, peers: Sequence[str] = ()) -> LoadedRank:
    """Joins the replica's ranks, loads this rank's weights, finds out how many KV blocks fit. peers: workers to ask for
    the model's files if this host lacks them.

    Raises PlacementError, ModelError, WeightError, MeshError, CapacityError.
    """
    _check(config, placement)
    with open_model(config.model, peers) as files:
        return _load(config, placement, files)


def _load(config: ServeConfig, placement: Placement, files: Files) -> LoadedRank:
    started_s = time.perf_counter()
    torch.set_num_threads(max(1, num_cores() // placement.num_workers_on_host))
    device = pick_device(config.device)
    spec = read_model_spec(files.folder)
    dtype: torch.dtype = getattr(torch, spec.dtype if config.dtype == "auto" else config.dtype)
    memory = GpuMemory(config, CudaMeter(device)) if device.type == "cuda" else None
    with _during(memory, "connecting to the other ranks"):
        mesh = _connect(config, placement, device)
    with _during(memory, "loading the weights"):
        format = set_up(config, spec, dtype, device)
        model = load_model(files, spec, mesh, dtype, load_format=config.load_format, seed=config.seed, format=format)
    loaded_s = time.perf_counter()
    kv = KVSize.of(allocate_kv_cache(model, 1, config.block_size, format.kv_dtype, device), config.block_size)
    if memory is None:
        length, free_bytes = max_model_len(config, spec), available_memory_bytes()
        num_blocks = num_cpu_blocks(config, free_bytes, placement.num_workers_on_host, kv.block_bytes, length)
    else:
        num_blocks = gpu_blocks(config, model, kv, memory)
    rank = LoadedRank(
        config=config,
        spec=spec,
        mesh=mesh,
        model=model,
        dtype=dtype,
        num_blocks=num_blocks,
        weight_bytes=weight_bytes(spec, mesh, lambda name: format.itemsize_of(spec, name)),
        bytes_per_block=kv.block_bytes,
        load_s=loaded_s - started_s,
        profile_s=time.perf_counter() - loaded_s,
        gpu_memory=memory,
        folder=files.folder if files.is_local else None,
        small_files=None if files.is_local else {path.name: path.read_bytes() for path in files.folder.iterdir()},
    )
    logger.info("%d KV blocks fit beside %.1f MiB of weights", num_blocks, rank.weight_bytes / 2**20)
    return rank


def let_go(loaded: LoadedRank) -> None:
    """Frees all that belonged to the runner, to which nobody refers any more, and waits for the device."""
    gc.unfreeze()  # see `start`
    gc.collect()
    wait_for_device(loaded)
    if loaded.gpu_memory is not None:
        torch.cuda.empty_cache()


def wait_for_device(loaded: LoadedRank) -> None:
    """Returns when all that was launched is done."""
    if loaded.gpu_memory is not None:
        torch.cuda.synchronize(loaded.mesh.device)


def join_again(loaded: LoadedRank, placement: Placement) -> LoadedRank:
    """The rank with the weights it has, among ranks that may be others than before. On a GPU it finds out again how
    many KV blocks fit, as new ranks do: they need each other for that. Raises MeshError, CapacityError."""
    started_s = time.perf_counter()
    config, memory = loaded.config, loaded.gpu_memory
    with _during(memory, "connecting to the other ranks"):
        loaded.mesh.take_over(_connect(config, placement, loaded.mesh.device, JOIN_TIMEOUT_S))
    joined_s = time.perf_counter()
    num_blocks = loaded.num_blocks
    if memory is not None:
        dtype = loaded.model.format.kv_dtype
        cache = allocate_kv_cache(loaded.model, 1, config.block_size, dtype, loaded.mesh.device)
        kv = KVSize.of(cache, config.block_size)
        del cache
        num_blocks = gpu_blocks(config, loaded.model, kv, memory)
    profile_s = time.perf_counter() - joined_s
    return replace(loaded, num_blocks=num_blocks, load_s=joined_s - started_s, profile_s=profile_s)


def pick_device(choice: str) -> torch.device:
    """The device of --device. A worker sees only the one GPU it is given. Raises PlacementError."""
    has_cuda = torch.cuda.is_available()
    if choice == "cuda" and not has_cuda:
        raise PlacementError("--device cuda was asked for, but this worker sees no CUDA device")
    return torch.device("cuda", 0) if has_cuda and choice != "cpu" else torch.device("cpu")


def device_name() -> str:
    """The device that "auto" takes, for people."""
    device = pick_device("auto")
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"


def _check(config: ServeConfig, placement: Placement) -> None:
    if placement.tp_rank >= config.tensor_parallel_size:
        raise PlacementError(f"tp_rank {placement.tp_rank} of tensor_parallel_size {config.tensor_parallel_size}")
    if placement.pp_rank >= config.pipeline_parallel_size:
        raise PlacementError(f"pp_rank {placement.pp_rank} of pipeline_parallel_size {config.pipeline_parallel_size}")
    if placement.num_workers_on_host < 1:
        raise PlacementError("num_workers_on_host must count this worker, so it is at least 1")
    if config.num_ranks > 1 and placement.store is None and not placement.rendezvous_port:
        raise PlacementError("this rank has neither opened a rendezvous nor been told rendezvous_port")


def _connect(
    config: ServeConfig, placement: Placement, device: torch.device, join_timeout_s: float | None = None
) -> Mesh:
    return connect_mesh(
        tp_rank=placement.tp_rank,
        tp_size=config.tensor_parallel_size,
        pp_rank=placement.pp_rank,
        pp_size=config.pipeline_parallel_size,
        device=device,
        timeout_s=COLLECTIVE_TIMEOUT_S,
        store=placement.store,
        host=placement.rendezvous_host,
        port=placement.rendezvous_port,
        meeting=placement.meeting,
        join_timeout_s=join_timeout_s,
    )


def _during(memory: GpuMemory | None, what: str) -> AbstractContextManager[None]:
    return nullcontext() if memory is None else memory.during(what)


def gpu_blocks(config: ServeConfig, model: CausalLM, kv: KVSize, memory: GpuMemory) -> int:
    """KV blocks that fit into a GPU beside all the rest. Raises CapacityError."""
    length = max_model_len(config, model.spec)
    memory.weights_are_loaded(kv, length)
    memory.try_out(
        build=lambda: assemble(config, model, num_blocks=1),
        exercise=lambda runner: run_largest_steps(runner, config, length, generates=model.spec.has_lm_head),
    )
    num_blocks = num_gpu_blocks(config, kv, memory.left_bytes, length)
    if num_blocks is None:
        raise memory.error("no room for KV blocks")
    if num_blocks < kv.num_blocks(length):
        logger.warning("KV blocks for %d tokens fit, fewer than max_model_len %d", num_blocks * kv.block_size, length)
    return num_blocks
