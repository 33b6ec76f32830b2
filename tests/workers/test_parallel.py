"""Replicas of several real processes, over gloo and gRPC: the tokens are those of one process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from manta.protos.sampling_pb2 import Sampling
from manta.protos.worker_pb2 import StepPlan
from manta.workers.server import WorkerServer
from tests.support.checkpoints import make_checkpoint
from tests.support.plans import GREEDY, Driver, step_plan
from tests.support.worker_client import (
    RunStream,
    WorkerClient,
    WorkerProcesses,
    load_and_start,
    replica,
    run_to_the_end,
    tiny_config,
)

NUM_NEW = 8
SAMPLED = Sampling(temperature=1.0, top_p=0.9, top_k=40, repetition_penalty=1.3, presence_penalty=0.3, seed=11)
PROMPT_LENGTHS = (1, 9, 20, 13)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3")


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(3, 131, length).tolist() for length in PROMPT_LENGTHS]


def samplings() -> list[Sampling]:
    return [GREEDY, SAMPLED, GREEDY, SAMPLED]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """What one process gives; its greedy tokens are transformers'."""
    server = WorkerServer()
    client = WorkerClient(server.start())
    client.load(tiny_config(checkpoint))
    client.start()
    driver, stream = Driver(block_size=8), client.run()
    for slot, (prompt, sampling) in enumerate(zip(prompts(), samplings(), strict=True)):
        driver.add(slot, prompt, NUM_NEW, sampling=sampling)
        driver.take(stream.step(driver.plan([(slot, len(prompt))])))
    run_to_the_end(driver, stream)
    client.close()
    server.stop()
    outputs = [driver.output(slot) for slot in range(len(PROMPT_LENGTHS))]
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = model.generate(
        torch.tensor([prompts()[2]]), do_sample=False, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, eos_token_id=None
    )
    assert outputs[2] == ids[0, len(prompts()[2]) :].tolist()
    return outputs


def serve_in_lanes(streams: list[RunStream], output: RunStream, num_lanes: int, epoch: int) -> list[list[int]]:
    """Serves the prompts with num_lanes + 1 plans in flight. Slot s runs in lane s % num_lanes; the slots of the first
    two prompts are used again by the last two."""
    driver = Driver(block_size=8, epoch=epoch)
    in_flight = 0

    def send(plan: StepPlan) -> None:
        nonlocal in_flight
        for stream in streams:
            stream.send(plan)
        in_flight += 1
        if in_flight > num_lanes:
            take()

    def take() -> None:
        nonlocal in_flight
        driver.take(output.receive())
        in_flight -= 1

    def serve(first: int, second: int) -> list[list[int]]:
        for slot, request in enumerate((first, second)):
            driver.add(slot, prompts()[request], NUM_NEW, lane=slot % num_lanes, sampling=samplings()[request])
        send(driver.plan([], lane=driver.step % num_lanes))
        for slot, request in enumerate((first, second)):
            length = len(prompts()[request])
            chunks = [length] if length < 10 else [7, length - 7]
            for chunk in chunks:
                send(driver.plan([(slot, chunk)], lane=slot % num_lanes))
        while driver.unfinished:
            send(driver.plan([], lane=driver.step % num_lanes))
        while in_flight:
            take()
        return [driver.output(0), driver.output(1)]

    outputs = serve(0, 1)
    send(driver.plan([], lane=0, frees=[0, 1]))
    return outputs + serve(2, 3)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2), (1, 3), (2, 2)], ids=lambda size: str(size))
def test_ranks_together_give_the_tokens_of_one(
    checkpoint: Path, expected: list[list[int]], tp_size: int, pp_size: int
) -> None:
    config = tiny_config(checkpoint, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size)
    with replica(config) as clients:
        for epoch in (1, 2):
            streams = [client.run() for client in clients]
            output = streams[(pp_size - 1) * tp_size]
            assert serve_in_lanes(streams, output, pp_size, epoch) == expected
        refused = step_plan(1, epoch=3, frees=[1])
        for stream in streams:
            stream.send(refused)
        for rank, stream in enumerate(streams):
            pp_rank, tp_rank = divmod(rank, tp_size)
            assert stream.receive().error.startswith(
                f"tp rank {tp_rank} of stage {pp_rank}: step 1: frees names slot 1"
            )


@pytest.mark.parametrize(("tp_size", "pp_size", "stuck_ranks"), [(2, 1, [0]), (1, 2, [0, 1])], ids=["tp", "pp"])
def test_ranks_that_have_lost_each_other_meet_again(
    checkpoint: Path, expected: list[list[int]], tp_size: int, pp_size: int, stuck_ranks: list[int]
) -> None:
    """In whatever they are stuck: they keep their weights, and one whose process was killed is replaced alone."""
    config = tiny_config(checkpoint, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size)
    output = (pp_size - 1) * tp_size

    def check(clients: list[WorkerClient]) -> None:
        streams = [client.run() for client in clients]
        assert serve_in_lanes(streams, streams[output], pp_size, 1) == expected

    with WorkerProcesses(2) as workers:
        load_and_start(config, workers.clients, meeting="first")
        first = workers.clients[0].describe().pid
        for rank in stuck_ranks:  # its peer does not hear of the plan
            driver, stream = Driver(block_size=8, epoch=7), workers.clients[rank].run()
            driver.add(0, prompts()[1], NUM_NEW)
            stream.send(driver.plan([(0, len(prompts()[1]))]))
            stream.send(driver.plan([]))
            responses = load_and_start(config, workers.clients, meeting=f"stuck {rank}")
            assert [response.num_blocks for response in responses] == [100, 100]
            stream.close()
        check(workers.clients)
        if tp_size > 1:
            workers.replace(1)
            load_and_start(config, workers.clients, meeting="one is new")
            check(workers.clients)
        assert workers.clients[0].describe().pid == first
