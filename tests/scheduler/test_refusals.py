"""What is refused, when, and that the message names both numbers."""

import numpy as np
import pytest

from manta.scheduler.scheduler import Scheduler
from manta.scheduler.types import Capacity, QueueFullError, RefusedError, TooLongError
from tests.support.deployment import Deployment, capacity, request


def test_a_prompt_longer_than_the_context() -> None:
    scheduler = Scheduler([capacity(max_model_len=4096, num_blocks=2000)])
    with pytest.raises(TooLongError, match=r"prompt has 5000 tokens and max_tokens is 100, the context holds 4096"):
        scheduler.add(request(0, 5000, 100))
    assert scheduler.num_waiting == 0


def test_a_prompt_that_leaves_no_room_for_one_token() -> None:
    scheduler = Scheduler([capacity(max_model_len=16)])
    with pytest.raises(TooLongError, match="16 tokens"):
        scheduler.add(request(0, 16))
    scheduler.add(request(1, 15))


def test_a_request_that_the_pool_can_never_hold() -> None:
    scheduler = Scheduler([capacity(num_blocks=5, block_size=4)])
    with pytest.raises(TooLongError, match=r"needs 6 blocks of 4 tokens; there are 5"):
        scheduler.add(request(0, 10, max_tokens=12))
    scheduler.add(request(1, 10, max_tokens=11))  # the 21st token is never computed: 20 fit


def test_a_prompt_longer_than_a_step_without_chunked_prefill() -> None:
    scheduler = Scheduler([capacity(max_num_batched_tokens=8)], enable_chunked_prefill=False)
    with pytest.raises(TooLongError, match=r"prompt has 9 tokens and chunked prefill is off, a step holds 8"):
        scheduler.add(request(0, 9))
    scheduler.add(request(1, 8))


def test_with_unequal_replicas_the_tightest_counts() -> None:
    scheduler = Scheduler([capacity(num_blocks=16), capacity(num_blocks=4)])
    with pytest.raises(TooLongError, match=r"needs 5 blocks of 4 tokens; there are 4"):
        scheduler.add(request(0, 16, max_tokens=4))


def test_a_full_queue() -> None:
    scheduler = Scheduler([capacity()], max_num_queued_reqs=2)
    scheduler.add(request(0, 4))
    scheduler.add(request(1, 4))
    with pytest.raises(QueueFullError, match=r"2 requests are waiting, the queue holds 2"):
        scheduler.add(request(2, 4))
    assert scheduler.plan() is not None
    scheduler.add(request(2, 4))


def test_a_queue_full_of_tokens() -> None:
    scheduler = Scheduler([capacity()], max_num_queued_tokens=10)
    scheduler.add(request(0, 12))  # alone it may exceed the limit: it would never fit otherwise
    with pytest.raises(QueueFullError, match=r"12 tokens are waiting and the prompt has 3, the queue holds 10"):
        scheduler.add(request(1, 3))
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (1, 12)


def test_what_was_taken_elsewhere_is_taken_by_a_full_queue() -> None:
    scheduler = Scheduler([capacity()], max_num_queued_reqs=1)
    scheduler.add(request(0, 4))
    scheduler.add(request(1, 4, output=np.array([3], np.int32)), resubmitted=True)
    scheduler.add(request(2, 4), resubmitted=True)
    assert scheduler.num_waiting == 3


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(0, 4), (4, 0), (4, -1)])
def test_what_is_no_request(num_prompt: int, max_tokens: int) -> None:
    with pytest.raises(RefusedError, match="at least 1"):
        Scheduler([capacity()]).add(request(0, num_prompt, max_tokens))


def test_an_id_in_use() -> None:
    scheduler = Scheduler([capacity()])
    scheduler.add(request(0, 4))
    with pytest.raises(ValueError, match="request id 0 is in use"):
        scheduler.add(request(0, 4))


@pytest.mark.parametrize(
    ("output", "max_tokens", "reason"), [([5, 6, 7], 3, "length"), ([5, 6, 9], 8, "stop"), ([5, 6, 9], 3, "stop")]
)
def test_a_resubmitted_request_that_had_ended(output: list[int], max_tokens: int, reason: str) -> None:
    deployment = Deployment(capacity())
    deployment.add(request(0, 4, max_tokens, output=np.array(output, np.int32), stop_token_ids=frozenset({9})))
    end = deployment.finished[0]
    assert (end.reason, end.num_output_tokens, end.stop_token) == (reason, 3, 9 if reason == "stop" else None)
    assert deployment.scheduler.num_waiting == 0


@pytest.mark.parametrize(
    ("capacities", "message"),
    [
        ([], "at least one replica"),
        ([capacity(max_num_batched_tokens=3)], "max_num_batched_tokens=3 must be at least max_num_seqs=4"),
        ([capacity(num_lanes=5)], "max_num_seqs=4 must be at least the 5 lanes"),
        ([capacity(), capacity(block_size=8)], r"block sizes \[4, 8\]"),
    ],
)
def test_capacities_that_cannot_work(capacities: list[Capacity], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheduler(capacities)
