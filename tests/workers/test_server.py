"""One real worker behind its gRPC server: tokens equal to transformers', and its life in good and bad order."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from manta.protos.sampling_pb2 import Sampling
from manta.workers.server import WorkerServer
from tests.support.checkpoints import make_checkpoint
from tests.support.link_stream import LinkStream
from tests.support.plans import Driver, seq_add, step_plan
from tests.support.worker_client import WorkerClient, run_to_the_end, tiny_config

NUM_NEW = 12
EPOCHS = iter(range(1, 1000))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def worker(started_worker: WorkerClient) -> Iterator[WorkerClient]:
    """A started worker. Each test opens its own Run streams, with a higher epoch."""
    yield started_worker
    started_worker.cancel_streams()


@pytest.fixture(scope="module")
def started_worker(checkpoint: Path) -> Iterator[WorkerClient]:
    server = WorkerServer()
    client = WorkerClient(server.start())
    client.load(tiny_config(checkpoint))
    client.start()
    yield client
    client.close()
    server.stop()


@pytest.fixture
def fresh() -> Iterator[WorkerClient]:
    """A worker that has not been told anything."""
    server = WorkerServer()
    client = WorkerClient(server.start())
    yield client
    client.close()
    server.stop()


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 131, length).tolist() for length in (1, 5, 19, 8, 33)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """Greedy continuations by transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    outputs = []
    for prompt in prompts():
        ids = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, eos_token_id=None
        )
        outputs.append(ids[0, len(prompt) :].tolist())
    assert len({tuple(output) for output in outputs}) == len(outputs)
    return outputs


def test_greedy_tokens_alone(worker: WorkerClient, expected: list[list[int]]) -> None:
    driver, stream = Driver(block_size=8, epoch=next(EPOCHS)), worker.run()
    for slot, prompt in enumerate(prompts()):
        driver.add(slot, prompt, NUM_NEW)
        driver.take(stream.step(driver.plan([(slot, len(prompt))])))
        run_to_the_end(driver, stream)
        assert driver.output(slot) == expected[slot]


def test_greedy_tokens_of_a_mixed_batch_with_chunked_prefill(worker: WorkerClient, expected: list[list[int]]) -> None:
    """Sequences join while others decode, long prompts in uneven chunks, some steps are sat out."""
    driver, stream = Driver(block_size=8, epoch=next(EPOCHS)), worker.run()
    slots = [9, 2, 15, 0, 4]  # order of arrival is not order of slots
    for slot, prompt in zip(slots, prompts(), strict=True):
        driver.add(slot, prompt, NUM_NEW)
        computed = 0
        for chunk in (7, 1, 11, 100):
            count = min(chunk, len(prompt) - computed)
            if count:
                holds = [slots[0]] if chunk == 1 else None
                driver.take(stream.step(driver.plan([(slot, count)], holds=holds)))
                computed += count
    run_to_the_end(driver, stream)
    assert [driver.output(slot) for slot in slots] == expected


def test_two_plans_in_flight_need_no_answer_in_between(worker: WorkerClient, expected: list[list[int]]) -> None:
    driver, stream = Driver(block_size=8, epoch=next(EPOCHS)), worker.run()
    for slot, prompt in enumerate(prompts()[:3]):
        driver.add(slot, prompt, NUM_NEW)
    plans = [driver.plan([(slot, len(prompt)) for slot, prompt in enumerate(prompts()[:3])])]
    while driver.unfinished:
        plans.append(driver.plan([]))
    for plan in plans:
        stream.send(plan)
    for _ in plans:
        driver.take(stream.receive())
    assert [driver.output(slot) for slot in range(3)] == expected[:3]


def test_a_prefix_hit_and_a_copied_block_give_the_same_tokens(worker: WorkerClient, expected: list[list[int]]) -> None:
    """Slot 1 shares slot 0's first block and takes a copy of its second, which it then continues by itself."""
    prompt, epoch, stream = prompts()[2], next(EPOCHS), worker.run()
    max_length = len(prompt) + NUM_NEW
    first = seq_add(0, prompt, blocks=[0, 1, 2, 3], max_length=max_length)
    tokens = [stream.step(step_plan(1, epoch=epoch, adds=[first], prefill=[(0, 19)])).tokens]
    second = seq_add(1, prompt, blocks=[0, 5, 6, 7], max_length=max_length, num_computed=11)
    plan = step_plan(2, epoch=epoch, holds=[0], adds=[second], copies=[(1, 5)], prefill=[(1, 8)])
    assert stream.step(plan).tokens == tokens[0]
    both = [
        np.frombuffer(stream.step(step_plan(step, epoch=epoch)).tokens, "<i4").tolist()
        for step in range(3, 2 + NUM_NEW)
    ]
    assert [pair[0] for pair in both] == [pair[1] for pair in both] == expected[2][1:]


