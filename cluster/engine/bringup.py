"""Brings the workers up: Describe, Load on all ranks at once, agree on the number of KV blocks, Start."""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import grpc.aio

from manta.cluster.engine.workers import WorkerError, WorkerGroup
from manta.configs.model import ModelSpec
from manta.configs.schema import ServeConfig
from manta.protos import worker_pb2 as pb
from manta.scheduler.types import Capacity

logger = logging.getLogger(__name__)

_DESCRIBE_TIMEOUT_S = 60.0  # a worker imports torch before it serves
_CALL_EVERY_S = 30.0  # a worker that waits for slower ones ends when nobody calls it (workers/lease.py)
_Response = TypeVar("_Response")


class BringUpError(Exception):
    """The deployment cannot start; the message is one sentence that names what to change."""


@dataclass(slots=True)
class Deployment:
    """Workers that hold the model and wait for their first plan."""

    groups: list[WorkerGroup]  # one per replica; one without workers for a replica that there may be
    capacities: list[Capacity]  # beside groups
    device: str
    weight_bytes: int  # of the largest rank
    bytes_per_block: int  # of the largest rank
    startup_s: dict[str, float] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)  # replicas that did not come up, and why

    @property
    def max_model_len(self) -> int:
        return self.capacities[0].max_model_len

    def leave_room(self, config: ServeConfig) -> None:
        """For replicas that may come."""
        num_missing = config.max_num_replicas - len(self.groups)
        self.groups += [WorkerGroup([], self.groups[0].output_rank) for _ in range(num_missing)]
        self.capacities += [min(self.capacities, key=lambda each: each.num_blocks)] * num_missing

    async def close(self) -> None:
        for group in self.groups:
            await group.close()


async def bring_up(config: ServeConfig, spec: ModelSpec, addresses: list[list[str]]) -> Deployment:
    """addresses: per replica, in rank order (rank = pp_rank * tp_size + tp_rank); empty for one that comes later.

    Raises WorkerError as soon as one rank fails, BringUpError when the model's context does not fit.
    """
    check_context(config, spec)
    addresses = [replica for replica in addresses if replica]
    if any(len(replica) != config.num_ranks for replica in addresses):
        raise BringUpError(f"each replica needs {config.num_ranks} workers, got {[len(group) for group in addresses]}")
    output_rank = (config.pipeline_parallel_size - 1) * config.tensor_parallel_size
    groups = [WorkerGroup(replica, output_rank) for replica in addresses]
    try:
        async with waited_for(groups):
            deployment = await _bring_up_groups(config, spec, groups)
        deployment.leave_room(config)
        return deployment
    except BaseException:
        for group in groups:
            await group.close()
        raise


async def _bring_up_groups(config: ServeConfig, spec: ModelSpec, groups: list[WorkerGroup]) -> Deployment:
    timer = _PhaseTimer()
    described = await _on_all(groups, describe_ranks)
    timer.end("describe")
    ranks_on_host = count_ranks(config, [group.addresses for group in groups])
    loaded = await _on_all(
        groups, lambda group: load_ranks(config, group, described[groups.index(group)], ranks_on_host)
    )
    timer.end("load")
    responses = [response for group in loaded for response in group]
    timer.phases["weights"] = max(response.load_s for response in responses)
    timer.phases["profile"] = max(response.profile_s for response in responses)

    num_blocks = [agree_on_blocks(config, [response.num_blocks for response in group]) for group in loaded]
    max_model_len = fit_context(config, spec, min(num_blocks))
    await _on_all(groups, lambda group: start_ranks(config, group, num_blocks[groups.index(group)]))
    timer.end("start")
    return Deployment(
        groups=groups,
        capacities=[capacity_of(config, blocks, max_model_len) for blocks in num_blocks],
        device=described[0][0].device,
        weight_bytes=max(response.weight_bytes for response in responses),
        bytes_per_block=max(response.bytes_per_block for response in responses),
        startup_s=timer.phases,
    )


def count_ranks(config: ServeConfig, addresses: Sequence[Sequence[str]]) -> Counter[str]:
    """By host, as addresses name it: the workers that share its cores and memory. On a lone host they are as many as
    there may ever be."""
    counts = Counter(address.rpartition(":")[0] for replica in addresses for address in replica)
    if config.distributed_executor_backend == "local":
        counts = Counter(dict.fromkeys(counts, config.max_num_replicas * config.num_ranks))
    return counts


def check_context(config: ServeConfig, spec: ModelSpec) -> None:
    """Raises BringUpError before anything is loaded when max_model_len cannot be served."""
    if config.max_model_len is not None and config.max_model_len > spec.max_position:
        raise BringUpError(
            f"max_model_len={config.max_model_len} is more than the {spec.max_position} positions of the model; "
            f"lower --max-model-len"
        )


def agree_on_blocks(config: ServeConfig, num_blocks_by_rank: list[int]) -> int:
    """Every rank has the same blocks, so the smallest one decides; num_gpu_blocks_override decides over all."""
    fits = min(num_blocks_by_rank)
    if config.num_gpu_blocks_override is None:
        return fits
    logger.info("num_gpu_blocks_override: %d KV blocks where %d fit", config.num_gpu_blocks_override, fits)
    return config.num_gpu_blocks_override


