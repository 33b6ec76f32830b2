"""Sequences that move between replicas get what they would have got where they were, and no block is lost or used by
two."""

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.scheduler.move_cost import MoveFigures, is_copying_cheaper
from manta.scheduler.sequence import Status
from manta.scheduler.types import Capacity, RefusedError, Request
from tests.scheduler.test_groups import beams, siblings
from tests.scheduler.test_property import OPERATIONS, PREFIXES, Add, capacities, options
from tests.support.deployment import NEVER_COPY, Deployment, capacity, pooled, request


def two(**fields: Any) -> Deployment:
    """Two replicas; the second is closed until `open_second`, so that requests run in the first."""
    deployment = Deployment(capacity(**fields), capacity(**fields))
    deployment.close(1)
    return deployment


def open_second(deployment: Deployment) -> None:
    deployment.scheduler.open_replica(1)


def under_way(deployment: Deployment) -> int:
    (id,) = deployment.copies
    return id


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("num_prompt", [3, 8, 30])
def test_nothing_is_computed_twice(num_prompt: int, num_steps: int) -> None:
    """In the midst of the prompt, at its end, and later."""
    deployment = two()
    deployment.add(request(1, num_prompt, 20))
    for _ in range(num_steps):
        deployment.step()
    open_second(deployment)
    deployment.move(1)
    deployment.end_move(under_way(deployment))
    assert deployment.scheduler.num_free_blocks(0) == 32
    assert deployment.scheduler.num_resident(1) == 1
    deployment.run()
    deployment.assert_all_as_alone()
    assert sum(worker.num_computed_tokens for worker in deployment.workers) == num_prompt + 19
    assert deployment.workers[1].num_computed_tokens > 0


def test_it_waits_for_the_plans_in_flight_and_others_go_on_meanwhile() -> None:
    deployment = two()
    deployment.add(request(1, 6, 30))
    deployment.add(request(2, 6, 30))
    deployment.step()
    deployment.send()
    open_second(deployment)
    deployment.move(1)
    assert not deployment.copies
    plan = deployment.send()
    assert plan is not None
    assert plan.num_decodes == 1
    assert len(plan.holds) == 1
    deployment.deliver()
    deployment.begin_moves()
    id = under_way(deployment)
    before = len(deployment.tokens[2])
    for _ in range(5):
        deployment.step()
    assert len(deployment.tokens[2]) >= before + 5
    assert deployment.scheduler.num_running == 2
    deployment.end_move(id)
    deployment.run()
    deployment.assert_all_as_alone()


def test_what_the_target_has_cached_is_not_copied() -> None:
    deployment = Deployment(capacity(), capacity())
    prompt = list(range(12))
    deployment.close(0)
    deployment.add(request(1, [*prompt, 1], 2))
    deployment.run([1])
    deployment.scheduler.open_replica(0)
    deployment.scheduler._replicas[1].accepts = False
    deployment.add(request(2, [*prompt, 2, 3], 20))
    deployment.step()
    deployment.step()
    deployment.scheduler._replicas[1].accepts = True
    deployment.move(2, target=1)
    assert len(deployment.copies[under_way(deployment)].left) <= 1  # of 14 tokens 12 are there
    deployment.run()
    deployment.assert_all_as_alone()


@pytest.mark.parametrize("caching", [True, False])
def test_samples_of_a_prompt_move_together_and_still_share_it(caching: bool) -> None:
    deployment = Deployment(capacity(), capacity(), enable_prefix_caching=caching)
    deployment.close(1)
    deployment.add_group(siblings(10, 3, max_tokens=20))
    for _ in range(4):
        deployment.step()
    open_second(deployment)
    tables = [sequence.blocks for sequence in deployment.scheduler.snapshot().sequences]
    deployment.move(0, 1, 2)
    (move,) = deployment.scheduler.moves.under_way
    assert set(move.copies) == set().union(*tables)
    assert len(move.copies) == sum(map(len, tables)) - 2 * 2  # two full blocks of the prompt are everybody's
    assert deployment.scheduler.num_free_blocks(1) == 32 - len(move.copies)
    deployment.run()
    deployment.assert_all_as_alone()


