"""Sequences that move between replicas get what they would have got where they were, and no block is lost or used by
two."""

import random
from contextlib import suppress
from typing import Any

import pytest

from manta.scheduler.move_cost import MoveFigures, is_copying_cheaper
from manta.scheduler.types import Capacity, RefusedError
from tests.scheduler.test_groups import beams, siblings
from tests.scheduler.test_property import PREFIXES
from tests.support.deployment import ALWAYS_COPY, NEVER_COPY, VOCAB_SIZE, Deployment, capacity, pooled, request
from tests.support.fake_worker import Asking

NUM_SEEDS = 6  # more have been tried


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
    counters = deployment.scheduler.counters
    assert (counters.num_moves_copied, counters.num_moves_failed) == (1, 1)
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


class Wanderers:
    """Requests of all kinds in replicas among which they move, at random, in the midst of losses and aborts."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        block_size, num_lanes = rng.randint(1, 4), rng.choice([1, 1, 2])
        replicas = [
            Capacity(rng.randint(40, 160) // block_size + 8, block_size, rng.randint(3, 8), 24, 48, num_lanes)
            for _ in range(rng.randint(2, 3))
        ]
        self.deployment = Deployment(
            *replicas,
            policy=rng.choice(["fcfs", "priority", "fair"]),
            enable_prefix_caching=rng.random() < 0.7,
            enable_chunked_prefill=rng.random() < 0.8,
        )
        self.deployment.rebalances = rng.random() < 0.5
        self.num_replicas = len(replicas)
        self.next_id = 0

    def act(self) -> None:
        rng, deployment = self.rng, self.deployment
        replica = rng.randrange(self.num_replicas)
        kind = rng.choices(
            ["send", "deliver", "add", "move", "end", "fail", "abort", "reset", "close", "open", "leave", "rule"],
            [30, 34, 10, 24, 14, 2, 2, 0.5, 0.5, 9, 0.5, 1],
        )[0]
        match kind:
            case "send":
                deployment.send(replica)
            case "deliver":
                deployment.deliver(replica)
                deployment.begin_moves()
            case "add":
                with suppress(RefusedError):
                    self.add()
            case "move":
                running = [id for id in deployment.requests if deployment.resident(id) is not None]
                target = rng.choice([None, None, replica])
                deployment.move(*rng.sample(running, min(len(running), rng.randint(1, 3))), target=target)
            case "end" | "fail" if deployment.copies:
                deployment.end_move(rng.choice(list(deployment.copies)), is_copied=kind == "end")
            case "abort":
                deployment.abort(rng.randrange(self.next_id + 1))
            case "reset":
                deployment.reset(replica)
            case "close":
                deployment.close(replica)
            case "open":
                deployment.scheduler.open_replica(replica)
            case "leave":
                deployment.scheduler.moves.evacuate(replica)
            case "rule":
                deployment.figures = rng.choice([ALWAYS_COPY, ALWAYS_COPY, NEVER_COPY])
        deployment.scheduler.check()

    def add(self) -> None:
        rng = self.rng
        self.next_id += 10
        prompt = rng.choice(PREFIXES)[: rng.randint(0, 12)] + rng.choices(range(VOCAB_SIZE), k=rng.randint(1, 8))
        fields: dict[str, Any] = {"max_tokens": rng.randint(1, 24), "priority": rng.randint(0, 1)}
        match rng.randrange(8):
            case 0 | 1:
                self.deployment.add_group(siblings(prompt, 3, first_id=self.next_id, **fields))
            case 2:
                fields["max_tokens"] = min(fields["max_tokens"], 6)
                self.deployment.add_search(*beams(prompt, 2, 2, first_id=self.next_id, **fields))
            case 3:
                self.deployment.add(pooled(self.next_id, prompt, rng.choice(["mean", "last"]), sampling=Asking()))
            case _:
                asked = rng.choice([(None, None), (None, None), (0, None), (2, 1)])
                fields |= {"num_logprobs": asked[0], "num_prompt_logprobs": asked[1], "tenant": rng.choice("ab")}
                ends = frozenset(rng.sample(range(VOCAB_SIZE), 2))
                sampling = Asking("", *asked)
                self.deployment.add(request(self.next_id, prompt, sampling=sampling, stop_token_ids=ends, **fields))

    def finish(self) -> None:
        deployment = self.deployment
        for replica, picture in enumerate(deployment.scheduler._replicas):
            if not picture.accepts:
                deployment.close(replica)
            deployment.scheduler.open_replica(replica)
        deployment.run()
        while deployment.copies:
            deployment.end_move(next(iter(deployment.copies)))
        deployment.assert_all_as_alone()


def test_whoever_moves_gets_what_it_would_have_got_alone() -> None:
    num_moves = num_failed = 0
    for seed in range(NUM_SEEDS):
        wanderers = Wanderers(seed)
        for _ in range(200):
            wanderers.act()
        wanderers.finish()
        num_moves += wanderers.deployment.scheduler.counters.num_moves_copied
        num_failed += wanderers.deployment.scheduler.counters.num_moves_failed
    assert num_moves > 3 * NUM_SEEDS
    assert num_failed
