"""bench/kv_waste.py counts what the block tables of a worker hold."""

import numpy as np
import pytest

from manta.scheduler.scheduler import Scheduler
from manta.scheduler.types import Capacity, Request
from tests.support.bench_scripts import load
from tests.support.fake_worker import FakeWorker

kv_waste = load("kv_waste")


@pytest.mark.parametrize("num_blocks", [200, 24], ids=["room for all", "with preemptions"])
def test_slots_are_those_of_a_worker_that_follows_the_plans(num_blocks):
    capacity = Capacity(num_blocks, block_size=4, max_num_seqs=8, max_num_batched_tokens=16, max_model_len=64)
    scheduler, worker = Scheduler([capacity]), FakeWorker(capacity)
    rng = np.random.default_rng(1)
    for index in range(30):
        prompt = rng.integers(0, 50, rng.integers(1, 30)).astype(np.int32)
        scheduler.add(Request(index, prompt, max_tokens=int(rng.integers(1, 30)), salt=bytes([index])))
    num_steps = 0
    while True:
        plan = scheduler.plan()
        if plan is not None:
            worker.submit(plan)
            num_steps += 1
            replica = scheduler._replicas[0]
            slots = kv_waste.slots_now(replica)
            assert slots["used"] == sum(slot.num_computed for slot in worker.slots.values())
            in_tables = {block for slot in worker.slots.values() for block in slot.blocks}
            assert slots["paged"] == (len(in_tables) + replica.pool.num_limbo) * 4
            assert slots["used"] <= slots["exact"] <= slots["pow2"] <= slots["max"] == 64 * len(worker.slots)
        if worker.num_in_flight == capacity.max_in_flight or plan is None:
            if not worker.num_in_flight:
                break
            scheduler.apply(worker.deliver())
    assert num_steps > 50


def test_lengths_are_capped_to_the_context():
    lengths = kv_waste.capped(np.array([[10, 20], [90, 20], [300, 5]]), 100)
    assert lengths.tolist() == [[10, 20], [90, 10], [99, 1]]


def test_made_up_lengths_have_the_stated_means():
    lengths = kv_waste.made_up_lengths(np.random.default_rng(0), 200_000)
    assert lengths.mean(axis=0) == pytest.approx([161, 338], rel=0.02)


def test_lengths_of_a_trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,374,44\n2023-11-16,396,109\n2023-11-16,9,0\n")
    assert kv_waste.trace_lengths(path, 3).tolist() == [[374, 44], [396, 109], [9, 1]]
    assert len(kv_waste.trace_lengths(path, 2)) == 2
