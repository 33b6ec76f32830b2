"""Prompts that become vectors: each comes once, from a whole computation, whatever happens in between."""

from dataclasses import replace

import pytest

from manta.scheduler.types import TooLongError, WrongResultError
from tests.support.deployment import Deployment, capacity, pooled, request


def test_vectors_and_tokens_come_from_the_same_steps() -> None:
    deployment = Deployment(capacity(max_num_batched_tokens=6))
    deployment.add(request(0, 5))
    deployment.add(pooled(1, 11))
    deployment.add(pooled(2, 4, "last"))
    deployment.add(request(3, 1))
    deployment.run()
    deployment.assert_all_as_alone()
    assert deployment.finished[1].num_output_tokens == 0


def test_a_prompt_may_fill_the_context_and_no_more() -> None:
    deployment = Deployment(capacity(max_model_len=16, num_blocks=4))
    deployment.add(pooled(0, 16))
    with pytest.raises(TooLongError, match="17 tokens, the context holds 16"):
        deployment.add(pooled(1, 17))
    deployment.run()
    deployment.assert_all_as_alone()


@pytest.mark.parametrize(("kind", "num_cached"), [("mean", 0), ("last", 11)])
def test_only_the_last_token_can_do_with_what_is_cached(kind: str, num_cached: int) -> None:
    deployment = Deployment(capacity())
    prompt = list(range(12))
    deployment.add(pooled(0, prompt, kind))
    deployment.run()
    deployment.add(pooled(1, prompt, kind))
    deployment.add(request(2, prompt))
    deployment.run()
    deployment.assert_all_as_alone()
    assert deployment.started[1].num_cached_tokens == num_cached
    assert deployment.started[2].num_cached_tokens == 11  # what it has computed serves others


def test_in_the_midst_of_a_prompt_its_place_or_its_worker_is_lost() -> None:
    deployment = Deployment(capacity(num_blocks=8, block_size=4, max_num_batched_tokens=4))
    deployment.add(request(0, 4, max_tokens=16))
    deployment.step()
    deployment.add(pooled(1, 23))  # 6 blocks, all that are left
    for _ in range(6):
        deployment.step()
    assert deployment.scheduler.counters.num_preemptions == 1
    assert 1 not in deployment.finished
    deployment.run()
    deployment.assert_all_as_alone()
    deployment.add(pooled(2, 23))
    deployment.step()
    deployment.reset()
    deployment.run()
    deployment.assert_all_as_alone()


def test_an_aborted_prompt_gets_no_vector() -> None:
    deployment = Deployment(capacity())
    deployment.add(pooled(0, 9))
    deployment.add(pooled(1, 9))
    deployment.send()
    deployment.abort(0)
    deployment.run()
    deployment.assert_all_as_alone()
    assert [deployment.finished[id].reason for id in (0, 1)] == ["abort", "stop"]


@pytest.mark.parametrize("change", [b"", bytes(7), bytes(16)])
def test_an_answer_with_too_little_or_too_much_is_refused(change: bytes) -> None:
    deployment = Deployment(capacity())
    deployment.add(pooled(0, 9))
    deployment.send()
    result = replace(deployment.workers[0].deliver(), vectors=change)
    with pytest.raises(WrongResultError, match=rf"sent {len(change)} bytes of vectors.*asked for 8"):
        deployment.scheduler.apply(result)
