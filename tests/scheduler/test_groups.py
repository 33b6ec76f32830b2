"""Samples of one prompt and beams of one search: each gets what it would have got alone, and they share blocks."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manta.scheduler.beam_search import BeamParams
from manta.scheduler.types import Capacity, QueueFullError, RefusedError, Request, TooLongError
from tests.scheduler.test_property import PREFIXES, adds, capacities, options
from tests.support.deployment import VOCAB_SIZE, Deployment, capacity, request
from tests.support.fake_worker import Asking


def siblings(prompt: int | list[int], n: int, first_id: int = 0, **fields: Any) -> list[Request]:
    tokens = list(range(1, prompt + 1)) if isinstance(prompt, int) else prompt
    return [request(first_id + i, tokens, sampling=Asking(), **fields) for i in range(n)]


def beams(
    prompt: int | list[int], n: int, width: int, first_id: int = 0, **fields: Any
) -> tuple[list[Request], BeamParams]:
    params = {
        name: fields.pop(name) for name in ("length_penalty", "early_stopping", "end_token_ids") if name in fields
    }
    num_candidates = width + len(params.get("end_token_ids", ()))
    tokens = list(range(1, prompt + 1)) if isinstance(prompt, int) else prompt
    sampling = Asking("", num_candidates, None, searches=True)
    requests = [request(first_id + i, tokens, sampling=sampling, **fields) for i in range(n)]
    return requests, BeamParams(width, num_candidates, **params)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8, 23])
@pytest.mark.parametrize("max_tokens", [1, 6])
def test_a_prompt_is_computed_once_for_all_its_samples(caching: bool, num_prompt: int, max_tokens: int) -> None:
    deployment = Deployment(capacity(max_num_seqs=8, num_blocks=64), enable_prefix_caching=caching)
    deployment.add_group(siblings(num_prompt, 4, max_tokens=max_tokens))
    deployment.run()
    deployment.assert_all_as_alone()
    # Each of the others computes the prompt's last token once more, to draw from it.
    assert deployment.workers[0].num_computed_tokens == num_prompt + 3 + 4 * (max_tokens - 1)
    assert [deployment.started[id].is_follower for id in range(4)] == [False, True, True, True]


def test_samples_share_the_full_blocks_of_the_prompt_and_copy_the_last() -> None:
    deployment = Deployment(capacity(max_num_seqs=8), enable_prefix_caching=False)
    deployment.add_group(siblings(10, 3, max_tokens=8))
    deployment.send()
    plan = deployment.send()
    assert plan is not None
    assert len(plan.copies) == 2
    tables = [sequence.blocks for sequence in deployment.scheduler.snapshot().sequences]
    assert len({tuple(table[:2]) for table in tables}) == 1
    assert len({table[2] for table in tables}) == 3
    deployment.run()
    deployment.assert_all_as_alone()


def test_another_leads_when_the_leader_is_aborted() -> None:
    deployment = Deployment(capacity(max_num_batched_tokens=4))
    deployment.add_group(siblings(10, 3))
    deployment.abort(0)  # waiting
    deployment.step()
    deployment.abort(1)  # in the midst of its prompt
    deployment.run()
    deployment.assert_all_as_alone()


def test_more_samples_than_slots() -> None:
    deployment = Deployment(capacity(max_num_seqs=3))
    deployment.add_group(siblings(9, 8))
    deployment.run()
    deployment.assert_all_as_alone()


def test_a_group_is_taken_whole_or_not_at_all() -> None:
    deployment = Deployment(capacity(), max_num_queued_reqs=1)
    deployment.add(request(9, 4))
    with pytest.raises(QueueFullError):
        deployment.add_group(siblings(4, 2))
    deployment.run()
    with pytest.raises(ValueError, match="in use"):
        deployment.add_group([request(1, 4), request(1, 4)])
    assert not deployment.scheduler.num_waiting
    with pytest.raises(TooLongError, match="4 beams need up to 34 blocks"):
        deployment.add_search(*beams(9, 1, 4, max_tokens=32))


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_searches_find_what_they_would_alone(width: int, early_stopping: Any, caching: bool) -> None:
    deployment = Deployment(
        capacity(max_num_seqs=8, num_blocks=64, max_num_batched_tokens=20), enable_prefix_caching=caching
    )
    for id, length_penalty in enumerate([0.0, 1.0, -0.5]):
        deployment.add_search(
            *beams(
                5 + id,
                width,
                width,
                10 * id,
                max_tokens=9,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                end_token_ids=frozenset({3, 11}),
                min_tokens=id,
            )
        )
    deployment.add(request(99, 3, max_tokens=12))
    deployment.run()
    deployment.assert_all_as_alone()


def test_beams_share_blocks_and_others_do_not_wait_for_them() -> None:
    deployment = Deployment(capacity(max_num_seqs=8, num_blocks=64), enable_prefix_caching=False)
    deployment.add_search(*beams(13, 4, 4, max_tokens=12))
    deployment.add(request(99, 3, max_tokens=24))
    num_shared = num_steps = 0
    while 0 not in deployment.finished:
        plan = deployment.send()
        assert plan is not None
        assert plan.num_decodes + (99 not in deployment.started) + bool(num_steps == 0) >= 1
        if deployment.workers[0].num_in_flight == 2:
            deployment.deliver()
        counts = deployment.scheduler._replicas[0].pool.refs
        num_shared += sum(count > 1 for count in counts)
        num_steps += 1
    assert num_shared >= 3 * (num_steps - 6)  # three full blocks of the prompt
    deployment.run()
    deployment.assert_all_as_alone()


def test_an_aborted_search_gives_everything_back() -> None:
    for num_steps in range(8):
        deployment = Deployment(capacity(max_num_seqs=8))
        deployment.add_search(*beams(13, 2, 3, max_tokens=8))
        for _ in range(num_steps):
            deployment.send()
            if deployment.workers[0].num_in_flight == 2:
                deployment.deliver()
        deployment.abort(0)
        deployment.abort(1)
        deployment.run()
        deployment.assert_all_as_alone()


@st.composite
def groups(draw: st.DrawFn) -> tuple[str, list[int], int, dict[str, Any]]:
    kind = draw(st.sampled_from(["group", "search"]))
    prompt = draw(st.sampled_from(PREFIXES))[: draw(st.integers(1, 12))]
    fields: dict[str, Any] = {"max_tokens": draw(st.integers(1, 10)), "min_tokens": draw(st.integers(0, 3))}
    fields["priority"] = draw(st.integers(0, 2))
    ends = draw(st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=3))
    if kind == "group":
        fields["stop_token_ids"] = ends
    else:
        fields["end_token_ids"] = ends
        fields["early_stopping"] = draw(st.sampled_from([True, False, "never"]))
        fields["length_penalty"] = draw(st.sampled_from([0.0, 1.0, -1.0, 2.0]))
    return kind, prompt, draw(st.integers(1, 4)), fields


OPERATIONS = st.one_of(
    groups(),
    adds(),
    st.sampled_from(["send", "send", "deliver"]),
    st.sampled_from(["send", "deliver"]),
    st.sampled_from(["send", "deliver", "send", "deliver", "send", "deliver", "abort", "reset"]),
)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5).flatmap(lambda block_size: st.lists(capacities(block_size), min_size=1, max_size=2)),
    options(),
    st.lists(st.tuples(OPERATIONS, st.integers(0, 1000)), min_size=10, max_size=60),
)
def test_groups_among_others_get_what_they_would_alone(
    replicas: list[Capacity], options: dict[str, Any], operations: list[tuple[Any, int]]
) -> None:
    deployment = Deployment(*replicas, **options)
    for number, (operation, choice) in enumerate(operations):
        replica, id = choice % len(replicas), 10 * number
        match operation:
            case ("group", prompt, n, fields):
                try:
                    deployment.add_group(siblings(prompt, n, id, **fields))
                except RefusedError:
                    assert id not in deployment.requests
            case ("search", prompt, n, fields):
                try:
                    deployment.add_search(*beams(prompt, 1 + choice % n, n, id, **fields))
                except RefusedError:
                    assert id not in deployment.requests
            case "send":
                deployment.send(replica)
            case "deliver":
                deployment.deliver(replica)
            case "abort":
                known = list(deployment.requests)
                deployment.abort(known[choice % len(known)] if known else 0)
            case "reset":
                deployment.reset(replica)
            case add:
                try:
                    deployment.add(Request(id, np.array(add.prompt, np.int32), **add.fields))
                except RefusedError:
                    assert id not in deployment.requests
    deployment.run()
    deployment.assert_all_as_alone()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["fcfs", "priority"]),
    st.lists(
        st.tuples(st.integers(1, 10), st.integers(1, 8), st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=4
    ),
)
@example(2, 1, True, "fcfs", [(1, 6, 3, 0), (3, 5, 2, 0), (1, 5, 2, 0)])  # a block is copied to, filled and found
def test_all_searches_end_in_a_pool_that_holds_just_the_largest(
    block_size: int, num_lanes: int, caching: bool, policy: str, sizes: list[tuple[int, int, int, int]]
) -> None:
    num_blocks = 0
    for num_prompt, max_tokens, width, _ in sizes:
        shared = num_prompt // block_size
        num_blocks = max(num_blocks, shared + width * (-(-(num_prompt + max_tokens - 1) // block_size) - shared))
    deployment = Deployment(
        Capacity(num_blocks, block_size, 6, 24, 64, num_lanes), enable_prefix_caching=caching, policy=policy
    )
    for number, (num_prompt, max_tokens, width, priority) in enumerate(sizes):
        prompt = PREFIXES[number % 2][:num_prompt]
        deployment.add_search(
            *beams(
                prompt,
                width,
                width,
                10 * number,
                max_tokens=max_tokens,
                priority=priority,
                end_token_ids=frozenset({3}),
            )
        )
    deployment.run()
    deployment.assert_all_as_alone()
