"""Between the scheduler's dataclasses and the bytes of protos/worker.proto. A plan is encoded once and the same bytes
go to every rank; columns of integers travel as little-endian bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from manta.configs.pooling import Pooling, PoolingKind
from manta.configs.sampling import SamplingParams
from manta.configs.structured_outputs import GrammarKind, StructuredOutputsParams
from manta.protos import sampling_pb2, worker_pb2
from manta.scheduler.types import SeqAdd, StepPlan, StepResult

_GRAMMAR_KINDS: dict[GrammarKind, sampling_pb2.Grammar.Kind] = {
    "json_schema": sampling_pb2.Grammar.JSON_SCHEMA,
    "regex": sampling_pb2.Grammar.REGEX,
    "ebnf": sampling_pb2.Grammar.EBNF,
    "structural_tag": sampling_pb2.Grammar.STRUCTURAL_TAG,
}

_POOLING_KINDS: dict[PoolingKind, sampling_pb2.Pooling.Kind] = {
    "last": sampling_pb2.Pooling.LAST,
    "mean": sampling_pb2.Pooling.MEAN,
    "cls": sampling_pb2.Pooling.CLS,
}


@dataclass(slots=True)
class Reply:
    """What a rank wrote to its stream: a result with the step's times, or an error."""

    result: StepResult
    device_us: int
    idle_us: int
    queue_us: int
    error: str


def encode_plan(plan: StepPlan) -> bytes:
    """A serialized manta.worker.v1.StepPlan."""
    return worker_pb2.StepPlan(
        epoch=plan.epoch,
        step=plan.step,
        lane=plan.lane,
        frees=_uint32_bytes(plan.frees),
        adds=[_encode_add(add) for add in plan.adds],
        grow=chain.from_iterable(plan.grow),
        copies=_uint32_bytes(list(chain.from_iterable(plan.copies))),
        holds=_uint32_bytes(plan.holds),
        prefill_slots=_uint32_bytes([slot for slot, _ in plan.prefill]),
        prefill_lengths=_uint32_bytes([length for _, length in plan.prefill]),
    ).SerializeToString()


def _encode_add(add: SeqAdd) -> worker_pb2.SeqAdd:
    return worker_pb2.SeqAdd(
        slot=add.slot,
        lane=add.lane,
        tokens=int32_bytes(add.tokens),
        num_prompt_tokens=add.num_prompt_tokens,
        num_computed=add.num_computed,
        max_length=add.max_length,
        blocks=_uint32_bytes(add.blocks),
        sampling=add.sampling,
        pooling=add.pooling,
    )


def decode_reply(message: bytes) -> Reply:
    """Parses a serialized manta.worker.v1.StepResult."""
    reply = worker_pb2.StepResult.FromString(message)
    result = StepResult(epoch=reply.epoch, step=reply.step, tokens=np.frombuffer(reply.tokens, "<i4"))
    if reply.logprobs:
        result.logprobs = reply.logprobs
    if reply.vectors:
        result.vectors = reply.vectors
    return Reply(result, reply.device_us, reply.idle_us, reply.queue_us, reply.error)


def encode_sampling(params: SamplingParams, bad_words: Sequence[Sequence[int]] = ()) -> sampling_pb2.Sampling:
    """`params.seed` must be set; bad_words: the tokens of params.bad_words. The ids that end the request are left to
    the engine, which knows the model's."""
    if params.seed is None:
        raise ValueError("the seed must be resolved before a request is sent")
    return sampling_pb2.Sampling(
        temperature=0.0 if params.is_greedy else params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed % 2**64,
        min_tokens=params.min_tokens,
        num_logprobs=params.logprobs,
        num_prompt_logprobs=params.prompt_logprobs,
        allowed_token_ids=int32_bytes(params.allowed_token_ids) if params.allowed_token_ids else b"",
        bad_words=[int32_bytes(word) for word in bad_words],
        bias_token_ids=int32_bytes(list(params.logit_bias)) if params.logit_bias else b"",
        biases=np.array(list(params.logit_bias.values()), "<f4").tobytes() if params.logit_bias else b"",
        grammar=_encode_grammar(params.structured_outputs) if params.structured_outputs else None,
    )


def encode_pooling(params: Pooling) -> sampling_pb2.Pooling:
    return sampling_pb2.Pooling(
        kind=_POOLING_KINDS[params.kind], num_dims=params.dimensions, normalizes=params.normalize
    )


def _encode_grammar(constraint: StructuredOutputsParams) -> sampling_pb2.Grammar:
    kind, text = constraint.grammar_text()
    return sampling_pb2.Grammar(kind=_GRAMMAR_KINDS[kind], text=text)


def int32_bytes(values: object) -> bytes:
    """Little-endian int32 of a sequence or array of integers."""
    return np.asarray(values, "<i4").tobytes()


def _uint32_bytes(values: list[int]) -> bytes:
    return np.array(values, "<u4").tobytes() if values else b""
