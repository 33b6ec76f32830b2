"""Plans and results against the proto contract."""

import numpy as np
import pytest

from manta.cluster.engine.codec import decode_reply, encode_plan, encode_sampling
from manta.configs.sampling import SamplingParams
from manta.protos import sampling_pb2, worker_pb2
from manta.scheduler.types import SeqAdd, StepPlan


def uint32s(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def test_a_plan_has_every_field_in_the_contracts_form() -> None:
    sampling = sampling_pb2.Sampling(temperature=0.5, seed=2**64 - 1)
    add = SeqAdd(
        slot=3,
        lane=1,
        tokens=np.array([1, 70000, 2], np.int32),
        num_prompt_tokens=2,
        num_computed=1,
        max_length=9,
        blocks=[4, 2**32 - 1],
        sampling=sampling,
    )
    plan = StepPlan(
        epoch=2, step=2**40, lane=1, frees=[5, 6], adds=[add], grow=[(1, 2), (3, 4)], copies=[(7, 8)], holds=[9],
        prefill=[(3, 2), (10, 64)], num_decodes=4, num_tokens=70,
    )  # fmt: skip
    message = worker_pb2.StepPlan.FromString(encode_plan(plan))
    assert (message.epoch, message.step, message.lane) == (2, 2**40, 1)
    assert uint32s(message.frees) == [5, 6]
    assert list(message.grow) == [1, 2, 3, 4]
    assert uint32s(message.copies) == [7, 8]
    assert uint32s(message.holds) == [9]
    assert uint32s(message.prefill_slots) == [3, 10]
    assert uint32s(message.prefill_lengths) == [2, 64]
    (sent,) = message.adds
    assert (sent.slot, sent.lane, sent.num_prompt_tokens, sent.num_computed, sent.max_length) == (3, 1, 2, 1, 9)
    assert uint32s(sent.tokens) == [1, 70000, 2]
    assert uint32s(sent.blocks) == [4, 2**32 - 1]
    assert sent.sampling == sampling


def test_a_pure_decode_step_costs_a_few_bytes() -> None:
    plan = StepPlan(1, 100, 0, [], [], [], [], [], [], num_decodes=256, num_tokens=256)
    assert len(encode_plan(plan)) <= 8


def test_a_result_comes_back() -> None:
    tokens = np.array([0, 1, 2**31 - 1], "<i4").tobytes()
    message = worker_pb2.StepResult(epoch=3, step=8, tokens=tokens, device_us=5, idle_us=6, queue_us=7, error="why")
    reply = decode_reply(message.SerializeToString())
    assert (reply.result.epoch, reply.result.step, reply.result.tokens.tolist()) == (3, 8, [0, 1, 2**31 - 1])
    assert (reply.device_us, reply.idle_us, reply.queue_us, reply.error) == (5, 6, 7, "why")


@pytest.mark.parametrize(("temperature", "sent"), [(0.0, 0.0), (1e-6, 0.0), (0.5, 0.5)])
def test_sampling_defaults_are_resolved(temperature: float, sent: float) -> None:
    message = encode_sampling(SamplingParams.model_validate({"temperature": temperature, "top_k": -1, "seed": -1}))
    assert message.temperature == sent
    assert (message.top_k, message.top_p, message.repetition_penalty) == (0, 1.0, 1.0)
    assert message.seed == 2**64 - 1


def test_an_unresolved_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        encode_sampling(SamplingParams.model_validate({}))
