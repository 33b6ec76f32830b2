"""Requests that make the workers fail are found and ended; the others get what they would have got alone."""

from collections.abc import Callable

import pytest

from manta.scheduler.types import Events
from tests.support.deployment import Deployment, capacity, request
from tests.support.fake_worker import FakeWorker, generate_alone


class Poisoned(Deployment):
    """Workers fail when they run a step that `breaks` says they do; a new one takes their place."""

    def __init__(self, *capacities: object, breaks: Callable[[FakeWorker, int], bool], **options: object) -> None:
        super().__init__(*capacities, **options)  # type: ignore[arg-type]
        self.breaks = breaks
        self.num_failures = 0
        self.is_process_killed = True  # else the same workers go on

    def fail(self, replica: int) -> Events:
        self.num_failures += 1
        if self.is_process_killed:
            self.generation = self.num_failures
        self.workers[replica] = FakeWorker(self.capacities[replica], self.workers[replica].vocab_size)
        events = self.scheduler.fail_replica(replica, "out of order", self.generation, self.num_steps_to_blame)
        self._hear(events)
        self.scheduler.check()
        self.scheduler.open_replica(replica)
        return events

    generation = 0
    num_steps_to_blame: int | None = None

    def run_until_done(self, max_failures: int = 20) -> None:
        num_replicas = len(self.workers)
        for _ in range(5000):
            for replica in range(num_replicas):
                while self.send(replica) is not None:
                    pass
                if self.breaks(self.workers[replica], replica):
                    self.fail(replica)
                    assert self.num_failures <= max_failures, "nobody is found guilty"
                else:
                    self.deliver(replica)
            if not self.scheduler.num_running and not self.scheduler.num_waiting:
                return
        raise AssertionError("requests do not end")


def runs_token(token: int, at: int = 0) -> Callable[[FakeWorker, int], bool]:
    """Whether a sequence that begins with `token`, and has `at` tokens, is in a step that is not answered."""

    def breaks(worker: FakeWorker, replica: int) -> bool:
        busy = {slot for step in worker.unanswered for slot in step.slots}
        return any(
            slot.tokens[0] == token and len(slot.tokens) >= at
            for number, slot in worker.slots.items()
            if number in busy
        )

    return breaks


def prompt(first: int, id: int) -> list[int]:
    return [first, *(id % 20 for _ in range(5))]


def check(deployment: Poisoned, guilty: set[int]) -> None:
    """The guilty end with an error and with the first of their tokens, all others as if nothing had happened."""
    assert {id for id, end in deployment.finished.items() if end.reason == "error"} == guilty
    for id, each in deployment.requests.items():
        expected = generate_alone(each.prompt, each.max_tokens, each.sampling, 20)
        got = deployment.tokens[id]
        assert got == (expected[: len(got)] if id in guilty else expected)
    for id in guilty:
        assert "workers fail whenever they run this request: out of order" in deployment.finished[id].error


@pytest.mark.parametrize("at", [0, 9], ids=["its prompt", "a token of its output"])
@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_poisonous_request_ends_alone(place: int, at: int) -> None:
    deployment = Poisoned(capacity(max_num_seqs=8), breaks=runs_token(19, at))
    for id in range(6):
        deployment.add(request(id, prompt(19 if id == place else 1, id), 12))
    deployment.run_until_done(max_failures=5)
    check(deployment, {place})


def test_two_poisonous_requests() -> None:
    deployment = Poisoned(capacity(max_num_seqs=8), breaks=runs_token(19))
    for id in range(7):
        deployment.add(request(id, prompt(19 if id in (0, 1) else 1, id), 10))
    deployment.run_until_done(max_failures=10)
    check(deployment, {0, 1})


def test_who_came_when_nothing_was_heard_any_more_is_not_to_blame() -> None:
    """A request that is given to workers that are cut off, one after the other: none can have heard of it."""
    deployment = Poisoned(*[capacity()] * 3, breaks=lambda worker, replica: False)
    deployment.num_steps_to_blame = 0
    deployment.add(request(0, prompt(19, 0), 10))
    for number in range(9):
        replica = number % 3
        while deployment.send(replica) is not None:
            pass
        assert not deployment.fail(replica).finished
    deployment.run_until_done()
    check(deployment, set())


def test_one_that_has_nobody_beside_it_is_ended_when_new_workers_have_failed_too() -> None:
    deployment = Poisoned(capacity(), breaks=runs_token(19))
    deployment.is_process_killed = False
    deployment.add(request(0, prompt(19, 0), 10))
    for _ in range(5):  # the workers may be to blame
        while deployment.send() is not None:
            pass
        assert not deployment.fail(0).finished
    deployment.is_process_killed = True
    deployment.run_until_done()
    assert deployment.num_failures == 6
    check(deployment, {0})


def test_a_replica_that_does_nothing_right_is_not_the_fault_of_requests() -> None:
    """With others to tell from, nobody is convicted before the keeper has counted enough failures."""
    deployment = Poisoned(capacity(max_num_seqs=8), breaks=lambda worker, replica: bool(worker.num_in_flight))
    for id in range(6):
        deployment.add(request(id, prompt(1, id), 10))
    counted = 0
    while counted < 3:
        while deployment.send() is not None:
            pass
        excused = deployment.scheduler.num_excused(0)
        deployment.fail(0)
        counted += deployment.scheduler.num_excused(0) == excused
    assert not deployment.finished
    assert deployment.scheduler.num_waiting == 6


