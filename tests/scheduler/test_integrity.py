"""`check` finds what is broken, and `snapshot` shows what there is."""

from collections.abc import Callable
from typing import Any

import pytest

from manta.scheduler.replica import Replica
from manta.scheduler.scheduler import Scheduler
from tests.support.deployment import Deployment, capacity, request


def running() -> tuple[Scheduler, Replica]:
    """Three sequences decoding, one of them with shared blocks, one prefilling, one waiting; a step in flight."""
    deployment = Deployment(capacity(max_num_seqs=4, max_num_batched_tokens=8))
    prompts: list[int | list[int]] = [list(range(7)), list(range(6)), 3, 30, 5]
    for id, prompt in enumerate(prompts):
        deployment.add(request(id, prompt, max_tokens=20))
    for _ in range(3):
        deployment.step()
    deployment.send()
    return deployment.scheduler, deployment.scheduler._replicas[0]


def break_counter(replica: Replica) -> None:
    replica.lanes[0].num_decoding += 1


def lose_a_slot(replica: Replica) -> None:
    replica.residents.popitem()


def grow_too_far(replica: Replica) -> None:
    replica.residents[0].blocks += replica.pool.take(1)


def change_a_token(replica: Replica) -> None:
    replica.slots.tokens[0, 0] += 1


def misplace_on_the_calendar(replica: Replica) -> None:
    phases = replica.lanes[0].growth
    phases.append(phases.pop(0))


def free_a_block_in_use(replica: Replica) -> None:
    replica.pool.blank.append(replica.residents[0].blocks[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda replica: replica.pool.blank.pop(), "block .* is in 0 states"),
        (free_a_block_in_use, "block .* is in 2 states"),
        (lambda replica: replica.pool.refs.__setitem__(replica.residents[0].blocks[0], 5), "has 5 references"),
        (lambda replica: replica.pool.by_hash.popitem(), "the index does not lead to block"),
        (lambda replica: replica.pool.limbo.update({31: (1, 1)}), "is in 2 states"),
        (lose_a_slot, "references and is in"),
        (lambda replica: replica.slots.free.append(0), "a slot is lost or in two places"),
        (lambda replica: replica.slots.sequences.__setitem__(0, None), "slot 0 holds another sequence"),
        (grow_too_far, "request 0 has 4 blocks for"),
        (change_a_token, "request 0 has hashes of other tokens"),
        (break_counter, "lane 0 counts"),
        (lambda replica: replica.stops.add([7]), "the stop table is not that"),
        (misplace_on_the_calendar, "grows at another tick"),
        (lambda replica: replica.lanes[0].endings.popitem(), "the calendar of endings"),
        (lambda replica: replica.in_flight.append(replica.in_flight[0]), r"steps \[4, 4\] are in flight"),
    ],
)
def test_check_names_what_is_broken(damage: Callable[[Replica], Any], message: str) -> None:
    scheduler, replica = running()
    scheduler.check()
    damage(replica)
    with pytest.raises(AssertionError, match=message):
        scheduler.check()


def test_check_compares_the_queue_with_the_requests_known() -> None:
    scheduler, _ = running()
    scheduler._sequences.popitem()
    with pytest.raises(AssertionError, match="requests known"):
        scheduler.check()


def test_a_snapshot_shows_tables_and_pool() -> None:
    deployment = Deployment(capacity(max_num_seqs=2, num_blocks=12, block_size=4, max_num_batched_tokens=8))
    deployment.add(request(0, 5, max_tokens=9, name="first"))
    deployment.add(request(1, 20))
    deployment.add(request(2, 3))
    deployment.step()
    snapshot = deployment.scheduler.snapshot()
    first, second, third = snapshot.sequences
    assert (first.name, first.status, first.num_tokens, first.num_computed) == ("first", "decoding", 6, 5)
    assert (second.status, second.num_tokens, second.num_computed) == ("prefilling", 20, 3)
    assert (third.status, third.slot, third.replica, third.num_tokens, third.blocks) == ("waiting", -1, -1, 3, [])
    assert (len(first.blocks), len(second.blocks)) == (2, 5)
    assert first.ref_counts == [1, 1]
    (pool,) = snapshot.pools
    assert (pool.num_blocks, pool.block_size, pool.num_free_blocks, pool.num_cached_blocks) == (12, 4, 5, 0)
    deployment.abort(0)
    (pool,) = deployment.scheduler.snapshot().pools
    assert (pool.num_free_blocks, pool.num_cached_blocks, pool.num_limbo_blocks) == (7, 1, 0)
