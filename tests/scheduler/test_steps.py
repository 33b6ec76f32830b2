"""What is in a step: order, chunks, run-ahead, ends."""

import numpy as np
import pytest

from manta.scheduler.types import StepResult, WrongResultError
from tests.support.deployment import Deployment, capacity, request


def test_decodes_first_then_prefills_then_admissions() -> None:
    deployment = Deployment(capacity(max_num_batched_tokens=8))
    deployment.add(request(0, 3, max_tokens=10))
    deployment.step()
    deployment.add(request(1, 10))
    deployment.add(request(2, 5))
    first, second = deployment.step(), deployment.step()
    assert first is not None
    assert second is not None
    slot = deployment.scheduler.snapshot().sequences[1].slot
    assert (first.num_decodes, first.prefill) == (1, [(slot, 7)])  # no room for request 2
    assert second.num_decodes == 1
    assert second.prefill == [(slot, 3), (second.adds[0].slot, 4)]
    deployment.run()
    deployment.assert_all_as_alone()


def test_a_long_prompt_never_stalls_a_stream() -> None:
    deployment = Deployment(capacity(max_num_batched_tokens=6))
    deployment.add(request(0, 3, max_tokens=20))
    deployment.step()
    deployment.add(request(1, 40, max_tokens=2))
    for num_tokens in range(2, 9):
        deployment.step()
        assert len(deployment.tokens[0]) == num_tokens
    deployment.run()
    deployment.assert_all_as_alone()


def test_without_chunked_prefill_a_prompt_waits_for_a_step_with_room() -> None:
    deployment = Deployment(capacity(max_num_batched_tokens=8), enable_chunked_prefill=False)
    for id in range(2):
        deployment.add(request(id, 5))
    first, second = deployment.step(), deployment.step()
    assert first is not None
    assert second is not None
    assert [count for _, count in first.prefill] == [5]
    assert (second.num_decodes, [count for _, count in second.prefill]) == (1, [5])
    deployment.run()
    deployment.assert_all_as_alone()


def test_a_pure_decode_step_carries_nothing() -> None:
    deployment = Deployment(capacity())
    for id in range(3):
        deployment.add(request(id, 5, max_tokens=10))
    deployment.step()
    deployment.step()
    plan = deployment.step()
    assert plan is not None
    differences = (plan.frees, plan.adds, plan.grow, plan.copies, plan.holds, plan.prefill)
    assert all(not difference for difference in differences)
    assert (plan.num_decodes, plan.num_tokens) == (3, 3)


def test_as_many_plans_in_flight_as_lanes_and_one() -> None:
    for num_lanes in (1, 2, 3):
        deployment = Deployment(capacity(num_lanes=num_lanes))
        deployment.add(request(0, 5, max_tokens=20))
        sent = 0
        while deployment.send() is not None:
            sent += 1
        assert sent == num_lanes + 1 == deployment.scheduler.num_in_flight()


def test_the_token_after_a_stop_token_is_dropped() -> None:
    deployment = Deployment(capacity())
    alone = Deployment(capacity())
    alone.add(request(0, 5, max_tokens=6))
    alone.run()
    stop = alone.tokens[0][2]
    assert stop not in alone.tokens[0][:2]
    deployment.add(request(0, 5, max_tokens=6, stop_token_ids=frozenset({stop})))
    deployment.send()
    for _ in range(3):
        deployment.send()
        deployment.deliver()
    assert deployment.finished[0].reason == "stop"
    assert deployment.scheduler.num_in_flight() == 1
    assert deployment.scheduler.num_free_blocks() < 32  # the surplus token is still being computed in them
    deployment.deliver()
    assert deployment.scheduler.num_free_blocks() == 32
    deployment.assert_all_as_alone()


def test_a_stop_token_before_min_tokens_is_one_like_any_other() -> None:
    alone = Deployment(capacity())
    alone.add(request(0, 5, max_tokens=6))
    alone.run()
    for min_tokens in range(7):
        deployment = Deployment(capacity())
        fields = {"stop_token_ids": frozenset(alone.tokens[0]), "min_tokens": min_tokens}
        deployment.add(request(0, 5, max_tokens=6, **fields))
        deployment.run()
        assert len(deployment.tokens[0]) == max(1, min(min_tokens, 6))
        assert deployment.finished[0].reason == "stop" if min_tokens <= 6 else "length"


