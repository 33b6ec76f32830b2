"""Brings replicas up again: one with new workers, or all with those that a new scheduler finds."""

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Sequence

from manta.cluster.engine.bringup import (
    BringUpError,
    Deployment,
    agree_on_blocks,
    capacity_of,
    count_ranks,
    describe_ranks,
    fit_context,
    load_ranks,
    start_ranks,
    waited_for,
)
from manta.cluster.engine.workers import WorkerError, WorkerGroup
from manta.configs.model import ModelSpec
from manta.configs.schema import ServeConfig
from manta.protos import worker_pb2 as pb

logger = logging.getLogger(__name__)

_FEWER_BLOCKS = 0.9  # memory that is free varies a little from one start to the next
_OTHERS_TIMEOUT_S = 30.0  # for replicas that have to load the model, when there is one that serves
_MEET_TIMEOUT_S = 120.0  # of ranks that have their weights; on GPUs they record their steps anew
_START_TIMEOUT_S = 20.0  # of a worker that has nothing to load, but may be in the midst of a step


async def replace_workers(config: ServeConfig, deployment: Deployment, replica: int, addresses: Sequence[str]) -> None:
    """Loads the model on new workers of a replica, with as many KV blocks as it had.

    Raises WorkerError as soon as one rank fails, BringUpError when the blocks do not fit.
    """
    group = WorkerGroup(list(addresses), deployment.groups[replica].output_rank)
    try:
        described = await describe_ranks(group, are_up=True)
        others = [other.addresses for index, other in enumerate(deployment.groups) if index != replica]
        hosts = count_ranks(config, [*others, group.addresses])
        async with waited_for([group]):
            loaded = await load_ranks(config, group, described, hosts, others)
        needed = deployment.capacities[replica].num_blocks
        offered = agree_on_blocks(config, [response.num_blocks for response in loaded])
        if offered < _FEWER_BLOCKS * needed:
            raise BringUpError(
                f"{offered} KV blocks fit on the new workers of replica {replica}, which had {needed}; free memory "
                f"there, or set --num-gpu-blocks-override"
            )
        await start_ranks(config, group, needed)
    except BaseException:
        await group.close()
        raise
    old, deployment.groups[replica] = deployment.groups[replica], group
    await old.close()


async def meet_again(config: ServeConfig, deployment: Deployment, replica: int) -> None:
    """The ranks of a replica, all of which are there but not in step with each other, begin anew with the weights they
    have. Raises WorkerError."""
    group = deployment.groups[replica]
    try:
        async with asyncio.timeout(_MEET_TIMEOUT_S):
            described = await describe_ranks(group, are_up=True)
            hosts = count_ranks(config, [each.addresses for each in deployment.groups])
            await load_ranks(config, group, described, hosts)
            await start_ranks(config, group, deployment.capacities[replica].num_blocks)
    except TimeoutError:
        reason = f"its ranks did not find each other within {_MEET_TIMEOUT_S:.0f} s"
        raise WorkerError(0, group.addresses[0], reason) from None


async def find_workers(config: ServeConfig, spec: ModelSpec, addresses: list[list[str]]) -> Deployment:
    """What a scheduler has that takes another one's place: workers that hold the model already, or are new. A replica
    that cannot go on is in `lost`.

    Raises WorkerError or BringUpError when none can.
    """
    output_rank = (config.pipeline_parallel_size - 1) * config.tensor_parallel_size
    groups = [WorkerGroup(replica, output_rank) for replica in addresses]
    described = await asyncio.gather(*(describe_ranks(group, are_up=True) for group in groups), return_exceptions=True)
    hosts = count_ranks(config, addresses)
    reviving = [_find(config, groups, i, ranks, hosts) for i, ranks in enumerate(described)]
    async with waited_for(groups):
        found = await _outcomes(reviving, groups)
    lost, loaded = {}, {}
    for replica, outcome in enumerate(found):
        if not addresses[replica]:
            continue
        if isinstance(outcome, WorkerError | BringUpError):
            lost[replica] = str(outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            loaded[replica] = outcome
    if not loaded:
        for group in groups:
            await group.close()
        raise next(error for error in found if isinstance(error, WorkerError | BringUpError))
    blocks = {
        replica: agree_on_blocks(config, [rank.num_blocks for rank in ranks]) for replica, ranks in loaded.items()
    }
    max_model_len = fit_context(config, spec, min(blocks.values()))
    responses = [rank for ranks in loaded.values() for rank in ranks]
    first = next(ranks for ranks in described if ranks and not isinstance(ranks, BaseException))
    return Deployment(
        groups=groups,
        capacities=[
            capacity_of(config, blocks.get(i, min(blocks.values())), max_model_len) for i in range(len(groups))
        ],
        device=first[0].device,
        weight_bytes=max(rank.weight_bytes for rank in responses),
        bytes_per_block=max(rank.bytes_per_block for rank in responses),
        lost=lost,
    )


async def _outcomes(
    reviving: Sequence[Coroutine[None, None, list[pb.LoadResponse]]], groups: Sequence[WorkerGroup]
) -> list[list[pb.LoadResponse] | BaseException]:
    """What came of each. Requests wait: once one can serve, those that load the model get a limited time."""
    tasks = [asyncio.create_task(each) for each in reviving]
    left, timeout_s = set(tasks), None
    try:
        while left:
            done, left = await asyncio.wait(left, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            if any(task.exception() is None and task.result() for task in done):
                timeout_s = _OTHERS_TIMEOUT_S
    finally:
        for task in tasks:
            task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    return [
        WorkerError(0, group.addresses[0], "still loads the model") if task in left else outcome
        for task, group, outcome in zip(tasks, groups, outcomes, strict=True)
    ]


async def _find(
    config: ServeConfig,
    groups: Sequence[WorkerGroup],
    replica: int,
    described: "list[pb.DescribeResponse] | BaseException",
    hosts: "Counter[str]",
) -> list[pb.LoadResponse]:
    if isinstance(described, BaseException):
        raise described
    if not described:
        return []
    group = groups[replica]
    others = [other.addresses for other in groups if other is not group]
    loaded = await load_ranks(config, group, described, hosts, others)
    num_blocks = agree_on_blocks(config, [rank.num_blocks for rank in loaded])
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            await start_ranks(config, group, num_blocks)
    except TimeoutError:
        reason = f"did not start again within {_START_TIMEOUT_S:.0f} s"
        raise WorkerError(0, group.addresses[0], reason) from None
    return loaded
