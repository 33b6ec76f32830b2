"""`priority` with several replicas, against the rule itself: nobody starts before one who is more important, unless
that one is left to a replica that has room for it now."""

import numpy as np
import pytest

from manta.scheduler.sequence import Sequence
from tests.support.deployment import Deployment, capacity, request


def key(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.arrival


def has_room(deployment: Deployment, replica: int, sequence: Sequence) -> bool:
    picture = deployment.scheduler._replicas[replica]
    return len(picture.slots.free) > 0 and picture.pool.num_free * 4 >= len(sequence.tokens)


@pytest.mark.parametrize("seed", range(10))
def test_the_most_important_come_first_on_several_replicas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_replicas = int(rng.integers(2, 4))
    shapes = [capacity(num_blocks=24, max_num_seqs=int(rng.integers(2, 5))) for _ in range(num_replicas)]
    deployment = Deployment(*shapes, policy="priority")
    scheduler = deployment.scheduler
    num_overtaken = id = 0
    for _ in range(200):
        for _ in range(int(rng.integers(3)) if id < 80 else 0):
            sizes = int(rng.integers(1, 12)), int(rng.integers(1, 12))
            deployment.add(request(id, *sizes, priority=int(rng.integers(-2, 3))))
            id += 1
        replica = int(rng.integers(num_replicas))
        residents = {each: list(scheduler._replicas[each].residents.values()) for each in range(num_replicas)}
        others = [each for each in range(num_replicas) if each != replica]
        waiting = list(scheduler._queue)
        deployment.send(replica)
        left = list(scheduler._queue)
        admitted = [each for each in scheduler._replicas[replica].residents.values() if each in waiting]
        for less in admitted:
            for more in left:
                if key(more) < key(less) and more in waiting:
                    num_overtaken += 1
                    assert any(has_room(deployment, other, more) for other in others), "overtaken for nothing"
        preempted = [each for each in residents[replica] if each in left]
        staying = [each for each in residents[replica] if each.replica == replica]
        for lost in preempted:
            assert all(each.request.priority <= lost.request.priority for each in staying), "the wrong one gave way"
        deployment.deliver(int(rng.integers(num_replicas)))
    deployment.run()
    deployment.assert_all_as_alone()
    assert list(scheduler._queue) == []


def test_who_is_important_waits_for_no_replica_without_room() -> None:
    deployment = Deployment(*[capacity(max_num_seqs=1)] * 2, policy="priority")
    for id in range(2):
        deployment.add(request(id, 4, 8, priority=5))
        deployment.step(id)
    for id in range(2, 6):
        deployment.add(request(id, 4, 2, priority=5))
    deployment.add(request(9, 4, 2, priority=-1))
    while len(deployment.started) == 2:
        deployment.step(1)
    assert 9 in deployment.started
