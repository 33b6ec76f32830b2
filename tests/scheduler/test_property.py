"""Whatever arrives and whatever happens, each request gets the tokens it would have got alone, and the books agree."""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.scheduler.types import Capacity, Pooling, RefusedError, Request
from tests.support.deployment import VOCAB_SIZE, Deployment
from tests.support.fake_worker import Asking

PREFIXES = [[7, 3, 11, 3, 5, 2, 19, 8, 1, 1, 4, 13], [7, 3, 11, 3, 9, 9, 9, 0, 6, 12, 17, 2], [0] * 12]


@dataclass
class Add:
    prompt: list[int]
    fields: dict[str, Any]


@st.composite
def capacities(draw: st.DrawFn, block_size: int) -> Capacity:
    num_lanes = draw(st.integers(1, 3))
    max_num_seqs = draw(st.integers(num_lanes, 6))
    return Capacity(
        num_blocks=draw(st.integers(2, 12)) * -(-4 // block_size),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(max_num_seqs, 24)),
        max_model_len=draw(st.integers(4, 40)),
        num_lanes=num_lanes,
    )


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "policy": draw(st.sampled_from(["fcfs", "priority", "fair"])),
        "enable_prefix_caching": draw(st.booleans()),
        "enable_chunked_prefill": draw(st.booleans()),
    }


@st.composite
def adds(draw: st.DrawFn) -> Add:
    shared = draw(st.sampled_from(PREFIXES))[: draw(st.integers(0, 12))]
    prompt = shared + draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=0 if shared else 1, max_size=12))
    adapter, salt = draw(st.sampled_from([("", b""), ("", b""), ("lora", b""), ("", b"tenant")]))
    asked = draw(st.sampled_from([(None, None), (None, None), (0, None), (None, 2), (3, 0)]))
    fields = {
        "max_tokens": draw(st.integers(1, 16)),
        "sampling": Asking(adapter, *asked),
        "num_logprobs": asked[0],
        "num_prompt_logprobs": asked[1],
        "adapter": adapter,
        "salt": salt,
        "stop_token_ids": draw(st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=3)),
        "min_tokens": draw(st.integers(0, 3)),
        "priority": draw(st.integers(0, 2)),
        "tenant": draw(st.sampled_from(["", "a", "b"])),
    }
    kind = draw(st.sampled_from([None, None, None, "last", "mean"]))
    if kind is not None:
        asks_nothing = {"sampling": Asking(adapter), "num_logprobs": None, "num_prompt_logprobs": None}
        fields |= asks_nothing | {"max_tokens": 0, "pooling": Pooling(8, kind == "mean", kind)}
    return Add(prompt, fields)


OPERATIONS = st.one_of(
    adds(),
    st.sampled_from(["send", "send", "deliver"]),
    st.sampled_from(["send", "deliver"]),
    st.sampled_from(["send", "deliver", "send", "deliver", "send", "deliver", "abort", "reset", "close", "open"]),
)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5).flatmap(lambda block_size: st.lists(capacities(block_size), min_size=1, max_size=3)),
    options(),
    st.lists(st.tuples(OPERATIONS, st.integers(0, 1000)), min_size=10, max_size=100),
    st.sampled_from(["all", "one is left", "one is planned"]),
    st.integers(0, 2),
)
def test_everyone_gets_what_it_would_have_got_alone(
    replicas: list[Capacity], options: dict[str, Any], operations: list[tuple[Add | str, int]], end: str, choice: int
) -> None:
    """Replicas plan in any order, are lost and come back. In the end one may be the only one, or the only one that
    anybody plans although the others look better."""
    deployment = Deployment(*replicas, **options)
    for id, (operation, number) in enumerate(operations):
        replica = number % len(replicas)
        match operation:
            case Add(prompt, fields):
                try:
                    deployment.add(Request(id, np.array(prompt, np.int32), **fields))
                except RefusedError:
                    assert id not in deployment.requests
            case "send":
                deployment.send(replica)
            case "deliver":
                deployment.deliver(replica)
            case "abort":
                deployment.abort(number % (id + 1))
            case "reset":
                deployment.reset(replica)
            case "close":
                deployment.close(replica)
            case "open":
                deployment.scheduler.open_replica(replica)
    last = choice % len(replicas)
    deployment.scheduler.open_replica(last)
    if end == "one is left":
        for replica in range(len(replicas)):
            if replica != last:
                deployment.close(replica)
    deployment.run()
    if end == "one is planned":  # others look better, and nobody plans them
        for id, prefix in enumerate(PREFIXES * 2, len(operations)):
            with suppress(RefusedError):
                deployment.add(Request(id, np.array([*prefix, id % VOCAB_SIZE], np.int32), 2, Asking("")))
        deployment.run([last])
    deployment.assert_all_as_alone()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["fcfs", "priority"]),
    st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10), st.integers(0, 2)), min_size=2, max_size=8),
)
def test_all_end_in_a_pool_that_holds_just_the_longest(
    block_size: int, num_lanes: int, caching: bool, policy: str, sizes: list[tuple[int, int, int]]
) -> None:
    longest = max(num_prompt + max_tokens - 1 for num_prompt, max_tokens, _ in sizes)
    capacity = Capacity(-(-longest // block_size), block_size, 6, 24, 64, num_lanes)
    deployment = Deployment(capacity, enable_prefix_caching=caching, policy=policy)
    for id, (num_prompt, max_tokens, priority) in enumerate(sizes):
        prompt = np.array(PREFIXES[id % 2][:num_prompt], np.int32)
        deployment.add(Request(id, prompt, max_tokens, priority=priority))
    deployment.run()
    deployment.assert_all_as_alone()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 12), st.integers(1, 3))
def test_a_resubmitted_request_goes_on_where_it_was(lengths: list[int], num_steps: int, num_lanes: int) -> None:
    """The scheduler dies, and the frontends bring their requests, with what was delivered, to the next one."""
    capacity = Capacity(40, 4, 6, 16, 64, num_lanes)
    first, second = Deployment(capacity), Deployment(capacity)
    asked: dict[str, Any] = {"sampling": Asking("", 1, 2), "num_logprobs": 1, "num_prompt_logprobs": 2}
    for id, length in enumerate(lengths):
        prompt, ends = np.array(PREFIXES[0][:length], np.int32), frozenset({id, 11})
        first.add(Request(id, prompt, 8, stop_token_ids=ends, **asked))
    for _ in range(num_steps):
        first.send()
        first.deliver()
    for id, request in first.requests.items():
        if id not in first.finished:
            second.add(replace(request, output=np.array(first.tokens[id], np.int32)))
    second.run()
    second.assert_all_as_alone()