def test_a_sequence_that_returns_with_its_output_goes_on_the_same(worker: WorkerClient) -> None:
    """As after a preemption: same seed, so the same draws."""
    prompt = prompts()[1]
    sampling = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.2, seed=7)
    driver, stream = Driver(block_size=8, epoch=next(EPOCHS)), worker.run()
    driver.add(0, prompt, NUM_NEW, sampling=sampling)
    driver.take(stream.step(driver.plan([(0, len(prompt))])))
    run_to_the_end(driver, stream)
    whole = driver.output(0)
    assert len(set(whole)) > 1
    tokens = prompt + whole[:5]
    add = seq_add(
        3, tokens, blocks=[0, 1, 2], max_length=len(prompt) + NUM_NEW, num_prompt_tokens=len(prompt), sampling=sampling
    )
    epoch = next(EPOCHS)
    results = [stream.step(step_plan(1, epoch=epoch, adds=[add], prefill=[(3, len(tokens))]))]
    results += [stream.step(step_plan(step, epoch=epoch)) for step in range(2, NUM_NEW - 4)]
    assert [int(np.frombuffer(result.tokens, "<i4")[0]) for result in results] == whole[5:]


def test_steps_are_timed(worker: WorkerClient) -> None:
    driver, stream = Driver(block_size=8, epoch=next(EPOCHS)), worker.run()
    driver.add(0, prompts()[2], 3)
    results = [stream.step(driver.plan([(0, 19)])), stream.step(driver.plan([]))]
    assert all(result.device_us > 0 for result in results)
    assert results[1].idle_us > 0  # the second plan was sent after the first was answered


def test_an_empty_step_is_answered(worker: WorkerClient) -> None:
    result = worker.run().step(step_plan(1, epoch=next(EPOCHS)))
    assert (result.step, result.tokens, result.error) == (1, b"", "")


def test_an_error_ends_the_epoch_and_a_new_one_goes_on(worker: WorkerClient, expected: list[list[int]]) -> None:
    epoch, stream = next(EPOCHS), worker.run()
    stream.send(step_plan(1, epoch=epoch, frees=[3]))
    stream.send(step_plan(2, epoch=epoch))
    first, second = stream.receive(), stream.receive()
    assert first.error == "tp rank 0 of stage 0: step 1: frees names slot 3, which is not in use"
    assert f"step 2: epoch {epoch} has failed already: step 1: frees" in second.error
    driver = Driver(block_size=8, epoch=next(EPOCHS))
    driver.add(0, prompts()[0], NUM_NEW)
    driver.take(stream.step(driver.plan([(0, 1)])))
    run_to_the_end(driver, stream)
    assert driver.output(0) == expected[0]


def test_wrong_steps_and_old_epochs_are_refused(worker: WorkerClient) -> None:
    old, new = next(EPOCHS), next(EPOCHS)
    stream = worker.run()
    assert stream.step(step_plan(1, epoch=old)).error == ""
    assert "step 3 came where step 2" in stream.step(step_plan(3, epoch=old)).error
    assert stream.step(step_plan(2, epoch=old)).error == ""
    assert "step 4 came where step 1" in stream.step(step_plan(4, epoch=new)).error
    assert f"epoch {old}, but epoch {new} has begun" in stream.step(step_plan(3, epoch=old)).error
    assert stream.step(step_plan(1, epoch=new)).error == ""


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_new_stream_follows_one_that_broke(worker: WorkerClient, expected: list[list[int]], how: str) -> None:
    driver, stream = Driver(block_size=8, epoch=next(EPOCHS)), worker.run()
    driver.add(0, prompts()[1], NUM_NEW)
    driver.take(stream.step(driver.plan([(0, 5)])))
    stream.send(driver.plan([]))
    stream.call.cancel() if how == "cancel" else stream.close()
    driver, stream = Driver(block_size=8, epoch=next(EPOCHS)), worker.run()
    driver.add(0, prompts()[1], NUM_NEW)
    driver.take(stream.step(driver.plan([(0, 5)])))
    run_to_the_end(driver, stream)
    assert driver.output(0) == expected[1]


@pytest.mark.parametrize("local", [True, False], ids=["unix", "tcp"])
def test_a_link_carries_the_same(worker: WorkerClient, expected: list[list[int]], local: bool) -> None:
    described = worker.describe()
    stream = LinkStream(described.link_port, described.link_socket if local else "", described.link_key)
    driver = Driver(block_size=8, epoch=next(EPOCHS))
    for slot, prompt in enumerate(prompts()[:3]):
        driver.add(slot, prompt, NUM_NEW)
    plans = [driver.plan([(slot, len(prompt)) for slot, prompt in enumerate(prompts()[:3])])]
    while driver.unfinished:
        plans.append(driver.plan([]))
    for plan in plans:
        stream.send(plan)
    stream.close()  # what was received by then is still answered
    for _ in plans:
        driver.take(stream.receive())
    assert stream.receive_frame() == b""
    assert [driver.output(slot) for slot in range(3)] == expected[:3]
    assert "epoch" in worker.run().step(step_plan(1, epoch=1)).error  # the epoch is the worker's, whatever the stream