def test_stop_ids_beyond_any_vocabulary() -> None:
    deployment = Deployment(capacity())
    deployment.add(request(0, 5, stop_token_ids=frozenset({2**31 - 1, 2**20})))
    deployment.run()
    assert deployment.finished[0].reason == "length"


def test_the_context_ends_a_request() -> None:
    deployment = Deployment(capacity(max_model_len=12))
    deployment.add(request(0, 9, max_tokens=100))
    deployment.run()
    assert len(deployment.tokens[0]) == 3
    deployment.assert_all_as_alone()


def test_sequences_longer_than_the_first_token_store() -> None:
    deployment = Deployment(capacity(max_model_len=1000, num_blocks=400, max_num_batched_tokens=256))
    deployment.add(request(0, 250, max_tokens=20))
    deployment.run()
    deployment.add(request(1, 600, max_tokens=3))
    deployment.run()
    deployment.assert_all_as_alone()


def test_abort_in_every_state() -> None:
    for num_steps in range(6):
        deployment = Deployment(capacity(max_num_batched_tokens=4, max_num_seqs=2))
        for id in range(3):
            deployment.add(request(id, 6, max_tokens=3))
        for _ in range(num_steps):
            deployment.send()
            deployment.send()
            deployment.deliver()
        for id in range(3):
            if id not in deployment.finished:
                deployment.abort(id)
                assert deployment.finished[id].reason == "abort"
        deployment.run()
        deployment.assert_all_as_alone()


def test_abort_of_an_unknown_request_does_nothing() -> None:
    deployment = Deployment(capacity())
    events = deployment.scheduler.abort(7)
    assert (len(events.request_ids), len(events.tokens), events.started, events.finished) == (0, 0, [], [])


def test_answers_that_do_not_fit_are_refused_and_change_nothing() -> None:
    deployment = Deployment(capacity())
    scheduler = deployment.scheduler
    with pytest.raises(WrongResultError, match=r"answered step 1 of epoch 1; awaited: none"):
        scheduler.apply(StepResult(1, 1, np.array([1], np.int32)))
    deployment.add(request(0, 5))
    deployment.send()
    with pytest.raises(WrongResultError, match=r"answered step 2 of epoch 1; awaited: step 1 of epoch 1"):
        scheduler.apply(StepResult(1, 2, np.array([1], np.int32)))
    with pytest.raises(WrongResultError, match=r"sampled 2 tokens in step 1, the plan has 1"):
        scheduler.apply(StepResult(1, 1, np.array([1, 2], np.int32)))
    deployment.run()
    deployment.assert_all_as_alone()


def test_a_reset_keeps_order_and_tokens_and_ignores_late_answers() -> None:
    deployment = Deployment(capacity(max_num_seqs=3))
    for id in range(5):
        deployment.add(request(id, 5, max_tokens=8))
    deployment.step()
    deployment.step()
    deployment.send()
    deployment.reset()
    assert all(len(deployment.tokens[id]) == 2 for id in range(3))
    waiting = deployment.scheduler.snapshot().sequences
    assert [(each.request_id, each.num_tokens) for each in waiting] == [(0, 7), (1, 7), (2, 7), (3, 5), (4, 5)]
    plan = deployment.send()
    assert plan is not None
    assert (plan.epoch, plan.step, plan.frees) == (2, 1, [])
    deployment.run()
    deployment.assert_all_as_alone()


def test_events_of_plan_come_with_the_next_answer_or_when_asked_for() -> None:
    deployment = Deployment(capacity())
    scheduler = deployment.scheduler
    for id in range(2):
        scheduler.add(request(id, 5))
    deployment.send()
    assert [each.request.id for each in scheduler.take_events().started] == [0, 1]
    scheduler.add(request(2, 5))
    deployment.send()
    events = scheduler.apply(deployment.workers[0].deliver())
    assert [each.request.id for each in events.started] == [2]
    assert events.request_ids.tolist() == [0, 1]