def test_failures_between_which_everybody_gets_on_are_nobodys_fault() -> None:
    deployment = Poisoned(capacity(max_num_batched_tokens=256), breaks=lambda worker, replica: False)
    for id in range(4):
        deployment.add(request(id, prompt(1, id), 40))
    for _ in range(6):
        for _ in range(6):
            while deployment.send() is not None:
                pass
            deployment.deliver()
        deployment.fail(0)
    assert deployment.scheduler.num_excused(0) == 0
    deployment.run_until_done()
    check(deployment, set())


def test_suspects_wait_for_an_empty_replica_while_others_go_on() -> None:
    small = capacity(max_num_seqs=4)
    deployment = Poisoned(small, small, breaks=runs_token(19))
    for id in range(10):
        deployment.add(request(id, prompt(19 if id == 3 else 1, id), 20))
    deployment.run_until_done(max_failures=8)
    check(deployment, {3})


def test_a_poisonous_prompt_with_several_samples_ends_with_all_of_them() -> None:
    deployment = Poisoned(capacity(max_num_seqs=8), breaks=runs_token(19))
    deployment.add_group([request(id, prompt(19, 0), 6, sampling=id) for id in range(3)])
    for id in range(3, 6):
        deployment.add(request(id, prompt(1, id), 10))
    deployment.run_until_done(max_failures=6)
    check(deployment, {0, 1, 2})


def test_a_suspect_can_be_aborted_while_it_waits() -> None:
    deployment = Poisoned(capacity(max_num_seqs=8), breaks=runs_token(19))
    for id in range(4):
        deployment.add(request(id, prompt(19 if id == 0 else 1, id), 10))
    for _ in range(2):
        while deployment.send() is not None:
            pass
        deployment.fail(0)
    assert deployment.scheduler.num_waiting == 4
    deployment.abort(1)
    deployment.abort(0)
    assert deployment.scheduler.num_waiting == 2
    deployment.run_until_done(max_failures=2)
    assert {id: end.reason for id, end in deployment.finished.items()} == {
        0: "abort", 1: "abort", 2: "length", 3: "length",
    }  # fmt: skip


def test_a_replica_that_is_never_there_again_is_not_waited_for() -> None:
    """Its suspect is let in where others run, once it is known to be given up."""
    small = capacity(max_num_seqs=4)
    deployment = Poisoned(small, small, breaks=lambda worker, replica: False)
    for id in range(4):
        deployment.add(request(id, prompt(1, id), 50))
    deployment.send(1)
    suspect = request(9, prompt(2, 9), 5)
    deployment.add(suspect)
    for _ in range(2):
        while deployment.send(0) is not None:
            pass
        deployment.fail(0)
    deployment.fail(0)
    deployment.scheduler.close_replica(0)
    deployment.scheduler._trials.expect(0, will_come=True)
    for _ in range(6):
        deployment.step(1)
    waiting = list(deployment.scheduler._trials.waiting)
    assert waiting
    deployment.scheduler.give_up_replica(0)
    deployment.run(replicas=[1])
    assert not deployment.scheduler._trials.waiting
    assert {id: end.reason for id, end in deployment.finished.items()} == dict.fromkeys(deployment.requests, "length")


def test_samples_of_a_prompt_that_two_replicas_have_lost_are_tried_one_after_the_other() -> None:
    """Those of the first replica get past the point where it failed, and nobody suspects the others any more."""
    small = capacity(max_num_seqs=2)
    deployment = Poisoned(small, small, breaks=lambda worker, replica: False)
    deployment.add_group([request(id, prompt(1, 0), 30) for id in range(4)])
    while deployment.scheduler.num_resident(0) < 2 or deployment.scheduler.num_resident(1) < 2:
        for replica in range(2):
            deployment.step(replica)
    for replica in (0, 1, 0, 1):
        while deployment.send(replica) is not None:
            pass
        deployment.fail(replica)
    assert len(deployment.scheduler._trials.waiting) == 2
    deployment.run_until_done()
    check(deployment, set())


def test_a_suspect_is_not_tried_where_a_sequence_is_about_to_arrive() -> None:
    deployment = Poisoned(*[capacity(num_blocks=64)] * 3, breaks=lambda worker, replica: False)
    deployment.close(1)
    deployment.close(2)
    deployment.add(request(0, prompt(1, 0), 40))
    for _ in range(3):
        deployment.step(0)
    deployment.scheduler.open_replica(2)
    deployment.add(request(9, prompt(2, 9), 30))
    deployment.step(2)
    deployment.scheduler.open_replica(1)
    deployment.move(0, target=1)
    for _ in range(2):
        while deployment.send(2) is not None:
            pass
        deployment.fail(2)
        deployment.scheduler.close_replica(2)
        if not deployment.scheduler._trials.waiting:
            deployment.scheduler.open_replica(2)
    assert [each.request.id for each in deployment.scheduler._trials.waiting] == [9]
    deployment.send(1)
    assert deployment.scheduler._trials.waiting
    (move,) = deployment.copies
    deployment.end_move(move)
    deployment.send(1)
    assert [each.request.id for each in deployment.scheduler._replicas[1].residents.values()] == [0]
    deployment.scheduler.open_replica(2)
    deployment.run_until_done()
    check(deployment, set())
