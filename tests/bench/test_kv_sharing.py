"""bench/kv_sharing.py counts the blocks in the tables of a worker."""

import numpy as np
import pytest

from manta.scheduler.scheduler import Scheduler
from manta.scheduler.types import Capacity
from tests.scheduler.test_groups import beams, siblings
from tests.support.bench_scripts import load
from tests.support.fake_worker import FakeWorker

kv_sharing = load("kv_sharing")


@pytest.mark.parametrize("is_beam", [True, False])
def test_shares_are_those_of_a_worker_that_follows_the_plans(is_beam: bool) -> None:
    capacity = Capacity(100, block_size=4, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=64)
    scheduler, worker = Scheduler([capacity], enable_prefix_caching=False), FakeWorker(capacity, 20)
    requests, params = beams(22, 3, 3, max_tokens=20)
    if is_beam:
        scheduler.add_search(requests, params)
    else:
        scheduler.add_group(siblings(22, 3, max_tokens=20))
    shares = []
    while (plan := scheduler.plan()) is not None:
        worker.submit(plan)
        tables = [slot.blocks for slot in worker.slots.values()]
        num_used, num_alone = len({block for table in tables for block in table}), sum(map(len, tables))
        share = kv_sharing.share_saved(scheduler._replicas[0])
        assert share == pytest.approx((num_alone - num_used) / num_alone)
        shares.append(share)
        scheduler.apply(worker.deliver())
    assert np.mean(shares) > 0.3


def test_shares_of_many_requests_lie_between_those_of_none_and_of_all() -> None:
    capacity = Capacity(400, block_size=8, max_num_seqs=2, max_num_batched_tokens=64, max_model_len=64)
    lengths = np.array([[30, 20], [10, 30], [16, 1]])
    model = kv_sharing.Model(np.random.default_rng(0), sigma=4.0, vocab_size=32)
    for is_beam in (False, True):
        shares = kv_sharing.shares_saved(lengths, capacity, 2, is_beam, model, kv_sharing.share_saved)
        assert 0 < np.mean(shares) < 0.5
        if not is_beam:
            possible = kv_sharing.shares_saved(lengths, capacity, 2, is_beam, model, kv_sharing.share_possible)
            assert 0 < np.mean(possible) < 0.5
