"""From a frontend's Submit to the scheduler's Request: decoding, checks, and the ids that end the text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from manta.configs.model import NO_LM_HEAD, ModelSpec
from manta.protos import engine_pb2 as pb
from manta.protos import sampling_pb2
from manta.scheduler.beam_search import BeamParams
from manta.scheduler.types import Pooling, RefusedError, Request, Tokens

MAX_RECORDED = 256  # of the best tokens, with each log-probability: what workers can find


_EARLY_STOPPING: dict[int, bool | Literal["never"]] = {
    pb.Beams.HEURISTIC: False,
    pb.Beams.AT_ONCE: True,
    pb.Beams.NEVER: "never",
}


class InvalidSubmitError(RefusedError):
    """A field of the request is out of range; the message is one sentence for the user."""


def build_request(submit: pb.Submit, request_id: int, spec: ModelSpec, now_s: float) -> Request:
    """Raises InvalidSubmitError. A token outside the vocabulary would fault the device and end everybody's epoch."""
    prompt = np.frombuffer(submit.prompt_tokens, "<i4")
    output = np.frombuffer(submit.output_tokens, "<i4")
    _check_tokens(prompt, "the prompt", spec.vocab_size)
    if submit.HasField("pooling"):
        return _build_pooled(submit, prompt, request_id, spec, now_s)
    if not spec.has_lm_head:
        raise InvalidSubmitError(NO_LM_HEAD)
    _check_tokens(output, "the resubmitted output", spec.vocab_size)
    stop_token_ids = frozenset(submit.stop_token_ids) | (frozenset() if submit.ignore_eos else set(spec.eos_token_ids))
    if max(stop_token_ids, default=0) >= spec.vocab_size:
        stop_token_ids = _in_vocabulary(stop_token_ids, submit, spec)
    sampling = sampling_pb2.Sampling()
    sampling.CopyFrom(submit.sampling)
    del sampling.stop_token_ids[:]
    sampling.stop_token_ids.extend(sorted(stop_token_ids))
    _check_constraints(sampling, spec.vocab_size)
    return Request(
        id=request_id,
        prompt=prompt,
        max_tokens=submit.max_tokens,
        sampling=sampling,
        stop_token_ids=stop_token_ids,
        min_tokens=sampling.min_tokens,
        arrival_s=now_s,
        priority=submit.priority,
        tenant=submit.tenant,
        adapter=submit.adapter,
        salt=submit.cache_salt,
        output=output,
        name=submit.request_id,
        num_logprobs=sampling.num_logprobs if sampling.HasField("num_logprobs") else None,
        num_prompt_logprobs=sampling.num_prompt_logprobs if sampling.HasField("num_prompt_logprobs") else None,
    )


def _build_pooled(submit: pb.Submit, prompt: Tokens, request_id: int, spec: ModelSpec, now_s: float) -> Request:
    pooling = sampling_pb2.Pooling()
    pooling.CopyFrom(submit.pooling)
    if not 1 <= pooling.num_dims <= spec.hidden_size:
        raise InvalidSubmitError(f"dimensions={pooling.num_dims} must be between 1 and {spec.hidden_size}")
    if pooling.kind not in sampling_pb2.Pooling.Kind.values():
        raise InvalidSubmitError(f"kind {pooling.kind} of pooling is not one of LAST, MEAN and CLS")
    return Request(
        id=request_id,
        prompt=prompt,
        max_tokens=0,
        arrival_s=now_s,
        priority=submit.priority,
        tenant=submit.tenant,
        adapter=submit.adapter,
        salt=submit.cache_salt,
        name=submit.request_id,
        pooling=Pooling(4 * pooling.num_dims, pooling.kind != sampling_pb2.Pooling.LAST, pooling),
    )


def build_samples(first: Request, request_ids: Sequence[int]) -> list[Request]:
    """`first` and others like it with these ids: each draws with the next seed, and none of them asks of the prompt."""
    requests = [first]
    for place, request_id in enumerate(request_ids, start=1):
        sampling = sampling_pb2.Sampling()
        sampling.CopyFrom(first.sampling)
        sampling.seed = (first.sampling.seed + place) % 2**64
        sampling.ClearField("num_prompt_logprobs")
        requests.append(replace(first, id=request_id, sampling=sampling, num_prompt_logprobs=None))
    return requests


def build_search(
    first: Request, request_ids: Sequence[int], beams: pb.Beams, vocab_size: int
) -> tuple[list[Request], BeamParams]:
    """The requests of a beam search, `first` and others with these ids. Raises InvalidSubmitError."""
    ends = first.stop_token_ids
    num_candidates = beams.width + len(ends)
    if not 1 + len(request_ids) <= beams.width:
        raise InvalidSubmitError(f"a beam search of width {beams.width} cannot give {1 + len(request_ids)} sequences")
    if num_candidates > min(MAX_RECORDED, vocab_size):
        raise InvalidSubmitError(
            f"a beam search of width {beams.width} with {len(ends)} tokens that end the text needs the "
            f"{num_candidates} best tokens of each beam; {min(MAX_RECORDED, vocab_size)} are possible"
        )
    sampling = sampling_pb2.Sampling(top_p=1.0, repetition_penalty=1.0, num_logprobs=num_candidates)
    one = replace(first, sampling=sampling, num_logprobs=None, num_prompt_logprobs=None)
    early_stopping = _EARLY_STOPPING[beams.early_stopping]
    params = BeamParams(beams.width, num_candidates, beams.length_penalty, early_stopping, ends)
    return [one, *(replace(one, id=request_id) for request_id in request_ids)], params


def _check_constraints(sampling: sampling_pb2.Sampling, vocab_size: int) -> None:
    """Workers report no more of the best tokens than there are, and nobody could tell."""
    columns = {"allowed_token_ids": sampling.allowed_token_ids, "logit_bias": sampling.bias_token_ids}
    for name, column in columns.items():
        _check_tokens(np.frombuffer(column, "<i4"), name, vocab_size)
    for word in sampling.bad_words:
        _check_tokens(np.frombuffer(word, "<i4"), "bad_words", vocab_size)
    for name, number in (("logprobs", sampling.num_logprobs), ("prompt_logprobs", sampling.num_prompt_logprobs)):
        if number > min(MAX_RECORDED, vocab_size):
            raise InvalidSubmitError(f"{name}={number} is more than the {min(MAX_RECORDED, vocab_size)} possible")
    allowed = np.frombuffer(sampling.allowed_token_ids, "<i4")
    if sampling.min_tokens and len(allowed) and np.isin(allowed, sampling.stop_token_ids).all():
        raise InvalidSubmitError("allowed_token_ids has only tokens that end the text, and min_tokens forbids these")


def _check_tokens(tokens: Tokens, what: str, vocab_size: int) -> None:
    if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        bad = next(int(token) for token in tokens if not 0 <= token < vocab_size)
        raise InvalidSubmitError(f"{what} holds token {bad}, but the vocabulary has tokens 0 to {vocab_size - 1}")


def _in_vocabulary(stop_token_ids: frozenset[int], submit: pb.Submit, spec: ModelSpec) -> frozenset[int]:
    """The request's own ids must exist; of the model's, those that do not can never be sampled and are left out."""
    bad = [token for token in submit.stop_token_ids if token >= spec.vocab_size]
    if bad:
        raise InvalidSubmitError(f"stop_token_ids holds {bad[0]}, but the vocabulary has {spec.vocab_size} tokens")
    return frozenset(token for token in stop_token_ids if token < spec.vocab_size)
