"""Makes groups of requests, and finds their leaders when they have lost their replica."""

from dataclasses import replace

from manta.scheduler.beam_search import BeamParams, BeamSearch
from manta.scheduler.group import BeamGroup, Group
from manta.scheduler.sequence import Beam, Sequence
from manta.scheduler.types import Request


def samples_of(requests: list[Request], arrival: int, max_model_len: int) -> Group:
    """A sequence for each; the first leads. They arrive one after the other."""
    group = Group()
    for place, request in enumerate(requests):
        sequence = Sequence.of(request, arrival + place, max_model_len)
        sequence.group = group
        group.members.append(sequence)
    group.pending = group.members[1:]
    return group


def search_of(requests: list[Request], params: BeamParams, arrival: int, max_model_len: int) -> BeamGroup:
    """The search with its first beam, which has no output yet."""
    first = requests[0]
    max_length = min(len(first.prompt) + first.max_tokens, max_model_len)
    search = BeamSearch(params, len(first.prompt), max_length, first.min_tokens)
    group = BeamGroup(requests=list(requests), search=search)
    step = replace(first, stop_token_ids=frozenset(), num_logprobs=params.num_candidates, num_prompt_logprobs=None)
    root = Sequence.of(step, arrival, max_model_len)
    root.max_length = len(root.tokens) + 1
    root.group, root.beam = group, Beam()
    group.members = [root]
    return group


def leaders_of(waiting: list[Sequence]) -> list[Sequence]:
    """Who of those that have lost their replica goes to the queue: of each group the first, which the others await."""
    leaders: list[Sequence] = []
    led: set[Group] = set()
    for sequence in waiting:
        if sequence.group is not None and sequence.group in led:
            sequence.group.pending.append(sequence)
            continue
        leaders.append(sequence)
        if sequence.group is not None:
            led.add(sequence.group)
    return leaders
