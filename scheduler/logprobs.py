"""Whose the records of log-probabilities are that come with a step's tokens.

How many there are, and how long each is, follows from what requests asked for: see `protos/worker.proto`. What they say
is not looked at here.
"""

from manta.scheduler.in_flight import InFlightStep, Prefill
from manta.scheduler.slots import SlotTable
from manta.scheduler.types import Events, Logprobs, record_bytes


def num_record_bytes(step: InFlightStep, slots: SlotTable) -> int:
    """What the answer to a step must bring."""
    total: int = sum(slots.record_bytes[slot] for slot in step.rows.slots.tolist())
    for prefill in step.prefills.values():
        request = prefill.sequence.request
        total += _num_scored(prefill) * record_bytes(request.num_prompt_logprobs)
        total += prefill.samples * record_bytes(request.num_logprobs)
    return total


def route_logprobs(step: InFlightStep, slots: SlotTable, data: bytes, events: Events) -> None:
    """Hands the records out, but those of sequences that have left. To be called before the step's tokens are applied,
    which may end sequences. What was told of a prompt before a preemption is not told again."""
    begin = 0
    for slot, request_id in zip(step.rows.slots.tolist(), step.rows.request_ids.tolist(), strict=True):
        size = slots.record_bytes[slot]
        if size and slot not in step.left:
            events.logprobs.append(Logprobs(request_id, b"", data[begin : begin + size]))
        begin += size
    for slot, prefill in step.prefills.items():
        sequence, request = prefill.sequence, prefill.sequence.request
        size, num_scored = record_bytes(request.num_prompt_logprobs), _num_scored(prefill)
        prompt_end = begin + size * num_scored
        end = prompt_end + prefill.samples * record_bytes(request.num_logprobs)
        if slot not in step.left and begin < end:
            num_known = min(max(sequence.num_scored - prefill.start, 0), num_scored)
            prompt = data[begin + size * num_known : prompt_end]
            if sequence.beam is not None:
                sequence.beam.record = data[prompt_end:end]
            else:
                events.logprobs.append(Logprobs(request.id, prompt, data[prompt_end:end]))
            sequence.num_scored = max(sequence.num_scored, prefill.start + num_scored)
        begin = end


def _num_scored(prefill: Prefill) -> int:
    """Tokens of the prompt behind those that are computed."""
    return max(min(prefill.num_tokens, prefill.sequence.num_to_score - prefill.start), 0)