def test_where_computing_is_cheaper_nothing_is_copied() -> None:
    deployment = two()
    deployment.figures = NEVER_COPY
    deployment.add(request(1, 9, 20))
    for _ in range(5):
        deployment.step()
    open_second(deployment)
    deployment.move(1)
    assert not deployment.copies
    assert deployment.scheduler.counters.num_moves_recomputed == 1
    assert deployment.scheduler.num_free_blocks(0) == 32
    plan = deployment.step(1)
    assert plan is not None
    assert plan.num_tokens == 9 + 5
    deployment.run()
    deployment.assert_all_as_alone()


@pytest.mark.parametrize("lost", [0, 1, None])
def test_when_an_end_is_lost_it_is_computed_again(lost: int | None) -> None:
    """The source, the target, or only the copy."""
    deployment = two()
    deployment.add(request(1, 9, 20))
    for _ in range(5):
        deployment.step()
    open_second(deployment)
    deployment.move(1)
    id = under_way(deployment)
    if lost is None:
        deployment.end_move(id, is_copied=False)
    else:
        deployment.reset(lost)
        assert deployment.scheduler.num_waiting == 1
        deployment.end_move(id)
    assert all(deployment.scheduler.num_free_blocks(replica) == 32 for replica in range(2))
    deployment.run()
    deployment.assert_all_as_alone()


def test_an_abort_in_the_midst_gives_the_blocks_back_when_the_copy_is_over() -> None:
    deployment = two()
    deployment.add(request(1, 9, 20))
    for _ in range(5):
        deployment.step()
    open_second(deployment)
    deployment.move(1)
    deployment.abort(1)
    assert deployment.finished[1].reason == "abort"
    assert deployment.scheduler.num_running == 0
    assert deployment.scheduler.num_free_blocks(1) < 32
    deployment.end_move(under_way(deployment))
    assert all(deployment.scheduler.num_free_blocks(replica) == 32 for replica in range(2))


@pytest.mark.parametrize("when", ["frozen", "parked"])
def test_an_abort_before_and_after(when: str) -> None:
    deployment = two()
    deployment.add(request(1, 9, 20))
    deployment.step()
    deployment.send()
    open_second(deployment)
    deployment.move(1)
    if when == "parked":
        deployment.deliver()
        deployment.begin_moves()
        deployment.end_move(under_way(deployment))
    deployment.abort(1)
    deployment.run()
    deployment.assert_all_as_alone()


def test_a_replica_is_evacuated_and_takes_nobody_new() -> None:
    deployment = two(max_num_seqs=8, num_blocks=64)
    for id in range(6):
        deployment.add(request(id, 7 + id, 20, stop_token_ids=frozenset({id})))
    search = beams(5, 2, 2, first_id=20, max_tokens=30)
    deployment.add_search(*search)
    deployment.add(pooled(30, 9))
    for _ in range(3):
        deployment.step()
    open_second(deployment)
    deployment.scheduler.moves.evacuate(0)
    deployment.add(request(10, 5, 3))
    for _ in range(100):
        deployment.begin_moves()
        for id in list(deployment.copies):
            deployment.end_move(id)
        if deployment.scheduler.moves.is_evacuated(0):
            break
        deployment.step(0)
        deployment.step(1)
    assert deployment.scheduler.moves.is_evacuated(0)
    deployment.send(0)
    newcomer = deployment.resident(10)
    assert newcomer is None or newcomer.replica == 1
    assert deployment.scheduler.counters.num_moves_copied
    deployment.close(0)
    deployment.run([1])
    deployment.assert_all_as_alone()


def test_instead_of_a_preemption_the_last_one_moves() -> None:
    deployment = two(num_blocks=32, max_num_seqs=4)
    deployment.rebalances = True
    for id in range(3):
        deployment.add(request(id, 10, 50))
    for _ in range(3):
        deployment.step()
    open_second(deployment)
    deployment.run()
    deployment.assert_all_as_alone()
    assert deployment.scheduler.counters.num_preemptions == 0
    assert deployment.scheduler.counters.num_moves_copied >= 1


