"""Records of log-probabilities: of whom, once each, and only as many as were asked for."""

from dataclasses import replace

import pytest

from manta.scheduler.types import Request, WrongResultError
from tests.support.deployment import Deployment, capacity, request
from tests.support.fake_worker import Asking


def asking(
    id: int, prompt: int | list[int], num_logprobs: int | None, num_prompt: int | None, **fields: int
) -> Request:
    sampling = Asking("", num_logprobs, num_prompt)
    return request(id, prompt, sampling=sampling, num_logprobs=num_logprobs, num_prompt_logprobs=num_prompt, **fields)


def test_rows_that_ask_and_rows_that_do_not_share_steps() -> None:
    deployment = Deployment(capacity(max_num_batched_tokens=6))
    deployment.add(request(0, 5))
    deployment.add(asking(1, 11, 2, None))
    deployment.add(asking(2, 11, None, 1))
    deployment.add(asking(3, 1, 0, 0))
    deployment.run()
    deployment.assert_all_as_alone()
    assert not deployment.records[0]
    assert len(deployment.records[1]) == 4 * 4 * (2 + 2 * 2)
    assert len(deployment.prompt_records[2]) == 10 * 4 * (2 + 2)
    assert (len(deployment.prompt_records[3]), len(deployment.records[3])) == (0, 4 * 4 * 2)


def test_a_prompt_that_is_asked_about_is_computed_although_it_is_cached() -> None:
    deployment = Deployment(capacity())
    prompt = list(range(12))
    deployment.add(request(0, prompt, sampling=Asking()))
    deployment.run()
    deployment.add(asking(1, prompt, None, 0))
    deployment.add(asking(2, prompt, 3, None))
    deployment.run()
    deployment.assert_all_as_alone()
    assert deployment.started[1].num_cached_tokens == 0
    assert deployment.started[2].num_cached_tokens > 0


def test_after_a_reset_a_prompt_goes_on_where_it_was() -> None:
    deployment = Deployment(capacity(max_num_batched_tokens=4))
    deployment.add(asking(1, 14, 1, 1, max_tokens=6))
    for _ in range(2):
        deployment.step()
    told = deployment.prompt_records[1]
    assert len(told) == 8 * 16
    deployment.reset()
    deployment.run()
    deployment.assert_all_as_alone()
    assert deployment.prompt_records[1].startswith(told)


@pytest.mark.parametrize("change", [b"", bytes(8), bytes(20)])
def test_an_answer_with_too_little_or_too_much_is_refused(change: bytes) -> None:
    deployment = Deployment(capacity())
    deployment.add(asking(1, 4, 1, None))
    deployment.send()
    answer = deployment.workers[0].deliver()
    with pytest.raises(
        WrongResultError, match=f"sent {len(change)} bytes of log-probabilities in step 1.* asked for 16"
    ):
        deployment.scheduler.apply(replace(answer, logprobs=change))
    deployment.scheduler.apply(answer)


def test_an_answer_to_nobody_who_asked_is_refused() -> None:
    deployment = Deployment(capacity())
    deployment.add(request(1, 4))
    deployment.send()
    answer = deployment.workers[0].deliver()
    with pytest.raises(WrongResultError, match="sent 16 bytes of log-probabilities"):
        deployment.scheduler.apply(replace(answer, logprobs=bytes(16)))