def test_a_link_before_start_is_closed(fresh: WorkerClient) -> None:
    described = fresh.describe()
    stream = LinkStream(described.link_port, described.link_socket, described.link_key)
    assert stream.receive_frame() == b""


def test_a_stream_that_is_closed_is_answered_to_its_end(worker: WorkerClient) -> None:
    driver, stream = Driver(block_size=8, epoch=next(EPOCHS)), worker.run()
    driver.add(0, prompts()[1], NUM_NEW)
    stream.send(driver.plan([(0, 5)]))
    stream.send(driver.plan([]))
    stream.close()
    driver.take(stream.receive())
    driver.take(stream.receive())
    with pytest.raises(AssertionError, match="ended the stream"):
        stream.receive()
    assert stream.call.code() is grpc.StatusCode.OK


def status(error: pytest.ExceptionInfo[grpc.RpcError]) -> tuple[grpc.StatusCode, str]:
    return error.value.code(), error.value.details()


def test_another_scheduler_takes_over(worker: WorkerClient, checkpoint: Path, expected: list[list[int]]) -> None:
    """It loads and starts as the first did, finds the worker ready, and begins with the first epoch. What the first one
    still sends counts no more."""
    late, epoch = worker.run(), next(EPOCHS)
    late.step(step_plan(1, epoch=epoch))
    loaded = worker.load(tiny_config(checkpoint))
    assert loaded.num_blocks == 100
    for _ in range(2):  # one that failed to start elsewhere may have asked before
        started = worker.start()
        assert (started.last_epoch, started.last_step) == (epoch, 1)
    driver, stream = Driver(block_size=8, epoch=1), worker.run()
    driver.add(0, prompts()[0], NUM_NEW)
    driver.take(stream.step(driver.plan([(0, 1)])))
    assert "of a scheduler that another has replaced" in late.step(step_plan(2, epoch=epoch)).error
    run_to_the_end(driver, stream)
    assert driver.output(0) == expected[0]


def test_calls_out_of_order(fresh: WorkerClient, checkpoint: Path) -> None:
    with pytest.raises(grpc.RpcError) as error:
        fresh.start()
    assert status(error) == (grpc.StatusCode.FAILED_PRECONDITION, "a rank not loaded yet: Start came before Load")
    with pytest.raises(grpc.RpcError) as error:
        fresh.run().receive()
    assert status(error) == (grpc.StatusCode.FAILED_PRECONDITION, "a rank not loaded yet: Run came before Start")
    loaded = fresh.load(tiny_config(checkpoint))
    assert loaded.num_blocks == 100
    assert loaded.bytes_per_block == 2 * 3 * 2 * 16 * 16 * 4  # pages of 8 tokens and dims are padded to 16
    with pytest.raises(grpc.RpcError) as error:
        fresh.load(tiny_config(checkpoint, max_num_seqs=3))
    assert "Load came a second time" in status(error)[1]
    fresh.start()
    with pytest.raises(grpc.RpcError) as error:
        fresh.start(num_blocks=50)
    assert status(error)[0] is grpc.StatusCode.FAILED_PRECONDITION


def test_refused_loads_say_why_and_may_be_tried_again(fresh: WorkerClient, checkpoint: Path, tmp_path: Path) -> None:
    for config, fields, code, message in (
        (tiny_config(tmp_path), {}, grpc.StatusCode.INVALID_ARGUMENT, "no config.json"),
        (tiny_config(checkpoint), {"tp_rank": 1}, grpc.StatusCode.INVALID_ARGUMENT, "tp_rank 1 of tensor_parallel"),
        (tiny_config(checkpoint), {"num_workers_on_host": 0}, grpc.StatusCode.INVALID_ARGUMENT, "num_workers_on_host"),
        (
            tiny_config(checkpoint, num_gpu_blocks_override=None, kv_cache_memory_bytes=30_000),
            {},
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "--kv-cache-memory-bytes",
        ),
    ):
        with pytest.raises(grpc.RpcError) as error:
            fresh.load(config, **fields)
        assert status(error)[0] is code
        assert message in status(error)[1]
        assert status(error)[1].startswith(f"tp rank {fields.get('tp_rank', 0)} of stage 0: ")
    fresh.load(tiny_config(checkpoint))


def test_weight_bytes_are_those_of_the_checkpoint(fresh: WorkerClient, checkpoint: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    loaded = fresh.load(tiny_config(checkpoint))
    assert loaded.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_describe_answers_while_steps_run(worker: WorkerClient) -> None:
    worker.run()
    described = worker.describe(open_rendezvous=True)
    assert described.device == "cpu"
    assert described.host == "127.0.0.1"
    assert described.rendezvous_port == worker.describe(open_rendezvous=True).rendezvous_port > 0
