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
