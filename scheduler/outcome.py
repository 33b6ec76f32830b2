"""Takes a step's sampled tokens into the picture and tells the outside what came of them."""

from dataclasses import replace

import numpy as np

from manta.scheduler.beams import take_answers
from manta.scheduler.in_flight import InFlightStep
from manta.scheduler.logprobs import route_logprobs
from manta.scheduler.pooling import vectors_by_slot
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.types import Events, Finished, FinishReason, StepResult, Tokens


def apply_result(replica: Replica, result: StepResult, events: Events) -> None:
    """Appends tokens, publishes blocks that are full, lets finished sequences leave. Raises WrongResultError."""
    step = replica.confirm(result)
    if step is None:
        return
    if result.logprobs:
        route_logprobs(step, replica.slots, result.logprobs, events)
    if step.filled:
        replica.note_filled(step.filled)
    num_rows = len(step.rows)
    if num_rows:
        _apply_decodes(replica, step, result.tokens[:num_rows], events)
    if step.prefills:
        _apply_prefills(replica, step, result.tokens[num_rows:], events)
    # Who ended by a stop token at the limit has left, and with that the step's `ending`.
    if step.ending:
        ending = list(step.ending.values())
        vectors = vectors_by_slot(step, result.vectors) if result.vectors else {}
        for sequence in ending:
            if sequence.request.pooling is not None:
                finish(replica, sequence, "stop", None, events, vectors[sequence.slot])
            elif sequence.beam is None:
                finish(replica, sequence, "length", None, events)
        take_answers(replica, [sequence for sequence in ending if sequence.beam is not None], events)


def finish(
    replica: Replica,
    sequence: Sequence,
    reason: FinishReason,
    stop_token: int | None,
    events: Events,
    vector: bytes = b"",
) -> None:
    """A resident sequence ends with the tokens that are confirmed."""
    replica.leave(sequence, Status.FINISHED)
    num_output_tokens = len(sequence.tokens) - len(sequence.request.prompt)
    events.finished.append(Finished(sequence.request, reason, stop_token, num_output_tokens, vector=vector))


def finished_with_error(finished: Finished, message: str) -> Finished:
    """What is told of a request that was aborted for its own fault."""
    return replace(finished, reason="error", error=message)


def _apply_decodes(replica: Replica, step: InFlightStep, tokens: Tokens, events: Events) -> None:
    rows = step.rows
    if step.left:  # tokens of those who have left are surplus
        kept = np.ones(len(rows), np.bool_)
        kept[rows.indices(step.left)] = False
        rows, tokens = rows.select(kept), tokens[kept]
    slots, lengths = rows.slots, rows.offsets + step.clock
    replica.slots.put(slots, lengths, tokens)
    if replica.meter is not None:
        replica.meter.charge_rows(replica.tenants[slots])
    events.request_ids, events.tokens = rows.request_ids, tokens
    for index in replica.stops.candidates(tokens):
        _stop_at(replica, step, int(slots[index]), int(tokens[index]), int(lengths[index]) + 1, events)


def _apply_prefills(replica: Replica, step: InFlightStep, tokens: Tokens, events: Events) -> None:
    sampled = iter(tokens.tolist())
    new_ids: list[int] = []
    new_tokens: list[int] = []
    for slot, prefill in step.prefills.items():
        token = next(sampled) if prefill.samples else None
        if slot in step.left:
            continue
        sequence = prefill.sequence
        sequence.num_computed += prefill.num_tokens
        if token is not None and replica.meter is not None:
            replica.meter.charge_rows(replica.tenants[slot : slot + 1])
        if token is not None and sequence.beam is None:
            num_tokens = len(sequence.tokens)
            replica.slots.tokens[slot, num_tokens] = token
            new_ids.append(sequence.request.id)
            new_tokens.append(token)
            _stop_at(replica, step, slot, token, num_tokens + 1, events)
    if new_ids:
        events.request_ids = np.append(events.request_ids, new_ids)
        events.tokens = np.append(events.tokens, np.array(new_tokens, np.int32))


def _stop_at(replica: Replica, step: InFlightStep, slot: int, token: int, num_tokens: int, events: Events) -> None:
    """Ends the sequence in `slot` if the token, its last of `num_tokens`, is one of its stop tokens."""
    sequence = replica.slots.at(slot)
    if sequence.stops_at(token, num_tokens):
        finish(replica, sequence, "stop", token, events)
        step.drop(slot)