def fit_context(config: ServeConfig, spec: ModelSpec, num_blocks: int) -> int:
    """The context length to serve: the longest sequence must fit the pool. Raises BringUpError if it was asked for."""
    pool_tokens = num_blocks * config.block_size
    if config.max_model_len is None:
        if pool_tokens < spec.max_position:
            logger.warning(
                "max_model_len lowered to %d, what %d KV blocks of %d tokens hold; the model itself goes to %d",
                pool_tokens, num_blocks, config.block_size, spec.max_position,
            )  # fmt: skip
        max_model_len = min(spec.max_position, pool_tokens)
    elif config.max_model_len > pool_tokens:
        raise BringUpError(
            f"max_model_len={config.max_model_len} does not fit the {pool_tokens} tokens of KV blocks; lower "
            f"--max-model-len to {pool_tokens}, or raise --gpu-memory-utilization or --kv-cache-memory-bytes"
        )
    else:
        max_model_len = config.max_model_len
    if max_model_len < 2:
        raise BringUpError(
            f"{num_blocks} KV blocks of {config.block_size} tokens are too few to serve; raise "
            f"--gpu-memory-utilization or --kv-cache-memory-bytes"
        )
    return max_model_len


def capacity_of(config: ServeConfig, num_blocks: int, max_model_len: int) -> Capacity:
    return Capacity(
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        num_lanes=config.pipeline_parallel_size,
    )


@asynccontextmanager
async def waited_for(groups: Sequence[WorkerGroup]) -> AsyncIterator[None]:
    """Lets workers know meanwhile that somebody needs them: the last one may load minutes longer than the first."""

    async def call() -> None:
        while True:
            await asyncio.sleep(_CALL_EVERY_S)
            calls = [group.check(_CALL_EVERY_S) for group in groups]
            await asyncio.gather(*calls, return_exceptions=True)  # who is gone fails where it is needed

    task = asyncio.create_task(call())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def describe_ranks(group: WorkerGroup, *, are_up: bool = False) -> list[pb.DescribeResponse]:
    """Rank 0 opens the rendezvous that the others join in Load. are_up: one that cannot be reached now is lost."""

    async def describe(rank: int) -> pb.DescribeResponse:
        request = pb.DescribeRequest(open_rendezvous=rank == 0)
        stub = group.stubs[rank]
        response: pb.DescribeResponse = await stub.Describe(
            request, timeout=_DESCRIBE_TIMEOUT_S, wait_for_ready=not are_up
        )
        return response

    described = await _on_ranks(group, describe)
    group.note_links(described)
    return described


async def load_ranks(
    config: ServeConfig,
    group: WorkerGroup,
    described: list[pb.DescribeResponse],
    ranks_on_host: Counter[str],
    others: Sequence[Sequence[str]] = (),
) -> list[pb.LoadResponse]:
    """Each rank its part of the weights, all at once; those that have it keep it. Where there are several ranks, they
    meet anew. others: addresses by replica and rank of workers that may have loaded already, to be asked where a host
    lacks the model's files. Raises WorkerError."""
    meeting = secrets.token_hex(8) if len(group.addresses) > 1 else ""
    config_json = config.model_dump_json()

    async def load(rank: int) -> pb.LoadResponse:
        pp_rank, tp_rank = divmod(rank, config.tensor_parallel_size)
        request = pb.LoadRequest(
            config_json=config_json,
            tp_rank=tp_rank,
            pp_rank=pp_rank,
            num_workers_on_host=ranks_on_host[group.addresses[rank].rpartition(":")[0]],
            rendezvous_host=described[0].host,
            rendezvous_port=described[0].rendezvous_port,
            meeting=meeting,
            peers=[replica[rank] for replica in others if replica],  # each rank another one
        )
        response: pb.LoadResponse = await group.stubs[rank].Load(request)
        return response

    return await _on_ranks(group, load)


async def start_ranks(config: ServeConfig, group: WorkerGroup, num_blocks: int) -> list[pb.StartResponse]:
    """Raises WorkerError, too, when the ranks cannot go on together."""
    request = pb.StartRequest(num_blocks=num_blocks)
    started = await _on_ranks(group, lambda rank: group.stubs[rank].Start(request))
    positions = [(response.last_epoch, response.last_step) for response in started]
    if len(positions) > 1 and any(epoch for epoch, _ in positions):  # they have not met anew
        raise WorkerError(0, group.addresses[0], "its replica has ranks in the midst of another scheduler's steps")
    return started


async def _on_ranks(group: WorkerGroup, call: Callable[[int], Awaitable[_Response]]) -> list[_Response]:
    """Calls every rank at once; the first failure is raised as WorkerError without waiting for the others."""

    async def call_rank(rank: int) -> _Response:
        try:
            return await call(rank)
        except grpc.aio.AioRpcError as error:
            raise group.error(rank, error) from None

    return await _first_failure_wins([call_rank(rank) for rank in range(len(group.addresses))])


async def _on_all(
    groups: list[WorkerGroup], call: Callable[[WorkerGroup], Awaitable[list[_Response]]]
) -> list[list[_Response]]:
    return await _first_failure_wins([call(group) for group in groups])


async def _first_failure_wins(calls: list[Awaitable[_Response]]) -> list[_Response]:
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _PhaseTimer:
    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def end(self, phase: str) -> None:
        now_s = time.perf_counter()
        self.phases[phase] = now_s - self._last_s
        self._last_s = now_s
