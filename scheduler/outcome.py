"""Takes a step's sampled tokens into the picture and tells the outside what came of them."""

from itertools import compress

import numpy as np

from manta.scheduler.in_flight import InFlightStep
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.types import Events, Finished, FinishReason, StepResult, Tokens


def apply_result(replica: Replica, result: StepResult, events: Events) -> None:
    """Appends tokens, publishes blocks that are full, lets finished sequences leave. Raises WrongResultError."""
    step = replica.confirm(result)
    if step is None:
        return
    for sequence, num_full in step.grown.values():
        replica.publish(sequence, num_full)
    num_rows = len(step.rows)
    if num_rows:
        _apply_decodes(replica, step, result.tokens[:num_rows], events)
    if step.prefills:
        _apply_prefills(replica, step, result.tokens[num_rows:], events)
    # Who ended by a stop token at the limit has left, and with that the step's `ending`.
    for sequence in list(step.ending.values()):
        finish(replica, sequence, "length", None, events)


def finish(replica: Replica, sequence: Sequence, reason: FinishReason, stop_token: int | None, events: Events) -> None:
    """A resident sequence ends with the tokens that are confirmed."""
    replica.leave(sequence, Status.FINISHED)
    num_output_tokens = len(sequence.tokens) - len(sequence.request.prompt)
    events.finished.append(Finished(sequence.request, reason, stop_token, num_output_tokens))


def _apply_decodes(replica: Replica, step: InFlightStep, tokens: Tokens, events: Events) -> None:
    rows = step.rows
    slots, lengths, requests = rows.slots, rows.offsets + step.clock, rows.requests
    if step.left:  # tokens of those who have left are surplus
        kept = np.ones(len(rows), np.bool_)
        kept[rows.indices(step.left)] = False
        slots, lengths, tokens = slots[kept], lengths[kept], tokens[kept]
        requests = list(compress(requests, kept.tolist()))
    replica.slots.tokens[slots, lengths] = tokens
    events.requests += requests
    events.tokens += tokens.tolist()
    for index in replica.stops.candidates(tokens):
        _stop_at(replica, step, int(slots[index]), int(tokens[index]), int(lengths[index]) + 1, events)


def _apply_prefills(replica: Replica, step: InFlightStep, tokens: Tokens, events: Events) -> None:
    sampled = iter(tokens.tolist())
    for slot, prefill in step.prefills.items():
        token = next(sampled) if prefill.samples else None
        if slot in step.left:
            continue
        sequence = prefill.sequence
        sequence.num_computed += prefill.num_tokens
        replica.publish(sequence, sequence.num_computed // replica.capacity.block_size)
        if token is not None:
            num_tokens = len(sequence.tokens)
            replica.slots.tokens[slot, num_tokens] = token
            events.requests.append(sequence.request)
            events.tokens.append(token)
            _stop_at(replica, step, slot, token, num_tokens + 1, events)


def _stop_at(replica: Replica, step: InFlightStep, slot: int, token: int, num_tokens: int, events: Events) -> None:
    """Ends the sequence in `slot` if the token, its last of `num_tokens`, is one of its stop tokens."""
    sequence = replica.slots.at(slot)
    if sequence.stops_at(token, num_tokens):
        finish(replica, sequence, "stop", token, events)
        step.drop(slot)
