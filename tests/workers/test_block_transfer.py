"""KV blocks that one worker copies from another: sequences go on there as if nothing had happened, and what comes too
late changes nothing."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from manta.protos import worker_pb2 as pb
from manta.protos.sampling_pb2 import Sampling
from manta.workers import block_transfer
from manta.workers.block_bytes import HostBlocks
from manta.workers.columns import Ints
from manta.workers.compute import ComputeThread
from manta.workers.epochs import EpochGuard, RefusedPlanError
from manta.workers.runner import Runner, Step
from manta.workers.server import WorkerServer
from tests.support.checkpoints import make_checkpoint
from tests.support.plans import Driver, seq_add, step_plan, uint32
from tests.support.worker_client import WorkerClient, run_to_the_end, tiny_config

NUM_NEW = 20
DRAWN = Sampling(top_p=0.9, temperature=0.8, seed=5, repetition_penalty=1.3, presence_penalty=0.5)
Pair = tuple[WorkerClient, WorkerClient, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def pair(folder: Path) -> Iterator[Pair]:
    """Two workers with the same model, and the first one's address."""
    with ExitStack() as stack:
        clients, addresses = [], []
        for _ in range(2):
            server = WorkerServer()
            addresses.append(server.start())
            stack.callback(server.stop)
            clients.append(WorkerClient(addresses[-1]))
            stack.callback(clients[-1].close)
            clients[-1].load(tiny_config(folder))
            clients[-1].start()
        yield clients[0], clients[1], addresses[0]


def import_blocks(client: WorkerClient, peer: str, blocks: list[int], targets: list[int], **fields: int) -> int:
    """Returns the number of bytes."""
    request = pb.ImportBlocksRequest(
        epoch=fields.get("epoch", 1),
        peer=peer,
        peer_epoch=fields.get("peer_epoch", 1),
        peer_blocks=uint32(blocks),
        blocks=uint32(targets),
    )
    return int(client.stub.ImportBlocks(request, timeout=60).num_bytes)


