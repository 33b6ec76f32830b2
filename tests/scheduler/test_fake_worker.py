"""The fake worker refuses what breaks the protocol: else the property tests would prove nothing."""

from dataclasses import replace

import numpy as np
import pytest

from manta.scheduler.types import SeqAdd, StepPlan, Tokens
from tests.support.deployment import VOCAB_SIZE, capacity
from tests.support.fake_worker import FakeWorker, WrongPlanError, generate_alone

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
EMPTY = StepPlan(1, 1, 0, [], [], [], [], [], [], 0, 0)


def seq_add(slot: int, blocks: list[int], num_computed: int = 0, tokens: Tokens = PROMPT, lane: int = 0) -> SeqAdd:
    return SeqAdd(slot, lane, tokens, len(tokens), num_computed, 12, blocks, None)


def worker() -> FakeWorker:
    """Slots 0 and 1 decode; their steps 1 and 2 are answered, step 3 is not."""
    worker = FakeWorker(capacity(block_size=4, num_blocks=8, num_lanes=2), VOCAB_SIZE)
    adds = [seq_add(0, [0, 1]), seq_add(1, [2, 3])]
    worker.submit(replace(EMPTY, adds=adds, prefill=[(0, 5), (1, 5)], num_tokens=10))
    worker.submit(replace(EMPTY, step=2, num_decodes=2, num_tokens=2))
    worker.submit(replace(EMPTY, step=3, num_decodes=2, num_tokens=2))
    worker.deliver()
    worker.deliver()
    return worker


def plan(**fields: object) -> StepPlan:
    return replace(EMPTY, **({"step": 4, "num_decodes": 2, "num_tokens": 2} | fields))  # type: ignore[arg-type]


def test_it_says_what_a_request_gets_alone() -> None:
    running = worker()
    results = [running.deliver()]
    running.submit(plan())
    results.append(running.deliver())
    expected = generate_alone(PROMPT, 4, None, VOCAB_SIZE)
    assert [result.tokens.tolist() for result in results] == [[token, token] for token in expected[2:]]


def test_what_is_read_from_memory_decides() -> None:
    said = []
    for damage in (0, 1):
        running = worker()
        running.kv[0, 2] += damage
        running.deliver()
        running.submit(plan())
        said.append(running.deliver().tokens.tolist())
    assert said[0][0] != said[1][0]
    assert said[0][1] == said[1][1]


def adding(*blocks: int, slot: int = 2, num_computed: int = 0, lane: int = 0) -> StepPlan:
    add = seq_add(slot, list(blocks), num_computed, lane=lane)
    return plan(adds=[add], prefill=[(slot, 5 - num_computed)], num_tokens=7 - num_computed)


def test_shared_full_blocks_and_copied_ones_are_fine() -> None:
    worker().submit(adding(0, 5, num_computed=4))
    worker().submit(replace(adding(5, 6, num_computed=3), copies=[(0, 5)]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (plan(step=5), "step 5 after 3"),
        (plan(epoch=0), "epoch 0 after 1"),
        (plan(lane=2), "lane 2 of 2"),
        (plan(lane=1, num_decodes=0, num_tokens=0), "an empty step"),
        (plan(frees=[2]), "slot 2 is unknown"),
        (plan(grow=[(2, 4)]), "slot 2 is unknown"),
        (plan(prefill=[(2, 1)]), "slot 2 is unknown"),
        (plan(holds=[2]), "slot 2 is held and has no decode row"),
        (plan(holds=[1, 1]), "held twice"),
        (plan(holds=[1]), "num_decodes is 2, there are 1"),
        (plan(num_tokens=3), "num_tokens is 3, rows have 2"),
        (plan(prefill=[(1, 1)]), "has a prefill row and decodes"),
        (plan(grow=[(0, 2)]), "block 2 is given to slot 0 and is in another table"),
        (plan(grow=[(0, 9)]), "block 9 does not exist"),
        (adding(5, 6, slot=0), "slot 0 is taken twice"),
        (adding(5, 6, slot=4), "slot 4 does not exist"),
        (adding(5, 5), "has a block twice"),
        (adding(0, 6), "block 0 is given to slot 2 and is in another table"),
        (adding(0, 1, num_computed=4), "block 1 is given to slot 2 and is in another table"),
        (adding(5, num_computed=0), "5 tokens in 1 blocks"),
        (adding(5, 6, num_computed=4), "never written"),
        (adding(5, 6, lane=1), "slot 2 is in lane 1, the step in 0"),
        (adding(5, 6, num_computed=5), "5 of 5 are computed"),
        (replace(adding(5, 6), prefill=[(2, 6)]), "computes 6 tokens, 5 are left"),
        (replace(adding(5, 6), prefill=[(2, 2), (2, 3)]), "two prefill rows"),
        (replace(adding(5, 6), prefill=[]), "added and not run"),
        (replace(adding(0, 1, slot=0), frees=[0]), "slot 0 is still in flight"),
        (replace(adding(0, 6), frees=[0]), "block 0 is given to slot 2, step 3 uses it"),
    ],
)
def test_it_refuses(wrong: StepPlan, message: str) -> None:
    with pytest.raises(WrongPlanError, match=message):
        worker().submit(wrong)


def test_it_refuses_a_write_to_a_block_that_another_slot_reads() -> None:
    running = worker()
    running.slots[1].blocks[1] = 1
    running.readers[1] += 1
    with pytest.raises(WrongPlanError, match="slot 0 writes to block 1, which another slot reads"):
        running.submit(plan())


def test_it_refuses_a_decode_without_a_block() -> None:
    running = worker()
    running.submit(plan())
    with pytest.raises(WrongPlanError, match="9 tokens in 2 blocks"):
        running.submit(plan(step=5))


def test_it_refuses_too_many_plans_in_flight_and_too_many_tokens() -> None:
    running = worker()
    for step in (4, 5):
        running.submit(plan(step=step, holds=[step - 4], num_decodes=1, num_tokens=1))
    with pytest.raises(WrongPlanError, match="too many plans in flight"):
        running.submit(plan(step=6))
    tokens = np.zeros(15, np.int32)
    add = replace(seq_add(2, [4, 5, 6, 7], tokens=tokens), max_length=20)
    with pytest.raises(WrongPlanError, match="17 tokens exceed the budget"):
        worker().submit(plan(adds=[add], prefill=[(2, 15)], num_tokens=17))


def test_a_new_epoch_clears_everything() -> None:
    running = worker()
    running.submit(replace(adding(0, 1), epoch=2, step=1, num_decodes=0, num_tokens=5))
    assert running.num_in_flight == 1
    assert running.deliver().epoch == 2


@pytest.mark.parametrize("count", [1, 4])
def test_without_chunked_prefill_it_refuses_chunks(count: int) -> None:
    running = FakeWorker(capacity(), enable_chunked_prefill=False)
    chunk = replace(EMPTY, adds=[seq_add(0, [0, 1])], prefill=[(0, count)], num_tokens=count)
    with pytest.raises(WrongPlanError, match="without chunked prefill"):
        running.submit(chunk)