def test_load_is_evened_out_once() -> None:
    deployment = two(num_blocks=256, max_num_seqs=8, max_model_len=128)
    deployment.rebalances = True
    for id in range(8):
        deployment.add(request(id, 10, 100))
    for _ in range(6):
        deployment.step()
    open_second(deployment)
    for _ in range(60):
        for replica in range(2):
            deployment.step(replica)
        for id in list(deployment.copies):
            deployment.end_move(id)
    assert [deployment.scheduler.num_resident(replica) for replica in range(2)] == [4, 4]
    deployment.run()
    deployment.assert_all_as_alone()
    assert deployment.scheduler.counters.num_moves_copied == 4


def test_the_rule_of_costs() -> None:
    figures = MoveFigures(block_bytes=1000, copy_bytes_per_s=1e6, copy_overhead_s=0.01, prefill_tokens_per_s=1000.0)
    assert not is_copying_cheaper(figures, num_blocks=1, num_tokens=11)
    assert is_copying_cheaper(figures, num_blocks=1, num_tokens=12)
    assert not is_copying_cheaper(figures, num_blocks=95, num_tokens=100)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4).flatmap(lambda block_size: st.lists(capacities(block_size), min_size=2, max_size=3)),
    options(),
    st.lists(
        st.tuples(
            st.one_of(
                OPERATIONS, st.sampled_from(["move", "move", "move group", "search", "end", "end", "fail", "go"])
            ),
            st.integers(0, 1000),
        ),
        min_size=20,
        max_size=120,
    ),
    st.booleans(),
    st.booleans(),
)
def test_whoever_moves_gets_what_it_would_have_got_alone(
    replicas: list[Capacity],
    options: dict[str, Any],
    operations: list[tuple[Add | str, int]],
    rebalances: bool,
    copies: bool,
) -> None:
    """Moves of any who run, in the midst of losses, aborts and evacuations."""
    deployment = Deployment(*replicas, **options)
    deployment.rebalances = rebalances
    if not copies:
        deployment.figures = NEVER_COPY
    next_id = 0
    for operation, number in operations:
        replica = number % len(replicas)
        next_id += 10
        match operation:
            case Add(prompt, fields):
                with suppress(RefusedError):
                    deployment.add(Request(next_id, np.array(prompt, np.int32), **fields))
            case "move group":
                with suppress(RefusedError):
                    deployment.add_group(siblings(PREFIXES[number % 3], 2, first_id=next_id, max_tokens=9))
            case "search":
                with suppress(RefusedError):
                    deployment.add_search(*beams(PREFIXES[number % 3], 2, 2, first_id=next_id, max_tokens=5))
            case "send":
                deployment.send(replica)
            case "deliver":
                deployment.deliver(replica)
                deployment.begin_moves()
            case "abort":
                deployment.abort(number % (next_id + 1))
            case "reset":
                deployment.reset(replica)
            case "close":
                deployment.close(replica)
            case "open":
                deployment.scheduler.open_replica(replica)
            case "move":
                running = [id for id in deployment.requests if deployment.resident(id) is not None]
                if running:
                    first = number % len(running)
                    deployment.move(*running[first : first + 2], target=None if number % 2 else replica)
            case "go":
                deployment.scheduler.moves.evacuate(replica)
            case "end" | "fail" if deployment.copies:
                id = list(deployment.copies)[number % len(deployment.copies)]
                deployment.end_move(id, is_copied=operation == "end")
        deployment.scheduler.check()
    for replica in range(len(replicas)):
        if not deployment.scheduler._replicas[replica].accepts:
            deployment.close(replica)
        deployment.scheduler.open_replica(replica)
    deployment.run()
    while deployment.copies:
        deployment.end_move(next(iter(deployment.copies)))
    deployment.assert_all_as_alone()
    assert not any(each.status is Status.MOVING for each in deployment.scheduler.moves.sequences)