@pytest.mark.parametrize("chunk_bytes", [1, 4 << 20], ids=["a block at a time", "at once"])
@pytest.mark.parametrize("sampling", [Sampling(top_p=1.0, repetition_penalty=1.0), DRAWN], ids=["greedy", "drawn"])
def test_a_sequence_goes_on_at_another_worker(
    pair: Pair, sampling: Sampling, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_transfer, "CHUNK_BYTES", chunk_bytes)
    first, second, address = pair
    prompt = np.random.default_rng(3).integers(3, 131, 29).tolist()
    driver, stream = Driver(block_size=8), first.run()
    driver.add(0, prompt, NUM_NEW, sampling=sampling)
    driver.take(stream.step(driver.plan([(0, len(prompt))])))
    for _ in range(6):
        driver.take(stream.step(driver.plan([])))
    tokens = list(driver.sequences[0].tokens)  # all but the last are computed, in blocks 0 to 4
    targets = [11, 3, 9, 4, 20]
    other = second.run()
    busy = Driver(block_size=8)  # somebody else runs there, in blocks from 0 on
    busy.add(1, [5, 6, 7], 6)
    busy.take(other.step(busy.plan([(1, 3)])))
    assert import_blocks(second, address, [0, 1, 2, 3, 4], targets) > 0
    run_to_the_end(driver, stream)

    max_length = len(prompt) + NUM_NEW
    add = seq_add(
        0,
        tokens,
        blocks=targets,
        max_length=max_length,
        num_prompt_tokens=len(prompt),
        num_computed=len(tokens) - 1,
        sampling=sampling,
    )
    plan = step_plan(2, adds=[add], prefill=[(0, 1)], holds=[1])
    while True:
        tokens += np.frombuffer(other.step(plan).tokens, "<i4").tolist()
        if len(tokens) == max_length:
            break
        grow = [(0, 30 + len(tokens) // 8)] if (len(tokens) - 1) % 8 == 0 else []
        plan = step_plan(plan.step + 1, grow=grow, holds=[1])
    assert tokens[len(prompt) :] == driver.output(0)


def test_what_comes_too_late_is_refused(pair: Pair) -> None:
    first, second, address = pair
    stream = first.run()
    stream.step(step_plan(1, epoch=4, adds=[seq_add(0, [3, 4], blocks=[0], max_length=9)], prefill=[(0, 2)]))
    assert import_blocks(second, address, [0], [0], peer_epoch=4, epoch=2) > 0  # before the epoch's first plan
    for fields, message in (
        ({"peer_epoch": 3, "epoch": 2}, "epoch 3 is over"),
        ({"peer_epoch": 5, "epoch": 2}, "epoch 5 is over"),
        ({"peer_epoch": 4, "epoch": 1}, "epoch 1 is over"),
    ):
        with pytest.raises(grpc.RpcError, match=message) as failure:
            import_blocks(second, address, [0], [0], **fields)
        assert failure.value.code() is grpc.StatusCode.ABORTED
    other = second.run()
    other.step(step_plan(1, epoch=3, adds=[seq_add(0, [3, 4], blocks=[0], max_length=9)], prefill=[(0, 2)]))
    with pytest.raises(grpc.RpcError, match="epoch 2 is over"):
        import_blocks(second, address, [0], [0], peer_epoch=4, epoch=2)


def test_nonsense_is_named(pair: Pair, folder: Path) -> None:
    first, second, address = pair
    stream = first.run()
    stream.step(step_plan(1, adds=[seq_add(0, [3, 4], blocks=[0], max_length=9)], prefill=[(0, 2)]))
    for blocks, targets, code, message in (
        ([0], [100], grpc.StatusCode.INVALID_ARGUMENT, "name block 100 of 100"),
        ([0, 1], [5], grpc.StatusCode.INVALID_ARGUMENT, "2 peer_blocks are to come to 1"),
        ([0, 1], [5, 5], grpc.StatusCode.INVALID_ARGUMENT, "each once"),
        ([200], [5], grpc.StatusCode.ABORTED, "name block 200 of 100"),
    ):
        with pytest.raises(grpc.RpcError, match=message) as failure:
            import_blocks(second, address, blocks, targets)
        assert failure.value.code() is code
    with pytest.raises(grpc.RpcError, match="did not give its blocks") as failure:
        import_blocks(second, "127.0.0.1:1", [0], [0])
    assert failure.value.code() is grpc.StatusCode.ABORTED
    export = pb.ExportBlocksRequest(epoch=1, blocks=uint32([0]), layout="another")
    with pytest.raises(grpc.RpcError, match="they are wanted in another"):
        list(first.stub.ExportBlocks(export))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_bytes_are_those_of_the_blocks(dtype: torch.dtype) -> None:
    def cache(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [
            (
                torch.randn(7, 3, 4, 6, generator=generator).to(dtype),
                torch.randn(7, 3, 4, 6, generator=generator).to(dtype),
            )
            for _ in range(2)
        ]

    ours, theirs, before = cache(1), cache(2), cache(2)
    source, target = HostBlocks(ours), HostBlocks(theirs)
    assert source.block_bytes == 4 * 3 * 4 * 6 * dtype.itemsize
    data = source.read(np.array([6, 0, 3]))
    assert len(data) == 3 * source.block_bytes
    target.write(np.array([2, 5, 0]), data)
    for layer in range(2):
        for which in range(2):
            expected = before[layer][which].view(torch.uint8)
            expected[[2, 5, 0]] = ours[layer][which].view(torch.uint8)[[6, 0, 3]]
            assert torch.equal(theirs[layer][which].view(torch.uint8), expected)


def test_blocks_for_a_later_epoch_end_those_for_an_earlier_one() -> None:
    guard = EpochGuard()
    assert guard.admits_blocks(1)
    assert guard.admits_blocks(2)
    assert not guard.admits_blocks(1)
    guard.admit(step_plan(1, epoch=3))
    assert not guard.admits_blocks(2)
    assert guard.admits_blocks(3)
    assert guard.position == (3, 1)


def test_plans_from_before_an_epoch_for_which_blocks_have_come_are_refused() -> None:
    guard = EpochGuard()
    guard.admit(step_plan(1, epoch=1))
    assert guard.admits_blocks(3)
    for epoch in (1, 2):
        with pytest.raises(RefusedPlanError, match="blocks for epoch 3 have come"):
            guard.admit(step_plan(2, epoch=epoch))
    assert guard.admit(step_plan(1, epoch=3))
    assert not guard.admit(step_plan(2, epoch=3))


def test_blocks_for_a_new_epoch_wait_for_the_step_under_way(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the epoch before, whose stream is gone already, may write to the same blocks."""
    first, second, address = pair
    stream = first.run()
    stream.step(step_plan(1, adds=[seq_add(0, [3, 4], blocks=[0], max_length=9)], prefill=[(0, 2)]))
    has_begun, may_end, has_ended, written_late = (threading.Event() for _ in range(4))
    run, write, call = Runner.run, HostBlocks.write, ComputeThread.call

    def slow(runner: Runner, plan: pb.StepPlan) -> Step:
        has_begun.set()
        assert may_end.wait(30)
        step = run(runner, plan)
        has_ended.set()
        return step

    def note(blocks: HostBlocks, numbers: Ints, data: bytes) -> None:
        if has_ended.is_set():
            written_late.set()
        write(blocks, numbers, data)

    def wait(thread: ComputeThread, job: Callable[[], Any], timeout_s: float | None = None) -> Any:
        may_end.set()  # somebody waits for the step
        return call(thread, job, timeout_s)

    other = second.run()
    monkeypatch.setattr(ComputeThread, "call", wait)
    monkeypatch.setattr(Runner, "run", slow)
    monkeypatch.setattr(HostBlocks, "write", note)
    other.send(step_plan(1, epoch=1, adds=[seq_add(0, [3, 4], blocks=[0], max_length=9)], prefill=[(0, 2)]))
    assert has_begun.wait(30)
    assert import_blocks(second, address, [0], [0], epoch=2) > 0
    may_end.set()
    assert written_late.is_set()
