"""Who waits and who loses its place when blocks run out."""

from tests.support.deployment import Deployment, capacity, request


def places(deployment: Deployment) -> tuple[list[int], list[int]]:
    """Ids of running and of waiting requests."""
    sequences = deployment.scheduler.snapshot().sequences
    running = [each.request_id for each in sequences if each.slot >= 0]
    return running, [each.request_id for each in sequences if each.slot < 0]


def test_the_last_admitted_goes_first_and_comes_back_first() -> None:
    deployment = Deployment(capacity(num_blocks=6, block_size=4, max_num_batched_tokens=32))
    for id in range(3):
        deployment.add(request(id, 8, max_tokens=8))  # 2 blocks each: all are taken
    deployment.add(request(3, 8, max_tokens=1))
    deployment.step()
    assert places(deployment) == ([0, 1, 2], [3])
    plan = deployment.step()  # each of the three needs a block; the last makes room for two
    assert plan is not None
    assert len(plan.frees) == 1
    assert places(deployment) == ([0, 1], [2, 3])
    assert deployment.scheduler.counters.num_preemptions == 1
    deployment.run()
    deployment.assert_all_as_alone()


def test_under_the_priority_policy_the_least_important_goes_first() -> None:
    deployment = Deployment(capacity(num_blocks=6, block_size=4), policy="priority")
    deployment.add(request(0, 8, max_tokens=8, priority=5))
    deployment.step()
    for id, priority in ((1, 1), (2, 0)):
        deployment.add(request(id, 4, max_tokens=8, priority=priority))
    deployment.step()  # blocks: 3 + 1 + 1
    deployment.step()  # one is left for the two
    assert places(deployment) == ([2, 1], [0])
    deployment.run()
    deployment.assert_all_as_alone()


def test_the_priority_queue_is_by_priority_then_arrival() -> None:
    deployment = Deployment(capacity(max_num_seqs=1), policy="priority")
    for id, priority in enumerate([3, 1, 2, 1]):
        deployment.add(request(id, 4, priority=priority))
    order = []
    while deployment.scheduler.num_waiting:
        deployment.step()
        order += [id for id in deployment.started if id not in order]
    assert order == [1, 3, 2, 0]


def test_a_sequence_sits_out_while_the_blocks_it_needs_are_in_limbo() -> None:
    deployment = Deployment(capacity(num_blocks=5, block_size=4))
    deployment.add(request(0, 7, max_tokens=6))
    deployment.add(request(1, 7, max_tokens=1))
    deployment.add(request(2, 1, max_tokens=4))
    deployment.send()  # 2 + 2 + 1 blocks
    slots = {each.request_id: each.slot for each in deployment.scheduler.snapshot().sequences}
    deployment.send()
    deployment.deliver()  # request 1 ends; the second step is still in flight
    deployment.add(request(3, 4, max_tokens=1))  # it must not take what request 0 waits for
    held, served = deployment.send(), None
    assert held is not None
    assert (held.holds, held.num_decodes, held.grow, held.adds) == ([slots[0]], 1, [], [])
    deployment.deliver()
    served = deployment.send()
    assert served is not None
    assert (served.holds, served.num_decodes) == ([], 2)
    assert [slot for slot, _ in served.grow] == [slots[0]]
    deployment.run()
    assert deployment.scheduler.counters.num_preemptions == 0
    deployment.assert_all_as_alone()


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    computed = []
    for enable_prefix_caching in (False, True):
        deployment = Deployment(capacity(num_blocks=8, block_size=4), enable_prefix_caching=enable_prefix_caching)
        deployment.add(request(0, 12, max_tokens=8))
        deployment.add(request(1, 14, max_tokens=8))
        deployment.run()
        deployment.assert_all_as_alone()
        assert deployment.scheduler.counters.num_preemptions == 1
        computed.append(deployment.workers[0].num_computed_tokens)
    assert computed[1] <= computed[0] - 8  # two blocks at least were still there


def test_the_reserve_for_those_who_run_keeps_nobody_out_of_an_empty_pool() -> None:
    deployment = Deployment(capacity(num_blocks=100, block_size=1, max_model_len=101, max_num_batched_tokens=128))
    deployment.add(request(0, 98, max_tokens=1))
    deployment.add(request(1, 2, max_tokens=1))
    deployment.send()
    assert places(deployment) == ([0], [1])  # 2 blocks are free, and 1 of them is the reserve
    deployment.add(request(2, 100, max_tokens=1))
    deployment.run()
    deployment.assert_all_as_alone()


def held_in_lane_0(prompts: list[int]) -> Deployment:
    """Two lanes of two sequences. Request 0 was held: the one block there is came out of limbo after its lane's turn,
    and it is lane 1's turn now."""
    deployment = Deployment(capacity(num_lanes=2, max_num_seqs=8, num_blocks=8, block_size=4))
    for id, prompt in enumerate(prompts):
        deployment.add(request(id, prompt, max_tokens=8))
    deployment.send()
    deployment.send()
    deployment.deliver()
    scheduler = deployment.scheduler
    pool = scheduler._replicas[0].pool
    others = pool.take(4)  # the rest of the pool belongs to somebody
    pool.release(others[:1], until=2)
    plan = scheduler.plan()
    assert plan is not None
    assert (plan.lane, plan.num_decodes, len(plan.holds)) == (0, 1, 1)
    scheduler.apply(deployment.workers[0].deliver())
    assert (pool.num_free, pool.num_limbo) == (1, 0)
    return deployment


def test_who_was_held_is_served_before_the_younger_of_another_lane() -> None:
    deployment = held_in_lane_0([4, 1, 4, 1])  # request 2, in lane 1, needs a block too
    slot = deployment.scheduler.snapshot().sequences[0].slot
    plan = deployment.scheduler.plan()
    assert plan is not None
    assert (plan.lane, [grown for grown, _ in plan.grow]) == (0, [slot])
    assert places(deployment) == ([0, 1, 2], [3])  # 3 made room for 2, which waits for its block


def test_nobody_is_admitted_while_someone_is_held() -> None:
    deployment = held_in_lane_0([4, 1, 1, 1])
    deployment.add(request(4, 1))
    plan = deployment.scheduler.plan()
    assert plan is not None
    assert (plan.lane, plan.adds) == (1, [])


def test_limbo_is_not_promised_twice() -> None:
    deployment = Deployment(capacity(num_blocks=5, block_size=4, num_lanes=2, max_num_batched_tokens=32))
    for id in range(3):
        deployment.add(request(id, 4, max_tokens=8))
    deployment.send()  # requests 0 and 1
    deployment.send()  # request 2
    deployment.deliver()
    pool = deployment.scheduler._replicas[0].pool
    pool.release(pool.take(2)[:1], until=2)
    deployment.scheduler.plan()
    # One block will come for the two that need one: it is request 0's, and request 2 makes room for request 1.
    assert places(deployment) == ([0, 1], [2])
    assert pool.num_limbo == 2
